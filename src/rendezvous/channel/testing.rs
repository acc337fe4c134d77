//! Nodes, links and a relay for the tests of this folder and of the links' table.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use super::{
    frame::{self, Frames},
    *,
};
use crate::ids::{NodeId, NodeKey, RunId};

pub(in crate::rendezvous) type TestLink = Link<String, String>;
pub(in crate::rendezvous) type TestListener = Listener<String, String>;

/// Limits that a busy machine does not reach.
pub(in crate::rendezvous) const PATIENT: LinkSettings = LinkSettings {
    ping: Duration::from_millis(200),
    silence: Duration::from_secs(60),
    handshake: Duration::from_secs(60),
    linger: Duration::from_secs(30),
    strangers: 64,
    queue: 1024,
    queue_bytes: 4 * MAX_MESSAGE,
    inbox: 64,
};

pub(in crate::rendezvous) fn node(name: &str) -> Arc<LocalNode> {
    Arc::new(LocalNode::new(RunId::new("run").unwrap(), NodeId::new(name).unwrap()).unwrap())
}

/// What stands in the store, as a listener looks it up.
#[derive(Clone, Default)]
pub(in crate::rendezvous) struct Nodes(Arc<Mutex<HashMap<NodeKey, NodeId>>>);

impl Nodes {
    pub(in crate::rendezvous) fn of(nodes: &[&LocalNode]) -> Self {
        let known = Self::default();
        nodes.iter().for_each(|node| known.add(node));
        known
    }
    pub(in crate::rendezvous) fn add(&self, node: &LocalNode) {
        self.0.lock().unwrap().insert(node.identity.key().clone(), node.node.clone());
    }
    pub(in crate::rendezvous) fn known(&self) -> Known {
        let nodes = self.0.clone();
        Arc::new(move |key| nodes.lock().unwrap().get(key).cloned())
    }
}

pub(in crate::rendezvous) async fn listen(me: &Arc<LocalNode>, nodes: &Nodes, settings: LinkSettings) -> TestListener {
    Listener::bind("127.0.0.1:0".parse().unwrap(), me.clone(), nodes.known(), settings).await.unwrap()
}

/// A node that listens, one that it knows, and a link between them: the dialled end and the accepted end.
pub(in crate::rendezvous) struct Pair {
    pub(in crate::rendezvous) host: Arc<LocalNode>,
    pub(in crate::rendezvous) guest: Arc<LocalNode>,
    pub(in crate::rendezvous) nodes: Nodes,
    pub(in crate::rendezvous) listener: TestListener,
}

impl Pair {
    pub(in crate::rendezvous) async fn new(settings: LinkSettings) -> Self {
        let (host, guest) = (node("host"), node("guest"));
        let nodes = Nodes::of(&[&guest]);
        let listener = listen(&host, &nodes, settings).await;
        Self { host, guest, nodes, listener }
    }
    pub(in crate::rendezvous) async fn dial(
        &self,
        address: SocketAddr,
        settings: LinkSettings,
    ) -> Result<TestLink, End> {
        dial(address, &self.host.as_peer(), &self.guest, settings).await
    }
    /// A link through `address`: the listener's or a relay's.
    pub(in crate::rendezvous) async fn link_through(
        &mut self,
        address: SocketAddr,
        settings: LinkSettings,
    ) -> (TestLink, TestLink) {
        let near = self.dial(address, settings).await.unwrap();
        (near, self.listener.accept().await)
    }
    pub(in crate::rendezvous) async fn link(&mut self, settings: LinkSettings) -> (TestLink, TestLink) {
        self.link_through(self.listener.address(), settings).await
    }
    /// Whatever happened before, a good peer gets in, and nobody was let in before it.
    pub(in crate::rendezvous) async fn is_undisturbed(&mut self) {
        let (mut near, mut far) = self.link(PATIENT).await;
        assert_eq!(*far.peer(), self.guest.as_peer());
        assert_eq!(far.address().ip(), near.address().ip());
        say(&mut near, 1, "well?").await;
        assert_eq!(far.recv().await.unwrap().body, "well?");
        assert!(futures::FutureExt::now_or_never(self.listener.accept()).is_none(), "somebody else was let in");
    }
}

/// Sends one message of a generation.
pub(in crate::rendezvous) async fn say(link: &mut TestLink, generation: u64, text: &str) {
    link.send(crate::ids::Generation(generation), &text.to_owned()).unwrap();
}

/// A link over a pipe whose other end the test plays byte by byte.
pub(in crate::rendezvous) fn over_a_pipe(capacity: usize, settings: LinkSettings) -> (TestLink, DuplexStream) {
    let (near, far) = tokio::io::duplex(capacity);
    let peer = node("peer").as_peer();
    (Link::start(near, Frames::default(), peer, "192.0.2.1:1".parse().unwrap(), settings), far)
}

pub(in crate::rendezvous) async fn write_text(to: &mut DuplexStream, text: &str) {
    let value: serde_json::Value = serde_json::from_str(text).unwrap();
    to.write_all(&frame::encode(&value, MAX_MESSAGE).unwrap()).await.unwrap();
}

/// What a relay does from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rendezvous) enum Line {
    Forward,
    /// Nothing passes, and the connections stay open: a machine without power.
    Hold,
    /// The connections end without a word: a killed process.
    Break,
}

/// Stands between two nodes.
pub(in crate::rendezvous) struct Relay {
    pub(in crate::rendezvous) address: SocketAddr,
    pub(in crate::rendezvous) line: watch::Sender<Line>,
    /// What the dialling side has sent.
    pub(in crate::rendezvous) recorded: Arc<Mutex<Vec<u8>>>,
    _tasks: JoinSet<()>,
}

impl Relay {
    pub(in crate::rendezvous) async fn to(target: SocketAddr) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = port.local_addr().unwrap();
        let (line, asked) = watch::channel(Line::Forward);
        let recorded = Arc::<Mutex<Vec<u8>>>::default();
        let mut tasks = JoinSet::new();
        let record = recorded.clone();
        tasks.spawn(async move {
            let (near, _) = port.accept().await.unwrap();
            let far = TcpStream::connect(target).await.unwrap();
            let (near, far) = (near.into_split(), far.into_split());
            let there = forward(near.0, far.1, asked.clone(), Some(record));
            let back = forward(far.0, near.1, asked, None);
            tokio::join!(there, back);
        });
        Self { address, line, recorded, _tasks: tasks }
    }
}

/// The first order other than to forward; the end of the relay is one, too.
async fn changed(asked: &mut watch::Receiver<Line>) -> Line {
    asked.wait_for(|line| *line != Line::Forward).await.map_or(Line::Break, |line| *line)
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut asked: watch::Receiver<Line>,
    record: Option<Arc<Mutex<Vec<u8>>>>,
) {
    let mut buffer = [0; 4096];
    loop {
        let n = tokio::select! {
            biased;
            line = changed(&mut asked) => match line {
                Line::Break => return,
                _ => std::future::pending().await,
            },
            n = from.read(&mut buffer) => n.unwrap_or(0),
        };
        if n == 0 || to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
        if let Some(record) = &record {
            record.lock().unwrap().extend_from_slice(&buffer[..n]);
        }
    }
}
