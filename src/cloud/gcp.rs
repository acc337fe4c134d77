//! Compute Engine's metadata server.
//!
//! Every request carries `Metadata-Flavor: Google`, and so must every answer: an answer without it comes from another
//! service on the same address (<https://cloud.google.com/compute/docs/metadata/querying-metadata>). A request may wait
//! for a change: the `ETag` of the previous answer tells the server what "changed" refers to, so that a change between
//! two requests is not missed.
//!
//! Environment: `GCE_METADATA_HOST`, a host or `host:port`, as Google's own libraries read it, and `NO_GCE_CHECK=true`,
//! which stops the search for such a server.

use crate::env;
use std::time::Duration;

use reqwest::Method;

use super::metadata::{Endpoint, MetadataError};

/// The address behind `metadata.google.internal`; used as a number, so that a machine elsewhere sends no DNS query for
/// it.
const USUAL: &str = "http://169.254.169.254";
/// The root of all values.
const ROOT: &str = "/computeMetadata/v1";
const FLAVOR: &str = "metadata-flavor";

/// The server.
#[derive(Clone, Debug)]
pub struct Gcp {
    endpoint: Endpoint,
}

/// A value, and the tag of this version of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// The text, trimmed.
    pub text: String,
    /// The argument of [`Gcp::next`]; `None`: the server gave no usable one.
    pub tag: Option<String>,
}

impl Gcp {
    /// As the environment says; `None`: it is switched off.
    pub fn from_environment() -> Option<Self> {
        Self::from(&|name| env::text(name))
    }

    /// As `variable` says.
    pub fn from(variable: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        if variable("NO_GCE_CHECK").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return None;
        }
        let host = variable("GCE_METADATA_HOST");
        Some(Self { endpoint: Endpoint::new(host.as_deref().unwrap_or(USUAL))? })
    }

    /// Where it is.
    pub fn uri(&self) -> &str {
        self.endpoint.uri()
    }

    /// The value at `path`, such as `/instance/preempted`; `None`: there is none (404). `limit` bounds the whole
    /// request.
    pub async fn get(&self, path: &str, limit: Duration) -> Result<Option<Value>, MetadataError> {
        self.ask(path, String::new(), limit).await
    }

    /// The same, once its version is no longer that of `tag`, or after `patience`.
    pub async fn next(
        &self,
        path: &str,
        tag: &str,
        patience: Duration,
        limit: Duration,
    ) -> Result<Option<Value>, MetadataError> {
        let query = format!("?wait_for_change=true&last_etag={tag}&timeout_sec={}", patience.as_secs());
        self.ask(path, query, limit).await
    }

    async fn ask(&self, path: &str, query: String, limit: Duration) -> Result<Option<Value>, MetadataError> {
        let target = format!("{ROOT}{path}{query}");
        let answer = self.endpoint.ask(Method::GET, &target, &[(FLAVOR, "Google")], None, limit).await?;
        let header = |name| answer.headers.get(name).and_then(|value| value.to_str().ok());
        if answer.status == 200 && header(FLAVOR) != Some("Google") {
            return Err(MetadataError::Garbled { path: path.to_owned(), expected: "an answer of Google's" });
        }
        // It becomes part of a query.
        let plain = |tag: &&str| tag.len() <= 64 && tag.bytes().all(|b| b.is_ascii_alphanumeric());
        let tag = header("etag").filter(plain).map(str::to_owned);
        Ok(answer.found(path)?.map(|text| Value { text: text.trim().to_owned(), tag }))
    }
}
