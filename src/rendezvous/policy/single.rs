//! A node's response to the run's leader: a pure decision, of the form of torchft's `quorum_compute`.
//!
//! Only one node trains a run. The leader of a generation without a recorded end may still be at work; its heartbeat
//! shows it. This decides whether to wait before forming a generation. Safety comes from the journal's fencing.
//!
//! # Does not own
//! Heartbeats and the journal (the caller reads them and puts the results into the [`View`]), time (passed in), the
//! generation.

use std::time::Duration;

use crate::{
    ids::NodeId,
    journal::{self, RunState},
    rendezvous::heartbeat::{Liveness, Process},
};

/// The pause between two looks at the heartbeat of a live leader.
const STANDBY_PAUSE: Duration = Duration::from_secs(2);

/// This node's knowledge of the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The leader of a generation without a recorded end, if that is another node.
    pub leader: Option<NodeId>,
    /// The state of its heartbeat; `None`: not checked yet.
    pub liveness: Option<Liveness>,
    /// Whether the journal was read to its end since then, without anything new.
    pub read_on: bool,
}

/// The operator's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long to wait for a live leader.
    pub standby: Duration,
}

/// The next action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Move {
    /// No other node is at work: form the next generation.
    Form,
    /// Read the leader's heartbeat.
    Look(NodeId),
    /// Wait for this long, then read on in the journal and look again.
    StandBy(NodeId, Duration),
    /// Read on in the journal: the leader may have written its last record, or lost the run to a third node.
    ReadOn,
    /// The leader died without a last record: form the next generation in its place.
    TakeOver(NodeId, Option<Process>),
    /// The leader is alive, and the time to wait is over.
    Leave(NodeId),
}

impl View {
    /// The journal's view alone, for node `me`.
    pub fn of(state: &RunState, me: &NodeId) -> Self {
        Self { leader: unfinished_leader(state).filter(|node| node != me), liveness: None, read_on: false }
    }
}

/// The next action and its reason; `waited`: since this node began to wait.
pub fn decide(view: &View, waited: Duration, settings: Settings) -> (Move, String) {
    let Some(leader) = view.leader.clone() else {
        return (Move::Form, "no other node has an unfinished generation".into());
    };
    match &view.liveness {
        None => (Move::Look(leader.clone()), format!("node {leader} has not recorded how its generation ended")),
        Some(Liveness::Alive) => {
            let left = settings.standby.saturating_sub(waited);
            let reason = format!("node {leader} is alive");
            if left.is_zero() {
                (Move::Leave(leader), reason)
            } else {
                (Move::StandBy(leader, STANDBY_PAUSE.min(left)), reason)
            }
        }
        Some(Liveness::Gone(_)) if !view.read_on => (Move::ReadOn, format!("node {leader} is gone")),
        Some(Liveness::Gone(process)) => {
            let reason = format!("node {leader} is gone without a final record");
            (Move::TakeOver(leader, process.clone()), reason)
        }
    }
}

/// The leader of a generation without a recorded end: it may still be at work.
fn unfinished_leader(state: &RunState) -> Option<NodeId> {
    let formed = state.formed()?;
    let said = state.interruptions().iter().any(|end| end.generation == formed.generation);
    let open = *state.outcome() == journal::Outcome::Open;
    (open && !said).then(|| formed.node.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_STANDBY: Settings = Settings { standby: Duration::ZERO };
    const HOUR: Settings = Settings { standby: Duration::from_secs(3600) };

    fn leader() -> NodeId {
        NodeId::new("node-a").unwrap()
    }

    fn view(liveness: Option<Liveness>, read_on: bool) -> View {
        View { leader: Some(leader()), liveness, read_on }
    }

    fn next(view: &View, waited: u64, settings: Settings) -> Move {
        decide(view, Duration::from_secs(waited), settings).0
    }

    #[test]
    fn another_node_leads_until_its_end_is_recorded() {
        use crate::{
            checkpoint::testing::{formed, state_after},
            ids::{Generation, Step},
            journal::Record,
        };
        let interrupted = |generation| Record::Interrupted {
            generation: Generation(generation),
            step: Step(0),
            committed: None,
            lost_steps: 0,
            verdict: String::new(),
            drain: None,
            cap: None,
        };
        let failed = || Record::Failed { generation: Generation(1), step: Step(0), reason: String::new() };
        for (records, led) in [
            (vec![], true),
            (vec![interrupted(1)], false),
            (vec![failed()], false),
            (vec![interrupted(1), formed(2, None)], true),
            (vec![failed(), formed(2, None)], true),
            (vec![interrupted(1), formed(2, None), interrupted(2)], false),
        ] {
            let told = format!("{records:?}");
            let state = state_after(vec![], records);
            let leader = state.formed().unwrap().node.clone();
            let expected = View { leader: led.then(|| leader.clone()), liveness: None, read_on: false };
            assert_eq!(View::of(&state, &NodeId::random()), expected, "{told}");
            assert_eq!(View::of(&state, &leader).leader, None, "a node does not wait for itself: {told}");
        }
    }

    #[test]
    fn a_run_that_nobody_leads_is_formed_at_once() {
        let view = View { leader: None, liveness: None, read_on: false };
        assert_eq!(next(&view, 0, NO_STANDBY), Move::Form);
        assert_eq!(next(&view, 9999, HOUR), Move::Form);
    }

    #[test]
    fn a_leaders_heartbeat_is_read_before_the_decision() {
        for settings in [NO_STANDBY, HOUR] {
            assert_eq!(next(&view(None, true), 0, settings), Move::Look(leader()));
        }
    }

    #[test]
    fn a_live_leader_is_waited_for_as_long_as_asked() {
        let alive = view(Some(Liveness::Alive), false);
        assert_eq!(next(&alive, 0, NO_STANDBY), Move::Leave(leader()));
        assert_eq!(next(&alive, 0, HOUR), Move::StandBy(leader(), STANDBY_PAUSE));
        assert_eq!(next(&alive, 3599, HOUR), Move::StandBy(leader(), Duration::from_secs(1)));
        assert_eq!(next(&alive, 3600, HOUR), Move::Leave(leader()));
        let forever = Settings { standby: Duration::MAX };
        assert_eq!(next(&alive, 1 << 40, forever), Move::StandBy(leader(), STANDBY_PAUSE));
    }

    #[test]
    fn a_dead_leader_is_replaced_once_the_journal_is_read_to_its_end() {
        for settings in [NO_STANDBY, HOUR] {
            let gone = |read_on| view(Some(Liveness::Gone(None)), read_on);
            assert_eq!(next(&gone(false), 5000, settings), Move::ReadOn);
            assert_eq!(next(&gone(true), 5000, settings), Move::TakeOver(leader(), None));
        }
    }
}
