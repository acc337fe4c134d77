//! Who belongs to a generation, and which generation goes on in which: rosters and successions, pure.
//!
//! A *member* of a generation is a node that its roster names. Its *leader* is the node that wrote its `formed` record,
//! the first of the roster. A generation *continues* the one before it if the same group of nodes goes on, with losses
//! and newcomers; one that a person started or resumed continues none. So a run is a row of *chains*: what was asked of
//! one generation of a chain holds for those that continue it.
//!
//! Invariants (each checked when a record is written and when it is read)
//! - A roster names a node once, and a key once; the workers of its nodes are those of the world.
//! - Ranks lie in the order of the roster, without a gap.
//! - A generation continues the newest one before it, and accounts for every node of that one: it is a member still, or
//!   `gone`, with a reason. Whoever is a member and was not is `joined`.
//! - All texts and lists are short.
//!
//! A record of one node without any of these words is what every version has written: it is not checked, and continues
//! the generation before it if the same node formed that, because a node id belongs to one process.

use std::collections::BTreeSet;

use super::{
    record::{FormedReason, Gone, Record, RosterEntry},
    state::{Formation, Inconsistent, RunState},
};
use crate::ids::{Generation, NodeId, Rank, WorldSize};

/// The most members of a generation, and the most that come or go at once.
const MAX_MEMBERS: usize = 4096;
/// The longest address, bytes: a DNS name has at most 253 (RFC 1035), a port 5 digits.
const MAX_ADDRESS: usize = 260;
/// The longest reason for which a node is gone, bytes.
const MAX_WHY: usize = 500;

/// Whether a roster or a reason has words that format 4 has added.
pub(super) fn has_new_words(roster: &[RosterEntry], reason: FormedReason) -> bool {
    let placed = |member: &RosterEntry| {
        let RosterEntry { node: _, workers: _, first_rank, address, key } = member;
        first_rank.is_some() || address.is_some() || key.is_some()
    };
    let new = matches!(reason, FormedReason::NodeLost | FormedReason::NodeLeft | FormedReason::NodeJoined);
    new || roster.len() > 1 || roster.iter().any(placed)
}

impl Formation {
    /// Whether its record has words of a run with several nodes, even if one node is all that is left of them.
    pub fn is_of_several(&self) -> bool {
        has_new_words(&self.roster, self.reason) || self.succession.is_of_several()
    }

    /// The node's entry in the roster, if it is a member.
    pub fn member(&self, node: &NodeId) -> Option<&RosterEntry> {
        self.roster.iter().find(|member| member.node == *node)
    }
}

impl RunState {
    /// The formation of a generation.
    pub fn formation(&self, generation: Generation) -> Option<&Formation> {
        let place = self.formations().binary_search_by_key(&generation, |formed| formed.generation).ok()?;
        self.formations().get(place)
    }

    /// Whether a generation's roster names this node. What a node remembers, or was told, is not in here: a node that
    /// is invited reads the record itself before it acts as a member.
    pub fn is_member(&self, node: &NodeId, generation: Generation) -> bool {
        self.formation(generation).is_some_and(|formed| formed.member(node).is_some())
    }

    /// The generations that `generation` continues, the newest first: the chain behind it.
    pub fn continued(&self, generation: Generation) -> Vec<Generation> {
        let before = |formed: &&Formation| self.before(formed);
        std::iter::successors(self.formation(generation), before).skip(1).map(|formed| formed.generation).collect()
    }

    /// The generation that a formation continues.
    fn before(&self, formed: &Formation) -> Option<&Formation> {
        let place = self.formations().binary_search_by_key(&formed.generation, |f| f.generation).ok()?;
        let before = self.formations().get(place.checked_sub(1)?)?;
        let continues = match formed.succession.continues {
            Some(named) => named == before.generation,
            // One process, so nobody has resumed the run in between.
            None => formed.node == before.node,
        };
        continues.then_some(before)
    }

    /// Whether what was asked of generation `asked` (to save and stop) holds for the newest one: it is that one, or one
    /// that the newest continues. What was asked of a generation does not hold for one that a person resumed.
    pub fn heeds(&self, asked: Generation) -> bool {
        let newest = self.generation();
        self.formed().is_some() && (asked == newest || self.continued(newest).contains(&asked))
    }

    /// Why a generation that continues `generation` goes on without `node`, which was a member; `None`: none does.
    pub(super) fn left_out(&self, node: &NodeId, generation: Generation) -> Option<&str> {
        let chain = self.continued(self.generation());
        if !chain.contains(&generation) {
            return None;
        }
        let later = self.formations().iter().filter(|formed| formed.generation > generation);
        later.flat_map(|formed| &formed.succession.gone).find(|gone| gone.node == *node).map(|gone| gone.why.as_str())
    }

    /// Whether a generation left this node out, or ended, and the newest does not name it: its id is used up.
    pub(super) fn is_used_up(&self, node: &NodeId) -> bool {
        let newest = self.generation();
        !self.is_member(node, newest) && self.formations().iter().any(|formed| formed.member(node).is_some())
    }

    /// The invariants of rosters; for records in a format that has the words.
    pub(super) fn has_a_sound_roster(&self, record: &Record) -> Result<(), Inconsistent> {
        let Record::Formed { roster, world_size, continues, gone, joined, why, .. } = record else { return Ok(()) };
        if why.as_ref().is_some_and(|why| !is_short(why, MAX_WHY)) {
            return Err(Inconsistent("does not say in a short line why it was formed".to_owned()));
        }
        if record.format() < 4 {
            return Ok(());
        }
        let checked = is_sound(roster, *world_size).and_then(|()| {
            let few = gone.len() <= MAX_MEMBERS && joined.len() <= MAX_MEMBERS;
            if !few {
                return Err(format!("lists more than {MAX_MEMBERS} nodes that come or go"));
            }
            self.accounts_for(roster, *continues, gone, joined)
        });
        checked.map_err(Inconsistent)
    }

    fn accounts_for(
        &self,
        roster: &[RosterEntry],
        continues: Option<Generation>,
        gone: &[Gone],
        joined: &[NodeId],
    ) -> Result<(), String> {
        let Some(continues) = continues else {
            let nobody = gone.is_empty() && joined.is_empty();
            return if nobody { Ok(()) } else { Err("says who came or went, and continues no generation".into()) };
        };
        let Some(before) = self.formed().filter(|formed| formed.generation == continues) else {
            return Err(format!("continues generation {continues} after generation {}", self.generation()));
        };
        if let Some(gone) = gone.iter().find(|gone| !is_short(&gone.why, MAX_WHY)) {
            return Err(format!("does not say in a short line why node {} is gone", gone.node));
        }
        let (old, new) = (names(&before.roster), names(roster));
        let told: BTreeSet<&NodeId> = gone.iter().map(|gone| &gone.node).collect();
        if told.len() != gone.len() || !told.iter().copied().eq(old.difference(&new).copied()) {
            return Err(format!("does not account for the nodes of generation {continues} that are gone"));
        }
        let told: BTreeSet<&NodeId> = joined.iter().collect();
        if told.len() != joined.len() || !told.iter().copied().eq(new.difference(&old).copied()) {
            return Err(format!("does not account for the nodes that generation {continues} did not have"));
        }
        Ok(())
    }
}

fn names(roster: &[RosterEntry]) -> BTreeSet<&NodeId> {
    roster.iter().map(|member| &member.node).collect()
}

/// Whether a text is a line of at most `most` bytes.
fn is_short(text: &str, most: usize) -> bool {
    !text.is_empty() && text.len() <= most && !text.chars().any(char::is_control)
}

/// Checks a roster by itself.
fn is_sound(roster: &[RosterEntry], world_size: WorldSize) -> Result<(), String> {
    if roster.len() > MAX_MEMBERS {
        return Err(format!("names {} nodes, more than {MAX_MEMBERS}", roster.len()));
    }
    if names(roster).len() < roster.len() {
        return Err("names a node twice".into());
    }
    let keys: Vec<_> = roster.iter().filter_map(|member| member.key.as_ref()).collect();
    if keys.iter().collect::<BTreeSet<_>>().len() < keys.len() {
        return Err("gives two nodes one key".into());
    }
    let is_address = |text: &String| text.len() <= MAX_ADDRESS && text.bytes().all(|byte| byte.is_ascii_graphic());
    let bad = |member: &&RosterEntry| member.address.as_ref().is_some_and(|text| text.is_empty() || !is_address(text));
    if let Some(member) = roster.iter().find(bad) {
        return Err(format!("gives node {} an address that is none", member.node));
    }
    let ranked = roster.iter().any(|member| member.first_rank.is_some());
    let mut next = 0_u64;
    for RosterEntry { node, workers, first_rank, .. } in roster {
        if ranked && first_rank.map(|Rank(rank)| u64::from(rank)) != Some(next) {
            return Err(format!("does not begin the ranks of node {node} at {next}"));
        }
        next += u64::from(*workers);
    }
    if next != u64::from(world_size.get()) {
        return Err(format!("has nodes of {next} workers in a world of {world_size}"));
    }
    Ok(())
}
