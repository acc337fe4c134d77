//! The other nodes of a generation, as its leader has them; and the messages between the two.
//!
//! The leader's state machine knows ranks, not nodes. [`Others`] makes orders of its effects and events of what members
//! say: what every node answers for itself (its slots are laid out, its checkpoint is fetched) becomes one event when
//! all have answered. A node that is alone has no others, and nothing here does anything.
//!
//! # Protocol
//! The messages travel on the agents' channel ([`crate::rendezvous::peers`]), each with the generation that it belongs
//! to. They ask and report; nothing becomes true by them. A member obeys the leader of its generation alone, and a
//! leader hears of a member's own ranks alone: whatever else arrives is dropped. What all ranks of a node report at one
//! moment travels in one message. A message in doubt is not repeated: a link that breaks ends the generation.
//!
//! | leader | member |
//! |---|---|
//! | `tell`: to all of its workers | `workers`: what they said, or that they are gone |
//! | `lay_out` | `built`: the state of its workers, once; `laid_out` |
//! | | `fetched`: the state to load is there, or can't be had |
//! | `put`: its part of a save | `put`: bytes on their way; the receipt, or why there is none |
//! | `give_up_save`, `kill`, `wrong` | `notice`: it was told to leave; `failed`: it can't obey |
//! | `unfit`, `hands_over`, `over` | `blamed`: it leaves when the generation is over |
//!
//! # Invariants
//! - A save ends when it has ended on every node; a member that is lost has ended its part, without a receipt unless
//!   that had come before.
//! - A member that was lost does not come back in this generation.
//!
//! *Crash:* the link breaks, and the generation ends on both sides. *Retry:* none. *Cancel:* [`ToMember::Over`] ends a
//! member's part; so does the end of its link.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::mpsc, time::Instant};

use super::{
    effects::Order,
    finish::Whole,
    generation::Members,
    node::Part,
    phase::Event,
    save::{gather::Fetched, put::Put},
    workers::WorkerEvent,
};
use crate::{
    checkpoint::save::Receipt,
    error::{Error, Kind},
    ids::{AttemptId, NodeId, NodeRanks, Step},
    notice::{self, Notice},
    protocol::{FromWorker, ToWorker},
    snapshot::plan::TensorSpec,
    storage::Priority,
};

/// The word by which a notice of another node is reported.
const SOURCE: &str = "member";
/// The word by which it is reported that nodes wait to join.
const NEWCOMERS: &str = "newcomers";

/// From the leader of a generation to a member.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToMember {
    /// Tell every worker.
    Tell(ToWorker),
    /// All ranks have the same state: size the slots, and tell each worker where it writes.
    LayOut,
    /// The fetched checkpoint lies in its slot, and all ranks have loaded it.
    Received,
    /// Put your part of a save.
    Put {
        /// The leader's attempt.
        attempt: AttemptId,
        /// The snapshot's step.
        step: Step,
        /// Its slot.
        slot: u8,
        /// Its priority against other work.
        priority: Priority,
        /// What a member needs to finish it, if the leader is lost.
        whole: Box<Whole>,
    },
    /// The save under way is given up.
    GiveUpSave,
    /// Kill all workers.
    Kill,
    /// Its machine computes or remembers wrongly: it ends, and does not come back.
    Wrong {
        /// What was found.
        why: String,
    },
    /// Its saves fail, and others' do not: it is no member of the next generation.
    Unfit {
        /// What was found.
        why: String,
    },
    /// The leader's own saves fail, and others' do not: another one leads the next generation.
    HandsOver {
        /// What was found.
        why: String,
    },
    /// The generation has ended.
    Over {
        /// The workers are asked to exit, and not killed.
        dismisses: bool,
        /// A person asked the run to stop: no node goes on.
        ends_the_run: bool,
        /// The group has stopped after a step that is committed, and these members stay: their workers may go on in the
        /// next generation. Otherwise nobody's.
        #[serde(default)]
        stay: Vec<NodeId>,
    },
}

impl ToMember {
    /// What a member does of an order to every node; `None`: nothing.
    fn of(order: &Order) -> Option<Self> {
        match order {
            Order::TellAll(message) => Some(Self::Tell(message.clone())),
            Order::LayOut(_) => Some(Self::LayOut),
            Order::Received => Some(Self::Received),
            // It holds its own part since that was put.
            Order::Hold { .. } => None,
            Order::Kill => Some(Self::Kill),
        }
    }
}

/// From a member to its leader.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToLeader {
    /// What its workers said, in order.
    Workers(Vec<WorkerEvent>),
    /// The state of its workers, the same on each.
    Built {
        /// Every tensor.
        tensors: Vec<TensorSpec>,
        /// The device of its first worker.
        device: String,
        /// Trained parameters.
        parameters: u64,
    },
    /// Its slots are laid out: bytes of its shards of one save.
    LaidOut {
        /// Bytes.
        bytes: u64,
    },
    /// The state to load has arrived.
    Fetched {
        /// Bytes of all files.
        bytes: u64,
        /// Those of them that came from the store.
        stored: u64,
        /// Those of them that came from the memory of other nodes.
        lent: u64,
        /// The time it took.
        seconds: f64,
    },
    /// The state to load can't be had.
    NotFetched {
        /// The reason.
        why: String,
    },
    /// More bytes of its part of a save have reached the store.
    Progress {
        /// The save.
        attempt: AttemptId,
        /// Bytes.
        bytes: u64,
    },
    /// Its part of a save has ended.
    Put {
        /// The save.
        attempt: AttemptId,
        /// Its receipt, or why there is none.
        result: Result<Box<Receipt>, String>,
    },
    /// It was told to leave.
    Notice(NoticeOfMember),
    /// Its workers have ended the group again and again: it leaves when this generation is over.
    Blamed {
        /// What was found.
        why: String,
    },
    /// It can't do what it was asked.
    Failed(String),
}

/// A notice as it travels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NoticeOfMember {
    /// Whether the machine goes away; otherwise somebody asks it to stop.
    pub interruption: bool,
    /// Seconds left when it was sent, if known.
    pub deadline_s: Option<f64>,
    /// Whether the deadline binds.
    pub binding: bool,
    /// Its source.
    pub source: String,
}

/// What the channel brings of a member.
#[derive(Debug)]
pub enum Heard {
    /// It said this.
    Said(NodeId, ToLeader),
    /// It is lost, and why.
    Parted(NodeId, String),
    /// These nodes wait to join: the generation ends at a saved step, and the group forms anew.
    Regroup(Vec<NodeId>),
    /// A newer generation stands: this one is nobody's any more.
    Overtaken,
}

/// The channel to the other nodes of a generation.
#[derive(Debug)]
pub struct Company {
    /// Their ranks.
    pub others: Vec<(NodeId, NodeRanks)>,
    /// What is sent to them.
    pub to: mpsc::UnboundedSender<(NodeId, ToMember)>,
    /// What they say.
    pub heard: mpsc::UnboundedReceiver<Heard>,
    /// Hears of each save that is committed.
    pub saves: mpsc::UnboundedSender<Progressed>,
    /// Nodes without which nothing is trained.
    pub min: usize,
}

/// How far a generation has come when a save is committed.
#[derive(Clone, Copy, Debug)]
pub struct Progressed {
    /// The last step that every rank has finished.
    pub step: Step,
    /// The usual step, seconds, if it is known.
    pub step_s: Option<f64>,
    /// When the first step was finished.
    pub first: Option<Instant>,
}

/// Answers that every node gives once.
#[derive(Debug)]
struct Gathered<T> {
    own: Option<T>,
    others: BTreeMap<NodeId, T>,
}

impl<T: Copy> Gathered<T> {
    fn new() -> Self {
        Self { own: None, others: BTreeMap::new() }
    }

    /// All answers, once there are those of this node and of `others` more.
    fn whole(&self, others: usize) -> Option<Vec<T>> {
        let own = self.own.filter(|_| self.others.len() == others)?;
        Some(std::iter::once(own).chain(self.others.values().copied()).collect())
    }
}

/// The save under way, as far as the other nodes take part in it.
#[derive(Debug)]
struct Putting {
    attempt: AttemptId,
    says: mpsc::UnboundedSender<Put>,
    /// Members whose part has ended well.
    whole: BTreeSet<NodeId>,
}

/// The other nodes of a generation.
#[derive(Debug)]
pub struct Others {
    ranks: BTreeMap<NodeId, NodeRanks>,
    to: Option<mpsc::UnboundedSender<(NodeId, ToMember)>>,
    /// Those that were lost, in order, and why.
    parted: Vec<(NodeId, String)>,
    /// Those that were told to leave.
    leaving: BTreeSet<NodeId>,
    laid_out: Gathered<u64>,
    fetched: Gathered<Fetched>,
    putting: Option<Putting>,
    /// Those that leave when the generation is over, since their workers end it again and again, and why.
    blamed: Vec<(NodeId, String)>,
    /// Those whose workers have built their state.
    built: BTreeSet<NodeId>,
}

impl Others {
    /// Of a node that is alone.
    pub fn none() -> Self {
        Self::new(Vec::new(), None)
    }

    /// These, reached by `to`.
    pub fn of(others: Vec<(NodeId, NodeRanks)>, to: mpsc::UnboundedSender<(NodeId, ToMember)>) -> Self {
        Self::new(others, Some(to))
    }

    fn new(others: Vec<(NodeId, NodeRanks)>, to: Option<mpsc::UnboundedSender<(NodeId, ToMember)>>) -> Self {
        Self {
            ranks: others.into_iter().collect(),
            to,
            parted: Vec::new(),
            leaving: BTreeSet::new(),
            laid_out: Gathered::new(),
            fetched: Gathered::new(),
            putting: None,
            blamed: Vec::new(),
            built: BTreeSet::new(),
        }
    }

    /// Members whose workers have not even built their state in time are left out by name.
    pub fn late(&mut self) -> Vec<Event> {
        let late: Vec<NodeId> = self.ranks.keys().filter(|node| !self.built.contains(*node)).cloned().collect();
        late.iter().flat_map(|node| self.part(node, "its workers did not start in time")).collect()
    }

    /// Members that compute or remember wrongly are left out by name, and hear why.
    pub fn leave_out(&mut self, nodes: &[NodeId], why: &str) {
        for node in nodes {
            if let Some(to) = self.to.as_ref().filter(|_| self.ranks.contains_key(node)) {
                let _ = to.send((node.clone(), ToMember::Wrong { why: why.to_owned() }));
            }
            // The generation ends, whatever becomes of its ranks.
            let _ = self.part(node, why);
        }
    }

    /// Members whose saves fail are left out by name, and hear why. As events of the generation.
    pub fn leave_out_unfit(&mut self, nodes: impl IntoIterator<Item = (NodeId, String)>) -> Vec<Event> {
        let mut events = Vec::new();
        for (node, why) in nodes {
            if let Some(to) = self.to.as_ref().filter(|_| self.ranks.contains_key(&node)) {
                let _ = to.send((node.clone(), ToMember::Unfit { why: why.clone() }));
            }
            events.extend(self.part(&node, &why));
        }
        events
    }

    /// The leader hands over: every member hears why.
    pub fn hands_over(&self, why: &str) {
        self.send(&ToMember::HandsOver { why: why.to_owned() });
    }

    /// Whether a member is lost.
    pub fn has_lost(&self) -> bool {
        !self.parted.is_empty()
    }

    fn send(&self, message: &ToMember) {
        for node in self.ranks.keys() {
            if let Some(to) = &self.to {
                let _ = to.send((node.clone(), message.clone()));
            }
        }
    }

    /// An order to every node.
    pub fn order(&self, order: &Order) {
        if let Some(message) = ToMember::of(order) {
            self.send(&message);
        }
    }

    /// An event of this node's own: what every node answers for itself waits for the others.
    pub fn own(&mut self, event: Event) -> Option<Event> {
        match event {
            Event::LaidOut { bytes } => {
                self.laid_out.own = Some(bytes);
                self.all_laid_out()
            }
            Event::Fetched(Ok(fetched)) => {
                self.fetched.own = Some(fetched);
                self.all_fetched()
            }
            other => Some(other),
        }
    }

    fn all_laid_out(&self) -> Option<Event> {
        let bytes = self.laid_out.whole(self.ranks.len())?;
        Some(Event::LaidOut { bytes: bytes.into_iter().fold(0, u64::saturating_add) })
    }

    /// The slowest node's time, the bytes that one node gathers, and the most that one of them read from the store.
    fn all_fetched(&self) -> Option<Event> {
        let all = self.fetched.whole(self.ranks.len())?;
        let most = |of: fn(&Fetched) -> u64| all.iter().map(of).max().unwrap_or(0);
        let [bytes, stored, lent] =
            [|it: &Fetched| it.bytes, |it: &Fetched| it.stored, |it: &Fetched| it.lent].map(most);
        let seconds = all.iter().map(|fetched| fetched.seconds).fold(0.0, f64::max);
        Some(Event::Fetched(Ok(Fetched { bytes, stored, lent, seconds })))
    }

    /// The other nodes put their parts of a save too. An error: a member is lost, so this save can't be whole.
    pub fn put(&mut self, part: &Part, whole: Whole, says: &mpsc::UnboundedSender<Put>) -> Result<(), Error> {
        if let Some((node, why)) = self.parted.first() {
            return Err(lost(node, why));
        }
        let Part { attempt, step, slot, priority, .. } = part.clone();
        self.send(&ToMember::Put { attempt: attempt.clone(), step, slot, priority, whole: Box::new(whole) });
        self.putting = Some(Putting { attempt, says: says.clone(), whole: BTreeSet::new() });
        Ok(())
    }

    /// The save under way is given up.
    pub fn give_up_save(&mut self) {
        self.putting = None;
        self.send(&ToMember::GiveUpSave);
    }

    /// The generation has ended.
    pub fn over(&self, dismisses: bool, ends_the_run: bool, stay: &[NodeId]) {
        self.send(&ToMember::Over { dismisses, ends_the_run, stay: stay.to_vec() });
    }

    /// What has become of them.
    pub fn tells(&self, members: &mut Members) {
        members.leaving = self.leaving.iter().cloned().collect();
        members.parted = self.parted.iter().chain(&self.blamed).cloned().collect();
    }

    /// What has come from a member, as events of the generation.
    pub fn hear(&mut self, heard: Heard) -> Vec<Event> {
        match heard {
            Heard::Said(node, said) => match self.ranks.get(&node).copied() {
                Some(ranks) => self.said(&node, ranks, said),
                None => {
                    tracing::debug!(%node, "a node that is no member of this generation spoke");
                    Vec::new()
                }
            },
            Heard::Parted(node, why) => self.part(&node, &why),
            Heard::Regroup(joined) => {
                let id = joined.iter().map(NodeId::as_str).collect::<Vec<_>>().join(" ");
                let confidence = notice::Confidence::Announced;
                let notice = Notice { kind: notice::Kind::Stop, deadline: None, source: NEWCOMERS, id, confidence };
                vec![Event::Notice(notice)]
            }
            Heard::Overtaken => {
                vec![Event::Lost(Error::new(Kind::Fenced, "another node has formed a newer generation"))]
            }
        }
    }

    fn said(&mut self, node: &NodeId, ranks: NodeRanks, said: ToLeader) -> Vec<Event> {
        match said {
            ToLeader::Workers(events) => {
                let own = |event: &WorkerEvent| ranks.local(event.rank()).is_some();
                let event = |event| match event {
                    // Of this machine alone, as far as one knows: a fault of the run shows in the leader's ranks, too.
                    WorkerEvent::Message(_, FromWorker::Failed { message, permanent: true, .. }) => {
                        self.part(node, &message)
                    }
                    event => vec![Event::Worker(event)],
                };
                events.into_iter().filter(own).flat_map(event).collect()
            }
            ToLeader::Built { tensors, device, parameters } => {
                self.built.insert(node.clone());
                let built = || FromWorker::Built { tensors: tensors.clone(), device: device.clone(), parameters };
                ranks.locals().map(|local| Event::Worker(WorkerEvent::Message(ranks.rank(local), built()))).collect()
            }
            ToLeader::LaidOut { bytes } => {
                self.laid_out.others.insert(node.clone(), bytes);
                self.all_laid_out().into_iter().collect()
            }
            ToLeader::Fetched { bytes, stored, lent, seconds } => {
                self.fetched.others.insert(node.clone(), Fetched { bytes, stored, lent, seconds });
                self.all_fetched().into_iter().collect()
            }
            // Its disk, its memory or its way to the store: damage in the store itself is found by the leader, too.
            ToLeader::NotFetched { why } => self.part(node, &format!("it could not restore: {why}")),
            ToLeader::Progress { attempt, bytes } => {
                self.says(&attempt, Put::Progress(bytes));
                Vec::new()
            }
            ToLeader::Put { attempt, result } => {
                let putting = self.putting.as_mut().filter(|putting| putting.attempt == attempt && result.is_ok());
                if let Some(putting) = putting {
                    putting.whole.insert(node.clone());
                }
                let result = result.map(|receipt| *receipt);
                let fail = |why| Error::new(Kind::Unavailable, format!("node {node}: {why}"));
                self.says(&attempt, Put::Ended(node.clone(), result.map_err(fail)));
                Vec::new()
            }
            ToLeader::Notice(notice) => {
                self.leaving.insert(node.clone());
                vec![Event::Notice(notice.here(node))]
            }
            // Its agent lives on, and still puts its part of a save.
            ToLeader::Blamed { why } => {
                self.blamed.push((node.clone(), why));
                Vec::new()
            }
            ToLeader::Failed(why) => self.part(node, &why),
        }
    }

    fn says(&self, attempt: &AttemptId, put: Put) {
        if let Some(putting) = self.putting.as_ref().filter(|putting| putting.attempt == *attempt) {
            let _ = putting.says.send(put);
        }
    }

    /// Whether the save under way can't be whole any more, because a member was lost before its part had ended: then
    /// every other node's part is over, too. `me`: this node.
    pub fn abandons_save(&mut self, me: &NodeId) -> bool {
        let Some(putting) = &self.putting else { return false };
        let Some((lost_one, why)) = self.parted.iter().find(|(node, _)| !putting.whole.contains(node)) else {
            return false;
        };
        for node in self.ranks.keys().chain([me]) {
            let _ = putting.says.send(Put::Ended(node.clone(), Err(lost(lost_one, why))));
        }
        self.send(&ToMember::GiveUpSave);
        self.putting = None;
        true
    }

    /// A member is lost, and so are its ranks.
    fn part(&mut self, node: &NodeId, why: &str) -> Vec<Event> {
        let Some(ranks) = self.ranks.get(node).copied() else { return Vec::new() };
        if self.parted.iter().any(|(lost, _)| lost == node) {
            return Vec::new();
        }
        self.parted.push((node.clone(), why.to_owned()));
        vec![Event::Worker(WorkerEvent::Exited(ranks.first, format!("is lost with node {node}: {why}")))]
    }
}

fn lost(node: &NodeId, why: &str) -> Error {
    Error::new(Kind::Unavailable, format!("node {node} is lost: {why}"))
}

impl NoticeOfMember {
    /// As it is sent to the leader.
    pub fn of(notice: &Notice) -> Self {
        Self {
            interruption: notice.kind == notice::Kind::Interruption,
            deadline_s: notice.deadline.map(|left| left.as_secs_f64()),
            binding: notice.deadline_binds(),
            source: notice.source.to_owned(),
        }
    }

    /// As the leader takes it: a notice to the group, since a step needs every rank.
    fn here(&self, node: &NodeId) -> Notice {
        Notice {
            kind: if self.interruption { notice::Kind::Interruption } else { notice::Kind::Stop },
            deadline: self.deadline_s.and_then(|left| Duration::try_from_secs_f64(left).ok()),
            source: SOURCE,
            id: node.to_string(),
            confidence: if self.binding { notice::Confidence::Announced } else { notice::Confidence::Advisory },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Rank, WorldSize};

    struct Rig {
        others: Others,
        sent: mpsc::UnboundedReceiver<(NodeId, ToMember)>,
    }

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    /// The leader has rank 0, `a` ranks 1 and 2, `b` rank 3.
    fn rig() -> Rig {
        let ranks = |first, workers| NodeRanks { first: Rank(first), workers, world: WorldSize(4) };
        let (to, sent) = mpsc::unbounded_channel();
        Rig { others: Others::of(vec![(id("a"), ranks(1, 2)), (id("b"), ranks(3, 1))], to), sent }
    }

    impl Rig {
        fn says(&mut self, node: &str, said: ToLeader) -> Vec<Event> {
            self.others.hear(Heard::Said(id(node), said))
        }

        fn sent(&mut self) -> Vec<String> {
            std::iter::from_fn(|| self.sent.try_recv().ok()).map(|(node, words)| format!("{node} {words:?}")).collect()
        }

        fn put(&mut self) -> (AttemptId, mpsc::UnboundedReceiver<Put>) {
            let attempt = AttemptId::random();
            let (priority, small) = (Priority::Normal, Vec::new());
            let part = Part { attempt: attempt.clone(), step: Step(4), slot: 1, priority, small };
            let whole = Whole {
                expected: vec!["f".into()],
                loss: Some(1.0),
                validation_loss: None,
                metrics: Default::default(),
            };
            let (says, puts) = mpsc::unbounded_channel();
            self.others.put(&part, whole, &says).unwrap();
            (attempt, puts)
        }
    }

    fn exited(events: &[Event]) -> Vec<(Rank, &str)> {
        let mut found = Vec::new();
        for event in events {
            match event {
                Event::Worker(WorkerEvent::Exited(rank, why)) => found.push((*rank, why.as_str())),
                other => panic!("{other:?}"),
            }
        }
        found
    }

    #[test]
    fn a_node_that_is_alone_waits_for_nobody() {
        let mut others = Others::none();
        assert!(matches!(others.own(Event::LaidOut { bytes: 7 }), Some(Event::LaidOut { bytes: 7 })));
        let fetched = Fetched { bytes: 9, stored: 9, lent: 0, seconds: 0.5 };
        assert!(matches!(others.own(Event::Fetched(Ok(fetched))), Some(Event::Fetched(Ok(Fetched { bytes: 9, .. })))));
        assert!(matches!(others.own(Event::Tick), Some(Event::Tick)));
        assert!(others.late().is_empty() && !others.abandons_save(&id("me")));
    }

    #[test]
    fn what_every_node_answers_becomes_one_event_when_all_have_answered() {
        let mut rig = rig();
        assert!(rig.says("a", ToLeader::LaidOut { bytes: 20 }).is_empty());
        assert!(rig.others.own(Event::LaidOut { bytes: 1 }).is_none());
        assert!(rig.says("a", ToLeader::LaidOut { bytes: 20 }).is_empty(), "said twice, it is one answer");
        assert!(matches!(rig.says("b", ToLeader::LaidOut { bytes: 300 })[..], [Event::LaidOut { bytes: 321 }]));
        assert!(rig.says("b", ToLeader::Fetched { bytes: 50, stored: 20, lent: 9, seconds: 3.0 }).is_empty());
        assert!(rig.says("a", ToLeader::Fetched { bytes: 50, stored: 30, lent: 4, seconds: 2.0 }).is_empty());
        let whole = rig.others.own(Event::Fetched(Ok(Fetched { bytes: 50, stored: 0, lent: 0, seconds: 1.0 })));
        assert!(
            matches!(whole, Some(Event::Fetched(Ok(Fetched { bytes: 50, stored: 30, lent: 9, seconds: 3.0 })))),
            "{whole:?}"
        );
    }

    #[test]
    fn a_node_speaks_for_its_own_ranks_alone_and_a_stranger_for_none() {
        let mut rig = rig();
        let ready = |rank| {
            WorkerEvent::Message(
                Rank(rank),
                FromWorker::Ready { fingerprint: None, split: crate::protocol::StartSplit::default() },
            )
        };
        let all = || ToLeader::Workers((0..5).map(ready).collect());
        let ranks = |events: Vec<Event>| -> Vec<Rank> {
            let rank = |event| match event {
                Event::Worker(event) => event.rank(),
                other => panic!("{other:?}"),
            };
            events.into_iter().map(rank).collect()
        };
        assert_eq!(ranks(rig.says("a", all())), [Rank(1), Rank(2)]);
        assert_eq!(ranks(rig.says("b", all())), [Rank(3)]);
        assert!(rig.says("x", all()).is_empty());
        assert!(rig.says("x", ToLeader::Failed("no".into())).is_empty());
        let built = ToLeader::Built { tensors: Vec::new(), device: "cpu".into(), parameters: 1 };
        assert_eq!(ranks(rig.says("a", built)), [Rank(1), Rank(2)], "one message for all of its ranks");
        assert_eq!(exited(&rig.others.late()), [(Rank(3), "is lost with node b: its workers did not start in time")]);
    }

    #[test]
    fn a_machine_that_can_not_compute_is_left_out_and_does_not_fail_the_run() {
        let mut rig = rig();
        let failed = |permanent| FromWorker::Failed { message: "no GPU".into(), hint: None, permanent };
        let said = |permanent| ToLeader::Workers(vec![WorkerEvent::Message(Rank(3), failed(permanent))]);
        assert!(matches!(&rig.says("b", said(false))[..], [Event::Worker(WorkerEvent::Message(Rank(3), _))]));
        assert_eq!(exited(&rig.says("b", said(true))), [(Rank(3), "is lost with node b: no GPU")]);
    }

    #[test]
    fn a_lost_member_ends_the_save_that_still_waits_for_it() {
        let mut rig = rig();
        let (_, mut puts) = rig.put();
        assert_eq!(exited(&rig.others.hear(Heard::Parted(id("b"), "silent".into()))).len(), 1);
        assert!(rig.others.hear(Heard::Parted(id("b"), "silent".into())).is_empty(), "it is lost once");
        assert!(rig.others.abandons_save(&id("me")) && !rig.others.abandons_save(&id("me")));
        let mut ended: Vec<String> = Vec::new();
        while let Ok(Put::Ended(node, result)) = puts.try_recv() {
            assert!(result.unwrap_err().to_string().contains("node b is lost: silent"));
            ended.push(node.to_string());
        }
        assert_eq!(ended, ["a", "b", "me"], "its end on every node");
        assert!(rig.sent().iter().any(|words| words == "a GiveUpSave"));
        // No other save can be whole.
        let (says, _puts) = mpsc::unbounded_channel();
        let part = Part {
            attempt: AttemptId::random(),
            step: Step(8),
            slot: 0,
            priority: Priority::Normal,
            small: Vec::new(),
        };
        let whole = Whole { expected: Vec::new(), loss: None, validation_loss: None, metrics: Default::default() };
        assert!(rig.others.put(&part, whole, &says).is_err() && rig.sent().is_empty());
    }

    #[test]
    fn a_member_that_is_lost_after_its_part_does_not_end_the_save() {
        let mut rig = rig();
        let (attempt, mut puts) = rig.put();
        let receipt = |attempt: &AttemptId| Receipt {
            format: 1,
            attempt: attempt.clone(),
            run_id: crate::ids::RunId::new("run").unwrap(),
            step: Step(4),
            generation: crate::ids::Generation(1),
            node: id("b"),
            files: Vec::new(),
        };
        let put =
            |attempt: &AttemptId| ToLeader::Put { attempt: attempt.clone(), result: Ok(Box::new(receipt(attempt))) };
        // Of another attempt: not this save's.
        assert!(rig.says("b", put(&AttemptId::random())).is_empty());
        assert!(puts.try_recv().is_err());
        assert!(rig.says("b", put(&attempt)).is_empty());
        let _ = rig.others.hear(Heard::Parted(id("b"), "silent".into()));
        assert!(!rig.others.abandons_save(&id("me")));
        assert!(matches!(puts.try_recv(), Ok(Put::Ended(_, Ok(_)))));
    }

    #[test]
    fn a_notice_to_a_member_is_one_to_the_group_and_says_who_leaves() {
        let mut rig = rig();
        let notice =
            NoticeOfMember { interruption: true, deadline_s: Some(120.0), binding: true, source: "aws-spot".into() };
        let events = rig.says("a", ToLeader::Notice(notice));
        let [Event::Notice(notice)] = &events[..] else { panic!("{events:?}") };
        assert_eq!((notice.kind, notice.deadline), (notice::Kind::Interruption, Some(Duration::from_secs(120))));
        assert!(notice.deadline_binds() && !notice.is_signal());
        let mut members = Members::default();
        rig.others.tells(&mut members);
        assert_eq!((members.leaving, members.parted.len()), (vec![id("a")], 0));
        let hostile =
            NoticeOfMember { interruption: false, deadline_s: Some(f64::NAN), binding: true, source: String::new() };
        let events = rig.says("b", ToLeader::Notice(hostile));
        assert!(matches!(&events[..], [Event::Notice(notice)] if notice.deadline.is_none()));
    }

    #[test]
    fn a_member_that_computes_wrongly_hears_it_alone_and_is_gone_by_name() {
        let mut rig = rig();
        rig.others.leave_out(&[id("b"), id("nobody")], "worker 3 differs");
        let sent = rig.sent();
        assert_eq!(sent.len(), 1, "{sent:?}");
        assert!(sent[0].starts_with("b Wrong") && sent[0].contains("worker 3 differs"), "{sent:?}");
        let mut members = Members::default();
        rig.others.tells(&mut members);
        assert_eq!(members.parted, [(id("b"), "worker 3 differs".to_owned())]);
    }
}
