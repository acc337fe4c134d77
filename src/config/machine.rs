//! The facts about the machine that the configuration needs to resolve "auto".

use super::{Device, ParallelConfig};
use crate::env;

/// Processors and GPUs of this machine, as far as this process may use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// CPU cores, at least 1; affinity and cgroup limits are counted.
    pub cores: u32,
    /// GPUs; 0 in a build without CUDA, and if `TRAINER_GPU` is `none`.
    pub gpus: u32,
}

impl Machine {
    /// Inspects this machine. Calls no driver: device files are counted, `CUDA_VISIBLE_DEVICES` is obeyed.
    pub fn detect() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        let none = env::given("TRAINER_GPU").is_some_and(|gpu| gpu.trim() == "none");
        let gpus = if cfg!(torch_cuda) && !none {
            let visible = env::given("CUDA_VISIBLE_DEVICES");
            let names = std::fs::read_dir("/dev").into_iter().flatten().filter_map(Result::ok).map(|e| e.file_name());
            count_gpus(names.filter_map(|name| name.into_string().ok()), visible.as_deref())
        } else {
            0
        };
        Self { cores, gpus }
    }
}

/// Device files `nvidia0`, `nvidia1`, …, or as many of them as the variable names: CUDA ignores all entries after a
/// wrong one.
fn count_gpus(device_files: impl Iterator<Item = String>, visible: Option<&str>) -> u32 {
    let present = device_files
        .filter_map(|name| name.strip_prefix("nvidia").map(str::to_owned))
        .filter(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
        .count();
    let count = match visible {
        Some(list) => {
            list.split(',').take_while(|entry| !matches!(entry.trim(), "" | "-1" | "NoDevFiles")).count().min(present)
        }
        None => present,
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Workers that this node starts: the flag, else the configuration, else one per GPU, or one if there is none.
pub fn workers_per_node(parallel: &ParallelConfig, flag: Option<u32>, machine: &Machine) -> u32 {
    let gpus = if parallel.device == Device::Cpu { 0 } else { machine.gpus };
    flag.or(parallel.nproc_per_node).unwrap_or(gpus).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Strategy;

    #[test]
    fn gpus_are_counted_by_device_file_and_variable() {
        let files =
            || ["null", "nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"].map(String::from).into_iter();
        for (visible, count) in [
            (None, 3),
            (Some("0"), 1),
            (Some("1, 0"), 2),
            (Some(""), 0),
            (Some("-1"), 0),
            (Some("0,-1,1"), 1),
            (Some("0,1,2,3,4,5"), 3),
        ] {
            assert_eq!(count_gpus(files(), visible), count, "{visible:?}");
        }
    }

    #[test]
    fn the_flag_wins_over_the_configuration_over_the_gpus() {
        let parallel = |n| ParallelConfig {
            strategy: Strategy::Ddp,
            nproc_per_node: n,
            device: Device::Auto,
            bucket_mib: 25,
            mixed: false,
            share_device: false,
            peak_tflops: None,
        };
        let machine = |gpus| Machine { cores: 8, gpus };
        assert_eq!(workers_per_node(&parallel(Some(2)), Some(4), &machine(8)), 4);
        assert_eq!(workers_per_node(&parallel(Some(2)), None, &machine(8)), 2);
        assert_eq!(workers_per_node(&parallel(None), None, &machine(8)), 8);
        assert_eq!(workers_per_node(&parallel(None), None, &machine(0)), 1);
        let on_cpu = ParallelConfig { device: Device::Cpu, ..parallel(None) };
        assert_eq!(workers_per_node(&on_cpu, None, &machine(8)), 1);
    }
}
