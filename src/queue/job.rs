//! A message's request.
//!
//! One JSON object, version 1, UTF-8, at most [`MAX_BODY`] bytes; an unknown key is an error:
//!
//! ```json
//! {"version": 1, "run_id": "reports-2026q4", "config_uri": "s3://bucket/configs/reports.toml",
//!  "store": "s3://bucket/runs", "set": {"train.steps": 5000}}
//! ```
//!
//! `config` is the TOML itself, `config_uri` its address: one of the two. `version` may be left out, `store` and `set`
//! too. A message whose run exists continues that run as it is: a run keeps the settings that it was created with, so
//! the same message means the same run however often it comes. Only the reading of its journal follows `set`
//! (`storage.attempts`, …), since the run's own settings for its store are in that journal.

use serde::Deserialize;
use serde_json::Value;

use crate::ids::RunId;

/// The longest message that is read, bytes.
pub const MAX_BODY: usize = 256 << 10;
/// The highest version that is read.
const VERSION: u64 = 1;

/// A job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The run.
    pub run_id: RunId,
    /// Its configuration.
    pub config: Source,
    /// The store that holds it; `None`: as the consumer or the configuration says.
    pub store: Option<String>,
    /// Settings that differ from the configuration's, as `--set` takes them.
    pub set: Vec<(String, String)>,
}

/// Where a configuration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the message: TOML.
    Inline(String),
    /// At a URI: its folder, and its name there.
    At {
        /// The folder: `s3://bucket/configs`
        folder: String,
        /// The name: `reports.toml`
        name: String,
    },
}

/// Why a message is not a valid job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJob {
    /// Too long.
    #[error("message has {0} bytes, more than the {MAX_BODY} that a job may have")]
    TooLong(usize),
    /// Not the expected JSON.
    #[error("message is not a job: {0}")]
    Garbled(String),
    /// Written for a newer version of this program.
    #[error("message has version {0}, and this version reads up to {VERSION}")]
    Newer(u64),
    /// A value that is not allowed.
    #[error("message is not a job: {0}")]
    Wrong(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default, rename = "version")]
    _version: Option<u64>,
    run_id: RunId,
    config: Option<String>,
    config_uri: Option<String>,
    store: Option<String>,
    #[serde(default)]
    set: serde_json::Map<String, Value>,
}

impl Job {
    /// Reads a message's body.
    pub fn parse(body: &str) -> Result<Self, InvalidJob> {
        if body.len() > MAX_BODY {
            return Err(InvalidJob::TooLong(body.len()));
        }
        let garbled = |error: serde_json::Error| InvalidJob::Garbled(error.to_string());
        let wrong = |text: &str| Err(InvalidJob::Wrong(text.to_owned()));
        // The version first, since a newer message need not resemble this one in anything else.
        let value: Value = serde_json::from_str(body).map_err(garbled)?;
        if let Some(version) = value.get("version").and_then(Value::as_u64)
            && version > VERSION
        {
            return Err(InvalidJob::Newer(version));
        }
        // From the text, so that a repeated key is an error.
        let raw: Raw = serde_json::from_str(body).map_err(garbled)?;
        let config = match (raw.config, raw.config_uri) {
            (Some(text), None) => Source::Inline(text),
            (None, Some(uri)) => match uri.rsplit_once('/') {
                Some((folder, name)) if folder.contains("://") && !name.is_empty() && !folder.ends_with(":/") => {
                    Source::At { folder: folder.to_owned(), name: name.to_owned() }
                }
                _ => return wrong("config_uri is not a URI such as s3://bucket/configs/run.toml"),
            },
            (Some(_), Some(_)) => return wrong("config and config_uri are both given: expected one"),
            (None, None) => return wrong("neither config nor config_uri is given: expected one"),
        };
        let mut set = Vec::new();
        for (key, value) in raw.set {
            let text = match value {
                Value::String(text) => text,
                Value::Number(_) | Value::Bool(_) | Value::Array(_) => value.to_string(),
                Value::Null | Value::Object(_) => {
                    return Err(InvalidJob::Wrong(format!(
                        "set.{key:?} is neither text, a number, true, false nor a list"
                    )));
                }
            };
            set.push((key, text));
        }
        Ok(Self { run_id: raw.run_id, config, store: raw.store, set })
    }

    /// The run that a message names, even if it is otherwise invalid: for reports.
    pub fn name_of(body: &str) -> Option<RunId> {
        let body = Some(body).filter(|body| body.len() <= MAX_BODY)?;
        let value: Value = serde_json::from_str(body).ok()?;
        RunId::new(value.get("run_id")?.as_str()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_documented() {
        let job = Job::parse(
            r#"{"version":1,"run_id":"r1","config_uri":"s3://b/c/run.toml","store":"s3://b/runs",
               "set":{"checkpoint.every":"2h","train.optimizer.betas":[0.9,0.95],"train.steps":5000}}"#,
        )
        .unwrap();
        assert_eq!(job.run_id.as_str(), "r1");
        assert_eq!(job.config, Source::At { folder: "s3://b/c".into(), name: "run.toml".into() });
        assert_eq!(job.store.as_deref(), Some("s3://b/runs"));
        let set: Vec<(&str, &str)> = job.set.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(set, [("checkpoint.every", "2h"), ("train.optimizer.betas", "[0.9,0.95]"), ("train.steps", "5000")]);
        let job = Job::parse(r#"{"run_id":"r2","config":"[train]\nsteps = 1"}"#).unwrap();
        assert_eq!((job.config, job.store, job.set), (Source::Inline("[train]\nsteps = 1".into()), None, vec![]));
    }

    #[test]
    fn a_message_that_is_not_a_job_is_refused_with_a_reason() {
        for (body, says) in [
            ("", "not a job"),
            ("[]", "not a job"),
            ("poison", "not a job"),
            (r#"{"run_id":"r"}"#, "neither config nor config_uri"),
            (r#"{"run_id":"r","config":"","config_uri":"s3://b/c.toml"}"#, "both"),
            (r#"{"run_id":"../r","config":""}"#, "run id"),
            (r#"{"config":""}"#, "run_id"),
            (r#"{"run_id":"r","config":"","token":"x"}"#, "unknown field `token`"),
            (r#"{"run_id":"r","run_id":"s","config":""}"#, "duplicate field"),
            (r#"{"run_id":"r","config_uri":"run.toml"}"#, "config_uri"),
            (r#"{"run_id":"r","config_uri":"s3://run.toml"}"#, "config_uri"),
            (r#"{"run_id":"r","config_uri":"s3://b/c/"}"#, "config_uri"),
            (r#"{"run_id":"r","config":"","set":{"a":{"b":1}}}"#, "set."),
            (r#"{"run_id":"r","config":"","set":{"a":null}}"#, "set."),
            (r#"{"version":2,"job":"?"}"#, "version 2"),
            (r#"{"version":"1","run_id":"r","config":""}"#, "not a job"),
        ] {
            let error = Job::parse(body).unwrap_err().to_string();
            assert!(error.contains(says), "{body}: {error}");
        }
        let long = format!(r#"{{"run_id":"r","config":"{}"}}"#, "x".repeat(MAX_BODY));
        assert!(matches!(Job::parse(&long), Err(InvalidJob::TooLong(_))));
    }

    #[test]
    fn a_broken_message_is_still_reported_under_its_run() {
        assert_eq!(Job::name_of(r#"{"run_id":"r","oops":1}"#).unwrap().as_str(), "r");
        for nothing in ["poison", "[]", r#"{"run_id":"../r"}"#, r#"{"run_id":7}"#] {
            assert_eq!(Job::name_of(nothing), None, "{nothing}");
        }
    }
}
