//! Who reads what an agent says on standard error, and which signal asks it to stop: drawn from the scenario's seed,
//! beside what else is done to a life. Nothing that is checked afterwards depends on it: that is the point.

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

/// Who reads standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ear {
    /// The test, every word.
    Listens,
    /// Nobody, from the beginning.
    Gone,
    /// Somebody who goes after so many bytes.
    Leaves(u64),
    /// Somebody who reads nothing.
    StandsStill,
    /// Somebody who reads nothing for so many milliseconds.
    ComesBack(u64),
}

/// What is drawn for one life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    pub ear: Ear,
    /// Asks to stop.
    pub signal: Signal,
}

impl fmt::Display for Manner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "standard error: {:?}, asked to stop by {:?}", self.ear, self.signal)
    }
}

impl Manner {
    /// Of the n-th life of a scenario. Scenarios that no seed has drawn are left alone, and so are lives whose words
    /// are looked at.
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

    /// The command with such a reader; what it gives beside is to be kept as long as the command runs.
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
        // More than there is to say, so that the pipe is full for sure, and something is to be dropped.
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

/// The first seed under which the lives' readers, and who asks them to stop, are these.
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
fn runs_whose_readers_go_stand_still_and_come_back_end_as_the_undisturbed_one() {
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
