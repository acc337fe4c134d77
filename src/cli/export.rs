//! `trainer export`

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{
    adapted::{Adapted, described},
    args::{JsonArg, RunArg},
    generate::Scratch,
    output, store,
};
use crate::{
    checkpoint::{
        catalog,
        export::{self, Target},
    },
    config,
    error::{Context, Error, Kind, Result},
    format::header::Dtype,
    history::{self, Which},
    ids::{RunId, Step},
    journal::Committed,
    layout,
    report::human,
    storage::Store,
};

/// Write a checkpoint's weights as a Hugging Face model folder, or its adapters as PEFT's adapter folder
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer export --run-id first --out model
  trainer export --run-id first --step 500 --out s3://bucket/models/first-500
  trainer export --run-id tuned --merge --out model     LoRA: a whole model instead of the adapters")]
pub struct Export {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// The checkpoint of this step, or `best`: of the lowest held-out loss [default: the newest]
    #[arg(long, value_name = "STEP")]
    step: Option<Which>,
    /// A new folder, or a URI
    #[arg(long, value_name = "DIR|URI")]
    out: String,
    /// Merge a LoRA run's adapters into the weights that they were trained beside, and write the whole model
    #[arg(long)]
    merge: bool,
    /// The type of the merged weights [default: bf16 if all weights of model.init_from are, else fp32]
    #[arg(long, value_name = "TYPE", requires = "merge")]
    dtype: Option<Type>,
    #[command(flatten)]
    json: JsonArg,
}

/// The type of merged weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    /// 32 bits
    Fp32,
    /// bfloat16
    Bf16,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Done<'a> {
    run_id: &'a RunId,
    step: Step,
    out: &'a str,
    bytes: u64,
    files: &'a [String],
    /// The largest difference that merging made to a score.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_logit_difference: Option<f64>,
}

impl Export {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let out = store::absolute(&self.out)?;
        let (step, exported, apart) = store::block_on(async {
            let target = match config::local_path(&out) {
                Some(folder) => Target::Folder(folder),
                None => Target::Store(Store::open(&out, &store::LIMITS)?),
            };
            if self.merge {
                let (step, exported, apart) = self.merged(&target).await?;
                return Ok((step, exported, Some(apart)));
            }
            let (step, exported) = export(&self.run, self.step, &target).await?;
            Ok((step, exported, None))
        })?;
        let done = Done {
            run_id: &self.run.run_id,
            step,
            out: &out,
            bytes: exported.bytes,
            files: &exported.files,
            max_logit_difference: apart,
        };
        output::emit(&if self.json.json { output::json_lines([&done])? } else { done.text() })?;
        Ok(ExitCode::SUCCESS)
    }

    /// Exports the merged model; returns the largest difference that merging made to a score, too.
    async fn merged(&self, target: &Target) -> Result<(Step, export::Exported, f64)> {
        let root = self.run.store.open()?;
        let state = history::read(&root, &self.run.run_id).await?;
        let model = &state.config().workload.model;
        if model.lora.is_none() {
            let what = format!("run {} has no adapters to merge: all of its weights are trained", self.run.run_id);
            return Err(Error::new(Kind::Usage, what).with_hint("export it without --merge"));
        }
        let scratch = Scratch::new()?;
        // Below the private folder, since an export replaces the target with a folder of its own.
        let folder = scratch.folder();
        let (step, exported) = export(&self.run, self.step, &Target::Folder(folder.clone())).await?;
        let Some(adapted) = Adapted::load(model, &folder).await? else {
            return Err(Error::new(Kind::Bug, "a run with adapters has no base"));
        };
        let dtype = match self.dtype {
            None => adapted.dtype(),
            Some(Type::Fp32) => Dtype::F32,
            Some(Type::Bf16) => Dtype::BF16,
        };
        let (weights, apart) = adapted.merge(dtype)?;
        let bytes = weights.len() as u64;
        let mut files = vec![(layout::MODEL.to_owned(), weights)];
        for name in exported.files {
            if name == layout::ADAPTER || name == layout::ADAPTER_CONFIG {
                continue;
            }
            let path = folder.join(&name);
            let read = std::fs::read(&path).map_err(|error| Error::from_source(Kind::Unavailable, error));
            let read = read.context(format!("read {}", path.display()))?;
            let read = if name == layout::MODEL_CONFIG { described(&read, dtype)? } else { read.into() };
            files.push((name, read));
        }
        let names = files.iter().map(|(name, _)| name.clone()).collect();
        export::write(target, files).await?;
        Ok((step, export::Exported { bytes, files: names }, apart))
    }
}

impl Done<'_> {
    fn text(&self) -> String {
        let what = if self.files.iter().any(|name| name == layout::ADAPTER) { "adapters" } else { "weights" };
        let merged = self.max_logit_difference.map_or_else(String::new, |apart| {
            format!("merged: no score of the next token differs by more than {apart:.3e} from the unmerged model's\n")
        });
        format!(
            "{}: {what} of step {} of run {}, {} in {}\n{merged}",
            self.out,
            self.step,
            self.run_id,
            human::bytes(self.bytes),
            human::plural(self.files.len() as u64, "file")
        )
    }
}

/// Exports a step's weights, or the newest; returns the step.
pub(super) async fn export(run: &RunArg, step: Option<Which>, target: &Target) -> Result<(Step, export::Exported)> {
    let root = run.store.open()?;
    let (_, committed) = history::choose(&root, &run.run_id, step).await?;
    export_chosen(&root, &run.run_id, step, committed, target).await
}

/// Exports the chosen checkpoint. A run that goes on may prune it meanwhile: then another one is chosen.
async fn export_chosen(
    root: &Store,
    run_id: &RunId,
    step: Option<Which>,
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
        let error = export(Some(Which::Step(old.step))).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        assert_eq!(export(None).await.unwrap().0, newest.step);
        assert!(out.path().join("model/model.safetensors").is_file());
    }
}
