//! What a generation knows of its saves: from the first rank's capture to the commit, and what failed on the way.
//!
//! Bookkeeping beside the event loop, which alone calls it. What is uploaded when, and what is tried again, is the scheduler's
//! decision; how it is uploaded is [`upload`]'s.

use std::{
    collections::BTreeMap,
    num::NonZeroU64,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::mpsc, task::AbortHandle, time::Instant};

use super::{
    super::drain::estimate::Estimates,
    slots::Slots,
    upload::{self, SaveEvent, Saved, Snapshot},
};
use crate::{
    checkpoint::manifest::TrainerState,
    config::RunConfig,
    error::{Error, Kind, Result},
    ids::Step,
    journal::SaveCost,
    layout,
    report::{Event, Reporter},
    storage::Priority,
};

/// Losses are kept for so many steps back: a snapshot's loss is looked up when all ranks have captured it.
const REMEMBERED: u64 = 64;

/// A save that took longer to become durable than this is not made on idle cores alone again.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is kept of a snapshot until it is committed.
#[derive(Debug)]
struct Kept {
    taken: Instant,
    loss: Option<f64>,
    cost: Arc<Mutex<SaveCost>>,
}

/// All saves of one generation.
#[derive(Debug)]
pub struct Ledger {
    context: upload::Context,
    /// Files that stand beside the shards in every checkpoint.
    companions: Vec<(String, Bytes)>,
    sequences: NonZeroU64,
    events: mpsc::UnboundedSender<SaveEvent>,
    kept: BTreeMap<Step, Kept>,
    losses: BTreeMap<Step, f64>,
    /// The newest validation, and the step whose state it measured.
    validated: Option<(Step, f64)>,
    sent: u64,
    sending: u64,
    uploading: bool,
    /// Gives the save up that was begun last.
    give_up: Option<AbortHandle>,
    began: Instant,
    last_byte: Option<Instant>,
    committed_at: Instant,
    /// The last save that failed, and how often in a row.
    failed: (Step, u32),
    /// Saves that failed since the last that did not, whichever.
    in_a_row: u32,
    last_error: Option<Error>,
    /// Transfers that gave way to all others took too long: they don't any more.
    starved: bool,
}

impl Ledger {
    /// Of a generation that begins; what becomes of its saves goes to `events`.
    pub fn new(
        context: upload::Context,
        companions: Vec<(String, Bytes)>,
        sequences: NonZeroU64,
        events: mpsc::UnboundedSender<SaveEvent>,
    ) -> Self {
        Self {
            context,
            companions,
            sequences,
            events,
            kept: BTreeMap::new(),
            losses: BTreeMap::new(),
            validated: None,
            sent: 0,
            sending: 0,
            uploading: false,
            give_up: None,
            began: Instant::now(),
            last_byte: None,
            committed_at: Instant::now(),
            failed: (Step(0), 0),
            in_a_row: 0,
            last_error: None,
            starved: false,
        }
    }

    /// Training begins: from here on time passes without a checkpoint.
    pub fn training_begins(&mut self) {
        self.committed_at = Instant::now();
    }

    /// Since the newest commit, or the beginning.
    pub fn lag(&self) -> Duration {
        self.committed_at.elapsed()
    }

    /// The upload under way: its bytes, those that have arrived, and seconds since it began.
    pub fn under_way(&self) -> Option<(u64, u64, f64)> {
        self.uploading.then(|| (self.sending, self.sent.min(self.sending), self.began.elapsed().as_secs_f64()))
    }

    /// Whether a snapshot is on its way to the store.
    pub fn is_uploading(&self) -> bool {
        self.uploading
    }

    /// All ranks have finished `step`.
    pub fn finished(&mut self, step: Step, loss: f64) {
        self.losses.insert(step, loss);
        if let Some(kept) = self.kept.get_mut(&step) {
            // A rank can capture a step before another has reported it.
            kept.loss = Some(loss);
        }
        self.losses.retain(|&s, _| s.get() + REMEMBERED > step.get());
    }

    /// The loss of a step not long ago.
    pub fn loss(&self, step: Step) -> Option<f64> {
        self.losses.get(&step).copied()
    }

    /// The state of `step` was measured.
    pub fn validated(&mut self, step: Step, loss: f64) {
        self.validated = Some((step, loss));
    }

    fn keep(&mut self, step: Step) -> &Kept {
        let loss = self.loss(step);
        self.kept.entry(step).or_insert_with(|| Kept { taken: Instant::now(), loss, cost: Arc::default() })
    }

    /// One rank's copying of `step` took so long, seconds.
    pub fn captured(&mut self, step: Step, copy_s: f64) {
        let mut cost = self.keep(step).cost.lock().unwrap_or_else(PoisonError::into_inner);
        cost.copy_s = cost.copy_s.max(copy_s);
    }

    /// One rank's loop stood still for so long, seconds, because of the capture of `step`.
    pub fn stalled(&mut self, step: Step, stall_s: f64) {
        let mut cost = self.keep(step).cost.lock().unwrap_or_else(PoisonError::into_inner);
        cost.stall_s = cost.stall_s.max(stall_s);
    }

    /// The slowest rank's copying of `step`, seconds, as far as it is known.
    pub fn copy_s(&mut self, step: Step) -> f64 {
        self.keep(step).cost.lock().unwrap_or_else(PoisonError::into_inner).copy_s
    }

    /// Starts uploading a slot that every rank has captured. `urgent`: nobody trains any more, and the machine may go away.
    pub fn upload(&mut self, step: Step, slot: u8, urgent: bool, slots: &mut Slots, config: &RunConfig) -> Result<()> {
        let (uploads, index) = slots.uploads(slot)?;
        let mut small = self.companions.clone();
        small.push((layout::MODEL_INDEX.to_owned(), index));
        let state = TrainerState::at(step, config, self.sequences)
            .ok_or_else(|| Error::new(Kind::Config, "train.steps × train.global_batch is too large"))?;
        let state = TrainerState { data: Some(self.context.data.clone()), ..state };
        small.push((layout::TRAINER_STATE.to_owned(), state.to_bytes()?.into()));
        self.sending = uploads.iter().map(|upload| upload.body.len() as u64).sum();
        self.sent = 0;
        self.began = Instant::now();
        self.last_byte = None;
        self.uploading = true;
        let kept = self.keep(step);
        let (taken, cost) = (kept.taken, Arc::clone(&kept.cost));
        // Every rank has captured the step, so every rank has reported it.
        let loss = kept
            .loss
            .ok_or_else(|| Error::new(Kind::Bug, format!("step {step} was captured before it was reported")))?;
        // Ranks measure a state before they copy it. What was measured of another one says nothing of this.
        let validation_loss = self.validated.filter(|(measured, _)| *measured == step).map(|(_, loss)| loss);
        let snapshot = Snapshot { step, slot, uploads, small, loss, validation_loss, cost, taken };
        let priority = match (urgent, self.starved) {
            (true, _) => Priority::Urgent,
            (false, true) => Priority::Normal,
            (false, false) => Priority::Background,
        };
        let mut context = self.context.clone();
        context.run = context.run.at_priority(priority);
        self.give_up = Some(upload::start(context, snapshot, self.events.clone()));
        Ok(())
    }

    /// What has not become a checkpoint by now is no longer to become one: the journal is about to say so.
    pub fn give_up(&mut self) {
        if let Some(saving) = self.give_up.take() {
            saving.abort();
        }
    }

    /// So many bytes more have reached the store.
    pub fn progress(&mut self, step: Step, bytes: u64, reporter: &Reporter) {
        self.sent += bytes;
        if self.sent >= self.sending {
            self.last_byte.get_or_insert_with(Instant::now);
        }
        reporter.event(&Event::Upload { step, sent: self.sent.min(self.sending), total: self.sending });
    }

    /// A save is committed: says so, and lets its snapshot be held for workers that crash.
    pub fn committed(
        &mut self,
        slot: u8,
        saved: &Saved,
        slots: &mut Slots,
        estimates: &mut Estimates,
        reporter: &Reporter,
    ) {
        let committed = &saved.committed;
        (self.uploading, self.in_a_row) = (false, 0);
        let last_byte = self.last_byte.unwrap_or_else(Instant::now);
        let upload_s = last_byte.saturating_duration_since(self.began).as_secs_f64();
        estimates.saved(self.sending, upload_s, last_byte.elapsed().as_secs_f64());
        estimates.copy.push(committed.cost.copy_s);
        self.committed_at = Instant::now();
        self.kept.retain(|&kept, _| kept > committed.step);
        if committed.cost.durable_s > PATIENCE.as_secs_f64() && !self.starved {
            // Other programs may want all cores of this machine; a checkpoint must not wait for them for ever.
            tracing::info!(durable_s = committed.cost.durable_s, "transfers no longer give way to other threads");
            self.starved = true;
        }
        slots.hold(slot, committed.step, committed.generation, &saved.sums);
        reporter.event(&Event::Checkpoint {
            step: committed.step,
            generation: committed.generation,
            bytes: committed.bytes,
            stall_s: committed.cost.stall_s,
            copy_s: committed.cost.copy_s,
            durable_s: committed.cost.durable_s,
        });
    }

    /// A save has failed; gives how often in a row that step's has.
    pub fn failed(&mut self, step: Step, error: Error, reporter: &Reporter) -> u32 {
        self.uploading = false;
        let times = if self.failed.0 == step { self.failed.1 + 1 } else { 1 };
        self.failed = (step, times);
        self.in_a_row += 1;
        // Said once, then ever less often: a session that has expired may last until somebody comes.
        if self.in_a_row.is_power_of_two() {
            let count = if self.in_a_row == 1 { String::new() } else { format!(" ({} times in a row)", self.in_a_row) };
            let hint = error.hint().map(|hint| format!("; hint: {hint}")).unwrap_or_default();
            let message = format!("save of step {step} failed and is tried again{count}: {error}{hint}");
            reporter.event(&Event::Warning { message });
        }
        self.last_error = Some(error);
        times
    }

    /// Why the last save that failed did.
    pub fn take_error(&mut self) -> Option<Error> {
        self.last_error.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::{config, memory_store},
        ids::{DatasetId, Generation, NodeId, RunId, WorldSize},
        journal::{Journal, JournalWriter},
        report::Screen,
    };

    /// Of a generation that saves into memory, and what is said of it.
    async fn saves() -> (Ledger, Reporter, Arc<Mutex<Vec<String>>>) {
        let (run, node, run_id) = (memory_store(), NodeId::random(), RunId::new("run").unwrap());
        let journal = Journal::create(run.clone(), node.clone(), run_id.clone(), config()).await.unwrap();
        let context = upload::Context {
            run,
            run_id,
            node,
            generation: Generation(1),
            formed: Instant::now(),
            world_size: WorldSize(1),
            data: DatasetId { index: "0".repeat(16), vocabulary: "0".repeat(16) },
            journal: JournalWriter::start(journal),
        };
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let hears = Arc::clone(&said);
        let listener = move |event: &Event| {
            if let Event::Warning { message } = event {
                hears.lock().unwrap().push(message.clone());
            }
        };
        let reporter = Reporter::with_listener(Screen::plain(), false, Box::new(listener));
        (Ledger::new(context, Vec::new(), NonZeroU64::MIN, mpsc::unbounded_channel().0), reporter, said)
    }

    #[tokio::test]
    async fn saves_that_fail_are_told_once_and_then_ever_less_often_whichever_step_it_is() {
        let (mut saves, reporter, said) = saves().await;
        let error = || Error::new(Kind::Unavailable, "the session has expired").with_hint("log in again");
        for n in 0..100_u32 {
            // A newer state every third time: that step's own count begins anew, what is told does not.
            assert_eq!(saves.failed(Step(u64::from(n / 3)), error(), &reporter), n % 3 + 1);
        }
        let said = std::mem::take(&mut *said.lock().unwrap());
        let counts = ["", "(2 times", "(4 times", "(8 times", "(16 times", "(32 times", "(64 times"];
        assert_eq!(said.len(), counts.len(), "{said:#?}");
        for (message, count) in said.iter().zip(counts) {
            assert!(message.contains(count) && message.contains("expired; hint: log in again"), "{message}");
        }
        assert_eq!(saves.take_error().map(|error| error.kind()), Some(Kind::Unavailable));
    }
}
