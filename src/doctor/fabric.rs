//! This machine's network toward the other nodes: the size of its packets, and its EFA adapters.
//!
//! Everything is read from the kernel's file trees, below the root of [`hardware`]; a file that can't be read counts as
//! missing.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use rustix::process::{Resource, getrlimit};

use super::verdict::Line;
use crate::{
    cloud::{
        hardware::{self, Maker},
        routes,
    },
    env,
    error::Kind,
    report::human,
};

const MTU: &str = "mtu";
const DEVICES: &str = "efa devices";
const PLUGIN: &str = "efa plugin";
const MEMLOCK: &str = "efa memlock";
/// From here on a packet is a jumbo frame: EC2 has 9001 bytes within a VPC, Google Cloud up to 8896.
const JUMBO: u32 = 8000;
/// Locked memory with which an adapter surely does not do.
const LITTLE: u64 = 1 << 30;
/// Amazon's PCI vendor id.
const AMAZON: &str = "0x1d0f";
/// Where AWS's installers put the plugin.
const INSTALLED: [&str; 3] =
    ["opt/amazon/ofi-nccl/lib", "opt/amazon/ofi-nccl/lib/x86_64-linux-gnu", "opt/aws-ofi-nccl/lib"];
/// Where the dynamic loader looks on its own (ld.so(8)).
const DEFAULT: [&str; 6] = ["lib64", "usr/lib64", "lib", "usr/lib", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// The lines about the network `toward` another node; `None`: no address is known.
pub(super) fn look(toward: Option<IpAddr>) -> Vec<Line> {
    let root = hardware::root();
    let interface = toward.and_then(|toward| routes::interface(&root, toward));
    let bytes = interface.as_deref().and_then(|name| packet(&root, name));
    let mut lines = vec![mtu(interface.as_deref(), bytes, hardware::maker(&root))];
    let wanted = plugin_name(env::text("NCCL_NET_PLUGIN").as_deref());
    let path = env::text("LD_LIBRARY_PATH").unwrap_or_default();
    let adapters = Adapters {
        plugin: find_plugin(&root, &wanted, &path),
        memlock: getrlimit(Resource::Memlock).current,
        ..Adapters::look(&root)
    };
    lines.extend(efa(&adapters, &wanted));
    lines
}

fn text(path: PathBuf) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn names(folder: PathBuf) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The largest packet of an interface, bytes.
fn packet(root: &Path, interface: &str) -> Option<u32> {
    text(root.join("sys/class/net").join(interface).join("mtu")).trim().parse().ok()
}

/// The size of packets on the way to the other nodes.
fn mtu(interface: Option<&str>, bytes: Option<u32>, maker: Maker) -> Line {
    let (Some(interface), Some(bytes)) = (interface, bytes) else {
        return Line::skipped(MTU, "the interface toward the other nodes is not known");
    };
    if interface == "lo" {
        return Line::skipped(MTU, "the other nodes are on this machine");
    }
    let found = format!("{bytes} bytes on {interface}, toward the other nodes");
    match (bytes >= JUMBO, maker) {
        (true, _) => Line::ok(MTU, format!("{found}: jumbo frames")),
        (false, Maker::Amazon) => Line::warn(
            MTU,
            format!("{found}: no jumbo frames, though a VPC carries 9001"),
            format!("ip link set dev {interface} mtu 9001, on every node: gradients then take fewer packets"),
        ),
        (false, _) => Line::ok(MTU, format!("{found}: no jumbo frames")),
    }
}

/// Adapters that read and write memory themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Adapters {
    /// Amazon's, by name.
    efa: Vec<String>,
    /// Others, by name.
    infiniband: Vec<String>,
    /// Device files that a process opens to use one.
    files: usize,
    /// NCCL's plugin for them.
    plugin: Plugin,
    /// Bytes that a process may lock; `None`: no limit.
    memlock: Option<u64>,
}

/// Whether NCCL finds its plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Plugin {
    #[default]
    Missing,
    /// In this folder, where the loader does not look.
    Aside(PathBuf),
    Found,
}

impl Adapters {
    /// The devices alone.
    fn look(root: &Path) -> Self {
        let class = root.join("sys/class/infiniband");
        let is_efa = |name: &String| text(class.join(name).join("device/vendor")).trim() == AMAZON;
        let (efa, infiniband) = names(class.clone()).into_iter().partition(is_efa);
        let files = names(root.join("dev/infiniband"));
        let files = files.iter().filter(|name| name.starts_with("uverbs")).count();
        Self { efa, infiniband, files, ..Self::default() }
    }
}

/// The file that NCCL opens (NCCL's documentation, `NCCL_NET_PLUGIN`).
fn plugin_name(named: Option<&str>) -> String {
    match named {
        None => "libnccl-net.so".to_owned(),
        Some(file) if file.contains(".so") => file.to_owned(),
        Some(suffix) => format!("libnccl-net-{suffix}.so"),
    }
}

/// Looks where the loader does: `LD_LIBRARY_PATH`, its cache, its own folders.
fn find_plugin(root: &Path, wanted: &str, library_path: &str) -> Plugin {
    let holds = |folder: &PathBuf| folder.join(wanted).exists();
    let on_path = library_path.split(':').filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let cached = || {
        let cache = std::fs::read(root.join("etc/ld.so.cache")).unwrap_or_default();
        // Names end with a zero byte there.
        let name = [wanted.as_bytes(), b"\0"].concat();
        cache.windows(name.len()).any(|bytes| bytes == name)
    };
    if on_path.chain(DEFAULT.map(|folder| root.join(folder))).any(|folder| holds(&folder)) || cached() {
        return Plugin::Found;
    }
    let aside = INSTALLED.map(|folder| root.join(folder)).into_iter().find(holds);
    aside.map_or(Plugin::Missing, Plugin::Aside)
}

/// Whether NCCL can use the machine's EFA adapters.
fn efa(adapters: &Adapters, wanted: &str) -> Vec<Line> {
    let Adapters { efa, infiniband, files, plugin, memlock } = adapters;
    if efa.is_empty() && infiniband.is_empty() {
        let found = match files {
            0 => "no EFA or InfiniBand adapter".to_owned(),
            _ => format!("{} in /dev/infiniband, and no adapter in /sys", human::plural(*files as u64, "device file")),
        };
        return vec![Line::skipped(DEVICES, found)];
    }
    let what = if efa.is_empty() { ("InfiniBand", infiniband) } else { ("EFA", efa) };
    let found =
        format!("{}: {}", human::plural(what.1.len() as u64, &format!("{} adapter", what.0)), what.1.join(", "));
    let mut lines = vec![if *files == 0 {
        Line::warn(
            DEVICES,
            format!("{found}, and no device file: NCCL takes sockets instead, which are slower"),
            "give the container /dev/infiniband (docker run --device=/dev/infiniband/uverbs0 …), or on Kubernetes \
             request vpc.amazonaws.com/efa",
        )
    } else {
        Line::ok(DEVICES, found)
    }];
    if !efa.is_empty() {
        lines.push(match plugin {
            Plugin::Found => Line::ok(PLUGIN, format!("{wanted} is on the library path")),
            Plugin::Aside(folder) => Line::warn(
                PLUGIN,
                format!("{wanted} is in {}, which is not on the library path", folder.display()),
                format!("add {} to LD_LIBRARY_PATH; without it NCCL takes sockets and says nothing", folder.display()),
            ),
            Plugin::Missing => Line::warn(
                PLUGIN,
                format!("{wanted} is not on the library path: NCCL takes sockets and says nothing"),
                "install libfabric and aws-ofi-nccl (AWS's EFA installer has both), and add their folders to \
                 LD_LIBRARY_PATH",
            ),
        });
    }
    const RAISE: &str = "lift the limit: ulimit -l unlimited, LimitMEMLOCK=infinity in a unit, docker run --ulimit \
                         memlock=-1";
    lines.push(match memlock {
        None => Line::ok(MEMLOCK, "a process may lock any amount of memory"),
        Some(bytes) => {
            let found =
                format!("a process may lock {} of memory; adapters lock all that they send", human::bytes(*bytes));
            if *bytes < LITTLE && *files > 0 && (efa.is_empty() || *plugin == Plugin::Found) {
                Line::fail(MEMLOCK, Kind::Config, found, RAISE)
            } else {
                Line::warn(MEMLOCK, found, RAISE)
            }
        }
    });
    lines
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{FAIL, OK, SKIPPED, WARN, is},
        *,
    };

    #[test]
    fn a_packets_size_is_read_and_judged() {
        let root = tempfile::tempdir().unwrap();
        let interfaces = root.path().join("sys/class/net/ens5");
        std::fs::create_dir_all(&interfaces).unwrap();
        std::fs::write(interfaces.join("mtu"), "9001\n").unwrap();
        assert_eq!((packet(root.path(), "ens5"), packet(root.path(), "ens6")), (Some(9001), None));

        let of = |bytes, maker| mtu(Some("ens5"), Some(bytes), maker);
        assert_eq!(is(&of(9001, Maker::Amazon)), OK);
        assert_eq!(is(&of(8896, Maker::Google)), OK);
        assert!(of(8896, Maker::Google).found.ends_with("toward the other nodes: jumbo frames"));
        assert_eq!(is(&of(1500, Maker::Other)), OK);
        assert!(of(1500, Maker::Other).found.contains("no jumbo frames"));
        assert_eq!(is(&of(1500, Maker::Amazon)), WARN);
        assert_eq!(is(&mtu(None, None, Maker::Amazon)), SKIPPED);
        assert_eq!(is(&mtu(Some("lo"), Some(65_536), Maker::Amazon)), SKIPPED);
    }

    #[test]
    fn adapters_are_found_and_told_apart_by_their_maker() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Adapters::look(root.path()), Adapters::default());
        for (name, vendor) in [("rdmap0s6", "0x1d0f\n"), ("mlx5_0", "0x15b3\n")] {
            let device = root.path().join("sys/class/infiniband").join(name).join("device");
            std::fs::create_dir_all(&device).unwrap();
            std::fs::write(device.join("vendor"), vendor).unwrap();
        }
        let files = root.path().join("dev/infiniband");
        std::fs::create_dir_all(&files).unwrap();
        for name in ["uverbs0", "uverbs1", "rdma_cm"] {
            std::fs::write(files.join(name), "").unwrap();
        }
        let found = Adapters::look(root.path());
        assert_eq!((found.efa, found.infiniband, found.files), (vec!["rdmap0s6".into()], vec!["mlx5_0".into()], 2));
    }

    #[test]
    fn the_plugin_is_looked_for_where_the_loader_looks() {
        assert_eq!(plugin_name(None), "libnccl-net.so");
        assert_eq!(plugin_name(Some("ofi")), "libnccl-net-ofi.so");
        assert_eq!(plugin_name(Some("libnccl-net-mine.so")), "libnccl-net-mine.so");
        let root = tempfile::tempdir().unwrap();
        let wanted = "libnccl-net.so";
        let find = |path: &str| find_plugin(root.path(), wanted, path);
        assert_eq!(find("/no/such/folder:"), Plugin::Missing);
        let aside = root.path().join(INSTALLED[0]);
        std::fs::create_dir_all(&aside).unwrap();
        std::fs::write(aside.join(wanted), "").unwrap();
        assert_eq!(find(""), Plugin::Aside(aside.clone()));
        assert_eq!(find(&format!("/no/such/folder:{}", aside.display())), Plugin::Found);
        std::fs::create_dir_all(root.path().join("etc")).unwrap();
        let cache = |name: &str| std::fs::write(root.path().join("etc/ld.so.cache"), format!("x\0{name}\0y")).unwrap();
        cache("libnccl-net.so.0.0.0");
        assert_eq!(find(""), Plugin::Aside(aside));
        cache(wanted);
        assert_eq!(find(""), Plugin::Found);
    }

    #[test]
    fn an_adapter_needs_device_files_a_plugin_and_locked_memory() {
        let good = Adapters {
            efa: vec!["rdmap0s6".into()],
            infiniband: Vec::new(),
            files: 1,
            plugin: Plugin::Found,
            memlock: None,
        };
        let verdicts = |adapters: &Adapters| efa(adapters, "libnccl-net.so").iter().map(is).collect::<Vec<_>>();
        assert_eq!(verdicts(&good), [OK, OK, OK]);
        assert_eq!(verdicts(&Adapters { files: 0, ..good.clone() }), [WARN, OK, OK]);
        assert_eq!(verdicts(&Adapters { plugin: Plugin::Missing, ..good.clone() }), [OK, WARN, OK]);
        let aside = Adapters { plugin: Plugin::Aside("/opt/x".into()), memlock: Some(1 << 16), ..good.clone() };
        assert_eq!(verdicts(&aside), [OK, WARN, WARN], "sockets need no locked memory");
        assert_eq!(verdicts(&Adapters { memlock: Some(1 << 16), ..good.clone() }), [OK, OK, FAIL]);
        assert_eq!(verdicts(&Adapters { memlock: Some(1 << 16), files: 0, ..good.clone() }), [WARN, OK, WARN]);
        assert_eq!(verdicts(&Adapters { memlock: Some(1 << 40), ..good.clone() }), [OK, OK, WARN]);
        let mellanox = Adapters { efa: Vec::new(), infiniband: vec!["mlx5_0".into()], ..good.clone() };
        assert_eq!(verdicts(&mellanox), [OK, OK], "NCCL needs no plugin for it");
        assert_eq!(verdicts(&Adapters { efa: Vec::new(), ..good }), [SKIPPED]);
    }
}
