//! The deadline decides what is saved: real runs on a store with a fixed bandwidth, asked to stop with more or less
//! time left.
//!
//! No test waits for time to pass: the line to the store is the clock, and the bytes that it has carried show the
//! progress of a save. Saves take several seconds and steps a hundredth of one, so that a loaded machine changes
//! little.

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{
    lab::{EVERY, Lab},
    proxy::{Fault, FaultProxy, Line, Often, Rule},
    trainer::{Finished, Running},
};

/// The time of a save on the narrow line, seconds.
const SAVE_S: u64 = 8;

/// A run that saves all the time, on a line that carries one save in [`SAVE_S`]. This share of its second save is
/// through. The line is narrowed while it is idle: a save that had passed it at both speeds would measure neither.
fn under_way(lab: &Lab, proxy: &FaultProxy, share: f64, window: &str) -> Running {
    let running = lab
        .run("held")
        .args(&["--set", "train.steps=100000"])
        .envs(&[("TRAINER_STOP_WINDOW", window.to_owned())])
        .hold_after(EVERY + 1)
        .start();
    // The bytes of a save are known now, and the next one is not due while the run is held.
    let bytes = running.wait_for_step("checkpoint", EVERY).value["bytes"].as_u64().expect("its size");
    running.held();
    proxy.set_line(Line { bulk: Some(bytes / SAVE_S), ..Line::default() });
    running.let_go();
    running.wait_for("a save on the narrow line", |event| {
        event.kind() == "checkpoint" && event.value["durable_s"].as_f64() > Some(SAVE_S as f64 * 0.9)
    });
    let begun = proxy.carried();
    let through = (bytes as f64 * share) as u64;
    running.wait_until("so much of the next save is through", || proxy.carried() >= begun + through);
    running
}

/// The one interruption of the run, as `trainer explain` shows it.
fn explained(lab: &Lab, life: &Finished) -> Value {
    let explain = lab.about("explain", "held").args(&["--json"]).finish().expect_code(0);
    let line = explain.stdout.lines().next().unwrap_or_else(|| panic!("nothing was told\n{}", life.story()));
    serde_json::from_str(line).expect("a JSON line")
}

/// The save was planned, expected to end within the time left, and has ended within it. How near the two are is the
/// machine's affair: a disk that stands still for ten seconds halves what was measured before it.
fn kept(told: &Value, window_s: f64, story: &str) {
    let at = |name: &str| told["drain"][name].as_f64();
    let (Some(planned), Some(predicted), Some(actual)) = (at("planned_s"), at("predicted_s"), at("actual_s")) else {
        panic!("{told}\n{story}")
    };
    assert!(planned < predicted && planned < actual && actual <= window_s, "{told}\n{story}");
    let error = (actual - planned) / (predicted - planned) - 1.0;
    assert!(told["prediction_error"].as_f64().is_some_and(|told| (told - error).abs() < 1e-6), "{told}\n{story}");
}

#[test]
fn with_enough_time_the_newest_step_is_saved() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let running = under_way(&lab, &proxy, 0.5, "100s");
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    let drain = life.last("drain");
    assert_eq!(drain.value["plan"], "full_save", "{}", life.story());
    let last = life.last("interrupted").step().expect("its step");
    assert_eq!(life.committed().last(), Some(&last), "{}", life.story());
    let told = explained(&lab, &life);
    assert_eq!(told["lost_steps"], 0, "{told}");
    assert_eq!(told["drain"]["plan"], "full_save", "{told}");
    kept(&told, 100.0, &life.story());
    lab.expect_all_verify("held");
}

#[test]
fn with_too_little_time_the_save_under_way_is_finished() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    // Two thirds of a save need 5 s, at the worst pace expected less than 7.5 s. One save more needs 13 s: at the best
    // pace expected more than 7.5 s, even if the signal comes a second late.
    let running = under_way(&lab, &proxy, 0.35, "9s");
    let before = running.events("checkpoint").last().and_then(|event| event.step()).expect("a checkpoint");
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(76);
    assert_eq!(life.last("drain").value["plan"], "finish_in_flight", "{}", life.story());
    let committed = *life.committed().last().expect("a checkpoint");
    assert!(committed > before, "the save under way was not finished\n{}", life.story());
    let told = explained(&lab, &life);
    let lost = life.last("interrupted").step().expect("its step") - committed;
    assert!(lost > 0 && told["lost_steps"] == lost, "{told}\n{}", life.story());
    kept(&told, 9.0, &life.story());
    lab.expect_all_verify("held");
}

#[test]
fn without_time_the_journal_says_what_was_lost() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let running = under_way(&lab, &proxy, 0.0, "3s");
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(76);
    assert_eq!(life.last("drain").value["plan"], "stop_early", "{}", life.story());
    let (last, newest) = (life.last("interrupted"), *life.committed().last().expect("a checkpoint"));
    let lost = last.step().expect("its step") - newest;
    assert_eq!(last.value["lost_steps"], lost, "{}", life.story());
    let told = explained(&lab, &life);
    assert_eq!((&told["lost_steps"], &told["checkpoint"]), (&lost.into(), &newest.into()), "{told}");
    assert!(told["verdict"].as_str().is_some_and(|verdict| verdict.contains("will be lost")), "{told}");
    proxy.set_line(Line::default());
    let next = lab.resume("held").args(&["--set", &format!("train.steps={}", newest + 8)]).finish().expect_code(0);
    assert_eq!(next.resumed_from(), newest, "{}", next.story());
}

#[test]
fn a_save_that_does_not_get_through_is_given_up_in_time() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let window = [("TRAINER_STOP_WINDOW", "6s".to_owned())];
    let running = lab.run("held").args(&["--set", "train.steps=100000"]).envs(&window).start();
    running.wait_for("a second checkpoint", |event| event.kind() == "checkpoint" && event.step() > Some(4));
    // The store stops accepting checkpoints, for longer than this test may last.
    let fault = Fault::Stall(std::time::Duration::from_secs(3600));
    proxy.arm(Rule { method: "PUT", target: "/checkpoints/", fault, often: Often::Next(1_000_000) });
    running.wait_until("a save that hangs", || proxy.broken() > 0);
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(76);
    let newest = *life.committed().last().expect("a checkpoint");
    let told = explained(&lab, &life);
    assert_eq!((&told["checkpoint"], &told["drain"]["actual_s"]), (&newest.into(), &Value::Null), "{told}");
    assert_eq!(told["lost_steps"], life.last("interrupted").value["lost_steps"], "{told}");
    assert!(told["verdict"].as_str().is_some_and(|verdict| verdict.contains("the time was up")), "{told}");
}

#[test]
fn with_time_to_spare_it_saves_at_once_and_trains_on() {
    let lab = Lab::on_files();
    let file = lab.path("notice");
    let setting = format!("notice.file={:?}", file.display().to_string());
    let running = lab
        .run("held")
        .args(&["--set", "train.steps=1000000", "--set", "checkpoint.every=\"1h\"", "--set", &setting])
        .start();
    running.wait_for_step("step", 3);
    // The time of a save must be known, or there would be no estimate.
    running.signal(Signal::USR2);
    let first = running.wait_for("a checkpoint", |event| event.kind() == "checkpoint").step();
    std::fs::write(&file, "25").expect("write the notice");
    let insurance = running.wait_for("an insurance", |event| event.kind() == "checkpoint" && event.step() > first);
    let further = insurance.step().expect("its step") + 10;
    running.wait_for_step("step", further);
    let life = running.finish().expect_code(75);
    let end = life.last("interrupted").step().expect("its step");
    assert!(end > further, "{}", life.story());
    let committed: Vec<u64> = life.committed().into_iter().collect();
    assert_eq!(committed, [first, insurance.step(), Some(end)].map(|step| step.expect("a step")), "{}", life.story());
    let told = explained(&lab, &life);
    let timeline: Vec<&str> =
        told["drain"]["timeline"].as_array().expect("moments").iter().filter_map(|m| m["what"].as_str()).collect();
    assert!(timeline[1].contains("training goes on until "), "{timeline:?}");
    // The seconds of training are not part of the time expected for the save.
    let (planned, off) = (told["drain"]["planned_s"].as_f64(), told["prediction_error"].as_f64());
    let took = told["drain"]["actual_s"].as_f64().zip(planned).map(|(actual, planned)| actual - planned);
    let expected = told["drain"]["predicted_s"].as_f64().zip(planned).map(|(at, planned)| at - planned);
    let real = took.zip(expected).map(|(took, expected)| took / expected - 1.0);
    assert!(planned > Some(1.0), "{told}");
    assert!(off.zip(real).is_some_and(|(off, real)| (off - real).abs() < 1e-6), "{told}");
}

/// A run that has 12 s to leave, while one request of this kind to the journal hangs that the store would be asked
/// again only after 15 s. It is asked to leave before that request, or (`first`) while it hangs.
fn committed_in_time(method: &'static str, first: bool) {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let running = lab
        .run("held")
        .args(&["--set", "train.steps=100000", "--set", "checkpoint.every=\"1h\""])
        .envs(&[("TRAINER_STOP_WINDOW", "12s".to_owned())])
        .hold_after(3)
        .start();
    running.wait_for_step("step", 3);
    running.held();
    let fault = Fault::Stall(std::time::Duration::from_secs(3600));
    proxy.arm(Rule { method, target: "/journal/", fault, often: Often::Next(1) });
    if !first {
        running.signal(Signal::TERM);
    }
    running.wait_until("a request to the journal that hangs", || proxy.broken() > 0);
    if first {
        running.signal(Signal::TERM);
    }
    running.let_go();
    let life = running.finish().expect_code(75);
    let last = life.last("interrupted").step().expect("its step");
    let told = explained(&lab, &life);
    assert_eq!((&told["lost_steps"], &told["checkpoint"]), (&0.into(), &last.into()), "{told}");
    let text = lab.about("explain", "held").finish().expect_code(0);
    assert!(text.stdout.contains("heard      sigterm"), "what the drain was for is told\n{}", text.story());
    lab.expect_all_verify("held");
    let more = format!("train.steps={}", last + 2);
    let next = lab.resume("held").args(&["--set", &more]).finish().expect_code(0);
    assert_eq!(next.resumed_from(), last, "{}", next.story());
}

#[test]
fn the_commit_does_not_wait_for_the_notices_own_record() {
    committed_in_time("PUT", false);
}

#[test]
fn the_commit_does_not_wait_for_a_look_at_the_journal() {
    committed_in_time("GET", true);
}
