//! Notices of this machine's end from Compute Engine's metadata server
//! (<https://cloud.google.com/compute/docs/instances/spot>,
//! <https://cloud.google.com/compute/docs/gpus/gpu-host-maintenance>).
//!
//! - `instance/preempted` `TRUE`: interruption. The time left is 30 s, unless the machine was created with
//!   `--preemption-notice-duration`, which the server does not report: `notice.preemption_window` does.
//! - `instance/maintenance-event` `TERMINATE_ON_HOST_MAINTENANCE`: interruption. A machine with GPUs gets an hour's
//!   notice, others a minute; the answer does not say which, so a minute is assumed. If the value was already there
//!   when this process began, the process was started in that hour: it saves now and trains on, since it would
//!   otherwise drain again with every start. If the server is first asked later than a minute after the beginning, the
//!   value counts as new. `MIGRATE_ON_HOST_MAINTENANCE` costs a pause: nothing is lost.
//!
//! Each value is first read once, then with requests that wait for a change from the last value.

use std::time::Duration;

use super::{
    poll::{LIMIT, Pace, Search, Sender, rest, running_for},
    types::{Confidence, Kind, Notice},
};
use crate::cloud::{
    gcp::{Gcp, Value},
    hardware,
    metadata::MetadataError,
};

const ID: &str = "/instance/id";
const PREEMPTED: &str = "/instance/preempted";
const MAINTENANCE: &str = "/instance/maintenance-event";
/// How long one request waits for a change.
const PATIENCE: Duration = Duration::from_secs(60);
/// The assumed time between the announcement of maintenance and its beginning.
const MAINTENANCE_NOTICE: Duration = Duration::from_secs(60);

/// Looks for the server until it answers. Never returns if it is switched off.
pub async fn find(named: bool) -> Gcp {
    let Some(gcp) = Gcp::from_environment() else { return std::future::pending().await };
    let here = hardware::maker(&hardware::root()) == hardware::Maker::Google;
    let mut search = Search::new("gcp", named, here);
    loop {
        match gcp.get(ID, LIMIT).await {
            Ok(Some(_)) => break,
            Ok(None) => search.failed(&MetadataError::Status { status: 404, path: ID.to_owned() }).await,
            Err(error) => search.failed(&error).await,
        }
    }
    tracing::debug!(endpoint = gcp.uri(), "GCP's metadata server is listened to");
    gcp
}

/// Reports the server's notices, for ever. `window`: the time left after a preemption notice.
pub async fn listen(gcp: Gcp, sender: Sender, window: Duration) {
    let preempted = watch_path(&gcp, PREEMPTED, &sender, |text, _| preempted(text, window));
    let maintenance = watch_path(&gcp, MAINTENANCE, &sender, maintenance);
    futures::join!(preempted, maintenance);
}

/// `read` gets an answer and whether it has been the same since the first one.
async fn watch_path(gcp: &Gcp, path: &'static str, sender: &Sender, read: impl Fn(&str, bool) -> Option<Notice>) {
    // The pause after an answer bounds the cost of a server that answers at once although nothing has changed.
    let mut pace = Pace::new(Duration::from_secs(1), Duration::from_secs(8));
    let mut tag: Option<String> = None;
    let mut standing = Standing::of_process(running_for());
    loop {
        let outcome = match &tag {
            Some(tag) => gcp.next(path, tag, PATIENCE, PATIENCE + LIMIT).await,
            None => gcp.get(path, LIMIT).await,
        };
        if let Ok(Some(Value { text, .. })) = &outcome
            && let Some(notice) = read(text, standing.since_the_first(text))
        {
            sender.tell(notice);
        }
        // After a failure without waiting: a missed change is heard without waiting for another one.
        tag = outcome.as_ref().ok().and_then(|value| value.as_ref()?.tag.clone());
        rest(&mut pace, path, &outcome).await;
    }
}

/// The value that was there when this process began, until it changes.
#[derive(Debug)]
struct Standing {
    first: Option<String>,
    changed: bool,
}

impl Standing {
    /// For a process that has run for `run` before its first request. If that is too long, the first value may be new,
    /// and the end near.
    fn of_process(run: Duration) -> Self {
        Self { first: None, changed: run > MAINTENANCE_NOTICE }
    }

    fn since_the_first(&mut self, text: &str) -> bool {
        self.changed |= self.first.get_or_insert_with(|| text.to_owned()) != text;
        !self.changed
    }
}

fn preempted(text: &str, window: Duration) -> Option<Notice> {
    text.eq_ignore_ascii_case("true").then(|| Notice {
        kind: Kind::Interruption,
        deadline: Some(window),
        source: "gcp-preempted",
        id: "preempted".into(),
        confidence: Confidence::Certain,
    })
}

fn maintenance(text: &str, since_the_first: bool) -> Option<Notice> {
    let (kind, deadline, source, confidence) = match (text, since_the_first) {
        ("TERMINATE_ON_HOST_MAINTENANCE", false) => {
            (Kind::Interruption, Some(MAINTENANCE_NOTICE), "gcp-maintenance", Confidence::Announced)
        }
        ("TERMINATE_ON_HOST_MAINTENANCE", true) => {
            (Kind::Rebalance, None, "gcp-maintenance-ahead", Confidence::Announced)
        }
        _ => return None,
    };
    Some(Notice { kind, deadline, source, id: "maintenance".into(), confidence })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stood_there_stands_there_until_it_changes() {
        let mut standing = Standing::of_process(Duration::from_secs(5));
        let seen = ["A", "A", "B", "A", "A"].map(|text| standing.since_the_first(text));
        assert_eq!(seen, [true, true, false, false, false], "an answer that comes again after a minute is no change");
    }

    #[test]
    fn what_is_first_asked_for_late_is_news() {
        let mut standing = Standing::of_process(Duration::from_secs(300));
        assert_eq!(["A", "A"].map(|text| standing.since_the_first(text)), [false, false]);
    }

    #[test]
    fn values_are_read_as_documented() {
        let window = Duration::from_secs(150);
        for (text, heard) in
            [("TRUE", true), ("true", true), ("FALSE", false), ("", false), ("TRUE?", false), ("1", false)]
        {
            let read = preempted(text, window);
            assert_eq!(read.is_some(), heard, "{text:?}");
            if let Some(notice) = read {
                assert_eq!((notice.kind, notice.deadline), (Kind::Interruption, Some(window)));
            }
        }
        for (text, first, kind) in [
            ("TERMINATE_ON_HOST_MAINTENANCE", false, Some(Kind::Interruption)),
            ("TERMINATE_ON_HOST_MAINTENANCE", true, Some(Kind::Rebalance)),
            ("MIGRATE_ON_HOST_MAINTENANCE", false, None),
            ("NONE", false, None),
            ("NONE", true, None),
            ("", true, None),
        ] {
            assert_eq!(maintenance(text, first).map(|notice| notice.kind), kind, "{text:?}");
        }
    }
}
