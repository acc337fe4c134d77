//! `parallel.strategy = "shard"` from outside: the losses of `ddp`, exact resumes, plain model folders, and checkpoints
//! that any world continues under any strategy; and passes that compute their blocks twice.

use crate::{
    support::{
        lab::{EVERY, Lab, STEPS, reference},
        trainer::{Finished, Losses, losses},
    },
    zero1::tensors,
};

fn with<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", setting]).collect()
}

/// A run from its first step to its last, on this many ranks.
fn whole_run(lab: &Lab, run: &str, ranks: &str, settings: &[&str]) -> Finished {
    lab.run(run).args(&["--nproc-per-node", ranks]).args(&with(settings)).finish().expect_code(0)
}

#[track_caller]
fn expect_close(ours: &Losses, theirs: &Losses, tolerance: f64) {
    for (step, text) in ours {
        let number = |text: &str| text.parse::<f64>().expect("a loss is a number");
        let (ours, theirs) = (number(text), number(&theirs[step]));
        assert!(((ours - theirs) / theirs).abs() < tolerance, "step {step}: {ours} for {theirs}");
    }
}

#[test]
fn a_killed_run_resumes_to_the_last_digit() {
    let settings = ["parallel.strategy=shard", "train.precision=bf16"];
    let lab = Lab::on_files();
    let whole = whole_run(&lab, "whole", "3", &settings);
    assert_eq!(losses(&[&whole]).len() as u64, STEPS, "{}", whole.story());
    let first = lab.run("killed").args(&["--nproc-per-node", "3"]).args(&with(&settings));
    let first = first.hold_after(EVERY + 2).start();
    first.wait_for_step("checkpoint", EVERY);
    first.held();
    let first = first.power_off().expect_killed();
    let second = lab.resume("killed").args(&["--nproc-per-node", "3"]).finish().expect_code(0);
    assert!(second.resumed_from() >= EVERY, "{}", second.story());
    assert_eq!(losses(&[&first, &second]), losses(&[&whole]));
    assert!(tensors(&lab, "killed") == tensors(&lab, "whole"), "state differs");
    lab.expect_all_verify("killed");
}

#[test]
fn a_checkpoint_is_a_model_folder_that_every_strategy_continues() {
    let lab = Lab::on_files();
    whole_run(&lab, "run", "3", &["parallel.strategy=shard", "train.precision=bf16", "train.steps=6"]);
    let stored = tensors(&lab, "run");
    let weights: Vec<&String> = stored.keys().filter(|name| name.starts_with("model.")).collect();
    assert!(weights.len() > 10);
    for name in weights {
        assert!(!name.contains('['), "{name} is a slice");
        assert!(
            stored.keys().any(|stored| stored.starts_with(&format!("master.{name}"))),
            "{name} has no fp32 weights"
        );
    }
    let text = lab.about("generate", "run").args(&["--prompt", "the machine", "--tokens", "4"]).finish().expect_code(0);
    assert!(text.stdout.contains("the machine"), "{}", text.story());
    let expected = lab.export("run");
    let mut steps = 6;
    for (strategy, ranks) in [("shard", "2"), ("zero1", "3"), ("shard", "4"), ("ddp", "2"), ("shard", "1")] {
        steps += 1;
        let life = lab.resume("run").args(&["--nproc-per-node", ranks]).args(&with(&[
            &format!("parallel.strategy={strategy}"),
            &format!("train.steps={steps}"),
            // A rate so small that no weight changes: the saved weights are the restored ones.
            "train.optimizer.lr=1e-38",
        ]));
        let life = life.finish().expect_code(0);
        assert_eq!((life.resumed_from(), life.last("completed").step()), (steps - 1, Some(steps)), "{}", life.story());
        std::fs::remove_dir_all(lab.path("export-run")).expect("remove an export");
        assert!(lab.export("run") == expected, "weights differ after {strategy} on {ranks}\n{}", life.story());
    }
}

#[test]
fn shards_and_blocks_that_are_computed_twice_have_the_losses_of_one_graph() {
    let lab = Lab::on_files();
    let shard = whole_run(&lab, "shard", "2", &["parallel.strategy=shard"]);
    expect_close(&losses(&[&shard]), &reference().losses, 1e-4);
    let keep = whole_run(&lab, "keep", "2", &[]);
    let block = whole_run(&lab, "block", "2", &["train.activations=block"]);
    assert_eq!(losses(&[&keep]), losses(&[&block]));
    assert!(tensors(&lab, "keep") == tensors(&lab, "block"), "state differs");
}

#[test]
fn several_nodes_are_refused_by_name() {
    let lab = Lab::on_files();
    let refused = lab.run("run").args(&["--nodes", "1:2", "--set", "parallel.strategy=shard"]).finish().expect_code(78);
    let said = refused.story();
    assert!(said.contains("parallel.strategy = \"shard\" works on one node only"), "{said}");
    assert!(said.contains("--set parallel.strategy=zero1"), "{said}");
}
