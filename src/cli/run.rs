//! `trainer run`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Args;

use super::{
    args::{NodesArg, SetArg, StoreArg, Watchers, WatchersArg, WorkersArg},
    store,
};
use crate::{
    boot::stop::Stop,
    cloud::leave::{self, Departure},
    config::{self, CompleteAction, Machine, RunConfig, Sources},
    error::{Error, Kind, Result},
    ids::{RunId, random_hex},
    rendezvous::policy::ending::Wait,
    report::{Reporter, Screen, human},
    run::{self, Begin, Launch, LaunchOptions, OnComplete, Outcome},
    storage::Store,
};

/// Start a new run
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer run configs/quickstart.toml
  trainer run configs/quickstart.toml --store s3://bucket/runs --run-id first --set train.steps=500
  trainer run configs/quickstart.toml --json > events.jsonl

Precedence: built-in defaults < CONFIG < TRAINER_STORE < flags < --set.
An unknown key is an error; the message lists the valid keys.")]
pub struct Run {
    /// The run's configuration, a TOML file
    config: PathBuf,
    /// The new run's id [default: from the file's name and the time]
    #[arg(long, env = "TRAINER_RUN_ID", value_name = "ID", hide_env_values = true)]
    run_id: Option<RunId>,
    #[command(flatten)]
    store: StoreArg,
    #[command(flatten)]
    workers: WorkersArg,
    #[command(flatten)]
    nodes: NodesArg,
    #[command(flatten)]
    set: SetArg,
    #[command(flatten)]
    watchers: WatchersArg,
    /// Print events as JSON, one object per line
    #[arg(long)]
    json: bool,
}

impl Run {
    pub(super) fn execute(self, screen: Screen) -> Result<ExitCode> {
        let stop = Stop::listen()?;
        stop.leave_when_stuck();
        let prepare = || {
            let config = self.resolve(&stop)?;
            let run_id = match &self.run_id {
                Some(id) => id.clone(),
                None => default_id(&self.config, &jiff::Zoned::now(), &random_hex(2))?,
            };
            self.nodes.nodes.meet_in(&config.store)?;
            let store = Store::open(&config.store, &config.storage)?;
            let config = Box::new(config);
            // The same command on each of several machines: one of them creates the run, the others join it.
            let begin = if self.nodes.nodes.max > 1 {
                Begin::CreateOrResume { config, overrides: Vec::new() }
            } else {
                Begin::Create(config)
            };
            Ok((store, run_id, begin))
        };
        let Some((store, run_id, begin)) = unless_asked(&stop, prepare())? else {
            return Ok(Kind::Interrupted.exit_code().into());
        };
        drop(stop);
        let nproc_per_node = self.workers.nproc_per_node.map(super::args::Workers::count);
        let options = LaunchOptions {
            nodes: self.nodes.nodes,
            wait: self.nodes.wait.unwrap_or(Wait::RUN),
            ..LaunchOptions::default()
        };
        let watchers = self.watchers.start(Some(run_id.clone()))?;
        launch(&watchers, watchers.reporter(screen, self.json, None), store, run_id, begin, nproc_per_node, options)
    }

    fn resolve(&self, stop: &Stop) -> Result<RunConfig> {
        let mut flags = Vec::new();
        if let Some(store) = &self.store.store {
            flags.push(("--store or TRAINER_STORE", "store", store.clone()));
        }
        if let Some(workers) = self.workers.nproc_per_node {
            flags.push(("--nproc-per-node", "parallel.nproc_per_node", workers.setting()));
        }
        let sources = Sources {
            file: Some(&self.config),
            text: None,
            flags,
            set: &self.set.set,
            working_directory: &store::working_directory()?,
            machine: Machine::detect(),
            fetch: &|folder, name| stop.block_on(fetched(folder, name)),
        };
        Ok(config::load(&sources)?)
    }
}

/// The maximum size of a model's description, bytes.
const MAX_MODEL_CONFIG: u64 = 1 << 20;

pub(super) fn fetch(folder: &str, name: &str) -> Result<Vec<u8>> {
    store::block_on(fetched(folder, name))
}

/// Reads a small remote object.
pub(super) async fn fetched(folder: &str, name: &str) -> Result<Vec<u8>> {
    Ok(store::open(folder)?.get(name, MAX_MODEL_CONFIG).await?.to_vec())
}

/// `<file stem>-<yyyymmdd>-<hhmmss>-<4 hex digits>`, with characters that an id can't hold replaced by `-`.
fn default_id(config: &Path, now: &jiff::Zoned, random: &str) -> Result<RunId> {
    let stem: String = config
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' })
        .take(60)
        .collect();
    let stem = stem.trim_start_matches(['-', '_']);
    let stem = if stem.is_empty() { "run" } else { stem };
    RunId::new(format!("{stem}-{}-{random}", now.strftime("%Y%m%d-%H%M%S")))
        .map_err(|error| Error::from_source(Kind::Bug, error))
}

/// The prepared value; `None`: this process was asked to stop meanwhile, and reports that.
pub(super) fn unless_asked<T>(stop: &Stop, ready: Result<T>) -> Result<Option<T>> {
    if stop.heard().asked() {
        tracing::info!("stopped before the run began, nothing lost: run the same command again");
        return Ok(None);
    }
    ready.map(Some)
}

/// Passes the run to the agent and tells the user how it ended.
pub(super) fn launch(
    watchers: &Watchers,
    reporter: Reporter,
    store: Store,
    run_id: RunId,
    begin: Begin,
    nproc_per_node: Option<u32>,
    options: LaunchOptions,
) -> Result<ExitCode> {
    let resume = format!("trainer resume --run-id {run_id} --store {}", human::shell(&store.uri()));
    tracing::info!(%run_id, store = store.uri(), "{}", match &begin {
        Begin::Create(_) => "new run",
        Begin::Resume { .. } => "resuming run",
        Begin::CreateOrResume { .. } => "new run, or one that another node has just created",
    });
    let (named, uri) = (run_id.clone(), store.uri());
    let outcome = run::launch(Launch { store, run_id, begin, nproc_per_node, options, reporter: reporter.clone() });
    reporter.finish();
    let outcome = outcome.map_err(|error| store::in_hints(error, &named, &uri));
    if let Some(alerts) = &watchers.alerts {
        // Another machine has the run: nobody needs to do anything.
        if let Err(error) = outcome.as_ref()
            && error.kind() != Kind::Fenced
        {
            alerts.failed(&error.to_string());
        }
        alerts.clone().finish();
    }
    Ok(match outcome? {
        Outcome::Completed { then } => {
            complete(&then)?;
            ExitCode::SUCCESS
        }
        Outcome::NotCreated => {
            tracing::info!("stopped before the run was created, nothing lost: run the same command again");
            Kind::Interrupted.exit_code().into()
        }
        Outcome::Capped { cap, lost_steps: _, then } => {
            tracing::warn!("run {named} is at its cap: {cap}");
            tracing::warn!("to go on: {resume} {}", cap.remedy());
            complete(&then)?;
            Kind::Capped.exit_code().into()
        }
        Outcome::Interrupted { lost_steps } => {
            tracing::info!("continue with: {resume}");
            let kind = if lost_steps == 0 { Kind::Interrupted } else { Kind::InterruptedWithLoss };
            kind.exit_code().into()
        }
    })
}

/// The pause before a group that does not answer is asked again; it doubles up to the second of these.
const ASK_AGAIN: Duration = Duration::from_secs(60);
const ASK_AGAIN_AT_MOST: Duration = Duration::from_secs(3600);

/// Carries out the run's `on_complete` on this machine. The run is complete or at its cap in any case.
fn complete(then: &OnComplete) -> Result<()> {
    match then.action {
        CompleteAction::Exit => Ok(()),
        CompleteAction::Terminate => {
            let stop = Stop::listen_anew()?;
            let left = stop.block_on(async {
                let mut pause = ASK_AGAIN;
                while leave::leave(&then.lifecycle_hook).await == (Departure::Stays { silence: true }) {
                    tracing::warn!("on_complete: the group is asked again in {} s", pause.as_secs());
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(ASK_AGAIN_AT_MOST);
                }
                Ok(())
            });
            // A person who stops this process before that has taken care of its machine, or will.
            left.or_else(|error| if stop.heard().asked() { Ok(()) } else { Err(error) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_from_the_file_and_the_time() {
        let now: jiff::Zoned = "2026-11-22T04:07:46[UTC]".parse().unwrap();
        for (path, id) in [
            ("configs/quickstart.toml", "quickstart-20261122-040746-a1b2"),
            ("my run.v2.toml", "my-run-v2-20261122-040746-a1b2"),
            ("..", "run-20261122-040746-a1b2"),
            ("-é.toml", "run-20261122-040746-a1b2"),
            (&"x".repeat(300), &format!("{}-20261122-040746-a1b2", "x".repeat(60))),
        ] {
            assert_eq!(default_id(Path::new(path), &now, "a1b2").unwrap().as_str(), id);
        }
    }
}
