//! AWS credentials, from one chain for the whole program.
//!
//! The chain is the SDK's: environment, profile (`~/.aws/config` and `~/.aws/credentials`: keys, `credential_process`,
//! SSO, roles), web identity, container, instance metadata. The SDK's own clients use it directly; the S3 store takes
//! credentials from here, in object_store's form.
//!
//! Credentials are kept until shortly before they expire, for all stores of the process. The chain is built anew each
//! time: files that were changed meanwhile (`aws sso login`, rotated keys) are read again. While the old credentials
//! are still valid, a chain that does not answer is no failure. *Bounds:* `LIMIT` for one look-up; callers that waited
//! for a failed look-up get its failure.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime},
};

use aws_config::{
    BehaviorVersion, Region, default_provider::credentials::DefaultCredentialsChain, provider_config::ProviderConfig,
};
use aws_credential_types::provider::{ProvideCredentials, error::CredentialsError};
use object_store::{CredentialProvider, aws::AwsCredential};
use tokio::sync::Mutex;

use super::direct;

/// The longest that one look-up of credentials takes: processes and SSO answer in seconds, an instance at once.
const LIMIT: Duration = Duration::from_secs(12);
/// How long before they expire credentials are renewed.
const MARGIN: Duration = Duration::from_secs(300);
/// Keys without an expiry are looked up again after this time, since they may have been rotated.
const KEPT: Duration = Duration::from_secs(300);
/// The pause before the next look-up after a failed one.
const AGAIN: Duration = Duration::from_secs(30);
/// Callers that waited during a failed look-up do not repeat it within this time.
const SAME: Duration = Duration::from_secs(1);

/// Why there are no credentials.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoCredentials {
    /// No source has any.
    #[error("no credentials: none in the environment, in a profile (~/.aws) or in a role of this machine ({0})")]
    Nowhere(String),
    /// A source that should have some does not give them.
    #[error("no credentials: {0}")]
    Failed(String),
    /// No source answered in time.
    #[error("no credentials: no source answered within {} s", LIMIT.as_secs())]
    Slow,
}

#[derive(Debug)]
struct Found {
    credential: Arc<AwsCredential>,
    renew: Instant,
    /// `None`: they don't expire.
    until: Option<Instant>,
}

#[derive(Debug, Default)]
struct State {
    found: Option<Found>,
    failed: Option<(Instant, NoCredentials)>,
}

/// The chain.
#[derive(Debug)]
pub struct Chain {
    region: String,
    state: Mutex<State>,
}

impl Chain {
    /// The process's own chain. `region`: the region for assuming roles, given by the first caller.
    pub fn of_this_process(region: &str) -> Arc<Self> {
        static CHAIN: OnceLock<Arc<Chain>> = OnceLock::new();
        let chain = || Arc::new(Self { region: region.to_owned(), state: Mutex::default() });
        Arc::clone(CHAIN.get_or_init(chain))
    }

    async fn current(&self) -> Result<Arc<AwsCredential>, NoCredentials> {
        // Held while the sources are asked: all other callers want the same answer, and one question is enough.
        // [`LIMIT`] bounds the wait.
        let mut state = self.state.lock().await;
        let now = Instant::now();
        if let Some(found) = state.found.as_ref().filter(|found| now < found.renew) {
            return Ok(Arc::clone(&found.credential));
        }
        if let Some((at, error)) = &state.failed
            && now.duration_since(*at) < SAME
        {
            return Err(error.clone());
        }
        let error = match tokio::time::timeout(LIMIT, look(&self.region)).await {
            Ok(Ok((credential, ends))) => {
                let credential = Arc::new(credential);
                #[expect(clippy::disallowed_methods, reason = "credentials end at a time of the wall clock")]
                let (renew, until) = times(ends.map(|ends| ends.duration_since(SystemTime::now()).unwrap_or_default()));
                let now = Instant::now();
                state.found = Some(Found {
                    credential: Arc::clone(&credential),
                    renew: now + renew,
                    until: until.map(|until| now + until),
                });
                state.failed = None;
                return Ok(credential);
            }
            Ok(Err(error)) => error,
            Err(_) => NoCredentials::Slow,
        };
        let now = Instant::now();
        if let Some(found) = &mut state.found
            && found.until.is_none_or(|until| now < until)
        {
            tracing::debug!(%error, "credentials were not renewed, continuing with those that are still valid");
            found.renew = now + AGAIN;
            return Ok(Arc::clone(&found.credential));
        }
        state.failed = Some((now, error.clone()));
        Err(error)
    }
}

/// When credentials that expire after `left` are renewed, and when they can no longer be used.
fn times(left: Option<Duration>) -> (Duration, Option<Duration>) {
    match left {
        None => (KEPT, None),
        Some(left) => (left - MARGIN.min(left / 4), Some(left)),
    }
}

async fn look(region: &str) -> Result<(AwsCredential, Option<SystemTime>), NoCredentials> {
    let region = Region::new(region.to_owned());
    let settings = ProviderConfig::without_region()
        .with_region(Some(region.clone()))
        .with_behavior_version(Some(BehaviorVersion::latest()))
        .with_http_client(direct::sdk_client());
    let chain = DefaultCredentialsChain::builder().region(region).configure(settings).build().await;
    let found = chain.provide_credentials().await.map_err(|error| refused(&error))?;
    let credential = AwsCredential {
        key_id: found.access_key_id().to_owned(),
        secret_key: found.secret_access_key().to_owned(),
        token: found.session_token().map(str::to_owned),
    };
    Ok((credential, found.expiry()))
}

fn refused(error: &CredentialsError) -> NoCredentials {
    // The outer text says only that something failed.
    let mut words = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !words.contains(&text) {
            if !words.is_empty() {
                words.push_str(": ");
            }
            words.push_str(&text);
        }
        cause = error.source();
    }
    match error {
        CredentialsError::CredentialsNotLoaded(_) => NoCredentials::Nowhere(words),
        _ => NoCredentials::Failed(words),
    }
}

impl CredentialProvider for Chain {
    type Credential = AwsCredential;

    fn get_credential<'a, 'b>(
        &'a self,
    ) -> Pin<Box<dyn Future<Output = object_store::Result<Arc<AwsCredential>>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async {
            let found = self.current().await;
            found.map_err(|error| object_store::Error::Generic { store: "S3", source: Box::new(error) })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_renewed_before_they_expire() {
        let seconds = Duration::from_secs;
        for (left, renew) in [(3600, 3300), (900, 675), (60, 45), (0, 0)] {
            assert_eq!(times(Some(seconds(left))), (seconds(renew), Some(seconds(left))), "{left}");
        }
        assert_eq!(times(None), (KEPT, None));
    }

    #[test]
    fn a_reason_lists_its_causes_without_repetition() {
        let inner = std::io::Error::other("no such script");
        let error = refused(&CredentialsError::provider_error(inner));
        assert!(matches!(&error, NoCredentials::Failed(words) if words.ends_with("no such script")), "{error}");
        let nowhere = refused(&CredentialsError::not_loaded("nothing is set"));
        assert!(matches!(nowhere, NoCredentials::Nowhere(_)), "{nowhere}");
    }
}
