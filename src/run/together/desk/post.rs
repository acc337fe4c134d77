//! Messages of a generation, on their way to the agent.
//!
//! Those of a generation that this node has not taken up yet wait, since its leader and members may have read the
//! record sooner; those of an older one are dropped. What waits is bounded for each sender ([`EACH`]) and for all
//! ([`ALL`]): a sender with more is no member that waits for an answer, and none of its messages is kept. It can't be
//! told that one is missing, so its link has to end ([`Posted::TooMany`]).

use std::collections::VecDeque;

use tokio::sync::mpsc;

use super::Words;
use crate::{
    agent::{follow, group},
    ids::{Generation, NodeId},
};

/// Messages of one sender that wait. A member says a few words until it is answered, and a leader gives a few orders.
const EACH: usize = 64;
/// Messages that wait: those of the largest group. Most are short; the longest a link takes is 1 MiB.
const ALL: usize = 8192;

/// Where a generation's messages go on this node.
#[derive(Debug)]
pub enum Route {
    /// This node leads it.
    Lead(Generation, mpsc::UnboundedSender<group::Heard>),
    /// This node follows that leader.
    Follow(Generation, NodeId, mpsc::UnboundedSender<follow::LeaderHeard>),
}

impl Route {
    const fn generation(&self) -> Generation {
        match self {
            Self::Lead(generation, _) | Self::Follow(generation, ..) => *generation,
        }
    }
}

/// What has become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Posted {
    /// It was passed on, waits, or is nobody's any more.
    Done,
    /// Its sender has sent too many that wait; all of them are dropped.
    TooMany,
}

/// The route, and what waits for the next one.
#[derive(Debug, Default)]
pub(super) struct Post {
    route: Option<Route>,
    /// The newest generation that this node has taken part in.
    taken: Generation,
    early: VecDeque<(NodeId, Generation, Words)>,
}

impl Post {
    /// The route, while this node runs a generation.
    pub const fn route(&self) -> Option<&Route> {
        self.route.as_ref()
    }

    /// Whether this node leads the generation that it runs.
    pub const fn leads(&self) -> bool {
        matches!(self.route, Some(Route::Lead(..)))
    }

    /// A message of a generation goes to the agent.
    pub fn pass(&mut self, from: NodeId, generation: Generation, words: Words) -> Posted {
        match &self.route {
            Some(Route::Lead(current, to)) if *current == generation => {
                if let Words::ToLeader(said) = words {
                    let _ = to.send(group::Heard::Said(from, said));
                }
            }
            Some(Route::Follow(current, leader, to)) if *current == generation => {
                if let (Words::ToMember(said), true) = (words, from == *leader) {
                    let _ = to.send(follow::LeaderHeard::Said(said));
                }
            }
            route => {
                let current = route.as_ref().map_or(self.taken, Route::generation).max(self.taken);
                if generation > current {
                    return self.wait(from, generation, words);
                }
            }
        }
        Posted::Done
    }

    fn wait(&mut self, from: NodeId, generation: Generation, words: Words) -> Posted {
        let its = self.early.iter().filter(|(node, ..)| *node == from).count();
        if its >= EACH || self.early.len() >= ALL {
            self.early.retain(|(node, ..)| *node != from);
            return Posted::TooMany;
        }
        self.early.push_back((from, generation, words));
        Posted::Done
    }

    /// From now on messages of this generation go there, those that have come before as well.
    pub fn takes(&mut self, route: Route) -> Generation {
        let generation = route.generation();
        self.taken = generation;
        self.route = Some(route);
        generation
    }

    /// What has waited for the generation that was taken.
    pub fn catches_up(&mut self) {
        for (from, of, words) in std::mem::take(&mut self.early) {
            if of >= self.taken {
                let _ = self.pass(from, of, words);
            }
        }
    }

    /// The generation is over for this node.
    pub fn ends(&mut self) {
        self.route = None;
    }

    /// A generation that this node still runs is nobody's any more, if it is older than `newer`; whether it is.
    pub fn overtakes(&mut self, newer: Generation) -> bool {
        match self.route.take_if(|route| route.generation() < newer) {
            Some(Route::Lead(_, to)) => _ = to.send(group::Heard::Overtaken),
            Some(Route::Follow(_, _, to)) => _ = to.send(follow::LeaderHeard::Overtaken),
            None => return false,
        }
        true
    }

    /// A member of the generation that this node leads is lost; whether it leads one.
    pub fn parted(&self, node: NodeId, why: String) -> bool {
        let Some(Route::Lead(_, to)) = &self.route else { return false };
        let _ = to.send(group::Heard::Parted(node, why));
        true
    }

    /// The leader that this node follows is lost; whether it follows one.
    pub fn cut_off(&self, why: impl FnOnce(&NodeId) -> String) -> bool {
        let Some(Route::Follow(_, leader, to)) = &self.route else { return false };
        let _ = to.send(follow::LeaderHeard::Parted(why(leader)));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::group::ToLeader;

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn said(text: &str) -> Words {
        Words::ToLeader(ToLeader::Failed(text.to_owned()))
    }

    /// What the agent hears.
    fn heard(from: &mut mpsc::UnboundedReceiver<group::Heard>) -> Vec<String> {
        std::iter::from_fn(|| from.try_recv().ok()).map(|heard| format!("{heard:?}")).collect()
    }

    #[test]
    fn messages_of_the_next_generation_wait_in_order_and_those_of_an_older_one_are_dropped() {
        let mut post = Post::default();
        for (from, generation, text) in [("a", 2, "one"), ("b", 1, "old"), ("b", 2, "two"), ("a", 3, "later")] {
            assert_eq!(post.pass(id(from), Generation(generation), said(text)), Posted::Done);
        }
        let (to, mut from) = mpsc::unbounded_channel();
        assert_eq!(post.takes(Route::Lead(Generation(2), to)), Generation(2));
        post.catches_up();
        let all = heard(&mut from);
        assert!(all.len() == 2 && all[0].contains("one") && all[1].contains("two"), "{all:?}");
        assert!(post.overtakes(Generation(3)) && !post.overtakes(Generation(3)));
        let (to, mut from) = mpsc::unbounded_channel();
        let _ = post.takes(Route::Lead(Generation(3), to));
        post.catches_up();
        assert!(heard(&mut from)[0].contains("later"));
    }

    #[test]
    fn whoever_sends_too_much_too_early_loses_all_of_it_and_nobody_else_does() {
        let mut post = Post::default();
        let mut send = |from: &str| post.pass(id(from), Generation(2), said("x"));
        assert_eq!(send("a"), Posted::Done);
        assert!((0..EACH).all(|_| send("b") == Posted::Done));
        assert_eq!(send("b"), Posted::TooMany);
        let (to, mut from) = mpsc::unbounded_channel();
        let _ = post.takes(Route::Lead(Generation(2), to));
        post.catches_up();
        assert_eq!(heard(&mut from).len(), 1);
        // Many senders.
        let mut post = Post::default();
        let sent = (0..2 * ALL).filter(|at| post.pass(id(&format!("n{at}")), Generation(2), said("x")) == Posted::Done);
        assert_eq!(sent.count(), ALL);
    }
}
