//! Named crash points, beside the lines that they break.
//!
//! `TRAINER_FAULTS="save.after-shard=kill,worker.step=panic@rank=1@step=7"` makes the process die at a point: `kill` is
//! SIGKILL to itself (nothing runs afterwards), `panic` a Rust panic, `error` an error from [`check`], `stop` SIGSTOP
//! to itself: it sleeps at the point until it receives SIGCONT. `@rank=`, `@step=` and `@hit=` (the n-th time, from 1)
//! narrow it. Unset, a point costs one load of a static.

use crate::env;
use std::{
    collections::HashMap,
    sync::{Mutex, OnceLock},
    time::Duration,
};

/// How long a thread that has sent SIGSTOP waits for it to take effect.
const STOPPING: Duration = Duration::from_millis(50);
/// The environment variable that arms crash points.
pub const VARIABLE: &str = "TRAINER_FAULTS";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Panic,
    Error,
    Stop,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Fault {
    point: String,
    action: Action,
    rank: Option<u32>,
    step: Option<u64>,
    hit: Option<u64>,
}

/// The place of a point; narrows which faults fire.
#[derive(Clone, Copy, Debug, Default)]
pub struct At {
    /// The rank, if there is one.
    pub rank: Option<u32>,
    /// The step, if there is one.
    pub step: Option<u64>,
}

/// What [`check`] returns when the fault asks for an error.
#[derive(Debug, thiserror::Error)]
#[error("fault injected at {0}")]
pub struct Injected(pub String);

fn parse(text: &str) -> Vec<Fault> {
    text.split(',')
        .filter_map(|item| {
            let mut parts = item.trim().split('@');
            let (point, action) = parts.next()?.split_once('=')?;
            let action = match action {
                "kill" => Action::Kill,
                "panic" => Action::Panic,
                "error" => Action::Error,
                "stop" => Action::Stop,
                _ => return None,
            };
            let mut fault = Fault { point: point.to_owned(), action, rank: None, step: None, hit: None };
            for part in parts {
                match part.split_once('=')? {
                    ("rank", value) => fault.rank = Some(value.parse().ok()?),
                    ("step", value) => fault.step = Some(value.parse().ok()?),
                    ("hit", value) => fault.hit = Some(value.parse().ok()?),
                    _ => return None,
                }
            }
            Some(fault)
        })
        .collect()
}

fn armed() -> &'static [Fault] {
    static ARMED: OnceLock<Vec<Fault>> = OnceLock::new();
    ARMED.get_or_init(|| env::given(VARIABLE).map(|text| parse(&text)).unwrap_or_default())
}

/// Dies here, or returns an error, if a fault is armed for `point`; otherwise does nothing.
pub fn check(point: &str, at: At) -> Result<(), Injected> {
    let faults = armed();
    if faults.is_empty() {
        return Ok(());
    }
    static HITS: OnceLock<Mutex<HashMap<String, u64>>> = OnceLock::new();
    let hit = {
        let mut hits = HITS.get_or_init(Default::default).lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count = hits.entry(point.to_owned()).or_default();
        *count += 1;
        *count
    };
    let fits = |wanted: Option<u64>, have: Option<u64>| wanted.is_none() || wanted == have;
    let Some(fault) = faults.iter().find(|fault| {
        fault.point == point
            && fits(fault.rank.map(u64::from), at.rank.map(u64::from))
            && fits(fault.step, at.step)
            && fits(fault.hit, Some(hit))
    }) else {
        return Ok(());
    };
    match fault.action {
        Action::Kill => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            // SIGKILL can't be handled; if it is slow, do not run on.
            loop {
                std::thread::park();
            }
        }
        Action::Panic => panic!("fault injected at {point}"),
        Action::Error => Err(Injected(point.to_owned())),
        Action::Stop => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
            #[expect(
                clippy::disallowed_methods,
                reason = "another thread may take the signal: this one does not run on"
            )]
            std::thread::sleep(STOPPING);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_with_their_conditions() {
        let faults = parse("a.b=kill, c=panic@rank=1@step=7@hit=2,broken,d=what");
        assert_eq!(faults.len(), 2);
        assert_eq!((faults[1].rank, faults[1].step, faults[1].hit), (Some(1), Some(7), Some(2)));
        assert_eq!((faults[0].point.as_str(), faults[0].action), ("a.b", Action::Kill));
    }
}
