//! The loop of one simulated agent around the real policy: it looks, asks, decides by `rendezvous`, and appends.

use std::{collections::BTreeSet, rc::Rc, time::Duration};

use jiff::Timestamp;
use trainer::{
    ids::{Generation, NodeId, NodeKey},
    rendezvous::{
        cost::FENCE,
        heartbeat::{Group, PATIENCE, State},
        membership::{
            self, FOLLOWER_JOURNAL, Judged, LOOK, Listed, Role, URGENT_LOOK, beat_every, judge, list_every, may_bury,
            may_live,
        },
        policy::{
            Member, Roster,
            ending::{Ending, Present, Wait, give_up},
            roster::{Answers, Candidate, Composed, Formation, compose, may_grow},
            succession::{
                self, ANSWER, Answer, Asked, Bereaved, CONFIRM, Candidacy, GoOn, Ground, Heir, Leader, Opening,
                PROMISE, TakeOver, Turn, VOUCH, YIELD, go_on, may_take_over, who_proposes,
            },
        },
    },
};

use super::world::{
    Beat, Body, Bug, COMMIT, Done, Event, Formed, Host, JOIN, Machine, Ms, Node, Op, Phase, Purpose, Record, Round,
    SILENCE, Sim,
};

const PROGRAM: &str = "trainer 1";

fn ms(duration: Duration) -> Ms {
    duration.as_millis() as Ms
}

fn secs(ms: Ms) -> Duration {
    Duration::from_millis(ms)
}

/// The store stamps objects in whole seconds.
fn stamp(at: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + at.div_euclid(1000)).unwrap()
}

impl Sim {
    fn me(&self, host: Host) -> &Machine {
        &self.hosts[host]
    }

    fn my(&mut self, host: Host) -> &mut Machine {
        &mut self.hosts[host]
    }

    fn node_id(&self, node: Node) -> &NodeId {
        &self.nodes[node]
    }

    fn ids(&self, nodes: impl IntoIterator<Item = Node>) -> BTreeSet<NodeId> {
        nodes.into_iter().map(|node| self.nodes[node].clone()).collect()
    }

    fn candidate(&self, node: Node, unreachable: BTreeSet<NodeId>) -> Candidate {
        let member = Member {
            node: self.nodes[node].clone(),
            workers: self.hosts[self.owner[node]].workers,
            kind: "A100".into(),
        };
        Candidate { member, program: PROGRAM.into(), unreachable, kills: 0, failed_saves: 0 }
    }

    fn role(&self, host: Host) -> Role {
        match self.me(host).phase {
            Phase::Leader => Role::Leader,
            Phase::Follower | Phase::Lost => Role::Follower,
            Phase::Outside => Role::Waiting,
        }
    }

    pub fn start(&mut self, host: Host) {
        let old = self.me(host).node;
        let (life, now) = (self.me(host).life + 1, self.now);
        let before = self.me(host);
        let fresh = Machine { up: true, life, store: before.store, ..Machine::new(before.workers, before.skew) };
        self.hosts[host] = fresh;
        self.my(host).waiting_since = now;
        self.rename(host);
        if old != Node::MAX {
            // Whoever still holds a connection to the old process learns that it is gone.
            for peer in 0..self.hosts.len() {
                if peer != host && self.linked(host, peer) {
                    self.after(peer, 5, Event::Lost { peer: old, refused: true });
                }
            }
        }
        self.beat(host, false);
        self.ask(host, Op::Journal);
        self.restart_timers(host);
    }

    fn restart_timers(&mut self, host: Host) {
        self.my(host).epoch += 1;
        let epoch = self.me(host).epoch;
        let every = ms(beat_every(self.role(host), false));
        self.after(host, every, Event::Beat { epoch });
        self.after(host, 300, Event::Look { epoch });
    }

    fn beat(&mut self, host: Host, left: bool) {
        self.my(host).counter += 1;
        let role = self.role(host);
        let every_s = beat_every(role, false).as_secs() as u32;
        let me = self.me(host);
        let beat = Beat { counter: me.counter, landed: 0, before: [0; 4], role, every_s, left };
        let node = me.node;
        self.ask(host, Op::Beat { node, beat });
    }

    pub fn handle(&mut self, host: Host, event: Event) {
        match event {
            Event::Beat { epoch } if epoch == self.me(host).epoch => {
                self.beat(host, false);
                let every = ms(beat_every(self.role(host), false));
                self.after(host, every, Event::Beat { epoch });
            }
            Event::Look { epoch } if epoch == self.me(host).epoch => {
                let pause = self.look(host);
                self.after(host, pause, Event::Look { epoch });
            }
            Event::Beat { .. } | Event::Look { .. } | Event::Land(_) => {}
            Event::Think => self.think(host),
            Event::Done(done) => self.done(host, done),
            Event::Message { to, from, body } if to == self.me(host).node => self.message(host, from, body),
            Event::Message { .. } => {}
            Event::Lost { peer, refused } => self.lost(host, peer, refused),
            Event::RoundOver { round } => {
                if self.me(host).round.as_ref().is_some_and(|open| open.id == round) {
                    self.round_over(host);
                }
            }
            Event::JoinBy { generation } => {
                if self.leads(host, generation) {
                    let me = self.me(host);
                    let members = me.newest.as_ref().map(|it| it.members.clone()).unwrap_or_default();
                    let late = members.into_iter().filter(|it| !me.touch.contains(it)).collect::<Vec<_>>();
                    if !late.is_empty() {
                        self.my(host).lost.extend(late);
                        self.my(host).lost_at = self.now;
                        self.think(host);
                    }
                }
            }
            Event::WelcomeBy { generation } => {
                let me = self.me(host);
                if let Some(newest) = me.newest.as_ref().filter(|it| it.roster.generation == generation) {
                    let leader = newest.members[0];
                    if me.phase == Phase::Follower && me.touch.is_empty() {
                        self.lost(host, leader, false);
                    }
                }
            }
            Event::Commit { generation } => self.commit(host, generation),
            Event::Vouch => {
                let leader = self.me(host).newest.as_ref().map(|formed| formed.members[0]);
                if let Some(leader) = leader.filter(|it| !self.answers(host, *it)) {
                    self.lost(host, leader, false);
                }
                self.answer_pending(host);
            }
            Event::Append { at, record } => self.ask(host, Op::Append { at, record }),
        }
    }

    fn leads(&self, host: Host, generation: Generation) -> bool {
        let me = self.me(host);
        me.phase == Phase::Leader && me.newest.as_ref().is_some_and(|it| it.roster.generation == generation)
    }

    // What a node looks at.

    fn look(&mut self, host: Host) -> Ms {
        let me = self.me(host);
        let leader = me.newest.as_ref().filter(|_| !me.ended).map(|formed| formed.members[0]);
        let waited = secs(self.now - me.waiting_since);
        let may_propose = me.live.iter().take(succession::PROPOSERS).any(|node| *node == me.node) || me.live.is_empty();
        let full = me.newest.as_ref().is_some_and(|it| it.members.len() >= self.bounds.max as usize);
        // A member that found too few others looks for newcomers.
        let lost = me.phase == Phase::Lost && me.failed > 0;
        let role = if lost { Role::Waiting } else { self.role(host) };
        let every = list_every(role, may_propose && (leader.is_none() || lost), full, waited);
        let due = |at: Option<Ms>, every: Duration| at.is_none_or(|at| self.now >= at + ms(every));
        let list = every.is_some_and(|every| due(me.listed_at, every));
        let journal = due(Some(me.journal_at), FOLLOWER_JOURNAL);
        let (phase, me_suspects) = (me.phase, me.listed_dead);
        if list {
            // The first list follows the first beat. Later, one's own beat may be old: then others look younger.
            self.my(host).listed_at = Some(self.now);
            self.ask(host, Op::List);
        }
        match phase {
            Phase::Leader => {
                self.requests.head += 1;
                self.ask(host, Op::Journal);
                // A record that the store did not take is tried again.
                self.think(host);
                ms(FENCE)
            }
            Phase::Follower => {
                if journal {
                    self.ask(host, Op::Journal);
                }
                ms(LOOK)
            }
            Phase::Lost => {
                self.ask(host, Op::Journal);
                self.ask(host, Op::Beats(leader.into_iter().collect()));
                self.think(host);
                ms(URGENT_LOOK)
            }
            Phase::Outside => {
                if leader.is_none() || journal {
                    self.ask(host, Op::Journal);
                }
                if let Some(leader) = leader {
                    self.ask(host, Op::Beats(vec![leader]));
                }
                self.think(host);
                if leader.is_some() {
                    ms(if me_suspects { URGENT_LOOK } else { LOOK })
                } else {
                    every.map_or(ms(LOOK), ms).min(ms(LOOK))
                }
            }
        }
    }

    fn done(&mut self, host: Host, done: Done) {
        match done {
            Done::Nothing => {}
            Done::Failed => {}
            Done::Journal { len } => {
                self.my(host).journal_at = self.now;
                self.sync(host, len);
                self.answer_pending(host);
                self.think(host);
            }
            Done::Listed(list) => self.listed(host, &list),
            Done::Beats { began, beats } => {
                for (node, beat) in beats {
                    self.saw(host, began, node, beat);
                }
                self.think(host);
            }
            Done::Appended { record, stands } => self.appended(host, &record, stands),
        }
    }

    fn saw(&mut self, host: Host, began: Ms, node: Node, beat: Option<Beat>) {
        let (now, bug) = (self.now, self.bug);
        let me = self.my(host);
        if me.newest.as_ref().filter(|_| !me.ended).is_none_or(|formed| formed.members[0] != node) {
            return;
        }
        if me.watched != Some(node) {
            (me.watch, me.watched) = (membership::Watch::default(), Some(node));
        }
        me.watch.saw(secs(began), beat.map(|beat| beat.counter));
        me.seen_at = began;
        me.leader_left |= beat.is_some_and(|beat| beat.left);
        if bug == Bug::BuryFirst && beat.is_none() {
            me.leader_left = true;
        }
        // It no longer leads, or is dead: the journal says what came after it.
        let stale = beat.is_none_or(|beat| beat.left || beat.role != Role::Leader) || me.watch.still() >= PATIENCE;
        if me.phase == Phase::Outside && stale && now > me.journal_at + 5_000 {
            me.journal_at = now;
            self.ask(host, Op::Journal);
        }
    }

    fn group(beat: &Beat) -> Group {
        Group {
            address: String::new(),
            key: NodeKey::new("00".repeat(32)).unwrap(),
            every_s: beat.every_s,
            state: State::Waiting,
            kind: String::new(),
            workers: 1,
            unreachable: Vec::new(),
            left: beat.left,
        }
    }

    /// The judgement of a listed node, from its heartbeat: a GET.
    fn judged(&mut self, host: Host, own: Ms, node: Node) -> Judged {
        self.requests.get += 1;
        let Some(beat) = self.beats.get(&node) else { return Judged::Dead };
        let own = match self.bug {
            Bug::Clocks => stamp(self.now as i64 + self.me(host).skew),
            _ => stamp(own as i64),
        };
        judge(own, stamp(beat.landed as i64), &Self::group(beat)).0
    }

    fn listed(&mut self, host: Host, list: &[(Node, Ms)]) {
        let me = self.me(host).node;
        let Some(own) = list.iter().find(|(node, _)| *node == me).map(|(_, at)| *at) else { return };
        let stamps: Vec<Listed> = list
            .iter()
            .map(|(node, at)| Listed { node: self.nodes[*node].clone(), stored: stamp(*at as i64) })
            .collect();
        let mut live: Vec<Node> = may_live(&stamps, &self.nodes[me]).iter().map(|id| self.by_id[id]).collect();
        if self.me(host).phase == Phase::Leader {
            let known: BTreeSet<Node> = live.iter().copied().collect();
            let dead: Vec<Node> = list.iter().map(|(node, _)| *node).filter(|node| !known.contains(node)).collect();
            self.bury(host, own, &dead);
            let before: BTreeSet<Node> = self.me(host).live.iter().copied().collect();
            self.requests.get += live.iter().filter(|node| !before.contains(node)).count() as u64;
        } else {
            let dead = self.read_the_lowest(host, own, &live);
            live.retain(|node| !dead.contains(node));
        }
        let min = self.bounds.min as usize;
        let now = self.now;
        let machine = self.my(host);
        let live: Vec<Node> = live.into_iter().filter(|node| !machine.gone.contains(node)).collect();
        let known: BTreeSet<Node> = machine.live.iter().copied().collect();
        if live.iter().any(|node| !known.contains(node)) {
            (machine.newcomer_at, machine.failed) = (now, 0);
        }
        machine.live = live;
        machine.enough_at = if machine.live.len() >= min { machine.enough_at.or(Some(now)) } else { None };
        // A node that comes while a leader may be dead sees it in the same list.
        let leader = machine.newest.as_ref().filter(|_| !machine.ended).map(|formed| formed.members[0]);
        if let Some(leader) = leader.filter(|_| machine.phase == Phase::Outside) {
            self.my(host).seen_at = now;
            match self.judged(host, own, leader) {
                Judged::Alive => self.my(host).listed_dead = false,
                Judged::Left => self.my(host).leader_left = true,
                Judged::Dead => self.my(host).listed_dead |= self.beats.contains_key(&leader),
            }
        }
        self.think(host);
    }

    /// Reads nodes in the order of their ids until enough of them are alive; returns the dead ones.
    fn read_the_lowest(&mut self, host: Host, own: Ms, live: &[Node]) -> BTreeSet<Node> {
        let (me, mut found, mut dead) = (self.me(host).node, 0, BTreeSet::new());
        for node in live {
            if found >= succession::PROPOSERS || *node == me {
                break;
            }
            if self.me(host).gone.contains(node) {
                continue;
            }
            match self.judged(host, own, *node) {
                Judged::Alive => found += 1,
                Judged::Dead => {
                    dead.insert(*node);
                }
                Judged::Left => {
                    self.my(host).gone.insert(*node);
                }
            }
        }
        dead
    }

    fn bury(&mut self, host: Host, own: Ms, dead: &[Node]) {
        let Some(formed) = self.me(host).newest.clone() else { return };
        let mut buried = Vec::new();
        for node in dead {
            let judged = self.judged(host, own, *node);
            if may_bury(&self.id(host), &self.nodes[*node], &formed.roster, judged).0 {
                buried.push(*node);
            }
        }
        if !buried.is_empty() {
            self.ask(host, Op::Bury(buried));
        }
    }

    // What a node reads in the journal.

    fn sync(&mut self, host: Host, len: usize) {
        let before = self.me(host).newest.as_ref().map(|formed| formed.roster.generation);
        let ended = self.me(host).ended;
        while self.me(host).read < len {
            let record = self.journal[self.me(host).read].clone();
            let me = self.my(host);
            me.read += 1;
            match record {
                Record::Formed(formed) => (me.newest, me.ended) = (Some(formed), false),
                Record::Interrupted(_) => me.ended = true,
                Record::Committed(_) => {}
            }
        }
        let Some(newest) = self.me(host).newest.clone() else { return };
        let generation = newest.roster.generation;
        let closes = before != Some(generation) && newest.members[0] != self.me(host).node || self.me(host).ended;
        if closes && self.me(host).phase == Phase::Leader {
            self.over(host);
        }
        if before != Some(generation) {
            self.my(host).forget();
            let node = self.me(host).node;
            if self.me(host).ended {
                self.wait(host);
            } else if newest.members[0] == node {
                self.lead(host, &newest);
            } else if newest.members.contains(&node) {
                self.say(host, |_| format!("follows in generation {generation}"));
                self.my(host).phase = Phase::Follower;
                self.restart_timers(host);
                self.send(host, newest.members[0], Body::Hello(generation));
                self.after(host, SILENCE, Event::WelcomeBy { generation });
            } else if self.me(host).phase != Phase::Outside {
                self.leave_out(host);
            } else {
                self.wait(host);
            }
        } else if self.me(host).ended && !ended && self.me(host).phase != Phase::Outside {
            self.my(host).forget();
            self.wait(host);
        }
    }

    /// A newer generation stands without this node: it comes back as another one.
    fn leave_out(&mut self, host: Host) {
        self.say(host, |_| "is left out".into());
        self.beat(host, true);
        self.rename(host);
        self.wait(host);
        self.beat(host, false);
    }

    fn wait(&mut self, host: Host) {
        let now = self.now;
        let me = self.my(host);
        me.phase = Phase::Outside;
        (me.waiting_since, me.enough_at, me.listed_at) = (now, None, None);
        me.live.clear();
        self.restart_timers(host);
    }

    fn over(&mut self, host: Host) {
        let me = self.me(host).node;
        for node in std::mem::replace(&mut self.my(host).touch, BTreeSet::from([me])) {
            if node != me {
                self.send(host, node, Body::Over);
            }
        }
    }

    fn lead(&mut self, host: Host, formed: &Formed) {
        let generation = formed.roster.generation;
        self.say(host, |sim| {
            let names: Vec<String> = formed.members.iter().map(|node| sim.owner[*node].to_string()).collect();
            format!("leads generation {generation} of {}", names.join(" "))
        });
        let now = self.now;
        let me = self.my(host);
        me.phase = Phase::Leader;
        me.listed_at = Some(now);
        me.touch = BTreeSet::from([me.node]);
        self.beat(host, false);
        self.restart_timers(host);
        for node in &formed.members[1..] {
            self.send(host, *node, Body::Formed);
        }
        self.after(host, JOIN, Event::JoinBy { generation });
        self.after(host, COMMIT, Event::Commit { generation });
    }

    // The channel.

    fn message(&mut self, host: Host, from: Node, body: Body) {
        self.messages += u64::from(!matches!(body, Body::Invite { .. } | Body::Formed));
        match body {
            Body::Invite { round, generation, asked } => self.invited(host, from, round, generation, asked, true),
            Body::Ready { round, unreachable } => {
                let candidate = self.candidate(from, unreachable);
                self.replied(host, round, from, |open| open.ready.push(candidate));
            }
            Body::No { round, leader_lives } => {
                self.replied(host, round, from, |open| open.vouched = open.vouched.or(leader_lives.then_some(from)));
            }
            Body::Refused { round } => {
                self.my(host).gone.insert(from);
                self.replied(host, round, from, |open| {
                    open.refused.insert(from);
                });
            }
            Body::Formed => self.ask(host, Op::Journal),
            // A connection that broke while this machine was stopped.
            Body::Hello(_) if !self.linked(host, self.owner[from]) => {}
            Body::Hello(generation) if self.is_behind(host, generation) => {
                // Its own record stands, and it has not read that yet.
                self.ask(host, Op::Journal);
                let to = self.me(host).node;
                self.after(host, 200, Event::Message { to, from, body });
            }
            Body::Hello(generation) => {
                let leads = self.leads(host, generation);
                self.send(host, from, if leads { Body::Welcome(generation) } else { Body::Over });
                if leads {
                    self.my(host).touch.insert(from);
                    self.my(host).lost.remove(&from);
                }
            }
            Body::Welcome(generation) => {
                let me = self.my(host);
                if me.phase == Phase::Follower
                    && me.newest.as_ref().is_some_and(|it| it.roster.generation == generation)
                {
                    me.touch.insert(from);
                } else {
                    // It has closed this connection long ago.
                    self.send(host, from, Body::Bye);
                }
            }
            Body::Bye => self.lost(host, from, false),
            Body::Release => {
                let me = self.my(host);
                me.promised = me.promised.filter(|(node, _)| *node != from);
            }
            Body::Over => {
                // The journal may say why. The node itself may live on.
                self.ask(host, Op::Journal);
                self.after(host, 200, Event::Lost { peer: from, refused: false });
            }
        }
    }

    /// Whether `node` answers a ping.
    fn answers(&self, host: Host, node: Node) -> bool {
        let other = self.owner[node];
        self.healthy(host, other) && self.hosts[other].node == node
    }

    /// Whoever asked first is answered first.
    fn answer_pending(&mut self, host: Host) {
        for (from, round, generation, asked) in std::mem::take(&mut self.my(host).pending) {
            self.invited(host, from, round, generation, asked, false);
        }
    }

    fn is_behind(&self, host: Host, generation: Generation) -> bool {
        self.me(host).newest.as_ref().is_none_or(|formed| formed.roster.generation < generation)
    }

    fn lost(&mut self, host: Host, peer: Node, refused: bool) {
        let now = self.now;
        let me = self.my(host);
        if refused {
            me.gone.insert(peer);
        }
        let Some(newest) = me.newest.clone().filter(|_| !me.ended) else { return };
        match me.phase {
            Phase::Leader if newest.members.contains(&peer) && peer != me.node => {
                me.touch.remove(&peer);
                if me.lost.is_empty() {
                    me.lost_at = now;
                }
                me.lost.insert(peer);
                self.think(host);
            }
            Phase::Follower if newest.members[0] == peer => {
                self.say(host, |_| format!("lost its leader, refused: {refused}"));
                let me = self.my(host);
                me.touch.clear();
                (me.phase, me.lost_at, me.failed, me.held_back) = (Phase::Lost, now, 0, false);
                me.leader_refused = refused;
                self.restart_timers(host);
                self.answer_pending(host);
                self.think(host);
            }
            Phase::Lost if newest.members[0] == peer && refused => {
                (me.leader_refused, me.held_back) = (true, false);
                self.think(host);
            }
            _ => {}
        }
    }

    fn invited(
        &mut self,
        host: Host,
        from: Node,
        round: u64,
        generation: Generation,
        asked: Rc<Vec<Node>>,
        may_read: bool,
    ) {
        let now = self.now;
        let me = self.me(host);
        // A follower asks its leader before it vouches for it.
        let leader = me.newest.as_ref().map(|formed| formed.members[0]).filter(|_| me.phase == Phase::Follower);
        if let Some(leader) = leader.filter(|it| *it != from && !me.touch.is_empty() && !self.answers(host, *it)) {
            let pause = if self.linked(host, self.owner[leader]) { 2 } else { ms(VOUCH) };
            self.my(host).pending.push((from, round, generation, asked));
            return self.after(host, pause, Event::Vouch);
        }
        let promised = me.promised.filter(|(_, until)| *until > now).map(|(node, _)| node);
        let view = Asked {
            generation,
            by: self.node_id(from),
            program: PROGRAM,
            own_program: PROGRAM,
            newest: me.newest.as_ref().map(|formed| &*formed.roster),
            ended: me.ended,
            in_touch: me.phase == Phase::Leader || me.phase == Phase::Follower && !me.touch.is_empty(),
            promised: promised.map(|node| self.node_id(node)),
        };
        let (answer, _) = succession::answer(&view);
        match answer {
            Answer::Ready => {
                let owner = self.owner[from];
                let others = asked.iter().map(|node| self.owner[*node]).filter(|other| *other != owner);
                let unreachable: BTreeSet<NodeId> =
                    others.filter(|other| !self.linked(host, *other)).map(|other| self.id(other)).collect();
                let me = self.my(host);
                me.promised = Some((from, now + ms(PROMISE)));
                self.after(host, ms(PROMISE), Event::Think);
                self.send(host, from, Body::Ready { round, unreachable });
            }
            Answer::ReadOn if may_read => {
                self.my(host).pending.push((from, round, generation, asked));
                self.ask(host, Op::Journal);
            }
            answer => {
                let leader_lives = answer == Answer::LeaderLives;
                self.send(host, from, Body::No { round, leader_lives });
            }
        }
    }

    // Proposals.

    fn ask_all(&mut self, host: Host, purpose: Purpose, nodes: BTreeSet<Node>) {
        self.rounds += 1;
        let (id, me) = (self.rounds, self.me(host));
        let generation = me.newest.as_ref().map_or(Generation(1), |formed| formed.roster.generation.next());
        let node = me.node;
        let open: BTreeSet<Node> = nodes.into_iter().filter(|it| *it != node && !me.gone.contains(it)).collect();
        self.say(host, |sim| {
            let names: Vec<String> = open.iter().map(|node| sim.owner[*node].to_string()).collect();
            format!("proposes generation {generation} ({purpose:?}) to {}", names.join(" "))
        });
        let asked = Rc::new(open.iter().copied().chain([node]).collect::<Vec<_>>());
        let refused = BTreeSet::new();
        let at = self.now;
        let round =
            Round { id, at, generation, purpose, open: open.clone(), ready: Vec::new(), vouched: None, refused };
        self.my(host).round = Some(round);
        for node in open {
            self.send(host, node, Body::Invite { round: id, generation, asked: asked.clone() });
        }
        self.after(host, ms(ANSWER), Event::RoundOver { round: id });
        self.check_answers(host);
    }

    fn replied(&mut self, host: Host, round: u64, from: Node, apply: impl FnOnce(&mut Round)) {
        if let Some(open) = self.my(host).round.as_mut().filter(|open| open.id == round) {
            open.open.remove(&from);
            apply(open);
            self.check_answers(host);
        }
    }

    fn check_answers(&mut self, host: Host) {
        let me = self.me(host);
        // A leader that is silent is not waited for if the others are enough.
        let leader = me.newest.as_ref().filter(|_| !me.ended).map(|formed| formed.members[0]);
        let Some(round) = &me.round else { return };
        let only_leader = round.open.iter().all(|node| Some(*node) == leader);
        let enough = round.open.is_empty()
            || only_leader && {
                let behind = self.behind(host, round);
                let roster = &me.newest.as_ref().unwrap().roster;
                roster.workers_of(&behind) * 2 > roster.workers()
            };
        if enough {
            self.round_over(host);
        }
    }

    fn behind(&self, host: Host, round: &Round) -> BTreeSet<NodeId> {
        round.ready.iter().map(|it| it.member.node.clone()).chain([self.id(host)]).collect()
    }

    fn failed(&mut self, host: Host) {
        let now = self.now;
        let me = self.my(host);
        me.failed += 1;
        me.failed_at = now;
    }

    fn round_over(&mut self, host: Host) {
        let Some(round) = self.my(host).round.take() else { return };
        let me = self.me(host);
        let newest = me.newest.clone();
        // Another generation came meanwhile, or this one ended.
        if newest.as_ref().map_or(Generation(1), |formed| formed.roster.generation.next()) != round.generation {
            return;
        }
        let behind = self.behind(host, &round);
        let open = newest.as_ref().filter(|_| !me.ended);
        if let Some(formed) = open.filter(|_| round.purpose == Purpose::Form) {
            let leader = Leader {
                refused: me.leader_refused || round.refused.contains(&formed.members[0]),
                left: me.leader_left,
                still: me.watch.still(),
                listed_dead: me.listed_dead,
                seen: secs(self.now - me.seen_at),
            };
            let asked = secs(self.now - round.at);
            let me = self.id(host);
            let vouched = round.vouched.map(|node| self.node_id(node));
            let heir = Heir { roster: &formed.roster, me: &me, behind: &behind, leader, vouched, asked };
            let (next, why) = self.take_over(&heir);
            self.say(host, |_| format!("{next:?}: {why}"));
            if next == TakeOver::Wait {
                let me = self.my(host);
                (me.held_back, me.listed_dead) = (true, false);
                if me.phase == Phase::Outside {
                    me.watch = membership::Watch::default();
                }
                return self.failed(host);
            }
            self.check_take_over(host, formed);
        }
        if let Some(formed) = open.filter(|_| round.purpose == Purpose::Reform) {
            let formed = formed.clone();
            let ready: BTreeSet<Node> = round.ready.iter().map(|it| self.by_id[&it.member.node]).collect();
            let me = self.my(host);
            let node = me.node;
            me.touch.retain(|it| *it == node || ready.contains(it));
            me.lost.extend(formed.members.iter().filter(|it| **it != node && !ready.contains(it)));
            let nodes = ready.len() as u32 + 1;
            match self.go_on(host, &formed, &behind, nodes) {
                GoOn::Reform => {}
                GoOn::Yield(pause) => return self.after(host, ms(pause) + 1, Event::Think),
                GoOn::StepDown => return self.step_down(host),
            }
        }
        let own = self.candidate(self.me(host).node, BTreeSet::new());
        let answers = Answers { proposer: &own, ready: &round.ready, previous: newest.as_ref().map(|it| &*it.roster) };
        let (composed, why) = compose(&answers, self.bounds);
        self.say(host, |_| why);
        match composed {
            Composed::Form(next) if round.purpose == Purpose::Grow => {
                if newest.as_ref().is_some_and(|now| may_grow(&now.roster, &next).0) {
                    self.form(host, round.generation, &next);
                }
            }
            Composed::Form(next) => self.form(host, round.generation, &next),
            Composed::Few(_) | Composed::Defer(_) if round.purpose == Purpose::Reform => self.step_down(host),
            Composed::Few(_) | Composed::Defer(_) => {
                for candidate in &round.ready {
                    let node = self.by_id[&candidate.member.node];
                    self.send(host, node, Body::Release);
                }
                self.failed(host);
                self.think(host);
            }
        }
    }

    /// The real rule, or a broken one.
    fn take_over(&self, heir: &Heir<'_>) -> (TakeOver, String) {
        let real = may_take_over(heir, PATIENCE);
        let member = heir.roster.has(heir.me);
        let half = heir.roster.workers_of(heir.behind) * 2 >= heir.roster.workers();
        match self.bug {
            Bug::HalfIsEnough if member && half => (TakeOver::Now(Ground::Majority), "half".into()),
            Bug::Stranger if !member => (TakeOver::Now(Ground::Majority), "a stranger".into()),
            _ => real,
        }
    }

    fn form(&mut self, host: Host, generation: Generation, next: &Formation) {
        let members: Vec<Node> = next.places.iter().map(|place| self.by_id[&place.member.node]).collect();
        let places = next.places.iter().map(|place| place.member.clone()).collect();
        let roster = Rc::new(Roster { generation, members: places });
        let mut rank = 0;
        for place in &next.places {
            assert_eq!(place.first_rank.get(), rank);
            rank += place.member.workers;
        }
        let (at, now) = (self.me(host).read, self.now);
        let record = Record::Formed(Formed { roster, members, at: now });
        self.my(host).appending = true;
        // It may be stopped between its decision and its request, or right after that.
        let trap = self.my(host).trap.take();
        let early = self.bug == Bug::BuryFirst || self.below(2) == 0;
        let mut pause = 1;
        if self.bug == Bug::BuryFirst {
            let old = self.me(host).newest.clone().filter(|_| !self.me(host).ended);
            let dead = old.map(|old| old.members[0]).filter(|node| *node != self.me(host).node);
            self.after(host, trap.unwrap_or(0) + 10, Event::Land(Op::Bury(dead.into_iter().collect())));
            pause = 100;
        }
        if early {
            self.after(host, pause, Event::Append { at, record });
        } else {
            self.ask(host, Op::Append { at, record });
        }
        if let Some(pause) = trap {
            self.pause_for(host, pause);
        }
    }

    fn append(&mut self, host: Host, record: Record) {
        self.my(host).appending = true;
        let at = self.me(host).read;
        self.ask(host, Op::Append { at, record });
    }

    fn step_down(&mut self, host: Host) {
        let Some(newest) = self.me(host).newest.clone() else { return };
        self.say(host, |_| "steps down".into());
        self.append(host, Record::Interrupted(newest.roster.generation));
    }

    fn appended(&mut self, host: Host, record: &Record, stands: Option<bool>) {
        self.my(host).appending = false;
        if let Record::Committed(generation) = record {
            let len = self.journal.len();
            let me = self.my(host);
            // If only the answer was lost, the journal, which it reads next, shows that the record stands.
            let shown = me.store && len > me.read;
            me.failed_saves = if stands.is_some() || shown { 0 } else { me.failed_saves + 1 };
            if stands == Some(true) && self.leads(host, *generation) {
                let read = (self.me(host).read + 1).min(self.journal.len());
                self.sync(host, read);
                return self.grow(host);
            }
        }
        // Whether it stands or another one does: the journal says so.
        self.ask(host, Op::Journal);
        if stands.is_none() && !matches!(record, Record::Committed(_)) {
            self.failed(host);
        }
    }

    fn commit(&mut self, host: Host, generation: Generation) {
        if !self.leads(host, generation) {
            return;
        }
        self.after(host, COMMIT, Event::Commit { generation });
        let me = self.me(host);
        let all = me.newest.as_ref().is_some_and(|formed| formed.members.len() == me.touch.len());
        let view = Present { leads: true, nodes: me.touch.len() as u32, failed_saves: me.failed_saves };
        if give_up(view, Duration::ZERO, self.bounds, Wait::BOOT).0 == Ending::HandOver {
            // It leaves, and comes back as another node when it reaches the store.
            self.say(host, |_| "hands over".into());
            self.over(host);
            self.my(host).forget();
            return self.leave_out(host);
        }
        if all && me.lost.is_empty() && me.round.is_none() && !me.appending {
            self.append(host, Record::Committed(generation));
        }
    }

    fn grow(&mut self, host: Host) {
        let me = self.me(host);
        let Some(newest) = me.newest.clone() else { return };
        let waiting: Vec<Node> = me.live.iter().copied().filter(|node| !newest.members.contains(node)).collect();
        if !waiting.is_empty() && newest.members.len() < self.bounds.max as usize {
            let asked = newest.members.iter().copied().chain(waiting).collect();
            self.ask_all(host, Purpose::Grow, asked);
        }
    }

    // Decisions.

    fn think(&mut self, host: Host) {
        let me = self.me(host);
        if me.round.is_some() || me.appending {
            return;
        }
        let promised = me.promised.is_some_and(|(_, until)| until > self.now);
        match me.phase {
            Phase::Leader if !me.lost.is_empty() => self.think_as_leader(host),
            Phase::Leader | Phase::Follower => {}
            _ if promised => {}
            Phase::Lost => {
                let still = me.watch.still() >= PATIENCE;
                if !me.held_back || still || me.leader_left {
                    self.think_of_loss(host, me.lost_at);
                }
            }
            Phase::Outside => match &me.newest {
                Some(_) if !me.ended => {
                    let patience = if me.listed_dead { CONFIRM } else { PATIENCE };
                    let still = me.watch.still() >= patience || me.leader_left;
                    if still || self.bug == Bug::Stranger {
                        self.think_of_loss(host, me.waiting_since);
                    }
                }
                _ => self.think_of_a_start(host),
            },
        }
    }

    fn think_as_leader(&mut self, host: Host) {
        let me = self.me(host);
        let Some(newest) = me.newest.clone() else { return };
        let waiting = me.live.iter().filter(|it| !newest.members.contains(it) && !me.gone.contains(it));
        let nodes = me.touch.len() + waiting.count();
        let behind = self.ids(me.touch.iter().copied());
        let asked = newest.members.iter().chain(&me.live).copied().collect();
        match self.go_on(host, &newest, &behind, nodes as u32) {
            GoOn::Reform => self.ask_all(host, Purpose::Reform, asked),
            GoOn::Yield(pause) => self.after(host, ms(pause) + 1, Event::Think),
            GoOn::StepDown => self.step_down(host),
        }
    }

    fn go_on(&mut self, host: Host, formed: &Formed, behind: &BTreeSet<NodeId>, nodes: u32) -> GoOn {
        let me = self.me(host);
        let gone = self.ids(me.gone.iter().copied());
        let view = Bereaved { roster: &formed.roster, behind, gone: &gone, nodes };
        let lost = secs(self.now - me.lost_at);
        let lost = if self.bug == Bug::NoYield { YIELD } else { lost };
        let (next, why) = go_on(&view, lost, self.bounds);
        self.say(host, |_| format!("{next:?}: {why}"));
        next
    }

    fn think_of_loss(&mut self, host: Host, since: Ms) {
        let me = self.me(host);
        let Some(newest) = me.newest.clone() else { return };
        let outside: Vec<NodeId> =
            me.live.iter().filter(|it| !newest.members.contains(it)).map(|it| self.nodes[*it].clone()).collect();
        let gone = self.ids(me.gone.iter().copied());
        let opening = Opening::Loss { roster: &newest.roster, gone: &gone, outside: &outside };
        let since = if me.failed > 0 { me.failed_at } else { since };
        self.turn(host, opening, since, newest.members.iter().chain(&me.live).copied().collect());
    }

    fn think_of_a_start(&mut self, host: Host) {
        let me = self.me(host);
        let live: Vec<NodeId> = me.live.iter().map(|node| self.nodes[*node].clone()).collect();
        let Some(enough) = me.enough_at else { return };
        let since = if me.failed > 0 { me.failed_at } else { enough };
        self.turn(host, Opening::Cold { live: &live }, since, me.live.iter().copied().collect());
    }

    fn turn(&mut self, host: Host, opening: Opening<'_>, since: Ms, asked: BTreeSet<Node>) {
        let me = self.me(host);
        let quiet = secs(self.now - me.newcomer_at);
        let id = self.id(host);
        let view = Candidacy { opening, me: &id, failed: me.failed, quiet };
        match who_proposes(&view, secs(self.now - since), self.bounds).0 {
            Turn::Now => {
                // Addresses and keys of those that no record names.
                self.requests.get += asked.len() as u64;
                self.ask_all(host, Purpose::Form, asked);
            }
            Turn::In(pause) => self.after(host, ms(pause) + 1, Event::Think),
            Turn::NotMine => {}
        }
    }

    // What an outsider sees.

    /// A leader that works with half of its workers or more, and whose beats arrive, is not taken over.
    fn check_take_over(&mut self, host: Host, formed: &Formed) {
        let node = formed.members[0];
        let owner = self.owner[node];
        let leader = &self.hosts[owner];
        let generation = formed.roster.generation;
        if owner == host || !leader.up || leader.paused || leader.node != node || !self.leads(owner, generation) {
            return;
        }
        let works = |it: &Node| {
            let member = &self.hosts[self.owner[*it]];
            *it == node
                || leader.touch.contains(it)
                    && member.node == *it
                    && member.up
                    && !member.paused
                    && member.phase == Phase::Follower
                    && self.linked(owner, self.owner[*it])
        };
        let at_work = self.ids(formed.members.iter().copied().filter(works));
        let half = formed.roster.workers_of(&at_work) * 2 >= formed.roster.workers();
        let beat = self.beats.get(&node);
        let beats = beat.map(|beat| [beat.landed, beat.before[0], beat.before[1], beat.before[2], beat.before[3]]);
        let window = self.now.saturating_sub(12_000)..self.now.saturating_sub(7_000);
        let fresh = beats.unwrap_or_default().iter().any(|at| window.contains(at));
        if half && fresh {
            let me = self.id(host);
            self.wrong
                .push(format!("{} s: {me} takes generation {generation} over from a live leader", self.now / 1000));
        }
    }
}

impl Machine {
    /// A new generation stands, or this one ended: what was known of the old leader and the old members is over.
    fn forget(&mut self) {
        self.touch.clear();
        self.lost.clear();
        self.watch = membership::Watch::default();
        self.watched = None;
        (self.leader_refused, self.leader_left, self.listed_dead, self.held_back) = (false, false, false, false);
        self.failed = 0;
        self.promised = None;
        self.round = None;
        self.failed_saves = 0;
    }
}
