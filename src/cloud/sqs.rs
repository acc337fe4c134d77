//! One queue of Amazon SQS, and the few calls that a consumer makes on it.
//!
//! A received message is hidden from others until its visibility runs out, it is deleted, or its time is set anew. SQS
//! gives each receipt a new name, counts receives (`ApproximateReceiveCount`), moves a message that was received more
//! often than the redrive policy's `maxReceiveCount` to the dead-letter queue, and hides a message for no longer than
//! twelve hours in all from its receive on (API reference, `ChangeMessageVisibility`). Delivery is at least once: the
//! same message may come twice.
//!
//! Nothing is stored here. Every call is bounded in time, and retried by the SDK; a call whose answer was lost may have
//! happened: a second delete of a message is fine, a second send makes a duplicate. The caller must check a message's
//! content: the sender may claim anything.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use aws_sdk_sqs::{
    Client,
    error::{ProvideErrorMetadata, SdkError},
    types::{MessageAttributeValue, MessageSystemAttributeName, QueueAttributeName},
};
use url::{Host, Url};

use super::aws;
use crate::error::{Error, Kind, Result};

/// The longest that SQS hides a message from its receive on, all extensions together.
pub const LONGEST_HOLD: Duration = Duration::from_secs(12 * 60 * 60);
/// The longest that SQS delays a sent message.
pub const LONGEST_DELAY: Duration = Duration::from_secs(15 * 60);
/// The most attributes that a message may have.
const MOST_ATTRIBUTES: usize = 10;
/// The longest that a receive waits for a message.
pub const LONGEST_WAIT: Duration = Duration::from_secs(20);
/// The limit for one call, with the SDK's retries; a receive may also take its wait.
const CALL: Duration = Duration::from_secs(20);

/// A queue.
#[derive(Clone, Debug)]
pub struct Queue {
    client: Client,
    url: String,
}

/// A message as received.
#[derive(Clone, Debug)]
pub struct Message {
    /// The queue's id for it; it stays the same when the message is received again.
    pub id: String,
    /// The content.
    pub body: String,
    /// How often it was received, this time included, as far as the queue knows.
    pub received: u32,
    /// When this receive began: the message was hidden no earlier.
    pub since: Instant,
    receipt: String,
    attributes: HashMap<String, MessageAttributeValue>,
}

impl Message {
    /// An attribute of the type `Number`; `None`: it is missing or malformed.
    pub fn number(&self, name: &str) -> Option<u64> {
        let value = self.attributes.get(name)?;
        value.data_type().starts_with("Number").then(|| value.string_value()?.parse().ok())?
    }
}

/// The outcome of an attempt to keep a message hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// It stays hidden.
    Yes,
    /// It is no longer ours: its time ran out, or it was deleted.
    Gone,
}

/// A queue's setting for messages that are received too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redrive {
    /// A message received more often than this goes to the dead-letter queue.
    pub max_receive_count: u32,
}

/// How much work a queue has, about: SQS counts with a delay of up to a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Messages that nobody works on.
    pub waiting: u32,
    /// Messages that somebody has received and not deleted.
    pub at_work: u32,
}

impl Queue {
    /// The queue at `url`, as SQS gives it. No request is made.
    ///
    /// # Errors
    /// If it is not a URL of a standard queue, or would send messages over the network unencrypted.
    pub async fn open(url: &str) -> Result<Self> {
        let place = Place::of(url).map_err(|reason| {
            Error::new(Kind::Config, format!("queue {} {reason}", redacted(url))).with_hint(
                "write the URL that SQS shows, such as https://sqs.eu-central-1.amazonaws.com/123456789012/jobs",
            )
        })?;
        let shared = match &place.region {
            Some(region) => aws::config_in(region).await,
            None => aws::config().await,
        };
        let mut config = aws_sdk_sqs::config::Builder::from(&shared);
        if let Some(endpoint) = &place.endpoint {
            config = config.endpoint_url(endpoint);
        }
        Ok(Self { client: Client::from_conf(config.build()), url: url.to_owned() })
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its redrive policy; `None`: it has none. A queue that does not exist is detected here.
    pub async fn redrive(&self) -> Result<Option<Redrive>> {
        let call = self.client.get_queue_attributes().queue_url(&self.url);
        let call = call.attribute_names(QueueAttributeName::RedrivePolicy).send();
        let answer = bounded("read attributes of the queue", CALL, call).await?;
        let text = answer.attributes().and_then(|all| all.get(&QueueAttributeName::RedrivePolicy));
        Ok(text.and_then(|text| redrive(text)))
    }

    /// How much work it has.
    pub async fn depth(&self) -> Result<Depth> {
        use QueueAttributeName::{ApproximateNumberOfMessages, ApproximateNumberOfMessagesNotVisible};
        let call = self.client.get_queue_attributes().queue_url(&self.url);
        let call = call.attribute_names(ApproximateNumberOfMessages);
        let call = call.attribute_names(ApproximateNumberOfMessagesNotVisible).send();
        let answer = bounded("count the messages of the queue", CALL, call).await?;
        let count = |name: &QueueAttributeName| {
            let text = answer.attributes().and_then(|all| all.get(name));
            text.and_then(|text| text.parse().ok()).ok_or_else(|| {
                Error::new(Kind::Unavailable, format!("the queue does not say its {}", name.as_str()))
                    .context("count the messages of the queue")
            })
        };
        Ok(Depth {
            waiting: count(&ApproximateNumberOfMessages)?,
            at_work: count(&ApproximateNumberOfMessagesNotVisible)?,
        })
    }

    /// The next message, hidden from others for `lease`; waits for one up to `wait`.
    pub async fn receive(&self, lease: Duration, wait: Duration) -> Result<Option<Message>> {
        let wait = wait.min(LONGEST_WAIT);
        let call = self.client.receive_message().queue_url(&self.url).max_number_of_messages(1);
        let call = call.wait_time_seconds(whole_seconds(wait)).visibility_timeout(whole_seconds(lease));
        let call = call.message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
        let since = Instant::now();
        let answer = bounded("receive a message", CALL + wait, call.message_attribute_names("All").send()).await?;
        let Some(message) = answer.messages.unwrap_or_default().into_iter().next() else { return Ok(None) };
        let count = message.attributes().and_then(|all| all.get(&MessageSystemAttributeName::ApproximateReceiveCount));
        let received = count.and_then(|count| count.parse().ok()).unwrap_or(1);
        let Some(receipt) = message.receipt_handle else {
            return Err(Error::new(Kind::Unavailable, "the queue gave a message without a receipt"));
        };
        Ok(Some(Message {
            id: message.message_id.unwrap_or_default(),
            body: message.body.unwrap_or_default(),
            received,
            since,
            receipt,
            attributes: message.message_attributes.unwrap_or_default(),
        }))
    }

    /// Hides `message` for `lease` from now on; zero makes it visible at once.
    pub async fn hide(&self, message: &Message, lease: Duration) -> Result<Held> {
        let call = self.client.change_message_visibility().queue_url(&self.url);
        let call = call.receipt_handle(&message.receipt).visibility_timeout(whole_seconds(lease)).send();
        match tokio::time::timeout(CALL, call).await {
            Ok(Ok(_)) => Ok(Held::Yes),
            Ok(Err(error)) if is_gone(&error) => Ok(Held::Gone),
            Ok(Err(error)) => Err(aws::explain(error, "keep the message hidden")),
            Err(_) => Err(slow("keep the message hidden", CALL)),
        }
    }

    /// Sends a copy of `message`, which may be received after `delay`; `numbers` are set, and other attributes stay as
    /// far as there is room for them. Its receives count from 0 again.
    pub async fn send_copy(&self, message: &Message, numbers: &[(&str, u64)], delay: Duration) -> Result<()> {
        let attributes = attributes_of_copy(&message.attributes, numbers)?;
        let call = self.client.send_message().queue_url(&self.url).message_body(&message.body);
        let call = call.set_message_attributes(Some(attributes).filter(|all| !all.is_empty()));
        let call = call.delay_seconds(whole_seconds(delay.min(LONGEST_DELAY))).send();
        bounded("send a copy of the message", CALL, call).await.map(drop)
    }

    /// Deletes `message` from the queue; success if it is already gone.
    pub async fn delete(&self, message: &Message) -> Result<()> {
        let call = self.client.delete_message().queue_url(&self.url).receipt_handle(&message.receipt).send();
        match tokio::time::timeout(CALL, call).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if is_gone(&error) => Ok(()),
            Ok(Err(error)) => Err(aws::explain(error, "delete the message")),
            Err(_) => Err(slow("delete the message", CALL)),
        }
    }
}

/// The attributes of a copy: `numbers`, and as many of the others as fit, by name. A copy without some of the sender's
/// attributes is better than no copy.
fn attributes_of_copy(
    attributes: &HashMap<String, MessageAttributeValue>,
    numbers: &[(&str, u64)],
) -> Result<HashMap<String, MessageAttributeValue>> {
    let mut others: Vec<_> =
        attributes.iter().filter(|(name, _)| numbers.iter().all(|(number, _)| number != name)).collect();
    others.sort_by_key(|(name, _)| *name);
    let room = MOST_ATTRIBUTES.saturating_sub(numbers.len());
    if others.len() > room {
        let dropped: Vec<_> = others.drain(room..).map(|(name, _)| name.as_str()).collect();
        tracing::warn!("the message's copy has no room for these attributes: {}", dropped.join(", "));
    }
    let mut copied: HashMap<_, _> = others.into_iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    for (name, number) in numbers {
        let value = MessageAttributeValue::builder().data_type("Number").string_value(number.to_string()).build();
        copied.insert((*name).to_owned(), value.map_err(|error| Error::from_source(Kind::Bug, error))?);
    }
    Ok(copied)
}

async fn bounded<T, E>(
    doing: &str,
    limit: Duration,
    call: impl Future<Output = std::result::Result<T, SdkError<E>>>,
) -> Result<T>
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map_err(|error| aws::explain(error, doing)),
        Err(_) => Err(slow(doing, limit)),
    }
}

fn slow(doing: &str, limit: Duration) -> Error {
    Error::new(Kind::Unavailable, format!("no answer within {} s", limit.as_secs())).context(doing)
}

/// Whether the receipt is no longer valid, by the codes of SQS: it was deleted, its time ran out, or the total is used
/// up.
fn is_gone<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    let Some(code) = error.code() else { return false };
    let code = code.rsplit(['#', '.']).next().unwrap_or(code);
    matches!(code, "MessageNotInflight" | "ReceiptHandleIsInvalid" | "InvalidParameterValue")
}

/// SQS counts in whole seconds; a duration above zero becomes at least one.
fn whole_seconds(time: Duration) -> i32 {
    let up = time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0));
    i32::try_from(up).unwrap_or(i32::MAX)
}

/// `{"deadLetterTargetArn":"…","maxReceiveCount":"3"}`; some write the number as a number.
fn redrive(text: &str) -> Option<Redrive> {
    let policy: serde_json::Value = serde_json::from_str(text).ok()?;
    let count = &policy["maxReceiveCount"];
    let count = count.as_u64().or_else(|| count.as_str()?.parse().ok())?;
    Some(Redrive { max_receive_count: u32::try_from(count).ok()? })
}

/// The address of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    region: Option<String>,
    /// `None`: AWS's own for the region.
    endpoint: Option<String>,
}

impl Place {
    /// From a queue's URL. An AWS host names the region; any other host is itself the endpoint.
    fn of(text: &str) -> std::result::Result<Self, &'static str> {
        let url = Url::parse(text).map_err(|_| "is not a URL")?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("has credentials in it");
        }
        if url.path().trim_matches('/').is_empty() {
            return Err("names no queue");
        }
        if url.path().ends_with(".fifo") {
            return Err(
                "is a FIFO queue: use a standard one; each run's journal already keeps one writer and the order",
            );
        }
        let host = match url.host() {
            Some(Host::Domain(name)) => name.to_ascii_lowercase(),
            Some(_) => String::new(),
            None => return Err("has no host"),
        };
        match url.scheme() {
            "https" => {}
            "http" if is_loopback(&url) => {}
            "http" => return Err("is unencrypted: plain http is taken on this machine only"),
            _ => return Err("is neither https nor http"),
        }
        let origin = url.origin().ascii_serialization();
        let aws = host.strip_suffix(".amazonaws.com").or_else(|| host.strip_suffix(".amazonaws.com.cn"));
        let Some(name) = aws else { return Ok(Self { region: None, endpoint: Some(origin) }) };
        let parts: Vec<&str> = name.split('.').collect();
        Ok(match parts[..] {
            ["sqs", region] | [region, "queue"] => Self { region: Some(region.to_owned()), endpoint: None },
            ["queue"] => Self { region: Some("us-east-1".into()), endpoint: None },
            // FIPS and interface endpoints of a VPC are reached under their own names.
            ["sqs-fips", region] | [_, "sqs", region, "vpce"] => {
                Self { region: Some(region.to_owned()), endpoint: Some(origin) }
            }
            _ => Self { region: None, endpoint: Some(origin) },
        })
    }
}

/// Whether a URL leads to this machine, by address or as `localhost`.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name.eq_ignore_ascii_case("localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// A URL as it may be shown: without user and password, and without its query.
fn redacted(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else { return format!("{:?}", text.chars().take(80).collect::<String>()) };
    // These fail only on URLs that can't have them.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_reached_where_its_url_says() {
        let aws = |region: &str| Ok(Place { region: Some(region.into()), endpoint: None });
        let at = |region: Option<&str>, endpoint: &str| {
            Ok(Place { region: region.map(str::to_owned), endpoint: Some(endpoint.into()) })
        };
        for (url, place) in [
            ("https://sqs.eu-central-1.amazonaws.com/123456789012/jobs", aws("eu-central-1")),
            ("https://sqs.cn-north-1.amazonaws.com.cn/123456789012/jobs", aws("cn-north-1")),
            ("https://eu-west-1.queue.amazonaws.com/123456789012/jobs", aws("eu-west-1")),
            ("https://queue.amazonaws.com/123456789012/jobs", aws("us-east-1")),
            (
                "https://sqs-fips.us-east-1.amazonaws.com/1/jobs",
                at(Some("us-east-1"), "https://sqs-fips.us-east-1.amazonaws.com"),
            ),
            (
                "https://vpce-1.sqs.eu-west-1.vpce.amazonaws.com/1/jobs",
                at(Some("eu-west-1"), "https://vpce-1.sqs.eu-west-1.vpce.amazonaws.com"),
            ),
            ("https://mq.example.com:8443/1/jobs", at(None, "https://mq.example.com:8443")),
            ("http://127.0.0.1:4566/000000000000/jobs", at(None, "http://127.0.0.1:4566")),
            ("http://localhost:4566/000000000000/jobs", at(None, "http://localhost:4566")),
        ] {
            assert_eq!(Place::of(url), place, "{url}");
        }
        for bad in [
            "jobs",
            "https://sqs.eu-central-1.amazonaws.com/",
            "http://sqs.eu-central-1.amazonaws.com/1/jobs",
            "https://me:secret@sqs.eu-central-1.amazonaws.com/1/jobs",
            "https://sqs.eu-central-1.amazonaws.com/1/jobs.fifo",
            "ftp://127.0.0.1/1/jobs",
        ] {
            assert!(Place::of(bad).is_err(), "{bad}");
        }
        assert!(!redacted("https://me:secret@host/1/jobs?x=secret").contains("secret"));
    }

    #[test]
    fn a_redrive_policy_is_read_but_not_trusted() {
        let of = |text| redrive(text).map(|policy| policy.max_receive_count);
        assert_eq!(of(r#"{"deadLetterTargetArn":"arn:x","maxReceiveCount":"3"}"#), Some(3));
        assert_eq!(of(r#"{"deadLetterTargetArn":"arn:x","maxReceiveCount":5}"#), Some(5));
        for bad in ["", "{}", "[]", r#"{"maxReceiveCount":-1}"#, r#"{"maxReceiveCount":99999999999}"#] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_copy_never_has_more_attributes_than_sqs_takes() {
        let numbers = [("trainer-interruptions", 2), ("trainer-step", 300)];
        let text = |text: &str| {
            MessageAttributeValue::builder().data_type("String").string_value(text).build().expect("a value")
        };
        for foreign in 0..=MOST_ATTRIBUTES {
            for before in [false, true] {
                let mut attributes: HashMap<_, _> = (0..foreign).map(|n| (format!("a{n}"), text("kept"))).collect();
                if before {
                    attributes.extend(numbers.map(|(name, _)| (name.to_owned(), text("old"))));
                }
                let copied = attributes_of_copy(&attributes, &numbers).unwrap();
                assert_eq!(copied.len(), (foreign + 2).min(MOST_ATTRIBUTES), "{foreign} {before}");
                for (name, number) in numbers {
                    assert_eq!(copied[name].string_value(), Some(number.to_string().as_str()), "{foreign} {before}");
                }
                assert!(copied.values().filter(|value| value.string_value() == Some("kept")).count() == foreign.min(8));
            }
        }
    }

    #[test]
    fn seconds_are_whole_and_never_become_zero() {
        assert_eq!(whole_seconds(Duration::ZERO), 0);
        assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
        assert_eq!(whole_seconds(Duration::from_secs(5)), 5);
        assert_eq!(whole_seconds(Duration::MAX), i32::MAX);
    }
}
