//! A program with a model of its own, built on the library (`own_model/main.rs`, a classifier of pictures): everything
//! that language models have, by its own binary.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    support::{
        lab::Lab,
        trainer::{Finished, Trainer, example, losses, read},
    },
    zero1::tensors,
};

const STEPS: u64 = 12;
const EVERY: u64 = 4;

/// The program.
fn shapes() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| example("shapes", "tests/own_model/main.rs"))
}

struct Own {
    lab: Lab,
}

impl Own {
    fn new() -> Self {
        let own = Self { lab: Lab::on_files() };
        own.lab.write_config("shapes.toml", &own.config(""));
        own
    }
    /// Settings of a short run. `more` belongs to the task.
    fn config(&self, more: &str) -> String {
        format!(
            r#"store = "{}"
data = {{ validation_every = {STEPS}, validation_sequences = 60 }}
train.steps = {STEPS}
train.global_batch = 9
train.max_micro_batch = 2
train.threads = 1
train.optimizer.lr = 0.01
train.schedule.warmup_steps = 2
parallel.nproc_per_node = 2
checkpoint.every = "{EVERY} steps"
restart.backoff = "50ms"
[task]
name = "shapes"
[task.settings]
pictures = 90
held_out = 60
{more}
"#,
            self.lab.uri()
        )
    }
    fn command(&self, arguments: &[&str]) -> Trainer {
        Trainer::of(shapes(), &self.lab.path(""), arguments)
    }
    fn run(&self, run: &str, settings: &[&str]) -> Trainer {
        self.command(&["run", "shapes.toml", "--run-id", run]).args(&set(settings)).json()
    }
    fn about(&self, command: &str, run: &str) -> Trainer {
        self.command(&[command, "--run-id", run, "--store", &self.lab.uri()])
    }
    fn resume(&self, run: &str, settings: &[&str]) -> Trainer {
        self.about("resume", run).args(&set(settings)).json()
    }
    #[track_caller]
    fn same_tensors(&self, run: &str, other: &str) {
        assert!(tensors(&self.lab, run) == tensors(&self.lab, other), "{run} and {other} have other bytes");
    }
}

fn set<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", setting]).collect()
}

fn loss(life: &Finished, step: u64) -> f64 {
    losses(&[life])[&step].parse().expect("a loss is a number")
}

#[test]
fn it_learns_and_its_export_opens() {
    let own = Own::new();
    let steps = ["train.steps=60", "train.global_batch=30", "train.max_micro_batch=15", "data.validation_every=60"];
    let life = own.run("learns", &steps).finish().expect_code(0);
    // Three shapes by chance: ln 3 = 1.0986.
    let (first, last) = (loss(&life, 1), (51..=60).map(|step| loss(&life, step)).sum::<f64>() / 10.0);
    assert!((0.8..3.0).contains(&first) && last < 0.55, "loss {first} at first, {last} at last\n{}", life.story());
    let wrong = life.last("validation").value["loss"].as_f64().expect("a share");
    assert!(wrong < 0.25, "{wrong} of the held-out pictures are taken for another shape; by chance 0.67");
    // A share of whole pictures, as the task measures them.
    assert!((wrong * 60.0 - (wrong * 60.0).round()).abs() < 1e-6, "{wrong}");

    let out = own.lab.path("out");
    own.about("export", "learns").args(&["--out", &out.display().to_string()]).finish().expect_code(0);
    let bytes = read(&out.join("model.safetensors"));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let found: BTreeMap<String, Vec<usize>> =
        file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect();
    let expected = [
        ("first.bias", vec![8]),
        ("first.weight", vec![8, 1, 3, 3]),
        ("head.bias", vec![3]),
        ("head.weight", vec![3, 144]),
        ("second.bias", vec![16]),
        ("second.weight", vec![16, 8, 3, 3]),
    ];
    assert_eq!(found, expected.map(|(name, shape)| (name.to_owned(), shape)).into());
    let task: Value = serde_json::from_slice(&read(&out.join("task.json"))).expect("JSON");
    assert_eq!(
        (&task["name"], &task["version"], &task["settings"]["pictures"]),
        (&json!("shapes"), &json!(1), &json!(90))
    );
    // Defaults are stored, too: a later program may have others.
    assert_eq!((&task["settings"]["channels"], &task["settings"]["shapes"]), (&json!(8), &Value::Null));
    let mut names: Vec<String> = std::fs::read_dir(&out)
        .expect("a folder")
        .map(|it| it.expect("a file").file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["model.safetensors", "task.json"]);

    for command in ["verify", "explain", "checkpoints", "prune"] {
        own.about(command, "learns").finish().expect_code(0);
    }
    let status = own.about("status", "learns").finish().expect_code(0);
    assert!(
        status.stdout.contains("shapes, version 1") && status.stdout.contains("30 samples a step"),
        "{}",
        status.story()
    );
    let doctor = own.command(&["doctor", "shapes.toml"]).finish();
    assert!(doctor.stdout.contains("shapes version 1: 90 samples, 60 held out, 1683 parameters"), "{}", doctor.story());
}

/// Killed in a save, resumed; killed in a worker, replaced: every digit and every byte are those of an undisturbed run.
/// Dropout and noise draw random numbers in each step.
#[track_caller]
fn survives(settings: &[&str]) {
    let own = Own::new();
    let whole = own.run("whole", settings).finish().expect_code(0);
    let expected = losses(&[&whole]);
    assert_eq!(expected.len() as u64, STEPS, "{}", whole.story());
    let kill = format!("save.after-manifest=kill@step={}", 2 * EVERY);
    let first = own.run("killed", settings).faults(&kill).finish().expect_killed();
    let second = own.resume("killed", &[]).finish().expect_code(0);
    assert_eq!(second.resumed_from(), EVERY, "{}", second.story());
    assert_eq!(losses(&[&first, &second]), expected, "{}", second.story());
    own.same_tensors("killed", "whole");
    assert_eq!(second.last("validation").value["loss"], whole.last("validation").value["loss"]);

    let running = own.run("worker", settings).hold_after(EVERY + 2).start();
    running.wait_for_step("checkpoint", EVERY);
    let held = running.held();
    rustix::process::kill_process(held, Signal::KILL).expect("kill a worker");
    let life = running.finish().expect_code(0);
    assert_eq!(life.last("restored").value["from"], "memory", "{}", life.story());
    assert_eq!(losses(&[&life]), expected, "{}", life.story());
    own.same_tensors("worker", "whole");
    for run in ["killed", "worker"] {
        own.about("verify", run).args(&["--all", "--deep"]).finish().expect_code(0);
    }
}

#[test]
fn a_killed_run_ends_as_an_undisturbed_one_with_ddp() {
    survives(&[]);
}

#[test]
fn a_killed_run_ends_as_an_undisturbed_one_with_zero1_and_bf16() {
    survives(&["parallel.strategy=zero1", "train.precision=bf16"]);
}

#[test]
fn a_run_goes_from_one_worker_to_two_that_do_not_divide_its_batch() {
    let own = Own::new();
    // What dropout draws follows from how samples are put together to batches; noise does not.
    let settings = ["task.settings.dropout=0.0"];
    let alone = own.run("alone", &settings).args(&["--nproc-per-node", "1"]).finish().expect_code(0);
    let first = own.run("moved", &settings).args(&["--nproc-per-node", "1"]).hold_after(EVERY + 1).start();
    first.wait_for_step("checkpoint", EVERY);
    first.held();
    first.signal(Signal::TERM);
    first.wait_for("a notice", |event| event.kind() == "notice");
    first.let_go();
    let first = first.finish().expect_code(75);
    let second = own.resume("moved", &[]).args(&["--nproc-per-node", "2"]).finish().expect_code(0);
    assert!(second.resumed_from() > EVERY, "{}", second.story());
    assert_eq!(second.last("formed").value["shares"]["ranks"], json!([4, 5]), "{}", second.story());
    for (step, text) in losses(&[&first, &second]) {
        let (ours, theirs): (f64, f64) = (text.parse().unwrap(), loss(&alone, step));
        assert!(((ours - theirs) / theirs).abs() < 1e-5, "step {step}: {ours}, on one worker {theirs}");
    }
    let held_out = |life: &Finished| life.last("validation").value["loss"].as_f64().expect("a number");
    assert!((held_out(&alone) - held_out(&second)).abs() < 0.02);
}

#[test]
fn boot_creates_the_run_and_then_resumes_it() {
    let own = Own::new();
    let boot = || own.command(&["boot", "shapes.toml", "--run-id", "booted"]).json();
    let running = boot().hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    running.power_off().expect_killed();
    let second = boot().finish().expect_code(0);
    assert!(second.resumed_from() >= EVERY, "{}", second.story());
    let again = own.run("booted", &[]).finish().expect_code(78);
    assert!(again.stderr.contains("resume"), "{}", again.story());
}

#[test]
fn other_programs_are_refused_by_name() {
    let own = Own::new();
    own.run("own", &["train.steps=4"]).finish().expect_code(0);
    // The ordinary program: it reads what is stored, and trains none of it.
    let ordinary = own.lab.resume("own").args(&set(&["train.steps=6"])).finish().expect_code(78);
    let ordinary =
        ordinary.expect_said(&["the run trains task shapes (version 1)", "this program trains language models"]);
    ordinary.expect_said(&["hint: give the same arguments to the program that was built for task shapes"]);
    own.lab.write_config("run.toml", &own.config(""));
    own.lab.run("new").finish().expect_code(78).expect_said(&["the run trains task shapes, and this program"]);
    own.lab.about("status", "own").finish().expect_code(0);
    own.lab.about("verify", "own").finish().expect_code(0);
    assert!(!own.lab.export("own").is_empty());

    let later = own.resume("own", &["train.steps=6"]).envs(&[("TRAINER_TESTS_VERSION", "2".into())]);
    later
        .finish()
        .expect_code(78)
        .expect_said(&["task shapes (version 1), and this program trains task shapes (version 2)"]);

    // What is for language models alone.
    for (life, said) in [
        (own.about("generate", "own").args(&["--prompt", "x"]).finish(), "\"shapes\", which is no language model"),
        (own.about("export", "own").args(&["--merge", "--out", "x"]).finish(), "no adapters to merge"),
        (own.run("lora", &["model.lora.rank=4"]).finish(), "model.lora.rank is a setting of language models"),
        (
            own.command(&["data", "prepare", "--input", "x", "--tokenizer", "train:300", "--out", "y"]).finish(),
            "shapes",
        ),
    ] {
        assert!([64, 78].contains(&life.code().unwrap_or(0)), "{}", life.story());
        life.expect_said(&[said, "hint: "]);
    }
    own.lab.write_config("language.toml", &own.lab.config(""));
    let language = own.command(&["run", "language.toml", "--run-id", "language"]).finish().expect_code(78);
    language.expect_said(&["the run trains a language model, and this program trains the task shapes"]);
}

#[test]
fn settings_are_checked_by_key_and_the_data_is_held_against_the_runs() {
    let own = Own::new();
    for (setting, said) in [
        ("task.settings.chanels=4", "unknown key chanels"),
        ("task.settings.channels=many", "channels = \"many\": invalid type"),
        ("task.settings.channels=0", "there must be shapes and channels"),
        ("task.settings.shapes=/no/such/file", "shapes = \"/no/such/file\""),
        ("task.settings.pictures=0", "no samples to train on"),
    ] {
        own.run("wrong", &[setting]).finish().expect_code(78).expect_said(&[said, "task"]);
    }
    let list = own.lab.path("list");
    let shapes = format!("task.settings.shapes={}", list.display());
    std::fs::write(&list, "circle\nsquare\n").unwrap();
    let run = own.run("data", &[&shapes, "train.steps=4"]).finish().expect_code(0);
    assert_eq!(losses(&[&run]).len(), 4);
    std::fs::write(&list, "circle\ncross\n").unwrap();
    let other = own.resume("data", &["train.steps=6"]).finish().expect_code(78);
    other.expect_said(&["task shapes has other data than run data was trained on", "--set task.settings.KEY=VALUE"]);
    // A person says so.
    let accepted = own.resume("data", &["train.steps=6", &shapes]).finish().expect_code(0);
    assert_eq!(accepted.resumed_from(), 4, "{}", accepted.story());
    own.resume("data", &["train.steps=8"]).finish().expect_code(0);
}

#[test]
fn an_error_and_a_panic_of_the_task_are_told_with_worker_and_step() {
    let own = Own::new();
    for (run, panics) in [("error", false), ("panic", true)] {
        let panic = format!("task.settings.panics={panics}");
        // Where picture 7 comes is the sampler's affair: in the first ten steps each picture comes once.
        let life = own.run(run, &["task.settings.damaged=7", &panic, "checkpoint.every='1 steps'"]).finish();
        assert!(life.code().is_some_and(|code| code != 0), "{}", life.story());
        let done = losses(&[&life]).len();
        assert!(done < 10, "{}", life.story());
        let what =
            if panics { "panicked as it should make a batch: picture 7 is damaged" } else { "picture 7 is damaged" };
        let step = format!("step {}", done + 1);
        assert!(life.stderr.contains(what) && life.stderr.contains(&step), "{step}\n{}", life.story());
        let error = life.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(error.contains(what) && error.contains("worker "), "{error}\n{}", life.story());
        assert!(!life.stderr.contains("please report this"), "{}", life.story());
        // Corrected, it goes on.
        let corrected = own.resume(run, &["task.settings.damaged=1000"]).finish().expect_code(0);
        assert!(corrected.resumed_from() <= done as u64, "{}", corrected.story());
    }
}
