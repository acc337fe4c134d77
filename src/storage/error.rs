//! What can go wrong with a store, and what to do about it.

use crate::{
    error::{Explain, Kind},
    shortage::Shortage,
};

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
    /// The bucket is in another region than the one that requests are signed for.
    #[error("{operation} of {key} failed: {}", region_text(region.as_deref()))]
    Region {
        /// What was tried.
        operation: &'static str,
        /// The key.
        key: String,
        /// The bucket's region, if the store says it.
        region: Option<String>,
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
    /// The folder's file system has no hard links, by which objects that are written once get their names.
    #[error("store {uri} can't be used: its file system has no hard links")]
    NoLinks {
        /// The store.
        uri: String,
        /// The system's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store does not do what the protocol needs.
    #[error("store can't be used: {reason}")]
    Unfit {
        /// What it did.
        reason: String,
    },
}

fn region_text(region: Option<&str>) -> String {
    match region {
        Some(region) => format!("the bucket is in the region {region}"),
        None => "the bucket is in another region".into(),
    }
}

impl Explain for StorageError {
    fn kind(&self) -> Kind {
        match self {
            Self::InvalidUri { .. }
            | Self::Setting { .. }
            | Self::Unfit { .. }
            | Self::NoBucket { .. }
            | Self::NoLinks { .. }
            | Self::Region { .. } => Kind::Config,
            Self::InvalidKey { .. } | Self::NotFound { .. } | Self::TooLarge { .. } | Self::Short { .. } => Kind::Data,
            Self::Permission { .. } => Kind::Permission,
            Self::Full { .. } | Self::Unavailable { .. } => Kind::Unavailable,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::InvalidUri { reason, .. } if reason.contains("unencrypted") => {
                "use an https endpoint, or run the server on this machine"
            }
            Self::InvalidUri { reason, .. } if reason.contains("credentials") => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment"
            }
            Self::InvalidUri { .. } => {
                "write s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file://./folder"
            }
            Self::Setting { setting, means, .. } => {
                return Some(format!(
                    "leave {setting} out; {means} is set on the bucket, the container or the disk itself"
                ));
            }
            Self::NoBucket { .. } => {
                "create the bucket (S3: `aws s3 mb s3://BUCKET`), or check its name, and AWS_ENDPOINT_URL if it is not \
                 on AWS"
            }
            Self::Full { .. } => {
                "free space, prune old checkpoints (`trainer prune --run-id RUN`), or use another store; nothing \
                 partial is visible"
            }
            Self::Unfit { .. } => {
                "use a store whose conditional put is atomic: Amazon S3, Google Cloud Storage, Azure Blob Storage, RustFS, \
                 or file:// on one machine"
            }
            Self::NoLinks { .. } => {
                "use a folder on ext4, xfs, btrfs or NFS (exFAT, SMB and mounted buckets such as s3fs have no hard \
                 links), or the bucket itself: --store s3://BUCKET/PREFIX"
            }
            Self::Region { region, .. } => {
                let region = region.as_deref().unwrap_or("REGION");
                return Some(format!(
                    "set the bucket's region: export AWS_REGION={region}; where the store is not on AWS, set \
                     AWS_ENDPOINT_URL"
                ));
            }
            Self::Permission { operation, source, .. } => permission_hint(operation, &source.to_string()),
            Self::Unavailable { source, .. } => unavailable_hint(&source.to_string())?,
            Self::InvalidKey { .. } | Self::NotFound { .. } | Self::TooLarge { .. } | Self::Short { .. } => {
                return None;
            }
        };
        Some(hint.to_owned())
    }
}

fn permission_hint(operation: &str, cause: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| cause.contains(word));
    if says(&["no credentials"]) {
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (SSO: `aws sso login`), or give the machine a \
         role; `aws sts get-caller-identity` shows what there is"
    } else if says(&EXPIRED) {
        "the session has expired: `aws sso login`, or set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and \
         AWS_SESSION_TOKEN anew, and start again"
    } else if says(&["RequestTimeTooSkewed"]) {
        "set this machine's clock: `timedatectl set-ntp true`, or `chronyc makestep`"
    } else if says(&[
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidSecurity",
        "AuthFailure",
        "HeaderMalformed",
    ]) {
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (`aws sts get-caller-identity`), and that they belong to \
         this endpoint: AWS_ENDPOINT_URL"
    } else if says(&["os error 1)"]) {
        "check who owns the folder (`ls -ld`), and that it is not set immutable (`lsattr -d`)"
    } else if says(&["os error"]) {
        "check who owns the folder (`ls -ld`), and that it is mounted for writing"
    } else if says(&["kms:", "KMS."]) {
        "allow kms:GenerateDataKey and kms:Decrypt on the bucket's key, or name a key that may be used: \
         storage.kms_key_id"
    } else if says(&["AccessDenied"]) && ["put", "create", "upload", "begin of an upload"].contains(&operation) {
        "allow list, get, put and delete on this prefix: `trainer doctor --store URI` says which one is missing; a \
         bucket that takes encrypted objects only wants storage.encryption = \"sse-kms\" (and storage.kms_key_id) or \
         \"sse-s3\""
    } else {
        "allow list, get, put and delete on this prefix: `trainer doctor --store URI` says which one is missing"
    }
}

/// What stores say when a session is over: it can be begun anew.
pub(super) const EXPIRED: [&str; 4] = ["ExpiredToken", "TokenRefreshRequired", "InvalidToken", "RequestExpired"];

fn unavailable_hint(cause: &str) -> Option<&'static str> {
    if cause.contains("os error 24") || cause.contains("os error 23") {
        Some(Shortage::Files.hint())
    } else if cause.contains("onnect") || cause.contains("dns") {
        Some("check the network (proxies: HTTPS_PROXY), and AWS_ENDPOINT_URL if the store is not on AWS")
    } else {
        None
    }
}
