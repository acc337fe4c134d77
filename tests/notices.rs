//! Everything that announces the end of a machine, and the run's response: the real binary with our metadata server.
//!
//! Interrupted runs are long, so that the notice comes while they train; their learning rate is constant, so that the
//! number of steps changes nothing else. Announced time is not used for training here (`notice.spare_time = "stop"`)
//! unless a test says so.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    lab::{Lab, Store},
    metadata::{
        Cloud, INSTANCE, LIFECYCLE, MAINTENANCE, MAINTENANCE_EVENT, MetadataServer, PREEMPTED, REBALANCE, Reply,
        SCHEDULED_EVENTS, SPOT, TOKEN, azure_event, spot_notice,
    },
    trainer::{Finished, Running, Trainer},
};

pub const RUN: &str = "noticed";

/// A run that lasts until something ends it.
pub fn long(lab: &Lab) -> Trainer {
    let set = ["train.steps=1000000", "train.schedule.kind=\"constant\"", "checkpoint.every=\"100000 steps\""];
    set.iter()
        .fold(lab.run(RUN), |command, set| command.args(&["--set", set]))
        .args(&["--set", "notice.spare_time=\"stop\""])
}

pub fn heard(running: &Running, source: &str) {
    running.wait_for(&format!("a notice of {source}"), |event| {
        event.kind() == "notice" && event.value["source"] == source
    });
}

/// The steps with a `committed` record in a run's journal, newest last.
pub fn committed(store: &std::path::Path) -> Vec<u64> {
    let mut records: Vec<_> = std::fs::read_dir(store.join(RUN).join("journal"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    records.sort();
    let read = |path: &std::path::PathBuf| serde_json::from_slice::<Value>(&std::fs::read(path).ok()?).ok();
    let records = records.iter().filter_map(read).map(|entry| entry["record"].clone());
    records.filter(|record| record["kind"] == "committed").filter_map(|record| record["step"].as_u64()).collect()
}

pub fn folder(lab: &Lab) -> std::path::PathBuf {
    match &lab.store {
        Store::File(path) => path.clone(),
        _ => panic!("this lab's store is no folder"),
    }
}

/// Demands that a life was interrupted with nothing lost, and that the next one continues from that very step.
#[track_caller]
pub fn interrupted_and_resumed(lab: &Lab, life: &Finished, source: &str) {
    assert_eq!(life.code(), Some(75), "{}", life.story());
    let notice = life.of_kind("notice").into_iter().find(|event| event.value["source"] == source);
    assert!(notice.is_some(), "no notice of {source}\n{}", life.story());
    let end = life.last("interrupted");
    let step = end.step().expect("its step");
    assert_eq!(end.value["lost_steps"], 0, "{}", life.story());
    let more = format!("train.steps={}", step + 3);
    let next =
        lab.resume(RUN).args(&["--set", &more, "--set", "train.schedule.warmup_steps=1"]).finish().expect_code(0);
    assert_eq!(next.resumed_from(), step, "{}", next.story());
    let steps: Vec<u64> = next.of_kind("step").iter().filter_map(|event| event.step()).collect();
    assert_eq!(steps, (step + 1..=step + 3).collect::<Vec<_>>(), "{}", next.story());
}

pub fn on_aws() -> MetadataServer {
    MetadataServer::start().only(Cloud::Aws)
}

#[test]
fn a_run_saves_on_a_spot_interruption_and_resumes() {
    let (lab, server) = (Lab::on_files(), on_aws());
    // Without a hook only notices are polled, so one token is enough.
    let running = long(&lab).args(&["--set", "notice.lifecycle_hook=\"none\""]).envs(&server.envs()).start();
    running.wait_for_step("step", 3);
    server.wait_for(SPOT, 3);
    // Some services say it like this: two minutes from each request.
    server.set(SPOT, Reply::each(|| spot_notice("terminate", 120)));
    heard(&running, "aws-spot");
    let life = running.finish();
    assert_eq!(life.of_kind("notice").len(), 1, "{}", life.story());
    let deadline = life.last("notice").value["deadline_s"].as_f64().expect("a deadline");
    assert!(deadline > 60.0 && deadline <= 120.0, "{deadline}");
    // One token, and each path requested once at a time, never sooner than its interval after the last answer.
    assert_eq!(server.requests_of(TOKEN).len(), 1, "tokens are kept");
    for (path, interval_ms) in [(SPOT, 1000), (REBALANCE, 5000), (LIFECYCLE, 2000), (MAINTENANCE, 30_000)] {
        let asked = server.requests_of(path);
        assert!(!asked.is_empty(), "{path} was never asked");
        for pair in asked.windows(2) {
            let apart = pair[1].at.duration_since(pair[0].at).as_millis();
            assert!(apart >= interval_ms, "{path} was asked again after {apart} ms");
        }
    }
    interrupted_and_resumed(&lab, &life, "aws-spot");
}

#[test]
fn a_spot_notice_whose_time_has_passed_still_counts() {
    let (lab, server) = (Lab::on_files(), on_aws());
    let running = long(&lab).envs(&server.envs()).start();
    running.wait_for_step("step", 3);
    server.set(SPOT, spot_notice("stop", -3600));
    heard(&running, "aws-spot");
    // It is withdrawn, but still counts.
    server.remove(SPOT);
    let life = running.finish();
    assert_eq!(life.last("notice").value["deadline_s"], 0.0, "{}", life.story());
    interrupted_and_resumed(&lab, &life, "aws-spot");
}

#[test]
fn a_recommendation_saves_once_and_trains_on() {
    let (lab, server) = (Lab::on_files(), on_aws());
    // Some services identify the recommendation by the time of the request. No checkpoint is due.
    let running = long(&lab).envs(&server.envs()).start();
    running.wait_for_step("step", 3);
    let now = || format!(r#"{{"noticeTime":"{}"}}"#, jiff::Timestamp::now());
    server.set(REBALANCE, Reply::each(now));
    heard(&running, "aws-rebalance");
    let saved = running.wait_for("a checkpoint", |event| event.kind() == "checkpoint").step().expect("its step");
    running.wait_for_step("step", saved + 10);
    // Of two more answers, the first was read before the second was requested.
    let asked = server.requests_of(REBALANCE).len();
    server.wait_for(REBALANCE, asked + 2);
    running.signal(Signal::TERM);
    let life = running.finish();
    let notices = life.of_kind("notice");
    assert_eq!(notices.len(), 2, "advice is heard once, and then the signal\n{}", life.story());
    assert_eq!(notices[0].value["means"], "rebalance", "{}", life.story());
    let end = life.last("interrupted").step().expect("its step");
    assert_eq!(life.committed().into_iter().collect::<Vec<_>>(), [saved, end], "{}", life.story());
    interrupted_and_resumed(&lab, &life, "sigterm");
}

#[test]
fn distant_maintenance_asks_for_a_save_and_near_maintenance_ends_the_run() {
    let at = |ahead: i64| {
        let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(ahead);
        at.strftime("%-d %b %Y %H:%M:%S GMT").to_string()
    };
    let event = |id: &str, ahead| {
        json!({"EventId": id, "Code": "system-reboot", "State": "active",
               "NotBefore": at(ahead), "NotAfter": at(ahead + 7200),
               "Description": "scheduled reboot"})
    };
    let (lab, server) = (Lab::on_files(), on_aws());
    let far = event("far", 86_400);
    server.set(MAINTENANCE, json!([far]));
    let running = long(&lab).envs(&server.envs()).start();
    heard(&running, "aws-maintenance-ahead");
    running.wait_for_step("step", 3);
    // It is polled twice a minute.
    server.set(MAINTENANCE, json!([far, event("near", 250)]));
    let life = running.finish();
    let heard: Vec<_> = life.of_kind("notice").iter().map(|event| event.value["source"].clone()).collect();
    assert_eq!(heard, ["aws-maintenance-ahead", "aws-maintenance"], "{}", life.story());
    interrupted_and_resumed(&lab, &life, "aws-maintenance");
}

#[test]
fn a_run_saves_on_a_gcp_preemption_and_resumes() {
    let (lab, server) = (Lab::on_files(), MetadataServer::start().only(Cloud::Gcp));
    let running = long(&lab).envs(&server.envs()).start();
    running.wait_for_step("step", 3);
    // The first request, and then one that waits for a change.
    server.wait_for(PREEMPTED, 1);
    server.set(PREEMPTED, "TRUE");
    heard(&running, "gcp-preempted");
    let life = running.finish();
    let left = life.last("notice").value["deadline_s"].as_f64().expect("a deadline");
    assert!(left > 20.0 && left <= 30.0, "{left}");
    assert!(server.requests_of(PREEMPTED).len() <= 3, "it waits for changes instead of asking");
    interrupted_and_resumed(&lab, &life, "gcp-preempted");
}

#[test]
fn maintenance_on_gcp_ends_a_run_unless_the_run_began_in_it() {
    let (lab, server) = (Lab::on_files(), MetadataServer::start().only(Cloud::Gcp));
    let window = [("TRAINER_PREEMPTION_WINDOW", "150".to_owned())];
    let running = long(&lab).envs(&server.envs()).envs(&window).start();
    server.wait_for(MAINTENANCE_EVENT, 1);
    running.wait_for_step("step", 3);
    server.set(MAINTENANCE_EVENT, "MIGRATE_ON_HOST_MAINTENANCE");
    server.wait_for(MAINTENANCE_EVENT, 2);
    server.set(MAINTENANCE_EVENT, "TERMINATE_ON_HOST_MAINTENANCE");
    let life = running.finish().expect_code(75);
    assert_eq!(life.of_kind("notice").len(), 1, "{}", life.story());
    // The next process finds the announcement already there: it trains on until the machine is preempted.
    let running = lab.resume(RUN).envs(&server.envs()).envs(&window).start();
    heard(&running, "gcp-maintenance-ahead");
    running.wait_for("a step", |event| event.kind() == "step");
    server.set(PREEMPTED, "TRUE");
    heard(&running, "gcp-preempted");
    let life = running.finish();
    let left = life.last("notice").value["deadline_s"].as_f64().expect("a deadline");
    assert!(left > 120.0 && left <= 150.0, "{left}");
    interrupted_and_resumed(&lab, &life, "gcp-preempted");
}

/// A run on Azure with this event; returns the server's log of approvals.
fn told_on_azure(lab: &Lab, resources: &[&str], kind: &str) -> (Finished, Vec<crate::support::metadata::Asked>) {
    let server = MetadataServer::start().only(Cloud::Azure);
    server.note_posts({
        let store = folder(lab);
        move || format!("{:?}", committed(&store))
    });
    let others = azure_event("others", "Preempt", 30, &["another-machine"]);
    server.events(|events| events.push(others));
    let running = long(lab).envs(&server.envs()).start();
    running.wait_for_step("step", 3);
    server.wait_for(SCHEDULED_EVENTS, 2);
    server.events(|events| events.push(azure_event("ours", kind, 30, resources)));
    let life = running.finish();
    let approvals = server.requests_of(SCHEDULED_EVENTS).into_iter().filter(|asked| asked.method == "POST").collect();
    (life, approvals)
}

#[test]
fn an_azure_event_is_approved_once_the_last_step_is_committed() {
    let lab = Lab::on_files();
    let (life, approvals) = told_on_azure(&lab, &[INSTANCE], "Preempt");
    let step = life.last("interrupted").step().expect("its step");
    assert_eq!(approvals.len(), 1, "{}", life.story());
    assert_eq!(approvals[0].note, format!("[{step}]"), "approved only after the last step was committed");
    assert_eq!(approvals[0].body, r#"{"StartRequests":[{"EventId":"ours"}]}"#);
    interrupted_and_resumed(&lab, &life, "azure-preempt");
}

#[test]
fn an_event_of_several_machines_ends_the_run_but_is_not_approved() {
    let lab = Lab::on_files();
    let (life, approvals) = told_on_azure(&lab, &[INSTANCE, "another-machine"], "Reboot");
    assert!(approvals.is_empty(), "it would have begun for the other machine, too\n{}", life.story());
    interrupted_and_resumed(&lab, &life, "azure-scheduled");
}

#[test]
fn an_azure_event_that_the_run_does_not_leave_for_is_not_approved() {
    let approvals = |server: &MetadataServer| {
        server.requests_of(SCHEDULED_EVENTS).iter().filter(|asked| asked.method == "POST").count()
    };
    // The time until it begins is used for training, until the run is asked to stop.
    let (lab, server) = (Lab::on_files(), MetadataServer::start().only(Cloud::Azure));
    // The spare time is known only once the time of a save is known.
    let spare = ["notice.spare_time=\"train\"", "checkpoint.every=\"50 steps\""];
    let running = spare.iter().fold(long(&lab), |command, set| command.args(&["--set", set]));
    let running = running.envs(&server.envs()).start();
    running.wait_for("a checkpoint", |event| event.kind() == "checkpoint");
    server.events(|events| events.push(azure_event("far", "Reboot", 800, &[INSTANCE])));
    heard(&running, "azure-scheduled");
    running.signal(Signal::INT);
    let life = running.finish().expect_code(75);
    assert_eq!(life.of_kind("notice").len(), 2, "{}", life.story());
    assert_eq!(approvals(&server), 0, "{}", life.story());
}

#[test]
fn a_run_that_is_complete_before_a_scheduled_event_begins_does_not_approve_it() {
    // The next process on this machine may need the time.
    let (lab, server) = (Lab::on_files(), MetadataServer::start().only(Cloud::Azure));
    // The spare time is known only once the time of a save is known.
    let enough = ["notice.spare_time=\"train\"", "train.steps=1000", "checkpoint.every=\"50 steps\""];
    let running = enough.iter().fold(long(&lab), |command, set| command.args(&["--set", set]));
    let running = running.envs(&server.envs()).start();
    running.wait_for("a checkpoint", |event| event.kind() == "checkpoint");
    server.events(|events| events.push(azure_event("far", "Reboot", 800, &[INSTANCE])));
    heard(&running, "azure-scheduled");
    let life = running.finish().expect_code(0);
    assert_eq!(life.last("completed").step(), Some(1000), "{}", life.story());
    let approvals = server.requests_of(SCHEDULED_EVENTS).iter().filter(|asked| asked.method == "POST").count();
    assert_eq!(approvals, 0, "{}", life.story());
}

#[test]
fn a_notice_that_exists_when_a_run_resumes_ends_it_with_nothing_lost() {
    let (lab, server) = (Lab::on_files(), on_aws());
    let first = long(&lab).start();
    first.wait_for_step("step", 3);
    first.signal(Signal::TERM);
    let first = first.finish().expect_code(75);
    let step = first.last("interrupted").step();
    server.set(SPOT, spot_notice("terminate", 120));
    let second = lab.resume(RUN).envs(&server.envs()).finish().expect_code(75);
    let end = second.last("interrupted");
    assert!(end.step() >= step && end.value["lost_steps"] == 0, "{}", second.story());
    server.remove(SPOT);
    interrupted_and_resumed(&lab, &second, "aws-spot");
}

#[test]
fn usr1_announces_the_end_of_the_machine_and_usr2_asks_for_a_save() {
    let lab = Lab::on_files();
    let slurm = [("SLURM_JOB_ID", "17".to_owned())];
    let running = long(&lab).envs(&slurm).start();
    running.wait_for_step("step", 3);
    running.signal(Signal::USR2);
    heard(&running, "sigusr2");
    let saved = running.wait_for("a checkpoint", |event| event.kind() == "checkpoint").step().expect("its step");
    running.wait_for_step("step", saved + 2);
    running.signal(Signal::USR1);
    let life = running.finish();
    let last = &life.last("notice").value;
    assert_eq!((&last["source"], &last["means"]), (&json!("sigusr1"), &json!("interruption")));
    assert_eq!(last["deadline_s"], 60.0, "Slurm's --signal comes a minute ahead\n{}", life.story());
    interrupted_and_resumed(&lab, &life, "sigusr1");
}

#[test]
fn ignored_signals_end_nothing_and_a_second_sigterm_exits_at_once() {
    let lab = Lab::on_files();
    let window = [("TRAINER_STOP_WINDOW", "150s".to_owned())];
    let running = long(&lab).args(&["--set", "notice.sources=[\"file\"]"]).envs(&window).hold_after(40).start();
    running.wait_for_step("step", 3);
    running.signal(Signal::USR1);
    running.signal(Signal::USR2);
    running.wait_for_step("step", 40);
    // A drain can't end while a rank is held, so the second signal ends the run.
    running.held();
    running.signal(Signal::TERM);
    heard(&running, "sigterm");
    // Right away it would count as an echo of the first one.
    running.ask_until_it_ends(Signal::TERM);
    let life = running.finish().expect_code(76);
    let sources: Vec<_> = life.of_kind("notice").iter().map(|event| event.value["source"].clone()).collect();
    assert!(sources.len() > 1 && sources.iter().all(|source| source == "sigterm"), "{sources:?}");
    assert_eq!(life.of_kind("notice")[0].value["deadline_s"], 150.0, "{}", life.story());
    assert_eq!(life.last("interrupted").value["lost_steps"], 40, "{}", life.story());
    let told = lab.about("explain", RUN).finish().expect_code(0);
    assert!(told.stdout.contains("verdict    left at once on a second sigterm"), "{}", told.story());
}

#[test]
fn an_assumed_stop_window_is_only_reported() {
    let lab = Lab::on_files();
    let slurm = [("SLURM_JOB_ID", "17".to_owned())];
    let running = long(&lab).envs(&slurm).start();
    running.wait_for_step("step", 3);
    running.signal(Signal::TERM);
    let life = running.finish();
    let notice = &life.last("notice").value;
    assert_eq!((&notice["deadline_s"], &notice["binding"]), (&json!(30.0), &json!(false)), "{}", life.story());
    // The run, the notice and the journal say the same.
    assert!(life.stderr.contains("asked to stop, no certain deadline (30.0 s by default)"), "{}", life.story());
    let told = lab.about("explain", RUN).json().finish().expect_code(0);
    assert_eq!(told.events[0].value["notices"][0]["deadline_s"], Value::Null, "{}", told.story());
    assert_eq!(told.events[0].value["drain"]["deadline_s"], Value::Null, "{}", told.story());
    interrupted_and_resumed(&lab, &life, "sigterm");
}

#[test]
fn a_watched_file_ends_a_run_and_not_the_next() {
    let lab = Lab::on_files();
    let file = format!("notice.file=\"{}\"", lab.path("leave").display());
    let running = long(&lab).args(&["--set", &file]).start();
    running.wait_for_step("step", 3);
    std::fs::write(lab.path("leave"), r#"{"deadline_s": 40}"#).expect("write the watched file");
    heard(&running, "file");
    let life = running.finish();
    let left = life.last("notice").value["deadline_s"].as_f64().expect("a deadline");
    assert!(left > 20.0 && left <= 40.0, "{left}");
    assert_eq!(life.code(), Some(75), "{}", life.story());
    // The file still exists. It does not end the next life, but a change to it does.
    let step = life.last("interrupted").step().expect("its step");
    let running = lab.resume(RUN).start();
    running.wait_for_step("step", step + 150);
    std::fs::write(lab.path("leave"), "70").expect("write the watched file");
    heard(&running, "file");
    let life = running.finish();
    let left = life.of_kind("notice")[0].value["deadline_s"].as_f64().expect("a deadline");
    assert!(left > 40.0 && left <= 70.0, "{left}\n{}", life.story());
    interrupted_and_resumed(&lab, &life, "file");
}

#[test]
fn drain_stops_the_running_generation_and_no_other() {
    let lab = Lab::on_files();
    let running = long(&lab).start();
    running.wait_for_step("step", 3);
    let asked = lab.about("drain", RUN).json().finish().expect_code(0);
    let life = running.finish();
    let answer = &asked.events.last().expect("its answer").value;
    let step = life.last("interrupted").step().expect("its step");
    assert_eq!((&answer["state"], &answer["step"]), (&json!("interrupted"), &json!(step)), "{}", asked.story());
    assert_eq!((&answer["lost_steps"], &answer["asked_before"]), (&json!(0), &json!(false)), "{}", asked.story());
    assert_eq!(lab.keys(RUN, "drains/"), ["drains/g0001.json"]);
    // A run that has stopped can't be asked to stop, and the old request does not stop a resumed run.
    let again = lab.about("drain", RUN).finish().expect_code(64);
    assert!(again.stderr.contains("is not running: it is interrupted"), "{}", again.story());
    assert_eq!(life.code(), Some(75), "{}", life.story());
    let running = lab.resume(RUN).start();
    running.wait_for_step("step", step + 400);
    let asked = lab.about("drain", RUN).json().finish().expect_code(0);
    let life = running.finish();
    let answer = &asked.events.last().expect("its answer").value;
    assert_eq!((&answer["generation"], &answer["asked_before"]), (&json!(2), &json!(false)), "{}", asked.story());
    interrupted_and_resumed(&lab, &life, "drain");
    let over = lab.about("drain", RUN).finish().expect_code(64);
    assert!(over.stderr.contains("is not running: it is completed"), "{}", over.story());
    lab.about("prune", RUN).args(&["--keep-last", "1"]).finish().expect_code(0);
    assert_eq!(lab.keys(RUN, "drains/"), ["drains/g0001.json", "drains/g0002.json"], "requests are no garbage");
}

#[test]
fn drain_does_not_wait_on_request_and_refuses_a_dead_run() {
    let lab = Lab::on_files();
    let missing = lab.about("drain", RUN).finish();
    assert_ne!(missing.code(), Some(0), "{}", missing.story());
    // Held, it can't end between the two requests.
    let running = long(&lab).hold_after(3).start();
    running.held();
    for before in [false, true] {
        let asked = lab.about("drain", RUN).args(&["--no-wait"]).json().finish().expect_code(0);
        let answer = &asked.events.last().expect("its answer").value;
        assert_eq!(answer["asked_before"], before, "{}", asked.story());
    }
    running.let_go();
    let life = running.finish().expect_code(75);
    assert_eq!(life.last("notice").value["means"], "stop", "{}", life.story());
    let killed = lab.resume(RUN).start();
    killed.wait_for("a step", |event| event.kind() == "step");
    killed.power_off();
    let dead = lab.about("drain", RUN).finish().expect_code(64);
    assert!(dead.stderr.contains("stopped without a final record"), "{}", dead.story());
}

/// A worker dies after its generation was asked to stop, before the request was heard; returns the run's end and that
/// of the command.
fn asked_before_a_death(lab: &Lab, more: &[&str]) -> (Finished, Finished) {
    let running = long(lab).start();
    running.wait_for_step("step", 3);
    let asked = lab.about("drain", RUN).args(more).json().start();
    asked.wait_until("a request", || !lab.keys(RUN, "drains/").is_empty());
    // The run looks for requests every five seconds: nearly always the next generation has been formed by then.
    let worker = running.workers().pop().expect("a worker");
    rustix::process::kill_process(worker, Signal::KILL).expect("kill a worker");
    let life = running.finish();
    assert!(matches!(life.code(), Some(75 | 76)), "{}", life.story());
    assert_eq!(life.last("notice").value["source"], "drain", "{}", life.story());
    (life, asked.finish().expect_code(0))
}

#[test]
fn a_drain_request_is_obeyed_even_if_a_worker_dies_first() {
    let lab = Lab::on_files();
    asked_before_a_death(&lab, &["--no-wait"]);
    assert_eq!(lab.keys(RUN, "drains/"), ["drains/g0001.json"], "it was not asked again");
}

#[test]
fn drain_reports_how_the_run_ended_even_if_a_worker_dies_first() {
    let lab = Lab::on_files();
    let (life, asked) = asked_before_a_death(&lab, &[]);
    let answer = &asked.events.last().expect("its answer").value;
    assert_eq!((&answer["generation"], &answer["state"]), (&json!(1), &json!("interrupted")), "{}", asked.story());
    assert_eq!(answer["step"], life.last("interrupted").value["step"], "{}", asked.story());
}
