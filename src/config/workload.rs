//! What a run computes: the part of its configuration that the processes which compute know, and all that they know.
//!
//! Stored layout: the sections `model`, `data`, `train` and `parallel` of [`RunConfig`](super::RunConfig)'s JSON.

use serde::{Deserialize, Serialize};

use super::EarlyStopping;
use crate::ids::Step;

/// Training of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainTask {
    /// The model.
    pub model: ModelConfig,
    /// The data.
    pub data: DataConfig,
    /// The mathematics of training.
    pub train: TrainConfig,
    /// How the work is spread over workers.
    pub parallel: ParallelConfig,
}

impl TrainTask {
    /// The step after which the run is complete.
    pub const fn last_step(&self) -> Step {
        Step(self.train.steps)
    }
}

/// The model to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// The kind of model.
    pub kind: ModelKind,
    /// The Hugging Face `config.json`, whole.
    pub config: serde_json::Value,
    /// A Hugging Face model folder or URI whose weights the run starts from; `None`: random weights from `train.seed`.
    pub init_from: Option<String>,
    /// Train adapters beside these weights, which stay as they are; `None`: train all weights. Stored only if there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
}

/// Low-rank adapters (Hu et al., arXiv 2106.09685): a linear layer W computes W·x + alpha/rank · B·(A·x), and A and B
/// are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rows of A, columns of B.
    pub rank: u32,
    /// `rank` times the factor of what the adapters add.
    pub alpha: f64,
    /// The names of the linear layers that have adapters; or [`ALL_LINEAR`] alone: every one of each block.
    pub targets: Vec<String>,
    /// The files of the weights beside which the adapters are trained. Found out when the run is created; a run's
    /// adapters mean nothing beside others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub base: Vec<BaseFile>,
}

impl LoraConfig {
    /// The factor of what the adapters add.
    pub fn scale(&self) -> f64 {
        self.alpha / f64::from(self.rank)
    }
}

/// The word of `model.lora.targets` for every linear layer of each block.
pub const ALL_LINEAR: &str = "all-linear";

/// A file of the weights that a run leaves as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseFile {
    /// Its name in the folder `model.init_from`.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// CRC64-NVME of all its bytes, 16 hex digits.
    pub crc64: String,
}

/// The kinds of models that can be trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelKind {
    /// A language model of one of the families in [`crate::model`]; its `config.json` says which. It is stored under
    /// the name of the first family: earlier versions read that name, and refuse another family by its architecture.
    #[serde(rename = "llama", alias = "decoder")]
    Decoder,
    /// No language model: a task of a program that is built on this library. The [`ModelConfig`] then describes the
    /// task: see [`ModelConfig::of_task`].
    #[serde(rename = "task")]
    Task,
}

/// A task of a program that is built on this library.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnTask {
    /// Its name.
    pub name: String,
    /// Its version, found out when the run is created; 0 before.
    pub version: u32,
    /// Its settings, a JSON object: as typed, or complete once the run is created.
    pub settings: serde_json::Value,
}

impl ModelConfig {
    /// What a run that trains this task has in place of a model.
    pub fn of_task(task: &OwnTask) -> Self {
        let OwnTask { name, version, settings } = task;
        let config = serde_json::json!({ "name": name, "version": version, "settings": settings });
        Self { kind: ModelKind::Task, config, init_from: None, lora: None }
    }

    /// The task; `None`: a language model is trained. What a journal has that is no task has no name.
    pub fn task(&self) -> Option<OwnTask> {
        match self.kind {
            ModelKind::Task => Some(OwnTask::deserialize(&self.config).unwrap_or_default()),
            ModelKind::Decoder => None,
        }
    }
}

/// The source of the tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataConfig {
    /// URI of a folder made by `trainer data prepare`.
    pub train: String,
    /// How its tokenizer relates to that of `model.init_from`. Checked when the run is created.
    #[serde(default)]
    pub tokenizer: TokenizerRule,
    /// Tokens in one sequence (one sample gives this many predictions).
    pub sequence_length: u32,
    /// Validation every this many steps; 0: never.
    pub validation_every: u64,
    /// Sequences in one validation, over the whole world.
    pub validation_sequences: u32,
}

/// How the tokenizer of the data relates to that of the model folder that a run starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerRule {
    /// Their ids mean the same.
    #[default]
    Same,
    /// They are known to differ: the weights learn another vocabulary.
    Differs,
}

/// The mathematics of training. Nothing here may change on a resume unless it is named with `--set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run; 0: not worked out yet from `epochs`, which is so before a run is created and
    /// never in a journal.
    pub steps: u64,
    /// The passes over the data from which `steps` was worked out when the run was created; 0: it was given. Stored
    /// only if it was not.
    #[serde(default, skip_serializing_if = "is_none")]
    pub epochs: u32,
    /// Sequences in one optimizer step, over the whole world, whatever its size.
    pub global_batch: u32,
    /// The most sequences in one forward pass of one worker; gradients are accumulated over the rest.
    pub max_micro_batch: u32,
    /// Seed of the weights and of the sample order.
    pub seed: u64,
    /// Arithmetic of forward and backward.
    pub precision: Precision,
    /// What is kept of a forward pass. Stored only if it is not everything.
    #[serde(default, skip_serializing_if = "Activations::is_keep")]
    pub activations: Activations,
    /// Compute threads of one worker on a CPU. Part of the mathematics: sums are split over threads.
    pub threads: u32,
    /// Whether functions of one pass replace LibTorch's operations where the device has them: the same up to rounding.
    /// Stored only if so, because the runs of earlier versions keep their digits.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fused: bool,
    /// Whether operations give the same bits each time. Stored only if they need not.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub deterministic: bool,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The learning-rate schedule.
    pub schedule: ScheduleConfig,
    /// When the run ends before its last step; `None`: never. Stored only if there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_none(count: &u32) -> bool {
    *count == 0
}

const fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_yes(flag: &bool) -> bool {
    *flag
}

/// Arithmetic of forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit throughout.
    Fp32,
    /// bfloat16 matrix products; weights, gradients and moments are kept in 32 bits.
    Bf16,
}

/// What is kept of a forward pass for its backward pass. It changes no bit of a loss or a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// All that the backward pass needs.
    #[default]
    Keep,
    /// The input of each block; everything within a block is computed again.
    Block,
    /// Everything of as many of the last blocks as memory allows, and the inputs of the others.
    Auto,
}

impl Activations {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    const fn is_keep(&self) -> bool {
        matches!(self, Self::Keep)
    }
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101), decay on matrices only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The gradient's global 2-norm is scaled down to this; 0: no clipping.
    pub grad_clip: f64,
}

/// The learning-rate schedule: linear warm-up to the peak, then the given shape down to `min_lr_ratio` of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleConfig {
    /// The shape after the warm-up.
    pub kind: ScheduleKind,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// The floor, as a share of the peak.
    pub min_lr_ratio: f64,
}

/// The shape of the schedule after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Half a cosine (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
    Cosine,
    /// A straight line.
    Linear,
    /// No decay.
    Constant,
}

/// How the work is spread over workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParallelConfig {
    /// The choice between replicated and partitioned state.
    pub strategy: Strategy,
    /// Workers on one node; `None`: one per GPU, or one if there is none.
    pub nproc_per_node: Option<u32>,
    /// The device that workers compute on.
    #[serde(default)]
    pub device: Device,
    /// Size of the buckets in which gradients are reduced and weights gathered, MiB.
    pub bucket_mib: u32,
    /// Whether the nodes of one generation may compute with devices of several kinds. Stored only if they may.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mixed: bool,
    /// Whether workers may share GPUs, over Gloo: for tests. Stored only if they may.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub share_device: bool,
    /// The peak of one device at the run's precision, TFLOP/s; `None`: that of the device's kind, where it is known.
    /// Stored only if it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<u32>,
}

/// The state that is replicated, and the state that is partitioned over the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Everything replicated, gradients all-reduced.
    Ddp,
    /// Weights replicated; optimizer state, and with bf16 the fp32 weights, partitioned (ZeRO stage 1, arXiv
    /// 1910.02054).
    Zero1,
    /// Weights, gradients and optimizer state partitioned; the weights of one block after the other are gathered (ZeRO
    /// stage 3, arXiv 1910.02054).
    Shard,
}

/// The device that workers compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// GPUs if there are any, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// GPUs.
    Cuda,
}
