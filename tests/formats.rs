//! Stored formats: objects of released versions stay readable forever; hostile objects are errors.
//!
//! `fixtures/formats/v1/` holds one object of each kind as version 1 writes it, `v2/` to `v7/` what later versions
//! have added, `task-6/` what version 6 has for programs with a task of their own, `dataset-2/` what format 2 of
//! datasets has, `dataset-sources/` what sources add to a dataset. They never change: a new version gets its own
//! folder.
//! `fixtures/formats/hostile/` holds objects that once looked dangerous.
//! All are read by the same functions that read the store.

use std::{fs, path::PathBuf};

use proptest::prelude::*;
use trainer::{
    checkpoint::{
        manifest::{Manifest, TrainerState},
        save::Receipt,
    },
    data::shards::Index,
    format::header::{self, Dtype},
    ids::{Fingerprint, Generation, LocalRank, Rank, Step, WorldSize},
    journal::{Entry, FORMAT, Record},
    protocol::{self, Assignment, FromWorker, SaveOrder, StepReport, ToWorker},
    rendezvous::heartbeat::Heartbeat,
    snapshot::mode::CaptureMode,
};

use crate::support::{memory, samples};

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats").join(name)
}

fn safetensors() -> Vec<u8> {
    let tensors: [(&str, Dtype, &[u64]); 3] = [
        ("position_ids", Dtype::I64, &[2]),
        ("model.norm.weight", Dtype::F32, &[3]),
        ("model.scale", Dtype::BF16, &[1, 1]),
    ];
    let mut file = header::write(tensors).expect("short");
    file.extend((0..30).map(|byte: u8| byte.wrapping_mul(7)));
    file
}

fn message(message: &impl serde::Serialize) -> Vec<u8> {
    let mut wire = Vec::new();
    protocol::write_message(&mut wire, message, &mut Vec::new()).expect("short");
    wire
}

fn messages() -> [Vec<u8>; 6] {
    let assignment = Assignment {
        rank: Rank(1),
        local_rank: LocalRank(1),
        world_size: WorldSize(2),
        generation: Generation(3),
        resume_step: Step(9),
        store: "127.0.0.1:0".parse().unwrap(),
        several_nodes: true,
        task: samples::task(),
    };
    let (step, loss, lr) = (Step(3), f64::NAN, 1e-3);
    let report = StepReport { step, loss, grad_norm: 1.0, lr, step_s: 0.5, ..StepReport::default() };
    let saves = vec![SaveOrder { step: Step(4), slot: 1, mode: CaptureMode::Blocking, compare: true }];
    [
        message(&ToWorker::Start(Box::new(assignment))),
        message(&ToWorker::Restore { slot: 1, files: vec![(0, 10), (65_536, 7)], weights_only: false }),
        message(&ToWorker::Thaw { saves, stop_after: Some(Step(5)) }),
        message(&FromWorker::Step(report)),
        message(&FromWorker::Captured {
            step: Step(3),
            slot: 0,
            copy_s: 0.25,
            fingerprint: Some(Fingerprint(u64::MAX)),
        }),
        message(&FromWorker::Failed { message: "no GPU".into(), hint: None, permanent: true }),
    ]
}

/// Every kind of stored object, by the name of its fixture, as this version writes it.
fn written() -> Vec<(String, Vec<u8>)> {
    let json = |value: &dyn erased::Json| value.pretty();
    let mut all = encoded(samples::records());
    all.push(("manifest.json".into(), samples::manifest().to_bytes().expect("plain")));
    all.push(("trainer_state.json".into(), samples::trainer_state().to_bytes().expect("plain")));
    all.push(("receipt.json".into(), json(&samples::receipt())));
    all.push(("heartbeat.json".into(), json(&samples::heartbeat())));
    all.push(("index.json".into(), samples::index().to_bytes()));
    all.push(("weights.safetensors".into(), safetensors()));
    all
}

/// The kinds that version 2 has added, as this version writes them.
fn written_by_version_2() -> Vec<(String, Vec<u8>)> {
    encoded(samples::records_of_version_2())
}

/// What version 3 has added, as this version writes it.
fn written_by_version_3() -> Vec<(String, Vec<u8>)> {
    encoded(samples::records_of_version_3())
}

/// What version 4 has added, as this version writes it.
fn written_by_version_4() -> Vec<(String, Vec<u8>)> {
    let mut all = encoded(samples::records_of_version_4());
    all.push(("heartbeat.json".into(), erased::Json::pretty(&samples::heartbeat_in_group())));
    all
}

/// What version 5 has added, as this version writes it.
fn written_by_version_5() -> Vec<(String, Vec<u8>)> {
    encoded(samples::records_of_version_5())
}

/// What version 6 has added, as this version writes it.
fn written_by_version_6() -> Vec<(String, Vec<u8>)> {
    encoded(samples::records_of_version_6())
}

/// What version 7 has added, as this version writes it.
fn written_by_version_7() -> Vec<(String, Vec<u8>)> {
    encoded(samples::records_of_version_7())
}

/// A dataset with sources, as this version writes it.
fn written_with_sources() -> Vec<(String, Vec<u8>)> {
    vec![("index.json".into(), samples::index_with_sources().to_bytes())]
}

/// What version 6 has added for programs with a task of their own, as this version writes it.
fn written_for_tasks() -> Vec<(String, Vec<u8>)> {
    encoded(samples::records_of_tasks())
}

/// What format 2 of datasets has added, as this version writes it.
fn written_by_format_2_of_datasets() -> Vec<(String, Vec<u8>)> {
    vec![("index.json".into(), samples::index_of_format_2().to_bytes())]
}

fn encoded(records: Vec<Record>) -> Vec<(String, Vec<u8>)> {
    let name = |record: &Record| format!("journal-{}.json", record.kind());
    records.into_iter().map(|record| (name(&record), samples::entry(record).encode().expect("short"))).collect()
}

mod erased {
    pub trait Json {
        fn pretty(&self) -> Vec<u8>;
    }
    impl<T: serde::Serialize> Json for T {
        fn pretty(&self) -> Vec<u8> {
            serde_json::to_vec_pretty(self).expect("plain")
        }
    }
}

/// Reads an object as its kind is read; returns the value, or the error's text.
fn read(name: &str, bytes: &[u8]) -> Result<String, String> {
    fn shown<T: std::fmt::Debug, E: ToString>(result: Result<T, E>) -> Result<String, String> {
        result.map(|value| format!("{value:?}")).map_err(|error| error.to_string())
    }
    match name.split(['.', '-']).next().unwrap_or_default() {
        "journal" => shown(Entry::decode(bytes)),
        "manifest" => shown(Manifest::parse(name, bytes)),
        "trainer_state" => shown(TrainerState::parse(name, bytes)),
        "receipt" => shown(Receipt::parse(name, bytes)),
        "heartbeat" => shown(Heartbeat::parse(bytes)),
        "index" => shown(Index::parse(bytes, name)),
        "weights" => shown(header::read(bytes)),
        "toworker" => shown(protocol::read_message::<ToWorker>(&mut &bytes[..])),
        "fromworker" => shown(protocol::read_message::<FromWorker>(&mut &bytes[..])),
        other => panic!("no reader for {other}"),
    }
}

/// With `TRAINER_WRITE_FIXTURES=1` it writes the fixtures that are missing; it changes none.
#[test]
fn objects_of_earlier_versions_are_read_to_the_same_value() {
    read_to_the_same_value("v1", written());
    read_to_the_same_value("v2", written_by_version_2());
    read_to_the_same_value("v3", written_by_version_3());
    read_to_the_same_value("v4", written_by_version_4());
    read_to_the_same_value("v5", written_by_version_5());
    read_to_the_same_value("v6", written_by_version_6());
    read_to_the_same_value("v7", written_by_version_7());
    read_to_the_same_value("dataset-sources", written_with_sources());
    read_to_the_same_value("task-6", written_for_tasks());
    read_to_the_same_value("dataset-2", written_by_format_2_of_datasets());
}

fn read_to_the_same_value(version: &str, written: Vec<(String, Vec<u8>)>) {
    let write = std::env::var_os("TRAINER_WRITE_FIXTURES").is_some();
    let fixtures = fs::read_dir(folder(version)).map_or(0, Iterator::count);
    assert!(write || fixtures == written.len(), "{version}: a fixture that nobody reads, or none");
    for (name, now) in written {
        let path = folder(version).join(&name);
        if write && !path.exists() {
            fs::create_dir_all(folder(version)).expect("a folder");
            fs::write(&path, &now).expect("written");
        }
        let then = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (then, now) = (read(&name, &then), read(&name, &now));
        assert!(then.is_ok(), "{name}: {then:?}");
        assert_eq!(then, now, "{name}");
    }
}

/// Of the kinds to which no later version has added a field: one more byte, and older programs may not read them.
#[test]
fn records_are_written_to_the_byte_as_they_ever_were() {
    let as_ever =
        ["committed", "completed", "damaged", "failed", "formed", "pruned"].map(|kind| format!("journal-{kind}.json"));
    let written: Vec<_> = written().into_iter().filter(|(name, _)| as_ever.contains(name)).collect();
    assert_eq!(written.len(), as_ever.len());
    for (name, now) in written {
        let then = fs::read(folder("v1").join(&name)).expect("a fixture");
        assert_eq!(String::from_utf8_lossy(&now), String::from_utf8_lossy(&then), "{name}");
    }
}

#[test]
fn each_record_is_written_in_the_lowest_version_that_can_hold_it() {
    let (first, second) = (samples::records(), samples::records_of_version_2());
    let (third, fourth) = (samples::records_of_version_3(), samples::records_of_version_4());
    let (fifth, sixth) = (samples::records_of_version_5(), samples::records_of_version_6());
    let seventh = samples::records_of_version_7();
    let all = [first, second, third, fourth, fifth, sixth, seventh];
    for (version, records) in (1..).zip(all) {
        for record in records {
            assert_eq!(record.format(), version, "{}", record.kind());
        }
    }
}

#[test]
fn a_newer_format_differs_from_damage() {
    for (name, bytes) in written() {
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let next = match name.split(['.', '-']).next() {
            Some("journal") => FORMAT + 1,
            Some("heartbeat" | "index") => 3,
            _ => 2,
        };
        let newer = text.replacen("\"format\": 1", &format!("\"format\": {next}"), 1).replacen(
            "\"format\":1",
            &format!("\"format\":{next}"),
            1,
        );
        let error = read(&name, newer.as_bytes()).unwrap_err();
        assert!(error.contains(&format!("format {next}")), "{name}: {error}");
    }
}

#[test]
fn hostile_files_are_errors() {
    let mut count = 0;
    for file in fs::read_dir(folder("hostile")).expect("fixtures") {
        let path = file.expect("a file").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        let bytes = fs::read(&path).expect("readable");
        let (result, peak) = memory::peak(|| read(&name, &bytes));
        let error = result.unwrap_err();
        assert!(peak <= allowed(bytes.len()), "{name}: {peak} bytes for {}", bytes.len());
        // The reader of these gets a name; for the others the caller adds it.
        if ["manifest", "trainer_state", "receipt", "index"].iter().any(|kind| name.starts_with(kind)) {
            assert!(error.contains(&name), "{name} is not named: {error}");
        }
        count += 1;
    }
    assert!(count >= 12, "{count} hostile files");
}

/// The memory that a reader may take for an object of this size: a JSON array of arrays is some 40 times as long in
/// memory as in text, and a growing vector holds its old self while it moves.
fn allowed(bytes: usize) -> usize {
    (64 << 10) + 150 * bytes
}

fn kinds() -> Vec<(String, Vec<u8>)> {
    let messages = messages().into_iter().enumerate();
    let messages = messages.map(|(i, bytes)| (format!("{}-{i}", if i < 3 { "toworker" } else { "fromworker" }), bytes));
    let later = written_by_version_2().into_iter().chain(written_by_version_3()).chain(written_by_version_4());
    let later = later
        .chain(written_by_version_5())
        .chain(written_by_version_6())
        .chain(written_by_version_7())
        .chain(written_with_sources());
    let later = later.chain(written_for_tasks()).chain(written_by_format_2_of_datasets());
    written().into_iter().chain(later).chain(messages).collect()
}

/// A change to some bytes: hostile numbers, holes, repetitions, nesting.
#[derive(Clone, Debug)]
enum Change {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Drop(prop::sample::Index, usize),
    Put(prop::sample::Index, &'static str),
    Digits(prop::sample::Index, &'static str),
    Repeat(prop::sample::Index, usize, u8),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<prop::sample::Index>;
    let text = prop::sample::select(vec![
        "[",
        "{",
        "\"",
        "null",
        "[[[[[[[[",
        "\\u0000",
        "../",
        "-1",
        "1e999",
        "18446744073709551616",
        "é",
        ",",
        "}",
    ]);
    let number = prop::sample::select(vec!["0", "1", "255", "4294967295", "18446744073709551615", "-9", "0.5"]);
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, byte)| Change::Flip(at, byte)),
        index().prop_map(Change::Cut),
        (index(), 1_usize..40).prop_map(|(at, len)| Change::Drop(at, len)),
        (index(), text).prop_map(|(at, text)| Change::Put(at, text)),
        (index(), number).prop_map(|(at, number)| Change::Digits(at, number)),
        (index(), 1_usize..30, 2_u8..200).prop_map(|(at, len, times)| Change::Repeat(at, len, times)),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    if bytes.is_empty() {
        return;
    }
    let end = |at: usize, len: usize, bytes: &[u8]| (at + len).min(bytes.len());
    match change {
        Change::Flip(at, byte) => {
            let at = at.index(bytes.len());
            bytes[at] ^= byte;
        }
        Change::Cut(at) => bytes.truncate(at.index(bytes.len())),
        Change::Drop(at, len) => {
            let at = at.index(bytes.len());
            bytes.drain(at..end(at, *len, bytes));
        }
        Change::Put(at, text) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, text.bytes());
        }
        Change::Digits(at, number) => {
            // The next run of digits becomes this number.
            let from = at.index(bytes.len());
            let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit).map(|i| from + i) else { return };
            let len = bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
            bytes.splice(start..start + len, number.bytes());
        }
        Change::Repeat(at, len, times) => {
            let at = at.index(bytes.len());
            let piece = bytes[at..end(at, *len, bytes)].repeat(usize::from(*times));
            bytes.splice(at..at, piece);
        }
    }
}

/// Reads the bytes as every kind: a reader can't choose its input.
fn read_harmlessly(name: &str, bytes: &[u8]) -> Result<(), TestCaseError> {
    let (_, peak) = memory::peak(|| read(name, bytes));
    prop_assert!(peak <= allowed(bytes.len()), "{}: {} bytes for {}", name, peak, bytes.len());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn any_bytes_are_read_without_a_panic_or_a_huge_allocation(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        for (name, _) in kinds() {
            read_harmlessly(&name, &bytes)?;
        }
    }

    #[test]
    fn altered_objects_are_read_without_a_panic_or_a_huge_allocation(
        changes in prop::collection::vec(change(), 1..6)
    ) {
        for (name, mut bytes) in kinds() {
            for change in &changes {
                apply(&mut bytes, change);
            }
            read_harmlessly(&name, &bytes)?;
            // A message's body is read, too, behind a length that fits.
            if name.contains("worker-") && bytes.len() > 4 {
                let len = u32::try_from(bytes.len() - 4).expect("short");
                bytes[..4].copy_from_slice(&len.to_le_bytes());
                read_harmlessly(&name, &bytes)?;
            }
            if name.starts_with("weights") && bytes.len() > 8 {
                let len = bytes.len() as u64 - 8 - bytes.len() as u64 / 9;
                bytes[..8].copy_from_slice(&len.to_le_bytes());
                read_harmlessly(&name, &bytes)?;
            }
        }
    }
}
