//! The facts that an EC2 instance knows about itself: its id, its region, its tags.
//!
//! A machine that is not an instance must not wait: if the firmware names another maker, there is no request; if it
//! names none (containers without `/sys`), there is one short request. On an instance the network may come up after
//! this process, and the service may be slow or refuse under load: requests are repeated for a while. Silence is not an
//! answer: a later caller asks anew, and a machine whose tags can't be read does not act as if it had none.

use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::{Mutex, OnceCell};

use super::{
    hardware::{self, Maker},
    imds::Imds,
    metadata::MetadataError,
};
use crate::env;
use crate::error::{Error, Kind, Result};

/// The limit for one request.
const LIMIT: Duration = Duration::from_secs(2);
/// The limit for the one request on a machine that may or may not be an instance.
const SHORT: Duration = Duration::from_secs(1);
/// How long the network of an instance may take to come up, and its metadata service to recover.
const PATIENCE: Duration = Duration::from_secs(20);
/// After silence no request is sent for this long, so that callers at about the same time wait only once.
const SILENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(250);
/// The most tags that an instance can have.
const MAX_TAGS: usize = 50;
/// The prefix of all tags of this program.
const TAG_PREFIX: &str = "trainer:";

/// The instance.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// `i-…`
    pub instance_id: String,
    /// Its region.
    pub region: String,
    /// Its type.
    #[serde(default)]
    pub instance_type: String,
}

impl Identity {
    /// Reads an identity document; `None`: it is malformed. Both names become parts of requests.
    fn parse(text: &str) -> Option<Self> {
        let plain =
            |text: &str| (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        serde_json::from_str(text).ok().filter(|found: &Self| plain(&found.instance_id) && plain(&found.region))
    }
}

/// A metadata service that has answered.
#[derive(Debug)]
struct Instance {
    imds: Imds,
    identity: Identity,
}

/// Why nothing is known about a machine.
#[derive(Clone, Debug)]
struct Silence {
    since: Instant,
    /// Whether it is certainly an instance.
    on_amazon: bool,
    error: MetadataError,
}

static INSTANCE: OnceCell<Instance> = OnceCell::const_new();
static SILENCE_HEARD: Mutex<Option<Silence>> = Mutex::const_new(None);

/// The instance; `Ok(None)`: there is no service to ask.
async fn instance() -> Result<Option<&'static Instance>, Silence> {
    if let Some(instance) = INSTANCE.get() {
        return Ok(Some(instance));
    }
    // Held while the service is asked: all other callers want the same answer, and one question is enough. The request
    // has a limit.
    let mut silence = SILENCE_HEARD.lock().await;
    // Another caller may have asked meanwhile.
    if let Some(instance) = INSTANCE.get() {
        return Ok(Some(instance));
    }
    if let Some(silence) = silence.as_ref().filter(|silence| silence.since.elapsed() < SILENCE) {
        return Err(silence.clone());
    }
    let Some(imds) = Imds::from_environment() else { return Ok(None) };
    let named = env::raw("AWS_EC2_METADATA_SERVICE_ENDPOINT").is_some_and(|value| !value.is_empty());
    let maker = hardware::maker(&hardware::root());
    let Some((limit, patience)) = patience(named, maker) else { return Ok(None) };
    match ask(&imds, limit, patience).await {
        Ok(identity) => Ok(Some(INSTANCE.get_or_init(|| async { Instance { imds, identity } }).await)),
        Err(error) => {
            tracing::info!("this machine can't be identified: {error}{}", hint(&error));
            let heard = Silence { since: Instant::now(), on_amazon: maker == Maker::Amazon, error };
            Err(silence.insert(heard).clone())
        }
    }
}

/// How long one request and all of them may take; `None`: no request is needed. `named`: the user says where the
/// service is.
fn patience(named: bool, maker: Maker) -> Option<(Duration, Duration)> {
    match maker {
        Maker::Amazon => Some((LIMIT, PATIENCE)),
        _ if named => Some((LIMIT, Duration::ZERO)),
        Maker::Unknown => Some((SHORT, Duration::ZERO)),
        Maker::Google | Maker::Azure | Maker::Other => None,
    }
}

async fn ask(imds: &Imds, limit: Duration, patience: Duration) -> Result<Identity, MetadataError> {
    const PATH: &str = "/latest/dynamic/instance-identity/document";
    let text = persist(imds, PATH, limit, patience).await?;
    let text = text.ok_or_else(|| MetadataError::Status { status: 404, path: PATH.into() })?;
    let wrong = || MetadataError::Garbled { path: PATH.into(), expected: "an identity document" };
    Identity::parse(&text).ok_or_else(wrong)
}

/// Asks until there is a final answer, or `patience` has passed.
async fn persist(
    imds: &Imds,
    path: &str,
    limit: Duration,
    patience: Duration,
) -> Result<Option<String>, MetadataError> {
    let began = Instant::now();
    loop {
        match imds.get(path, limit).await {
            Err(error) if may_pass(&error) && began.elapsed() < patience => tokio::time::sleep(PAUSE).await,
            answer => return answer,
        }
    }
}

/// Whether the next answer may differ.
const fn may_pass(error: &MetadataError) -> bool {
    match error {
        MetadataError::Unreachable { .. } | MetadataError::Slow { .. } => true,
        MetadataError::Status { status, .. } => *status == 429 || *status >= 500,
        MetadataError::Garbled { .. } => false,
    }
}

fn hint(error: &MetadataError) -> &'static str {
    match error {
        MetadataError::Slow { .. } => "; in a container the usual cause is a hop limit of 1 (HttpPutResponseHopLimit)",
        _ => "",
    }
}

/// The instance that this process runs on; `None`: there is none, or it does not answer now. Bounded in time.
pub async fn read() -> Option<&'static Identity> {
    instance().await.ok().flatten().map(|instance| &instance.identity)
}

/// The tags of this machine, as far as known.
#[derive(Debug)]
pub enum Tags {
    /// Those whose key begins with `trainer:`, without that prefix; none if tags are not shown to the instance
    /// (`InstanceMetadataTags`), or the machine may not be an instance. A tag's value is at most 256 characters.
    Known(Vec<(String, String)>),
    /// This is an instance, but it does not answer now.
    Silent(Error),
}

/// The tags of this machine.
///
/// # Errors
/// If the instance answers, but its list of tags, or the value of one, can't be read now.
pub async fn tags() -> Result<Tags> {
    match instance().await {
        Ok(Some(instance)) => read_tags(&instance.imds, PATIENCE).await.map(Tags::Known),
        Err(Silence { on_amazon: true, error, .. }) => {
            let error = unreadable("the tags of this instance", &format!("{error}{}", hint(&error)));
            Ok(Tags::Silent(
                error.with_hint("try again, or set AWS_EC2_METADATA_DISABLED=true to ignore the machine's tags"),
            ))
        }
        Ok(None) | Err(_) => Ok(Tags::Known(Vec::new())),
    }
}

async fn read_tags(imds: &Imds, patience: Duration) -> Result<Vec<(String, String)>> {
    const PATH: &str = "/latest/meta-data/tags/instance";
    let keys = persist(imds, PATH, LIMIT, patience).await;
    let keys = keys.map_err(|error| unreadable("the tags of this instance", &error))?.unwrap_or_default();
    let mut tags = Vec::new();
    for key in keys.lines().take(MAX_TAGS) {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"+-=._:@".contains(&b);
        let Some(name) = key.strip_prefix(TAG_PREFIX).filter(|name| name.bytes().all(plain)) else { continue };
        let what = || format!("tag {key} of this instance");
        match persist(imds, &format!("{PATH}/{key}"), LIMIT, patience).await {
            Ok(Some(value)) if value.chars().count() <= 256 => tags.push((name.to_owned(), value)),
            Ok(Some(_)) => return Err(unreadable(&what(), &"it is longer than a tag can be")),
            Ok(None) => return Err(unreadable(&what(), &"it is listed but missing")),
            Err(error) => return Err(unreadable(&what(), &error)),
        }
    }
    Ok(tags)
}

/// The missing tag may name another run or place than the others do. Waiting may repair this, a guess can't.
fn unreadable(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::new(Kind::Unavailable, format!("{what} can't be read: {why}"))
}

/// Whether the instance belongs to an Auto Scaling group, as far as it knows.
pub async fn in_group() -> Option<bool> {
    let instance = instance().await.ok().flatten()?;
    let answer = instance.imds.get("/latest/meta-data/autoscaling/target-lifecycle-state", LIMIT).await;
    answer.ok().map(|state| state.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_document_is_accepted_only_with_plain_names() {
        let found =
            Identity::parse(r#"{"instanceId":"i-0abc","region":"eu-central-1","instanceType":"g5.xlarge","x":1}"#);
        let (instance_id, region) = ("i-0abc".to_owned(), "eu-central-1".to_owned());
        assert_eq!(found, Some(Identity { instance_id, region, instance_type: "g5.xlarge".into() }));
        for text in [
            "",
            "<html>",
            r#"{"instanceId":"i-1"}"#,
            r#"{"instanceId":"","region":"r"}"#,
            r#"{"instanceId":"i-1","region":"evil.example.com/"}"#,
            r#"{"instanceId":"i-1\r\nx: y","region":"r"}"#,
        ] {
            assert_eq!(Identity::parse(text), None, "{text}");
        }
    }

    #[test]
    fn only_an_amazon_machine_is_waited_for() {
        assert_eq!(patience(false, Maker::Amazon), Some((LIMIT, PATIENCE)));
        assert_eq!(patience(true, Maker::Amazon), Some((LIMIT, PATIENCE)));
        assert_eq!(patience(true, Maker::Other), Some((LIMIT, Duration::ZERO)));
        assert_eq!(patience(false, Maker::Unknown), Some((SHORT, Duration::ZERO)));
        for other in [Maker::Google, Maker::Azure, Maker::Other] {
            assert_eq!(patience(false, other), None);
        }
    }

    #[test]
    fn passing_errors_are_retried() {
        let (endpoint, path) = ("http://h".to_owned(), "/p".to_owned());
        let status = |status| MetadataError::Status { status, path: path.clone() };
        let slow = MetadataError::Slow { endpoint: endpoint.clone(), path: path.clone(), limit: LIMIT };
        let unreachable = MetadataError::Unreachable { endpoint, reason: "refused".into() };
        for error in [slow, unreachable, status(429), status(500), status(503)] {
            assert!(may_pass(&error), "{error}");
        }
        for error in [status(400), status(401), status(403), MetadataError::Garbled { path, expected: "x" }] {
            assert!(!may_pass(&error), "{error}");
        }
    }
}
