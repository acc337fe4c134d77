//! Files of JSON records: an object a line, an array of objects, or objects one after another.
//!
//! One record is in memory at a time, and none larger than [`MAX_RECORD_BYTES`]. Each is known by the line of its file
//! on which it begins.
//!
//! # Which files hold records
//! `.jsonl` and `.ndjson` do. For others the beginning decides: an array of objects, or an object followed by another
//! one. A single object is a record if it has the wanted field as a text; otherwise it is plain text, like a
//! `package.json`.

use std::io::{self, BufRead, ErrorKind, Read};

use super::{
    DataError,
    compressed::{Source, ending},
    documents::{At, Notes, Piece, Wanted, give_document},
    json::{self, Found},
};

/// The largest record that is read, bytes.
pub(super) const MAX_RECORD_BYTES: usize = 64 << 20;

/// The arrangement of records in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// One per line.
    Lines,
    /// In one array.
    Array,
    /// One after another, over any number of lines.
    Values,
}

/// The type of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Records(Shape),
    /// Plain text.
    Text,
    /// One JSON object without the wanted field: plain text, but worth a note.
    ObjectAsText,
    /// Left out, for this reason.
    LeftOut(String),
}

/// Finds out whether a file holds records.
pub(super) fn recognise(source: &Source<'_>, field: &str) -> Result<Verdict, DataError> {
    let failed = |error| source.read_error(error);
    let ending = ending(source.inner_name());
    let lines = matches!(ending.as_str(), "jsonl" | "ndjson" | "jsonlines" | "ldjson");
    let mut records = Records::new(source.text()?, Shape::Values);
    let first = records.peek_filled().map_err(failed)?;
    if lines {
        return Ok(Verdict::Records(if first == Some(b'[') { Shape::Array } else { Shape::Lines }));
    }
    let called_json = matches!(ending.as_str(), "json" | "jsons");
    let named_so = |shape| if called_json { Verdict::Records(shape) } else { Verdict::Text };
    match first {
        Some(b'[') => {
            records.shape = Shape::Array;
            records.bump();
            match records.peek_filled().map_err(failed)? {
                Some(b'{') => {}
                Some(b']') | None => return Ok(named_so(Shape::Array)),
                Some(_) if called_json => {
                    let reason = "is a JSON array, but not of objects; write it as JSON lines, one object a document";
                    return Ok(Verdict::LeftOut(reason.into()));
                }
                Some(_) => return Ok(Verdict::Text),
            }
            records.inside = true;
        }
        Some(b'{') => {}
        _ => return Ok(Verdict::Text),
    }
    let shape = records.shape;
    let line = match records.next().map_err(failed)? {
        Some(Next::Record { line }) => line,
        Some(Next::TooLong { .. }) => return Ok(named_so(shape)),
        _ if shape == Shape::Array => return Ok(named_so(shape)),
        _ if records.first_line_is_an_object() => return Ok(named_so(Shape::Lines)),
        _ => return Ok(Verdict::Text),
    };
    let (record, text) = (std::mem::take(&mut records.buffer), Verdict::Text);
    let single_line = records.line == line;
    let Ok(record) = json::find(&record, field) else {
        let first_line = record.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let looks = shape == Shape::Array || first_line.trim_ascii().ends_with(b"}");
        let shape = if shape == Shape::Array { shape } else { Shape::Lines };
        return Ok(if looks { named_so(shape) } else { text });
    };
    let shape = if shape == Shape::Array {
        shape
    } else {
        match records.peek_filled().map_err(failed)? {
            Some(b'{') if single_line && records.line > line => Shape::Lines,
            Some(b'{') => Shape::Values,
            Some(_) => return Ok(named_so(Shape::Lines)),
            None => {
                return Ok(match record.found {
                    Found::Text(_) => Verdict::Records(Shape::Values),
                    _ if record.chat.is_some() => Verdict::Records(Shape::Values),
                    _ if called_json => Verdict::ObjectAsText,
                    _ => text,
                });
            }
        }
    };
    Ok(match record.found {
        Found::Missing if record.chat.is_none() => {
            Verdict::LeftOut(format!("holds JSON records; the first {}", missing(field, &record.names)))
        }
        _ => Verdict::Records(shape),
    })
}

fn missing(field: &str, names: &[String]) -> String {
    format!("has no field {field:?} but {names:?}; name the right one with --text-field")
}

/// Passes on the documents of a file of records.
pub(super) fn read(
    source: &Source<'_>,
    shape: Shape,
    wanted: &Wanted<'_>,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<Notes, DataError> {
    let mut records = Records::new(source.text()?, shape);
    let mut notes = Notes { records: true, ..Notes::default() };
    let invalid = |line: u64, reason: String| DataError::Input { input: format!("{}:{line}", source.name), reason };
    loop {
        let (line, bad) = match records.next().map_err(|error| source.read_error(error))? {
            None => return Ok(notes),
            Some(Next::Record { line }) if wanted.chats => match std::str::from_utf8(&records.buffer) {
                Ok(text) => {
                    notes.documents += 1;
                    if !sink(Piece { text, continues: false, at: At::Record(line) })? {
                        return Ok(notes);
                    }
                    continue;
                }
                Err(_) => (line, "is not UTF-8".to_owned()),
            },
            Some(Next::Record { line }) => match document(&records.buffer, wanted.field) {
                Ok(Some(text)) => {
                    notes.documents += u64::from(!text.is_empty());
                    if !give_document(&text, At::Record(line), sink)? {
                        return Ok(notes);
                    }
                    continue;
                }
                Ok(None) => continue,
                Err(Bad::Chat(name)) => return Err(invalid(line, chat(name))),
                Err(Bad::Record(reason)) => (line, reason),
            },
            Some(Next::TooLong { line }) => (line, format!("is longer than {} MiB", MAX_RECORD_BYTES >> 20)),
            Some(Next::Broken { line, reason }) => return Err(invalid(line, reason)),
        };
        if !wanted.skip_bad_records {
            return Err(invalid(line, bad));
        }
        notes.bad_record(&format!("{}:{line} {bad}", source.name));
    }
}

/// The message about a record of a conversation.
pub(super) fn chat(name: &str) -> String {
    format!(
        "is a record of a conversation (field {name:?}): --format chat renders those with \"messages\" by the chat \
         template of --tokenizer; to train on a text instead, name its field with --text-field"
    )
}

enum Bad {
    /// All records will be the same.
    Chat(&'static str),
    Record(String),
}

fn document(record: &[u8], field: &str) -> Result<Option<String>, Bad> {
    let record = json::find(record, field).map_err(Bad::Record)?;
    match (record.found, record.chat) {
        (Found::Text(raw), _) => {
            json::text(raw).map(Some).map_err(|said| Bad::Record(format!("field {field:?} {said}")))
        }
        (Found::Null, _) => Ok(None),
        (Found::Other, _) => Err(Bad::Record(format!("field {field:?} is not a string"))),
        (Found::Missing, Some(chat)) => Err(Bad::Chat(chat)),
        (Found::Missing, None) => Err(Bad::Record(missing(field, &record.names))),
    }
}

/// The next item of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    /// It is in the buffer.
    Record { line: u64 },
    /// It was skipped.
    TooLong { line: u64 },
    /// The records behind it can't be separated.
    Broken { line: u64, reason: String },
}

/// Cuts a file into records.
struct Records<R> {
    reader: R,
    shape: Shape,
    /// The line that is being read, from 1.
    line: u64,
    /// In an array: the opening bracket has been read.
    inside: bool,
    /// In an array: a comma must come before the next record.
    comma_due: bool,
    /// In an array: the closing bracket has been read.
    closed: bool,
    buffer: Vec<u8>,
    limit: usize,
}

impl<R: BufRead> Records<R> {
    fn new(reader: R, shape: Shape) -> Self {
        Self {
            reader,
            shape,
            line: 1,
            inside: false,
            comma_due: false,
            closed: false,
            buffer: Vec::new(),
            limit: MAX_RECORD_BYTES,
        }
    }

    fn next(&mut self) -> io::Result<Option<Next>> {
        self.buffer.clear();
        match self.shape {
            Shape::Lines => self.next_line(),
            Shape::Array => self.next_element(),
            Shape::Values => match self.peek_filled()? {
                None => Ok(None),
                Some(_) => self.value().map(Some),
            },
        }
    }

    /// Whether the first line is one complete object.
    fn first_line_is_an_object(&self) -> bool {
        let line = self.buffer.split(|&byte| byte == b'\n').next().unwrap_or_default().trim_ascii();
        line.starts_with(b"{") && line.ends_with(b"}")
    }

    fn next_line(&mut self) -> io::Result<Option<Next>> {
        loop {
            self.buffer.clear();
            let line = self.line;
            let most = self.limit as u64 + 1;
            if self.reader.by_ref().take(most).read_until(b'\n', &mut self.buffer)? == 0 {
                return Ok(None);
            }
            self.line += 1;
            if self.buffer.last() != Some(&b'\n') && self.buffer.len() > self.limit {
                self.buffer = Vec::new();
                self.pass_line()?;
                return Ok(Some(Next::TooLong { line }));
            }
            if !self.buffer.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(Next::Record { line }));
            }
        }
    }

    fn pass_line(&mut self) -> io::Result<()> {
        loop {
            let seen = self.reader.fill_buf()?;
            match seen.iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    self.reader.consume(end + 1);
                    return Ok(());
                }
                None if seen.is_empty() => return Ok(()),
                None => {
                    let all = seen.len();
                    self.reader.consume(all);
                }
            }
        }
    }

    fn next_element(&mut self) -> io::Result<Option<Next>> {
        let broken = |line, reason: &str| Ok(Some(Next::Broken { line, reason: reason.to_owned() }));
        loop {
            let byte = self.peek_filled()?;
            let line = self.line;
            match byte {
                None if self.closed || !self.inside => return Ok(None),
                None => return broken(line, "the file ends before its JSON array does"),
                Some(_) if self.closed => return broken(line, "something follows the JSON array"),
                Some(b'[') if !self.inside => self.inside = true,
                Some(b']') => self.closed = true,
                Some(b',') if self.comma_due => self.comma_due = false,
                Some(_) if self.comma_due => return broken(line, "expected ',' or ']' after a record of a JSON array"),
                Some(_) => {
                    self.comma_due = true;
                    return self.value().map(Some);
                }
            }
            self.bump();
        }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            match self.reader.fill_buf() {
                Ok(seen) => return Ok(seen.first().copied()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The next byte that is not blank.
    fn peek_filled(&mut self) -> io::Result<Option<u8>> {
        loop {
            match self.peek()? {
                Some(b'\n') => self.line += 1,
                Some(b' ' | b'\t' | b'\r') => {}
                byte => return Ok(byte),
            }
            self.bump();
        }
    }

    fn bump(&mut self) {
        self.reader.consume(1);
    }

    /// From the first byte of a value to its last, found by brackets and quotes alone.
    fn value(&mut self) -> io::Result<Next> {
        let line = self.line;
        let (mut depth, mut in_string, mut escaped, mut length) = (0_u64, false, false, 0_usize);
        loop {
            let Some(byte) = self.peek()? else {
                if depth > 0 || in_string || length == 0 {
                    return Ok(Next::Broken { line, reason: "the file ends within this record".into() });
                }
                break;
            };
            let mut last = false;
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => {
                    in_string = !in_string;
                    last = !in_string && depth == 0;
                }
                _ if in_string => {}
                b'{' | b'[' => depth += 1,
                b'}' | b']' if depth > 0 => {
                    depth -= 1;
                    last = depth == 0;
                }
                // The end of a number or a literal.
                b',' | b']' | b'}' | b' ' | b'\t' | b'\r' | b'\n' if depth == 0 && length > 0 => break,
                _ => {}
            }
            self.line += u64::from(byte == b'\n');
            length = length.saturating_add(1);
            if length <= self.limit {
                self.buffer.push(byte);
            } else {
                self.buffer = Vec::new();
            }
            self.bump();
            if last {
                break;
            }
        }
        Ok(if length > self.limit { Next::TooLong { line } } else { Next::Record { line } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str, shape: Shape, limit: usize) -> Vec<(u64, String)> {
        let mut records = Records { limit, ..Records::new(text.as_bytes(), shape) };
        let mut all = Vec::new();
        while let Some(next) = records.next().unwrap() {
            match next {
                Next::Record { line } => all.push((line, String::from_utf8(records.buffer.clone()).unwrap())),
                Next::TooLong { line } => {
                    assert!(records.buffer.capacity() <= limit, "a record that is passed over is not held");
                    all.push((line, "too long".into()));
                }
                Next::Broken { line, reason } => {
                    all.push((line, reason));
                    break;
                }
            }
        }
        all
    }

    #[test]
    fn records_are_cut_and_counted_by_lines() {
        let seen = |text: &str, shape| cut(text, shape, 40);
        let record = |line: u64, text: &str| (line, text.to_owned());
        assert_eq!(seen("{}\n\n{\"a\": 1}", Shape::Lines), [record(1, "{}\n"), record(3, "{\"a\": 1}")]);
        let long = format!("\"{}\"", "x".repeat(60));
        assert_eq!(seen(&format!("{long}\n{{}}"), Shape::Lines), [record(1, "too long"), record(2, "{}")]);
        assert_eq!(
            seen(&format!(" [{{\"a\":\n\"]}}\\\"\"}},\n{long}, 5,null\n]\n"), Shape::Array),
            [record(1, "{\"a\":\n\"]}\\\"\"}"), record(3, "too long"), record(3, "5"), record(3, "null")]
        );
        assert_eq!(seen("{\n}\n{}{}", Shape::Values), [record(1, "{\n}"), record(3, "{}"), record(3, "{}")]);
        assert!(seen("[]", Shape::Array).is_empty() && seen("", Shape::Values).is_empty());
        for (text, line, said) in [
            ("[{}\n{}]", 2, "expected ','"),
            ("[{},\n", 2, "ends before"),
            ("[{},\n{\"a", 2, "ends within"),
            ("[{}]\nx", 2, "follows"),
        ] {
            let (at, reason) = seen(text, Shape::Array).pop().unwrap();
            assert!(at == line && reason.contains(said), "{text}: {at} {reason}");
        }
    }

    #[test]
    fn only_json_is_read_as_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let verdict = |name: &str, text: &str| {
            std::fs::write(&path, text).unwrap();
            recognise(&Source::open(&path, name).unwrap(), "text").unwrap()
        };
        let record = "{\"text\": \"a\"}";
        let pretty = "{\n  \"text\": \"a\"\n}";
        for (name, text, shape) in [
            ("a.jsonl", "anything", Shape::Lines),
            ("a.ndjson", "[{}]", Shape::Array),
            ("a.json", record, Shape::Values),
            ("a", pretty, Shape::Values),
            ("a.txt", &format!("{record}\n\n{record}\n"), Shape::Lines),
            ("a.json", &format!("\u{feff} {record}\n{record}"), Shape::Lines),
            ("a.json", &format!("{record}{record}"), Shape::Values),
            ("a.data", &format!("{pretty}\n{pretty}"), Shape::Values),
            ("a", &format!("[{pretty},{record}]"), Shape::Array),
            ("a.json", "[{oops}]", Shape::Array),
            ("a.json", "[]", Shape::Array),
            ("a.json", "{\"text\": oops}\n{}", Shape::Lines),
            ("a.json", &format!("{record},\n{record}"), Shape::Lines),
            ("a.json", "{\"messages\": []}", Shape::Values),
        ] {
            assert_eq!(verdict(name, text), Verdict::Records(shape), "{name}: {text}");
        }
        for (name, text) in [
            ("Cargo.toml", "[package]\nname = \"x\""),
            ("a.md", "[link](to)"),
            ("a.ini", "[{section}]"),
            ("a.clj", "[{:a 1}]"),
            ("a.tex", "{\\rtf1 text}"),
            ("a.html", "{{ title }}\n{{ body }}"),
            ("a.py", "{'a': 1}\n{'b': 2}"),
            ("a.txt", "{unfinished"),
            ("a.txt", "[1, 2]"),
            ("a.ipynb", "{\"cells\": []}"),
            ("tsconfig.json", "{\n  // why\n  \"a\": 1\n}"),
            ("a.rs", ""),
        ] {
            assert_eq!(verdict(name, text), Verdict::Text, "{name}: {text}");
        }
        assert_eq!(verdict("package.json", "{\"name\": \"x\"}"), Verdict::ObjectAsText);
        for text in ["[{\"body\": \"a\"}]", "{\"body\": 1}\n{\"body\": 2}", "[1, 2]"] {
            assert!(matches!(verdict("a.json", text), Verdict::LeftOut(_)), "{text}");
        }
    }
}
