//! The nodes of a run of several, as somebody outside of it sees them: the newest roster, one list of the heartbeats
//! and a read of each. For people: nothing here decides, and nothing is written.
//!
//! Somebody outside has no beat of its own in the list, by which to tell the store's time. Two clocks stand in for it:
//! the store's, which was at least the newest beat of the list, and this machine's, which may be wrong by `CLOCKS`. A
//! node whose beat is too old by either is called silent.
//!
//! *Retry, cancel:* reads alone; a node that leaves between the list and the read has no heartbeat.

use std::{collections::BTreeMap, time::Duration};

use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    heartbeat::{Group, Heartbeat, LIMIT, MISSED, MOST_SELDOM_S, State},
    membership::{FOLLOWER_INTERVAL, age},
};
use crate::{
    ids::{Generation, NodeId, Rank},
    journal::{Formation, RosterEntry},
    layout,
    storage::{ObjectInfo, StorageError, Store},
};

/// How far this machine's clock may be from the store's before a live node looks silent. `trainer doctor` accepts as
/// much.
const CLOCKS: Duration = Duration::from_secs(30);
/// The most heartbeats that are read together.
const READS: usize = 16;

/// One heartbeat in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The node, from the key.
    pub node: NodeId,
    /// When the store took it, by the store's clock.
    pub stored: Timestamp,
    /// What it says; `None`: a newer version wrote it, or it is garbled.
    pub heartbeat: Option<Heartbeat>,
}

impl Sighting {
    /// What the node says of its part, if it belongs to a run of several.
    pub fn group(&self) -> Option<&Group> {
        self.heartbeat.as_ref()?.group.as_ref()
    }
}

/// All heartbeats of the run in folder `run`, by node: one list, and one read each.
pub async fn sightings(run: &Store) -> Result<Vec<Sighting>, StorageError> {
    let listed = run.list(layout::NODES).await?;
    let nodes = listed.into_iter().filter_map(|info| Some((layout::heartbeat_node(&info.key)?, info)));
    let read = |(node, info): (NodeId, ObjectInfo)| async move {
        match run.get(&info.key, LIMIT).await {
            Ok(body) => {
                let heartbeat = Heartbeat::parse(&body).ok();
                Ok(Some(Sighting { node, stored: info.last_modified, heartbeat }))
            }
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(StorageError::TooLarge { .. }) => {
                Ok(Some(Sighting { node, stored: info.last_modified, heartbeat: None }))
            }
            Err(error) => Err(error),
        }
    };
    let reads = futures::stream::iter(nodes.map(read)).buffer_unordered(READS);
    let mut seen: Vec<Sighting> = reads.try_filter_map(|found| async { Ok(found) }).try_collect().await?;
    seen.sort_unstable_by(|a, b| a.node.cmp(&b.node));
    Ok(seen)
}

/// A node's sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sign {
    /// Its newest beat is young enough.
    Alive,
    /// It has missed several beats.
    Silent,
    /// It said itself that it leaves.
    Left,
    /// It has no heartbeat, which proves nothing.
    Missing,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeView<'a> {
    /// The node.
    pub node: &'a NodeId,
    /// Its workers.
    pub workers: u32,
    /// The rank of its first worker; `None`: it has no ranks.
    pub first_rank: Option<Rank>,
    /// Its sign of life.
    pub sign: Sign,
    /// When the store took its newest beat, by the store's clock.
    pub beat_at: Option<Timestamp>,
    /// Its own view of its part.
    pub says: Option<State>,
    /// What it computes with.
    pub kind: Option<&'a str>,
    /// Where its channel listens.
    pub address: Option<&'a str>,
    /// The live nodes that say that they can't reach it.
    pub out_of_reach_of: Vec<&'a NodeId>,
    /// Why it can't be in one group with the others, of a node outside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stays_out: Option<String>,
    /// Why one outside that could join waits longer than until the next checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits: Option<&'a str>,
}

/// The nodes of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Overview<'a> {
    /// The newest generation; `None`: none was formed.
    pub generation: Option<Generation>,
    /// Its leader.
    pub leader: Option<&'a NodeId>,
    /// Its nodes, the leader first.
    pub members: Vec<NodeView<'a>>,
    /// Other nodes that have not left, by id.
    pub outside: Vec<NodeView<'a>>,
}

/// The nodes of the newest generation and those outside of it, by the heartbeats `seen` until `now`, of this machine's
/// clock. `mixed`: nodes of several kinds may be one group. `None`: it is not a run of several nodes, as far as can be
/// seen.
pub fn overview<'a>(
    formed: Option<&'a Formation>,
    seen: &'a [Sighting],
    now: Timestamp,
    mixed: bool,
) -> Option<Overview<'a>> {
    let newest = seen.iter().map(|sighting| sighting.stored).max();
    let store_now = newest.unwrap_or(now).max(now.saturating_sub(CLOCKS).unwrap_or(now));
    let cut_off = cut_off(seen, store_now);
    let view = |node: &'a NodeId, entry: Option<&'a RosterEntry>, first_rank| {
        let sighting = seen.iter().find(|sighting| sighting.node == *node);
        let group = sighting.and_then(Sighting::group);
        let address = group.map(|group| group.address.as_str());
        NodeView {
            node,
            workers: entry.map_or_else(|| group.map_or(0, |group| group.workers), |entry| entry.workers),
            first_rank,
            sign: sighting.map_or(Sign::Missing, |sighting| sign(sighting, store_now)),
            beat_at: sighting.map(|sighting| sighting.stored),
            says: group.map(|group| group.state),
            kind: group.map(|group| group.kind.as_str()),
            address: address.or_else(|| entry?.address.as_deref()),
            out_of_reach_of: cut_off.get(node).cloned().unwrap_or_default(),
            stays_out: None,
            waits: None,
        }
    };
    let mut next = 0_u32;
    let members = formed.into_iter().flat_map(|formed| &formed.roster).map(|entry| {
        let first = (entry.workers > 0).then_some(Rank(next));
        next = next.saturating_add(entry.workers);
        view(&entry.node, Some(entry), first)
    });
    let members: Vec<NodeView<'_>> = members.collect();
    let is_outside = |sighting: &&Sighting| formed.is_none_or(|formed| formed.member(&sighting.node).is_none());
    let of_several = |sighting: &&Sighting| sighting.group().is_some_and(|group| !group.left);
    let outside = seen.iter().filter(is_outside).filter(of_several);
    let outside: Vec<&Sighting> = outside.collect();
    let leader = formed.and_then(|formed| formed.roster.first()).map(|entry| &entry.node);
    let leads = seen.iter().find(|sighting| Some(&sighting.node) == leader).and_then(Sighting::group);
    let usual = leads.or_else(|| most(outside.iter().filter_map(|sighting| sighting.group()).collect()));
    let outside: Vec<NodeView<'_>> = outside
        .into_iter()
        .map(|sighting| {
            let stays_out = usual.zip(sighting.group()).and_then(|(usual, group)| unlike(group, usual, mixed));
            let waits = leads.filter(|_| stays_out.is_none()).and_then(|leads| leads.puts_off.as_deref());
            NodeView { stays_out, waits, ..view(&sighting.node, None, None) }
        })
        .collect();
    if !formed.is_some_and(Formation::is_of_several) && outside.is_empty() {
        return None;
    }
    Some(Overview { generation: formed.map(|formed| formed.generation), leader, members, outside })
}

/// The one whose kind and program most of them have; of several such, the first.
fn most(groups: Vec<&Group>) -> Option<&Group> {
    let same = |one: &Group, other: &Group| one.kind == other.kind && one.program == other.program;
    let like = |one: &Group| groups.iter().filter(|other| same(one, other)).count();
    groups.iter().rev().max_by_key(|group| like(group)).copied()
}

/// Why a node can't be in one group with another one, as far as their heartbeats say.
fn unlike(group: &Group, other: &Group, mixed: bool) -> Option<String> {
    let said = !group.program.is_empty() && !other.program.is_empty();
    if said && group.program != other.program {
        return Some(format!("it runs version {}, and others {}", group.program, other.program));
    }
    let differs = !mixed && group.kind != other.kind;
    differs.then(|| format!("it computes with {:?}, and others with {:?} (parallel.mixed)", group.kind, other.kind))
}

/// A heartbeat's sign of life at `now` of the store's clock. One that can't be read counts as one that comes seldom.
fn sign(sighting: &Sighting, now: Timestamp) -> Sign {
    let group = sighting.group();
    if group.is_some_and(|group| group.left) {
        return Sign::Left;
    }
    let seldom = FOLLOWER_INTERVAL;
    let every = group.map_or(seldom, |group| Duration::from_secs(u64::from(group.every_s.clamp(1, MOST_SELDOM_S))));
    // The store's stamps are whole seconds.
    let limit = MISSED * every + Duration::from_secs(1);
    if age(now, sighting.stored) > limit { Sign::Silent } else { Sign::Alive }
}

/// The nodes that live ones can't reach, each with those that say so.
fn cut_off(seen: &[Sighting], now: Timestamp) -> BTreeMap<&NodeId, Vec<&NodeId>> {
    let mut cut_off: BTreeMap<&NodeId, Vec<&NodeId>> = BTreeMap::new();
    for sighting in seen.iter().filter(|sighting| sign(sighting, now) == Sign::Alive) {
        for node in sighting.group().map_or(&[][..], |group| &group.unreachable) {
            cut_off.entry(node).or_default().push(&sighting.node);
        }
    }
    cut_off
}

/// Heartbeats for tests of other rooms.
#[cfg(test)]
pub mod testing {
    use super::*;
    use crate::rendezvous::heartbeat::{Process, testing::group};

    /// A beat of `name`, stored at this second; `change`: what differs from a follower of eight workers.
    pub fn sighting(name: &str, second: i64, change: impl FnOnce(&mut Group)) -> Sighting {
        let node = NodeId::new(name).unwrap();
        let process = Process { boot_id: "b".into(), pid_namespace: "pid:[1]".into(), pid: 7, started: 9 };
        let mut group = Group { state: State::Member, ..group() };
        change(&mut group);
        let heartbeat = Heartbeat { format: 2, node: node.clone(), counter: 3, process, group: Some(group) };
        Sighting { node, stored: Timestamp::from_second(second).unwrap(), heartbeat: Some(heartbeat) }
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::sighting, *};
    use crate::{
        config::StorageConfig,
        ids::WorldSize,
        journal::{FormedReason, Succession},
        storage::faulty::{Fault, Faulty},
    };

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn formed(roster: &[(&str, u32)]) -> Formation {
        let entry = |(name, workers): &(&str, u32)| RosterEntry::new(id(name), *workers);
        Formation {
            number: 1,
            at: at(0),
            node: id(roster[0].0),
            generation: Generation(3),
            roster: roster.iter().map(entry).collect(),
            world_size: WorldSize(roster.iter().map(|(_, workers)| workers).sum()),
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: None,
            succession: Succession::default(),
            ended: None,
        }
    }

    #[test]
    fn each_node_is_shown_with_its_ranks_and_its_sign_of_life() {
        let formed = formed(&[("b", 4), ("a", 2), ("c", 0), ("d", 1)]);
        let seen = [
            sighting("a", 1000, |group| group.unreachable = vec![id("b"), id("x")]),
            sighting("b", 880, |group| group.unreachable = vec![id("a")]),
            sighting("c", 100, |group| group.left = true),
            sighting("x", 990, |group| group.state = State::Waiting),
            sighting("y", 990, |group| group.left = true),
        ];
        let shown = overview(Some(&formed), &seen, at(1000), false).unwrap();
        assert_eq!((shown.generation, shown.leader), (Some(Generation(3)), Some(&id("b"))));
        let members: Vec<_> = shown
            .members
            .iter()
            .map(|view| (view.node.as_str(), view.first_rank.map(Rank::get), view.workers, view.sign))
            .collect();
        assert_eq!(
            members,
            [
                ("b", Some(0), 4, Sign::Silent),
                ("a", Some(4), 2, Sign::Alive),
                ("c", None, 0, Sign::Left),
                ("d", Some(6), 1, Sign::Missing)
            ]
        );
        assert_eq!(shown.members[0].out_of_reach_of, [&id("a")]);
        assert!(shown.members[1].out_of_reach_of.is_empty(), "b is silent, so what it says is old");
        let outside: Vec<_> = shown.outside.iter().map(|view| (view.node.as_str(), view.workers, view.says)).collect();
        assert_eq!(outside, [("x", 8, Some(State::Waiting))], "a node that left is not outside, it is gone");
        assert_eq!(shown.outside[0].out_of_reach_of, [&id("a")]);
    }

    #[test]
    fn a_node_outside_that_could_join_waits_for_what_the_leader_says() {
        let led = formed(&[("a", 1)]);
        let leader = |says: Option<&str>| sighting("a", 1000, |group| group.puts_off = says.map(str::to_owned));
        let waits = |seen: &[Sighting]| -> Vec<Option<String>> {
            let shown = overview(Some(&led), seen, at(1000), false).unwrap();
            shown.outside.into_iter().map(|view| view.waits.map(str::to_owned)).collect()
        };
        let other = || sighting("b", 1000, |group| group.kind = "B".into());
        let like = || sighting("c", 1000, |_| ());
        assert_eq!(waits(&[leader(None), other(), like()]), [None, None]);
        // Only those that could join wait for it, and only a leader says it.
        assert_eq!(waits(&[leader(Some("later")), other(), like()]), [None, Some("later".to_owned())]);
        let not_led = sighting("b", 1000, |group| group.puts_off = Some("later".into()));
        assert_eq!(waits(&[leader(None), not_led]), [None]);
    }

    #[test]
    fn a_node_outside_that_can_not_be_in_the_group_says_why() {
        let why = |formed: Option<&Formation>, seen: &[Sighting], mixed| -> Vec<Option<String>> {
            overview(formed, seen, at(1000), mixed).unwrap().outside.into_iter().map(|view| view.stays_out).collect()
        };
        let kind = |name: &str, kind: &str| sighting(name, 1000, |group| group.kind = kind.to_owned());
        let program = |name: &str, program: &str| sighting(name, 1000, |group| group.program = program.to_owned());
        let other = Some("it computes with \"B\", and others with \"A\" (parallel.mixed)".to_owned());
        // The leader is the measure, and while there is none, what most nodes have.
        let led = formed(&[("a", 1)]);
        let seen = [kind("a", "A"), kind("b", "B"), kind("c", "B"), kind("d", "A")];
        assert_eq!(why(Some(&led), &seen, false), [other.clone(), other.clone(), None]);
        let seen = [kind("b", "B"), kind("c", "A"), kind("d", "A")];
        assert_eq!(why(None, &seen, false), [other, None, None]);
        assert_eq!(why(None, &seen, true), [None, None, None]);
        let seen = [program("b", "1"), program("c", "2"), program("d", "2"), program("e", "")];
        let older = Some("it runs version 1, and others 2".to_owned());
        assert_eq!(why(None, &seen, true), [older, None, None, None], "one that does not say so is not judged");
    }

    #[test]
    fn a_run_of_one_node_has_no_overview() {
        let alone = formed(&[("a", 4)]);
        let mut beat = sighting("a", 1000, |_| {});
        beat.heartbeat.as_mut().unwrap().group = None;
        let seen = [beat, sighting("y", 990, |group| group.left = true)];
        assert_eq!(overview(Some(&alone), &seen, at(1000), false), None);
        assert_eq!(overview(None, &seen, at(1000), false), None);
        // Nodes that wait for a first generation, and one that is left of several.
        let waiting = [sighting("x", 990, |_| {})];
        let shown = overview(None, &waiting, at(1000), false).unwrap();
        assert_eq!((shown.generation, shown.members.len(), shown.outside.len()), (None, 0, 1));
        let mut left_over = alone;
        left_over.succession.continues = Some(Generation(2));
        assert!(overview(Some(&left_over), &[], at(1000), false).is_some());
    }

    #[test]
    fn a_beat_is_old_by_the_stores_clock_or_by_this_machines() {
        let sign_at = |stored, others, now| {
            let formed = formed(&[("a", 1), ("b", 1)]);
            let seen = [sighting("a", stored, |group| group.every_s = 4), sighting("b", others, |_| {})];
            overview(Some(&formed), &seen, at(now), false).unwrap().members[0].sign
        };
        assert_eq!(sign_at(1000, 1013, 1000), Sign::Alive);
        assert_eq!(sign_at(1000, 1014, 1000), Sign::Silent, "another node's beat is 14 s younger");
        assert_eq!(sign_at(1000, 1000, 1043), Sign::Alive, "this machine's clock may be 30 s ahead");
        assert_eq!(sign_at(1000, 1000, 1044), Sign::Silent, "all of them have stopped");
        assert_eq!(sign_at(1000, 1000, 1), Sign::Alive, "this machine's clock is behind");
        let never = sighting("a", 1000, |group| group.every_s = u32::MAX);
        assert_eq!((sign(&never, at(1181)), sign(&never, at(1182))), (Sign::Alive, Sign::Silent));
        let strange = Sighting { heartbeat: None, ..never };
        assert_eq!((sign(&strange, at(1091)), sign(&strange, at(1092))), (Sign::Alive, Sign::Silent));
    }

    #[tokio::test]
    async fn heartbeats_are_read_whatever_else_lies_there() {
        let store = Store::faulty_with(&Faulty::new(|_, _, _| Fault::Pass), &StorageConfig::plain(4, 8), None);
        let good = sighting("a", 0, |_| {}).heartbeat.unwrap();
        let body = serde_json::to_vec(&good).unwrap();
        store.put("nodes/b.json", b"\xffgarbled".as_slice().into()).await.unwrap();
        store.put("nodes/a.json", body.into()).await.unwrap();
        store.put("nodes/-c.json", b"no node".as_slice().into()).await.unwrap();
        store.put("nodes/long.json", vec![b' '; LIMIT as usize + 1].into()).await.unwrap();
        let seen = sightings(&store).await.unwrap();
        let found: Vec<_> = seen.iter().map(|s| (s.node.as_str(), s.heartbeat.as_ref())).collect();
        assert_eq!(found, [("a", Some(&good)), ("b", None), ("long", None)]);
    }
}
