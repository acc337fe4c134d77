//! What can go wrong with a store, and what to do about it.

use crate::error::{Explain, Kind};

/// What can go wrong with a store. Keys are given as whole URIs.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The URI is not one we can open.
    #[error("store {uri:?} {reason}")]
    InvalidUri {
        /// As given, without secrets.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A key that could leave its folder, or that no store takes.
    #[error("key {key:?} {reason}")]
    InvalidKey {
        /// As given.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No such object.
    #[error("object {key} does not exist")]
    NotFound {
        /// The key.
        key: String,
    },
    /// The object has more bytes than a sound one could have.
    #[error("object {key} has {size} bytes, more than the {limit} that it may have")]
    TooLarge {
        /// The key.
        key: String,
        /// Its size.
        size: u64,
        /// The most that was asked for.
        limit: u64,
    },
    /// The object ends before the asked range does.
    #[error("object {key} has {size} bytes, but byte {end} was asked for")]
    Short {
        /// The key.
        key: String,
        /// End of the asked range.
        end: u64,
        /// Its size.
        size: u64,
    },
    /// Refused for want of permission.
    #[error("store refused {operation} of {key} for want of permission")]
    Permission {
        /// What was tried.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No space, or quota, is left.
    #[error("{operation} of {key} failed: no space left in the store")]
    Full {
        /// What was tried.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The bucket or container does not exist.
    #[error("{operation} of {key} failed: the bucket does not exist")]
    NoBucket {
        /// What was tried.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Not reachable, or failing, after retries.
    #[error("{operation} of {key} failed")]
    Unavailable {
        /// What was tried.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The folder that the store lies in is no longer there.
    #[error("{operation} of {key} was not begun")]
    Adrift {
        /// What was to be done.
        operation: &'static str,
        /// The key.
        key: String,
        /// What has become of the folder.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A setting that this kind of store does not know.
    #[error("{setting} is set, but {uri} is not on S3")]
    Setting {
        /// Its key.
        setting: &'static str,
        /// The store, without secrets.
        uri: String,
        /// What it is about.
        means: &'static str,
    },
    /// The store does not do what the protocol needs.
    #[error("store can't be used: {reason}")]
    Unfit {
        /// What it did.
        reason: String,
    },
}

impl Explain for StorageError {
    fn kind(&self) -> Kind {
        match self {
            Self::InvalidUri { .. } | Self::Setting { .. } | Self::Unfit { .. } | Self::NoBucket { .. } => Kind::Config,
            Self::InvalidKey { .. } | Self::NotFound { .. } | Self::TooLarge { .. } | Self::Short { .. } => Kind::Data,
            Self::Permission { .. } => Kind::Permission,
            Self::Full { .. } | Self::Unavailable { .. } | Self::Adrift { .. } => Kind::Unavailable,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::InvalidUri { reason, .. } if reason.contains("unencrypted") => {
                "use an https endpoint, or run the server on this machine"
            }
            Self::InvalidUri { reason, .. } if reason.contains("credentials") => {
                "put credentials into the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …"
            }
            Self::InvalidUri { .. } => {
                "write s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file://./folder"
            }
            Self::Setting { setting, means, .. } => {
                return Some(format!(
                    "leave {setting} out; {means} is set on the bucket, the container or the disk itself"
                ));
            }
            Self::NoBucket { .. } => "create the bucket, or check its name, and AWS_ENDPOINT_URL if it is not on AWS",
            Self::Full { .. } => {
                "free space, prune old checkpoints (trainer prune), or use another store; nothing partial is visible"
            }
            Self::Adrift { .. } => {
                "mount the disk again, or move the folder back, then trainer resume; nothing was written beside it"
            }
            Self::Unfit { .. } => {
                "use a store whose conditional put is atomic: Amazon S3, Google Cloud Storage, Azure Blob Storage, RustFS, \
                 or file:// on one machine"
            }
            Self::Permission { source, .. } => permission_hint(&source.to_string()),
            Self::Unavailable { source, .. } => unavailable_hint(&source.to_string())?,
            Self::InvalidKey { .. } | Self::NotFound { .. } | Self::TooLarge { .. } | Self::Short { .. } => {
                return None;
            }
        };
        Some(hint.to_owned())
    }
}

fn permission_hint(cause: &str) -> &'static str {
    if cause.contains("no credentials") {
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (the profiles of ~/.aws are not read), or give the machine a role"
    } else if cause.contains("ExpiredToken") || cause.contains("TokenRefreshRequired") {
        "the session token has expired: get new credentials"
    } else if cause.contains("RequestTimeTooSkewed") {
        "set this machine's clock"
    } else if cause.contains("InvalidAccessKeyId") || cause.contains("SignatureDoesNotMatch") {
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they belong to this endpoint"
    } else if cause.contains("os error") {
        "check who owns the folder"
    } else {
        "allow list, get, put and delete on this prefix; trainer doctor says which one is missing"
    }
}

fn unavailable_hint(cause: &str) -> Option<&'static str> {
    if cause.contains("region") || cause.contains("redirect") || cause.contains("AuthorizationHeaderMalformed") {
        Some("the bucket is in another region: set AWS_REGION")
    } else if cause.contains("onnect") || cause.contains("dns") {
        Some("check the network, and AWS_ENDPOINT_URL if the store is not on AWS")
    } else {
        None
    }
}
