//! The pages of a Parquet column, checked before they are read.
//!
//! A page's header gives its size, packed and unpacked, and the library allocates memory for that without a check; some
//! of its unpackers even continue for as long as there is something to unpack. So a false header, from a broken disk or
//! on purpose, would cost gigabytes. Here the headers are read first and checked against the file and
//! a limit of 512 MiB; pages with unlimited unpackers are unpacked once, and the result is discarded.

use std::io::{self, BufReader, Read};

use parquet::{
    basic::Compression,
    file::{metadata::ColumnChunkMetaData, reader::ChunkReader},
};

/// The largest page that is read, bytes. Writers aim at one MiB; a thousand books of half a MiB, written at once, are
/// one page.
const MAX_PAGE_BYTES: u64 = 512 << 20;
/// How deep the structures of a header may be nested; real ones have three levels.
const MAX_DEPTH: u32 = 16;
/// Bytes of the length before each value of a dictionary.
const LENGTH_BYTES: u64 = 4;

/// Checks the pages of one column of a row group against the file and the limit; the error says what is wrong.
pub fn check(file: &impl ChunkReader, chunk: &ColumnChunkMetaData) -> Result<(), String> {
    check_with(file, chunk, MAX_PAGE_BYTES)
}

fn check_with(file: &impl ChunkReader, chunk: &ColumnChunkMetaData, most: u64) -> Result<(), String> {
    let failed = |error: io::Error| format!("the pages of the column can't be read: {error}");
    let length = file.len();
    let begin = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
    let range = u64::try_from(begin).ok().zip(u64::try_from(chunk.compressed_size()).ok());
    let end = range.and_then(|(begin, bytes)| begin.checked_add(bytes)).filter(|end| *end <= length);
    let (Some((mut at, _)), Some(end)) = (range, end) else {
        return Err("a column lies outside of the file".into());
    };
    while at < end {
        let from = from(file, at).map_err(failed)?;
        let mut reader = Counted { reader: BufReader::with_capacity(512, from).take(end - at), count: 0 };
        let mut header = Header::default();
        header.read(&mut reader).map_err(|error| format!("the header of the page at byte {at} is broken: {error}"))?;
        let body = at + reader.count;
        let too_large = |bytes: u64| {
            format!(
                "the page at byte {at} has {bytes} bytes, and at most {most} are read; write the file anew with \
                smaller \
                 pages: pyarrow.parquet.write_table(table, 'FILE', write_batch_size=16)"
            )
        };
        let sizes = u64::try_from(header.packed).ok().zip(u64::try_from(header.unpacked).ok());
        let Some((packed, unpacked)) = sizes.filter(|(packed, _)| *packed <= end - body) else {
            return Err(format!("the header of the page at byte {at} gives it an impossible size"));
        };
        if packed.max(unpacked) > most {
            return Err(too_large(packed.max(unpacked)));
        }
        if u64::from(header.dictionary_values.cast_unsigned()) > unpacked / LENGTH_BYTES {
            return Err(format!("the dictionary at byte {at} claims more values than it has room for"));
        }
        let levels = u64::from(header.levels.cast_unsigned());
        if header.is_packed
            && levels <= packed
            && !fits(file, body + levels, packed - levels, unpacked, chunk).map_err(failed)?
        {
            return Err(format!("the page at byte {at} holds more than the {unpacked} bytes that its header says"));
        }
        at = body + packed;
    }
    Ok(())
}

/// Whether `packed` bytes give at most `unpacked`; used for unlimited unpackers. The library reports pages that these
/// unpackers can't read.
fn fits<F: ChunkReader>(
    file: &F,
    at: u64,
    packed: u64,
    unpacked: u64,
    chunk: &ColumnChunkMetaData,
) -> io::Result<bool> {
    let open = || -> io::Result<_> { Ok(BufReader::new(from(file, at)?.take(packed))) };
    let packed: Box<dyn Read + '_> = match chunk.compression() {
        Compression::GZIP(_) => Box::new(flate2::bufread::MultiGzDecoder::new(open()?)),
        Compression::BROTLI(_) => Box::new(brotli::Decompressor::new(open()?, 64 << 10)),
        Compression::LZ4 => Box::new(lz4_flex::frame::FrameDecoder::new(open()?)),
        _ => return Ok(true),
    };
    let mut counted = Counted { reader: packed.take(unpacked + 1), count: 0 };
    let _ = io::copy(&mut counted, &mut io::sink());
    Ok(counted.count <= unpacked)
}

/// The bytes from `at` on.
fn from<F: ChunkReader>(file: &F, at: u64) -> io::Result<F::T> {
    file.get_read(at).map_err(io::Error::other)
}

/// The relevant part of a page's header. If a field occurs twice, the last one counts, as in the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    unpacked: i32,
    packed: i32,
    dictionary_values: i32,
    /// Bytes before the packed ones.
    levels: i32,
    is_packed: bool,
}

impl Default for Header {
    fn default() -> Self {
        Self { unpacked: -1, packed: -1, dictionary_values: 0, levels: 0, is_packed: true }
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Thrift's compact protocol, in which the headers are written.
impl Header {
    fn read(&mut self, from: &mut impl Read) -> io::Result<()> {
        let mut levels = [0_i32; 2];
        let top = &mut |id: i16, from: &mut dyn Read, kind: u8| -> io::Result<bool> {
            match (id, kind) {
                (2, INT) => self.unpacked = number(from)?,
                (3, INT) => self.packed = number(from)?,
                (7, STRUCTURE) => fields(from, 1, &mut |id, from, kind| {
                    if (id, kind) == (1, INT) {
                        self.dictionary_values = number(from)?;
                    }
                    Ok((id, kind) == (1, INT))
                })?,
                (8, STRUCTURE) => fields(from, 1, &mut |id, from, kind| {
                    match (id, kind) {
                        (5, INT) => levels[0] = number(from)?,
                        (6, INT) => levels[1] = number(from)?,
                        (7, TRUE | FALSE) => self.is_packed = kind == TRUE,
                        (5..=7, _) => return Err(broken("a field is of another type")),
                        _ => return Ok(false),
                    }
                    Ok(true)
                })?,
                (2 | 3 | 7 | 8, _) => return Err(broken("a field is of another type")),
                _ => return Ok(false),
            }
            Ok(true)
        };
        fields(from, 0, top)?;
        self.levels = levels[0].checked_add(levels[1]).ok_or_else(|| broken("its levels have no size"))?;
        if self.dictionary_values < 0 || levels.iter().any(|bytes| *bytes < 0) {
            return Err(broken("it has a negative count"));
        }
        Ok(())
    }
}

const TRUE: u8 = 1;
const FALSE: u8 = 2;
const INT: u8 = 5;
const STRUCTURE: u8 = 12;

/// Whether a field was used; if not, it is skipped.
type Take<'a> = &'a mut dyn FnMut(i16, &mut dyn Read, u8) -> io::Result<bool>;

fn fields(from: &mut dyn Read, depth: u32, take: Take<'_>) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(broken("it is too deep"));
    }
    let mut id = 0_i16;
    loop {
        let byte = byte(from)?;
        let kind = byte & 0x0f;
        if kind == 0 {
            return Ok(());
        }
        id = match i16::from(byte >> 4) {
            0 => number(from)? as i16,
            more => id.checked_add(more).ok_or_else(|| broken("its fields have no number"))?,
        };
        if !take(id, from, kind)? {
            pass(from, depth, kind)?;
        }
    }
}

/// Skips a value.
fn pass(from: &mut dyn Read, depth: u32, kind: u8) -> io::Result<()> {
    match kind {
        TRUE | FALSE => Ok(()),
        3 => pass_bytes(from, 1),
        4..=6 => varint(from).map(|_| ()),
        7 => pass_bytes(from, 8),
        8 => {
            let bytes = varint(from)?;
            pass_bytes(from, bytes)
        }
        9 | 10 => {
            let byte = byte(from)?;
            let count = match byte >> 4 {
                15 => varint(from)?,
                count => count.into(),
            };
            for _ in 0..count {
                match byte & 0x0f {
                    TRUE | FALSE => pass_bytes(from, 1)?,
                    kind => pass(from, depth + 1, kind)?,
                }
            }
            Ok(())
        }
        STRUCTURE => fields(from, depth + 1, &mut |_, _, _| Ok(false)),
        _ => Err(broken("it holds a field of unknown type")),
    }
}

fn pass_bytes(from: &mut dyn Read, bytes: u64) -> io::Result<()> {
    match io::copy(&mut from.take(bytes), &mut io::sink())? {
        passed if passed == bytes => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn byte(from: &mut dyn Read) -> io::Result<u8> {
    let mut byte = [0];
    from.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn varint(from: &mut dyn Read) -> io::Result<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = byte(from)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(broken("a number has no end"))
}

/// A number as the library reads it: its lower 32 bits.
fn number(from: &mut dyn Read) -> io::Result<i32> {
    let value = varint(from)?;
    Ok(((value >> 1) as i64 ^ -((value & 1) as i64)) as i32)
}

/// Counts the bytes that are read.
struct Counted<R> {
    reader: R,
    count: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.count += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Seek, SeekFrom, Write},
        sync::Arc,
    };

    use parquet::{
        basic::{BrotliLevel, GzipLevel, ZstdLevel},
        data_type::{ByteArray, ByteArrayType},
        file::{
            properties::{WriterProperties, WriterVersion},
            reader::{FileReader, SerializedFileReader},
            writer::SerializedFileWriter,
        },
        schema::parser::parse_message_type,
    };

    use super::*;

    const SCHEMA: &str = "message rows { optional binary text (UTF8); }";

    /// A file of one column, its bytes, and the place of the first page.
    fn written(properties: WriterProperties) -> (tempfile::NamedTempFile, ColumnChunkMetaData) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let mut writer = SerializedFileWriter::new(file.reopen().unwrap(), schema, Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = (0..3000).map(|n| ByteArray::from(format!("text {}", n % 700).as_str())).collect();
        let levels: Vec<i16> = (0..6000).map(|n| n % 2).collect();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let reader = SerializedFileReader::new(file.reopen().unwrap()).unwrap();
        let chunk = reader.metadata().row_group(0).column(0).clone();
        (file, chunk)
    }

    #[test]
    fn pages_of_real_writers_are_accepted() {
        let packings = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(GzipLevel::default()),
            Compression::BROTLI(BrotliLevel::default()),
            Compression::LZ4,
            Compression::LZ4_RAW,
            Compression::ZSTD(ZstdLevel::default()),
        ];
        for packing in packings {
            for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
                for dictionary in [false, true] {
                    let properties = WriterProperties::builder()
                        .set_compression(packing)
                        .set_writer_version(version)
                        .set_dictionary_enabled(dictionary)
                        .set_data_page_size_limit(4096)
                        .set_write_batch_size(100);
                    let (file, chunk) = written(properties.build());
                    check(file.as_file(), &chunk).unwrap_or_else(|said| panic!("{packing:?} {version:?}: {said}"));
                    let said = check_with(file.as_file(), &chunk, 1000).unwrap_err();
                    assert!(said.contains("smaller pages"), "{said}");
                }
            }
        }
    }

    /// Replaces the header of the first page; the rest of the file stays.
    fn with_header(header: &[u8]) -> Result<(), String> {
        let (mut file, chunk) = written(WriterProperties::builder().set_dictionary_enabled(false).build());
        let at = chunk.data_page_offset() as u64;
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(header).unwrap();
        check(file.as_file(), &chunk)
    }

    fn zig_zag(value: i64) -> Vec<u8> {
        let mut left = ((value << 1) ^ (value >> 63)) as u64;
        let mut bytes = Vec::new();
        while left >= 0x80 {
            bytes.push(left as u8 | 0x80);
            left >>= 7;
        }
        bytes.push(left as u8);
        bytes
    }

    #[test]
    fn a_false_header_is_an_error() {
        let header = |unpacked: i64, packed: i64, rest: &[u8]| {
            [&[0x15, 0], [0x15].as_slice(), &zig_zag(unpacked), &[0x15], &zig_zag(packed), rest].concat()
        };
        let dictionary = |values: i64| [&[0x4c, 0x15][..], &zig_zag(values), &[0, 0]].concat();
        for (bytes, said) in [
            (header(i32::MAX.into(), 100, &[0]), "has 2147483647 bytes, and at most"),
            (header(100, i32::MAX.into(), &[0]), "impossible size"),
            (header(-1, 100, &[0]), "impossible size"),
            (header(100, -1, &[0]), "impossible size"),
            (header(100, 100, &dictionary(i32::MAX.into())), "more values than it has room for"),
            (header(100, 100, &dictionary(-1)), "negative count"),
            (header(100, 100, &dictionary(26)), "more values than it has room for"),
            (vec![0x15, 0, 0x18, 0], "of another type"),
            (vec![0], "impossible size"),
            ([0x1c; 64].to_vec(), "too deep"),
            (vec![0x18, 0xff, 0xff, 0xff, 0xff, 0x0f], "broken"),
            ([0xff; 40].to_vec(), "broken"),
        ] {
            let found = with_header(&bytes).unwrap_err();
            assert!(found.contains(said), "{said}: {found}");
        }
    }

    #[test]
    fn a_page_that_unpacks_to_more_than_it_says_is_an_error() {
        let mut bombs = Vec::new();
        let zeros = vec![0_u8; 4 << 20];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(&zeros).unwrap();
        bombs.push((Compression::GZIP(GzipLevel::default()), gzip.finish().unwrap()));
        let mut packed = Vec::new();
        let mut brotli = brotli::CompressorWriter::new(&mut packed, 4096, 5, 22);
        brotli.write_all(&zeros).unwrap();
        drop(brotli);
        bombs.push((Compression::BROTLI(BrotliLevel::default()), packed));
        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        lz4.write_all(&zeros).unwrap();
        bombs.push((Compression::LZ4, lz4.finish().unwrap()));
        for (packing, packed) in bombs {
            let (_, chunk) = written(WriterProperties::builder().set_compression(packing).build());
            for (unpacked, fits) in [(zeros.len(), true), (zeros.len() - 1, false), (100, false)] {
                let mut file = tempfile::tempfile().unwrap();
                let header =
                    [&[0x15, 0, 0x15][..], &zig_zag(unpacked as i64), &[0x15], &zig_zag(packed.len() as i64), &[0]]
                        .concat();
                file.write_all(&header).unwrap();
                file.write_all(&packed).unwrap();
                let chunk = chunk
                    .clone()
                    .into_builder()
                    .set_dictionary_page_offset(None)
                    .set_data_page_offset(0)
                    .set_total_compressed_size((header.len() + packed.len()) as i64)
                    .build()
                    .unwrap();
                let found = check(&file, &chunk);
                assert_eq!(found.is_ok(), fits, "{packing:?} {unpacked}: {found:?}");
                assert!(found.is_ok() || found.unwrap_err().contains("more than the"), "{packing:?}");
            }
        }
    }
}
