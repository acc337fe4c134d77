//! The AWS region that this process talks to.
//!
//! Found once, kept for the life of the process: the environment (`AWS_REGION`, `AWS_DEFAULT_REGION`), the profile of
//! `AWS_PROFILE`, then the instance's identity document. The last one is read only if there may be a metadata service,
//! and within a bounded time ([`identity::read`]). The environment can't be changed once threads run, so the machine's
//! answer is kept here, and the S3 client reads it here, too.

use crate::env;
use std::sync::OnceLock;

use aws_config::{meta::region::ProvideRegion, profile::region::ProfileFileRegionProvider};
use futures::FutureExt;

use super::identity;

static NOTED: OnceLock<String> = OnceLock::new();

/// The source of a region's name; for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A variable.
    Environment,
    /// A file of AWS's tools.
    Profile,
    /// The machine.
    Identity,
}

impl Source {
    /// "from …"
    pub const fn text(self) -> &'static str {
        match self {
            Self::Environment => "from the environment",
            Self::Profile => "from the profile",
            Self::Identity => "from the instance identity",
        }
    }
}

/// The region that the environment does not name, if it was looked up and found.
pub fn noted() -> Option<&'static str> {
    NOTED.get().map(String::as_str)
}

/// The region of the profile, read from files at once; kept.
pub fn of_profile() -> Option<&'static str> {
    if let Some(known) = noted() {
        return Some(known);
    }
    let region = ProfileFileRegionProvider::new().region().now_or_never()??;
    Some(NOTED.get_or_init(|| region.to_string()))
}

/// The region and its source; `None`: nothing names one.
pub async fn find() -> Option<(String, Source)> {
    let variable = |name| env::text(name);
    if let Some(region) = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION")) {
        return Some((region, Source::Environment));
    }
    if let Some(region) = ProfileFileRegionProvider::new().region().await {
        return Some((NOTED.get_or_init(|| region.to_string()).clone(), Source::Profile));
    }
    let region = match NOTED.get() {
        Some(region) => region.clone(),
        None => identity::read().await?.region.clone(),
    };
    Some((NOTED.get_or_init(|| region).clone(), Source::Identity))
}
