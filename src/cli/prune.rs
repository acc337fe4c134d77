//! `trainer prune`

use std::{process::ExitCode, time::Duration};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::Mutex;

use super::{
    args::{JsonArg, RunArg},
    output::{self, Table},
    store,
};
use crate::{
    checkpoint::{
        CheckpointError,
        catalog::Damage,
        condemn::{self, Docket},
        garbage::{self, Folder, Garbage, Kind},
        prune::{Abandoned, Fate, Plan, Reading, Why, apply_prune, doomed, plan_for, quarantined},
        verify::{Depth, verify},
    },
    config::{Keep, Spacing, parse_spacing},
    error::{Context, Error, Kind as ErrorKind, Result},
    history,
    ids::NodeId,
    journal::{CheckpointStatus, Journal, Record, ResumePoint, RunState},
    report::human,
    storage::Store,
};

/// Bytes of one request when a damaged checkpoint is read once more.
const PART: u64 = 4 << 20;
/// How long to wait for a summary of the journal.
const SUMMARY: Duration = Duration::from_secs(10);

/// Delete old checkpoints by plan, and leftovers of interrupted uploads
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer prune --run-id first --dry-run
  trainer prune --run-id first --keep-last 1 --keep-every 6h --keep-best 2

The newest checkpoint confirmed by checksums is never deleted,
nor is the one that the newest generation resumed from.
On a store without checksums, the newest checkpoint is read before anything is deleted.
Damaged checkpoints stay for diagnosis.
--damaged re-reads them and deletes those still damaged.
Data and uploads that belong to no checkpoint are deleted when they are a day old and their generation is over.")]
pub struct Prune {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// Keep the newest K [default: the run's setting]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    keep_last: Option<u32>,
    /// Also keep steps that are a multiple of this, or the first of each period: 1000, 6h [default: the run's setting]
    #[arg(long, value_name = "STEPS|TIME", value_parser = spacing)]
    keep_every: Option<Spacing>,
    /// Also keep the N with the lowest validation loss [default: the run's setting]
    #[arg(long, value_name = "N")]
    keep_best: Option<u32>,
    /// Also delete checkpoints that are still damaged when they are read again
    #[arg(long)]
    damaged: bool,
    /// Print the plan and delete nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    json: JsonArg,
}

fn spacing(text: &str) -> Result<Spacing, String> {
    let steps = text.trim().parse().ok().filter(|steps| *steps > 0).map(Spacing::Steps);
    steps.or_else(|| parse_spacing(text)).ok_or_else(|| "expected a number of steps, or a duration such as 6h".into())
}

/// One item of the plan.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Line<'a> {
    /// A checkpoint that stays or goes.
    Checkpoint {
        #[serde(flatten)]
        fate: &'a Fate,
        goes: bool,
        deleted: bool,
    },
    /// A folder that belongs to no checkpoint.
    Folder {
        #[serde(flatten)]
        folder: &'a Folder,
        deleted: bool,
    },
    /// An unfinished upload.
    Upload { key: &'a str, since: Timestamp, deleted: bool },
    /// The totals.
    Total(Total),
}

/// The totals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Total {
    kept: u64,
    kept_bytes: u64,
    /// US dollars, estimated.
    kept_usd_per_month: f64,
    gone: u64,
    /// Of checkpoints and folders; an unfinished upload's are not known.
    gone_bytes: u64,
    gone_usd_per_month: f64,
}

/// The plan, or its result.
struct Done {
    fates: Vec<Fate>,
    garbage: Garbage,
    total: Total,
    /// The newest checkpoint has not been read yet, on a store without checksums.
    unread: bool,
    dry_run: bool,
}

impl Prune {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let done = store::block_on(self.prune())?;
        output::emit(&if self.json.json { output::json_lines(done.lines())? } else { done.text() })?;
        Ok(ExitCode::SUCCESS)
    }

    async fn prune(&self) -> Result<Done> {
        let root = self.run.store.open()?;
        let folder = root.folder(self.run.run_id.as_str());
        let mut journal = Journal::open(folder.clone(), NodeId::random(), self.run.run_id.clone()).await?;
        let plan = self.plan(&folder, journal.state()).await?;
        let docket = Docket::default();
        for damage in &plan.damaged {
            tracing::warn!(step = %damage.step, object = damage.object, "checkpoint is damaged: {}", damage.reason);
            if !self.dry_run {
                docket.suspect(damage);
                self.settle(&docket, &folder, &mut journal).await?;
            }
        }
        let mut fates = self.with_quarantined(plan.fates, journal.state())?;
        if self.damaged && !self.dry_run {
            take_back(&folder, &mut journal, &mut fates, &docket).await?;
            // The earlier verdict may be wrong, while this machine garbles what it reads now.
            self.settle(&docket, &folder, &mut journal).await?;
        }
        let garbage = garbage::find(&folder, journal.state(), Timestamp::now()).await?;
        if let Some(error) = &garbage.unlisted {
            tracing::warn!(%error, "unfinished uploads were not looked for: allow s3:ListBucketMultipartUploads");
        }
        let total = total(journal.state(), &fates, &garbage);
        if !self.dry_run {
            let doing = format!("prune run {}", self.run.run_id);
            let journal = Mutex::new(journal);
            let append = |points| {
                let journal = &journal;
                async move {
                    journal.lock().await.append(Record::pruned(points)).await?;
                    Ok::<_, Error>(())
                }
            };
            apply_prune(&folder, &doomed(&fates), append).await.context(&doing)?;
            garbage::sweep(&folder, &garbage).await.context(doing)?;
            journal.into_inner().summed_up(SUMMARY).await;
        }
        Ok(Done { fates, garbage, total, unread: plan.unread, dry_run: self.dry_run })
    }

    /// Condemns the suspect, if another checkpoint is whole as this machine reads it.
    async fn settle(&self, docket: &Docket, folder: &Store, journal: &mut Journal) -> Result<()> {
        if docket.prove(folder, journal.state(), None).await? {
            docket.condemn(journal).await?;
            return Ok(());
        }
        let what = "no checkpoint is whole as this machine reads it: the machine itself may garble them";
        let run_id = &self.run.run_id;
        Err(Error::new(ErrorKind::Unavailable, what).with_hint(format!(
            "nothing was quarantined or deleted; run `trainer verify --run-id {run_id} --all --deep` on another \
            machine, then prune there"
        )))
    }

    async fn plan(&self, folder: &Store, state: &RunState) -> Result<Plan> {
        let config = history::config(state).checkpoint.keep;
        let keep = Keep {
            last: self.keep_last.unwrap_or(config.last),
            every: self.keep_every.or(config.every),
            best: self.keep_best.unwrap_or(config.best),
        };
        let reading = if self.dry_run { Reading::Assume } else { Reading::Unless(&[]) };
        Ok(plan_for(folder, state, keep, Abandoned::Delete, reading, None).await?)
    }

    /// The plan, damaged checkpoints included. If all are damaged, none is deleted: they may be all that is left.
    fn with_quarantined(&self, mut fates: Vec<Fate>, state: &RunState) -> Result<Vec<Fate>> {
        let mut damaged = quarantined(state);
        if self.damaged {
            if !damaged.is_empty() && state.candidates().is_empty() {
                return Err(CheckpointError::NoneUsable { run_id: self.run.run_id.clone() }.into());
            }
            damaged.iter_mut().for_each(|fate| fate.stays.clear());
        }
        // Damage found just now is in the plan, too.
        fates.retain(|fate| damaged.iter().all(|damaged| damaged.point != fate.point));
        fates.append(&mut damaged);
        fates.sort_by_key(|fate| (fate.point.generation, fate.point.step));
        Ok(fates)
    }
}

/// Checkpoints that turn out whole are no longer condemned, and stay: a deletion is final.
async fn take_back(folder: &Store, journal: &mut Journal, fates: &mut [Fate], docket: &Docket) -> Result<()> {
    for fate in fates.iter_mut().filter(|fate| fate.goes()) {
        let ResumePoint { step, generation } = fate.point;
        let Some(checkpoint) = journal.state().checkpoint(step, generation) else { continue };
        if !matches!(checkpoint.status, CheckpointStatus::Damaged { .. }) {
            continue;
        }
        let report = verify(folder, &checkpoint.committed.clone(), Depth::Bytes { part: PART }, &|_| {}).await?;
        if condemn::clear(journal, &report).await? {
            tracing::warn!(%step, "checkpoint had been found damaged and is whole: it is good again, and stays");
            fate.stays.push(Why::Cleared);
        } else if let Some((object, reason)) = report.damage() {
            docket.suspect(&Damage { step, generation, object: object.to_owned(), reason: reason.to_string() });
        }
    }
    Ok(())
}

fn total(state: &RunState, fates: &[Fate], garbage: &Garbage) -> Total {
    let (gone, kept): (Vec<&Fate>, Vec<&Fate>) = fates.iter().partition(|fate| fate.goes());
    let sum = |fates: &[&Fate]| fates.iter().map(|fate| fate.bytes).fold(0, u64::saturating_add);
    let kept_bytes = sum(&kept);
    let gone_bytes = garbage.folders.iter().map(|folder| folder.bytes).fold(sum(&gone), u64::saturating_add);
    Total {
        kept: kept.len() as u64,
        kept_bytes,
        kept_usd_per_month: history::monthly_cost(state, kept_bytes),
        gone: (gone.len() + garbage.folders.len() + garbage.uploads.len()) as u64,
        gone_bytes,
        gone_usd_per_month: history::monthly_cost(state, gone_bytes),
    }
}

impl Done {
    fn lines(&self) -> Vec<Line<'_>> {
        let deleted = !self.dry_run;
        let mut lines = Vec::new();
        for fate in &self.fates {
            lines.push(Line::Checkpoint { fate, goes: fate.goes(), deleted: deleted && fate.goes() });
        }
        lines.extend(self.garbage.folders.iter().map(|folder| Line::Folder { folder, deleted }));
        for upload in &self.garbage.uploads {
            lines.push(Line::Upload { key: &upload.key, since: upload.since, deleted });
        }
        lines.push(Line::Total(self.total));
        lines
    }

    fn text(&self) -> String {
        let goes = if self.dry_run { "would be deleted" } else { "deleted" };
        let mut table = Table::new(&[">step", ">generation", ">size", "", "why"]);
        for fate in &self.fates {
            let why = fate.stays.iter().map(|why| words(*why)).collect::<Vec<_>>().join(", ");
            let (what, why) = if fate.goes() { (goes, "no rule keeps it".to_owned()) } else { ("stays", why) };
            let (step, generation) = (fate.point.step.to_string(), fate.point.generation.to_string());
            table.row([step, generation, human::bytes(fate.bytes), what.to_owned(), why]);
        }
        for Folder { step, generation, why, objects, bytes } in &self.garbage.folders {
            let why = match why {
                Kind::LeftOver => "left over from an interrupted deletion",
                Kind::Orphaned => "never committed",
            };
            let why = format!("{why}, {}", human::plural(*objects, "object"));
            table.row([step.to_string(), generation.to_string(), human::bytes(*bytes), goes.to_owned(), why]);
        }
        let mut text = table.text();
        for upload in &self.garbage.uploads {
            let since = human::ago(upload.since, Timestamp::now());
            text.push_str(&format!("unfinished upload of {}, {since}: {goes}\n", human::plain(&upload.key)));
        }
        let Total { kept, kept_bytes, kept_usd_per_month, gone, gone_bytes, gone_usd_per_month } = self.total;
        text.push_str(&format!(
            "kept: {}, {}, about {} a month\n{goes}: {gone}, {}, about {} a month\n",
            human::plural(kept, "checkpoint"),
            human::bytes(kept_bytes),
            human::dollars(kept_usd_per_month),
            human::bytes(gone_bytes),
            human::dollars(gone_usd_per_month),
        ));
        if self.unread {
            text.push_str("this store keeps no checksums: the newest checkpoint is read before anything is deleted\n");
        }
        text
    }
}

fn words(why: Why) -> &'static str {
    match why {
        Why::Verified => "the newest verified",
        Why::Unproven => "newer than the newest verified",
        Why::Last => "one of the last",
        Why::Every => "one of those kept for good",
        Why::Best => "one of the best",
        Why::InUse => "the run has resumed from it",
        Why::Quarantined => "damaged, kept for diagnosis (--damaged deletes it)",
        Why::Cleared => "found damaged before, but whole when read again",
    }
}
