//! Turns a URI and the environment into a backend.
//!
//! The environment is a list of variables, so that tests and several stores in one process need not share one.
//! object_store defines what a variable means, except for four rules of ours: CRC64-NVME on every S3 put, requests
//! unsigned over their body where TLS protects it, plain HTTP only to this machine, and no retries below our own.

use std::{path::PathBuf, sync::Arc};

use object_store::{
    ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum, S3ConditionalPut},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    client::HttpConnector,
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    local::LocalFileSystem,
    memory::InMemory,
    multipart::MultipartStore,
    signer::{HeaderName, HeaderValue},
};
use url::{Host, Url};

use super::{
    backend::{Backend, Large},
    connect::Connector,
    error::StorageError,
    retry::Policy,
    s3::{Bucket, Place},
    signed::S3,
    store::Store,
};
use crate::{
    cloud::{credentials::Chain, region},
    config::{Encryption, StorageConfig},
    env,
    shortage::Shortage,
};

impl Store {
    /// Opens `s3://bucket/prefix`, `gs://…`, `az://container/…`, `file://./relative`, `file:///absolute` or
    /// `memory://`.
    ///
    /// Clouds take credentials, region and endpoint from the environment. No request is made; a `file://` folder is
    /// created. Each `memory://` is a new, empty store, shared only by the clones of this handle.
    pub fn open(uri: &str, settings: &StorageConfig) -> Result<Self, StorageError> {
        Self::open_with(uri, settings, &environment_of(uri))
    }

    /// [`Store::open`] with environment variables given by name, instead of the process's own.
    pub fn open_with(
        uri: &str,
        settings: &StorageConfig,
        environment: &[(String, String)],
    ) -> Result<Self, StorageError> {
        let opened = open(uri, settings, environment)?;
        let (uri, settings_again, environment) = (uri.to_owned(), settings.clone(), environment.to_vec());
        let shared = opened.is_local().then(|| opened.backend.clone());
        let reopen = move || match &shared {
            Some(backend) => Ok(backend.clone()),
            None => open(&uri, &settings_again, &environment).map(|opened| opened.backend),
        };
        Ok(Self::assemble(opened.backend, opened.root, opened.prefix, opened.policy, settings, Box::new(reopen)))
    }
}

/// The variables that name an endpoint of S3, the first that is set counts.
const S3_ENDPOINTS: [&str; 3] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];

impl Store {
    /// The endpoint at which this machine reaches the store: the environment's, or the provider's own. `None`: the
    /// store has none, such as a folder, or it depends on an account.
    pub fn endpoint(&self) -> Option<Url> {
        let uri = self.uri();
        let environment = environment_of(&uri);
        let (names, usual): (&[&str], _) = match uri.split_once("://")?.0 {
            "s3" => (&S3_ENDPOINTS, "https://s3.amazonaws.com"),
            "gs" => (&["GOOGLE_BASE_URL"], "https://storage.googleapis.com"),
            "az" => (&["AZURE_ENDPOINT"], ""),
            _ => return None,
        };
        let named = names.iter().find_map(|name| variable(&environment, name));
        Url::parse(named.unwrap_or(usual)).ok()
    }
}

/// A backend and where its keys begin.
struct Opened {
    backend: Backend,
    /// URI of the key "", without a trailing `/`.
    root: String,
    /// Folder within the store; "" for all of it.
    prefix: String,
    policy: Policy,
}

impl Opened {
    /// Whether it is in this machine: there are no connections, and of a store in memory there is only one.
    fn is_local(&self) -> bool {
        self.policy.is_local()
    }
}

/// The process's own variables, as far as clouds read them; and, for a store on S3, the region from the profile or from
/// the machine itself, if the variables name none.
fn environment_of(uri: &str) -> Vec<(String, String)> {
    let ours = |name: &str| {
        ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|p| name.starts_with(p))
            || ["IDENTITY_ENDPOINT", "HOME"].contains(&name)
    };
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    let mut found: Vec<_> = env::all().filter_map(text).filter(|(name, _)| ours(name)).collect();
    if uri.starts_with("s3://")
        && variable(&found, "AWS_REGION").or(variable(&found, "AWS_DEFAULT_REGION")).is_none()
        && let Some(region) = region::of_profile()
    {
        found.push(("AWS_REGION".into(), region.to_owned()));
    }
    found
}

fn open(uri: &str, settings: &StorageConfig, environment: &[(String, String)]) -> Result<Opened, StorageError> {
    let refuse = |reason: &str| StorageError::InvalidUri { uri: redacted(uri), reason: reason.to_owned() };
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err(refuse("has no scheme"));
    };
    if uri.chars().any(char::is_control) {
        return Err(refuse("has a control character"));
    }
    if scheme != "s3"
        && let Some((setting, means)) = meant_for_s3(settings)
    {
        return Err(StorageError::Setting { setting, uri: redacted(uri), means });
    }
    if scheme == "file" {
        return open_file(rest, &refuse);
    }
    if rest.contains(['?', '#']) {
        return Err(refuse("has options: they are taken from the environment"));
    }
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.contains('@') {
        return Err(refuse("has credentials in it"));
    }
    let prefix = path.trim_matches('/');
    if object_store::path::Path::parse(prefix).is_err() {
        return Err(refuse("has a path that is not a plain folder"));
    }
    if scheme == "memory" {
        if !authority.is_empty() {
            return Err(refuse("has a host: a store in memory has none"));
        }
        let memory = Arc::new(InMemory::new());
        let backend = Backend { objects: memory.clone(), large: Large::Parts(memory), s3: None };
        return Ok(Opened { backend, root: "memory://".into(), prefix: prefix.into(), policy: Policy::LOCAL });
    }
    if authority.is_empty() {
        return Err(refuse("names no bucket"));
    }
    if !authority.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        return Err(refuse("has a bucket name with a character other than letters, digits, '-', '_' and '.'"));
    }
    let backend = match scheme {
        "s3" => s3(authority, settings, environment),
        "gs" => gcs(authority, environment),
        "az" => azure(authority, environment),
        _ => return Err(refuse("has a scheme that is not known")),
    };
    let backend = backend.map_err(|reason| refuse(&reason))?;
    let policy = Policy { attempts: settings.attempts.max(1) as usize, ..Policy::REMOTE };
    Ok(Opened { backend, root: format!("{scheme}://{authority}"), prefix: prefix.into(), policy })
}

/// `./runs`, `runs` or `/data/runs`; the part after `file://` is a path as typed, not percent-encoded.
fn open_file(path: &str, refuse: &dyn Fn(&str) -> StorageError) -> Result<Opened, StorageError> {
    if path.is_empty() {
        return Err(refuse("names no folder"));
    }
    if path.starts_with('~') {
        return Err(refuse("begins with '~', which only a shell expands: write the whole path"));
    }
    let (operation, key) = ("creation", || format!("file://{path}"));
    let failed = |doing: &str, error: &std::io::Error| match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            StorageError::Full { operation, key: key(), source: error.to_string().into() }
        }
        // Another error says what it lacks.
        _ if Shortage::of(error).is_some() => {
            let again = error.raw_os_error().map_or_else(|| error.kind().into(), std::io::Error::from_raw_os_error);
            StorageError::Unavailable { operation, key: key(), source: Box::new(again) }
        }
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
            StorageError::Permission { operation, key: key(), source: error.to_string().into() }
        }
        _ => refuse(&format!("{doing}: {error}")),
    };
    std::fs::create_dir_all(path).map_err(|error| failed("names a folder that can't be made", &error))?;
    let absolute: PathBuf =
        std::fs::canonicalize(path).map_err(|error| failed("names a folder that can't be found", &error))?;
    let Some(text) = absolute.to_str() else {
        return Err(refuse("leads to a path that is not UTF-8"));
    };
    let local = LocalFileSystem::new_with_prefix(&absolute)
        .map_err(|error| refuse(&format!("can't be opened: {error}")))?
        .with_fsync(true)
        // The empty folder of a deleted checkpoint is not listed.
        .with_automatic_cleanup(true);
    let root = format!("file://{}", text.trim_end_matches('/'));
    let local = Arc::new(local);
    let backend = Backend { objects: local.clone(), large: Large::File(local), s3: None };
    Ok(Opened { backend, root, prefix: String::new(), policy: Policy::LOCAL })
}

fn shared<T: ObjectStore + MultipartStore>(store: T) -> Backend {
    let store = Arc::new(store);
    Backend { objects: store.clone(), large: Large::Parts(store), s3: None }
}

/// A setting that only S3 has, and its subject.
fn meant_for_s3(settings: &StorageConfig) -> Option<(&'static str, &'static str)> {
    match settings {
        _ if settings.encryption != Encryption::Default => Some(("storage.encryption", "encryption")),
        _ if settings.kms_key_id.is_some() => Some(("storage.kms_key_id", "encryption")),
        _ if settings.storage_class.is_some() => Some(("storage.storage_class", "a storage class")),
        _ => None,
    }
}

/// Retries happen one level up; see [`super::retry`].
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

/// Time-outs of whole requests also happen one level up, since they depend on the request's size; the rest is done by
/// [`Connector`].
fn client_options(plain_http: bool) -> ClientOptions {
    ClientOptions::new().with_timeout_disabled().with_allow_http(plain_http)
}

/// Variables that `T` knows, by its own names for them.
fn known<'a, T: std::str::FromStr>(
    environment: &'a [(String, String)],
    start: &'a str,
) -> impl Iterator<Item = (T, &'a str)> {
    environment
        .iter()
        .filter(move |(name, _)| name.starts_with(start))
        .filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value.as_str())))
}

fn variable<'a>(environment: &'a [(String, String)], name: &str) -> Option<&'a str> {
    environment.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
}

/// Removes user and password from an endpoint; returns whether it is plain HTTP, which is refused unless it is to this
/// machine.
fn check_endpoint(endpoint: &str) -> Result<(String, bool), String> {
    let mut url = Url::parse(endpoint).map_err(|error| format!("has an endpoint that is not a URL: {error}"))?;
    // Both fail only for URLs without a host, which are refused below.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    let loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => return Err("has an endpoint without a host".into()),
    };
    let plain = match url.scheme() {
        "https" => false,
        "http" if loopback => true,
        "http" => return Err(format!("has the unencrypted endpoint http://{}", url.host_str().unwrap_or_default())),
        _ => return Err("has an endpoint that is neither https nor http".into()),
    };
    Ok((url.as_str().trim_end_matches('/').to_owned(), plain))
}

fn s3(bucket: &str, settings: &StorageConfig, environment: &[(String, String)]) -> Result<Backend, String> {
    let mut builder = AmazonS3Builder::new();
    for (key, value) in known::<AmazonS3ConfigKey>(environment, "AWS_") {
        // An empty variable counts as not set.
        if !value.is_empty() && !matches!(key, AmazonS3ConfigKey::Client(_)) {
            builder = builder.with_config(key, value);
        }
    }
    let endpoint = S3_ENDPOINTS.iter().find_map(|name| variable(environment, name));
    let mut plain = false;
    let mut place = second_client(bucket, environment);
    if let Some(endpoint) = endpoint {
        let (endpoint, plain_http) = check_endpoint(endpoint)?;
        plain = plain_http;
        builder = builder
            .with_config(AmazonS3ConfigKey::Endpoint, &endpoint)
            .with_config(AmazonS3ConfigKey::S3Endpoint, &endpoint);
        place.endpoint = Some(endpoint);
        if plain {
            builder = builder.with_virtual_hosted_style_request(false);
            place.virtual_hosted = false;
        }
    }
    let has_keys = variable(environment, "AWS_ACCESS_KEY_ID").is_some();
    if !has_keys && !has_source(environment) {
        return Err("has no credentials: none are in the environment, and AWS_EC2_METADATA_DISABLED is set".into());
    }
    let algorithm = match settings.encryption {
        Encryption::Default => None,
        Encryption::SseS3 => Some("AES256"),
        Encryption::SseKms => Some("aws:kms"),
    };
    let sse_key = |key: &str| key.parse::<AmazonS3ConfigKey>();
    if let (Some(algorithm), Ok(key)) = (algorithm, sse_key(SSE)) {
        builder = builder.with_config(key, algorithm);
    }
    if let (Some(id), Ok(key)) = (&settings.kms_key_id, sse_key(SSE_KEY)) {
        builder = builder.with_config(key, id);
    }
    let builder = builder
        .with_bucket_name(bucket)
        .with_client_options(client_options(plain))
        .with_retry(no_retries())
        .with_checksum_algorithm(Checksum::CRC64NVME)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // A single DELETE is understood everywhere; the bulk form is not.
        .with_disable_bulk_delete(true)
        // Over TLS the body needs no signature; the CRC covers it end to end. Without TLS, on this machine, likewise.
        .with_unsigned_payload(true);
    let own = own_requests(&builder, settings)?;
    let region = place.region.clone();
    let connector = Connector::new(Some(region.clone()));
    let mut builder = builder.with_http_connector(connector.clone());
    if !has_keys && !is_on(environment, "AWS_SKIP_SIGNATURE") {
        builder = builder.with_region(&region).with_credentials(Chain::of_this_process(&region));
    }
    let client = Arc::new(builder.build().map_err(|error| format!("can't be opened: {error}"))?);
    if !is_on(environment, "AWS_SKIP_SIGNATURE") {
        place.credentials = Some(client.credentials().clone());
    }
    let second = Bucket::new(place).map(Arc::new);
    let Some((region, requester_pays, object_headers)) = own else {
        return Ok(Backend { objects: client.clone(), large: Large::Parts(client), s3: second });
    };
    let http = connector.connect(&client_options(plain)).map_err(|error| format!("can't be opened: {error}"))?;
    let s3 = S3 { client: client.clone(), http, region, requester_pays, object_headers };
    Ok(Backend { objects: client, large: Large::S3(Arc::new(s3)), s3: second })
}

/// Whether there can be credentials anywhere: if not, the error need not wait.
fn has_source(environment: &[(String, String)]) -> bool {
    const SOURCES: [&str; 5] = [
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
        "AWS_PROFILE",
    ];
    let at_home = |file| variable(environment, "HOME").map(|home| PathBuf::from(home).join(".aws").join(file));
    let named = |name| variable(environment, name).map(PathBuf::from);
    let files = [
        named("AWS_CONFIG_FILE").or_else(|| at_home("config")),
        named("AWS_SHARED_CREDENTIALS_FILE").or_else(|| at_home("credentials")),
    ];
    let no_machine =
        variable(environment, "AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    !no_machine
        || SOURCES.iter().any(|name| variable(environment, name).is_some())
        || files.iter().flatten().any(|file| file.exists())
}

/// The same bucket for the other client, as far as the environment tells; without endpoint and credentials.
fn second_client(bucket: &str, environment: &[(String, String)]) -> Place {
    let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().find_map(|name| variable(environment, name));
    Place {
        bucket: bucket.to_owned(),
        region: region.unwrap_or("us-east-1").to_owned(),
        endpoint: None,
        virtual_hosted: is_on(environment, "AWS_VIRTUAL_HOSTED_STYLE_REQUEST"),
        credentials: None,
    }
}

/// Whether a variable is true, in one of object_store's spellings.
fn is_on(environment: &[(String, String)], name: &str) -> bool {
    let word = variable(environment, name).unwrap_or_default().to_ascii_lowercase();
    matches!(word.as_str(), "1" | "true" | "on" | "yes" | "y")
}

/// object_store's names of the variables of encryption.
const SSE: &str = "aws_server_side_encryption";
const SSE_KEY: &str = "aws_sse_kms_key_id";
const SSE_BUCKET_KEY: &str = "aws_sse_bucket_key_enabled";

/// Region, whether the requester pays, and the headers of each object.
type OwnRequests = (String, bool, Vec<(HeaderName, HeaderValue)>);

/// The needs of our own requests; `None` if only object_store can send them: requests without a signature, session
/// credentials of S3 Express, keys of the customer's own, a proxy.
fn own_requests(builder: &AmazonS3Builder, settings: &StorageConfig) -> Result<Option<OwnRequests>, String> {
    let value = |key: &str| builder.get_config_value(&key.parse().ok()?).filter(|value| !value.is_empty());
    let is_set =
        |key: &str| value(key).is_some_and(|value| ["true", "1"].contains(&value.to_ascii_lowercase().as_str()));
    let encryption = value(SSE);
    if is_set("aws_skip_signature")
        || is_set("aws_s3_express")
        || encryption.as_deref().is_some_and(|kind| kind.eq_ignore_ascii_case("sse-c"))
    {
        return Ok(None);
    }
    let mut headers = Vec::new();
    let mut add = |name: &'static str, value: Option<String>| match value.as_deref().map(HeaderValue::from_str) {
        None => Ok(()),
        Some(Ok(value)) => {
            headers.push((HeaderName::from_static(name), value));
            Ok(())
        }
        Some(Err(_)) => Err(format!("has a setting for {name} that can't be sent")),
    };
    add("x-amz-server-side-encryption", encryption)?;
    add("x-amz-server-side-encryption-aws-kms-key-id", value(SSE_KEY))?;
    add("x-amz-server-side-encryption-bucket-key-enabled", value(SSE_BUCKET_KEY))?;
    add("x-amz-storage-class", settings.storage_class.clone())?;
    let region = value("aws_region").unwrap_or_else(|| "us-east-1".into());
    Ok(Some((region, is_set("aws_request_payer"), headers)))
}

/// The backend of an `object_store` builder other than S3's. A macro, because the builders share no trait.
macro_rules! opened {
    ($builder:expr, $plain_http:expr) => {
        $builder
            .with_http_connector(Connector::new(None))
            .with_client_options(client_options($plain_http))
            .with_retry(no_retries())
            .build()
            .map(shared)
            .map_err(|error| format!("can't be opened: {error}"))
    };
}

fn gcs(bucket: &str, environment: &[(String, String)]) -> Result<Backend, String> {
    let mut builder = GoogleCloudStorageBuilder::new();
    let mut plain = false;
    for (key, value) in known::<GoogleConfigKey>(environment, "GOOGLE_") {
        match key {
            GoogleConfigKey::Client(_) => {}
            GoogleConfigKey::BaseUrl => {
                let (endpoint, plain_http) = check_endpoint(value)?;
                plain = plain_http;
                builder = builder.with_config(GoogleConfigKey::BaseUrl, endpoint);
            }
            _ if value.is_empty() => {}
            _ => builder = builder.with_config(key, value),
        }
    }
    opened!(builder.with_bucket_name(bucket), plain)
}

fn azure(container: &str, environment: &[(String, String)]) -> Result<Backend, String> {
    let mut builder = MicrosoftAzureBuilder::new();
    let mut plain = false;
    for (key, value) in known::<AzureConfigKey>(environment, "AZURE_") {
        match key {
            AzureConfigKey::Client(_) => {}
            AzureConfigKey::Endpoint => {
                let (endpoint, plain_http) = check_endpoint(value)?;
                plain = plain_http;
                builder = builder.with_config(AzureConfigKey::Endpoint, endpoint);
            }
            _ if value.is_empty() => {}
            _ => builder = builder.with_config(key, value),
        }
    }
    if let Some(endpoint) = variable(environment, "IDENTITY_ENDPOINT") {
        builder = builder.with_msi_endpoint(endpoint);
    }
    opened!(builder.with_container_name(container), plain)
}

/// The URI without user, password, query and fragment.
fn redacted(uri: &str) -> String {
    let uri: String = uri.chars().filter(|c| !c.is_control()).take(300).collect();
    let Some((scheme, rest)) = uri.split_once("://") else { return uri };
    if scheme == "file" {
        return uri;
    }
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (authority, path) = rest.split_once('/').map_or((rest, None), |(a, p)| (a, Some(p)));
    let host = authority.rsplit('@').next().unwrap_or_default();
    path.map_or_else(|| format!("{scheme}://{host}"), |path| format!("{scheme}://{host}/{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }
    fn error(uri: &str, pairs: &[(&str, &str)]) -> String {
        match open(uri, &StorageConfig::plain(4, 8), &env(pairs)) {
            Ok(_) => panic!("{uri} was opened"),
            Err(error) => crate::error::Error::from(error).to_string(),
        }
    }
    const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "hunter2")];

    #[test]
    fn malformed_uris_are_refused_with_a_reason() {
        for (uri, part) in [
            ("runs", "has no scheme"),
            ("ftp://x/y", "not known"),
            ("s3://", "names no bucket"),
            ("s3:///x", "names no bucket"),
            ("s3://b/../x", "not a plain folder"),
            ("s3://b/a//x", "not a plain folder"),
            ("s3://b/x?region=y", "options"),
            ("s3://b\n/x", "control character"),
            ("memory://host/x", "has a host"),
            ("file://", "names no folder"),
            ("file://~/runs", "'~'"),
        ] {
            let said = error(uri, &KEYS);
            assert!(said.contains(part), "{uri}: {said}");
        }
    }

    #[test]
    fn no_secret_is_in_an_error() {
        let said = error("s3://me:hunter2@bucket/x", &KEYS);
        assert!(said.contains("credentials") && !said.contains("hunter2"), "{said}");
        let endpoint = [KEYS[0], KEYS[1], ("AWS_ENDPOINT_URL", "http://me:hunter2@example.com:9000/")];
        let said = error("s3://bucket/x", &endpoint);
        assert!(said.contains("example.com") && !said.contains("hunter2"), "{said}");
    }

    #[test]
    fn plain_http_is_for_this_machine_only() {
        for endpoint in ["http://127.0.0.1:9000", "http://localhost:9000/", "http://[::1]:9", "https://example.com"] {
            assert!(
                open(
                    "s3://b/x",
                    &StorageConfig::plain(4, 8),
                    &env(&[KEYS[0], KEYS[1], ("AWS_ENDPOINT_URL", endpoint)])
                )
                .is_ok(),
                "{endpoint}"
            );
        }
        for endpoint in
            ["http://example.com", "http://10.0.0.1", "http://localhost.example.com", "ftp://127.0.0.1", "x"]
        {
            let said =
                error("s3://b/x", &[KEYS[0], KEYS[1], ("AWS_ENDPOINT_URL", endpoint), ("AWS_ALLOW_HTTP", "true")]);
            assert!(said.contains("endpoint"), "{endpoint}: {said}");
        }
        assert_eq!(check_endpoint("http://u:p@127.0.0.1:9000/").unwrap(), ("http://127.0.0.1:9000".to_owned(), true));
        for (name, uri) in [("GOOGLE_BASE_URL", "gs://b/x"), ("AZURE_ENDPOINT", "az://b/x")] {
            let said = error(uri, &[(name, "http://example.com")]);
            assert!(said.contains("unencrypted"), "{said}");
        }
    }

    #[test]
    fn requests_that_only_object_store_can_sign_are_left_to_it() {
        let own = |pairs: &[(&str, &str)]| {
            let mut builder = AmazonS3Builder::new();
            for (name, value) in pairs {
                builder = builder.with_config(name.parse::<AmazonS3ConfigKey>().unwrap(), *value);
            }
            own_requests(&builder, &StorageConfig::plain(4, 8)).unwrap()
        };
        for (name, value) in [("aws_skip_signature", "true"), ("aws_s3_express", "1"), (SSE, "sse-c")] {
            assert!(own(&[(name, value)]).is_none(), "{name}={value}");
        }
        assert_eq!(own(&[]), Some(("us-east-1".into(), false, vec![])));
        let paid = own(&[("aws_request_payer", "true"), ("aws_region", "eu-central-1")]);
        assert_eq!(paid, Some(("eu-central-1".into(), true, vec![])));
    }

    #[test]
    fn a_machine_without_credentials_is_told_at_once() {
        let said = error("s3://bucket", &[("AWS_EC2_METADATA_DISABLED", "true")]);
        assert!(said.contains("no credentials"), "{said}");
    }
}
