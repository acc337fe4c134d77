//! From inputs to figures: the rows, and the result of each.

use super::{Baseline, ELASTIC, HOUR, Inputs, Lifetimes, Machines, Policy, Report, Row};
use crate::{
    goodput::{self, Costs, Estimate, Fleet, Gang, Job, Lives, Notice, Seen, Unfinished},
    random::SplitMix64,
    snapshot::cadence::{self, Measured},
};

/// Trials of one interval in the search for the best one by simulation.
const SEARCH_TRIALS: u32 = 16;

/// The inputs, and the machines built from them.
pub(super) struct Study {
    pub inputs: Inputs,
    pub machines: Machines,
}

impl Study {
    fn costs(&self) -> Costs {
        let Inputs { stall_s, durable_s, restart_s, .. } = &self.inputs;
        Costs { stall_s: stall_s.value, durable_s: durable_s.value, restart_s: restart_s.value }
    }

    fn job(&self, notice: Notice) -> Job {
        Job { work_s: self.inputs.work_s.value, nodes: self.inputs.nodes, costs: self.costs(), notice }
    }

    /// The time until the next save. `auto` is the agent's own function, with what the agent knows at that moment: the
    /// time that a save takes from training, and the losses that were not announced. The former includes the slowdown
    /// of steps if the input gives it; a run's journal does not record it.
    fn until_next_save(&self, policy: Policy, seen: &Seen) -> f64 {
        let Policy::Fixed(interval_s) = policy else {
            let known = |value: f64| (seen.saves > 0).then_some(value);
            let (save_cost_s, durable_s) = (known(self.inputs.stall_s.value), known(self.inputs.durable_s.value));
            let measured = Measured { save_cost_s, durable_s, trained_s: seen.up_s, interruptions: seen.lossy };
            return cadence::auto_interval(&measured).as_secs_f64();
        };
        interval_s
    }

    fn play(&self, policy: Policy, notice: Notice, trials: u32) -> Result<Estimate, Unfinished> {
        let (job, seed) = (self.job(notice), self.inputs.seed);
        let next = |seen: &Seen| self.until_next_save(policy, seen);
        match &self.machines {
            Machines::Random { lives, wait_s, together, .. } => {
                if let Policy::Elastic(elastic) = policy {
                    let fleet = Fleet { lives: *lives, wait_s: *wait_s, together: *together };
                    return goodput::simulate_elastic(&job, &elastic, &fleet, next, trials, seed);
                }
                let gang = |trial| {
                    let seed = SplitMix64::named(seed, &format!("machines of trial {trial}")).next_u64();
                    Gang::new(*lives, job.nodes, *wait_s, *together, seed)
                };
                goodput::simulate(&job, next, gang, trials, seed)
            }
            Machines::Recorded(trace) => {
                let trials = u32::try_from(trace.lives()).unwrap_or(u32::MAX).min(trials);
                goodput::simulate(&job, next, |trial| trace.machines(trial, trials), trials, seed)
            }
        }
    }

    /// In closed form, where there is one: for one node, and for several whose lives have no memory.
    fn model(&self, interval_s: f64, notice: Notice) -> Option<f64> {
        let Machines::Random { lives, lifetimes, wait_s, together } = &self.machines else { return None };
        let nodes = f64::from(self.inputs.nodes);
        let job = match (self.inputs.nodes, lifetimes) {
            (1, _) => *lives,
            (_, Lifetimes::Exponential) => Lives::exponential(lives.mean_s() / nodes),
            _ => return None,
        };
        // Either the others wait for one, or all of them for the last, whose wait is the mean times 1 + 1/2 + … + 1/n.
        let harmonic: f64 = (1..=self.inputs.nodes).map(|k| 1.0 / f64::from(k)).sum();
        let idle_s = wait_s * ((1.0 - together) * (nodes - 1.0) / nodes + together * (harmonic - 1.0));
        Some(goodput::goodput(&job, &self.costs(), notice, interval_s, idle_s))
    }

    /// The fixed interval with the most goodput, from one second to ten mean lives.
    fn best(&self, notice: Notice) -> f64 {
        let life_s = match &self.machines {
            Machines::Random { lives, .. } => lives.mean_s() / f64::from(self.inputs.nodes),
            Machines::Recorded(trace) => trace.mean_life_s(),
        };
        let longest = (10.0 * life_s).min(self.inputs.work_s.value);
        let shortest = longest.min(1.0);
        if self.model(shortest, notice).is_some() {
            return goodput::best_interval(shortest, longest, 60, |s| self.model(s, notice).unwrap_or(0.0));
        }
        let played = |interval| self.play(Policy::Fixed(interval), notice, SEARCH_TRIALS.min(self.inputs.trials));
        goodput::best_interval(shortest, longest, 24, |interval| played(interval).map_or(0.0, |found| found.goodput))
    }

    /// The same job on machines that stay.
    fn undisturbed(&self) -> Result<Estimate, Unfinished> {
        let next = |seen: &Seen| self.until_next_save(Policy::Auto, seen);
        let calm = |_| Gang::new(Lives::exponential(1e15), self.inputs.nodes, 0.0, 0.0, self.inputs.seed);
        goodput::simulate(&self.job(Notice::NONE), next, calm, 1, self.inputs.seed)
    }

    fn row(&self, name: &str, policy: Policy, notice: Notice, on_demand: Option<f64>) -> Row {
        let mut row = Row {
            policy: name.to_owned(),
            notice: notice.share > 0.0,
            interval_s: self.until_next_save(policy, &Seen { saves: 1, up_s: 0.0, lossy: 0 }),
            goodput: None,
            goodput_error: None,
            model_goodput: match policy {
                Policy::Fixed(interval_s) => self.model(interval_s, notice),
                Policy::Auto | Policy::Elastic(_) => None,
            },
            wall_s: None,
            interruptions: None,
            lost_s: None,
            node_hours: None,
            cost: None,
            saving_against_on_demand: None,
            never: None,
        };
        match self.play(policy, notice, self.inputs.trials) {
            Ok(found) => {
                let node_hours = found.paid_node_s / HOUR;
                let cost = node_hours * self.inputs.spot_price;
                if matches!(policy, Policy::Auto | Policy::Elastic(_)) {
                    row.interval_s = found.interval_s;
                }
                row.goodput = Some(found.goodput);
                row.goodput_error = Some(found.goodput_error);
                row.wall_s = Some(found.wall_s);
                row.interruptions = Some(found.interruptions);
                row.lost_s = Some(found.lost_s);
                row.node_hours = Some(node_hours);
                row.cost = Some(cost);
                row.saving_against_on_demand = on_demand.map(|baseline| 1.0 - cost / baseline);
            }
            Err(why) => row.never = Some(why.to_string()),
        }
        row
    }

    /// All rows; `configured` is a further interval to compare with the best one, seconds.
    pub fn report(self, configured: Option<f64>) -> Report {
        let stays = self.undisturbed().ok();
        let baseline = |name, price, found: &Estimate| {
            let node_hours = found.paid_node_s / HOUR;
            Baseline { name, price, goodput: found.goodput, wall_s: found.wall_s, node_hours, cost: node_hours * price }
        };
        let prices = [("on-demand", Some(self.inputs.on_demand_price)), ("reserved", self.inputs.reserved_price)];
        let baselines: Vec<Baseline> = stays
            .iter()
            .flat_map(|found| prices.map(|(name, price)| Some(baseline(name, price?, found))))
            .flatten()
            .collect();
        let on_demand = baselines.first().map(|baseline| baseline.cost);
        let told = Notice { share: self.inputs.notice_share.value, lead_s: self.inputs.notice_s };
        let best_s = self.best(Notice::NONE);
        let mut spot = Vec::new();
        for notice in [Notice::NONE, told].into_iter().take(if told.share > 0.0 { 2 } else { 1 }) {
            let best = if notice.share > 0.0 { self.best(notice) } else { best_s };
            spot.push(self.row("best fixed", Policy::Fixed(best), notice, on_demand));
            spot.push(self.row("auto", Policy::Auto, notice, on_demand));
            if let Some(interval_s) = configured {
                spot.push(self.row("configured", Policy::Fixed(interval_s), notice, on_demand));
            }
            spot.push(self.row("every 2h", Policy::Fixed(2.0 * HOUR), notice, on_demand));
            if let Some(elastic) = self.inputs.elastic {
                spot.push(self.row(ELASTIC, Policy::Elastic(elastic), notice, on_demand));
            }
        }
        // Several nodes that die young lose the job more often than their mean lives suggest: there the simulated
        // result counts.
        let job_mtbf_s =
            match (&self.machines, self.model(1.0, Notice::NONE), spot[1].node_hours, spot[1].interruptions) {
                (Machines::Random { .. }, None, Some(hours), Some(losses)) if losses > 0.0 => {
                    hours * HOUR / f64::from(self.inputs.nodes) / losses
                }
                (Machines::Random { lives, .. }, ..) => lives.mean_s() / f64::from(self.inputs.nodes),
                (Machines::Recorded(trace), ..) => trace.mean_life_s(),
            };
        let daly_s = cadence::daly(self.inputs.stall_s.value.max(1e-3), job_mtbf_s);
        let ratio = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a / b);
        let of_formula = match self.model(daly_s, Notice::NONE) {
            Some(model) => ratio(Some(model), spot[0].model_goodput),
            None => ratio(
                self.play(Policy::Fixed(daly_s), Notice::NONE, self.inputs.trials).ok().map(|found| found.goodput),
                spot[0].goodput,
            ),
        };
        Report {
            job_mtbf_s,
            daly_s,
            best_s,
            // If hardly any of a life is left, no interval is good, and no share means anything.
            daly_share_of_best: of_formula.filter(|_| spot[0].goodput.is_some()),
            auto_share_of_best: ratio(spot[1].goodput, spot[0].goodput),
            break_even_spot_price: ratio(on_demand, spot[1].node_hours),
            baselines,
            spot,
            inputs: self.inputs,
        }
    }
}
