//! Reports to a job API.
//!
//! `POST {JOB_API_BASE_URL}/jobs/{run id}/events`, with `Authorization: Bearer {WORKER_TOKEN}`, `Content-Type:
//! application/json` and `Idempotency-Key: {claim}-{sequence}`; the body is one [`Report`]. A message that names no run
//! is reported under its message id instead. Any 2xx means received; 408, 425, 429, 5xx and no answer at all are tried
//! again with the same key; every other status is a refusal, logged and not repeated.
//!
//! Reports leave in order, one at a time, from their own task: training never waits for them, and a failing API
//! costs log lines. Of unsent progress reports only the newest is kept; every other report is tried for ten minutes.
//! Reports still unsent when the process ends are lost: the run's journal, not the API, is the record. A crash may
//! repeat a report under another claim; `started` and `completed` may come several times for one run, and mean the same
//! each time.
//!
//! The token is held in a [`Secret`], which prints nothing; it goes into one header marked as sensitive, follows no
//! redirect, and leaves this machine over https only.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use reqwest::{
    Client,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue},
    redirect,
};
use serde::Serialize;
use tokio::{runtime::Handle, sync::watch};
use url::Url;

use super::lease::lock;
use crate::{
    cloud::{sqs::is_loopback, ssm::Secret},
    error::{Error, Kind, Result},
    ids::RunId,
};

/// The variable with the API's address.
pub const BASE_URL: &str = "JOB_API_BASE_URL";
/// The variable with its token.
pub const TOKEN: &str = "WORKER_TOKEN";
/// The limit for one request.
const REQUEST: Duration = Duration::from_secs(10);
/// How long a report may stay unreceived before it is given up.
const KEPT: Duration = Duration::from_secs(10 * 60);
/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// An event of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Its run trains on this consumer.
    Started,
    /// Its training has progressed.
    Progress,
    /// Its machine goes away, or it could not continue for now; another consumer will continue it.
    Interrupted,
    /// Its last step is committed.
    Completed,
    /// It needs a person, unless another consumer succeeds with it.
    Failed,
}

/// One report. Empty fields are left out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The event.
    pub event: Stage,
    /// The run; `None`: the message names none.
    pub run_id: Option<RunId>,
    /// The message, by the queue's id for it.
    pub message_id: String,
    /// This consumer's turn with it: a new one each time that it is received.
    pub claim: String,
    /// The number of this report within the turn, from 0.
    pub sequence: u64,
    /// When, by this machine's clock.
    pub at: Timestamp,
    /// How often the message was received, this time included.
    pub received: u32,
    /// How often its run was handed over before because its machine went away.
    pub interruptions: u64,
    /// Further facts.
    #[serde(flatten)]
    pub facts: Facts,
}

/// The facts about a run at some moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Facts {
    /// The last finished step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Steps of the whole run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_steps: Option<u64>,
    /// Loss of that step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Over that step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_s: Option<f64>,
    /// The newest step that is committed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<u64>,
    /// Steps to do again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_steps: Option<u64>,
    /// Why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The exit code that `trainer run` would have ended with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
}

/// The API.
#[derive(Debug)]
pub struct Api {
    base: Url,
    token: Secret,
    client: Client,
}

/// The meaning of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Heard,
    Again,
    Refused,
}

/// By HTTP status; `None`: no answer.
const fn verdict(status: Option<u16>) -> Verdict {
    match status {
        Some(200..=299) => Verdict::Heard,
        None | Some(408 | 425 | 429 | 500..=599) => Verdict::Again,
        Some(_) => Verdict::Refused,
    }
}

/// The pause before the next attempt, after `failed` in a row: half a second, doubled up to [`LONGEST_PAUSE`].
fn pause(failed: u32) -> Duration {
    (Duration::from_millis(250) * (1 << failed.clamp(1, 10))).min(LONGEST_PAUSE)
}

impl Api {
    /// As the variables say; `None`: no API is configured.
    ///
    /// # Errors
    /// On an address without a token, one that is no URL, and one that would send the token unencrypted.
    pub fn from(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let Some(base) = variable(BASE_URL) else { return Ok(None) };
        let wrong = |reason: &str, hint: &str| Error::new(Kind::Config, format!("{BASE_URL} {reason}")).with_hint(hint);
        let base = Url::parse(base.trim()).ok().filter(|url| url.has_host() && !url.cannot_be_a_base());
        let base = base.ok_or_else(|| wrong("is not a URL", "write it as https://host/path"))?;
        if !base.username().is_empty() || base.password().is_some() || base.query().is_some() {
            return Err(wrong("has credentials or a query in it", &format!("give the token in {TOKEN}")));
        }
        match base.scheme() {
            "https" => {}
            "http" if is_loopback(&base) => {}
            _ => return Err(wrong("is not https", "write it as https://…: the token would be readable on the way")),
        }
        let token = variable(TOKEN).map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| {
            wrong(&format!("is set, but {TOKEN} is not"), &format!("set {TOKEN}, or leave {BASE_URL} out"))
        })?;
        if HeaderValue::from_str(&token).is_err() {
            return Err(Error::new(Kind::Config, format!("{TOKEN} has characters that no HTTP header takes"))
                .with_hint(format!("set {TOKEN} to the token alone, without quotes and line breaks")));
        }
        let client = Client::builder().redirect(redirect::Policy::none()).timeout(REQUEST);
        // A proxy would answer for its own loopback.
        let client = if is_loopback(&base) { client.no_proxy() } else { client };
        let client =
            client.build().map_err(|error| Error::from_source(Kind::Bug, error).context("make HTTP client"))?;
        Ok(Some(Self { base, token: Secret::new(token), client }))
    }

    /// `{base}/jobs/{name}/events`; the name is percent-encoded.
    fn place(&self, name: &str) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(["jobs", name, "events"]);
        }
        url
    }

    /// One attempt. The error describes a failure, without secrets.
    async fn post(&self, report: &Report) -> (Verdict, String) {
        let name = report.run_id.as_ref().map_or(report.message_id.as_str(), RunId::as_str);
        let Ok(body) = serde_json::to_vec(report) else { return (Verdict::Refused, "it is no JSON".into()) };
        let Ok(mut bearer) = HeaderValue::from_str(&format!("Bearer {}", self.token.reveal())) else {
            return (Verdict::Refused, "the token fits no header".into());
        };
        bearer.set_sensitive(true);
        let key = format!("{}-{}", report.claim, report.sequence);
        let request = self.client.post(self.place(name)).header(AUTHORIZATION, bearer).header("idempotency-key", key);
        match request.header(CONTENT_TYPE, "application/json").body(body).send().await {
            // Its body is not needed, and may be of any length.
            Ok(answer) => (verdict(Some(answer.status().as_u16())), format!("status {}", answer.status().as_u16())),
            Err(error) => (verdict(None), cause(&error)),
        }
    }
}

/// The innermost cause: reqwest's own text says only that it could not send.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[derive(Debug)]
struct Waiting {
    report: Report,
    since: Instant,
    /// A request with it is under way, so it is not replaced.
    leaving: bool,
}

/// The reports still to be sent: in order; of progress the newest.
#[derive(Debug, Default)]
struct Outbox(VecDeque<Waiting>);

impl Outbox {
    fn add(&mut self, report: Report, now: Instant) {
        if let Some(last) = self.0.back()
            && (report.event, last.report.event, last.leaving) == (Stage::Progress, Stage::Progress, false)
        {
            self.0.pop_back();
        }
        self.0.push_back(Waiting { report, since: now, leaving: false });
    }

    /// The next report, which is being sent from now on; those that have waited too long are dropped and counted.
    fn next(&mut self, now: Instant) -> (Option<Report>, usize) {
        let before = self.0.len();
        while self.0.front().is_some_and(|first| now.duration_since(first.since) > KEPT) {
            self.0.pop_front();
        }
        let dropped = before - self.0.len();
        let next = self.0.front_mut().map(|first| {
            first.leaving = true;
            first.report.clone()
        });
        (next, dropped)
    }

    /// An attempt failed: the first report may be replaced by a newer one again.
    fn put_back(&mut self) {
        if let Some(first) = self.0.front_mut() {
            first.leaving = false;
        }
    }
}

/// Reports being sent. Cheap to clone, usable from any thread; without an API it accepts everything and does nothing.
#[derive(Clone, Debug)]
pub struct Reports {
    outbox: Arc<Mutex<Outbox>>,
    /// How many are waiting.
    waiting: Arc<watch::Sender<usize>>,
    heard_by: bool,
}

impl Reports {
    /// Starts the task that sends them, on `runtime`.
    pub fn start(api: Option<Api>, runtime: &Handle) -> Self {
        let reports =
            Self { outbox: Arc::default(), waiting: Arc::new(watch::Sender::new(0)), heard_by: api.is_some() };
        if let Some(api) = api {
            runtime.spawn(deliver(api, reports.clone()));
        }
        reports
    }

    /// Queues a report. Does not wait.
    pub fn send(&self, report: Report) {
        if self.heard_by {
            let mut outbox = lock(&self.outbox);
            outbox.add(report, Instant::now());
            self.waiting.send_replace(outbox.0.len());
        }
    }

    /// Waits until all are received, at most `limit`; returns how many are not.
    pub async fn flush(&self, limit: Duration) -> usize {
        let mut waiting = self.waiting.subscribe();
        let _ = tokio::time::timeout(limit, waiting.wait_for(|count| *count == 0)).await;
        *self.waiting.borrow()
    }
}

async fn deliver(api: Api, reports: Reports) {
    let mut waiting = reports.waiting.subscribe();
    let mut failed = 0;
    loop {
        if waiting.wait_for(|count| *count > 0).await.is_err() {
            return;
        }
        let (next, dropped) = {
            let mut outbox = lock(&reports.outbox);
            let next = outbox.next(Instant::now());
            reports.waiting.send_replace(outbox.0.len());
            next
        };
        if dropped > 0 {
            tracing::warn!(
                dropped,
                "job API has not accepted these reports for {} min: giving up",
                KEPT.as_secs() / 60
            );
        }
        let Some(report) = next else { continue };
        let (verdict, said) = api.post(&report).await;
        if verdict == Verdict::Again {
            failed += 1;
            // Reported once; later ones are the same.
            if failed == 1 {
                tracing::warn!(event = ?report.event, "job API does not accept reports, retrying: {said}");
            }
            lock(&reports.outbox).put_back();
            tokio::time::sleep(pause(failed)).await;
            continue;
        }
        if verdict == Verdict::Refused {
            tracing::warn!(event = ?report.event, "job API refused a report: {said}");
        } else if failed > 0 {
            tracing::info!(failed, "job API accepts reports again");
        }
        failed = 0;
        let mut outbox = lock(&reports.outbox);
        outbox.0.pop_front();
        reports.waiting.send_replace(outbox.0.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(event: Stage, sequence: u64) -> Report {
        Report {
            event,
            run_id: Some(RunId::new("r1").unwrap()),
            message_id: "m1".into(),
            claim: "c1".into(),
            sequence,
            at: Timestamp::UNIX_EPOCH,
            received: 2,
            interruptions: 1,
            facts: Facts { step: Some(12), loss: Some(5.25), ..Facts::default() },
        }
    }

    fn api(base: &str, token: &str) -> Result<Option<Api>> {
        let value = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Api::from(&|name| if name == BASE_URL { value(base) } else { value(token) })
    }

    #[test]
    fn a_report_is_an_api() {
        assert_eq!(
            serde_json::to_string(&report(Stage::Progress, 3)).unwrap(),
            r#"{"event":"progress","run_id":"r1","message_id":"m1","claim":"c1","sequence":3,"at":"1970-01-01T00:00:00Z","received":2,"interruptions":1,"step":12,"loss":5.25}"#
        );
    }

    #[test]
    fn an_address_is_taken_only_if_the_token_is_safe_there() {
        assert!(api("", "").unwrap().is_none());
        for (base, token, place) in [
            ("https://jobs.example.com", "t", "https://jobs.example.com/jobs/r1/events"),
            ("https://jobs.example.com/v1/", "t", "https://jobs.example.com/v1/jobs/r1/events"),
            ("http://127.0.0.1:80/v1", " t\n", "http://127.0.0.1/v1/jobs/r1/events"),
            ("http://[::1]:8080", "t", "http://[::1]:8080/jobs/r1/events"),
        ] {
            assert_eq!(api(base, token).unwrap().unwrap().place("r1").as_str(), place);
        }
        let odd = api("https://h", "t").unwrap().unwrap().place("../a b/?c");
        assert_eq!(odd.as_str(), "https://h/jobs/..%2Fa%20b%2F%3Fc/events");
        for (base, token) in [
            ("https://jobs.example.com", ""),
            ("https://jobs.example.com", "a\nb"),
            ("http://jobs.example.com", "t"),
            ("https://me:secret@jobs.example.com", "t"),
            ("https://jobs.example.com/?key=secret", "t"),
            ("jobs.example.com", "t"),
            ("mailto:me", "t"),
        ] {
            let error = api(base, token).unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{base}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn the_token_prints_nothing() {
        let api = api("https://jobs.example.com", "hush-hush").unwrap().unwrap();
        assert!(!format!("{api:?}{:?}", api.token).contains("hush"));
    }

    #[test]
    fn answers_fall_into_three_classes() {
        for (status, expected) in [
            (Some(200), Verdict::Heard),
            (Some(204), Verdict::Heard),
            (None, Verdict::Again),
            (Some(408), Verdict::Again),
            (Some(429), Verdict::Again),
            (Some(500), Verdict::Again),
            (Some(503), Verdict::Again),
            (Some(302), Verdict::Refused),
            (Some(401), Verdict::Refused),
            (Some(404), Verdict::Refused),
        ] {
            assert_eq!(verdict(status), expected, "{status:?}");
        }
        assert_eq!(pause(1), Duration::from_millis(500));
        assert_eq!(pause(3), Duration::from_secs(2));
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }

    #[test]
    fn only_the_newest_progress_report_waits() {
        let (mut outbox, now) = (Outbox::default(), Instant::now());
        let waiting = |outbox: &Outbox| outbox.0.iter().map(|it| it.report.sequence).collect::<Vec<_>>();
        outbox.add(report(Stage::Started, 0), now);
        outbox.add(report(Stage::Progress, 1), now);
        outbox.add(report(Stage::Progress, 2), now);
        assert_eq!(waiting(&outbox), [0, 2]);
        outbox.add(report(Stage::Interrupted, 3), now);
        outbox.add(report(Stage::Progress, 4), now);
        assert_eq!(waiting(&outbox), [0, 2, 3, 4]);
        // A report being sent is not replaced under its sender.
        let mut outbox = Outbox::default();
        outbox.add(report(Stage::Progress, 1), now);
        assert_eq!(outbox.next(now).0.unwrap().sequence, 1);
        outbox.add(report(Stage::Progress, 2), now);
        assert_eq!(waiting(&outbox), [1, 2]);
        outbox.put_back();
        outbox.add(report(Stage::Progress, 3), now);
        assert_eq!(waiting(&outbox), [1, 3]);
        let later = now + KEPT + Duration::from_secs(1);
        outbox.add(report(Stage::Completed, 4), later);
        let (next, dropped) = outbox.next(later);
        assert_eq!((next.unwrap().sequence, dropped), (4, 2));
    }
}
