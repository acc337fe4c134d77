//! S3 requests that object_store lacks: for the store's own checksum of an object, the unfinished multipart uploads,
//! and the bucket's lifecycle rules for those.
//!
//! One source of credentials: they are taken from the object_store client of the same bucket for each request, so the
//! rules of [`super::open`] hold here too (environment, web identity, instance role; endpoints that are not encrypted
//! only on this machine). Retries and time-outs are those of [`super::retry`]; the SDK's own are switched off. Errors
//! are expressed in object_store's terms, so that both clients' answers are classified and reported alike, without
//! secrets.
//!
//! Only reads are made here. *Crash, retry, cancel:* nothing is changed.

use std::{collections::BTreeSet, fmt, sync::OnceLock};

use aws_sdk_s3::{
    Client, Config,
    config::{BehaviorVersion, Credentials, IdentityCache, Region, SharedIdentityCache, retry::RetryConfig},
    error::{DisplayErrorContext, ProvideErrorMetadata, SdkError},
    types::{ChecksumMode, ChecksumType, ExpirationStatus, LifecycleRule},
};
use object_store::aws::AwsCredentialProvider;

use super::crc::Crc64;
use crate::cloud::direct;

/// The most pages of a listing that are accepted: 1,000 uploads each.
const MAX_PAGES: usize = 1000;

/// The address of a bucket; see [`super::open`].
#[derive(Clone)]
pub(super) struct Place {
    pub bucket: String,
    pub region: String,
    /// `None`: Amazon's own.
    pub endpoint: Option<String>,
    /// The bucket is a part of the host's name, not of the path.
    pub virtual_hosted: bool,
    /// `None`: requests are not signed.
    pub credentials: Option<AwsCredentialProvider>,
}

/// A second client of a bucket.
pub(super) struct Bucket {
    place: Place,
    /// Created at first use: it reads the machine's certificates.
    client: OnceLock<Client>,
}

/// A multipart upload that was neither completed nor aborted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OpenUpload {
    /// The whole key within the bucket.
    pub key: String,
    pub id: String,
    /// By the store's clock.
    pub started: jiff::Timestamp,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bucket").field(&self.place.bucket).finish()
    }
}

impl Bucket {
    /// No request is made. `None`: this endpoint can't be reached this way.
    pub(super) fn new(mut place: Place) -> Option<Self> {
        if place.virtual_hosted
            && let Some(endpoint) = &place.endpoint
        {
            // object_store expects the bucket in such an endpoint; the SDK adds it.
            place.endpoint = Some(without_bucket(endpoint, &place.bucket)?);
        }
        Some(Self { place, client: OnceLock::new() })
    }

    fn client(&self) -> &Client {
        self.client.get_or_init(|| {
            let mut config = Config::builder()
                .behavior_version(BehaviorVersion::latest())
                .region(Region::new(self.place.region.clone()))
                .force_path_style(!self.place.virtual_hosted)
                .retry_config(RetryConfig::disabled())
                .http_client(direct::sdk_client())
                // Each request brings its own credentials; those of the previous one must not be used again.
                .identity_cache(SharedIdentityCache::new(IdentityCache::no_cache()));
            if let Some(endpoint) = &self.place.endpoint {
                config = config.endpoint_url(endpoint);
            }
            if self.place.credentials.is_none() {
                config = config.allow_no_auth();
            }
            Client::from_conf(config.build())
        })
    }

    /// The credentials that sign one request.
    async fn signed(&self) -> object_store::Result<aws_sdk_s3::config::Builder> {
        let config = aws_sdk_s3::config::Builder::new();
        let Some(provider) = &self.place.credentials else { return Ok(config) };
        let found = provider.get_credential().await?;
        let keys = Credentials::new(&found.key_id, &found.secret_key, found.token.clone(), None, "object_store");
        Ok(config.credentials_provider(keys))
    }

    /// An object's length and, if the store keeps it, the CRC64-NVME of all its bytes.
    pub(super) async fn stored(&self, key: &str) -> object_store::Result<(u64, Option<Crc64>)> {
        let head = self.client().head_object().bucket(&self.place.bucket).key(key).checksum_mode(ChecksumMode::Enabled);
        let head = head.customize().config_override(self.signed().await?).send().await.map_err(|e| told("HEAD", e))?;
        let size = head.content_length().and_then(|length| u64::try_from(length).ok());
        let size = size.ok_or_else(|| said("the answer to HEAD has no length".into()))?;
        // For this checksum S3 has no other kind than that of the whole object; a server that says otherwise means
        // parts.
        let whole = head.checksum_type().is_none_or(|kind| *kind == ChecksumType::FullObject);
        let crc64 = head.checksum_crc64_nvme().filter(|_| whole).and_then(parse_crc64);
        Ok((size, crc64))
    }

    /// All unfinished multipart uploads whose key begins with `prefix`, page by page.
    pub(super) async fn uploads(&self, prefix: &str) -> object_store::Result<Vec<OpenUpload>> {
        let mut found = Vec::new();
        let mut marker: Option<(String, String)> = None;
        let mut seen = BTreeSet::new();
        for _ in 0..MAX_PAGES {
            let (key, id) = marker.clone().unzip();
            let list = self.client().list_multipart_uploads().bucket(&self.place.bucket).prefix(prefix);
            let list = list.set_key_marker(key).set_upload_id_marker(id).customize();
            let page = list.config_override(self.signed().await?).send().await.map_err(|e| told("LIST", e))?;
            for upload in page.uploads() {
                // One without a key, an id or a time can't be judged, so it is left alone; so is one outside the
                // prefix.
                if let (Some(key), Some(id), Some(started)) = (upload.key(), upload.upload_id(), upload.initiated())
                    && let Ok(started) = jiff::Timestamp::from_second(started.secs())
                    && key.starts_with(prefix)
                    && seen.insert((key.to_owned(), id.to_owned()))
                {
                    found.push(OpenUpload { key: key.to_owned(), id: id.to_owned(), started });
                }
            }
            let next = (page.next_key_marker(), page.next_upload_id_marker().unwrap_or_default());
            match next {
                (Some(key), id) if page.is_truncated() == Some(true) => {
                    let next = Some((key.to_owned(), id.to_owned()));
                    if next == marker {
                        return Err(said("the listing of uploads does not go on".into()));
                    }
                    marker = next;
                }
                _ => return Ok(found),
            }
        }
        Err(said(format!("the listing of uploads has more than {MAX_PAGES} pages")))
    }

    /// Days after which an enabled lifecycle rule aborts unfinished uploads below `prefix`; `None`: none does.
    pub(super) async fn abort_after(&self, prefix: &str) -> object_store::Result<Option<u32>> {
        let ask = self.client().get_bucket_lifecycle_configuration().bucket(&self.place.bucket).customize();
        let answer = match ask.config_override(self.signed().await?).send().await {
            Ok(answer) => answer,
            Err(error) if error.code() == Some("NoSuchLifecycleConfiguration") => return Ok(None),
            Err(error) => return Err(told("GET", error)),
        };
        let days =
            answer.rules().iter().filter(|rule| *rule.status() == ExpirationStatus::Enabled).filter_map(|rule| {
                let days = rule.abort_incomplete_multipart_upload()?.days_after_initiation()?;
                covers(rule, prefix).then(|| u32::try_from(days).ok())?
            });
        Ok(days.min())
    }
}

/// Whether a rule holds for every key that begins with `prefix`. A rule with tags or sizes does not: uploads have none
/// yet.
#[expect(deprecated, reason = "rules are still written with a prefix outside of a filter, and S3 obeys them")]
fn covers(rule: &LifecycleRule, prefix: &str) -> bool {
    let filter = rule.filter();
    let narrow = filter.is_some_and(|filter| {
        filter.and().is_some()
            || filter.tag().is_some()
            || filter.object_size_greater_than().is_some()
            || filter.object_size_less_than().is_some()
    });
    let start = filter.and_then(|filter| filter.prefix()).or(rule.prefix()).unwrap_or_default();
    !narrow && prefix.starts_with(start)
}

/// `https://bucket.host/` without the bucket.
fn without_bucket(endpoint: &str, bucket: &str) -> Option<String> {
    let (scheme, rest) = endpoint.split_once("://")?;
    let host = rest.strip_prefix(bucket)?.strip_prefix('.')?;
    (!host.is_empty()).then(|| format!("{scheme}://{host}"))
}

/// Base64 of eight bytes, big-endian, as S3 writes a CRC64 (RFC 4648, section 4). Any other text is no checksum.
fn parse_crc64(text: &str) -> Option<Crc64> {
    let digits = text.strip_suffix('=').filter(|digits| digits.len() == 11)?;
    let value = digits.bytes().try_fold(0_u128, |value, byte| {
        let digit = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        Some(value << 6 | u128::from(digit))
    })?;
    // 66 bits: the last two fill up the last digit.
    (value & 3 == 0).then(|| u64::try_from(value >> 2).ok().map(Crc64))?
}

/// An error without an answer; may be transient.
fn said(text: String) -> object_store::Error {
    object_store::Error::Generic { store: "S3", source: text.into() }
}

/// An SDK's error in object_store's terms, by which [`super::retry`] classifies.
fn told<E>(operation: &str, error: SdkError<E>) -> object_store::Error
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let status = error.raw_response().map(|response| response.status().as_u16());
    let Some(status) = status else { return said(format!("{operation}: {}", DisplayErrorContext(&error))) };
    let (code, message) = (error.code().unwrap_or_default(), error.message().unwrap_or_default());
    let region = error.raw_response().and_then(|response| response.headers().get("x-amz-bucket-region"));
    let answer = match (code, message, region) {
        (_, _, Some(region)) if (301..=308).contains(&status) => {
            format!(" <Code>{code}</Code><Message>{message}</Message><Region>{region}</Region>")
        }
        ("", "", _) => String::new(),
        _ => format!(" <Code>{code}</Code><Message>{message}</Message>"),
    };
    said(format!("{operation}: Server returned non-2xx status code: {status}:{answer}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_read_as_s3_writes_it() {
        // The check value of CRC-64/NVME.
        assert_eq!(parse_crc64("rosUhgp5mIg="), Some(Crc64::of(b"123456789")));
        assert_eq!(parse_crc64("AAAAAAAAAAA="), Some(Crc64(0)));
        assert_eq!(parse_crc64("//////////8="), Some(Crc64(u64::MAX)));
        for bad in
            ["", "=", "rosUhgp5mIg", "rosUhgp5mIh=", "rosUhgp5mI==", "rosUhgp5mIgA", "rosUhgp5m-g=", "rosUhgp5mIg=-3"]
        {
            assert_eq!(parse_crc64(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn an_endpoint_that_names_the_bucket_is_given_without_it() {
        assert_eq!(without_bucket("https://runs.s3.example.com", "runs").as_deref(), Some("https://s3.example.com"));
        for other in ["https://s3.example.com", "https://runs.", "https://runsy.example.com", "x"] {
            assert_eq!(without_bucket(other, "runs"), None, "{other}");
        }
    }
}
