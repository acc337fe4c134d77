//! Records and runs for tests.

use std::time::Duration;

use jiff::Timestamp;

use super::*;
use crate::{
    config::*,
    ids::{AttemptId, Generation, NodeId, RunId, Step, WorldSize},
    storage::Store,
};

pub(super) fn settings() -> StorageConfig {
    StorageConfig::plain(8, 8)
}

pub(super) fn config() -> RunConfig {
    RunConfig {
        store: "memory://".into(),
        workload: TrainTask {
            model: ModelConfig {
                kind: ModelKind::Decoder,
                config: serde_json::json!({"hidden_size": 8}),
                init_from: None,
                lora: None,
            },
            data: DataConfig {
                train: "data".into(),
                tokenizer: Default::default(),
                sequence_length: 8,
                validation_every: 0,
                validation_sequences: 0,
            },
            train: TrainConfig {
                steps: 100,
                epochs: 0,
                global_batch: 4,
                max_micro_batch: 4,
                seed: 1,
                precision: Precision::Fp32,
                activations: crate::config::Activations::Keep,
                threads: 1,
                fused: false,
                deterministic: true,
                optimizer: OptimizerConfig {
                    lr: 1e-3,
                    betas: [0.9, 0.95],
                    eps: 1e-8,
                    weight_decay: 0.1,
                    grad_clip: 1.0,
                },
                schedule: ScheduleConfig { kind: ScheduleKind::Cosine, warmup_steps: 1, min_lr_ratio: 0.1 },
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
            keep: Keep { last: 3, every: None, best: 0 },
            scrub: None,
            slots: crate::ids::SlotCount::TWO,
            price_per_gib_month: 0.023,
        },
        notice: NoticeConfig::default(),
        run: CapsConfig::default(),
        on_complete: OnComplete { action: CompleteAction::Exit },
        restart: RestartConfig {
            max: 3,
            same_step: 2,
            backoff: Duration::from_secs(1),
            hang: None,
            fruitless_starts: None,
        },
        storage: settings(),
        network: NetworkConfig::default(),
    }
}

pub(super) fn run_id() -> RunId {
    RunId::new("run").unwrap()
}

pub(super) fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

pub(super) fn entry(name: &str, record: Record) -> Entry {
    Entry { format: record.format(), attempt: AttemptId::random(), at: Timestamp::UNIX_EPOCH, node: node(name), record }
}

pub(super) fn created() -> Record {
    Record::Created { run_id: run_id(), config: Box::new(config()) }
}

pub(super) fn point(step: u64, generation: u64) -> ResumePoint {
    ResumePoint { step: Step(step), generation: Generation(generation) }
}

pub(super) fn formed(generation: u64, resume: Option<ResumePoint>) -> Record {
    Record::Formed {
        generation: Generation(generation),
        roster: vec![RosterEntry::new(node("a"), 2)],
        world_size: WorldSize(2),
        resume,
        overrides: vec![("train.steps".into(), generation.to_string())],
        reason: FormedReason::Started,
        data: None,
        continues: None,
        gone: Vec::new(),
        joined: Vec::new(),
        why: None,
    }
}

/// The argument of [`Journal::form`], from node `name`.
pub(super) fn forming(name: &str, resume: Option<ResumePoint>) -> Formed {
    Formed {
        roster: vec![RosterEntry::new(node(name), 1)],
        world_size: WorldSize(1),
        resume,
        overrides: Vec::new(),
        reason: FormedReason::Started,
        data: None,
        succession: Succession::default(),
    }
}

pub(super) fn committed(step: u64, generation: u64) -> Record {
    Record::Committed(Committed {
        step: Step(step),
        generation: Generation(generation),
        manifest: format!("checkpoints/s{step:08}-g{generation:04}/manifest.json"),
        manifest_crc64: "0123456789abcdef".into(),
        bytes: 10,
        loss: Some(1.5),
        validation_loss: None,
        metrics: Metrics::new(),
        cost: SaveCost::default(),
    })
}

pub(super) fn notice(generation: u64, source: &str) -> Record {
    Record::Notice {
        generation: Generation(generation),
        source: source.into(),
        deadline_s: Some(120.0),
        means: Means::Interruption,
    }
}

pub(super) fn interrupted(generation: u64) -> Record {
    Record::Interrupted {
        generation: Generation(generation),
        step: Step(12),
        committed: Some(Step(10)),
        lost_steps: 2,
        verdict: "no time".into(),
        drain: None,
        cap: None,
    }
}

pub(super) fn damaged(step: u64, generation: u64) -> Record {
    Record::Damaged { step: Step(step), generation: Generation(generation), reason: "a hole".into() }
}

pub(super) fn cleared(step: u64, generation: u64) -> Record {
    Record::Cleared { step: Step(step), generation: Generation(generation) }
}

pub(super) fn pruned(step: u64, generation: u64) -> Record {
    Record::Pruned { step: Step(step), generation: Generation(generation) }
}

pub(super) fn completed(step: u64, generation: u64) -> Record {
    Record::Completed { generation: Generation(generation), step: Step(step), loss: Some(0.5), early: None }
}

pub(super) fn failed(generation: u64) -> Record {
    Record::Failed { generation: Generation(generation), step: Step(3), reason: "loss is NaN".into() }
}

/// The state after `created` and these.
pub(super) fn state(records: impl IntoIterator<Item = Record>) -> RunState {
    let mut state = RunState::begin(&run_id(), entry("a", created())).unwrap();
    for record in records {
        state.apply(state.next(), entry("a", record)).unwrap();
    }
    state
}

pub(super) fn memory() -> Store {
    Store::open("memory://", &settings()).unwrap().folder("run")
}

pub(super) async fn opened(store: &Store, name: &str) -> Journal {
    Journal::open(store.clone(), node(name), run_id()).await.unwrap()
}

/// A run that node `a` has just created.
pub(super) async fn new_run(store: &Store) -> Journal {
    Journal::create(store.clone(), node("a"), run_id(), config()).await.unwrap()
}
