//! The desk of a node in a run of several: it drives the rendezvous's [`Seat`] beside whatever the node is doing.
//!
//! One task for as long as the agent lives. It owns the timers and hears the links, the store's answers and the runner;
//! the seat decides; the desk performs. Requests to the store run as tasks of their own, so that a store that does not
//! answer delays no message. The runner is told what the newest generation makes of this node ([`Call`]), and tells
//! what has become of its workers ([`Tell`]).
//!
//! Messages of a generation pass through to the agent ([`Route`]). Those of a generation that this node has not taken
//! up yet wait; those of an older one are dropped.
//!
//! *Crash:* nothing here is stored. *Retry:* as the seat says. *Cancel:* dropping [`Desk`] ends the task and its links.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::Instant,
};

use super::read::Read;
use crate::{
    agent::{
        follow,
        group::{self, ToLeader, ToMember},
    },
    ids::{Generation, NodeId, NodeKey},
    journal::{FormedReason, JournalWriter, RosterEntry},
    layout,
    rendezvous::{
        channel::End,
        heartbeat::{self, Group, State, Voice},
        membership::{Listed, Role, beat_every},
        peers::{self, PeerEvent, Peers},
        policy::{
            Bounds, Member, Roster,
            roster::{Formation, Place, Why},
        },
        seat::{Beat, Body, Input, Me, Output, Seat, Sound, Timer},
    },
    storage::{ObjectInfo, StorageError, Store},
};

/// The time for which other nodes are dialled to find out whether they can be reached.
const PROBE: Duration = Duration::from_secs(2);
/// Messages of generations that this node has not taken up yet; more are dropped.
const EARLY: usize = 10_000;
/// Heartbeats that are read side by side.
const SIDE_BY_SIDE: usize = 16;

/// Everything that travels between two agents.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Words {
    /// About the group.
    Seat(Body),
    /// From a generation's leader to a member.
    ToMember(ToMember),
    /// From a member to its leader.
    ToLeader(ToLeader),
}

/// What the runner is to do.
#[derive(Debug)]
pub enum Call {
    /// Append `formed`, and answer with [`Tell::Appended`].
    Form(Box<Proposal>),
    /// Append `interrupted` for this generation, and answer with [`Tell::Appended`].
    StepDown(Generation),
    /// This node leads this generation.
    Lead(Roster),
    /// This node is a member of it.
    Follow(Roster),
    /// It is neither.
    Wait,
    /// A newer generation stands without this node.
    LeftOut,
    /// This node's saves fail: another one leads better.
    HandOver,
}

/// A generation to be formed.
#[derive(Debug)]
pub struct Proposal {
    /// Its number.
    pub generation: Generation,
    /// Its roster, as it is stored.
    pub roster: Vec<RosterEntry>,
    /// The nodes that are left out, and why.
    pub out: Vec<(NodeId, FormedReason, String)>,
    /// The generation before, if it has no recorded end.
    pub continues: Option<Roster>,
}

/// What the runner says.
#[derive(Debug)]
pub enum Tell {
    /// The generation that this node leads has ended here, and the group forms anew.
    Again,
    /// These members leave.
    Leaving(BTreeSet<NodeId>),
    /// The answer to [`Call::Form`] and [`Call::StepDown`]: whether the record stands, if that is known.
    Appended(Option<bool>),
    /// A save of the generation that this node leads is committed.
    Saved,
    /// How many saves in a row failed because of this node; 0: it is trusted again.
    Fails(u32),
    /// This node leads, and another one leads better; answered by [`Call::HandOver`] if it still leads.
    HandOver(String),
    /// From now on messages of this generation go there.
    Route(Route),
    /// The generation is over for this node, and its workers are gone.
    Off,
}

/// Where a generation's messages go on this node.
#[derive(Debug)]
pub enum Route {
    /// This node leads it.
    Lead(Generation, mpsc::UnboundedSender<group::Heard>),
    /// This node follows that leader.
    Follow(Generation, NodeId, mpsc::UnboundedSender<follow::LeaderHeard>),
}

impl Route {
    const fn generation(&self) -> Generation {
        match self {
            Self::Lead(generation, _) | Self::Follow(generation, ..) => *generation,
        }
    }
}

/// This node, as it says of itself.
#[derive(Clone, Debug)]
pub struct Myself {
    /// Its id.
    pub node: NodeId,
    /// Where its channel listens.
    pub address: SocketAddr,
    /// The key by which that is known.
    pub key: NodeKey,
    /// Its workers.
    pub workers: u32,
    /// What it computes with.
    pub kind: String,
}

impl Myself {
    /// Its heartbeat's content.
    pub fn group(&self, role: Role, local_store: bool, unreachable: Vec<NodeId>, left: bool) -> Group {
        Group {
            address: self.address.to_string(),
            key: self.key.clone(),
            every_s: u32::try_from(beat_every(role, local_store).as_secs()).unwrap_or(u32::MAX),
            state: match role {
                Role::Leader => State::Leader,
                Role::Follower => State::Member,
                Role::Waiting => State::Waiting,
            },
            kind: self.kind.clone(),
            workers: self.workers,
            unreachable,
            left,
        }
    }
}

/// A handle to the desk. Dropping it ends the desk.
#[derive(Debug)]
pub struct Desk {
    tell: mpsc::UnboundedSender<Tell>,
    calls: mpsc::UnboundedReceiver<Call>,
    /// The links, for the messages of a generation.
    pub links: Peers<Words>,
    led: watch::Receiver<Instant>,
    task: AbortHandle,
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the desk works with.
pub struct Tools {
    /// The run's folder.
    pub run: Store,
    /// Its journal.
    pub journal: JournalWriter,
    /// This node.
    pub me: Myself,
    /// The operator's settings.
    pub bounds: Bounds,
    /// The links, and what they bring.
    pub links: (Peers<Words>, mpsc::UnboundedReceiver<PeerEvent<Words>>),
    /// This node's heartbeat.
    pub says: Voice,
}

impl Desk {
    /// Starts the task.
    pub fn open(tools: Tools) -> Self {
        let Tools { run, journal, me, bounds, links: (links, heard), says } = tools;
        let (tell, told) = mpsc::unbounded_channel();
        let (calls, called) = mpsc::unbounded_channel();
        let (inputs, given) = mpsc::unbounded_channel();
        let (led, is_led) = watch::channel(Instant::now());
        let member = Member { node: me.node.clone(), workers: me.workers, kind: me.kind.clone() };
        let program = env!("CARGO_PKG_VERSION").to_owned();
        let began = Instant::now();
        let (seat, first) = Seat::new(Me { member, program }, bounds, Sound, Duration::ZERO);
        let work = Work {
            run,
            journal,
            me,
            links: links.clone(),
            says,
            seat,
            began,
            calls,
            inputs,
            tasks: JoinSet::new(),
            known: BTreeMap::new(),
            read: Read::default(),
            route: None,
            taken: Generation(0),
            early: VecDeque::new(),
            led,
            regrouped: None,
            ends: BTreeMap::new(),
            mixed: bounds.mixed,
        };
        let task = tokio::spawn(work.run(first, heard, told, given)).abort_handle();
        Self { tell, calls: called, links, led: is_led, task }
    }

    /// Says something to the desk.
    pub fn tell(&self, words: Tell) {
        let _ = self.tell.send(words);
    }

    /// Its ear, for a task that tells it something.
    pub fn voice(&self) -> mpsc::UnboundedSender<Tell> {
        self.tell.clone()
    }

    /// When a leader was last known to be at work, or this node took its seat.
    pub fn led(&self) -> Instant {
        *self.led.borrow()
    }

    /// The next call. May be dropped at any moment: nothing is lost.
    pub async fn call(&mut self) -> Call {
        match self.calls.recv().await {
            Some(call) => call,
            // The task ends with this handle, or by a panic, which the runner's journal outlives.
            None => std::future::pending().await,
        }
    }
}

/// What a task of the desk has to say.
enum News {
    Input(Input),
    /// The heartbeats of nodes that knocked, or may have.
    Met(Vec<(NodeId, Group)>),
    /// The heartbeat of a node that a message is for.
    Found(NodeId, Option<Group>, Body),
}

struct Work {
    run: Store,
    journal: JournalWriter,
    me: Myself,
    links: Peers<Words>,
    says: Voice,
    seat: Seat<Sound>,
    began: Instant,
    calls: mpsc::UnboundedSender<Call>,
    inputs: mpsc::UnboundedSender<News>,
    /// Timers and requests under way.
    tasks: JoinSet<()>,
    /// What the heartbeats of other nodes say.
    known: BTreeMap<NodeId, Group>,
    read: Read,
    route: Option<Route>,
    /// The newest generation that this node has taken part in.
    taken: Generation,
    early: VecDeque<(NodeId, Generation, Words)>,
    /// When a leader was last known to be at work.
    led: watch::Sender<Instant>,
    /// The generation that has been asked to end because nodes wait to join.
    regrouped: Option<Generation>,
    /// Why the last link to a node ended.
    ends: BTreeMap<NodeId, String>,
    /// Nodes of several kinds may be one group.
    mixed: bool,
}

impl Work {
    async fn run(
        mut self,
        first: Vec<Output>,
        mut heard: mpsc::UnboundedReceiver<PeerEvent<Words>>,
        mut told: mpsc::UnboundedReceiver<Tell>,
        mut given: mpsc::UnboundedReceiver<News>,
    ) {
        self.knows_the_roster();
        self.perform(first);
        loop {
            tokio::select! {
                Some(event) = heard.recv() => self.hear(event),
                tell = told.recv() => match tell {
                    Some(tell) => self.told(tell),
                    None => return,
                },
                Some(news) = given.recv() => match news {
                    News::Input(input) => self.give(input),
                    News::Met(nodes) => nodes.iter().for_each(|(node, group)| self.meet(node, group)),
                    News::Found(node, group, body) => self.found(&node, group, body),
                },
                // Ended tasks are forgotten.
                Some(_) = self.tasks.join_next() => {}
            }
        }
    }

    fn give(&mut self, input: Input) {
        // The desk itself turns the journal's state into lines, in order.
        let input = match input {
            Input::Journal(_) => {
                self.knows_the_roster();
                Input::Journal(self.read.lines(&self.journal.state()))
            }
            other => other,
        };
        if let Input::Beats { beats, .. } = &input {
            for (node, beat) in beats {
                if let Some(beat) = beat {
                    self.meet(node, &beat.group);
                }
            }
        }
        let outputs = self.seat.handle(input, self.began.elapsed());
        if self.seat.is_led() {
            self.led.send_replace(Instant::now());
        }
        self.perform(outputs);
    }

    /// A node's heartbeat says where it is.
    fn meet(&mut self, node: &NodeId, group: &Group) {
        if *node == self.me.node {
            return;
        }
        let is_new = !self.known.contains_key(node) && !group.left;
        let leads = matches!(self.route, Some(Route::Lead(..)));
        let differs = !self.mixed && group.kind != self.me.kind;
        if is_new && differs && (leads || group.state == State::Leader) {
            let (its, ours) = (&group.kind, &self.me.kind);
            tracing::warn!(%node, %its, %ours, "nodes of another kind than the leader's stay outside: parallel.mixed");
        } else if is_new && leads && self.seat.newest().is_some_and(|roster| !roster.has(node)) {
            tracing::info!(%node, workers = group.workers, "a node waits to join: it can at the next checkpoint");
        }
        match group.address.parse() {
            Ok(address) => self.links.know(node.clone(), address, group.key.clone()),
            Err(_) => tracing::debug!(%node, address = group.address, "a node's address is not one"),
        }
        self.known.insert(node.clone(), group.clone());
    }

    /// The journal says where the members of the newest generation are.
    fn knows_the_roster(&self) {
        let state = self.journal.state();
        for entry in state.formed().iter().flat_map(|formed| &formed.roster) {
            let address = entry.address.as_ref().and_then(|address| address.parse().ok());
            if let (Some(address), Some(key)) = (address, &entry.key)
                && entry.node != self.me.node
                && !self.links.knows(&entry.node)
            {
                self.links.know(entry.node.clone(), address, key.clone());
            }
        }
    }

    fn hear(&mut self, event: PeerEvent<Words>) {
        match event {
            PeerEvent::Message { from, body: Words::Seat(body), .. } => self.give(Input::Message { from, body }),
            PeerEvent::Message { from, generation, body } => self.pass(from, generation, body),
            PeerEvent::Lost { peer, end } => {
                tracing::debug!(node = %peer, reason = %end, "link ended");
                let (refused, why) = (peers::is_gone(&end), end.to_string());
                if matches!(end, End::Version { .. }) && self.ends.get(&peer) != Some(&why) {
                    tracing::warn!("{why}: it stays outside");
                }
                self.ends.insert(peer.clone(), why);
                self.give(Input::Lost { peer, refused });
            }
            PeerEvent::Stranger => self.meet_strangers(),
        }
    }

    /// A message of a generation goes to the agent.
    fn pass(&mut self, from: NodeId, generation: Generation, words: Words) {
        match &self.route {
            Some(Route::Lead(current, to)) if *current == generation => {
                if let Words::ToLeader(said) = words {
                    let _ = to.send(group::Heard::Said(from, said));
                }
            }
            Some(Route::Follow(current, leader, to)) if *current == generation => {
                if let (Words::ToMember(said), true) = (words, from == *leader) {
                    let _ = to.send(follow::LeaderHeard::Said(said));
                }
            }
            route => {
                let current = route.as_ref().map_or(self.taken, Route::generation).max(self.taken);
                if generation > current && self.early.len() < EARLY {
                    self.early.push_back((from, generation, words));
                }
            }
        }
    }

    fn told(&mut self, tell: Tell) {
        match tell {
            Tell::Again => self.give(Input::Again { kills: 0 }),
            Tell::Leaving(nodes) => self.give(Input::Leaving(nodes)),
            Tell::Appended(stands) => {
                self.give(Input::Appended { stands });
                self.give(Input::Journal(Vec::new()));
            }
            Tell::Saved => self.give(Input::Saved),
            Tell::Fails(saves) => self.give(Input::Fails { saves }),
            Tell::HandOver(why) => self.give(Input::HandOver { why }),
            Tell::Route(route) => {
                let generation = route.generation();
                self.taken = generation;
                self.route = Some(route);
                self.catches_up(generation);
                for (from, of, words) in std::mem::take(&mut self.early) {
                    if of >= generation {
                        self.pass(from, of, words);
                    }
                }
            }
            Tell::Off => {
                self.route = None;
                self.give(Input::Busy(false));
            }
        }
    }

    /// What has happened to a generation while the runner prepared its part of it.
    fn catches_up(&mut self, generation: Generation) {
        if !self.seat.stands_in(generation) {
            return self.overtakes(Generation(u64::MAX));
        }
        let missing: Vec<NodeId> = self.seat.missing().cloned().collect();
        if let (Some(Route::Lead(_, to)), false) = (&self.route, missing.is_empty()) {
            for node in missing {
                let why = self.ends.get(&node).cloned().unwrap_or_else(|| "it did not come".to_owned());
                let _ = to.send(group::Heard::Parted(node, why));
            }
            self.give(Input::Busy(true));
        }
    }

    /// A task whose end is an input.
    fn ask(&mut self, request: impl Future<Output = Input> + Send + 'static) {
        let inputs = self.inputs.clone();
        self.tasks.spawn(async move {
            let _ = inputs.send(News::Input(request.await));
        });
    }

    /// Sends a message; of a node that nothing else names, the heartbeat says where it is.
    fn send(&mut self, to: NodeId, body: Body) {
        if to == self.me.node || self.links.knows(&to) {
            let generation = self.seat.newest().map_or(Generation(0), |roster| roster.generation);
            return self.links.send(&to, generation, Words::Seat(body));
        }
        let (run, inputs) = (self.run.clone(), self.inputs.clone());
        self.tasks.spawn(async move {
            let beat = heartbeat::read(&run, &to).await.ok().flatten();
            let _ = inputs.send(News::Found(to, beat.and_then(|beat| beat.group), body));
        });
    }

    fn found(&mut self, node: &NodeId, group: Option<Group>, body: Body) {
        if let Some(group) = group {
            self.meet(node, &group);
        }
        if self.links.knows(node) {
            self.send(node.clone(), body);
        } else {
            self.give(Input::Lost { peer: node.clone(), refused: false });
        }
    }

    /// Somebody with an unknown key knocked: its heartbeat is among those that were not read yet.
    fn meet_strangers(&mut self) {
        let (run, inputs, links) = (self.run.clone(), self.inputs.clone(), self.links.clone());
        self.tasks.spawn(async move {
            let Ok(listed) = listed(&run).await else { return };
            let mut met = Vec::new();
            for Listed { node, .. } in listed.into_iter().filter(|listed| !links.knows(&listed.node)) {
                if let Ok(Some(beat)) = heartbeat::read(&run, &node).await
                    && let Some(group) = beat.group
                {
                    met.push((node, group));
                }
            }
            let _ = inputs.send(News::Met(met));
        });
    }

    fn perform(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            self.perform_one(output);
        }
    }

    fn perform_one(&mut self, output: Output) {
        match output {
            Output::Say { role, left } => {
                let group = self.me.group(role, self.run.is_local(), Vec::new(), left);
                self.says.say(group);
            }
            Output::List => self.list(),
            Output::ReadBeats(nodes) => self.read_beats(nodes),
            Output::ReadJournal => {
                let journal = self.journal.clone();
                let inputs = self.inputs.clone();
                self.tasks.spawn(async move {
                    let read = journal.refresh().await;
                    let input = if read.is_ok() { Input::Journal(Vec::new()) } else { Input::Failed };
                    let _ = inputs.send(News::Input(input));
                });
            }
            Output::Form { formation, .. } if matches!(self.route, Some(Route::Lead(..))) => self.regroup(&formation),
            Output::Form { generation, formation, previous, ended, .. } => {
                let continues = previous.filter(|_| !ended);
                let proposal = self.proposal(generation, &formation, continues);
                let _ = self.calls.send(Call::Form(Box::new(proposal)));
            }
            Output::StepDown { generation } => _ = self.calls.send(Call::StepDown(generation)),
            Output::Bury(nodes) => {
                let run = self.run.clone();
                self.tasks.spawn(async move {
                    for node in nodes {
                        heartbeat::remove_stale(&run, &node).await;
                    }
                });
            }
            Output::Send { to, body } => self.send(to, body),
            Output::Probe { round, by, nodes } => {
                let (links, run) = (self.links.clone(), self.run.clone());
                self.ask(async move {
                    // Of a newcomer this node knows nothing yet: its heartbeat says where it is.
                    let strangers = nodes.iter().filter(|node| !links.knows(node)).cloned().collect();
                    let _ = tokio::time::timeout(PROBE, meet(&run, &links, strangers)).await;
                    let unreachable = links.unreachable(nodes, PROBE).await;
                    Input::Probed { round, by, unreachable }
                });
            }
            Output::After(pause, timer) => self.after(pause, timer),
            Output::Lead(roster) => _ = self.calls.send(Call::Lead(roster)),
            Output::Follow(roster) => {
                self.overtakes(roster.generation);
                let _ = self.calls.send(Call::Follow(roster));
            }
            Output::Wait => {
                self.overtakes(Generation(u64::MAX));
                let _ = self.calls.send(Call::Wait);
            }
            Output::Parted { node, why } => {
                let why = self.ends.get(&node).cloned().unwrap_or(why);
                if let Some(Route::Lead(_, to)) = &self.route {
                    let _ = to.send(group::Heard::Parted(node, why));
                    self.give(Input::Busy(true));
                }
            }
            Output::CutOff { why } => {
                if let Some(Route::Follow(_, leader, to)) = &self.route {
                    let why = self.ends.get(leader).cloned().unwrap_or(why);
                    let _ = to.send(follow::LeaderHeard::Parted(why));
                    self.give(Input::Busy(true));
                }
            }
            Output::LeftOut => {
                self.overtakes(Generation(u64::MAX));
                let _ = self.calls.send(Call::LeftOut);
            }
            Output::HandOver => {
                self.overtakes(Generation(u64::MAX));
                let _ = self.calls.send(Call::HandOver);
            }
            Output::Log(line) => tracing::debug!("{line}"),
        }
    }

    /// A generation that this node still runs is nobody's any more.
    fn overtakes(&mut self, newer: Generation) {
        match self.route.take_if(|route| route.generation() < newer) {
            Some(Route::Lead(_, to)) => _ = to.send(group::Heard::Overtaken),
            Some(Route::Follow(_, _, to)) => _ = to.send(follow::LeaderHeard::Overtaken),
            None => return,
        }
        // This node's workers are on their way out, until `Tell::Off`.
        self.give(Input::Busy(true));
    }

    /// Nodes can join while the generation is at work: it ends at a saved step first, and then the group forms anew.
    fn regroup(&mut self, formation: &Formation) {
        if let Some(Route::Lead(generation, to)) = &self.route
            && self.regrouped.replace(*generation) != Some(*generation)
        {
            let members = self.seat.newest().map(|roster| &roster.members);
            let is_new =
                |node: &NodeId| members.is_none_or(|members| members.iter().all(|member| member.node != *node));
            let nodes = formation.places.iter().map(|place| &place.member.node);
            let _ = to.send(group::Heard::Regroup(nodes.filter(|node| is_new(node)).cloned().collect()));
        }
        let _ = self.inputs.send(News::Input(Input::Appended { stands: Some(false) }));
    }

    fn after(&mut self, pause: Duration, timer: Timer) {
        self.ask(async move {
            tokio::time::sleep(pause).await;
            Input::Timer(timer)
        });
    }

    fn list(&mut self) {
        let run = self.run.clone();
        self.ask(async move { listed(&run).await.map_or(Input::Failed, Input::Listed) });
    }

    fn read_beats(&mut self, nodes: Vec<NodeId>) {
        let (run, began) = (self.run.clone(), self.began.elapsed());
        self.ask(async move {
            use futures::StreamExt;
            let read = |node: NodeId| {
                let run = &run;
                async move {
                    let found = heartbeat::read(run, &node).await;
                    (node, found)
                }
            };
            let found: Vec<_> = futures::stream::iter(nodes).map(read).buffered(SIDE_BY_SIDE).collect().await;
            let mut beats = Vec::with_capacity(found.len());
            for (node, found) in found {
                match found {
                    Ok(found) => {
                        let beat = found.and_then(|beat| Some(Beat { counter: beat.counter, group: beat.group? }));
                        beats.push((node, beat));
                    }
                    Err(error) => {
                        tracing::debug!(%node, %error, "a heartbeat could not be read");
                        return Input::Failed;
                    }
                }
            }
            Input::Beats { began, beats }
        });
    }

    /// A formation with the addresses and keys of its nodes.
    fn proposal(&self, generation: Generation, formation: &Formation, continues: Option<Roster>) -> Proposal {
        let state = self.journal.state();
        let entry = |place: &Place| {
            let node = place.member.node.clone();
            let (address, key) = match self.known.get(&node) {
                _ if node == self.me.node => (Some(self.me.address.to_string()), Some(self.me.key.clone())),
                Some(it) => (Some(it.address.clone()), Some(it.key.clone())),
                // A survivor whose heartbeat this node has never read.
                None => match state.formed().and_then(|formed| formed.member(&node)) {
                    Some(before) => (before.address.clone(), before.key.clone()),
                    None => (None, None),
                },
            };
            RosterEntry { node, workers: place.member.workers, first_rank: Some(place.first_rank), address, key }
        };
        Proposal {
            generation,
            roster: formation.places.iter().map(entry).collect(),
            out: formation.out.iter().map(left_out).collect(),
            continues,
        }
    }
}

/// A node that is left out, as the journal tells it.
fn left_out((node, why): &(NodeId, Why)) -> (NodeId, FormedReason, String) {
    let reason = if *why == Why::Left { FormedReason::NodeLeft } else { FormedReason::NodeLost };
    (node.clone(), reason, why.to_string())
}

/// Tells the links where these nodes are, as far as their heartbeats say so.
async fn meet(run: &Store, links: &Peers<Words>, nodes: Vec<NodeId>) {
    use futures::StreamExt;
    let read = |node: NodeId| async move { (heartbeat::read(run, &node).await, node) };
    let mut found = futures::stream::iter(nodes).map(read).buffer_unordered(SIDE_BY_SIDE);
    while let Some((beat, node)) = found.next().await {
        if let Some(group) = beat.ok().flatten().and_then(|beat| beat.group)
            && let Ok(address) = group.address.parse()
        {
            links.know(node, address, group.key);
        }
    }
}

/// The heartbeats in the store, with the times at which it took them.
async fn listed(run: &Store) -> Result<Vec<Listed>, StorageError> {
    let found = run.list(&format!("{}/", layout::NODES)).await?;
    let stamp =
        |object: &ObjectInfo| Some(Listed { node: layout::heartbeat_node(&object.key)?, stored: object.last_modified });
    Ok(found.iter().filter_map(stamp).collect())
}
