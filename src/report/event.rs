//! A run's typed events. Code emits these; one reporter draws them.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    config::Shares,
    ids::{Generation, RunId, Step, WorldSize},
};

/// What a step's time was spent on, seconds, by the rank that the others wait for; and the memory used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spent {
    /// Waiting for batches.
    pub data_s: f64,
    /// Forward passes.
    pub forward_s: f64,
    /// Backward passes, with the reduction of gradients behind them.
    pub backward_s: f64,
    /// The reduction beyond them.
    pub reduce_s: f64,
    /// Waiting for a copy of the state, before it changes.
    pub capture_s: f64,
    /// The update.
    pub optimizer_s: f64,
    /// The share of what the devices can compute that the model needed (model FLOPs utilisation); absent: not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Measured at few steps.
    #[serde(flatten)]
    pub memory: Option<Memory>,
}

/// Bytes that a rank uses; the most of any rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// In tensors of a GPU, the most at any time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_peak_bytes: Option<u64>,
    /// Taken from the GPU by LibTorch, the most at any time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_reserved_bytes: Option<u64>,
    /// Of the worker in the host's memory, with the parts of both slots that it has touched.
    pub host_bytes: u64,
    /// The most of them at any time.
    pub host_peak_bytes: u64,
}

/// What the journal counts of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// The run; absent before anything is known of it.
    pub run_id: Option<RunId>,
    /// Generations that were formed.
    pub generations: u64,
    /// Checkpoints that were ever committed.
    pub checkpoints: u64,
    /// The newest step that any of them has.
    pub durable: Step,
    /// Generations that ended before the last step, and said so.
    pub interruptions: u64,
    /// Steps that these lost.
    pub lost_steps: u64,
    /// Restarts because a worker had died.
    pub worker_restarts: u64,
}

/// What the time from a `formed` record to the end of the first step was spent on, seconds; of the slowest rank or
/// node.
/// Workers start, build and meet while the state is fetched, so the parts overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StartParts {
    /// From the record until this node's workers were started: nodes are told of it meanwhile.
    pub invite_s: f64,
    /// From there until every worker had built its model: processes, libraries, data, and the model.
    pub built_s: f64,
    /// Of that, making the model and the optimizer's state.
    pub model_s: f64,
    /// Making the process group.
    pub group_s: f64,
    /// Mapping the slots; on a GPU with taking and pinning their memory.
    pub slots_s: f64,
    /// Fetching and verifying the state; absent: there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fetch_s: Option<f64>,
    /// Copying it into tensors.
    pub load_s: f64,
    /// Comparing what all ranks have.
    pub compare_s: f64,
    /// From the word to go to the end of the first step.
    pub step_s: f64,
    /// From the record to the end of the first step.
    pub total_s: f64,
}

/// One event. Serialised, it is one line of `--json`: fields may be added, never renamed.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// What the journal counts so far, before a group of workers begins. Only for displays.
    Counted(Box<Counted>),
    /// A group of workers exists and continues to train.
    Formed {
        /// The generation.
        generation: Generation,
        /// Workers of all nodes.
        world_size: WorldSize,
        /// The checkpoint that it starts from.
        resume_step: Option<Step>,
        /// Steps of the whole run.
        total_steps: u64,
        /// The sequences of each rank, if they are not the same.
        #[serde(skip_serializing_if = "Option::is_none")]
        shares: Option<Shares>,
        /// Nodes, of a run that may have several.
        #[serde(skip_serializing_if = "Option::is_none")]
        nodes: Option<u32>,
        /// The node that leads it, if that is another one.
        #[serde(skip_serializing_if = "Option::is_none")]
        leader: Option<String>,
    },
    /// A step is finished.
    Step {
        /// The step.
        step: Step,
        /// Mean loss over the global batch.
        loss: f64,
        /// Learning rate.
        lr: f64,
        /// 2-norm of the gradient before clipping.
        grad_norm: f64,
        /// Tokens trained on since the run began.
        tokens: u64,
        /// Over this step.
        tokens_per_s: f64,
        /// The slowest rank's step time.
        step_s: f64,
        /// The slowest rank's wait for a capture, within `step_s`.
        stall_s: f64,
        /// Steps since the newest checkpoint: what a kill now would cost.
        lag_steps: u64,
        /// Seconds since the newest checkpoint was committed, or since training began.
        lag_s: f64,
        /// What the time was spent on.
        #[serde(flatten)]
        spent: Option<Box<Spent>>,
    },
    /// The validation loss was measured.
    Validation {
        /// After this step.
        step: Step,
        /// Mean loss over the sequences kept for validation.
        loss: f64,
        /// The same of each source of the data, if its inputs have names.
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        sources: BTreeMap<String, f64>,
    },
    /// Bytes of a save have reached the store.
    Upload {
        /// The save's step.
        step: Step,
        /// Bytes so far.
        sent: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A checkpoint is committed.
    Checkpoint {
        /// The step.
        step: Step,
        /// The generation.
        generation: Generation,
        /// Bytes of its shards.
        bytes: u64,
        /// How long the train loop waited.
        stall_s: f64,
        /// How long copying into the images took.
        copy_s: f64,
        /// From the end of the step to the `committed` record.
        durable_s: f64,
    },
    /// The agent that had this run died without a last record; this one continues.
    FoundDead {
        /// Its node.
        node: String,
        /// The generation that it had formed.
        generation: Generation,
        /// Whether it was a process of this machine; `None`: it left no such information.
        same_machine: Option<bool>,
        /// Its process id there.
        pid: Option<u32>,
        /// The newest checkpoint: finished steps after it are lost.
        checkpoint: Option<Step>,
    },
    /// Another live agent has this run: this one waits until it is gone, or the run is complete.
    Standby {
        /// Its node.
        node: String,
    },
    /// This node's workers have lived through a planned change of their group, and go on in this generation.
    Kept {
        /// The step whose state they have.
        step: Step,
        /// How many there are.
        workers: u32,
        /// They load that state all the same, since each rank has a part of it that depends on the others.
        loads: bool,
    },
    /// State was loaded from a checkpoint.
    Restored {
        /// Its step.
        step: Step,
        /// Bytes loaded.
        bytes: u64,
        /// How long fetching and verifying took.
        fetch_s: f64,
        /// From the start of the fetch until every rank has loaded it.
        restore_s: f64,
        /// Where it was read: `store`, or `memory` if snapshot slots still held all of it.
        from: &'static str,
        /// Of a generation of several nodes: the most bytes that any of them read from other nodes' memory.
        #[serde(skip_serializing_if = "Option::is_none")]
        peer_bytes: Option<u64>,
        /// The same: the most that any of them read from the store.
        #[serde(skip_serializing_if = "Option::is_none")]
        store_bytes: Option<u64>,
    },
    /// The first step of a group is finished.
    FirstStep {
        /// The step.
        step: Step,
        /// The group.
        generation: Generation,
        /// What the time since its `formed` record was spent on.
        #[serde(flatten)]
        parts: Box<StartParts>,
    },
    /// This machine goes away or is likely to, or this run is asked to stop.
    Notice {
        /// Its source.
        source: String,
        /// Seconds left, if known.
        deadline_s: Option<f64>,
        /// What it announces: `interruption`, `stop`, or `rebalance` (save now, train on).
        means: &'static str,
        /// Whether that time is certain. If not, it is only reported, and no save is given up because of it.
        binding: bool,
    },
    /// The response to a notice before this node leaves.
    Drain {
        /// The plan: `full_save`, `only_missing`, `finish_in_flight` or `stop_early`.
        plan: &'static str,
        /// Seconds until the machine goes away, if known.
        left_s: Option<f64>,
        /// Seconds until the save is expected to be durable, if known.
        predicted_s: Option<f64>,
        /// Why.
        reason: String,
    },
    /// No step has finished for long.
    NoProgress {
        /// The last finished step.
        step: Step,
        /// Seconds since something moved.
        quiet_s: f64,
        /// Finished steps that no checkpoint holds yet.
        lag_steps: u64,
        /// Seconds since the last committed step was finished.
        lag_s: f64,
    },
    /// A worker died; its group is started again.
    WorkerDied {
        /// The last finished step.
        step: Step,
        /// The cause, as far as known.
        reason: String,
        /// Restarts so far.
        restarts: u32,
        /// Seconds until the next start.
        backoff_s: f64,
    },
    /// The run ended before its last step.
    Interrupted {
        /// The last finished step.
        step: Step,
        /// Steps that will be done again.
        lost_steps: u64,
        /// The cap that the run has reached, if that is why: what was used, and the setting.
        #[serde(skip_serializing_if = "Option::is_none")]
        cap: Option<String>,
    },
    /// The last step is committed.
    Completed {
        /// The last step.
        step: Step,
        /// Its loss, if it has one.
        loss: Option<f64>,
        /// Why the run has no more steps, if it stopped early.
        #[serde(skip_serializing_if = "Option::is_none")]
        early: Option<String>,
    },
    /// A message for people that stops nothing: a checkpoint that was skipped.
    Warning {
        /// The message, with its place.
        message: String,
    },
    /// Events are missing here: the reader of `--json` stalled for long, or the output accepted nothing. Steps are
    /// dropped first. Only the writer of the lines creates this.
    Dropped {
        /// Events of steps.
        steps: u64,
        /// Other events.
        others: u64,
    },
    /// The current activity while nothing else can be shown: "downloading token shards".
    Phase {
        /// A verb phrase.
        doing: String,
    },
}
