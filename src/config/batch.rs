//! How a global batch is spread over the ranks of a world, and over the passes of each rank: pure functions of a few
//! numbers.
//!
//! # The formula
//! A step is to follow the mean gradient of its N targets, (1/N) Σ ∇lᵢ: of all tokens whose prediction counts, in the
//! whole global batch. Each of W ranks adds up the gradients of its passes, and the reduction adds up the ranks' sums
//! and divides by W, whatever the ranks' shares are. So a pass with n targets, whose mean loss is L, backpropagates
//! L·n·W/N ([`divisor`]):
//!
//! ```text
//! (1/W) Σ ∇(L·n·W/N)  =  (1/N) Σ n·∇L  =  (1/N) Σ ∇lᵢ        (the first two sums: over all passes of all ranks)
//! ```
//!
//! N is a pure function of the step and the data, so every rank works it out by itself. A rank's loss is the sum over
//! its passes of the same L·n·W/N, so the plain mean over the ranks is the mean over the targets. Clipping and the norm
//! come after the average: they need no weights.
//!
//! # Invariants
//! - No rank is without a sequence: it would never enter the reduction, and all others would wait for it.
//! - Where every token is a target and W divides the number of sequences, all passes have the same size, and what
//!   divides their loss is the number of a rank's passes, exactly: such a world computes the bits that it computed
//!   before other worlds, and other targets, were possible.
//! - Everything here is part of the mathematics of a run: after a change, a resumed run has other bits. Tests pin it.

use std::ops::Range;

use serde::Serialize;

use super::ConfigError;
use crate::ids::{Rank, WorldSize};

/// The part of `0..count` that falls to `rank`: contiguous, in rank order, sizes differing by one at most.
///
/// The parts of all ranks together are `0..count`, whatever the world size. Contiguous rather than strided, because
/// then a micro-batch of m consecutive samples is the same m samples on any world size whose share is a multiple of m:
/// its loss and gradient agree to the last bit, and only the order of the sum over micro-batches differs. A mean over
/// ranks weights ranks equally: if `count` is not a multiple of the world size, sum and divide by `count`, or weight
/// each part by its size.
pub const fn share(count: u64, rank: Rank, world: WorldSize) -> Range<u64> {
    const fn edge(count: u64, rank: u64, world: u64) -> u64 {
        ((count as u128 * rank as u128) / world as u128) as u64
    }
    let (rank, world) = (rank.get() as u64, world.get() as u64);
    if rank >= world {
        return 0..0;
    }
    edge(count, rank, world)..edge(count, rank + 1, world)
}

/// How the sequences of one optimizer step are spread over a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    global_batch: u32,
    world: WorldSize,
    max_micro_batch: u32,
}

/// One rank's passes in one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passes {
    sequences: u32,
    count: u32,
}

/// One forward and backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Its sequences: those that follow the pass before.
    pub sequences: u32,
    /// Whether it is the rank's last one in this step, behind which gradients are reduced.
    pub last: bool,
}

/// What divides the mean loss of a pass with `pass_targets` targets, in a step that has `step_targets` on all ranks of
/// `world`: N/(n·W). The loss of a pass without a target is 0, whatever divides it.
pub fn divisor(step_targets: u64, pass_targets: u64, world: WorldSize) -> f64 {
    // Exact up to the division, as long as the counts are below 2^53. Common factors of the two change no bit of it:
    // a quotient is rounded once.
    step_targets as f64 / (pass_targets.max(1) as f64 * f64::from(world.get()))
}

/// The shares of a world whose ranks don't all have the same number of sequences.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shares {
    /// Sequences of one optimizer step.
    pub sequences: u32,
    /// Those of each rank, in the order of ranks.
    pub ranks: Vec<u32>,
    /// The part of a step's time in which ranks compute, if each sequence takes the same time: G/(W·largest share).
    pub efficiency: f64,
}

impl Spread {
    /// `global_batch` sequences over `world` workers, at most `max_micro_batch` of them in one pass.
    ///
    /// # Errors
    /// [`ConfigError::TooManyWorkers`] if a worker would have no sequence.
    pub fn new(global_batch: u32, world: WorldSize, max_micro_batch: u32) -> Result<Self, ConfigError> {
        if world.get() == 0 || world.get() > global_batch {
            return Err(ConfigError::TooManyWorkers { global_batch, world: world.get() });
        }
        Ok(Self { global_batch, world, max_micro_batch })
    }

    /// Whether all ranks have the same number of sequences.
    const fn is_even(self) -> bool {
        self.global_batch.is_multiple_of(self.world.get())
    }

    /// Sequences of one rank.
    fn sequences(self, rank: Rank) -> u32 {
        let share = share(self.global_batch.into(), rank, self.world);
        // A share is not larger than the batch.
        u32::try_from(share.end - share.start).unwrap_or(self.global_batch)
    }

    /// The passes of one rank in one step; a rank beyond the world has none.
    ///
    /// In an even world every pass has the size of the largest divisor of the share that is not over the limit. In an
    /// uneven one there are as few passes as the limit allows, and their sizes differ by one at most, the larger ones
    /// first: ranks may have different numbers of passes.
    pub fn passes(self, rank: Rank) -> Passes {
        let sequences = self.sequences(rank);
        let limit = self.max_micro_batch.clamp(1, sequences.max(1));
        let count = if self.is_even() {
            sequences / (1..=limit).rev().find(|size| sequences.is_multiple_of(*size)).unwrap_or(1)
        } else {
            sequences.div_ceil(limit)
        };
        Passes { sequences, count }
    }

    /// The passes of the rank that has the most.
    pub fn most_passes(self) -> usize {
        // The last rank has the larger share.
        self.passes(Rank(self.world.get() - 1)).iter().count()
    }

    /// Sequences in the largest pass of any rank.
    pub fn largest_pass(self) -> u32 {
        // There are two sizes of shares, and the last rank has the larger one, the first the smaller.
        let first = |rank| self.passes(rank).iter().next().map_or(0, |pass| pass.sequences);
        first(Rank(0)).max(first(Rank(self.world.get() - 1)))
    }

    /// The shares, if they differ.
    pub fn uneven(self) -> Option<Shares> {
        if self.is_even() {
            return None;
        }
        let world = self.world.get();
        let largest = self.global_batch.div_ceil(world);
        Some(Shares {
            sequences: self.global_batch,
            ranks: (0..world).map(|rank| self.sequences(Rank(rank))).collect(),
            efficiency: f64::from(self.global_batch) / (f64::from(world) * f64::from(largest)),
        })
    }
}

impl Passes {
    /// One after the other.
    pub fn iter(self) -> impl Iterator<Item = Pass> {
        let Self { sequences, count } = self;
        (0..count).map(move |number| {
            let sequences = sequences / count + u32::from(number < sequences % count);
            Pass { sequences, last: number + 1 == count }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Explain;

    fn spread(global_batch: u32, world: u32, limit: u32) -> Spread {
        Spread::new(global_batch, WorldSize(world), limit).unwrap()
    }

    fn sizes(spread: Spread, rank: u32) -> Vec<u32> {
        spread.passes(Rank(rank)).iter().map(|pass| pass.sequences).collect()
    }

    /// (sequences of a pass, passes), as it was when the world had to divide the batch.
    fn equal_passes(global_batch: u32, world: u32, limit: u32) -> (u32, u32) {
        let per_rank = global_batch / world;
        let limit = limit.clamp(1, per_rank);
        let size = (1..=limit).rev().find(|size| per_rank.is_multiple_of(*size)).unwrap_or(1);
        (size, per_rank / size)
    }

    #[test]
    fn a_world_that_divides_the_batch_has_the_passes_and_the_divisor_that_it_always_had() {
        for (global, world, limit, size, count) in [
            (32, 1, 8, 8, 4),
            (32, 2, 8, 8, 2),
            (32, 4, 8, 8, 1),
            (32, 32, 8, 1, 1),
            (24, 2, 5, 4, 3),
            (14, 2, 4, 1, 7),
            (16, 2, 100, 8, 1),
            (16, 1, 0, 1, 16),
        ] {
            assert_eq!(equal_passes(global, world, limit), (size, count), "{global}/{world}/{limit}");
        }
        for global in 1..=96 {
            for world in (1..=global).filter(|world| global % world == 0) {
                for limit in [0, 1, 2, 3, 4, 5, 7, 8, 16, 100] {
                    let (size, count) = equal_passes(global, world, limit);
                    for rank in [0, world / 2, world - 1] {
                        let passes: Vec<Pass> = spread(global, world, limit).passes(Rank(rank)).iter().collect();
                        assert_eq!(passes.len() as u32, count, "{global}/{world}/{limit}");
                        for (number, pass) in (1..).zip(passes) {
                            let expected = Pass { sequences: size, last: number == count };
                            assert_eq!(pass, expected, "{global}/{world}/{limit}");
                            // Sequences of whatever length, in which every token is a target.
                            for length in [1, 3, 128, 1_000_003] {
                                let [all, some] = [global, size].map(|count| u64::from(count) * length);
                                let divisor = divisor(all, some, WorldSize(world));
                                assert_eq!(divisor.to_bits(), f64::from(count).to_bits(), "{global}/{world}/{limit}");
                            }
                        }
                    }
                    assert_eq!(spread(global, world, limit).largest_pass(), size);
                }
            }
        }
        let huge = spread(u32::MAX, 1, 2).passes(Rank(0));
        assert_eq!(huge.iter().next(), Some(Pass { sequences: 1, last: false }));
    }

    #[test]
    fn on_every_world_each_sequence_counts_once_and_none_more_than_another() {
        for (global, limit) in (1..=16).map(|limit| (16, limit)).chain([(32, 4), (31, 7), (13, 1)]) {
            for world in 1..=global {
                let spread = spread(global, world, limit);
                let case = format!("{global} on {world}, at most {limit}");
                let mut sum = 0;
                for rank in 0..world {
                    let share = share(global.into(), Rank(rank), WorldSize(world));
                    assert_eq!(share.start, sum, "{case}");
                    let passes: Vec<Pass> = spread.passes(Rank(rank)).iter().collect();
                    let sequences: u32 = passes.iter().map(|pass| pass.sequences).sum();
                    assert_eq!(share.start + u64::from(sequences), share.end, "{case}: rank {rank}");
                    assert!(passes.iter().all(|pass| (1..=limit).contains(&pass.sequences)), "{case}: {passes:?}");
                    let lasts: Vec<bool> = passes.iter().rev().map(|pass| pass.last).collect();
                    assert!(lasts[0] && !lasts[1..].contains(&true), "{case}: {passes:?}");
                    if global % world != 0 {
                        assert_eq!(passes.len() as u32, sequences.div_ceil(limit), "{case}");
                        assert!(passes[0].sequences - passes.last().unwrap().sequences <= 1, "{case}");
                    }
                    for Pass { sequences, .. } in passes {
                        // Its part in the mean over ranks, 1/W · n·W/N, is n/N: these add up to 1.
                        let exact = f64::from(global) / f64::from(sequences * world);
                        let [all, some] = [global, sequences].map(|count| u64::from(count) * 96);
                        let divisor = divisor(all, some, WorldSize(world));
                        assert_eq!(divisor.to_bits(), exact.to_bits(), "{case}");
                        let part = 1.0 / divisor / f64::from(world);
                        assert!((part * f64::from(global) / f64::from(sequences) - 1.0).abs() < 1e-15, "{case}");
                    }
                    sum = share.end;
                }
                assert_eq!(sum, u64::from(global), "{case}");
                let largest = (0..world).flat_map(|rank| sizes(spread, rank)).max();
                assert_eq!(Some(spread.largest_pass()), largest, "{case}");
            }
        }
    }

    #[test]
    fn a_pass_counts_by_its_targets_and_one_without_any_by_nothing() {
        // Two ranks; the passes have 3 and 0, and 9 targets.
        let world = WorldSize(2);
        assert_eq!(divisor(12, 3, world), 2.0);
        assert_eq!(divisor(12, 9, world), 12.0 / 18.0);
        assert!(divisor(12, 0, world).is_finite());
    }

    #[test]
    fn ranks_of_an_uneven_world_may_have_different_numbers_of_passes() {
        let of = |limit| [0, 2].map(|rank| sizes(spread(32, 5, limit), rank));
        assert_eq!(of(8), [vec![6], vec![7]]);
        assert_eq!(of(6), [vec![6], vec![4, 3]]);
        assert_eq!(of(4), [vec![3, 3], vec![4, 3]]);
        assert_eq!(of(3), [vec![3, 3], vec![3, 2, 2]]);
        assert_eq!(of(0), [vec![1; 6], vec![1; 7]]);
        assert_eq!(sizes(spread(32, 5, 8), 5), [0; 0], "no such rank");
    }

    #[test]
    fn shares_are_told_only_if_they_differ() {
        let Shares { sequences, ranks, efficiency } = spread(32, 5, 8).uneven().unwrap();
        assert_eq!((sequences, ranks), (32, vec![6, 6, 7, 6, 7]));
        assert!((efficiency - 32.0 / 35.0).abs() < 1e-15, "{efficiency}");
        for world in 1..=32_u32 {
            assert_eq!(spread(32, world, 8).uneven().is_some(), 32 % world != 0, "{world}");
        }
    }

    #[test]
    fn a_worker_without_a_sequence_is_refused() {
        let error = |global, world| Spread::new(global, WorldSize(world), 8).unwrap_err();
        let refused = error(32, 33);
        assert_eq!(refused.to_string(), "train.global_batch = 32 is too small for 33 workers: each needs a sequence");
        let hint = refused.hint().unwrap();
        assert_eq!(hint, "start at most 32 workers (--nproc-per-node 32), or raise train.global_batch");
        assert_eq!(error(0, 1).hint().unwrap(), "raise train.global_batch");
        assert!(Spread::new(8, WorldSize(0), 8).is_err());
    }
}
