//! The messages, and the order in which they come.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{
    ids::{Fingerprint, Generation, LocalRank, Rank, SlotCount, Step, WorldSize},
    snapshot::{
        mode::CaptureMode,
        plan::{SlotCopy, TensorSpec},
    },
};

/// The descriptors of the node's slots in a worker: of as many as there are. Its standard input is the control socket.
pub const SLOT_FDS: [i32; 2] = [3, 4];
/// The descriptor of the weights that adapters are trained beside, if there are any.
pub const BASE_FD: i32 = 5;
/// The hidden subcommand that makes this binary a worker.
pub const WORKER_SUBCOMMAND: &str = "worker";

/// From the agent to a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToWorker {
    /// The worker's identity and its task. Always first.
    Start(Box<Assignment>),
    /// To a worker that has said [`FromWorker::Stopped`] and whose state is saved: its place in the next generation, of
    /// the same task. It leaves its peers, and everything up to [`ToWorker::Go`] follows as after a start.
    Regroup {
        /// Its place.
        assignment: Box<Assignment>,
        /// Its state is the one that the generation starts from: it keeps it, and is told no [`ToWorker::Restore`].
        keeps: bool,
    },
    /// Where rank 0's c10d store listens.
    Peers {
        /// Address of the node that has rank 0.
        host: String,
        /// Its port.
        port: u16,
    },
    /// What the worker copies at each save, and where to; the slots have room for it now.
    Layout {
        /// The number of slots.
        slots: SlotCount,
        /// In a slot; the same in each.
        copies: Vec<SlotCopy>,
    },
    /// A slot holds the state to load, verified: load it.
    Restore {
        /// The slot.
        slot: u8,
        /// Each file's first byte and length in the slot.
        files: Vec<(u64, u64)>,
        /// Weights only, from a model folder; moments start at zero.
        weights_only: bool,
    },
    /// Train.
    Go {
        /// Saves already decided.
        saves: Vec<SaveOrder>,
        /// How long ranks of several nodes wait for each other in their first step, seconds.
        first_s: u64,
        /// Measure the held-out loss of the loaded state first: it was to be measured, and was not.
        #[serde(default, skip_serializing_if = "is_false")]
        measure: bool,
    },
    /// The state of `step` is no reason to stop early. Every state that is measured, and the loaded one, waits for this
    /// or for its end, if the run may stop early.
    Proceed {
        /// The step.
        step: Step,
    },
    /// Hold at the next step boundary and report the last step started; see [`crate::worker::gate`].
    Freeze {
        /// Echoed in the answer.
        ticket: u64,
    },
    /// Go on; these save orders replace all earlier ones.
    Thaw {
        /// All save orders in force; this rank may have obeyed one already.
        saves: Vec<SaveOrder>,
        /// Stop after this step; never one already passed.
        stop_after: Option<Step>,
    },
    /// Exit now; nothing more is wanted.
    Exit,
}

/// Capture a step's state into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveOrder {
    /// The step after which the state is copied.
    pub step: Step,
    /// The slot, from 0.
    pub slot: u8,
    /// Whether the loop waits for the copy.
    pub mode: CaptureMode,
    /// Whether the rank also says the fingerprint of what all ranks have.
    #[serde(default, skip_serializing_if = "is_false")]
    pub compare: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(value: &bool) -> bool {
    !value
}

/// A worker's identity and task.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Assignment {
    /// Its rank in the world.
    pub rank: Rank,
    /// Its rank on its node; picks its GPU.
    pub local_rank: LocalRank,
    /// Workers of all nodes.
    pub world_size: WorldSize,
    /// The generation.
    pub generation: Generation,
    /// The step whose state is loaded; 0: a fresh start.
    pub resume_step: Step,
    /// Where rank 0 serves the ranks' store: an address of its node; port 0: one of the kernel's choice.
    pub store: SocketAddr,
    /// Whether other nodes have ranks, too.
    #[serde(default)]
    pub several_nodes: bool,
    /// What it computes: JSON that the agent passes on and does not read.
    pub task: serde_json::Value,
}

/// From a worker to its agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromWorker {
    /// Rank 0's c10d store listens here.
    Listening {
        /// Its port.
        port: u16,
    },
    /// The model is built; this is its whole state, the same list on every rank.
    Built {
        /// Every tensor of the state.
        tensors: Vec<TensorSpec>,
        /// The device: `cpu`, `cuda:0`.
        device: String,
        /// Trained parameters.
        parameters: u64,
    },
    /// State is loaded, peers are connected.
    Ready {
        /// Of what all ranks have; `None`: there is one rank.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fingerprint: Option<Fingerprint>,
        /// What its start was spent on.
        #[serde(default)]
        split: StartSplit,
    },
    /// Held; this step is the last one started.
    Frozen {
        /// The question's ticket.
        ticket: u64,
        /// The last step started.
        started: Step,
    },
    /// A step is finished.
    Step(StepReport),
    /// A step's state is in its slot.
    Captured {
        /// The step.
        step: Step,
        /// The slot.
        slot: u8,
        /// How long copying took, seconds.
        copy_s: f64,
        /// Of what all ranks have at this step, if it was asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fingerprint: Option<Fingerprint>,
    },
    /// The loop, or a GPU in its place, waited for the capture of `step` before the state could change.
    Stalled {
        /// The captured step.
        step: Step,
        /// Seconds waited.
        stall_s: f64,
    },
    /// This rank's share of a validation is done.
    Validated {
        /// After this step.
        step: Step,
        /// The sums of each source of the data; one without a name, if the data has no sources.
        sums: Vec<HeldOutSum>,
    },
    /// The loop has ended after this step: the last one, or the one it was told to stop after.
    Stopped {
        /// The last finished step.
        step: Step,
    },
    /// It can't go on. Sent once, before it exits.
    Failed {
        /// The message for people.
        message: String,
        /// How to fix it, if known.
        hint: Option<String>,
        /// Starting again will not help: wrong configuration, a vocabulary that does not fit.
        permanent: bool,
    },
}

/// One rank's share of a source's held-out loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOutSum {
    /// The source's name; empty: the data has no sources.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Sum of the losses of its targets.
    #[serde(with = "bits")]
    pub loss: f64,
    /// Its targets.
    pub targets: u64,
}

impl HeldOutSum {
    /// Nothing yet, of this source.
    pub fn of(source: &str) -> Self {
        Self { source: source.to_owned(), loss: 0.0, targets: 0 }
    }
}

/// A finished step, as one rank saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step.
    pub step: Step,
    /// This rank's part of the step's loss: the mean of it over all ranks is the mean over all sequences of the step.
    #[serde(with = "bits")]
    pub loss: f64,
    /// 2-norm of the whole gradient before clipping, the same on every rank.
    #[serde(with = "bits")]
    pub grad_norm: f64,
    /// Learning rate used.
    pub lr: f64,
    /// Seconds from the end of the step before.
    pub step_s: f64,
    /// Seconds of them spent waiting for a capture, or for a fingerprint.
    pub stall_s: f64,
    /// What they were spent on, in this rank's loop or on its device.
    #[serde(default)]
    pub split: Split,
    /// What this rank has and uses; only in reports of some steps, the same ones on every rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// What a step's time was spent on, seconds. What is missing to the step's time lies between two steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Split {
    /// Waiting for batches, and moving them to the device.
    pub data_s: f64,
    /// Forward passes.
    pub forward_s: f64,
    /// Backward passes, with the reduction of gradients as far as it is hidden behind them.
    pub backward_s: f64,
    /// The reduction of gradients beyond the backward pass.
    pub reduce_s: f64,
    /// Waiting for a copy of the state, before it changes.
    pub capture_s: f64,
    /// The gradient's norm, the update, and the exchange of weights as far as somebody waits for it.
    pub optimizer_s: f64,
}

/// What the start of a worker was spent on, seconds. What is missing to the time from its process to `Ready` was spent
/// on its libraries and its data, or waiting for its agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StartSplit {
    /// Making the model and the optimizer's state.
    pub model_s: f64,
    /// Making the process group, from the word where it meets to the end of the first collective.
    pub group_s: f64,
    /// Mapping the slots; on a GPU with taking and pinning their memory.
    pub slots_s: f64,
    /// Copying the state into tensors.
    pub load_s: f64,
    /// The fingerprint of what all ranks have.
    pub compare_s: f64,
}

impl StartSplit {
    /// The longer time of each part.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            model_s: self.model_s.max(other.model_s),
            group_s: self.group_s.max(other.group_s),
            slots_s: self.slots_s.max(other.slots_s),
            load_s: self.load_s.max(other.load_s),
            compare_s: self.compare_s.max(other.compare_s),
        }
    }
}

/// What a rank has and uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Floating-point operations that its device can make in a second at the run's precision; `None`: not known.
    pub peak_flops: Option<f64>,
    /// Of its GPU; `None`: it computes on the CPU.
    pub device: Option<DeviceUsage>,
    /// Bytes of its process in the host's memory, with the parts of both slots that it has touched.
    pub host_bytes: u64,
    /// The most of them at any time.
    pub host_peak_bytes: u64,
}

/// Bytes of a GPU's memory, the most at any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceUsage {
    /// In tensors.
    pub allocated: u64,
    /// Taken from the device by LibTorch's allocator.
    pub reserved: u64,
    /// All that the device has.
    pub total: u64,
}

/// Floats by their bits: JSON has no NaN, and a non-finite loss must still arrive, since it stops the run.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(value.to_bits())
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        u64::deserialize(deserializer).map(f64::from_bits)
    }
}
