//! From the typed settings to those that the program uses: every value looked up, checked and made independent of where
//! it was typed.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde_json::Value as Json;
use toml::Value;

use super::{
    ALL_LINEAR, Activations, CheckpointConfig, CompleteAction, ConfigError, DataConfig, Device, Encryption, Keep,
    LoraConfig, Machine, ModelConfig, ModelKind, NetworkConfig, NoticeConfig, OnComplete, OptimizerConfig,
    ParallelConfig, Precision, RestartConfig, RunConfig, ScheduleConfig, ScheduleKind, StorageConfig, Strategy,
    TokenizerRule, TrainConfig, TrainTask, caps, early_stopping, error::Origin, own, raw::Raw, text, workers_per_node,
};
use crate::{
    error::{Error, Kind},
    ids::SlotCount,
};

/// The longest `config.json` that is read, bytes.
const MAX_MODEL_CONFIG: u64 = 1 << 20;
/// The most steps of a run: some two million million.
pub const MAX_STEPS: u64 = (1 << 41) - 1;

/// The highest rank of adapters: beyond it they are larger than what they are added to in models of any size in use.
const MAX_RANK: u32 = 4096;
/// `model.lora.alpha` unless given.
pub(super) const DEFAULT_ALPHA: f64 = 16.0;

/// The second is the first one's older name.
pub(super) const MODEL_KINDS: &[(&str, ModelKind)] = &[("decoder", ModelKind::Decoder), ("llama", ModelKind::Decoder)];
pub(super) const TOKENIZER_RULES: &[(&str, TokenizerRule)] =
    &[("same", TokenizerRule::Same), ("differs", TokenizerRule::Differs)];
pub(super) const PRECISIONS: &[(&str, Precision)] = &[("fp32", Precision::Fp32), ("bf16", Precision::Bf16)];
pub(super) const STRATEGIES: &[(&str, Strategy)] =
    &[("ddp", Strategy::Ddp), ("zero1", Strategy::Zero1), ("shard", Strategy::Shard)];
pub(super) const ACTIVATIONS: &[(&str, Activations)] =
    &[("keep", Activations::Keep), ("block", Activations::Block), ("auto", Activations::Auto)];
pub(super) const DEVICES: &[(&str, Device)] = &[("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda", Device::Cuda)];
pub(super) const SCHEDULES: &[(&str, ScheduleKind)] =
    &[("cosine", ScheduleKind::Cosine), ("linear", ScheduleKind::Linear), ("constant", ScheduleKind::Constant)];
pub(super) const SPARE_TIME: &[(&str, bool)] = &[("train", true), ("stop", false)];
pub(super) const ACTIONS: &[(&str, CompleteAction)] =
    &[("exit", CompleteAction::Exit), ("terminate", CompleteAction::Terminate)];
pub(super) const ENCRYPTIONS: &[(&str, Encryption)] =
    &[("default", Encryption::Default), ("sse-s3", Encryption::SseS3), ("sse-kms", Encryption::SseKms)];
const NOTICE_SOURCES: &[&str] = &["aws", "gcp", "azure", "signals", "file"];

/// Reads a small remote object, by the URI of its folder and its name.
pub type Fetch<'a> = dyn Fn(&str, &str) -> Result<Vec<u8>, Error> + 'a;

/// Checks that a text may name a place: gets the key, and the absolute URI of the place.
pub type Guard<'a> = dyn Fn(&'static str, &str) -> Result<(), Error> + 'a;

/// The keys whose values name a place.
pub const PLACES: [&str; 4] = ["store", "model.config", "model.init_from", "data.train"];

/// A configuration that is not a file of this machine.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    /// Its name in errors: its URI, or the parameter that holds it.
    pub name: &'a Path,
    /// The TOML.
    pub toml: &'a str,
    /// URI of the folder that holds it: a `model.config` that this machine does not have is looked for there.
    pub folder: Option<&'a str>,
    /// What it may name; `None`: anything. Called before anything is read.
    pub guard: Option<&'a Guard<'a>>,
}

impl std::fmt::Debug for Text<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Text").field("name", &self.name).field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// The sources of settings, lowest first, and the means to resolve them.
pub struct Sources<'a> {
    /// The run's TOML file.
    pub file: Option<&'a Path>,
    /// The same as text, if it came from elsewhere; added on top of the file.
    pub text: Option<Text<'a>>,
    /// `(the user's name for it, key, value)` of each flag or environment variable that stands for a key.
    pub flags: Vec<(&'static str, &'static str, String)>,
    /// `--set key=value`, in order.
    pub set: &'a [(String, String)],
    /// Relative paths are taken from here.
    pub working_directory: &'a Path,
    /// Resolves "auto".
    pub machine: Machine,
    /// Reads the `config.json` of a remote `model.init_from`.
    pub fetch: &'a Fetch<'a>,
}

/// Reads and resolves a run's configuration.
///
/// # Errors
/// The first error, by key and place.
pub fn load(sources: &Sources<'_>) -> Result<RunConfig, ConfigError> {
    let mut raw = Raw::defaults()?;
    if let Some(path) = sources.file {
        raw.add_file(path)?;
    }
    if let Some(text) = &sources.text {
        raw.add_text(text.toml, text.name)?;
    }
    for (name, key, value) in &sources.flags {
        // A flag's text is a number if it reads as one ("--nproc-per-node 2"), else text.
        let value = value.parse().map_or_else(|_| Value::String(value.clone()), Value::Integer);
        raw.add_value(key, value, &Origin::Flag(name))?;
    }
    for (key, value) in sources.set {
        raw.add_set(key, value)?;
    }
    guard(&raw, sources)?;
    let parallel = parallel(&raw)?;
    let workers = workers_per_node(&parallel, None, &sources.machine);
    let (model, data) = match own::task(&raw)? {
        Some(task) => (ModelConfig::of_task(&task), own::data(&raw)?),
        None => (model(&raw, sources)?, data(&raw, sources.working_directory)?),
    };
    let config = RunConfig {
        store: uri(&raw, "store", sources.working_directory)?,
        workload: TrainTask {
            model,
            data,
            train: train(&raw, Some((sources.machine.cores / workers).max(1)))?,
            parallel,
        },
        checkpoint: checkpoint(&raw)?,
        notice: notice(&raw, sources.working_directory)?,
        run: caps::read(&raw)?,
        on_complete: OnComplete { action: raw.choice("on_complete.action", ACTIONS)? },
        restart: restart(&raw)?,
        storage: storage(&raw)?,
        network: network(&raw)?,
    };
    check(&config)?;
    Ok(config)
}

/// Checks that the configuration may name the places that it names.
fn guard(raw: &Raw, sources: &Sources<'_>) -> Result<(), ConfigError> {
    let Some(Text { guard: Some(guard), folder, .. }) = sources.text else { return Ok(()) };
    for key in PLACES {
        let text = raw.text(key)?;
        if text.is_empty() {
            continue;
        }
        let uri = match folder {
            // One beside the configuration.
            Some(folder) if key == "model.config" && is_beside(text) => format!("{folder}/{text}"),
            _ => uri(raw, key, sources.working_directory)?,
        };
        guard(key, &uri).map_err(|error| withheld(raw, key, text, &error))?;
    }
    // Which settings of a task are places is the task's knowledge: every text that can be one counts.
    let mut refused = Ok(());
    own::texts(raw.table(own::SETTINGS)?, &mut |text| {
        if refused.is_ok() && text.contains('/') {
            let uri = text::absolute_uri(text, sources.working_directory).unwrap_or_else(|_| text.to_owned());
            refused = guard(own::SETTINGS, &uri).map_err(|error| withheld(raw, own::SETTINGS, text, &error));
        }
    });
    refused
}

fn withheld(raw: &Raw, key: &'static str, path: &str, error: &Error) -> ConfigError {
    ConfigError::Withheld {
        key,
        origin: raw.origin(key),
        path: path.to_owned(),
        reason: error.to_string(),
        kind: error.kind(),
        hint: error.hint().map(str::to_owned),
    }
}

/// Whether a name is one in the folder of the configuration.
fn is_beside(name: &str) -> bool {
    !name.contains("://") && Path::new(name).is_relative()
}

/// All settings but the store and the model, which a run keeps; `threads` is the meaning of "auto".
pub(super) fn reread(raw: &Raw, base: &RunConfig, working_directory: &Path) -> Result<RunConfig, ConfigError> {
    let data = match base.workload.model.kind {
        ModelKind::Decoder => data(raw, working_directory)?,
        ModelKind::Task => own::data(raw)?,
    };
    let config = RunConfig {
        store: base.store.clone(),
        workload: TrainTask {
            model: own::reread(raw, &base.workload.model)?,
            data,
            train: train(raw, None)?,
            parallel: parallel(raw)?,
        },
        checkpoint: checkpoint(raw)?,
        notice: notice(raw, working_directory)?,
        run: caps::read(raw)?,
        on_complete: OnComplete { action: raw.choice("on_complete.action", ACTIONS)? },
        restart: restart(raw)?,
        storage: storage(raw)?,
        network: network(raw)?,
    };
    check(&config)?;
    Ok(config)
}

/// Checks the schedule against the length of the run, if that is known.
fn check_steps(train: &TrainConfig) -> Result<(), ConfigError> {
    let TrainConfig { steps, epochs, .. } = *train;
    let warmup = train.schedule.warmup_steps;
    if steps == 0 || warmup <= steps {
        return Ok(());
    }
    let made = if epochs > 0 { format!(" (from train.epochs = {epochs})") } else { String::new() };
    Err(ConfigError::Together(format!(
        "train.schedule.warmup_steps = {warmup} is longer than the run: train.steps = {steps}{made}"
    )))
}

impl TrainConfig {
    /// Works out the steps from the epochs over `sequences`, if that has not been done: as many steps as it takes to
    /// see each sequence that often.
    ///
    /// # Errors
    /// [`ConfigError::Together`] for more steps than a run may have, or fewer than the warm-up.
    pub fn settle_steps(&mut self, sequences: u64) -> Result<(), ConfigError> {
        if self.steps > 0 {
            return Ok(());
        }
        let all = u128::from(sequences) * u128::from(self.epochs);
        let steps = all.div_ceil(u128::from(self.global_batch.max(1)));
        self.steps = u64::try_from(steps).ok().filter(|steps| (1..=MAX_STEPS).contains(steps)).ok_or_else(|| {
            let epochs = self.epochs;
            ConfigError::Together(format!("train.epochs = {epochs} of {sequences} sequences are {steps} steps"))
        })?;
        check_steps(self)
    }
}

/// Checks of settings that must fit one another.
fn check(config: &RunConfig) -> Result<(), ConfigError> {
    check_steps(&config.workload.train)?;
    early_stopping::check(config)?;
    let parallel = &config.workload.parallel;
    if parallel.mixed && parallel.strategy != Strategy::Zero1 {
        return Err(ConfigError::Together(
            "parallel.mixed = true needs parallel.strategy = \"zero1\": with \"ddp\", devices that round differently \
             would part from one another, step by step"
                .into(),
        ));
    }
    check_stages(&config.workload)?;
    let NetworkConfig { port, store_port, .. } = config.network;
    if port != 0 && port == store_port {
        return Err(ConfigError::Together(format!(
            "network.port and network.store_port are both {port}: give one of them another port, or 0"
        )));
    }
    Ok(())
}

/// What is computed block by block needs a model that has blocks.
fn check_stages(task: &TrainTask) -> Result<(), ConfigError> {
    let refused = |what: String| Err(ConfigError::Together(what));
    let shard = task.parallel.strategy == Strategy::Shard;
    if let Some(own) = task.model.task() {
        let name = own.name;
        if shard {
            return refused(format!(
                "parallel.strategy = \"shard\" works block by block, and task.name = {name:?} has no blocks: set \
                 parallel.strategy = \"zero1\""
            ));
        }
        if task.train.activations == Activations::Block {
            return refused(format!(
                "train.activations = \"block\" works block by block, and task.name = {name:?} has no blocks: set \
                 train.activations = \"keep\""
            ));
        }
    }
    if shard && task.model.lora.is_some() {
        return refused(
            "parallel.strategy = \"shard\" divides the weights that are trained, and with model.lora.rank these are \
             the small adapters alone: set parallel.strategy = \"zero1\""
                .into(),
        );
    }
    Ok(())
}

fn uri(raw: &Raw, key: &str, working_directory: &Path) -> Result<String, ConfigError> {
    text::absolute_uri(raw.text(key)?, working_directory).map_err(|expected| raw.wrong(key, expected))
}

fn model(raw: &Raw, sources: &Sources<'_>) -> Result<ModelConfig, ConfigError> {
    let kind = raw.choice("model.kind", MODEL_KINDS)?;
    let init_from = match raw.text("model.init_from")? {
        "" => None,
        _ => Some(uri(raw, "model.init_from", sources.working_directory)?),
    };
    let path = raw.text("model.config")?;
    let (key, name, bytes) = match (&init_from, path) {
        (None, "") => {
            return Err(ConfigError::Missing {
                key: "model.config",
                remedy: "name a Hugging Face config.json, such as configs/models/tiny.json, or a model folder with \
                         model.init_from"
                    .into(),
            });
        }
        (Some(folder), "") => {
            let bytes = match text::local_path(folder) {
                Some(local) => text::read_small(&local.join("config.json"), MAX_MODEL_CONFIG)
                    .map_err(|error| Error::new(Kind::Config, format!("its config.json can't be read: {error}"))),
                None => (sources.fetch)(folder, "config.json"),
            };
            ("model.init_from", folder.as_str(), bytes)
        }
        (_, path) => ("model.config", path, read_model_config(path, sources)),
    };
    let named = |reason| ConfigError::Named { key, origin: raw.origin(key), path: name.to_owned(), reason };
    let bytes = bytes.map_err(|error| match error.kind() {
        Kind::Unavailable | Kind::Permission => withheld(raw, key, name, &error),
        // One that does not exist is a mistake of the configuration, like any other.
        _ => named(error.to_string()),
    })?;
    let config: Json =
        serde_json::from_slice(text::without_bom(&bytes)).map_err(|error| named(format!("not valid JSON: {error}")))?;
    if !config.is_object() {
        return Err(named("not a JSON object, as a Hugging Face config.json is".into()));
    }
    let lora = lora(raw, init_from.is_some())?;
    Ok(ModelConfig { kind, config, init_from, lora })
}

/// The adapters, if there are any. Whether the model has the layers is checked with the model.
fn lora(raw: &Raw, has_weights: bool) -> Result<Option<LoraConfig>, ConfigError> {
    let rank = raw.whole("model.lora.rank", 0..=MAX_RANK)?;
    let alpha = raw.number("model.lora.alpha", |alpha| alpha > 0.0, "a number above 0")?;
    let targets = raw.names("model.lora.targets", ALL_LINEAR)?;
    raw.number("model.lora.dropout", |dropout| dropout == 0.0, "0: dropout is not supported")?;
    if rank == 0 {
        let typed = ["model.lora.alpha", "model.lora.targets"];
        return match typed.into_iter().find(|key| !matches!(raw.origin(key), Origin::Default)) {
            Some(key) => Err(ConfigError::Together(format!(
                "{key} is set, but model.lora.rank is 0, so there are no adapters: set model.lora.rank, such as 16"
            ))),
            None => Ok(None),
        };
    }
    if !has_weights {
        return Err(ConfigError::Together(format!(
            "model.lora.rank = {rank} needs model.init_from: adapters are trained beside a model's weights"
        )));
    }
    Ok(Some(LoraConfig { rank, alpha, targets, base: Vec::new() }))
}

/// The object of that URI; or the file from the working directory, else from the configuration's folder.
fn read_model_config(path: &str, sources: &Sources<'_>) -> Result<Vec<u8>, Error> {
    if path.contains("://") {
        let (folder, name) = path.rsplit_once('/').unwrap_or_default();
        return (sources.fetch)(folder, name);
    }
    let mut tried: Vec<PathBuf> = vec![sources.working_directory.join(path)];
    // A name in a guarded text is one beside it.
    if is_beside(path) && sources.text.is_some_and(|text| text.guard.is_some() && text.folder.is_some()) {
        tried.clear();
    }
    if let Some(folder) = sources.file.and_then(Path::parent) {
        tried.push(sources.working_directory.join(folder).join(path));
    }
    tried.dedup();
    for candidate in &tried {
        match text::read_small(candidate, MAX_MODEL_CONFIG) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => return other.map_err(|error| Error::new(Kind::Config, format!("can't be read: {error}"))),
        }
    }
    if let Some(folder) = sources.text.and_then(|text| text.folder) {
        return (sources.fetch)(folder, path).map_err(|error| {
            let hint = error.hint().map(str::to_owned);
            let error = Error::new(error.kind(), format!("not on this machine, and {error}"));
            hint.into_iter().fold(error, Error::with_hint)
        });
    }
    Err(Error::new(Kind::Config, "no such file"))
}

fn data(raw: &Raw, working_directory: &Path) -> Result<DataConfig, ConfigError> {
    if raw.text("data.train")?.is_empty() {
        return Err(ConfigError::Missing {
            key: "data.train",
            remedy: "make token shards with `trainer data prepare` and give their folder".into(),
        });
    }
    Ok(DataConfig {
        train: uri(raw, "data.train", working_directory)?,
        tokenizer: raw.choice("data.tokenizer", TOKENIZER_RULES)?,
        sequence_length: raw.whole("data.sequence_length", 1..=1 << 20)?,
        validation_every: raw.whole("data.validation_every", 0..=u64::MAX)?,
        validation_sequences: raw.whole("data.validation_sequences", 1..=u32::MAX)?,
    })
}

fn train(raw: &Raw, auto_threads: Option<u32>) -> Result<TrainConfig, ConfigError> {
    let threads = match raw.word_or_whole("train.threads", "auto", 1..=4096)? {
        Some(threads) => threads,
        None => auto_threads.ok_or_else(|| {
            raw.wrong("train.threads", r#"a whole number ("auto" is settled once, when the run is created)"#)
        })?,
    };
    raw.choice("train.optimizer.kind", &[("adamw", ())])?;
    let (steps, epochs) = (raw.whole("train.steps", 1..=MAX_STEPS)?, raw.whole("train.epochs", 0..=u32::MAX)?);
    let steps = match (epochs, raw.origin("train.steps")) {
        (0, _) | (_, Origin::Run) => steps,
        // Of an existing run: it has left the number of its epochs behind.
        (_, Origin::Set) if raw.origin("train.epochs") == Origin::Run => steps,
        (_, Origin::Default) => 0,
        _ => {
            let both = format!("train.steps = {steps} and train.epochs = {epochs} are both set: keep one of them");
            return Err(ConfigError::Together(both));
        }
    };
    let share = |n: f64| (0.0..1.0).contains(&n);
    Ok(TrainConfig {
        steps,
        epochs,
        global_batch: raw.whole("train.global_batch", 1..=u32::MAX)?,
        max_micro_batch: raw.whole("train.max_micro_batch", 1..=u32::MAX)?,
        seed: raw.whole("train.seed", 0..=u64::MAX)?,
        precision: raw.choice("train.precision", PRECISIONS)?,
        activations: raw.choice("train.activations", ACTIVATIONS)?,
        threads,
        fused: raw.flag("train.fused")?,
        deterministic: raw.flag("train.deterministic")?,
        optimizer: OptimizerConfig {
            lr: raw.number("train.optimizer.lr", |n| n > 0.0, "a number above 0")?,
            betas: raw.numbers("train.optimizer.betas", share, "two numbers, each at least 0 and below 1")?,
            eps: raw.number("train.optimizer.eps", |n| n > 0.0, "a number above 0")?,
            weight_decay: raw.number("train.optimizer.weight_decay", |n| n >= 0.0, "a number, at least 0")?,
            grad_clip: raw.number(
                "train.optimizer.grad_clip",
                |n| n >= 0.0,
                "a number, at least 0 (0: no clipping)",
            )?,
        },
        schedule: ScheduleConfig {
            kind: raw.choice("train.schedule.kind", SCHEDULES)?,
            warmup_steps: raw.whole("train.schedule.warmup_steps", 0..=u64::MAX)?,
            min_lr_ratio: raw.number(
                "train.schedule.min_lr_ratio",
                |n| (0.0..=1.0).contains(&n),
                "a number from 0 to 1",
            )?,
        },
        early_stopping: early_stopping::read(raw)?,
    })
}

fn parallel(raw: &Raw) -> Result<ParallelConfig, ConfigError> {
    Ok(ParallelConfig {
        strategy: raw.choice("parallel.strategy", STRATEGIES)?,
        nproc_per_node: raw.word_or_whole("parallel.nproc_per_node", "auto", 1..=1024)?,
        device: raw.choice("parallel.device", DEVICES)?,
        bucket_mib: raw.whole("parallel.bucket_mib", 1..=65_536)?,
        mixed: raw.flag("parallel.mixed")?,
        share_device: raw.flag("parallel.share_device")?,
        peak_tflops: raw.word_or_whole("parallel.peak_tflops", "auto", 1..=1_000_000)?,
    })
}

fn network(raw: &Raw) -> Result<NetworkConfig, ConfigError> {
    let port = |key| {
        let port = raw.whole(key, 0..=u32::from(u16::MAX))?;
        u16::try_from(port).map_err(|_| raw.wrong(key, "a port"))
    };
    let address = match raw.text("network.address")?.trim() {
        "auto" => None,
        given => {
            let address = given.parse().ok().filter(|address: &IpAddr| text::undialable(*address).is_none());
            let expected = "\"auto\", or an IP address of the machine that others can dial, such as \"10.0.0.7\"";
            Some(address.ok_or_else(|| raw.wrong("network.address", expected))?)
        }
    };
    Ok(NetworkConfig { address, port: port("network.port")?, store_port: port("network.store_port")? })
}

fn checkpoint(raw: &Raw) -> Result<CheckpointConfig, ConfigError> {
    let best = raw.whole("checkpoint.keep.best", 0..=u32::MAX)?;
    // The state that a run stops early for is the one that is wanted.
    let unsaid = matches!(raw.origin("checkpoint.keep.best"), Origin::Default | Origin::Run);
    let best = if unsaid && early_stopping::read(raw)?.is_some() { best.max(1) } else { best };
    Ok(CheckpointConfig {
        every: raw.cadence("checkpoint.every")?,
        keep: Keep {
            last: raw.whole("checkpoint.keep.last", 1..=u32::MAX)?,
            every: raw.never_or_spacing("checkpoint.keep.every")?,
            best,
        },
        scrub: raw.never_or_duration("checkpoint.scrub")?,
        slots: if raw.whole("checkpoint.slots", 1..=2_u32)? == 1 { SlotCount::ONE } else { SlotCount::TWO },
        price_per_gib_month: raw.number(
            "checkpoint.price_per_gib_month",
            |price| price >= 0.0,
            "a number, at least 0",
        )?,
    })
}

fn notice(raw: &Raw, working_directory: &Path) -> Result<NoticeConfig, ConfigError> {
    let file = match raw.text("notice.file")? {
        "" => None,
        path => {
            let file = working_directory.join(path).into_os_string().into_string();
            let expected = "the path of a file on this machine, such as \"/run/trainer/stop\"";
            let file = file.map_err(|_| raw.wrong("notice.file", expected))?;
            if path.contains("://") || path.chars().any(char::is_control) {
                return Err(raw.wrong("notice.file", expected));
            }
            Some(file)
        }
    };
    let hook = raw.text("notice.lifecycle_hook")?;
    // The characters that Auto Scaling allows in a hook's name.
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'/');
    if hook.is_empty() || hook.len() > 255 || !hook.bytes().all(allowed) {
        return Err(raw.wrong("notice.lifecycle_hook", "\"auto\", \"none\", or the name of a lifecycle hook"));
    }
    Ok(NoticeConfig {
        sources: raw.words("notice.sources", "auto", NOTICE_SOURCES)?,
        train_in_spare_time: raw.choice("notice.spare_time", SPARE_TIME)?,
        file,
        stop_window: raw.auto_or_duration("notice.stop_window")?,
        usr1_window: raw.auto_or_duration("notice.usr1_window")?,
        preemption_window: raw.auto_or_duration("notice.preemption_window")?,
        lifecycle_hook: hook.to_owned(),
    })
}

fn restart(raw: &Raw) -> Result<RestartConfig, ConfigError> {
    Ok(RestartConfig {
        max: raw.whole("restart.max", 0..=u32::MAX)?,
        same_step: raw.whole("restart.same_step", 1..=u32::MAX)?,
        backoff: raw.duration("restart.backoff")?,
        hang: raw.never_or_duration("restart.hang")?,
        fruitless_starts: raw.word_or_whole("restart.fruitless_starts", "none", 1..=u32::MAX)?,
    })
}

pub(super) fn storage(raw: &Raw) -> Result<StorageConfig, ConfigError> {
    let text = |key| raw.text(key).map(|text| Some(text.trim().to_owned()).filter(|text| !text.is_empty()));
    let encryption = raw.choice("storage.encryption", ENCRYPTIONS)?;
    let printable = |text: &String| text.len() <= 2048 && text.bytes().all(|b| b.is_ascii_graphic());
    let kms_key_id = text("storage.kms_key_id")?;
    if !kms_key_id.as_ref().is_none_or(printable) {
        return Err(raw.wrong("storage.kms_key_id", "a key's id, alias or ARN"));
    }
    if kms_key_id.is_some() && encryption != Encryption::SseKms {
        return Err(ConfigError::Together(
            "storage.kms_key_id is set, but storage.encryption is not \"sse-kms\"".into(),
        ));
    }
    let storage_class = text("storage.storage_class")?;
    if let Some(class) = &storage_class {
        if ["GLACIER", "DEEP_ARCHIVE"].contains(&class.as_str()) {
            return Err(raw.wrong(
                "storage.storage_class",
                "a class that can be read at once: a run that resumes can't wait for a thaw",
            ));
        }
        if class.len() > 64 || !class.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_') {
            return Err(raw.wrong("storage.storage_class", "a class of S3, such as \"STANDARD_IA\""));
        }
    }
    Ok(StorageConfig {
        concurrency: raw.whole("storage.concurrency", 1..=1024)?,
        // S3 accepts no part below 5 MiB (except the last) and none over 5 GiB.
        part_mib: raw.whole("storage.part_mib", 5..=5120)?,
        attempts: raw.whole("storage.attempts", 1..=1000)?,
        max_upload_mib_per_s: raw.word_or_whole("storage.max_upload_mib_per_s", "none", 1..=1_000_000)?,
        encryption,
        kms_key_id,
        storage_class,
    })
}
