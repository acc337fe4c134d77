//! Azure's instance metadata service, and Scheduled Events in it.
//!
//! Every request says `Metadata: true` and names a version of the interface
//! (<https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service>). The first request for scheduled
//! events switches them on for the machine and may take two minutes; a day without one switches them off.
//!
//! Environment: `TRAINER_AZURE_METADATA_ENDPOINT`, a URL, or `off` for none.

use crate::env;
use std::time::Duration;

use reqwest::Method;

use super::metadata::{Endpoint, MetadataError};

const USUAL: &str = "http://169.254.169.254";
const HEADERS: [(&str, &str); 1] = [("metadata", "true")];
/// The path of the machine's own name, as text. The version has been served since 2021.
const NAME: &str = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";
/// The version whose events include their source and duration.
const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";

/// The service.
#[derive(Clone, Debug)]
pub struct Azure {
    endpoint: Endpoint,
}

impl Azure {
    /// As the environment says; `None`: it is switched off.
    pub fn from_environment() -> Option<Self> {
        Self::from(&|name| env::text(name))
    }

    /// As `variable` says.
    pub fn from(variable: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let base = variable("TRAINER_AZURE_METADATA_ENDPOINT");
        if base.as_deref().is_some_and(|base| base.eq_ignore_ascii_case("off")) {
            return None;
        }
        Some(Self { endpoint: Endpoint::new(base.as_deref().unwrap_or(USUAL))? })
    }

    /// Where it is.
    pub fn uri(&self) -> &str {
        self.endpoint.uri()
    }

    /// The machine's own name, as used in events. `limit` bounds the whole request, here and below.
    pub async fn name(&self, limit: Duration) -> Result<String, MetadataError> {
        let answer = self.endpoint.ask(Method::GET, NAME, &HEADERS, None, limit).await?;
        let (path, status) = (NAME.to_owned(), answer.status);
        let name = answer.found(NAME)?.ok_or(MetadataError::Status { status, path: path.clone() })?;
        let name = name.trim();
        // Names of virtual machines have at most 64 characters; those in scale sets also end in a number.
        if name.is_empty() || name.len() > 128 || !name.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(MetadataError::Garbled { path, expected: "a machine's name" });
        }
        Ok(name.to_owned())
    }

    /// The document of scheduled events, as text.
    pub async fn events(&self, limit: Duration) -> Result<String, MetadataError> {
        let answer = self.endpoint.ask(Method::GET, EVENTS, &HEADERS, None, limit).await?;
        let status = answer.status;
        answer.found(EVENTS)?.ok_or(MetadataError::Status { status, path: EVENTS.to_owned() })
    }

    /// Approves these events: they begin at once, for every machine that they name.
    pub async fn start(&self, events: &[String], limit: Duration) -> Result<(), MetadataError> {
        let starts: Vec<_> = events.iter().map(|id| serde_json::json!({ "EventId": id })).collect();
        let body = serde_json::json!({ "StartRequests": starts }).to_string();
        let answer = self.endpoint.ask(Method::POST, EVENTS, &HEADERS, Some(body), limit).await?;
        let status = answer.status;
        answer.found(EVENTS)?.map(drop).ok_or(MetadataError::Status { status, path: EVENTS.to_owned() })
    }
}
