//! Gives encoded documents to their split and its writer, and counts those that are left out.
//!
//! All of it happens on one thread, in the order of the inputs, so the same documents give the same shards.

use std::collections::BTreeSet;

use super::{
    DataError,
    chat::ChatIds,
    encode::{Job, Text, split_of},
    marks::Dropped,
    prepare::PrepareEvent,
    shards::{ShardEntry, Split},
    writer::{ShardShape, ShardWriter},
};
use crate::report::human::plural;

/// What became of a text.
#[derive(Debug)]
pub(super) enum Made {
    /// Ids of a piece of text.
    Text(Vec<u32>),
    /// A chat.
    Chat(ChatIds),
    /// A chat that can't be used, for this reason.
    Refused(String),
}

/// A document that is put together from its pieces, for rows.
struct Whole {
    split: Split,
    ids: Vec<u32>,
    /// Its tokens, those beyond a row included.
    tokens: usize,
    place: String,
    /// Number of its source.
    source: u8,
}

/// Documents that are left out for one reason.
#[derive(Debug, Default)]
struct LeftAside {
    count: u64,
    first: Option<String>,
}

impl LeftAside {
    fn add(&mut self, first: impl FnOnce() -> String) {
        self.count += 1;
        self.first.get_or_insert_with(first);
    }
}

/// What a preparation wrote.
pub(super) struct Placed {
    pub train: Vec<ShardEntry>,
    pub validation: Vec<ShardEntry>,
    pub dropped: Dropped,
    pub bad_records: u64,
    /// The tokens that end an assistant's turn.
    pub ends: BTreeSet<u32>,
}

pub(super) struct Placing<'a> {
    job: &'a Job,
    shape: ShardShape,
    train: ShardWriter,
    validation: ShardWriter,
    pieces: u64,
    whole: Option<Whole>,
    ends: BTreeSet<u32>,
    too_long: LeftAside,
    without_target: LeftAside,
    refused: LeftAside,
}

impl<'a> Placing<'a> {
    pub(super) fn new(job: &'a Job, shape: ShardShape, train: ShardWriter, validation: ShardWriter) -> Self {
        Self {
            job,
            shape,
            train,
            validation,
            pieces: 0,
            whole: None,
            ends: BTreeSet::new(),
            too_long: LeftAside::default(),
            without_target: LeftAside::default(),
            refused: LeftAside::default(),
        }
    }

    /// Tokens so far.
    pub(super) fn tokens(&self) -> u64 {
        self.train.tokens() + self.validation.tokens()
    }

    fn writer(&mut self, split: Split) -> &mut ShardWriter {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
        }
    }

    /// The next text of the inputs.
    pub(super) fn place(&mut self, text: &Text, made: Made) -> Result<(), DataError> {
        let split = split_of(&text.text, self.job.settings.validation_ratio);
        match (made, self.shape.row) {
            (Made::Text(ids), None) => {
                let number = self.pieces;
                self.pieces += 1;
                let source = self.job.source_of(text);
                self.writer(split).append(number, text.continues, &ids, source)
            }
            (Made::Text(ids), Some(row)) => self.piece(text, split, &ids, row),
            (Made::Chat(chat), row) => self.chat(text, split, chat, row.unwrap_or(usize::MAX)),
            (Made::Refused(reason), _) => {
                let place = text.place(&self.job.inputs);
                if !self.job.settings.skip_bad_records {
                    return Err(DataError::Input { input: place, reason });
                }
                self.refused.add(|| format!("{place} {reason}"));
                Ok(())
            }
        }
    }

    fn chat(&mut self, text: &Text, split: Split, chat: ChatIds, row: usize) -> Result<(), DataError> {
        let ChatIds { ids, targets, ends } = chat;
        // The first token is predicted from nothing.
        if !targets.iter().skip(1).any(|target| *target) {
            self.without_target.add(|| text.place(&self.job.inputs));
            return Ok(());
        }
        if ids.len() > row {
            self.too_long.add(|| format!("{}, {} tokens", text.place(&self.job.inputs), ids.len()));
            return Ok(());
        }
        self.ends.extend(ends);
        let source = self.job.source_of(text);
        let document: Vec<_> =
            ids.into_iter().zip(targets).enumerate().map(|(at, (id, target))| (id, at == 0, target, source)).collect();
        self.writer(split).add(document.into_iter())
    }

    /// A piece of a text that goes into a row whole.
    fn piece(&mut self, text: &Text, split: Split, ids: &[u32], row: usize) -> Result<(), DataError> {
        if !text.continues {
            self.end_whole()?;
        }
        let bos_id = self.shape.bos_id;
        let whole = self.whole.get_or_insert_with(|| {
            let ids: Vec<u32> = bos_id.into_iter().collect();
            let source = self.job.source_of(text);
            Whole { split, tokens: ids.len(), ids, place: text.place(&self.job.inputs), source }
        });
        whole.tokens += ids.len();
        // Of a longer one, only its length counts.
        if whole.tokens <= row {
            whole.ids.extend(ids);
        }
        Ok(())
    }

    fn end_whole(&mut self) -> Result<(), DataError> {
        let (Some(mut whole), Some(row)) = (self.whole.take(), self.shape.row) else { return Ok(()) };
        whole.tokens += 1;
        if whole.tokens > row {
            self.too_long.add(|| format!("{}, {} tokens", whole.place, whole.tokens));
            return Ok(());
        }
        whole.ids.push(self.shape.eos_id);
        let source = whole.source;
        let document: Vec<_> =
            whole.ids.into_iter().enumerate().map(|(at, id)| (id, at == 0, at > 0, source)).collect();
        self.writer(whole.split).add(document.into_iter())
    }

    /// Writes the rest. Documents that don't fit are an error, unless they are to be left out.
    pub(super) fn finish(mut self) -> Result<Placed, DataError> {
        self.end_whole()?;
        let layout = &self.job.settings.layout;
        let inputs = || self.job.settings.inputs_in_words();
        let told = |aside: &LeftAside| aside.first.clone().unwrap_or_default();
        if self.too_long.count > 0 && !layout.drop_too_long {
            let reason = format!(
                "{} longer than a row of {} tokens, the first: {}; --too-long drop leaves them out, a larger \
                 --sequence-length takes them",
                plural(self.too_long.count, "document"),
                self.shape.row.unwrap_or_default(),
                told(&self.too_long)
            );
            return Err(DataError::Input { input: inputs(), reason });
        }
        if self.without_target.count > 0 && !layout.drop_without_target {
            let reason = format!(
                "{} without a turn of the assistant to train on, the first: {}; --without-target drop leaves them out",
                plural(self.without_target.count, "chat"),
                told(&self.without_target)
            );
            return Err(DataError::Input { input: inputs(), reason });
        }
        for (aside, what) in [
            (&self.too_long, "longer than a row"),
            (&self.without_target, "without a target"),
            (&self.refused, "refused"),
        ] {
            if aside.count > 0 {
                let message =
                    format!("{} left out, {what}, the first: {}", plural(aside.count, "document"), told(aside));
                (self.job.progress)(PrepareEvent::Warning { message });
            }
        }
        Ok(Placed {
            dropped: Dropped { too_long: self.too_long.count, without_target: self.without_target.count },
            bad_records: self.refused.count,
            ends: self.ends,
            train: self.train.finish()?,
            validation: self.validation.finish()?,
        })
    }
}
