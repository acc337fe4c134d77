//! What a life does about notices: hears them, decides with [`plan`](super::super::drain::plan) what can still be saved, begins it, and ends the
//! life when the time is up.
//!
//! Part of the event loop: these functions are called by it alone. On a crash nothing of this is left but the `notice` records; whoever
//! comes next finds a generation that ended without a word.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    super::{
        drain::{
            estimate::Estimate,
            plan::{self, Decision, Situation},
        },
        save::scheduler::Scheduler,
    },
    Death, End, Life,
};
use crate::{
    error::Result,
    journal::{DrainPlan, Means, Record, Urgency},
    notice::{self, Notice},
    report::Event,
};

/// Notices of one life that are written to the journal.
const MOST_NOTICES: u32 = 16;
/// Ranks that are to stop and have finished no step for so long, or for ten usual steps if that is longer, are killed.
const STUCK: Duration = Duration::from_secs(120);
/// As long as no step was measured.
const UNKNOWN_STEP: Duration = Duration::from_secs(1200);

impl Life<'_> {
    pub(super) fn on_notice(&mut self, notice: &Notice) -> Result<Option<End>> {
        let deadline_s = notice.deadline.map(|left| left.as_secs_f64());
        let means = notice.kind.name();
        self.reporter.event(&Event::Notice {
            source: notice.source.to_owned(),
            deadline_s,
            means,
            binding: notice.deadline_binds(),
        });
        self.hush();
        // For whoever reads it later, a time that binds nobody is none.
        self.write_down(notice, deadline_s.filter(|_| notice.deadline_binds()));
        if notice.kind == notice::Kind::Rebalance {
            let now = self.now();
            // Whoever is on the point of leaving saves anyway.
            let saving = self.scheduler.as_mut().filter(|_| !self.timeline.is_called());
            let actions = saving.map(|scheduler| scheduler.save_now(now)).unwrap_or_default();
            return self.act(actions);
        }
        let again = self.timeline.hear(notice, Instant::now());
        if again {
            return Ok(Some(self.stopped(format!("left at once on a second {}", notice.source))));
        }
        if self.scheduler.is_none() {
            return Ok(Some(self.stopped(format!("{} before the first step: nothing to save", notice.source))));
        }
        self.reconsider()
    }

    /// From now on the store and the journal belong to what is to be saved.
    pub(super) fn hush(&mut self) {
        if let Some(looking) = self.looking.take() {
            looking.abort();
        }
        self.retention.hush();
    }

    /// In the background: neither the drain nor the commit at its end waits for it. A record that lands after it was given
    /// up is one more that the next append reads before its own.
    fn write_down(&mut self, notice: &Notice, deadline_s: Option<f64>) {
        if self.written >= MOST_NOTICES {
            return;
        }
        self.written += 1;
        let (journal, generation) = (self.start.upload.journal.clone(), self.start.upload.generation);
        let means = means(notice.kind);
        let record = Record::Notice { generation, source: notice.source.to_owned(), deadline_s, means };
        self.notes.spawn(async move {
            if let Err(error) = journal.append_if(Urgency::Notice, record, |_| true).await {
                tracing::debug!(%error, "notice not written to the journal");
            }
        });
    }

    /// Decides what can still be saved, and begins it.
    fn reconsider(&mut self) -> Result<Option<End>> {
        let Some(situation) = self.situation() else { return Ok(None) };
        let (decision, reason) = plan::decide(&situation);
        let (now, instant) = (self.now(), Instant::now());
        let (plan, needs) = match decision {
            Decision::TrainOn { .. } if self.draining => return Ok(None),
            Decision::TrainOn { .. } => {
                if !std::mem::replace(&mut self.insured, true) {
                    self.timeline.says(instant, reason.clone());
                    tracing::info!("{reason}");
                    let actions = self.scheduler.as_mut().map(|c| c.save_now(now)).unwrap_or_default();
                    return self.act(actions);
                }
                return Ok(None);
            }
            Decision::Drain { plan, needs } => (plan, needs.map(|needs| needs.mean)),
        };
        if self.timeline.plans(instant, plan, &reason, needs) {
            let (plan, left_s) = (plan.name(), situation.left_s);
            self.reporter.event(&Event::Drain { plan, left_s, predicted_s: needs, reason: reason.clone() });
        }
        if plan == DrainPlan::StopEarly {
            return Ok(Some(self.stopped(reason)));
        }
        let Some(scheduler) = &mut self.scheduler else { return Ok(None) };
        let actions = match plan {
            DrainPlan::FinishInFlight => scheduler.drain_unsaved(now),
            _ if self.draining => Vec::new(),
            _ => scheduler.drain(now),
        };
        if !std::mem::replace(&mut self.draining, true) {
            // There may have been time to train on since the notice.
            self.hush();
        }
        self.act(actions)
    }

    /// What the decision depends on; `None` before the first step.
    fn situation(&self) -> Option<Situation> {
        let scheduler = self.scheduler.as_ref()?;
        let since = self.stepped.elapsed().as_secs_f64();
        let step = if scheduler.has_ended() { None } else { self.estimates.step.estimate() };
        let under_way = self.ledger.under_way();
        let storage = &self.start.config.storage;
        let parts = u64::from(storage.concurrency) * (u64::from(storage.part_mib) << 20);
        let rest = under_way.and_then(|(total, sent, elapsed)| self.estimates.rest(total, sent, parts, elapsed));
        Some(Situation {
            left_s: self.timeline.left_s(Instant::now()),
            usual: self.timeline.usual(),
            may_train_on: self.start.config.notice.train_in_spare_time && self.timeline.leaves_the_time_to_us(),
            finished: scheduler.finished(),
            committed: scheduler.committed(),
            ended: scheduler.has_ended(),
            in_flight: scheduler.in_flight().map(|step| (step, rest)),
            step: step.map_or(Estimate::exactly(0.0), |step| step.after(since)),
            whole_step: step.unwrap_or(Estimate::exactly(0.0)),
            copy: self.estimates.copy.estimate().unwrap_or(Estimate::exactly(0.0)),
            save: self.slots.bytes().and_then(|bytes| self.estimates.upload(bytes)),
        })
    }

    /// Time has passed since a notice was heard.
    pub(super) fn look_at_the_deadline(&mut self) -> Result<Option<End>> {
        if !self.timeline.is_called() {
            return Ok(None);
        }
        if !self.draining && self.dead.is_none() {
            return self.reconsider();
        }
        let left_s = self.timeline.left_s(Instant::now()).unwrap_or(f64::INFINITY);
        if left_s > plan::LAST_WORDS_S {
            return self.look_at_the_stuck();
        }
        let (finished, committed) = (self.finished(), self.committed());
        self.timeline.says(Instant::now(), "the time is up");
        Ok(Some(self.stopped(if committed >= finished {
            format!("the time was up; step {finished} is committed")
        } else {
            format!("the time was up before step {finished} was durable")
        })))
    }

    /// A drain without a deadline must end, too: ranks that have not moved for long will not stop by themselves.
    fn look_at_the_stuck(&mut self) -> Result<Option<End>> {
        let ended = self.scheduler.as_ref().is_some_and(Scheduler::has_ended);
        if ended || self.dead.is_some() {
            return Ok(None);
        }
        let usual = self
            .estimates
            .step
            .estimate()
            .map_or(UNKNOWN_STEP, |step| Duration::try_from_secs_f64(10.0 * step.high).unwrap_or(UNKNOWN_STEP));
        let patience = usual.max(STUCK);
        if self.stepped.elapsed() < patience || self.timeline.since(Instant::now()) < patience.as_secs_f64() {
            return Ok(None);
        }
        let reason = format!("no step was finished for {} s after the notice", patience.as_secs());
        self.timeline.says(Instant::now(), reason.clone());
        self.dead = Some(Death::Died(reason));
        self.end_of_the_dead()
    }
}

fn means(kind: notice::Kind) -> Means {
    match kind {
        notice::Kind::Interruption => Means::Interruption,
        notice::Kind::Stop => Means::Stop,
        notice::Kind::Rebalance => Means::Rebalance,
    }
}
