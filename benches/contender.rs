//! The contenders: each is trained for some steps with checkpoints, then restored by fresh processes.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

use super::{
    Result,
    figures::Figures,
    lab::{self, Life, Server},
};

/// The inputs shared by all contenders.
pub struct Task {
    /// The model's `config.json`.
    pub model: PathBuf,
    /// A prepared dataset.
    pub data: PathBuf,
    /// The folder for everything that is written, except results.
    pub scratch: PathBuf,
    pub ranks: u32,
    pub threads: usize,
    pub steps: u64,
    pub every: u64,
    pub global_batch: u32,
    pub sequence_length: u32,
    /// Validation sequences whose loss is compared.
    pub validation: u32,
}

impl Task {
    pub fn tokens_per_step(&self) -> u64 {
        u64::from(self.global_batch) * u64::from(self.sequence_length)
    }

    /// The newest checkpoint other than that of the last step.
    fn last_but_one(&self) -> u64 {
        (self.steps - 1) / self.every * self.every
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Disk,
    S3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Trainer,
    /// PyTorch's distributed checkpoint; on S3 through `s3torchconnector`.
    Dcp {
        blocking: bool,
    },
}

#[derive(Clone, Copy, Debug)]
pub struct Contender {
    pub who: Who,
    pub place: Place,
}

impl Contender {
    pub fn name(self) -> &'static str {
        match (self.who, self.place) {
            (Who::Trainer, Place::Disk) => "trainer, disk",
            (Who::Trainer, Place::S3) => "trainer, S3",
            (Who::Dcp { blocking: false }, Place::Disk) => "DCP async_save, disk",
            (Who::Dcp { blocking: true }, Place::Disk) => "DCP save, disk",
            (Who::Dcp { blocking: false }, Place::S3) => "s3torchconnector async_save, S3",
            (Who::Dcp { blocking: true }, Place::S3) => "s3torchconnector save, S3",
        }
    }
}

/// Runs one contender once. `look` sees the files that it left after training, on disk.
pub fn round(
    contender: Contender,
    task: &Task,
    python: Option<&Path>,
    look: impl FnOnce(&Life, &Path) -> Result<()>,
) -> Result<Figures> {
    let folder = task.scratch.join("checkpoints");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let server = (contender.place == Place::S3).then(Server::start).transpose()?;
    let store = match contender.place {
        Place::Disk => format!("file://{}", folder.display()),
        Place::S3 => "s3://bucket/runs".to_owned(),
    };
    let log = task.scratch.join("log");
    let prepare = |mut command: Command| -> Result<Command> {
        command.stderr(File::options().create(true).append(true).open(&log)?);
        if let Some(server) = &server {
            command.envs(server.environment());
        }
        Ok(command)
    };
    let (train, restore) = match contender.who {
        Who::Trainer => (trainer_run(task, &store)?, trainer_resume(&store, Some(task.last_but_one()))),
        Who::Dcp { blocking } => {
            let python = python.context("no Python was given")?;
            (peer(task, python, "train", &store, blocking), peer(task, python, "restore", &store, blocking))
        }
    };
    let said = || fs::read_to_string(&log).unwrap_or_default();
    fs::write(&log, "")?;

    let trained = lab::observe(prepare(train)?, None).with_context(said)?;
    let cpu = server.as_ref().map(Server::cpu_s);
    let mut figures = Figures::of_training(&trained, task.tokens_per_step(), cpu);
    // This comes before the restore, which takes the run back to an earlier step.
    look(&trained, &folder)?;
    let until = if contender.who == Who::Trainer { "first_step" } else { "step" };
    let restored = lab::observe(prepare(restore)?, Some(until)).with_context(said)?;
    figures.add_restore(&restored);
    fs::remove_dir_all(&folder)?;
    Ok(figures)
}

const RUN_ID: &str = "bench";

fn trainer(subcommand: &str, store: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.arg(subcommand).args(["--run-id", RUN_ID, "--store", store]).env("TRAINER_LOG", "warn");
    command
}

/// A new run that trains the task's model.
pub fn trainer_run(task: &Task, store: &str) -> Result<Command> {
    let file = task.scratch.join("bench.toml");
    let Task { ranks, threads, steps, every, global_batch, sequence_length, validation, .. } = task;
    let (model, data) = (task.model.display(), task.data.display());
    let text = format!(
        "[model]\nconfig = \"{model}\"\n\
         [data]\ntrain = \"file://{data}\"\nsequence_length = {sequence_length}\nvalidation_every = \
         {steps}\nvalidation_sequences = {validation}\n\
         [train]\nsteps = {steps}\nglobal_batch = {global_batch}\nmax_micro_batch = {per_rank}\nthreads = {threads}\n\
         [train.schedule]\nwarmup_steps = 10\n\
         [parallel]\nnproc_per_node = {ranks}\n\
         [checkpoint]\nevery = \"{every} steps\"\n[checkpoint.keep]\nlast = 100\n",
        per_rank = global_batch / ranks
    );
    fs::write(&file, text)?;
    let mut command = trainer("run", store);
    command.arg(file).arg("--json");
    Ok(command)
}

/// The same run, continued from the newest checkpoint or from that of a step.
pub fn trainer_resume(store: &str, from: Option<u64>) -> Command {
    let mut command = trainer("resume", store);
    command.arg("--json").args(from.map(|step| format!("--from={step}")));
    command
}

/// Exports the last checkpoint of a trainer run into `out`.
pub fn export(store: &Path, out: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(out);
    let done = trainer("export", &format!("file://{}", store.display())).arg("--out").arg(out).output()?;
    anyhow::ensure!(done.status.success(), "trainer export: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

fn peer(task: &Task, python: &Path, what: &str, store: &str, blocking: bool) -> Command {
    let mut command = peer_script(task, python, what);
    command.args(["--store", store]);
    command.args(["--every", &task.every.to_string(), "--steps", &task.steps.to_string()]);
    command.args(["--from-step", &task.last_but_one().to_string()]);
    if blocking {
        command.arg("--blocking");
    }
    command
}

/// `peer.py` with the arguments that every use of it needs.
pub fn peer_script(task: &Task, python: &Path, what: &str) -> Command {
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/peer.py")).arg(what);
    command.arg("--model").arg(&task.model).arg("--data").arg(&task.data);
    for (name, value) in [
        ("--ranks", u64::from(task.ranks)),
        ("--threads", task.threads as u64),
        ("--global-batch", u64::from(task.global_batch)),
        ("--sequence-length", u64::from(task.sequence_length)),
        ("--validation", u64::from(task.validation)),
    ] {
        command.args([name, &value.to_string()]);
    }
    // The value that trainer's agent sets for its workers; torchrun would set 1.
    command.env("OMP_NUM_THREADS", task.threads.to_string()).env("MKL_NUM_THREADS", task.threads.to_string());
    command
}
