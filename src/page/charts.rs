//! The pictures of the report, each for a wide screen and for a phone.

use super::{
    decimate::decimate,
    html::Html,
    svg::{self, Frame, Scale, axes, bar, curve, line, path, picture, text},
};
use crate::{
    history::account::{Account, Activity, Stretch},
    ids::{Generation, NodeId, Step},
    metrics::Series,
    report::human,
};

/// The width of a picture, and how many points a curve in it has at most.
#[derive(Clone, Copy, Debug)]
struct Size {
    class: &'static str,
    name: &'static str,
    width: f64,
    points: usize,
}

/// The same picture twice: style shows the one that fits.
const SIZES: [Size; 2] = [
    Size { class: "wide", name: "wide", width: 960.0, points: 3200 },
    Size { class: "narrow", name: "narrow", width: 360.0, points: 1200 },
];
/// The height of a chart with axes.
const HEIGHT: f64 = 300.0;
/// The most generations that have a shade; those of more are too narrow to tell apart.
const MOST_BANDS: usize = 400;
/// The most machines that have a bar.
pub(super) const MOST_MACHINES: usize = 60;

/// Both pictures, in one figure with its caption.
fn figure(caption: &str, draw: impl Fn(Size) -> Html) -> Html {
    let mut html = Html::default();
    html.element("figure", &[], |html| {
        for size in SIZES {
            html.add(&draw(size));
        }
        html.words("figcaption", caption);
    });
    html
}

/// Where generations begin and end on the curve.
#[derive(Clone, Debug, Default)]
pub(super) struct Marks {
    /// The last step of a generation that was interrupted.
    pub interrupted: Vec<Step>,
    /// The step that a generation resumed from.
    pub resumed: Vec<(Generation, Step)>,
}

fn frame(size: Size, height: f64) -> Frame {
    let left = if size.width < 500.0 { 46.0 } else { 58.0 };
    Frame { left, right: size.width - 12.0, top: 34.0, bottom: height - 46.0 }
}

/// The loss of each step, and the held-out loss where it was measured; `None`: there is none.
pub(super) fn loss(series: &Series, marks: &Marks) -> Option<Html> {
    let xs: Vec<f64> = series.places().map(|(step, ..)| step.get() as f64).collect();
    let training = series.column("loss")?;
    let held_out: Vec<(f64, f64)> = series
        .column("held_out_loss")
        .map(|ys| xs.iter().copied().zip(ys.iter().copied()).filter(|(_, y)| y.is_finite()).collect())
        .unwrap_or_default();
    let values = || training.iter().copied().chain(held_out.iter().map(|(_, y)| *y));
    Scale::around(values(), 0.0, 1.0)?;
    let (first, last) = (xs.first().copied()?, xs.last().copied()?);
    let description = format!(
        "Training loss from step {first} to step {last}, with {} and {}.",
        human::plural(marks.interrupted.len() as u64, "interruption"),
        human::plural(marks.resumed.len() as u64, "resume")
    );
    let caption = "Each step once, as it was done last. A dashed line marks the last step before an interruption, a \
                   triangle the step that a generation resumed from. Shades tell generations apart.";
    Some(figure(caption, |size| {
        let frame = frame(size, HEIGHT);
        let x = Scale::linear(first, last, frame.left, frame.right);
        // It was found above.
        let y = Scale::around(values(), frame.bottom, frame.top).unwrap_or(Scale::linear(0.0, 1.0, 1.0, 0.0));
        let id = format!("loss-{}", size.name);
        picture(size.class, &id, (size.width, HEIGHT), ("Loss", description.as_str()), |html| {
            bands(html, frame, &x, marks);
            axes(html, frame, &x, &y, ("step", "loss"));
            for at in columns(&x, marks.interrupted.iter()) {
                line(html, "interrupted", (at, frame.top), (at, frame.bottom));
            }
            let point = |(x_of, y_of): (f64, f64)| (x.at(x_of), y.at(y_of));
            let places = decimate(&xs, training, size.points);
            let points = places.into_iter().map(|place| place.map(|place| point((xs[place], training[place]))));
            curve(html, "curve loss", &path(points));
            let (held_x, held_y): (Vec<f64>, Vec<f64>) = held_out.iter().copied().unzip();
            let places = decimate(&held_x, &held_y, size.points / 2);
            let points = places.into_iter().map(|place| place.map(|place| point((held_x[place], held_y[place]))));
            if !held_out.is_empty() {
                curve(html, "curve held-out", &path(points));
            }
            for at in columns(&x, marks.resumed.iter().map(|(_, step)| step)) {
                let (low, high) = (frame.bottom, frame.bottom - 8.0);
                let corners = [Some((at - 4.5, low)), Some((at + 4.5, low)), Some((at, high))];
                curve(html, "resumed", &path(corners.into_iter()));
            }
            let mut names = vec![("loss", "training loss")];
            if !held_out.is_empty() {
                names.push(("held-out", "held-out loss"));
            }
            key(html, size, &names);
        })
    }))
}

/// The places of steps; of those that no eye can part, one.
fn columns<'a>(x: &Scale, steps: impl Iterator<Item = &'a Step>) -> Vec<f64> {
    let mut places: Vec<f64> = steps.map(|step| (2.0 * x.at(step.get() as f64)).round() / 2.0).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    places
}

/// Names of curves, at the top right.
fn key(html: &mut Html, size: Size, names: &[(&'static str, &str)]) {
    let mut at = size.width - 12.0;
    for (class, name) in names.iter().rev() {
        // A letter of this size is about seven units wide.
        at -= 7.0 * name.len() as f64 + 8.0;
        text(html, "name", (at, 18.0), name);
        let stroke = match *class {
            "held-out" => "curve held-out",
            _ => "curve loss",
        };
        curve(html, stroke, &path([Some((at - 22.0, 14.0)), Some((at - 6.0, 14.0))].into_iter()));
        at -= 30.0;
    }
}

/// Every second generation has a shade.
fn bands(html: &mut Html, frame: Frame, x: &Scale, marks: &Marks) {
    if marks.resumed.len() > MOST_BANDS {
        return;
    }
    let edges: Vec<f64> = marks.resumed.iter().map(|(_, step)| x.at(step.get() as f64)).collect();
    for (index, from) in edges.iter().enumerate().step_by(2) {
        let to = edges.get(index + 1).copied().unwrap_or(frame.right);
        if to > *from {
            bar(html, "band", (*from, frame.top), (to - from, frame.bottom - frame.top));
        }
    }
}

/// How long each save took from the end of its step until it counted.
pub(super) fn lag(saves: &[(Step, f64)]) -> Option<Html> {
    let mut saves: Vec<(f64, f64)> = saves.iter().map(|(step, lag)| (step.get() as f64, *lag)).collect();
    saves.retain(|(_, lag)| lag.is_finite() && *lag >= 0.0);
    saves.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (xs, ys): (Vec<f64>, Vec<f64>) = saves.into_iter().unzip();
    let most = ys.iter().copied().fold(0.0, f64::max);
    let (first, last) = (xs.first().copied()?, xs.last().copied()?);
    let description = format!("{}; the longest took {}.", human::plural(ys.len() as u64, "save"), human::seconds(most));
    let caption = "Seconds from the end of a step until its save was complete in the store and counted. A kill in this \
                   time loses the step.";
    Some(figure(caption, |size| {
        let frame = frame(size, 220.0);
        let x = Scale::linear(first, last, frame.left, frame.right);
        let y = Scale::linear(0.0, 1.1 * most.max(1e-3), frame.bottom, frame.top);
        let id = format!("lag-{}", size.name);
        picture(size.class, &id, (size.width, 220.0), ("Durable lag", description.as_str()), |html| {
            axes(html, frame, &x, &y, ("step", "seconds"));
            let places = decimate(&xs, &ys, size.points / 2);
            let points = places.into_iter().map(|place| place.map(|place| (x.at(xs[place]), y.at(ys[place]))));
            curve(html, "curve lag", &path(points));
        })
    }))
}

/// The style of an activity.
pub(super) const fn class(activity: Activity) -> &'static str {
    match activity {
        Activity::Productive => "productive",
        Activity::Stalled => "stalled",
        Activity::Repeated => "repeated",
        Activity::Starting => "starting",
        Activity::Ending => "ending",
        Activity::Waiting => "waiting",
        Activity::Away => "away",
        Activity::Unrecorded => "unrecorded",
        Activity::Complete => "complete",
    }
}

/// The share of a whole, for people.
pub(super) fn percent(share: f64) -> String {
    match 100.0 * share {
        0.0 => "0 %".into(),
        share if share < 0.1 => "< 0.1 %".into(),
        share if share < 99.95 => format!("{share:.1} %"),
        share => format!("{share:.0} %"),
    }
}

/// The parts of the run's time, each behind the one before it: together they are the whole.
pub(super) fn waterfall(account: &Account) -> Option<Html> {
    let whole = account.whole_s;
    if whole <= 0.0 {
        return None;
    }
    let description = format!(
        "{} parts that together make {}; productive steps are {} of it.",
        account.parts.len(),
        human::seconds(whole),
        percent(account.part(Activity::Productive).seconds / whole)
    );
    let caption = "Every second from the creation of the run to its last sign of life has one name. Each bar begins \
                   where the one above it ends.";
    Some(figure(caption, |size| {
        // On a phone a name stands above its bar.
        let (left, right, row, above) =
            if size.width < 500.0 { (4.0, 4.0, 40.0, 16.0) } else { (210.0, 140.0, 28.0, 0.0) };
        let height = row * account.parts.len() as f64 + 12.0;
        let x = Scale::linear(0.0, whole, left, size.width - right);
        let id = format!("time-{}", size.name);
        picture(size.class, &id, (size.width, height), ("Where the time went", description.as_str()), |html| {
            let mut sum = 0.0;
            for (index, part) in account.parts.iter().enumerate() {
                let top = row * index as f64 + 4.0;
                let (from, to) = (x.at(sum), x.at(sum + part.seconds));
                sum += part.seconds;
                let value = format!("{}, {}", human::seconds(part.seconds), percent(part.seconds / whole));
                line(html, "grid", (left, top + above + 16.0), (size.width - right, top + above + 16.0));
                bar(html, class(part.activity), (from, top + above), ((to - from).max(1.5), 16.0));
                if above > 0.0 {
                    text(html, "row", (left, top + 11.0), part.activity.word());
                    text(html, "row end", (size.width - right, top + 11.0), &value);
                } else {
                    text(html, "row end", (left - 10.0, top + 13.0), part.activity.word());
                    text(html, "row", (size.width - right + 10.0, top + 13.0), &value);
                }
            }
        })
    }))
}

/// The machine's name, short enough for the margin.
fn short(node: &NodeId, most: usize) -> String {
    let name = node.as_str();
    if name.chars().count() <= most {
        return name.to_owned();
    }
    let mut text: String = name.chars().take(most - 1).collect();
    text.push('…');
    text
}

/// A machine, and when its generations lived, seconds since the run was created.
pub(super) struct Machine<'a> {
    pub node: &'a NodeId,
    pub lives: Vec<(f64, f64)>,
}

/// The machines in the order in which they came.
pub(super) fn machines(account: &Account) -> Vec<Machine<'_>> {
    let mut all: Vec<Machine<'_>> = Vec::new();
    let mut places: std::collections::BTreeMap<&NodeId, usize> = std::collections::BTreeMap::new();
    for lived in &account.generations {
        for node in &lived.nodes {
            let place = *places.entry(node).or_insert_with(|| {
                all.push(Machine { node, lives: Vec::new() });
                all.len() - 1
            });
            all[place].lives.push((lived.begin_s, lived.end_s));
        }
    }
    all
}

/// What the run did when, and a bar for each life of each machine.
pub(super) fn lives(account: &Account) -> Option<Html> {
    let whole = account.whole_s;
    let machines = machines(account);
    if whole <= 0.0 || machines.is_empty() {
        return None;
    }
    let description = format!(
        "{} in {} over {}.",
        human::plural(machines.len() as u64, "machine"),
        human::plural(account.generations.len() as u64, "generation"),
        human::seconds(whole)
    );
    let caption = "The first row shows what the run did, in the colours of the time above. Below it each machine has a \
                   row, and each of its generations a bar.";
    let shown = machines.len().min(MOST_MACHINES);
    Some(figure(caption, |size| {
        let narrow = size.width < 500.0;
        let left = if narrow { 92.0 } else { 170.0 };
        let row = 18.0;
        let height = row * (shown + 1) as f64 + 62.0;
        let frame = Frame { left, right: size.width - 12.0, top: 8.0, bottom: height - 46.0 };
        let unit =
            [("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)].into_iter().find(|(_, s)| whole >= 2.0 * s);
        let (name, unit_s) = unit.unwrap_or(("seconds", 1.0));
        let x = Scale::linear(0.0, whole / unit_s, frame.left, frame.right);
        let id = format!("lives-{}", size.name);
        picture(size.class, &id, (size.width, height), ("Machines and their lives", description.as_str()), |html| {
            text(html, "row end", (left - 8.0, frame.top + 12.0), "the run");
            for (activity, from, to) in strip(&account.stretches, whole, (frame.right - left) as usize) {
                let at = |share: f64| left + (frame.right - left) * share;
                bar(html, class(activity), (at(from), frame.top), (at(to) - at(from), 13.0));
            }
            for (index, machine) in machines.iter().take(shown).enumerate() {
                let top = frame.top + row * (index + 1) as f64;
                text(html, "row end", (left - 8.0, top + 12.0), &short(machine.node, if narrow { 9 } else { 19 }));
                // Neighbours that no eye can part are one bar.
                let mut merged: Vec<(f64, f64)> = Vec::new();
                for (from, to) in machine.lives.iter().map(|(from, to)| (x.at(from / unit_s), x.at(to / unit_s))) {
                    match merged.last_mut() {
                        Some(last) if from - last.1 < 0.4 && last.1 - last.0 < 3.0 => last.1 = to,
                        _ => merged.push((from, to)),
                    }
                }
                for (number, (from, to)) in merged.into_iter().enumerate() {
                    let class = if number % 2 == 0 { "life" } else { "life other" };
                    bar(html, class, (from, top), ((to - from).max(1.0), 13.0));
                }
            }
            let (ticks, digits) = x.ticks(((frame.right - left) / 90.0).max(2.0) as u32);
            for tick in ticks {
                let at = x.at(tick);
                line(html, "axis", (at, frame.bottom), (at, frame.bottom + 4.0));
                text(html, "tick x", (at, frame.bottom + 18.0), &svg::label(tick, digits));
            }
            line(html, "axis", (left, frame.bottom), (frame.right, frame.bottom));
            text(html, "name end", (frame.right, frame.bottom + 36.0), &format!("{name} since the run was created"));
        })
    }))
}

/// What the run did most in each column of equal time: name, begin and end as shares of the whole.
fn strip(stretches: &[Stretch], whole: f64, columns: usize) -> Vec<(Activity, f64, f64)> {
    let columns = columns.max(1);
    let mut out: Vec<(Activity, f64, f64)> = Vec::new();
    let mut next = 0;
    for column in 0..columns {
        let [from, to] = [column, column + 1].map(|at| whole * at as f64 / columns as f64);
        let mut spent = [0.0; Activity::ALL.len()];
        let mut at = next;
        while let Some(stretch) = stretches.get(at).filter(|stretch| stretch.begin_s < to) {
            let place = Activity::ALL.iter().position(|name| *name == stretch.activity).unwrap_or_default();
            spent[place] += stretch.end_s.min(to) - stretch.begin_s.max(from);
            if stretch.end_s <= to {
                next = at + 1;
            }
            at += 1;
        }
        let most = spent.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(place, _)| place);
        let (begin, end) = (column as f64 / columns as f64, (column + 1) as f64 / columns as f64);
        match out.last_mut() {
            Some((name, _, until)) if *name == Activity::ALL[most] => *until = end,
            _ => out.push((Activity::ALL[most], begin, end)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretch(activity: Activity, begin_s: f64, end_s: f64) -> Stretch {
        Stretch { activity, begin_s, end_s, generation: None, machines: 1, interrupted: false }
    }

    #[test]
    fn a_strip_shows_what_took_most_of_each_column() {
        let all = [
            stretch(Activity::Waiting, 0.0, 10.0),
            stretch(Activity::Productive, 10.0, 14.0),
            stretch(Activity::Stalled, 14.0, 15.0),
            stretch(Activity::Productive, 15.0, 40.0),
        ];
        let strip = strip(&all, 40.0, 8);
        assert_eq!(strip, [(Activity::Waiting, 0.0, 0.25), (Activity::Productive, 0.25, 1.0)]);
    }

    #[test]
    fn shares_are_short() {
        for (share, text) in [(0.0, "0 %"), (1e-6, "< 0.1 %"), (0.1234, "12.3 %"), (0.9999, "100 %"), (1.0, "100 %")] {
            assert_eq!(percent(share), text);
        }
    }
}
