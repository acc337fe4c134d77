//! A program's own task: its section of the settings, in place of `model` and `data`.
//!
//! The task itself reads its table, when the run is created: what is here knows a name and a table, and refuses the
//! settings of a language model beside them. Tables are TOML where people write them and JSON where they are stored.

use serde_json::{Map, Value as Json};
use toml::{Table, Value};

use super::{ConfigError, DataConfig, ModelConfig, OwnTask, TokenizerRule, error::Origin, raw::Raw};

/// The key of the task's table. Below it every key is allowed.
pub(super) const SETTINGS: &str = "task.settings";

/// The longest name of a task.
const MAX_NAME: usize = 64;

/// The task that is named; `None`: a language model is trained.
pub(super) fn task(raw: &Raw) -> Result<Option<OwnTask>, ConfigError> {
    let name = raw.text("task.name")?;
    let settings = raw.table(SETTINGS)?;
    if name.is_empty() {
        return if settings.is_empty() {
            Ok(None)
        } else {
            Err(ConfigError::Missing {
                key: "task.name",
                remedy: "task.settings are those of the task it names".into(),
            })
        };
    }
    if !is_name(name) {
        return Err(raw.wrong("task.name", "up to 64 letters, digits, '-' and '_'"));
    }
    let typed = |key: &&str| !matches!(raw.origin(key), Origin::Default);
    if let Some(key) = raw.keys().filter(|key| is_of_language_models(key)).find(typed) {
        return Err(ConfigError::Together(format!(
            "{key} is a setting of language models, and task.name = {name:?} names a program's own task: remove one of \
             them"
        )));
    }
    Ok(Some(OwnTask { name: name.to_owned(), version: 0, settings: Json::Object(to_json(settings)) }))
}

/// Whether a name can be a task's.
pub fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(allowed)
}

/// Held-out samples are counted and measured in the same way, whatever they are.
fn is_of_language_models(key: &str) -> bool {
    key.starts_with("model.") || matches!(key, "data.train" | "data.tokenizer" | "data.sequence_length")
}

/// The data of a run that trains `task`: the task knows which. A sample counts as a sequence of one token.
pub(super) fn data(raw: &Raw) -> Result<DataConfig, ConfigError> {
    Ok(DataConfig {
        train: String::new(),
        tokenizer: TokenizerRule::Same,
        sequence_length: 1,
        validation_every: raw.whole("data.validation_every", 0..=u64::MAX)?,
        validation_sequences: raw.whole("data.validation_sequences", 1..=u32::MAX)?,
    })
}

/// The model of an existing run, with the task's settings that `raw` has.
pub(super) fn reread(raw: &Raw, model: &ModelConfig) -> Result<ModelConfig, ConfigError> {
    let set = |key: &&str| raw.origin(key) == Origin::Set;
    let Some(task) = model.task() else {
        if set(&SETTINGS) {
            let what = format!("{SETTINGS} is set, and this run trains a language model");
            return Err(ConfigError::Together(what));
        }
        return Ok(model.clone());
    };
    if let Some(key) = raw.keys().filter(|key| is_of_language_models(key)).find(set) {
        let what = format!("{key} is a setting of language models, and this run trains the task {:?}", task.name);
        return Err(ConfigError::Together(what));
    }
    // Only what is changed goes through TOML, which lacks some of JSON's values.
    let (stored, mut settings) = (to_toml(&task.settings), task.settings.as_object().cloned().unwrap_or_default());
    let changed = raw.table(SETTINGS)?.iter().filter(|(key, value)| stored.get(*key) != Some(value));
    settings.extend(to_json(&changed.map(|(key, value)| (key.clone(), value.clone())).collect()));
    Ok(ModelConfig::of_task(&OwnTask { settings: Json::Object(settings), ..task }))
}

/// Passes on every text in a table.
pub(super) fn texts(table: &Table, visit: &mut dyn FnMut(&str)) {
    fn of(value: &Value, visit: &mut dyn FnMut(&str)) {
        match value {
            Value::String(text) => visit(text),
            Value::Array(list) => list.iter().for_each(|value| of(value, visit)),
            Value::Table(table) => texts(table, visit),
            _ => {}
        }
    }
    table.iter().for_each(|(_, value)| of(value, visit));
}

/// A table as it is stored. Dates are text.
fn to_json(table: &Table) -> Map<String, Json> {
    fn of(value: &Value) -> Json {
        match value {
            Value::String(text) => text.as_str().into(),
            Value::Integer(number) => (*number).into(),
            Value::Float(number) => (*number).into(),
            Value::Boolean(flag) => (*flag).into(),
            Value::Datetime(date) => date.to_string().into(),
            Value::Array(list) => list.iter().map(of).collect(),
            Value::Table(table) => Json::Object(to_json(table)),
        }
    }
    table.iter().map(|(key, value)| (key.clone(), of(value))).collect()
}

/// A stored table as TOML, which has no null: such a key is left out.
pub(super) fn to_toml(settings: &Json) -> Table {
    fn of(value: &Json) -> Option<Value> {
        Some(match value {
            Json::Null => return None,
            Json::Bool(flag) => Value::Boolean(*flag),
            Json::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(number), _) => Value::Integer(number),
                (None, Some(number)) => Value::Float(number),
                (None, None) => return None,
            },
            Json::String(text) => Value::String(text.clone()),
            Json::Array(list) => Value::Array(list.iter().filter_map(of).collect()),
            Json::Object(_) => Value::Table(to_toml(value)),
        })
    }
    let entries = settings.as_object().into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.clone(), of(value)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{
        Effect, ModelKind, RunConfig, apply_overrides, canonical_overrides, effect, settings, tests::load_text,
    };

    const TASK: &str = "task.name = 'shapes'\n[task.settings]\nhidden = 8\nnoise = 0.5\nlayers = [1, 2]\n\
                        [task.settings.data]\nfolder = 'here'\nday = 2026-11-22\n";

    #[test]
    fn a_task_has_a_name_and_any_table_and_stands_alone() {
        let config = load_text(TASK).unwrap();
        let task = config.workload.model.task().unwrap();
        assert_eq!((config.workload.model.kind, task.name.as_str(), task.version), (ModelKind::Task, "shapes", 0));
        let expected = serde_json::json!({
            "hidden": 8, "noise": 0.5, "layers": [1, 2], "data": { "folder": "here", "day": "2026-11-22" },
        });
        assert_eq!(task.settings, expected);
        // A sample is a sequence of one token: what counts tokens counts samples.
        assert_eq!((config.workload.data.sequence_length, config.workload.data.train.as_str()), (1, ""));
        for (lines, said) in [
            ("task.name = 'x'\nparallel.strategy = 'shard'", "task.name = \"x\" has no blocks: set parallel.strategy"),
            ("task.name = 'x'\ntrain.activations = 'block'", "task.name = \"x\" has no blocks: set train.activations"),
            ("task.name = 'a b'", "letters, digits"),
            ("[task.settings]\nx = 1", "task.name is not set"),
            ("task = 5", "expected a table"),
            ("task.settings = 5", "expected a table"),
            ("task.nam = 'x'", "unknown key task.nam"),
            ("task.name = 'x'\nmodel.config = 'c.json'", "model.config is a setting of language models"),
            ("task.name = 'x'\nmodel.lora.rank = 4", "model.lora.rank is a setting of language models"),
            ("task.name = 'x'\ndata.train = 'd'", "data.train is a setting of language models"),
            ("task.name = 'x'\ndata.sequence_length = 4", "data.sequence_length is a setting of language models"),
        ] {
            let error = load_text(lines).unwrap_err().to_string();
            assert!(error.contains(said), "{lines}: {error}");
        }
        assert!(
            load_text("task.name = 'x'\ndata.validation_every = 4").is_ok(),
            "held-out samples are the task's, too"
        );
    }

    #[test]
    fn settings_survive_the_journal_and_change_one_by_one() {
        let mut config = load_text(TASK).unwrap();
        let mut task = config.workload.model.task().unwrap();
        (task.version, task.settings["large"]) = (7, serde_json::json!([null, u64::MAX]));
        config.workload.model = ModelConfig::of_task(&task);
        let stored: RunConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(stored, config);
        let set = |key: &str, value: &str| [(key.to_owned(), value.to_owned())];
        let overrides = set("task.settings.data.folder", "there");
        let kept = canonical_overrides(&stored, &overrides).unwrap();
        let [(key, value)] = kept.as_slice() else { panic!("{kept:?}") };
        assert!(key == SETTINGS && value.contains("there"), "{kept:?}");
        let changed = apply_overrides(&stored, &overrides).unwrap();
        assert_eq!(apply_overrides(&stored, &kept).unwrap(), changed);
        let task = changed.workload.model.task().unwrap();
        assert_eq!(
            (task.version, &task.settings["data"]["folder"], &task.settings["hidden"]),
            (7, &"there".into(), &8.into())
        );
        assert_eq!(task.settings["large"], serde_json::json!([null, u64::MAX]), "no value of JSON is lost");
        assert_eq!(effect(SETTINGS), Effect::Mathematical);
        for (key, value) in [("task.name", "other"), ("model.lora.rank", "4"), ("data.train", "x")] {
            assert!(apply_overrides(&stored, &set(key, value)).is_err(), "{key}");
        }
        assert_eq!(apply_overrides(&stored, &set("train.steps", "2000")).unwrap().workload.train.steps, 2000);
        let shown = settings(&stored);
        let of = |name: &str| shown.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        assert_eq!((of("task.name"), of("model.config")), (Some("\"shapes\"".into()), Some("\"\"".into())));
    }
}
