//! AWS's control plane: one configuration for all of its clients.
//!
//! Credentials come from the SDK's default chain (environment, profile, web identity, container, instance role), the
//! region from [`region::find`](super::region::find), which asks a metadata service for a bounded time, the endpoints
//! from `AWS_ENDPOINT_URL` and its variants for one service. An error of a service becomes one sentence with the
//! service's own code and message; the SDK's `Display` says only "service error".

use aws_config::{BehaviorVersion, Region, SdkConfig};
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

/// The error for the user after a failed call; `doing` is a verb phrase such as "read parameters below /trainer".
pub fn explain<E, R>(error: aws_sdk_ssm::error::SdkError<E, R>, doing: &str) -> Error
where
    E: aws_sdk_ssm::error::ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    use aws_sdk_ssm::error::{DisplayErrorContext, SdkError};
    let (code, message) = match &error {
        SdkError::ServiceError(failure) => {
            let metadata = failure.err();
            (metadata.code().map(str::to_owned), metadata.message().map(str::to_owned))
        }
        _ => (None, None),
    };
    let kind = match code.as_deref() {
        Some(code)
            if [
                "AccessDenied",
                "Unauthorized",
                "InvalidClientTokenId",
                "UnrecognizedClient",
                "Expired",
                "Signature",
            ]
            .iter()
            .any(|part| code.contains(part))
                || code == "AuthFailure" =>
        {
            Kind::Permission
        }
        Some(code) if code.contains("NotFound") || code.contains("NonExistent") || code.contains("Validation") => {
            Kind::Config
        }
        // The credential chain found none.
        None if DisplayErrorContext(&error).to_string().contains("no providers in chain") => Kind::Permission,
        _ => Kind::Unavailable,
    };
    let expired = code.as_deref().is_some_and(|code| code.contains("Expired"));
    let text = match (code, message) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => DisplayErrorContext(&error).to_string(),
    };
    let error = Error::new(kind, text).context(doing);
    match kind {
        Kind::Permission if expired => error.with_hint("the session has expired: `aws sso login`, or set new keys"),
        Kind::Permission => error.with_hint(
            "allow this call to the role or user that `aws sts get-caller-identity` shows; if there is none, set \
            AWS_PROFILE",
        ),
        _ => error,
    }
}
