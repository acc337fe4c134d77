//! `trainer verify`

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    output::{self, Table},
    store,
};
use crate::{
    checkpoint::{
        condemn,
        verify::{self, Depth, FileReport, Proof, Report},
    },
    error::{Context, Error, Kind, Result},
    history::{self, Which},
    ids::{NodeId, RunId},
    journal::{self, Checkpoint, CheckpointStatus, Committed, Journal, RunState},
    report::human,
    storage::Store,
};

/// Verify a run's objects against their manifests
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer verify --run-id first                # the newest checkpoint, by the store's own checksums
  trainer verify --run-id first --all --deep   # every byte of every checkpoint

S3 keeps a checksum of every object, so only the manifest is downloaded.
An object that seems damaged is downloaded, too, to make sure.
On a store without checksums only sizes can be compared, and the answer says so.
--deep compares every byte.
--all --deep also verifies the journal's summaries against each of its records.

If --deep finds a checkpoint whole that was found damaged before, the journal clears it.
Nothing else is changed. Exit code 65 if anything is damaged.")]
pub struct Verify {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// The checkpoint of this step, or `best`: of the lowest held-out loss [default: the newest]
    #[arg(long, value_name = "STEP", conflicts_with = "all")]
    step: Option<Which>,
    /// Every checkpoint that has not been pruned
    #[arg(long)]
    all: bool,
    /// Download every byte and compare checksums
    #[arg(long)]
    deep: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// A report, and its consequence.
#[derive(Debug, Serialize)]
struct Looked {
    #[serde(flatten)]
    report: Report,
    /// It had been found damaged before, and the verdict was taken back.
    cleared: bool,
    /// The run pruned it while it was read: nothing is known of its objects.
    pruned: bool,
}

impl Verify {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let (looked, clearing) = store::block_on(self.look())?;
        let text = if self.json.json { output::json_lines(&looked)? } else { told(&looked) };
        output::emit(&text)?;
        // Findings are reported, even if they could not be recorded.
        clearing?;
        let reports: Vec<&Report> = looked.iter().map(|looked| &looked.report).collect();
        let damaged = reports.iter().filter(|report| !report.is_sound()).count();
        if damaged == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        Err(Error::new(
            Kind::Data,
            format!("{} of {} is damaged", damaged, human::plural(reports.len() as u64, "checkpoint")),
        )
        .with_hint("`trainer resume` skips damaged checkpoints"))
    }

    async fn look(&self) -> Result<(Vec<Looked>, Result<()>)> {
        let root = self.run.store.open()?;
        let state = history::read(&root, &self.run.run_id).await?;
        if self.all && self.deep {
            journal::audit(&root.folder(self.run.run_id.as_str()), &self.run.run_id).await?;
        }
        self.look_from(&root, state).await
    }

    /// Looks at checkpoints by a journal that was read a moment ago.
    async fn look_from(&self, root: &Store, mut state: RunState) -> Result<(Vec<Looked>, Result<()>)> {
        let folder = root.folder(state.run_id().as_str());
        let mut looked = loop {
            let mut looked = Vec::new();
            for checkpoint in self.chosen(&state)? {
                looked.push(self.look_at(root, &folder, state.run_id(), &checkpoint.committed).await?);
            }
            // The newest one is gone only when there is a newer one.
            let newest_is_gone = self.step.is_none() && !self.all && looked.iter().any(|looked| looked.pruned);
            if !newest_is_gone {
                break looked;
            }
            state = history::read(root, &self.run.run_id).await?;
        };
        let cleared = clear(&folder, state, &mut looked).await;
        Ok((looked, cleared))
    }

    async fn look_at(&self, root: &Store, folder: &Store, run_id: &RunId, committed: &Committed) -> Result<Looked> {
        let part = u64::from(store::LIMITS.part_mib) << 20;
        let depth = if self.deep { Depth::Bytes { part } } else { Depth::Stored };
        let mut report = verify::verify(folder, committed, depth, &|_| {}).await?;
        if let Some((object, reason)) = report.damage() {
            // An answer may have been garbled, and a store may keep a wrong checksum. So the bytes decide.
            let again = verify::look_again(folder, committed, &report).await?;
            if again.is_sound() {
                tracing::warn!("{object}: {reason}; a second read was clean");
            }
            report = again;
        }
        let gone = !report.is_sound()
            && history::is_pruned(&history::read(root, run_id).await?, report.step, report.generation);
        if gone {
            report.files.clear();
        }
        Ok(Looked { report, cleared: false, pruned: gone })
    }

    fn chosen<'a>(&self, state: &'a RunState) -> Result<Vec<&'a Checkpoint>> {
        let mut kept = state.checkpoints().iter().filter(|checkpoint| checkpoint.status != CheckpointStatus::Pruned);
        let step = self.step.map(|which| which.step(state)).transpose()?;
        let chosen: Vec<&Checkpoint> = match step {
            Some(step) => kept.filter(|checkpoint| checkpoint.committed.step == step).collect(),
            None if self.all => kept.collect(),
            // If the newest checkpoint is known to be damaged, it is reported, too, before the one that a resume would
            // use.
            None => kept.next_back().into_iter().collect(),
        };
        if chosen.is_empty() {
            let what = step.map_or_else(|| "checkpoint".into(), |step| format!("checkpoint of step {step}"));
            return Err(Error::new(Kind::Usage, format!("run {} has no {what}", self.run.run_id))
                .with_hint(format!("`trainer checkpoints --run-id {}` lists them", self.run.run_id)));
        }
        Ok(chosen)
    }
}

/// Withdraws the verdict on checkpoints of which every byte is whole.
async fn clear(folder: &Store, state: RunState, looked: &mut [Looked]) -> Result<()> {
    let is_whole = |report: &Report| report.is_sound() && report.proof == Proof::Bytes;
    let is_condemned = |report: &Report| {
        let checkpoint = state.checkpoint(report.step, report.generation);
        checkpoint.is_some_and(|checkpoint| matches!(checkpoint.status, CheckpointStatus::Damaged { .. }))
    };
    if !looked.iter().any(|Looked { report, .. }| is_whole(report) && is_condemned(report)) {
        return Ok(());
    }
    let mut journal = Journal::follow(folder.clone(), NodeId::random(), state).await?;
    for Looked { report, cleared, .. } in looked {
        let step = report.step;
        *cleared =
            condemn::clear(&mut journal, report).await.context(format!("withdraw the verdict on step {step}"))?;
        if *cleared {
            tracing::warn!(%step, "checkpoint had been found damaged and is whole: it is good again");
        }
    }
    Ok(())
}

/// All reports, for people.
fn told(looked: &[Looked]) -> String {
    let reports: Vec<&Report> = looked.iter().map(|looked| &looked.report).collect();
    let mut text = table(&reports) + &summary(&reports);
    for Looked { report, .. } in looked.iter().filter(|looked| looked.cleared) {
        let (step, generation) = (report.step, report.generation);
        text.push_str(&format!(
            "step {step}, generation {generation}: had been found damaged and is whole; it is good again\n"
        ));
    }
    for Looked { report, .. } in looked.iter().filter(|looked| looked.pruned) {
        let (step, generation) = (report.step, report.generation);
        text.push_str(&format!("step {step}, generation {generation}: was pruned while it was read\n"));
    }
    text
}

fn table(reports: &[&Report]) -> String {
    let mut table = Table::new(&[">step", ">generation", "object", ">size", "found"]);
    for report in reports {
        for file in &report.files {
            table.row([
                report.step.to_string(),
                report.generation.to_string(),
                file.object.clone(),
                if file.bytes == 0 { "-".into() } else { human::bytes(file.bytes) },
                match (&file.damage, file.by) {
                    (Some(damage), _) => format!("damaged: {damage}"),
                    (None, Proof::Bytes) => "good, every byte".into(),
                    (None, Proof::Checksum) => "good, by the store's checksum".into(),
                    (None, Proof::Size) => "size only".into(),
                },
            ]);
        }
    }
    table.text()
}

/// One line for all reports; checkpoints verified only by sizes are not called good.
fn summary(reports: &[&Report]) -> String {
    let files: Vec<&FileReport> = reports.iter().flat_map(|report| &report.files).collect();
    if files.is_empty() {
        return String::new();
    }
    let (damaged, sound): (Vec<&FileReport>, Vec<&FileReport>) =
        files.iter().copied().partition(|file| file.damage.is_some());
    let by = |proof: Proof| sound.iter().filter(|file| file.by == proof).count();
    let counts = [
        (damaged.len(), "damaged"),
        (by(Proof::Bytes), "good by every byte"),
        (by(Proof::Checksum), "good by the store's checksum"),
        (by(Proof::Size), "size only: this store keeps no checksum, --deep compares every byte"),
    ];
    let found = counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
    format!("{}: {}\n", human::plural(files.len() as u64, "object"), found.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::{HARMS, harm, memory_store},
        cli::args::StoreArg,
        history::tests::run_that_pruned,
        ids::{Generation, Step},
        layout,
    };

    #[tokio::test]
    async fn a_checkpoint_that_is_pruned_while_it_is_read_is_not_damaged() {
        for deep in [false, true] {
            let root = memory_store();
            let (stale, newest) = run_that_pruned(&root, 2).await;
            let verify = |step, all| Verify {
                run: RunArg { run_id: stale.run_id().clone(), store: StoreArg { store: None } },
                step,
                all,
                deep,
                json: JsonArg { json: false },
            };
            // Both old ones are gone by now: of all and of one step that is said, and the newest is another one.
            let (looked, cleared) = verify(None, true).look_from(&root, stale.clone()).await.unwrap();
            cleared.unwrap();
            assert!(looked.len() == 2 && looked.iter().all(|looked| looked.pruned && looked.report.is_sound()));
            assert_eq!(told(&looked).lines().filter(|line| line.contains("pruned")).count(), 2, "{}", told(&looked));
            let (looked, _) = verify(Some(Which::Step(Step(1))), false).look_from(&root, stale.clone()).await.unwrap();
            assert!(looked[0].pruned && looked[0].report.is_sound());
            let (looked, _) = verify(None, false).look_from(&root, stale.clone()).await.unwrap();
            assert_eq!((looked.len(), looked[0].report.step, looked[0].pruned), (1, newest.step, false));

            // One that is damaged and not pruned is damaged.
            for kind in HARMS {
                let root = memory_store();
                let (_, newest) = run_that_pruned(&root, 2).await;
                let folder = layout::checkpoint(newest.step, newest.generation);
                harm(&root.folder(stale.run_id().as_str()), &folder, layout::MANIFEST, kind).await;
                let state = history::read(&root, stale.run_id()).await.unwrap();
                let (looked, _) = verify(None, false).look_from(&root, state).await.unwrap();
                assert!(!looked[0].pruned && !looked[0].report.is_sound(), "{kind:?}");
            }
        }
    }

    #[test]
    fn the_summary_does_not_call_a_size_a_checksum() {
        let file =
            |by, damage: Option<&str>| FileReport { object: "x".into(), bytes: 1, by, damage: damage.map(Into::into) };
        let report =
            |files| Report { step: Step(1), generation: Generation(1), deep: false, proof: Proof::Size, files };
        let text =
            summary(&[&report(vec![file(Proof::Bytes, None), file(Proof::Size, None), file(Proof::Size, None)])]);
        assert_eq!(
            text,
            "3 objects: 1 good by every byte, 2 size only: this store keeps no checksum, --deep compares every byte\n"
        );
        let text = summary(&[&report(vec![file(Proof::Checksum, None), file(Proof::Checksum, Some("x is short"))])]);
        assert_eq!(text, "2 objects: 1 damaged, 1 good by the store's checksum\n");
    }
}
