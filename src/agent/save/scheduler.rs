//! When state is saved and when the loop ends: pure decisions over what the workers have said.
//!
//! The scheduler knows the slots, one or two, the steps that the ranks have reached and the requests; it receives
//! events and answers with [`Action`]s that the event loop carries out. Time is passed in. Every decision that all
//! ranks must obey at the same step goes through a freeze (see [`crate::worker::gate`]): ask, take the largest started
//! step, tell.
//!
//! Rules:
//! - One save is uploaded at a time; a newer snapshot waits in the other slot; requests beyond that are merged into the
//!   next. Where there is one slot, the next capture waits until the save in it is committed or given up.
//! - An order that a rank may already have obeyed is repeated in every thaw until all ranks have captured; only an
//!   order for a step that no rank has started can be taken back. A rank whose loop has ended obeys a repeated order
//!   again: ranks that have captured are counted by name.
//! - A snapshot is uploaded once *every* rank has captured it, since any rank may write into any file of its node
//!   ([`crate::snapshot::plan`]); and what not every rank had captured when the workers died is nothing.
//! - Of two free slots, the order goes to the one that does not hold the newest checkpoint: crashed workers are
//!   restarted from that checkpoint.
//! - The last step is always saved. A drain saves the step that it stops at; a snapshot that waits for its upload then
//!   gives up its slot, since the newer one makes it worthless. The upload in flight is finished: it may be all that is
//!   left. A run that stops by itself has the time to save both.
//! - A drain without time to save the last state only stops the loop; earlier snapshots are still uploaded, and tried
//!   again when that fails.
//! - With several ranks every 16th save of a generation compares their states (`super::super::states`).
//! - A save requested now takes the running step, ahead of one ordered for later.

use std::{collections::BTreeSet, num::NonZeroU64, time::Duration};

use crate::{
    config::Cadence,
    ids::{Rank, SlotCount, Step},
    protocol::SaveOrder,
    snapshot::{
        cadence::{self, Measured},
        mode::{CaptureMode, Choice, Chooser},
    },
};

/// Where there are several ranks, one save in this many compares their states.
const COMPARED: u64 = 16;

/// Time since the generation began; monotonic.
pub type Moment = Duration;

/// An action for the event loop.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send `Freeze` with this ticket to every rank.
    Freeze {
        /// To be echoed.
        ticket: u64,
    },
    /// Send `Thaw` to every rank.
    Thaw {
        /// All orders in force.
        saves: Vec<SaveOrder>,
        /// The end, if it has been decided.
        stop_after: Option<Step>,
    },
    /// Upload this slot and commit it.
    Upload {
        /// The snapshot's step.
        step: Step,
        /// Its slot.
        slot: u8,
    },
    /// The loop has ended and its last state is committed, or can't be.
    Finished {
        /// The step at which it ended.
        step: Step,
    },
    /// Captures are made in this way from now on.
    Chosen(Choice),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum SlotState {
    Free,
    /// Ranks have been told to capture this step; these have done so.
    Ordered {
        step: Step,
        captured: BTreeSet<Rank>,
        mode: CaptureMode,
        compare: bool,
    },
    /// Captured by every rank, waiting for the upload before it.
    Full {
        step: Step,
    },
    Uploading {
        step: Step,
    },
}

impl SlotState {
    const fn step(&self) -> Option<Step> {
        match self {
            Self::Free => None,
            Self::Ordered { step, .. } | Self::Full { step } | Self::Uploading { step } => Some(*step),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    No,
    /// There are no ranks left to ask.
    Gone,
    /// A freeze is out; the largest started step so far, and how many ranks have not answered.
    Frozen {
        ticket: u64,
        largest: Step,
        missing: u32,
    },
}

/// The scheduler's inputs.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Ranks of all nodes.
    pub ranks: u32,
    /// Slots of each node.
    pub slots: SlotCount,
    /// The step that was loaded.
    pub done: Step,
    /// The run's last step.
    pub last: Step,
    /// When state is saved.
    pub cadence: Cadence,
    /// `checkpoint.keep.best` ranks states by a measurement after each multiple of these steps; those states are saved,
    /// too. Not with a cadence in steps, whose orders are given ahead.
    pub ranked: Option<NonZeroU64>,
    /// The slot that holds the checkpoint which was loaded, if one does.
    pub held: Option<u8>,
}

/// The state of the decisions; one for each generation.
#[derive(Debug)]
pub struct Scheduler {
    setup: Setup,
    slots: Vec<SlotState>,
    asked: Asked,
    next_ticket: u64,
    /// The newest step that every rank has finished.
    finished: Step,
    /// The step after which the loop ends.
    end: Step,
    draining: bool,
    /// It stops for a reason of its own: there is the time to save what waits.
    unhurried: bool,
    /// The drain's step has been agreed.
    end_decided: bool,
    stopped: u32,
    /// The newest step committed or, before the first, loaded.
    committed: Step,
    /// When the last capture was ordered, or training began.
    last_order_at: Moment,
    measured: Measured,
    chooser: Chooser,
    /// Captures compete with training instead of yielding to it.
    hasty: bool,
    /// A save was under way when the last step ended.
    saving: bool,
    /// The slot that holds the newest checkpoint.
    newest: Option<u8>,
    /// The state at the end is not saved: there is no time for it, its save is given up, or nobody is left to copy it.
    unsaved: bool,
    /// An upload that fails is not tried again.
    given_up: bool,
    /// A save has been requested, regardless of the cadence.
    wanted: bool,
    /// Where the last order was, so that a cadence in steps orders each multiple once.
    last_ordered: Step,
    /// Saves ordered so far.
    ordered: u64,
    /// The newest step after which the ranks were asked whether its measured state still stands.
    ranked: Step,
}

impl Scheduler {
    /// A group that has loaded `setup.done` and is about to train.
    pub fn new(setup: Setup, measured: Measured, now: Moment) -> Self {
        Self {
            setup,
            slots: setup.slots.numbers().map(|_| SlotState::Free).collect(),
            asked: Asked::No,
            next_ticket: 0,
            finished: setup.done,
            end: setup.last,
            draining: false,
            unhurried: false,
            end_decided: false,
            stopped: 0,
            committed: setup.done,
            last_order_at: now,
            measured,
            chooser: Chooser::default(),
            hasty: false,
            saving: false,
            newest: setup.held,
            unsaved: false,
            given_up: false,
            wanted: false,
            last_ordered: setup.done,
            ordered: 0,
            ranked: setup.done,
        }
    }

    /// The newest step that every rank has finished.
    pub fn finished(&self) -> Step {
        self.finished
    }

    /// The newest committed step of this generation, or the one that it started from.
    pub fn committed(&self) -> Step {
        self.committed
    }

    /// A save was durable after `durable_s` seconds; the loop stood still for `stall_s` of them.
    pub fn saved(&mut self, stall_s: f64, durable_s: f64) {
        // Before the loop's whole stall is known, the part of it that is known at once.
        self.measured.save_cost_s = Some(self.chooser.cost_s().unwrap_or(stall_s));
        self.measured.durable_s = Some(durable_s);
    }

    /// Whether captures that are ordered from here on compete with training.
    pub fn set_haste(&mut self, hasty: bool) {
        self.hasty = hasty;
    }

    /// The time to copy a snapshot, seconds; the slowest rank's.
    pub fn copied(&mut self, copy_s: f64) {
        self.chooser.copied(copy_s);
    }

    /// Orders that can be given with `Go`, before any rank has started a step.
    pub fn first_orders(&mut self, now: Moment) -> Vec<SaveOrder> {
        self.give_orders(self.setup.done, now);
        self.orders()
    }

    /// Every rank has finished `step`, the slowest in `step_s` seconds.
    pub fn step_finished(&mut self, step: Step, step_s: f64, now: Moment) -> Vec<Action> {
        self.finished = self.finished.max(step);
        // A capture of this very step begins after it.
        let under_way = |slots: &[SlotState], before: Step| {
            slots.iter().any(|slot| match slot {
                SlotState::Free => false,
                SlotState::Ordered { step, .. } => *step < before,
                SlotState::Full { .. } | SlotState::Uploading { .. } => true,
            })
        };
        let saving = self.saving || under_way(&self.slots, step);
        let choice = self.chooser.step(step_s, saving);
        self.saving = under_way(&self.slots, step.next());
        for slot in &self.slots {
            if let SlotState::Ordered { step: ordered, mode, .. } = slot
                && *ordered == step
            {
                self.chooser.begun(*mode);
            }
        }
        let mut actions: Vec<Action> = choice.map(Action::Chosen).into_iter().collect();
        actions.extend(self.consider(now));
        actions
    }

    /// One rank answers a freeze.
    pub fn frozen(&mut self, ticket: u64, started: Step, now: Moment) -> Vec<Action> {
        let Asked::Frozen { ticket: expected, largest, missing } = self.asked else { return Vec::new() };
        if ticket != expected {
            return Vec::new();
        }
        let (largest, missing) = (largest.max(started), missing.saturating_sub(1));
        self.asked = Asked::Frozen { ticket, largest, missing };
        if missing > 0 {
            return Vec::new();
        }
        self.asked = Asked::No;
        if self.draining {
            self.end = self.end.min(largest);
            self.end_decided = true;
            self.give_up_older();
        }
        self.give_orders(largest, now);
        vec![Action::Thaw { saves: self.orders(), stop_after: self.end_decided.then_some(self.end) }]
    }

    /// The end's state is newer than snapshots that wait, and needs their room; unless it is not saved, or there is the
    /// time to save all of them.
    fn give_up_older(&mut self) {
        let (end, kept) = (self.end, self.unsaved || self.unhurried);
        for slot in &mut self.slots {
            if matches!(slot, SlotState::Full { step } if *step < end && !kept) {
                *slot = SlotState::Free;
            }
        }
    }

    /// This rank has captured `step` into `slot`.
    pub fn captured(&mut self, rank: Rank, slot: u8, step: Step, now: Moment) -> Vec<Action> {
        if let Some(state) = self.slots.get_mut(usize::from(slot))
            && let SlotState::Ordered { step: ordered, captured, .. } = state
            && *ordered == step
            && captured.insert(rank)
            && captured.len() == self.setup.ranks as usize
        {
            // The end's state is newer, and needs the room.
            let void = self.end_decided && step < self.end && !self.unsaved && !self.unhurried;
            *state = if void { SlotState::Free } else { SlotState::Full { step } };
        }
        self.consider(now)
    }

    /// What `step` has computed is no state to go on from: neither its snapshot nor a later one is uploaded, even if
    /// all ranks say later that they have captured it.
    pub fn condemn(&mut self, step: Step) {
        for slot in &mut self.slots {
            if matches!(*slot, SlotState::Ordered { step: of, .. } | SlotState::Full { step: of } if of >= step) {
                *slot = SlotState::Free;
            }
        }
    }

    /// The upload of `slot` has ended; `committed`: its record stands. Otherwise the snapshot is still there, and is
    /// tried again.
    pub fn uploaded(&mut self, slot: u8, committed: bool, now: Moment) -> Vec<Action> {
        if let Some(&SlotState::Uploading { step }) = self.slots.get(usize::from(slot)) {
            self.slots[usize::from(slot)] = if committed {
                self.committed = self.committed.max(step);
                self.newest = Some(slot);
                SlotState::Free
            } else if self.given_up || self.makes_way(step) {
                SlotState::Free
            } else {
                // It is still whole: unless a newer one waits or is to come, it is uploaded again.
                SlotState::Full { step }
            };
        }
        self.consider(now)
    }

    /// Whether a snapshot whose upload has failed is worth less than its slot: the end's state is to have it.
    fn makes_way(&self, step: Step) -> bool {
        let is_alone = self.setup.slots == SlotCount::ONE;
        (self.end_decided || (is_alone && self.has_ended())) && step < self.end && !self.unsaved
    }

    /// One rank's loop has ended.
    pub fn rank_stopped(&mut self, step: Step, now: Moment) -> Vec<Action> {
        self.stopped += 1;
        if self.stopped == self.setup.ranks {
            self.end = self.end.min(step);
        }
        self.consider(now)
    }

    /// Stop as soon as possible, and save that step behind whatever is to be saved by then: nobody goes away, and an
    /// earlier state may be the one that is wanted.
    pub fn stop_here(&mut self, now: Moment) -> Vec<Action> {
        self.unhurried |= !self.draining;
        self.draining = true;
        self.consider(now)
    }

    /// Save and stop as soon as possible.
    pub fn drain(&mut self, now: Moment) -> Vec<Action> {
        if std::mem::take(&mut self.unhurried) && self.end_decided {
            self.give_up_older();
        }
        self.draining = true;
        self.consider(now)
    }

    /// Stop as soon as possible, without saving the step at which it stops: there is no time for it. Captured snapshots
    /// are still uploaded, and tried again: they are all that will be left.
    pub fn drain_unsaved(&mut self, now: Moment) -> Vec<Action> {
        self.unsaved = true;
        self.drain(now)
    }

    /// Save the running step, regardless of the cadence.
    pub fn save_now(&mut self, now: Moment) -> Vec<Action> {
        self.wanted = true;
        self.consider(now)
    }

    /// The step that is being uploaded.
    pub fn in_flight(&self) -> Option<Step> {
        self.slots.iter().find_map(|slot| match slot {
            SlotState::Uploading { step } => Some(*step),
            _ => None,
        })
    }

    /// The step after which the loop ends, once a drain has been agreed.
    pub fn agreed_end(&self) -> Option<Step> {
        self.end_decided.then_some(self.end)
    }

    /// Whether every rank's loop has ended: only its last state remains to be saved.
    pub fn has_ended(&self) -> bool {
        self.stopped == self.setup.ranks
    }

    /// The upload of `slot` has failed too often: the last state is given up, and whatever else fails. A last state
    /// that has waited for a slot until now is tried first.
    pub fn give_up_the_end(&mut self, slot: u8, now: Moment) -> Vec<Action> {
        if self.unsaved || self.has_snapshot_of(self.end) {
            (self.unsaved, self.given_up) = (true, true);
        }
        self.uploaded(slot, false, now)
    }

    /// The workers are gone and nothing is being uploaded: only snapshots that every rank has captured are left.
    pub fn salvage(&mut self) -> Vec<Action> {
        for slot in &mut self.slots {
            match *slot {
                SlotState::Ordered { .. } => *slot = SlotState::Free,
                // Called while nothing is being uploaded: this one has failed and was waiting to be tried again.
                SlotState::Uploading { step } => *slot = SlotState::Full { step },
                SlotState::Free | SlotState::Full { .. } => {}
            }
        }
        // With the workers there is nobody left to ask.
        (self.unsaved, self.given_up, self.unhurried) = (true, true, false);
        self.asked = Asked::Gone;
        self.next_upload().into_iter().collect()
    }

    /// The upload of `slot` has failed, and the workers can't go on: once more, then it is given up. The store has
    /// tried for as long as its settings say, each time.
    pub fn salvage_failed(&mut self, slot: u8, now: Moment) -> Vec<Action> {
        if self.asked == Asked::Gone { self.uploaded(slot, false, now) } else { self.salvage() }
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Moment) -> Vec<Action> {
        self.consider(now)
    }

    fn orders(&self) -> Vec<SaveOrder> {
        let order = |(slot, state): (u8, &SlotState)| match *state {
            SlotState::Ordered { step, mode, compare, .. } => Some(SaveOrder { step, slot, mode, compare }),
            _ => None,
        };
        (0..).zip(&self.slots).filter_map(order).collect()
    }

    fn has_snapshot_of(&self, step: Step) -> bool {
        self.committed >= step || self.slots.iter().any(|slot| slot.step() == Some(step))
    }

    /// The step to order now, if one is due, given that no rank has started a step after `started`.
    fn due(&self, started: Step, now: Moment) -> Option<Step> {
        if self.unsaved {
            return None;
        }
        // A step that has been started can still be saved: its state stands until the next step changes it.
        let earliest = started.max(self.last_ordered.next());
        let step = if self.end_decided || started >= self.end {
            self.end
        } else if self.wanted {
            started
        } else {
            match self.setup.cadence {
                Cadence::Steps(n) => Step(earliest.get().div_ceil(n.max(1)) * n.max(1)).min(self.end),
                Cadence::Time(_) | Cadence::Auto if self.is_overdue(now) => earliest.min(self.end),
                Cadence::Time(_) | Cadence::Auto => return None,
            }
        };
        (step > self.setup.done && !self.has_snapshot_of(step)).then_some(step)
    }

    /// This step, if `keep.best` ranks its state and no slot holds it yet.
    fn measured(&self, step: Step) -> Option<Step> {
        let ranked = self.setup.ranked.is_some_and(|every| step.get().is_multiple_of(every.get()));
        let wanted = ranked && !self.unsaved && !self.end_decided && step > self.setup.done;
        (wanted && !self.has_snapshot_of(step)).then_some(step)
    }

    fn is_overdue(&self, now: Moment) -> bool {
        now.saturating_sub(self.last_order_at) >= self.interval()
    }

    fn interval(&self) -> Duration {
        match self.setup.cadence {
            Cadence::Steps(_) => Duration::MAX,
            Cadence::Time(interval) => interval,
            Cadence::Auto => cadence::auto_interval(&self.measured),
        }
    }

    /// Orders captures into free slots, after withdrawing those that the new end makes void.
    fn give_orders(&mut self, started: Step, now: Moment) {
        self.ranked = self.finished;
        for slot in &mut self.slots {
            // No rank has finished a step after `started`, so none has obeyed this one.
            if matches!(slot, SlotState::Ordered { step, .. } if *step > started && *step > self.end) {
                *slot = SlotState::Free;
            }
        }
        if self.wanted && !self.slots.contains(&SlotState::Free) {
            self.make_room(started);
        }
        // The one with the newest checkpoint last.
        let (last, first): (Vec<usize>, Vec<usize>) =
            (0..self.slots.len()).partition(|index| self.newest.map(usize::from) == Some(*index));
        for index in first.into_iter().chain(last) {
            if self.slots[index] == SlotState::Free
                && let Some(step) = self.measured(started).or_else(|| self.due(started, now))
            {
                let mode = match self.chooser.mode() {
                    CaptureMode::Overlap if self.hasty => CaptureMode::Hasty,
                    mode => mode,
                };
                self.ordered += 1;
                let compare = self.setup.ranks > 1 && self.ordered.is_multiple_of(COMPARED);
                self.slots[index] = SlotState::Ordered { step, captured: BTreeSet::new(), mode, compare };
                self.last_ordered = self.last_ordered.max(step);
                self.wanted = false;
                self.last_order_at = now;
            }
        }
    }

    /// A request for now comes before orders for later: the furthest order that no rank has obeyed is withdrawn, and is
    /// given again when there is room.
    fn make_room(&mut self, started: Step) {
        let ordered = |slot: &SlotState| match slot {
            SlotState::Ordered { step, .. } if *step > started => Some(*step),
            _ => None,
        };
        let Some(furthest) =
            self.slots.iter_mut().filter(|slot| ordered(slot).is_some()).max_by_key(|slot| ordered(slot))
        else {
            return;
        };
        *furthest = SlotState::Free;
        self.last_ordered = self.slots.iter().filter_map(|slot| slot.step()).max().unwrap_or_default();
    }

    /// Whether the ranks must be asked, because something is due that they have no order for.
    fn wants_freeze(&self, now: Moment) -> bool {
        let all_stopped = self.stopped == self.setup.ranks;
        if self.draining && !self.end_decided {
            return true;
        }
        let started = if all_stopped || self.end_decided { self.end } else { self.finished.next().min(self.end) };
        let room = self.slots.iter().any(|slot| match slot {
            SlotState::Free => true,
            SlotState::Ordered { step, .. } => self.wanted && *step > started,
            SlotState::Full { .. } | SlotState::Uploading { .. } => false,
        });
        // The ranks measure after the step, and its state stands until they are done. Each step is asked about once.
        let ask = self.finished > self.ranked;
        let measured = ask && [self.finished, started].iter().any(|step| self.measured(*step).is_some());
        room && (measured || self.due(started, now).is_some())
    }

    /// The newest snapshot, if none is being uploaded; an older one that is still waiting is worth less and gives up
    /// its slot.
    fn next_upload(&mut self) -> Option<Action> {
        if self.slots.iter().any(|slot| matches!(slot, SlotState::Uploading { .. })) {
            return None;
        }
        let waiting = (0..).zip(&self.slots).filter_map(|(slot, state): (u8, _)| match *state {
            SlotState::Full { step } => Some((step, slot)),
            _ => None,
        });
        let (step, slot) = if self.unhurried { waiting.min()? } else { waiting.max()? };
        for state in &mut self.slots {
            if matches!(state, SlotState::Full { .. }) && !self.unhurried {
                *state = SlotState::Free;
            }
        }
        self.slots[usize::from(slot)] = SlotState::Uploading { step };
        Some(Action::Upload { step, slot })
    }

    fn consider(&mut self, now: Moment) -> Vec<Action> {
        let mut actions: Vec<Action> = self.next_upload().into_iter().collect();
        if self.asked == Asked::No && self.wants_freeze(now) {
            self.next_ticket += 1;
            let ticket = self.next_ticket;
            self.asked = Asked::Frozen { ticket, largest: self.finished, missing: self.setup.ranks };
            actions.push(Action::Freeze { ticket });
        }
        let idle = self.slots.iter().all(|slot| !matches!(slot, SlotState::Uploading { .. } | SlotState::Full { .. }));
        if self.stopped == self.setup.ranks && idle && (self.committed >= self.end || self.unsaved) {
            actions.push(Action::Finished { step: self.end });
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Moment {
        Duration::from_secs(seconds)
    }

    fn setup(cadence: Cadence, done: u64, last: u64) -> Setup {
        let (done, last) = (Step(done), Step(last));
        Setup { ranks: 2, slots: SlotCount::TWO, done, last, cadence, ranked: None, held: None }
    }

    fn scheduler(cadence: Cadence, done: u64, last: u64) -> Scheduler {
        Scheduler::new(setup(cadence, done, last), Measured::NOTHING, at(0))
    }

    /// Of nodes with one slot.
    fn single(cadence: Cadence, last: u64) -> Scheduler {
        let setup = Setup { slots: SlotCount::ONE, ..setup(cadence, 0, last) };
        Scheduler::new(setup, Measured::NOTHING, at(0))
    }

    fn order(step: u64, slot: u8) -> SaveOrder {
        SaveOrder { step: Step(step), slot, mode: CaptureMode::Overlap, compare: false }
    }

    /// Both ranks answer a freeze.
    fn answer(scheduler: &mut Scheduler, actions: &[Action], started: [u64; 2], now: Moment) -> Vec<Action> {
        let Some(Action::Freeze { ticket }) = actions.last() else { panic!("no freeze in {actions:?}") };
        assert!(scheduler.frozen(*ticket, Step(started[0]), now).is_empty(), "decided before both have answered");
        scheduler.frozen(*ticket, Step(started[1]), now)
    }

    fn capture(scheduler: &mut Scheduler, slot: u8, step: u64, now: Moment) -> Vec<Action> {
        let first = scheduler.captured(Rank(1), slot, Step(step), now);
        assert!(!first.iter().any(|a| matches!(a, Action::Upload { .. })), "uploaded before both have captured");
        scheduler.captured(Rank(0), slot, Step(step), now)
    }

    #[test]
    fn a_cadence_in_steps_is_ordered_ahead_and_uploaded_one_at_a_time() {
        let mut c = scheduler(Cadence::Steps(10), 0, 35);
        assert_eq!(c.first_orders(at(0)), [order(10, 0), order(20, 1)]);
        assert!(c.step_finished(Step(9), 1.0, at(1)).is_empty(), "both slots have their orders");
        assert_eq!(capture(&mut c, 0, 10, at(2)), [Action::Upload { step: Step(10), slot: 0 }]);
        // The second snapshot waits for the upload of the first.
        assert!(capture(&mut c, 1, 20, at(3)).is_empty());
        let actions = c.uploaded(0, true, at(4));
        assert_eq!(actions[0], Action::Upload { step: Step(20), slot: 1 });
        assert_eq!(c.committed(), Step(10));
        // A free slot: the next multiple is ordered, as seen from the largest started step.
        assert_eq!(
            answer(&mut c, &actions, [21, 22], at(4)),
            [Action::Thaw { saves: vec![order(30, 0)], stop_after: None }]
        );
        // The end is saved, though it is no multiple.
        let actions = c.uploaded(1, true, at(5));
        assert_eq!(
            answer(&mut c, &actions, [31, 30], at(5)),
            [Action::Thaw { saves: vec![order(30, 0), order(35, 1)], stop_after: None }],
            "an order that a rank may not have obeyed yet is repeated"
        );
        assert_eq!(capture(&mut c, 0, 30, at(6)), [Action::Upload { step: Step(30), slot: 0 }]);
        assert!(capture(&mut c, 1, 35, at(6)).is_empty());
        assert!(c.rank_stopped(Step(35), at(7)).is_empty());
        assert!(c.rank_stopped(Step(35), at(7)).is_empty());
        assert_eq!(c.uploaded(0, true, at(8)), [Action::Upload { step: Step(35), slot: 1 }]);
        assert_eq!(c.uploaded(1, true, at(9)), [Action::Finished { step: Step(35) }]);
    }

    #[test]
    fn a_multiple_that_passes_while_both_slots_are_taken_is_merged_into_the_next() {
        let mut c = scheduler(Cadence::Steps(10), 0, 1000);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        capture(&mut c, 1, 20, at(2));
        assert!(c.step_finished(Step(34), 1.0, at(3)).is_empty(), "nowhere to put a third");
        let actions = c.uploaded(0, true, at(4));
        assert_eq!(
            answer(&mut c, &actions, [35, 35], at(4)),
            [Action::Thaw { saves: vec![order(40, 0)], stop_after: None }]
        );
    }

    #[test]
    fn a_drain_saves_the_largest_started_step_and_takes_back_later_orders() {
        let mut c = scheduler(Cadence::Steps(100), 0, 1000);
        assert_eq!(c.first_orders(at(0)), [order(100, 0), order(200, 1)]);
        c.step_finished(Step(41), 1.0, at(1));
        let actions = c.drain(at(2));
        assert_eq!(
            answer(&mut c, &actions, [42, 43], at(2)),
            [Action::Thaw { saves: vec![order(43, 0)], stop_after: Some(Step(43)) }]
        );
        assert_eq!(capture(&mut c, 0, 43, at(3)), [Action::Upload { step: Step(43), slot: 0 }]);
        c.rank_stopped(Step(43), at(3));
        assert!(c.rank_stopped(Step(43), at(3)).is_empty(), "not before the commit");
        assert_eq!(c.uploaded(0, true, at(4)), [Action::Finished { step: Step(43) }]);
    }

    #[test]
    fn a_drain_with_both_slots_taken_drops_the_waiting_snapshot_and_keeps_the_upload() {
        let mut c = scheduler(Cadence::Steps(10), 0, 1000);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        capture(&mut c, 1, 20, at(2));
        let actions = c.drain(at(3));
        assert_eq!(
            answer(&mut c, &actions, [25, 25], at(3)),
            [Action::Thaw { saves: vec![order(25, 1)], stop_after: Some(Step(25)) }]
        );
        assert!(capture(&mut c, 1, 25, at(4)).is_empty(), "one upload at a time");
        assert_eq!(c.uploaded(0, true, at(5)), [Action::Upload { step: Step(25), slot: 1 }]);
    }

    #[test]
    fn a_run_that_stops_by_itself_saves_what_waits_and_then_its_end() {
        let stops = || {
            let mut c = scheduler(Cadence::Steps(10), 0, 1000);
            c.first_orders(at(0));
            capture(&mut c, 0, 10, at(1));
            capture(&mut c, 1, 20, at(2));
            let actions = c.stop_here(at(3));
            let end = Action::Thaw { saves: vec![], stop_after: Some(Step(25)) };
            assert_eq!(answer(&mut c, &actions, [25, 25], at(3)), [end]);
            c.rank_stopped(Step(25), at(4));
            c.rank_stopped(Step(25), at(4));
            c
        };
        let mut c = stops();
        let actions = c.uploaded(0, true, at(5));
        assert_eq!(actions[0], Action::Upload { step: Step(20), slot: 1 });
        let orders = Action::Thaw { saves: vec![order(25, 0)], stop_after: Some(Step(25)) };
        assert_eq!(answer(&mut c, &actions, [25, 25], at(5)), [orders]);
        assert!(capture(&mut c, 0, 25, at(6)).is_empty(), "one upload at a time");
        assert_eq!(c.uploaded(1, true, at(7)), [Action::Upload { step: Step(25), slot: 0 }]);
        assert_eq!(c.uploaded(0, true, at(8)), [Action::Finished { step: Step(25) }]);
        // When the machine goes away meanwhile, the end comes first.
        let mut c = stops();
        let actions = c.drain(at(5));
        let orders = Action::Thaw { saves: vec![order(25, 1)], stop_after: Some(Step(25)) };
        assert_eq!(answer(&mut c, &actions, [25, 25], at(5)), [orders]);
    }

    #[test]
    fn a_snapshot_whose_upload_failed_is_tried_again_unless_a_newer_one_waits() {
        let mut c = scheduler(Cadence::Steps(10), 0, 1000);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        assert_eq!(c.uploaded(0, false, at(2)), [Action::Upload { step: Step(10), slot: 0 }]);
        capture(&mut c, 1, 20, at(3));
        let actions = c.uploaded(0, false, at(4));
        assert_eq!(actions[0], Action::Upload { step: Step(20), slot: 1 });
        assert!(matches!(actions[1], Action::Freeze { .. }), "the older one's slot is free again");
    }

    #[test]
    fn a_drain_drops_a_waiting_snapshot_only_once_the_end_is_agreed() {
        let mut c = scheduler(Cadence::Steps(10), 0, 1000);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        capture(&mut c, 1, 20, at(2));
        c.drain(at(3));
        // The workers die instead of answering: the waiting snapshot is still there.
        c.uploaded(0, true, at(4));
        assert_eq!(c.salvage(), [Action::Upload { step: Step(20), slot: 1 }]);
    }

    #[test]
    fn a_drain_during_a_capture_and_an_upload_gets_the_first_slot_that_frees() {
        let mut c = scheduler(Cadence::Steps(10), 0, 1000);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        c.captured(Rank(0), 1, Step(20), at(2));
        let actions = c.drain(at(3));
        assert_eq!(
            answer(&mut c, &actions, [21, 20], at(3)),
            [Action::Thaw { saves: vec![order(20, 1)], stop_after: Some(Step(21)) }],
            "the slower rank must still fill slot 1"
        );
        let actions = c.captured(Rank(1), 1, Step(20), at(4));
        assert_eq!(
            answer(&mut c, &actions, [21, 21], at(4)),
            [Action::Thaw { saves: vec![order(21, 1)], stop_after: Some(Step(21)) }]
        );
    }

    #[test]
    fn a_cadence_in_time_orders_when_due_and_saves_the_end() {
        let mut c = scheduler(Cadence::Time(at(60)), 0, 50);
        assert!(c.first_orders(at(0)).is_empty());
        assert!(c.step_finished(Step(5), 1.0, at(59)).is_empty());
        let actions = c.tick(at(60));
        assert_eq!(
            answer(&mut c, &actions, [6, 7], at(60)),
            [Action::Thaw { saves: vec![order(7, 0)], stop_after: None }]
        );
        assert!(c.tick(at(61)).is_empty(), "not due again");
        capture(&mut c, 0, 7, at(61));
        c.uploaded(0, true, at(62));
        c.rank_stopped(Step(50), at(63));
        let actions = c.rank_stopped(Step(50), at(63));
        assert_eq!(
            answer(&mut c, &actions, [50, 50], at(63)),
            [Action::Thaw { saves: vec![order(50, 1)], stop_after: None }]
        );
    }

    #[test]
    fn a_failed_save_of_the_end_is_tried_again_until_it_is_abandoned() {
        let mut c = scheduler(Cadence::Steps(10), 0, 10);
        c.first_orders(at(0));
        c.rank_stopped(Step(10), at(1));
        c.rank_stopped(Step(10), at(1));
        capture(&mut c, 0, 10, at(1));
        assert_eq!(
            c.uploaded(0, false, at(2)),
            [Action::Upload { step: Step(10), slot: 0 }],
            "the snapshot is still there"
        );
        assert!(c.has_ended());
        assert_eq!(c.give_up_the_end(0, at(4)), [Action::Finished { step: Step(10) }]);
    }

    #[test]
    fn with_one_slot_a_capture_waits_for_the_save_before_it() {
        let mut c = single(Cadence::Steps(10), 35);
        assert_eq!(c.first_orders(at(0)), [order(10, 0)]);
        assert_eq!(capture(&mut c, 0, 10, at(1)), [Action::Upload { step: Step(10), slot: 0 }]);
        // The steps in between go by; nobody is asked anything.
        assert!(c.step_finished(Step(20), 1.0, at(2)).is_empty() && c.tick(at(3)).is_empty());
        let actions = c.uploaded(0, true, at(4));
        assert_eq!(
            answer(&mut c, &actions, [24, 23], at(4)),
            [Action::Thaw { saves: vec![order(30, 0)], stop_after: None }]
        );
        assert_eq!(capture(&mut c, 0, 30, at(5)), [Action::Upload { step: Step(30), slot: 0 }]);
        // The loop ends during the upload; the last state stands until there is room.
        c.rank_stopped(Step(35), at(6));
        assert!(c.rank_stopped(Step(35), at(6)).is_empty());
        let actions = c.uploaded(0, true, at(7));
        assert_eq!(
            answer(&mut c, &actions, [35, 35], at(7)),
            [Action::Thaw { saves: vec![order(35, 0)], stop_after: None }]
        );
        assert_eq!(capture(&mut c, 0, 35, at(8)), [Action::Upload { step: Step(35), slot: 0 }]);
        assert_eq!(c.uploaded(0, true, at(9)), [Action::Finished { step: Step(35) }]);
    }

    #[test]
    fn with_one_slot_a_drain_finishes_the_upload_and_saves_the_end() {
        for committed in [true, false] {
            let mut c = single(Cadence::Steps(10), 1000);
            c.first_orders(at(0));
            capture(&mut c, 0, 10, at(1));
            let actions = c.drain(at(2));
            assert_eq!(
                answer(&mut c, &actions, [14, 15], at(2)),
                [Action::Thaw { saves: vec![], stop_after: Some(Step(15)) }]
            );
            c.rank_stopped(Step(15), at(3));
            assert!(c.rank_stopped(Step(15), at(3)).is_empty(), "the upload is all that there is yet");
            // Whether or not it goes well, the newer state has the room from then on.
            let actions = c.uploaded(0, committed, at(4));
            let orders = Action::Thaw { saves: vec![order(15, 0)], stop_after: Some(Step(15)) };
            assert_eq!(answer(&mut c, &actions, [15, 15], at(4)), [orders]);
            assert_eq!(capture(&mut c, 0, 15, at(5)), [Action::Upload { step: Step(15), slot: 0 }]);
            assert_eq!(c.uploaded(0, true, at(6)), [Action::Finished { step: Step(15) }]);
        }
        // Without time for the end, the one under way is still finished.
        let mut c = single(Cadence::Steps(10), 1000);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        let actions = c.drain_unsaved(at(2));
        answer(&mut c, &actions, [15, 15], at(2));
        c.rank_stopped(Step(15), at(3));
        c.rank_stopped(Step(15), at(3));
        assert_eq!(c.uploaded(0, true, at(4)), [Action::Finished { step: Step(15) }]);
    }

    #[test]
    fn with_one_slot_a_drain_takes_the_slot_of_an_older_capture() {
        let mut c = single(Cadence::Steps(10), 1000);
        c.first_orders(at(0));
        c.captured(Rank(0), 0, Step(10), at(1));
        let actions = c.drain(at(2));
        assert_eq!(
            answer(&mut c, &actions, [11, 10], at(2)),
            [Action::Thaw { saves: vec![order(10, 0)], stop_after: Some(Step(11)) }]
        );
        let actions = c.captured(Rank(1), 0, Step(10), at(3));
        assert_eq!(
            answer(&mut c, &actions, [11, 11], at(3)),
            [Action::Thaw { saves: vec![order(11, 0)], stop_after: Some(Step(11)) }]
        );
    }

    /// The store is away while the run comes to its end.
    #[test]
    fn with_one_slot_an_older_snapshot_that_can_not_be_uploaded_makes_way_for_the_end() {
        let mut c = single(Cadence::Steps(10), 15);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        assert_eq!(c.uploaded(0, false, at(2)), [Action::Upload { step: Step(10), slot: 0 }], "it is the newest");
        c.rank_stopped(Step(15), at(3));
        c.rank_stopped(Step(15), at(3));
        // A last state that had failed this often would be given up.
        let actions = c.give_up_the_end(0, at(4));
        let orders = Action::Thaw { saves: vec![order(15, 0)], stop_after: None };
        assert_eq!(answer(&mut c, &actions, [15, 15], at(4)), [orders]);
        assert_eq!(capture(&mut c, 0, 15, at(5)), [Action::Upload { step: Step(15), slot: 0 }]);
        assert_eq!(c.uploaded(0, false, at(6)), [Action::Upload { step: Step(15), slot: 0 }]);
        assert_eq!(c.give_up_the_end(0, at(7)), [Action::Finished { step: Step(15) }]);
        assert_eq!(c.committed(), Step(0));
    }

    #[test]
    fn with_one_slot_a_save_that_is_asked_for_comes_before_the_order_in_it_and_after_the_upload_in_it() {
        let mut c = single(Cadence::Steps(100), 1000);
        assert_eq!(c.first_orders(at(0)), [order(100, 0)]);
        let actions = c.save_now(at(1));
        assert_eq!(
            answer(&mut c, &actions, [42, 43], at(1)),
            [Action::Thaw { saves: vec![order(43, 0)], stop_after: None }]
        );
        assert_eq!(capture(&mut c, 0, 43, at(2)), [Action::Upload { step: Step(43), slot: 0 }]);
        c.step_finished(Step(49), 1.0, at(3));
        assert!(c.save_now(at(3)).is_empty(), "nowhere to put it");
        let actions = c.uploaded(0, true, at(4));
        assert_eq!(
            answer(&mut c, &actions, [50, 51], at(4)),
            [Action::Thaw { saves: vec![order(51, 0)], stop_after: None }]
        );
        capture(&mut c, 0, 51, at(5));
        c.step_finished(Step(59), 1.0, at(5));
        let actions = c.uploaded(0, true, at(6));
        assert_eq!(
            answer(&mut c, &actions, [60, 60], at(6)),
            [Action::Thaw { saves: vec![order(100, 0)], stop_after: None }]
        );
    }

    #[test]
    fn with_one_slot_a_death_leaves_what_every_rank_has_captured() {
        let mut c = single(Cadence::Steps(10), 100);
        c.first_orders(at(0));
        c.captured(Rank(0), 0, Step(10), at(1));
        assert!(c.salvage().is_empty(), "one rank has not captured");
        let mut c = single(Cadence::Steps(10), 100);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        // Its upload has failed and waits to be tried again.
        assert_eq!(c.salvage(), [Action::Upload { step: Step(10), slot: 0 }]);
        assert!(c.uploaded(0, true, at(2)).is_empty());
        assert_eq!(c.committed(), Step(10));
    }

    #[test]
    fn a_resumed_run_does_not_save_the_step_that_it_loaded() {
        let mut c = scheduler(Cadence::Steps(10), 20, 100);
        assert_eq!(c.first_orders(at(0)), [order(30, 0), order(40, 1)]);
        let mut c = scheduler(Cadence::Steps(10), 20, 20);
        c.first_orders(at(0));
        c.rank_stopped(Step(20), at(1));
        assert_eq!(c.rank_stopped(Step(20), at(1)), [Action::Finished { step: Step(20) }], "nothing left to do");
    }

    #[test]
    fn after_a_death_what_every_rank_has_captured_is_uploaded_and_nothing_else() {
        let mut c = scheduler(Cadence::Steps(10), 0, 100);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        capture(&mut c, 1, 20, at(1));
        let actions = c.uploaded(0, true, at(2));
        assert_eq!(actions[0], Action::Upload { step: Step(20), slot: 1 });
        // Its upload fails and waits to be tried again when the workers die.
        assert_eq!(c.salvage(), [Action::Upload { step: Step(20), slot: 1 }]);
        assert!(c.uploaded(1, true, at(3)).is_empty());
        assert_eq!(c.committed(), Step(20));
        let mut c = scheduler(Cadence::Steps(10), 0, 100);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        capture(&mut c, 1, 20, at(1));
        assert_eq!(c.salvage(), [Action::Upload { step: Step(20), slot: 1 }], "the newer one is worth more");
        assert!(c.uploaded(1, false, at(2)).is_empty(), "tried once: nobody is left to wait for");
        let mut c = scheduler(Cadence::Steps(10), 0, 100);
        c.first_orders(at(0));
        c.captured(Rank(1), 0, Step(10), at(1));
        assert!(c.salvage().is_empty(), "only one rank had captured");
        assert!(c.captured(Rank(0), 0, Step(10), at(2)).is_empty(), "too late: nobody knows what was written since");
    }

    #[test]
    fn the_newest_checkpoint_is_not_overwritten_while_the_other_slot_is_free() {
        let mut c = scheduler(Cadence::Time(at(60)), 0, 500);
        let mut taken = Vec::new();
        for round in 1..5 {
            let actions = c.tick(at(60 * round));
            let actions = answer(&mut c, &actions, [round * 10, round * 10], at(60 * round));
            let [Action::Thaw { saves, .. }] = &actions[..] else { panic!("{actions:?}") };
            taken.push(saves[0].slot);
            capture(&mut c, saves[0].slot, round * 10, at(60 * round + 1));
            c.uploaded(saves[0].slot, true, at(60 * round + 2));
        }
        assert_eq!(taken, [0, 1, 0, 1]);
        let setup = Setup { ranks: 1, held: Some(0), ..setup(Cadence::Steps(1), 5, 9) };
        let orders = Scheduler::new(setup, Measured::NOTHING, at(0)).first_orders(at(0));
        assert_eq!(orders[1].step, Step(6), "slot 0 holds step 5: {orders:?}");
    }

    /// Steps 1 to 9 of every ten are undisturbed; the save of the tenth costs what its mode costs.
    #[test]
    fn captures_block_when_that_was_measured_to_be_cheaper() {
        let mut c = scheduler(Cadence::Steps(10), 0, 10_000);
        let mut orders = c.first_orders(at(0));
        let mut lost = 0.0;
        for step in 1..200 {
            let mut actions = c.step_finished(Step(step), 1.0 + std::mem::take(&mut lost), at(step));
            if let Some(Action::Chosen(choice)) = actions.first() {
                assert_eq!(choice.mode, CaptureMode::Blocking, "{choice:?}");
                assert!(step > 60);
                return;
            }
            if let Some(order) = orders.iter().find(|order| order.step == Step(step)) {
                lost = if order.mode == CaptureMode::Overlap { 0.9 } else { 0.3 };
                c.copied(0.2);
                capture(&mut c, order.slot, step, at(step));
                actions = c.uploaded(order.slot, true, at(step));
            }
            if matches!(actions.last(), Some(Action::Freeze { .. }))
                && let [Action::Thaw { saves, .. }] = &answer(&mut c, &actions, [step + 1, step + 1], at(step))[..]
            {
                orders.clone_from(saves);
            }
        }
        panic!("nothing was chosen");
    }

    /// A rank whose loop has ended captures again when its order is repeated: it still counts once.
    #[test]
    fn a_rank_that_says_twice_what_it_has_captured_does_not_stand_for_another() {
        let mut c = scheduler(Cadence::Steps(10), 0, 10);
        assert_eq!(c.first_orders(at(0)), [order(10, 0)]);
        c.rank_stopped(Step(10), at(1));
        assert!(c.captured(Rank(0), 0, Step(10), at(1)).is_empty());
        // Someone asks all to stop; the other rank is still on its way to the end.
        let actions = c.drain(at(2));
        assert_eq!(
            answer(&mut c, &actions, [10, 10], at(2)),
            [Action::Thaw { saves: vec![order(10, 0)], stop_after: Some(Step(10)) }]
        );
        assert!(c.captured(Rank(0), 0, Step(10), at(3)).is_empty(), "the other has not copied its part");
        assert_eq!(c.captured(Rank(1), 0, Step(10), at(4)), [Action::Upload { step: Step(10), slot: 0 }]);
    }

    #[test]
    fn captures_that_compete_are_ordered_while_saves_are_in_haste() {
        let mut c = scheduler(Cadence::Steps(10), 0, 100);
        c.set_haste(true);
        let modes = |orders: Vec<SaveOrder>| orders.iter().map(|order| order.mode).collect::<Vec<_>>();
        assert_eq!(modes(c.first_orders(at(0))), [CaptureMode::Hasty; 2]);
        let mut c = scheduler(Cadence::Steps(10), 0, 100);
        assert_eq!(modes(c.first_orders(at(0))), [CaptureMode::Overlap; 2]);
    }

    #[test]
    fn an_answer_to_an_old_question_decides_nothing() {
        let mut c = scheduler(Cadence::Steps(10), 0, 100);
        let actions = c.drain(at(0));
        let Some(Action::Freeze { ticket }) = actions.last() else { panic!() };
        assert!(c.frozen(ticket + 1, Step(5), at(0)).is_empty());
        assert!(c.frozen(ticket - 1, Step(5), at(0)).is_empty());
        assert_eq!(answer(&mut c, &actions, [3, 3], at(0)).len(), 1);
    }

    #[test]
    fn a_save_that_is_asked_for_takes_the_running_step_and_leaves_the_cadence_alone() {
        let mut c = scheduler(Cadence::Steps(100), 0, 1000);
        assert_eq!(c.first_orders(at(0)), [order(100, 0), order(200, 1)]);
        c.step_finished(Step(41), 1.0, at(1));
        // Both slots have their orders: the later one makes room.
        let actions = c.save_now(at(2));
        assert_eq!(
            answer(&mut c, &actions, [42, 43], at(2)),
            [Action::Thaw { saves: vec![order(100, 0), order(43, 1)], stop_after: None }]
        );
        assert_eq!(capture(&mut c, 1, 43, at(3)), [Action::Upload { step: Step(43), slot: 1 }]);
        // Asked for once: afterwards the cadence holds again, and withdrawn orders are given again.
        let actions = c.uploaded(1, true, at(4));
        assert_eq!(
            answer(&mut c, &actions, [50, 50], at(4)),
            [Action::Thaw { saves: vec![order(100, 0), order(200, 1)], stop_after: None }]
        );
        // Where there is room it is used.
        capture(&mut c, 0, 100, at(5));
        assert!(c.step_finished(Step(130), 1.0, at(5)).is_empty());
        let actions = [c.uploaded(0, true, at(6)), c.save_now(at(6))].concat();
        assert_eq!(
            answer(&mut c, &actions[..1], [131, 132], at(6)),
            [Action::Thaw { saves: vec![order(132, 0), order(200, 1)], stop_after: None }]
        );
        assert_eq!(capture(&mut c, 0, 132, at(7)), [Action::Upload { step: Step(132), slot: 0 }]);
    }

    #[test]
    fn a_state_that_is_measured_is_saved_if_it_still_stands() {
        let mut c = scheduler(Cadence::Auto, 0, 1000);
        c.setup.ranked = NonZeroU64::new(10);
        let freezes = |actions: &[Action]| matches!(actions, [Action::Freeze { .. }]);
        assert!(c.step_finished(Step(8), 1.0, at(0)).is_empty());
        let actions = c.step_finished(Step(9), 1.0, at(0));
        assert!(freezes(&actions), "{actions:?}");
        // One has begun the step that will be measured.
        assert_eq!(
            answer(&mut c, &actions, [9, 10], at(0)),
            [Action::Thaw { saves: vec![order(10, 0)], stop_after: None }]
        );
        assert!(c.step_finished(Step(10), 1.0, at(0)).is_empty(), "it has its order");
        assert_eq!(capture(&mut c, 0, 10, at(0)), [Action::Upload { step: Step(10), slot: 0 }]);
        assert!(c.uploaded(0, true, at(0)).is_empty());
        // None has begun it: they are asked again when it is finished, and both are still measuring.
        let actions = c.step_finished(Step(19), 1.0, at(0));
        assert!(freezes(&actions), "{actions:?}");
        assert_eq!(answer(&mut c, &actions, [19, 19], at(0)), [Action::Thaw { saves: vec![], stop_after: None }]);
        assert!(c.tick(at(0)).is_empty());
        let actions = c.step_finished(Step(20), 1.0, at(0));
        assert_eq!(
            answer(&mut c, &actions, [20, 20], at(0)),
            [Action::Thaw { saves: vec![order(20, 1)], stop_after: None }]
        );
        assert_eq!(capture(&mut c, 1, 20, at(0)), [Action::Upload { step: Step(20), slot: 1 }]);
        assert!(c.uploaded(1, true, at(0)).is_empty());
        // One has gone on: nothing is saved, and nobody is asked again.
        let actions = c.step_finished(Step(30), 1.0, at(0));
        assert!(freezes(&actions), "{actions:?}");
        assert_eq!(answer(&mut c, &actions, [30, 31], at(0)), [Action::Thaw { saves: vec![], stop_after: None }]);
        assert!(c.tick(at(0)).is_empty());
        assert!(c.step_finished(Step(31), 1.0, at(0)).is_empty());
    }

    #[test]
    fn a_drain_without_time_stops_and_uploads_what_was_captured_before() {
        let mut c = scheduler(Cadence::Steps(10), 0, 1000);
        c.first_orders(at(0));
        capture(&mut c, 0, 10, at(1));
        capture(&mut c, 1, 20, at(2));
        assert_eq!(c.in_flight(), Some(Step(10)));
        let actions = c.drain_unsaved(at(3));
        assert_eq!(
            answer(&mut c, &actions, [25, 24], at(3)),
            [Action::Thaw { saves: vec![], stop_after: Some(Step(25)) }]
        );
        assert_eq!(c.agreed_end(), Some(Step(25)));
        c.rank_stopped(Step(25), at(4));
        assert!(c.rank_stopped(Step(25), at(4)).is_empty(), "not before the upload's end");
        assert_eq!(c.uploaded(0, true, at(5)), [Action::Upload { step: Step(20), slot: 1 }]);
        assert_eq!(c.uploaded(1, true, at(6)), [Action::Finished { step: Step(25) }]);
        assert_eq!(c.committed(), Step(20));
    }

    #[test]
    fn every_16th_save_of_several_ranks_compares_them_however_often_it_is_ordered() {
        for (ranks, expected) in [(2, vec![16, 32]), (1, vec![])] {
            let setup = Setup { ranks, ..setup(Cadence::Steps(1), 0, 1000) };
            let mut c = Scheduler::new(setup, Measured::NOTHING, at(0));
            let mut orders = c.first_orders(at(0));
            let mut compared = Vec::new();
            for step in 1..=40 {
                let order = orders.iter().find(|order| order.step == Step(step)).copied().expect("an order");
                if order.compare {
                    compared.push(step);
                }
                let mut actions = c.step_finished(Step(step), 1.0, at(step));
                for rank in 0..ranks {
                    actions = c.captured(Rank(rank), order.slot, Step(step), at(step));
                }
                assert!(matches!(actions[..], [Action::Upload { .. }, ..]), "{actions:?}");
                let actions = c.uploaded(order.slot, true, at(step));
                let Some(Action::Freeze { ticket }) = actions.last() else { panic!("{actions:?}") };
                let mut actions = Vec::new();
                for _ in 0..ranks {
                    actions = c.frozen(*ticket, Step(step), at(step));
                }
                let [Action::Thaw { saves, .. }] = &actions[..] else { panic!("{actions:?}") };
                // An order that is repeated asks for the same.
                let repeated = |order: &&SaveOrder| saves.iter().any(|save| save.step == order.step);
                assert!(orders.iter().filter(repeated).all(|order| saves.contains(order)), "{saves:?}");
                orders.clone_from(saves);
            }
            assert_eq!(compared, expected, "{ranks} ranks");
        }
    }
}
