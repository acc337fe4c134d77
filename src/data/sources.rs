//! Where documents come from: the names that a person gives to inputs, so that the held-out loss is known of each.
//!
//! # Stored layout
//! The index lists the names; a source's number is its place in the list. Beside each shard for validation lies a file
//! with one byte for each of its tokens: the number of the source of the token's document. A row may hold documents of
//! several sources, so tokens are what is counted. Training shards have no such file: nothing is measured by them.
//!
//! *Crash, retry, cancel:* as for the shards, whose index names these files too ([`mod@super::prepare`]).

use std::path::Path;

use super::{
    DataError, Dataset, Split,
    input::{self, Input},
    prepare::PrepareSettings,
    shards::ShardEntry,
};

/// The most sources of a dataset.
pub const MAX_SOURCES: usize = 64;
/// The longest name of a source, bytes.
const MAX_NAME: usize = 64;

/// Whether a source may have this name: one that stands in a table, in a record and on a command line.
pub(super) fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed)
}

/// Checks the names in an index.
pub(super) fn check(names: &[String]) -> Result<(), String> {
    if names.len() > MAX_SOURCES {
        return Err(format!("{} sources are more than {MAX_SOURCES}", names.len()));
    }
    for (number, name) in names.iter().enumerate() {
        if !is_name(name) || names[..number].contains(name) {
            return Err(format!("{name:?} is no name of a source, or there twice"));
        }
    }
    Ok(())
}

/// Checks a shard's entry; returns the length of its sources' file.
pub(super) fn check_entry(shard: &ShardEntry, wanted: bool, name: &str) -> Result<u64, String> {
    match &shard.sources {
        None if !wanted => Ok(0),
        Some(file) if wanted && file.file == name && file.bytes == shard.tokens => Ok(file.bytes),
        _ => Err(format!("{name} is missing, is named otherwise, or has not one byte for each token")),
    }
}

/// The name of the source of inputs without a name, beside others that have one.
pub const OTHER: &str = "other";

/// The sources of the inputs of a preparation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sources {
    /// Their names, sorted.
    pub names: Vec<String>,
    /// The number of the source of each input; empty without sources.
    pub of_inputs: Vec<u8>,
}

impl Sources {
    /// What of it decides the output, for the recipe; nothing without sources.
    pub(super) fn recipe(&self) -> String {
        if self.names.is_empty() { String::new() } else { format!("{self:?}\n") }
    }
}

/// Refuses names that no source may have.
pub(super) fn check_settings(settings: &PrepareSettings) -> Result<(), DataError> {
    let refuse = |reason: String| Err(DataError::Setting { setting: "--source", reason });
    for (name, input) in &settings.sources {
        if !is_name(name) {
            return refuse(format!("{name:?} is no name: write letters, digits, '-', '_' and '.', at most {MAX_NAME}"));
        }
        if input.is_empty() {
            return refuse(format!("{name}= names no input; write {name}='data/{name}/*.jsonl', for example"));
        }
    }
    let names = names(settings);
    match names.len() {
        0..=MAX_SOURCES => Ok(()),
        many => refuse(format!("{many} sources are more than {MAX_SOURCES}: give some of them one name")),
    }
}

/// The names of all sources, sorted; none, if no input has a name.
fn names(settings: &PrepareSettings) -> Vec<String> {
    if settings.sources.is_empty() {
        return Vec::new();
    }
    let other = (!settings.inputs.is_empty()).then(|| OTHER.to_owned());
    let mut names: Vec<String> = settings.sources.iter().map(|(name, _)| name.clone()).chain(other).collect();
    names.sort();
    names.dedup();
    names
}

/// Finds all inputs, sorted, and the source of each.
pub(super) async fn find(settings: &PrepareSettings, out: Option<&Path>) -> Result<(Vec<Input>, Sources), DataError> {
    let names = names(settings);
    if names.is_empty() {
        return Ok((input::find(&settings.inputs, out, &settings.storage).await?, Sources::default()));
    }
    let mut all: Vec<(Input, u8)> = Vec::new();
    // A source has a number below 64.
    for (number, name) in (0_u8..).zip(&names) {
        let named = settings.sources.iter().filter(|(own, _)| own == name).map(|(_, input)| input);
        let unnamed = settings.inputs.iter().filter(|_| name == OTHER);
        let specs: Vec<String> = named.chain(unnamed).cloned().collect();
        let found = input::find(&specs, out, &settings.storage).await?;
        all.extend(found.into_iter().map(|input| (input, number)));
    }
    all.sort_by(|(a, i), (b, j)| input::order(a, b).then(i.cmp(j)));
    if let Some([(twice, i), (_, j)]) = all.windows(2).find(|pair| input::order(&pair[0].0, &pair[1].0).is_eq()) {
        let reason = format!("is of two sources, {} and {}", names[usize::from(*i)], names[usize::from(*j)]);
        return Err(DataError::Input { input: twice.name.clone(), reason });
    }
    let (inputs, of_inputs) = all.into_iter().unzip();
    Ok((inputs, Sources { names, of_inputs }))
}

impl Dataset {
    /// Appends the number of the source of each of the T tokens that follow the inputs of a sample of the split for
    /// validation. `index` is one of those that [`Dataset::samples`] counts.
    ///
    /// # Errors
    /// [`DataError::Damaged`] for a number without a name, and the errors of reading.
    pub fn read_sources(&self, index: u64, sequence_length: u32, sources: &mut Vec<u8>) -> Result<(), DataError> {
        let (shard, first) = self.locate(Split::Validation, index, u64::from(sequence_length))?;
        let Some(open) = &shard.sources else { return Ok(()) };
        let begin = sources.len();
        sources.resize(begin + sequence_length as usize, 0);
        let numbers = &mut sources[begin..];
        self.read_at(&open.file, &open.name, first + 1, numbers)?;
        let names = self.index().sources.len();
        match numbers.iter().position(|number| usize::from(*number) >= names) {
            Some(at) => {
                let reason = format!("token {} has source {}, of {names}", first + 1 + at as u64, numbers[at]);
                Err(self.damaged(&open.name, reason))
            }
            None => Ok(()),
        }
    }
}
