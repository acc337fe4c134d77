//! What this node's slots lend to the other nodes while their generation loads.
//!
//! A generation begins: each of its nodes puts the files that its slots hold of the checkpoint to load onto its shelf
//! ([`Shelf::put`]), and the other members read those that they lack there, over bulk connections
//! ([`crate::rendezvous::channel::bulk`]). The leader lets the ranks go when every member has all files. So when the
//! slots are given out to captures again, nobody needs them any more, and the shelf is cleared before that
//! ([`Shelf::clear`]).
//!
//! A node that leaves puts what the others will lack onto its shelf for the generation that follows without it, and
//! waits until they have read it ([`Shelf::is_read_by`]).
//!
//! # Invariants
//! - Bytes of a slot are read under the shelf's lock alone, a frame at a time, into memory of the connection: no loan
//!   of a slot outlives a frame, and when [`Shelf::clear`] returns, nobody reads a slot and nobody will. That copy
//!   costs 64 KiB a connection and a fraction of the time that TLS takes for the same bytes.
//! - Files of one checkpoint are lent, to members of one generation. What a file should be, its reader knows from the
//!   manifest: nothing is verified here.
//!
//! *Crash:* the connections break, and the readers go to the store. *Retry:* the reader's. *Cancel:* a shelf that is
//! cleared refuses, in the middle of a file, too.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    sync::{PoisonError, RwLock},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};

use crate::{
    faults::{self, At},
    ids::{Generation, NodeId},
    rendezvous::channel::{
        End,
        bulk::{Caller, Lends, OPENING, Part, Refusal, Wanted},
    },
    snapshot::image::Mapping,
};

/// Reads that are answered at once: more would only share the same wire.
const AT_ONCE: usize = 4;
/// Bulk connections at once; whoever comes then reads the store.
const CALLERS: usize = 256;
/// How long a node that leaves waits for the others to ask: they form a generation without it first.
const ASKING: Duration = Duration::from_secs(10);
/// Those that wait to be taken.
pub const WAITING: usize = 64;
/// How long a node waits for the word that this one takes part in a generation; below [`OPENING`], so that it is told.
const JOINING: Duration = Duration::from_secs(OPENING.as_secs() - 1);

/// The files of a checkpoint that lie in the slots now, and who may read them.
#[derive(Debug)]
pub struct Lent {
    /// The generation that loads it, and the checkpoint.
    pub wanted: Wanted,
    /// The members of that generation.
    pub members: BTreeSet<NodeId>,
    /// The slots' memory.
    pub slots: Vec<Mapping>,
    /// Each file's slot, as an index into `slots`, and its place there.
    pub files: HashMap<String, (usize, Range<u64>)>,
}

/// See the module's header.
#[derive(Debug)]
pub struct Shelf {
    lent: RwLock<Option<Lent>>,
    /// The newest generation for which something was put there.
    newest: watch::Sender<Generation>,
    readers: watch::Sender<Readers>,
}

/// Who has read since something was put there last.
#[derive(Debug, Default)]
struct Readers {
    /// Members that were told what is lent.
    asked: BTreeSet<NodeId>,
    /// Those of them whose connection has ended since.
    ended: BTreeSet<NodeId>,
}

impl Default for Shelf {
    fn default() -> Self {
        Self { lent: RwLock::default(), newest: watch::Sender::new(Generation(0)), readers: watch::Sender::default() }
    }
}

impl Shelf {
    /// From now on members of a generation may read these files.
    pub fn put(&self, lent: Lent) {
        let generation = lent.wanted.generation;
        *self.lent.write().unwrap_or_else(PoisonError::into_inner) = Some(lent);
        self.readers.send_replace(Readers::default());
        self.newest.send_replace(generation);
    }

    /// From now on nobody reads a slot.
    pub fn clear(&self) {
        *self.lent.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Until these nodes have read what they need here. Those that have not asked in a while are not waited for.
    pub async fn is_read_by(&self, nodes: &BTreeSet<NodeId>) {
        let mut readers = self.readers.subscribe();
        let all_asked = readers.wait_for(|readers| nodes.is_subset(&readers.asked));
        let _ = tokio::time::timeout(ASKING, all_asked).await;
        let _ = readers.wait_for(|readers| readers.asked.is_subset(&readers.ended)).await;
    }

    fn has_ended(&self, node: &NodeId) {
        self.readers.send_if_modified(|readers| readers.asked.contains(node) && readers.ended.insert(node.clone()));
    }

    async fn names_within(&self, limit: Duration, node: &NodeId, wanted: &Wanted) -> Result<Vec<String>, Refusal> {
        let mut newest = self.newest.subscribe();
        let joined = newest.wait_for(|newest| *newest >= wanted.generation);
        let _ = tokio::time::timeout(limit, joined).await;
        self.with(node, wanted, |lent| Ok(lent.files.keys().cloned().collect()))
    }

    /// Does `work` with what is lent to this node, if it is what the node wants.
    fn with<T>(
        &self,
        node: &NodeId,
        wanted: &Wanted,
        work: impl FnOnce(&Lent) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let lent = self.lent.read().unwrap_or_else(PoisonError::into_inner);
        let newest = *self.newest.borrow();
        let Some(lent) = lent.as_ref() else {
            return Err(if newest == wanted.generation { Refusal::Over } else { Refusal::Generation });
        };
        if lent.wanted.generation != wanted.generation {
            return Err(Refusal::Generation);
        }
        if !lent.members.contains(node) {
            return Err(Refusal::Member);
        }
        if lent.wanted != *wanted {
            return Err(Refusal::Checkpoint);
        }
        work(lent)
    }
}

impl Lent {
    /// A file's slot, and the place of a part of it there.
    fn find(&self, file: &str, offset: u64, len: u64) -> Result<(&Mapping, Range<u64>), Refusal> {
        let (slot, place) = self.files.get(file).ok_or(Refusal::File)?;
        let start = place.start.checked_add(offset).ok_or(Refusal::Range)?;
        let end = start.checked_add(len).filter(|end| *end <= place.end).ok_or(Refusal::Range)?;
        Ok((self.slots.get(*slot).ok_or(Refusal::File)?, start..end))
    }
}

impl Lends for Shelf {
    async fn names(&self, node: &NodeId, wanted: &Wanted) -> Result<Vec<String>, Refusal> {
        let names = self.names_within(JOINING, node, wanted).await?;
        self.readers.send_if_modified(|readers| readers.asked.insert(node.clone()));
        Ok(names)
    }

    fn may_read(&self, node: &NodeId, wanted: &Wanted, part: &Part) -> Result<(), Refusal> {
        self.with(node, wanted, |lent| lent.find(&part.file, part.offset, part.len).map(|_| ()))
    }

    fn copy(&self, node: &NodeId, wanted: &Wanted, file: &str, offset: u64, into: &mut [u8]) -> Result<(), Refusal> {
        self.with(node, wanted, |lent| {
            let (slot, place) = lent.find(file, offset, into.len() as u64)?;
            // Memory that is being written is no copy of anything.
            let bytes = slot.bytes(place).map_err(|_| Refusal::File)?;
            into.copy_from_slice(&bytes);
            Ok(())
        })?;
        // A test lets a node give other bytes than those of the file, or die here.
        if faults::check("shelf.lends", At { rank: None, step: Some(wanted.step.get()) }).is_err() {
            into.iter_mut().for_each(|byte| *byte = !*byte);
        }
        Ok(())
    }
}

/// Serves the nodes that dial this one to read, until the port closes.
pub async fn serve(shelf: std::sync::Arc<Shelf>, mut callers: mpsc::Receiver<Caller>) {
    let turns = std::sync::Arc::new(Semaphore::new(AT_ONCE));
    let mut serving = JoinSet::new();
    loop {
        let caller = tokio::select! {
            caller = callers.recv() => match caller {
                Some(caller) => caller,
                None => return,
            },
            Some(_) = serving.join_next() => continue,
        };
        if serving.len() >= CALLERS {
            tracing::debug!(node = %caller.node(), "too many nodes read here: this one is turned away");
            continue;
        }
        let (shelf, turns) = (shelf.clone(), turns.clone());
        serving.spawn(async move {
            let node = caller.node().clone();
            let end = caller.serve(&*shelf, &turns).await;
            shelf.has_ended(&node);
            if !matches!(end, End::Closed) {
                tracing::debug!(%node, %end, "a node has stopped reading here");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ids::Step, snapshot::image::SharedImage};

    fn wanted() -> Wanted {
        Wanted { generation: Generation(5), step: Step(12), of: Generation(4) }
    }

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn part(file: &str, offset: u64, len: u64) -> Part {
        Part { file: file.into(), offset, len }
    }

    /// A slot of 10,000 bytes that holds one file from its byte 100 on, and a member who may read it.
    fn lent() -> (SharedImage, Lent) {
        let image = SharedImage::create("test").unwrap();
        image.grow(10_000).unwrap();
        let map = image.map().unwrap();
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
        map.chunks(&[0..10_000]).unwrap()[0].as_mut().iter_mut().zip(0..).for_each(|(byte, at)| *byte = at as u8);
        let files = HashMap::from([("f".to_owned(), (0, 100..1100))]);
        (image, Lent { wanted: wanted(), members: BTreeSet::from([node("b")]), slots: vec![map], files })
    }

    #[tokio::test]
    async fn members_read_the_files_of_the_checkpoint_and_nothing_beside_them() {
        let shelf = Shelf::default();
        let (image, lent) = lent();
        assert_eq!(shelf.may_read(&node("b"), &wanted(), &part("f", 0, 1)), Err(Refusal::Generation));
        shelf.put(lent);
        assert_eq!(shelf.names(&node("b"), &wanted()).await, Ok(vec!["f".to_owned()]));
        let mut bytes = [0; 1000];
        shelf.copy(&node("b"), &wanted(), "f", 0, &mut bytes).unwrap();
        assert!(bytes.iter().zip(100_u32..).all(|(byte, at)| *byte == at as u8));
        assert!(!image.is_lent(), "no loan outlives a frame");
        // Whoever waits for its readers waits for the end of their connections.
        let readers = BTreeSet::from([node("b")]);
        let mut waiting = std::pin::pin!(shelf.is_read_by(&readers));
        assert!(futures::poll!(&mut waiting).is_pending());
        shelf.has_ended(&node("c"));
        assert!(futures::poll!(&mut waiting).is_pending());
        shelf.has_ended(&node("b"));
        waiting.await;
        for (who, what, part, refusal) in [
            ("c", wanted(), part("f", 0, 1), Refusal::Member),
            ("b", Wanted { generation: Generation(4), ..wanted() }, part("f", 0, 1), Refusal::Generation),
            ("b", Wanted { step: Step(11), ..wanted() }, part("f", 0, 1), Refusal::Checkpoint),
            ("b", Wanted { of: Generation(3), ..wanted() }, part("f", 0, 1), Refusal::Checkpoint),
            ("b", wanted(), part("g", 0, 1), Refusal::File),
            ("b", wanted(), part("f", 999, 2), Refusal::Range),
            ("b", wanted(), part("f", u64::MAX, 1), Refusal::Range),
            ("b", wanted(), part("f", 0, u64::MAX), Refusal::Range),
        ] {
            assert_eq!(shelf.may_read(&node(who), &what, &part), Err(refusal), "{who} {what:?} {part:?}");
            let copied = shelf.copy(&node(who), &what, &part.file, part.offset, &mut bytes[..part.len.min(2) as usize]);
            assert!(copied == Err(refusal) || part.len == u64::MAX, "{who} {what:?} {part:?}");
        }
    }

    #[tokio::test]
    async fn a_cleared_shelf_leaves_the_slots_to_their_writers() {
        let shelf = Shelf::default();
        let (image, lent) = lent();
        shelf.put(lent);
        assert!(shelf.may_read(&node("b"), &wanted(), &part("f", 0, 1)).is_ok());
        shelf.clear();
        assert_eq!(shelf.may_read(&node("b"), &wanted(), &part("f", 0, 1)), Err(Refusal::Over));
        assert_eq!(shelf.copy(&node("b"), &wanted(), "f", 0, &mut [0]), Err(Refusal::Over));
        assert_eq!(shelf.names(&node("b"), &wanted()).await, Err(Refusal::Over));
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
        let writable = image.map().unwrap().chunks(&[0..10_000]).is_ok();
        assert!(writable);
    }

    #[tokio::test]
    async fn memory_that_is_being_written_is_not_read() {
        let shelf = Shelf::default();
        let (image, lent) = lent();
        shelf.put(lent);
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
        let _writing = image.map().unwrap().chunks(&[0..1]).unwrap();
        assert_eq!(shelf.copy(&node("b"), &wanted(), "f", 0, &mut [0]), Err(Refusal::File));
    }

    #[tokio::test]
    async fn who_asks_too_early_waits_until_this_node_takes_part() {
        let shelf = std::sync::Arc::new(Shelf::default());
        let (_image, lent) = lent();
        let asking = tokio::spawn({
            let shelf = shelf.clone();
            async move { shelf.names(&node("b"), &wanted()).await }
        });
        while shelf.newest.receiver_count() == 0 {
            tokio::task::yield_now().await;
        }
        assert!(!asking.is_finished());
        shelf.put(lent);
        assert_eq!(asking.await.unwrap(), Ok(vec!["f".to_owned()]));
    }

    #[tokio::test]
    async fn who_asks_for_a_generation_that_never_comes_is_refused_in_the_end() {
        let shelf = Shelf::default();
        let limit = Duration::from_millis(20);
        assert_eq!(shelf.names_within(limit, &node("b"), &wanted()).await, Err(Refusal::Generation));
    }
}
