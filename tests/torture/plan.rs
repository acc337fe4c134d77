//! The disturbances of one run: a pure function of a seed.
//!
//! A scenario is a store, a number of ranks, a cadence, and a list of lives; each life is disturbed in one way, and on
//! S3 some also have bad weather. A moment is named by an event of the process and a short delay. Where exactly a
//! signal strikes depends on the machine, and no later check depends on it.

use std::{fmt, time::Duration};

use super::random::Random;
use crate::support::proxy::{Fault, Hang, Lands, Often, Rule};

/// Optimizer steps of a run.
pub const STEPS: u64 = 300;

/// The process that a crash point is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// The agent.
    Agent,
    /// A worker.
    Worker,
}

/// A named crash point of the source.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Its name in `TRAINER_FAULTS`.
    pub name: &'static str,
    /// The process that dies of it.
    pub of: Process,
    /// How often a life of some dozen steps certainly passes it.
    pub hits: u64,
}

/// All crash points: a test compares this table with the source.
pub const POINTS: &[Point] = &[
    Point { name: "journal.before-append", of: Process::Agent, hits: 5 },
    Point { name: "journal.after-append", of: Process::Agent, hits: 5 },
    Point { name: "save.after-shard", of: Process::Agent, hits: 16 },
    Point { name: "save.before-receipt", of: Process::Agent, hits: 2 },
    Point { name: "save.after-receipt", of: Process::Agent, hits: 2 },
    Point { name: "save.after-manifest", of: Process::Agent, hits: 2 },
    Point { name: "save.before-record", of: Process::Agent, hits: 2 },
    Point { name: "worker.step", of: Process::Worker, hits: 20 },
];

/// A moment: some time after the n-th event of a kind, counted from the last death; without a kind, after the start.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The event's kind.
    pub kind: Option<&'static str>,
    /// The number of the event, from 1.
    pub nth: u32,
    /// The delay.
    pub delay: Duration,
}

impl Moment {
    /// At once after an event.
    pub const fn after(kind: &'static str, nth: u32) -> Self {
        Self { kind: Some(kind), nth, delay: Duration::ZERO }
    }
    pub fn of(random: &mut Random, kind: &'static str, last: u64, micros: u64) -> Self {
        let nth = random.between(1, last) as u32;
        Self { kind: Some(kind), nth, delay: Duration::from_micros(random.between(0, micros)) }
    }
    /// Any moment of a life.
    fn any(random: &mut Random) -> Self {
        match random.between(0, 9) {
            0 => Self { kind: None, nth: 0, delay: Duration::from_micros(random.between(0, 400_000)) },
            1 => Self::of(random, "phase", 2, 30_000),
            _ => Self::in_a_generation(random),
        }
    }
    /// A moment after a generation was formed.
    pub fn in_a_generation(random: &mut Random) -> Self {
        match random.between(0, 7) {
            0 => Self::of(random, "formed", 1, 300_000),
            1 => Self::of(random, "upload", 8, 5_000),
            2 | 3 => Self::of(random, "checkpoint", 2, 15_000),
            _ => Self::of(random, "step", 12, 15_000),
        }
    }
}

/// The effect of a crash point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// SIGKILL to itself.
    Kill,
    /// A panic.
    Panic,
    /// An error that is returned.
    Error,
}

/// The reads that a garbling machine garbles: see `fixtures/garble/garble.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Garbling {
    /// Reads by the threads of a restore.
    Bulk,
    /// Bytes that arrive in the memory of a snapshot slot.
    Slot,
    /// Every read, each time differently.
    Disk,
    /// Every read, always in the same way.
    All,
}

impl Garbling {
    /// All of them; over a network only the second is available.
    pub const EVERY: [Self; 4] = [Self::Slot, Self::Bulk, Self::Disk, Self::All];
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Slot => "slot",
            Self::Disk => "disk",
            Self::All => "all",
        }
    }
}

/// The disturbance of one life.
#[derive(Clone, Debug)]
pub enum Disturbance {
    /// Only the weather.
    Nothing,
    /// SIGKILL to the agent.
    Agent(Moment),
    /// SIGKILL to the agent and every worker.
    Both(Moment),
    /// SIGKILL to a worker (by its place among the living ones), several times in one life.
    Workers(Vec<(Moment, u64)>),
    /// A crash point.
    Point {
        /// The crash point.
        point: &'static Point,
        /// Its effect.
        action: Action,
        /// It strikes the n-th time that it is passed.
        hit: u64,
    },
    /// SIGTERM, then perhaps SIGKILL.
    Terminate {
        /// The moment.
        at: Moment,
        /// SIGKILL after this time.
        kill_after: Option<Duration>,
    },
    /// SIGSTOP, then SIGCONT, without another agent.
    Nap {
        /// The moment.
        at: Moment,
        /// Whether the workers are stopped, too.
        whole: bool,
        /// The duration.
        time: Duration,
    },
    /// SIGSTOP; another agent takes over; SIGCONT.
    Overtaken {
        /// The moment.
        at: Moment,
        /// The workers are stopped, too.
        whole: bool,
        /// When the other agent is killed.
        kill_heir: Option<Moment>,
    },
    /// An agent falls asleep at a crash point; another takes over and is killed; the first wakes.
    Asleep {
        /// The crash point.
        point: &'static Point,
        /// It strikes the n-th time that it is passed.
        hit: u64,
        /// When the other agent is killed.
        kill_heir: Moment,
    },
    /// Two agents at once.
    Rivals {
        /// The second starts after this time.
        lag: Duration,
        /// When the first (`false`) or the second is killed.
        kill: Option<(bool, Moment)>,
    },
    /// The machine garbles its reads of checkpoints.
    Garbled(Garbling),
    /// The store's disk is unmounted; only a folder is on a disk.
    Unmounted(Moment),
}

/// The behaviour of the store for some time.
#[derive(Clone, Debug, Default)]
pub struct Weather {
    /// The requests that break.
    pub rules: Vec<Rule>,
    /// The requests that hang.
    pub hangs: Vec<Hang>,
    /// Before each request.
    pub latency: Duration,
}

/// The number of kinds of weather.
pub const KINDS: u64 = 11;

/// Single requests that hang for seconds: of every kind that a save, a restore or the end of a run waits for.
const WAITED_FOR: &[(&str, &str, &str)] = &[
    ("PUT", "/journal/", "\"kind\":\"committed\""),
    ("PUT", "/journal/", "\"kind\":\"formed\""),
    ("PUT", "/journal/", "\"kind\":\"interrupted\""),
    ("PUT", "/journal/", "\"kind\":\"completed\""),
    ("PUT", "/checkpoints/", ""),
    ("GET", "/checkpoints/", ""),
    ("GET", "/journal/", ""),
    ("GET", "list-type=", ""),
];
/// Requests that hang forever: nothing waits for them.
const HOUSEKEEPING: &[(&str, &str, &str)] = &[
    ("PUT", "/journal/", "\"kind\":\"pruned"),
    ("PUT", "/journal/", "\"kind\":\"notice\""),
    ("DELETE", "/checkpoints/", ""),
    ("POST", "?delete", ""),
];

/// A heartbeat that hangs forever would end in another agent's take-over.
const HEARTBEAT: (&str, &str, &str) = ("PUT", "/nodes/", "");

impl Weather {
    /// One request of each kind hangs for some seconds, and housekeeping forever.
    pub fn of_stalls(time: Duration) -> Self {
        let of = |&(method, target, body): &(&'static str, &'static str, &'static str)| Hang::all(method, target, body);
        let once = WAITED_FOR.iter().chain([&HEARTBEAT]).map(|kind| Hang { times: 1, time, ..of(kind) });
        Self { hangs: HOUSEKEEPING.iter().map(of).chain(once).collect(), ..Self::default() }
    }
    /// One kind of request hangs.
    fn of_a_stall(random: &mut Random) -> Self {
        let (method, target, body) = match random.between(0, 9) {
            0..=5 => *random.one_of(WAITED_FOR),
            6..=8 => *random.one_of(HOUSEKEEPING),
            _ => HEARTBEAT,
        };
        let hang = Hang::all(method, target, body);
        if HOUSEKEEPING.contains(&(method, target, body)) {
            return Self { hangs: vec![hang], ..Self::default() };
        }
        let time = Duration::from_millis(random.between(2_000, 20_000));
        let lands = *random.one_of(&[Lands::Never, Lands::AtOnce, Lands::Late]);
        Self { hangs: vec![Hang { times: 1, time, lands, ..hang }], ..Self::default() }
    }
}

impl Weather {
    /// Whether readers see an earlier state.
    pub fn is_stale(&self) -> bool {
        self.rules.iter().any(|rule| matches!(rule.fault, Fault::Stale))
    }
    /// One fault by its place in the list of all kinds.
    pub fn of_kind(kind: u64, random: &mut Random) -> Self {
        if kind % KINDS == 10 {
            return Self::of_a_stall(random);
        }
        let somewhere = |random: &mut Random, end| random.between(0, end) as usize;
        let (method, target, fault, often) = match kind % KINDS {
            0 => ("", "", Fault::SlowDown, Often::Percent(random.between(5, 25))),
            // A storm: no request gets through for some time.
            1 => ("", "", Fault::SlowDown, Often::Next(random.between(5, 60) as u32)),
            2 => ("", "", Fault::Reset, Often::Percent(random.between(3, 15))),
            3 => {
                let fault = Fault::CutRequest(somewhere(random, 2_000));
                ("PUT", "/checkpoints/", fault, Often::Percent(random.between(10, 30)))
            }
            4 => ("GET", "", Fault::CutResponse(somewhere(random, 2_000)), Often::Percent(random.between(5, 15))),
            5 => {
                // A shorter body stays whole.
                let fault = Fault::FlipResponse(somewhere(random, 4_000));
                // Repeated damage in transfer looks the same as damage in the store.
                ("GET", "/checkpoints/", fault, Often::Next(random.between(1, 2) as u32))
            }
            6 => {
                let fault = Fault::Stall(Duration::from_millis(random.between(20, 300)));
                ("", "", fault, Often::Percent(random.between(2, 8)))
            }
            7 => {
                let fault = Fault::FlipRequest(somewhere(random, 4_000));
                ("PUT", "", fault, Often::Percent(random.between(5, 15)))
            }
            8 => ("PUT", "", Fault::LoseAnswer, Often::Percent(random.between(5, 20))),
            _ => ("", "journal", Fault::Stale, Often::Percent(random.between(5, 20))),
        };
        let latency = Duration::from_micros(if random.percent(50) { random.between(0, 10_000) } else { 0 });
        Self { rules: vec![Rule { method, target, fault, often }], hangs: Vec::new(), latency }
    }
    pub fn draw(random: &mut Random) -> Self {
        let mut all = Self::default();
        for _ in 0..random.between(1, 2) {
            let kind = random.next();
            let Self { rules, hangs, latency } = Self::of_kind(kind, random);
            all.rules.extend(rules);
            all.hangs.extend(hangs);
            all.latency = latency;
        }
        all
    }
}

/// One start of an agent, to the end of all its processes.
#[derive(Clone, Debug)]
pub struct Life {
    /// Its disturbance.
    pub disturbance: Disturbance,
    /// SIGKILL to an agent that has survived it.
    pub then: Option<Moment>,
    /// The store meanwhile; only S3 has weather.
    pub weather: Option<Weather>,
}

/// How the ranks share the state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sharing {
    /// Each has all of it.
    #[default]
    Ddp,
    /// Each has a part of the optimizer's.
    Zero1,
    /// Each has a part of the weights, too.
    Shard,
}

impl Sharing {
    /// All of them.
    pub const EVERY: [Self; 3] = [Self::Ddp, Self::Zero1, Self::Shard];
    /// Its name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ddp => "ddp",
            Self::Zero1 => "zero1",
            Self::Shard => "shard",
        }
    }
}

/// One run and its disturbances.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The seed of all of it.
    pub seed: u64,
    /// The store: S3 through a proxy, or a folder.
    pub on_s3: bool,
    /// Workers.
    pub ranks: u32,
    /// What each of them has.
    pub sharing: Sharing,
    /// Steps from checkpoint to checkpoint.
    pub every: u64,
    /// Checkpoints that are kept.
    pub keep: u64,
    /// The lives, in order; an undisturbed one follows.
    pub lives: Vec<Life>,
}

impl Scenario {
    /// The scenario of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let on_s3 = random.percent(40);
        let (ranks, every, keep) = (random.between(1, 2) as u32, random.between(1, 6), random.between(1, 3));
        let lives = (0..random.between(6, 10))
            .map(|_| {
                let weather = (on_s3 && random.percent(50)).then(|| Weather::draw(&mut random));
                let disturbance = disturbance(&mut random, on_s3);
                // The crash point may come some saves later.
                let far = matches!(disturbance, Disturbance::Point { .. });
                let nth = random.between(1, 12) as u32 + if far { 60 } else { 0 };
                let then = random.percent(90).then_some(Moment { kind: Some("step"), nth, delay: Duration::ZERO });
                Life { disturbance, then, weather }
            })
            .collect();
        // One rank has all in any case.
        let sharing = if ranks == 1 { Sharing::Ddp } else { *random.one_of(&Sharing::EVERY) };
        Self { seed, on_s3, ranks, sharing, every, keep, lives }
    }
}

fn disturbance(random: &mut Random, on_s3: bool) -> Disturbance {
    match random.between(0, 105) {
        0..=21 => Disturbance::Agent(Moment::any(random)),
        22..=41 => Disturbance::Both(Moment::any(random)),
        42..=61 => {
            let kills = random.between(1, 4);
            Disturbance::Workers((0..kills).map(|_| (Moment::in_a_generation(random), random.next())).collect())
        }
        62..=85 => {
            let point = random.one_of(POINTS);
            let action = *random.one_of(&[Action::Kill, Action::Kill, Action::Kill, Action::Panic, Action::Error]);
            Disturbance::Point { point, action, hit: random.between(1, point.hits) }
        }
        86..=88 => {
            let at = Moment::in_a_generation(random);
            let kill_after = random.percent(70).then(|| Duration::from_micros(random.between(0, 60_000)));
            Disturbance::Terminate { at, kill_after }
        }
        89..=90 => {
            let time = Duration::from_millis(random.between(1, 400));
            Disturbance::Nap { at: Moment::any(random), whole: random.percent(50), time }
        }
        91..=92 => {
            let kill_heir = random.percent(80).then(|| Moment::in_a_generation(random));
            let at = Moment::in_a_generation(random);
            Disturbance::Overtaken { at, whole: random.percent(50), kill_heir }
        }
        93..=95 => {
            let agents: Vec<&'static Point> = POINTS.iter().filter(|point| point.of == Process::Agent).collect();
            let point = *random.one_of(&agents);
            let kill_heir = Moment::in_a_generation(random);
            Disturbance::Asleep { point, hit: random.between(1, point.hits), kill_heir }
        }
        96..=98 => {
            let kill = random.percent(80).then(|| (random.percent(50), Moment::any(random)));
            Disturbance::Rivals { lag: Duration::from_micros(random.between(0, 300_000)), kill }
        }
        99..=101 => {
            let last = if on_s3 { 1 } else { Garbling::EVERY.len() };
            Disturbance::Garbled(*random.one_of(&Garbling::EVERY[..last]))
        }
        102..=104 if !on_s3 => Disturbance::Unmounted(Moment::in_a_generation(random)),
        _ => Disturbance::Nothing,
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill",
            Self::Panic => "panic",
            Self::Error => "error",
        })
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Some(kind) => write!(f, "{kind} {}", self.nth)?,
            None => write!(f, "start")?,
        }
        if self.delay.is_zero() { Ok(()) } else { write!(f, "+{:.1}ms", self.delay.as_secs_f64() * 1e3) }
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wide = |whole: &bool| if *whole { "all" } else { "agent" };
        match self {
            Self::Nothing => write!(f, "nothing"),
            Self::Agent(at) => write!(f, "kill agent at {at}"),
            Self::Both(at) => write!(f, "kill both at {at}"),
            Self::Workers(kills) => {
                let moments: Vec<String> = kills.iter().map(|(at, _)| at.to_string()).collect();
                write!(f, "kill worker at {}", moments.join(", "))
            }
            Self::Point { point, action, hit } => write!(f, "{}={action}@hit={hit}", point.name),
            Self::Terminate { at, kill_after: None } => write!(f, "SIGTERM at {at}"),
            Self::Terminate { at, kill_after: Some(time) } => write!(f, "SIGTERM at {at}, SIGKILL after {time:.1?}"),
            Self::Nap { at, whole, time } => write!(f, "stop {} at {at} for {time:.1?}", wide(whole)),
            Self::Overtaken { at, whole, kill_heir } => {
                write!(f, "stop {} at {at}, take over", wide(whole))?;
                kill_heir.iter().try_for_each(|at| write!(f, ", kill the heir at {at}"))
            }
            Self::Asleep { point, hit, kill_heir } => {
                write!(f, "{}=stop@hit={hit}, take over, kill the heir at {kill_heir}", point.name)
            }
            Self::Rivals { lag, kill } => {
                write!(f, "rivals, lag {lag:.1?}")?;
                let which = |second: bool| if second { "second" } else { "first" };
                kill.iter().try_for_each(|(second, at)| write!(f, ", kill the {} at {at}", which(*second)))
            }
            Self::Garbled(how) => write!(f, "garble {}", how.name()),
            Self::Unmounted(at) => write!(f, "unmount at {at}"),
        }
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.disturbance)?;
        self.then.iter().try_for_each(|at| write!(f, ", then kill agent at {at}"))?;
        self.weather.iter().try_for_each(|weather| write!(f, "{weather}"))
    }
}

impl fmt::Display for Weather {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Rule { method, target, fault, often } in &self.rules {
            write!(f, " | {fault:?} {often:?} {method}{target}")?;
        }
        for Hang { method, target, body, times, time, lands } in &self.hangs {
            let times = if *times == u32::MAX { "all".to_owned() } else { times.to_string() };
            write!(f, " | hang {times} {method}{target} {body} {time:.1?} {lands:?}")?;
        }
        if self.latency.is_zero() { Ok(()) } else { write!(f, " | latency {:.1?}", self.latency) }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let store = if self.on_s3 { "s3" } else { "file" };
        write!(f, "{store} {} ranks={} every={} keep={}", self.sharing.name(), self.ranks, self.every, self.keep)
    }
}
