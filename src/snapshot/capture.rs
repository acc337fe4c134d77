//! The copy of a step's state into a slot, hidden behind the next forward and backward.
//!
//! State changes only in the optimizer step. [`Capture::start`] hands the copies to threads (or, on a GPU, to a side
//! stream) and returns; the loop continues to compute, reading the same tensors, and calls [`Capture::release`] right
//! before it changes them. On a CPU that waits for the copies. On a GPU the compute stream waits for them, between two
//! events that tell how long, and the host runs ahead; [`Capture::wait`] takes the slot back later. Dropping an
//! unfinished capture waits for it: no copy outlives the tensors.
//!
//! A rank writes the ranges that the plan gives it ([`super::plan`]): in its own image and, where it has parts of
//! weights, in those of other ranks of its node. It borrows exactly these ranges of each slot, so no byte is lent to
//! two ranks, and pins the pages in which they lie. A page in which two ranks write is pinned by both, which the driver
//! allows: it counts each process's pins by itself. So a GPU copies at full speed into any image, and no second copy
//! through a pinned buffer is needed.
//!
//! *Crash* in the middle of a copy: the files that this rank writes into are neither old nor new. It has not said
//! `Captured`, so none of them is uploaded, and none has the checksum of a checkpoint. *Retry:* none; see [`super`].

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use tch::Tensor;

use super::{
    image::{ImageChunk, Pages, SharedImage, page_size},
    plan::SlotCopy,
};
use crate::{
    error::{Context, Error, Kind, Result},
    threads::give_way,
    torch::{Clock, CopyJob, CopyTicket, HostCopier, Pinned, TorchError},
};

/// The most threads that take the memory of one slot: they share the kernel's lock of the file.
const FAULTERS: usize = 8;

/// One slot, as far as this rank writes into it.
#[derive(Debug)]
struct Slot {
    /// Absent while a capture into it runs.
    ranges: Option<Vec<ImageChunk>>,
    _pinned: Vec<Pinned<Pages>>,
}

/// Copies one rank's share of the state into its node's slots.
#[derive(Debug)]
pub struct Capture {
    copier: HostCopier,
    /// Threads that compete with those that train; made when they are first wanted.
    brisk: Option<HostCopier>,
    slots: Vec<Slot>,
    parts: Vec<Source>,
    running: Option<Running>,
    /// Two marks around what the compute stream waits for; made when it first does.
    clock: Option<Clock>,
    /// Slots whose memory is not taken yet, and the pages in which this rank writes.
    cold: (Vec<SharedImage>, Vec<Range<u64>>),
}

/// A capture under way.
#[derive(Debug)]
struct Running {
    slot: u8,
    ticket: CopyTicket<ImageChunk>,
    /// Whether the compute stream waits for it.
    held: bool,
}

/// A tensor to copy.
#[derive(Debug)]
struct Source {
    tensor: Tensor,
    /// The range that it goes into, as an index, and its first byte there.
    range: usize,
    offset: u64,
    len: u64,
}

impl Capture {
    /// For what `copies` give to this rank, out of `tensors` (the list that the plan was made from). For a GPU the
    /// memory of its ranges is taken and pinned; on a CPU [`Capture::takes_memory`] does that later.
    pub fn new(copies: &[SlotCopy], slots: &[SharedImage], tensors: &[Tensor], copier: HostCopier) -> Result<Self> {
        // A tensor without elements is in its file's header alone.
        let mut copies: Vec<&SlotCopy> = copies.iter().filter(|copy| copy.len > 0).collect();
        copies.sort_unstable_by_key(|copy| copy.offset);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut parts = Vec::with_capacity(copies.len());
        for &&SlotCopy { tensor, offset, len } in &copies {
            let end = offset.checked_add(len).ok_or_else(|| Error::new(Kind::Bug, "a tensor beyond 64 bits"))?;
            match ranges.last_mut() {
                Some(last) if last.end == offset => last.end = end,
                _ => ranges.push(offset..end),
            }
            let tensor = tensors
                .get(tensor)
                .ok_or_else(|| Error::new(Kind::Bug, format!("plan names tensor {tensor}")))?
                .shallow_clone();
            let range = ranges.len() - 1;
            parts.push(Source { tensor, range, offset: offset - ranges[range].start, len });
        }
        let pages = pages_of(&ranges, page_size());
        let memory = |error: std::io::Error| Error::from_source(Kind::Bug, error);
        let at_once = !copier.is_yielding();
        let cold = if at_once {
            Vec::new()
        } else {
            slots.iter().map(SharedImage::try_clone).collect::<std::io::Result<_>>().map_err(memory)?
        };
        let open = |(slot, number)| open(slot, &ranges, &pages, at_once).context(format!("map slot {number}"));
        let slots = slots.iter().zip(0..).map(open).collect::<Result<_>>()?;
        Ok(Self { copier, brisk: None, slots, parts, running: None, clock: None, cold: (cold, pages) })
    }

    /// Takes the memory of its ranges, if that was left for later, so that the first captures are as fast as the
    /// others: beside the caller, on a thread that yields to all others. While a state is loaded there are better uses
    /// for the cores, and for the memory. A capture that comes before takes what it writes to.
    pub fn takes_memory(&mut self) {
        let (images, pages) = std::mem::take(&mut self.cold);
        if images.is_empty() {
            return;
        }
        let take = move || {
            give_way();
            let mut taken =
                images.iter().flat_map(|image| pages.iter().map(move |pages| image.allocate(pages.clone())));
            if let Some(error) = taken.find_map(std::io::Result::err) {
                tracing::warn!(%error, "the memory of a slot was not taken before its first snapshot");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("slot-memory".into()).spawn(take) {
            tracing::debug!(%error, "no thread takes the memory of the slots");
        }
    }

    /// Starts copying the state as it is now into `slot`. `done` is called with the copy time, on a copy thread. The
    /// tensors must not change before [`Capture::release`] or [`Capture::wait`] has returned. `hasty`: the threads that
    /// copy on a CPU do not yield to others.
    pub fn start(&mut self, slot: u8, hasty: bool, done: impl FnOnce(Duration) + Send + 'static) -> Result<()> {
        self.wait()?;
        let destination = self
            .slots
            .get_mut(usize::from(slot))
            .and_then(|slot| slot.ranges.take())
            .ok_or_else(|| Error::new(Kind::Bug, format!("order for slot {slot}, which is not there")))?;
        let jobs = self.parts.iter().map(|part| CopyJob {
            tensor: part.tensor.shallow_clone(),
            piece: part.range,
            offset: part.offset,
            len: part.len,
        });
        if hasty && self.copier.is_yielding() && self.brisk.is_none() {
            self.brisk = Some(HostCopier::new(1, false)?);
        }
        let copier = self.brisk.as_ref().filter(|_| hasty).unwrap_or(&self.copier);
        let ticket = copier.start(destination, jobs.collect(), done)?;
        self.running = Some(Running { slot, ticket, held: false });
        Ok(())
    }

    /// From here on, what is launched may change the tensors. Whether the compute stream waits for the running capture:
    /// [`Capture::wait`] then says how long it did, once the device has passed this point. Otherwise the capture, if
    /// there is one, must be waited for now.
    pub fn release(&mut self) -> Result<bool, TorchError> {
        let Some(running) = &mut self.running else { return Ok(false) };
        if running.held || !running.ticket.can_be_held() {
            return Ok(running.held);
        }
        let Some(device) = self.parts.first().map(|part| part.tensor.device()) else { return Ok(false) };
        let clock = match &mut self.clock {
            Some(clock) => clock,
            none => none.insert(Clock::new(device, 2)?),
        };
        clock.mark(0)?;
        running.held = running.ticket.hold()?;
        clock.mark(1)?;
        Ok(running.held)
    }

    /// Waits until the running capture, if there is one, has read its last tensor. Returns how long that has held up
    /// the computation: the host, or the compute stream, if that has waited in its place.
    pub fn wait(&mut self) -> Result<Option<Duration>, TorchError> {
        let Some(Running { slot, ticket, held }) = self.running.take() else { return Ok(None) };
        let begin = Instant::now();
        self.slots[usize::from(slot)].ranges = Some(ticket.wait()?.destination);
        match &self.clock {
            Some(clock) if held => Ok(Some(Duration::from_secs_f64(clock.seconds(0, 1)?.max(0.0)))),
            _ => Ok(Some(begin.elapsed())),
        }
    }
}

/// The pages in which `ranges` lie, which are in ascending order: no page is in two of them.
fn pages_of(ranges: &[Range<u64>], page: u64) -> Vec<Range<u64>> {
    let mut pages: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let start = range.start / page * page;
        let end = range.end.div_ceil(page).saturating_mul(page);
        match pages.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ => pages.push(start..end),
        }
    }
    pages
}

/// `at_once`: its memory is taken now.
fn open(slot: &SharedImage, ranges: &[Range<u64>], pages: &[Range<u64>], at_once: bool) -> Result<Slot> {
    let memory = |error: std::io::Error| Error::from_source(Kind::Bug, error);
    let mapping = slot.map().map_err(memory)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(FAULTERS);
    let pin = |pages: &Range<u64>| -> Result<Pinned<Pages>> {
        if at_once {
            mapping.prefault(pages.clone(), threads).map_err(memory)?;
        }
        Ok(Pinned::new(mapping.pages(pages.clone()).map_err(memory)?))
    };
    let pinned = pages.iter().map(pin).collect::<Result<_>>()?;
    Ok(Slot { ranges: Some(mapping.chunks(ranges).map_err(memory)?), _pinned: pinned })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{NodeRanks, Rank, WorldSize},
        snapshot::plan::{CopyPlan, Dtype, ImagePlan, Part, ShardKind, TensorSpec, plan},
    };

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is tested")]
    fn pages_are_those_of_the_ranges_and_none_twice() {
        let of = |ranges: &[Range<u64>]| pages_of(ranges, 4096);
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[5..6]), [0..4096]);
        assert_eq!(of(&[4096..8192]), [4096..8192]);
        // Ranges of one page, of pages side by side, and far apart.
        assert_eq!(of(&[100..200, 300..5000, 8192..8193, 20_000..20_001]), [0..12_288, 16_384..20_480]);
    }

    /// A weight of 5000 elements in three parts, another whole, and slices of a moment.
    fn specs() -> Vec<TensorSpec> {
        let spec = |name: &str, n, kind, part: Option<(u32, u64, u64)>| TensorSpec {
            name: name.into(),
            dtype: Dtype::F32,
            shape: vec![n],
            kind,
            part: part.map(|(owner, begin, end)| Part { owner: Rank(owner), begin, end }),
        };
        let mut specs = Vec::new();
        for (owner, begin, end) in [(0, 0, 1667), (1, 1667, 3334), (2, 3334, 5000)] {
            specs.push(spec("w", 5000, ShardKind::Model, Some((owner, begin, end))));
            specs.push(spec("exp_avg.w", 5000, ShardKind::Optimizer, Some((owner, begin, end))));
        }
        specs.push(spec("v", 300, ShardKind::Model, None));
        specs.push(spec("none", 0, ShardKind::Model, None));
        specs
    }

    /// What a rank of the node has: elements that say their place and the step; undefined where another has them.
    fn tensors(specs: &[TensorSpec], rank: Rank, step: f64) -> Vec<Tensor> {
        let tensor = |spec: &TensorSpec| match spec.part {
            Some(part) if part.owner != rank => Tensor::new(),
            _ => {
                let begin = spec.part.map_or(0, |part| part.begin) as i64;
                let end = begin + spec.bytes() as i64 / 4;
                Tensor::arange_start(begin, end, (tch::Kind::Float, tch::Device::Cpu)) + 10_000.0 * step
            }
        };
        specs.iter().map(tensor).collect()
    }

    /// Every rank's plan with its place in a slot, as an agent of all three lays them out.
    fn slot_copies(plans: &[ImagePlan]) -> (Vec<Vec<SlotCopy>>, Vec<u64>, u64) {
        let mut bases = vec![0];
        for plan in plans {
            bases.push(bases[bases.len() - 1] + plan.len);
        }
        let total = bases.pop().unwrap();
        let placed = |copy: &CopyPlan| copy.within(bases[copy.image.get() as usize]).unwrap();
        (plans.iter().map(|plan| plan.copies.iter().map(placed).collect()).collect(), bases, total)
    }

    fn values(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    #[test]
    fn ranks_fill_one_file_together_and_touch_nothing_else() {
        let specs = specs();
        let plans = plan(&specs, WorldSize(3), page_size()).unwrap();
        super::super::plan::within(&plans, &specs, NodeRanks::alone(3)).unwrap();
        let (copies, bases, total) = slot_copies(&plans);
        let slots = [SharedImage::create("first").unwrap(), SharedImage::create("second").unwrap()];
        for slot in &slots {
            slot.grow(total).unwrap();
        }
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
        slots[1].map().unwrap().chunks(&[0..total]).unwrap()[0].as_mut().fill(0xee);
        // Each rank has loans of its own, as in a process of its own.
        let inherited = || slots.each_ref().map(|slot| SharedImage::inherited(slot.try_clone().unwrap().into()));
        let mut ranks: Vec<Capture> = (0..3)
            .map(|rank| {
                let tensors = tensors(&specs, Rank(rank), 3.0);
                let copier = HostCopier::new(1, true).unwrap();
                Capture::new(&copies[rank as usize], &inherited(), &tensors, copier).unwrap()
            })
            .collect();
        for rank in &mut ranks {
            rank.start(1, false, |_| ()).unwrap();
        }
        for rank in &mut ranks {
            assert!(rank.wait().unwrap().is_some());
        }
        let image = slots[1].map().unwrap().bytes(0..total).unwrap();
        let mut data = vec![false; total as usize];
        for (plan, base) in plans.iter().zip(&bases) {
            for place in plan.shards.iter().flat_map(|shard| &shard.tensors) {
                let range = (base + place.offset) as usize..(base + place.offset + place.len) as usize;
                data[range.clone()].fill(true);
                let begin = specs[place.tensor].part.map_or(0, |part| part.begin);
                let expected = (begin..).take(place.len as usize / 4).map(|at| at as f32 + 30_000.0);
                assert!(values(&image[range]).into_iter().eq(expected), "{}", specs[place.tensor].name);
            }
        }
        assert!(image.iter().zip(data).all(|(byte, data)| data || *byte == 0xee), "a byte that is no tensor's");
        let other = slots[0].map().unwrap().bytes(0..total).unwrap();
        assert!(other.iter().all(|byte| *byte == 0), "the other slot");
    }

    /// As on a GPU: the state is released before the slot has come back, and changed at once.
    #[test]
    fn a_released_state_may_change_and_the_slot_has_what_it_was() {
        let slots = [SharedImage::create("first").unwrap(), SharedImage::create("second").unwrap()];
        let tensors = [Tensor::zeros([4096], (tch::Kind::Float, tch::Device::Cpu))];
        slots.iter().for_each(|slot| slot.grow(4 * 4096).unwrap());
        let copies = [SlotCopy { tensor: 0, offset: 0, len: 4 * 4096 }];
        let of = |copier: HostCopier| {
            let inherited = slots.each_ref().map(|slot| SharedImage::inherited(slot.try_clone().unwrap().into()));
            Capture::new(&copies, &inherited, &tensors, copier).unwrap()
        };
        let mut capture = of(HostCopier::as_on_a_gpu(1).unwrap());
        assert!(!capture.release().unwrap(), "nothing is captured");
        for step in 1..=20_u8 {
            let _ = tensors[0].shallow_clone().fill_(f64::from(step));
            let slot = step % 2;
            capture.start(slot, false, |_| ()).unwrap();
            assert!(capture.release().unwrap() && capture.release().unwrap());
            let _ = tensors[0].shallow_clone().fill_(-1.0);
            let held = capture.wait().unwrap().unwrap();
            assert!(held < Duration::from_secs(60), "{held:?}");
            assert_eq!(capture.wait().unwrap(), None, "it is told once");
            let image = slots[usize::from(slot)].map().unwrap().bytes(0..4 * 4096).unwrap();
            assert!(values(&image).into_iter().all(|value| value == f32::from(step)), "step {step}");
        }
        // On a CPU itself the host waits.
        let mut capture = of(HostCopier::new(1, true).unwrap());
        capture.start(0, false, |_| ()).unwrap();
        assert!(!capture.release().unwrap());
        assert!(capture.wait().unwrap().is_some());
    }

    #[test]
    fn memory_is_taken_at_once_for_a_gpu_and_later_on_a_cpu() {
        let len = 4 << 20;
        let tensors = [Tensor::ones([len / 4], (tch::Kind::Float, tch::Device::Cpu))];
        let copies = [SlotCopy { tensor: 0, offset: 4096, len: len as u64 }];
        for yields in [false, true] {
            let slots = ["first", "second"].map(|name| SharedImage::create(name).unwrap());
            slots.iter().for_each(|slot| slot.grow(len as u64 + 8192).unwrap());
            // Loans of its own, as in a process of its own.
            let inherited = slots.each_ref().map(|slot| SharedImage::inherited(slot.try_clone().unwrap().into()));
            let mut capture = Capture::new(&copies, &inherited, &tensors, HostCopier::new(1, yields).unwrap()).unwrap();
            let is_taken = || slots.iter().all(|slot| rustix::fs::fstat(slot).unwrap().st_blocks * 512 >= len);
            assert_eq!(is_taken(), !yields);
            for _ in 0..2 {
                capture.takes_memory();
            }
            while !is_taken() {
                std::thread::yield_now();
            }
            capture.start(1, false, |_| ()).unwrap();
            capture.wait().unwrap();
            let bytes = slots[1].map().unwrap().bytes(4096..4096 + len as u64).unwrap();
            assert!(bytes.chunks(4).all(|bytes| bytes == 1_f32.to_le_bytes()));
        }
    }

    #[test]
    fn copies_that_overlap_or_leave_the_slot_are_refused() {
        let slot = SharedImage::create("slot").unwrap();
        slot.grow(4096).unwrap();
        let tensors = [Tensor::zeros([8], (tch::Kind::Float, tch::Device::Cpu))];
        let copy = |tensor, offset| SlotCopy { tensor, offset, len: 32 };
        let of = |copies: &[SlotCopy]| {
            let slots = [SharedImage::inherited(slot.try_clone().unwrap().into())];
            Capture::new(copies, &slots, &tensors, HostCopier::new(1, true).unwrap()).map(|_| ())
        };
        assert!(of(&[copy(0, 32), copy(0, 0)]).is_ok());
        for copies in [&[copy(0, 0), copy(0, 31)][..], &[copy(0, 4080)], &[copy(1, 0)], &[copy(0, u64::MAX - 8)]] {
            assert!(of(copies).is_err(), "{copies:?}");
        }
        let mut capture = Capture::new(&[], &[slot], &tensors, HostCopier::new(1, true).unwrap()).unwrap();
        assert!(capture.start(1, false, |_| ()).is_err(), "there is one slot");
        capture.start(0, false, |_| ()).unwrap();
        assert!(capture.wait().unwrap().is_some(), "a rank that has nothing to copy has captured, too");
    }
}
