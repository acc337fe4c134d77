//! What a seat and its owner tell each other, and what the nodes do.

use std::{collections::BTreeSet, time::Duration};

use serde::{Deserialize, Serialize};

use super::looks::When;
use crate::{
    ids::{Generation, NodeId},
    rendezvous::{
        heartbeat::Group,
        membership::{Listed, Role},
        policy::{
            Member, Roster,
            roster::{Candidate, Formation},
        },
    },
};

/// Messages between the agents about the group. They travel on links of [`channel`](crate::rendezvous::channel).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// Is the receiver ready to be a member of `generation`, which the sender would lead?
    Invite {
        /// The sender's number for this proposal.
        round: u64,
        /// What it would form.
        generation: Generation,
        /// All that it asks, itself included.
        asked: Vec<NodeId>,
        /// Its version of program and protocol.
        program: String,
    },
    /// Yes.
    Ready {
        /// Of the invitation.
        round: u64,
        /// The sender.
        candidate: Candidate,
    },
    /// No.
    No {
        /// Of the invitation.
        round: u64,
        /// Because the sender is in touch with the leader of the newest generation.
        leader_lives: bool,
        /// The reason in words.
        why: String,
    },
    /// The sender forms nothing: the receiver may say "ready" to another one.
    Release,
    /// The sender has read its own `formed`: read the journal.
    Formed {
        /// Of that record.
        generation: Generation,
    },
    /// A member has read the record, and comes.
    Hello {
        /// Of that record.
        generation: Generation,
    },
    /// The leader has seen the member come.
    Welcome {
        /// The same.
        generation: Generation,
    },
    /// The sender does not lead that generation (any more): read the journal.
    Over {
        /// The generation.
        generation: Generation,
    },
    /// The sender is not that generation's member any more.
    Bye {
        /// The generation.
        generation: Generation,
    },
    /// A follower asks its leader whether it is there.
    Ask {
        /// The follower's number for this question.
        ticket: u64,
    },
    /// It is.
    Here {
        /// Of the question.
        ticket: u64,
    },
}

/// A record of the journal, as far as it matters to the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A generation was formed.
    Formed(Roster),
    /// It committed a checkpoint.
    Committed(Generation),
    /// It was interrupted, failed or completed.
    Ended(Generation),
}

/// A heartbeat, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Its counter.
    pub counter: u64,
    /// What the node says of itself.
    pub group: Group,
}

/// What this node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Me {
    /// The node.
    pub member: Member,
    /// Its version of program and protocol.
    pub program: String,
}

/// A moment that the machine waits for; only the machine knows for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timer(pub(super) When);

/// What the owner found.
#[derive(Clone, Debug)]
pub enum Input {
    /// The time of an [`Output::After`] has come.
    Timer(Timer),
    /// The journal was read to its newest record just now; the records since the last such input, maybe none.
    Journal(Vec<Line>),
    /// The heartbeats were listed.
    Listed(Vec<Listed>),
    /// Heartbeats were read.
    Beats {
        /// When the reads began, of this node's own time.
        began: Duration,
        /// A heartbeat each, or `None` where there is none.
        beats: Vec<(NodeId, Option<Beat>)>,
    },
    /// A message came.
    Message {
        /// The sender, as its key says.
        from: NodeId,
        /// The message.
        body: Body,
    },
    /// The last link to a node ended, or it could not be dialled.
    Lost {
        /// The node.
        peer: NodeId,
        /// Its process is gone: its port refuses, or another key answers there.
        refused: bool,
    },
    /// The answer to [`Output::Probe`].
    Probed {
        /// Of the question.
        round: u64,
        /// Of the question.
        by: NodeId,
        /// The nodes that this node can't reach.
        unreachable: BTreeSet<NodeId>,
    },
    /// The answer to [`Output::Form`] or [`Output::StepDown`].
    Appended {
        /// Whether the record stands, or another one has its number; `None`: nobody knows.
        stands: Option<bool>,
    },
    /// A request to the store failed.
    Failed,
    /// Whether this node's workers of the last generation are still being ended.
    Busy(bool),
    /// The generation that this node leads has ended here (a worker died, a member was given notice): form anew.
    Again {
        /// How often in a row the group has died at this step because of this node.
        kills: u32,
    },
    /// All nodes that have notice and will go; each such input replaces the one before.
    Leaving(BTreeSet<NodeId>),
    /// A save of the generation that this node leads is committed: nodes that wait may join.
    Saved,
    /// How many saves in a row have failed because of this node, as others are to know when they form a generation.
    Fails {
        /// Saves; 0: it is trusted again.
        saves: u32,
    },
    /// This node leads, its saves fail, and others' do not: another one leads better.
    HandOver {
        /// What was found.
        why: String,
    },
}

/// What the owner does, in the order in which it comes.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Say this in the heartbeat from now on, and beat at once.
    Say {
        /// This node's part.
        role: Role,
        /// It leaves, and this is its last beat.
        left: bool,
    },
    /// List the heartbeats: [`Input::Listed`].
    List,
    /// Read these heartbeats: [`Input::Beats`].
    ReadBeats(Vec<NodeId>),
    /// Read the journal: [`Input::Journal`].
    ReadJournal,
    /// Append `formed`: [`Input::Appended`].
    Form {
        /// Its generation.
        generation: Generation,
        /// Its nodes.
        formation: Formation,
        /// The generation before.
        previous: Option<Roster>,
        /// Whether that one's end is recorded.
        ended: bool,
        /// Why it is formed.
        ground: String,
    },
    /// Append `interrupted`: [`Input::Appended`].
    StepDown {
        /// Of this generation.
        generation: Generation,
    },
    /// Delete these heartbeats.
    Bury(Vec<NodeId>),
    /// Send a message, over a new link if there is none.
    Send {
        /// The receiver.
        to: NodeId,
        /// The message.
        body: Body,
    },
    /// Find out which of these nodes this node can't reach, within two seconds: [`Input::Probed`].
    Probe {
        /// Comes back in the answer.
        round: u64,
        /// Comes back in the answer.
        by: NodeId,
        /// The nodes.
        nodes: Vec<NodeId>,
    },
    /// Give this timer back after so long.
    After(Duration, Timer),
    /// This node leads the newest generation.
    Lead(Roster),
    /// This node is a member of the newest generation.
    Follow(Roster),
    /// The newest generation has ended, or this node is no member of it and was none before.
    Wait,
    /// To a leader: this member is lost, and so its generation can't go on.
    Parted {
        /// The member.
        node: NodeId,
        /// What happened.
        why: String,
    },
    /// To a follower: its leader is lost. End the workers, keep the slots.
    CutOff {
        /// What happened.
        why: String,
    },
    /// A newer generation stands without this node, which was a member. The end of this machine.
    LeftOut,
    /// This node led, and another one leads better. The end of this machine.
    HandOver,
    /// A line for the log.
    Log(String),
}
