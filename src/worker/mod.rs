//! The child process, one per device: it only computes. This is the process around [`crate::train`].
//!
//! A worker never talks to the store. Its agent gives it its rank, and it loads its state from shared memory, trains,
//! and copies its share of the state into shared memory when ordered. A LibTorch abort, a CUDA fault or the OOM killer
//! takes one worker; the agent still holds its last snapshot.
//!
//! A worker may live longer than a generation: when all ranks have stopped at a step that is saved, the agent may give
//! it another place in another group ([`ToWorker::Regroup`](crate::protocol::ToWorker::Regroup)). It leaves its peers
//! and starts as it did at first (`start`), but for the state, which it has.
//!
//! Threads: the train loop (main), the control thread that answers freezes, and the copy threads. Nothing here is
//! asynchronous. On an error the worker reports what a person should know and exits; on a crash it reports nothing, and
//! the agent learns of it from the end of the process.
#![doc = include_str!("README.md")]

pub mod device;
pub mod gate;
pub mod task;

mod fitting;
mod link;
mod patience;
mod reports;
mod start;

use std::{
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use self::{
    fitting::Fitting,
    gate::{Save, StepGate},
    link::{Link, Next, Orders},
    patience::{After, Patience},
    reports::Reports,
    start::Started,
};
use crate::{
    error::{Error, Kind, Result},
    faults::{self, At},
    ids::{Fingerprint, Rank, Step},
    protocol::{FromWorker, SaveOrder},
    shortage::is_out_of_memory,
    snapshot::{capture::Capture, mode::CaptureMode},
    task::TaskError,
    train::{HeldOut, Part, Pass, Training, Update, state::Replicated},
};

/// Runs a worker to its end. Called only in a process started by an agent, never by hand.
pub fn main() -> Result<ExitCode> {
    let (link, orders) = link::connect()?;
    match live(&link, orders) {
        Ok(never) => match never {},
        Err(error) => {
            // If memory is short now, it may suffice once others have released theirs: the agent decides.
            let permanent = matches!(error.kind(), Kind::Config | Kind::Usage | Kind::Data | Kind::Permission)
                && !is_out_of_memory(&error.to_string());
            let hint = error.hint().map(str::to_owned);
            link.tell(&FromWorker::Failed { message: error.to_string(), hint, permanent });
            if error.comes_of::<TaskError>() {
                // Its peers would say that it has gone, and the agent might hear them first. The agent ends it.
                thread::park_timeout(HEARD);
            }
            link::leave()
        }
    }
}

/// One generation after the other.
fn live(link: &Link, mut orders: Orders) -> Result<Never> {
    let mut started = start::first(link, &mut orders)?;
    loop {
        let Started { worker, saves, measure } = started;
        let (training, next) = worker.train(orders, &saves, measure)?;
        let Next { orders: again, assignment, keeps } = next;
        orders = again;
        started = start::again(link, &mut orders, assignment, training, keeps)?;
    }
}

/// How long a worker whose task has failed stays, unless its agent ends it sooner: until its reason has been heard.
const HEARD: Duration = Duration::from_secs(2);

/// The result of a worker's life: it ends only with the process, or with an error.
enum Never {}

struct Worker {
    link: Link,
    rank: Rank,
    /// The last finished step.
    done: Step,
    /// The last step of the run.
    last: Step,
    training: Training,
    capture: Capture,
    /// What other ranks have, too; `None`: there is one rank.
    replicated: Option<Replicated>,
    patience: Patience,
    reports: Reports,
    /// Time spent waiting for captures and fingerprints since the last step report.
    stalled: Duration,
    /// The captured step whose capture the device waits for in the host's place.
    held: Option<Step>,
    /// Whether measured states wait for the agent's verdict.
    may_stop_early: bool,
    fitting: Fitting,
}

impl Worker {
    /// Trains until the agent gives this worker a place in the next generation.
    fn train(mut self, orders: Orders, saves: &[SaveOrder], measure: bool) -> Result<(Training, Next)> {
        match self.run(orders, saves, measure) {
            // The slots are the agent's again before it lays them out anew.
            Ok(next) => Ok((self.training, next)),
            Err(error) => {
                // The step before the error is finished, and whoever hears of the error has heard of that.
                // If its numbers can't be read any more, the error itself is what counts.
                let _ = self.report();
                // Its peers see its connections close when it is dropped: not before the agent has heard why. The
                // process ends.
                let words = is_out_of_memory(&error.to_string()).then(|| self.fitting.words());
                std::mem::forget(self);
                Err(match words {
                    Some(words) => error.context(words),
                    None => error,
                })
            }
        }
    }

    /// The train loop: readable from here to its end. `measure`: the state that was loaded, first of all.
    fn run(&mut self, orders: Orders, saves: &[SaveOrder], measure: bool) -> Result<Next> {
        let gate = Arc::new(StepGate::new(self.done, self.last));
        gate.thaw(saves, None);
        let control = orders.serve(self.link.clone(), Arc::clone(&gate))?;
        if measure {
            self.evaluate(&gate)?;
        }
        self.wait_for_verdict(&gate);
        self.training.timer().begin()?;
        // What the next step follows, and how long a validation before it took.
        let (mut after, mut validated) = (After::Step, Duration::ZERO);
        loop {
            // Between two steps: the state is that of step `done`.
            let boundary = gate.enter(self.done, || self.report())?;
            if let Some(save) = boundary.save {
                self.report()?;
                self.save(save)?;
                after = after.max(After::Save);
            }
            if !boundary.proceed {
                break;
            }
            let step = self.done.next();
            faults::check("worker.step", At { rank: Some(self.rank.get()), step: Some(step.get()) })
                .map_err(injected)?;
            faults::check("worker.memory", At { rank: Some(self.rank.get()), step: Some(step.get()) })
                .map_err(|fault| Error::new(Kind::Config, format!("{fault}: out of memory")))?;

            if let Some(limit) = self.patience.change(after) {
                self.training.set_patience(limit)?;
            }
            let Pass { loss } = self.training.forward_backward(step).map_err(|error| at(step, error))?;
            // The last moment at which the state of step `done` still stands.
            self.release_capture()?;
            self.training.timer().lap(Part::Capture)?;
            let Update { grad_norm, lr } = self.training.update(step)?;

            // A GPU has not come so far: the numbers of the step before are there now.
            self.report()?;
            let stalled = std::mem::take(&mut self.stalled);
            let followed = (std::mem::replace(&mut after, After::Step), std::mem::take(&mut validated));
            self.reports.finished(step, lr, [&loss, &grad_norm], stalled, followed)?;
            self.training.timer().begin()?;
            if !self.reports.may_be_late() {
                self.report()?;
            }
            self.done = step;
            // A step has used all the memory that steps use, and the state is loaded everywhere.
            self.capture.takes_memory();
            if self.training.evaluation_is_due(step) {
                let begin = Instant::now();
                self.report()?;
                self.evaluate(&gate)?;
                self.wait_for_verdict(&gate);
                validated = begin.elapsed();
                self.training.timer().begin()?;
                after = After::Validation;
            }
        }
        self.report()?;
        self.finish_capture()?;
        // Peers may be told to exit once all have stopped: by then they must have sent everything that this rank waits
        // for.
        self.training.settle()?;
        self.link.tell(&FromWorker::Stopped { step: self.done });
        // The state stays as it is, so its save may be ordered when a slot becomes free. The control thread ends the
        // process, unless another generation begins.
        while let Some(save) = gate.wait_for_last_save(self.done) {
            self.save(save)?;
            self.finish_capture()?;
        }
        control.join().map_err(|_| Error::new(Kind::Bug, "the control thread has panicked"))
    }

    /// Reports the step whose report is due, if there is one: nobody may hear of a state before that.
    fn report(&mut self) -> Result<()> {
        let Some(mut due) = self.reports.due(self.training.timer())? else { return Ok(()) };
        self.patience.step(due.took_s, due.after);
        // The device has passed this step, and in it the wait for the copy of the state before.
        if self.held.is_some_and(|captured| captured < due.report.step) {
            due.report.stall_s += self.wait_for_capture()?.as_secs_f64();
        }
        self.link.tell(&FromWorker::Step(due.report));
        Ok(())
    }

    fn save(&mut self, Save { slot, mode, compare }: Save) -> Result<()> {
        let (link, step) = (self.link.clone(), self.done);
        self.finish_capture()?;
        self.training.settle()?;
        let fingerprint = if compare { self.fingerprint()? } else { None };
        self.capture.start(slot, mode == CaptureMode::Hasty, move |copy| {
            link.tell(&FromWorker::Captured { step, slot, copy_s: copy.as_secs_f64(), fingerprint });
        })?;
        match mode {
            CaptureMode::Overlap | CaptureMode::Hasty => Ok(()),
            CaptureMode::Blocking => self.release_capture(),
        }
    }

    /// Of what other ranks have, too. The loop waits for it.
    fn fingerprint(&mut self) -> Result<Option<Fingerprint>> {
        let Some(replicated) = &self.replicated else { return Ok(None) };
        let begin = Instant::now();
        if faults::check("worker.state", At { rank: Some(self.rank.get()), step: Some(self.done.get()) }).is_err() {
            replicated.flip_a_bit()?;
        }
        let fingerprint = replicated.fingerprint()?;
        self.stalled += begin.elapsed();
        Ok(Some(fingerprint))
    }

    /// What is launched from here on may change the captured state. On a GPU nothing waits here but its stream.
    fn release_capture(&mut self) -> Result<()> {
        if self.capture.release()? {
            self.held = Some(self.done);
            return Ok(());
        }
        self.finish_capture()
    }

    /// Waits for the capture under way, if there is one.
    fn finish_capture(&mut self) -> Result<()> {
        let stall = self.wait_for_capture()?;
        self.stalled += stall;
        Ok(())
    }

    /// The same, and returns how long it has held up the computation.
    fn wait_for_capture(&mut self) -> Result<Duration> {
        let step = self.held.take().unwrap_or(self.done);
        let Some(stall) = self.capture.wait()? else { return Ok(Duration::ZERO) };
        self.link.tell(&FromWorker::Stalled { step, stall_s: stall.as_secs_f64() });
        Ok(stall)
    }

    /// The validation loss over this rank's share; abandoned at once when the run is to end early.
    fn evaluate(&mut self, gate: &StepGate) -> Result<()> {
        let (step, last) = (self.done, self.last);
        let measured =
            self.training.evaluate(|| gate.is_ending(step) && step < last).map_err(|error| at(step, error))?;
        if let Some(HeldOut(sums)) = measured {
            self.link.tell(&FromWorker::Validated { step, sums });
        }
        Ok(())
    }

    /// All ranks are to stop after the very state whose measurement says so: the next step begins once it does not.
    fn wait_for_verdict(&self, gate: &StepGate) {
        if self.may_stop_early {
            gate.wait_for_verdict(self.done);
        }
    }
}

/// A task's own error, with the step that it came in.
fn at(step: Step, error: Error) -> Error {
    if error.comes_of::<TaskError>() { error.context(format!("step {step}")) } else { error }
}

fn injected(fault: faults::Injected) -> Error {
    Error::from_source(Kind::Bug, fault)
}
