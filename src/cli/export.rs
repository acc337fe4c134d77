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
    error::{Context, Result},
    history,
    ids::{RunId, Step},
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
    run: RunArg,
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
    let (folder, committed) = history::choose(&run.store.open()?, &run.run_id, step).await?;
    let doing = || format!("export step {}", committed.step);
    let manifest = catalog::read_manifest(&folder, &committed).await.context(doing())?;
    let part = u64::from(store::LIMITS.part_mib) << 20;
    let exported = export::export(&folder, &manifest, target, part, |_| {}).await.context(doing())?;
    Ok((committed.step, exported))
}
