//! The working part of a preparation: sample, train the tokenizer, encode on all cores, hand ids to the shard writers.
//!
//! Everything that decides the output happens on one thread, in the order of the inputs; the other threads only turn
//! pieces of text into ids. Memory is bounded: one batch of text and its ids, and the writers' shards.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use tokio::runtime::Handle;

use super::{
    DataError,
    documents::{self, Outcome, Piece},
    fetch::fetch,
    input::{Input, Place},
    prepare::{PrepareEvent, PrepareSettings, TokenizerSource},
    shards::{FORMAT, FileEntry, Index, Split, TokenType},
    tokenizer::TextTokenizer,
    writer::ShardWriter,
};
use crate::{
    ids::random_hex,
    layout::TOKENIZER,
    storage::{Crc64, Store},
};

/// Text given to the encoding threads at once, for each of them: enough to keep them busy, little enough to be held.
const BATCH_BYTES_PER_THREAD: usize = 1 << 20;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Documents that had any text.
    pub documents: u64,
    /// Inputs left out because they are not text.
    pub skipped: u64,
}

/// One preparation; runs on blocking threads and awaits the store through `runtime`.
pub(super) struct Job {
    pub settings: PrepareSettings,
    /// Sorted: their order is the order of the output.
    pub inputs: Vec<Input>,
    /// Where shards go.
    pub store: Store,
    pub runtime: Handle,
    /// Set from outside: end with [`DataError::Stopped`].
    pub stop: Arc<AtomicBool>,
    pub progress: Box<dyn Fn(PrepareEvent) + Send + Sync>,
}

impl Job {
    /// Writes all shards; the answer is the index without its recipe, the tokenizer's file, and what was counted.
    pub(super) fn run(self) -> Result<(Index, Bytes, Counts), DataError> {
        let tokenizer = match &self.settings.tokenizer {
            TokenizerSource::File(path) => TextTokenizer::load(path, self.settings.eos_token.as_deref())?,
            TokenizerSource::Train { vocab } => {
                let sample = self.sample(self.settings.sample_budget(*vocab))?;
                let sample_bytes = sample.iter().map(|text| text.len() as u64).sum();
                (self.progress)(PrepareEvent::TokenizerTraining { sample_bytes });
                TextTokenizer::train(*vocab, sample.iter().map(String::as_str))?
            }
        };
        let vocab_size = tokenizer.vocab_size();
        (self.progress)(PrepareEvent::TokenizerReady { vocab_size });

        let writer = |split| {
            let (store, runtime) = (self.store.clone(), self.runtime.clone());
            ShardWriter::new(split, vocab_size, tokenizer.eos_id(), self.settings.shard_tokens, store, runtime)
        };
        let mut encoder = Encoder {
            job: &self,
            tokenizer: &tokenizer,
            train: writer(Split::Train),
            validation: writer(Split::Validation),
            batch: Vec::new(),
            batch_bytes: 0,
            pieces: 0,
            text_bytes: 0,
            input_bytes: 0,
            input_bytes_total: self.inputs.iter().map(|input| input.bytes).sum(),
        };
        let mut counts = Counts::default();
        for input in &self.inputs {
            let outcome = self.read(input, &mut |piece| {
                counts.documents += u64::from(!piece.continues);
                encoder.add(piece)?;
                Ok(true)
            })?;
            if let Outcome::Skipped(reason) = outcome {
                counts.skipped += 1;
                (self.progress)(PrepareEvent::Skipped { input: input.name.clone(), reason: reason.into() });
            }
            encoder.input_bytes += input.bytes;
        }
        encoder.encode_batch()?;
        let Encoder { train, validation, .. } = encoder;
        let (train, validation) = (train.finish()?, validation.finish()?);
        self.check_splits(&train, &validation, counts)?;
        let index = Index {
            format: FORMAT,
            dtype: TokenType::for_vocabulary(vocab_size),
            vocab_size,
            eos_id: tokenizer.eos_id(),
            recipe: String::new(),
            tokenizer: FileEntry {
                file: TOKENIZER.into(),
                bytes: tokenizer.json().len() as u64,
                crc64: Crc64::of(tokenizer.json()),
            },
            train,
            validation,
        };
        Ok((index, Bytes::copy_from_slice(tokenizer.json()), counts))
    }

    fn check_splits<T>(&self, train: &[T], validation: &[T], counts: Counts) -> Result<(), DataError> {
        if train.is_empty() && validation.is_empty() {
            let reason = format!(
                "no text in {} files, {} of which were left out because they are not text",
                self.inputs.len(),
                counts.skipped
            );
            return Err(DataError::Input { input: self.settings.inputs.join(" "), reason });
        }
        if train.is_empty() {
            let reason = "all text fell to the held-out split; lower it, or give more text".into();
            return Err(DataError::Setting { setting: "--validation-ratio", reason });
        }
        if validation.is_empty() && self.settings.validation_ratio > 0.0 {
            let message =
                "the held-out split is empty, since there is little text: raise --validation-ratio to validate".into();
            (self.progress)(PrepareEvent::Warning { message });
        }
        Ok(())
    }

    fn stopped(&self) -> Result<(), DataError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(DataError::Stopped { reason: "cancelled".into() });
        }
        Ok(())
    }

    /// Text to train the tokenizer on: spread evenly over the inputs by their stored size, so that of many small files
    /// some are read and of few large ones the beginning of each.
    fn sample(&self, budget: u64) -> Result<Vec<String>, DataError> {
        let total: u64 = self.inputs.iter().map(|input| input.bytes).sum();
        let (mut passed, mut taken) = (0_u64, 0_u64);
        let mut sample = Vec::new();
        for input in &self.inputs {
            self.stopped()?;
            passed += input.bytes;
            // If everything fits, everything is taken, also where text is larger than its stored form.
            let due = if total <= budget {
                budget
            } else {
                (u128::from(budget) * u128::from(passed) / u128::from(total)) as u64
            };
            if taken >= due {
                continue;
            }
            self.read(input, &mut |piece| {
                taken += piece.text.len() as u64;
                sample.push(piece.text.to_owned());
                Ok(taken < due)
            })?;
        }
        Ok(sample)
    }

    fn read(
        &self,
        input: &Input,
        sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
    ) -> Result<Outcome, DataError> {
        match &input.place {
            Place::Local(path) => documents::read(path, &input.name, &self.settings.text_field, sink),
            Place::Remote { store, key } => {
                let scratch = Scratch::new();
                let part = u64::from(self.settings.storage.part_mib) << 20;
                self.runtime.block_on(fetch(store, key, input.bytes, part, &scratch.0, &|_| {}))?;
                documents::read(&scratch.0, &input.name, &self.settings.text_field, sink)
            }
        }
    }
}

/// A temporary file, gone when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("trainer-input-{}", random_hex(16))))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Pieces in, token shards out.
struct Encoder<'a> {
    job: &'a Job,
    tokenizer: &'a TextTokenizer,
    train: ShardWriter,
    validation: ShardWriter,
    batch: Vec<(String, bool)>,
    batch_bytes: usize,
    pieces: u64,
    text_bytes: u64,
    input_bytes: u64,
    input_bytes_total: u64,
}

impl Encoder<'_> {
    fn threads(&self) -> usize {
        match self.job.settings.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }

    fn add(&mut self, piece: Piece<'_>) -> Result<(), DataError> {
        self.batch.push((piece.text.to_owned(), piece.continues));
        self.batch_bytes += piece.text.len();
        if self.batch_bytes >= BATCH_BYTES_PER_THREAD * self.threads() { self.encode_batch() } else { Ok(()) }
    }

    /// Encodes the batch on all threads and appends it in order.
    fn encode_batch(&mut self) -> Result<(), DataError> {
        self.job.stopped()?;
        let batch = std::mem::take(&mut self.batch);
        let encoded = encode_all(self.tokenizer, &batch, self.threads())?;
        for ((text, continues), ids) in batch.iter().zip(encoded) {
            let writer = match split_of(text, self.job.settings.validation_ratio) {
                Split::Train => &mut self.train,
                Split::Validation => &mut self.validation,
            };
            writer.append(self.pieces, *continues, &ids)?;
            self.pieces += 1;
        }
        self.text_bytes += self.batch_bytes as u64;
        self.batch_bytes = 0;
        (self.job.progress)(PrepareEvent::Progress {
            input_bytes: self.input_bytes,
            input_bytes_total: self.input_bytes_total,
            text_bytes: self.text_bytes,
            tokens: self.train.tokens() + self.validation.tokens(),
        });
        Ok(())
    }
}

/// Ids of every text, in the order of the texts.
fn encode_all(tokenizer: &TextTokenizer, batch: &[(String, bool)], threads: usize) -> Result<Vec<Vec<u32>>, DataError> {
    let next = AtomicUsize::new(0);
    let encode = || -> Result<Vec<(usize, Vec<u32>)>, DataError> {
        let mut mine = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some((text, _)) = batch.get(number) else { return Ok(mine) };
            mine.push((number, tokenizer.encode(text)?));
        }
    };
    let mut all = vec![Vec::new(); batch.len()];
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(batch.len())).map(|_| scope.spawn(encode)).collect();
        for worker in workers {
            let done =
                worker.join().map_err(|_| DataError::Stopped { reason: "an encoding thread panicked".into() })??;
            for (number, ids) in done {
                all[number] = ids;
            }
        }
        Ok(all)
    })
}

/// The split of a text: held out if its hash, evenly spread over 64 bits, lies below the ratio.
fn split_of(text: &str, validation_ratio: f64) -> Split {
    // A CRC alone is linear in its input; the multiplications spread it.
    let mut hash = crc_fast::crc64_nvme(text.as_bytes());
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    // 53 bits fit a double exactly.
    let place = (hash >> 11) as f64 / (1_u64 << 53) as f64;
    if place < validation_ratio { Split::Validation } else { Split::Train }
}
