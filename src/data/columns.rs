//! The text column of a Parquet file.

use std::{
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
};

use parquet::{
    basic::{LogicalType, Type as PhysicalType},
    column::reader::ColumnReader,
    file::reader::{FileReader, SerializedFileReader},
};

use super::{
    DataError,
    documents::{At, Notes, Piece, Wanted, give_document},
    records::chat,
};
use crate::format::pages;

/// Rows decoded at once.
const ROWS: usize = 256;

/// Passes on the documents of a Parquet file.
pub(super) fn read(
    file: File,
    name: &str,
    wanted: &Wanted<'_>,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<bool, DataError>,
) -> Result<Notes, DataError> {
    let field = wanted.field;
    let invalid = |reason: String| DataError::Input { input: name.to_owned(), reason };
    let no_parquet = |said: &dyn std::fmt::Display| DataError::Broken {
        input: name.to_owned(),
        reason: format!("can't be read as Parquet: {said}"),
    };
    let broken = |error: parquet::errors::ParquetError| no_parquet(&error);
    let looked_at = file.try_clone().map_err(|error| invalid(format!("can't be read: {error}")))?;
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let mut notes = Notes { records: true, ..Notes::default() };
    // A shard without rows may have no columns, either.
    if reader.metadata().file_metadata().num_rows() == 0 {
        return Ok(notes);
    }
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let Some((column, descriptor)) =
        schema.columns().iter().enumerate().find(|(_, column)| column.path().string() == field)
    else {
        let first = |column: &str| column.split('.').next().unwrap_or_default().to_owned();
        let firsts: Vec<String> = schema.columns().iter().map(|column| first(&column.path().string())).collect();
        if let Some(of_chats) = ["messages", "conversations"].into_iter().find(|of| firsts.iter().any(|is| is == of)) {
            return Err(invalid(chat(of_chats)));
        }
        let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).take(20).collect();
        return Err(invalid(format!("has no column {field:?} but {names:?}; name the right one with --text-field")));
    };
    if descriptor.physical_type() != PhysicalType::BYTE_ARRAY || descriptor.max_rep_level() != 0 {
        // A shard in which no row has a text may give the column another type, or none.
        let all_null = matches!(descriptor.logical_type_ref(), Some(LogicalType::Unknown))
            || reader.metadata().row_groups().iter().all(|group| {
                let chunk = group.column(column);
                let nulls = chunk.statistics().and_then(|statistics| statistics.null_count_opt());
                nulls.is_some_and(|nulls| i64::try_from(nulls) == Ok(chunk.num_values()))
            });
        if all_null && descriptor.max_rep_level() == 0 {
            return Ok(notes);
        }
        return Err(invalid(format!("column {field:?} is not a column of single strings")));
    }
    let mut row = 0_u64;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(broken)?;
        pages::check(&looked_at, group.metadata().column(column)).map_err(|said| no_parquet(&said))?;
        let ColumnReader::ByteArrayColumnReader(mut column) = group.get_column_reader(column).map_err(broken)? else {
            return Err(invalid(format!("column {field:?} does not hold byte arrays")));
        };
        let (mut values, mut levels) = (Vec::with_capacity(ROWS), Vec::with_capacity(ROWS));
        loop {
            values.clear();
            levels.clear();
            let read = || column.read_records(ROWS, Some(&mut levels), None, &mut values);
            // The library panics on malformed bytes.
            let read = catch_unwind(AssertUnwindSafe(read)).map_err(|_| no_parquet(&"its values are damaged"))?;
            let (rows, _, _) = read.map_err(broken)?;
            if rows == 0 {
                break;
            }
            // The rows that have a value; without levels, all.
            let full = descriptor.max_def_level();
            let filled = (0..rows).filter(|&at| full == 0 || levels.get(at).is_none_or(|&level| level == full));
            for (value, at) in values.iter().zip(filled) {
                let row = row + at as u64 + 1;
                let Ok(text) = std::str::from_utf8(value.data()) else {
                    let reason = format!("column {field:?} is not UTF-8");
                    if wanted.skip_bad_records {
                        notes.bad_record(&format!("{name}, row {row}: {reason}"));
                        continue;
                    }
                    return Err(DataError::Input { input: format!("{name}, row {row}"), reason });
                };
                notes.documents += u64::from(!text.is_empty());
                if !give_document(text, At::Row(row), sink)? {
                    return Ok(notes);
                }
            }
            row += rows as u64;
        }
    }
    Ok(notes)
}

#[cfg(test)]
pub(super) mod tests {
    use std::{path::Path, sync::Arc};

    use parquet::{
        data_type::{ByteArray, ByteArrayType, Int32Type, Int64Type},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };

    use super::*;
    use crate::data::documents::{
        self, Outcome,
        tests::{TEXT, documents},
    };

    pub(in crate::data) fn write_parquet(path: &Path, groups: &[&[Option<&[u8]>]]) {
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

        let error_for = |field: &str| {
            let wanted = Wanted { field, ..TEXT };
            documents::read(&path, "a.parquet", &wanted, &mut |_| Ok(true)).unwrap_err().to_string()
        };
        assert!(error_for("body").contains("has no column \"body\" but [\"id\", \"text\", \"tags\"]"));
        assert!(error_for("id").contains("not a column of single strings"));
        assert!(error_for("tags").contains("not a column of single strings"));

        write_parquet(&path, &[&[Some(b"\xff")]]);
        assert!(documents(&path).unwrap_err().to_string().contains("a.parquet, row 1: column \"text\" is not UTF-8"));
        for broken in [b"PAR1".to_vec(), b"PAR1\xff\xff\xff\x7fPAR1".to_vec(), vec![], vec![7; 5000]] {
            std::fs::write(&path, broken).unwrap();
            assert!(documents(&path).unwrap_err().to_string().contains("can't be read as Parquet"));
        }
    }

    fn notes(path: &Path, wanted: &Wanted<'_>) -> Notes {
        let outcome = documents::read(path, "a.parquet", wanted, &mut |_| Ok(true)).unwrap();
        let Outcome::Done(notes) = outcome else { panic!("{outcome:?}") };
        notes
    }

    #[test]
    fn a_shard_without_a_text_gives_no_documents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        // All null, as a text and as the type that writers choose without a hint; no rows; not even columns.
        write_parquet(&path, &[&[None, None, None]]);
        assert_eq!(notes(&path, &TEXT), Notes { records: true, ..Notes::default() });
        for schema in ["message rows { optional int32 text (UNKNOWN); }", "message rows { optional int32 text; }"] {
            let schema = Arc::new(parse_message_type(schema).unwrap());
            let file = File::create(&path).unwrap();
            let mut writer = SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::default())).unwrap();
            let mut group = writer.next_row_group().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int32Type>().write_batch(&[], Some(&[0, 0, 0]), None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
            writer.close().unwrap();
            assert_eq!(notes(&path, &TEXT), Notes { records: true, ..Notes::default() });
        }
        write_parquet(&path, &[]);
        assert_eq!(notes(&path, &TEXT).documents, 0);
        assert_eq!(notes(&path, &Wanted { field: "absent", ..TEXT }).documents, 0);
    }

    #[test]
    fn bad_rows_are_skipped_on_request_and_first_bytes_decide_the_type() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        write_parquet(&path, &[&[None, Some(b"one"), Some(b"\xff"), Some(b"two")]]);
        let error = documents(&path).unwrap_err().to_string();
        assert!(error.contains("blob, row 3"), "{error}");
        let many = vec![Some(&b"x"[..]); ROWS + 1];
        write_parquet(&path, &[&many, &[None, Some(b"\xff")]]);
        let error = documents(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("blob, row {}", ROWS + 3)), "rows are counted over the whole file: {error}");
        write_parquet(&path, &[&[None, Some(b"one"), Some(b"\xff"), Some(b"two")]]);
        let skip = Wanted { skip_bad_records: true, ..TEXT };
        let notes = notes(&path, &skip);
        assert!(notes.documents == 2 && notes.bad_records == 1 && notes.bad.unwrap().contains("row 3"));
    }

    #[test]
    fn a_shard_of_conversations_is_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let schema = "message rows { repeated group messages { optional binary role (UTF8); } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::default())).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[ByteArray::from("user")], Some(&[2]), Some(&[0])).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let error = documents(&path).unwrap_err().to_string();
        assert!(error.contains("conversation") && error.contains("messages"), "{error}");
    }

    #[test]
    fn a_wrong_byte_is_an_error_or_another_text_and_never_worse() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        write_parquet(&path, &[&[Some(b"one"), None, Some(b"two")], &[Some(b"one"), Some(b"three")]]);
        let good = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for at in 0..good.len() {
            for wrong in [0x01, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] ^= wrong;
                std::fs::write(&path, &bytes).unwrap();
                refused += u32::from(documents::read(&path, "a.parquet", &TEXT, &mut |_| Ok(true)).is_err());
            }
        }
        assert!(refused > 100, "{refused} of {} files were refused", 3 * good.len());
    }
}
