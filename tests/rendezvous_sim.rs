//! The rendezvous of 3 to 1,000 nodes, simulated: the real machine and policy (`rendezvous::{seat, policy, membership,
//! cost}`) in a world with virtual time, a store with latency, links that break one way or both, machines that die,
//! stop and come back.
//!
//! `world.rs` is the world, and `host.rs` what an agent does for its machine. What the policy only asks for
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
        channel::LinkSettings,
        cost::{self, Requests},
        policy::Bounds,
    },
};

use world::{Bug, Fault, Host, Ms, Phase, Sim};

const SECOND: Ms = 1000;
const MINUTE: Ms = 60 * SECOND;
/// The time in which all nodes that reach each other must be in one generation.
const SETTLED: Ms = 8 * MINUTE;
/// Then nothing may change for so long.
const QUIET: Ms = 3 * MINUTE;

/// Workers end within this time.
const ENDING: Ms = 3 * SECOND;

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
        let at = if joins { 2 * MINUTE + below(6 * MINUTE) } else { below(4 * SECOND) };
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
    // From a stream of its own, so that the rest of a seed's life stays as it was.
    let mut rng = SplitMix64::named(seed, "workers");
    let mut below = |limit: u64| rng.next_u64() % limit;
    for _ in 0..below(3) {
        let (host, at) = (below(machines as u64) as Host, MINUTE + below(9 * MINUTE));
        sim.plan(at, Fault::Again(host));
        changes += 1;
    }
    sim.ending = ENDING;
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
        (seed, sim.wrong.clone(), trace, [sim.formed().len() as u64, changes, sim.in_vain])
    });
    let [formed, changes, in_vain] = [0, 1, 2].map(|of| told.iter().map(|life| life.3[of]).sum::<u64>());
    println!("{} lives: {formed} generations, {changes} changes, {in_vain} proposals in vain", told.len());
    let wrong: Vec<_> = told.iter().filter(|(_, wrong, ..)| !wrong.is_empty()).collect();
    for (seed, wrong, trace, ..) in wrong.iter().take(10) {
        println!("{}", trace.join("\n"));
        println!("seed {seed}: {}", wrong.join("; "));
    }
    assert!(wrong.is_empty(), "{} of {} lives go wrong", wrong.len(), told.len());
}

/// The machines of the newest generation, the leader first.
fn group(sim: &Sim) -> Vec<Host> {
    sim.newest().map(|formed| formed.members.iter().map(|node| sim.owner[*node]).collect()).unwrap_or_default()
}

/// A group of `machines`, formed and at work.
fn at_work(seed: u64, bug: Bug, bounds: Bounds, machines: usize) -> Sim {
    let mut sim = Sim::new(seed, bug, bounds, &vec![1; machines]);
    sim.ending = ENDING;
    sim.tracing = std::env::var_os("TRAINER_TESTS_TRACE").is_some();
    for host in 0..machines {
        let at = sim.below(2 * SECOND);
        sim.plan(at, Fault::Start(host));
    }
    sim.run(2 * MINUTE);
    sim
}

/// A partition of a group of `machines` for eight minutes: `near` of them stay with the leader.
fn partition(seed: u64, bug: Bug, min: u32, machines: usize, near: usize) -> Sim {
    let mut sim = at_work(seed, bug, bounds(min, machines as u32), machines);
    let before = group(&sim);
    if before.len() != machines {
        sim.wrong.push(format!("{} of {machines} nodes formed", before.len()));
        return sim;
    }
    let formed = sim.formed().len();
    let side = before[..near].iter().fold(0, |side, host| side | 1 << host);
    let (cut, heal) = (sim.now + 1, sim.now + 8 * MINUTE);
    part(&mut sim, side, cut, heal);
    sim.run(heal - 1);
    let (ended, after) = (sim.ended(), group(&sim));
    let (far, min) = (machines - near, min as usize);
    // Half is enough with the leader, more than half without; the bigger side may be too small, and then nobody trains.
    let side = if near >= far { &before[..near] } else { &before[near..] };
    let expected = if side.len() >= min { side } else { &[] };
    let now = if ended { &[][..] } else { &after[..] };
    let same = |a: &[Host], b: &[Host]| a.len() == b.len() && a.iter().all(|host| b.contains(host));
    if !same(now, expected) {
        sim.wrong.push(format!("{near}|{far}: {now:?} train, and not {expected:?}"));
    }
    let more = sim.formed().len() - formed;
    if more > usize::from(!expected.is_empty()) {
        sim.wrong.push(format!("{near}|{far}: {more} generations for one partition"));
    }
    let parted = sim.formed().len();
    sim.run(heal);
    settle(&mut sim);
    if sim.formed().len() > parted + 1 {
        sim.wrong.push(format!("{near}|{far}: {} generations for one healing", sim.formed().len() - parted));
    }
    sim
}

/// (the least nodes, machines, those that stay with the leader)
const PARTITIONS: [(u32, usize, usize); 11] = [
    (1, 3, 1),
    (2, 3, 1),
    (1, 3, 2),
    (2, 3, 2),
    (3, 3, 2),
    (1, 4, 2),
    (2, 4, 2),
    (3, 4, 2),
    (1, 2, 1),
    (2, 5, 2),
    (1, 5, 3),
];

fn told(worlds: Vec<(u64, Vec<String>, Vec<String>)>) {
    let wrong: Vec<_> = worlds.iter().filter(|(_, wrong, _)| !wrong.is_empty()).collect();
    for (seed, wrong, trace) in wrong.iter().take(5) {
        println!("{}\nseed {seed}: {}", trace.join("\n"), wrong.join("; "));
    }
    assert!(wrong.is_empty(), "{} of {} worlds go wrong", wrong.len(), worlds.len());
}

#[test]
fn of_two_sides_that_part_one_trains_and_nobody_takes_it_back_and_forth() {
    let few = PARTITIONS.len() as u64 * 3;
    told(on_two_threads(seeds(few, few * 25), |seed| {
        let (min, machines, near) = PARTITIONS[(seed % PARTITIONS.len() as u64) as usize];
        let sim = partition(seed, Bug::None, min, machines, near);
        (seed, sim.wrong, sim.trace)
    }));
}

/// One member stops hearing another one, or is not heard by it.
fn one_way(seed: u64) -> Sim {
    let mut sim = at_work(seed, Bug::None, bounds(1, 4), 4);
    let members = group(&sim);
    let formed = sim.formed().len();
    let (a, b) = (sim.below(4) as usize, 1 + sim.below(3) as usize);
    let (a, b) = (members[a], members[(a + b) % 4]);
    let (cut, heal) = (sim.now + 1, sim.now + 6 * MINUTE);
    for (up, at) in [(false, cut), (true, heal)] {
        sim.plan(at, Fault::Link { from: a, to: b, up });
    }
    sim.run(heal - 1);
    let lead = members[0] == a || members[0] == b;
    // Members other than the leader hold no channel; their collectives notice, and that is not simulated.
    let (now, more) = (group(&sim).len(), sim.formed().len() - formed);
    if (now, more) != (if lead { (3, 1) } else { (4, 0) }) {
        sim.wrong.push(format!("{now} nodes train after {more} generations"));
    }
    sim.run(heal);
    settle(&mut sim);
    if sim.formed().len() > formed + 2 * more {
        sim.wrong.push(format!("{} generations for one cut and its healing", sim.formed().len() - formed));
    }
    sim
}

#[test]
fn a_link_that_breaks_one_way_costs_one_node() {
    told(on_two_threads(seeds(20, 500), |seed| {
        let sim = one_way(seed);
        (seed, sim.wrong, sim.trace)
    }));
}

/// A leader whose beats do not arrive for a while, and two nodes outside that reach nobody. The first decides that the
/// leader is dead and is stopped at that moment; when it goes on, the leader has long been seen again.
fn buried_alive(seed: u64, bug: Bug) -> Sim {
    let mut sim = Sim::new(seed, bug, bounds(1, 1), &[1, 1, 1]);
    sim.tracing = std::env::var_os("TRAINER_TESTS_TRACE").is_some();
    sim.plan(0, Fault::Start(0));
    for host in [1, 2] {
        sim.plan(30 * SECOND, Fault::Start(host));
        let side = 1 << host;
        part(&mut sim, side, 60 * SECOND, 10 * MINUTE);
    }
    sim.plan(60 * SECOND, Fault::Trap { host: 1, pause: 100 * SECOND });
    for (host, until) in [(0, 170), (2, 200)] {
        for (up, at) in [(false, 120), (true, until)] {
            sim.plan(at * SECOND, Fault::Store { host, up });
        }
    }
    sim.run(10 * MINUTE);
    settle(&mut sim);
    sim
}

#[test]
fn a_node_that_slept_over_its_decision_harms_nobody() {
    told(on_two_threads(seeds(10, 200), |seed| {
        let sim = buried_alive(seed, Bug::None);
        (seed, sim.wrong, sim.trace)
    }));
}

/// The first world that goes wrong with a broken rule.
fn found(bug: Bug) -> Option<String> {
    for seed in 0..400 {
        let (min, machines, near) = PARTITIONS[(seed % PARTITIONS.len() as u64) as usize];
        for (what, wrong) in [
            ("partition", partition(seed, bug, min, machines, near).wrong),
            ("burial", buried_alive(seed, bug).wrong),
            ("life", judged(seed, bug).0.wrong),
        ] {
            if let Some(first) = wrong.first() {
                return Some(format!("{what}, seed {seed}: {first}"));
            }
        }
    }
    None
}

#[test]
fn every_broken_rule_is_found() {
    let bugs = [Bug::HalfIsEnough, Bug::Stranger, Bug::BuryFirst, Bug::Clocks, Bug::NoYield];
    let told = on_two_threads(0..bugs.len() as u64, |at| (bugs[at as usize], found(bugs[at as usize])));
    for (bug, found) in &told {
        println!("{bug:?}: {found:?}");
    }
    let missed: Vec<_> = told.iter().filter(|(_, found)| found.is_none()).map(|(bug, _)| bug).collect();
    assert!(missed.is_empty(), "{missed:?} were not found");
}

fn less(after: Requests, before: Requests) -> Requests {
    Requests {
        put: after.put - before.put,
        list: after.list - before.list,
        head: after.head - before.head,
        get: after.get - before.get,
    }
}

/// What a group of `nodes` costs and how long it takes, as a row of a table.
fn row(nodes: usize) -> (String, f64) {
    let count = nodes as u32;
    let bounds = bounds(count.div_ceil(3), count);
    let mut sim = Sim::new(7, Bug::None, bounds, &vec![1; nodes]);
    sim.tracing = std::env::var("TRAINER_TESTS_TRACE").is_ok_and(|of| of == nodes.to_string());
    for host in 0..nodes {
        let at = sim.below(2 * SECOND);
        sim.plan(at, Fault::Start(host));
    }
    let mut began = 0;
    while group(&sim).is_empty() && began < 10 * MINUTE {
        began += 50;
        sim.run(began);
    }
    let (formed, requests) = (sim.newest().map_or(0, |formed| formed.at), sim.requests);
    assert_eq!(group(&sim).len(), nodes, "all that were started together are together");
    // All have read the record, and the leader has heard of all.
    let leader = group(&sim)[0];
    while sim.hosts[leader].touch.len() < nodes && began < 10 * MINUTE {
        began += 10;
        sim.run(began);
    }
    let (together, messages) = (sim.now, sim.messages);
    assert_eq!(sim.hosts[leader].touch.len(), nodes);
    sim.run(3 * MINUTE);
    let (before, minutes) = (sim.requests, 20);
    sim.run((3 + minutes) * MINUTE);
    let spent = less(sim.requests, before);
    let day = spent.usd() * (24 * 60 / minutes) as f64;
    assert_eq!(sim.formed().len(), 1, "nothing happened: {}", sim.trace.join("\n"));
    // The leader's agent is killed; then the next one's machine is switched off.
    let mut lost = Vec::new();
    for refuses in [true, false] {
        let (leader, at, before) = (group(&sim)[0], sim.now, sim.formed().len());
        sim.plan(at, Fault::Kill { host: leader, refuses });
        sim.run(at + MINUTE);
        assert_eq!(sim.formed().len(), before + 1, "one loss, one generation: {}", sim.trace.join("\n"));
        lost.push((sim.newest().map_or(0, |formed| formed.at) - at) as f64 / 1e3);
        assert_eq!(group(&sim).len(), nodes - before);
        sim.run(at + 3 * MINUTE);
    }
    assert_eq!(sim.wrong, [""; 0]);
    let Requests { put, list, head, get } = requests;
    // Pings are not simulated: each side of the leader's idle links sends one so often.
    let pings = 2.0 * (nodes - 1) as f64 / LinkSettings::default().ping.as_secs_f64();
    let a_change = (sim.formed().len() - 1) as f64 / lost.len() as f64;
    let row = format!(
        "| {nodes} | {:.1} | {:.1} | {} | {:.5} | {:.4} | {:.2} | {:.2} | {:.1} | {a_change:.0} | {} | {pings:.0} |",
        formed as f64 / 1e3,
        together as f64 / 1e3,
        put + list + head + get,
        requests.usd(),
        day / nodes as f64,
        day,
        lost[0],
        lost[1],
        messages,
    );
    // A record a minute comes on top of what the header of `cost.rs` says.
    let records = 24.0 * 60.0 * cost::PUT;
    (row, day / (cost::usd_a_day(count, true) + records))
}

#[test]
fn what_a_group_costs_and_how_long_it_takes_to_form() {
    let sizes = [3, 16, 100, 1000];
    let rows = on_two_threads(0..4, |at| (at, row(sizes[at as usize])));
    println!(
        "| nodes | s to `formed` | s to all in touch | requests to it | USD | USD a node and day | USD a day | s from \
         kill -9 of the leader to `formed` | s from its power-off | generations a change | messages to form | \
         pings a second |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    );
    for at in 0..4 {
        let (_, (row, off)) = rows.iter().find(|(it, _)| *it == at).unwrap();
        println!("{row}");
        assert!((0.97..1.03).contains(off), "{off} of what cost.rs says: {row}");
    }
}
