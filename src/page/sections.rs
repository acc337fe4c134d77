//! The parts of the page: what is said, and the tables beside the charts.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{
    Input,
    charts::{self, MOST_MACHINES, Marks, percent},
    class,
    html::Html,
};
use crate::{
    history::{
        self, Checkpoint, HeldOut, Standing,
        account::{Account, Activity},
        cost::{Baseline, Bill, Prediction, Price},
        episodes::{Episode, How},
        story,
    },
    ids::{NodeId, Step},
    journal::{CheckpointStatus, Outcome},
    report::human,
};

/// The most interruptions that are told; the newest.
const MOST_EPISODES: usize = 300;
/// The most machines and other lines that are listed; the newest.
const MOST_ROWS: usize = 100;
/// The most checkpoints that are listed; `trainer checkpoints` has all.
const MOST_CHECKPOINTS: usize = 20;
/// Rows of the table beside a curve.
const CURVE_ROWS: usize = 21;

fn when(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// An amount in US dollars, small ones with three digits.
fn usd(amount: f64) -> String {
    if amount.is_finite() && amount > 0.0 && amount < 0.009_5 {
        let digits = (2.0 - amount.log10().floor()).clamp(4.0, 15.0);
        return format!("${amount:.*}", digits as usize);
    }
    human::dollars(amount)
}

/// A sentence of its own.
fn say(html: &mut Html, text: &str) {
    html.words("p", text);
}

/// A figure at the top of the page.
fn card(html: &mut Html, name: &str, value: &str, more: &str) {
    html.open("div", &[]).words("dt", name).open("dd", &[]).text(value);
    if !more.is_empty() {
        html.words("small", more);
    }
    html.close("dd").close("div");
}

/// The head of the page: which run, how it stands, and its figures.
pub(super) fn summary(html: &mut Html, input: &Input<'_>) {
    let Input { state, account, episodes, bill, .. } = input;
    let standing = Standing::of(state);
    html.open("header", &[]);
    html.open("h1", &[]).text("Run ").text(state.run_id().as_str()).close("h1");
    html.open("p", &class("quiet anywhere")).text("in ").text(input.store).text(", created ");
    html.text(&when(state.created_at())).text(", last record ").text(&when(state.last_activity().0)).close("p");
    let bad = matches!(standing, Standing::Failed | Standing::Interrupted);
    html.open("p", &class(if bad { "state bad" } else { "state" }));
    let mut word = standing.word().to_owned();
    word[..1].make_ascii_uppercase();
    html.text(&word);
    let reason = match state.outcome() {
        Outcome::Failed { reason, .. } => Some(reason.clone()),
        _ => state.capped().map(|cap| cap.to_string()),
    };
    let reason = reason.or_else(|| Some(format!("stopped early: {}", history::early(state)?)));
    if let Some(reason) = reason {
        html.text(": ").text(&reason);
    }
    html.close("p");
    html.open("dl", &class("cards"));
    let total = history::config(state).workload.last_step();
    let step = history::last_step(state).unwrap_or_default();
    let lost = match (account.lost_steps, account.unknown_losses) {
        (0, 0) => "no step lost".to_owned(),
        (lost, 0) => format!("{} lost or thrown away", human::plural(lost, "step")),
        (lost, unknown) => {
            let kills = human::plural(unknown as u64, "machine");
            format!("{} lost, and more by {kills} that vanished", human::plural(lost, "step"))
        }
    };
    card(html, "Steps", &step.to_string(), &format!("of {total} (the last in the journal)"));
    if let Some(goodput) = account.goodput {
        let machines = account.goodput_of_machines.map(|share| format!("{} of the machines' time", percent(share)));
        card(html, "Goodput", &percent(goodput), &machines.unwrap_or_default());
    }
    card(html, "Interruptions", &episodes.len().to_string(), &lost);
    let generations = human::plural(account.generations.len() as u64, "generation");
    card(html, "Wall time", &human::seconds(account.whole_s), &format!("in {generations}"));
    if let Some(held_out) = HeldOut::of(state) {
        let best = format!("{:.4} at step {}", held_out.best.loss, held_out.best.step);
        card(html, "Held-out loss", &format!("{:.4}", held_out.newest.loss), &format!("best {best}"));
    }
    if let Some(bill) = bill {
        let each = bill.per_useful_step.map(|usd_each| format!("{} for a useful step", usd(usd_each)));
        card(html, "Spent", &usd(bill.spent), &each.unwrap_or_default());
        if let Some(Baseline { saving: Some(saving), cost, .. }) = &bill.baseline {
            card(html, "Saved", &format!("{:.1} %", 100.0 * saving), &format!("against {} on-demand", usd(*cost)));
        }
    }
    html.close("dl").close("header");
}

/// The loss curve, and some of its points.
pub(super) fn loss(input: &Input<'_>, marks: &Marks) -> Html {
    let mut html = Html::default();
    let Some(chart) = charts::loss(input.curve, marks) else {
        say(&mut html, "No figures of steps are stored: they come with the first checkpoint, or after five minutes.");
        return html;
    };
    html.add(&chart);
    let last = input.curve.len().saturating_sub(1);
    let places = (0..CURVE_ROWS).map(|row| row * last / (CURVE_ROWS - 1));
    let mut places: Vec<usize> = places.collect();
    places.dedup();
    let rows = places.into_iter().filter_map(|place| input.curve.row(place)).map(|row| {
        let figure = |name: &str| row.figures.get(name).map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
        let at = Timestamp::from_millisecond(row.at_ms).map_or_else(|_| "?".to_owned(), when);
        vec![row.step.to_string(), row.generation.to_string(), figure("loss"), figure("held_out_loss"), at]
    });
    let headings = ["Step", ">Generation", ">Loss", ">Held-out loss", "Reported at"];
    html.table(&format!("Some of {}", human::plural(input.curve.len() as u64, "step")), &headings, rows);
    html
}

/// The parts of the run's time.
pub(super) fn time(input: &Input<'_>) -> Html {
    let mut html = Html::default();
    let account = input.account;
    let Some(chart) = charts::waterfall(account) else {
        say(&mut html, "The journal shows no time yet.");
        return html;
    };
    html.add(&chart);
    let row = |name: &str, meaning: &str, seconds: f64, machine_seconds: f64| {
        let share = percent(seconds / account.whole_s);
        vec![name.to_owned(), human::seconds(seconds), share, human::seconds(machine_seconds), meaning.to_owned()]
    };
    let mut rows: Vec<Vec<String>> = account
        .parts
        .iter()
        .map(|part| row(part.activity.word(), part.activity.meaning(), part.seconds, part.machine_seconds))
        .collect();
    rows.push(row("the whole", "The sum.", account.whole_s, account.machine_s()));
    let headings = ["Part", ">Time", ">Share", ">Machine time", "Meaning"];
    html.table("The parts and their sum", &headings, rows);
    html
}

/// The place of a share in sorted values.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = (share * sorted.len() as f64) as usize;
    sorted.get(place.min(sorted.len().saturating_sub(1))).copied()
}

/// How long saves took until they counted.
pub(super) fn lag(input: &Input<'_>) -> Html {
    let mut html = Html::default();
    let costs =
        || input.state.checkpoints().iter().map(|checkpoint| (checkpoint.committed.step, checkpoint.committed.cost));
    let saves: Vec<(Step, f64)> = costs().map(|(step, cost)| (step, cost.durable_s)).collect();
    let Some(chart) = charts::lag(&saves) else {
        say(&mut html, "No save has counted yet.");
        return html;
    };
    html.add(&chart);
    let sorted = |of: fn(&crate::journal::SaveCost) -> f64| {
        let mut values: Vec<f64> = costs().map(|(_, cost)| of(&cost)).filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let row = |name: &str, values: &[f64]| {
        let at = |share| quantile(values, share).map_or_else(|| "-".to_owned(), human::seconds);
        vec![name.to_owned(), at(0.5), at(0.9), at(1.0)]
    };
    let rows = [
        row("end of the step until it counts", &sorted(|cost| cost.durable_s)),
        row("the loop stands still", &sorted(|cost| cost.stall_s)),
        row("copy, hidden or not", &sorted(|cost| cost.copy_s)),
    ];
    html.table(
        &format!("Of {}", human::plural(saves.len() as u64, "save")),
        &["Time", ">Median", ">9 of 10 below", ">Longest"],
        rows,
    );
    html
}

const fn how(how: How) -> &'static str {
    match how {
        How::Stopped => "stopped",
        How::Vanished => "vanished",
        How::WorkerDied => "a worker died",
        How::Regrouped => "the group changed",
    }
}

/// The story of each interruption.
pub(super) fn interruptions(input: &Input<'_>) -> Html {
    let mut html = Html::default();
    let episodes = input.episodes;
    if episodes.is_empty() {
        say(&mut html, "There was no interruption.");
        return html;
    }
    let skipped = episodes.len().saturating_sub(MOST_EPISODES);
    if skipped > 0 {
        let run_id = input.state.run_id();
        say(
            &mut html,
            &format!("The newest {MOST_EPISODES} of {}. All: trainer explain --run-id {run_id}", episodes.len()),
        );
    }
    for (number, episode) in (1..).zip(episodes).skip(skipped) {
        html.open("details", &[]).open("summary", &[]);
        html.text(&headline(number, episode)).close("summary");
        html.open("dl", &class("story"));
        for (name, what) in story::lines(number, episode).into_iter().skip(1).take(MOST_ROWS) {
            html.words("dt", name.trim()).words("dd", &what);
        }
        html.close("dl").close("details");
    }
    html
}

fn headline(number: usize, episode: &Episode<'_>) -> String {
    let lost = match episode.lost_steps {
        Some(0) => "no step lost".to_owned(),
        Some(lost) => format!("{} lost", human::plural(lost, "step")),
        None => "loss not recorded".to_owned(),
    };
    let away = episode.next.as_ref().map_or_else(
        || "not continued yet".to_owned(),
        |next| format!("continued after {}", human::seconds(next.away_s)),
    );
    format!("{number}. {}: generation {} {}, {lost}, {away}", when(episode.at), episode.generation, how(episode.how))
}

/// Each machine, how long it lived, and why it went.
pub(super) fn machines(input: &Input<'_>) -> Html {
    let mut html = Html::default();
    let Some(chart) = charts::lives(input.account) else {
        say(&mut html, "No machine has trained this run yet.");
        return html;
    };
    html.add(&chart);
    let machines = charts::machines(input.account);
    if machines.len() > MOST_MACHINES {
        say(&mut html, &format!("The first {MOST_MACHINES} of {} machines have a bar.", machines.len()));
    }
    let mut gone: BTreeMap<&NodeId, &str> = BTreeMap::new();
    for formed in input.state.formations() {
        gone.extend(formed.succession.gone.iter().map(|gone| (&gone.node, gone.why.as_str())));
    }
    let skipped = machines.len().saturating_sub(MOST_ROWS);
    let rows = machines.iter().skip(skipped).map(|machine| {
        let lived: f64 = machine.lives.iter().map(|(from, to)| to - from).sum();
        let came = machine.lives.first().map_or(0.0, |(from, _)| *from);
        vec![
            machine.node.to_string(),
            human::seconds(came),
            human::seconds(lived),
            machine.lives.len().to_string(),
            gone.get(machine.node).map_or_else(|| "-".to_owned(), |why| (*why).to_owned()),
        ]
    });
    let caption =
        format!("The newest {} of {}", machines.len() - skipped, human::plural(machines.len() as u64, "machine"));
    html.table(&caption, &["Machine", ">Came after", ">Lived", ">Generations", "Why it went"], rows);
    html
}

fn sources_of(prices: &[Price]) -> String {
    let each = prices.iter().map(|price| format!("${} ({})", price.usd_per_hour, price.from));
    each.collect::<Vec<_>>().join("; ")
}

/// What the run cost, and what the model expected.
pub(super) fn cost(input: &Input<'_>) -> Html {
    let mut html = Html::default();
    match input.bill {
        Some(bill) => bill_of(&mut html, input.account, bill),
        None if input.account.generations.is_empty() => {
            say(&mut html, "No machine has trained this run yet: it has cost nothing.");
        }
        None => {
            say(&mut html, "No price of a machine is known, so nothing is computed.");
            say(
                &mut html,
                "Name one: --price-per-hour 0.35, or a table with --prices FILE and --instance-type, or \
                 run.price_per_hour in the run's configuration. Name the price of a machine that stays with \
                 --on-demand-price-per-hour to see what was saved.",
            );
        }
    }
    html.words("h3", "What the model of trainer simulate expected");
    match input.prediction {
        Some(prediction) => prediction_of(&mut html, prediction),
        None => say(&mut html, "There was no interruption, or no save: there is nothing to expect from."),
    }
    html
}

fn bill_of(html: &mut Html, account: &Account, bill: &Bill) {
    let Bill { prices, machine_hours, spent, per_useful_step, interruptions, stalls, baseline } = bill;
    let mut rows = vec![vec![
        "spent so far".to_owned(),
        usd(*spent),
        format!("{machine_hours:.2} machine hours at {}", sources_of(prices)),
    ]];
    if let Some(each) = per_useful_step {
        let steps = human::plural(account.useful_steps, "step");
        rows.push(vec!["a useful step".to_owned(), usd(*each), format!("spent, over {steps} that count")]);
    }
    let share = if *spent > 0.0 { percent(interruptions / spent) } else { "0 %".to_owned() };
    rows.push(vec![
        "interruptions".to_owned(),
        usd(*interruptions),
        format!("{share} of what was spent: lost steps, starts after an interruption, last saves and exits"),
    ]);
    rows.push(vec!["stalls by saves".to_owned(), usd(*stalls), "the time in which loops stood still".to_owned()]);
    match baseline {
        Some(Baseline { prices, machine_hours, cost, saving }) => {
            rows.push(vec![
                "on machines that stay".to_owned(),
                usd(*cost),
                format!(
                    "the same work without interruptions: {machine_hours:.2} machine hours at {}",
                    sources_of(prices)
                ),
            ]);
            if let Some(saving) = saving {
                let what = "1 less what was spent over what it would have cost on machines that stay; stalls by saves \
                            are in both";
                rows.push(vec!["saving".to_owned(), format!("{:.1} %", 100.0 * saving), what.to_owned()]);
            }
        }
        None => rows.push(vec![
            "saving".to_owned(),
            "-".to_owned(),
            "needs --on-demand-price-per-hour, or on_demand in the table of prices".to_owned(),
        ]),
    }
    html.table("US dollars, for machines alone", &["What", ">Amount", "How"], rows);
    let unrecorded = account.part(Activity::Unrecorded).seconds;
    if unrecorded > 0.0 {
        let time = human::seconds(unrecorded);
        say(
            html,
            &format!(
                "A machine that vanished may have been paid for after its last sign of life. That is not recorded and \
                 not counted: {time} lie between such signs and the next generations."
            ),
        );
    }
}

fn prediction_of(html: &mut Html, prediction: &Prediction) {
    let Prediction { expected, came, inputs, terms, why } = prediction;
    say(html, &format!("Expected: {} of the machines' time productive. Came: {}.", percent(*expected), percent(*came)));
    html.open("ul", &[]);
    for line in why {
        html.words("li", line);
    }
    html.close("ul");
    let rows = terms.iter().map(|term| {
        vec![term.name.to_owned(), human::seconds(term.expected_s), human::seconds(term.came_s), term.how.clone()]
    });
    html.table(
        "Time that was not productive, of machines that were alive",
        &["Part", ">Expected", ">Came", "Expectation"],
        rows,
    );
    say(html, "Inputs, all from the run's journal:");
    html.open("ul", &[]);
    for line in inputs {
        html.words("li", line);
    }
    html.close("ul");
}

/// The newest checkpoints, and what the good ones cost.
pub(super) fn checkpoints(input: &Input<'_>) -> Html {
    let mut html = Html::default();
    let all = input.state.checkpoints();
    if all.is_empty() {
        say(&mut html, "No checkpoint is committed yet.");
        return html;
    }
    let good = all.iter().filter(|checkpoint| checkpoint.status == CheckpointStatus::Good);
    let (count, bytes) = good.fold((0_u64, 0_u64), |(count, bytes), checkpoint| {
        (count + 1, bytes.saturating_add(checkpoint.committed.bytes))
    });
    let price = history::config(input.state).checkpoint.price_per_gib_month;
    say(
        &mut html,
        &format!(
            "{} of {} are kept: {}, {} a month at ${price} a GiB (checkpoint.price_per_gib_month).",
            count,
            human::plural(all.len() as u64, "checkpoint"),
            human::bytes(bytes),
            usd(history::monthly_cost(input.state, bytes)),
        ),
    );
    let rows = all.iter().rev().take(MOST_CHECKPOINTS).map(|checkpoint| {
        let Checkpoint { committed, at, status, damage } = Checkpoint::from(checkpoint);
        vec![
            committed.step.to_string(),
            committed.generation.to_string(),
            human::bytes(committed.bytes),
            human::seconds(committed.cost.durable_s),
            damage.map_or_else(|| status.to_owned(), |damage| format!("{status}: {damage}")),
            when(at),
        ]
    });
    let shown = all.len().min(MOST_CHECKPOINTS);
    let caption = format!("The newest {shown} of {}", all.len());
    html.table(&caption, &["Step", ">Generation", ">Size", ">Durable after", "Status", "Committed at"], rows);
    html
}

/// What the page was made of.
pub(super) fn sources(input: &Input<'_>) -> Html {
    let Input { state, curve, broken, account, .. } = input;
    let mut html = Html::default();
    html.open("ul", &[]);
    html.words("li", &format!("The run's journal: {}.", human::plural(state.next(), "record")));
    html.words("li", &format!("Figures of {}, each as it was done last.", human::plural(curve.len() as u64, "step")));
    for broken in broken.iter().take(MOST_ROWS) {
        html.words("li", &format!("Some figures are missing: {broken}"));
    }
    for note in account.notes.iter().take(MOST_ROWS) {
        html.words("li", note);
    }
    for (key, value) in state.overrides().iter().take(MOST_ROWS) {
        html.words("li", &format!("Changed on a resume: {key} = {value}"));
    }
    html.words("li", &format!("Made by trainer {}.", env!("CARGO_PKG_VERSION")));
    html.close("ul");
    html
}
