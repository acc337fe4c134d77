//! A run that may stop early: every rank waits with a measured state for what becomes of the run.

use super::*;
use crate::{config::EarlyStopping, journal::Stagnation};

/// Settings of a run that validates each tenth step, and stops after two validations that lower no loss.
fn careful(load: Load, loaded: Option<&Committed>) -> Settings {
    let mut settings = settings(load);
    let task = &mut settings.config.workload;
    (task.train.steps, task.data.validation_every) = (100, 10);
    task.train.early_stopping = Some(EarlyStopping { patience: 2, min_delta: 0.0 });
    settings.stopping = Stopping::of(&settings.config, loaded);
    settings
}

/// Both ranks have measured step 10; step 20 is finished and captured, and step 10 is a checkpoint.
fn measured_once() -> Rig {
    let mut rig = training_of(careful(Load::Nothing, None));
    rig.feed_all([validated(Rank(0), 10, 2.0), validated(Rank(1), 10, 2.0), saved(10, 0)]);
    // The slot of step 10 is free: step 30 will be captured into it.
    let _ = rig.frozen(Rank(0), 12);
    assert_eq!(list(&rig.frozen(Rank(1), 12)), "thaw");
    rig
}

fn measured(rig: &mut Rig, step: u64, loss: f64) -> Effects {
    rig.feed_all(RANKS.map(|rank| finished(rank, step)));
    assert_eq!(list(&rig.feed(validated(Rank(0), step, loss))), "", "the other one measures");
    rig.feed(validated(Rank(1), step, loss))
}

/// Two validations have lowered no loss since that of step 10.
fn decided() -> Rig {
    let mut rig = measured_once();
    assert_eq!(list(&measured(&mut rig, 20, 3.0)), "report validation, proceed from 20");
    rig.feed_all(RANKS.map(|rank| captured(rank, 20, 1)));
    let _ = rig.feed(saved(20, 1));
    let _ = rig.frozen(Rank(0), 21);
    assert_eq!(list(&rig.frozen(Rank(1), 21)), "thaw");
    assert_eq!(list(&measured(&mut rig, 30, 2.0)), "report validation, freeze");
    rig
}

/// The ranks have heard it, and have stopped.
fn saving() -> Rig {
    let mut rig = decided();
    let _ = rig.frozen(Rank(0), 30);
    assert_eq!(list(&rig.frozen(Rank(1), 30)), "thaw until 30");
    rig.feed_all(RANKS.map(|rank| stopped(rank, 30)));
    rig.feed_all(RANKS.map(|rank| captured(rank, 30, 0)));
    rig
}

const END: &str = "stopped early after 30: held-out loss has not fallen in 2 validations; best 2.0000 at step 10";

#[test]
fn a_run_whose_loss_falls_no_more_saves_that_very_step_and_is_complete() {
    assert_eq!(ended(&saving().feed(saved(30, 0))).unwrap(), END);
}

#[test]
fn a_checkpoint_is_recorded_with_what_was_measured_until_its_step() {
    let mut rig = saving();
    let transfer = rig.machine.handle(save_failed(30, 0), rig.now);
    assert!(list(&transfer).contains("retry"), "{transfer:?}");
    let effects = rig.feed(Event::Retry { slot: 0 });
    let transfer = effects.list().iter().find_map(|effect| match effect {
        Effect::Upload(transfer) => Some(transfer),
        _ => None,
    });
    let transfer = transfer.unwrap();
    assert_eq!(transfer.validation_loss, Some(2.0));
    let standing = Stagnation::of(&transfer.figures.metrics);
    assert_eq!(standing, Stagnation { loss: 2.0, step: Step(10), since: 2 });
}

#[test]
fn a_notice_after_the_decision_changes_nothing_of_it() {
    let mut rig = decided();
    let _ = rig.feed(sigterm());
    let _ = rig.frozen(Rank(0), 30);
    let _ = rig.frozen(Rank(1), 30);
    rig.feed_all(RANKS.map(|rank| stopped(rank, 30)));
    rig.feed_all(RANKS.map(|rank| captured(rank, 30, 0)));
    assert_eq!(ended(&rig.feed(saved(30, 0))).unwrap(), END);
}

#[test]
fn a_drain_does_not_wait_for_a_measurement_and_the_next_generation_begins_with_it() {
    let mut rig = measured_once();
    rig.feed_all(RANKS.map(|rank| finished(rank, 20)));
    let _ = rig.feed(sigterm());
    let _ = rig.frozen(Rank(0), 20);
    assert_eq!(list(&rig.frozen(Rank(1), 20)), "thaw until 20");
    rig.feed_all(RANKS.map(|rank| stopped(rank, 20)));
    rig.feed_all(RANKS.map(|rank| captured(rank, 20, 1)));
    assert!(ended(&rig.feed(saved(20, 1))).unwrap().starts_with("stopped: "));

    let before = Stagnation { loss: 2.0, step: Step(10), since: 1 };
    let load = |loaded: &Committed| {
        let from = Source::Store { folder: "folder".into(), files: Vec::new() };
        let load = Load::Checkpoint { step: loaded.step, generation: Generation(2), from };
        let mut rig = fetching();
        rig.machine.shared.settings = careful(load, Some(loaded));
        let _ = rig.feed(said(Rank(0), FromWorker::Ready { fingerprint: None, split: StartSplit::default() }));
        let effects = rig.feed(said(Rank(1), FromWorker::Ready { fingerprint: None, split: StartSplit::default() }));
        (rig, list(&effects))
    };
    let Event::Save(SaveEvent::Ended { result: Ok(Saved { mut committed, .. }), .. }) = saved(20, 0) else { panic!() };
    committed.metrics = before.figures();
    let (mut rig, effects) = load(&committed);
    assert!(effects.ends_with("measure and go"), "{effects}");
    let _ = rig.feed(validated(Rank(0), 20, 2.5));
    assert_eq!(list(&rig.feed(validated(Rank(1), 20, 2.5))), "report validation, freeze");
    let _ = rig.frozen(Rank(0), 20);
    assert_eq!(list(&rig.frozen(Rank(1), 20)), "thaw until 20");
    let _ = rig.feed(stopped(Rank(0), 20));
    let why = "stopped early after 20: held-out loss has not fallen in 2 validations; best 2.0000 at step 10";
    assert_eq!(ended(&rig.feed(stopped(Rank(1), 20))).unwrap(), why);

    // Killed between the decision and the end: the same end at once.
    (committed.validation_loss, committed.metrics) = (Some(2.5), Stagnation { since: 2, ..before }.figures());
    let (mut rig, effects) = load(&committed);
    assert!(effects.ends_with("go, freeze"), "{effects}");
    let _ = rig.frozen(Rank(0), 20);
    assert_eq!(list(&rig.frozen(Rank(1), 20)), "thaw until 20");
    let _ = rig.feed(stopped(Rank(0), 20));
    assert_eq!(ended(&rig.feed(stopped(Rank(1), 20))).unwrap(), why);
    // And one that goes on says so.
    (committed.validation_loss, committed.metrics) = (Some(2.5), before.figures());
    assert!(load(&committed).1.ends_with("go, proceed from 20"));
}
