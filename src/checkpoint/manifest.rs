//! The contents of a checkpoint: the manifest, and the trainer's state outside the tensors.
//!
//! Stored layout of `manifest.json`: one JSON object, [`Manifest`], files in the order of their names. It is created
//! once and never changed; the journal's `committed` record holds the CRC64-NVME of its bytes, so a reader knows that
//! it has the committed manifest. Fields may be added with a serde default, never renamed; readers refuse a higher
//! `format`.
//!
//! A manifest is not trusted: names must be plain (they become keys and file names), unique, and sizes must add up
//! without overflow before anything is allocated for them.

use std::{collections::HashSet, num::NonZeroU64};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::CheckpointError;
use crate::{
    config::{ScheduleConfig, TrainTask},
    ids::{AttemptId, DatasetId, Generation, NodeId, RunId, Step, WorldSize},
    layout,
    storage::Crc64,
};

/// The layout that is written; readers refuse a higher one.
pub const FORMAT: u32 = 1;
/// The longest manifest, receipt or state that is accepted.
pub const MAX_JSON: u64 = 32 << 20;

/// The kind of content of a checkpoint's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// Weights or adapters, safetensors.
    Model,
    /// Moments, safetensors.
    Optimizer,
    /// Anything small: configuration, tokenizer, index, trainer state.
    Meta,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name within the checkpoint's folder.
    pub name: String,
    /// Its kind of content.
    pub kind: FileKind,
    /// Its length.
    pub bytes: u64,
    /// CRC64-NVME of all its bytes.
    #[serde(with = "hex")]
    pub crc64: Crc64,
}

/// The object that names every file of one step, with sizes and checksums.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout.
    pub format: u32,
    /// The writer and its attempt: settles a create whose answer was lost.
    pub attempt: AttemptId,
    /// The run.
    pub run_id: RunId,
    /// The finished step whose state it is.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// Workers of that generation. A restore may have any other number.
    pub world_size: WorldSize,
    /// The nodes whose receipts it was made from.
    pub nodes: Vec<NodeId>,
    /// Every file, by name.
    pub files: Vec<FileEntry>,
}

impl Manifest {
    /// The manifest's bytes as stored.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CheckpointError> {
        to_json(self)
    }

    /// Reads and checks a manifest; `object` is its key, for errors.
    pub fn parse(object: &str, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let manifest: Self = from_json(object, bytes)?;
        manifest.validate().map_err(|reason| CheckpointError::damaged(object, reason))?;
        Ok(manifest)
    }

    /// Checks that it can be a checkpoint's; the error gives the reason.
    pub fn validate(&self) -> Result<(), String> {
        if self.step.get() == 0 {
            return Err("step 0 has no checkpoint".into());
        }
        if self.world_size.get() == 0 {
            return Err("world size is 0".into());
        }
        if self.nodes.is_empty() {
            return Err("it names no node".into());
        }
        validate_files(&self.files)?;
        if !self.files.iter().any(|file| file.kind == FileKind::Model) {
            return Err("it has no weights".into());
        }
        if !self.files.iter().any(|file| file.name == layout::TRAINER_STATE) {
            return Err(format!("it does not name {}", layout::TRAINER_STATE));
        }
        Ok(())
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        // `validate` has added them up, but a value built by hand must not wrap either.
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }

    /// The folder of its files, relative to the run.
    pub fn folder(&self) -> String {
        layout::checkpoint(self.step, self.generation)
    }

    /// The file of this name.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }

    /// The files that a restore loads into tensors: weights and moments, by name.
    pub fn tensor_files(&self) -> impl Iterator<Item = &FileEntry> {
        self.files.iter().filter(|file| file.kind != FileKind::Meta)
    }
}

/// Checks that names are plain and unique, that sizes add up, and that no tensor file is too short; the error gives the
/// reason.
pub(super) fn validate_files(files: &[FileEntry]) -> Result<(), String> {
    let mut names = HashSet::with_capacity(files.len());
    let mut total = 0_u64;
    for FileEntry { name, kind, bytes, .. } in files {
        if !is_plain_name(name) {
            return Err(format!("file name {:?} is not plain", name.chars().take(80).collect::<String>()));
        }
        if name == layout::MANIFEST || name.starts_with("receipt-") {
            return Err(format!("file {name} can't be part of a checkpoint"));
        }
        if !names.insert(name.as_str()) {
            return Err(format!("file {name} is named twice"));
        }
        if *kind != FileKind::Meta && *bytes < crate::format::header::PREFIX {
            return Err(format!("file {name} has {bytes} bytes, too few for tensors"));
        }
        // Signed: object stores and file systems count that way.
        total = total
            .checked_add(*bytes)
            .filter(|&total| i64::try_from(total).is_ok())
            .ok_or_else(|| format!("sizes up to file {name} don't fit 63 bits"))?;
    }
    Ok(())
}

/// Whether a name can be appended to a folder and stay inside it, in any store and on any file system.
pub fn is_plain_name(name: &str) -> bool {
    let first = name.as_bytes().first();
    name.len() <= 200
        && first.is_some_and(u8::is_ascii_alphanumeric)
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !name.contains("..")
}

/// The manifest's digest as kept in the journal: CRC64-NVME of its bytes, 16 lower-case hex digits.
pub fn digest(bytes: &[u8]) -> String {
    Crc64::of(bytes).to_string()
}

/// The trainer's state outside the tensors, `trainer_state.json`.
///
/// With the tensors and the run's configuration this is everything that step `step + 1` depends on. Generators are
/// seeded anew for every step, from (seed, step, rank), so their states need not be stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Version of this layout.
    pub format: u32,
    /// The finished step.
    pub step: Step,
    /// Sequences trained on since the run began: step × global batch.
    pub samples: u64,
    /// Predicted tokens trained on since the run began: samples × sequence length.
    pub tokens: u64,
    /// The sampler's position: the next sequence is `position` of pass `epoch` over the data.
    pub epoch: u64,
    /// Sequences of this pass already used.
    pub position: u64,
    /// Seed of the weights, of the sample order, and of every step's generators.
    pub seed: u64,
    /// Sequences in one step.
    pub global_batch: u32,
    /// Tokens in one sequence.
    pub sequence_length: u32,
    /// Steps of the whole run, at which the schedule ends.
    pub total_steps: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// The schedule, a function of the step alone.
    pub schedule: ScheduleConfig,
    /// The rule for random numbers.
    pub rng: RngRule,
    /// The training data; `None`: not recorded, in checkpoints of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DatasetId>,
}

/// The rule for random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RngRule {
    /// Every step's generators are seeded from (seed, step, rank): two numbers are the whole state.
    PerStep,
}

impl TrainerState {
    /// The state after `step` of a run over data with `sequences` sequences in one pass; `None` if a count overflows.
    /// It names no data.
    pub fn at(step: Step, task: &TrainTask, sequences: NonZeroU64) -> Option<Self> {
        let samples = step.get().checked_mul(u64::from(task.train.global_batch))?;
        Some(Self {
            format: FORMAT,
            step,
            samples,
            tokens: samples.checked_mul(u64::from(task.data.sequence_length))?,
            epoch: samples / sequences,
            position: samples % sequences,
            seed: task.train.seed,
            global_batch: task.train.global_batch,
            sequence_length: task.data.sequence_length,
            total_steps: task.train.steps,
            lr: task.train.optimizer.lr,
            schedule: task.train.schedule,
            rng: RngRule::PerStep,
            data: None,
        })
    }

    /// The state's bytes as stored.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CheckpointError> {
        to_json(self)
    }

    /// Reads and checks a state; `object` is its key, for errors.
    pub fn parse(object: &str, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let state: Self = from_json(object, bytes)?;
        let samples = state.step.get().checked_mul(u64::from(state.global_batch));
        let tokens = samples.and_then(|samples| samples.checked_mul(u64::from(state.sequence_length)));
        for (field, found, expected) in [("samples", state.samples, samples), ("tokens", state.tokens, tokens)] {
            if expected != Some(found) {
                let reason = format!("its {field} is {found}, which its other counts contradict");
                return Err(CheckpointError::damaged(object, reason));
            }
        }
        Ok(state)
    }
}

/// JSON as it is stored: readable for people, with a final line feed.
pub(super) fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>, CheckpointError> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| CheckpointError::Internal(format!("write checkpoint JSON: {error}")))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads JSON that has a `format`, which is checked first: a newer layout must not be taken for damage.
pub(super) fn from_json<T: DeserializeOwned>(object: &str, bytes: &[u8]) -> Result<T, CheckpointError> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let unreadable = |error| CheckpointError::damaged(object, format!("it can't be read: {error}"));
    let Versioned { format } = serde_json::from_slice(bytes).map_err(unreadable)?;
    if format > FORMAT {
        return Err(CheckpointError::TooNew { object: object.to_owned(), found: format, known: FORMAT });
    }
    serde_json::from_slice(bytes).map_err(unreadable)
}

/// Checksums as 16 lower-case hex digits: JSON numbers don't keep 64 bits in every reader.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::storage::Crc64;

    pub fn serialize<S: Serializer>(crc: &Crc64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(crc)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Crc64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn entry(name: &str, kind: FileKind, bytes: u64) -> FileEntry {
        FileEntry { name: name.into(), kind, bytes, crc64: Crc64(0x0123_4567_89ab_cdef) }
    }

    pub fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            attempt: AttemptId::random(),
            run_id: RunId::new("run").unwrap(),
            step: Step(10),
            generation: Generation(1),
            world_size: WorldSize(2),
            nodes: vec![NodeId::random()],
            files: vec![
                entry("model-00001-of-00001.safetensors", FileKind::Model, 100),
                entry("optimizer-00001-of-00001.safetensors", FileKind::Optimizer, 200),
                entry("trainer_state.json", FileKind::Meta, 30),
            ],
        }
    }

    #[test]
    fn a_manifest_is_read_back_as_written() {
        let manifest = manifest();
        let bytes = manifest.to_bytes().unwrap();
        assert_eq!(Manifest::parse("m", &bytes).unwrap(), manifest);
        assert_eq!(manifest.bytes(), 330);
        assert_eq!(manifest.tensor_files().count(), 2);
        assert!(String::from_utf8(bytes).unwrap().contains("\"0123456789abcdef\""));
    }

    #[test]
    fn hostile_manifests_are_refused() {
        type Change = fn(&mut Manifest);
        let cases: [(Change, &str); 12] = [
            (|m| m.step = Step(0), "step 0"),
            (|m| m.world_size = WorldSize(0), "world size"),
            (|m| m.nodes.clear(), "no node"),
            (|m| m.files.clear(), "no weights"),
            (|m| m.files[0].name = "../../other-run/journal".into(), "not plain"),
            (|m| m.files[0].name = "/etc/passwd".into(), "not plain"),
            (|m| m.files[0].name = "a\0b".into(), "not plain"),
            (|m| m.files[0].name = "manifest.json".into(), "can't be part"),
            (|m| m.files[0].name = m.files[1].name.clone(), "twice"),
            (|m| m.files[0].bytes = u64::MAX, "63 bits"),
            (|m| m.files[0].bytes = 3, "too few"),
            (|m| m.files[2].name = "state.json".into(), "trainer_state.json"),
        ];
        for (change, expected) in cases {
            let mut manifest = manifest();
            change(&mut manifest);
            let error = Manifest::parse("key/manifest.json", &manifest.to_bytes().unwrap()).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(expected) && text.contains("key/manifest.json"), "{text}");
            assert!(matches!(error, CheckpointError::Damaged { .. }));
        }
        for bytes in [&b""[..], b"{}", b"[1,2]", b"{\"format\":1}", &[0xff; 40]] {
            assert!(matches!(Manifest::parse("m", bytes), Err(CheckpointError::Damaged { .. })));
        }
    }

    #[test]
    fn a_newer_layout_is_not_taken_for_damage() {
        let error = Manifest::parse("m", br#"{"format":2,"shape":"unknown"}"#).unwrap_err();
        assert!(matches!(error, CheckpointError::TooNew { found: 2, known: 1, .. }), "{error}");
    }

    #[test]
    fn the_digest_is_crc64_nvme() {
        // The check value of CRC-64/NVME in the catalogue of parametrised CRC algorithms.
        assert_eq!(digest(b"123456789"), "ae8b14860a799888");
        let upper = manifest().to_bytes().unwrap();
        let upper = String::from_utf8(upper).unwrap().replace("0123456789abcdef", "0123456789ABCDEF");
        assert!(Manifest::parse("m", upper.as_bytes()).is_err());
    }

    #[test]
    fn the_trainer_state_follows_from_the_step_and_must_agree_with_itself() {
        let task = crate::checkpoint::testing::config().workload;
        let sequences = NonZeroU64::new(1000).unwrap();
        let state = TrainerState::at(Step(40), &task, sequences).unwrap();
        assert_eq!((state.samples, state.tokens, state.epoch, state.position), (1280, 327_680, 1, 280));
        let bytes = state.to_bytes().unwrap();
        assert_eq!(TrainerState::parse("s", &bytes).unwrap(), state);
        assert!(String::from_utf8(bytes).unwrap().contains("\"per-step\""));
        let lied = TrainerState { samples: 1281, ..state.clone() }.to_bytes().unwrap();
        assert!(matches!(TrainerState::parse("s", &lied), Err(CheckpointError::Damaged { .. })));
        let huge = TrainerState { step: Step(u64::MAX), ..state }.to_bytes().unwrap();
        assert!(matches!(TrainerState::parse("s", &huge), Err(CheckpointError::Damaged { .. })));
        assert_eq!(TrainerState::at(Step(u64::MAX), &task, sequences), None);
    }
}
