//! Whether a node leaves a group because its own workers kill it again and again: a pure decision.
//!
//! Each node judges itself, by what it alone sees at first hand: which of its own workers died, and how. A worker that
//! dies because another one has, whose collectives broke, is not at fault; nor is one that the agent has killed. What
//! others say of a death may be heard before the death itself: a worker that was dead when the agent killed all of its
//! group counts. In a group of one, and where too few nodes would be left, `restart` decides alone, as for a run of one
//! node.

use std::collections::BTreeMap;

use super::workers::{KILLED, WorkerEvent};
use crate::{
    error::{Error, Kind},
    ids::{Rank, Step},
    protocol::FromWorker,
};

/// Deaths after which a node leaves.
const DEATHS: usize = 3;
/// A node that trains on for this many steps between two deaths of its workers is no reason to change the group: steps
/// take a tenth of a second at least where a group is worth its while, so it has worked for minutes, and has saved.
const PROGRESS: u64 = 1000;
/// What a worker says, or LibTorch says for it, when another rank is gone.
const OF_A_LOSS: [&str; 8] = [
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "remote process exited",
    "remote peer",
    "connection refused",
    "timed out",
    "timeout",
];

/// A worker of this node that died by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnDeath {
    /// The last step that it had finished.
    pub step: Step,
    /// Which one it is.
    pub rank: Rank,
    /// How it died.
    pub why: String,
}

/// What a node remembers of its own workers' deaths, from one generation to the next.
#[derive(Clone, Debug, Default)]
pub struct Blame {
    deaths: Vec<OwnDeath>,
    /// The group can do without this node.
    pub dispensable: bool,
    /// One has died in this generation.
    died: bool,
}

/// Whether a worker that died in this way, or said this before, died of another one's death.
fn follows_another(said: &str) -> bool {
    let said = said.to_lowercase();
    OF_A_LOSS.iter().any(|words| said.contains(&words.to_lowercase()))
}

impl Blame {
    /// A generation begins; `dispensable`: enough others take part.
    pub fn begins(&mut self, dispensable: bool) {
        (self.dispensable, self.died) = (dispensable, false);
    }

    /// A worker of this node has ended, and the agent had not asked it to. `said`: its own word before, if it gave one.
    /// `Some`: this node leaves, and why.
    pub fn died(&mut self, step: Step, rank: Rank, why: &str, said: Option<&str>) -> Option<String> {
        if follows_another(why) || said.is_some_and(follows_another) {
            return None;
        }
        // Of several ranks that die together one counts.
        if std::mem::replace(&mut self.died, true) {
            return None;
        }
        let why = said.map_or_else(|| why.to_owned(), |said| format!("{said}; it {why}"));
        self.deaths.push(OwnDeath { step, rank, why });
        if self.deaths.len() > DEATHS {
            self.deaths.remove(0);
        }
        self.dispensable.then(|| decide(&self.deaths)).flatten()
    }
}

/// Listens to this node's own workers, for one generation.
#[derive(Debug)]
pub struct Watch<'a> {
    blame: &'a mut Blame,
    finished: Step,
    said: BTreeMap<Rank, String>,
}

impl<'a> Watch<'a> {
    /// Of workers that load the state of step `loaded`.
    pub fn new(blame: &'a mut Blame, loaded: Step) -> Self {
        Self { blame, finished: loaded, said: BTreeMap::new() }
    }

    /// The last step that a worker has finished.
    pub const fn finished(&self) -> Step {
        self.finished
    }

    /// `Some`: this node leaves, and why.
    pub fn hears(&mut self, event: &WorkerEvent) -> Option<String> {
        match event {
            WorkerEvent::Message(_, FromWorker::Step(report)) => self.finished = self.finished.max(report.step),
            WorkerEvent::Message(rank, FromWorker::Failed { message, .. }) => {
                self.said.entry(*rank).or_insert_with(|| message.clone());
            }
            WorkerEvent::Exited(rank, why) if why != KILLED => {
                return self.blame.died(self.finished, *rank, why, self.said.get(rank).map(String::as_str));
            }
            _ => {}
        }
        None
    }
}

/// Decides after the last of `deaths`, in their order. `Some`: the node leaves, and why.
pub fn decide(deaths: &[OwnDeath]) -> Option<String> {
    let last = deaths.last()?;
    let near = deaths.windows(2).rev().take_while(|two| two[1].step.get().saturating_sub(two[0].step.get()) < PROGRESS);
    let times = near.count() + 1;
    let OwnDeath { step, rank, why } = last;
    (times >= DEATHS).then(|| {
        format!(
            "its workers have ended the group {times} times with less than {PROGRESS} steps in between, at last worker \
             {rank} after step {step}: {why}"
        )
    })
}

/// The error of the node that leaves.
pub fn leaves(why: &str) -> Error {
    Error::new(Kind::Unavailable, format!("this node leaves the run: {why}")).with_hint(
        "the log of this process has the last lines of its workers, under trainer::worker; the other nodes go on \
         without this one, and it may come back when the cause is cured",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deaths(steps: &[u64]) -> Vec<OwnDeath> {
        steps
            .iter()
            .map(|&step| OwnDeath { step: Step(step), rank: Rank(1), why: "killed by signal 11".into() })
            .collect()
    }

    #[test]
    fn a_node_leaves_after_three_deaths_without_progress_in_between() {
        for (steps, leaves) in [
            (&[5, 5][..], false),
            (&[5, 5, 5], true),
            (&[5, 900, 1800], true),
            (&[5, 1005, 1010], false),
            (&[5, 10, 1010], false),
            (&[9, 7, 8], true),
            (&[5, 2000, 2001, 2002], true),
        ] {
            assert_eq!(decide(&deaths(steps)).is_some(), leaves, "{steps:?}");
        }
        let why = decide(&deaths(&[1, 2, 3])).unwrap();
        assert!(why.contains("worker 1") && why.contains("after step 3: killed by signal 11"), "{why}");
        assert!(leaves(&why).hint().unwrap().contains("log"));
    }

    #[test]
    fn who_dies_of_another_ones_death_is_not_blamed() {
        let mut blame = Blame::default();
        let mut dies = |why: &str, said: Option<&str>, dispensable| {
            blame.begins(dispensable);
            blame.died(Step(3), Rank(0), why, said).is_some()
        };
        for _ in 0..5 {
            assert!(!dies("left with exit code 1", Some("all-reduce: Connection closed by peer [127.0.0.1]:1"), true));
            assert!(!dies("killed by signal 6; its last words: NCCL: remote process exited", None, true));
        }
        assert!(!dies("killed by signal 11", None, true));
        assert!(!dies("left with exit code 1", Some("CUDA error: an illegal address"), true));
        assert!(!dies("killed by signal 11", None, false), "the group can't do without it");
        assert!(dies("killed by signal 11", None, true));
    }

    /// A neighbour's worker, broken by the same death, ends first: it must not hide the death itself.
    #[test]
    fn a_death_counts_although_another_worker_of_the_node_died_of_it_first() {
        let mut blame = Blame::default();
        let dies = |blame: &mut Blame| {
            blame.begins(true);
            let follows = blame.died(Step(3), Rank(1), "killed by SIGKILL", Some("Connection reset by peer"));
            assert_eq!(follows, None);
            blame.died(Step(3), Rank(0), "killed by signal 11", None)
        };
        assert!(dies(&mut blame).is_none() && dies(&mut blame).is_none());
        assert!(dies(&mut blame).is_some_and(|why| why.contains("worker 0")));
    }

    /// What the agent itself has killed says nothing.
    #[test]
    fn a_worker_that_its_agent_killed_is_not_blamed() {
        let mut blame = Blame::default();
        for killed in [KILLED, KILLED, KILLED, KILLED] {
            blame.begins(true);
            let mut watch = Watch::new(&mut blame, Step(3));
            assert_eq!(watch.hears(&WorkerEvent::Exited(Rank(0), killed.to_owned())), None);
        }
        assert!(blame.deaths.is_empty());
    }

    #[test]
    fn ranks_that_die_together_count_once() {
        let mut blame = Blame::default();
        blame.begins(true);
        for rank in 0..8 {
            assert_eq!(blame.died(Step(3), Rank(rank), "killed by signal 11", None), None);
        }
    }
}
