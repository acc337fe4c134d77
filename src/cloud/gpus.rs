//! GPU or CPU: the device that a run computes on, and when computing on the CPU is an expensive mistake.
//!
//! # What counts as a GPU of this process
//! - Device files `/dev/nvidia0`, `/dev/nvidia1`, …, that may be opened. A container has them when it was given GPUs;
//!   `nvidiactl` and `nvidia-uvm` alone, a folder in a file's place (a mount of a device that the machine does not
//!   have), and files that the container's device rules refuse (`EPERM`) also exist in containers without GPUs, and
//!   don't count.
//! - For a build with CUDA also NVIDIA devices on the PCI bus without any such file: a machine without its driver, or a
//!   container without `--gpus all`. Except if `NVIDIA_VISIBLE_DEVICES` is `none` or `void`: then the container was
//!   meant to have none. For a build without CUDA the bus alone is worth only a log line, since a desktop with another
//!   driver has such a device, too.

use std::path::Path;

use super::hardware::{self, Gpus};
use crate::{
    config::Device,
    env,
    error::{Error, Kind},
};

/// The first major version of the driver that works with LibTorch's CUDA 13.0, which scripts/setup fetches (CUDA
/// toolkit release notes, "CUDA toolkit and corresponding driver versions").
pub const NEEDED_DRIVER: u32 = 580;

/// Says what the machine's GPUs are for: `auto`, `required` or `none`.
pub const VARIABLE: &str = "TRAINER_GPU";

/// The facts for the decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// `parallel.device`.
    pub wanted: Device,
    /// This build has CUDA.
    pub cuda: bool,
    /// The kernel's view.
    pub seen: Gpus,
    /// The version of the loaded driver, `535.183.01`.
    pub driver: Option<String>,
    /// Whether there is a device file `nvidia-uvm`.
    pub unified_memory: bool,
    /// GPUs that LibTorch can use.
    pub usable: u32,
    /// `TRAINER_GPU`.
    pub gpu: Option<String>,
    /// `CUDA_VISIBLE_DEVICES`.
    pub visible: Option<String>,
    /// `NVIDIA_VISIBLE_DEVICES`.
    pub given: Option<String>,
}

/// The device that a run computes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// GPUs.
    Gpu,
    /// The CPU; the note about GPUs that exist, if any.
    Cpu(Option<String>),
    /// It would be the CPU, but no setting allows that.
    Refused {
        /// What is wrong.
        what: String,
        /// What to do.
        hint: String,
    },
}

impl Choice {
    /// The note for people, or why the run may not begin.
    pub fn settled(self) -> Result<Option<String>, Error> {
        match self {
            Self::Gpu => Ok(None),
            Self::Cpu(note) => Ok(note),
            Self::Refused { what, hint } => Err(Error::new(Kind::Config, what).with_hint(hint)),
        }
    }
}

/// Whether the setting or the machine's `TRAINER_GPU=none` asks for the CPU, so that LibTorch need not be asked for
/// GPUs.
pub fn cpu_is_meant(wanted: Device) -> bool {
    wanted == Device::Cpu || (wanted == Device::Auto && is_none(variable(VARIABLE).as_deref()))
}

/// Whether `CUDA_VISIBLE_DEVICES` hides all GPUs.
pub fn hides_all(visible: Option<&str>) -> bool {
    visible.is_some_and(|list| matches!(list.trim(), "" | "-1" | "NoDevFiles"))
}

fn is_none(gpu: Option<&str>) -> bool {
    gpu.is_some_and(|gpu| gpu.trim() == "none")
}

fn variable(name: &str) -> Option<String> {
    env::given(name)
}

impl Found {
    /// The facts below `root`; `count` asks LibTorch.
    pub fn look<E>(root: &Path, wanted: Device, count: impl FnOnce() -> Result<u32, E>) -> Result<Self, E> {
        let cuda = cfg!(torch_cuda);
        let usable = if cuda && !cpu_is_meant(wanted) { count()? } else { 0 };
        Ok(Self {
            wanted,
            cuda,
            seen: hardware::usable_gpus(root),
            driver: hardware::driver_version(root),
            unified_memory: root.join("dev/nvidia-uvm").exists(),
            usable,
            gpu: variable(VARIABLE),
            visible: variable("CUDA_VISIBLE_DEVICES"),
            given: variable("NVIDIA_VISIBLE_DEVICES"),
        })
    }

    /// Decides.
    pub fn choose(&self) -> Choice {
        let Gpus { on_the_bus, device_files, .. } = self.seen;
        let present = on_the_bus.max(device_files);
        let unused = |why: &str| {
            Choice::Cpu((present > 0).then(|| format!("{present} GPUs of this machine are not used: {why}")))
        };
        let required = self.wanted == Device::Cuda
            || (self.wanted == Device::Auto && self.gpu.as_deref().is_some_and(|gpu| gpu.trim() == "required"));
        if self.wanted == Device::Cpu {
            return unused("parallel.device is \"cpu\"");
        }
        if self.wanted == Device::Auto && is_none(self.gpu.as_deref()) {
            return unused("TRAINER_GPU is \"none\"");
        }
        if self.usable > 0 {
            return Choice::Gpu;
        }
        let hidden = hides_all(self.visible.as_deref());
        if required {
            let why =
                if self.wanted == Device::Cuda { "parallel.device is \"cuda\"" } else { "TRAINER_GPU is \"required\"" };
            let cause =
                if hidden && self.cuda { "CUDA_VISIBLE_DEVICES hides the GPUs".to_owned() } else { self.cause() };
            return self.refused(&format!("{why}, but no GPU can be used: {cause}"));
        }
        if hidden {
            return unused("CUDA_VISIBLE_DEVICES hides them");
        }
        if device_files > 0 {
            return self
                .refused(&format!("none of the {device_files} GPUs of this machine can be used: {}", self.cause()));
        }
        let withheld = self.given.as_deref().is_some_and(|given| matches!(given.trim(), "none" | "void"));
        match (on_the_bus, self.cuda, withheld) {
            (0, ..) => Choice::Cpu(None),
            (_, false, _) => unused("this build has no CUDA"),
            (_, true, true) => unused("none of them was given to this container"),
            (_, true, false) => {
                self.refused(&format!("none of the {on_the_bus} GPUs of this machine can be used: {}", self.cause()))
            }
        }
    }

    fn refused(&self, what: &str) -> Choice {
        const MEANT: &str = "to use the CPU: --set parallel.device=cpu";
        let hint = match (self.cuda, self.seen.device_files) {
            (false, _) => format!(
                "use a build with CUDA (scripts/setup --cuda, then cargo build --release); {MEANT}, or \
                TRAINER_GPU=none for this machine"
            ),
            (true, 0) => format!(
                "install the NVIDIA driver {NEEDED_DRIVER} or newer; start a container with --gpus all; {MEANT}, or \
                CUDA_VISIBLE_DEVICES= for this process"
            ),
            (true, _) => format!(
                "see nvidia-smi, and install the NVIDIA driver {NEEDED_DRIVER} or newer; {MEANT}, or \
                CUDA_VISIBLE_DEVICES= for this process"
            ),
        };
        Choice::Refused { what: what.to_owned(), hint }
    }

    /// Why LibTorch can use no GPU.
    fn cause(&self) -> String {
        let needs = format!("LibTorch's CUDA 13.0 needs {NEEDED_DRIVER} or newer");
        let driver = match &self.driver {
            Some(driver) => format!("the driver is {driver}, and {needs}"),
            None => format!("no driver is loaded, or its version is not visible, and {needs}"),
        };
        let major = self.driver.as_deref().and_then(|driver| driver.split('.').next()?.parse::<u32>().ok());
        if !self.cuda {
            return format!("this build has no CUDA ({driver})");
        }
        if major.is_some_and(|major| major < NEEDED_DRIVER) || (self.driver.is_none() && !self.seen.driver) {
            return driver;
        }
        let what = if self.seen.device_files == 0 {
            "there is no device file /dev/nvidia0"
        } else if !self.unified_memory {
            "there is no /dev/nvidia-uvm (`nvidia-modprobe -c0 -u` makes it)"
        } else {
            "libcuda.so.1 is not found or does not fit the driver (LD_LIBRARY_PATH must name its folder)"
        };
        format!("{what}; {driver}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Gpus = Gpus { on_the_bus: 0, driver: false, device_files: 0 };
    const GIVEN: Gpus = Gpus { on_the_bus: 2, driver: true, device_files: 2 };
    const BUS: Gpus = Gpus { on_the_bus: 2, driver: false, device_files: 0 };

    /// A build with CUDA that can use nothing, with a good driver.
    fn found(seen: Gpus) -> Found {
        Found {
            wanted: Device::Auto,
            cuda: true,
            seen,
            driver: seen.driver.then(|| "580.65.06".to_owned()),
            unified_memory: true,
            usable: 0,
            gpu: None,
            visible: None,
            given: None,
        }
    }

    fn is(found: &Found) -> &'static str {
        match found.choose() {
            Choice::Gpu => "gpu",
            Choice::Cpu(None) => "cpu",
            Choice::Cpu(Some(_)) => "cpu, said",
            Choice::Refused { .. } => "refused",
        }
    }

    #[test]
    fn without_a_usable_gpu_the_cpu_must_be_chosen() {
        type Change = fn(&mut Found);
        const SAME: Change = |_| {};
        const USABLE: Change = |f| f.usable = 2;
        const CPU_BUILD: Change = |f| f.cuda = false;
        const WANTS_CPU: Change = |f| f.wanted = Device::Cpu;
        const WANTS_CUDA: Change = |f| f.wanted = Device::Cuda;
        const HIDDEN: Change = |f| f.visible = Some(String::new());
        const HIDDEN_TOO: Change = |f| f.visible = Some("-1".into());
        const NAMED: Change = |f| f.visible = Some("0".into());
        const GPU_NONE: Change = |f| f.gpu = Some("none".into());
        const GPU_REQUIRED: Change = |f| f.gpu = Some("required".into());
        const GPU_AUTO: Change = |f| f.gpu = Some("auto".into());
        const VOID: Change = |f| f.given = Some("void".into());
        for (seen, changes, expected) in [
            (NONE, vec![SAME], "cpu"),
            (NONE, vec![CPU_BUILD], "cpu"),
            // WSL shows neither device files nor a bus.
            (NONE, vec![USABLE], "gpu"),
            (GIVEN, vec![USABLE], "gpu"),
            (GIVEN, vec![USABLE, GPU_REQUIRED], "gpu"),
            (GIVEN, vec![SAME], "refused"),
            (GIVEN, vec![GPU_AUTO], "refused"),
            (GIVEN, vec![NAMED], "refused"),
            (GIVEN, vec![VOID], "refused"),
            (GIVEN, vec![HIDDEN], "cpu, said"),
            (GIVEN, vec![HIDDEN_TOO], "cpu, said"),
            (GIVEN, vec![WANTS_CPU], "cpu, said"),
            (GIVEN, vec![GPU_NONE], "cpu, said"),
            (GIVEN, vec![USABLE, WANTS_CPU], "cpu, said"),
            (GIVEN, vec![USABLE, GPU_NONE], "cpu, said"),
            (GIVEN, vec![USABLE, GPU_NONE, WANTS_CUDA], "gpu"),
            (GIVEN, vec![CPU_BUILD], "refused"),
            (GIVEN, vec![CPU_BUILD, GPU_NONE], "cpu, said"),
            (GIVEN, vec![CPU_BUILD, WANTS_CPU], "cpu, said"),
            (GIVEN, vec![CPU_BUILD, HIDDEN], "cpu, said"),
            (BUS, vec![SAME], "refused"),
            (BUS, vec![VOID], "cpu, said"),
            (BUS, vec![HIDDEN], "cpu, said"),
            (BUS, vec![CPU_BUILD], "cpu, said"),
            (NONE, vec![WANTS_CUDA], "refused"),
            (NONE, vec![WANTS_CUDA, CPU_BUILD], "refused"),
            (GIVEN, vec![WANTS_CUDA, HIDDEN], "refused"),
            (NONE, vec![GPU_REQUIRED], "refused"),
            (NONE, vec![GPU_REQUIRED, WANTS_CPU], "cpu"),
        ] {
            let mut found = found(seen);
            changes.iter().for_each(|change| change(&mut found));
            assert_eq!(is(&found), expected, "{found:?}");
        }
    }

    #[test]
    fn a_refusal_names_what_is_wrong_and_the_driver_that_is_needed() {
        let said = |found: &Found| match found.choose() {
            Choice::Refused { what, hint } => format!("{what}\n{hint}"),
            other => panic!("{other:?}"),
        };
        let old = Found { driver: Some("535.183.01".into()), ..found(GIVEN) };
        let no_uvm = Found { unified_memory: false, ..found(GIVEN) };
        let cpu_build = Found { cuda: false, ..old.clone() };
        for (found, parts) in [
            (&old, vec!["the driver is 535.183.01", "needs 580 or newer", "parallel.device=cpu"]),
            (&no_uvm, vec!["nvidia-uvm", "nvidia-modprobe", "580.65.06", "needs 580"]),
            (&found(GIVEN), vec!["libcuda.so.1", "LD_LIBRARY_PATH", "580.65.06", "needs 580"]),
            (&found(BUS), vec!["no driver is loaded", "needs 580", "--gpus all"]),
            (
                &cpu_build,
                vec!["this build has no CUDA", "535.183.01", "needs 580", "TRAINER_GPU=none", "parallel.device=cpu"],
            ),
        ] {
            let said = said(found);
            assert!(parts.iter().all(|part| said.contains(part)), "{said}\nlacks one of {parts:?}");
        }
        assert!(!said(&old).contains("libcuda"));
    }

    /// The wheel that scripts/setup fetches names its CUDA version.
    #[test]
    fn the_needed_driver_is_that_of_the_fetched_libtorch() {
        let setup = include_str!("../../scripts/setup");
        assert!(setup.contains("nvidia-nccl-cu13"), "another CUDA: look up its driver, and change NEEDED_DRIVER");
    }

    #[test]
    fn only_files_below_the_root_are_looked_at() {
        let root = tempfile::tempdir().unwrap();
        let look = || Found::look(root.path(), Device::Cpu, || Ok::<_, ()>(9)).unwrap();
        let nothing = look();
        assert_eq!((nothing.seen, nothing.driver, nothing.unified_memory, nothing.usable), (NONE, None, false, 0));
        for (path, text) in [
            ("dev/nvidia0", ""),
            ("dev/nvidia-uvm", ""),
            ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun\n"),
        ] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let found = look();
        assert_eq!((found.seen.device_files, found.unified_memory, found.usable), (1, true, 0));
        assert_eq!(found.driver.as_deref(), Some("535.183.01"));
    }

    #[test]
    fn required_gpus_that_are_hidden_are_reported_as_hidden() {
        let hidden = Found { wanted: Device::Cuda, visible: Some(String::new()), ..found(GIVEN) };
        let Choice::Refused { what, .. } = hidden.choose() else { panic!() };
        assert!(what.contains("CUDA_VISIBLE_DEVICES hides"), "{what}");
        let Choice::Refused { what, .. } = (Found { cuda: false, ..hidden }).choose() else { panic!() };
        assert!(what.contains("no CUDA"), "{what}");
    }
}
