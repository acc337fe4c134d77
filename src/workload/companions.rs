//! The small files that make a checkpoint's folder a Hugging Face model folder, which any program opens: the model's
//! description, the generation settings and the tokenizer.
//!
//! What these files say about tokens agrees with the data. A run that starts from the weights of a folder whose
//! tokenizer is the data's takes that tokenizer's other files along, chat templates included. They are read from the
//! folder when the run is created, and from the newest checkpoint when it is resumed: the folder may be gone by then.
//! A dataset that was prepared with a folder's tokenizer has these files itself, and then they are taken from there:
//! the chat template is the one that the data was made with.

use std::{collections::BTreeMap, path::Path, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Map, Value, json};

use super::initial;
use crate::{
    checkpoint::{CheckpointError, catalog, export, restore},
    config::{self, LoraConfig, ModelConfig, RunConfig, TokenizerRule, TrainTask},
    data::{Dataset, around, meaning::Meaning, shards::Index, templates},
    error::{Error, Kind, Result},
    journal::{Committed, RunState},
    layout, model,
    report::{Event, Reporter},
    storage::{StorageError, Store},
};

/// Files by name.
pub type Files = Vec<(String, Bytes)>;

/// The largest file that is read. Files of every tokenizer in use are smaller.
const MAX_FILE: u64 = 256 << 20;
/// Files requested at once from a folder.
const ASKED: usize = 8;
/// Checkpoints searched for the files that a run took along, newest first.
const CHECKPOINTS: usize = 3;
/// How long a resumed run waits for the folder that it once started from.
const PATIENCE: Duration = Duration::from_secs(30);

/// The data's tokenizer.
pub struct Tokens {
    /// Its `tokenizer.json`.
    pub json: Bytes,
    /// What its ids mean.
    pub meaning: Meaning,
    /// The token between documents.
    pub eos_id: u32,
    /// The token before each document.
    pub bos_id: Option<u32>,
    /// The tokens that end an assistant's turn, in chats.
    pub end_ids: Vec<u32>,
    /// The tokenizer's other files, of a dataset that has them.
    pub files: Files,
}

impl Tokens {
    /// The tokens of a dataset's folder on this machine.
    pub fn of(dir: &Path, index: &Index) -> Result<Self> {
        let path = dir.join(layout::TOKENIZER);
        let json: Bytes = std::fs::read(&path)
            .map_err(|error| Error::from_source(Kind::Config, error).context(format!("read {}", path.display())))?
            .into();
        // The data was made with this tokenizer, whatever it is: without its vocabulary the files only say less.
        let meaning = Meaning::of_json(&json).unwrap_or_else(|reason| {
            tracing::warn!("{} {reason}", path.display());
            Meaning::default()
        });
        let documents = index.documents.as_ref();
        let mut files = Files::new();
        // The run has the model's description.
        let travelling = documents.into_iter().flat_map(|documents| &documents.files);
        for entry in travelling.filter(|entry| entry.file != layout::MODEL_CONFIG) {
            let path = dir.join(&entry.file);
            let bytes = config::read_small(&path, MAX_FILE)
                .map_err(|error| Error::from_source(Kind::Config, error).context(format!("read {}", path.display())))?;
            files.push((entry.file.clone(), bytes.into()));
        }
        Ok(Self {
            json,
            meaning,
            eos_id: index.eos_id,
            bos_id: documents.and_then(|documents| documents.bos_id),
            end_ids: documents
                .and_then(|documents| documents.chat.as_ref())
                .map(|chat| chat.end_ids.clone())
                .unwrap_or_default(),
            files,
        })
    }

    /// The files of the tokenizer's folder: the data's, where it has them, else `own`, of the folder that the weights
    /// come from. Generation settings are the model's.
    fn with(&self, own: Option<Files>) -> Option<Files> {
        if self.files.is_empty() {
            return own;
        }
        let generation = own.into_iter().flatten().filter(|(name, _)| name == layout::GENERATION_CONFIG);
        let mut files: BTreeMap<String, Bytes> = self.files.iter().cloned().collect();
        files.extend(generation);
        Some(files.into_iter().collect())
    }

    fn eos(&self) -> Option<&str> {
        self.meaning.text(self.eos_id)
    }
}

/// The files of a run whose tokenizer is the data's alone.
pub fn plain(task: &TrainTask, tokens: &Tokens) -> Result<Files> {
    files(task, tokens, tokens.with(None).as_deref()).map(|(files, _)| files)
}

/// Reads what a new run starts from, and takes along the files that belong to it. `data`: the folder of its data.
///
/// # Errors
/// When the weights or the tokenizer are not those of the model and the data.
pub async fn of_new_run(config: &RunConfig, data: &Path, reporter: &Reporter) -> Result<Files> {
    let task = &config.workload;
    let dataset = Dataset::open(data)?;
    let tokens = Tokens::of(data, dataset.index())?;
    let own = match &task.model.init_from {
        Some(uri) => {
            let folder = initial::open(uri, &config.storage)?;
            initial::weights(&task.model, uri, &folder).await?;
            initial::check_tokenizer(&task.data, uri, &folder, &tokens.meaning).await?;
            if task.data.tokenizer == TokenizerRule::Same { Some(from_folder(&folder).await?) } else { None }
        }
        None => None,
    };
    let (files, contradictions) = files(task, &tokens, tokens.with(own).as_deref())?;
    for message in contradictions {
        reporter.event(&Event::Warning { message });
    }
    Ok(files)
}

/// The checkpoints that may hold what a run took along, newest first.
pub fn holders(state: &RunState) -> Vec<Committed> {
    state.candidates().into_iter().take(CHECKPOINTS).map(|checkpoint| checkpoint.committed.clone()).collect()
}

/// The files of an existing run that takes some along from the folder it started from; `None`: it takes none along.
/// Missing files do not hold up a run.
pub async fn of_existing_run(
    config: &RunConfig,
    data: &Path,
    run: &Store,
    holders: &[Committed],
) -> Result<Option<Files>> {
    let task = &config.workload;
    let (Some(uri), TokenizerRule::Same) = (&task.model.init_from, task.data.tokenizer) else { return Ok(None) };
    let dataset = Dataset::open(data)?;
    let tokens = Tokens::of(data, dataset.index())?;
    let own = match from_checkpoints(run, holders).await {
        Some(own) => own,
        None => {
            let look = async {
                let folder = initial::open(uri, &config.storage)?;
                initial::check_tokenizer(&task.data, uri, &folder, &tokens.meaning).await?;
                from_folder(&folder).await
            };
            match tokio::time::timeout(PATIENCE, look).await {
                Ok(Ok(own)) => own,
                Ok(Err(error)) => {
                    tracing::info!(%error, "the tokenizer's files of model.init_from are not taken along");
                    return Ok(None);
                }
                Err(_) => {
                    tracing::info!(
                        "the tokenizer's files of model.init_from are not taken along: {uri} does not answer"
                    );
                    return Ok(None);
                }
            }
        }
    };
    Ok(Some(files(task, &tokens, tokens.with(Some(own)).as_deref())?.0))
}

/// The files that travel, as they stand in a model folder.
async fn from_folder(folder: &Store) -> Result<Files> {
    let names = layout::TOKENIZER_FILES.into_iter().chain([layout::GENERATION_CONFIG]);
    let get = |name: &'static str| async move {
        match folder.get(name, MAX_FILE).await {
            Ok(bytes) => Ok(Some((name.to_owned(), bytes))),
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(Error::from(error)),
        }
    };
    let found: Vec<Option<(String, Bytes)>> = stream::iter(names).map(get).buffered(ASKED).try_collect().await?;
    let mut files: Files = found.into_iter().flatten().collect();
    let additional = templates::additional(folder).await?;
    templates::fold(&mut files, &additional)
        .map_err(|reason| Error::new(Kind::Config, format!("{} {reason}", folder.uri())))?;
    Ok(files)
}

/// The same, from the newest checkpoint that has them.
async fn from_checkpoints(run: &Store, holders: &[Committed]) -> Option<Files> {
    for committed in holders {
        let read = async {
            let manifest = catalog::read_manifest(run, committed).await?;
            let mut files = Files::new();
            for name in layout::TOKENIZER_FILES.into_iter().chain([layout::GENERATION_CONFIG]) {
                if manifest.file(name).is_some() {
                    files.push((name.to_owned(), restore::small_file(run, &manifest, name).await?));
                }
            }
            Ok::<_, CheckpointError>(files)
        };
        match read.await {
            // An earlier version took nothing along.
            Ok(files) => return files.iter().any(|(name, _)| name == layout::TOKENIZER_CONFIG).then_some(files),
            Err(error) => tracing::debug!(%error, step = %committed.step, "small files of a checkpoint can't be read"),
        }
    }
    None
}

/// All files, and every statement of the folder or the description that contradicts the data. `own`: the tokenizer is
/// that of a model folder, which has these files.
fn files(task: &TrainTask, tokens: &Tokens, own: Option<&[(String, Bytes)]>) -> Result<(Files, Vec<String>)> {
    let mut said = Vec::new();
    let mut files: BTreeMap<String, Bytes> = own.unwrap_or_default().iter().cloned().collect();

    let description = description(&task.model.config, tokens, own.is_some(), &mut said);
    let generation = files.get(layout::GENERATION_CONFIG).and_then(|bytes| object(bytes));
    let generation = generation_config(generation, &description, tokens, &mut said);
    files.insert(layout::MODEL_CONFIG.into(), pretty(&description)?);
    files.insert(layout::GENERATION_CONFIG.into(), pretty(&generation)?);

    let bare = own.is_none() && tokens.bos_id.is_none();
    let json = if bare { without_special_tokens(&tokens.json) } else { None };
    let json = json.as_ref().map(pretty).transpose()?.unwrap_or_else(|| tokens.json.clone());
    files.insert(layout::TOKENIZER.into(), json);

    match files.get(layout::TOKENIZER_CONFIG).and_then(|bytes| object(bytes)) {
        Some(mut settings) => {
            let contradictions = around::agree(&mut settings, files.get(layout::TOKENIZER).map_or(&[], |json| json));
            let changed = !contradictions.is_empty();
            said.extend(contradictions);
            if end_with(&mut settings, layout::TOKENIZER_CONFIG, tokens, &mut said) | changed {
                files.insert(layout::TOKENIZER_CONFIG.into(), pretty(&Value::Object(settings))?);
            }
        }
        None => {
            let longest = model::context(task.model.kind, &task.model.config)?.positions;
            files.insert(layout::TOKENIZER_CONFIG.into(), pretty(&tokenizer_config(tokens, &description, longest))?);
        }
    }
    if let Some(mut special) = files.get(layout::SPECIAL_TOKENS).and_then(|bytes| object(bytes))
        && special.contains_key("eos_token")
        && end_with(&mut special, layout::SPECIAL_TOKENS, tokens, &mut said)
    {
        files.insert(layout::SPECIAL_TOKENS.into(), pretty(&Value::Object(special))?);
    }
    if let Some(adapters) = adapter_config(task)? {
        files.insert(layout::ADAPTER_CONFIG.into(), pretty(&adapters)?);
    }
    Ok((files.into_iter().collect(), said))
}

/// The description of the adapters as PEFT writes it (version 0.10 and later read it); `None`: there are none.
fn adapter_config(task: &TrainTask) -> Result<Option<Value>> {
    let ModelConfig { kind, config, init_from: Some(uri), lora: Some(lora) } = &task.model else { return Ok(None) };
    let LoraConfig { rank, alpha, .. } = lora;
    // Readers know a folder of this machine by its path.
    let base = config::local_path(uri).map_or_else(|| uri.clone(), |path| path.display().to_string());
    #[expect(clippy::cast_possible_truncation, reason = "a whole number below 2^53")]
    let alpha = if alpha.fract() == 0.0 && *alpha < 9e15 { json!(*alpha as i64) } else { json!(alpha) };
    Ok(Some(json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": model::lora::target_modules(*kind, config, lora)?,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "use_rslora": false,
        "use_dora": false,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": null,
    })))
}

fn pretty(value: &Value) -> Result<Bytes> {
    serde_json::to_vec_pretty(value).map(Bytes::from).map_err(|error| Error::from_source(Kind::Bug, error))
}

fn object(bytes: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(bytes).ok()
}

/// Whether an `eos_token_id`, one id or a list, includes the data's.
fn holds(ids: &Value, eos_id: u32) -> bool {
    match ids {
        Value::Array(ids) => ids.iter().any(|id| *id == eos_id),
        id => *id == eos_id,
    }
}

/// The message that `file` contradicts the data.
fn contradiction(file: &str, found: &Value, tokens: &Tokens) -> String {
    let found: String = found.to_string().chars().take(80).collect();
    let eos = tokens.eos().map(|text| format!("{text:?}, ")).unwrap_or_default();
    format!(
        "{file} has {found} for the end of a text, the data ends documents with {eos}id {}: checkpoints say the latter",
        tokens.eos_id
    )
}

/// The model's description, with the data's end token, and with the rotary settings in the spellings of all versions.
fn description(config: &Value, tokens: &Tokens, own: bool, said: &mut Vec<String>) -> Value {
    let mut config = config.clone();
    let Some(map) = config.as_object_mut() else { return config };
    let given = map.get("eos_token_id").filter(|ids| !ids.is_null());
    if !given.is_some_and(|ids| holds(ids, tokens.eos_id)) {
        if let Some(given) = given {
            said.push(contradiction(layout::MODEL_CONFIG, given, tokens));
        }
        map.insert("eos_token_id".into(), tokens.eos_id.into());
    }
    // Another tokenizer may have any token under that id.
    if !own && map.contains_key("bos_token_id") && bos(map, tokens).is_none() {
        map.insert("bos_token_id".into(), Value::Null);
    }
    spell_rotary(map);
    config
}

/// Adds the spelling of transformers 4 to that of transformers 5: version 4 reads keys of the document itself and
/// `rope_scaling`, version 5 reads `rope_parameters` as well. A key that is there stays as it is.
fn spell_rotary(map: &mut Map<String, Value>) {
    let Some(Value::Object(rope)) = map.get("rope_parameters").cloned() else { return };
    let mut add = |key: &str, value: Option<&Value>| {
        if let Some(value) = value.filter(|value| !value.is_null())
            && map.get(key).is_none_or(Value::is_null)
        {
            map.insert(key.into(), value.clone());
        }
    };
    let by_type = |layer_type| rope.get(layer_type).and_then(Value::as_object);
    if let Some(sliding) = by_type("sliding_attention") {
        add("rope_local_base_freq", sliding.get("rope_theta"));
    }
    let rope = by_type("full_attention").unwrap_or(&rope);
    add("rope_theta", rope.get("rope_theta").filter(|theta| theta.is_number()));
    add("partial_rotary_factor", rope.get("partial_rotary_factor"));
    let kind = rope.get("rope_type").or_else(|| rope.get("type"));
    match kind.and_then(Value::as_str) {
        None | Some("default") => {}
        // Version 4 demands these very keys for some families.
        Some("linear") => add("rope_scaling", Some(&json!({"type": "linear", "factor": rope.get("factor")}))),
        Some("longrope" | "su" | "yarn") => {
            add("original_max_position_embeddings", rope.get("original_max_position_embeddings"));
            let [short, long] = ["short_factor", "long_factor"].map(|key| rope.get(key));
            add("rope_scaling", Some(&json!({"type": "longrope", "short_factor": short, "long_factor": long})));
        }
        Some(_) => add("rope_scaling", Some(&Value::Object(rope.clone()))),
    }
}

/// The same files, whose description names the type of the weights that lie beside them: `index` has their bytes and
/// their number. Programs convert weights to that type when they open the folder.
pub fn typed(files: &[(String, Bytes)], index: &[u8]) -> Result<Files> {
    let index: Value = serde_json::from_slice(index).unwrap_or_default();
    let total = |key: &str| index["metadata"][key].as_u64().filter(|&total| total > 0);
    let name = match (total("total_size"), total("total_parameters")) {
        (Some(bytes), Some(elements)) if bytes == elements * 4 => "float32",
        (Some(bytes), Some(elements)) if bytes == elements * 2 => "bfloat16",
        // Weights of several types, or an index without numbers: the description stays as it is.
        _ => return Ok(files.to_vec()),
    };
    let typed = |(file, bytes): &(String, Bytes)| {
        let bytes = bytes.clone();
        let bytes = if file == layout::MODEL_CONFIG { export::typed(bytes, name) } else { bytes };
        (file.clone(), bytes)
    };
    Ok(files.iter().map(typed).collect())
}

/// The id of the description's begin token, where the data's tokenizer has a special token of this id.
fn bos(description: &Map<String, Value>, tokens: &Tokens) -> Option<u32> {
    let id = description.get("bos_token_id")?.as_u64().and_then(|id| u32::try_from(id).ok())?;
    tokens.meaning.is_special(id).then_some(id)
}

/// The generation settings: as the folder says, ending with the data's end token, and with those of turns.
fn generation_config(
    folder: Option<Map<String, Value>>,
    description: &Value,
    tokens: &Tokens,
    said: &mut Vec<String>,
) -> Value {
    let from_folder = folder.is_some();
    let mut generation = folder.unwrap_or_default();
    let given = generation.get("eos_token_id").filter(|ids| !ids.is_null());
    if !given.is_some_and(|ids| holds(ids, tokens.eos_id)) {
        if let Some(given) = given {
            said.push(contradiction(layout::GENERATION_CONFIG, given, tokens));
        }
        let ids = description.get("eos_token_id").cloned().unwrap_or_else(|| tokens.eos_id.into());
        generation.insert("eos_token_id".into(), ids);
    }
    for end in &tokens.end_ids {
        let ids = generation.entry("eos_token_id").or_insert_with(|| json!([]));
        if !holds(ids, *end) {
            let mut all = ids.as_array().cloned().unwrap_or_else(|| vec![ids.clone()]);
            all.push((*end).into());
            *ids = all.into();
        }
    }
    if !from_folder && let Some(id) = description.get("bos_token_id").filter(|id| !id.is_null()) {
        generation.insert("bos_token_id".into(), id.clone());
    }
    Value::Object(generation)
}

/// Tokenizer settings where there are none: without them transformers would assume the model's default tokenizer, with
/// its own special tokens.
fn tokenizer_config(tokens: &Tokens, description: &Value, longest: u32) -> Value {
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": false,
        // That class has a third input, which no decoder takes: version 4 would refuse to generate.
        "model_input_names": ["input_ids", "attention_mask"],
    });
    if let Some(eos) = tokens.eos() {
        settings["eos_token"] = eos.into();
    }
    let bos = tokens.bos_id.or_else(|| description.as_object().and_then(|map| bos(map, tokens)));
    if let Some(bos) = bos.and_then(|id| tokens.meaning.text(id)) {
        settings["bos_token"] = bos.into();
    }
    settings
}

/// Sets the data's end token in a tokenizer's settings; returns whether that changed them.
fn end_with(settings: &mut Map<String, Value>, file: &str, tokens: &Tokens, said: &mut Vec<String>) -> bool {
    let Some(eos) = tokens.eos() else { return false };
    let given = settings.get("eos_token").filter(|token| !token.is_null());
    let text = given.map(|token| token.get("content").unwrap_or(token));
    if text.is_some_and(|text| text == eos) {
        return false;
    }
    if let Some(text) = text {
        said.push(contradiction(file, text, tokens));
    }
    settings.insert("eos_token".into(), eos.into());
    true
}

/// The same tokenizer without the step that puts special tokens around a text, since the data has none; `None` if it
/// has no such step.
fn without_special_tokens(json: &[u8]) -> Option<Value> {
    fn adds(step: &Value) -> bool {
        let pieces = ["single", "pair"].into_iter().filter_map(|key| step[key].as_array()).flatten();
        match step["type"].as_str() {
            Some("BertProcessing" | "RobertaProcessing") => true,
            Some("TemplateProcessing") => pieces.into_iter().any(|piece| piece.get("SpecialToken").is_some()),
            _ => false,
        }
    }
    let mut json: Value = serde_json::from_slice(json).ok()?;
    let steps = json.get_mut("post_processor")?;
    if adds(steps) {
        *steps = Value::Null;
        return Some(json);
    }
    let inner = steps.get_mut("processors")?.as_array_mut()?;
    let before = inner.len();
    inner.retain(|step| !adds(step));
    let (after, none) = (inner.len(), inner.is_empty());
    if none {
        *steps = Value::Null;
    }
    (after < before).then_some(json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing;

    fn tokens() -> Tokens {
        let json = json!({
            "added_tokens": [
                {"id": 0, "content": "<|end|>", "special": true}, {"id": 1, "content": "<|begin|>", "special": true},
            ],
            "post_processor": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {"a": 2, "b": 3}, "merges": []},
        });
        let json: Bytes = json.to_string().into_bytes().into();
        let meaning = Meaning::of_json(&json).unwrap();
        Tokens { meaning, json, eos_id: 0, bos_id: None, end_ids: vec![], files: vec![] }
    }

    fn task(extra: Value) -> TrainTask {
        let mut task = testing::config().workload;
        task.model.config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        });
        for (key, value) in extra.as_object().unwrap() {
            task.model.config[key] = value.clone();
        }
        task
    }

    fn made(extra: Value, own: Option<Value>) -> (BTreeMap<String, Value>, Vec<String>) {
        let own: Option<Files> = own.map(|own| {
            let own = own.as_object().unwrap().clone();
            own.into_iter().map(|(name, value)| (name, Bytes::from(value.to_string()))).collect()
        });
        let (files, said) = files(&task(extra), &tokens(), own.as_deref()).unwrap();
        (files.into_iter().map(|(name, bytes)| (name, serde_json::from_slice(&bytes).unwrap())).collect(), said)
    }

    #[test]
    fn a_tokenizer_without_settings_gets_some() {
        let (files, said) = made(json!({"bos_token_id": 1}), None);
        let settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "clean_up_tokenization_spaces": false,
            "eos_token": "<|end|>", "bos_token": "<|begin|>", "model_input_names": ["input_ids", "attention_mask"],
        });
        assert_eq!(files[layout::TOKENIZER_CONFIG], settings);
        assert_eq!(files[layout::GENERATION_CONFIG], json!({"eos_token_id": 0, "bos_token_id": 1}));
        assert_eq!(files[layout::MODEL_CONFIG]["eos_token_id"], 0);
        assert_eq!(said, Vec::<String>::new());
        assert_eq!(files.len(), 4);
    }

    #[test]
    fn files_say_what_the_data_says_and_so_does_a_warning() {
        let given = json!({"eos_token_id": [7, 9], "bos_token_id": 3});
        let (files, said) = made(given.clone(), None);
        assert_eq!(files[layout::MODEL_CONFIG]["eos_token_id"], 0);
        assert_eq!(files[layout::MODEL_CONFIG]["bos_token_id"], Value::Null);
        assert_eq!(files[layout::GENERATION_CONFIG], json!({"eos_token_id": 0}));
        assert!(matches!(said.as_slice(), [one] if one.contains("config.json has [7,9]")), "{said:?}");

        let own = json!({
            "generation_config.json": {"eos_token_id": 9, "temperature": 0.6},
            "tokenizer_config.json": {"eos_token": {"content": "<|turn|>"}, "tokenizer_class": "X"},
            "special_tokens_map.json": {"eos_token": "<|turn|>", "bos_token": "<|begin|>"},
            "chat_template.json": {"chat_template": "x"},
        });
        let (files, said) = made(given, Some(own));
        assert_eq!(files[layout::GENERATION_CONFIG], json!({"eos_token_id": 0, "temperature": 0.6}));
        assert_eq!(files[layout::TOKENIZER_CONFIG], json!({"eos_token": "<|end|>", "tokenizer_class": "X"}));
        assert_eq!(files[layout::SPECIAL_TOKENS]["eos_token"], "<|end|>");
        assert_eq!(files["chat_template.json"]["chat_template"], "x");
        assert_eq!(files[layout::MODEL_CONFIG]["bos_token_id"], 3, "the model's own");
        for (file, message) in
            ["config", "generation_config", "tokenizer_config", "special_tokens_map"].iter().zip(&said)
        {
            assert!(
                message.starts_with(&format!("{file}.json has ")) && message.contains("\"<|end|>\", id 0"),
                "{message}"
            );
        }
        assert_eq!(said.len(), 4);
    }

    #[test]
    fn what_agrees_with_the_data_travels_to_the_byte() {
        let own: Files = vec![
            (layout::TOKENIZER_CONFIG.into(), Bytes::from_static(b"{ \"eos_token\" :\"<|end|>\"}")),
            ("tokenizer.model".into(), Bytes::from_static(b"\0\xff")),
            ("merges.txt".into(), Bytes::from_static(b"a b\n")),
        ];
        let (files, said) = files(&task(json!({"eos_token_id": [9, 0]})), &tokens(), Some(&own)).unwrap();
        let files: BTreeMap<_, _> = files.into_iter().collect();
        for (name, bytes) in &own {
            assert_eq!(&files[name], bytes, "{name}");
        }
        assert_eq!(files[layout::TOKENIZER], tokens().json);
        let generation: Value = serde_json::from_slice(&files[layout::GENERATION_CONFIG]).unwrap();
        assert_eq!(generation["eos_token_id"], json!([9, 0]), "more ends than the data's are no contradiction");
        assert!(said.is_empty(), "{said:?}");
    }

    #[test]
    fn files_made_once_are_made_again_from_themselves() {
        let (files_before, _) = files(&task(json!({"eos_token_id": 7})), &tokens(), Some(&[])).unwrap();
        let own: Files = files_before
            .iter()
            .filter(|(name, _)| *name == layout::GENERATION_CONFIG || layout::TOKENIZER_FILES.contains(&name.as_str()))
            .cloned()
            .collect();
        assert_eq!(files(&task(json!({"eos_token_id": 7})), &tokens(), Some(&own)).unwrap().0, files_before);
    }

    #[test]
    fn the_files_of_the_data_are_taken_and_generation_ends_with_the_turns() {
        let config: Bytes = Bytes::from_static(b"{\"eos_token\": \"<|end|>\", \"chat_template\": \"the data's\"}");
        let tokens = Tokens {
            files: vec![(layout::TOKENIZER_CONFIG.into(), config.clone())],
            end_ids: vec![0, 7],
            bos_id: Some(1),
            ..tokens()
        };
        let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin|>"}}]});
        let mut json: Value = serde_json::from_slice(&tokens.json).unwrap();
        json["post_processor"] = template;
        let tokens = Tokens { json: json.to_string().into_bytes().into(), ..tokens };
        let of_weights: Files = vec![
            (layout::TOKENIZER_CONFIG.into(), Bytes::from_static(b"{}")),
            (layout::GENERATION_CONFIG.into(), Bytes::from_static(b"{\"temperature\": 0.5, \"eos_token_id\": 0}")),
        ];
        let own = tokens.with(Some(of_weights));
        let (files, said) = files(&task(json!({})), &tokens, own.as_deref()).unwrap();
        let files: BTreeMap<_, _> = files.into_iter().collect();
        assert_eq!(files[layout::TOKENIZER_CONFIG], config, "to the byte");
        assert_eq!(files[layout::TOKENIZER], tokens.json, "with the begin token");
        let generation: Value = serde_json::from_slice(&files[layout::GENERATION_CONFIG]).unwrap();
        assert_eq!(generation, json!({"temperature": 0.5, "eos_token_id": [0, 7]}));
        assert!(said.is_empty(), "{said:?}");
    }

    #[test]
    fn flags_that_contradict_the_tokenizer_are_changed_and_named() {
        let own = json!({"tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|end|>",
            "add_bos_token": true, "add_eos_token": false,
        }});
        let (files, said) = made(json!({}), Some(own));
        let settings = &files[layout::TOKENIZER_CONFIG];
        assert_eq!((&settings["add_bos_token"], &settings["add_eos_token"]), (&json!(false), &json!(false)));
        assert!(
            said.len() == 1 && said[0].contains("has add_bos_token true, but tokenizer.json puts no token"),
            "{said:?}"
        );
    }

    #[tokio::test]
    async fn additional_templates_of_the_weights_folder_travel_in_its_settings() {
        let folder = testing::memory_store();
        folder.put(layout::CHAT_TEMPLATE, "one".into()).await.unwrap();
        folder.put(layout::TOKENIZER_CONFIG, "{\"eos_token\": \"x\"}".into()).await.unwrap();
        let files = from_folder(&folder).await.unwrap();
        let names = |files: &Files| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&files), [layout::TOKENIZER_CONFIG, layout::CHAT_TEMPLATE]);
        folder.put("additional_chat_templates/tool_use.jinja", "two".into()).await.unwrap();
        let files = from_folder(&folder).await.unwrap();
        assert_eq!(names(&files), [layout::TOKENIZER_CONFIG]);
        let settings: Value = serde_json::from_slice(&files[0].1).unwrap();
        let list = json!([{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]);
        assert_eq!((&settings["chat_template"], &settings["eos_token"]), (&list, &json!("x")));
    }

    #[test]
    fn rotary_settings_are_spelt_for_every_version() {
        let rope = json!({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
        let (files, _) = made(json!({"rope_parameters": rope}), None);
        let description = &files[layout::MODEL_CONFIG];
        assert_eq!((&description["rope_theta"], &description["rope_scaling"]), (&json!(5e5), &rope));
        model::check_description(crate::config::ModelKind::Decoder, description).unwrap();
        let (files, _) = made(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}), None);
        let description = &files[layout::MODEL_CONFIG];
        assert_eq!((&description["rope_theta"], description.get("rope_scaling")), (&json!(2e4), None));

        let spelt = |rope: Value| {
            let mut map = Map::from_iter([("rope_parameters".to_owned(), rope)]);
            spell_rotary(&mut map);
            map.remove("rope_parameters");
            Value::Object(map)
        };
        assert_eq!(
            spelt(json!({"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})),
            json!({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}})
        );
        assert_eq!(
            spelt(json!({"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 64})),
            json!({"rope_theta": 1e4, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}})
        );
    }

    #[test]
    fn the_description_names_the_type_of_the_weights_beside_it() {
        let files: Files = vec![
            (layout::MODEL_CONFIG.into(), Bytes::from_static(b"{\"torch_dtype\": \"float16\", \"a\": 1}")),
            ("tokenizer.json".into(), Bytes::from_static(b"{ }")),
        ];
        let named = |index: Value| {
            let typed = typed(&files, index.to_string().as_bytes()).unwrap();
            assert_eq!(typed[1], files[1]);
            let description: Value = serde_json::from_slice(&typed[0].1).unwrap();
            assert_eq!(description["a"], 1);
            [description["dtype"].clone(), description["torch_dtype"].clone()]
        };
        let index =
            |bytes: u64, elements: u64| json!({"metadata": {"total_size": bytes, "total_parameters": elements}});
        assert_eq!(named(index(40, 10)), ["float32", "float32"]);
        assert_eq!(named(index(20, 10)), ["bfloat16", "bfloat16"]);
        for other in [index(30, 10), index(0, 0), json!({})] {
            assert_eq!(named(other), [Value::Null, "float16".into()]);
        }
    }

    #[test]
    fn no_begin_token_is_put_before_a_text_unless_the_tokenizer_is_the_models_own() {
        let template = json!({"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}});
        let bytes = json!({"type": "ByteLevel"});
        let with = |steps: Value| json!({"post_processor": steps}).to_string().into_bytes();
        let steps = |steps: Value| without_special_tokens(&with(steps)).map(|json| json["post_processor"].clone());
        assert_eq!(steps(template.clone()), Some(Value::Null));
        assert_eq!(steps(json!({"type": "RobertaProcessing"})), Some(Value::Null));
        assert_eq!(
            steps(json!({"type": "Sequence", "processors": [bytes, template]})),
            Some(json!({"type": "Sequence", "processors": [bytes]}))
        );
        assert_eq!(steps(json!({"type": "Sequence", "processors": [template]})), Some(Value::Null));
        assert_eq!(steps(json!({"type": "Sequence", "processors": [bytes]})), None);
        assert_eq!(steps(bytes), None);
        assert_eq!(steps(Value::Null), None);
    }
}
