//! A watched file: any program that can write one can announce that this machine goes away.
//!
//! The file counts if it appears or changes while this process runs. A file last written before the process began is
//! old news, as is one from the future: otherwise it would end every restart. It may be empty, or hold the seconds left
//! (`90`, `2m`) or JSON, `{"deadline_s": 90}`; an unreadable content still announces that the machine goes away. At
//! most 4 KiB of it are read, once it has stayed the same from one look to the next: its writer need not write it all
//! at once.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio::{io::AsyncReadExt, time::Instant};

use super::{
    poll::{Sender, running_for},
    types::{Confidence, Kind, Notice},
};
use crate::config::parse_duration;

/// The interval between two looks.
const INTERVAL: Duration = Duration::from_millis(500);
/// The most bytes that are read.
const MAX_CONTENT: u64 = 4096;
/// The longest deadline.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The properties that distinguish two states of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Looks {
    inode: u64,
    size: u64,
    changed: (i64, i64),
    regular: bool,
}

/// Reports notices from the file, for ever.
pub async fn listen(path: PathBuf, sender: Sender) {
    let began = Timestamp::now().checked_sub(SignedDuration::try_from(running_for()).unwrap_or_default());
    let mut watched = Watched::begin(path, began.unwrap_or(Timestamp::MIN)).await;
    loop {
        tokio::time::sleep(INTERVAL).await;
        if let Some((heard, notice)) = watched.hear().await {
            sender.repeat(heard, notice);
        }
    }
}

/// A file, and its known states.
struct Watched {
    path: PathBuf,
    /// The state that was reported, or was old at the beginning.
    known: Option<Looks>,
    /// The state at the last look.
    before: Option<Looks>,
    /// The last notice, and when it was received.
    news: Option<(Instant, Notice)>,
}

impl Watched {
    /// A file written before `began` is old.
    async fn begin(path: PathBuf, began: Timestamp) -> Self {
        let before = look(&path).await;
        let at = |time: Timestamp| (time.as_second(), i64::from(time.subsec_nanosecond()));
        let fresh = at(began)..=at(Timestamp::now());
        let known = before.filter(|looks| !fresh.contains(&looks.changed));
        Self { path, known, before, news: None }
    }

    /// The last notice, with every look: it may be long before somebody takes it.
    async fn hear(&mut self) -> Option<(Instant, Notice)> {
        if let Some(notice) = self.look().await {
            self.news = Some((Instant::now(), notice));
        }
        self.news.clone()
    }

    /// A notice, if the file has changed and then stayed the same from one look to the next.
    async fn look(&mut self) -> Option<Notice> {
        let now = look(&self.path).await;
        let settled = now == std::mem::replace(&mut self.before, now);
        let Some(looks) = now else {
            self.known = None;
            return None;
        };
        if !settled || self.known == now {
            return None;
        }
        self.known = now;
        let content = if looks.regular { read(&self.path).await } else { Vec::new() };
        let deadline = deadline(&content).unwrap_or_else(|()| {
            tracing::warn!(file = %self.path.display(), "the watched file holds no time: when this machine goes away \
                is not known");
            None
        });
        let id = format!("{}-{}-{}.{}", looks.inode, looks.size, looks.changed.0, looks.changed.1);
        let (kind, confidence) = (Kind::Interruption, Confidence::Announced);
        Some(Notice { kind, deadline, source: "file", id, confidence })
    }
}

async fn look(path: &Path) -> Option<Looks> {
    let found = tokio::fs::metadata(path).await.ok()?;
    Some(Looks {
        inode: found.ino(),
        size: found.size(),
        changed: (found.mtime(), found.mtime_nsec()),
        regular: found.is_file(),
    })
}

async fn read(path: &Path) -> Vec<u8> {
    let mut content = Vec::new();
    if let Ok(file) = tokio::fs::File::open(path).await {
        // A partly unreadable content is read as far as it goes.
        let _ = file.take(MAX_CONTENT).read_to_end(&mut content).await;
    }
    content
}

/// The time left; `Err`: the content means nothing.
fn deadline(content: &[u8]) -> Result<Option<Duration>, ()> {
    let text = std::str::from_utf8(content).map_err(|_| ())?.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let seconds = match serde_json::from_str(text) {
        Ok(Value::Number(seconds)) => seconds.as_f64(),
        Ok(Value::Object(members)) => match members.get("deadline_s") {
            None | Some(Value::Null) => return Ok(None),
            Some(seconds) => seconds.as_f64(),
        },
        Ok(_) => None,
        Err(_) => return parse_duration(text).map(|left| Some(left.min(LONGEST))).ok_or(()),
    };
    let seconds = seconds.filter(|seconds| seconds.is_finite()).ok_or(())?;
    Ok(Some(Duration::try_from_secs_f64(seconds.clamp(0.0, LONGEST.as_secs_f64())).map_err(|_| ())?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn contents_are_seconds_durations_or_json() {
        let seconds = |seconds| Ok(Some(Duration::from_secs_f64(seconds)));
        for (content, wanted) in [
            ("", Ok(None)),
            (" \n", Ok(None)),
            ("90\n", seconds(90.0)),
            ("1.5", seconds(1.5)),
            ("2m", seconds(120.0)),
            ("-5", seconds(0.0)),
            ("1e300", Ok(Some(LONGEST))),
            (r#"{"deadline_s": 30}"#, seconds(30.0)),
            (r#"{"deadline_s": null}"#, Ok(None)),
            (r#"{"other": 1}"#, Ok(None)),
            (r#"{"deadline_s": "30"}"#, Err(())),
            ("[30]", Err(())),
            ("true", Err(())),
            ("soon", Err(())),
            ("1e999", Err(())),
        ] {
            assert_eq!(deadline(content.as_bytes()), wanted, "{content:?}");
        }
        assert_eq!(deadline(b"\xff\xfe"), Err(()));
    }

    proptest! {
        #[test]
        fn no_content_is_too_odd(
            content in proptest::collection::vec(any::<u8>(), 0..200),
            text in crate::notice::testing::odd_answer(),
        ) {
            for content in [content.as_slice(), text.as_bytes()] {
                prop_assert!(deadline(content).map_or(true, |left| left.is_none_or(|left| left <= LONGEST)));
            }
        }
    }

    #[tokio::test]
    async fn news_is_told_with_every_look_as_of_when_it_was_heard() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stop");
        let mut watched = Watched::begin(path.clone(), Timestamp::now()).await;
        std::fs::write(&path, "90").unwrap();
        assert_eq!(watched.hear().await, None, "it may still be written");
        let first = watched.hear().await;
        assert!(first.is_some());
        assert_eq!(watched.hear().await, first, "the first may not have been taken");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(watched.hear().await, first, "what was said holds");
    }

    #[tokio::test]
    async fn what_was_written_since_this_process_began_is_news_however_late_it_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stop");
        std::fs::write(&path, "90").unwrap();
        let now = Timestamp::now();
        let hour = SignedDuration::from_hours(1);
        for (written, began, news) in [
            (now - hour, now - hour * 2, true),
            (now - hour, now - hour, true),
            (now - hour * 2, now - hour, false),
            (now + hour, now - hour, false),
        ] {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(written.into()).unwrap();
            let mut watched = Watched::begin(path.clone(), began).await;
            assert_eq!(watched.look().await.is_some(), news, "{written} {began}");
        }
    }

    #[tokio::test]
    async fn only_what_appears_or_changes_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stop");
        std::fs::write(&path, "old").unwrap();
        let mut watched = Watched::begin(path.clone(), Timestamp::now()).await;
        for _ in 0..3 {
            assert_eq!(watched.look().await, None, "an old file is no news");
        }
        std::fs::write(&path, r#"{"deadline_s": 30}"#).unwrap();
        assert_eq!(watched.look().await, None, "it may still be written");
        let first = watched.look().await.unwrap();
        assert_eq!((first.kind, first.deadline), (Kind::Interruption, Some(Duration::from_secs(30))));
        assert_eq!(watched.look().await, None, "told once");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(watched.look().await, None);
        std::fs::create_dir(&path).unwrap();
        assert_eq!(watched.look().await, None);
        let second = watched.look().await.unwrap();
        assert_eq!(second.deadline, None, "not a file, but it is there");
        assert_ne!(first.id, second.id);
        std::fs::remove_dir(&path).unwrap();
        assert_eq!(watched.look().await, None);
        std::fs::write(&path, vec![b'9'; 1 << 20]).unwrap();
        assert_eq!(watched.look().await, None);
        assert!(watched.look().await.is_some(), "what is too long to be a number");
    }
}
