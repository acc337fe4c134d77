//! What a group does when one member can't save, when a save never ends, and when one node's worker breaks everybody.

use std::collections::BTreeMap;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{
    Lab, RUN, at_once, create, expect_nearly_undisturbed,
    faults::{SAVED, expect_sound, first_two, hold, lets_them_join, of_kind, of_nodes, pair, resumed_from},
    in_order_of_the_roster, leads, next, three,
};
use crate::support::{
    lab::{EVERY, STEPS},
    proxy::{FaultProxy, Hang},
    trainer::{Event, Finished, Running},
};

/// A worker of rank 0 stops before it does this step, in a life in which it has done `done` steps before.
fn stop(step: u64, done: u64) -> String {
    format!("worker.step=stop@rank=0@step={step}@hit={}", done + 1)
}

fn of_generation(number: u64) -> impl Fn(&Event) -> bool {
    move |event| event.kind() == "formed" && event.value["generation"].as_u64() == Some(number)
}

/// Who is not in this generation any more, and why, in one text.
fn gone(lab: &Lab, generation: usize) -> String {
    let formed: Value = of_kind(lab, "formed").swap_remove(generation - 1);
    formed["record"]["gone"].to_string()
}

fn said(node: &Running, words: &str) -> bool {
    node.events("warning").iter().any(|event| event.value["message"].as_str().is_some_and(|it| it.contains(words)))
}

/// It reaches the store, and its commits fail. It says why, another one leads, and it is not asked to take part again
/// while there are enough others.
#[test]
fn a_leader_whose_commits_fail_hands_over_by_name() {
    let lab = Lab::on_files();
    // The first leader has committed once by then, and is held at no later save. The next one is held at step 14.
    let fails = [2, 3, 4].map(|hit| format!("save.before-record=error@step={SAVED}@hit={hit}"));
    let later = SAVED + EVERY + 2;
    let faults = [&[hold(0), stop(later, later - 1 - EVERY)][..], &fails].concat().join(",");
    let [failing, others @ ..] = three(&lab, "2:3", |node| node.faults(&faults));
    for node in &others {
        assert_eq!(resumed_from(&node.wait_for("the two", of_nodes(2))), EVERY);
        assert!(said(node, "hands over"), "it hears why");
    }
    assert!(said(&failing, "hands over"));
    let heir = others.iter().find(|node| leads(node.events("formed").last().expect("formed"))).expect("a leader");
    heir.wait_until_said("waits to join");
    heir.held();
    heir.let_go();
    let lives = others.map(|node| node.finish().expect_code(0));
    assert_eq!(of_kind(&lab, "formed").len(), 2, "it stays outside\n{}", lives[0].story());
    let gone = gone(&lab, 2);
    assert!(gone.contains("its saves failed 3 times in a row, and others' did not"), "{gone}");
    let failing = failing.power_off();
    expect_nearly_undisturbed(&[&failing, &lives[0], &lives[1]]);
    expect_sound(&lab);
}

/// A node joins, and can't put its part of a save.
#[test]
fn a_follower_whose_saves_fail_is_left_out_by_name() {
    let lab = Lab::on_files();
    let (leader, follower) = first_two(&lab, "2:3");
    leader.held();
    let third = next(&lab, "2:3").faults("save.before-receipt=error").start();
    leader.wait_until_said("waits to join");
    lets_them_join(&leader);
    third.wait_for("all three", of_nodes(3));
    leader.wait_for("the two again", of_generation(3));
    third.wait_until("its own word", || said(&third, "this node is left out"));
    let lives = [leader, follower].map(|node| node.finish().expect_code(0));
    let formed = of_kind(&lab, "formed");
    assert_eq!(formed.len(), 3, "it stays outside");
    let gone = gone(&lab, 3);
    assert!(gone.contains("its saves failed 3 times in a row, and others' did not"), "{gone}");
    assert_eq!(formed[2]["record"]["roster"].as_array().map(Vec::len), Some(2));
    expect_nearly_undisturbed(&[&lives[0], &lives[1]]);
    expect_sound(&lab);
}

/// Too few nodes would be left without it: it is named, and everybody goes on.
#[test]
fn a_member_whose_saves_fail_and_that_is_needed_is_named_and_stays() {
    let lab = Lab::on_files();
    let fails = [2, 3, 4].map(|hit| format!("save.before-record=error@step={SAVED}@hit={hit}"));
    let faults = [&[hold(0)][..], &fails].concat().join(",");
    let (leader, follower) = pair(&lab, "2", &faults);
    leader.held();
    leader.wait_until("its name", || said(&leader, "stays, since too few nodes would be left without it"));
    leader.let_go();
    let lives = [leader, follower].map(|node| node.finish().expect_code(0));
    assert_eq!(of_kind(&lab, "formed").len(), 1);
    lab.expect_as_undisturbed(RUN, &[&lives[0]]);
    expect_sound(&lab);
}

/// Three nodes, in the order of the roster, and their ways to the store. The leader's worker is held behind a save, and
/// the node of this place is cut off from the store.
#[track_caller]
fn three_of_which_one_loses_the_store(
    lab: &Lab,
    nodes: &str,
    faults: &str,
    place: usize,
) -> ([Running; 3], BTreeMap<i32, FaultProxy>) {
    create(lab.run(RUN));
    let ways = [1, 2, 3].map(|seed| FaultProxy::start(lab.server().address(), seed));
    let all = at_once(
        ways.each_ref().map(|way| next(lab, nodes).envs(&[("AWS_ENDPOINT_URL", way.endpoint())]).faults(faults)),
    );
    let ways: BTreeMap<i32, FaultProxy> = all.iter().map(|node| node.pid().as_raw_nonzero().get()).zip(ways).collect();
    for node in &all {
        node.wait_for("all three", of_nodes(3));
    }
    let all = in_order_of_the_roster(lab, all);
    all[0].wait_for_step("checkpoint", SAVED);
    all[0].held();
    ways[&all[place].pid().as_raw_nonzero().get()].hang(Hang::all("", "", ""));
    (all, ways)
}

/// A person asks the run to stop, without a deadline, and one node is cut off from the store. The others don't wait for
/// all of its tries.
#[test]
fn a_drain_does_not_wait_for_a_node_that_is_cut_off() {
    let lab = Lab::on_s3();
    let faults = format!("{},save.hasty=error", hold(0));
    let ([leader, cut_off, other], ways) = three_of_which_one_loses_the_store(&lab, "2:3", &faults, 1);
    lab.about("drain", RUN).args(&["--no-wait"]).finish().expect_code(0);
    leader.wait_for("the request", |event| event.kind() == "notice");
    leader.let_go();
    let lives = [leader, other].map(|node| node.finish().expect_code(76));
    drop(ways);
    // It may not have heard of the newest checkpoint.
    cut_off.finish().expect_code(76);
    let stopped = lives[0].last("interrupted").step().expect("a step");
    for life in &lives {
        assert_eq!(life.last("interrupted").value["lost_steps"].as_u64(), Some(stopped - SAVED), "{}", life.story());
        assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
    }
    let named = |life: &Finished| {
        life.of_kind("warning").iter().any(|event| {
            let message = event.value["message"].as_str().expect("a message");
            message.contains("is lost: its save did not end in")
        })
    };
    assert!(named(&lives[0]), "{}", lives[0].story());
    assert_eq!(of_kind(&lab, "interrupted").len(), 1);
    assert!(of_kind(&lab, "committed").iter().all(|entry| entry["record"]["step"].as_u64() <= Some(SAVED)));
    let last = next(&lab, "1:3").finish().expect_code(0);
    assert_eq!(last.resumed_from(), SAVED, "{}", last.story());
    expect_nearly_undisturbed(&[&lives[0], &last]);
    expect_sound(&lab);
}

/// A node leaves that has time, and another one is cut off: both are gone, and the leader goes on.
#[test]
fn a_node_that_leaves_does_not_wait_for_one_that_is_cut_off() {
    let lab = Lab::on_s3();
    let faults = format!("{},save.hasty=error", hold(0));
    let ([leader, cut_off, leaving], _ways) = three_of_which_one_loses_the_store(&lab, "1:3", &faults, 1);
    leaving.signal(Signal::TERM);
    leaving.wait_for("a notice", |event| event.kind() == "notice");
    leader.wait_for("its notice", |event| event.kind() == "notice");
    leader.let_go();
    assert_eq!(resumed_from(&leader.wait_for("it alone", of_nodes(1))), SAVED);
    let leaving = leaving.finish().expect_code(76);
    let leader = leader.finish().expect_code(0);
    let gone = gone(&lab, 2);
    assert!(gone.contains("its save did not end in") && gone.contains("was told to leave"), "{gone}");
    cut_off.power_off();
    assert!(leaving.last("interrupted").value["lost_steps"].as_u64() >= Some(1), "{}", leaving.story());
    expect_nearly_undisturbed(&[&leader]);
    expect_sound(&lab);
}

/// A node is cut off from the store in the middle of a save, and another one's worker dies: the others don't wait for
/// that save, which nobody commits.
#[test]
fn a_save_that_never_ends_is_given_up_and_its_node_is_left_out_by_name() {
    let lab = Lab::on_s3();
    let next_save = SAVED + EVERY;
    let faults = format!("{},{},save.hasty=error", hold(0), stop(next_save + 2, next_save + 1));
    let ([leader, cut_off, other], _ways) = three_of_which_one_loses_the_store(&lab, "2:3", &faults, 1);
    leader.let_go();
    leader.wait_for_step("step", next_save + 1);
    leader.held();
    let receipts = || {
        let keys = lab.keys(RUN, &format!("checkpoints/s{next_save:08}-g0001/"));
        keys.iter().filter(|key| key.contains("/receipt")).count()
    };
    leader.wait_until("the others' parts", || receipts() == 2);
    let worker: Pid = other.workers()[0];
    kill_process(worker, Signal::KILL).expect("kill a worker");
    for node in [&leader, &other] {
        assert_eq!(resumed_from(&node.wait_for("the two", of_nodes(2))), SAVED);
    }
    let gone = gone(&lab, 2);
    assert!(gone.contains("its save did not end in"), "{gone}");
    let lives = [leader, other].map(|node| node.finish().expect_code(0));
    let given_up = |entry: &Value| entry["record"]["step"] == next_save && entry["record"]["generation"] == 1;
    assert!(!of_kind(&lab, "committed").iter().any(given_up), "a save that was given up is committed");
    cut_off.power_off();
    expect_nearly_undisturbed(&[&lives[0], &lives[1]]);
    expect_sound(&lab);
}

/// The worker of this place in the roster is killed three times. Its node leaves with an error that says so, and the
/// others finish the run.
fn breaks_everybody(place: usize) {
    let lab = Lab::on_files();
    let held = |hit: u64| format!("worker.step=stop@rank={place}@step={}@hit={hit}", SAVED + 2);
    let faults = [held(SAVED + 2), held(2)].join(",");
    let mut all = Vec::from(three(&lab, "2:3", |node| node.faults(&faults)));
    let broken = all.remove(place);
    for generation in 1..=3 {
        broken.wait_for("the next generation", of_generation(generation));
        if generation == 1 {
            all.first().filter(|_| place > 0).unwrap_or(&broken).wait_for_step("checkpoint", SAVED);
        }
        kill_process(broken.held(), Signal::KILL).expect("kill a worker");
    }
    let broken = broken.finish().expect_code(69);
    broken.clone().expect_said(&["this node leaves the run", "3 times", "SIGKILL", "log"]);
    for node in &all {
        assert_eq!(resumed_from(&node.wait_for("the two", of_nodes(2))), SAVED);
    }
    let gone = gone(&lab, 4);
    assert!(gone.contains("its workers have ended the group 3 times"), "{gone}");
    // A worker of the next one may be held in its place.
    let heir = all.iter().find(|node| leads(node.events("formed").last().expect("formed"))).expect("a leader");
    if place == 0 {
        heir.held();
        heir.let_go();
    }
    let lives: Vec<_> = all.into_iter().map(|node| node.finish().expect_code(0)).collect();
    assert_eq!(of_kind(&lab, "formed").len(), 4, "{}", lives[0].story());
    assert_eq!(lives[0].committed().last().max(lives[1].committed().last()), Some(&STEPS));
    expect_nearly_undisturbed(&[&broken, &lives[0], &lives[1]]);
    expect_sound(&lab);
}

#[test]
fn a_follower_whose_worker_breaks_everybody_leaves_with_an_error() {
    breaks_everybody(2);
}

#[test]
fn a_leader_whose_worker_breaks_everybody_hands_over_and_leaves_with_an_error() {
    breaks_everybody(0);
}
