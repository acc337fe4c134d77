//! `trainer export` of real runs: element types, several files, to a folder and to a store; and a base of adapters that
//! lies in a store.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Value, json};

use crate::{
    lora::{Tensors, floats, tensors},
    support::{
        lab::{EVERY, Lab, ORIGIN, STEPS},
        s3::BUCKET,
        trainer::{Trainer, losses, read},
    },
};

/// The files of a folder of a lab's bucket, by name.
fn in_bucket(lab: &Lab, folder: &str) -> BTreeMap<String, Vec<u8>> {
    let keys = lab.server().keys(&format!("{folder}/"));
    let file = |key: &String| (key[folder.len() + 1..].to_owned(), lab.server().read(key).expect("an object").to_vec());
    keys.iter().map(file).collect()
}

fn on_disk(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    entries.map(|entry| (entry.file_name().into_string().expect("a plain name"), read(&entry.path()))).collect()
}

/// All tensors of a model folder's files.
fn weights(files: &BTreeMap<String, Vec<u8>>) -> Tensors {
    let mut found = Tensors::new();
    for (_, bytes) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        for (name, tensor) in tensors(bytes) {
            assert!(found.insert(name, tensor).is_none(), "a tensor is in two files");
        }
    }
    found
}

#[track_caller]
fn export(lab: &Lab, run: &str, out: &str, more: &[&str]) -> Value {
    let done = lab.about("export", run).args(&["--json", "--out", out]).args(more).finish().expect_code(0);
    serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{error}: {}", done.story()))
}

fn is_shard(name: &str) -> bool {
    name.starts_with("model-") && name.ends_with(".safetensors")
}

/// What a run with rounded weights trains is written in full, and what it has rounded is that, rounded once.
#[test]
fn a_bf16_run_is_exported_in_fp32_from_the_values_that_it_trains() {
    let lab = Lab::on_files();
    let set = ["parallel.strategy=zero1", "train.precision=bf16"].map(|setting| ["--set", setting]).concat();
    lab.run("narrow").args(&set).finish().expect_code(0);
    let out = |name: &str| lab.path(name).display().to_string();
    let plain = export(&lab, "narrow", &out("plain"), &[]);
    let wide = export(&lab, "narrow", &out("wide"), &["--dtype", "fp32"]);
    let again = export(&lab, "narrow", &out("again"), &["--dtype", "bf16"]);
    assert_eq!([&plain["dtype"], &wide["dtype"], &again["dtype"]], ["bfloat16", "float32", "bfloat16"]);
    let [plain, wide, again] = ["plain", "wide", "again"].map(|name| on_disk(&lab.path(name)));
    assert_eq!(plain, again);
    let (narrow, full) = (weights(&plain), weights(&wide));
    assert_eq!(narrow.keys().collect::<Vec<_>>(), full.keys().collect::<Vec<_>>());
    let mut finer = 0;
    for (name, tensor) in &full {
        assert_eq!((tensor.0.as_str(), narrow[name].0.as_str()), ("F32", "BF16"), "{name}");
        for (full, narrow) in floats(tensor).into_iter().zip(floats(&narrow[name])) {
            // The nearest value: half of the last of 8 digits away at most.
            assert!((full - narrow).abs() <= full.abs() / 256.0, "{name}: {full} and {narrow}");
            finer += u32::from(full.to_bits() & 0xffff != 0);
        }
    }
    assert!(finer > 1000, "{finer} values have more digits than bf16 has");
    for (files, dtype) in [(&plain, "bfloat16"), (&wide, "float32")] {
        let description: Value = serde_json::from_slice(&files["config.json"]).expect("JSON");
        assert_eq!([&description["dtype"], &description["torch_dtype"]], [dtype, dtype]);
    }
    let said = lab.about("export", "narrow").args(&["--dtype", "fp32", "--out", &out("told")]).finish().expect_code(0);
    assert!(said.stdout.contains("from the fp32 values that the run trains"), "{}", said.stdout);

    // A run that begins there begins with these very values.
    let set = [
        format!("model.init_from=file://{}", out("wide")),
        "train.steps=1".into(),
        "train.schedule.warmup_steps=0".into(),
        "train.optimizer.lr=1e-30".into(),
    ];
    let set: Vec<&str> = set.iter().flat_map(|setting| ["--set", setting]).collect();
    lab.run("next").args(&set).finish().expect_code(0);
    assert_eq!(tensors(&lab.export("next")), full);
}

#[test]
fn several_files_go_to_a_store_and_a_run_begins_with_them() {
    let lab = Lab::on_interrupted_run_on_s3();
    let (out, disk) = (format!("s3://{BUCKET}/model"), lab.path("whole"));
    let whole = export(&lab, ORIGIN, &disk.display().to_string(), &[]);
    assert!(whole["files"].as_array().expect("files").contains(&json!("model.safetensors")), "{whole}");
    let expected = weights(&on_disk(&disk));
    // An export of another shape before it: nothing of that stays.
    export(&lab, ORIGIN, &out, &["--max-shard-size", "20KB"]);
    let before = in_bucket(&lab, "model");
    export(&lab, ORIGIN, &out, &["--max-shard-size", "60KB", "--dtype", "bf16"]);
    let done = export(&lab, ORIGIN, &out, &["--max-shard-size", "60KB"]);
    let files = in_bucket(&lab, "model");
    let mut names: Vec<String> = serde_json::from_value(done["files"].clone()).expect("names");
    names.sort();
    assert_eq!(names, files.keys().cloned().collect::<Vec<_>>());
    let shards = |files: &BTreeMap<String, Vec<u8>>| files.keys().filter(|name| is_shard(name)).count();
    assert!(shards(&before) > shards(&files) && shards(&files) > 2, "{names:?}");
    assert_eq!(weights(&files), expected);
    let index: Value = serde_json::from_slice(&files["model.safetensors.index.json"]).expect("JSON");
    let bytes: usize = expected.values().map(|(_, _, bytes)| bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    for (tensor, file) in index["weight_map"].as_object().expect("a map") {
        assert!(tensors(&files[file.as_str().expect("a name")]).contains_key(tensor), "{tensor}");
    }

    let init = format!("model.init_from={out}");
    let set = [init.as_str(), "train.steps=1", "train.schedule.warmup_steps=0", "train.optimizer.lr=1e-30"];
    let set: Vec<&str> = set.iter().flat_map(|setting| ["--set", setting]).collect();
    lab.run("next").args(&set).finish().expect_code(0);
    assert_eq!(tensors(&lab.export("next")), expected);

    for wrong in ["0", "5 apples", "1.5GB", "99999999999GB", ""] {
        let refused = lab.about("export", ORIGIN).args(&["--out", "x", "--max-shard-size", wrong]).finish();
        refused.expect_code(64).expect_said(&["expected a size such as 5GB"]);
    }
}

/// A run of adapters whose base and data lie in the bucket.
fn tune(lab: &Lab, run: &str) -> Trainer {
    let set = [
        &format!("model.init_from=s3://{BUCKET}/base"),
        "model.lora.rank=4",
        "train.optimizer.lr=0.03",
        r#"model.lora.targets="all-linear""#,
        "checkpoint.keep.last=100",
    ];
    lab.run(run).args(&set.into_iter().flat_map(|setting| ["--set", setting]).collect::<Vec<_>>())
}

#[test]
fn a_base_in_a_store_is_read_by_every_machine_and_never_written() {
    let lab = Lab::on_interrupted_run_on_s3();
    let uri = format!("s3://{BUCKET}/base");
    export(&lab, ORIGIN, &uri, &["--max-shard-size", "60KB", "--dtype", "bf16"]);
    let base = in_bucket(&lab, "base");
    let undisturbed = tune(&lab, "undisturbed").finish().expect_code(0);
    let expected = losses(&[&undisturbed]);
    assert_eq!(expected.len() as u64, STEPS);
    let adapters = |run: &str| lab.read(run, &format!("{}/adapter_model.safetensors", lab.newest_checkpoint(run)));

    let kill = format!("save.after-manifest=kill@step={}", 2 * EVERY);
    let first = tune(&lab, "run").faults(&kill).finish().expect_killed();
    // The next machine has nothing of this one's disk.
    let _ = std::fs::remove_dir_all(lab.path("cache"));
    let second = base.keys().filter(|name| is_shard(name)).nth(1).expect("a second file");
    let key = format!("base/{second}");
    let mut other = base[second].clone();
    *other.last_mut().expect("a byte") ^= 1;
    let named = [second.as_str(), "is not the file that this run's adapters are trained beside"];
    let merge = ["--merge", "--no-compare", "--out", "refused"];
    for changed in [other, base[second][1..].to_vec()] {
        lab.server().write(&key, changed);
        lab.resume("run").finish().expect_code(78).expect_said(&named);
        lab.about("export", "run").args(&merge).finish().expect_code(78).expect_said(&named);
    }
    lab.server().remove(&key);
    lab.resume("run").finish().expect_code(78).expect_said(&[second, "it is missing"]);
    lab.about("export", "run").args(&merge).finish().expect_code(78).expect_said(&[second, "it is missing"]);
    assert!(!lab.path("refused").exists());
    lab.server().write(&key, base[second].clone());
    let last = lab.resume("run").finish().expect_code(0);
    assert_eq!(losses(&[&first, &last]), expected, "{}", last.story());
    assert!(adapters("run") == adapters("undisturbed"), "other adapters\n{}", last.story());
    lab.expect_all_verify("run");

    // Merged with a comparison and without, in one file and in several, here and there: the same weights.
    let disk = |name: &str| lab.path(name).display().to_string();
    let compared = export(&lab, "run", &disk("merged"), &["--merge"]);
    let plain = export(&lab, "run", &disk("plain"), &["--merge", "--no-compare"]);
    assert!(compared["max_logit_difference"].as_f64().expect("a number") < 1.0, "{compared}");
    assert_eq!(plain.get("max_logit_difference"), None);
    let merged = on_disk(&lab.path("merged"));
    assert_eq!(merged, on_disk(&lab.path("plain")));
    let there = format!("s3://{BUCKET}/merged");
    export(&lab, "run", &there, &["--merge", "--no-compare", "--max-shard-size", "60KB"]);
    let files = in_bucket(&lab, "merged");
    assert!(files.keys().filter(|name| is_shard(name)).count() > 2);
    assert_eq!(weights(&files), weights(&merged));
    let before = weights(&base);
    let changed = weights(&merged).iter().filter(|(name, tensor)| before[*name] != **tensor).count();
    assert_eq!((changed, before.len()), (14, 21), "seven linear layers in each of two blocks");
    // The base's own type, in which the merged weights are rounded.
    assert!(weights(&merged).values().all(|(dtype, ..)| dtype == "BF16"));
    export(&lab, "run", &disk("wide"), &["--merge", "--dtype", "fp32"]);
    assert!(weights(&on_disk(&lab.path("wide"))).values().all(|(dtype, ..)| dtype == "F32"));
    let narrow = export(&lab, "run", &disk("narrow"), &["--dtype", "bf16"]);
    assert_eq!(narrow["dtype"], "bfloat16", "adapters, too");

    let onto = ["--merge", "--no-compare", "--out", &uri];
    let said = ["has the weights that the adapters were trained beside"];
    lab.about("export", "run").args(&onto).finish().expect_code(64).expect_said(&said);

    // Nothing of it was written, neither there nor among the run's objects.
    assert_eq!(in_bucket(&lab, "base"), base);
    for key in lab.keys("run", "checkpoints/").iter().filter(|key| key.ends_with(".safetensors")) {
        let names: Vec<String> = tensors(&lab.read("run", key)).into_keys().collect();
        assert!(names.iter().all(|name| name.contains(".lora_")), "{key}: {names:?}");
    }
}

#[test]
fn damaged_adapters_are_found_while_the_run_trains_and_by_verify() {
    let lab = Lab::on_interrupted_run_on_s3();
    export(&lab, ORIGIN, &format!("s3://{BUCKET}/base"), &[]);
    let set = ["--set", "train.steps=1000000", "--set", "checkpoint.scrub=\"1s\""];
    let running = tune(&lab, "rot").args(&set).start();
    running.wait_for_step("checkpoint", EVERY);
    let keys = lab.keys("rot", "checkpoints/");
    let key = keys.iter().find(|key| key.ends_with("/adapter_model.safetensors")).expect("adapters");
    let mut bytes = lab.read("rot", key);
    *bytes.last_mut().expect("a byte") ^= 1;
    lab.server().write(&format!("runs/rot/{key}"), bytes);
    let damaged = || {
        let journal = lab.keys("rot", "journal/");
        let record = |key: &String| serde_json::from_slice::<Value>(&lab.read("rot", key)).expect("JSON");
        journal.iter().map(record).find(|entry| entry["record"]["kind"] == "damaged")
    };
    let mut seen = 0;
    while damaged().is_none() {
        running.next(&mut seen, |event| event.kind() == "checkpoint").expect("another checkpoint");
    }
    running.signal(rustix::process::Signal::TERM);
    running.finish().expect_code(75);
    let reason = damaged().expect("a record")["record"]["reason"].to_string();
    assert!(reason.contains(key) && reason.contains("checksum"), "{reason}");
    lab.about("prune", "rot").args(&["--damaged"]).finish().expect_code(0);
    lab.expect_all_verify("rot");
    // The newest is whole; its adapters are damaged now, and found when asked for.
    let key = format!("{}/adapter_model.safetensors", lab.newest_checkpoint("rot"));
    lab.damage("rot", &key, |bytes| *bytes.last_mut().expect("a byte") ^= 1);
    let found = lab.about("verify", "rot").args(&["--deep"]).finish().expect_code(65);
    assert!(found.stdout.contains(&key), "{}", found.stdout);
}
