//! The records of a run's journal.
//!
//! Stored layout: one JSON object a record, `journal/<20 digits>.json`:
//! `{"format":1,"attempt":"<32 hex>","at":"<RFC 3339>","node":"<node id>","record":{"kind":"committed",…}}`.
//! `at` is for people: no decision reads it. Fields may be added with a serde default, never renamed or removed.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    config::RunConfig,
    ids::{AttemptId, Generation, NodeId, RunId, Step, WorldSize},
};

/// One numbered object of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Version of this layout; readers refuse a higher one.
    pub format: u32,
    /// Who wrote it, to the attempt: settles an append whose answer was lost.
    pub attempt: AttemptId,
    /// The writer's wall clock.
    pub at: Timestamp,
    /// The writer.
    pub node: NodeId,
    /// What is now true.
    pub record: Record,
}

/// What a journal entry says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// The run exists. Always number 0, and only there.
    Created {
        /// The run's own id, so that a copied journal can't pass for another run.
        run_id: RunId,
        /// The resolved configuration.
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
        /// Settings changed with `--set` for this generation and all later ones.
        #[serde(default)]
        overrides: Vec<(String, String)>,
        /// Why this generation was formed.
        #[serde(default)]
        reason: FormedReason,
    },
    /// A checkpoint exists.
    Committed(Committed),
    /// A warning came that a node goes away.
    Notice {
        /// The generation that heard it.
        generation: Generation,
        /// What said so: `sigterm`, `aws-spot`, …
        source: String,
        /// Seconds left when it was heard, where known.
        deadline_s: Option<f64>,
    },
    /// A generation ended before the last step.
    Interrupted {
        /// The generation that ended.
        generation: Generation,
        /// The last finished step.
        step: Step,
        /// The newest checkpoint's step.
        committed: Option<Step>,
        /// `step` less `committed`: what is done again.
        lost_steps: u64,
        /// Why, and what became of the emergency save.
        verdict: String,
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
        /// Its loss.
        loss: f64,
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
    /// The step's training loss.
    pub loss: f64,
    /// The newest validation loss, if there is one.
    #[serde(default)]
    pub validation_loss: Option<f64>,
    /// What the save cost.
    pub cost: SaveCost,
}

/// What one save cost, in seconds; the slowest rank's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SaveCost {
    /// The train loop waited.
    pub stall_s: f64,
    /// Copying into the images took, hidden or not.
    pub copy_s: f64,
    /// From the end of the step to the `committed` record.
    pub durable_s: f64,
}

/// One node of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RosterEntry {
    /// The node.
    pub node: NodeId,
    /// Its workers.
    pub workers: u32,
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
}
