//! The samples that a step trains on: a pure function of (seed, step), the same for every world size.
//!
//! One global cursor counts samples from the start of the run: step k (from 1) of a run with global batch G uses
//! positions `(k-1)·G .. k·G`. A position is an epoch (the number of complete passes over the data) and a place in it,
//! and each epoch visits every sample once, in its own order. The order is a keyed permutation that is *computed*: no
//! shuffled list is kept, saved or sent, and a resume at step k needs nothing but k.
//!
//! # The permutation
//! A balanced Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom
//! functions", SIAM J. Comput. 17(2), 1988) over the smallest domain 2^(2h) that holds all samples, narrowed to `0..n`
//! by cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, method 2): apply it again
//! until the result is below n. The domain is less than 4n, so fewer than four applications are expected. The round
//! function is Stafford's variant 13 of the MurmurHash3 finaliser, as in SplitMix64 (Steele, Lea and Flood, OOPSLA
//! 2014). This is for mixing, not for secrecy.
//!
//! # Stability
//! Every line here is part of the mathematics of a run: a change gives resumed runs other samples. A test pins values.

use std::ops::Range;

use super::{DataError, Split};
use crate::{
    config::share,
    ids::{Rank, Step, WorldSize},
};

/// Four rounds already give a pseudorandom permutation for an ideal round function; ours is not ideal and small domains
/// mix slowly, so there are three times as many. All of them take tens of nanoseconds.
const ROUNDS: u64 = 12;

/// The order of the samples of one dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampler {
    seed: u64,
    samples: u64,
    half_bits: u32,
}

/// Stafford's "Mix13": a bijection on 64 bits in which each input bit flips each output bit about half the time.
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 2^64 divided by the golden ratio: SplitMix64's increment.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Sampler {
    /// The order of `samples` samples under `seed`; `None` if there are no samples.
    pub const fn new(seed: u64, samples: u64) -> Option<Self> {
        if samples == 0 {
            return None;
        }
        let bits = u64::BITS - (samples - 1).leading_zeros();
        let half_bits = if bits < 2 { 1 } else { bits.div_ceil(2) };
        Some(Self { seed, samples, half_bits })
    }

    /// Like [`Sampler::new`] over the samples of a dataset's split; if it has none, the error says what to do.
    pub fn over(dataset: &super::Dataset, split: Split, sequence_length: u32, seed: u64) -> Result<Self, DataError> {
        dataset.check_length(sequence_length)?;
        Self::new(seed, dataset.samples(split, sequence_length)).ok_or_else(|| DataError::NoSamples {
            dataset: dataset.dir().display().to_string(),
            split,
            sequence_length,
        })
    }

    /// Samples in one epoch.
    pub const fn samples(&self) -> u64 {
        self.samples
    }

    /// The epoch (from 0) of a position of the global cursor, and the sample to read there, below [`Sampler::samples`].
    pub const fn sample_at(&self, position: u64) -> (u64, u64) {
        let epoch = position / self.samples;
        let key = mix(mix(self.seed.wrapping_add(GOLDEN)) ^ epoch.wrapping_mul(GOLDEN));
        let mut index = position % self.samples;
        // Ends: the network permutes its domain, so walking from a value below n comes back below n at the latest when
        // the cycle closes.
        loop {
            index = self.permute(index, key);
            if index < self.samples {
                return (epoch, index);
            }
        }
    }

    const fn permute(&self, value: u64, key: u64) -> u64 {
        // At most 32 bits a half, so no shift reaches 64.
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        let mut round = 0;
        while round < ROUNDS {
            let round_key = mix(key.wrapping_add(GOLDEN.wrapping_mul(round + 1)));
            (left, right) = (right, left ^ (mix(round_key ^ right) & mask));
            round += 1;
        }
        (left << self.half_bits) | right
    }
}

/// The positions of the global cursor that `rank` trains on in `step` (from 1; step 0 trains on nothing).
pub const fn batch(step: Step, global_batch: u32, rank: Rank, world: WorldSize) -> Range<u64> {
    let Some(done) = step.get().checked_sub(1) else { return 0..0 };
    let base = done.saturating_mul(global_batch as u64);
    let part = share(global_batch as u64, rank, world);
    base.saturating_add(part.start)..base.saturating_add(part.end)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn epoch_order(seed: u64, samples: u64, epoch: u64) -> Vec<u64> {
        let sampler = Sampler::new(seed, samples).unwrap();
        (0..samples)
            .map(|place| {
                let (at, index) = sampler.sample_at(epoch * samples + place);
                assert_eq!(at, epoch);
                index
            })
            .collect()
    }

    fn assert_visits_each_once(seed: u64, samples: u64, epoch: u64) {
        let mut order = epoch_order(seed, samples, epoch);
        order.sort_unstable();
        assert!(order.iter().copied().eq(0..samples), "seed {seed}, {samples} samples, epoch {epoch}");
    }

    #[test]
    fn every_epoch_visits_every_sample_once() {
        let near_powers = (1..=14_u32).flat_map(|k| [(1_u64 << k) - 1, 1 << k, (1 << k) + 1]);
        for samples in near_powers.chain([1, 2, 3, 5, 7, 997, 7919, 10_007]) {
            for epoch in [0, 1, 5] {
                assert_visits_each_once(1234, samples, epoch);
            }
        }
    }

    proptest! {
        #[test]
        fn any_size_seed_and_epoch_is_a_permutation(seed: u64, samples in 1..3000_u64, epoch in 0..1_000_000_u64) {
            assert_visits_each_once(seed, samples, epoch);
        }

        #[test]
        fn huge_datasets_stay_in_range(seed: u64, samples in 1..=u64::MAX, position: u64) {
            let (epoch, index) = Sampler::new(seed, samples).unwrap().sample_at(position);
            prop_assert_eq!(epoch, position / samples);
            prop_assert!(index < samples);
        }

        #[test]
        fn the_ranks_share_a_step_without_gap_or_overlap(
            step in 1..u64::from(u32::MAX),
            batch_size in 0..500_u32,
            world in 1..70_u32,
        ) {
            let mut at = (step - 1) * u64::from(batch_size);
            for rank in 0..world {
                let part = batch(Step(step), batch_size, Rank(rank), WorldSize(world));
                prop_assert_eq!(part.start, at);
                let size = part.end - part.start;
                prop_assert!(size == u64::from(batch_size / world) || size == u64::from(batch_size.div_ceil(world)));
                at = part.end;
            }
            prop_assert_eq!(at, step * u64::from(batch_size));
        }
    }

    #[test]
    fn without_samples_there_is_no_sampler() {
        assert_eq!(Sampler::new(1, 0), None);
        assert_eq!(Sampler::new(1, 1).unwrap().sample_at(9), (9, 0));
    }

    #[test]
    fn the_order_differs_by_epoch_and_by_seed() {
        let base = epoch_order(1, 1000, 0);
        for (name, other) in [
            ("epoch", epoch_order(1, 1000, 1)),
            ("seed", epoch_order(2, 1000, 0)),
            ("high bit of the seed", epoch_order(1 | 1 << 63, 1000, 0)),
            ("epoch against seed", epoch_order(0, 1000, 1)),
        ] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            // Two random permutations agree in one place on average, and in 12 or more with probability below 1e-8.
            assert!(same < 12, "{name}: {same} of 1000 places agree");
        }
    }

    #[test]
    fn every_order_of_a_few_samples_occurs() {
        let orders: HashSet<Vec<u64>> = (0..2000).map(|seed| epoch_order(seed, 4, 0)).collect();
        assert_eq!(orders.len(), 24);
    }

    /// Chi-squared over 32 × 32 cells of (place, sample), summed over seeds: 961 degrees of freedom, so a mean of 961
    /// and a deviation of 44; the bound is six deviations away on either side.
    #[test]
    fn samples_are_spread_evenly_over_places() {
        const SAMPLES: u64 = 1 << 10;
        const CELLS: usize = 32;
        let mut counts = vec![0_u32; CELLS * CELLS];
        let seeds = 64;
        for seed in 0..seeds {
            for (place, index) in epoch_order(seed, SAMPLES, 0).into_iter().enumerate() {
                counts[(place / 32) * CELLS + index as usize / 32] += 1;
            }
        }
        let expected = f64::from(seeds as u32) * SAMPLES as f64 / (CELLS * CELLS) as f64;
        let chi: f64 = counts.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
        assert!((700.0..1225.0).contains(&chi), "chi-squared {chi}");
    }

    #[test]
    fn neighbours_are_separated() {
        let order = epoch_order(7, 10_000, 0);
        let adjacent = order.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
        assert!(adjacent < 15, "{adjacent} neighbours stayed neighbours, 2 expected");
    }

    #[test]
    fn every_world_size_trains_on_the_same_samples() {
        let sampler = Sampler::new(42, 101).unwrap();
        for step in 1..30 {
            let samples_of = |world: u32| -> Vec<(u64, u64)> {
                (0..world)
                    .flat_map(|rank| batch(Step(step), 12, Rank(rank), WorldSize(world)))
                    .map(|position| sampler.sample_at(position))
                    .collect()
            };
            let alone = samples_of(1);
            assert_eq!(alone.len(), 12);
            for world in [2, 3, 4, 5, 6, 12, 16] {
                assert_eq!(samples_of(world), alone, "world size {world}");
            }
        }
        assert!(batch(Step(0), 12, Rank(0), WorldSize(1)).is_empty());
        assert!(batch(Step(3), 12, Rank(2), WorldSize(2)).is_empty());
    }

    /// A change here gives every resumed run other samples: don't change it, or add a new kind of order.
    #[test]
    fn the_order_is_pinned() {
        let first = |seed, samples: u64| -> Vec<u64> {
            let sampler = Sampler::new(seed, samples).unwrap();
            (0..6).chain(samples..samples + 2).map(|position| sampler.sample_at(position).1).collect()
        };
        assert_eq!(first(1234, 10), [1, 6, 4, 2, 3, 0, 3, 0]);
        assert_eq!(first(1234, 100_003), [65_349, 42_410, 841, 81_184, 53_223, 73_526, 71_197, 82_154]);
        assert_eq!(
            first(0, 1 << 40),
            [
                791_834_846_074,
                448_236_212_310,
                185_739_147_483,
                658_342_379_971,
                516_580_682_030,
                651_974_397_677,
                244_498_024_813,
                1_080_305_177_242
            ]
        );
    }
}
