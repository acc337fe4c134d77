//! Reads a rank's sequences into tensors.

use tch::{Device, Tensor};

use crate::{
    data::{DataError, Dataset, Split},
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

/// Reads sequences, with one buffer for all of them.
#[derive(Debug)]
pub struct Batches {
    dataset: Dataset,
    /// Tokens of one sequence and the one that follows it.
    window: usize,
    buffer: Vec<i64>,
    device: Device,
}

impl Batches {
    /// From `dataset`, in sequences of `sequence_length` tokens and the one that follows.
    pub fn new(dataset: Dataset, sequence_length: u32, device: Device) -> Self {
        Self { dataset, window: sequence_length as usize + 1, buffer: Vec::new(), device }
    }

    /// The samples with these numbers as one tensor: i64 `[samples, sequence_length + 1]`.
    pub fn read(&mut self, split: Split, samples: impl ExactSizeIterator<Item = u64>) -> Result<Tensor, BatchError> {
        let count = samples.len();
        self.buffer.resize(count * self.window, 0);
        for (sample, tokens) in samples.zip(self.buffer.chunks_exact_mut(self.window)) {
            self.dataset.read_sample(split, sample, tokens)?;
        }
        let tensor = Tensor::f_from_slice(&self.buffer)
            .and_then(|flat| flat.f_view([count as i64, self.window as i64]))
            .and_then(|batch| batch.f_to_device(self.device));
        Ok(torch::tch_result("make batch", tensor)?)
    }
}
