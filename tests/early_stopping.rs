//! A run whose held-out loss has stopped falling ends at the step whose measurement says so, on one node or two,
//! whoever dies meanwhile; and the held-out loss is known of each source of the data.

use std::{collections::BTreeMap, sync::OnceLock};

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::{
    support::{
        lab::{EVERY, Lab, STEPS, sample_text},
        trainer::{Event, Finished, Running, Trainer, losses},
    },
    together::{at_once, create},
};

const RUN: &str = "stops";
/// The loss never falls by so much, so the first validation is the best: with a patience of 2, the third one decides.
const END: u64 = 3 * EVERY;
const SETTINGS: [&str; 5] = [
    "data.validation_every=4",
    "data.validation_sequences=6",
    "train.early_stopping.patience=2",
    "train.early_stopping.min_delta=100",
    "checkpoint.keep.last=1",
];

/// A lab whose data has two sources, and text for validation.
fn lab() -> Lab {
    let lab = Lab::on_files();
    prepare(&lab);
    lab
}

fn prepare(lab: &Lab) -> String {
    for (number, text) in sample_text().as_bytes().chunks(2000).enumerate() {
        let folder = lab.path(if number % 3 == 0 { "notes" } else { "tales" });
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("{number}.txt")), text).unwrap();
    }
    let data = format!("file://{}", lab.path("data").display());
    let source = |name: &str| format!("{name}={}", lab.path(name).display());
    lab.command(&["data", "prepare", "--source", &source("notes"), "--source", &source("tales")])
        .args(&["--tokenizer", "train:512", "--validation-ratio", "0.2", "--out", &data])
        .finish()
        .expect_code(0);
    data
}

/// The run's command with its settings.
fn stopping(lab: &Lab, trainer: Trainer) -> Trainer {
    let train = format!("data.train=file://{}", lab.path("data").display());
    SETTINGS.iter().copied().chain([train.as_str()]).fold(trainer, |trainer, set| trainer.args(&["--set", set]))
}

fn records(lab: &Lab, kind: &str) -> Vec<Value> {
    let read = |key: &String| serde_json::from_slice::<Value>(&lab.read(RUN, key)).expect("a record");
    let all = lab.keys(RUN, "journal/");
    all.iter().map(|key| read(key)["record"].clone()).filter(|record| record["kind"] == kind).collect()
}

/// What an undisturbed run has in the end: its losses, and the bytes of its last checkpoint's weights.
struct Undisturbed {
    losses: BTreeMap<u64, String>,
    model: Vec<u8>,
    measured: Vec<(u64, String)>,
}

fn measured(lives: &[&Finished]) -> Vec<(u64, String)> {
    let events = lives.iter().flat_map(|life| life.of_kind("validation"));
    let mut all: BTreeMap<u64, String> = BTreeMap::new();
    for event in events {
        let loss = event.number_text("loss").expect("a loss").to_owned();
        if let Some(before) = all.insert(event.step().expect("a step"), loss.clone()) {
            assert_eq!(before, loss, "a state that is measured again has another loss");
        }
    }
    all.into_iter().collect()
}

fn undisturbed() -> &'static Undisturbed {
    static UNDISTURBED: OnceLock<Undisturbed> = OnceLock::new();
    UNDISTURBED.get_or_init(|| {
        let lab = Lab::on_files_at_once();
        prepare(&lab);
        let life = stopping(&lab, lab.run(RUN)).finish().expect_code(0);
        Undisturbed { losses: losses(&[&life]), model: lab.export(RUN), measured: measured(&[&life]) }
    })
}

/// Demands that the run has ended early as the undisturbed one, to the last digit and byte.
#[track_caller]
fn expect_stopped(lab: &Lab, lives: &[&Finished]) {
    let (undisturbed, last) = (undisturbed(), lives.last().expect("a life"));
    assert_eq!(last.last("completed").step(), Some(END), "{}", last.story());
    assert!(last.last("completed").value["early"].as_str().unwrap().contains("has not fallen by more than 100"));
    assert_eq!(losses(lives), undisturbed.losses, "{}", last.story());
    assert_eq!(measured(lives), undisturbed.measured, "{}", last.story());
    assert!(lab.export(RUN) == undisturbed.model, "other weights\n{}", last.story());
    let completed = records(lab, "completed");
    assert_eq!(completed.len(), 1, "{completed:?}");
    let early = &completed[0]["early"];
    assert_eq!((&early["validations"], &early["best_step"]), (&2.into(), &EVERY.into()), "{early}");
    lab.expect_all_verify(RUN);
}

#[test]
fn a_run_whose_loss_falls_no_more_is_complete_until_it_is_given_more_patience() {
    let lab = lab();
    let life = stopping(&lab, lab.run(RUN)).finish().expect_code(0);
    expect_stopped(&lab, &[&life]);
    assert_eq!(life.committed(), [EVERY, 2 * EVERY, END].into(), "{}", life.story());

    // Every command treats it as finished, and says why.
    let status: Value =
        serde_json::from_str(&lab.about("status", RUN).args(&["--json"]).finish().expect_code(0).stdout).unwrap();
    assert_eq!((&status["state"], &status["step"]), (&"completed".into(), &END.into()));
    assert!(status["early"].as_str().unwrap().starts_with("stopped early: held-out loss has not fallen"), "{status}");
    assert_eq!(status["held_out"]["validations_since_best"], 2);
    let text = lab.about("status", RUN).finish().expect_code(0).stdout;
    assert!(text.contains("stopped early: ") && text.contains("held out") && text.contains("(notes "), "{text}");
    let text = lab.about("explain", RUN).finish().expect_code(0).stdout;
    assert!(text.contains("stopped early after step 12") && text.contains("patience=N, above 2"), "{text}");
    let again = lab.resume(RUN).finish().expect_code(0).expect_said(&["stopped early after step 12", "patience=N"]);
    assert!(again.of_kind("formed").is_empty(), "{}", again.story());
    let more = lab.resume(RUN).args(&["--set", "train.steps=30"]).finish().expect_code(0);
    assert!(more.of_kind("formed").is_empty(), "more steps are no more patience\n{}", more.story());

    // The lowest loss may be that of any of its checkpoints: it was kept, though `keep.last` is 1.
    let kept: Vec<(u64, f64)> = records(&lab, "committed")
        .iter()
        .map(|record| (record["step"].as_u64().unwrap(), record["validation_loss"].as_f64().unwrap()))
        .collect();
    let best = kept.iter().min_by(|a, b| a.1.total_cmp(&b.1)).expect("a checkpoint").0;
    let out = lab.path("best").display().to_string();
    let exported = lab.about("export", RUN).args(&["--step", "best", "--out", &out, "--json"]).finish().expect_code(0);
    let exported: Value = serde_json::from_str(&exported.stdout).unwrap();
    assert_eq!(exported["step"], best);
    lab.about("verify", RUN).args(&["--step", "best", "--deep"]).finish().expect_code(0);

    // With more patience it goes on, as if it had always had it.
    let on = lab.resume(RUN).args(&["--set", "train.early_stopping.patience=3"]).finish().expect_code(0);
    assert_eq!((on.resumed_from(), on.last("completed").step()), (END, Some(END + EVERY)), "{}", on.story());
    let on = lab.resume(RUN).args(&["--set", "train.early_stopping.patience=0"]).finish().expect_code(0);
    assert_eq!(on.last("completed").step(), Some(STEPS), "{}", on.story());
    assert!(on.last("completed").value.get("early").is_none(), "{}", on.story());
}

/// The agent dies at `point` of the save of the step that decides, after the decision.
#[track_caller]
fn dies_at(point: &str, resumed: u64) {
    let lab = lab();
    let faults = format!("{point}=kill@step={END}");
    let first = stopping(&lab, lab.run(RUN)).faults(&faults).finish().expect_killed();
    let second = lab.resume(RUN).finish().expect_code(0);
    assert_eq!(second.resumed_from(), resumed, "{}", second.story());
    expect_stopped(&lab, &[&first, &second]);
}

#[test]
fn death_between_the_decision_and_its_checkpoint_leads_to_the_same_end() {
    dies_at("save.after-shard", 2 * EVERY);
}

#[test]
fn death_between_the_last_checkpoint_and_the_runs_last_record_leads_to_the_same_end() {
    dies_at("journal.after-append", END);
}

#[test]
fn a_drain_that_does_not_wait_for_the_deciding_measurement_leads_to_the_same_end() {
    let lab = lab();
    // Its state is that of the step before; the next one is to be measured, and is the last one started.
    let running = stopping(&lab, lab.run(RUN)).hold_after(END - 1).start();
    running.held();
    running.signal(Signal::TERM);
    running.wait_for("the drain", |event| event.kind() == "drain");
    running.let_go();
    let first = running.finish();
    // On a busy machine the measurement may be over before the ranks hear of the end: then nothing is left to do.
    if first.code() == Some(0) {
        return expect_stopped(&lab, &[&first]);
    }
    let first = first.expect_code(75);
    let second = lab.resume(RUN).finish().expect_code(0);
    expect_stopped(&lab, &[&first, &second]);
}

#[test]
fn a_killed_worker_is_replaced_and_the_run_stops_where_it_would_have() {
    let lab = lab();
    let running = stopping(&lab, lab.run(RUN)).hold_after(2 * EVERY + 1).start();
    running.held();
    kill_process(running.workers().pop().expect("a worker"), Signal::KILL).expect("kill a worker");
    let life = running.finish().expect_code(0);
    assert!(!life.of_kind("worker_died").is_empty(), "{}", life.story());
    expect_stopped(&lab, &[&life]);
}

#[test]
fn two_nodes_end_at_the_same_step_and_one_that_dies_changes_nothing() {
    let lab = lab();
    let node = |trainer: Trainer| {
        trainer.args(&["--nodes", "2", "--nproc-per-node", "1", "--set", "network.address=127.0.0.1"])
    };
    create(stopping(&lab, lab.run(RUN)));
    // One of them dies in the middle of the save that follows the decision, and then the other one.
    let faults = format!("save.after-shard=kill@step={END}");
    let both = at_once([0, 1].map(|_| node(lab.resume(RUN)).faults(&faults)));
    both[0].wait_until("a death", || both.iter().any(Running::has_ended));
    let first = both.map(|node| node.power_off().expect_killed());
    let both = at_once([0, 1].map(|_| node(lab.resume(RUN))));
    let second = both.map(|node| node.finish().expect_code(0));
    let leads = |lives: [Finished; 2]| {
        let [one, other] = lives;
        if one.of_kind("step").is_empty() { (other, one) } else { (one, other) }
    };
    let ((first, _), (second, follower)) = (leads(first), leads(second));
    expect_stopped(&lab, &[&first, &second]);
    assert!(follower.of_kind("step").is_empty());
}

#[test]
fn the_held_out_loss_of_each_source_is_told_and_kept() {
    let lab = lab();
    let sources = |life: &Finished| -> Vec<(u64, BTreeMap<String, f64>)> {
        let of = |event: &&Event| {
            let value = &event.value["sources"];
            (event.step().unwrap(), serde_json::from_value(value.clone()).expect("losses by source"))
        };
        life.of_kind("validation").iter().map(of).collect()
    };
    let run = |workers: &'static str| {
        let life = stopping(&lab, lab.run(workers)).args(&["--nproc-per-node", workers]).finish().expect_code(0);
        sources(&life)
    };
    let (one, two) = (run("1"), run("2"));
    assert_eq!(one.len(), 3);
    for ((step, one), (_, two)) in one.iter().zip(&two) {
        assert_eq!(one.keys().collect::<Vec<_>>(), ["notes", "tales"], "{step}");
        for (source, loss) in one {
            assert!(*loss > 0.5 && (loss - two[source]).abs() < 1e-4 * loss, "{step} {source}: {loss} {}", two[source]);
        }
    }
    let key = lab.keys("2", "journal/");
    let mut committed =
        key.iter().map(|key| serde_json::from_slice::<Value>(&lab.read("2", key)).unwrap()["record"].clone());
    let committed = committed.rfind(|record| record["kind"] == "committed").expect("a checkpoint");
    for (source, loss) in &two.last().expect("measured").1 {
        assert_eq!(committed["metrics"][format!("held_out/{source}")], *loss, "{committed}");
    }
}

#[test]
fn data_without_text_for_validation_is_refused_by_name() {
    let lab = Lab::on_files();
    let settings = SETTINGS.map(|set| ["--set", set]).concat();
    let data = format!("file://{}", lab.path("data").display());
    std::fs::write(lab.path("text.txt"), sample_text()).unwrap();
    let text = lab.path("text.txt").display().to_string();
    lab.command(&["data", "prepare", "--input", &text, "--tokenizer", "train:512", "--validation-ratio", "0"])
        .args(&["--out", &data])
        .finish()
        .expect_code(0);
    let train = format!("data.train={data}");
    lab.run(RUN).args(&settings).args(&["--set", &train]).finish().expect_code(78).expect_said(&[
        "for validation",
        "train.early_stopping",
        "--validation-ratio",
    ]);
}
