//! Threads that run only while a core would be idle, and work that is shared by as many threads as there are.
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

/// Does `work` on this thread, and on as many others as the system gives of the rest of `threads`; returns what each
/// returned, or panicked with. `work` takes its share from what all have in common.
pub fn together<T: Send>(threads: usize, work: impl Fn() -> T + Sync) -> Vec<std::thread::Result<T>> {
    with_builder(std::thread::Builder::new, threads, work)
}

fn with_builder<T: Send>(
    builder: impl Fn() -> std::thread::Builder,
    threads: usize,
    work: impl Fn() -> T + Sync,
) -> Vec<std::thread::Result<T>> {
    std::thread::scope(|scope| {
        let work = &work;
        // A limit of threads or of memory (`ulimit -u`, a container's) makes it slower, and fails nothing.
        let spawn = |_| builder().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).map_while(spawn).collect();
        let mine = work();
        std::iter::once(Ok(mine)).chain(others.into_iter().map(|other| other.join())).collect()
    })
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn threads_that_the_system_refuses_make_work_slower_and_lose_none() {
        // No system has room for such a stack.
        let refused = || std::thread::Builder::new().stack_size(1 << 60);
        for (builder, most) in [(&refused as &dyn Fn() -> std::thread::Builder, 1), (&std::thread::Builder::new, 4)] {
            let next = AtomicU32::new(0);
            let done = with_builder(builder, 4, || {
                let mut mine = Vec::new();
                loop {
                    match next.fetch_add(1, Ordering::Relaxed) {
                        number if number < 100 => mine.push(number),
                        _ => return mine,
                    }
                }
            });
            assert_eq!(done.len(), most);
            let mut all: Vec<_> = done.into_iter().flat_map(|mine| mine.unwrap()).collect();
            all.sort_unstable();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
        }
    }
}
