//! The process of a worker: its program, arguments and environment. What it inherits beside them is the protocol's.

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
};

use super::inherited;
use crate::{env, protocol::WORKER_SUBCOMMAND};

/// glibc gives large blocks back to the kernel at once, which zeroes and faults them in again a moment later: every
/// step frees and takes the same activations. With these it keeps them (mallopt(3); the threshold's upper limit is 32
/// MiB). Results are the same bits.
const MALLOC: [(&str, &str); 2] = [("MALLOC_MMAP_THRESHOLD_", "33554432"), ("MALLOC_TRIM_THRESHOLD_", "1073741824")];

/// A worker that computes with this many threads. It works in `/`: MKL can't load its kernels in a folder that was
/// deleted, and a run may outlive the folder that it was started in.
pub fn worker(threads: u32) -> Command {
    // The running binary itself, even if another was put in its place meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("trainer-worker")
        .arg(WORKER_SUBCOMMAND)
        .current_dir("/")
        .env_clear()
        .envs(env::all().filter(|(name, _)| name.to_str().is_some_and(inherited::is_for_workers)))
        .env("OMP_NUM_THREADS", threads.to_string())
        .env("MKL_NUM_THREADS", threads.to_string());
    if ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"].iter().all(|name| env::raw(name).is_none()) {
        // libgomp's threads spin for milliseconds after each operation. That is right on a quiet machine and ruinous on
        // a busy one; a short spin measured the same on the first and up to 4 times faster on the second. Results are
        // the same bits.
        command.env("GOMP_SPINCOUNT", "10000");
    }
    for (name, value) in MALLOC {
        if env::raw(name).is_none() {
            command.env(name, value);
        }
    }
    if let Ok(here) = std::env::current_dir() {
        let given: Vec<_> =
            command.get_envs().map(|(name, value)| (name.to_owned(), value.map(OsStr::to_owned))).collect();
        for (name, value) in given {
            if let Some(value) = value.and_then(|value| from_here(name.to_str()?, value.to_str()?, &here)) {
                command.env(name, value);
            }
        }
    }
    command
}

/// The value of a variable that names files or folders, each made absolute: `LD_LIBRARY_PATH`, `NCCL_TOPO_FILE`.
/// `None`: the variable stays as it is.
fn from_here(name: &str, value: &str, here: &Path) -> Option<OsString> {
    let separators: &[char] = match name {
        "LD_PRELOAD" => &[':', ' '],
        "TMPDIR" => &[],
        _ if name.ends_with("_PATH") => &[':'],
        _ if name.ends_with("_FILE") || name.ends_with("_DIR") => &[],
        _ => return None,
    };
    let mut absolute = OsString::new();
    for part in value.split_inclusive(separators) {
        let path = part.trim_end_matches(separators);
        // The loader looks for a plain name of LD_PRELOAD in its own folders, and knows `$ORIGIN`.
        let elsewhere = path.is_empty() || path.starts_with('$') || name == "LD_PRELOAD" && !path.contains('/');
        absolute.push(if elsewhere { OsString::from(path) } else { here.join(path).into_os_string() });
        absolute.push(&part[path.len()..]);
    }
    (absolute != value).then_some(absolute)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_this_program_with_its_threads_and_no_secret() {
        let command = worker(3);
        let variable = |name: &str| {
            let found = command.get_envs().find(|(known, _)| *known == name);
            found.and_then(|(_, value)| value?.to_str().map(str::to_owned))
        };
        assert_eq!(command.get_program(), "/proc/self/exe");
        assert_eq!(command.get_current_dir(), Some(Path::new("/")), "its agent's folder may be deleted");
        assert_eq!(command.get_args().collect::<Vec<_>>(), [WORKER_SUBCOMMAND]);
        assert_eq!(["OMP_NUM_THREADS", "MKL_NUM_THREADS"].map(variable), ["3", "3"].map(|n| Some(n.to_owned())));
        // Of the variables of this process it gets those that are for workers.
        for (name, value) in env::all() {
            let (name, value) = (name.to_string_lossy().into_owned(), value.to_str().map(str::to_owned));
            let known = MALLOC.iter().any(|(known, _)| *known == name) || name.ends_with("_NUM_THREADS");
            let expected = value.filter(|_| inherited::is_for_workers(&name));
            let here = std::env::current_dir().unwrap();
            let absolute = |value: String| {
                from_here(&name, &value, &here).map_or(value, |absolute| absolute.into_string().unwrap())
            };
            let expected = expected.map(absolute);
            assert!(known || variable(&name) == expected, "{name}");
        }
    }

    #[test]
    fn paths_in_variables_lead_from_the_folder_of_the_agent() {
        for (name, value, expected) in [
            ("LD_LIBRARY_PATH", "lib:/usr/lib:$ORIGIN/x:../y", Some("/here/lib:/usr/lib:$ORIGIN/x:/here/../y")),
            ("LD_LIBRARY_PATH", "/usr/lib:/x", None),
            ("LD_PRELOAD", "libm.so ./shim.so:/a.so", Some("libm.so /here/./shim.so:/a.so")),
            ("NCCL_TOPO_FILE", "topo:1.xml", Some("/here/topo:1.xml")),
            ("TORCH_NCCL_DUMP_DIR", "dump", Some("/here/dump")),
            ("TMPDIR", "tmp", Some("/here/tmp")),
            ("TRAINER_LOG", "debug", None),
            ("OMP_NUM_THREADS", "4", None),
        ] {
            let absolute = from_here(name, value, Path::new("/here"));
            assert_eq!(absolute.as_deref(), expected.map(OsStr::new), "{name}={value}");
        }
    }
}
