//! What an EC2 instance says of itself: its id, its region, its tags.
//!
//! A machine that is none must not be held up: where the firmware names another maker, nobody is asked, and where it names nobody
//! (containers without `/sys`), one short question is. On an instance the network may come up after this process: a
//! service that can't be reached is asked again for a while; one that takes the question and says nothing is not (its
//! usual cause, a hop limit of 1 in front of a container, does not pass).

use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::OnceCell;

use super::{
    hardware::{self, Maker},
    imds::Imds,
    metadata::MetadataError,
};

/// For one question.
const LIMIT: Duration = Duration::from_secs(2);
/// For the one question to a machine that may or may not be an instance.
const SHORT: Duration = Duration::from_secs(1);
/// How long the network of an instance may take to come up.
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(250);
/// The most tags that an instance can have is 50.
const MAX_TAGS: usize = 50;
/// All tags of this program begin so.
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
    /// Reads an identity document; `None` if it is none. Both names end up in requests.
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

static INSTANCE: OnceCell<Option<Instance>> = OnceCell::const_new();

async fn instance() -> Option<&'static Instance> {
    INSTANCE
        .get_or_init(|| async {
            let imds = Imds::from_environment()?;
            let named = std::env::var_os("AWS_EC2_METADATA_SERVICE_ENDPOINT").is_some_and(|value| !value.is_empty());
            let (limit, patience) = patience(named, hardware::maker(&hardware::root()))?;
            match ask(&imds, limit, patience).await {
                Ok(identity) => Some(Instance { imds, identity }),
                Err(error) => {
                    tracing::info!("nothing is known of this machine: {error}{}", hint(&error));
                    None
                }
            }
        })
        .await
        .as_ref()
}

/// How long one question and all of them may take; `None`: nobody need be asked. `named`: the user says where the service is.
fn patience(named: bool, maker: Maker) -> Option<(Duration, Duration)> {
    match maker {
        Maker::Amazon => Some((LIMIT, PATIENCE)),
        _ if named => Some((LIMIT, Duration::ZERO)),
        Maker::Unknown => Some((SHORT, Duration::ZERO)),
        Maker::Other => None,
    }
}

async fn ask(imds: &Imds, limit: Duration, patience: Duration) -> Result<Identity, MetadataError> {
    const PATH: &str = "/latest/dynamic/instance-identity/document";
    let began = Instant::now();
    loop {
        match imds.get(PATH, limit).await {
            Ok(Some(text)) => {
                let wrong = || MetadataError::Garbled { path: PATH.into(), expected: "an identity document" };
                return Identity::parse(&text).ok_or_else(wrong);
            }
            Ok(None) => return Err(MetadataError::Status { status: 404, path: PATH.into() }),
            Err(MetadataError::Unreachable { .. }) if began.elapsed() < patience => tokio::time::sleep(PAUSE).await,
            Err(error) => return Err(error),
        }
    }
}

fn hint(error: &MetadataError) -> &'static str {
    match error {
        MetadataError::Slow { .. } => "; in a container the usual cause is a hop limit of 1 (HttpPutResponseHopLimit)",
        _ => "",
    }
}

/// The instance that this process runs on; `None`: it runs on none, or the instance says nothing. Asked once; bounded.
pub async fn read() -> Option<&'static Identity> {
    instance().await.map(|instance| &instance.identity)
}

/// The tags whose key begins with `trainer:`, without it; empty where tags are not shown to the instance
/// (`InstanceMetadataTags`). A tag's value is at most 256 characters.
pub async fn tags() -> Vec<(String, String)> {
    const PATH: &str = "/latest/meta-data/tags/instance";
    let Some(instance) = instance().await else { return Vec::new() };
    let mut tags = Vec::new();
    let keys = match instance.imds.get(PATH, LIMIT).await {
        Ok(keys) => keys.unwrap_or_default(),
        Err(error) => {
            tracing::warn!("tags of this instance can't be read: {error}");
            return tags;
        }
    };
    for key in keys.lines().take(MAX_TAGS) {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"+-=._:@".contains(&b);
        let Some(name) = key.strip_prefix(TAG_PREFIX).filter(|name| name.bytes().all(plain)) else { continue };
        match instance.imds.get(&format!("{PATH}/{key}"), LIMIT).await {
            Ok(Some(value)) if value.chars().count() <= 256 => tags.push((name.to_owned(), value)),
            Ok(_) => tracing::warn!("tag {key} of this instance is not usable"),
            Err(error) => tracing::warn!("tag {key} of this instance can't be read: {error}"),
        }
    }
    tags
}

/// Whether the instance belongs to an Auto Scaling group, as far as it knows.
pub async fn in_group() -> Option<bool> {
    let instance = instance().await?;
    let answer = instance.imds.get("/latest/meta-data/autoscaling/target-lifecycle-state", LIMIT).await;
    answer.ok().map(|state| state.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_document_is_believed_only_where_its_names_are_plain() {
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
    fn only_a_machine_of_amazon_is_waited_for() {
        assert_eq!(patience(false, Maker::Amazon), Some((LIMIT, PATIENCE)));
        assert_eq!(patience(true, Maker::Amazon), Some((LIMIT, PATIENCE)));
        assert_eq!(patience(true, Maker::Other), Some((LIMIT, Duration::ZERO)));
        assert_eq!(patience(false, Maker::Unknown), Some((SHORT, Duration::ZERO)));
        assert_eq!(patience(false, Maker::Other), None);
    }
}
