//! A group that forms anew reads what its nodes' slots hold from them, and only the rest from the store.
//!
//! Files that must not be read in the store can't be: it resets each request for their bytes.

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use super::{
    RUN, at_once, create, expect_nearly_undisturbed,
    faults::{SAVED, expect_sound, hold, of_kind, of_nodes, pair},
    in_order_of_the_roster, leads, next, three,
};
use crate::support::{
    lab::{EVERY, Lab},
    proxy::{Fault, FaultProxy, Often, Rule},
    trainer::{Event, Finished, Running},
};

/// From now on nobody can read these files of the save.
fn hide(proxy: &FaultProxy, files: &[(String, u64)]) {
    for (name, _) in files {
        let target = format!("s{SAVED:08}-g0001/{name}").leak();
        proxy.arm(Rule { method: "GET", target, fault: Fault::Reset, often: Often::Percent(100) });
    }
}

/// The nodes of the first generation, in the order of their ranks.
fn roster(lab: &Lab) -> Vec<String> {
    let formed = of_kind(lab, "formed");
    let members = formed[0]["record"]["roster"].as_array().expect("a roster");
    members.iter().map(|member| member["node"].as_str().expect("an id").to_owned()).collect()
}

/// The tensor files of the save that these nodes have put, with their bytes.
fn files_of(lab: &Lab, nodes: &[String]) -> Vec<(String, u64)> {
    let saved = lab.keys(RUN, &format!("checkpoints/s{SAVED:08}"));
    let receipts = saved.iter().filter(|key| key.contains("/receipt"));
    let receipts = receipts.map(|key| -> Value { serde_json::from_slice(&lab.read(RUN, key)).expect("JSON") });
    let files: Vec<Value> = receipts
        .filter(|receipt| nodes.iter().any(|node| receipt["node"] == node.as_str()))
        .flat_map(|receipt| receipt["files"].as_array().expect("files").clone())
        .filter(|file| file["kind"] != "meta")
        .collect();
    assert!(files.len() >= nodes.len(), "{files:?}");
    let text =
        |file: &Value| (file["name"].as_str().expect("a name").to_owned(), file["bytes"].as_u64().expect("bytes"));
    files.iter().map(text).collect()
}

fn bytes(files: &[(String, u64)]) -> u64 {
    files.iter().map(|(_, bytes)| bytes).sum()
}

fn restored(life: &Finished) -> Event {
    let restored = life.last("restored").clone();
    assert_eq!(restored.step(), Some(SAVED), "{}", life.story());
    restored
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Two nodes, of which the follower's worker dies behind the save. Both form anew with all files in their slots.
#[track_caller]
fn restarted_pair(lab: &Lab, faults: &str, before: impl FnOnce(&[String])) -> [Finished; 2] {
    let (leader, follower) = pair(lab, "2", &format!("{},{faults}", hold(1)));
    leader.wait_for_step("checkpoint", SAVED);
    let worker = follower.held();
    before(&roster(lab));
    kill_process(worker, Signal::KILL).expect("kill a worker");
    [leader, follower].map(|node| node.finish().expect_code(0))
}

#[test]
fn a_group_that_has_all_files_in_its_slots_reads_none_of_them_in_the_store() {
    let (lab, proxy) = Lab::on_s3_through_proxy(81);
    let [leader, follower] = restarted_pair(&lab, "", |nodes| hide(&proxy, &files_of(&lab, nodes)));
    proxy.disarm();
    let nodes = roster(&lab);
    let event = restored(&leader);
    assert_eq!(event.value["from"], "memory", "{}", leader.story());
    assert_eq!(event.value["store_bytes"], 0, "{}", leader.story());
    let [of_leader, of_follower] = [0, 1].map(|node| bytes(&files_of(&lab, &nodes[node..=node])));
    assert_eq!(event.value["peer_bytes"], of_leader.max(of_follower), "{}", leader.story());
    let said = |own: u64, other: u64| {
        let (own, other) = (mib(own), mib(other));
        format!("restored step {SAVED}: {own} from memory here, {other} from other nodes' memory, 0.0 MiB from")
    };
    let leader = leader.expect_said(&[&said(of_leader, of_follower)]);
    let follower = follower.expect_said(&[&said(of_follower, of_leader)]);
    lab.expect_as_undisturbed(RUN, &[&leader, &follower]);
    expect_sound(&lab);
}

#[test]
fn a_survivor_that_gives_wrong_bytes_is_named_and_the_stores_are_loaded() {
    let lab = Lab::on_s3();
    let wrong = format!("shelf.lends=error@step={SAVED}");
    let [leader, follower] = restarted_pair(&lab, &wrong, |_| ());
    let event = restored(&leader);
    assert_eq!((event.value["from"].as_str(), event.value["peer_bytes"].as_u64()), (Some("store"), Some(0)));
    assert!(event.value["store_bytes"].as_u64() > Some(0), "{}", leader.story());
    let nodes = roster(&lab);
    let no_longer = "a node's memory no longer has this file of the checkpoint";
    let leader = leader.expect_said(&[no_longer, &nodes[1]]);
    let follower = follower.expect_said(&[no_longer, &nodes[0]]);
    lab.expect_as_undisturbed(RUN, &[&leader, &follower]);
    expect_sound(&lab);
}

/// Three nodes are two: each reads the other's files in its slots, and those of the lost node alone in the store.
#[test]
fn the_files_of_a_lost_node_are_all_that_the_store_gives() {
    let (lab, proxy) = Lab::on_s3_through_proxy(82);
    let [leader, second, third] = three(&lab, "2:3", |node| node.faults(&hold(2)));
    leader.wait_for_step("checkpoint", SAVED);
    third.held();
    let nodes = roster(&lab);
    let (kept, lost) = (files_of(&lab, &nodes[..2]), files_of(&lab, &nodes[2..]));
    hide(&proxy, &kept);
    let third = third.power_off().expect_killed();
    for node in [&leader, &second] {
        node.wait_for("the two", of_nodes(2));
    }
    leader.wait_for("what was saved", |event| event.kind() == "restored");
    proxy.disarm();
    let [leader, second] = [leader, second].map(|node| node.finish().expect_code(0));
    let event = restored(&leader);
    assert_eq!(event.value["from"], "store", "{}", leader.story());
    assert_eq!(event.value["store_bytes"], bytes(&lost), "{}", leader.story());
    assert!(event.value["peer_bytes"].as_u64() > Some(0), "{}", leader.story());
    expect_nearly_undisturbed(&[&leader, &second, &third]);
    expect_sound(&lab);
}

/// A node that was alone has all files in its slot; one that joins has none of them.
#[test]
fn a_node_that_joins_reads_all_files_in_the_others_memory() {
    let (lab, proxy) = Lab::on_s3_through_proxy(83);
    create(lab.run(RUN));
    let held = [EVERY - 1, EVERY + 2].map(|step| format!("worker.step=stop@rank=0@step={step}@hit={step}")).join(",");
    let one = next(&lab, "1:2").faults(&held).start();
    one.held();
    for kind in ["model", "optimizer"] {
        let target = format!("-g0001/{kind}-").leak();
        proxy.arm(Rule { method: "GET", target, fault: Fault::Reset, often: Often::Percent(100) });
    }
    let two = next(&lab, "1:2").start();
    one.wait_until_said("waits to join");
    one.let_go();
    one.wait_for("the word to form anew", |event| event.kind() == "notice");
    one.let_go();
    one.wait_for("what was saved", |event| event.kind() == "restored");
    proxy.disarm();
    let [one, two] = [one, two].map(|node| node.finish().expect_code(0));
    let event = one.last("restored");
    assert_eq!((event.value["from"].as_str(), event.value["store_bytes"].as_u64()), (Some("memory"), Some(0)));
    assert_eq!(event.value["peer_bytes"], event.value["bytes"], "{}", one.story());
    expect_nearly_undisturbed(&[&one, &two]);
    expect_sound(&lab);
}

/// One of three is lost, and one of the two that are left dies while it lends: the last one has the store.
#[test]
fn a_survivor_that_dies_while_it_lends_is_gone_on_without() {
    let lab = Lab::on_files();
    create(lab.run(RUN));
    let dies = format!("{},shelf.lends=kill@step={SAVED}", hold(2));
    let all = at_once([dies, hold(2), hold(2)].map(|faults| next(&lab, "1:3").faults(&faults)));
    let frail = all[0].pid();
    for node in &all {
        node.wait_for("all three", of_nodes(3));
    }
    let [leader, second, third] = in_order_of_the_roster(&lab, all);
    leader.wait_for_step("checkpoint", SAVED);
    third.held();
    // The last of those that are not frail is lost first.
    let (mut left, mut gone): (Vec<Running>, Vec<Running>) = (vec![leader, second, third], Vec::new());
    let lost = left.iter().rposition(|node| node.pid() != frail).expect("two of them");
    let lost = left.remove(lost).power_off().expect_killed();
    let at = left.iter().position(|node| node.pid() == frail).expect("the frail one");
    gone.push(left.remove(at));
    let last = left.remove(0);
    let frail = gone.remove(0).finish().expect_killed();
    last.wait_for("itself alone", |event| of_nodes(1)(event) && leads(event));
    let last = last.finish().expect_code(0);
    assert_eq!(restored(&last).value["from"], "store", "{}", last.story());
    expect_nearly_undisturbed(&[&lost, &frail, &last]);
    expect_sound(&lab);
}
