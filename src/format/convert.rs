//! Elements of one float type as those of another.
//!
//! A wider type holds every value of a narrower one. A narrower one gets the nearest value, of two equally near ones
//! that with an even last digit, as LibTorch and the hardware round. Not-a-number stays not-a-number.

use super::header::Dtype;

/// Whether elements of type `from` can be written as elements of type `to`.
pub fn can(from: Dtype, to: Dtype) -> bool {
    from == to || (from != Dtype::I64 && matches!(to, Dtype::F32 | Dtype::BF16))
}

/// Elements of type `from`, little-endian, as elements of type `to`; each is rounded at most once. `None` if there is
/// no such conversion ([`can`]). Bytes behind the last whole element are left out.
pub fn convert(bytes: &[u8], from: Dtype, to: Dtype) -> Option<Vec<u8>> {
    if from == to {
        return Some(bytes.to_vec());
    }
    if !can(from, to) {
        return None;
    }
    Some(match (from, to) {
        (Dtype::BF16, _) => floats::<2>(bytes, |bits| f32::from_bits(u32::from(u16::from_le_bytes(bits)) << 16), to),
        (Dtype::F16, _) => floats::<2>(bytes, |bits| of_half(u16::from_le_bytes(bits)), to),
        _ => floats::<4>(bytes, f32::from_le_bytes, to),
    })
}

fn floats<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32, to: Dtype) -> Vec<u8> {
    let (elements, _) = bytes.as_chunks::<N>();
    if to == Dtype::BF16 {
        elements.iter().flat_map(|bits| rounded(read(*bits)).to_le_bytes()).collect()
    } else {
        elements.iter().flat_map(|bits| read(*bits).to_le_bytes()).collect()
    }
}

/// The nearest bfloat16.
fn rounded(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // A payload in the low half alone would round to infinity.
        return (bits >> 16) as u16 | 0x40;
    }
    let even = (bits >> 16) & 1;
    // Values beyond the largest one carry into infinity, as they should.
    ((bits + 0x7fff + even) >> 16) as u16
}

/// A 16-bit float's value.
fn of_half(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let (exponent, fraction) = (u32::from(bits >> 10) & 0x1f, u32::from(bits & 0x3ff));
    match exponent {
        // Below the smallest normal number: multiples of 2^-24, all of which fit.
        0 => f32::from_bits(sign | (fraction as f32 / 16_777_216.0).to_bits()),
        0x1f => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tch::{Kind, Tensor};

    use super::*;
    use crate::torch;

    fn by_torch(bytes: &[u8], from: Kind, to: Kind) -> Vec<u8> {
        let len = (bytes.len() / from.elt_size_in_bytes()) as i64;
        let tensor = Tensor::from_data_size(bytes, &[len], from).to_kind(to);
        let mut out = vec![0; torch::byte_len(&tensor).unwrap()];
        torch::store_bytes(&tensor, &mut out).unwrap();
        out
    }

    #[test]
    fn every_16_bit_value_comes_out_as_libtorch_converts_it() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for (from, kind) in [(Dtype::BF16, Kind::BFloat16), (Dtype::F16, Kind::Half)] {
            let ours = convert(&all, from, Dtype::F32).unwrap();
            let theirs = by_torch(&all, kind, Kind::Float);
            for (bits, (a, b)) in ours.chunks(4).zip(theirs.chunks(4)).enumerate() {
                let [a, b] = [a, b].map(|x| f32::from_le_bytes(x.try_into().unwrap()));
                assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{from:?} {bits:#x}: {a} and {b}");
            }
            // There and back: nothing was lost.
            if from == Dtype::BF16 {
                let back = convert(&ours, Dtype::F32, from).unwrap();
                let numbers = all
                    .chunks(2)
                    .zip(back.chunks(2))
                    .filter(|(a, _)| u16::from_le_bytes([a[0], a[1]]) & 0x7fff <= 0x7f80);
                numbers.for_each(|(a, b)| assert_eq!(a, b));
            }
        }
    }

    #[test]
    fn halves_between_two_values_go_to_the_even_one() {
        for (bits, expected) in [
            (0x3f80_8000_u32, 0x3f80_u16),
            (0x3f81_8000, 0x3f82),
            (0x3f80_8001, 0x3f81),
            (0x3f80_7fff, 0x3f80),
            (0xbf81_8000, 0xbf82),
            (0x7f7f_ffff, 0x7f80),
            (0x0000_8001, 0x0001),
            (0x7f80_0000, 0x7f80),
        ] {
            let bytes = convert(&bits.to_le_bytes(), Dtype::F32, Dtype::BF16).unwrap();
            assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), expected, "{bits:#x}");
        }
        for nan in [0x7f80_0001_u32, 0xffc0_0000, 0x7fff_ffff] {
            let bytes = convert(&nan.to_le_bytes(), Dtype::F32, Dtype::BF16).unwrap();
            assert!(u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7fff > 0x7f80, "{nan:#x}");
        }
    }

    #[test]
    fn integers_stay_integers() {
        assert!(can(Dtype::I64, Dtype::I64) && !can(Dtype::I64, Dtype::F32) && !can(Dtype::F32, Dtype::F16));
        assert_eq!(convert(&[1; 8], Dtype::I64, Dtype::F32), None);
        assert_eq!(convert(&[1; 8], Dtype::F16, Dtype::F16), Some(vec![1; 8]));
    }

    proptest! {
        #[test]
        fn any_fp32_is_rounded_as_libtorch_rounds_it(bits in any::<u32>()) {
            prop_assume!(!f32::from_bits(bits).is_nan());
            let bytes = bits.to_le_bytes();
            prop_assert_eq!(
                convert(&bytes, Dtype::F32, Dtype::BF16).unwrap(),
                by_torch(&bytes, Kind::Float, Kind::BFloat16)
            );
        }
    }
}
