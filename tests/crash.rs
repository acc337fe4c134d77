//! Death at every step of the commit order, of workers and of agents: the run resumes from a whole checkpoint, never
//! from half of one, and ends like the undisturbed run.

use std::time::Duration;

use rustix::process::{Signal, kill_process};

use crate::support::{
    lab::{EVERY, Lab},
    proxy::{Fault, Often, Rule},
    trainer::{Running, Trainer},
};

/// A run that has saved after step 16, perhaps also before, and pauses after step 17. The successor of a worker that is
/// killed now comes to the end without a pause.
fn held_after_a_checkpoint(lab: &Lab, run: &str, every: &str) -> Running {
    let running = lab.run(run).hold_after(17).args(&["--set", &format!("checkpoint.every=\"{every}\"")]).start();
    running.held();
    running
}

/// The agent dies at `point` while it saves step 8; the next life starts from `resumed`.
fn dies_at(point: &str, resumed: u64) {
    let lab = Lab::on_files();
    let first = lab.run("dies").faults(&format!("{point}=kill@step={}", 2 * EVERY)).finish().expect_killed();
    let second = lab.resume("dies").finish().expect_code(0);
    assert_eq!(second.resumed_from(), resumed, "{}", second.story());
    lab.expect_as_undisturbed("dies", &[&first, &second]);
    lab.expect_all_verify("dies");
}

#[test]
fn death_after_the_first_shard_leaves_the_checkpoint_before() {
    dies_at("save.after-shard", EVERY);
}

#[test]
fn death_before_the_receipt_leaves_the_checkpoint_before() {
    dies_at("save.before-receipt", EVERY);
}

#[test]
fn death_after_the_receipt_leaves_the_checkpoint_before() {
    dies_at("save.after-receipt", EVERY);
}

#[test]
fn death_after_the_manifest_leaves_the_checkpoint_before() {
    dies_at("save.after-manifest", EVERY);
}

#[test]
fn death_before_the_commit_record_leaves_the_checkpoint_before() {
    dies_at("journal.before-append", EVERY);
}

#[test]
fn death_after_the_commit_record_leaves_the_whole_checkpoint() {
    dies_at("journal.after-append", 2 * EVERY);
}

#[test]
fn a_save_that_panics_is_repeated_and_the_run_completes() {
    let lab = Lab::on_files();
    let life = lab.run("panics").faults("save.after-manifest=panic@hit=1").finish();
    let life = life.expect_code(0).expect_said(&["fault injected at save.after-manifest"]);
    lab.expect_as_undisturbed("panics", &[&life]);
}

#[test]
fn a_killed_worker_is_replaced_and_the_run_completes_by_itself() {
    let lab = Lab::on_files();
    let running = held_after_a_checkpoint(&lab, "worker", "16 steps");
    running.wait_for_step("checkpoint", 16);
    let worker = running.workers().pop().expect("a worker");
    kill_process(worker, Signal::KILL).expect("kill a worker");
    let life = running.finish().expect_code(0);
    assert!(!life.of_kind("worker_died").is_empty(), "{}", life.story());
    assert_eq!(life.resumed_from(), 16, "the new group starts from a checkpoint\n{}", life.story());
    lab.expect_as_undisturbed("worker", &[&life]);
}

#[test]
fn workers_restart_from_memory_even_if_no_checkpoint_can_be_read() {
    let (lab, proxy) = Lab::on_s3_through_proxy(31);
    let running = held_after_a_checkpoint(&lab, "memory", "16 steps");
    running.wait_for_step("checkpoint", 16);
    for method in ["GET", "HEAD"] {
        proxy.arm(Rule { method, target: "checkpoints/", fault: Fault::Reset, often: Often::Percent(100) });
    }
    let worker = running.workers().pop().expect("a worker");
    kill_process(worker, Signal::KILL).expect("kill a worker");
    running.wait_for("workers that start again", |event| event.kind() == "restored");
    proxy.disarm();
    let life = running.finish().expect_code(0);
    let restored = life.last("restored");
    assert_eq!(restored.value["from"].as_str(), Some("memory"), "{}", life.story());
    assert_eq!(restored.step(), Some(16), "the new group starts from a checkpoint\n{}", life.story());
    lab.expect_as_undisturbed("memory", &[&life]);
}

#[test]
fn a_snapshot_newer_than_the_checkpoints_is_committed_before_workers_restart_from_it() {
    let (lab, proxy) = Lab::on_s3_through_proxy(32);
    // No part of the first save gets through until its worker is dead.
    proxy.arm(Rule { method: "PUT", target: "optimizer-", fault: Fault::SlowDown, often: Often::Percent(100) });
    // One snapshot is being uploaded and a second one waits: the wait for its capture is over before the next step
    // ends.
    let running = held_after_a_checkpoint(&lab, "newer", "8 steps");
    kill_process(running.workers().pop().expect("a worker"), Signal::KILL).expect("kill a worker");
    assert!(running.childless_within(Duration::from_secs(60)), "the other worker is still there");
    proxy.disarm();
    let life = running.finish().expect_code(0);
    let kinds: Vec<_> = life.events.iter().filter(|event| event.kind() != "step").map(|event| event.kind()).collect();
    let restart = kinds.iter().position(|kind| *kind == "worker_died").expect("a death");
    assert_eq!(kinds[restart - 1], "checkpoint", "{}", life.story());
    assert_eq!(life.last("restored").value["from"], "memory", "{}", life.story());
    assert_eq!(life.resumed_from(), 16, "{}", life.story());
    lab.expect_as_undisturbed("newer", &[&life]);
}

#[test]
fn a_run_that_starts_again_and_again_without_a_new_checkpoint_is_started_no_more_until_something_is_changed() {
    let lab = Lab::on_files();
    let dies = |trainer: Trainer, step: u64| trainer.faults(&format!("journal.before-append=kill@step={step}"));
    let set = ["--set", "restart.fruitless_starts=2"];
    // One start with a checkpoint, two without.
    let mut lives = vec![dies(lab.run("stuck"), 2 * EVERY).args(&set).finish().expect_killed()];
    for _ in 0..2 {
        lives.push(dies(lab.resume("stuck"), 2 * EVERY).finish().expect_killed());
    }
    let refused = lab.resume("stuck").finish().expect_code(81);
    let refused = refused.expect_said(&[
        "run stuck was started 2 times in a row without a new checkpoint",
        &format!("its newest checkpoint is that of step {EVERY}"),
        "--set restart.fruitless_starts=3",
    ]);
    assert!(refused.events.is_empty(), "nothing was formed: {}", refused.story());
    // A boot is refused, too; a changed setting, or an earlier checkpoint by name, is a person's will.
    lab.command(&["boot", "--run-id", "stuck", "--store", &lab.uri()]).finish().expect_code(81);
    lives.push(lab.resume("stuck").args(&["--set", "restart.fruitless_starts=3"]).finish().expect_code(0));
    lab.expect_as_undisturbed("stuck", &lives.iter().collect::<Vec<_>>());
}

#[test]
fn a_worker_that_dies_at_the_same_step_again_and_again_ends_the_run_with_a_clear_error() {
    let lab = Lab::on_files();
    let first = lab.run("stuck").faults("worker.step=kill@rank=1@step=7").finish();
    assert!(!matches!(first.code(), None | Some(0)), "exit code\n{}", first.story());
    assert!(first.of_kind("worker_died").len() >= 2, "it was tried again\n{}", first.story());
    assert!(first.of_kind("step").iter().all(|event| event.step() < Some(7)), "{}", first.story());
    let first = first.expect_said(&["step"]);
    let second = lab.resume("stuck").finish().expect_code(0);
    assert_eq!(second.resumed_from(), EVERY, "{}", second.story());
    lab.expect_as_undisturbed("stuck", &[&first, &second]);
}

#[test]
fn workers_that_hang_are_ended_and_the_run_completes() {
    let lab = Lab::on_files();
    // A worker stops forever; the other one waits for it in a collective.
    let hangs = lab.run("hangs").hold_after(17).args(&["--set", "checkpoint.every=\"16 steps\""]);
    let life = hangs.args(&["--set", "restart.hang=\"20s\""]).finish().expect_code(0);
    let died = life.last("worker_died");
    assert_eq!((died.step(), life.resumed_from()), (Some(17), 16), "{}", life.story());
    let reason = died.value["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("no step was finished for "), "{reason}");
    lab.expect_as_undisturbed("hangs", &[&life]);
}

/// MKL loads its kernels in a folder that exists, or ends the process.
#[test]
fn a_worker_starts_again_although_the_folder_of_the_command_was_deleted() {
    let lab = Lab::on_files();
    let command = lab.run("homeless").hold_after(17).args(&["--set", "checkpoint.every=\"8 steps\""]);
    let running = command.through_shell("mkdir home; cp run.toml home; cd home;", "").start();
    let held = running.held();
    std::fs::remove_dir_all(lab.path("home")).expect("delete the folder");
    kill_process(held, Signal::KILL).expect("kill a worker");
    let life = running.finish().expect_code(0);
    assert_eq!(life.of_kind("worker_died").len(), 1, "{}", life.story());
    lab.expect_as_undisturbed("homeless", &[&life]);
}

#[test]
fn workers_never_outlive_their_agent() {
    let lab = Lab::on_files();
    let running = lab.run("orphans").hold_after(2).start();
    running.wait_for_step("step", 2);
    assert!(running.workers().len() >= 2, "two workers are at work");
    running.signal(Signal::KILL);
    assert!(running.childless_within(Duration::from_secs(60)), "workers of a killed agent are still there");
    let first = running.finish().expect_killed();
    let second = lab.resume("orphans").finish().expect_code(0);
    let found = &second.last("found_dead").value;
    assert_eq!((&found["same_machine"], found["generation"].as_u64()), (&true.into(), Some(1)), "{}", second.story());
    assert_eq!(lab.keys("orphans", "nodes"), [""; 0], "no heartbeat of a dead node is left");
    lab.expect_as_undisturbed("orphans", &[&first, &second]);
}
