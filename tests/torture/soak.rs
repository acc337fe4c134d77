//! A soak: one run for long, with machines that come and go as cloud machines do, and a look at what is left of it.
//!
//! Lives and absences are drawn from Pareto distributions: most are short, few are very long. One node lives through
//! all of it. Twice it is left alone, after a warm-up and at the end; whatever it holds the second time and did not
//! hold the first time has leaked.
//!
//! Goodput is the time of steps that were not done again, over all time. Beside it stands the best that was possible:
//! the same changes of the group at their measured cost, and nothing else: no step lost, and no save.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{
    audit::{Auditor, View},
    campaign::number,
    plan::Sharing,
    random::Random,
    stage::{RATE_OF_GROUPS, RUN, begin, prepare},
};
use crate::support::{
    lab::{Lab, Turn},
    s3,
    trainer::{Event, LIMIT, Running},
};

/// The most nodes.
const MOST: usize = 5;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// The anchor is looked at so often while it is alone, and the least of what it held counts.
const LOOKS: u32 = 60;
/// What the anchor may hold more of at the end.
const MORE_DESCRIPTORS: u64 = 4;
/// Its connections to the store at any time, at most.
const POOL: u64 = 64;
/// Threads of a pool come and go with its work.
const MORE_THREADS: u64 = 8;
/// What an allocator keeps is not a leak; a leak of 100 KiB a generation is more than this after half an hour.
const MORE_MEMORY: u64 = 24 << 20;

/// How a soak goes.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The seed of all lives.
    pub seed: u64,
    /// The time of the churn, a quarter of which is the warm-up.
    pub time: Duration,
    /// The scale of a life: no life is shorter.
    pub life: Duration,
    /// The scale of an absence.
    pub absence: Duration,
}

/// A draw from a Pareto distribution with this least value.
fn pareto(random: &mut Random, least: Duration, shape: f64) -> Duration {
    let uniform = (random.between(1, 1_000_000) as f64) / 1e6;
    least.mul_f64(uniform.powf(-1.0 / shape).min(100.0))
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    memory: u64,
    /// All but connections to the store.
    descriptors: u64,
    /// Connections to the store: a pool keeps those that were needed at once.
    store: u64,
    threads: u64,
    children: u64,
    zombies: u64,
}

impl Held {
    /// `store`: the port of the store.
    fn of(pid: Pid, store: u16) -> Self {
        let folder = format!("/proc/{}", pid.as_raw_nonzero());
        let status = std::fs::read_to_string(format!("{folder}/status")).expect("the anchor lives");
        let figure = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a figure of a process");
            line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
        };
        let links: Vec<String> = std::fs::read_dir(format!("{folder}/fd"))
            .expect("descriptors")
            .filter_map(|entry| Some(std::fs::read_link(entry.ok()?.path()).ok()?.to_string_lossy().into_owned()))
            .collect();
        let states = children(pid);
        let to_store = connections_to(store);
        let sockets = links.iter().filter_map(|link| link.strip_prefix("socket:[")?.strip_suffix(']'));
        let pool = sockets.filter(|inode| to_store.contains(*inode)).count() as u64;
        Self {
            memory: figure("VmRSS:") << 10,
            descriptors: links.len() as u64 - pool,
            store: pool,
            threads: figure("Threads:"),
            children: states.len() as u64,
            zombies: states.iter().filter(|state| **state == 'Z').count() as u64,
        }
    }
    /// The least of each.
    fn least(self, other: Self) -> Self {
        Self {
            memory: self.memory.min(other.memory),
            descriptors: self.descriptors.min(other.descriptors),
            store: self.store.min(other.store),
            threads: self.threads.min(other.threads),
            children: self.children.min(other.children),
            zombies: self.zombies.min(other.zombies),
        }
    }
}

/// The sockets of this machine that are connected to this port: the fields of proc_net_tcp(5).
fn connections_to(port: u16) -> BTreeSet<String> {
    let text = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let inode = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let remote = fields.get(2)?.rsplit_once(':')?.1;
        (u16::from_str_radix(remote, 16).ok()? == port).then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
    };
    text.lines().filter_map(inode).collect()
}

/// The states of a process's children.
fn children(of: Pid) -> Vec<char> {
    let wanted = of.as_raw_nonzero().to_string();
    let stat = |name: String| {
        let text = std::fs::read_to_string(format!("/proc/{name}/stat")).ok()?;
        let mut fields = text.rsplit_once(") ")?.1.split(' ').map(str::to_owned);
        let state = fields.next()?.chars().next()?;
        (fields.next()? == wanted).then_some(state)
    };
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| stat(entry.file_name().to_string_lossy().into_owned())).collect()
}

/// One node of the churn.
struct Visitor {
    running: Running,
    seen: usize,
    dies: Instant,
    told: bool,
}

/// The churn of a run.
struct Churn {
    settings: Settings,
    random: Random,
    lab: Lab,
    anchor: Running,
    seen: usize,
    visitors: Vec<Visitor>,
    comes: Instant,
    came: u64,
    killed: u64,
    told: u64,
    stopped: u64,
    work: Work,
}

/// The steps of all leaders.
#[derive(Default)]
struct Work {
    /// Seconds from the last step of a generation to the first of the next, without the time of that step itself.
    gaps: Vec<f64>,
    last: Option<Instant>,
    formed: bool,
    /// Seconds of steps that were done for the first time.
    seconds: f64,
    done: BTreeSet<u64>,
    again: u64,
}

impl Work {
    fn hear(&mut self, events: &[Event]) {
        for event in events {
            match event.kind() {
                "formed" => self.formed = true,
                "step" => {
                    let now = Instant::now();
                    let step_s = event.value["step_s"].as_f64().unwrap_or_default();
                    if let (Some(before), true) = (self.last, self.formed) {
                        self.gaps.push((now.duration_since(before).as_secs_f64() - step_s).max(0.0));
                    }
                    (self.formed, self.last) = (false, Some(now));
                    if self.done.insert(event.step().unwrap_or_default()) {
                        self.seconds += step_s;
                    } else {
                        self.again += 1;
                    }
                }
                _ => {}
            }
        }
    }
}

impl Churn {
    fn node(lab: &Lab) -> Running {
        let bounds = format!("1:{MOST}");
        begin(lab)
            .envs(&s3::client_env(&lab.server().endpoint()))
            .args(&["--nodes", &bounds, "--nproc-per-node", "1"])
            .args(&["--set", "network.address=127.0.0.1", "--set", "train.steps=1000000"])
            .args(&["--set", "train.global_batch=60", "--set", "train.max_micro_batch=4"])
            .start()
    }

    fn new(settings: Settings) -> Self {
        // It waits for no turn, and the proxy is not used.
        let lab = Lab::on_s3_through_proxy_at_once(settings.seed).0;
        prepare(&lab, (1, Sharing::Ddp), 100, 2, RATE_OF_GROUPS);
        let anchor = Self::node(&lab);
        anchor.wait_for("its first step", |event| event.kind() == "step");
        let now = Instant::now();
        Self {
            settings,
            random: Random::new(settings.seed),
            lab,
            anchor,
            seen: 0,
            visitors: Vec::new(),
            comes: now,
            came: 1,
            killed: 0,
            told: 0,
            stopped: 0,
            work: Work::default(),
        }
    }

    /// Machines come and go for this long.
    fn churn(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            std::thread::sleep(LOOK);
            let now = Instant::now();
            if self.visitors.len() + 1 < MOST && now >= self.comes {
                let dies = now + pareto(&mut self.random, self.settings.life, 1.1);
                self.visitors.push(Visitor { running: Self::node(&self.lab), seen: 0, dies, told: false });
                self.comes = now + pareto(&mut self.random, self.settings.absence, 1.2);
            }
            for at in 0..self.visitors.len() {
                if self.visitors[at].dies <= now && !self.visitors[at].told {
                    self.end_one(at);
                }
            }
            self.look();
        }
    }

    /// Half of them are told, the others just go, or sleep for a moment.
    fn end_one(&mut self, at: usize) {
        let visitor = &mut self.visitors[at];
        match self.random.between(0, 9) {
            0 => {
                self.stopped += 1;
                visitor.dies = Instant::now() + pareto(&mut self.random, self.settings.life, 1.1);
                visitor.running.signal(Signal::STOP);
                std::thread::sleep(Duration::from_millis(self.random.between(1, 1_000)));
                visitor.running.signal(Signal::CONT);
            }
            1..=5 => {
                self.told += 1;
                visitor.told = true;
                visitor.running.signal(Signal::TERM);
            }
            _ => {
                self.killed += 1;
                visitor.told = true;
                let workers = visitor.running.workers();
                visitor.running.signal(Signal::KILL);
                workers.into_iter().for_each(|pid| _ = kill_process(pid, Signal::KILL));
            }
        }
    }

    /// Reads what the nodes say, and lets go of those that have ended.
    fn look(&mut self) {
        self.work.hear(&self.anchor.heard(&mut self.seen));
        for visitor in &mut self.visitors {
            self.work.hear(&visitor.running.heard(&mut visitor.seen));
        }
        while let Some(at) = self.visitors.iter().position(|visitor| visitor.running.has_ended()) {
            let Visitor { running, seen, told, .. } = self.visitors.remove(at);
            let life = running.finish();
            self.work.hear(&life.events[seen..]);
            assert!(told, "a node left that was not told to\n{}", life.story());
            assert!(life.was_killed() || matches!(life.code(), Some(75 | 76)), "{}", life.story());
            assert!(!life.left_processes(), "workers outlive their node\n{}", life.story());
            self.came += 1;
        }
        assert!(!self.anchor.has_ended(), "the anchor has left");
    }

    /// All others leave; what the anchor holds once it goes on alone.
    fn alone(&mut self) -> Held {
        for visitor in self.visitors.iter_mut().filter(|visitor| !visitor.told) {
            visitor.told = true;
            visitor.running.signal(Signal::TERM);
        }
        let deadline = Instant::now() + LIMIT;
        while !self.visitors.is_empty() {
            assert!(Instant::now() < deadline, "nodes that were told to leave are still there");
            std::thread::sleep(LOOK);
            self.look();
        }
        let is_alone = |anchor: &Running| anchor.events("formed").last().is_some_and(|it| it.value["nodes"] == 1);
        self.anchor.wait_until("the anchor alone", || is_alone(&self.anchor));
        let saved = self.anchor.events("checkpoint").len();
        self.anchor.wait_until("two checkpoints", || self.anchor.events("checkpoint").len() >= saved + 2);
        let store = self.lab.server().address().port();
        let mut held = Held::of(self.anchor.pid(), store);
        for _ in 1..LOOKS {
            std::thread::sleep(LOOK);
            held = held.least(Held::of(self.anchor.pid(), store));
        }
        self.look();
        held
    }
}

/// What is in the store and belongs to nothing: folders of checkpoints that were pruned, folders that were never
/// committed, and heartbeats.
fn left_over(lab: &Lab, view: &View) -> (usize, usize, usize) {
    let keys = lab.keys(RUN, "checkpoints/");
    let folders: BTreeSet<&str> = keys.iter().filter_map(|key| key.split('/').nth(1)).collect();
    let name = |(step, generation): &(u64, u64)| format!("s{step:08}-g{generation:04}");
    let committed: BTreeSet<String> = view.committed.iter().map(name).collect();
    let standing: BTreeSet<String> = view.standing.keys().map(name).collect();
    let gone = folders.iter().filter(|folder| !standing.contains(**folder) && committed.contains(**folder)).count();
    let orphans = folders.iter().filter(|folder| !committed.contains(**folder)).count();
    (gone, orphans, lab.keys(RUN, "nodes/").len())
}

/// Runs a soak; a leak or a broken promise fails it.
pub fn run(settings: Settings) {
    println!("soak seed {:#018x}, {:.0?}", settings.seed, settings.time);
    let begun = Instant::now();
    let mut churn = Churn::new(settings);
    churn.churn(settings.time / 4);
    let before = churn.alone();
    churn.churn(settings.time - settings.time / 4);
    let after = churn.alone();
    let time = begun.elapsed().as_secs_f64();
    println!("  the anchor alone, after the warm-up {before:?}");
    println!("  the anchor alone, at the end        {after:?}");

    let endpoint = s3::client_env(&churn.lab.server().endpoint());
    churn.lab.about("drain", RUN).envs(&endpoint).finish().expect_code(0);
    let anchor = churn.anchor.finish().expect_code(75);
    let view = Auditor::apart().audit_group(&churn.lab, RUN, MOST as u32).expect("a sound run");
    let (gone, orphans, beats) = left_over(&churn.lab, &view);
    let unfinished = churn.lab.server().open_uploads();

    let mut gaps = churn.work.gaps.clone();
    gaps.sort_by(f64::total_cmp);
    let median = gaps.get(gaps.len() / 2).copied().unwrap_or_default();
    let worst = gaps.last().copied().unwrap_or_default();
    let generations = view.formed.len();
    let goodput = churn.work.seconds / time;
    let best = 1.0 - (gaps.iter().sum::<f64>() / time).min(1.0);
    let row = |name: &str, value: String| println!("  {name:<44} {value:>10}");
    row("seconds", format!("{time:.0}"));
    row("nodes that came", churn.came.to_string());
    row("  killed, told to leave, stopped", format!("{}, {}, {}", churn.killed, churn.told, churn.stopped));
    row("generations", generations.to_string());
    row("checkpoints", view.committed.len().to_string());
    row("steps", churn.work.done.len().to_string());
    row("  done again", churn.work.again.to_string());
    row("seconds from step to step over a change", format!("{median:.2}"));
    row("  at most", format!("{worst:.2}"));
    row("goodput, %", format!("{:.1}", 100.0 * goodput));
    row("  best possible with these changes, %", format!("{:.1}", 100.0 * best));
    row("folders of pruned checkpoints", gone.to_string());
    row("folders without a commit", orphans.to_string());
    row("heartbeats after the end", beats.to_string());
    row("unfinished uploads", unfinished.to_string());

    assert!(after.memory <= before.memory + MORE_MEMORY, "memory: {before:?}, {after:?}");
    assert!(after.descriptors <= before.descriptors + MORE_DESCRIPTORS, "descriptors: {before:?}, {after:?}");
    assert!(after.store <= POOL, "connections to the store: {before:?}, {after:?}");
    assert!(after.threads <= before.threads + MORE_THREADS, "threads: {before:?}, {after:?}");
    assert_eq!((after.children, after.zombies), (1, 0), "processes: {before:?}, {after:?}");
    assert!(!anchor.left_processes(), "{}", anchor.story());
    // What a killed node was just deleting or writing; each is garbage to the next `trainer prune`.
    assert!(gone + orphans <= generations, "objects that belong to nothing: {gone} and {orphans}");
    // Tombstones and heartbeats are removed when the next generation forms; none does.
    assert!(beats <= 2 * MOST, "heartbeats of nodes that are gone: {beats}");
}

#[test]
fn a_short_soak_leaks_nothing() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("SKIPPED: a_short_soak_leaks_nothing: scripts/test --all runs it");
        return;
    }
    let _turn = Turn::take();
    let (life, absence) = (Duration::from_secs(3), Duration::from_secs(2));
    run(Settings { seed: 11, time: Duration::from_secs(30), life, absence });
}

/// The long soak: see `scripts/torture`.
#[test]
#[ignore = "takes half an hour; scripts/torture runs it"]
fn soak_of_the_environment() {
    let seed = number("TORTURE_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    let time = Duration::from_secs(number("TORTURE_SOAK").unwrap_or(1_800));
    let (life, absence) = (Duration::from_secs(8), Duration::from_secs(4));
    run(Settings { seed, time, life, absence });
}
