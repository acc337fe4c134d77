//! The typed messages between an agent and its workers.
//!
//! They travel over a Unix stream socket that the worker inherits: 4 bytes little-endian length, then JSON. Either side
//! treats the end of the stream as the death of the other: an agent restarts the group, a worker exits at once.
//!
//! Order of a worker's life: `Start` → (`Listening` by rank 0, `Peers` to all) → `Built` → `Layout` → (`Restore`) →
//! `Ready` → `Go` → steps → `Stopped`. A step report is the only message of the step loop, and it does not wait.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    config::RunConfig,
    ids::{DatasetId, Generation, Rank, Step, WorldSize},
    snapshot::{
        mode::CaptureMode,
        plan::{ImagePlan, TensorSpec},
    },
};

/// The longest message that is accepted: a plan of a model with very many tensors is a few MiB.
pub const MAX_MESSAGE: u32 = 64 << 20;

/// The descriptors of the node's two slots in a worker; its standard input is the control socket.
pub const SLOT_FDS: [i32; 2] = [3, 4];
/// The hidden subcommand that makes this binary a worker.
pub const WORKER_SUBCOMMAND: &str = "worker";

/// From the agent to a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToWorker {
    /// The worker's identity and its task. Always first.
    Start(Box<Assignment>),
    /// Where rank 0's c10d store listens.
    Peers {
        /// Address of the node that has rank 0.
        host: String,
        /// Its port.
        port: u16,
    },
    /// The layout of the worker's image; both slots have room for it now.
    Layout {
        /// Your image.
        plan: Box<ImagePlan>,
        /// Its first byte in each slot; a multiple of the page.
        base: u64,
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
    },
    /// Hold at the next step boundary and report the last step started; see [`crate::worker::gate`].
    Freeze {
        /// Echoed in the answer.
        ticket: u64,
    },
    /// Go on, with these orders added.
    Thaw {
        /// Saves to take; none is for a step already passed.
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
    /// The slot: 0 or 1.
    pub slot: u8,
    /// Whether the loop waits for the copy.
    #[serde(default)]
    pub mode: CaptureMode,
}

/// A worker's identity and task.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Assignment {
    /// Its rank in the world.
    pub rank: Rank,
    /// Its rank on its node; picks its GPU.
    pub local_rank: Rank,
    /// Workers of all nodes.
    pub world_size: WorldSize,
    /// The generation.
    pub generation: Generation,
    /// The run's configuration, overrides applied.
    pub config: RunConfig,
    /// Local folder that holds the token shards.
    pub data_dir: std::path::PathBuf,
    /// The data that must be there.
    pub data: DatasetId,
    /// The step whose state is loaded; 0: a fresh start.
    pub resume_step: Step,
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
    Ready,
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
    },
    /// The loop waited for the capture of `step` before it could change the state.
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
        /// Sum of its sequences' mean losses.
        #[serde(with = "bits")]
        loss_sum: f64,
        /// Its sequences.
        sequences: u64,
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

/// A finished step, as one rank saw it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step.
    pub step: Step,
    /// Mean loss over this rank's sequences.
    #[serde(with = "bits")]
    pub loss: f64,
    /// 2-norm of the whole gradient before clipping, the same on every rank.
    #[serde(with = "bits")]
    pub grad_norm: f64,
    /// Learning rate used.
    pub lr: f64,
    /// Seconds from the end of the step before.
    pub step_s: f64,
    /// Seconds of them spent waiting for a capture.
    pub stall_s: f64,
    /// Seconds of them spent waiting for data.
    pub data_s: f64,
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

/// Writes one message, reusing `buffer`.
pub fn write_message<T: Serialize>(to: &mut impl Write, message: &T, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.extend_from_slice(&[0; 4]);
    serde_json::to_writer(&mut *buffer, message)?;
    let len = u32::try_from(buffer.len() - 4).ok().filter(|&len| len <= MAX_MESSAGE);
    let len = len.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "message too long"))?;
    buffer[..4].copy_from_slice(&len.to_le_bytes());
    to.write_all(buffer)
}

/// Reads one message; `None` at a clean end of the stream.
pub fn read_message<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut len = [0; 4];
    let mut have = 0;
    while have < len.len() {
        match from.read(&mut len[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(more) => have += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let len = u32::from_le_bytes(len);
    if len > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("message of {len} bytes")));
    }
    // Memory is allocated as bytes arrive, not as the length promises.
    let mut body = Vec::new();
    from.take(len.into()).read_to_end(&mut body)?;
    if body.len() < len as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(serde_json::from_slice(&body)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_trip_and_a_nan_loss_too() {
        let report = StepReport {
            step: Step(3),
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            lr: 1e-3,
            step_s: 0.5,
            stall_s: 0.0,
            data_s: 0.0,
        };
        let mut wire = Vec::new();
        let mut buffer = Vec::new();
        write_message(&mut wire, &FromWorker::Step(report), &mut buffer).unwrap();
        write_message(&mut wire, &FromWorker::Ready, &mut buffer).unwrap();
        let mut wire = wire.as_slice();
        let Some(FromWorker::Step(back)) = read_message(&mut wire).unwrap() else { panic!("not a step") };
        assert!(back.loss.is_nan() && back.grad_norm.is_infinite() && back.step == Step(3));
        assert!(matches!(read_message(&mut wire).unwrap(), Some(FromWorker::Ready)));
        assert!(read_message::<FromWorker>(&mut wire).unwrap().is_none());
    }

    #[test]
    fn a_hostile_length_is_an_error_not_an_allocation() {
        let wire = [0xff; 8];
        assert!(read_message::<FromWorker>(&mut wire.as_slice()).is_err());
    }
}
