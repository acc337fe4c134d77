//! How a global batch is spread over the world: a pure function of three numbers.

use super::ConfigError;
use crate::ids::WorldSize;

/// How many sequences a worker handles in one optimizer step, and in how many passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MicroBatches {
    /// Sequences of one worker in one optimizer step.
    pub per_rank: u32,
    /// Sequences in one forward pass; divides `per_rank`.
    pub micro_batch: u32,
    /// Forward passes in one optimizer step: `per_rank / micro_batch`.
    pub accumulate: u32,
}

/// Spreads `global_batch` sequences over `world` workers, in equal passes of at most `max_micro_batch` sequences each.
///
/// The micro-batch is the largest divisor of a worker's share that is not over the limit, so that every pass has the
/// same size and the mean over passes is the mean over sequences.
///
/// # Errors
/// [`ConfigError::IndivisibleBatch`], with world sizes that work, if the world does not divide the batch.
pub fn micro_batches(global_batch: u32, world: WorldSize, max_micro_batch: u32) -> Result<MicroBatches, ConfigError> {
    let world = world.get();
    if global_batch == 0 || world == 0 || !global_batch.is_multiple_of(world) {
        return Err(ConfigError::IndivisibleBatch { global_batch, world, works: world_sizes(global_batch, world) });
    }
    let per_rank = global_batch / world;
    let limit = max_micro_batch.clamp(1, per_rank);
    let micro_batch = (1..=limit).rev().find(|size| per_rank.is_multiple_of(*size)).unwrap_or(1);
    Ok(MicroBatches { per_rank, micro_batch, accumulate: per_rank / micro_batch })
}

/// World sizes that divide the batch: the four nearest below `world` and the four nearest above.
fn world_sizes(global_batch: u32, world: u32) -> Vec<u32> {
    let mut divisors: Vec<u32> = (1..)
        .take_while(|d| u64::from(*d) * u64::from(*d) <= u64::from(global_batch))
        .filter(|d| global_batch.is_multiple_of(*d))
        .flat_map(|d| [d, global_batch / d])
        .collect();
    divisors.sort_unstable();
    divisors.dedup();
    let middle = divisors.partition_point(|d| *d <= world);
    divisors[middle.saturating_sub(4)..(middle + 4).min(divisors.len())].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Explain;

    #[test]
    fn a_batch_is_spread_in_equal_passes() {
        for (global, world, limit, per_rank, micro, accumulate) in [
            (32, 1, 8, 32, 8, 4),
            (32, 2, 8, 16, 8, 2),
            (32, 4, 8, 8, 8, 1),
            (32, 32, 8, 1, 1, 1),
            (24, 2, 5, 12, 4, 3),
            (14, 2, 4, 7, 1, 7),
            (16, 2, 100, 8, 8, 1),
            (16, 1, 0, 16, 1, 16),
            (u32::MAX, 1, 2, u32::MAX, 1, u32::MAX),
        ] {
            let spread = micro_batches(global, WorldSize(world), limit).unwrap();
            assert_eq!(spread, MicroBatches { per_rank, micro_batch: micro, accumulate }, "{global}/{world}/{limit}");
        }
    }

    #[test]
    fn a_batch_that_does_not_divide_says_what_would() {
        let error = micro_batches(32, WorldSize(3), 8).unwrap_err();
        assert_eq!(error.to_string(), "train.global_batch = 32 can't be divided evenly over 3 workers");
        assert_eq!(error.hint().unwrap(), "world sizes that work: 1, 2, 4, 8, 16, 32; or change train.global_batch");
        assert!(micro_batches(0, WorldSize(1), 8).is_err());
        assert!(micro_batches(8, WorldSize(0), 8).is_err());
        assert_eq!(world_sizes(64, 1000), [8, 16, 32, 64]);
    }
}
