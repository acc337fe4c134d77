//! The tokenizer: train one, load one, check its vocabulary against the model's.
//!
//! A trained tokenizer is byte-level BPE (Sennrich et al., arXiv 1508.07909; over bytes as in GPT-2), stored as Hugging
//! Face `tokenizer.json`: special token [`END_OF_TEXT`] has id 0, the 256 bytes follow, then the merges. Any text can
//! be encoded.
//!
//! # Determinism
//! The trainer of `tokenizers` 0.22 keeps its words in randomly seeded hash maps, but it decides by sums over them, and
//! it orders merges by (count, pair); the sample is the same text in the same order. Two queue entries for one pair can
//! exist only when two pairs spell the same token; repeated trainings on text made of such pairs agreed, and a test
//! repeats them. The sample is bounded because the trainer counts pairs in 32 bits.

use std::{collections::BTreeMap, path::Path};

use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer, TokenizerImpl,
    models::bpe::{BPE, BpeTrainer},
    pre_tokenizers::byte_level::ByteLevel,
};

use super::{
    DataError, given,
    shards::Index,
    special::{Specials, Unfit},
};

/// The token between documents, in tokenizers trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Searched for, in this order, in a tokenizer that was trained elsewhere.
pub(super) const KNOWN_END_TOKENS: [&str; 8] = [
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    // DeepSeek's, with full-width bars and low blocks.
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[SEP]",
];

/// The smallest vocabulary that can be trained: every byte and the end-of-text token.
pub const MIN_VOCAB: u32 = 257;
/// The largest vocabulary that can be trained; the largest in use are a quarter of it.
pub const MAX_VOCAB: u32 = 1 << 20;
/// The most text that a tokenizer is trained on, bytes: keeps the trainer's 32-bit counts from overflowing.
pub const MAX_SAMPLE_BYTES: u64 = 512 << 20;

/// The longest token that training may produce, bytes of its stored form: a long word that repeats (base64, a line of
/// dashes) would give tokens as long as itself.
const MAX_TOKEN_BYTES: usize = 256;

/// The special tokens that a tokenizer puts around a text by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Framing {
    pub bos_id: Option<u32>,
    pub eos_id: Option<u32>,
}

/// Reads the framing of a `tokenizer.json` off an empty text.
pub(super) fn framing(json: &[u8], file: &str) -> Result<Framing, DataError> {
    let failed = |reason: String| DataError::Tokenizer { file: file.to_owned(), reason };
    let mut tokenizer = Tokenizer::from_bytes(json)
        .map_err(|error| failed(format!("is not a tokenizer.json of Hugging Face tokenizers: {error}")))?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| failed(error.to_string()))?;
    let encode = |text: &str, special| {
        tokenizer
            .encode_fast(text, special)
            .map(|found| found.get_ids().to_vec())
            .map_err(|error| failed(error.to_string()))
    };
    // Any text that has ids does: what stands before and behind them is put there by the tokenizer.
    let mut found = None;
    for text in ["a", "e", "0", "A", ".", "\n"] {
        let bare = encode(text, false)?;
        if !bare.is_empty() {
            found = Some((bare, encode(text, true)?));
            break;
        }
    }
    let Some((bare, whole)) = found else { return Ok(Framing::default()) };
    let Some(at) = (0..=whole.len().saturating_sub(bare.len())).find(|&at| whole[at..].starts_with(&bare)) else {
        return Err(failed("changes a text's own ids when it puts special tokens around it".into()));
    };
    let (before, behind) = (&whole[..at], &whole[at + bare.len()..]);
    match (before, behind) {
        ([] | [_], [] | [_]) => Ok(Framing { bos_id: before.first().copied(), eos_id: behind.first().copied() }),
        _ => Err(failed(format!(
            "puts {} special tokens before a text and {} behind it; this version knows one each",
            before.len(),
            behind.len()
        ))),
    }
}

/// The largest `tokenizer.json` that is read. Those in use are smaller.
pub(super) const MAX_FILE_BYTES: u64 = 256 << 20;

/// The token between documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndToken<'a> {
    /// A well-known one.
    Known,
    /// The one of this name.
    Named(&'a str),
    /// The first of these ids that the tokenizer has, else a well-known one.
    OneOf(&'a [u32]),
}

/// A tokenizer ready to encode documents.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    specials: Specials,
    json: Vec<u8>,
    vocab_size: u32,
    eos_id: u32,
}

impl TextTokenizer {
    /// Trains byte-level BPE on `sample`. `vocab` counts all entries; less text may give fewer.
    pub fn train<'a>(vocab: u32, sample: impl Iterator<Item = &'a str> + Send) -> Result<Self, DataError> {
        let name = format!("train:{vocab}");
        let failed = |reason: String| DataError::Tokenizer { file: name.clone(), reason };
        if !(MIN_VOCAB..=MAX_VOCAB).contains(&vocab) {
            return Err(failed(format!("a vocabulary has {MIN_VOCAB} to {MAX_VOCAB} entries")));
        }
        let bytes = ByteLevel::new(false, false, true);
        let mut tokenizer: TokenizerImpl<
            BPE,
            NormalizerWrapper,
            PreTokenizerWrapper,
            PostProcessorWrapper,
            DecoderWrapper,
        > = TokenizerImpl::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(bytes)).with_post_processor(Some(bytes)).with_decoder(Some(bytes));
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab as usize)
            .min_frequency(2)
            .max_token_length(Some(MAX_TOKEN_BYTES))
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        tokenizer.train(&mut trainer, sample).map_err(|error| failed(error.to_string()))?;
        let json = tokenizer.to_string(true).map_err(|error| failed(error.to_string()))?;
        // Loaded from its stored form, so that the encoder here is the one that every other program loads.
        Self::from_json(json.into_bytes(), &name, EndToken::Named(END_OF_TEXT))
    }

    /// Loads a `tokenizer.json`. `end_token` names the token to put between documents; `None`: a well-known one.
    pub fn load(path: &Path, end_token: Option<&str>) -> Result<Self, DataError> {
        Self::load_with(path, end_token.map_or(EndToken::Known, EndToken::Named))
    }

    /// Loads a `tokenizer.json`.
    pub fn load_with(path: &Path, end_token: EndToken<'_>) -> Result<Self, DataError> {
        Self::from_json(given::read(path)?, &path.display().to_string(), end_token)
    }

    pub(super) fn from_json(json: Vec<u8>, file: &str, end_token: EndToken<'_>) -> Result<Self, DataError> {
        let failed = |reason: String| DataError::Tokenizer { file: file.to_owned(), reason };
        let mut tokenizer = Tokenizer::from_bytes(&json)
            .map_err(|error| failed(format!("is not a tokenizer.json of Hugging Face tokenizers: {error}")))?;
        let eos_id = match end_token {
            EndToken::Named(token) => {
                tokenizer.token_to_id(token).ok_or_else(|| failed(format!("has no token {token:?}")))?
            }
            EndToken::Known | EndToken::OneOf(_) => {
                let ids = if let EndToken::OneOf(ids) = end_token { ids } else { &[] };
                let given = ids.iter().copied().find(|&id| tokenizer.id_to_token(id).is_some());
                given.or_else(|| known_end(&tokenizer)).ok_or_else(|| {
                    failed(format!("has none of the end-of-text tokens {KNOWN_END_TOKENS:?}; name it with --eos-token"))
                })?
            }
        };
        // Ids may have gaps: the largest one counts, not how many there are.
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        let vocab_size = largest.checked_add(1).ok_or_else(|| failed(format!("has a token with id {largest}")))?;
        // Text that spells a special token is text: it can't fake the end of a document.
        tokenizer.set_encode_special_tokens(true);
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| failed(error.to_string()))?;
        let specials = Specials::of(&mut tokenizer, &json, eos_id).map_err(failed)?;
        Ok(Self { tokenizer, specials, json, vocab_size, eos_id })
    }

    /// Ids of `text`, without any special token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        self.encode_text(text).map_err(|unfit| {
            let reason = match unfit {
                Unfit::Special { token, at } => {
                    format!("the text spells {token:?} at byte {at}, a special token that has no other form")
                }
                Unfit::Unknown { part, at } => {
                    format!("the text holds {part:?} at byte {at}, and there is no token for it")
                }
                Unfit::Refused(reason) => reason,
            };
            DataError::Tokenizer { file: crate::layout::TOKENIZER.into(), reason }
        })
    }

    /// [`Self::encode`] for callers that know where the text comes from.
    pub(super) fn encode_text(&self, text: &str) -> Result<Vec<u32>, Unfit> {
        self.specials.encode(&self.tokenizer, text)
    }

    /// The special tokens: ids that no text produces, and their names.
    pub(super) fn special_tokens(&self) -> &BTreeMap<u32, String> {
        self.specials.ids()
    }

    /// The token for unknown text.
    pub(super) fn unknown_id(&self) -> Option<u32> {
        self.specials.unknown()
    }

    /// Whether there may be text that the stored tokenizer would silently drop.
    pub(super) fn may_lose(&self) -> bool {
        self.specials.may_lose()
    }

    /// The id of a token.
    #[cfg(test)]
    pub(super) fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The text of `ids`.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        self.tokenizer
            .decode(ids, false)
            .map_err(|error| DataError::Tokenizer { file: crate::layout::TOKENIZER.into(), reason: error.to_string() })
    }

    /// Every id is below this.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// The token between documents.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// The token that the tokenizer puts before each text, if it does.
    pub fn bos_id(&self) -> Result<Option<u32>, DataError> {
        Ok(framing(&self.json, crate::layout::TOKENIZER)?.bos_id)
    }

    /// The stored form: the loaded file as it was, or the trained tokenizer.
    pub fn json(&self) -> &[u8] {
        &self.json
    }
}

/// The well-known end token of a tokenizer: a special one if there is one, else any.
fn known_end(tokenizer: &Tokenizer) -> Option<u32> {
    let added = tokenizer.get_added_tokens_decoder();
    let known = || KNOWN_END_TOKENS.iter().filter_map(|token| tokenizer.token_to_id(token));
    known().find(|id| added.get(id).is_some_and(|token| token.special)).or_else(|| known().next())
}

/// Refuses a model with fewer embeddings than the data has token ids; more are fine (vocabularies are often padded).
///
/// `dataset` and `model` name the two, for the message: the dataset's URI, the model's `config.json`.
pub fn check_vocabulary(index: &Index, dataset: &str, model_vocab: u64, model: &str) -> Result<(), DataError> {
    if u64::from(index.vocab_size) <= model_vocab {
        return Ok(());
    }
    Err(DataError::Vocabulary {
        dataset: dataset.to_owned(),
        data_vocab: index.vocab_size,
        model: model.to_owned(),
        model_vocab,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::shards::{FORMAT, FileEntry, TokenType},
        error::{Explain, Kind},
        storage::Crc64,
    };

    /// Words over two letters in long runs: many pairs of tokens spell the same third one, the case in which the
    /// trainer's queue holds a pair twice.
    fn ambiguous_text() -> Vec<String> {
        let mut state = 1_u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        (0..100)
            .map(|_| {
                let mut line = String::new();
                for _ in 0..40 {
                    (0..=random(24)).for_each(|_| line.push(if random(8) == 0 { 'b' } else { 'a' }));
                    line.push(' ');
                }
                line
            })
            .collect()
    }

    fn train(vocab: u32, texts: &[String]) -> TextTokenizer {
        TextTokenizer::train(vocab, texts.iter().map(String::as_str)).unwrap()
    }

    #[test]
    fn training_gives_the_same_bytes_each_time() {
        let texts = ambiguous_text();
        let first = train(2000, &texts);
        for _ in 0..5 {
            assert!(train(2000, &texts).json() == first.json(), "two trainings on the same text differ");
        }
        assert!(train(2000, &texts[1..]).json() != first.json());
    }

    #[test]
    fn any_text_comes_back_and_none_fakes_the_end_of_a_document() {
        let tokenizer = train(300, &ambiguous_text());
        assert_eq!((tokenizer.eos_id(), tokenizer.vocab_size()), (0, 300));
        for text in ["aab ab", "  \n\tfn main() {}", "gr\u{fc}n \u{1f980} \0", END_OF_TEXT, "x<|endoftext|>y"] {
            let ids = tokenizer.encode(text).unwrap();
            assert!(!ids.contains(&tokenizer.eos_id()), "{text:?} gave the end-of-text token");
            assert!(ids.iter().all(|&id| id < tokenizer.vocab_size()));
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn a_stored_tokenizer_is_loaded_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let trained = train(270, &ambiguous_text());
        std::fs::write(&path, trained.json()).unwrap();
        let loaded = TextTokenizer::load(&path, None).unwrap();
        assert_eq!((loaded.json(), loaded.eos_id()), (trained.json(), 0));
        assert_eq!(TextTokenizer::load(&path, Some("a")).unwrap().eos_id(), trained.encode("a").unwrap()[0]);
        let error = |path: &Path, end: Option<&str>| TextTokenizer::load(path, end).err().unwrap().to_string();
        assert!(error(&path, Some("</nope>")).contains("has no token \"</nope>\""));
        std::fs::write(&path, trained.json().replace_end_token()).unwrap();
        assert!(error(&path, None).contains("--eos-token"));
        std::fs::write(&path, b"{\"version\": 3").unwrap();
        assert!(error(&path, None).contains("is not a tokenizer.json"));
        assert!(error(&dir.path().join("absent"), None).contains("can't be read"));
    }

    trait ReplaceEndToken {
        fn replace_end_token(&self) -> Vec<u8>;
    }
    impl ReplaceEndToken for [u8] {
        fn replace_end_token(&self) -> Vec<u8> {
            String::from_utf8(self.to_vec()).unwrap().replace(END_OF_TEXT, "<|unheard-of|>").into_bytes()
        }
    }

    #[test]
    fn an_impossible_vocabulary_is_refused() {
        for vocab in [0, 256, MAX_VOCAB + 1] {
            let error = TextTokenizer::train(vocab, ["a"].into_iter()).err().unwrap();
            assert!(error.to_string().contains("257 to 1048576"), "{error}");
        }
        // Little text gives a small vocabulary, not an error.
        assert_eq!(TextTokenizer::train(5000, ["a"].into_iter()).unwrap().vocab_size(), MIN_VOCAB);
    }

    #[test]
    fn a_long_repeated_word_gives_no_long_token() {
        let mut state = 7_u64;
        let word: String = (0..3000)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                char::from(b'a' + (state >> 33) as u8 % 26)
            })
            .collect();
        let texts = vec![format!("{word} {word} {word}")];
        let tokenizer = train(6000, &texts);
        let json: serde_json::Value = serde_json::from_slice(tokenizer.json()).unwrap();
        let longest = json["model"]["vocab"].as_object().unwrap().keys().map(String::len).max().unwrap();
        assert!((20..=MAX_TOKEN_BYTES).contains(&longest), "the longest token has {longest} bytes");
        assert_eq!(tokenizer.decode(&tokenizer.encode(&texts[0]).unwrap()).unwrap(), texts[0]);
    }

    #[test]
    fn the_well_known_end_token_is_one_that_the_tokenizer_calls_special() {
        let word_level = |added: &[(&str, bool)]| {
            let added: Vec<serde_json::Value> = added
                .iter()
                .enumerate()
                .map(|(id, (content, special))| {
                    serde_json::json!({
                        "id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
                        "rstrip": false, "normalized": false,
                    })
                })
                .collect();
            let model = serde_json::json!({ "type": "WordLevel", "unk_token": "?", "vocab": {} });
            let json = serde_json::json!({ "version": "1.0", "added_tokens": added, "model": model });
            let tokenizer = TextTokenizer::from_json(json.to_string().into_bytes(), "t", EndToken::Known).unwrap();
            tokenizer.decode(&[tokenizer.eos_id()]).unwrap()
        };
        // Some vocabularies hold tags of HTML.
        assert_eq!(word_level(&[("</s>", false), ("<eos>", true)]), "<eos>");
        assert_eq!(word_level(&[("</s>", false), ("<b>", true)]), "</s>");
        let deep_seek = "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>";
        assert_eq!(word_level(&[(deep_seek, true)]), deep_seek);
    }

    #[test]
    fn a_model_needs_an_embedding_for_every_token() {
        let index = Index {
            format: FORMAT,
            dtype: TokenType::U16,
            vocab_size: 4096,
            eos_id: 0,
            recipe: String::new(),
            tokenizer: FileEntry { file: "tokenizer.json".into(), bytes: 0, crc64: Crc64(0) },
            documents: None,
            sources: vec![],
            train: vec![],
            validation: vec![],
        };
        assert!(check_vocabulary(&index, "file://./data", 4096, "tiny.json").is_ok());
        assert!(check_vocabulary(&index, "file://./data", 4224, "tiny.json").is_ok());
        let error = check_vocabulary(&index, "file://./data", 4095, "tiny.json").unwrap_err();
        let text = error.to_string();
        for part in ["file://./data", "4096", "tiny.json", "4095"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.hint().unwrap().contains("4096"));
    }
}
