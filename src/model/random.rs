//! Random numbers that are the same bits on every machine.
//!
//! Weights are drawn here and not by LibTorch, whose stream depends on the vector instructions of the processor: ranks
//! on unlike machines must start from equal weights, and a run must be repeatable elsewhere. Only additions,
//! multiplications, divisions and square roots are used, which IEEE 754 fixes to the last bit; the logarithm is ours
//! for that reason. Each tensor has a stream of its own, keyed by seed and name, so neither the order in which tensors
//! are made nor the number of threads matters.

use std::{
    num::NonZero,
    sync::{Mutex, PoisonError},
};

pub use crate::random::SplitMix64;
use crate::{random::mix, threads};

/// Elements drawn from one sub-stream; one of the constants that fix the bits. Even, since numbers come in pairs.
const BLOCK: usize = 1 << 16;

/// `len` draws from a normal distribution with mean 0 and deviation `std`, of the stream of (`seed`, `name`).
pub fn normal(seed: u64, name: &str, len: usize, std: f64) -> Vec<f32> {
    let mut values = vec![0.0_f32; len];
    let blocks = len.div_ceil(BLOCK);
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(blocks).max(1);
    let share = blocks.div_ceil(threads).max(1) * BLOCK;
    let stream = SplitMix64::named(seed, name).next_u64();
    let parts = Mutex::new(values.chunks_mut(share).enumerate());
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let fill = || {
        while let Some((part, values)) = next() {
            for (block, values) in values.chunks_mut(BLOCK).enumerate() {
                let number = (part * (share / BLOCK) + block) as u64;
                fill_normal(&mut SplitMix64::new(mix(stream ^ mix(number + 1))), values, std);
            }
        }
    };
    for done in threads::together(threads, fill) {
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
    }
    values
}

/// Marsaglia's polar method ("A convenient method for generating normal variables", SIAM Review 6, 1964).
fn fill_normal(random: &mut SplitMix64, values: &mut [f32], std: f64) {
    for pair in values.chunks_mut(2) {
        let (x, y, factor) = loop {
            let x = 2.0 * random.next_f64() - 1.0;
            let y = 2.0 * random.next_f64() - 1.0;
            let square = x * x + y * y;
            if square > 0.0 && square < 1.0 {
                break (x, y, (-2.0 * ln(square) / square).sqrt());
            }
        };
        for (value, side) in pair.iter_mut().zip([x, y]) {
            *value = (side * factor * std) as f32;
        }
    }
}

/// Natural logarithm of a positive normal number, to about 1e-15: 2·atanh((m-1)/(m+1)) as a series, m within [√½, √2).
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let square = t * t;
    // |t| < 0.172, so the first term left out is below 2e-18.
    let series = [21.0, 19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0]
        .iter()
        .fold(0.0, |sum, odd| sum * square + 1.0 / odd);
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * t * series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_one() {
        let mut random = SplitMix64::new(1);
        for _ in 0..10_000 {
            let x = random.next_f64() * random.next_f64() + 1e-30;
            assert!((ln(x) - x.ln()).abs() <= 1e-14 * x.ln().abs().max(1e-2), "{x}: {} and {}", ln(x), x.ln());
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn normal_numbers_have_the_right_moments_and_tails() {
        let values = normal(7, "w", 400_000, 0.5);
        let n = values.len() as f64;
        let moment = |power: i32| values.iter().map(|&v| (f64::from(v) / 0.5).powi(power)).sum::<f64>() / n;
        for (power, expected, tolerance) in [(1, 0.0, 0.01), (2, 1.0, 0.01), (3, 0.0, 0.03), (4, 3.0, 0.06)] {
            assert!((moment(power) - expected).abs() < tolerance, "moment {power} is {}", moment(power));
        }
        let beyond = values.iter().filter(|v| v.abs() > 1.0).count() as f64 / n;
        assert!((beyond - 0.0455).abs() < 0.002, "{beyond} beyond two deviations");
    }

    /// Known values pin the stream: a change here would silently change every seed's run.
    #[test]
    fn the_stream_never_changes_and_does_not_depend_on_length_or_threads() {
        let long = normal(1234, "model.norm.weight", 3 * BLOCK + 5, 1.0);
        assert_eq!(long[..4].iter().map(|v| v.to_bits()).collect::<Vec<_>>(), PINNED);
        assert_eq!(normal(1234, "model.norm.weight", 2 * BLOCK + 1, 1.0)[..], long[..2 * BLOCK + 1]);
        let mut expected = vec![0.0; BLOCK];
        let stream = SplitMix64::named(1234, "model.norm.weight").next_u64();
        fill_normal(&mut SplitMix64::new(mix(stream ^ mix(3))), &mut expected, 1.0);
        assert_eq!(long[2 * BLOCK..3 * BLOCK], expected);
        assert_ne!(normal(1235, "model.norm.weight", 4, 1.0), long[..4]);
        assert_ne!(normal(1234, "model.norm.weighs", 4, 1.0), long[..4]);
        assert!(normal(1, "w", 0, 1.0).is_empty());
    }

    const PINNED: [u32; 4] = [1_057_852_224, 1_057_758_453, 3_187_899_673, 3_216_966_651];
}
