//! The meaning of a tokenizer's ids: the part of a `tokenizer.json` that must agree for one tokenizer to replace
//! another.
//!
//! It is read from the JSON, not from the loaded tokenizer, so that neither spelling nor order matter: merges are pairs
//! or text with a space, added tokens are in the vocabulary or not, and files are written by many versions of many
//! programs.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::storage::Crc64;

/// A vocabulary, how words are put together from it, and which of its entries are special.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meaning {
    /// Each id's text, added tokens included.
    tokens: BTreeMap<u32, String>,
    special: BTreeSet<u32>,
    merges: Vec<(String, String)>,
    /// Of a Unigram vocabulary: the score of each entry, as its bits.
    scores: Vec<u64>,
}

impl Meaning {
    /// Reads a `tokenizer.json`; the error says why it can't be read.
    pub fn of_json(json: &[u8]) -> Result<Self, String> {
        let json: Value = serde_json::from_slice(json).map_err(|error| format!("is not JSON: {error}"))?;
        let model = &json["model"];
        let mut meaning = Self::default();
        match &model["vocab"] {
            Value::Object(vocabulary) => {
                for (text, id) in vocabulary {
                    meaning.tokens.insert(id_of(id)?, text.clone());
                }
            }
            Value::Array(pieces) => {
                for (id, piece) in pieces.iter().enumerate() {
                    let text = piece[0].as_str().ok_or("has a vocabulary entry without text")?;
                    let id = u32::try_from(id).map_err(|_| "has too many vocabulary entries")?;
                    meaning.tokens.insert(id, text.to_owned());
                    meaning.scores.push(piece[1].as_f64().unwrap_or_default().to_bits());
                }
            }
            _ => return Err("has no vocabulary".into()),
        }
        for merge in model["merges"].as_array().into_iter().flatten() {
            let pair = match merge {
                Value::String(text) => text.split_once(' '),
                pair => pair[0].as_str().zip(pair[1].as_str()),
            };
            let (left, right) = pair.ok_or("has a merge that is not a pair")?;
            meaning.merges.push((left.to_owned(), right.to_owned()));
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let id = id_of(&token["id"])?;
            let text = token["content"].as_str().ok_or("has an added token without text")?;
            meaning.tokens.insert(id, text.to_owned());
            if token["special"] == true {
                meaning.special.insert(id);
            }
        }
        Ok(meaning)
    }

    /// An id's text.
    pub fn text(&self, id: u32) -> Option<&str> {
        self.tokens.get(&id).map(String::as_str)
    }

    /// Whether an id is a special token's.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The id of a text.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.tokens.iter().find(|(_, found)| *found == text).map(|(id, _)| *id)
    }

    /// Checksum over all of it.
    pub fn digest(&self) -> Crc64 {
        let mut bytes = Vec::new();
        let mut word = |text: &str| {
            bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        };
        for (id, text) in &self.tokens {
            word(&id.to_string());
            word(text);
            word(if self.special.contains(id) { "special" } else { "" });
        }
        for (left, right) in &self.merges {
            word(left);
            word(right);
        }
        for score in &self.scores {
            word(&score.to_string());
        }
        Crc64::of(&bytes)
    }

    /// The first difference from `theirs`; `None`: the two agree.
    pub fn difference(&self, theirs: &Self) -> Option<String> {
        if self == theirs {
            return None;
        }
        let ids: BTreeSet<u32> = self.tokens.keys().chain(theirs.tokens.keys()).copied().collect();
        let said = |text: Option<&str>| text.map_or_else(|| "nothing".to_owned(), |text| format!("{text:?}"));
        for id in ids {
            let (ours, other) = (self.text(id), theirs.text(id));
            if ours != other {
                return Some(format!("id {id} is {} here and {} there", said(ours), said(other)));
            }
            if self.is_special(id) != theirs.is_special(id) {
                let (here, there) = if self.is_special(id) { ("here", "there") } else { ("there", "here") };
                return Some(format!("id {id}, {}, is a special token {here} and text {there}", said(ours)));
            }
        }
        let merge = self.merges.iter().zip(&theirs.merges).position(|(ours, other)| ours != other);
        if merge.is_some() || self.merges.len() != theirs.merges.len() {
            let at = merge.unwrap_or_else(|| self.merges.len().min(theirs.merges.len()));
            return Some(format!("they join words differently from merge {at} on"));
        }
        Some("the scores of their vocabularies differ".to_owned())
    }
}

fn id_of(value: &Value) -> Result<u32, String> {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| format!("has {value} for an id"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bpe() -> Value {
        json!({
            "added_tokens": [{"id": 0, "content": "</s>", "special": true}],
            "model": {"type": "BPE", "vocab": {"a": 1, "b": 2, "ab": 3, "</s>": 0}, "merges": ["a b"]},
        })
    }

    fn read(json: &Value) -> Meaning {
        Meaning::of_json(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn spelling_and_order_do_not_matter() {
        let mut other = bpe();
        other["model"]["merges"] = json!([["a", "b"]]);
        other["model"]["vocab"] = json!({"ab": 3, "b": 2, "a": 1});
        other["added_tokens"][0]["lstrip"] = json!(false);
        other["normalizer"] = json!(null);
        assert_eq!(read(&bpe()).difference(&read(&other)), None);
        assert_eq!(read(&bpe()).digest(), read(&other).digest());
        let pretty = serde_json::to_vec_pretty(&other).unwrap();
        assert_eq!(Meaning::of_json(&pretty).unwrap(), read(&bpe()));
    }

    #[test]
    fn the_meaning_of_ids_and_the_way_words_are_joined_matter() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 6] = [
            (|json| json["model"]["vocab"] = json!({"b": 1, "a": 2, "ab": 3}), r#"id 1 is "a" here and "b" there"#),
            (|json| json["model"]["vocab"]["c"] = json!(4), r#"id 4 is nothing here and "c" there"#),
            (|json| json["added_tokens"][0]["content"] = json!("<s>"), r#"id 0 is "</s>" here and "<s>" there"#),
            (|json| json["added_tokens"][0]["special"] = json!(false), "a special token here and text there"),
            (|json| json["model"]["merges"] = json!([]), "from merge 0 on"),
            (|json| json["model"]["merges"] = json!(["b a"]), "from merge 0 on"),
        ];
        for (change, expected) in cases {
            let mut other = bpe();
            change(&mut other);
            let found = read(&bpe()).difference(&read(&other)).unwrap();
            assert!(found.contains(expected), "{expected}: {found}");
            assert_ne!(read(&bpe()).digest(), read(&other).digest(), "{expected}");
        }
    }

    #[test]
    fn a_unigram_vocabulary_is_read_with_its_scores() {
        let unigram =
            |score: f64| read(&json!({"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", score]]}}));
        assert_eq!(unigram(-1.5).text(1), Some("a"));
        assert_eq!(unigram(-1.5).id("a"), Some(1));
        assert_eq!(unigram(-1.5).difference(&unigram(-1.5)), None);
        assert!(unigram(-1.5).difference(&unigram(-1.25)).unwrap().contains("scores"));
    }

    #[test]
    fn a_file_that_is_not_a_tokenizer_is_an_error() {
        for text in ["", "{", "[]", "{}", r#"{"model":{"vocab":{"a":-1}}}"#, r#"{"model":{"vocab":[[1,2]]}}"#] {
            assert!(Meaning::of_json(text.as_bytes()).is_err(), "{text}");
        }
    }
}
