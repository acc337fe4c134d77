//! One run on several nodes: agents of their own on this machine, each with one worker, that meet in the store.
//!
//! The undisturbed run of the lab has the same two ranks on one node, so the losses of two nodes are its losses to the
//! last digit. After a change of the world they are equal within the rounding of sums.

pub mod faults;
mod grows;
mod hangs;
mod keep;
mod leads;
mod leaving;
mod memory;
mod slots;
mod store;
mod words;

use rustix::process::Signal;

use crate::support::{
    lab::{EVERY, Lab, STEPS, reference},
    trainer::{Event, Finished, Running, Trainer},
};

const RUN: &str = "together";

/// A node of a run of at least `min` and at most `max`.
fn node(command: Trainer, nodes: &str) -> Trainer {
    command.args(&["--nodes", nodes, "--nproc-per-node", "1", "--set", "network.address=127.0.0.1"])
}

/// Creates the run: its one node waits in vain for others. All nodes then come at once by [`next`]: a first generation
/// waits only seconds for one more node, and this machine may be busy.
pub fn create(command: Trainer) {
    command.args(&["--nodes", "99", "--wait", "1s", "--nproc-per-node", "1"]).finish().expect_code(69);
}

/// Creates the run; it is the run's first node, too.
fn first(lab: &Lab, nodes: &str) -> Trainer {
    create(lab.run(RUN));
    next(lab, nodes)
}

fn next(lab: &Lab, nodes: &str) -> Trainer {
    node(lab.resume(RUN), nodes)
}

fn is_created(lab: &Lab) -> bool {
    lab.keys(RUN, "journal/").iter().any(|key| key.ends_with("/00000000000000000000.json"))
}

/// The heartbeats of nodes that have not left.
fn beats(lab: &Lab) -> Vec<serde_json::Value> {
    let read = |key: String| serde_json::from_slice(&lab.read(RUN, &key)).expect("a heartbeat");
    let all: Vec<serde_json::Value> = lab.keys(RUN, "nodes/").into_iter().map(read).collect();
    all.into_iter().filter(|beat| beat["group"]["left"] != true).collect()
}

/// The loss of each step, in the order of the processes; of a step that was done twice, the last.
fn losses_of(lives: &[&Finished]) -> Vec<(u64, f64)> {
    let mut losses = std::collections::BTreeMap::new();
    for event in lives.iter().flat_map(|life| life.of_kind("step")) {
        losses.insert(event.step().unwrap(), event.number_text("loss").unwrap().parse::<f64>().unwrap());
    }
    losses.into_iter().collect()
}

/// Every step is there, and each loss is that of the undisturbed run but for the rounding of sums.
#[track_caller]
pub fn expect_nearly_undisturbed(lives: &[&Finished]) {
    let losses = losses_of(lives);
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=STEPS).collect::<Vec<_>>());
    for (step, loss) in losses {
        let wanted: f64 = reference().losses[&step].parse().unwrap();
        assert!((loss - wanted).abs() <= 1e-5 * wanted.abs(), "step {step}: {loss}, undisturbed {wanted}");
    }
}

#[test]
fn two_nodes_train_as_one_node_of_two_workers_to_the_last_digit() {
    let lab = Lab::on_files();
    let one = first(&lab, "2").start();
    let two = next(&lab, "2").start();
    let lives = [one.finish().expect_code(0), two.finish().expect_code(0)];
    let leaders: Vec<&Finished> = lives.iter().filter(|life| !life.of_kind("step").is_empty()).collect();
    assert_eq!(leaders.len(), 1, "one of them leads");
    for life in &lives {
        let formed = life.last("formed");
        assert_eq!((formed.value["nodes"].as_u64(), formed.value["world_size"].as_u64()), (Some(2), Some(2)));
        assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
    }
    lab.expect_as_undisturbed(RUN, &leaders);
    lab.expect_all_verify(RUN);
}

/// Whether this is the word of a node that leads.
fn leads(event: &Event) -> bool {
    event.kind() == "formed" && event.value.get("leader").is_none()
}

/// Starts nodes that are the first generation together. It waits only seconds for one more node, and this machine may
/// be busy: so each stops before its first beat until all are there.
#[track_caller]
pub fn at_once<const N: usize>(nodes: [Trainer; N]) -> [Running; N] {
    let all = nodes.map(|node| node.faults("seat.before-beat=stop@hit=1").start());
    for node in &all {
        assert!(node.stopped(), "it waits for the others");
    }
    for node in &all {
        node.signal(Signal::CONT);
    }
    all
}

/// Three nodes that are the first generation together: the leader, and the others in the order of the roster.
#[track_caller]
fn three(lab: &Lab, nodes: &str, more: impl Fn(Trainer) -> Trainer) -> [Running; 3] {
    create(lab.run(RUN));
    let all = at_once([(); 3].map(|()| more(next(lab, nodes))));
    for node in &all {
        node.wait_for("all three", faults::of_nodes(3));
    }
    in_order_of_the_roster(lab, all)
}

/// Sorts the nodes of the newest generation, which have one worker each.
fn in_order_of_the_roster<const N: usize>(lab: &Lab, mut all: [Running; N]) -> [Running; N] {
    let formed = faults::of_kind(lab, "formed").pop().expect("a generation");
    let members: Vec<String> = formed["record"]["roster"]
        .as_array()
        .expect("a roster")
        .iter()
        .map(|member| member["node"].as_str().expect("an id").to_owned())
        .collect();
    let place = |running: &Running| {
        let pid = u64::try_from(running.pid().as_raw_nonzero().get()).expect("a process");
        let own = beats(lab).into_iter().find(|beat| beat["process"]["pid"].as_u64() == Some(pid));
        let node = own.expect("its heartbeat")["node"].as_str().expect("an id").to_owned();
        members.iter().position(|member| *member == node).expect("a member")
    };
    all.sort_by_cached_key(place);
    all
}

pub fn leader_and_follower(one: Running, two: Running) -> (Running, Running) {
    let formed = |running: &Running| leads(&running.wait_for("formed", |event| event.kind() == "formed"));
    match (formed(&one), formed(&two)) {
        (true, false) => (one, two),
        (false, true) => (two, one),
        other => panic!("who leads: {other:?}"),
    }
}

#[test]
fn a_killed_follower_is_gone_on_without() {
    let lab = Lab::on_files();
    let hold = format!("worker.step=stop@rank=1@hit={}", 2 * EVERY + 2);
    let [one, two] = at_once([
        first(&lab, "1:2").faults(&hold).args(&["--set", "checkpoint.keep.last=9"]),
        next(&lab, "1:2").faults(&hold),
    ]);
    let (leader, follower) = leader_and_follower(one, two);
    leader.wait_for_step("checkpoint", 2 * EVERY);
    let follower = follower.power_off().expect_killed();
    let leader = leader.finish().expect_code(0);
    assert!(follower.of_kind("step").is_empty(), "{}", follower.story());
    assert_eq!(leader.of_kind("formed").len(), 2, "{}", leader.story());
    assert_eq!(leader.last("formed").value["nodes"].as_u64(), Some(1));
    expect_nearly_undisturbed(&[&leader]);
    lab.expect_all_verify(RUN);
}

#[test]
fn a_killed_leader_is_followed_by_another() {
    let lab = Lab::on_files();
    let hold = format!("worker.step=stop@rank=0@hit={}", 2 * EVERY + 2);
    let [one, two] = at_once([first(&lab, "1:2").faults(&hold), next(&lab, "1:2").faults(&hold)]);
    let (leader, follower) = leader_and_follower(one, two);
    leader.wait_for_step("checkpoint", 2 * EVERY);
    let leader = leader.power_off().expect_killed();
    // Its own worker is rank 0 now, and is held at the same step.
    follower.wait_for("its own generation", leads);
    follower.held();
    follower.let_go();
    let follower = follower.finish().expect_code(0);
    expect_nearly_undisturbed(&[&leader, &follower]);
    lab.expect_all_verify(RUN);
}

#[test]
fn a_follower_that_is_told_to_leave_loses_nothing() {
    let lab = Lab::on_files();
    let hold = format!("worker.step=stop@rank=0@hit={}", EVERY + 3);
    let [one, two] = at_once([first(&lab, "1:2").faults(&hold), next(&lab, "1:2").faults(&hold)]);
    let (leader, follower) = leader_and_follower(one, two);
    leader.held();
    follower.signal(Signal::TERM);
    follower.wait_for("a notice", |event| event.kind() == "notice");
    leader.let_go();
    let follower = follower.finish().expect_code(75);
    assert_eq!(follower.last("interrupted").value["lost_steps"].as_u64(), Some(0), "{}", follower.story());
    let leader = leader.finish().expect_code(0);
    let formed = leader.last("formed");
    assert_eq!(formed.value["nodes"].as_u64(), Some(1), "{}", leader.story());
    // It goes on from the very step at which both stopped.
    assert_eq!(leader.of_kind("step").len() as u64, STEPS, "no step was done twice: {}", leader.story());
    expect_nearly_undisturbed(&[&leader]);
    lab.expect_all_verify(RUN);
}

#[test]
fn a_leader_that_is_told_to_leave_loses_nothing() {
    let lab = Lab::on_files();
    let hold = format!("worker.step=stop@rank=0@hit={}", EVERY + 3);
    let [one, two] = at_once([first(&lab, "1:2").faults(&hold), next(&lab, "1:2").faults(&hold)]);
    let (leader, follower) = leader_and_follower(one, two);
    leader.held();
    leader.signal(Signal::TERM);
    leader.wait_for("a notice", |event| event.kind() == "notice");
    leader.let_go();
    let leader = leader.finish().expect_code(75);
    follower.wait_for("its own generation", leads);
    let follower = follower.finish().expect_code(0);
    let steps = leader.of_kind("step").len() + follower.of_kind("step").len();
    assert_eq!(steps as u64, STEPS, "no step was done twice\n{}\n{}", leader.story(), follower.story());
    expect_nearly_undisturbed(&[&leader, &follower]);
    lab.expect_all_verify(RUN);
}

#[test]
fn a_node_that_comes_later_joins_at_a_save() {
    let lab = Lab::on_files();
    // Held before a save, and behind it until its commit is followed by the word to form anew.
    let hold = [EVERY - 1, EVERY + 2].map(|step| format!("worker.step=stop@rank=0@step={step}@hit={step}")).join(",");
    let one = first(&lab, "1:2").faults(&hold).start();
    one.held();
    let two = next(&lab, "1:2").start();
    one.wait_until_said("waits to join");
    one.let_go();
    one.wait_for("the word to form anew", |event| event.kind() == "notice");
    one.let_go();
    let formed = one.wait_for("both", |event| event.kind() == "formed" && event.value["nodes"].as_u64() == Some(2));
    assert!(formed.value["resume_step"].as_u64() >= Some(EVERY), "{formed:?}");
    let lives = [one.finish().expect_code(0), two.finish().expect_code(0)];
    let steps: usize = lives.iter().map(|life| life.of_kind("step").len()).sum();
    assert_eq!(steps as u64, STEPS, "no step was done twice");
    expect_nearly_undisturbed(&[&lives[0], &lives[1]]);
    lab.expect_all_verify(RUN);
}

#[test]
fn a_run_that_a_person_stops_ends_on_every_node() {
    let lab = Lab::on_files();
    let hold = format!("worker.step=stop@rank=0@hit={}", EVERY + 3);
    let [one, two] = at_once([first(&lab, "2").faults(&hold), next(&lab, "2").faults(&hold)]);
    let (leader, follower) = leader_and_follower(one, two);
    leader.held();
    let drain = lab.about("drain", RUN).start();
    leader.wait_for("a notice", |event| event.kind() == "notice");
    leader.let_go();
    drain.finish().expect_code(0);
    let leader = leader.finish().expect_code(75);
    follower.finish().expect_code(75);
    assert_eq!(leader.last("interrupted").value["lost_steps"].as_u64(), Some(0));
    lab.expect_all_verify(RUN);
}

#[test]
fn too_few_nodes_give_up_after_the_time_to_wait() {
    let lab = Lab::on_files();
    node(lab.run(RUN), "2")
        .args(&["--wait", "1s"])
        .finish()
        .expect_code(69)
        .expect_said(&["fewer than 2 nodes", "--wait"]);
    assert!(is_created(&lab));
}

/// What the record of a failure says must not end those who come to repair it.
#[test]
fn a_run_that_has_failed_is_resumed_with_other_settings_by_all_nodes() {
    let lab = Lab::on_files();
    create(lab.run(RUN));
    let ruinous = ["--set", "train.optimizer.lr=1e38", "--set", "train.optimizer.grad_clip=0"];
    let both = [(); 2].map(|()| next(&lab, "2").args(&ruinous).start());
    for node in both {
        node.finish().expect_code(78);
    }
    let gentle = ["--set", "train.optimizer.lr=1e-3", "--set", "train.optimizer.grad_clip=1.0"];
    let both = [(); 2].map(|()| next(&lab, "2").args(&gentle).start());
    let lives = both.map(|node| node.finish().expect_code(0));
    let one = lab.run("one").args(&gentle).finish().expect_code(0);
    let leader = lives.iter().find(|life| !life.of_kind("step").is_empty()).expect("a leader");
    assert_eq!(losses_of(&[leader]), losses_of(&[&one]), "both nodes train with these settings");
}

/// It holds once: whoever comes or leads later goes on from the newest checkpoint.
#[test]
fn a_step_to_go_back_to_holds_once() {
    let lab = Lab::on_files();
    create(lab.run(RUN));
    let settings = ["--set", "checkpoint.keep.last=9"];
    let both = [(); 2].map(|()| next(&lab, "2").args(&settings).start());
    for node in both {
        node.finish().expect_code(0);
    }
    let hold = format!("worker.step=stop@rank=1@hit={}", 2 * EVERY + 2);
    let from = EVERY.to_string();
    let [one, two] = at_once([(); 2].map(|()| next(&lab, "1:2").args(&["--from", &from]).faults(&hold)));
    let (leader, follower) = leader_and_follower(one, two);
    let formed = leader.events("formed");
    assert_eq!(formed[0].value["resume_step"].as_u64(), Some(EVERY));
    leader.wait_for_step("checkpoint", 3 * EVERY);
    leader.power_off().expect_killed();
    let own = follower.wait_for("its own generation", leads);
    assert_eq!(own.value["resume_step"].as_u64(), Some(3 * EVERY), "not from step {EVERY} again");
    follower.finish().expect_code(0);
    lab.expect_all_verify(RUN);
}
