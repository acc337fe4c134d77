//! Threads that run only while a core would be idle.
//!
//! Linux's `SCHED_IDLE` (sched(7)) gives a thread a core when no other thread wants it, and takes it away at once when
//! one does; it needs no privilege. Copies of snapshots and transfers of checkpoints run this way, so they take no time
//! from training.

use thread_priority::{
    ThreadPriority,
    unix::{NormalThreadSchedulePolicy, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id},
};

/// The niceness if the kernel refuses the idle policy.
const NICENESS: i32 = 19;

/// From now on the calling thread yields to all others. If the kernel refuses that, it competes a little.
pub fn give_way() {
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    if let Err(error) = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle) {
        tracing::debug!(?error, "thread keeps its scheduling policy");
        // On Linux this affects only the calling thread.
        let _ = rustix::process::setpriority_process(None, NICENESS);
    }
}

/// For tests.
#[cfg(test)]
pub(crate) mod testing {
    /// The number of the policy that [`super::give_way`] asks for (sched(7)).
    pub(crate) const SCHED_IDLE: u32 = 5;

    /// The scheduling policy of this thread: field 41 of proc(5)'s `stat`.
    pub(crate) fn policy() -> u32 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(38).unwrap().parse().unwrap()
    }
}
