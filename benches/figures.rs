//! From a contender's events to its figures: pure, and the same for every contender.
//!
//! A checkpoint of step S is *in flight* from the end of S until it is durable. A step is *busy* if it overlaps that
//! time, else *quiet*. The checkpoint after the last step has no later step that could hide it, and is left out.
//!
//! | figure | definition |
//! |---|---|
//! | stall | the loop stops for a checkpoint |
//! | copy | until the state has a second copy and may change |
//! | durable | from the end of the step until a crash can't lose it |
//! | step | median quiet step |
//! | inflation | how much slower busy steps are than quiet ones, without their stalls |
//! | lost | everything that a checkpoint costs the loop: busy steps minus as many quiet ones, a checkpoint |
//! | tokens/s | all tokens over all time after the warm-up, checkpoints and all |
//! | upload | bytes of a checkpoint over its durable time, so training beside it and the loop's own copy are in it |
//! | share | of the barest client's throughput on the same store at `trainer`'s concurrency, without training |

use serde::Serialize;

use super::{lab::Life, transfer::Ceiling};

/// Steps that are left out: memory is allocated, caches get warm, gradient buckets are created.
const WARM_UP: u64 = 3;

/// One contender's figures of one round; `None`: it has none.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    pub stall_ms: Option<f64>,
    pub copy_ms: Option<f64>,
    pub lost_ms: Option<f64>,
    pub inflation_percent: Option<f64>,
    pub durable_s: Option<f64>,
    pub upload_mb_s: Option<f64>,
    pub step_ms: Option<f64>,
    pub quiet_tokens_s: Option<f64>,
    pub tokens_s: Option<f64>,
    pub peak_memory_mb: Option<f64>,
    pub restore_s: Option<f64>,
    pub fetch_s: Option<f64>,
    pub built_s: Option<f64>,
    pub load_s: Option<f64>,
    pub compare_s: Option<f64>,
    pub restore_mb_s: Option<f64>,
    pub first_step_s: Option<f64>,
    pub restore_memory_mb: Option<f64>,
    pub server_cpu_s_gb: Option<f64>,
    /// Of the processors of this machine, while a checkpoint is on its way to the server.
    pub server_share_percent: Option<f64>,
    pub bare_up_mb_s: Option<f64>,
    pub bare_down_mb_s: Option<f64>,
    pub alone_up_mb_s: Option<f64>,
    pub alone_down_mb_s: Option<f64>,
    pub checkpoints: usize,
    pub bytes: u64,
}

/// The median of some values; `None` if there are none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some(low.midpoint(*high))
}

struct Save {
    step: u64,
    bytes: f64,
    stall_s: f64,
    copy_s: Option<f64>,
    durable_s: f64,
}

impl Figures {
    /// The figures of a training life.
    pub fn of_training(life: &Life, tokens_per_step: u64, server_cpu_s: Option<f64>) -> Self {
        let number = |event: &serde_json::Value, name: &str| event[name].as_f64();
        let steps: Vec<(u64, f64)> = life
            .of("step")
            .filter_map(|heard| Some((heard.event["step"].as_u64()?, number(&heard.event, "step_s")?)))
            .collect();
        let last = steps.last().map_or(0, |(step, _)| *step);
        let all: Vec<Save> = life
            .of("checkpoint")
            .filter_map(|heard| {
                let step = heard.event["step"].as_u64()?;
                // If a checkpoint is durable before the loop comes to wait for its copy, that wait can't show how long
                // the copy took; the next step can.
                let waited = life.of("step").find(|next| next.event["step"].as_u64() == Some(step + 1));
                let waited = waited.and_then(|next| number(&next.event, "stall_s")).unwrap_or(0.0);
                Some(Save {
                    step,
                    bytes: number(&heard.event, "bytes")?,
                    stall_s: number(&heard.event, "stall_s")?.max(waited),
                    copy_s: number(&heard.event, "copy_s"),
                    durable_s: number(&heard.event, "durable_s")?,
                })
            })
            .collect();
        let written: f64 = all.iter().map(|save| save.bytes).sum();
        let saves: Vec<&Save> = all.iter().filter(|save| save.step < last).collect();

        // The place of each step on the loop's own clock.
        let mut clock = 0.0;
        let spans: Vec<(u64, f64, f64)> = steps
            .iter()
            .map(|&(step, took)| {
                clock += took;
                (step, clock - took, clock)
            })
            .collect();
        let end_of = |wanted: u64| spans.iter().find(|(step, ..)| *step == wanted).map(|(.., end)| *end);
        let flights: Vec<(f64, f64)> =
            saves.iter().filter_map(|save| end_of(save.step).map(|end| (end, end + save.durable_s))).collect();
        // A step that ends where a flight begins does not overlap it: both have the same number.
        let is_busy = |begin: f64, end: f64| flights.iter().any(|&(from, to)| begin < to && from < end);
        let mut quiet = Vec::new();
        let mut busy = Vec::new();
        for &(_, begin, end) in spans.iter().filter(|(step, ..)| *step > WARM_UP) {
            if is_busy(begin, end) { busy.push(end - begin) } else { quiet.push(end - begin) }
        }

        let step_s = median(&quiet);
        let stalls: f64 = saves.iter().map(|save| save.stall_s).sum();
        let busy_s: f64 = busy.iter().sum();
        let trained: f64 = quiet.iter().chain(&busy).sum();
        let count = quiet.len() + busy.len();
        let of =
            |value: fn(&Save) -> Option<f64>| median(&saves.iter().filter_map(|save| value(save)).collect::<Vec<_>>());
        let tokens = tokens_per_step as f64;
        let upload_mb_s = of(|save| Some(save.bytes / save.durable_s / 1e6));
        let server_cpu_s_gb = server_cpu_s.filter(|_| written > 0.0).map(|cpu| cpu / (written / 1e9));
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        Self {
            stall_ms: of(|save| Some(save.stall_s * 1e3)),
            copy_ms: of(|save| save.copy_s.map(|copy| copy * 1e3)),
            lost_ms: step_s
                .filter(|_| !saves.is_empty())
                .map(|step| (busy_s - step * busy.len() as f64) / saves.len() as f64 * 1e3),
            inflation_percent: step_s
                .filter(|_| !busy.is_empty())
                .map(|step| ((busy_s - stalls) / (step * busy.len() as f64) - 1.0) * 100.0),
            durable_s: of(|save| Some(save.durable_s)),
            upload_mb_s,
            step_ms: step_s.map(|step| step * 1e3),
            quiet_tokens_s: step_s.map(|step| tokens / step),
            tokens_s: (trained > 0.0).then(|| tokens * count as f64 / trained),
            peak_memory_mb: Some(life.peak_memory_bytes as f64 / 1e6),
            server_cpu_s_gb,
            server_share_percent: share(server_cpu_s_gb.zip(upload_mb_s).map(|(cpu, up)| cpu * up / 1e3), Some(cores)),
            checkpoints: saves.len(),
            bytes: all.first().map_or(0, |save| save.bytes as u64),
            ..Self::default()
        }
    }

    /// Adds the figures of a life that only restores.
    pub fn add_restore(&mut self, life: &Life) {
        if let Some(restored) = life.of("restored").next() {
            self.restore_s = restored.event["restore_s"].as_f64();
            self.fetch_s = restored.event["fetch_s"].as_f64();
            let bytes = restored.event["bytes"].as_f64();
            self.restore_mb_s = bytes.zip(self.restore_s).map(|(bytes, took)| bytes / took / 1e6);
        }
        if let Some(start) = life.of("first_step").next() {
            let part = |name: &str| start.event[name].as_f64();
            (self.built_s, self.load_s, self.compare_s) = (part("built_s"), part("load_s"), part("compare_s"));
        }
        self.first_step_s = life.of("step").next().map(|heard| heard.at_s);
        self.restore_memory_mb = Some(life.peak_memory_bytes as f64 / 1e6);
    }

    /// Adds the store's throughput. `trainer`'s transfers without training beside them are figures of `trainer` alone.
    pub fn add_ceiling(&mut self, ceiling: &Ceiling, ours: bool) {
        self.bare_up_mb_s = Some(ceiling.bare_up);
        self.bare_down_mb_s = Some(ceiling.bare_down);
        self.alone_up_mb_s = ours.then_some(ceiling.trainer_up);
        self.alone_down_mb_s = ours.then_some(ceiling.trainer_down);
    }
}

/// Percent of the whole.
fn share(part: Option<f64>, whole: Option<f64>) -> Option<f64> {
    part.zip(whole).map(|(part, whole)| part / whole * 100.0)
}

/// How the figures of two contenders are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    /// One divided by the other.
    Factor,
    /// One minus the other: figures near 0, or below it, have no factor.
    Points,
    /// Not compared: another row already shows it.
    No,
}

/// A figure as the tables show it.
pub struct Metric {
    pub name: &'static str,
    pub value: fn(&Figures) -> Option<f64>,
    pub digits: usize,
    /// Whether more is better.
    pub more: bool,
    /// The target of `targets.md`, for `trainer` alone.
    pub target: &'static str,
    pub compare: Compare,
}

const fn less(name: &'static str, value: fn(&Figures) -> Option<f64>, digits: usize) -> Metric {
    Metric { name, value, digits, more: false, target: "", compare: Compare::Factor }
}

const fn more(name: &'static str, value: fn(&Figures) -> Option<f64>, digits: usize) -> Metric {
    Metric { more: true, ..less(name, value, digits) }
}

const fn alone(name: &'static str, value: fn(&Figures) -> Option<f64>) -> Metric {
    Metric { more: true, compare: Compare::No, ..less(name, value, 0) }
}

/// All of them, in the order of the tables.
pub const METRICS: [Metric; 26] = [
    Metric { target: "≤ 1/10 of DCP's 500", ..less("stall a checkpoint, ms", |f| f.stall_ms, 3) },
    less("copy, ms", |f| f.copy_ms, 0),
    Metric {
        target: "≤ 5 %", compare: Compare::Points, ..less("step-time inflation, %", |f| f.inflation_percent, 1)
    },
    Metric {
        compare: Compare::No,
        ..less("the S3 server's share of the processors meanwhile, %", |f| f.server_share_percent, 1)
    },
    less("all that a checkpoint costs the loop, ms", |f| f.lost_ms, 0),
    less("durable after, s", |f| f.durable_s, 2),
    more("upload, state made durable beside training, MB/s", |f| f.upload_mb_s, 0),
    alone("upload beside training, % of the fastest client", |f| share(f.upload_mb_s, f.bare_up_mb_s)),
    less("restore, s", |f| f.restore_s, 2),
    less("of which fetched and checked, s", |f| f.fetch_s, 2),
    less("beside that, until workers had built their models, s", |f| f.built_s, 2),
    less("of which copied into tensors, s", |f| f.load_s, 2),
    less("of which ranks compared, s", |f| f.compare_s, 2),
    more("restore, MB/s", |f| f.restore_mb_s, 0),
    alone("restore, % of the fastest client", |f| share(f.restore_mb_s, f.bare_down_mb_s)),
    Metric { target: "≤ 10 s", ..less("process start to first step after a restore, s", |f| f.first_step_s, 1) },
    less("step without a checkpoint, ms", |f| f.step_ms, 0),
    Metric { target: "≥ PyTorch DDP", ..more("tokens/s without checkpoints", |f| f.quiet_tokens_s, 0) },
    more("tokens/s, checkpoints and all", |f| f.tokens_s, 0),
    less("peak memory of training and saving, MB", |f| f.peak_memory_mb, 0),
    less("peak memory of a restore, MB", |f| f.restore_memory_mb, 0),
    Metric { compare: Compare::No, ..less("server CPU a GB written, s", |f| f.server_cpu_s_gb, 2) },
    alone("the fastest client: up, MB/s", |f| f.bare_up_mb_s),
    alone("the fastest client: down, MB/s", |f| f.bare_down_mb_s),
    Metric {
        target: "≥ 90 %",
        ..alone("upload alone, % of the fastest client", |f| share(f.alone_up_mb_s, f.bare_up_mb_s))
    },
    Metric {
        target: "≥ 90 %",
        ..alone("download alone, % of the fastest client", |f| share(f.alone_down_mb_s, f.bare_down_mb_s))
    },
];
