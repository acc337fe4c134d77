//! Turns a run's events into reports.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{
    api::{Facts, Report, Reports, Stage},
    handover::Carried,
    lease::lock,
};
use crate::{ids::RunId, report::Event};

/// The least interval between progress reports, except for checkpoints.
const PROGRESS: Duration = Duration::from_secs(30);
/// The part common to all reports of a turn.
pub(super) struct Head {
    pub run_id: Option<RunId>,
    pub message_id: String,
    pub claim: String,
    pub received: u32,
}

/// Turns a run's events into reports.
pub(super) struct Tracker {
    reports: Reports,
    head: Head,
    pub carried: Arc<Mutex<Carried>>,
    pub facts: Facts,
    sequence: u64,
    started: bool,
    /// When progress was last reported.
    last: Option<Instant>,
}

impl Tracker {
    pub fn new(reports: Reports, head: Head, carried: Arc<Mutex<Carried>>) -> Self {
        let facts = Facts::default();
        Self { reports, head, carried, facts, sequence: 0, started: false, last: None }
    }

    /// An event of the run.
    pub fn hear(&mut self, event: &Event, now: Instant) {
        match event {
            Event::Formed { resume_step, total_steps, .. } => {
                self.facts.total_steps = Some(*total_steps);
                self.facts.step = Some(resume_step.map_or(0, |step| step.get()));
                self.facts.checkpoint = resume_step.map(|step| step.get());
                if !std::mem::replace(&mut self.started, true) {
                    self.report(Stage::Started);
                }
            }
            Event::Step { step, loss, tokens_per_s, .. } => {
                self.facts.step = Some(step.get());
                self.facts.loss = Some(*loss).filter(|loss| loss.is_finite());
                self.facts.tokens_per_s = Some(*tokens_per_s);
                if self.last.is_none_or(|last| now.duration_since(last) >= PROGRESS) {
                    self.progress(now);
                }
            }
            Event::Checkpoint { step, .. } => {
                self.facts.checkpoint = Some(step.get());
                lock(&self.carried).step = step.get();
                self.progress(now);
            }
            Event::Interrupted { step, lost_steps, .. } => {
                self.facts.step = Some(step.get());
                self.facts.lost_steps = Some(*lost_steps);
            }
            Event::Completed { step, loss, .. } => {
                self.facts.step = Some(step.get());
                self.facts.loss = loss.filter(|loss| loss.is_finite());
            }
            _ => {}
        }
    }

    fn progress(&mut self, now: Instant) {
        self.last = Some(now);
        self.report(Stage::Progress);
    }

    /// The turn is over.
    pub fn end(&mut self, stage: Stage, reason: Option<String>, code: u8) {
        self.facts.reason = reason;
        self.facts.exit_code = Some(code);
        self.facts.tokens_per_s = None;
        self.report(stage);
    }

    fn report(&mut self, event: Stage) {
        let Head { run_id, message_id, claim, received } = &self.head;
        self.reports.send(Report {
            event,
            run_id: run_id.clone(),
            message_id: message_id.clone(),
            claim: claim.clone(),
            sequence: self.sequence,
            at: Timestamp::now(),
            received: *received,
            interruptions: lock(&self.carried).interruptions,
            facts: self.facts.clone(),
        });
        self.sequence += 1;
    }
}
