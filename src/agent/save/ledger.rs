//! The state of a generation's saves: from the first rank's capture to the commit, and the failures on the way.
//!
//! Bookkeeping without I/O: the time is passed in, and actions are returned. The
//! [`Scheduler`](super::scheduler::Scheduler) decides what is uploaded when, and what is tried again;
//! [`upload`](super::upload) does it.

use std::{collections::BTreeMap, time::Duration};

use super::{
    super::drain::estimate::Estimates,
    haste::{Change, Haste},
    scheduler::Moment,
};
use crate::{
    error::{Error, Kind, Result},
    ids::Step,
    journal::{Committed, Metrics, SaveCost},
    report::human,
    storage::Priority,
    workload::Figures,
};

/// Figures are kept for this many steps back: a snapshot's are looked up when all ranks have captured it.
const REMEMBERED: u64 = 64;

/// Saves that go on failing are reported at least this often.
const TELL: Duration = Duration::from_secs(300);

/// How often a checkpoint is recorded with the speed of its step.
const SPEED: Duration = Duration::from_secs(3600);

/// The facts kept about a snapshot until it is committed.
#[derive(Debug)]
struct Entry {
    taken: Moment,
    /// `None`: not every rank has reported the step.
    figures: Option<Figures>,
    /// `None`: this state was not measured, or not every rank has reported its part.
    validation_loss: Option<f64>,
    /// The held-out losses of its sources, and how early stopping stands.
    held_out: Metrics,
    cost: SaveCost,
}

/// Figures that follow from measured states.
#[derive(Debug, Default)]
struct HeldOut {
    /// Of the very state.
    of: BTreeMap<Step, Metrics>,
    /// From that state on.
    since: BTreeMap<Step, Metrics>,
}

impl HeldOut {
    /// What the checkpoint of `step` is recorded with.
    fn figures(&self, step: Step) -> Metrics {
        let since = self.since.range(..=step).next_back().map(|(_, figures)| figures);
        since.into_iter().chain(self.of.get(&step)).flatten().map(|(name, value)| (name.clone(), *value)).collect()
    }

    /// Something is known of `step`: a rank may have captured it before.
    fn keeps(&mut self, step: Step, kept: &mut BTreeMap<Step, Entry>) {
        for figures in [&mut self.of, &mut self.since] {
            while figures.len() as u64 > REMEMBERED {
                figures.pop_first();
            }
        }
        if let Some(kept) = kept.get_mut(&step) {
            kept.held_out = self.figures(step);
        }
    }
}

/// A snapshot on its way to the store.
#[derive(Debug)]
struct UnderWay {
    step: Step,
    total: u64,
    sent: u64,
    began: Moment,
    last_byte: Option<Moment>,
}

/// All saves of one generation.
#[derive(Debug)]
pub struct Ledger {
    kept: BTreeMap<Step, Entry>,
    figures: BTreeMap<Step, Figures>,
    /// Validation losses, by the step whose state was measured. An upload may begin long after later measurements.
    validated: BTreeMap<Step, f64>,
    /// What else is known of measured states, and of those after them.
    held_out: HeldOut,
    /// At most one at a time.
    under_way: Option<UnderWay>,
    /// The newest commit, or the beginning.
    committed_at: Moment,
    /// The newest step committed since the beginning.
    newest: Option<Step>,
    /// The last save that failed, and how often in a row.
    failed: (Step, u32),
    /// Saves of any step that failed since the last success.
    in_a_row: u32,
    /// When a failure was last reported.
    told: Moment,
    last_error: Option<Error>,
    haste: Haste,
    /// When the step of the newest commit ended, or the beginning.
    saved_at: Moment,
    /// When an upload was last given the speed of its step; `None`: none was.
    speed_at: Option<Moment>,
}

/// An upload about to begin.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The snapshot's step.
    pub step: Step,
    /// Its slot.
    pub slot: u8,
    /// The step's figures.
    pub figures: Figures,
    /// The validation loss of this very state, if it was measured.
    pub validation_loss: Option<f64>,
    /// The cost of the save so far; the loop's wait may be reported later.
    pub cost: SaveCost,
    /// When the step ended.
    pub taken: Moment,
    /// Its priority against other work.
    pub priority: Priority,
}

/// A save that has failed.
#[derive(Debug)]
pub struct Failure {
    /// Consecutive failures of the save of this step.
    pub times: u32,
    /// The report for people. Given once, then ever less often, but every [`TELL`] at least: an expired session may
    /// last until somebody comes, and the run may lose ever more meanwhile.
    pub warning: Option<String>,
}

impl Ledger {
    /// Training begins: from here on time passes without a checkpoint.
    pub fn begin(now: Moment) -> Self {
        Self {
            kept: BTreeMap::new(),
            figures: BTreeMap::new(),
            validated: BTreeMap::new(),
            held_out: HeldOut::default(),
            under_way: None,
            committed_at: now,
            newest: None,
            failed: (Step(0), 0),
            in_a_row: 0,
            told: now,
            last_error: None,
            haste: Haste::default(),
            saved_at: now,
            speed_at: None,
        }
    }

    /// Time since the newest commit, or the beginning.
    pub fn lag(&self, now: Moment) -> Duration {
        now.saturating_sub(self.committed_at)
    }

    /// The upload under way: its bytes, those that have arrived, and seconds since it began.
    pub fn under_way(&self, now: Moment) -> Option<(u64, u64, f64)> {
        let upload = self.under_way.as_ref()?;
        Some((upload.total, upload.sent.min(upload.total), now.saturating_sub(upload.began).as_secs_f64()))
    }

    /// Whether a snapshot is on its way to the store.
    pub fn is_uploading(&self) -> bool {
        self.under_way.is_some()
    }

    /// All ranks have finished `step`.
    pub fn finished(&mut self, step: Step, figures: Figures) {
        if let Some(kept) = self.kept.get_mut(&step) {
            // A rank can capture a step before another has reported it.
            kept.figures = Some(figures.clone());
        }
        self.figures.insert(step, figures);
        self.figures.retain(|&s, _| s.get() + REMEMBERED > step.get());
    }

    /// The loss of a step not long ago, if it has one.
    pub fn loss(&self, step: Step) -> Option<f64> {
        self.figures.get(&step)?.loss
    }

    /// The state of `step` was measured.
    pub fn validated(&mut self, step: Step, loss: f64) {
        if let Some(kept) = self.kept.get_mut(&step) {
            // A rank can capture a state before another has reported its part of the measurement.
            kept.validation_loss = Some(loss);
        }
        self.validated.insert(step, loss);
        self.validated.retain(|&s, _| s.get() + REMEMBERED > step.get());
    }

    /// What else was measured of the state of `step`.
    pub fn measured(&mut self, step: Step, figures: Metrics) {
        self.held_out.of.insert(step, figures);
        self.held_out.keeps(step, &mut self.kept);
    }

    /// How early stopping stands from the state of `step` on.
    pub fn stands(&mut self, step: Step, figures: Metrics) {
        self.held_out.since.insert(step, figures);
        self.held_out.keeps(step, &mut self.kept);
    }

    fn keep(&mut self, step: Step, now: Moment) -> &mut Entry {
        let (figures, validated, held_out) = (&self.figures, &self.validated, &self.held_out);
        self.kept.entry(step).or_insert_with(|| Entry {
            taken: now,
            figures: figures.get(&step).cloned(),
            validation_loss: validated.get(&step).copied(),
            held_out: held_out.figures(step),
            cost: SaveCost::default(),
        })
    }

    /// The time that one rank took to copy `step`, seconds.
    pub fn captured(&mut self, step: Step, copy_s: f64, now: Moment) {
        let cost = &mut self.keep(step, now).cost;
        cost.copy_s = cost.copy_s.max(copy_s);
    }

    /// The time for which one rank's loop stood still because of the capture of `step`, seconds. Returns the save's
    /// cost so far, if its upload is under way.
    pub fn stalled(&mut self, step: Step, stall_s: f64, now: Moment) -> Option<SaveCost> {
        let cost = &mut self.keep(step, now).cost;
        cost.stall_s = cost.stall_s.max(stall_s);
        let cost = *cost;
        self.under_way.as_ref().filter(|upload| upload.step == step).map(|_| cost)
    }

    /// The slowest rank's copying of `step`, seconds, as far as it is known.
    pub fn copy_s(&mut self, step: Step, now: Moment) -> f64 {
        self.keep(step, now).cost.copy_s
    }

    /// Begins uploading a slot that every rank has captured, `total` bytes of shards. `urgent`: nobody trains any more,
    /// and the machine may go away.
    pub fn upload(&mut self, step: Step, slot: u8, urgent: bool, total: u64, now: Moment) -> Result<Transfer> {
        let kept = self.keep(step, now);
        // A measurement of another state does not apply to this one.
        let (taken, cost, mut figures, validation_loss) =
            (kept.taken, kept.cost, kept.figures.clone(), kept.validation_loss);
        if let Some(figures) = &mut figures {
            figures.metrics.extend(kept.held_out.clone());
            if let Some(speed) =
                figures.speed.filter(|_| self.speed_at.is_none_or(|at| now.saturating_sub(at) >= SPEED))
            {
                figures.metrics.extend(speed.metrics());
                self.speed_at = Some(now);
            }
        }
        // Every rank has captured the step, so every rank has reported it.
        let figures =
            figures.ok_or_else(|| Error::new(Kind::Bug, format!("step {step} was captured before it was reported")))?;
        let priority = match (urgent, self.haste.is_hasty()) {
            (true, _) => Priority::Urgent,
            (false, true) => Priority::Normal,
            (false, false) => Priority::Background,
        };
        self.under_way = Some(UnderWay { step, total, sent: 0, began: now, last_byte: None });
        Ok(Transfer { step, slot, figures, validation_loss, cost, taken, priority })
    }

    /// This many more bytes have reached the store: returns how many have by now, and of how many.
    pub fn progress(&mut self, bytes: u64, now: Moment) -> Option<(u64, u64)> {
        let upload = self.under_way.as_mut()?;
        upload.sent += bytes;
        if upload.sent >= upload.total {
            upload.last_byte.get_or_insert(now);
        }
        Some((upload.sent.min(upload.total), upload.total))
    }

    /// Whether saves compete with training instead of yielding to it.
    pub const fn is_hasty(&self) -> bool {
        self.haste.is_hasty()
    }

    /// A save is committed. Returns whether saves yield to training from here on, if that has changed.
    pub fn committed(&mut self, committed: &Committed, estimates: &mut Estimates, now: Moment) -> Option<Change> {
        if let Some(upload) = self.under_way.take() {
            let last_byte = upload.last_byte.unwrap_or(now);
            let upload_s = last_byte.saturating_sub(upload.began).as_secs_f64();
            estimates.saved(upload.total, upload_s, now.saturating_sub(last_byte).as_secs_f64());
        }
        estimates.copy.push(committed.cost.copy_s);
        self.in_a_row = 0;
        self.committed_at = now;
        self.newest = Some(committed.step);
        let taken = self.kept.get(&committed.step).map_or(now, |kept| kept.taken);
        let interval = taken.saturating_sub(std::mem::replace(&mut self.saved_at, taken));
        self.kept.retain(|&kept, _| kept > committed.step);
        self.haste.saved(committed.cost.durable_s, interval.as_secs_f64())
    }

    /// A save has failed.
    pub fn failed(&mut self, step: Step, error: Error, now: Moment) -> Failure {
        self.under_way = None;
        let times = if self.failed.0 == step { self.failed.1 + 1 } else { 1 };
        self.failed = (step, times);
        self.in_a_row += 1;
        let due = self.in_a_row.is_power_of_two() || now.saturating_sub(self.told) >= TELL;
        let warning = due.then(|| {
            self.told = now;
            let since = human::seconds(self.lag(now).as_secs_f64());
            let newest = match self.newest {
                Some(step) => format!("newest checkpoint: step {step}, {since} ago"),
                None => format!("no checkpoint since the start {since} ago"),
            };
            let count = if self.in_a_row == 1 { String::new() } else { format!(" ({} times in a row)", self.in_a_row) };
            let hint = error.hint().map(|hint| format!("; hint: {hint}")).unwrap_or_default();
            format!("save of step {step} failed and is tried again{count}; {newest}: {error}{hint}")
        });
        self.last_error = Some(error);
        Failure { times, warning }
    }

    /// The step whose save failed last.
    pub const fn last_failed(&self) -> Step {
        self.failed.0
    }

    /// Why the last failed save failed.
    pub fn take_error(&mut self) -> Option<Error> {
        self.last_error.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Metrics;

    fn figures(loss: f64) -> Figures {
        Figures { loss: Some(loss), ..Figures::default() }
    }

    #[test]
    fn saves_that_fail_are_told_once_and_then_ever_less_often_whichever_step_it_is() {
        let mut saves = Ledger::begin(Moment::ZERO);
        let error = || Error::new(Kind::Unavailable, "the session has expired").with_hint("log in again");
        let mut said = Vec::new();
        for n in 0..100_u32 {
            // A newer state every third time: that step's own count starts again, the reported one does not.
            let failure = saves.failed(Step(u64::from(n / 3)), error(), Moment::from_secs(1));
            assert_eq!(failure.times, n % 3 + 1);
            said.extend(failure.warning);
        }
        let counts = ["", "(2 times", "(4 times", "(8 times", "(16 times", "(32 times", "(64 times"];
        assert_eq!(said.len(), counts.len(), "{said:#?}");
        for (message, count) in said.iter().zip(counts) {
            assert!(message.contains(count) && message.contains("expired; hint: log in again"), "{message}");
        }
        assert_eq!(saves.take_error().map(|error| error.kind()), Some(Kind::Unavailable));
    }

    /// At the longest pause between tries the next power of two may be hours away.
    #[test]
    fn saves_that_go_on_failing_are_told_every_few_minutes_with_the_age_of_the_newest_checkpoint() {
        let mut saves = Ledger::begin(Moment::ZERO);
        let mut told = Vec::new();
        for n in 1..=1000_u64 {
            let at = Moment::from_secs(8 * n);
            let failure = saves.failed(Step(20), Error::new(Kind::Unavailable, "read-only"), at);
            told.extend(failure.warning.map(|warning| (at, warning)));
        }
        let longest = told.windows(2).map(|pair| pair[1].0 - pair[0].0).max();
        assert!(longest <= Some(Duration::from_secs(304)), "{longest:?} in silence");
        assert!(told.len() < 50, "{} warnings", told.len());
        assert!(told[0].1.contains("no checkpoint since the start 8.00 s ago"), "{}", told[0].1);
        let committed = Committed {
            step: Step(12),
            generation: crate::ids::Generation(1),
            manifest: String::new(),
            manifest_crc64: String::new(),
            bytes: 100,
            loss: Some(2.0),
            validation_loss: None,
            metrics: Metrics::new(),
            cost: SaveCost::default(),
        };
        saves.committed(&committed, &mut Estimates::default(), Moment::from_secs(10_000));
        let error = Error::new(Kind::Unavailable, "read-only");
        let warning = saves.failed(Step(20), error, Moment::from_secs(11_200)).warning.unwrap();
        assert!(warning.contains("newest checkpoint: step 12, 20m ago"), "{warning}");
    }

    #[test]
    fn what_a_save_has_cost_is_the_slowest_ranks() {
        let at = Moment::from_secs;
        let mut saves = Ledger::begin(Moment::ZERO);
        let mut estimates = Estimates::default();
        saves.captured(Step(4), 0.5, at(1));
        saves.captured(Step(4), 0.25, at(2));
        saves.finished(Step(4), figures(2.0));
        let transfer = saves.upload(Step(4), 0, false, 100, at(3)).unwrap();
        assert_eq!((transfer.cost.copy_s, transfer.taken, transfer.priority), (0.5, at(1), Priority::Background));
        assert_eq!(saves.stalled(Step(4), 0.1, at(3)).map(|cost| (cost.copy_s, cost.stall_s)), Some((0.5, 0.1)));
        assert_eq!(saves.stalled(Step(3), 0.1, at(3)), None, "another save");
        assert_eq!(saves.progress(60, at(5)), Some((60, 100)));
        assert_eq!(saves.progress(60, at(13)), Some((100, 100)), "never more than all");
        assert_eq!(saves.under_way(at(14)), Some((100, 100, 11.0)));
        let cost = SaveCost { durable_s: 61.0, ..transfer.cost };
        let committed = Committed {
            step: Step(4),
            generation: crate::ids::Generation(1),
            manifest: String::new(),
            manifest_crc64: String::new(),
            bytes: 100,
            loss: Some(2.0),
            validation_loss: None,
            metrics: Metrics::new(),
            cost,
        };
        let change = saves.committed(&committed, &mut estimates, at(15)).unwrap();
        assert_eq!((change.hasty, change.interval_s), (true, 1.0));
        let measured = (estimates.byte.estimate().unwrap().mean, estimates.commit.estimate().unwrap().mean);
        assert_eq!(measured, (0.1, 2.0));
        assert_eq!((saves.lag(at(20)), saves.under_way(at(20))), (at(5), None));
        // From here on it yields to nothing.
        saves.captured(Step(5), 0.5, at(20));
        saves.finished(Step(5), figures(2.0));
        assert_eq!(saves.upload(Step(5), 1, false, 100, at(21)).unwrap().priority, Priority::Normal);
        assert_eq!(saves.committed(&committed, &mut estimates, at(22)), None, "said once");
    }

    #[test]
    fn a_snapshot_of_a_step_that_was_not_reported_is_a_bug() {
        let mut saves = Ledger::begin(Moment::ZERO);
        saves.captured(Step(4), 0.5, Moment::ZERO);
        assert_eq!(saves.upload(Step(4), 0, false, 100, Moment::ZERO).unwrap_err().kind(), Kind::Bug);
    }

    #[test]
    fn a_snapshot_takes_its_steps_figures_along_and_needs_no_loss() {
        let mut saves = Ledger::begin(Moment::ZERO);
        let figures = Figures { loss: None, metrics: [("accuracy".to_owned(), 0.25)].into(), speed: None };
        saves.finished(Step(4), figures.clone());
        assert_eq!(saves.upload(Step(4), 0, false, 100, Moment::ZERO).unwrap().figures, figures);
        assert_eq!(saves.loss(Step(4)), None);
        // A rank can capture a step before another has reported it.
        saves.captured(Step(5), 0.5, Moment::ZERO);
        saves.finished(Step(5), figures.clone());
        assert_eq!(saves.upload(Step(5), 1, false, 100, Moment::ZERO).unwrap().figures, figures);
    }

    /// On a slow store an upload begins only after later states were measured.
    #[test]
    fn a_snapshot_keeps_the_validation_loss_of_its_own_state_however_late_its_upload_begins() {
        let mut saves = Ledger::begin(Moment::ZERO);
        for step in [4, 6, 8, 12, 18] {
            saves.finished(Step(step), figures(2.0));
        }
        // A rank can capture a state before another has reported its part of the measurement, or after it.
        saves.validated(Step(6), 0.6);
        saves.captured(Step(6), 0.5, Moment::ZERO);
        saves.captured(Step(8), 0.5, Moment::ZERO);
        saves.captured(Step(12), 0.5, Moment::ZERO);
        saves.validated(Step(12), 1.2);
        saves.validated(Step(18), 1.8);
        let mut loss = |step| saves.upload(Step(step), 0, false, 100, Moment::ZERO).unwrap().validation_loss;
        assert_eq!([6, 8, 12, 18].map(&mut loss), [Some(0.6), None, Some(1.2), Some(1.8)]);
    }
}
