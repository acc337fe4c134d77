//! Reads the sequences of the next passes on a thread of its own, while those before them are computed.
//!
//! The order of passes is known (it is a pure function of the step), so the thread needs no orders: it begins with the
//! pass that is asked for first, and goes on to the run's last one. At most three passes are in memory: the one that is
//! computed, one that waits, and one that is being read.
//!
//! Invariant: whoever asks gets exactly the positions that it asks for; if the thread has others, it is replaced by one
//! that begins there. What is read does not depend on the thread. *Error:* it is given to whoever asks for the pass in
//! which it came, and the thread ends. *Cancel:* dropping a [`Reader`] waits for nothing; its thread ends after the
//! read under way.

use std::{
    ops::Range,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use tch::{Device, Tensor};

use super::batch::BatchError;
use crate::{
    config::Passes,
    data::{Dataset, Marks, Sampler, Split, sampler::batch as share_of},
    ids::{Rank, Step, WorldSize},
    torch,
};

/// Which sequences there are, and how they are cut.
#[derive(Clone, Debug)]
pub(super) struct Corpus {
    pub dataset: Arc<Dataset>,
    pub sampler: Sampler,
    /// Tokens of one sequence, without the one that follows it.
    pub length: u32,
    /// The device that they are for.
    pub device: Device,
}

/// Sequences of one pass, in the host's memory.
#[derive(Debug)]
pub(super) struct Sequences {
    /// i64 `[sequences, length + 1]`; for a GPU in memory that it reads by itself.
    pub tokens: Tensor,
    /// Where documents start in each sequence, one list after the other; empty: the data has no marks.
    pub starts: Vec<u32>,
    /// How many documents each sequence has.
    pub documents: Vec<usize>,
    /// Positions with a target, in the sequences put one after the other.
    pub targets: Vec<i64>,
}

impl Sequences {
    /// Where documents start in each sequence.
    pub fn rows(&self) -> impl Iterator<Item = &[u32]> {
        let mut rest = self.starts.as_slice();
        self.documents.iter().map(move |&count| {
            let (row, after) = rest.split_at(count.min(rest.len()));
            rest = after;
            row
        })
    }
}

impl Corpus {
    /// The sequences at these places of a split; `sample` says which sample is at a place.
    pub fn read(&self, split: Split, at: Range<u64>, sample: impl Fn(u64) -> u64) -> Result<Sequences, BatchError> {
        let window = self.length as usize + 1;
        let count = usize::try_from(at.end.saturating_sub(at.start)).unwrap_or(usize::MAX);
        let mut tokens = vec![0; count.saturating_mul(window)];
        for (at, tokens) in at.clone().zip(tokens.chunks_exact_mut(window)) {
            self.dataset.read_sample(split, sample(at), tokens)?;
        }
        let tensor = Tensor::f_from_slice(&tokens).and_then(|flat| flat.f_view([count as i64, window as i64]));
        let tokens = torch::pinned(torch::tch_result("make batch", tensor)?, self.device)?;
        let (mut starts, mut documents, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        if self.dataset.has_marks() {
            let mut marks = Marks::default();
            for (row, at) in (0_i64..).zip(at) {
                self.dataset.read_marks(split, sample(at), self.length, &mut marks)?;
                starts.extend(&marks.starts);
                documents.push(marks.starts.len());
                let places = (row * i64::from(self.length)..).zip(&marks.targets);
                targets.extend(places.filter(|(_, target)| **target).map(|(place, _)| place));
            }
        }
        Ok(Sequences { tokens, starts, documents, targets })
    }

    /// The sequences to train on at these positions of the run's cursor.
    pub fn at_positions(&self, positions: Range<u64>) -> Result<Sequences, BatchError> {
        self.read(Split::Train, positions, |position| self.sampler.sample_at(position).1)
    }

    /// Targets in the sequences at these positions of the run's cursor.
    pub fn targets(&self, positions: Range<u64>) -> Result<u64, BatchError> {
        let count = positions.end.saturating_sub(positions.start);
        if !self.dataset.has_marks() {
            return Ok(count.saturating_mul(self.length.into()));
        }
        positions.into_iter().try_fold(0, |sum: u64, position| {
            let sample = self.sampler.sample_at(position).1;
            Ok(sum + u64::from(self.dataset.targets(Split::Train, sample, self.length)?))
        })
    }
}

/// The order of one rank's passes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    pub passes: Passes,
    pub global_batch: u32,
    pub rank: Rank,
    pub world: WorldSize,
    /// The run's last step.
    pub last: Step,
}

impl Order {
    /// The step that a position belongs to.
    fn step(&self, position: u64) -> Step {
        Step(position / u64::from(self.global_batch.max(1)) + 1)
    }

    /// The positions of all ranks in the step of this position.
    pub fn all(&self, position: u64) -> Range<u64> {
        share_of(self.step(position), self.global_batch, Rank(0), WorldSize(1))
    }

    /// Whether a pass at these positions is the rank's first one of a step.
    fn is_first(&self, at: &Range<u64>) -> bool {
        share_of(self.step(at.start), self.global_batch, self.rank, self.world).start == at.start
    }

    /// The pass after the one at these positions; `None`: that was the run's last, or none of this rank's.
    pub fn after(&self, at: &Range<u64>) -> Option<Range<u64>> {
        let step = self.step(at.start);
        let mut begin = share_of(step, self.global_batch, self.rank, self.world).start;
        let mut found = false;
        for pass in self.passes.iter() {
            let range = begin..begin + u64::from(pass.sequences);
            if found {
                return Some(range);
            }
            found = range == *at;
            begin = range.end;
        }
        let (step, first) = (step.next(), self.passes.iter().next()?);
        let begin = share_of(step, self.global_batch, self.rank, self.world).start;
        (found && step <= self.last).then(|| begin..begin + u64::from(first.sequences))
    }
}

/// A pass that was read.
#[derive(Debug)]
struct Ready {
    at: Range<u64>,
    /// Targets of the whole step on all ranks, if this is its first pass and the data has marks.
    targets: Option<u64>,
    sequences: Result<Sequences, BatchError>,
}

/// Passes that wait, beside the one that is computed and the one that is being read.
const WAITING: usize = 1;

/// Reads ahead.
#[derive(Debug)]
pub(super) struct Reader {
    source: Corpus,
    order: Order,
    /// From the thread, if there is one.
    ready: Option<Receiver<Ready>>,
    /// Taken from it, and not asked for yet.
    front: Option<Ready>,
}

impl Reader {
    /// Nothing is read before something is asked for.
    pub fn new(source: Corpus, order: Order) -> Self {
        Self { source, order, ready: None, front: None }
    }

    /// What is read from.
    pub fn source(&self) -> &Corpus {
        &self.source
    }

    /// The pass at these positions.
    pub fn take(&mut self, at: Range<u64>) -> Result<Sequences, BatchError> {
        self.look(&at)?;
        match self.front.take() {
            Some(front) if front.at == at => front.sequences,
            _ => self.source.at_positions(at),
        }
    }

    /// Targets of the step whose positions on all ranks these are, of which this rank's first pass is read next.
    pub fn targets(&mut self, all: Range<u64>) -> Result<u64, BatchError> {
        if !self.source.dataset.has_marks() {
            return self.source.targets(all);
        }
        let begin = share_of(self.order.step(all.start), self.order.global_batch, self.order.rank, self.order.world);
        if let Some(first) = self.order.passes.iter().next()
            && self.order.all(all.start) == all
        {
            self.look(&(begin.start..begin.start + u64::from(first.sequences)))?;
            if let Some(targets) = self.front.as_ref().and_then(|front| front.targets) {
                return Ok(targets);
            }
        }
        self.source.targets(all)
    }

    /// Lets the front be the pass at these positions, if it can be read ahead.
    fn look(&mut self, at: &Range<u64>) -> Result<(), BatchError> {
        if self.front.as_ref().is_some_and(|front| front.at == *at) {
            return Ok(());
        }
        self.front = self.ready.as_ref().and_then(|ready| ready.recv().ok());
        if self.front.as_ref().is_none_or(|front| front.at != *at) {
            let ready = self.begin(at.clone())?;
            self.front = ready.recv().ok();
            self.ready = Some(ready);
        }
        Ok(())
    }

    /// Starts a thread that reads from this pass on.
    fn begin(&self, first: Range<u64>) -> Result<Receiver<Ready>, BatchError> {
        let (send, ready) = sync_channel(WAITING);
        let (source, order) = (self.source.clone(), self.order);
        let spawned =
            std::thread::Builder::new().name("batches".into()).spawn(move || read_ahead(&source, &order, first, &send));
        spawned.map_err(BatchError::Thread)?;
        Ok(ready)
    }
}

/// The life of the thread.
fn read_ahead(source: &Corpus, order: &Order, first: Range<u64>, send: &SyncSender<Ready>) {
    let mut next = Some(first);
    while let Some(at) = next {
        let counts = source.dataset.has_marks() && order.is_first(&at);
        // An error in here comes again when the step's targets are counted by whoever asks.
        let targets = if counts { source.targets(order.all(at.start)).ok() } else { None };
        let sequences = source.at_positions(at.clone());
        next = sequences.is_ok().then(|| order.after(&at)).flatten();
        if send.send(Ready { at, targets, sequences }).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Spread;

    fn order(global_batch: u32, rank: u32, world: u32, most: u32, last: u64) -> Order {
        let world = WorldSize(world);
        let passes = Spread::new(global_batch, world, most).unwrap().passes(Rank(rank));
        Order { passes, global_batch, rank: Rank(rank), world, last: Step(last) }
    }

    #[test]
    fn the_passes_of_a_rank_follow_one_another_to_the_runs_last() {
        for (global_batch, world, most) in [(8, 1, 2), (8, 3, 2), (7, 2, 3), (5, 5, 1), (6, 1, 6)] {
            for rank in 0..world {
                let order = order(global_batch, rank, world, most, 4);
                let mut expected = Vec::new();
                for step in 1..=4 {
                    let mut begin = share_of(Step(step), global_batch, Rank(rank), WorldSize(world)).start;
                    for pass in order.passes.iter() {
                        expected.push(begin..begin + u64::from(pass.sequences));
                        begin += u64::from(pass.sequences);
                    }
                }
                let mut found = vec![expected[0].clone()];
                while let Some(next) = order.after(&found[found.len() - 1]) {
                    found.push(next);
                }
                assert_eq!(found, expected, "{global_batch} {world} {most}");
                assert_eq!(order.after(&(expected[0].start..expected[0].end + 1)), None, "no pass of this rank");
                let firsts = expected.iter().filter(|at| order.is_first(at)).count();
                assert_eq!(firsts, 4);
            }
        }
    }
}
