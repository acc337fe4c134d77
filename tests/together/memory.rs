//! What a group that forms anew reads from the store: only what no memory of its nodes has.
//!
//! Files that must not be read can't be: the store resets each request for their bytes, so a node that asks for them
//! never restores.

use serde_json::Value;

use super::{RUN, at_once, expect_nearly_undisturbed, first, leader_and_follower, next};
use crate::support::{
    lab::{EVERY, Lab},
    proxy::{Fault, FaultProxy, Often, Rule},
    trainer::Running,
};

/// The step whose save a group starts again from; workers are held one step after it.
const SAVED: u64 = 2 * EVERY;

/// The leader and its follower; the worker of rank 1 is held before it does the second step after the save, for which
/// both wait.
fn held_pair(lab: &Lab, nodes: &str) -> (Running, Running) {
    let hold = format!("worker.step=stop@rank=1@step={}@hit={}", SAVED + 2, SAVED + 2);
    let [one, two] = at_once([first(lab, nodes).faults(&hold), next(lab, nodes).faults(&hold)]);
    let (leader, follower) = leader_and_follower(one, two);
    leader.wait_for_step("checkpoint", SAVED);
    follower.held();
    (leader, follower)
}

/// From now on no object can be read whose key has this part.
fn hide(proxy: &FaultProxy, part: String) {
    let target = part.leak();
    proxy.arm(Rule { method: "GET", target, fault: Fault::Reset, often: Often::Percent(100) });
}

/// The tensor files of the save that the group's leader has put.
fn of_the_leader(lab: &Lab) -> Vec<(String, u64)> {
    let read = |key: &String| -> Value { serde_json::from_slice(&lab.read(RUN, key)).expect("JSON") };
    let journal = lab.keys(RUN, "journal/");
    let formed = journal.iter().map(read).rfind(|entry| entry["record"]["kind"] == "formed").expect("a generation");
    let saved = lab.keys(RUN, &format!("checkpoints/s{SAVED:08}"));
    let receipts = saved.iter().filter(|key| key.contains("/receipt")).map(read);
    let files: Vec<Value> = receipts
        .filter(|receipt| receipt["node"] == formed["node"])
        .flat_map(|receipt| receipt["files"].as_array().expect("files").clone())
        .filter(|file| file["kind"] != "meta")
        .collect();
    let text =
        |file: &Value| (file["name"].as_str().expect("a name").to_owned(), file["bytes"].as_u64().expect("bytes"));
    files.iter().map(text).collect()
}

#[test]
fn a_survivor_reads_the_files_of_the_lost_node_alone() {
    let (lab, proxy) = Lab::on_s3_through_proxy(71);
    let (leader, follower) = held_pair(&lab, "1:2");
    let own = of_the_leader(&lab);
    assert!(!own.is_empty());
    for (name, _) in &own {
        hide(&proxy, format!("s{SAVED:08}-g0001/{name}"));
    }
    follower.power_off().expect_killed();
    leader.wait_for("what was saved", |event| event.kind() == "restored");
    proxy.disarm();
    let leader = leader.finish().expect_code(0);
    let restored = leader.last("restored");
    assert_eq!((restored.step(), restored.value["from"].as_str()), (Some(SAVED), Some("store")), "{}", leader.story());
    let mib = own.iter().map(|(_, bytes)| *bytes).sum::<u64>() as f64 / f64::from(1 << 20);
    let leader = leader.expect_said(&[&format!("restored step {SAVED}: {mib:.1} MiB from memory here")]);
    expect_nearly_undisturbed(&[&leader]);
    lab.expect_all_verify(RUN);
}
