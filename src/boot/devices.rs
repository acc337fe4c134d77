//! Waiting for the NVIDIA driver, which on a fresh machine may come up later than this process.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    cloud::{
        gpus,
        hardware::{self, Gpus},
    },
    config::Device,
    env,
    error::{Error, Kind, Result},
};

/// The interval between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// The interval between two log lines about the wait.
const SAY: Duration = Duration::from_secs(10);
/// If there are fewer device files than GPUs on the bus and their number has not risen for this long, no more will
/// come: this is a container that was given only some of the machine's GPUs.
const SETTLED: Duration = Duration::from_secs(10);

/// The verdict on the devices found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// There is nothing to wait for.
    None,
    /// All of them are there.
    Ready,
    /// Some of them are there, and no more are coming.
    Some,
    /// Not yet ready.
    Wait,
}

/// `unchanged`: how long the devices have been the same.
fn judge(gpus: &Gpus, unchanged: Duration) -> Verdict {
    match gpus {
        Gpus { on_the_bus: 0, device_files: 0, .. } => Verdict::None,
        Gpus { driver: true, device_files, on_the_bus } if device_files >= on_the_bus => Verdict::Ready,
        Gpus { driver: true, device_files: 1.., .. } if unchanged >= SETTLED => Verdict::Some,
        _ => Verdict::Wait,
    }
}

/// Waits until the GPUs of this machine can be used, at most `limit`, if this process uses any; returns the usable
/// ones. The agent reports those that are not used.
pub async fn await_gpus(root: &Path, wanted: Device, limit: Duration) -> Result<Option<String>> {
    let hidden = gpus::hides_all(env::given("CUDA_VISIBLE_DEVICES").as_deref());
    if cfg!(torch_cuda) && !hidden && !gpus::cpu_is_meant(wanted) {
        return wait(root, limit).await;
    }
    Ok(None)
}

/// Waits until the GPUs on the bus can be used, at most `limit`; returns those that can, or `None` if there are no
/// GPUs.
async fn wait(root: &Path, limit: Duration) -> Result<Option<String>> {
    let began = Instant::now();
    let (mut seen, mut since, mut said) = (Gpus::default(), began, began);
    loop {
        let gpus = hardware::gpus(root);
        if gpus != seen {
            (seen, since) = (gpus, Instant::now());
        }
        let Gpus { on_the_bus, device_files, .. } = gpus;
        match judge(&gpus, since.elapsed()) {
            Verdict::None => return Ok(None),
            Verdict::Ready => return Ok(Some(format!("{device_files} GPUs are ready"))),
            Verdict::Some => return Ok(Some(format!("{device_files} of {on_the_bus} GPUs are given to this process"))),
            Verdict::Wait => {}
        }
        let lacking = if gpus.driver { "device files /dev/nvidia0 …" } else { "the NVIDIA driver" };
        if began.elapsed() >= limit {
            let what = format!(
                "{on_the_bus} NVIDIA devices are on the bus and {device_files} can be used: {lacking} did not come up \
                within {} s",
                limit.as_secs()
            );
            return Err(Error::new(Kind::Unavailable, what).with_hint(
                "run nvidia-smi on the machine: a driver that was installed or updated in this boot needs a reboot; in \
                a container check --gpus and the NVIDIA container toolkit",
            ));
        }
        if said.elapsed() >= SAY {
            said = Instant::now();
            tracing::info!("boot: waiting for {lacking}, {} s so far", began.elapsed().as_secs());
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_waits_for_the_devices_that_the_bus_has() {
        const LONG: Duration = Duration::from_secs(11);
        for (on_the_bus, driver, device_files, unchanged, verdict) in [
            (0, false, 0, Duration::ZERO, Verdict::None),
            (8, false, 0, LONG, Verdict::Wait),
            (8, true, 0, LONG, Verdict::Wait),
            (8, true, 8, Duration::ZERO, Verdict::Ready),
            (8, false, 8, LONG, Verdict::Wait),
            (8, true, 2, Duration::ZERO, Verdict::Wait),
            (8, true, 7, Duration::ZERO, Verdict::Wait),
            (8, true, 2, LONG, Verdict::Some),
            // The bus of the machine may be hidden from a container.
            (0, true, 2, Duration::ZERO, Verdict::Ready),
        ] {
            let gpus = Gpus { on_the_bus, driver, device_files };
            assert_eq!(judge(&gpus, unchanged), verdict, "{gpus:?}, {unchanged:?}");
        }
    }

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[tokio::test]
    async fn boot_waits_for_a_late_driver_and_fails_without_one() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        assert_eq!(wait(path, Duration::ZERO).await.unwrap(), None);
        write(path, "sys/bus/pci/devices/0000:00:1e.0/vendor", "0x10de\n");
        write(path, "sys/bus/pci/devices/0000:00:1e.0/class", "0x030200\n");
        let error = wait(path, Duration::ZERO).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.to_string().contains("1 NVIDIA devices are on the bus and 0 can be used"), "{error}");
        assert!(error.hint().unwrap().contains("reboot"));

        let (ready, ()) = tokio::join!(wait(path, Duration::from_secs(600)), async {
            // It has looked at least once by now: this branch is polled after the first one.
            write(path, "proc/driver/nvidia/version", "NVRM\n");
            write(path, "dev/nvidia0", "");
        });
        assert_eq!(ready.unwrap().as_deref(), Some("1 GPUs are ready"));
    }
}
