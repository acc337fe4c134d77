//! A given tokenizer: a file, a folder, or an address in a store.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde_json::Value;

use super::{
    DataError, around, input, marks,
    prepare::TokenizerSource,
    templates::{self, Templates},
    tokenizer::MAX_FILE_BYTES,
};
use crate::{
    config::{StorageConfig, read_small},
    layout::{
        ADDITIONAL_TEMPLATES, CHAT_TEMPLATE, CHAT_TEMPLATE_JSON, GENERATION_CONFIG, MODEL_CONFIG, SPECIAL_TOKENS,
        TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_FILES,
    },
    storage::{StorageError, Store},
};

/// The files of a folder that travel with its tokenizer.
fn others() -> impl Iterator<Item = &'static str> {
    TOKENIZER_FILES.into_iter().chain([GENERATION_CONFIG, MODEL_CONFIG]).filter(|name| marks::travels(name))
}

/// A given tokenizer.
pub(super) struct Given {
    pub name: String,
    /// Its `tokenizer.json`.
    pub json: Vec<u8>,
    /// Of a folder: the files beside it that say how it is used, by name.
    pub files: Vec<(String, Bytes)>,
}

impl Given {
    fn object(&self, name: &str) -> Result<Option<Value>, DataError> {
        let Some((_, bytes)) = self.files.iter().find(|(file, _)| file == name) else { return Ok(None) };
        serde_json::from_slice(bytes).map(Some).map_err(|error| DataError::Tokenizer {
            file: self.name.clone(),
            reason: format!("has a {name} that is not JSON: {error}"),
        })
    }

    /// The special tokens that the folder names, such as `bos_token`.
    pub(super) fn special_tokens(&self) -> Result<BTreeMap<String, String>, DataError> {
        let mut tokens = BTreeMap::new();
        // The first file that names one decides.
        for name in [TOKENIZER_CONFIG, SPECIAL_TOKENS] {
            let Some(Value::Object(fields)) = self.object(name)? else { continue };
            for (key, value) in fields.iter().filter(|(key, _)| key.ends_with("_token") && !key.starts_with("add_")) {
                if let Some(text) = value.get("content").unwrap_or(value).as_str() {
                    tokens.entry(key.clone()).or_insert_with(|| text.to_owned());
                }
            }
        }
        Ok(tokens)
    }

    /// The ids with which the model ends a text: those of its description first, then those of its generation settings.
    pub(super) fn eos_ids(&self) -> Result<Vec<u32>, DataError> {
        let one = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        let mut found = Vec::new();
        for name in [MODEL_CONFIG, GENERATION_CONFIG] {
            let object = self.object(name)?;
            match object.as_ref().and_then(|object| object.get("eos_token_id")) {
                Some(Value::Array(ids)) => found.extend(ids.iter().filter_map(one)),
                Some(id) => found.extend(one(id)),
                None => {}
            }
        }
        Ok(found)
    }

    /// The folder's chat templates, if it has any.
    pub(super) fn chat_templates(&self) -> Result<Option<Templates>, DataError> {
        let failed = |reason: &str| DataError::Tokenizer { file: self.name.clone(), reason: reason.to_owned() };
        if let Some((_, bytes)) = self.files.iter().find(|(file, _)| file == CHAT_TEMPLATE) {
            let text = std::str::from_utf8(bytes).map_err(|_| failed("has a chat_template.jinja that is not UTF-8"))?;
            return Ok(Some(Templates::One(text.to_owned())));
        }
        for name in [CHAT_TEMPLATE_JSON, TOKENIZER_CONFIG] {
            let value = self.object(name)?.and_then(|object| object.get("chat_template").cloned());
            if let Some(found) = Templates::of_settings(&value.unwrap_or_default()).map_err(failed)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// What the folder's settings say about tokens around a text against its tokenizer, in words.
    pub(super) fn contradictions(&self) -> Result<Vec<String>, DataError> {
        let Some(Value::Object(mut settings)) = self.object(TOKENIZER_CONFIG)? else { return Ok(Vec::new()) };
        Ok(around::agree(&mut settings, &self.json))
    }
}

/// Reads the tokenizer that `source` names; `None` if it is to be trained.
pub(super) async fn load(source: &TokenizerSource, storage: &StorageConfig) -> Result<Option<Given>, DataError> {
    match source {
        TokenizerSource::Train { .. } => Ok(None),
        TokenizerSource::File(path) => local(path, None).map(Some),
        TokenizerSource::Uri(uri) => match input::local_path(uri) {
            Some(path) => local(&path, Some(uri)).map(Some),
            None => fetch(uri, storage).await.map(Some),
        },
    }
}

/// A tokenizer on this machine, called `name`.
fn local(path: &Path, name: Option<&str>) -> Result<Given, DataError> {
    let inside = file(path)?;
    let mut files = Vec::new();
    if path.is_dir() {
        for name in others() {
            let file = path.join(name);
            if file.is_file() {
                let bytes = read_small(&file, MAX_FILE_BYTES).map_err(|error| DataError::Tokenizer {
                    file: file.display().to_string(),
                    reason: format!("can't be read: {error}"),
                })?;
                files.push((name.to_owned(), bytes.into()));
            }
        }
        let templates = additional(path)?;
        templates::fold(&mut files, &templates)
            .map_err(|reason| DataError::Tokenizer { file: path.display().to_string(), reason })?;
    }
    let name = name.map_or_else(|| inside.display().to_string(), str::to_owned);
    Ok(Given { json: read(&inside)?, name, files })
}

/// The additional chat templates of a folder on this machine, by name.
fn additional(path: &Path) -> Result<BTreeMap<String, Bytes>, DataError> {
    let folder = path.join(ADDITIONAL_TEMPLATES);
    let mut found = BTreeMap::new();
    for file in std::fs::read_dir(&folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path()) {
        let name = file.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".jinja"));
        if let Some(name) = name.filter(|name| !name.is_empty() && file.is_file()) {
            let bytes = read_small(&file, MAX_FILE_BYTES).map_err(|error| DataError::Tokenizer {
                file: file.display().to_string(),
                reason: format!("can't be read: {error}"),
            })?;
            found.insert(name.to_owned(), bytes.into());
        }
    }
    Ok(found)
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
                return Ok(Given { name: uri.to_owned(), json: bytes.to_vec(), files: Vec::new() });
            }
            Err(StorageError::NotFound { .. }) => {}
            Err(source) => return Err(failed(source)),
        }
    }
    let name = format!("{uri}/{TOKENIZER}");
    let folder = Store::open(uri, storage).map_err(failed)?;
    match folder.get(TOKENIZER, MAX_FILE_BYTES).await {
        Ok(bytes) => {
            let mut files = Vec::new();
            for name in others() {
                match folder.get(name, MAX_FILE_BYTES).await {
                    Ok(bytes) => files.push((name.to_owned(), bytes)),
                    Err(StorageError::NotFound { .. }) => {}
                    Err(source) => return Err(failed(source)),
                }
            }
            let additional = templates::additional(&folder).await.map_err(failed)?;
            templates::fold(&mut files, &additional)
                .map_err(|reason| DataError::Tokenizer { file: uri.to_owned(), reason })?;
            Ok(Given { name, json: bytes.to_vec(), files })
        }
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
