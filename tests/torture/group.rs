//! Runs of several nodes, tortured: agents of one run on this machine, each with one worker, of which any may be
//! killed, stopped, told to leave or starved of its store, several at once, while others come.
//!
//! A scenario is a pure function of its seed, as those of one node are ([`super::plan`]). It is a list of blows, each
//! at a moment that the group's events name; `stage` strikes them, sees to it that enough nodes are there to go on, and
//! lets the last ones end the run.

mod stage;

use std::{collections::BTreeSet, fmt, time::Duration};

use serde_json::{Value, json};

pub use self::stage::Stage;
use super::{
    audit::{Auditor, Promise},
    campaign::play_group,
    plan::{Moment, POINTS, Point, Process, Weather},
    random::Random,
    stage::RUN,
    tally::Tally,
};
use crate::support::{
    lab::{Lab, Store, Turn},
    proxy::{Fault, Often, Rule},
};

/// A node, by what it is when the blow falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whom {
    /// The one that leads.
    Leader,
    /// One of the others, by its place among them.
    Follower(u64),
}

/// What happens to nodes.
#[derive(Clone, Debug)]
pub enum Strike {
    /// SIGKILL to these agents at once.
    Kill {
        /// The nodes.
        whom: Vec<Whom>,
        /// Whether their workers are killed, too, as by a power cut.
        whole: bool,
    },
    /// SIGKILL to every agent.
    KillAll {
        /// Whether their workers are killed, too.
        whole: bool,
    },
    /// SIGKILL to a node's worker.
    Worker(Whom),
    /// SIGSTOP, then SIGCONT.
    Stop {
        /// The node.
        whom: Whom,
        /// Whether its worker is stopped, too.
        whole: bool,
        /// The time between both; a group that has formed anew without it ends that time, too.
        time: Duration,
    },
    /// SIGTERM to these agents, then perhaps SIGKILL.
    Terminate {
        /// The nodes.
        whom: Vec<Whom>,
        /// SIGKILL after this time.
        kill_after: Option<Duration>,
    },
    /// SIGTERM to every agent.
    TerminateAll,
    /// One more node comes.
    Newcomer,
    /// The store behaves like this for one node, until the next blow.
    Weather(Whom, Weather),
}

/// When the nodes that a blow has cost are replaced. Fewer than the group needs are replaced at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refill {
    /// At once.
    Now,
    /// After the next generation of the others.
    Later,
    /// Not at all.
    Never,
}

/// A crash point that is armed in a node.
#[derive(Clone, Copy, Debug)]
pub struct Armed {
    /// The point.
    pub point: &'static Point,
    /// It strikes the n-th time that it is passed.
    pub hit: u64,
    /// It falls asleep there for this time; `None`: SIGKILL.
    pub sleeps: Option<Duration>,
}

/// One blow.
#[derive(Clone, Debug)]
pub struct Blow {
    /// The moment, counted from the blow before.
    pub at: Moment,
    /// What happens.
    pub strike: Strike,
    /// What happens then.
    pub refill: Refill,
}

/// One run of several nodes.
#[derive(Clone, Debug)]
pub struct GroupScenario {
    /// The seed of all of it.
    pub seed: u64,
    /// The store: S3 through a proxy for each node, or a folder.
    pub on_s3: bool,
    /// The nodes that it begins and ends with, and the most of a generation.
    pub nodes: u32,
    /// The fewest.
    pub min: u32,
    /// Steps from checkpoint to checkpoint.
    pub every: u64,
    /// Checkpoints that are kept.
    pub keep: u64,
    /// The blows, in order.
    pub blows: Vec<Blow>,
    /// What is armed in the n-th node that starts.
    pub armed: Vec<Option<Armed>>,
}

impl GroupScenario {
    /// The scenario of a seed, with 2 to `most` nodes.
    pub fn of(seed: u64, most: u32) -> Self {
        let mut random = Random::new(seed ^ 0x6772_6f75_7073);
        let on_s3 = random.percent(40);
        let nodes = random.between(2, u64::from(most.max(2))) as u32;
        let min = random.between(1, u64::from(nodes.min(2))) as u32;
        let (every, keep) = (random.between(1, 6), random.between(1, 3));
        let mut workers = 0;
        let blows = (0..random.between(4, 9)).map(|_| blow(&mut random, nodes, on_s3, &mut workers)).collect();
        let armed = (0..20).map(|_| random.percent(15).then(|| Armed::of(&mut random))).collect();
        Self { seed, on_s3, nodes, min, every, keep, blows, armed }
    }
}

impl Armed {
    fn of(random: &mut Random) -> Self {
        let agents: Vec<&'static Point> = POINTS.iter().filter(|point| point.of == Process::Agent).collect();
        let point = *random.one_of(&agents);
        let hit = random.between(1, 2 * point.hits);
        let sleeps = random.percent(40).then(|| nap(random));
        Self { point, hit, sleeps }
    }
}

/// Most naps are shorter than the silence after which a node counts as lost; some are much longer.
fn nap(random: &mut Random) -> Duration {
    Duration::from_millis(match random.between(0, 9) {
        0..=5 => random.between(1, 2_500),
        6 | 7 => random.between(4_000, 8_000),
        _ => random.between(15_000, 40_000),
    })
}

fn whom(random: &mut Random) -> Whom {
    if random.percent(45) { Whom::Leader } else { Whom::Follower(random.next()) }
}

/// At least two of them.
fn several(random: &mut Random, nodes: u32) -> Vec<Whom> {
    let followers = (0..random.between(1, u64::from(nodes - 1))).map(Whom::Follower);
    let leader = random.percent(60).then_some(Whom::Leader);
    leader.into_iter().chain(followers).collect()
}

fn blow(random: &mut Random, nodes: u32, on_s3: bool, workers: &mut u32) -> Blow {
    let strike = match random.between(0, 99) {
        0..=34 => Strike::Kill { whom: vec![whom(random)], whole: random.percent(60) },
        35..=44 => Strike::Kill { whom: several(random, nodes), whole: random.percent(60) },
        45..=50 => Strike::KillAll { whole: random.percent(60) },
        // A worker that dies again and again ends a run.
        51..=60 if *workers < 3 => {
            *workers += 1;
            Strike::Worker(whom(random))
        }
        51..=70 => Strike::Stop { whom: whom(random), whole: random.percent(60), time: nap(random) },
        71..=80 => {
            let whom = if random.percent(60) { vec![whom(random)] } else { several(random, nodes) };
            let kill_after = random.percent(40).then(|| Duration::from_micros(random.between(0, 300_000)));
            Strike::Terminate { whom, kill_after }
        }
        81..=84 => Strike::TerminateAll,
        85..=99 if on_s3 => Strike::Weather(whom(random), Weather::draw(random)),
        _ => Strike::Newcomer,
    };
    let at = match random.between(0, 9) {
        0 | 1 => Moment { kind: None, nth: 0, delay: Duration::from_micros(random.between(0, 900_000)) },
        2 | 3 => Moment::of(random, "formed", 1, 500_000),
        4..=6 => Moment::of(random, "checkpoint", 2, 25_000),
        _ => Moment::of(random, "step", 12, 25_000),
    };
    let refill = match random.between(0, 9) {
        0..=4 => Refill::Now,
        5..=8 => Refill::Later,
        _ => Refill::Never,
    };
    Blow { at, strike, refill }
}

impl fmt::Display for Whom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leader => f.write_str("leader"),
            Self::Follower(which) => write!(f, "follower {}", which % 100),
        }
    }
}

impl fmt::Display for Armed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}@hit={}", self.point.name, if self.sleeps.is_some() { "stop" } else { "kill" }, self.hit)
    }
}

impl fmt::Display for Strike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = |nodes: &[Whom]| nodes.iter().map(Whom::to_string).collect::<Vec<_>>().join(" and ");
        let whole = |whole: &bool| if *whole { " whole" } else { "" };
        match self {
            Self::Kill { whom, whole: of } => write!(f, "kill{} {}", whole(of), all(whom)),
            Self::KillAll { whole: of } => write!(f, "kill{} all nodes", whole(of)),
            Self::Worker(whom) => write!(f, "kill the worker of {whom}"),
            Self::Stop { whom, whole: of, time } => write!(f, "stop{} {whom} for {time:.1?}", whole(of)),
            Self::Terminate { whom, kill_after: None } => write!(f, "SIGTERM to {}", all(whom)),
            Self::Terminate { whom, kill_after: Some(time) } => {
                write!(f, "SIGTERM to {}, SIGKILL after {time:.1?}", all(whom))
            }
            Self::TerminateAll => write!(f, "SIGTERM to all nodes"),
            Self::Newcomer => write!(f, "a newcomer"),
            Self::Weather(whom, weather) => write!(f, "for {whom}:{weather}"),
        }
    }
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}, others come {:?}", self.strike, self.at, self.refill)
    }
}

impl fmt::Display for GroupScenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { on_s3, nodes, min, every, keep, .. } = self;
        write!(f, "{} nodes={min}:{nodes} every={every} keep={keep}", if *on_s3 { "s3" } else { "file" })
    }
}

/// Plays a scenario; any broken promise fails the test.
#[track_caller]
fn played(scenario: &GroupScenario) -> Tally {
    let _turn = Turn::take();
    let (tally, result) = play_group(scenario, &|| true);
    if let Err((violation, kept)) = result {
        panic!("{violation}\nkept: {}", kept.display());
    }
    tally
}

/// Three nodes, so that a leader's loss leaves more than half of them: half of them would first wait half a minute.
fn of_three(on_s3: bool, blows: Vec<Blow>, armed: Vec<Option<Armed>>) -> GroupScenario {
    GroupScenario { seed: 0, on_s3, nodes: 3, min: 1, every: 4, keep: 2, blows, armed }
}

fn blow_at(at: Moment, strike: Strike) -> Blow {
    Blow { at, strike, refill: Refill::Now }
}

#[test]
fn a_group_with_any_node_killed_or_told_to_leave_ends_like_the_undisturbed_run() {
    let kill = |whom, whole| Strike::Kill { whom: vec![whom], whole };
    let tally = played(&of_three(
        false,
        vec![
            blow_at(Moment::after("checkpoint", 2), kill(Whom::Leader, false)),
            blow_at(Moment::after("step", 5), Strike::Worker(Whom::Leader)),
            blow_at(Moment::after("step", 5), kill(Whom::Follower(1), true)),
            blow_at(
                Moment::after("checkpoint", 1),
                Strike::Terminate { whom: vec![Whom::Follower(0)], kill_after: None },
            ),
        ],
        Vec::new(),
    ));
    for whom in ["leader", "follower", "worker"] {
        assert!(tally.kills_of(whom) > 0, "no {whom} was killed: {tally}");
    }
    assert!(tally.generations > 3 && tally.left > 0, "{tally}");
}

#[test]
fn a_group_with_crash_points_sleepers_and_a_bad_store_ends_like_the_undisturbed_run() {
    let point = |name| POINTS.iter().find(|point| point.name == name).expect("a crash point");
    let dies = Armed { point: point("save.after-receipt"), hit: 2, sleeps: None };
    let sleeps = Armed { point: point("save.before-record"), hit: 1, sleeps: Some(Duration::from_millis(300)) };
    let often = Rule { method: "", target: "", fault: Fault::SlowDown, often: Often::Percent(10) };
    let weather = Weather { rules: vec![often], ..Weather::default() };
    let time = Duration::from_millis(300);
    let tally = played(&of_three(
        true,
        vec![
            blow_at(Moment::after("formed", 2), Strike::Weather(Whom::Leader, weather)),
            blow_at(Moment::after("checkpoint", 1), Strike::Stop { whom: Whom::Follower(0), whole: true, time }),
            blow_at(Moment::after("step", 5), Strike::Newcomer),
        ],
        vec![Some(dies), Some(sleeps), Some(sleeps)],
    ));
    // Everybody passes it, whoever leads.
    assert_eq!(tally.kills_of("save.after-receipt"), 1, "{tally}");
    assert!(tally.generations > 1 && tally.sleepers > 0, "{tally}");
}

#[test]
fn a_scenario_of_a_group_is_a_function_of_its_seed() {
    let told = |seed| {
        let scenario = GroupScenario::of(seed, 4);
        let blows = scenario.blows.iter().map(ToString::to_string);
        let armed = scenario.armed.iter().flatten().map(ToString::to_string);
        format!("{scenario}: {}", blows.chain(armed).collect::<Vec<_>>().join("; "))
    };
    let all: BTreeSet<String> = (0..300).map(told).collect();
    assert_eq!(all.len(), 300, "every seed is another scenario");
    assert_eq!(told(7), told(7));
    let text = all.into_iter().collect::<Vec<_>>().join("\n");
    for point in POINTS.iter().filter(|point| point.of == Process::Agent) {
        for what in ["kill", "stop"] {
            assert!(text.contains(&format!("{}={what}@", point.name)), "{} is never drawn as {what}", point.name);
        }
    }
    for what in [
        "nodes=1:2 ",
        "nodes=2:2 ",
        "nodes=1:4 ",
        "nodes=2:4 ",
        "kill leader",
        "kill whole leader",
        "kill follower",
        "kill leader and follower",
        "kill all nodes",
        "kill whole all nodes",
        "kill the worker of",
        "stop leader",
        "stop whole leader",
        "SIGTERM to leader",
        "SIGTERM to follower",
        "SIGTERM to all nodes",
        "SIGKILL after",
        "a newcomer",
        "for leader:",
        "come Now",
        "come Later",
        "come Never",
    ] {
        assert!(text.contains(what), "{what} is never drawn");
    }
}

/// The auditor knows who may write what in a group.
#[test]
fn the_auditor_sees_what_no_member_of_a_group_may_write() {
    let formed = |generation: u64, nodes: &[&str], more: &Value| {
        let roster: Vec<Value> = nodes.iter().map(|node| json!({"node": node, "workers": 1})).collect();
        let mut record = json!({
            "kind": "formed", "generation": generation, "roster": roster, "world_size": nodes.len(), "resume": null
        });
        let more = more.as_object().cloned().unwrap_or_default();
        record.as_object_mut().expect("an object").extend(more);
        (nodes.first().copied().unwrap_or("a").to_owned(), record)
    };
    let says = |node: &str, record: Value| (node.to_owned(), record);
    let commit = |node, generation| {
        says(
            node,
            json!({"kind": "committed", "generation": generation, "step": 4, "manifest": "m", "manifest_crc64": "0"}),
        )
    };
    let end =
        |node, kind| says(node, json!({"kind": kind, "generation": 1, "step": 0, "lost_steps": 0, "reason": "x"}));
    let first = || formed(1, &["a", "b"], &Value::Null);
    let without_a = || formed(2, &["b"], &json!({"continues": 1, "gone": [{"node": "a", "why": "x"}]}));
    let audit = |more: Vec<(String, Value)>| {
        let lab = Lab::on_files_at_once();
        let Store::File(store) = &lab.store else { unreachable!("made on files") };
        let folder = store.join(RUN).join("journal");
        std::fs::create_dir_all(&folder).expect("the journal's folder");
        let created = says("a", json!({"kind": "created"}));
        for (number, (node, record)) in [created, first()].into_iter().chain(more).enumerate() {
            let text = json!({"format": 4, "node": node, "record": record}).to_string();
            std::fs::write(folder.join(format!("{number:020}.json")), text).expect("write a record");
        }
        Auditor::default().audit_group(&lab, RUN, 2).err().map(|found| (found.promise, found.how))
    };
    // This is what they may write.
    let notice = || says("a", json!({"kind": "notice", "generation": 1}));
    assert_eq!(audit(vec![notice(), without_a()]), None);
    assert_eq!(audit(vec![end("a", "interrupted"), formed(2, &["b", "a"], &Value::Null)]), None);
    assert_eq!(audit(vec![formed(2, &["a", "b"], &json!({"continues": 1}))]), None);
    let late = formed(2, &["b", "c"], &json!({"continues": 1, "gone": [{"node": "a", "why": "x"}], "joined": ["c"]}));
    assert_eq!(audit(vec![late]), None);
    // A member's commit stands, so its files are missed.
    let found = audit(vec![commit("b", 1)]).expect("it has no files");
    assert_eq!(found.0, Promise::LostCheckpoint, "{}", found.1);

    for (promise, what, more) in [
        (Promise::DoubleCommit, "a commit by a stranger", vec![commit("c", 1)]),
        (Promise::DoubleCommit, "a commit of one that was left out", vec![without_a(), commit("a", 2)]),
        (Promise::DoubleCommit, "a commit for an old generation", vec![without_a(), commit("b", 1)]),
        (Promise::DoubleCommit, "two commits of a step", vec![commit("a", 1), commit("b", 1)]),
        (Promise::DoubleCommit, "an end by a follower", vec![end("b", "interrupted")]),
        (Promise::DoubleCommit, "a completion by a follower", vec![end("b", "completed")]),
        (Promise::DoubleCommit, "a failure by a follower", vec![end("b", "failed")]),
        (Promise::DoubleCommit, "a record after the end", vec![end("a", "completed"), notice()]),
        (Promise::DoubleCommit, "a generation twice", vec![formed(1, &["a"], &Value::Null)]),
        (
            Promise::DoubleCommit,
            "a generation formed by a follower",
            vec![("b".to_owned(), formed(2, &["a", "b"], &Value::Null).1)],
        ),
        (
            Promise::DamagedResume,
            "a resume from what is not there",
            vec![formed(2, &["a"], &json!({"resume": {"step": 4, "generation": 1}}))],
        ),
        (Promise::Other, "a loss that nobody accounts for", vec![formed(2, &["b"], &json!({"continues": 1}))]),
        (
            Promise::Other,
            "a newcomer that nobody announces",
            vec![formed(2, &["b", "c"], &json!({"continues": 1, "gone": [{"node": "a", "why": "x"}]}))],
        ),
        (
            Promise::Other,
            "a used name",
            vec![without_a(), formed(3, &["b", "a"], &json!({"continues": 2, "joined": ["a"]}))],
        ),
        (Promise::Other, "more nodes than there may be", vec![formed(2, &["a", "b", "c"], &Value::Null)]),
        (Promise::Other, "another world", vec![formed(2, &["a", "b"], &json!({"world_size": 3}))]),
        (Promise::Other, "a node twice", vec![formed(2, &["a", "a"], &Value::Null)]),
        (
            Promise::Other,
            "a complete run that is continued",
            vec![end("a", "completed"), formed(2, &["a", "b"], &json!({"continues": 1}))],
        ),
        (
            Promise::LostCheckpoint,
            "lost steps that do not add up",
            vec![says("a", json!({"kind": "interrupted", "generation": 1, "step": 7, "lost_steps": 3}))],
        ),
        (
            Promise::LostCheckpoint,
            "a completion at what is no checkpoint",
            vec![says("a", json!({"kind": "completed", "generation": 1, "step": 300}))],
        ),
    ] {
        let found = audit(more).unwrap_or_else(|| panic!("{what} was not seen"));
        assert_eq!(found.0, promise, "{what}: {}", found.1);
    }
}
