//! The copy of a step's state into a slot, hidden behind the next forward and backward.
//!
//! State changes only in the optimizer step. [`Capture::start`] hands the copies to threads (or, on a GPU, to a side
//! stream) and returns; the loop continues to compute, reading the same tensors, and calls [`Capture::wait`] right
//! before it changes them. Dropping an unfinished capture waits for it: no copy outlives the tensors.

use std::time::{Duration, Instant};

use tch::Tensor;

use super::{
    image::{ImageChunk, SharedImage},
    plan::ImagePlan,
};
use crate::{
    error::{Context, Error, Kind, Result},
    torch::{CopyJob, CopyTicket, HostCopier, Pinned, TorchError},
};

/// Copies one rank's share of the state into its slots.
#[derive(Debug)]
pub struct Capture {
    copier: HostCopier,
    /// A slot is absent while a capture into it runs.
    slots: [Option<Pinned<ImageChunk>>; 2],
    /// The parts to copy: the tensor, its first byte in the image, its bytes.
    parts: Vec<(Tensor, u64, u64)>,
    running: Option<(u8, CopyTicket<Pinned<ImageChunk>>)>,
}

impl Capture {
    /// For the tensors that `plan` gives to this rank, out of `tensors` (the list that the plan was made from). Takes
    /// the slots' memory at once (and pins it for a GPU), so that the first capture is as fast as the others. This
    /// rank's image begins at byte `base` of the slots.
    pub fn new(
        plan: &ImagePlan,
        base: u64,
        slots: &[SharedImage; 2],
        tensors: &[Tensor],
        copier: HostCopier,
    ) -> Result<Self> {
        let mut parts = Vec::new();
        for placement in plan.shards.iter().flat_map(|shard| &shard.tensors) {
            let tensor = tensors
                .get(placement.tensor)
                .ok_or_else(|| Error::new(Kind::Bug, format!("plan names tensor {}", placement.tensor)))?;
            parts.push((tensor.shallow_clone(), placement.offset, placement.len));
        }
        let slots = [
            open(&slots[0], base, plan.len).context("map slot 0")?,
            open(&slots[1], base, plan.len).context("map slot 1")?,
        ];
        Ok(Self { copier, slots: slots.map(Some), parts, running: None })
    }

    /// Starts copying the state as it is now into `slot`. `done` is called with the copy time, on a copy thread. The
    /// tensors must not change before [`Capture::wait`] returns.
    pub fn start(&mut self, slot: u8, done: impl FnOnce(Duration) + Send + 'static) -> Result<()> {
        self.wait()?;
        let destination = self
            .slots
            .get_mut(usize::from(slot))
            .and_then(Option::take)
            .ok_or_else(|| Error::new(Kind::Bug, format!("order for slot {slot}, which is not there")))?;
        let jobs = self.parts.iter().map(|(tensor, offset, len)| CopyJob {
            tensor: tensor.shallow_clone(),
            offset: *offset,
            len: *len,
        });
        let ticket = self.copier.start(destination, jobs.collect(), done)?;
        self.running = Some((slot, ticket));
        Ok(())
    }

    /// Waits until the running capture, if there is one, has read its last tensor; returns how long that took.
    pub fn wait(&mut self) -> Result<Option<Duration>, TorchError> {
        let Some((slot, ticket)) = self.running.take() else { return Ok(None) };
        let begin = Instant::now();
        self.slots[usize::from(slot)] = Some(ticket.wait()?.destination);
        Ok(Some(begin.elapsed()))
    }
}

fn open(slot: &SharedImage, base: u64, len: u64) -> Result<Pinned<ImageChunk>> {
    let memory = |error: std::io::Error| Error::from_source(Kind::Bug, error);
    let mapping = slot.map().map_err(memory)?;
    let end = base.checked_add(len).ok_or_else(|| Error::new(Kind::Bug, "an image beyond the end of memory"))?;
    mapping.prefault(base..end).map_err(memory)?;
    let whole = mapping.chunks(&[std::ops::Range { start: base, end }]).map_err(memory)?.pop();
    Ok(Pinned::new(whole.ok_or_else(|| Error::new(Kind::Bug, "empty image"))?))
}
