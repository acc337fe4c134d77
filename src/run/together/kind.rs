//! What this machine computes with, in one line: nodes of one kind round alike.
//!
//! Two CPUs of one model with other flags (a hypervisor hides some) choose other kernels, so the flags count. Of GPUs
//! the models count, as the driver names them in `/proc/driver/nvidia/gpus/*/information`.

use std::collections::BTreeSet;

use crate::{config::Device, storage::Crc64};

/// Of this machine, for runs with this setting.
pub fn of_this_machine(wanted: Device) -> String {
    let gpus = if wanted == Device::Cpu { BTreeSet::new() } else { gpus() };
    if gpus.is_empty() {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        return cpu(&cpuinfo);
    }
    gpus.into_iter().collect::<Vec<_>>().join(" + ")
}

fn gpus() -> BTreeSet<String> {
    let folders = std::fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    let texts = folders.filter_map(|folder| std::fs::read_to_string(folder.path().join("information")).ok());
    texts.filter_map(|text| field(&text, "Model").map(str::to_owned)).collect()
}

/// The value of the first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn cpu(cpuinfo: &str) -> String {
    // x86 says `model name` and `flags`, ARM `CPU part` and `Features`.
    let model = ["model name", "CPU part"].iter().find_map(|name| field(cpuinfo, name)).unwrap_or("unknown CPU");
    let flags = ["flags", "Features"].iter().find_map(|name| field(cpuinfo, name)).unwrap_or_default();
    let flags: BTreeSet<&str> = flags.split_ascii_whitespace().collect();
    let sum = Crc64::of(flags.into_iter().collect::<Vec<_>>().join(" ").as_bytes());
    format!("{model} ({sum})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_of_one_model_differ_by_their_flags_and_not_by_their_order() {
        let of = |flags: &str| cpu(&format!("processor\t: 0\nmodel name\t: EPYC 9R14\nflags\t\t: {flags}\n"));
        assert_eq!(of("fma avx2"), of("avx2 fma"));
        assert_ne!(of("fma avx2"), of("fma avx2 avx512f"));
        assert!(of("fma").starts_with("EPYC 9R14 ("), "{}", of("fma"));
        assert!(cpu("CPU part\t: 0xd40\nFeatures\t: fp asimd\n").starts_with("0xd40 ("));
        assert!(cpu("").starts_with("unknown CPU"));
    }

    #[test]
    fn a_gpu_is_named_as_its_driver_does() {
        let text = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 16\n";
        assert_eq!(field(text, "Model"), Some("NVIDIA H200"));
    }
}
