//! Scales, ticks, axes and paths of plain SVG. Pure.
//!
//! A picture is drawn for one width. Its text is as large as the page's where the picture is shown at that width.

use super::html::{Html, number_in};

/// A rectangle, in the picture's units: y grows downwards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Frame {
    pub left: f64,
    pub right: f64,
    pub top: f64,
    pub bottom: f64,
}

/// Values along one axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale {
    /// The values at both ends; for a logarithmic scale above 0.
    low: f64,
    high: f64,
    is_log: bool,
    /// The coordinates of both ends.
    from: f64,
    to: f64,
}

/// Values that spread wider than by this factor are shown on a logarithmic scale.
const WIDE: f64 = 20.0;

impl Scale {
    /// From `low` to `high`, as they are.
    pub fn linear(low: f64, high: f64, from: f64, to: f64) -> Self {
        let high = if high > low { high } else { low + low.abs().max(1.0) * 1e-3 };
        Self { low, high, is_log: false, from, to }
    }

    /// All of these values, with room beside them; logarithmic if they are above 0 and spread widely.
    pub fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Option<Self> {
        let finite = values.filter(|value| value.is_finite());
        let (low, high) = finite.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
        if low > high {
            return None;
        }
        if low > 0.0 && high / low > WIDE {
            return Some(Self { low: low / 1.1, high: high * 1.1, is_log: true, from, to });
        }
        let room = (0.05 * (high - low)).max(high.abs().max(low.abs()) * 1e-6).max(1e-12);
        Some(Self::linear(low - room, high + room, from, to))
    }

    /// The coordinate of a value; values beyond the ends lie on them.
    pub fn at(&self, value: f64) -> f64 {
        let share = if self.is_log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + (self.to - self.from) * share.clamp(0.0, 1.0)
    }

    /// Round values within the ends, at most about `count`, and how many digits after the point they need.
    pub fn ticks(&self, count: u32) -> (Vec<f64>, usize) {
        if self.is_log {
            return self.log_ticks(count);
        }
        let span = self.high - self.low;
        let rough = span / f64::from(count.max(1));
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|unit| unit * power).find(|step| *step >= rough * 0.999);
        let step = step.unwrap_or(10.0 * power);
        let (first, last) = ((self.low / step).ceil(), (self.high / step).floor());
        if !(step > 0.0 && step.is_finite() && last - first < 100.0) {
            return (vec![self.low], 2);
        }
        let mut ticks = Vec::new();
        let mut at = first;
        while at <= last {
            ticks.push(at * step);
            at += 1.0;
        }
        let digits = (-step.log10() - 1e-9).ceil().clamp(0.0, 9.0);
        (ticks, digits as usize)
    }

    fn log_ticks(&self, count: u32) -> (Vec<f64>, usize) {
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let units: &[f64] = if decades.clone().count() <= 3 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let mut ticks: Vec<f64> =
            decades.flat_map(|decade| units.iter().map(move |unit| unit * 10_f64.powi(decade))).collect();
        ticks.retain(|tick| (self.low..=self.high).contains(tick));
        let every = ticks.len().div_ceil(count.max(1) as usize).max(1);
        let mut ticks: Vec<f64> = ticks.into_iter().step_by(every).collect();
        if ticks.is_empty() {
            ticks.push(self.low);
        }
        let digits = (-ticks[0].log10() - 1e-9).ceil().clamp(0.0, 9.0);
        (ticks, digits as usize)
    }
}

/// A tick's text: large numbers in thousands and millions, small ones with an exponent.
pub(super) fn label(value: f64, digits: usize) -> String {
    if value != 0.0 && (value.abs() >= 1e15 || value.abs() < 1e-5) {
        return format!("{value:.1e}");
    }
    for (size, unit) in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if value.abs() >= 10.0 * size || (value.abs() >= size && value % (size / 10.0) == 0.0) {
            let text = format!("{:.3}", value / size);
            return format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'));
        }
    }
    format!("{value:.digits$}")
}

/// A line through these points; where one is `None`, it is broken.
pub(super) fn path(points: impl Iterator<Item = Option<(f64, f64)>>) -> String {
    let mut out = String::new();
    let (mut is_down, mut alone) = (false, None);
    for point in points {
        let Some((x, y)) = point else {
            end(&mut out, alone.take());
            is_down = false;
            continue;
        };
        out.push(if is_down { 'L' } else { 'M' });
        number_in(x, &mut out);
        out.push(' ');
        number_in(y, &mut out);
        alone = if is_down { None } else { Some(()) };
        is_down = true;
    }
    end(&mut out, alone);
    out
}

/// A point alone is drawn as a line of no length: its round ends show it.
fn end(out: &mut String, alone: Option<()>) {
    if alone.is_some() {
        out.push_str("h0");
    }
}

/// A picture of this width and height. `id` is unique in the page; the title and the description are read aloud.
pub(super) fn picture(
    class: &'static str,
    id: &str,
    (width, height): (f64, f64),
    (title, description): (&str, &str),
    draw: impl FnOnce(&mut Html),
) -> Html {
    let mut html = Html::default();
    let (title_id, description_id) = (format!("{id}-title"), format!("{id}-desc"));
    let named = format!("{title_id} {description_id}");
    let mut view = "0 0 ".to_owned();
    number_in(width, &mut view);
    view.push(' ');
    number_in(height, &mut view);
    html.open(
        "svg",
        &[
            ("class", class.into()),
            ("viewBox", view.as_str().into()),
            ("role", "img".into()),
            ("aria-labelledby", named.as_str().into()),
        ],
    );
    html.open("title", &[("id", title_id.as_str().into())]).text(title).close("title");
    html.open("desc", &[("id", description_id.as_str().into())]).text(description).close("desc");
    draw(&mut html);
    html.close("svg");
    html
}

/// Text at a place.
pub(super) fn text(html: &mut Html, class: &'static str, (x, y): (f64, f64), text: &str) {
    html.open("text", &[("class", class.into()), ("x", x.into()), ("y", y.into())]).text(text).close("text");
}

/// A straight line.
pub(super) fn line(html: &mut Html, class: &'static str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let ends = [("class", class.into()), ("x1", x1.into()), ("y1", y1.into()), ("x2", x2.into()), ("y2", y2.into())];
    html.open("line", &ends).close("line");
}

/// A filled rectangle.
pub(super) fn bar(html: &mut Html, class: &'static str, (x, y): (f64, f64), (width, height): (f64, f64)) {
    let sides = [
        ("class", class.into()),
        ("x", x.into()),
        ("y", y.into()),
        ("width", width.max(0.0).into()),
        ("height", height.into()),
    ];
    html.open("rect", &sides).close("rect");
}

/// A curve.
pub(super) fn curve(html: &mut Html, class: &'static str, path: &str) {
    html.open("path", &[("class", class.into()), ("d", path.into())]).close("path");
}

/// Both axes with their grid; the names stand at the ends of the axes. Along `x` there are whole numbers alone.
pub(super) fn axes(html: &mut Html, frame: Frame, x: &Scale, y: &Scale, (x_name, y_name): (&str, &str)) {
    let Frame { left, right, top, bottom } = frame;
    let (ticks, digits) = y.ticks(((bottom - top) / 45.0).max(2.0) as u32);
    for tick in ticks {
        let at = y.at(tick);
        line(html, "grid", (left, at), (right, at));
        text(html, "tick y", (left - 6.0, at + 4.0), &label(tick, digits));
    }
    let (ticks, _) = x.ticks(((right - left) / 90.0).max(2.0) as u32);
    for tick in ticks.into_iter().filter(|tick| tick.fract() == 0.0) {
        let at = x.at(tick);
        line(html, "axis", (at, bottom), (at, bottom + 4.0));
        text(html, "tick x", (at, bottom + 18.0), &label(tick, 0));
    }
    line(html, "axis", (left, bottom), (right, bottom));
    text(html, "name end", (right, bottom + 36.0), x_name);
    text(html, "name", (4.0, top - 12.0), y_name);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_the_ends() {
        let ticks = |low, high, count| Scale::linear(low, high, 0.0, 100.0).ticks(count);
        assert_eq!(ticks(0.0, 10.0, 5), (vec![0.0, 2.0, 4.0, 6.0, 8.0, 10.0], 0));
        assert_eq!(ticks(1.23, 1.29, 3), (vec![1.24, 1.26, 1.28], 2));
        assert_eq!(ticks(-1.0, 1.0, 2), (vec![-1.0, 0.0, 1.0], 0));
        for (low, high) in [(5.0, 5.0), (0.0, 0.0), (1e300, 1.1e300), (-1e-300, 1e-300), (1e15, 1e15 + 1.0)] {
            let (ticks, _) = ticks(low, high, 4);
            assert!(!ticks.is_empty() && ticks.len() < 100, "{low} {high}: {ticks:?}");
        }
        let log = Scale::around([0.01, 100.0].into_iter(), 100.0, 0.0).unwrap();
        assert_eq!(log.ticks(5), (vec![0.01, 0.1, 1.0, 10.0, 100.0], 2));
        assert!(log.at(1.0) > 49.0 && log.at(1.0) < 51.0 && log.at(-5.0) == 100.0);
        assert!(Scale::around([f64::NAN, f64::INFINITY].into_iter(), 0.0, 1.0).is_none());
        let one = Scale::around([2.0].into_iter(), 0.0, 10.0).unwrap();
        assert!((one.at(2.0) - 5.0).abs() < 1e-6, "a single value lies in the middle");
    }

    #[test]
    fn labels_are_short() {
        for (value, digits, text) in [
            (0.0, 0, "0"),
            (0.25, 2, "0.25"),
            (1000.0, 0, "1k"),
            (1500.0, 0, "1.5k"),
            (1234.0, 0, "1234"),
            (200_000.0, 0, "200k"),
            (1_500_000.0, 0, "1.5M"),
            (25_000_000.0, 0, "25M"),
            (1e-7, 9, "1.0e-7"),
            (1e300, 0, "1.0e300"),
        ] {
            assert_eq!(label(value, digits), text);
        }
    }

    #[test]
    fn a_gap_breaks_the_line_and_a_point_alone_is_seen() {
        let points = [Some((0.0, 1.0)), Some((1.0, 2.0)), None, Some((3.0, 1.5)), None];
        assert_eq!(path(points.into_iter()), "M0 1L1 2M3 1.5h0");
    }
}
