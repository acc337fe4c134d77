//! A dataset's identity: the checksum of its index, and that of the meaning of its token ids.
//!
//! The index holds the CRC64-NVME of every shard and of `tokenizer.json`, so its own checksum stands for all of the
//! dataset. The vocabulary has its own checksum: text may be prepared anew with the same tokenizer, and the ids then
//! still mean the same to a trained model.

use std::path::Path;

use serde_json::Value;

use super::{
    DataError,
    shards::{INDEX, Index, read_index_bytes},
};
use crate::{ids::DatasetId, layout, storage::Crc64};

/// The dataset in a folder of this machine. Its tokenizer is checked against the index.
///
/// # Errors
/// [`DataError::Missing`] without an index, [`DataError::Damaged`] if a file does not match the index.
pub fn identify(dir: &Path) -> Result<DatasetId, DataError> {
    let bytes = read_index_bytes(dir)?;
    let index = Index::parse(&bytes, &dir.join(INDEX).display().to_string())?;
    let path = dir.join(layout::TOKENIZER);
    let tokenizer =
        std::fs::read(&path).map_err(|source| DataError::Io { doing: "read", path: path.clone(), source })?;
    let found = Crc64::of(&tokenizer);
    if found != index.tokenizer.crc64 {
        let reason = format!("has CRC64 {found}, its index says {}", index.tokenizer.crc64);
        return Err(DataError::Damaged { file: path.display().to_string(), reason });
    }
    Ok(DatasetId { index: Crc64::of(&bytes).to_string(), vocabulary: vocabulary(&tokenizer).to_string() })
}

/// Whether the folder still holds the dataset with this index.
///
/// # Errors
/// The errors of reading its index.
pub fn is_still(dir: &Path, index: &str) -> Result<bool, DataError> {
    Ok(Crc64::of(&read_index_bytes(dir)?).to_string() == index)
}

/// The checksum of a `tokenizer.json`'s vocabulary: each id with its text, the added tokens, and how pieces are joined
/// (merges or scores). The file's spelling, and the processing of text before and after, are left out. For a file of
/// another kind the whole file counts.
pub fn vocabulary(tokenizer: &[u8]) -> Crc64 {
    match serde_json::from_slice::<Value>(tokenizer).ok().as_ref().and_then(canonical) {
        Some(text) => Crc64::of(text.as_bytes()),
        None => Crc64::of(tokenizer),
    }
}

fn canonical(tokenizer: &Value) -> Option<String> {
    let model = tokenizer.get("model")?;
    let mut joins = Vec::new();
    let tokens: Option<Vec<(u64, &str)>> = match model.get("vocab")? {
        Value::Object(vocab) => vocab.iter().map(|(text, id)| Some((id.as_u64()?, text.as_str()))).collect(),
        // Unigram: the position is the id, and each has a score.
        Value::Array(vocab) => (0..)
            .zip(vocab)
            .map(|(id, entry)| {
                let [text, score] = entry.as_array()?.as_slice() else { return None };
                joins.push(score.to_string());
                Some((id, text.as_str()?))
            })
            .collect(),
        _ => None,
    };
    let mut tokens = tokens?;
    for added in tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        tokens.push((added.get("id")?.as_u64()?, added.get("content")?.as_str()?));
    }
    tokens.sort_unstable();
    tokens.dedup();
    for merge in model.get("merges").and_then(Value::as_array).into_iter().flatten() {
        // "a b" in older files, ["a", "b"] in newer ones.
        let (a, b) = match merge {
            Value::String(pair) => pair.split_once(' ')?,
            pair => (pair.get(0)?.as_str()?, pair.get(1)?.as_str()?),
        };
        joins.push(serde_json::to_string(&(a, b)).ok()?);
    }
    let mut text = serde_json::to_string(&tokens).ok()?;
    for join in joins {
        text.push('\n');
        text.push_str(&join);
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::shards::{FORMAT, FileEntry, TokenType};

    fn of(tokenizer: &Value) -> Crc64 {
        vocabulary(&serde_json::to_vec(tokenizer).unwrap())
    }

    #[test]
    fn a_vocabulary_is_its_ids_and_joins_however_the_file_is_written() {
        let bpe = |vocab: Value, merges: Value| {
            let model = json!({"type": "BPE", "vocab": vocab, "merges": merges});
            json!({"model": model, "added_tokens": [{"id": 3, "content": "<eos>"}]})
        };
        let plain = of(&bpe(json!({"a": 0, "b": 1, "ab": 2}), json!(["a b"])));
        assert_eq!(plain, of(&bpe(json!({"ab": 2, "b": 1, "a": 0, "<eos>": 3}), json!([["a", "b"]]))));
        let mut other = bpe(json!({"a": 0, "b": 1, "ab": 2}), json!(["a b"]));
        other["normalizer"] = json!({"type": "NFC"});
        let pretty = serde_json::to_vec_pretty(&other).unwrap();
        assert_eq!(plain, vocabulary(&pretty), "neither the layout nor the normalizer changes what an id means");
        for another in [
            bpe(json!({"a": 1, "b": 0, "ab": 2}), json!(["a b"])),
            bpe(json!({"a": 0, "b": 1}), json!(["a b"])),
            bpe(json!({"a": 0, "b": 1, "ab": 2}), json!(["b a"])),
            json!({
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
                "added_tokens": [],
            }),
        ] {
            assert_ne!(plain, of(&another), "{another}");
        }
        let unigram = |first: f64| json!({"model": {"type": "Unigram", "vocab": [["a", first], ["b", -2.5]]}});
        assert_eq!(of(&unigram(-1.5)), of(&unigram(-1.5)));
        assert_ne!(of(&unigram(-1.5)), of(&unigram(-1.25)));
        assert_eq!(vocabulary(b"no JSON"), Crc64::of(b"no JSON"));
    }

    #[test]
    fn a_dataset_is_identified_by_its_index_and_another_tokenizer_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = br#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
        std::fs::write(dir.path().join(layout::TOKENIZER), tokenizer).unwrap();
        let index = |vocab_size: u32| {
            let crc64 = Crc64::of(tokenizer);
            let tokenizer = FileEntry { file: layout::TOKENIZER.into(), bytes: tokenizer.len() as u64, crc64 };
            let (dtype, eos_id, recipe) = (TokenType::U16, 0, String::new());
            let (documents, sources, train, validation) = (None, vec![], vec![], vec![]);
            Index {
                format: FORMAT,
                dtype,
                vocab_size,
                eos_id,
                recipe,
                tokenizer,
                documents,
                sources,
                train,
                validation,
            }
            .to_bytes()
        };
        std::fs::write(dir.path().join(INDEX), index(1)).unwrap();
        let id = identify(dir.path()).unwrap();
        assert_eq!(id.index, Crc64::of(&index(1)).to_string());
        assert_eq!(id.vocabulary, vocabulary(tokenizer).to_string());
        assert!(is_still(dir.path(), &id.index).unwrap());
        std::fs::write(dir.path().join(INDEX), index(2)).unwrap();
        assert!(!is_still(dir.path(), &id.index).unwrap());
        std::fs::write(dir.path().join(layout::TOKENIZER), b"{}").unwrap();
        let error = identify(dir.path()).unwrap_err();
        assert!(matches!(&error, DataError::Damaged { file, .. } if file.ends_with(layout::TOKENIZER)), "{error}");
    }
}
