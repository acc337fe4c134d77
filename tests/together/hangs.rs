//! A worker that hangs while its agent lives: nobody sees it but the ranks that wait for it.

use super::{
    Lab, RUN, expect_nearly_undisturbed,
    faults::{SAVED, expect_sound, hold, of_kind, pair, resumed_from},
};
use crate::support::{lab::STEPS, trainer::Event};

/// The worker of rank 1 stops early in the first generation, and before the first step of each later one. A collective
/// whose limit were that of the first ten steps of a process, ten minutes, would outlast this test.
#[test]
fn a_worker_that_hangs_in_its_first_steps_holds_its_group_for_a_bounded_time() {
    let lab = Lab::on_files();
    let first = format!("worker.step=stop@rank=1@step={}@hit=1", SAVED + 1);
    let faults = [hold(1).as_str(), &first, "worker.hasty=error", "pace.hasty=error"].join(",");
    let (leader, follower) = pair(&lab, "2", &faults);
    let generation = |number: u64| {
        let fits = move |event: &Event| event.kind() == "formed" && event.value["generation"].as_u64() == Some(number);
        assert_eq!(resumed_from(&leader.wait_for("the same nodes, anew", fits)), SAVED);
    };
    // A step that is not the first, then a first one.
    generation(2);
    generation(3);
    follower.held();
    follower.let_go();
    let lives = [leader, follower].map(|node| node.finish().expect_code(0));
    for life in &lives {
        assert_eq!(life.last("formed").value["nodes"].as_u64(), Some(2), "nobody is to blame: {}", life.story());
    }
    let formed = of_kind(&lab, "formed");
    assert!(formed.iter().all(|entry| entry["record"]["roster"] == formed[0]["record"]["roster"]), "{formed:?}");
    assert_eq!(lives[0].committed().last(), Some(&STEPS));
    lab.expect_as_undisturbed(RUN, &[&lives[0]]);
    expect_nearly_undisturbed(&[&lives[0]]);
    expect_sound(&lab);
}
