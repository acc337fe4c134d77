//! Whether a group that trains stops to take up nodes that wait: a pure decision, with its reason.
//!
//! A change costs every rank the time from the last step before it to the first one after it. In T seconds, W workers
//! do T·W of work; if they become W' at a cost of c seconds, they do (T − c)·W'. So the change pays if
//! T > c·W' / (W' − W). T ends with the next change that is to be expected anyway, since that one takes up the nodes
//! for nothing, or with the run.
//!
//! Two changes are apart by at least twenty times what one costs, whatever T is: machines that come and go one by
//! one cost a group at most the twentieth part of its time. What a change costs is measured by the node that leads it;
//! until it has, nothing is put off.

use std::time::Duration;

/// The time between two changes, as a multiple of what one costs.
const APART: f64 = 20.0;

/// What is to be expected of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prospects {
    /// Since it was formed.
    pub since: Duration,
    /// What the last change has cost it, seconds; `None`: that was not measured.
    pub change_s: Option<f64>,
    /// Until a machine goes away, as far as one can tell, seconds.
    pub lasts_s: f64,
    /// Until the run is complete at the present pace, seconds; `None`: no step was measured.
    pub left_s: Option<f64>,
}

/// Why nodes wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Later {
    /// The group has changed a short time ago.
    Apart,
    /// The next change is to be expected before this one pays.
    Changes,
    /// The run is complete before it pays.
    Ends,
}

impl std::fmt::Display for Later {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Apart => "the group has changed a short time ago",
            Self::Changes => "another change is expected before this one pays",
            Self::Ends => "the run ends before that pays",
        })
    }
}

/// Whether a group of `workers` takes up `more` of them now; otherwise why not, in a word and with the figures.
pub fn grow(workers: u64, more: u64, prospects: &Prospects) -> Result<(), (Later, String)> {
    let Prospects { since, change_s, lasts_s, left_s } = *prospects;
    let Some(cost) = change_s.filter(|cost| cost.is_finite() && *cost > 0.0) else { return Ok(()) };
    let (since, apart) = (since.as_secs_f64(), APART * cost);
    if since < apart {
        let why = format!("a change costs {cost:.1} s, the last one was {since:.0} s ago; two are {apart:.0} s apart");
        return Err((Later::Apart, why));
    }
    let with = workers.saturating_add(more);
    let pays = cost * with as f64 / more.max(1) as f64;
    let says = |what: &str, horizon: f64| {
        format!("{more} more workers beside {workers} pay after {pays:.1} s, and {what} in {horizon:.1} s")
    };
    match left_s {
        Some(left) if left <= pays => Err((Later::Ends, says("the run is complete", left))),
        _ if lasts_s <= pays => Err((Later::Changes, says("another change is expected", lasts_s))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Prospects =
        Prospects { since: Duration::from_secs(3600), change_s: Some(10.0), lasts_s: 7200.0, left_s: Some(86_400.0) };

    fn why(workers: u64, more: u64, prospects: &Prospects) -> Option<Later> {
        grow(workers, more, prospects).err().map(|(why, _)| why)
    }

    #[test]
    fn a_group_grows_when_that_pays_before_the_next_change_and_before_the_end() {
        assert_eq!(why(8, 8, &LONG), None);
        // 8 and 8: after 20 s.
        for (left, wanted) in [(20.0, Some(Later::Ends)), (20.1, None)] {
            assert_eq!(why(8, 8, &Prospects { left_s: Some(left), ..LONG }), wanted, "{left}");
            let lasts = wanted.map(|_| Later::Changes);
            assert_eq!(why(8, 8, &Prospects { lasts_s: left, ..LONG }), lasts, "{left}");
        }
        // One more beside 99 does so after 1000 s.
        assert_eq!(why(99, 1, &Prospects { lasts_s: 1000.0, ..LONG }), Some(Later::Changes));
        assert_eq!(why(99, 1, &Prospects { lasts_s: 1001.0, ..LONG }), None);
        assert_eq!(why(8, 8, &Prospects { left_s: None, ..LONG }), None, "no step was measured");
    }

    #[test]
    fn two_changes_are_apart() {
        for (since, wanted) in [(199, Some(Later::Apart)), (200, None)] {
            assert_eq!(why(1, 1, &Prospects { since: Duration::from_secs(since), ..LONG }), wanted, "{since}");
        }
        let (_, text) = grow(1, 1, &Prospects { since: Duration::from_secs(60), ..LONG }).unwrap_err();
        assert_eq!(text, "a change costs 10.0 s, the last one was 60 s ago; two are 200 s apart");
    }

    #[test]
    fn what_was_not_measured_puts_nothing_off() {
        let unknown = Prospects { since: Duration::ZERO, lasts_s: 0.0, left_s: Some(0.0), ..LONG };
        for change_s in [None, Some(0.0), Some(f64::NAN), Some(f64::INFINITY)] {
            assert_eq!(why(1, 1, &Prospects { change_s, ..unknown }), None, "{change_s:?}");
        }
    }
}
