//! Goodput in closed form.
//!
//! One life of a machine is a restart, then segments of τ seconds of training and a stall of δ (τ of all but the first
//! is at least what a save needs to become durable). Save k is ordered at R + kτ + (k−1)δ and durable max(δ, L) later,
//! so a life of length X that ends unwarned leaves τ times the number of k ≥ 1 with R + k(τ+δ) + max(L−δ, 0) < X. By
//! renewal, goodput is the expected sum of a life over its expected length; for exponential parts the sum over k is
//! geometric. With one exponential part and L = δ it is the complete model of Daly (2006, equation 20): M e^(R/M)
//! (e^((τ+δ)/M) − 1) / τ seconds paid for a second of work.

/// The agent's least reserve, seconds: announced times are approximate, and clocks differ.
pub const LEAST_RESERVE_S: f64 = 5.0;

/// The times of saves and restarts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Time that a save takes away from training, seconds.
    pub stall_s: f64,
    /// From the order of a save to its `committed` record, seconds.
    pub durable_s: f64,
    /// From the arrival of a paid machine to its first step, seconds.
    pub restart_s: f64,
}

impl Costs {
    /// From the order of a save until it counts, seconds.
    pub fn committed_after_s(&self) -> f64 {
        self.durable_s.max(self.stall_s)
    }

    /// The interval, lengthened if one save in flight requires it: training between two orders, seconds.
    pub fn feasible(&self, interval_s: f64) -> f64 {
        interval_s.max(self.committed_after_s() - self.stall_s)
    }
}

/// Notices before a machine is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Notice {
    /// The share of losses that are announced, 0 to 1.
    pub share: f64,
    /// How long before, seconds.
    pub lead_s: f64,
}

impl Notice {
    /// No loss is announced.
    pub const NONE: Self = Self { share: 0.0, lead_s: 0.0 };

    /// Whether a save ordered at the notice is durable before the machine is taken.
    pub fn fits(&self, costs: &Costs) -> bool {
        costs.committed_after_s() <= self.lead_s
    }

    /// The time from the end of training to the loss of the machine, seconds: two saves, one of which may have begun a
    /// moment ago, if the notice leaves time for them. It is the agent's reserve (`notice.spare_time = "train"`).
    pub fn reserve_s(&self, costs: &Costs) -> f64 {
        (2.0 * costs.committed_after_s()).max(LEAST_RESERVE_S).min(self.lead_s)
    }
}

/// How long machines live: a mixture of two exponential distributions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lives {
    /// Weight and mean (seconds) of each part; the weights sum up to 1.
    parts: [(f64, f64); 2],
}

impl Lives {
    /// Exponential lives of this mean: the hazard is the same at any age.
    pub const fn exponential(mean_s: f64) -> Self {
        Self { parts: [(1.0, mean_s), (0.0, mean_s)] }
    }

    /// Lives as recorded on 202 spot machines (p3.2xlarge, four zones, April 2023): many die young, a few grow old.
    /// Median 0.32 of the mean and coefficient of variation 1.8, as a mean of 2 h with a median of 0.64 h.
    pub const fn spot(mean_s: f64) -> Self {
        Self { parts: [(0.6865, 0.284_85 * mean_s), (0.3135, 2.566_037 * mean_s)] }
    }

    /// The mean, seconds.
    pub fn mean_s(&self) -> f64 {
        self.parts.iter().map(|(weight, mean)| weight * mean).sum()
    }

    /// The share of machines that live longer than this.
    pub fn survival(&self, age_s: f64) -> f64 {
        self.parts.iter().map(|(weight, mean)| weight * (-age_s / mean).exp()).sum()
    }

    /// The life that corresponds to two uniform random numbers from [0, 1), seconds.
    pub fn draw(&self, part: f64, within: f64) -> f64 {
        let (_, mean) = if part < self.parts[0].0 { self.parts[0] } else { self.parts[1] };
        -mean * (1.0 - within).ln()
    }
}

/// The expected share of paid time that is training which counts, for saves every `interval_s` seconds of training (or
/// back to back, if that is longer). `idle_s` is paid waiting for each life, seconds: 0 on one node.
pub fn goodput(lives: &Lives, costs: &Costs, notice: Notice, interval_s: f64, idle_s: f64) -> f64 {
    // A life begins without a save in flight, so its first save is not delayed.
    let (first, interval) = (interval_s, costs.feasible(interval_s));
    let segment = interval + costs.stall_s;
    let lag = costs.committed_after_s() - costs.stall_s;
    let drained = if notice.fits(costs) { notice.share } else { 0.0 };
    let kept = |&(weight, mean): &(f64, f64)| {
        let killed = (-(costs.restart_s + first + costs.stall_s + lag) / mean).exp()
            * (first + interval / (segment / mean).exp_m1());
        // All training up to the drain counts: its time without stalls.
        let later = (interval / mean).neg_exp_m1() / (segment / mean).neg_exp_m1();
        let trained = (first / mean).neg_exp_m1() + (-(first + costs.stall_s) / mean).exp() * later;
        let until_drain = mean * (-(costs.restart_s + notice.reserve_s(costs)) / mean).exp() * trained;
        weight * ((1.0 - drained) * killed + drained * until_drain)
    };
    lives.parts.iter().filter(|(weight, _)| *weight > 0.0).map(kept).sum::<f64>() / (lives.mean_s() + idle_s)
}

trait NegExpM1 {
    /// 1 − e^(−x), exact for small x.
    fn neg_exp_m1(self) -> Self;
}

impl NegExpM1 for f64 {
    fn neg_exp_m1(self) -> Self {
        -(-self).exp_m1()
    }
}

/// The interval from `shortest_s` to `longest_s` with the most of `value`: the best of `points` spread evenly by ratio,
/// then golden sections between its neighbours.
pub fn best_interval(shortest_s: f64, longest_s: f64, points: u32, mut value: impl FnMut(f64) -> f64) -> f64 {
    let (low, high) = (shortest_s.ln(), longest_s.max(shortest_s).ln());
    let step = (high - low) / f64::from(points.max(2) - 1);
    let grid = (0..points.max(2)).map(|i| low + step * f64::from(i));
    let (_, peak) = grid.fold((f64::MIN, low), |best, x| {
        let found = value(x.exp());
        if found > best.0 { (found, x) } else { best }
    });
    let (mut a, mut b) = ((peak - step).max(low), (peak + step).min(high));
    let golden = 0.618_033_988_749_895;
    let (mut x, mut y) = (b - golden * (b - a), a + golden * (b - a));
    let (mut at_x, mut at_y) = (value(x.exp()), value(y.exp()));
    while b - a > 1e-3 {
        if at_x >= at_y {
            (b, y, at_y) = (y, x, at_x);
            x = b - golden * (b - a);
            at_x = value(x.exp());
        } else {
            (a, x, at_x) = (x, y, at_y);
            y = a + golden * (b - a);
            at_y = value(y.exp());
        }
    }
    f64::midpoint(a, b).exp()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::cadence::daly;

    fn synchronous(stall_s: f64, restart_s: f64) -> Costs {
        Costs { stall_s, durable_s: stall_s, restart_s }
    }

    /// Daly's published optima (5-minute dumps: 117, 57 and 9.1 minutes) are the formula's, and the complete model
    /// agrees: its own best interval is the formula's, and nothing is lost by taking the formula's.
    #[test]
    fn the_complete_model_has_its_best_at_dalys_published_optima() {
        for (mtbf_min, published) in [(24.0 * 60.0, 117.0), (6.0 * 60.0, 57.0), (15.0, 9.1)] {
            let (lives, costs) = (Lives::exponential(60.0 * mtbf_min), synchronous(300.0, 300.0));
            let at = |interval| goodput(&lives, &costs, Notice::NONE, interval, 0.0);
            let best = best_interval(1.0, 86_400.0, 60, at);
            let formula = daly(300.0, 60.0 * mtbf_min);
            println!(
                "M {mtbf_min} min: published {published}, formula {:.2}, best {:.2} min",
                formula / 60.0,
                best / 60.0
            );
            for found in [best / 60.0, formula / 60.0] {
                assert!((found / published - 1.0).abs() < 0.02, "{found} instead of {published}");
            }
            assert!(at(formula) > 0.9999 * at(best), "{} and {}", at(formula), at(best));
        }
    }

    /// T = M e^(R/M) (e^((τ+δ)/M) − 1) / τ, computed by hand for M = 2 h, δ = 10 s, R = 180 s: 0.925 at 373 s, 0.749 at
    /// an hour.
    #[test]
    fn the_complete_model_gives_published_efficiencies() {
        let at = |mtbf_h: f64, costs, interval| {
            goodput(&Lives::exponential(3600.0 * mtbf_h), &costs, Notice::NONE, interval, 0.0)
        };
        let rows = [
            (at(2.0, synchronous(10.0, 180.0), 373.0), 0.925),
            (at(2.0, synchronous(10.0, 180.0), 3600.0), 0.749),
            (at(24.0, synchronous(10.0, 180.0), 1308.0), 0.983),
            (at(2.0, synchronous(60.0, 300.0), 890.0), 0.841),
        ];
        for (found, expected) in rows {
            assert!((found - expected).abs() < 6e-4, "{found} instead of {expected}");
        }
    }

    #[test]
    fn spot_lives_match_the_recorded_ones() {
        let lives = Lives::spot(2.0);
        let (mut mean, mut square) = (0.0, 0.0);
        for (weight, part) in lives.parts {
            mean += weight * part;
            square += 2.0 * weight * part * part;
        }
        let cv = (square / (mean * mean) - 1.0).sqrt();
        assert!((mean - 2.0).abs() < 1e-3 && (lives.mean_s() - mean).abs() < 1e-12, "{mean}");
        assert!((cv - 1.8).abs() < 0.005, "{cv}");
        assert!((lives.survival(0.64) - 0.5).abs() < 0.003, "{}", lives.survival(0.64));
        assert!((lives.survival(12.0) - 0.03).abs() < 0.005, "3 % grew older than 12 h");
    }

    /// The best interval grows as notices save more losses: sqrt(2 δ M / p) for a share p of unannounced losses.
    #[test]
    fn the_best_interval_with_notices_follows_from_the_unannounced_losses() {
        let (lives, costs) = (Lives::exponential(86_400.0), synchronous(5.0, 60.0));
        for share in [0.0, 0.5, 0.9] {
            let best =
                best_interval(1.0, 86_400.0, 60, |i| goodput(&lives, &costs, Notice { share, lead_s: 30.0 }, i, 0.0));
            let expected = daly(5.0, 86_400.0 / (1.0 - share));
            assert!((best / expected - 1.0).abs() < 0.02, "{best} instead of {expected} with {share}");
        }
        let short = Notice { share: 1.0, lead_s: 4.9 };
        let at = |notice| goodput(&lives, &costs, notice, 900.0, 0.0);
        assert_eq!(at(short), at(Notice::NONE), "a notice that no save fits into saves nothing");
    }

    proptest! {
        #[test]
        fn goodput_is_a_share_and_falls_with_every_cost(
            mean in 60.0..1e7_f64, stall in 0.0..300.0_f64, durable in 0.0..600.0_f64, restart in 0.0..3600.0_f64,
            interval in 1.0..86_400.0_f64,
            share in 0.0..=1.0_f64,
            lead in 0.0..300.0_f64,
            more in 1.0..500.0_f64,
            spot: bool,
        ) {
            let lives = if spot { Lives::spot(mean) } else { Lives::exponential(mean) };
            let costs = Costs { stall_s: stall, durable_s: durable, restart_s: restart };
            let notice = Notice { share, lead_s: lead };
            // Lives long enough for all of these costs: saves that can't follow each other so fast would change the
            // interval, too.
            let interval = interval + stall + durable + 2.0 * more;
            let at = |costs| goodput(&lives, &costs, notice, interval, 0.0);
            let found = at(costs);
            prop_assert!((0.0..=1.0).contains(&found), "{found}");
            let dearer = [
                Costs { restart_s: restart + more, ..costs },
                Costs { stall_s: stall + more, durable_s: durable + more, ..costs },
                Costs { durable_s: durable + more, ..costs },
            ];
            for dearer in dearer.into_iter().filter(|dearer| notice.fits(dearer) == notice.fits(&costs)) {
                prop_assert!(at(dearer) <= found + 1e-12, "{dearer:?}");
            }
            prop_assert!(goodput(&lives, &costs, notice, interval, more) <= found);
        }
    }
}
