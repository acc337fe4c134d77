//! Ranks whose states are not the same: found, named, not committed, and the group loads again. From outside, on
//! one node with several ranks; that a member is left out by name is tested in `agent/group.rs` and `agent/phase`.

use crate::support::{
    lab::{Lab, reference},
    trainer::{Finished, losses},
};

/// A life of three ranks, with these faults and settings.
fn three(lab: &Lab, run: &str, faults: &str, settings: &[&str]) -> Finished {
    let set: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    lab.run(run).args(&["--nproc-per-node", "3"]).args(&set).faults(faults).finish()
}

/// The reasons for which workers were started again.
fn reasons(life: &Finished) -> Vec<&str> {
    life.of_kind("worker_died").iter().filter_map(|event| event.value["reason"].as_str()).collect()
}

#[test]
fn a_rank_that_remembers_wrongly_is_named_and_its_save_is_not_committed() {
    let lab = Lab::on_files();
    // The bit flips at each save that compares the ranks, so at the 16th of a generation: once or twice.
    let settings = ["checkpoint.every=8 steps", "train.steps=200"];
    let whole = three(&lab, "whole", "", &settings).expect_code(0);
    let life = three(&lab, "flipped", "worker.state=error@rank=1", &settings).expect_code(0);
    let reasons = reasons(&life);
    assert!(!reasons.is_empty(), "{}", life.story());
    for (died, reason) in life.of_kind("worker_died").iter().zip(reasons) {
        let step = died.step().expect("a step");
        assert!(reason.starts_with("the ranks' states differ: worker 1 of node "), "{reason}");
        assert!(reason.contains(" from all others, after step "), "{reason}");
        // The save in which it is found is not committed before the group has loaded again.
        let place = life.events.iter().position(|event| event.line == died.line).expect("its place");
        let before = life.events[..place].iter().rev().find(|event| event.kind() == "checkpoint");
        let found: u64 = reason.rsplit(' ').next().and_then(|step| step.parse().ok()).expect("a step");
        assert!(before.is_none_or(|saved| saved.step() < Some(found)), "{}", life.story());
        assert!(step >= found, "{reason} at {step}");
        let again = life.events[place..].iter().find(|event| event.kind() == "restored").expect("it loads again");
        assert!(
            again.step() < Some(found) && again.step() >= before.and_then(|saved| saved.step()),
            "{}",
            life.story()
        );
    }
    assert_eq!(losses(&[&life]), losses(&[&whole]), "to the last digit");
    lab.expect_all_verify("flipped");
    let explained = lab.about("explain", "flipped").finish().expect_code(0);
    assert!(explained.stdout.contains("the ranks' states differ: worker 1 of node "), "{}", explained.stdout);
    assert!(!lab.about("explain", "whole").finish().expect_code(0).stdout.contains("differ"));
}

#[test]
fn ranks_that_differ_whenever_they_load_end_the_machine_with_69() {
    let lab = Lab::on_files();
    let life = three(&lab, "broken", "worker.loaded=error@rank=2", &[]).expect_code(69);
    let reasons = reasons(&life);
    assert_eq!(reasons.len(), 1, "it loads again once\n{}", life.story());
    assert!(reasons[0].starts_with("the ranks' states differ: worker 2 of node "), "{}", reasons[0]);
    assert!(life.of_kind("step").is_empty(), "{}", life.story());
    let life = life.expect_said(&["this machine computes or remembers wrongly", "worker 2"]);
    // Another machine, which does not, goes on.
    let next = lab.resume("broken").args(&["--nproc-per-node", "3"]).finish().expect_code(0);
    assert_eq!(losses(&[&life, &next]).len(), reference().losses.len());
}

#[test]
fn two_ranks_have_no_majority_and_load_again() {
    let lab = Lab::on_files();
    let life = lab.run("tie").faults("worker.loaded=error@rank=1@step=0").finish().expect_code(69);
    assert!(reasons(&life)[0].contains("no majority says who is right: worker 0 of node "), "{}", life.story());
    let next = lab.resume("tie").finish().expect_code(0);
    lab.expect_as_undisturbed("tie", &[&next]);
}
