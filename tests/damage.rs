//! Damaged checkpoints, and stores that lose, cut and garble requests and answers.

use std::time::Duration;

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, interrupted},
    proxy::{Fault, Often, Rule},
};

/// The first object of the newest checkpoint whose name begins with this.
fn object(lab: &Lab, begins: &str) -> String {
    let folder = lab.newest_checkpoint(ORIGIN);
    let keys = lab.keys(ORIGIN, &format!("{folder}/{begins}"));
    keys.into_iter().next().unwrap_or_else(|| panic!("no {begins} in {folder}"))
}

/// After `damage` to one object of the newest checkpoint the run warns, names the object, and resumes from the
/// checkpoint before it.
fn stepped_over(begins: &str, damage: impl FnOnce(&Lab, &str)) {
    let lab = Lab::on_interrupted_run();
    let key = object(&lab, begins);
    damage(&lab, &key);
    let life = lab.resume(ORIGIN).finish().expect_code(0);
    assert_eq!(life.resumed_from(), 2 * EVERY, "{}", life.story());
    let name = key.rsplit('/').next().expect("a name");
    let named = life.of_kind("warning").iter().any(|event| event.line.contains(name));
    assert!(named, "no warning names {name}\n{}", life.story());
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life]);
}

#[test]
fn a_checkpoint_with_a_flipped_bit_in_a_weight_is_skipped() {
    stepped_over("model-", |lab, key| {
        lab.damage(ORIGIN, key, |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        });
    });
}

#[test]
fn a_checkpoint_with_a_truncated_moment_shard_is_skipped() {
    stepped_over("optimizer-", |lab, key| lab.damage(ORIGIN, key, |bytes| bytes.truncate(bytes.len() / 2)));
}

#[test]
fn a_checkpoint_with_a_missing_shard_is_skipped() {
    stepped_over("model-", |lab, key| lab.remove(ORIGIN, key));
}

#[test]
fn a_checkpoint_with_a_flipped_bit_in_its_manifest_is_skipped() {
    stepped_over("manifest.json", |lab, key| {
        lab.damage(ORIGIN, key, |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        });
    });
}

#[test]
fn a_checkpoint_without_its_manifest_is_skipped() {
    stepped_over("manifest.json", |lab, key| lab.remove(ORIGIN, key));
}

#[test]
fn a_run_without_a_whole_checkpoint_says_so_and_does_not_start_over() {
    let lab = Lab::on_interrupted_run();
    for key in lab.keys(ORIGIN, "checkpoints/") {
        if key.ends_with(".safetensors") {
            lab.damage(ORIGIN, &key, |bytes| bytes.truncate(bytes.len() / 2));
        }
    }
    let life = lab.resume(ORIGIN).finish().expect_code(65);
    assert!(life.of_kind("step").is_empty(), "it trained on from nothing\n{}", life.story());
}

#[test]
fn a_run_on_a_store_that_fails_every_tenth_request_ends_like_the_undisturbed_one() {
    for seed in [1, 2] {
        println!("seed {seed}");
        let (lab, proxy) = Lab::on_s3_through_proxy(seed);
        for fault in [Fault::SlowDown, Fault::Reset, Fault::CutResponse(7), Fault::LoseAnswer, Fault::CutRequest(9)] {
            proxy.arm(Rule { method: "", target: "/runs/", fault, often: Often::Percent(2) });
        }
        let life = lab.run("flaky").finish().expect_code(0);
        assert!(proxy.broken() > 0, "nothing was broken");
        proxy.disarm();
        lab.expect_as_undisturbed("flaky", &[&life]);
        lab.expect_all_verify("flaky");
    }
}

#[test]
fn a_write_whose_answer_is_lost_is_recognised_as_our_own() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let fault = Fault::LoseAnswer;
    for target in ["/journal/", "/manifest.json", "/receipt-"] {
        proxy.arm(Rule { method: "PUT", target, fault, often: Often::Next(3) });
    }
    let life = lab.run("lost").finish().expect_code(0);
    assert!(proxy.broken() >= 6, "{} answers were lost", proxy.broken());
    // One record for each: no retry appended a second one.
    let records: Vec<serde_json::Value> = lab
        .keys("lost", "journal/")
        .iter()
        .map(|key| serde_json::from_slice(&lab.read("lost", key)).expect("a record"))
        .collect();
    let of_kind = |kind: &str| records.iter().filter(|entry| entry["record"]["kind"] == kind).count();
    assert_eq!((of_kind("created"), of_kind("formed"), of_kind("completed")), (1, 1, 1), "{records:#?}");
    assert_eq!(of_kind("committed"), life.committed().len(), "{records:#?}");
    lab.expect_as_undisturbed("lost", &[&life]);
}

#[test]
fn a_bit_flipped_in_transfer_never_reaches_the_weights() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let running = lab.run("garbled").hold_after(2 * EVERY + 1).start();
    running.wait_for_step("checkpoint", 2 * EVERY);
    running.held();
    running.signal(rustix::process::Signal::TERM);
    running.let_go();
    let first = running.finish().expect_code(75);
    proxy.arm(Rule { method: "GET", target: ".safetensors", fault: Fault::FlipResponse(5000), often: Often::Next(1) });
    let second = lab.resume("garbled").finish().expect_code(0);
    assert_eq!(proxy.broken(), 1, "one answer was garbled");
    lab.expect_as_undisturbed("garbled", &[&first, &second]);
}

/// The next answers to reads of `target` are garbled. The run must still continue from its newest checkpoint, which
/// stays good: it is whole in the store.
fn garbled_on_the_way(target: &'static str, at: usize, times: u32) {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let running = lab.run("garbled").hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    let first = running.power_off();
    let newest = first.committed().last().copied().expect("a checkpoint");
    proxy.arm(Rule { method: "GET", target, fault: Fault::FlipResponse(at), often: Often::Next(times) });
    let second = lab.resume("garbled").finish().expect_code(0);
    assert_eq!(proxy.broken(), u64::from(times), "{times} answers were garbled");
    assert!(second.resumed_from() >= newest, "step {newest} was committed\n{}", second.story());
    let records = lab.keys("garbled", "journal/");
    let damaged = |key: &&String| String::from_utf8_lossy(&lab.read("garbled", key)).contains("\"damaged\"");
    assert_eq!(records.iter().find(damaged), None, "a whole checkpoint was written off\n{}", second.story());
    lab.expect_as_undisturbed("garbled", &[&first, &second]);
}

#[test]
fn a_manifest_garbled_in_transfer_costs_no_checkpoint() {
    garbled_on_the_way("/manifest.json", 100, 2);
}

/// The run's own record, on which everything rests.
#[test]
fn a_journal_record_garbled_in_transfer_costs_nothing() {
    garbled_on_the_way("/journal/00000000000000000001.json", 0, 1);
}

#[test]
fn weights_garbled_twice_in_transfer_cost_no_checkpoint() {
    garbled_on_the_way("/model-", 5000, 2);
}

#[test]
fn a_slow_store_loses_nothing() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    proxy.set_line(crate::support::proxy::Line {
        latency: Duration::from_millis(20),
        up: Some(20 << 20),
        down: Some(20 << 20),
        ..Default::default()
    });
    let life = lab.run("slow").finish().expect_code(0);
    lab.expect_as_undisturbed("slow", &[&life]);
}
