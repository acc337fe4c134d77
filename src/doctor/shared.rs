//! The shared memory of this machine's GPUs.
//!
//! Where GPUs can't read each other's memory, NCCL moves gradients through files in `/dev/shm`. A container has 64 MiB
//! there unless it was started otherwise, and NCCL then fails when the group is made ("No space left on device").

use super::verdict::Line;
use crate::report::human;

const CHECK: &str = "shared memory";
/// From here on there is room for the buffers of a machine with 8 GPUs.
const ENOUGH: u64 = 1 << 30;

/// The line about `/dev/shm` on a machine with this number of GPUs that LibTorch can use; `None`: nobody needs it.
pub(super) fn look(gpus: u32) -> Option<Line> {
    let bytes = rustix::fs::statvfs("/dev/shm").ok().map(|found| found.f_blocks.saturating_mul(found.f_frsize));
    line(gpus, bytes)
}

/// `bytes`: how large `/dev/shm` is; `None`: there is none.
fn line(gpus: u32, bytes: Option<u64>) -> Option<Line> {
    let todo =
        "start the container with --ipc=host or --shm-size=8g; on a bare machine: mount -o remount,size=8G /dev/shm";
    match bytes {
        _ if gpus < 2 => None,
        Some(bytes) if bytes >= ENOUGH => Some(Line::ok(CHECK, format!("{} in /dev/shm", human::bytes(bytes)))),
        Some(bytes) => {
            let found =
                format!("{} in /dev/shm: GPUs that exchange gradients through it need more", human::bytes(bytes));
            Some(Line::warn(CHECK, found, todo))
        }
        None => {
            Some(Line::warn(CHECK, "there is no /dev/shm, through which GPUs may have to exchange gradients", todo))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn several_gpus_want_room_to_exchange_gradients() {
        let verdict = |gpus, bytes| line(gpus, bytes).map(|line| line.verdict);
        for (gpus, bytes, expected) in [
            (0, Some(0), None),
            (1, Some(64 << 20), None),
            (1, None, None),
            (2, Some(64 << 20), Some(Verdict::Warn)),
            (8, Some(ENOUGH - 1), Some(Verdict::Warn)),
            (8, Some(ENOUGH), Some(Verdict::Ok)),
            (2, None, Some(Verdict::Warn)),
        ] {
            assert_eq!(verdict(gpus, bytes), expected, "{gpus} GPUs, {bytes:?}");
        }
        let line = line(2, Some(64 << 20)).unwrap();
        assert!(line.found.contains("64") && line.todo.is_some_and(|todo| todo.contains("--shm-size")));
    }

    #[test]
    fn the_kernel_says_how_large_it_is() {
        // A machine without the folder is warned, too.
        assert!(look(2).is_some());
        assert_eq!(look(1), None);
    }
}
