//! How long a group that has lost a worker goes on saving.

use super::*;

#[test]
fn an_upload_that_fails_after_the_workers_died_is_tried_once_more() {
    let mut rig = training();
    assert_eq!(list(&rig.feed(exited())), "kill");
    assert_eq!(list(&rig.feed(save_failed(10, 0))), "idle, report warning, hush, upload 10, busy, kill");
    let effects = rig.feed(save_failed(10, 0));
    assert_eq!(ended(&effects).unwrap(), "died after 12: worker 1 was killed");
}

/// All nodes wait for it. After its commit the next one has its own time.
#[test]
fn a_group_that_has_lost_a_worker_waits_for_a_save_no_longer_than_such_a_save_takes() {
    let mut rig = training();
    let _ = rig.feed(exited());
    assert_eq!(ended(&rig.pass(119.0).feed(Event::Tick)), None);
    let effects = rig.pass(1.5).feed(Event::Tick);
    assert!(list(&effects).ends_with("kill, give up the save"), "{}", list(&effects));
    assert_eq!(ended(&effects).unwrap(), "died after 12: worker 1 was killed");

    let mut rig = training();
    rig.feed_all((13..=20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
    rig.feed_all(RANKS.map(|rank| captured(rank, 20, 1)));
    let _ = rig.feed(exited());
    assert!(list(&rig.pass(20.0).feed(saved(10, 0))).contains("upload 20"));
    assert_eq!(ended(&rig.pass(110.0).feed(Event::Tick)), None);
    // A failure is no commit.
    assert!(list(&rig.feed(save_failed(20, 1))).contains("upload 20"));
    assert!(list(&rig.pass(10.5).feed(Event::Tick)).ends_with("give up the save"));
}

#[test]
fn a_save_that_usually_takes_long_is_waited_for_longer_and_a_node_that_is_alone_waits_for_its_own() {
    let mut slow = training();
    for _ in 0..50 {
        slow.machine.shared.estimates.saved(BYTES, 300.0, 1.0);
    }
    let mut alone = training();
    let ranks = NodeRanks { first: Rank(0), workers: 2, world: WorldSize(2) };
    alone.machine.shared.settings.seats = Seats::new(NodeId::new("leader").unwrap(), ranks, &[]);
    for (mut rig, waits, ends) in [(slow, 590.0, true), (alone, 36_000.0, false)] {
        let _ = rig.feed(exited());
        assert_eq!(ended(&rig.pass(waits).feed(Event::Tick)), None);
        assert_eq!(ended(&rig.pass(3_600.0).feed(Event::Tick)).is_some(), ends);
    }
}
