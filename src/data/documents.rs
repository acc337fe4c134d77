//! The documents in a file, as text.
//!
//! The ending of its name says what a file holds: `.jsonl` and `.ndjson` a JSON object a line with a text field,
//! `.parquet` a string column, everything else plain text, one document a file.
//!
//! A document reaches the caller in pieces of at most [`PIECE_BYTES`], cut at line ends where there are any: memory stays
//! bounded on a file of any size, and the tokenizer, whose cost grows faster than its input, gets short ones.
//!
//! What can't be text is told apart from what is broken: a plain file that is not UTF-8 or holds a NUL byte (an image
//! in a source tree) is skipped whole and reported; a broken JSON line or a missing field is an error that names the line,
//! since dropping it would silently train on less than was asked for.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use parquet::{
    basic::Type as PhysicalType,
    column::reader::ColumnReader,
    file::reader::{FileReader, SerializedFileReader},
};

use super::DataError;

/// The longest piece of a document, bytes.
pub(super) const PIECE_BYTES: usize = 64 << 10;
/// The longest line of JSON that is believed.
const MAX_LINE_BYTES: u64 = 1 << 30;
/// Rows of a Parquet column decoded at once.
const PARQUET_ROWS: usize = 256;

/// A piece of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    /// Not empty.
    pub text: &'a str,
    /// It carries on the document of the piece before.
    pub continues: bool,
}

/// What became of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Read, as far as the caller wanted.
    Done,
    /// Left out whole, for this reason.
    Skipped(&'static str),
}

/// Gives the documents of the local file `path` to `sink`, which answers whether it wants more.
pub(super) fn read(
    path: &Path,
    name: &str,
    text_field: &str,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<Outcome, DataError> {
    let ending = name.rsplit(['/', '.']).next().unwrap_or_default().to_ascii_lowercase();
    let open = || File::open(path).map_err(|source| DataError::Io { doing: "open", path: path.to_owned(), source });
    match ending.as_str() {
        "jsonl" | "ndjson" => read_json_lines(open()?, name, text_field, sink)?,
        "parquet" => read_parquet(open()?, name, text_field, sink)?,
        "gz" | "zst" | "xz" | "bz2" | "zip" => {
            return Ok(Outcome::Skipped("is compressed; unpack it first"));
        }
        _ => {
            // Read twice, so that a file which turns out not to be text gives nothing at all. The second time it comes
            // from the page cache.
            if let Some(reason) = read_plain(&mut open()?, path, &mut |_| Ok(true))? {
                return Ok(Outcome::Skipped(reason));
            }
            if let Some(reason) = read_plain(&mut open()?, path, sink)? {
                return Err(DataError::Input {
                    input: name.to_owned(),
                    reason: format!("changed while read: {reason}"),
                });
            }
        }
    }
    Ok(Outcome::Done)
}

/// Where to cut `text`, which goes on: after the last line, else before the last space, else at its end. Not 0.
fn cut_point(text: &str) -> usize {
    match text.rfind('\n') {
        Some(newline) => newline + 1,
        None => text.rfind(' ').filter(|&space| space > 0).unwrap_or(text.len()),
    }
}

/// The pieces of a document that is in memory; `false` if the sink has enough.
fn give_document(
    mut text: &str,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<bool, DataError> {
    let mut continues = false;
    while !text.is_empty() {
        let cut = if text.len() <= PIECE_BYTES {
            text.len()
        } else {
            // Ends: a character has at most four bytes.
            let window = (0..=PIECE_BYTES).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            cut_point(&text[..window])
        };
        if !sink(Piece { text: &text[..cut], continues })? {
            return Ok(false);
        }
        continues = true;
        text = &text[cut..];
    }
    Ok(true)
}

/// Gives a plain text file; answers why it is not text, if it is not.
fn read_plain(
    file: &mut impl Read,
    path: &Path,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<Option<&'static str>, DataError> {
    let mut buffer = Vec::with_capacity(PIECE_BYTES);
    let mut continues = false;
    loop {
        let want = PIECE_BYTES - buffer.len();
        let got = file.by_ref().take(want as u64).read_to_end(&mut buffer).map_err(|source| DataError::Io {
            doing: "read",
            path: path.to_owned(),
            source,
        })?;
        let at_end = got < want;
        let text = match std::str::from_utf8(&buffer) {
            Ok(text) => text,
            // A character cut by the end of the window is completed by the next read.
            Err(error) if error.error_len().is_none() && !at_end => {
                // Can't fail: this prefix was found valid.
                std::str::from_utf8(&buffer[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => return Ok(Some("is not UTF-8 text")),
        };
        if text.as_bytes().contains(&0) {
            return Ok(Some("holds a NUL byte, so it is not text"));
        }
        let cut = if at_end { text.len() } else { cut_point(text) };
        if cut > 0 && !sink(Piece { text: &text[..cut], continues })? {
            return Ok(None);
        }
        continues |= cut > 0;
        if at_end {
            return Ok(None);
        }
        buffer.drain(..cut);
    }
}

fn read_json_lines(
    file: File,
    name: &str,
    field: &str,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<(), DataError> {
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut line = Vec::new();
    for number in 1_u64.. {
        let invalid = |reason: String| DataError::Input { input: format!("{name}:{number}"), reason };
        line.clear();
        let got = reader
            .by_ref()
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(|source| DataError::Io { doing: "read", path: PathBuf::from(name), source })?;
        if got == 0 {
            break;
        }
        if got as u64 == MAX_LINE_BYTES {
            return Err(invalid(format!("is longer than {MAX_LINE_BYTES} bytes")));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&line).map_err(|error| invalid(format!("is not a JSON object: {error}")))?;
        match value.get(field) {
            Some(serde_json::Value::String(text)) => {
                if !give_document(text, sink)? {
                    break;
                }
            }
            Some(serde_json::Value::Null) => {}
            Some(_) => return Err(invalid(format!("field {field:?} is not a string"))),
            None => {
                let fields: Vec<&str> = value.keys().map(String::as_str).take(20).collect();
                return Err(invalid(format!(
                    "has no field {field:?} but {fields:?}; name the right one with --text-field"
                )));
            }
        }
    }
    Ok(())
}

fn read_parquet(
    file: File,
    name: &str,
    field: &str,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<(), DataError> {
    let invalid = |reason: String| DataError::Input { input: name.to_owned(), reason };
    let broken = |error: parquet::errors::ParquetError| invalid(format!("can't be read as Parquet: {error}"));
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let Some((column, descriptor)) =
        schema.columns().iter().enumerate().find(|(_, column)| column.path().string() == field)
    else {
        let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).take(20).collect();
        return Err(invalid(format!("has no column {field:?} but {names:?}; name the right one with --text-field")));
    };
    if descriptor.physical_type() != PhysicalType::BYTE_ARRAY || descriptor.max_rep_level() != 0 {
        return Err(invalid(format!("column {field:?} is not a column of single strings")));
    }
    let mut row = 0_u64;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(broken)?;
        let ColumnReader::ByteArrayColumnReader(mut column) = group.get_column_reader(column).map_err(broken)? else {
            return Err(invalid(format!("column {field:?} does not hold byte arrays")));
        };
        let (mut values, mut levels) = (Vec::with_capacity(PARQUET_ROWS), Vec::with_capacity(PARQUET_ROWS));
        loop {
            values.clear();
            levels.clear();
            let (rows, _, _) =
                column.read_records(PARQUET_ROWS, Some(&mut levels), None, &mut values).map_err(broken)?;
            if rows == 0 {
                break;
            }
            for value in &values {
                let text = std::str::from_utf8(value.data())
                    .map_err(|_| invalid(format!("column {field:?} is not UTF-8 near row {row}")))?;
                if !give_document(text, sink)? {
                    return Ok(());
                }
            }
            row += rows as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::{
        data_type::{ByteArray, ByteArrayType, Int64Type},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };

    use super::*;
    use crate::error::{Explain, Kind};

    /// Whole documents, joined from their pieces; checks what holds for every piece.
    fn documents(path: &Path) -> Result<Vec<String>, DataError> {
        let mut documents: Vec<String> = Vec::new();
        let outcome = read(path, path.to_str().unwrap(), "text", &mut |piece| {
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
            Outcome::Done => Ok(documents),
            Outcome::Skipped(reason) => Err(DataError::Input { input: "skipped".into(), reason: reason.into() }),
        }
    }

    fn write(dir: &Path, name: &str, body: impl AsRef<[u8]>) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, body).unwrap();
        path
    }

    fn write_parquet(path: &Path, groups: &[&[Option<&[u8]>]]) {
        let schema = "message rows { required int64 id; optional binary text (UTF8); repeated binary tags (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::default())).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            let ids: Vec<i64> = (0..rows.len() as i64).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
            let values: Vec<ByteArray> = rows.iter().flatten().map(|text| ByteArray::from(text.to_vec())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
            let none = vec![0_i16; rows.len()];
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&[], Some(&none), Some(&none)).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
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
    }

    #[test]
    fn long_text_is_cut_at_line_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "a.txt", "0123456\n".repeat(30_000) + "end");
        let mut pieces = Vec::new();
        read(&path, "a.txt", "text", &mut |piece| {
            pieces.push(piece.text.to_owned());
            Ok(true)
        })
        .unwrap();
        let (last, others) = pieces.split_last().unwrap();
        assert!(others.len() >= 3 && others.iter().all(|piece| piece.ends_with('\n')) && last.ends_with("end"));
    }

    #[test]
    fn what_is_not_text_is_skipped_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut late = "good\n".repeat(100_000).into_bytes();
        late.push(0xff);
        let cut = "abc\u{1f980}".as_bytes()[..5].to_vec();
        for body in [b"\xff\xfeutf16".to_vec(), b"a\0b".to_vec(), late, cut] {
            let mut given = 0;
            let path = write(dir.path(), "a.bin", body);
            let outcome = read(&path, "a.bin", "text", &mut |_| {
                given += 1;
                Ok(true)
            });
            assert!(matches!(outcome, Ok(Outcome::Skipped(_))) && given == 0);
        }
        assert!(documents(&write(dir.path(), "a.json.gz", "x")).unwrap_err().to_string().contains("compressed"));
    }

    #[test]
    fn json_lines_give_their_text_field() {
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
    fn parquet_gives_its_text_column() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let many: Vec<String> = (0..1000).map(|n| format!("row {n}")).collect();
        let first: Vec<Option<&[u8]>> =
            many.iter().enumerate().map(|(n, text)| (n % 3 != 0).then_some(text.as_bytes())).collect();
        write_parquet(&path, &[&first, &[None], &[Some(b""), Some("l\u{f6}st".as_bytes())]]);
        let mut expected: Vec<String> =
            many.iter().enumerate().filter(|(n, _)| n % 3 != 0).map(|(_, t)| t.clone()).collect();
        expected.push("l\u{f6}st".into());
        assert_eq!(documents(&path).unwrap(), expected);

        let error_for = |field: &str| read(&path, "a.parquet", field, &mut |_| Ok(true)).unwrap_err().to_string();
        assert!(error_for("body").contains("has no column \"body\" but [\"id\", \"text\", \"tags\"]"));
        assert!(error_for("id").contains("not a column of single strings"));
        assert!(error_for("tags").contains("not a column of single strings"));

        write_parquet(&path, &[&[Some(b"\xff")]]);
        assert!(documents(&path).unwrap_err().to_string().contains("not UTF-8"));
        for broken in [b"PAR1".to_vec(), b"PAR1\xff\xff\xff\x7fPAR1".to_vec(), vec![], vec![7; 5000]] {
            std::fs::write(&path, broken).unwrap();
            assert!(documents(&path).unwrap_err().to_string().contains("can't be read as Parquet"));
        }
    }

    #[test]
    fn a_reader_that_has_enough_is_given_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let parquet = dir.path().join("a.parquet");
        write_parquet(&parquet, &[&[Some(b"one"), Some(b"two")], &[Some(b"three")]]);
        let lines = "{\"text\": \"one\"}\n".repeat(9);
        for path in
            [parquet, write(dir.path(), "a.txt", "x\n".repeat(PIECE_BYTES)), write(dir.path(), "a.jsonl", lines)]
        {
            let mut given = 0;
            read(&path, path.to_str().unwrap(), "text", &mut |_| {
                given += 1;
                Ok(false)
            })
            .unwrap();
            assert_eq!(given, 1, "{}", path.display());
        }
    }
}
