//! One journal for all tasks of an agent: whoever keeps house gives way to the commit.
//!
//! An append may hang in the store for many seconds, and a notice leaves few. So there are three ways to the journal:
//!
//! - [`lock`](SharedJournal::lock) looks at what is known; nothing can be written through it, and nobody holds it while
//!   he waits for the store.
//! - [`first`](SharedJournal::first) is for the commit, for a new generation, and for the last words of a run. Who asks
//!   for it has the journal at once: whatever is written or read just then through the third way is broken off.
//! - [`append_when_free`](SharedJournal::append_when_free) and [`look`](SharedJournal::look) are for all the rest:
//!   `pruned`, `damaged`, `notice`, and the search for a fence.
//!
//! *Cancel:* an append that is broken off may stand all the same. The journal settles that: the next append finds out
//! whose record stands at its number, and reads on. [`append_when_free`](SharedJournal::append_when_free) looks
//! afterwards whether its record is still wanted.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use tokio::sync::{Mutex, MutexGuard, watch};

use crate::journal::{Journal, JournalError, Record, RunState};

/// How long each of the first tries to write a record may take for which a machine's last seconds may be waiting.
/// Records are small.
pub const PATIENCE: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(4), Duration::from_secs(8)];

/// A run's journal, shared by the tasks of one agent.
#[derive(Debug)]
pub struct SharedJournal {
    journal: Mutex<Journal>,
    /// How many have it, or wait for it, to whom all others give way.
    claims: watch::Sender<usize>,
}

/// A look at what the journal says.
#[derive(Debug)]
pub struct Reading<'a>(MutexGuard<'a, Journal>);

/// The journal, in the hands of somebody to whom all others give way.
#[derive(Debug)]
pub struct First<'a> {
    journal: MutexGuard<'a, Journal>,
    _claim: Claim<'a>,
}

#[derive(Debug)]
struct Claim<'a>(&'a watch::Sender<usize>);

impl<'a> Claim<'a> {
    fn new(claims: &'a watch::Sender<usize>) -> Self {
        claims.send_modify(|claims| *claims += 1);
        Self(claims)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|claims| *claims -= 1);
    }
}

impl Deref for Reading<'_> {
    type Target = Journal;

    fn deref(&self) -> &Journal {
        &self.0
    }
}

impl Deref for First<'_> {
    type Target = Journal;

    fn deref(&self) -> &Journal {
        &self.journal
    }
}

impl DerefMut for First<'_> {
    fn deref_mut(&mut self) -> &mut Journal {
        &mut self.journal
    }
}

impl SharedJournal {
    /// Shares a journal.
    pub fn new(journal: Journal) -> Self {
        Self { journal: Mutex::new(journal), claims: watch::Sender::new(0) }
    }

    /// To look at what is known. Don't wait for the store with it in hand.
    pub async fn lock(&self) -> Reading<'_> {
        Reading(self.journal.lock().await)
    }

    /// To write at once.
    pub async fn first(&self) -> First<'_> {
        let claim = Claim::new(&self.claims);
        First { journal: self.journal.lock().await, _claim: claim }
    }

    /// Appends at once. A store that does not answer is asked again soon: one request that hangs must not cost the time
    /// that a notice leaves.
    pub async fn append_first(&self, record: Record) -> Result<u64, JournalError> {
        let mut journal = self.first().await;
        for patience in PATIENCE {
            // The same record again settles what came of the one before.
            if let Ok(appended) = tokio::time::timeout(patience, journal.append(record.clone())).await {
                return appended;
            }
            tracing::info!(record = record.kind(), "the journal's record is written anew: the store does not answer");
        }
        journal.append(record).await
    }

    /// Appends a record that can wait, if it is `wanted` by the state as it stands then; gives its number. It begins
    /// anew each time that it had to give way.
    pub async fn append_when_free(
        &self,
        record: Record,
        wanted: impl Fn(&RunState) -> bool + Send + Sync,
    ) -> Result<Option<u64>, JournalError> {
        let mut claims = self.claims.subscribe();
        loop {
            // Its sender lives as long as this.
            let _ = claims.wait_for(|claims| *claims == 0).await;
            let mut journal = self.journal.lock().await;
            if !wanted(journal.state()) {
                return Ok(None);
            }
            let appended = tokio::select! {
                biased;
                _ = claims.wait_for(|claims| *claims > 0) => continue,
                appended = journal.append(record.clone()) => appended,
            };
            return match appended {
                // An earlier try of ours was found to stand.
                Err(JournalError::Refused { .. }) if !wanted(journal.state()) => Ok(None),
                other => other.map(Some),
            };
        }
    }

    /// Reads on, if nobody has the journal; `None`: somebody has, or wants it meanwhile, and finds out by himself what
    /// there is.
    pub async fn look(&self) -> Option<Result<Reading<'_>, JournalError>> {
        let mut claims = self.claims.subscribe();
        let mut journal = self.journal.try_lock().ok()?;
        let read = tokio::select! {
            biased;
            _ = claims.wait_for(|claims| *claims > 0) => return None,
            read = journal.refresh() => read,
        };
        Some(read.map(|_| Reading(journal)))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        time::Duration,
    };

    use super::{
        super::{generation::Stopped, parting::interruption},
        *,
    };
    use crate::{
        checkpoint::testing::{STORAGE, checkpoint, config},
        ids::{Generation, NodeId, RunId, Step, WorldSize},
        journal::{CheckpointStatus, Formed, FormedReason, RosterEntry},
        layout,
        storage::{
            Store,
            faulty::{Fault, Faulty},
        },
    };

    /// A test that hangs fails.
    const LIMIT: Duration = Duration::from_secs(60);

    /// A journal whose generation 1 has committed steps 1 and 2, on a store whose creates hang once `hangs` says so;
    /// the next one sets it back.
    async fn shared(fault: Fault) -> (Arc<SharedJournal>, Store, Arc<AtomicBool>) {
        let hangs = Arc::new(AtomicBool::new(false));
        let faulty = Faulty::new({
            let hangs = Arc::clone(&hangs);
            move |operation, path, _| {
                let append = operation == "create" && path.contains(layout::JOURNAL);
                if append && hangs.swap(false, Ordering::SeqCst) { fault } else { Fault::Pass }
            }
        });
        let store = Store::faulty_with(&faulty, &STORAGE, Some(Duration::MAX));
        let (node, run_id) = (NodeId::random(), RunId::new("run").unwrap());
        let mut journal = Journal::create(store.clone(), node.clone(), run_id, config()).await.unwrap();
        let formed = Formed {
            roster: vec![RosterEntry { node, workers: 1 }],
            world_size: WorldSize(1),
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: None,
        };
        journal.form(formed).await.unwrap();
        for step in 1..=2 {
            let (committed, _) = checkpoint(&store, step, 1, 1, step).await;
            journal.append(Record::Committed(committed)).await.unwrap();
        }
        (Arc::new(SharedJournal::new(journal)), store, hangs)
    }

    fn good(state: &RunState) -> bool {
        state.checkpoint(Step(1), Generation(1)).is_some_and(|found| found.status == CheckpointStatus::Good)
    }

    const PRUNED: Record = Record::Pruned { step: Step(1), generation: Generation(1) };

    /// An append of housekeeping hangs; a commit comes, and stands next; the append is made after it, once.
    async fn gives_way(fault: Fault, numbers: (u64, u64)) {
        let (journal, store, hangs) = shared(fault).await;
        hangs.store(true, Ordering::SeqCst);
        let pruning = tokio::spawn({
            let journal = Arc::clone(&journal);
            async move { journal.append_when_free(PRUNED, good).await }
        });
        // It has the journal, and hangs.
        while hangs.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
        let (committed, _) = checkpoint(&store, 3, 1, 1, 3).await;
        let commit = async { journal.first().await.append(Record::Committed(committed)).await };
        let number = tokio::time::timeout(LIMIT, commit).await.expect("the commit waits").unwrap();
        let pruned = tokio::time::timeout(LIMIT, pruning).await.expect("it was forgotten").unwrap().unwrap();
        assert_eq!(number, numbers.0);
        // Where the one that was broken off had landed, it is not written twice.
        assert_eq!(pruned, (numbers.1 > numbers.0).then_some(numbers.1));
        let journal = journal.lock().await;
        assert_eq!(journal.state().next(), 6);
        let found = journal.state().checkpoint(Step(1), Generation(1)).unwrap();
        assert_eq!(found.status, CheckpointStatus::Pruned);
    }

    #[tokio::test]
    async fn a_commit_breaks_off_an_append_that_hangs_and_the_append_comes_after_it() {
        gives_way(Fault::Hang, (4, 5)).await;
    }

    #[tokio::test]
    async fn an_append_that_was_broken_off_and_stands_all_the_same_is_not_written_twice() {
        gives_way(Fault::LandsAndHangs, (5, 4)).await;
    }

    #[tokio::test]
    async fn a_look_does_not_begin_beside_a_commit_and_ends_when_one_comes() {
        let (journal, ..) = shared(Fault::Hang).await;
        let first = journal.first().await;
        assert!(journal.look().await.is_none());
        drop(first);
        let seen = journal.look().await.expect("nobody has it").unwrap();
        assert_eq!(seen.state().next(), 4);
    }

    #[tokio::test]
    async fn who_waits_for_the_journal_and_goes_away_leaves_it_to_the_others() {
        let (journal, ..) = shared(Fault::Hang).await;
        let reading = journal.lock().await;
        let waiting = tokio::spawn({
            let journal = Arc::clone(&journal);
            async move { drop(journal.first().await) }
        });
        journal.claims.subscribe().wait_for(|claims| *claims == 1).await.unwrap();
        waiting.abort();
        assert!(waiting.await.is_err());
        drop(reading);
        let pruned = tokio::time::timeout(LIMIT, journal.append_when_free(PRUNED, good)).await.expect("for ever");
        assert_eq!(pruned.unwrap(), Some(4));
    }

    /// The commit's answer is lost, it is given up, and it stands: before the last words begin, or only found by them.
    #[tokio::test]
    async fn a_commit_that_was_given_up_and_stands_is_told_as_what_it_is() {
        let stopped = Stopped { step: Step(3), committed: Step(2), verdict: "the time was up".into(), drain: None };
        for (fault, lost) in [(Fault::LandsAndHangs, 0), (Fault::Hang, 1)] {
            let (journal, store, hangs) = shared(fault).await;
            let (committed, _) = checkpoint(&store, 3, 1, 1, 3).await;
            hangs.store(true, Ordering::SeqCst);
            let commit = tokio::spawn({
                let (journal, committed) = (journal.clone(), committed.clone());
                async move { journal.append_first(Record::Committed(committed)).await }
            });
            while hangs.load(Ordering::SeqCst) {
                tokio::task::yield_now().await;
            }
            commit.abort();
            let mut journal = journal.first().await;
            assert_eq!(journal.doubtful(), Some(&committed));
            let make = |state: &RunState| interruption(state, Generation(1), &stopped);
            journal.append_made(make).await.unwrap();
            let said = &journal.state().interruptions()[0];
            assert_eq!((said.lost_steps, said.committed), (lost, Some(Step(3 - lost))), "{fault:?}");
            assert_eq!(journal.state().next(), 6 - lost, "{fault:?}");
            assert_eq!(journal.doubtful(), None);
        }
    }
}
