//! When a checkpoint may be condemned: the one place that writes `damaged`.
//!
//! A machine that garbles its reads (a stuck bit of memory, a disk, a network card) finds every checkpoint damaged. So
//! a finding is at first a suspicion: this process skips the checkpoint, and nothing is recorded. After the same
//! process has read every byte of another checkpoint and found it whole, it may condemn one that it had found damaged
//! before; for the next one it must read a whole one again. The journal's own rules spare the last good checkpoint and
//! the one most recently read as whole ([`RunState::spared`]). [`clear`] withdraws a verdict.
//!
//! *Crash, cancel:* suspicions disappear with the process; the next one finds the same damage. *Retry:* a record of
//! unknown fate is appended again.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    CheckpointError,
    catalog::Damage,
    verify::{Depth, Gentle, Proof, Report, verify, verify_gently},
};
use crate::{
    journal::{Checkpoint, CheckpointStatus, Committed, Journal, JournalError, Record, ResumePoint, RunState},
    storage::Store,
};

/// Checkpoints that are tried in search of a whole one before this machine itself is considered broken.
const TRIES: usize = 3;
/// How long after a process could read none in full it tries again: the cause of the garbled reads may have passed.
const AGAIN: Duration = Duration::from_secs(60 * 60);
/// Bytes of one request.
const PART: u64 = 4 << 20;

/// One process's findings against checkpoints. Clones are the same docket.
#[derive(Clone, Debug, Default)]
pub struct Docket(Arc<Mutex<Cases>>);

#[derive(Debug, Default)]
struct Cases {
    /// Found damaged twice, the oldest finding first.
    suspects: Vec<Suspect>,
    /// Found damaged, and not found whole since: this process skips them.
    passed_over: Vec<ResumePoint>,
    /// The last one that was verified.
    verified: Option<ResumePoint>,
    /// Consecutive failed loads of a checkpoint that was whole when it was read again.
    whole_again: u32,
    /// When none of the checkpoints tried could be read in full.
    distrusted: Option<Instant>,
}

#[derive(Debug)]
struct Suspect {
    damage: Damage,
    /// Another checkpoint has been read in full since the last verdict, and that proof is unused.
    proven: bool,
}

impl Docket {
    fn cases(&self) -> MutexGuard<'_, Cases> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A checkpoint was found damaged twice, the second time when it was read again. Returns whether this is news.
    pub fn suspect(&self, damage: &Damage) -> bool {
        let mut cases = self.cases();
        let point = damage.point();
        if !cases.suspects.iter().any(|suspect| suspect.damage.is_of(&point)) {
            cases.suspects.push(Suspect { damage: damage.clone(), proven: false });
        }
        let is_news = !cases.passed_over.contains(&point);
        if is_news {
            cases.passed_over.push(point);
        }
        is_news
    }

    /// Whether there is a checkpoint that may have to be condemned.
    pub fn has_suspects(&self) -> bool {
        !self.cases().suspects.is_empty()
    }

    /// Whether this process has found the checkpoint damaged.
    pub fn passes_over(&self, point: &ResumePoint) -> bool {
        self.cases().passed_over.contains(point)
    }

    /// A checkpoint is verified. Only if this process has compared every byte does that prove that it can read.
    pub fn vouch(&self, point: &ResumePoint, proof: Proof) {
        let mut cases = self.cases();
        cases.verified = Some(point.clone());
        if proof == Proof::Bytes {
            cases.passed_over.retain(|other| other != point);
            cases.suspects.retain(|suspect| !suspect.damage.is_of(point));
            cases.suspects.iter_mut().for_each(|suspect| suspect.proven = true);
            (cases.whole_again, cases.distrusted) = (0, None);
        }
    }

    /// A load failed, and the checkpoint was whole when it was read again; returns the number of consecutive failures.
    pub fn whole_again(&self) -> u32 {
        let mut cases = self.cases();
        cases.whole_again += 1;
        cases.whole_again
    }

    /// Whether this process could not read a single checkpoint in full when it tried: then its findings prove nothing.
    /// After an hour it may try once more.
    pub fn is_distrusted(&self) -> bool {
        self.cases().distrusted.is_some_and(|since| since.elapsed() < AGAIN)
    }

    /// The suspect that may be condemned next, and the record that does so. Suspects that no longer count as good are
    /// forgotten. After writing the record, call [`condemned`](Self::condemned).
    pub fn next_record(&self, state: &RunState) -> Option<(Damage, Record)> {
        let damage = self.next(state)?;
        let Damage { step, generation, object, reason } = &damage;
        let record = Record::Damaged { step: *step, generation: *generation, reason: format!("{object}: {reason}") };
        Some((damage, record))
    }

    /// Whether that suspect may still be condemned.
    pub fn may_condemn(&self, state: &RunState, damage: &Damage) -> bool {
        self.next(state).as_ref() == Some(damage)
    }

    fn next(&self, state: &RunState) -> Option<Damage> {
        let mut cases = self.cases();
        let is_good = |point: &ResumePoint| {
            state.checkpoint(point.step, point.generation).is_some_and(|c| c.status == CheckpointStatus::Good)
        };
        cases.suspects.retain(|suspect| is_good(&suspect.damage.point()));
        let may = |suspect: &&Suspect| {
            let point = suspect.damage.point();
            suspect.proven && cases.verified.as_ref() != Some(&point) && state.spared(&point).is_none()
        };
        cases.suspects.iter().find(may).map(|suspect| suspect.damage.clone())
    }

    /// One was condemned: the whole checkpoint read before is no proof against another.
    pub fn condemned(&self, damage: &Damage) {
        let mut cases = self.cases();
        cases.suspects.retain(|suspect| !suspect.damage.is_of(&damage.point()));
        cases.suspects.iter_mut().for_each(|suspect| suspect.proven = false);
    }

    /// Records one suspect as damaged, if one may be condemned: from then on no run resumes from it.
    pub async fn condemn(&self, journal: &mut Journal) -> Result<Option<Damage>, JournalError> {
        let Some((damage, record)) = self.next_record(journal.state()) else { return Ok(None) };
        match journal.append(record).await {
            Ok(_) => {
                self.condemned(&damage);
                Ok(Some(damage))
            }
            // Meanwhile another process has condemned another one.
            Err(JournalError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads another checkpoint in full, the newest first, if there are suspects that wait for it. `false`: none of
    /// those tried is whole when this process reads it. `store` is the run's folder.
    pub async fn prove(
        &self,
        store: &Store,
        state: &RunState,
        gentle: Option<&Gentle>,
    ) -> Result<bool, CheckpointError> {
        if self.cases().suspects.iter().all(|suspect| suspect.proven) {
            return Ok(true);
        }
        let others: Vec<&Checkpoint> =
            state.good().into_iter().filter(|other| !self.passes_over(&other.point())).take(TRIES).collect();
        for other in others {
            if read_whole(store, &other.committed, gentle).await?.is_sound() {
                self.vouch(&other.point(), Proof::Bytes);
                return Ok(true);
            }
        }
        self.cases().distrusted = Some(Instant::now());
        Ok(false)
    }
}

async fn read_whole(store: &Store, committed: &Committed, gentle: Option<&Gentle>) -> Result<Report, CheckpointError> {
    match gentle {
        Some(gentle) => verify_gently(store, committed, gentle).await,
        None => verify(store, committed, Depth::Bytes { part: PART }, &|_| {}).await,
    }
}

/// Whether a checkpoint is condemned.
pub fn is_condemned(state: &RunState, point: &ResumePoint) -> bool {
    let status = state.checkpoint(point.step, point.generation).map(|checkpoint| &checkpoint.status);
    matches!(status, Some(CheckpointStatus::Damaged { .. }))
}

/// The record that withdraws the verdict on a checkpoint, if there is one and `report` says that every byte is whole.
pub fn clearance(state: &RunState, report: &Report) -> Option<Record> {
    let (step, generation) = (report.step, report.generation);
    let whole = report.is_sound() && report.proof == Proof::Bytes;
    (whole && is_condemned(state, &ResumePoint { step, generation })).then_some(Record::Cleared { step, generation })
}

/// Appends that record; returns whether there was a verdict to withdraw.
pub async fn clear(journal: &mut Journal, report: &Report) -> Result<bool, JournalError> {
    let Some(record) = clearance(journal.state(), report) else { return Ok(false) };
    journal.append(record).await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::{Harm, checkpoint, config, harm, memory_store},
        ids::{Generation, NodeId, RunId, Step, WorldSize},
        journal::{Formed, FormedReason, RosterEntry, Succession},
        layout,
    };

    fn point(step: u64) -> ResumePoint {
        ResumePoint { step: Step(step), generation: Generation(1) }
    }

    fn damage(step: u64) -> Damage {
        Damage { step: Step(step), generation: Generation(1), object: format!("o{step}"), reason: "a hole".into() }
    }

    /// A journal whose generation 1 has committed steps 1 to `count`.
    async fn run(store: &Store, count: u64) -> Journal {
        let node = NodeId::random();
        let mut journal =
            Journal::create(store.clone(), node.clone(), RunId::new("run").unwrap(), config()).await.unwrap();
        let formed = Formed {
            roster: vec![RosterEntry::new(node, 1)],
            world_size: WorldSize(1),
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: None,
            succession: Succession::default(),
        };
        journal.form(formed).await.unwrap();
        for step in 1..=count {
            let (committed, _) = checkpoint(store, step, 1, 1, step).await;
            journal.append(Record::Committed(committed)).await.unwrap();
        }
        journal
    }

    fn condemned(journal: &Journal) -> Vec<u64> {
        let is_damaged = |c: &&Checkpoint| matches!(c.status, CheckpointStatus::Damaged { .. });
        journal.state().checkpoints().iter().filter(is_damaged).map(|c| c.committed.step.get()).collect()
    }

    #[tokio::test]
    async fn each_verdict_needs_a_whole_checkpoint_read_after_the_finding() {
        let store = memory_store();
        let mut journal = run(&store, 5).await;
        let docket = Docket::default();
        docket.vouch(&point(1), Proof::Bytes);
        assert!(docket.suspect(&damage(5)) && docket.suspect(&damage(4)) && !docket.suspect(&damage(5)));
        assert!(docket.passes_over(&point(5)) && !docket.passes_over(&point(3)));
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), None, "what was read before says nothing");
        // The store's own checksum proves nothing about this machine's reads.
        docket.vouch(&point(3), Proof::Checksum);
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), None);
        docket.vouch(&point(3), Proof::Bytes);
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), Some(damage(5)));
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), None, "one for one");
        docket.vouch(&point(3), Proof::Bytes);
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), Some(damage(4)));
        docket.vouch(&point(3), Proof::Bytes);
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), None, "there is no suspect left");
        assert_eq!(condemned(&journal), [4, 5]);
    }

    #[tokio::test]
    async fn a_checkpoint_found_whole_is_no_suspect_and_the_last_verified_is_not_condemned() {
        let store = memory_store();
        let mut journal = run(&store, 3).await;
        let docket = Docket::default();
        docket.suspect(&damage(3));
        docket.vouch(&point(3), Proof::Bytes);
        assert!(!docket.passes_over(&point(3)));
        docket.vouch(&point(2), Proof::Bytes);
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), None);
        // Proven by 2, and then the store itself vouches for 3.
        docket.suspect(&damage(3));
        docket.vouch(&point(2), Proof::Bytes);
        docket.vouch(&point(3), Proof::Checksum);
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), None);
        // The last good one is spared, whatever was found.
        for step in [1, 2] {
            docket.suspect(&damage(step));
            docket.vouch(&point(3), Proof::Bytes);
            docket.condemn(&mut journal).await.unwrap();
        }
        docket.suspect(&damage(3));
        docket.vouch(&point(1), Proof::Bytes);
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), None);
        assert_eq!(condemned(&journal), [1, 2]);
    }

    #[tokio::test]
    async fn a_machine_that_can_read_nothing_whole_condemns_nothing() {
        let store = memory_store();
        let mut journal = run(&store, 5).await;
        let docket = Docket::default();
        assert!(docket.prove(&store, journal.state(), None).await.unwrap(), "there is nothing to prove");
        docket.suspect(&damage(5));
        for step in [4, 3, 2] {
            let folder = layout::checkpoint(Step(step), Generation(1));
            harm(&store, &folder, "model-00001-of-00001.safetensors", Harm::Flip).await;
        }
        assert!(!docket.prove(&store, journal.state(), None).await.unwrap());
        assert!(docket.is_distrusted());
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), None);
        docket.vouch(&point(1), Proof::Bytes);
        assert!(!docket.is_distrusted());
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), Some(damage(5)));
        assert_eq!(condemned(&journal), [5]);
    }

    #[tokio::test]
    async fn a_settled_suspect_is_forgotten_and_costs_no_reading() {
        let store = memory_store();
        let mut journal = run(&store, 3).await;
        let docket = Docket::default();
        // Pruned meanwhile: there is nothing left to condemn.
        docket.suspect(&damage(1));
        docket.vouch(&point(3), Proof::Bytes);
        journal.append(Record::Pruned { step: Step(1), generation: Generation(1) }).await.unwrap();
        assert!(docket.has_suspects() && docket.next_record(journal.state()).is_none() && !docket.has_suspects());
        docket.suspect(&damage(2));
        docket.vouch(&point(3), Proof::Bytes);
        let folder = layout::checkpoint(Step(3), Generation(1));
        harm(&store, &folder, "model-00001-of-00001.safetensors", Harm::Flip).await;
        assert!(docket.prove(&store, journal.state(), None).await.unwrap(), "it is proven, and nothing is read again");
        let (found, _) = docket.next_record(journal.state()).unwrap();
        docket.condemned(&found);
        assert!(!docket.has_suspects(), "before the journal is looked at");
        // The journal would refuse it, so it is not asked.
        docket.suspect(&damage(3));
        let only = run(&memory_store(), 1).await;
        docket.suspect(&damage(1));
        docket.vouch(&point(2), Proof::Bytes);
        assert_eq!(docket.next_record(only.state()), None, "the last good one is spared");
        assert!(docket.has_suspects());
    }

    #[tokio::test]
    async fn the_second_process_to_condemn_gives_way_without_an_error() {
        let store = memory_store();
        let mut first = run(&store, 2).await;
        let run_id = RunId::new("run").unwrap();
        let mut second = Journal::open(store.clone(), NodeId::random(), run_id).await.unwrap();
        let dockets = [Docket::default(), Docket::default()];
        for (docket, step) in dockets.iter().zip([1, 2]) {
            docket.suspect(&damage(step));
            assert!(!docket.suspect(&damage(step)), "once");
            assert_eq!(docket.cases().suspects.len(), 1);
            docket.vouch(&point(3 - step), Proof::Bytes);
        }
        assert_eq!(dockets[0].condemn(&mut first).await.unwrap(), Some(damage(1)));
        assert_eq!(dockets[1].condemn(&mut second).await.unwrap(), None, "what is left now is the last one");
        assert_eq!(condemned(&second), [1]);
    }

    #[tokio::test]
    async fn a_machine_that_read_nothing_whole_may_try_again_after_a_while() {
        let store = memory_store();
        let journal = run(&store, 2).await;
        let docket = Docket::default();
        docket.suspect(&damage(2));
        let folder = layout::checkpoint(Step(1), Generation(1));
        harm(&store, &folder, "model-00001-of-00001.safetensors", Harm::Flip).await;
        assert!(!docket.prove(&store, journal.state(), None).await.unwrap());
        assert!(docket.is_distrusted());
        let long_ago = Instant::now().checked_sub(AGAIN).expect("this machine is up for so long");
        docket.cases().distrusted = Some(long_ago);
        assert!(!docket.is_distrusted(), "it would never delete anything again");
        assert!(!docket.prove(&store, journal.state(), None).await.unwrap());
        assert!(docket.is_distrusted(), "it was tried, and nothing has changed");
    }

    #[tokio::test]
    async fn only_reading_every_byte_withdraws_a_verdict() {
        let store = memory_store();
        let mut journal = run(&store, 2).await;
        let docket = Docket::default();
        docket.suspect(&damage(2));
        assert!(docket.prove(&store, journal.state(), None).await.unwrap());
        assert_eq!(docket.condemn(&mut journal).await.unwrap(), Some(damage(2)));
        let committed = journal.state().checkpoint(Step(2), Generation(1)).unwrap().committed.clone();
        let stored = verify(&store, &committed, Depth::Stored, &|_| {}).await.unwrap();
        assert!(!clear(&mut journal, &stored).await.unwrap(), "sizes say nothing");
        let whole = verify(&store, &committed, Depth::Bytes { part: 1000 }, &|_| {}).await.unwrap();
        assert!(clear(&mut journal, &whole).await.unwrap());
        docket.vouch(&point(2), whole.proof);
        assert_eq!(condemned(&journal), [0_u64; 0]);
        assert!(!clear(&mut journal, &whole).await.unwrap(), "there is no verdict any more");
        harm(&store, &layout::checkpoint(Step(1), Generation(1)), "model-00001-of-00001.safetensors", Harm::Flip).await;
        let committed = journal.state().checkpoint(Step(1), Generation(1)).unwrap().committed.clone();
        docket.suspect(&damage(1));
        docket.prove(&store, journal.state(), None).await.unwrap();
        docket.condemn(&mut journal).await.unwrap().expect("2 stands in for it");
        let broken = verify(&store, &committed, Depth::Bytes { part: 1000 }, &|_| {}).await.unwrap();
        assert!(!clear(&mut journal, &broken).await.unwrap());
    }
}
