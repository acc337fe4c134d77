//! The effects that the state machine of a generation asks for, and the ways on which answers come back.
//!
//! [`Effects`] are plain values that [`StateMachine::handle`](super::phase::StateMachine::handle) gives back. Those of
//! [`Effect::Nodes`] are orders that every node carries out for its own workers and memory ([`super::node`]); all
//! others are for the group, and its leader performs them ([`super::lead`]). None of them waits: an effect that takes
//! time runs as a task of its own, whose end comes back as an [`Event`]. An immediate answer is an event, too.
//!
//! All effects of one event are performed, in order, also those after one that fails; a failure is answered by
//! [`Event::Lost`]. Only then does the generation end, if it does.

use std::time::Duration;

use futures::FutureExt;
use tokio::sync::mpsc;

use super::{
    generation::End,
    phase::Event,
    save::{gather::Fetched, haste::Change, ledger::Transfer, upload::SaveEvent},
    workers::WorkerEvent,
};
use crate::{
    checkpoint::CheckpointError,
    error::Result,
    ids::{Generation, NodeId, Step},
    journal::{Record, SaveCost},
    protocol::ToWorker,
    report,
    snapshot::{mode::Choice, plan::TensorSpec},
    storage::Crc64,
};

/// What every node of a generation does for its own workers and memory.
#[derive(Clone, Debug)]
pub enum Order {
    /// Tell every worker.
    TellAll(ToWorker),
    /// Size the slots for this node's part of this state, and tell each worker where it writes. Answered by
    /// [`Event::LaidOut`].
    LayOut(Vec<TensorSpec>),
    /// The fetched checkpoint lies in its slot: hold it there for workers that crash.
    Received,
    /// A slot's snapshot is committed: hold it for workers that crash. A member of a group holds its own part by
    /// itself, as soon as that is in the store.
    Hold {
        /// The slot.
        slot: u8,
        /// Its checkpoint's step.
        step: Step,
        /// The generation that wrote it.
        generation: Generation,
        /// The checksum of every file, by name.
        checksums: Vec<(String, Crc64)>,
    },
    /// Kill all workers; no effect if already done.
    Kill,
}

/// One thing to do.
#[derive(Debug)]
pub enum Effect {
    /// An order to every node.
    Nodes(Order),
    /// This checkpoint was restored from, so every byte of its tensors was verified against its checksums.
    Vouch {
        /// Its step.
        step: Step,
        /// The generation that wrote it.
        generation: Generation,
    },
    /// Upload a slot and commit it. Followed by [`Event::Save`].
    Upload(Transfer),
    /// The cost of the save under way so far.
    Cost(SaveCost),
    /// Answer with [`Event::Retry`] later.
    Retry {
        /// The slot whose upload has failed.
        slot: u8,
        /// The pause.
        after: Duration,
    },
    /// Check whether the run is still ours. A bad answer is [`Event::Lost`].
    Look,
    /// Append a notice's record, if the journal is free.
    Note(Record),
    /// From now on the store and the journal are reserved for the last saves.
    Hush,
    /// Whether the store has more important work than checking kept checkpoints: a restore, or a save.
    Busy(bool),
    /// Delete the checkpoints that are no longer wanted.
    Prune,
    /// These other nodes compute or remember wrongly: they end, and the group goes on without them.
    LeaveOut {
        /// The nodes.
        nodes: Vec<NodeId>,
        /// What was found.
        why: String,
    },
    /// Give the save under way up: it has not ended in this many seconds, and all nodes wait for it.
    GiveUpSave {
        /// Seconds.
        after_s: u64,
    },
    /// Tell people.
    Report(report::Event),
    /// Write to the log.
    Log(Log),
}

/// A line of the log.
#[derive(Debug)]
pub enum Log {
    /// The model is built.
    Built {
        /// The device that rank 0 computes on.
        device: String,
        /// Trained parameters.
        parameters: u64,
        /// Workers on this node.
        workers: u32,
    },
    /// The way in which captures are made from now on.
    Chosen(Choice),
    /// Why a notice leaves time to train on.
    TrainsOn(String),
    /// Whether saves yield to training from now on.
    Haste(Change),
}

/// All effects of one event, in order, and how the generation has ended, if it has.
#[must_use]
#[derive(Debug, Default)]
pub struct Effects {
    list: Vec<Effect>,
    end: Option<Result<End>>,
}

impl Effects {
    /// Adds an effect after those before it.
    pub fn push(&mut self, effect: Effect) {
        self.list.push(effect);
    }

    /// The same effects, and then the end.
    pub fn ending(self, end: Result<End>) -> Self {
        Self { end: Some(end), ..self }
    }

    /// The effects, in order, and how the generation has ended.
    pub fn into_parts(self) -> (Vec<Effect>, Option<Result<End>>) {
        (self.list, self.end)
    }

    /// The effects, in order.
    #[cfg(test)]
    pub fn list(&self) -> &[Effect] {
        &self.list
    }

    /// How the generation has ended.
    #[cfg(test)]
    pub fn end(&self) -> Option<&Result<End>> {
        self.end.as_ref()
    }
}

/// Where the tasks of a generation report what has happened.
pub struct Senders {
    /// Reports from workers.
    pub workers: mpsc::UnboundedSender<WorkerEvent>,
    /// Results of uploads.
    pub saves: mpsc::UnboundedSender<SaveEvent>,
    /// The result of the fetch.
    pub fetched: mpsc::UnboundedSender<Result<Fetched, CheckpointError>>,
    /// All other events.
    pub later: mpsc::UnboundedSender<Event>,
}

/// What the tasks of a generation report.
pub struct Answers {
    workers: mpsc::UnboundedReceiver<WorkerEvent>,
    saves: mpsc::UnboundedReceiver<SaveEvent>,
    fetched: mpsc::UnboundedReceiver<Result<Fetched, CheckpointError>>,
    later: mpsc::UnboundedReceiver<Event>,
}

/// Both ends, for one generation.
pub fn channels() -> (Senders, Answers) {
    let (to_workers, workers) = mpsc::unbounded_channel();
    let (to_saves, saves) = mpsc::unbounded_channel();
    let (to_fetched, fetched) = mpsc::unbounded_channel();
    let (to_later, later) = mpsc::unbounded_channel();
    let senders = Senders { workers: to_workers, saves: to_saves, fetched: to_fetched, later: to_later };
    (senders, Answers { workers, saves, fetched, later })
}

impl Answers {
    /// The next event. May be dropped at any moment: nothing is lost.
    pub async fn next(&mut self) -> Event {
        tokio::select! {
            biased;
            Some(event) = self.workers.recv() => Event::Worker(event),
            Some(event) = self.saves.recv() => Event::Save(event),
            Some(result) = self.fetched.recv() => Event::Fetched(result),
            Some(event) = self.later.recv() => event,
            else => std::future::pending().await,
        }
    }

    /// An event that has come already, if there is one.
    pub fn ready(&mut self) -> Option<Event> {
        self.next().now_or_never()
    }
}
