//! A member finishes a save whose leader is lost.
//!
//! The leader writes a checkpoint's manifest and record last. If it is lost between the last receipt and the record,
//! all bytes are in the store and only the record is missing: a whole checkpoint, that was paid for. Any member of the
//! generation may write both. It knows from the leader's order which files the checkpoint has and what the step's
//! figures are, and reads the receipts in the store; nothing is taken from memory.
//!
//! Of several members that finish the same save one creates each object, and the others find that it stands
//! ([`put_manifest`], `Journal::append`).
//!
//! *Crash:* another member finishes it, or nobody: then its files are garbage. *Retry:* none; the next generation forms
//! in any case. *Cancel:* nothing more is written.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{drain::estimate::Estimates, upload::Context};
use crate::{
    checkpoint::save::{Receipt, Save, put_manifest, read_receipt},
    error::{Error, Result},
    ids::{AttemptId, Step},
    journal::{Committed, Metrics, Record, SaveCost, Urgency},
};

/// How long a save may take to be finished on the way out of a generation, at least.
pub const FINISHING: Duration = Duration::from_secs(120);
/// A save that usually takes longer than half of that has this many times its usual time.
const USUAL_TIMES: f64 = 2.0;

/// How long all nodes wait for a save of this many bytes on their way out of a generation; `least`: [`FINISHING`].
pub fn limit(least: Duration, estimates: &Estimates, bytes: u64) -> Duration {
    let usual = estimates.upload(bytes).map(|usual| usual.high * USUAL_TIMES);
    let usual = usual.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    usual.map_or(least, |usual| usual.max(least))
}

/// How long the receipts of other members are waited for: they have noticed the loss at most seconds apart.
const RECEIPTS: Duration = Duration::from_secs(20);
/// The pause between two looks for a receipt.
const LOOK: Duration = Duration::from_millis(250);

/// What a record of a checkpoint needs beside its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Whole {
    /// The name of every file of the checkpoint, over all nodes.
    pub expected: Vec<String>,
    /// The step's loss, if it has one.
    pub loss: Option<f64>,
    /// Its validation loss, if it was measured.
    pub validation_loss: Option<f64>,
    /// Its other figures.
    pub metrics: Metrics,
}

/// A save as the leader ordered it.
#[derive(Clone, Debug)]
pub struct Ordered {
    /// The attempt.
    pub attempt: AttemptId,
    /// The step.
    pub step: Step,
    /// The rest.
    pub whole: Whole,
}

/// Finishes the save if the leader's part of it is whole: waits for `own`, this node's part, and for the receipts of
/// the other members. `None`: something is missing, so nothing was written; or it is committed already, or the
/// generation's end is recorded.
pub async fn finish(context: &Context, ordered: Ordered, own: impl Future<Output = bool>) -> Result<Option<Committed>> {
    let Ordered { attempt, step, whole } = ordered;
    let receipt = async |node| -> Result<Option<Receipt>> {
        let found = read_receipt(&context.run, step, context.generation, node).await?;
        Ok(found.filter(|receipt| receipt.attempt == attempt))
    };
    let Some(leader) = context.members.first() else { return Ok(None) };
    context.journal.refresh().await.map_err(Error::from)?;
    let state = context.journal.state();
    let ended = state.interruptions().iter().any(|end| end.generation == context.generation);
    if ended || state.checkpoint(step, context.generation).is_some() {
        return Ok(None);
    }
    // Nobody else has the leader's files: without its receipt there is nothing to wait for.
    if receipt(leader).await?.is_none() || !own.await {
        return Ok(None);
    }
    let until = tokio::time::Instant::now() + RECEIPTS;
    let mut receipts = Vec::with_capacity(context.members.len());
    for node in &context.members {
        let found = loop {
            match receipt(node).await? {
                Some(found) => break found,
                None if tokio::time::Instant::now() >= until => return Ok(None),
                None => tokio::time::sleep(LOOK).await,
            }
        };
        receipts.push(found);
    }
    let save = Save {
        attempt,
        run_id: context.run_id.clone(),
        step,
        generation: context.generation,
        node: context.node.clone(),
        world_size: context.ranks.world,
        uploads: Vec::new(),
        small: Vec::new(),
    };
    let manifest = put_manifest(&context.run, &save, &receipts, &whole.expected).await?;
    let lived_s = context.formed.elapsed().as_secs_f64();
    let committed = Committed {
        step,
        generation: context.generation,
        manifest: manifest.key,
        manifest_crc64: manifest.crc64,
        bytes: Receipt::shard_bytes(&receipts),
        loss: whole.loss,
        validation_loss: whole.validation_loss,
        metrics: whole.metrics,
        cost: SaveCost { lived_s, ..SaveCost::default() },
    };
    let record = Record::Committed(committed.clone());
    context.journal.append(Urgency::Commit, record).await.map_err(Error::from)?;
    Ok(Some(committed))
}
