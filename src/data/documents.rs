//! The documents in a file, as text.
//!
//! A file's type follows from its first bytes or, if these are inconclusive, from the ending of its name: JSON records
//! with a text field ([`super::records`]), a Parquet column ([`super::columns`]) or chats ([`super::conversations`]),
//! else plain text, one document a file. Each may be packed by gzip or zstd ([`super::compressed`]).
//!
//! A document reaches the caller in pieces of at most [`PIECE_BYTES`], cut at line ends if there are any: memory stays
//! bounded for a file of any size, and the tokenizer, whose cost grows faster than its input, gets short pieces.
//!
//! Unreadable inputs differ from broken ones: a plain file that is not UTF-8 or holds a NUL byte (an image in a source
//! tree), a table or an archive is left out whole and reported; a broken JSON record or a missing field is an error
//! that names the line, since dropping it would silently train on less than requested. With `--bad-records skip` such
//! records are dropped and counted.

use std::{
    io::{BufRead, Read},
    path::Path,
};

use super::{
    DataError, columns,
    compressed::{self, Packing, Source},
    conversations,
    records::{self, Verdict},
};

/// The longest piece of a document, bytes.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// A piece of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    /// Not empty, and at most [`PIECE_BYTES`]; a chat's record is whole.
    pub text: &'a str,
    /// Whether it continues the document of the piece before.
    pub continues: bool,
    /// Where it begins.
    pub at: At,
}

/// A place in an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// A line, from 1, of a text whose lines are the file's.
    Line(u64),
    /// The line on which a record begins.
    Record(u64),
    /// A row, from 1.
    Row(u64),
}

impl At {
    /// The place in the input `name` that follows the text `before`.
    pub(super) fn behind(self, before: &str, name: &str) -> String {
        let lines = before.bytes().filter(|&byte| byte == b'\n').count() as u64;
        match self {
            Self::Line(line) => format!("{name}:{}", line + lines),
            Self::Record(line) => format!("{name}:{line}"),
            Self::Row(row) => format!("{name}, row {row}"),
        }
    }
}

/// The settings for reading an input.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// The field of records, or column, that holds the text.
    pub field: &'a str,
    /// Records that can't be read are dropped and counted.
    pub skip_bad_records: bool,
    /// Records are chats: each is passed on whole, as it is written.
    pub chats: bool,
}

/// Observations on an input.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Notes {
    /// Whether it holds records or rows.
    pub records: bool,
    /// Of these, the ones with a text.
    pub documents: u64,
    /// Records that were dropped.
    pub bad_records: u64,
    /// Place and reason of the first of them.
    pub bad: Option<String>,
    /// Whether it is one JSON object without the wanted field, which was taken as text.
    pub object_as_text: bool,
}

impl Notes {
    /// Counts a record that is dropped.
    pub(super) fn bad_record(&mut self, what: &str) {
        self.bad_records += 1;
        self.bad.get_or_insert_with(|| what.to_owned());
    }
}

/// The outcome of reading an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Read, as far as the caller wanted.
    Done(Notes),
    /// Left out whole, for this reason.
    Skipped(String),
}

/// Passes the documents of the local file `path` to `sink`, which returns whether it wants more.
pub(super) fn read(
    path: &Path,
    name: &str,
    wanted: &Wanted<'_>,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<Outcome, DataError> {
    let source = Source::open(path, name)?;
    if let Some(reason) = source.unreadable() {
        return Ok(Outcome::Skipped(reason));
    }
    if compressed::is_parquet(&compressed::ending(name), &source.head) {
        if wanted.chats {
            return conversations::read(source.file()?, name, wanted, sink).map(Outcome::Done);
        }
        return columns::read(source.file()?, name, wanted, sink).map(Outcome::Done);
    }
    let object_as_text = match records::recognise(&source, wanted.field)? {
        Verdict::Records(shape) => return records::read(&source, shape, wanted, sink).map(Outcome::Done),
        Verdict::LeftOut(reason) => return Ok(Outcome::Skipped(reason)),
        Verdict::ObjectAsText | Verdict::Text if wanted.chats => {
            return Ok(Outcome::Skipped("holds no JSON records, and so no chats".into()));
        }
        Verdict::ObjectAsText => true,
        Verdict::Text => false,
    };
    // Read twice, so that a file that turns out not to be text gives no documents. The second read comes from the page
    // cache.
    if let Some(reason) = read_plain(&mut *source.text()?, &source, &mut |_| Ok(true))? {
        return Ok(Outcome::Skipped(reason.into()));
    }
    if let Some(reason) = read_plain(&mut *source.text()?, &source, sink)? {
        return Err(DataError::Input { input: name.to_owned(), reason: format!("changed while read: {reason}") });
    }
    Ok(Outcome::Done(Notes { object_as_text, ..Notes::default() }))
}

/// Reads an input to its end only to find out whether it is broken, which may show after it has given documents.
pub(super) fn look_through(path: &Path, name: &str, wanted: &Wanted<'_>) -> Result<(), DataError> {
    let source = Source::open(path, name)?;
    if source.packing != Packing::Plain || compressed::is_parquet(&compressed::ending(name), &source.head) {
        read(path, name, wanted, &mut |_| Ok(true))?;
    }
    Ok(())
}

/// Where to cut `text`, which continues: after the last line, else after the last space, else at its end. Never 0.
fn cut_point(text: &str) -> usize {
    match text.rfind('\n') {
        Some(newline) => newline + 1,
        None => text.rfind(' ').filter(|&space| space > 0).unwrap_or(text.len()),
    }
}

/// Passes on the pieces of a document in memory; `false` if the sink has enough.
pub(super) fn give_document(
    mut text: &str,
    at: At,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<bool, DataError> {
    let mut continues = false;
    while !text.is_empty() {
        let cut = if text.len() <= PIECE_BYTES {
            text.len()
        } else {
            // This ends: a character has at most four bytes.
            let window = (0..=PIECE_BYTES).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            cut_point(&text[..window])
        };
        if !sink(Piece { text: &text[..cut], continues, at })? {
            return Ok(false);
        }
        continues = true;
        text = &text[cut..];
    }
    Ok(true)
}

/// Passes on a plain text file; returns why it is not text, if it is not.
fn read_plain(
    file: &mut dyn BufRead,
    source: &Source<'_>,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<Option<&'static str>, DataError> {
    let mut buffer = Vec::with_capacity(PIECE_BYTES);
    let mut continues = false;
    let mut line = 1;
    loop {
        let want = PIECE_BYTES - buffer.len();
        let got = file.take(want as u64).read_to_end(&mut buffer).map_err(|error| source.read_error(error))?;
        let at_end = got < want;
        let text = match std::str::from_utf8(&buffer) {
            Ok(text) => text,
            // A character cut by the end of the window is completed by the next read.
            Err(error) if error.error_len().is_none() && !at_end => {
                // Can't fail: this prefix is known to be valid.
                std::str::from_utf8(&buffer[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => return Ok(Some("is not UTF-8 text; if it is text, convert it with iconv")),
        };
        if text.as_bytes().contains(&0) {
            return Ok(Some("holds a NUL byte, so it is not text"));
        }
        let cut = if at_end { text.len() } else { cut_point(text) };
        if cut > 0 && !sink(Piece { text: &text[..cut], continues, at: At::Line(line) })? {
            return Ok(None);
        }
        line += text.as_bytes()[..cut].iter().filter(|&&byte| byte == b'\n').count() as u64;
        continues |= cut > 0;
        if at_end {
            return Ok(None);
        }
        buffer.drain(..cut);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{
        data::columns::tests::write_parquet,
        error::{Explain, Kind},
    };

    pub(in crate::data) const TEXT: Wanted<'static> = Wanted { field: "text", skip_bad_records: false, chats: false };

    /// Whole documents, joined from their pieces; checks the properties of every piece.
    pub(in crate::data) fn documents(path: &Path) -> Result<Vec<String>, DataError> {
        let mut documents: Vec<String> = Vec::new();
        let outcome = read(path, path.to_str().unwrap(), &TEXT, &mut |piece| {
            assert!(!piece.text.is_empty() && piece.text.len() <= PIECE_BYTES);
            match documents.last_mut() {
                Some(document) if piece.continues => document.push_str(piece.text),
                _ => {
                    assert!(!piece.continues);
                    documents.push(piece.text.to_owned());
                }
            }
            Ok(true)
        })?;
        match outcome {
            Outcome::Done(_) => Ok(documents),
            Outcome::Skipped(reason) => Err(DataError::Input { input: "skipped".into(), reason }),
        }
    }

    fn write(dir: &Path, name: &str, body: impl AsRef<[u8]>) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, body).unwrap();
        path
    }

    #[test]
    fn a_text_file_is_one_document_however_long() {
        let dir = tempfile::tempdir().unwrap();
        let crab = "\u{1f980}";
        for text in [
            "short".to_owned(),
            "line\n".repeat(40_000),
            "word ".repeat(40_000),
            "x".repeat(3 * PIECE_BYTES),
            format!("x{}", crab.repeat(PIECE_BYTES)),
            format!("\n{}", "y".repeat(2 * PIECE_BYTES)),
            format!("{}\n", "z".repeat(PIECE_BYTES - 1)),
        ] {
            let path = write(dir.path(), "a.rs", &text);
            assert!(documents(&path).unwrap() == [text.clone()], "{:?}…", text.chars().take(9).collect::<String>());
            let line = serde_json::to_string(&serde_json::json!({ "text": text })).unwrap();
            assert!(documents(&write(dir.path(), "a.jsonl", line)).unwrap() == [text]);
        }
        assert!(documents(&write(dir.path(), "empty.txt", "")).unwrap().is_empty());
        // The mark that some editors put in front is not text.
        assert_eq!(documents(&write(dir.path(), "bom.txt", "\u{feff}text")).unwrap(), ["text"]);
        assert!(documents(&write(dir.path(), "bom.txt", "\u{feff}")).unwrap().is_empty());
    }

    #[test]
    fn long_text_is_cut_at_line_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "a.txt", "0123456\n".repeat(30_000) + "end");
        let mut pieces = Vec::new();
        read(&path, "a.txt", &TEXT, &mut |piece| {
            pieces.push(piece.text.to_owned());
            Ok(true)
        })
        .unwrap();
        let mut places = Vec::new();
        read(&path, "a.txt", &TEXT, &mut |piece| {
            places.push(piece.at.behind("a\nb", "a.txt"));
            Ok(true)
        })
        .unwrap();
        let lines = |pieces: &[String]| pieces.iter().map(|text| text.matches('\n').count()).sum::<usize>();
        let expected: Vec<String> = (0..pieces.len()).map(|at| format!("a.txt:{}", lines(&pieces[..at]) + 2)).collect();
        assert_eq!(places, expected, "places are told by the lines of the file");
        let (last, others) = pieces.split_last().unwrap();
        assert!(others.len() >= 3 && others.iter().all(|piece| piece.ends_with('\n')) && last.ends_with("end"));
    }

    #[test]
    fn a_file_that_is_not_text_is_skipped_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut late = "good\n".repeat(100_000).into_bytes();
        late.push(0xff);
        let cut = "abc\u{1f980}".as_bytes()[..5].to_vec();
        for body in [b"\xff\xfeutf16".to_vec(), b"a\0b".to_vec(), late, cut] {
            let mut given = 0;
            let path = write(dir.path(), "a.bin", body);
            let outcome = read(&path, "a.bin", &TEXT, &mut |_| {
                given += 1;
                Ok(true)
            });
            assert!(matches!(outcome, Ok(Outcome::Skipped(_))) && given == 0);
        }
        assert!(documents(&write(dir.path(), "a.txt.xz", "x")).unwrap_err().to_string().contains("compressed"));
    }

    #[test]
    fn each_json_line_gives_its_text_field() {
        let dir = tempfile::tempdir().unwrap();
        let body =
            "{\"text\": \"one\\nline\", \"n\": 1}\n\n{\"text\": null}\r\n{\"text\": \"\"}\n{\"text\": \"tw\u{f6}\"}";
        assert_eq!(documents(&write(dir.path(), "a.jsonl", body)).unwrap(), ["one\nline", "tw\u{f6}"]);
        for (bad, said) in [
            ("{\"text\": \"ok\"}\n{\"text\"", "b.ndjson:2"),
            ("[1]", "not a JSON object"),
            ("{\"text\": 5}", "is not a string"),
            ("{\"body\": \"x\"}", "has no field \"text\" but [\"body\"]"),
        ] {
            let error = documents(&write(dir.path(), "b.ndjson", bad)).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
            assert_eq!(error.kind(), Kind::Config);
        }
        let error = documents(&write(dir.path(), "b.ndjson", b"{\"text\": \"\xff\"}")).unwrap_err();
        assert!(error.to_string().contains("b.ndjson:1"), "{error}");
    }

    #[test]
    fn a_reader_that_has_enough_gets_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let parquet = dir.path().join("a.parquet");
        write_parquet(&parquet, &[&[Some(b"one"), Some(b"two")], &[Some(b"three")]]);
        let lines = "{\"text\": \"one\"}\n".repeat(9);
        for path in
            [parquet, write(dir.path(), "a.txt", "x\n".repeat(PIECE_BYTES)), write(dir.path(), "a.jsonl", lines)]
        {
            let mut given = 0;
            read(&path, path.to_str().unwrap(), &TEXT, &mut |_| {
                given += 1;
                Ok(false)
            })
            .unwrap();
            assert_eq!(given, 1, "{}", path.display());
        }
    }
}
