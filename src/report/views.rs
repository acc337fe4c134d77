//! Two ways to show events to people: bars on a terminal, lines elsewhere.
//!
//! Messages that must not scroll away (skipped checkpoints, notices, dead workers) are log lines in both.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tracing::{debug, info, warn};

use super::{Event, Screen, human};
use crate::ids::Step;

/// Shows events as log lines. Steps and uploads only if `steps` is set; the rest always.
pub(super) struct Lines {
    steps: bool,
    total: u64,
    thinning: Thinning,
}

impl Lines {
    pub fn new(steps: bool) -> Self {
        Self { steps, total: 0, thinning: Thinning::default() }
    }

    pub fn show(&mut self, event: &Event, now: Instant) {
        match event {
            Event::Formed { generation, world_size, resume_step, total_steps, shares, nodes, leader } => {
                self.total = *total_steps;
                self.thinning = Thinning::default();
                match resume_step {
                    Some(step) => info!(%generation, %world_size, "continuing from step {step} of {total_steps}"),
                    None => info!(%generation, %world_size, "training {total_steps} steps from the beginning"),
                }
                if let Some(shares) = shares {
                    info!("{}", human::shares(shares));
                }
                match (nodes, leader) {
                    (Some(nodes), Some(leader)) => {
                        info!(%generation, "{nodes} nodes train together, and {} leads them", human::plain(leader));
                    }
                    (Some(nodes), None) => info!(%generation, "{nodes} nodes train together, and this one leads them"),
                    (None, _) => {}
                }
            }
            Event::Step {
                step, loss, lr, grad_norm, tokens_per_s, step_s, stall_s, lag_steps, lag_s, spent, ..
            } => {
                if self.steps && (step.get() == self.total || self.thinning.let_through(now)) {
                    let mfu = spent.as_ref().and_then(|spent| spent.mfu);
                    info!(
                        loss = %format_args!("{loss:.4}"),
                        lr = %format_args!("{lr:.2e}"),
                        grad_norm = %format_args!("{grad_norm:.3}"),
                        tokens_per_s = %human::count(*tokens_per_s),
                        step_s = %format_args!("{step_s:.3}"),
                        stall_s = %format_args!("{stall_s:.4}"),
                        lag_steps,
                        lag_s = %format_args!("{lag_s:.1}"),
                        mfu = mfu.map(|mfu| tracing::field::display(format!("{:.1}%", mfu * 100.0))),
                        "step {step}/{}", self.total,
                    );
                }
            }
            Event::Validation { step, loss, sources } => {
                let of: String = sources.iter().map(|(source, loss)| format!(", {source} {loss:.4}")).collect();
                info!(%step, loss = %format_args!("{loss:.4}"), "validation loss{of}");
            }
            Event::Checkpoint { step, generation, bytes, stall_s, copy_s, durable_s } => {
                if self.steps {
                    info!(
                        %generation,
                        size = %human::bytes(*bytes),
                        stall = %human::seconds(*stall_s),
                        copy = %human::seconds(*copy_s),
                        durable = %human::seconds(*durable_s),
                        "checkpoint of step {step} is committed",
                    );
                }
            }
            Event::FoundDead { generation, same_machine, pid, checkpoint, .. } => {
                let whose = match (same_machine, pid) {
                    (Some(true), Some(pid)) => format!("the agent that ran here as process {pid}"),
                    (Some(false), _) => "the agent on another machine".to_owned(),
                    _ => "the agent".to_owned(),
                };
                match checkpoint {
                    Some(step) => info!(
                        "{whose} (generation {generation}) stopped without a final record; the newest checkpoint is \
                        step {step}, and later steps are repeated"
                    ),
                    None => info!(
                        "{whose} (generation {generation}) stopped without a final record or a checkpoint; the run \
                        starts from its beginning"
                    ),
                }
            }
            Event::Standby { node } => info!("waiting: node {} is training this run", human::plain(node)),
            Event::Kept { step, workers, loads: false } => {
                info!(workers, "the workers go on from the state of step {step} in their memory");
            }
            Event::Kept { step, workers, loads: true } => info!(workers, "the workers live on, and load step {step}"),
            Event::Restored { step, bytes, fetch_s, restore_s, from, .. } => info!(
                from,
                size = %human::bytes(*bytes),
                fetch = %human::seconds(*fetch_s),
                restore = %human::seconds(*restore_s),
                "state of step {step} is loaded",
            ),
            Event::FirstStep { step, generation, parts } => debug!(
                %generation,
                built = %human::seconds(parts.built_s),
                load = %human::seconds(parts.load_s),
                step = %human::seconds(parts.step_s),
                "step {step}, the first of its group, ended {} after the group was formed",
                human::seconds(parts.total_s),
            ),
            Event::Notice { source, deadline_s, means, binding } => {
                let source = human::plain(source);
                let left = match deadline_s.map(human::seconds) {
                    Some(left) if *binding => format!(", {left} left"),
                    Some(left) => format!(", no certain deadline ({left} by default)"),
                    None => String::new(),
                };
                match *means {
                    "rebalance" => {
                        warn!(source, "this machine may go away: saving now, and training continues")
                    }
                    "interruption" => warn!(source, "this machine goes away{left}"),
                    _ => warn!(source, "asked to stop{left}"),
                }
            }
            Event::Drain { plan, reason, .. } => info!(plan, "{}", human::plain(reason)),
            Event::NoProgress { step, quiet_s, lag_steps, lag_s } => warn!(
                %step,
                lag_steps,
                lag_s = %format_args!("{lag_s:.1}"),
                "no step has finished for {}; `restart.hang` sets when the workers are restarted",
                human::seconds(*quiet_s),
            ),
            Event::WorkerDied { step, reason, restarts, backoff_s } => warn!(
                %step,
                restarts,
                "a worker died: {}; restarting its group in {}",
                human::plain(reason),
                human::seconds(*backoff_s),
            ),
            Event::Interrupted { step, lost_steps, cap } => {
                let lost = match lost_steps {
                    0 => "nothing is lost".to_owned(),
                    lost => format!("{} lost", human::plural(*lost, "step")),
                };
                match cap {
                    Some(cap) => warn!("stopped at its cap after step {step}, {lost}: {cap}"),
                    None => warn!("interrupted after step {step}, {lost}"),
                }
            }
            Event::Completed { step, early: Some(why), .. } => info!("stopped early after step {step}: {why}"),
            Event::Completed { step, loss: Some(loss), .. } => {
                info!(loss = %format_args!("{loss:.4}"), "completed after step {step}");
            }
            Event::Completed { step, loss: None, .. } => info!("completed after step {step}"),
            Event::Warning { message } => warn!("{}", human::plain(message)),
            Event::Phase { doing } => {
                if self.steps {
                    info!("{}", human::plain(doing));
                }
            }
            Event::Upload { .. } | Event::Dropped { .. } | Event::Counted(_) => {}
        }
    }
}

/// Selects the step lines to show: the first few, then one per second for half a minute, then one every ten seconds.
#[derive(Default)]
pub(super) struct Thinning {
    shown: u32,
    last: Option<Instant>,
}

impl Thinning {
    pub fn let_through(&mut self, now: Instant) -> bool {
        let pause = match self.shown {
            0..3 => Duration::ZERO,
            3..33 => Duration::from_secs(1),
            _ => Duration::from_secs(10),
        };
        if self.last.is_some_and(|last| now.duration_since(last) < pause) {
            return false;
        }
        self.shown = self.shown.saturating_add(1);
        self.last = Some(now);
        true
    }
}

/// Bars on a terminal: the run's progress, the safe part of it, and a save under way.
pub(super) struct Bars {
    screen: Screen,
    steps: ProgressBar,
    safe: ProgressBar,
    upload: Option<(Step, ProgressBar)>,
    newest: Option<String>,
}

const STEPS: &str = "{prefix:>9} {pos}/{len} [{bar:28}] {msg}  eta {eta}";
const STATUS: &str = "{prefix:>9} {msg}";
const UPLOAD: &str = "{prefix:>9} [{bar:28}] {binary_bytes}/{binary_total_bytes} at {binary_bytes_per_sec}  {msg}";

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file, and a test checks that they parse.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

pub(super) fn bytes_style() -> ProgressStyle {
    style(UPLOAD)
}

impl Bars {
    pub fn new(screen: Screen) -> Self {
        let line =
            |template, prefix| screen.bars().add(ProgressBar::new(0).with_style(style(template)).with_prefix(prefix));
        let (steps, safe) = (line(STATUS, "start"), line(STATUS, "safe"));
        safe.set_message("nothing yet");
        Self { screen, steps, safe, upload: None, newest: None }
    }

    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Phase { doing } => {
                self.steps.set_style(style(STATUS));
                self.steps.set_prefix("start");
                self.steps.set_message(human::plain(doing));
            }
            Event::Formed { resume_step, total_steps, .. } => {
                self.steps.set_style(style(STEPS));
                self.steps.set_prefix("step");
                self.steps.set_message("");
                self.steps.set_length(*total_steps);
                self.steps.set_position(resume_step.unwrap_or_default().get());
                self.steps.reset_eta();
            }
            Event::Step { step, loss, tokens_per_s, lag_steps, lag_s, .. } => {
                self.steps.set_position(step.get());
                self.steps.set_message(format!("loss {loss:.4}  {} tokens/s", human::count(*tokens_per_s)));
                let newest = self.newest.as_deref().unwrap_or("nothing yet");
                let (steps, time) = (human::plural(*lag_steps, "step"), human::seconds(*lag_s));
                self.safe.set_message(format!("{newest}; a kill now would cost {steps}, {time}"));
            }
            Event::Upload { step, sent, total } => {
                let bar = match &self.upload {
                    Some((saving, bar)) if saving == step => bar,
                    _ => self.start_upload(*step),
                };
                bar.set_length(*total);
                bar.set_position(*sent);
                if sent >= total {
                    bar.set_message("committing");
                }
            }
            Event::Checkpoint { step, bytes, stall_s, durable_s, .. } => {
                self.end_upload();
                let (size, stall) = (human::bytes(*bytes), human::seconds(*stall_s));
                let newest = format!("step {step}, {size}, stall {stall}, safe after {}", human::seconds(*durable_s));
                self.safe.set_message(newest.clone());
                self.newest = Some(newest);
            }
            Event::WorkerDied { .. } | Event::Interrupted { .. } | Event::Completed { .. } => self.end_upload(),
            Event::Validation { .. }
            | Event::Counted(_)
            | Event::FoundDead { .. }
            | Event::Standby { .. }
            | Event::Kept { .. }
            | Event::Restored { .. }
            | Event::FirstStep { .. }
            | Event::Notice { .. }
            | Event::Drain { .. }
            | Event::NoProgress { .. }
            | Event::Warning { .. }
            | Event::Dropped { .. } => {}
        }
    }

    fn start_upload(&mut self, step: Step) -> &ProgressBar {
        self.end_upload();
        let bar =
            ProgressBar::new(0).with_style(style(UPLOAD)).with_prefix("saving").with_message(format!("step {step}"));
        &self.upload.insert((step, self.screen.bars().add(bar))).1
    }

    fn end_upload(&mut self) {
        if let Some((_, bar)) = self.upload.take() {
            bar.finish_and_clear();
        }
    }

    /// Removes the bars, so that the next output starts on a clean line.
    pub fn clear(&mut self) {
        self.end_upload();
        self.safe.finish_and_clear();
        self.steps.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_lines_thin_out() {
        let start = Instant::now();
        let mut thinning = Thinning::default();
        let shown: Vec<u64> = (0..2_000)
            .map(|tenth| tenth * 100)
            .filter(|ms| thinning.let_through(start + Duration::from_millis(*ms)))
            .collect();
        assert_eq!(shown[..5], [0, 100, 200, 1_200, 2_200]);
        assert_eq!(shown[32..35], [29_200 + 1_000, 40_200, 50_200]);
    }

    #[test]
    fn templates_are_readable() {
        for template in [STEPS, STATUS, UPLOAD] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
