//! Slices: parts of a tensor stored as tensors, so that each rank can write the part that it has.
//!
//! Stored layout: elements `begin..end` of the tensor `name`, counted in row-major order over the whole of it, are a
//! safetensors tensor of one dimension and `end - begin` elements under the name `name[begin:end]`, in decimal digits.
//! A whole tensor is not a slice: it is stored under its name with its extents. The set of slices, and their files,
//! depend on the writer; the extents of the whole are the model's.
//!
//! A reader does not trust files: [`check_cover`] requires that the slices of a tensor hold each of its elements
//! exactly once, regardless of their number and order.

use std::ops::Range;

/// The name under which `range` of the `len` elements of tensor `name` is stored.
pub fn stored_name(name: &str, range: &Range<u64>, len: u64) -> String {
    if *range == (0..len) { name.to_owned() } else { format!("{name}[{}:{}]", range.start, range.end) }
}

/// Takes a stored name apart: the tensor's name, and the slice if there is one. A name that [`stored_name`] does not
/// make is a whole tensor's.
pub fn parse_name(stored: &str) -> (&str, Option<Range<u64>>) {
    let slice = || {
        let (name, range) = stored.strip_suffix(']')?.rsplit_once('[')?;
        let (begin, end) = range.split_once(':')?;
        let number = |digits: &str| digits.parse::<u64>().ok().filter(|number| number.to_string() == digits);
        let range = number(begin)?..number(end)?;
        (range.start < range.end && !name.is_empty()).then_some((name, Some(range)))
    };
    slice().unwrap_or((stored, None))
}

/// Checks whether `ranges`, in any order, hold each of `len` elements exactly once; the error gives the reason.
pub fn check_cover(ranges: impl IntoIterator<Item = Range<u64>>, len: u64) -> Result<(), String> {
    let mut ranges: Vec<Range<u64>> = ranges.into_iter().collect();
    ranges.sort_unstable_by_key(|range| (range.start, range.end));
    let mut end = 0;
    for range in ranges {
        if range.end > len || range.start > range.end {
            return Err(format!("has a slice {}:{} beyond its {len} elements", range.start, range.end));
        }
        if range.start < end {
            return Err(format!("has its elements {}:{} twice", range.start, end.min(range.end)));
        }
        if range.start > end {
            break;
        }
        end = range.end;
    }
    if end < len { Err(format!("lacks its elements from {end} on")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_names_of_slices_are_taken_apart() {
        assert_eq!(stored_name("a.b", &(0..10), 10), "a.b");
        assert_eq!(stored_name("a.b", &(2..10), 10), "a.b[2:10]");
        assert_eq!(parse_name("a.b[2:10]"), ("a.b", Some(2..10)));
        assert_eq!(parse_name("a[0][1:2]"), ("a[0]", Some(1..2)));
        let odd = ["a", "a[1]", "a[2:2]", "a[3:2]", "a[01:2]", "a[+1:2]", "a[ 1:2]", "a[1:2", "[1:2]", "a[1:2:3]", ""];
        for name in odd.into_iter().chain(["a[-1:2]", "a[1:99999999999999999999]", "a[1:2]x", "a[:]"]) {
            assert_eq!(parse_name(name), (name, None));
        }
    }

    #[test]
    fn gaps_overlaps_and_slices_outside_are_named() {
        let check = |ranges: &[(u64, u64)], len| check_cover(ranges.iter().map(|&(begin, end)| begin..end), len);
        assert_eq!(check(&[(4, 6), (0, 4)], 6), Ok(()));
        assert_eq!(check(&[], 0), Ok(()));
        let fails = |ranges: &[(u64, u64)], part: &str| {
            let error = check(ranges, 6).unwrap_err();
            assert!(error.contains(part), "{ranges:?}: {error}");
        };
        fails(&[], "from 0 on");
        fails(&[(0, 4)], "from 4 on");
        fails(&[(0, 2), (4, 6)], "from 2 on");
        fails(&[(0, 4), (3, 6)], "3:4 twice");
        fails(&[(0, 6), (0, 6)], "0:6 twice");
        fails(&[(0, 6), (2, 4)], "2:4 twice");
        fails(&[(0, 7)], "0:7 beyond");
        fails(&[(0, 6), (u64::MAX - 1, u64::MAX)], "beyond");
        fails(&[(0, 6), (4, 2)], "beyond");
    }

    proptest! {
        #[test]
        fn any_cut_covers_a_tensor_and_any_change_of_it_does_not(
            cuts in proptest::collection::btree_set(1_u64..100, 0..8),
            shift in 1_u64..3,
            which in any::<proptest::sample::Index>()
        ) {
            let ends: Vec<u64> = cuts.into_iter().chain([100]).collect();
            let starts = std::iter::once(0).chain(ends.iter().copied());
            let mut ranges: Vec<Range<u64>> = starts.zip(ends.iter().copied()).map(|(a, b)| a..b).collect();
            ranges.reverse();
            prop_assert_eq!(check_cover(ranges.clone(), 100), Ok(()));
            let which = which.index(ranges.len());
            let mut changed = ranges.clone();
            changed[which].end += shift;
            prop_assert!(check_cover(changed, 100).is_err());
            ranges.remove(which);
            prop_assert!(check_cover(ranges, 100).is_err());
        }
    }
}
