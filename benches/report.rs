//! Tables and the stored form of results.

use std::{fmt::Write, fs, path::Path};

use serde::Serialize;

use super::{
    Result,
    contender::Contender,
    figures::{Compare, Figures, METRICS, Metric, median},
    large::Large,
    machine::Machine,
};

/// One contender's figures, one for each round.
#[derive(Serialize)]
pub struct Rounds {
    pub contender: &'static str,
    pub rounds: Vec<Figures>,
}

/// The stored result of a suite.
#[derive(Serialize)]
pub struct Results<'a> {
    pub suite: &'a str,
    pub machine: &'a Machine,
    pub settings: serde_json::Value,
    pub results: &'a [Rounds],
    /// `trainer`'s validation loss, and PyTorch's with the same weights on the same sequences.
    pub losses: Option<(f64, f64)>,
    /// The large state: its memory and its restarts.
    pub large: Option<&'a Large>,
}

impl Rounds {
    pub fn of(contender: Contender) -> Self {
        Self { contender: contender.name(), rounds: Vec::new() }
    }
}

/// `middle (least – most)`.
fn spread(values: &[f64], digits: usize) -> String {
    let Some(middle) = median(values) else { return "–".into() };
    if values.len() == 1 {
        return format!("{middle:.digits$}");
    }
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), &v| (low.min(v), high.max(v)));
    format!("{middle:.digits$} ({least:.digits$} – {most:.digits$})")
}

fn values(rounds: &Rounds, metric: &Metric) -> Vec<f64> {
    rounds.rounds.iter().filter_map(metric.value).filter(|value| value.is_finite()).collect()
}

pub fn row(out: &mut String, cells: impl IntoIterator<Item = String>) {
    out.push('|');
    for cell in cells {
        let _ = write!(out, " {cell} |");
    }
    out.push('\n');
}

pub fn head(out: &mut String, cells: Vec<String>) {
    let rule: Vec<String> = cells.iter().map(|_| "---".to_owned()).collect();
    row(out, cells);
    row(out, rule);
}

/// Medians with their spread over rounds, a column each.
pub fn table(results: &[Rounds], with_target: bool) -> String {
    let mut out = String::new();
    let target = |text: &str| with_target.then(|| text.to_owned());
    let names = results.iter().map(|rounds| rounds.contender.to_owned());
    head(&mut out, std::iter::once("figure".to_owned()).chain(target("target")).chain(names).collect());
    for metric in &METRICS {
        let cells: Vec<String> = results.iter().map(|rounds| spread(&values(rounds, metric), metric.digits)).collect();
        if cells.iter().any(|cell| cell != "–") {
            row(&mut out, std::iter::once(metric.name.to_owned()).chain(target(metric.target)).chain(cells));
        }
    }
    out
}

/// How much better `ours` is than each of `theirs`, by round; then the median and the spread, and a verdict in one
/// word. Factors above 1, and points above 0, favour `ours`.
pub fn ratios(ours: &Rounds, theirs: &[&Rounds]) -> String {
    let mut out = String::new();
    let names = theirs.iter().map(|rounds| format!("than {}", rounds.contender));
    head(&mut out, std::iter::once(format!("{} is better by a factor of", ours.contender)).chain(names).collect());
    for metric in METRICS.iter().filter(|metric| metric.compare != Compare::No) {
        let cells: Vec<String> = theirs
            .iter()
            .map(|rounds| {
                let pairs = ours.rounds.iter().zip(&rounds.rounds);
                let of = |(our, their)| {
                    let (our, their) = ((metric.value)(our)?, (metric.value)(their)?);
                    let gain = match metric.compare {
                        Compare::Points => their - our,
                        _ if metric.more => our / their,
                        _ => their / our,
                    };
                    gain.is_finite().then_some(gain)
                };
                verdict(&pairs.filter_map(of).collect::<Vec<_>>(), metric.compare == Compare::Points)
            })
            .collect();
        if cells.iter().any(|cell| cell != "–") {
            let units = [", ms", ", s", ", MB", ", MB/s", ", %"];
            let name = units.iter().find_map(|unit| metric.name.strip_suffix(unit)).unwrap_or(metric.name);
            row(&mut out, std::iter::once(name.to_owned()).chain(cells));
        }
    }
    out
}

/// The spread of the gain, and the verdict, if no round contradicts it.
fn verdict(gains: &[f64], points: bool) -> String {
    let (even, unit, digits) = if points { (0.0, " points", 1) } else { (1.0, "", 2) };
    let digits = if gains.iter().any(|gain| *gain >= 100.0) { 0 } else { digits };
    let word = match gains {
        [] => return spread(gains, digits),
        _ if gains.iter().all(|gain| *gain > even) => "better",
        _ if gains.iter().all(|gain| *gain < even) => "worse",
        _ => "undecided",
    };
    format!("{}{unit}, {word}", spread(gains, digits))
}

/// Writes `<slug>.json` and `<slug>.md` into `folder`.
pub fn keep(folder: &Path, results: &Results<'_>, markdown: &str) -> Result<()> {
    fs::create_dir_all(folder)?;
    let slug = results.machine.slug(results.suite);
    fs::write(folder.join(format!("{slug}.json")), serde_json::to_string_pretty(results)? + "\n")?;
    fs::write(folder.join(format!("{slug}.md")), markdown)?;
    eprintln!("kept: benches/results/{slug}.json and .md");
    Ok(())
}
