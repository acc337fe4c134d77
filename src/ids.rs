//! Newtypes for every id and count that could be swapped for another.
//!
//! Ids that become part of an object key are checked here, once, when they are made: a [`RunId`] or [`NodeId`] can be
//! put into a key without another check.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The plain number.
            pub const fn get(self) -> $inner {
                self.0
            }
            /// The next number; the highest is its own next, so that a number from outside can't overflow.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

number! {
    /// A finished optimizer step, counted from 1; 0 is the state before the first.
    Step(u64)
}
number! {
    /// One formation of the group of nodes; it rises at every re-formation and fences older writers.
    Generation(u64)
}
number! {
    /// The place of one worker in the world, from 0.
    Rank(u32)
}
number! {
    /// The place of one worker on its node, from 0; picks its GPU.
    LocalRank(u32)
}
number! {
    /// The number of workers of a generation.
    WorldSize(u32)
}

/// The number of snapshot slots of a node: one or two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct SlotCount(u8);

impl SlotCount {
    /// A capture waits for the save before it.
    pub const ONE: Self = Self(1);
    /// One is captured into while the other is uploaded.
    pub const TWO: Self = Self(2);

    /// The plain number.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The slots' numbers.
    pub fn numbers(self) -> impl Iterator<Item = u8> {
        0..self.0
    }
}

impl Default for SlotCount {
    fn default() -> Self {
        Self::TWO
    }
}

impl TryFrom<u8> for SlotCount {
    type Error = &'static str;
    fn try_from(count: u8) -> Result<Self, Self::Error> {
        if (1..=2).contains(&count) { Ok(Self(count)) } else { Err("a node has 1 or 2 snapshot slots") }
    }
}

impl From<SlotCount> for u8 {
    fn from(count: SlotCount) -> Self {
        count.0
    }
}

/// The ranks of one node in a generation: neighbours, in the order of the roster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeRanks {
    /// The rank of its first worker.
    pub first: Rank,
    /// Its workers.
    pub workers: u32,
    /// Workers of all nodes.
    pub world: WorldSize,
}

impl NodeRanks {
    /// Of a node that is alone in its generation.
    pub const fn alone(workers: u32) -> Self {
        Self { first: Rank(0), workers, world: WorldSize(workers) }
    }

    /// The rank of one of its workers.
    pub const fn rank(self, local: LocalRank) -> Rank {
        Rank(self.first.0.saturating_add(local.0))
    }

    /// The place on this node of the worker with that rank; `None`: it is another node's.
    pub fn local(self, rank: Rank) -> Option<LocalRank> {
        rank.get().checked_sub(self.first.get()).filter(|index| *index < self.workers).map(LocalRank)
    }

    /// Its workers' places on it.
    pub fn locals(self) -> impl Iterator<Item = LocalRank> {
        (0..self.workers).map(LocalRank)
    }

    /// Whether they are all ranks of the world.
    pub const fn is_whole_world(self) -> bool {
        self.workers == self.world.get()
    }
}

/// A number that stands for the bits of a state: equal states have equal ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(pub u64);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The identity of a run's training data, by checksums (CRC64-NVME, 16 lower-case hex digits).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetId {
    /// Of the bytes of the dataset's index, which holds those of every shard and of the tokenizer.
    pub index: String,
    /// Of the tokenizer's vocabulary: the meaning of token ids. A dataset that is rebuilt with the same tokenizer keeps
    /// it.
    pub vocabulary: String,
}

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {text:?} {reason}")]
pub struct InvalidId {
    what: &'static str,
    text: String,
    reason: &'static str,
}

fn check(what: &'static str, text: &str) -> Result<(), InvalidId> {
    let fail = |reason| Err(InvalidId { what, text: text.chars().take(80).collect(), reason });
    if text.is_empty() {
        return fail("is empty");
    }
    if text.len() > 100 {
        return fail("is longer than 100 characters");
    }
    if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        return fail("has a character other than letters, digits, '-', '_' and '.'");
    }
    if !text.as_bytes()[0].is_ascii_alphanumeric() {
        return fail("does not start with a letter or a digit");
    }
    if text.contains("..") {
        return fail("contains '..'");
    }
    Ok(())
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `text`: letters, digits, `-`, `_`, `.`; starts with a letter or digit; no `..`; at most 100
            /// bytes.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidId> {
                let text = text.into();
                check($what, &text)?;
                Ok(Self(text))
            }
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::new(text)
            }
        }
        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                Self::new(text)
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

text_id! {
    /// The name of one training job; everything about it lives under `<store>/<run-id>/`.
    RunId, "run id"
}
text_id! {
    /// One boot of one agent; two agents on one machine are two nodes.
    NodeId, "node id"
}
text_id! {
    /// Created anew for every journal record and manifest, and written in its body: a writer whose answer was lost
    /// reads the object back and sees by this id whether it won.
    AttemptId, "attempt id"
}

/// A node's public key of its channel to other nodes: an Ed25519 key's 32 bytes (RFC 8032) as 64 lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeKey(String);

impl NodeKey {
    /// Checks `text`: 64 digits, `0` to `9` and `a` to `f`.
    pub fn new(text: impl Into<String>) -> Result<Self, InvalidId> {
        let text = text.into();
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == 64 && text.bytes().all(is_digit) {
            return Ok(Self(text));
        }
        let shown = text.chars().take(80).collect();
        Err(InvalidId { what: "node key", text: shown, reason: "is not 64 lower-case hex digits" })
    }
    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for NodeKey {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::new(text)
    }
}

impl From<NodeKey> for String {
    fn from(key: NodeKey) -> String {
        key.0
    }
}

impl NodeId {
    /// A new id for this boot of the agent.
    pub fn random() -> Self {
        Self(format!("n{}", random_hex(6)))
    }
}

impl AttemptId {
    /// A new id; 128 random bits.
    pub fn random() -> Self {
        Self(random_hex(16))
    }
}

/// `bytes` random bytes from the kernel, as lower-case hex.
pub fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0_u8; bytes];
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::rand::getrandom(&mut buffer[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            // Every kernel since 3.17 has the call; without it a clash must still be unlikely, so mix time and pid.
            Err(_) => {
                #[expect(clippy::disallowed_methods, reason = "a seed, not a time: any number that differs will do")]
                let nanos = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos());
                let seed = nanos ^ (u128::from(std::process::id()) << 64);
                for (i, byte) in buffer[filled..].iter_mut().enumerate() {
                    *byte = (seed >> ((i % 16) * 8)) as u8;
                }
                break;
            }
        }
    }
    buffer.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_ids_that_could_leave_their_folder_are_refused() {
        for bad in ["", "..", "../x", "a/b", "a..b", ".hidden", "-flag", "a b", "a\nb", "ü", &"x".repeat(101)] {
            assert!(RunId::new(bad).is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "reports-2026q4", "A_b.c-1"] {
            assert_eq!(RunId::new(good).unwrap().as_str(), good);
        }
        assert!(serde_json::from_str::<RunId>("\"../x\"").is_err());
    }

    #[test]
    fn a_nodes_ranks_are_neighbours() {
        let ranks = NodeRanks { first: Rank(2), workers: 3, world: WorldSize(8) };
        let of: Vec<Rank> = ranks.locals().map(|local| ranks.rank(local)).collect();
        assert_eq!(of, [2, 3, 4].map(Rank));
        let locals: Vec<_> = (0..8).map(|rank| ranks.local(Rank(rank)).map(LocalRank::get)).collect();
        assert_eq!(locals, [None, None, Some(0), Some(1), Some(2), None, None, None]);
        assert!(!ranks.is_whole_world() && NodeRanks::alone(3).is_whole_world());
        assert_eq!(NodeRanks::alone(3).local(Rank(2)), Some(LocalRank(2)));
    }

    #[test]
    fn a_node_key_is_64_hex_digits() {
        let good = "0123456789abcdef".repeat(4);
        assert_eq!(NodeKey::new(good.as_str()).unwrap().as_str(), good);
        for bad in ["", &good[1..], &format!("{good}0"), &good.to_uppercase(), &good.replace('f', "g")] {
            assert!(NodeKey::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn random_ids_differ_and_are_valid() {
        let (a, b) = (NodeId::random(), NodeId::random());
        assert_ne!(a, b);
        assert!(NodeId::new(a.as_str()).is_ok());
        assert_eq!(AttemptId::random().as_str().len(), 32);
    }
}
