//! The main work of a preparation: sample, train the tokenizer, encode on all cores, pass ids to the shard writers.
//!
//! Everything that decides the output happens on one thread, in the order of the inputs; the other threads only turn
//! pieces of text into ids. Memory is bounded: one batch of text and its ids, and the writers' shards.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::runtime::Handle;

use super::{
    DataError,
    chat::{Chats, MESSAGES, NoIds},
    documents::{self, At, Outcome, Piece, Wanted},
    given::Given,
    input::{Input, Place},
    layout::{self, DocumentFormat, Prepared},
    left_out::LeftOut,
    marks::Dropped,
    placing::{Made, Placing},
    prepare::{Phase, PrepareEvent, PrepareSettings, TokenizerSource},
    remote::Remote,
    shards::{FORMAT, FORMAT_WITH_MARKS, FileEntry, Index, Split, TokenType},
    sources::Sources,
    special::Unfit,
    tokenizer::{Framing, TextTokenizer},
    writer::{ShardShape, ShardWriter},
};
use crate::{
    layout::TOKENIZER,
    storage::{Crc64, Store},
    threads,
};

/// Text given to the encoding threads at once, for each of them: enough to keep them busy, little enough to fit in
/// memory.
const BATCH_BYTES_PER_THREAD: usize = 1 << 20;
/// The interval between reports of a long step that has no progress of its own.
const TELL: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Documents with any text.
    pub documents: u64,
    /// Inputs left out because they can't be read.
    pub skipped: u64,
    /// Records left out because they can't be read.
    pub bad_records: u64,
    /// Documents left out because they are longer than a row, or have no target.
    pub dropped: Dropped,
}

/// One preparation; runs on blocking threads and awaits the store through `runtime`.
pub(super) struct Job {
    pub settings: PrepareSettings,
    /// Sorted: their order is the order of the output.
    pub inputs: Vec<Input>,
    /// Their sources.
    pub sources: Sources,
    /// The tokenizer, unless it is to be trained.
    pub given: Option<Given>,
    /// The destination of shards.
    pub store: Store,
    pub runtime: Handle,
    /// Set from outside: end with [`DataError::Stopped`].
    pub stop: Arc<AtomicBool>,
    pub progress: Box<dyn Fn(PrepareEvent) + Send + Sync>,
}

impl Job {
    /// Writes all shards; returns the index without its recipe, the tokenizer's file, and the counts.
    pub(super) fn run(self) -> Result<(Index, Bytes, Counts), DataError> {
        let part = u64::from(self.settings.storage.part_mib) << 20;
        let mut remote = Remote::new(&self.inputs, self.runtime.clone(), part, &self.stop, &*self.progress);
        let mut left_out = LeftOut::new(&self.settings, &self.inputs, &*self.progress);
        left_out.unreadable()?;
        let phase = |phase| (self.progress)(PrepareEvent::Phase { phase, seconds: 0 });
        let Prepared { tokenizer, framing, chats } = match (&self.given, &self.settings.tokenizer) {
            (Some(given), _) => layout::load(given, &self.settings)?,
            (None, TokenizerSource::Train { vocab }) => {
                phase(Phase::Sampling);
                let sample = self.sample(self.settings.sample_budget(*vocab), &mut remote, &mut left_out)?;
                let sample_bytes = sample.iter().map(|text| text.len() as u64).sum();
                phase(Phase::TokenizerTraining);
                (self.progress)(PrepareEvent::TokenizerTraining { sample_bytes });
                let tokenizer = self.telling(Phase::TokenizerTraining, || {
                    TextTokenizer::train(*vocab, sample.iter().map(String::as_str))
                })?;
                Prepared { tokenizer, framing: Framing::default(), chats: None }
            }
            (None, _) => return Err(DataError::Stopped { reason: "the tokenizer was not read".into() }),
        };
        let vocab_size = tokenizer.vocab_size();
        (self.progress)(PrepareEvent::TokenizerReady { vocab_size });

        let shape = ShardShape {
            vocab_size,
            eos_id: tokenizer.eos_id(),
            bos_id: framing.bos_id,
            shard_tokens: self.settings.shard_tokens,
            marks: self.settings.layout.in_rows() || self.settings.layout.apart,
            sources: !self.sources.names.is_empty(),
            // A row and the token that follows its inputs.
            row: self.settings.layout.sequence_length.map(|length| length as usize + 1),
        };
        let writer = |split| ShardWriter::new(split, shape, self.store.clone(), self.runtime.clone());
        let mut encoder = Encoder {
            job: &self,
            tokenizer: &tokenizer,
            chats: chats.as_ref(),
            placing: Placing::new(&self, shape, writer(Split::Train), writer(Split::Validation)),
            batch: Vec::new(),
            batch_bytes: 0,
            input: 0,
            text_bytes: 0,
            input_bytes: 0,
            input_bytes_total: self.inputs.iter().map(|input| input.bytes).sum(),
        };
        phase(Phase::Encoding);
        let mut counts = Counts::default();
        for (number, input) in self.inputs.iter().enumerate() {
            if !left_out.contains(number) {
                encoder.input = number;
                let outcome = self.read(number, &mut remote, true, &mut |piece| {
                    counts.documents += u64::from(!piece.continues);
                    encoder.add(piece)?;
                    Ok(true)
                })?;
                remote.done(number, false);
                left_out.add(number, outcome)?;
            }
            encoder.input_bytes += input.bytes;
        }
        encoder.encode_batch()?;
        phase(Phase::Writing);
        (counts.skipped, counts.bad_records) = left_out.finish();
        let last = encoder.progress();
        let placed = encoder.placing.finish()?;
        counts.dropped = placed.dropped;
        counts.bad_records += placed.bad_records;
        let (train, validation) = (placed.train, placed.validation);
        (self.progress)(last);
        self.check_splits(&train, &validation, counts)?;
        let mut documents = layout::documents(self.given.as_ref(), &self.settings, framing);
        if let Some(documents) = &mut documents {
            documents.dropped = placed.dropped;
            documents.chat = chats.as_ref().map(|chats| chats.rendering(placed.ends));
        }
        let index = Index {
            format: if documents.is_some() { FORMAT_WITH_MARKS } else { FORMAT },
            dtype: TokenType::for_vocabulary(vocab_size),
            vocab_size,
            eos_id: tokenizer.eos_id(),
            recipe: String::new(),
            tokenizer: FileEntry {
                file: TOKENIZER.into(),
                bytes: tokenizer.json().len() as u64,
                crc64: Crc64::of(tokenizer.json()),
            },
            documents,
            sources: self.sources.names.clone(),
            train,
            validation,
        };
        Ok((index, Bytes::copy_from_slice(tokenizer.json()), counts))
    }

    fn check_splits<T>(&self, train: &[T], validation: &[T], counts: Counts) -> Result<(), DataError> {
        if train.is_empty() && validation.is_empty() {
            let reason = format!(
                "no text in {} files, {} of which were left out; {} records were left out",
                self.inputs.len(),
                counts.skipped,
                counts.bad_records
            );
            return Err(DataError::Input { input: self.settings.inputs_in_words(), reason });
        }
        if train.is_empty() {
            let reason = "the validation split took all the text; lower --validation-ratio, or give more text".into();
            return Err(DataError::Setting { setting: "--validation-ratio", reason });
        }
        if validation.is_empty() && self.settings.validation_ratio > 0.0 {
            let message =
                "the validation split is empty, since there is little text: raise --validation-ratio to validate"
                    .into();
            (self.progress)(PrepareEvent::Warning { message });
        }
        Ok(())
    }

    /// The number of the source that a text comes from.
    pub(super) fn source_of(&self, text: &Text) -> u8 {
        self.sources.of_inputs.get(text.input).copied().unwrap_or(0)
    }

    pub(super) fn stopped(&self) -> Result<(), DataError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(DataError::Stopped { reason: "cancelled".into() });
        }
        Ok(())
    }

    /// Text to train the tokenizer on: spread evenly over the inputs by their stored size, so that it comes from some
    /// of many small files, and from the beginning of each of a few large ones.
    fn sample(
        &self,
        budget: u64,
        remote: &mut Remote<'_>,
        left_out: &mut LeftOut<'_>,
    ) -> Result<Vec<String>, DataError> {
        let total: u64 = self.inputs.iter().map(|input| input.bytes).sum();
        let (mut passed, mut taken) = (0_u64, 0_u64);
        let mut sample = Vec::new();
        let mut told = Instant::now();
        for (number, input) in self.inputs.iter().enumerate() {
            self.stopped()?;
            if told.elapsed() >= Duration::from_secs(1) {
                told = Instant::now();
                (self.progress)(PrepareEvent::Sampling {
                    input_bytes: passed,
                    input_bytes_total: total,
                    sample_bytes: taken,
                });
            }
            passed += input.bytes;
            // If everything fits, everything is used, even if the text is larger than the files.
            let due = if total <= budget {
                budget
            } else {
                (u128::from(budget) * u128::from(passed) / u128::from(total)) as u64
            };
            if taken >= due || left_out.contains(number) {
                continue;
            }
            let before = (sample.len(), taken);
            let outcome = self.read(number, remote, false, &mut |piece| {
                taken += piece.text.len() as u64;
                sample.push(piece.text.to_owned());
                Ok(taken < due)
            })?;
            remote.done(number, true);
            if matches!(outcome, Outcome::Skipped(_)) {
                sample.truncate(before.0);
                taken = before.1;
                left_out.add(number, outcome)?;
            }
        }
        Ok(sample)
    }

    /// `to_its_end`: a broken input that is left out must not have contributed any text.
    fn read(
        &self,
        number: usize,
        remote: &mut Remote<'_>,
        to_its_end: bool,
        sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
    ) -> Result<Outcome, DataError> {
        let input = &self.inputs[number];
        let chats = self.settings.layout.format == DocumentFormat::Chat;
        let field = if chats { MESSAGES } else { self.settings.text_field.as_str() };
        let wanted = Wanted { field, skip_bad_records: self.settings.skip_bad_records, chats };
        let path = match &input.place {
            Place::Local(path) => path.clone(),
            Place::Remote { .. } => remote.path(number)?,
            Place::Unreadable(reason) => return Ok(Outcome::Skipped(reason.clone())),
        };
        let whole = if self.settings.skip_unreadable && to_its_end {
            documents::look_through(&path, &input.name, &wanted)
        } else {
            Ok(())
        };
        let read = whole.and_then(|()| documents::read(&path, &input.name, &wanted, sink));
        // First of all, since a file that changed may seem broken.
        input.unchanged()?;
        match read {
            Err(DataError::Broken { reason, .. }) if self.settings.skip_unreadable => Ok(Outcome::Skipped(reason)),
            Err(DataError::Io { doing: "open", source, .. })
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                Ok(Outcome::Skipped(format!("can't be opened: {source}")))
            }
            read => read,
        }
    }

    /// Does `work`, and reports every few seconds that it continues.
    fn telling<T>(&self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let (ended, has_ended) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            // Without a thread for it, nothing is told.
            let _ = std::thread::Builder::new().spawn_scoped(scope, move || {
                while has_ended.recv_timeout(TELL) == Err(RecvTimeoutError::Timeout) {
                    (self.progress)(PrepareEvent::Phase { phase, seconds: began.elapsed().as_secs() });
                }
            });
            let done = work();
            drop(ended);
            done
        })
    }
}

/// A piece of text, or the record of a chat, that waits to be encoded.
pub(super) struct Text {
    pub text: String,
    pub continues: bool,
    /// Number of its input.
    pub input: usize,
    pub at: At,
}

impl Text {
    /// Its place in its file.
    pub(super) fn place(&self, inputs: &[Input]) -> String {
        self.at.behind("", inputs.get(self.input).map_or("", |input| &input.name))
    }
}

/// Pieces in, token shards out.
struct Encoder<'a> {
    job: &'a Job,
    tokenizer: &'a TextTokenizer,
    chats: Option<&'a Chats>,
    placing: Placing<'a>,
    batch: Vec<Text>,
    batch_bytes: usize,
    /// Number of the input that is being read.
    input: usize,
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
        let Piece { text, continues, at } = piece;
        self.batch.push(Text { text: text.to_owned(), continues, input: self.input, at });
        self.batch_bytes += piece.text.len();
        if self.batch_bytes >= BATCH_BYTES_PER_THREAD * self.threads() { self.encode_batch() } else { Ok(()) }
    }

    /// Encodes the batch on all threads and appends it in order.
    fn encode_batch(&mut self) -> Result<(), DataError> {
        self.job.stopped()?;
        let batch = std::mem::take(&mut self.batch);
        let made = encode_all(self.tokenizer, self.chats, &batch, &self.job.inputs, self.threads())?;
        batch.iter().zip(made).try_for_each(|(text, made)| self.placing.place(text, made))?;
        self.text_bytes += self.batch_bytes as u64;
        self.batch_bytes = 0;
        (self.job.progress)(self.progress());
        Ok(())
    }

    fn progress(&self) -> PrepareEvent {
        PrepareEvent::Progress {
            input_bytes: self.input_bytes,
            input_bytes_total: self.input_bytes_total,
            text_bytes: self.text_bytes,
            tokens: self.placing.tokens(),
        }
    }
}

/// What becomes of every text, in the order of the texts.
fn encode_all(
    tokenizer: &TextTokenizer,
    chats: Option<&Chats>,
    batch: &[Text],
    inputs: &[Input],
    threads: usize,
) -> Result<Vec<Made>, DataError> {
    let next = AtomicUsize::new(0);
    let make = |text: &Text| match chats {
        None => tokenizer.encode_text(&text.text).map(Made::Text).map_err(|unfit| refuse(text, unfit, inputs)),
        Some(chats) => match chats.encode(tokenizer, &text.text) {
            Ok(chat) => Ok(Made::Chat(chat)),
            Err(NoIds::Chat(reason)) => Ok(Made::Refused(reason)),
            Err(NoIds::Date) => Err(DataError::Setting {
                setting: "--date",
                reason: "is missing: the chat template asks for today's date, and the same chats shall give the same \
                         dataset; name a day, such as --date 2026-01-31"
                    .into(),
            }),
        },
    };
    let encode = || -> Result<Vec<(usize, Made)>, DataError> {
        let mut mine = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(text) = batch.get(number) else { return Ok(mine) };
            mine.push((number, make(text)?));
        }
    };
    let mut all: Vec<Made> = batch.iter().map(|_| Made::Text(Vec::new())).collect();
    for done in threads::together(threads.min(batch.len()), encode) {
        let done = done.map_err(|_| DataError::Stopped { reason: "an encoding thread panicked".into() })??;
        for (number, made) in done {
            all[number] = made;
        }
    }
    Ok(all)
}

/// The error that names the text's place in its file.
fn refuse(text: &Text, unfit: Unfit, inputs: &[Input]) -> DataError {
    let name = inputs.get(text.input).map_or("", |input| &input.name);
    let (before, reason) = match unfit {
        Unfit::Special { token, at } => (
            text.text.get(..at).unwrap_or_default(),
            format!(
                "the text holds {token:?}, a special token of this tokenizer, which has no other form for it; change \
                 the text, or take another tokenizer or --eos-token"
            ),
        ),
        Unfit::Unknown { part, at } => (
            text.text.get(..at).unwrap_or_default(),
            format!(
                "the text holds {part:?}, for which this tokenizer has no token, so that it would be lost; take a \
                 tokenizer with an unk_token or over bytes, such as train:4096"
            ),
        ),
        Unfit::Refused(reason) => ("", format!("the tokenizer refuses the text: {reason}")),
    };
    DataError::Input { input: text.at.behind(before, name), reason }
}

/// The split of a text: validation if its hash, evenly distributed over 64 bits, is below the ratio.
pub(super) fn split_of(text: &str, validation_ratio: f64) -> Split {
    // A CRC alone is linear in its input; the multiplications spread it.
    let mut hash = crc_fast::crc64_nvme(text.as_bytes());
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    // 53 bits fit a double exactly.
    let place = (hash >> 11) as f64 / (1_u64 << 53) as f64;
    if place < validation_ratio { Split::Validation } else { Split::Train }
}
