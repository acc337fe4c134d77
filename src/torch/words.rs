//! Sums over the bits of tensors on the CPU.

use std::ptr;

use tch::Tensor;

use super::{
    Result,
    ffi::{self, check},
};

/// Sums of rows of `words`, as int64: a row has as many words as there are `numbers` (int64), and the last one may be
/// shorter. Each word, of 32 or 16 bits, is read as a signed number and multiplied by the number of its place, all
/// modulo 2^64. Both tensors are contiguous and on the CPU. One pass, on this thread.
pub fn row_sums(words: &Tensor, numbers: &Tensor) -> Result<Tensor> {
    let mut out = ptr::null_mut();
    // SAFETY: pointers are valid for the call; the shim checks the tensors.
    check("sum rows", unsafe { ffi::trn_row_sums(ffi::raw(words), ffi::raw(numbers), &mut out) })?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    Ok(unsafe { ffi::adopt(out) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// The same in Rust, word by word.
    fn expected(words: &[i64], numbers: &[i64]) -> Vec<i64> {
        let sum = |row: &[i64]| {
            let products = row.iter().zip(numbers).map(|(word, number)| word.wrapping_mul(*number));
            products.fold(0_i64, i64::wrapping_add)
        };
        words.chunks(numbers.len()).map(sum).collect()
    }

    #[test]
    fn every_row_is_summed_by_its_places() {
        let numbers: Vec<i64> = (0..7_i64).map(|n| (n - 3).wrapping_mul(0x7ff3_9c1d_5ab1_e64d) | 1).collect();
        for (kind, least) in [(Kind::Int, i64::from(i32::MIN)), (Kind::Int16, i64::from(i16::MIN))] {
            for len in [0, 1, 6, 7, 8, 70, 75] {
                // The extremes of the type, and what lies between.
                let words: Vec<i64> = (0..len).map(|n| if n % 5 == 4 { -1 - least } else { least + 877 * n }).collect();
                let tensor = Tensor::from_slice(&words).to_kind(kind);
                let sums = row_sums(&tensor, &Tensor::from_slice(&numbers)).unwrap();
                assert_eq!(Vec::<i64>::try_from(sums).unwrap(), expected(&words, &numbers), "{len} of {kind:?}");
            }
        }
    }

    #[test]
    fn what_has_no_words_is_refused() {
        let numbers = Tensor::from_slice(&[1_i64, 3]);
        let words = Tensor::from_slice(&[1_i32, 2, 3, 4]);
        assert!(row_sums(&words, &numbers).is_ok());
        assert!(row_sums(&words.to_kind(Kind::Float), &numbers).is_err());
        assert!(row_sums(&words.view([2, 2]).tr(), &numbers).is_err());
        assert!(row_sums(&words, &numbers.to_kind(Kind::Int)).is_err());
        assert!(row_sums(&words, &Tensor::zeros([0], (Kind::Int64, Device::Cpu))).is_err());
        assert!(row_sums(&Tensor::new(), &numbers).is_err());
    }
}
