//! What holds for the whole process: threads, determinism, random numbers, devices.

use std::ptr;

use tch::{Device, Tensor};

use super::{
    Result, TorchError, byte_len,
    bytes::{load_bytes, store_bytes},
    ffi::{self, check},
};
use crate::ids::Rank;

fn threads(doing: &'static str, count: u32) -> Result<i32> {
    i32::try_from(count)
        .ok()
        .filter(|&count| count > 0)
        .ok_or(TorchError::Number { doing, what: "the number of threads" })
}

/// Threads of one operation on the CPU. Part of the mathematics: sums are split over threads.
pub fn set_num_threads(count: u32) -> Result<()> {
    let doing = "set compute threads";
    let count = threads(doing, count)?;
    // SAFETY: takes a number.
    check(doing, unsafe { ffi::trn_set_num_threads(count) })
}

/// Threads for operations side by side. Once a process, before any such operation; an error afterwards.
pub fn set_interop_threads(count: u32) -> Result<()> {
    let doing = "set inter-operation threads";
    let count = threads(doing, count)?;
    // SAFETY: takes a number.
    check(doing, unsafe { ffi::trn_set_interop_threads(count) })
}

/// Makes operations give the same bits each time, or fail where no such implementation exists. Call it at the start of
/// the process: cuBLAS looks once.
pub fn set_deterministic(on: bool) -> Result<()> {
    // SAFETY: takes a flag.
    check("set determinism", unsafe { ffi::trn_set_deterministic(on.into()) })
}

/// Seeds the random number generators of every device.
pub fn manual_seed(seed: u64) -> Result<()> {
    // SAFETY: takes a number.
    check("seed random numbers", unsafe { ffi::trn_manual_seed(seed) })
}

/// The state of the device's random number generator; opaque, a few kilobytes.
pub fn rng_state(device: Device) -> Result<Vec<u8>> {
    let doing = "get random number state";
    let mut state = ptr::null_mut();
    // SAFETY: the pointer is valid for the call.
    check(doing, unsafe { ffi::trn_rng_state(ffi::device_index(device)?, &mut state) })?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    let state = unsafe { ffi::adopt(state) };
    let mut bytes = vec![0; byte_len(&state)?];
    store_bytes(&state, &mut bytes)?;
    Ok(bytes)
}

/// Puts back what [`rng_state`] gave, on a device of the same kind; an error if it is not such a state.
pub fn set_rng_state(device: Device, state: &[u8]) -> Result<()> {
    let doing = "set random number state";
    let len = i64::try_from(state.len()).map_err(|_| TorchError::Number { doing, what: "the state's length" })?;
    let tensor = Tensor::f_empty([len], (tch::Kind::Uint8, Device::Cpu))
        .map_err(|error| TorchError::Refused { doing, message: error.to_string() })?;
    load_bytes(&tensor, state)?;
    // SAFETY: the tensor is alive for the call; LibTorch checks the state's length and content.
    check(doing, unsafe { ffi::trn_set_rng_state(ffi::device_index(device)?, ffi::raw(&tensor)) })
}

/// CUDA devices of this machine; 0 without CUDA, without a driver, without a device.
pub fn device_count() -> Result<u32> {
    let mut count = 0;
    // SAFETY: the pointer is valid for the call.
    check("count devices", unsafe { ffi::trn_device_count(&mut count) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// The device on which the worker with this rank on its node computes, made current for the calling thread: its GPU if
/// there are any, otherwise the CPU. An error if there are GPUs, but fewer than workers.
pub fn pick_device(local_rank: Rank) -> Result<Device> {
    let devices = device_count()?;
    if devices == 0 {
        return Ok(Device::Cpu);
    }
    let local_rank = local_rank.get();
    if local_rank >= devices {
        return Err(TorchError::NoDevice { local_rank, devices });
    }
    let device = Device::Cuda(local_rank as usize);
    // SAFETY: takes a number.
    check("use device", unsafe { ffi::trn_use_device(ffi::device_index(device)?) })?;
    Ok(device)
}
