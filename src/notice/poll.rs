//! Shared by all polled sources: intervals, time limits, logging, and the channel for notices.

use std::{sync::OnceLock, time::Duration};

use jiff::{Timestamp, civil::DateTime, fmt::strtime, tz::TimeZone};
use tokio::{sync::mpsc, time::Instant};

use super::types::Notice;
use crate::cloud::metadata::MetadataError;

/// The limit for one request.
pub const LIMIT: Duration = Duration::from_secs(2);
/// Pauses between looks for a service that is not there double up to this.
const SELDOM: Duration = Duration::from_secs(300);
/// And up to this for one that is known to exist but does not answer: on a machine that is starting, or while a network
/// fails.
const SOON: Duration = Duration::from_secs(10);
/// The most notices that wait to be taken; more are dropped, and received again with the next poll.
const WAITING: usize = 64;
/// The longest name of a notice.
const NAME: usize = 100;

/// How long this process has run: measured from the first call, so call it when the process begins. Sources begin
/// later, when the run's configuration is known; an event in between is news.
pub fn running_for() -> Duration {
    static BEGAN: OnceLock<std::time::Instant> = OnceLock::new();
    BEGAN.get_or_init(std::time::Instant::now).elapsed()
}

/// The channel on which sources report notices. Repeats are fine: the receiver drops them.
#[derive(Clone, Debug)]
pub struct Sender(mpsc::Sender<(Instant, Notice)>);

impl Sender {
    /// A channel, and its receiver.
    pub fn new() -> (Self, mpsc::Receiver<(Instant, Notice)>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(sender), receiver)
    }

    /// Reports a notice.
    pub fn tell(&self, notice: Notice) {
        self.repeat(Instant::now(), notice);
    }

    /// Reports again a notice received at that time: it may not have been taken.
    pub fn repeat(&self, heard: Instant, notice: Notice) {
        if self.0.try_send((heard, notice)).is_err() {
            tracing::debug!("a notice is not taken: too many wait");
        }
    }
}

/// When to poll next: at an even pace, and less often while there are no answers.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    every: Duration,
    most: Duration,
    failures: u32,
}

impl Pace {
    /// Every `every`; the pause doubles up to `most` with each failure in a row.
    pub const fn new(every: Duration, most: Duration) -> Self {
        Self { every, most, failures: 0 }
    }

    /// The pause after an answer.
    pub const fn answered(&mut self) -> Duration {
        self.failures = 0;
        self.every
    }

    /// The pause after a failure.
    pub fn failed(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.every.saturating_mul(1 << self.failures.min(16)).min(self.most).max(self.every)
    }

    /// Whether the last request failed.
    pub const fn is_failing(&self) -> bool {
        self.failures > 0
    }
}

/// Sleeps until the next request to `what` is due. A failure is only a log line: nothing depends on one answer.
pub async fn rest<T>(pace: &mut Pace, what: &str, outcome: &Result<T, MetadataError>) {
    let pause = match outcome {
        Ok(_) => pace.answered(),
        Err(error) => {
            let pause = pace.failed();
            tracing::debug!(%error, again_s = pause.as_secs_f64(), "{what} is not known");
            pause
        }
    };
    tokio::time::sleep(pause).await;
}

/// The search for a service that may not exist.
#[derive(Debug)]
pub struct Search {
    what: &'static str,
    named: bool,
    pace: Pace,
}

impl Search {
    /// For the service `what`. `named`: the user has said that it exists, and gets one warning if it does not. `here`:
    /// the machine itself says that it belongs to that cloud.
    pub const fn new(what: &'static str, named: bool, here: bool) -> Self {
        let most = if named || here { SOON } else { SELDOM };
        Self { what, named, pace: Pace::new(Duration::from_secs(1), most) }
    }

    /// Sleeps until it is time to look again.
    pub async fn failed(&mut self, error: &MetadataError) {
        if self.named && !self.pace.is_failing() {
            let what = self.what;
            tracing::warn!(
                "notice.sources names {what}, which does not answer ({error}); it is asked again now and then"
            );
        }
        let pause = self.pace.failed();
        tracing::debug!(%error, again_s = pause.as_secs_f64(), "{} does not answer", self.what);
        tokio::time::sleep(pause).await;
    }
}

/// Time from `now` to `at`, not below zero and not above `most`. Both are wall clocks, one of them another machine's:
/// `most` is the longest time that the source announces.
pub fn left(at: Timestamp, now: Timestamp, most: Duration) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or_default().min(most)
}

/// A time as AWS's list of maintenance and Azure's events have it: `21 Jan 2019 09:00:43 GMT`, a weekday and a comma
/// before it or not.
pub fn http_date(text: &str) -> Option<Timestamp> {
    let text = text.split_once(", ").map_or(text, |(_, date)| date).trim();
    let parsed: DateTime = strtime::parse("%d %b %Y %H:%M:%S GMT", text).ok()?.to_datetime().ok()?;
    parsed.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp())
}

/// A name from outside, truncated and without unprintable characters.
pub fn name(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).take(NAME).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_slackens_with_failures_and_recovers_at_once() {
        let seconds = Duration::from_secs;
        let mut pace = Pace::new(seconds(1), seconds(8));
        assert_eq!(pace.answered(), seconds(1));
        assert_eq!([(); 5].map(|()| pace.failed()), [2, 4, 8, 8, 8].map(seconds));
        assert!(pace.is_failing());
        assert_eq!(pace.answered(), seconds(1));
        assert!(!pace.is_failing());
        let mut slow = Pace::new(seconds(60), seconds(30));
        assert_eq!(slow.failed(), seconds(60), "never faster for a failure");
        for (named, here, most) in
            [(false, false, SELDOM), (true, false, SOON), (false, true, SOON), (true, true, SOON)]
        {
            let mut long = Search::new("a service", named, here).pace;
            let pauses: Vec<_> = (0..100).map(|_| long.failed()).collect();
            assert!(pauses.iter().all(|pause| *pause <= most) && pauses.last() == Some(&most), "{named} {here}");
        }
    }

    #[test]
    fn time_left_is_bounded_on_both_sides() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let at = |offset: i64| Timestamp::from_second(1_000_000 + offset).unwrap();
        let most = Duration::from_secs(120);
        for (offset, seconds) in [(90, 90), (120, 120), (4000, 120), (0, 0), (-1, 0), (-900_000, 0)] {
            assert_eq!(left(at(offset), now, most), Duration::from_secs(seconds), "{offset}");
        }
        assert_eq!(left(Timestamp::MAX, Timestamp::MIN, most), most);
        assert_eq!(left(Timestamp::MIN, Timestamp::MAX, most), Duration::ZERO);
    }

    #[test]
    fn dates_are_read_with_and_without_a_weekday() {
        for (text, wanted) in [
            ("21 Jan 2019 09:00:43 GMT", Some("2019-01-21T09:00:43Z")),
            ("2 Feb 2026 09:00:43 GMT", Some("2026-02-02T09:00:43Z")),
            ("Mon, 19 Sep 2016 18:29:47 GMT", Some("2016-09-19T18:29:47Z")),
            ("", None),
            ("2016-09-19T18:29:47Z", None),
            ("31 Feb 2026 00:00:00 GMT", None),
            ("1 Jan 99999999999 00:00:00 GMT", None),
            ("Mon, 19 Sep 2016 18:29:47 GMT and more", None),
        ] {
            assert_eq!(http_date(text), wanted.map(|wanted| wanted.parse().unwrap()), "{text:?}");
        }
    }

    #[test]
    fn names_are_cut_and_plain() {
        assert_eq!(name("a\u{1b}[2J b\né"), "a[2Jb");
        assert_eq!(name(&"x".repeat(1000)).len(), NAME);
    }
}
