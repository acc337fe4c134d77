//! Numbers as people read them. Machines get `--json`.

use std::time::Duration;

use crate::config::Shares;

/// Bytes in binary units: `512 B`, `1.5 KiB`, `480 MiB`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
        // At 1023.5 the rounded number would be 1024 of the smaller unit.
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if unit == "B" { format!("{count} B") } else { format!("{} {unit}", three_digits(value)) }
}

/// A word of a command, as a shell takes it: in single quotes, unless it is plain.
pub fn shell(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:@%+=,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A count of things in decimal units: `950`, `12.3k`, `4.56M`.
pub fn count(value: f64) -> String {
    if !value.is_finite() {
        return "?".into();
    }
    let mut value = value;
    let mut unit = "";
    for larger in ["k", "M", "G", "T"] {
        if value.abs() < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = larger;
    }
    if unit.is_empty() { format!("{value:.0}") } else { format!("{}{unit}", three_digits(value)) }
}

/// Seconds: `0.0034` is `3.4 ms`, `0.95` is `950 ms`, `12.34` is `12.3 s`, `5400` is `1h30m`.
pub fn seconds(value: f64) -> String {
    match value {
        v if !v.is_finite() || v < 0.0 => "?".into(),
        0.0 => "0 s".into(),
        v if v < 0.000_999_5 => format!("{} µs", three_digits(v * 1e6)),
        v if v < 0.999_5 => format!("{} ms", three_digits(v * 1e3)),
        v if v < 99.95 => format!("{} s", three_digits(v)),
        v => long(Duration::try_from_secs_f64(v.round()).unwrap_or(Duration::MAX)),
    }
}

/// The two largest units: `2d3h`, `1h30m`, `1m40s`.
fn long(duration: Duration) -> String {
    let total = duration.as_secs();
    let units = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];
    let first = units.iter().position(|(_, size)| total >= *size).unwrap_or(3);
    let mut text = String::new();
    let mut rest = total;
    for (name, size) in units.iter().skip(first).take(2) {
        if rest >= *size {
            text.push_str(&format!("{}{name}", rest / size));
            rest %= size;
        }
    }
    text
}

fn three_digits(value: f64) -> String {
    if value < 9.995 {
        format!("{value:.2}")
    } else if value < 99.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// US dollars: `$0.02`, `$0.0004`, `$1230`; small amounts keep a significant digit.
pub fn dollars(amount: f64) -> String {
    match amount {
        v if !v.is_finite() || v < 0.0 => "?".into(),
        0.0 => "$0".into(),
        v if v < 0.000_05 => "less than $0.0001".into(),
        v if v < 0.009_5 => format!("${v:.4}"),
        v if v < 99.5 => format!("${v:.2}"),
        v => format!("${v:.0}"),
    }
}

/// A past time: `12 s ago`, `3h4m ago`; a moment ahead of our clock is `just now`.
pub fn ago(then: jiff::Timestamp, now: jiff::Timestamp) -> String {
    let past = now.duration_since(then).as_secs();
    if past <= 0 { "just now".into() } else { format!("{} ago", long(Duration::from_secs(past.unsigned_abs()))) }
}

/// `32 sequences on 5 workers: 2 have 7, 3 have 6; 91 % efficiency`.
pub fn shares(shares: &Shares) -> String {
    let Shares { sequences, ranks, efficiency } = shares;
    let most = ranks.iter().max().copied().unwrap_or(0);
    let with_most = ranks.iter().filter(|share| **share == most).count();
    let rest = ranks.len() - with_most;
    let verb = |count| if count == 1 { "has" } else { "have" };
    format!(
        "{sequences} sequences on {} workers: {with_most} {} {most}, {rest} {} {}; {:.0} % efficiency",
        ranks.len(),
        verb(with_most),
        verb(rest),
        most.saturating_sub(1),
        efficiency * 100.0
    )
}

/// `1 step`, `2 steps`.
pub fn plural(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Text from outside, made safe for a terminal: control characters are shown, not obeyed.
pub fn plain(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1_048_575, "1.00 MiB"),
            (500 << 20, "500 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        for (value, text) in [(0.0, "0"), (999.4, "999"), (999.6, "1.00k"), (12_345.0, "12.3k"), (f64::NAN, "?")] {
            assert_eq!(count(value), text);
        }
        for (value, text) in [
            (0.0, "0 s"),
            (0.000_25, "250 µs"),
            (0.0034, "3.40 ms"),
            (0.95, "950 ms"),
            (0.9996, "1.00 s"),
            (12.34, "12.3 s"),
            (100.0, "1m40s"),
            (5400.0, "1h30m"),
            (183_600.0, "2d3h"),
            (f64::INFINITY, "?"),
            (1e300, "213503982334601d7h"),
        ] {
            assert_eq!(seconds(value), text);
        }
        for (value, text) in [
            (0.0, "$0"),
            (1e-9, "less than $0.0001"),
            (0.001_23, "$0.0012"),
            (0.5, "$0.50"),
            (12_345.6, "$12346"),
            (f64::NAN, "?"),
        ] {
            assert_eq!(dollars(value), text);
        }
        for (word, quoted) in [
            ("s3://b/runs", "s3://b/runs"),
            ("file:///a b/c'd", r"'file:///a b/c'\''d'"),
            ("$HOME", "'$HOME'"),
            ("~", "'~'"),
            ("", "''"),
        ] {
            assert_eq!(shell(word), quoted);
        }
        assert_eq!((plural(1, "step"), plural(2, "step")), ("1 step".into(), "2 steps".into()));
        assert_eq!(plain("a\u{1b}[31mb\n"), "a\\u{1b}[31mb\\n");
        let uneven = Shares { sequences: 32, ranks: vec![6, 6, 7, 6, 7], efficiency: 32.0 / 35.0 };
        assert_eq!(shares(&uneven), "32 sequences on 5 workers: 2 have 7, 3 have 6; 91 % efficiency");
        let uneven = Shares { sequences: 5, ranks: vec![1, 2, 2], efficiency: 5.0 / 6.0 };
        assert_eq!(shares(&uneven), "5 sequences on 3 workers: 2 have 2, 1 has 1; 83 % efficiency");
    }

    #[test]
    fn ages_are_never_negative() {
        let now = jiff::Timestamp::from_second(1_000_000).unwrap();
        let at = |second| jiff::Timestamp::from_second(second).unwrap();
        assert_eq!(ago(at(999_988), now), "12s ago");
        assert_eq!(ago(at(1_000_010), now), "just now");
    }
}
