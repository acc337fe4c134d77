//! A run on several nodes, as one of them lives it.
//!
//! The desk ([`desk`]) says what the newest generation makes of this node, and this loop does it: it forms, leads,
//! follows or waits. What it decides is what the end of a generation means for the group.
//!
//! | a generation ends here because | then |
//! |---|---|
//! | the run is complete | the leader records it; every node exits |
//! | a worker died | the leader waits as `restart` says, then the same group forms anew |
//! | a node is lost | the group forms anew without it, or waits for others |
//! | a member was told to leave | all ranks stop at one step, which is saved; the others form anew |
//! | the leader was told to leave | the same; it records `interrupted` and leaves, the others form anew |
//! | a person asks the run to stop (`trainer drain`) | the same; every node exits |
//! | the leader finds that the run has reached a cap | the same; every node exits |
//! | the leader is lost | its followers end their workers; one of them forms the next generation |
//!
//! # Invariants
//! - A node follows a generation only after it has read that record itself.
//! - Nothing is recorded for a generation that this node does not lead.
//! - Workers of one generation are gone before those of the next start, or are those of the next.
//! - A node that a newer generation left out comes back under a new id, with a new key.
//!
//! *Crash:* the others notice, and form anew. *Retry:* every loss leads to another formation, as the rendezvous's
//! policy says. *Cancel:* a notice drops the work between two generations, and within one asks the leader to end it.

mod desk;
mod forms;
mod grows;
mod kept;
mod kind;
mod read;
mod seat;
mod trial;

use std::{collections::BTreeMap, time::Duration};

use tokio::{sync::mpsc, time::Instant};

use self::{
    desk::{Call, Desk, Myself, Route, Tell, Words},
    grows::Change,
    trial::Trial,
};
use super::{
    Outcome, Runner, Seating, Story,
    open::{Completed, completed},
    or_notice, parting, told_to_leave,
};
use crate::{
    agent::{
        blame::{self, Blame},
        follow::{self, Followed, Leader},
        generation::{self, End, Left, Load, Plan, Stopped},
        group::{Company, ToLeader, ToMember},
        keep::Kept,
    },
    error::{Error, Kind, Result},
    history,
    ids::{Generation, NodeId, Step},
    journal::{Formation, FormedReason, Record},
    layout,
    notice::Notices,
    rendezvous::policy::Roster,
    report::Event,
};

/// How long a node that has lost its place waits before it reads the journal for the reason.
const REASON: Duration = Duration::from_secs(5);

/// The pause before a store that was away is asked again.
const STORE_AWAY: Duration = Duration::from_secs(2);
/// The pause between two such reads.
const READ_AGAIN: Duration = Duration::from_millis(250);

/// What follows when this node's part of a generation is over.
enum After {
    /// This node led it, and the group forms anew.
    Again,
    /// The next one, if there is one, is not this node's to form.
    Wait,
    /// This node led it, its saves fail, and others' do not.
    HandOver(String),
    /// The run is over for this node.
    Over(Outcome),
    /// A newer generation stands without it.
    LeftOut,
}

/// What this loop remembers from one generation to the next.
struct Memory {
    story: Story,
    /// The state that the generation which this node is about to form starts from.
    load: Option<(Generation, Load)>,
    /// The newest generation when this node opened the run, and whether its end was recorded.
    opened: (Generation, bool),
    /// Members of the last generation that this node led which are leaving, or were lost, and why.
    gone: BTreeMap<NodeId, (FormedReason, String)>,
    /// Of a node whose saves failed.
    trial: Trial,
    /// How this node's own workers have died.
    blame: Blame,
    /// This node's workers of the last generation, which may go on in the next one.
    kept: Option<Kept>,
    /// What the last change of the group has cost.
    change: Change,
}

impl Runner {
    /// Whether the run may have several nodes.
    pub(super) fn is_together(&self) -> bool {
        self.options.nodes.max > 1
    }

    /// Takes part in generations, one after the other, until the run has ended on this node.
    pub(super) async fn live_together(&mut self, notices: &mut Notices) -> Result<Outcome> {
        let mut memory = Memory {
            story: Story { deaths: Vec::new(), reason: FormedReason::Started, finished: None, differed: None },
            load: None,
            opened: {
                let state = self.journal.state();
                (state.generation(), read::has_ended(&state, state.generation()))
            },
            gone: BTreeMap::new(),
            trial: Trial::default(),
            blame: Blame::default(),
            kept: None,
            change: Change::default(),
        };
        let reporter = self.reporter.clone();
        let Some(seated) = or_notice(notices, &reporter, self.take_a_seat()).await else {
            return self.leaves(memory.story.finished);
        };
        let (mut desk, mut me) = seated?;
        let nodes = self.options.nodes;
        self.reporter.event(&Event::Phase { doing: format!("waiting for nodes: at least {}", nodes.min) });
        loop {
            let limit = self.options.wait.at_most.map(|limit| desk.led() + limit);
            let call = tokio::select! {
                biased;
                () = told_to_leave(notices, &reporter) => return self.leaves_between(&memory, notices.left()).await,
                call = desk.call() => call,
                () = until(limit) => match self.options.wait.at_most {
                    // A leader was seen at work meanwhile.
                    Some(most) if desk.led().elapsed() < most => continue,
                    _ => return Err(self.too_few()),
                },
            };
            let after = match call {
                Call::Form(_) if self.was_stopped(&memory).await => return self.leaves(memory.story.finished),
                Call::Form(proposal) => {
                    // It has just joined, and what it knows of the run may be old.
                    if let Some(outcome) = self.is_over(&memory).await? {
                        return Ok(outcome);
                    }
                    let stands = or_notice(notices, &reporter, self.propose(*proposal, &mut memory)).await;
                    let Some(stands) = stands else { return self.leaves_between(&memory, notices.left()).await };
                    desk.tell(Tell::Appended(stands?));
                    continue;
                }
                Call::StepDown(generation) => {
                    let step = memory.story.finished.unwrap_or_default();
                    let committed = self.newest_committed();
                    let verdict = format!("fewer than {} nodes are left", nodes.min);
                    let stopped = Stopped { step: step.max(committed), committed, verdict, drain: None, cap: None };
                    let words = self.last_words(generation, &stopped, None);
                    if or_notice(notices, &reporter, words).await.is_none() {
                        return self.leaves_between(&memory, notices.left()).await;
                    }
                    desk.tell(Tell::Appended(Some(true)));
                    self.reporter.event(&Event::Phase { doing: format!("waiting for nodes: at least {}", nodes.min) });
                    continue;
                }
                Call::Lead(roster) if self.is_newest(&roster) => {
                    self.lead(roster, &me, &desk, &mut memory, notices).await?
                }
                Call::Follow(roster) if self.is_newest(&roster) => {
                    self.follow(roster, &me, &desk, &mut memory, notices).await?
                }
                // Another one stands by now.
                Call::Lead(_) | Call::Follow(_) => continue,
                Call::Wait => {
                    if let Some(outcome) = self.is_over(&memory).await? {
                        return Ok(outcome);
                    }
                    if self.was_stopped(&memory).await {
                        return self.leaves(memory.story.finished);
                    }
                    continue;
                }
                Call::LeftOut | Call::HandOver => After::LeftOut,
            };
            if let After::Again = &after {
                desk.tell(Tell::Leaving(memory.gone.keys().cloned().collect()));
            }
            if let After::HandOver(why) = &after {
                memory.trial.begins(&desk);
                desk.tell(Tell::HandOver(why.clone()));
            }
            desk.tell(Tell::Off);
            match after {
                After::Over(outcome) => return Ok(outcome),
                After::Again => desk.tell(Tell::Again),
                After::HandOver(_) => {}
                After::Wait => {
                    if let Some(outcome) = self.is_over(&memory).await? {
                        return Ok(outcome);
                    }
                    if self.was_stopped(&memory).await {
                        return self.leaves(memory.story.finished);
                    }
                }
                After::LeftOut => {
                    drop(desk);
                    memory.kept = None;
                    let Some(again) = or_notice(notices, &reporter, self.comes_back()).await else {
                        return self.leaves(memory.story.finished);
                    };
                    again?;
                    let Some(seated) = or_notice(notices, &reporter, self.takes_another_seat()).await else {
                        return self.leaves(memory.story.finished);
                    };
                    (desk, me) = seated?;
                    memory.trial.tells(&desk);
                    memory.load = None;
                }
            }
        }
    }

    fn is_newest(&self, roster: &Roster) -> bool {
        self.journal.state().generation() == roster.generation
    }

    fn too_few(&self) -> Error {
        let min = self.options.nodes.min;
        Error::new(Kind::Unavailable, format!("fewer than {min} nodes came in time"))
            .with_hint("start the others, or give --wait more time, or --nodes a lower minimum")
    }

    /// How the run ended, if it has been completed or has reached a cap since this node opened it.
    async fn is_over(&mut self, memory: &Memory) -> Result<Option<Outcome>> {
        let _ = tokio::time::timeout(REASON, self.journal.refresh()).await;
        let (generation, had_ended) = memory.opened;
        if self.journal.state().generation() == generation && had_ended {
            return Ok(None);
        }
        let state = self.journal.state();
        if let Some(Completed { step, .. }) = completed(&state, self.resolved.workload.task()) {
            tracing::info!(run = %self.run_id, %step, "run is complete");
            return Ok(Some(Outcome::Completed { then: self.options.then(&self.resolved.config, true) }));
        }
        if let Some(capped) = self.capped() {
            return Ok(Some(capped));
        }
        match state.outcome() {
            crate::journal::Outcome::Failed { reason, .. } => {
                let failed = Error::new(Kind::Config, format!("the run has failed on another node: {reason}"));
                Err(failed.with_hint(format!("trainer explain --run-id {}", self.run_id)))
            }
            _ => Ok(None),
        }
    }

    /// The run has reached a cap, as its leader has recorded.
    fn capped(&self) -> Option<Outcome> {
        let state = self.journal.state();
        let cap = state.capped().filter(|cap| cap.holds(&self.resolved.config.run))?;
        let lost_steps = state.interruptions().last().map_or(0, |end| end.lost_steps);
        Some(self.at_its_cap(cap, lost_steps, true))
    }

    /// Whether a person asked the newest generation to stop, and it has ended, since this node opened the run: then no
    /// other follows.
    async fn was_stopped(&self, memory: &Memory) -> bool {
        let state = self.journal.state();
        let newest = state.generation();
        if memory.opened == (newest, true) || newest == Generation(0) || !read::has_ended(&state, newest) {
            return false;
        }
        let asked = state.continued(newest).into_iter().chain([newest]);
        for generation in asked {
            let asked = tokio::time::timeout(REASON, self.run.head(&layout::drain(generation))).await;
            if matches!(asked, Ok(Ok(_))) {
                return true;
            }
        }
        false
    }

    /// This node leaves while it is at no work; `finished`: the last step that its workers have finished.
    fn leaves(&self, finished: Option<Step>) -> Result<Outcome> {
        let committed = self.newest_committed();
        let step = finished.unwrap_or_default().max(committed);
        let lost_steps = step.get() - committed.get();
        if step > Step(0) {
            self.reporter.event(&Event::Interrupted { step, lost_steps, cap: None });
        }
        Ok(Outcome::Interrupted { lost_steps })
    }

    /// A notice came while this node was at no work.
    async fn leaves_between(&self, memory: &Memory, left: Option<Duration>) -> Result<Outcome> {
        let state = self.journal.state();
        let led = state
            .formed()
            .is_some_and(|formed| formed.node == self.node && !read::has_ended(&state, formed.generation));
        if led {
            return self.told_between_generations("the group formed anew", memory.story.finished, left).await;
        }
        self.leaves(memory.story.finished)
    }

    fn report_formed(&self, formed: &Formation, seating: &Seating, load: &Load, kept: Option<&Kept>) {
        let world_size = seating.ranks.world;
        let leader = formed.roster.first().map(|entry| &entry.node).filter(|node| **node != self.node);
        self.reporter.event(&Event::Counted(Box::new(history::counted(&self.journal.state()))));
        self.reporter.event(&Event::Formed {
            generation: formed.generation,
            world_size,
            shares: self.resolved.workload.uneven_shares(world_size),
            resume_step: (load.step() > Step(0)).then_some(load.step()),
            total_steps: self.resolved.workload.last_step().get(),
            nodes: Some(u32::try_from(formed.roster.len()).unwrap_or(u32::MAX)),
            leader: leader.map(ToString::to_string),
        });
        if let Some(kept) = kept {
            let workers = u32::try_from(kept.count()).unwrap_or(u32::MAX);
            self.reporter.event(&Event::Kept { step: load.step(), workers, loads: !kept.keeps_state() });
        }
    }

    /// Reads on until the journal says why a generation ended, or another one stands.
    async fn reads_the_reason(&self, generation: Generation) {
        loop {
            let read = self.journal.refresh().await;
            let state = self.journal.state();
            if state.generation() > generation || read::has_ended(&state, generation) {
                return;
            }
            if let Err(error) = read {
                tracing::debug!(%error, "the journal could not be read");
            }
            tokio::time::sleep(READ_AGAIN).await;
        }
    }

    /// Leads a generation to its end.
    async fn lead(
        &mut self,
        roster: Roster,
        me: &Myself,
        desk: &Desk,
        memory: &mut Memory,
        notices: &mut Notices,
    ) -> Result<After> {
        let generation = roster.generation;
        let state = self.journal.state();
        let Some(formed) = state.formation(generation) else { return Ok(After::Wait) };
        let seating = self.seating(formed, me)?;
        let load = match memory.load.take() {
            Some((of, load)) if of == generation => load,
            _ => {
                let reporter = self.reporter.clone();
                match or_notice(notices, &reporter, self.load_patiently(formed)).await {
                    Some(load) => match load? {
                        Some(load) => load,
                        None => return Ok(After::Wait),
                    },
                    None => return Ok(After::Over(self.leaves_between(memory, notices.left()).await?)),
                }
            }
        };
        let reporter = self.reporter.clone();
        let Some((load, kept)) = or_notice(notices, &reporter, self.with_kept(load, memory)).await else {
            return Ok(After::Over(self.leaves_between(memory, notices.left()).await?));
        };
        self.report_formed(formed, &seating, &load, kept.as_ref());
        memory.story.finished = Some(load.step());
        memory.gone.clear();
        let (to_desk, heard) = mpsc::unbounded_channel();
        let (to, sent) = mpsc::unbounded_channel::<(NodeId, ToMember)>();
        let (saves, saved) = mpsc::unbounded_channel();
        let min = usize::try_from(self.options.nodes.min).unwrap_or(usize::MAX);
        let company = Company { others: seating.others.clone(), to, heard, saves, min };
        let tells = desk.voice();
        let change = memory.change;
        let prospects = self.prospects(change);
        tokio::spawn(post(saved, move |progressed| _ = tells.send(Tell::Saved(prospects(progressed)))));
        desk.tell(Tell::Route(Route::Lead(generation, to_desk)));
        let links = desk.links.clone();
        let post = tokio::spawn(post(sent, move |(node, words)| links.send(&node, generation, Words::ToMember(words))));
        notices.formed(&self.run, generation, &state.continued(generation));
        let doubted = memory.story.differed.is_some();
        let plan = Plan { kept, ..self.plan(generation, &load, Instant::now(), &seating, doubted) };
        if let Some(newest) = state.newest() {
            self.estimates.seed(&newest.committed);
        }
        let mut left = Left::default();
        memory.blame.begins(seating.others.len() >= min);
        left.members.blame = std::mem::take(&mut memory.blame);
        let (slots, estimates) = (&mut self.slots, &mut self.estimates);
        let ended = generation::run(plan, Some(company), slots, estimates, notices, &self.reporter, &mut left).await;
        // The last words to the members are on their way once this has ended.
        let _ = post.await;
        self.led(generation, load, ended, left, memory, notices).await
    }

    /// What the end of a generation that this node led means.
    async fn led(
        &mut self,
        generation: Generation,
        load: Load,
        ended: Result<End>,
        mut left: Left,
        memory: &mut Memory,
        notices: &mut Notices,
    ) -> Result<After> {
        let members = std::mem::take(&mut left.members);
        memory.story.differed = members.differed;
        memory.blame = members.blame;
        memory.kept = left.kept.take();
        memory.change.ends(left.stepped, matches!(ended, Ok(End::Stopped(_))));
        let leaving =
            members.leaving.into_iter().map(|node| (node, (FormedReason::NodeLeft, "was told to leave".to_owned())));
        memory.gone.extend(leaving);
        for (node, why) in &members.parted {
            self.reporter.event(&Event::Warning { message: format!("node {node} is lost: {why}") });
            memory.gone.entry(node.clone()).or_insert_with(|| (FormedReason::NodeLost, why.clone()));
        }
        match ended {
            Ok(End::Completed { step, loss, early }) => {
                let outcome = self.complete(generation, step, loss, early, notices).await?;
                match outcome {
                    Outcome::Completed { .. } => self.tidy(left, notices).await,
                    _ => _ = self.gone(left).await,
                }
                Ok(After::Over(outcome))
            }
            // Its word would not reach the store: whoever leads next says how the generation ended.
            Ok(End::Stopped(stopped)) if members.hands_over.is_some() => {
                memory.story.finished = Some(stopped.step);
                let why = members.hands_over.unwrap_or_default();
                self.reporter.event(&Event::Warning { message: format!("this node hands over: {why}") });
                let gone = self.gone(left).await;
                if members.asked_here || members.ends_the_run {
                    return Ok(After::Over(self.leaves(Some(stopped.step))?));
                }
                self.slots.end_generation(gone).await?;
                Ok(After::HandOver(why))
            }
            Ok(End::Stopped(stopped)) => {
                memory.story.finished = Some(stopped.step);
                if members.asked_here || members.ends_the_run {
                    let outcome = self.interrupted(generation, stopped, notices.left()).await;
                    let _ = self.gone(left).await;
                    return Ok(After::Over(outcome?));
                }
                let gone = self.gone(left).await;
                self.slots.end_generation(gone).await?;
                Ok(After::Again)
            }
            Ok(End::Damaged { object, reason }) => {
                self.step_over(&load, &object, &reason).await?;
                Ok(After::Again)
            }
            Ok(End::Diverged { step, reason }) => Err(self.diverged(generation, step, &reason).await),
            // The others have heard it, and one of them forms the next generation.
            Ok(End::Died { .. }) if members.blamed.is_some() => Err(blame::leaves(&members.blamed.unwrap_or_default())),
            Ok(End::Died { step, .. }) if members.hands_over.is_some() => {
                memory.story.finished = Some(step);
                self.from = None;
                let why = members.hands_over.unwrap_or_default();
                let message = format!("this node hands over: {why}");
                self.reporter.event(&Event::Warning { message });
                Ok(After::HandOver(why))
            }
            Ok(End::Died { step, reason }) => {
                memory.story.finished = Some(step);
                self.from = None;
                if !members.parted.is_empty() {
                    return Ok(After::Again);
                }
                memory.story.deaths.push(super::restart::Death::of(step, &reason));
                let pause = self.died(generation, step, &reason, &memory.story.deaths).await?;
                let reporter = self.reporter.clone();
                match or_notice(notices, &reporter, tokio::time::sleep(pause)).await {
                    Some(()) => Ok(After::Again),
                    None => {
                        let doing = "waiting to restart the workers";
                        let outcome = self.told_between_generations(doing, Some(step), notices.left()).await?;
                        Ok(After::Over(outcome))
                    }
                }
            }
            Err(error) if error.kind() == Kind::Fenced => {
                tracing::warn!(%error, "another node leads the run");
                self.slots.end_generation(false).await?;
                if members.asked_here || members.ends_the_run {
                    return Ok(After::Over(self.leaves(memory.story.finished)?));
                }
                Ok(After::Wait)
            }
            // The last save needed a node that is lost: the others do it again.
            Err(error) if error.kind() == Kind::Unavailable && !members.parted.is_empty() && !members.asked_here => {
                tracing::warn!(%error, "the group forms anew");
                let gone = self.gone(left).await;
                self.slots.end_generation(gone).await?;
                Ok(After::Again)
            }
            Err(error) => {
                if super::is_recorded(error.kind()) {
                    let step = self.newest_committed();
                    self.append_last(Record::Failed { generation, step, reason: error.to_string() }).await;
                }
                Err(error)
            }
        }
    }

    /// Follows the leader of a generation to its end.
    async fn follow(
        &mut self,
        roster: Roster,
        me: &Myself,
        desk: &Desk,
        memory: &mut Memory,
        notices: &mut Notices,
    ) -> Result<After> {
        let generation = roster.generation;
        let (reporter, state) = (self.reporter.clone(), self.journal.state());
        let Some(formed) = state.formation(generation).cloned() else { return Ok(After::Wait) };
        let Some(leader) = formed.roster.first().map(|entry| entry.node.clone()) else { return Ok(After::Wait) };
        memory.gone.clear();
        self.gives_up_changes();
        let preparing = async {
            if !self.is_as_recorded().await? {
                return Ok(None);
            }
            let ours = self.resolved.workload.data();
            if formed.data.as_ref().is_some_and(|data| data != ours) {
                return Err(Error::new(Kind::Config, "this node has other data than the group's leader")
                    .with_hint("give every node the same dataset: data.train names it"));
            }
            let load = self.load_patiently(&formed).await?;
            Ok(match load {
                Some(load) => Some(self.with_kept(load, memory).await),
                None => None,
            })
        };
        let Some(load) = or_notice(notices, &reporter, preparing).await else {
            return Ok(After::Over(self.leaves(memory.story.finished)?));
        };
        let Some((load, kept)) = load? else { return Ok(After::Wait) };
        let seating = self.seating(&formed, me)?;
        self.report_formed(&formed, &seating, &load, kept.as_ref());
        let (to_desk, heard) = mpsc::unbounded_channel();
        let (to, sent) = mpsc::unbounded_channel::<ToLeader>();
        desk.tell(Tell::Route(Route::Follow(generation, leader.clone(), to_desk)));
        let links = desk.links.clone();
        let post = tokio::spawn(post(sent, move |words| links.send(&leader, generation, Words::ToLeader(words))));
        let plan = Plan { kept, ..self.plan(generation, &load, Instant::now(), &seating, false) };
        let leader = Leader { to, heard };
        memory.blame.begins(seating.others.len() >= usize::try_from(self.options.nodes.min).unwrap_or(usize::MAX));
        let (slots, pace) = (&mut self.slots, &mut self.estimates.pace);
        let followed = follow::run(plan, leader, slots, notices, &reporter, &mut memory.blame, pace).await;
        let _ = post.await;
        let (followed, kept) = followed?;
        memory.kept = kept;
        let (outcome, step) = match followed {
            Followed::Over { leaving: false, ends_the_run: false, hands_over, unfit, finished } => {
                let reason = self.reads_the_reason(generation);
                memory.story.finished = Some(finished);
                if let Some(why) = unfit {
                    let message = format!("this node is left out: {why}");
                    self.reporter.event(&Event::Warning { message });
                    memory.trial.begins(desk);
                }
                if let (Some(why), Some(leader)) = (hands_over, formed.roster.first()) {
                    let message = format!("node {} hands over: {why}", leader.node);
                    self.reporter.event(&Event::Warning { message });
                    memory.gone.insert(leader.node.clone(), (FormedReason::NodeLost, why));
                    return Ok(After::Wait);
                }
                return match or_notice(notices, &reporter, tokio::time::timeout(REASON, reason)).await {
                    Some(_) => Ok(After::Wait),
                    None => Ok(After::Over(self.leaves(Some(finished))?)),
                };
            }
            Followed::CutOff { why, finished } => {
                memory.story.finished = Some(finished);
                self.reporter.event(&Event::Warning { message: format!("this node has lost its leader: {why}") });
                return Ok(After::Wait);
            }
            Followed::Over { ends_the_run: true, finished, .. } => {
                // Its leader's last record says whether a person or a cap has ended the run.
                let limit = parting::within(REASON, notices.left());
                let _ = tokio::time::timeout(limit, self.reads_the_reason(generation)).await;
                let lost_steps = finished.get().saturating_sub(self.newest_committed().get());
                (self.capped().unwrap_or(Outcome::Interrupted { lost_steps }), finished)
            }
            Followed::Over { finished, .. } | Followed::Left { finished } => {
                let limit = parting::within(REASON, notices.left());
                let _ = tokio::time::timeout(limit, self.journal.refresh()).await;
                let lost_steps = finished.get().saturating_sub(self.newest_committed().get());
                (Outcome::Interrupted { lost_steps }, finished)
            }
        };
        match &outcome {
            Outcome::Interrupted { lost_steps } => {
                self.reporter.event(&Event::Interrupted { step, lost_steps: *lost_steps, cap: None });
            }
            Outcome::Capped { cap, lost_steps, .. } => {
                let cap = Some(cap.to_string());
                self.reporter.event(&Event::Interrupted { step, lost_steps: *lost_steps, cap });
            }
            Outcome::Completed { .. } | Outcome::NotCreated => {}
        }
        Ok(After::Over(outcome))
    }
}

/// Passes on what is sent until all senders are gone.
async fn post<T>(mut sent: mpsc::UnboundedReceiver<T>, pass: impl Fn(T)) {
    while let Some(words) = sent.recv().await {
        pass(words);
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
