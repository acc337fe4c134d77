//! The device that a worker computes on.

use crate::{
    cloud::{
        gpus::{self, Found},
        hardware,
    },
    config,
    error::Result,
    ids::LocalRank,
    torch,
};

/// The GPUs of this machine, as the machine and LibTorch see them. Loading a driver may take seconds.
pub fn look(wanted: config::Device) -> Result<Found> {
    Ok(Found::look(&hardware::root(), wanted, torch::device_count)?)
}

/// The worker's GPU, or the CPU. The agent has decided between the two; a GPU that has disappeared since must not
/// silently become the CPU.
pub fn pick(wanted: config::Device, local_rank: LocalRank) -> Result<tch::Device> {
    if gpus::cpu_is_meant(wanted) {
        return Ok(tch::Device::Cpu);
    }
    let device = torch::pick_device(local_rank)?;
    if device == tch::Device::Cpu {
        look(wanted)?.choose().settled()?;
    }
    Ok(device)
}
