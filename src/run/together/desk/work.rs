//! The task of a desk: inputs to the seat, and what the seat wants done.

use std::time::Duration;

use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    Call, Myself, Proposal, Tell, Tools, Words,
    errands::{Errands, News},
    known::Known,
    post::{Post, Posted, Route},
};
use crate::{
    agent::group,
    ids::{Generation, NodeId},
    journal::{FormedReason, JournalWriter, RosterEntry},
    rendezvous::{
        channel::End,
        heartbeat::{Group, State, Voice},
        membership::Role,
        peers::{self, PeerEvent, Peers},
        policy::{
            Bounds, Member, Roster,
            growth::{self, Later, Prospects},
            roster::{Formation, Place, Why},
        },
        seat::{Body, Input, Me, Output, Seat, Sound},
    },
    run::together::read::Read,
};

/// Runs it until its handle is dropped.
pub(super) async fn run(
    tools: Tools,
    calls: mpsc::UnboundedSender<Call>,
    led: watch::Sender<Instant>,
    told: mpsc::UnboundedReceiver<Tell>,
) {
    let Tools { run, journal, me, bounds, links: (links, heard), says } = tools;
    let member = Member { node: me.node.clone(), workers: me.workers, kind: me.kind.clone() };
    let program = env!("CARGO_PKG_VERSION").to_owned();
    let (seat, first) = Seat::new(Me { member, program }, bounds, Sound, Duration::ZERO);
    let is_local = run.is_local();
    let (errands, given) = Errands::new(run, journal.clone(), links.clone());
    let work = Work {
        journal,
        me,
        is_local,
        links,
        says,
        seat,
        began: Instant::now(),
        calls,
        errands,
        known: Known::default(),
        read: Read::default(),
        post: Post::default(),
        led,
        regrouped: None,
        puts_off: None,
        bounds,
    };
    work.run(first, heard, told, given).await;
}

struct Work {
    journal: JournalWriter,
    me: Myself,
    /// The store is on this machine.
    is_local: bool,
    links: Peers<Words>,
    says: Voice,
    seat: Seat<Sound>,
    began: Instant,
    calls: mpsc::UnboundedSender<Call>,
    errands: Errands,
    known: Known,
    read: Read,
    post: Post,
    /// When a leader was last known to be at work.
    led: watch::Sender<Instant>,
    /// The generation that has been asked to end because nodes wait to join.
    regrouped: Option<Generation>,
    /// Why nodes that wait don't join now.
    puts_off: Option<Later>,
    /// The operator's settings.
    bounds: Bounds,
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
                true = self.errands.forget() => {}
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
        let is_new = self.known.get(node).is_none() && !group.left;
        let leads = self.post.leads();
        let differs = !self.bounds.mixed && group.kind != self.me.kind;
        // Before there is a leader, each says so of the other: nobody knows yet who stays outside.
        let concerns = leads || group.state == State::Leader || !self.seat.is_led();
        if is_new && differs && concerns {
            if self.known.is_new_kind(&group.kind) {
                let (its, ours) = (&group.kind, &self.me.kind);
                let rule = "nodes of another kind than the leader's stay outside: parallel.mixed";
                tracing::warn!(%node, %its, %ours, "{rule}");
            }
        } else if is_new && leads && self.seat.newest().is_some_and(|roster| !roster.has(node)) {
            tracing::info!(%node, workers = group.workers, "a node waits to join: it can at the next checkpoint");
        }
        match group.address.parse() {
            Ok(address) => self.links.know(node.clone(), address, group.key.clone()),
            Err(_) => tracing::debug!(%node, address = group.address, "a node's address is not one"),
        }
        for forgotten in self.known.meet(node, group) {
            self.links.forget(&forgotten);
        }
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
                if self.known.ended(&peer, why.clone()) && matches!(end, End::Version { .. }) {
                    tracing::warn!("{why}: it stays outside");
                }
                self.give(Input::Lost { peer, refused });
            }
            PeerEvent::Stranger => self.errands.meet_strangers(),
        }
    }

    /// A message of a generation goes to the agent, or waits until this node takes that generation up.
    fn pass(&mut self, from: NodeId, generation: Generation, words: Words) {
        if self.post.pass(from.clone(), generation, words) == Posted::TooMany {
            tracing::warn!(node = %from, "a node sends too many messages of a generation that does not stand here");
            self.links.part(&from);
            self.give(Input::Lost { peer: from, refused: false });
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
            Tell::Saved(prospects) => {
                if self.takes_up_others(&prospects) {
                    self.give(Input::Saved);
                }
            }
            Tell::Fails(saves) => self.give(Input::Fails { saves }),
            Tell::HandOver(why) => self.give(Input::HandOver { why }),
            Tell::Route(route) => {
                let generation = self.post.takes(route);
                self.catches_up(generation);
                self.post.catches_up();
            }
            Tell::Off => {
                self.post.ends();
                self.give(Input::Busy(false));
            }
        }
    }

    /// Whether nodes that wait may join now. If not, this node's heartbeat says why.
    fn takes_up_others(&mut self, prospects: &Prospects) -> bool {
        let Some(roster) = self.seat.newest() else { return true };
        let room = usize::try_from(self.bounds.max).unwrap_or(usize::MAX).saturating_sub(roster.members.len());
        let waiting = self.seat.outside().filter_map(|node| self.known.get(node));
        let fits = waiting.filter(|group| self.bounds.mixed || group.kind == self.me.kind);
        let more: u64 = fits.take(room).map(|group| u64::from(group.workers)).sum();
        let grows = if more == 0 { Ok(()) } else { growth::grow(roster.workers(), more, prospects) };
        let why = grows.as_ref().err().map(|(why, _)| *why);
        if self.puts_off != why {
            self.puts_off = why;
            if let Err((_, figures)) = &grows {
                tracing::info!("nodes that wait join later: {figures}");
            }
            let group = self.me.group(Role::Leader, self.is_local, Vec::new(), false);
            self.says.say(Group { puts_off: why.map(|why| why.to_string()), ..group });
        }
        grows.is_ok()
    }

    /// What has happened to a generation while the runner prepared its part of it.
    fn catches_up(&mut self, generation: Generation) {
        if !self.seat.stands_in(generation) {
            return self.overtakes(Generation(u64::MAX));
        }
        let missing: Vec<NodeId> = self.seat.missing().cloned().collect();
        let mut parted = false;
        for node in missing {
            let why = self.known.end(&node).cloned().unwrap_or_else(|| "it did not come".to_owned());
            parted |= self.post.parted(node, why);
        }
        if parted {
            self.give(Input::Busy(true));
        }
    }

    /// Sends a message; of a node that nothing else names, the heartbeat says where it is.
    fn send(&mut self, to: NodeId, body: Body) {
        if to == self.me.node || self.links.knows(&to) {
            let generation = self.seat.newest().map_or(Generation(0), |roster| roster.generation);
            return self.links.send(&to, generation, Words::Seat(body));
        }
        self.errands.find(to, body);
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

    fn perform(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            self.perform_one(output);
        }
    }

    fn perform_one(&mut self, output: Output) {
        match output {
            Output::Say { role, left } => {
                self.puts_off = None;
                let group = self.me.group(role, self.is_local, Vec::new(), left);
                self.says.say(group);
            }
            Output::List => self.errands.list(),
            Output::ReadBeats(nodes) => self.errands.read_beats(nodes, self.began.elapsed()),
            Output::ReadJournal => self.errands.read_journal(),
            Output::Form { formation, .. } if self.post.leads() => self.regroup(&formation),
            Output::Form { generation, formation, previous, ended, .. } => {
                let continues = previous.filter(|_| !ended);
                let proposal = self.proposal(generation, &formation, continues);
                let _ = self.calls.send(Call::Form(Box::new(proposal)));
            }
            Output::StepDown { generation } => _ = self.calls.send(Call::StepDown(generation)),
            Output::Bury(nodes) => self.errands.bury(nodes),
            Output::Send { to, body } => self.send(to, body),
            Output::Probe { round, by, nodes } => self.errands.probe(round, by, nodes),
            Output::After(pause, timer) => self.errands.later(pause, Input::Timer(timer)),
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
                let why = self.known.end(&node).cloned().unwrap_or(why);
                if self.post.parted(node, why) {
                    self.give(Input::Busy(true));
                }
            }
            Output::CutOff { why } => {
                if self.post.cut_off(|leader| self.known.end(leader).cloned().unwrap_or(why)) {
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
        if !self.post.overtakes(newer) {
            return;
        }
        // This node's workers are on their way out, until `Tell::Off`.
        self.give(Input::Busy(true));
    }

    /// Nodes can join while the generation is at work: it ends at a saved step first, and then the group forms anew.
    fn regroup(&mut self, formation: &Formation) {
        if let Some(Route::Lead(generation, to)) = self.post.route()
            && self.regrouped.replace(*generation) != Some(*generation)
        {
            let members = self.seat.newest().map(|roster| &roster.members);
            let is_new =
                |node: &NodeId| members.is_none_or(|members| members.iter().all(|member| member.node != *node));
            let nodes = formation.places.iter().map(|place| &place.member.node);
            let _ = to.send(group::Heard::Regroup(nodes.filter(|node| is_new(node)).cloned().collect()));
        }
        self.errands.says(Input::Appended { stands: Some(false) });
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
