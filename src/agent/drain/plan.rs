//! What can still be saved before a machine goes away: a pure decision over what is known.
//!
//! # The table
//! With `needs` the time until the newest step would be durable (its lower bound, mean and upper bound: low, expected,
//! high), and `left` the announced time less [`LAST_WORDS_S`] for the journal:
//!
//! | left | decision |
//! |---|---|
//! | unknown, or no save was ever measured | save everything at once |
//! | ≥ the reserve, and the time may be used | save once as an insurance, train on |
//! | ≥ needs, low | stop, save everything: a full save, or only the missing part of one |
//! | ≥ the rest of a save under way that is newer than the newest checkpoint | stop, finish that one; report the loss |
//! | ≥ half of needs, low | stop, and try to save everything: the pace was measured during training, which has now stopped |
//! | ≥ half of that rest, low | stop, and try to finish that one; report the loss |
//! | less | leave at once; report the loss |
//!
//! The reserve covers the rest of the running step, one more step (the next look may come when it has begun), one copy
//! and *two* full saves, each at its upper bound: a save may have begun a moment ago, and it is finished first. It is
//! never less than [`LEAST_RESERVE_S`]. Stopping at once on a two-minute notice when a save takes a second would throw
//! the two minutes away, on every interruption (`trainer simulate` shows it). A plan is tried unless it is hopeless: a
//! save that is not durable in time is given up [`LAST_WORDS_S`] before the deadline, so that the journal can say what
//! was lost.
//!
//! An upload that has begun is never stopped in favour of a newer state: it holds all but the steps since it began, and
//! the newer one would have to start from zero. The newest state is copied beside it; where a node has one slot, it is
//! copied when the upload has ended, since there is no other place for it.

use super::{estimate::Estimate, timeline::Usual};
use crate::{goodput::LEAST_RESERVE_S, ids::Step, journal::DrainPlan, report::human};

/// Time reserved for the journal's last record and the process's end, seconds.
pub const LAST_WORDS_S: f64 = 1.5;

/// A save that needs more than this many times the time left, even at the best pace ever measured, is not begun; one
/// under way that needs more is given up.
const HOPELESS: f64 = 2.0;

/// Everything the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    /// Time until the machine goes away, seconds; `None`: not announced.
    pub left_s: Option<f64>,
    /// A deadline that is usual but not certain: it is reported, and nothing follows from it.
    pub usual: Option<Usual>,
    /// Whether the time left may be used: nobody waits for this process's end.
    pub may_train_on: bool,
    /// The newest finished step.
    pub finished: Step,
    /// The newest checkpoint.
    pub committed: Step,
    /// The loop has ended: there will be no newer state.
    pub ended: bool,
    /// The save under way, and the estimate of its rest.
    pub in_flight: Option<(Step, Option<Estimate>)>,
    /// The rest of the running step.
    pub step: Estimate,
    /// A whole step.
    pub whole_step: Estimate,
    /// Copying a snapshot.
    pub copy: Estimate,
    /// It is copied when the save under way has ended: they have one slot.
    pub copy_waits: bool,
    /// Uploading and committing one whole save; `None`: not measured yet.
    pub save: Option<Estimate>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Save now as an insurance, and train until this much time is left, seconds.
    TrainOn {
        /// The reserve.
        until_left_s: f64,
    },
    /// Stop the loop, and do this.
    Drain {
        /// What is saved.
        plan: DrainPlan,
        /// How long that takes from now; `None`: unknown, or nothing is saved.
        needs: Option<Estimate>,
    },
}

/// The decision, and the reason in words and numbers.
pub fn decide(now: &Situation) -> (Decision, String) {
    let newest_under_way = now.ended && now.in_flight.is_some_and(|(step, _)| step >= now.finished);
    let whole = if newest_under_way { DrainPlan::OnlyMissing } else { DrainPlan::FullSave };
    let rest = now.in_flight.map(|(_, rest)| rest);
    let needs = match (newest_under_way, rest, now.save) {
        (true, rest, _) => rest.flatten(),
        // The save under way is finished first, while the loop ends and the state is copied.
        (false, Some(rest), Some(save)) if now.copy_waits => {
            Some(now.step.beside(rest.unwrap_or(save)).then(now.copy).then(save))
        }
        (false, Some(rest), Some(save)) => Some(now.step.then(now.copy).beside(rest.unwrap_or(save)).then(save)),
        (false, None, Some(save)) => Some(now.step.then(now.copy).then(save)),
        (false, _, None) => None,
    };
    let begin = |why: String| (Decision::Drain { plan: whole, needs }, why);
    let time = human::seconds;
    let Some(needs) = needs else {
        return begin("no save was measured yet: the last one begins at once".into());
    };
    let needed = format!("the last save takes {}, at most {}", time(needs.mean), time(needs.high));
    let Some(left) = now.left_s else {
        let known = now
            .usual
            .map_or_else(|| "no deadline is known".to_owned(), |usual| format!("no binding deadline ({usual})"));
        return begin(format!("{known}; {needed}"));
    };
    let usable = left - LAST_WORDS_S;
    if now.may_train_on && !now.ended {
        let save = now.save.unwrap_or(needs).high;
        let until_left_s =
            (LAST_WORDS_S + now.step.high + now.whole_step.high + now.copy.high + 2.0 * save).max(LEAST_RESERVE_S);
        if left > until_left_s {
            let why = format!("{} left, {needed}: training goes on until {} are left", time(left), time(until_left_s));
            return (Decision::TrainOn { until_left_s }, why);
        }
    }
    if needs.low <= usable {
        return begin(format!("{} left; {needed}", time(left)));
    }
    let least = format!("{} left, the last save takes at least {}", time(left.max(0.0)), time(needs.low));
    let lost = |since: Step| human::plural(now.finished.get().saturating_sub(since.get()), "finished step");
    let older = now.in_flight.filter(|(step, _)| !newest_under_way && *step > now.committed);
    let finish = |step: Step, rest: Estimate, how: &str| {
        let why = format!("{least}: the save of step {step} {how} instead, {} after it will be lost", lost(step));
        (Decision::Drain { plan: DrainPlan::FinishInFlight, needs: Some(rest) }, why)
    };
    match older {
        Some((step, Some(rest))) if rest.low <= usable => {
            finish(step, rest, &format!("is finished in {}", time(rest.mean)))
        }
        _ if needs.low <= HOPELESS * usable => begin(format!("{least}: it is tried")),
        Some((step, Some(rest))) if rest.low <= HOPELESS * usable => {
            finish(step, rest, &format!("needs {} more and is tried", time(rest.mean)))
        }
        _ => {
            let why = format!("{least}: nothing can be saved, {} will be lost", lost(now.committed));
            (Decision::Drain { plan: DrainPlan::StopEarly, needs: None }, why)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step of 1 s, a copy of 0.5 s, a save of 10 s (8 to 12), 40 steps finished, 30 committed.
    const CALM: Situation = Situation {
        left_s: Some(120.0),
        usual: None,
        may_train_on: false,
        finished: Step(40),
        committed: Step(30),
        ended: false,
        in_flight: None,
        step: Estimate { low: 0.0, mean: 0.5, high: 1.0 },
        whole_step: Estimate { low: 0.8, mean: 1.0, high: 1.2 },
        copy: Estimate { low: 0.5, mean: 0.5, high: 0.5 },
        copy_waits: false,
        save: Some(Estimate { low: 8.0, mean: 10.0, high: 12.0 }),
    };
    const LONG: Estimate = Estimate { low: 25.0, mean: 30.0, high: 35.0 };
    const HALF: Estimate = Estimate { low: 4.0, mean: 5.0, high: 6.0 };

    fn plan(situation: Situation) -> (&'static str, Option<f64>) {
        match decide(&situation).0 {
            Decision::TrainOn { until_left_s } => ("train on", Some(until_left_s)),
            Decision::Drain { plan, needs } => {
                let name = match plan {
                    DrainPlan::FullSave => "full save",
                    DrainPlan::OnlyMissing => "only missing",
                    DrainPlan::FinishInFlight => "finish in flight",
                    DrainPlan::StopEarly => "stop early",
                };
                (name, needs.map(|needs| needs.mean))
            }
        }
    }

    #[test]
    fn the_deadline_decides_what_is_saved() {
        let in_flight = Some((Step(36), Some(HALF)));
        let table: &[(&str, Situation, &str, Option<f64>)] = &[
            ("two minutes", CALM, "full save", Some(11.0)),
            ("Azure's and GCP's 30 s", Situation { left_s: Some(30.0), ..CALM }, "full save", Some(11.0)),
            // 10 − 1.5 is exactly what it takes if all goes well.
            ("Docker's 10 s, just possible", Situation { left_s: Some(10.0), ..CALM }, "full save", Some(11.0)),
            ("a moment less is worth a try", Situation { left_s: Some(9.9), ..CALM }, "full save", Some(11.0)),
            ("half of it", Situation { left_s: Some(5.75), ..CALM }, "full save", Some(11.0)),
            ("hopeless", Situation { left_s: Some(5.74), ..CALM }, "stop early", None),
            ("nobody knows", Situation { left_s: None, ..CALM }, "full save", Some(11.0)),
            ("past", Situation { left_s: Some(-5.0), ..CALM }, "stop early", None),
            ("not a time", Situation { left_s: Some(f64::NAN), ..CALM }, "stop early", None),
            ("no save was measured", Situation { save: None, left_s: Some(1.0), ..CALM }, "full save", None),
            // The copy waits for nothing, the upload for the one before it.
            ("one in flight", Situation { in_flight, ..CALM }, "full save", Some(15.0)),
            // 4 + 0.5 + 8 at best: the copy waits, too.
            ("one slot, and one in flight", Situation { copy_waits: true, in_flight, ..CALM }, "full save", Some(15.5)),
            (
                "one slot, and time enough but for the wait",
                Situation { copy_waits: true, in_flight, left_s: Some(13.7), ..CALM },
                "finish in flight",
                Some(5.0),
            ),
            ("two slots, and that time", Situation { in_flight, left_s: Some(13.7), ..CALM }, "full save", Some(15.0)),
            ("one slot, and nothing in flight", Situation { copy_waits: true, ..CALM }, "full save", Some(11.0)),
            (
                "time for the one in flight only",
                Situation { in_flight, left_s: Some(10.0), ..CALM },
                "finish in flight",
                Some(5.0),
            ),
            ("just so", Situation { in_flight, left_s: Some(5.5), ..CALM }, "finish in flight", Some(5.0)),
            // Uploaded data is not thrown away for a shortfall with which a save would still be begun.
            ("nearly so", Situation { in_flight, left_s: Some(5.4), ..CALM }, "finish in flight", Some(5.0)),
            ("half of that", Situation { in_flight, left_s: Some(3.5), ..CALM }, "finish in flight", Some(5.0)),
            ("not even for that", Situation { in_flight, left_s: Some(3.4), ..CALM }, "stop early", None),
            (
                "it is no newer",
                Situation { in_flight: Some((Step(30), Some(HALF))), left_s: Some(10.0), ..CALM },
                "full save",
                Some(15.0),
            ),
            (
                "nothing is known of it",
                Situation { in_flight: Some((Step(36), None)), left_s: Some(10.0), ..CALM },
                "full save",
                Some(20.0),
            ),
            (
                "its pace alone is known",
                Situation { in_flight, save: None, left_s: Some(10.0), ..CALM },
                "full save",
                None,
            ),
            (
                "the newest is under way",
                Situation { ended: true, in_flight: Some((Step(40), Some(HALF))), left_s: Some(10.0), ..CALM },
                "only missing",
                Some(5.0),
            ),
            (
                "and can't be finished",
                Situation { ended: true, in_flight: Some((Step(40), Some(HALF))), left_s: Some(3.4), ..CALM },
                "stop early",
                None,
            ),
            ("time is ours", Situation { may_train_on: true, ..CALM }, "train on", Some(28.2)),
            ("time was ours", Situation { may_train_on: true, left_s: Some(28.2), ..CALM }, "full save", Some(11.0)),
            // The next step may have begun when it is looked at again: a whole one must fit, too.
            (
                "long steps",
                Situation { may_train_on: true, left_s: Some(70.0), step: LONG, whole_step: LONG, ..CALM },
                "full save",
                Some(40.5),
            ),
            (
                "saves that take no time still leave a reserve",
                Situation { may_train_on: true, save: Some(Estimate::exactly(0.01)), ..CALM },
                "train on",
                Some(LEAST_RESERVE_S),
            ),
            ("not without a deadline", Situation { may_train_on: true, left_s: None, ..CALM }, "full save", Some(11.0)),
            ("not without a measure", Situation { may_train_on: true, save: None, ..CALM }, "full save", None),
            ("not when it has ended", Situation { may_train_on: true, ended: true, ..CALM }, "full save", Some(11.0)),
        ];
        for (what, situation, expected, needs) in table {
            let (decision, reason) = decide(situation);
            assert_eq!(plan(*situation), (*expected, *needs), "{what}: {decision:?}: {reason}");
        }
    }

    #[test]
    fn reasons_name_what_will_be_lost() {
        let reason = |situation| decide(&situation).1;
        let in_flight = Some((Step(36), Some(HALF)));
        assert_eq!(reason(CALM), "2m left; the last save takes 11.0 s, at most 13.5 s");
        assert_eq!(
            reason(Situation { in_flight, left_s: Some(10.0), ..CALM }),
            "10.0 s left, the last save takes at least 12.0 s: the save of step 36 is finished in 5.00 s instead, 4 \
            finished steps after it \
             will be lost"
        );
        assert_eq!(
            reason(Situation { in_flight, left_s: Some(4.0), ..CALM }),
            "4.00 s left, the last save takes at least 12.0 s: the save of step 36 needs 5.00 s more and is tried \
            instead, 4 finished steps \
             after it will be lost"
        );
        let usual = Usual { source: "sigterm", left: std::time::Duration::from_secs(10) };
        assert_eq!(
            reason(Situation { left_s: None, usual: Some(usual), ..CALM }),
            "no binding deadline (usually 10.0 s here; set TRAINER_STOP_WINDOW); the last save takes 11.0 s, at most \
            13.5 s"
        );
        assert_eq!(
            reason(Situation { left_s: Some(2.0), ..CALM }),
            "2.00 s left, the last save takes at least 8.50 s: nothing can be saved, 10 finished steps will be lost"
        );
    }

    /// More time never saves less, whatever is known.
    #[test]
    fn more_time_never_saves_less() {
        let worth = |situation: &Situation| match decide(situation).0 {
            Decision::TrainOn { .. } => 3,
            Decision::Drain { plan: DrainPlan::FullSave | DrainPlan::OnlyMissing, .. } => 2,
            Decision::Drain { plan: DrainPlan::FinishInFlight, .. } => 1,
            Decision::Drain { plan: DrainPlan::StopEarly, .. } => 0,
        };
        for in_flight in [None, Some((Step(36), Some(HALF))), Some((Step(36), None)), Some((Step(20), Some(HALF)))] {
            for (may_train_on, ended) in [(false, false), (true, false), (true, true)] {
                let mut before = 0;
                for tenth in 0..1500 {
                    let left_s = Some(f64::from(tenth) / 10.0);
                    let now = worth(&Situation { left_s, may_train_on, ended, in_flight, ..CALM });
                    assert!(now >= before, "{left_s:?} {in_flight:?} {may_train_on} {ended}");
                    before = now;
                }
                assert!(before >= 2);
            }
        }
    }
}
