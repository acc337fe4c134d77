//! Notices of this machine's end from AWS's instance metadata (<https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/>:
//! Spot Instance interruption notices, EC2 instance rebalance recommendations, scheduled events; Auto Scaling: target
//! lifecycle state).
//!
//! | path | interval | meaning |
//! |---|---|---|
//! | `spot/instance-action` | 1 s | interruption; two minutes at most, none with `hibernate` |
//! | `autoscaling/target-lifecycle-state` | 2 s | `Terminated`: stop, at once; the group's hook is kept waiting meanwhile |
//! | `events/recommendations/rebalance` | 5 s | save now and train on |
//! | `events/maintenance/scheduled` | 30 s | save now and train on; interruption when a stop or a reboot is at most five minutes ahead |
//!
//! Spot notices are not polled on an `on-demand` machine. A received notice stays valid even if the service withdraws
//! it: a withdrawn notice does not promise that nothing happens. A spot interruption is identified by its action alone,
//! because some services count its time from the request.
//!
//! Maintenance whose time had passed when this process first heard of it only asks for a save: otherwise a machine that
//! waits for its reboot would drain again with every start, for hours. The reboot itself comes with SIGTERM.
//!
//! With a lifecycle hook (see [`crate::cloud::lifecycle`]) the hook is kept waiting from the moment at which the end
//! was announced, and is completed when the run's last record is written. A crash in between leaves it to its time-out.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use serde::Deserialize;
use tokio::{sync::watch, time::timeout};

use super::{
    poll::{LIMIT, Pace, Search, Sender, http_date, left, name, rest},
    types::{Confidence, Kind, Notice},
};
use crate::cloud::{hardware, imds::Imds, lifecycle::Lifecycle, metadata::MetadataError};
use crate::env;

const LIFE_CYCLE: &str = "/latest/meta-data/instance-life-cycle";
const SPOT: &str = "/latest/meta-data/spot/instance-action";
const REBALANCE: &str = "/latest/meta-data/events/recommendations/rebalance";
const TARGET: &str = "/latest/meta-data/autoscaling/target-lifecycle-state";
const MAINTENANCE: &str = "/latest/meta-data/events/maintenance/scheduled";

/// The longest announcement of a spot interruption.
const SPOT_NOTICE: Duration = Duration::from_secs(120);
/// Maintenance closer than this is a reason to leave.
const NEAR: Duration = Duration::from_secs(300);
/// The most events of one list that are read.
const EVENTS: usize = 32;
/// The interval between two heartbeats of a hook whose time-out is not known; the shortest time-out is 30 s.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// The interval between two searches for the hook once the end is announced: this process may end soon.
const HURRY: Duration = Duration::from_secs(1);

/// The service, once it has answered.
#[derive(Debug)]
pub struct Found {
    imds: Imds,
    /// Whether the machine can be taken at any time.
    spot: bool,
}

/// Looks for the service until it answers. Never returns if it is switched off.
pub async fn find(named: bool) -> Found {
    let Some(imds) = Imds::from_environment() else { return std::future::pending().await };
    let here = hardware::maker(&hardware::root()) == hardware::Maker::Amazon;
    let mut search = Search::new("aws", named, here);
    let life_cycle = loop {
        match imds.get(LIFE_CYCLE, LIMIT).await {
            Ok(life_cycle) => break life_cycle,
            Err(error) => search.failed(&error).await,
        }
    };
    // "spot", "on-demand", "capacity-block", …: only on-demand machines are known to stay.
    let spot = life_cycle.as_deref().map(str::trim) != Some("on-demand");
    tracing::debug!(endpoint = imds.uri(), life_cycle, "listening to AWS's metadata service");
    Found { imds, spot }
}

/// The state of this machine in its Auto Scaling group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// In no group, as far as known.
    #[default]
    Outside,
    /// The group keeps it.
    Member,
    /// The group ends it.
    Leaving,
}

/// What must happen after this machine's group has announced its end.
#[derive(Debug, Default)]
pub struct Ending {
    standing: watch::Sender<Standing>,
    /// The hook that delays its end; outer `None`: not known yet.
    hook: watch::Sender<Option<Option<Arc<Lifecycle>>>>,
}

impl Ending {
    /// Lets the machine go, if its group waits for that. The search for its hook may still be running: a node that has
    /// nothing to save is ready to leave at once, and otherwise the machine would idle, at a cost, until the time-out.
    /// The caller bounds the wait.
    pub async fn release(&self) {
        if *self.standing.borrow() != Standing::Leaving {
            return;
        }
        let mut hook = self.hook.subscribe();
        let known = hook.wait_for(Option::is_some).await.ok().and_then(|known| known.clone().flatten());
        let Some(hook) = known else { return };
        match hook.complete().await {
            Ok(()) => tracing::info!("lifecycle hook {} is completed", hook.name()),
            // The wait ends by itself at its time-out.
            Err(error) => tracing::warn!(%error, "could not complete the lifecycle hook; it will time out"),
        }
    }
}

/// Reports the service's notices, for ever.
pub async fn listen(found: Found, sender: Sender, ending: Arc<Ending>, hook: String) {
    let Found { imds, spot } = found;
    let second = Duration::from_secs(1);
    let spot = async {
        if spot {
            let pace = Pace::new(second, 8 * second);
            watch_path(&imds, SPOT, pace, &sender, |body| Ok(vec![spot_action(body, Timestamp::now())?])).await;
        }
    };
    let rebalance = watch_path(&imds, REBALANCE, Pace::new(5 * second, 40 * second), &sender, |body| {
        Ok(vec![recommendation(body)?])
    });
    let mut first = None;
    let maintenance = watch_path(&imds, MAINTENANCE, Pace::new(30 * second, 120 * second), &sender, |body| {
        let now = Timestamp::now();
        scheduled(body, now, *first.get_or_insert(now))
    });
    let target = target(&imds, &sender, &ending);
    let hold = hold(&imds, &ending, &hook);
    futures::join!(spot, rebalance, maintenance, target, hold);
}

/// The content of an answer, or a description of the expected one.
type Read<T> = Result<T, &'static str>;

/// Polls one path and reports the notices that `read` finds in the answers.
async fn watch_path(
    imds: &Imds,
    path: &'static str,
    mut pace: Pace,
    sender: &Sender,
    mut read: impl FnMut(&str) -> Read<Vec<Notice>>,
) {
    loop {
        let outcome = imds.get(path, LIMIT).await.and_then(|body| match body {
            None => Ok(()),
            Some(body) => {
                let garbled = |expected| MetadataError::Garbled { path: path.to_owned(), expected };
                read(&body).map_err(garbled)?.into_iter().for_each(|notice| sender.tell(notice));
                Ok(())
            }
        });
        rest(&mut pace, path, &outcome).await;
    }
}

/// Polls for the state that the group is taking this machine to.
async fn target(imds: &Imds, sender: &Sender, ending: &Ending) {
    let mut pace = Pace::new(Duration::from_secs(2), Duration::from_secs(16));
    loop {
        let outcome = imds.get(TARGET, LIMIT).await;
        if let Ok(Some(state)) = &outcome
            && is_end(state)
        {
            // The hook decides how much time there is; it is usually known by now.
            let mut hook = ending.hook.subscribe();
            ending.standing.send_replace(Standing::Leaving);
            let known = timeout(LIMIT, hook.wait_for(Option::is_some)).await;
            let hook = known.ok().and_then(|hook| hook.ok()?.clone().flatten());
            // The group waits for this machine, and pays for it, often while its replacement already runs. The hook is
            // kept waiting: its time-out is no reason to give up a save.
            let confidence = Confidence::Advisory;
            let deadline = hook.and_then(|hook| hook.timeout());
            sender.tell(Notice { confidence, ..notice(Kind::Stop, deadline, "aws-asg", "Terminated") });
        } else if matches!(&outcome, Ok(Some(state)) if !state.trim().is_empty()) {
            // The machine is in a group: now is the time to find the hook that will delay its end. An announced end is
            // final.
            ending.standing.send_if_modified(|standing| {
                let news = *standing == Standing::Outside;
                if news {
                    *standing = Standing::Member;
                }
                news
            });
        }
        rest(&mut pace, TARGET, &outcome).await;
    }
}

/// Finds the hook once the group acts on this machine, and keeps it waiting once the end is announced.
async fn hold(imds: &Imds, ending: &Ending, configured: &str) {
    let mut standing = ending.standing.subscribe();
    if standing.wait_for(|standing| *standing != Standing::Outside).await.is_err() {
        return;
    }
    let variable = |name: &str| env::text(name);
    let mut pace = Pace::new(Duration::from_secs(1), Duration::from_secs(60));
    let hook = loop {
        match Lifecycle::find(imds, configured, &variable).await {
            Ok(hook) => break hook.map(Arc::new),
            Err(error) => {
                if !pace.is_failing() {
                    tracing::warn!(%error, hint = error.hint(), "can't find the hook that delays this machine's end: \
                        the group will not wait for the last save");
                }
                // An announced end ends the pause.
                let leaving = standing.wait_for(|standing| *standing == Standing::Leaving);
                let hurry = timeout(pace.failed(), leaving).await.is_ok();
                if hurry {
                    tokio::time::sleep(HURRY).await;
                }
            }
        }
    };
    tracing::debug!(hook = hook.as_ref().map(|hook| hook.name()), "lifecycle hook at the end of this machine");
    ending.hook.send_replace(Some(hook.clone()));
    let Some(hook) = hook else { return };
    if standing.wait_for(|standing| *standing == Standing::Leaving).await.is_err() {
        return;
    }
    let every = hook.timeout().map_or(HEARTBEAT, |timeout| timeout / 3);
    let mut pace = Pace::new(every, every);
    loop {
        let pause = match hook.heartbeat().await {
            Ok(()) => pace.answered(),
            Err(error) => {
                tracing::debug!(%error, "the lifecycle hook was not kept waiting");
                pace.failed().min(HEARTBEAT)
            }
        };
        tokio::time::sleep(pause).await;
    }
}

fn notice(kind: Kind, deadline: Option<Duration>, source: &'static str, id: impl Into<String>) -> Notice {
    let confidence = match kind {
        Kind::Rebalance => Confidence::Advisory,
        Kind::Interruption | Kind::Stop => Confidence::Announced,
    };
    Notice { kind, deadline, source, id: id.into(), confidence }
}

fn is_end(target_state: &str) -> bool {
    target_state.trim() == "Terminated"
}

/// Reads `spot/instance-action`. The action counts even if its time has passed or can't be read.
fn spot_action(body: &str, now: Timestamp) -> Read<Notice> {
    #[derive(Deserialize)]
    struct Action {
        action: String,
        #[serde(default)]
        time: serde_json::Value,
    }
    const EXPECTED: &str = "a spot instance action";
    let Action { action, time } = serde_json::from_str(body).map_err(|_| EXPECTED)?;
    let at: Option<Timestamp> = time.as_str().and_then(|time| time.parse().ok());
    let deadline = match action.as_str() {
        // Hibernation begins with its notice.
        "hibernate" => Duration::ZERO,
        "terminate" | "stop" => at.map_or(SPOT_NOTICE, |at| left(at, now, SPOT_NOTICE)),
        _ => return Err(EXPECTED),
    };
    Ok(notice(Kind::Interruption, Some(deadline), "aws-spot", action))
}

/// Reads `events/recommendations/rebalance`.
fn recommendation(body: &str) -> Read<Notice> {
    #[derive(Deserialize)]
    struct Recommendation {
        #[serde(rename = "noticeTime")]
        notice_time: String,
    }
    let Recommendation { notice_time } = serde_json::from_str(body).map_err(|_| "a rebalance recommendation")?;
    Ok(notice(Kind::Rebalance, None, "aws-rebalance", name(&notice_time)))
}

/// Reads `events/maintenance/scheduled`. `first`: when this process got its first answer.
fn scheduled(body: &str, now: Timestamp, first: Timestamp) -> Read<Vec<Notice>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Event {
        #[serde(default)]
        event_id: String,
        #[serde(default)]
        code: String,
        #[serde(default)]
        state: String,
        #[serde(default)]
        not_before: String,
    }
    let events: Vec<Event> = serde_json::from_str(body).map_err(|_| "a list of scheduled events")?;
    let mut notices = Vec::new();
    for event in events.into_iter().filter(|event| event.state == "active").take(EVENTS) {
        let id = if event.event_id.is_empty() { name(&event.code) } else { name(&event.event_id) };
        let ends =
            ["instance-stop", "instance-retirement", "instance-reboot", "system-reboot"].contains(&event.code.as_str());
        let at = http_date(&event.not_before);
        let ahead = at.filter(|at| *at > first).map(|at| left(at, now, Duration::MAX));
        match ahead {
            Some(ahead) if ends && ahead <= NEAR => {
                notices.push(notice(Kind::Interruption, Some(ahead), "aws-maintenance", id));
            }
            // Network or power, a time that is distant, past or unreadable, or an unknown code.
            _ => notices.push(notice(Kind::Rebalance, None, "aws-maintenance-ahead", id)),
        }
    }
    Ok(notices)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn spot_actions_count_whatever_their_time() {
        let now = at("2017-09-18T08:20:30Z");
        for (body, id, seconds) in [
            (r#"{"action":"terminate","time":"2017-09-18T08:22:00Z"}"#, "terminate", 90),
            (r#"{"action": "stop", "time": "2017-09-18T08:22:30Z", "more": 1}"#, "stop", 120),
            (r#"{"action":"terminate","time":"2017-09-18T09:22:00Z"}"#, "terminate", 120),
            (r#"{"action":"terminate","time":"2017-09-18T08:00:00Z"}"#, "terminate", 0),
            (r#"{"action":"hibernate","time":"2017-09-18T08:22:00Z"}"#, "hibernate", 0),
            (r#"{"action":"terminate","time":"tomorrow"}"#, "terminate", 120),
            (r#"{"action":"terminate","time":17}"#, "terminate", 120),
            (r#"{"action":"terminate"}"#, "terminate", 120),
        ] {
            let read = spot_action(body, now).unwrap();
            assert_eq!(read, notice(Kind::Interruption, Some(Duration::from_secs(seconds)), "aws-spot", id), "{body}");
            assert_eq!(read.confidence, Confidence::Announced);
        }
        for body in ["", "terminate", "{}", "[]", r#"{"action":"none"}"#, r#"{"action":1,"time":"x"}"#, "<html>"] {
            assert!(spot_action(body, now).is_err(), "{body}");
        }
    }

    #[test]
    fn a_moving_time_is_no_new_notice() {
        let body = |time: &str| format!(r#"{{"action":"terminate","time":"{time}"}}"#);
        let first = spot_action(&body("2017-09-18T08:22:00Z"), at("2017-09-18T08:20:00Z")).unwrap();
        let second = spot_action(&body("2017-09-18T08:22:05Z"), at("2017-09-18T08:20:05Z")).unwrap();
        assert_eq!(first.id, second.id);
    }

    #[test]
    fn only_terminating_states_mean_the_end() {
        for (state, end) in [
            ("Terminated", true),
            ("Terminated\n", true),
            ("InService", false),
            ("", false),
            ("Warmed:Terminated", false),
            ("Detached", false),
            ("Standby", false),
        ] {
            assert_eq!(is_end(state), end, "{state:?}");
        }
    }

    #[test]
    fn the_agent_leaves_for_maintenance_only_when_it_is_near() {
        let now = at("2026-01-21T09:00:00Z");
        let earlier = at("2026-01-21T08:00:00Z");
        let event = |id: &str, code: &str, state: &str, not_before: &str| {
            format!(
                r#"{{"NotBefore":"{not_before}","Code":"{code}","Description":"","EventId":"{id}","State":"{state}"}}"#
            )
        };
        let leave = |seconds| notice(Kind::Interruption, Some(Duration::from_secs(seconds)), "aws-maintenance", "e");
        let save = notice(Kind::Rebalance, None, "aws-maintenance-ahead", "e");
        assert_eq!(save.confidence, Confidence::Advisory);
        for (code, state, not_before, first, wanted) in [
            ("system-reboot", "active", "21 Jan 2026 09:04:00 GMT", earlier, Some(leave(240))),
            ("instance-reboot", "active", "21 Jan 2026 09:05:00 GMT", earlier, Some(leave(300))),
            ("instance-stop", "active", "21 Jan 2026 08:59:00 GMT", earlier, Some(leave(0))),
            ("instance-retirement", "active", "21 Jan 2026 09:05:01 GMT", earlier, Some(save.clone())),
            ("instance-stop", "active", "1 Feb 2026 09:00:00 GMT", earlier, Some(save.clone())),
            ("instance-stop", "active", "21 Jan 2026 08:59:00 GMT", now, Some(save.clone())),
            ("instance-stop", "active", "soon", earlier, Some(save.clone())),
            ("system-maintenance", "active", "21 Jan 2026 09:01:00 GMT", earlier, Some(save.clone())),
            ("new-code", "active", "21 Jan 2026 09:01:00 GMT", earlier, Some(save)),
            ("system-reboot", "completed", "21 Jan 2026 09:01:00 GMT", earlier, None),
            ("system-reboot", "canceled", "21 Jan 2026 09:01:00 GMT", earlier, None),
        ] {
            let body = format!("[{}]", event("e", code, state, not_before));
            let read = scheduled(&body, now, first).unwrap();
            assert_eq!(read, wanted.into_iter().collect::<Vec<_>>(), "{code} {state} {not_before}");
        }
        assert_eq!(scheduled("[]", now, now), Ok(vec![]));
        assert!(scheduled("{}", now, now).is_err() && scheduled("", now, now).is_err());
        let many = vec![event("e", "system-reboot", "active", "soon"); 1000].join(",");
        assert_eq!(scheduled(&format!("[{many}]"), now, now).unwrap().len(), EVENTS);
    }

    #[test]
    fn a_recommendation_is_identified_by_its_time() {
        let read = recommendation(r#"{"noticeTime":"2020-10-27T08:22:00Z"}"#).unwrap();
        assert_eq!(read, notice(Kind::Rebalance, None, "aws-rebalance", "2020-10-27T08:22:00Z"));
        assert!(recommendation("{}").is_err() && recommendation("2020-10-27T08:22:00Z").is_err());
    }

    fn holds(notice: &Notice) -> bool {
        notice.id.len() <= 100 && notice.deadline.is_none_or(|deadline| deadline <= NEAR)
    }

    proptest! {
        #[test]
        fn no_answer_is_too_odd(body in crate::notice::testing::odd_answer(), seconds in 0_i64..4_000_000_000) {
            let now = Timestamp::from_second(seconds).unwrap();
            prop_assert!(spot_action(&body, now).is_ok_and(|n| holds(&n)) || spot_action(&body, now).is_err());
            prop_assert!(recommendation(&body).map_or(true, |n| holds(&n)));
            prop_assert!(scheduled(&body, now, now).map_or(true, |all| all.len() <= EVENTS && all.iter().all(holds)));
            is_end(&body);
        }
    }
}
