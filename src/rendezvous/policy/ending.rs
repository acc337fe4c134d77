//! Whether a group that lost nodes, or that has not enough of them yet, goes on, waits or gives up.

use std::time::Duration;

use super::Bounds;

/// Saves in a row that fail on one node until it is left out, or leaves if it leads.
pub const FAILED_SAVES: u32 = 3;

/// A node's view of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present {
    /// Whether this node leads a generation that has not ended.
    pub leads: bool,
    /// The nodes that it can go on with, itself included.
    pub nodes: u32,
}

/// The operator's patience with a run that has too few nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// How long to wait for nodes; `None`: without end.
    pub at_most: Option<Duration>,
}

impl Wait {
    /// Under `run` and `resume`, where a person waits, too.
    pub const RUN: Self = Self { at_most: Some(Duration::from_secs(600)) };
    /// Under `boot`: a machine that leaves now would only be bought again.
    pub const BOOT: Self = Self { at_most: None };
}

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It goes on.
    GoOn,
    /// It leads and can't go on: save what can be saved, append `interrupted`, then wait as a node that leads nothing.
    StepDown,
    /// Too few nodes: wait, for this long at most (`None`: without end).
    Wait(Option<Duration>),
    /// It has waited long enough: leave.
    Leave,
}

/// The decision and its reason; `waited`: since this node last led or followed.
pub fn give_up(view: Present, waited: Duration, bounds: Bounds, wait: Wait) -> (Ending, String) {
    let Present { leads, nodes } = view;
    if nodes >= bounds.min {
        return (Ending::GoOn, format!("{nodes} of at least {} nodes are here", bounds.min));
    }
    let few = format!("{nodes} of at least {} nodes are here", bounds.min);
    match wait.at_most {
        _ if leads => (Ending::StepDown, few),
        None => (Ending::Wait(None), few),
        Some(limit) if waited >= limit => (Ending::Leave, format!("{few} after {} s", limit.as_secs())),
        Some(limit) => (Ending::Wait(Some(limit - waited)), few),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { min: 2, max: 4, global_batch: 8, mixed: false };

    fn end(leads: bool, nodes: u32, waited: u64, wait: Wait) -> Ending {
        give_up(Present { leads, nodes }, Duration::from_secs(waited), BOUNDS, wait).0
    }

    #[test]
    fn a_leader_below_the_minimum_steps_down_and_others_wait_as_long_as_asked() {
        for wait in [Wait::RUN, Wait::BOOT] {
            assert_eq!(end(true, 2, 0, wait), Ending::GoOn);
            assert_eq!(end(true, 1, 9999, wait), Ending::StepDown, "however long it has waited before");
            assert_eq!(end(false, 2, 9999, wait), Ending::GoOn);
        }
        assert_eq!(end(false, 1, 1 << 40, Wait::BOOT), Ending::Wait(None));
        assert_eq!(end(false, 1, 599, Wait::RUN), Ending::Wait(Some(Duration::from_secs(1))));
        assert_eq!(end(false, 1, 600, Wait::RUN), Ending::Leave);
        let (_, why) = give_up(Present { leads: false, nodes: 1 }, Duration::from_secs(700), BOUNDS, Wait::RUN);
        assert_eq!(why, "1 of at least 2 nodes are here after 600 s");
    }
}
