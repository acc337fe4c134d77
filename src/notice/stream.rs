//! All sources as one stream: which are polled, and which of their notices are news.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::Instant,
};

use super::{
    aws, azure, drain, file, gcp,
    poll::{Sender, running_for},
    signal::Signals,
    types::{Kind, Notice},
    window::{Surroundings, Windows, windows},
};
use crate::{config::NoticeConfig, env, ids::Generation, storage::Store};

/// How long requests to a generation that this node has left behind are looked for: their sender has first read the
/// journal and a heartbeat.
const LATE: Duration = Duration::from_secs(60);
/// The most generations, beside this node's own, for which they are looked for: each costs a request every few seconds.
const MOST_LATE: usize = 8;
/// The limit for informing the parties that wait for this node.
const RELEASE: Duration = Duration::from_secs(15);
/// Advice from one source is not news again within this time, whatever its id.
const ADVICE: Duration = Duration::from_secs(600);
/// The most notices of one source in one process; a source that sends more is ignored.
const MOST: usize = 64;

/// All sources as one stream.
#[derive(Debug)]
pub struct Notices {
    signals: Signals,
    sender: Sender,
    receiver: mpsc::Receiver<(Instant, Notice)>,
    known: Given,
    settings: Option<NoticeConfig>,
    polls: JoinSet<()>,
    drain: JoinSet<()>,
    /// The generation that this node trains in, and the task that watches for requests to it.
    held: Option<(Generation, AbortHandle)>,
    ending: Arc<aws::Ending>,
    approval: Arc<azure::Heard>,
    /// The earliest time at which this process is expected to be ended from outside.
    until: Option<Instant>,
}

impl Notices {
    /// Installs the signal handlers: from here on signals no longer end the process.
    pub fn listen() -> io::Result<Self> {
        running_for();
        let (sender, receiver) = Sender::new();
        Ok(Self {
            signals: Signals::listen(windows_here(&NoticeConfig::default()))?,
            sender,
            receiver,
            known: Given::default(),
            settings: None,
            polls: JoinSet::new(),
            drain: JoinSet::new(),
            held: None,
            ending: Arc::default(),
            approval: Arc::default(),
            until: None,
        })
    }

    /// Starts polling the other sources, as the configuration says. Called again, it follows a changed configuration.
    pub fn begin(&mut self, settings: &NoticeConfig) {
        if self.settings.as_ref() == Some(settings) {
            return;
        }
        self.settings = Some(settings.clone());
        let windows = windows_here(settings);
        let named = |source: &str| settings.sources.iter().any(|name| name == source);
        let auto = named("auto");
        self.signals.windows = windows;
        self.signals.all = auto || named("signals");
        // The old ones end here.
        self.polls = JoinSet::new();
        if let Some(path) = settings.file.as_deref().filter(|_| auto || named("file")) {
            self.polls.spawn(file::listen(PathBuf::from(path), self.sender.clone()));
        }
        let clouds = Clouds {
            sender: self.sender.clone(),
            ending: Arc::clone(&self.ending),
            approval: Arc::clone(&self.approval),
            hook: settings.lifecycle_hook.clone(),
            window: windows.preemption,
        };
        if auto {
            self.polls.spawn(clouds.wherever_this_is());
        } else {
            for (source, cloud) in [("aws", Cloud::Aws), ("gcp", Cloud::Gcp), ("azure", Cloud::Azure)] {
                if named(source) {
                    self.polls.spawn(clouds.clone().in_cloud(cloud));
                }
            }
        }
    }

    /// This node trains in `generation` of the run whose folder is `run`: requests to stop that generation are
    /// received. So are, for a while, those to the generations that it continues, the newest first in `continued`: the
    /// group may have changed while a request was on its way, and another node may have led it then. This node has
    /// listened for requests to its own ones in their time.
    pub fn formed(&mut self, run: &Store, generation: Generation, continued: &[Generation]) {
        let held = self.held.take().map(|(before, listening)| {
            listening.abort();
            before
        });
        for before in unheard(held, continued) {
            let late = drain::listen(run.clone(), before, self.sender.clone());
            self.drain.spawn(async move { drop(tokio::time::timeout(LATE, late).await) });
        }
        let listening = self.drain.spawn(drain::listen(run.clone(), generation, self.sender.clone()));
        self.held = Some((generation, listening));
    }

    /// The next notice. Safe to drop and call again.
    pub async fn next(&mut self) -> Notice {
        loop {
            let (heard, mut notice) = tokio::select! {
                biased;
                notice = self.signals.next() => return self.given(notice),
                Some(heard) = self.receiver.recv() => heard,
            };
            if self.known.is_new(&notice, heard) {
                // It may have waited to be taken since: that time is subtracted.
                notice.deadline = notice.deadline.map(|left| left.saturating_sub(heard.elapsed()));
                return self.given(notice);
            }
        }
    }

    fn given(&mut self, notice: Notice) -> Notice {
        self.approval.given(&notice);
        if let Some(left) = ends_in(&notice) {
            let until = Instant::now() + left;
            self.until = Some(self.until.map_or(until, |before| before.min(until)));
        }
        notice
    }

    /// The time until this process is expected to be ended from outside, by the notices so far; `None`: no binding
    /// deadline is known.
    pub fn left(&self) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(Instant::now()))
    }

    /// Call this when the run has ended on this node, its last record is written, and the caller has finished all work
    /// that must not be cut short. `left`: this process leaves because it was told to, and the last finished step is
    /// durable. Tells the parties that wait for this node, within a bounded time.
    pub async fn release(&mut self, left: bool) {
        let approve = async {
            if left {
                self.approval.release().await;
            }
        };
        let released = async { futures::join!(approve, self.ending.release()) };
        if tokio::time::timeout(RELEASE, released).await.is_err() {
            tracing::debug!("whoever waits for this machine could not be told that it may go");
        }
        self.polls.abort_all();
        self.drain.abort_all();
    }
}

/// The generations to which a late request may come: the one that this node has `held` until now, and those after it
/// that it continues.
fn unheard(held: Option<Generation>, continued: &[Generation]) -> Vec<Generation> {
    let after = continued.iter().copied().filter(|before| held.is_none_or(|held| *before > held));
    after.take(MOST_LATE).chain(held).collect()
}

/// When this process is expected to be ended from outside because of `notice`. A deadline that is only usual ends
/// nothing: the record of the end is worth waiting for.
fn ends_in(notice: &Notice) -> Option<Duration> {
    notice.deadline.filter(|_| notice.kind != Kind::Rebalance && notice.deadline_binds())
}

fn windows_here(settings: &NoticeConfig) -> Windows {
    let variable = |name: &str| env::text(name);
    windows(settings, &variable, Surroundings::look(&variable))
}

/// The inputs of the tasks that poll a cloud.
#[derive(Clone)]
struct Clouds {
    sender: Sender,
    ending: Arc<aws::Ending>,
    approval: Arc<azure::Heard>,
    hook: String,
    window: Duration,
}

#[derive(Clone, Copy)]
enum Cloud {
    Aws,
    Gcp,
    Azure,
}

impl Clouds {
    async fn in_cloud(self, cloud: Cloud) {
        match cloud {
            Cloud::Aws => aws::listen(aws::find(true).await, self.sender, self.ending, self.hook).await,
            Cloud::Gcp => gcp::listen(gcp::find(true).await, self.sender, self.window).await,
            Cloud::Azure => azure::listen(azure::find(true).await, self.sender, self.approval).await,
        }
    }

    async fn wherever_this_is(self) {
        tokio::select! {
            found = aws::find(false) => aws::listen(found, self.sender, self.ending, self.hook).await,
            found = gcp::find(false) => gcp::listen(found, self.sender, self.window).await,
            found = azure::find(false) => azure::listen(found, self.sender, self.approval).await,
        }
    }
}

/// The notices that the stream has returned.
#[derive(Debug, Default)]
struct Given {
    ids: HashMap<&'static str, HashSet<String>>,
    advice: HashMap<&'static str, Instant>,
}

impl Given {
    /// Whether this is news; it is remembered, so that it is news only once.
    fn is_new(&mut self, notice: &Notice, now: Instant) -> bool {
        let ids = self.ids.entry(notice.source).or_default();
        if ids.contains(&notice.id) || ids.len() >= MOST {
            return false;
        }
        if notice.kind == Kind::Rebalance {
            // Some services name the same advice by the time of the request.
            let before = self.advice.get(notice.source);
            if before.is_some_and(|before| now.saturating_duration_since(*before) < ADVICE) {
                return false;
            }
            self.advice.insert(notice.source, now);
        }
        ids.insert(notice.id.clone());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice::Confidence;

    fn notice(kind: Kind, source: &'static str, id: &str) -> Notice {
        Notice { kind, deadline: None, source, id: id.into(), confidence: Confidence::Announced }
    }

    #[test]
    fn only_a_binding_deadline_limits_the_last_words() {
        let left = Some(Duration::from_secs(10));
        for (kind, confidence, deadline, expected) in [
            (Kind::Stop, Confidence::Certain, left, left),
            (Kind::Interruption, Confidence::Announced, left, left),
            (Kind::Stop, Confidence::Advisory, left, None),
            (Kind::Rebalance, Confidence::Announced, left, None),
            (Kind::Stop, Confidence::Certain, None, None),
        ] {
            let notice = Notice { deadline, confidence, ..notice(kind, "sigterm", "1") };
            assert_eq!(ends_in(&notice), expected, "{notice:?}");
        }
    }

    #[test]
    fn a_request_to_a_generation_that_goes_on_is_heard_by_whoever_leads_it_now() {
        let continued = [7, 6, 5, 4].map(Generation);
        assert_eq!(unheard(None, &continued), continued, "another node led them");
        assert_eq!(unheard(Some(Generation(5)), &continued), [7, 6, 5].map(Generation), "heard until 5");
        assert_eq!(unheard(Some(Generation(7)), &continued), [Generation(7)], "as ever with one node");
        assert_eq!(unheard(Some(Generation(7)), &[]), [Generation(7)]);
        assert_eq!(unheard(None, &[]), []);
        let long: Vec<Generation> = (1..=100).rev().map(Generation).collect();
        assert_eq!(unheard(None, &long), long[..MOST_LATE]);
    }

    #[test]
    fn what_was_given_is_not_given_again() {
        let mut given = Given::default();
        let now = Instant::now();
        for (kind, source, id, after_s, new) in [
            (Kind::Interruption, "aws-spot", "terminate", 0, true),
            (Kind::Interruption, "aws-spot", "terminate", 1, false),
            (Kind::Interruption, "aws-spot", "stop", 2, true),
            (Kind::Interruption, "aws-asg", "terminate", 2, true),
            (Kind::Rebalance, "aws-rebalance", "a", 10, true),
            (Kind::Rebalance, "aws-rebalance", "b", 15, false),
            (Kind::Rebalance, "azure-freeze", "b", 15, true),
            (Kind::Rebalance, "aws-rebalance", "a", 700, false),
            (Kind::Rebalance, "aws-rebalance", "b", 700, true),
            (Kind::Interruption, "aws-spot", "terminate", 900_000, false),
        ] {
            let at = now + Duration::from_secs(after_s);
            assert_eq!(given.is_new(&notice(kind, source, id), at), new, "{source} {id} after {after_s} s");
        }
        let talker = |n: usize| notice(Kind::Interruption, "talker", &n.to_string());
        let heard = (0..1000).filter(|n| given.is_new(&talker(*n), now)).count();
        assert_eq!(heard, MOST, "one that never stops is not listened to for ever");
    }

    #[tokio::test]
    async fn a_deadline_counts_from_when_it_was_heard() {
        let mut notices = Notices::listen().unwrap();
        let minute = Some(Duration::from_secs(60));
        let long_ago = Instant::now().checked_sub(Duration::from_secs(25)).unwrap();
        let (sender, receiver) = mpsc::channel(8);
        notices.receiver = receiver;
        let spot = Notice { deadline: minute, ..notice(Kind::Interruption, "aws-spot", "terminate") };
        sender.send((long_ago, spot.clone())).await.unwrap();
        sender.send((Instant::now(), spot)).await.unwrap();
        let late = Notice { deadline: minute, ..notice(Kind::Interruption, "file", "1") };
        let longer_ago = Instant::now().checked_sub(Duration::from_secs(61)).unwrap_or(long_ago);
        sender.send((longer_ago, late)).await.unwrap();
        let first = notices.next().await;
        assert!(first.deadline.unwrap() <= Duration::from_secs(35), "{first:?}");
        let second = notices.next().await;
        assert_eq!(second.source, "file", "the repeat was dropped");
        assert!(second.deadline.unwrap() <= Duration::from_secs(35), "{second:?}");
    }
}
