//! The configuration as a whole: typed settings against the result, or against the exact words of the refusal.

use std::{collections::BTreeSet, path::Path, time::Duration};

use super::{raw::Raw, *};
use crate::error::{Error, Explain, Kind};

const MACHINE: Machine = Machine { cores: 8, gpus: 0 };

/// A folder with a model's `config.json` in the place that the example names.
pub(super) fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("configs/models")).unwrap();
    std::fs::write(dir.path().join("configs/models/tiny.json"), r#"{"hidden_size":64}"#).unwrap();
    dir
}

pub(super) fn load_with(
    dir: &Path,
    toml: &str,
    flags: Vec<(&'static str, &'static str, String)>,
    set: &[(&str, &str)],
) -> Result<RunConfig, ConfigError> {
    let file = dir.join("run.toml");
    std::fs::write(&file, toml).unwrap();
    let set: Vec<_> = set.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    load(&Sources {
        file: Some(&file),
        text: None,
        flags,
        set: &set,
        working_directory: dir,
        machine: MACHINE,
        fetch: &|folder, name| Err(Error::new(Kind::Data, format!("asked for {name} of {folder}"))),
    })
}

pub(super) const LEAST: &str = "model.config = 'configs/models/tiny.json'\ndata.train = 'data'\n";

/// Loads the least configuration with some lines added.
pub(super) fn load_least(more: &str) -> Result<RunConfig, ConfigError> {
    load_with(folder().path(), &format!("{LEAST}{more}"), vec![], &[])
}

/// Loads these lines alone.
pub(super) fn load_text(text: &str) -> Result<RunConfig, ConfigError> {
    load_with(folder().path(), text, vec![], &[])
}

#[test]
fn the_interfaces_example_is_read_as_it_stands() {
    let example = r#"
store = "file://./runs"            # s3://bucket/prefix  gs://…  az://…  file://…  memory://

[model]
kind = "llama"
config = "configs/models/tiny.json"   # a Hugging Face config.json, or init_from = "hf-folder-or-URI"

[data]
train = "file://./runs/data/rust"
sequence_length = 256

[train]
steps = 2000
global_batch = 32                 # sequences over the whole world, whatever its size; micro-batches follow from it
seed = 1234
precision = "fp32"                # or "bf16": bf16 compute, fp32 master weights
optimizer = { kind = "adamw", lr = 3e-4, betas = [0.9, 0.95], weight_decay = 0.1, grad_clip = 1.0 }
schedule = { kind = "cosine", warmup_steps = 100, min_lr_ratio = 0.1 }

[parallel]
strategy = "ddp"                  # or "zero1"

[checkpoint]
every = "auto"                    # or "2h", "500 steps"
keep = { last = 3, every = "1000 steps" }

[notice]
sources = "auto"                  # aws, gcp, azure, signals, file

[on_complete]
action = "exit"                   # or "terminate": leave the Auto Scaling group with its desired capacity lowered
"#;
    let dir = folder();
    let config = load_with(dir.path(), example, vec![], &[]).unwrap();
    let root = format!("file://{}", dir.path().display());
    assert_eq!(
        config,
        RunConfig {
            store: format!("{root}/runs"),
            workload: TrainTask {
                model: ModelConfig {
                    kind: ModelKind::Decoder,
                    config: serde_json::json!({"hidden_size": 64}),
                    init_from: None,
                    lora: None,
                },
                data: DataConfig {
                    train: format!("{root}/runs/data/rust"),
                    tokenizer: TokenizerRule::Same,
                    sequence_length: 256,
                    validation_every: 0,
                    validation_sequences: 64
                },
                train: TrainConfig {
                    steps: 2000,
                    epochs: 0,
                    global_batch: 32,
                    max_micro_batch: 8,
                    seed: 1234,
                    precision: Precision::Fp32,
                    activations: Activations::Keep,
                    threads: 8,
                    fused: true,
                    deterministic: true,
                    optimizer: OptimizerConfig {
                        lr: 3e-4,
                        betas: [0.9, 0.95],
                        eps: 1e-8,
                        weight_decay: 0.1,
                        grad_clip: 1.0
                    },
                    schedule: ScheduleConfig { kind: ScheduleKind::Cosine, warmup_steps: 100, min_lr_ratio: 0.1 },
                    early_stopping: None,
                },
                parallel: ParallelConfig {
                    strategy: Strategy::Ddp,
                    nproc_per_node: None,
                    device: crate::config::Device::Auto,
                    bucket_mib: 25,
                    mixed: false,
                    share_device: false,
                    peak_tflops: None,
                },
            },
            checkpoint: CheckpointConfig {
                every: Cadence::Auto,
                keep: Keep { last: 3, every: Some(Spacing::Steps(1000)), best: 0 },
                scrub: Some(Duration::from_secs(86_400)),
                slots: SlotCount::TWO,
                price_per_gib_month: 0.023,
            },
            notice: NoticeConfig::default(),
            run: CapsConfig::default(),
            on_complete: OnComplete { action: CompleteAction::Exit },
            restart: RestartConfig {
                max: 10,
                same_step: 3,
                backoff: Duration::from_secs(1),
                hang: None,
                fruitless_starts: Some(20)
            },
            storage: StorageConfig::plain(16, 16),
            network: NetworkConfig::default(),
        }
    );
    let stored = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<RunConfig>(&stored).unwrap(), config);
}

#[test]
fn what_is_computed_is_stored_in_sections_of_the_run() {
    fn json(value: &impl serde::Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }
    let config = load_least("").unwrap();
    let RunConfig { store, workload, checkpoint, notice, on_complete, restart, storage, network: _, run: _ } = &config;
    let TrainTask { model, data, train, parallel } = workload;
    let sections = [
        ("store", json(store)),
        ("model", json(model)),
        ("data", json(data)),
        ("train", json(train)),
        ("parallel", json(parallel)),
        ("checkpoint", json(checkpoint)),
        ("notice", json(notice)),
        ("on_complete", json(on_complete)),
        ("restart", json(restart)),
        ("storage", json(storage)),
    ];
    let sections: Vec<String> = sections.iter().map(|(name, section)| format!("\"{name}\":{section}")).collect();
    let stored = json(&config);
    assert_eq!(stored, format!("{{{}}}", sections.join(",")));

    let read = |text: &str| serde_json::from_str::<RunConfig>(text);
    // A section that a later version adds is no obstacle; one that is missing, or there twice, is.
    let later = stored.replacen("\"data\":", "\"later\":{\"x\":[1]},\"data\":", 1);
    assert_eq!(read(&later).unwrap(), config);
    for (name, section) in [("model", json(model)), ("data", json(data)), ("store", json(store))] {
        let missing = stored.replacen(&format!("\"{name}\":{section},"), "", 1);
        assert!(read(&missing).unwrap_err().to_string().contains(&format!("missing field `{name}`")), "{missing}");
        let twice = stored.replacen(&format!("\"{name}\":"), &format!("\"{name}\":{section},\"{name}\":"), 1);
        assert!(read(&twice).unwrap_err().to_string().contains(&format!("duplicate field `{name}`")), "{twice}");
    }
}

#[test]
fn the_default_file_has_every_setting_and_no_other() {
    let raw = Raw::defaults().unwrap();
    let documented: BTreeSet<&str> = raw.keys().collect();
    let config = load_least("").unwrap();
    let known: BTreeSet<&str> = settings(&config).into_iter().map(|(key, _)| key).collect();
    assert_eq!(documented, known);
    // Each has a comment: the line before a key is one, or a key shares it.
    let lines: Vec<&str> = DEFAULT_TOML.lines().collect();
    for (i, line) in lines.iter().enumerate() {
        if line.contains(" = ") && !line.starts_with('#') {
            assert!(lines[i - 1].starts_with("# "), "no comment above {line:?}");
        }
    }
}

#[test]
fn wrong_settings_are_refused_in_words_that_name_them() {
    for (lines, message, hint) in [
        ("train.step = 5", "run.toml:3: unknown key train.step", "did you mean train.steps?"),
        ("[training]\nsteps = 5", "run.toml:3: unknown key training", "did you mean train?"),
        ("steps = 5", "run.toml:3: unknown key steps", "did you mean train.steps?"),
        (
            "\n[train.optimizer]\nbeta = [0.9, 0.95]",
            "run.toml:5: unknown key train.optimizer.beta",
            "did you mean train.optimizer.betas?",
        ),
        (
            "checkpoint.zzzzzz = 1",
            "run.toml:3: unknown key checkpoint.zzzzzz",
            "there are every, keep, price_per_gib_month, scrub, slots",
        ),
        (
            "'qqq.qqq' = 1",
            "run.toml:3: unknown key \"qqq.qqq\"",
            "there are checkpoint, data, model, network, notice, on_complete, parallel, restart, run, storage, store, \
             task, train",
        ),
        ("train.steps = 0", "run.toml:3: train.steps = 0: expected a whole number from 1 to 2199023255551", ""),
        ("train.steps = -1", "run.toml:3: train.steps = -1: expected a whole number from 1 to 2199023255551", ""),
        ("train.steps = 1.5", "run.toml:3: train.steps = 1.5: expected a whole number from 1 to 2199023255551", ""),
        ("train.steps = {}", "run.toml:3: train.steps = {}: expected a whole number from 1 to 2199023255551", ""),
        (
            "train.global_batch = 4294967296",
            "run.toml:3: train.global_batch = 4294967296: expected a whole number, at least 1",
            "",
        ),
        (
            "train = 5",
            "run.toml:3: train = 5: expected a table with activations, deterministic, early_stopping.min_delta, \
            early_stopping.patience, epochs, fused, global_batch, max_micro_batch, optimizer.betas, optimizer.eps, \
            optimizer.grad_clip, optimizer.kind, optimizer.lr, optimizer.weight_decay, precision, schedule.kind, \
            schedule.min_lr_ratio, schedule.warmup_steps, seed, steps, threads",
            "",
        ),
        ("train.precision = 'fp61'", "run.toml:3: train.precision = \"fp61\": expected \"fp32\" or \"bf16\"", ""),
        ("train.precision = 32", "run.toml:3: train.precision = 32: expected \"fp32\" or \"bf16\"", ""),
        ("train.optimizer = { kind = 'sgd' }", "run.toml:3: train.optimizer.kind = \"sgd\": expected \"adamw\"", ""),
        (
            "train.optimizer = { lr = 'high' }",
            "run.toml:3: train.optimizer.lr = \"high\": expected a number above 0",
            "",
        ),
        ("train.optimizer = { lr = nan }", "run.toml:3: train.optimizer.lr = nan: expected a number above 0", ""),
        (
            "train.optimizer = { betas = [0.9] }",
            "run.toml:3: train.optimizer.betas = [0.9]: expected two numbers, each at least 0 and below 1",
            "",
        ),
        (
            "train.optimizer = { betas = [0.9, 'x'] }",
            "run.toml:3: train.optimizer.betas = [0.9, \"x\"]: expected two numbers, each at least 0 and below 1",
            "",
        ),
        (
            "train.optimizer = { betas = [0.9, 1.0] }",
            "run.toml:3: train.optimizer.betas = [0.9, 1.0]: expected two numbers, each at least 0 and below 1",
            "",
        ),
        ("train.threads = 0", "run.toml:3: train.threads = 0: expected \"auto\", or a whole number from 1 to 4096", ""),
        (
            "train.schedule.warmup_steps = 2000",
            "train.schedule.warmup_steps = 2000 is longer than the run: train.steps = 1000",
            "",
        ),
        (
            "train.steps = 500\ntrain.epochs = 3",
            "train.steps = 500 and train.epochs = 3 are both set: keep one of them",
            "",
        ),
        ("train.epochs = -1", "run.toml:3: train.epochs = -1: expected a whole number, at least 0", ""),
        (
            "data.sequence_length = 0",
            "run.toml:3: data.sequence_length = 0: expected a whole number from 1 to 1048576",
            "",
        ),
        (
            "parallel.strategy = 'fsdp'",
            "run.toml:3: parallel.strategy = \"fsdp\": expected \"ddp\", \"zero1\" or \"shard\"",
            "",
        ),
        (
            "train.activations = 'none'",
            "run.toml:3: train.activations = \"none\": expected \"keep\", \"block\" or \"auto\"",
            "",
        ),
        (
            "checkpoint.every = 500",
            "run.toml:3: checkpoint.every = 500: expected \"auto\", a count of steps such as \"500 steps\", or a \
            duration such as \"2h\"",
            "",
        ),
        (
            "checkpoint.keep = { last = 0 }",
            "run.toml:3: checkpoint.keep.last = 0: expected a whole number, at least 1",
            "",
        ),
        (
            "checkpoint.keep = { every = 1000 }",
            "run.toml:3: checkpoint.keep.every = 1000: expected \"never\", a count of steps such as \"1000 steps\", or \
            a duration such as \"6h\"",
            "",
        ),
        (
            "notice.sources = ['aws', 'ibm']",
            "run.toml:3: notice.sources = [\"aws\", \"ibm\"]: expected \"auto\", or a list of \"aws\", \"gcp\", \
            \"azure\", \"signals\" or \"file\"",
            "",
        ),
        (
            "notice.sources = []",
            "run.toml:3: notice.sources = []: expected \"auto\", or a list of \"aws\", \"gcp\", \"azure\", \"signals\" \
            or \"file\"",
            "",
        ),
        (
            "restart.backoff = 5",
            "run.toml:3: restart.backoff = 5: expected a duration such as \"90s\", \"2h\" or \"1h30m\"",
            "",
        ),
        ("storage.part_mib = 1", "run.toml:3: storage.part_mib = 1: expected a whole number from 5 to 5120", ""),
        (
            "storage.max_upload_mib_per_s = 0",
            "run.toml:3: storage.max_upload_mib_per_s = 0: expected \"none\", or a whole number from 1 to 1000000",
            "",
        ),
        (
            "storage.encryption = 'aes'",
            "run.toml:3: storage.encryption = \"aes\": expected \"default\", \"sse-s3\" or \"sse-kms\"",
            "",
        ),
        (
            "storage = { encryption = 'sse-s3', kms_key_id = 'x' }",
            "storage.kms_key_id is set, but storage.encryption is not \"sse-kms\"",
            "",
        ),
        (
            "storage = { encryption = 'sse-kms', kms_key_id = 'a b' }",
            "run.toml:3: storage.kms_key_id = \"a b\": expected a key's id, alias or ARN",
            "",
        ),
        (
            "storage.storage_class = 'GLACIER'",
            "run.toml:3: storage.storage_class = \"GLACIER\": expected a class that can be read at once: a run that \
            resumes can't wait for a thaw",
            "",
        ),
        (
            "storage.storage_class = 'cheap'",
            "run.toml:3: storage.storage_class = \"cheap\": expected a class of S3, such as \"STANDARD_IA\"",
            "",
        ),
        (
            "store = 's4://x'",
            "run.toml:3: store = \"s4://x\": expected a URI such as s3://bucket/prefix, gs://bucket/prefix, \
            az://container/prefix, file://path or memory://, or a path",
            "",
        ),
        ("parallel.mixed = 'yes'", "run.toml:3: parallel.mixed = \"yes\": expected true or false", ""),
        (
            "parallel.mixed = true",
            "parallel.mixed = true needs parallel.strategy = \"zero1\": with \"ddp\", devices that round differently \
            would part from one another, step by step",
            "",
        ),
        (
            "network.address = 'node7'",
            "run.toml:3: network.address = \"node7\": expected \"auto\", or an IP address of the machine that others \
            can dial, such as \"10.0.0.7\"",
            "",
        ),
        (
            "network.address = '0.0.0.0'",
            "run.toml:3: network.address = \"0.0.0.0\": expected \"auto\", or an IP address of the machine that others \
            can dial, such as \"10.0.0.7\"",
            "",
        ),
        ("network.port = 65536", "run.toml:3: network.port = 65536: expected a whole number from 0 to 65535", ""),
        ("network.store_port = -1", "run.toml:3: network.store_port = -1: expected a whole number from 0 to 65535", ""),
        (
            "network = { port = 7077, store_port = 7077 }",
            "network.port and network.store_port are both 7077: give one of them another port, or 0",
            "",
        ),
        ("a = = 1", "run.toml:3: not valid TOML: ", ""),
        ("model.kind = 'gpt'", "run.toml:3: model.kind = \"gpt\": expected \"decoder\" or \"llama\"", ""),
    ] {
        let error = load_least(lines).unwrap_err();
        let text = error.to_string();
        let text = text.rsplit_once("/run.toml").map_or(text.clone(), |(_, rest)| format!("run.toml{rest}"));
        if message.ends_with(": ") {
            assert!(text.starts_with(message), "{text}");
        } else {
            assert_eq!(text, message);
        }
        assert_eq!(error.hint().unwrap_or_default(), hint, "{lines}");
        assert_eq!(error.kind(), crate::error::Kind::Config);
    }
}

#[test]
fn settings_of_the_store_are_read_kept_and_changed() {
    let config = load_least(
        "storage = { max_upload_mib_per_s = 200, encryption = 'sse-kms', kms_key_id = 'alias/run', \
         storage_class = 'STANDARD_IA' }",
    )
    .unwrap();
    let expected = StorageConfig {
        max_upload_mib_per_s: Some(200),
        encryption: Encryption::SseKms,
        kms_key_id: Some("alias/run".into()),
        storage_class: Some("STANDARD_IA".into()),
        ..StorageConfig::plain(16, 16)
    };
    assert_eq!(config.storage, expected);
    let stored = serde_json::to_value(&config.storage).unwrap();
    assert_eq!(stored["encryption"], "sse-kms");
    assert_eq!(serde_json::from_value::<StorageConfig>(stored).unwrap(), expected);
    // As runs wrote it before these settings were there.
    let older = serde_json::json!({ "concurrency": 16, "part_mib": 16 });
    assert_eq!(serde_json::from_value::<StorageConfig>(older).unwrap(), StorageConfig::plain(16, 16));
    let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let overrides = [
        set("storage.max_upload_mib_per_s", "none"),
        set("storage.encryption", "sse-s3"),
        set("storage.kms_key_id", ""),
    ];
    let changed = apply_overrides(&config, &overrides).unwrap().storage;
    assert_eq!((changed.max_upload_mib_per_s, changed.encryption, changed.kms_key_id), (None, Encryption::SseS3, None));
    assert_eq!(changed.storage_class, expected.storage_class);
}

#[test]
fn what_has_no_default_is_asked_for() {
    let dir = folder();
    let error = load_with(dir.path(), "data.train = 'x'", vec![], &[]).unwrap_err();
    assert_eq!(error.to_string(), "model.config is not set");
    assert!(error.hint().unwrap().contains("configs/models/tiny.json"));
    let error = load_with(dir.path(), "model.config = 'configs/models/tiny.json'", vec![], &[]).unwrap_err();
    assert_eq!(error.to_string(), "data.train is not set");
    assert!(error.hint().unwrap().contains("trainer data prepare"));
}

#[test]
fn the_models_description_is_found_and_checked() {
    let dir = folder();
    let with = |config: &str| load_with(dir.path(), &format!("data.train = 'x'\n{config}"), vec![], &[]);
    let reason = |config: &str| with(config).unwrap_err().to_string().rsplit_once("run.toml").unwrap().1.to_owned();
    assert_eq!(reason("model.config = 'none.json'"), ":2: model.config names none.json: no such file");
    std::fs::write(dir.path().join("list.json"), "[1]").unwrap();
    assert!(reason("model.config = 'list.json'").ends_with("not a JSON object, as a Hugging Face config.json is"));
    std::fs::write(dir.path().join("broken.json"), "{").unwrap();
    assert!(reason("model.config = 'broken.json'").contains("not valid JSON"));
    std::fs::write(dir.path().join("huge.json"), vec![b' '; 2 << 20]).unwrap();
    assert!(reason("model.config = 'huge.json'").contains("longer than 1048576 bytes"));

    std::fs::write(dir.path().join("bom.json"), "\u{feff}{\"a\": 1}").unwrap();
    assert_eq!(with("model.config = 'bom.json'").unwrap().workload.model.config, serde_json::json!({"a": 1}));
    // Opening a pipe would wait for a writer.
    let pipe = |name: &str| {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join(name),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
    };
    pipe("pipe.json");
    assert!(reason("model.config = 'pipe.json'").contains("pipe"));
    pipe("config.json");
    let error = with(&format!("model.init_from = '{}'", dir.path().display())).unwrap_err();
    assert!(error.to_string().contains("pipe"), "{error}");
    // What a shell has opened is a pipe, too: <(…).
    let (read, write) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&write, b"text").unwrap();
    drop(write);
    let open = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&read));
    assert_eq!(super::read_small(Path::new(&open), 9).unwrap(), b"text");

    // Beside the configuration file, when not in the working directory.
    std::fs::write(dir.path().join("configs/beside.toml"), "model.config = 'models/tiny.json'\ndata.train = 'x'")
        .unwrap();
    let load_beside = |cwd: &Path| {
        let none = |_: &str, _: &str| Err(Error::new(Kind::Data, "none"));
        let file = dir.path().join("configs/beside.toml");
        load(&Sources {
            file: Some(&file),
            text: None,
            flags: vec![],
            set: &[],
            working_directory: cwd,
            machine: MACHINE,
            fetch: &none,
        })
    };
    assert_eq!(load_beside(Path::new("/")).unwrap().workload.model.config["hidden_size"], 64);

    // A model folder brings its own.
    std::fs::create_dir(dir.path().join("hf")).unwrap();
    std::fs::write(dir.path().join("hf/config.json"), r#"{"hidden_size":32}"#).unwrap();
    let config = with("model.init_from = 'hf'").unwrap();
    assert_eq!(config.workload.model.config["hidden_size"], 32);
    assert_eq!(config.workload.model.init_from.unwrap(), format!("file://{}/hf", dir.path().display()));
    assert!(reason("model.init_from = 's3://b/m'").ends_with("names s3://b/m: asked for config.json of s3://b/m"));
}

#[test]
fn later_layers_win_key_by_key() {
    let dir = folder();
    let toml = format!("{LEAST}store = 's3://file/x'\ntrain.optimizer = {{ lr = 1 }}\nparallel.nproc_per_node = 4");
    let flags = |store: &str, n: &str| {
        vec![("--store", "store", store.to_owned()), ("--nproc-per-node", "parallel.nproc_per_node", n.to_owned())]
    };
    let config = load_with(dir.path(), &toml, flags("gs://flag", "2"), &[]).unwrap();
    assert_eq!(config.store, "gs://flag");
    assert_eq!((config.workload.train.optimizer.lr, config.workload.train.optimizer.weight_decay), (1.0, 0.1));
    assert_eq!((config.workload.parallel.nproc_per_node, config.workload.train.threads), (Some(2), 4));
    let error = load_with(dir.path(), &toml, flags("gs://flag", "many"), &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "--nproc-per-node: parallel.nproc_per_node = \"many\": expected \"auto\", or a whole number from 1 to 1024"
    );
    let set = [
        ("store", "memory://"),
        ("parallel.nproc_per_node", "auto"),
        ("train.precision", "bf16"),
        ("train.optimizer.lr", "1e-3"),
        ("train.optimizer.betas", "[0.8, 0.9]"),
        ("checkpoint.keep", "{ last = 7 }"),
        ("checkpoint.every", "1h30m"),
        ("data.train", "\"quoted\""),
        ("train.steps", "5000"),
    ];
    let config = load_with(dir.path(), &toml, flags("gs://flag", "2"), &set).unwrap();
    assert_eq!(config.store, "memory://");
    assert_eq!((config.workload.parallel.nproc_per_node, config.workload.train.threads), (None, 8));
    assert_eq!((config.workload.train.precision, config.workload.train.optimizer.lr), (Precision::Bf16, 1e-3));
    assert_eq!(config.workload.train.optimizer.betas, [0.8, 0.9]);
    assert_eq!((config.checkpoint.keep.last, config.checkpoint.keep.every), (7, None));
    assert_eq!(config.checkpoint.every, Cadence::Time(Duration::from_secs(5400)));
    assert!(config.workload.data.train.ends_with("/quoted"));
    assert_eq!(config.workload.train.steps, 5000);
    let error = load_with(dir.path(), &toml, vec![], &[("train.stepz", "1")]).unwrap_err();
    assert_eq!(error.to_string(), "--set: unknown key train.stepz");
    let error = load_with(dir.path(), &toml, vec![], &[("", "1")]).unwrap_err();
    assert_eq!(error.to_string(), "--set: unknown key \"\"");
}

#[test]
fn more_workers_than_cores_get_one_thread_each() {
    assert_eq!(load_least("parallel.nproc_per_node = 100").unwrap().workload.train.threads, 1);
}

#[test]
fn a_store_that_does_not_give_a_model_is_no_mistake_of_the_configuration() {
    let dir = folder();
    for named in ["model.init_from = 's3://b/hf'", "model.config = 's3://b/m.json'", "model.config = 'gone.json'"] {
        for (kind, expected) in [
            (Kind::Unavailable, Kind::Unavailable),
            (Kind::Permission, Kind::Permission),
            (Kind::Data, Kind::Config),
            (Kind::Config, Kind::Config),
        ] {
            let error = load(&Sources {
                file: None,
                text: Some(Text {
                    name: Path::new("s3://b/run.toml"),
                    toml: &format!("{named}\ndata.train = 'data'\n"),
                    folder: Some("s3://b"),
                    guard: None,
                }),
                flags: vec![],
                set: &[],
                working_directory: dir.path(),
                machine: MACHINE,
                fetch: &|_, _| Err(Error::new(kind, "the store's words").with_hint("the store's hint")),
            })
            .unwrap_err();
            assert_eq!(error.kind(), expected, "{error}");
            assert!(error.to_string().contains("the store's words"), "{error}");
            if expected != Kind::Config {
                assert_eq!(error.hint().as_deref(), Some("the store's hint"), "{error}");
            }
        }
    }
}

#[test]
fn the_configurations_that_are_delivered_are_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = 0;
    for entry in std::fs::read_dir(root.join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let fetch = |_: &str, _: &str| Err(Error::new(Kind::Data, "remote"));
            let config = load(&Sources {
                file: Some(&path),
                text: None,
                flags: vec![],
                set: &[],
                working_directory: root,
                machine: MACHINE,
                fetch: &fetch,
            })
            .unwrap();
            let workers = workers_per_node(&config.workload.parallel, None, &MACHINE);
            let train = &config.workload.train;
            Spread::new(train.global_batch, crate::ids::WorldSize(workers), train.max_micro_batch).unwrap();
            seen += 1;
        }
    }
    assert!(seen >= 2);
}
