//! The rendezvous of 3 to 1,000 nodes, simulated: the real policy (`rendezvous::{policy, membership, cost}`) in a world
//! with virtual time, a store with latency, links that break one way or both, machines that die, stop and come back.
//!
//! `world.rs` is the world, and `host.rs` the loop of an agent around the policy. What the policy only asks for
//! (liveness, politeness) is checked from outside: who leads at the end, how many generations a change costs, whether a
//! leader that works is taken over. What the journal ensures is checked where records land.
//!
//! Rules that are broken on purpose must be found ([`Bug`]).

#[path = "rendezvous_sim/host.rs"]
mod host;
#[path = "rendezvous_sim/world.rs"]
mod world;

use trainer::{
    random::SplitMix64,
    rendezvous::{
        cost::{self, Requests},
        policy::Bounds,
    },
};

use world::{Bug, Fault, Host, Ms, Phase, Sim};

const SECOND: Ms = 1000;
const MINUTE: Ms = 60 * SECOND;
/// The time in which all nodes that reach each other must be in one generation.
const SETTLED: Ms = 5 * MINUTE;
/// Then nothing may change for so long.
const QUIET: Ms = 3 * MINUTE;

const fn bounds(min: u32, max: u32) -> Bounds {
    Bounds { min, max, global_batch: 1 << 20, mixed: false }
}

/// A random life of a few machines; the changes that it saw, and the world.
fn life(seed: u64, bug: Bug) -> (Sim, u64) {
    let mut rng = SplitMix64::named(seed, "plan");
    let mut below = |limit: u64| rng.next_u64() % limit.max(1);
    let machines = 3 + below(4) as usize;
    let workers: Vec<u32> = (0..machines).map(|_| 1 + below(2) as u32).collect();
    let min = 1 + below(machines as u64) as u32;
    let max = (machines as u32 + 1 - below(3) as u32).max(min);
    let batch = if below(4) == 0 { 2 * min + below(3) as u32 } else { 64 };
    let mut sim = Sim::new(seed, bug, Bounds { global_batch: batch, ..bounds(min, max) }, &workers);
    let late = below(3) as usize;
    let mut changes = 1 + late as u64;
    for host in 0..machines {
        let joins = host + late >= machines;
        let at = if joins { 2 * MINUTE + below(6 * MINUTE) } else { below(8 * SECOND) };
        sim.plan(at, Fault::Start(host));
    }
    let end = 12 * MINUTE;
    for _ in 0..=below(6) {
        let (host, other) = (below(machines as u64) as Host, below(machines as u64) as Host);
        let at = MINUTE + below(9 * MINUTE);
        let until = |pause: Ms| (at + pause).min(end);
        changes += 2;
        match below(9) {
            0 | 1 => {
                sim.plan(at, Fault::Kill { host, refuses: below(2) == 0 });
                if below(4) > 0 {
                    sim.plan(until(3 * SECOND + below(100 * SECOND)), Fault::Start(host));
                }
            }
            2 => {
                sim.plan(at, Fault::Pause(host));
                sim.plan(until(SECOND + below(90 * SECOND)), Fault::Resume(host));
            }
            3 => {
                let back = until(SECOND + below(200 * SECOND));
                for (up, at) in [(false, at), (true, back)] {
                    sim.plan(at, Fault::Link { from: host, to: other, up });
                }
            }
            4 | 5 => {
                let side = below(1 << machines);
                let back = until(8 * SECOND + below(5 * MINUTE));
                part(&mut sim, side, at, back);
            }
            6 | 7 => {
                let all = below(2) == 0;
                let back = until(SECOND + below(100 * SECOND));
                for host in (0..machines).filter(|it| all || *it == host) {
                    for (up, at) in [(false, at), (true, back)] {
                        sim.plan(at, Fault::Store { host, up });
                    }
                }
            }
            _ => {
                sim.plan(at, Fault::Trap { host, pause: SECOND + below(60 * SECOND) });
                changes += 1;
            }
        }
    }
    for host in 0..machines {
        sim.plan(end, Fault::Resume(host));
        sim.plan(end, Fault::Store { host, up: true });
    }
    sim.tracing = std::env::var_os("TRAINER_TESTS_TRACE").is_some();
    sim.run(end);
    (sim, changes)
}

/// Cuts all links between the machines of `side` (a bit each) and the others.
fn part(sim: &mut Sim, side: u64, from: Ms, until: Ms) {
    let machines = sim.hosts.len();
    for a in 0..machines {
        for b in (0..machines).filter(|b| (side >> a & 1) != (side >> b & 1)) {
            for (up, at) in [(false, from), (true, until)] {
                sim.plan(at, Fault::Link { from: a, to: b, up });
            }
        }
    }
}

/// Whether all that live are together, one leads, and nothing changes any more.
fn settle(sim: &mut Sim) {
    let begin = sim.now;
    // Links that a plan cut later than it healed them.
    for a in 0..sim.hosts.len() {
        for b in 0..sim.hosts.len() {
            sim.plan(begin, Fault::Link { from: a, to: b, up: true });
        }
        sim.hosts[a].trap = None;
    }
    sim.run(begin + SETTLED);
    let before = sim.formed().len();
    sim.run(begin + SETTLED + QUIET);
    if sim.formed().len() != before {
        sim.wrong.push(format!("{} generations after all was well", sim.formed().len() - before));
    }
    let live: Vec<Host> = (0..sim.hosts.len()).filter(|host| sim.hosts[*host].up).collect();
    let leaders = live.iter().filter(|host| sim.hosts[**host].phase == Phase::Leader).count();
    let newest = sim.newest().cloned();
    let (min, max, batch) = (sim.bounds.min as usize, sim.bounds.max as usize, sim.bounds.global_batch);
    if live.len() < min {
        let led = leaders > 0 && !sim.ended();
        if led {
            sim.wrong.push(format!("{} nodes live, at least {min} are needed, and one leads", live.len()));
        }
        return;
    }
    let Some(newest) = newest.filter(|_| !sim.ended()) else {
        sim.wrong.push(format!("{} nodes live, {min} are enough, and no generation stands", live.len()));
        return;
    };
    if leaders != 1 {
        sim.wrong.push(format!("{leaders} nodes believe that they lead"));
    }
    let members: Vec<Host> = newest.members.iter().map(|node| sim.owner[*node]).collect();
    let alive = |node: &usize| sim.hosts[sim.owner[*node]].up && sim.hosts[sim.owner[*node]].node == *node;
    if !newest.members.iter().all(alive) {
        sim.wrong.push("a dead node is a member of the newest generation".into());
    }
    // As many as there is room for: nodes, and workers that have a sequence.
    let world: u32 = members.iter().map(|host| sim.hosts[*host].workers).sum();
    let fits = |host: &Host| members.len() < max && world + sim.hosts[*host].workers <= batch;
    let out: Vec<Host> = live.iter().copied().filter(|host| !members.contains(host)).filter(fits).collect();
    if !out.is_empty() {
        sim.wrong.push(format!("machines {out:?} live, there is room, and they are not members"));
    }
    let together = members.iter().all(|host| match sim.hosts[*host].phase {
        Phase::Leader => sim.hosts[*host].touch.len() == members.len(),
        Phase::Follower => !sim.hosts[*host].touch.is_empty(),
        Phase::Lost | Phase::Outside => false,
    });
    if !together {
        sim.wrong.push("members are not in touch with their leader".into());
    }
}

/// Runs a life to its end; generations and changes.
fn judged(seed: u64, bug: Bug) -> (Sim, u64) {
    let (mut sim, changes) = life(seed, bug);
    settle(&mut sim);
    let formed = sim.formed().len() as u64;
    if formed > changes {
        sim.wrong.push(format!("{formed} generations for {changes} changes"));
    }
    (sim, changes)
}

/// `TRAINER_TESTS_ALL` asks for the long form.
fn seeds(few: u64, many: u64) -> std::ops::Range<u64> {
    0..if std::env::var_os("TRAINER_TESTS_ALL").is_some() { many } else { few }
}

/// Runs `work` for each seed on two threads.
fn on_two_threads<T: Send>(seeds: std::ops::Range<u64>, work: impl Fn(u64) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let half = |odd| {
            let (seeds, work) = (seeds.clone(), &work);
            scope.spawn(move || seeds.filter(|seed| seed % 2 == odd).map(work).collect::<Vec<_>>())
        };
        let threads = [half(0), half(1)];
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn random_lives_end_together_and_change_no_more_than_they_must() {
    let one = std::env::var("TRAINER_TESTS_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let range = one.map_or(seeds(240, 9000), |seed| seed..seed + 1);
    let told = on_two_threads(range, |seed| {
        let (sim, changes) = judged(seed, Bug::None);
        let trace = if sim.wrong.is_empty() && one.is_none() { Vec::new() } else { sim.trace.clone() };
        (seed, sim.wrong.clone(), trace, sim.formed().len() as u64, changes)
    });
    let (formed, changes) = told.iter().fold((0, 0), |sum, (_, _, _, formed, all)| (sum.0 + formed, sum.1 + all));
    println!("{} lives: {formed} generations, {changes} changes", told.len());
    let wrong: Vec<_> = told.iter().filter(|(_, wrong, ..)| !wrong.is_empty()).collect();
    for (seed, wrong, trace, ..) in wrong.iter().take(10) {
        println!("{}", trace.join("\n"));
        println!("seed {seed}: {}", wrong.join("; "));
    }
    assert!(wrong.is_empty(), "{} of {} lives go wrong", wrong.len(), told.len());
}
