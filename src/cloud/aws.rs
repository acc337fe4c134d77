//! AWS's control plane: one configuration for all of its clients.
//!
//! Credentials come from the SDK's default chain (environment, profile, web identity, container, instance role), the
//! region from [`region::find`](super::region::find), which asks a metadata service for a bounded time, the endpoints
//! from `AWS_ENDPOINT_URL` and its variants for one service. An error of a service becomes one sentence with the
//! service's own code and message; the SDK's `Display` says only "service error".

use std::fmt;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::{display::DisplayErrorContext, metadata::ProvideErrorMetadata};
use tokio::sync::OnceCell;

use super::direct;
use crate::error::{Error, Kind};

static CONFIG: OnceCell<SdkConfig> = OnceCell::const_new();

/// The configuration that all clients are made from. The first call may take as long as
/// [`region::find`](super::region::find) does. It is kept once a region is known, since the machine may report that
/// later.
pub async fn config() -> SdkConfig {
    let load = async |region| {
        let defaults = aws_config::defaults(BehaviorVersion::latest()).http_client(direct::sdk_client());
        defaults.region(region).load().await
    };
    if let Some(config) = CONFIG.get() {
        return config.clone();
    }
    match super::region::find().await {
        Some((name, _)) => CONFIG.get_or_init(|| load(Some(Region::new(name)))).await.clone(),
        None => load(None).await,
    }
}

/// The same for a known region, such as that in a queue's URL.
pub async fn config_in(region: &str) -> SdkConfig {
    config().await.into_builder().region(Region::new(region.to_owned())).build()
}

/// Why a call failed.
#[derive(Debug)]
pub enum Failure {
    /// The service refused.
    Refused {
        /// Its code, such as `AccessDenied`.
        code: String,
        /// Its words.
        message: Option<String>,
    },
    /// There is no answer, or none that is understood; the text says why.
    Other(String),
}

impl Failure {
    /// The service's code; empty: it gave none.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused { code, .. } => code,
            Self::Other(_) => "",
        }
    }

    /// The service's words; empty: it gave none.
    pub fn message(&self) -> &str {
        match self {
            Self::Refused { message, .. } => message.as_deref().unwrap_or_default(),
            Self::Other(_) => "",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { code, message: Some(message) } => write!(f, "{code}: {message}"),
            Self::Refused { code, message: None } => f.write_str(code),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl<E, R> From<SdkError<E, R>> for Failure
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: fmt::Debug + Send + Sync + 'static,
{
    fn from(error: SdkError<E, R>) -> Self {
        if let SdkError::ServiceError(refused) = &error
            && let Some(code) = refused.err().code()
        {
            return Self::Refused { code: code.to_owned(), message: refused.err().message().map(str::to_owned) };
        }
        Self::Other(DisplayErrorContext(&error).to_string())
    }
}

/// What to do about a refusal with this code.
fn kind_of(code: &str) -> Kind {
    const OF_PERMISSION: [&str; 6] =
        ["AccessDenied", "Unauthorized", "InvalidClientTokenId", "UnrecognizedClient", "Expired", "Signature"];
    const OF_CONFIG: [&str; 3] = ["NotFound", "NonExistent", "Validation"];
    let has = |parts: &[&str]| parts.iter().any(|part| code.contains(part));
    if has(&OF_PERMISSION) || code == "AuthFailure" {
        Kind::Permission
    } else if has(&OF_CONFIG) {
        Kind::Config
    } else {
        Kind::Unavailable
    }
}

/// The error for the user after a failed call; `doing` is a verb phrase such as "read parameters below /trainer".
pub fn explain(failure: impl Into<Failure>, doing: &str) -> Error {
    let failure = failure.into();
    let kind = match &failure {
        Failure::Refused { code, .. } => kind_of(code),
        // The credential chain found none.
        Failure::Other(text) if text.contains("no providers in chain") => Kind::Permission,
        Failure::Other(_) => Kind::Unavailable,
    };
    let expired = failure.code().contains("Expired");
    let error = Error::new(kind, failure.to_string()).context(doing);
    match kind {
        Kind::Permission if expired => error.with_hint("the session has expired: `aws sso login`, or set new keys"),
        Kind::Permission => error.with_hint(
            "allow this call to the role or user that `aws sts get-caller-identity` shows; if there is none, set \
            AWS_PROFILE",
        ),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_decides_what_to_do() {
        let kind = |code: &str| explain(Failure::Refused { code: code.to_owned(), message: None }, "do it").kind();
        for code in ["AccessDeniedException", "ExpiredToken", "SignatureDoesNotMatch", "AuthFailure"] {
            assert_eq!(kind(code), Kind::Permission, "{code}");
        }
        for code in ["ValidationError", "ParameterNotFound", "AWS.SimpleQueueService.NonExistentQueue"] {
            assert_eq!(kind(code), Kind::Config, "{code}");
        }
        for code in ["Throttling", "InternalServerError", "MyAuthFailure"] {
            assert_eq!(kind(code), Kind::Unavailable, "{code}");
        }
        let other = |text: &str| explain(Failure::Other(text.to_owned()), "do it");
        assert_eq!(other("dispatch failure: no providers in chain provided credentials").kind(), Kind::Permission);
        assert_eq!(other("AccessDenied").kind(), Kind::Unavailable);
        let expired = explain(Failure::Refused { code: "ExpiredToken".into(), message: Some("m".into()) }, "do it");
        assert!(expired.hint().is_some_and(|hint| hint.contains("expired")));
        assert!(format!("{expired}").contains("do it") && format!("{expired}").contains("ExpiredToken: m"));
    }
}
