//! A store that is away or slow, for all nodes or for one: each node has a way to it of its own.

use rustix::process::Signal;
use serde_json::Value;

use super::{
    Lab, RUN, create, expect_nearly_undisturbed,
    faults::{SAVED, expect_sound, hold, leaders_beat, of_kind, resumed_from},
    leads, next,
};
use crate::support::{
    lab::{EVERY, STEPS},
    proxy::{FaultProxy, Hang, Lands, Line},
    trainer::{Event, Finished, Running},
};

/// Requests that a node sends in vain before the store is back: of each kind several, and the beats of a minute.
const IN_VAIN: u64 = 12;

/// A node, and its way to the store.
struct Seat {
    node: Running,
    way: FaultProxy,
}

impl Seat {
    fn loses_the_store(&self) {
        self.way.hang(Hang::all("", "", ""));
    }
}

/// Two nodes of a run: the leader, and its follower.
#[track_caller]
fn pair(lab: &Lab, faults: &str) -> (Seat, Seat) {
    create(lab.run(RUN));
    let seat = |seed: u64| {
        let way = FaultProxy::start(lab.server().address(), seed);
        let command = next(lab, "2").envs(&[("AWS_ENDPOINT_URL", way.endpoint())]).faults(faults);
        Seat { node: command.start(), way }
    };
    let [one, two] = [1, 2].map(seat);
    let is_led = |seat: &Seat| leads(&seat.node.wait_for("formed", |event: &Event| event.kind() == "formed"));
    if is_led(&one) { (one, two) } else { (two, one) }
}

/// The nodes have finished the run in one generation, as if nothing had happened.
#[track_caller]
fn expect_nothing_happened(lab: &Lab, lives: &[Finished]) {
    for life in lives {
        assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
    }
    assert_eq!(of_kind(lab, "formed").len(), 1);
    assert_eq!(lives[0].committed().last(), Some(&STEPS), "{}", lives[0].story());
    lab.expect_as_undisturbed(RUN, &[&lives[0]]);
    expect_sound(lab);
}

fn checkpoints(node: &Running) -> usize {
    node.events("checkpoint").len()
}

/// The group trains on over three saves; when the store is back, saves go on.
fn away(of: [bool; 2], long: bool) {
    let lab = Lab::on_s3();
    let later = STEPS - 2;
    let (leader, follower) = pair(&lab, &format!("{},worker.step=stop@rank=0@step={later}@hit={later}", hold(0)));
    leader.node.wait_for_step("checkpoint", SAVED);
    leader.node.held();
    let lost: Vec<&Seat> =
        [&leader, &follower].into_iter().zip(of).filter(|(_, lost)| *lost).map(|(seat, _)| seat).collect();
    lost.iter().for_each(|seat| seat.loses_the_store());
    leader.node.let_go();
    leader.node.wait_for_step("step", later - 1);
    leader.node.held();
    assert_eq!(checkpoints(&leader.node), 2, "a save without a store");
    for seat in &lost {
        let enough = if long { IN_VAIN } else { 1 };
        leader.node.wait_until("requests in vain", || seat.way.hung() >= enough);
    }
    lost.iter().for_each(|seat| seat.way.let_go());
    // Held: it is the save that waited, and not the last one.
    leader.node.wait_until("a save", || checkpoints(&leader.node) > 2);
    leader.node.let_go();
    expect_nothing_happened(&lab, &[leader, follower].map(|seat| seat.node.finish().expect_code(0)));
}

#[test]
fn a_store_that_is_away_for_all_nodes_holds_up_saves_and_nothing_else() {
    away([true, true], false);
}

/// For a minute, all or one of them.
#[test]
fn a_store_that_is_away_for_a_minute_changes_no_generation() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("SKIPPED: a_store_that_is_away_for_a_minute_changes_no_generation: scripts/test --all runs it");
        return;
    }
    for of in [[true, true], [true, false], [false, true]] {
        away(of, true);
    }
}

#[test]
fn a_store_that_is_slow_for_one_node_slows_saves_and_nothing_else() {
    let lab = Lab::on_s3();
    let (leader, follower) = pair(&lab, &hold(0));
    leader.node.held();
    // Seconds for its part of a save; steps take milliseconds.
    follower.way.set_line(Line { up: Some(300 << 10), ..Line::default() });
    leader.node.let_go();
    expect_nothing_happened(&lab, &[leader, follower].map(|seat| seat.node.finish().expect_code(0)));
}

/// Requests that put this step's shards hang, and reach the store when they are released, whoever waits for them.
fn late(step: u64) -> Hang {
    let target: &'static str = format!("/checkpoints/s{step:08}-g0001/").leak();
    Hang { target, lands: Lands::Late, ..Hang::all("PUT", "", "") }
}

/// The leader's part of a save fails while its follower still puts its own: the save has not ended before that has.
#[test]
fn a_save_that_fails_on_the_leader_while_a_follower_uploads_is_never_committed_torn() {
    let lab = Lab::on_s3();
    let next_save = SAVED + EVERY;
    let later = STEPS - 2;
    let held = format!("worker.step=stop@rank=0@step={later}@hit={later}");
    let faults = [format!("save.before-receipt=error@step={next_save}"), hold(0), held].join(",");
    let (leader, follower) = pair(&lab, &faults);
    leader.node.wait_for_step("checkpoint", SAVED);
    leader.node.held();
    follower.way.hang(late(next_save));
    leader.node.let_go();
    follower.node.wait_until("an upload that hangs", || follower.way.hung() > 0);
    leader.node.wait_for_step("step", later - 1);
    leader.node.held();
    let beat = leaders_beat(&lab, RUN);
    leader.node.wait_until("two beats", || leaders_beat(&lab, RUN) >= beat + 2);
    assert_eq!(checkpoints(&leader.node), 2, "a save has not ended before the follower's part has");
    leader.node.let_go();
    follower.way.let_go();
    let lives = [leader, follower].map(|seat| seat.node.finish().expect_code(0));
    assert!(!lives[0].committed().contains(&next_save), "{}", lives[0].story());
    expect_nothing_happened(&lab, &lives);
}

/// The leader leaves at once while its follower still puts its part of a save: that is given up, and what lands later
/// belongs to nobody.
#[test]
fn a_save_that_a_leader_gives_up_while_a_follower_uploads_is_nobodys() {
    let lab = Lab::on_s3();
    let next_save = SAVED + EVERY;
    let later = next_save + 2;
    let faults = format!("{},worker.step=stop@rank=0@step={later}@hit={later}", hold(0));
    let (leader, follower) = pair(&lab, &faults);
    leader.node.wait_for_step("checkpoint", SAVED);
    leader.node.held();
    follower.way.hang(late(next_save));
    leader.node.let_go();
    follower.node.wait_until("an upload that hangs", || follower.way.hung() > 0);
    leader.node.wait_for_step("step", later - 1);
    leader.node.held();
    // Asked again, it waits for nothing.
    leader.node.ask_until_it_ends(Signal::TERM);
    let leader = leader.node.finish().expect_code(76);
    assert_eq!(leader.last("interrupted").value["lost_steps"].as_u64(), Some(later - 1 - SAVED), "{}", leader.story());
    let other = next(&lab, "2").start();
    let second = |event: &Event| event.kind() == "formed" && event.value["generation"].as_u64() == Some(2);
    assert_eq!(resumed_from(&follower.node.wait_for("the next generation", second)), SAVED);
    let committed = || -> Vec<Value> {
        let of_this_step = |entry: &Value| entry["record"]["step"] == next_save;
        of_kind(&lab, "committed").into_iter().filter(of_this_step).collect()
    };
    follower.node.wait_until("the save again", || !committed().is_empty());
    follower.way.let_go();
    let [follower, other] = [follower.node, other].map(|node| node.finish().expect_code(0));
    assert_eq!(committed().len(), 1, "{:?}", committed());
    assert_eq!(committed()[0]["record"]["generation"], 2, "the save that was given up is committed");
    assert_eq!(of_kind(&lab, "formed").len(), 2);
    expect_nearly_undisturbed(&[&leader, &follower, &other]);
    expect_sound(&lab);
}
