//! Chats in a Parquet file: the columns `messages` and `tools`, as data sets of Hugging Face have them, each row as the
//! JSON record that it would be in a file of records.
//!
//! A column gives every message the same fields: what a message lacks is null there. So a null field of a structure, at
//! any depth, is no field; a null in a list stays. `messages` and `tools` may also be texts that hold JSON, which is
//! how tools of different parameters fit one column.

use std::{
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use parquet::{
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row, reader::RowIter},
    schema::types::Type,
};
use serde::de::IgnoredAny;

use super::{
    DataError,
    chat::{MESSAGES, TOOLS},
    documents::{At, Notes, Piece, Wanted},
    records::MAX_RECORD_BYTES,
};
use crate::format::pages;

/// The deepest nesting of columns that is read: data sets in use have a third.
const DEEPEST: usize = 32;

/// Passes on the chats of a Parquet file, each whole.
pub(super) fn read(
    file: File,
    name: &str,
    wanted: &Wanted<'_>,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<Notes, DataError> {
    let invalid = |reason: String| DataError::Input { input: name.to_owned(), reason };
    let no_parquet = |said: &dyn std::fmt::Display| DataError::Broken {
        input: name.to_owned(),
        reason: format!("can't be read as Parquet: {said}"),
    };
    let broken = |error: ParquetError| no_parquet(&error);
    let looked_at = file.try_clone().map_err(|error| invalid(format!("can't be read: {error}")))?;
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let mut notes = Notes { records: true, ..Notes::default() };
    // A shard without rows may have no columns, either.
    if reader.metadata().file_metadata().num_rows() == 0 {
        return Ok(notes);
    }
    let columns = projection(reader.metadata().file_metadata().schema()).map_err(invalid)?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let mut leaves = Vec::new();
    for (at, column) in schema.columns().iter().enumerate() {
        let parts = column.path().parts();
        if parts.first().is_some_and(|first| first == MESSAGES || first == TOOLS) {
            if parts.len() > DEEPEST {
                return Err(invalid(format!("column {:?} is nested deeper than {DEEPEST} levels", parts[0])));
            }
            leaves.push(at);
        }
    }
    let mut row = 0_u64;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(broken)?;
        for &leaf in &leaves {
            pages::check(&looked_at, group.metadata().column(leaf)).map_err(|said| no_parquet(&said))?;
        }
        // The library panics on malformed bytes.
        let rows = || RowIter::from_row_group(Some(columns.clone()), group.as_ref());
        let rows = catch_unwind(AssertUnwindSafe(rows)).map_err(|_| no_parquet(&"its values are damaged"))?;
        let mut rows = rows.map_err(broken)?;
        loop {
            let next = catch_unwind(AssertUnwindSafe(|| rows.next()));
            let Some(next) = next.map_err(|_| no_parquet(&"its values are damaged"))? else { break };
            let next = next.map_err(broken)?;
            row += 1;
            match record(next) {
                Ok(text) => {
                    notes.documents += 1;
                    if !sink(Piece { text: &text, continues: false, at: At::Row(row) })? {
                        return Ok(notes);
                    }
                }
                Err(reason) if wanted.skip_bad_records => notes.bad_record(&format!("{name}, row {row}: {reason}")),
                Err(reason) => return Err(DataError::Input { input: format!("{name}, row {row}"), reason }),
            }
        }
    }
    Ok(notes)
}

/// The columns that hold chats.
fn projection(schema: &Type) -> Result<Type, String> {
    let fields = schema.get_fields();
    let fields = fields.iter().filter(|field| [MESSAGES, TOOLS].contains(&field.name()));
    let fields: Vec<Arc<Type>> = fields.cloned().collect();
    if fields.iter().all(|field| field.name() != MESSAGES) {
        let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).take(20).collect();
        return Err(format!(
            "has no column {MESSAGES:?} but {names:?}; a chat is a list of messages, each with a role and a content: \
             rename or convert the column"
        ));
    }
    let of_messages = Type::group_type_builder(schema.name()).with_fields(fields).build();
    of_messages.map_err(|error| format!("can't be read as Parquet: {error}"))
}

/// A row as a JSON record.
fn record(row: Row) -> Result<String, String> {
    let mut text = String::from("{");
    for (name, field) in row.into_columns() {
        match field {
            Field::Null => continue,
            Field::Str(json) => {
                serde_json::from_str::<IgnoredAny>(&json)
                    .map_err(|error| format!("has a text in column {name:?} that is not JSON: {error}"))?;
                key(&mut text, &name);
                text.push_str(&json);
            }
            field => {
                key(&mut text, &name);
                write(&field, &mut text).map_err(|reason| format!("column {name:?} {reason}"))?;
            }
        }
    }
    text.push('}');
    Ok(text)
}

/// Begins a field of the object that `text` ends in.
fn key(text: &mut String, name: &str) {
    if !text.ends_with('{') {
        text.push(',');
    }
    string(text, name);
    text.push(':');
}

fn string(text: &mut String, value: &str) {
    text.push_str(&serde_json::Value::from(value).to_string());
}

/// Writes a value as JSON.
fn write(field: &Field, text: &mut String) -> Result<(), String> {
    if text.len() > MAX_RECORD_BYTES {
        return Err(format!("is longer than {} MiB", MAX_RECORD_BYTES >> 20));
    }
    let mut number = |value: &dyn std::fmt::Display| text.push_str(&value.to_string());
    match field {
        Field::Null => text.push_str("null"),
        Field::Bool(value) => number(value),
        Field::Byte(value) => number(value),
        Field::Short(value) => number(value),
        Field::Int(value) => number(value),
        Field::Long(value) => number(value),
        Field::UByte(value) => number(value),
        Field::UShort(value) => number(value),
        Field::UInt(value) => number(value),
        Field::ULong(value) => number(value),
        Field::Float(value) => float(serde_json::Number::from_f64(f64::from(*value)), text)?,
        Field::Double(value) => float(serde_json::Number::from_f64(*value), text)?,
        Field::Str(value) => string(text, value),
        Field::Group(row) => {
            text.push('{');
            for (name, value) in row.get_column_iter().filter(|(_, value)| !matches!(value, Field::Null)) {
                key(text, name);
                write(value, text)?;
            }
            text.push('}');
        }
        Field::ListInternal(list) => {
            text.push('[');
            for (number, value) in list.elements().iter().enumerate() {
                if number > 0 {
                    text.push(',');
                }
                write(value, text)?;
            }
            text.push(']');
        }
        Field::MapInternal(map) => {
            text.push('{');
            for (name, value) in map.entries().iter().filter(|(_, value)| !matches!(value, Field::Null)) {
                let Field::Str(name) = name else { return Err("has a map whose keys are no texts".into()) };
                key(text, name);
                write(value, text)?;
            }
            text.push('}');
        }
        other => return Err(format!("has a value that JSON has no form for: {other}")),
    }
    Ok(())
}

fn float(value: Option<serde_json::Number>, text: &mut String) -> Result<(), String> {
    text.push_str(&value.ok_or("has a number that is not finite")?.to_string());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use parquet::{
        data_type::{ByteArray, ByteArrayType, Int32Type},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };
    use serde_json::{Value, json};

    use super::*;
    use crate::data::documents::{self, Outcome};

    const CHATS: Wanted<'static> = Wanted { field: MESSAGES, skip_bad_records: false, chats: true };

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat").join(name)
    }

    fn records(path: &Path, wanted: &Wanted<'_>) -> Result<(Vec<String>, Notes), DataError> {
        let mut records = Vec::new();
        let outcome = documents::read(path, "a.parquet", wanted, &mut |piece| {
            assert!(!piece.continues && piece.at == At::Row(records.len() as u64 + 1), "{:?}", piece.at);
            records.push(piece.text.to_owned());
            Ok(true)
        })?;
        let Outcome::Done(notes) = outcome else { panic!("{outcome:?}") };
        Ok((records, notes))
    }

    #[test]
    fn a_file_of_pyarrow_gives_the_records_that_it_was_made_from() {
        let (found, notes) = records(&fixture("chats.parquet"), &CHATS).unwrap();
        let mut corpus: Value = serde_json::from_slice(&std::fs::read(fixture("chats.json")).unwrap()).unwrap();
        let chats = corpus["chats"].as_object_mut().unwrap();
        let call = &mut chats["calls"]["messages"][1];
        call["tool_calls"][0]["function"]["arguments"].as_object_mut().unwrap().remove("a");
        call.as_object_mut().unwrap().remove("content");
        assert_eq!(notes, Notes { records: true, documents: chats.len() as u64, ..Notes::default() });
        let mut expected: Vec<&Value> = chats.values().collect();
        for record in &found {
            let record: Value = serde_json::from_str(record).unwrap();
            let at = expected.iter().position(|chat| **chat == record);
            expected.remove(at.unwrap_or_else(|| panic!("{record}")));
        }
        assert!(expected.is_empty(), "{expected:?}");
        // A template may print a message: its fields are in the order of the columns.
        assert!(found[0].starts_with("{\"messages\":[{\"role\":\"user\",\"content\":\"How many"), "{}", found[0]);
        let stopped = documents::read(&fixture("chats.parquet"), "x", &CHATS, &mut |_| Ok(false)).unwrap();
        assert_eq!(stopped, Outcome::Done(Notes { records: true, documents: 1, ..Notes::default() }));
    }

    /// A file of text columns without levels of their own.
    fn write_texts(path: &Path, columns: &[(&str, &[Option<&str>])]) {
        let fields: String = columns.iter().map(|(name, _)| format!("optional binary {name} (UTF8); ")).collect();
        let schema = Arc::new(parse_message_type(&format!("message rows {{ {fields} }}")).unwrap());
        let file = File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::default())).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for (_, rows) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
            let values: Vec<ByteArray> = rows.iter().flatten().map(|text| ByteArray::from(*text)).collect();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn texts_that_hold_json_are_read_and_others_are_bad_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let good = r#"[{"role": "user", "content": "a"}]"#;
        write_texts(&path, &[("tools", &[None, Some("[]")]), ("messages", &[Some(good), Some(good)])]);
        let (found, _) = records(&path, &CHATS).unwrap();
        assert_eq!(found, [format!("{{\"messages\":{good}}}"), format!("{{\"tools\":[],\"messages\":{good}}}")]);

        write_texts(&path, &[("messages", &[Some("[]], \"x\": [1"), Some(good), None])]);
        let error = records(&path, &CHATS).unwrap_err().to_string();
        assert!(error.contains("a.parquet, row 1") && error.contains("\"messages\" that is not JSON"), "{error}");
        let mut rows = Vec::new();
        let skip = Wanted { skip_bad_records: true, ..CHATS };
        let outcome = documents::read(&path, "a.parquet", &skip, &mut |piece| {
            rows.push((piece.at, piece.text.to_owned()));
            Ok(true)
        });
        let Ok(Outcome::Done(notes)) = outcome else { panic!("{outcome:?}") };
        assert_eq!(notes.bad_records, 1);
        // The row without messages is refused later, as a record without them is.
        assert_eq!(rows, [(At::Row(2), format!("{{\"messages\":{good}}}")), (At::Row(3), "{}".into())]);

        write_texts(&path, &[("conversations", &[Some("x")]), ("id", &[None])]);
        let error = records(&path, &CHATS).unwrap_err().to_string();
        assert!(error.contains("no column \"messages\" but [\"conversations\", \"id\"]"), "{error}");
    }

    #[test]
    fn values_become_json_and_null_fields_are_none() {
        let said = |field: Field| {
            let mut text = String::new();
            write(&field, &mut text).map(|()| text)
        };
        let row = Row::new(vec![
            ("a".into(), Field::Null),
            ("b\"".into(), Field::Long(-7)),
            ("c".into(), Field::Double(1.5e-7)),
            ("d".into(), Field::Group(Row::new(vec![("e".into(), Field::Null)]))),
            ("f".into(), Field::Str("x\n\u{1f980}".into())),
            ("h".into(), Field::ULong(u64::MAX)),
            ("i".into(), Field::Float(0.5)),
            ("j".into(), Field::Bool(true)),
        ]);
        let found: Value = serde_json::from_str(&said(Field::Group(row)).unwrap()).unwrap();
        let expected =
            json!({"b\"": -7, "c": 1.5e-7, "d": {}, "f": "x\n\u{1f980}", "h": u64::MAX, "i": 0.5, "j": true});
        assert_eq!(found, expected);
        assert!(said(Field::Double(f64::NAN)).unwrap_err().contains("not finite"));
        assert!(said(Field::Bytes(ByteArray::from("x"))).unwrap_err().contains("no form"));
    }

    /// One message with a map and a list, which both hold a null.
    #[test]
    fn a_null_in_a_list_stays_and_one_in_a_map_is_none() {
        const SCHEMA: &str = "message rows { optional group messages (LIST) { repeated group list {
            optional group element {
                optional binary role (UTF8);
                optional group m (MAP) { repeated group key_value {
                    required binary key (UTF8); optional int32 value; } }
                optional group l (LIST) { repeated group list { optional int32 element; } } } } } }";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::default())).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts: [(&[&str], &[i16], &[i16]); 2] = [(&["user"], &[4], &[0]), (&["k", "j"], &[5, 5], &[0, 2])];
        for (values, full, again) in texts {
            let values: Vec<ByteArray> = values.iter().map(|text| ByteArray::from(*text)).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(full), Some(again)).unwrap();
            column.close().unwrap();
        }
        for value in [1, 2] {
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int32Type>().write_batch(&[value], Some(&[5, 6]), Some(&[0, 2])).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        let (found, _) = records(&path, &CHATS).unwrap();
        assert_eq!(found, [r#"{"messages":[{"role":"user","m":{"j":1},"l":[null,2]}]}"#]);
    }

    #[test]
    fn a_wrong_byte_is_an_error_or_another_record_and_never_worse() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let good = std::fs::read(fixture("chats.parquet")).unwrap();
        let mut refused = 0;
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= [0x01, 0x80, 0xff][at % 3];
            std::fs::write(&path, &bytes).unwrap();
            refused += u32::from(documents::read(&path, "a.parquet", &CHATS, &mut |_| Ok(true)).is_err());
        }
        assert!(refused > 100, "{refused} of {} files were refused", good.len());
    }
}
