//! Ranks that write one file together: with `parallel.strategy = "shard"` each has a range of every weight, and copies
//! it into the file of the whole tensor. A worker that dies in the middle of its copy leaves files of two steps; they
//! are neither uploaded nor started from.

use rustix::process::{Signal, kill_process};

use crate::{
    support::{
        lab::Lab,
        trainer::{Finished, Trainer, losses},
    },
    zero1::tensors,
};

fn sharded(run: Trainer, slots: &str) -> Trainer {
    let slots = format!("checkpoint.slots={slots}");
    run.args(&["--set", "parallel.strategy=shard", "--set", "train.precision=bf16", "--set", &slots])
}

/// The run of the other tests, which nobody disturbs.
fn undisturbed(lab: &Lab) -> Finished {
    sharded(lab.run("whole"), "2").finish().expect_code(0)
}

#[track_caller]
fn expect_the_same(lab: &Lab, run: &str, lives: &[&Finished], whole: &Finished) {
    assert!(losses(lives) == losses(&[whole]), "losses differ\n{}", lives[lives.len() - 1].story());
    assert!(tensors(lab, run) == tensors(lab, "whole"), "state differs\n{}", lives[lives.len() - 1].story());
    lab.expect_all_verify(run);
}

/// Rank 0 is stopped when it has begun to copy step 16, perhaps before the end of its copy, and is killed. The other
/// rank has copied its ranges into both files of weights: with one slot, over the checkpoint of step 8.
#[test]
fn a_worker_that_dies_in_its_copy_leaves_nothing_that_is_uploaded_or_started_from() {
    let lab = Lab::on_files();
    let whole = undisturbed(&lab);
    for slots in ["2", "1"] {
        let run = format!("dies-{slots}");
        let (every, stops) = (["--set", "checkpoint.every=\"8 steps\""], [10, 17]);
        let faults = stops.map(|step| format!("worker.step=stop@rank=0@step={step}")).join(",");
        let running = sharded(lab.run(&run), slots).args(&every).faults(&faults).start();
        // With one slot, the order for step 16 comes when step 8 is committed.
        running.wait_for_step("checkpoint", 8);
        running.let_go();
        running.wait_for_step("step", 16);
        kill_process(running.held(), Signal::KILL).expect("kill a worker");
        // Its successor is stopped at the same steps.
        let from = running.wait_for("workers that start again", |event| event.kind() == "restored").step();
        for _ in stops.iter().filter(|step| from < Some(**step)) {
            running.let_go();
        }
        let life = running.finish().expect_code(0);
        assert_eq!(life.of_kind("worker_died").len(), 1, "{}", life.story());
        assert!([Some(8), Some(16)].contains(&from), "{}", life.story());
        expect_the_same(&lab, &run, &[&life], &whole);
    }
}

/// Both ranks have captured step 16 when one dies: the others start from it in memory.
#[test]
fn workers_are_replaced_from_the_memory_that_they_have_filled_together() {
    let lab = Lab::on_files();
    let whole = undisturbed(&lab);
    for slots in ["2", "1"] {
        let run = format!("worker-{slots}");
        let every = ["--set", "checkpoint.every=\"16 steps\""];
        let running = sharded(lab.run(&run), slots).args(&every).hold_after(17).start();
        running.wait_for_step("checkpoint", 16);
        running.held();
        kill_process(running.workers().pop().expect("a worker"), Signal::KILL).expect("kill a worker");
        let life = running.finish().expect_code(0);
        assert_eq!(
            (&life.last("restored").value["from"], life.resumed_from()),
            (&"memory".into(), 16),
            "{}",
            life.story()
        );
        expect_the_same(&lab, &run, &[&life], &whole);
    }
}
