//! `trainer export`

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    output, store,
};
use crate::{
    checkpoint::{
        catalog,
        export::{self, Target},
    },
    config,
    error::{Context, Kind, Result},
    history,
    ids::{RunId, Step},
    journal::Committed,
    report::human,
    storage::Store,
};

/// Write a checkpoint's weights as a Hugging Face model folder
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer export --run-id first --out model
  trainer export --run-id first --step 500 --out s3://bucket/models/first-500")]
pub struct Export {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// The checkpoint of this step [default: the newest]
    #[arg(long, value_name = "STEP")]
    step: Option<Step>,
    /// A new folder, or a URI
    #[arg(long, value_name = "DIR|URI")]
    out: String,
    #[command(flatten)]
    json: JsonArg,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Done<'a> {
    run_id: &'a RunId,
    step: Step,
    out: &'a str,
    bytes: u64,
    files: &'a [String],
}

impl Export {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let out = store::absolute(&self.out)?;
        let (step, exported) = store::block_on(async {
            let target = match config::local_path(&out) {
                Some(folder) => Target::Folder(folder),
                None => Target::Store(Store::open(&out, &store::LIMITS)?),
            };
            export(&self.run, self.step, &target).await
        })?;
        let done = Done { run_id: &self.run.run_id, step, out: &out, bytes: exported.bytes, files: &exported.files };
        output::emit(&if self.json.json { output::json_lines([&done])? } else { done.text() })?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Done<'_> {
    fn text(&self) -> String {
        format!(
            "{}: weights of step {} of run {}, {} in {}\n",
            self.out,
            self.step,
            self.run_id,
            human::bytes(self.bytes),
            human::plural(self.files.len() as u64, "file")
        )
    }
}

/// Exports a step's weights, or the newest; returns the step.
pub(super) async fn export(run: &RunArg, step: Option<Step>, target: &Target) -> Result<(Step, export::Exported)> {
    let root = run.store.open()?;
    let (_, committed) = history::choose(&root, &run.run_id, step).await?;
    export_chosen(&root, &run.run_id, step, committed, target).await
}

/// Exports the chosen checkpoint. A run that goes on may prune it meanwhile: then another one is chosen.
async fn export_chosen(
    root: &Store,
    run_id: &RunId,
    step: Option<Step>,
    mut committed: Committed,
    target: &Target,
) -> Result<(Step, export::Exported)> {
    let folder = root.folder(run_id.as_str());
    loop {
        let error = match weights(&folder, &committed, target).await {
            Ok(exported) => return Ok((committed.step, exported)),
            Err(error) if error.kind() == Kind::Data => error,
            Err(error) => return Err(error),
        };
        let state = history::read(root, run_id).await?;
        if !history::is_pruned(&state, committed.step, committed.generation) {
            return Err(error);
        }
        tracing::warn!(step = %committed.step, "checkpoint was pruned while it was read");
        (_, committed) = history::choose(root, run_id, step).await?;
    }
}

async fn weights(folder: &Store, committed: &Committed, target: &Target) -> Result<export::Exported> {
    let doing = || format!("export step {}", committed.step);
    let manifest = catalog::read_manifest(folder, committed).await.context(doing())?;
    let part = u64::from(store::LIMITS.part_mib) << 20;
    export::export(folder, &manifest, target, part, |_| {}).await.context(doing())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::testing::memory_store, history::tests::run_that_pruned};

    #[tokio::test]
    async fn a_checkpoint_that_is_pruned_while_it_is_read_is_not_damaged() {
        let root = memory_store();
        let (stale, newest) = run_that_pruned(&root, 2).await;
        let old = stale.newest().unwrap().committed.clone();
        let out = tempfile::tempdir().unwrap();
        let target = Target::Folder(out.path().join("model"));
        let export = |step| export_chosen(&root, stale.run_id(), step, old.clone(), &target);
        let error = export(Some(old.step)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        assert_eq!(export(None).await.unwrap().0, newest.step);
        assert!(out.path().join("model/model.safetensors").is_file());
    }
}
