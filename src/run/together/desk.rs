//! The desk of a node in a run of several: it drives the rendezvous's [`Seat`] beside whatever the node is doing.
//!
//! One task for as long as the agent lives. It owns the timers and hears the links, the store's answers and the runner;
//! the seat decides; the desk performs. Requests to the store run as tasks of their own, so that a store that does not
//! answer delays no message. The runner is told what the newest generation makes of this node ([`Call`]), and tells
//! what has become of its workers ([`Tell`]).
//!
//! | piece | what it does |
//! |---|---|
//! | [`work`] | the task: inputs to the seat, its outputs |
//! | [`post`] | messages of a generation, to and from the agent |
//! | [`known`] | what other nodes say of themselves |
//! | [`errands`] | requests to the store and to other nodes |
//!
//! What others can make a desk remember is bounded: [`known`] and [`post`] say by what.
//!
//! *Crash:* nothing here is stored. *Retry:* as the seat says. *Cancel:* dropping [`Desk`] ends the task and its links.

mod errands;
mod known;
mod post;
mod work;

use std::{collections::BTreeSet, net::SocketAddr};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::Instant,
};

pub use self::post::Route;
use crate::{
    agent::group::{ToLeader, ToMember},
    ids::{Generation, NodeId, NodeKey},
    journal::{FormedReason, JournalWriter, RosterEntry},
    rendezvous::{
        heartbeat::{Group, State, Voice},
        membership::{Role, beat_every},
        peers::{PeerEvent, Peers},
        policy::{Bounds, Roster, growth::Prospects},
        seat::Body,
    },
    storage::Store,
};

/// Everything that travels between two agents.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Words {
    /// About the group.
    Seat(Body),
    /// From a generation's leader to a member.
    ToMember(ToMember),
    /// From a member to its leader.
    ToLeader(ToLeader),
}

/// What the runner is to do.
#[derive(Debug)]
pub enum Call {
    /// Append `formed`, and answer with [`Tell::Appended`].
    Form(Box<Proposal>),
    /// Append `interrupted` for this generation, and answer with [`Tell::Appended`].
    StepDown(Generation),
    /// This node leads this generation.
    Lead(Roster),
    /// This node is a member of it.
    Follow(Roster),
    /// It is neither.
    Wait,
    /// A newer generation stands without this node.
    LeftOut,
    /// This node's saves fail: another one leads better.
    HandOver,
}

/// A generation to be formed.
#[derive(Debug)]
pub struct Proposal {
    /// Its number.
    pub generation: Generation,
    /// Its roster, as it is stored.
    pub roster: Vec<RosterEntry>,
    /// The nodes that are left out, and why.
    pub out: Vec<(NodeId, FormedReason, String)>,
    /// The generation before, if it has no recorded end.
    pub continues: Option<Roster>,
}

/// What the runner says.
#[derive(Debug)]
pub enum Tell {
    /// The generation that this node leads has ended here, and the group forms anew.
    Again,
    /// These members leave.
    Leaving(BTreeSet<NodeId>),
    /// The answer to [`Call::Form`] and [`Call::StepDown`]: whether the record stands, if that is known.
    Appended(Option<bool>),
    /// A save of the generation that this node leads is committed, and what is to be expected of the group.
    Saved(Prospects),
    /// How many saves in a row failed because of this node; 0: it is trusted again.
    Fails(u32),
    /// This node leads, and another one leads better; answered by [`Call::HandOver`] if it still leads.
    HandOver(String),
    /// From now on messages of this generation go there.
    Route(Route),
    /// The generation is over for this node, and its workers are gone.
    Off,
}

/// This node, as it says of itself.
#[derive(Clone, Debug)]
pub struct Myself {
    /// Its id.
    pub node: NodeId,
    /// Where its channel listens.
    pub address: SocketAddr,
    /// The key by which that is known.
    pub key: NodeKey,
    /// Its workers.
    pub workers: u32,
    /// What it computes with.
    pub kind: String,
    /// The version of its program.
    pub program: String,
}

impl Myself {
    /// Its heartbeat's content.
    pub fn group(&self, role: Role, local_store: bool, unreachable: Vec<NodeId>, left: bool) -> Group {
        Group {
            address: self.address.to_string(),
            key: self.key.clone(),
            every_s: u32::try_from(beat_every(role, local_store).as_secs()).unwrap_or(u32::MAX),
            state: match role {
                Role::Leader => State::Leader,
                Role::Follower => State::Member,
                Role::Waiting => State::Waiting,
            },
            kind: self.kind.clone(),
            workers: self.workers,
            program: self.program.clone(),
            unreachable,
            left,
            puts_off: None,
        }
    }
}

/// A handle to the desk. Dropping it ends the desk.
#[derive(Debug)]
pub struct Desk {
    tell: mpsc::UnboundedSender<Tell>,
    calls: mpsc::UnboundedReceiver<Call>,
    /// The links, for the messages of a generation.
    pub links: Peers<Words>,
    led: watch::Receiver<Instant>,
    task: AbortHandle,
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the desk works with.
pub struct Tools {
    /// The run's folder.
    pub run: Store,
    /// Its journal.
    pub journal: JournalWriter,
    /// This node.
    pub me: Myself,
    /// The operator's settings.
    pub bounds: Bounds,
    /// The links, and what they bring.
    pub links: (Peers<Words>, mpsc::UnboundedReceiver<PeerEvent<Words>>),
    /// This node's heartbeat.
    pub says: Voice,
}

impl Desk {
    /// Starts the task.
    pub fn open(tools: Tools) -> Self {
        let (tell, told) = mpsc::unbounded_channel();
        let (calls, called) = mpsc::unbounded_channel();
        let (led, is_led) = watch::channel(Instant::now());
        let links = tools.links.0.clone();
        let task = tokio::spawn(work::run(tools, calls, led, told)).abort_handle();
        Self { tell, calls: called, links, led: is_led, task }
    }

    /// Says something to the desk.
    pub fn tell(&self, words: Tell) {
        let _ = self.tell.send(words);
    }

    /// Its ear, for a task that tells it something.
    pub fn voice(&self) -> mpsc::UnboundedSender<Tell> {
        self.tell.clone()
    }

    /// When a leader was last known to be at work, or this node took its seat.
    pub fn led(&self) -> Instant {
        *self.led.borrow()
    }

    /// The next call. May be dropped at any moment: nothing is lost.
    pub async fn call(&mut self) -> Call {
        match self.calls.recv().await {
            Some(call) => call,
            // The task ends with this handle, or by a panic, which the runner's journal outlives.
            None => std::future::pending().await,
        }
    }
}
