//! `trainer simulate`

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{
    args::{JsonArg, StoreArg},
    history,
    output::{self, Table},
    run, store,
};
use crate::{
    config::{self, Cadence, Machine, RunConfig, Sources},
    error::{Error, Kind, Result},
    goodput::{self, Costs, Estimate, Gang, Job, Lives, Notice, Observed, Seen, Trace, Unfinished},
    ids::RunId,
    random::SplitMix64,
    report::human,
    snapshot::cadence::{self, Measured},
};

const HOUR: f64 = 3600.0;
/// The longest time that is accepted anywhere, days.
const MOST_DAYS: f64 = 3650.0;
/// Trials of one interval while the best one is looked for by playing.
const SEARCH_TRIALS: u32 = 16;
/// What is simulated where nothing else is known.
const DEFAULT: Costs = Costs { stall_s: 1.0, durable_s: 10.0, restart_s: 120.0 };
const DEFAULT_WORK_S: f64 = 168.0 * HOUR;
/// The median discount of 53 GPU types in us-east-1 was 63 % (Spot Advisor's data of 2025-06-28).
const DEFAULT_SPOT_PRICE: f64 = 0.37;

/// How long machines live, as a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Lifetimes {
    /// Memoryless, as the formulas for the best interval assume
    Exponential,
    /// As recorded on spot machines: median 0.32 of the mean, coefficient of variation 1.8
    Spot,
}

/// Expected goodput, time and cost on machines that vanish
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer simulate --lifetimes spot --mtbf 2h --stall 1s --durable 10s --restart 2m
  trainer simulate --trace us-east-1a.json --nodes 4 --work 10d --on-demand-price 3.06 --spot-price 1.10
  trainer simulate --run-id first --store s3://bucket/runs --spot-price 1.10 --on-demand-price 3.06

A trace is JSON, {\"metadata\":{\"gap_seconds\":60},\"data\":[1,0,...]} (machines that could be had), or CSV, a line \
`milliseconds,add|remove,node` for each change.")]
pub struct Simulate {
    /// A run's settings: its checkpoint.every is simulated, too, and with --step-time its train.steps are the work
    config: Option<PathBuf>,
    /// Take costs, losses, steps and cadence from this run's journal, where no flag gives them
    #[arg(long, env = "TRAINER_RUN_ID", value_name = "ID", hide_env_values = true)]
    run_id: Option<RunId>,
    #[command(flatten)]
    store: StoreArg,
    /// Replay recorded machines instead of random lives
    #[arg(long, value_name = "FILE", conflicts_with_all = ["mtbf", "lifetimes", "together", "wait"])]
    trace: Option<PathBuf>,
    /// Mean life of one node [default: the run's, or 2h]
    #[arg(long, value_name = "D", value_parser = positive)]
    mtbf: Option<f64>,
    /// How lives are spread around their mean
    #[arg(long, value_enum, default_value_t = Lifetimes::Exponential)]
    lifetimes: Lifetimes,
    /// Nodes that train together; when one is lost, all wait for its replacement
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    nodes: u32,
    /// Share of losses that take all nodes at once, 0 to 1
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = share)]
    together: f64,
    /// Mean wait for a machine
    #[arg(long, value_name = "D", default_value = "5m", value_parser = seconds)]
    wait: f64,
    /// Time that a save takes from training [default: the run's, or 1s]
    #[arg(long, value_name = "D", value_parser = seconds)]
    stall: Option<f64>,
    /// From the order of a save until it counts [default: the run's, or 10s]
    #[arg(long, value_name = "D", value_parser = seconds)]
    durable: Option<f64>,
    /// From a machine that is there to its first step [default: the run's, or 2m]
    #[arg(long, value_name = "D", value_parser = seconds)]
    restart: Option<f64>,
    /// How long before a machine is taken it is told
    #[arg(long, value_name = "D", default_value = "2m", value_parser = seconds)]
    notice: f64,
    /// Share of losses that are told before, 0 to 1 [default: the run's, or 1]
    #[arg(long, value_name = "P", value_parser = share)]
    notice_share: Option<f64>,
    /// Training time of the job without saves and losses [default: steps x step time, or 7d]
    #[arg(long, value_name = "D", value_parser = positive)]
    work: Option<f64>,
    /// Time of one step [default: the run's]
    #[arg(long, value_name = "D", value_parser = positive)]
    step_time: Option<f64>,
    /// A cadence to hold against the best one: 30m, or "500 steps" [default: CONFIG's or the run's]
    #[arg(long, value_name = "CADENCE", value_parser = every)]
    every: Option<Cadence>,
    /// Price of a node for an hour that is never taken away
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = price)]
    on_demand_price: f64,
    /// Price of a spot node for an hour; 0.37 is the median of GPU types in us-east-1, June 2025, in on-demand prices
    #[arg(long, value_name = "X", default_value_t = DEFAULT_SPOT_PRICE, value_parser = price)]
    spot_price: f64,
    /// Price of a reserved node for an hour
    #[arg(long, value_name = "X", value_parser = price)]
    reserved_price: Option<f64>,
    /// Times that each row is played
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    trials: u32,
    /// The same seed gives the same figures
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    json: JsonArg,
}

fn seconds(text: &str) -> Result<f64, String> {
    config::parse_duration(text)
        .map(|time| time.as_secs_f64())
        .filter(|time| *time <= MOST_DAYS * 24.0 * HOUR)
        .ok_or_else(|| format!("expected a duration such as 250ms, 90s or 1h30m, at most {MOST_DAYS}d"))
}

fn positive(text: &str) -> Result<f64, String> {
    seconds(text).and_then(|time| if time > 0.0 { Ok(time) } else { Err("expected more than 0s".into()) })
}

fn share(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    value.ok_or_else(|| "expected a share from 0 to 1".into())
}

fn price(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|price: &f64| *price > 0.0 && *price <= 1e6);
    value.ok_or_else(|| "expected a price more than 0 and at most 1000000".into())
}

fn every(text: &str) -> Result<Cadence, String> {
    config::parse_cadence(text).ok_or_else(|| "expected \"auto\", \"500 steps\", or a duration of at least 1s".into())
}

/// A value and where it is from.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Input<T> {
    value: T,
    from: String,
}

impl<T> Input<T> {
    /// The flag's value, else the run's, else the default.
    fn pick(flag: Option<T>, run: Option<(T, String)>, default: T) -> Self {
        match (flag, run) {
            (Some(value), _) => Self { value, from: "given".into() },
            (None, Some((value, from))) => Self { value, from },
            (None, None) => Self { value: default, from: "default".into() },
        }
    }
}

/// Everything that the figures follow from.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Inputs {
    /// Mean time from one loss of the job to the next, seconds.
    job_mtbf_s: f64,
    machines: String,
    nodes: u32,
    stall_s: Input<f64>,
    durable_s: Input<f64>,
    restart_s: Input<f64>,
    notice_s: f64,
    notice_share: Input<f64>,
    notice_fits: bool,
    work_s: Input<f64>,
    on_demand_price: f64,
    spot_price: f64,
    reserved_price: Option<f64>,
    trials: u32,
    seed: u64,
}

/// Where machines come from.
enum Machines {
    /// Mean life of one node, its distribution's name.
    Random {
        lives: Lives,
        lifetimes: Lifetimes,
        wait_s: f64,
        together: f64,
    },
    Recorded(Trace),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Policy {
    Auto,
    Fixed(f64),
}

/// One policy on spot machines.
#[derive(Debug, Serialize)]
struct Row {
    policy: String,
    /// Whether losses are announced as the inputs say, or not at all.
    notice: bool,
    interval_s: f64,
    goodput: Option<f64>,
    goodput_error: Option<f64>,
    /// In closed form, where there is one.
    model_goodput: Option<f64>,
    wall_s: Option<f64>,
    interruptions: Option<f64>,
    lost_s: Option<f64>,
    node_hours: Option<f64>,
    cost: Option<f64>,
    /// 1 less `cost` over the cost of `on-demand`; negative where spot does not pay.
    saving_against_on_demand: Option<f64>,
    /// Why there are no figures.
    never: Option<String>,
}

/// Machines that are not taken away.
#[derive(Debug, Serialize)]
struct Baseline {
    name: &'static str,
    price: f64,
    goodput: f64,
    wall_s: f64,
    node_hours: f64,
    cost: f64,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    inputs: Inputs,
    /// Daly's formula for the stall and the job's mean time between losses, seconds.
    daly_s: f64,
    /// The best interval without notice, seconds, and what the formula's reaches of its goodput.
    best_s: f64,
    daly_share_of_best: Option<f64>,
    /// What `checkpoint.every = "auto"` reaches of the best fixed interval's goodput, without notice.
    auto_share_of_best: Option<f64>,
    baselines: Vec<Baseline>,
    spot: Vec<Row>,
    /// Spot costs as much as on-demand at this price, with the automatic interval and no notice.
    break_even_spot_price: Option<f64>,
}

impl Simulate {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let report = self.report()?;
        output::emit(&if self.json.json { output::json_lines([&report])? } else { report.text() })?;
        Ok(ExitCode::SUCCESS)
    }

    fn report(&self) -> Result<Report> {
        let run = self.run_id.as_ref().map(|id| self.read(id)).transpose()?;
        let configured = match &self.config {
            Some(path) => Some(load(path)?),
            None => run.as_ref().map(|(_, config)| config.clone()),
        };
        let observed = run.map(|(observed, _)| observed);
        let step_s = self.step_time.or_else(|| observed.and_then(|observed| observed.step_s));
        let interval = match self.every.or_else(|| configured.as_ref().map(|config| config.checkpoint.every)) {
            None | Some(Cadence::Auto) => None,
            Some(Cadence::Time(time)) => Some(time.as_secs_f64()),
            Some(Cadence::Steps(steps)) => Some(
                steps as f64
                    * step_s.ok_or_else(|| {
                        Error::new(
                            Kind::Usage,
                            format!("a save every {steps} steps: how long a step takes is not known"),
                        )
                        .with_hint("give --step-time, or a run that has committed twice with --run-id")
                    })?,
            ),
        };
        let machines = self.machines(observed.as_ref())?;
        let inputs = self.inputs(&machines, observed.as_ref(), configured.as_ref(), step_s);
        Ok(Study { inputs, machines: machines.0 }.report(interval))
    }

    /// What the journal of a run tells, and its configuration.
    fn read(&self, id: &RunId) -> Result<(Observed, RunConfig)> {
        let root = self.store.open()?;
        let state = store::block_on(history::read(&root, id))?;
        Ok((Observed::of(&state), history::config(&state)))
    }

    /// Machines and what they are, in words.
    fn machines(&self, observed: Option<&Observed>) -> Result<(Machines, String)> {
        if let Some(path) = &self.trace {
            let trace = Trace::read(path, self.nodes)?;
            let (lives, share, mean) =
                (trace.lives() as u64, 100.0 * trace.up_share(), human::seconds(trace.mean_life_s()));
            let said = format!(
                "{}: {}, mean {mean}, up {share:.1} % of the time; repeated, its end counts as a loss",
                path.display(),
                if lives == 1 { "1 life".into() } else { format!("{lives} lives") }
            );
            return Ok((Machines::Recorded(trace), said));
        }
        let seen = observed.map(|observed| {
            let Observed { trained_s, interruptions, .. } = *observed;
            let mtbf = Measured { trained_s, interruptions, ..Measured::NOTHING }.mtbf_s();
            let losses = if interruptions == 1 { "1 loss".into() } else { format!("{interruptions} losses") };
            (mtbf, format!("the run: {losses} in {}, and one in 2h assumed before", human::seconds(trained_s)))
        });
        let Input { value: mean_s, from } = Input::pick(self.mtbf, seen, cadence::PRIOR_MTBF_S);
        let (lives, shape) = match self.lifetimes {
            Lifetimes::Exponential => (Lives::exponential(mean_s), "exponential"),
            Lifetimes::Spot => (Lives::spot(mean_s), "as recorded on spot machines (median 0.32 of the mean, CV 1.8)"),
        };
        let together = if self.nodes > 1 {
            format!("; {:.0} % of the losses take all nodes", 100.0 * self.together)
        } else {
            String::new()
        };
        let (mean, wait) = (human::seconds(mean_s), human::seconds(self.wait));
        let said = format!("a node lives {mean} on average ({from}), {shape}; mean wait for another {wait}{together}");
        let (wait_s, together) = (self.wait, self.together);
        Ok((Machines::Random { lives, lifetimes: self.lifetimes, wait_s, together }, said))
    }

    fn inputs(
        &self,
        (machines, said): &(Machines, String),
        observed: Option<&Observed>,
        configured: Option<&RunConfig>,
        step_s: Option<f64>,
    ) -> Inputs {
        let run = |value: fn(&Observed) -> Option<f64>, what: &str| {
            observed.and_then(|observed| Some((value(observed)?, format!("the run: {what}"))))
        };
        let stall_s =
            Input::pick(self.stall, run(|o| o.stall_s, "median; slower steps are not in it"), DEFAULT.stall_s);
        let durable_s = Input::pick(self.durable, run(|o| o.durable_s, "median"), DEFAULT.durable_s);
        let after = "median, from the journal's record on; the machine's boot is not in it";
        let restart_s = Input::pick(self.restart, run(|o| o.restart_s, after), DEFAULT.restart_s);
        let notice_share = Input::pick(self.notice_share, run(Observed::announced, "losses without lost steps"), 1.0);
        let steps = configured.zip(step_s).map(|(config, step_s)| {
            let steps = config.train.steps;
            (steps as f64 * step_s, format!("{steps} steps of {}", human::seconds(step_s)))
        });
        let costs = Costs { stall_s: stall_s.value, durable_s: durable_s.value, restart_s: restart_s.value };
        Inputs {
            job_mtbf_s: match machines {
                Machines::Random { lives, .. } => lives.mean_s() / f64::from(self.nodes),
                Machines::Recorded(trace) => trace.mean_life_s(),
            },
            machines: said.clone(),
            nodes: self.nodes,
            notice_s: self.notice,
            notice_fits: Notice { share: 1.0, lead_s: self.notice }.fits(&costs),
            work_s: Input::pick(self.work, steps, DEFAULT_WORK_S),
            on_demand_price: self.on_demand_price,
            spot_price: self.spot_price,
            reserved_price: self.reserved_price,
            trials: self.trials,
            seed: self.seed,
            stall_s,
            durable_s,
            restart_s,
            notice_share,
        }
    }
}

fn load(path: &std::path::Path) -> Result<RunConfig> {
    let working_directory = &store::working_directory()?;
    let machine = Machine::detect();
    Ok(config::load(&Sources {
        file: Some(path),
        flags: vec![],
        set: &[],
        working_directory,
        machine,
        fetch: &run::fetch,
    })?)
}

/// The inputs, and machines made from them.
struct Study {
    inputs: Inputs,
    machines: Machines,
}

impl Study {
    fn costs(&self) -> Costs {
        let Inputs { stall_s, durable_s, restart_s, .. } = &self.inputs;
        Costs { stall_s: stall_s.value, durable_s: durable_s.value, restart_s: restart_s.value }
    }

    fn job(&self, notice: Notice) -> Job {
        Job { work_s: self.inputs.work_s.value, nodes: self.inputs.nodes, costs: self.costs(), notice }
    }

    /// The time until the next save. `auto` is the agent's own function, with what the agent knows at that moment.
    fn until_next_save(&self, policy: Policy, seen: &Seen) -> f64 {
        let Policy::Fixed(interval_s) = policy else {
            let known = |value: f64| (seen.saves > 0).then_some(value);
            let (save_cost_s, durable_s) = (known(self.inputs.stall_s.value), known(self.inputs.durable_s.value));
            let measured = Measured { save_cost_s, durable_s, trained_s: seen.up_s, interruptions: seen.interruptions };
            return cadence::auto_interval(&measured).as_secs_f64();
        };
        interval_s
    }

    fn play(&self, policy: Policy, notice: Notice, trials: u32) -> Result<Estimate, Unfinished> {
        let (job, seed) = (self.job(notice), self.inputs.seed);
        let next = |seen: &Seen| self.until_next_save(policy, seen);
        match &self.machines {
            Machines::Random { lives, wait_s, together, .. } => {
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
        // The others wait for one; or each of all for the last, whose wait is the mean times 1 + 1/2 + … + 1/n.
        let harmonic: f64 = (1..=self.inputs.nodes).map(|k| 1.0 / f64::from(k)).sum();
        let idle_s = wait_s * ((1.0 - together) * (nodes - 1.0) / nodes + together * (harmonic - 1.0));
        Some(goodput::goodput(&job, &self.costs(), notice, interval_s, idle_s))
    }

    /// The fixed interval with the most goodput, from one second to ten mean lives.
    fn best(&self, notice: Notice) -> f64 {
        let longest = (10.0 * self.inputs.job_mtbf_s).min(self.inputs.work_s.value);
        let shortest = self.costs().feasible(1.0);
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
            interval_s: self.until_next_save(policy, &Seen { saves: 1, up_s: 0.0, interruptions: 0 }),
            goodput: None,
            goodput_error: None,
            model_goodput: match policy {
                Policy::Fixed(interval_s) => self.model(interval_s, notice),
                Policy::Auto => None,
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
                if policy == Policy::Auto {
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

    fn report(self, configured: Option<f64>) -> Report {
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
        }
        let daly_s = cadence::daly(self.inputs.stall_s.value.max(1e-3), self.inputs.job_mtbf_s);
        let ratio = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a / b);
        let of_formula = match self.model(daly_s, Notice::NONE) {
            Some(model) => ratio(Some(model), spot[0].model_goodput),
            None => ratio(
                self.play(Policy::Fixed(daly_s), Notice::NONE, self.inputs.trials).ok().map(|found| found.goodput),
                spot[0].goodput,
            ),
        };
        Report {
            daly_s,
            best_s,
            daly_share_of_best: of_formula,
            auto_share_of_best: ratio(spot[1].goodput, spot[0].goodput),
            break_even_spot_price: ratio(on_demand, spot[1].node_hours),
            baselines,
            spot,
            inputs: self.inputs,
        }
    }
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

impl Report {
    fn text(&self) -> String {
        let Inputs { stall_s, durable_s, restart_s, notice_share, work_s, nodes, .. } = &self.inputs;
        let said = |input: &Input<f64>| format!("{} ({})", human::seconds(input.value), input.from);
        let fits = if self.inputs.notice_fits { "a save fits" } else { "no save fits: it saves nothing" };
        let mut lines = vec![
            ("machines", self.inputs.machines.clone()),
            ("save", format!("training stands still {}, durable after {}", said(stall_s), said(durable_s))),
            ("restart", said(restart_s)),
            (
                "notice",
                format!(
                    "{} ahead ({fits}), of {:.0} % of the losses ({}); paid until the machine is taken",
                    human::seconds(self.inputs.notice_s),
                    100.0 * notice_share.value,
                    notice_share.from
                ),
            ),
            ("work", format!("{} on {}", said(work_s), human::plural(u64::from(*nodes), "node"))),
        ];
        let reserved = self.inputs.reserved_price.map(|price| format!(", reserved {price}")).unwrap_or_default();
        let prices = format!("on-demand {}, spot {}{reserved}", self.inputs.on_demand_price, self.inputs.spot_price);
        lines.push(("prices", format!("a node and hour: {prices}")));
        lines.push(("played", format!("{} times with seed {}", self.inputs.trials, self.inputs.seed)));
        let mut text: String =
            lines.iter().map(|(name, value)| format!("{name:<9} {}\n", human::plain(value))).collect();
        text.push('\n');
        text.push_str(&self.table());
        text.push('\n');
        self.conclusions().iter().for_each(|line| text.push_str(&format!("{line}\n")));
        text
    }

    fn table(&self) -> String {
        let mut table = Table::new(&[
            "saves",
            "notice",
            ">every",
            ">goodput",
            ">model",
            ">losses",
            ">done again",
            ">wall time",
            ">node hours",
            ">cost",
            ">saving",
        ]);
        let or_dash = |value: Option<f64>, text: fn(f64) -> String| value.map_or_else(|| "-".into(), text);
        for row in &self.spot {
            table.row([
                row.policy.clone(),
                if row.notice { "yes" } else { "no" }.into(),
                human::seconds(row.interval_s),
                or_dash(row.goodput, percent),
                or_dash(row.model_goodput, percent),
                or_dash(row.interruptions, |count| format!("{count:.1}")),
                or_dash(row.lost_s, human::seconds),
                row.wall_s.map_or_else(|| "never".into(), human::seconds),
                or_dash(row.node_hours, |hours| format!("{hours:.1}")),
                or_dash(row.cost, |cost| format!("{cost:.2}")),
                or_dash(row.saving_against_on_demand, |saving| format!("{:.1} %", 100.0 * saving)),
            ]);
        }
        for Baseline { name, goodput, wall_s, node_hours, cost, .. } in &self.baselines {
            let (wall, hours, cost) = (human::seconds(*wall_s), format!("{node_hours:.1}"), format!("{cost:.2}"));
            let (losses, dash) = ("0.0".to_owned(), || "-".to_owned());
            let again = human::seconds(0.0);
            table.row([
                (*name).into(),
                dash(),
                "auto".into(),
                percent(*goodput),
                dash(),
                losses,
                again,
                wall,
                hours,
                cost,
                dash(),
            ]);
        }
        table.text()
    }

    fn conclusions(&self) -> Vec<String> {
        let reaches = |share: Option<f64>| {
            share.map_or_else(|| "it does not end".into(), |share| format!("{} of its goodput", percent(share)))
        };
        let mut lines = vec![
            format!(
                "Daly's formula for a stall of {} and a loss every {}: {}. Best found, without notice: {}; the formula's reaches {}.",
                human::seconds(self.inputs.stall_s.value),
                human::seconds(self.inputs.job_mtbf_s),
                human::seconds(self.daly_s),
                human::seconds(self.best_s),
                reaches(self.daly_share_of_best)
            ),
            format!("checkpoint.every = \"auto\" reaches {}.", reaches(self.auto_share_of_best)),
        ];
        for row in self.spot.iter().filter(|row| row.policy == "auto" || row.never.is_some()) {
            let with = format!("{}, {} notice", row.policy, if row.notice { "with" } else { "without" });
            let (Some(cost), Some(wall)) = (row.cost, row.wall_s) else {
                lines.push(format!("Spot does not pay ({with}): {}.", row.never.as_deref().unwrap_or("no figure")));
                continue;
            };
            for Baseline { name, price, cost: theirs, wall_s, .. } in &self.baselines {
                let verdict = if cost < *theirs { "pays" } else { "does not pay" };
                let (percent, word) =
                    (100.0 * (1.0 - cost / theirs).abs(), if cost < *theirs { "less" } else { "more" });
                let used = if *name == "reserved" { ", if every reserved hour is used," } else { "" };
                lines.push(format!(
                    "Spot {verdict} ({with}): {cost:.2} at {} against {theirs:.2} {name} at {price}{used} is {percent:.1} % {word}, in {} instead of {}.",
                    self.inputs.spot_price,
                    human::seconds(wall),
                    human::seconds(*wall_s)
                ));
            }
        }
        if let Some(price) = self.break_even_spot_price {
            lines.push(format!("Without notice spot pays below {price:.3} a node and hour."));
        }
        lines
    }
}
