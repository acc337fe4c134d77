//! Who proposes the next generation, who may form it, and who says "ready".
//!
//! Two sides that reach the store and not each other must not take a run from each other for ever. So a side forms *at
//! once* only if the other can't do the same: with more than half of the old generation's workers behind it, or after
//! the leader's port has refused (its process is gone). Half or less waits until the leader's heartbeat stands still,
//! or until somebody invites it. The leader itself wins a tie, and with less than half it first leaves the others [the
//! time](YIELD) to form. A node outside of the newest generation forms only after its leader's heartbeat has stood
//! still, and never while a member says that it is in touch with the leader: the store may be away for the leader
//! alone.
//!
//! Several nodes find the same loss at the same moment. They propose one after the other, [`STAGGER`] apart, and
//! whoever has promised itself to one proposer promises itself to no other for a [while](PROMISE). A proposer that
//! forms nothing releases them at once, and a member that finds too few others looks for newcomers as a node outside
//! does.

use std::{collections::BTreeSet, time::Duration};

use super::{Bounds, Roster};
use crate::{
    ids::{Generation, NodeId},
    rendezvous::heartbeat::{INTERVAL, MISSED},
};

/// The time from one node's turn to the next one's: the first has asked and been answered by then.
pub const STAGGER: Duration = Duration::from_secs(1);
/// The longest time that a member waits for members before it: they may all be dead.
pub const LONGEST_STAGGER: Duration = Duration::from_secs(10);
/// The head start of the members of a generation before nodes outside of it.
pub const MEMBERS_FIRST: Duration = Duration::from_secs(5);
/// How many nodes outside of a generation propose: those with the lowest ids. The others only answer.
pub const PROPOSERS: usize = 3;
/// A first generation waits this long for one more node.
pub const LAST_CALL: Duration = Duration::from_secs(5);
/// However many more nodes come, it waits no longer than this.
pub const LONGEST_CALL: Duration = Duration::from_secs(30);
/// The pause after a proposal that too few nodes answered. It doubles each time.
pub const ASK_AGAIN: Duration = Duration::from_secs(10);
/// The longest such pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long a leader with less than half of the workers leaves it to the others to form.
pub const YIELD: Duration = Duration::from_secs(10);
/// How long a proposer waits for answers.
pub const ANSWER: Duration = Duration::from_secs(5);
/// How long a node that said "ready" says it to no other proposer: its proposer asks, and then appends.
pub const PROMISE: Duration = Duration::from_secs(10);
/// How long a member that is asked waits for its leader's answer before it says that the leader is lost: it may hear of
/// a loss a second later than the proposer.
pub const VOUCH: Duration = Duration::from_secs(2);
/// How long the heartbeat of a leader that a list showed dead must be seen to stand still: after the store was away for
/// everybody, one node's beat is back before another's.
pub const CONFIRM: Duration = INTERVAL.saturating_mul(MISSED);
/// A look at a heartbeat that is older proves nothing: this process was stopped since. More than the pause between two
/// looks and the time that answers take.
pub const FRESH: Duration = Duration::from_secs(20);

/// Why a generation is to be formed.
#[derive(Clone, Copy, Debug)]
pub enum Opening<'a> {
    /// There is none yet, or the newest one's end is recorded.
    Cold {
        /// The nodes that live, this one included, by id.
        live: &'a [NodeId],
    },
    /// The newest generation has no end, and its leader is lost.
    Loss {
        /// The generation.
        roster: &'a Roster,
        /// Members whose process is certainly gone.
        gone: &'a BTreeSet<NodeId>,
        /// The nodes outside of it that live, by id.
        outside: &'a [NodeId],
    },
}

/// A node's view of whose turn it is.
#[derive(Clone, Copy, Debug)]
pub struct Candidacy<'a> {
    /// What happened.
    pub opening: Opening<'a>,
    /// This node.
    pub me: &'a NodeId,
    /// Its proposals that came to nothing since it last found a node that it had not known.
    pub failed: u32,
    /// Since then.
    pub quiet: Duration,
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// This node's.
    Now,
    /// This node's after so long, if nothing happens until then.
    In(Duration),
    /// Not this node's: it looks again later, and answers meanwhile.
    NotMine,
}

/// Whether this node proposes, and why; `since`: the loss was noticed, or enough nodes were there, or this node's last
/// proposal came to nothing.
pub fn who_proposes(view: &Candidacy<'_>, since: Duration, bounds: Bounds) -> (Turn, String) {
    let (due, why) = match view.opening {
        Opening::Cold { live } => {
            let enough = usize::try_from(bounds.min).unwrap_or(usize::MAX);
            if live.len() < enough {
                return (Turn::NotMine, format!("{} of at least {} nodes live", live.len(), bounds.min));
            }
            let Some(place) = live.iter().position(|node| node == view.me).filter(|place| *place < PROPOSERS) else {
                return (Turn::NotMine, format!("{PROPOSERS} nodes with lower ids live"));
            };
            let full = live.len() >= usize::try_from(bounds.max).unwrap_or(usize::MAX);
            let last = since.saturating_sub(view.quiet);
            let call = match view.failed {
                0 if full => last,
                0 => (last + LAST_CALL).min(LONGEST_CALL),
                failed => pause(failed),
            };
            (call + stagger(place), format!("{} nodes live, and {place} have lower ids", live.len()))
        }
        Opening::Loss { roster, gone, outside } => {
            let others = roster.members.iter().skip(1).map(|member| &member.node);
            let mut before = others.take_while(|node| *node != view.me).filter(|node| !gone.contains(*node));
            if roster.has(view.me) {
                let place = before.by_ref().count();
                (
                    pause(view.failed) + stagger(place),
                    format!("{place} members of {} come before this node", roster.generation),
                )
            } else {
                let place = outside.iter().position(|node| node == view.me);
                let Some(place) = place.filter(|place| *place < PROPOSERS) else {
                    return (Turn::NotMine, format!("{PROPOSERS} nodes with lower ids wait, too"));
                };
                let why = format!("members of {} come first, and {place} nodes with lower ids", roster.generation);
                (pause(view.failed) + MEMBERS_FIRST + stagger(place), why)
            }
        }
    };
    let left = due.saturating_sub(since);
    (if left.is_zero() { Turn::Now } else { Turn::In(left) }, why)
}

fn stagger(place: usize) -> Duration {
    STAGGER.saturating_mul(u32::try_from(place).unwrap_or(u32::MAX)).min(LONGEST_STAGGER)
}

/// The pause after N proposals in a row that failed.
fn pause(failed: u32) -> Duration {
    match failed {
        0 => Duration::ZERO,
        failed => ASK_AGAIN.saturating_mul(1 << (failed - 1).min(16)).min(LONGEST_PAUSE),
    }
}

/// What a node knows of a leader that it does not reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leader {
    /// Its port refused: there is no such process.
    pub refused: bool,
    /// It left a tombstone.
    pub left: bool,
    /// How long its heartbeat was seen to stand still, of this node's own time.
    pub still: Duration,
    /// One list of the heartbeats showed it dead beside this node's own fresh beat.
    pub listed_dead: bool,
    /// Since the last of these looks began, of this node's own time.
    pub seen: Duration,
}

/// A proposer's view after the others have answered.
#[derive(Clone, Copy, Debug)]
pub struct Heir<'a> {
    /// The newest generation; it has no end.
    pub roster: &'a Roster,
    /// This node.
    pub me: &'a NodeId,
    /// The nodes that said "ready", this one included.
    pub behind: &'a BTreeSet<NodeId>,
    /// The leader.
    pub leader: Leader,
    /// A node that answered that it is in touch with the leader.
    pub vouched: Option<&'a NodeId>,
    /// Since this node asked them.
    pub asked: Duration,
}

/// Why a generation may be formed although another leader's has no end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// The leader left.
    Left,
    /// More than half of the workers are behind this node.
    Majority,
    /// The leader's process is gone.
    Refused,
    /// The leader's heartbeat stands still.
    StoodStill,
}

/// Whether the run may be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeOver {
    /// Now.
    Now(Ground),
    /// Not yet: watch the leader's heartbeat, and answer invitations.
    Wait,
}

/// Whether this node may form the next generation, and why; `patience`: how long a leader's heartbeat may stand still.
pub fn may_take_over(view: &Heir<'_>, patience: Duration) -> (TakeOver, String) {
    let Heir { roster, leader, .. } = view;
    let member = roster.has(view.me);
    let (behind, all) = (roster.workers_of(view.behind), roster.workers());
    let of = format!("{behind} of {all} workers of generation {}", roster.generation);
    let now = |ground, why: String| (TakeOver::Now(ground), why);
    let wait = |why: String| (TakeOver::Wait, why);
    if view.asked > PROMISE {
        return wait(format!("the answers are {} s old: this node was stopped", view.asked.as_secs()));
    }
    if leader.left {
        return now(Ground::Left, "the leader left".into());
    }
    if member && behind * 2 > all {
        return now(Ground::Majority, format!("{of} are ready"));
    }
    if let Some(node) = view.vouched {
        return wait(format!("node {node} is in touch with the leader"));
    }
    if member && leader.refused {
        return now(Ground::Refused, "the leader's port refuses: its process is gone".into());
    }
    if leader.seen > FRESH {
        return wait(format!("the last look at the leader's heartbeat is {} s old", leader.seen.as_secs()));
    }
    if leader.still >= patience {
        let still = leader.still.as_secs();
        return now(Ground::StoodStill, format!("the leader's heartbeat was seen to stand still for {still} s"));
    }
    if leader.listed_dead && leader.still >= CONFIRM {
        return now(
            Ground::StoodStill,
            "the leader's last beat is old beside this node's own, and no other came".into(),
        );
    }
    if member {
        wait(format!("{of} are ready, not more than half, and the leader may be alive"))
    } else {
        wait("the leader may be alive, and this node is not a member of its generation".into())
    }
}

/// A leader's view after it lost members.
#[derive(Clone, Copy, Debug)]
pub struct Bereaved<'a> {
    /// Its generation.
    pub roster: &'a Roster,
    /// The members that it reaches, itself included; after it asked: those that are ready.
    pub behind: &'a BTreeSet<NodeId>,
    /// Members that are certainly gone: their port refuses, they left, or a notice named them.
    pub gone: &'a BTreeSet<NodeId>,
    /// Nodes to go on with: those that it reaches, members or not, itself included.
    pub nodes: u32,
}

/// A leader's way on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoOn {
    /// Form the next generation without the lost ones.
    Reform,
    /// Let the others form first, for this long.
    Yield(Duration),
    /// Too few nodes: save, append `interrupted`, wait.
    StepDown,
}

/// What a leader does after a loss, and why; `lost`: since the loss was noticed.
///
/// It is asked before the leader proposes and once more when the answers are there: when it hears of the first loss,
/// the channels to others may be as dead, and not yet silent for long enough.
pub fn go_on(view: &Bereaved<'_>, lost: Duration, bounds: Bounds) -> (GoOn, String) {
    if view.nodes < bounds.min {
        return (GoOn::StepDown, format!("{} of at least {} nodes are here", view.nodes, bounds.min));
    }
    let (behind, gone) = (view.roster.workers_of(view.behind), view.roster.workers_of(view.gone));
    let silent = view.roster.workers().saturating_sub(behind).saturating_sub(gone);
    if behind >= silent {
        return (GoOn::Reform, format!("{behind} workers are here, {silent} are silent, {gone} are gone"));
    }
    let left = YIELD.saturating_sub(lost);
    let why = format!("{silent} workers are silent, more than the {behind} here");
    if left.is_zero() {
        (GoOn::Reform, format!("{why}, and formed nothing in {} s", YIELD.as_secs()))
    } else {
        (GoOn::Yield(left), format!("{why}: they may form"))
    }
}

/// The view of a node that is asked whether it is ready.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The generation that is proposed.
    pub generation: Generation,
    /// The proposer.
    pub by: &'a NodeId,
    /// The proposer's version of program and protocol.
    pub program: &'a str,
    /// This node's own.
    pub own_program: &'a str,
    /// The newest generation in the journal as this node has read it.
    pub newest: Option<&'a Roster>,
    /// Whether that one's end is recorded.
    pub ended: bool,
    /// Whether this node leads it, or its leader has answered a ping that was sent after the proposal came (see
    /// [`VOUCH`]).
    pub in_touch: bool,
    /// To whom this node said "ready" less than [`PROMISE`] ago.
    pub promised: Option<&'a NodeId>,
}

/// The answer to a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This node waits for `formed`, and joins if it is in it.
    Ready,
    /// The journal is further than this node has read: read on, then answer.
    ReadOn,
    /// Another program.
    OtherProgram,
    /// The proposer is behind: that generation or a later one stands.
    Stale,
    /// This node is in touch with the leader.
    LeaderLives,
    /// This node is ready for another proposer.
    Promised,
}

/// The answer to a proposal, and its reason.
pub fn answer(view: &Asked<'_>) -> (Answer, String) {
    let newest = view.newest.map_or(Generation(0), |roster| roster.generation);
    if view.program != view.own_program {
        return (Answer::OtherProgram, format!("this node runs {}, not {}", view.own_program, view.program));
    }
    if view.generation <= newest {
        return (Answer::Stale, format!("generation {newest} stands"));
    }
    if view.generation > newest.next() {
        return (Answer::ReadOn, format!("this node has read of generation {newest} only"));
    }
    let leader = view.newest.filter(|_| !view.ended).and_then(Roster::leader);
    if leader == Some(view.by) {
        return (Answer::Ready, "the leader asks".into());
    }
    if let Some(leader) = leader.filter(|_| view.in_touch) {
        return (Answer::LeaderLives, format!("this node is in touch with the leader, {leader}"));
    }
    match view.promised {
        Some(other) if other != view.by => (Answer::Promised, format!("this node is ready for {other}")),
        _ => (Answer::Ready, "nobody else leads this node".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::{channel::LinkSettings, heartbeat::PATIENCE, membership::LOOK, policy::Member};

    const BOUNDS: Bounds = Bounds { min: 2, max: 4, global_batch: 64, mixed: false };

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn ids(names: &str) -> Vec<NodeId> {
        names.split_whitespace().map(id).collect()
    }

    fn set(names: &str) -> BTreeSet<NodeId> {
        ids(names).into_iter().collect()
    }

    /// Nodes with one worker each, or with as many as stands behind a colon.
    fn roster(names: &str) -> Roster {
        let member = |text: &str| {
            let (name, workers) = text.split_once(':').unwrap_or((text, "1"));
            Member { node: id(name), workers: workers.parse().unwrap(), kind: "A100".into() }
        };
        Roster { generation: Generation(3), members: names.split_whitespace().map(member).collect() }
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn cold(live: &str, me: &str, failed: u32, quiet: u64, since: u64) -> Turn {
        let live = ids(live);
        let view = Candidacy { opening: Opening::Cold { live: &live }, me: &id(me), failed, quiet: secs(quiet) };
        who_proposes(&view, secs(since), BOUNDS).0
    }

    #[test]
    fn the_lowest_of_the_living_proposes_after_a_last_call() {
        assert_eq!(cold("a", "a", 0, 99, 99), Turn::NotMine, "too few");
        assert_eq!(cold("a b", "a", 0, 0, 0), Turn::In(LAST_CALL));
        assert_eq!(cold("a b", "b", 0, 0, 0), Turn::In(LAST_CALL + STAGGER));
        assert_eq!(cold("a b", "a", 0, 5, 5), Turn::Now);
        assert_eq!(cold("a b c", "a", 0, 1, 20), Turn::In(secs(4)), "another one came");
        assert_eq!(cold("a b c", "a", 0, 1, 29), Turn::In(secs(1)), "it waits no longer");
        assert_eq!(cold("a b c", "a", 0, 0, 30), Turn::Now);
        assert_eq!(cold("a b c d", "a", 0, 0, 20), Turn::Now, "no more can join");
        assert_eq!(cold("a b c d", "b", 0, 0, 20), Turn::In(STAGGER));
        assert_eq!(cold("a b c d", "d", 0, 99, 99), Turn::NotMine, "three have lower ids");
        assert_eq!(cold("a b c", "x", 0, 99, 99), Turn::NotMine, "this node itself is not seen to live");
        // A proposal that came to nothing is repeated, less and less often.
        for (failed, pause) in [(1, 10), (2, 20), (3, 40), (4, 60), (1000, 60)] {
            assert_eq!(cold("a b", "a", failed, 0, 0), Turn::In(secs(pause)));
            assert_eq!(cold("a b", "b", failed, 0, pause), Turn::In(STAGGER));
            assert_eq!(cold("a b", "b", failed, 0, pause + 1), Turn::Now);
        }
    }

    fn loss(me: &str, gone: &str, since: u64, failed: u32) -> Turn {
        let (roster, gone, outside) = (roster("l a b c d e f g h i j k m"), set(gone), ids("w x y z"));
        let opening = Opening::Loss { roster: &roster, gone: &gone, outside: &outside };
        who_proposes(&Candidacy { opening, me: &id(me), failed, quiet: Duration::ZERO }, secs(since), BOUNDS).0
    }

    #[test]
    fn members_propose_in_their_order_and_others_behind_them() {
        assert_eq!(loss("a", "", 0, 0), Turn::Now);
        assert_eq!(loss("b", "", 0, 0), Turn::In(STAGGER));
        assert_eq!(loss("b", "", 1, 0), Turn::Now);
        assert_eq!(loss("c", "", 0, 0), Turn::In(2 * STAGGER));
        assert_eq!(loss("c", "a b", 0, 0), Turn::Now, "those before it are gone");
        assert_eq!(loss("k", "", 0, 0), Turn::In(10 * STAGGER));
        assert_eq!(loss("m", "", 0, 0), Turn::In(LONGEST_STAGGER), "all before it may be dead and silent");
        assert_eq!(loss("w", "", 0, 0), Turn::In(MEMBERS_FIRST));
        assert_eq!(loss("y", "", 0, 0), Turn::In(MEMBERS_FIRST + 2 * STAGGER));
        assert_eq!(loss("z", "", 999, 0), Turn::NotMine);
        assert_eq!(loss("unseen", "", 999, 0), Turn::NotMine);
        assert_eq!(loss("a", "", 0, 1), Turn::In(ASK_AGAIN));
        assert_eq!(loss("w", "", 0, 2), Turn::In(2 * ASK_AGAIN + MEMBERS_FIRST));
    }

    fn heir(names: &str, me: &str, behind: &str, leader: Leader, vouched: Option<&str>) -> TakeOver {
        let vouched = vouched.map(id);
        let vouched = vouched.as_ref();
        let (roster, me, behind) = (roster(names), id(me), set(behind));
        let view = Heir { roster: &roster, me: &me, behind: &behind, leader, vouched, asked: PROMISE };
        let late = Heir { asked: PROMISE + Duration::from_millis(1), ..view };
        assert_eq!(may_take_over(&late, PATIENCE).0, TakeOver::Wait, "whoever was ready may have turned to another");
        may_take_over(&view, PATIENCE).0
    }

    const SILENT: Leader =
        Leader { refused: false, left: false, still: Duration::ZERO, listed_dead: false, seen: FRESH };

    #[test]
    fn more_than_half_of_the_workers_take_over_at_once() {
        let heir = |names, behind| heir(names, "b", behind, SILENT, None);
        assert_eq!(heir("a b c", "b c"), TakeOver::Now(Ground::Majority));
        assert_eq!(heir("a b c", "b"), TakeOver::Wait);
        assert_eq!(heir("a b", "b"), TakeOver::Wait, "half is not more than half");
        assert_eq!(heir("a b c d", "b c"), TakeOver::Wait);
        assert_eq!(heir("a b c d", "b c d"), TakeOver::Now(Ground::Majority));
        assert_eq!(heir("a b:8 c", "b"), TakeOver::Now(Ground::Majority), "workers count");
        assert_eq!(heir("a:8 b c", "b c"), TakeOver::Wait, "nodes don't");
        assert_eq!(heir("a b c", "b x y z"), TakeOver::Wait, "newcomers have no voice");
        assert_eq!(heir("a:4294967295 b:4294967295 c:4294967295", "b c"), TakeOver::Now(Ground::Majority));
    }

    #[test]
    fn half_or_less_takes_over_only_a_dead_leader() {
        let still = |still| Leader { still, ..SILENT };
        let nearly = PATIENCE - Duration::from_millis(1);
        let heir = |me, leader, vouched| heir("a b c d", me, "b c", leader, vouched);
        let refused = Leader { refused: true, ..SILENT };
        assert_eq!(heir("b", refused, None), TakeOver::Now(Ground::Refused));
        assert_eq!(heir("b", still(nearly), None), TakeOver::Wait);
        assert_eq!(heir("b", still(PATIENCE), None), TakeOver::Now(Ground::StoodStill));
        assert_eq!(heir("b", Leader { left: true, ..SILENT }, None), TakeOver::Now(Ground::Left));
        // A member that is in touch with the leader knows better than the heartbeat and the port.
        assert_eq!(heir("b", refused, Some("d")), TakeOver::Wait);
        assert_eq!(heir("b", still(PATIENCE), Some("d")), TakeOver::Wait);
        assert_eq!(heir("b", Leader { listed_dead: true, ..still(CONFIRM) }, Some("d")), TakeOver::Wait);
        assert_eq!(heir("b", Leader { left: true, ..SILENT }, Some("d")), TakeOver::Now(Ground::Left));
        // Somebody from outside: only a heartbeat that stands still.
        assert_eq!(heir("x", SILENT, None), TakeOver::Wait);
        assert_eq!(heir("x", refused, None), TakeOver::Wait);
        assert_eq!(heir("x", still(nearly), None), TakeOver::Wait);
        assert_eq!(heir("x", still(PATIENCE), None), TakeOver::Now(Ground::StoodStill));
        let listed = |still| Leader { listed_dead: true, still, ..SILENT };
        assert_eq!(heir("x", listed(CONFIRM), None), TakeOver::Now(Ground::StoodStill));
        assert_eq!(heir("x", listed(CONFIRM - Duration::from_millis(1)), None), TakeOver::Wait, "one list may err");
        assert_eq!(heir("x", still(PATIENCE), Some("d")), TakeOver::Wait);
        // What was seen before this process was stopped proves nothing.
        let long_ago = FRESH + Duration::from_millis(1);
        for leader in [still(PATIENCE), listed(CONFIRM)] {
            for me in ["b", "x"] {
                assert_eq!(heir(me, Leader { seen: long_ago, ..leader }, None), TakeOver::Wait);
            }
        }
        assert_eq!(heir("b", Leader { seen: long_ago, ..refused }, None), TakeOver::Now(Ground::Refused));
    }

    #[test]
    fn a_majority_of_members_does_not_make_a_stranger_an_heir() {
        assert_eq!(heir("a b c", "x", "x b c", SILENT, None), TakeOver::Wait);
        assert_eq!(heir("a b c", "b", "b c", SILENT, Some("a")), TakeOver::Now(Ground::Majority));
    }

    #[test]
    fn each_pause_leaves_time_for_what_happens_in_it() {
        let ping = LinkSettings::default().ping;
        assert!(ping < VOUCH && VOUCH < ANSWER, "a ping of its leader comes, and the proposer still waits");
        assert!(ANSWER < PROMISE, "whoever is ready stays ready until its proposer has all answers");
        assert!(LOOK < FRESH && FRESH < PATIENCE, "it looks again meanwhile, and a pause as long as patience is found");
        assert!(CONFIRM < PATIENCE && ANSWER + STAGGER < YIELD, "the others ask and form before the leader does");
        assert!(STAGGER < MEMBERS_FIRST, "members come before nodes outside");
    }

    fn left(names: &str, behind: &str, gone: &str, lost: u64) -> GoOn {
        let behind = set(behind);
        let nodes = u32::try_from(behind.len()).unwrap();
        go_on(&Bereaved { roster: &roster(names), behind: &behind, gone: &set(gone), nodes }, secs(lost), BOUNDS).0
    }

    #[test]
    fn a_leader_goes_on_with_half_and_leaves_more_the_time_to_form() {
        assert_eq!(left("a b c d", "a b", "", 0), GoOn::Reform, "a tie is the leader's");
        assert_eq!(left("a b c d e", "a b", "", 0), GoOn::Yield(YIELD));
        assert_eq!(left("a b c d e", "a b", "", 9), GoOn::Yield(secs(1)));
        assert_eq!(left("a b c d e", "a b", "", 10), GoOn::Reform, "they formed nothing");
        assert_eq!(left("a b c d e", "a b", "c", 0), GoOn::Reform, "the dead form nothing");
        assert_eq!(left("a:8 b c d e", "a b", "", 0), GoOn::Reform, "workers count");
        assert_eq!(left("a b c", "a", "b c", 0), GoOn::StepDown);
        assert_eq!(left("a b c", "a", "", 0), GoOn::StepDown, "too few: it ends its generation at once");
        // A newcomer takes the place of a lost one.
        let view = Bereaved { roster: &roster("a b"), behind: &set("a"), gone: &set("b"), nodes: 2 };
        assert_eq!(go_on(&view, Duration::ZERO, BOUNDS).0, GoOn::Reform);
    }

    #[test]
    fn a_node_is_ready_for_one_proposer_and_not_against_a_live_leader() {
        let (newest, me) = (roster("a b c"), id("b"));
        let asked = Asked {
            generation: Generation(4),
            by: &me,
            program: "1",
            own_program: "1",
            newest: Some(&newest),
            ended: false,
            in_touch: false,
            promised: None,
        };
        let says = |asked: Asked<'_>| answer(&asked).0;
        assert_eq!(says(asked), Answer::Ready);
        assert_eq!(says(Asked { program: "2", ..asked }), Answer::OtherProgram);
        assert_eq!(says(Asked { generation: Generation(3), ..asked }), Answer::Stale);
        assert_eq!(says(Asked { generation: Generation(5), ..asked }), Answer::ReadOn);
        assert_eq!(says(Asked { newest: None, ..asked }), Answer::ReadOn);
        assert_eq!(says(Asked { newest: None, generation: Generation(1), ..asked }), Answer::Ready);
        assert_eq!(says(Asked { in_touch: true, ..asked }), Answer::LeaderLives);
        assert_eq!(says(Asked { in_touch: true, ended: true, ..asked }), Answer::Ready, "it ended");
        let (leader, other) = (id("a"), id("c"));
        assert_eq!(says(Asked { in_touch: true, by: &leader, promised: Some(&other), ..asked }), Answer::Ready);
        assert_eq!(says(Asked { promised: Some(&other), ..asked }), Answer::Promised);
        assert_eq!(says(Asked { promised: Some(&me), ..asked }), Answer::Ready, "it asks again");
        assert_eq!(says(Asked { by: &leader, ended: true, promised: Some(&other), ..asked }), Answer::Promised);
    }
}
