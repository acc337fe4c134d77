//! One step for all, model-checked: the ranks of several nodes agree on the step that a save holds.
//!
//! The world: a leader, its members, and messages of which each may come at any time, and again, or never. A rank may
//! start a step once all ranks have finished the one before it, as collectives have it. The leader freezes all members,
//! takes the largest step that any of them has started, and thaws them with the order to save it. It may be killed at
//! any moment; a member that hears nothing more ends its life, and never goes on by itself.
//!
//! The real code decides what a rank does at a boundary: each member holds the state of a [`StepGate`]. The two levels
//! above it, the agents, are rules alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
};

use trainer::{
    ids::Step,
    protocol::SaveOrder,
    snapshot::mode::CaptureMode,
    worker::gate::{Boundary, StepGate},
};

use crate::support::search::{Model, expect_found, expect_sound};

/// The last step.
const LAST: u8 = 4;

/// A member's rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Hand {
    /// The last step started.
    started: u8,
    /// The newest ticket that it has heard.
    heard: u8,
    frozen: bool,
    /// The step that it is to save; 0: none.
    order: u8,
    /// Its life has ended.
    over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Bug {
    None,
    /// A frozen member that waits for long goes on.
    ThawByOneself,
    /// The leader does not wait for all answers.
    Hasty,
    /// An order of an older ticket is obeyed.
    OldTicket,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sight {
    /// A member has started a step more than another when they are frozen.
    Apart,
    /// A member saves in passing, without having waited.
    InPassing,
    Over,
    Twice,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Floor {
    bug: Bug,
    tickets: u8,
    hands: Vec<Hand>,
    /// The newest ticket of the leader; each one before it was decided.
    ticket: u8,
    answers: BTreeMap<(u8, usize), u8>,
    /// The step that each ticket agreed on.
    agreed: BTreeMap<u8, u8>,
    /// The steps that each member has captured.
    captured: BTreeSet<(usize, u8)>,
    leader_is_dead: bool,
}

impl Floor {
    fn new(members: usize, tickets: u8, bug: Bug) -> Self {
        // All run the first step.
        Self {
            bug,
            tickets,
            hands: vec![Hand { started: 1, ..Hand::default() }; members],
            ticket: 0,
            answers: BTreeMap::new(),
            agreed: BTreeMap::new(),
            captured: BTreeSet::new(),
            leader_is_dead: false,
        }
    }

    /// The real gate in this member's state.
    fn gate(hand: Hand) -> StepGate {
        let gate = StepGate::new(Step(hand.started.into()), Step(LAST.into()));
        if hand.order > 0 {
            let order =
                SaveOrder { step: Step(hand.order.into()), slot: 0, mode: CaptureMode::Overlap, compare: false };
            gate.freeze();
            gate.thaw(&[order], None);
        }
        gate
    }

    fn has_captured(&self, step: u8) -> bool {
        (0..self.hands.len()).all(|index| self.captured.contains(&(index, step)))
    }

    fn leader(&self, all: &mut Vec<(String, Self)>, saw: &mut Vec<Sight>) {
        if self.leader_is_dead {
            return;
        }
        let mut dead = self.clone();
        dead.leader_is_dead = true;
        all.push(("the leader is killed".to_owned(), dead));
        let (ticket, members) = (self.ticket, self.hands.len());
        let decided = ticket == 0 || self.agreed.get(&ticket).is_some_and(|step| self.has_captured(*step));
        if decided && ticket < self.tickets {
            if ticket > 0 {
                saw.push(Sight::Twice);
            }
            let mut world = self.clone();
            world.ticket += 1;
            all.push((format!("the leader freezes all, ticket {}", ticket + 1), world));
        }
        let answers: Vec<u8> = (0..members).filter_map(|index| self.answers.get(&(ticket, index)).copied()).collect();
        let enough = if self.bug == Bug::Hasty { 1 } else { members };
        if ticket > 0 && !self.agreed.contains_key(&ticket) && answers.len() >= enough {
            let step = answers.iter().copied().max().unwrap_or_default();
            if answers.iter().any(|started| *started < step) {
                saw.push(Sight::Apart);
            }
            let mut world = self.clone();
            world.agreed.insert(ticket, step);
            all.push((format!("the leader thaws all with the order to save step {step}"), world));
        }
    }

    fn hand(&self, index: usize, all: &mut Vec<(String, Self)>, saw: &mut Vec<Sight>) {
        let hand = self.hands[index];
        if hand.over {
            return;
        }
        if self.leader_is_dead {
            saw.push(Sight::Over);
            let mut world = self.clone();
            world.hands[index].over = true;
            all.push((format!("member {index} hears nothing more and ends its life"), world));
        }
        for ticket in 1..=self.ticket {
            if ticket > hand.heard {
                let mut world = self.clone();
                let last = Self::gate(hand).freeze();
                let started = u8::try_from(last.get()).expect("small");
                world.hands[index] = Hand { heard: ticket, frozen: true, ..hand };
                world.answers.insert((ticket, index), started);
                all.push((format!("member {index} is frozen by ticket {ticket}, and has started {started}"), world));
            }
        }
        for (ticket, step) in &self.agreed {
            let is_ours = *ticket == hand.heard && hand.frozen;
            let is_old = self.bug == Bug::OldTicket && hand.frozen && *ticket < hand.heard;
            if is_ours || is_old || (self.bug == Bug::ThawByOneself && *ticket == hand.heard && hand.order != *step) {
                let mut world = self.clone();
                world.hands[index] = Hand { frozen: false, order: *step, ..hand };
                all.push((format!("member {index} is thawed by ticket {ticket}, to save step {step}"), world));
            }
        }
        if hand.frozen && self.bug == Bug::ThawByOneself {
            let mut world = self.clone();
            world.hands[index].frozen = false;
            all.push((format!("member {index} has waited long, and goes on"), world));
        }
        // All others have started this step, so it ends.
        let finished = self.hands.iter().all(|other| other.started >= hand.started);
        if !hand.frozen && finished && hand.started < LAST {
            let entered = Self::gate(hand).enter(Step(hand.started.into()), || Ok::<(), Infallible>(()));
            let Ok(Boundary { save, proceed }) = entered;
            let mut world = self.clone();
            if save.is_some() {
                saw.push(Sight::InPassing);
                world.captured.insert((index, hand.started));
                world.hands[index].order = 0;
            }
            world.hands[index].started += u8::from(proceed);
            all.push((format!("member {index} starts step {}", hand.started + 1), world));
        }
    }
}

impl Model for Floor {
    type Sight = Sight;

    fn next(&self, saw: &mut Vec<Sight>) -> Vec<(String, Self)> {
        let mut all = Vec::new();
        self.leader(&mut all, saw);
        for index in 0..self.hands.len() {
            self.hand(index, &mut all, saw);
        }
        all
    }

    fn check(&self) -> Result<(), String> {
        for (ticket, step) in &self.agreed {
            for (index, hand) in self.hands.iter().enumerate() {
                if hand.started > *step && !self.captured.contains(&(index, *step)) {
                    return Err(format!("member {index} has passed step {step}, which ticket {ticket} agreed to save"));
                }
            }
        }
        match self.captured.iter().find(|(_, step)| !self.agreed.values().any(|agreed| agreed == step)) {
            Some((index, step)) => Err(format!("member {index} has captured step {step}, and nobody agreed on it")),
            None => Ok(()),
        }
    }
}

#[test]
fn all_members_save_one_step_whatever_comes_late_or_never() {
    use Sight::*;
    expect_sound(Floor::new(2, 2, Bug::None), &[Apart, InPassing, Over, Twice]);
    expect_sound(Floor::new(3, 1, Bug::None), &[Apart, InPassing, Over]);
}

#[test]
fn every_seeded_bug_of_a_freeze_is_found() {
    for bug in [Bug::ThawByOneself, Bug::Hasty, Bug::OldTicket] {
        expect_found(&format!("{bug:?}"), Floor::new(2, 2, bug), "has passed step");
    }
}
