//! One run on several of these machines: what cuts, pulled cables and partitions do to the group.

use std::time::Instant;

use super::{Site, faults::STORE, net::Network, on_network};
use crate::{
    support::{
        lab::{EVERY, STEPS},
        trainer::{Event, Finished, Running, Trainer},
    },
    together::{create, expect_nearly_undisturbed},
};

pub const RUN: &str = "group";

/// A run of `count` nodes, whose workers of rank `held` stop in the middle. The leader comes first.
///
/// A first generation waits only seconds for one more node. On a busy machine a node may come later than that: then all
/// of it is done again.
fn group(site: &Site<'_>, count: usize, nodes: &str, held: u32) -> Vec<(usize, Running)> {
    group_with(site, count, nodes, &format!("worker.step=stop@rank={held}@hit={}", 2 * EVERY + 2), &[])
}

/// The same with these crash points and settings.
pub fn group_with(
    site: &Site<'_>,
    count: usize,
    nodes: &str,
    faults: &str,
    settings: &[&str],
) -> Vec<(usize, Running)> {
    for _ in 0..3 {
        create(site.lab.run(RUN));
        let start = |place| (place, node(site, place, nodes).args(settings).faults(faults).start());
        let mut all: Vec<(usize, Running)> = (1..=count).map(start).collect();
        let first = || all.iter().find_map(|(_, running)| running.events("formed").into_iter().next());
        all[0].1.wait_until("a generation", || first().is_some());
        if first().expect("waited for").value["nodes"].as_u64() == Some(count as u64) {
            all.sort_by_key(|(_, running)| formed(running).value.get("leader").is_some());
            all[0].1.wait_for_step("checkpoint", 2 * EVERY);
            return all;
        }
        for (_, running) in all {
            running.power_off().expect_killed();
        }
        for key in site.lab.keys(RUN, "") {
            site.lab.remove(RUN, &key);
        }
    }
    panic!("{count} nodes did not come within seconds of each other, three times in a row");
}

pub fn formed(running: &Running) -> Event {
    running.wait_for("a generation", |event| event.kind() == "formed")
}

/// A node at this place.
pub fn node(site: &Site<'_>, place: usize, nodes: &str) -> Trainer {
    let address = format!("network.address={}", site.network.place(place).address());
    site.on(place, site.lab.resume(RUN)).args(&["--nodes", nodes, "--nproc-per-node", "1", "--set", &address])
}

/// The place of the node that has this rank: nodes have one worker each, in the order of the roster.
pub fn place_of(site: &Site<'_>, all: &[(usize, Running)], rank: usize) -> usize {
    let mut newest = site.lab.keys(RUN, "journal/").into_iter().filter_map(|key| {
        let entry: serde_json::Value = serde_json::from_slice(&site.lab.read(RUN, &key)).unwrap();
        (entry["record"]["kind"] == "formed").then(|| entry["record"]["roster"].clone())
    });
    let roster = newest.next_back().expect("a formed record");
    let address = roster[rank]["address"].as_str().expect("an address").to_owned();
    let is_it = |place: &usize| address.starts_with(&format!("{}:", site.network.place(*place).address()));
    all.iter().map(|(place, _)| *place).find(is_it).expect("its place")
}

pub fn take(all: &mut Vec<(usize, Running)>, place: usize) -> Running {
    let at = all.iter().position(|(at, _)| *at == place).expect("a node");
    all.remove(at).1
}

pub fn finish(all: Vec<(usize, Running)>) -> Vec<Finished> {
    all.into_iter().map(|(_, running)| running.finish().expect_code(0)).collect()
}

fn needs_a_network(network: &Network, test: &str) -> bool {
    network.is_real(test)
}

#[test]
fn three_machines_are_one_group() {
    on_network(3, |network| {
        let site = Site::new(network);
        let all = group(&site, 3, "3", 9);
        let lives = finish(all);
        expect_nearly_undisturbed(&lives.iter().collect::<Vec<_>>());
        site.lab.expect_all_verify(RUN);
    });
}

/// No FIN, no refused port: only the silence of its link shows that it is gone. When it is back it is left out, and
/// takes part again under another id, or finds the run complete.
#[test]
fn a_follower_whose_cable_is_pulled_is_gone_on_without() {
    on_network(3, |network| {
        if !needs_a_network(network, "a_follower_whose_cable_is_pulled_is_gone_on_without") {
            return;
        }
        let site = Site::new(network);
        let mut all = group(&site, 3, "2:3", 2);
        let place = place_of(&site, &all, 2);
        let lost = take(&mut all, place);
        lost.held();
        network.link_down(place);
        let begun = Instant::now();
        let two = all[0].1.wait_for("two", |event| event.kind() == "formed" && event.value["nodes"] == 2);
        eprintln!("from the pulled cable to the next generation: {:.1} s", begun.elapsed().as_secs_f64());
        assert_eq!(two.value["resume_step"].as_u64(), Some(2 * EVERY));
        let lives = finish(all);
        network.heal(place);
        lost.finish().expect_code(0);
        expect_nearly_undisturbed(&lives.iter().collect::<Vec<_>>());
        site.lab.expect_all_verify(RUN);
    });
}

/// Two of three are more than half: they don't wait for its heartbeat to stand still.
#[test]
fn a_leader_whose_cable_is_pulled_is_followed_by_the_majority() {
    on_network(3, |network| {
        if !needs_a_network(network, "a_leader_whose_cable_is_pulled_is_followed_by_the_majority") {
            return;
        }
        let site = Site::new(network);
        let mut all = group(&site, 3, "2:3", 0);
        let (place, leader) = all.remove(0);
        leader.held();
        network.link_down(place);
        let begun = Instant::now();
        let two = all[0].1.wait_for("two", |event| event.kind() == "formed" && event.value["nodes"] == 2);
        eprintln!("from the leader's pulled cable to the next generation: {:.1} s", begun.elapsed().as_secs_f64());
        assert_eq!(two.value["resume_step"].as_u64(), Some(2 * EVERY));
        // Its rank 0 is held at the same step.
        let heir = all.iter().position(|(_, running)| {
            running
                .wait_for("two", |event| event.kind() == "formed" && event.value["nodes"] == 2)
                .value
                .get("leader")
                .is_none()
        });
        let heir = &all[heir.expect("a leader")].1;
        heir.held();
        heir.let_go();
        let mut lives = finish(all);
        network.heal(place);
        lives.insert(0, leader.finish().expect_code(0));
        expect_nearly_undisturbed(&lives.iter().collect::<Vec<_>>());
        site.lab.expect_all_verify(RUN);
        // What the old leader did alone is nobody's.
        assert!(lives[0].of_kind("completed").is_empty(), "{}", lives[0].story());
    });
}

/// Each of two halves reaches the store and not the other: one of them trains on, and the other joins it later.
#[test]
fn two_halves_that_do_not_reach_each_other_make_one_run() {
    on_network(2, |network| {
        if !needs_a_network(network, "two_halves_that_do_not_reach_each_other_make_one_run") {
            return;
        }
        let site = Site::new(network);
        let all = group(&site, 2, "1:2", 1);
        network.part(1, 2);
        let next = all[0].1.wait_for("alone", |event| event.kind() == "formed" && event.value["nodes"] == 1);
        assert_eq!(next.value["resume_step"].as_u64(), Some(2 * EVERY));
        all[0].1.wait_for_step("step", STEPS);
        network.heal(1);
        network.heal(2);
        let lives = finish(all);
        expect_nearly_undisturbed(&lives.iter().collect::<Vec<_>>());
        site.lab.expect_all_verify(RUN);
        let formed: usize = lives.iter().map(|life| life.of_kind("formed").len()).sum();
        assert!(formed <= 4, "one generation a change: {formed}");
    });
}

/// Its part of each save waits for the store; the group trains on, and commits when all of it is there.
#[test]
fn a_follower_that_does_not_reach_the_store_holds_up_saves_and_nothing_else() {
    on_network(2, |network| {
        if !needs_a_network(network, "a_follower_that_does_not_reach_the_store_holds_up_saves_and_nothing_else") {
            return;
        }
        let site = Site::new(network);
        let all = group(&site, 2, "2", 0);
        let (place, leader) = (all[1].0, &all[0].1);
        leader.held();
        network.part(place, STORE);
        leader.let_go();
        leader.wait_for_step("step", STEPS);
        assert_eq!(leader.events("checkpoint").len(), 2, "a save without the follower's part");
        network.heal(place);
        let lives = finish(all);
        for life in &lives {
            assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
        }
        assert_eq!(lives[0].committed().last(), Some(&STEPS), "{}", lives[0].story());
        site.lab.expect_as_undisturbed(RUN, &[&lives[0]]);
        site.lab.expect_all_verify(RUN);
    });
}
