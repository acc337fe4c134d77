//! Requests that hang, each kind in its turn, while a run is asked to stop: nothing but the commit's own requests
//! stands between the notice and the commit.
//!
//! What hangs here hangs for ever, so that a run which waited for it would not end within any limit; no test looks at a
//! clock.

use std::collections::BTreeSet;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{
    lab::{EVERY, Lab, STEPS},
    proxy::{FaultProxy, Hang, Lands},
    trainer::{Finished, Running, Trainer},
};

const RUN: &str = "stalled";

/// A run without an end, which keeps one checkpoint: a deletion follows each save.
fn long(lab: &Lab) -> Trainer {
    let set = ["train.steps=1000000", "checkpoint.keep.last=1", "checkpoint.scrub=\"1s\""];
    set.iter().fold(lab.run(RUN), |command, set| command.args(&["--set", set]))
}

/// The records of the run's journal.
fn records(lab: &Lab) -> Vec<Value> {
    let record = |key: &String| serde_json::from_slice::<Value>(&lab.read(RUN, key)).expect("JSON")["record"].clone();
    lab.keys(RUN, "journal/").iter().map(record).collect()
}

fn kind(record: &Value) -> &str {
    record["kind"].as_str().unwrap_or_default()
}

/// Asks a run that is held to stop, and lets it go on when it has heard.
fn ask(running: Running) -> Finished {
    running.signal(Signal::TERM);
    running.wait_for("a notice", |event| event.kind() == "notice");
    running.let_go();
    running.finish()
}

/// It was saved whole, and the journal says so; what hung is let go, and the run carries on.
fn nothing_is_lost(lab: &Lab, proxy: &FaultProxy, life: Finished) {
    let life = life.expect_code(75);
    let last = life.last("interrupted");
    assert_eq!(last.value["lost_steps"], 0, "{}", life.story());
    let step = last.step().expect("its step");
    assert!(life.committed().contains(&step), "{}", life.story());
    proxy.disarm();
    let records = records(lab);
    let end = records.iter().rfind(|record| kind(record) == "interrupted").expect("its end");
    assert_eq!((&end["lost_steps"], &end["committed"]), (&0.into(), &step.into()), "{}", life.story());
    lab.expect_all_verify(RUN);
    let more = format!("train.steps={}", step + 2);
    let next = lab.resume(RUN).args(&["--set", &more]).finish().expect_code(0);
    assert_eq!(next.resumed_from(), step, "{}", next.story());
}

/// A run that is asked to stop while such requests hang.
fn leaves_in_time(hangs: &[Hang]) {
    let (lab, proxy) = Lab::on_s3_through_proxy(1);
    // Scrub and retention have to read what they are to believe.
    lab.server().set_rules(|rules| rules.keeps_checksums = false);
    let running = long(&lab).hold_after(3 * EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    hangs.iter().for_each(|hang| proxy.hang(*hang));
    running.held();
    // The notice's own record comes later.
    if hangs.iter().all(|hang| hang.body != NOTICE) {
        running.wait_until("a request that hangs", || proxy.hung() > 0);
    }
    let life = ask(running);
    assert!(proxy.hung() > 0, "nothing hung\n{}", life.story());
    nothing_is_lost(&lab, &proxy, life);
}

const NOTICE: &str = "\"kind\":\"notice\"";
const DELETES: [Hang; 2] = [Hang::all("DELETE", "", ""), Hang::all("POST", "?delete", "")];

#[test]
fn a_deletion_whose_record_hangs_does_not_keep_the_journal_from_the_last_save() {
    leaves_in_time(&[Hang::all("PUT", "/journal/", "\"kind\":\"pruned")]);
}

#[test]
fn deletions_that_hang_do_not_hold_up_the_last_save() {
    leaves_in_time(&DELETES);
}

#[test]
fn a_look_at_what_is_kept_that_hangs_does_not_hold_up_the_last_save() {
    leaves_in_time(&[Hang::all("GET", "/checkpoints/", "")]);
}

#[test]
fn a_notice_whose_record_hangs_does_not_hold_up_the_last_save() {
    leaves_in_time(&[Hang::all("PUT", "/journal/", NOTICE)]);
}

#[test]
fn a_heartbeat_that_hangs_does_not_hold_up_the_last_save() {
    leaves_in_time(&[Hang::all("PUT", "/nodes/", "")]);
}

/// The record of the commit itself hangs, once: it is written anew soon, whether or not the store has done what it was
/// asked.
#[test]
fn a_commit_whose_record_hangs_once_is_written_anew() {
    for lands in [Lands::Never, Lands::AtOnce, Lands::Late] {
        let (lab, proxy) = Lab::on_s3_through_proxy(1);
        let running = long(&lab).hold_after(EVERY + 1).start();
        running.wait_for_step("checkpoint", EVERY);
        running.held();
        proxy.hang(Hang { times: 1, lands, ..Hang::all("PUT", "/journal/", "\"kind\":\"committed\"") });
        let life = ask(running);
        assert_eq!(proxy.hung(), 1, "{lands:?}\n{}", life.story());
        nothing_is_lost(&lab, &proxy, life);
        let commits: Vec<_> = records(&lab).into_iter().filter(|record| kind(record) == "committed").collect();
        let steps: BTreeSet<_> = commits.iter().map(|record| record["step"].as_u64()).collect();
        assert_eq!(steps.len(), commits.len(), "a step is committed twice");
    }
}

/// One request of the last save hangs for ever, whichever: it is sent once more soon, and not only when it is given up.
#[test]
fn a_request_of_the_last_save_that_hangs_is_sent_again() {
    for target in ["/model-", "/optimizer-", "/trainer_state.json", "/receipt-", "/manifest.json"] {
        let (lab, proxy) = Lab::on_s3_through_proxy(1);
        let running = long(&lab).hold_after(EVERY + 1).start();
        running.wait_for_step("checkpoint", EVERY);
        running.held();
        proxy.hang(Hang { times: 1, ..Hang::all("PUT", target, "") });
        let life = ask(running);
        assert_eq!(proxy.hung(), 1, "{target}\n{}", life.story());
        assert!(!life.stderr.contains("no answer within"), "{target}: it was waited for\n{}", life.story());
        nothing_is_lost(&lab, &proxy, life);
    }
}

/// A heartbeat says how long its node has stood still, until there is a generation after its own.
#[test]
fn a_dead_node_is_buried_when_another_has_taken_its_place_and_not_before() {
    let (lab, proxy) = Lab::on_s3_through_proxy(1);
    let running = lab.run(RUN).hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    running.power_off();
    let dead = lab.keys(RUN, "nodes/");
    assert_eq!(dead.len(), 1, "it left without a word");
    proxy.hang(Hang::all("PUT", "/journal/", "\"kind\":\"formed\""));
    let running = lab.resume(RUN).hold_after(EVERY + 1).start();
    running.wait_until("a generation that hangs", || proxy.hung() > 0);
    assert!(lab.keys(RUN, "nodes/").contains(&dead[0]), "buried before there is another");
    proxy.disarm();
    running.wait_until("the burial", || !lab.keys(RUN, "nodes/").contains(&dead[0]));
    let formed = |records: &[Value]| records.iter().filter(|record| kind(record) == "formed").count();
    assert_eq!(formed(&records(&lab)), 2);
    running.held();
    running.let_go();
    running.finish().expect_code(0);
}

/// The time is up while the record of the last save hangs: it is given up, and can't land afterwards.
#[test]
fn a_save_that_was_told_as_lost_does_not_become_a_checkpoint_later() {
    let (lab, proxy) = Lab::on_s3_through_proxy(1);
    let running = long(&lab).envs(&[("TRAINER_STOP_WINDOW", "10s".to_owned())]).hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    running.held();
    proxy.hang(Hang { lands: Lands::Late, ..Hang::all("PUT", "/journal/", "\"kind\":\"committed\"") });
    let life = ask(running).expect_code(76);
    let lost = life.last("interrupted").value["lost_steps"].as_u64().expect("a number");
    assert!(lost > 0 && proxy.hung() > 0, "{}", life.story());
    let before = records(&lab);
    let end = before.iter().rfind(|record| kind(record) == "interrupted").expect("its end");
    assert_eq!((&end["lost_steps"], &end["committed"]), (&lost.into(), &EVERY.into()), "{}", life.story());
    let server = lab.server();
    let heard = server.count("PutObject");
    proxy.disarm();
    // All of them reach the server now.
    while server.count("PutObject") < heard + proxy.hung() {
        std::thread::yield_now();
    }
    assert_eq!(records(&lab), before);
    let next = lab.resume(RUN).args(&["--set", "train.steps=12"]).finish().expect_code(0);
    assert_eq!(next.resumed_from(), EVERY, "{}", next.story());
}

/// The first beat, and the record that forms a generation: nothing is lost if they are not waited for.
#[test]
fn who_is_asked_to_stop_while_the_run_is_taken_up_does_not_wait_for_the_store() {
    for hang in [Hang::all("PUT", "/nodes/", ""), Hang::all("PUT", "/journal/", "\"kind\":\"formed\"")] {
        let (lab, proxy) = Lab::on_s3_through_proxy(1);
        proxy.hang(hang);
        let running = lab.run(RUN).start();
        running.wait_until("a request that hangs", || proxy.hung() > 0);
        running.signal(Signal::TERM);
        running.finish().expect_code(75);
        proxy.disarm();
        lab.resume(RUN).finish().expect_code(0);
    }
}

/// What follows the last step: the record that says so comes first, and nobody need wait for the rest.
#[test]
fn a_run_that_is_complete_says_so_before_it_deletes_and_leaves_when_it_is_asked_to() {
    let (lab, proxy) = Lab::on_s3_through_proxy(1);
    let running = lab.run(RUN).args(&["--set", "checkpoint.keep.last=1"]).hold_after(EVERY + 1).start();
    running.held();
    DELETES.iter().for_each(|hang| proxy.hang(*hang));
    running.let_go();
    running.wait_until("a deletion after the end", || {
        let records = records(&lab);
        let end = records.iter().position(|record| kind(record) == "completed");
        end.is_some_and(|end| records[end..].iter().any(|record| kind(record).starts_with("pruned")))
    });
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(0);
    assert_eq!(life.last("completed").step(), Some(STEPS), "{}", life.story());
}

#[test]
fn who_is_asked_to_stop_while_a_run_is_called_complete_does_not_wait_for_the_store() {
    let (lab, proxy) = Lab::on_s3_through_proxy(1);
    proxy.hang(Hang::all("PUT", "/journal/", "\"kind\":\"completed\""));
    let running = lab.run(RUN).start();
    running.wait_until("the last record", || proxy.hung() > 0);
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    assert_eq!(life.last("interrupted").value["lost_steps"], 0, "{}", life.story());
    proxy.disarm();
    let next = lab.resume(RUN).finish().expect_code(0);
    assert_eq!(next.resumed_from(), STEPS, "{}", next.story());
}
