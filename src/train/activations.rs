//! What passes keep for their backward passes (`train.activations`).
//!
//! `keep`: one graph. `block`: the input of each block. `auto` on a GPU: as `block` in the first step, and one more of
//! the last blocks keeps its graph in each step that follows, as long as memory allows. Nothing but memory and time
//! depends on it: the bits are the same ([`stages`](super::strategy::stages)), so ranks may differ in it, and a resume
//! begins anew. On a CPU `auto` is `keep`: its memory is not ours alone, and what is free of it is not known.

use super::strategy::Graph;
use crate::{config::Activations, torch::DeviceMemory};

/// The part of a GPU's memory that `auto` fills, in percent. The rest is for fragments, and for batches that need more.
const FILLED: u64 = 90;

/// What passes keep, step by step.
#[derive(Debug)]
pub struct Keeper {
    graph: Graph,
    /// `Some`: more may be kept in the next step.
    search: Option<Search>,
}

/// What has been seen of a model with this many blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Search {
    /// Blocks of the model.
    pub blocks: usize,
    /// Bytes: the most that was needed at a time.
    pub peak: u64,
    /// Bytes: the most by which one more block has raised the peak.
    pub growth: u64,
}

/// The reason for the number of blocks that keep their graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There is room: one more.
    Room,
    /// All of them do.
    All,
    /// One more might not fit.
    Full,
}

impl Keeper {
    /// For a model with `blocks` blocks, on a GPU or not. A strategy that `is_staged` has a block's weights while the
    /// block is computed, and keeps no graph of it.
    pub fn new(setting: Activations, is_staged: bool, on_gpu: bool, blocks: usize) -> Self {
        let none = Graph::Blocks { keep: 0 };
        let (graph, search) = match setting {
            _ if is_staged => (none, None),
            Activations::Block => (none, None),
            Activations::Auto if on_gpu && blocks > 0 => (none, Some(Search { blocks, ..Search::default() })),
            Activations::Auto | Activations::Keep => (Graph::Whole, None),
        };
        Self { graph, search }
    }

    /// What the next passes keep.
    pub const fn graph(&self) -> Graph {
        self.graph
    }

    /// Whether [`Keeper::learn`] may change it.
    pub const fn is_searching(&self) -> bool {
        self.search.is_some()
    }

    /// After a step: what it needed.
    pub fn learn(&mut self, memory: DeviceMemory) {
        let (Some(before), Graph::Blocks { keep }) = (self.search, self.graph) else { return };
        let seen = before.with(keep, memory.allocated);
        let (keep, reason) = next(seen, keep, memory.total);
        self.graph = Graph::Blocks { keep };
        self.search = (reason == Reason::Room).then_some(seen);
        if reason != Reason::Room {
            let Search { blocks, peak, growth } = seen;
            let total = memory.total;
            tracing::info!(peak, growth, total, "{keep} of {blocks} blocks keep their activations ({reason:?})");
        }
    }
}

impl Search {
    /// After a step in which `keep` blocks kept their graphs and the peak so far was `peak`.
    const fn with(self, keep: usize, peak: u64) -> Self {
        let grown = peak.saturating_sub(self.peak);
        let growth = if keep > 0 && grown > self.growth { grown } else { self.growth };
        Self { peak, growth, ..self }
    }
}

/// How many of the last blocks keep their graph in the next step if `keep` do in this one, on a GPU of `total` bytes.
fn next(seen: Search, keep: usize, total: u64) -> (usize, Reason) {
    if keep >= seen.blocks {
        return (keep, Reason::All);
    }
    // The next one may need twice what any before it did, since what else is there at the peak may hide some of it.
    let wanted = seen.peak.saturating_add(seen.growth.saturating_mul(2));
    let filled = u128::from(total) * u128::from(FILLED) / 100;
    if u128::from(wanted) <= filled { (keep + 1, Reason::Room) } else { (keep, Reason::Full) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GPU on which each block's graph needs `block` bytes beside `rest`.
    fn settle(blocks: usize, block: u64, rest: u64, total: u64) -> (usize, Vec<usize>) {
        let mut keeper = Keeper::new(Activations::Auto, false, true, blocks);
        let (mut seen, mut peak) = (Vec::new(), 0);
        for _ in 0..100 {
            let Graph::Blocks { keep } = keeper.graph() else { panic!("one graph") };
            seen.push(keep);
            // One block's graph is there at any rate.
            peak = peak.max(rest + block * u64::max(1, keep as u64));
            assert!(peak <= total, "{keep} blocks of {block} beside {rest} do not fit {total}");
            keeper.learn(DeviceMemory { allocated: peak, reserved: peak, total });
        }
        let Graph::Blocks { keep } = keeper.graph() else { panic!("one graph") };
        assert!(!keeper.is_searching());
        (keep, seen)
    }

    #[test]
    fn blocks_are_kept_one_by_one_while_there_is_room() {
        let (keep, seen) = settle(4, 10, 100, 1000);
        assert_eq!((keep, &seen[..6]), (4, &[0, 1, 2, 3, 4, 4][..]), "all fit");
        // 900 are filled at most: 100 + 79 · 10 and two more.
        assert_eq!(settle(96, 10, 100, 1000).0, 79);
        assert_eq!(settle(96, 10, 880, 1000).0, 2);
        assert_eq!(settle(96, 10, 930, 1000).0, 0, "one block needs all there is");
        assert_eq!(settle(96, u64::MAX / 200, 0, u64::MAX).0, 96);
    }

    #[test]
    fn each_setting_has_its_graph() {
        let graph = |setting, is_staged, on_gpu| Keeper::new(setting, is_staged, on_gpu, 3).graph();
        let none = Graph::Blocks { keep: 0 };
        for setting in [Activations::Keep, Activations::Block, Activations::Auto] {
            assert_eq!(graph(setting, true, true), none);
            assert!(!Keeper::new(setting, true, true, 3).is_searching());
        }
        assert_eq!(graph(Activations::Block, false, false), none);
        assert_eq!(graph(Activations::Keep, false, true), Graph::Whole);
        assert_eq!(graph(Activations::Auto, false, false), Graph::Whole, "a CPU");
        assert_eq!(Keeper::new(Activations::Auto, false, true, 0).graph(), Graph::Whole, "no blocks");
    }
}
