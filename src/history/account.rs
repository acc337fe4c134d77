//! Where the time of a run went: every second from its creation to its last sign of life has exactly one name. Pure.
//!
//! The journal's records say when a generation was formed, which steps its saves hold and how it ended. The time
//! between them is cut into stretches that follow each other without a gap. Figures of steps, if they are given, say
//! more: how long the steps before the first save took, and which steps a machine did before it vanished.
//!
//! # Clocks
//! Durations within a generation are those of a monotonic clock, where its saves recorded them. All else are stamps of
//! wall clocks, which may be wrong by half a century when a machine starts. So:
//! - A stamp from before this program existed or from the future says nothing, unless all are so.
//! - A generation began when most of its records say that it did.
//! - Generations follow each other in the order of the journal. If stamps disagree with that order, the largest set
//!   that agrees counts, and the others are placed right behind what came before them.
//! - Without a monotonic clock a duration counts only as far as the steps done in it account for it.
//!
//! Each such correction is told in [`Account::notes`].

mod lives;
mod stamps;

use jiff::Timestamp;
use serde::Serialize;

use self::{
    lives::{End, Life, known, lives, rows, step_s},
    stamps::{NOTABLE_S, Stamps},
};
use crate::{
    goodput::credible_s,
    ids::{Generation, NodeId},
    journal::{Checkpoint, RunState},
    metrics::Series,
    report::human,
};

/// The name of a stretch of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// Steps that count.
    Productive,
    /// The train loop stood still for a save.
    Stalled,
    /// Steps that were lost or thrown away, and the time until the rest of the group noticed a loss.
    Repeated,
    /// Workers started and read their state.
    Starting,
    /// From the last step of a generation to its end: the last save, and leaving.
    Ending,
    /// From the creation to the first generation.
    Waiting,
    /// From the recorded end of a generation to the next one.
    Away,
    /// From the last sign of a machine that vanished to the next generation: training that was lost and a wait, in
    /// shares that nobody recorded.
    Unrecorded,
    /// The run was complete, and was opened again later.
    Complete,
}

impl Activity {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 9] = [
        Self::Productive,
        Self::Stalled,
        Self::Repeated,
        Self::Starting,
        Self::Ending,
        Self::Waiting,
        Self::Away,
        Self::Unrecorded,
        Self::Complete,
    ];

    /// For people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Productive => "productive steps",
            Self::Stalled => "stalls by saves",
            Self::Repeated => "lost and repeated steps",
            Self::Starting => "starts and restores",
            Self::Ending => "last saves and exits",
            Self::Waiting => "wait for the first machine",
            Self::Away => "waits between machines",
            Self::Unrecorded => "after a machine vanished",
            Self::Complete => "complete",
        }
    }

    /// What belongs to it, one sentence.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Productive => "Steps that the run's result contains.",
            Self::Stalled => "The train loop stood still for a save.",
            Self::Repeated => "Steps that were lost or thrown away, and the time until the group noticed a loss.",
            Self::Starting => "From the record of a generation to its first step.",
            Self::Ending => "From the last step of a generation to its last record.",
            Self::Waiting => "From the creation of the run to its first generation.",
            Self::Away => "From the last record of a generation to the next generation.",
            Self::Unrecorded => {
                "From the last sign of a machine that vanished to the next generation. Part of it was training that \
                 was lost, and part of it a wait: nobody recorded the shares."
            }
            Self::Complete => "The run was complete, until somebody gave it more steps.",
        }
    }
}

/// A time with one name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stretch {
    /// Its name.
    pub activity: Activity,
    /// When it began, seconds since the run was created.
    pub begin_s: f64,
    /// When it ended: the next one begins here.
    pub end_s: f64,
    /// The generation that was alive.
    pub generation: Option<Generation>,
    /// Its machines.
    pub machines: usize,
    /// Whether it is there because of an interruption.
    pub interrupted: bool,
}

impl Stretch {
    /// Its length, seconds.
    pub fn seconds(&self) -> f64 {
        self.end_s - self.begin_s
    }
}

/// The time of one name.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Part {
    /// The name.
    pub activity: Activity,
    /// Seconds of wall time.
    pub seconds: f64,
    /// The same times the machines that were alive.
    pub machine_seconds: f64,
}

/// When a generation lived.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lived {
    /// The generation.
    pub generation: Generation,
    /// When it was formed, seconds since the run was created.
    pub begin_s: f64,
    /// Its last sign of life.
    pub end_s: f64,
    /// Its nodes, the leader first.
    pub nodes: Vec<NodeId>,
}

/// Where the time of a run went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Account {
    /// From the creation of the run to its last sign of life, seconds: the sum of all parts.
    pub whole_s: f64,
    /// The time of each name that occurs.
    pub parts: Vec<Part>,
    /// Steps that the run's result contains, and those since the newest checkpoint of a run that is at work.
    pub useful_steps: u64,
    /// Steps that were lost or thrown away, as far as they are recorded.
    pub lost_steps: u64,
    /// Machines that vanished and whose lost steps are not recorded.
    pub unknown_losses: usize,
    /// Productive time over the whole time, without that in which the run was complete.
    pub goodput: Option<f64>,
    /// Productive time over the time in which machines were alive: what `trainer simulate` calls goodput.
    pub goodput_of_machines: Option<f64>,
    /// When each generation lived, the oldest first.
    pub generations: Vec<Lived>,
    /// Clocks that were wrong, and what was assumed instead.
    pub notes: Vec<String>,
    /// All stretches, in order.
    #[serde(skip)]
    pub stretches: Vec<Stretch>,
}

impl Account {
    /// By the journal, and by the figures of the run's steps if they are given: all rows, those of steps that were done
    /// again included.
    pub fn of(state: &RunState, figures: Option<&Series>, now: Timestamp) -> Self {
        let stamps = Stamps::new(state, now);
        let mut rows = figures.map(rows).unwrap_or_default();
        let lives: Vec<Life<'_>> = lives(state, &mut rows);
        let step_s = step_s(&lives);
        let mut ledger = Ledger::default();
        let starts = stamps.starts(state, &lives, step_s, &mut ledger.notes);
        for (index, (life, start_s)) in lives.iter().zip(starts).enumerate() {
            ledger.gap(index.checked_sub(1).map(|before| &lives[before]), life, start_s, step_s);
            ledger.live(life, step_s);
        }
        ledger.sum(&lives)
    }

    /// The time of one name.
    pub fn part(&self, activity: Activity) -> Part {
        let found = self.parts.iter().find(|part| part.activity == activity);
        found.copied().unwrap_or(Part { activity, seconds: 0.0, machine_seconds: 0.0 })
    }

    /// Seconds of all machines.
    pub fn machine_s(&self) -> f64 {
        self.parts.iter().map(|part| part.machine_seconds).sum()
    }

    /// Seconds in which any machine was alive.
    pub fn alive_s(&self) -> f64 {
        self.stretches.iter().filter(|stretch| stretch.machines > 0).map(Stretch::seconds).sum()
    }
}

/// The stretches so far.
#[derive(Default)]
struct Ledger {
    stretches: Vec<Stretch>,
    lived: Vec<Lived>,
    notes: Vec<String>,
    now_s: f64,
}

impl Ledger {
    /// Everything up to `until_s` has this name.
    fn until(&mut self, until_s: f64, activity: Activity, life: Option<(&Life<'_>, usize)>, interrupted: bool) {
        if until_s <= self.now_s {
            return;
        }
        let generation = life.map(|(life, _)| life.formed.generation);
        let machines = life.map_or(0, |(_, machines)| machines);
        match self.stretches.last_mut() {
            Some(last)
                if (last.activity, last.generation, last.machines, last.interrupted)
                    == (activity, generation, machines, interrupted) =>
            {
                last.end_s = until_s;
            }
            _ => self.stretches.push(Stretch {
                activity,
                begin_s: self.now_s,
                end_s: until_s,
                generation,
                machines,
                interrupted,
            }),
        }
        self.now_s = until_s;
    }

    /// The time from one generation to the next.
    fn gap(&mut self, before: Option<&Life<'_>>, next: &Life<'_>, start_s: Option<f64>, step_s: Option<f64>) {
        let Some(start_s) = start_s else { return };
        let Some(before) = before else { return self.until(start_s, Activity::Waiting, None, false) };
        if start_s < self.now_s - NOTABLE_S {
            let (a, b) = (before.formed.generation, next.formed.generation);
            let size = human::seconds(self.now_s - start_s);
            self.notes.push(format!(
                "By its clock generation {b} began {size} before generation {a} ended: it counts from there."
            ));
        }
        let alive = match before.end {
            End::Completed => return self.until(start_s, Activity::Complete, None, false),
            End::Said => return self.until(start_s, Activity::Away, None, false),
            End::Vanished | End::Open => return self.until(start_s, Activity::Unrecorded, None, false),
            End::Handed => Activity::Ending,
            End::Broken => Activity::Repeated,
        };
        // The others have noticed at some time. A longer gap is a clock's.
        let step = |commit: &Checkpoint| commit.committed.step.get();
        let steps = before.commits.windows(2).map(|pair| step(pair[1]).saturating_sub(step(pair[0]))).max();
        let noticed = self.now_s + credible_s(step_s, steps.unwrap_or(0));
        self.until(start_s.min(noticed), alive, Some((before, before.left)), true);
        if start_s > self.now_s {
            let (a, b) = (before.formed.generation, next.formed.generation);
            self.notes
                .push(format!("Generation {b} follows generation {a} much later than a group takes to form anew."));
            self.until(start_s, Activity::Unrecorded, None, false);
        }
    }

    /// The time of one generation.
    fn live(&mut self, life: &Life<'_>, step_s: Option<f64>) {
        let begin = self.now_s;
        let offsets = life.offsets(step_s);
        let end = life.last_sign(&offsets, step_s);
        let machines = life.formed.roster.len();
        let alive = Some((life, machines));
        // When each save's step ended, and how long the loop stood still then.
        let mut saves: Vec<(f64, f64, u64)> = Vec::with_capacity(offsets.len());
        for (commit, offset) in life.commits.iter().zip(&offsets) {
            let cost = commit.committed.cost;
            saves.push((offset - known(cost.durable_s), known(cost.stall_s), commit.committed.step.get()));
        }
        let (first_s, first_step) = match (saves.first(), life.said) {
            (Some((order, _, step)), _) => (order.max(0.0), *step),
            (None, Some((_, step))) => (end, step.max(life.begun)),
            (None, None) => (end, life.rows.last().map_or(0, |row| row.step).max(life.begun)),
        };
        let training = life.training(life.begun, first_step, step_s).unwrap_or(first_s);
        let mut at = (first_s - training).max(0.0);
        if first_step == life.begun && saves.is_empty() {
            // It has not finished a step.
            at = end;
        }
        self.until(begin + at, Activity::Starting, alive, life.resumed);
        let mut step = life.begun;
        for (order, stall, saved) in saves {
            let order = order.max(at);
            self.train(life, begin + order, step, saved);
            at = (order + stall).min(end.max(order));
            self.until(begin + at, Activity::Stalled, alive, false);
            step = step.max(saved);
        }
        match life.end {
            End::Open => self.until(begin + end, Activity::Productive, alive, false),
            End::Vanished | End::Broken => self.until(begin + end, Activity::Repeated, alive, true),
            End::Completed | End::Said | End::Handed => {
                let reached = life.reached();
                if reached > step {
                    let training = life.training(step, reached, step_s).unwrap_or(end);
                    self.train(life, begin + (at + training).min(end), step, reached);
                }
                self.until(begin + end, Activity::Ending, alive, life.cut);
            }
        }
        let nodes = life.formed.roster.iter().map(|entry| entry.node.clone()).collect();
        self.lived.push(Lived { generation: life.formed.generation, begin_s: begin, end_s: self.now_s, nodes });
    }

    /// Steps after `from` up to `to`, until `until_s`: those up to the limit count.
    fn train(&mut self, life: &Life<'_>, until_s: f64, from: u64, to: u64) {
        let alive = Some((life, life.formed.roster.len()));
        let counts = life.limit.clamp(from.min(to), to) - from.min(to);
        let share = match to.saturating_sub(from) {
            0 => f64::from(u8::from(from <= life.limit)),
            steps => counts as f64 / steps as f64,
        };
        let until = if share >= 1.0 { until_s } else { self.now_s + (until_s - self.now_s).max(0.0) * share };
        self.until(until, Activity::Productive, alive, false);
        self.until(until_s, Activity::Repeated, alive, true);
    }

    fn sum(self, lives: &[Life<'_>]) -> Account {
        let Self { stretches, lived, notes, now_s } = self;
        let mut parts = Vec::new();
        for activity in Activity::ALL {
            let of = stretches.iter().filter(|stretch| stretch.activity == activity);
            let (seconds, machine_seconds) = of.fold((0.0, 0.0), |(seconds, machines), stretch| {
                (seconds + stretch.seconds(), machines + stretch.seconds() * stretch.machines as f64)
            });
            if seconds > 0.0 {
                parts.push(Part { activity, seconds, machine_seconds });
            }
        }
        let (mut useful_steps, mut lost_steps) = (0, 0);
        for life in lives {
            let (reached, kept) = (life.reached(), life.limit.max(life.begun));
            useful_steps += reached.min(life.limit).saturating_sub(life.begun);
            lost_steps += reached.saturating_sub(kept);
        }
        let mut account = Account {
            whole_s: now_s,
            parts,
            useful_steps,
            lost_steps,
            unknown_losses: lives.iter().filter(|life| matches!(life.end, End::Vanished | End::Broken)).count(),
            goodput: None,
            goodput_of_machines: None,
            generations: lived,
            notes,
            stretches,
        };
        let productive = account.part(Activity::Productive);
        let share = |of: f64, whole: f64| (whole > 0.0).then(|| of / whole);
        account.goodput = share(productive.seconds, now_s - account.part(Activity::Complete).seconds);
        account.goodput_of_machines = share(productive.machine_seconds, account.machine_s());
        account
    }
}

#[cfg(test)]
pub(super) mod tests;
