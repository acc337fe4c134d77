//! A checkpoint that comes from other nodes' slots over real connections, and from the store where they fail.

use bytes::Bytes;
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

use super::*;
use crate::{
    agent::save::{
        gather::{Fetch, Fetched},
        shelf::{self, Lent, Shelf},
        slots::Slots,
    },
    checkpoint::{restore::RemoteFile, testing::memory_store},
    ids::{Generation, NodeId, RunId, SlotCount, Step},
    rendezvous::channel::{Known, Listener},
    snapshot::image::SharedImage,
    storage::Store,
};

/// Bytes of a file, longer than two frames.
const LEN: usize = 150_000;

fn wanted() -> Wanted {
    Wanted { generation: Generation(5), step: Step(12), of: Generation(4) }
}

fn node(name: &str) -> Arc<LocalNode> {
    Arc::new(LocalNode::new(RunId::new("run").unwrap(), NodeId::new(name).unwrap()).unwrap())
}

fn content(file: usize) -> Vec<u8> {
    (0..LEN).map(|at| (at * 31 + at / 256 * 7 + file * 101) as u8).collect()
}

fn name(file: usize) -> String {
    format!("f{file}")
}

/// A node that lends these files from a slot.
struct Owner {
    shelf: Arc<Shelf>,
    image: SharedImage,
    peer: Peer,
    listener: Listener<String, String>,
    _serving: JoinSet<()>,
}

impl Owner {
    async fn of(me: &str, reader: &LocalNode, files: &[usize]) -> Self {
        let me = node(me);
        let image = SharedImage::create("test").unwrap();
        image.grow((files.len() * LEN) as u64).unwrap();
        let map = image.map().unwrap();
        let places: Vec<_> = (0..files.len()).map(|at| (at * LEN) as u64..((at + 1) * LEN) as u64).collect();
        for (chunk, file) in map.chunks(&places).unwrap().iter_mut().zip(files) {
            chunk.as_mut().copy_from_slice(&content(*file));
        }
        let files = files.iter().zip(places).map(|(file, place)| (name(*file), (0, place))).collect();
        let shelf = Arc::new(Shelf::default());
        shelf.put(Lent { wanted: wanted(), members: [reader.node.clone()].into(), slots: vec![map], files });
        let (id, key) = (reader.node.clone(), reader.identity.key().clone());
        let known: Known = Arc::new(move |it| (*it == key).then(|| id.clone()));
        let (tell, callers) = mpsc::channel(shelf::WAITING);
        let (at, settings) = ("127.0.0.1:0".parse().unwrap(), LinkSettings::default());
        let peer = me.as_peer();
        let listener = Listener::bind_for(at, me, known, settings, Some(tell)).await.unwrap();
        let serving = JoinSet::from_iter([shelf::serve(shelf.clone(), callers)]);
        Self { shelf, image, peer, listener, _serving: serving }
    }

    /// Its workers' last words: a byte in the slot is another one.
    fn scribbles_at(&self, at: u64) {
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
        let mut chunks = self.image.map().unwrap().chunks(&[at..at + 1]).unwrap();
        chunks[0].as_mut()[0] ^= 1;
    }
}

/// A node that needs a checkpoint of `count` files, which the store has but for those that are `hidden`.
struct Need {
    me: Arc<LocalNode>,
    files: Vec<RemoteFile>,
    store: Store,
    slots: Slots,
}

impl Need {
    async fn of(me: Arc<LocalNode>, count: usize, hidden: &[usize]) -> Self {
        let store = memory_store();
        let mut files = Vec::new();
        for file in 0..count {
            let body = Bytes::from(content(file));
            files.push(RemoteFile { name: name(file), bytes: LEN as u64, crc64: Some(Crc64::of(&body)) });
            if !hidden.contains(&file) {
                store.put(&format!("c/{}", name(file)), body).await.unwrap();
            }
        }
        Self { me, files, store, slots: Slots::create(SlotCount::TWO).unwrap() }
    }

    /// What a fetch has brought; every byte of it is right.
    async fn fetched(&mut self, owners: &[&Owner]) -> Fetched {
        let fetch = self.fetch(owners);
        let (done, mut result) = mpsc::unbounded_channel();
        let fetching = fetch.start(self.store.clone(), "c".into(), Some(Step(12)), done);
        let fetched = result.recv().await.unwrap().unwrap();
        self.slots.received(Step(12), Generation(4), fetching.slot, &fetching.places, &self.files);
        assert!(self.slots.verify(fetching.slot).await, "every byte is that of the checkpoint");
        assert_eq!(fetched.bytes, (self.files.len() * LEN) as u64);
        fetched
    }

    fn fetch(&mut self, owners: &[&Owner]) -> Fetch {
        let nodes = owners.iter().map(|owner| (owner.peer.clone(), owner.listener.address())).collect();
        let neighbours = Neighbours { me: self.me.clone(), settings: LinkSettings::default(), nodes };
        let fetch = self.slots.receive(self.files.clone(), 40_000).unwrap();
        Fetch { neighbours: Some((neighbours, wanted())), ..fetch }
    }
}

fn of_files(count: usize) -> u64 {
    (count * LEN) as u64
}

#[tokio::test]
async fn files_come_from_the_nodes_that_have_them_and_the_rest_from_the_store() {
    let me = node("me");
    let (one, two) = (Owner::of("one", &me, &[0, 1]).await, Owner::of("two", &me, &[1, 2]).await);
    let mut need = Need::of(me, 4, &[0, 1, 2]).await;
    let fetched = need.fetched(&[&one, &two]).await;
    assert_eq!((fetched.lent, fetched.stored), (of_files(3), of_files(1)));
    assert!(!one.image.is_lent() && !two.image.is_lent());
}

#[tokio::test]
async fn bytes_of_a_node_that_are_not_the_file_are_read_from_the_store() {
    let me = node("me");
    let owner = Owner::of("one", &me, &[0, 1]).await;
    owner.scribbles_at(LEN as u64 - 1);
    let mut need = Need::of(me, 2, &[1]).await;
    let fetched = need.fetched(&[&owner]).await;
    assert_eq!((fetched.lent, fetched.stored), (of_files(1), of_files(1)), "one file is wrong, the next one is not");
}

#[tokio::test]
async fn a_file_that_one_node_gives_wrongly_comes_from_another_one_that_has_it() {
    let me = node("me");
    let (one, two) = (Owner::of("one", &me, &[0, 1]).await, Owner::of("two", &me, &[0, 1]).await);
    // Each is asked for one of them first, and whoever is asked for the first one gives other bytes.
    one.scribbles_at(7);
    let mut need = Need::of(me.clone(), 2, &[0, 1]).await;
    let fetched = need.fetched(&[&one, &two]).await;
    assert_eq!((fetched.lent, fetched.stored), (of_files(2), 0), "the store has none of them");
    // Both are wrong: the store has it.
    two.scribbles_at(9);
    let mut need = Need::of(me, 2, &[1]).await;
    let fetched = need.fetched(&[&one, &two]).await;
    assert_eq!((fetched.lent, fetched.stored), (of_files(1), of_files(1)));
}

/// One of them stops lending in the middle; the other one has all of it.
#[tokio::test]
async fn what_a_node_that_dies_has_not_given_comes_from_another_one() {
    let me = node("me");
    let (mut one, two) = (Owner::of("one", &me, &[0, 1]).await, Owner::of("two", &me, &[0, 1]).await);
    let nodes = [&one, &two].map(|owner| (owner.peer.clone(), owner.listener.address())).into();
    let lenders = Neighbours { me, settings: LinkSettings::default(), nodes }.ask(&wanted()).await;
    one._serving.shutdown().await;
    let borrowed = read(divide(lenders, two_files()).of).await;
    assert_eq!((borrowed.files, borrowed.bytes, borrowed.left.len()), (2, of_files(2), 0));
}

#[tokio::test]
async fn nodes_that_are_gone_refuse_or_do_not_know_this_one_leave_it_to_the_store() {
    let me = node("me");
    let gone = Owner::of("gone", &me, &[0]).await;
    let (gone_peer, gone_at) = (gone.peer.clone(), gone.listener.address());
    drop(gone);
    let cleared = Owner::of("cleared", &me, &[0]).await;
    cleared.shelf.clear();
    let other = Owner::of("other", &node("me"), &[0]).await;
    let mut need = Need::of(me, 2, &[]).await;
    let fetch = need.fetch(&[&cleared, &other]);
    let Some((mut neighbours, wanted)) = fetch.neighbours else { panic!("no neighbours") };
    neighbours.nodes.push((gone_peer, gone_at));
    assert!(neighbours.ask(&wanted).await.is_empty());
    drop(fetch.pieces);
    let fetched = need.fetched(&[&cleared, &other]).await;
    assert_eq!((fetched.lent, fetched.stored), (0, of_files(2)));
}

/// Pieces of two files of one node.
fn two_files() -> Vec<Lacking<Vec<u8>>> {
    let file = |file| {
        let crc64 = Some(Crc64::of(&content(file)));
        let piece = |offset: u64, len: u64| {
            let piece = crate::checkpoint::restore::Piece { file: 0, offset, len, image_offset: offset };
            (piece, vec![0; len as usize])
        };
        let pieces = vec![piece(100_000, 50_000), piece(0, 100_000)];
        Lacking { file: RemoteFile { name: name(file), bytes: LEN as u64, crc64 }, pieces }
    };
    vec![file(0), file(1)]
}

#[tokio::test]
async fn slots_that_are_given_out_meanwhile_leave_what_is_missing_to_the_store() {
    let me = node("me");
    let owner = Owner::of("one", &me, &[0, 1]).await;
    let nodes = vec![(owner.peer.clone(), owner.listener.address())];
    let neighbours = Neighbours { me, settings: LinkSettings::default(), nodes };
    let lenders = neighbours.ask(&wanted()).await;
    assert_eq!(lenders.len(), 1);
    owner.shelf.clear();
    let borrowed = read(divide(lenders, two_files()).of).await;
    assert_eq!((borrowed.files, borrowed.left.len()), (0, 2));
}

#[tokio::test]
async fn a_node_that_dies_while_it_lends_leaves_the_rest_to_the_store() {
    let me = node("me");
    let mut owner = Owner::of("one", &me, &[0, 1]).await;
    let nodes = vec![(owner.peer.clone(), owner.listener.address())];
    let neighbours = Neighbours { me, settings: LinkSettings::default(), nodes };
    let lenders = neighbours.ask(&wanted()).await;
    owner._serving.shutdown().await;
    let reading: JoinHandle<Borrowed<Vec<u8>>> = tokio::spawn(read(divide(lenders, two_files()).of));
    let borrowed = reading.await.unwrap();
    assert_eq!((borrowed.files, borrowed.left.len()), (0, 2));
    assert!(borrowed.left.iter().all(|it| it.pieces.len() == 2), "each piece still has its memory");
}

#[tokio::test]
async fn pieces_in_any_order_are_one_file() {
    let me = node("me");
    let owner = Owner::of("one", &me, &[0, 1]).await;
    let nodes = vec![(owner.peer.clone(), owner.listener.address())];
    let lenders = Neighbours { me, settings: LinkSettings::default(), nodes }.ask(&wanted()).await;
    let borrowed = read(divide(lenders, two_files()).of).await;
    assert_eq!((borrowed.files, borrowed.bytes, borrowed.left.len()), (2, of_files(2), 0));
}

#[test]
fn files_are_shared_out_by_their_bytes() {
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<HashSet<String>>();
    let (all, some) = (names(&["a", "b", "c", "d"]), names(&["c"]));
    let files = [("a", 1), ("b", 3), ("c", 6), ("d", 3), ("e", 9)];
    // Both give 6 bytes when the smallest is shared out.
    let shares = share(&files, &[&all, &all]);
    assert_eq!(shares, [Some(0), Some(1), Some(0), Some(1), None]);
    assert_eq!(share(&files, &[&some, &all]), [Some(1), Some(1), Some(0), Some(1), None]);
    assert_eq!(share(&files, &[&some]), [None, None, Some(0), None, None]);
    assert_eq!(share(&files, &[]), [None; 5]);
}
