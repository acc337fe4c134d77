//! Parameters of AWS Systems Manager, read by path.
//!
//! `GetParametersByPath` returns at most ten per page, and a page may be short or empty and still name a next one: only
//! the token marks the end (AWS API reference, `GetParametersByPath`). Encrypted ones come decrypted. Pages, parameters
//! and bytes are bounded. A value may be a secret: it is held in a [`Secret`], and no error or log line here contains
//! one.

use std::{fmt, time::Duration};

use aws_config::{retry::RetryConfig, timeout::TimeoutConfig};
use serde::Deserialize;
use serde_json::json;

use super::{
    aws,
    call::{Client, SSM},
};
use crate::error::{Error, Kind, Result};

/// The API's largest page.
const PAGE: u32 = 10;
/// The most pages that are followed; many may be empty.
const MAX_PAGES: usize = 200;
/// The most parameters that are accepted.
const MAX_PARAMETERS: usize = 500;
/// Bytes of all values together. One value has at most 8 KiB.
const MAX_BYTES: usize = 1 << 20;
/// The limit for one request, and for one with all of the SDK's own retries (with jitter): on a starting machine the
/// network may not be up yet.
const ATTEMPT: Duration = Duration::from_secs(5);
const OPERATION: Duration = Duration::from_secs(30);
const ATTEMPTS: u32 = 6;
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

/// A text that is never shown: neither `Debug` nor a log line reveals it.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for its use.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name below the path: `store`, `set/train.steps`.
    pub name: String,
    /// Its value.
    pub value: Secret,
}

/// An answer of `GetParametersByPath`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    parameters: Option<Vec<Listed>>,
    next_token: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    name: Option<String>,
    value: Option<Secret>,
}

/// All parameters below `path`, at any depth, decrypted, by name.
pub async fn parameters(path: &str) -> Result<Vec<Parameter>> {
    let path = checked(path)?;
    let doing = format!("read parameters below {path}");
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).operation_timeout(OPERATION).build();
    let retries = RetryConfig::standard().with_max_attempts(ATTEMPTS).with_max_backoff(LONGEST_PAUSE);
    let client = Client::new(&aws::config().await, &SSM, timeouts, Some(retries));
    let mut found = Vec::new();
    let (mut bytes, mut next) = (0, None::<String>);
    for _ in 0..MAX_PAGES {
        let mut request = json!({"Path": path, "Recursive": true, "WithDecryption": true, "MaxResults": PAGE});
        if let Some(next) = &next {
            request["NextToken"] = json!(next);
        }
        let answer = client.json::<Page>("GetParametersByPath", &request).await;
        let page = answer.map_err(|failure| aws::explain(failure, &doing))?;
        for parameter in page.parameters.unwrap_or_default() {
            let (Some(name), Some(value)) = (parameter.name, parameter.value) else { continue };
            // A parameter that is not below the path was not requested.
            let Some(name) = below(path, &name) else { continue };
            bytes += name.len() + value.reveal().len();
            if found.len() >= MAX_PARAMETERS || bytes > MAX_BYTES {
                let what = format!("there are more than {MAX_PARAMETERS} parameters or {MAX_BYTES} bytes below {path}");
                return Err(Error::new(Kind::Config, what).with_hint("name a path that holds this program's only"));
            }
            found.push(Parameter { name: name.to_owned(), value });
        }
        next = page.next_token.filter(|token| !token.is_empty());
        if next.is_none() {
            found.sort_by(|a, b| a.name.cmp(&b.name));
            return Ok(found);
        }
    }
    Err(Error::new(Kind::Unavailable, format!("{doing}: the list did not end after {MAX_PAGES} pages")))
}

/// A path without a `/` at its end.
fn checked(path: &str) -> Result<&str> {
    let short = path.trim_end_matches('/');
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'-' | b'_' | b'.');
    if !short.starts_with('/') || short.contains("//") || short.len() > 900 || !short.bytes().all(plain) {
        let what = format!("{path:?} is not a path of parameters");
        return Err(Error::new(Kind::Config, what).with_hint("write it as /trainer/reports"));
    }
    Ok(short)
}

fn below<'a>(path: &str, name: &'a str) -> Option<&'a str> {
    name.strip_prefix(path)?.strip_prefix('/').filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_checked_before_it_is_asked_for() {
        for (path, short) in [("/trainer", "/trainer"), ("/a/b_c.d-1/", "/a/b_c.d-1")] {
            assert_eq!(checked(path).unwrap(), short);
        }
        for path in ["", "/", "trainer", "/a//b", "/a b", "/a\n", "/ä", "s3://x"] {
            let error = checked(path).unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{path}");
        }
    }

    #[test]
    fn only_names_below_the_path_are_taken() {
        assert_eq!(below("/a/b", "/a/b/c"), Some("c"));
        assert_eq!(below("/a/b", "/a/b/set/x.y"), Some("set/x.y"));
        for name in ["/a/b", "/a/bc/d", "/x", "/a/b/"] {
            assert_eq!(below("/a/b", name), None, "{name}");
        }
    }

    #[test]
    fn a_secret_is_never_shown() {
        let parameter = Parameter { name: "worker-token".into(), value: Secret::new("hunter2") };
        assert!(!format!("{parameter:?} {:#?}", parameter.value).contains("hunter2"));
        assert_eq!(parameter.value.reveal(), "hunter2");
    }
}
