//! How this node takes a place among the others: its port, its heartbeat, its desk; and another one under a new id.
//!
//! *Crash:* the heartbeat stops, and its node is not asked. *Retry:* a new id waits until the store is there. *Cancel:*
//! the port closes and the heartbeat ends with what was opened.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::{
    STORE_AWAY,
    desk::{Desk, Myself, Tools, Words},
    kind,
};
use crate::{
    agent::shelf,
    error::{Context, Error, Kind, Result},
    faults::{self, At},
    ids::NodeId,
    journal::{Journal, JournalError, JournalWriter},
    rendezvous::{
        channel::{LinkSettings, LocalNode, address},
        heartbeat::Pulse,
        membership::Role,
        peers::Peers,
    },
    run::Runner,
};

/// The silence that the crash point `node.patient` allows.
const PATIENT: Duration = Duration::from_secs(120);

impl Runner {
    /// Opens this node's port, starts its heartbeat and takes a seat.
    pub(super) async fn take_a_seat(&mut self) -> Result<(Desk, Myself)> {
        if self.held.is_none() {
            self.held = Some(self.run.hold().await.context("hold the run's folder")?);
        }
        let network = *self.network.get_or_insert(self.resolved.config.network);
        let me = LocalNode::new(self.run_id.clone(), self.node.clone());
        let mut me = me.map_err(|error| Error::from_source(Kind::Bug, error))?;
        // A test has no other binary to start.
        if faults::check("node.version", At::default()).is_err() {
            me.version.push_str("-other");
        }
        let me = Arc::new(me);
        let ip = match network.address {
            Some(address) => address,
            None => {
                let found = address::automatic(self.run.endpoint().as_ref()).await;
                let found = found.map_err(|error| Error::from_source(Kind::Config, error))?;
                tracing::info!(address = %found.address, "other nodes reach this one here: {}", found.reason);
                found.address
            }
        };
        let mut settings = LinkSettings::default();
        // A test stops nodes for longer than others would wait for a word.
        if faults::check("node.patient", At::default()).is_err() {
            settings.silence = PATIENT;
        }
        let at = SocketAddr::new(ip, network.port);
        let (callers, called) = mpsc::channel(shelf::WAITING);
        // It ends when the port closes.
        tokio::spawn(shelf::serve(Arc::clone(self.slots.shelf()), called));
        self.channel = Some((Arc::clone(&me), settings));
        let (links, heard) =
            Peers::<Words>::start_for(Arc::clone(&me), at, settings, Some(callers)).await.map_err(|error| {
                Error::from_source(Kind::Config, error)
                    .context(format!("listen at {at} for other nodes"))
                    .with_hint("set network.address to an address of this machine, or network.port to a free port")
            })?;
        let address = links.address();
        address::answers(address, &me, settings).await.map_err(|end| {
            Error::new(Kind::Unavailable, format!("this node does not reach its own port at {address}: {end}"))
                .with_hint("allow TCP between the run's machines, or set network.address to an address that they share")
        })?;
        let workers = self.resolved.workload.workers();
        let mut kind = kind::of_this_machine(self.resolved.config.workload.parallel.device);
        // Nor another machine.
        if faults::check("node.kind", At::default()).is_err() {
            kind.push_str(", another one");
        }
        let key = me.identity.key().clone();
        let program = me.version.clone();
        let myself = Myself { node: self.node.clone(), address, key, workers, kind, program };
        let group = myself.group(Role::Waiting, self.run.is_local(), Vec::new(), false);
        faults::check("seat.before-beat", At::default())
            .map_err(|fault| Error::from_source(Kind::Unavailable, fault))?;
        let pulse = Pulse::start_in_group(self.run.clone(), self.node.clone(), self.turning.clone(), group).await?;
        let says = pulse.voice();
        self.pulse = Some(pulse);
        let desk = Desk::open(Tools {
            run: self.run.clone(),
            journal: self.journal.clone(),
            me: myself.clone(),
            bounds: self.options.bounds(&self.resolved.config),
            links: (links, heard),
            says,
        });
        Ok((desk, myself))
    }

    /// Takes a seat after another one. Waits while the store is away: that may be why the other one was lost.
    pub(super) async fn takes_another_seat(&mut self) -> Result<(Desk, Myself)> {
        loop {
            match self.take_a_seat().await {
                Err(error) if error.kind() == Kind::Unavailable => {
                    tracing::warn!(%error, "this node can't come back now");
                    tokio::time::sleep(STORE_AWAY).await;
                }
                seated => return seated,
            }
        }
    }

    /// A newer generation stands without this node: its id is used up.
    pub(super) async fn comes_back(&mut self) -> Result<()> {
        if let Some(pulse) = self.pulse.take() {
            pulse.stop().await;
        }
        let state = self.journal.state();
        self.node = NodeId::random();
        tracing::info!(node = %self.node, "this node was left out, and comes back under a new id");
        self.from = None;
        let journal = loop {
            match Journal::follow(self.run.clone(), self.node.clone(), state.clone()).await {
                Ok(journal) => break journal,
                Err(JournalError::Storage(error)) => {
                    tracing::warn!(%error, "the journal can't be read now");
                    tokio::time::sleep(STORE_AWAY).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
        self.journal = JournalWriter::start(journal);
        Ok(())
    }
}
