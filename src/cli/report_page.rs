//! `trainer report`

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    metrics::create,
    output, store,
};
use crate::{
    error::{Error, Kind, Result},
    history::{
        self,
        account::Account,
        cost::{Bill, Prediction, Prices, Table},
        episodes::episodes,
    },
    ids::RunId,
    journal::RunState,
    metrics, page,
    report::{self, human},
};

/// Write a run's report as one HTML file: loss, where time and money went, interruptions, machines, checkpoints
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer report --run-id first --out report.html
  trainer report --run-id first --out report.html --price-per-hour 0.35 --on-demand-price-per-hour 1.01
  trainer report --run-id first --json | jq .account.parts

A table of prices is TOML or JSON, in US dollars an hour:
[machines.\"g6.xlarge\"], then spot = 0.35 and on_demand = 0.81")]
pub struct ReportPage {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// Write the page to this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The price of one machine for one hour, US dollars [default: that of --prices, or run.price_per_hour]
    #[arg(long, value_name = "USD", value_parser = usd)]
    price_per_hour: Option<f64>,
    /// The same for a machine that is not taken away: the baseline of the saving [default: that of --prices]
    #[arg(long, value_name = "USD", value_parser = usd)]
    on_demand_price_per_hour: Option<f64>,
    /// A table of prices: spot and on_demand of each kind of machine
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,
    /// The kind of the run's machines: a row of --prices
    #[arg(long, value_name = "TYPE", requires = "prices")]
    instance_type: Option<String>,
    #[command(flatten)]
    json: JsonArg,
}

fn usd(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|price: &f64| *price > 0.0 && *price <= 1e6);
    value.ok_or_else(|| "expected US dollars above 0 and at most 1000000".into())
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    run_id: &'a RunId,
    interruptions: usize,
    account: &'a Account,
    /// `None`: no price is known.
    bill: Option<&'a Bill>,
    /// `None`: there was no interruption, or no save.
    prediction: Option<&'a Prediction>,
    /// US dollars a month for the checkpoints that are kept.
    checkpoints_usd_a_month: f64,
}

impl ReportPage {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let prices = self.prices()?;
        let (root_uri, state, all, broken) = store::block_on(async {
            let root = self.run.store.open()?;
            let state = history::read(&root, &self.run.run_id).await?;
            let (all, broken) = metrics::read(&root.folder(self.run.run_id.as_str())).await?;
            Ok::<_, Error>((root.uri(), state, all, broken))
        })?;
        for broken in &broken {
            report::say(format!("warning: some figures are missing: {}\n", human::plain(broken)));
        }
        let account = Account::of(&state, Some(&all), Timestamp::now());
        let curve = all.curve();
        let bill = Bill::of(&state, &account, &prices);
        let prediction = Prediction::of(&state, &account);
        let episodes = episodes(&state);
        if let Some(path) = &self.out {
            let page = page::render(&page::Input {
                state: &state,
                store: &root_uri,
                account: &account,
                episodes: &episodes,
                curve: &curve,
                bill: bill.as_ref(),
                prediction: prediction.as_ref(),
                broken: &broken,
            });
            create(path, |file| file.write_all(page.as_bytes()))?;
        }
        let (bill, prediction) = (bill.as_ref(), prediction.as_ref());
        let text = if self.json.json {
            output::json_lines([&Report {
                run_id: state.run_id(),
                interruptions: episodes.len(),
                account: &account,
                bill,
                prediction,
                checkpoints_usd_a_month: monthly(&state),
            }])?
        } else if self.out.is_some() {
            String::new()
        } else {
            text(&state, &account, bill, prediction)
        };
        output::emit(&text)?;
        Ok(ExitCode::SUCCESS)
    }

    fn prices(&self) -> Result<Prices> {
        let table = self.prices.as_deref().map(Table::read).transpose()?;
        if let (Some(table), Some(kind), Some(path)) = (&table, &self.instance_type, &self.prices)
            && table.rates(kind).is_none()
        {
            return Err(unknown_kind(table, kind, path));
        }
        Ok(Prices {
            per_hour: self.price_per_hour,
            on_demand: self.on_demand_price_per_hour,
            table,
            kind: self.instance_type.clone(),
        })
    }
}

fn unknown_kind(table: &Table, kind: &str, path: &Path) -> Error {
    let known = table.kinds().collect::<Vec<_>>().join(", ");
    let what = format!("prices {}: there is no machine {kind:?}", path.display());
    Error::new(Kind::Usage, what).with_hint(format!("give --instance-type one of: {known}"))
}

fn monthly(state: &RunState) -> f64 {
    let bytes = state.good().into_iter().map(|checkpoint| checkpoint.committed.bytes);
    history::monthly_cost(state, bytes.fold(0, u64::saturating_add))
}

/// The summary for a terminal.
fn text(state: &RunState, account: &Account, bill: Option<&Bill>, prediction: Option<&Prediction>) -> String {
    let share = |seconds: f64| if account.whole_s > 0.0 { 100.0 * seconds / account.whole_s } else { 0.0 };
    let mut table = output::Table::new(&["time", ">seconds", ">share", ">machine time"]);
    for part in &account.parts {
        table.row([
            part.activity.word().to_owned(),
            format!("{:.1}", part.seconds),
            format!("{:.1} %", share(part.seconds)),
            human::seconds(part.machine_seconds),
        ]);
    }
    table.row([
        "the whole".to_owned(),
        format!("{:.1}", account.whole_s),
        "100 %".to_owned(),
        human::seconds(account.machine_s()),
    ]);
    let mut text = table.text();
    let mut line = |line: String| {
        text.push_str(&human::plain(&line));
        text.push('\n');
    };
    line(String::new());
    line(format!(
        "{} count, {} lost or thrown away",
        human::plural(account.useful_steps, "step"),
        human::plural(account.lost_steps, "step")
    ));
    match bill {
        None if account.generations.is_empty() => line("no machine has trained this run yet".into()),
        None => line("no price is known: name one with --price-per-hour, or --prices and --instance-type".into()),
        Some(bill) => {
            let Bill { prices, machine_hours, spent, per_useful_step, interruptions, baseline, .. } = bill;
            let from: Vec<String> =
                prices.iter().map(|price| format!("{} ({})", price.usd_per_hour, price.from)).collect();
            line(format!("{spent:.2} USD spent: {machine_hours:.2} machine hours at {}", from.join(", ")));
            if let Some(each) = per_useful_step {
                line(format!("{each:.3e} USD for a useful step, {interruptions:.2} USD for interruptions"));
            }
            if let Some(baseline) = baseline {
                let from: Vec<String> =
                    baseline.prices.iter().map(|price| format!("{} ({})", price.usd_per_hour, price.from)).collect();
                let saving = 100.0 * baseline.saving.unwrap_or(0.0);
                line(format!(
                    "{saving:.1} % saved against {:.2} USD on machines that stay, at {}",
                    baseline.cost,
                    from.join(", ")
                ));
            }
        }
    }
    if let Some(prediction) = prediction {
        let [expected, came] = [prediction.expected, prediction.came].map(|share| 100.0 * share);
        line(format!(
            "the model of simulate expected {expected:.1} % of the machines' time productive; {came:.1} % came"
        ));
        prediction.why.iter().for_each(|why| line(why.clone()));
    }
    for note in &account.notes {
        line(note.clone());
    }
    let monthly = human::dollars(monthly(state));
    line(format!("the checkpoints that are kept cost {monthly} a month"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::{state, story};

    #[test]
    fn a_summary_has_every_part_and_a_price_its_source() {
        let state = state(story());
        let account = Account::of(&state, None, Timestamp::from_second(2_000_000).unwrap());
        let said = text(&state, &account, None, None);
        assert!(said.contains("productive steps") && said.contains("no price is known"), "{said}");
        let prices = Prices { per_hour: Some(2.0), on_demand: Some(4.0), ..Prices::default() };
        let bill = Bill::of(&state, &account, &prices).unwrap();
        let said = text(&state, &account, Some(&bill), Prediction::of(&state, &account).as_ref());
        for part in
            ["machine hours at 2 (--price-per-hour)", "at 4 (--on-demand-price-per-hour)", "the model of simulate"]
        {
            assert!(said.contains(part), "{part:?} in\n{said}");
        }
        assert!(usd("0").is_err() && usd("nan").is_err() && usd("2e6").is_err() && usd("0.35") == Ok(0.35));
    }
}
