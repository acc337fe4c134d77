//! A run's settings: the resolved configuration.
//!
//! A configuration is read in two steps. `raw` holds the settings as typed (TOML file, environment, `--set key=value`),
//! with nothing looked up and no defaults beyond the embedded, commented `default.toml`. The program uses
//! [`RunConfig`]: every value is present and checked, and the model's `config.json` is read and included, so that the
//! journal's `created` record alone is enough to continue the run elsewhere. Stored layout: `RunConfig` as JSON in that
//! record; fields may be added with a serde default, never renamed.

mod batch;
mod caps;
mod change;
mod early_stopping;
mod error;
mod machine;
mod own;
mod raw;
mod resolve;
mod text;
mod workload;
#[cfg(test)]
mod change_tests;
#[cfg(test)]
mod lora_tests;
#[cfg(test)]
mod network_tests;
#[cfg(test)]
mod stored_tests;
#[cfg(test)]
mod tests;

use std::{net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::ids::SlotCount;

pub use batch::{Pass, Passes, Shares, Spread, divisor, share};
pub use caps::{CapsConfig, HOUR_S};
pub use change::{
    Difference, Effect, apply_overrides, canonical_overrides, diff, effect, has_value, is_mathematical, kept, names,
    reading_settings, settings,
};
pub use early_stopping::EarlyStopping;
pub use error::{ConfigError, Origin};
pub use machine::{Machine, workers_per_node};
pub use own::is_name;
pub use raw::DEFAULT_TOML;
pub use resolve::{Fetch, Guard, MAX_STEPS, PLACES, Sources, Text, load};
pub use text::{
    absolute_uri, format_cadence, format_duration, local_path, parse_cadence, parse_duration, parse_spacing,
    read_small, undialable, without_bom,
};
pub use workload::{
    ALL_LINEAR, Activations, BaseFile, DataConfig, Device, LoraConfig, ModelConfig, ModelKind, OptimizerConfig,
    OwnTask, ParallelConfig, Precision, ScheduleConfig, ScheduleKind, Strategy, TokenizerRule, TrainConfig, TrainTask,
};

/// A run's resolved configuration. Stored in the journal's `created` record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    /// The store's URI, made absolute: `s3://bucket/prefix`, `gs://…`, `az://…`, `file:///…`, `memory://`.
    pub store: String,
    /// What is computed. Its sections stand between `store` and `checkpoint`, as if they were the run's own.
    #[serde(flatten)]
    pub workload: TrainTask,
    /// When state is saved, and which checkpoints are kept.
    pub checkpoint: CheckpointConfig,
    /// The sources of notices.
    pub notice: NoticeConfig,
    /// The caps on the run's time and cost, which may end it before its last step. Runs without caps don't store it, as
    /// those before it was a setting.
    #[serde(default, skip_serializing_if = "CapsConfig::is_default")]
    pub run: CapsConfig,
    /// The action after the last step is committed.
    pub on_complete: OnComplete,
    /// The agent's response when a worker dies.
    pub restart: RestartConfig,
    /// Limits for the object store.
    pub storage: StorageConfig,
    /// Where a node of several listens. Runs that keep its defaults don't store it, as those before it was a setting.
    #[serde(default, skip_serializing_if = "NetworkConfig::is_default")]
    pub network: NetworkConfig,
}

/// When state is saved, and which checkpoints are kept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointConfig {
    /// When state is saved.
    pub every: Cadence,
    /// Which checkpoints are kept.
    pub keep: Keep,
    /// How often kept checkpoints are verified against their checksums while the run trains; `None`: never.
    #[serde(default = "daily", with = "optional_seconds")]
    pub scrub: Option<Duration>,
    /// Snapshot slots of a node. Stored only if it is one: runs from before it was a setting have two.
    #[serde(default, skip_serializing_if = "is_two")]
    pub slots: SlotCount,
    /// The store's price of a GiB per month, in US dollars; for estimates.
    #[serde(default = "s3_standard_price")]
    pub price_per_gib_month: f64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_two(slots: &SlotCount) -> bool {
    *slots == SlotCount::TWO
}

/// The default of `checkpoint.scrub`, which journals of runs created before it was a setting don't name.
#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's own type")]
const fn daily() -> Option<Duration> {
    Some(Duration::from_secs(24 * 60 * 60))
}

/// S3 Standard, us-east-1, the first 50 TB of a month (<https://aws.amazon.com/s3/pricing/>).
const fn s3_standard_price() -> f64 {
    0.023
}

/// When state is saved.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cadence {
    /// Every this many steps.
    Steps(u64),
    /// Every such interval of time.
    #[serde(with = "seconds")]
    Time(Duration),
    /// Young and Daly's interval from the measured cost of a save and the rate of interruptions.
    Auto,
}

/// The checkpoints that are kept when older ones are pruned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// The number of newest ones.
    pub last: u32,
    /// One at every such number of steps, or interval of time.
    pub every: Option<Spacing>,
    /// The number of those with the lowest validation loss.
    #[serde(default)]
    pub best: u32,
}

/// The spacing of checkpoints that are kept for good. Stored as a plain number of steps, or as `{"seconds":21600.0}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Spacing {
    /// Checkpoints whose step is a multiple of this.
    Steps(u64),
    /// The first checkpoint of each such interval, counted from 1970.
    Time {
        /// The interval.
        #[serde(with = "seconds")]
        seconds: Duration,
    },
}

/// The sources of warnings that the machine goes away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoticeConfig {
    /// `auto`, or any of `aws`, `gcp`, `azure`, `signals`, `file`.
    pub sources: Vec<String>,
    /// Whether training goes on while the announced time surely leaves room for the last save; otherwise it stops at
    /// once.
    #[serde(default = "yes")]
    pub train_in_spare_time: bool,
    /// A file whose appearance or change says that the machine goes away; `None`: no file is watched.
    #[serde(default)]
    pub file: Option<String>,
    /// Time from SIGTERM or SIGINT to SIGKILL; `None`: detected.
    #[serde(default, with = "optional_seconds")]
    pub stop_window: Option<Duration>,
    /// Time from SIGUSR1 to the end; `None`: detected.
    #[serde(default, with = "optional_seconds")]
    pub usr1_window: Option<Duration>,
    /// Time from GCP's preemption notice to the end; `None`: the shortest there is.
    #[serde(default, with = "optional_seconds")]
    pub preemption_window: Option<Duration>,
    /// The hook at the end of a machine of an Auto Scaling group: `auto`, `none`, or its name.
    #[serde(default = "auto")]
    pub lifecycle_hook: String,
}

impl Default for NoticeConfig {
    /// As `default.toml` has it.
    fn default() -> Self {
        Self {
            sources: vec![auto()],
            train_in_spare_time: true,
            file: None,
            stop_window: None,
            usr1_window: None,
            preemption_window: None,
            lifecycle_hook: auto(),
        }
    }
}

fn auto() -> String {
    "auto".into()
}

const fn yes() -> bool {
    true
}

/// The action after the last step is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnComplete {
    /// The action.
    pub action: CompleteAction,
}

/// The action after the last step is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CompleteAction {
    /// Exit with 0.
    Exit,
    /// Leave the Auto Scaling group with its desired capacity lowered, or power off.
    Terminate,
}

/// The agent's response when a worker dies, or stands still.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestartConfig {
    /// Restarts of the worker group by one agent process; then it gives up.
    pub max: u32,
    /// Deaths at the same step, one after the other, after which it gives up at once.
    pub same_step: u32,
    /// The first pause before a restart; it doubles up to a minute.
    #[serde(with = "seconds")]
    pub backoff: Duration,
    /// How long workers may stand still before they are ended and started again; `None`: a standstill is only reported.
    #[serde(default, with = "optional_seconds")]
    pub hang: Option<Duration>,
    /// Starts of the run in a row that made no checkpoint, after which it is not started again; `None`: no limit.
    #[serde(default)]
    pub fruitless_starts: Option<u32>,
}

/// Limits for the object store, and S3's treatment of written objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageConfig {
    /// The most bulk requests in flight at once, each way.
    pub concurrency: u32,
    /// Size of one part of an upload and of one range of a download, MiB.
    pub part_mib: u32,
    /// Attempts per request, including the first.
    #[serde(default = "attempts")]
    pub attempts: u32,
    /// The limit of all uploads together, MiB per second; `None`: no limit.
    #[serde(default)]
    pub max_upload_mib_per_s: Option<u32>,
    /// S3's encryption of written objects.
    #[serde(default)]
    pub encryption: Encryption,
    /// The key of [`Encryption::SseKms`]; `None`: the account's own.
    #[serde(default)]
    pub kms_key_id: Option<String>,
    /// S3's storage class of checkpoints and journal; `None`: the bucket's.
    #[serde(default)]
    pub storage_class: Option<String>,
}

impl StorageConfig {
    /// These limits, and default settings otherwise.
    pub const fn plain(concurrency: u32, part_mib: u32) -> Self {
        Self {
            concurrency,
            part_mib,
            attempts: attempts(),
            max_upload_mib_per_s: None,
            encryption: Encryption::Default,
            kms_key_id: None,
            storage_class: None,
        }
    }
}

/// The value for runs created before it was a setting; `default.toml` has the same.
const fn attempts() -> u32 {
    10
}

/// Where a node of a run with several nodes listens. Every node takes these settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The address that others dial; `None`: the source address of the route to the store.
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// The agent's port; 0: of the kernel's choice.
    #[serde(default)]
    pub port: u16,
    /// The port of the first rank's TCPStore; 0: of the kernel's choice.
    #[serde(default)]
    pub store_port: u16,
}

impl NetworkConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// S3's encryption of written objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encryption {
    /// As the bucket is configured.
    #[default]
    Default,
    /// With keys that S3 manages.
    #[serde(rename = "sse-s3")]
    SseS3,
    /// With a key of AWS KMS.
    SseKms,
}

/// Durations as seconds in stored JSON.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(value.as_secs_f64())
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// The same, or none.
mod optional_seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        value.map(|value| value.as_secs_f64()).serialize(serializer)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        let seconds = Option::<f64>::deserialize(deserializer)?;
        seconds.map(Duration::try_from_secs_f64).transpose().map_err(serde::de::Error::custom)
    }
}
