//! The reader of an agent's standard error, and the signal that asks it to stop: drawn from the scenario's seed, beside
//! the other disturbances of a life. No later check depends on them: that is the point.

use std::{
    fmt,
    io::{PipeReader, Read, Write},
    time::Duration,
};

use rustix::{
    pipe::{fcntl_getpipe_size, fcntl_setpipe_size},
    process::Signal,
};

use super::{
    calm,
    plan::{Action, Disturbance, Moment, Scenario},
    played,
    random::Random,
    scenario,
};
use crate::support::trainer::Trainer;

/// The reader of standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ear {
    /// The test reads every word.
    Listens,
    /// No reader, from the beginning.
    Gone,
    /// A reader that goes away after this many bytes.
    Leaves(u64),
    /// A reader that reads nothing.
    StandsStill,
    /// A reader that reads nothing for this many milliseconds.
    ComesBack(u64),
}

/// The draw for one life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    pub ear: Ear,
    /// The signal that asks it to stop.
    pub signal: Signal,
}

impl fmt::Display for Manner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "standard error: {:?}, asked to stop by {:?}", self.ear, self.signal)
    }
}

impl Manner {
    /// The draw for the n-th life of a scenario. Scenarios without a seed have no draw, nor have lives whose output is
    /// checked.
    pub fn of(scenario: &Scenario, life: u64, disturbance: &Disturbance) -> Self {
        let looked_at = matches!(disturbance, Disturbance::Point { action: Action::Panic | Action::Error, .. });
        if scenario.seed == 0 || looked_at {
            return Self { ear: Ear::Listens, signal: Signal::TERM };
        }
        let mut random = Random::new(scenario.seed.rotate_left(17) ^ life);
        let ear = match random.between(0, 9) {
            0 => Ear::Gone,
            1 => Ear::Leaves(random.between(1, 4_000)),
            2 => Ear::StandsStill,
            3 => Ear::ComesBack(random.between(1, 500)),
            _ => Ear::Listens,
        };
        Self { ear, signal: if random.percent(40) { Signal::HUP } else { Signal::TERM } }
    }

    /// The command with such a reader; keep the second value for as long as the command runs.
    pub fn apply(self, command: Trainer) -> (Trainer, Option<PipeReader>) {
        if self.ear == Ear::Listens {
            return (command, None);
        }
        let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
        if matches!(self.ear, Ear::StandsStill | Ear::ComesBack(_)) {
            fcntl_setpipe_size(&writer, 4096).expect("a small pipe");
            let size = fcntl_getpipe_size(&writer).expect("its size");
            writer.write_all(&vec![b'\n'; size]).expect("fill it");
        }
        // More messages than usual, so that the pipe certainly fills up and some are dropped.
        let command = command.envs(&[("TRAINER_LOG", "trainer=trace".to_owned())]).stderr(writer);
        match self.ear {
            Ear::Listens | Ear::Gone => (command, None),
            Ear::StandsStill => (command, Some(reader)),
            Ear::Leaves(bytes) => {
                // It ends with the agent at the latest.
                std::thread::spawn(move || std::io::copy(&mut reader.take(bytes), &mut std::io::sink()));
                (command, None)
            }
            Ear::ComesBack(after) => {
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(after));
                    std::io::copy(&mut reader, &mut std::io::sink())
                });
                (command, None)
            }
        }
    }
}

/// The first seed that gives the lives these readers and these signals.
fn seed_of(wanted: &[(Ear, Signal)], lives: &[Disturbance]) -> u64 {
    let same = |ear: Ear, other: Ear| std::mem::discriminant(&ear) == std::mem::discriminant(&other);
    (1..)
        .find(|seed| {
            let scenario = Scenario { seed: *seed, ..scenario(false, 1, Vec::new()) };
            let drawn = (0..).zip(lives).map(|(n, life)| Manner::of(&scenario, n, life));
            drawn.zip(wanted).all(|(drawn, (ear, signal))| same(drawn.ear, *ear) && drawn.signal == *signal)
        })
        .expect("a seed")
}

#[test]
fn runs_with_readers_that_go_stall_and_return_end_like_the_undisturbed_one() {
    let stop = || Disturbance::Terminate { at: Moment::after("step", 9), kill_after: None };
    let lives = vec![stop(), stop(), stop(), Disturbance::Agent(Moment::after("checkpoint", 2)), stop()];
    let wanted = [
        (Ear::Gone, Signal::HUP),
        (Ear::StandsStill, Signal::TERM),
        (Ear::ComesBack(0), Signal::HUP),
        (Ear::StandsStill, Signal::TERM),
    ];
    let seed = seed_of(&wanted, &lives);
    played(&Scenario { seed, ..scenario(false, 2, lives.into_iter().map(calm).collect()) });
}
