//! A loss or a gradient that is not finite changes nothing, on no rank, from its own step on.

use super::*;
use crate::{
    config::Strategy::{Ddp, Zero1},
    model::Leaves,
};

/// A lesson whose loss is infinite in one step; its gradient would be finite.
struct Planted {
    inner: Box<dyn Lesson>,
    step: Option<Step>,
    now: bool,
}

impl Lesson for Planted {
    fn leaves(&self) -> &dyn Leaves {
        self.inner.leaves()
    }
    fn leaves_mut(&mut self) -> &mut dyn Leaves {
        self.inner.leaves_mut()
    }
    fn passes(&self) -> config::Passes {
        self.inner.passes()
    }
    fn held_out(&self) -> u64 {
        self.inner.held_out()
    }
    fn targets(&mut self, positions: std::ops::Range<u64>) -> Result<u64> {
        self.inner.targets(positions)
    }
    fn nothing_to_learn(&self, step: Step, samples: u32) -> Error {
        self.inner.nothing_to_learn(step, samples)
    }
    fn read(&mut self, positions: std::ops::Range<u64>) -> Result<()> {
        self.now = self.step == Some(Step(positions.start / 8 + 1));
        self.inner.read(positions)
    }
    fn loss(&self) -> Result<Loss> {
        let Loss { mean, targets } = self.inner.loss()?;
        Ok(Loss { mean: if self.now { mean + f64::INFINITY } else { mean }, targets })
    }
    fn sums(&self) -> Vec<HeldOutSum> {
        self.inner.sums()
    }
    fn measure(&mut self, samples: std::ops::Range<u64>, count: u64, sums: &mut [HeldOutSum]) -> Result<()> {
        self.inner.measure(samples, count, sums)
    }
}

fn planted(training: Training, step: Option<Step>) -> Training {
    let Training { train, validation_every, validation_sequences, place, lesson, strategy, timer, brake } = training;
    let lesson = Box::new(Planted { inner: lesson, step, now: false });
    Training { train, validation_every, validation_sequences, place, lesson, strategy, timer, brake }
}

#[test]
fn a_loss_that_is_infinite_on_one_rank_changes_nothing_on_any_and_no_later_step_does() {
    for (strategy, world, precision, clip) in [
        (Ddp, 1, Precision::Fp32, 0.5),
        (Ddp, 1, Precision::Bf16, 0.0),
        (Ddp, 3, Precision::Bf16, 0.5),
        (Zero1, 2, Precision::Fp32, 0.0),
        (Zero1, 3, Precision::Bf16, 0.5),
    ] {
        let case = format!("{strategy:?} {world} {precision:?} {clip}");
        let mut run = run(strategy, precision, 2);
        run.train.optimizer.grad_clip = clip;
        let seen = everywhere(world, |group| {
            let (training, state) = rank(&run, group, None);
            let last = training.place.rank.get() + 1 == world;
            let mut training = planted(training, last.then_some(Step(4)));
            let place = training.place;
            train(&mut training, 1..=2);
            let before = files(&state, place);
            let sound = train(&mut training, 3..=3);
            let good = files(&state, place);
            let broken = train(&mut training, 4..=4);
            let after = files(&state, place);
            let later = train(&mut training, 5..=6);
            (before, good, after, files(&state, place), [sound, broken, later])
        });
        for (before, good, after, end, [sound, broken, later]) in &seen {
            assert!(before != good, "{case}: step 3 learns");
            assert!(good == after && good == end, "{case}: the state is not that of step 3");
            let [loss, norm] = sound[0].map(f64::from_bits);
            assert!(loss.is_finite() && norm.is_finite(), "{case}");
            assert!(f64::from_bits(broken[0][1]).is_nan(), "{case}: every rank's norm says so");
            assert!(
                later.iter().flatten().all(|&bits| f64::from_bits(bits).is_finite()),
                "{case}: its weights are good"
            );
        }
        let losses: Vec<f64> = seen.iter().map(|rank| f64::from_bits(rank.4[1][0][0])).collect();
        assert!(losses.iter().any(|loss| loss.is_infinite()), "{case}: {losses:?}");
    }
}

#[test]
fn a_gradient_that_is_not_a_number_changes_nothing() {
    let run = run(Ddp, Precision::Fp32, 8);
    let (mut training, state) = rank(&run, None, None);
    train(&mut training, 1..=2);
    let good = files(&state, training.place);
    training.forward_backward(Step(3)).unwrap();
    let leaf = training.lesson.leaves().parameters().iter().find_map(crate::model::Parameter::leaf).unwrap();
    let _ = leaf.grad().flatten(0, -1).narrow(0, 5, 1).fill_(f64::NAN);
    training.update(Step(3)).unwrap();
    assert!(files(&state, training.place) == good, "the update was made");
    train(&mut training, 4..=4);
    assert!(files(&state, training.place) == good, "a later update was made");
}
