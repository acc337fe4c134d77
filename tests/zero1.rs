//! `parallel.strategy = "zero1"` from outside: the losses of `ddp`, exact resumes, and checkpoints that any world
//! continues under either strategy.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, STEPS, interrupted, reference},
    trainer::{Finished, Losses, losses},
};

/// Settings added to the lab's.
fn with<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", setting]).collect()
}

#[track_caller]
fn expect_close(ours: &Losses, theirs: &Losses, tolerance: f64) {
    for (step, text) in ours {
        let number = |text: &str| text.parse::<f64>().expect("a loss is a number");
        let (ours, theirs) = (number(text), number(&theirs[step]));
        let difference = ((ours - theirs) / theirs).abs();
        assert!(difference < tolerance, "step {step}: {ours}, with ddp {theirs}");
    }
}

/// A run from its first step to its last, on this many ranks.
fn whole_run(lab: &Lab, run: &str, ranks: u32, settings: &[&str]) -> Finished {
    let ranks = ranks.to_string();
    lab.run(run).args(&["--nproc-per-node", &ranks]).args(&with(settings)).finish().expect_code(0)
}

/// The same run under both strategies.
fn same_losses(ranks: u32, settings: &[&str], tolerance: f64) {
    let lab = Lab::on_files();
    let ddp = whole_run(&lab, "ddp", ranks, settings);
    let zero1 = whole_run(&lab, "zero1", ranks, &[settings, &["parallel.strategy=zero1"]].concat());
    let ours = losses(&[&zero1]);
    assert_eq!(ours.len() as u64, STEPS, "{}", zero1.story());
    expect_close(&ours, &losses(&[&ddp]), tolerance);
}

#[test]
fn two_ranks_with_accumulation_and_clipping_have_the_losses_of_ddp() {
    same_losses(2, &["train.optimizer.grad_clip=0.1"], 1e-4);
}

#[test]
fn three_ranks_in_bf16_have_the_losses_of_ddp() {
    same_losses(3, &["train.precision=bf16", "train.max_micro_batch=4"], 1e-2);
}

#[test]
fn a_killed_run_resumes_to_the_last_digit() {
    let settings = ["parallel.strategy=zero1", "train.precision=bf16"];
    let lab = Lab::on_files();
    let whole = whole_run(&lab, "whole", 3, &settings);
    let first = lab.run("killed").args(&["--nproc-per-node", "3"]).args(&with(&settings));
    let first = first.hold_after(EVERY + 2).start();
    first.wait_for_step("checkpoint", EVERY);
    first.held();
    let first = first.power_off().expect_killed();
    let second = lab.resume("killed").args(&["--nproc-per-node", "3"]).finish().expect_code(0);
    assert!(second.resumed_from() >= EVERY, "{}", second.story());
    assert_eq!(losses(&[&first, &second]), losses(&[&whole]));
    // Not only the rounded weights: masters and moments of every rank, as stored in the files.
    assert!(tensors(&lab, "killed") == tensors(&lab, "whole"), "state differs");
}

#[test]
fn a_run_goes_from_world_to_world_and_between_strategies() {
    let lab = Lab::on_interrupted_run();
    let (origin, undisturbed) = (interrupted().step, &reference().losses);
    let mut lives: Vec<Finished> = Vec::new();
    for (strategy, ranks, ckpt) in [("zero1", "3", origin / EVERY + 1), ("zero1", "2", origin / EVERY + 2)] {
        let set = format!("parallel.strategy={strategy}");
        let life = lab.resume(ORIGIN).args(&["--nproc-per-node", ranks, "--set", &set]);
        let life = life.hold_after(EVERY + 1).start();
        life.wait_for_step("checkpoint", ckpt * EVERY);
        let life = life.power_off().expect_killed();
        assert!(life.resumed_from() >= origin, "{}", life.story());
        expect_close(&losses(&[&life]), undisturbed, 1e-4);
        lives.push(life);
    }
    let ddp = lab.resume(ORIGIN).args(&["--nproc-per-node", "4", "--set", "parallel.strategy=ddp"]).finish();
    let ddp = ddp.expect_code(0);
    assert!(ddp.resumed_from() > lives[0].resumed_from(), "{}", ddp.story());
    expect_close(&losses(&[&ddp]), undisturbed, 1e-4);
    lab.expect_all_verify(ORIGIN);
}

#[test]
fn weights_go_through_every_world_without_losing_a_bit() {
    let lab = Lab::on_files();
    whole_run(&lab, "carried", 3, &["parallel.strategy=zero1", "train.steps=6"]);
    let expected = lab.export("carried");
    let (mut steps, mut before) = (6, BTreeSet::new());
    for (strategy, ranks) in [("zero1", "2"), ("zero1", "4"), ("ddp", "2"), ("zero1", "3")] {
        steps += 2;
        let life = lab.resume("carried").args(&["--nproc-per-node", ranks]).args(&with(&[
            &format!("parallel.strategy={strategy}"),
            &format!("train.steps={steps}"),
            // A rate so small that no weight changes: the saved weights are the restored ones.
            "train.optimizer.lr=1e-38",
        ]));
        let life = life.finish().expect_code(0);
        assert_eq!((life.resumed_from(), life.last("completed").step()), (steps - 2, Some(steps)), "{}", life.story());
        std::fs::remove_dir_all(lab.path("export-carried")).expect("remove an export");
        assert!(lab.export("carried") == expected, "weights differ after {strategy} on {ranks}\n{}", life.story());
        // The files are cut for this world.
        let folder = lab.newest_checkpoint("carried");
        let names: BTreeSet<String> = lab.keys("carried", &format!("{folder}/optimizer-")).into_iter().collect();
        assert!(names.is_disjoint(&before));
        before = names;
    }
}

/// Every tensor of the newest checkpoint's files by its stored name: type, extents, bytes.
pub fn tensors(lab: &Lab, run: &str) -> BTreeMap<String, (String, Vec<u64>, Vec<u8>)> {
    let folder = lab.newest_checkpoint(run);
    let mut found = BTreeMap::new();
    for key in lab.keys(run, &format!("{folder}/")).iter().filter(|key| key.ends_with(".safetensors")) {
        let bytes = lab.read(run, key);
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        for (name, view) in file.tensors() {
            let shape = view.shape().iter().map(|&extent| extent as u64).collect();
            let tensor = (format!("{:?}", view.dtype()), shape, view.data().to_vec());
            assert!(found.insert(name.clone(), tensor).is_none(), "{name} lies in two files");
        }
    }
    found
}

#[test]
fn a_bf16_checkpoint_is_a_model_folder_with_fp32_weights_beside_it() {
    let lab = Lab::on_files();
    let settings = ["parallel.strategy=zero1", "train.precision=bf16", "train.steps=6"];
    whole_run(&lab, "run", 3, &settings);
    let stored = tensors(&lab, "run");
    let folder = lab.newest_checkpoint("run");
    let index: Value =
        serde_json::from_slice(&lab.read("run", &format!("{folder}/model.safetensors.index.json"))).expect("index");
    let weights = index["weight_map"].as_object().expect("a weight map");
    assert!(weights.len() > 10);
    for name in weights.keys() {
        let (dtype, shape, rounded) = &stored[name];
        assert_eq!(dtype, "BF16", "{name}");
        // The slices of the fp32 weights, joined in the order of their elements.
        let own = format!("master.{name}");
        let mut slices: Vec<(u64, &Vec<u8>)> = stored
            .iter()
            .filter_map(|(stored, (dtype, shape, bytes))| {
                let rest = stored.strip_prefix(&own)?;
                assert_eq!(dtype, "F32", "{stored}");
                if rest.is_empty() {
                    return Some((0, bytes));
                }
                let (begin, end) = rest.strip_prefix('[')?.strip_suffix(']')?.split_once(':')?;
                let (begin, end): (u64, u64) = (begin.parse().expect("a number"), end.parse().expect("a number"));
                assert_eq!(shape, &[end - begin], "{stored}");
                Some((begin, bytes))
            })
            .collect();
        slices.sort_unstable();
        let fp32: Vec<u8> = slices.into_iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        assert_eq!(fp32.len() as u64, 4 * shape.iter().product::<u64>(), "{name}");
        let nearest = |x: &[u8]| {
            let bits = u32::from_le_bytes(x.try_into().expect("4 bytes"));
            // Round to the nearest, ties to even.
            ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
        };
        assert!(fp32.chunks(4).flat_map(|x| nearest(x).to_le_bytes()).eq(rounded.iter().copied()), "{name}");
    }
    lab.expect_all_verify("run");
    lab.about("checkpoints", "run").args(&["--json"]).finish().expect_code(0);
    let text = lab.about("generate", "run").args(&["--prompt", "the machine", "--tokens", "4"]).finish().expect_code(0);
    assert!(text.stdout.contains("the machine"), "{}", text.story());
    // The exported model begins a new run, and the checkpoint a run of the other strategy.
    lab.export("run");
    let init = format!("model.init_from=file://{}", lab.path("export-run").display());
    whole_run(&lab, "again", 2, &[&settings[..], &[&init]].concat());
    let ddp = lab.resume("run").args(&with(&["parallel.strategy=ddp", "train.steps=8"])).finish().expect_code(0);
    assert_eq!(ddp.resumed_from(), 6, "{}", ddp.story());
    // Every rank has all of it: whole fp32 weights beside the rounded ones.
    let stored = tensors(&lab, "run");
    for (name, (dtype, ..)) in &stored {
        assert_eq!(dtype, if weights.contains_key(name) { "BF16" } else { "F32" }, "{name}");
    }
    assert!(weights.keys().all(|name| stored.contains_key(&format!("master.{name}"))));
}
