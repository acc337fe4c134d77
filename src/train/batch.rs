//! Reads a rank's sequences into tensors.

use std::ops::Range;

use tch::{Device, Tensor};

use super::Place;
use crate::{
    config::{Passes, Spread, TrainConfig},
    data::{DataError, Dataset, Sampler, Split},
    error::Result,
    torch::{self, TorchError},
};

/// Why a batch could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// Reading tokens failed.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Making the tensor failed.
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl crate::error::Explain for BatchError {
    fn kind(&self) -> crate::error::Kind {
        match self {
            Self::Data(error) => error.kind(),
            Self::Torch(error) => error.kind(),
        }
    }
    fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Torch(error) => error.hint(),
        }
    }
}

/// Reads a rank's sequences, with one buffer for all of them.
#[derive(Debug)]
pub struct Batches {
    dataset: Dataset,
    sampler: Sampler,
    passes: Passes,
    /// Sequences of the split for validation.
    held_out: u64,
    /// Tokens of one sequence and the one that follows it.
    window: usize,
    buffer: Vec<i64>,
    device: Device,
}

impl Batches {
    /// From `dataset`, in sequences of `sequence_length` tokens and the one that follows, in the order and the passes
    /// that `train` says. An error if the world has more ranks than a step has sequences.
    pub fn new(dataset: Dataset, sequence_length: u32, train: &TrainConfig, place: Place) -> Result<Self> {
        let sampler = Sampler::over(&dataset, Split::Train, sequence_length, train.seed)?;
        let held_out = dataset.samples(Split::Validation, sequence_length);
        let passes = Spread::new(train.global_batch, place.world, train.max_micro_batch)?.passes(place.rank);
        let window = sequence_length as usize + 1;
        Ok(Self { dataset, sampler, passes, held_out, window, buffer: Vec::new(), device: place.device })
    }

    /// How this rank's sequences of a step are spread over passes.
    pub fn passes(&self) -> Passes {
        self.passes
    }

    /// Sequences of the split for validation.
    pub fn held_out(&self) -> u64 {
        self.held_out
    }

    /// The sequences to train on at these positions of the run's cursor, as one tensor: i64 `[positions,
    /// sequence_length + 1]`.
    pub fn at_positions(&mut self, positions: Range<u64>) -> Result<Tensor, BatchError> {
        let sampler = self.sampler;
        self.read(Split::Train, positions, |position| sampler.sample_at(position).1)
    }

    /// These sequences of the split for validation, likewise.
    pub fn held_out_at(&mut self, samples: Range<u64>) -> Result<Tensor, BatchError> {
        self.read(Split::Validation, samples, |sample| sample)
    }

    fn read(&mut self, split: Split, at: Range<u64>, sample: impl Fn(u64) -> u64) -> Result<Tensor, BatchError> {
        let count = usize::try_from(at.end.saturating_sub(at.start)).unwrap_or(usize::MAX);
        self.buffer.resize(count.saturating_mul(self.window), 0);
        for (at, tokens) in at.zip(self.buffer.chunks_exact_mut(self.window)) {
            self.dataset.read_sample(split, sample(at), tokens)?;
        }
        let tensor = Tensor::f_from_slice(&self.buffer)
            .and_then(|flat| flat.f_view([count as i64, self.window as i64]))
            .and_then(|batch| batch.f_to_device(self.device));
        Ok(torch::tch_result("make batch", tensor)?)
    }
}
