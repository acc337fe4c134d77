//! Which nodes form the next generation, their ranks, and why others are left out.
//!
//! The proposer leads. Behind it stand the members of the generation before in their order, so that survivors keep
//! their ranks' neighbours and their slots, then newcomers by id. Ranks follow that order without gaps.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use super::{Bounds, Member, Roster, ending::FAILED_SAVES};
use crate::ids::{NodeId, Rank};

/// Deaths of the group at one step that came from one node, until it is left out.
pub const KILLS: u32 = 3;

/// A node that said "ready".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The node.
    pub member: Member,
    /// Its version of program and protocol.
    pub program: String,
    /// Nodes that it can't reach.
    pub unreachable: BTreeSet<NodeId>,
    /// How often in a row the group died at one step because of this node.
    pub kills: u32,
    /// Its saves that failed in a row.
    pub failed_saves: u32,
}

/// What the proposer knows.
#[derive(Clone, Copy, Debug)]
pub struct Answers<'a> {
    /// Itself.
    pub proposer: &'a Candidate,
    /// The others that are ready, in any order.
    pub ready: &'a [Candidate],
    /// The generation before, if there was one.
    pub previous: Option<&'a Roster>,
}

/// A member and its first rank; the others follow without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node.
    pub member: Member,
    /// The rank of its first worker.
    pub first_rank: Rank,
}

/// Why a node is not in a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It was a member and did not answer.
    Silent,
    /// It led, and its last heartbeat says that it left.
    Left,
    /// Its program or its protocol differs.
    Program {
        /// Its own.
        its: String,
        /// The proposer's.
        ours: String,
    },
    /// Its devices differ, and `parallel.mixed` is off.
    Kind {
        /// Its own.
        its: String,
        /// The generation's.
        ours: String,
    },
    /// The group died of it N times at one step.
    Kills(u32),
    /// This many of its saves failed in a row.
    Saves(u32),
    /// It and this member don't reach each other.
    Unreachable(NodeId),
    /// The generation has the most nodes that the operator wants.
    Full(u32),
    /// Its workers would be more than there are sequences in a batch: a spare.
    Spare {
        /// Its workers.
        workers: u32,
        /// Sequences that are still without a worker.
        free: u32,
    },
    /// It has no workers.
    Idle,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent => write!(f, "did not answer"),
            Self::Left => write!(f, "left as its heartbeat says"),
            Self::Program { its, ours } => write!(f, "runs {its}, and the group runs {ours}"),
            Self::Kind { its, ours } => write!(f, "computes with {its:?}, and the group with {ours:?}"),
            Self::Kills(times) => write!(f, "ended the group {times} times at one step"),
            Self::Saves(times) => write!(f, "failed {times} saves in a row"),
            Self::Unreachable(node) => write!(f, "and {node} can't reach each other"),
            Self::Full(max) => write!(f, "is a spare: {max} nodes are the most"),
            Self::Spare { workers, free } => {
                write!(f, "is a spare: {workers} workers, and {free} sequences of a batch are left")
            }
            Self::Idle => write!(f, "has no workers"),
        }
    }
}

/// A generation as it is to be appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Formation {
    /// Its nodes, the leader first.
    pub places: Vec<Place>,
    /// The nodes that are left out, and why.
    pub out: Vec<(NodeId, Why)>,
}

impl Formation {
    /// All workers.
    pub fn world(&self) -> u64 {
        self.places.iter().map(|place| u64::from(place.member.workers)).sum()
    }
}

/// The outcome of a proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Composed {
    /// Append it.
    Form(Formation),
    /// Too few nodes.
    Few(Vec<(NodeId, Why)>),
    /// This node itself would be left out; another one that is ready does better as the proposer.
    Defer(Why),
}

/// The next generation's nodes, and why.
pub fn compose(view: &Answers<'_>, bounds: Bounds) -> (Composed, String) {
    let me = view.proposer;
    let mut candidates = in_order(view);
    let kind = group_kind(view, &candidates);
    let mut out: Vec<(NodeId, Why)> = Vec::new();
    candidates.retain(|candidate| match unfit(candidate, me, &kind, bounds) {
        Some(why) => {
            out.push((candidate.member.node.clone(), why));
            false
        }
        None => true,
    });
    if let Some(why) = part_with_unsafe(view, &mut candidates, bounds, &mut out) {
        let reason = format!("this node {why}, and others are ready that do better");
        return (Composed::Defer(why), reason);
    }
    part_strangers(&mut candidates, me, &mut out);
    let places = allot(&candidates, bounds, &mut out);
    if let Some((_, why)) = out.iter().find(|(node, _)| *node == me.member.node) {
        let reason = format!("this node {why}");
        return (Composed::Defer(why.clone()), reason);
    }
    // Spares are there, and would take the place of a node that is lost.
    let spare = out.iter().filter(|(_, why)| matches!(why, Why::Spare { .. })).count();
    let here = places.len() + spare;
    let previous = view.previous.iter().flat_map(|roster| &roster.members);
    let silent = previous.filter(|old| places.iter().all(|place| place.member.node != old.node));
    let silent = silent.filter(|old| out.iter().all(|(node, _)| *node != old.node));
    let silent: Vec<(NodeId, Why)> = silent.map(|old| (old.node.clone(), Why::Silent)).collect();
    out.extend(silent);
    let reason = format!("{here} nodes are ready, of at least {} and at most {}", bounds.min, bounds.max);
    if here < usize::try_from(bounds.min).unwrap_or(usize::MAX) {
        return (Composed::Few(out), reason);
    }
    (Composed::Form(Formation { places, out }), reason)
}

/// The proposer, the survivors in their order, the newcomers by id; each node once.
fn in_order<'a>(view: &Answers<'a>) -> Vec<&'a Candidate> {
    let mut others: BTreeMap<&NodeId, &'a Candidate> =
        view.ready.iter().map(|candidate| (&candidate.member.node, candidate)).collect();
    others.remove(&view.proposer.member.node);
    let previous = view.previous.iter().flat_map(|roster| &roster.members);
    let survivors: Vec<&Candidate> = previous.filter_map(|member| others.remove(&member.node)).collect();
    std::iter::once(view.proposer).chain(survivors).chain(others.into_values()).collect()
}

/// The kind of the generation: what the survivors compute with; in a first one, what most workers are.
fn group_kind(view: &Answers<'_>, candidates: &[&Candidate]) -> String {
    let survivor = |candidate: &&&Candidate| view.previous.is_some_and(|old| old.has(&candidate.member.node));
    let mut counted: BTreeMap<&str, u64> = BTreeMap::new();
    let survivors: Vec<&&Candidate> = candidates.iter().filter(survivor).collect();
    let voters = if survivors.is_empty() { candidates.iter().collect() } else { survivors };
    for candidate in voters {
        *counted.entry(&candidate.member.kind).or_default() += u64::from(candidate.member.workers);
    }
    let own = view.proposer.member.kind.as_str();
    let most = counted.values().max().copied();
    let first = counted.iter().find(|(_, workers)| Some(**workers) == most).map(|(kind, _)| *kind);
    // A tie is the proposer's.
    let own = Some(own).filter(|own| counted.get(own).copied() == most);
    own.or(first).unwrap_or_default().to_owned()
}

/// Why a node can't be a member, whoever else is.
fn unfit(candidate: &Candidate, me: &Candidate, kind: &str, bounds: Bounds) -> Option<Why> {
    if candidate.program != me.program {
        return Some(Why::Program { its: candidate.program.clone(), ours: me.program.clone() });
    }
    if candidate.member.workers == 0 {
        return Some(Why::Idle);
    }
    if candidate.kills >= KILLS {
        return Some(Why::Kills(candidate.kills));
    }
    if !bounds.mixed && candidate.member.kind != kind {
        return Some(Why::Kind { its: candidate.member.kind.clone(), ours: kind.to_owned() });
    }
    None
}

/// Leaves out newcomers whose saves have failed, where there are enough others: they were left out for that before.
/// Such a node does not lead others that can save. A member stays, whatever became of it: it was needed, or the leader
/// leaves it out by name. `Some`: why this node does not propose.
fn part_with_unsafe(
    view: &Answers<'_>,
    candidates: &mut Vec<&Candidate>,
    bounds: Bounds,
    out: &mut Vec<(NodeId, Why)>,
) -> Option<Why> {
    let is_member = |candidate: &Candidate| view.previous.is_some_and(|old| old.has(&candidate.member.node));
    let is_unsafe = |candidate: &Candidate| candidate.failed_saves >= FAILED_SAVES && !is_member(candidate);
    let safe = candidates.iter().filter(|candidate| !is_unsafe(candidate)).count();
    if safe > 0 && is_unsafe(view.proposer) {
        return Some(Why::Saves(view.proposer.failed_saves));
    }
    if safe >= usize::try_from(bounds.min).unwrap_or(usize::MAX).max(1) {
        candidates.retain(|candidate| {
            let stays = !is_unsafe(candidate);
            if !stays {
                out.push((candidate.member.node.clone(), Why::Saves(candidate.failed_saves)));
            }
            stays
        });
    }
    None
}

/// Leaves out nodes until all others reach each other: first whoever misses most, of equal ones the last in order. The
/// proposer stays, since all have answered it.
fn part_strangers(candidates: &mut Vec<&Candidate>, me: &Candidate, out: &mut Vec<(NodeId, Why)>) {
    loop {
        let here: BTreeSet<&NodeId> = candidates.iter().map(|candidate| &candidate.member.node).collect();
        let mut strangers: BTreeMap<&NodeId, BTreeSet<&NodeId>> = BTreeMap::new();
        for candidate in candidates.iter() {
            let node = &candidate.member.node;
            for other in candidate.unreachable.iter().filter(|other| *other != node) {
                if let Some(other) = here.get(other) {
                    strangers.entry(node).or_default().insert(other);
                    strangers.entry(other).or_default().insert(node);
                }
            }
        }
        let missing = |node: &NodeId| strangers.get(node).map_or(0, BTreeSet::len);
        let worst = candidates.iter().enumerate().skip(1).max_by_key(|(at, it)| (missing(&it.member.node), *at));
        let Some((at, node)) = worst.map(|(at, it)| (at, &it.member.node)).filter(|(_, node)| missing(node) > 0) else {
            return;
        };
        let whom = strangers.get(node).and_then(|them| them.first().copied()).unwrap_or(&me.member.node);
        out.push((node.clone(), Why::Unreachable(whom.clone())));
        candidates.remove(at);
    }
}

/// Gives out ranks, as long as there are sequences, and at most `max` nodes.
fn allot(candidates: &[&Candidate], bounds: Bounds, out: &mut Vec<(NodeId, Why)>) -> Vec<Place> {
    let (mut places, mut world) = (Vec::new(), 0_u32);
    for Candidate { member, .. } in candidates {
        let free = bounds.global_batch.saturating_sub(world);
        if places.len() >= usize::try_from(bounds.max).unwrap_or(usize::MAX) {
            out.push((member.node.clone(), Why::Full(bounds.max)));
        } else if member.workers > free {
            out.push((member.node.clone(), Why::Spare { workers: member.workers, free }));
        } else {
            places.push(Place { member: member.clone(), first_rank: Rank(world) });
            world += member.workers;
        }
    }
    places
}

/// Whether a working group forms anew because nodes wait: only if nobody leaves and somebody comes. Otherwise the same
/// nodes would part and form at each checkpoint.
pub fn may_grow(now: &Roster, next: &Formation) -> (bool, String) {
    let next_has = |node: &NodeId| next.places.iter().any(|place| place.member.node == *node);
    if let Some(lost) = now.members.iter().find(|member| !next_has(&member.node)) {
        return (false, format!("node {} would be left out", lost.node));
    }
    let more = next.places.len().saturating_sub(now.members.len());
    if more == 0 {
        return (false, "nobody can join".into());
    }
    (true, format!("{more} nodes join: {} workers instead of {}", next.world(), now.workers()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Generation;

    const BOUNDS: Bounds = Bounds { min: 1, max: 8, global_batch: 64, mixed: false };

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn node(name: &str, workers: u32) -> Candidate {
        Candidate {
            member: Member { node: id(name), workers, kind: "A100".into() },
            program: "1.0".into(),
            unreachable: BTreeSet::new(),
            kills: 0,
            failed_saves: 0,
        }
    }

    fn of_kind(name: &str, workers: u32, kind: &str) -> Candidate {
        let mut candidate = node(name, workers);
        candidate.member.kind = kind.into();
        candidate
    }

    fn without(name: &str, unreachable: &[&str]) -> Candidate {
        Candidate { unreachable: unreachable.iter().map(|name| id(name)).collect(), ..node(name, 1) }
    }

    fn roster(members: &[Candidate]) -> Roster {
        Roster { generation: Generation(3), members: members.iter().map(|it| it.member.clone()).collect() }
    }

    fn composed(proposer: &Candidate, ready: &[Candidate], previous: Option<&Roster>, bounds: Bounds) -> Composed {
        compose(&Answers { proposer, ready, previous }, bounds).0
    }

    fn formed(proposer: &Candidate, ready: &[Candidate], previous: Option<&Roster>, bounds: Bounds) -> Formation {
        match composed(proposer, ready, previous, bounds) {
            Composed::Form(formation) => formation,
            other => panic!("{other:?}"),
        }
    }

    /// The nodes with their first ranks, and the nodes that are left out.
    fn told(formation: &Formation) -> String {
        let places = formation.places.iter().map(|place| format!("{}:{}", place.member.node, place.first_rank));
        let out = formation.out.iter().map(|(node, why)| format!("{node} {why}"));
        format!("{} | {}", places.collect::<Vec<_>>().join(" "), out.collect::<Vec<_>>().join(", "))
    }

    #[test]
    fn survivors_keep_their_order_behind_the_leader_and_newcomers_follow_by_id() {
        let old = roster(&[node("d", 2), node("c", 1), node("b", 4), node("a", 1)]);
        let ready = [node("z", 1), node("a", 1), node("x", 2), node("c", 1)];
        let formation = formed(&node("b", 4), &ready, Some(&old), BOUNDS);
        assert_eq!(told(&formation), "b:0 c:4 a:5 x:6 z:8 | d did not answer");
        assert_eq!(formation.world(), 9);
        // An answer that came twice, or from oneself, counts once.
        let formation = formed(&node("b", 4), &[node("c", 1), node("c", 1), node("b", 4)], None, BOUNDS);
        assert_eq!(told(&formation), "b:0 c:4 | ");
    }

    #[test]
    fn too_few_nodes_form_nothing_and_the_operators_most_is_kept() {
        let ready = [node("b", 1), node("c", 1)];
        let few = composed(&node("a", 1), &ready, None, Bounds { min: 4, ..BOUNDS });
        assert_eq!(few, Composed::Few(vec![]));
        let formation = formed(&node("a", 1), &ready, None, Bounds { min: 3, ..BOUNDS });
        assert_eq!(formation.places.len(), 3);
        let formation = formed(&node("a", 1), &ready, None, Bounds { min: 1, max: 2, ..BOUNDS });
        assert_eq!(told(&formation), "a:0 b:1 | c is a spare: 2 nodes are the most");
        // The most counts the members, not those that are left out.
        let ready = [of_kind("b", 1, "H100"), node("c", 1)];
        let formation = formed(&node("a", 2), &ready, None, Bounds { max: 2, ..BOUNDS });
        assert_eq!(told(&formation), "a:0 c:2 | b computes with \"H100\", and the group with \"A100\"");
    }

    #[test]
    fn workers_without_a_sequence_are_spares_and_count_as_present() {
        let ready = [node("b", 4), node("c", 4), node("d", 2)];
        let tight = Bounds { min: 4, global_batch: 7, ..BOUNDS };
        let formation = formed(&node("a", 1), &ready, None, tight);
        let spare = "c is a spare: 4 workers, and 2 sequences of a batch are left";
        assert_eq!(told(&formation), format!("a:0 b:1 d:5 | {spare}"));
        assert_eq!(formation.world(), 7);
        for world in 1..=9_u64 {
            let ready: Vec<Candidate> = (1..world).map(|at| node(&format!("n{at}"), 1)).collect();
            let formation = formed(&node("a", 1), &ready, None, Bounds { global_batch: 5, max: 99, ..BOUNDS });
            assert_eq!(formation.world(), world.min(5));
        }
        let deferred = composed(&node("a", 8), &ready, None, tight);
        assert_eq!(deferred, Composed::Defer(Why::Spare { workers: 8, free: 7 }));
    }

    #[test]
    fn one_kind_computes_unless_they_may_be_mixed() {
        let (odd, ready) = (of_kind("a", 1, "cpu"), [node("b", 1), node("c", 1)]);
        let deferred = composed(&odd, &ready, None, BOUNDS);
        let kinds = Why::Kind { its: "cpu".into(), ours: "A100".into() };
        assert_eq!(deferred, Composed::Defer(kinds), "more workers are of the other kind");
        assert_eq!(formed(&odd, &ready, None, Bounds { mixed: true, ..BOUNDS }).places.len(), 3);
        // A tie is the proposer's; workers count, not nodes.
        assert_eq!(told(&formed(&of_kind("a", 2, "cpu"), &ready, None, BOUNDS)).split(" | ").next(), Some("a:0"));
        // Survivors decide, however many newcomers of another kind there are.
        let old = roster(&[node("a", 1), node("b", 1)]);
        let many = [of_kind("x", 8, "H100"), of_kind("y", 8, "H100"), node("b", 1)];
        let formation = formed(&node("a", 1), &many, Some(&old), BOUNDS);
        assert!(told(&formation).starts_with("a:0 b:1 | x computes with \"H100\""), "{}", told(&formation));
    }

    #[test]
    fn a_node_that_harms_the_group_or_differs_is_left_out_by_name() {
        let faulty = Candidate { kills: KILLS, ..node("b", 1) };
        let deaf = Candidate { failed_saves: FAILED_SAVES, ..node("c", 1) };
        let other = Candidate { program: "2.0".into(), ..node("d", 1) };
        let nearly = Candidate { kills: KILLS - 1, failed_saves: FAILED_SAVES - 1, ..node("f", 1) };
        let old = roster(&[node("a", 1), node("b", 1)]);
        let ready = [faulty.clone(), deaf, other, node("e", 0), nearly];
        assert_eq!(
            told(&formed(&node("a", 1), &ready, Some(&old), BOUNDS)),
            "a:0 f:1 | b ended the group 3 times at one step, d runs 2.0, and the group runs 1.0, e has no workers, \
             c failed 3 saves in a row"
        );
        assert_eq!(composed(&faulty, &[], None, BOUNDS), Composed::Defer(Why::Kills(3)), "also if it would lead");
    }

    #[test]
    fn a_node_whose_saves_failed_takes_part_where_it_is_needed_and_leads_nobody_that_can_save() {
        let failing = |name: &str| Candidate { failed_saves: FAILED_SAVES, ..node(name, 1) };
        let two = Bounds { min: 2, ..BOUNDS };
        let enough = formed(&node("a", 1), &[failing("b"), node("c", 1)], None, two);
        assert_eq!(told(&enough), "a:0 c:1 | b failed 3 saves in a row");
        let places = |formation: &Formation| formation.places.len();
        assert_eq!(places(&formed(&node("a", 1), &[failing("b")], None, two)), 2, "it is needed");
        assert_eq!(composed(&failing("a"), &[node("b", 1)], None, two), Composed::Defer(Why::Saves(3)));
        assert_eq!(places(&formed(&failing("a"), &[failing("b")], None, two)), 2, "nobody can save");
        assert_eq!(places(&formed(&failing("a"), &[], None, BOUNDS)), 1, "nobody else is there");
        let old = roster(&[node("a", 1), node("b", 1)]);
        let again = formed(&failing("a"), &[failing("b"), node("c", 1)], Some(&old), two);
        assert_eq!(places(&again), 3, "members stay: they were needed");
    }

    #[test]
    fn members_reach_each_other() {
        // One claim is enough, whoever makes it.
        for ready in [[without("b", &["c"]), node("c", 1)], [node("b", 1), without("c", &["b"])]] {
            let formation = formed(&node("a", 1), &ready, None, BOUNDS);
            assert_eq!(told(&formation), "a:0 b:1 | c and b can't reach each other");
        }
        // Whoever misses most goes first: one broken node costs only itself.
        let ready = [without("b", &["c", "d", "e"]), node("c", 1), node("d", 1), node("e", 1)];
        let formation = formed(&node("a", 1), &ready, None, BOUNDS);
        assert_eq!(told(&formation), "a:0 c:1 d:2 e:3 | b and c can't reach each other");
        // Claims about itself, about strangers and about the proposer change nothing, or only the one who claims.
        let formation = formed(&node("a", 1), &[without("b", &["b", "x"]), node("c", 1)], None, BOUNDS);
        assert_eq!(told(&formation), "a:0 b:1 c:2 | ");
        let formation = formed(&node("a", 1), &[without("b", &["a"]), node("c", 1)], None, BOUNDS);
        assert_eq!(told(&formation), "a:0 c:1 | b and a can't reach each other");
        let formation = formed(&node("a", 1), &[without("b", &["a"]), without("c", &["a"])], None, BOUNDS);
        assert_eq!(told(&formation), "a:0 | c and a can't reach each other, b and a can't reach each other");
    }

    #[test]
    fn a_working_group_forms_anew_only_to_grow() {
        let now = roster(&[node("a", 1), node("b", 1)]);
        let next = |ready: &[Candidate]| formed(&node("a", 1), ready, Some(&now), BOUNDS);
        assert!(may_grow(&now, &next(&[node("b", 1), node("c", 1)])).0);
        assert!(!may_grow(&now, &next(&[node("b", 1)])).0, "nothing changes");
        assert!(!may_grow(&now, &next(&[node("c", 1), node("d", 1)])).0, "a member would be lost");
    }
}
