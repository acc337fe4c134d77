//! `trainer export`

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{
    adapted::{Adapted, Merger},
    args::{JsonArg, RunArg},
    generate::Scratch,
    output, store,
};
use crate::{
    checkpoint::{
        catalog,
        export::{self, Form, Target},
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
  trainer export --run-id first --dtype fp32 --out model     the weights as they are trained, not rounded
  trainer export --run-id tuned --merge --out model          LoRA: a whole model instead of the adapters")]
pub struct Export {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// The checkpoint of this step, or `best`: of the lowest held-out loss [default: the newest]
    #[arg(long, value_name = "STEP")]
    step: Option<Which>,
    /// A new folder, or a URI: an earlier export there is replaced
    #[arg(long, value_name = "DIR|URI")]
    out: String,
    /// Merge a LoRA run's adapters into the weights that they were trained beside, and write the whole model
    #[arg(long)]
    merge: bool,
    /// The type of the weights [default: as the checkpoint has them; merged: bf16 if model.init_from is, else fp32]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Type>,
    /// The most bytes of weights in one file, such as 5GB or 500MiB; more are split into several files, with an index
    #[arg(long, value_name = "SIZE", value_parser = shard_size, default_value = "5GB")]
    max_shard_size: u64,
    /// Merge without comparing scores, which needs memory for all weights in fp32
    #[arg(long, requires = "merge")]
    no_compare: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// The type of weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    /// 32 bits
    Fp32,
    /// bfloat16
    Bf16,
}

impl From<Type> for Dtype {
    fn from(asked: Type) -> Self {
        match asked {
            Type::Fp32 => Self::F32,
            Type::Bf16 => Self::BF16,
        }
    }
}

/// Bytes: a whole number, with one of the units of transformers or without.
fn shard_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 6] =
        [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1_000)];
    let unit = UNITS.iter().find_map(|(name, bytes)| Some((text.strip_suffix(name)?, *bytes)));
    let (number, unit) = unit.unwrap_or((text, 1));
    let size = number.trim_end().parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    size.filter(|&size| size > 0).ok_or_else(|| "expected a size such as 5GB, 500MB or 2GiB".to_owned())
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Done<'a> {
    run_id: &'a RunId,
    step: Step,
    out: &'a str,
    bytes: u64,
    /// The type of all weights, as config.json spells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<&'static str>,
    files: &'a [String],
    /// The largest difference that merging made to a score.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_logit_difference: Option<f64>,
}

impl Export {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let out = store::absolute(&self.out)?;
        let form = Form { dtype: self.dtype.map(Dtype::from), max_shard: self.max_shard_size, ..Form::plain(part()) };
        let (step, exported, apart) = store::block_on(async {
            let target = match config::local_path(&out) {
                Some(folder) => Target::Folder(folder),
                None => Target::Store(Store::open(&out, &store::LIMITS)?),
            };
            if self.merge {
                return self.merged(&target, &form).await;
            }
            let (step, exported) = export(&self.run, self.step, &target, &form).await?;
            Ok((step, exported, None))
        })?;
        let merge = self.merge.then_some(apart);
        output::emit(&if self.json.json {
            let done = Done {
                run_id: &self.run.run_id,
                step,
                out: &out,
                bytes: exported.bytes,
                dtype: exported.dtype,
                files: &exported.files,
                max_logit_difference: apart,
            };
            output::json_lines([&done])?
        } else {
            text(&out, step, &self.run.run_id, &exported, merge)
        })?;
        Ok(ExitCode::SUCCESS)
    }

    /// Exports the merged model; returns the largest difference that merging made to a score, too.
    async fn merged(&self, target: &Target, form: &Form) -> Result<(Step, export::Exported, Option<f64>)> {
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
        let adapters = Target::Folder(folder.clone());
        let (step, exported) = export(&self.run, self.step, &adapters, &Form::plain(part())).await?;
        const NO_BASE: &str = "a run with adapters has no base";
        let merger = Merger::open(model, &folder, form.dtype).await?;
        let merger = merger.ok_or_else(|| Error::new(Kind::Bug, NO_BASE))?;
        let apart = match self.no_compare {
            true => None,
            false => {
                let adapted = Adapted::load(model, &folder).await?;
                let adapted = adapted.ok_or_else(|| Error::new(Kind::Bug, NO_BASE))?;
                Some(adapted.difference(merger.dtype)?)
            }
        };
        let mut small = Vec::new();
        for name in exported.files.into_iter().filter(|name| name != layout::ADAPTER && name != layout::ADAPTER_CONFIG)
        {
            let path = folder.join(&name);
            let read = std::fs::read(&path).map_err(|error| Error::from_source(Kind::Unavailable, error));
            small.push((name, read.context(format!("read {}", path.display()))?.into()));
        }
        Ok((step, merger.write(small, target, form).await?, apart))
    }
}

/// Bytes of one request.
pub(super) fn part() -> u64 {
    u64::from(store::LIMITS.part_mib) << 20
}

/// What is told a person. `merge`: the weights were merged, and how far apart the scores are, if they were compared.
fn text(out: &str, step: Step, run_id: &RunId, exported: &export::Exported, merge: Option<Option<f64>>) -> String {
    let export::Exported { bytes, files, origins, .. } = exported;
    let what = if files.iter().any(|name| name == layout::ADAPTER) { "adapters" } else { "weights" };
    let mut text = format!(
        "{out}: {what} of step {step} of run {run_id}, {} in {}\n",
        human::bytes(*bytes),
        human::plural(files.len() as u64, "file")
    );
    let count = |tensors: usize| human::plural(tensors as u64, "tensor");
    match merge {
        None if origins.masters > 0 => {
            text += &format!("fp32: {} from the fp32 values that the run trains\n", count(origins.masters));
        }
        Some(Some(apart)) => {
            text += &format!(
                "merged: no score of the next token differs by more than {apart:.3e} from the unmerged model's\n"
            );
        }
        Some(None) => text += "merged: scores were not compared\n",
        None => {}
    }
    if merge.is_none() && origins.widened > 0 {
        text += &format!(
            "fp32: {} of the run have 16 bits and no others; written in fp32, their values are the same\n",
            count(origins.widened)
        );
    }
    if merge.is_none() && origins.rounded > 0 {
        text += &format!("bf16: {} rounded to the nearest value\n", count(origins.rounded));
    }
    text
}

/// Exports a step's weights, or the newest; returns the step.
pub(super) async fn export(
    run: &RunArg,
    step: Option<Which>,
    target: &Target,
    form: &Form,
) -> Result<(Step, export::Exported)> {
    let root = run.store.open()?;
    let (_, committed) = history::choose(&root, &run.run_id, step).await?;
    export_chosen(&root, &run.run_id, step, committed, target, form).await
}

/// Exports the chosen checkpoint. A run that goes on may prune it meanwhile: then another one is chosen.
async fn export_chosen(
    root: &Store,
    run_id: &RunId,
    step: Option<Which>,
    mut committed: Committed,
    target: &Target,
    form: &Form,
) -> Result<(Step, export::Exported)> {
    let folder = root.folder(run_id.as_str());
    loop {
        let error = match weights(&folder, &committed, target, form).await {
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

async fn weights(folder: &Store, committed: &Committed, target: &Target, form: &Form) -> Result<export::Exported> {
    let doing = || format!("export step {}", committed.step);
    let manifest = catalog::read_manifest(folder, committed).await.context(doing())?;
    export::export(folder, &manifest, target, form, |_| {}).await.context(doing())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::testing::memory_store, history::tests::run_that_pruned};

    #[test]
    fn a_size_has_decimal_or_binary_units() {
        for (text, bytes) in [
            ("5GB", 5_000_000_000),
            ("500 MB", 500_000_000),
            ("7KB", 7_000),
            ("2GiB", 2 << 30),
            ("3MiB", 3 << 20),
            ("4KiB", 4 << 10),
            ("1000", 1000),
        ] {
            assert_eq!(shard_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "0", "0GB", "-1GB", "1.5GB", "5gb", "GB", "99999999999GiB"] {
            assert!(shard_size(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_checkpoint_that_is_pruned_while_it_is_read_is_not_damaged() {
        let root = memory_store();
        let (stale, newest) = run_that_pruned(&root, 2).await;
        let old = stale.newest().unwrap().committed.clone();
        let out = tempfile::tempdir().unwrap();
        let (target, form) = (Target::Folder(out.path().join("model")), Form::plain(1000));
        let export = |step| export_chosen(&root, stale.run_id(), step, old.clone(), &target, &form);
        let error = export(Some(Which::Step(old.step))).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        assert_eq!(export(None).await.unwrap().0, newest.step);
        assert!(out.path().join("model/model.safetensors").is_file());
    }
}
