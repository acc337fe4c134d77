//! What a run cost, what a useful step of it cost, what its interruptions cost, and what `simulate`'s model expected.
//! Pure but for [`Table::read`].
//!
//! Prices are the user's: nobody else knows what a machine costs. Each figure names its inputs. A machine is counted
//! while its generation lives; what it did after its last sign of life is not known and not counted.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::account::{Account, Activity, Stretch};
use crate::{
    config::HOUR_S,
    error::{Explain, Kind},
    goodput::{Costs, Lives, Notice, Observed, goodput},
    ids::NodeId,
    journal::{Means, RunState},
    report::human,
};

/// The longest table that is read, bytes.
const MAX_BYTES: u64 = 1 << 20;
/// The highest price of a machine and hour, US dollars.
const MOST_USD: f64 = 1e6;

/// Why a table of prices can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PricesError {
    /// It can't be read.
    #[error("read prices {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its content is malformed.
    #[error("prices {path}: {what}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What was expected.
        what: String,
    },
}

impl Explain for PricesError {
    fn kind(&self) -> Kind {
        Kind::Config
    }
    fn hint(&self) -> Option<String> {
        let form = "a table of prices is TOML or JSON; in TOML: [machines.\"g6.xlarge\"], then spot = 0.35 and \
                    on_demand = 0.81, US dollars an hour";
        matches!(self, Self::Wrong { .. }).then(|| form.to_owned())
    }
}

/// The prices of a kind of machine, US dollars an hour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// Of a machine that may be taken away.
    pub spot: Option<f64>,
    /// Of one that is not.
    pub on_demand: Option<f64>,
}

/// A table of prices, as a user writes it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    machines: BTreeMap<String, Rates>,
    /// The kind of each node, where nodes differ.
    #[serde(default)]
    nodes: BTreeMap<String, String>,
}

/// A table of prices.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    path: PathBuf,
    written: Written,
}

impl Table {
    /// Reads a file: JSON if its name ends so, else TOML.
    ///
    /// # Errors
    /// [`PricesError`], for a file that is not there, is longer than 1 MiB, or has a price that is none.
    pub fn read(path: &Path) -> Result<Self, PricesError> {
        let read = |source| PricesError::Read { path: path.to_owned(), source };
        let mut text = String::new();
        File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text)).map_err(read)?;
        Self::parse(path, &text).map_err(|what| PricesError::Wrong { path: path.to_owned(), what })
    }

    fn parse(path: &Path, text: &str) -> Result<Self, String> {
        if text.len() as u64 > MAX_BYTES {
            return Err(format!("it is longer than {MAX_BYTES} bytes"));
        }
        let is_json = path.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("json"));
        let written: Result<Written, String> = if is_json {
            serde_json::from_str(text).map_err(|error| error.to_string())
        } else {
            toml::from_str(text).map_err(|error| error.to_string())
        };
        let written = written?;
        for (name, rates) in &written.machines {
            for price in [rates.spot, rates.on_demand].into_iter().flatten() {
                if !(price > 0.0 && price <= MOST_USD) {
                    return Err(format!("machine {name}: {price} is no price above 0 and up to {MOST_USD}"));
                }
            }
        }
        if let Some((node, kind)) = written.nodes.iter().find(|(_, kind)| !written.machines.contains_key(*kind)) {
            return Err(format!("node {node} is a {kind:?}, which machines does not list"));
        }
        Ok(Self { path: path.to_owned(), written })
    }

    /// The kinds that it lists.
    pub fn kinds(&self) -> impl Iterator<Item = &str> {
        self.written.machines.keys().map(String::as_str)
    }

    /// The prices of one kind.
    pub fn rates(&self, kind: &str) -> Option<Rates> {
        self.written.machines.get(kind).copied()
    }

    fn of_node(&self, node: &NodeId) -> Option<&str> {
        self.written.nodes.get(node.as_str()).map(String::as_str)
    }
}

/// A price, US dollars for a machine and hour, and its source.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Price {
    /// US dollars.
    pub usd_per_hour: f64,
    /// Who says so.
    pub from: String,
}

/// What the user says of prices. Flags win, then the table, then the run's configuration.
#[derive(Clone, Debug, Default)]
pub struct Prices {
    /// `--price-per-hour`.
    pub per_hour: Option<f64>,
    /// `--on-demand-price-per-hour`.
    pub on_demand: Option<f64>,
    /// `--prices`.
    pub table: Option<Table>,
    /// `--instance-type`: the row of the table for nodes that it does not name.
    pub kind: Option<String>,
}

impl Prices {
    /// The price of a node, and that of one that stays.
    fn of(&self, configured: Option<f64>, node: &NodeId) -> (Option<Price>, Option<Price>) {
        let table = self.table.as_ref();
        let kind = table.and_then(|table| table.of_node(node)).or(self.kind.as_deref());
        let row = table.zip(kind).and_then(|(table, kind)| {
            let rates = table.rates(kind)?;
            let from = |column: &str| format!("{} of {kind} in {}", column, table.path.display());
            let price = |value: Option<f64>, column| Some(Price { usd_per_hour: value?, from: from(column) });
            Some((price(rates.spot, "spot"), price(rates.on_demand, "on_demand")))
        });
        let (spot, on_demand) = row.unwrap_or_default();
        let flag = |value: Option<f64>, name: &str| Some(Price { usd_per_hour: value?, from: name.to_owned() });
        let configured = flag(configured, "run.price_per_hour of the run's configuration");
        let paid = flag(self.per_hour, "--price-per-hour").or(spot).or(configured);
        (paid, flag(self.on_demand, "--on-demand-price-per-hour").or(on_demand))
    }
}

/// What a run cost, US dollars.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bill {
    /// The prices that it is computed with, each once.
    pub prices: Vec<Price>,
    /// Hours of machines.
    pub machine_hours: f64,
    /// So far.
    pub spent: f64,
    /// For each step that counts; `None`: there is none yet.
    pub per_useful_step: Option<f64>,
    /// Of `spent`, what would not have been paid without interruptions: lost steps, starts and last saves.
    pub interruptions: f64,
    /// Of `spent`, the time in which loops stood still for saves.
    pub stalls: f64,
    /// The same work on machines that stay.
    pub baseline: Option<Baseline>,
}

/// The same work on machines that stay: without what interruptions cost, at the price of such machines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Baseline {
    /// The prices, each once.
    pub prices: Vec<Price>,
    /// Hours of machines.
    pub machine_hours: f64,
    /// US dollars.
    pub cost: f64,
    /// 1 less what was spent over this; negative where it did not pay.
    pub saving: Option<f64>,
}

/// A sum over stretches at prices that differ by node.
struct Sum<'a> {
    /// The price in the run's configuration.
    configured: Option<f64>,
    account: &'a Account,
    prices: &'a Prices,
}

/// One of a machine's two prices: what is paid, and what it is compared with.
type Pick = fn((Option<Price>, Option<Price>)) -> Option<Price>;

impl Sum<'_> {
    /// The mean price of a generation's machines, and the sources; `None`: that of one of them is not known.
    fn rates(&self, pick: Pick) -> Option<(Vec<f64>, Vec<Price>)> {
        let mut sources: Vec<Price> = Vec::new();
        let mut means = Vec::new();
        let mut known: BTreeMap<&NodeId, f64> = BTreeMap::new();
        for lived in &self.account.generations {
            let mut sum = 0.0;
            for node in &lived.nodes {
                if !known.contains_key(node) {
                    let price = pick(self.prices.of(self.configured, node))?;
                    known.insert(node, price.usd_per_hour);
                    if !sources.contains(&price) {
                        sources.push(price);
                    }
                }
                sum += known.get(node)?;
            }
            means.push(sum / lived.nodes.len().max(1) as f64);
        }
        Some((means, sources))
    }

    /// Hours of machines and their cost, of the stretches that are meant.
    fn of(&self, means: &[f64], meant: impl Fn(&Stretch) -> bool) -> (f64, f64) {
        let places: BTreeMap<_, _> =
            self.account.generations.iter().zip(means).map(|(lived, mean)| (lived.generation, mean)).collect();
        let of = self.account.stretches.iter().filter(|stretch| stretch.machines > 0 && meant(stretch));
        of.fold((0.0, 0.0), |(hours, cost), stretch| {
            let more = stretch.seconds() * stretch.machines as f64 / HOUR_S;
            let mean = stretch.generation.and_then(|generation| places.get(&generation)).map_or(0.0, |mean| **mean);
            (hours + more, cost + more * mean)
        })
    }
}

impl Bill {
    /// `None`: no price is known, or there was no machine.
    pub fn of(state: &RunState, account: &Account, prices: &Prices) -> Option<Self> {
        if account.generations.is_empty() {
            return None;
        }
        let sum = Sum { configured: super::config(state).run.price_per_hour, account, prices };
        let (means, sources) = sum.rates(|(paid, _)| paid)?;
        let (machine_hours, spent) = sum.of(&means, |_| true);
        let baseline = sum.rates(|(_, stays)| stays).map(|(means, prices)| {
            let (machine_hours, cost) = sum.of(&means, |stretch| !stretch.interrupted);
            Baseline { prices, machine_hours, cost, saving: (cost > 0.0).then(|| 1.0 - spent / cost) }
        });
        Some(Self {
            prices: sources,
            machine_hours,
            spent,
            per_useful_step: (account.useful_steps > 0).then(|| spent / account.useful_steps as f64),
            interruptions: sum.of(&means, |stretch| stretch.interrupted).1,
            stalls: sum.of(&means, |stretch| stretch.activity == Activity::Stalled).1,
            baseline,
        })
    }
}

/// One term of the model, beside what came; seconds in which machines were alive.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Term {
    /// Its name.
    pub name: &'static str,
    /// What the model expects.
    pub expected_s: f64,
    /// What came.
    pub came_s: f64,
    /// How the expectation is made.
    pub how: String,
}

/// What the model of `trainer simulate` says of the run, with what was observed of it as input, beside what came.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Productive time over the time of machines.
    pub expected: f64,
    /// What came.
    pub came: f64,
    /// The inputs, in words.
    pub inputs: Vec<String>,
    /// Where the time went that was not productive.
    pub terms: Vec<Term>,
    /// The difference in words, the largest part first.
    pub why: Vec<String>,
}

/// A difference of goodput that needs no explanation.
const SMALL: f64 = 0.005;

impl Prediction {
    /// `None`: no interruption was observed, or nothing is known of saves.
    pub fn of(state: &RunState, account: &Account) -> Option<Self> {
        let observed = Observed::of(state);
        let alive_s = account.alive_s();
        let losses = observed.interruptions;
        if losses == 0 || alive_s <= 0.0 {
            return None;
        }
        let saves = observed.saves as f64;
        let costs =
            Costs { stall_s: observed.stall_s?, durable_s: observed.durable_s?, restart_s: mean_start(account)? };
        let mean_s = alive_s / losses as f64;
        let seconds = |activity: Activity| {
            let of = account.stretches.iter().filter(|stretch| stretch.activity == activity && stretch.machines > 0);
            of.map(Stretch::seconds).sum::<f64>()
        };
        let [productive, stalled, repeated, starting, ending] =
            [Activity::Productive, Activity::Stalled, Activity::Repeated, Activity::Starting, Activity::Ending]
                .map(seconds);
        let interval_s = (productive + repeated) / saves.max(1.0);
        let share = observed.announced().unwrap_or(0.0);
        let deadlines = state.notices().iter().filter(|notice| notice.means == Means::Interruption);
        let mut leads: Vec<f64> = deadlines.filter_map(|n| n.deadline_s).filter(|lead| lead.is_finite()).collect();
        leads.sort_by(f64::total_cmp);
        // Of an announced loss whose deadline nobody named, all that is known is that a save fitted.
        let lead_s = leads.get(leads.len() / 2).copied().unwrap_or_else(|| 2.0 * costs.committed_after_s()).max(0.0);
        let notice = Notice { share, lead_s };
        let expected = goodput(&Lives::exponential(mean_s), &costs, notice, interval_s.max(1e-3), 0.0);
        let unannounced = losses as f64 * (1.0 - share);
        let lost_each = costs.feasible(interval_s) / 2.0 + costs.committed_after_s() - costs.stall_s;
        let say = human::seconds;
        let starts = account.stretches.iter().filter(|stretch| stretch.activity == Activity::Starting).count();
        let terms = vec![
            Term {
                name: "starts and restores",
                expected_s: (losses + 1) as f64 * costs.restart_s,
                came_s: starting,
                how: format!(
                    "one start of {} for each of {} lives; there were {starts}",
                    say(costs.restart_s),
                    losses + 1
                ),
            },
            Term {
                name: "stalls by saves",
                expected_s: saves * costs.stall_s,
                came_s: stalled,
                how: format!("{} stalls of {} (median)", observed.saves, say(costs.stall_s)),
            },
            Term {
                name: "lost and repeated steps",
                expected_s: unannounced * lost_each,
                came_s: repeated,
                how: format!(
                    "{} that no notice announced or no save met, each half an interval and the time of a save: {}",
                    if observed.lossy == 1 { "1 loss".to_owned() } else { format!("{} losses", observed.lossy) },
                    say(lost_each)
                ),
            },
            Term {
                name: "last saves and exits",
                expected_s: losses as f64 * share * notice.reserve_s(&costs),
                came_s: ending,
                how: format!("{} before the end of each announced life", say(notice.reserve_s(&costs))),
            },
        ];
        let inputs = vec![
            format!("a machine lives {} on average: {} alive, {} interruptions", say(mean_s), say(alive_s), losses),
            format!("a save every {} of training: {} saves", say(interval_s), observed.saves),
            format!("a save stalls for {} and is durable after {} (medians)", say(costs.stall_s), say(costs.durable_s)),
            format!("a start takes {} (mean)", say(costs.restart_s)),
            format!("{:.0} % of the losses lost no step; a notice comes {} ahead", 100.0 * share, say(lead_s)),
        ];
        let came = productive / alive_s;
        let why = why(expected, came, &terms, alive_s);
        Some(Self { expected, came, inputs, terms, why })
    }
}

/// The mean time from a generation's record to its first step.
fn mean_start(account: &Account) -> Option<f64> {
    let starts = account.stretches.iter().filter(|stretch| stretch.activity == Activity::Starting);
    let (sum, count) = starts.fold((0.0, 0), |(sum, count), stretch| (sum + stretch.seconds(), count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// The difference in words.
fn why(expected: f64, came: f64, terms: &[Term], alive_s: f64) -> Vec<String> {
    if (expected - came).abs() < SMALL {
        return vec![format!("The run did as the model expects, within {:.1} % of the machines' time.", 100.0 * SMALL)];
    }
    let word = if came > expected { "more" } else { "less" };
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let mut lines = vec![format!(
        "{} of the machines' time was productive, {} {word} than the model expects.",
        percent(came),
        percent((came - expected).abs())
    )];
    let mut by_size: Vec<&Term> = terms.iter().collect();
    by_size.sort_by(|a, b| (b.came_s - b.expected_s).abs().total_cmp(&(a.came_s - a.expected_s).abs()));
    for term in by_size.into_iter().take(2) {
        let off = term.came_s - term.expected_s;
        if off.abs() / alive_s < SMALL / 2.0 {
            continue;
        }
        lines.push(format!(
            "{}{} took {} instead of {}: {} {} of the machines' time.",
            term.name[..1].to_uppercase(),
            &term.name[1..],
            human::seconds(term.came_s),
            human::seconds(term.expected_s),
            percent(off.abs() / alive_s),
            if off > 0.0 { "more" } else { "less" }
        ));
    }
    if lines.len() == 1 {
        lines.push("No single part explains it: lives differ in length, and the model knows their mean alone.".into());
    }
    lines
}

#[cfg(test)]
mod tests;
