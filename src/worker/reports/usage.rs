//! What a rank has and uses: its device's peak speed, and memory. Read at few steps, the same ones on every rank, so
//! that the agent has the figures of all of them for one step.

use tch::Device;

use crate::{
    config::Precision,
    error::Result,
    ids::Step,
    protocol::{DeviceUsage, Usage},
    torch,
};

/// The first step of a worker's life that is measured: by then gradients, moments and work space are there.
const FIRST: u64 = 3;
/// Steps that are multiples of this are measured.
const EVERY: u64 = 100;

/// Reads what this process has and uses.
#[derive(Debug)]
pub(in crate::worker) struct Gauge {
    device: Device,
    peak_flops: Option<f64>,
    begun: Step,
}

impl Gauge {
    /// Of a worker that goes on from `begun` and computes with `precision` on `device`. `tflops`: the device's peak, if
    /// somebody has said it.
    pub fn new(device: Device, precision: Precision, tflops: Option<u32>, begun: Step) -> Result<Self> {
        let known = torch::device_kind(device)?.and_then(|kind| peak_flops(&kind.name, precision));
        let peak_flops = tflops.map(|tflops| f64::from(tflops) * 1e12).or(known);
        Ok(Self { device, peak_flops, begun })
    }

    /// The figures after `step`; `None`: it is not one of those that are measured.
    pub fn read(&self, step: Step) -> Result<Option<Usage>> {
        if !is_measured(step, self.begun) {
            return Ok(None);
        }
        let device = torch::device_memory(self.device)?;
        let device =
            device.map(|torch::DeviceMemory { allocated, reserved, total }| DeviceUsage { allocated, reserved, total });
        let (host_bytes, host_peak_bytes) = host();
        Ok(Some(Usage { peak_flops: self.peak_flops, device, host_bytes, host_peak_bytes }))
    }
}

/// Bytes of this process in the host's memory, now and at most. Figures for people: without them (0), a worker trains
/// as well.
pub(in crate::worker) fn host() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    (field(&status, "VmRSS:"), field(&status, "VmHWM:"))
}

fn is_measured(step: Step, begun: Step) -> bool {
    step.get().is_multiple_of(EVERY) || step.get() == begun.get() + FIRST
}

/// A field of `/proc/self/status` in bytes; 0: it is not there.
fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Peak TFLOP/s of GPUs: dense products in bf16 with sums in fp32, and fp32 without tensor cores (TF32 is off). From
/// NVIDIA's data sheets of the products, the figures "with sparsity" halved; the first part that a name contains
/// decides.
const PEAKS: [(&str, f64, f64); 20] = [
    ("B200", 2250.0, 80.0),
    ("B100", 1750.0, 60.0),
    ("GH200", 989.5, 67.0),
    ("H200 NVL", 835.5, 60.0),
    ("H200", 989.5, 67.0),
    ("H100 PCIe", 756.5, 51.0),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.5, 67.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("A30", 165.0, 10.3),
    ("A40", 149.7, 37.4),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    // Without bf16.
    ("T4", 0.0, 8.1),
    ("V100", 0.0, 15.7),
    ("RTX 4090", 165.2, 82.6),
];

/// The peak of the GPU with this name, FLOP/s; `None`: it is not known.
fn peak_flops(name: &str, precision: Precision) -> Option<f64> {
    let (_, bf16, fp32) = PEAKS.iter().find(|(part, ..)| name.contains(part))?;
    let tflops = match precision {
        Precision::Bf16 => bf16,
        Precision::Fp32 => fp32,
    };
    Some(tflops * 1e12).filter(|peak| *peak > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpus_peak_is_that_of_its_kind() {
        for (name, bf16, fp32) in [
            ("NVIDIA H200", Some(989.5), Some(67.0)),
            ("NVIDIA H100 80GB HBM3", Some(989.5), Some(67.0)),
            ("NVIDIA H100 PCIe", Some(756.5), Some(51.0)),
            ("NVIDIA A100-SXM4-40GB", Some(312.0), Some(19.5)),
            ("NVIDIA A10G", Some(70.0), Some(35.0)),
            ("NVIDIA A10", Some(125.0), Some(31.2)),
            ("NVIDIA L40S", Some(362.0), Some(91.6)),
            ("NVIDIA L4", Some(121.0), Some(30.3)),
            ("Tesla T4", None, Some(8.1)),
            ("NVIDIA Unheard-of", None, None),
        ] {
            let peak = |precision| peak_flops(name, precision).map(|peak| (peak / 1e11).round() / 10.0);
            assert_eq!((peak(Precision::Bf16), peak(Precision::Fp32)), (bf16, fp32), "{name}");
        }
    }

    #[test]
    fn the_same_few_steps_are_measured_on_every_rank_and_what_is_said_wins_over_what_is_known() {
        let gauge = |tflops| Gauge::new(Device::Cpu, Precision::Fp32, tflops, Step(40)).unwrap();
        let measured = |step| gauge(None).read(Step(step)).unwrap();
        assert_eq!((41..=300).filter(|&step| measured(step).is_some()).collect::<Vec<_>>(), [43, 100, 200, 300]);
        let usage = measured(43).unwrap();
        assert_eq!((usage.peak_flops, usage.device), (None, None));
        assert!(usage.host_bytes > 1 << 20 && usage.host_peak_bytes >= usage.host_bytes, "{usage:?}");
        assert_eq!(gauge(Some(2)).read(Step(100)).unwrap().unwrap().peak_flops, Some(2e12));
    }
}
