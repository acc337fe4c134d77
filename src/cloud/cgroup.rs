//! The memory that the control groups of this process leave to it.
//!
//! A limit holds for a group and for all below it: the result is the least that any group on the path to the root
//! leaves. Version 2 has one tree, version 1 one for memory; both may be mounted at once, and then either holds (kernel
//! documentation, admin-guide/cgroup-v2 and cgroup-v1/memory). `/proc/self/cgroup` names the groups as the mounter of
//! the tree saw them (cgroups(7)): within a container the tree may begin at the container's own group, so that its path
//! leads nowhere: a missing group has no limit, and the top is always checked.
//!
//! Reclaimable page cache and slabs don't count as used, since they are freed when memory is short; the kernel's own
//! estimate does the same (filesystems/proc, `MemAvailable`). Files in tmpfs are counted elsewhere.

use std::path::{Path, PathBuf};

/// The names of one version's files.
struct Version {
    /// Where its tree is usually mounted, below `sys/fs/cgroup`.
    mounts: &'static [&'static str],
    limit: &'static str,
    used: &'static str,
    /// Lines of `memory.stat` that count what can be reclaimed, of the group and all below it.
    reclaimable: &'static [&'static str],
}

const V2: Version = Version {
    mounts: &["", "unified"],
    limit: "memory.max",
    used: "memory.current",
    reclaimable: &["active_file", "inactive_file", "slab_reclaimable"],
};

const V1: Version = Version {
    mounts: &["memory"],
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: &["total_active_file", "total_inactive_file"],
};

/// No limit, as version 1 writes it: the largest multiple of a page. No real limit is as large.
const NO_LIMIT: u64 = 1 << 62;

/// Bytes that the groups of this process leave to it; `None`: none of them has a limit.
pub fn available_memory(root: &Path) -> Option<u64> {
    let named = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let left = [(V2, path_of(&named, false)), (V1, path_of(&named, true))].into_iter().filter_map(|(version, path)| {
        let trees = version.mounts.iter().map(|mount| root.join("sys/fs/cgroup").join(mount));
        trees.flat_map(|tree| groups(&tree, path)).filter_map(|group| version.left(&group)).min()
    });
    left.min()
}

/// The group's path in the tree of version 2, or in the one of version 1 that has memory: lines of
/// `number:controllers:path`.
fn path_of(named: &str, first_version: bool) -> &str {
    let path = named.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let wanted =
            if first_version { controllers.split(',').any(|name| name == "memory") } else { controllers.is_empty() };
        wanted.then_some(path)
    });
    path.unwrap_or("/")
}

/// The folders of a group and of all above it, up to the tree's top.
fn groups(tree: &Path, path: &str) -> Vec<PathBuf> {
    let mut folder = tree.to_owned();
    let mut folders = vec![folder.clone()];
    // A group outside of the container's namespace begins with `/..`.
    for name in path.split('/').filter(|name| !name.is_empty()).take_while(|name| *name != "..") {
        folder.push(name);
        folders.push(folder.clone());
    }
    folders
}

impl Version {
    /// The memory that this group leaves; `None`: it has no limit, or does not exist.
    fn left(&self, group: &Path) -> Option<u64> {
        let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        // "max" is not a number: no limit.
        let limit = number(self.limit).filter(|limit| *limit < NO_LIMIT)?;
        let stat = read("memory.stat").unwrap_or_default();
        let reclaimable = stat.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            self.reclaimable.contains(&name).then(|| bytes.trim().parse::<u64>().ok())?
        });
        let reclaimable = reclaimable.fold(0, u64::saturating_add);
        Some(limit.saturating_sub(number(self.used).unwrap_or(0).saturating_sub(reclaimable)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::testing::tree;

    #[test]
    fn the_tightest_group_on_the_way_up_decides() {
        const HUGE: &str = "9223372036854771712\n";
        for (what, files, left) in [
            ("no groups at all", vec![], None),
            (
                "version 2, a limit two levels above",
                vec![
                    ("proc/self/cgroup", "0::/system.slice/trainer.service/worker\n"),
                    ("sys/fs/cgroup/system.slice/memory.max", "9000\n"),
                    ("sys/fs/cgroup/system.slice/memory.current", "2000\n"),
                    ("sys/fs/cgroup/system.slice/trainer.service/memory.max", "max\n"),
                    ("sys/fs/cgroup/system.slice/trainer.service/worker/memory.max", "8000\n"),
                    ("sys/fs/cgroup/system.slice/trainer.service/worker/memory.current", "500\n"),
                ],
                Some(7000),
            ),
            (
                "version 2, the group's own limit is the least",
                vec![
                    ("proc/self/cgroup", "0::/a/b\n"),
                    ("sys/fs/cgroup/a/memory.max", "9000\n"),
                    ("sys/fs/cgroup/a/memory.current", "1000\n"),
                    ("sys/fs/cgroup/a/b/memory.max", "3000\n"),
                    ("sys/fs/cgroup/a/b/memory.current", "1000\n"),
                    ("sys/fs/cgroup/a/b/memory.stat", "anon 1\ninactive_file 400\nactive_file 100\n"),
                ],
                Some(2500),
            ),
            (
                "version 1, nested",
                vec![
                    ("proc/self/cgroup", "5:cpu,cpuacct:/x\n3:memory:/docker/abc\n0::/\n"),
                    ("sys/fs/cgroup/memory/memory.limit_in_bytes", HUGE),
                    ("sys/fs/cgroup/memory/docker/memory.limit_in_bytes", HUGE),
                    ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "5000\n"),
                    ("sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", "4500\n"),
                    (
                        "sys/fs/cgroup/memory/docker/abc/memory.stat",
                        "active_file 1\ntotal_active_file 200\ntotal_inactive_file 300\n",
                    ),
                ],
                Some(1000),
            ),
            (
                "version 1 in a container, whose tree begins at its own group",
                vec![
                    ("proc/self/cgroup", "3:memory:/docker/abc\n"),
                    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000\n"),
                    ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n"),
                ],
                Some(4000),
            ),
            (
                "both versions, memory in the first",
                vec![
                    ("proc/self/cgroup", "4:memory:/job\n0::/job\n"),
                    ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "700\n"),
                    ("sys/fs/cgroup/unified/job/cgroup.procs", "1\n"),
                ],
                Some(700),
            ),
            (
                "a group outside of the namespace",
                vec![
                    ("proc/self/cgroup", "0::/../../other\n"),
                    ("sys/fs/cgroup/memory.max", "600\n"),
                    ("sys/fs/other/memory.max", "1\n"),
                ],
                Some(600),
            ),
            ("no limit anywhere", vec![("proc/self/cgroup", "0::/a\n"), ("sys/fs/cgroup/a/memory.max", "max")], None),
            ("garbage", vec![("proc/self/cgroup", "x\n:::\n"), ("sys/fs/cgroup/memory.max", "-1")], None),
        ] {
            assert_eq!(available_memory(tree(&files).path()), left, "{what}");
        }
    }
}
