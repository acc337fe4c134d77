//! One bounded HTTP request to a metadata service.
//!
//! A metadata service at a link-local address is not trusted: it may be absent, slow, wrong or hostile, and must never
//! hurt training. A request has one overall deadline, follows no redirect, goes through no proxy (a proxy would answer
//! for its own machine), and accepts no answer longer than [`MAX_ANSWER`]. The caller decides about retries.

use std::time::Duration;

use reqwest::{Client, Method, header::HeaderMap, redirect};
use url::Url;

/// The longest answer that is read, bytes.
pub const MAX_ANSWER: usize = 64 << 10;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// No service: the connection was refused or there is no route to it.
    #[error("metadata service {endpoint} is not reachable: {reason}")]
    Unreachable {
        /// Its expected address.
        endpoint: String,
        /// The connection's error.
        reason: String,
    },
    /// It did not answer in time.
    #[error("metadata service {endpoint} did not answer {path} within {} ms", limit.as_millis())]
    Slow {
        /// Its address.
        endpoint: String,
        /// The requested path.
        path: String,
        /// The time limit.
        limit: Duration,
    },
    /// It refused.
    #[error("metadata service answered {status} to {path}")]
    Status {
        /// The HTTP status.
        status: u16,
        /// The requested path.
        path: String,
    },
    /// The answer is malformed.
    #[error("metadata service's answer to {path} is not {expected}")]
    Garbled {
        /// The requested path.
        path: String,
        /// What was expected.
        expected: &'static str,
    },
}

/// A metadata service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    base: Url,
    client: Client,
}

/// Its answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body of a success; `None` for 404; an error for everything else.
    pub fn found(self, path: &str) -> Result<Option<String>, MetadataError> {
        match self.status {
            200..=299 => Ok(Some(self.body)),
            404 => Ok(None),
            status => Err(MetadataError::Status { status, path: path.to_owned() }),
        }
    }
}

impl Endpoint {
    /// The service at `base`, an `http://` URL; a bare `host` or `host:port` is accepted, too. `None`: it is not a URL.
    pub fn new(base: &str) -> Option<Self> {
        let text = if base.contains("://") { base.to_owned() } else { format!("http://{base}") };
        let base = Url::parse(&text).ok().filter(|url| url.has_host())?;
        let client = Client::builder().no_proxy().redirect(redirect::Policy::none()).build().ok()?;
        Some(Self { base, client })
    }

    /// Its address.
    pub fn uri(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// Requests `path` (with a leading `/`, and its query). `limit` bounds everything: connection, wait and body.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&'static str, &str)],
        body: Option<String>,
        limit: Duration,
    ) -> Result<Answer, MetadataError> {
        let mut request = self.client.request(method, format!("{}{path}", self.uri()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let garbled = || MetadataError::Garbled { path: path.to_owned(), expected: "a short text" };
        let exchange = async {
            let mut response = request.send().await.map_err(|error| self.unreachable(&error))?;
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(&error))? {
                if body.len() + chunk.len() > MAX_ANSWER {
                    return Err(garbled());
                }
                body.extend_from_slice(&chunk);
            }
            let body = String::from_utf8(body).map_err(|_| garbled())?;
            Ok(Answer { status, headers, body })
        };
        tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| {
            Err(MetadataError::Slow { endpoint: self.uri().to_owned(), path: path.to_owned(), limit })
        })
    }

    fn unreachable(&self, error: &reqwest::Error) -> MetadataError {
        // reqwest's own text repeats the URL; the cause is the useful part.
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        MetadataError::Unreachable { endpoint: self.uri().to_owned(), reason: cause.to_string() }
    }
}
