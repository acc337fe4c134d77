//! A run that has reached a cap ends cleanly, with its own exit code and record; a higher cap lets it go on to the
//! digits of the undisturbed run, whoever was killed at the cap, on one node and on two.

use serde_json::Value;

use crate::{
    support::{
        lab::{EVERY, Lab, ORIGIN, STEPS},
        trainer::{Finished, Running, Trainer},
    },
    together::{at_once, create, leader_and_follower},
};

const RUN: &str = "capped";
/// The step that is finished when the cap is reached.
const HELD: u64 = 2 * EVERY + 1;
/// Rank 1 has begun this one by then: all ranks stop after it.
const STOPS: u64 = HELD + 1;

/// A run that reaches its cap of `set` while it is held after [`HELD`] steps.
fn held(trainer: Trainer, set: &[&str]) -> Trainer {
    let trainer = set.iter().fold(trainer, |trainer, set| trainer.args(&["--set", set]));
    trainer.hold_after(HELD).faults(&format!("run.cap=error@step={HELD}"))
}

/// Waits until a run has heard of its cap, and lets it end.
#[track_caller]
fn reaches(running: Running, key: &str) -> Finished {
    running.held();
    let notice = running.wait_for("the cap", |event| event.kind() == "notice");
    assert_eq!((&notice.value["source"], &notice.value["means"]), (&key.into(), &"stop".into()));
    running.let_go();
    running.finish()
}

fn records(lab: &Lab, kind: &str) -> Vec<Value> {
    let read = |key: &String| serde_json::from_slice::<Value>(&lab.read(RUN, key)).expect("a record");
    lab.keys(RUN, "journal/").iter().map(read).filter(|entry| entry["record"]["kind"] == kind).collect()
}

/// The run's last record says which cap ended it, and its last step is committed.
#[track_caller]
fn expect_recorded(lab: &Lab, life: &Finished, cap: &str) {
    assert_eq!(life.last("interrupted").step(), Some(STOPS), "{}", life.story());
    assert_eq!(life.last("interrupted").value["lost_steps"], 0, "{}", life.story());
    assert!(life.last("interrupted").value["cap"].as_str().unwrap().contains(&format!("run.{cap} = ")));
    assert_eq!(life.committed().last(), Some(&STOPS), "{}", life.story());
    let end = records(lab, "interrupted").pop().expect("a record");
    let record = &end["record"];
    assert_eq!((&end["format"], &record["cap"]["cap"]), (&7.into(), &cap.into()), "{end}");
    assert_eq!((&record["step"], &record["committed"]), (&STOPS.into(), &STOPS.into()), "{end}");
    assert_eq!(record["drain"]["source"], format!("run.{cap}"), "{end}");
}

#[test]
fn a_run_at_its_cap_ends_cleanly_and_goes_on_with_a_higher_one() {
    let lab = Lab::on_files();
    let life = reaches(held(lab.run(RUN), &["run.max_hours=50", "run.price_per_hour=0.35"]).start(), "run.max_hours");
    let life = life.expect_code(80).expect_said(&[
        "at its cap: ",
        "run.max_hours = 50",
        "trainer resume --run-id capped",
        "--set run.max_hours=N, above 50, or \"none\"",
    ]);
    expect_recorded(&lab, &life, "max_hours");
    let created = lab.read(RUN, "journal/00000000000000000000.json");
    let created: Value = serde_json::from_slice(&created).unwrap();
    assert_eq!(created["format"], 7, "an earlier version, which knows no caps, refuses it");

    // Every command says so.
    let status: Value =
        serde_json::from_str(&lab.about("status", RUN).args(&["--json"]).finish().expect_code(0).stdout).unwrap();
    assert_eq!((&status["state"], &status["step"]), (&"capped".into(), &STOPS.into()));
    assert!(status["cap"].as_str().unwrap().contains("run.max_hours = 50"), "{status}");
    let text = lab.about("status", RUN).finish().expect_code(0).stdout;
    assert!(text.contains("at its cap") && text.contains("h trained, of run.max_hours = 50"), "{text}");
    assert!(text.contains("USD spent"), "{text}");
    let text = lab.about("explain", RUN).finish().expect_code(0).stdout;
    assert!(text.contains(&format!("at its cap after step {STOPS}")) && text.contains("to go on: "), "{text}");
    assert!(text.contains("run.max_hours: asked to stop"), "{text}");
    let runs = lab.command(&["runs", "--store", &lab.uri()]).finish().expect_code(0).stdout;
    assert!(runs.contains("at its cap"), "{runs}");
    lab.about("drain", RUN).finish().expect_code(64).expect_said(&["it is at its cap"]);

    // It stays there: nothing is trained, whatever takes it up, and nothing is written.
    let before = lab.keys(RUN, "journal/");
    let other = ["--set", "run.max_wait_hours=5"];
    let boot = lab.about("boot", RUN).json();
    for again in [lab.resume(RUN), lab.resume(RUN).args(&other), lab.resume(RUN).args(&["--from", "4"]), boot] {
        let again = again.finish().expect_code(80).expect_said(&["run.max_hours = 50"]);
        assert!(again.of_kind("formed").is_empty(), "{}", again.story());
    }
    assert_eq!(lab.keys(RUN, "journal/"), before);

    // A higher cap, or none, lets it go on.
    let on = lab.resume(RUN).args(&["--set", "run.max_hours=60"]).finish().expect_code(0);
    assert_eq!(on.resumed_from(), STOPS, "{}", on.story());
    lab.expect_as_undisturbed(RUN, &[&life, &on]);
    lab.expect_all_verify(RUN);
    lab.resume(RUN).finish().expect_code(0);
}

#[test]
fn real_time_ends_a_run_and_money_does() {
    for (set, key) in [
        (&["run.max_hours=1e-7"][..], "run.max_hours"),
        (&["run.max_cost=0.001", "run.price_per_hour=1e9"], "run.max_cost"),
        (&["run.max_wait_hours=1e-7", "run.max_hours=100"], "run.max_wait_hours"),
    ] {
        let lab = Lab::on_files();
        let run = set.iter().fold(lab.run(RUN), |trainer, set| trainer.args(&["--set", set]));
        let life = run.finish().expect_code(80).expect_said(&[&format!("{key} = ")]);
        assert_eq!(life.last("notice").value["source"], key, "{}", life.story());
        assert_eq!(records(&lab, "interrupted").len(), 1, "{}", life.story());
        let none = format!("{key}=none");
        let on = lab.resume(RUN).args(&["--set", &none]).finish().expect_code(0);
        assert_eq!(on.last("completed").step(), Some(STEPS));
        lab.expect_as_undisturbed(RUN, &[&life, &on]);
    }
}

/// The journal alone shows that a run is at its cap: nobody has recorded it.
#[test]
fn a_run_that_is_given_a_cap_below_what_it_has_taken_is_at_it() {
    let lab = Lab::on_interrupted_run();
    let run = ORIGIN;
    let set = ["--set", "run.max_hours=1e-7"];
    let life = lab.resume(run).args(&set).finish().expect_code(80).expect_said(&["run.max_hours = 0.0000001"]);
    assert!(life.of_kind("formed").is_empty(), "{}", life.story());
    lab.resume(run).finish().expect_code(0);
}

#[test]
fn an_agent_that_is_killed_at_the_cap_loses_nothing_that_was_saved() {
    // In the middle of the last save, and between it and the last record.
    for (point, resumed) in [("save.after-shard", 2 * EVERY), ("journal.after-append", STOPS)] {
        let lab = Lab::on_files();
        let run = held(lab.run(RUN), &["run.max_cost=50", "run.price_per_hour=1"]);
        let running = run.faults(&format!("{point}=kill@step={STOPS}")).start();
        running.wait_for_step("checkpoint", 2 * EVERY);
        running.held();
        running.wait_for("the cap", |event| event.kind() == "notice");
        running.let_go();
        let first = running.finish().expect_killed();
        assert!(records(&lab, "interrupted").is_empty());
        // Its journal shows that there is time left.
        let second = lab.resume(RUN).finish().expect_code(0);
        assert_eq!(second.resumed_from(), resumed, "{}", second.story());
        lab.expect_as_undisturbed(RUN, &[&first, &second]);
    }
}

#[test]
fn a_leader_ends_all_of_its_nodes_at_the_cap() {
    let lab = Lab::on_files();
    create(lab.run(RUN).args(&["--set", "run.max_cost=50", "--set", "run.price_per_hour=1"]));
    let node =
        || lab.resume(RUN).args(&["--nodes", "2", "--nproc-per-node", "1", "--set", "network.address=127.0.0.1"]);
    let [one, two] = at_once([held(node(), &[]), held(node(), &[])]);
    let (leader, follower) = leader_and_follower(one, two);
    let leader = reaches(leader, "run.max_cost").expect_code(80);
    let follower = follower.finish().expect_code(80).expect_said(&["at its cap", "run.max_cost = 50"]);
    expect_recorded(&lab, &leader, "max_cost");
    assert_eq!(follower.last("interrupted").value["lost_steps"], 0, "{}", follower.story());
    assert_eq!(records(&lab, "interrupted").len(), 1);
    // Neither comes back before somebody raises the cap.
    let [one, two] = [node(), node()].map(|node| node.finish().expect_code(80));
    assert!(one.of_kind("formed").is_empty() && two.of_kind("formed").is_empty());
    let higher = |node: Trainer| node.args(&["--set", "run.max_cost=60"]);
    let both = at_once([higher(node()), higher(node())]).map(|node| node.finish().expect_code(0));
    let leads = |life: &&Finished| !life.of_kind("step").is_empty();
    let second = both.iter().find(leads).expect("a leader");
    lab.expect_as_undisturbed(RUN, &[&leader, second]);
}
