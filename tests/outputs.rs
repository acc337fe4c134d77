//! The output of commands, and the form of checkpoints: stdout is data, and a checkpoint's folder is a model folder.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, STEPS, interrupted},
    trainer::Trainer,
};

/// One JSON value, or one in each line.
fn values(stdout: &str) -> Vec<Value> {
    if let Ok(value) = serde_json::from_str(stdout) {
        return vec![value];
    }
    stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
}

#[test]
fn a_run_tells_its_story_in_events() {
    let life = &interrupted().life;
    let formed = life.last("formed");
    assert_eq!((&formed.value["world_size"], &formed.value["resume_step"]), (&2.into(), &Value::Null));
    let steps: Vec<u64> = life.of_kind("step").iter().filter_map(|event| event.step()).collect();
    assert_eq!(steps, (1..=interrupted().step).collect::<Vec<_>>(), "each step once, in order");
    for event in life.of_kind("step") {
        for field in ["loss", "lr", "tokens", "tokens_per_s", "step_s", "stall_s"] {
            assert!(event.value[field].is_number(), "{field} in {}", event.line);
        }
    }
    assert!(life.committed().is_superset(&[EVERY, 2 * EVERY, interrupted().step].into()), "{}", life.story());
    for event in life.of_kind("checkpoint") {
        for field in ["generation", "bytes", "stall_s", "copy_s", "durable_s"] {
            assert!(event.value[field].is_number(), "{field} in {}", event.line);
        }
    }
    assert_eq!(life.last("notice").value["source"], "sigterm", "{}", life.story());
    assert_eq!(life.last("interrupted").value["lost_steps"], 0);
}

#[test]
fn the_reading_commands_answer_in_json() {
    let lab = Lab::on_interrupted_run();
    let uri = lab.uri();
    let runs = lab.command(&["runs", "--store", &uri, "--json"]).finish().expect_code(0);
    assert!(!values(&runs.stdout).is_empty() && runs.stdout.contains(ORIGIN), "{}", runs.story());

    let status = lab.about("status", ORIGIN).args(&["--json"]).finish().expect_code(0);
    assert!(status.stdout.contains(&interrupted().step.to_string()), "{}", status.story());
    values(&status.stdout);

    let checkpoints = lab.about("checkpoints", ORIGIN).args(&["--json"]).finish().expect_code(0);
    values(&checkpoints.stdout);
    for step in [EVERY, 2 * EVERY, interrupted().step] {
        let listed = checkpoints.stdout.contains(&format!("\"step\":{step}"))
            || checkpoints.stdout.contains(&format!("\"step\": {step}"));
        assert!(listed, "step {step} is listed\n{}", checkpoints.story());
    }

    for more in [&["--json"][..], &["--json", "--all"], &["--json", "--deep"], &["--json", "--all", "--deep"]] {
        let verify = lab.about("verify", ORIGIN).args(more).finish().expect_code(0);
        assert!(!values(&verify.stdout).is_empty(), "{}", verify.story());
    }
}

#[test]
fn verify_finds_a_flipped_bit_and_names_the_object() {
    let lab = Lab::on_interrupted_run();
    let folder = lab.newest_checkpoint(ORIGIN);
    let key = lab.keys(ORIGIN, &format!("{folder}/model-")).remove(0);
    lab.damage(ORIGIN, &key, |bytes| {
        let last = bytes.len() - 1;
        bytes[last] ^= 0x80;
    });
    let verify = lab.about("verify", ORIGIN).args(&["--deep"]).finish().expect_code(65);
    let name = key.rsplit('/').next().expect("a name");
    assert!(format!("{}{}", verify.stdout, verify.stderr).contains(name), "{}", verify.story());
}

#[test]
fn verify_finds_a_truncated_shard_without_reading_it() {
    let lab = Lab::on_interrupted_run();
    let folder = lab.newest_checkpoint(ORIGIN);
    let key = lab.keys(ORIGIN, &format!("{folder}/optimizer-")).remove(0);
    lab.damage(ORIGIN, &key, |bytes| bytes.truncate(bytes.len() - 1));
    lab.about("verify", ORIGIN).finish().expect_code(65);
}

#[test]
fn plain_output_goes_to_stdout_and_conversation_to_stderr() {
    let lab = Lab::on_interrupted_run();
    let status = lab.about("status", ORIGIN).finish().expect_code(0);
    assert!(status.stdout.contains(ORIGIN), "{}", status.story());
    let wrong = lab.about("status", "nobody").finish();
    assert_ne!(wrong.code(), Some(0), "{}", wrong.story());
    assert!(wrong.stdout.is_empty() && !wrong.stderr.is_empty(), "{}", wrong.story());
}

#[test]
fn completions_are_a_script_on_stdout() {
    let lab = Lab::on_files();
    let script = lab.command(&["completions", "bash"]).finish().expect_code(0);
    assert!(script.stdout.contains("_trainer") && script.stdout.contains("resume"), "{}", script.story());
    assert!(script.stderr.is_empty(), "{}", script.story());
}

#[test]
fn help_names_every_command() {
    let help = Trainer::new(std::path::Path::new("/"), &["--help"]).finish().expect_code(0);
    for command in [
        "run",
        "resume",
        "work",
        "runs",
        "status",
        "checkpoints",
        "explain",
        "verify",
        "export",
        "generate",
        "prune",
        "doctor",
        "simulate",
        "data",
        "completions",
    ] {
        let listed = help.stdout.lines().any(|line| line.trim_start().starts_with(&format!("{command} ")));
        assert!(listed, "{command}\n{}", help.story());
    }
}

/// The header of a safetensors file: 8 bytes little-endian length, then JSON.
fn header(bytes: &[u8]) -> BTreeMap<String, Value> {
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    let mut header: BTreeMap<String, Value> =
        serde_json::from_slice(&bytes[8..8 + len as usize]).expect("a safetensors header");
    header.remove("__metadata__");
    let end = header.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max().unwrap_or(0);
    assert_eq!(bytes.len() as u64, 8 + len + end, "the header covers the whole file");
    header
}

#[test]
fn a_checkpoint_folder_is_a_model_folder() {
    let lab = Lab::on_interrupted_run();
    let folder = lab.newest_checkpoint(ORIGIN);
    let read = |name: &str| lab.read(ORIGIN, &format!("{folder}/{name}"));
    let json = |name: &str| -> Value { serde_json::from_slice(&read(name)).expect(name) };

    let config = json("config.json");
    assert_eq!((&config["model_type"], &config["vocab_size"]), (&"llama".into(), &512.into()));
    assert!(json("tokenizer.json")["model"].is_object());

    let index = json("model.safetensors.index.json");
    let weight_map = index["weight_map"].as_object().expect("a weight map");
    let mut tensors = 0;
    let mut bytes = 0;
    for key in lab.keys(ORIGIN, &format!("{folder}/model-")) {
        let name = key.rsplit('/').next().expect("a name");
        for (tensor, entry) in header(&read(name)) {
            assert_eq!(weight_map.get(&tensor), Some(&Value::from(name)), "where {tensor} lies");
            let offsets = &entry["data_offsets"];
            bytes += offsets[1].as_u64().unwrap_or(0) - offsets[0].as_u64().unwrap_or(0);
            tensors += 1;
        }
    }
    assert_eq!(tensors, weight_map.len(), "every weight lies in a shard");
    assert_eq!(index["metadata"]["total_size"], bytes, "bytes of all weights");
    for name in
        ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"]
    {
        assert!(weight_map.contains_key(name), "{name} in {:?}", weight_map.keys());
    }
}

#[test]
fn an_export_is_a_model_folder_of_one_file() {
    let lab = Lab::on_interrupted_run();
    let exported = header(&lab.export(ORIGIN));
    let folder = lab.newest_checkpoint(ORIGIN);
    let mut sharded = BTreeMap::new();
    for key in lab.keys(ORIGIN, &format!("{folder}/model-")) {
        sharded.extend(header(&lab.read(ORIGIN, &key)));
    }
    let shapes = |header: &BTreeMap<String, Value>| -> BTreeMap<String, (Value, Value)> {
        header.iter().map(|(name, t)| (name.clone(), (t["dtype"].clone(), t["shape"].clone()))).collect()
    };
    assert_eq!(shapes(&exported), shapes(&sharded));
    for name in ["config.json", "tokenizer.json"] {
        assert!(lab.path(&format!("export-{ORIGIN}")).join(name).exists(), "{name}");
    }
}

#[test]
fn prune_keeps_the_newest_and_shows_first_what_it_would_delete() {
    let lab = Lab::on_interrupted_run();
    let before = lab.keys(ORIGIN, "checkpoints/");
    lab.about("prune", ORIGIN).args(&["--keep-last", "1", "--dry-run"]).finish().expect_code(0);
    assert_eq!(lab.keys(ORIGIN, "checkpoints/"), before, "a dry run deletes nothing");
    let newest = lab.newest_checkpoint(ORIGIN);
    lab.about("prune", ORIGIN).args(&["--keep-last", "1"]).finish().expect_code(0);
    let left = lab.keys(ORIGIN, "checkpoints/");
    assert!(left.len() < before.len() && left.iter().all(|key| key.starts_with(&newest)), "{left:?}");
    let life = lab.resume(ORIGIN).finish().expect_code(0);
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life]);
    assert_eq!(life.last("completed").step(), Some(STEPS));
}
