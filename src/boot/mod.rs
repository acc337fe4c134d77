//! A machine's start: finds the run that it is to train, and joins it.
//!
//! # Look-ups, in this order
//! 1. The region: `AWS_REGION`, a profile, or the instance's identity document.
//! 2. The settings, from the [layers](settings): flags, the environment, SSM parameters below a path, instance tags.
//! 3. The run: if its journal exists, it is resumed: a run keeps the settings it was created with, and the changes of
//!    `set` on top of them. Otherwise it is created. The configuration is read only if no store is named, or if the run
//!    is not there (`cli/boot.rs` decides, `run/open.rs` looks). A configuration is a file, an object of a store, or
//!    the value of a parameter. While `boot` looks for the run, only `set` can change how the store is asked
//!    (`storage.attempts`, …); from then on the run's own `storage` settings hold, including later generations'
//!    changes. This process does not follow changes that another machine makes while this one is on standby.
//! 4. Devices on the bus that the driver does not have yet; a local disk that lives and dies with the machine, for
//!    datasets.
//!
//! # Run ids
//! A template names the run of the day on which the machine boots (`reports-{year}q{quarter}`), and no other: machines
//! that boot in the new quarter do not continue an unfinished run of the quarter before. To continue it, pass its
//! `--run-id`. A machine that is training when the quarter changes finishes its run.
//!
//! # Two at once, crash, retry, cancel
//! Nothing is stored outside the run's own journal. Two machines that boot with one run id at once both try to create
//! it; one succeeds, the other resumes. One of them trains; the other waits, its data fetched, watches the heartbeat,
//! and takes over when that stops: this happens in a group that starts the replacement before it ends the replaced
//! machine. A second boot of a complete run finds that out, waits for no device, and does what `on_complete` says. A
//! kill at any instant leaves the same state as a kill of the agent. A request to stop that arrives before the agent
//! listens is not lost ([`stop`]): `boot` then begins nothing.
//!
//! # Errors
//! Errors that a person must fix (configuration: 78, permission: 77) and errors that may pass with time (69) have
//! different exit codes, so that a supervisor repeats only the latter. Names of parameters are logged, their values are
//! not; a wrong setting is reported with its value, like any other: settings are not secret, they are in the journal.
#![doc = include_str!("README.md")]
pub mod passed;
pub mod settings;
pub mod stop;

mod devices;
mod template;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use jiff::{Timestamp, tz::TimeZone};

pub use self::devices::await_gpus;
use self::{
    passed::Pattern,
    settings::{Given, Layer, Name, Origin},
};
use crate::{
    cloud::{
        hardware,
        identity::{self, Tags},
        region,
        ssm::{self, Parameter, Secret},
    },
    config::{self, RunConfig},
    env,
    error::{Error, Kind, Result},
    ids::RunId,
};

/// Reports each step of a boot with the time that it took.
#[derive(Debug)]
pub struct Steps {
    began: Instant,
    last: Instant,
}

impl Steps {
    /// Counts from the start of this process: its libraries are loaded by now.
    pub fn begin() -> Self {
        let now = Instant::now();
        let began = process_age().and_then(|age| now.checked_sub(age)).unwrap_or(now);
        let mut steps = Self { began, last: began };
        steps.done("program and libraries are loaded");
        steps
    }

    /// When this process started.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Reports a finished step.
    pub fn done(&mut self, what: impl std::fmt::Display) {
        let now = Instant::now();
        tracing::info!("boot: {what}, {:.2} s", now.duration_since(self.last).as_secs_f64());
        self.last = now;
    }
}

/// How long this process has existed: field 22 of `/proc/self/stat`, in clock ticks since the boot, against
/// `/proc/uptime` (proc(5)).
fn process_age() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let started: f64 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let uptime: f64 = std::fs::read_to_string("/proc/uptime").ok()?.split(' ').next()?.parse().ok()?;
    #[expect(clippy::cast_precision_loss, reason = "a hundred or so")]
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    Duration::try_from_secs_f64(uptime - started / ticks).ok().filter(|age| *age < Duration::from_secs(3600))
}

/// What [`gather`] finds.
#[derive(Debug)]
pub struct Gathered {
    /// The settings of this machine, flags above everything else.
    pub settings: Layer,
    /// Parameters that are to be variables, and are none yet.
    pub passed: Vec<(String, Secret)>,
}

/// The settings of this machine, flags above everything else; `patterns`: parameters that are to be variables.
pub async fn gather(flags: Layer, patterns: &[Pattern], steps: &mut Steps) -> Result<Gathered> {
    match region::find().await {
        Some((region, source)) => steps.done(format_args!("region {region} {}", source.text())),
        None => steps.done("no region is known"),
    }
    let variable = |name: &str| env::given(name);
    let above = flags.over(Layer::from_environment(&variable)?);
    let (tags, silence) = match identity::tags().await? {
        Tags::Known(tags) => (tags, None),
        Tags::Silent(error) => (Vec::new(), Some(error)),
    };
    let (count, (tags, unknown)) = (tags.len(), Layer::from_tags(tags)?);
    if count > 0 {
        steps.done(format_args!("{count} tags of this instance"));
    }
    if !unknown.is_empty() {
        tracing::warn!("ignoring unknown trainer: tags of this instance: {}", shown(&unknown));
    }
    let Some(path) = above.ssm_path.as_ref().or(tags.ssm_path.as_ref()).map(|path| path.value.clone()) else {
        if let Some(pattern) = patterns.first() {
            let what = format!("--ssm-environment {pattern}: there is no path of parameters");
            return Err(
                Error::new(Kind::Config, what).with_hint("give --ssm-path, such as --ssm-path /trainer/reports")
            );
        }
        return Ok(Gathered { settings: settled(above.over(tags), silence)?, passed: Vec::new() });
    };
    let path = path.trim_end_matches('/');
    if region::find().await.is_none() {
        let what = format!("parameters below {path} can't be read: no region is known");
        let error = Error::new(Kind::Config, what).with_hint(
            "set AWS_REGION, such as AWS_REGION=eu-central-1, or let \
            the machine read its metadata (a container: hop limit 2)",
        );
        // The region is one of the facts that the machine may report later.
        return Err(silence.unwrap_or(error));
    }
    let parameters = ssm::parameters(path).await?;
    let names: Vec<String> = parameters.iter().map(|parameter| parameter.name.clone()).collect();
    steps.done(format_args!("{} parameters below {path}: {}", names.len(), shown(&names)));
    if names.is_empty() {
        tracing::warn!("there is no parameter below {path}");
    }
    let is_set = |name: &str| env::raw(name).is_some();
    let passed = passed::choose(patterns, &parameters, &is_set)?;
    let parameters = understood(path, parameters, patterns).await?;
    Ok(Gathered { settings: settled(above.over(parameters).over(tags), silence)?, passed })
}

/// The settings from parameters below `path`; says which of them mean nothing here.
pub async fn understood(path: &str, parameters: Vec<Parameter>, patterns: &[Pattern]) -> Result<Layer> {
    let (parameters, mut unknown) = Layer::from_parameters(path, parameters)?;
    unknown.retain(|name| !patterns.iter().any(|pattern| pattern.fits(name)));
    if !unknown.is_empty() {
        tracing::warn!(
            "ignoring unknown parameters below {path}: {}; --ssm-environment makes variables of them",
            shown(&unknown)
        );
    }
    if let (Some(named), Some((region, source))) = (&parameters.region, region::find().await)
        && named.value != region
    {
        tracing::warn!(
            "{} names another region than {region}, {}, which is used: set AWS_REGION where this program starts",
            named.origin,
            source.text()
        );
    }
    Ok(parameters)
}

/// The settings of an instance that does not report its tags: those of the other layers, if they suffice. If they
/// don't, the tags may name another run or store, and a guess would start a second run.
fn settled(said: Layer, silence: Option<Error>) -> Result<Layer> {
    match silence {
        Some(error) if said.config.is_none() || said.store.is_none() || said.name.is_none() => Err(error),
        _ => Ok(said),
    }
}

/// The first few names.
fn shown(names: &[String]) -> String {
    const MOST: usize = 20;
    let mut text = names.iter().take(MOST).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > MOST {
        text += ", …";
    }
    text
}

/// The run named for the time `now`.
pub fn run_id(settings: &Layer, now: Timestamp) -> Result<RunId> {
    let name = settings.name.as_ref().ok_or_else(|| {
        Error::new(Kind::Config, "no run is named").with_hint(
            "give --run-id or --run-id-template, TRAINER_RUN_ID or TRAINER_RUN_ID_TEMPLATE, or the parameter or tag \
            run-id or run-id-template",
        )
    })?;
    let result = match &name.value {
        Name::Id(text) => RunId::new(text.as_str())
            .map_err(|error| Error::from_source(Kind::Config, error).context(format!("take {}", name.origin))),
        Name::Template(text) => {
            let zone = time_zone(settings)?;
            template::render(text, &now.to_zoned(zone))
        }
    };
    result.map_err(|error| unsaid(&name.origin, "valid run id or run id template", error))
}

fn time_zone(settings: &Layer) -> Result<TimeZone> {
    let Some(zone) = &settings.time_zone else { return Ok(TimeZone::UTC) };
    TimeZone::get(&zone.value).map_err(|error| {
        let error = Error::from_source(Kind::Config, error).context(format!("take {}", zone.origin));
        unsaid(&zone.origin, "time zone that this machine knows", error)
    })
}

/// An error about a value; without the value if it might be a secret by mistake.
fn unsaid(origin: &Origin, what: &str, error: Error) -> Error {
    match origin {
        Origin::Parameter(_) => {
            let silent = Error::new(Kind::Config, format!("{origin} is not a {what}"));
            match error.hint() {
                Some(hint) => silent.with_hint(hint),
                None => silent,
            }
        }
        _ => error,
    }
}

/// The named store, if there is one; a relative one is taken from `working_directory`.
pub fn store(settings: &Layer, working_directory: &Path) -> Result<Option<Given<String>>> {
    let Some(given) = &settings.store else { return Ok(None) };
    if !given.may_be_a_place() {
        return Err(Error::new(Kind::Config, format!("{} is neither a URI nor a path", given.origin)));
    }
    let value = config::absolute_uri(&given.value, working_directory).map_err(|expected| {
        let error = Error::new(Kind::Config, format!("store {:?}: expected {expected}", given.value));
        unsaid(&given.origin, "store's URI", error)
    })?;
    Ok(Some(Given { value, origin: given.origin.clone() }))
}

/// The changed settings that an existing run can take, and those that it can't.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// It takes these.
    pub free: Vec<(String, String)>,
    /// It keeps these for life. They are no error: they may have been set when the run was created, and a machine that
    /// boots again still has them.
    kept: Vec<(String, String)>,
}

/// Divides the changed settings.
///
/// # Errors
/// On unknown keys.
pub fn changes(set: &[(String, String)]) -> Result<Changes> {
    let (kept, free) = config::kept(set)?;
    Ok(Changes { free, kept })
}

impl Changes {
    /// For a run that exists: the settings that have no effect on it, because it keeps another value.
    pub fn without_effect(&self, config: &RunConfig) -> Vec<&str> {
        let other = |(key, value): &&(String, String)| !config::has_value(config, key, value);
        self.kept.iter().filter(other).map(|(key, _)| key.as_str()).collect()
    }
}

/// Where datasets are kept on this machine: on a local disk that lives and dies with it, if one is mounted and accepts
/// a folder. Nothing that a resume needs is ever there.
pub fn cache(root: &Path) -> Option<PathBuf> {
    let disk = hardware::instance_store(root)?;
    let folder = disk.join("trainer").join("datasets");
    match std::fs::create_dir_all(&folder) {
        Ok(()) => Some(folder),
        Err(error) => {
            tracing::warn!("the local disk at {} is not used: {error}", disk.display());
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: Name, origin: Origin) -> Layer {
        Layer { name: Some(Given { value: name, origin }), ..Layer::default() }
    }

    #[test]
    fn a_run_is_named_by_id_or_by_the_date_in_a_time_zone() {
        let now: Timestamp = "2026-12-31T23:30:00Z".parse().unwrap();
        let flag = || Origin::Flag("--run-id");
        assert_eq!(run_id(&named(Name::Id("first".into()), flag()), now).unwrap().as_str(), "first");
        let mut settings = named(Name::Template("r{year}q{quarter}".into()), flag());
        assert_eq!(run_id(&settings, now).unwrap().as_str(), "r2026q4");
        settings.time_zone = Some(Given { value: "no/such zone".into(), origin: flag() });
        let error = run_id(&settings, now).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        let error = run_id(&Layer::default(), now).unwrap_err();
        assert!(error.kind() == Kind::Config && error.hint().unwrap().contains("TRAINER_RUN_ID_TEMPLATE"));
    }

    #[test]
    fn an_instance_without_tags_uses_the_other_layers_if_they_suffice() {
        fn given<T>(value: T) -> Option<Given<T>> {
            Some(Given { value, origin: Origin::Flag("flag") })
        }
        let silence = || Some(Error::new(Kind::Unavailable, "silence"));
        let all = Layer {
            config: given(settings::Config::Place("run.toml".into())),
            store: given("s3://b/runs".to_owned()),
            name: given(Name::Id("first".into())),
            ..Layer::default()
        };
        assert_eq!(settled(all.clone(), silence()).unwrap(), all);
        let parts = [
            Layer { config: None, ..all.clone() },
            Layer { store: None, ..all.clone() },
            Layer { name: None, ..all },
            Layer::default(),
        ];
        for part in parts {
            assert_eq!(settled(part.clone(), None).unwrap(), part);
            assert_eq!(settled(part, silence()).unwrap_err().kind(), Kind::Unavailable);
        }
    }

    #[test]
    fn a_parameters_value_is_not_shown() {
        let now = Timestamp::UNIX_EPOCH;
        let parameter = || Origin::Parameter("/p/run-id".into());
        for name in [Name::Id("hunter2 /".into()), Name::Template("{hunter2}".into())] {
            let error = run_id(&named(name.clone(), parameter()), now).unwrap_err();
            assert!(error.to_string().contains("/p/run-id") && !error.to_string().contains("hunter2"), "{error}");
            let error = run_id(&named(name, Origin::Flag("--run-id")), now).unwrap_err();
            assert!(error.to_string().contains("hunter2"), "{error}");
        }
        let secret = Layer { store: Some(Given { value: "hunter2".into(), origin: parameter() }), ..Layer::default() };
        let error = store(&secret, Path::new("/work")).unwrap_err();
        assert!(error.to_string().contains("/p/run-id") && !error.to_string().contains("hunter2"), "{error}");
    }

    #[test]
    fn settings_that_a_run_keeps_for_life_are_no_mistake_on_the_next_boot() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let set = [pair("train.steps", "5"), pair("data.sequence_length", "64"), pair("train.seed", "7")];
        let changes = changes(&set).unwrap();
        assert_eq!(changes.free, [pair("train.steps", "5")]);
        let mut config = crate::checkpoint::testing::config();
        (config.workload.data.sequence_length, config.workload.train.seed) = (64, 8);
        assert_eq!(changes.without_effect(&config), ["train.seed"], "the other one is what the run has");
        // A mistyped key is a mistake, whether its section is one that a run keeps or not.
        for key in ["model.confg", "model.lora.rnk", "train.seeds", "task.nam"] {
            let error = super::changes(&[pair(key, "1")]).unwrap_err();
            assert!(error.kind() == Kind::Config && error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn the_age_of_this_process_is_known() {
        let age = process_age().unwrap();
        assert!(age < Duration::from_secs(3600), "{age:?}");
    }
}
