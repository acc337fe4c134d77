//! Notices at moments that are easily forgotten: while data is fetched, another node's heartbeat is read, a checkpoint
//! is chosen or restored, or a save is under way.
//!
//! Each moment is held by a store that does not answer one kind of request, or by a line that carries a save slowly.

use std::time::Duration;

use rustix::process::Signal;

use crate::{
    notices::{RUN, heard, interrupted_and_resumed, long, on_aws},
    support::{
        lab::{EVERY, Lab, data_set},
        metadata::{SPOT, spot_notice},
        proxy::{Fault, FaultProxy, Line, Often, Rule},
        trainer::Finished,
    },
};

/// From now on the store does not answer this kind of request, for longer than any test may last.
fn stall(proxy: &FaultProxy, method: &'static str, target: &'static str) {
    let fault = Fault::Stall(Duration::from_secs(3600));
    proxy.arm(Rule { method, target, fault, often: Often::Next(1_000_000) });
}

/// The first life of a run: it was asked to stop, and its last step is committed.
fn saved(lab: &Lab) -> Finished {
    let first = long(lab).start();
    first.wait_for_step("step", 3);
    first.signal(Signal::TERM);
    first.finish().expect_code(75)
}

#[test]
fn a_notice_while_data_is_fetched_is_heard() {
    let ((lab, proxy), server) = (Lab::on_s3_through_proxy(0), on_aws());
    for entry in std::fs::read_dir(data_set()).expect("the data set").map(|entry| entry.expect("a file")) {
        let key = format!("data/{}", entry.file_name().to_string_lossy());
        lab.server().write(&key, std::fs::read(entry.path()).expect("read a file"));
    }
    stall(&proxy, "GET", "/data/train-");
    let running = long(&lab).args(&["--set", "data.train=\"s3://bucket/data\""]).envs(&server.envs()).start();
    running.wait_until("a request for tokens", || proxy.broken() > 0);
    server.set(SPOT, spot_notice("terminate", 120));
    heard(&running, "aws-spot");
    let life = running.finish().expect_code(75);
    assert!(life.of_kind("formed").is_empty(), "{}", life.story());
}

#[test]
fn a_notice_during_a_restore_ends_the_run_with_nothing_lost() {
    let ((lab, proxy), server) = (Lab::on_s3_through_proxy(0), on_aws());
    let first = saved(&lab);
    let step = first.last("interrupted").step();
    stall(&proxy, "GET", "optimizer-0");
    let running = lab.resume(RUN).envs(&server.envs()).start();
    running.wait_until("a restore that hangs", || proxy.broken() > 0);
    server.set(SPOT, spot_notice("terminate", 120));
    let life = running.finish().expect_code(75);
    let end = life.last("interrupted");
    assert_eq!((end.step(), &end.value["lost_steps"]), (step, &0.into()), "{}", life.story());
    assert_eq!((life.of_kind("formed").len(), life.of_kind("step").len()), (1, 0), "{}", life.story());
    proxy.disarm();
    server.remove(SPOT);
    interrupted_and_resumed(&lab, &life, "aws-spot");
}

#[test]
fn a_notice_during_a_save_waits_for_it_and_saves_what_came_after() {
    let ((lab, proxy), server) = (Lab::on_s3_through_proxy(0), on_aws());
    let often = format!("checkpoint.every=\"{EVERY} steps\"");
    let running = long(&lab).args(&["--set", &often]).envs(&server.envs()).hold_after(EVERY + 1).start();
    let bytes = running.wait_for_step("checkpoint", EVERY).value["bytes"].as_u64().expect("its size");
    running.held();
    // From here on a save is always under way: each takes seconds, and the next is due in milliseconds.
    proxy.set_line(Line { bulk: Some(bytes / 4), ..Line::default() });
    running.let_go();
    running.wait_until("a save under way", || proxy.carried() > 0);
    server.set(SPOT, spot_notice("terminate", 120));
    heard(&running, "aws-spot");
    let life = running.finish().expect_code(75);
    let end = life.last("interrupted").step().expect("its step");
    let told = lab.about("explain", RUN).json().finish().expect_code(0);
    let moments = told.events[0].value["drain"]["timeline"].as_array().cloned().unwrap_or_default();
    let moments: Vec<_> = moments.iter().filter_map(|moment| moment["what"].as_str()).collect();
    let at = |what: &str| moments.iter().position(|moment| *moment == what);
    let earlier = moments.iter().position(|moment| moment.ends_with(" is committed"));
    let last = at(&format!("upload of step {end} began"));
    assert!(earlier.is_some() && earlier < last, "what was under way was finished first: {moments:?}");
    assert_eq!(life.committed().last(), Some(&end), "{}", life.story());
    proxy.set_line(Line::default());
    server.remove(SPOT);
    interrupted_and_resumed(&lab, &life, "aws-spot");
}

#[test]
fn sigterm_while_another_nodes_heartbeat_is_read_is_heard() {
    // On a store that is not a folder of this machine this takes half a minute.
    let lab = Lab::on_s3();
    let asleep = long(&lab).hold_after(3).start();
    asleep.wait_for_step("step", 3);
    asleep.held();
    asleep.signal(Signal::STOP);
    assert!(asleep.stopped(), "it ended");
    let running = lab.resume(RUN).start();
    running.wait_until_said("checking whether node");
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    assert!(life.of_kind("formed").is_empty(), "{}", life.story());
}

#[test]
fn sigterm_while_a_checkpoint_is_chosen_is_heard() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let first = saved(&lab);
    stall(&proxy, "GET", "/manifest.json");
    let running = lab.resume(RUN).start();
    running.wait_until("a manifest that does not come", || proxy.broken() > 0);
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    assert!(life.of_kind("formed").is_empty(), "{}", life.story());
    proxy.disarm();
    interrupted_and_resumed(&lab, &first, "sigterm");
}

#[test]
fn sigterm_while_a_checkpoint_that_seems_damaged_is_read_again_is_heard() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let first = saved(&lab);
    // Its load is garbled in transfer; the second read gets no answer.
    let fault = Fault::FlipResponse(1000);
    proxy.arm(Rule { method: "GET", target: "optimizer-00001", fault, often: Often::Next(1) });
    stall(&proxy, "GET", "optimizer-00001");
    let running = lab.resume(RUN).start();
    running.wait_until("a second reading", || proxy.broken() > 1);
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
    let told = lab.about("explain", RUN).finish().expect_code(0);
    let verdict = "asked to stop while re-reading a checkpoint that seemed damaged";
    assert!(told.stdout.contains(verdict), "{}", told.story());
    proxy.disarm();
    interrupted_and_resumed(&lab, &first, "sigterm");
}
