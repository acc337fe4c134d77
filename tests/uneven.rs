//! Worlds that do not divide the batch, from outside: the losses of a world that does, resumes from world to world, and
//! exact resumes on one that stays.

use rustix::process::Signal;
use serde_json::json;

use crate::{
    support::{
        lab::{EVERY, GLOBAL_BATCH, Lab, STEPS, reference},
        trainer::{Finished, Losses, Trainer, losses},
    },
    zero1::tensors,
};

/// This many ranks, and these settings.
fn on(command: Trainer, ranks: u32, settings: &[&str]) -> Trainer {
    let set: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    command.args(&["--nproc-per-node", &ranks.to_string()]).args(&set)
}

/// Ends the run with SIGTERM after it has finished so many steps of this life.
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
fn expect_shares(life: &Finished, ranks: u32) {
    let formed = life.last("formed");
    assert_eq!(formed.value["world_size"], ranks, "{}", life.story());
    let told = life.stderr.contains(&format!("{GLOBAL_BATCH} sequences on {ranks} workers: "));
    assert_eq!(told, !GLOBAL_BATCH.is_multiple_of(ranks), "{}", life.story());
    let Some(shares) = formed.value.get("shares") else {
        assert_eq!(GLOBAL_BATCH % ranks, 0, "{}", life.story());
        return;
    };
    let each: Vec<u64> = shares["ranks"].as_array().into_iter().flatten().filter_map(|n| n.as_u64()).collect();
    assert_eq!((each.len() as u32, each.iter().sum::<u64>()), (ranks, GLOBAL_BATCH.into()), "{}", formed.line);
    assert_eq!(each.iter().max().unwrap() - each.iter().min().unwrap(), 1, "{}", formed.line);
    let efficiency = f64::from(GLOBAL_BATCH) / f64::from(ranks * GLOBAL_BATCH.div_ceil(ranks));
    assert_eq!(shares["efficiency"], json!(efficiency), "{}", formed.line);
}

/// One run, each of its lives on another world, against the undisturbed one.
fn goes_from_world_to_world(worlds: &[u32], settings: &[&str], undisturbed: &Losses, tolerance: f64) {
    let lab = Lab::on_files();
    let [between @ .., last] = worlds else { panic!("no world") };
    let mut lives: Vec<Finished> = Vec::new();
    let begin = |lives: &[Finished], ranks| match lives {
        [] => on(lab.run("moved"), ranks, settings),
        _ => on(lab.resume("moved"), ranks, &[]),
    };
    for &ranks in between {
        let life = asked_to_stop(begin(&lives, ranks), STEPS / worlds.len() as u64);
        expect_shares(&life, ranks);
        lives.push(life);
    }
    let life = begin(&lives, *last).finish().expect_code(0);
    expect_shares(&life, *last);
    lives.push(life);

    // Every step once, in order: and so every sample, if each step has those of the undisturbed run.
    let steps: Vec<u64> = lives.iter().flat_map(|life| life.of_kind("step")).filter_map(|event| event.step()).collect();
    assert!(steps.iter().copied().eq(1..=STEPS), "{steps:?}");
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
