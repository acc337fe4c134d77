//! Shortages of the system, by its error numbers (errno(3)): files, processes, memory, disk space, a file's size.
//!
//! Such an error is neither the user's mistake nor a fault of this program: the same call succeeds once there is more
//! of the resource. Every error that reaches the user is checked here ([`crate::error`]), so that no module need know
//! the numbers.

use std::{error::Error as StdError, io};

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

/// As many open files as this program may need: connections to a store, shards of a dataset, workers.
const FILES: u64 = 65_536;

/// The scarce resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// EMFILE, ENFILE: open files.
    Files,
    /// EAGAIN of fork(2) and clone(2): processes and threads.
    Processes,
    /// ENOMEM.
    Memory,
    /// ENOSPC, EDQUOT: disk space.
    Room,
    /// EFBIG: the size that one file may have (`ulimit -f`).
    FileSize,
}

impl Shortage {
    /// The shortage that `error`, or a cause of it, reports.
    pub fn of(error: &(dyn StdError + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            let here = match error.downcast_ref::<io::Error>() {
                Some(error) => Self::of_io(error),
                None => error.downcast_ref::<Errno>().and_then(|errno| Self::of_number(errno.raw_os_error())),
            };
            if here.is_some() {
                return here;
            }
            cause = error.source();
        }
        None
    }

    /// The same from words (strerror(3)): a worker may report only a library's text.
    pub fn in_words(words: &str) -> Option<Self> {
        const WORDS: [(&str, Shortage); 7] = [
            ("Too many open files", Shortage::Files),
            ("Resource temporarily unavailable", Shortage::Processes),
            ("Cannot allocate memory", Shortage::Memory),
            ("No space left on device", Shortage::Room),
            ("Disk quota exceeded", Shortage::Room),
            ("File too large", Shortage::FileSize),
            ("std::bad_alloc", Shortage::Memory),
        ];
        WORDS.iter().find(|(said, _)| words.contains(said)).map(|(_, shortage)| *shortage)
    }

    fn of_io(error: &io::Error) -> Option<Self> {
        match error.raw_os_error() {
            Some(number) => Self::of_number(number),
            // An error with its own text may hold another.
            None => match error.kind() {
                io::ErrorKind::OutOfMemory => Some(Self::Memory),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(Self::Room),
                _ => error.get_ref().and_then(|inner| Self::of(inner)),
            },
        }
    }

    fn of_number(number: i32) -> Option<Self> {
        match Errno::from_raw_os_error(number) {
            Errno::MFILE | Errno::NFILE => Some(Self::Files),
            Errno::AGAIN => Some(Self::Processes),
            Errno::NOMEM => Some(Self::Memory),
            Errno::NOSPC | Errno::DQUOT => Some(Self::Room),
            Errno::FBIG => Some(Self::FileSize),
            _ => None,
        }
    }

    /// A hint about what to type next.
    pub const fn hint(self) -> &'static str {
        match self {
            Self::Files => {
                "raise the limit of open files, `ulimit -Hn 65536` (systemd: LimitNOFILE=65536; docker: --ulimit \
                 nofile=65536), and start again"
            }
            Self::Processes => {
                "raise the limit of processes and threads, `ulimit -u` (systemd: TasksMax=; docker: --pids-limit), \
                 and start again"
            }
            Self::Memory => {
                "free memory, raise the container's limit, or take a larger machine, and start again; `trainer doctor \
                 CONFIG` says how much a run takes"
            }
            Self::Room => "free space there (`df -h` shows how much is left), and start again",
            Self::FileSize => {
                "raise the limit of a file's size, `ulimit -f unlimited` (systemd: LimitFSIZE=infinity; docker: \
                 --ulimit fsize=-1), and start again"
            }
        }
    }
}

/// Whether LibTorch's message says that memory ran out, on a GPU or on the host: its own allocators', CUDA's, cuBLAS's
/// and NCCL's.
pub fn is_out_of_memory(words: &str) -> bool {
    const WORDS: [&str; 6] = [
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "cudaErrorMemoryAllocation",
    ];
    WORDS.iter().any(|said| words.contains(said))
}

/// What a worker says of the micro-batch that would fit where memory ran out, sequences. Its agent hears it
/// ([`fitting`]).
pub fn would_fit(micro_batch: u32) -> String {
    format!("{BEFORE}{micro_batch}{BEHIND}")
}

/// The micro-batch that these words say would fit.
pub fn fitting(words: &str) -> Option<u32> {
    let (before, _) = words.split_once(BEHIND)?;
    before.rsplit_once(BEFORE)?.1.parse().ok()
}

const BEFORE: &str = "micro-batch ";
const BEHIND: &str = " would fit";

/// Raises the limit of open files as far as the system allows: shells and service managers give 1,024, too few for many
/// connections and shards. Children inherit it.
pub fn allow_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(FILES, |most| most.min(FILES));
    if limit.current.is_some_and(|current| current < wanted) {
        // If it is refused, the limit stays as it is.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum });
    }
}

/// The limit of open files; `None`: there is none.
pub fn open_files() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_micro_batch_that_would_fit_is_heard_among_other_words() {
        let words = format!("worker 1: {}: compute attention: CUDA out of memory", would_fit(12));
        assert_eq!(fitting(&words), Some(12));
        for none in ["", "out of memory", "micro-batch x would fit", "it would fit", "micro-batch 4 would be better"] {
            assert_eq!(fitting(none), None, "{none}");
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] io::Error);

    #[test]
    fn a_shortage_is_found_anywhere_in_the_chain() {
        for (number, shortage) in [
            (24, Some(Shortage::Files)),
            (23, Some(Shortage::Files)),
            (11, Some(Shortage::Processes)),
            (12, Some(Shortage::Memory)),
            (28, Some(Shortage::Room)),
            (122, Some(Shortage::Room)),
            (27, Some(Shortage::FileSize)),
            (2, None),
            (13, None),
        ] {
            let error = || io::Error::from_raw_os_error(number);
            assert_eq!(Shortage::of(&error()), shortage, "{number}");
            assert_eq!(Shortage::of(&Outer(error())), shortage, "{number}");
            assert_eq!(Shortage::of(&Outer(io::Error::other(error()))), shortage, "{number}");
            assert_eq!(Shortage::of(&io::Error::other(Outer(error()))), shortage, "{number}");
            assert_eq!(Shortage::of(&Errno::from_raw_os_error(number)), shortage, "{number}");
        }
        assert_eq!(Shortage::of(&io::Error::from(io::ErrorKind::OutOfMemory)), Some(Shortage::Memory));
        assert_eq!(Shortage::of(&io::Error::other("os error 24")), None, "words are no number");
        for number in [24, 23, 11, 12, 28, 122, 27] {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(Shortage::in_words(&format!("gloo: {error}")), Shortage::of(&error), "{error}");
        }
        assert_eq!(Shortage::in_words("killed by signal 11"), None);
    }

    #[test]
    fn messages_of_a_full_gpu_and_a_full_host_are_recognised() {
        for said in [
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.06 GiB",
            "CUDA error: out of memory",
            "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate \
             8 bytes",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'",
        ] {
            assert!(is_out_of_memory(said), "{said}");
        }
        for said in ["CUDA error: an illegal memory access was encountered", "killed by signal 11", ""] {
            assert!(!is_out_of_memory(said), "{said}");
        }
    }

    #[test]
    fn a_low_soft_limit_of_open_files_is_raised() {
        let before = getrlimit(Resource::Nofile);
        let low = Rlimit { current: Some(256), maximum: before.maximum };
        if before.maximum.is_some_and(|most| most <= 256) || setrlimit(Resource::Nofile, low).is_err() {
            return;
        }
        allow_open_files();
        let after = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, before).unwrap();
        assert_eq!(after.current, Some(before.maximum.map_or(FILES, |most| most.min(FILES))));
    }
}
