//! This node's part of a generation: its workers, its slots, its part of each save. Every node has one.
//!
//! The generation's leader ([`super::lead`]) decides for the group, and gives [`Order`]s that every node carries out;
//! what happens here comes back as an [`Event`]. A node knows which ranks are its own (`ids::NodeRanks`): it lays out
//! and uploads their files alone, and gives one receipt for them.
//!
//! Owns: worker processes, the fetch of the state to load, the upload of this node's files. The snapshot slots outlive
//! the generation, and are lent to it. Decides nothing.
//!
//! *Crash:* the workers die with their agent; files without a record are garbage. *Retry:* an order that fails is
//! answered, and the leader decides. *Cancel:* [`Node::ends_workers`] and the methods before it end all work under way;
//! requests already sent to the store may land.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinHandle},
};

use super::{
    effects::Order,
    generation::{Load, Plan, Source},
    keep::Kept,
    phase::{Event, Incoming},
    save::{
        gather::{Fetch, Fetched, Fetching},
        put::{self, Put},
        slots::{LaidOut, RESTORE_SLOT, Slots},
        upload,
    },
    traces::Traces,
    workers::Workers,
};
use crate::{
    checkpoint::{CheckpointError, save::Save},
    error::Result,
    ids::{AttemptId, NodeId, Step},
    protocol::ToWorker,
    rendezvous::channel::bulk::Wanted,
    snapshot::plan::TensorSpec,
    storage::Priority,
};

/// How long workers may take to exit when asked to.
const GRACE: Duration = Duration::from_secs(5);
/// How long killed processes may take to be gone. One that hangs in the kernel never is.
const GONE: Duration = Duration::from_secs(10);

/// A part of a save, as the leader orders it.
#[derive(Clone, Debug)]
pub struct Part {
    /// The leader's attempt; every node's receipt names it.
    pub attempt: AttemptId,
    /// The snapshot's step.
    pub step: Step,
    /// Its slot.
    pub slot: u8,
    /// Its priority against other work.
    pub priority: Priority,
    /// The small files beside the shards; the leader's part alone has them.
    pub small: Vec<(String, Bytes)>,
}

/// This node's workers.
#[derive(Debug)]
pub struct Crew {
    /// The processes.
    pub workers: Workers,
    /// They have lived in the generation before: see [`super::keep`].
    pub regroups: bool,
    /// And they have the state that this one starts from.
    pub keeps_state: bool,
}

/// This node's part of a generation.
pub struct Node<'a> {
    start: &'a Plan,
    slots: &'a mut Slots,
    /// `None`: they are being killed, or were kept.
    workers: Option<Workers>,
    /// They have the state that the generation starts from.
    keeps_state: bool,
    killing: Option<JoinHandle<()>>,
    /// The fetch of the state to load, if there is one.
    fetching: Fetching,
    /// This node's part of the save begun last.
    putting: Option<AbortHandle>,
}

impl<'a> Node<'a> {
    /// With its workers, which are given their assignments.
    pub fn begin(start: &'a Plan, slots: &'a mut Slots, crew: Crew) -> Result<Self> {
        let Crew { workers, regroups, keeps_state } = crew;
        let (ranks, generation) = (start.upload.ranks, start.upload.generation);
        for local in ranks.locals() {
            let assignment = start.workload.assignment(local, ranks, generation, start.load.step(), start.store)?;
            let assignment = Box::new(assignment);
            let place = if regroups {
                ToWorker::Regroup { assignment, keeps: keeps_state }
            } else {
                ToWorker::Start(assignment)
            };
            workers.tell(local, place);
        }
        let (workers, fetching) = (Some(workers), Fetching::default());
        Ok(Self { start, slots, workers, keeps_state, killing: None, fetching, putting: None })
    }

    /// Starts fetching the state to load, while the workers start; `done` hears of its end. A state held by a slot is
    /// already there; in a group `done` hears of that, too.
    pub fn load(&mut self, done: mpsc::UnboundedSender<Result<Fetched, CheckpointError>>) -> Result<Incoming> {
        let incoming = self.begin_loading(done)?;
        if let Some(wanted) = self.wanted() {
            self.slots.lend(wanted, self.start.upload.members.iter().cloned().collect())?;
        }
        Ok(incoming)
    }

    /// What this generation's nodes read from each other; `None`: it is alone.
    fn wanted(&self) -> Option<Wanted> {
        let Load::Checkpoint { step, generation: of, .. } = self.start.load else { return None };
        let generation = self.start.upload.generation;
        (self.start.upload.members.len() > 1).then_some(Wanted { generation, step, of })
    }

    fn begin_loading(&mut self, done: mpsc::UnboundedSender<Result<Fetched, CheckpointError>>) -> Result<Incoming> {
        let part = u64::from(self.start.config.storage.part_mib) << 20;
        if let (Load::Checkpoint { step, generation, .. }, true) = (&self.start.load, self.keeps_state) {
            // The workers have it. If no slot does, the first save may be into any.
            let slot = self.slots.holder(*step, *generation).unwrap_or(RESTORE_SLOT);
            let nothing = Fetched { bytes: 0, stored: 0, lent: 0, seconds: 0.0 };
            if self.wanted().is_none() {
                return Ok(Incoming::Here(slot, Vec::new(), nothing));
            }
            let _ = done.send(Ok(nothing));
            return Ok(Incoming::UnderWay(slot, Vec::new()));
        }
        self.fetching = match &self.start.load {
            Load::Nothing => return Ok(Incoming::Nothing),
            Load::Checkpoint { from: Source::Slot { slot, files }, .. } => {
                let bytes = files.iter().map(|(_, len)| len).sum();
                let fetched = Fetched { bytes, stored: 0, lent: 0, seconds: 0.0 };
                if self.wanted().is_none() {
                    return Ok(Incoming::Here(*slot, files.clone(), fetched));
                }
                // Others may still fetch: the ranks load when the leader has heard of all nodes.
                let _ = done.send(Ok(fetched));
                return Ok(Incoming::UnderWay(*slot, files.clone()));
            }
            Load::Weights { folder, files } => {
                self.slots.receive(files.clone(), part)?.start(folder.clone(), String::new(), None, done)
            }
            Load::Checkpoint { step, generation, from: Source::Store { folder, files } } => {
                let run = self.start.upload.run.clone();
                if self.start.nearest {
                    let fetch = self.slots.receive_beside(*step, *generation, files.clone(), part)?;
                    let neighbours = self.start.neighbours.clone().zip(self.wanted());
                    Fetch { neighbours, ..fetch }.start(run, folder.clone(), Some(*step), done)
                } else {
                    self.slots.receive(files.clone(), part)?.start(run, folder.clone(), None, done)
                }
            }
        };
        Ok(Incoming::UnderWay(self.fetching.slot, self.fetching.places.clone()))
    }

    /// Carries out an order; returns the immediate answer, if there is one.
    pub fn perform(&mut self, order: Order) -> Option<Event> {
        match order {
            // They have the state.
            Order::TellAll(ToWorker::Restore { .. }) if self.keeps_state => {}
            Order::TellAll(message) => {
                if let Some(workers) = &self.workers {
                    workers.tell_all(&message);
                }
            }
            Order::LayOut(tensors) => return Some(self.lay_out(&tensors).unwrap_or_else(Event::Lost)),
            Order::Received => {
                // All members have it, and captures are next.
                self.slots.stop_lending();
                if let Load::Checkpoint { step, generation, from: Source::Store { files, .. } } = &self.start.load
                    && !self.keeps_state
                {
                    let Fetching { slot, places, .. } = &self.fetching;
                    self.slots.received(*step, *generation, *slot, places, files);
                }
            }
            Order::Hold { slot, step, generation, checksums } => self.slots.hold(slot, step, generation, &checksums),
            Order::Kill => {
                if let Some(workers) = self.workers.take() {
                    let upload::Context { run, node, generation, ranks, .. } = self.start.upload.clone();
                    let collectives = Arc::clone(&self.start.collectives);
                    let traces = Traces { collectives, run, node, generation, ranks };
                    self.killing = Some(tokio::spawn(async move {
                        let told = traces.ask().await;
                        workers.kill().await;
                        if !told.is_empty() {
                            tokio::spawn(async move { traces.keep(told).await });
                        }
                    }));
                }
            }
        }
        None
    }

    fn lay_out(&mut self, tensors: &[TensorSpec]) -> Result<Event> {
        let ranks = self.start.upload.ranks;
        let mut bytes = 0;
        let laid_out = self.slots.lay_out(tensors, ranks)?;
        let slots = self.slots.count();
        for LaidOut { rank, stored, copies } in laid_out {
            bytes += stored;
            if let (Some(workers), Some(local)) = (&self.workers, ranks.local(rank)) {
                workers.tell(local, ToWorker::Layout { slots, copies });
            }
        }
        Ok(Event::LaidOut { bytes })
    }

    /// Starts uploading this node's part of a save; `says` hears of its progress and its end.
    pub fn put(&mut self, part: Part, says: mpsc::UnboundedSender<Put>) -> Result<()> {
        let Part { attempt, step, slot, priority, small } = part;
        let context = &self.start.upload;
        let save = Save {
            attempt,
            run_id: context.run_id.clone(),
            step,
            generation: context.generation,
            node: context.node.clone(),
            world_size: context.ranks.world,
            uploads: self.slots.uploads(slot)?,
            small,
        };
        self.putting = Some(put::start(context.run.clone().at_priority(priority), save, says));
        Ok(())
    }

    /// The index of the weights, and the names of all shards of a checkpoint, over all nodes.
    pub fn outline(&self) -> Result<(Bytes, Vec<String>)> {
        self.slots.outline()
    }

    /// The upload under way is given up: nothing more of it is written.
    pub fn gives_up_save(&mut self) {
        if let Some(putting) = self.putting.take() {
            putting.abort();
        }
    }

    /// The fetch under way is given up.
    pub fn stops_fetching(&mut self) {
        self.fetching.stop();
    }

    /// Whether all workers have stopped after this step.
    pub fn has_stopped_after(&self, step: Step) -> bool {
        self.workers.as_ref().is_some_and(|workers| workers.stopped_after() == Some(step))
    }

    /// Keeps the workers for the next generation, if they can be kept: [`Node::ends_workers`] then ends nobody. The
    /// last step of the generation is committed.
    pub fn keeps_workers(&mut self) -> Option<Kept> {
        let keeping = self.start.keeping(self.slots);
        match keeping.take(self.workers.take()?) {
            Ok(kept) => Some(kept),
            Err(workers) => {
                self.workers = Some(workers);
                None
            }
        }
    }

    /// This node leaves, and these stay: until they have read what its slots have of the checkpoint of the last step,
    /// which is committed. `None`: there is none, or others have all of it in their own memory.
    pub fn lends(&self, stay: &[NodeId]) -> Option<impl Future<Output = ()> + Send + 'static> {
        let keeping = self.start.keeping(self.slots);
        if stay.is_empty() || keeping.workload.is_replicated() {
            return None;
        }
        let (step, of) = keeping.checkpoint(self.workers.as_ref()?.stopped_after()?)?;
        let (generation, readers) = (keeping.generation.next(), stay.iter().cloned().collect::<BTreeSet<_>>());
        self.slots.lend(Wanted { generation, step, of }, readers.clone()).ok()?;
        let shelf = Arc::clone(self.slots.shelf());
        Some(async move { shelf.is_read_by(&readers).await })
    }

    /// Ends the workers: asks them to exit (`dismisses`), or kills them. The result waits for a bounded time until they
    /// are gone, and says whether they are.
    pub fn ends_workers(&mut self, dismisses: bool) -> impl Future<Output = bool> + Send + 'static {
        let workers = self
            .workers
            .take()
            .map(|workers| if dismisses { tokio::spawn(workers.dismiss(GRACE)) } else { tokio::spawn(workers.kill()) });
        let processes = [workers, self.killing.take()];
        async move {
            let mut gone = true;
            for process in processes.into_iter().flatten() {
                if tokio::time::timeout(GONE, process).await.is_err() {
                    tracing::warn!("worker processes were killed and are not gone yet");
                    gone = false;
                }
            }
            gone
        }
    }

    /// Waits for a bounded time until the workers that were killed are gone: by then each has said how it ended.
    pub async fn killed(&mut self) {
        if let Some(killing) = &mut self.killing
            && tokio::time::timeout(GONE, killing).await.is_ok()
        {
            self.killing = None;
        }
    }

    /// Another generation may follow; `workers_are_gone`: see [`Slots::end_generation`].
    pub async fn leaves_slots(&mut self, workers_are_gone: bool) -> Result<()> {
        self.slots.end_generation(workers_are_gone).await
    }
}
