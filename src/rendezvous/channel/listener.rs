//! The side that waits for links.
//!
//! Anybody can connect, so whoever has not shown a known key yet is a stranger: strangers are bounded in number and in
//! time. When their places are full, a newcomer displaces the one that has waited longest at the address that holds
//! most of them. A peer needs its place for milliseconds, so a crowd does not keep it out, however slow the crowd is.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsStream};

use super::{
    bulk::{self, Caller},
    end::End,
    hello,
    identity::{LocalNode, Peer},
    link::Link,
    settings::LinkSettings,
    tcp,
    tls::{self, Known},
};

/// The pause after an accept that failed: what it lacks, such as a descriptor, comes back when others end.
const AGAIN: Duration = Duration::from_millis(100);
/// Links that are open and not yet taken by the owner. More are closed; a peer dials again.
const WAITING: usize = 64;
/// Bytes of a refused connection that are still read, so that its end is no reset and the peer reads the reason.
const LAST_WORDS: usize = 16 << 10;

/// A listening port, and the links that were opened through it.
///
/// Dropping it closes the port and all connections that are not links yet. Links live on.
#[derive(Debug)]
pub struct Listener<Out, In> {
    address: SocketAddr,
    links: mpsc::Receiver<Link<Out, In>>,
    _accepting: JoinSet<()>,
}

impl<Out, In> Listener<Out, In>
where
    Out: Serialize + 'static,
    In: DeserializeOwned + Send + 'static,
{
    /// Listens at `address`; port 0 is a port of the kernel's choice. The error is that of the bind.
    ///
    /// A node that dials its own port ([`super::address::answers`]) is answered, and the link is not handed over.
    pub async fn bind(
        address: SocketAddr,
        me: Arc<LocalNode>,
        known: Known,
        settings: LinkSettings,
    ) -> io::Result<Self> {
        Self::bind_for(address, me, known, settings, None).await
    }
    /// The same of a node that lends files: whoever dials to read them goes to `callers`, or is turned away if nobody
    /// takes callers fast enough. `None`: it knows no bulk connections.
    pub async fn bind_for(
        address: SocketAddr,
        me: Arc<LocalNode>,
        known: Known,
        settings: LinkSettings,
        callers: Option<mpsc::Sender<Caller>>,
    ) -> io::Result<Self> {
        let myself = me.as_peer();
        let known: Known = Arc::new(move |key| if *key == myself.key { Some(myself.node.clone()) } else { known(key) });
        let protocols: &[&[u8]] = if callers.is_some() { &[bulk::NAME] } else { &[] };
        let tls = tls::acceptor(&me.identity, known.clone(), protocols).map_err(io::Error::other)?;
        let port = TcpListener::bind(address).await?;
        let address = port.local_addr()?;
        let (found, links) = mpsc::channel(WAITING);
        let door = Arc::new(Door { tls, known, me, settings, callers });
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(port, door, found));
        Ok(Self { address, links, _accepting: accepting })
    }
    /// The address and port that are listened at.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
    /// The next link. A node that dials twice has two; which of them counts is the owner's decision. Dropping the
    /// future loses nothing.
    pub async fn accept(&mut self) -> Link<Out, In> {
        match self.links.recv().await {
            Some(link) => link,
            // The other end lives as long as this one: its task ends with `self`.
            None => std::future::pending().await,
        }
    }
}

/// What is needed to let somebody in.
struct Door {
    tls: TlsAcceptor,
    known: Known,
    me: Arc<LocalNode>,
    settings: LinkSettings,
    callers: Option<mpsc::Sender<Caller>>,
}

/// A connection that has not shown a known key yet.
struct Stranger {
    address: IpAddr,
    task: AbortHandle,
}

/// Who has to go for a newcomer: the first, which has waited longest, of the address with the most places.
fn displaced(waiting: &[IpAddr]) -> Option<usize> {
    let mut places: HashMap<IpAddr, usize> = HashMap::new();
    for address in waiting {
        *places.entry(*address).or_default() += 1;
    }
    let most = places.values().max()?;
    waiting.iter().position(|address| places.get(address) == Some(most))
}

async fn accept<Out, In>(port: TcpListener, door: Arc<Door>, found: mpsc::Sender<Link<Out, In>>)
where
    Out: Serialize + 'static,
    In: DeserializeOwned + Send + 'static,
{
    let mut entering = JoinSet::new();
    let mut strangers: Vec<Stranger> = Vec::new();
    loop {
        let (stream, address) = tokio::select! {
            Some(ended) = entering.join_next() => {
                strangers.retain(|stranger| !stranger.task.is_finished());
                // A link that nobody takes is closed.
                if let Ok(Some(link)) = ended {
                    let _ = found.try_send(link);
                }
                continue;
            }
            accepted = port.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "no connection of another node was accepted");
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            },
        };
        if strangers.len() >= door.settings.strangers {
            let waiting: Vec<IpAddr> = strangers.iter().map(|stranger| stranger.address).collect();
            if let Some(at) = displaced(&waiting) {
                let gone = strangers.remove(at);
                gone.task.abort();
                tracing::debug!(address = %gone.address, "a connection made room for another one");
            }
        }
        let task = entering.spawn(enter(stream, address, door.clone()));
        strangers.push(Stranger { address: address.ip(), task });
    }
}

/// One connection up to its link; `None`: it was refused, it was this node's own, or it is no link.
async fn enter<Out, In>(stream: TcpStream, address: SocketAddr, door: Arc<Door>) -> Option<Link<Out, In>>
where
    Out: Serialize + 'static,
    In: DeserializeOwned + Send + 'static,
{
    let limit = door.settings.handshake;
    match timeout(limit, admit(stream, address, &door)).await.unwrap_or(Err(End::Silent)) {
        Ok(link) => link.filter(|link: &Link<Out, In>| link.peer().key != *door.me.identity.key()),
        Err(reason @ End::Version { .. }) => {
            tracing::warn!(%address, "{reason}: it is not let in");
            None
        }
        Err(reason) => {
            tracing::debug!(%address, %reason, "a connection was refused");
            None
        }
    }
}

async fn admit<Out, In>(stream: TcpStream, address: SocketAddr, door: &Door) -> Result<Option<Link<Out, In>>, End>
where
    Out: Serialize + 'static,
    In: DeserializeOwned + Send + 'static,
{
    tcp::tune(&stream, door.settings.silence);
    let mut stream: TlsStream<_> = match door.tls.accept(stream).into_fallible().await {
        Ok(stream) => stream.into(),
        Err((error, stream)) => {
            let _ = timeout(door.settings.linger, farewell(stream)).await;
            return Err(tls::unaccepted(&error).map_or_else(|| End::of(&error), |key| End::Stranger(key.clone())));
        }
    };
    let key = tls::peer_key(&stream).ok_or_else(|| End::Protocol("the peer showed no key".into()))?;
    // The handshake asked already; the answer may have changed.
    let node = (door.known)(&key).ok_or_else(|| End::Stranger(key.clone()))?;
    let frames = hello::introduce(&mut stream, &node, &door.me, door.settings).await?;
    let (peer, settings) = (Peer { node, key }, door.settings);
    if stream.get_ref().1.alpn_protocol() == Some(bulk::NAME) {
        if let Some(callers) = &door.callers {
            // One that nobody takes is closed.
            let _ = callers.try_send(Caller { stream, frames, peer, settings });
        }
        return Ok(None);
    }
    Ok(Some(Link::start(stream, frames, peer, address, settings)))
}

/// Closes a connection so that the alert before it arrives: a close with bytes unread would be a reset.
async fn farewell(mut stream: TcpStream) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let mut left = LAST_WORDS;
    let mut buffer = [0; 1024];
    while left > 0 {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => left = left.saturating_sub(n),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_the_busiest_address_makes_room() {
        let at = |texts: &[&str]| displaced(&texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>());
        assert_eq!(at(&[]), None);
        assert_eq!(at(&["10.0.0.1"]), Some(0));
        assert_eq!(at(&["10.0.0.1", "10.0.0.2", "10.0.0.2"]), Some(1));
        assert_eq!(at(&["10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.2"]), Some(0));
        assert_eq!(at(&["10.0.0.3", "::1", "10.0.0.2", "::1"]), Some(1));
    }
}
