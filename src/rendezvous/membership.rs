//! Who lives, as far as the store shows it: pure judgements of heartbeats that others have read.
//!
//! Two machines' clocks are never compared. There are two ways to judge:
//! - **Watching** ([`Watch`]): a counter that does not change while this process looks again and again. Only time
//!   between two looks counts, and of a long pause between them only a little: this process may have been stopped, or
//!   the store may have been away for everybody.
//! - **One list** ([`judge`]): the store stamps each object with its own clock. Beside this node's own beat, put right
//!   before the list was asked for, a beat that is older than three of its intervals belongs to a dead node. That takes
//!   one request instead of half a minute, and it is a hint: a node whose beats don't reach the store lives. It is
//!   enough to choose who proposes; a leader is taken over only if its counter is then seen to stand still for a while,
//!   too.
//!
//! A heartbeat that is *missing* proves nothing: somebody may have deleted it by mistake. A node that leaves a run of
//! several nodes leaves a tombstone (`left`), which is the one sign of a clean end; whoever forms the next generation
//! deletes the heartbeats of the dead after its `formed` stands, not before ([`may_bury`]).

use std::time::Duration;

use jiff::Timestamp;

use super::{
    heartbeat::{Group, INTERVAL, MISSED, NEAR_INTERVAL},
    policy::Roster,
};
use crate::ids::NodeId;

/// Time between two beats of a node that does not lead: the channel tells the leader more, and sooner.
pub const FOLLOWER_INTERVAL: Duration = Duration::from_secs(30);
/// The most that one pause between two looks counts, and so the longest useful pause.
pub const LOOK: Duration = Duration::from_secs(10);
/// The pause between two looks of a member that lost its leader.
pub const URGENT_LOOK: Duration = Duration::from_secs(2);
/// Between two lists of the heartbeats, by a leader that has room for more nodes.
pub const LIST: Duration = Duration::from_secs(10);
/// The same, by a leader that has no room, and by nodes that wait and would not propose.
pub const SELDOM_LIST: Duration = Duration::from_secs(60);
/// Between two lists while a first generation is awaited, in the first minute of waiting.
pub const FIRST_LIST: Duration = Duration::from_secs(2);
/// Between two reads of the journal's next number by a follower: the channel brings what is new.
pub const FOLLOWER_JOURNAL: Duration = Duration::from_secs(60);

/// A node's part in the newest generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads.
    Leader,
    /// It is a member.
    Follower,
    /// It is none.
    Waiting,
}

/// Time between two beats.
pub const fn beat_every(role: Role, local_store: bool) -> Duration {
    match role {
        _ if local_store => NEAR_INTERVAL,
        Role::Leader => INTERVAL,
        Role::Follower | Role::Waiting => FOLLOWER_INTERVAL,
    }
}

/// Time between two lists of the heartbeats; `waited`: since this node began to wait. `None`: it needs none.
pub fn list_every(role: Role, may_propose: bool, full: bool, waited: Duration) -> Option<Duration> {
    match role {
        Role::Follower => None,
        Role::Leader if full => Some(SELDOM_LIST),
        Role::Leader => Some(LIST),
        Role::Waiting if may_propose && waited < SELDOM_LIST => Some(FIRST_LIST),
        Role::Waiting if may_propose => Some(LIST),
        Role::Waiting => Some(SELDOM_LIST),
    }
}

/// One node's counter, watched by another one.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    counter: Option<u64>,
    /// When the last look began that was answered, of the watcher's own monotonic time.
    looked: Option<Duration>,
    still: Duration,
}

impl Watch {
    /// A look that began at `at` found this counter; `None`: it found no heartbeat.
    pub fn saw(&mut self, at: Duration, counter: Option<u64>) {
        let since = self.looked.map_or(Duration::ZERO, |before| at.saturating_sub(before));
        self.still += since.min(LOOK);
        if counter.is_some() && counter != self.counter {
            self.counter = counter;
            self.still = Duration::ZERO;
        }
        self.looked = Some(at);
    }

    /// How long it was seen to stand still.
    pub fn still(&self) -> Duration {
        self.still
    }
}

/// A heartbeat in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The node, from the key.
    pub node: NodeId,
    /// When the store took it, by the store's clock.
    pub stored: Timestamp,
}

/// The age of a listed beat beside `own`, both by the store's clock; a younger one has none.
pub(super) fn age(own: Timestamp, stored: Timestamp) -> Duration {
    Duration::try_from(own.duration_since(stored)).unwrap_or_default()
}

/// The nodes of a list that may live, by id, this one included if it is there. No heartbeat was read for it, so each
/// counts as one that beats seldom. Without this node's own beat nothing can be said, and all may live.
pub fn may_live(list: &[Listed], me: &NodeId) -> Vec<NodeId> {
    let own = list.iter().find(|listed| listed.node == *me).map(|listed| listed.stored);
    let lives = |listed: &&Listed| own.is_none_or(|own| age(own, listed.stored) <= MISSED * FOLLOWER_INTERVAL);
    let mut nodes: Vec<NodeId> = list.iter().filter(lives).map(|listed| listed.node.clone()).collect();
    nodes.sort_unstable();
    nodes
}

/// What a list and a heartbeat say of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judged {
    /// It lives, as far as one can see.
    Alive,
    /// It said itself that it leaves.
    Left,
    /// Its beats have stopped.
    Dead,
}

/// The judgement of a node by one list, and why. `own`: the stamp of this node's own fresh beat in the same list;
/// `beat`: the node's heartbeat, read after it.
pub fn judge(own: Timestamp, stored: Timestamp, beat: &Group) -> (Judged, String) {
    if beat.left {
        return (Judged::Left, "it left".into());
    }
    let (old, every) = (age(own, stored), Duration::from_secs(u64::from(beat.every_s)));
    let why =
        format!("its last beat is {} s older than this node's, and it beats every {} s", old.as_secs(), beat.every_s);
    // The store's stamps are whole seconds.
    let limit = MISSED * every + Duration::from_secs(1);
    (if old > limit { Judged::Dead } else { Judged::Alive }, why)
}

/// Whether the heartbeat of `node` may be deleted, and why: by whom, and when. `formed`: the newest generation as it
/// stands in the journal; `judged`: what its heartbeat says.
pub fn may_bury(me: &NodeId, node: &NodeId, formed: &Roster, judged: Judged) -> (bool, String) {
    let generation = formed.generation;
    match judged {
        _ if formed.leader() != Some(me) => (false, format!("another node leads generation {generation}")),
        _ if formed.has(node) => (false, format!("it is a member of generation {generation}")),
        Judged::Alive => (false, "it lives".into()),
        Judged::Left | Judged::Dead => (true, format!("generation {generation} stands without it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::Generation,
        rendezvous::{
            heartbeat::{PATIENCE, State, testing::group},
            policy::Member,
        },
    };

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn only_time_between_looks_counts() {
        let mut watch = Watch::default();
        watch.saw(secs(100), Some(5));
        assert_eq!(watch.still(), Duration::ZERO, "one look proves nothing");
        watch.saw(secs(102), Some(5));
        watch.saw(secs(104), None);
        assert_eq!(watch.still(), secs(4), "one that is missing is not gone");
        watch.saw(secs(164), Some(5));
        assert_eq!(watch.still(), secs(4) + LOOK, "this process was stopped, or the store was away");
        watch.saw(secs(165), Some(6));
        assert_eq!(watch.still(), Duration::ZERO);
        for at in 0..=20 {
            watch.saw(secs(170 + 10 * at), None);
        }
        assert_eq!(watch.still(), secs(205), "nor does it live for ever");
        watch.saw(secs(400), Some(7));
        assert_eq!(watch.still(), Duration::ZERO, "it was buried alive");
        assert!(LOOK * 3 <= PATIENCE, "several looks before a verdict");
    }

    fn listed(beats: &[(&str, i64)]) -> Vec<Listed> {
        let at = |second| Timestamp::from_second(second).unwrap();
        beats.iter().map(|(name, second)| Listed { node: id(name), stored: at(*second) }).collect()
    }

    #[test]
    fn a_list_is_judged_beside_ones_own_beat() {
        let list = listed(&[("d", 1000), ("a", 910), ("b", 909), ("c", 5000)]);
        assert_eq!(may_live(&list, &id("d")), ["a", "c", "d"].map(id), "90 s, and younger than one's own");
        assert_eq!(may_live(&list, &id("x")), ["a", "b", "c", "d"].map(id), "without one's own nothing is known");
        let at = |second| Timestamp::from_second(second).unwrap();
        let judged = |own, stored, every_s| judge(at(own), at(stored), &Group { every_s, ..group() }).0;
        assert_eq!(judged(1000, 987, 4), Judged::Alive);
        assert_eq!(judged(1000, 986, 4), Judged::Dead);
        assert_eq!(judged(1000, 909, 30), Judged::Alive);
        assert_eq!(judged(1000, 908, 30), Judged::Dead);
        assert_eq!(judged(1000, 9999, 4), Judged::Alive);
        assert_eq!(judged(1000, 0, u32::MAX), Judged::Alive);
        assert_eq!(judge(at(1000), at(1000), &Group { left: true, ..group() }).0, Judged::Left);
    }

    #[test]
    fn only_the_leader_of_what_stands_buries_and_only_others() {
        let member = |name: &str| Member { node: id(name), workers: 1, kind: String::new() };
        let formed = Roster { generation: Generation(2), members: vec![member("a"), member("b")] };
        let may = |me, node, judged| may_bury(&id(me), &id(node), &formed, judged).0;
        assert!(may("a", "x", Judged::Dead));
        assert!(may("a", "x", Judged::Left));
        assert!(!may("a", "x", Judged::Alive));
        assert!(!may("a", "b", Judged::Dead), "it was ready a moment ago");
        assert!(!may("b", "x", Judged::Dead), "a follower");
        assert!(!may("x", "y", Judged::Dead), "a node outside");
        let nobody = Roster { members: vec![], ..formed.clone() };
        assert!(!may_bury(&id("a"), &id("x"), &nobody, Judged::Dead).0);
    }

    #[test]
    fn leaders_beat_often_and_others_seldom() {
        assert_eq!(beat_every(Role::Leader, false), INTERVAL);
        assert_eq!(beat_every(Role::Follower, false), FOLLOWER_INTERVAL);
        assert_eq!(beat_every(Role::Waiting, false), FOLLOWER_INTERVAL);
        assert_eq!(beat_every(Role::Follower, true), NEAR_INTERVAL);
        assert_eq!(group().state, State::Waiting);
        let every = |role, may_propose, full, waited| list_every(role, may_propose, full, secs(waited));
        assert_eq!(every(Role::Follower, true, false, 0), None);
        assert_eq!(every(Role::Leader, false, false, 0), Some(LIST));
        assert_eq!(every(Role::Leader, false, true, 0), Some(SELDOM_LIST));
        assert_eq!(every(Role::Waiting, true, false, 59), Some(FIRST_LIST));
        assert_eq!(every(Role::Waiting, true, false, 60), Some(LIST));
        assert_eq!(every(Role::Waiting, false, false, 0), Some(SELDOM_LIST));
    }
}
