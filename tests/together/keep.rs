//! Workers live through planned changes of their group: a node leaves after a notice, or nodes join at a save.
//!
//! Tensor files must not be read in the store: it resets each request for their bytes, so whoever needs them never
//! restores, and the requests are counted.

use rustix::process::{Pid, Signal};

use super::{
    RUN, create, expect_nearly_undisturbed,
    faults::{SAVED, expect_sound, hold, lets_them_join, of_kind, of_nodes, pair, resumed_from},
    leads, next, three,
};
use crate::support::{
    lab::{EVERY, Lab, STEPS},
    proxy::{Fault, FaultProxy, Often, Rule},
    trainer::{Event, Finished, Running, Trainer},
};

/// A step after the change, before which rank 0 is held.
const LATER: u64 = 3 * EVERY + 3;

/// Rank 0 is held before this step, in a process that has done all steps before it.
fn held_before(step: u64) -> String {
    format!("worker.step=stop@rank=0@step={step}@hit={step}")
}

/// From now on no tensor file can be read in the store.
fn hide(proxy: &FaultProxy) {
    for target in ["/model-", "/optimizer-"] {
        proxy.arm(Rule { method: "GET", target, fault: Fault::Reset, often: Often::Percent(100) });
    }
}

/// The node's worker goes on in its newest generation from the state in its memory.
#[track_caller]
fn expect_kept(life: &Finished, step: u64) {
    let kept = life.last("kept");
    assert_eq!((kept.step(), kept.value["workers"].as_u64()), (Some(step), Some(1)), "{}", life.story());
    assert_eq!(kept.value["loads"].as_bool(), Some(false), "{}", life.story());
}

/// No step was done twice.
#[track_caller]
fn expect_each_step_once(lives: &[&Finished]) {
    let steps: usize = lives.iter().map(|life| life.of_kind("step").len()).sum();
    let stories: Vec<String> = lives.iter().map(|life| life.story()).collect();
    assert_eq!(steps as u64, STEPS, "no step was done twice\n{}", stories.join("\n"));
}

#[test]
fn the_worker_of_a_leader_lives_on_when_its_follower_leaves() {
    let (lab, proxy) = Lab::on_s3_through_proxy(91);
    let (leader, follower) = pair(&lab, "1:2", &[hold(0), held_before(LATER)].join(","));
    leader.wait_for_step("checkpoint", SAVED);
    let worker = leader.held();
    hide(&proxy);
    follower.signal(Signal::TERM);
    follower.wait_for("a notice", |event| event.kind() == "notice");
    leader.let_go();
    let follower = follower.finish().expect_code(75);
    assert_eq!(follower.last("interrupted").value["lost_steps"].as_u64(), Some(0), "{}", follower.story());
    let formed = leader.wait_for("itself alone", of_nodes(1));
    assert_eq!(leader.held(), worker, "the same process");
    leader.let_go();
    let leader = leader.finish().expect_code(0);
    expect_kept(&leader, resumed_from(&formed));
    assert_eq!(proxy.broken(), 0, "nothing was asked for");
    proxy.disarm();
    assert_eq!(leader.last("restored").value["bytes"].as_u64(), Some(0), "{}", leader.story());
    expect_each_step_once(&[&leader]);
    expect_nearly_undisturbed(&[&leader]);
    expect_sound(&lab);
}

#[test]
fn the_worker_of_a_follower_lives_on_and_is_rank_0_when_its_leader_leaves() {
    let (lab, proxy) = Lab::on_s3_through_proxy(92);
    let (leader, follower) = pair(&lab, "1:2", &[hold(0), held_before(LATER)].join(","));
    leader.wait_for_step("checkpoint", SAVED);
    leader.held();
    let workers = follower.workers();
    hide(&proxy);
    leader.signal(Signal::TERM);
    leader.wait_for("a notice", |event| event.kind() == "notice");
    leader.let_go();
    let leader = leader.finish().expect_code(75);
    let formed = follower.wait_for("its own generation", leads);
    assert_eq!(workers, [follower.held()], "the same process");
    follower.let_go();
    let follower = follower.finish().expect_code(0);
    expect_kept(&follower, resumed_from(&formed));
    assert_eq!(proxy.broken(), 0, "nothing was asked for");
    proxy.disarm();
    expect_each_step_once(&[&leader, &follower]);
    expect_nearly_undisturbed(&[&leader, &follower]);
    expect_sound(&lab);
}

/// The one worker of a node that is not stopped.
#[track_caller]
fn worker_of(node: &Running) -> Pid {
    let workers = node.workers();
    let [worker] = workers[..] else { panic!("{workers:?}") };
    worker
}

fn of_world(world: u64) -> impl Fn(&Event) -> bool {
    move |event| event.kind() == "formed" && event.value["world_size"].as_u64() == Some(world)
}

/// One node, then three, two, and four. Those that stay have the same worker all the time.
#[track_caller]
fn grows_and_shrinks(lab: &Lab, more: impl Fn(Trainer) -> Trainer, survivors: impl Fn(u64)) -> Vec<Finished> {
    let holds = [EVERY - 1, EVERY + 2, 2 * EVERY + 3, 4 * EVERY - 1, 4 * EVERY + 2, 5 * EVERY + 3].map(held_before);
    create(lab.run(RUN));
    let faults = [&holds[..], &["grow.at-once=error".to_owned()]].concat().join(",");
    let one = more(next(lab, "1:4")).faults(&faults).start();
    let worker = one.held();
    let two = more(next(lab, "1:4")).start();
    let three = more(next(lab, "1:4")).start();
    for count in 1..=2 {
        one.wait_until("nodes that wait", || one.said("waits to join") >= count);
    }
    survivors(1);
    lets_them_join(&one);
    one.wait_for("three", of_world(3));
    assert_eq!(one.held(), worker, "1 to 3");
    let (second, third) = (worker_of(&two), worker_of(&three));
    three.signal(Signal::TERM);
    three.wait_for("a notice", |event| event.kind() == "notice");
    survivors(3);
    one.let_go();
    let three = three.finish().expect_code(75);
    assert!(!three.left_processes(), "its worker {third:?} ends with it");
    one.wait_for("two", of_world(2));
    assert_eq!((one.held(), worker_of(&two)), (worker, second), "3 to 2");
    let (four, five) = (more(next(lab, "1:4")).start(), more(next(lab, "1:4")).start());
    one.wait_until("nodes that wait", || one.said("waits to join") >= 4);
    survivors(2);
    lets_them_join(&one);
    one.wait_for("four", of_world(4));
    assert_eq!((one.held(), worker_of(&two)), (worker, second), "2 to 4");
    one.let_go();
    let mut lives: Vec<Finished> = [one, two, four, five].map(|node| node.finish().expect_code(0)).into();
    lives.push(three);
    lives
}

#[test]
fn workers_live_on_while_their_group_grows_and_shrinks_and_nobody_reads_the_store() {
    let (lab, proxy) = Lab::on_s3_through_proxy(93);
    let lives = grows_and_shrinks(
        &lab,
        |node| node,
        |world| {
            if world == 1 {
                hide(&proxy)
            }
        },
    );
    assert_eq!(proxy.broken(), 0, "nothing was asked for");
    proxy.disarm();
    assert_eq!((lives[0].of_kind("kept").len(), lives[1].of_kind("kept").len()), (3, 2), "{}", lives[0].story());
    assert!(lives[2].of_kind("kept").is_empty(), "it has just come: {}", lives[2].story());
    let worlds: Vec<u64> =
        of_kind(&lab, "formed").iter().map(|entry| entry["record"]["world_size"].as_u64().unwrap()).collect();
    assert_eq!(worlds, [1, 3, 2, 4]);
    expect_each_step_once(&[&lives[0]]);
    expect_nearly_undisturbed(&[&lives[0]]);
    expect_sound(&lab);
}

/// Each rank has a part of the state: the processes live on, and load their new parts.
#[test]
fn workers_of_zero1_live_on_while_their_group_grows_and_shrinks() {
    let lab = Lab::on_files();
    let lives = grows_and_shrinks(&lab, |node| node.args(&["--set", "parallel.strategy=zero1"]), |_| ());
    let kept = lives[0].of_kind("kept");
    assert_eq!(kept.len(), 3, "{}", lives[0].story());
    assert!(kept.iter().all(|kept| kept.value["loads"].as_bool() == Some(true)), "{}", lives[0].story());
    expect_each_step_once(&[&lives[0]]);
    expect_nearly_undisturbed(&[&lives[0]]);
    expect_sound(&lab);
}

/// A node that leaves takes a part of the state along, and stays until the others have read it.
#[test]
fn workers_of_zero1_read_the_part_of_a_node_that_leaves_in_its_memory() {
    let (lab, proxy) = Lab::on_s3_through_proxy(94);
    let faults = [hold(0), held_before(LATER)].join(",");
    let args = ["--set", "parallel.strategy=zero1"];
    let [leader, second, third] = three(&lab, "1:3", |node| node.faults(&faults).args(&args));
    leader.wait_for_step("checkpoint", SAVED);
    let workers = [leader.held(), worker_of(&second)];
    hide(&proxy);
    third.signal(Signal::TERM);
    third.wait_for("a notice", |event| event.kind() == "notice");
    leader.let_go();
    let third = third.finish().expect_code(75);
    leader.wait_for("the two", of_nodes(2));
    assert_eq!([leader.held(), worker_of(&second)], workers, "the same processes");
    leader.let_go();
    let [leader, second] = [leader, second].map(|node| node.finish().expect_code(0));
    assert_eq!(proxy.broken(), 0, "nothing was asked for in the store\n{}", leader.story());
    proxy.disarm();
    let restored = leader.last("restored");
    assert_eq!(restored.value["store_bytes"].as_u64(), Some(0), "{}", leader.story());
    assert!(restored.value["peer_bytes"].as_u64() > Some(0), "{}", leader.story());
    assert_eq!(third.last("interrupted").value["lost_steps"].as_u64(), Some(0), "{}", third.story());
    expect_each_step_once(&[&leader]);
    expect_nearly_undisturbed(&[&leader, &second]);
    expect_sound(&lab);
}

/// One of three leaves; while the two that stay meet again, the second is told to leave as well.
#[test]
fn a_second_notice_while_workers_regroup_loses_nothing() {
    let lab = Lab::on_files();
    let faults = [hold(0), "worker.regroup=stop@rank=0".to_owned()].join(",");
    let [leader, second, third] = three(&lab, "1:3", |node| node.faults(&faults));
    leader.wait_for_step("checkpoint", SAVED);
    leader.held();
    third.signal(Signal::TERM);
    third.wait_for("a notice", |event| event.kind() == "notice");
    leader.let_go();
    let third = third.finish().expect_code(75);
    leader.wait_for("the two", of_nodes(2));
    leader.held();
    second.signal(Signal::TERM);
    let second = second.finish().expect_code(75);
    let formed = leader.wait_for("itself alone", of_nodes(1));
    let leader = leader.finish().expect_code(0);
    for life in [&second, &third] {
        assert_eq!(life.last("interrupted").value["lost_steps"].as_u64(), Some(0), "{}", life.story());
    }
    assert!(resumed_from(&formed) > SAVED, "{}", leader.story());
    expect_each_step_once(&[&leader]);
    expect_nearly_undisturbed(&[&leader]);
    expect_sound(&lab);
}

/// The worker that was kept waits for it; its node goes on without the newcomer, with a new worker.
#[test]
fn a_newcomer_that_dies_while_it_loads_is_gone_on_without() {
    let lab = Lab::on_files();
    create(lab.run(RUN));
    let one = next(&lab, "1:2").faults(&[EVERY - 1, EVERY + 2].map(held_before).join(",")).start();
    one.held();
    let two = next(&lab, "1:2").faults("worker.loaded=stop").start();
    one.wait_until_said("waits to join");
    lets_them_join(&one);
    one.wait_for("both", of_nodes(2));
    two.held();
    let two = two.power_off().expect_killed();
    let formed = one.wait_for("itself alone again", |event| of_nodes(1)(event) && resumed_from(event) > 0);
    let one = one.finish().expect_code(0);
    assert!(resumed_from(&formed) >= EVERY, "{}", one.story());
    assert_eq!(one.of_kind("kept").len(), 1, "{}", one.story());
    assert!(two.of_kind("step").is_empty());
    expect_each_step_once(&[&one]);
    expect_nearly_undisturbed(&[&one]);
    expect_sound(&lab);
}

/// A survivor's worker dies in the regroup: all start anew from the checkpoint.
#[test]
fn a_worker_that_dies_while_it_regroups_is_started_anew_and_loses_nothing() {
    let lab = Lab::on_files();
    let faults = [hold(0), "worker.regroup=kill@rank=0".to_owned()].join(",");
    let [leader, second, third] = three(&lab, "1:3", |node| node.faults(&faults));
    leader.wait_for_step("checkpoint", SAVED);
    leader.held();
    third.signal(Signal::TERM);
    third.wait_for("a notice", |event| event.kind() == "notice");
    leader.let_go();
    let third = third.finish().expect_code(75);
    let [leader, second] = [leader, second].map(|node| node.finish().expect_code(0));
    let formed = of_kind(&lab, "formed");
    let [three, two, again] = &formed[..] else { panic!("{formed:?}") };
    assert_eq!(three["record"]["roster"].as_array().unwrap().len(), 3);
    assert_eq!(two["record"]["roster"], again["record"]["roster"], "the same two");
    assert_eq!(two["record"]["resume"], again["record"]["resume"], "from the same step");
    for life in [&leader, &second] {
        assert_eq!(life.of_kind("kept").len(), 1, "{}", life.story());
    }
    expect_each_step_once(&[&leader]);
    expect_nearly_undisturbed(&[&leader, &second, &third]);
    expect_sound(&lab);
}
