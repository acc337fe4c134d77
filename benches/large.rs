//! A state of 2 GB: the memory that training, saving, restarting and restoring take, compared with a bound, and the
//! cost of two kinds of death.
//!
//! One life on local disk with sequences of 32 tokens, so that the state is nearly all there is. After two checkpoints,
//! when both snapshot slots are in use, one worker gets SIGKILL: its group restarts from the slots, and the store is
//! not read. Then the agent gets SIGKILL, and `trainer resume` continues from the store.
//!
//! | holder | bound, S being the checkpoint's bytes: 12 for each parameter |
//! |---|---|
//! | by each worker | 4/3 S (weights, moments, and the gradients that no checkpoint has) and 512 MB: LibTorch, its threads, one step's activations |
//! | by the agent | 128 MB |
//! | snapshot slots | 2 S; a checkpoint is fetched into one of them |

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
    time::Instant,
};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

use super::{
    Result,
    contender::{Task, trainer_resume, trainer_run},
    lab::{Live, Memory},
    report,
};

/// Its name on the command line and in messages.
pub const NAME: &str = "memory and restart";
const WORKER_FIXED: u64 = 512_000_000;
const AGENT_FIXED: u64 = 128_000_000;
/// Slots consist of whole pages, and have headers.
const SLOT_FIXED: u64 = 1 << 20;

/// The observations.
#[derive(Debug, Serialize)]
pub struct Large {
    model: &'static str,
    ranks: u32,
    state_bytes: u64,
    /// The memory at its peak: while training and saving, around the restart of the workers, and around the resume.
    training: Memory,
    restarting: Memory,
    resuming: Memory,
    bound: Memory,
    /// SIGKILL of a worker until the first step is finished again, the pause before a restart included.
    worker_restart_s: f64,
    /// Of that: the pause, and from the start of the new workers until all have loaded from memory.
    worker_backoff_s: f64,
    worker_load_s: f64,
    /// SIGKILL of the agent, and `trainer resume` at once, until the first step is finished again.
    agent_restart_s: f64,
    /// Of that: from the start of fetch and workers until every rank has loaded.
    agent_load_s: f64,
}

impl Large {
    /// `like`: the other benchmark's task, for its data, threads and ranks.
    pub fn measure(like: &Task, quick: bool) -> Result<Self> {
        let model = if quick { "configs/models/bench-42m.json" } else { "configs/models/bench-170m.json" };
        let task = Task {
            model: Path::new(env!("CARGO_MANIFEST_DIR")).join(model),
            data: like.data.clone(),
            scratch: like.scratch.clone(),
            ranks: like.ranks,
            threads: like.threads,
            steps: 1000,
            every: 6,
            global_batch: like.ranks,
            sequence_length: 32,
            validation: like.ranks,
        };
        let folder = task.scratch.join("large");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let log = task.scratch.join("log");
        fs::write(&log, "")?;
        let large = Self::live(model, &task, &format!("file://{}", folder.display()), &log)
            .with_context(|| fs::read_to_string(&log).unwrap_or_default())
            .context(NAME);
        fs::remove_dir_all(&folder)?;
        large
    }

    fn live(model: &'static str, task: &Task, store: &str, log: &Path) -> Result<Self> {
        let prepare = |mut command: Command| -> Result<Command> {
            command.stderr(File::options().append(true).open(log)?);
            Ok(command)
        };
        let mut run = Live::start(prepare(trainer_run(task, store)?)?)?;
        let state_bytes = run.wait_for("checkpoint")?.event["bytes"].as_u64().context("bytes of a checkpoint")?;
        run.wait_for("checkpoint")?;
        run.wait_for("step")?;
        let training = run.take_peak();
        eprintln!("{NAME}: two checkpoints; SIGKILL to a worker");

        let worker = run.descendants().pop().and_then(|pid| Pid::from_raw(pid.cast_signed())).context("a worker")?;
        let killed = Instant::now();
        kill_process(worker, Signal::KILL)?;
        let seconds = |event: &serde_json::Value, name: &str| event[name].as_f64().with_context(|| name.to_owned());
        let worker_backoff_s = seconds(&run.wait_for("worker_died")?.event, "backoff_s")?;
        let restored = run.wait_for("restored")?.event.clone();
        ensure!(restored["from"] == "memory", "the workers' restart has read the store: {restored}");
        run.wait_for("step")?;
        let worker_restart_s = killed.elapsed().as_secs_f64();
        let restarting = run.take_peak();
        eprintln!("{NAME}: first step again after {worker_restart_s:.1} s; SIGKILL to the agent");

        let killed = Instant::now();
        run.kill()?;
        let mut resumed = Live::start(prepare(trainer_resume(store, None))?)?;
        let agent_load_s = seconds(&resumed.wait_for("restored")?.event, "restore_s")?;
        resumed.wait_for("step")?;
        let agent_restart_s = killed.elapsed().as_secs_f64();
        let resuming = resumed.take_peak();
        eprintln!("{NAME}: first step again after {agent_restart_s:.1} s");
        resumed.kill()?;

        let bound = Memory {
            first: AGENT_FIXED,
            others: u64::from(task.ranks) * (state_bytes / 3 * 4 + WORKER_FIXED),
            shared: 2 * (state_bytes + SLOT_FIXED),
        };
        Ok(Self {
            model,
            ranks: task.ranks,
            state_bytes,
            training,
            restarting,
            resuming,
            bound,
            worker_restart_s,
            worker_backoff_s,
            worker_load_s: seconds(&restored, "restore_s")?,
            agent_restart_s,
            agent_load_s,
        })
    }

    fn phases(&self) -> [(&'static str, Memory); 3] {
        [
            ("training and saving", self.training),
            ("workers restarted from memory", self.restarting),
            ("resumed from the store", self.resuming),
        ]
    }

    /// The measurement, with the bound beside it.
    pub fn table(&self) -> String {
        let mb = |bytes: u64| format!("{:.0}", bytes as f64 / 1e6);
        let mut out = format!(
            "A state of {} MB ({}), {} ranks with all of it, sequences of 32 tokens.\n\n",
            mb(self.state_bytes),
            self.model,
            self.ranks
        );
        let heads = ["peak memory, MB", "agent", "workers", "slots", "all", "states"];
        report::head(&mut out, heads.map(str::to_owned).to_vec());
        let mut line = |name: String, held: Memory| {
            let states = held.total() as f64 / self.state_bytes as f64;
            let cells = [mb(held.first), mb(held.others), mb(held.shared), mb(held.total()), format!("{states:.2}")];
            report::row(&mut out, std::iter::once(name).chain(cells));
        };
        for (name, held) in self.phases() {
            line(name.to_owned(), held);
        }
        let ranks = self.ranks;
        line(format!("bound: 2 states (slots), {ranks} × (4/3 state + 512), agent 128"), self.bound);
        out += &match self.check() {
            Ok(()) => "\nWithin the bound.\n".to_owned(),
            Err(error) => format!("\n*Not within the bound*: {error}.\n"),
        };
        out += &format!(
            "\nSIGKILL to a worker: first step finished {:.1} s later (pause {:.1} s; start of workers and load from \
            memory {:.2} s; nothing read from the store). \
             Target: 10 s and the state at the speed of memory.\n\
             SIGKILL to the agent, `trainer resume` at once: first step finished {:.1} s later (start of workers and \
             load from disk {:.2} s).\n",
            self.worker_restart_s, self.worker_backoff_s, self.worker_load_s, self.agent_restart_s, self.agent_load_s
        );
        out
    }

    /// An error if more memory was held than the bound allows.
    pub fn check(&self) -> Result<()> {
        let bound = self.bound;
        for (phase, held) in self.phases() {
            for (name, held, bound) in [
                ("agent", held.first, bound.first),
                ("workers", held.others, bound.others),
                ("slots", held.shared, bound.shared),
            ] {
                let (held, bound) = (held.div_ceil(1_000_000), bound / 1_000_000);
                ensure!(held <= bound, "above the bound: {phase}: {name} hold {held} MB of {bound} MB");
            }
        }
        Ok(())
    }
}
