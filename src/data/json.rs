//! Finds the one wanted field of a JSON object; the others are skipped without validation.
//!
//! Real-world data has `NaN`, lone surrogates and broken UTF-8 in fields that this program does not need. Only the
//! structure must be JSON: brackets, commas, colons, quotes. The wanted text itself is read strictly. Nothing is built
//! for skipped values, and their depth takes one byte per level, no stack.

use std::borrow::Cow;

/// The most field names of a record that are listed when the wanted one is missing.
const MOST_NAMES: usize = 20;

/// The content of the wanted field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    /// A string as written, with its quotes.
    Text(&'a [u8]),
    Null,
    /// Another type.
    Other,
    Missing,
}

/// A record that was scanned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub found: Found<'a>,
    /// The names of its first fields.
    pub names: Vec<String>,
    /// Set if it has a field with that name, as records of conversations do.
    pub chat: Option<&'static str>,
}

/// The field `path` (`text`, or `doc.text` of an object in it) of the object in `bytes`; if it occurs twice, the last
/// one counts.
pub(super) fn find<'a>(bytes: &'a [u8], path: &str) -> Result<Record<'a>, String> {
    let mut scanner = Scanner { bytes, at: 0 };
    let mut record = Record { found: Found::Missing, names: Vec::new(), chat: None };
    scanner.blank();
    if scanner.peek() != Some(b'{') {
        return Err("is not a JSON object".into());
    }
    record.found = scanner.object(path, &mut |name| {
        record.chat = record.chat.or(["messages", "conversations"].into_iter().find(|chat| *chat == name));
        if record.names.len() < MOST_NAMES {
            record.names.push(name.to_owned());
        }
    })?;
    scanner.blank();
    if scanner.at < bytes.len() {
        return Err(format!("is not a JSON object alone: more follows at byte {}", scanner.at));
    }
    Ok(record)
}

/// The text of a JSON string as it is written.
pub(super) fn text(raw: &[u8]) -> Result<String, String> {
    serde_json::from_slice(raw).map_err(|error| format!("holds a text that is not valid: {error}"))
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn blank(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn eat(&mut self, byte: u8) -> bool {
        self.blank();
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }

    fn wrong(&self, expected: &str) -> String {
        let place = if self.at < self.bytes.len() { format!("byte {}", self.at) } else { "its end".into() };
        format!("is not a JSON object: expected {expected} at {place}")
    }

    /// A string, with its quotes.
    fn string(&mut self) -> Result<&'a [u8], String> {
        self.blank();
        let start = self.at;
        if self.peek() != Some(b'"') {
            return Err(self.wrong("a string"));
        }
        self.at += 1;
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(&self.bytes[start..self.at]);
                }
                Some(b'\\') if self.at + 1 < self.bytes.len() => self.at += 2,
                Some(_) => self.at += 1,
                None => return Err(self.wrong("the end of a string")),
            }
        }
    }

    fn key(&mut self) -> Result<Cow<'a, str>, String> {
        let raw = self.string()?;
        if !self.eat(b':') {
            return Err(self.wrong("':'"));
        }
        if raw.contains(&b'\\')
            && let Ok(name) = serde_json::from_slice::<String>(raw)
        {
            return Ok(Cow::Owned(name));
        }
        Ok(String::from_utf8_lossy(&raw[1..raw.len() - 1]))
    }

    /// A number or a literal.
    fn bare(&mut self) -> Result<(), String> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.')) {
            self.at += 1;
        }
        let word = &self.bytes[start..self.at];
        let number = word.iter().any(u8::is_ascii_digit)
            && word.iter().all(|byte| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.' | b'e' | b'E'));
        // As Python writes them.
        if number || matches!(word, b"true" | b"false" | b"null" | b"NaN" | b"Infinity" | b"-Infinity") {
            return Ok(());
        }
        self.at = start;
        Err(self.wrong("a value"))
    }

    /// Any value.
    fn skip(&mut self) -> Result<(), String> {
        let mut open = Vec::new();
        loop {
            self.blank();
            match self.peek() {
                Some(b'{') => {
                    self.at += 1;
                    if !self.eat(b'}') {
                        self.key()?;
                        open.push(b'}');
                        continue;
                    }
                }
                Some(b'[') => {
                    self.at += 1;
                    if !self.eat(b']') {
                        open.push(b']');
                        continue;
                    }
                }
                Some(b'"') => drop(self.string()?),
                _ => self.bare()?,
            }
            // A value has ended; the next byte belongs to the open container.
            loop {
                let Some(&close) = open.last() else { return Ok(()) };
                if self.eat(b',') {
                    if close == b'}' {
                        self.key()?;
                    }
                    break;
                }
                if !self.eat(close) {
                    return Err(self.wrong(if close == b'}' { "',' or '}'" } else { "',' or ']'" }));
                }
                open.pop();
            }
        }
    }

    /// An object; `named` receives its names. It recurses only as deep as `path` has dots.
    fn object(&mut self, path: &str, named: &mut dyn FnMut(&str)) -> Result<Found<'a>, String> {
        let mut found = Found::Missing;
        self.at += 1;
        if self.eat(b'}') {
            return Ok(found);
        }
        loop {
            let key = self.key()?;
            named(&key);
            let below = path.strip_prefix(&*key).and_then(|rest| rest.strip_prefix('.'));
            self.blank();
            match (self.peek(), below) {
                (Some(b'{'), Some(below)) if *key != *path => match self.object(below, &mut |_| ())? {
                    Found::Missing => {}
                    inner => found = inner,
                },
                (first, below) => {
                    let start = self.at;
                    self.skip()?;
                    let value = &self.bytes[start..self.at];
                    let null = value == b"null";
                    match first {
                        Some(b'"') if *key == *path => found = Found::Text(value),
                        _ if null && (*key == *path || below.is_some()) => found = Found::Null,
                        _ if *key == *path => found = Found::Other,
                        _ => {}
                    }
                }
            }
            if self.eat(b'}') {
                return Ok(found);
            }
            if !self.eat(b',') {
                return Err(self.wrong("',' or '}'"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(line: &str, path: &str) -> Result<String, String> {
        match find(line.as_bytes(), path)?.found {
            Found::Text(raw) => text(raw),
            other => Ok(format!("{other:?}")),
        }
    }

    #[test]
    fn the_content_of_other_fields_does_not_matter() {
        for line in [
            r#"{"score": NaN, "text": "a"}"#,
            r#"{"score": [Infinity, -Infinity, 1e-5, {"x": {}}, []], "text": "a", "more": {"y": [null, true]}}"#,
            r#"{"name": "\ud800", "\udc00": 1, "text": "a"}"#,
            r#" { "text" : "a" , "quoted": "\\\"}{][," } "#,
            r#"{"text": "first", "te\u0078t": "a"}"#,
        ] {
            assert_eq!(wanted(line, "text").unwrap(), "a", "{line}");
        }
        let broken = b"{\"name\": \"\xff\xfe\", \"text\": \"a\"}";
        assert_eq!(find(broken, "text").unwrap().found, Found::Text(b"\"a\""));
        let deep = format!("{{\"x\": {}{}, \"text\": \"a\"}}", "[".repeat(200_000), "]".repeat(200_000));
        assert_eq!(wanted(&deep, "text").unwrap(), "a");
    }

    #[test]
    fn a_field_of_an_object_in_the_record_is_found() {
        assert_eq!(wanted(r#"{"doc": {"id": 1, "text": "a"}}"#, "doc.text").unwrap(), "a");
        assert_eq!(wanted(r#"{"doc.text": "a", "doc": {"text": null}}"#, "doc.text").unwrap(), "Null");
        assert_eq!(wanted(r#"{"doc.text": "a"}"#, "doc.text").unwrap(), "a");
        assert_eq!(wanted(r#"{"a": {"b": {"c": "deep"}}}"#, "a.b.c").unwrap(), "deep");
        assert_eq!(wanted(r#"{"doc": null}"#, "doc.text").unwrap(), "Null");
        assert_eq!(wanted(r#"{"doc": ["text"]}"#, "doc.text").unwrap(), "Missing");
        assert_eq!(wanted(r#"{"docs": {"text": "a"}}"#, "doc.text").unwrap(), "Missing");
    }

    #[test]
    fn a_record_that_is_not_an_object_is_refused() {
        for line in [
            "[1]",
            "{\"text\"",
            "{\"text\": \"a\"",
            "{\"text\": \"a\" \"b\": 1}",
            "{\"text\": \"a\",}",
            "{\"text\": \"a\"}}",
            "{\"text\": \"a\"} {}",
            "{\"a\": undefined, \"text\": \"a\"}",
            "{\"a\": [1 2], \"text\": \"a\"}",
            "{text: 1}",
            "{\"a\": , \"text\": \"a\"}",
            "",
        ] {
            assert!(wanted(line, "text").is_err_and(|said| said.contains("is not a JSON object")), "{line}");
        }
        // The wanted text itself is read strictly.
        assert!(wanted(r#"{"text": "\ud800"}"#, "text").is_err());
        assert!(
            find(b"{\"text\": \"\xff\"}", "text")
                .is_ok_and(|found| matches!(found.found, Found::Text(raw) if text(raw).is_err()))
        );
        assert_eq!(find(br#"{"messages": [], "id": 1}"#, "text").unwrap().chat, Some("messages"));
        assert_eq!(find(br#"{"b": 1, "a": 2}"#, "text").unwrap().names, ["b", "a"]);
    }
}
