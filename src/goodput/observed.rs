//! Costs and losses observed in a run's journal.
//!
//! Records carry the wall clock of the machine that wrote them, which may be wrong by half a century when a machine
//! starts. So the journal's durations by a monotonic clock are trusted; other durations count only as far as the
//! completed steps account for them.

use jiff::Timestamp;

use crate::journal::{Checkpoint, Formation, FormedReason, Interruption, RunState};

/// The extra time of steps beyond their mean: repeated saves, validations, neighbours.
const SLACK: f64 = 2.0;
/// The most time of a generation beside its steps, seconds: start, restore, the end.
const BESIDE: f64 = 3600.0;
/// The most time of a generation whose steps can't be counted, seconds.
const UNKNOWN: f64 = 86_400.0;
/// A step that takes this many times the median was measured while the clock was being set.
const SET: f64 = 100.0;

/// Observations on a run, as far as its journal shows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Observed {
    /// Saves that were committed.
    pub saves: u64,
    /// Median time for which the loop stopped for a save, seconds. Slower steps during copying and uploading are not
    /// included.
    pub stall_s: Option<f64>,
    /// Median time from the end of a step to its `committed` record, seconds.
    pub durable_s: Option<f64>,
    /// Median time from a `formed` record that resumes to the first step after it, seconds. The start of machine and
    /// process, which comes before, is not included.
    pub restart_s: Option<f64>,
    /// Mean time from one step to the next, saves included, seconds.
    pub step_s: Option<f64>,
    /// Time from each `formed` record to the last record of its generation, summed up, seconds: without the waits
    /// between.
    pub trained_s: f64,
    /// The same times the nodes of each generation: seconds of machines.
    pub machine_s: f64,
    /// How often a machine went away and another one, or the same one again, or the rest of its group, continued.
    pub interruptions: u64,
    /// How many of these lost steps, or left no record.
    pub lossy: u64,
}

impl Observed {
    /// Reads the journal.
    pub fn of(state: &RunState) -> Self {
        let mut observed = Self { saves: state.checkpoints().len() as u64, ..Self::default() };
        let cost = |of: fn(&crate::journal::SaveCost) -> f64| {
            median(state.checkpoints().iter().map(|checkpoint| of(&checkpoint.committed.cost)).collect())
        };
        (observed.stall_s, observed.durable_s) = (cost(|cost| cost.stall_s), cost(|cost| cost.durable_s));
        observed.step_s = step_s(state);
        let mut restarts = Vec::new();
        for (index, formed) in state.formations().iter().enumerate() {
            let commits = state.checkpoints().of(formed.generation);
            let ended = state.interruptions().iter().find(|end| end.generation == formed.generation);
            let lived = lived(formed, &commits.clone().collect::<Vec<_>>(), ended, observed.step_s);
            observed.trained_s += lived;
            observed.machine_s += lived * formed.roster.len() as f64;
            if let (Some(point), Some(first), Some(step_s)) = (&formed.resume, commits.clone().next(), observed.step_s)
            {
                let steps = first.committed.step.get().saturating_sub(point.step.get()) as f64;
                restarts.push(lived_until(formed, first) - first.committed.cost.durable_s - steps * step_s);
            }
            let (interrupted, lossy) = match state.formations().get(index + 1).map(|next| next.reason) {
                // A run that had completed or failed, or was at its cap, was reopened: nothing was interrupted.
                Some(FormedReason::Started) => {
                    let was_over = formed.ended.is_some() || ended.is_some_and(|end| end.cap.is_some());
                    (!was_over, ended.is_none_or(|end| end.lost_steps > 0))
                }
                // Several nodes lost at once interrupt the group once: its cadence follows from the group's losses.
                Some(FormedReason::NodeLost) => (true, true),
                Some(FormedReason::NodeLeft) => (true, false),
                Some(FormedReason::WorkerDied | FormedReason::NodeJoined) | None => (false, false),
            };
            observed.interruptions += u64::from(interrupted);
            observed.lossy += u64::from(interrupted && lossy);
        }
        observed.restart_s = median(restarts).map(|restart| restart.max(0.0));
        observed
    }

    /// The share of losses that lost no step, if there were any losses.
    pub fn announced(&self) -> Option<f64> {
        (self.interruptions > 0).then(|| 1.0 - self.lossy as f64 / self.interruptions as f64)
    }
}

/// The longest time that this number of steps accounts for, seconds: a longer one comes from a clock that was wrong.
/// `step_s` is the mean time of a step, if it is known.
pub fn credible_s(step_s: Option<f64>, steps: u64) -> f64 {
    step_s.map_or(UNKNOWN, |step_s| BESIDE + SLACK * step_s * steps as f64)
}

/// From the start of a generation to a commit of it, seconds.
fn lived_until(formed: &Formation, commit: &Checkpoint) -> f64 {
    match commit.committed.cost.lived_s {
        lived if lived.is_finite() && lived > 0.0 => lived,
        _ => seconds(formed.at, commit.at),
    }
}

/// From the start of a generation to its last sign of life, seconds.
fn lived(formed: &Formation, commits: &[&Checkpoint], ended: Option<&Interruption>, step_s: Option<f64>) -> f64 {
    let begun = formed.resume.as_ref().map_or(0, |point| point.step.get());
    let until = commits.iter().map(|commit| commit.committed.step.get()).max();
    let known = commits
        .iter()
        .filter(|commit| commit.committed.cost.lived_s > 0.0)
        .max_by(|a, b| a.committed.cost.lived_s.total_cmp(&b.committed.cost.lived_s));
    // The generation's own mean, if the run's is not known: it includes the start.
    let own = known.filter(|commit| commit.committed.step.get() > begun);
    let own = own.map(|commit| commit.committed.cost.lived_s / (commit.committed.step.get() - begun) as f64);
    let step_s = step_s.or(own.filter(|step_s| step_s.is_finite()));
    let most = |from: u64, to: u64| credible_s(step_s, to.saturating_sub(from));
    // Beyond the measured time the wall clock continues.
    let (lived, from, at) = match known {
        Some(commit) => (lived_until(formed, commit), commit.committed.step.get(), commit.at),
        None => (0.0, begun, formed.at),
    };
    let last = commits.iter().map(|commit| commit.at).chain(ended.map(|end| end.at)).chain(formed.ended).max();
    let step = ended.map(|end| end.step.get()).max(until).unwrap_or(from);
    lived + last.map_or(0.0, |last| seconds(at, last)).min(most(from, step))
}

/// Mean seconds a step between the first and the last commit of each generation.
fn step_s(state: &RunState) -> Option<f64> {
    let mut stretches = Vec::new();
    for (a, b) in state.checkpoints().pairs() {
        if a.committed.generation == b.committed.generation && b.committed.step > a.committed.step {
            let (cost, before) = (b.committed.cost, a.committed.cost);
            let durable = cost.durable_s - before.durable_s;
            let measured = before.lived_s > 0.0 && cost.lived_s > before.lived_s;
            let between = if measured { cost.lived_s - before.lived_s } else { seconds(a.at, b.at) };
            let time = (between - if durable.is_finite() { durable } else { 0.0 }).max(0.0);
            stretches.push((time, (b.committed.step.get() - a.committed.step.get()) as f64));
        }
    }
    let middle = median(stretches.iter().map(|(time, steps)| time / steps).collect())?;
    stretches.retain(|(time, steps)| middle == 0.0 || time / steps <= SET * middle);
    let (time, steps) = stretches.iter().fold((0.0, 0.0), |(time, steps), more| (time + more.0, steps + more.1));
    (steps > 0.0 && time > 0.0).then_some(time / steps)
}

/// Both by the clock of one writer; another machine's may be behind.
fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64().max(0.0)
}

/// The median of those that are numbers and not negative.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).map(|value| value.max(0.0))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::journal::{Entry, Record};

    /// A run whose journal has these records at these seconds.
    fn state(records: &[(i64, Value)]) -> RunState {
        let created = include_bytes!("../../tests/fixtures/formats/v1/journal-created.json");
        let created = Entry::decode(created).unwrap();
        let Record::Created { run_id, .. } = &created.record else { panic!("it is the first record") };
        let mut state = RunState::begin(&run_id.clone(), created).unwrap();
        for (number, (second, record)) in (1..).zip(records) {
            let at = Timestamp::from_second(1_000_000 + second).unwrap();
            let attempt = "00112233445566778899aabbccddeeff";
            let entry = json!({"format": 7, "attempt": attempt, "at": at, "node": "n1", "record": record});
            state.apply(number, Entry::decode(entry.to_string().as_bytes()).unwrap()).unwrap();
        }
        state
    }

    fn formed(generation: u64, resume: Option<(u64, u64)>, reason: &str) -> Value {
        let resume = resume.map(|(step, generation)| json!({"step": step, "generation": generation}));
        json!({"kind": "formed", "generation": generation, "roster": [{"node": "n1", "workers": 1}], "world_size": 1,
               "resume": resume, "reason": reason})
    }

    fn committed(step: u64, generation: u64, stall_s: f64) -> Value {
        json!({"kind": "committed", "step": step, "generation": generation,
               "manifest": "m", "manifest_crc64": "0", "bytes": 1,
               "loss": 1.0, "cost": {"stall_s": stall_s, "copy_s": 0.5, "durable_s": 2.0}})
    }

    #[test]
    fn a_run_that_gets_more_steps_was_not_interrupted() {
        let story = [
            (0, formed(1, None, "started")),
            (112, committed(100, 1, 0.1)),
            (113, json!({"kind": "completed", "generation": 1, "step": 100, "loss": 1.0})),
            (500, formed(2, Some((100, 1)), "started")),
        ];
        let found = Observed::of(&state(&story));
        assert_eq!((found.interruptions, found.lossy, found.trained_s), (0, 0, 113.0));
        // So does one whose cap is raised.
        let cap = json!({"cap": "max_hours", "limit": 0.03, "used": 0.031});
        let end = json!({"kind": "interrupted", "generation": 1, "step": 100, "committed": 100, "lost_steps": 0,
                         "verdict": "x", "cap": cap});
        let [formed, committed, _, again] = story;
        let found = Observed::of(&state(&[formed, committed, (113, end), again]));
        assert_eq!((found.interruptions, found.lossy, found.trained_s), (0, 0, 113.0));
    }

    #[test]
    fn a_group_that_loses_a_node_is_interrupted_and_one_that_gains_a_node_is_not() {
        let next = |generation: u64, reason: &str, nodes: &[&str], gone: &[&str], joined: &[&str]| {
            let roster: Vec<Value> =
                (0..).zip(nodes).map(|(rank, node)| json!({"node": node, "workers": 1, "first_rank": rank})).collect();
            let gone: Vec<Value> = gone.iter().map(|node| json!({"node": node, "why": "gone"})).collect();
            json!({"kind": "formed", "generation": generation, "roster": roster, "world_size": nodes.len(),
                   "resume": {"step": 100, "generation": 1}, "reason": reason, "continues": generation - 1,
                   "gone": gone, "joined": joined})
        };
        for (reason, gone, joined, expected) in [
            ("node_lost", vec!["n2"], vec![], (1, 1)),
            ("node_left", vec!["n2"], vec![], (1, 0)),
            ("node_joined", vec![], vec!["n3"], (0, 0)),
            ("worker_died", vec![], vec![], (0, 0)),
        ] {
            let mut nodes = vec!["n1", "n2", "n3"];
            nodes.retain(|node| !gone.contains(node) && (*node != "n3" || !joined.is_empty()));
            let mut begun = next(1, "started", &["n1", "n2"], &[], &[]);
            (begun["resume"], begun["continues"]) = (Value::Null, Value::Null);
            let story = [(0, begun), (112, committed(100, 1, 0.1)), (200, next(2, reason, &nodes, &gone, &joined))];
            let found = Observed::of(&state(&story));
            assert_eq!((found.interruptions, found.lossy), expected, "{reason}");
        }
    }

    /// A machine that comes up in 1970 and learns the time a minute later: before its first commit, or between two.
    #[test]
    fn a_wrong_clock_at_boot_does_not_count_as_half_a_century_of_training() {
        let before = -1_000_000;
        let late = [
            (before, formed(1, None, "started")),
            (112, committed(100, 1, 0.1)),
            (212, committed(200, 1, 0.1)),
            (312, committed(300, 1, 0.1)),
        ];
        let found = Observed::of(&state(&late));
        assert_eq!((found.step_s, found.trained_s), (Some(1.0), BESIDE + SLACK * 300.0));
        // With one commit the time of a step is not known.
        assert_eq!(Observed::of(&state(&late[..2])).trained_s, UNKNOWN);
        let between = [
            (before, formed(1, None, "started")),
            (before + 112, committed(100, 1, 0.1)),
            (212, committed(200, 1, 0.1)),
            (312, committed(300, 1, 0.1)),
            (412, committed(400, 1, 0.1)),
        ];
        let found = Observed::of(&state(&between));
        assert_eq!((found.step_s, found.trained_s), (Some(1.0), BESIDE + SLACK * 400.0));
        // Measured times are trusted, and the clock only for the time after them.
        let mut measured = late.clone();
        for ((_, record), lived_s) in measured[1..].iter_mut().zip([112.0, 212.0, 312.0]) {
            record["cost"]["lived_s"] = json!(lived_s);
        }
        let found = Observed::of(&state(&measured));
        assert_eq!((found.step_s, found.trained_s), (Some(1.0), 312.0));
        let [formed, first, ..] = measured;
        let end = json!({"kind": "interrupted", "generation": 1, "step": 130, "committed": 100,
                         "lost_steps": 30, "verdict": "x"});
        assert_eq!(Observed::of(&state(&[formed, first, (142, end)])).trained_s, 112.0 + 30.0);
    }

    /// A second a step; restarts of 30, 10 and 40 s; one loss without a final record, one drained, and a worker that
    /// died.
    #[test]
    fn a_journal_shows_costs_and_losses() {
        let mut story = vec![
            (0, formed(1, None, "started")),
            (112, committed(100, 1, 0.1)),
            (212, committed(200, 1, 0.3)),
            (500, formed(2, Some((200, 1)), "started")),
            (632, committed(300, 2, 0.2)),
            (647, committed(315, 2, 0.1)),
        ];
        let interrupted = |lost_steps: u64| {
            json!({"kind": "interrupted", "generation": 2, "step": 315 + lost_steps,
                   "committed": 315, "lost_steps": lost_steps,
                   "verdict": "x"})
        };
        story.push((648, interrupted(0)));
        story.push((700, formed(3, Some((315, 2)), "started")));
        story.push((797, committed(400, 3, 0.2)));
        story.push((900, formed(4, Some((400, 3)), "worker_died")));
        story.push((1042, committed(500, 4, 0.2)));
        story.push((1043, json!({"kind": "completed", "generation": 4, "step": 500, "loss": 1.0})));
        let found = Observed::of(&state(&story));
        let expected = Observed {
            saves: 6,
            stall_s: Some(0.2),
            durable_s: Some(2.0),
            restart_s: Some(30.0),
            step_s: Some(1.0),
            trained_s: 212.0 + 148.0 + 97.0 + 143.0,
            machine_s: 212.0 + 148.0 + 97.0 + 143.0,
            interruptions: 2,
            lossy: 1,
        };
        assert_eq!((found, found.announced()), (expected, Some(0.5)));
        story[6].1 = interrupted(3);
        assert_eq!(Observed::of(&state(&story)).lossy, 2);
        assert_eq!(Observed::of(&state(&[])), Observed::default());
        assert_eq!(Observed::of(&state(&story[..1])).announced(), None);
    }
}
