//! `trainer doctor`
//!
//! Looks at everything that a run needs, before it needs it, and says what to do. Each check has one bounded time and none hides
//! another: what can't be looked at is a line, too. What it writes into the store lies below the folder of probes and is deleted; what a kill
//! leaves there is a few bytes.
#![doc = include_str!("README.md")]

mod account;
mod metadata;
mod named;
mod verdict;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use jiff::Timestamp;

use self::verdict::{Line, Need, Verdict, exit_code};
use super::{
    args::{JsonArg, WorkersArg},
    output, run, store,
};
use crate::{
    cloud::{
        gpus::{self, Found},
        hardware,
    },
    config::{self, Device, Machine, NoticeConfig, Precision, RunConfig, Sources, StorageConfig, workers_per_node},
    error::{Error, Explain, Kind, Result},
    ids::{RunId, random_hex},
    journal, layout, model,
    notice::window::{Surroundings, windows},
    storage::Store,
    torch,
};

/// A check takes no longer.
const LIMIT: Duration = Duration::from_secs(30);
/// Saves whose time is looked at.
const SAVES: usize = 5;

/// Check whether this machine, its store and its account have what a run needs
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer doctor
  trainer doctor config.toml --store s3://bucket/runs
  trainer doctor config.toml --run-id reports-2026q4      # compares the stop time-out with its saves
  trainer doctor --instance-type g5.xlarge --region us-east-1 --count 3      # checks the account's quota

Exit codes: 0 if nothing failed (warnings are possible), else that of the worst failure:
  69  not reachable
  77  not permitted
  78  wrong setting")]
pub struct Doctor {
    /// The configuration of a run: its store, its model's memory
    config: Option<PathBuf>,
    /// The store of the runs: s3://bucket/prefix, gs://…, az://…, file://path [default: the configuration's]
    #[arg(long, env = "TRAINER_STORE", value_name = "URI", hide_env_values = true)]
    store: Option<String>,
    /// A run whose saves are compared with the time to stop
    #[arg(long, env = "TRAINER_RUN_ID", value_name = "ID", hide_env_values = true)]
    run_id: Option<RunId>,
    #[command(flatten)]
    workers: WorkersArg,
    #[command(flatten)]
    machines: account::MachinesArg,
    #[command(flatten)]
    json: JsonArg,
}

/// The answer of one check that may not come.
async fn within(check: &'static str, work: impl Future<Output = Line>) -> Line {
    tokio::time::timeout(LIMIT, work).await.unwrap_or_else(|_| {
        let found = format!("no answer within {} s", LIMIT.as_secs());
        Line::fail(check, Kind::Unavailable, found, "check the network, proxies and endpoints")
    })
}

impl Doctor {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let mut lines = Vec::new();
        let config = match self.configuration() {
            None => None,
            Some(Ok(config)) => {
                lines.push(Line::ok("configuration", "can be read"));
                Some(config)
            }
            Some(Err(error)) => {
                lines.push(Line::error("configuration", &error));
                None
            }
        };
        let config = config.as_ref();
        lines.extend(store::block_on(async {
            let here = async {
                let mut lines = libtorch(config.map_or_else(Device::default, |config| config.parallel.device)).await;
                lines.push(self.memory(config));
                lines
            };
            let named = async {
                match config {
                    Some(config) => named::look(config).await,
                    None => Vec::new(),
                }
            };
            let (mut lines, named, kept, metadata, quota) =
                tokio::join!(here, named, self.store(config), metadata::look(), account::spot_quota(&self.machines));
            lines.extend(named);
            lines.extend(kept);
            lines.extend(metadata);
            lines.push(quota);
            Ok(lines)
        })?);
        let text = if self.json.json { output::json_lines(&lines)? } else { shown(&lines) };
        output::emit(&text)?;
        Ok(exit_code(&lines).into())
    }

    fn configuration(&self) -> Option<Result<RunConfig>> {
        let file = self.config.as_ref()?;
        let read = || {
            let flags = self.store.iter().map(|uri| ("--store or TRAINER_STORE", "store", uri.clone())).collect();
            Ok(config::load(&Sources {
                file: Some(file),
                text: None,
                flags,
                set: &[],
                working_directory: &store::working_directory()?,
                machine: Machine::detect(),
                fetch: &run::fetch,
            })?)
        };
        Some(read())
    }

    fn memory(&self, config: Option<&RunConfig>) -> Line {
        const CHECK: &str = "memory";
        let Some(available) = hardware::available_memory(Path::new("/")) else {
            return Line::skipped(CHECK, "the kernel does not say how much there is");
        };
        let Some(config) = config else {
            let found =
                format!("{} available; give CONFIG to hold it against a model", crate::report::human::bytes(available));
            return Line::skipped(CHECK, found);
        };
        match self.needed(config) {
            Ok(need) => verdict::memory(need, available),
            Err(error) => Line::error(CHECK, &error),
        }
    }

    fn needed(&self, config: &RunConfig) -> Result<Need> {
        let shapes = model::parameter_shapes(config.model.kind, &config.model.config)?;
        let elements = |shape: &[u64]| shape.iter().fold(1_u64, |all, extent| all.saturating_mul(*extent));
        let parameters = shapes.iter().fold(0_u64, |all, (_, shape)| all.saturating_add(elements(shape)));
        let machine = Machine::detect();
        let flag = self.workers.nproc_per_node.map(super::args::Workers::count);
        let workers = workers_per_node(&config.parallel, flag, &machine);
        Ok(verdict::need(
            parameters,
            config.train.precision == Precision::Bf16,
            workers,
            machine.gpus == 0 || gpus::cpu_is_meant(config.parallel.device),
        ))
    }

    /// The store, and what a run in it says of its saves.
    async fn store(&self, config: Option<&RunConfig>) -> Vec<Line> {
        const CHECK: &str = "store";
        let settings = config.map_or(store::LIMITS, |config| config.storage.clone());
        let named = config.map(|config| config.store.clone()).or_else(|| self.store.clone());
        let opened = named.as_deref().map(|uri| open(uri, &settings));
        let store = match opened {
            None => Err(Line::skipped(CHECK, "none is named: give CONFIG or --store")),
            Some(Ok(Some(store))) => Ok(store),
            Some(Ok(None)) => Err(Line::ok(CHECK, "the folder does not exist yet; the first run makes it")),
            Some(Err(error)) => Err(Line::error(CHECK, &error)),
        };
        let notice = config.map(|config| config.notice.clone()).unwrap_or_default();
        match store {
            Ok(store) => {
                let (mut lines, durable) = tokio::join!(examine(&store), self.durable(&store));
                lines.push(stop_window(&notice, durable));
                lines
            }
            Err(line) => vec![line, stop_window(&notice, Ok(None))],
        }
    }

    /// The longest of the run's newest saves, seconds.
    async fn durable(&self, store: &Store) -> Result<Option<f64>> {
        let Some(run_id) = &self.run_id else { return Ok(None) };
        let run = store.folder(run_id.as_str());
        let state = tokio::time::timeout(LIMIT, journal::replay(&run, run_id)).await;
        let state =
            state.map_err(|_| Error::new(Kind::Unavailable, format!("journal of run {run_id} does not answer")))??;
        let newest = state.checkpoints().iter().rev().take(SAVES).map(|checkpoint| checkpoint.committed.cost.durable_s);
        Ok(newest.filter(|seconds| seconds.is_finite()).reduce(f64::max))
    }
}

/// The store at `uri`; `None`: a folder that is not there, which is not made for a look.
fn open(uri: &str, settings: &StorageConfig) -> Result<Option<Store>> {
    let uri = store::absolute(uri)?;
    if config::local_path(&uri).is_some_and(|path| !path.exists()) {
        return Ok(None);
    }
    Ok(Some(Store::open(&uri, settings)?))
}

fn stop_window(notice: &NoticeConfig, durable: Result<Option<f64>>) -> Line {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let surroundings = Surroundings::look(&variable);
    match durable {
        Ok(durable) => verdict::stop_window(windows(notice, &variable, surroundings).stop, surroundings, durable),
        Err(error) => Line::error("stop time-out", &error),
    }
}

async fn libtorch(wanted: Device) -> Vec<Line> {
    let look = move || Found::look(&hardware::root(), wanted, torch::device_count);
    let looked = tokio::task::spawn_blocking(look).await;
    let build = if cfg!(torch_cuda) { "with CUDA" } else { "for CPUs" };
    match looked {
        Ok(Ok(found)) => {
            vec![Line::ok("libtorch", format!("loaded, built {build}")), verdict::devices(&found)]
        }
        Ok(Err(error)) => vec![Line::error("libtorch", &Error::from(error))],
        Err(_) => {
            let todo = "run scripts/setup, and see that the driver is as new as this LibTorch wants it";
            vec![Line::fail("libtorch", Kind::Config, "it panicked when it was asked for devices", todo)]
        }
    }
}

/// What the store allows and what it does.
async fn examine(store: &Store) -> Vec<Line> {
    let key = format!("{}/doctor-{}", layout::PROBES, random_hex(16));
    let (put, clock) = put_and_look(store, &key).await;
    if put.kind == Some(Kind::Unavailable) {
        return vec![put, Line::skipped("store", "what else it allows can't be found out now")];
    }
    let list = within("store list", async {
        match store.list(layout::PROBES).await {
            Ok(found) if found.iter().any(|object| object.key == key) || put.verdict != Verdict::Ok => {
                Line::ok("store list", "allowed")
            }
            Ok(_) => Line::fail(
                "store list",
                Kind::Config,
                "an object that was just put is not in the listing",
                "use a store whose listings are up to date",
            ),
            Err(error) => Line::error("store list", &error.into()),
        }
    });
    let create = within("store create-once", async {
        match store.prove_create_is_atomic().await {
            Ok(()) => Line::ok("store create-once", "of 16 racing creates one wins, and a later one is refused"),
            Err(error) => Line::error("store create-once", &error.into()),
        }
    });
    let parts = within("store multipart", async {
        match store.prove_parts().await {
            Ok(()) => Line::ok("store multipart", "an upload in parts can be begun and given up"),
            Err(error) => Line::error("store multipart", &error.into()),
        }
    });
    let sweep = within("store sweep", async {
        match store.folder(layout::PROBES).unfinished().await {
            Ok(_) => Line::ok("store sweep", "unfinished uploads can be listed"),
            Err(error) if error.kind() == Kind::Permission => Line::warn(
                "store sweep",
                "unfinished uploads can't be listed",
                "allow s3:ListBucketMultipartUploads on the bucket, or leave them to a lifecycle rule",
            ),
            Err(error) => Line::error("store sweep", &error.into()),
        }
    });
    let rule = within("lifecycle rule", async {
        match store.abort_rule().await {
            Ok(rule) => verdict::lifecycle(rule),
            Err(error) => {
                let todo = match error.kind() {
                    Kind::Permission => "allow s3:GetLifecycleConfiguration, or look at the bucket's rules yourself",
                    _ => "look at the bucket's rules yourself: unfinished uploads should be aborted after 2 days",
                };
                Line::warn("lifecycle rule", format!("not known: {}", Error::from(error)), todo)
            }
        }
    });
    let (list, create, parts, sweep, rule) = tokio::join!(list, create, parts, sweep, rule);
    let delete = within("store delete", async {
        match store.delete(&key).await {
            Ok(()) => Line::ok("store delete", "allowed"),
            Err(error) => Line::error("store delete", &error.into()),
        }
    });
    vec![put, list, create, parts, sweep, delete.await, rule, clock]
}

/// Puts an object, reads it back, and asks the store when that was.
async fn put_and_look(store: &Store, key: &str) -> (Line, Line) {
    const CHECK: &str = "store put and get";
    let body = Bytes::from(random_hex(16));
    let before = Timestamp::now();
    let work = async {
        store.put(key, body.clone()).await?;
        let after = Timestamp::now();
        let found = store.get(key, 1 << 10).await?;
        let stored = store.head(key).await?.last_modified;
        Ok::<_, crate::storage::StorageError>((after, found, stored))
    };
    let nothing = |why: &str| Line::skipped("clock", why);
    match tokio::time::timeout(LIMIT, work).await {
        Ok(Ok((after, found, stored))) if found == body => {
            (Line::ok(CHECK, format!("allowed in {}", store.uri())), verdict::clock(before, stored, after))
        }
        Ok(Ok(_)) => {
            let found = "what was read back is not what was put";
            (Line::fail(CHECK, Kind::Config, found, "use another store"), nothing("the store can't be believed"))
        }
        Ok(Err(error)) => (Line::error(CHECK, &error.into()), nothing("nothing could be put")),
        Err(_) => {
            let found = format!("no answer within {} s", LIMIT.as_secs());
            let todo = "check the network, and AWS_ENDPOINT_URL if the store is not on AWS";
            (Line::fail(CHECK, Kind::Unavailable, found, todo), nothing("nothing could be put"))
        }
    }
}

/// Lines for people.
fn shown(lines: &[Line]) -> String {
    let plain = crate::report::human::plain;
    let width = lines.iter().map(|line| line.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for line in lines {
        let word = match line.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
            Verdict::Skipped => "-",
        };
        text.push_str(&format!("{word:<5} {:<width$}  {}\n", line.check, plain(&line.found)));
        if let Some(todo) = &line.todo {
            text.push_str(&format!("{:<5} {:<width$}  → {}\n", "", "", plain(todo)));
        }
    }
    text
}
