//! JSON as templates see it: objects keep the order of their keys, since a template may print them.

use std::fmt;

use minijinja::Value;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Int(i64),
    /// An integer above the range of the signed ones.
    Large(u64),
    Float(f64),
    Text(String),
    List(Vec<Json>),
    /// A key that occurs twice has its last value, in its first place, as in Python.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The value of a key of an object.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Object(fields) => fields.iter().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// The value as a template sees it.
    pub(super) fn to_value(&self) -> Value {
        match self {
            Self::Null => Value::from(()),
            Self::Bool(value) => Value::from(*value),
            Self::Int(value) => Value::from(*value),
            Self::Large(value) => Value::from(*value),
            Self::Float(value) => Value::from(*value),
            Self::Text(text) => Value::from(text.as_str()),
            Self::List(items) => Value::from(items.iter().map(Self::to_value).collect::<Vec<Value>>()),
            Self::Object(fields) => {
                Value::from_pairs(fields.iter().map(|(key, value)| (key.as_str(), value.to_value())))
            }
        }
    }

    /// The same with every text changed, those of keys aside.
    pub(super) fn map_texts<E>(self, change: &mut impl FnMut(String) -> Result<String, E>) -> Result<Self, E> {
        Ok(match self {
            Self::Text(text) => Self::Text(change(text)?),
            Self::List(items) => {
                Self::List(items.into_iter().map(|item| item.map_texts(change)).collect::<Result<_, E>>()?)
            }
            Self::Object(fields) => Self::Object(
                fields.into_iter().map(|(key, value)| Ok((key, value.map_texts(change)?))).collect::<Result<_, E>>()?,
            ),
            other => other,
        })
    }
}

fn insert(fields: &mut Vec<(String, Json)>, key: String, value: Json) {
    match fields.iter_mut().find(|(name, _)| *name == key) {
        Some((_, there)) => *there = value,
        None => fields.push((key, value)),
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Bool(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Int(value))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(i64::try_from(value).map_or(Json::Large(value), Json::Int))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
                Ok(Json::Float(value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Json, E> {
                Ok(Json::Text(value.to_owned()))
            }
            fn visit_string<E>(self, value: String) -> Result<Json, E> {
                Ok(Json::Text(value))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(Json::List(list))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Json, A::Error> {
                let mut fields = Vec::new();
                while let Some((key, value)) = entries.next_entry()? {
                    insert(&mut fields, key, value);
                }
                Ok(Json::Object(fields))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// The beginning of an integer outside of the range of [`Json`], in valid JSON. Python has integers of any size.
pub(super) fn large_integer(text: &str) -> Option<String> {
    let (mut rest, mut inside) = (text, false);
    while let Some(letter) = rest.chars().next() {
        let mut length = letter.len_utf8();
        match letter {
            '"' => inside = !inside,
            '\\' => length += rest.chars().nth(1).map_or(0, char::len_utf8),
            '-' | '0'..='9' if !inside => {
                let end = rest.find(|letter: char| !letter.is_ascii_digit() && !"+-.eE".contains(letter));
                let number = &rest[..end.unwrap_or(rest.len())];
                let fits = number.parse::<u64>().is_ok() || number.parse::<i64>().is_ok();
                if !fits && !number.contains(['.', 'e', 'E']) {
                    return Some(number.chars().take(40).collect());
                }
                length = number.len();
            }
            _ => {}
        }
        rest = &rest[length..];
    }
    None
}

/// How [`dump`] writes.
#[derive(Clone, Debug)]
pub(super) struct Style {
    pub indent: Option<usize>,
    pub between_items: String,
    pub after_key: String,
    pub sort_keys: bool,
    pub ascii: bool,
}

impl Style {
    /// As Python's `json.dumps` has them: the comma is followed by a blank only on one line.
    pub(super) fn new(indent: Option<usize>) -> Self {
        let between_items = if indent.is_some() { "," } else { ", " };
        Self { indent, between_items: between_items.into(), after_key: ": ".into(), sort_keys: false, ascii: false }
    }
}

/// The text of a value as Python's `json.dumps` writes it.
pub(super) fn dump(value: &Json, style: &Style) -> String {
    let mut text = String::new();
    write(value, style, 0, &mut text);
    text
}

fn write(value: &Json, style: &Style, depth: usize, to: &mut String) {
    let new_line = |depth: usize, to: &mut String| {
        if let Some(indent) = style.indent {
            to.push('\n');
            to.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    match value {
        Json::Null => to.push_str("null"),
        Json::Bool(value) => to.push_str(if *value { "true" } else { "false" }),
        Json::Int(value) => to.push_str(&value.to_string()),
        Json::Large(value) => to.push_str(&value.to_string()),
        Json::Float(value) => to.push_str(&float(*value)),
        Json::Text(text) => write_text(text, style.ascii, to),
        Json::List(items) if items.is_empty() => to.push_str("[]"),
        Json::List(items) => {
            to.push('[');
            for (number, item) in items.iter().enumerate() {
                if number > 0 {
                    to.push_str(&style.between_items);
                }
                new_line(depth + 1, to);
                write(item, style, depth + 1, to);
            }
            new_line(depth, to);
            to.push(']');
        }
        Json::Object(fields) if fields.is_empty() => to.push_str("{}"),
        Json::Object(fields) => {
            let mut fields: Vec<&(String, Json)> = fields.iter().collect();
            if style.sort_keys {
                fields.sort_by(|a, b| a.0.cmp(&b.0));
            }
            to.push('{');
            for (number, (key, value)) in fields.into_iter().enumerate() {
                if number > 0 {
                    to.push_str(&style.between_items);
                }
                new_line(depth + 1, to);
                write_text(key, style.ascii, to);
                to.push_str(&style.after_key);
                write(value, style, depth + 1, to);
            }
            new_line(depth, to);
            to.push('}');
        }
    }
}

/// The shortest digits that give the same number, as Python's `repr` writes them.
pub(super) fn float(value: f64) -> String {
    let size = value.abs();
    if value.is_finite() && size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    // With a fraction, even if it is 0.
    format!("{value:?}")
}

fn write_text(text: &str, ascii: bool, to: &mut String) {
    to.push('"');
    for letter in text.chars() {
        match letter {
            '"' => to.push_str("\\\""),
            '\\' => to.push_str("\\\\"),
            '\n' => to.push_str("\\n"),
            '\r' => to.push_str("\\r"),
            '\t' => to.push_str("\\t"),
            '\u{8}' => to.push_str("\\b"),
            '\u{c}' => to.push_str("\\f"),
            control if u32::from(control) < 0x20 => to.push_str(&format!("\\u{:04x}", u32::from(control))),
            // The marks of this module are no part of the text.
            letter if ascii && (!letter.is_ascii() || letter == '\u{7f}') && !super::marked::is_mark(letter) => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    to.push_str(&format!("\\u{unit:04x}"));
                }
            }
            letter => to.push(letter),
        }
    }
    to.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Json {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        let value = parsed(
            r#"{"b": [1, -2, 18446744073709551615, 1.0, 1.5e-7, 1e22, 0.1, true, null],
            "a": {"x": "\u0001\"\\\né\ud83e\udd80"}, "c": [], "d": {}, "b2": 1, "b2": 2}"#,
        );
        let line = "{\"b\": [1, -2, 18446744073709551615, 1.0, 1.5e-07, 1e+22, 0.1, true, null], \"a\": {\"x\": \
                    \"\\u0001\\\"\\\\\\n\u{e9}\u{1f980}\"}, \"c\": [], \"d\": {}, \"b2\": 2}";
        assert_eq!(dump(&value, &Style::new(None)), line);
        let small = parsed(r#"{"b": [1, {"c": []}], "a": "é"}"#);
        assert_eq!(
            dump(&small, &Style::new(Some(2))),
            "{\n  \"b\": [\n    1,\n    {\n      \"c\": []\n    }\n  ],\n  \"a\": \"\u{e9}\"\n}"
        );
        let style = Style { sort_keys: true, ascii: true, ..Style::new(None) };
        assert_eq!(dump(&small, &style), r#"{"a": "\u00e9", "b": [1, {"c": []}]}"#);
    }

    #[test]
    fn integers_of_more_than_64_bits_are_found() {
        for (text, found) in [
            (r#"{"a": [18446744073709551615, -9223372036854775808, 1e30, 1.0e99, "99999999999999999999"]}"#, None),
            (r#"{"a\"": 18446744073709551616}"#, Some("18446744073709551616")),
            ("[0, -9223372036854775809]", Some("-9223372036854775809")),
            (r#"["\\", 99999999999999999999]"#, Some("99999999999999999999")),
        ] {
            assert_eq!(large_integer(text).as_deref(), found, "{text}");
        }
    }

    #[test]
    fn every_text_is_reached() {
        let value = parsed(r#"{"a": ["x", {"b": "y"}], "c": 1}"#);
        let upper = value.map_texts(&mut |text| Ok::<_, ()>(text.to_uppercase())).unwrap();
        assert_eq!(dump(&upper, &Style::new(None)), r#"{"a": ["X", {"b": "Y"}], "c": 1}"#);
    }
}
