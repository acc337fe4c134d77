//! `trainer simulate`: its arguments (here), the figures (`study`), and their presentation (`text`).
mod study;
mod text;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{
    args::{JsonArg, StoreArg},
    output, run, store,
};
use crate::{
    config::{self, Cadence, Machine, RunConfig, Sources, TrainTask},
    data::{Split, cache},
    error::{Error, Kind, Result},
    goodput::{Costs, Elastic, Lives, Notice, Observed, Trace},
    history,
    ids::RunId,
    report::human,
    snapshot::cadence::{self, Measured},
};

const HOUR: f64 = 3600.0;
/// The most nodes that an elastic group may have.
const MOST_NODES: u32 = 1024;
/// The longest time that any option accepts, days.
const MOST_DAYS: f64 = 3650.0;
/// The defaults.
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

/// Estimate goodput, time and cost on machines that can disappear
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer simulate --lifetimes spot --mtbf 2h --stall 1s --durable 10s --restart 2m
  trainer simulate --trace zone.json --nodes 4 --work 10d --on-demand-price 3.06 --spot-price 1.10
  trainer simulate --elastic 2:8 --mtbf 6h --wait 1h
  trainer simulate --run-id first --store s3://bucket/runs --spot-price 1.10 --on-demand-price 3.06

A trace is JSON, {\"metadata\":{\"gap_seconds\":60},\"data\":[1,0,...]} (available machines),
or CSV with a line `milliseconds,add|remove,node` for each change.")]
pub struct Simulate {
    /// A run's configuration: its checkpoint.every is simulated too; with --step-time, its train.steps or
    /// train.epochs are the work
    config: Option<PathBuf>,
    /// Take costs, losses, steps and cadence from this run's journal, except those that flags give
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
    /// Distribution of node lifetimes
    #[arg(long, value_enum, default_value_t = Lifetimes::Exponential)]
    lifetimes: Lifetimes,
    /// Nodes that train together; when one is lost, all wait for its replacement
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    nodes: u32,
    /// Also simulate a group that trains with MIN to MAX nodes and forms anew at each change; MAX replaces --nodes
    #[arg(long, value_name = "MIN:MAX", value_parser = between, conflicts_with_all = ["trace", "nodes"])]
    elastic: Option<(u32, u32)>,
    /// From a change of an elastic group to its next step
    #[arg(long, value_name = "D", default_value = "20s", value_parser = seconds, requires = "elastic")]
    reform: f64,
    /// Share of losses that take all nodes at once, 0 to 1
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = share)]
    together: f64,
    /// Mean wait for a machine
    #[arg(long, value_name = "D", default_value = "5m", value_parser = seconds)]
    wait: f64,
    /// Training time that a save costs: the stall, and the slowdown of steps [default: the run's stall, or 1s]
    #[arg(long, value_name = "D", value_parser = seconds)]
    stall: Option<f64>,
    /// From starting a save until it counts [default: the run's, or 10s]
    #[arg(long, value_name = "D", value_parser = seconds)]
    durable: Option<f64>,
    /// From an available machine to its first step [default: the run's, or 2m]
    #[arg(long, value_name = "D", value_parser = seconds)]
    restart: Option<f64>,
    /// How long before its end a machine gets its notice
    #[arg(long, value_name = "D", default_value = "2m", value_parser = seconds)]
    notice: f64,
    /// Share of losses with a notice, 0 to 1 [default: the run's, or 1]
    #[arg(long, value_name = "P", value_parser = share)]
    notice_share: Option<f64>,
    /// Training time of the job without saves and losses [default: steps x step time, or 7d]
    #[arg(long, value_name = "D", value_parser = positive)]
    work: Option<f64>,
    /// Time of one step [default: the run's]
    #[arg(long, value_name = "D", value_parser = positive)]
    step_time: Option<f64>,
    /// A cadence to compare with the best one: 30m, or "500 steps" [default: CONFIG's or the run's]
    #[arg(long, value_name = "CADENCE", value_parser = every)]
    every: Option<Cadence>,
    /// Hourly price of a node that is never taken away
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = price)]
    on_demand_price: f64,
    /// Hourly price of a spot node; 0.37 of the on-demand price is the median of GPU types in us-east-1, June 2025
    #[arg(long, value_name = "X", default_value_t = DEFAULT_SPOT_PRICE, value_parser = price)]
    spot_price: f64,
    /// Hourly price of a reserved node
    #[arg(long, value_name = "X", value_parser = price)]
    reserved_price: Option<f64>,
    /// How often each row is simulated
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

fn between(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once(':').and_then(|(min, max)| Some((min.parse().ok()?, max.parse().ok()?)));
    let fits = |(min, max): &(u32, u32)| 1 <= *min && min <= max && *max <= MOST_NODES;
    parts.filter(fits).ok_or_else(|| format!("expected MIN:MAX, such as 2:8, from 1 to {MOST_NODES}"))
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

/// A value and its source.
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

/// All inputs of the figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Inputs {
    machines: String,
    nodes: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    elastic: Option<Elastic>,
    stall_s: Input<f64>,
    durable_s: Input<f64>,
    restart_s: Input<f64>,
    notice_s: f64,
    notice_share: Input<f64>,
    notice_fits: bool,
    /// Training stops this long before the machine is taken.
    reserve_s: f64,
    work_s: Input<f64>,
    on_demand_price: f64,
    spot_price: f64,
    reserved_price: Option<f64>,
    trials: u32,
    seed: u64,
}

/// The name of the row of an elastic group.
const ELASTIC: &str = "auto, elastic";

/// The source of machines.
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
    /// The same, in an elastic group.
    Elastic(Elastic),
    Fixed(f64),
}

/// One policy on spot machines.
#[derive(Debug, Serialize)]
struct Row {
    policy: String,
    /// Whether losses are announced as the inputs say, or never.
    notice: bool,
    interval_s: f64,
    goodput: Option<f64>,
    goodput_error: Option<f64>,
    /// The goodput in closed form, if there is such a form.
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
    /// Mean paid time from one loss of the job to the next, seconds.
    job_mtbf_s: f64,
    /// Daly's formula for the stall and the job's mean time between losses, seconds.
    daly_s: f64,
    /// The best interval without notice, seconds, and the share of its goodput that the formula's interval reaches.
    best_s: f64,
    daly_share_of_best: Option<f64>,
    /// The share of the best fixed interval's goodput that `checkpoint.every = "auto"` reaches, without notice.
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
            Some(path) => Some(self.settled(load(path)?)?),
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
        let (machines, said) = self.machines(observed.as_ref())?;
        let inputs = self.inputs(&said, observed.as_ref(), configured.as_ref(), step_s);
        Ok(study::Study { inputs, machines }.report(interval))
    }

    /// The configuration with its number of steps, if epochs are given instead and the steps are the work: the index of
    /// the dataset says how many there are.
    fn settled(&self, mut config: RunConfig) -> Result<RunConfig> {
        let TrainTask { data, train, .. } = &mut config.workload;
        let is_work = self.work.is_none() && self.step_time.is_some();
        if train.steps > 0 || !is_work {
            return Ok(config);
        }
        let index = store::block_on(async { Ok(cache::read_index_of(&data.train, &config.storage).await?) });
        let sequences = index.map(|index| index.samples(Split::Train, data.sequence_length)).map_err(|error| {
            let epochs = train.epochs;
            error
                .context(format!("work out the steps of train.epochs = {epochs} over {}", data.train))
                .with_hint("give --work, a configuration with train.steps, or a dataset that can be read from here")
        })?;
        if sequences == 0 {
            let what = format!("{} holds no sequence of {} tokens", data.train, data.sequence_length);
            return Err(Error::new(Kind::Config, what).with_hint("give --work, or another data.sequence_length"));
        }
        train.settle_steps(sequences)?;
        Ok(config)
    }

    fn nodes(&self) -> u32 {
        self.elastic.map_or(self.nodes, |(_, max)| max)
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
        let together = if self.nodes() > 1 {
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
        said: &str,
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
        let notice = Notice { share: 1.0, lead_s: self.notice };
        let notice_share = Input::pick(self.notice_share, run(Observed::announced, "losses without lost steps"), 1.0);
        let steps = configured.filter(|config| config.workload.train.steps > 0).zip(step_s).map(|(config, step_s)| {
            let steps = config.workload.train.steps;
            let made = match config.workload.train.epochs {
                0 => String::new(),
                epochs => format!(" ({})", human::plural(epochs.into(), "epoch")),
            };
            (steps as f64 * step_s, format!("{steps} steps{made} of {}", human::seconds(step_s)))
        });
        let costs = Costs { stall_s: stall_s.value, durable_s: durable_s.value, restart_s: restart_s.value };
        Inputs {
            machines: said.to_owned(),
            nodes: self.nodes(),
            elastic: self.elastic.map(|(min, max)| Elastic { min, max, reform_s: self.reform }),
            notice_s: self.notice,
            notice_fits: notice.fits(&costs),
            reserve_s: notice.reserve_s(&costs),
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
        text: None,
        flags: vec![],
        set: &[],
        working_directory,
        machine,
        fetch: &run::fetch,
    })?)
}
