//! Workers that live through a planned change of their group: a member leaves after a notice, or nodes join at a save.
//!
//! The group stops as for any notice: all ranks stop after one agreed step, save it, and its checkpoint is committed.
//! Then every worker that stays *has* that checkpoint's state. Its process goes on: it leaves its old peers, gets its
//! place in the next group, and meets the new ones.
//!
//! | from | by | to |
//! |---|---|---|
//! | trains | `Thaw { stop_after }`; it saves, says `Stopped` | stopped |
//! | stopped, step committed | [`ToMember::Over`] that names its node, or this node's own end: [`Keeping::take`] | kept |
//! | kept | a `formed` record that names that very checkpoint: `Regroup` in place of `Start` | starts |
//! | starts | `Built`, `Peers`, `Layout`, `Ready`, `Go`, as a new worker; no `Restore` if it keeps its state | trains |
//! | kept | any other record, other settings, a death, this node leaves or is left out | gone |
//!
//! Whose state stays where it is: under `ddp`, and of a world of one under it, every rank has all of it. Under `zero1`
//! and `shard` the process goes on, and the state is loaded as ever, from slots and other nodes' memory first; a node
//! that follows and leaves stays until the others have read there what it alone has, or its time is up. Nodes whose
//! workers keep their state fetch nothing; what their slots hold is lent to those that load.
//!
//! # Invariants
//! - Nothing becomes true by keeping a worker. The `formed` record is written as ever, and a worker is told to regroup
//!   only by an agent that has read it.
//! - A worker is kept only if each of its node's workers has said that it stopped after the committed step, in the
//!   generation that committed it, and if it inherited the slots and the work that the next generation has.
//! - A kept worker writes into no slot: its captures have ended, and orders come after `Regroup` only.
//! - Ranks compare the fingerprints of their states before they go on, as after every load: a worker whose state is not
//!   the checkpoint's is found there, and the group loads anew.
//!
//! # What goes wrong
//! A worker that dies or fails between `Stopped` and `Go`, a newcomer that dies while it loads, a second notice: the
//! generation ends as in any loading. All workers are killed, and the next generation starts new ones, which load the
//! checkpoint. It stands, so nothing is lost. Ranks that wait for one that hangs give it up after the limit in which
//! ranks meet ([`crate::worker`]'s patience).
//!
//! *Crash* of the agent: its workers end with it. *Retry:* none: what fails is started anew. *Cancel:* dropping
//! [`Kept`] ends the workers.
//!
//! [`ToMember::Over`]: super::group::ToMember::Over

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::{
    generation::Load,
    save::slots::Slots,
    workers::{WorkerEvent, Workers},
};
use crate::{
    ids::{Generation, NodeRanks, Step},
    workload::{Collectives, Workload},
};

/// How long workers that are not wanted any more may take to exit.
const GRACE: Duration = Duration::from_secs(2);

/// What workers of a generation need to be kept after it.
#[derive(Clone, Debug)]
pub struct Keeping {
    /// The work that they know.
    pub workload: Arc<Workload>,
    /// What they were told of their collectives when they started.
    pub collectives: Arc<Collectives>,
    /// The generation.
    pub generation: Generation,
    /// The checkpoint that it began with.
    pub loaded: Option<(Step, Generation)>,
    /// The slots that they inherited: see [`Slots::births`].
    pub births: u64,
}

/// Workers between two generations, which have the state of a checkpoint.
#[derive(Debug)]
pub struct Kept {
    workers: Workers,
    keeping: Keeping,
    /// The checkpoint.
    at: (Step, Generation),
}

impl Keeping {
    /// The checkpoint whose state workers have that have stopped after `step`, if that is committed; `None`: there is
    /// none, since they began with drawn weights and made no step.
    pub fn checkpoint(&self, step: Step) -> Option<(Step, Generation)> {
        match self.loaded {
            Some((loaded, _)) if step == loaded => self.loaded,
            None if step == Step(0) => None,
            _ => Some((step, self.generation)),
        }
    }

    /// Keeps the workers of a node, whose generation has ended with its last step committed; `Err`: they can't be kept.
    pub fn take(self, workers: Workers) -> Result<Kept, Workers> {
        match workers.stopped_after().and_then(|step| self.checkpoint(step)) {
            Some(at) => Ok(Kept { workers, keeping: self, at }),
            None => Err(workers),
        }
    }
}

impl Kept {
    /// Why they can't go on with this load as workers of this work; `None`: they can.
    pub fn unfit(&self, load: &Load, workload: &Arc<Workload>, slots: &Slots) -> Option<&'static str> {
        let Load::Checkpoint { step, generation, .. } = load else { return Some("nothing is loaded") };
        if (*step, *generation) != self.at {
            return Some("another checkpoint is loaded");
        }
        if !Arc::ptr_eq(&self.keeping.workload, workload) {
            return Some("settings have changed");
        }
        if self.keeping.births != slots.births() {
            return Some("a slot has new memory");
        }
        if self.workers.stopped_after() != Some(*step) {
            return Some("one of them has died");
        }
        None
    }

    /// The checkpoint whose state they have.
    pub const fn at(&self) -> (Step, Generation) {
        self.at
    }

    /// How many workers there are.
    pub fn count(&self) -> usize {
        self.workers.count()
    }

    /// Their state stays where it is: no other rank has parts of it.
    pub fn keeps_state(&self) -> bool {
        self.keeping.workload.is_replicated()
    }

    /// What they were told of their collectives.
    pub fn collectives(&self) -> Arc<Collectives> {
        Arc::clone(&self.keeping.collectives)
    }

    /// They are workers of the next generation from here on.
    pub fn take_up(self, ranks: NodeRanks, events: &mpsc::UnboundedSender<WorkerEvent>) -> Workers {
        self.workers.take_up(ranks, events);
        self.workers
    }

    /// Ends them; returns when they are gone.
    pub async fn dismiss(self) {
        self.workers.dismiss(GRACE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeping(loaded: Option<(u64, u64)>) -> Keeping {
        Keeping {
            workload: Arc::new(Workload::of_no_workers()),
            collectives: Arc::default(),
            generation: Generation(3),
            loaded: loaded.map(|(step, generation)| (Step(step), Generation(generation))),
            births: 0,
        }
    }

    #[test]
    fn workers_that_made_no_step_have_the_checkpoint_that_they_loaded() {
        let at = |loaded, step| keeping(loaded).checkpoint(Step(step));
        assert_eq!(at(Some((8, 2)), 8), Some((Step(8), Generation(2))));
        assert_eq!(at(Some((8, 2)), 9), Some((Step(9), Generation(3))));
        assert_eq!(at(None, 5), Some((Step(5), Generation(3))));
        assert_eq!(at(None, 0), None, "drawn weights are no checkpoint");
    }
}
