//! The fingerprint of what every rank has: equal states give equal numbers, so that ranks are compared by 8 bytes.
//!
//! What is replicated is read as words of 32 bits (16 for bf16) and cut into rows. A row's sum is the multilinear hash
//! of Lemire and Kaser ("Strongly universal string hashing is fast", The Computer Journal 57, 2014, arXiv 1202.4961):
//! each word times an odd 64-bit number of its place, summed modulo 2^64. One changed word always shows; two states
//! that differ in more have one chance in 2^32 a row to look the same. The rows' sums come to the host in one copy and
//! are chained there. All of it depends on bits and places alone, so that devices, threads and chunks make no
//! difference; a NaN is as good as any number.
//!
//! With `ddp` that is the whole state; with `zero1` the weights that every rank computes with, and frozen ones; with
//! `shard` frozen ones alone. A model has no other tensors that change.
//!
//! *Cost.* It reads the state once, on one thread of the CPU or on the GPU, and the loop waits. With LibTorch's
//! operations, three passes, that took 0.31 s for the state of the benchmark's model (41.7 M parameters, fp32: 0.5
//! GB) on a machine of 2 cores, where copying the same bytes once takes 0.14 s and a step of that model about 1 s
//! (November 2026, with other work beside it). A CPU takes one pass now, which was not measured yet. It is
//! taken at a formation, and at every 16th save at the boundary at which that save begins; other saves neither wait for
//! it nor for the device.
//!
//! *Crash, retry, cancel:* it changes nothing.

use tch::{Device, Kind, TchError, Tensor};

use super::{State, signed};
use crate::{
    error::Result,
    ids::Fingerprint,
    random::{SplitMix64, mix},
    torch,
};

/// Words of a row.
const ROW: i64 = 1 << 15;
/// Rows that a GPU sums at once: as many as fill one. Temporary memory: 256 KiB a row.
const AT_ONCE: i64 = 512;

/// The tensors that every rank has, read as words. They share their memory with the state and follow its changes.
#[derive(Debug)]
pub struct Replicated {
    words: Vec<Tensor>,
    /// An odd number for each word of a row.
    weights: Tensor,
    device: Device,
}

impl State {
    /// Everything of it that is the same on every rank.
    pub fn replicated(&self) -> Result<Replicated> {
        let whole = self.specs.iter().zip(&self.tensors).filter(|(spec, _)| spec.part.is_none());
        let words: Result<Vec<Tensor>, TchError> = whole.map(|(_, tensor)| words(tensor)).collect();
        let words = torch::tch_result("read a state as words", words)?;
        let device = words.first().map_or(Device::Cpu, Tensor::device);
        let mut numbers = SplitMix64::new(0);
        #[expect(clippy::cast_possible_wrap, reason = "all 64 bits are wanted")]
        let odd: Vec<i64> = (0..ROW).map(|_| (numbers.next_u64() | 1) as i64).collect();
        let weights = Tensor::from_slice(&odd).f_to_device(device);
        Ok(Replicated { words, weights: torch::tch_result("number the words of a row", weights)?, device })
    }
}

fn words(tensor: &Tensor) -> Result<Tensor, TchError> {
    let kind = if tensor.kind() == Kind::Float { Kind::Int } else { Kind::Int16 };
    tensor.f_detach()?.f_view([-1])?.f_view_dtype(kind)
}

impl Replicated {
    /// The fingerprint of what the tensors hold now. Waits for the device. Call it between two steps, when the last
    /// update has reached the weights.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let doing = "take a fingerprint";
        let mut sums = Vec::new();
        for words in self.words.iter().filter(|words| words.numel() > 0) {
            match self.device {
                Device::Cpu => sums.push(torch::row_sums(words, &self.weights)?),
                _ => torch::tch_result(doing, self.sum_by_operations(words, &mut sums))?,
            }
        }
        Ok(torch::tch_result(doing, chain(&sums))?)
    }

    /// The sums of each row of `words`, by LibTorch's own operations.
    fn sum_by_operations(&self, words: &Tensor, sums: &mut Vec<Tensor>) -> Result<(), TchError> {
        let (len, mut at) = (signed(words.numel() as u64), 0);
        while at < len {
            let left = len - at;
            let (rows, long) = if left < ROW { (1, left) } else { ((left / ROW).min(AT_ONCE), ROW) };
            let mut part = words.f_narrow(0, at, rows * long)?.f_to_kind(Kind::Int64)?.f_view([rows, long])?;
            let _ = part.f_mul_(&self.weights.f_narrow(0, 0, long)?)?;
            sums.push(part.f_sum_dim_intlist(1_i64, false, Kind::Int64)?);
            at += rows * long;
        }
        Ok(())
    }

    /// Changes the lowest bit of the first word: what a broken machine does, for tests.
    pub fn flip_a_bit(&self) -> Result<()> {
        let Some(words) = self.words.first() else { return Ok(()) };
        let flipped = words.f_narrow(0, 0, 1).and_then(|mut first| first.f_bitwise_xor_(1_i64));
        let _flipped = torch::tch_result("flip a bit", flipped)?;
        Ok(())
    }
}

/// One number of the sums of all rows.
fn chain(sums: &[Tensor]) -> Result<Fingerprint, TchError> {
    if sums.is_empty() {
        return Ok(Fingerprint(0));
    }
    let sums = Vec::<i64>::try_from(Tensor::f_cat(sums, 0)?.f_to_device(Device::Cpu)?)?;
    let link = |hash: u64, sum: i64| mix(hash.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ sum.cast_unsigned());
    Ok(Fingerprint(sums.into_iter().fold(0, link)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        config::{ModelKind, Precision, Strategy},
        ids::{Rank, WorldSize},
        model::{self, BuildSettings, Model},
        train::strategy::lay_out_small,
    };

    fn replicated(tensors: &[Tensor]) -> Replicated {
        let words = tensors.iter().map(|tensor| words(tensor).unwrap()).collect();
        let state =
            State { params: Vec::new(), specs: Vec::new(), tensors: Vec::new(), targets: Vec::new(), adapters: false };
        Replicated { words, ..state.replicated().unwrap() }
    }

    fn of(tensors: &[Tensor]) -> Fingerprint {
        replicated(tensors).fingerprint().unwrap()
    }

    fn numbers(len: i64, kind: Kind) -> Tensor {
        Tensor::arange(len, (Kind::Float, Device::Cpu)).sin().to_kind(kind)
    }

    #[test]
    fn every_bit_of_every_word_counts_and_so_does_its_place() {
        // More than one row, more rows than are summed at once, and a rest.
        let len = 3 * ROW + 77;
        for (kind, bits, word) in [(Kind::Float, 32, Kind::Int), (Kind::BFloat16, 16, Kind::Int16)] {
            let tensor = numbers(len, kind);
            let same = || [tensor.copy(), numbers(5, Kind::Float)];
            let before = of(&same());
            assert_eq!(before, of(&same()), "{kind:?}");
            let mut seen = std::collections::HashSet::from([before]);
            for place in [0, 1, ROW - 1, ROW, 2 * ROW, 3 * ROW, len - 1] {
                for bit in [0, 1, bits / 2, bits - 2, bits - 1] {
                    let other = same();
                    let mut word = other[0].view_dtype(word).narrow(0, place, 1);
                    let _ = word.bitwise_xor_(1_i64 << bit);
                    assert!(seen.insert(of(&other)), "{kind:?}: bit {bit} of word {place}");
                }
            }
            let swapped = same();
            let (mut first, mut second) = (swapped[0].narrow(0, 3, 1), swapped[0].narrow(0, 4 + ROW, 1));
            let kept = first.copy();
            first.copy_(&second);
            second.copy_(&kept);
            assert!(seen.insert(of(&swapped)), "{kind:?}: two words have changed places");
            let [long, short] = same();
            assert!(seen.insert(of(&[short, long])), "{kind:?}: two tensors have changed places");
            // Both signs of what stands in one column: their high bits must not cancel out.
            let signs = same();
            let _ = signs[0].narrow(0, 9, 1).neg_();
            let _ = signs[0].narrow(0, 9 + ROW, 1).neg_();
            assert!(seen.insert(of(&signs)), "{kind:?}: two signs");
            let signs = same();
            let _ = signs[0].narrow(0, 9, 2).neg_();
            assert!(seen.insert(of(&signs)), "{kind:?}: two signs of a row");
        }
    }

    /// A group may have both kinds of devices' programs, and a run goes on from one to the other.
    #[test]
    fn a_cpu_and_a_gpu_give_one_number() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for len in [0, 1, 5, ROW - 1, ROW, ROW + 1, 2 * ROW + 3] {
                let tensors = [numbers(len, kind), numbers(3, kind)];
                let replicated = replicated(&tensors);
                let mut sums = Vec::new();
                for words in replicated.words.iter().filter(|words| words.numel() > 0) {
                    replicated.sum_by_operations(words, &mut sums).unwrap();
                }
                assert_eq!(chain(&sums).unwrap(), replicated.fingerprint().unwrap(), "{len} of {kind:?}");
            }
        }
    }

    #[test]
    fn it_follows_the_tensors_and_a_flipped_bit_shows() {
        let tensor = numbers(10, Kind::Float);
        let replicated = replicated(&[tensor.shallow_clone()]);
        let before = replicated.fingerprint().unwrap();
        replicated.flip_a_bit().unwrap();
        assert_ne!(replicated.fingerprint().unwrap(), before);
        assert_eq!(tensor.double_value(&[0]), f64::from(f32::from_bits(1)), "the lowest bit of sin 0");
        replicated.flip_a_bit().unwrap();
        assert_eq!(replicated.fingerprint().unwrap(), before);
        let _ = tensor.narrow(0, 4, 1).fill_(f64::NAN);
        let nan = replicated.fingerprint().unwrap();
        assert!(nan != before && nan == replicated.fingerprint().unwrap(), "equal bits are equal, NaN or not");
        assert_eq!(of(&[]), of(&[]));
    }

    fn build(precision: Precision) -> Box<dyn Model> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        });
        let settings = BuildSettings { device: Device::Cpu, precision, seed: Some(7) };
        model::build(ModelKind::Decoder, &config, &settings).unwrap()
    }

    #[test]
    fn ranks_are_compared_by_what_all_of_them_have() {
        for (strategy, precision) in [
            (Strategy::Ddp, Precision::Fp32),
            (Strategy::Ddp, Precision::Bf16),
            (Strategy::Zero1, Precision::Fp32),
            (Strategy::Zero1, Precision::Bf16),
            // Nothing at all.
            (Strategy::Shard, Precision::Bf16),
        ] {
            let states = [0, 1].map(|rank| {
                let mut model = build(precision);
                lay_out_small(strategy, precision, model.as_mut(), Rank(rank), WorldSize(2)).unwrap().0
            });
            let compared = states.each_ref().map(|state| state.replicated().unwrap());
            let prints = || compared.each_ref().map(|replicated| replicated.fingerprint().unwrap());
            let start = prints();
            assert_eq!(start[0], start[1], "{strategy:?} {precision:?}");
            let mut counted = 0;
            for (index, spec) in states[0].specs().iter().enumerate() {
                let tensor = &states[0].tensors()[index];
                if !tensor.defined() {
                    continue;
                }
                let before = tensor.detach().copy();
                let _ = tensor.detach().view([-1]).narrow(0, 0, 1).fill_(3.0);
                let moved = prints()[0] != start[0];
                // A part is this rank's own.
                assert_eq!(moved, spec.part.is_none(), "{strategy:?} {precision:?} {}", spec.name);
                counted += usize::from(moved);
                tensor.detach().copy_(&before);
            }
            let weights = states[0].specs().iter().filter(|spec| spec.part.is_none()).count();
            let states_of_each = if precision == Precision::Bf16 { 4 } else { 3 };
            assert_eq!(counted, weights, "{strategy:?}");
            assert!(strategy != Strategy::Ddp || counted % states_of_each == 0, "moments are compared, too");
        }
    }
}
