//! Reads a rank's sequences into tensors.

use std::ops::Range;

use tch::{Device, Tensor};

use super::Place;
use crate::{
    config::{Passes, Spread, TrainConfig},
    data::{DataError, Dataset, Marks, Sampler, Split},
    error::Result,
    model::{Batch, ModelError, Spans},
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
    /// The sequences are none that a model takes.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl crate::error::Explain for BatchError {
    fn kind(&self) -> crate::error::Kind {
        match self {
            Self::Data(error) => error.kind(),
            Self::Torch(error) => error.kind(),
            Self::Model(error) => error.kind(),
        }
    }
    fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Torch(error) => error.hint(),
            Self::Model(error) => error.hint(),
        }
    }
}

/// Reads a rank's sequences, with one set of buffers for all of them.
#[derive(Debug)]
pub struct Batches {
    dataset: Dataset,
    sampler: Sampler,
    passes: Passes,
    /// Sequences of the split for validation.
    held_out: u64,
    /// Tokens of one sequence, without the one that follows it.
    length: u32,
    buffers: Buffers,
    /// The newest one; its memory is used again.
    batch: Option<Batch>,
    device: Device,
}

#[derive(Debug, Default)]
struct Buffers {
    tokens: Vec<i64>,
    marks: Marks,
    /// Of all sequences of a batch: where documents start in each of them, one after the other.
    starts: Vec<u32>,
    /// How many documents each sequence has.
    documents: Vec<usize>,
    /// Positions with a target, in the sequences put one after the other.
    targets: Vec<i64>,
    /// Of sequences for validation: the number of each target's source.
    sources: Vec<u8>,
}

impl Buffers {
    /// Where documents start in each sequence.
    fn rows(&self) -> impl Iterator<Item = &[u32]> {
        let mut rest = self.starts.as_slice();
        self.documents.iter().map(move |&count| {
            let (row, after) = rest.split_at(count.min(rest.len()));
            rest = after;
            row
        })
    }
}

impl Batches {
    /// From `dataset`, in sequences of `sequence_length` tokens and the one that follows, in the order and the passes
    /// that `train` says. An error if the world has more ranks than a step has sequences.
    pub fn new(dataset: Dataset, sequence_length: u32, train: &TrainConfig, place: Place) -> Result<Self> {
        let sampler = Sampler::over(&dataset, Split::Train, sequence_length, train.seed)?;
        let held_out = dataset.samples(Split::Validation, sequence_length);
        let passes = Spread::new(train.global_batch, place.world, train.max_micro_batch)?.passes(place.rank);
        let (length, buffers, batch) = (sequence_length, Buffers::default(), None);
        Ok(Self { dataset, sampler, passes, held_out, length, buffers, batch, device: place.device })
    }

    /// How this rank's sequences of a step are spread over passes.
    pub fn passes(&self) -> Passes {
        self.passes
    }

    /// Sequences of the split for validation.
    pub fn held_out(&self) -> u64 {
        self.held_out
    }

    /// Targets in the sequences at these positions of the run's cursor, whichever ranks compute them.
    pub fn targets(&self, positions: Range<u64>) -> Result<u64, DataError> {
        let count = positions.end.saturating_sub(positions.start);
        if !self.dataset.has_marks() {
            return Ok(count.saturating_mul(self.length.into()));
        }
        positions.into_iter().try_fold(0, |sum: u64, position| {
            let sample = self.sampler.sample_at(position).1;
            Ok(sum + u64::from(self.dataset.targets(Split::Train, sample, self.length)?))
        })
    }

    /// The batch that was read last.
    pub fn newest(&self) -> Option<&Batch> {
        self.batch.as_ref()
    }

    /// Reads the sequences to train on at these positions of the run's cursor.
    pub fn at_positions(&mut self, positions: Range<u64>) -> Result<(), BatchError> {
        let sampler = self.sampler;
        self.read(Split::Train, positions, |position| sampler.sample_at(position).1)
    }

    /// The names of the data's sources, by number; one without a name, if it has none.
    pub fn source_names(&self) -> impl Iterator<Item = &str> {
        let names = &self.dataset.index().sources;
        let none = names.is_empty().then_some("");
        names.iter().map(String::as_str).chain(none)
    }

    /// These of `count` sequences for validation, and the number of each target's source; an empty list: the data has
    /// none. They are the first ones of their split; with sources, they are spread over all of it, since sources lie
    /// one behind the other.
    pub fn held_out_at(&mut self, samples: Range<u64>, count: u64) -> Result<(&Batch, &[u8]), BatchError> {
        let (all, spread) = (u128::from(self.held_out), !self.dataset.index().sources.is_empty());
        let place = |sample: u64| match u128::from(sample) * all / u128::from(count.max(1)) {
            // Below the number of all.
            place if spread => place as u64,
            _ => sample,
        };
        self.read(Split::Validation, samples.clone(), place)?;
        self.read_sources(samples.map(place))?;
        // There is one since it was read.
        let batch = self.batch.as_ref().ok_or(ModelError::Input { what: "batch", reason: "is missing".into() })?;
        Ok((batch, &self.buffers.sources))
    }

    /// The source of each target of the batch that was read, of these sequences.
    fn read_sources(&mut self, samples: impl Iterator<Item = u64>) -> Result<(), BatchError> {
        let Buffers { sources, targets, .. } = &mut self.buffers;
        sources.clear();
        if self.dataset.index().sources.is_empty() {
            return Ok(());
        }
        for sample in samples {
            self.dataset.read_sources(sample, self.length, sources)?;
        }
        if self.dataset.has_marks() {
            // Positions are ascending, so no source is overwritten before it is read.
            for (at, place) in targets.iter().enumerate() {
                sources[at] = sources[*place as usize];
            }
            sources.truncate(targets.len());
        }
        Ok(())
    }

    fn read(&mut self, split: Split, at: Range<u64>, sample: impl Fn(u64) -> u64) -> Result<(), BatchError> {
        let (window, buffers) = (self.length as usize + 1, &mut self.buffers);
        let count = usize::try_from(at.end.saturating_sub(at.start)).unwrap_or(usize::MAX);
        buffers.tokens.resize(count.saturating_mul(window), 0);
        for (at, tokens) in at.clone().zip(buffers.tokens.chunks_exact_mut(window)) {
            self.dataset.read_sample(split, sample(at), tokens)?;
        }
        let tensor = Tensor::f_from_slice(&buffers.tokens)
            .and_then(|flat| flat.f_view([count as i64, window as i64]))
            .and_then(|batch| batch.f_to_device(self.device));
        let tokens = torch::tch_result("make batch", tensor)?;
        if !self.dataset.has_marks() {
            self.batch = Some(Batch::plain(&tokens)?);
            return Ok(());
        }
        buffers.starts.clear();
        buffers.documents.clear();
        buffers.targets.clear();
        for (row, at) in (0_i64..).zip(at) {
            self.dataset.read_marks(split, sample(at), self.length, &mut buffers.marks)?;
            buffers.starts.extend(&buffers.marks.starts);
            buffers.documents.push(buffers.marks.starts.len());
            let places = (row * i64::from(self.length)..).zip(&buffers.marks.targets);
            buffers.targets.extend(places.filter(|(_, target)| **target).map(|(place, _)| place));
        }
        let mut spans = self.batch.take().map_or_else(Spans::whole, |batch| batch.spans);
        spans.set(buffers.rows(), self.length, self.device)?;
        self.batch = Some(Batch::marked(&tokens, &buffers.targets, spans)?);
        Ok(())
    }
}
