//! How this node forms a generation, or takes up one that was formed: the record, its place in it, the state to load.
//!
//! *Crash:* a record stands or it does not. *Retry:* the rendezvous proposes again, after a pause. *Cancel:* all of it
//! may be dropped at any moment; whether a record that was being appended stands, the next look at the journal shows.

use std::{collections::BTreeSet, net::SocketAddr};

use tokio::sync::mpsc;

use super::{
    Memory, STORE_AWAY,
    desk::{Myself, Proposal},
};
use crate::{
    agent::{
        Neighbours,
        generation::{Load, Source},
    },
    checkpoint::{catalog, restore},
    error::{Error, Kind, Result},
    ids::{NodeId, NodeRanks, Rank, WorldSize},
    journal::{Formation, Formed, FormedReason, Gone, JournalError, ResumePoint, RosterEntry, Succession},
    layout,
    rendezvous::channel::Peer,
    report::Event,
    run::{Runner, Seating, open::effective, words::short},
};

impl Runner {
    /// Appends `formed`; whether it stands.
    pub(super) async fn propose(&mut self, proposal: Proposal, memory: &mut Memory) -> Result<Option<bool>> {
        let Proposal { generation, roster, out, continues } = proposal;
        if !self.is_as_recorded().await? {
            return Ok(Some(false));
        }
        self.resolved.workload.is_still_there()?;
        // The desk reads on meanwhile: the append compares what was chosen from with what there is then.
        let basis = self.journal.state().basis();
        if basis.generation.next() != generation {
            return Ok(Some(false));
        }
        let load = match self.choose_with_data().await {
            Ok(load) => load,
            Err(error) if error.kind() == Kind::Unavailable => {
                tracing::warn!(%error, "no generation is formed now");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let here: BTreeSet<&NodeId> = roster.iter().map(|entry| &entry.node).collect();
        let continued = continues.as_ref().map(|roster| roster.generation);
        let old: BTreeSet<&NodeId> = continues.iter().flat_map(|old| &old.members).map(|member| &member.node).collect();
        let told = |node: &NodeId| {
            let out = || out.iter().find(|(out, ..)| out == node).map(|(_, reason, why)| (*reason, why.as_str()));
            memory.gone.get(node).map(|(reason, why)| (*reason, why.as_str())).or_else(out)
        };
        let why = |node| short(told(node).map_or("did not answer", |(_, why)| why));
        let gone: Vec<Gone> =
            old.difference(&here).map(|node| Gone { node: (*node).clone(), why: why(node) }).collect();
        let joined =
            if continues.is_some() { here.difference(&old).map(|node| (*node).clone()).collect() } else { vec![] };
        let left = |gone: &Gone| told(&gone.node).is_some_and(|(reason, _)| reason == FormedReason::NodeLeft);
        let reason = match (&continues, gone.is_empty(), joined.is_empty()) {
            (None, ..) => FormedReason::Started,
            (_, false, _) if gone.iter().all(left) => FormedReason::NodeLeft,
            (_, false, _) => FormedReason::NodeLost,
            (_, _, false) => FormedReason::NodeJoined,
            _ => FormedReason::WorkerDied,
        };
        let resume = match &load {
            Load::Checkpoint { step, generation, .. } => Some(ResumePoint { step: *step, generation: *generation }),
            _ => None,
        };
        let workers = roster.iter().fold(0_u32, |sum, entry| sum.saturating_add(entry.workers));
        let formed = Formed {
            roster: roster.clone(),
            world_size: WorldSize(workers),
            resume,
            overrides: self.overrides.iter().filter(|(key, _)| !is_of_this_machine(key)).cloned().collect(),
            reason,
            data: Some(self.resolved.workload.data().clone()),
            succession: Succession {
                continues: continued,
                gone,
                joined,
                why: memory.story.differed.as_deref().map(short),
            },
        };
        match self.journal.form_upon(formed, basis).await {
            Ok(generation) => {
                self.overrides.clear();
                // What this command asked for holds once: later generations go on from the newest checkpoint.
                self.from = None;
                self.options.accepts_data = false;
                memory.load = Some((generation, load));
                memory.gone.clear();
                Ok(Some(true))
            }
            Err(JournalError::Overtaken { .. } | JournalError::Moved { .. } | JournalError::LeftOut { .. }) => {
                Ok(Some(false))
            }
            Err(JournalError::Storage(error)) => {
                tracing::warn!(%error, "it is not known whether the generation stands");
                Ok(None)
            }
            // Such as a node whose id is used up and that has not noticed yet: the next proposal comes after a pause.
            Err(error @ JournalError::Refused { .. }) => {
                tracing::warn!(%error, "the generation is not formed");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the settings those of the journal, with this command's changes where they still count. `false`: the run is
    /// complete by now.
    pub(super) async fn is_as_recorded(&mut self) -> Result<bool> {
        let (mut config, _) = effective(&self.journal.state(), &self.overrides)?;
        config.network = self.resolved.config.network;
        if config == self.resolved.config {
            return Ok(true);
        }
        let (settings, _known) = mpsc::unbounded_channel();
        Ok(self.resolve_again(&settings).await?.is_none())
    }

    /// Another node leads: what this command would have changed is not changed.
    pub(super) fn gives_up_changes(&mut self) {
        let own = self.overrides.iter().filter(|(key, _)| !is_of_this_machine(key));
        let own: Vec<&str> = own.map(|(key, _)| key.as_str()).collect();
        if !own.is_empty() {
            let message = format!("--set {} does not apply here: another node leads the run", own.join(", "));
            self.reporter.event(&Event::Warning { message });
        }
        if self.from.take().is_some() {
            let message = "--from does not apply here: another node leads the run".to_owned();
            self.reporter.event(&Event::Warning { message });
        }
        self.overrides.clear();
    }

    /// This node's place in a generation, as its record says.
    pub(super) fn seating(&self, formed: &Formation, me: &Myself) -> Result<Seating> {
        let mut first = 0_u32;
        let mut ranks = None;
        let world = formed.roster.iter().fold(0_u32, |sum, entry| sum.saturating_add(entry.workers));
        let mut others = Vec::new();
        for RosterEntry { node, workers, .. } in &formed.roster {
            let its = NodeRanks { first: Rank(first), workers: *workers, world: WorldSize(world) };
            if *node == self.node {
                ranks = Some(its);
            } else {
                others.push((node.clone(), its));
            }
            first = first.saturating_add(*workers);
        }
        let ranks = ranks.filter(|ranks| ranks.workers == me.workers).ok_or_else(|| {
            let what = format!("generation {} does not name this node with {} workers", formed.generation, me.workers);
            Error::new(Kind::Bug, what)
        })?;
        let members = formed.roster.iter().map(|entry| entry.node.clone()).collect();
        let store = SocketAddr::new(me.address.ip(), self.network.unwrap_or_default().store_port);
        let neighbours = self.neighbours(formed);
        Ok(Seating { ranks, members, others, store, neighbours })
    }

    /// The other nodes that have lived since the checkpoint which a generation loads was written: their memory may have
    /// files of it. Each node begins with the one behind it in the roster, so that not all ask the same one first.
    /// Those that have left may still be there for what they alone have.
    fn neighbours(&self, formed: &Formation) -> Option<Neighbours> {
        let (me, settings) = self.channel.clone()?;
        let since = formed.resume.as_ref()?.generation;
        let state = self.journal.state();
        let before = state.formations().iter().filter(|it| (since..formed.generation).contains(&it.generation));
        let lived: BTreeSet<&NodeId> = before.flat_map(|it| &it.roster).map(|entry| &entry.node).collect();
        let own = formed.roster.iter().position(|entry| entry.node == self.node)?;
        let (front, behind) = formed.roster.split_at(own);
        let has_left = |entry: &&RosterEntry| formed.roster.iter().all(|here| here.node != entry.node);
        let wants = formed.reason != FormedReason::NodeLost && !self.resolved.workload.is_replicated();
        let last = state.formations().iter().rev().find(|it| it.generation < formed.generation);
        let last = last.filter(|last| wants && last.member(&self.node).is_some());
        let left = last.iter().flat_map(|it| &it.roster).filter(has_left);
        let others = behind.iter().skip(1).chain(front).chain(left).filter(|entry| lived.contains(&entry.node));
        let nodes: Vec<_> = others
            .filter_map(|entry| {
                let address = entry.address.as_ref()?.parse().ok()?;
                Some((Peer { node: entry.node.clone(), key: entry.key.clone()? }, address))
            })
            .collect();
        (!nodes.is_empty()).then_some(Neighbours { me, settings, nodes })
    }

    /// The state that a generation starts from, as its record says.
    async fn load_of(&self, formed: &Formation) -> Result<Load> {
        let Some(ResumePoint { step, generation }) = formed.resume.clone() else { return self.beginning().await };
        let state = self.journal.state();
        let Some(checkpoint) = state.checkpoint(step, generation) else {
            return Err(Error::new(Kind::Bug, format!("the journal does not know the checkpoint of step {step}")));
        };
        let manifest = catalog::read_manifest(&self.run, &checkpoint.committed).await?;
        let (folder, files) = (layout::checkpoint(step, generation), restore::tensor_files(&manifest));
        Ok(Load::Checkpoint { step, generation, from: Source::Store { folder, files } })
    }

    /// The same state, read where it lies if a slot of this node still holds all of it.
    pub(super) async fn in_own_memory(&mut self, load: Load) -> Load {
        let Load::Checkpoint { step, generation, from: Source::Store { files, .. } } = &load else { return load };
        let (step, generation) = (*step, *generation);
        let Some((slot, files)) = self.slots.find_all(step, generation, files) else { return load };
        if !self.slots.verify(slot).await {
            tracing::info!(%step, slot, "not all of the snapshot in memory is that checkpoint any more");
            return load;
        }
        tracing::info!(%step, slot, "workers start again from the snapshot in memory");
        Load::Checkpoint { step, generation, from: Source::Slot { slot, files } }
    }

    /// The state that its record says to load. Waits while the store is away; `None`: a newer generation was formed
    /// meanwhile.
    pub(super) async fn load_patiently(&self, formed: &Formation) -> Result<Option<Load>> {
        loop {
            match self.load_of(formed).await {
                Err(error) if error.kind() == Kind::Unavailable => {
                    tracing::warn!(%error, "the checkpoint can't be read now");
                    tokio::time::sleep(STORE_AWAY).await;
                    if self.journal.state().generation() != formed.generation {
                        return Ok(None);
                    }
                }
                load => return load.map(Some),
            }
        }
    }
}

/// Whether a setting that this command changes is about this machine's network: it holds for no other node.
fn is_of_this_machine(key: &str) -> bool {
    key.starts_with("network.")
}
