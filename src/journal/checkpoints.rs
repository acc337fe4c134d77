//! All checkpoints that a run ever committed: cheap to look up, to copy, and to scan for the few that are still good.
//!
//! A journal's `committed` records come with generations that never fall, so the list is in order of generation as it
//! grows; within a generation steps nearly always rise, too. If they do, everything here is a binary search; if not, a
//! scan of that generation. The list consists of chunks that copies share: a copy costs one pointer per chunk, and an
//! addition to one of the copies at most one chunk.

use std::{
    ops::{Index, Range},
    sync::Arc,
};

use super::state::{Checkpoint, CheckpointStatus};
use crate::ids::{Generation, Step};

/// Checkpoints in one chunk.
const CHUNK: usize = if cfg!(test) { 4 } else { 256 };

/// The key of the order.
type Key = (Generation, Step);

#[derive(Clone, Debug, PartialEq)]
struct Chunk {
    items: Vec<Checkpoint>,
    /// The lowest key and the highest.
    keys: (Key, Key),
    /// Good ones among them.
    good: usize,
}

/// All checkpoints of a run, in the order in which they were committed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoints {
    chunks: Vec<Arc<Chunk>>,
    len: usize,
    /// Whether some generation has committed a lower step after a higher one.
    astray: bool,
    /// A checkpoint whose status may just have changed, and whether it was good before.
    touched: Option<(usize, usize, bool)>,
}

fn key(checkpoint: &Checkpoint) -> Key {
    (checkpoint.committed.generation, checkpoint.committed.step)
}

fn is_good(checkpoint: &Checkpoint) -> bool {
    checkpoint.status == CheckpointStatus::Good
}

impl Checkpoints {
    /// In the order in which they were committed.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Checkpoint> + Clone {
        self.chunks.iter().flat_map(|chunk| chunk.items.iter())
    }

    /// Each with the one committed next.
    pub fn pairs(&self) -> impl Iterator<Item = (&Checkpoint, &Checkpoint)> {
        self.iter().zip(self.iter().skip(1))
    }

    /// Those of one generation, in the order in which they were committed.
    pub fn of(&self, generation: Generation) -> impl DoubleEndedIterator<Item = &Checkpoint> + Clone {
        let chunks = self.chunks_of(generation);
        let items = self.chunks[chunks].iter().flat_map(|chunk| chunk.items.iter());
        items.filter(move |checkpoint| checkpoint.committed.generation == generation)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none was ever committed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The good ones, the last committed first.
    pub fn good(&self) -> impl Iterator<Item = &Checkpoint> {
        self.chunks
            .iter()
            .rev()
            .filter(|chunk| chunk.good > 0)
            .flat_map(|chunk| chunk.items.iter().rev())
            .filter(|c| is_good(c))
    }

    /// The good ones of one generation up to step `limit`, the highest step first.
    pub(super) fn good_of(
        &self,
        generation: Generation,
        limit: Option<Step>,
    ) -> Box<dyn Iterator<Item = &Checkpoint> + '_> {
        let wanted = move |c: &&Checkpoint| {
            is_good(c) && c.committed.generation == generation && limit.is_none_or(|limit| c.committed.step <= limit)
        };
        let chunks = self.chunks[self.chunks_of(generation)].iter().rev().filter(|chunk| chunk.good > 0);
        let found = chunks.flat_map(|chunk| chunk.items.iter().rev()).filter(wanted);
        if !self.astray {
            return Box::new(found);
        }
        let mut found: Vec<_> = found.collect();
        found.sort_by_key(|c| std::cmp::Reverse(c.committed.step));
        Box::new(found.into_iter())
    }

    /// The chunks that may hold a generation's checkpoints.
    fn chunks_of(&self, generation: Generation) -> Range<usize> {
        let first = self.chunks.partition_point(|chunk| chunk.keys.1.0 < generation);
        let end = self.chunks.partition_point(|chunk| chunk.keys.0.0 <= generation);
        first..end.max(first)
    }

    /// The position of one.
    fn place(&self, step: Step, generation: Generation) -> Option<(usize, usize)> {
        let wanted = (generation, step);
        if self.astray {
            let places = self.chunks_of(generation).rev();
            return places
                .filter(|&at| (self.chunks[at].keys.0..=self.chunks[at].keys.1).contains(&wanted))
                .find_map(|at| Some((at, self.chunks[at].items.iter().rposition(|c| key(c) == wanted)?)));
        }
        let at = self.chunks.partition_point(|chunk| chunk.keys.1 < wanted);
        Some((at, self.chunks.get(at)?.items.binary_search_by_key(&wanted, key).ok()?))
    }

    pub(super) fn get(&self, step: Step, generation: Generation) -> Option<&Checkpoint> {
        self.place(step, generation).map(|(chunk, at)| &self.chunks[chunk].items[at])
    }

    /// A checkpoint whose status is to change; call [`settle`](Self::settle) when it has.
    pub(super) fn get_mut(&mut self, step: Step, generation: Generation) -> Option<&mut Checkpoint> {
        self.settle();
        let (chunk, at) = self.place(step, generation)?;
        let checkpoint = &mut Arc::make_mut(&mut self.chunks[chunk]).items[at];
        self.touched = Some((chunk, at, is_good(checkpoint)));
        Some(checkpoint)
    }

    /// Recounts the good ones after such a change.
    pub(super) fn settle(&mut self) {
        if let Some((chunk, at, before)) = self.touched.take() {
            let now = is_good(&self.chunks[chunk].items[at]);
            if now != before {
                let chunk = Arc::make_mut(&mut self.chunks[chunk]);
                chunk.good = if now { chunk.good + 1 } else { chunk.good - 1 };
            }
        }
    }

    /// Adds the next one. Its generation is no lower than that of the one before.
    pub(super) fn push(&mut self, checkpoint: Checkpoint) {
        let (key, good) = (key(&checkpoint), usize::from(is_good(&checkpoint)));
        self.len += 1;
        if let Some(last) = self.chunks.last_mut() {
            self.astray |= key < last.keys.1;
            if last.items.len() < CHUNK {
                let last = Arc::make_mut(last);
                last.keys = (last.keys.0.min(key), last.keys.1.max(key));
                last.good += good;
                last.items.push(checkpoint);
                return;
            }
        }
        let mut items = Vec::with_capacity(CHUNK);
        items.push(checkpoint);
        self.chunks.push(Arc::new(Chunk { items, keys: (key, key), good }));
    }
}

impl Index<usize> for Checkpoints {
    type Output = Checkpoint;

    fn index(&self, at: usize) -> &Checkpoint {
        &self.chunks[at / CHUNK].items[at % CHUNK]
    }
}
