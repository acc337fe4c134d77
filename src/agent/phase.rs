//! One generation on this node as a state machine: what happens when, decided without I/O.
//!
//! [`StateMachine::handle`] is the only place that changes its state. An [`Event`] and the time go in, [`Effects`] come
//! out, and [`super::lead`] performs them. Nothing here reads a clock, waits, starts a task or a process, or talks
//! to anybody.
//!
//! # The phases
//! - [`Loading`]: workers start and load their state. Nothing can be saved yet.
//! - [`Training`]: they train. Notices may have been heard that leave the time to train on.
//! - [`Draining`]: ranks are asked to stop, or have stopped, because of a notice; everything that can still be saved is
//!   saved.
//! - [`Salvage`]: the workers can't go on. Snapshots that every rank had captured are uploaded and committed, then the
//!   generation ends. A notice may be heard before or after.
//! - [`Phase::Ended`]: its end has been returned.
//!
//! A worker's own word that it can't go on ([`FromWorker::Failed`](crate::protocol::FromWorker::Failed)) is acted on
//! when its process has ended, or at the next tick: the other ranks may be about to say more.
//!
//! # What happens when
//! A unit test compares this table with what the machine does in these states, of two ranks (`phase/tests/table.rs`):
//! - *Loading* has its layout and the checkpoint of step 5, and rank 0 is ready.
//! - *Training* has finished step 12 and uploads step 10; step 20 is to be captured next.
//! - *Draining* has been given 25 s, asks the ranks where they are, and still uploads step 10.
//! - *Salvaging* has lost rank 1 and still uploads step 10.
//!
//! The last three rows begin later in their phase, when only the named event is missing.
//!
//! Effects in their order, by the names of [`Effect`], of [`Order`], and of what is told or reported: *hush* ends all
//! upkeep, *note* is the notice's record, *idle* and *busy* say whether the store has more important work than upkeep,
//! and *hold* keeps a snapshot for workers that crash. Workers that have been killed hear nothing of what they are
//! told. An event that is not in the table has no effect in that phase.
//!
//! | event | phase | effects | next |
//! |---|---|---|---|
//! | notice, 25 s | Loading | report notice, hush, note | Ended: stopped |
//! | notice, 25 s | Training | report notice, hush, note, report drain, hush, freeze | Draining |
//! | notice, 25 s | Draining | report notice, hush, note | |
//! | notice, 25 s | Salvaging | report notice, hush, note, report drain, hush, freeze, kill | |
//! | notice, 12 s | Loading | report notice, hush, note | Ended: stopped |
//! | notice, 12 s | Training | report notice, hush, note, report drain, hush, freeze | Draining |
//! | notice, 12 s | Draining | report notice, hush, note, report drain | |
//! | notice, 12 s | Salvaging | report notice, hush, note, report drain, hush, freeze, kill | |
//! | notice, 1 s | Loading | report notice, hush, note | Ended: stopped |
//! | notice, 1 s | Training, Draining, Salvaging | report notice, hush, note, report drain | Ended: stopped |
//! | notice, 15 min | Loading | report notice, hush, note | Ended: stopped |
//! | notice, 15 min | Training | report notice, hush, note, log, freeze | |
//! | notice, 15 min | Draining | report notice, hush, note | |
//! | notice, 15 min | Salvaging | report notice, hush, note, log, freeze, kill | |
//! | SIGTERM | Loading | report notice, hush, note | Ended: stopped |
//! | SIGTERM | Training | report notice, hush, note, report drain, hush, freeze | Draining |
//! | SIGTERM | Draining | report notice, hush, note | |
//! | SIGTERM | Salvaging | report notice, hush, note, report drain, hush, freeze, kill | |
//! | SIGTERM again | Training, Draining, Salvaging | report notice, hush, note | Ended: stopped |
//! | rebalance | Loading | report notice, hush, note | |
//! | rebalance | Training | report notice, hush, note, freeze | |
//! | rebalance | Draining | report notice, hush, note | |
//! | rebalance | Salvaging | report notice, hush, note, freeze, kill | |
//! | listening | Loading | peers | |
//! | built, the last | Loading | log, lay out | |
//! | laid out | Loading | restore | |
//! | fetched | Loading | vouch 5, restore | |
//! | fetch damaged | Loading | | Ended: damaged |
//! | fetch fails | Loading | | Ended: Bug |
//! | ready, the last | Loading | report restored, hold 5, idle, go | Training |
//! | ready, the last, and differs | Loading | | Ended: died |
//! | frozen, the last | Training | thaw | |
//! | frozen, the last | Draining | thaw until 13 | |
//! | step, the last | Training, Draining, Salvaging | report step | |
//! | step, NaN | Training, Draining | kill | Salvaging |
//! | captured 20, the last | Training | upload 20, busy | |
//! | captured 20, the last | Draining | hush, upload 20, busy | |
//! | captured 20, and differs | Training, Draining | kill | Salvaging |
//! | stalled by 10 | Training, Draining, Salvaging | cost | |
//! | validated, the last | Training, Draining, Salvaging | report validation | |
//! | a worker fails | Training, Draining | | Salvaging |
//! | and exits | Loading | | Ended: Config |
//! | and exits | Training, Draining | kill | Salvaging |
//! | and exits | Salvaging | kill | |
//! | a worker exits | Loading | | Ended: died |
//! | a worker exits | Training, Draining | kill | Salvaging |
//! | a worker exits | Salvaging | kill | |
//! | upload comes on | Training, Draining, Salvaging | report upload | |
//! | saved 10 | Training | idle, hold 10, report checkpoint, prune, freeze | |
//! | saved 10 | Draining | idle, hold 10, report checkpoint | |
//! | saved 10 | Salvaging | idle, hold 10, report checkpoint, prune, freeze, kill | Ended: died |
//! | save of 10 fails | Training, Draining | idle, report warning, retry slot 0 | |
//! | save of 10 fails | Salvaging | idle, report warning, hush, upload 10, busy, kill | |
//! | no journal's writer | Training, Draining, Salvaging | idle | Ended: Bug |
//! | no store's folder | Training, Draining, Salvaging | idle | Ended: Unavailable |
//! | retry | Training | upload 10, busy | |
//! | retry | Draining | hush, upload 10, busy | |
//! | retry | Salvaging | kill | |
//! | save held up | Draining | give up the save | Ended: stopped |
//! | lost to another | Loading, Training, Draining, Salvaging | | Ended: Fenced |
//! | tick after 5 s | Loading, Training | look | |
//! | tick after 5 s | Salvaging | look, kill | |
//! | tick after 24 s | Loading, Training | look | |
//! | tick after 24 s | Draining | | Ended: stopped |
//! | tick after 24 s | Salvaging | look, kill | |
//! | tick after 10 min | Loading | look | |
//! | tick after 10 min | Training | look, report no_progress | |
//! | tick after 10 min | Draining | | Ended: stopped |
//! | tick after 10 min | Salvaging | look, kill, give up the save | Ended: died |
//! | saved 13, as planned | Draining | idle, hold 13, report checkpoint | Ended: stopped |
//! | all stopped, no save left | Draining | | Ended: stopped |
//! | saved 100, the last step | Training | idle, hold 100, report checkpoint | Ended: completed |
//!
//! # Invariants
//! - An [`End`] is given once, as the last of all effects.
//! - The upload under way is never given up for a newer state; it ends before the generation does, unless the time is
//!   up, a second signal asks to leave at once, or the run is lost.
//! - Once a drain has begun, or a worker is lost, it is never taken back.
//!
//! *Crash:* nothing here is stored. *Retry:* failed uploads are tried again by [`Effect::Retry`]. *Cancel:* dropping
//! the machine changes nothing.
//!
//! Owns: the current phase, and the known state of the group. Does not own: processes, memory, the store, the journal
//! ([`super::lead`], [`super::node`]), nor what comes after the generation ([`crate::run`]).

mod draining;
mod loading;
mod salvage;
mod training;

use std::{net::IpAddr, ops::ControlFlow, time::Duration};

pub use self::{
    draining::Draining,
    loading::{Incoming, Loading},
    salvage::Salvage,
    training::Training,
};
use super::{
    drain::{estimate::Estimates, timeline::Planned},
    effects::{Effect, Effects, Order},
    fence, finish,
    generation::{End, Load},
    save::{gather::Fetched, scheduler::Moment, upload::SaveEvent},
    states::Seats,
    stopping::Stopping,
    workers::WorkerEvent,
};
use crate::{
    checkpoint::CheckpointError,
    config::RunConfig,
    error::{Error, Kind, Result},
    ids::{Generation, Rank, Step},
    journal::{Means, Record},
    notice::{self, Notice},
    protocol::ToWorker,
    report,
    snapshot::cadence::Measured,
    workload::Outline,
};

/// Notices of one generation that are written to the journal.
const MOST_NOTICES: u32 = 16;

/// Every event of a generation.
#[derive(Debug)]
pub enum Event {
    /// A notice arrived.
    Notice(Notice),
    /// A worker spoke, or is gone.
    Worker(WorkerEvent),
    /// The slots are laid out for the workers' state: bytes of one save's shards.
    LaidOut {
        /// Bytes.
        bytes: u64,
    },
    /// The state to load has arrived, or can't be had.
    Fetched(Result<Fetched, CheckpointError>),
    /// An upload has progressed, or has ended.
    Save(SaveEvent),
    /// The pause after a failed upload is over.
    Retry {
        /// Its slot.
        slot: u8,
    },
    /// A node holds up the last save of a group that was asked to stop, and others do not.
    HeldUp {
        /// Seconds for which it has not come further.
        after_s: u64,
    },
    /// The run can't go on here: it was taken by another agent, its journal is gone, or an effect could not be
    /// performed.
    Lost(Error),
    /// Time has passed.
    Tick,
}

/// The inputs of a generation; they never change.
#[derive(Debug)]
pub struct Settings {
    /// The facts about the work.
    pub outline: Outline,
    /// The generation.
    pub generation: Generation,
    /// The run's configuration, overrides applied.
    pub config: RunConfig,
    /// The state to load.
    pub load: Load,
    /// How early stopping stands with the state to load.
    pub stopping: Stopping,
    /// Measured costs of saves and lifetimes of machines.
    pub measured: Measured,
    /// The address of rank 0's node.
    pub store_host: IpAddr,
    /// Which node has which ranks.
    pub seats: Seats,
    /// The generation before this one has ended because the states of its ranks differed.
    pub doubted: bool,
    /// How long a save may take, at least, to be finished on the way out.
    pub finishing: Duration,
    /// How long ranks of several nodes wait for each other in their first step, at least.
    pub first_step: Duration,
    /// From the `formed` record until this node's workers were started.
    pub invited: Duration,
}

/// A generation's state. Each phase owns the data that is valid in it alone.
#[derive(Debug)]
pub enum Phase {
    /// See [`Loading`].
    Loading(Loading),
    /// See [`Training`].
    Training(Training),
    /// See [`Draining`].
    Draining(Draining),
    /// See [`Salvage`].
    Salvaging(Salvage),
    /// Its end has been returned.
    Ended,
}

/// Why the workers can't go on.
#[derive(Debug)]
enum Cause {
    /// A worker reported it. Its group may be started again.
    Failed(String),
    /// A worker reported it: starting again will not help.
    Permanent(Error),
    /// One died, or they hang. Its group may be started again.
    Died(String),
    /// A loss or gradient is not finite.
    Diverged { step: Step, reason: String },
}

impl Cause {
    fn said(rank: Rank, message: &str, hint: Option<String>, permanent: bool) -> Self {
        let text = format!("worker {rank}: {message}");
        if !permanent {
            return Self::Failed(text);
        }
        let error = Error::new(Kind::Config, text);
        Self::Permanent(match hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        })
    }

    fn exited(rank: Rank, reason: &str) -> Self {
        Self::Died(format!("worker {rank} {reason}"))
    }

    /// The end of the generation, which has come as far as `step` and has nothing left to save.
    fn end(self, step: Step) -> Result<End> {
        match self {
            Self::Permanent(error) => Err(error),
            Self::Diverged { step, reason } => Ok(End::Diverged { step, reason }),
            Self::Failed(reason) | Self::Died(reason) => Ok(End::Died { step, reason }),
        }
    }
}

/// The phase in which a training group is looked at, as far as the group depends on it.
#[derive(Clone, Copy)]
enum Stage<'a> {
    Training,
    Draining(&'a Planned),
    /// With the plan that a notice has asked for, if one has.
    Salvaging(Option<&'a Planned>),
}

impl<'a> Stage<'a> {
    const fn planned(self) -> Option<&'a Planned> {
        match self {
            Self::Training => None,
            Self::Draining(planned) => Some(planned),
            Self::Salvaging(planned) => planned,
        }
    }
}

/// The result of handling an event: `Break` is the generation's end.
type Flow<T = ()> = ControlFlow<Result<End>, T>;

/// One event being handled: the time, the state that all phases share, and the effects so far.
struct Turn<'a> {
    now: Moment,
    shared: &'a mut Shared,
    effects: Effects,
}

impl Turn<'_> {
    fn does(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    fn tell_all(&mut self, message: ToWorker) {
        self.does(Effect::Nodes(Order::TellAll(message)));
    }

    fn reports(&mut self, event: report::Event) {
        self.does(Effect::Report(event));
    }

    /// A notice is reported and recorded, and from now on the store and the journal are reserved for the last saves.
    fn announces(&mut self, notice: &Notice) {
        let deadline_s = notice.deadline.map(|left| left.as_secs_f64());
        let binding = notice.deadline_binds();
        let source = notice.source.to_owned();
        self.reports(report::Event::Notice { source, deadline_s, means: notice.kind.name(), binding });
        self.does(Effect::Hush);
        if self.shared.noted < MOST_NOTICES {
            self.shared.noted += 1;
            self.does(Effect::Note(Record::Notice {
                generation: self.shared.settings.generation,
                source: notice.source.to_owned(),
                // For later readers of the record, a deadline that is not binding is none.
                deadline_s: deadline_s.filter(|_| binding),
                means: means(notice.kind),
            }));
        }
    }

    /// The journal is checked now and then, unless a drain has begun: a drain's commits are fenced by their own
    /// appends.
    fn looks_at_the_journal(&mut self) {
        if self.now.saturating_sub(self.shared.looked) >= fence::LOOK {
            self.shared.looked = self.now;
            self.does(Effect::Look);
        }
    }
}

fn means(kind: notice::Kind) -> Means {
    match kind {
        notice::Kind::Interruption => Means::Interruption,
        notice::Kind::Stop => Means::Stop,
        notice::Kind::Rebalance => Means::Rebalance,
    }
}

/// The state that all phases share.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    /// Estimates for steps and saves here.
    estimates: Estimates,
    /// When the journal was last checked.
    looked: Moment,
    /// Notices that were written to the journal.
    noted: u32,
    /// What differs between the states of the ranks, once that is found.
    differed: Option<String>,
}

/// One generation on this node.
#[derive(Debug)]
pub struct StateMachine {
    shared: Shared,
    phase: Phase,
}

impl StateMachine {
    /// A new generation; `estimates`: the measurements of earlier ones here.
    pub fn new(settings: Settings, estimates: Estimates, loading: Loading) -> Self {
        let shared = Shared { settings, estimates, looked: Moment::ZERO, noted: 0, differed: None };
        Self { shared, phase: Phase::Loading(loading) }
    }

    /// The measurements so far.
    pub const fn estimates(&self) -> Estimates {
        self.shared.estimates
    }

    /// What differs between the states of the ranks, if that has ended the generation.
    pub fn differed(&self) -> Option<&str> {
        self.shared.differed.as_deref()
    }

    /// Whether the group trains, and nobody has asked it to stop.
    pub const fn trains(&self) -> bool {
        matches!(self.phase, Phase::Training(_))
    }

    /// How long a group that was asked to stop waits for a node that holds up its last save; `None`: it was not asked,
    /// it is not that far, it is of one node, or a deadline says it. `now`: since the generation began.
    pub fn waits_for_its_last_save(&self, now: Moment) -> Option<Duration> {
        let Phase::Draining(Draining { training, .. }) = &self.phase else { return None };
        let Settings { seats, finishing, .. } = &self.shared.settings;
        let is_free = training.timeline.left_s(now).is_none();
        let waits = seats.are_several() && is_free && training.scheduler.has_ended();
        waits.then(|| finish::limit(*finishing, &self.shared.estimates, training.bytes()))
    }

    /// The last step that every rank has finished; of a generation that has ended or never trained, `None`.
    pub fn finished(&self) -> Option<Step> {
        match &self.phase {
            Phase::Training(training)
            | Phase::Draining(Draining { training, .. })
            | Phase::Salvaging(Salvage { training, .. }) => Some(training.scheduler.finished()),
            Phase::Loading(_) | Phase::Ended => None,
        }
    }

    /// The only place that changes state. `now`: since the generation began.
    pub fn handle(&mut self, event: Event, now: Moment) -> Effects {
        let mut turn = Turn { now, shared: &mut self.shared, effects: Effects::default() };
        let next = match std::mem::replace(&mut self.phase, Phase::Ended) {
            Phase::Loading(loading) => loading.handle(event, &mut turn),
            Phase::Training(training) => training.handle(event, &mut turn),
            Phase::Draining(draining) => draining.handle(event, &mut turn),
            Phase::Salvaging(salvage) => salvage.handle(event, &mut turn),
            Phase::Ended => ControlFlow::Continue(Phase::Ended),
        };
        let effects = turn.effects;
        match next {
            ControlFlow::Continue(phase) => {
                self.phase = phase;
                effects
            }
            ControlFlow::Break(end) => effects.ending(end),
        }
    }
}

#[cfg(test)]
mod tests;
