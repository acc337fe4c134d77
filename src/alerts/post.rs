//! Where alerts go, and how.

use std::{fmt, str::FromStr, time::Duration};

use jiff::Timestamp;
use reqwest::{
    Client,
    header::{CONTENT_TYPE, HeaderValue},
    redirect,
};
use serde_json::json;
use url::Url;

use super::watch::Alert;
use crate::cloud::{sns, sqs::is_loopback, ssm::Secret};

/// The limit for one request.
const REQUEST: Duration = Duration::from_secs(10);
/// Requests for one alert.
const TRIES: u32 = 5;
/// The pause after the first one that fails; it doubles.
const PAUSE: Duration = Duration::from_secs(1);
/// The most characters of a text: Discord takes 2,000.
const LONGEST: usize = 1_900;

/// What a receiver understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// The alert, as JSON.
    Json,
    /// A message to a Slack channel.
    Slack,
    /// A message to a Discord channel.
    Discord,
}

/// A place that takes alerts. Its address may be a secret, as Slack's and Discord's are: nothing prints it.
#[derive(Clone)]
pub enum Receiver {
    /// A web hook.
    Hook(Hook),
    /// An SNS topic, by its ARN.
    Topic(String),
}

/// A web hook.
#[derive(Clone)]
pub struct Hook {
    url: Secret,
    host: String,
    local: bool,
    shape: Shape,
}

/// `https`, or `http` to this machine.
fn safe(text: &str) -> Result<Url, String> {
    let url = Url::parse(text.trim()).ok().filter(|url| url.has_host());
    let url = url.ok_or("expected a URL such as https://host/path")?;
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_loopback(&url) => Ok(url),
        _ => Err("expected https: the address may be a secret, and would be readable on the way".to_owned()),
    }
}

impl FromStr for Hook {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (named, address) = match text.split_once(':') {
            Some(("slack", rest)) => (Some(Shape::Slack), rest),
            Some(("discord", rest)) => (Some(Shape::Discord), rest),
            Some(("json", rest)) => (Some(Shape::Json), rest),
            _ => (None, text),
        };
        let url = safe(address)?;
        let host = url.host_str().unwrap_or_default().to_owned();
        let shape = named.unwrap_or(match host.as_str() {
            "hooks.slack.com" => Shape::Slack,
            "discord.com" | "discordapp.com" => Shape::Discord,
            _ => Shape::Json,
        });
        Ok(Self { local: is_loopback(&url), url: Secret::new(url.to_string()), host, shape })
    }
}

impl FromStr for Receiver {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.starts_with("arn:") {
            let known = sns::region_of(text).map(|_| Self::Topic(text.to_owned()));
            return known.ok_or_else(|| {
                "expected the ARN of an SNS topic, such as arn:aws:sns:us-east-1:123456789012:alarms".into()
            });
        }
        text.parse().map(Self::Hook)
    }
}

impl fmt::Display for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hook(hook) => write!(f, "{hook}"),
            Self::Topic(arn) => write!(f, "{arn}"),
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.host)
    }
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Receiver({self})")
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hook({self})")
    }
}

/// The whole text for a person.
fn text(alert: &Alert) -> String {
    let run = alert.run_id.as_ref().map_or_else(|| "trainer".to_owned(), |run_id| format!("run {run_id}"));
    let text = format!("{run}: {}", alert.message);
    text.chars().take(LONGEST).collect()
}

fn body(shape: Shape, alert: &Alert, at: Timestamp) -> String {
    match shape {
        Shape::Json => json!({"version": 1, "alert": alert.alert, "run_id": alert.run_id, "step": alert.step,
                              "message": alert.message, "at": at})
        .to_string(),
        // Slack reads <, > and & as its own marks.
        Shape::Slack => {
            let text = text(alert).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            json!({ "text": text }).to_string()
        }
        // A message that mentions nobody, whatever a reason says.
        Shape::Discord => json!({"content": text(alert), "allowed_mentions": {"parse": []}}).to_string(),
    }
}

/// The meaning of an answer.
enum Verdict {
    Taken,
    Again(String),
    Refused(String),
}

impl Hook {
    fn client(&self) -> Result<Client, String> {
        let client = Client::builder().redirect(redirect::Policy::none()).timeout(REQUEST);
        // A proxy would answer for its own loopback.
        let client = if self.local { client.no_proxy() } else { client };
        client.build().map_err(|error| error.to_string())
    }

    /// Asks for the address, so that its service knows that the run goes on.
    pub async fn ping(&self) -> Result<(), String> {
        match answer(self.client()?.get(self.url.reveal())).await {
            Verdict::Taken => Ok(()),
            Verdict::Again(why) | Verdict::Refused(why) => Err(why),
        }
    }

    async fn post(&self, alert: &Alert, at: Timestamp) -> Verdict {
        let client = match self.client() {
            Ok(client) => client,
            Err(why) => return Verdict::Refused(why),
        };
        let request = client.post(self.url.reveal()).header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        answer(request.body(body(self.shape, alert, at))).await
    }
}

async fn answer(request: reqwest::RequestBuilder) -> Verdict {
    match request.send().await.map(|answer| answer.status().as_u16()) {
        Ok(200..=299) => Verdict::Taken,
        Ok(status @ (408 | 425 | 429 | 500..=599)) => Verdict::Again(format!("status {status}")),
        Ok(status) => Verdict::Refused(format!("status {status}")),
        // The address is in the error's own text.
        Err(error) => Verdict::Again(error.without_url().to_string()),
    }
}

async fn publish(arn: &str, alert: &Alert) -> Verdict {
    let cause = serde_json::to_value(alert.alert).unwrap_or_default();
    let subject = format!("trainer: {}", cause.as_str().unwrap_or("alert"));
    match sns::publish(arn, &subject, &text(alert)).await {
        Ok(()) => Verdict::Taken,
        // The SDK has tried again already.
        Err(why) => Verdict::Refused(why),
    }
}

/// Delivers an alert, or says in the log why it could not.
pub async fn deliver(receiver: Receiver, alert: Alert, at: Timestamp) {
    let mut pause = PAUSE;
    for attempt in 1..=TRIES {
        let verdict = match &receiver {
            Receiver::Hook(hook) => hook.post(&alert, at).await,
            Receiver::Topic(arn) => publish(arn, &alert).await,
        };
        match verdict {
            Verdict::Taken => return,
            Verdict::Again(_) if attempt < TRIES => {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            Verdict::Again(why) | Verdict::Refused(why) => {
                tracing::warn!(alert = ?alert.alert, "{receiver} has not taken an alert: {why}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::watch::Cause, *};
    use crate::ids::{RunId, Step};

    fn alert(message: &str) -> Alert {
        let run_id = Some(RunId::new("first").unwrap());
        Alert { alert: Cause::Failed, run_id, step: Some(Step(7)), message: message.into() }
    }

    #[test]
    fn receivers_are_known_by_their_address_and_print_no_secret() {
        let hook = |text: &str| match text.parse::<Receiver>().unwrap() {
            Receiver::Hook(hook) => hook,
            Receiver::Topic(arn) => panic!("{arn}"),
        };
        for (text, shape) in [
            ("https://hooks.slack.com/services/T0/B0/hush", Shape::Slack),
            ("https://discord.com/api/webhooks/1/hush", Shape::Discord),
            ("https://example.com/hush?token=hush", Shape::Json),
            ("slack:http://127.0.0.1:80/hush", Shape::Slack),
            ("json:https://discord.com/hush", Shape::Json),
        ] {
            let hook = hook(text);
            assert_eq!(hook.shape, shape, "{text}");
            assert!(!format!("{hook:?}{hook}").contains("hush"), "{hook:?}");
        }
        let topic: Receiver = "arn:aws:sns:us-east-1:123456789012:alarms".parse().unwrap();
        assert_eq!(topic.to_string(), "arn:aws:sns:us-east-1:123456789012:alarms");
        for bad in ["", "http://example.com/hush", "arn:aws:sqs:us-east-1:1:q", "arn:aws:sns:us-east-1::a", "hush"] {
            let error = bad.parse::<Receiver>().unwrap_err();
            assert!(error.starts_with("expected") && !error.contains("hush"), "{error}");
        }
    }

    #[test]
    fn each_receiver_gets_the_shape_that_it_reads() {
        let alert = alert("loss is <NaN> & @everyone");
        let at = Timestamp::UNIX_EPOCH;
        assert_eq!(
            body(Shape::Json, &alert, at),
            concat!(
                r#"{"alert":"failed","at":"1970-01-01T00:00:00Z","message":"loss is <NaN> & @everyone","#,
                r#""run_id":"first","step":7,"version":1}"#
            )
        );
        assert_eq!(body(Shape::Slack, &alert, at), r#"{"text":"run first: loss is &lt;NaN&gt; &amp; @everyone"}"#);
        assert_eq!(
            body(Shape::Discord, &alert, at),
            r#"{"allowed_mentions":{"parse":[]},"content":"run first: loss is <NaN> & @everyone"}"#
        );
        assert_eq!(text(&super::tests::alert(&"é".repeat(9_000))).chars().count(), LONGEST);
    }
}
