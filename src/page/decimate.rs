//! A long curve with few points: minima and maxima stay. Pure.

/// The places of at most about `most` values that show the same curve: of each stretch of equal width along `xs`, which
/// never falls, the first, the lowest, the highest and the last value. Values that are no numbers are left out; where
/// one is, `None` stands between its neighbours, once, unless they share a stretch.
pub(super) fn decimate(xs: &[f64], ys: &[f64], most: usize) -> Vec<Option<usize>> {
    let len = xs.len().min(ys.len());
    let (xs, ys) = (&xs[..len], &ys[..len]);
    let (Some(first), Some(last)) = (xs.first(), xs.last()) else { return Vec::new() };
    let columns = (most / 4).max(1) as f64;
    let width = (last - first) / columns;
    let column = |x: f64| if width > 0.0 { ((x - first) / width).floor().min(columns - 1.0) } else { 0.0 };
    let mut out: Vec<Option<usize>> = Vec::new();
    let (mut kept, mut broken): (Option<(f64, [usize; 4])>, bool) = (None, false);
    let flush = |kept: &mut Option<(f64, [usize; 4])>, out: &mut Vec<Option<usize>>| {
        if let Some((_, mut places)) = kept.take() {
            places.sort_unstable();
            for place in places {
                if out.last() != Some(&Some(place)) {
                    out.push(Some(place));
                }
            }
        }
    };
    for (place, (x, y)) in xs.iter().zip(ys).enumerate() {
        if !y.is_finite() {
            broken = true;
            continue;
        }
        let at = column(*x);
        match &mut kept {
            Some((column, [_, low, high, last])) if *column == at => {
                if *y < ys[*low] {
                    *low = place;
                }
                if *y > ys[*high] {
                    *high = place;
                }
                *last = place;
            }
            _ => {
                flush(&mut kept, &mut out);
                if broken && !out.is_empty() {
                    out.push(None);
                }
                kept = Some((at, [place; 4]));
            }
        }
        broken = false;
    }
    flush(&mut kept, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_spike_among_a_million_values_stays() {
        let xs: Vec<f64> = (0..1_000_000).map(f64::from).collect();
        let mut ys: Vec<f64> = xs.iter().map(|x| (x / 1e4).sin()).collect();
        (ys[123_456], ys[654_321]) = (99.0, -99.0);
        let places: Vec<usize> = decimate(&xs, &ys, 2000).into_iter().flatten().collect();
        assert!(places.len() <= 2000 && places.len() > 1000, "{}", places.len());
        assert!(places.contains(&123_456) && places.contains(&654_321));
        assert!(places.contains(&0) && places.contains(&999_999));
    }

    #[test]
    fn values_that_are_none_break_the_curve_once() {
        let nan = f64::NAN;
        let ys = [nan, 1.0, 2.0, nan, nan, 3.0, nan];
        let xs: Vec<f64> = (0..7).map(f64::from).collect();
        assert_eq!(decimate(&xs, &ys, 100), [Some(1), Some(2), None, Some(5)]);
        assert_eq!(decimate(&[], &[], 100), []);
        // A million holes make no million points.
        let ys: Vec<f64> = (0..10_000).map(|x| if x % 2 == 0 { nan } else { 1.0 }).collect();
        let xs: Vec<f64> = (0..10_000).map(f64::from).collect();
        assert!(decimate(&xs, &ys, 100).len() <= 125);
        assert_eq!(decimate(&[1.0, 1.0], &[5.0, 4.0], 4), [Some(0), Some(1)]);
    }

    proptest! {
        #[test]
        fn the_lowest_and_the_highest_stay_and_order_is_kept(
            ys in proptest::collection::vec(prop_oneof![9 => -1e3..1e3_f64, 1 => Just(f64::NAN)], 1..400),
            most in 4..100_usize,
        ) {
            let xs: Vec<f64> = (0..ys.len()).map(|x| x as f64).collect();
            let out = decimate(&xs, &ys, most);
            let places: Vec<usize> = out.iter().flatten().copied().collect();
            prop_assert!(places.windows(2).all(|pair| pair[0] < pair[1]), "{places:?}");
            let finite = || ys.iter().copied().filter(|y| y.is_finite());
            let shown = || places.iter().map(|place| ys[*place]);
            prop_assert_eq!(finite().fold(f64::MIN, f64::max), shown().fold(f64::MIN, f64::max));
            prop_assert_eq!(finite().fold(f64::MAX, f64::min), shown().fold(f64::MAX, f64::min));
            prop_assert!(out.windows(2).all(|pair| pair[0].is_some() || pair[1].is_some()), "gaps are single");
        }
    }
}
