//! Inputs as they are on disk: plain, or packed by gzip or zstd. Everything else is identified and left out.
//!
//! The first bytes of a file decide, not the ending of its name. Packed files are unpacked as they are read, through
//! windows of bounded size, so that no archive takes more memory than any other file.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use flate2::bufread::GzDecoder;

use super::DataError;

/// Bytes of a file that are read to find out its type: enough for the mark of a tar archive.
const HEAD_BYTES: usize = 512;
/// Read from disk at once.
const BUFFER_BYTES: usize = 64 << 10;

/// How a file is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable one before it.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// A file that can be read, from its beginning, as often as wanted.
#[derive(Debug)]
pub(super) struct Source<'a> {
    pub path: &'a Path,
    /// For messages.
    pub name: &'a str,
    pub packing: Packing,
    /// Its first bytes, unpacked.
    pub head: Vec<u8>,
}

impl<'a> Source<'a> {
    /// Reads the beginning of a file.
    pub(super) fn open(path: &'a Path, name: &'a str) -> Result<Self, DataError> {
        let mut source = Self { path, name, packing: Packing::Plain, head: Vec::new() };
        source.head = source.read_head()?;
        source.packing = Packing::of(&source.head);
        let claimed = match ending(name).as_str() {
            "gz" | "gzip" | "tgz" => Packing::Gzip,
            "zst" | "zstd" => Packing::Zstd,
            _ => Packing::Plain,
        };
        if source.packing == Packing::Plain && claimed != Packing::Plain {
            let reason = if source.head.is_empty() { "is empty, and so is not" } else { "is not" };
            let reason = format!("{reason} {}, as its name suggests", claimed.name());
            return Err(DataError::Broken { input: name.to_owned(), reason });
        }
        if source.packing != Packing::Plain {
            source.head = source.read_head()?;
        }
        Ok(source)
    }

    fn read_head(&self) -> Result<Vec<u8>, DataError> {
        let mut head = Vec::with_capacity(HEAD_BYTES);
        self.reader()?.take(HEAD_BYTES as u64).read_to_end(&mut head).map_err(|error| self.read_error(error))?;
        Ok(head)
    }

    /// The unpacked bytes.
    pub(super) fn reader(&self) -> Result<Box<dyn BufRead>, DataError> {
        let file = BufReader::with_capacity(BUFFER_BYTES, self.file()?);
        Ok(match self.packing {
            Packing::Plain => Box::new(file),
            Packing::Gzip => Box::new(BufReader::with_capacity(BUFFER_BYTES, Members::of(file))),
            // All frames, each with a window of at most 128 MiB: the library's own limit.
            Packing::Zstd => {
                let unpacked =
                    zstd::stream::read::Decoder::with_buffer(file).map_err(|error| self.read_error(error))?;
                Box::new(BufReader::with_capacity(BUFFER_BYTES, unpacked))
            }
        })
    }

    /// The unpacked bytes behind a byte order mark, if there is one.
    pub(super) fn text(&self) -> Result<Box<dyn BufRead>, DataError> {
        let mut reader = self.reader()?;
        if self.head.starts_with(b"\xef\xbb\xbf") {
            reader.by_ref().take(3).read_exact(&mut [0; 3]).map_err(|error| self.read_error(error))?;
        }
        Ok(reader)
    }

    /// The bytes as they are stored.
    pub(super) fn file(&self) -> Result<File, DataError> {
        File::open(self.path).map_err(|source| DataError::Io { doing: "open", path: self.path.to_owned(), source })
    }

    /// The cause of a failed read: the disk, or the archive.
    pub(super) fn read_error(&self, error: io::Error) -> DataError {
        if self.packing == Packing::Plain || error.raw_os_error().is_some() {
            return DataError::Io { doing: "read", path: self.path.to_owned(), source: error };
        }
        let packing = self.packing.name();
        let reason = if error.kind() == io::ErrorKind::UnexpectedEof {
            format!("is a {packing} file cut short: fetch it again")
        } else {
            format!("is a damaged {packing} file, or one that can't be unpacked here: {error}")
        };
        DataError::Broken { input: self.name.to_owned(), reason }
    }

    /// The name without the ending of the packing.
    pub(super) fn inner_name(&self) -> &str {
        match self.name.rsplit_once('.') {
            Some((inner, last)) if ["gz", "gzip", "zst", "zstd"].contains(&last.to_ascii_lowercase().as_str()) => inner,
            _ => self.name,
        }
    }

    /// The reason why it can't be read here, if any.
    pub(super) fn unreadable(&self) -> Option<String> {
        if let Some(known) = known_format(&self.head) {
            return Some(match self.packing {
                Packing::Plain => known,
                packing => format!("{known}, inside of {}", packing.name()),
            });
        }
        if self.packing != Packing::Plain && Packing::of(&self.head) != Packing::Plain {
            return Some("is compressed twice; unpack it once".into());
        }
        let ending = ending(self.inner_name());
        if self.packing != Packing::Plain && is_parquet(&ending, &self.head) {
            return Some(format!("is Parquet inside of {}; unpack it", self.packing.name()));
        }
        table(&ending).or_else(|| archive(&ending))
    }
}

/// A gzip file: its members, one after the other, are one text. Zero bytes behind the last member, which tapes and some
/// uploads add up to a whole block, belong to no member, as for gzip(1).
struct Members<R: BufRead> {
    /// `None`: the file's end was reached.
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> Members<R> {
    fn of(file: R) -> Self {
        Self { member: Some(GzDecoder::new(file)) }
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(member) = &mut self.member else { return Ok(0) };
            let read = member.read(into)?;
            if read > 0 || into.is_empty() {
                return Ok(read);
            }
            let Some(mut rest) = self.member.take().map(GzDecoder::into_inner) else { return Ok(0) };
            if skip_zeros(&mut rest)? {
                self.member = Some(GzDecoder::new(rest));
            }
        }
    }
}

/// Whether there are bytes behind the zeros.
fn skip_zeros(from: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let bytes = from.fill_buf()?;
        let (len, zeros) = (bytes.len(), bytes.iter().take_while(|byte| **byte == 0).count());
        from.consume(zeros);
        if zeros < len || len == 0 {
            return Ok(zeros < len);
        }
    }
}

/// The ending of a name, in small letters.
pub(super) fn ending(name: &str) -> String {
    name.rsplit(['/', '.']).next().unwrap_or_default().to_ascii_lowercase()
}

/// A Parquet file, by its name or, where that has no such ending, by its first bytes.
pub(super) fn is_parquet(ending: &str, head: &[u8]) -> bool {
    matches!(ending, "parquet" | "pq")
        || head.starts_with(b"PAR1") && head.get(4..).is_some_and(|rest| rest.contains(&0))
}

fn table(ending: &str) -> Option<String> {
    let pandas = match ending {
        "csv" | "psv" => "read_csv('FILE')",
        "tsv" | "tab" => "read_csv('FILE', sep='\\t')",
        "xls" | "xlsx" | "xlsm" | "xlsb" | "ods" => "read_excel('FILE')",
        "feather" | "arrow" => "read_feather('FILE')",
        "orc" => "read_orc('FILE')",
        "dta" => "read_stata('FILE')",
        "sav" => "read_spss('FILE')",
        "sas7bdat" | "xpt" => "read_sas('FILE')",
        _ => return None,
    };
    Some(format!(
        "is a table (.{ending}), which is not read; convert it: \
         python3 -c \"import pandas; pandas.{pandas}.to_parquet('FILE.parquet')\", and name its text column with \
         --text-field"
    ))
}

fn unpack(what: &str) -> String {
    format!("is compressed ({what}), which is not read (gzip and zstd are); unpack it first")
}

fn archive(ending: &str) -> Option<String> {
    Some(match ending {
        "xz" | "bz2" | "lz4" | "lzma" | "br" | "7z" | "rar" | "zip" | "lz" | "sz" => unpack(ending),
        "tar" | "tgz" | "txz" | "tbz2" => archive_of_files("tar"),
        _ => return None,
    })
}

fn archive_of_files(what: &str) -> String {
    format!("is a {what} archive of files, which is not read; unpack it first")
}

/// The type of a file that begins with `head`, among those that hold no text, or text that is not read.
fn known_format(head: &[u8]) -> Option<String> {
    let binary = |what: &str| format!("is {what}, not text");
    let convert = |what: &str| format!("is {what}, which is not read; write it as JSON lines or Parquet");
    Some(match head {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => unpack("xz"),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..] => unpack("bzip2"),
        [b'7', b'z', 0xbc, 0xaf, 0x27, 0x1c, ..] => unpack("7z"),
        [b'R', b'a', b'r', b'!', 0x1a, 0x07, ..] => unpack("rar"),
        [0x04, 0x22, 0x4d, 0x18, ..] => unpack("lz4"),
        [b'L', b'Z', b'I', b'P', 1, ..] => unpack("lzip"),
        [0x1f, 0x9d, ..] => unpack("compress"),
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => archive_of_files("zip"),
        [b'A', b'R', b'R', b'O', b'W', b'1', 0, ..] => convert("an Arrow file"),
        [b'O', b'b', b'j', 1, ..] => convert("an Avro file"),
        [b'S', b'Q', b'L', b'i', b't', b'e', b' ', b'f', ..] => convert("an SQLite database"),
        [0x89, b'H', b'D', b'F', ..] => convert("an HDF5 file"),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => binary("a NumPy array"),
        [b'%', b'P', b'D', b'F', b'-', ..] => binary("a PDF file"),
        // UTF-32 before UTF-16, whose mark it begins with.
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => utf("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => utf("UTF-16"),
        [b'{' | b'[' | b'"', 0, next, ..] if *next != 0 => utf("UTF-16"),
        [0, b'{' | b'[' | b'"', 0, ..] => utf("UTF-16"),
        _ if head.get(257..262) == Some(b"ustar") => archive_of_files("tar"),
        _ if head.starts_with(b"version https://git-lfs.github.com/spec/") => {
            "is a pointer of git LFS, not the file itself; fetch that with git lfs pull".into()
        }
        _ if head.starts_with(b"/annex/objects/") => {
            "is a pointer of git-annex, not the file itself; fetch that with git annex get".into()
        }
        _ => return None,
    })
}

fn utf(which: &str) -> String {
    format!("is {which} text; convert it: iconv -f {which} -t UTF-8")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::error::{Explain, Kind};

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 1).unwrap()
    }

    fn text(path: &Path, name: &str) -> Result<String, DataError> {
        let source = Source::open(path, name)?;
        let mut text = String::new();
        source.reader()?.read_to_string(&mut text).map_err(|error| source.read_error(error))?;
        Ok(text)
    }

    #[test]
    fn packed_files_are_read_whole_under_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let (one, two) = ("first part\n".repeat(9000), "second part\n".repeat(9000));
        for (pack, what) in [(gzip as fn(&[u8]) -> Vec<u8>, "gz"), (zstd, "zst")] {
            let mut packed = pack(one.as_bytes());
            packed.extend(pack(two.as_bytes()));
            if what == "zst" {
                // A skippable frame comes first; some writers put one there.
                packed.splice(0..0, [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
            }
            std::fs::write(&path, &packed).unwrap();
            for name in [format!("a.txt.{what}"), "blob".into()] {
                assert!(text(&path, &name).unwrap() == format!("{one}{two}"), "{name}");
            }
            for cut in [3, packed.len() / 3, packed.len() - 2] {
                std::fs::write(&path, &packed[..cut]).unwrap();
                let error = text(&path, &format!("a.txt.{what}")).map(|text| text.len()).unwrap_err();
                assert!(error.to_string().contains("a.txt"), "{error}");
                assert_eq!(error.kind(), Kind::Config, "{error}");
            }
            std::fs::write(&path, "not packed").unwrap();
            let error = text(&path, &format!("a.{what}")).unwrap_err().to_string();
            assert!(error.contains("is not") && error.contains("as its name suggests"), "{error}");
        }
    }

    #[test]
    fn zeros_behind_a_gzip_file_are_no_text_and_anything_else_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let of = |parts: &[&[u8]]| {
            std::fs::write(&path, parts.concat()).unwrap();
            text(&path, "a.txt.gz")
        };
        let (one, none) = (gzip(b"one\n"), gzip(b""));
        let zeros = vec![0; 3 * BUFFER_BYTES + 1];
        assert_eq!(of(&[&one, &zeros]).unwrap(), "one\n");
        assert_eq!(of(&[&one, &[0], &none, &one, &zeros]).unwrap(), "one\none\n");
        for behind in [&b"x"[..], b"\0x", b"\x1f", b"\0\x1f\x8b"] {
            let error = of(&[&one, behind]).unwrap_err().to_string();
            assert!(error.contains("damaged gzip") || error.contains("cut short"), "{error}");
        }
    }

    #[test]
    fn an_unsupported_file_is_named_by_its_type() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mut tar = vec![0; 600];
        tar[257..262].copy_from_slice(b"ustar");
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n".to_vec();
        let utf16: Vec<u8> = "{\"text\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (name, body, said) in [
            ("a.txt", b"\xfd7zXZ\0rest".to_vec(), "compressed (xz)"),
            ("a.txt", b"BZh91AY&SY".to_vec(), "compressed (bzip2)"),
            ("a.txt", b"PK\x03\x04".to_vec(), "zip archive"),
            ("a.xlsx", b"x".to_vec(), "is a table (.xlsx)"),
            ("a.csv", b"a,b\n".to_vec(), "is a table (.csv)"),
            ("a.TSV", b"a\tb\n".to_vec(), "is a table (.tsv)"),
            ("a.csv.gz", gzip(b"a,b\n"), "is a table (.csv)"),
            ("a.tar", tar.clone(), "tar archive"),
            ("a.tgz", gzip(&tar), "tar archive of files, which is not read; unpack it first, inside of gzip"),
            ("a.gz", gzip(&zstd(b"x")), "compressed twice"),
            ("a.bin", pointer, "git LFS"),
            ("a.json", utf16, "UTF-16"),
            ("a.json", b"\xff\xfe{\0".to_vec(), "UTF-16"),
            ("a.parquet.gz", gzip(b"PAR1"), "Parquet inside of gzip"),
        ] {
            std::fs::write(&path, body).unwrap();
            let said_here = Source::open(&path, name).unwrap().unreadable();
            assert!(said_here.as_deref().is_some_and(|text| text.contains(said)), "{name}: {said_here:?}, not {said}");
        }
        for (name, body) in [("a.rs", "fn main() {}"), ("tables", "text"), ("a.txt", "BZhello"), ("csv/a", "x")] {
            std::fs::write(&path, body).unwrap();
            assert_eq!(Source::open(&path, name).unwrap().unreadable(), None, "{name}");
        }
    }
}
