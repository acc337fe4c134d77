//! Where the train loop and the agent agree on a step, without a collective and without a lock in the loop.
//!
//! The protocol is that of TSL's `PreemptionSyncManager` (tensorflow/tsl, `preemption_sync_manager.cc`): to decide
//! anything that all ranks must do at the same step, the agent *freezes* every rank: each names the last step that it
//! has started and starts no other. The agent takes the largest; every rank is still able to reach it, none has passed
//! it; it *thaws* them with the decision. A rank that meets no boundary in that time does not wait at all.
//!
//! The loop's part is [`StepGate::enter`], one compare-and-swap a step. Orders are read there, at the boundary before
//! step k+1, while the state is still that of step k: an order "save step k" can therefore still be obeyed when it
//! arrives during k's last instruction.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
};

use crate::{config::MAX_STEPS, ids::Step, protocol::SaveOrder, snapshot::mode::CaptureMode};

const _: () = assert!(MAX_STEPS <= STEP);

const FROZEN: u64 = 1 << 63;
const NEVER: u64 = u64::MAX;
/// The low bits of the state are the last step started; [`MAX_STEPS`] fits.
const STEP: u64 = (1 << 41) - 1;
/// Above them freezes are counted, so that a loop which was interrupted between its look at the orders and its start
/// finds out that there was a freeze meanwhile, though it is over. It would miss that only by sleeping through four
/// million of them.
const FREEZE: u64 = 1 << 41;
const FREEZES: u64 = (FROZEN - 1) & !STEP;

/// The loop's orders at a step boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// First capture the state of the step just finished.
    pub save: Option<Save>,
    /// Then start the next step, or stop here.
    pub proceed: bool,
}

/// An order for the state of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Save {
    /// It is copied into this slot.
    pub slot: u8,
    /// Whether the loop waits meanwhile.
    pub mode: CaptureMode,
    /// Whether the state's fingerprint is wanted.
    pub compare: bool,
}

const MODES: [CaptureMode; 3] = [CaptureMode::Overlap, CaptureMode::Hasty, CaptureMode::Blocking];

/// A mode in an atomic number.
const fn number_of(mode: CaptureMode) -> u8 {
    match mode {
        CaptureMode::Overlap => 0,
        CaptureMode::Hasty => 1,
        CaptureMode::Blocking => 2,
    }
}

/// The meeting point of the train loop (one thread) and the control thread (another).
#[derive(Debug)]
pub struct StepGate {
    /// The last step started, the number of freezes, and the frozen bit.
    state: AtomicU64,
    stop_after: AtomicU64,
    save_at: [AtomicU64; 2],
    /// These two are written before, and read after, the slot's step.
    mode: [AtomicU8; 2],
    compare: [AtomicBool; 2],
    /// The step whose measured state is known to be no reason to stop, plus 1; 0: none is.
    proceeds: AtomicU64,
    /// Another generation begins.
    regroups: AtomicBool,
    /// Guards nothing but the sleep of a loop that is frozen, has stopped, or waits for a verdict.
    sleep: Mutex<u64>,
    wake: Condvar,
}

impl StepGate {
    /// A gate for a loop that begins after `done` and ends after `last`.
    pub fn new(done: Step, last: Step) -> Self {
        Self {
            state: AtomicU64::new(done.get()),
            stop_after: AtomicU64::new(last.get()),
            save_at: [AtomicU64::new(NEVER), AtomicU64::new(NEVER)],
            mode: [AtomicU8::new(0), AtomicU8::new(0)],
            compare: [AtomicBool::new(false), AtomicBool::new(false)],
            proceeds: AtomicU64::new(0),
            regroups: AtomicBool::new(false),
            sleep: Mutex::new(0),
            wake: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.sleep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Control thread: holds the loop at its next boundary; returns the last step started.
    pub fn freeze(&self) -> Step {
        let frozen = |state: u64| (state & STEP) | (state.wrapping_add(FREEZE) & FREEZES) | FROZEN;
        let (Ok(before) | Err(before)) =
            self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| Some(frozen(state)));
        Step(before & STEP)
    }

    /// Control thread: replaces all save orders, may bring the end forward, and lets the loop go on.
    pub fn thaw(&self, saves: &[SaveOrder], stop_after: Option<Step>) {
        let mut generation = self.lock();
        for (slot, ((at, mode), compare)) in self.save_at.iter().zip(&self.mode).zip(&self.compare).enumerate() {
            let order = saves.iter().find(|order| usize::from(order.slot) == slot);
            compare.store(order.is_some_and(|order| order.compare), Ordering::Release);
            mode.store(order.map_or(0, |order| number_of(order.mode)), Ordering::Release);
            at.store(order.map_or(NEVER, |order| order.step.get()), Ordering::Release);
        }
        if let Some(step) = stop_after {
            self.stop_after.fetch_min(step.get(), Ordering::AcqRel);
        }
        self.state.fetch_and(!FROZEN, Ordering::AcqRel);
        *generation += 1;
        self.wake.notify_all();
    }

    /// Control thread: the state of `step` is no reason to stop early.
    pub fn proceed(&self, step: Step) {
        let mut generation = self.lock();
        self.proceeds.fetch_max(step.get() + 1, Ordering::AcqRel);
        *generation += 1;
        self.wake.notify_all();
    }

    /// Train loop: waits until it is known whether the run goes on after `done`, or ends there.
    pub fn wait_for_verdict(&self, done: Step) {
        let mut generation = self.lock();
        while !self.is_ending(done) && self.proceeds.load(Ordering::Acquire) <= done.get() {
            generation = self.wake.wait(generation).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Train loop: the boundary between `done` and the next step. Waits while frozen, and calls `waits` before that.
    pub fn enter<E>(&self, done: Step, mut waits: impl FnMut() -> Result<(), E>) -> Result<Boundary, E> {
        loop {
            if self.state.load(Ordering::Acquire) & FROZEN != 0 {
                waits()?;
            }
            let state = self.wait_until_thawed();
            let boundary = self.orders(done);
            if !boundary.proceed {
                return Ok(Boundary { save: self.take_save(done), proceed: false });
            }
            // Otherwise the loop was frozen since the look: it waits for the decision.
            if self.start(state, done.next()) {
                self.take_save(done);
                return Ok(boundary);
            }
        }
    }

    /// The state, once it is not frozen.
    fn wait_until_thawed(&self) -> u64 {
        let state = self.state.load(Ordering::Acquire);
        if state & FROZEN == 0 {
            return state;
        }
        let mut generation = self.lock();
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state & FROZEN == 0 {
                return state;
            }
            generation = self.wake.wait(generation).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The orders for this boundary, as they are now.
    fn orders(&self, done: Step) -> Boundary {
        if done.get() >= self.stop_after.load(Ordering::Acquire) {
            return Boundary { save: None, proceed: false };
        }
        Boundary { save: self.peek_save(done), proceed: true }
    }

    /// Starts `next`, unless there was a freeze since `state` was read.
    fn start(&self, state: u64, next: Step) -> bool {
        let started = (state & !STEP) | (next.get() & STEP);
        self.state.compare_exchange(state, started, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn peek_save(&self, done: Step) -> Option<Save> {
        let is_it = |slot: &u8| self.save_at[usize::from(*slot)].load(Ordering::Acquire) == done.get();
        (0..2_u8).find(is_it).map(|slot| self.save_into(slot))
    }

    fn take_save(&self, done: Step) -> Option<Save> {
        let is_it = |slot: &u8| {
            let at = &self.save_at[usize::from(*slot)];
            at.compare_exchange(done.get(), NEVER, Ordering::AcqRel, Ordering::Acquire).is_ok()
        };
        (0..2_u8).find(is_it).map(|slot| self.save_into(slot))
    }

    fn save_into(&self, slot: u8) -> Save {
        let mode = self.mode[usize::from(slot)].load(Ordering::Acquire);
        let compare = self.compare[usize::from(slot)].load(Ordering::Acquire);
        Save { slot, mode: MODES.into_iter().find(|known| number_of(*known) == mode).unwrap_or_default(), compare }
    }

    /// Control thread, after the end: another generation begins.
    pub fn regroup(&self) {
        let mut generation = self.lock();
        self.regroups.store(true, Ordering::Release);
        *generation += 1;
        self.wake.notify_all();
    }

    /// Train loop, after the end: waits for an order to save the last step, which may come when a slot gets free.
    /// `None`: another generation begins, and this one has ordered no other save.
    pub fn wait_for_last_save(&self, done: Step) -> Option<Save> {
        let mut generation = self.lock();
        loop {
            if let Some(save) = self.take_save(done) {
                return Some(save);
            }
            if self.regroups.load(Ordering::Acquire) {
                return None;
            }
            generation = self.wake.wait(generation).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Train loop, in any long work between two steps: whether the run is to end at `done`, so that the work need not
    /// be finished.
    pub fn is_ending(&self, done: Step) -> bool {
        done.get() >= self.stop_after.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::*;

    const fn order(step: u64, slot: u8) -> SaveOrder {
        SaveOrder { step: Step(step), slot, mode: CaptureMode::Overlap, compare: false }
    }
    #[expect(clippy::unnecessary_wraps, reason = "what a boundary holds")]
    const fn into(slot: u8) -> Option<Save> {
        Some(Save { slot, mode: CaptureMode::Overlap, compare: false })
    }

    const GO: Boundary = Boundary { save: None, proceed: true };

    fn enter(gate: &StepGate, done: Step) -> Boundary {
        gate.enter(done, || Ok::<(), std::convert::Infallible>(())).unwrap()
    }

    #[test]
    fn the_loop_runs_to_its_end_and_stops_there() {
        let gate = StepGate::new(Step(3), Step(5));
        assert_eq!(enter(&gate, Step(3)), GO);
        assert_eq!(enter(&gate, Step(4)), GO);
        assert_eq!(enter(&gate, Step(5)), Boundary { save: None, proceed: false });
    }

    #[test]
    fn an_order_for_the_step_being_run_is_obeyed_at_its_end() {
        let gate = StepGate::new(Step(0), Step(9));
        enter(&gate, Step(0));
        assert_eq!(gate.freeze(), Step(1), "step 1 is started, not finished");
        gate.thaw(&[order(1, 1)], Some(Step(1)));
        assert_eq!(enter(&gate, Step(1)), Boundary { save: into(1), proceed: false });
        gate.thaw(&[order(1, 0)], None);
        assert_eq!(gate.wait_for_last_save(Step(1)).unwrap().slot, 0);
    }

    #[test]
    fn a_loop_that_has_stopped_obeys_its_last_order_before_another_generation_begins() {
        let gate = StepGate::new(Step(0), Step(1));
        enter(&gate, Step(0));
        assert_eq!(enter(&gate, Step(1)), Boundary { save: None, proceed: false });
        gate.thaw(&[order(1, 1)], None);
        gate.regroup();
        assert_eq!(gate.wait_for_last_save(Step(1)), into(1));
        assert_eq!(gate.wait_for_last_save(Step(1)), None);
        // It may sleep already.
        let gate = Arc::new(StepGate::new(Step(1), Step(1)));
        let other = Arc::clone(&gate);
        let waiting = std::thread::spawn(move || other.wait_for_last_save(Step(1)));
        gate.regroup();
        assert_eq!(waiting.join().unwrap(), None);
    }

    #[test]
    fn a_loop_that_waits_for_a_verdict_goes_on_with_its_word_or_with_the_end() {
        let waits = |step: u64, ends: fn(&StepGate)| {
            let gate = Arc::new(StepGate::new(Step(3), Step(9)));
            let (says, over) = mpsc::channel();
            let other = Arc::clone(&gate);
            let waiting = std::thread::spawn(move || {
                other.wait_for_verdict(Step(step));
                says.send(()).unwrap();
            });
            // Neither an older word nor a freeze is one.
            gate.proceed(Step(step - 1));
            assert_eq!(gate.freeze(), Step(3));
            gate.thaw(&[order(step, 0)], None);
            assert!(over.try_recv().is_err());
            ends(&gate);
            waiting.join().unwrap();
            over.recv().unwrap();
            gate
        };
        assert_eq!(enter(&waits(3, |gate| gate.proceed(Step(3))), Step(3)), Boundary { save: into(0), proceed: true });
        let ended = waits(3, |gate| gate.thaw(&[order(3, 1)], Some(Step(3))));
        assert_eq!(enter(&ended, Step(3)), Boundary { save: into(1), proceed: false });
        // The last step is the end, and a word may come before the wait.
        StepGate::new(Step(3), Step(9)).wait_for_verdict(Step(9));
        let gate = StepGate::new(Step(3), Step(9));
        gate.proceed(Step(3));
        gate.wait_for_verdict(Step(3));
    }

    #[test]
    fn a_loop_says_that_it_waits_before_it_does_and_never_if_it_does_not() {
        let gate = Arc::new(StepGate::new(Step(0), Step(9)));
        let refused = |gate: &StepGate, done| gate.enter(done, || Err("it waits"));
        assert_eq!(refused(&gate, Step(0)), Ok(GO));
        assert_eq!(gate.freeze(), Step(1));
        assert_eq!(refused(&gate, Step(1)), Err("it waits"));
        let (waits, waiting) = mpsc::channel();
        let other = Arc::clone(&gate);
        let entering = std::thread::spawn(move || other.enter(Step(1), || waits.send(())));
        waiting.recv().unwrap();
        gate.thaw(&[order(1, 1)], None);
        assert_eq!(entering.join().unwrap().unwrap().save, into(1));
    }

    #[test]
    fn new_orders_replace_old_ones() {
        let gate = StepGate::new(Step(0), Step(9));
        gate.thaw(&[order(2, 0)], None);
        gate.thaw(&[order(1, 1)], None);
        enter(&gate, Step(0));
        assert_eq!(enter(&gate, Step(1)).save, into(1));
        assert_eq!(enter(&gate, Step(2)).save, None);
    }

    #[test]
    fn an_order_says_whether_the_loop_waits_for_the_copy_and_compares() {
        for mode in MODES {
            let gate = StepGate::new(Step(0), Step(9));
            let compare = true;
            gate.thaw(&[SaveOrder { mode, compare, ..order(1, 1) }, order(2, 0)], None);
            enter(&gate, Step(0));
            assert_eq!(enter(&gate, Step(1)).save, Some(Save { slot: 1, mode, compare }));
            assert_eq!(enter(&gate, Step(2)).save, into(0));
        }
    }

    #[test]
    fn a_frozen_loop_waits_for_the_decision_and_obeys_it() {
        let gate = Arc::new(StepGate::new(Step(0), Step(100)));
        enter(&gate, Step(0));
        let started = gate.freeze();
        let (tell, told) = mpsc::channel();
        let looper = {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || tell.send(enter(&gate, Step(1))).unwrap())
        };
        // The loop can't have entered step 2: it was frozen before.
        assert_eq!(started, Step(1));
        gate.thaw(&[order(1, 0)], Some(Step(1)));
        assert_eq!(told.recv().unwrap(), Boundary { save: into(0), proceed: false });
        looper.join().unwrap();
    }

    #[test]
    fn a_freeze_that_came_and_went_is_detected() {
        let gate = StepGate::new(Step(0), Step(9));
        enter(&gate, Step(0));
        let state = gate.wait_until_thawed();
        assert_eq!(gate.orders(Step(1)), GO);
        assert_eq!(gate.freeze(), Step(1));
        gate.thaw(&[order(1, 0)], Some(Step(1)));
        assert!(!gate.start(state, Step(2)), "step 2 began though all had agreed on step 1");
        assert_eq!(enter(&gate, Step(1)), Boundary { save: into(0), proceed: false });
    }

    /// Three loops run freely; they are frozen at a random moment; the largest started step is one that all can still
    /// reach.
    #[test]
    fn ranks_at_any_places_agree_on_a_step_that_none_has_passed() {
        for _ in 0..50 {
            let gates: Vec<_> = (0..3).map(|_| Arc::new(StepGate::new(Step(0), Step(1_000_000)))).collect();
            let loops: Vec<_> = gates
                .iter()
                .map(|gate| {
                    let gate = Arc::clone(gate);
                    std::thread::spawn(move || {
                        let mut done = Step(0);
                        loop {
                            let boundary = enter(&gate, done);
                            if !boundary.proceed {
                                return (done, boundary.save);
                            }
                            done = done.next();
                        }
                    })
                })
                .collect();
            let agreed = gates.iter().map(|gate| gate.freeze()).max().unwrap();
            for gate in &gates {
                gate.thaw(&[order(agreed.get(), 0)], Some(agreed));
            }
            for finished in loops {
                assert_eq!(finished.join().unwrap(), (agreed, into(0)));
            }
        }
    }
}
