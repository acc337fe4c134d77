//! Marks as they are stored and read, and damaged ones.

use std::path::Path;

use super::*;
use crate::{
    data::shards::{FORMAT_WITH_MARKS, INDEX, Index, ShardEntry, TokenType},
    error::{Explain, Kind},
    storage::Crc64,
};

fn entry(dir: &Path, name: &str, body: &[u8]) -> FileEntry {
    std::fs::write(dir.join(name), body).unwrap();
    FileEntry { file: name.into(), bytes: body.len() as u64, crc64: Crc64::of(body) }
}

/// A dataset of one shard for each of the given lists of (starts, target). Its tokens count up.
fn dataset(dir: &Path, packed: Option<u32>, shards: &[Vec<(bool, bool)>]) -> Index {
    let mut train = Vec::new();
    for (number, shard) in shards.iter().enumerate() {
        let mut writer = MarkWriter::default();
        shard.iter().for_each(|&(start, target)| writer.push(start, target));
        let (bytes, documents, targets) = writer.take();
        let ids: Vec<u8> = (0..shard.len() as u16).flat_map(u16::to_le_bytes).collect();
        train.push(ShardEntry {
            file: entry(dir, &Split::Train.shard_name(number), &ids),
            tokens: shard.len() as u64,
            marks: Some(MarksEntry { file: entry(dir, &Split::Train.marks_name(number), &bytes), documents, targets }),
            sources: None,
        });
    }
    let index = Index {
        format: FORMAT_WITH_MARKS,
        dtype: TokenType::U16,
        vocab_size: 50_000,
        eos_id: 0,
        recipe: String::new(),
        tokenizer: entry(dir, layout::TOKENIZER, b"{  }"),
        documents: Some(Documents { packed, ..Documents::default() }),
        sources: Vec::new(),
        train,
        validation: Vec::new(),
    };
    std::fs::write(dir.join(INDEX), index.to_bytes()).unwrap();
    index
}

/// Documents of these lengths, in which every third token is no target.
fn documents(lengths: &[usize]) -> Vec<(bool, bool)> {
    lengths.iter().flat_map(|&length| (0..length).map(|at| (at == 0, at % 3 != 2))).collect()
}

/// The same, worked out from the list.
fn expected(tokens: &[(bool, bool)]) -> Marks {
    let inputs = tokens.len() - 1;
    Marks {
        starts: (0..inputs as u32).filter(|&at| at == 0 || tokens[at as usize].0).collect(),
        targets: tokens[1..].iter().map(|&(start, target)| target && !start).collect(),
    }
}

#[test]
fn windows_have_the_marks_of_their_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let shards = [documents(&[5, 1, 9, 2, 30]), documents(&[1]), documents(&[7, 7])];
    dataset(dir.path(), None, &shards);
    let data = Dataset::open(dir.path()).unwrap();
    assert!(data.has_marks());
    let mut marks = Marks { starts: vec![7], targets: vec![true; 99] };
    for length in 1..20_u32 {
        let mut sample = 0;
        for shard in &shards {
            for window in (0..).map(|at| at * length as usize) {
                let Some(tokens) = shard.get(window..window + length as usize + 1) else { break };
                data.read_marks(Split::Train, sample, length, &mut marks).unwrap();
                assert_eq!(marks, expected(tokens), "sample {sample} of length {length}");
                let targets = marks.targets.iter().filter(|&&target| target).count() as u32;
                assert_eq!(data.targets(Split::Train, sample, length).unwrap(), targets);
                sample += 1;
            }
        }
        assert_eq!(data.samples(Split::Train, length), sample);
        assert!(data.read_marks(Split::Train, sample, length, &mut marks).is_err());
        assert!(data.targets(Split::Train, sample, length).is_err());
    }
}

#[test]
fn a_sample_longer_than_the_read_buffer_has_all_its_marks() {
    let dir = tempfile::tempdir().unwrap();
    let shard = documents(&[1000; 45]);
    dataset(dir.path(), None, std::slice::from_ref(&shard));
    let data = Dataset::open(dir.path()).unwrap();
    let mut marks = Marks::default();
    data.read_marks(Split::Train, 1, 20_003, &mut marks).unwrap();
    assert_eq!(marks, expected(&shard[20_003..=40_006]));
    let targets = marks.targets.iter().filter(|&&target| target).count() as u32;
    assert_eq!(data.targets(Split::Train, 1, 20_003).unwrap(), targets);
}

#[test]
fn rows_are_the_samples_of_a_packed_dataset_and_of_no_other_length() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [documents(&[4, 3]), documents(&[7]), documents(&[2, 5])];
    dataset(dir.path(), Some(6), &[rows[..2].concat(), rows[2].clone()]);
    let data = Dataset::open(dir.path()).unwrap();
    assert_eq!((data.samples(Split::Train, 6), data.samples(Split::Train, 5)), (3, 0));
    for (number, (row, first)) in rows.iter().zip([0, 7, 0]).enumerate() {
        let (mut marks, mut tokens) = (Marks::default(), [0; 7]);
        data.read_marks(Split::Train, number as u64, 6, &mut marks).unwrap();
        assert_eq!(marks, expected(row));
        data.read_sample(Split::Train, number as u64, &mut tokens).unwrap();
        assert!(tokens.iter().copied().eq(first..first + 7), "{tokens:?}");
    }
    data.check_length(6).unwrap();
    let error = data.check_length(8).unwrap_err();
    assert_eq!(error.kind(), Kind::Config);
    assert!(error.to_string().contains("packed for sequences of 6 tokens"), "{error}");
    assert!(error.hint().unwrap().contains("data.sequence_length to 6"));
    assert!(crate::data::Sampler::over(&data, Split::Train, 8, 1).unwrap_err().to_string().contains("packed for"));
}

#[test]
fn a_dataset_without_marks_is_one_document_of_targets() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = dataset(dir.path(), None, &[documents(&[9, 9])]);
    (index.format, index.documents) = (crate::data::shards::FORMAT, None);
    index.train[0].marks = None;
    std::fs::write(dir.path().join(INDEX), index.to_bytes()).unwrap();
    let data = Dataset::open(dir.path()).unwrap();
    assert!(!data.has_marks());
    let mut marks = Marks::default();
    data.read_marks(Split::Train, 2, 5, &mut marks).unwrap();
    assert_eq!(marks, Marks { starts: vec![0], targets: vec![true; 5] });
    assert_eq!(data.targets(Split::Train, 2, 5).unwrap(), 5);
    assert!(data.read_marks(Split::Train, 3, 5, &mut marks).is_err());
}

#[test]
fn damaged_marks_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train-00000.marks");
    let prepared = || {
        dataset(dir.path(), Some(4), &[documents(&[3, 2, 5])]);
        std::fs::read(&path).unwrap()
    };
    let refused = |said: &str| {
        let mut marks = Marks::default();
        let read =
            |data: Dataset, marks: &mut Marks| (0..2).try_for_each(|row| data.read_marks(Split::Train, row, 4, marks));
        let error = Dataset::open(dir.path()).and_then(|data| read(data, &mut marks)).unwrap_err();
        assert_eq!(error.kind(), Kind::Data);
        let text = error.to_string();
        assert!(text.contains("train-00000.marks") && text.contains(said), "{said}: {text}");
    };
    type Damage = fn(&mut Vec<u8>);
    let damages: [(Damage, &str); 6] = [
        (|bytes| bytes.truncate(2), "has 2 bytes, its index says 3"),
        (|bytes| bytes.push(0), "has 4 bytes, its index says 3"),
        (|bytes| bytes[0] &= !1, "its first token starts no document"),
        (|bytes| bytes[2] |= 1 << 6, "marks behind its last token"),
        (|bytes| bytes[0] |= 0b11 << 6, "token 3 starts a document and is a target"),
        (|bytes| bytes[1] &= !(1 << 2), "token 5 begins a row and starts no document"),
    ];
    for (damage, said) in damages {
        let mut bytes = prepared();
        damage(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        refused(said);
    }
    prepared();
    std::fs::remove_file(&path).unwrap();
    refused("is in the index but not there");
    // Cut while it is open.
    prepared();
    let data = Dataset::open(dir.path()).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(1).unwrap();
    for error in [
        data.read_marks(Split::Train, 1, 4, &mut Marks::default()).unwrap_err(),
        data.targets(Split::Train, 1, 4).unwrap_err(),
    ] {
        assert!(error.to_string().contains("shorter"), "{error}");
    }
}

#[test]
fn a_hostile_index_of_format_2_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = dataset(dir.path(), Some(4), &[documents(&[3, 2])]);
    if let Some(documents) = &mut index.documents {
        documents.bos_id = Some(1);
        let date = Some("2026-01-31".into());
        documents.chat =
            Some(Rendering { template_sha256: "ab".repeat(32), tools_template_sha256: None, date, end_ids: vec![2] });
        documents.files = vec![entry(dir.path(), "chat_template.jinja", b"x"), entry(dir.path(), "config.json", b"y")];
    }
    let good = String::from_utf8(index.to_bytes()).unwrap();
    assert_eq!(Index::parse(good.as_bytes(), "x").unwrap(), index);
    let names: Vec<&str> = index.files().map(|file| file.file.as_str()).collect();
    assert_eq!(names, ["tokenizer.json", "chat_template.jinja", "config.json", "train-00000.bin", "train-00000.marks"]);
    for (from, to) in [
        ("\"format\": 2", "\"format\": 1"),
        ("\"format\": 2", "\"format\": 3"),
        ("\"documents\": {", "\"other\": {"),
        ("\"marks\": {", "\"other\": {"),
        ("\"packed\": 4", "\"packed\": 0"),
        ("\"packed\": 4", "\"packed\": 5"),
        ("\"packed\": 4", "\"packed\": 4294967296"),
        ("\"bos_id\": 1", "\"bos_id\": 50000"),
        ("        2\n", "        50000\n"),
        ("abab", "abax"),
        ("abab", "ab"),
        ("chat_template.jinja", "../chat_template.jinja"),
        ("chat_template.jinja", "tokenizer.json"),
        ("chat_template.jinja", "config.json"),
        ("train-00000.marks", "train-00001.marks"),
        ("train-00000.marks", "../train-00000.marks"),
        ("\"bytes\": 2,", "\"bytes\": 3,"),
        ("\"documents\": 2", "\"documents\": 0"),
        ("\"documents\": 2", "\"documents\": 6"),
        ("\"targets\": 2", "\"targets\": 4"),
        ("\"bytes\": 1,", "\"bytes\": 18446744073709551615,"),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good, "{from}");
        let error = Index::parse(bad.as_bytes(), "the-index").unwrap_err();
        assert!(error.to_string().contains("the-index"), "{from} -> {to}: {error}");
    }
}
