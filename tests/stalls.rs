//! Requests of each kind that hang while a run is asked to stop: only the commit's own requests may come between the
//! notice and the commit.
//!
//! The requests hang forever, so a run that waited for one would never end; no test looks at a clock.

use std::{collections::BTreeSet, sync::mpsc::RecvTimeoutError, time::Duration};

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::support::{
    lab::{EVERY, Lab, STEPS},
    proxy::{FaultProxy, Hang, Lands},
    trainer::{Finished, Running, Trainer},
};

const RUN: &str = "stalled";

/// A run without an end that keeps one checkpoint, so that a deletion follows each save.
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

/// Asks a held run to stop, and releases it once it has heard.
fn ask(running: Running) -> Finished {
    running.signal(Signal::TERM);
    running.wait_for("a notice", |event| event.kind() == "notice");
    running.let_go();
    running.finish()
}

/// The run was saved whole, and the journal says so. The hanging requests are released, and the run continues.
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
    // Scrub and retention must read the checkpoints to trust them.
    lab.server().set_rules(|rules| rules.keeps_checksums = false);
    // The first deletion follows the second save: before that, the requests are told to hang.
    let running = long(&lab).hold_after_each(&[EVERY + 1, 3 * EVERY + 1]).start();
    running.wait_for_step("checkpoint", EVERY);
    running.held();
    hangs.iter().for_each(|hang| proxy.hang(*hang));
    running.let_go();
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
fn a_hanging_record_of_a_deletion_does_not_delay_the_last_save() {
    leaves_in_time(&[Hang::all("PUT", "/journal/", "\"kind\":\"pruned")]);
}

#[test]
fn hanging_deletions_do_not_delay_the_last_save() {
    leaves_in_time(&DELETES);
}

#[test]
fn a_hanging_listing_does_not_delay_the_last_save() {
    leaves_in_time(&[Hang::all("GET", "/checkpoints/", "")]);
}

#[test]
fn a_hanging_record_of_a_notice_does_not_delay_the_last_save() {
    leaves_in_time(&[Hang::all("PUT", "/journal/", NOTICE)]);
}

#[test]
fn a_hanging_heartbeat_does_not_delay_the_last_save() {
    leaves_in_time(&[Hang::all("PUT", "/nodes/", "")]);
}

/// The commit's own record hangs once. It is sent again soon, whether or not the store has carried out the request.
#[test]
fn a_hanging_record_of_a_commit_is_sent_again() {
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

/// Any one request of the last save hangs forever: it is sent once more soon, and not only after its time-out.
#[test]
fn a_hanging_request_of_the_last_save_is_sent_again() {
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

/// A dead node's heartbeat stays, with its last counter, until there is a newer generation.
#[test]
fn a_dead_nodes_heartbeat_is_deleted_only_after_another_node_took_over() {
    let (lab, proxy) = Lab::on_s3_through_proxy(1);
    let running = lab.run(RUN).hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    running.power_off();
    let dead = lab.keys(RUN, "nodes/");
    assert_eq!(dead.len(), 1, "it left no final record");
    proxy.hang(Hang::all("PUT", "/journal/", "\"kind\":\"formed\""));
    let running = lab.resume(RUN).hold_after(EVERY + 1).start();
    running.wait_until("a generation that hangs", || proxy.hung() > 0);
    assert!(lab.keys(RUN, "nodes/").contains(&dead[0]), "removed before there is another");
    proxy.disarm();
    running.wait_until("the burial", || !lab.keys(RUN, "nodes/").contains(&dead[0]));
    let formed = |records: &[Value]| records.iter().filter(|record| kind(record) == "formed").count();
    assert_eq!(formed(&records(&lab)), 2);
    running.held();
    running.let_go();
    running.finish().expect_code(0);
}

/// The time is up while the record of the last save hangs: it is given up, and must not arrive afterwards.
#[test]
fn a_save_reported_as_lost_does_not_become_a_checkpoint_later() {
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

/// For the first beat, and for the record that forms a generation: nothing is lost without waiting for them.
#[test]
fn an_agent_asked_to_stop_while_it_joins_does_not_wait_for_the_store() {
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

/// After the last step its record comes first, and no other request need be waited for.
#[test]
fn a_complete_run_records_that_before_it_deletes_and_exits_on_request() {
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
fn an_agent_asked_to_stop_while_it_records_completion_does_not_wait_for_the_store() {
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

/// A supervisor that allows 8 s and kills after 12. The store answers nothing from the notice on: the process says for
/// itself that something was lost, and exits.
#[test]
fn a_process_on_a_silent_store_exits_before_it_is_killed() {
    let (lab, proxy) = Lab::on_s3_through_proxy(1);
    let running = long(&lab).envs(&[("TRAINER_STOP_WINDOW", "8s".to_owned())]).hold_after(EVERY + 2).start();
    running.wait_for_step("checkpoint", EVERY);
    running.held();
    for method in ["PUT", "GET", "HEAD", "POST", "DELETE"] {
        proxy.hang(Hang::all(method, "", ""));
    }
    running.signal(Signal::TERM);
    running.wait_for("a notice", |event| event.kind() == "notice");
    let (ended, end) = std::sync::mpsc::channel::<()>();
    let supervisor = std::thread::spawn({
        let pid = running.pid();
        move || {
            if end.recv_timeout(Duration::from_secs(12)) == Err(RecvTimeoutError::Timeout) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    });
    running.let_go();
    let life = running.finish();
    drop(ended);
    let life = life.expect_code(76);
    let end = life.last("interrupted");
    assert_eq!(Some(end.value["lost_steps"].as_u64().expect("a number") + EVERY), end.step(), "{}", life.story());
    supervisor.join().expect("the supervisor");
    proxy.disarm();
    let next = lab.resume(RUN).args(&["--set", "train.steps=12"]).finish().expect_code(0);
    assert_eq!(next.resumed_from(), EVERY, "{}", next.story());
}
