//! A run that is interrupted and continued ends as if nothing had happened.
//!
//! On the same number of ranks that is exact: losses to the last digit, weights to the last byte. On another number the
//! samples and their order are the same, but a gradient is the sum of other partial sums, and floating-point addition
//! is not associative: so losses agree up to rounding, and exact equality is not promised.

use rustix::process::Signal;

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, STEPS, data_set, interrupted, reference},
    proxy::{Fault, Often, Rule},
    trainer::losses,
};

fn killed_three_times(lab: &Lab, run: &str) {
    // Before the first checkpoint; just after a save has begun; just after a checkpoint was committed.
    let first = lab.run(run).hold_after(2).start();
    first.wait_for_step("step", 2);
    let first = first.power_off().expect_killed();

    let second = lab.resume(run).hold_after(2 * EVERY + 1).start();
    second.wait_for_step("step", 2 * EVERY);
    let second = second.power_off().expect_killed();

    let third = lab.resume(run).hold_after(EVERY + 1).start();
    third.wait_for("a checkpoint", |event| event.kind() == "checkpoint");
    let third = third.power_off().expect_killed();
    let committed = third.committed().last().copied().expect("a checkpoint");

    let last = lab.resume(run).finish().expect_code(0);
    assert!(last.resumed_from() >= committed, "step {committed} was committed\n{}", last.story());
    lab.expect_as_undisturbed(run, &[&first, &second, &third, &last]);
    lab.expect_all_verify(run);
}

#[test]
fn a_run_killed_at_three_moments_ends_like_the_undisturbed_one_on_files() {
    killed_three_times(&Lab::on_files(), "killed");
}

#[test]
fn a_run_killed_at_three_moments_ends_like_the_undisturbed_one_on_s3() {
    let lab = Lab::on_s3();
    killed_three_times(&lab, "killed");
    assert!(lab.server().count("PutObject") > 0, "the run did not use the S3 server");
}

#[test]
fn two_undisturbed_runs_are_equal_in_every_digit() {
    let lab = Lab::on_files();
    let life = lab.run("again").finish().expect_code(0);
    lab.expect_as_undisturbed("again", &[&life]);
}

/// As on a GPU, where the numbers of a step are there when the next one has been launched.
const LATE: &str = "worker.late=error";

#[test]
fn a_run_whose_reports_are_late_is_exact_and_nobody_hears_of_a_state_before_its_step() {
    let lab = Lab::on_files();
    let life = lab.run("late").faults(LATE).finish().expect_code(0);
    lab.expect_as_undisturbed("late", &[&life]);
    let mut last = 0;
    for event in &life.events {
        match event.kind() {
            "step" => {
                assert_eq!(event.step(), Some(last + 1), "{}", life.story());
                last += 1;
            }
            "checkpoint" => assert!(event.step() <= Some(last), "{}", life.story()),
            _ => {}
        }
    }
    assert_eq!(last, STEPS);

    let running = lab.run("asked").args(&["--set", "train.steps=1000000"]).faults(LATE).start();
    running.wait_for_step("step", EVERY + 1);
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    let (interrupted, steps) = (life.last("interrupted"), life.of_kind("step"));
    assert_eq!(interrupted.value["lost_steps"], 0, "{}", life.story());
    assert_eq!(life.committed().last().copied(), interrupted.step(), "{}", life.story());
    assert_eq!(steps.last().and_then(|event| event.step()), interrupted.step(), "{}", life.story());
}

fn asked_to_stop(signal: Signal) {
    let lab = Lab::on_files();
    let running = lab.run("asked").hold_after(EVERY + 1).start();
    running.wait_for_step("step", EVERY + 1);
    running.held();
    running.signal(signal);
    running.let_go();
    let first = running.finish().expect_code(75);
    let interrupted = first.last("interrupted");
    assert_eq!(interrupted.value["lost_steps"], 0, "{}", first.story());
    let step = interrupted.step().expect("its step");
    assert!(step < STEPS, "the run was over before the signal\n{}", first.story());
    assert_eq!(first.committed().last(), Some(&step), "the last step is committed\n{}", first.story());

    let second = lab.resume("asked").finish().expect_code(0);
    assert_eq!(second.resumed_from(), step, "{}", second.story());
    let again: Vec<u64> = second.of_kind("step").iter().filter_map(|event| event.step()).collect();
    assert_eq!(again, (step + 1..=STEPS).collect::<Vec<_>>(), "no step is done twice\n{}", second.story());
    lab.expect_as_undisturbed("asked", &[&first, &second]);
}

#[test]
fn sigterm_saves_the_last_step_and_loses_none() {
    asked_to_stop(Signal::TERM);
}

#[test]
fn sigint_saves_the_last_step_and_loses_none() {
    asked_to_stop(Signal::INT);
}

#[test]
fn sigterm_before_the_first_step_is_heard() {
    let lab = Lab::on_files();
    let running = lab.run("early").start();
    running.wait_for("a formed event", |event| event.kind() == "formed");
    running.signal(Signal::TERM);
    let first = running.finish().expect_code(75);
    assert_eq!(first.last("interrupted").value["lost_steps"], 0, "{}", first.story());
    let second = lab.resume("early").finish().expect_code(0);
    lab.expect_as_undisturbed("early", &[&first, &second]);
}

#[test]
fn sigterm_before_a_worker_restart_is_heard() {
    let lab = Lab::on_files();
    let running = lab.run("pause").args(&["--set", "restart.backoff=\"1h\""]).hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    running.held();
    let worker = running.workers().pop().expect("a worker");
    rustix::process::kill_process(worker, Signal::KILL).expect("kill a worker");
    running.wait_for("a worker_died event", |event| event.kind() == "worker_died");
    running.signal(Signal::TERM);
    let first = running.finish();
    assert_eq!(first.of_kind("formed").len(), 1, "it left instead of waiting\n{}", first.story());
    let interrupted = first.last("interrupted");
    let lost = interrupted.step().expect("its step") - first.committed().last().expect("a checkpoint");
    assert_eq!(interrupted.value["lost_steps"], lost, "{}", first.story());
    let first = first.expect_code(if lost == 0 { 75 } else { 76 });
    let second = lab.resume("pause").finish().expect_code(0);
    lab.expect_as_undisturbed("pause", &[&first, &second]);
}

#[test]
fn a_second_signal_ends_the_run_without_waiting_for_the_store() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let running = lab.run("twice").hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    // The store stops accepting checkpoints, for longer than this test may last.
    let fault = Fault::Stall(std::time::Duration::from_secs(3600));
    proxy.arm(Rule { method: "PUT", target: "/checkpoints/", fault, often: Often::Next(1_000_000) });
    running.held();
    running.signal(Signal::TERM);
    running.wait_for("a notice", |event| event.kind() == "notice");
    running.let_go();
    // Right away it counts as an echo of the first one; a sender that repeats it is heard.
    running.ask_until_it_ends(Signal::TERM);
    let first = running.finish();
    assert!(matches!(first.code(), Some(75 | 76)), "exit code\n{}", first.story());
    proxy.disarm();
    let second = lab.resume("twice").finish().expect_code(0);
    assert!(Some(&second.resumed_from()) >= first.committed().last(), "{}", second.story());
    lab.expect_as_undisturbed("twice", &[&first, &second]);
}

#[test]
fn sigterm_while_data_is_fetched_is_heard() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    for entry in std::fs::read_dir(data_set()).expect("the data set").map(|entry| entry.expect("a file")) {
        let key = format!("data/{}", entry.file_name().to_string_lossy());
        lab.server().write(&key, std::fs::read(entry.path()).expect("read a file"));
    }
    // The tokens do not arrive, for longer than this test may last.
    let fault = Fault::Stall(std::time::Duration::from_secs(3600));
    proxy.arm(Rule { method: "GET", target: "/data/train-", fault, often: Often::Next(1_000_000) });
    let setting = ["--set", "data.train=\"s3://bucket/data\""];
    let running = lab.run("waiting").args(&setting).start();
    running.wait_until("a request for tokens", || proxy.broken() > 0);
    running.signal(Signal::TERM);
    let first = running.finish().expect_code(75);
    assert_eq!(first.last("notice").value["source"], "sigterm", "{}", first.story());
    assert!(first.of_kind("formed").is_empty(), "{}", first.story());
    proxy.disarm();
    // The store was not read yet and the run does not exist, so the same command is right.
    let second = lab.run("waiting").args(&setting).finish().expect_code(0);
    lab.expect_as_undisturbed("waiting", &[&second]);
}

#[test]
fn fewer_steps_than_committed_are_refused_and_change_nothing() {
    let lab = Lab::on_interrupted_run();
    let records = lab.keys(ORIGIN, "journal/").len();
    let fewer = lab.resume(ORIGIN).args(&["--set", "train.steps=6", "--set", "train.schedule.warmup_steps=1"]).finish();
    fewer.expect_code(78).expect_said(&["train.steps = 6", "--from"]);
    assert_eq!(lab.keys(ORIGIN, "journal/").len(), records);
    let life = lab.resume(ORIGIN).finish().expect_code(0);
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life]);
}

fn resumed_on(ranks: u32) {
    let lab = Lab::on_interrupted_run();
    let origin = interrupted();
    let life = lab.resume(ORIGIN).args(&["--nproc-per-node", &ranks.to_string()]).finish().expect_code(0);
    assert_eq!(life.resumed_from(), origin.step, "{}", life.story());
    assert_eq!(life.last("formed").value["world_size"], ranks, "{}", life.story());
    let (ours, theirs) = (losses(&[&life]), &reference().losses);
    assert_eq!(ours.len() as u64, STEPS - origin.step, "{}", life.story());
    for (step, text) in ours {
        let number = |text: &str| text.parse::<f64>().expect("a loss is a number");
        let (ours, theirs) = (number(&text), number(&theirs[&step]));
        // Rounding differs by about 1e-7 a step; another batch differs by more than 1e-2.
        assert!(((ours - theirs) / theirs).abs() < 1e-4, "step {step}: {ours}, undisturbed {theirs}\n{}", life.story());
    }
}

#[test]
fn a_save_of_two_ranks_resumes_on_one_with_the_same_samples() {
    resumed_on(1);
}

#[test]
fn a_save_of_two_ranks_resumes_on_three_with_the_same_samples() {
    resumed_on(3);
}

#[test]
fn a_save_of_two_ranks_resumes_on_four_with_the_same_samples() {
    resumed_on(4);
}

#[test]
fn resume_from_an_earlier_checkpoint_takes_the_same_path_again() {
    let lab = Lab::on_interrupted_run();
    let life = lab.resume(ORIGIN).args(&["--from", &EVERY.to_string()]).finish().expect_code(0);
    assert_eq!(life.resumed_from(), EVERY, "{}", life.story());
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life]);
}

/// Nothing cures this folder while the process waits: it leaves with what is committed.
#[test]
fn a_stop_is_obeyed_soon_although_no_save_succeeds_any_more() {
    let (lab, run) = (Lab::on_files(), "refused");
    let running = lab.run(run).args(&["--set", "train.steps=1000000"]).start();
    running.wait_for("a checkpoint", |event| event.kind() == "checkpoint");
    let checkpoints = lab.path("store").join(run).join("checkpoints");
    std::fs::rename(&checkpoints, lab.path("elsewhere")).expect("move the checkpoints away");
    std::fs::write(&checkpoints, "").expect("put a file in their place");
    running.wait_for("a save that fails", |event| event.kind() == "warning");
    let failed = running.events("warning").len();
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(76);
    // A slow machine may have failed more often before it was asked.
    let tries = life.of_kind("warning").into_iter().filter(|event| event.line.contains("(8 times in a row)"));
    assert!(failed > 1 || tries.count() == 0, "it is given up early\n{}", life.story());
    assert!(life.last("interrupted").value["lost_steps"].as_u64() > Some(0), "{}", life.story());
    let status = lab.about("status", run).args(&["--json"]).finish().expect_code(0);
    assert!(status.stdout.contains("interrupted"), "{}", status.story());
}
