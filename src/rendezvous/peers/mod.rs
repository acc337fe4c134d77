//! The links of one agent to all others of its run: whom it can reach, and what they say.
//!
//! [`channel`](super::channel) has one connection; this is the table of them. A caller names nodes and never
//! connections: a message for a node without a link opens one, a link that another node opens joins the table. One task
//! owns the table (`Hub`), so nothing here waits for a lock or for the network.
//!
//! # Rules
//! - Messages to one node arrive in the order in which they were sent, and none between two that arrive is missing: a
//!   loss is always followed by [`PeerEvent::Lost`]. Messages that were sent before the caller reads that event may be
//!   lost; what it sends afterwards opens a new link.
//! - Two nodes that dial each other at once have two links. Both are read, the older one is used for sending. If one
//!   ends otherwise than by the peer's goodbye, messages may be missing, so the other one is closed, too, and the peer
//!   is lost.
//! - What a peer sent before its end comes before `Lost`.
//! - A dial that fails is `Lost` at once; whether to try again is the caller's decision, who sends again. One reason is
//!   different: [`End::NotKnown`] means that the peer has not read this node's object in the store yet. It was told so
//!   by this very knock, and the dial is repeated for [`LinkSettings::handshake`] in all.
//! - Who is known is told by the caller, from `nodes/<node-id>.json`. An open link of a node that is forgotten stays;
//!   [`Peers::part`] ends it.
//!
//! # Limits
//! Messages that wait for a dial are at most [`LinkSettings::queue`]; one more loses the peer ([`End::Slow`]). A link
//! has its own limits. Events are not bounded: a caller reads them promptly. Strangers cost a handshake, and the caller
//! hears of them at most once a [`QUIET`].
//!
//! # Crash, retry, cancel
//! Nothing is stored. Every future may be dropped. When the last [`Peers`] is dropped, the port closes, each link
//! writes what is queued and says goodbye, and the events end; messages that wait for a dial are lost.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::channel::{
    End, Envelope, Known, Link, LinkSettings, Listener, LocalNode, NotSent, Peer, Receiver, Sender, Unsendable,
    bulk::Caller, dial,
};
use crate::ids::{Generation, NodeId, NodeKey};

#[cfg(test)]
mod tests;

/// The pause before a node that does not know this one is dialled again: it lists and reads the store meanwhile.
const AGAIN: Duration = Duration::from_millis(300);
/// Nodes that are dialled side by side to find out whether they can be reached.
pub const PROBES: usize = 16;
/// The least time between two [`PeerEvent::Stranger`]: each makes the caller list the store, which costs money.
pub const QUIET: Duration = Duration::from_secs(1);

/// What happens on the links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent<M> {
    /// A message.
    Message {
        /// Its sender, by its key.
        from: NodeId,
        /// The generation that it belongs to, as the sender says.
        generation: Generation,
        /// Its content.
        body: M,
    },
    /// The last link to a node ended, or it could not be dialled. Messages to it may be lost.
    Lost {
        /// The node.
        peer: NodeId,
        /// The reason.
        end: End,
    },
    /// Somebody with an unknown key knocked: read `nodes/` and tell [`Peers::know`].
    Stranger,
}

/// Whether this end says that the peer's process is certainly gone: its port refuses, or another process has it.
pub fn is_gone(end: &End) -> bool {
    matches!(end, End::Refused(_) | End::OtherKey(_))
}

/// This agent's links to the others of its run. A clone is another handle of the same links; dropping the last one says
/// goodbye to all.
#[derive(Debug)]
pub struct Peers<M> {
    me: NodeId,
    address: SocketAddr,
    book: Book,
    asks: mpsc::UnboundedSender<Ask<M>>,
}

impl<M> Clone for Peers<M> {
    fn clone(&self) -> Self {
        let Self { me, address, book, asks } = self;
        Self { me: me.clone(), address: *address, book: book.clone(), asks: asks.clone() }
    }
}

impl<M: Serialize + DeserializeOwned + Send + 'static> Peers<M> {
    /// Listens at `bind` (port 0: of the kernel's choice) and starts the task. The error is that of the bind.
    pub async fn start(
        me: Arc<LocalNode>,
        bind: SocketAddr,
        settings: LinkSettings,
    ) -> io::Result<(Self, mpsc::UnboundedReceiver<PeerEvent<M>>)> {
        Self::start_for(me, bind, settings, None).await
    }

    /// The same; nodes that dial to read files go to `callers` ([`Listener::bind_for`]).
    pub async fn start_for(
        me: Arc<LocalNode>,
        bind: SocketAddr,
        settings: LinkSettings,
        callers: Option<mpsc::Sender<Caller>>,
    ) -> io::Result<(Self, mpsc::UnboundedReceiver<PeerEvent<M>>)> {
        let (book, strangers) = (Book::default(), Arc::new(Notify::new()));
        let (looked_up, knock) = (book.clone(), strangers.clone());
        let known: Known = Arc::new(move |key| {
            let found = looked_up.owner(key);
            if found.is_none() {
                knock.notify_one();
            }
            found
        });
        let listener = Listener::bind_for(bind, me.clone(), known, settings, callers).await?;
        let (asks, asked) = mpsc::unbounded_channel();
        let (events, heard) = mpsc::unbounded_channel();
        let peers = Self { me: me.node.clone(), address: listener.address(), book: book.clone(), asks };
        let hub = Hub {
            me,
            settings,
            book,
            asks: asked,
            events,
            listener,
            strangers,
            contacts: HashMap::new(),
            dialling: JoinSet::new(),
            reading: JoinSet::new(),
            last: 0,
        };
        tokio::spawn(hub.run());
        Ok((peers, heard))
    }

    /// Where this node listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What `nodes/<node-id>.json` says of a node; it replaces what was known. A dial to another address begins anew.
    pub fn know(&self, node: NodeId, address: SocketAddr, key: NodeKey) {
        if self.book.write(node.clone(), address, key) {
            self.ask(Ask::Moved(node));
        }
    }

    /// The node's key is not accepted any more, and it is not dialled. An open link stays.
    pub fn forget(&self, node: &NodeId) {
        self.book.lock().remove(node);
    }

    /// Whether [`know`](Self::know) has named the node and [`forget`](Self::forget) has not; a node knows itself.
    pub fn knows(&self, node: &NodeId) -> bool {
        *node == self.me || self.book.lock().contains_key(node)
    }

    /// Sends; never waits. Opens a link if there is none and sends then, in order. What can't be sent ends in
    /// [`PeerEvent::Lost`], and so does a message for a node that is not known. A message to itself is delivered here.
    pub fn send(&self, to: &NodeId, generation: Generation, body: M) {
        self.ask(Ask::Send { to: to.clone(), generation, body });
    }

    /// Those of `nodes` that can't be reached: there is no link, and none can be opened within `limit`. At most
    /// [`PROBES`] are tried side by side, and all of it takes little longer than `limit`: of nodes whose turn does not
    /// come in that time nothing is said. A link that is opened stays; a dial that fails is no [`PeerEvent::Lost`].
    pub async fn unreachable(&self, nodes: Vec<NodeId>, limit: Duration) -> BTreeSet<NodeId> {
        let probes = nodes.into_iter().map(|node| async move {
            let (answer, reply) = oneshot::channel();
            self.ask(Ask::Probe { node: node.clone(), answer });
            (node, matches!(timeout(limit, reply).await, Ok(Ok(true))))
        });
        let mut probes = futures::stream::iter(probes).buffer_unordered(PROBES);
        let mut found = BTreeSet::new();
        let all = async {
            while let Some((node, reached)) = probes.next().await {
                if !reached {
                    found.insert(node);
                }
            }
        };
        let _ = timeout(limit.saturating_add(limit / 4), all).await;
        found
    }

    /// Says goodbye to one node; no [`PeerEvent::Lost`] follows. What was sent is still written, unless it waits for a
    /// dial.
    pub fn part(&self, node: &NodeId) {
        self.ask(Ask::Part(node.clone()));
    }

    fn ask(&self, ask: Ask<M>) {
        // The task lives as long as a handle does.
        let _ = self.asks.send(ask);
    }
}

/// What a handle asks the task for.
#[derive(Debug)]
enum Ask<M> {
    Send {
        to: NodeId,
        generation: Generation,
        body: M,
    },
    Probe {
        node: NodeId,
        answer: oneshot::Sender<bool>,
    },
    /// The book has another address or key for this node.
    Moved(NodeId),
    Part(NodeId),
    /// The links of a node over which this one sends.
    #[cfg(test)]
    Links(NodeId, oneshot::Sender<usize>),
}

/// Where nodes listen, and with which keys.
#[derive(Clone, Debug, Default)]
struct Book(Arc<Mutex<BTreeMap<NodeId, (SocketAddr, NodeKey)>>>);

impl Book {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, (SocketAddr, NodeKey)>> {
        // Each holder makes one change or none, so the map is whole even if one panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Whether that is news.
    fn write(&self, node: NodeId, address: SocketAddr, key: NodeKey) -> bool {
        let entry = (address, key);
        self.lock().insert(node, entry.clone()) != Some(entry)
    }
    fn read(&self, node: &NodeId) -> Option<(SocketAddr, NodeKey)> {
        self.lock().get(node).cloned()
    }
    /// The node with that key; a handshake costs far more than this search.
    fn owner(&self, key: &NodeKey) -> Option<NodeId> {
        self.lock().iter().find(|(_, (_, known))| known == key).map(|(node, _)| node.clone())
    }
}

/// One link of a contact.
struct Way<M> {
    id: u64,
    /// `None`: this side has said goodbye and reads the peer's last words.
    sender: Option<Sender<M>>,
    reader: AbortHandle,
}

/// One peer that is linked, or dialled.
struct Contact<M> {
    /// The oldest first.
    ways: Vec<Way<M>>,
    /// The dial that counts, by its number. A link from any other is closed.
    dial: Option<u64>,
    /// When the first dial began.
    since: Instant,
    /// Messages for the first link.
    waiting: Vec<(Generation, M)>,
    /// Who wants to know whether there is a link; dropped, they read that there is none.
    probes: Vec<oneshot::Sender<bool>>,
    /// Why its links are being closed: the reason for `Lost`, once the last words are read.
    broken: Option<End>,
}

impl<M: Serialize> Contact<M> {
    fn new() -> Self {
        let (ways, waiting, probes) = (Vec::new(), Vec::new(), Vec::new());
        Self { ways, dial: None, since: Instant::now(), waiting, probes, broken: None }
    }

    /// Sends over the oldest link that takes it. If none does, all have ended: `Lost` is on its way, and covers this
    /// message.
    fn post(&mut self, generation: Generation, body: &M) -> Result<(), Unsendable> {
        for sender in self.ways.iter_mut().filter_map(|way| way.sender.as_mut()) {
            match sender.send(generation, body) {
                Ok(()) => return Ok(()),
                Err(NotSent::Ended(_)) => {}
                Err(NotSent::Message(fault)) => return Err(fault),
            }
        }
        Ok(())
    }
}

/// A dial that is over: to whom, its number, and the link.
type Dialled<M> = (NodeId, u64, Result<Link<M, M>, End>);

/// The task's state.
struct Hub<M> {
    me: Arc<LocalNode>,
    settings: LinkSettings,
    book: Book,
    asks: mpsc::UnboundedReceiver<Ask<M>>,
    events: mpsc::UnboundedSender<PeerEvent<M>>,
    listener: Listener<M, M>,
    /// Told when an unknown key knocks.
    strangers: Arc<Notify>,
    /// Each has a link or a dial.
    contacts: HashMap<NodeId, Contact<M>>,
    dialling: JoinSet<Dialled<M>>,
    /// One task a link; dropping it says goodbye.
    reading: JoinSet<(NodeId, u64, End)>,
    /// The last number given to a dial or a link.
    last: u64,
}

impl<M: Serialize + DeserializeOwned + Send + 'static> Hub<M> {
    async fn run(mut self) {
        let strangers = self.strangers.clone();
        let mut quiet = Instant::now();
        loop {
            let knock = async {
                sleep_until(quiet).await;
                strangers.notified().await;
            };
            tokio::select! {
                ask = self.asks.recv() => match ask {
                    Some(ask) => self.obey(ask),
                    None => return,
                },
                link = self.listener.accept() => self.join(link),
                Some(over) = self.reading.join_next() => {
                    // An error is a reader that was stopped.
                    if let Ok((node, id, end)) = over {
                        self.ended(&node, id, end);
                    }
                }
                Some(dialled) = self.dialling.join_next() => {
                    if let Ok((node, id, link)) = dialled {
                        self.dialled(&node, id, link);
                    }
                }
                () = knock => {
                    self.tell(PeerEvent::Stranger);
                    quiet = Instant::now() + QUIET;
                }
            }
        }
    }

    fn tell(&self, event: PeerEvent<M>) {
        // A caller that has dropped the events wants none.
        let _ = self.events.send(event);
    }

    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn obey(&mut self, ask: Ask<M>) {
        match ask {
            Ask::Send { to, generation, body } if to == self.me.node => {
                self.tell(PeerEvent::Message { from: to, generation, body });
            }
            Ask::Send { to, generation, body } => self.send(&to, generation, body),
            Ask::Probe { node, answer } => self.probe(&node, answer),
            Ask::Moved(node) => {
                if let Some(contact) = self.contacts.get_mut(&node).filter(|contact| contact.ways.is_empty()) {
                    contact.since = Instant::now();
                    self.dial(&node, Duration::ZERO);
                }
            }
            Ask::Part(node) => {
                if let Some(contact) = self.contacts.remove(&node) {
                    contact.ways.iter().for_each(|way| way.reader.abort());
                }
            }
            #[cfg(test)]
            Ask::Links(node, answer) => {
                let ways = self.contacts.get(&node).map_or(&[][..], |contact| &contact.ways);
                let _ = answer.send(ways.iter().filter(|way| way.sender.is_some()).count());
            }
        }
    }

    fn send(&mut self, to: &NodeId, generation: Generation, body: M) {
        let most = self.settings.queue;
        let Some(contact) = self.reach(to) else {
            let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
            let why = format!("nothing says where node {to} listens");
            return self.lose(to, End::Unreachable { address, why });
        };
        if !contact.ways.is_empty() {
            if let Err(fault) = contact.post(generation, &body) {
                self.break_off(to, End::Protocol(fault.to_string()));
            }
        } else if contact.waiting.len() < most {
            contact.waiting.push((generation, body));
        } else {
            self.lose(to, End::Slow);
        }
    }

    fn probe(&mut self, node: &NodeId, answer: oneshot::Sender<bool>) {
        self.finish(node);
        let known = if *node == self.me.node { None } else { self.reach(node) };
        let reached = match known {
            Some(contact) if contact.ways.is_empty() => return contact.probes.push(answer),
            Some(_) => true,
            None => *node == self.me.node,
        };
        let _ = answer.send(reached);
    }

    /// The contact of a node, dialled if there was none; `None`: nobody knows where it is.
    fn reach(&mut self, node: &NodeId) -> Option<&mut Contact<M>> {
        if !self.contacts.contains_key(node) && !self.dial(node, Duration::ZERO) {
            return None;
        }
        self.contacts.get_mut(node)
    }

    /// Dials after a pause; this dial is the one that counts. Whether the node is known.
    fn dial(&mut self, node: &NodeId, pause: Duration) -> bool {
        let Some((address, key)) = self.book.read(node) else { return false };
        let id = self.number();
        let contact = self.contacts.entry(node.clone()).or_insert_with(Contact::new);
        contact.dial = Some(id);
        let (peer, me, settings) = (Peer { node: node.clone(), key }, self.me.clone(), self.settings);
        self.dialling.spawn(async move {
            sleep(pause).await;
            let link = dial(address, &peer, &me, settings).await;
            (peer.node, id, link)
        });
        true
    }

    fn dialled(&mut self, node: &NodeId, id: u64, link: Result<Link<M, M>, End>) {
        // A link that nobody wants any more says goodbye here.
        let Some(contact) = self.contacts.get_mut(node).filter(|contact| contact.dial == Some(id)) else { return };
        contact.dial = None;
        let end = match link {
            Ok(link) => return self.join(link),
            Err(end) => end,
        };
        // The peer has opened one meanwhile.
        if !contact.ways.is_empty() {
            return;
        }
        let wanted = !contact.waiting.is_empty();
        let again = may_learn(&end, contact.since.elapsed(), self.settings.handshake);
        if again && self.dial(node, AGAIN) {
            return;
        }
        if wanted {
            self.lose(node, end);
        } else {
            // Only probes asked, and a probe that is dropped has its answer.
            self.contacts.remove(node);
        }
    }

    /// A new link, of this node's dial or of the peer's.
    fn join(&mut self, link: Link<M, M>) {
        let (node, id) = (link.peer().node.clone(), self.number());
        tracing::debug!(peer = %node, address = %link.address(), "linked");
        self.finish(&node);
        let (sender, receiver) = link.split();
        let reader = self.reading.spawn(read(node.clone(), id, receiver, self.events.clone()));
        let contact = self.contacts.entry(node.clone()).or_insert_with(Contact::new);
        contact.ways.push(Way { id, sender: Some(sender), reader });
        for probe in contact.probes.drain(..) {
            // Its caller may have stopped waiting.
            let _ = probe.send(true);
        }
        let waiting = std::mem::take(&mut contact.waiting);
        let sent = waiting.iter().try_for_each(|(generation, body)| contact.post(*generation, body));
        if let Err(fault) = sent {
            self.break_off(&node, End::Protocol(fault.to_string()));
        }
    }

    /// A link has ended, and everything that came over it is delivered.
    fn ended(&mut self, node: &NodeId, id: u64, end: End) {
        let Some(contact) = self.contacts.get_mut(node) else { return };
        let before = contact.ways.len();
        contact.ways.retain(|way| way.id != id);
        if contact.ways.len() == before {
            return;
        }
        if contact.ways.is_empty() {
            let end = contact.broken.take().unwrap_or(end);
            self.lose(node, end);
        } else if end != End::Closed {
            // What was sent over it may be missing at the peer, or here.
            self.break_off(node, end);
        }
    }

    /// Says goodbye on all links of a peer; it is lost when its last words are read.
    fn break_off(&mut self, node: &NodeId, end: End) {
        let Some(contact) = self.contacts.get_mut(node) else { return };
        contact.dial = None;
        contact.broken.get_or_insert(end);
        contact.ways.iter_mut().for_each(|way| way.sender = None);
    }

    /// A peer whose links are being closed is lost now: something new begins with it.
    fn finish(&mut self, node: &NodeId) {
        if let Some(end) = self.contacts.get_mut(node).and_then(|contact| contact.broken.take()) {
            self.lose(node, end);
        }
    }

    fn lose(&mut self, node: &NodeId, end: End) {
        tracing::debug!(peer = %node, reason = %end, "no link any more");
        self.contacts.remove(node);
        self.tell(PeerEvent::Lost { peer: node.clone(), end });
    }
}

/// Whether a dial that ended so may succeed within the `limit` because the peer learns of this node; `spent`: since the
/// first dial.
fn may_learn(end: &End, spent: Duration, limit: Duration) -> bool {
    *end == End::NotKnown && spent.saturating_add(AGAIN) < limit
}

/// Passes on what a peer says, to the link's end.
async fn read<M>(
    from: NodeId,
    id: u64,
    mut link: Receiver<M>,
    events: mpsc::UnboundedSender<PeerEvent<M>>,
) -> (NodeId, u64, End) {
    loop {
        match link.recv().await {
            Ok(Envelope { generation, body, .. }) => {
                let _ = events.send(PeerEvent::Message { from: from.clone(), generation, body });
            }
            Err(end) => return (from, id, end),
        }
    }
}
