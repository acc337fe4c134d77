//! Text never becomes a special token.
//!
//! A tokenizer's special tokens mark things that no text may claim: the end of a document, its beginning, padding. The
//! library can be told not to look for those that are *added* to the model; yet a model may hold them in its own
//! vocabulary, where text that spells one would reach it: Unigram and WordPiece by their look-up, BPE by merges that
//! lead there. Here these paths are closed in the encoding model, so that such text is encoded as its pieces; and all
//! resulting ids are checked against the list once more. The stored tokenizer stays as it is.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tokenizers::{AddedToken, ModelWrapper, Tokenizer, pre_tokenizers::byte_level::ByteLevel};

use super::tokenizer::KNOWN_END_TOKENS;

/// Special by their names, wherever they appear.
const KNOWN: [&str; 16] = [
    "<s>", "</s>", "<unk>", "<pad>", "<mask>", "<bos>", "<eos>", "<cls>", "<sep>", "[UNK]", "[CLS]", "[SEP]", "[PAD]",
    "[MASK]", "[BOS]", "[EOS]",
];

/// A token that marks something, going by its name alone.
fn is_mark(token: &str) -> bool {
    let between = |open: &str, close: &str| {
        token.strip_prefix(open).and_then(|rest| rest.strip_suffix(close)).is_some_and(|name| !name.is_empty())
    };
    KNOWN.contains(&token)
        || KNOWN_END_TOKENS.contains(&token)
        || between("<|", "|>")
        || between("<\u{ff5c}", "\u{ff5c}>")
}

/// The special tokens of one tokenizer, and the model that never produces them.
pub(super) struct Specials {
    /// Ids that no text may produce, and their names.
    ids: BTreeMap<u32, String>,
    /// The token for unknown text, which any text may contain.
    unknown: Option<u32>,
    /// The token that the closed model produces for text that the stored one would silently drop.
    lost: Option<u32>,
    /// The tokenizer with the paths to special tokens closed; `None`: it had none.
    closed: Option<Box<Tokenizer>>,
}

/// Why a text has no ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It would produce a special token.
    Special {
        token: String,
        /// Its byte position in the text.
        at: usize,
    },
    /// The tokenizer has no token for a part of it.
    Unknown {
        part: String,
        /// Its byte position in the text.
        at: usize,
    },
    /// The tokenizer refused.
    Refused(String),
}

impl Specials {
    /// Finds the special tokens of `tokenizer`, which was read from `json`, and closes the paths to them. Added tokens
    /// that only look special, or are the end token, become special ones.
    pub(super) fn of(tokenizer: &mut Tokenizer, json: &[u8], end: u32) -> Result<Self, String> {
        let mut stored: Value = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        // Merges left out at random are for training; here the same text always has the same ids.
        if let Some(dropout) = stored.pointer_mut("/model/dropout") {
            *dropout = Value::Null;
        }
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && model.dropout.is_some()
        {
            let mut model = model.clone();
            model.dropout = None;
            tokenizer.with_model(ModelWrapper::BPE(model));
        }
        let model = stored.get("model").unwrap_or(&Value::Null);
        let added: BTreeMap<u32, AddedToken> = tokenizer.get_added_tokens_decoder().into_iter().collect();
        let vocabulary = tokenizer.get_vocab(false);
        let unknown = match (model.get("unk_token"), model.get("unk_id")) {
            (Some(Value::String(token)), _) => vocabulary.get(token).copied(),
            (_, Some(id)) => id.as_u64().and_then(|id| u32::try_from(id).ok()),
            _ => None,
        };

        let mut ids = BTreeMap::new();
        let mut made_special = Vec::new();
        for (&id, token) in &added {
            // A tag of HTML may be an ordinary word.
            let mark = is_mark(&token.content) && !matches!(token.content.as_str(), "<s>" | "</s>");
            // One character is text, whatever its role.
            if id == end || mark || token.special && token.content.trim().chars().count() > 1 {
                ids.insert(id, token.content.clone());
                if !token.special {
                    made_special.push(AddedToken::from(token.content.clone(), true));
                }
            }
        }
        tokenizer.add_special_tokens(&made_special);
        let mut framing = BTreeSet::new();
        framing_ids(stored.get("post_processor").unwrap_or(&Value::Null), &mut framing);
        for (token, &id) in &vocabulary {
            if !added.contains_key(&id) && (is_mark(token) || framing.contains(&id)) {
                ids.insert(id, token.clone());
            }
        }
        // An end token that is an ordinary word can't be closed: text that contains it is refused.
        let is_word =
            |id: u32, name: &str| id == end && !is_mark(name) && !added.get(&id).is_some_and(|token| token.special);
        let mut names: BTreeSet<String> =
            ids.iter().filter(|(id, name)| !is_word(**id, name)).map(|(_, name)| name.clone()).collect();
        for id in unknown.into_iter().chain([end]) {
            ids.entry(id).or_insert_with(|| tokenizer.id_to_token(id).unwrap_or_default());
        }
        let unknown = unknown.filter(|&id| id != end);
        names.extend(unknown.and_then(|id| ids.get(&id)).cloned());
        let free = vocabulary.values().chain(added.keys()).max().and_then(|id| id.checked_add(1));
        let lost = free.filter(|_| leaves_out(&stored));
        let mut model = close(model, &names).or_else(|| lost.map(|_| model.clone()));
        if let (Some(model), Some(lost)) = (&mut model, lost) {
            tell_lost(model, lost);
        }
        let closed = match model {
            None => None,
            Some(model) => {
                let model: ModelWrapper = serde_json::from_value(model).map_err(|error| error.to_string())?;
                let mut closed = tokenizer.clone();
                closed.with_model(model);
                Some(Box::new(closed))
            }
        };
        Ok(Self { ids, unknown, lost, closed })
    }

    pub(super) fn ids(&self) -> &BTreeMap<u32, String> {
        &self.ids
    }

    pub(super) fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    pub(super) fn may_lose(&self) -> bool {
        self.lost.is_some()
    }

    /// Ids of `text`, none of them special, except for the unknown token.
    pub(super) fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Unfit> {
        let refused = |error: tokenizers::Error| Unfit::Refused(error.to_string());
        let tokenizer = self.closed.as_deref().unwrap_or(tokenizer);
        let ids = tokenizer.encode_fast(text, false).map_err(refused)?.get_ids().to_vec();
        let forged = |id: &u32| Some(*id) != self.unknown && self.ids.contains_key(id);
        let spelt = self.unknown.is_some_and(|unknown| ids.contains(&unknown))
            && self.ids.values().any(|name| !name.is_empty() && text.contains(name.as_str()));
        let lost = |id: &u32| Some(*id) == self.lost;
        if !spelt && !ids.iter().any(|id| forged(id) || lost(id)) {
            return Ok(ids);
        }
        // Again, with the positions.
        let encoding = tokenizer.encode(text, false).map_err(refused)?;
        for (id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            let here = text.get(start..end).unwrap_or_default().trim();
            if lost(id) {
                return Err(Unfit::Unknown { part: here.to_owned(), at: start });
            }
            let unknown_mark = Some(*id) == self.unknown && self.ids.values().any(|name| name == here);
            if forged(id) || unknown_mark {
                let token = if unknown_mark { here.to_owned() } else { self.ids[id].clone() };
                return Err(Unfit::Special { token, at: start });
            }
        }
        Ok(ids)
    }
}

/// Whether a model silently drops unknown text: BPE without an unknown token does, except over all bytes.
fn leaves_out(stored: &Value) -> bool {
    let model = stored.get("model").unwrap_or(&Value::Null);
    let Some(entries) = model.get("vocab").and_then(Value::as_object) else { return false };
    let merges = model.get("merges").is_some_and(Value::is_array);
    let over_bytes = stored.get("pre_tokenizer").is_some_and(|step| step.to_string().contains("\"ByteLevel\""))
        && ByteLevel::alphabet().into_iter().all(|byte| entries.contains_key(&byte.to_string()));
    merges && model.get("unk_token").is_none_or(Value::is_null) && !over_bytes
}

/// Makes a BPE model produce the id `lost` for unknown text.
fn tell_lost(model: &mut Value, lost: u32) {
    // No text contains it: these characters are not for interchange.
    const NAME: &str = "\u{fdd0}unknown\u{fdd1}";
    if let Some(entries) = model.get_mut("vocab").and_then(Value::as_object_mut) {
        entries.insert(NAME.into(), lost.into());
    }
    if let Some(model) = model.as_object_mut() {
        model.insert("unk_token".into(), NAME.into());
    }
}

/// Ids that a post-processor puts around texts.
fn framing_ids(processor: &Value, ids: &mut BTreeSet<u32>) {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    for pair in ["sep", "cls"] {
        ids.extend(processor.get(pair).and_then(|pair| pair.get(1)).and_then(id));
    }
    for token in processor.get("special_tokens").and_then(Value::as_object).into_iter().flat_map(|all| all.values()) {
        ids.extend(token.get("ids").and_then(Value::as_array).into_iter().flatten().filter_map(id));
    }
    for inner in processor.get("processors").and_then(Value::as_array).into_iter().flatten() {
        framing_ids(inner, ids);
    }
}

/// `model` without its paths to the tokens `names`; `None` if it has none, or no other form for them.
fn close(model: &Value, names: &BTreeSet<String>) -> Option<Value> {
    // No text contains it: these characters are not for interchange, and the check of the ids comes afterwards.
    let nowhere = |number: usize| format!("\u{fdd0}special token {number}\u{fdd1}");
    let mut closed = model.clone();
    let mut found = false;
    match model.get("vocab")? {
        // Unigram: a list, in which the position is the id.
        Value::Array(pieces) => {
            for (number, piece) in pieces.iter().enumerate() {
                if piece.get(0).and_then(Value::as_str).is_some_and(|name| names.contains(name)) {
                    *closed.get_mut("vocab")?.get_mut(number)?.get_mut(0)? = nowhere(number).into();
                    found = true;
                }
            }
        }
        Value::Object(entries) => {
            let merges = model.get("merges").and_then(Value::as_array);
            let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str);
            if let Some(merges) = merges {
                let prefix = prefix.unwrap_or_default();
                let kept: Vec<Value> = merges.iter().filter(|merge| !meets(merge, prefix, names)).cloned().collect();
                found = kept.len() < merges.len();
                *closed.get_mut("merges")? = kept.into();
            } else if prefix.is_none() {
                // A word-level model has no pieces: text that spells a mark is refused.
                return None;
            }
            if merges.is_none() || model.get("ignore_merges").and_then(Value::as_bool) == Some(true) {
                for (number, name) in names.iter().enumerate().filter(|(_, name)| entries.contains_key(*name)) {
                    let vocabulary = closed.get_mut("vocab")?.as_object_mut()?;
                    let id = vocabulary.remove(name)?;
                    vocabulary.insert(nowhere(number), id);
                    if model.get("unk_token").and_then(Value::as_str) == Some(name) {
                        *closed.get_mut("unk_token")? = nowhere(number).into();
                    }
                    found = true;
                }
            }
        }
        _ => {}
    }
    found.then_some(closed)
}

/// A merge that makes one of `names`, or is made of one.
fn meets(merge: &Value, prefix: &str, names: &BTreeSet<String>) -> bool {
    let parts = match merge {
        Value::String(text) => text.split_once(' '),
        Value::Array(pair) => pair.first().and_then(Value::as_str).zip(pair.get(1).and_then(Value::as_str)),
        _ => None,
    };
    parts.is_some_and(|(left, right)| {
        let whole = format!("{left}{}", right.strip_prefix(prefix).unwrap_or(right));
        [left, right, &whole].into_iter().any(|token| names.contains(token))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::tokenizer::{EndToken, TextTokenizer};

    fn tokenizer(model: Value, added: Value, pre_tokenizer: Value) -> TextTokenizer {
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": null, "model": model,
        });
        TextTokenizer::from_json(json.to_string().into_bytes(), "tokenizer.json", EndToken::Known).unwrap()
    }

    fn added(id: u32, content: &str, special: bool) -> Value {
        json!({
            "id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false,
        })
    }

    fn split() -> Value {
        json!({ "type": "WhitespaceSplit" })
    }

    /// Every character of the texts below as its own piece, after `first`.
    fn letters(first: &[&str]) -> Vec<String> {
        let mut all: Vec<String> = first.iter().map(|name| (*name).to_owned()).collect();
        all.extend("<>/|sapdunkeoft[]SEPUNK \u{ff5c}x".chars().map(String::from));
        all.dedup();
        all
    }

    fn by_id(pieces: &[String]) -> Value {
        let mut map = serde_json::Map::new();
        for (id, piece) in pieces.iter().enumerate() {
            map.entry(piece.clone()).or_insert(id.into());
        }
        map.into()
    }

    /// None of the marks comes out, and the text is not lost.
    fn comes_out_as_pieces(tokenizer: &TextTokenizer, marks: &[&str], text: &str) {
        let ids = tokenizer.encode(text).unwrap();
        for mark in marks {
            let id = tokenizer.id_of(mark).unwrap();
            assert!(!ids.contains(&id), "{text:?} gave {mark} in {ids:?}");
        }
        assert_eq!(tokenizer.decode(&ids).unwrap().replace(' ', ""), text.replace(' ', ""));
    }

    #[test]
    fn a_unigram_vocabulary_that_holds_the_end_token_gives_its_pieces() {
        for byte_fallback in [false, true] {
            let names = ["<unk>", "<s>", "</s>", "<pad>", "<|x|>", "<\u{ff5c}x\u{ff5c}>"];
            let vocabulary: Vec<Value> = letters(&names)
                .into_iter()
                .map(|piece| json!([piece, if piece.chars().count() > 1 { -0.1 } else { -5.0 }]))
                .collect();
            let model = json!({ "type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": byte_fallback });
            for declared in
                [json!([]), json!([added(2, "</s>", true), added(1, "<s>", true)]), json!([added(2, "</s>", false)])]
            {
                let tokenizer = tokenizer(model.clone(), declared, json!(null));
                assert_eq!(tokenizer.eos_id(), 2);
                for text in ["a</s>x", "</s>", "<s><pad><unk>", "<|x|> <\u{ff5c}x\u{ff5c}>"] {
                    comes_out_as_pieces(&tokenizer, &names, text);
                }
                // Characters that it does not know stay unknown.
                assert!(tokenizer.encode("q").unwrap().contains(&0));
            }
        }
    }

    #[test]
    fn merges_that_lead_to_the_end_token_are_not_taken() {
        let names = ["<unk>", "<s>", "</s>", "</", "s>", "</s", "<|endoftext|>", "<|", "|>"];
        let vocabulary = by_id(&letters(&names));
        let merges = json!([["<", "/"], ["s", ">"], ["</", "s>"], ["<", "s>"], ["</", "s"], ["</s", ">"]]);
        let legacy = json!(["< /", "s >", "</ s>", "< s>", "</ s", "</s >"]);
        for (merges, ignore_merges) in [(merges, false), (legacy.clone(), true), (legacy, false)] {
            let model = json!({
                "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": ignore_merges,
                "vocab": vocabulary, "merges": merges,
            });
            for declared in [json!([]), json!([added(2, "</s>", true)])] {
                let tokenizer = tokenizer(model.clone(), declared, json!(null));
                for text in ["a</s>x", "</s>", "<s>", "<unk>", "<|endoftext|>"] {
                    comes_out_as_pieces(&tokenizer, &["</s>", "<s>", "<|endoftext|>"], text);
                }
            }
        }
    }

    #[test]
    fn a_word_piece_vocabulary_gives_pieces_or_refuses() {
        let mut pieces = letters(&["[UNK]", "[SEP]", "[PAD]"]);
        pieces.extend("SEPUNKAD]x".chars().map(|letter| format!("##{letter}")));
        let model = json!({
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": by_id(&pieces),
        });
        let tokenizer = tokenizer(model.clone(), json!([added(1, "[SEP]", true)]), split());
        for text in ["[SEP]", "x [SEP] x", "[UNK]"] {
            let ids = tokenizer.encode(text).unwrap();
            assert!(ids.len() >= 5 && ids.iter().all(|&id| id > 2), "{text}: {ids:?}");
        }
        assert_eq!(tokenizer.encode("qqq").unwrap(), [0]);
        // Without pieces for it there is no other form.
        let mut few: Vec<String> = ["[UNK]", "[SEP]", "x"].map(str::to_owned).to_vec();
        few.dedup();
        let model = json!({
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": by_id(&few),
        });
        let tokenizer = self::tokenizer(model, json!([]), split());
        assert_eq!(tokenizer.encode("x q x").unwrap(), [2, 0, 2]);
        for (text, at) in [("x [SEP]", 2), ("[UNK] x", 0)] {
            let unfit = tokenizer.encode_text(text).unwrap_err();
            assert!(matches!(unfit, Unfit::Special { at: place, .. } if place == at), "{unfit:?}");
        }
    }

    #[test]
    fn a_word_level_vocabulary_refuses_the_mark_and_says_where() {
        let pieces = ["<unk>", "</s>", "<pad>", "a", "b"].map(str::to_owned);
        let model = json!({ "type": "WordLevel", "unk_token": "<unk>", "vocab": by_id(&pieces) });
        for declared in [json!([]), json!([added(1, "</s>", true)])] {
            let tokenizer = tokenizer(model.clone(), declared, split());
            assert_eq!(tokenizer.encode("a b q").unwrap(), [3, 4, 0]);
            for (text, token, at) in [("a\n</s> b", "</s>", 2), ("<pad>", "<pad>", 0), ("a <unk>", "<unk>", 2)] {
                let unfit = tokenizer.encode_text(text).unwrap_err();
                assert_eq!(unfit, Unfit::Special { token: token.into(), at }, "{text}");
            }
        }
    }

    #[test]
    fn an_end_token_declared_as_ordinary_is_not_looked_for_in_text() {
        let vocabulary = by_id(&letters(&["<unk>"]));
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        });
        let declared = json!([added(50, "<|endoftext|>", false), added(51, "<|x|>", false), added(52, "sap", false)]);
        let tokenizer = tokenizer(model, declared, json!(null));
        comes_out_as_pieces(&tokenizer, &["<|endoftext|>", "<|x|>"], "<|endoftext|><|x|>");
        // Ordinary tokens stay ordinary.
        assert_eq!(tokenizer.encode("sap").unwrap(), [tokenizer.id_of("sap").unwrap()]);
    }

    #[test]
    fn an_end_token_that_is_an_ordinary_word_makes_such_text_an_error() {
        let pieces = letters(&["<unk>"]);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": by_id(&pieces), "merges": [],
        });
        let json = json!({ "version": "1.0", "added_tokens": [], "pre_tokenizer": null, "model": model });
        let tokenizer = TextTokenizer::from_json(json.to_string().into_bytes(), "t", EndToken::Named("x")).unwrap();
        assert_eq!(tokenizer.encode_text("sax").unwrap_err(), Unfit::Special { token: "x".into(), at: 2 });
        assert_eq!(tokenizer.encode("sa").unwrap().len(), 2);
    }

    #[test]
    fn a_token_put_around_texts_is_special_under_any_name() {
        let vocabulary: Vec<Value> =
            letters(&["<unk>", "</s>", "[Q]"]).into_iter().map(|piece| json!([piece, -1.0])).collect();
        let model = json!({ "type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": false });
        let framed = |post_processor: Value| {
            let json = json!({
                "version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": null, "decoder": null,
                "post_processor": post_processor,
            });
            let tokenizer = TextTokenizer::from_json(json.to_string().into_bytes(), "t", EndToken::Known)
                .map_err(|e| e.to_string());
            tokenizer.unwrap().encode("[Q]").unwrap()
        };
        assert_eq!(framed(json!(null)), [2], "a piece like any other");
        let template = json!({
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "[Q]", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "[Q]": { "id": "[Q]", "ids": [2], "tokens": ["[Q]"] } },
        });
        assert!(!framed(template.clone()).contains(&2));
        assert!(!framed(json!({ "type": "Sequence", "processors": [template] })).contains(&2));
        let bert = json!({ "type": "BertProcessing", "sep": ["[Q]", 2], "cls": ["[Q]", 2] });
        assert!(!framed(bert).contains(&2));
    }

    fn merges(dropout: Value, pre_tokenizer: Value) -> TextTokenizer {
        let model = json!({
            "type": "BPE", "dropout": dropout, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": { "</s>": 0, "a": 1, "b": 2, "ab": 3 }, "merges": [["a", "b"]],
        });
        tokenizer(model, json!([added(0, "</s>", true)]), pre_tokenizer)
    }

    #[test]
    fn text_that_a_tokenizer_would_silently_drop_is_an_error() {
        let tokenizer = merges(json!(null), split());
        assert_eq!(tokenizer.encode("ab ba").unwrap(), [3, 2, 1]);
        let unfit = tokenizer.encode_text("ab\n bzb").unwrap_err();
        assert_eq!(unfit, Unfit::Unknown { part: "z".into(), at: 5 });
        assert_eq!(tokenizer.vocab_size(), 4, "its vocabulary stays");
        // Over bytes nothing is unknown, as long as all are there.
        let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true });
        assert!(merges(json!(null), byte_level).encode("ab\u{1f980}").is_err());
        let all = TextTokenizer::train(300, ["some text"].into_iter()).unwrap();
        assert!(!all.encode("\u{1f980}").unwrap().is_empty());
    }

    #[test]
    fn the_same_text_has_the_same_ids_even_with_dropout() {
        for text in ["ab".repeat(300), "ab</s>".repeat(100).replace("</s>", "")] {
            let ids = merges(json!(0.5), split()).encode(&text).unwrap();
            assert!(ids.iter().all(|&id| id == 3), "{ids:?}");
        }
    }
}
