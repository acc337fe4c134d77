//! Azure's Scheduled Events (<https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events>).
//!
//! The document is polled every second; its first answer may take two minutes. An event counts if its `Resources` name
//! this machine: every machine of an availability set sees the events of all. `Preempt`, `Terminate`, `Redeploy` and
//! `Reboot` are interruptions, at `NotBefore`, which is empty once they have started. A `Freeze` loses no memory: the
//! response is a save, unless it is known to be short.
//!
//! *Approval.* An event begins early if it is approved, which ends the wait for a machine that has nothing left to do.
//! It is approved only after the last step is durable, only if every resource that it names is this machine (approving
//! it starts it for all of them), and only if this process leaves because of it: a process that did not receive it, or
//! was asked to stop for another reason, leaves the rest of the time to the next process here. Not approving it costs
//! only the wait.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use serde::Deserialize;

use super::{
    poll::{LIMIT, Pace, Search, Sender, http_date, left, name, rest},
    types::{Confidence, Kind, Notice},
};
use crate::cloud::{azure::Azure, hardware, metadata::MetadataError};

/// How long the first answer may take.
const FIRST: Duration = Duration::from_secs(130);
/// How long an approval may take, and how often it is tried.
const APPROVAL: Duration = Duration::from_secs(5);
const TRIES: u32 = 2;
/// The longest announcement of any event: `Freeze` and `Reboot` 15 min, `Terminate` up to 15 min.
const LONGEST: Duration = Duration::from_secs(15 * 60);
/// A freeze shorter than this, seconds, may be ignored, according to Azure.
const SHORT: i64 = 9;
/// The most events of one document that are read.
const EVENTS: usize = 64;
const PREEMPT: &str = "azure-preempt";
const SCHEDULED: &str = "azure-scheduled";

/// The service, once it has answered, and its name for this machine.
#[derive(Debug)]
pub struct Found {
    azure: Azure,
    me: String,
}

/// Looks for the service until it answers. Never returns if it is switched off.
pub async fn find(named: bool) -> Found {
    let Some(azure) = Azure::from_environment() else { return std::future::pending().await };
    let here = hardware::maker(&hardware::root()) == hardware::Maker::Azure;
    let mut search = Search::new("azure", named, here);
    let me = loop {
        match azure.name(LIMIT).await {
            Ok(me) => break me,
            Err(error) => search.failed(&error).await,
        }
    };
    tracing::debug!(endpoint = azure.uri(), machine = me, "Azure's scheduled events are listened to");
    Found { azure, me }
}

/// The events to approve when this machine has nothing left to do.
#[derive(Debug, Default)]
pub struct Heard {
    service: Mutex<Option<(Azure, Vec<String>)>>,
    reasons: Mutex<Reasons>,
}

impl Heard {
    fn set(&self, azure: &Azure, ours: Vec<String>) {
        *lock(&self.service) = Some((azure.clone(), ours));
    }

    /// The agent was given `notice`.
    pub fn given(&self, notice: &Notice) {
        lock(&self.reasons).add(notice);
    }

    /// Approves the interruptions of this machine alone, as far as this process leaves because of them; call it only
    /// when the last step is durable.
    pub async fn release(&self) {
        let Some((azure, ours)) = lock(&self.service).take() else { return };
        let events = lock(&self.reasons).approvable(ours);
        if events.is_empty() {
            return;
        }
        for attempt in 1..=TRIES {
            match azure.start(&events, APPROVAL / TRIES).await {
                Ok(()) => {
                    tracing::info!(
                        events = events.len(),
                        "Azure may begin with what it has scheduled for this machine"
                    );
                    return;
                }
                Err(error) => tracing::debug!(%error, attempt, "scheduled event not approved"),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why this process leaves, if it does.
#[derive(Debug, Default)]
struct Reasons {
    /// Notices of events, by id.
    events: HashSet<String>,
    /// Whether something else asked it to leave.
    others: bool,
}

impl Reasons {
    fn add(&mut self, notice: &Notice) {
        match (notice.kind, notice.source) {
            (Kind::Rebalance, _) => {}
            (Kind::Interruption, PREEMPT | SCHEDULED) => {
                self.events.insert(notice.id.clone());
            }
            (Kind::Interruption | Kind::Stop, _) => self.others = true,
        }
    }

    /// Those of the scheduled events `ours` that this process may start early.
    fn approvable(&self, ours: Vec<String>) -> Vec<String> {
        ours.into_iter().filter(|event| !self.others && self.events.contains(&notice_id(event, false))).collect()
    }
}

/// An event keeps its id when it starts, but its start is news: there is no time left then.
fn notice_id(event: &str, started: bool) -> String {
    format!("{event}-{}", if started { "Started" } else { "Scheduled" })
}

/// Reports the service's notices, for ever.
pub async fn listen(found: Found, sender: Sender, heard: Arc<Heard>) {
    let Found { azure, me } = found;
    let mut pace = Pace::new(Duration::from_secs(1), Duration::from_secs(8));
    let mut limit = FIRST;
    loop {
        let outcome = azure.events(limit).await.and_then(|body| {
            let garbled = |expected| MetadataError::Garbled { path: "/metadata/scheduledevents".into(), expected };
            read(&body, &me, Timestamp::now()).map_err(garbled)
        });
        if let Ok(document) = &outcome {
            limit = 5 * LIMIT;
            document.notices.iter().cloned().for_each(|notice| sender.tell(notice));
            heard.set(&azure, document.to_approve.clone());
        }
        rest(&mut pace, "Azure's list of scheduled events", &outcome).await;
    }
}

/// The content of a document for this machine.
#[derive(Debug, Default, PartialEq, Eq)]
struct Document {
    notices: Vec<Notice>,
    /// Interruptions that have not started and concern this machine alone.
    to_approve: Vec<String>,
}

fn read(body: &str, me: &str, now: Timestamp) -> Result<Document, &'static str> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Raw {
        events: Vec<Event>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Event {
        event_id: String,
        event_type: String,
        event_status: String,
        #[serde(default)]
        resources: Vec<String>,
        #[serde(default)]
        not_before: Option<String>,
        #[serde(default)]
        duration_in_seconds: Option<i64>,
    }
    let Raw { events } = serde_json::from_str(body).map_err(|_| "a document of scheduled events")?;
    let mut document = Document::default();
    for event in events.into_iter().take(EVENTS) {
        // Names of resources are case-insensitive.
        let mine = event.resources.iter().filter(|name| name.eq_ignore_ascii_case(me)).count();
        let started = match event.event_status.as_str() {
            "Scheduled" => false,
            "Started" => true,
            _ => continue,
        };
        let id = name(&event.event_id);
        if mine == 0 || id.is_empty() || id != event.event_id {
            continue;
        }
        match event.event_type.as_str() {
            "Preempt" | "Terminate" | "Redeploy" | "Reboot" => {
                let at = event.not_before.as_deref().filter(|_| !started).and_then(http_date);
                let (deadline, confidence) = match (started, at) {
                    (true, _) => (Some(Duration::ZERO), Confidence::Certain),
                    (false, Some(at)) => (Some(left(at, now, LONGEST)), Confidence::Announced),
                    // Scheduled, but its time can't be read.
                    (false, None) => (None, Confidence::Announced),
                };
                let source = if event.event_type == "Preempt" { PREEMPT } else { SCHEDULED };
                let notice_id = notice_id(&id, started);
                if !started && mine == event.resources.len() {
                    document.to_approve.push(id);
                }
                let id = notice_id;
                document.notices.push(Notice { kind: Kind::Interruption, deadline, source, id, confidence });
            }
            "Freeze" if !(0..SHORT).contains(&event.duration_in_seconds.unwrap_or(-1)) => {
                let (kind, confidence) = (Kind::Rebalance, Confidence::Announced);
                document.notices.push(Notice { kind, deadline: None, source: "azure-freeze", id, confidence });
            }
            _ => {}
        }
    }
    Ok(document)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_read_for_this_machine_alone() {
        let now: Timestamp = "2016-09-19T18:29:17Z".parse().unwrap();
        let soon = "Mon, 19 Sep 2016 18:29:47 GMT";
        let leave = |seconds: Option<u64>| (Kind::Interruption, seconds.map(Duration::from_secs));
        let save = (Kind::Rebalance, None);
        // type, status, resources, NotBefore, duration; the notice, whether it may be approved.
        for (kind, status, resources, not_before, duration, told, approved) in [
            ("Preempt", "Scheduled", vec!["me"], soon, -1, Some(leave(Some(30))), true),
            ("Preempt", "Scheduled", vec!["ME"], soon, -1, Some(leave(Some(30))), true),
            ("Preempt", "Started", vec!["me"], "", -1, Some(leave(Some(0))), false),
            ("Terminate", "Scheduled", vec!["me", "other"], soon, -1, Some(leave(Some(30))), false),
            ("Reboot", "Scheduled", vec!["me"], "Mon, 19 Sep 2016 19:29:47 GMT", -1, Some(leave(Some(900))), true),
            ("Redeploy", "Scheduled", vec!["me"], "Mon, 19 Sep 2016 18:00:00 GMT", -1, Some(leave(Some(0))), true),
            ("Redeploy", "Scheduled", vec!["me"], "soon", -1, Some(leave(None)), true),
            ("Preempt", "Scheduled", vec!["other"], soon, -1, None, false),
            ("Preempt", "Scheduled", vec![], soon, -1, None, false),
            ("Preempt", "Completed", vec!["me"], soon, -1, None, false),
            ("Freeze", "Scheduled", vec!["me"], soon, 5, None, false),
            ("Freeze", "Scheduled", vec!["me"], soon, 9, Some(save), false),
            ("Freeze", "Scheduled", vec!["me"], soon, -1, Some(save), false),
            ("NewKind", "Scheduled", vec!["me"], soon, -1, None, false),
        ] {
            let event = json!({"EventId": "A-1", "EventType": kind, "EventStatus": status, "Resources": resources,
                               "NotBefore": not_before, "DurationInSeconds": duration,
                               "ResourceType": "VirtualMachine"});
            let body = json!({"DocumentIncarnation": 1, "Events": [event]}).to_string();
            let document = read(&body, "me", now).unwrap();
            let heard: Vec<_> = document.notices.iter().map(|notice| (notice.kind, notice.deadline)).collect();
            assert_eq!(heard, told.into_iter().collect::<Vec<_>>(), "{body}");
            assert_eq!(document.to_approve, if approved { vec!["A-1"] } else { vec![] }, "{body}");
        }
        assert_eq!(read(r#"{"DocumentIncarnation":1,"Events":[]}"#, "me", now), Ok(Document::default()));
        for body in ["", "[]", "{}", r#"{"Events":{}}"#, r#"{"Events":[{}]}"#] {
            assert!(read(body, "me", now).is_err(), "{body}");
        }
    }

    #[test]
    fn an_event_that_starts_is_news() {
        let id = |status: &str| {
            let event = json!({"EventId": "A-1", "EventType": "Reboot", "EventStatus": status, "Resources": ["me"]});
            let body = json!({"DocumentIncarnation": 1, "Events": [event]}).to_string();
            read(&body, "me", Timestamp::UNIX_EPOCH).unwrap().notices.remove(0).id
        };
        assert_eq!(id("Scheduled"), id("Scheduled"), "repeats are known by it");
        assert_ne!(id("Scheduled"), id("Started"));
    }

    #[test]
    fn what_this_process_does_not_leave_for_is_not_approved() {
        let notice = |kind, source, id: &str| {
            let confidence = Confidence::Announced;
            Notice { kind, deadline: None, source, id: id.into(), confidence }
        };
        let event = notice(Kind::Interruption, SCHEDULED, &notice_id("A-1", false));
        let started = notice(Kind::Interruption, SCHEDULED, &notice_id("A-1", true));
        let freeze = notice(Kind::Rebalance, "azure-freeze", "F-1");
        let asked = notice(Kind::Stop, "sigint", "1");
        let slurm = notice(Kind::Interruption, "sigusr1", "1");
        for (given, approved) in [
            (vec![], false),
            (vec![&event], true),
            (vec![&freeze, &event], true),
            (vec![&started], false),
            (vec![&freeze], false),
            (vec![&asked], false),
            (vec![&event, &asked], false),
            (vec![&slurm, &event], false),
        ] {
            let mut reasons = Reasons::default();
            given.iter().for_each(|notice| reasons.add(notice));
            let approvable = reasons.approvable(vec!["A-1".into(), "another".into()]);
            assert_eq!(approvable, if approved { vec!["A-1"] } else { vec![] }, "{given:?}");
        }
    }

    proptest! {
        #[test]
        fn no_document_is_too_odd(body in crate::notice::testing::odd_answer(), seconds in 0_i64..4_000_000_000) {
            if let Ok(document) = read(&body, "me", Timestamp::from_second(seconds).unwrap()) {
                prop_assert!(document.notices.len() <= EVENTS && document.to_approve.len() <= EVENTS);
                for notice in document.notices {
                    prop_assert!(notice.id.len() <= 110 && notice.deadline.is_none_or(|deadline| deadline <= LONGEST));
                }
            }
        }
    }
}
