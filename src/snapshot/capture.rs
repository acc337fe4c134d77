//! The copy of a step's state into a slot, hidden behind the next forward and backward.
//!
//! State changes only in the optimizer step. [`Capture::start`] hands the copies to threads (or, on a GPU, to a side stream) and
//! returns; the loop computes on, reading the same tensors, and calls [`Capture::wait`] right before it changes them. A
//! capture that is dropped unfinished is waited for: no copy outlives the tensors.

use std::time::{Duration, Instant};

use tch::Tensor;

use super::{
    image::{Mapping, SharedImage},
    plan::ImagePlan,
};
use crate::{
    error::{Context, Error, Kind, Result},
    torch::{CopyJob, CopyTicket, HostCopier},
};

/// Copies one rank's share of the state into its slots.
#[derive(Debug)]
pub struct Capture {
    copier: HostCopier,
    slots: [Mapping; 2],
    /// What is copied, in image order: the tensor and its range.
    parts: Vec<(Tensor, std::ops::Range<u64>)>,
    running: Option<CopyTicket>,
}

fn memory(error: std::io::Error) -> Error {
    Error::from_source(Kind::Bug, error)
}

impl Capture {
    /// For the tensors that `plan` gives to this rank, out of `tensors` (the list that the plan was made from). Takes the slots'
    /// memory at once, so that the first capture is as fast as the others.
    pub fn new(plan: &ImagePlan, slots: &[SharedImage; 2], tensors: &[Tensor], copier: HostCopier) -> Result<Self> {
        let mut parts = Vec::new();
        for placement in plan.shards.iter().flat_map(|shard| &shard.tensors) {
            let tensor = tensors
                .get(placement.tensor)
                .ok_or_else(|| Error::new(Kind::Bug, format!("plan names tensor {}", placement.tensor)))?;
            parts.push((tensor.shallow_clone(), placement.offset..placement.offset + placement.len));
        }
        parts.sort_by_key(|(_, range)| range.start);
        let map = |slot: &SharedImage| {
            let mapping = slot.map().map_err(memory)?;
            mapping.prefault().map_err(memory)?;
            copier.register(&mapping)?;
            Ok::<_, Error>(mapping)
        };
        let slots = [map(&slots[0]).context("map slot 0")?, map(&slots[1]).context("map slot 1")?];
        Ok(Self { copier, slots, parts, running: None })
    }

    /// Starts copying the state as it is now into `slot`. `done` is called with the copy time, on a copy thread. The tensors must
    /// not change before [`Capture::wait`] returns.
    pub fn start(&mut self, slot: u8, done: impl FnOnce(Duration) + Send + 'static) -> Result<()> {
        self.wait()?;
        let mapping = self
            .slots
            .get(usize::from(slot))
            .ok_or_else(|| Error::new(Kind::Bug, format!("order for slot {slot}")))?;
        let ranges: Vec<_> = self.parts.iter().map(|(_, range)| range.clone()).collect();
        let chunks = mapping.chunks(&ranges).map_err(memory).context("capture")?;
        let jobs = self.parts.iter().zip(chunks).map(|((tensor, _), chunk)| CopyJob::new(tensor, chunk)).collect::<Result<_, _>>()?;
        self.running = Some(self.copier.start(jobs, done)?);
        Ok(())
    }

    /// Waits until the running capture, if there is one, has read its last tensor; returns how long that took.
    pub fn wait(&mut self) -> Result<Option<Duration>> {
        let Some(ticket) = self.running.take() else { return Ok(None) };
        let begin = Instant::now();
        ticket.wait()?;
        Ok(Some(begin.elapsed()))
    }
}
