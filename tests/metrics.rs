//! The figures of every step are one curve however often a run is killed, in `trainer metrics` and in TensorBoard.

use std::{collections::BTreeMap, path::Path, process::Command};

use serde_json::Value;

use crate::{
    interop::environment,
    support::{
        lab::{EVERY, Lab, STEPS},
        trainer::Finished,
    },
};

/// TensorBoard's reader, and Prometheus's.
pub const TENSORBOARD: (&str, &str) = ("tensorboard", include_str!("interop/tensorboard.txt"));

/// The loss of every step as its last life told it, and the number of that life's generation.
fn told(lives: &[Finished]) -> BTreeMap<u64, (f64, u64)> {
    let mut told: BTreeMap<u64, (f64, u64)> = BTreeMap::new();
    for life in lives {
        // What earlier lives did beyond the checkpoint is void.
        told.retain(|step, _| *step <= life.resumed_from());
        let generation = life.last("formed").value["generation"].as_u64().expect("a generation");
        for event in life.of_kind("step") {
            let loss = event.value["loss"].as_f64().expect("a loss");
            told.insert(event.step().expect("a step"), (loss, generation));
        }
    }
    told
}

/// What `trainer metrics` has of every step.
fn stored(lab: &Lab, run: &str) -> Vec<Value> {
    let text = lab.about("metrics", run).args(&["--json"]).finish().expect_code(0).stdout;
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect()
}

/// Lives that end at many points of a save, on one, two and three workers.
fn killed_again_and_again(lab: &Lab, run: &str) -> Vec<Finished> {
    // Twenty, some of which make no progress.
    let points = [
        ("worker.step", 3),
        ("worker.step", 1),
        ("save.after-shard", EVERY),
        ("save.after-shard", EVERY),
        ("journal.before-append", EVERY),
        ("worker.step", EVERY - 1),
        ("journal.after-append", EVERY),
        ("worker.step", EVERY + 1),
        ("save.after-manifest", 2 * EVERY),
        ("save.before-receipt", 2 * EVERY),
        ("save.before-record", 2 * EVERY),
        ("worker.step", 2 * EVERY - 1),
        ("journal.before-append", 2 * EVERY),
        ("journal.after-append", 2 * EVERY),
        ("worker.step", 2 * EVERY + 3),
        ("save.after-shard", 3 * EVERY),
        ("journal.after-append", 3 * EVERY),
        ("save.before-receipt", 4 * EVERY),
        ("worker.step", 4 * EVERY),
        ("save.before-record", 5 * EVERY),
    ];
    let mut lives = Vec::new();
    for (number, (point, step)) in points.into_iter().enumerate() {
        let workers = ["2", "1", "3"][number % 3];
        let life = if number == 0 { lab.run(run) } else { lab.resume(run) };
        let life = life.args(&["--nproc-per-node", workers]).faults(&format!("{point}=kill@step={step}"));
        // The death of a worker is cured within its life.
        let life = life.args(&["--set", "restart.max=0"]).finish();
        assert_ne!(life.code(), Some(0), "{point}\n{}", life.story());
        lives.push(life);
    }
    lives.push(lab.resume(run).args(&["--nproc-per-node", "2"]).finish().expect_code(0));
    lives
}

#[test]
fn every_step_is_on_the_curve_once_as_it_was_done_last_however_often_the_run_is_killed() {
    let lab = Lab::on_files();
    let lives = killed_again_and_again(&lab, "curve");
    let told = told(&lives);
    assert_eq!(told.keys().copied().collect::<Vec<_>>(), (1..=STEPS).collect::<Vec<_>>());
    let stored = stored(&lab, "curve");
    let steps: Vec<u64> = stored.iter().map(|row| row["step"].as_u64().expect("a step")).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
    for row in &stored {
        let (loss, generation) = told[&row["step"].as_u64().unwrap()];
        assert_eq!((row["loss"].as_f64(), row["generation"].as_u64()), (Some(loss), Some(generation)), "{row}");
        assert!(row["step_s"].as_f64().is_some() && row["grad_norm"].as_f64().is_some(), "{row}");
    }

    // The same in the other forms.
    let csv = lab.about("metrics", "curve").args(&["--csv"]).finish().expect_code(0).stdout;
    assert_eq!(csv.lines().count() as u64, STEPS + 1, "{csv}");
    let [parquet, board] = ["curve.parquet", "board"].map(|name| lab.path(name).display().to_string());
    lab.about("metrics", "curve").args(&["--parquet", &parquet, "--tensorboard", &board]).finish().expect_code(0);
    let file = std::fs::read(&parquet).expect("a file");
    assert!(file.starts_with(b"PAR1") && file.ends_with(b"PAR1"));
    let table = lab.about("metrics", "curve").finish().expect_code(0).stdout;
    assert!(table.contains("tokens/s") && table.contains(&format!("{:.4}", told[&STEPS].0)), "{table}");
    if std::env::var_os("TRAINER_TESTS_ALL").is_some() {
        tensorboard_shows(Path::new(&board), &told);
    }
}

/// TensorBoard's own reader finds the same.
fn tensorboard_shows(folder: &Path, told: &BTreeMap<u64, (f64, u64)>) {
    let Some(packages) = environment(TENSORBOARD) else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/curve.py");
    let output = Command::new("python3").arg(script).arg(folder).env("PYTHONPATH", packages).output();
    let output = output.expect("start python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let losses: Vec<(u64, f32)> = read["scalars"]["loss/loss"]
        .as_array()
        .expect("the losses")
        .iter()
        .map(|event| (event[0].as_u64().unwrap(), event[1].as_f64().unwrap() as f32))
        .collect();
    let expected: Vec<(u64, f32)> = told.iter().map(|(step, (loss, _))| (*step, *loss as f32)).collect();
    assert_eq!(losses, expected);
    let text = read["texts"]["configuration"].as_str().expect("the configuration");
    assert!(text.contains("\"global_batch\""), "{text}");
}

#[test]
fn a_run_without_figures_says_when_they_come_and_no_store_is_named_that_is_not_there() {
    let lab = Lab::on_files();
    lab.run("young").faults("worker.step=kill@step=2").args(&["--set", "restart.max=0"]).finish();
    let said = lab.about("metrics", "young").finish().expect_code(0).stdout;
    assert!(said.contains("no figures are stored yet"), "{said}");
    lab.about("metrics", "another").finish().expect_code(78);
}

#[test]
fn a_save_makes_one_request_more_for_the_figures_of_its_steps() {
    let lab = Lab::on_s3();
    let life = lab.run("requests").finish().expect_code(0);
    let (files, saves) = (lab.keys("requests", "metrics/"), life.committed().len());
    assert!(saves > 1 && files.len() == saves, "{saves} saves: {files:?}\n{}", life.story());
}
