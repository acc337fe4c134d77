//! A task's settings, from a table to its own type and back: every key is known, and every value there.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// Reads a table as `T`.
///
/// # Errors
/// In words that name the key.
pub(super) fn read<T: Serialize + DeserializeOwned>(table: &Value) -> Result<(T, Value), String> {
    let settings: T = T::deserialize(table).map_err(|error| named::<T>(table, &error))?;
    let complete = serde_json::to_value(&settings).map_err(|error| format!("can't be stored: {error}"))?;
    if !complete.is_object() {
        return Err("are no table as the task has them".into());
    }
    // A type that ignores what it does not know gives back less than it was given.
    if let Some(key) = unknown("", table, &complete) {
        return Err(format!("have an unknown key {key}; there are {}", keys(&complete)));
    }
    Ok((settings, complete))
}

fn keys(table: &Value) -> String {
    table.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect::<Vec<_>>().join(", ")
}

/// The first key of `given` that `known` lacks.
fn unknown(prefix: &str, given: &Value, known: &Value) -> Option<String> {
    given.as_object().into_iter().flatten().find_map(|(key, value)| {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match known.get(key) {
            None => Some(path),
            // Whatever is not a table on both sides is the task's own way to write a value.
            Some(known) => unknown(&path, value, if known.is_object() { known } else { value }),
        }
    })
}

/// The error with its key. Of a wrong value serde names the type alone: the key is the one without which another error
/// comes, or none.
fn named<T: DeserializeOwned>(table: &Value, error: &serde_json::Error) -> String {
    let said = error.to_string();
    if ["unknown field", "missing field", "duplicate field"].iter().any(|words| said.starts_with(words)) {
        return format!("are wrong: {said}");
    }
    let Some(entries) = table.as_object() else { return format!("are wrong: {said}") };
    let wrong = entries.keys().find(|key| {
        let rest: Map<String, Value> = entries.clone().into_iter().filter(|(name, _)| name != *key).collect();
        T::deserialize(&Value::Object(rest)).err().is_none_or(|error| error.to_string() != said)
    });
    match wrong {
        Some(key) => format!("are wrong: {key} = {}: {said}", entries[key]),
        None => format!("are wrong: {said}"),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Settings {
        hidden: u32,
        #[serde(default = "tenth")]
        noise: f64,
        #[serde(default)]
        inner: Inner,
        #[serde(default)]
        folder: Option<String>,
    }
    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Inner {
        #[serde(default)]
        depth: u32,
    }
    fn tenth() -> f64 {
        0.1
    }

    #[test]
    fn settings_are_complete_and_every_mistake_is_named_by_its_key() {
        let (settings, complete) = read::<Settings>(&json!({ "hidden": 8 })).unwrap();
        assert_eq!((settings.hidden, settings.noise), (8, 0.1));
        assert_eq!(complete, json!({ "hidden": 8, "noise": 0.1, "inner": { "depth": 0 }, "folder": null }));
        assert_eq!(read::<Settings>(&complete).unwrap().1, complete, "what is stored is read again");
        for (table, said) in [
            (json!({ "hidden": 8, "nois": 1 }), "unknown key nois; there are folder, hidden, inner, noise"),
            (json!({ "hidden": 8, "inner": { "deep": 1 } }), "unknown key inner.deep"),
            (json!({}), "missing field `hidden`"),
            (json!({ "hidden": "many" }), "hidden = \"many\": invalid type"),
            (json!({ "hidden": 8, "noise": [] }), "noise = []: invalid type"),
            (json!({ "hidden": -1 }), "hidden = -1: invalid value"),
        ] {
            let error = read::<Settings>(&table).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        assert!(read::<u32>(&json!(5)).unwrap_err().contains("no table"));
    }
}
