//! States built by hand, the time moved by adding to it: no process, no store, no runtime.
//!
//! The table in the header of `phase.rs` is compared with what happens ([`table`]); all pairs of misfortunes stand in
//! [`pairs`]; ranks whose states differ in [`differ`]; how long a lost group goes on saving in [`mod@salvage`]; runs
//! that stop early in [`stops`]; what a start is spent on in [`mod@start`]; what needs more than two events has a test
//! of its own.

mod differ;
mod one_slot;
mod pairs;
mod salvage;
mod start;
mod stops;
mod table;

use super::*;
use crate::{
    agent::{
        drain::estimate::Estimates,
        effects::{Effect, Log, Order},
        generation::{Source, Stopped},
        save::{
            scheduler::{Scheduler, Setup},
            upload::Saved,
        },
    },
    checkpoint::testing::config,
    config::Cadence,
    ids::{Fingerprint, NodeId, NodeRanks, WorldSize},
    journal::{Committed, DrainPlan, JournalError, Metrics, SaveCost},
    notice::Confidence,
    protocol::{FromWorker, HeldOutSum, StartSplit, StepReport},
    storage::{Adrift, Priority, StorageError},
};
use std::time::Duration;

const RANKS: [Rank; 2] = [Rank(0), Rank(1)];
/// Bytes of one save.
const BYTES: u64 = 1000;
const OUTLINE: Outline = Outline { workers: 2, last: Step(100), validated_every: None, tokens: 32, flops: 0 };

/// A machine and its time.
struct Rig {
    machine: StateMachine,
    now: Moment,
    /// Of the last question to the ranks.
    ticket: u64,
}

impl Rig {
    fn feed(&mut self, event: Event) -> Effects {
        let effects = self.machine.handle(event, self.now);
        for effect in effects.list() {
            if let Effect::Nodes(Order::TellAll(ToWorker::Freeze { ticket })) = effect {
                self.ticket = *ticket;
            }
        }
        effects
    }

    fn feed_all(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            let _ = self.feed(event);
        }
    }

    fn pass(&mut self, seconds: f64) -> &mut Self {
        self.now += Duration::from_secs_f64(seconds);
        self
    }

    fn frozen(&mut self, rank: Rank, started: u64) -> Effects {
        let ticket = self.ticket;
        self.feed(said(rank, FromWorker::Frozen { ticket, started: Step(started) }))
    }

    fn phase(&self) -> &'static str {
        match self.machine.phase {
            Phase::Loading(_) => "Loading",
            Phase::Training(_) => "Training",
            Phase::Draining(_) => "Draining",
            Phase::Salvaging(_) => "Salvaging",
            Phase::Ended => "Ended",
        }
    }

    fn training(&self) -> &Training {
        match &self.machine.phase {
            Phase::Training(training)
            | Phase::Draining(Draining { training, .. })
            | Phase::Salvaging(Salvage { training, .. }) => training,
            other => panic!("{other:?}"),
        }
    }

    fn planned(&self) -> DrainPlan {
        match &self.machine.phase {
            Phase::Draining(Draining { planned, .. }) => planned.plan,
            other => panic!("{other:?}"),
        }
    }
}

fn settings(load: Load) -> Settings {
    let mut config = config();
    config.checkpoint.every = Cadence::Steps(10);
    config.notice.train_in_spare_time = true;
    let store_host = std::net::Ipv4Addr::LOCALHOST.into();
    let node = |name| NodeId::new(name).unwrap();
    let ranks = |first| NodeRanks { first: Rank(first), workers: 1, world: WorldSize(2) };
    Settings {
        outline: OUTLINE,
        generation: Generation(3),
        config,
        load,
        stopping: Stopping::of(&crate::checkpoint::testing::config(), None),
        measured: Measured::NOTHING,
        store_host,
        seats: Seats::new(node("leader"), ranks(0), &[(node("member"), ranks(1))]),
        doubted: false,
        finishing: crate::agent::finish::FINISHING,
        first_step: crate::agent::pace::LEAST,
        invited: Duration::from_millis(250),
    }
}

/// Copying takes half a second, a save 11 s.
fn estimates() -> Estimates {
    let mut estimates = Estimates::default();
    for _ in 0..20 {
        estimates.copy.push(0.5);
        estimates.saved(BYTES, 10.0, 1.0);
    }
    estimates
}

/// The slots are laid out, a checkpoint of step 5 has been fetched, and rank 0 has loaded it.
fn loading() -> Rig {
    let mut rig = fetching();
    rig.feed_all([said(Rank(0), FromWorker::Ready { fingerprint: None, split: StartSplit::default() })]);
    rig
}

/// The same, and no rank has loaded it.
fn fetching() -> Rig {
    let from = Source::Store { folder: "folder".into(), files: Vec::new() };
    let load = Load::Checkpoint { step: Step(5), generation: Generation(2), from };
    let machine = StateMachine::new(
        settings(load),
        estimates(),
        Loading::new(WorldSize(2), Incoming::UnderWay(0, vec![(0, BYTES)])),
    );
    let mut rig = Rig { machine, now: Moment::ZERO, ticket: 0 };
    rig.feed_all(RANKS.map(built));
    rig.feed_all([Event::LaidOut { bytes: BYTES }, fetched()]);
    rig
}

/// Both ranks have finished step 12, one a second. Step 10 is being uploaded; step 20 is to be captured.
fn training() -> Rig {
    training_of(settings(Load::Nothing))
}

/// The same of a run with these settings.
fn training_of(settings: Settings) -> Rig {
    let setup = Setup {
        ranks: 2,
        slots: settings.config.checkpoint.slots,
        done: Step(0),
        last: Step(100),
        cadence: settings.config.checkpoint.every,
        ranked: None,
        held: None,
    };
    let mut scheduler = Scheduler::new(setup, Measured::NOTHING, Moment::ZERO);
    assert_eq!(scheduler.first_orders(Moment::ZERO).len(), usize::from(setup.slots.get()));
    let training = Training::begin(&settings, scheduler, BYTES, Moment::ZERO);
    let shared = Shared { settings, estimates: estimates(), looked: Moment::ZERO, noted: 0, differed: None };
    let machine = StateMachine { shared, phase: Phase::Training(training) };
    let mut rig = Rig { machine, now: Moment::ZERO, ticket: 0 };
    for step in 1..=12 {
        rig.pass(1.0).feed_all(RANKS.map(|rank| finished(rank, step)));
        if step == 10 {
            rig.feed_all(RANKS.map(|rank| captured(rank, 10, 0)));
        }
    }
    assert!(rig.training().ledger.is_uploading());
    rig
}

/// A notice leaves 25 s: a full save is planned, ranks are asked where they are, and rank 0 has answered.
fn draining() -> Rig {
    let mut rig = training();
    let _ = rig.feed(spot(25));
    assert_eq!(rig.planned(), DrainPlan::FullSave);
    let _ = rig.frozen(Rank(0), 12);
    rig
}

/// Rank 1 is gone; step 10 is still being uploaded.
fn salvage() -> Rig {
    let mut rig = training();
    let _ = rig.feed(exited());
    rig
}

fn notice(source: &'static str, kind: notice::Kind, deadline: Option<u64>) -> Event {
    let deadline = deadline.map(Duration::from_secs);
    Event::Notice(Notice { kind, deadline, source, id: "1".into(), confidence: Confidence::Certain })
}

fn spot(seconds: u64) -> Event {
    notice("aws-spot", notice::Kind::Interruption, Some(seconds))
}

fn sigterm() -> Event {
    notice("sigterm", notice::Kind::Stop, None)
}

fn rebalance() -> Event {
    notice("aws-rebalance", notice::Kind::Rebalance, None)
}

fn said(rank: Rank, message: FromWorker) -> Event {
    Event::Worker(WorkerEvent::Message(rank, message))
}

fn built(rank: Rank) -> Event {
    said(rank, FromWorker::Built { tensors: Vec::new(), device: "cpu".into(), parameters: 7 })
}

fn exited() -> Event {
    Event::Worker(WorkerEvent::Exited(Rank(1), "was killed".into()))
}

fn failed(permanent: bool) -> Event {
    said(Rank(1), FromWorker::Failed { message: "it broke".into(), hint: None, permanent })
}

fn fetched() -> Event {
    Event::Fetched(Ok(Fetched { bytes: BYTES, stored: BYTES, lent: 0, seconds: 1.0 }))
}

fn report(rank: Rank, step: u64, loss: f64) -> Event {
    let report = StepReport { step: Step(step), loss, grad_norm: 1.0, lr: 1e-3, step_s: 1.0, ..StepReport::default() };
    said(rank, FromWorker::Step(report))
}

fn finished(rank: Rank, step: u64) -> Event {
    report(rank, step, 2.0)
}

fn captured(rank: Rank, step: u64, slot: u8) -> Event {
    said(rank, FromWorker::Captured { step: Step(step), slot, copy_s: 0.5, fingerprint: None })
}

/// The same, with the rank as its fingerprint.
fn captured_other(rank: Rank, step: u64, slot: u8) -> Event {
    let fingerprint = Some(Fingerprint(rank.get().into()));
    said(rank, FromWorker::Captured { step: Step(step), slot, copy_s: 0.5, fingerprint })
}

/// One rank's share of the measurement of a state: two targets of this loss.
fn validated(rank: Rank, step: u64, loss: f64) -> Event {
    let sum = HeldOutSum { loss: 2.0 * loss, targets: 2, ..HeldOutSum::of("") };
    said(rank, FromWorker::Validated { step: Step(step), sums: vec![sum] })
}

fn stopped(rank: Rank, step: u64) -> Event {
    said(rank, FromWorker::Stopped { step: Step(step) })
}

fn saved(step: u64, slot: u8) -> Event {
    let committed = Committed {
        step: Step(step),
        generation: Generation(3),
        manifest: "manifest".into(),
        manifest_crc64: "0".into(),
        bytes: BYTES,
        loss: Some(2.0),
        validation_loss: None,
        metrics: Metrics::new(),
        cost: SaveCost { durable_s: 0.5, ..SaveCost::default() },
    };
    Event::Save(SaveEvent::Ended { step: Step(step), slot, result: Ok(Saved { committed, checksums: Vec::new() }) })
}

fn save_failed(step: u64, slot: u8) -> Event {
    let result = Err(Error::new(Kind::Unavailable, "the store is away"));
    Event::Save(SaveEvent::Ended { step: Step(step), slot, result })
}

/// A folder that will not be cured while this process waits.
fn save_refused(step: u64, slot: u8) -> Event {
    let key = "file:///runs/r/checkpoints/x".to_owned();
    let error = StorageError::Permission { operation: "upload", key, source: "(os error 30)".into() };
    let result = Err(CheckpointError::from(error).into());
    Event::Save(SaveEvent::Ended { step: Step(step), slot, result })
}

fn lost() -> Event {
    Event::Lost(Error::new(Kind::Fenced, "another node has the run"))
}

/// One effect in a few words.
fn words(effect: &Effect) -> String {
    match effect {
        Effect::Nodes(Order::TellAll(message)) => match message {
            ToWorker::Freeze { .. } => "freeze".into(),
            ToWorker::Thaw { stop_after: None, .. } => "thaw".into(),
            ToWorker::Thaw { stop_after: Some(step), .. } => format!("thaw until {step}"),
            ToWorker::Go { measure: false, .. } => "go".into(),
            ToWorker::Go { measure: true, .. } => "measure and go".into(),
            ToWorker::Proceed { step } => format!("proceed from {step}"),
            ToWorker::Restore { .. } => "restore".into(),
            ToWorker::Peers { .. } => "peers".into(),
            other => panic!("{other:?}"),
        },
        Effect::Nodes(Order::LayOut(_)) => "lay out".into(),
        Effect::Nodes(Order::Received) => "hold 5".into(),
        Effect::Vouch { step, .. } => format!("vouch {step}"),
        Effect::Upload(transfer) => format!("upload {}", transfer.step),
        Effect::Cost(_) => "cost".into(),
        Effect::Nodes(Order::Hold { step, .. }) => format!("hold {step}"),
        Effect::Retry { slot, .. } => format!("retry slot {slot}"),
        Effect::Look => "look".into(),
        Effect::Note(_) => "note".into(),
        Effect::Hush => "hush".into(),
        Effect::Busy(true) => "busy".into(),
        Effect::Busy(false) => "idle".into(),
        Effect::Prune => "prune".into(),
        Effect::Nodes(Order::Kill) => "kill".into(),
        Effect::Report(event) => {
            let name = serde_json::to_value(event).unwrap()["event"].as_str().unwrap().to_owned();
            format!("report {name}")
        }
        Effect::GiveUpSave { .. } => "give up the save".into(),
        Effect::LeaveOut { nodes, .. } => format!("leave out {}", nodes.len()),
        Effect::Log(Log::Built { .. } | Log::Chosen(_) | Log::TrainsOn(_) | Log::Haste(_)) => "log".into(),
    }
}

fn list(effects: &Effects) -> String {
    effects.list().iter().map(words).collect::<Vec<_>>().join(", ")
}

/// How it has ended, in a few words.
fn ended(effects: &Effects) -> Option<String> {
    Some(match effects.end()? {
        Ok(End::Completed { loss, early: None, .. }) => format!("completed with {}", loss.unwrap_or(f64::NAN)),
        Ok(End::Completed { step, early: Some(why), .. }) => format!("stopped early after {step}: {why}"),
        Ok(End::Stopped(Stopped { verdict, .. })) => format!("stopped: {verdict}"),
        Ok(End::Died { step, reason }) => format!("died after {step}: {reason}"),
        Ok(End::Damaged { object, .. }) => format!("damaged: {object}"),
        Ok(End::Diverged { step, .. }) => format!("diverged at {step}"),
        Err(error) => format!("{:?}: {error}", error.kind()),
    })
}

#[test]
fn a_notice_meets_a_failed_save_and_all_is_saved_all_the_same() {
    let mut rig = training();
    let effects = rig.feed(save_failed(10, 0));
    let [Effect::Busy(false), Effect::Report(report::Event::Warning { message }), Effect::Retry { slot: 0, after }] =
        effects.list()
    else {
        panic!("{effects:?}")
    };
    assert_eq!(*after, Duration::from_millis(500));
    assert_eq!(
        message,
        "save of step 10 failed and is tried again; no checkpoint since the start 12.0 s ago: the store is away"
    );
    // The pause is not over when the notice comes, which ends it.
    let effects = rig.feed(spot(25));
    assert_eq!(list(&effects), "report notice, hush, note, report drain, hush, freeze, hush, upload 10, busy");
    let urgent = |effect: &Effect| matches!(effect, Effect::Upload(transfer) if transfer.priority == Priority::Urgent);
    assert!(effects.list().iter().any(urgent), "it may be all that is left");
    assert_eq!(list(&rig.pass(0.5).feed(Event::Retry { slot: 0 })), "");
    let _ = rig.frozen(Rank(0), 12);
    assert_eq!(list(&rig.frozen(Rank(1), 13)), "thaw until 13");
    rig.feed_all(RANKS.map(|rank| finished(rank, 13)));
    rig.feed_all(RANKS.map(|rank| captured(rank, 13, 1)));
    rig.feed_all(RANKS.map(|rank| stopped(rank, 13)));
    assert_eq!(list(&rig.feed(saved(10, 0))), "idle, hold 10, report checkpoint, hush, upload 13, busy");
    let effects = rig.pass(11.0).feed(saved(13, 1));
    assert_eq!(list(&effects), "idle, hold 13, report checkpoint");
    let Some(Ok(End::Stopped(Stopped { step: Step(13), committed: Step(13), verdict, drain: Some(drain), .. }))) =
        effects.end()
    else {
        panic!("{effects:?}")
    };
    assert_eq!(verdict, "the last finished step is committed");
    assert_eq!((drain.plan, drain.planned_s, drain.actual_s), (DrainPlan::FullSave, Some(0.0), Some(11.5)));
}

#[test]
fn what_all_ranks_had_captured_is_committed_before_a_death_is_acted_on() {
    let mut rig = training();
    rig.feed_all((13..=20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
    rig.feed_all(RANKS.map(|rank| captured(rank, 20, 1)));
    assert_eq!(list(&rig.feed(exited())), "kill");
    // The newer one waits until the other has ended. Nobody hears the question that would come before the next save.
    let effects = rig.feed(saved(10, 0));
    assert_eq!(list(&effects), "idle, hold 10, report checkpoint, prune, hush, upload 20, busy, freeze, kill");
    assert_eq!(list(&rig.feed(save_failed(20, 1))), "idle, report warning, hush, upload 20, busy, kill");
    let effects = rig.feed(saved(20, 1));
    assert_eq!(ended(&effects).unwrap(), "died after 20: worker 1 was killed");
    assert_eq!(rig.phase(), "Ended");
}

#[test]
fn a_snapshot_whose_upload_had_not_begun_when_the_workers_died_is_tried_once() {
    let mut rig = training();
    let _ = rig.feed(save_failed(10, 0));
    assert_eq!(list(&rig.feed(exited())), "kill, hush, upload 10, busy");
    let effects = rig.feed(save_failed(10, 0));
    assert_eq!(ended(&effects).unwrap(), "died after 12: worker 1 was killed");
}

#[test]
fn the_word_of_a_worker_is_acted_on_when_its_process_has_ended() {
    let mut rig = training();
    assert_eq!(list(&rig.feed(saved(10, 0))), "idle, hold 10, report checkpoint, prune, freeze");
    rig.feed_all((13..=20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
    let _ = rig.feed(captured(Rank(1), 20, 1));
    assert_eq!(list(&rig.feed(failed(true))), "");
    assert_eq!(rig.phase(), "Salvaging");
    // Rank 0 finishes its copy: the snapshot is whole.
    assert_eq!(list(&rig.feed(captured(Rank(0), 20, 1))), "hush, upload 20, busy");
    assert_eq!(list(&rig.feed(exited())), "kill");
    // The first reason counts.
    let effects = rig.feed(saved(20, 1));
    assert_eq!(ended(&effects).unwrap(), "Config: worker 1: it broke");
    // Without a process's end a tick will do.
    for rig in [loading, training] {
        let mut rig = rig();
        if rig.phase() == "Training" {
            let _ = rig.feed(saved(10, 0));
        }
        let _ = rig.feed(failed(false));
        assert!(ended(&rig.feed(Event::Tick)).unwrap().ends_with(": worker 1: it broke"));
    }
}

#[test]
fn a_loss_that_is_not_a_number_ends_the_run_after_what_was_good_is_committed() {
    let mut rig = training();
    let _ = rig.feed(finished(Rank(0), 13));
    let effects = rig.feed(report(Rank(1), 13, f64::NAN));
    assert_eq!(list(&effects), "kill", "nothing is told of step 13");
    let effects = rig.feed(saved(10, 0));
    assert!(matches!(effects.end(), Some(Ok(End::Diverged { step: Step(13), .. }))), "{effects:?}");
}

/// All ranks captured the step whose numbers are wrong, while an earlier upload was under way.
#[test]
fn the_state_of_a_step_that_is_not_a_number_is_never_committed() {
    let mut rig = training();
    rig.feed_all((13..20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
    rig.feed_all([finished(Rank(0), 20), captured(Rank(0), 20, 1)]);
    let effects = rig.feed(report(Rank(1), 20, f64::NAN));
    assert_eq!(list(&effects), "kill");
    // Sent before the worker was killed.
    let _ = rig.feed(captured(Rank(1), 20, 1));
    let effects = rig.feed(saved(10, 0));
    assert!(!list(&effects).contains("upload"), "{effects:?}");
    assert_eq!(ended(&effects).unwrap(), "diverged at 20");
}

#[test]
fn time_to_spare_is_trained_in_after_one_save_as_an_insurance() {
    let mut rig = training();
    let effects = rig.feed(spot(120));
    assert_eq!(list(&effects), "report notice, hush, note, log, freeze");
    assert_eq!(rig.phase(), "Training");
    let _ = rig.frozen(Rank(0), 12);
    assert_eq!(list(&rig.frozen(Rank(1), 12)), "thaw");
    rig.feed_all(RANKS.map(|rank| captured(rank, 12, 1)));
    // Nothing is deleted while a notice stands.
    assert_eq!(list(&rig.pass(9.0).feed(saved(10, 0))), "idle, hold 10, report checkpoint, upload 12, busy, freeze");
    for _ in 0..10 {
        let effects = rig.pass(5.0).feed(Event::Tick);
        assert!(["look", ""].contains(&&*list(&effects)), "asked for once: {effects:?}");
    }
    assert_eq!(rig.phase(), "Training");
    // Two whole saves are held back.
    let effects = rig.pass(36.0).feed(Event::Tick);
    assert!(list(&effects).ends_with("report drain, hush"), "{effects:?}");
    assert_eq!(rig.phase(), "Draining");
    let _ = rig.pass(5.0).feed(Event::Tick);
    let effects = rig.feed(Event::Tick);
    assert_eq!(list(&effects), "", "the journal is not looked at any more");
}

#[test]
fn a_nearer_deadline_changes_the_plan_and_the_same_plan_is_told_once() {
    let mut rig = draining();
    let effects = rig.feed(spot(24));
    assert_eq!(list(&effects), "report notice, hush, note", "the same plan");
    // 1 s of the upload had passed: 10 s are left of it.
    let effects = rig.feed(spot(12));
    assert_eq!(list(&effects), "report notice, hush, note, report drain");
    assert_eq!(rig.planned(), DrainPlan::FinishInFlight);
    assert_eq!(list(&rig.frozen(Rank(1), 13)), "thaw until 13");
    rig.feed_all(RANKS.map(|rank| finished(rank, 13)));
    rig.feed_all(RANKS.map(|rank| stopped(rank, 13)));
    let effects = rig.feed(saved(10, 0));
    let verdict = "stopped: there was time for the save of step 10, not for one of step 13";
    assert_eq!(ended(&effects).unwrap(), verdict);
    let mut rig = draining();
    let effects = rig.feed(spot(2));
    assert!(ended(&effects).unwrap().starts_with("stopped: 2.00 s left, the last save takes at least "), "{effects:?}");
    let Some(Ok(End::Stopped(Stopped { drain: Some(drain), .. }))) = effects.end() else { panic!("{effects:?}") };
    assert_eq!(drain.plan, DrainPlan::StopEarly);
}

#[test]
fn what_is_not_durable_when_the_last_words_are_due_is_lost() {
    for state in [draining, || {
        let mut rig = draining();
        let _ = rig.feed(exited());
        rig
    }] {
        let mut rig = state();
        let _ = rig.pass(23.4).feed(Event::Tick);
        assert_ne!(rig.phase(), "Ended");
        let effects = rig.pass(0.2).feed(Event::Tick);
        assert_eq!(ended(&effects).unwrap(), "stopped: the time was up before step 12 was durable");
    }
}

#[test]
fn a_save_that_nobody_can_commit_ends_the_generation_in_every_phase() {
    for state in [training, draining, salvage] {
        let mut rig = state();
        let result = Err(Error::from(JournalError::NoWriter));
        let effects = rig.feed(Event::Save(SaveEvent::Ended { step: Step(10), slot: 0, result }));
        assert_eq!(ended(&effects).as_deref(), Some("Bug: save step 10: the task that writes the journal has ended"));
    }
}

/// The last steps can't be saved; the only snapshot there is gets the time that is left.
#[test]
fn the_save_that_a_drain_finishes_is_tried_again_when_it_fails() {
    let mut rig = draining();
    let _ = rig.feed(spot(12));
    assert_eq!(rig.planned(), DrainPlan::FinishInFlight);
    assert_eq!(list(&rig.feed(save_failed(10, 0))), "idle, report warning, retry slot 0");
    assert_eq!(list(&rig.feed(Event::Retry { slot: 0 })), "hush, upload 10, busy");
    // It does not depend on the ranks, whenever they stop.
    assert_eq!(list(&rig.frozen(Rank(1), 13)), "thaw until 13");
    rig.feed_all(RANKS.map(|rank| finished(rank, 13)));
    assert_eq!(list(&rig.feed(save_failed(10, 0))), "idle, report warning, retry slot 0");
    rig.feed_all(RANKS.map(|rank| stopped(rank, 13)));
    assert_eq!(ended(&rig.feed(Event::Tick)), None, "it is still to be tried again");
    assert_eq!(list(&rig.feed(Event::Retry { slot: 0 })), "hush, upload 10, busy");
    let effects = rig.feed(saved(10, 0));
    let verdict = "stopped: there was time for the save of step 10, not for one of step 13";
    assert_eq!(ended(&effects).unwrap(), verdict);
    // And it has a bound.
    let mut rig = draining();
    let _ = rig.feed(spot(12));
    let _ = rig.frozen(Rank(1), 13);
    rig.feed_all(RANKS.map(|rank| finished(rank, 13)));
    rig.feed_all(RANKS.map(|rank| stopped(rank, 13)));
    for _ in 1..8 {
        assert_eq!(ended(&rig.feed(save_failed(10, 0))), None);
        let _ = rig.feed(Event::Retry { slot: 0 });
    }
    let verdict = "stopped: the save under way failed, and there was no time for one of step 13: the store is away";
    assert_eq!(ended(&rig.feed(save_failed(10, 0))).unwrap(), verdict);
}

#[test]
fn the_same_signal_again_asks_to_leave_at_once_wherever_it_comes() {
    for state in [training, draining, salvage] {
        let mut rig = state();
        assert_eq!(ended(&rig.feed(sigterm())), None);
        assert_eq!(ended(&rig.feed(sigterm())), None, "an echo");
        let effects = rig.pass(1.5).feed(sigterm());
        assert_eq!(ended(&effects).unwrap(), "stopped: left at once on a second sigterm");
    }
}

#[test]
fn a_drain_without_a_deadline_ends_when_ranks_do_not_stop() {
    let mut rig = training();
    let _ = rig.feed(sigterm());
    assert_eq!(rig.phase(), "Draining");
    let _ = rig.feed(saved(10, 0));
    let effects = rig.pass(119.0).feed(Event::Tick);
    assert_eq!(ended(&effects), None);
    let effects = rig.pass(1.0).feed(Event::Tick);
    assert_eq!(list(&effects), "kill");
    let verdict = "stopped: workers died after the notice: no step was finished for 120 s after the notice";
    assert_eq!(ended(&effects).unwrap(), verdict);
}

#[test]
fn a_hang_is_reported_less_and_less_often_and_ended_if_configured() {
    let mut rig = training();
    rig.machine.shared.settings.config.restart.hang = Some(Duration::from_secs(900));
    let _ = rig.feed(saved(10, 0));
    assert_eq!(list(&rig.pass(599.0).feed(Event::Tick)), "look");
    assert_eq!(list(&rig.pass(1.0).feed(Event::Tick)), "report no_progress");
    assert_eq!(list(&rig.pass(1.0).feed(Event::Tick)), "");
    let effects = rig.pass(299.0).feed(Event::Tick);
    assert_eq!(ended(&effects).unwrap(), "died after 12: no step was finished for 900 s after step 12");
}

#[test]
fn the_last_save_is_given_up_after_many_tries() {
    let away: fn(u64, u8) -> Event = save_failed;
    const REFUSED: &str = "store refused upload of file:///runs/r/checkpoints/x: no permission: (os error 30)";
    for (asked, fails, tries, end) in [
        (false, away, 8, "Unavailable: save the last step, 13: the store is away".to_owned()),
        (true, away, 8, "stopped: the last step could not be saved: the store is away".to_owned()),
        (false, save_refused, 8, format!("Permission: save the last step, 13: {REFUSED}")),
        // Somebody waits, and no try will succeed.
        (true, save_refused, 3, format!("stopped: the last step could not be saved: {REFUSED}")),
    ] {
        let mut rig = training();
        let _ = rig.feed(saved(10, 0));
        if asked {
            let _ = rig.feed(sigterm());
        } else {
            rig.machine.shared.settings.outline.last = Step(13);
            let _ = rig.feed(rebalance());
        }
        let _ = rig.frozen(Rank(0), 13);
        let _ = rig.frozen(Rank(1), 13);
        rig.feed_all(RANKS.map(|rank| finished(rank, 13)));
        rig.feed_all(RANKS.map(|rank| stopped(rank, 13)));
        rig.feed_all(RANKS.map(|rank| captured(rank, 13, 1)));
        for _ in 1..tries {
            assert_eq!(ended(&rig.feed(fails(13, 1))), None);
            let _ = rig.feed(Event::Retry { slot: 1 });
        }
        assert_eq!(ended(&rig.feed(fails(13, 1))).unwrap(), end);
    }
}

/// All ranks have finished the last step, and it is being uploaded.
fn uploading_the_last_step() -> Rig {
    let mut rig = training();
    let _ = rig.feed(saved(10, 0));
    rig.feed_all((13..=20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
    rig.feed_all(RANKS.map(|rank| captured(rank, 20, 1)));
    let _ = rig.feed(saved(20, 1));
    rig.feed_all((21..=100).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
    rig.feed_all(RANKS.map(|rank| stopped(rank, 100)));
    let _ = rig.frozen(Rank(0), 100);
    assert_eq!(list(&rig.frozen(Rank(1), 100)), "thaw");
    let _ = rig.feed(captured(Rank(0), 100, 0));
    let effects = rig.feed(captured(Rank(1), 100, 0));
    assert_eq!(list(&effects), "hush, upload 100, busy", "nobody trains any more");
    rig
}

#[test]
fn a_run_that_saves_its_last_step_is_complete() {
    assert_eq!(ended(&uploading_the_last_step().feed(saved(100, 0))).unwrap(), "completed with 2");
}

#[test]
fn ranks_that_differ_in_their_state_are_a_bug() {
    let mut rig = loading();
    let dtype = crate::snapshot::plan::Dtype::F32;
    let kind = crate::snapshot::plan::ShardKind::Model;
    let tensors = vec![crate::snapshot::plan::TensorSpec { name: "a".into(), dtype, shape: vec![3], kind, part: None }];
    let effects = rig.feed(said(Rank(1), FromWorker::Built { tensors, device: "cpu".into(), parameters: 7 }));
    assert_eq!(ended(&effects).unwrap(), "Bug: ranks differ in their state: 0 and 1 tensors");
}

#[test]
fn only_a_checkpoint_can_be_damaged() {
    let damaged = || Event::Fetched(Err(CheckpointError::Damaged { object: "x".into(), reason: "y".into() }));
    assert_eq!(ended(&loading().feed(damaged())).unwrap(), "damaged: x");
    let mut rig = loading();
    rig.machine.shared.settings.load = Load::Nothing;
    assert!(ended(&rig.feed(damaged())).unwrap().starts_with("Data: restore: "));
}

#[test]
fn at_most_so_many_notices_are_written_down() {
    let mut rig = training();
    let notes = (0..40).filter(|_| rig.feed(rebalance()).list().iter().any(|it| matches!(it, Effect::Note(_)))).count();
    assert_eq!(notes, 16);
}
