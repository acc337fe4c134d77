//! The number of bulk requests in flight at once: measured, not configured. Pure: time is passed in.
//!
//! Additive increase, multiplicative decrease (Chiu and Jain 1989, as in TCP), with latency as the early sign, as in
//! TCP Vegas (Brakmo and Peterson 1995). Requests are counted in rounds of about as many as may be in flight. After
//! each round:
//!
//! | result of the round | new limit |
//! |---|---|
//! | a request was refused as too fast (503 `SlowDown`, 429), or timed out | half as many, and no more doubling |
//! | requests take at most [`NEAR`] times the least latency so far, or the throughput was higher than with fewer in flight | one more; twice as many until the first sign of a queue |
//! | they take more than [`FAR`] times that | an eighth fewer: they only wait for each other |
//! | otherwise | unchanged |
//!
//! A round in which the limit did not bind proves nothing and changes nothing. The least latency can only be measured
//! with few in flight, and it changes: so every [`TRIAL`] rounds, and at the first sign of a queue, one round runs with
//! half as many. If the throughput is as good, the limit stays halved, and the next trial follows at once; either way
//! its latency is the new least.

use std::time::Duration;

/// The limit to begin with at an unknown store.
const FIRST: usize = 4;
/// Up to this multiple of the least latency there is no queue worth mentioning.
const NEAR: f64 = 1.5;
/// From this multiple of the least latency on, requests mostly wait for each other.
const FAR: f64 = 3.0;
/// By which factor a round must move more bytes per second than the one before, to count as better.
const BETTER: f64 = 1.05;
/// Half as many requests are as good if they reach this share of the earlier bytes per second.
const AS_GOOD: f64 = 0.9;
/// Rounds between trials.
const TRIAL: u32 = 50;
/// Rounds after a refusal without a raise: otherwise, with few in flight, every fifth request would be refused.
const CALM: u32 = 3;
/// The least number of requests in a round.
const LEAST_ROUND: usize = 4;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Outcome {
    /// It moved this many bytes.
    Done(u64),
    /// The store asked us to slow down, or did not answer in time.
    Refused,
}

/// Why the limit has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// The store is not busy.
    AtEase,
    /// Requests wait for each other.
    Crowded,
    /// The store asked us to slow down.
    Refused,
    /// A trial: do fewer do as well?
    Trial,
}

/// Sums over the requests of one round.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    begun: Duration,
    requests: usize,
    /// Those that ended while the limit bound.
    bound: usize,
    bytes: u64,
    /// Requests that count for latency: all but small ones, whose time proves little.
    large: u32,
    took: Duration,
}

/// The limit, and the figures behind it.
#[derive(Clone, Debug)]
pub(super) struct AdaptiveLimit {
    limit: usize,
    most: usize,
    adapts: bool,
    doubling: bool,
    round: Round,
    /// Seconds that a large request takes on a store that is not busy.
    least: Option<f64>,
    /// Bytes a second of the last round that counted, and whether the limit was raised after it.
    before: Option<(f64, bool)>,
    /// The largest request so far.
    largest: u64,
    /// Rounds since the last trial.
    since_trial: u32,
    /// While a trial lasts: the limit before it, and its bytes a second.
    trial: Option<(usize, f64)>,
    /// Requests from before the limit was lowered, which are still in flight and prove nothing about it.
    settling: usize,
    /// Rounds to go before the limit may rise.
    calm: u32,
    /// Refusals of requests that began before this have been answered already.
    cut: Duration,
}

impl AdaptiveLimit {
    /// Finds its limit between 1 and `most`.
    pub(super) fn adaptive(most: usize) -> Self {
        let most = most.max(1);
        Self {
            limit: most.min(FIRST),
            most,
            adapts: true,
            doubling: true,
            round: Round::default(),
            least: None,
            before: None,
            largest: 0,
            since_trial: 0,
            trial: None,
            settling: 0,
            calm: 0,
            cut: Duration::ZERO,
        }
    }

    /// Stays at `most`: a disk of this machine has a queue of its own.
    pub(super) fn fixed(most: usize) -> Self {
        Self { limit: most.max(1), adapts: false, ..Self::adaptive(most) }
    }

    /// Requests that may be in flight.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// The first request after an idle time: that time belongs to no round.
    pub(super) fn wakes(&mut self, now: Duration) {
        self.round = Round { begun: now, ..Round::default() };
        self.settling = 0;
    }

    /// A request that began at `began` has ended; `bound`: others waited for its place, or could have taken none.
    pub(super) fn ended(&mut self, began: Duration, now: Duration, bound: bool, outcome: Outcome) -> Option<Reason> {
        if !self.adapts {
            return None;
        }
        match outcome {
            Outcome::Refused if began < self.cut => None,
            Outcome::Refused => {
                self.doubling = false;
                self.cut = now;
                self.before = None;
                self.trial = None;
                self.calm = CALM;
                self.wakes(now);
                self.set((self.limit / 2).max(1), Reason::Refused)
            }
            Outcome::Done(_) if self.settling > 0 => {
                self.settling -= 1;
                self.round.begun = now;
                None
            }
            Outcome::Done(bytes) => {
                self.largest = self.largest.max(bytes);
                self.round.requests += 1;
                self.round.bound += usize::from(bound);
                self.round.bytes += bytes;
                if bytes >= self.largest / 2 {
                    self.round.large += 1;
                    self.round.took += now.saturating_sub(began);
                }
                if self.round.requests < self.limit.max(LEAST_ROUND) { None } else { self.close(now) }
            }
        }
    }

    fn close(&mut self, now: Duration) -> Option<Reason> {
        let round = self.round;
        self.wakes(now);
        let seconds = now.saturating_sub(round.begun).as_secs_f64();
        if round.bound * 2 < round.requests || round.large == 0 || seconds <= 0.0 {
            return None;
        }
        let latency = round.took.as_secs_f64() / f64::from(round.large);
        let rate = round.bytes as f64 / seconds;
        if let Some((limit, before)) = self.trial.take() {
            self.least = Some(latency);
            self.before = None;
            if rate >= before * AS_GOOD {
                self.since_trial = TRIAL;
                return None;
            }
            self.since_trial = 0;
            return self.set(limit, Reason::AtEase);
        }
        let least = self.least.map_or(latency, |least| least.min(latency));
        self.least = Some(least);
        self.since_trial += 1;
        if self.since_trial > TRIAL && self.limit > 1 {
            self.trial = Some((self.limit, rate));
            self.settling = self.limit;
            return self.set(self.limit / 2, Reason::Trial);
        }
        let better = self.before.is_some_and(|(before, raised)| raised && rate > before * BETTER);
        let changed = if latency <= least * NEAR || better {
            let more = if self.doubling { self.limit } else { usize::from(self.calm == 0) };
            self.calm = self.calm.saturating_sub(1);
            self.set((self.limit + more).min(self.most), Reason::AtEase)
        } else {
            if std::mem::take(&mut self.doubling) {
                self.since_trial = TRIAL;
            }
            let fewer = if latency > least * FAR { (self.limit / 8).max(1) } else { 0 };
            self.set(self.limit.saturating_sub(fewer).max(1), Reason::Crowded)
        };
        self.before = Some((rate, changed == Some(Reason::AtEase)));
        changed
    }

    fn set(&mut self, limit: usize, reason: Reason) -> Option<Reason> {
        let changed = limit != self.limit;
        self.limit = limit;
        changed.then_some(reason)
    }
}

#[cfg(test)]
mod tests {
    use std::{cmp::Reverse, collections::BinaryHeap};

    use super::*;

    const PART: u64 = 16 << 20;

    /// A store that serves `knee` requests at full speed; more of them share what there is.
    struct Simulated {
        /// Milliseconds of a request on a store at ease.
        base_ms: u64,
        knee: usize,
        /// More than this many in flight are answered with "slow down".
        refuses_above: usize,
        /// The share by which a time varies to either side.
        noise: f64,
        /// Each request beyond the knee takes this share of the whole capacity with it.
        collapse: f64,
    }

    const PLAIN: Simulated = Simulated { base_ms: 200, knee: 1, refuses_above: usize::MAX, noise: 0.0, collapse: 0.0 };

    /// What `requests` requests came to: the limit after each, bytes a second in the second half, and refusals.
    fn drive(store: &Simulated, adaptive: &mut AdaptiveLimit, requests: usize) -> (Vec<usize>, f64, usize) {
        let mut random = 7_u64;
        let (mut flying, mut now) = (BinaryHeap::new(), Duration::ZERO);
        let (mut limits, mut refused, mut bytes, mut half) = (Vec::new(), 0, 0, Duration::ZERO);
        adaptive.wakes(now);
        while limits.len() < requests {
            while flying.len() < adaptive.limit() {
                let over = (flying.len() + 1) as f64 / store.knee as f64;
                let crowd = over.max(1.0) * (1.0 + store.collapse * (over - 1.0).max(0.0));
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let noise = 1.0 + store.noise * ((random >> 33) as f64 / f64::from(1_u32 << 30) - 1.0);
                let refuses = flying.len() >= store.refuses_above;
                let took = if refuses { 20.0 } else { store.base_ms as f64 * crowd * noise };
                flying.push(Reverse((now + Duration::from_secs_f64(took / 1e3), now, refuses)));
            }
            let Some(Reverse((ended, began, refuses))) = flying.pop() else { unreachable!() };
            now = ended;
            let outcome = if refuses { Outcome::Refused } else { Outcome::Done(PART) };
            refused += usize::from(refuses);
            adaptive.ended(began, now, true, outcome);
            limits.push(adaptive.limit());
            if limits.len() == requests / 2 {
                half = now;
            }
            if limits.len() > requests / 2 && !refuses {
                bytes += PART;
            }
        }
        (limits, bytes as f64 / (now - half).as_secs_f64(), refused)
    }

    #[test]
    fn the_knee_of_a_store_is_found_and_kept() {
        for knee in [1, 2, 4, 7, 16, 40, 100] {
            for noise in [0.0, 0.2] {
                let store = Simulated { knee, noise, ..PLAIN };
                let mut adaptive = AdaptiveLimit::adaptive(128);
                let (limits, rate, _) = drive(&store, &mut adaptive, 6000);
                let best = knee as f64 * PART as f64 / 0.2;
                assert!(rate > 0.93 * best, "knee {knee}, noise {noise}: {:.2} of the best", rate / best);
                let late = &limits[3000..];
                let most = late.iter().max().unwrap();
                assert!(*most <= (4 * knee).max(FIRST + 1), "knee {knee}, noise {noise}: up to {most} in flight");
            }
        }
    }

    #[test]
    fn a_fast_store_is_up_to_speed_within_three_rounds() {
        let mut adaptive = AdaptiveLimit::adaptive(32);
        let (limits, ..) = drive(&Simulated { knee: 64, ..PLAIN }, &mut adaptive, 40);
        assert_eq!(limits[3], 8, "{limits:?}");
        assert_eq!(*limits.last().unwrap(), 32, "{limits:?}");
    }

    #[test]
    fn a_store_that_breaks_down_under_load_is_not_broken_down() {
        let store = Simulated { knee: 8, collapse: 0.5, ..PLAIN };
        let (limits, rate, _) = drive(&store, &mut AdaptiveLimit::adaptive(64), 4000);
        let best = 8.0 * PART as f64 / 0.2;
        assert!(rate > 0.7 * best, "{:.2} of the best, at {}", rate / best, limits.last().unwrap());
    }

    #[test]
    fn a_store_that_refuses_is_left_alone_and_tried_again() {
        for allowed in [1, 6, 20] {
            let store = Simulated { knee: 64, refuses_above: allowed, ..PLAIN };
            let (limits, rate, refused) = drive(&store, &mut AdaptiveLimit::adaptive(64), 4000);
            let late = &limits[1000..];
            assert!(late.iter().all(|&limit| limit <= allowed + 1), "{allowed}: {:?}", late.iter().max());
            assert!(refused * 10 < 4000, "{allowed}: {refused} of 4000 were refused");
            let best = allowed as f64 * PART as f64 / 0.2;
            assert!(rate > 0.6 * best, "{allowed}: {:.2} of the best", rate / best);
        }
    }

    #[test]
    fn one_storm_is_one_cut() {
        let mut adaptive = AdaptiveLimit::adaptive(64);
        drive(&Simulated { knee: 128, ..PLAIN }, &mut adaptive, 400);
        assert_eq!(adaptive.limit(), 64);
        let at = |s| Duration::from_secs(s);
        assert_eq!(adaptive.ended(at(1000), at(1001), true, Outcome::Refused), Some(Reason::Refused));
        for _ in 0..63 {
            assert_eq!(adaptive.ended(at(1000), at(1002), true, Outcome::Refused), None);
        }
        assert_eq!(adaptive.limit(), 32);
        // Those that were sent after the cut count again.
        assert_eq!(adaptive.ended(at(1001), at(1003), true, Outcome::Refused), Some(Reason::Refused));
        assert_eq!(adaptive.limit(), 16);
    }

    #[test]
    fn what_did_not_bind_says_nothing_and_a_disk_is_not_paced() {
        let ms = Duration::from_millis;
        for (mut adaptive, bound) in [(AdaptiveLimit::adaptive(16), false), (AdaptiveLimit::fixed(16), true)] {
            let limit = adaptive.limit();
            for i in 0..200 {
                assert_eq!(adaptive.ended(ms(i), ms(i + 1), bound, Outcome::Done(PART)), None);
            }
            assert_eq!(adaptive.limit(), limit);
        }
        assert_eq!(AdaptiveLimit::fixed(16).ended(ms(0), ms(1), true, Outcome::Refused), None);
    }

    #[test]
    fn a_store_that_became_slower_for_good_is_learnt_anew() {
        let mut adaptive = AdaptiveLimit::adaptive(32);
        drive(&Simulated { knee: 32, ..PLAIN }, &mut adaptive, 500);
        // As if a request had once taken a tenth of what they take now.
        adaptive.least = Some(0.02);
        let (limits, ..) = drive(&Simulated { knee: 64, ..PLAIN }, &mut adaptive, 20_000);
        assert_eq!(*limits.last().unwrap(), 32);
    }
}
