//! The records of a run's journal.
//!
//! Stored layout: one JSON object a record, `journal/<20 digits>.json`: `{"format":1,"attempt":"<32 hex>","at":"<RFC
//! 3339>","node":"<node id>","record":{"kind":"committed",…}}`. `at` is for people: no decision reads it. Fields may be
//! added with a serde default, never renamed or removed. A float that is no JSON number (a loss may well be NaN) is the
//! text `"NaN"`, `"inf"` or `"-inf"`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{EarlyStop, Reached};
use crate::{
    config::RunConfig,
    ids::{AttemptId, DatasetId, Generation, NodeId, NodeKey, Rank, RunId, Step, WorldSize},
};

/// The highest version of the layout that is read. Each record is written in the lowest version that can hold it
/// ([`Record::format`]), so that an older program reads a journal up to the first record that is new to it.
pub const FORMAT: u32 = 7;

/// The longest record that is accepted or written: the first one carries the configuration and a model's `config.json`.
pub const MAX_ENTRY: u64 = 4 << 20;

/// Why an object is not a journal record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEntry {
    /// Written by a newer version of this program.
    #[error("has format {found}, and this version reads up to {FORMAT}")]
    Newer {
        /// Its format.
        found: u32,
    },
    /// Not a record at all.
    #[error("is not a journal record: {0}")]
    Garbled(String),
}

/// One numbered object of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The version of this layout; readers refuse a higher one.
    pub format: u32,
    /// The writer and its attempt: settles an append whose answer was lost.
    pub attempt: AttemptId,
    /// The writer's wall clock.
    pub at: Timestamp,
    /// The writer.
    pub node: NodeId,
    /// The content.
    pub record: Record,
}

impl Entry {
    /// Reads a stored record.
    pub fn decode(body: &[u8]) -> Result<Self, InvalidEntry> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let garbled = |error: serde_json::Error| InvalidEntry::Garbled(error.to_string());
        // First, since a newer layout need not resemble this one in anything else.
        let Version { format } = serde_json::from_slice(body).map_err(garbled)?;
        if format > FORMAT {
            return Err(InvalidEntry::Newer { found: format });
        }
        let entry: Self = serde_json::from_slice(body).map_err(garbled)?;
        let least = entry.record.format();
        if format < least {
            return Err(InvalidEntry::Garbled(format!("it has format {format}, and holds what format {least} added")));
        }
        Ok(entry)
    }

    /// The bytes that are stored. A record that could not be read back is an error here, before it is written.
    pub fn encode(&self) -> Result<Vec<u8>, InvalidEntry> {
        let body = serde_json::to_vec(self).map_err(|error| InvalidEntry::Garbled(error.to_string()))?;
        if body.len() as u64 > MAX_ENTRY {
            return Err(InvalidEntry::Garbled(format!("{} bytes are more than {MAX_ENTRY}", body.len())));
        }
        Self::decode(&body)?;
        Ok(body)
    }
}

/// The content of a journal entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// The run exists. Always number 0, and only there.
    Created {
        /// The run's own id, so that a copied journal can't pass for another run.
        run_id: RunId,
        /// The resolved configuration. Since format 5 it may have adapters, with the files of their base; since format
        /// 6 a rule by which the run stops early, or a program's own task; since format 7 caps, or shards.
        config: Box<RunConfig>,
    },
    /// A group of nodes exists. Written before the resume point is used.
    Formed {
        /// Higher than every generation before it.
        generation: Generation,
        /// The nodes, the leader first.
        roster: Vec<RosterEntry>,
        /// Workers of all nodes.
        world_size: WorldSize,
        /// The one checkpoint that every rank loads; `None`: from the beginning.
        resume: Option<ResumePoint>,
        /// Settings changed with `--set` for this generation and all later ones. Since format 6 they may have a rule
        /// by which the run stops early, since format 7 caps, shards and newer settings.
        #[serde(default)]
        overrides: Vec<(String, String)>,
        /// Why this generation was formed.
        #[serde(default)]
        reason: FormedReason,
        /// The data that it is trained on; `None`: not recorded, in journals of earlier versions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data: Option<DatasetId>,
        /// The generation whose group goes on in this one; `None`: a person started or resumed the run. Since format 4.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        continues: Option<Generation>,
        /// The nodes of that generation that are not in this one. Since format 4.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        gone: Vec<Gone>,
        /// The nodes of this generation that were not in that one. Since format 4.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        joined: Vec<NodeId>,
        /// The reason in words, where `reason` has none for it: the states of the ranks differed. Earlier programs do
        /// not read it, and miss nothing that they act on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// A checkpoint exists.
    Committed(Committed),
    /// A notice: a node may go away.
    Notice {
        /// The generation that received it.
        generation: Generation,
        /// Its source: `sigterm`, `aws-spot`, …
        source: String,
        /// Seconds left when it was received, if known.
        #[serde(default, with = "float::option")]
        deadline_s: Option<f64>,
        /// What it announces.
        #[serde(default)]
        means: Means,
    },
    /// A generation ended before the last step.
    Interrupted {
        /// The generation that ended.
        generation: Generation,
        /// The last finished step.
        step: Step,
        /// The newest checkpoint's step.
        committed: Option<Step>,
        /// `step` less `committed`: the steps to do again.
        lost_steps: u64,
        /// Why, and the outcome of the emergency save.
        verdict: String,
        /// How the drain went, if there was one.
        #[serde(default)]
        drain: Option<Box<Drain>>,
        /// The cap that the run has reached, if that ended it. Since format 7: an earlier program would train on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cap: Option<Reached>,
    },
    /// A checkpoint was found damaged and is not used again.
    Damaged {
        /// Its step.
        step: Step,
        /// The generation that wrote it.
        generation: Generation,
        /// The object and what is wrong with it.
        reason: String,
    },
    /// The last step is committed.
    Completed {
        /// The generation that finished.
        generation: Generation,
        /// The last step.
        step: Step,
        /// Its loss; `None`, since format 3: it has none.
        #[serde(default, with = "float::option")]
        loss: Option<f64>,
        /// Why the run has no more steps, if it stopped early. Since format 6: an earlier program would train on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        early: Option<EarlyStop>,
    },
    /// The run can't go on without a person.
    Failed {
        /// The generation that failed.
        generation: Generation,
        /// The last finished step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// A checkpoint is about to be deleted; it is no longer one.
    Pruned {
        /// Its step.
        step: Step,
        /// The generation that wrote it.
        generation: Generation,
    },
    /// The same of several at once. Since format 2; see [`Record::pruned`].
    PrunedMany {
        /// The checkpoints, at least one.
        checkpoints: Vec<ResumePoint>,
    },
    /// A checkpoint that had been found damaged was read whole: it is good again. Since format 2.
    Cleared {
        /// Its step.
        step: Step,
        /// The generation that wrote it.
        generation: Generation,
    },
}

/// A checkpoint exists: the journal's most important record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// The finished step whose state it holds.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The manifest's key, relative to the run.
    pub manifest: String,
    /// CRC64-NVME of the manifest's bytes, 16 hex digits.
    pub manifest_crc64: String,
    /// Bytes of all shards.
    pub bytes: u64,
    /// The step's training loss; `None`, since format 3: it has none.
    #[serde(default, with = "float::option")]
    pub loss: Option<f64>,
    /// The step's validation loss, if it was measured. Earlier versions wrote the newest one, of whatever step.
    #[serde(default, with = "float::option")]
    pub validation_loss: Option<f64>,
    /// Other figures of the step, by name. Since format 3.
    #[serde(default, with = "float::map", skip_serializing_if = "Metrics::is_empty")]
    pub metrics: Metrics,
    /// What the save cost.
    pub cost: SaveCost,
}

/// Figures of a step beside its loss, by name.
pub type Metrics = BTreeMap<String, f64>;

/// The cost of one save, in seconds; the slowest rank's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SaveCost {
    /// How long the train loop waited.
    #[serde(with = "float")]
    pub stall_s: f64,
    /// How long copying into the images took, hidden or not.
    #[serde(with = "float")]
    pub copy_s: f64,
    /// From the end of the step to the `committed` record.
    #[serde(with = "float")]
    pub durable_s: f64,
    /// From the `formed` record of its generation to this one, by a monotonic clock; 0: not known.
    #[serde(default, with = "float", skip_serializing_if = "is_unknown")]
    pub lived_s: f64,
}

fn is_unknown(seconds: &f64) -> bool {
    *seconds == 0.0
}

/// What a notice announces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Means {
    /// The machine goes away.
    Interruption,
    /// Somebody asks the run to stop.
    #[default]
    Stop,
    /// The machine is more likely than others to go away.
    Rebalance,
}

/// The plan of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainPlan {
    /// Save the newest step whole.
    FullSave,
    /// A save of the newest step is under way: finish it.
    OnlyMissing,
    /// There is no time for the newest step: finish the save that is under way.
    FinishInFlight,
    /// There is no time for any save: the steps since the newest checkpoint will be lost.
    StopEarly,
}

impl DrainPlan {
    /// The name as stored.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FullSave => "full_save",
            Self::OnlyMissing => "only_missing",
            Self::FinishInFlight => "finish_in_flight",
            Self::StopEarly => "stop_early",
        }
    }
}

/// How a drain went: expected and actual. Times are seconds from the moment at which the notice was received.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// The source of the notice: `aws-spot`, `sigterm`, …
    pub source: String,
    /// The time left when it was received, if known.
    #[serde(default, with = "float::option")]
    pub deadline_s: Option<f64>,
    /// The last plan that was made.
    pub plan: DrainPlan,
    /// Why that plan, in words and numbers.
    pub reason: String,
    /// When the plan was made, seconds from the notice: spare time is first used for training. `None`: not recorded.
    #[serde(default, with = "float::option")]
    pub planned_s: Option<f64>,
    /// When the last step was expected to be durable; `None`: nothing was to be saved, or its cost was not known.
    #[serde(default, with = "float::option")]
    pub predicted_s: Option<f64>,
    /// When it was durable; `None`: it never was.
    #[serde(default, with = "float::option")]
    pub actual_s: Option<f64>,
    /// The events, in order.
    #[serde(default)]
    pub timeline: Vec<Happened>,
}

/// One moment of a drain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Happened {
    /// Seconds from the notice.
    #[serde(with = "float")]
    pub after_s: f64,
    /// The event, a short sentence without a full stop.
    pub what: String,
}

/// One node of a generation: a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RosterEntry {
    /// The node.
    pub node: NodeId,
    /// Its workers; 0: a spare, for which the batch has no share.
    pub workers: u32,
    /// The rank of its first worker; the others follow. Since format 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_rank: Option<Rank>,
    /// Where the others reach its agent: `host:port`. Since format 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The key by which they know it there. Since format 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<NodeKey>,
}

impl RosterEntry {
    /// A node that is alone in its generation, and needs no place in it.
    pub const fn new(node: NodeId, workers: u32) -> Self {
        Self { node, workers, first_rank: None, address: None, key: None }
    }
}

/// A node that a generation goes on without.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// The node.
    pub node: NodeId,
    /// Why, for people: no decision reads it.
    pub why: String,
}

/// How a generation follows from the one before it: the words of a `formed` record that say so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Succession {
    /// The generation whose group goes on; `None`: a person started or resumed the run.
    pub continues: Option<Generation>,
    /// Its nodes that are gone.
    pub gone: Vec<Gone>,
    /// The nodes that have come.
    pub joined: Vec<NodeId>,
    /// What differed between the states of the ranks, if that has ended the generation before.
    pub why: Option<String>,
}

impl Succession {
    /// Whether it has words of a run with several nodes.
    pub const fn is_of_several(&self) -> bool {
        self.continues.is_some() || !self.gone.is_empty() || !self.joined.is_empty()
    }
}

/// The checkpoint that a generation starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumePoint {
    /// Its step.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
}

/// Why a generation was formed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FormedReason {
    /// A `run`, `resume` or `boot` command.
    #[default]
    Started,
    /// A worker died and its group was started again.
    WorkerDied,
    /// A node died, or could not be reached. Since format 4.
    NodeLost,
    /// A node left as it had announced. Since format 4.
    NodeLeft,
    /// A node came. Since format 4.
    NodeJoined,
}

/// Floats of any value.
pub(super) mod float {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Stored {
        Number(f64),
        Text(String),
    }

    impl From<f64> for Stored {
        fn from(value: f64) -> Self {
            if value.is_finite() { Self::Number(value) } else { Self::Text(value.to_string()) }
        }
    }

    impl Stored {
        fn value<E: Error>(self) -> Result<f64, E> {
            match self {
                Self::Number(value) => Ok(value),
                Self::Text(text) => match text.as_str() {
                    "NaN" => Ok(f64::NAN),
                    "inf" => Ok(f64::INFINITY),
                    "-inf" => Ok(f64::NEG_INFINITY),
                    _ => Err(E::custom("a float is a number, \"NaN\", \"inf\" or \"-inf\"")),
                },
            }
        }
    }

    pub(in crate::journal) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        Stored::from(*value).serialize(serializer)
    }
    pub(in crate::journal) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Stored::deserialize(deserializer)?.value()
    }

    pub(super) mod option {
        use super::{Deserialize, Deserializer, Serialize, Serializer, Stored};

        pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
            value.map(Stored::from).serialize(serializer)
        }
        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
            Option::<Stored>::deserialize(deserializer)?.map(Stored::value).transpose()
        }
    }

    pub(super) mod map {
        use std::collections::BTreeMap;

        use super::{Deserialize, Deserializer, Serializer, Stored};

        pub fn serialize<S: Serializer>(values: &BTreeMap<String, f64>, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_map(values.iter().map(|(name, value)| (name, Stored::from(*value))))
        }
        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
            let stored = BTreeMap::<String, Stored>::deserialize(deserializer)?;
            stored.into_iter().map(|(name, value)| Ok((name, value.value()?))).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(loss: f64) -> Entry {
        let committed = Committed {
            step: Step(3),
            generation: Generation(1),
            manifest: "m".into(),
            manifest_crc64: "0".into(),
            bytes: 1,
            loss: Some(loss),
            validation_loss: Some(loss),
            metrics: Metrics::from([("perplexity".to_owned(), loss)]),
            cost: SaveCost { stall_s: loss, ..SaveCost::default() },
        };
        Entry {
            format: FORMAT,
            attempt: AttemptId::random(),
            at: Timestamp::UNIX_EPOCH,
            node: NodeId::random(),
            record: Record::Committed(committed),
        }
    }

    #[test]
    fn a_loss_that_json_has_no_number_for_is_read_back() {
        for loss in [0.1 + 0.2, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, f64::MIN_POSITIVE] {
            let body = entry(loss).encode().unwrap();
            let Record::Committed(read) = Entry::decode(&body).unwrap().record else { panic!("another record") };
            assert_eq!(read.loss.unwrap().to_bits(), loss.to_bits());
            assert_eq!(read.metrics["perplexity"].to_bits(), loss.to_bits());
            assert_eq!(read.validation_loss.unwrap().to_bits(), loss.to_bits());
            assert_eq!(read.cost.stall_s.to_bits(), loss.to_bits());
        }
    }

    #[test]
    fn a_newer_format_is_named_whatever_else_it_holds() {
        let error = Entry::decode(br#"{"format":8,"something":"else"}"#).unwrap_err();
        assert_eq!(error, InvalidEntry::Newer { found: 8 });
    }

    #[test]
    fn garbled_bodies_are_errors() {
        let good = entry(1.0).encode().unwrap();
        for cut in 0..good.len() {
            assert!(Entry::decode(&good[..cut]).is_err(), "{cut}");
        }
        for bad in [&b""[..], b"{}", b"[]", b"\xff\xfe", b"null", br#"{"format":-1}"#, br#"{"format":1}"#] {
            assert!(matches!(Entry::decode(bad), Err(InvalidEntry::Garbled(_))), "{bad:?}");
        }
        let text = String::from_utf8(good).unwrap();
        assert!(Entry::decode(text.replace("committed", "promised").as_bytes()).is_err());
        assert!(Entry::decode(text.replace("\"loss\":1.0", "\"loss\":\"many\"").as_bytes()).is_err());
    }

    #[test]
    fn a_record_says_the_lowest_format_that_can_hold_it() {
        let Record::Committed(full) = entry(1.0).record else { panic!("another record") };
        let plain = Committed { metrics: Metrics::new(), ..full.clone() };
        let lossless = Committed { loss: None, ..plain.clone() };
        let completed = |loss| Record::Completed { generation: Generation(1), step: Step(3), loss, early: None };
        for (record, format) in [
            (Record::Committed(plain), 1),
            (Record::Committed(full), 3),
            (Record::Committed(lossless), 3),
            (completed(Some(f64::NAN)), 1),
            (completed(None), 3),
        ] {
            assert_eq!(record.format(), format, "{record:?}");
            let stored = Entry { format, record, ..entry(1.0) };
            let body = stored.encode().unwrap();
            // As text: a NaN is not equal to itself.
            assert_eq!(format!("{:?}", Entry::decode(&body).unwrap()), format!("{stored:?}"));
            // An older program would read the newer kind as garbled: so it does not say an older format.
            let older = String::from_utf8(body).unwrap().replace("\"format\":3", "\"format\":2");
            assert_eq!(Entry::decode(older.as_bytes()).is_err(), format == 3, "{older}");
        }
    }

    #[test]
    fn what_an_earlier_version_knows_no_word_for_is_newer_to_it() {
        use crate::journal::testing::{created, formed};
        assert_eq!((created().format(), formed(1, None).format()), (1, 1));
        let Record::Created { run_id, mut config } = created() else { panic!("another record") };
        config.workload.parallel.strategy = crate::config::Strategy::Shard;
        assert_eq!(Record::Created { run_id, config }.format(), 7);
        for (key, value, format) in [
            ("parallel.strategy", "shard", 7),
            ("parallel.strategy", "zero1", 1),
            ("train.activations", "block", 7),
            ("checkpoint.slots", "1", 7),
            ("run.max_hours", "2", 7),
            ("train.steps", "9", 1),
        ] {
            let mut record = formed(1, None);
            if let Record::Formed { overrides, .. } = &mut record {
                *overrides = vec![(key.into(), value.into())];
            }
            assert_eq!(record.format(), format, "{key}={value}");
        }
    }

    #[test]
    fn a_record_with_a_loss_and_nothing_else_is_written_as_ever() {
        let Record::Committed(full) = entry(0.5).record else { panic!("another record") };
        let plain = Record::Committed(Committed { metrics: Metrics::new(), validation_loss: None, ..full.clone() });
        assert_eq!(
            serde_json::to_string(&plain).unwrap(),
            r#"{"kind":"committed","step":3,"generation":1,"manifest":"m","manifest_crc64":"0","bytes":1,"loss":0.5,"validation_loss":null,"cost":{"stall_s":0.5,"copy_s":0.0,"durable_s":0.0}}"#
        );
        let completed = Record::Completed { generation: Generation(1), step: Step(3), loss: Some(0.5), early: None };
        assert_eq!(
            serde_json::to_string(&completed).unwrap(),
            r#"{"kind":"completed","generation":1,"step":3,"loss":0.5}"#
        );
        let lossless = Record::Committed(Committed { loss: None, ..full });
        let text = serde_json::to_string(&lossless).unwrap();
        assert!(text.contains(r#""loss":null,"validation_loss":0.5,"metrics":{"perplexity":0.5},"cost""#), "{text}");
    }

    #[test]
    fn a_record_that_is_too_long_is_not_written() {
        let mut long = entry(1.0);
        long.record = Record::Damaged { step: Step(1), generation: Generation(1), reason: "x".repeat(5 << 20) };
        assert!(long.encode().is_err());
    }
}
