//! The node's two snapshot slots: shared memory that outlives its workers.
//!
//! # Layout
//! Each slot is one piece of shared memory for the whole node. It holds the image of each of the node's ranks
//! ([`crate::snapshot::plan`]), one after the other, each beginning on a page; a rank writes its own image alone and
//! may read all of them. A checkpoint that is loaded from the store is fetched into slot 0, file after file, and read
//! there by all ranks: restoring needs no memory beside the slots.
//!
//! # A slot's content
//! After a commit, and after a checkpoint was fetched, a slot holds that checkpoint's files until the next capture
//! writes over them. Workers that crash meanwhile are started again from it, and the store is not read. No record is
//! kept of when a capture begins to write, and a dying worker may have written anywhere: a slot's checksums are
//! verified again ([`Slots::verify`]) before it is used.
//!
//! # Who writes into a slot
//! The workers of one generation, and tasks of this process that hold an [`ImageChunk`] of it: the headers' writer, a
//! fetch, whatever else brings bytes from elsewhere. Invariant: *when a generation begins, nobody of an earlier one can
//! write into either slot.* If another generation may follow, the end of a generation aborts its tasks and calls
//! [`Slots::end_generation`]. Aborting is not enough: an aborted task stops only at its next await, and a disk read
//! runs to its end. [`Slots::end_generation`] therefore waits until no memory is lent any more. A slot whose old memory
//! is still lent, or whose workers may still live, gets new memory: the old memory belongs to its writers, and is freed
//! when they are gone.
//!
//! # Crash, retry, cancel
//! The memory belongs to this process and disappears with it. Pages in use are never given back while it lives: workers
//! may have pinned them for a GPU, which would go on writing to the old ones. Headers are written when all ranks have
//! captured, not before, so that a checkpoint fetched into the slot is whole until then. A fetch ends when its
//! [`Fetching`] is dropped.

use std::{ops::Range, time::Duration};

use bytes::Bytes;
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    checkpoint::{
        CheckpointError,
        manifest::FileKind,
        restore::{self, RemoteFile},
        save::Upload,
    },
    error::{Error, Kind, Result},
    ids::{Generation, NodeRanks, Step},
    shortage::Shortage,
    snapshot::{
        image::{self, ImageChunk, Mapping, SharedImage},
        plan::{self, ImagePlan, ShardKind, TensorSpec},
    },
    storage::{Crc64, Store},
};

/// The slot that a checkpoint is fetched into.
pub const RESTORE_SLOT: u8 = 0;

/// The slots' names, which show up in `/proc/<pid>/maps`.
const NAMES: [&str; 2] = ["trainer-slot-0", "trainer-slot-1"];
/// How long the end of a generation waits for the remaining users of a slot's memory.
const QUIET: Duration = Duration::from_secs(10);
/// The interval between two checks for such users.
const LOOK: Duration = Duration::from_millis(5);

/// The checkpoint that lies in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    step: Step,
    generation: Generation,
    /// Where each of its tensor files lies in the slot, and its checksum.
    files: Vec<(Range<u64>, Crc64)>,
}

/// One slot.
#[derive(Debug)]
struct Slot {
    image: SharedImage,
    held: Option<Held>,
    /// The headers of the layout are in it.
    has_headers: bool,
}

impl Slot {
    fn create(name: &str) -> Result<Self> {
        let image = SharedImage::create(name).map_err(memory("make shared memory"))?;
        Ok(Self { image, held: None, has_headers: false })
    }
}

/// How this generation's workers use the slots.
#[derive(Debug)]
struct Layout {
    /// Of this node's ranks.
    plans: Vec<ImagePlan>,
    /// The first byte of the image of each.
    bases: Vec<u64>,
    /// They are all ranks of the world, so a slot can hold a whole checkpoint.
    is_whole: bool,
    /// Which shard holds which tensor, over all ranks.
    index: Bytes,
    /// The names of all shards, over all ranks.
    names: Vec<String>,
    maps: [Mapping; 2],
}

/// Both slots of a node.
#[derive(Debug)]
pub struct Slots {
    slots: [Slot; 2],
    layout: Option<Layout>,
}

/// The result of a fetch from the store.
#[derive(Clone, Copy, Debug)]
pub struct Fetched {
    /// Bytes of all files.
    pub bytes: u64,
    /// The time it took.
    pub seconds: f64,
}

/// A checkpoint, or a model, that is on its way into [`RESTORE_SLOT`].
#[derive(Debug)]
pub struct Fetch {
    /// Each file's first byte and length in the slot.
    pub files: Vec<(u64, u64)>,
    pieces: Vec<(restore::Piece, ImageChunk)>,
    wanted: Vec<RemoteFile>,
}

/// A fetch under way; it ends when this is dropped.
#[must_use]
#[derive(Debug, Default)]
pub struct Fetching {
    /// Each file's first byte and length in the slot.
    pub places: Vec<(u64, u64)>,
    task: JoinSet<()>,
}

impl Fetching {
    /// Aborts it. Threads that work for it may write a moment longer: [`Slots::end_generation`] waits for them.
    pub fn stop(&mut self) {
        self.task.abort_all();
    }
}

impl Fetch {
    /// Fetches all of it, beside the event loop; the result goes to `done`.
    pub fn start(
        self,
        store: Store,
        folder: String,
        done: mpsc::UnboundedSender<Result<Fetched, CheckpointError>>,
    ) -> Fetching {
        let mut fetching = Fetching { places: self.files, task: JoinSet::new() };
        fetching.task.spawn(async move {
            let begin = tokio::time::Instant::now();
            let result = restore::fetch(&store, &folder, &self.wanted, self.pieces, |_| {}).await;
            let bytes = self.wanted.iter().map(|file| file.bytes).sum();
            let _ = done.send(result.map(|()| Fetched { bytes, seconds: begin.elapsed().as_secs_f64() }));
        });
        fetching
    }
}

fn memory(doing: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| {
        let shortage = Shortage::of(&error);
        let error = Error::from_source(Kind::Bug, error).context(doing);
        match shortage {
            // tmpfs and memfd report a full disk when memory is short.
            Some(Shortage::Room) => error.with_hint(Shortage::Memory.hint()),
            _ => error,
        }
    }
}

impl Slots {
    /// Two empty slots.
    pub fn create() -> Result<Self> {
        let [first, second] = NAMES;
        Ok(Self { slots: [Slot::create(first)?, Slot::create(second)?], layout: None })
    }

    /// The slots' memory, to be inherited by workers.
    pub fn shared(&self) -> [&SharedImage; 2] {
        [&self.slots[0].image, &self.slots[1].image]
    }

    /// A generation begins: its workers will report their state's layout. The slots' content stays.
    pub fn begin_generation(&mut self) -> Result<()> {
        if self.slots.iter().any(|slot| slot.image.is_lent()) {
            return Err(Error::new(Kind::Bug, "a slot's memory is still in use by an earlier generation"));
        }
        self.layout = None;
        for slot in &mut self.slots {
            slot.has_headers = false;
        }
        Ok(())
    }

    /// A generation has ended, and another one may follow. Its tasks were told to stop; `workers_are_gone`: its
    /// workers' processes have ended. From here on nobody of it writes into a slot: see the module's header. A slot
    /// that gets new memory loses its content.
    pub async fn end_generation(&mut self, workers_are_gone: bool) -> Result<()> {
        self.end_generation_within(QUIET, workers_are_gone).await
    }

    async fn end_generation_within(&mut self, limit: Duration, workers_are_gone: bool) -> Result<()> {
        self.layout = None;
        let quiet = async {
            while self.slots.iter().any(|slot| slot.image.is_lent()) {
                tokio::time::sleep(LOOK).await;
            }
        };
        let _ = tokio::time::timeout(limit, quiet).await;
        for (slot, name) in self.slots.iter_mut().zip(NAMES) {
            if slot.image.is_lent() || !workers_are_gone {
                tracing::warn!("{name} gets new memory: the old one may still be written to");
                *slot = Slot::create(name)?;
            }
        }
        Ok(())
    }

    /// Makes room for `files` in [`RESTORE_SLOT`]; parts of at most `part` bytes are fetched at once.
    pub fn receive(&mut self, files: Vec<RemoteFile>, part: u64) -> Result<Fetch> {
        let layout = restore::plan_pieces(&files, part)?;
        let slot = &mut self.slots[usize::from(RESTORE_SLOT)];
        slot.held = None;
        let failed = memory("make room for a checkpoint");
        slot.image.grow(layout.total).map_err(&failed)?;
        let ranges: Vec<_> = layout.pieces.iter().map(|p| p.image_offset..p.image_offset + p.len).collect();
        let chunks = slot.image.map().and_then(|mapping| mapping.chunks(&ranges)).map_err(&failed)?;
        Ok(Fetch { files: layout.files, pieces: layout.pieces.into_iter().zip(chunks).collect(), wanted: files })
    }

    /// All of `files` lie in [`RESTORE_SLOT`], verified, at these places.
    pub fn received(&mut self, step: Step, generation: Generation, places: &[(u64, u64)], files: &[RemoteFile]) {
        let checksums: Option<Vec<_>> = places
            .iter()
            .zip(files)
            .map(|(&(start, len), file)| Some((start..start.checked_add(len)?, file.crc64?)))
            .collect();
        self.slots[usize::from(RESTORE_SLOT)].held = checksums.map(|files| Held { step, generation, files });
    }

    /// Where the files of this checkpoint lie, if a slot holds it: the slot, each file's first byte and length.
    pub fn find(&self, step: Step, generation: Generation) -> Option<(u8, Vec<(u64, u64)>)> {
        let is_it = |slot: &Slot| slot.held.as_ref().is_some_and(|h| (h.step, h.generation) == (step, generation));
        let slot = self.slots.iter().position(is_it)?;
        let held = self.slots[slot].held.as_ref()?;
        let files = held.files.iter().map(|(range, _)| (range.start, range.end - range.start)).collect();
        Some((u8::try_from(slot).ok()?, files))
    }

    /// Recomputes the slot's checksums; on a mismatch the slot counts as empty. They are computed in parallel at the
    /// speed of memory.
    pub async fn verify(&mut self, slot: u8) -> bool {
        let Some(Slot { image, held, .. }) = self.slots.get_mut(usize::from(slot)) else { return false };
        let Some(files) = held.as_ref().map(|held| held.files.clone()) else { return false };
        let sound = sums_agree(image, files).await;
        if !sound {
            *held = None;
        }
        sound
    }

    /// Every rank has reported its state's layout: plans who writes what, and sizes the slots for this node's ranks.
    /// Returns the plan of each of them and the first byte of its image in the slots.
    pub fn lay_out(
        &mut self,
        tensors: &[TensorSpec],
        ranks: NodeRanks,
    ) -> Result<impl Iterator<Item = (&ImagePlan, u64)>> {
        let mut plans = plan::plan(tensors, ranks.world, image::page_size())?;
        let index = serde_json::to_vec_pretty(&plan::model_index(&plans, tensors))
            .map_err(|error| Error::from_source(Kind::Bug, error))?;
        let shards = plans.iter().flat_map(|plan| &plan.shards);
        let names = shards.map(|shard| shard.file_name.clone()).collect();
        plans.retain(|plan| ranks.local(plan.rank).is_some());
        let mut total = 0_u64;
        let mut bases = Vec::with_capacity(plans.len());
        for plan in &plans {
            bases.push(total);
            // A plan's length is a multiple of the page.
            total = total
                .checked_add(plan.len)
                .ok_or_else(|| Error::new(Kind::Bug, "the state's images are longer than 64 bits can say"))?;
        }
        let open = |slot: &Slot| {
            slot.image.grow(total)?;
            slot.image.map()
        };
        let failed = memory("lay out snapshot images");
        let maps = [open(&self.slots[0]).map_err(&failed)?, open(&self.slots[1]).map_err(&failed)?];
        let is_whole = ranks.is_whole_world();
        let layout = self.layout.insert(Layout { plans, bases, is_whole, index: index.into(), names, maps });
        Ok(layout.plans.iter().zip(layout.bases.iter().copied()))
    }

    fn laid_out(&self) -> Result<&Layout> {
        self.layout.as_ref().ok_or_else(|| Error::new(Kind::Bug, "a save before there is a layout"))
    }

    /// The index of the weights, and the names of all shards of a checkpoint: those of every node.
    pub fn outline(&self) -> Result<(Bytes, Vec<String>)> {
        self.laid_out().map(|layout| (layout.index.clone(), layout.names.clone()))
    }

    /// Every rank has captured into `slot`: its headers are written, if they are not there yet. Its previous content is
    /// gone.
    fn prepare(&mut self, slot: u8) -> Result<&Layout> {
        let (Some(layout), Some(state)) = (&self.layout, self.slots.get_mut(usize::from(slot))) else {
            return Err(Error::new(Kind::Bug, format!("upload of slot {slot} before there is a layout")));
        };
        state.held = None;
        if !std::mem::replace(&mut state.has_headers, true) {
            let shards: Vec<_> = layout
                .plans
                .iter()
                .zip(&layout.bases)
                .flat_map(|(plan, base)| plan.shards.iter().map(move |shard| (base + shard.image_offset, shard)))
                .collect();
            let ranges: Vec<_> =
                shards.iter().map(|(start, shard)| *start..start + shard.header.len() as u64).collect();
            let chunks = layout.maps[usize::from(slot)].chunks(&ranges);
            for (chunk, (_, shard)) in chunks.map_err(memory("write headers of images"))?.iter_mut().zip(shards) {
                chunk.as_mut().copy_from_slice(&shard.header);
            }
        }
        Ok(layout)
    }

    /// This node's shards in a slot that every rank has captured: its very pages.
    pub fn uploads(&mut self, slot: u8) -> Result<Vec<Upload>> {
        let layout = self.prepare(slot)?;
        let mut uploads = Vec::new();
        for (plan, base) in layout.plans.iter().zip(&layout.bases) {
            for shard in &plan.shards {
                let start = base + shard.image_offset;
                let body = layout.maps[usize::from(slot)].bytes(start..start + shard.len);
                let kind = match shard.kind {
                    ShardKind::Model => FileKind::Model,
                    ShardKind::Optimizer => FileKind::Optimizer,
                };
                let body = body.map_err(memory("read snapshot image"))?;
                uploads.push(Upload { name: shard.file_name.clone(), kind, body });
            }
        }
        Ok(uploads)
    }

    /// A slot's snapshot is committed, its shards with these checksums by name: the slot holds it from now on, if this
    /// node has all of its ranks.
    pub fn hold(&mut self, slot: u8, step: Step, generation: Generation, checksums: &[(String, Crc64)]) {
        let (Some(layout), Some(state)) = (&self.layout, self.slots.get_mut(usize::from(slot))) else { return };
        if !layout.is_whole {
            return;
        }
        let mut files = Vec::new();
        for (plan, base) in layout.plans.iter().zip(&layout.bases) {
            for shard in &plan.shards {
                let Some((_, sum)) = checksums.iter().find(|(name, _)| *name == shard.file_name) else { return };
                let start = base + shard.image_offset;
                files.push((start..start + shard.len, *sum));
            }
        }
        state.held = Some(Held { step, generation, files });
    }
}

async fn sums_agree(image: &SharedImage, files: Vec<(Range<u64>, Crc64)>) -> bool {
    let Ok(mapping) = image.map() else { return false };
    let lent = files.into_iter().map(|(range, expected)| Ok((mapping.bytes(range)?, expected)));
    let Ok(lent) = lent.collect::<std::io::Result<Vec<_>>>() else { return false };
    let checksums: Vec<_> = lent
        .into_iter()
        .map(|(bytes, expected)| tokio::task::spawn_blocking(move || Crc64::of(&bytes) == expected))
        .collect();
    let mut sound = true;
    for sum in checksums {
        sound &= sum.await.unwrap_or(false);
    }
    sound
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::STORAGE,
        ids::{Rank, WorldSize},
        snapshot::plan::Dtype,
        storage::faulty::{Fault, Faulty},
    };

    fn tensors() -> Vec<TensorSpec> {
        let tensor = |name: &str, kind, n| TensorSpec {
            name: name.to_owned(),
            dtype: Dtype::F32,
            shape: vec![n],
            kind,
            part: None,
        };
        vec![
            tensor("a", ShardKind::Model, 3000),
            tensor("b", ShardKind::Model, 2000),
            tensor("exp_avg.a", ShardKind::Optimizer, 3000),
        ]
    }

    /// Fills a slot as the workers would, and returns the checksums of an upload.
    fn capture(slots: &mut Slots, slot: u8, byte: u8) -> Vec<(String, Crc64)> {
        let layout = slots.layout.as_ref().unwrap();
        for (plan, base) in layout.plans.iter().zip(&layout.bases) {
            let worker = slots.slots[usize::from(slot)].image.map().unwrap();
            for shard in &plan.shards {
                for tensor in &shard.tensors {
                    let start = base + tensor.offset;
                    #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
                    worker.chunks(&[start..start + tensor.len]).unwrap()[0].as_mut().fill(byte);
                }
            }
        }
        let uploads = slots.uploads(slot).unwrap();
        assert!(!slots.outline().unwrap().0.is_empty());
        uploads.iter().map(|upload| (upload.name.clone(), Crc64::of(&upload.body))).collect()
    }

    #[tokio::test]
    async fn a_slot_holds_its_checkpoint_until_the_next_capture() {
        let mut slots = Slots::create().unwrap();
        assert_eq!(slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap().count(), 2);
        let checksums = capture(&mut slots, 1, 7);
        assert_eq!(slots.find(Step(4), Generation(1)), None);
        slots.hold(1, Step(4), Generation(1), &checksums);
        let (slot, files) = slots.find(Step(4), Generation(1)).unwrap();
        assert_eq!((slot, files.len()), (1, checksums.len()));
        assert_eq!(slots.find(Step(4), Generation(2)), None);
        assert!(slots.verify(1).await);

        // The next generation finds it in the same place, as whole safetensors files.
        slots.end_generation(true).await.unwrap();
        slots.begin_generation().unwrap();
        assert!(slots.verify(1).await);
        let map = slots.slots[1].image.map().unwrap();
        let names: Vec<String> = files
            .iter()
            .flat_map(|&(start, len)| plan::read_header(&map.bytes(start..start + len).unwrap()).unwrap())
            .map(|(name, ..)| name)
            .collect();
        assert_eq!(names.len(), 3, "{names:?}");

        slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap().for_each(drop);
        capture(&mut slots, 0, 8);
        assert!(slots.find(Step(4), Generation(1)).is_some(), "it was the other slot");
        capture(&mut slots, 1, 9);
        assert_eq!(slots.find(Step(4), Generation(1)), None);
    }

    #[test]
    fn a_node_lays_out_and_uploads_its_own_ranks_alone() {
        let ranks = |first, workers| NodeRanks { first: Rank(first), workers, world: WorldSize(3) };
        let (mut alone, mut first, mut second) =
            (Slots::create().unwrap(), Slots::create().unwrap(), Slots::create().unwrap());
        let plans = |slots: &mut Slots, ranks| -> Vec<(ImagePlan, u64)> {
            slots.lay_out(&tensors(), ranks).unwrap().map(|(plan, base)| (plan.clone(), base)).collect()
        };
        let all = plans(&mut alone, NodeRanks::alone(3));
        let (one, two) = (plans(&mut first, ranks(0, 1)), plans(&mut second, ranks(1, 2)));
        let apart: Vec<&ImagePlan> = one.iter().chain(&two).map(|(plan, _)| plan).collect();
        assert_eq!(apart, all.iter().map(|(plan, _)| plan).collect::<Vec<_>>());
        assert_eq!((one[0].1, two[0].1, two[1].1), (0, 0, two[0].0.len));
        // Each uploads what is its own; all know the names of all.
        let mut names = Vec::new();
        for slots in [&mut first, &mut second] {
            let sums = capture(slots, 1, 7);
            assert_eq!(slots.outline().unwrap(), alone.outline().unwrap());
            // A part of a checkpoint is none.
            slots.hold(1, Step(4), Generation(1), &sums);
            assert_eq!(slots.find(Step(4), Generation(1)), None);
            names.extend(sums.into_iter().map(|(name, _)| name));
        }
        assert_eq!(names, alone.outline().unwrap().1);
    }

    #[tokio::test]
    async fn what_a_dying_worker_has_scribbled_over_is_not_believed() {
        let mut slots = Slots::create().unwrap();
        slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap().for_each(drop);
        let checksums = capture(&mut slots, 0, 7);
        slots.hold(0, Step(4), Generation(1), &checksums);
        let start = slots.layout.as_ref().unwrap().bases[1] + 1000;
        let worker = slots.slots[0].image.map().unwrap();
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
        worker.chunks(&[start..start + 1]).unwrap()[0].as_mut().fill(8);
        assert!(!slots.verify(0).await);
        assert_eq!(slots.find(Step(4), Generation(1)), None);
    }

    /// A generation ends while a range of its fetch hangs; the range comes when the next one has captured.
    #[tokio::test]
    async fn bytes_of_an_old_fetch_do_not_reach_a_later_capture() {
        let faulty =
            Faulty::new(|operation, _, n| if (operation, n) == ("get", 0) { Fault::Held } else { Fault::Pass });
        let store = Store::faulty(&faulty, &STORAGE);
        let body = Bytes::from(vec![5_u8; 100_000]);
        let file = RemoteFile { name: "f".into(), bytes: body.len() as u64, crc64: Some(Crc64::of(&body)) };
        store.put("f", body).await.unwrap();
        let mut slots = Slots::create().unwrap();
        let (done, mut old) = mpsc::unbounded_channel();
        let mut fetching = slots.receive(vec![file.clone()], 30_000).unwrap().start(store.clone(), String::new(), done);
        while faulty.count("get") < 4 {
            tokio::task::yield_now().await;
        }
        assert!(slots.begin_generation().is_err() && slots.receive(vec![file.clone()], 30_000).is_err());
        fetching.stop();
        slots.end_generation(true).await.unwrap();
        slots.begin_generation().unwrap();
        let (done, mut new) = mpsc::unbounded_channel();
        let _fetching = slots.receive(vec![file], 30_000).unwrap().start(store, String::new(), done);
        new.recv().await.unwrap().unwrap();
        slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap().for_each(drop);
        let sums = capture(&mut slots, 0, 9);
        faulty.let_go();
        while old.recv().await.is_some() {}
        slots.hold(0, Step(4), Generation(2), &sums);
        assert!(slots.verify(0).await, "an old fetch has written into a snapshot");
    }

    /// A thread that reads from a disk does not stop when its task does; nor does a worker that the system can't end.
    #[tokio::test]
    async fn who_does_not_stop_writing_keeps_the_old_memory() {
        for workers_are_gone in [true, false] {
            let mut slots = Slots::create().unwrap();
            slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap().for_each(drop);
            let sums = capture(&mut slots, 1, 7);
            slots.hold(1, Step(4), Generation(1), &sums);
            let worker = slots.slots[0].image.map().unwrap();
            let file = RemoteFile { name: "f".into(), bytes: 1000, crc64: None };
            // A thread has it; or a worker has, of whose loans this process knows nothing.
            let mut lent = slots.receive(vec![file.clone()], 1000).unwrap().pieces;
            if !workers_are_gone {
                lent.clear();
            }
            slots.end_generation_within(LOOK, workers_are_gone).await.unwrap();
            assert_eq!(slots.find(Step(4), Generation(1)).is_some(), workers_are_gone, "it was the other slot");
            slots.begin_generation().unwrap();
            drop(slots.receive(vec![file], 1000).unwrap());
            slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap().for_each(drop);
            let sums = capture(&mut slots, 0, 9);
            match lent.pop() {
                Some((_, mut chunk)) => chunk.as_mut().fill(5),
                #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
                None => worker.chunks(&[0..1000]).unwrap()[0].as_mut().fill(5),
            }
            slots.hold(0, Step(5), Generation(2), &sums);
            assert!(slots.verify(0).await, "an old writer has written into a snapshot");
        }
    }

    #[tokio::test]
    async fn a_fetched_checkpoint_is_held_where_it_was_received() {
        let mut slots = Slots::create().unwrap();
        let body = Bytes::from(vec![5_u8; 100_000]);
        let file = RemoteFile { name: "f".into(), bytes: body.len() as u64, crc64: Some(Crc64::of(&body)) };
        let Fetch { files, mut pieces, wanted } = slots.receive(vec![file], 30_000).unwrap();
        for (_, chunk) in &mut pieces {
            chunk.as_mut().fill(5);
        }
        drop(pieces);
        slots.received(Step(9), Generation(3), &files, &wanted);
        // Sizing the slots for this generation's workers leaves it alone.
        slots.lay_out(&tensors(), NodeRanks::alone(1)).unwrap().for_each(drop);
        assert_eq!(slots.find(Step(9), Generation(3)), Some((RESTORE_SLOT, files)));
        assert!(slots.verify(RESTORE_SLOT).await);
    }
}
