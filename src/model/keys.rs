//! The keys of a `config.json`, read with errors that name them.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::ModelError;

/// An object's keys, read with errors that name them.
pub(super) struct Keys<'a> {
    pub map: &'a Map<String, Value>,
    pub path: &'static str,
}

impl<'a> Keys<'a> {
    /// The whole document.
    pub fn of(config: &'a Value) -> Result<Self, ModelError> {
        let map = config.as_object().ok_or_else(|| ModelError::config("the document", "is not a JSON object"))?;
        Ok(Self { map, path: "" })
    }

    /// The error that a key is wrong, and why.
    pub fn wrong(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::config(format!("{}{key}", self.path), reason)
    }

    /// The value; null counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// An integer from 1 to `max`.
    pub fn count(&self, key: &str, default: Option<u32>, max: u64) -> Result<u32, ModelError> {
        let Some(value) = self.get(key) else {
            return default.ok_or_else(|| self.wrong(key, "is missing"));
        };
        value
            .as_u64()
            .filter(|count| (1..=max).contains(count))
            .and_then(|count| u32::try_from(count).ok())
            .ok_or_else(|| self.wrong(key, format!("is {}, not an integer from 1 to {max}", shown(value))))
    }

    /// An integer from 1 to `max`; null is none, and an absent key has the default.
    pub fn optional_count(&self, key: &str, default: Option<u32>, max: u64) -> Result<Option<u32>, ModelError> {
        match self.map.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.count(key, None, max).map(Some),
        }
    }

    /// A finite number within `range`.
    pub fn number(&self, key: &str, default: Option<f64>, range: RangeInclusive<f64>) -> Result<f64, ModelError> {
        let Some(value) = self.get(key) else {
            return default.ok_or_else(|| self.wrong(key, "is missing"));
        };
        value.as_f64().filter(|number| range.contains(number)).ok_or_else(|| {
            let (from, to) = range.into_inner();
            self.wrong(key, format!("is {}, not a number from {from} to {to}", shown(value)))
        })
    }

    /// A Boolean.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                value.as_bool().ok_or_else(|| self.wrong(key, format!("is {}, not true or false", shown(value))))
            }
        }
    }

    /// Text that is one of `spellings`, of which the first is the usual one.
    pub fn must_be(&self, key: &str, spellings: &[&str]) -> Result<(), ModelError> {
        match self.get(key) {
            Some(value) if !value.as_str().is_some_and(|text| spellings.contains(&text)) => {
                let wanted = spellings.first().copied().unwrap_or_default();
                Err(self.wrong(key, format!("is {}; only {wanted:?} is supported", shown(value))))
            }
            _ => Ok(()),
        }
    }
}

/// A value for an error message, truncated.
pub(super) fn shown(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}
