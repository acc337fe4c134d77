//! A node that holds up the last save of a group that was asked to stop: a pure decision.
//!
//! Nobody trains any more, and no deadline says how long the save may take: a person has asked, nodes wait to join, or
//! a node leaves that has time. The store's own retries and the save's tries then take many minutes for one node that
//! is cut off from the store, while all others wait. So the save is given up when, for a time
//! ([`finish::limit`](crate::agent::finish::limit)), it has not come further than ever before, and only some nodes'
//! parts are to blame: others' have ended well meanwhile.
//!
//! | the save has not come further for | and | then |
//! |---|---|---|
//! | the limit | some other node's part is missing or has failed, and the leader reaches the store | it is given up |
//! | 10 minutes | the leader's own is, or too few nodes would be left | the same |
//! | however long | nobody's part has ended well: the store is away for all | it is tried again |
//!
//! An upload that is slow comes further, and is waited for. A store that is away for all has nobody's fault: giving up
//! then would lose steps that its return saves. The leader asks the store before it blames another node for the same
//! reason; of itself it can't know, so it waits as long as a member that must leave waits for its leader.
//!
//! Who is to blame is left out by name, and the others end with the newest checkpoint, or form anew without it. The
//! steps after that checkpoint are lost; waiting for all tries loses the same, later.
//!
//! *Crash:* nothing is stored; the save that was given up is nobody's. *Retry:* none: the generation ends. *Cancel:*
//! the save may end well until the moment at which it is given up, and then counts.

use std::{collections::BTreeSet, time::Duration};

use super::{
    fault::{Consequence, Group, Standing},
    scheduler::Moment,
};
use crate::ids::{NodeId, Step};

/// How long the save is waited for at most if giving it up helps nobody else.
const LONGEST: Duration = Duration::from_secs(600);

/// The last save, as far as it has come.
#[derive(Debug, Default)]
pub struct HoldUp {
    step: Step,
    /// Bytes of this try.
    sent: u64,
    /// The most that any try of this step has sent.
    most: u64,
    /// Since when it has not come further.
    since: Option<Moment>,
    /// The nodes whose parts are missing or have failed, while others' have not; of the newest try that says so.
    suspects: BTreeSet<NodeId>,
}

impl HoldUp {
    /// A try begins.
    pub fn begins(&mut self, step: Step) {
        if self.step != step {
            *self = Self { step, ..Self::default() };
        }
        self.sent = 0;
    }

    /// This many more bytes have reached the store.
    pub fn sent(&mut self, bytes: u64, now: Moment) {
        self.sent = self.sent.saturating_add(bytes);
        if self.sent > self.most {
            self.most = self.sent;
            self.since = Some(now);
        }
    }

    /// It is committed.
    pub fn saved(&mut self) {
        *self = Self::default();
    }

    /// A look while the group waits for it. `Some`: it is to be given up, if the store can be reached from here,
    /// after this many seconds.
    pub fn look(&mut self, standing: &Standing, group: &Group, now: Moment, limit: Duration) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let found = group.at_fault(standing);
        if !found.is_empty() {
            self.suspects = found;
        }
        if self.suspects.is_empty() {
            return None;
        }
        let helps = matches!(group.without(self.suspects.clone()), Consequence::LeaveOut(_));
        let limit = if helps { limit } else { limit.max(LONGEST) };
        let waited = now.saturating_sub(since);
        (waited >= limit).then_some(waited.as_secs())
    }

    /// The nodes to blame.
    pub fn suspects(&self) -> Standing {
        Standing { missing: self.suspects.clone(), failed: BTreeSet::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(120);

    fn ids(names: &str) -> BTreeSet<NodeId> {
        names.split_whitespace().map(|name| NodeId::new(name).unwrap()).collect()
    }

    fn group(min: usize) -> Group {
        Group { leader: NodeId::new("a").unwrap(), members: ids("a b c"), min }
    }

    fn standing(missing: &str, failed: &str) -> Standing {
        Standing { missing: ids(missing), failed: ids(failed) }
    }

    fn at(seconds: u64) -> Moment {
        Moment::from_secs(seconds)
    }

    fn begun() -> HoldUp {
        let mut holdup = HoldUp::default();
        holdup.begins(Step(8));
        holdup.sent(100, at(10));
        holdup
    }

    #[test]
    fn a_save_that_one_node_holds_up_is_given_up_after_the_limit() {
        let mut holdup = begun();
        let c = standing("c", "");
        assert_eq!(holdup.look(&c, &group(2), at(20), LIMIT), None);
        assert_eq!(holdup.look(&c, &group(2), at(129), LIMIT), None);
        assert_eq!(holdup.look(&c, &group(2), at(130), LIMIT), Some(120));
        assert_eq!(holdup.suspects(), c);
        // What comes further is waited for.
        holdup.sent(1, at(125));
        assert_eq!(holdup.look(&c, &group(2), at(244), LIMIT), None);
        assert_eq!(holdup.look(&c, &group(2), at(245), LIMIT), Some(120));
        // A commit ends it, and another step begins anew.
        holdup.saved();
        holdup.begins(Step(9));
        assert_eq!(holdup.look(&c, &group(2), at(900), LIMIT), None);
    }

    #[test]
    fn another_try_comes_no_further_by_sending_the_same_again() {
        let mut holdup = begun();
        for try_ in 1..12 {
            assert_eq!(holdup.look(&standing("", "c"), &group(2), at(10 * try_ + 9), LIMIT), None);
            holdup.begins(Step(8));
            holdup.sent(100, at(10 * try_ + 10));
            // All parts are under way: the last try says who it was.
            assert_eq!(holdup.look(&standing("a b c", ""), &group(2), at(10 * try_ + 10), LIMIT), None);
        }
        assert_eq!(holdup.look(&standing("a b c", ""), &group(2), at(130), LIMIT), Some(120));
        assert_eq!(holdup.suspects(), standing("c", ""));
    }

    #[test]
    fn nobody_is_blamed_for_a_store_that_is_away_and_longer_is_waited_where_giving_up_helps_nobody() {
        let mut holdup = begun();
        for all in [standing("a b c", ""), standing("a b", "c"), standing("", "a b c")] {
            assert_eq!(holdup.look(&all, &group(1), at(9999), LIMIT), None);
        }
        for (min, suspects) in [(3, "c"), (1, "a"), (2, "b c")] {
            let mut holdup = begun();
            assert_eq!(holdup.look(&standing(suspects, ""), &group(min), at(609), LIMIT), None, "{suspects}");
            assert_eq!(holdup.look(&standing(suspects, ""), &group(min), at(610), LIMIT), Some(600), "{suspects}");
            let longer = Duration::from_secs(700);
            assert_eq!(holdup.look(&standing(suspects, ""), &group(min), at(610), longer), None, "{suspects}");
        }
        // All parts stand, and the leader can't write the record.
        let mut leader = begun();
        assert_eq!(leader.look(&standing("", ""), &group(1), at(610), LIMIT), Some(600));
    }
}
