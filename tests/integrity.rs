//! Stored data stays right: verified by the store's own checksums, re-verified while the run trains, pruned by plan,
//! and the same on another project's server.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::lab::{EVERY, Lab, ORIGIN, STEPS, interrupted};

const DAY: Duration = Duration::from_secs(86_400);

/// Journal records of this kind, oldest first.
fn records(lab: &Lab, run: &str, kind: &str) -> Vec<Value> {
    let entries = lab.keys(run, "journal/").into_iter().map(|key| lab.read(run, &key));
    let records = entries.map(|entry| serde_json::from_slice::<Value>(&entry).expect("a record")["record"].clone());
    records.filter(|record| record["kind"] == kind).collect()
}

/// A run on S3 that SIGTERM has ended after at least two checkpoints.
fn interrupted_on_s3(run: &str) -> Lab {
    let lab = Lab::on_s3();
    let running = lab.run(run).hold_after(2 * EVERY + 1).start();
    running.wait_for_step("checkpoint", 2 * EVERY);
    running.held();
    running.signal(Signal::TERM);
    running.let_go();
    running.finish().expect_code(75);
    lab
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

#[test]
fn encryption_and_storage_class_reach_every_object_of_a_checkpoint() {
    let lab = Lab::on_s3();
    let settings =
        "[storage]\nencryption = \"sse-kms\"\nkms_key_id = \"alias/runs\"\nstorage_class = \"STANDARD_IA\"\n";
    lab.write_config("run.toml", &lab.config(settings));
    lab.run("sealed").finish().expect_code(0);
    let folder = lab.newest_checkpoint("sealed");
    for key in lab.keys("sealed", &format!("{folder}/")) {
        let asked = lab.server().asked(&format!("runs/sealed/{key}"), "PutObject").expect("put whole");
        assert_eq!(asked.encryption.as_deref(), Some("aws:kms"), "{key}");
        assert_eq!(asked.kms_key_id.as_deref(), Some("alias/runs"), "{key}");
        // A receipt is overwritten and soon useless: a storage class would cost more than it saves.
        let class = (!key.contains("/receipt-")).then_some("STANDARD_IA");
        assert_eq!(asked.storage_class.as_deref(), class, "{key}");
    }
}

#[test]
fn verify_on_s3_finds_other_bytes_of_the_same_length_without_a_download() {
    let lab = interrupted_on_s3("sums");
    let gets = lab.server().count("GetObject");
    let verified = lab.about("verify", "sums").finish().expect_code(0);
    assert!(verified.stdout.contains("good, by the store's checksum"), "{}", verified.stdout);
    assert!(!verified.stdout.contains("size only"), "{}", verified.stdout);
    let of_journal = lab.keys("sums", "journal/").len() as u64;
    assert!(lab.server().count("GetObject") - gets <= of_journal + 2, "it reads the journal and the manifest alone");

    let folder = lab.newest_checkpoint("sums");
    let key = lab.keys("sums", &format!("{folder}/model-")).remove(0);
    let mut bytes = lab.read("sums", &key);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    lab.server().write(&format!("runs/sums/{key}"), bytes);
    let verified = lab.about("verify", "sums").args(&["--json"]).finish().expect_code(65);
    let report = &lines(&verified.stdout)[0];
    let damaged: Vec<&str> = report["files"]
        .as_array()
        .expect("files")
        .iter()
        .filter(|file| !file["damage"].is_null())
        .filter_map(|file| file["object"].as_str())
        .collect();
    assert_eq!(damaged, [key.as_str()], "{report}");
    assert_eq!(report["proof"], "checksum", "{report}");

    lab.server().set_rules(|rules| rules.keeps_checksums = false);
    let verified = lab.about("verify", "sums").finish().expect_code(0);
    assert!(verified.stdout.contains("size only: this store keeps no checksum"), "{}", verified.stdout);
    lab.about("verify", "sums").args(&["--deep"]).finish().expect_code(65);
}

#[test]
fn damage_is_found_while_the_run_trains_and_stays_in_quarantine_until_a_person_deletes_it() {
    let lab = Lab::on_s3();
    let settings = "\n[checkpoint.keep]\nlast = 100\n";
    let text = lab.config(settings).replace("[checkpoint]\n", "[checkpoint]\nscrub = \"1s\"\n");
    // Long enough for the scrub to reach it; the test stops the run once it has.
    lab.write_config("run.toml", &text.replace(&format!("steps = {STEPS}"), "steps = 1000000"));
    let running = lab.run("rot").start();
    running.wait_for_step("checkpoint", EVERY);
    let folder = lab.newest_checkpoint("rot");
    let first = lab.keys("rot", "checkpoints/").into_iter().find(|key| key.contains("/optimizer-")).expect("a shard");
    let mut bytes = lab.read("rot", &first);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    lab.server().write(&format!("runs/rot/{first}"), bytes);
    // Each checkpoint is an event to wait for; the record follows within a few.
    let mut seen = 0;
    while records(&lab, "rot", "damaged").is_empty() {
        running.next(&mut seen, |event| event.kind() == "checkpoint").expect("another checkpoint");
    }
    running.signal(Signal::TERM);
    running.finish().expect_code(75);
    let damaged = records(&lab, "rot", "damaged");
    let reason = damaged[0]["reason"].as_str().expect("a reason");
    assert!(damaged.len() == 1 && reason.contains(&first) && reason.contains("checksum"), "{damaged:?}");

    let step = damaged[0]["step"].to_string();
    let place = first.rsplit_once('/').expect("a folder").0;
    assert!(!folder.is_empty());
    let listed = lab.about("checkpoints", "rot").finish().expect_code(0);
    assert!(
        listed.stdout.contains(&format!("damaged: {first}")) && listed.stdout.contains(" a month"),
        "{}",
        listed.stdout
    );
    lab.about("resume", "rot").args(&["--from", &step]).finish().expect_code(64);

    let before = lab.keys("rot", place).len();
    let pruned = lab.about("prune", "rot").args(&["--keep-last", "1"]).finish().expect_code(0);
    assert!(pruned.stdout.contains("damaged, kept for diagnosis"), "{}", pruned.stdout);
    assert_eq!(lab.keys("rot", place).len(), before, "its bytes stay");
    let shown = lab.about("prune", "rot").args(&["--damaged", "--dry-run"]).finish().expect_code(0);
    assert!(shown.stdout.contains("would be deleted"), "{}", shown.stdout);
    assert_eq!(lab.keys("rot", place).len(), before, "a dry run deletes nothing");
    lab.about("prune", "rot").args(&["--damaged"]).finish().expect_code(0);
    assert_eq!(lab.keys("rot", place), Vec::<String>::new());
    lab.expect_all_verify("rot");
}

#[test]
fn prune_gives_reasons_and_sweeps_objects_without_a_checkpoint() {
    let lab = interrupted_on_s3("plan");
    let server = lab.server();
    // Of a generation before the newest: an interrupted one may still commit.
    let orphan = "runs/plan/checkpoints/s00000099-g0000/model-00001-of-00001.safetensors";
    server.write(orphan, vec![0; 1000]);
    server.age(orphan, 2 * DAY);
    let young = "runs/plan/checkpoints/s00000098-g0001/model-00001-of-00001.safetensors";
    server.write(young, vec![0; 1000]);
    server.leave_upload("runs/plan/checkpoints/s00000097-g0001/model", 2 * DAY);
    server.leave_upload("runs/plan/checkpoints/s00000096-g0001/model", DAY / 2);
    server.leave_upload("runs/plan2/checkpoints/s00000097-g0001/model", 2 * DAY);
    // A prune that was killed after its record.
    let doomed = lab.keys("plan", "checkpoints/").remove(0).rsplit_once('/').expect("a folder").0.to_owned();
    lab.about("prune", "plan").args(&["--keep-last", "1"]).faults("journal.after-append=kill").finish().expect_killed();
    assert!(!lab.keys("plan", &format!("{doomed}/")).is_empty(), "it was killed before it deleted");

    let shown = lab.about("prune", "plan").args(&["--dry-run", "--json"]).finish().expect_code(0);
    let shown = lines(&shown.stdout);
    let of = |kind: &str| shown.iter().filter(|line| line["kind"] == kind).collect::<Vec<_>>();
    let mut why: Vec<&Value> = of("folder").iter().map(|line| &line["why"]).collect();
    assert_eq!(why.remove(0), "orphaned", "{shown:?}");
    // One record names all of them: each one is left over.
    assert!(!why.is_empty() && why.iter().all(|why| *why == "left_over"), "{shown:?}");
    assert_eq!(of("checkpoint").len(), 1, "{shown:?}");
    assert_eq!(of("upload").len(), 1, "{shown:?}");
    assert!(of("checkpoint").iter().any(|line| line["stays"][0] == "verified"), "{shown:?}");
    let total = of("total")[0];
    assert!(total["kept_bytes"].as_u64() > Some(0) && total["kept_usd_per_month"].as_f64() > Some(0.0), "{total}");
    assert!(total["gone_bytes"].as_u64() >= Some(1000), "{total}");
    assert_eq!(server.upload_keys().len(), 3, "a dry run aborts nothing");

    lab.about("prune", "plan").finish().expect_code(0);
    assert_eq!(
        server.upload_keys(),
        ["runs/plan/checkpoints/s00000096-g0001/model", "runs/plan2/checkpoints/s00000097-g0001/model"]
    );
    assert!(server.read(orphan).is_none() && server.read(young).is_some());
    assert!(lab.keys("plan", &format!("{doomed}/")).is_empty());
    lab.expect_all_verify("plan");
}

#[test]
fn a_run_sweeps_the_leftovers_of_killed_ones_at_its_start() {
    let lab = interrupted_on_s3("boot");
    let server = lab.server();
    let orphan = "runs/boot/checkpoints/s00000099-g0001/model-00001-of-00001.safetensors";
    server.write(orphan, vec![0; 1000]);
    server.age(orphan, 2 * DAY);
    server.leave_upload("runs/boot/checkpoints/s00000099-g0001/model", 2 * DAY);
    // Of the generation that is about to start, and of another run.
    server.leave_upload("runs/boot/checkpoints/s00000099-g0002/model", 2 * DAY);
    server.leave_upload("runs/other/checkpoints/s00000099-g0001/model", 2 * DAY);
    let running = lab.resume("boot").args(&["--set", "train.steps=1000000"]).start();
    // Each checkpoint is an event to wait for; the sweep is done within a few.
    let mut seen = 0;
    while server.upload_keys().len() > 2 || server.read(orphan).is_some() {
        running.next(&mut seen, |event| event.kind() == "checkpoint").expect("another checkpoint");
    }
    running.signal(Signal::TERM);
    running.finish().expect_code(75);
    assert_eq!(
        server.upload_keys(),
        ["runs/boot/checkpoints/s00000099-g0002/model", "runs/other/checkpoints/s00000099-g0001/model"]
    );
    assert!(server.read(orphan).is_none());
}

#[test]
fn a_completed_run_keeps_what_its_keep_settings_say() {
    let lab = Lab::on_files();
    lab.write_config("run.toml", &lab.config("\n[checkpoint.keep]\nlast = 2\nevery = \"8 steps\"\n"));
    // Two saves in each life: a third one may find both slots busy.
    lab.run("kept").args(&["--set", "train.steps=8"]).finish().expect_code(0);
    for steps in ["16", "24"] {
        lab.resume("kept").args(&["--set", &format!("train.steps={steps}")]).finish().expect_code(0);
    }
    let mut steps: Vec<u64> = lab
        .keys("kept", "checkpoints/")
        .iter()
        .filter_map(|key| key.strip_suffix("/manifest.json")?.split_once("/s")?.1.split_once('-')?.0.parse().ok())
        .collect();
    steps.sort_unstable();
    assert_eq!(steps, [8, 16, 20, 24]);
    lab.expect_all_verify("kept");
}

#[test]
fn on_another_projects_server_a_run_is_killed_resumed_verified_and_pruned() {
    let Some(lab) = Lab::on_moto() else { return };
    let running = lab.run("moto").hold_after(2 * EVERY + 1).start();
    running.wait_for_step("checkpoint", 2 * EVERY);
    let first = running.power_off();
    let second = lab.resume("moto").finish().expect_code(0);
    assert!(second.resumed_from() >= 2 * EVERY, "{}", second.story());
    lab.expect_as_undisturbed("moto", &[&first, &second]);
    let verified = lab.about("verify", "moto").args(&["--all"]).finish().expect_code(0);
    assert!(verified.stdout.contains("size only: this store keeps no checksum"), "{}", verified.stdout);
    lab.expect_all_verify("moto");
    let pruned = lab.about("prune", "moto").args(&["--keep-last", "1"]).finish().expect_code(0);
    assert!(pruned.stdout.contains("the newest verified"), "{}", pruned.stdout);
    lab.expect_all_verify("moto");
}

#[test]
fn a_run_that_prunes_by_time_and_loss_can_be_read_again() {
    let lab = Lab::on_interrupted_run();
    let pruned = lab
        .about("prune", ORIGIN)
        .args(&["--keep-last", "1", "--keep-every", "1h", "--keep-best", "1", "--dry-run"])
        .finish()
        .expect_code(0);
    assert!(pruned.stdout.contains("one of those kept for good"), "{}", pruned.stdout);
    assert!(pruned.stdout.contains("is read before anything is deleted"), "{}", pruned.stdout);
    lab.about("prune", ORIGIN).args(&["--keep-every", "often"]).finish().expect_code(64);
    let set = ["--set", "checkpoint.keep={ last = 2, every = \"6h\", best = 1 }", "--set", "checkpoint.scrub=never"];
    let life = lab.resume(ORIGIN).args(&set).finish().expect_code(0);
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life]);
    let status = lab.about("prune", ORIGIN).args(&["--dry-run", "--json"]).finish().expect_code(0);
    assert!(status.stdout.contains("\"every\""), "{}", status.stdout);
}
