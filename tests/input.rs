//! Bad input: each mistake gets an error that names it and the remedy, has its own exit code, and loses nothing.

use std::process::Command;

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, STEPS, data_set, interrupted, model_config, sample_text},
    s3::{BUCKET, CreateOnce, NonAtomicS3, client_env},
    trainer::read,
};

#[test]
fn an_unknown_key_is_refused_with_the_nearest_one() {
    let lab = Lab::on_files();
    lab.write_config("run.toml", &lab.config("").replace("global_batch", "global_bacth"));
    lab.run("typo").finish().expect_code(78).expect_said(&["global_bacth", "global_batch"]);
    assert!(lab.keys("typo", "").is_empty(), "a refused run leaves nothing behind");
}

#[test]
fn an_unknown_setting_on_the_command_line_is_refused_with_the_nearest_one() {
    let lab = Lab::on_files();
    let life = lab.run("typo").args(&["--set", "train.stpes=3"]).finish();
    assert!(matches!(life.code(), Some(64 | 78)), "{}", life.story());
    life.expect_said(&["train.stpes", "train.steps"]);
}

#[test]
fn a_missing_configuration_file_is_named() {
    let lab = Lab::on_files();
    lab.command(&["run", "nowhere.toml", "--run-id", "x"]).finish().expect_code(78).expect_said(&["nowhere.toml"]);
}

#[test]
fn a_configuration_that_is_not_toml_is_named_with_its_line() {
    let lab = Lab::on_files();
    lab.write_config("run.toml", "[train]\nsteps = = 3\n");
    lab.run("x").finish().expect_code(78).expect_said(&["run.toml", "2"]);
}

#[test]
fn missing_data_is_named() {
    let lab = Lab::on_files();
    let uri = format!("file://{}", lab.path("no-such-data").display());
    let setting = format!("data.train=\"{uri}\"");
    lab.run("x").args(&["--set", &setting]).finish().expect_code(78).expect_said(&["no-such-data"]);
}

#[test]
fn a_model_with_another_vocabulary_is_refused() {
    let lab = Lab::on_files();
    std::fs::write(lab.path("model.json"), model_config(300)).expect("write model.json");
    lab.run("x").finish().expect_code(78).expect_said(&["vocab_size", "300"]);
}

#[test]
fn run_ids_that_would_leave_their_folder_are_refused() {
    let lab = Lab::on_files();
    for id in ["../x", "a/b", "..", "", "a\nb", "-x"] {
        for command in ["run run.toml", "resume", "status"] {
            let mut arguments: Vec<&str> = command.split(' ').collect();
            let (store, id) = (lab.uri(), format!("--run-id={id}"));
            arguments.extend(["--store", &store, &id]);
            let life = lab.command(&arguments).finish();
            assert!(matches!(life.code(), Some(64 | 78)), "{id:?} of {command}\n{}", life.story());
            assert!(life.stderr.contains("run id") || life.stderr.contains("run-id"), "{}", life.story());
        }
    }
    assert!(!lab.path("x").exists() && !lab.path("store").exists(), "nothing was written");
}

#[test]
fn a_run_id_that_exists_is_refused_with_a_hint_to_resume() {
    let lab = Lab::on_interrupted_run();
    let before = lab.keys(ORIGIN, "");
    lab.run(ORIGIN).finish().expect_code(64).expect_said(&[ORIGIN, "resume"]);
    assert_eq!(lab.keys(ORIGIN, ""), before, "the run that exists is untouched");
}

#[test]
fn a_run_that_does_not_exist_cannot_be_resumed() {
    let lab = Lab::on_interrupted_run();
    let life = lab.resume("nobody").finish();
    assert!(matches!(life.code(), Some(64 | 78)), "{}", life.story());
    life.expect_said(&["nobody"]);
}

#[test]
fn a_step_without_a_checkpoint_cannot_be_resumed_from() {
    let lab = Lab::on_interrupted_run();
    let before = lab.keys(ORIGIN, "");
    let life = lab.resume(ORIGIN).args(&["--from", "3"]).finish();
    assert!(matches!(life.code(), Some(64 | 65 | 78)), "{}", life.story());
    let life = life.expect_said(&["3"]);
    assert!(life.of_kind("step").is_empty(), "{}", life.story());
    assert_eq!(lab.keys(ORIGIN, "checkpoints/"), {
        let mut keys = before;
        keys.retain(|key| key.starts_with("checkpoints/"));
        keys
    });
}

#[test]
fn a_resume_that_would_change_the_mathematics_is_refused() {
    let lab = Lab::on_interrupted_run();
    let life = lab.resume(ORIGIN).args(&["--set", "train.nonsense=1"]).finish();
    assert!(matches!(life.code(), Some(64 | 78)), "{}", life.story());
    let more = format!("train.steps={}", STEPS + 2);
    let life = lab.resume(ORIGIN).args(&["--set", &more]).finish().expect_code(0);
    assert_eq!(life.last("completed").step(), Some(STEPS + 2), "{}", life.story());
}

#[test]
fn more_ranks_than_sequences_are_refused() {
    let lab = Lab::on_files();
    let life = lab.run("x").args(&["--nproc-per-node", "13"]).finish().expect_code(78);
    life.expect_said(&["train.global_batch = 12 is too small for 13 workers", "--nproc-per-node 12"]);
    assert!(lab.keys("x", "").is_empty(), "a run was created");
}

#[test]
fn a_store_uri_of_an_unknown_kind_is_refused() {
    let lab = Lab::on_files();
    for uri in ["ftp://host/x", "nonsense://", "s3://"] {
        let life = lab.run("x").args(&["--store", uri]).finish();
        assert!(matches!(life.code(), Some(64 | 78)), "{uri}\n{}", life.story());
    }
}

#[test]
fn a_store_that_denies_writes_is_a_permission_error() {
    let lab = Lab::on_s3();
    lab.server().set_rules(|rules| rules.deny_writes = true);
    lab.run("x").finish().expect_code(77);
}

#[test]
fn wrong_keys_are_a_permission_error_and_are_not_printed() {
    let lab = Lab::on_s3();
    let wrong = [("AWS_SECRET_ACCESS_KEY", "not-the-secret-key".to_owned())];
    let life = lab.run("x").envs(&wrong).finish().expect_code(77);
    assert!(!life.stderr.contains("not-the-secret-key"), "{}", life.story());
}

#[test]
fn permission_lost_half_way_loses_nothing_committed() {
    let lab = Lab::on_s3();
    let running = lab.run("denied").hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    lab.server().set_rules(|rules| rules.deny_writes = true);
    running.let_go();
    let first = running.finish();
    assert_eq!(first.code(), Some(77), "{}", first.story());
    lab.server().set_rules(|rules| rules.deny_writes = false);
    let second = lab.resume("denied").finish().expect_code(0);
    assert!(second.resumed_from() >= EVERY, "{}", second.story());
    lab.expect_as_undisturbed("denied", &[&first, &second]);
}

#[test]
fn a_store_that_ignores_create_once_is_refused_at_the_start() {
    let lab = Lab::on_s3();
    lab.server().set_rules(|rules| rules.create_once = CreateOnce::Ignored);
    lab.run("x").finish().expect_code(78);
    assert!(lab.keys("x", "").is_empty(), "a refused store has no run");
}

#[test]
fn a_store_whose_create_once_is_not_atomic_is_refused_at_the_start() {
    let lab = Lab::on_s3();
    lab.server().set_rules(|rules| rules.create_once = CreateOnce::Racy);
    lab.run("x").finish().expect_code(78).expect_said(&["atomic"]);
    assert!(lab.keys("x", "").is_empty(), "a refused store has no run");
}

#[test]
fn a_published_server_that_is_not_atomic_is_refused_at_the_start() {
    let lab = Lab::on_s3();
    let server = NonAtomicS3::start(&lab.path("s3s-fs"));
    lab.run("x").envs(&client_env(&server.endpoint())).finish().expect_code(78).expect_said(&["atomic"]);
}

#[test]
fn a_store_without_a_server_is_unavailable() {
    let lab = Lab::on_s3();
    // A port that was free a moment ago and has no listener.
    let address = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    lab.run("x").envs(&client_env(&format!("http://{address}"))).finish().expect_code(69);
}

#[test]
fn a_full_disk_loses_nothing_committed() {
    let lab = Lab::on_files();
    let disk = lab.path("small-disk");
    std::fs::create_dir(&disk).expect("mount point");
    // There is room for two checkpoints, but not for a third.
    let bytes = interrupted().life.last("checkpoint").value["bytes"].as_u64().expect("bytes");
    let mount = |options: String| {
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&disk).output();
        done.is_ok_and(|output| output.status.success())
    };
    if !mount(format!("size={}", bytes * 5 / 2)) {
        eprintln!("SKIPPED a_full_disk_loses_nothing_committed: mounting a tmpfs needs root");
        return;
    }
    struct Unmount<'a>(&'a std::path::Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0).status();
        }
    }
    let _unmount = Unmount(&disk);
    let uri = format!("file://{}", disk.display());
    let first = lab.run("full").args(&["--store", &uri]).finish();
    assert!(matches!(first.code(), Some(69 | 76)), "{}", first.story());
    let committed = first.committed();
    assert!(!committed.is_empty(), "something was committed before the disk was full\n{}", first.story());
    assert!(mount(format!("remount,size={}", bytes * 20)), "give the disk room");
    let resume = ["resume", "--run-id", "full", "--store", &uri];
    let second = lab.command(&resume).json().finish().expect_code(0);
    assert_eq!(Some(&second.resumed_from()), committed.last(), "{}", second.story());
    let out = lab.path("export-full");
    let arguments = ["export", "--run-id", "full", "--store", &uri, "--out", &out.display().to_string()];
    lab.command(&arguments).finish().expect_code(0);
    let reference = crate::support::lab::reference();
    assert_eq!(crate::support::trainer::losses(&[&first, &second]), reference.losses);
    assert!(read(&out.join("model.safetensors")) == reference.model, "weights differ from the undisturbed run's");
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    let lab = Lab::on_files();
    for arguments in [&["nonsense"][..], &["run"], &["run", "run.toml", "--nonsense"], &["resume", "--from", "x"]] {
        lab.command(arguments).finish().expect_code(64);
    }
}

#[test]
fn preparing_nothing_or_over_another_data_set_is_refused() {
    let lab = Lab::on_files();
    let prepare = |input: &str, tokenizer: &str, out: &str| {
        let (input, out) = (lab.path(input).display().to_string(), format!("file://{}", lab.path(out).display()));
        lab.command(&["data", "prepare", "--input", &input, "--tokenizer", tokenizer, "--out", &out]).finish()
    };
    std::fs::write(lab.path("one.txt"), &sample_text()[..20_000]).expect("write text");
    std::fs::write(lab.path("two.txt"), &sample_text()[20_000..40_000]).expect("write text");
    let none = prepare("nothing-*.txt", "train:300", "out");
    assert!(matches!(none.code(), Some(64 | 78)), "{}", none.story());
    let tokenizer = prepare("one.txt", "no-tokenizer.json", "out");
    assert_eq!(tokenizer.code(), Some(78), "{}", tokenizer.story());
    prepare("one.txt", "train:300", "out").expect_code(0);
    let index = read(&lab.path("out/index.json"));
    let other = prepare("two.txt", "train:300", "out");
    assert!(matches!(other.code(), Some(64 | 78)), "{}", other.story());
    assert_eq!(read(&lab.path("out/index.json")), index, "the data set that stood there is untouched");
}

/// A copy of the tiny dataset's files whose first token shard `change` has changed, and that shard's name.
fn changed_data_set(change: impl FnOnce(&mut Vec<u8>)) -> (Vec<(String, Vec<u8>)>, String) {
    let folder = std::fs::read_dir(data_set()).expect("data set");
    let mut files: Vec<(String, Vec<u8>)> = folder
        .map(|entry| entry.expect("entry"))
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), read(&entry.path())))
        .collect();
    let (name, bytes) = files.iter_mut().find(|(name, _)| name.starts_with("train")).expect("a token shard");
    change(bytes);
    let name = name.clone();
    (files, name)
}

#[test]
fn a_truncated_token_shard_is_refused_by_name() {
    let lab = Lab::on_files();
    let (files, name) = changed_data_set(|bytes| bytes.truncate(bytes.len() / 2));
    let copy = lab.path("data-copy");
    std::fs::create_dir(&copy).expect("folder");
    for (name, bytes) in files {
        std::fs::write(copy.join(name), bytes).expect("copy a file");
    }
    let setting = format!("data.train=\"file://{}\"", copy.display());
    lab.run("x").args(&["--set", &setting]).finish().expect_code(65).expect_said(&[&name]);
}

#[test]
fn a_token_shard_with_a_flipped_bit_is_refused_when_it_is_fetched() {
    let lab = Lab::on_s3();
    let (files, name) = changed_data_set(|bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    });
    for (name, bytes) in files {
        lab.server().write(&format!("data/{name}"), bytes);
    }
    let setting = format!("data.train=\"s3://{BUCKET}/data\"");
    lab.run("x").args(&["--set", &setting]).finish().expect_code(65).expect_said(&[&name]);
}

#[test]
fn a_run_with_data_in_the_store_ends_like_the_one_with_local_data() {
    let lab = Lab::on_s3();
    for (name, bytes) in changed_data_set(|_| ()).0 {
        lab.server().write(&format!("data/{name}"), bytes);
    }
    let setting = format!("data.train=\"s3://{BUCKET}/data\"");
    let life = lab.run("remote").args(&["--set", &setting]).finish().expect_code(0);
    lab.expect_as_undisturbed("remote", &[&life]);
}
