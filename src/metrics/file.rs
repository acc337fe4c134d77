//! Rows as a Parquet file.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use parquet::{
    basic::{Compression, Encoding, LogicalType, Repetition, TimeUnit, Type as PhysicalType, ZstdLevel},
    column::reader::ColumnReader,
    data_type::{DoubleType, Int64Type},
    errors::ParquetError,
    file::{
        properties::{EnabledStatistics, WriterProperties},
        reader::{FileReader, SerializedFileReader},
        writer::SerializedFileWriter,
    },
    schema::types::{ColumnPath, Type, TypePtr},
};

use super::series::Series;
use crate::format::pages;

const STEP: &str = "step";
const GENERATION: &str = "generation";
const AT: &str = "at";

/// The most rows of one file that is read: three years of a step a second.
const MOST_ROWS: i64 = 100_000_000;

/// Why a file of metrics can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The library refused.
    #[error("Parquet: {0}")]
    Parquet(#[from] ParquetError),
    /// It is damaged, or no file of metrics.
    #[error("not a file of metrics: {0}")]
    Content(String),
}

fn schema(series: &Series) -> Result<TypePtr, ParquetError> {
    let required =
        |name: &'static str, kind| Type::primitive_type_builder(name, kind).with_repetition(Repetition::REQUIRED);
    let milliseconds = LogicalType::timestamp(true, TimeUnit::MILLIS);
    let mut fields = vec![
        Arc::new(required(STEP, PhysicalType::INT64).build()?),
        Arc::new(required(GENERATION, PhysicalType::INT64).build()?),
        Arc::new(required(AT, PhysicalType::INT64).with_logical_type(Some(milliseconds)).build()?),
    ];
    for name in series.names() {
        let double = Type::primitive_type_builder(name, PhysicalType::DOUBLE).with_repetition(Repetition::OPTIONAL);
        fields.push(Arc::new(double.build()?));
    }
    Ok(Arc::new(Type::group_type_builder("metrics").with_fields(fields).build()?))
}

/// The rows as a Parquet file: zstd, no statistics, so that a small file is small.
pub fn encode(series: &Series) -> Result<Vec<u8>, MetricsError> {
    let delta = |properties: parquet::file::properties::WriterPropertiesBuilder, name: &str| {
        properties.set_column_encoding(ColumnPath::from(name), Encoding::DELTA_BINARY_PACKED)
    };
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_encoding(Encoding::BYTE_STREAM_SPLIT);
    let properties = [STEP, GENERATION, AT].into_iter().fold(properties, delta).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema(series)?, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    let steps: Vec<i64> = series.steps.iter().map(|step| step.cast_signed()).collect();
    let generations: Vec<i64> = series.generations.iter().map(|generation| generation.cast_signed()).collect();
    let mut doubles = series.columns.values();
    let mut index = 0;
    while let Some(mut column) = group.next_column()? {
        match index {
            0 => _ = column.typed::<Int64Type>().write_batch(&steps, None, None)?,
            1 => _ = column.typed::<Int64Type>().write_batch(&generations, None, None)?,
            2 => _ = column.typed::<Int64Type>().write_batch(&series.at_ms, None, None)?,
            _ => {
                let values = doubles.next().map(Vec::as_slice).unwrap_or_default();
                let levels: Vec<i16> = values.iter().map(|value| i16::from(!value.is_nan())).collect();
                let present: Vec<f64> = values.iter().copied().filter(|value| !value.is_nan()).collect();
                column.typed::<DoubleType>().write_batch(&present, Some(&levels), None)?;
            }
        }
        column.close()?;
        index += 1;
    }
    group.close()?;
    Ok(writer.into_inner()?)
}

/// The rows of a file that is not trusted.
pub(super) fn decode(file: &Bytes) -> Result<Series, MetricsError> {
    // The library panics on malformed bytes.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode_trusting(file)));
    decoded.unwrap_or_else(|_| Err(MetricsError::Content("its values are damaged".into())))
}

fn decode_trusting(file: &Bytes) -> Result<Series, MetricsError> {
    let bad = |reason: &str| MetricsError::Content(reason.into());
    let reader = SerializedFileReader::new(file.clone())?;
    let rows = reader.metadata().file_metadata().num_rows();
    if !(0..=MOST_ROWS).contains(&rows) {
        return Err(bad("it has an impossible number of rows"));
    }
    let mut all = Series::default();
    for number in 0..reader.num_row_groups() {
        let group = reader.get_row_group(number)?;
        let rows = usize::try_from(group.metadata().num_rows()).map_err(|_| bad("a negative number of rows"))?;
        let mut part = Series::default();
        for (index, column) in group.metadata().columns().iter().enumerate() {
            pages::check(file, column).map_err(MetricsError::Content)?;
            let name = column.column_descr().name().to_owned();
            match (name.as_str(), group.get_column_reader(index)?) {
                (STEP, ColumnReader::Int64ColumnReader(mut reader)) => {
                    let (mut values, read) = (Vec::new(), rows);
                    reader.read_records(read, None, None, &mut values)?;
                    part.steps = values.into_iter().map(i64::cast_unsigned).collect();
                }
                (GENERATION, ColumnReader::Int64ColumnReader(mut reader)) => {
                    let mut values = Vec::new();
                    reader.read_records(rows, None, None, &mut values)?;
                    part.generations = values.into_iter().map(i64::cast_unsigned).collect();
                }
                (AT, ColumnReader::Int64ColumnReader(mut reader)) => {
                    reader.read_records(rows, None, None, &mut part.at_ms)?;
                }
                (_, ColumnReader::DoubleColumnReader(mut reader)) => {
                    let (mut values, mut levels) = (Vec::new(), Vec::new());
                    reader.read_records(rows, Some(&mut levels), None, &mut values)?;
                    let mut values = values.into_iter();
                    let spread = levels
                        .iter()
                        .map(|&level| if level == 0 { f64::NAN } else { values.next().unwrap_or(f64::NAN) });
                    part.columns.insert(name, spread.collect());
                }
                // What a later version stores besides is not known here.
                _ => {}
            }
        }
        let lens = [part.steps.len(), part.generations.len(), part.at_ms.len()];
        if lens.into_iter().chain(part.columns.values().map(Vec::len)).any(|len| len != rows) {
            return Err(bad("its columns have different lengths, or one is missing"));
        }
        all.append(part);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::{
        super::series::tests::{row, series},
        *,
    };

    #[test]
    fn rows_are_read_back_to_the_last_bit() {
        let mut rows = series((1..=1000).map(|step| row(1, step)));
        let mut measured = row(2, 1000);
        measured.figures = [("held_out/a.b c".to_owned(), 0.1 + 0.2), ("tiny".to_owned(), f64::MIN_POSITIVE)].into();
        rows.push(&measured);
        let bytes = Bytes::from(encode(&rows).unwrap());
        let back = decode(&bytes).unwrap();
        assert_eq!(back.rows().collect::<Vec<_>>(), rows.rows().collect::<Vec<_>>());
        assert_eq!(back.names().collect::<Vec<_>>(), ["held_out/a.b c", "loss", "lr", "tiny"]);
        assert_eq!(decode(&Bytes::from(encode(&Series::default()).unwrap())).unwrap(), Series::default());
    }

    #[test]
    fn a_million_steps_take_less_than_a_hundred_megabytes() {
        let mut rows = Series::default();
        let computed = ["loss", "grad_norm", "lr", "held_out_loss"];
        let measured = ["step_s", "stall_s", "tokens_per_s", "lag_s", "data_s", "forward_s", "backward_s"];
        let measured = measured.into_iter().chain(["reduce_s", "capture_s", "optimizer_s", "mfu"]);
        // As many random bits as a double has, or, of what is measured, a single: the worst case.
        let names: Vec<(&str, bool)> =
            computed.into_iter().map(|name| (name, true)).chain(measured.map(|name| (name, false))).collect();
        let mut state = 1_u64;
        for step in 0..20_000 {
            let mut figures = std::collections::BTreeMap::new();
            for (name, double) in &names {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let value = 1.0 + (state >> 11) as f64 / (1_u64 << 53) as f64;
                figures.insert((*name).to_owned(), if *double { value } else { f64::from(value as f32) });
            }
            rows.push(&super::super::Row { figures, ..row(1, step) });
        }
        let bytes = encode(&rows).unwrap().len();
        assert!(bytes < 20_000 * 100, "{bytes} bytes for 20,000 steps");
    }

    #[test]
    fn files_of_strangers_are_refused_or_read_and_never_break_the_reader() {
        let bytes = encode(&series((1..=200).map(|step| row(1, step)))).unwrap();
        for cut in [0, 1, 8, bytes.len() / 2, bytes.len() - 1] {
            assert!(decode(&Bytes::copy_from_slice(&bytes[..cut])).is_err(), "{cut} bytes");
        }
        for at in (0..bytes.len()).step_by(11) {
            let mut broken = bytes.clone();
            broken[at] ^= 0x41;
            if let Ok(series) = decode(&Bytes::from(broken)) {
                assert!(series.len() <= 1000, "byte {at}: {} rows", series.len());
            }
        }
        assert!(decode(&Bytes::from_static(b"PAR1 is no file of metrics")).is_err());
    }
}
