//! A save is a copy: no rank waits for another.

use super::*;
use crate::{
    snapshot::{
        capture::Capture,
        image::{SharedImage, page_size},
        plan::{SlotCopy, plan},
    },
    torch::HostCopier,
};

/// What a rank copies, and the bytes of a slot, as an agent of all ranks lays them out.
fn copies(state: &State, place: Place) -> (Vec<SlotCopy>, u64) {
    let plans = plan(state.specs(), place.world, page_size()).unwrap();
    let mut bases = vec![0];
    for plan in &plans {
        bases.push(bases[bases.len() - 1] + plan.len);
    }
    let own = &plans[place.rank.get() as usize];
    let copies = own.copies.iter().map(|copy| copy.within(bases[copy.image.get() as usize]).unwrap());
    (copies.collect(), bases[plans.len()])
}

#[test]
fn a_save_runs_no_collective_under_any_strategy() {
    use config::Strategy::{Ddp, Shard, Zero1};
    for strategy in [Ddp, Zero1, Shard] {
        for precision in [Precision::Fp32, Precision::Bf16] {
            let run = run(strategy, precision, 2);
            let slot = SharedImage::create("slot").unwrap();
            let counts = ranks(2, LIMIT, |group| {
                let counter = group.share().unwrap();
                let (mut training, state) = rank(&run, Some(group), None);
                let begun = || counter.begun().unwrap();
                let before = begun();
                train(&mut training, 1..=2);
                let (copies, bytes) = copies(&state, training.place);
                slot.grow(bytes).unwrap();
                let slots = [SharedImage::inherited(slot.try_clone().unwrap().into())];
                let copier = HostCopier::new(1, true).unwrap();
                let mut capture = Capture::new(&copies, &slots, state.tensors(), copier).unwrap();
                let trained = begun();
                // As a worker saves, with the comparison of what all ranks have.
                training.settle().unwrap();
                state.replicated().unwrap().fingerprint().unwrap();
                capture.start(0, false, |_| ()).unwrap();
                capture.wait().unwrap();
                let saved = begun();
                train(&mut training, 3..=3);
                [before, trained, saved, begun()]
            });
            for [before, trained, saved, after] in counts {
                assert_eq!(trained, saved, "{strategy:?} {precision:?}");
                assert!(before < trained && saved < after, "{strategy:?} {precision:?}: steps are not counted");
            }
        }
    }
}
