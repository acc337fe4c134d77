//! Settings of an existing run: which may change on a resume, which have changed, and the change itself.

use toml::Value;

use super::{
    ALL_LINEAR, CapsConfig, CheckpointConfig, ConfigError, DataConfig, EarlyStopping, Keep, ModelConfig, ModelKind,
    NetworkConfig, NoticeConfig, OnComplete, OptimizerConfig, ParallelConfig, RestartConfig, RunConfig, ScheduleConfig,
    StorageConfig, TrainConfig, TrainTask,
    error::Origin,
    own,
    raw::Raw,
    resolve::{
        self, ACTIONS, ACTIVATIONS, DEFAULT_ALPHA, DEVICES, ENCRYPTIONS, MODEL_KINDS, PRECISIONS, SCHEDULES,
        SPARE_TIME, STRATEGIES, TOKENIZER_RULES,
    },
    text,
};

/// Overrides: keys and values.
type Pairs = Vec<(String, String)>;

/// The effect of changing a setting of an existing run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Losses stay the same.
    Free,
    /// Losses change; allowed if it is named with `--set`.
    Mathematical,
    /// The run can't go on with another value, for this reason.
    Fixed(&'static str),
}

/// The effect of changing `key` of an existing run.
pub fn effect(key: &str) -> Effect {
    match key {
        "store" => Effect::Fixed("the run lives there (a copy of it is named with --store)"),
        "data.sequence_length" => {
            Effect::Fixed("it cuts the samples: those already seen would come again, others never")
        }
        "train.seed" => Effect::Fixed("it orders the samples: those already seen would come again, others never"),
        "train.epochs" => Effect::Fixed("it became train.steps when the run was created: give that another value"),
        "train.optimizer.kind" => Effect::Fixed("the checkpoints hold this optimizer's moments"),
        // The samples' cursor and the tensors are independent of the number of workers and of what each of them keeps:
        // only the order in which gradients are summed depends on it. The device is a machine's own choice, as its kind
        // of GPU is.
        "parallel.strategy"
        | "parallel.nproc_per_node"
        | "parallel.device"
        | "parallel.mixed"
        | "train.activations"
        | "parallel.share_device"
        | "parallel.peak_tflops"
        | "data.validation_every"
        | "train.early_stopping.patience"
        | "train.early_stopping.min_delta" => Effect::Free,
        // It was checked when the run was created.
        "data.tokenizer" => Effect::Free,
        "task.name" => Effect::Fixed("the checkpoints' tensors belong to this task"),
        _ if key.starts_with("model.") => Effect::Fixed("the checkpoints' tensors belong to this model"),
        _ if ["task.", "data.", "train.", "parallel."].iter().any(|section| key.starts_with(section)) => {
            Effect::Mathematical
        }
        _ => Effect::Free,
    }
}

/// Whether losses depend on `key`.
pub fn is_mathematical(key: &str) -> bool {
    key != "store" && effect(key) != Effect::Free
}

/// One setting in which two configurations differ; values as TOML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The key's full path.
    pub key: &'static str,
    /// Its value in the first.
    pub from: String,
    /// Its value in the second.
    pub to: String,
}

/// Where two configurations differ, by key, in the order of `default.toml`. The model's description counts as one
/// value.
pub fn diff(from: &RunConfig, to: &RunConfig) -> Vec<Difference> {
    settings(from)
        .into_iter()
        .zip(settings(to))
        .filter(|((_, a), (_, b))| a != b)
        .map(|((key, a), (_, b))| Difference { key, from: a.to_string(), to: b.to_string() })
        .collect()
}

/// The run's configuration with these settings changed. Relative paths are taken from the working directory of this
/// process: to apply the settings again elsewhere, store the result of [`canonical_overrides`].
///
/// # Errors
/// On unknown keys, wrong values, and keys that a run keeps for life.
pub fn apply_overrides(base: &RunConfig, overrides: &[(String, String)]) -> Result<RunConfig, ConfigError> {
    let mut raw = Raw::defaults()?;
    for (key, value) in settings(base) {
        raw.add_value(key, value, &Origin::Run)?;
    }
    for (key, value) in overrides {
        raw.add_set(key, value)?;
    }
    let cwd = std::env::current_dir().map_err(|source| ConfigError::Unreadable { path: ".".into(), source })?;
    // The store and the model are not read back: an attempt to change them gets the reason.
    for (key, _) in settings(base) {
        if raw.origin(key) == Origin::Set
            && let Effect::Fixed(reason) = effect(key)
        {
            return Err(ConfigError::Fixed { key: key.into(), reason });
        }
    }
    resolve::reread(&raw, base, &cwd)
}

/// The overrides in the form in which a journal keeps them: full keys, TOML values, absolute paths. Applying them to
/// `base`, anywhere, gives what [`apply_overrides`] gives here.
///
/// # Errors
/// As [`apply_overrides`].
pub fn canonical_overrides(
    base: &RunConfig,
    overrides: &[(String, String)],
) -> Result<Vec<(String, String)>, ConfigError> {
    let changed = apply_overrides(base, overrides)?;
    Ok(diff(base, &changed).into_iter().map(|change| (change.key.to_owned(), change.to)).collect())
}

/// Whether one of these overrides names `key`, even with its current value.
///
/// # Errors
/// On unknown keys.
pub fn names(overrides: &[(String, String)], key: &str) -> Result<bool, ConfigError> {
    let mut raw = Raw::defaults()?;
    for (key, value) in overrides {
        raw.add_set(key, value)?;
    }
    Ok(raw.origin(key) == Origin::Set)
}

/// Of these overrides, those that a run keeps for life (`.0`) and all others (`.1`).
///
/// # Errors
/// On unknown keys.
pub fn kept(overrides: &[(String, String)]) -> Result<(Pairs, Pairs), ConfigError> {
    let mut raw = Raw::defaults()?;
    for (key, value) in overrides {
        raw.add_set(key, value)?;
    }
    Ok(overrides.iter().cloned().partition(|(key, _)| matches!(effect(key), Effect::Fixed(_))))
}

/// Whether `config`, of an existing run, has the very value that this override of a fixed key gives. `false` also where
/// that can't be told from the text: of a model's description, which the run has as its content.
pub fn has_value(config: &RunConfig, key: &str, value: &str) -> bool {
    let mut raw = match Raw::defaults() {
        Ok(raw) => raw,
        Err(_) => return false,
    };
    let is_set = raw.add_set(key, value).is_ok();
    let current = settings(config).into_iter().find(|(name, _)| *name == key);
    is_set && current.is_some_and(|(_, current)| current.to_string() == raw.given(key))
}

/// The settings for reading a run's store before the run's own settings, which are in that very store, are known: those
/// of these overrides. S3's settings for written objects are left out: the run decides on them, and nothing is written
/// by then.
///
/// # Errors
/// On unknown keys of `storage`, and wrong values.
pub fn reading_settings(overrides: &[(String, String)]) -> Result<StorageConfig, ConfigError> {
    const WRITING: [&str; 3] = ["storage.encryption", "storage.kms_key_id", "storage.storage_class"];
    let mut raw = Raw::defaults()?;
    for (key, value) in overrides {
        if key.starts_with("storage.") && !WRITING.contains(&key.as_str()) {
            raw.add_set(key, value)?;
        }
    }
    resolve::storage(&raw)
}

/// Every setting by its full key, as TOML, in the order of `default.toml`. `model.config` is the JSON itself, as text.
pub fn settings(config: &RunConfig) -> Vec<(&'static str, Value)> {
    // Destructured without `..`: a new field that is not listed here does not compile.
    let RunConfig { store, workload, checkpoint, notice, run, on_complete, restart, storage, network } = config;
    let TrainTask { model, data, train, parallel } = workload;
    let ModelConfig { kind, config: model_config, init_from, lora } = model;
    let DataConfig { train: data_train, tokenizer, sequence_length, validation_every, validation_sequences } = data;
    let TrainConfig {
        steps,
        epochs,
        global_batch,
        max_micro_batch,
        seed,
        precision,
        activations,
        threads,
        fused,
        deterministic,
        optimizer,
        schedule,
        early_stopping,
    } = train;
    let EarlyStopping { patience, min_delta } = early_stopping.unwrap_or(EarlyStopping { patience: 0, min_delta: 0.0 });
    let OptimizerConfig { lr, betas, eps, weight_decay, grad_clip } = optimizer;
    let ScheduleConfig { kind: schedule_kind, warmup_steps, min_lr_ratio } = schedule;
    let ParallelConfig { strategy, nproc_per_node, device, bucket_mib, mixed, share_device, peak_tflops } = parallel;
    let CheckpointConfig { every, keep: Keep { last, every: keep_every, best }, scrub, slots, price_per_gib_month } =
        checkpoint;
    let NoticeConfig {
        sources,
        train_in_spare_time,
        file,
        stop_window,
        usr1_window,
        preemption_window,
        lifecycle_hook,
    } = notice;
    let auto = |window: &Option<_>| word(&window.map_or_else(|| "auto".into(), text::format_duration));
    let CapsConfig { max_hours, max_wait_hours, max_cost, price_per_hour } = run;
    let cap = |cap: &Option<f64>| cap.map_or_else(|| word("none"), Value::Float);
    let OnComplete { action } = on_complete;
    let RestartConfig { max, same_step, backoff, hang, fruitless_starts } = restart;
    let StorageConfig { concurrency, part_mib, attempts, max_upload_mib_per_s, encryption, kms_key_id, storage_class } =
        storage;
    let NetworkConfig { address, port, store_port } = network;
    // A task takes the place of a model, whose settings then have their defaults.
    let task = model.task();
    let (kind, model_config) = match &task {
        Some(_) => (ModelKind::Decoder, String::new()),
        None => (*kind, model_config.to_string()),
    };
    let (task, task_settings) = task.map_or_else(Default::default, |it| (it.name, own::to_toml(&it.settings)));
    vec![
        ("store", word(store)),
        ("task.name", word(&task)),
        (own::SETTINGS, Value::Table(task_settings)),
        ("model.kind", word(name_of(MODEL_KINDS, kind))),
        ("model.config", word(&model_config)),
        ("model.init_from", word(init_from.as_deref().unwrap_or_default())),
        ("model.lora.rank", whole(lora.as_ref().map_or(0, |lora| lora.rank))),
        ("model.lora.alpha", Value::Float(lora.as_ref().map_or(DEFAULT_ALPHA, |lora| lora.alpha))),
        ("model.lora.targets", lora.as_ref().map_or_else(|| word(ALL_LINEAR), |lora| targets(&lora.targets))),
        ("model.lora.dropout", Value::Float(0.0)),
        ("data.train", word(data_train)),
        ("data.tokenizer", word(name_of(TOKENIZER_RULES, *tokenizer))),
        ("data.sequence_length", whole(*sequence_length)),
        ("data.validation_every", whole(*validation_every)),
        ("data.validation_sequences", whole(*validation_sequences)),
        ("train.steps", whole(*steps)),
        ("train.epochs", whole(*epochs)),
        ("train.global_batch", whole(*global_batch)),
        ("train.max_micro_batch", whole(*max_micro_batch)),
        ("train.seed", whole(*seed)),
        ("train.precision", word(name_of(PRECISIONS, *precision))),
        ("train.activations", word(name_of(ACTIVATIONS, *activations))),
        ("train.threads", whole(*threads)),
        ("train.fused", Value::Boolean(*fused)),
        ("train.deterministic", Value::Boolean(*deterministic)),
        ("train.optimizer.kind", word("adamw")),
        ("train.optimizer.lr", Value::Float(*lr)),
        ("train.optimizer.betas", Value::Array(betas.iter().copied().map(Value::Float).collect())),
        ("train.optimizer.eps", Value::Float(*eps)),
        ("train.optimizer.weight_decay", Value::Float(*weight_decay)),
        ("train.optimizer.grad_clip", Value::Float(*grad_clip)),
        ("train.schedule.kind", word(name_of(SCHEDULES, *schedule_kind))),
        ("train.schedule.warmup_steps", whole(*warmup_steps)),
        ("train.schedule.min_lr_ratio", Value::Float(*min_lr_ratio)),
        ("train.early_stopping.patience", whole(patience)),
        ("train.early_stopping.min_delta", Value::Float(min_delta)),
        ("parallel.strategy", word(name_of(STRATEGIES, *strategy))),
        ("parallel.nproc_per_node", nproc_per_node.map_or_else(|| word("auto"), whole)),
        ("parallel.device", word(name_of(DEVICES, *device))),
        ("parallel.bucket_mib", whole(*bucket_mib)),
        ("parallel.mixed", Value::Boolean(*mixed)),
        ("parallel.share_device", Value::Boolean(*share_device)),
        ("parallel.peak_tflops", peak_tflops.map_or_else(|| word("auto"), whole)),
        ("checkpoint.every", word(&text::format_cadence(*every))),
        ("checkpoint.scrub", word(&scrub.map_or_else(|| "never".into(), text::format_duration))),
        ("checkpoint.slots", whole(slots.get())),
        ("checkpoint.price_per_gib_month", Value::Float(*price_per_gib_month)),
        ("checkpoint.keep.last", whole(*last)),
        ("checkpoint.keep.every", word(&keep_every.map_or_else(|| "never".into(), text::format_spacing))),
        ("checkpoint.keep.best", whole(*best)),
        ("notice.sources", Value::Array(sources.iter().map(|source| word(source)).collect())),
        ("notice.spare_time", word(name_of(SPARE_TIME, *train_in_spare_time))),
        ("notice.file", word(file.as_deref().unwrap_or_default())),
        ("notice.stop_window", auto(stop_window)),
        ("notice.usr1_window", auto(usr1_window)),
        ("notice.preemption_window", auto(preemption_window)),
        ("notice.lifecycle_hook", word(lifecycle_hook)),
        ("run.max_hours", cap(max_hours)),
        ("run.max_wait_hours", cap(max_wait_hours)),
        ("run.max_cost", cap(max_cost)),
        ("run.price_per_hour", cap(price_per_hour)),
        ("on_complete.action", word(name_of(ACTIONS, *action))),
        ("restart.max", whole(*max)),
        ("restart.same_step", whole(*same_step)),
        ("restart.backoff", word(&text::format_duration(*backoff))),
        ("restart.hang", word(&hang.map_or_else(|| "never".into(), text::format_duration))),
        ("restart.fruitless_starts", fruitless_starts.map_or_else(|| word("none"), whole)),
        ("storage.concurrency", whole(*concurrency)),
        ("storage.part_mib", whole(*part_mib)),
        ("storage.attempts", whole(*attempts)),
        ("storage.max_upload_mib_per_s", max_upload_mib_per_s.map_or_else(|| word("none"), whole)),
        ("storage.encryption", word(name_of(ENCRYPTIONS, *encryption))),
        ("storage.kms_key_id", word(kms_key_id.as_deref().unwrap_or_default())),
        ("storage.storage_class", word(storage_class.as_deref().unwrap_or_default())),
        ("network.address", word(&address.map_or_else(|| "auto".into(), |address| address.to_string()))),
        ("network.port", whole(*port)),
        ("network.store_port", whole(*store_port)),
    ]
}

/// The layers that have adapters, as they are typed.
fn targets(names: &[String]) -> Value {
    match names {
        [one] if one == ALL_LINEAR => word(one),
        names => Value::Array(names.iter().map(|name| word(name)).collect()),
    }
}

fn word(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn whole(number: impl Into<u64>) -> Value {
    // TOML integers are 63 bits; every setting was read from one.
    Value::Integer(i64::try_from(number.into()).unwrap_or(i64::MAX))
}

/// The word for a value; every value is in its list.
fn name_of<T: PartialEq>(choices: &[(&'static str, T)], value: T) -> &'static str {
    choices.iter().find(|(_, choice)| *choice == value).map_or("", |(name, _)| name)
}
