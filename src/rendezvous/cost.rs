//! What a node's standing requests cost on S3, in requests and USD a day.
//!
//! | a node | PUT | LIST | HEAD | GET | USD a day |
//! |---|---|---|---|---|---|
//! | alone, as its own leader | 21,600 | 0 | 17,280 | 17,280 | 0.122 |
//! | leads, with room for more | 21,600 | 8,640 | 17,280 | 17,280 | 0.165 |
//! | leads, without room | 21,600 | 1,440 | 17,280 | 17,280 | 0.129 |
//! | follows | 2,880 | 0 | 0 | 1,440 | 0.015 |
//! | waits outside | 2,880 | 1,440 | 0 | 8,640 | 0.025 |
//!
//! Sixteen nodes with room for more cost 0.39 USD a day, a thousand without room 15.09 USD. A unit test holds these
//! figures against the intervals in the code. Saves, restores and the journal's records come on top; they depend on the
//! work.

use std::time::Duration;

use super::{
    heartbeat::INTERVAL,
    membership::{FOLLOWER_INTERVAL, FOLLOWER_JOURNAL, LIST, LOOK, Role, SELDOM_LIST, beat_every},
};
use crate::notice;

/// USD for a PUT or a LIST (S3 Standard, us-east-1, 2026).
pub const PUT: f64 = 0.005 / 1000.0;
/// USD for a GET or a HEAD.
pub const GET: f64 = 0.0004 / 1000.0;
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Between two looks of a leader for a newer generation, which would fence it.
pub const FENCE: Duration = Duration::from_secs(5);

/// Requests of one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Objects put.
    pub put: u64,
    /// Listings.
    pub list: u64,
    /// Heads.
    pub head: u64,
    /// Reads.
    pub get: u64,
}

impl Requests {
    /// Their price in USD.
    pub const fn usd(self) -> f64 {
        (self.put + self.list) as f64 * PUT + (self.head + self.get) as f64 * GET
    }
}

/// The standing requests of a node in a day; `full`: the generation has no room for another node.
pub const fn a_day(role: Role, full: bool) -> Requests {
    let put = times(beat_every(role, false));
    match role {
        Role::Leader => Requests {
            put,
            list: times(if full { SELDOM_LIST } else { LIST }),
            head: times(notice::drain::INTERVAL),
            get: times(FENCE),
        },
        Role::Follower => Requests { put, list: 0, head: 0, get: times(FOLLOWER_JOURNAL) },
        // It watches the leader's heartbeat.
        Role::Waiting => Requests { put, list: times(SELDOM_LIST), head: 0, get: times(LOOK) },
    }
}

/// USD a day for a generation of N nodes.
pub const fn usd_a_day(nodes: u32, full: bool) -> f64 {
    let followers = nodes.saturating_sub(1) as f64;
    let leader = if nodes == 0 { 0.0 } else { a_day(Role::Leader, full).usd() };
    leader + followers * a_day(Role::Follower, full).usd()
}

/// How often a day.
const fn times(every: Duration) -> u64 {
    (DAY.as_millis() / every.as_millis()) as u64
}

// A day holds each interval, so `times` never divides by zero.
const _: () = assert!(INTERVAL.as_millis() > 0 && FOLLOWER_INTERVAL.as_millis() > 0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_what_the_intervals_cost() {
        let fence = format!("pub const LOOK: Duration = Duration::from_secs({});", FENCE.as_secs());
        assert!(include_str!("../agent/fence.rs").contains(&fence), "leaders look for a newer generation otherwise");
        let alone = Requests { list: 0, ..a_day(Role::Leader, true) };
        let rows = [
            ("alone, as its own leader", alone),
            ("leads, with room for more", a_day(Role::Leader, false)),
            ("leads, without room", a_day(Role::Leader, true)),
            ("follows", a_day(Role::Follower, true)),
            ("waits outside", a_day(Role::Waiting, true)),
        ];
        let text = include_str!("cost.rs");
        for (name, Requests { put, list, head, get }) in rows {
            let usd = Requests { put, list, head, get }.usd();
            let [put, list, head, get] = [put, list, head, get].map(thousands);
            let row = format!("//! | {name} | {put} | {list} | {head} | {get} | {usd:.3} |\n");
            assert!(text.contains(&row), "the header lacks {row}");
        }
        let sums = format!(
            "//! Sixteen nodes with room for more cost {:.2} USD a day, a thousand without room {:.2} USD.",
            usd_a_day(16, false),
            usd_a_day(1000, true)
        );
        assert!(text.contains(&sums), "the header lacks {sums}");
        assert_eq!(usd_a_day(0, false), 0.0);
        assert_eq!(usd_a_day(1, true), a_day(Role::Leader, true).usd());
    }

    fn thousands(number: u64) -> String {
        if number < 1000 { number.to_string() } else { format!("{},{:03}", number / 1000, number % 1000) }
    }
}
