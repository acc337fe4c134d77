//! Nodes that keep room for one snapshot (`checkpoint.slots = 1`): a capture waits for the save before it, and whatever
//! happens in between, the run ends like the undisturbed one.

use rustix::process::{Signal, kill_process};

use crate::support::{
    lab::{EVERY, Lab, STEPS},
    proxy::{Fault, Often, Rule},
    trainer::Trainer,
};

fn with_one_slot(run: Trainer) -> Trainer {
    run.args(&["--set", "checkpoint.slots=1"])
}

/// The first life leaves the checkpoint of step 4. The agent of the second dies at `point` while it saves step 8, which
/// it was told with the word to go; the third begins at `resumed`.
fn dies_at(point: &str, resumed: u64) {
    let lab = Lab::on_files();
    let first = with_one_slot(lab.run("dies")).hold_after(EVERY + 1).start();
    first.wait_for_step("checkpoint", EVERY);
    let first = first.power_off().expect_killed();
    let second = lab.resume("dies").faults(&format!("{point}=kill@step={}", 2 * EVERY)).finish().expect_killed();
    assert_eq!(second.resumed_from(), EVERY, "{}", second.story());
    let third = lab.resume("dies").finish().expect_code(0);
    assert_eq!(third.resumed_from(), resumed, "{}", third.story());
    lab.expect_as_undisturbed("dies", &[&first, &second, &third]);
    lab.expect_all_verify("dies");
}

#[test]
fn death_after_the_first_shard_leaves_the_checkpoint_before() {
    dies_at("save.after-shard", EVERY);
}

#[test]
fn death_after_the_manifest_leaves_the_checkpoint_before() {
    dies_at("save.after-manifest", EVERY);
}

#[test]
fn death_after_the_commit_record_leaves_the_whole_checkpoint() {
    dies_at("journal.after-append", 2 * EVERY);
}

#[test]
fn a_save_that_panics_is_repeated_from_the_slot_that_still_has_it() {
    let lab = Lab::on_files();
    let run = with_one_slot(lab.run("panics")).faults("save.after-manifest=panic@hit=1");
    // Once the loop has ended, the last state would have the slot.
    let running = run.hold_after(EVERY + 1).start();
    running.held();
    running.wait_for_step("checkpoint", EVERY);
    running.let_go();
    let life = running.finish().expect_code(0).expect_said(&["fault injected at save.after-manifest"]);
    assert!(life.committed().contains(&STEPS), "{}", life.story());
    lab.expect_as_undisturbed("panics", &[&life]);
}

/// The slot is captured into only by an order, and none was obeyed since the checkpoint.
#[test]
fn a_killed_worker_is_replaced_from_the_slot_while_it_is_whole() {
    let lab = Lab::on_files();
    let run = with_one_slot(lab.run("worker")).args(&["--set", "checkpoint.every=\"16 steps\""]);
    let running = run.hold_after(17).start();
    running.wait_for_step("checkpoint", 16);
    running.held();
    kill_process(running.workers().pop().expect("a worker"), Signal::KILL).expect("kill a worker");
    let life = running.finish().expect_code(0);
    assert_eq!(life.last("restored").value["from"], "memory", "{}", life.story());
    assert_eq!(life.resumed_from(), 16, "{}", life.story());
    lab.expect_as_undisturbed("worker", &[&life]);
}

/// The store takes nothing until the workers are dead: what the slot has is all that there is.
#[test]
fn a_snapshot_that_waits_for_the_store_is_committed_before_workers_restart_from_it() {
    let (lab, proxy) = Lab::on_s3_through_proxy(32);
    proxy.arm(Rule { method: "PUT", target: "optimizer-", fault: Fault::SlowDown, often: Often::Percent(100) });
    let run = with_one_slot(lab.run("newer")).args(&["--set", "checkpoint.every=\"8 steps\""]);
    let running = run.hold_after(17).start();
    running.held();
    kill_process(running.workers().pop().expect("a worker"), Signal::KILL).expect("kill a worker");
    proxy.disarm();
    let life = running.finish().expect_code(0);
    // Step 16 went by while the slot was taken.
    assert_eq!((life.resumed_from(), life.committed().contains(&16)), (8, true), "{}", life.story());
    assert_eq!(life.last("restored").value["from"], "memory", "{}", life.story());
    lab.expect_as_undisturbed("newer", &[&life]);
}

/// The only slot is being uploaded when the notice comes. The upload is finished, then the newest step has the slot.
#[test]
fn sigterm_during_an_upload_saves_the_last_step_after_it_and_loses_none() {
    let (lab, proxy) = Lab::on_s3_through_proxy(33);
    proxy.arm(Rule { method: "PUT", target: "optimizer-", fault: Fault::SlowDown, often: Often::Percent(100) });
    let running = with_one_slot(lab.run("asked")).hold_after(EVERY + 1).start();
    running.held();
    running.wait_until("a save under way", || proxy.broken() > 0);
    running.signal(Signal::TERM);
    running.wait_for("the drain", |event| event.kind() == "drain");
    assert!(running.events("checkpoint").is_empty(), "the upload has ended");
    running.let_go();
    proxy.disarm();
    let first = running.finish().expect_code(75);
    let step = first.last("interrupted").step().expect("its step");
    assert!(step > EVERY && step < STEPS, "{}", first.story());
    assert_eq!(first.committed().into_iter().collect::<Vec<_>>(), [EVERY, step], "{}", first.story());
    let second = lab.resume("asked").finish().expect_code(0);
    assert_eq!(second.resumed_from(), step, "{}", second.story());
    lab.expect_as_undisturbed("asked", &[&first, &second]);
    lab.expect_all_verify("asked");
}

/// A run may be given another number of slots when it is resumed.
#[test]
fn the_number_of_slots_changes_nothing_in_what_is_learnt() {
    let lab = Lab::on_files();
    let first = lab.run("change").hold_after(EVERY + 1).start();
    first.wait_for_step("checkpoint", EVERY);
    let first = first.power_off().expect_killed();
    let second = with_one_slot(lab.resume("change")).finish().expect_code(0);
    lab.expect_as_undisturbed("change", &[&first, &second]);
}
