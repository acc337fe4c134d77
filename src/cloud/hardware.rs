//! Facts about this machine from the kernel's file trees: its maker, its NVIDIA devices, its local disks.
//!
//! Everything is read below a root, which is `/` unless `TRAINER_HOST_ROOT` names another: for a container that has its
//! machine's `/sys` elsewhere, or for a test. Nothing is written, mounted or formatted. A file that can't be read
//! counts as missing.

use crate::env;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// Names the root below which `/sys`, `/proc` and `/dev` are read.
pub const ROOT_VARIABLE: &str = "TRAINER_HOST_ROOT";

/// The root of the file trees.
pub fn root() -> PathBuf {
    env::raw(ROOT_VARIABLE).filter(|path| !path.is_empty()).map_or_else(|| "/".into(), PathBuf::from)
}

/// The maker of the machine, real or virtual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// An EC2 instance.
    Amazon,
    /// A machine of Google Cloud.
    Google,
    /// A machine of Azure.
    Azure,
    /// Another maker.
    Other,
    /// The firmware's tables are not visible.
    Unknown,
}

fn line(path: PathBuf) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned()).filter(|text| !text.is_empty())
}

fn names(folder: PathBuf) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

const AZURE_TAG: &str = "7783-7084-3265-9085-8269-3286-77";

/// The maker of the machine, by the firmware's tables: "Amazon EC2" on Nitro, a BIOS version that ends in `.amazon`, or
/// a hypervisor's UUID that begins with `ec2`, on Xen (EC2 user guide, "Identify EC2 instances"); "Google" on Compute
/// Engine; Microsoft's name appears on any Hyper-V, but Azure's machines have their own asset tag (cloud-init,
/// ds-identify).
pub fn maker(root: &Path) -> Maker {
    let dmi = |name: &str| line(root.join("sys/class/dmi/id").join(name));
    let tables = ["sys_vendor", "board_vendor", "bios_vendor", "bios_version"].map(dmi);
    let amazon = |text: &String| text.to_ascii_lowercase().contains("amazon");
    let uuid = line(root.join("sys/hypervisor/uuid"));
    if tables.iter().flatten().any(amazon) || uuid.is_some_and(|uuid| uuid.to_ascii_lowercase().starts_with("ec2")) {
        Maker::Amazon
    } else if dmi("product_name").is_some_and(|name| name == "Google Compute Engine") {
        Maker::Google
    } else if dmi("chassis_asset_tag").is_some_and(|tag| tag == AZURE_TAG) {
        Maker::Azure
    } else if tables.iter().any(Option::is_some) {
        Maker::Other
    } else {
        Maker::Unknown
    }
}

/// The machine's NVIDIA devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gpus {
    /// Display and 3D controllers on the PCI bus.
    pub on_the_bus: usize,
    /// The driver is loaded.
    pub driver: bool,
    /// Device files `/dev/nvidia0` and so on.
    pub device_files: usize,
}

/// Looks for NVIDIA's devices: PCI vendor 10de with base class 03 (PCI code and ID assignment: display controllers),
/// which leaves out the sound functions and switches that come with them.
pub fn gpus(root: &Path) -> Gpus {
    let bus = root.join("sys/bus/pci/devices");
    let is_gpu = |name: &String| {
        let read = |file: &str| line(bus.join(name).join(file)).unwrap_or_default();
        read("vendor") == "0x10de" && read("class").starts_with("0x03")
    };
    let is_device_file = |name: &String| {
        let number = name.strip_prefix("nvidia").unwrap_or_default();
        !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
    };
    Gpus {
        on_the_bus: names(bus.clone()).iter().filter(|name| is_gpu(name)).count(),
        driver: root.join("proc/driver/nvidia/version").exists(),
        device_files: names(root.join("dev")).iter().filter(|name| is_device_file(name)).count(),
    }
}

/// The same, counting only the device files that this process may use: no folder in a file's place, and none that a
/// container's device rules refuse.
pub fn usable_gpus(root: &Path) -> Gpus {
    let dev = root.join("dev");
    let numbered = |name: &String| {
        let number = name.strip_prefix("nvidia").unwrap_or_default();
        !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
    };
    let may_use = |name: &String| {
        let path = dev.join(name);
        let refused = || {
            let opened = std::fs::File::options().read(true).write(true).open(&path);
            opened.is_err_and(|error| error.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()))
        };
        path.metadata().is_ok_and(|metadata| !metadata.is_dir()) && !refused()
    };
    let device_files = names(dev.clone()).iter().filter(|name| numbered(name) && may_use(name)).count();
    Gpus { device_files, ..gpus(root) }
}

/// The version of the loaded NVIDIA driver: `NVRM version: NVIDIA UNIX x86_64 Kernel Module 535.183.01 Sun May 12 …`,
/// or as its module reports it.
pub fn driver_version(root: &Path) -> Option<String> {
    let is_version = |word: &&str| {
        let mut parts = word.split('.');
        let numbers = parts.all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
        numbers && word.contains('.')
    };
    let of_driver = line(root.join("proc/driver/nvidia/version"));
    let of_driver =
        of_driver.and_then(|text| text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned));
    of_driver.or_else(|| line(root.join("sys/module/nvidia/version")).filter(|text| is_version(&text.as_str())))
}

/// Bytes of memory still available: the kernel's estimate, or less if a cgroup of this process, or one above it, has a
/// limit (`cloud/cgroup.rs`).
pub fn available_memory(root: &Path) -> Option<u64> {
    let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let free = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let free = free.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)?;
    Some(super::cgroup::available_memory(root).map_or(free, |left| left.min(free)))
}

/// Processors of the machine that are online, whether or not this process may use them: `0-3,8` are 5 (kernel
/// documentation, admin-guide/cputopology).
pub fn processors(root: &Path) -> Option<u32> {
    let text = line(root.join("sys/devices/system/cpu/online"))?;
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
    };
    text.split(',').try_fold(0_u32, |all, range| all.checked_add(count(range)?))
}

/// Models of NVMe disks that live and die with the machine, on EC2, Google Cloud and Azure.
const INSTANCE_STORES: [&str; 3] = ["Amazon EC2 NVMe Instance Storage", "nvme_card", "Microsoft NVMe Direct Disk"];

/// The mount point of a writable disk that lives and dies with the machine, alone or as part of an array or volume
/// group; the first by path.
pub fn instance_store(root: &Path) -> Option<PathBuf> {
    let blocks = root.join("sys/block");
    let all = names(blocks.clone());
    let model = |name: &String| line(blocks.join(name).join("device/model")).unwrap_or_default();
    let mut disks: BTreeSet<String> =
        all.iter().filter(|name| INSTANCE_STORES.iter().any(|store| model(name).starts_with(store))).cloned().collect();
    // `nvme_card-pd` is Google's persistent disk.
    disks.retain(|name| !model(name).ends_with("-pd"));
    // Arrays and volumes name their parts: whole disks, or partitions of them. Two levels, for a volume on an array.
    for _ in 0..2 {
        for name in &all {
            let parts = names(blocks.join(name).join("slaves"));
            if !parts.is_empty() && parts.iter().all(|part| disks.iter().any(|disk| is_of(disk, part))) {
                disks.insert(name.clone());
            }
        }
    }
    let volume = |disk: &String| line(blocks.join(disk).join("dm/name"));
    let volumes: BTreeSet<String> = disks.iter().filter_map(volume).collect();
    let mounts = std::fs::read_to_string(root.join("proc/self/mounts")).unwrap_or_default();
    let mut found: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|mount| {
            let mut fields = mount.split(' ');
            let (device, place, _kind, options) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            let name = device.strip_prefix("/dev/")?;
            let ours = match name.strip_prefix("mapper/") {
                Some(volume) => volumes.contains(volume),
                None => disks.iter().any(|disk| is_of(disk, name)),
            };
            let writable = options.split(',').any(|option| option == "rw");
            (ours && writable).then(|| unescaped(place))
        })
        .collect();
    found.sort();
    found.into_iter().next()
}

/// Whether `name` is the disk or a partition of it: `nvme1n1`, `nvme1n1p2`.
fn is_of(disk: &str, name: &str) -> bool {
    let Some(rest) = name.strip_prefix(disk) else { return false };
    let partition = rest.strip_prefix('p').unwrap_or_default();
    rest.is_empty() || (!partition.is_empty() && partition.bytes().all(|b| b.is_ascii_digit()))
}

/// A path of `/proc/self/mounts`, which writes blanks as octal numbers (fstab(5)).
fn unescaped(path: &str) -> PathBuf {
    let plain = |path: &str| path.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\");
    PathBuf::from(plain(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::testing::tree;

    #[test]
    fn the_firmware_names_the_machines_maker() {
        for (files, maker_is) in [
            (vec![("sys/class/dmi/id/sys_vendor", "Amazon EC2\n")], Maker::Amazon),
            (
                vec![("sys/class/dmi/id/sys_vendor", "Xen\n"), ("sys/class/dmi/id/bios_version", "4.11.amazon\n")],
                Maker::Amazon,
            ),
            (vec![("sys/hypervisor/uuid", "EC2e1916-9099\n")], Maker::Amazon),
            (
                vec![
                    ("sys/class/dmi/id/sys_vendor", "Google\n"),
                    ("sys/class/dmi/id/product_name", "Google Compute Engine\n"),
                ],
                Maker::Google,
            ),
            (
                vec![
                    ("sys/class/dmi/id/sys_vendor", "Microsoft Corporation\n"),
                    ("sys/class/dmi/id/chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n"),
                ],
                Maker::Azure,
            ),
            (vec![("sys/class/dmi/id/sys_vendor", "Microsoft Corporation\n")], Maker::Other),
            (vec![("sys/class/dmi/id/sys_vendor", "LENOVO\n")], Maker::Other),
            (vec![], Maker::Unknown),
            (vec![("sys/class/dmi/id/sys_vendor", "\n")], Maker::Unknown),
        ] {
            assert_eq!(maker(tree(&files).path()), maker_is, "{files:?}");
        }
    }

    #[test]
    fn gpus_are_counted_on_the_bus_and_as_device_files() {
        let root = tree(&[
            ("sys/bus/pci/devices/0000:00:1e.0/vendor", "0x10de\n"),
            ("sys/bus/pci/devices/0000:00:1e.0/class", "0x030200\n"),
            ("sys/bus/pci/devices/0000:00:1e.1/vendor", "0x10de\n"),
            ("sys/bus/pci/devices/0000:00:1e.1/class", "0x040300\n"),
            ("sys/bus/pci/devices/0000:00:03.0/vendor", "0x1d0f\n"),
            ("sys/bus/pci/devices/0000:00:03.0/class", "0x030000\n"),
            ("dev/nvidiactl", ""),
            ("dev/nvidia-uvm", ""),
        ]);
        assert_eq!(gpus(root.path()), Gpus { on_the_bus: 1, driver: false, device_files: 0 });
        std::fs::write(root.path().join("dev/nvidia0"), "").unwrap();
        std::fs::create_dir_all(root.path().join("proc/driver/nvidia")).unwrap();
        std::fs::write(root.path().join("proc/driver/nvidia/version"), "NVRM").unwrap();
        assert_eq!(gpus(root.path()), Gpus { on_the_bus: 1, driver: true, device_files: 1 });
        assert_eq!(gpus(tree(&[]).path()), Gpus::default());
    }

    #[test]
    fn the_driver_gives_its_version_and_a_folder_is_not_a_device() {
        const NVRM: &str = "proc/driver/nvidia/version";
        for (files, version) in [
            (vec![], None),
            (vec![(NVRM, "NVRM\n")], None),
            (
                vec![(
                    NVRM,
                    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC \
                    version:  gcc 11.4.0\n",
                )],
                Some("535.183.01"),
            ),
            (
                vec![(NVRM, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")],
                Some("580.65.06"),
            ),
            (vec![("sys/module/nvidia/version", "470.256.02\n")], Some("470.256.02")),
        ] {
            assert_eq!(driver_version(tree(&files).path()).as_deref(), version, "{files:?}");
        }
        let root = tree(&[("dev/nvidiactl", ""), ("dev/nvidia-uvm", ""), ("dev/nvidia0", ""), ("dev/nvidia1/x", "")]);
        assert_eq!(usable_gpus(root.path()).device_files, 1, "one of these is a device");
    }

    #[test]
    fn a_containers_page_cache_counts_as_available_memory() {
        const FREE: (&str, &str) = ("proc/meminfo", "MemTotal: 32 kB\nMemAvailable:     16384 kB\n");
        const STAT: &str = "anon 1000\nfile 5100\nshmem 100\ninactive_anon 700\ninactive_file 3000\nactive_file 2000\n\
                            slab_reclaimable 500\nslab_unreclaimable 400\n";
        let file = |name: &'static str, text| (name, text);
        for (cgroup, available) in [
            (vec![], 16_384 * 1024),
            (vec![file("memory.max", "max\n"), file("memory.current", "9000\n")], 16_384 * 1024),
            (vec![file("memory.max", "10000\n"), file("memory.current", "9000\n")], 1000),
            (vec![file("memory.max", "10000"), file("memory.current", "9000"), file("memory.stat", STAT)], 6500),
            (vec![file("memory.max", "10000"), file("memory.current", "5000"), file("memory.stat", STAT)], 10_000),
            (vec![file("memory.max", "10000"), file("memory.current", "12000"), file("memory.stat", "x")], 0),
            (vec![file("memory.max", "99999999999"), file("memory.current", "9000")], 16_384 * 1024),
        ] {
            let root = tree(&[FREE]);
            std::fs::create_dir_all(root.path().join("sys/fs/cgroup")).unwrap();
            for (name, text) in &cgroup {
                std::fs::write(root.path().join("sys/fs/cgroup").join(name), text).unwrap();
            }
            assert_eq!(available_memory(root.path()), Some(available), "{cgroup:?}");
        }
        assert_eq!(available_memory(tree(&[]).path()), None);
    }

    #[test]
    fn processors_are_counted_by_ranges() {
        for (text, count) in [
            ("0-47\n", Some(48)),
            ("0", Some(1)),
            ("0-3,8\n", Some(5)),
            ("", None),
            ("3-0", None),
            ("0-4294967295", None),
            ("all", None),
        ] {
            assert_eq!(processors(tree(&[("sys/devices/system/cpu/online", text)]).path()), count, "{text}");
        }
        assert_eq!(processors(tree(&[]).path()), None);
    }

    #[test]
    fn only_a_mounted_instance_store_is_found() {
        const STORE: &str = "Amazon EC2 NVMe Instance Storage       \n";
        let disks: [(&str, &str); 5] = [
            ("sys/block/nvme0n1/device/model", "Amazon Elastic Block Store\n"),
            ("sys/block/nvme1n1/device/model", STORE),
            ("sys/block/nvme2n1/device/model", STORE),
            ("sys/block/nvme3n1/device/model", "nvme_card-pd\n"),
            ("sys/block/loop0/ro", "0\n"),
        ];
        for (more, mounts, place) in [
            (vec![], "/dev/nvme0n1p1 / ext4 rw,noatime 0 0\n", None),
            (vec![], "/dev/nvme1n1 /mnt/local\\040disk xfs rw 0 0\n", Some("/mnt/local disk")),
            (vec![], "/dev/nvme1n1p1 /scratch ext4 rw 0 0\n", Some("/scratch")),
            (vec![], "/dev/nvme1n1 /scratch ext4 ro 0 0\n", None),
            (vec![], "/dev/nvme3n1 /disk ext4 rw 0 0\n", None),
            (vec![], "/dev/nvme10n1 /disk ext4 rw 0 0\n", None),
            (vec![], "garbage\n\n/dev/nvme1n1\n", None),
            (
                vec![("sys/block/md0/slaves/nvme1n1", ""), ("sys/block/md0/slaves/nvme2n1", "")],
                "/dev/md0 /raid xfs rw 0 0\n",
                Some("/raid"),
            ),
            (
                vec![("sys/block/md0/slaves/nvme1n1", ""), ("sys/block/md0/slaves/nvme0n1p2", "")],
                "/dev/md0 /raid xfs rw 0 0\n",
                None,
            ),
            (
                vec![("sys/block/dm-0/slaves/nvme1n1", ""), ("sys/block/dm-0/dm/name", "vg.01-lv_ephemeral\n")],
                "/dev/mapper/vg.01-lv_ephemeral /opt/dlami/nvme ext4 rw 0 0\n",
                Some("/opt/dlami/nvme"),
            ),
            (vec![], "/dev/nvme2n1 /b ext4 rw 0 0\n/dev/nvme1n1 /a ext4 rw 0 0\n", Some("/a")),
        ] {
            let files: Vec<_> = disks.into_iter().chain(more).chain([("proc/self/mounts", mounts)]).collect();
            assert_eq!(instance_store(tree(&files).path()), place.map(PathBuf::from), "{mounts}");
        }
        assert_eq!(instance_store(tree(&[]).path()), None);
    }
}
