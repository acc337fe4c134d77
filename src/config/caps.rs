//! When a run ends before its last step because it has taken enough time or money.
//!
//! Stored layout: the section `run`, if any of its settings has a value.

use serde::{Deserialize, Serialize};

use super::{ConfigError, raw::Raw};

/// Seconds of an hour.
pub const HOUR_S: f64 = 3600.0;

/// The caps of a run. The run ends cleanly at the first that it reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CapsConfig {
    /// Hours of training over the whole run: the time of its generations, without the waits between them; `None`: no
    /// limit. Several nodes that train together for an hour train for one hour.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_hours: Option<f64>,
    /// Hours since the run was created, waits for machines included; `None`: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_wait_hours: Option<f64>,
    /// US dollars for the machines that train: hours of training × nodes × [`price_per_hour`](Self::price_per_hour);
    /// `None`: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cost: Option<f64>,
    /// US dollars for one hour of one machine; `None`: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
}

impl CapsConfig {
    /// Whether it says nothing, as in every run that was created before these were settings.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether anything can end the run.
    pub const fn has_any(&self) -> bool {
        let Self { max_hours, max_wait_hours, max_cost, price_per_hour: _ } = self;
        max_hours.is_some() || max_wait_hours.is_some() || max_cost.is_some()
    }
}

/// The caps, as typed.
pub(super) fn read(raw: &Raw) -> Result<CapsConfig, ConfigError> {
    let number = |key: &str| raw.word_or_number(key, "none", |number| number > 0.0, "a number above 0");
    let caps = CapsConfig {
        max_hours: number("run.max_hours")?,
        max_wait_hours: number("run.max_wait_hours")?,
        max_cost: number("run.max_cost")?,
        price_per_hour: number("run.price_per_hour")?,
    };
    if let CapsConfig { max_cost: Some(cost), price_per_hour: None, .. } = caps {
        return Err(ConfigError::Together(format!(
            "run.max_cost = {cost} needs run.price_per_hour, the price of one machine for one hour in US dollars, such \
             as 0.35"
        )));
    }
    Ok(caps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RunConfig, apply_overrides, tests::load_least};

    fn refused(lines: &str) -> String {
        load_least(lines).unwrap_err().to_string()
    }

    #[test]
    fn a_run_has_no_caps_unless_it_is_given_some() {
        let plain = load_least("").unwrap();
        assert_eq!(plain.run, CapsConfig::default());
        assert!(!plain.run.has_any());
        let stored = serde_json::to_value(&plain).unwrap();
        assert!(stored.get("run").is_none(), "it is stored as ever: {stored}");
        assert_eq!(serde_json::from_value::<RunConfig>(stored).unwrap(), plain);

        let capped = load_least("run = { max_hours = 1.5, max_cost = 20, price_per_hour = 0.35 }").unwrap();
        let expected =
            CapsConfig { max_hours: Some(1.5), max_wait_hours: None, max_cost: Some(20.0), price_per_hour: Some(0.35) };
        assert_eq!(capped.run, expected);
        let stored = serde_json::to_value(&capped).unwrap();
        assert_eq!(stored["run"], serde_json::json!({"max_hours": 1.5, "max_cost": 20.0, "price_per_hour": 0.35}));
        assert_eq!(serde_json::from_value::<RunConfig>(stored).unwrap(), capped);
        let set = |key: &str, value: &str| apply_overrides(&capped, &[(key.to_owned(), value.to_owned())]);
        assert_eq!(set("run.max_hours", "3").unwrap().run.max_hours, Some(3.0));
        assert_eq!(set("run.max_hours", "none").unwrap().run.max_hours, None);
        assert_eq!(set("run.max_wait_hours", "48").unwrap().run.max_wait_hours, Some(48.0));
        let error = set("run.price_per_hour", "none").unwrap_err().to_string();
        assert!(error.contains("run.max_cost = 20 needs run.price_per_hour"), "{error}");
    }

    #[test]
    fn a_price_alone_ends_nothing_and_values_that_are_no_caps_are_refused() {
        assert!(!load_least("run.price_per_hour = 0.35").unwrap().run.has_any());
        for (lines, names) in [
            ("run.max_cost = 5", "run.price_per_hour"),
            ("run.max_hours = 0", "run.max_hours"),
            ("run.max_hours = -1", "run.max_hours"),
            ("run.max_hours = inf", "run.max_hours"),
            ("run.max_wait_hours = '2h'", "\"none\", or a number above 0"),
            ("run.max_hour = 1", "unknown key run.max_hour"),
        ] {
            let message = refused(lines);
            assert!(message.contains(names), "{message}");
        }
    }
}
