//! Settings of the whole process: threads, determinism, random numbers, devices.

use std::ptr;

use tch::{Device, Tensor};

use super::{
    Result, TorchError, byte_len,
    bytes::{load_bytes, store_bytes},
    ffi::{self, check},
};
use crate::ids::LocalRank;

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

/// Threads for operations side by side. Call it once per process, before any such operation; later it is an error.
pub fn set_interop_threads(count: u32) -> Result<()> {
    let doing = "set inter-operation threads";
    let count = threads(doing, count)?;
    // SAFETY: takes a number.
    check(doing, unsafe { ffi::trn_set_interop_threads(count) })
}

/// Makes operations give the same bits each time, or fail if no such implementation exists. Not so (`false`): they may
/// be faster, and on a GPU cuDNN computes attention wherever it can.
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

/// Restores the result of [`rng_state`], on a device of the same kind; an error if it is not such a state.
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
/// there are any, otherwise the CPU. An error if there are GPUs, but fewer than workers, unless they are `shared`.
pub fn pick_device(local_rank: LocalRank, shared: bool) -> Result<Device> {
    let devices = device_count()?;
    if devices == 0 {
        return Ok(Device::Cpu);
    }
    let device = Device::Cuda(gpu_of(local_rank, devices, shared)? as usize);
    // SAFETY: takes a number.
    check("use device", unsafe { ffi::trn_use_device(ffi::device_index(device)?) })?;
    Ok(device)
}

/// The number of the GPU of the worker with this rank on its node.
fn gpu_of(local_rank: LocalRank, devices: u32, shared: bool) -> Result<u32> {
    match local_rank.get() {
        local_rank if local_rank < devices => Ok(local_rank),
        local_rank => match local_rank.checked_rem(devices).filter(|_| shared) {
            Some(device) => Ok(device),
            None => Err(TorchError::NoDevice { local_rank, devices }),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use tch::Kind;

    use super::*;

    /// These settings hold for the whole process, so they run in a separate one: the test binary starts itself again
    /// with a variable set, and then runs only this test's body.
    fn in_own_process(name: &str, body: impl FnOnce()) {
        const VARIABLE: &str = "TRAINER_TEST_RUNTIME";
        if std::env::var(VARIABLE).as_deref() == Ok(name) {
            return body();
        }
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("torch::runtime::tests::{name}"), "--nocapture"])
            .env(VARIABLE, name)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn draw() -> Vec<f32> {
        Vec::try_from(Tensor::rand([16], (Kind::Float, Device::Cpu))).unwrap()
    }

    #[test]
    fn random_numbers_continue_from_a_saved_state() {
        in_own_process("random_numbers_continue_from_a_saved_state", || {
            manual_seed(7).unwrap();
            let first = draw();
            let state = rng_state(Device::Cpu).unwrap();
            let next = draw();
            assert_ne!(first, next);
            set_rng_state(Device::Cpu, &state).unwrap();
            assert_eq!(draw(), next);
            manual_seed(7).unwrap();
            assert_eq!(draw(), first);
            for bad in [&[][..], &state[1..], &vec![0xff; state.len()]] {
                assert!(set_rng_state(Device::Cpu, bad).is_err(), "{} bytes", bad.len());
            }
        });
    }

    #[test]
    fn threads_and_determinism_are_set_once_for_the_process() {
        in_own_process("threads_and_determinism_are_set_once_for_the_process", || {
            set_num_threads(2).unwrap();
            assert_eq!(tch::get_num_threads(), 2);
            assert!(set_num_threads(0).is_err() && set_num_threads(u32::MAX).is_err());
            set_interop_threads(1).unwrap();
            let error = set_interop_threads(1).unwrap_err();
            assert!(matches!(error, TorchError::Refused { .. }), "{error}");
            // An operation without a deterministic implementation on the CPU.
            let put = || {
                Tensor::zeros([4], (Kind::Float, Device::Cpu)).f_put(
                    &Tensor::from_slice(&[1_i64, 1]),
                    &Tensor::from_slice(&[1.0_f32, 2.0]),
                    false,
                )
            };
            assert!(put().is_ok());
            set_deterministic(true).unwrap();
            assert!(put().is_err());
            set_deterministic(false).unwrap();
            assert!(put().is_ok());
        });
    }

    #[test]
    fn workers_share_gpus_only_if_they_may() {
        let gpus = |shared| [0, 1, 2, 5].map(|rank| gpu_of(LocalRank(rank), 2, shared).ok());
        assert_eq!(gpus(false), [Some(0), Some(1), None, None]);
        assert_eq!(gpus(true), [Some(0), Some(1), Some(0), Some(1)]);
        assert!(matches!(gpu_of(LocalRank(2), 2, false), Err(TorchError::NoDevice { local_rank: 2, devices: 2 })));
        assert!(gpu_of(LocalRank(0), 0, true).is_err());
    }

    #[test]
    fn a_worker_gets_its_gpu_or_else_the_cpu() {
        let devices = device_count().unwrap();
        let device = pick_device(LocalRank(0), false).unwrap();
        assert_eq!(device, if devices == 0 { Device::Cpu } else { Device::Cuda(0) });
        match pick_device(LocalRank(devices), false) {
            Ok(device) => assert_eq!((devices, device), (0, Device::Cpu)),
            Err(error) => assert!(devices > 0 && matches!(error, TorchError::NoDevice { .. }), "{error}"),
        }
        assert!(matches!(rng_state(Device::Mps), Err(TorchError::Device(_))));
    }
}
