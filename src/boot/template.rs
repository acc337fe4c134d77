//! Run ids made from a date: `reports-{year}q{quarter}`.

use jiff::Zoned;

use crate::{
    error::{Error, Kind, Result},
    ids::RunId,
};

/// A field and its replacement.
type Field = (&'static str, fn(&Zoned) -> String);

/// The fields. `week` is the number of ISO 8601, which belongs to `week_year`: 2027-01-01 is in week 53 of 2026.
const FIELDS: [Field; 6] = [
    ("year", |now| format!("{:04}", now.year())),
    ("quarter", |now| ((now.month() - 1) / 3 + 1).to_string()),
    ("month", |now| format!("{:02}", now.month())),
    ("week", |now| format!("{:02}", now.date().iso_week_date().week())),
    ("week_year", |now| format!("{:04}", now.date().iso_week_date().year())),
    ("day", |now| format!("{:02}", now.day())),
];

/// The run id that `template` gives at `now`, in the time zone of `now`.
///
/// # Errors
/// [`Kind::Config`]: a field that is not known, a brace that is not closed, or a text that is no run id.
pub fn render(template: &str, now: &Zoned) -> Result<RunId> {
    let wrong = |reason: String| {
        let fields: Vec<String> = FIELDS.iter().map(|(name, _)| format!("{{{name}}}")).collect();
        Error::new(Kind::Config, format!("run id template {template:?} {reason}"))
            .with_hint(format!("there are {}", fields.join(", ")))
    };
    let (mut text, mut rest) = (String::new(), template);
    while let Some((before, after)) = rest.split_once('{') {
        let (name, behind) = after.split_once('}').ok_or_else(|| wrong("has a '{' without its '}'".into()))?;
        let (_, value) = FIELDS
            .iter()
            .find(|(field, _)| *field == name)
            .ok_or_else(|| wrong(format!("has an unknown field {{{name}}}")))?;
        text += before;
        text += &value(now);
        rest = behind;
    }
    text += rest;
    if text.contains('}') {
        return Err(wrong("has a '}' without its '{'".into()));
    }
    RunId::new(text).map_err(|error| wrong(format!("does not make a valid run id: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: &str) -> Zoned {
        time.parse().unwrap()
    }

    #[test]
    fn a_date_becomes_a_run_id() {
        for (template, time, id) in [
            ("reports-{year}q{quarter}", "2026-11-22T10:00:00[UTC]", "reports-2026q4"),
            ("reports-{year}q{quarter}", "2026-12-31T23:59:59[UTC]", "reports-2026q4"),
            ("reports-{year}q{quarter}", "2027-01-01T00:00:00[UTC]", "reports-2027q1"),
            ("reports-{year}q{quarter}", "2026-03-31T23:59:59[UTC]", "reports-2026q1"),
            ("reports-{year}q{quarter}", "2026-04-01T00:00:00[UTC]", "reports-2026q2"),
            ("reports-{year}q{quarter}", "2026-09-30T12:00:00[UTC]", "reports-2026q3"),
            ("d{year}-{month}-{day}", "2028-02-29T00:00:00[UTC]", "d2028-02-29"),
            ("w{week_year}-{week}", "2027-01-01T12:00:00[UTC]", "w2026-53"),
            ("w{week_year}-{week}", "2027-01-04T00:00:00[UTC]", "w2027-01"),
            ("w{week_year}-{week}", "2024-12-30T00:00:00[UTC]", "w2025-01"),
            ("plain", "2026-11-22T10:00:00[UTC]", "plain"),
            ("{year}{year}", "2026-11-22T10:00:00[UTC]", "20262026"),
        ] {
            assert_eq!(render(template, &at(time)).unwrap().as_str(), id, "{template} at {time}");
        }
        // The same instant, in two time zones, on two sides of a new year.
        let utc = at("2026-12-31T20:00:00[UTC]");
        let tokyo = utc.with_time_zone(jiff::tz::TimeZone::fixed(jiff::tz::offset(9)));
        assert_eq!(render("{year}q{quarter}", &utc).unwrap().as_str(), "2026q4");
        assert_eq!(render("{year}q{quarter}", &tokyo).unwrap().as_str(), "2027q1");
    }

    #[test]
    fn a_wrong_template_is_refused_with_the_list_of_fields() {
        for (template, part) in [
            ("{quater}", "unknown field {quater}"),
            ("{}", "unknown field {}"),
            ("{year", "without its '}'"),
            ("year}", "without its '{'"),
            ("a/{year}", "does not make a valid run id"),
            ("", "does not make a valid run id"),
            ("-{year}", "does not make a valid run id"),
        ] {
            let error = render(template, &at("2026-11-22T10:00:00[UTC]")).unwrap_err();
            assert!(error.to_string().contains(part), "{template}: {error}");
            assert_eq!(error.kind(), Kind::Config);
            assert!(error.hint().unwrap().contains("{year}, {quarter}, {month}, {week}, {week_year}, {day}"));
        }
    }
}
