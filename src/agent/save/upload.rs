//! From a full slot to a checkpoint: shards, receipt, manifest, then the `committed` record.
//!
//! Runs as a task beside the event loop, one at a time. It uploads the very pages that the workers wrote; they are lent
//! to it, and given back when it ends.
//!
//! *Crash:* either a checkpoint stands, or garbage that nobody reads. *Retry:* a failure is reported and the run trains
//! on; the same snapshot is tried again after a pause, unless a newer one waits by then
//! ([`Scheduler::uploaded`](super::scheduler::Scheduler::uploaded)). Losing the run to another writer is final.
//! *Cancel:* nothing more is written, but requests already sent to the store may land.

use bytes::Bytes;
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
};

use crate::{
    checkpoint::save::{Save, Upload, put_manifest, put_shards},
    error::{Error, Kind, Result},
    faults::{self, At},
    ids::{AttemptId, Generation, NodeId, RunId, Step, WorldSize},
    journal::{Committed, JournalWriter, Record, SaveCost, Urgency},
    storage::{Crc64, Store},
    workload::Figures,
};

/// The facts that stay the same from save to save within one generation.
#[derive(Clone, Debug)]
pub struct Context {
    /// The run's folder in the store.
    pub run: Store,
    /// The run.
    pub run_id: RunId,
    /// This node.
    pub node: NodeId,
    /// The generation.
    pub generation: Generation,
    /// When it was formed.
    pub formed: tokio::time::Instant,
    /// Workers of all nodes.
    pub world_size: WorldSize,
    /// Shared with all tasks of this process that append.
    pub journal: JournalWriter,
}

/// One snapshot on its way.
#[derive(Debug)]
pub struct Snapshot {
    /// Its step.
    pub step: Step,
    /// Its slot.
    pub slot: u8,
    /// The shards: pages of the slot, on every rank.
    pub uploads: Vec<Upload>,
    /// The small files beside them.
    pub small: Vec<(String, Bytes)>,
    /// The step's figures.
    pub figures: Figures,
    /// Its validation loss, if it was measured.
    pub validation_loss: Option<f64>,
    /// The event loop's figures about it; read when the record is written.
    pub cost: watch::Receiver<SaveCost>,
    /// When the step ended.
    pub taken: tokio::time::Instant,
}

/// Events of a save.
#[derive(Debug)]
pub enum SaveEvent {
    /// This many more bytes have reached the store.
    Progress {
        /// The snapshot's step.
        step: Step,
        /// Bytes.
        bytes: u64,
    },
    /// It has ended.
    Ended {
        /// The snapshot's step.
        step: Step,
        /// Its slot.
        slot: u8,
        /// The checkpoint in the store, or why there is none.
        result: Result<Saved>,
    },
}

/// A save that is committed.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Its record.
    pub committed: Committed,
    /// The checksum of every file, by name.
    pub checksums: Vec<(String, Crc64)>,
}

/// Starts saving `snapshot`; the outcome goes to `events`. The handle cancels it: nothing more of it is written then,
/// but requests already sent to the store may land.
pub fn start(context: Context, snapshot: Snapshot, events: mpsc::UnboundedSender<SaveEvent>) -> AbortHandle {
    let (step, slot) = (snapshot.step, snapshot.slot);
    // A task of its own: in every case the event loop must hear of its end, or it would never save again.
    let saving = tokio::spawn({
        let events = events.clone();
        async move { save(&context, snapshot, &events).await }
    });
    let give_up = saving.abort_handle();
    tokio::spawn(async move {
        let result = match saving.await {
            Ok(result) => result,
            Err(error) => Err(Error::from_source(Kind::Bug, error).context(format!("save step {step}"))),
        };
        let _ = events.send(SaveEvent::Ended { step, slot, result });
    });
    give_up
}

async fn save(context: &Context, snapshot: Snapshot, events: &mpsc::UnboundedSender<SaveEvent>) -> Result<Saved> {
    let Snapshot { step, uploads, small, figures, validation_loss, cost, taken, .. } = snapshot;
    let bytes = uploads.iter().map(|upload| upload.body.len() as u64).sum();
    // Every file of the checkpoint: this node is the only one, so its files are all there are.
    let expected: Vec<String> =
        uploads.iter().map(|upload| upload.name.clone()).chain(small.iter().map(|(name, _)| name.clone())).collect();
    let save = Save {
        attempt: AttemptId::random(),
        run_id: context.run_id.clone(),
        step,
        generation: context.generation,
        node: context.node.clone(),
        world_size: context.world_size,
        uploads,
        small,
    };
    let progress = {
        let events = events.clone();
        move |bytes| {
            let _ = events.send(SaveEvent::Progress { step, bytes });
        }
    };
    let receipt = put_shards(&context.run, &save, progress).await?;
    let checksums = receipt.files.iter().map(|file| (file.name.clone(), file.crc64)).collect();
    let manifest = put_manifest(&context.run, &save, &[receipt], &expected).await?;
    faults::check("save.before-record", At { rank: None, step: Some(step.get()) })
        .map_err(|fault| Error::from_source(Kind::Bug, fault))?;
    let cost = {
        let mut cost = *cost.borrow();
        cost.durable_s = taken.elapsed().as_secs_f64();
        cost.lived_s = context.formed.elapsed().as_secs_f64();
        cost
    };
    let committed = Committed {
        step,
        generation: context.generation,
        manifest: manifest.key,
        manifest_crc64: manifest.crc64,
        bytes,
        loss: figures.loss,
        validation_loss,
        metrics: figures.metrics,
        cost,
    };
    context.journal.append(Urgency::Commit, Record::Committed(committed.clone())).await?;
    Ok(Saved { committed, checksums })
}
