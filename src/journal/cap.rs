//! The cap that ended a run before its last step, as an `interrupted` record keeps it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Outcome, RunState, record::float};
use crate::config::CapsConfig;

/// A cap of [`CapsConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cap {
    /// Hours of training.
    MaxHours,
    /// Hours since the run was created.
    MaxWaitHours,
    /// US dollars.
    MaxCost,
}

impl Cap {
    /// All of them, in the order in which they are looked at.
    pub const ALL: [Self; 3] = [Self::MaxHours, Self::MaxWaitHours, Self::MaxCost];

    /// Its setting.
    pub const fn key(self) -> &'static str {
        match self {
            Self::MaxHours => "run.max_hours",
            Self::MaxWaitHours => "run.max_wait_hours",
            Self::MaxCost => "run.max_cost",
        }
    }

    /// Its value; `None`: no limit.
    pub const fn limit(self, caps: &CapsConfig) -> Option<f64> {
        match self {
            Self::MaxHours => caps.max_hours,
            Self::MaxWaitHours => caps.max_wait_hours,
            Self::MaxCost => caps.max_cost,
        }
    }

    /// An amount of what it limits, in words.
    pub fn amount(self, of: f64) -> String {
        match self {
            Self::MaxHours => format!("{} h trained", short(of)),
            Self::MaxWaitHours => format!("{} h since the run was created", short(of)),
            Self::MaxCost => format!("{of:.2} USD spent"),
        }
    }
}

/// A number of hours with the digits that people need: a test's run lives for seconds.
fn short(hours: f64) -> String {
    if hours >= 1.0 { format!("{hours:.2}") } else { format!("{hours:.5}") }
}

/// A cap that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reached {
    /// Which one.
    pub cap: Cap,
    /// Its value then: hours, or US dollars.
    #[serde(with = "float")]
    pub limit: f64,
    /// What the run had used by then, in the same unit.
    #[serde(with = "float")]
    pub used: f64,
}

impl Reached {
    /// Whether a run that ended for this reason has ended under `caps`, which may have changed since: only a higher
    /// value of that cap, or none, lets it go on.
    pub fn holds(&self, caps: &CapsConfig) -> bool {
        self.cap.limit(caps).is_some_and(|limit| limit <= self.limit)
    }

    /// The setting that lets it go on.
    pub fn remedy(&self) -> String {
        format!("--set {}=N, above {}, or \"none\"", self.cap.key(), self.limit)
    }
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cap, limit, used } = self;
        write!(f, "{}, and {} = {limit}", cap.amount(*used), cap.key())
    }
}

impl RunState {
    /// The cap that ended the newest generation, if one did: nobody has resumed the run since.
    pub fn capped(&self) -> Option<Reached> {
        let (formed, end) = (self.formed()?, self.interruptions().last()?);
        let is_last = end.generation == formed.generation && *self.outcome() == Outcome::Open;
        end.cap.filter(|_| is_last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_higher_cap_or_none_lets_a_run_go_on() {
        let reached = Reached { cap: Cap::MaxHours, limit: 2.0, used: 2.01 };
        let caps = |max_hours| CapsConfig { max_hours, max_cost: Some(1.0), ..CapsConfig::default() };
        for (hours, holds) in [(Some(2.0), true), (Some(1.0), true), (Some(2.5), false), (None, false)] {
            assert_eq!(reached.holds(&caps(hours)), holds, "{hours:?}");
        }
    }

    #[test]
    fn it_says_what_was_used_and_which_setting_limits_it() {
        let text = |cap, limit, used| Reached { cap, limit, used }.to_string();
        assert_eq!(text(Cap::MaxHours, 2.0, 2.004), "2.00 h trained, and run.max_hours = 2");
        let waited = "0.50000 h since the run was created, and run.max_wait_hours = 0.01";
        assert_eq!(text(Cap::MaxWaitHours, 0.01, 0.5), waited);
        assert_eq!(text(Cap::MaxCost, 20.0, 20.016), "20.02 USD spent, and run.max_cost = 20");
        let remedy = Reached { cap: Cap::MaxCost, limit: 20.0, used: 21.0 }.remedy();
        assert_eq!(remedy, "--set run.max_cost=N, above 20, or \"none\"");
    }
}
