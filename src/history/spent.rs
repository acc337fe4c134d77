//! What a run has taken so far, and whether that ends it: the caps of [`CapsConfig`]. Pure.
//!
//! Training is measured by monotonic clocks: each `committed` record says how long its generation had lived, and the
//! newest generation's node counts on from there. So a clock that is set, forward or back, neither ends a run nor lets
//! it train longer. What a machine did after its last record before it was killed is not known, and not counted.
//!
//! Time since the creation is a difference of wall clocks, which may be wrong. It is at least the time of training, so
//! that a clock that goes back lets the run train for [`CapsConfig::max_wait_hours`] at most. A record that was stamped
//! before this program existed says nothing.

use jiff::Timestamp;

use crate::{
    config::{CapsConfig, HOUR_S, RunConfig},
    goodput::Observed,
    journal::{Cap, Reached, RunState},
};

/// 2024-01-01: no clock that is right has stamped a record before.
pub(super) const PLAUSIBLE_S: i64 = 1_704_067_200;

/// What a run has taken so far; seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Of training: its generations, without the waits between them.
    pub trained_s: f64,
    /// The same, times the nodes of each generation.
    pub machine_s: f64,
    /// Since it was created.
    pub waited_s: f64,
}

impl Spent {
    /// By the journal, at `now`. Of a generation that is at work, only what its records show.
    pub fn of(state: &RunState, now: Timestamp) -> Self {
        let Observed { trained_s, machine_s, .. } = Observed::of(state);
        let stamps = std::iter::once(state.created_at()).chain(state.formations().iter().map(|formed| formed.at));
        let created = stamps.into_iter().find(|at| at.as_second() >= PLAUSIBLE_S);
        let waited_s = created.map_or(0.0, |created| now.duration_since(created).as_secs_f64());
        Self { trained_s, machine_s, waited_s: waited_s.max(trained_s) }
    }

    /// After these many more seconds of training on `nodes` nodes.
    #[must_use]
    pub fn after(self, seconds: f64, nodes: usize) -> Self {
        let Self { trained_s, machine_s, waited_s } = self;
        Self {
            trained_s: trained_s + seconds,
            machine_s: machine_s + seconds * nodes as f64,
            waited_s: waited_s + seconds,
        }
    }

    /// What one of the caps limits, in its unit: hours, or US dollars.
    pub fn of_cap(&self, cap: Cap, caps: &CapsConfig) -> f64 {
        match cap {
            Cap::MaxHours => self.trained_s / HOUR_S,
            Cap::MaxWaitHours => self.waited_s / HOUR_S,
            Cap::MaxCost => self.machine_s / HOUR_S * caps.price_per_hour.unwrap_or(0.0),
        }
    }

    /// The first cap that is reached.
    pub fn reached(&self, caps: &CapsConfig) -> Option<Reached> {
        self.of_caps(caps).find(|cap| cap.used >= cap.limit)
    }

    /// Every cap that there is, reached or not.
    pub fn of_caps(&self, caps: &CapsConfig) -> impl Iterator<Item = Reached> {
        let of = |cap: Cap| Some(Reached { cap, limit: cap.limit(caps)?, used: self.of_cap(cap, caps) });
        Cap::ALL.into_iter().filter_map(of)
    }

    /// For people: what each cap allows, and what is used of it; and the costs, if a price is known.
    pub fn lines(&self, caps: &CapsConfig) -> Vec<String> {
        let of = |cap: Cap| {
            let amount = cap.amount(self.of_cap(cap, caps));
            match cap.limit(caps) {
                Some(limit) => Some(format!("{amount}, of {} = {limit}", cap.key())),
                None if cap == Cap::MaxCost && caps.price_per_hour.is_some() => Some(amount),
                None => None,
            }
        };
        Cap::ALL.into_iter().filter_map(of).collect()
    }
}

/// The cap that ends the run before it has trained any further, if it has reached one under `config`: as its last
/// record says, or as its journal shows. A run whose last step is committed lacks nothing but its last record.
pub fn at_cap(state: &RunState, config: &RunConfig, now: Timestamp) -> Option<Reached> {
    let newest = state.newest().map(|newest| newest.committed.step).unwrap_or_default();
    if !config.run.has_any() || newest >= config.workload.last_step() {
        return None;
    }
    let said = state.capped().filter(|reached| reached.holds(&config.run));
    said.or_else(|| Spent::of(state, now).reached(&config.run))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        history::tests::{committed, created, formed, group},
        ids::{Generation, Step},
        journal::{Entry, Record},
    };

    /// A year later than any test's records of [`crate::history::tests`].
    const BEGAN: i64 = 1_800_000_000;

    fn at(second: f64) -> Timestamp {
        Timestamp::from_nanosecond(i128::from(BEGAN) * 1_000_000_000 + (second * 1e9) as i128).unwrap()
    }

    /// A run with these records at these seconds.
    fn state(records: Vec<(f64, Record)>) -> RunState {
        let entry = |(second, record): (f64, Record)| {
            let mut entry = crate::history::tests::entries(vec![record]).remove(0);
            entry.at = at(second);
            entry
        };
        let mut entries = records.into_iter().map(entry);
        let first: Entry = entries.next().unwrap();
        let Record::Created { run_id, .. } = &first.record else { panic!("it is the first record") };
        let mut state = RunState::begin(&run_id.clone(), first).unwrap();
        for (number, entry) in (1..).zip(entries) {
            state.apply(number, entry).unwrap();
        }
        state
    }

    /// A commit after this generation has lived this long.
    fn lived(step: u64, generation: u64, lived_s: f64) -> Record {
        let mut record = committed(step, generation);
        if let Record::Committed(committed) = &mut record {
            committed.cost.lived_s = lived_s;
        }
        record
    }

    fn ended(step: u64, generation: u64, cap: Option<Reached>) -> Record {
        let (step, generation) = (Step(step), Generation(generation));
        let verdict = "the last finished step is committed".to_owned();
        Record::Interrupted { generation, step, committed: Some(step), lost_steps: 0, verdict, drain: None, cap }
    }

    fn caps(max_hours: Option<f64>, max_wait_hours: Option<f64>, max_cost: Option<f64>) -> CapsConfig {
        CapsConfig { max_hours, max_wait_hours, max_cost, price_per_hour: Some(2.0) }
    }

    /// An hour on one node, two hours' wait, then half an hour on two nodes.
    fn story() -> Vec<(f64, Record)> {
        vec![
            (0.0, created()),
            (0.0, formed(1, None, &[])),
            (3600.0, lived(10, 1, 3600.0)),
            (3600.0, ended(10, 1, None)),
            (10_800.0, group(2, None, &[("n1", 1), ("n2", 1)])),
            (12_600.0, lived(20, 2, 1800.0)),
        ]
    }

    #[test]
    fn training_is_counted_without_waits_cost_by_nodes_and_waits_by_the_clock() {
        let spent = Spent::of(&state(story()), at(12_600.0));
        assert_eq!(spent, Spent { trained_s: 5400.0, machine_s: 7200.0, waited_s: 12_600.0 });
        for (caps, reached) in [
            (caps(None, None, None), None),
            (caps(Some(1.6), Some(3.6), Some(4.1)), None),
            (caps(Some(1.5), None, None), Some((Cap::MaxHours, 1.5))),
            (caps(None, Some(3.5), None), Some((Cap::MaxWaitHours, 3.5))),
            // Two machine-hours at 2 USD.
            (caps(None, None, Some(4.0)), Some((Cap::MaxCost, 4.0))),
            (caps(Some(1.0), Some(1.0), Some(1.0)), Some((Cap::MaxHours, 1.5))),
        ] {
            let found = spent.reached(&caps).map(|reached| (reached.cap, reached.used));
            assert_eq!(found, reached, "{caps:?}");
        }
        let later = spent.after(360.0, 2);
        assert_eq!(later, Spent { trained_s: 5760.0, machine_s: 7920.0, waited_s: 12_960.0 });
        let lines = spent.lines(&caps(Some(2.0), None, None));
        assert_eq!(lines, ["1.50 h trained, of run.max_hours = 2", "4.00 USD spent"]);
        assert!(spent.lines(&CapsConfig::default()).is_empty());
    }

    #[test]
    fn a_clock_that_is_set_neither_ends_a_run_nor_lets_it_train_on_without_bound() {
        let state = state(story());
        // Back by years: at least what it has trained.
        let spent = Spent::of(&state, at(-1e8));
        assert_eq!((spent.trained_s, spent.waited_s), (5400.0, 5400.0));
        // A machine that came up in 1970 has created the run, or is the one that looks.
        let mut early = story();
        early[0].0 = -(BEGAN as f64);
        let spent = Spent::of(&self::state(early), at(12_600.0));
        assert_eq!(spent.waited_s, 12_600.0, "the first plausible record counts");
        // The clock goes back between the last commit and the record of the end: what was measured stays.
        let mut back = story();
        back[3].0 = -1e6;
        assert_eq!(Spent::of(&self::state(back), at(12_600.0)).trained_s, 5400.0);
        // And forward by half a century: no more than the steps account for.
        let mut forward = story();
        forward[3].0 = 1.5e9;
        assert!(Spent::of(&self::state(forward), at(12_600.0)).trained_s < 5400.0 + 3601.0);
    }

    #[test]
    fn a_run_is_at_its_cap_as_its_record_says_or_as_its_journal_shows() {
        let reached = Reached { cap: Cap::MaxHours, limit: 2.0, used: 2.0 };
        let mut records = story();
        records.push((12_600.0, ended(20, 2, Some(reached))));
        let capped = state(records.clone());
        let config = |caps: CapsConfig, steps| {
            let mut config = capped.config().clone();
            (config.run, config.workload.train.steps) = (caps, steps);
            config
        };
        let now = at(12_600.0);
        let is = |state: &RunState, caps, steps| at_cap(state, &config(caps, steps), now).map(|it| it.cap);
        // The record says two hours, though its figures show 1.5: whoever wrote it has measured them.
        assert_eq!(is(&capped, caps(Some(2.0), None, None), 100), Some(Cap::MaxHours));
        assert_eq!(is(&capped, caps(Some(2.5), None, None), 100), None);
        assert_eq!(is(&capped, caps(None, None, None), 100), None);
        assert_eq!(is(&capped, caps(Some(2.5), Some(1.0), None), 100), Some(Cap::MaxWaitHours));
        // The last step is committed: the run is to complete.
        assert_eq!(is(&capped, caps(Some(2.0), None, None), 20), None);
        // Somebody has resumed it, and was killed: the record of before counts no more.
        records.push((12_700.0, formed(3, Some((20, 2)), &[("run.max_hours", "2.5")])));
        let resumed = state(records);
        assert_eq!(is(&resumed, caps(Some(2.0), None, None), 100), None);
        assert_eq!(resumed.capped(), None);
        // Killed at the cap, before the record.
        assert_eq!(is(&state(story()), caps(Some(1.5), None, None), 100), Some(Cap::MaxHours));
        assert_eq!(is(&state(story()), caps(Some(1.6), None, None), 100), None);
    }
}
