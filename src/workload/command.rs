//! The process of a worker: its program, arguments and environment. What it inherits beside them is the protocol's.

use std::{os::unix::process::CommandExt, process::Command};

use super::inherited;
use crate::{env, protocol::WORKER_SUBCOMMAND};

/// glibc gives large blocks back to the kernel at once, which zeroes and faults them in again a moment later: every
/// step frees and takes the same activations. With these it keeps them (mallopt(3); the threshold's upper limit is 32
/// MiB). Results are the same bits.
const MALLOC: [(&str, &str); 2] = [("MALLOC_MMAP_THRESHOLD_", "33554432"), ("MALLOC_TRIM_THRESHOLD_", "1073741824")];

/// A worker that computes with this many threads.
pub fn worker(threads: u32) -> Command {
    // The running binary itself, even if another was put in its place meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("trainer-worker")
        .arg(WORKER_SUBCOMMAND)
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
    command
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
        assert_eq!(command.get_args().collect::<Vec<_>>(), [WORKER_SUBCOMMAND]);
        assert_eq!(["OMP_NUM_THREADS", "MKL_NUM_THREADS"].map(variable), ["3", "3"].map(|n| Some(n.to_owned())));
        // Of the variables of this process it gets those that are for workers.
        for (name, value) in env::all() {
            let (name, value) = (name.to_string_lossy().into_owned(), value.to_str().map(str::to_owned));
            let known = MALLOC.iter().any(|(known, _)| *known == name) || name.ends_with("_NUM_THREADS");
            let expected = value.filter(|_| inherited::is_for_workers(&name));
            assert!(known || variable(&name) == expected, "{name}");
        }
    }
}
