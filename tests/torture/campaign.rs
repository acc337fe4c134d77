//! Many scenarios, several at once, until enough has been killed or the time is over.
//!
//! Driven by environment variables, which `scripts/torture` sets: `TORTURE_KILLS`, `TORTURE_MINUTES`, `TORTURE_SEED`,
//! `TORTURE_JOBS`, `TORTURE_NODES`, `TORTURE_REPLAY`. The campaign's seed gives the scenarios' seeds; each is printed
//! and can be replayed. The first broken promise ends the campaign and keeps its run's folder. An interrupted campaign
//! ends the processes that it started.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    audit::{Checked, Promise, Violation},
    group::{self, GroupScenario},
    plan::Scenario,
    random::Random,
    stage::Stage,
    tally::Tally,
};
use crate::support::trainer::kill_all_of_this_process;

/// The extent of a campaign.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// It ends once this many have been killed,
    pub kills: u64,
    /// or after this time.
    pub time: Duration,
    /// The seed of all scenarios.
    pub seed: u64,
    /// Scenarios at once.
    pub jobs: u64,
    /// The most nodes of a run; with one, each run has one node at a time.
    pub nodes: u32,
    /// One scenario's seed: only this one is played, to its end.
    pub replay: Option<u64>,
}

/// A number in the environment, decimal or hexadecimal; `None`: it is not there, or empty.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    Some(parsed.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

impl Bounds {
    /// From the environment.
    pub fn of_environment() -> Self {
        let now =
            || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
        Self {
            kills: number("TORTURE_KILLS").unwrap_or(100),
            time: Duration::from_secs(60 * number("TORTURE_MINUTES").unwrap_or(10)),
            seed: number("TORTURE_SEED").unwrap_or_else(|| Random::new(now()).next()),
            jobs: number("TORTURE_JOBS").unwrap_or(2).max(1),
            nodes: number("TORTURE_NODES").map_or(1, |nodes| u32::try_from(nodes).expect("a number of nodes")),
            replay: number("TORTURE_REPLAY"),
        }
    }
}

/// A scenario that is being played, and its tally.
pub type Played = (Tally, Result<(), (Violation, PathBuf)>);

/// Plays one scenario of one node.
pub fn play(scenario: &Scenario, go_on: &dyn Fn() -> bool) -> Played {
    let mut stage = Stage::new(scenario);
    let result = caught(|| stage.play(go_on));
    (stage.tally.clone(), result.map_err(|violation| kept(scenario.seed, violation, |to, it| stage.keep(to, it))))
}

/// Plays one scenario of several nodes.
pub fn play_group(scenario: &GroupScenario, go_on: &dyn Fn() -> bool) -> Played {
    let mut stage = group::Stage::new(scenario);
    let result = caught(|| stage.play(go_on));
    (stage.tally.clone(), result.map_err(|violation| kept(scenario.seed, violation, |to, it| stage.keep(to, it))))
}

/// A panic of the harness is a violation, too: most likely a process did not end.
fn caught(play: impl FnOnce() -> Checked) -> Checked {
    catch_unwind(AssertUnwindSafe(play)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
        Err(Violation { promise: Promise::Other, how: text.to_owned() })
    })
}

fn kept(seed: u64, violation: Violation, keep: impl FnOnce(&Path, &Violation)) -> (Violation, PathBuf) {
    let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("torture-{seed:#018x}"));
    keep(&to, &violation);
    (violation, to)
}

/// A scenario of either kind.
enum Any {
    One(Scenario),
    Group(GroupScenario),
}

impl Any {
    fn of(seed: u64, nodes: u32) -> Self {
        if nodes > 1 { Self::Group(GroupScenario::of(seed, nodes)) } else { Self::One(Scenario::of(seed)) }
    }
    fn play(&self, go_on: &dyn Fn() -> bool) -> Played {
        match self {
            Self::One(scenario) => play(scenario, go_on),
            Self::Group(scenario) => play_group(scenario, go_on),
        }
    }
    /// What it is, and the lines of what happens in it.
    fn told(&self) -> (String, Vec<String>) {
        match self {
            Self::One(it) => (it.to_string(), it.lives.iter().map(ToString::to_string).collect()),
            Self::Group(it) => (it.to_string(), it.blows.iter().map(ToString::to_string).collect()),
        }
    }
}

#[derive(Default)]
struct Shared {
    tally: Tally,
    violations: BTreeMap<Promise, u64>,
}

/// Runs a campaign; returns whether every promise was kept.
pub fn run(bounds: &Bounds) -> bool {
    let begun = Instant::now();
    end_with_this_process();
    println!(
        "campaign seed {:#018x}, {} kills or {:.0?}, {} at once, of at most {} nodes",
        bounds.seed, bounds.kills, bounds.time, bounds.jobs, bounds.nodes
    );
    let shared = Mutex::new(Shared::default());
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let (next, broken) = (AtomicU64::new(0), AtomicBool::new(false));
    let finished = AtomicU64::new(0);
    let enough = || {
        broken.load(Ordering::Relaxed)
            || begun.elapsed() > bounds.time
            || finished.load(Ordering::Relaxed) >= bounds.kills
    };
    let worker = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let seed = match bounds.replay {
                Some(seed) if number == 0 => seed,
                Some(_) => return,
                None if enough() => return,
                None => Random::new(Random::new(bounds.seed).next().wrapping_add(number)).next(),
            };
            let any = Any::of(seed, bounds.nodes);
            let (scenario, lines) = any.told();
            let replayed = bounds.replay.is_some();
            if replayed {
                lines.iter().for_each(|line| println!("  {line}"));
            }
            let (tally, result) = any.play(&|| replayed || !enough());
            let mut shared = lock();
            let (lives, kills) = (tally.lives, tally.kills());
            shared.tally.add(tally);
            let all = shared.tally.kills();
            finished.store(all, Ordering::Relaxed);
            println!("{seed:#018x}  {all:>5} kills  {scenario}: {lives} lives, {kills} kills");
            if let Err((violation, kept)) = result {
                broken.store(true, Ordering::Relaxed);
                *shared.violations.entry(violation.promise).or_default() += 1;
                println!("BROKEN: {violation}");
                let nodes = if bounds.nodes > 1 { format!("--nodes {} ", bounds.nodes) } else { String::new() };
                println!("replay: scripts/torture {nodes}--replay {seed:#018x}");
                println!("kept:   {}", kept.display());
                lines.iter().for_each(|line| println!("  {line}"));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..bounds.jobs {
            scope.spawn(worker);
        }
    });
    let shared = lock();
    let promise = |promise| shared.violations.get(&promise).copied().unwrap_or_default();
    let minutes = begun.elapsed().as_secs_f64() / 60.0;
    println!("\n{}", shared.tally);
    println!("  {:<34} {:>8}", "lost checkpoints", promise(Promise::LostCheckpoint));
    println!("  {:<34} {:>8}", "damaged resumes", promise(Promise::DamagedResume));
    println!("  {:<34} {:>8}", "double commits", promise(Promise::DoubleCommit));
    println!("  {:<34} {:>8}", "anything else", promise(Promise::Other));
    println!("  {:<34} {minutes:>7.1} min, {:.0} kills a minute", "time", shared.tally.kills() as f64 / minutes);
    println!("  {:<34} {:#018x}", "campaign seed", bounds.seed);
    shared.violations.is_empty()
}

/// SIGINT, SIGTERM and SIGHUP end every process that this one has started, and then this one.
fn end_with_this_process() {
    use tokio::signal::unix::{SignalKind, signal};
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime for signals");
        runtime.block_on(async {
            let heard = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
            let mut heard = heard.map(|kind| signal(kind).expect("listen for a signal"));
            let [interrupt, terminate, hangup] = &mut heard;
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hangup.recv() => {} }
        });
        // Twice, since a thread of the campaign may just be starting a process.
        kill_all_of_this_process();
        kill_all_of_this_process();
        std::process::exit(130);
    });
}
