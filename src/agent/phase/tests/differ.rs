//! Ranks whose states are not the same.

use super::*;

/// Both ranks have loaded, and have these fingerprints.
fn loaded(rig: &mut Rig, fingerprints: [u64; 2]) -> Effects {
    let ready =
        |rank, of| said(rank, FromWorker::Ready { fingerprint: Some(Fingerprint(of)), split: StartSplit::default() });
    let _ = rig.feed(ready(Rank(0), fingerprints[0]));
    rig.feed(ready(Rank(1), fingerprints[1]))
}

#[test]
fn ranks_that_have_loaded_and_differ_load_again_and_what_differs_is_told() {
    let mut rig = fetching();
    let effects = loaded(&mut rig, [1, 1]);
    assert!(list(&effects).ends_with("go"), "{}", list(&effects));
    assert_eq!(rig.machine.differed(), None);

    let mut rig = fetching();
    let effects = loaded(&mut rig, [1, 2]);
    let end = ended(&effects).expect("an end");
    assert!(end.starts_with("died after 5: the ranks' states differ, and no majority"), "{end}");
    assert!(end.contains("worker 0 of node leader, worker 1 of node member"), "{end}");
    assert!(list(&effects).is_empty(), "nobody is told to go, or left out");
    assert_eq!(rig.machine.differed().map(|what| end.ends_with(what)), Some(true));
}

#[test]
fn ranks_that_differ_again_after_loading_end_their_nodes() {
    // Two ranks have no majority: both nodes end.
    let mut rig = fetching();
    rig.machine.shared.settings.doubted = true;
    let effects = loaded(&mut rig, [1, 2]);
    assert_eq!(list(&effects), "leave out 1");
    let end = ended(&effects).expect("an end");
    assert!(end.starts_with("Unavailable: this machine computes or remembers wrongly: "), "{end}");

    // Two of three are the leader's: the other node is left out, and the group goes on.
    let node = |name| NodeId::new(name).unwrap();
    let ranks = |first, workers| NodeRanks { first: Rank(first), workers, world: WorldSize(3) };
    for (prints, expected) in [([1, 1, 2], "died after 5"), ([2, 1, 1], "Unavailable")] {
        let mut rig = fetching();
        let settings = &mut rig.machine.shared.settings;
        settings.doubted = true;
        settings.outline.workers = 3;
        settings.seats = Seats::new(node("leader"), ranks(0, 2), &[(node("member"), ranks(2, 1))]);
        let mut effects = Effects::default();
        for (rank, of) in prints.into_iter().enumerate() {
            let rank = Rank(u32::try_from(rank).unwrap());
            effects = rig.feed(said(
                rank,
                FromWorker::Ready { fingerprint: Some(Fingerprint(of)), split: StartSplit::default() },
            ));
        }
        let end = ended(&effects).expect("an end");
        assert!(end.starts_with(expected), "{end}");
        assert_eq!(list(&effects), if expected == "Unavailable" { "" } else { "leave out 1" });
    }
}

#[test]
fn a_save_in_which_ranks_differ_is_not_committed_and_the_one_before_is() {
    let mut rig = training();
    rig.feed_all((13..=20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
    assert!(list(&rig.feed(captured_other(Rank(0), 20, 1))).is_empty());
    let effects = rig.feed(captured_other(Rank(1), 20, 1));
    assert_eq!((list(&effects).as_str(), rig.phase()), ("kill", "Salvaging"));
    // The upload of step 10, which was under way, is finished; step 20 is not begun.
    let effects = rig.feed(saved(10, 0));
    assert!(!list(&effects).contains("upload"), "{}", list(&effects));
    let end = ended(&effects).expect("an end");
    assert!(end.starts_with("died after 20: the ranks' states differ"), "{end}");
    assert!(end.ends_with(", after step 20"), "{end}");
    assert!(rig.machine.differed().is_some());

    // What ranks say of an older step is no part of it, and equal states are committed.
    let mut rig = training();
    let _ = rig.feed(saved(10, 0));
    rig.feed_all((13..=20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
    let same = |rank, step: u64, of| {
        let fingerprint = Some(Fingerprint(of));
        said(rank, FromWorker::Captured { step: Step(step), slot: 1, copy_s: 0.5, fingerprint })
    };
    let _ = rig.feed(same(Rank(1), 19, 1));
    let _ = rig.feed(same(Rank(0), 20, 2));
    let effects = rig.feed(same(Rank(1), 20, 2));
    assert_eq!(list(&effects), "upload 20, busy");
    assert_eq!(rig.machine.differed(), None);
}
