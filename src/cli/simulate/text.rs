//! The figures for people: inputs, table, conclusions.

use super::{super::output::Table, Baseline, ELASTIC, Input, Inputs, Report};
use crate::{goodput::Elastic, report::human};

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

impl Report {
    pub(super) fn text(&self) -> String {
        let Inputs { stall_s, durable_s, restart_s, notice_share, work_s, nodes, .. } = &self.inputs;
        let said = |input: &Input<f64>| format!("{} ({})", human::seconds(input.value), input.from);
        let fits = if self.inputs.notice_fits { "a save fits" } else { "no save fits: it saves nothing" };
        let mut lines = vec![
            ("machines", self.inputs.machines.clone()),
            ("save", format!("takes {} from training, durable after {}", said(stall_s), said(durable_s))),
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
        if let Some(Elastic { min, max, reform_s }) = self.inputs.elastic {
            let said = format!("or {min} to {max} nodes, which form anew in {}", human::seconds(reform_s));
            lines.push(("elastic", said));
        }
        let reserved = self.inputs.reserved_price.map(|price| format!(", reserved {price}")).unwrap_or_default();
        let prices = format!("on-demand {}, spot {}{reserved}", self.inputs.on_demand_price, self.inputs.spot_price);
        lines.push(("prices", format!("a node and hour: {prices}")));
        lines.push(("played", format!("{} times with seed {}", self.inputs.trials, self.inputs.seed)));
        let mut text: String =
            lines.iter().map(|(name, value)| format!("{name:<9} {}\n", human::plain(value))).collect();
        text.push('\n');
        text.push_str(&self.table());
        text.push_str("\ngoodput: training that counts over time paid, as played; model: the same in closed form.\n");
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
            let never = || "never ends the job".to_owned();
            share.map_or_else(never, |share| format!("reaches {} of its goodput", percent(share)))
        };
        let mut lines = vec![
            format!(
                "Daly's formula for a save of {} and a loss every {}: {}. Best found, without notice: {}; the \
                formula's {}.",
                human::seconds(self.inputs.stall_s.value),
                human::seconds(self.job_mtbf_s),
                human::seconds(self.daly_s),
                human::seconds(self.best_s),
                reaches(self.daly_share_of_best)
            ),
            format!("checkpoint.every = \"auto\" {}.", reaches(self.auto_share_of_best)),
        ];
        let auto = |notice| self.spot.iter().find(|row| row.policy == "auto" && row.notice == notice)?.goodput;
        if let (Some(told), Some(killed)) = (auto(true), auto(false))
            && told < killed
        {
            lines.push(format!(
                "The notice does not pay with saves this frequent: training stops {} early, and a kill loses less.",
                human::seconds(self.inputs.reserve_s)
            ));
        }
        for row in self.spot.iter().filter(|row| ["auto", "configured"].contains(&row.policy.as_str())) {
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
                    "Spot {verdict} ({with}): {cost:.2} at {} against {theirs:.2} {name} at {price}{used} is \
                    {percent:.1} % {word}, in {} instead of {}.",
                    self.inputs.spot_price,
                    human::seconds(wall),
                    human::seconds(*wall_s)
                ));
            }
        }
        for row in self.spot.iter().filter(|row| row.policy == ELASTIC) {
            let rigid = self.spot.iter().find(|other| other.policy == "auto" && other.notice == row.notice);
            let with = if row.notice { "with" } else { "without" };
            let (Some(cost), Some(wall)) = (row.cost, row.wall_s) else {
                let why = row.never.as_deref().unwrap_or("no figure");
                lines.push(format!("The elastic group ({with} notice) never ends the job: {why}."));
                continue;
            };
            let instead = match rigid.and_then(|row| row.cost.zip(row.wall_s)) {
                Some((cost, wall)) => format!("{} for {cost:.2}", human::seconds(wall)),
                None => "never".into(),
            };
            lines.push(format!(
                "The elastic group ({with} notice) is done in {} for {cost:.2}; a group that waits for every node: \
                {instead}.",
                human::seconds(wall)
            ));
        }
        if let Some(price) = self.break_even_spot_price {
            lines.push(format!("Without notice spot pays below {price:.3} a node and hour."));
        }
        lines
    }
}
