//! Makes batches of a rank's sequences.

use std::{ops::Range, sync::Arc};

use super::{
    Place,
    reader::{Corpus, Order, Reader, Sequences},
};
use crate::{
    config::{Passes, Spread, TrainConfig},
    data::{DataError, Dataset, Sampler, Split},
    error::Result,
    ids::Step,
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
    /// No thread could be started.
    #[error("start the thread that reads batches")]
    Thread(#[source] std::io::Error),
}

impl crate::error::Explain for BatchError {
    fn kind(&self) -> crate::error::Kind {
        match self {
            Self::Data(error) => error.kind(),
            Self::Torch(error) => error.kind(),
            Self::Model(error) => error.kind(),
            Self::Thread(_) => crate::error::Kind::Bug,
        }
    }
    fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Torch(error) => error.hint(),
            Self::Model(error) => error.hint(),
            Self::Thread(_) => None,
        }
    }
}

/// A rank's sequences. Those to train on are read ahead.
#[derive(Debug)]
pub struct Batches {
    reader: Reader,
    passes: Passes,
    /// Sequences of the split for validation.
    held_out: u64,
    /// The newest one; its memory is used again.
    batch: Option<Batch>,
    /// Of sequences for validation: the number of each target's source.
    sources: Vec<u8>,
}

impl Batches {
    /// From `dataset`, in sequences of `sequence_length` tokens and the one that follows, in the order and the passes
    /// that `train` says. An error if the world has more ranks than a step has sequences.
    pub fn new(dataset: Dataset, sequence_length: u32, train: &TrainConfig, place: Place) -> Result<Self> {
        let sampler = Sampler::over(&dataset, Split::Train, sequence_length, train.seed)?;
        let held_out = dataset.samples(Split::Validation, sequence_length);
        let source = Corpus { dataset: Arc::new(dataset), sampler, length: sequence_length, device: place.device };
        Self::of(source, held_out, train, place)
    }

    /// Those of another rank, or of another world, from the same dataset.
    pub fn of_place(&self, train: &TrainConfig, place: Place) -> Result<Self> {
        Self::of(self.reader.source().clone(), self.held_out, train, place)
    }

    fn of(source: Corpus, held_out: u64, train: &TrainConfig, place: Place) -> Result<Self> {
        let Place { rank, world, .. } = place;
        let passes = Spread::new(train.global_batch, world, train.max_micro_batch)?.passes(rank);
        let order = Order { passes, global_batch: train.global_batch, rank, world, last: Step(train.steps) };
        Ok(Self { reader: Reader::new(source, order), passes, held_out, batch: None, sources: Vec::new() })
    }

    /// Tokens of a sequence.
    pub fn length(&self) -> u32 {
        self.reader.source().length
    }

    /// How this rank's sequences of a step are spread over passes.
    pub fn passes(&self) -> Passes {
        self.passes
    }

    /// Sequences of the split for validation.
    pub fn held_out(&self) -> u64 {
        self.held_out
    }

    /// Targets in the sequences at these positions of the run's cursor, whichever ranks compute them. Of a step whose
    /// first pass is asked for next, they were counted ahead.
    pub fn targets(&mut self, positions: Range<u64>) -> Result<u64, BatchError> {
        self.reader.targets(positions)
    }

    /// The batch that was read last.
    pub fn newest(&self) -> Option<&Batch> {
        self.batch.as_ref()
    }

    /// Makes the batch of the sequences to train on at these positions of the run's cursor.
    pub fn at_positions(&mut self, positions: Range<u64>) -> Result<(), BatchError> {
        let sequences = self.reader.take(positions)?;
        self.make(&sequences)
    }

    /// The names of the data's sources, by number; one without a name, if it has none.
    pub fn source_names(&self) -> impl Iterator<Item = &str> {
        let names = &self.reader.source().dataset.index().sources;
        let none = names.is_empty().then_some("");
        names.iter().map(String::as_str).chain(none)
    }

    /// These of `count` sequences for validation, and the number of each target's source; an empty list: the data has
    /// none. They are the first ones of their split; with sources, they are spread over all of it, since sources lie
    /// one behind the other.
    pub fn held_out_at(&mut self, samples: Range<u64>, count: u64) -> Result<(&Batch, &[u8]), BatchError> {
        let source = self.reader.source();
        let (all, spread) = (u128::from(self.held_out), !source.dataset.index().sources.is_empty());
        let place = |sample: u64| match u128::from(sample) * all / u128::from(count.max(1)) {
            // Below the number of all.
            place if spread => place as u64,
            _ => sample,
        };
        let sequences = source.read(Split::Validation, samples.clone(), place)?;
        self.read_sources(samples.map(place), &sequences.targets)?;
        self.make(&sequences)?;
        // There is one since it was made.
        let batch = self.batch.as_ref().ok_or(ModelError::Input { what: "batch", reason: "is missing".into() })?;
        Ok((batch, &self.sources))
    }

    /// The source of each target of these sequences, whose targets are at the positions `targets`.
    fn read_sources(&mut self, samples: impl Iterator<Item = u64>, targets: &[i64]) -> Result<(), BatchError> {
        let Corpus { dataset, length, .. } = self.reader.source();
        let sources = &mut self.sources;
        sources.clear();
        if dataset.index().sources.is_empty() {
            return Ok(());
        }
        for sample in samples {
            dataset.read_sources(sample, *length, sources)?;
        }
        if dataset.has_marks() {
            // Positions are ascending, so no source is overwritten before it is read.
            for (at, place) in targets.iter().enumerate() {
                sources[at] = sources[*place as usize];
            }
            sources.truncate(targets.len());
        }
        Ok(())
    }

    fn make(&mut self, sequences: &Sequences) -> Result<(), BatchError> {
        let Corpus { dataset, length, device, .. } = self.reader.source();
        let tokens = torch::upload(&sequences.tokens, *device)?;
        if !dataset.has_marks() {
            self.batch = Some(Batch::plain(&tokens)?);
            return Ok(());
        }
        let mut spans = self.batch.take().map_or_else(Spans::whole, |batch| batch.spans);
        spans.set(sequences.rows(), *length, *device)?;
        self.batch = Some(Batch::marked(&tokens, &sequences.targets, spans)?);
        Ok(())
    }
}
