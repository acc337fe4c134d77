//! AWS's instance metadata service, version 2 only.
//!
//! A session token is fetched with `PUT`, lives six hours, and is replaced before it ends or when the service answers
//! 401. There is no fallback to version 1: without a token the result is an error. (In a container the usual cause is a
//! hop limit of 1: the answer to the `PUT` is dropped on its way, so the request seems to hang.) The AWS SDK has its
//! own client, which fetches credentials. This one is for notices: thirty seconds of retries would use up a quarter of
//! the warning, and answers are bounded in size.
//!
//! Environment, as the AWS SDKs read it: `AWS_EC2_METADATA_DISABLED`, `AWS_EC2_METADATA_SERVICE_ENDPOINT`,
//! `AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE` (`IPv4`, `IPv6`).

use crate::env;
use std::time::{Duration, Instant};

use reqwest::Method;
use tokio::sync::Mutex;

use super::metadata::{Endpoint, MetadataError};

/// Its address on every EC2 instance.
const IPV4: &str = "http://169.254.169.254";
/// Its address on those of the Nitro system that have IPv6.
const IPV6: &str = "http://[fd00:ec2::254]";
/// The requested lifetime, the longest there is, seconds.
const TOKEN_TTL: u64 = 21_600;
/// How long before it expires a token is replaced.
const MARGIN: Duration = Duration::from_secs(120);

#[derive(Debug)]
struct Token {
    text: String,
    until: Instant,
}

/// The service, and the token that opens it.
#[derive(Debug)]
pub struct Imds {
    endpoint: Endpoint,
    token: Mutex<Option<Token>>,
}

impl Imds {
    /// As the environment says; `None`: it is switched off.
    pub fn from_environment() -> Option<Self> {
        Self::from(&|name| env::text(name))
    }

    /// As `variable` says.
    pub fn from(variable: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        if variable("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return None;
        }
        let mode = variable("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE").unwrap_or_default();
        let usual = if mode.eq_ignore_ascii_case("ipv6") { IPV6 } else { IPV4 };
        let base = variable("AWS_EC2_METADATA_SERVICE_ENDPOINT");
        Some(Self { endpoint: Endpoint::new(base.as_deref().unwrap_or(usual))?, token: Mutex::default() })
    }

    /// The service's address.
    pub fn uri(&self) -> &str {
        self.endpoint.uri()
    }

    /// The value at `path`, such as `/latest/meta-data/instance-id`; `None`: there is none (404). `limit` bounds the
    /// whole request, including that for a new token.
    pub async fn get(&self, path: &str, limit: Duration) -> Result<Option<String>, MetadataError> {
        let began = Instant::now();
        let left = || limit.saturating_sub(began.elapsed());
        let mut refused = false;
        loop {
            let token = self.token(refused, left()).await?;
            let headers = [("x-aws-ec2-metadata-token", token.as_str())];
            let answer = self.endpoint.ask(Method::GET, path, &headers, None, left()).await?;
            // The service has forgotten the token, as after a restart of the instance.
            if answer.status == 401 && !refused {
                refused = true;
                continue;
            }
            return answer.found(path);
        }
    }

    async fn token(&self, renew: bool, limit: Duration) -> Result<String, MetadataError> {
        const PATH: &str = "/latest/api/token";
        let began = Instant::now();
        // Another caller may be fetching one, as slowly as the service allows.
        let waited = tokio::time::timeout(limit, self.token.lock()).await;
        let slow = || MetadataError::Slow { endpoint: self.uri().to_owned(), path: PATH.to_owned(), limit };
        let (mut held, limit) = (waited.map_err(|_| slow())?, limit.saturating_sub(began.elapsed()));
        if let Some(token) = held.as_ref().filter(|token| !renew && token.until > Instant::now()) {
            return Ok(token.text.clone());
        }
        *held = None;
        let ttl = TOKEN_TTL.to_string();
        let headers = [("x-aws-ec2-metadata-token-ttl-seconds", ttl.as_str())];
        let asked = Instant::now();
        let answer = self.endpoint.ask(Method::PUT, PATH, &headers, None, limit).await?;
        let granted = answer.headers.get(headers[0].0).and_then(|value| value.to_str().ok()?.parse().ok());
        let ttl = Duration::from_secs(granted.unwrap_or(TOKEN_TTL).min(TOKEN_TTL));
        let status = answer.status;
        let text = answer.found(PATH)?.ok_or(MetadataError::Status { status, path: PATH.to_owned() })?;
        let text = text.trim().to_owned();
        // It becomes a header.
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(MetadataError::Garbled { path: PATH.to_owned(), expected: "a token" });
        }
        *held = Some(Token { text: text.clone(), until: asked + ttl.saturating_sub(MARGIN.min(ttl / 2)) });
        Ok(text)
    }
}
