//! `trainer data prepare`: text, JSON records or Parquet into token shards.
//!
//! 1. Find the inputs; those in stores are fetched before they are read.
//! 2. Train a tokenizer on an even, bounded sample of them, or load one.
//! 3. Encode all documents on all cores, a few MiB at a time; give each to a split by a hash of its text; write shards
//!    as they fill.
//! 4. Write `tokenizer.json`, then `index.json`: from then on the dataset exists.
//!
//! # Which documents are kept for validation
//! A piece of text (a document, or 64 KiB of a longer one) is kept for validation if the hash of its bytes says so,
//! regardless of its file: repeated documents fall into one split, and adding files later moves nothing from one split
//! to the other.
//!
//! # Running it again
//! The index carries a *recipe*: a checksum over the settings and the names and sizes of the inputs. With the same
//! recipe nothing is done, so a script can call it every time. With another one it is refused, since a run may be
//! reading the dataset, unless `overwrite` is set. (A file edited without changing its size needs `overwrite`.)
//!
//! # Crash, retry, cancel
//! Without an index no dataset exists; the leftovers of a crash are overwritten by the next preparation, which also
//! deletes shards that its index doesn't name. `overwrite` deletes the old index before it touches anything else. A
//! dropped future stops the threads at the next few MiB. Of two preparations into one folder at once the first to write
//! its index wins; if they differ, checksums reveal it, since every reader compares them.

use std::{
    path::PathBuf,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::Serialize;
use tokio::runtime::Handle;

use super::{
    DataError,
    encode::{Counts, Job},
    given::{self, Given},
    input::{self, Input, Place},
    layout::{DocumentFormat, LayoutSettings},
    shards::{FORMAT, INDEX, Index, MAX_INDEX_BYTES, Split},
    sources::{self, Sources},
    tokenizer::{END_OF_TEXT, MAX_SAMPLE_BYTES, framing},
};
use crate::{
    config::StorageConfig,
    layout::TOKENIZER,
    storage::{CreateOutcome, StorageError, Store},
};

pub use super::{
    progress::{Phase, PrepareEvent},
    sources::OTHER,
};

/// The source of the tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerSource {
    /// A `tokenizer.json`, or a folder with one.
    File(PathBuf),
    /// The same, in a store.
    Uri(String),
    /// Trained on the inputs.
    Train {
        /// Entries of its vocabulary.
        vocab: u32,
    },
}

impl FromStr for TokenizerSource {
    type Err = String;
    /// `train:VOCAB`, or path or URI of a `tokenizer.json` or its folder.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("train:") {
            Some(vocab) => vocab
                .replace(['_', ','], "")
                .parse()
                .map(|vocab| Self::Train { vocab })
                .map_err(|_| format!("{vocab:?} is not a vocabulary size; write train:4096, for example")),
            None if text.contains("://") => Ok(Self::Uri(text.to_owned())),
            None => Ok(Self::File(PathBuf::from(text))),
        }
    }
}

/// What to prepare, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareSettings {
    /// Paths, folders, globs, store URIs.
    pub inputs: Vec<String>,
    /// The same of sources with a name: the name, and where it lies. A name may be there several times. If there are
    /// any, `inputs` are a source of the name [`OTHER`].
    pub sources: Vec<(String, String)>,
    /// The tokenizer.
    pub tokenizer: TokenizerSource,
    /// Folder, or URI of a folder of a store.
    pub out: String,
    /// Share of the text that is kept for validation, 0 to 0.5.
    pub validation_ratio: f64,
    /// Tokens in one shard.
    pub shard_tokens: u64,
    /// The field of JSON lines, or column of Parquet files, that holds the text.
    pub text_field: String,
    /// The token between documents; `None`: a well-known one of the tokenizer.
    pub eos_token: Option<String>,
    /// The most text that a tokenizer is trained on, bytes; `None`: 4 KiB for each entry of its vocabulary.
    pub sample_bytes: Option<u64>,
    /// Whether to replace an existing dataset.
    pub overwrite: bool,
    /// Whether to continue without the inputs that can't be read, however many.
    pub skip_unreadable: bool,
    /// Whether to continue without the records that can't be read.
    pub skip_bad_records: bool,
    /// How documents are laid out.
    pub layout: LayoutSettings,
    /// Encoding threads; 0: one per core.
    pub threads: usize,
    /// Settings for the stores.
    pub storage: StorageConfig,
}

impl PrepareSettings {
    /// The defaults: 1% for validation, 64 Mi tokens per shard.
    pub fn new(inputs: Vec<String>, tokenizer: TokenizerSource, out: impl Into<String>) -> Self {
        Self {
            inputs,
            sources: Vec::new(),
            tokenizer,
            out: out.into(),
            validation_ratio: 0.01,
            shard_tokens: 64 << 20,
            text_field: "text".into(),
            eos_token: None,
            sample_bytes: None,
            overwrite: false,
            skip_unreadable: false,
            skip_bad_records: false,
            layout: LayoutSettings::default(),
            threads: 0,
            storage: StorageConfig::plain(16, 8),
        }
    }

    /// The most text that a tokenizer of `vocab` entries is trained on, bytes.
    pub(super) fn sample_budget(&self, vocab: u32) -> u64 {
        self.sample_bytes.unwrap_or((u64::from(vocab) << 12).min(MAX_SAMPLE_BYTES))
    }

    /// All inputs, as they are typed.
    pub(super) fn inputs_in_words(&self) -> String {
        let named = self.sources.iter().map(|(name, input)| format!("{name}={input}"));
        self.inputs.iter().cloned().chain(named).collect::<Vec<_>>().join(" ")
    }

    fn check(&self) -> Result<(), DataError> {
        let refuse = |setting, reason: String| Err(DataError::Setting { setting, reason });
        if self.inputs.is_empty() && self.sources.is_empty() {
            return refuse("--input", "names nothing".into());
        }
        sources::check_settings(self)?;
        if !(0.0..=0.5).contains(&self.validation_ratio) {
            return refuse("--validation-ratio", format!("{} is not between 0 and 0.5", self.validation_ratio));
        }
        if !(1 << 10..=1 << 30).contains(&self.shard_tokens) {
            return refuse("--shard-tokens", format!("{} is not between 1,024 and 1,073,741,824", self.shard_tokens));
        }
        if let Some(bytes) = self.sample_bytes.filter(|bytes| !(1..=MAX_SAMPLE_BYTES).contains(bytes)) {
            return refuse("--sample-bytes", format!("{bytes} is not between 1 and {MAX_SAMPLE_BYTES}"));
        }
        if self.text_field.is_empty() {
            return refuse("--text-field", "is empty".into());
        }
        self.layout.check()?;
        if let (TokenizerSource::Train { .. }, DocumentFormat::Chat) = (&self.tokenizer, self.layout.format) {
            let reason = "a trained tokenizer has no chat template; give the folder of a chat model".into();
            return refuse("--tokenizer", reason);
        }
        if let (TokenizerSource::Train { .. }, Some(token)) = (&self.tokenizer, &self.eos_token)
            && token != END_OF_TEXT
        {
            let reason =
                format!("{token:?} is of no use with train:VOCAB, whose end token is {END_OF_TEXT:?}; leave it out");
            return refuse("--eos-token", reason);
        }
        Ok(())
    }
}

/// The result of a preparation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PrepareSummary {
    /// URI of the dataset.
    pub uri: String,
    /// Whether it already existed, made by the same recipe: then nothing was done.
    pub reused: bool,
    /// Entries of the vocabulary.
    pub vocab_size: u32,
    /// Training tokens.
    pub train_tokens: u64,
    /// Tokens kept for validation.
    pub validation_tokens: u64,
    /// Shards of both splits.
    pub shards: u64,
    /// Documents with any text; 0 if reused.
    pub documents: u64,
    /// Inputs.
    pub files: u64,
    /// Inputs left out because they can't be read; 0 if reused.
    pub skipped: u64,
    /// Records left out because they can't be read; 0 if reused.
    pub bad_records: u64,
    /// Documents left out because they are longer than a row.
    pub too_long: u64,
    /// Chats left out because they have no target.
    pub without_target: u64,
    /// Tokens of the training split that are targets; absent if all are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<u64>,
}

/// Prepares a dataset and returns a summary. `progress` is called from other threads, several times a second.
pub async fn prepare(
    settings: PrepareSettings,
    progress: impl Fn(PrepareEvent) + Send + Sync + 'static,
) -> Result<PrepareSummary, DataError> {
    settings.check()?;
    // A path without a scheme is local; opening it creates the folder.
    let uri = if settings.out.contains("://") { settings.out.clone() } else { format!("file://{}", settings.out) };
    let store = Store::open(&uri, &settings.storage).map_err(|source| DataError::Store {
        doing: "open",
        uri: uri.clone(),
        source,
    })?;
    prepare_into(store, settings, progress).await
}

/// [`prepare`] into an open store; `settings.out` only names a folder whose files are not inputs.
pub(super) async fn prepare_into(
    store: Store,
    settings: PrepareSettings,
    progress: impl Fn(PrepareEvent) + Send + Sync + 'static,
) -> Result<PrepareSummary, DataError> {
    let failed = |doing, source| DataError::Store { doing, uri: store.uri(), source };
    let out = input::local_path(&settings.out);
    let (inputs, sources) = sources::find(&settings, out.as_deref()).await?;
    progress(PrepareEvent::Found { files: inputs.len() as u64, bytes: inputs.iter().map(|input| input.bytes).sum() });
    let files = inputs.len() as u64;
    let given = given::load(&settings.tokenizer, &settings.storage).await?;
    let (recipe, of_tokens_alone) = recipes(&settings, &inputs, &sources, given.as_ref())?;
    let others = given.as_ref().map(|given| given.files.clone()).unwrap_or_default();
    match store.get(INDEX, MAX_INDEX_BYTES).await {
        Ok(_) if settings.overwrite => store.delete(INDEX).await.map_err(|e| failed("delete the index of", e))?,
        Ok(bytes) => {
            let origin = format!("{}/{INDEX}", store.uri());
            return match Index::parse(&bytes, &origin) {
                Ok(index) if index.recipe == recipe => Ok(summary(&index, store.uri(), true, files, Counts::default())),
                Ok(index) if index.format == FORMAT && index.recipe == of_tokens_alone => {
                    let message = format!(
                        "{} was prepared by an earlier version, without the tokenizer's begin token and its folder's \
                         other files, and stays so; --overwrite prepares it anew",
                        store.uri()
                    );
                    progress(PrepareEvent::Warning { message });
                    Ok(summary(&index, store.uri(), true, files, Counts::default()))
                }
                _ => Err(DataError::Exists { uri: store.uri() }),
            };
        }
        Err(StorageError::NotFound { .. }) => {}
        Err(source) => return Err(failed("read the index of", source)),
    }

    let stop = StopOnDrop(Arc::new(AtomicBool::new(false)));
    let job = Job {
        settings,
        inputs,
        sources,
        given,
        store: store.clone(),
        runtime: Handle::current(),
        stop: stop.0.clone(),
        progress: Box::new(progress),
    };
    let (mut index, tokenizer, counts) = tokio::task::spawn_blocking(move || job.run())
        .await
        .map_err(|error| DataError::Stopped { reason: error.to_string() })??;
    index.recipe = recipe;
    for (name, bytes) in others.into_iter().chain([(TOKENIZER.to_owned(), tokenizer)]) {
        store.put(&name, bytes).await.map_err(|e| failed("write the tokenizer to", e))?;
    }
    sweep(&store, &index).await?;
    match store.create(INDEX, index.to_bytes().into()).await.map_err(|e| failed("write the index to", e))? {
        CreateOutcome::Created => Ok(summary(&index, store.uri(), false, files, counts)),
        CreateOutcome::Exists => Err(DataError::Exists { uri: store.uri() }),
    }
}

/// Deletes shards that an earlier, interrupted or replaced preparation left and `index` doesn't name.
async fn sweep(store: &Store, index: &Index) -> Result<(), DataError> {
    let failed = |source| DataError::Store { doing: "delete old shards of", uri: store.uri(), source };
    for object in store.list("").await.map_err(failed)? {
        let is_ours = Split::ALL.into_iter().any(|split| split.shard_number(&object.key).is_some());
        let left_over = is_ours && index.files().all(|file| file.file != object.key);
        if left_over {
            store.delete(&object.key).await.map_err(failed)?;
        }
    }
    Ok(())
}

fn summary(index: &Index, uri: String, reused: bool, files: u64, counts: Counts) -> PrepareSummary {
    let dropped = index.documents.as_ref().map(|documents| documents.dropped).unwrap_or_default();
    PrepareSummary {
        uri,
        reused,
        vocab_size: index.vocab_size,
        train_tokens: index.tokens(Split::Train),
        validation_tokens: index.tokens(Split::Validation),
        shards: (index.train.len() + index.validation.len()) as u64,
        documents: counts.documents,
        files,
        skipped: counts.skipped,
        bad_records: counts.bad_records,
        too_long: dropped.too_long,
        without_target: dropped.without_target,
        targets: index
            .has_marks()
            .then(|| index.train.iter().filter_map(|shard| shard.marks.as_ref()).map(|marks| marks.targets).sum()),
    }
}

/// Checksums over everything that decides the output, as far as it can be known without reading the inputs. Inputs
/// count by file name and size, so that a moved folder gives the same dataset. The second one is what it would be if
/// the tokenizer put nothing around a text and lay in no folder, as in datasets of earlier versions.
fn recipes(
    settings: &PrepareSettings,
    inputs: &[Input],
    sources: &Sources,
    given: Option<&Given>,
) -> Result<(String, String), DataError> {
    let tokenizer = match (&settings.tokenizer, given) {
        (TokenizerSource::Train { vocab }, _) => format!("train:{vocab} on {}", settings.sample_budget(*vocab)),
        (_, given) => format!("{:016x}", crc_fast::crc64_nvme(given.map_or(&[], |given| &given.json))),
    };
    let mut text = format!(
        "format {FORMAT}\ntokenizer {tokenizer}\neos {:?}\nheld out {}\nshard {}\nfield {:?}\n",
        settings.eos_token, settings.validation_ratio, settings.shard_tokens, settings.text_field
    );
    if settings.skip_bad_records {
        text.push_str("without bad records\n");
    }
    text.push_str(&settings.layout.recipe());
    text.push_str(&sources.recipe());
    for input in inputs.iter().filter(|input| !matches!(input.place, Place::Unreadable(_))) {
        text.push_str(&format!("{} {}\n", input.bytes, input.last_name()));
    }
    let of_tokens_alone = sum(&text);
    if let Some(given) = given {
        let framing = framing(&given.json, &given.name)?;
        if framing.bos_id.is_some() {
            text.push_str(&format!("around a text {framing:?}\n"));
        }
        for (name, bytes) in &given.files {
            text.push_str(&format!("file {name} {:016x}\n", crc_fast::crc64_nvme(bytes)));
        }
    }
    Ok((sum(&text), of_tokens_alone))
}

fn sum(text: &str) -> String {
    format!("{:016x}", crc_fast::crc64_nvme(text.as_bytes()))
}

/// Stops the threads when their caller has gone.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path, sync::Mutex};

    use super::*;
    use crate::{
        data::{Dataset, tokenizer::TextTokenizer},
        error::{Explain, Kind},
    };

    const VOCAB: u32 = 400;

    /// 60 documents in files of all kinds; the last ones are longer than a piece.
    fn corpus(dir: &Path) -> Vec<String> {
        let mut documents: Vec<String> =
            (0..58).map(|n| format!("fn f{n}() {{ {} }}\n", "let x = 1; ".repeat(n * 3))).collect();
        documents.extend((0..2).map(|n| (0..9000).map(|line| format!("// line {line} of {n}\n")).collect::<String>()));
        for (number, document) in documents.iter().enumerate() {
            let path = match number % 3 {
                0 => format!("src/{number:02}.rs"),
                1 => format!("src/deep/{number:02}.txt"),
                _ => format!("src/{number:02}.jsonl"),
            };
            let path = dir.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let body =
                if number % 3 == 2 { serde_json::json!({ "text": document }).to_string() } else { document.clone() };
            std::fs::write(path, body).unwrap();
        }
        std::fs::write(dir.join("src/picture.png"), b"\x89PNG\0\xff").unwrap();
        documents
    }

    fn settings(dir: &Path, out: &str) -> PrepareSettings {
        PrepareSettings {
            validation_ratio: 0.1,
            shard_tokens: 10_000,
            ..PrepareSettings::new(
                vec![format!("{}/src/**/*", dir.display())],
                TokenizerSource::Train { vocab: VOCAB },
                dir.join(out).display().to_string(),
            )
        }
    }

    fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
            .collect()
    }

    /// All tokens of a split, in order.
    fn tokens(dir: &Path, split: Split) -> Vec<u32> {
        let index = crate::data::shards::read_index(dir).unwrap();
        let read = |shard: &crate::data::shards::ShardEntry| std::fs::read(dir.join(&shard.file.file)).unwrap();
        let bytes: Vec<u8> = index.shards(split).iter().flat_map(read).collect();
        bytes.chunks(2).map(|id| u32::from(u16::from_le_bytes([id[0], id[1]]))).collect()
    }

    fn sorted(mut texts: Vec<String>) -> Vec<String> {
        texts.sort();
        texts
    }

    #[tokio::test]
    async fn every_document_is_in_exactly_one_split() {
        let dir = tempfile::tempdir().unwrap();
        let documents = corpus(dir.path());
        let events = Arc::new(Mutex::new(Vec::new()));
        let hear = events.clone();
        let summary =
            prepare(settings(dir.path(), "out"), move |event| hear.lock().unwrap().push(event)).await.unwrap();
        assert_eq!((summary.documents, summary.skipped, summary.vocab_size, summary.reused), (60, 1, VOCAB, false));
        let out = dir.path().join("out");
        let data = Dataset::open(&out).unwrap();
        let tokenizer = TextTokenizer::load(&out.join("tokenizer.json"), None).unwrap();
        let mut texts = Vec::new();
        for (split, count) in [(Split::Train, summary.train_tokens), (Split::Validation, summary.validation_tokens)] {
            let tokens = tokens(&out, split);
            assert_eq!(tokens.len() as u64, count);
            assert_eq!(tokens.last(), Some(&tokenizer.eos_id()));
            texts.extend(
                tokens.split(|&id| id == 0).filter(|ids| !ids.is_empty()).map(|ids| tokenizer.decode(ids).unwrap()),
            );
            let (last, full) = data.index().shards(split).split_last().unwrap();
            assert!(full.iter().all(|shard| shard.tokens == 10_000) && last.tokens <= 10_000);
        }
        // Short documents come back unchanged; the long ones may be spread over the splits, piece by piece.
        let short = |texts: &[String]| sorted(texts.iter().filter(|text| text.starts_with("fn")).cloned().collect());
        assert_eq!(short(&texts), short(&documents));
        let bytes = |texts: &[String]| texts.iter().map(String::len).sum::<usize>();
        assert_eq!(bytes(&texts), bytes(&documents));

        let events = events.lock().unwrap();
        assert!(matches!(events[0], PrepareEvent::Found { files: 61, .. }), "{:?}", events[0]);
        assert!(
            events.iter().any(|event| matches!(event, PrepareEvent::Skipped { input, .. } if input.ends_with("png")))
        );
        let Some(PrepareEvent::Progress { input_bytes, input_bytes_total, tokens, .. }) = events.last() else {
            panic!("{:?}", events.last())
        };
        assert!(input_bytes == input_bytes_total && *tokens > 0);
    }

    #[tokio::test]
    async fn every_document_ends_with_one_end_token_however_long() {
        let dir = tempfile::tempdir().unwrap();
        let documents = corpus(dir.path());
        let settings = PrepareSettings { validation_ratio: 0.0, ..settings(dir.path(), "out") };
        prepare(settings, |_| {}).await.unwrap();
        let out = dir.path().join("out");
        let tokenizer = TextTokenizer::load(&out.join("tokenizer.json"), None).unwrap();
        let tokens = tokens(&out, Split::Train);
        let texts: Vec<String> =
            tokens.split_inclusive(|&id| id == 0).map(|ids| tokenizer.decode(&ids[..ids.len() - 1]).unwrap()).collect();
        assert!(documents.iter().any(|text| text.len() > 2 * crate::data::documents::PIECE_BYTES));
        assert!(sorted(texts) == sorted(documents));
    }

    #[tokio::test]
    async fn an_end_token_marks_a_piece_that_went_to_the_other_split() {
        let dir = tempfile::tempdir().unwrap();
        let document: String = (0..120_000).map(|line| format!("line {line}\n")).collect();
        let input = dir.path().join("long.txt");
        std::fs::write(&input, &document).unwrap();
        let settings = PrepareSettings {
            inputs: vec![input.display().to_string()],
            validation_ratio: 0.5,
            ..settings(dir.path(), "out")
        };
        prepare(settings, |_| {}).await.unwrap();
        let out = dir.path().join("out");
        let tokenizer = TextTokenizer::load(&out.join("tokenizer.json"), None).unwrap();
        let mut stretches = 0;
        for split in Split::ALL {
            for ids in tokens(&out, split).split(|&id| id == 0) {
                stretches += 1;
                assert!(
                    document.contains(&tokenizer.decode(ids).unwrap()),
                    "{split} joins text that is not neighbouring"
                );
            }
        }
        assert!(stretches > 6, "{stretches} stretches");
    }

    #[tokio::test]
    async fn the_same_inputs_give_the_same_bytes() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        corpus(one.path());
        corpus(two.path());
        prepare(PrepareSettings { threads: 1, ..settings(one.path(), "out") }, |_| {}).await.unwrap();
        prepare(PrepareSettings { threads: 3, ..settings(two.path(), "out") }, |_| {}).await.unwrap();
        let (one, two) = (files(&one.path().join("out")), files(&two.path().join("out")));
        assert!(one.len() > 4 && one.keys().eq(two.keys()));
        for (name, bytes) in &one {
            assert!(*bytes == two[name], "{name} differs");
        }
    }

    #[tokio::test]
    async fn a_second_preparation_does_nothing_or_is_refused_or_replaces() {
        let dir = tempfile::tempdir().unwrap();
        corpus(dir.path());
        let base = settings(dir.path(), "out");
        let first = prepare(base.clone(), |_| {}).await.unwrap();
        let before = files(&dir.path().join("out"));
        let again = prepare(base.clone(), |_| {}).await.unwrap();
        assert!(again.reused && again.train_tokens == first.train_tokens && before == files(&dir.path().join("out")));

        let other = PrepareSettings { shard_tokens: 20_000, ..base };
        let error = prepare(other.clone(), |_| {}).await.unwrap_err();
        assert!(matches!(error, DataError::Exists { .. }) && error.kind() == Kind::Config, "{error}");
        assert!(error.hint().unwrap().contains("--overwrite") && before == files(&dir.path().join("out")));

        let replaced = prepare(PrepareSettings { overwrite: true, ..other }, |_| {}).await.unwrap();
        assert!(!replaced.reused && replaced.shards < first.shards);
        // Shards of the old dataset that the new one doesn't have are gone.
        assert_eq!(files(&dir.path().join("out")).len() as u64, replaced.shards + 2);
        Dataset::open(dir.path().join("out")).unwrap();
    }

    #[tokio::test]
    async fn a_given_tokenizer_is_used_and_stored_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        corpus(dir.path());
        prepare(settings(dir.path(), "first"), |_| {}).await.unwrap();
        let tokenizer = dir.path().join("first/tokenizer.json");
        let local =
            PrepareSettings { tokenizer: TokenizerSource::File(tokenizer.clone()), ..settings(dir.path(), "second") };
        let summary = prepare(local, |_| {}).await.unwrap();
        assert_eq!(std::fs::read(dir.path().join("second/tokenizer.json")).unwrap(), std::fs::read(tokenizer).unwrap());
        assert_eq!(tokens(&dir.path().join("first"), Split::Train), tokens(&dir.path().join("second"), Split::Train));
        assert_eq!(summary.vocab_size, VOCAB);
    }

    #[tokio::test]
    async fn a_failed_preparation_gives_the_reason_and_leaves_no_dataset() {
        let dir = tempfile::tempdir().unwrap();
        corpus(dir.path());
        std::fs::write(dir.path().join("empty.txt"), "").unwrap();
        std::fs::write(dir.path().join("bad.jsonl"), "{\"text\": 1}").unwrap();
        let base = settings(dir.path(), "out");
        let input =
            |name: &str| PrepareSettings { inputs: vec![dir.path().join(name).display().to_string()], ..base.clone() };
        for (settings, said) in [
            (input("absent.txt"), "matches no file"),
            (input("empty.txt"), "no text in 1 files"),
            (input("src/picture.png"), "1 of 1 file;"),
            (input("bad.jsonl"), "bad.jsonl:1"),
            (PrepareSettings { inputs: vec![], ..base.clone() }, "--input"),
            (PrepareSettings { validation_ratio: 0.6, ..base.clone() }, "--validation-ratio"),
            (PrepareSettings { validation_ratio: f64::NAN, ..base.clone() }, "--validation-ratio"),
            (PrepareSettings { shard_tokens: 0, ..base.clone() }, "--shard-tokens"),
            (PrepareSettings { sample_bytes: Some(0), ..base.clone() }, "--sample-bytes"),
            (PrepareSettings { text_field: String::new(), ..base.clone() }, "--text-field"),
            (PrepareSettings { eos_token: Some("</s>".into()), ..base.clone() }, "--eos-token"),
            (PrepareSettings { tokenizer: TokenizerSource::Train { vocab: 12 }, ..base.clone() }, "train:12"),
            (
                PrepareSettings { tokenizer: TokenizerSource::File("/absent.json".into()), ..base.clone() },
                "/absent.json",
            ),
        ] {
            let error = prepare(settings, |_| {}).await.unwrap_err();
            assert!(error.to_string().contains(said), "{said}: {error}");
            assert_eq!(error.kind(), Kind::Config, "{error}");
            assert!(!dir.path().join("out").join(INDEX).exists());
        }
    }

    #[tokio::test]
    async fn a_dropped_preparation_stops_and_leaves_no_dataset() {
        let dir = tempfile::tempdir().unwrap();
        corpus(dir.path());
        let (ready, mut is_ready) = tokio::sync::mpsc::unbounded_channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let (ended, has_ended) = std::sync::mpsc::channel::<()>();
        let job = prepare(settings(dir.path(), "out"), move |event| {
            let _dropped_with_the_job = &ended;
            if matches!(event, PrepareEvent::TokenizerReady { .. }) {
                ready.send(()).unwrap();
                let _ = wait.lock().unwrap().recv();
            }
        });
        {
            let mut job = std::pin::pin!(job);
            tokio::select! {
                _ = &mut job => panic!("ended while it was held"),
                _ = is_ready.recv() => {}
            }
        }
        go.send(()).unwrap();
        tokio::task::spawn_blocking(move || assert!(has_ended.recv().is_err())).await.unwrap();
        assert!(files(&dir.path().join("out")).is_empty());
    }

    #[test]
    fn a_tokenizer_is_named_by_file_or_by_vocabulary() {
        assert_eq!("train:4096".parse(), Ok(TokenizerSource::Train { vocab: 4096 }));
        assert_eq!("train:32_768".parse(), Ok(TokenizerSource::Train { vocab: 32_768 }));
        assert_eq!("a/tokenizer.json".parse(), Ok(TokenizerSource::File("a/tokenizer.json".into())));
        assert_eq!("s3://bucket/model".parse(), Ok(TokenizerSource::Uri("s3://bucket/model".into())));
        assert!("train:many".parse::<TokenizerSource>().unwrap_err().contains("train:4096"));
    }

    #[tokio::test]
    async fn odd_inputs_are_reported_and_another_treatment_of_records_is_another_dataset() {
        let dir = tempfile::tempdir().unwrap();
        for (name, body) in [
            ("a.txt", "some text"),
            ("b.jsonl", "{\"text\": null}\n"),
            ("c.json", "{\"name\": \"x\"}"),
            ("d.jsonl", "{\"text\": \"good\"}\n{\"text\": 7}\n"),
        ] {
            std::fs::write(dir.path().join(name), body).unwrap();
        }
        let settings = PrepareSettings {
            inputs: vec![dir.path().join("?.*").display().to_string()],
            validation_ratio: 0.0,
            skip_bad_records: true,
            ..settings(dir.path(), "out")
        };
        let events = Arc::new(Mutex::new(Vec::new()));
        let hear = events.clone();
        let summary = prepare(settings.clone(), move |event| hear.lock().unwrap().push(event)).await.unwrap();
        assert_eq!((summary.documents, summary.bad_records), (3, 1));
        let events = events.lock().unwrap().clone();
        let warned: Vec<&String> = events
            .iter()
            .filter_map(|event| if let PrepareEvent::Warning { message } = event { Some(message) } else { None })
            .collect();
        for said in ["b.jsonl holds no record with a text", "1 of 4 files hold one JSON object", "1 record of"] {
            assert!(warned.iter().any(|message| message.contains(said)), "{said}: {warned:?}");
        }
        for wanted in [Phase::Sampling, Phase::TokenizerTraining, Phase::Encoding, Phase::Writing] {
            assert!(
                events.iter().any(|event| matches!(event, PrepareEvent::Phase { phase, .. } if *phase == wanted)),
                "{wanted:?} was not told"
            );
        }
        let error = prepare(PrepareSettings { skip_bad_records: false, ..settings }, |_| {}).await.unwrap_err();
        assert!(matches!(error, DataError::Exists { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_file_that_changes_while_it_is_read_is_an_error() {
        type Change = fn(&Path);
        let grow: Change = |path| {
            let body = std::fs::read_to_string(path).unwrap();
            std::fs::write(path, body + "fn more() {}\n").unwrap();
        };
        let shrink: Change = |path| std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(3).unwrap();
        let rewrite: Change = |path| {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        };
        let remove: Change = |path| std::fs::remove_file(path).unwrap();
        // Before it is read at all, and between the tokenizer's text and the encoding.
        let moments: [fn(&PrepareEvent) -> bool; 2] = [
            |event| matches!(event, PrepareEvent::Found { .. }),
            |event| matches!(event, PrepareEvent::TokenizerReady { .. }),
        ];
        for change in [grow, shrink, rewrite, remove] {
            for moment in moments {
                for skip_unreadable in [false, true] {
                    let dir = tempfile::tempdir().unwrap();
                    corpus(dir.path());
                    let file = dir.path().join("src/00.rs");
                    std::fs::write(&file, "fn first() {}\n").unwrap();
                    let settings = PrepareSettings { skip_unreadable, ..settings(dir.path(), "out") };
                    let touched = file.clone();
                    let hear = move |event: PrepareEvent| {
                        if moment(&event) {
                            change(&touched)
                        }
                    };
                    let error = prepare(settings, hear).await.unwrap_err();
                    assert_eq!(error.kind(), Kind::Config, "{error}");
                    assert!(error.to_string().contains("src/00.rs: changed while it was read"), "{error}");
                }
            }
        }
    }

    /// Three sources, one without a name, in rows or in a stream; each document says where it is from.
    fn of_three_sources(dir: &Path, out: &str, rows: bool) -> PrepareSettings {
        for (name, words) in [("web", "aa bb cc"), ("code", "fn main let"), ("notes", "one two three")] {
            std::fs::create_dir_all(dir.join(name)).unwrap();
            for number in 0..40 {
                let text = format!("{name} {number} {}\n", format!("{words} ").repeat(number % 7 + 1));
                std::fs::write(dir.join(format!("{name}/{number}.txt")), text).unwrap();
            }
        }
        let place = |name: &str| dir.join(name).display().to_string();
        let named = |name: &str| (name.to_owned(), place(name));
        let settings = settings(dir, out);
        PrepareSettings {
            inputs: vec![place("notes")],
            sources: vec![named("web"), named("code")],
            validation_ratio: 0.4,
            layout: LayoutSettings { pack: rows, sequence_length: rows.then_some(127), ..LayoutSettings::default() },
            ..settings
        }
    }

    #[tokio::test]
    async fn each_token_for_validation_has_the_source_of_its_document() {
        for rows in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let settings = of_three_sources(dir.path(), "out", rows);
            prepare(settings.clone(), |_| ()).await.unwrap();
            let out = dir.path().join("out");
            let data = Dataset::open(&out).unwrap();
            assert_eq!(data.index().sources, ["code", "other", "web"]);
            assert!(data.index().train.iter().all(|shard| shard.sources.is_none()));
            let tokenizer = TextTokenizer::load(&out.join("tokenizer.json"), None).unwrap();
            let tokens = tokens(&out, Split::Validation);
            let numbers: Vec<u8> = data
                .index()
                .validation
                .iter()
                .flat_map(|shard| std::fs::read(out.join(&shard.sources.as_ref().unwrap().file)).unwrap())
                .collect();
            assert_eq!(tokens.len(), numbers.len());
            let mut found = [0; 3];
            let pairs: Vec<(u32, u8)> = tokens.into_iter().zip(numbers).collect();
            for document in pairs.split_inclusive(|(id, _)| *id == tokenizer.eos_id()) {
                let ids: Vec<u32> = document.iter().map(|(id, _)| *id).take(document.len() - 1).collect();
                let text = tokenizer.decode(&ids).unwrap();
                // What fills a row is no document.
                let Some(name) = text.split(' ').next().filter(|name| !name.is_empty()) else { continue };
                let number = ["code", "notes", "web"].iter().position(|own| *own == name).unwrap();
                found[number] += 1;
                assert!(document.iter().all(|(_, source)| usize::from(*source) == number), "{text}");
            }
            assert!(found.iter().all(|count| *count > 3), "{found:?}");
            // A sample reads those of the tokens that follow its inputs.
            let mut sources = Vec::new();
            data.read_sources(0, 127, &mut sources).unwrap();
            assert_eq!(sources, pairs[1..128].iter().map(|(_, source)| *source).collect::<Vec<_>>());
            // Other names are other data; the same are the same.
            assert!(prepare(settings.clone(), |_| ()).await.unwrap().reused);
            let mut renamed = settings.clone();
            renamed.sources[0].0 = "net".into();
            assert!(matches!(prepare(renamed, |_| ()).await, Err(DataError::Exists { .. })));
        }
    }

    #[tokio::test]
    async fn sources_that_contradict_each_other_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let base = of_three_sources(dir.path(), "out", false);
        let with = |sources: Vec<(&str, &str)>| {
            let place = |(name, input): (&str, &str)| (name.to_owned(), dir.path().join(input).display().to_string());
            PrepareSettings { sources: sources.into_iter().map(place).collect(), ..base.clone() }
        };
        let many: Vec<String> = (0..65).map(|number| format!("s{number}")).collect();
        for (settings, says) in [
            (with(vec![("a b", "web")]), "no name"),
            (with(vec![("", "web")]), "no name"),
            (with(vec![("a", "web"), ("b", "web/1.txt")]), "two sources"),
            (with(vec![("a", "notes/1.txt")]), "two sources"),
            (with(vec![("a", "nowhere")]), "matches no file"),
            (with(many.iter().map(|name| (name.as_str(), "web")).collect()), "more than 64"),
        ] {
            let error = prepare(settings, |_| ()).await.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let named = PrepareSettings { sources: vec![("a".into(), String::new())], ..base };
        assert!(prepare(named, |_| ()).await.unwrap_err().to_string().contains("names no input"));
    }
}
