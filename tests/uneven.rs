//! Worlds that do not divide the batch, from outside: the losses of a world that does, resumes from world to world, and
//! exact resumes on one that stays.

use rustix::process::Signal;
use serde_json::json;

use crate::{
    support::{
        lab::{EVERY, GLOBAL_BATCH, Lab, reference},
        trainer::{Finished, Losses, Trainer, losses},
    },
    zero1::tensors,
};

/// This many ranks, and these settings.
fn on(command: Trainer, ranks: u32, settings: &[&str]) -> Trainer {
    let set: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    command.args(&["--nproc-per-node", &ranks.to_string()]).args(&set)
}

/// Ends the run with SIGTERM once it has finished `after` steps of this life; it often finishes one more.
fn asked_to_stop(command: Trainer, after: u64) -> Finished {
    let running = command.hold_after(after).start();
    running.held();
    running.signal(Signal::TERM);
    running.wait_for("a notice", |event| event.kind() == "notice");
    running.let_go();
    running.finish().expect_code(75)
}

/// The `formed` events and the log say what share each rank has, if the shares differ, and only then.
#[track_caller]
fn expect_shares(life: &Finished, batch: u32, ranks: u32) {
    let formed = life.last("formed");
    assert_eq!(formed.value["world_size"], ranks, "{}", life.story());
    let told = life.stderr.contains(&format!("{batch} sequences on {ranks} workers: "));
    assert_eq!(told, !batch.is_multiple_of(ranks), "{}", life.story());
    let Some(shares) = formed.value.get("shares") else {
        assert_eq!(batch % ranks, 0, "{}", life.story());
        return;
    };
    let each: Vec<u64> = shares["ranks"].as_array().into_iter().flatten().filter_map(|n| n.as_u64()).collect();
    assert_eq!((each.len() as u32, each.iter().sum::<u64>()), (ranks, u64::from(batch)), "{}", formed.line);
    assert_eq!(each.iter().max().unwrap() - each.iter().min().unwrap(), 1, "{}", formed.line);
    let efficiency = f64::from(batch) / f64::from(ranks * batch.div_ceil(ranks));
    assert_eq!(shares["efficiency"], json!(efficiency), "{}", formed.line);
}

/// One run, each of its lives on another world, against the undisturbed one.
fn goes_from_world_to_world(worlds: &[u32], settings: &[&str], undisturbed: &Losses, tolerance: f64) {
    goes_on_with_a_batch_of(GLOBAL_BATCH, worlds, settings, undisturbed, tolerance);
}

fn goes_on_with_a_batch_of(batch: u32, worlds: &[u32], settings: &[&str], undisturbed: &Losses, tolerance: f64) {
    let lab = Lab::on_files();
    let [between @ .., last] = worlds else { panic!("no world") };
    let mut lives: Vec<Finished> = Vec::new();
    let begin = |lives: &[Finished], ranks| match lives {
        [] => on(lab.run("moved"), ranks, settings),
        _ => on(lab.resume("moved"), ranks, &[]),
    };
    for &ranks in between {
        let life = asked_to_stop(begin(&lives, ranks), (undisturbed.len() / worlds.len()) as u64 - 1);
        expect_shares(&life, batch, ranks);
        lives.push(life);
    }
    let life = begin(&lives, *last).finish().expect_code(0);
    expect_shares(&life, batch, *last);
    lives.push(life);

    // Every step once, in order: and so every sample, if each step has those of the undisturbed run.
    let steps: Vec<u64> = lives.iter().flat_map(|life| life.of_kind("step")).filter_map(|event| event.step()).collect();
    assert!(steps.iter().copied().eq(1..=undisturbed.len() as u64), "{steps:?}");
    let mut largest = 0.0_f64;
    for (step, text) in losses(&lives.iter().collect::<Vec<_>>()) {
        let number = |text: &str| text.parse::<f64>().expect("a loss is a number");
        let (ours, theirs) = (number(&text), number(&undisturbed[&step]));
        let difference = ((ours - theirs) / theirs).abs();
        // Other samples, or other weights of the same, make a difference of more than 1e-2.
        assert!(difference < tolerance, "step {step} on {worlds:?}: {ours}, undisturbed {theirs}");
        largest = largest.max(difference);
    }
    println!("{worlds:?} {settings:?}: losses differ by {largest:e} at most");
    lab.expect_all_verify("moved");
}

#[test]
fn a_run_goes_over_worlds_that_do_not_divide_its_batch_with_ddp() {
    goes_from_world_to_world(&[5, 2, 7], &[], &reference().losses, 1e-5);
}

#[test]
fn a_run_goes_over_worlds_that_do_not_divide_its_batch_with_zero1() {
    goes_from_world_to_world(&[3, 5, 3], &["parallel.strategy=zero1"], &reference().losses, 1e-5);
}

/// Many processes on few cores: only with TRAINER_TESTS_ALL, as `scripts/test --all` sets it.
#[test]
fn a_run_goes_from_8_to_3_to_5_to_8_ranks() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("skipped: TRAINER_TESTS_ALL is not set");
        return;
    }
    let lab = Lab::on_files();
    let bf16 = on(lab.run("bf16"), 2, &["train.precision=bf16"]).finish().expect_code(0);
    for strategy in ["parallel.strategy=ddp", "parallel.strategy=zero1"] {
        goes_from_world_to_world(&[8, 3, 5, 8], &[strategy], &reference().losses, 1e-5);
        goes_from_world_to_world(&[8, 3, 5, 8], &[strategy, "train.precision=bf16"], &losses(&[&bf16]), 1e-3);
    }
}

/// Sixteen worlds of up to sixteen processes: only with TRAINER_TESTS_ALL.
#[test]
fn a_run_goes_over_every_world_from_1_to_16_on_a_batch_of_16() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("skipped: TRAINER_TESTS_ALL is not set");
        return;
    }
    let batch = ["train.global_batch=16", "train.steps=64"];
    let lab = Lab::on_files();
    let undisturbed = losses(&[&on(lab.run("sixteen"), 1, &batch).finish().expect_code(0)]);
    let up: Vec<u32> = (1..=16).collect();
    goes_on_with_a_batch_of(16, &up, &batch, &undisturbed, 1e-5);
    let down: Vec<u32> = up.into_iter().rev().collect();
    let zero1 = ["parallel.strategy=zero1", batch[0], batch[1]];
    goes_on_with_a_batch_of(16, &down, &zero1, &undisturbed, 1e-5);
}

fn resumes_to_the_last_bit(ranks: u32, settings: &[&str]) {
    let lab = Lab::on_files();
    let whole = on(lab.run("whole"), ranks, settings).finish().expect_code(0);
    let first = on(lab.run("killed"), ranks, settings).hold_after(EVERY + 2).start();
    first.wait_for_step("checkpoint", EVERY);
    first.held();
    let first = first.power_off().expect_killed();
    let second = on(lab.resume("killed"), ranks, &[]).finish().expect_code(0);
    assert!(second.resumed_from() >= EVERY, "{}", second.story());
    assert_eq!(losses(&[&first, &second]), losses(&[&whole]));
    assert!(tensors(&lab, "killed") == tensors(&lab, "whole"), "state differs");
}

#[test]
fn a_killed_run_on_a_world_that_does_not_divide_its_batch_resumes_to_the_last_bit() {
    // 12 on 5, at most 2 in a pass: some ranks have one pass, some two.
    resumes_to_the_last_bit(5, &[]);
    resumes_to_the_last_bit(5, &["parallel.strategy=zero1", "train.precision=bf16"]);
}
