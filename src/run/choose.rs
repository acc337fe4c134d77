//! The state that the next generation starts from: the newest usable checkpoint, or the beginning.
//!
//! Reads only, apart from what [`super::doubt`] records about damage. May be dropped at any moment.

use std::sync::Arc;

use super::Runner;
use crate::{
    agent::generation::{Load, Source},
    checkpoint::restore,
    error::Result,
    ids::Step,
    journal::Committed,
    layout,
    report::Event,
    workload,
};

impl Runner {
    /// The newest usable checkpoint, while the rest of the data is verified against its checksums.
    pub(super) async fn choose_with_data(&mut self) -> Result<Load> {
        let resolved = Arc::clone(&self.resolved);
        let (load, ()) = tokio::try_join!(self.choose(), resolved.workload.verify())?;
        Ok(load)
    }

    /// Whether data other than that of the run so far is accepted.
    fn accepts_data(&self) -> bool {
        self.options.accepts_data || workload::names_data(&self.overrides)
    }

    /// The newest usable checkpoint, or the start of a new run. Damage is reported; the docket says what follows from
    /// it.
    async fn choose(&mut self) -> Result<Load> {
        let resolved = Arc::clone(&self.resolved);
        loop {
            let candidates = self.candidates().await?;
            if let Some(load) = self.in_memory(&candidates).await {
                return Ok(load);
            }
            let state = self.journal.state();
            let made_of = workload::MadeOf::new(&state, &resolved.workload, self.accepts_data());
            let outcome = self.newest_usable(&candidates, &made_of).await?;
            for damage in outcome.stepped_over.iter().filter(|damage| self.docket.suspect(damage)) {
                self.warn_of_damage(damage.step, &damage.object, &damage.reason);
            }
            let Some((committed, manifest)) = outcome.found else { break };
            if self.is_whole_if_turned_back_to(&committed).await? {
                return Ok(Load::Checkpoint {
                    step: committed.step,
                    generation: committed.generation,
                    from: Source::Store {
                        folder: layout::checkpoint(committed.step, committed.generation),
                        files: restore::tensor_files(&manifest),
                    },
                });
            }
        }
        if self.journal.state().checkpoints().is_empty() {
            return self.beginning().await;
        }
        Err(self.nothing_usable().await)
    }

    /// The newest checkpoint, if a slot of this node still holds it: then the store need not be read.
    async fn in_memory(&mut self, candidates: &[Committed]) -> Option<Load> {
        // What a node of several has in its memory decides nothing: see `together::forms`.
        if self.is_together() {
            return None;
        }
        // Newest first.
        let Committed { step, generation, .. } = *candidates.first()?;
        let (slot, files) = self.slots.find(step, generation).filter(|_| self.from.is_none())?;
        if !self.slots.verify(slot).await {
            tracing::info!(%step, slot, "snapshot in memory is no longer that checkpoint, reading the store");
            return None;
        }
        tracing::info!(%step, slot, "workers start again from the snapshot in memory");
        Some(Load::Checkpoint { step, generation, from: Source::Slot { slot, files } })
    }

    /// The start of a run without a checkpoint.
    pub(super) async fn beginning(&self) -> Result<Load> {
        Ok(match self.resolved.workload.beginning().await? {
            Some((folder, files)) => Load::Weights { folder, files },
            None => Load::Nothing,
        })
    }

    pub(super) fn warn_of_damage(&self, step: Step, object: &str, reason: impl std::fmt::Display) {
        let message = format!("checkpoint of step {step} is damaged and skipped: {object}: {reason}");
        self.reporter.event(&Event::Warning { message });
    }
}
