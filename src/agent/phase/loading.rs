//! Workers start, and load their state once it is fetched.

use std::ops::ControlFlow::{Break, Continue};

use super::{Cause, Event, Flow, Phase, Salvage, Settings, Stage, Training, Turn};
use crate::{
    agent::{
        effects::{Effect, Log, Order},
        generation::{End, Load, Source, Stopped},
        save::{
            gather::Fetched,
            scheduler::{Moment, Scheduler, Setup},
        },
        states::{self, Difference, Remedy, Roll},
        workers::WorkerEvent,
    },
    checkpoint::CheckpointError,
    config::Cadence,
    error::{Error, Kind, Result},
    ids::{Rank, WorldSize},
    notice::{self, Notice},
    protocol::{FromWorker, StartSplit, ToWorker},
    report::{self, StartParts},
    snapshot::plan::TensorSpec,
};

/// A group before `Go`.
#[derive(Debug)]
pub struct Loading {
    /// The layout of the state that each rank has reported.
    built: Vec<Option<Vec<TensorSpec>>>,
    /// Bytes of one save's shards, once the slots are laid out.
    bytes: Option<u64>,
    source: Incoming,
    ready: u32,
    /// When the last rank had built its model.
    all_built: Moment,
    /// What the starts of the ranks were spent on, the longest of each part.
    split: StartSplit,
    fingerprints: Roll,
    /// What differs between the states of the ranks.
    differs: Option<Difference>,
    /// A worker has reported why it can't go on; its process has not yet ended.
    said: Option<Cause>,
}

/// The state to load.
#[derive(Debug)]
pub enum Incoming {
    /// Nothing: workers draw their weights.
    Nothing,
    /// It is being fetched, and will lie in this slot, each file at its place.
    UnderWay(u8, Vec<(u64, u64)>),
    /// It lies there.
    Here(u8, Vec<(u64, u64)>, Fetched),
}

impl Loading {
    /// Every node has started its workers.
    pub fn new(world: WorldSize, source: Incoming) -> Self {
        let built = vec![None; world.get() as usize];
        Self {
            built,
            bytes: None,
            source,
            ready: 0,
            all_built: Moment::ZERO,
            split: StartSplit::default(),
            fingerprints: Roll::default(),
            differs: None,
            said: None,
        }
    }

    pub(super) fn handle(mut self, event: Event, turn: &mut Turn<'_>) -> Flow<Phase> {
        match event {
            Event::Notice(notice) => return self.on_notice(&notice, turn),
            Event::Worker(WorkerEvent::Message(rank, message)) => return self.hear(rank, message, turn),
            Event::Worker(WorkerEvent::Exited(rank, reason)) => {
                self.said.get_or_insert(Cause::exited(rank, &reason));
            }
            Event::LaidOut { bytes } => {
                self.bytes = Some(bytes);
                self.load_if_possible(turn);
                return Continue(Phase::Loading(self));
            }
            Event::Fetched(Ok(fetched)) => {
                // A node has read all of it in the store.
                if let Load::Checkpoint { step, generation, from: Source::Store { .. } } = turn.shared.settings.load
                    && fetched.stored == fetched.bytes
                    && fetched.bytes > 0
                {
                    turn.does(Effect::Vouch { step, generation });
                }
                if let Incoming::UnderWay(slot, places) = self.source {
                    self.source = Incoming::Here(slot, places, fetched);
                }
                self.load_if_possible(turn);
            }
            Event::Fetched(Err(CheckpointError::Damaged { object, reason }))
                if matches!(turn.shared.settings.load, Load::Checkpoint { .. }) =>
            {
                return Break(Ok(End::Damaged { object, reason }));
            }
            Event::Fetched(Err(error)) => return Break(Err(Error::from(error).context("restore"))),
            // Nothing has been captured.
            Event::Save(_) | Event::Retry { .. } | Event::HeldUp { .. } => {}
            Event::Lost(error) => return Break(Err(error)),
            Event::Tick => turn.looks_at_the_journal(),
        }
        match self.said {
            Some(cause) => Break(cause.end(turn.shared.settings.load.step())),
            None => Continue(Phase::Loading(self)),
        }
    }

    fn on_notice(self, notice: &Notice, turn: &mut Turn<'_>) -> Flow<Phase> {
        turn.announces(notice);
        if notice.kind == notice::Kind::Rebalance {
            return Continue(Phase::Loading(self));
        }
        let step = turn.shared.settings.load.step();
        let verdict = format!("{} before the first step: nothing to save", notice.source);
        Break(Ok(End::Stopped(Stopped { step, committed: step, verdict, drain: None, cap: None })))
    }

    fn hear(mut self, rank: Rank, message: FromWorker, turn: &mut Turn<'_>) -> Flow<Phase> {
        match message {
            FromWorker::Listening { port } => {
                let host = turn.shared.settings.store_host.to_string();
                turn.tell_all(ToWorker::Peers { host, port });
            }
            FromWorker::Built { tensors, device, parameters } => {
                if rank == Rank(0) {
                    let workers = turn.shared.settings.outline.workers;
                    turn.does(Effect::Log(Log::Built { device, parameters, workers }));
                }
                if let Some(place) = self.built.get_mut(rank.get() as usize) {
                    *place = Some(tensors);
                }
                if self.built.iter().all(Option::is_some) {
                    self.all_built = turn.now;
                    return self.lay_out(turn);
                }
            }
            FromWorker::Ready { fingerprint, split } => {
                self.ready += 1;
                self.split = self.split.max(split);
                let Settings { outline, seats, .. } = &turn.shared.settings;
                if let Some(fingerprint) = fingerprint {
                    self.differs = self.fingerprints.hear(rank, fingerprint, outline.workers, seats);
                }
                if self.ready == outline.workers {
                    return match self.differs {
                        None => self.go(turn),
                        Some(difference) => Break(disagree(difference, turn)),
                    };
                }
            }
            FromWorker::Failed { message, hint, permanent } => {
                self.said.get_or_insert(Cause::said(rank, &message, hint, permanent));
            }
            // No rank has been told to go.
            FromWorker::Frozen { .. }
            | FromWorker::Step(_)
            | FromWorker::Captured { .. }
            | FromWorker::Stalled { .. }
            | FromWorker::Validated { .. }
            | FromWorker::Stopped { .. } => {}
        }
        Continue(Phase::Loading(self))
    }

    /// Every rank has reported its state's layout: each is told what it writes, and where.
    fn lay_out(self, turn: &mut Turn<'_>) -> Flow<Phase> {
        let mut lists = self.built.iter().flatten();
        if let Some(tensors) = lists.next() {
            if let Some(other) = lists.find(|list| *list != tensors) {
                let (one, other) = (tensors.len(), other.len());
                let what = format!("ranks differ in their state: {one} and {other} tensors");
                return Break(Err(Error::new(Kind::Bug, what)));
            }
            turn.does(Effect::Nodes(Order::LayOut(tensors.clone())));
        }
        Continue(Phase::Loading(self))
    }

    /// The state to load is there and the workers have their layout: they can load.
    fn load_if_possible(&self, turn: &mut Turn<'_>) {
        if let (Incoming::Here(slot, files, _), Some(_)) = (&self.source, self.bytes) {
            let weights_only = matches!(turn.shared.settings.load, Load::Weights { .. });
            turn.tell_all(ToWorker::Restore { slot: *slot, files: files.clone(), weights_only });
        }
    }

    /// What the start was spent on up to now.
    fn start(&self, settings: &Settings, fetch_s: Option<f64>) -> StartParts {
        let StartSplit { model_s, group_s, slots_s, load_s, compare_s } = self.split;
        let (invite_s, built_s) = (settings.invited.as_secs_f64(), self.all_built.as_secs_f64());
        StartParts {
            invite_s,
            built_s,
            model_s,
            group_s,
            slots_s,
            fetch_s,
            load_s,
            compare_s,
            step_s: 0.0,
            total_s: 0.0,
        }
    }

    /// Every rank has loaded: training begins.
    fn go(self, turn: &mut Turn<'_>) -> Flow<Phase> {
        let Some(bytes) = self.bytes else {
            return Break(Err(Error::new(Kind::Bug, "workers are ready that have no layout")));
        };
        let now = turn.now;
        let load = &turn.shared.settings.load;
        let done = load.step();
        let (fetched, slot) = match &self.source {
            Incoming::Here(slot, _, fetched) => (Some(*fetched), Some(*slot)),
            Incoming::Nothing | Incoming::UnderWay(..) => (None, None),
        };
        let is_checkpoint = matches!(load, Load::Checkpoint { .. });
        if let Some(Fetched { bytes, stored, lent, seconds: fetch_s }) = fetched {
            let restore_s = now.as_secs_f64();
            let from = if stored == 0 { "memory" } else { "store" };
            // A node that is alone has all of it from one place, which is named already.
            let is_alone = turn.shared.settings.seats.are_of_one_node();
            let [peer_bytes, store_bytes] = [lent, stored].map(|bytes| Some(bytes).filter(|_| !is_alone));
            let restored =
                report::Event::Restored { step: done, bytes, fetch_s, restore_s, from, peer_bytes, store_bytes };
            turn.reports(restored);
        }
        // A node that found it in its memory has nothing to do; others of its group may have.
        if is_checkpoint {
            turn.does(Effect::Nodes(Order::Received));
        }
        turn.does(Effect::Busy(false));
        let settings = &turn.shared.settings;
        let outline = settings.outline;
        let (world, least) = (WorldSize(outline.workers), settings.first_step);
        let setup = Setup {
            ranks: outline.workers,
            slots: settings.config.checkpoint.slots,
            done,
            last: outline.last,
            cadence: settings.config.checkpoint.every,
            ranked: ranked(settings),
            held: slot.filter(|_| is_checkpoint),
        };
        let mut scheduler = Scheduler::new(setup, settings.measured, now);
        let saves = scheduler.first_orders(now);
        let measure = settings.stopping.measures_first();
        let mut training = Training::begin(settings, scheduler, bytes, now);
        training.reports_its_start(self.start(settings, fetched.map(|fetched| fetched.seconds)), now);
        let first_s = turn.shared.estimates.pace.begins(world, least).as_secs();
        turn.tell_all(ToWorker::Go { saves, first_s, measure });
        if let Some(cause) = self.said {
            return Continue(Phase::Salvaging(Salvage::new(training, None, cause)));
        }
        if !measure {
            let actions = training.judge(done, None, turn);
            training.act(actions, Stage::Training, turn)?;
        }
        Continue(Phase::Training(training))
    }
}

/// Ranks have loaded the same bytes and do not have the same state.
fn disagree(difference: Difference, turn: &mut Turn<'_>) -> Result<End> {
    let (what, step) = (difference.what.clone(), turn.shared.settings.load.step());
    turn.shared.differed = Some(what.clone());
    if !turn.shared.settings.doubted {
        return Ok(End::Died { step, reason: what });
    }
    let (nodes, end) = match difference.settle() {
        Remedy::LeaveOut(nodes) => (nodes, Ok(End::Died { step, reason: what.clone() })),
        Remedy::GiveUp(nodes) => (nodes, Err(states::wrong(&what))),
    };
    if !nodes.is_empty() {
        turn.does(Effect::LeaveOut { nodes, why: what });
    }
    end
}

/// The interval of steps after whose multiples a state is measured that `checkpoint.keep.best` ranks.
fn ranked(settings: &Settings) -> Option<std::num::NonZeroU64> {
    let config = &settings.config.checkpoint;
    let wanted = config.keep.best > 0 && !matches!(config.every, Cadence::Steps(_));
    settings.outline.validated_every.filter(|_| wanted)
}
