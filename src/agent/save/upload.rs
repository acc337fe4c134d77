//! From full slots to a checkpoint: every node's shards and receipt, then the manifest, then the `committed` record.
//!
//! The leader's task beside the event loop, one at a time. Each node puts the files of its own ranks
//! ([`put`](super::put)); when the last has ended, this writes the manifest from all receipts and appends the record.
//!
//! # Invariant
//! A save ends when it has ended on *every* node, whether or not it went well there: until then a node may still read
//! the pages of its slot, which is given out again after the end.
//!
//! *Crash:* either a checkpoint stands, or garbage that nobody reads. *Retry:* a failure is reported and the run trains
//! on; the same snapshot is tried again after a pause, as another attempt, unless a newer one waits by then
//! ([`Scheduler::uploaded`](super::scheduler::Scheduler::uploaded)). Losing the run to another writer is final.
//! *Cancel:* nothing more is written, but requests already sent to the store may land.

use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
};

use super::{fault::Standing, put::Put};
use crate::{
    checkpoint::save::{Receipt, Save, put_manifest},
    error::{Error, Kind, Result},
    faults::{self, At},
    ids::{AttemptId, Generation, NodeId, NodeRanks, RunId, Step},
    journal::{Committed, JournalWriter, Record, SaveCost, Urgency},
    metrics::Recorder,
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
    /// This node's ranks.
    pub ranks: NodeRanks,
    /// The nodes of the generation, this one included.
    pub members: Vec<NodeId>,
    /// Shared with all tasks of this process that append.
    pub journal: JournalWriter,
}

/// One snapshot on its way.
#[derive(Debug)]
pub struct Snapshot {
    /// The save's attempt, which every receipt names.
    pub attempt: AttemptId,
    /// Its step.
    pub step: Step,
    /// Its slot.
    pub slot: u8,
    /// The name of every file of the checkpoint, over all nodes.
    pub expected: Vec<String>,
    /// The step's figures.
    pub figures: Figures,
    /// Its validation loss, if it was measured.
    pub validation_loss: Option<f64>,
    /// The event loop's figures about it; read when the record is written.
    pub cost: watch::Receiver<SaveCost>,
    /// When the step ended.
    pub taken: tokio::time::Instant,
    /// Hears how the parts of all nodes stand; at the beginning all are missing.
    pub standing: watch::Sender<Standing>,
    /// The figures of its step and those before it.
    pub recorder: Recorder,
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

/// Commits `snapshot` once `puts` reports that every node has uploaded its part; the outcome goes to `events`. The
/// handle cancels it: nothing more is written then, but requests already sent to the store may land.
pub fn start(
    context: Context,
    snapshot: Snapshot,
    puts: mpsc::UnboundedReceiver<Put>,
    events: mpsc::UnboundedSender<SaveEvent>,
) -> AbortHandle {
    let (step, slot) = (snapshot.step, snapshot.slot);
    // A task of its own: in every case the event loop must hear of its end, or it would never save again.
    let saving = tokio::spawn({
        let events = events.clone();
        async move { save(&context, snapshot, puts, &events).await }
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

/// Gathers the ends of all nodes' parts.
#[derive(Debug)]
struct Parts {
    standing: watch::Sender<Standing>,
    receipts: Vec<Receipt>,
    /// The first failure.
    failed: Option<Error>,
}

impl Parts {
    fn of(standing: watch::Sender<Standing>) -> Self {
        Self { standing, receipts: Vec::new(), failed: None }
    }

    /// A node's part has ended. Only its first word about that counts.
    fn ended(&mut self, node: &NodeId, result: Result<Receipt>) {
        let ok = result.is_ok();
        let first = self.standing.send_if_modified(|standing| {
            let first = standing.missing.remove(node);
            if first && !ok {
                standing.failed.insert(node.clone());
            }
            first
        });
        if !first {
            return;
        }
        match result {
            Ok(receipt) => self.receipts.push(receipt),
            Err(error) => _ = self.failed.get_or_insert(error),
        }
    }

    /// The receipts of all nodes, or the first failure, once every part has ended.
    fn whole(&mut self) -> Option<Result<Vec<Receipt>>> {
        let ended = self.standing.borrow().missing.is_empty();
        ended.then(|| match self.failed.take() {
            Some(error) => Err(error),
            None => Ok(std::mem::take(&mut self.receipts)),
        })
    }
}

/// Waits until every node's part has ended.
async fn gather(
    step: Step,
    standing: watch::Sender<Standing>,
    mut puts: mpsc::UnboundedReceiver<Put>,
    events: &mpsc::UnboundedSender<SaveEvent>,
) -> Result<Vec<Receipt>> {
    let mut parts = Parts::of(standing);
    loop {
        if let Some(whole) = parts.whole() {
            return whole;
        }
        match puts.recv().await {
            Some(Put::Progress(bytes)) => _ = events.send(SaveEvent::Progress { step, bytes }),
            Some(Put::Ended(node, result)) => parts.ended(&node, result),
            None => return Err(Error::new(Kind::Bug, format!("a node gave up its part of the save of step {step}"))),
        }
    }
}

async fn save(
    context: &Context,
    snapshot: Snapshot,
    puts: mpsc::UnboundedReceiver<Put>,
    events: &mpsc::UnboundedSender<SaveEvent>,
) -> Result<Saved> {
    let Snapshot { attempt, step, expected, figures, validation_loss, cost, taken, standing, recorder, .. } = snapshot;
    let recorded = recorder.put(step);
    let receipts = gather(step, standing, puts, events).await?;
    let files = || receipts.iter().flat_map(|receipt| &receipt.files);
    let checksums = files().map(|file| (file.name.clone(), file.crc64)).collect();
    let bytes = Receipt::shard_bytes(&receipts);
    let save = Save {
        attempt,
        run_id: context.run_id.clone(),
        step,
        generation: context.generation,
        node: context.node.clone(),
        world_size: context.ranks.world,
        uploads: Vec::new(),
        small: Vec::new(),
    };
    let manifest = put_manifest(&context.run, &save, &receipts, &expected).await?;
    // What a checkpoint contains has its figures in the store, too.
    recorded.arrived().await;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        agent::save::put,
        checkpoint::{
            catalog,
            testing::{self, config, memory_store},
        },
        ids::{Rank, WorldSize},
        journal::{Formed, FormedReason, Journal, RosterEntry, Succession},
    };

    /// A snapshot of two nodes, that the first commits.
    struct TwoNodes {
        context: Context,
        parts: [Save; 2],
        expected: Vec<String>,
        says: mpsc::UnboundedSender<Put>,
        events: mpsc::UnboundedReceiver<SaveEvent>,
        /// Of the snapshot's cost.
        _cost: watch::Sender<SaveCost>,
    }

    impl TwoNodes {
        /// The leader waits for both parts.
        async fn begin() -> Self {
            let run = memory_store();
            let whole = testing::save(4, 1, 2, 1);
            let (run_id, node, other) = (whole.run_id.clone(), whole.node.clone(), NodeId::random());
            let mut journal = Journal::create(run.clone(), node.clone(), run_id.clone(), config()).await.unwrap();
            let formed = Formed {
                roster: [&node, &other].map(|node| RosterEntry::new(node.clone(), 1)).into(),
                world_size: WorldSize(2),
                resume: None,
                overrides: Vec::new(),
                reason: FormedReason::Started,
                data: None,
                succession: Succession::default(),
            };
            let generation = journal.form(formed).await.unwrap();
            let context = Context {
                run,
                run_id,
                node: node.clone(),
                generation,
                formed: tokio::time::Instant::now(),
                ranks: NodeRanks { first: Rank(0), workers: 1, world: WorldSize(2) },
                members: vec![node, other.clone()],
                journal: JournalWriter::start(journal),
            };
            let expected = testing::expected(&whole);
            let (uploads, small) = (whole.uploads.clone(), whole.small.clone());
            let of = |second: bool| uploads.iter().filter(move |upload| upload.name.contains("-00002-of") == second);
            let second = Save { node: other, uploads: of(true).cloned().collect(), small: Vec::new(), ..whole.clone() };
            let first = Save { uploads: of(false).cloned().collect(), small, ..whole };
            let (says, puts) = mpsc::unbounded_channel();
            let (to_events, events) = mpsc::unbounded_channel();
            let (cost, costs) = watch::channel(SaveCost::default());
            let snapshot = Snapshot {
                attempt: first.attempt.clone(),
                step: first.step,
                slot: 1,
                expected: expected.clone(),
                figures: Figures { loss: Some(1.5), ..Figures::default() },
                validation_loss: None,
                cost: costs,
                taken: tokio::time::Instant::now(),
                standing: watch::channel(Standing::of(context.members.clone())).0,
                recorder: Recorder::new(&context.run, generation),
            };
            start(context.clone(), snapshot, puts, to_events);
            Self { context, parts: [first, second], expected, says, events, _cost: cost }
        }

        /// Puts a node's part, as far as the store.
        async fn put(&self, index: usize) -> Receipt {
            let (says, mut said) = mpsc::unbounded_channel();
            put::start(self.context.run.clone(), self.parts[index].clone(), says);
            loop {
                match said.recv().await.unwrap() {
                    Put::Progress(_) => {}
                    Put::Ended(node, result) => {
                        assert_eq!(node, self.parts[index].node);
                        return result.unwrap();
                    }
                }
            }
        }

        fn say(&self, index: usize, result: Result<Receipt>) {
            self.says.send(Put::Ended(self.parts[index].node.clone(), result)).unwrap();
        }

        /// Lets the leader hear all that was said.
        async fn heard(&mut self, bytes: u64) {
            self.says.send(Put::Progress(bytes)).unwrap();
            match self.events.recv().await.unwrap() {
                SaveEvent::Progress { bytes: heard, .. } => assert_eq!(heard, bytes),
                SaveEvent::Ended { result, .. } => panic!("it has ended: {result:?}"),
            }
        }

        async fn ended(&mut self) -> Result<Saved> {
            match self.events.recv().await.unwrap() {
                SaveEvent::Ended { slot: 1, step: Step(4), result } => result,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_save_of_two_nodes_is_committed_when_the_last_has_put_its_part() {
        for order in [[0, 1], [1, 0]] {
            let mut save = TwoNodes::begin().await;
            let receipts = [save.put(0).await, save.put(1).await];
            save.say(order[0], Ok(receipts[order[0]].clone()));
            // A node's word counts once.
            save.say(order[0], Ok(receipts[order[0]].clone()));
            save.heard(7).await;
            assert!(save.context.journal.state().newest().is_none());
            save.say(order[1], Ok(receipts[order[1]].clone()));
            let saved = save.ended().await.unwrap();
            let manifest = catalog::inspect(&save.context.run, &saved.committed).await.unwrap();
            assert_eq!((manifest.files.len(), manifest.nodes.len()), (save.expected.len(), 2));
            let shards = save.parts.iter().flat_map(|part| &part.uploads);
            assert_eq!(saved.committed.bytes, shards.map(|shard| shard.body.len() as u64).sum::<u64>());
            assert_eq!(saved.checksums.len(), save.expected.len());
            assert_eq!(save.context.journal.state().newest().unwrap().committed, saved.committed);
        }
    }

    #[tokio::test]
    async fn a_save_that_failed_on_one_node_ends_when_it_has_ended_on_all_and_is_not_committed() {
        let failure = |what: &str| Err(Error::new(Kind::Unavailable, what));
        for (first, second) in [(0, 1), (1, 0)] {
            let mut save = TwoNodes::begin().await;
            save.say(first, failure("the first failure"));
            save.heard(1).await;
            let last = save.put(second).await;
            save.heard(2).await;
            save.say(second, Ok(last));
            assert_eq!(save.ended().await.unwrap_err().to_string(), "the first failure");
            assert!(save.context.journal.state().newest().is_none());
        }
        let mut save = TwoNodes::begin().await;
        save.say(1, failure("the first failure"));
        save.say(0, failure("the second"));
        assert_eq!(save.ended().await.unwrap_err().to_string(), "the first failure");
    }

    #[tokio::test]
    async fn a_part_that_was_given_up_fails_the_save() {
        let mut save = TwoNodes::begin().await;
        save.say(0, Ok(save.put(0).await));
        // Both nodes have dropped their ends.
        let (says, _puts) = mpsc::unbounded_channel();
        save.says = says;
        assert_eq!(save.ended().await.unwrap_err().kind(), Kind::Bug);
        assert!(save.context.journal.state().newest().is_none());
    }
}
