//! One hand-made value of everything that is stored: the content of the fixtures of stored formats, and the material of
//! the protocol's tests.
//!
//! A field that is added to a stored type gets here the value that it has when an older object is read: this is the
//! promise of the fixtures.

use std::time::Duration;

use trainer::{
    checkpoint::{
        manifest::{FileEntry, FileKind, Manifest, RngRule, TrainerState},
        save::Receipt,
    },
    config::*,
    data::{self, shards},
    ids::{AttemptId, DatasetId, Generation, NodeId, NodeKey, Rank, RunId, SlotCount, Step, WorldSize},
    journal::{
        Cap, Committed, EarlyStop, Entry, FormedReason, Gone, Means, Metrics, Reached, Record, ResumePoint,
        RosterEntry, SaveCost,
    },
    rendezvous::heartbeat::{Group, Heartbeat, Process, State},
    storage::Crc64,
    worker::task::Task,
};

pub fn run_id() -> RunId {
    RunId::new("reports-2026q4").expect("valid")
}

pub fn node() -> NodeId {
    NodeId::new("n0123456789ab").expect("valid")
}

fn attempt() -> AttemptId {
    AttemptId::new("00112233445566778899aabbccddeeff").expect("valid")
}

pub fn config() -> RunConfig {
    RunConfig {
        store: "s3://bucket/runs".into(),
        workload: TrainTask {
            model: ModelConfig {
                kind: ModelKind::Decoder,
                config: serde_json::json!({"hidden_size": 64, "rope_theta": 10000.0, "tie_word_embeddings": true}),
                init_from: Some("s3://bucket/models/base".into()),
                lora: None,
            },
            data: DataConfig {
                train: "s3://bucket/data".into(),
                tokenizer: TokenizerRule::Same,
                sequence_length: 256,
                validation_every: 50,
                validation_sequences: 8,
            },
            train: TrainConfig {
                steps: 2000,
                epochs: 0,
                global_batch: 32,
                max_micro_batch: 8,
                seed: 1234,
                precision: Precision::Bf16,
                activations: trainer::config::Activations::Keep,
                threads: 2,
                fused: false,
                deterministic: true,
                optimizer: OptimizerConfig {
                    lr: 3e-4,
                    betas: [0.9, 0.95],
                    eps: 1e-8,
                    weight_decay: 0.1,
                    grad_clip: 1.0,
                },
                schedule: ScheduleConfig { kind: ScheduleKind::Cosine, warmup_steps: 100, min_lr_ratio: 0.1 },
                early_stopping: None,
            },
            parallel: ParallelConfig {
                strategy: Strategy::Ddp,
                nproc_per_node: Some(2),
                device: trainer::config::Device::Auto,
                bucket_mib: 25,
                mixed: false,
                share_device: false,
                peak_tflops: None,
            },
        },
        checkpoint: CheckpointConfig {
            every: Cadence::Steps(100),
            keep: Keep { last: 3, every: Some(Spacing::Steps(1000)), best: 0 },
            scrub: Some(Duration::from_secs(86_400)),
            slots: SlotCount::TWO,
            price_per_gib_month: 0.023,
        },
        notice: NoticeConfig::default(),
        run: CapsConfig::default(),
        on_complete: OnComplete { action: CompleteAction::Exit },
        restart: RestartConfig {
            max: 3,
            same_step: 2,
            backoff: Duration::from_millis(1500),
            hang: None,
            fruitless_starts: None,
        },
        storage: storage(),
        network: NetworkConfig::default(),
    }
}

/// What the worker of such a run is told to do.
pub fn task() -> serde_json::Value {
    let data = DatasetId { index: "00000000deadbeef".into(), vocabulary: "0123456789abcdef".into() };
    Task { config: config().workload, data_dir: "/data".into(), data, base: Vec::new() }.write().expect("plain")
}

pub fn storage() -> StorageConfig {
    StorageConfig::plain(8, 16)
}

/// One record of each kind that version 2 of the journal has added.
pub fn records_of_version_2() -> Vec<Record> {
    vec![
        Record::Cleared { step: Step(1200), generation: Generation(3) },
        Record::pruned([100, 200].map(|step| ResumePoint { step: Step(step), generation: Generation(1) }).into()),
    ]
}

/// What version 3 of the journal has added: records without a loss, or with other figures.
pub fn records_of_version_3() -> Vec<Record> {
    let metrics = [("accuracy".to_owned(), 0.75), ("perplexity".to_owned(), f64::INFINITY)].into();
    let committed = |record| match record {
        Record::Committed(committed) => Some(committed),
        _ => None,
    };
    let committed = records().into_iter().find_map(committed).expect("one of each kind");
    vec![
        Record::Committed(Committed { loss: None, metrics, ..committed }),
        Record::Completed { generation: Generation(3), step: Step(2000), loss: None, early: None },
    ]
}

/// What version 4 of the journal has added: a generation of several nodes.
pub fn records_of_version_4() -> Vec<Record> {
    let node = |name: &str| NodeId::new(name).expect("valid");
    let member = |name: &str, workers, rank, address: Option<&str>, digit: &str| RosterEntry {
        first_rank: Some(Rank(rank)),
        address: address.map(str::to_owned),
        key: NodeKey::new(digit.repeat(64)).ok(),
        ..RosterEntry::new(node(name), workers)
    };
    vec![Record::Formed {
        generation: Generation(4),
        roster: vec![
            member("n1b2c3d4e5f6a", 8, 0, Some("10.0.1.17:29400"), "a"),
            member("n2b2c3d4e5f6a", 4, 8, Some("[fd00::2]:29400"), "b"),
            member("n3b2c3d4e5f6a", 0, 12, None, "c"),
        ],
        world_size: WorldSize(12),
        resume: Some(ResumePoint { step: Step(1200), generation: Generation(3) }),
        overrides: Vec::new(),
        reason: FormedReason::NodeLost,
        data: None,
        continues: Some(Generation(3)),
        gone: vec![Gone { node: self::node(), why: "its agent does not answer: connection refused".into() }],
        joined: ["n1b2c3d4e5f6a", "n2b2c3d4e5f6a", "n3b2c3d4e5f6a"].map(node).into(),
        why: None,
    }]
}

/// What version 5 of the journal has added: a run that trains adapters, with the files of their base.
pub fn records_of_version_5() -> Vec<Record> {
    let mut config = config();
    let file = |number: u64| BaseFile {
        name: format!("model-0000{number}-of-00002.safetensors"),
        bytes: number * 1_000_000_000,
        crc64: format!("{number}123456789abcdef"),
    };
    config.workload.model.lora = Some(LoraConfig {
        rank: 16,
        alpha: 32.0,
        targets: vec!["q_proj".into(), "v_proj".into()],
        base: [1, 2].map(file).into(),
    });
    vec![Record::Created { run_id: run_id(), config: Box::new(config) }]
}

/// What version 6 of the journal has added: a run that may stop early, and one that did.
pub fn records_of_version_6() -> Vec<Record> {
    let mut config = config();
    config.workload.train.early_stopping = Some(EarlyStopping { patience: 3, min_delta: 0.01 });
    let early = EarlyStop { validations: 3, min_delta: 0.01, best_loss: 1.25, best_step: Step(900) };
    let formed = records().into_iter().find_map(|record| match record {
        Record::Formed { .. } => Some(record),
        _ => None,
    });
    let mut formed = formed.expect("one of each kind");
    if let Record::Formed { overrides, .. } = &mut formed {
        *overrides = vec![("train.early_stopping.patience".into(), "5".into())];
    }
    vec![
        Record::Created { run_id: run_id(), config: Box::new(config) },
        formed,
        Record::Completed { generation: Generation(3), step: Step(1200), loss: Some(1.5), early: Some(early) },
    ]
}

/// What version 7 of the journal has added: a run with caps, and one that has reached one.
pub fn records_of_version_7() -> Vec<Record> {
    let mut config = config();
    config.run = CapsConfig {
        max_hours: Some(12.5),
        max_wait_hours: Some(72.0),
        max_cost: Some(40.0),
        price_per_hour: Some(0.35),
    };
    let of = |kind: &str| records().into_iter().find(|record| record.kind() == kind).expect("one of each kind");
    let (mut formed, mut interrupted) = (of("formed"), of("interrupted"));
    if let Record::Formed { overrides, .. } = &mut formed {
        *overrides = vec![("run.max_hours".into(), "20.0".into())];
    }
    if let Record::Interrupted { cap, .. } = &mut interrupted {
        *cap = Some(Reached { cap: Cap::MaxHours, limit: 12.5, used: 12.5001 });
    }
    vec![Record::Created { run_id: run_id(), config: Box::new(config) }, formed, interrupted]
}

/// What version 6 of the journal has added for programs with a task of their own.
pub fn records_of_tasks() -> Vec<Record> {
    let mut config = config();
    let settings = serde_json::json!({ "channels": 8, "noise": 0.5, "shapes": null, "inner": { "list": [1, 2] } });
    config.workload.model = ModelConfig::of_task(&OwnTask { name: "shapes".into(), version: 3, settings });
    (config.workload.data.train, config.workload.data.sequence_length) = (String::new(), 1);
    vec![Record::Created { run_id: run_id(), config: Box::new(config) }]
}

/// One record of each kind of version 1 of the journal.
pub fn records() -> Vec<Record> {
    let (step, generation) = (Step(1200), Generation(3));
    vec![
        Record::Created { run_id: run_id(), config: Box::new(config()) },
        Record::Formed {
            generation,
            roster: vec![RosterEntry::new(node(), 2)],
            world_size: WorldSize(2),
            resume: Some(ResumePoint { step: Step(1100), generation: Generation(2) }),
            overrides: vec![("train.steps".into(), "2500".into())],
            reason: FormedReason::WorkerDied,
            data: None,
            continues: None,
            gone: Vec::new(),
            joined: Vec::new(),
            why: None,
        },
        Record::Committed(Committed {
            step,
            generation,
            manifest: "checkpoints/s00001200-g0003/manifest.json".into(),
            manifest_crc64: "0123456789abcdef".into(),
            bytes: 512_000_000,
            loss: Some(2.25),
            validation_loss: Some(f64::INFINITY),
            metrics: Metrics::new(),
            cost: SaveCost { stall_s: 0.012, copy_s: 0.3, durable_s: 4.5, lived_s: 0.0 },
        }),
        Record::Notice { generation, source: "sigterm".into(), deadline_s: Some(120.0), means: Means::Stop },
        Record::Interrupted {
            generation,
            step: Step(1234),
            committed: Some(step),
            lost_steps: 34,
            verdict: "no time".into(),
            drain: None,
            cap: None,
        },
        Record::Damaged { step, generation, reason: "model-00001-of-00002.safetensors: it does not exist".into() },
        Record::Completed { generation, step: Step(2000), loss: Some(1.5), early: None },
        Record::Failed { generation, step, reason: "loss is NaN".into() },
        Record::Pruned { step: Step(100), generation: Generation(1) },
    ]
}

pub fn entry(record: Record) -> Entry {
    let at = "2026-11-20T08:30:00.123456789Z".parse().expect("a time");
    Entry { format: record.format(), attempt: attempt(), at, node: node(), record }
}

fn files() -> Vec<FileEntry> {
    let file =
        |name: &str, kind, bytes| FileEntry { name: name.into(), kind, bytes, crc64: Crc64(0xfedc_ba98_7654_3210) };
    vec![
        file("config.json", FileKind::Meta, 700),
        file("model-00001-of-00001.safetensors", FileKind::Model, 170_000_000),
        file("optimizer-00001-of-00001.safetensors", FileKind::Optimizer, 340_000_000),
        file("trainer_state.json", FileKind::Meta, 512),
    ]
}

pub fn manifest() -> Manifest {
    Manifest {
        format: 1,
        attempt: attempt(),
        run_id: run_id(),
        step: Step(1200),
        generation: Generation(3),
        world_size: WorldSize(2),
        nodes: vec![node()],
        files: files(),
    }
}

pub fn receipt() -> Receipt {
    Receipt {
        format: 1,
        attempt: attempt(),
        run_id: run_id(),
        step: Step(1200),
        generation: Generation(3),
        node: node(),
        files: files(),
    }
}

pub fn trainer_state() -> TrainerState {
    TrainerState {
        format: 1,
        step: Step(1200),
        samples: 38_400,
        tokens: 9_830_400,
        epoch: 3,
        position: 8_400,
        seed: 1234,
        global_batch: 32,
        sequence_length: 256,
        total_steps: 2000,
        lr: 3e-4,
        schedule: config().workload.train.schedule,
        rng: RngRule::PerStep,
        data: None,
    }
}

/// Of a node of a run with several nodes.
pub fn heartbeat_in_group() -> Heartbeat {
    let group = Group {
        address: "10.0.0.7:7077".into(),
        key: NodeKey::new("0f".repeat(32)).expect("valid"),
        every_s: 30,
        state: State::CutOff,
        kind: "NVIDIA H200".into(),
        workers: 8,
        program: String::new(),
        unreachable: vec![node()],
        left: true,
        puts_off: None,
    };
    Heartbeat { format: 2, group: Some(group), ..heartbeat() }
}

pub fn heartbeat() -> Heartbeat {
    let process = Process {
        boot_id: "3f2b7c1e-0000-4000-8000-000000000001".into(),
        pid_namespace: "pid:[4026531836]".into(),
        pid: 4242,
        started: 987_654,
    };
    Heartbeat { format: 1, node: node(), counter: 17, process, group: None }
}

pub fn index() -> shards::Index {
    let file = |file: &str, bytes| shards::FileEntry { file: file.into(), bytes, crc64: Crc64(0x0123_4567_89ab_cdef) };
    let shard = |name: &str, tokens: u64| shards::ShardEntry {
        file: file(name, tokens * 2),
        tokens,
        marks: None,
        sources: None,
    };
    shards::Index {
        format: 1,
        dtype: shards::TokenType::U16,
        vocab_size: 32_000,
        eos_id: 2,
        recipe: "00000000deadbeef".into(),
        tokenizer: file("tokenizer.json", 1_800_000),
        documents: None,
        sources: vec![],
        train: vec![shard("train-00000.bin", 1 << 20), shard("train-00001.bin", 77)],
        validation: vec![shard("validation-00000.bin", 1 << 10)],
    }
}

/// One whose inputs have names.
pub fn index_with_sources() -> shards::Index {
    let mut index = index();
    index.sources = vec!["chat".into(), "code".into()];
    for shard in &mut index.validation {
        let file = "validation-00000.sources".into();
        shard.sources = Some(shards::FileEntry { file, bytes: shard.tokens, ..shard.file.clone() });
    }
    index
}

/// One of format 2, with everything that it may have.
pub fn index_of_format_2() -> shards::Index {
    let file = |file: &str, bytes| shards::FileEntry { file: file.into(), bytes, crc64: Crc64(0x0123_4567_89ab_cdef) };
    let mut index = index();
    index.format = 2;
    for (number, shard) in index.train.iter_mut().chain(&mut index.validation).enumerate() {
        let split = if number < 2 { data::Split::Train } else { data::Split::Validation };
        shard.tokens = 129 * (number as u64 + 1);
        shard.file.bytes = shard.tokens * 2;
        let name = split.marks_name(number % 2);
        let file = file(&name, shard.tokens.div_ceil(4));
        shard.marks = Some(data::marks::MarksEntry { file, documents: 7, targets: 90 });
    }
    index.documents = Some(data::marks::Documents {
        bos_id: Some(1),
        packed: Some(128),
        dropped: data::marks::Dropped { too_long: 3, without_target: 4 },
        chat: Some(data::marks::Rendering {
            template_sha256: "0123456789abcdef".repeat(4),
            tools_template_sha256: None,
            date: Some("2026-01-31".into()),
            end_ids: vec![2, 7],
        }),
        files: vec![file("chat_template.jinja", 900), file("config.json", 600)],
    });
    index
}
