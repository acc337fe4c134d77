//! A given tokenizer: a file, a folder, or an address in a store.

use std::path::{Path, PathBuf};

use super::{DataError, input, prepare::TokenizerSource, tokenizer::MAX_FILE_BYTES};
use crate::{
    config::{StorageConfig, read_small},
    layout::TOKENIZER,
    storage::{StorageError, Store},
};

/// The bytes of a tokenizer, and its name.
pub(super) struct Given {
    pub name: String,
    pub json: Vec<u8>,
}

/// Reads the tokenizer that `source` names; `None` if it is to be trained.
pub(super) async fn load(source: &TokenizerSource, storage: &StorageConfig) -> Result<Option<Given>, DataError> {
    match source {
        TokenizerSource::Train { .. } => Ok(None),
        TokenizerSource::File(path) => {
            let path = file(path)?;
            Ok(Some(Given { json: read(&path)?, name: path.display().to_string() }))
        }
        TokenizerSource::Uri(uri) => match input::local_path(uri) {
            Some(path) => {
                let path = file(&path)?;
                Ok(Some(Given { json: read(&path)?, name: uri.clone() }))
            }
            None => fetch(uri, storage).await.map(Some),
        },
    }
}

/// The file itself: of a folder its `tokenizer.json`.
fn file(path: &Path) -> Result<PathBuf, DataError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let inside = path.join(TOKENIZER);
    if inside.is_file() {
        return Ok(inside);
    }
    let refuse = |reason: String| DataError::Tokenizer { file: path.display().to_string(), reason };
    for other in ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"] {
        if path.join(other).is_file() {
            return Err(refuse(format!("has no {TOKENIZER}, but {other}; {}", convert(&path.display().to_string()))));
        }
    }
    Err(refuse(format!("is a folder without a {TOKENIZER}")))
}

/// How to get a `tokenizer.json` from other forms.
fn convert(folder: &str) -> String {
    format!(
        "make one: python3 -c \"import transformers; transformers.AutoTokenizer.from_pretrained('{folder}', \
         use_fast=True).save_pretrained('converted')\", then --tokenizer converted"
    )
}

/// Reads a `tokenizer.json`; an error names other forms.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, DataError> {
    let name = path.display().to_string();
    let failed = |reason: String| DataError::Tokenizer { file: name.clone(), reason };
    let length = std::fs::metadata(path).map_err(|error| failed(format!("can't be read: {error}")))?.len();
    if length > MAX_FILE_BYTES {
        return Err(failed(too_long(length)));
    }
    let json = read_small(path, MAX_FILE_BYTES).map_err(|error| failed(format!("can't be read: {error}")))?;
    let folder = path.parent().map(|folder| folder.display().to_string()).unwrap_or_default();
    check(&json, &name, if folder.is_empty() { "." } else { &folder })?;
    Ok(json)
}

fn too_long(length: u64) -> String {
    format!("has {length} bytes; a {TOKENIZER} has at most {MAX_FILE_BYTES}")
}

/// Refuses a file that is not JSON and has a known other form.
fn check(bytes: &[u8], name: &str, folder: &str) -> Result<(), DataError> {
    if bytes.trim_ascii_start().starts_with(b"{") || !name.ends_with(".model") {
        return Ok(());
    }
    let reason = format!("is a SentencePiece model, not a {TOKENIZER}; {}", convert(folder));
    Err(DataError::Tokenizer { file: name.to_owned(), reason })
}

async fn fetch(uri: &str, storage: &StorageConfig) -> Result<Given, DataError> {
    let uri = uri.trim_end_matches('/');
    let failed = |source| DataError::Store { doing: "read the tokenizer", uri: uri.to_owned(), source };
    // The object itself, or the one in the folder of that name.
    let split = uri.rsplit_once('/').filter(|(folder, _)| !folder.ends_with('/') && !folder.ends_with(':'));
    if let Some((folder, key)) = split.filter(|(_, key)| key.contains('.')) {
        match Store::open(folder, storage).map_err(failed)?.get(key, MAX_FILE_BYTES).await {
            Ok(bytes) => {
                check(&bytes, uri, folder)?;
                return Ok(Given { name: uri.to_owned(), json: bytes.to_vec() });
            }
            Err(StorageError::NotFound { .. }) => {}
            Err(source) => return Err(failed(source)),
        }
    }
    let name = format!("{uri}/{TOKENIZER}");
    match Store::open(uri, storage).map_err(failed)?.get(TOKENIZER, MAX_FILE_BYTES).await {
        Ok(bytes) => Ok(Given { name, json: bytes.to_vec() }),
        Err(StorageError::NotFound { .. }) => Err(DataError::Tokenizer {
            file: uri.to_owned(),
            reason: format!("does not exist, and is no folder with a {TOKENIZER} either"),
        }),
        Err(source) => Err(failed(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::tokenizer::TextTokenizer,
        error::{Explain, Kind},
    };

    #[tokio::test]
    async fn a_tokenizer_is_a_file_a_folder_or_a_uri_and_other_forms_say_how_to_convert_them() {
        let dir = tempfile::tempdir().unwrap();
        let json = TextTokenizer::train(300, ["some text"].into_iter()).unwrap().json().to_vec();
        let model = dir.path().join("model");
        std::fs::create_dir(&model).unwrap();
        std::fs::write(model.join(TOKENIZER), &json).unwrap();
        let there = model.display().to_string();
        let storage = StorageConfig::plain(4, 1);
        for text in
            [there.clone(), format!("{there}/{TOKENIZER}"), format!("file://{there}"), format!("file://{there}/")]
        {
            let source: TokenizerSource = text.parse().unwrap();
            let given = load(&source, &storage).await.unwrap().unwrap();
            assert!(given.json == json && given.name.contains("model"), "{text}");
        }
        std::fs::rename(model.join(TOKENIZER), model.join("tokenizer.model")).unwrap();
        std::fs::write(model.join("tokenizer.model"), b"\n\x0e\n\x05<unk>\x15").unwrap();
        for text in [there.clone(), format!("{there}/tokenizer.model")] {
            let error = load(&text.parse().unwrap(), &storage).await.err().unwrap();
            assert!(error.to_string().contains("save_pretrained"), "{error}");
            assert_eq!(error.kind(), Kind::Config);
        }
    }
}
