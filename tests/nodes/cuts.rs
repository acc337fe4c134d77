//! Bad lines between the nodes of one run, several machines lost at once, and machines that are not what the others
//! are.

use super::{
    Site,
    group::{RUN, finish, group_with, node, place_of, take},
    on_network,
};
use crate::{
    support::{
        lab::EVERY,
        trainer::{Event, Finished, Running},
    },
    together::{
        expect_nearly_undisturbed,
        faults::{expect_sound_run, leaders_beat, of_kind_in},
    },
};

const SAVED: u64 = 2 * EVERY;
/// Steps of the runs that show what follows the end of a fault: a group that quarrels forms again and again.
const LONG: &str = "train.steps=80";

/// The worker of this rank stops before this step, if it is its `hit`th.
fn hold(rank: u32, step: u64, hit: u64) -> String {
    format!("worker.step=stop@rank={rank}@step={step}@hit={hit}")
}

/// The worker of rank 0 is held one step after the second save, and in the generation that goes on from there one step
/// after the save after the next one.
fn twice() -> String {
    [hold(0, SAVED + 2, SAVED + 2), hold(0, SAVED + 10, 10)].join(",")
}

fn generations(site: &Site<'_>) -> usize {
    of_kind_in(&site.lab, RUN, "formed").len()
}

/// Whether the test runs: it takes long.
fn is_asked_for(test: &str) -> bool {
    let all = std::env::var_os("TRAINER_TESTS_ALL").is_some();
    if !all {
        eprintln!("SKIPPED: {test}: scripts/test --all runs it");
    }
    all
}

/// Each step's loss is nearly that of the same run on one node, with these settings.
#[track_caller]
fn expect_nearly_as_alone(site: &Site<'_>, settings: &[&str], lives: &[Finished]) {
    let alone = site.lab.run("alone").args(settings).finish().expect_code(0);
    let losses = |lives: &[&Finished]| -> std::collections::BTreeMap<u64, f64> {
        let steps = lives.iter().flat_map(|life| life.of_kind("step"));
        steps.map(|event| (event.step().expect("a step"), event.value["loss"].as_f64().expect("a loss"))).collect()
    };
    let (found, wanted) = (losses(&lives.iter().collect::<Vec<_>>()), losses(&[&alone]));
    assert_eq!(found.len(), wanted.len(), "every step is there");
    for (step, wanted) in wanted {
        let loss = found[&step];
        assert!((loss - wanted).abs() <= 1e-5 * wanted.abs(), "step {step}: {loss}, on one node {wanted}");
    }
}

/// Three nodes; the line between the leader and a follower breaks, and heals while the others are at work. One
/// generation follows, and one more at most when the follower is back.
fn a_line_breaks(site: &Site<'_>, breaks: impl Fn(usize, usize)) {
    let long = ["--set", LONG];
    // Each of them could go on alone.
    let mut all = group_with(site, 3, "1:3", &twice(), &long);
    all[0].1.held();
    let (leader, follower) = (all[0].0, place_of(site, &all, 2));
    breaks(leader, follower);
    let heir = leader_of(&all, of_nodes(2));
    all[heir].1.held();
    // They are at work, and the other one looks on, for five beats.
    let beat = leaders_beat(&site.lab, RUN);
    all[heir].1.wait_until("five beats", || leaders_beat(&site.lab, RUN) >= beat + 5);
    assert_eq!(generations(site), 2, "nobody takes the run from the two");
    [leader, follower].into_iter().for_each(|place| site.network.heal(place));
    all[heir].1.let_go();
    all.swap(0, heir);
    let lives = finish(all);
    let made = generations(site);
    assert!(made <= 3, "{made} generations of one change and its end");
    expect_nearly_as_alone(site, &long, &lives);
    expect_sound_run(&site.lab, RUN);
}

fn of_nodes(count: u64) -> impl Fn(&Event) -> bool {
    move |event| event.kind() == "formed" && event.value["nodes"].as_u64() == Some(count)
}

/// The node that leads the first generation that fits, once there is one.
fn leader_of(all: &[(usize, Running)], fits: impl Fn(&Event) -> bool) -> usize {
    let leads = |running: &Running| {
        running.events("formed").iter().any(|event| fits(event) && event.value.get("leader").is_none())
    };
    let mut found = None;
    all[0].1.wait_until("the two", || {
        found = all.iter().position(|(_, running)| leads(running));
        found.is_some()
    });
    found.expect("waited for")
}

#[test]
fn a_leader_that_a_follower_does_not_hear_goes_on_without_it() {
    on_network(3, |network| {
        let test = "a_leader_that_a_follower_does_not_hear_goes_on_without_it";
        if is_asked_for(test) && network.is_real(test) {
            a_line_breaks(&Site::new(network), |leader, follower| network.cut_one_way(leader, follower));
        }
    });
}

#[test]
fn a_leader_that_does_not_hear_a_follower_goes_on_without_it() {
    on_network(3, |network| {
        let test = "a_leader_that_does_not_hear_a_follower_goes_on_without_it";
        if is_asked_for(test) && network.is_real(test) {
            a_line_breaks(&Site::new(network), |leader, follower| network.cut_one_way(follower, leader));
        }
    });
}

/// A refused port looks as if the other's process were gone. The third node knows better.
#[test]
fn a_leader_whose_line_to_a_follower_is_reset_goes_on_without_it() {
    on_network(3, |network| {
        let test = "a_leader_whose_line_to_a_follower_is_reset_goes_on_without_it";
        if is_asked_for(test) && network.is_real(test) {
            a_line_breaks(&Site::new(network), |leader, follower| {
                network.reset(leader, follower);
                network.reset(follower, leader);
            });
        }
    });
}

/// Packets that are lost now and then are the kernel's business.
#[test]
fn a_line_that_loses_packets_changes_no_generation() {
    on_network(2, |network| {
        if !network.is_real("a_line_that_loses_packets_changes_no_generation") {
            return;
        }
        let site = Site::new(network);
        let all = group_with(&site, 2, "2", &hold(0, SAVED + 2, SAVED + 2), &[]);
        all[0].1.held();
        network.loss(1, 2);
        all[0].1.let_go();
        let lives = finish(all);
        assert_eq!(generations(&site), 1, "{}", lives[0].story());
        site.lab.expect_as_undisturbed(RUN, &[&lives[0]]);
        expect_sound_run(&site.lab, RUN);
    });
}

/// Their power fails together. Three of five are the majority, whoever led.
#[test]
fn two_machines_of_five_that_lose_power_at_once_are_gone_on_without() {
    on_network(5, |network| {
        let test = "two_machines_of_five_that_lose_power_at_once_are_gone_on_without";
        if !is_asked_for(test) || !network.is_real(test) {
            return;
        }
        let site = Site::new(network);
        let mut all = group_with(&site, 5, "3:5", &hold(0, SAVED + 2, SAVED + 2), &[]);
        let (leader, follower) = (all[0].0, place_of(&site, &all, 3));
        all[0].1.held();
        let lost = [leader, follower].map(|place| take(&mut all, place));
        [leader, follower].into_iter().for_each(|place| network.link_down(place));
        let lost = lost.map(|node| node.power_off().expect_killed());
        let heir = leader_of(&all, of_nodes(3));
        let formed = all[heir].1.wait_for("the three", of_nodes(3));
        assert_eq!(formed.value["resume_step"].as_u64(), Some(SAVED), "{formed:?}");
        let mut lives = finish(all);
        assert_eq!(generations(&site), 2, "one change");
        lives.splice(0..0, lost);
        expect_nearly_undisturbed(&lives.iter().collect::<Vec<_>>());
        expect_sound_run(&site.lab, RUN);
    });
}

/// Its processor is another one: it would round otherwise. It is left out, and says why.
#[test]
fn a_node_of_another_kind_stays_outside() {
    on_network(3, |network| {
        if !network.is_real("a_node_of_another_kind_stays_outside") {
            return;
        }
        let site = Site::new(network);
        let processor = std::fs::read_to_string("/proc/cpuinfo").expect("a processor");
        let line = processor.lines().find(|line| line.starts_with("model name") || line.starts_with("CPU part"));
        let (name, _) = line.expect("its model").split_once(':').expect("a field");
        let other = processor.replace(line.expect("its model"), &format!("{name}: another one"));
        std::fs::write(site.lab.path("cpuinfo"), other).expect("write a processor");
        let file = site.lab.path("cpuinfo").display().to_string();
        network.place(3).run(&["mount", "--bind", &file, "/proc/cpuinfo"]);
        let faults = [hold(0, SAVED + 2, SAVED + 2), hold(0, SAVED + EVERY + 2, SAVED + EVERY + 2)].join(",");
        let all = group_with(&site, 2, "2:3", &faults, &[]);
        all[0].1.held();
        let other = node(&site, 3, "2:3").start();
        for node in [&all[0].1, &other] {
            node.wait_until_said("of another kind");
        }
        all[0].1.let_go();
        all[0].1.wait_for_step("checkpoint", SAVED + EVERY);
        all[0].1.held();
        all[0].1.let_go();
        let lives = finish(all);
        assert_eq!(generations(&site), 1, "{}", lives[0].story());
        site.lab.expect_as_undisturbed(RUN, &[&lives[0]]);
        expect_sound_run(&site.lab, RUN);
        // It may have learned by now that the run is complete.
        let other = other.power_off();
        assert!(other.of_kind("formed").is_empty(), "{}", other.story());
    });
}

/// A machine starts the program again while the first one still runs: the second waits as any other node does, and
/// takes the place of the first when that is killed.
#[test]
fn a_machine_that_starts_the_program_twice_disturbs_nobody() {
    on_network(2, |network| {
        if !network.is_real("a_machine_that_starts_the_program_twice_disturbs_nobody") {
            return;
        }
        let site = Site::new(network);
        let faults = hold(1, SAVED + 2, SAVED + 2);
        let mut all = group_with(&site, 2, "2", &faults, &[]);
        let place = place_of(&site, &all, 1);
        all[0].1.wait_for_step("checkpoint", SAVED);
        let first = take(&mut all, place);
        first.held();
        let second = node(&site, place, "2").start();
        let beats = || site.lab.keys(RUN, "nodes/").len();
        second.wait_until("its heartbeat", || beats() == 3);
        second.wait_until_said("waiting for nodes");
        assert_eq!(generations(&site), 1);
        let first = first.power_off().expect_killed();
        all.push((place, second));
        let lives = finish(all);
        for life in &lives {
            assert_eq!((life.resumed_from(), life.last("formed").value["nodes"].as_u64()), (SAVED, Some(2)));
        }
        assert_eq!(generations(&site), 2, "{}", lives[0].story());
        assert!(first.of_kind("step").is_empty(), "{}", first.story());
        site.lab.expect_as_undisturbed(RUN, &[&lives[0], &lives[1]]);
        expect_sound_run(&site.lab, RUN);
    });
}
