//! The last words of ranks whose group is broken: NCCL's flight recorder, asked before the workers are killed.
//!
//! One byte into a rank's pipe, and it writes which collectives it has begun and ended
//! ([`crate::workload::Collectives`]). The traces are kept in the store beside the node's heartbeat, where somebody
//! finds them who wants to know which rank was missing: `nodes/<id>/trace-g0003-r00002`, in LibTorch's own format, to
//! be read with PyTorch's `fr_trace`.
//!
//! Best effort and bounded: ranks have [`WAIT`] to write, a trace has at most [`MOST`] bytes, a node keeps those of its
//! first [`KEPT`] ranks a generation, and a put that takes longer than [`PUT`] is given up. Without NCCL there is no
//! pipe, and nothing is waited for.
//!
//! Those of the [`INCIDENTS`] newest generations that left any are kept, of all nodes; the leader deletes the others
//! when it has kept its own. So they take little room, and a listing of the heartbeats beside them stays short.
//!
//! *Crash, cancel:* traces are lost, or older ones stay: the next leader that keeps its own lists and deletes them.
//! *Retry:* none.

use std::{collections::BTreeSet, os::unix::fs::OpenOptionsExt, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    ids::{Generation, NodeId, NodeRanks, Rank},
    layout,
    storage::{StorageError, Store},
    workload::{Collectives, Recorder},
};

/// How long killing the workers waits for their traces.
const WAIT: Duration = Duration::from_millis(1500);
/// The pause between two looks at the files.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes of a trace that are kept.
const MOST: u64 = 4 << 20;
/// Ranks of a node whose traces are kept.
const KEPT: usize = 16;
/// Generations whose traces are kept.
const INCIDENTS: usize = 3;
/// How long the store may take for one.
const PUT: Duration = Duration::from_secs(10);
/// How long deleting older ones may take; the rest is left to the next time.
const PRUNING: Duration = Duration::from_secs(60);

/// The traces of a node's ranks in one generation.
#[derive(Clone, Debug)]
pub struct Traces {
    /// Where they are asked for.
    pub collectives: Arc<Collectives>,
    /// The run's folder.
    pub run: Store,
    /// This node.
    pub node: NodeId,
    /// The generation.
    pub generation: Generation,
    /// Its ranks.
    pub ranks: NodeRanks,
}

impl Traces {
    /// Asks every rank, and waits until those that could be asked have written, for a bounded time.
    pub async fn ask(&self) -> Vec<(Rank, Bytes)> {
        let Some(recorder) = self.collectives.recorder() else { return Vec::new() };
        let ranks = self.ranks.locals().take(KEPT).map(|local| self.ranks.rank(local));
        let asked: Vec<Rank> = ranks.filter(|rank| ask(&recorder.pipe(*rank))).collect();
        let until = Instant::now() + WAIT;
        let mut sizes = vec![None; asked.len()];
        while !asked.is_empty() && Instant::now() < until {
            tokio::time::sleep(LOOK).await;
            let now: Vec<Option<u64>> = asked.iter().map(|rank| size(recorder, *rank)).collect();
            // Written to the end, as far as one can see from outside.
            if now == sizes && now.iter().all(Option::is_some) {
                break;
            }
            sizes = now;
        }
        asked.into_iter().filter_map(|rank| Some((rank, read(&recorder.trace(rank))?))).collect()
    }

    /// Keeps them in the store, and deletes those of older generations if this node leads.
    pub async fn keep(&self, traces: Vec<(Rank, Bytes)>) {
        let any = !traces.is_empty();
        for (rank, trace) in traces {
            let key = layout::trace(&self.node, self.generation, rank);
            match self.run.put_once(&key, trace, PUT).await {
                Ok(()) => tracing::info!(%rank, key, "the trace of a rank's collectives is kept"),
                Err(error) => tracing::debug!(%error, %rank, "a trace could not be kept"),
            }
        }
        if any && self.ranks.first == Rank(0) {
            match tokio::time::timeout(PRUNING, self.prune()).await {
                Ok(Ok(0)) => {}
                Ok(Ok(deleted)) => tracing::info!(deleted, "traces of older generations are deleted"),
                Ok(Err(error)) => tracing::debug!(%error, "traces of older generations could not be deleted"),
                Err(_) => tracing::debug!("traces of older generations could not be deleted in time"),
            }
        }
    }

    /// Deletes the traces of all but the newest generations that have any; how many those were.
    async fn prune(&self) -> Result<usize, StorageError> {
        let listed = self.run.list(&format!("{}/", layout::NODES)).await?;
        let found: Vec<(Generation, String)> = listed
            .into_iter()
            .filter_map(|object| Some((layout::trace_generation(&object.key)?, object.key)))
            .collect();
        let generations: BTreeSet<Generation> = found.iter().map(|(generation, _)| *generation).collect();
        let kept: BTreeSet<Generation> = generations.into_iter().rev().take(INCIDENTS).collect();
        let mut deleted = 0;
        for (_, key) in found.iter().filter(|(generation, _)| !kept.contains(generation)) {
            self.run.delete(key).await?;
            deleted += 1;
        }
        Ok(deleted)
    }
}

/// Whether the rank has a pipe that it reads, and was asked.
fn ask(pipe: &Path) -> bool {
    use std::io::Write;
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    let Ok(flags) = i32::try_from(flags) else { return false };
    let opened = std::fs::File::options().write(true).custom_flags(flags).open(pipe);
    opened.is_ok_and(|mut pipe| pipe.write_all(b"1").is_ok())
}

fn size(recorder: &Recorder, rank: Rank) -> Option<u64> {
    let meta = std::fs::metadata(recorder.trace(rank)).ok()?;
    Some(meta.len()).filter(|len| *len > 0)
}

fn read(path: &Path) -> Option<Bytes> {
    use std::io::Read;
    let mut trace = Vec::new();
    std::fs::File::open(path).ok()?.take(MOST).read_to_end(&mut trace).ok()?;
    (!trace.is_empty()).then(|| trace.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::{checkpoint::testing::memory_store, ids::WorldSize};

    fn traces(collectives: Collectives) -> Traces {
        let ranks = NodeRanks { first: Rank(4), workers: 3, world: WorldSize(8) };
        let node = NodeId::new("n1").unwrap();
        Traces { collectives: Arc::new(collectives), run: memory_store(), node, generation: Generation(3), ranks }
    }

    fn pipe(path: &Path) {
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    }

    #[tokio::test]
    async fn a_rank_that_is_asked_writes_its_trace_and_it_is_kept() {
        let traces = traces(Collectives::on_gpus("127.0.0.1".parse().unwrap()));
        let recorder = traces.collectives.recorder().unwrap();
        // Rank 4 answers; rank 5 has a pipe that nobody reads; rank 6 has none, as without NCCL.
        pipe(&recorder.pipe(Rank(4)));
        pipe(&recorder.pipe(Rank(5)));
        let (from, to) = (recorder.pipe(Rank(4)), recorder.trace(Rank(4)));
        let (ready, is_ready) = std::sync::mpsc::channel();
        let rank = std::thread::spawn(move || {
            // As LibTorch opens it: at once, though nobody writes.
            let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap();
            let mut pipe = std::fs::File::options().read(true).custom_flags(flags).open(from).unwrap();
            ready.send(()).unwrap();
            let mut byte = [0];
            while !matches!(pipe.read(&mut byte), Ok(1)) {
                std::thread::yield_now();
            }
            std::fs::write(to, vec![byte[0]; 5 << 20]).unwrap();
        });
        is_ready.recv().unwrap();
        let asked = traces.ask().await;
        rank.join().unwrap();
        let [(Rank(4), trace)] = &asked[..] else { panic!("{} ranks", asked.len()) };
        assert!(trace.len() as u64 <= MOST && trace.iter().all(|byte| *byte == b'1'), "{} bytes", trace.len());
        traces.keep(asked.clone()).await;
        let key = "nodes/n1/trace-g0003-r00004";
        assert_eq!(traces.run.get(key, MOST).await.unwrap(), asked[0].1);
        assert_eq!(layout::heartbeat_node(key), None, "no heartbeat");
    }

    #[tokio::test]
    async fn the_leader_deletes_the_traces_of_all_but_the_three_newest_generations_that_have_any() {
        let mut traces = traces(Collectives::default());
        let others = [("n1", 3), ("n2", 3), ("n2", 4), ("gone", 9), ("n1", 12)]
            .map(|(node, generation)| layout::trace(&NodeId::new(node).unwrap(), Generation(generation), Rank(7)));
        let beside = ["nodes/n1.json", "nodes/n1/trace-g0001-r7", "nodes/n1/notes.txt"].map(str::to_owned);
        for key in others.iter().chain(&beside) {
            traces.run.put(key, b"x".as_slice().into()).await.unwrap();
        }
        let keys = async |traces: &Traces| -> BTreeSet<String> {
            traces.run.list("nodes/").await.unwrap().into_iter().map(|object| object.key).collect()
        };
        let before = keys(&traces).await;
        (traces.generation, traces.ranks.first) = (Generation(20), Rank(1));
        traces.keep(vec![(Rank(1), Bytes::from_static(b"y"))]).await;
        traces.ranks.first = Rank(0);
        traces.keep(Vec::new()).await;
        let own = "nodes/n1/trace-g0020-r00001".to_owned();
        let all: BTreeSet<String> = before.iter().cloned().chain([own]).collect();
        assert_eq!(keys(&traces).await, all, "a follower, and a leader without traces, delete nothing");
        traces.keep(vec![(Rank(0), Bytes::from_static(b"y"))]).await;
        let own = "nodes/n1/trace-g0020-r00000".to_owned();
        let left: BTreeSet<String> = all.into_iter().filter(|key| !others[..3].contains(key)).chain([own]).collect();
        assert_eq!(keys(&traces).await, left);
    }

    /// If it were waited for without end, this test would not end.
    #[tokio::test]
    async fn a_rank_that_does_not_answer_is_not_waited_for_for_ever_and_without_nccl_nobody_is() {
        assert!(traces(Collectives::default()).ask().await.is_empty());
        let silent = traces(Collectives::on_gpus("127.0.0.1".parse().unwrap()));
        assert!(silent.ask().await.is_empty());
        let recorder = silent.collectives.recorder().unwrap();
        pipe(&recorder.pipe(Rank(5)));
        let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap();
        let _reader = std::fs::File::options().read(true).custom_flags(flags).open(recorder.pipe(Rank(5))).unwrap();
        assert!(silent.ask().await.is_empty());
    }
}
