//! What becomes of a group of agents on this machine when they are killed, stopped, asked to leave or bothered.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{
    RUN, at_once, beats, create, expect_nearly_undisturbed, first, leader_and_follower, leads, losses_of, next,
};
use crate::support::{
    lab::{EVERY, Lab, STEPS},
    trainer::{Event, Finished, Running},
};

/// The step whose save is disturbed; workers are held one step after it.
pub(super) const SAVED: u64 = 2 * EVERY;

/// Nodes that stop at a point do so one after the other: the first may be silent for longer than a link allows.
const PATIENT: &str = "node.patient=error";

/// The worker of this rank stops before it does the second step after the save; one of a later generation does not.
pub(super) fn hold(rank: u32) -> String {
    format!("worker.step=stop@rank={rank}@step={}@hit={}", SAVED + 2, SAVED + 2)
}

/// Two nodes with these crash points: the leader, and its follower.
pub(super) fn pair(lab: &Lab, nodes: &str, faults: &str) -> (Running, Running) {
    let [one, two] = at_once([first(lab, nodes).faults(faults), next(lab, nodes).faults(faults)]);
    leader_and_follower(one, two)
}

/// Two nodes of a run that has room for more: the leader, and its follower. Rank 0 is held before a save and behind it,
/// for [`lets_them_join`].
pub(super) fn first_two(lab: &Lab, nodes: &str) -> (Running, Running) {
    let hold = [EVERY - 1, EVERY + 2].map(|step| format!("worker.step=stop@rank=0@step={step}@hit={step}")).join(",");
    pair(lab, nodes, &hold)
}

/// The entries of the journal, in order.
fn entries(lab: &Lab, run: &str) -> Vec<Value> {
    let keys = lab.keys(run, "journal/").into_iter();
    keys.map(|key| serde_json::from_slice(&lab.read(run, &key)).expect("an entry of the journal")).collect()
}

pub(super) fn of_kind(lab: &Lab, kind: &str) -> Vec<Value> {
    of_kind_in(lab, RUN, kind)
}

/// The entries of this kind in the journal of a run, in order.
pub fn of_kind_in(lab: &Lab, run: &str, kind: &str) -> Vec<Value> {
    entries(lab, run).into_iter().filter(|entry| entry["record"]["kind"] == kind).collect()
}

/// The counter of the heartbeat of the node that leads the newest generation: it says that time passes.
pub fn leaders_beat(lab: &Lab, run: &str) -> u64 {
    let leader = of_kind_in(lab, run, "formed").pop().expect("a generation")["node"].clone();
    let key = format!("nodes/{}.json", leader.as_str().expect("an id"));
    let beat: Value = serde_json::from_slice(&lab.read(run, &key)).expect("a heartbeat");
    beat["counter"].as_u64().expect("a counter")
}

/// Every checkpoint is whole and was committed once, by a member of its generation, which was the newest one.
#[track_caller]
pub(super) fn expect_sound(lab: &Lab) {
    expect_sound_run(lab, RUN);
}

/// The same of any run.
#[track_caller]
pub fn expect_sound_run(lab: &Lab, run: &str) {
    let mut committed = BTreeSet::new();
    let mut roster = Value::Null;
    for entry in entries(lab, run) {
        let record = &entry["record"];
        match record["kind"].as_str().expect("a kind") {
            "formed" => roster = record["roster"].clone(),
            "committed" => {
                let place = (record["step"].as_u64().expect("a step"), record["generation"].as_u64());
                assert!(committed.insert(place), "committed twice: {entry}");
                let members = roster.as_array().expect("a roster");
                assert!(members.iter().any(|member| member["node"] == entry["node"]), "by a stranger: {entry}");
            }
            _ => {}
        }
    }
    lab.expect_all_verify(run);
}

pub(super) fn resumed_from(formed: &Event) -> u64 {
    formed.value["resume_step"].as_u64().unwrap_or(0)
}

pub(super) fn of_nodes(count: u64) -> impl Fn(&Event) -> bool {
    move |event| event.kind() == "formed" && event.value["nodes"].as_u64() == Some(count)
}

/// The dead leader's last save is the follower's to finish: it goes on from there, and to the end.
#[track_caller]
fn finishes_the_save(lab: &Lab, leader: &Finished, follower: Running) {
    let formed = follower.wait_for("its own generation", leads);
    assert_eq!(resumed_from(&formed), SAVED, "the save was not finished");
    let follower = follower.finish().expect_code(0);
    let commits: Vec<Value> = of_kind(lab, "committed");
    let ours: Vec<&Value> = commits.iter().filter(|entry| entry["record"]["step"] == SAVED).collect();
    assert_eq!(ours.len(), 1, "{ours:?}");
    assert_eq!(ours[0]["record"]["generation"], 1);
    assert_eq!(ours[0]["node"], of_kind(lab, "formed")[1]["node"], "the one that was left has committed it");
    expect_nearly_undisturbed(&[leader, &follower]);
    expect_sound(lab);
}

/// A follower passes the point of the manifest first when it finishes the save, the leader with each save.
#[test]
fn a_save_whose_leader_dies_behind_the_manifest_is_finished() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "1:2", &format!("save.after-manifest=kill@step={SAVED}@hit=2,{}", hold(1)));
    let leader = leader.finish().expect_killed();
    finishes_the_save(&lab, &leader, follower);
}

#[test]
fn a_save_whose_leader_dies_before_the_record_is_finished() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "1:2", &format!("save.before-record=kill@step={SAVED},{}", hold(1)));
    let leader = leader.finish().expect_killed();
    finishes_the_save(&lab, &leader, follower);
}

/// Both have put everything, and neither has said so.
#[test]
fn a_save_whose_leader_dies_behind_its_receipt_is_finished() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "1:2", &format!("save.after-receipt=stop@step={SAVED},{PATIENT},{}", hold(1)));
    assert!(leader.stopped() && follower.stopped(), "both have put their receipts");
    let leader = leader.power_off().expect_killed();
    follower.signal(Signal::CONT);
    finishes_the_save(&lab, &leader, follower);
}

/// The follower's own part is not whole when its leader dies: it ends that first.
#[test]
fn a_save_whose_leader_dies_before_the_others_have_put_theirs_is_finished() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "1:2", &format!("save.before-receipt=stop@step={SAVED},{PATIENT},{}", hold(1)));
    assert!(leader.stopped() && follower.stopped(), "neither has put its receipt");
    leader.signal(Signal::CONT);
    let receipts =
        || lab.keys(RUN, &format!("checkpoints/s{SAVED:08}")).iter().filter(|key| key.contains("/receipt")).count();
    leader.wait_until("the leader's receipt", || receipts() == 1);
    let leader = leader.power_off().expect_killed();
    follower.signal(Signal::CONT);
    finishes_the_save(&lab, &leader, follower);
}

/// Without the leader's receipt there is nothing to finish: its files are nowhere else.
#[test]
fn a_save_whose_leader_dies_before_its_receipt_is_nobodys() {
    let lab = Lab::on_files();
    let (leader, follower) =
        pair(&lab, "1:2", &format!("save.before-receipt=stop@step={SAVED}@hit=2,{PATIENT},{}", hold(1)));
    assert!(leader.stopped() && follower.stopped(), "neither has put its receipt");
    let leader = leader.power_off().expect_killed();
    follower.signal(Signal::CONT);
    let formed = follower.wait_for("its own generation", leads);
    assert_eq!(resumed_from(&formed), EVERY);
    let follower = follower.finish().expect_code(0);
    expect_nearly_undisturbed(&[&leader, &follower]);
    expect_sound(&lab);
}

/// A power cut takes every node. All come back, and the run goes on from its newest checkpoint.
#[test]
fn a_run_whose_nodes_are_all_killed_loses_no_checkpoint() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "2", &hold(0));
    leader.wait_for_step("checkpoint", SAVED);
    leader.held();
    let before = leader.power_off().expect_killed();
    follower.power_off().expect_killed();
    let again = [next(&lab, "2").start(), next(&lab, "2").start()];
    let [one, two] = again.map(|node| node.finish().expect_code(0));
    for life in [&one, &two] {
        assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
        assert_eq!(life.resumed_from(), SAVED, "{}", life.story());
        assert_eq!(life.last("formed").value["nodes"].as_u64(), Some(2), "{}", life.story());
    }
    assert_eq!(of_kind(&lab, "formed").len(), 2);
    lab.expect_as_undisturbed(RUN, &[&before, &one, &two]);
    expect_sound(&lab);
}

/// Only the worker dies: its node stays, and so do the others.
#[test]
fn a_group_whose_follower_loses_its_worker_forms_anew_with_the_same_nodes() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "2", &hold(1));
    leader.wait_for_step("checkpoint", SAVED);
    kill_process(follower.held(), Signal::KILL).expect("kill a worker");
    let [leader, follower] = [leader, follower].map(|node| node.finish().expect_code(0));
    for life in [&leader, &follower] {
        assert_eq!(life.of_kind("formed").len(), 2, "{}", life.story());
        assert_eq!(life.resumed_from(), SAVED, "{}", life.story());
    }
    let rosters: Vec<Value> = of_kind(&lab, "formed").iter().map(|entry| entry["record"]["roster"].clone()).collect();
    assert_eq!(rosters.len(), 2);
    assert_eq!(rosters[0], rosters[1], "the same nodes in the same order");
    lab.expect_as_undisturbed(RUN, &[&leader, &follower]);
    expect_sound(&lab);
}

fn signal_all(node: &Running, signal: Signal) {
    node.signal(signal);
    for worker in node.workers() {
        signal_one(worker, signal);
    }
}

fn signal_one(pid: Pid, signal: Signal) {
    // It may be gone.
    let _ = kill_process(pid, signal);
}

/// Two holds: one before a save, and one behind it. Nodes that wait join once that save is committed.
#[track_caller]
pub(super) fn lets_them_join(leader: &Running) {
    let notices = leader.events("notice").len();
    leader.let_go();
    leader.wait_until("the end of the generation", || leader.events("notice").len() > notices);
    leader.let_go();
}

/// The leader sleeps; two of three are the majority and go on without it. It wakes, sees that it was left out, and
/// takes part again under another id.
#[test]
fn a_leader_that_sleeps_is_left_out_and_comes_back() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("SKIPPED: a_leader_that_sleeps_is_left_out_and_comes_back: scripts/test --all runs it");
        return;
    }
    let lab = Lab::on_files();
    // The heir's generation is held before the save at which the sleeper can join, and behind it.
    let [before, behind] = [EVERY + 2, 2 * EVERY + 2];
    let again = |hit: u64| format!("worker.step=stop@rank=0@step={}@hit={hit}", SAVED + hit);
    let faults = [hold(0), again(before), again(behind)].join(",");
    create(lab.run(RUN));
    let mut all = Vec::from(at_once([(); 3].map(|()| next(&lab, "2:3").faults(&faults))));
    for node in &all {
        node.wait_for("all three", of_nodes(3));
    }
    all.sort_by_key(|node| !node.events("formed").iter().all(leads));
    let sleeper = all.remove(0);
    sleeper.wait_for_step("checkpoint", SAVED);
    sleeper.held();
    signal_all(&sleeper, Signal::STOP);
    for node in &all {
        assert_eq!(resumed_from(&node.wait_for("the two", of_nodes(2))), SAVED);
    }
    all.sort_by_key(|node| !leads(node.events("formed").last().expect("formed")));
    let heir = &all[0];
    heir.held();
    signal_all(&sleeper, Signal::CONT);
    heir.wait_until_said("waits to join");
    lets_them_join(heir);
    let mut lives: Vec<Finished> = vec![sleeper.finish().expect_code(0)];
    lives.extend(all.into_iter().map(|node| node.finish().expect_code(0)));
    for life in &lives {
        assert_eq!(life.last("formed").value["nodes"].as_u64(), Some(3), "{}", life.story());
    }
    lives[0].clone().expect_said(&["comes back under a new id"]);
    let formed = of_kind(&lab, "formed");
    assert_eq!(formed.len(), 3, "{formed:?}");
    let old = &formed[0]["node"];
    let roster = formed[2]["record"]["roster"].as_array().expect("a roster");
    assert!(roster.iter().all(|member| member["node"] != *old), "its old id is used up: {roster:?}");
    expect_nearly_undisturbed(&lives.iter().collect::<Vec<_>>());
    expect_sound(&lab);
}

/// The run is complete when it wakes: it has nothing left to do.
#[test]
fn a_leader_that_sleeps_to_the_end_of_the_run_ends_well() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("SKIPPED: a_leader_that_sleeps_to_the_end_of_the_run_ends_well: scripts/test --all runs it");
        return;
    }
    let lab = Lab::on_files();
    let (sleeper, other) = pair(&lab, "1:2", &hold(0));
    sleeper.wait_for_step("checkpoint", SAVED);
    sleeper.held();
    signal_all(&sleeper, Signal::STOP);
    let other = other.finish().expect_code(0);
    signal_all(&sleeper, Signal::CONT);
    let sleeper = sleeper.finish().expect_code(0);
    assert!(sleeper.of_kind("completed").is_empty(), "{}", sleeper.story());
    expect_nearly_undisturbed(&[&sleeper, &other]);
    expect_sound(&lab);
}

/// All machines are reclaimed at once.
#[test]
fn a_run_whose_nodes_are_all_told_to_leave_loses_nothing() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "2", &hold(0));
    leader.held();
    for node in [&leader, &follower] {
        node.signal(Signal::TERM);
    }
    for node in [&leader, &follower] {
        node.wait_for("a notice", |event| event.kind() == "notice");
    }
    leader.let_go();
    let lives = [leader, follower].map(|node| node.finish().expect_code(75));
    for life in &lives {
        assert_eq!(life.last("interrupted").value["lost_steps"].as_u64(), Some(0), "{}", life.story());
    }
    let interrupted = of_kind(&lab, "interrupted");
    assert_eq!(interrupted.len(), 1, "{interrupted:?}");
    let again = [next(&lab, "2").start(), next(&lab, "2").start()];
    let [one, two] = again.map(|node| node.finish().expect_code(0));
    assert_eq!(Some(one.resumed_from()), lives[0].last("interrupted").step(), "{}", one.story());
    let steps: usize = lives.iter().chain([&one, &two]).map(|life| life.of_kind("step").len()).sum();
    assert_eq!(steps as u64, STEPS, "no step was done twice");
    lab.expect_as_undisturbed(RUN, &[&lives[0], &one, &two]);
    expect_sound(&lab);
}

/// More nodes than the run takes: the third waits, and takes the place of one that is killed.
#[test]
fn a_spare_node_takes_the_place_of_one_that_is_killed() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "2", &hold(1));
    leader.wait_for_step("checkpoint", SAVED);
    follower.held();
    let spare = next(&lab, "2").start();
    spare.wait_until("its heartbeat", || beats(&lab).len() == 3);
    follower.power_off().expect_killed();
    for node in [&leader, &spare] {
        let formed = node.wait_for("the next generation", |event| {
            event.kind() == "formed" && event.value["generation"].as_u64() == Some(2)
        });
        assert_eq!((resumed_from(&formed), formed.value["nodes"].as_u64()), (SAVED, Some(2)), "{formed:?}");
    }
    let [leader, spare] = [leader, spare].map(|node| node.finish().expect_code(0));
    assert_eq!(of_kind(&lab, "formed").len(), 2, "{}", leader.story());
    lab.expect_as_undisturbed(RUN, &[&leader, &spare]);
    expect_sound(&lab);
}

/// A node that was never needed learns that the run is complete: it reads the journal once a minute.
#[test]
fn a_spare_node_ends_with_the_run() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("SKIPPED: a_spare_node_ends_with_the_run: scripts/test --all runs it");
        return;
    }
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "2", &hold(0));
    leader.held();
    let spare = next(&lab, "2").start();
    spare.wait_until("its heartbeat", || lab.keys(RUN, "nodes/").len() == 3);
    spare.wait_until_said("waiting for nodes");
    leader.let_go();
    let [leader, _] = [leader, follower].map(|node| node.finish().expect_code(0));
    let spare = spare.finish().expect_code(0);
    assert!(spare.of_kind("formed").is_empty(), "{}", spare.story());
    lab.expect_as_undisturbed(RUN, &[&leader]);
}

/// Four sequences on three nodes: one has two of them.
#[test]
fn a_third_node_joins_although_it_does_not_divide_the_batch() {
    let lab = Lab::on_files();
    let small = ["--set", "train.global_batch=4"];
    let alone = lab.run("alone").args(&small).finish().expect_code(0);
    let hold = [EVERY - 1, EVERY + 2].map(|step| format!("worker.step=stop@rank=0@step={step}@hit={step}")).join(",");
    let one = first(&lab, "2:3").args(&small).faults(&hold).start();
    // Whoever leads first decides, so all say the same.
    let two = next(&lab, "2:3").args(&small).faults(&hold).start();
    let (leader, follower) = leader_and_follower(one, two);
    leader.held();
    let third = next(&lab, "2:3").args(&small).start();
    leader.wait_until_said("waits to join");
    lets_them_join(&leader);
    let formed = third.wait_for("all three", of_nodes(3));
    assert_eq!(formed.value["shares"]["ranks"], serde_json::json!([1, 1, 2]), "{formed:?}");
    let lives = [leader, follower, third].map(|node| node.finish().expect_code(0));
    let steps: usize = lives.iter().map(|life| life.of_kind("step").len()).sum();
    assert_eq!(steps as u64, STEPS, "no step was done twice");
    let losses = losses_of(&lives.iter().collect::<Vec<_>>());
    let wanted = losses_of(&[&alone]);
    assert_eq!(losses.len(), wanted.len());
    for ((step, loss), (_, wanted)) in losses.into_iter().zip(wanted) {
        assert!((loss - wanted).abs() <= 1e-5 * wanted.abs(), "step {step}: {loss}, on one node {wanted}");
    }
    expect_sound(&lab);
}

/// The most memory that a process has had, bytes.
pub(super) fn most_memory(pid: Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Whoever is no member is shown the door, whatever he says, and however many he is.
#[test]
fn strangers_at_the_port_disturb_nobody() {
    let lab = Lab::on_files();
    let (leader, follower) = pair(&lab, "2", &hold(0));
    leader.held();
    let before = [&leader, &follower].map(|node| most_memory(node.pid()));
    let beats = beats(&lab);
    assert_eq!(beats.len(), 2, "{beats:?}");
    let mut silent = Vec::new();
    for beat in &beats {
        let address: SocketAddr = beat["group"]["address"].as_str().expect("an address").parse().expect("an address");
        // Noise; a frame of 1 GiB without TLS; a TLS record of the longest kind that never comes; plain HTTP.
        let words: [&[u8]; 4] = [
            &[0x5a; 4096],
            &(1_u32 << 30).to_le_bytes(),
            &[0x16, 0x03, 0x01, 0x40, 0x00, 0x01, 0xff, 0xff, 0xff],
            b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
        ];
        for word in words {
            let mut knock = TcpStream::connect(address).expect("the port answers");
            knock.write_all(word).expect("the kernel takes it");
            // The other side ends it, within the time of a handshake.
            let mut answer = Vec::new();
            let _ = knock.read_to_end(&mut answer);
        }
        // More than may wait at the door.
        silent.extend((0..100).map(|_| TcpStream::connect(address).expect("the port answers")));
        stranger_with_a_key_of_its_own(address, beat);
    }
    for (node, before) in [&leader, &follower].into_iter().zip(before) {
        assert!(most_memory(node.pid()) < before + (64 << 20), "memory for strangers");
    }
    leader.let_go();
    let [leader, follower] = [leader, follower].map(|node| node.finish().expect_code(0));
    for life in [&leader, &follower] {
        assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
    }
    lab.expect_as_undisturbed(RUN, &[&leader]);
    expect_sound(&lab);
}

/// It knows everything that is in the store, and has another key than any node.
fn stranger_with_a_key_of_its_own(address: SocketAddr, beat: &Value) {
    use trainer::rendezvous::channel::{End, Link, LinkSettings, LocalNode, Peer, dial};
    let key = serde_json::from_value(beat["group"]["key"].clone()).expect("a key");
    let node = serde_json::from_value(beat["node"].clone()).expect("an id");
    let me = LocalNode::new(RUN.parse().expect("a run id"), trainer::ids::NodeId::random()).expect("a key");
    let peer = Peer { node, key };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let found: Result<(), End> = runtime.block_on(async {
        let mut link: Link<Value, Value> = dial(address, &peer, &me, LinkSettings::default()).await?;
        link.recv().await.map(|_| ())
    });
    assert!(found.is_err(), "somebody speaks to a stranger");
}
