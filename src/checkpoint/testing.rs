//! Shared by this module's tests: checkpoints of random tensors in real stores, and ways to damage them.

use bytes::Bytes;

use super::{
    join,
    manifest::{FileKind, Manifest, TrainerState},
    save::{Save, Upload, put_manifest, put_shards},
};
use crate::{
    config::{
        Cadence, CapsConfig, CheckpointConfig, CompleteAction, DataConfig, Keep, ModelConfig, ModelKind, NetworkConfig,
        NoticeConfig, OnComplete, OptimizerConfig, ParallelConfig, Precision, RestartConfig, RunConfig, ScheduleConfig,
        ScheduleKind, StorageConfig, Strategy, TrainConfig, TrainTask,
    },
    format::header::{self, Dtype},
    ids::{AttemptId, Generation, NodeId, RunId, Step, WorldSize},
    journal::{Committed, Entry, FormedReason, Metrics, Record, ResumePoint, RosterEntry, RunState, SaveCost},
    layout,
    storage::Store,
};

pub const STORAGE: StorageConfig = StorageConfig::plain(8, 8);

/// A store in a temporary folder, which lives as long as the guard.
pub fn file_store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = open_folder(folder.path());
    (folder, store)
}

pub fn open_folder(folder: &std::path::Path) -> Store {
    Store::open(&format!("file://{}", folder.display()), &STORAGE).unwrap().folder("run")
}

pub fn memory_store() -> Store {
    Store::open("memory://", &STORAGE).unwrap().folder("run")
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

/// Weights of a small model, with random bytes.
pub fn weights(seed: u64) -> Vec<Tensor> {
    let mut state = seed;
    let list: [(&str, Dtype, &[u64]); 6] = [
        ("model.embed_tokens.weight", Dtype::F32, &[64, 48]),
        ("model.layers.0.mlp.up_proj.weight", Dtype::F32, &[96, 48]),
        ("model.layers.0.input_layernorm.weight", Dtype::F32, &[48]),
        ("model.layers.1.scale", Dtype::BF16, &[3]),
        ("model.norm.weight", Dtype::F32, &[48]),
        ("position_ids", Dtype::I64, &[5]),
    ];
    let tensor = |(name, dtype, shape): (&str, Dtype, &[u64])| {
        let bytes = (0..dtype.bytes(shape).unwrap()).map(|_| random(&mut state) as u8).collect();
        Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    };
    list.into_iter().map(tensor).collect()
}

/// A whole safetensors file.
pub fn file<'a>(tensors: impl IntoIterator<Item = &'a Tensor> + Clone) -> Bytes {
    let entries = tensors.clone().into_iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice()));
    let mut bytes = header::write(entries).unwrap();
    for tensor in tensors {
        bytes.extend_from_slice(&tensor.bytes);
    }
    bytes.into()
}

pub fn config() -> RunConfig {
    RunConfig {
        store: "memory://".into(),
        workload: TrainTask {
            model: ModelConfig { kind: ModelKind::Decoder, config: serde_json::json!({}), init_from: None, lora: None },
            data: DataConfig {
                train: "x".into(),
                tokenizer: Default::default(),
                sequence_length: 256,
                validation_every: 0,
                validation_sequences: 0,
            },
            train: TrainConfig {
                steps: 2000,
                epochs: 0,
                global_batch: 32,
                max_micro_batch: 8,
                seed: 1234,
                precision: Precision::Fp32,
                activations: crate::config::Activations::Keep,
                threads: 1,
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
        notice: NoticeConfig { sources: vec![], ..NoticeConfig::default() },
        run: CapsConfig::default(),
        on_complete: OnComplete { action: CompleteAction::Exit },
        restart: RestartConfig {
            max: 1,
            same_step: 1,
            backoff: std::time::Duration::ZERO,
            hang: None,
            fruitless_starts: None,
        },
        storage: STORAGE,
        network: NetworkConfig::default(),
    }
}

/// A save of `weights(seed)` and moments, distributed over `ranks` files of each kind.
pub fn save(step: u64, generation: u64, ranks: usize, seed: u64) -> Save {
    let weights = weights(seed);
    let moments: Vec<Tensor> =
        weights.iter().map(|t| Tensor { name: format!("exp_avg.{}", t.name), ..t.clone() }).collect();
    let mut uploads = Vec::new();
    for (kind, stem, tensors) in [(FileKind::Model, "model", &weights), (FileKind::Optimizer, "optimizer", &moments)] {
        for rank in 0..ranks {
            let body = file(tensors.iter().skip(rank).step_by(ranks));
            let name = format!("{stem}-{:05}-of-{ranks:05}.safetensors", rank + 1);
            uploads.push(Upload { name, kind, body });
        }
    }
    let state = TrainerState::at(Step(step), &config().workload, std::num::NonZeroU64::new(1000).unwrap()).unwrap();
    let small = vec![
        (layout::TRAINER_STATE.to_owned(), state.to_bytes().unwrap().into()),
        (layout::MODEL_CONFIG.to_owned(), Bytes::from_static(b"{\"model_type\":\"llama\"}")),
        (layout::TOKENIZER.to_owned(), Bytes::from_static(b"{\"version\":\"1.0\"}")),
    ];
    Save {
        attempt: AttemptId::random(),
        run_id: RunId::new("run").unwrap(),
        step: Step(step),
        generation: Generation(generation),
        node: NodeId::random(),
        world_size: WorldSize(ranks as u32),
        uploads,
        small,
    }
}

/// Names of all files of a save.
pub fn expected(save: &Save) -> Vec<String> {
    let shards = save.uploads.iter().map(|upload| upload.name.clone());
    shards.chain(save.small.iter().map(|(name, _)| name.clone())).collect()
}

/// Writes a save to its end and gives the record that a journal would hold.
pub async fn commit(store: &Store, save: &Save) -> Committed {
    let receipt = put_shards(store, save, |_| {}).await.unwrap();
    let written = put_manifest(store, save, &[receipt], &expected(save)).await.unwrap();
    Committed {
        step: save.step,
        generation: save.generation,
        manifest: written.key,
        manifest_crc64: written.crc64,
        bytes: written.bytes,
        loss: Some(1.0),
        validation_loss: None,
        metrics: Metrics::new(),
        cost: SaveCost::default(),
    }
}

/// A checkpoint in `store`: its record and its manifest.
pub async fn checkpoint(store: &Store, step: u64, generation: u64, ranks: usize, seed: u64) -> (Committed, Manifest) {
    let committed = commit(store, &save(step, generation, ranks, seed)).await;
    let manifest = super::catalog::inspect(store, &committed).await.unwrap();
    (committed, manifest)
}

/// Ways to damage an object.
#[derive(Clone, Copy, Debug)]
pub enum Harm {
    Flip,
    Cut,
    Delete,
}

pub const HARMS: [Harm; 3] = [Harm::Flip, Harm::Cut, Harm::Delete];

/// Damages `name` in `folder`; gives its key.
pub async fn harm(store: &Store, folder: &str, name: &str, harm: Harm) -> String {
    let key = join(folder, name);
    let mut bytes = store.get(&key, u64::MAX).await.unwrap().to_vec();
    match harm {
        Harm::Delete => store.delete(&key).await.unwrap(),
        Harm::Flip => {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            store.put(&key, bytes.into()).await.unwrap();
        }
        Harm::Cut => {
            bytes.pop();
            store.put(&key, bytes.into()).await.unwrap();
        }
    }
    key
}

/// A record of any kind, as the next of a journal.
pub fn entry(record: Record) -> Entry {
    let (attempt, node) = (AttemptId::random(), NodeId::random());
    Entry { format: 1, attempt, at: jiff::Timestamp::UNIX_EPOCH, node, record }
}

/// The state of a run whose generation 1 began from nothing and has committed these; the records of `more` follow.
pub fn state_after(committed: Vec<Committed>, more: Vec<Record>) -> RunState {
    let run_id = RunId::new("run").unwrap();
    let created = Record::Created { run_id: run_id.clone(), config: Box::new(config()) };
    let mut state = RunState::begin(&run_id, entry(created)).unwrap();
    let records = [formed(1, None)].into_iter().chain(committed.into_iter().map(Record::Committed)).chain(more);
    for (number, record) in (1..).zip(records) {
        state.apply(number, entry(record)).unwrap();
    }
    state
}

/// [`state_after`] with nothing more.
pub fn state_of(committed: Vec<Committed>) -> RunState {
    state_after(committed, Vec::new())
}

/// A generation of one worker.
pub fn formed(generation: u64, resume: Option<(u64, u64)>) -> Record {
    Record::Formed {
        generation: Generation(generation),
        roster: vec![RosterEntry::new(NodeId::random(), 1)],
        world_size: WorldSize(1),
        resume: resume.map(|(step, generation)| ResumePoint { step: Step(step), generation: Generation(generation) }),
        overrides: Vec::new(),
        reason: FormedReason::Started,
        data: None,
        continues: None,
        gone: Vec::new(),
        joined: Vec::new(),
        why: None,
    }
}
