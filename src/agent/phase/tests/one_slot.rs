//! Groups whose nodes have one snapshot slot: step 10 is in it.

use super::*;
use crate::ids::SlotCount;

fn with(slots: SlotCount) -> Rig {
    let mut settings = settings(Load::Nothing);
    settings.config.checkpoint.slots = slots;
    training_of(settings)
}

#[test]
fn the_last_step_is_saved_when_the_upload_under_way_has_ended() {
    for committed in [true, false] {
        let mut rig = with(SlotCount::ONE);
        assert!(list(&rig.feed(sigterm())).ends_with("report drain, hush, freeze"));
        let _ = rig.frozen(Rank(0), 12);
        assert_eq!(list(&rig.frozen(Rank(1), 13)), "thaw until 13");
        rig.feed_all(RANKS.map(|rank| finished(rank, 13)));
        rig.feed_all(RANKS.map(|rank| stopped(rank, 13)));
        assert_eq!(list(&rig.feed(Event::Tick)), "", "there is no room");
        // What can't be uploaded makes way, since the newer state is worth more.
        let freed = if committed {
            rig.feed(saved(10, 0))
        } else {
            let _ = rig.feed(save_failed(10, 0));
            rig.feed(Event::Retry { slot: 0 })
        };
        assert!(list(&freed).ends_with("freeze"), "{freed:?}");
        let _ = rig.frozen(Rank(0), 13);
        assert_eq!(list(&rig.frozen(Rank(1), 13)), "thaw until 13");
        assert_eq!(list(&rig.feed(captured(Rank(1), 13, 0))), "", "the other copies into the same files");
        assert_eq!(list(&rig.feed(captured(Rank(0), 13, 0))), "hush, upload 13, busy");
        let effects = rig.feed(saved(13, 0));
        assert_eq!(ended(&effects).unwrap(), "stopped: the last finished step is committed");
    }
}

/// With two, the last state is copied beside the upload.
#[test]
fn the_time_of_the_copy_counts_behind_that_of_the_upload() {
    for (slots, plan) in [(SlotCount::TWO, DrainPlan::FullSave), (SlotCount::ONE, DrainPlan::FinishInFlight)] {
        let mut rig = with(slots);
        // 7.4 s of the upload are left at best, then 9.9 s for the last save; the copy takes 0.45 s.
        let _ = rig.pass(0.5).feed(spot(19));
        assert_eq!(rig.planned(), plan, "{slots:?}");
    }
}

#[test]
fn a_death_leaves_the_snapshot_that_every_rank_has_captured() {
    let mut rig = with(SlotCount::ONE);
    assert_eq!(list(&rig.feed(exited())), "kill");
    let effects = rig.feed(saved(10, 0));
    assert!(ended(&effects).unwrap().starts_with("died after 12"), "{effects:?}");
}
