//! Bytes between two nodes over real sockets: what arrives, what is refused, and what a liar on either side achieves.

use std::{collections::HashMap, sync::Arc};

use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    super::{
        Listener,
        testing::{Nodes, PATIENT, TestLink, TestListener, node, say as says},
    },
    *,
};

/// Two files, for one node.
struct Stock {
    files: HashMap<String, Vec<u8>>,
    reader: NodeId,
    /// From this byte of a file on nothing is given any more.
    until: u64,
}

fn wanted() -> Wanted {
    Wanted { generation: Generation(5), step: Step(12), of: Generation(4) }
}

/// Bytes that no shift or swap leaves as they are.
fn content(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]).collect()
}

impl Stock {
    fn find(&self, node: &NodeId, asked: &Wanted, file: &str, offset: u64, len: u64) -> Result<&[u8], Refusal> {
        if asked.generation != wanted().generation {
            return Err(Refusal::Generation);
        }
        if *node != self.reader {
            return Err(Refusal::Member);
        }
        let bytes = self.files.get(file).ok_or(Refusal::File)?;
        let end = offset.checked_add(len).ok_or(Refusal::Range)?;
        bytes.get(offset as usize..end as usize).ok_or(Refusal::Range)
    }
}

impl Lends for Stock {
    async fn names(&self, node: &NodeId, asked: &Wanted) -> Result<Vec<String>, Refusal> {
        self.find(node, asked, "long", 0, 0)?;
        let mut names: Vec<String> = self.files.keys().cloned().collect();
        names.sort();
        Ok(names)
    }
    fn may_read(&self, node: &NodeId, asked: &Wanted, part: &Part) -> Result<(), Refusal> {
        self.find(node, asked, &part.file, part.offset, part.len).map(|_| ())
    }
    fn copy(&self, node: &NodeId, asked: &Wanted, file: &str, offset: u64, into: &mut [u8]) -> Result<(), Refusal> {
        if offset >= self.until {
            return Err(Refusal::Over);
        }
        into.copy_from_slice(self.find(node, asked, file, offset, into.len() as u64)?);
        Ok(())
    }
}

const LONG: usize = MAX_READ as usize + 100_000;

/// A node that lends, and one that may read.
struct Two {
    owner: Arc<LocalNode>,
    reader: Arc<LocalNode>,
    listener: TestListener,
    callers: mpsc::Receiver<Caller>,
}

impl Two {
    async fn new() -> Self {
        let (owner, reader) = (node("owner"), node("reader"));
        let (tell, callers) = mpsc::channel(4);
        let known = Nodes::of(&[&reader]).known();
        let address = "127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind_for(address, owner.clone(), known, PATIENT, Some(tell)).await.unwrap();
        Self { owner, reader, listener, callers }
    }

    fn stock(&self) -> Stock {
        let files = [("long".to_owned(), content(LONG)), ("short".to_owned(), content(70_000))];
        Stock { files: files.into(), reader: self.reader.node.clone(), until: u64::MAX }
    }

    async fn dial(&self, settings: LinkSettings) -> Reader {
        Reader::dial(self.listener.address(), &self.owner.as_peer(), &self.reader, settings).await.unwrap()
    }

    /// A reader, and the task that answers it.
    async fn served(&mut self, stock: Stock) -> (Reader, JoinHandle<End>) {
        let reader = self.dial(PATIENT).await;
        let caller = self.callers.recv().await.unwrap();
        assert_eq!(*caller.node(), self.reader.node);
        (reader, tokio::spawn(async move { caller.serve(&stock, &Semaphore::new(1)).await }))
    }

    /// Whatever happened before, links are as they were, and no bulk connection became one.
    async fn are_undisturbed(&mut self) {
        let (address, peer) = (self.listener.address(), self.owner.as_peer());
        let mut near: TestLink = super::super::dial(address, &peer, &self.reader, PATIENT).await.unwrap();
        let mut far = self.listener.accept().await;
        says(&mut near, 1, "well?").await;
        assert_eq!(far.recv().await.unwrap().body, "well?");
        assert!(futures::FutureExt::now_or_never(self.listener.accept()).is_none(), "somebody else was let in");
    }
}

#[tokio::test]
async fn bytes_arrive_as_they_are_with_their_sum() {
    let mut two = Two::new().await;
    let stock = two.stock();
    let (mut reader, serving) = two.served(stock).await;
    assert_eq!(reader.open(&wanted()).await.unwrap(), ["long", "short"]);
    for (file, start, len) in
        [("short", 0, 70_000), ("short", 69_999, 1), ("long", 0, LONG), ("long", 5, FRAME), ("long", 7, FRAME + 1)]
    {
        let all = content(if file == "long" { LONG } else { 70_000 });
        let mut into = vec![0; len];
        let sum = reader.read(file, start as u64, &mut into).await.unwrap();
        assert!(into == all[start..start + len], "{file} from {start}, {len} bytes");
        assert_eq!(sum, Crc64::of(&into));
    }
    drop(reader);
    serving.await.unwrap();
    two.are_undisturbed().await;
}

#[tokio::test]
async fn what_is_not_there_is_refused_by_name_and_the_rest_is_read_on() {
    let mut two = Two::new().await;
    let stock = two.stock();
    let (mut reader, _serving) = two.served(stock).await;
    let old = Wanted { generation: Generation(4), ..wanted() };
    assert_eq!(reader.open(&old).await.unwrap_err(), NotLent::Refused(Refusal::Generation));
    reader.open(&wanted()).await.unwrap();
    for (file, offset, len, refusal) in [
        ("other", 0, 1, Refusal::File),
        ("../short", 0, 1, Refusal::File),
        ("short", 70_000, 1, Refusal::Range),
        ("short", 0, 70_001, Refusal::Range),
        ("short", u64::MAX, 2, Refusal::Range),
    ] {
        let end = reader.read(file, offset, &mut vec![0; len]).await.unwrap_err();
        assert_eq!(end, NotLent::Refused(refusal), "{file} from {offset}, {len} bytes");
        reader.read("short", 3, &mut [0; 10]).await.unwrap();
    }
    // More than may be asked for at once, though the file has it.
    let part = Part { file: "long".into(), offset: 0, len: MAX_READ + 1 };
    reader.ask(&Question::Read(part)).await.unwrap();
    assert!(matches!(reader.answer().await.unwrap(), Reply::Refused(Refusal::Range)));
    reader.read("short", 3, &mut [0; 10]).await.unwrap();
    two.are_undisturbed().await;
}

#[tokio::test]
async fn slots_that_are_given_out_in_the_middle_of_a_file_end_it() {
    let mut two = Two::new().await;
    let stock = Stock { until: 2 * FRAME as u64, ..two.stock() };
    let (mut reader, _serving) = two.served(stock).await;
    reader.open(&wanted()).await.unwrap();
    let end = reader.read("long", 0, &mut vec![0; LONG]).await.unwrap_err();
    assert_eq!(end, NotLent::Refused(Refusal::Over));
    reader.read("short", 0, &mut [0; 10]).await.unwrap();
}

#[tokio::test]
async fn a_stranger_is_refused_in_the_handshake_and_another_node_by_name() {
    let mut two = Two::new().await;
    let stranger = node("reader");
    let dialled = Reader::dial(two.listener.address(), &two.owner.as_peer(), &stranger, PATIENT).await;
    assert_eq!(dialled.unwrap_err(), NotLent::Link(End::NotKnown));
    let other = node("owner").as_peer();
    let dialled = Reader::dial(two.listener.address(), &other, &two.reader, PATIENT).await;
    assert_eq!(dialled.unwrap_err(), NotLent::Link(End::OtherKey(two.listener.address())));
    assert!(two.callers.try_recv().is_err(), "nobody was let in");
    let stock = Stock { reader: NodeId::new("somebody").unwrap(), ..two.stock() };
    let (mut reader, _serving) = two.served(stock).await;
    assert_eq!(reader.open(&wanted()).await.unwrap_err(), NotLent::Refused(Refusal::Member));
    let end = reader.read("short", 0, &mut [0; 10]).await.unwrap_err();
    assert_eq!(end, NotLent::Refused(Refusal::Member), "it reads without having been let in");
    two.are_undisturbed().await;
}

/// Such a node listens for links alone.
#[tokio::test]
async fn an_older_version_says_that_it_knows_no_bulk_connections_and_is_not_bothered() {
    let mut two = Two::new().await;
    let known = Nodes::of(&[&two.reader]).known();
    let address = "127.0.0.1:0".parse().unwrap();
    two.listener = Listener::bind(address, two.owner.clone(), known, PATIENT).await.unwrap();
    let dialled = Reader::dial(two.listener.address(), &two.owner.as_peer(), &two.reader, PATIENT).await;
    assert_eq!(dialled.unwrap_err(), NotLent::Unknown);
    two.are_undisturbed().await;
}

#[tokio::test]
async fn a_later_protocol_is_refused_by_name() {
    let mut two = Two::new().await;
    let tcp = TcpStream::connect(two.listener.address()).await.unwrap();
    let tls = tls::connector(&two.reader.identity, two.owner.identity.key(), &[b"trainer-bulk/2"]).unwrap();
    let refused = tls.connect(tls::name(two.listener.address()), tcp).await.unwrap_err();
    let alert = rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol);
    assert_eq!(end::tls(&refused), Some(&alert));
    two.are_undisturbed().await;
}

#[tokio::test]
async fn questions_without_a_meaning_end_the_connection_and_take_no_memory() {
    let read = |len: u64| Question::Read(Part { file: "short".into(), offset: 0, len });
    let before_open = frame::encode(&read(1), MAX_ASK).unwrap();
    let gibibyte = (1_u32 << 30).to_le_bytes().to_vec();
    let nonsense = frame::encode(&"more", MAX_ASK).unwrap();
    for bytes in [before_open, gibibyte, nonsense] {
        let mut two = Two::new().await;
        let stock = two.stock();
        let (mut reader, serving) = two.served(stock).await;
        frame::write(&mut reader.stream, &bytes, PATIENT.silence).await.unwrap();
        let end = serving.await.unwrap();
        assert!(matches!(&end, End::Protocol(_)), "{end}");
        two.are_undisturbed().await;
    }
}

/// What a reader makes of a node that answers with these bytes.
async fn of_a_liar(bytes: Vec<u8>) -> NotLent {
    let mut two = Two::new().await;
    let mut reader = two.dial(PATIENT).await;
    let mut caller = two.callers.recv().await.unwrap();
    let lying = tokio::spawn(async move {
        frame::write(&mut caller.stream, &bytes, PATIENT.silence).await.unwrap();
        caller.stream.shutdown().await.unwrap();
        caller
    });
    let end = reader.read("short", 0, &mut [0; 100]).await.unwrap_err();
    lying.await.unwrap();
    end
}

#[tokio::test]
async fn a_liar_is_not_believed() {
    let sends = |len: u64| frame::encode(&Reply::Sends(len), MAX_MESSAGE).unwrap();
    let raw = |len: usize| [&(len as u32).to_le_bytes()[..], &vec![7; len]].concat();
    let gibibyte = (1_u32 << 30).to_le_bytes().to_vec();
    for (what, bytes) in [
        ("another length", [sends(101), raw(101)].concat()),
        ("more bytes", [sends(100), raw(101)].concat()),
        ("more bytes, late", [sends(100), raw(60), raw(41)].concat()),
        ("fewer bytes", [sends(100), raw(60)].concat()),
        ("a gibibyte", [sends(100), gibibyte.clone()].concat()),
        ("a gibibyte of an answer", gibibyte),
        ("a frame that is too long", [sends(100), raw(FRAME + 1)].concat()),
        ("an end without a reason", [sends(100), raw(0), sends(1)].concat()),
        ("nonsense", raw(3)),
        ("nothing", Vec::new()),
    ] {
        let end = of_a_liar(bytes).await;
        assert!(matches!(&end, NotLent::Link(End::Protocol(_) | End::Closed)), "{what}: {end}");
    }
}

#[tokio::test]
async fn silence_in_the_middle_of_a_file_ends_the_read() {
    let mut two = Two::new().await;
    let mut reader = two.dial(LinkSettings { silence: Duration::from_millis(100), ..PATIENT }).await;
    let mut caller = two.callers.recv().await.unwrap();
    let sends = frame::encode(&Reply::Sends(100), MAX_MESSAGE).unwrap();
    frame::write(&mut caller.stream, &sends, PATIENT.silence).await.unwrap();
    let end = reader.read("short", 0, &mut [0; 100]).await.unwrap_err();
    assert_eq!(end, NotLent::Link(End::Silent));
}

#[test]
fn a_read_has_a_limit_that_grows_with_its_length() {
    assert_eq!(read_limit(0), Duration::from_secs(5));
    assert_eq!(read_limit(MAX_READ), Duration::from_secs(9));
}

#[test]
fn the_form_on_the_wire() {
    let text = |ask: &Question| serde_json::to_string(ask).unwrap();
    assert_eq!(text(&Question::Open(wanted())), r#"{"open":{"generation":5,"step":12,"of":4}}"#);
    let part = Part { file: "a".into(), offset: 1, len: 2 };
    assert_eq!(text(&Question::Read(part)), r#"{"read":{"file":"a","offset":1,"len":2}}"#);
    assert_eq!(serde_json::to_string(&Reply::Refused(Refusal::Over)).unwrap(), r#"{"refused":"over"}"#);
    assert_eq!(serde_json::to_string(&Reply::Sends(3)).unwrap(), r#"{"sends":3}"#);
}
