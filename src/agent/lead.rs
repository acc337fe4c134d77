//! The group's part of a generation: saves, the journal, upkeep, reports. Its leader has it; a node that is alone leads
//! itself.
//!
//! [`Lead::perform`] carries out the [`Effects`] that the state machine gives back, in order: orders go to every node
//! of the group ([`super::node`]), all else is done here.
//!
//! Owns: all tasks of the group. Decides nothing but what an end means for the work under way.
//!
//! *Crash:* work under way is lost, and no record names it. *Cancel:* [`Lead::end`] ends all of it; requests already
//! sent to the store may land.

use std::{ops::ControlFlow, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::Instant,
};

use super::{
    effects::{Effect, Effects, Log, Order, Senders},
    fence,
    finish::Whole,
    generation::{End, Left, Members, Plan},
    group::{Heard, Others},
    node::{Node, Part},
    phase::Event,
    save::{
        fault::{Consequence, Group, Reason, Standing, Tally},
        haste::Change,
        holdup::HoldUp,
        ledger::Transfer,
        upload::{self, SaveEvent, Snapshot},
    },
    upkeep::retention::Retention,
};
use crate::{
    error::Result,
    ids::{AttemptId, NodeId},
    journal::{Record, SaveCost, Urgency},
    metrics::Recorder,
    protocol::ToWorker,
    report::{self, Reporter},
    snapshot::mode::{CaptureMode, Choice},
};

/// How long the end of a generation waits for the records of notices, which yield to all others.
const NOTED: Duration = Duration::from_secs(1);

/// How long the store may take to say that it is there.
const THERE: Duration = Duration::from_secs(10);

/// The save under way.
struct Saving {
    cost: watch::Sender<SaveCost>,
    give_up: AbortHandle,
    standing: watch::Receiver<Standing>,
}

/// What the end of a generation means for its work under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parting {
    /// The save under way is given up: a snapshot that is not a checkpoint by now must not become one, since the
    /// journal is about to say so.
    gives_up_save: bool,
    /// The workers are asked to exit, and not killed.
    dismisses: bool,
    /// The journal's last record is more urgent than the end of the workers.
    leaves_rest: bool,
}

impl Parting {
    const fn of(end: &Result<End>) -> Self {
        match end {
            Ok(End::Completed { .. }) => Self { gives_up_save: false, dismisses: true, leaves_rest: true },
            // If steps are lost, the workers are in the middle of another one, and there may be no time to wait for its
            // end.
            Ok(End::Stopped(stopped)) => {
                let dismisses = stopped.committed.get() >= stopped.step.get();
                Self { gives_up_save: true, dismisses, leaves_rest: true }
            }
            Ok(End::Died { .. } | End::Damaged { .. } | End::Diverged { .. }) | Err(_) => {
                Self { gives_up_save: false, dismisses: false, leaves_rest: false }
            }
        }
    }
}

/// The group of a generation, as its leader has it.
pub struct Lead<'a> {
    start: &'a Plan,
    /// When the generation began: the zero of its time.
    began: Instant,
    /// The leader's own node.
    node: Node<'a>,
    /// The other nodes.
    others: Others,
    /// Whose saves fail; `None`: the run has one node.
    group: Option<Group>,
    tally: Tally,
    /// The last save of a group that was asked to stop.
    holdup: HoldUp,
    /// The question whether the store is there, if it is asked.
    asking: Option<AbortHandle>,
    /// This node's saves fail, and others' do not.
    hands_over: Option<String>,
    /// This node's workers have ended the group again and again: it leaves.
    blamed: Option<String>,
    /// The workers were killed.
    killed: bool,
    /// When all ranks were asked to hold, until they go on.
    frozen: Option<Instant>,
    /// When somebody asked the group to stop, until its last step is agreed.
    asked: Option<Instant>,
    reporter: &'a Reporter,
    /// The figures of the steps, on their way to the store.
    recorder: Recorder,
    retention: Retention,
    /// The look at the journal, if one is under way.
    looking: Option<AbortHandle>,
    /// Notices being recorded.
    notes: JoinSet<()>,
    /// The save begun last.
    saving: Option<Saving>,
    senders: Senders,
}

impl<'a> Lead<'a> {
    /// Of a generation that began at `began`.
    pub fn begin(
        start: &'a Plan,
        began: Instant,
        node: Node<'a>,
        (others, group): (Others, Option<Group>),
        reporter: &'a Reporter,
        senders: Senders,
    ) -> Self {
        let upload::Context { run, journal, generation, .. } = &start.upload;
        let retention = Retention::begin(run, journal, start.config.checkpoint, &start.docket);
        let (looking, saving) = (None, None);
        Self {
            start,
            began,
            node,
            others,
            group,
            tally: Tally::default(),
            holdup: HoldUp::default(),
            asking: None,
            hands_over: None,
            blamed: None,
            killed: false,
            frozen: None,
            asked: None,
            reporter,
            recorder: Recorder::new(run, *generation),
            retention,
            looking,
            notes: JoinSet::new(),
            saving,
            senders,
        }
    }

    /// What the channel brings of another node, as events of the generation.
    pub fn hear(&mut self, heard: Heard) -> Vec<Event> {
        let events = self.others.hear(heard);
        if self.others.abandons_save(&self.start.upload.node) {
            self.node.gives_up_save();
        }
        events
    }

    /// Nodes that did not start in time, as events of the generation.
    pub fn late(&mut self) -> Vec<Event> {
        self.others.late()
    }

    /// An event of this node's own; `None`: it waits for the other nodes' answers.
    pub fn own(&mut self, event: Event) -> Option<Event> {
        self.others.own(event)
    }

    /// What a save that has ended says of its nodes, as events that follow it; `trains`: nobody is about to stop the
    /// group for another reason.
    pub fn judge(&mut self, event: &Event, trains: bool) -> Vec<Event> {
        let (Event::Save(SaveEvent::Ended { step, result, .. }), Some(group)) = (event, &self.group) else {
            return Vec::new();
        };
        let Err(error) = result else {
            self.tally.saved();
            return Vec::new();
        };
        let standing = self.saving.as_ref().map(|saving| saving.standing.borrow().clone());
        // A save whose member is lost says nothing of the others.
        let (Some(standing), true, false) = (standing, trains, self.others.has_lost()) else { return Vec::new() };
        let verdict = self.tally.failed(&standing, group);
        let last = format!("the last one, of step {step}: {error}");
        let why = |tally: &Tally, node: &NodeId| format!("{}; {last}", Reason::Failed(tally.times(node)));
        self.obey(verdict, why)
    }

    /// How far the save under way has come.
    pub fn follow_the_save(&mut self, event: &SaveEvent) {
        match event {
            SaveEvent::Progress { bytes, .. } => self.holdup.sent(*bytes, self.began.elapsed()),
            SaveEvent::Ended { result, .. } if result.is_ok() => self.holdup.saved(),
            SaveEvent::Ended { .. } => {}
        }
    }

    /// A look at the last save of a group that was asked to stop, and waits for it for `limit`. Whether some nodes hold
    /// it up is answered later, by [`Event::HeldUp`]: the store may be away for all.
    pub fn look_at_the_last_save(&mut self, limit: Duration) {
        let (Some(group), Some(saving), false) = (&self.group, &self.saving, self.others.has_lost()) else { return };
        let standing = saving.standing.borrow().clone();
        let Some(after_s) = self.holdup.look(&standing, group, self.began.elapsed(), limit) else { return };
        if self.asking.as_ref().is_some_and(|asking| !asking.is_finished()) {
            return;
        }
        let (journal, later) = (self.start.upload.journal.clone(), self.senders.later.clone());
        let blames_itself = self.holdup.suspects().missing.contains(&self.start.upload.node);
        let asking = tokio::spawn(async move {
            let there = blames_itself || matches!(tokio::time::timeout(THERE, journal.refresh()).await, Ok(Ok(_)));
            if there {
                let _ = later.send(Event::HeldUp { after_s });
            }
        });
        self.asking = Some(asking.abort_handle());
    }

    /// Carries out a verdict, with the reason for each node.
    fn obey(&mut self, verdict: Consequence, why: impl Fn(&Tally, &NodeId) -> String) -> Vec<Event> {
        match verdict {
            Consequence::GoOn => Vec::new(),
            Consequence::LeaveOut(nodes) => {
                let nodes = nodes.into_iter().map(|node| (node.clone(), why(&self.tally, &node)));
                self.others.leave_out_unfit(nodes.collect::<Vec<_>>())
            }
            Consequence::HandOver => {
                let why = why(&self.tally, &self.start.upload.node);
                self.others.hands_over(&why);
                self.hands_over = Some(why);
                Vec::new()
            }
            Consequence::Stay(nodes) => {
                for node in nodes {
                    let why = why(&self.tally, &node);
                    let message = format!("node {node} stays, since too few nodes would be left without it: {why}");
                    self.reporter.event(&report::Event::Warning { message });
                }
                Vec::new()
            }
        }
    }

    /// This node leaves when the generation is over.
    pub fn is_blamed(&mut self, why: String) {
        self.blamed = Some(why);
    }

    /// Somebody asks the group to stop.
    pub fn is_asked(&mut self) {
        self.asked.get_or_insert_with(Instant::now);
    }

    /// Writes to the log how long ranks were held, and how long it took to agree on the last step.
    fn times(&mut self, order: &Order) {
        let ms = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        match order {
            Order::TellAll(ToWorker::Freeze { .. }) => self.frozen = Some(Instant::now()),
            Order::TellAll(ToWorker::Thaw { stop_after, .. }) => {
                if let Some(since) = self.frozen.take() {
                    tracing::debug!(held_ms = ms(since), "all ranks were held between two steps");
                }
                if let (Some(step), Some(since)) = (stop_after, self.asked.take()) {
                    tracing::debug!(%step, agreed_ms = ms(since), "all ranks stop after this step");
                }
            }
            _ => {}
        }
    }

    /// Waits for a bounded time until this node's workers, which were killed, are gone.
    pub async fn killed(&mut self) {
        self.node.killed().await;
    }

    /// Whether the workers were killed.
    pub const fn has_killed(&self) -> bool {
        self.killed
    }

    /// Why this node hands over, if it does.
    pub fn hands_over(&self) -> Option<&str> {
        self.hands_over.as_deref()
    }

    /// The save under way has not ended in time: it is given up on every node, and those that kept it are left out.
    fn give_up_save(&mut self, after_s: u64) {
        let Some(saving) = self.saving.take() else { return };
        saving.give_up.abort();
        self.others.give_up_save();
        self.node.gives_up_save();
        let message = format!("a save that was to be finished did not end in {after_s} s, and was given up");
        self.reporter.event(&report::Event::Warning { message });
        let mut standing = saving.standing.borrow().clone();
        if !self.holdup.suspects().missing.is_empty() {
            standing = self.holdup.suspects();
        }
        if let Some(group) = self.group.as_ref().filter(|_| !self.others.has_lost()) {
            let verdict = group.given_up(&standing);
            // The generation ends anyway.
            let _ = self.obey(verdict, |_, _| Reason::Unfinished(after_s).to_string());
        }
    }

    /// Performs all of them; returns the immediate answers, or how the generation has ended.
    pub fn perform(&mut self, effects: Effects) -> ControlFlow<Result<End>, Vec<Event>> {
        let (list, end) = effects.into_parts();
        let answers = list.into_iter().filter_map(|effect| self.perform_one(effect)).collect();
        match end {
            Some(end) => ControlFlow::Break(end),
            None => ControlFlow::Continue(answers),
        }
    }

    fn perform_one(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Nodes(order) => {
                self.killed |= matches!(order, Order::Kill);
                self.times(&order);
                self.others.order(&order);
                return self.node.perform(order).and_then(|answer| self.others.own(answer));
            }
            Effect::Vouch { step, generation } => self.retention.restored(step, generation),
            Effect::Upload(transfer) => return self.upload(transfer).unwrap_or_else(|error| Some(Event::Lost(error))),
            Effect::Cost(cost) => {
                if let Some(saving) = &self.saving {
                    saving.cost.send_replace(cost);
                }
            }
            Effect::Retry { slot, after } => {
                let later = self.senders.later.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    let _ = later.send(Event::Retry { slot });
                });
            }
            Effect::Look => self.look(),
            Effect::Note(record) => self.note(record),
            Effect::Hush => self.hush(),
            Effect::Busy(busy) => self.retention.busy(busy),
            Effect::Prune => self.retention.start(),
            Effect::GiveUpSave { after_s } => self.give_up_save(after_s),
            Effect::LeaveOut { nodes, why } => self.others.leave_out(&nodes, &why),
            Effect::Report(event) => {
                self.recorder.hear(&event, jiff::Timestamp::now().as_millisecond());
                self.reporter.event(&event);
            }
            Effect::Log(line) => log(line),
        }
        None
    }

    /// Every node puts its part; the leader commits when all have. After the loss of a node the save has failed at
    /// once: nobody puts anything.
    fn upload(&mut self, transfer: Transfer) -> Result<Option<Event>> {
        let Transfer { step, slot, figures, validation_loss, cost, taken, priority } = transfer;
        self.holdup.begins(step);
        let (index, mut expected) = self.node.outline()?;
        let small = self.start.workload.small_files(step, index)?;
        expected.extend(small.iter().map(|(name, _)| name.clone()));
        let attempt = AttemptId::random();
        let (says, puts) = mpsc::unbounded_channel();
        let part = Part { attempt: attempt.clone(), step, slot, priority, small };
        let whole =
            Whole { expected: expected.clone(), loss: figures.loss, validation_loss, metrics: figures.metrics.clone() };
        if let Err(error) = self.others.put(&part, whole, &says) {
            return Ok(Some(Event::Save(SaveEvent::Ended { step, slot, result: Err(error) })));
        }
        self.node.put(part, says)?;
        let mut context = self.start.upload.clone();
        context.run = context.run.at_priority(priority);
        let taken = self.began + taken;
        let (stands, standing) = watch::channel(Standing::of(context.members.clone()));
        let (cost, costs) = watch::channel(cost);
        let snapshot = Snapshot {
            attempt,
            step,
            slot,
            expected,
            figures,
            validation_loss,
            cost: costs,
            taken,
            standing: stands,
            recorder: self.recorder.clone(),
        };
        let give_up = upload::start(context, snapshot, puts, self.senders.saves.clone());
        self.saving = Some(Saving { cost, give_up, standing });
        Ok(None)
    }

    fn look(&mut self) {
        let (journal, run) = (self.start.upload.journal.clone(), self.start.upload.run.clone());
        let (me, generation) = (self.start.upload.node.clone(), self.start.upload.generation);
        let later = self.senders.later.clone();
        let look = tokio::spawn(async move {
            if let Some(error) = fence::look_once(&journal, &run, &me, generation).await {
                let _ = later.send(Event::Lost(error));
            }
        });
        self.looking = Some(look.abort_handle());
    }

    /// In the background: neither the drain nor the commit at its end waits for it. If the record lands after it was
    /// given up, the next append simply reads one more record before its own.
    fn note(&mut self, record: Record) {
        let journal = self.start.upload.journal.clone();
        self.notes.spawn(async move {
            if let Err(error) = journal.append_if(Urgency::Notice, record, |_| true).await {
                tracing::debug!(%error, "notice not written to the journal");
            }
        });
    }

    fn hush(&mut self) {
        if let Some(looking) = self.looking.take() {
            looking.abort();
        }
        self.retention.hush();
    }

    /// What has become of the other nodes.
    pub fn tells(&self, members: &mut Members) {
        self.others.tells(members);
        (members.hands_over, members.blamed) = (self.hands_over.clone(), self.blamed.clone());
    }

    /// The nodes whose workers may go on in the next generation, if the group has stopped after a step that is
    /// committed. A node that is alone forms no other one.
    fn who_stays(&self, end: &Result<End>, ended: &Members) -> Vec<NodeId> {
        let Ok(End::Stopped(stopped)) = end else { return Vec::new() };
        let saved = stopped.committed >= stopped.step && self.node.has_stopped_after(stopped.step);
        if self.group.is_none() || !saved {
            return Vec::new();
        }
        let upload::Context { members, node, .. } = &self.start.upload;
        let is_lost = |node: &NodeId| ended.parted.iter().any(|(lost, _)| lost == node);
        let leaves = |one: &NodeId| ended.leaving.contains(one) || (ended.asked_here && one == node);
        members.iter().filter(|node| !leaves(node) && !is_lost(node)).cloned().collect()
    }

    /// Ends all work under way. Waits until the workers are gone, unless something is more urgent: then the rest is
    /// returned, with the workers if they may go on in the next generation. `members`: why it ends, as far as its nodes
    /// are the reason.
    pub async fn end(mut self, end: &Result<End>, members: &Members) -> Result<Option<Left>> {
        let parting = Parting::of(end);
        let ends_the_run = members.ends_the_run;
        let stay = if ends_the_run { Vec::new() } else { self.who_stays(end, members) };
        let is_one = stay.contains(&self.start.upload.node);
        let kept =
            if is_one && self.hands_over.is_none() && self.blamed.is_none() { self.node.keeps_workers() } else { None };
        self.hush();
        self.node.stops_fetching();
        if parting.gives_up_save || self.hands_over.is_some() {
            if let Some(saving) = self.saving.take() {
                saving.give_up.abort();
            }
            self.others.give_up_save();
            self.node.gives_up_save();
            let written = async { while self.notes.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(NOTED, written).await;
            self.notes.shutdown().await;
        }
        if let Some(why) = &self.blamed {
            self.others.hands_over(why);
        }
        // Whoever leads next records the end of the run: this node can't, if it hands over.
        self.others.over(parting.dismisses, ends_the_run && self.hands_over.is_none(), &stay);
        let gone = self.node.ends_workers(parting.dismisses);
        if parting.leaves_rest {
            let leaving = tokio::spawn(gone);
            let (leaving, retention) = (Some(leaving), Some(self.retention));
            return Ok(Some(Left { leaving, retention, kept, ..Left::default() }));
        }
        // The next generation needs their devices' memory, and the slots for itself.
        let gone = gone.await;
        if matches!(end, Ok(End::Died { .. } | End::Damaged { .. })) {
            self.node.leaves_slots(gone).await?;
        }
        Ok(None)
    }
}

fn log(line: Log) {
    match line {
        Log::Built { device, parameters, workers } => tracing::info!(device, parameters, workers, "model built"),
        Log::Chosen(Choice { mode, overlap_s, blocking_s, copy_s }) => {
            let how = match mode {
                CaptureMode::Overlap | CaptureMode::Hasty => "captures run beside the next step",
                CaptureMode::Blocking => "captures hold the loop up",
            };
            match blocking_s {
                Some(blocking_s) => tracing::info!(overlap_s, blocking_s, copy_s, "{how}: measured to cost less"),
                None => tracing::info!(overlap_s, copy_s, "{how}: a save costs no more than the bare copy"),
            }
        }
        Log::TrainsOn(reason) => tracing::info!("{reason}"),
        Log::Haste(Change { hasty: true, lag_s, interval_s }) => tracing::info!(
            lag_s,
            interval_s,
            "saves become durable too late for the time between them: they no longer yield to training"
        ),
        Log::Haste(Change { lag_s, interval_s, .. }) => {
            tracing::info!(lag_s, interval_s, "saves have time: they yield to training again");
        }
    }
}

#[cfg(test)]
mod tests;
