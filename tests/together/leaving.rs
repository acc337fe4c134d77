//! Nodes that are told to leave: all of three at once, and by a person while the leader dies.

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use super::{
    Lab, RUN, beats, expect_nearly_undisturbed,
    faults::{SAVED, expect_sound, hold, of_kind, of_nodes, resumed_from},
    leads, next, three,
};
use crate::support::{
    lab::STEPS,
    trainer::{Finished, Running},
};

/// Spot capacity of a whole zone is reclaimed: each machine has its own notice, within a second of the others'.
#[test]
fn three_nodes_that_are_told_to_leave_within_a_second_save_one_step() {
    let lab = Lab::on_files();
    let all = three(&lab, "3", |node| node.faults(&hold(0)));
    all[0].held();
    for node in &all {
        node.signal(Signal::TERM);
    }
    for node in &all {
        node.wait_for("a notice", |event| event.kind() == "notice");
    }
    all[0].let_go();
    let lives = all.map(|node| node.finish().expect_code(75));
    let stops: Vec<Option<u64>> = lives.iter().map(|life| life.last("interrupted").step()).collect();
    assert!(stops.iter().all(|step| *step == stops[0]), "all ranks stop at one step: {stops:?}");
    for life in &lives {
        assert_eq!(life.last("interrupted").value["lost_steps"].as_u64(), Some(0), "{}", life.story());
        assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
    }
    let saved: Vec<Value> = of_kind(&lab, "committed").iter().map(|entry| entry["record"]["step"].clone()).collect();
    assert_eq!(saved.last().and_then(Value::as_u64), stops[0], "{saved:?}");
    assert_eq!(of_kind(&lab, "interrupted").len(), 1);
    assert!(beats(&lab).is_empty(), "all have left");
    let again = [(); 3].map(|()| next(&lab, "3").start()).map(|node| node.finish().expect_code(0));
    for life in &again {
        assert_eq!(Some(life.resumed_from()), stops[0], "{}", life.story());
    }
    assert_eq!(of_kind(&lab, "formed").len(), 2, "one generation, and one more");
    let all: Vec<&Finished> = lives.iter().chain(&again).collect();
    let steps: usize = all.iter().map(|life| life.of_kind("step").len()).sum();
    assert_eq!(steps as u64, STEPS, "no step was done twice");
    expect_nearly_undisturbed(&all);
    expect_sound(&lab);
}

/// The leader's agent is killed when the request is in the store. `heard`: it had begun to obey.
fn asked_while_the_leader_dies(heard: bool) {
    let lab = Lab::on_files();
    // The heir does one step, so that it hears of the request in the middle of the run.
    let heir_held = format!("worker.step=stop@rank=0@step={}@hit=2", SAVED + 2);
    let faults = [hold(0), heir_held].join(",");
    let [leader, one, two] = three(&lab, "2:3", |node| node.faults(&faults));
    leader.wait_for_step("checkpoint", SAVED);
    leader.held();
    // Its command would ask again whoever leads next.
    let only_asks = if heard { &[][..] } else { &["--no-wait"] };
    let drain = lab.about("drain", RUN).args(only_asks).start();
    leader.wait_until("the request", || !lab.keys(RUN, "drains/").is_empty());
    if heard {
        leader.wait_for("a notice", |event| event.kind() == "notice");
    }
    kill_process(leader.pid(), Signal::KILL).expect("kill the leader's agent");
    let leader = leader.finish().expect_killed();
    assert!(!leader.left_processes(), "its workers end with it");
    let others = [one, two];
    let formed = others.each_ref().map(|node| node.wait_for("the two", of_nodes(2)));
    let heir: &Running = others.iter().zip(&formed).find(|(_, formed)| leads(formed)).expect("a leader").0;
    heir.wait_for("the request", |event| event.kind() == "notice");
    heir.let_go();
    let lives = others.map(|node| node.finish().expect_code(75));
    drain.finish().expect_code(0);
    for (life, formed) in lives.iter().zip(&formed) {
        assert_eq!(resumed_from(formed), SAVED, "{}", life.story());
        assert_eq!(life.last("interrupted").value["lost_steps"].as_u64(), Some(0), "{}", life.story());
        assert_eq!(life.of_kind("formed").len(), 2, "{}", life.story());
    }
    assert_eq!((of_kind(&lab, "formed").len(), of_kind(&lab, "interrupted").len()), (2, 1));
    let stopped = lives[0].last("interrupted").step();
    let last = next(&lab, "1:3").finish().expect_code(0);
    assert_eq!(Some(last.resumed_from()), stopped, "{}", last.story());
    expect_nearly_undisturbed(&[&leader, &lives[0], &lives[1], &last]);
    expect_sound(&lab);
}

#[test]
fn a_request_to_stop_outlives_a_leader_that_has_not_heard_it() {
    asked_while_the_leader_dies(false);
}

#[test]
fn a_request_to_stop_outlives_a_leader_that_obeyed_it() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("SKIPPED: a_request_to_stop_outlives_a_leader_that_obeyed_it: scripts/test --all runs it");
        return;
    }
    asked_while_the_leader_dies(true);
}
