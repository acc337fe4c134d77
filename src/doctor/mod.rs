//! Checks everything that a run needs, before it starts, and says what to do.
//!
//! Each check has a bounded time, and none hides another: an impossible check is a line, too. `verdict.rs` interprets
//! the findings, as pure functions.
//!
//! Stored layout: its objects in the store are below the folder of probes and are deleted; a kill leaves a few bytes
//! there. *Cancel:* at any moment.
#![doc = include_str!("README.md")]

mod account;
mod deploy;
mod elsewhere;
mod fabric;
mod memory;
mod metadata;
mod named;
mod nodes;
mod shared;
#[cfg(test)]
mod testing;
mod verdict;

use std::{path::Path, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;

use self::memory::{Gpu, Workers};
pub use self::{
    account::Machines,
    memory::{Account, Row, strategy_name},
    verdict::{Line, Verdict, exit_code},
};
use crate::{
    cloud::{gpus, hardware, instances},
    config::{self, Device, Machine, NoticeConfig, RunConfig, StorageConfig, workers_per_node},
    env,
    error::{Error, Explain, Kind, Result},
    ids::{RunId, random_hex},
    journal, layout,
    notice::window::{Surroundings, windows},
    storage::Store,
    worker::device,
};

/// The limit for one check.
const LIMIT: Duration = Duration::from_secs(30);
/// Limits for a store if no configuration gives them.
const LIMITS: StorageConfig = StorageConfig::plain(16, 16);
/// How many of the newest saves are timed.
const SAVES: usize = 5;

/// The subjects to check, beyond this machine.
#[derive(Debug)]
pub struct Doctor {
    /// The settings of a run, as far as they could be read.
    pub config: Option<Result<RunConfig>>,
    /// The absolute URI of the store, if no configuration gives it.
    pub store: Option<Result<String>>,
    /// A run whose saves are compared with the time to stop, and whose other nodes are dialled.
    pub run_id: Option<RunId>,
    /// Workers on this node, if given on the command line.
    pub nproc_per_node: Option<u32>,
    /// Bytes of the memory of each GPU, if given on the command line.
    pub gpu_memory: Option<u64>,
    /// The machines that are to be started.
    pub machines: Machines,
}

/// The result of one check, within the limit.
async fn within(check: &'static str, work: impl Future<Output = Line>) -> Line {
    tokio::time::timeout(LIMIT, work).await.unwrap_or_else(|_| {
        let found = format!("no answer within {} s", LIMIT.as_secs());
        Line::fail(check, Kind::Unavailable, found, "check the network, proxies and endpoints")
    })
}

impl Doctor {
    /// Runs all checks; one line for each.
    pub async fn look(mut self) -> Vec<Line> {
        let mut lines = Vec::new();
        let config = match self.config.take() {
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
        let here = async {
            let (mut lines, gpu) = libtorch(config.map_or_else(Device::default, |c| c.workload.parallel.device)).await;
            let is_packed = match config {
                Some(config) => named::is_packed(config).await,
                None => false,
            };
            lines.extend(self.memory(config, gpu.as_ref(), is_packed));
            lines
        };
        let named = async {
            match config {
                Some(config) => named::look(config).await,
                None => Vec::new(),
            }
        };
        let account = async {
            let (of, machines) = (account::spot_quota(&self.machines), &self.machines);
            tokio::join!(of, deploy::look(machines), elsewhere::look(machines))
        };
        let (here, named, kept, metadata, (quota, deployment, elsewhere)) =
            tokio::join!(here, named, self.store(config), metadata::look(), account);
        lines.extend([here, named, kept, metadata, vec![quota], deployment, elsewhere].into_iter().flatten());
        lines
    }

    /// The host's memory, and a GPU's if there is one to speak of.
    fn memory(&self, config: Option<&RunConfig>, found: Option<&Gpu>, is_packed: bool) -> Vec<Line> {
        let available = hardware::available_memory(Path::new("/"));
        let Some(config) = config else {
            let host = available.map_or_else(memory::of_unknown, memory::of_nothing);
            return [Some(host), self.gpu_memory.map(|_| memory::of_gpu_alone())].into_iter().flatten().collect();
        };
        let task = &config.workload;
        let known = self.machines.instance_type.as_deref().and_then(instances::gpus);
        let meant = self.gpu_memory.is_some() || !gpus::cpu_is_meant(task.parallel.device);
        let gpu = match (self.gpu_memory, &self.machines.instance_type, &known) {
            (Some(bytes), ..) => Some(Gpu { name: "--gpu-memory".into(), bytes }),
            (None, Some(instance_type), Some(set)) => Some(Gpu::of(set, instance_type)),
            _ => found.cloned(),
        };
        let gpu = gpu.filter(|_| meant);
        let machine = match &known {
            Some(set) => Machine { gpus: set.count, ..Machine::detect() },
            None => Machine::detect(),
        };
        let here = workers_per_node(&task.parallel, self.nproc_per_node, &machine);
        let workers = Workers { here, nodes: self.machines.count };
        let slots = config.checkpoint.slots;
        if let Some(own) = task.model.task() {
            let line = available.map_or_else(memory::of_unknown, |available| match crate::task::open(&own) {
                Ok(opened) => memory::of_task(opened.elements(), &task.train, workers, slots, available, gpu.is_some()),
                Err(error) => memory::failed(false, &error.into()),
            });
            return vec![line];
        }
        let run = match memory::Run::of(task, workers, is_packed) {
            Ok(run) => run,
            Err(error) => return vec![memory::failed(false, &error)],
        };
        let host = available
            .map_or_else(|| Ok(memory::of_unknown()), |available| run.on_host(slots, available, gpu.is_some()));
        let on_gpu = gpu.map(|gpu| run.on_gpu(&gpu).unwrap_or_else(|error| memory::failed(true, &error)));
        [Some(host.unwrap_or_else(|error| memory::failed(false, &error))), on_gpu].into_iter().flatten().collect()
    }

    /// The store, and the duration of a run's saves in it.
    async fn store(&self, config: Option<&RunConfig>) -> Vec<Line> {
        const CHECK: &str = "store";
        let settings = config.map_or(LIMITS, |config| config.storage.clone());
        let opened = match (config, &self.store) {
            (Some(config), _) => Some(open(&config.store, &settings)),
            (None, Some(Ok(uri))) => Some(open(uri, &settings)),
            (None, Some(Err(error))) => {
                return vec![Line::error(CHECK, error), stop_window(&NoticeConfig::default(), Ok(None))];
            }
            (None, None) => None,
        };
        let store = match opened {
            None => Err(Line::skipped(CHECK, "none is named: give CONFIG or --store")),
            Some(Ok(Some(store))) => Ok(store),
            Some(Ok(None)) => Err(Line::ok(CHECK, "the folder does not exist yet; the first run makes it")),
            Some(Err(error)) => Err(Line::error(CHECK, &error)),
        };
        let notice = config.map(|config| config.notice.clone()).unwrap_or_default();
        match store {
            Ok(store) => {
                let (mut lines, (durable, nodes)) = tokio::join!(examine(&store), self.run(&store));
                lines.push(stop_window(&notice, durable));
                lines.extend(nodes);
                lines
            }
            Err(line) => vec![line, stop_window(&notice, Ok(None))],
        }
    }

    /// The longest of the run's newest saves, seconds; and the lines about its nodes, if it has several.
    async fn run(&self, store: &Store) -> (Result<Option<f64>>, Vec<Line>) {
        let Some(run_id) = &self.run_id else { return (Ok(None), Vec::new()) };
        let run = store.folder(run_id.as_str());
        let state = match tokio::time::timeout(LIMIT, journal::replay(&run, run_id)).await {
            Ok(Ok(state)) => state,
            Ok(Err(error)) => return (Err(error.into()), Vec::new()),
            Err(_) => {
                let what = format!("journal of run {run_id} does not answer");
                return (Err(Error::new(Kind::Unavailable, what)), Vec::new());
            }
        };
        let newest = state.checkpoints().iter().rev().take(SAVES).map(|checkpoint| checkpoint.committed.cost.durable_s);
        let durable = newest.filter(|seconds| seconds.is_finite()).reduce(f64::max);
        (Ok(durable), nodes::look(&run, &state).await)
    }
}

/// The store at `uri`; `None`: a folder that does not exist, which is not created for a check.
fn open(uri: &str, settings: &StorageConfig) -> Result<Option<Store>> {
    if config::local_path(uri).is_some_and(|path| !path.exists()) {
        return Ok(None);
    }
    Ok(Some(Store::open(uri, settings)?))
}

fn stop_window(notice: &NoticeConfig, durable: Result<Option<f64>>) -> Line {
    let variable = |name: &str| env::text(name);
    let surroundings = Surroundings::look(&variable);
    match durable {
        Ok(durable) => verdict::stop_window(windows(notice, &variable, surroundings).stop, surroundings, durable),
        Err(error) => Line::error("stop time-out", &error),
    }
}

/// LibTorch and its devices, and the first GPU.
async fn libtorch(wanted: Device) -> (Vec<Line>, Option<Gpu>) {
    let look = move || {
        let found = device::look(wanted)?;
        let gpu = if gpus::cpu_is_meant(wanted) { None } else { Gpu::found()? };
        Ok::<_, Error>((found, gpu))
    };
    let build = if cfg!(torch_cuda) { "with CUDA" } else { "for CPUs" };
    match tokio::task::spawn_blocking(look).await {
        Ok(Ok((found, gpu))) => {
            let lines = [Line::ok("libtorch", format!("loaded, built {build}")), verdict::devices(&found)];
            (lines.into_iter().chain(shared::look(found.usable)).collect(), gpu)
        }
        Ok(Err(error)) => (vec![Line::error("libtorch", &error)], None),
        Err(_) => {
            let todo = "run scripts/setup, and check that the driver is new enough for this LibTorch";
            (vec![Line::fail("libtorch", Kind::Config, "it panicked when asked for devices", todo)], None)
        }
    }
}

/// The store's permissions and behaviour.
async fn examine(store: &Store) -> Vec<Line> {
    let key = format!("{}/doctor-{}", layout::PROBES, random_hex(16));
    let (put, clock) = put_and_look(store, &key).await;
    if put.kind == Some(Kind::Unavailable) {
        return vec![put, Line::skipped("store", "its other permissions can't be checked now")];
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
            Ok(()) => Line::ok("store create-once", "one of 16 racing creates wins, and a later one is refused"),
            Err(error) => Line::error("store create-once", &error.into()),
        }
    });
    let parts = within("store multipart", async {
        match store.prove_parts().await {
            Ok(()) => Line::ok("store multipart", "an upload in parts can be started and aborted"),
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

/// Writes an object, reads it back, and asks the store for its time.
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
            let found = "the bytes read back differ from those put";
            (
                Line::fail(CHECK, Kind::Config, found, "use another store"),
                nothing("the store's answers can't be trusted"),
            )
        }
        Ok(Err(error)) => (Line::error(CHECK, &error.into()), nothing("nothing could be put")),
        Err(_) => {
            let found = format!("no answer within {} s", LIMIT.as_secs());
            let todo = "check the network, and AWS_ENDPOINT_URL if the store is not on AWS";
            (Line::fail(CHECK, Kind::Unavailable, found, todo), nothing("nothing could be put"))
        }
    }
}
