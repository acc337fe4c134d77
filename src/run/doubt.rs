//! A checkpoint that seems damaged when it is loaded: is it the checkpoint, or this machine?
//!
//! It is read again before anything is concluded, into other memory and by other threads. If it is then sound, a
//! transfer was damaged, or this machine damages the data it carries: it is loaded again, a few times, and then this
//! process exits so that another machine can take over. If it is damaged in the same way, it is skipped, and condemned
//! once this process has loaded another one whole ([`crate::checkpoint::condemn`]). If it is damaged differently each
//! time, the reading side is broken.

use std::time::Duration;

use super::{Runner, words};
use crate::{
    agent::generation::Load,
    checkpoint::{
        CheckpointError, Flaw,
        catalog::{self, Damage},
        condemn,
        verify::{Depth, Report, verify},
    },
    error::{Error, Kind, Result},
    ids::Step,
    journal::{CheckpointStatus, Committed, ResumePoint, RunState, Urgency},
    report::Event,
    storage::{Priority, Store},
    workload,
};

/// How often a checkpoint that seemed damaged on loading is read again. One reading that finds it whole is enough.
const READ_AGAIN: usize = 2;
/// Failed loads in a row, of a checkpoint that is whole, after which this process gives up.
const LOADS: u32 = 4;
/// The pause before a second look at a checkpoint that seems damaged before a byte of it is loaded: the cause of a
/// garbled answer may have passed by then.
const PAUSE: Duration = Duration::from_millis(500);
/// Bytes of one range when a checkpoint is read again.
const PART: u64 = 16 << 20;

/// Damage found by one reading.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    object: String,
    reason: Flaw,
}

/// The path on which this machine garbles data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// The parallel reads of a restore, whatever the memory.
    Bulk,
    /// The memory of the snapshot slot.
    Slot,
    /// The store's answers: each reading gives other bytes.
    Store,
}

impl Path {
    const fn words(self) -> &'static str {
        match self {
            Self::Bulk => "its bulk reads (the threads that fetch a checkpoint) are garbled, single reads are not",
            Self::Slot => {
                "the memory of snapshot slot 0, which checkpoints are fetched into, does not keep what is read into it"
            }
            Self::Store => "the disk, or the network to the store, gives other bytes each time",
        }
    }
}

/// What to do after a failed load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// Load the same checkpoint again.
    Again,
    /// Exit, and report which path is broken: more attempts would not help.
    Leave,
    /// Each reading gives other bytes.
    Contradiction,
    /// Skip it and choose another one.
    PassOver,
}

/// `load`: the damage that the load found; `readings`: the damage that each further reading found, `None`: it was
/// whole; `failed`: loads in a row that have failed like this one, including this one.
fn decide(load: &Finding, readings: &[Option<Finding>], failed: u32) -> Decision {
    if readings.iter().any(Option::is_none) {
        return if failed < LOADS { Decision::Again } else { Decision::Leave };
    }
    let all = || readings.iter().flatten().chain([load]);
    let contradicts = |a: &Finding, b: &Finding| {
        let checksums = a.reason.checksum().zip(b.reason.checksum());
        a.object == b.object && checksums.is_some_and(|(one, other)| one != other)
    };
    if all().any(|a| all().any(|b| contradicts(a, b))) { Decision::Contradiction } else { Decision::PassOver }
}

impl Finding {
    fn of(report: &Report) -> Option<Self> {
        report.damage().map(|(object, reason)| Self { object: object.to_owned(), reason: reason.clone() })
    }
}

/// The error that this machine's reads can't be trusted; another machine's can.
fn garbles(step: Step, found: &Finding, path: Path) -> Error {
    let Finding { object, reason } = found;
    let what = format!(
        "this machine garbles what it reads: {}; the checkpoint of step {step} is not at fault: {object}: {reason}",
        path.words()
    );
    Error::new(Kind::Unavailable, what).with_hint("nothing was condemned; resume on another machine and check this one")
}

async fn read(run: &Store, committed: &Committed) -> Result<Report, CheckpointError> {
    verify(run, committed, Depth::Bytes { part: PART }, &|_| {}).await
}

impl Runner {
    /// The checkpoints to choose from: those that this process has not found damaged. One that `--from` names may be
    /// condemned: it is first read in full, and then the verdict is withdrawn.
    pub(super) async fn candidates(&self) -> Result<Vec<Committed>> {
        if let Some(step) = self.from {
            self.take_back(step).await?;
        }
        let state = self.journal.state();
        let choice = if self.from.is_some() { state.good() } else { state.candidates() };
        let choice = choice.into_iter().filter(|checkpoint| !self.docket.passes_over(&checkpoint.point()));
        Ok(choice.map(|checkpoint| checkpoint.committed.clone()).collect())
    }

    /// The newest of them that is whole as far as sizes show.
    pub(super) async fn newest_usable(
        &self,
        candidates: &[Committed],
        made_of: &workload::MadeOf<'_>,
    ) -> Result<catalog::Outcome> {
        let outcome = workload::newest_usable(&self.run, candidates, self.from, made_of).await?;
        if outcome.stepped_over.is_empty() {
            return Ok(outcome);
        }
        tokio::time::sleep(PAUSE).await;
        workload::newest_usable(&self.run, candidates, self.from, made_of).await
    }

    /// Clears a condemned checkpoint of `step` if it is whole, unless there is a good one of that step.
    async fn take_back(&self, step: Step) -> Result<()> {
        let (condemned, others): (Vec<_>, Vec<Step>) = {
            let state = self.journal.state();
            let others: Vec<Step> = state.good().iter().map(|good| good.committed.step).collect();
            if others.contains(&step) {
                return Ok(());
            }
            let mine = state.checkpoints().iter().rev().filter(|checkpoint| checkpoint.committed.step == step);
            let damaged = mine.filter(|checkpoint| matches!(checkpoint.status, CheckpointStatus::Damaged { .. }));
            (damaged.map(|checkpoint| checkpoint.committed.clone()).collect(), others)
        };
        let mut still = None;
        for committed in &condemned {
            let report = read(&self.run, committed).await?;
            if let Some(found) = Finding::of(&report) {
                still.get_or_insert(found);
            } else if let Some(record) = condemn::clearance(&self.journal.state(), &report) {
                let point = ResumePoint { step, generation: committed.generation };
                let condemned = move |state: &RunState| condemn::is_condemned(state, &point);
                self.journal.append_if(Urgency::Formed, record, condemned).await?;
                let message =
                    format!("the checkpoint of step {step} had been found damaged and is whole: it is good again");
                self.reporter.event(&Event::Warning { message });
                return Ok(());
            }
        }
        let Some(Finding { object, reason }) = still else { return Ok(()) };
        let what =
            format!("the checkpoint of step {step} was found damaged, and is when it is read now: {object}: {reason}");
        Err(Error::new(Kind::Usage, what).with_hint(match others.as_slice() {
            [] => "there is no other".to_owned(),
            others => format!("name another one: {}", steps(others)),
        }))
    }

    /// Whether a generation may start from this checkpoint. If that turns the run away from newer ones that only this
    /// process has found damaged, it must have read this one in full: checkpoints that a generation has turned away
    /// from stay behind, and a machine that garbles everything would otherwise lead a run back from one checkpoint to
    /// the next.
    pub(super) async fn is_whole_if_turned_back_to(&self, committed: &Committed) -> Result<bool> {
        let turns_back = self.from.is_none() && {
            let state = self.journal.state();
            let line = state.candidates();
            let mut newer = line.iter().take_while(|other| other.committed.step > committed.step);
            newer.any(|other| self.docket.passes_over(&other.point()))
        };
        if !turns_back {
            return Ok(true);
        }
        let mut found = None;
        for _ in 0..READ_AGAIN {
            let Some(damage) = Finding::of(&read(&self.run, committed).await?) else { return Ok(true) };
            found = Some(damage);
        }
        self.run.holds().await?;
        if let Some(Finding { object, reason }) = found {
            let Committed { step, generation, .. } = *committed;
            if self.docket.suspect(&Damage { step, generation, object: object.clone(), reason: reason.to_string() }) {
                self.warn_of_damage(step, &object, &reason);
            }
        }
        Ok(false)
    }

    /// There are checkpoints, and none that can be used.
    pub(super) async fn nothing_usable(&self) -> Error {
        if let Err(adrift) = self.run.holds().await {
            return adrift.into();
        }
        let run_id = &self.run_id;
        let (looked_at, good, condemned) = {
            let state = self.journal.state();
            let good: Vec<Step> = state.good().iter().map(|checkpoint| checkpoint.committed.step).collect();
            let is_damaged = |c: &&crate::journal::Checkpoint| matches!(c.status, CheckpointStatus::Damaged { .. });
            (state.candidates().len(), good, state.checkpoints().iter().filter(is_damaged).count())
        };
        let what = match self.from {
            Some(step) => format!("the checkpoint of step {step} of run {run_id} is damaged"),
            None if looked_at > 0 => format!("none of the {looked_at} checkpoints of run {run_id} is usable"),
            None => format!("no checkpoint that run {run_id} could go on from is usable"),
        };
        let look = format!("trainer verify --run-id {run_id} --all --deep");
        Error::new(Kind::Data, what).with_hint(if looked_at > 0 || condemned > 0 {
            format!(
                "look at them from another machine with `{look}`: it takes the verdict back on what is whole, and \
                `--from STEP` names any"
            )
        } else {
            words::abandoned(run_id, &good.iter().map(Step::to_string).collect::<Vec<_>>())
        })
    }

    /// A checkpoint failed its checksums while it was loaded.
    pub(super) async fn step_over(&self, load: &Load, object: &str, reason: &Flaw) -> Result<()> {
        let loaded = Finding { object: object.to_owned(), reason: reason.clone() };
        let Load::Checkpoint { step, generation, .. } = load else {
            return Err(Error::new(Kind::Data, format!("{object}: {reason}")));
        };
        let (step, generation) = (*step, *generation);
        let state = self.journal.state();
        let committed = state.checkpoint(step, generation).map(|checkpoint| checkpoint.committed.clone());
        let Some(committed) = committed else {
            return Err(Error::new(Kind::Bug, format!("step {step} was loaded and was never committed")));
        };
        // When a disk has gone away, every object is missing.
        self.run.holds().await?;
        let mut readings = Vec::new();
        while readings.len() < READ_AGAIN && readings.iter().all(Option::is_some) {
            readings.push(Finding::of(&read(&self.run, &committed).await?));
        }
        let failed = if readings.iter().any(Option::is_none) { self.docket.whole_again() } else { 0 };
        match decide(&loaded, &readings, failed) {
            Decision::Again => {
                let message = format!("{object}: {reason}; a second read was clean");
                self.reporter.event(&Event::Warning { message });
                Ok(())
            }
            Decision::Leave => {
                // As many threads as a restore, and memory outside the slots.
                let bulk = read(&self.run.at_priority(Priority::Urgent), &committed).await?;
                Err(garbles(step, &loaded, if bulk.is_sound() { Path::Slot } else { Path::Bulk }))
            }
            Decision::Contradiction => Err(garbles(step, &loaded, Path::Store)),
            Decision::PassOver => {
                let damage = Damage { step, generation, object: object.to_owned(), reason: reason.to_string() };
                if self.docket.suspect(&damage) {
                    self.warn_of_damage(step, object, reason);
                }
                if self.from.is_some() {
                    let what = format!("the checkpoint of step {step} is damaged: {object}: {reason}");
                    return Err(Error::new(Kind::Data, what).with_hint(format!(
                        "continue from the newest sound one: trainer resume --run-id {}",
                        self.run_id
                    )));
                }
                Ok(())
            }
        }
    }
}

fn steps(steps: &[Step]) -> String {
    steps.iter().map(Step::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Crc64;

    fn found(object: &str, reason: &str) -> Finding {
        Finding { object: object.into(), reason: reason.into() }
    }

    fn sum(object: &str, sum: u8) -> Finding {
        let reason = Flaw::of_checksum(Crc64::of(&[sum]), "its checksum is not the recorded one".into());
        Finding { object: object.into(), reason }
    }

    #[test]
    fn one_clean_read_outweighs_any_number_of_failed_loads() {
        let load = sum("a", 1);
        for failed in 1..LOADS {
            assert_eq!(decide(&load, &[None], failed), Decision::Again, "{failed}");
            assert_eq!(decide(&load, &[Some(sum("a", 2)), None], failed), Decision::Again, "{failed}");
        }
        for failed in [LOADS, LOADS + 1, u32::MAX] {
            assert_eq!(decide(&load, &[None], failed), Decision::Leave, "{failed}");
            assert_eq!(decide(&load, &[Some(load.clone()), None], failed), Decision::Leave, "{failed}");
        }
    }

    #[test]
    fn damage_that_every_reading_finds_is_passed_over() {
        let load = sum("a", 1);
        assert_eq!(decide(&load, &[Some(load.clone()), Some(load.clone())], 0), Decision::PassOver);
        // Of two damaged objects each reading may meet another one first.
        assert_eq!(decide(&load, &[Some(sum("b", 3)), Some(load.clone())], 0), Decision::PassOver);
        let short = found("a", "it ends after 5 bytes");
        assert_eq!(decide(&short, &[Some(found("a", "it has 5 bytes, it should have 9"))], 0), Decision::PassOver);
        assert_eq!(decide(&load, &[Some(short)], 0), Decision::PassOver, "it was cut meanwhile");
    }

    #[test]
    fn other_bytes_at_each_reading_are_no_damage_of_the_checkpoint() {
        let load = sum("a", 1);
        assert_eq!(decide(&load, &[Some(sum("a", 2)), Some(sum("a", 3))], 0), Decision::Contradiction);
        assert_eq!(decide(&load, &[Some(sum("b", 2)), Some(sum("b", 3))], 0), Decision::Contradiction);
        assert_eq!(decide(&load, &[Some(load.clone()), Some(sum("a", 2))], 0), Decision::Contradiction);
        // The readings agree, and the load says otherwise.
        assert_eq!(decide(&load, &[Some(sum("a", 2)), Some(sum("a", 2))], 0), Decision::Contradiction);
    }
}
