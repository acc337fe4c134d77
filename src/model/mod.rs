//! The models that can be trained.
//!
//! A model is described by a Hugging Face `config.json`, whose architecture is one of the `families`, and holds its
//! parameters as an ordered list under their Hugging Face names: the order is the order of registration with the
//! gradient reducer, the names are those in checkpoints.
//!
//! A forward pass is embed → blocks → head. Each of these [`Stage`]s reads the parameters that are listed for it and
//! the vectors of the stage before, and nothing else: so a strategy may have the weights of one stage at a time.
//!
//! Invariants: a built model's parameters are fp32 leaf tensors at any [`Precision`]; with [`Precision::Bf16`] they are
//! cast where they are used, so that gradients come out in fp32. Where a strategy keeps the fp32 weights elsewhere, a
//! [`Weight`] has bf16 values of its own beside a leaf that only receives the gradient;
//! the arithmetic is the same to the last bit. A frozen parameter has values and nothing else. A fresh model has the
//! same bits on every machine and device, and all of it is trained: see [`random`]. [`parameter_shapes`] and [`build`]
//! agree by construction. Adapters ([`lora`]) come after a model's own parameters.
//!
//! A model keeps no state between calls beyond its parameters (and a table of constants that grows on demand): a call
//! that failed or was cancelled leaves nothing behind.
#![doc = include_str!("README.md")]

pub mod decoder;
mod families;
pub mod flops;
mod folder;
pub mod generate;
mod init;
mod keys;
pub mod lora;
mod loss;
pub mod memory;
pub mod random;
mod rope;
mod spans;
#[cfg(test)]
mod spans_tests;
mod weight;

use tch::{Device, TchError, Tensor};

pub use self::{
    decoder::config::{Context, DecoderConfig},
    folder::from_folder,
    spans::{Batch, Spans, Targets},
    weight::{Parameter, Stage, Weight},
};
use crate::{
    config::{ModelKind, Precision},
    error::{Explain, Kind},
    shortage::is_out_of_memory,
    torch::fused::Fused,
};

/// The errors of a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The description is of another architecture.
    #[error("config.json describes {found}, which {reason}")]
    Architecture {
        /// Its own name.
        found: String,
        /// Why it can't be trained.
        reason: &'static str,
    },
    /// A value in the description can't be used.
    #[error("config.json: {key} {reason}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// An argument does not fit the model.
    #[error("{what} {reason}")]
    Input {
        /// The argument.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no language model: the run trains a program's own task.
    #[error("the run trains task {name:?}, which is no language model")]
    Task {
        /// The task's name.
        name: String,
    },
    /// The model's own lists disagree.
    #[error("model has no parameter {name}")]
    NoParameter {
        /// The name.
        name: String,
    },
    /// LibTorch refused.
    #[error("{doing}")]
    Torch {
        /// The operation.
        doing: &'static str,
        /// The cause.
        #[source]
        source: TchError,
    },
}

impl ModelError {
    pub(crate) fn config(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { key: key.into(), reason: reason.into() }
    }

    fn out_of_memory(&self) -> bool {
        matches!(self, Self::Torch { source, .. } if is_out_of_memory(&source.to_string()))
    }
}

impl Explain for ModelError {
    fn kind(&self) -> Kind {
        match self {
            Self::Architecture { .. } | Self::Config { .. } | Self::Input { .. } | Self::Task { .. } => Kind::Config,
            Self::Torch { .. } if self.out_of_memory() => Kind::Config,
            Self::NoParameter { .. } | Self::Torch { .. } => Kind::Bug,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Architecture { .. } => {
                Some(format!("use a config.json whose \"architectures\" is one of {}", families::names()))
            }
            Self::Task { .. } => Some(
                "generate, data prepare and LoRA are for language models; trainer export writes a task's weights"
                    .into(),
            ),
            Self::Torch { .. } if self.out_of_memory() => {
                Some("lower train.max_micro_batch: --set train.max_micro_batch=N".into())
            }
            _ => None,
        }
    }
}

/// Names the operation that LibTorch refused.
pub(crate) trait Doing<T> {
    /// `doing` is a verb phrase: "compute attention".
    fn doing(self, doing: &'static str) -> Result<T, ModelError>;
}

impl<T> Doing<T> for Result<T, TchError> {
    fn doing(self, doing: &'static str) -> Result<T, ModelError> {
        self.map_err(|source| ModelError::Torch { doing, source })
    }
}

/// The positions whose scores are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Every one: `[batch, T, vocabulary]`.
    All,
    /// The last one: `[batch, vocabulary]`.
    Last,
}

/// Named parameters on one device: all that a strategy, a state and a checkpoint need to know of a model.
pub trait Leaves: Send {
    /// Every parameter, in registration order. The tensors are shared with the model: writing into
    /// [`Parameter::values`] (without recording gradients) changes it.
    fn parameters(&self) -> &[Parameter];

    /// Replaces all parameters by others, in their order and with their extents: these hold the values for computing
    /// from here on, and say what is trained.
    fn set_parameters(&mut self, weights: Vec<Weight>) -> Result<(), ModelError>;

    /// The device that it computes on.
    fn device(&self) -> Device;

    /// The first values of a parameter that has none yet ([`build_bare`]), by its number: fp32, on the CPU. `None`: it
    /// has its values.
    fn first_values(&self, _parameter: usize) -> Result<Option<Tensor>, ModelError> {
        Ok(None)
    }

    /// Whether each weight is used in the type of the matrix products alone: then copies that are rounded to that type
    /// give the same results.
    fn needs_rounded_weights_only(&self) -> bool {
        false
    }
}

/// A language model.
pub trait Model: Leaves {
    /// Adds adapters ([`lora`]) to linear layers; `scale` is the factor of what they add.
    fn adapt(&mut self, adapters: Vec<Parameter>, scale: f64) -> Result<(), ModelError>;

    /// Computes by these functions in place of LibTorch's operations: the same up to rounding. At first there are none.
    fn use_fused(&mut self, functions: Fused);

    /// Whether a loss adds the gradient of the output layer's weights to what they have, in a backward pass that
    /// accumulates all gradients, and does not hand it to autograd.
    fn adds_in_place(&self) -> bool;

    /// The first stage: vectors `[batch, T, width]` for i64 `tokens` `[batch, T]`.
    fn embed(&self, tokens: &Tensor) -> Result<Tensor, ModelError>;

    /// The number of blocks.
    fn blocks(&self) -> usize;

    /// One block, from 0 to [`Model::blocks`] - 1: vectors for those of the block before. Attention and positions stay
    /// within the documents that `spans` lists.
    fn block(&self, index: usize, x: Tensor, spans: &Spans) -> Result<Tensor, ModelError>;

    /// The last stage when training: mean cross entropy (nats per token) over `targets` for the last block's vectors.
    /// Without any target it is 0 with gradients of zero, so that a rank still takes part in the reduction.
    fn head_loss(&self, x: Tensor, targets: &Targets) -> Result<Tensor, ModelError>;

    /// The cross entropy (nats) of each of `targets`, in their order: fp32 `[count]`. Gradients are not recorded.
    fn head_losses(&self, x: Tensor, targets: &Targets) -> Result<Tensor, ModelError>;

    /// The last stage otherwise: fp32 scores of the next token for the last block's vectors.
    fn head_scores(&self, x: Tensor, positions: Positions) -> Result<Tensor, ModelError>;

    /// The name of LibTorch's kernel that computes attention over `length` tokens: for logs. `None`: not known.
    fn attention_kernel(&self, _length: u32) -> Result<Option<&'static str>, ModelError> {
        Ok(None)
    }

    /// The number of tokens in the vocabulary.
    fn vocab_size(&self) -> u32;

    /// The most positions in one sequence.
    fn max_sequence_length(&self) -> u32;

    /// The last block's vectors for `tokens` `[batch, T]`.
    fn vectors(&self, tokens: &Tensor, spans: &Spans) -> Result<Tensor, ModelError> {
        (0..self.blocks()).try_fold(self.embed(tokens)?, |x, index| self.block(index, x, spans))
    }

    /// Mean cross entropy (nats per token) over the batch's targets: an fp32 scalar, 0 without any.
    ///
    /// T is at most [`Model::max_sequence_length`]. `backward()` may be called on the result once; if gradients are not
    /// recorded, nothing is kept for it.
    fn batch_loss(&self, batch: &Batch) -> Result<Tensor, ModelError> {
        self.head_loss(self.vectors(&batch.inputs, &batch.spans)?, &batch.targets)
    }

    /// The cross entropy (nats) of each of the batch's targets, in their order: fp32 `[count]`.
    fn target_losses(&self, batch: &Batch) -> Result<Tensor, ModelError> {
        self.head_losses(self.vectors(&batch.inputs, &batch.spans)?, &batch.targets)
    }

    /// [`Model::batch_loss`] of plain text, i64 `[batch, T + 1]`: see [`Batch::plain`].
    fn loss(&self, tokens: &Tensor) -> Result<Tensor, ModelError> {
        self.batch_loss(&Batch::plain(tokens)?)
    }

    /// Scores of the next token at every position: fp32 `[batch, T, vocabulary]` for i64 `tokens` `[batch, T]`.
    fn logits(&self, tokens: &Tensor) -> Result<Tensor, ModelError> {
        self.head_scores(self.vectors(tokens, &Spans::whole())?, Positions::All)
    }

    /// Scores after the last position only: fp32 `[batch, vocabulary]` for i64 `tokens` `[batch, T]`.
    fn last_logits(&self, tokens: &Tensor) -> Result<Tensor, ModelError> {
        self.head_scores(self.vectors(tokens, &Spans::whole())?, Positions::Last)
    }
}

/// The settings for building a model, besides its description.
#[derive(Clone, Copy, Debug)]
pub struct BuildSettings {
    /// The device for parameters and computation.
    pub device: Device,
    /// Arithmetic of forward and backward.
    pub precision: Precision,
    /// Seed of the initial weights; `None`: their values are arbitrary, because all of them are about to be loaded.
    pub seed: Option<u64>,
}

/// Builds a model with fresh weights.
pub fn build(
    kind: ModelKind,
    config: &serde_json::Value,
    settings: &BuildSettings,
) -> Result<Box<dyn Model>, ModelError> {
    Ok(Box::new(decoder::Decoder::new(describe(kind, config)?, settings)?))
}

/// The same with parameters that have extents and no values, for a strategy that keeps a part of each: the whole model
/// is never in the device's memory. [`Leaves::first_values`] has the values that [`build`] gives.
pub fn build_bare(
    kind: ModelKind,
    config: &serde_json::Value,
    settings: &BuildSettings,
) -> Result<Box<dyn Model>, ModelError> {
    Ok(Box::new(decoder::Decoder::bare(describe(kind, config)?, settings)?))
}

/// Reads and checks a description.
pub fn describe(kind: ModelKind, config: &serde_json::Value) -> Result<DecoderConfig, ModelError> {
    match kind {
        ModelKind::Decoder => families::read(config),
        ModelKind::Task => Err(is_a_task(config)),
    }
}

/// What everything that needs a language model says of a program's own task.
fn is_a_task(config: &serde_json::Value) -> ModelError {
    ModelError::Task { name: config["name"].as_str().unwrap_or_default().to_owned() }
}

/// The same with all parameters frozen and to be loaded: the base of [`lora`]'s adapters.
fn build_base(
    kind: ModelKind,
    config: &serde_json::Value,
    settings: &BuildSettings,
) -> Result<Box<dyn Model>, ModelError> {
    let make = |_: &str, shape: &[u64]| lora::base(shape, settings);
    Ok(Box::new(decoder::Decoder::with(describe(kind, config)?, settings, make)?))
}

/// Names and shapes of the parameters that [`build`] would make, in the same order; makes no tensor.
pub fn parameter_shapes(kind: ModelKind, config: &serde_json::Value) -> Result<Vec<(String, Vec<u64>)>, ModelError> {
    Ok(describe(kind, config)?.parameter_shapes())
}

/// Checks the description of a run that is about to be created: a key that is neither computed nor known to be harmless
/// is refused by name.
pub fn check_description(kind: ModelKind, config: &serde_json::Value) -> Result<(), ModelError> {
    match kind {
        ModelKind::Decoder => families::check::check(config),
        ModelKind::Task => Err(is_a_task(config)),
    }
}

/// The output layer's and the token embedding's names, and whether they are one.
pub fn head(kind: ModelKind, config: &serde_json::Value) -> Result<(&'static str, &'static str, bool), ModelError> {
    let tied = describe(kind, config)?.tie_word_embeddings;
    Ok((decoder::config::OUTPUT, decoder::config::EMBEDDING, tied))
}

/// The longest sequence, from the description alone.
pub fn context(kind: ModelKind, config: &serde_json::Value) -> Result<Context, ModelError> {
    Ok(describe(kind, config)?.context)
}

/// The number of tokens in the vocabulary, from the description alone.
pub fn vocab_size(kind: ModelKind, config: &serde_json::Value) -> Result<u32, ModelError> {
    Ok(describe(kind, config)?.vocab_size)
}
