//! A run's inputs: it continues with the data that it was trained on, reads whole shards, and uses the intended device.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::process::{Signal, kill_process};
use serde_json::Value;
use trainer::{checkpoint::manifest::digest, storage::Crc64};

use crate::support::{
    lab::{EVERY, Lab, STEPS, data_set, sample_text},
    trainer::{Finished, Trainer},
};

/// The URI of this lab's own dataset, and a configuration that trains on it.
fn own_data(lab: &Lab) -> String {
    let uri = if lab.uri().starts_with("s3:") {
        "s3://bucket/own".to_owned()
    } else {
        format!("file://{}", lab.path("own").display())
    };
    prepare(lab, &uri, &sample_text(), "train:512").finish().expect_code(0);
    lab.write_config("run.toml", &lab.config("").replace(&format!("file://{}", data_set().display()), &uri));
    uri
}

fn prepare(lab: &Lab, uri: &str, text: &str, tokenizer: &str) -> Trainer {
    std::fs::write(lab.path("text.txt"), text).expect("write text");
    let text = lab.path("text.txt").display().to_string();
    lab.command(&["data", "prepare", "--input", &text, "--tokenizer", tokenizer, "--out", uri, "--overwrite"])
}

/// A file of the lab's own dataset, copied out of its store.
fn of_data(lab: &Lab, name: &str) -> String {
    let bytes = if lab.uri().starts_with("s3:") {
        lab.server().read(&format!("own/{name}")).expect("an object").to_vec()
    } else {
        std::fs::read(lab.path("own").join(name)).expect("a file")
    };
    let path = lab.path(&format!("kept-{name}"));
    std::fs::write(&path, bytes).expect("write a copy");
    path.display().to_string()
}

fn steps(count: u64) -> [String; 2] {
    ["--set".to_owned(), format!("train.steps={count}")]
}

fn to(trainer: Trainer, count: u64) -> Trainer {
    let [flag, value] = steps(count);
    trainer.args(&[&flag, &value])
}

/// The journal's records of this kind.
fn records(lab: &Lab, run: &str, kind: &str) -> Vec<Value> {
    let all = lab.keys(run, "journal/");
    let all = all.iter().map(|key| serde_json::from_slice::<Value>(&lab.read(run, key)).expect("a record"));
    all.map(|entry| entry["record"].clone()).filter(|record| record["kind"] == kind).collect()
}

#[track_caller]
fn refused(life: Finished, code: i32, said: &[&str]) -> Finished {
    let life = life.expect_code(code).expect_said(said);
    assert!(life.of_kind("step").is_empty(), "it trained\n{}", life.story());
    life
}

#[test]
fn another_dataset_in_place_of_the_runs_is_refused_until_it_is_named() {
    for lab in [Lab::on_files(), Lab::on_s3()] {
        let uri = own_data(&lab);
        to(lab.run("own"), 6).finish().expect_code(0);
        let known = records(&lab, "own", "formed").remove(0)["data"].clone();
        let folder = lab.newest_checkpoint("own");
        let state: Value =
            serde_json::from_slice(&lab.read("own", &format!("{folder}/trainer_state.json"))).expect("JSON");
        assert!(known["index"].is_string() && state["data"] == known, "{known} {state}");

        let tokenizer = of_data(&lab, "tokenizer.json");
        let text = sample_text();
        let mut to_go = 8;
        for other in [text.replace("light", "night"), text[..text.len() / 2].to_owned(), format!("{text}{text}")] {
            prepare(&lab, &uri, &other, &tokenizer).finish().expect_code(0);
            let way_out = format!("--set data.train={uri}");
            refused(
                to(lab.resume("own"), to_go).finish(),
                78,
                &["is not the one that run own was trained on", way_out.as_str()],
            );
            to(lab.resume("own"), to_go).args(&["--from", "6"]).finish().expect_code(78);
            // A machine that boots again with its settings does not name new data.
            let set = format!("data.train={uri}");
            to(lab.command(&["boot", "run.toml", "--run-id", "own", "--set", &set]), to_go).finish().expect_code(78);
            to(lab.resume("own"), to_go).args(&["--set", &set]).finish().expect_code(0);
            to_go += 1;
            // From here on it is the run's data.
            to(lab.resume("own"), to_go).finish().expect_code(0);
            to_go += 1;
        }
        // A copy in another place is the same data, and naming the place names the data.
        prepare(&lab, &uri, &text, "train:400").finish().expect_code(0);
        refused(to(lab.resume("own"), to_go).finish(), 78, &["made with another tokenizer"]);
        let set = format!("data.train={uri}");
        let named = to(lab.resume("own"), to_go).args(&["--set", &set]).finish();
        refused(named, 78, &["made with another tokenizer", "start a new run"]);
        to(lab.run("new"), 2).args(&["--set", "train.schedule.warmup_steps=0"]).finish().expect_code(0);
    }
}

/// Changes the newest checkpoint's state, and every checksum of it.
fn rewrite_state(lab: &Lab, run: &str, change: impl FnOnce(&mut Value)) {
    let folder = lab.newest_checkpoint(run);
    let key = format!("{folder}/trainer_state.json");
    let mut state: Value = serde_json::from_slice(&lab.read(run, &key)).expect("JSON");
    change(&mut state);
    let state = serde_json::to_vec(&state).expect("plain");
    let manifest_key = format!("{folder}/manifest.json");
    let mut manifest: Value = serde_json::from_slice(&lab.read(run, &manifest_key)).expect("JSON");
    let files = manifest["files"].as_array_mut().expect("files");
    let entry = files.iter_mut().find(|file| file["name"] == "trainer_state.json").expect("its entry");
    entry["bytes"] = state.len().into();
    entry["crc64"] = Crc64::of(&state).to_string().into();
    let manifest = serde_json::to_vec(&manifest).expect("plain");
    for journal in lab.keys(run, "journal/") {
        let mut entry: Value = serde_json::from_slice(&lab.read(run, &journal)).expect("JSON");
        if entry["record"]["manifest"] == manifest_key.as_str() {
            entry["record"]["manifest_crc64"] = digest(&manifest).into();
            lab.damage(run, &journal, |bytes| *bytes = serde_json::to_vec(&entry).expect("plain"));
        }
    }
    lab.damage(run, &key, |bytes| *bytes = state);
    lab.damage(run, &manifest_key, |bytes| *bytes = manifest);
}

/// Removes from the journal the fields that earlier versions did not write.
fn forget_data(lab: &Lab, run: &str) {
    for journal in lab.keys(run, "journal/") {
        let mut entry: Value = serde_json::from_slice(&lab.read(run, &journal)).expect("JSON");
        if entry["record"].as_object_mut().expect("a record").remove("data").is_some() {
            lab.damage(run, &journal, |bytes| *bytes = serde_json::to_vec(&entry).expect("plain"));
        }
    }
}

#[test]
fn a_run_of_an_earlier_version_records_its_data_and_notices_another_tokenizer() {
    let lab = Lab::on_files();
    let uri = own_data(&lab);
    to(lab.run("old"), 6).finish().expect_code(0);
    forget_data(&lab, "old");
    rewrite_state(&lab, "old", |state| drop(state.as_object_mut().expect("an object").remove("data")));
    let tokenizer = of_data(&lab, "tokenizer.json");
    // Only the checkpoint's tokenizer shows it.
    prepare(&lab, &uri, &sample_text(), "train:400").finish().expect_code(0);
    refused(to(lab.resume("old"), 8).finish(), 78, &["another tokenizer", "tokenizer.json"]);
    // The checkpoint knows more than the journal.
    prepare(&lab, &uri, &sample_text(), &tokenizer).finish().expect_code(0);
    to(lab.resume("old"), 8).finish().expect_code(0);
    assert!(records(&lab, "old", "formed").last().expect("formed")["data"]["index"].is_string(), "taken up");
    forget_data(&lab, "old");
    prepare(&lab, &uri, &sample_text().replace("light", "night"), &tokenizer).finish().expect_code(0);
    refused(to(lab.resume("old"), 9).finish(), 78, &["is not the one that run old was trained on"]);
    // If neither names it, the position that the checkpoint has reached shows other data.
    rewrite_state(&lab, "old", |state| drop(state.as_object_mut().expect("an object").remove("data")));
    prepare(&lab, &uri, &sample_text()[..4000], &tokenizer).finish().expect_code(0);
    refused(to(lab.resume("old"), 9).finish(), 78, &["is not the one that run old was trained on", "its epoch is"]);
}

#[test]
fn a_state_that_contradicts_its_run_is_an_error_that_names_file_and_field() {
    type Change = fn(&mut Value);
    let fields: [(&str, Change); 5] = [
        ("seed", |state| state["seed"] = 99.into()),
        ("samples", |state| state["samples"] = 1.into()),
        ("epoch", |state| state["epoch"] = 7.into()),
        ("position", |state| state["position"] = 1.into()),
        ("data", |state| state["data"]["index"] = "0123456789abcdef".into()),
    ];
    for (field, change) in fields {
        let lab = Lab::on_interrupted_run();
        rewrite_state(&lab, "origin", change);
        let its = format!("its {field} is");
        refused(lab.resume("origin").finish(), 65, &["trainer_state.json", its.as_str()]);
    }
    // A damaged one is skipped, like any part of a checkpoint.
    let lab = Lab::on_interrupted_run();
    let folder = lab.newest_checkpoint("origin");
    lab.damage("origin", &format!("{folder}/trainer_state.json"), |bytes| bytes[20] ^= 1);
    let life = lab.resume("origin").finish().expect_code(0);
    let damaged = records(&lab, "origin", "damaged");
    let reasons: Vec<&str> = damaged.iter().filter_map(|record| record["reason"].as_str()).collect();
    assert!(matches!(*reasons, [one] if one.contains("trainer_state.json")), "{reasons:?}\n{}", life.story());
}

#[test]
fn data_replaced_under_a_run_is_noticed_before_its_workers_restart() {
    let lab = Lab::on_files();
    let uri = own_data(&lab);
    let running = lab.run("under").hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    let held = running.held();
    let tokenizer = of_data(&lab, "tokenizer.json");
    prepare(&lab, &uri, &sample_text().replace("light", "night"), &tokenizer).finish().expect_code(0);
    kill_process(held, Signal::KILL).expect("kill a worker");
    let life = running.finish().expect_code(78).expect_said(&["was replaced while this run used it", "data.train"]);
    assert!(life.of_kind("step").iter().all(|event| event.step() <= Some(EVERY + 1)), "{}", life.story());
}

/// The first training shard in a folder.
fn shard(folder: &Path) -> PathBuf {
    folder.join("train-00000.bin")
}

fn turn_a_bit(path: &Path) {
    let mut bytes = std::fs::read(path).expect("read a shard");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).expect("write a shard");
}

#[test]
fn a_shard_with_a_flipped_bit_is_never_trained_on() {
    let lab = Lab::on_files();
    own_data(&lab);
    to(lab.run("before"), 6).finish().expect_code(0);
    turn_a_bit(&shard(&lab.path("own")));
    refused(lab.run("after").finish(), 65, &["train-00000.bin", "CRC64"]);
    assert_eq!(lab.keys("after", ""), Vec::<String>::new(), "no run was made");
    refused(to(lab.resume("before"), 8).finish(), 65, &["train-00000.bin", "CRC64"]);

    // In a cache it is fetched again, and so is an index that a power cut left empty.
    let lab = Lab::on_s3();
    own_data(&lab);
    let first = to(lab.run("one"), 6).finish().expect_code(0);
    let cache = std::fs::read_dir(lab.path("cache/trainer/datasets")).expect("the cache");
    let folder = cache.map(|entry| entry.expect("entry").path()).next().expect("a dataset");
    let good = std::fs::read(shard(&folder)).expect("a shard");
    turn_a_bit(&shard(&folder));
    std::fs::write(folder.join("index.json"), "").expect("write an index");
    let second = to(lab.run("two"), 6).finish().expect_code(0).expect_said(&["fetched again", "train-00000.bin"]);
    assert_eq!(std::fs::read(shard(&folder)).expect("a shard"), good);
    assert_ne!(std::fs::read(folder.join("index.json")).expect("an index"), b"");
    let losses = |life: &Finished| crate::support::trainer::losses(&[life]);
    assert_eq!(losses(&first), losses(&second), "{}", second.story());
}

#[test]
fn without_a_home_the_data_is_in_a_private_folder_that_ends_with_the_process() {
    let lab = Lab::on_s3();
    own_data(&lab);
    let temporary = lab.path("tmp");
    std::fs::create_dir(&temporary).expect("a folder");
    // Files that others may have left there.
    let trap = lab.path("trap");
    std::fs::create_dir(&trap).expect("a folder");
    std::os::unix::fs::symlink(&trap, temporary.join("trainer")).expect("a link");
    let nowhere =
        [("HOME", String::new()), ("XDG_CACHE_HOME", String::new()), ("TMPDIR", temporary.display().to_string())];
    let running = lab.run("homeless").envs(&nowhere).hold_after(2).start();
    running.wait_for("a step", |event| event.kind() == "step");
    let private: Vec<PathBuf> = std::fs::read_dir(&temporary)
        .expect("the temporary folder")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| !path.is_symlink())
        .collect();
    let [folder] = private.as_slice() else { panic!("{private:?}") };
    assert_eq!(folder.metadata().expect("a folder").mode() & 0o777, 0o700);
    running.held();
    running.let_go();
    running.finish().expect_code(0);
    assert!(!folder.exists(), "it goes with the process");
    assert_eq!(std::fs::read_dir(&trap).expect("the trap").count(), 0, "nothing follows a link");

    // A cache that is a link is not followed, either.
    std::fs::create_dir_all(lab.path("cache/trainer")).expect("a folder");
    let _ = std::fs::remove_dir_all(lab.path("cache/trainer/datasets"));
    std::os::unix::fs::symlink(&trap, lab.path("cache/trainer/datasets")).expect("a link");
    to(lab.run("linked"), 6).finish().expect_code(0).expect_said(&["is a link"]);
    assert_eq!(std::fs::read_dir(&trap).expect("the trap").count(), 0, "nothing follows a link");
}

/// A machine with these files below its root.
fn machine(lab: &Lab, name: &str, files: &[(&str, &str)]) -> [(&'static str, String); 1] {
    let root = lab.path(name);
    for (path, text) in files {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("below the root")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    }
    [("TRAINER_HOST_ROOT", root.display().to_string())]
}

#[test]
fn a_machine_with_idle_gpus_trains_on_its_cpu_only_on_request() {
    const DRIVER: (&str, &str) =
        ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n");
    if cfg!(torch_cuda) {
        // There LibTorch counts the GPUs of the real machine.
        return;
    }
    let lab = Lab::on_files();
    let gpus = machine(&lab, "gpus", &[("dev/nvidia0", ""), ("dev/nvidiactl", ""), DRIVER]);
    let said =
        ["1 GPUs of this machine", "535.183.01", "needs 580 or newer", "TRAINER_GPU=none", "parallel.device=cpu"];
    let auto = [("TRAINER_GPU", "auto".to_owned())];
    refused(lab.run("paid").envs(&gpus).envs(&auto).finish(), 78, &said);
    assert_eq!(lab.keys("paid", ""), Vec::<String>::new(), "no run was made");
    let boot = lab.command(&["boot", "run.toml", "--run-id", "paid"]).json();
    refused(boot.envs(&gpus).envs(&auto).finish(), 78, &said);

    let none = [("TRAINER_GPU", "none".to_owned())];
    to(lab.run("none"), 6).envs(&gpus).envs(&none).finish().expect_code(0).expect_said(&["TRAINER_GPU is \"none\""]);
    refused(to(lab.resume("none"), 8).envs(&gpus).envs(&auto).finish(), 78, &said);
    let on_cpu = to(lab.resume("none"), 8).args(&["--set", "parallel.device=cpu"]);
    on_cpu.envs(&gpus).envs(&auto).finish().expect_code(0);
    // The setting is kept.
    to(lab.resume("none"), 9).envs(&gpus).envs(&auto).finish().expect_code(0);
    let hidden = [("CUDA_VISIBLE_DEVICES", String::new())];
    to(lab.run("hidden"), 6).envs(&gpus).envs(&auto).envs(&hidden).finish().expect_code(0);
    refused(to(lab.resume("hidden"), 8).args(&["--set", "parallel.device=cuda"]).finish(), 78, &["no CUDA"]);

    // A container without GPUs may have some of their other files, and sees the machine's bus.
    let bus = "sys/bus/pci/devices/0000:00:1e.0";
    let (vendor, class) = (format!("{bus}/vendor"), format!("{bus}/class"));
    let container = [
        ("dev/nvidiactl", ""),
        ("dev/nvidia-uvm", ""),
        (vendor.as_str(), "0x10de\n"),
        (class.as_str(), "0x030200\n"),
        DRIVER,
    ];
    let container = machine(&lab, "container", &container);
    let life = to(lab.run("container"), 6).envs(&container).envs(&auto).finish().expect_code(0);
    life.expect_said(&["1 GPUs of this machine are not used: this build has no CUDA"]);
    const { assert!(STEPS > 9, "the runs above are cut short") };
}
