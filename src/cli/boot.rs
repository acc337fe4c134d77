//! `trainer boot`

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Args;
use jiff::Timestamp;

use super::{
    args::{NodesArg, SetArg, SsmArg, WatchersArg, Workers, WorkersArg},
    run, store,
};
use crate::{
    boot::{
        self, Gathered, Steps, passed,
        settings::{Config, Given, Layer, Name, Origin},
        stop::Stop,
    },
    cloud::hardware,
    config::{self, Device, Machine, RunConfig, Sources, StorageConfig, Text},
    error::{Context, Error, Kind, Result},
    ids::RunId,
    rendezvous::policy::ending::Wait,
    report::Screen,
    run::{
        Begin, LaunchOptions,
        open::{self, Found},
    },
    storage::Store,
};

/// The longest configuration that is read from a store, bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Join a machine's run at boot: find the configuration, then resume the run or create it
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer boot --ssm-path /trainer/reports
  trainer boot s3://bucket/reports.toml --store s3://bucket/runs --run-id-template 'reports-{year}'
  trainer boot --ssm-path /trainer/reports --nodes 2:8

Precedence: instance tags < SSM parameters < environment < flags.
  environment: TRAINER_ and CONFIG, STORE, RUN_ID, RUN_ID_TEMPLATE, TIME_ZONE, SSM_PATH
  parameters below the path: config (TOML) or config-uri, store,
    run-id or run-id-template, time-zone, set/<key>;
    worker-token, job-api-base-url and queue are for `trainer work`;
    AWS_S3_BUCKET (its runs/), AWS_SQS_QUEUE_URL, JOB_API_BASE_URL and WORKER_TOKEN mean the same
  tags: trainer: and config-uri, store, run-id or run-id-template, time-zone,
    ssm-path, set:<key>; where InstanceMetadataTags is enabled

Fields of a template: {year} {quarter} {month} {week} {week_year} {day}, in UTC or --time-zone.
Only the run of the current date is considered.
To continue an unfinished run of an earlier period, pass its --run-id.

An existing run keeps the settings it was created with, plus changes from --set or set/<key>.
A changed configuration file has no effect. Settings of storage apply from the first request;
storage.attempts is the number of attempts per request. A complete run is left alone.
With --nodes 1, two machines may boot one run: one trains, the other waits and takes over when
the first is gone. Give all machines of a run the same --nodes.
When the run is complete or at its cap, on_complete.action says what happens to the machine.
In a container set TRAINER_POWER_OFF=host: then the host powers the machine off, not `boot`.

Datasets are kept on a mounted instance store (NVMe), else in the user's cache, else in a folder
of this process. TRAINER_HOST_ROOT is the folder of the machine's /sys, /proc and /dev, if a
container has them elsewhere.

Exit codes in addition to those of `trainer run`:
  69  a service does not answer, or no GPU driver (start again)
  77  permission denied
  78  no run or configuration is named, or a wrong one
  79  another machine still has the run after --standby
  80  at its cap: --set run.max_hours=N (or max_wait_hours, max_cost) lets it go on
  81  started again and again without a new checkpoint")]
pub struct Boot {
    /// The configuration of a new run: a TOML file, or its URI
    config: Option<String>,
    /// The run's id
    #[arg(long, value_name = "ID")]
    run_id: Option<String>,
    /// The run's id, made from today's date, such as 'reports-{year}q{quarter}'
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "run_id")]
    run_id_template: Option<String>,
    /// The time zone of that date, such as Europe/Berlin [default: UTC]
    #[arg(long, value_name = "ZONE")]
    time_zone: Option<String>,
    /// Read SSM parameters below this path, such as /trainer/reports
    #[arg(long, value_name = "PATH")]
    ssm_path: Option<String>,
    #[command(flatten)]
    ssm: SsmArg,
    /// The store of the runs: s3://bucket/prefix, gs://…, az://…, file://path [default: the configuration's]
    #[arg(long, value_name = "URI")]
    store: Option<String>,
    #[command(flatten)]
    workers: WorkersArg,
    #[command(flatten)]
    nodes: NodesArg,
    #[command(flatten)]
    set: SetArg,
    /// How long to wait while another machine trains this run: a duration such as 30m, or "forever"
    #[arg(long, value_name = "TIME", default_value = "forever", value_parser = standby)]
    standby: Duration,
    /// How long to wait for the NVIDIA driver on a machine with GPUs
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    device_wait: Duration,
    #[command(flatten)]
    watchers: WatchersArg,
    /// Print events as JSON, one object per line
    #[arg(long)]
    json: bool,
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    config::parse_duration(text).ok_or_else(|| "expected a duration such as 90s, 5m or 1h30m".into())
}

fn standby(text: &str) -> Result<Duration, String> {
    if text == "forever" { Ok(Duration::MAX) } else { duration(text) }
}

impl Boot {
    pub(super) fn execute(self, screen: Screen) -> Result<ExitCode> {
        let stop = Stop::listen()?;
        stop.leave_when_stuck();
        let Some(ready) = run::unless_asked(&stop, self.prepare(&stop))? else {
            return Ok(Kind::Interrupted.exit_code().into());
        };
        drop(stop);
        let Ready { store, run_id, begin, options } = ready;
        let watchers = self.watchers.start(Some(run_id.clone()))?;
        let reporter = watchers.reporter(screen, self.json, None);
        let nproc_per_node = self.workers.nproc_per_node.map(Workers::count);
        run::launch(&watchers, reporter, store, run_id, begin, nproc_per_node, options)
    }

    /// Finds the run, and waits for the devices that it needs.
    fn prepare(&self, stop: &Stop) -> Result<Ready> {
        let mut steps = Steps::begin();
        let Gathered { settings, passed } =
            stop.block_on(boot::gather(self.layer(), &self.ssm.ssm_environment, &mut steps))?;
        if !passed.is_empty() && !stop.heard().asked() {
            return Err(passed::start_anew(&passed));
        }
        let run_id = boot::run_id(&settings, Timestamp::now())?;
        let working_directory = store::working_directory()?;
        let named = boot::store(&settings, &working_directory)?;

        // An existing run needs no configuration: an unreadable one is no reason not to resume it.
        let changes = boot::changes(&settings.set)?;
        let overrides = changes.free.clone();
        let find = |uri: &str, reading: &StorageConfig| {
            let found = stop.block_on(open::find(uri, reading, &run_id, overrides.clone()));
            found.context(format!("look for run {run_id} in {uri}"))
        };
        let mut found = Found::New;
        if let Some(named) = &named {
            found = find(&named.value, &config::reading_settings(&settings.set)?)?;
        }
        let mut new = None;
        if matches!(found, Found::New) {
            let config = new.insert(self.configuration(stop, &settings, named)?);
            found = find(&config.store, &config.storage)?;
        }
        // A machine with nothing to do needs no device, and does not wait for one.
        let idle = matches!(found, Found::Complete(..) | Found::Capped(..));
        let (device, store, begin) = match (found, new) {
            (Found::Existing(run) | Found::Complete(run, _) | Found::Capped(run, _), _) => {
                let doing = if idle { "it has ended" } else { "resuming it" };
                steps.done(format_args!("run {run_id} exists in {}: {doing}", run.store.uri()));
                for key in changes.without_effect(&run.config) {
                    tracing::info!(
                        "boot: {key} stays as the run was created; the value that this machine gives has no effect"
                    );
                }
                let device = run.config.workload.parallel.device;
                let (store, begin) = run.resume(None);
                (device, store, begin)
            }
            (Found::New, Some(config)) => {
                let store = Store::open(&config.store, &config.storage)?;
                steps.done(format_args!("run {run_id} does not exist in {}: creating it", store.uri()));
                (config.workload.parallel.device, store, Begin::CreateOrResume { config: Box::new(config), overrides })
            }
            // The configuration was read as soon as no run was found.
            (Found::New, None) => return Err(Error::new(Kind::Bug, "a new run has no configuration")),
        };
        self.nodes.nodes.meet_in(&store.uri())?;
        self.await_devices(stop, device, idle, &mut steps)?;
        let cache = boot::cache(&hardware::root());
        if let Some(folder) = &cache {
            steps.done(format_args!("datasets are kept on the local disk, {}", folder.display()));
        }
        let since = Some(steps.began());
        let options = LaunchOptions {
            nodes: self.nodes.nodes,
            wait: self.nodes.wait.unwrap_or(Wait::BOOT),
            standby: self.standby,
            cache,
            since,
            dedicated: true,
            accepts_data: false,
        };
        Ok(Ready { store, run_id, begin, options })
    }

    /// What the command line says.
    fn layer(&self) -> Layer {
        fn given<T>(value: Option<T>, flag: &'static str) -> Option<Given<T>> {
            value.map(|value| Given { value, origin: Origin::Flag(flag) })
        }
        let id = given(self.run_id.clone().map(Name::Id), "--run-id");
        Layer {
            config: given(self.config.clone().map(Config::Place), "CONFIG"),
            store: given(self.store.clone(), "--store"),
            name: id.or_else(|| given(self.run_id_template.clone().map(Name::Template), "--run-id-template")),
            time_zone: given(self.time_zone.clone(), "--time-zone"),
            ssm_path: given(self.ssm_path.clone(), "--ssm-path"),
            set: self.set.set.clone(),
            ..Layer::default()
        }
    }

    /// The configuration of a new run.
    fn configuration(&self, stop: &Stop, settings: &Layer, store: Option<Given<String>>) -> Result<RunConfig> {
        let given = settings.config.as_ref().ok_or_else(|| {
            Error::new(Kind::Config, "no configuration is named, and the run does not exist").with_hint(
                "give CONFIG, TRAINER_CONFIG, the parameter config or config-uri, or the tag trainer:config-uri",
            )
        })?;
        let document = Document::read(stop, given)?;
        let mut flags = Vec::new();
        if let Some(store) = store {
            flags.push(("the store that this machine was given", "store", store.value));
        }
        if let Some(workers) = self.workers.nproc_per_node {
            flags.push(("--nproc-per-node", "parallel.nproc_per_node", workers.setting()));
        }
        let sources = Sources {
            file: document.file.as_deref(),
            text: document.text.as_ref().map(|(name, toml, folder)| Text {
                name,
                toml,
                folder: folder.as_deref(),
                guard: None,
            }),
            flags,
            set: &settings.set,
            working_directory: &store::working_directory()?,
            machine: Machine::detect(),
            fetch: &|folder, name| stop.block_on(run::fetched(folder, name)),
        };
        Ok(config::load(&sources)?)
    }

    fn await_devices(&self, stop: &Stop, wanted: Device, idle: bool, steps: &mut Steps) -> Result<()> {
        let root = hardware::root();
        let wait = |limit| stop.block_on(boot::await_gpus(&root, wanted, limit));
        let ready = match wait(Duration::ZERO) {
            Ok(ready) => ready,
            Err(_) if idle => return Ok(()),
            Err(_) => wait(self.device_wait)?,
        };
        if let Some(what) = ready {
            steps.done(what);
        }
        Ok(())
    }
}

/// An agent's inputs.
struct Ready {
    store: Store,
    run_id: RunId,
    begin: Begin,
    options: LaunchOptions,
}

/// A configuration as read.
struct Document {
    file: Option<PathBuf>,
    /// Its name, the TOML, and the URI of the folder that it lies in.
    text: Option<(PathBuf, String, Option<String>)>,
}

impl Document {
    fn read(stop: &Stop, given: &Given<Config>) -> Result<Self> {
        match &given.value {
            Config::Toml(toml) => {
                let text = (PathBuf::from(given.origin.to_string()), toml.clone(), None);
                Ok(Self { file: None, text: Some(text) })
            }
            Config::Place(place) => {
                let named = Given { value: place.clone(), origin: given.origin.clone() };
                if !named.may_be_a_place() {
                    return Err(Error::new(Kind::Config, format!("{} is neither a URI nor a path", given.origin)));
                }
                if let Some(path) = config::local_path(place) {
                    return Ok(Self { file: Some(path), text: None });
                }
                let Some((folder, name)) = place.rsplit_once('/').filter(|_| place.contains("://")) else {
                    return Ok(Self { file: Some(place.into()), text: None });
                };
                let doing = format!("read the configuration that {} names", given.origin);
                let folder_store = Store::open(folder, &store::LIMITS).context(doing.as_str())?;
                let read = async { Ok(folder_store.get(name, MAX_CONFIG).await?) };
                let bytes = stop.block_on(read).map_err(|error| error.as_config_error().context(doing.as_str()))?;
                let toml = String::from_utf8(bytes.to_vec())
                    .map_err(|_| Error::new(Kind::Config, format!("{folder}/{name} is not text")))?;
                let name = PathBuf::from(format!("{}/{name}", folder_store.uri()));
                Ok(Self { file: None, text: Some((name, toml, Some(folder.to_owned()))) })
            }
        }
    }
}
