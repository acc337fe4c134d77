//! Torture: runs that are killed, stopped, raced and starved of their store again and again, and must end as if nothing
//! had happened.
//!
//! `plan` draws the disturbances from a seed, `stage` carries them out, `audit` reads the store from outside after
//! every life, `campaign` plays many scenarios and counts. The tests here are a short campaign that contains everything
//! once; `scripts/torture` runs a long one.
//!
//! A SIGKILL leaves the page cache intact, so this does not test what a power cut does to unsynced files.

mod audit;
mod campaign;
mod group;
mod plan;
mod random;
mod soak;
mod stage;
mod streams;
mod tally;

use std::{collections::BTreeSet, time::Duration};

use self::{
    audit::{Auditor, Promise, crc64},
    campaign::{Bounds, play},
    plan::{Action, Disturbance, Garbling, KINDS, Life, Moment, POINTS, Scenario, Sharing, Weather},
    random::Random,
    stage::{RUN, undisturbed},
    tally::Tally,
};
use crate::support::{
    lab::{Turn, scratch},
    mounts::Namespace,
    proxy::Often,
};

/// Plays a scenario when it is its turn; any broken promise fails the test.
#[track_caller]
fn played(scenario: &Scenario) -> Tally {
    let _turn = Turn::take();
    let (tally, result) = play(scenario, &|| true);
    if let Err((violation, kept)) = result {
        panic!("{violation}\nkept: {}", kept.display());
    }
    tally
}

fn calm(disturbance: Disturbance) -> Life {
    Life { disturbance, then: None, weather: None }
}

fn scenario(on_s3: bool, ranks: u32, lives: Vec<Life>) -> Scenario {
    Scenario { seed: 0, on_s3, ranks, sharing: Sharing::Ddp, every: 2, keep: 2, lives }
}

#[test]
fn a_run_that_dies_at_every_crash_point_ends_like_the_undisturbed_one() {
    let at = |point| calm(Disturbance::Point { point, action: Action::Kill, hit: 3 });
    let tally = played(&scenario(false, 2, POINTS.iter().map(at).collect()));
    for point in POINTS {
        assert!(tally.kills_of(point.name) > 0, "nothing died at {}: {tally}", point.name);
    }
}

#[test]
fn a_crash_point_that_panics_or_fails_loses_nothing() {
    let at = |action| move |point| calm(Disturbance::Point { point, action, hit: 3 });
    played(&scenario(false, 1, POINTS.iter().map(at(Action::Panic)).collect()));
    played(&scenario(false, 1, POINTS.iter().map(at(Action::Error)).collect()));
}

#[test]
fn a_run_with_any_process_killed_ends_like_the_undisturbed_one() {
    let (early, late) = (Moment::after("formed", 1), Moment::after("step", 9));
    let saving = Moment { delay: Duration::from_millis(2), ..Moment::after("upload", 9) };
    let saved = Moment::after("checkpoint", 3);
    let tally = played(&scenario(
        false,
        2,
        vec![
            calm(Disturbance::Agent(early)),
            calm(Disturbance::Both(late)),
            calm(Disturbance::Workers(vec![(late, 1), (saved, 0), (early, 1)])),
            calm(Disturbance::Agent(saving)),
            calm(Disturbance::Terminate { at: late, kill_after: Some(Duration::from_millis(5)) }),
            calm(Disturbance::Both(saved)),
        ],
    ));
    for whom in ["agent", "both", "worker"] {
        assert!(tally.kills_of(whom) > 0, "no {whom} was killed: {tally}");
    }
}

#[test]
fn a_run_whose_ranks_share_the_state_ends_like_the_undisturbed_one_whoever_is_killed() {
    let point = |name: &str| POINTS.iter().find(|point| point.name == name).expect("a crash point");
    let at = |name| calm(Disturbance::Point { point: point(name), action: Action::Kill, hit: 3 });
    let saved = Moment::after("checkpoint", 2);
    for sharing in [Sharing::Zero1, Sharing::Shard] {
        // Workers that die are restarted within their life, which then comes to the end.
        let lives = vec![
            calm(Disturbance::Both(saved)),
            at("save.after-shard"),
            calm(Disturbance::Terminate { at: Moment::after("step", 7), kill_after: None }),
            at("save.after-manifest"),
            calm(Disturbance::Workers(vec![(Moment::after("step", 9), 1), (Moment::after("checkpoint", 3), 0)])),
        ];
        let tally = played(&Scenario { sharing, ..scenario(false, 2, lives) });
        for whom in ["both", "worker", "save.after-shard", "save.after-manifest"] {
            assert!(tally.kills_of(whom) > 0, "{sharing:?}: nobody was killed as {whom}: {tally}");
        }
    }
}

#[test]
fn a_run_on_a_store_with_every_fault_ends_like_the_undisturbed_one() {
    let mut random = Random::new(7);
    let mut life = |kind| {
        let mut weather = Weather { latency: Duration::ZERO, ..Weather::of_kind(kind, &mut random) };
        // A restore makes a dozen requests; each fault must certainly occur.
        if matches!(kind, 4 | 7 | 8) {
            weather.rules[0].often = Often::Percent(40);
        }
        // A save, if writes break; otherwise a restore is enough.
        let writes = kind == 0 || weather.rules.iter().any(|rule| rule.method == "PUT");
        let at = if writes { Moment::after("checkpoint", 1) } else { Moment::after("step", 2) };
        Life { disturbance: Disturbance::Both(at), then: None, weather: Some(weather) }
    };
    let lives: Vec<Life> = (0..KINDS).map(&mut life).collect();
    let tally = played(&Scenario { every: 4, ..scenario(true, 1, lives) });
    for kind in ["503", "reset", "cut request", "cut response", "flipped bit", "stall", "lost answer", "stale read"] {
        assert!(tally.faults_of(kind) > 0, "the store had no {kind}: {tally}");
    }
}

/// One request of every kind hangs for seconds, and deletions forever, while the run is asked to stop.
#[test]
fn a_run_with_hanging_requests_is_saved_whole_whenever_it_is_asked_to_stop() {
    let at = |nth| Disturbance::Terminate { at: Moment::after("checkpoint", nth), kill_after: None };
    let weather = Some(Weather::of_stalls(Duration::from_secs(3)));
    let stalled = |disturbance| Life { disturbance, then: None, weather: weather.clone() };
    let tally = played(&Scenario { every: 4, keep: 1, ..scenario(true, 1, vec![stalled(at(3))]) });
    assert!(tally.faults_of("long stall") > 6, "{tally}");
}

#[test]
fn writers_that_sleep_or_race_commit_nothing_that_is_not_theirs() {
    let at = Moment::after("checkpoint", 2);
    let tally = played(&scenario(
        false,
        1,
        vec![
            calm(Disturbance::Rivals { lag: Duration::ZERO, kill: Some((false, at)) }),
            calm(Disturbance::Nap { at, whole: true, time: Duration::from_millis(100) }),
            calm(Disturbance::Rivals { lag: Duration::from_millis(50), kill: None }),
        ],
    ));
    assert!(tally.lives >= 3, "{tally}");
    let overtaken = Disturbance::Overtaken { at, whole: false, kill_heir: Some(at) };
    // Each point is reached even if a busy machine skips all saves but the last: a run's third record is a commit.
    let asleep = |point, hit| {
        let point = POINTS.iter().find(|known| known.name == point).expect("a crash point");
        Disturbance::Asleep { point, hit, kill_heir: at }
    };
    let lives = [overtaken, asleep("journal.before-append", 3), asleep("save.before-record", 1)];
    // Each waits seconds for the sleeper's heartbeat and needs almost no CPU, so they run side by side.
    let tallies = std::thread::scope(|scope| {
        let plays = lives.map(|life| {
            let scenario = scenario(false, 2, vec![calm(life)]);
            scope.spawn(move || play(&scenario, &|| true))
        });
        plays.map(|play| play.join().expect("a scenario"))
    });
    for (tally, result) in tallies {
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(tally.fenced, 1, "{tally}");
    }
}

#[test]
fn a_run_with_garbling_machines_and_a_lost_disk_ends_like_the_undisturbed_one() {
    let (saved, late) = (Moment::after("checkpoint", 2), Moment::after("step", 9));
    let mut lives = vec![calm(Disturbance::Agent(saved))];
    lives.extend(Garbling::EVERY.map(|how| calm(Disturbance::Garbled(how))));
    lives.push(calm(Disturbance::Unmounted(late)));
    let tally = played(&scenario(false, 1, lives));
    assert_eq!(tally.machines_of("garbling, found out"), 3, "{tally}");
    assert_eq!(tally.machines_of("garbling, all is damaged"), 1, "{tally}");
    if Namespace::with_folder_at(scratch(), scratch()).is_some() {
        assert_eq!(tally.machines_of("store unmounted"), 1, "{tally}");
    }
    let lives = vec![calm(Disturbance::Agent(saved)), calm(Disturbance::Garbled(Garbling::Slot))];
    let tally = played(&scenario(true, 1, lives));
    assert_eq!(tally.machines_of("garbling, found out"), 1, "{tally}");
}

/// The long campaign: see `scripts/torture`.
#[test]
#[ignore = "takes minutes; scripts/torture runs it"]
fn campaign_of_the_environment() {
    assert!(campaign::run(&Bounds::of_environment()), "a promise was broken");
}

#[test]
fn a_scenario_is_a_function_of_its_seed() {
    let told = |seed| {
        let scenario = Scenario::of(seed);
        let lives: Vec<String> = scenario.lives.iter().map(ToString::to_string).collect();
        format!("{scenario}: {}", lives.join("; "))
    };
    let all: BTreeSet<String> = (0..200).map(told).collect();
    assert_eq!(all.len(), 200, "every seed is another scenario");
    assert_eq!(told(7), told(7));
    // These are all disturbances that the long campaign may draw.
    let text = all.into_iter().collect::<Vec<_>>().join("\n");
    for point in POINTS {
        assert!(text.contains(point.name), "{} is never drawn", point.name);
    }
    for what in [
        "kill agent",
        "kill both",
        "kill worker",
        "SIGTERM",
        "stop agent",
        "stop all",
        "take over",
        "heir",
        "=stop",
        "rivals",
        "garble bulk",
        "garble slot",
        "garble disk",
        "garble all",
        "unmount",
        "hang 1 ",
        "hang all",
    ] {
        assert!(text.contains(what), "{what} is never drawn");
    }
}

#[test]
fn the_auditor_has_its_own_checksum() {
    // The check value of CRC-64/NVME.
    assert_eq!(crc64(b"123456789"), "ae8b14860a799888");
}

/// The auditor misses nothing that it must see.
#[test]
fn the_auditor_sees_what_is_lost_changed_or_written_twice() {
    let _turn = Turn::take();
    let (lab, _) = undisturbed(1, Sharing::Ddp);
    let journal = lab.keys(RUN, "journal/");
    let newest = lab.newest_checkpoint(RUN);
    let weights = lab.keys(RUN, &format!("{newest}/model-")).pop().expect("weights");
    let commit = |key: &&String| String::from_utf8_lossy(&lab.read(RUN, key)).contains("\"committed\"");
    let commit = journal.iter().rfind(commit).expect("a commit").clone();
    let mut auditor = Auditor::default();
    auditor.audit(&lab, RUN, 1).expect("a run that nobody has touched");

    // Each harm is undone before the next.
    let mut harmed = |key: &str, harm: &dyn Fn(&mut Vec<u8>), promise: Promise| {
        let whole = lab.read(RUN, key);
        for fresh in [false, true] {
            lab.damage(RUN, key, harm);
            let seen = if fresh { Auditor::default().audit(&lab, RUN, 1) } else { auditor.audit(&lab, RUN, 1) };
            lab.damage(RUN, key, |bytes| bytes.clone_from(&whole));
            let found = seen.err().map(|violation| violation.promise);
            // A careful change shows only to an auditor that has seen the object before.
            assert!(found == Some(promise) || (fresh && found.is_none() && key == journal[0]), "{key}: {found:?}");
        }
    };
    harmed(&weights, &|bytes| *bytes.last_mut().expect("a byte") ^= 1, Promise::LostCheckpoint);
    harmed(&weights, &|bytes| bytes.truncate(100), Promise::LostCheckpoint);
    harmed(&format!("{newest}/manifest.json"), &|bytes| bytes.push(b' '), Promise::LostCheckpoint);
    harmed(&journal[0], &|bytes| bytes.push(b' '), Promise::LostCheckpoint);

    // Another node, a fenced generation, a step that was committed before.
    let text = String::from_utf8(lab.read(RUN, &commit)).expect("JSON");
    let node = text.split("\"node\":\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a node").to_owned();
    let forged = |change: &dyn Fn(&str) -> String| {
        lab.damage(RUN, &commit, |bytes| *bytes = change(&text).into_bytes());
        let seen = Auditor::default().audit(&lab, RUN, 1);
        lab.damage(RUN, &commit, |bytes| *bytes = text.clone().into_bytes());
        seen.expect_err("a forged record").promise
    };
    assert_eq!(forged(&|text| text.replace(&node, "n000000000000")), Promise::DoubleCommit);
    assert_eq!(forged(&|text| text.replace("\"generation\":1", "\"generation\":0")), Promise::DoubleCommit);
    assert_eq!(forged(&|text| text.replace("\"step\":300", "\"step\":1")), Promise::DoubleCommit);

    lab.remove(RUN, &weights);
    assert_eq!(auditor.audit(&lab, RUN, 1).expect_err("a hole").promise, Promise::LostCheckpoint);
    lab.remove(RUN, &journal[1]);
    assert_eq!(auditor.audit(&lab, RUN, 1).expect_err("a gap").promise, Promise::LostCheckpoint);
}

/// Names of crash points in the source: the text that follows `faults::check(`, or a call of a function that passes its
/// argument on to it.
fn points_of_the_source() -> BTreeSet<String> {
    let sources = crate::rules::sources();
    let bodies: Vec<String> =
        sources.iter().filter(|(file, _)| file != "faults.rs").map(|(_, text)| crate::rules::code(text)).collect();
    let mut callers = BTreeSet::from(["faults::check".to_owned()]);
    for body in &bodies {
        for (at, _) in body.match_indices("faults::check(") {
            if !body[at + "faults::check(".len()..].trim_start().starts_with('"') {
                let function = body[..at].rsplit("fn ").next().unwrap_or_default();
                callers.insert(function.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
            }
        }
    }
    let mut names = BTreeSet::new();
    for (body, caller) in bodies.iter().flat_map(|body| callers.iter().map(move |caller| (body, caller))) {
        for (at, call) in body.match_indices(&format!("{caller}(")) {
            if let Some(rest) = body[at + call.len()..].trim_start().strip_prefix('"') {
                names.extend(rest.split('"').next().map(str::to_owned));
            }
        }
    }
    names
}

/// Points at which nothing is half done: tests let a node wait, differ, compute wrongly or reach a cap there.
const SWITCHES: [&str; 15] = [
    "grow.at-once",
    "node.kind",
    "node.patient",
    "node.version",
    "pace.hasty",
    "run.cap",
    "save.hasty",
    "seat.before-beat",
    "shelf.lends",
    "worker.hasty",
    "worker.late",
    "worker.loaded",
    "worker.memory",
    "worker.regroup",
    "worker.state",
];

#[test]
fn every_crash_point_of_the_source_is_in_the_campaign() {
    let table: BTreeSet<String> = POINTS.iter().map(|point| point.name).chain(SWITCHES).map(str::to_owned).collect();
    let right = "POINTS in tests/torture/plan.rs, and SWITCHES";
    assert_eq!(points_of_the_source(), table, "left: the source; right: {right}");
}
