//! The node's snapshot slots: shared memory that outlives its workers.
//!
//! # Layout
//! Each slot is one piece of shared memory for the whole node. It holds the image of each of the node's ranks
//! ([`crate::snapshot::plan`]), one after the other, each beginning on a page. A rank writes its own image and, where
//! it has parts of weights, their places in the others' images: never a byte that another rank writes. It may read all
//! of them. So any rank may write into any file of the node, and *no file is read before every rank has captured the
//! step*: the scheduler ([`super::scheduler`]) uploads a slot, and [`Slots::hold`] keeps one, only then. A checkpoint
//! that is loaded is brought into one slot, file after file ([`super::gather`]), and read there by all ranks: restoring
//! needs no memory beside the slots.
//!
//! # A slot's content
//! After a commit, and after a checkpoint was brought into it, a slot holds that checkpoint's files until the next
//! capture writes over them. In a group of several nodes it holds those of this node's own ranks after a save, and all
//! of them after a restore. Workers that crash meanwhile are started again from it: from all files where they lie
//! ([`Slots::find`], [`Slots::find_all`]), or from some of them, which are copied beside the others
//! ([`Slots::receive_beside`]). No record is kept of when a capture begins to write, and a dying worker may have
//! written anywhere: a file's checksum is verified again before it is used, and a file that is not what it should be
//! counts as absent.
//!
//! What comes from outside goes into [`RESTORE_SLOT`], or into the other slot if that one holds files of the very
//! checkpoint: nothing overwrites what it is made from. So in a group each slot may grow to a whole checkpoint, as the
//! slots of a node that is alone are from the start.
//!
//! # One slot or two
//! With two, one is captured into while the other is uploaded, and the newest checkpoint stays in memory while a
//! newer state is copied. With one (`checkpoint.slots`), the copy overwrites that checkpoint: workers that crash from
//! then on, until the next commit, are started again from the store. A group that holds parts of a checkpoint has no
//! place beside them, and reads all of it from elsewhere.
//!
//! # Who reads in a slot
//! The workers that load, uploads, and the other nodes of a generation that loads, through the [`Shelf`]: that ends
//! before the workers are told to go, since their next capture may be into any slot.
//!
//! # Who writes into a slot
//! The workers of one generation, and tasks of this process that hold an
//! [`ImageChunk`](image::ImageChunk) of it: the headers' writer, a
//! fetch, whatever else brings bytes from elsewhere. Invariant: *when a generation begins, nobody of an earlier one can
//! write into either slot.* If another generation may follow, the end of a generation aborts its tasks and calls
//! [`Slots::end_generation`]. Aborting is not enough: an aborted task stops only at its next await, and a disk read
//! runs to its end. [`Slots::end_generation`] therefore waits until no memory is lent any more. A slot whose old memory
//! is still lent, or whose workers may still live, gets new memory: the old memory belongs to its writers, and is freed
//! when they are gone. Workers that live on in the next generation ([`super::super::keep`]) count as gone: they have
//! stopped, and write nothing before they have a new layout. Since they have the memory that they inherited, they are
//! kept only while no slot gets another one ([`Slots::births`]).
//!
//! # Crash, retry, cancel
//! The memory belongs to this process and disappears with it. Pages in use are never given back while it lives: workers
//! may have pinned them for a GPU, which would go on writing to the old ones. Headers are written when all ranks have
//! captured, not before, so that a checkpoint fetched into the slot is whole until then. A fetch ends when its
//! [`Fetching`](super::gather::Fetching) is dropped.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream};

use super::{
    gather::Fetch,
    shelf::{Lent, Shelf},
};
use crate::{
    checkpoint::{
        manifest::FileKind,
        restore::{self, RemoteFile},
        save::Upload,
    },
    error::{Error, Kind, Result},
    ids::{Generation, NodeId, NodeRanks, Rank, SlotCount, Step},
    rendezvous::channel::bulk::Wanted,
    shortage::Shortage,
    snapshot::{
        image::{self, Mapping, SharedImage},
        plan::{self, CopyPlan, ImagePlan, ShardKind, SlotCopy, TensorSpec},
    },
    storage::Crc64,
};

/// The slot that a checkpoint is fetched into, unless it holds a part of it.
pub const RESTORE_SLOT: u8 = 0;

/// How long the end of a generation waits for the remaining users of a slot's memory.
const QUIET: Duration = Duration::from_secs(10);
/// Bytes that one thread sums at a time; in tests few, so that files have several such pieces.
const SUMMED: u64 = if cfg!(test) { 4 << 10 } else { 16 << 20 };
/// The interval between two checks for such users.
const LOOK: Duration = Duration::from_millis(5);

/// A tensor file that lies in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HeldFile {
    name: String,
    range: Range<u64>,
    crc64: Crc64,
}

impl HeldFile {
    /// Whether it is this one, by what its manifest says.
    fn is(&self, file: &RemoteFile) -> bool {
        self.name == file.name && self.range.end - self.range.start == file.bytes && file.crc64 == Some(self.crc64)
    }
}

/// The checkpoint of which files lie in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    step: Step,
    generation: Generation,
    files: Vec<HeldFile>,
    /// They are all of its tensor files.
    is_whole: bool,
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
    /// Its name shows up in `/proc/<pid>/maps`.
    fn create(number: u8) -> Result<Self> {
        let image = SharedImage::create(&format!("trainer-slot-{number}")).map_err(memory("make shared memory"))?;
        Ok(Self { image, held: None, has_headers: false })
    }

    fn holds(&self, step: Step, generation: Generation) -> Option<&Held> {
        self.held.as_ref().filter(|held| (held.step, held.generation) == (step, generation))
    }

    /// Which of `files`, of this checkpoint, lie in it, and where.
    fn places(&self, step: Step, generation: Generation, files: &[RemoteFile]) -> Vec<Option<Range<u64>>> {
        let held: HashMap<&str, &HeldFile> = match self.holds(step, generation) {
            Some(held) => held.files.iter().map(|file| (file.name.as_str(), file)).collect(),
            None => HashMap::new(),
        };
        let place = |file: &RemoteFile| held.get(file.name.as_str()).filter(|it| it.is(file));
        files.iter().map(|file| place(file).map(|it| it.range.clone())).collect()
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
    maps: Vec<Mapping>,
}

/// A rank's part of a layout.
#[derive(Debug)]
pub struct LaidOut {
    /// The rank.
    pub rank: Rank,
    /// Bytes of the files in its image.
    pub stored: u64,
    /// What it copies at each save, and where to in a slot.
    pub copies: Vec<SlotCopy>,
}

/// The slots of a node.
#[derive(Debug)]
pub struct Slots {
    slots: Vec<Slot>,
    count: SlotCount,
    layout: Option<Layout>,
    /// Counts the times that a slot has got other memory than the workers of before have.
    births: u64,
    /// What other nodes may read of them.
    shelf: Arc<Shelf>,
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
    /// Empty slots.
    pub fn create(count: SlotCount) -> Result<Self> {
        let slots = count.numbers().map(Slot::create).collect::<Result<_>>()?;
        Ok(Self { slots, count, layout: None, births: 0, shelf: Arc::default() })
    }

    /// Between two generations: from now on there are this many. A slot that goes takes its content along.
    pub fn set_count(&mut self, count: SlotCount) -> Result<()> {
        self.births += u64::from(count != self.count);
        self.slots.truncate(usize::from(count.get()));
        for number in count.numbers().skip(self.slots.len()) {
            self.slots.push(Slot::create(number)?);
        }
        self.count = count;
        Ok(())
    }

    /// How many there are.
    pub const fn count(&self) -> SlotCount {
        self.count
    }

    /// Workers have the memory that all slots have now if this number was the same when they started.
    pub const fn births(&self) -> u64 {
        self.births
    }

    /// The slots' memory, to be inherited by workers.
    pub fn shared(&self) -> Vec<&SharedImage> {
        self.slots.iter().map(|slot| &slot.image).collect()
    }

    /// What other nodes may read of them.
    pub fn shelf(&self) -> &Arc<Shelf> {
        &self.shelf
    }

    /// From now on these members of a generation may read what the slots hold of the checkpoint that it loads: until
    /// all of them have it, or the generation ends.
    pub fn lend(&self, wanted: Wanted, members: BTreeSet<NodeId>) -> Result<()> {
        let (mut slots, mut files) = (Vec::new(), HashMap::new());
        for slot in &self.slots {
            if let Some(held) = slot.holds(wanted.step, wanted.of) {
                let place = |file: &HeldFile| (file.name.clone(), (slots.len(), file.range.clone()));
                files.extend(held.files.iter().map(place));
                slots.push(slot.image.map().map_err(memory("read a snapshot"))?);
            }
        }
        self.shelf.put(Lent { wanted, members, slots, files });
        Ok(())
    }

    /// The slots are about to be written: from now on no other node reads them.
    pub fn stop_lending(&self) {
        self.shelf.clear();
    }

    /// A generation begins: its workers will report their state's layout. The slots' content stays.
    pub fn begin_generation(&mut self) -> Result<()> {
        self.stop_lending();
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
        self.stop_lending();
        let quiet = async {
            while self.slots.iter().any(|slot| slot.image.is_lent()) {
                tokio::time::sleep(LOOK).await;
            }
        };
        let _ = tokio::time::timeout(limit, quiet).await;
        for (slot, number) in self.slots.iter_mut().zip(0..) {
            if slot.image.is_lent() || !workers_are_gone {
                tracing::warn!("slot {number} gets new memory: the old one may still be written to");
                *slot = Slot::create(number)?;
                self.births += 1;
            }
        }
        Ok(())
    }

    /// Makes room for `files` in [`RESTORE_SLOT`]; parts of at most `part` bytes are fetched at once.
    pub fn receive(&mut self, files: Vec<RemoteFile>, part: u64) -> Result<Fetch> {
        self.make_room(RESTORE_SLOT, files, part)
    }

    /// The same for a checkpoint of which a slot may hold files: they are copied from there into the other slot, if
    /// there is one.
    pub fn receive_beside(
        &mut self,
        step: Step,
        generation: Generation,
        files: Vec<RemoteFile>,
        part: u64,
    ) -> Result<Fetch> {
        let held: Vec<_> = self.slots.iter().map(|slot| slot.places(step, generation, &files)).collect();
        let bytes = |places: &[Option<Range<u64>>]| places.iter().flatten().map(|at| at.end - at.start).sum::<u64>();
        // The one with the most of it; of two that have as much, the first.
        let source = (0..held.len()).rev().max_by_key(|at| bytes(&held[*at])).filter(|at| bytes(&held[*at]) > 0);
        let target = self.count.numbers().find(|number| source.is_some_and(|source| usize::from(*number) != source));
        let (Some(source), Some(target)) = (source, target) else {
            return self.make_room(RESTORE_SLOT, files, part);
        };
        let mapping = self.slots[source].image.map().map_err(memory("read a snapshot"))?;
        // Memory that can't be lent is read from elsewhere.
        let lend = |place: &Option<Range<u64>>| place.clone().and_then(|range| mapping.bytes(range).ok());
        let here = held[source].iter().map(lend).collect();
        Ok(Fetch { here, ..self.make_room(target, files, part)? })
    }

    fn make_room(&mut self, slot: u8, files: Vec<RemoteFile>, part: u64) -> Result<Fetch> {
        let layout = restore::plan_pieces(&files, part)?;
        let image = match self.slots.get_mut(usize::from(slot)) {
            Some(state) => {
                state.held = None;
                &state.image
            }
            None => return Err(Error::new(Kind::Bug, format!("there is no slot {slot}"))),
        };
        let failed = memory("make room for a checkpoint");
        image.grow(layout.total).map_err(&failed)?;
        let ranges: Vec<_> = layout.pieces.iter().map(|p| p.image_offset..p.image_offset + p.len).collect();
        let chunks = image.map().and_then(|mapping| mapping.chunks(&ranges)).map_err(&failed)?;
        let pieces = layout.pieces.into_iter().zip(chunks).collect();
        Ok(Fetch { slot, places: layout.files, pieces, here: Vec::new(), wanted: files, neighbours: None })
    }

    /// All of `files`, the tensor files of this checkpoint, lie in the slot, verified, at these places.
    pub fn received(
        &mut self,
        step: Step,
        generation: Generation,
        slot: u8,
        places: &[(u64, u64)],
        files: &[RemoteFile],
    ) {
        let held = |(&(start, len), file): (&(u64, u64), &RemoteFile)| {
            Some(HeldFile { name: file.name.clone(), range: start..start.checked_add(len)?, crc64: file.crc64? })
        };
        let files: Option<Vec<_>> = places.iter().zip(files).map(held).collect();
        if let Some(state) = self.slots.get_mut(usize::from(slot)) {
            state.held = files.map(|files| Held { step, generation, files, is_whole: true });
        }
    }

    /// The slot that holds files of this checkpoint, if one does.
    pub fn holder(&self, step: Step, generation: Generation) -> Option<u8> {
        (0..).zip(&self.slots).find(|(_, slot)| slot.holds(step, generation).is_some()).map(|(number, _)| number)
    }

    /// Where the files of this checkpoint lie, if a slot holds it whole: the slot, each file's first byte and length.
    pub fn find(&self, step: Step, generation: Generation) -> Option<(u8, Vec<(u64, u64)>)> {
        (0..).zip(&self.slots).find_map(|(number, slot)| {
            let held = slot.holds(step, generation).filter(|held| held.is_whole)?;
            Some((number, held.files.iter().map(|it| (it.range.start, it.range.end - it.range.start)).collect()))
        })
    }

    /// The same where the manifest's list of all tensor files is known: they are found one by one, in its order.
    pub fn find_all(&self, step: Step, generation: Generation, files: &[RemoteFile]) -> Option<(u8, Vec<(u64, u64)>)> {
        (0..).zip(&self.slots).find_map(|(number, slot)| {
            let places = slot.places(step, generation, files).into_iter();
            let places: Option<Vec<_>> = places.map(|at| at.map(|at| (at.start, at.end - at.start))).collect();
            Some((number, places?)).filter(|_| !files.is_empty())
        })
    }

    /// Recomputes the slot's checksums; whether all are right. Files that are not count as absent. They are computed in
    /// parallel at the speed of memory.
    pub async fn verify(&mut self, slot: u8) -> bool {
        let Some(Slot { image, held, .. }) = self.slots.get_mut(usize::from(slot)) else { return false };
        let Some(it) = held else { return false };
        let mut sums = sums_agree(image, &it.files).await.into_iter();
        let before = it.files.len();
        it.files.retain(|_| sums.next() == Some(true));
        let sound = it.files.len() == before;
        it.is_whole &= sound;
        if it.files.is_empty() {
            *held = None;
        }
        sound
    }

    /// Every rank has reported its state's layout: plans who writes what, and sizes the slots for this node's ranks.
    /// Returns what each of them has to know.
    pub fn lay_out(&mut self, tensors: &[TensorSpec], ranks: NodeRanks) -> Result<Vec<LaidOut>> {
        let mut plans = plan::plan(tensors, ranks.world, image::page_size())?;
        plan::within(&plans, tensors, ranks)?;
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
        let maps = self.slots.iter().map(|slot| open(slot).map_err(&failed)).collect::<Result<_>>()?;
        let is_whole = ranks.is_whole_world();
        let laid_out = laid_out(&plans, &bases)?;
        self.layout = Some(Layout { plans, bases, is_whole, index: index.into(), names, maps });
        Ok(laid_out)
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
                    ShardKind::Adapter | ShardKind::Model => FileKind::Model,
                    ShardKind::Optimizer => FileKind::Optimizer,
                };
                let body = body.map_err(memory("read snapshot image"))?;
                uploads.push(Upload { name: shard.file_name.clone(), kind, body });
            }
        }
        Ok(uploads)
    }

    /// A slot's snapshot is in the store, its shards with these checksums by name: from now on the slot holds those of
    /// this node's ranks.
    pub fn hold(&mut self, slot: u8, step: Step, generation: Generation, checksums: &[(String, Crc64)]) {
        let (Some(layout), Some(state)) = (&self.layout, self.slots.get_mut(usize::from(slot))) else { return };
        let checksums: HashMap<&str, Crc64> = checksums.iter().map(|(name, sum)| (name.as_str(), *sum)).collect();
        let mut files = Vec::new();
        for (plan, base) in layout.plans.iter().zip(&layout.bases) {
            for shard in &plan.shards {
                let Some(&crc64) = checksums.get(shard.file_name.as_str()) else { return };
                let start = base + shard.image_offset;
                files.push(HeldFile { name: shard.file_name.clone(), range: start..start + shard.len, crc64 });
            }
        }
        state.held = Some(Held { step, generation, files, is_whole: layout.is_whole });
    }
}

/// The part of each rank of a node whose images begin at `bases`.
fn laid_out(plans: &[ImagePlan], bases: &[u64]) -> Result<Vec<LaidOut>> {
    let base_of: HashMap<Rank, u64> = plans.iter().map(|plan| plan.rank).zip(bases.iter().copied()).collect();
    let of = |plan: &ImagePlan| {
        let place = |copy: &CopyPlan| copy.within(*base_of.get(&copy.image)?);
        let copies: Option<Vec<_>> = plan.copies.iter().map(place).collect();
        let copies = copies.ok_or_else(|| Error::new(Kind::Bug, "a rank copies into an image that is not here"))?;
        let stored = plan.shards.iter().map(|shard| shard.len).sum();
        Ok(LaidOut { rank: plan.rank, stored, copies })
    };
    plans.iter().map(of).collect()
}

/// Whether each of these files has its checksum. They are cut into pieces, because a rank's few files are of different
/// lengths: every core has work to the end.
async fn sums_agree(image: &SharedImage, files: &[HeldFile]) -> Vec<bool> {
    let Ok(mapping) = image.map() else { return Vec::new() };
    let pieces = files.iter().enumerate().flat_map(|(file, HeldFile { range, .. })| {
        let starts = (range.start..range.end).step_by(SUMMED as usize);
        starts.map(move |start| (file, start..range.end.min(start.saturating_add(SUMMED))))
    });
    let sum = |(file, range): (usize, Range<u64>)| {
        let (len, bytes) = (range.end - range.start, mapping.bytes(range));
        let sum = tokio::task::spawn_blocking(move || bytes.ok().map(|bytes| Crc64::of(&bytes)));
        async move { (file, len, sum.await.ok().flatten()) }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut found: Vec<Option<Crc64>> = vec![Some(Crc64::EMPTY); files.len()];
    let mut sums = stream::iter(pieces).map(sum).buffered(threads);
    while let Some((file, len, sum)) = sums.next().await {
        found[file] = found[file].zip(sum).map(|(whole, next)| whole.followed_by(next, len));
    }
    files.iter().zip(found).map(|(file, found)| found == Some(file.crc64)).collect()
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        agent::save::gather::Fetched,
        checkpoint::testing::{STORAGE, memory_store},
        ids::WorldSize,
        snapshot::plan::{Dtype, Part},
        storage::{
            Store,
            faulty::{Fault, Faulty},
        },
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

    /// A rank's copies.
    fn copy(slots: &Slots, slot: u8, rank: &LaidOut, byte: u8) {
        let worker = slots.slots[usize::from(slot)].image.map().unwrap();
        for &SlotCopy { offset, len, .. } in &rank.copies {
            #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
            worker.chunks(&[offset..offset + len]).unwrap()[0].as_mut().fill(byte);
        }
    }

    /// Fills a slot as the workers would, and returns the checksums of an upload.
    fn capture(slots: &mut Slots, slot: u8, byte: u8) -> Vec<(String, Crc64)> {
        let layout = slots.layout.as_ref().unwrap();
        for rank in laid_out(&layout.plans, &layout.bases).unwrap() {
            copy(slots, slot, &rank, byte);
        }
        let uploads = slots.uploads(slot).unwrap();
        assert!(!slots.outline().unwrap().0.is_empty());
        uploads.iter().map(|upload| (upload.name.clone(), Crc64::of(&upload.body))).collect()
    }

    #[tokio::test]
    async fn a_slot_holds_its_checkpoint_until_the_next_capture() {
        let mut slots = Slots::create(SlotCount::TWO).unwrap();
        assert_eq!(slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap().len(), 2);
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

        slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap();
        capture(&mut slots, 0, 8);
        assert!(slots.find(Step(4), Generation(1)).is_some(), "it was the other slot");
        capture(&mut slots, 1, 9);
        assert_eq!(slots.find(Step(4), Generation(1)), None);
    }

    #[test]
    fn a_node_lays_out_and_uploads_its_own_ranks_alone() {
        let ranks = |first, workers| NodeRanks { first: Rank(first), workers, world: WorldSize(3) };
        let (mut alone, mut first, mut second) = (
            Slots::create(SlotCount::TWO).unwrap(),
            Slots::create(SlotCount::TWO).unwrap(),
            Slots::create(SlotCount::TWO).unwrap(),
        );
        let plans = |slots: &mut Slots, ranks| -> Vec<(ImagePlan, u64)> {
            slots.lay_out(&tensors(), ranks).unwrap();
            let layout = slots.layout.as_ref().unwrap();
            layout.plans.iter().cloned().zip(layout.bases.iter().copied()).collect()
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
            assert!(slots.slots[1].holds(Step(4), Generation(1)).is_some_and(|held| held.files.len() == sums.len()));
            names.extend(sums.into_iter().map(|(name, _)| name));
        }
        assert_eq!(names, alone.outline().unwrap().1);
    }

    /// The rank whose image this copy goes into.
    fn image_of(slots: &Slots, copy: &SlotCopy) -> Rank {
        let layout = slots.layout.as_ref().unwrap();
        let mut images = layout.plans.iter().zip(&layout.bases);
        images.rfind(|(_, base)| **base <= copy.offset).unwrap().0.rank
    }

    /// Tensors of which each of two ranks has a half.
    fn halves() -> Vec<TensorSpec> {
        let half = |tensor: &TensorSpec, owner: u32| {
            let half = tensor.shape[0] / 2;
            let (begin, end) = (u64::from(owner) * half, (u64::from(owner) + 1) * half);
            TensorSpec { part: Some(Part { owner: Rank(owner), begin, end }), ..tensor.clone() }
        };
        tensors().iter().flat_map(|tensor| [half(tensor, 0), half(tensor, 1)]).collect()
    }

    /// Both ranks write into each file of weights. One dies after its copies or before them: what there is then is no
    /// checkpoint, neither the one that the slot held nor the one that was to be made.
    #[tokio::test]
    async fn files_that_two_ranks_write_are_whole_only_with_the_copies_of_both() {
        let mut slots = Slots::create(SlotCount::TWO).unwrap();
        let ranks = slots.lay_out(&halves(), NodeRanks::alone(2)).unwrap();
        let images: BTreeSet<Rank> = ranks[0].copies.iter().map(|copy| image_of(&slots, copy)).collect();
        assert_eq!(images.len(), 2, "a rank writes into both images");
        let sums = |slots: &mut Slots| -> Vec<(String, Crc64)> {
            slots.uploads(0).unwrap().iter().map(|upload| (upload.name.clone(), Crc64::of(&upload.body))).collect()
        };
        for rank in &ranks {
            copy(&slots, 0, rank, 7);
        }
        let old = sums(&mut slots);
        slots.hold(0, Step(4), Generation(1), &old);
        assert!(slots.verify(0).await);
        for rank in &ranks {
            copy(&slots, 0, rank, 8);
            // Only one has captured: in every file of weights are bytes of both steps.
            let held = slots.slots[0].held.clone();
            assert!(!slots.verify(0).await);
            let whole = &slots.slots[0].held.as_ref().unwrap().files;
            assert!(whole.iter().all(|file| file.name.starts_with("optimizer")), "{whole:?}");
            assert_eq!(slots.find(Step(4), Generation(1)), None);
            slots.slots[0].held = held;
            copy(&slots, 0, rank, 7);
            assert!(slots.verify(0).await, "each byte has one writer");
        }
        for rank in &ranks {
            copy(&slots, 0, rank, 8);
        }
        let new = sums(&mut slots);
        assert!(old.iter().zip(&new).all(|(old, new)| old.0 == new.0 && old.1 != new.1));
        slots.hold(0, Step(5), Generation(1), &new);
        assert!(slots.verify(0).await);
        assert_eq!(slots.find(Step(5), Generation(1)).unwrap().1.len(), new.len());
    }

    #[test]
    fn ranks_of_several_nodes_can_not_write_one_file() {
        let mut slots = Slots::create(SlotCount::TWO).unwrap();
        let ranks = NodeRanks { first: Rank(0), workers: 1, world: WorldSize(2) };
        let error = slots.lay_out(&halves(), ranks).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.to_string().contains("is in parts on several nodes"), "{error}");
    }

    #[tokio::test]
    async fn what_a_dying_worker_has_scribbled_over_is_not_believed() {
        let mut slots = Slots::create(SlotCount::TWO).unwrap();
        slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap();
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
        let mut slots = Slots::create(SlotCount::TWO).unwrap();
        let (done, mut old) = mpsc::unbounded_channel();
        let mut fetching =
            slots.receive(vec![file.clone()], 30_000).unwrap().start(store.clone(), String::new(), None, done);
        while faulty.count("get") < 4 {
            tokio::task::yield_now().await;
        }
        assert!(slots.begin_generation().is_err() && slots.receive(vec![file.clone()], 30_000).is_err());
        fetching.stop();
        slots.end_generation(true).await.unwrap();
        slots.begin_generation().unwrap();
        let (done, mut new) = mpsc::unbounded_channel();
        let _fetching = slots.receive(vec![file], 30_000).unwrap().start(store, String::new(), None, done);
        new.recv().await.unwrap().unwrap();
        slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap();
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
            let mut slots = Slots::create(SlotCount::TWO).unwrap();
            slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap();
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
            slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap();
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
        let mut slots = Slots::create(SlotCount::TWO).unwrap();
        let body = Bytes::from(vec![5_u8; 100_000]);
        let file = RemoteFile { name: "f".into(), bytes: body.len() as u64, crc64: Some(Crc64::of(&body)) };
        let Fetch { slot, places, mut pieces, wanted, .. } = slots.receive(vec![file], 30_000).unwrap();
        for (_, chunk) in &mut pieces {
            chunk.as_mut().fill(5);
        }
        drop(pieces);
        slots.received(Step(9), Generation(3), slot, &places, &wanted);
        // Sizing the slots for this generation's workers leaves it alone.
        slots.lay_out(&tensors(), NodeRanks::alone(1)).unwrap();
        assert_eq!(slots.find(Step(9), Generation(3)), Some((RESTORE_SLOT, places.clone())));
        assert_eq!(slots.find_all(Step(9), Generation(3), &wanted), Some((RESTORE_SLOT, places)));
        assert!(slots.verify(RESTORE_SLOT).await);
    }

    /// Two nodes of one worker each have captured step 4 into `slot`, and each holds its own files; these are the
    /// first's slots, the checkpoint's files in the store, and which of them are the first's.
    async fn half_held(slot: u8) -> (Slots, Store, Vec<RemoteFile>, usize) {
        // Sizes by which each rank has files of both kinds.
        let sizes = [("a", 3000), ("b", 2400), ("exp_avg.a", 2500), ("exp_avg.b", 2000)];
        let tensor = |(name, n): (&str, u64)| TensorSpec {
            name: name.to_owned(),
            dtype: Dtype::F32,
            shape: vec![n],
            kind: if name.len() == 1 { ShardKind::Model } else { ShardKind::Optimizer },
            part: None,
        };
        let tensors = sizes.map(tensor);
        let store = memory_store();
        let ranks = |first| NodeRanks { first: Rank(first), workers: 1, world: WorldSize(2) };
        let (mut first, mut second) = (Slots::create(SlotCount::TWO).unwrap(), Slots::create(SlotCount::TWO).unwrap());
        let mut files = Vec::new();
        for (slots, rank) in [(&mut first, 0), (&mut second, 1)] {
            slots.lay_out(&tensors, ranks(rank)).unwrap();
            let sums = capture(slots, slot, 7 + rank as u8);
            for upload in slots.uploads(slot).unwrap() {
                let crc64 = Some(Crc64::of(&upload.body));
                files.push(RemoteFile { name: upload.name.clone(), bytes: upload.body.len() as u64, crc64 });
                store.put(&format!("c/{}", upload.name), Bytes::copy_from_slice(&upload.body)).await.unwrap();
            }
            slots.hold(slot, Step(4), Generation(1), &sums);
        }
        first.end_generation(true).await.unwrap();
        first.begin_generation().unwrap();
        let own = first.slots[usize::from(slot)].held.as_ref().unwrap().files.len();
        assert_eq!((own, files.len()), (2, 4));
        (first, store, files, own)
    }

    /// What a fetch of the checkpoint of step 4 has brought, and into which slot.
    async fn fetched(slots: &mut Slots, store: &Store, files: &[RemoteFile]) -> (Fetched, u8) {
        let (done, mut result) = mpsc::unbounded_channel();
        let fetch = slots.receive_beside(Step(4), Generation(1), files.to_vec(), 5000).unwrap();
        let fetching = fetch.start(store.clone(), "c".into(), None, done);
        let fetched = result.recv().await.unwrap().unwrap();
        slots.received(Step(4), Generation(1), fetching.slot, &fetching.places, files);
        assert!(slots.verify(fetching.slot).await, "every byte is that of the checkpoint");
        (fetched, fetching.slot)
    }

    fn bytes(files: &[RemoteFile]) -> u64 {
        files.iter().map(|file| file.bytes).sum()
    }

    #[tokio::test]
    async fn what_a_slot_holds_of_a_checkpoint_is_copied_into_the_other_and_the_rest_is_read() {
        for slot in [0, 1] {
            let (mut slots, store, files, own) = half_held(slot).await;
            assert_eq!(slots.find_all(Step(4), Generation(1), &files), None);
            // What is not there can't be read.
            for file in &files[..own] {
                store.delete(&format!("c/{}", file.name)).await.unwrap();
            }
            let (found, target) = fetched(&mut slots, &store, &files).await;
            assert_eq!((found.bytes, found.stored), (bytes(&files), bytes(&files[own..])));
            assert_eq!(target, 1 - slot, "what it is made from is not overwritten");
            assert!(slots.verify(slot).await, "its own files are still there");
            // From now on the whole of it is there.
            let (whole, places) = slots.find_all(Step(4), Generation(1), &files).unwrap();
            assert_eq!((whole, places.len()), (target, files.len()));
            assert_eq!(slots.find(Step(4), Generation(1)), Some((whole, places)));
            // One file of another content, and it is not that checkpoint.
            let mut other = files.clone();
            other[own].crc64 = Some(Crc64(1));
            assert_eq!(slots.find_all(Step(4), Generation(1), &other), None);
            assert_eq!(slots.find_all(Step(4), Generation(2), &files), None);
            assert_eq!(slots.find_all(Step(4), Generation(1), &[]), None);
        }
    }

    #[tokio::test]
    async fn without_a_part_of_it_a_checkpoint_is_read_into_the_first_slot() {
        let (mut slots, store, files, _) = half_held(0).await;
        let fetch = slots.receive_beside(Step(4), Generation(2), files.clone(), 5000).unwrap();
        assert_eq!((fetch.slot, fetch.here.len()), (RESTORE_SLOT, 0), "another generation's");
        drop(fetch);
        let (found, slot) = fetched(&mut slots, &store, &files).await;
        assert_eq!((found.stored, slot), (bytes(&files), RESTORE_SLOT), "that fetch has taken its place");
    }

    #[tokio::test]
    async fn one_slot_is_all_that_there_is_to_capture_into_to_hold_and_to_receive_into() {
        let mut slots = Slots::create(SlotCount::ONE).unwrap();
        assert_eq!(slots.shared().len(), 1);
        slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap();
        let sums = capture(&mut slots, 0, 7);
        assert!(slots.uploads(1).is_err(), "there is no other");
        slots.hold(0, Step(4), Generation(1), &sums);
        slots.end_generation(true).await.unwrap();
        slots.begin_generation().unwrap();
        assert!(slots.verify(0).await && slots.find(Step(4), Generation(1)).is_some());
        // A worker dies in the middle of the next capture, which writes over what the slot holds.
        let ranks = slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap();
        copy(&slots, 0, &ranks[0], 8);
        slots.end_generation(true).await.unwrap();
        slots.begin_generation().unwrap();
        assert!(!slots.verify(0).await);
        assert_eq!(slots.find(Step(4), Generation(1)), None, "the store has it");
    }

    /// There is no place beside them.
    #[tokio::test]
    async fn with_one_slot_parts_of_a_checkpoint_are_read_again() {
        let (mut slots, store, files, _) = half_held(0).await;
        slots.set_count(SlotCount::ONE).unwrap();
        let (found, slot) = fetched(&mut slots, &store, &files).await;
        assert_eq!((found.stored, slot), (bytes(&files), RESTORE_SLOT));
    }

    #[tokio::test]
    async fn the_number_of_slots_may_change_between_two_generations() {
        let (mut slots, ..) = half_held(1).await;
        slots.set_count(SlotCount::TWO).unwrap();
        assert!(slots.verify(1).await, "nothing has changed");
        slots.set_count(SlotCount::ONE).unwrap();
        assert!(!slots.verify(1).await, "its memory is gone");
        slots.set_count(SlotCount::TWO).unwrap();
        slots.begin_generation().unwrap();
        slots.lay_out(&tensors(), NodeRanks::alone(2)).unwrap();
        let sums = capture(&mut slots, 1, 7);
        slots.hold(1, Step(5), Generation(2), &sums);
        assert!(slots.verify(1).await);
    }

    /// Faulty memory, or a capture that was under way when its worker died.
    #[tokio::test]
    async fn a_file_that_has_changed_in_memory_is_read_from_the_store_and_no_other_is() {
        let (mut slots, store, files, own) = half_held(1).await;
        let at = slots.slots[1].held.as_ref().unwrap().files[0].range.start;
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
        slots.slots[1].image.map().unwrap().chunks(&[at + 100..at + 101]).unwrap()[0].as_mut().fill(99);
        let (found, _) = fetched(&mut slots, &store, &files).await;
        assert_eq!(found.stored, files[0].bytes + bytes(&files[own..]));
        // Looked at again, that file counts as absent, and the others do not.
        assert!(!slots.verify(1).await);
        assert_eq!(slots.slots[1].held.as_ref().unwrap().files.len(), own - 1);
    }

    /// What the manifest says counts, whatever this node remembers.
    #[tokio::test]
    async fn memory_of_another_length_or_checksum_than_the_manifests_is_not_used() {
        for change in [0, 1] {
            let (mut slots, store, mut files, own) = half_held(1).await;
            let body = vec![3; files[0].bytes as usize + change];
            (files[0].bytes, files[0].crc64) = (body.len() as u64, Some(Crc64::of(&body)));
            store.put(&format!("c/{}", files[0].name), body.into()).await.unwrap();
            let (found, _) = fetched(&mut slots, &store, &files).await;
            assert_eq!(found.stored, files[0].bytes + bytes(&files[own..]));
        }
    }

    /// The old memory is its writers', and what it held is nobody's.
    #[tokio::test]
    async fn new_memory_holds_no_part_of_a_checkpoint() {
        let (mut slots, store, files, _) = half_held(1).await;
        slots.end_generation(false).await.unwrap();
        slots.begin_generation().unwrap();
        let (found, slot) = fetched(&mut slots, &store, &files).await;
        assert_eq!((found.stored, slot), (bytes(&files), RESTORE_SLOT));
    }
}
