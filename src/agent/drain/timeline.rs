//! The notices to this node and the response to them: the deadline that follows from them, and the story that the
//! journal records at the end.
//!
//! Bookkeeping without a clock of its own: the time is passed in. [`plan`](super::plan) decides what to do. A deadline
//! counts down from the moment at which its notice was heard. The earliest binding deadline wins. A deadline already
//! past when its notice was heard is ignored: the machine may go at any moment, or stay, so everything is saved at
//! once, for as long as the machine lasts.

use std::time::Duration;

use super::super::save::scheduler::Moment;
use crate::{
    journal::{Drain, DrainPlan, Happened},
    notice::{Kind, Notice},
    report::human,
};

/// The same signal again within this time is an echo: a process group and a script that forwards it both deliver it.
const ECHO: Duration = Duration::from_secs(1);
/// The most moments of one drain that are recorded.
const MOST_MOMENTS: usize = 32;

/// A deadline that is not binding, and its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usual {
    /// The source.
    pub source: &'static str,
    /// The time left.
    pub left: Duration,
}

impl std::fmt::Display for Usual {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let left = human::seconds(self.left.as_secs_f64());
        match self.source {
            "aws-asg" => write!(f, "the lifecycle hook, which is extended, would wait {left}"),
            "sigusr1" => write!(f, "usually {left} here; set TRAINER_USR1_WINDOW"),
            _ => write!(f, "usually {left} here; set TRAINER_STOP_WINDOW"),
        }
    }
}

/// The planned response to a notice.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The plan.
    pub plan: DrainPlan,
    reason: String,
    /// When it was planned, seconds from the first notice.
    at_s: f64,
    /// When the planned state is expected to be durable.
    until_s: Option<f64>,
}

/// When each signal that asks this node to leave was first heard.
#[derive(Debug, Default)]
pub struct Signals(Vec<(&'static str, Moment)>);

impl Signals {
    /// A notice. Returns whether it is a signal that had come before, and no echo: a repeated signal means that the
    /// sender does not want to wait.
    pub fn hear(&mut self, notice: &Notice, now: Moment) -> bool {
        let before = self.0.iter().find(|(source, _)| *source == notice.source).map(|(_, first)| *first);
        if notice.is_signal() && before.is_none() {
            self.0.push((notice.source, now));
        }
        before.is_some_and(|first| now.saturating_sub(first) >= ECHO)
    }
}

/// The notices, and the response to them.
#[derive(Debug, Default)]
pub struct Timeline {
    first: Option<(Moment, &'static str)>,
    signals: Signals,
    until: Option<Moment>,
    announced: Option<Duration>,
    /// Whether somebody waits for this process's end, or the machine's end has no announced time.
    at_once: bool,
    /// The last deadline that is not certain.
    usual: Option<Usual>,
    /// When the planned state was durable.
    actual_s: Option<f64>,
    moments: Vec<Happened>,
}

impl Timeline {
    /// A notice that asks this node to leave. Returns whether it [asks again](Signals::hear).
    pub fn hear(&mut self, notice: &Notice, now: Moment) -> bool {
        let again = self.signals.hear(notice, now);
        self.first.get_or_insert((now, notice.source));
        self.at_once |= notice.kind == Kind::Stop || notice.deadline.is_none_or(|left| left.is_zero());
        let mut what = format!("{} was heard", notice.source);
        match notice.deadline {
            Some(Duration::ZERO) => what.push_str(", its time is up"),
            Some(left) if notice.deadline_binds() => {
                what = format!("{what}, {:.1} s left", left.as_secs_f64());
                if let Some(until) = now.checked_add(left)
                    && self.until.is_none_or(|known| until < known)
                {
                    self.until = Some(until);
                    self.announced.get_or_insert(left);
                }
            }
            Some(left) => {
                let usual = Usual { source: notice.source, left };
                what = format!("{what}; {usual}");
                self.usual = Some(usual);
            }
            None => {}
        }
        self.says(now, what);
        again
    }

    /// Whether any notice asked this node to leave.
    pub fn is_called(&self) -> bool {
        self.first.is_some()
    }

    /// Time until the machine goes away, seconds; below zero afterwards.
    pub fn left_s(&self, now: Moment) -> Option<f64> {
        let until = self.until?;
        Some(until.saturating_sub(now).as_secs_f64() - now.saturating_sub(until).as_secs_f64())
    }

    /// A deadline that is usual but not binding.
    pub const fn usual(&self) -> Option<Usual> {
        self.usual
    }

    /// Whether nobody waits for this process's end, and the machine's end has a known time.
    pub fn leaves_the_time_to_us(&self) -> bool {
        !self.at_once
    }

    /// Records the plan from now on, and why; `needs_s`: how long it takes from now.
    pub fn plans(&mut self, now: Moment, plan: DrainPlan, reason: &str, needs_s: Option<f64>) -> Planned {
        let at_s = self.since(now);
        self.says(now, format!("{}: {reason}", word(plan)));
        Planned { plan, reason: reason.to_owned(), at_s, until_s: needs_s.map(|needs| at_s + needs) }
    }

    /// The planned state is durable.
    pub fn saved(&mut self, now: Moment) {
        let since = self.since(now);
        self.actual_s.get_or_insert(since);
    }

    /// Adds an event to the story.
    pub fn says(&mut self, now: Moment, what: impl Into<String>) {
        if self.first.is_some() && self.moments.len() < MOST_MOMENTS {
            self.moments.push(Happened { after_s: self.since(now), what: what.into() });
        }
    }

    /// Time since the first notice, seconds.
    pub fn since(&self, now: Moment) -> f64 {
        self.first.map_or(0.0, |(first, _)| now.saturating_sub(first).as_secs_f64())
    }

    /// How the last plan went, for the journal; `None` if there was no notice.
    pub fn story(&self, planned: &Planned) -> Option<Drain> {
        let (_, source) = self.first?;
        Some(Drain {
            source: source.to_owned(),
            deadline_s: self.announced.map(|left| left.as_secs_f64()),
            plan: planned.plan,
            reason: planned.reason.clone(),
            planned_s: Some(planned.at_s),
            predicted_s: planned.until_s,
            actual_s: self.actual_s,
            timeline: self.moments.clone(),
        })
    }
}

/// A plan's name for people.
const fn word(plan: DrainPlan) -> &'static str {
    match plan {
        DrainPlan::FullSave => "save everything",
        DrainPlan::OnlyMissing => "upload what is missing",
        DrainPlan::FinishInFlight => "finish the save under way",
        DrainPlan::StopEarly => "leave without a save",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice::Confidence;

    fn notice(source: &'static str, kind: Kind, deadline: Option<u64>) -> Notice {
        let deadline = deadline.map(Duration::from_secs);
        Notice { kind, deadline, source, id: "1".into(), confidence: Confidence::Announced }
    }

    #[test]
    fn the_earliest_deadline_holds_and_a_past_one_is_none() {
        let now = Moment::from_secs(1000);
        let mut timeline = Timeline::default();
        assert!(!timeline.is_called());
        timeline.hear(&notice("aws-spot", Kind::Interruption, Some(0)), now);
        assert_eq!(timeline.left_s(now), None);
        timeline.hear(&notice("aws-spot", Kind::Interruption, Some(120)), now);
        timeline.hear(&notice("sigterm", Kind::Stop, Some(30)), now + Duration::from_secs(10));
        timeline.hear(&notice("aws-scheduled", Kind::Interruption, Some(500)), now);
        assert_eq!(timeline.left_s(now), Some(40.0));
        assert_eq!(timeline.left_s(now + Duration::from_secs(50)), Some(-10.0));
        // A deadline that is merely usual is not binding.
        let mut timeline = Timeline::default();
        let usual = Notice { confidence: Confidence::Advisory, ..notice("sigterm", Kind::Stop, Some(10)) };
        timeline.hear(&usual, now);
        assert_eq!(timeline.left_s(now), None);
        let said = "sigterm was heard; usually 10.0 s here; set TRAINER_STOP_WINDOW";
        assert_eq!(timeline.moments[0].what, said);
        assert_eq!(timeline.usual(), Some(Usual { source: "sigterm", left: Duration::from_secs(10) }));
    }

    #[test]
    fn an_end_without_a_time_leaves_none_to_spare() {
        for sudden in [None, Some(0)] {
            let now = Moment::from_secs(1000);
            let mut timeline = Timeline::default();
            timeline.hear(&notice("azure", Kind::Interruption, Some(900)), now);
            assert!(timeline.leaves_the_time_to_us());
            timeline.hear(&notice("azure", Kind::Interruption, sudden), now);
            assert!(!timeline.leaves_the_time_to_us(), "{sudden:?}");
        }
    }

    #[test]
    fn only_the_same_signal_again_asks_to_leave_at_once() {
        let now = Moment::from_secs(1000);
        let mut timeline = Timeline::default();
        assert!(!timeline.hear(&notice("aws-spot", Kind::Interruption, Some(120)), now));
        assert!(!timeline.hear(&notice("aws-spot", Kind::Interruption, Some(110)), now), "said again, not asked again");
        assert!(!timeline.hear(&notice("sigterm", Kind::Stop, None), now), "a supervisor's, after the notice");
        assert!(!timeline.hear(&notice("sigint", Kind::Stop, None), now));
        assert!(!timeline.hear(&notice("sigterm", Kind::Stop, None), now), "an echo");
        assert!(!timeline.hear(&notice("sigusr1", Kind::Interruption, None), now));
        let later = now + ECHO;
        assert!(!timeline.hear(&notice("sigusr1", Kind::Interruption, None), later), "asks for nothing more");
        assert!(timeline.hear(&notice("sigterm", Kind::Stop, None), later));
    }

    #[test]
    fn the_story_holds_what_was_expected_and_what_came_of_it() {
        let now = Moment::from_secs(1000);
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut timeline = Timeline::default();
        timeline.says(now, "not yet part of it");
        timeline.hear(&notice("gcp-preempted", Kind::Interruption, Some(30)), now);
        let planned = timeline.plans(at(4), DrainPlan::FullSave, "there is time", Some(2.0));
        timeline.saved(at(7));
        timeline.saved(at(9));
        let story = timeline.story(&planned).unwrap();
        assert_eq!((story.planned_s, story.predicted_s, story.actual_s), (Some(4.0), Some(6.0), Some(7.0)));
        assert_eq!(story.deadline_s, Some(30.0));
        let moments: Vec<(f64, &str)> = story.timeline.iter().map(|m| (m.after_s, m.what.as_str())).collect();
        assert_eq!(moments, [(0.0, "gcp-preempted was heard, 30.0 s left"), (4.0, "save everything: there is time")]);
        for second in 0..100 {
            timeline.says(at(second), "more");
        }
        assert_eq!(timeline.story(&planned).unwrap().timeline.len(), MOST_MOMENTS);
    }
}
