//! What a worker says when its memory has run out: the most that its tensors had, and the micro-batch that would fit by
//! the formula of [`memory`](crate::train::memory).
//!
//! The agent starts the group again, whose processes have all of the memory anew, and gives it up when it runs out a
//! second time. Its advice is what is said here ([`shortage::fitting`]).

use std::path::Path;

use super::reports::usage;
use crate::{
    cloud::hardware,
    config::TrainTask,
    ids::WorldSize,
    model::memory::Plan,
    report::human,
    shortage,
    torch::{self, DeviceMemory},
    train::{
        Place,
        memory::{PROCESS, Setting, fits},
    },
};

/// What is known of a worker's memory.
#[derive(Debug)]
pub(super) struct Fitting {
    task: TrainTask,
    place: Place,
}

/// Bytes that a worker has had, and could have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Had {
    peak: u64,
    /// Of its GPU, or of the host as far as others leave it; `None`: it is not known.
    total: Option<u64>,
    on_gpu: bool,
}

impl Fitting {
    /// Of a worker with this task, at its place.
    pub fn new(task: TrainTask, place: Place) -> Self {
        Self { task, place }
    }

    /// Words for an error.
    pub fn words(&self) -> String {
        let had = match torch::device_memory(self.place.device) {
            Ok(Some(DeviceMemory { allocated, total, .. })) => {
                Had { peak: allocated, total: Some(total), on_gpu: true }
            }
            _ => {
                let (now, peak) = usage::host();
                let free = hardware::available_memory(Path::new("/"));
                Had { peak, total: free.map(|free| free.saturating_add(now)), on_gpu: false }
            }
        };
        said(had, had.total.and_then(|total| largest(&self.task, self.place.world, total, had.on_gpu)))
    }
}

/// The sequences of a pass, and the most that would fit into `total` bytes. `None`: a program's own task, or the world
/// is no world of its.
fn largest(task: &TrainTask, world: WorldSize, total: u64, on_gpu: bool) -> Option<(u32, u32)> {
    let plan = Plan::of(&task.model).ok()?;
    let setting = Setting::of(task, &plan, world, on_gpu).ok()?;
    let process = if on_gpu { PROCESS.gpu } else { PROCESS.host };
    let sequences = setting.extents.sequences;
    Some((sequences, fits(&setting, sequences, total.saturating_sub(process)).largest))
}

fn said(Had { peak, total, on_gpu }: Had, fitting: Option<(u32, u32)>) -> String {
    let (who, of) = if on_gpu { ("its tensors", "its GPU has") } else { ("it", "there are") };
    let had = match total {
        Some(total) => format!("{who} had up to {}, {of} {}", human::bytes(peak), human::bytes(total)),
        None => format!("{who} had up to {}", human::bytes(peak)),
    };
    match fitting {
        Some((sequences, largest)) if (1..sequences).contains(&largest) => {
            format!("{had}; {}", shortage::would_fit(largest))
        }
        _ => had,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Precision;

    #[test]
    fn who_runs_out_of_memory_says_what_it_had_and_what_would_fit() {
        let had = Had { peak: 21 << 30, total: Some(22 << 30), on_gpu: true };
        let words = said(had, Some((8, 3)));
        assert_eq!(words, "its tensors had up to 21.0 GiB, its GPU has 22.0 GiB; micro-batch 3 would fit");
        assert_eq!(shortage::fitting(&words), Some(3));
        // By the formula nothing fits, or all does: others may have the memory.
        for fitting in [None, Some((8, 8)), Some((8, 0)), Some((1, 0))] {
            assert_eq!(shortage::fitting(&said(had, fitting)), None, "{fitting:?}");
        }
        assert_eq!(said(Had { total: None, on_gpu: false, ..had }, None), "it had up to 21.0 GiB");
    }

    #[test]
    fn the_formula_names_the_micro_batch() {
        let mut task = crate::checkpoint::testing::config().workload;
        task.model.config = serde_json::from_str(include_str!("../../configs/models/llama-1b.json")).unwrap();
        (task.train.precision, task.data.sequence_length) = (Precision::Bf16, 2048);
        let of = |gib: u64| largest(&task, WorldSize(1), gib << 30, true);
        // Between a GPU that all fit into and one that takes none lie those that take some.
        let fitting: Vec<u32> = (8..=80).map(|gib| of(gib).unwrap().1).collect();
        assert!(fitting.is_sorted() && fitting.iter().any(|fitting| (1..8).contains(fitting)), "{fitting:?}");
        assert_eq!(of(1000), Some((8, 8)));
        assert_eq!(of(8), Some((8, 0)), "not even its state fits");
        assert_eq!(largest(&task, WorldSize(64), 1 << 40, true), None, "more ranks than sequences");
    }
}
