//! The errors of a store, and what to do about them.

use crate::{
    error::{Explain, Kind},
    shortage::Shortage,
};

/// The errors of a store. Keys are given as whole URIs.
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
        /// The limit.
        limit: u64,
    },
    /// The object ends before the requested range does.
    #[error("object {key} has {size} bytes, but the request goes to byte {end}")]
    Short {
        /// The key.
        key: String,
        /// End of the requested range.
        end: u64,
        /// Its size.
        size: u64,
    },
    /// Refused for lack of permission.
    #[error("store refused {operation} of {key}: no permission")]
    Permission {
        /// The operation.
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
        /// The operation.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file would become larger than this process may make it.
    #[error("{operation} of {key} failed: no file may become that large here")]
    FileSize {
        /// The operation.
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
        /// The operation.
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
        /// The operation.
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
        /// The operation.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The folder that holds the store is no longer there.
    #[error("{operation} of {key} was not started")]
    Adrift {
        /// The operation.
        operation: &'static str,
        /// The key.
        key: String,
        /// What happened to the folder.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A setting that does not exist for this kind of store.
    #[error("{setting} is set, but {uri} is not on S3")]
    Setting {
        /// Its key.
        setting: &'static str,
        /// The store, without secrets.
        uri: String,
        /// What the setting is about.
        means: &'static str,
    },
    /// The folder's file system has no hard links, which give write-once objects their names.
    #[error("store {uri} can't be used: its file system has no hard links")]
    NoLinks {
        /// The store.
        uri: String,
        /// The system's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store does not meet the protocol's needs.
    #[error("store can't be used: {reason}")]
    Unfit {
        /// What it did wrong.
        reason: String,
    },
}

impl StorageError {
    /// Whether it is a state of a folder that does not change by itself: no space, no permission, another limit of the
    /// system, or no folder where one should be. A store elsewhere may be cured by somebody else.
    pub fn lasts(&self) -> bool {
        // ENFILE, EMFILE, ENOTDIR, EISDIR.
        const NUMBERS: [&str; 4] = ["os error 23)", "os error 24)", "os error 20)", "os error 21)"];
        match self {
            Self::Full { key, .. } | Self::Permission { key, .. } | Self::FileSize { key, .. } => {
                Provider::of(key) == Provider::Folder
            }
            Self::Unavailable { key, source, .. } => {
                let cause = source.to_string();
                Provider::of(key) == Provider::Folder && NUMBERS.iter().any(|number| cause.contains(number))
            }
            _ => false,
        }
    }
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
            Self::Full { .. } | Self::FileSize { .. } | Self::Unavailable { .. } | Self::Adrift { .. } => {
                Kind::Unavailable
            }
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::InvalidUri { uri, reason } => invalid_hint(Provider::of(uri), reason),
            Self::Setting { setting, means, .. } => {
                return Some(format!(
                    "leave {setting} out; {means} is set on the bucket, the container or the disk itself"
                ));
            }
            Self::NoBucket { key, .. } => match Provider::of(key) {
                Provider::Google => "create the bucket, `gcloud storage buckets create gs://BUCKET`, or check its name",
                Provider::Azure => {
                    "create the container, `az storage container create --name CONTAINER`, or check its name and \
                     AZURE_STORAGE_ACCOUNT_NAME"
                }
                Provider::S3 | Provider::Folder => {
                    "create the bucket (S3: `aws s3 mb s3://BUCKET`), or check its name, and AWS_ENDPOINT_URL if it is \
                     not on AWS"
                }
            },
            Self::Full { .. } => {
                "free space, prune old checkpoints (`trainer prune --run-id RUN`), or use another store; nothing \
                 partial is visible"
            }
            Self::FileSize { .. } => Shortage::FileSize.hint(),
            Self::Adrift { .. } => {
                "mount the disk again or move the folder back, then run `trainer resume`; nothing was written elsewhere"
            }
            Self::Unfit { .. } => {
                "use a store whose conditional put is atomic: Amazon S3, Google Cloud Storage, Azure Blob Storage, \
                RustFS, \
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
            Self::Permission { operation, key, source } => {
                permission_hint(operation, Provider::of(key), &source.to_string())
            }
            Self::Unavailable { key, source, .. } => unavailable_hint(Provider::of(key), &source.to_string())?,
            Self::InvalidKey { .. } | Self::NotFound { .. } | Self::TooLarge { .. } | Self::Short { .. } => {
                return None;
            }
        };
        Some(hint.to_owned())
    }
}

/// The kind of place that a URI names: the hints differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Provider {
    /// S3, or a server that speaks its protocol.
    S3,
    Google,
    Azure,
    /// A folder of this machine, or mounted on it.
    Folder,
}

impl Provider {
    fn of(uri: &str) -> Self {
        match uri.split_once("://").map(|(scheme, _)| scheme) {
            Some("gs") => Self::Google,
            Some("az") => Self::Azure,
            Some("file") => Self::Folder,
            _ => Self::S3,
        }
    }
}

const GOOGLE_KEYS: &str = "set GOOGLE_APPLICATION_CREDENTIALS to a service account's key file, or `gcloud auth \
                           application-default login`, or give the machine a service account";
const AZURE_KEYS: &str = "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_TENANT_ID, \
                          AZURE_CLIENT_ID and AZURE_CLIENT_SECRET, or give the machine a managed identity";

fn invalid_hint(place: Provider, reason: &str) -> &'static str {
    let says = |word| reason.contains(word);
    match place {
        _ if says("unencrypted") => "use an https endpoint, or run the server on this machine",
        Provider::S3 if says("endpoint") => "set AWS_ENDPOINT_URL to a URL such as https://HOST, or unset it",
        Provider::Google if says("endpoint") => "set GOOGLE_BASE_URL to a URL such as https://HOST, or unset it",
        Provider::Azure if says("endpoint") => "set AZURE_ENDPOINT to a URL such as https://HOST, or unset it",
        Provider::S3 if says("credentials") || says("SecretAccessKey") || says("AccessKeyId") => {
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment"
        }
        Provider::Google if says("credentials") || says("service account") => GOOGLE_KEYS,
        Provider::Azure if says("credentials") || says("Account must") => AZURE_KEYS,
        // A client's other refusals concern its variables.
        Provider::S3 if says("can't be opened") => "check the environment: `env | grep ^AWS_`",
        Provider::Google if says("can't be opened") => "check the environment: `env | grep ^GOOGLE_`",
        Provider::Azure if says("can't be opened") => "check the environment: `env | grep ^AZURE_`",
        Provider::Folder if says("can't be made") || says("can't be found") => {
            "name a folder whose path leads through folders only (`ls -ld` shows each), such as file://./runs"
        }
        _ => "write s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file://./folder",
    }
}

fn permission_hint(operation: &str, place: Provider, cause: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| cause.contains(word));
    match place {
        Provider::Google if says(&["no credentials"]) => return GOOGLE_KEYS,
        Provider::Azure if says(&["no credentials"]) => return AZURE_KEYS,
        Provider::Google => {
            return "give this account the role Storage Object Admin on the bucket: `gcloud storage buckets \
                    add-iam-policy-binding gs://BUCKET --member=serviceAccount:ACCOUNT \
                    --role=roles/storage.objectAdmin`";
        }
        Provider::Azure => {
            return "give this identity the role Storage Blob Data Contributor on the container (`az role assignment \
                    create --role \"Storage Blob Data Contributor\"`), or check AZURE_STORAGE_ACCOUNT_KEY";
        }
        Provider::S3 | Provider::Folder => {}
    }
    if says(&["no credentials"]) {
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (SSO: `aws sso login`), or give the machine a \
         role; `aws sts get-caller-identity` shows the current identity"
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
        "allow list, get, put and delete on this prefix (`trainer doctor --store URI` says which one is missing); if \
         the bucket takes only encrypted objects, set storage.encryption = \"sse-kms\" (and storage.kms_key_id) or \
         \"sse-s3\""
    } else {
        "allow list, get, put and delete on this prefix: `trainer doctor --store URI` says which one is missing"
    }
}

/// Codes of an expired session: it can be renewed.
pub(super) const EXPIRED: [&str; 4] = ["ExpiredToken", "TokenRefreshRequired", "InvalidToken", "RequestExpired"];

fn unavailable_hint(place: Provider, cause: &str) -> Option<&'static str> {
    if cause.contains("os error 24)") || cause.contains("os error 23)") {
        return Some(Shortage::Files.hint());
    }
    if cause.starts_with("407") {
        return Some(
            "the proxy needs a password: set HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT, or NO_PROXY for this host",
        );
    }
    match place {
        // ENOTCONN, ESTALE, EHOSTDOWN: a mounted folder whose server, or whose program, is gone.
        Provider::Folder
            if ["107)", "116)", "112)"].iter().any(|number| cause.contains(&format!("os error {number}"))) =>
        {
            Some(
                "the file system mounted there has gone away (`findmnt -T FOLDER`): unmount it, mount it again, and \
                 start again",
            )
        }
        Provider::Folder if cause.contains("os error 5)") => {
            Some("the disk fails (see `dmesg | tail`): use another disk, or another store")
        }
        Provider::Folder => None,
        Provider::S3 if cause.contains("onnect") || cause.contains("dns") => {
            Some("check the network (proxies: HTTPS_PROXY), and AWS_ENDPOINT_URL if the store is not on AWS")
        }
        Provider::Google | Provider::Azure if cause.contains("onnect") || cause.contains("dns") => {
            Some("check the network (proxies: HTTPS_PROXY)")
        }
        Provider::S3 | Provider::Google | Provider::Azure => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn the_hint_is_for_the_cloud_that_refused() {
        let said = |error: StorageError| Error::from(error).hint().unwrap_or_default().to_owned();
        let all = [("s3://b/k", "AWS_"), ("gs://b/k", "GOOGLE_"), ("az://b/k", "AZURE_")];
        let asks_for = |hint: String, own: &str| {
            let others = all.iter().filter(|(_, other)| *other != own);
            assert!(hint.contains(own), "{own}: {hint}");
            others.for_each(|(_, other)| assert!(!hint.contains(other), "{own}: {hint}"));
        };
        for (uri, own) in all {
            let (operation, key, uri) = ("list", uri.to_owned(), uri.to_owned());
            let source = "no credentials in the environment".into();
            asks_for(said(StorageError::Permission { operation, key, source }), own);
            let reasons = [
                "has an endpoint that is not a URL: x",
                "has credentials in it",
                "can't be opened: Generic S3 error: Missing SecretAccessKey",
                "can't be opened: Generic GCS error: Unable to open service account file from /x.json",
                "can't be opened: Generic MicrosoftAzure error: Account must be specified",
                "can't be opened: anything",
            ];
            for reason in reasons {
                asks_for(said(StorageError::InvalidUri { uri: uri.clone(), reason: reason.into() }), own);
            }
        }
        for (key, word) in [("s3://b", "aws s3 mb"), ("gs://b", "gcloud storage"), ("az://b", "az storage container")] {
            let (operation, source) = ("list", "404 Not Found".into());
            assert!(said(StorageError::NoBucket { operation, key: key.into(), source }).contains(word), "{key}");
        }
        let wrong = said(StorageError::InvalidUri { uri: "ftp://x".into(), reason: "has a scheme".into() });
        assert!(wrong.contains("s3://bucket/prefix"), "{wrong}");
    }

    #[test]
    fn the_state_of_a_folder_lasts_and_a_distant_stores_may_not() {
        let source = |number| std::io::Error::from_raw_os_error(number).to_string().into();
        let (operation, key) = ("put", || "file:///mnt/k".to_owned());
        for number in [20, 21, 23, 24] {
            assert!(StorageError::Unavailable { operation, key: key(), source: source(number) }.lasts(), "{number}");
            let elsewhere = StorageError::Unavailable { operation, key: "s3://b/k".into(), source: source(number) };
            assert!(!elsewhere.lasts(), "{number}");
        }
        assert!(!StorageError::Unavailable { operation, key: key(), source: source(5) }.lasts());
        assert!(StorageError::Full { operation, key: key(), source: source(28) }.lasts());
        assert!(StorageError::FileSize { operation, key: key(), source: source(27) }.lasts());
        assert!(StorageError::Permission { operation, key: key(), source: source(30) }.lasts());
        let session = StorageError::Permission { operation, key: "s3://b/k".into(), source: "ExpiredToken".into() };
        assert!(!session.lasts(), "somebody may log in again");
    }

    #[test]
    fn a_failing_folder_is_not_reported_as_the_network() {
        let said = |key: &str, number| {
            let source = std::io::Error::from_raw_os_error(number).to_string().into();
            let error = Error::from(StorageError::Unavailable { operation: "put", key: key.into(), source });
            error.hint().unwrap_or_default().to_owned()
        };
        for (number, word) in [(107, "mount it again"), (116, "mount it again"), (5, "dmesg"), (24, "ulimit")] {
            let hint = said("file:///mnt/k", number);
            assert!(hint.contains(word) && !hint.contains("HTTPS_PROXY"), "{number}: {hint}");
        }
        assert!(said("s3://b/k", 111).contains("HTTPS_PROXY"));
        assert!(said("s3://b/k", 5).is_empty());
        let source = "407 Proxy Authentication Required".into();
        let error = StorageError::Unavailable { operation: "put", key: "s3://b/k".into(), source };
        assert!(error.hint().is_some_and(|hint| hint.contains("HTTPS_PROXY=http://USER")));
        let source = "error trying to connect: dns error".into();
        let error = StorageError::Unavailable { operation: "put", key: "s3://b/k".into(), source };
        assert!(error.hint().is_some_and(|hint| hint.contains("HTTPS_PROXY")));
    }
}
