//! The device that a worker computes on.

use crate::{
    cloud::{
        gpus::{self, Found},
        hardware,
    },
    config::{self, ParallelConfig, Precision},
    error::{Error, Kind, Result},
    ids::LocalRank,
    torch::{self, DeviceKind},
};

/// The GPUs of this machine, as the machine and LibTorch see them. Loading a driver may take seconds.
pub fn look(wanted: config::Device) -> Result<Found> {
    Ok(Found::look(&hardware::root(), wanted, torch::device_count)?)
}

/// The worker's GPU, or the CPU. The agent has decided between the two; a GPU that has disappeared since must not
/// silently become the CPU.
pub fn pick(parallel: &ParallelConfig, precision: Precision, local_rank: LocalRank) -> Result<tch::Device> {
    let wanted = parallel.device;
    if gpus::cpu_is_meant(wanted) {
        return Ok(tch::Device::Cpu);
    }
    let device = torch::pick_device(local_rank, parallel.share_device)?;
    match torch::device_kind(device)? {
        None => drop(look(wanted)?.choose().settled()?),
        Some(kind) => can_compute(&kind, precision)?,
    }
    Ok(device)
}

/// The compute capability from which on GPUs multiply bf16. Others would do it without their tensor cores, and with
/// attention's whole matrix in memory.
const BF16: u32 = 80;

/// Refuses a GPU that can't compute at a run's precision.
fn can_compute(kind: &DeviceKind, precision: Precision) -> Result<()> {
    let DeviceKind { name, capability } = kind;
    if precision != Precision::Bf16 || *capability >= BF16 {
        return Ok(());
    }
    let what = format!("{name} (sm_{capability}) does not compute in bf16: it takes sm_{BF16} or newer");
    Err(Error::new(Kind::Config, what).with_hint("use an A10G, L4, A100 or newer; or --set train.precision=fp32"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_has_no_bf16_is_refused_by_name_for_bf16_alone() {
        let kind = |name: &str, capability| DeviceKind { name: name.into(), capability };
        let error = can_compute(&kind("Tesla T4", 75), Precision::Bf16).unwrap_err();
        assert!(error.to_string().starts_with("Tesla T4 (sm_75) does not compute in bf16"), "{error}");
        assert_eq!((error.kind(), error.hint().is_some()), (Kind::Config, true));
        assert!(can_compute(&kind("Tesla T4", 75), Precision::Fp32).is_ok());
        assert!(can_compute(&kind("NVIDIA L4", 89), Precision::Bf16).is_ok());
        assert!(can_compute(&kind("NVIDIA A100-SXM4-40GB", 80), Precision::Bf16).is_ok());
    }
}
