//! The settings as typed, by their full key, each with its origin.
//!
//! The embedded `default.toml` is the schema: its keys are all keys. Later layers replace single keys, so that
//! `optimizer = { lr = 1e-3 }` leaves the other settings of the optimizer alone.

use std::{collections::BTreeMap, fmt::Display, ops::RangeInclusive, path::Path, time::Duration};

use toml::{
    Table, Value,
    de::{DeTable, DeValue},
};

use super::{Cadence, ConfigError, Spacing, error::Origin, own::SETTINGS, text};

/// Every key with its default, and a comment that explains it.
pub const DEFAULT_TOML: &str = include_str!("default.toml");

/// The longest configuration file that is read, bytes.
const MAX_FILE: u64 = 1 << 20;

struct Setting {
    value: Value,
    origin: Origin,
}

/// Settings by full key, layer upon layer.
pub(super) struct Raw {
    settings: BTreeMap<String, Setting>,
}

impl Raw {
    /// The defaults.
    pub fn defaults() -> Result<Self, ConfigError> {
        let table: Table = DEFAULT_TOML.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
            path: "default.toml".into(),
            line: line_of(DEFAULT_TOML, error.span().map_or(0, |span| span.start)),
            reason: error.message().to_owned(),
        })?;
        let mut settings = BTreeMap::new();
        flatten("", table, &mut |key, value| {
            settings.insert(key, Setting { value, origin: Origin::Default });
        });
        Ok(Self { settings })
    }

    /// Adds a TOML file on top.
    pub fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let name = path.display().to_string();
        let unreadable = |source| ConfigError::Unreadable { path: name.clone(), source };
        let text = text::read_at_most(path, MAX_FILE).map_err(unreadable)?;
        let text = String::from_utf8(text)
            .map_err(|error| unreadable(std::io::Error::new(std::io::ErrorKind::InvalidData, error.utf8_error())))?;
        self.add_text(&text, path)
    }

    /// Adds TOML text on top; `path` is its name in errors.
    pub fn add_text(&mut self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let syntax = |error: toml::de::Error| ConfigError::Syntax {
            path: path.display().to_string(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            reason: error.message().to_owned(),
        };
        let table: Table = text.parse().map_err(syntax)?;
        // Read a second time for the positions: the first reading gives plain values, this one their spans.
        let mut lines = BTreeMap::new();
        find_lines("", DeTable::parse(text).map_err(syntax)?.get_ref(), text, &mut lines);
        let origin = |key: &str| Origin::File { path: path.to_owned(), line: lines.get(key).copied().unwrap_or(1) };
        self.merge("", table, &origin)
    }

    /// Adds one `--set key=value` on top. The value is TOML, or else taken as a string.
    pub fn add_set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        self.add_value(key, set_value(value), &Origin::Set)
    }

    /// Adds one value on top.
    pub fn add_value(&mut self, key: &str, value: Value, origin: &Origin) -> Result<(), ConfigError> {
        let mut parts = key.rsplit('.').map(str::trim);
        let mut table = Table::new();
        table.insert(parts.next().unwrap_or_default().to_owned(), value);
        for part in parts {
            table = Table::from_iter([(part.to_owned(), Value::Table(table))]);
        }
        self.merge("", table, &|_| origin.clone())
    }

    fn merge(&mut self, prefix: &str, table: Table, origin: &dyn Fn(&str) -> Origin) -> Result<(), ConfigError> {
        for (name, value) in table {
            let key = join(prefix, &name);
            if key == SETTINGS {
                self.add_free(value, origin(&key))?;
                continue;
            }
            if let Some(setting) = self.settings.get_mut(&key) {
                *setting = Setting { value, origin: origin(&key) };
                continue;
            }
            let below: Vec<&str> =
                self.settings.keys().filter_map(|known| known.strip_prefix(&key)?.strip_prefix('.')).collect();
            match value {
                _ if below.is_empty() => {
                    let nearest = nearest(&key, self.settings.keys().map(String::as_str));
                    let siblings = self.siblings(prefix);
                    return Err(ConfigError::UnknownKey { origin: origin(&key), key, nearest, siblings });
                }
                Value::Table(inner) => self.merge(&key, inner, origin)?,
                other => {
                    return Err(ConfigError::WrongValue {
                        origin: origin(&key),
                        key,
                        given: other.to_string(),
                        expected: format!("a table with {}", below.join(", ")),
                    });
                }
            }
        }
        Ok(())
    }

    /// Adds a table of free keys to the existing settings, key by key.
    fn add_free(&mut self, value: Value, origin: Origin) -> Result<(), ConfigError> {
        let Value::Table(new) = value else {
            let (key, given) = (SETTINGS.to_owned(), value.to_string());
            return Err(ConfigError::WrongValue { origin, key, given, expected: "a table".into() });
        };
        let setting = self.settings.entry(SETTINGS.to_owned());
        let setting = setting.or_insert_with(|| Setting { value: Table::new().into(), origin: Origin::Default });
        setting.origin = origin;
        if let Value::Table(known) = &mut setting.value {
            merge_free(known, new);
        }
        Ok(())
    }

    /// Where a setting was made.
    pub fn origin(&self, key: &str) -> Origin {
        self.settings.get(key).map_or(Origin::Default, |setting| setting.origin.clone())
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.settings.keys().map(String::as_str)
    }

    fn value(&self, key: &str) -> Result<&Value, ConfigError> {
        self.settings.get(key).map(|setting| &setting.value).ok_or_else(|| ConfigError::UnknownKey {
            key: key.to_owned(),
            origin: Origin::Default,
            nearest: None,
            siblings: Vec::new(),
        })
    }

    /// The names directly below a section ("": the top).
    fn siblings(&self, prefix: &str) -> Vec<String> {
        let below = |key: &str| {
            let rest = if prefix.is_empty() { key } else { key.strip_prefix(prefix)?.strip_prefix('.')? };
            rest.split('.').next().map(str::to_owned)
        };
        let mut names: Vec<String> = self.settings.keys().filter_map(|key| below(key)).collect();
        names.dedup();
        names
    }

    /// The error that lists a key's allowed values.
    pub fn wrong(&self, key: &str, expected: impl Display) -> ConfigError {
        ConfigError::WrongValue {
            key: key.to_owned(),
            origin: self.origin(key),
            given: self.given(key),
            expected: expected.to_string(),
        }
    }

    /// A setting as TOML text, truncated if it is very long.
    pub fn given(&self, key: &str) -> String {
        let text = self.settings.get(key).map(|setting| setting.value.to_string()).unwrap_or_default();
        match text.char_indices().nth(200) {
            Some((cut, _)) => format!("{}…", &text[..cut]),
            None => text,
        }
    }

    /// The table of free keys.
    pub fn table(&self, key: &str) -> Result<&Table, ConfigError> {
        self.value(key)?.as_table().ok_or_else(|| self.wrong(key, "a table"))
    }

    /// Text.
    pub fn text(&self, key: &str) -> Result<&str, ConfigError> {
        self.value(key)?.as_str().ok_or_else(|| self.wrong(key, "text in quotes"))
    }

    /// A whole number within `range`.
    pub fn whole<T>(&self, key: &str, range: RangeInclusive<T>) -> Result<T, ConfigError>
    where
        T: TryFrom<i64> + PartialOrd + Display + Bounded,
    {
        let value = self.value(key)?.as_integer().and_then(|n| T::try_from(n).ok());
        value.filter(|n| range.contains(n)).ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            self.wrong(
                key,
                if *high == T::MAX {
                    format!("a whole number, at least {low}")
                } else {
                    format!("a whole number from {low} to {high}")
                },
            )
        })
    }

    /// A finite number that `allowed` accepts; whole numbers are numbers too.
    pub fn number(&self, key: &str, allowed: impl Fn(f64) -> bool, expected: impl Display) -> Result<f64, ConfigError> {
        as_number(self.value(key)?).filter(|n| allowed(*n)).ok_or_else(|| self.wrong(key, expected))
    }

    /// A list of numbers, as [`Raw::number`].
    pub fn numbers<const N: usize>(
        &self,
        key: &str,
        allowed: impl Fn(f64) -> bool,
        expected: impl Display,
    ) -> Result<[f64; N], ConfigError> {
        let list = self.value(key)?.as_array().map(|list| list.iter().filter_map(as_number).collect::<Vec<_>>());
        let complete = list.filter(|list| Some(list.len()) == self.settings[key].value.as_array().map(Vec::len));
        complete
            .filter(|list| list.iter().all(|n| allowed(*n)))
            .and_then(|list| list.try_into().ok())
            .ok_or_else(|| self.wrong(key, expected))
    }

    /// `true` or `false`.
    pub fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        self.value(key)?.as_bool().ok_or_else(|| self.wrong(key, "true or false"))
    }

    /// One of some words.
    pub fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<T, ConfigError> {
        let found = self.value(key)?.as_str().and_then(|text| choices.iter().find(|(name, _)| *name == text));
        found.map(|(_, value)| *value).ok_or_else(|| self.wrong(key, words(choices.iter().map(|(name, _)| *name))))
    }

    /// `word` (gives `None`), or a whole number within `range`.
    pub fn word_or_whole(&self, key: &str, word: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, ConfigError> {
        if self.value(key)?.as_str() == Some(word) {
            return Ok(None);
        }
        let number = self.value(key)?.as_integer().and_then(|n| u32::try_from(n).ok()).filter(|n| range.contains(n));
        number.map(Some).ok_or_else(|| {
            self.wrong(key, format!("{word:?}, or a whole number from {} to {}", range.start(), range.end()))
        })
    }

    /// `word` (gives `None`), or a finite number that `allowed` accepts.
    pub fn word_or_number(
        &self,
        key: &str,
        word: &str,
        allowed: impl Fn(f64) -> bool,
        expected: &str,
    ) -> Result<Option<f64>, ConfigError> {
        if self.value(key)?.as_str() == Some(word) {
            return Ok(None);
        }
        self.number(key, allowed, format!("{word:?}, or {expected}")).map(Some)
    }

    /// `auto`, a count of steps or a duration.
    pub fn cadence(&self, key: &str) -> Result<Cadence, ConfigError> {
        self.value(key)?.as_str().and_then(text::parse_cadence).ok_or_else(|| {
            self.wrong(key, r#""auto", a count of steps such as "500 steps", or a duration such as "2h""#)
        })
    }

    /// `never` (gives `None`), a count of steps or a duration.
    pub fn never_or_spacing(&self, key: &str) -> Result<Option<Spacing>, ConfigError> {
        const EXPECTED: &str = r#""never", a count of steps such as "1000 steps", or a duration such as "6h""#;
        match self.value(key)?.as_str() {
            Some("never") => Ok(None),
            other => other.and_then(text::parse_spacing).map(Some).ok_or_else(|| self.wrong(key, EXPECTED)),
        }
    }

    /// `never` (gives `None`), or a duration of at least a second.
    pub fn never_or_duration(&self, key: &str) -> Result<Option<Duration>, ConfigError> {
        const EXPECTED: &str = r#""never", or a duration such as "12h" or "1d""#;
        match self.value(key)?.as_str() {
            Some("never") => Ok(None),
            other => other
                .and_then(text::parse_duration)
                .filter(|duration| *duration >= Duration::from_secs(1))
                .map(Some)
                .ok_or_else(|| self.wrong(key, EXPECTED)),
        }
    }

    /// `auto` (gives `None`), or a duration.
    pub fn auto_or_duration(&self, key: &str) -> Result<Option<Duration>, ConfigError> {
        const EXPECTED: &str = r#""auto", or a duration such as "30s" or "2m""#;
        match self.value(key)?.as_str() {
            Some("auto") => Ok(None),
            other => other.and_then(text::parse_duration).map(Some).ok_or_else(|| self.wrong(key, EXPECTED)),
        }
    }

    /// A duration.
    pub fn duration(&self, key: &str) -> Result<Duration, ConfigError> {
        self.value(key)?
            .as_str()
            .and_then(text::parse_duration)
            .ok_or_else(|| self.wrong(key, r#"a duration such as "90s", "2h" or "1h30m""#))
    }

    /// The word `alone`, or a list of other names, each once; at least one.
    pub fn names(&self, key: &str, alone: &str) -> Result<Vec<String>, ConfigError> {
        let expected = || self.wrong(key, format!("{alone:?}, or a list of different names in quotes"));
        match self.value(key)? {
            Value::String(word) if word == alone => Ok(vec![word.clone()]),
            Value::Array(list) if !list.is_empty() => {
                let mut names: Vec<String> = Vec::with_capacity(list.len());
                for item in list {
                    let name = item.as_str().filter(|name| !name.is_empty() && !names.iter().any(|have| have == name));
                    names.push(name.ok_or_else(expected)?.to_owned());
                }
                if names.len() > 1 && names.iter().any(|name| name == alone) { Err(expected()) } else { Ok(names) }
            }
            _ => Err(expected()),
        }
    }

    /// One word, or a list of words, of those given; at least one.
    pub fn words(&self, key: &str, alone: &str, choices: &[&str]) -> Result<Vec<String>, ConfigError> {
        let expected = || self.wrong(key, format!("{alone:?}, or a list of {}", words(choices.iter().copied())));
        match self.value(key)? {
            Value::String(word) if word == alone || choices.contains(&word.as_str()) => Ok(vec![word.clone()]),
            Value::Array(list) if !list.is_empty() => list
                .iter()
                .map(|item| match item.as_str() {
                    Some(word) if choices.contains(&word) || (list.len() == 1 && word == alone) => Ok(word.to_owned()),
                    _ => Err(expected()),
                })
                .collect(),
            _ => Err(expected()),
        }
    }
}

/// Integers with a largest value, for the text of an error.
pub(super) trait Bounded {
    const MAX: Self;
}
impl Bounded for u32 {
    const MAX: Self = Self::MAX;
}
impl Bounded for u64 {
    const MAX: Self = Self::MAX;
}

/// The meaning of the value in `--set key=value`: TOML, or else the text itself. Dates are text: no key takes one.
fn set_value(text: &str) -> Value {
    match text.trim().parse::<Value>() {
        Ok(Value::Datetime(_)) | Err(_) => Value::String(text.trim().to_owned()),
        Ok(value) => value,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a setting with more than 53 bits is no meaningful real number")]
fn as_number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|n| n as f64)).filter(|n| n.is_finite())
}

/// `"a", "b" or "c"`.
pub(super) fn words<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<String> = names.map(|name| format!("{name:?}")).collect();
    match names.pop() {
        Some(last) if names.is_empty() => last,
        Some(last) => format!("{} or {last}", names.join(", ")),
        None => String::new(),
    }
}

fn join(prefix: &str, name: &str) -> String {
    // A quoted key may hold anything: keep dots and control characters from passing for structure.
    let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    let name = if plain { name.to_owned() } else { format!("{name:?}") };
    if prefix.is_empty() { name } else { format!("{prefix}.{name}") }
}

fn flatten(prefix: &str, table: Table, visit: &mut dyn FnMut(String, Value)) {
    for (name, value) in table {
        let key = join(prefix, &name);
        match value {
            Value::Table(inner) if key != SETTINGS => flatten(&key, inner, visit),
            value => visit(key, value),
        }
    }
}

/// Tables are merged, and anything else replaces what was there.
fn merge_free(known: &mut Table, new: Table) {
    for (name, value) in new {
        match (known.get_mut(&name), value) {
            (Some(Value::Table(known)), Value::Table(new)) => merge_free(known, new),
            (_, value) => {
                known.insert(name, value);
            }
        }
    }
}

fn find_lines(prefix: &str, table: &DeTable<'_>, text: &str, lines: &mut BTreeMap<String, usize>) {
    for (name, value) in table {
        let key = join(prefix, name.get_ref());
        lines.insert(key.clone(), line_of(text, name.span().start));
        if let DeValue::Table(inner) = value.get_ref() {
            find_lines(&key, inner, text, lines);
        }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// The known key, or section of keys, most similar to `key`: the last name counts more than its place.
fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let split = |path: &str| match path.rsplit_once('.') {
        Some((section, name)) => (section.to_owned(), name.to_owned()),
        None => (String::new(), path.to_owned()),
    };
    let sections_and_keys =
        known.flat_map(|path| path.match_indices('.').map(|(at, _)| path[..at].to_owned()).chain([path.to_owned()]));
    let (section, name) = split(key);
    let score = |candidate: &str| {
        let (other_section, other_name) = split(candidate);
        let names = strsim::normalized_damerau_levenshtein(&name, &other_name);
        let sections = strsim::normalized_damerau_levenshtein(&section, &other_section);
        (0.6 * names + 0.4 * sections).max(0.9 * names)
    };
    let best = sections_and_keys
        .map(|candidate| (score(&candidate), candidate))
        .filter(|(score, _)| *score >= 0.6)
        // Of equals the shortest, then the first: the order of keys has no influence.
        .max_by(|(a, x), (b, y)| a.total_cmp(b).then(y.len().cmp(&x.len())).then(y.cmp(x)));
    best.map(|(_, candidate)| candidate)
}
