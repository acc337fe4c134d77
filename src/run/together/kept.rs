//! Workers that wait between two generations: whether they go on in the next one ([`crate::agent::keep`]).
//!
//! *Crash:* they end with this process. *Retry:* those that do not fit are ended, and others start. *Cancel:* dropping
//! them ends them.

use super::Memory;
use crate::{
    agent::{generation::Load, keep::Kept},
    run::Runner,
};

impl Runner {
    /// The load of the next generation, and this node's workers if they go on in it. Those that can't are gone when
    /// this returns. What workers keep is not looked for in this node's memory.
    pub(super) async fn with_kept(&mut self, load: Load, memory: &mut Memory) -> (Load, Option<Kept>) {
        let kept = match memory.kept.take() {
            None => None,
            Some(kept) => match kept.unfit(&load, &self.resolved.workload, &self.slots) {
                None => Some(kept),
                Some(why) => {
                    let (step, generation) = kept.at();
                    tracing::info!(%step, %generation, "workers with the state of this step start anew: {why}");
                    kept.dismiss().await;
                    None
                }
            },
        };
        let load = match &kept {
            Some(kept) if kept.keeps_state() => load,
            _ => self.in_own_memory(load).await,
        };
        (load, kept)
    }
}
