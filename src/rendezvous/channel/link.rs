//! An open connection to one peer.
//!
//! One task per link owns the connection. It reads into a bounded inbox, writes from a bounded queue, sends pings, and
//! decides when the link ends; the first reason stands. The two halves only touch the queue and the inbox, so that
//! neither ever waits for the network.

use std::{
    marker::PhantomData,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{
    end::End,
    envelope::{Envelope, Wire},
    frame::{self, Frames, Unsendable},
    identity::Peer,
    settings::{LinkSettings, MAX_MESSAGE},
};
use crate::ids::Generation;

/// Why a message was not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// The message itself is at fault; the link stands.
    #[error(transparent)]
    Message(#[from] Unsendable),
    /// The link has ended.
    #[error("the link has ended: {0}")]
    Ended(End),
}

/// What both halves and the task know of a link.
#[derive(Debug, Default)]
struct Shared {
    end: OnceLock<End>,
    /// Bytes in the queue.
    queued: AtomicUsize,
    /// The sender has cut the link.
    cut: Notify,
}

impl Shared {
    fn end(&self) -> End {
        self.end.get().cloned().unwrap_or(End::Closed)
    }
}

/// The half that sends.
#[derive(Debug)]
pub struct Sender<Out> {
    queue: mpsc::Sender<Vec<u8>>,
    queue_bytes: usize,
    seq: u64,
    shared: Arc<Shared>,
    sends: PhantomData<fn(Out)>,
}

impl<Out: Serialize> Sender<Out> {
    /// Queues a message; it never waits. A peer that has let the queue fill up is cut: from then on the link has ended
    /// with [`End::Slow`].
    pub fn send(&mut self, generation: Generation, body: &Out) -> Result<(), NotSent> {
        let seq = self.seq + 1;
        let frame = frame::encode(&Wire::Message(Envelope { generation, seq, body }), MAX_MESSAGE)?;
        let len = frame.len();
        let full = self.shared.queued.fetch_add(len, Ordering::Relaxed) + len > self.queue_bytes;
        let sent = if full { Err(mpsc::error::TrySendError::Full(frame)) } else { self.queue.try_send(frame) };
        match sent {
            Ok(()) => {
                self.seq = seq;
                Ok(())
            }
            Err(mpsc::error::TrySendError::Full(_)) => {
                let _ = self.shared.end.set(End::Slow);
                self.shared.cut.notify_one();
                Err(NotSent::Ended(self.shared.end()))
            }
            Err(mpsc::error::TrySendError::Closed(_)) => Err(NotSent::Ended(self.shared.end())),
        }
    }
}

/// The half that receives.
#[derive(Debug)]
pub struct Receiver<In> {
    inbox: mpsc::Receiver<Envelope<In>>,
    shared: Arc<Shared>,
}

impl<In> Receiver<In> {
    /// The next message, or why there will be none. Everything that arrived before the end comes first. Dropping the
    /// future loses nothing.
    pub async fn recv(&mut self) -> Result<Envelope<In>, End> {
        self.inbox.recv().await.ok_or_else(|| self.shared.end())
    }
}

/// A connection to a peer whose key is known and whose version and run are this node's.
///
/// Dropping it, or either of its halves, says goodbye: what is queued is still written, for at most
/// [`LinkSettings::silence`] a piece, and the peer's end reads [`End::Closed`].
#[derive(Debug)]
pub struct Link<Out, In> {
    peer: Peer,
    address: SocketAddr,
    sender: Sender<Out>,
    receiver: Receiver<In>,
}

impl<Out, In> Link<Out, In>
where
    Out: Serialize,
    In: DeserializeOwned + Send + 'static,
{
    /// Starts the task over `stream`; `frames` holds what was read already.
    pub(super) fn start<S>(stream: S, frames: Frames, peer: Peer, address: SocketAddr, settings: LinkSettings) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (queue, queued) = mpsc::channel(settings.queue);
        let (inbox, received) = mpsc::channel(settings.inbox);
        let shared = Arc::<Shared>::default();
        tokio::spawn(drive(stream, frames, queued, inbox, shared.clone(), settings));
        let queue_bytes = settings.queue_bytes;
        let sender = Sender { queue, queue_bytes, seq: 0, shared: shared.clone(), sends: PhantomData };
        Self { peer, address, sender, receiver: Receiver { inbox: received, shared } }
    }
    /// The node at the other end, by its key.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
    /// The other end's address. A node that has dialled has a port of the kernel's choice.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
    /// See [`Sender::send`].
    pub fn send(&mut self, generation: Generation, body: &Out) -> Result<(), NotSent> {
        self.sender.send(generation, body)
    }
    /// See [`Receiver::recv`].
    pub async fn recv(&mut self) -> Result<Envelope<In>, End> {
        self.receiver.recv().await
    }
    /// The halves, for two owners.
    pub fn split(self) -> (Sender<Out>, Receiver<In>) {
        (self.sender, self.receiver)
    }
}

/// How the writing side came to its end.
enum Written {
    /// This side has nothing more to say; the goodbye is sent.
    Goodbye,
    Failed(End),
}

/// A link's life. It ends, and with it the connection, at the first of: the peer's goodbye, a broken connection or
/// rule, silence, a cut by the sender, either half's end.
async fn drive<S, In>(
    stream: S,
    mut frames: Frames,
    mut queue: mpsc::Receiver<Vec<u8>>,
    inbox: mpsc::Sender<Envelope<In>>,
    shared: Arc<Shared>,
    settings: LinkSettings,
) where
    S: AsyncRead + AsyncWrite,
    In: DeserializeOwned,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let end = {
        let reading = read(&mut reader, &mut frames, &inbox, settings.silence);
        let writing = write(&mut writer, &mut queue, &inbox, &shared, settings);
        tokio::pin!(reading);
        tokio::select! {
            end = &mut reading => end,
            () = shared.cut.notified() => End::Slow,
            written = writing => {
                // The peer's last words may still be on their way: a connection that is closed with bytes unread is
                // reset, and a reset may overtake this side's last words, too.
                let last = timeout(settings.linger, reading).await;
                match (written, last) {
                    (Written::Goodbye, _) => End::Closed,
                    (Written::Failed(End::Slow), _) => End::Slow,
                    (Written::Failed(_), Ok(end)) => end,
                    (Written::Failed(end), Err(_)) => end,
                }
            }
        }
    };
    // Before the halves can see that the task is gone.
    let _ = shared.end.set(end);
    drop((queue, inbox));
    if shared.end() != End::Slow {
        let _ = timeout(settings.linger, writer.shutdown()).await;
    }
}

/// Reads until the link can't go on. An inbox that is full holds it up: then the peer waits for this node, and is not
/// silent.
async fn read<R, In>(from: &mut R, frames: &mut Frames, inbox: &mpsc::Sender<Envelope<In>>, silence: Duration) -> End
where
    R: AsyncRead + Unpin,
    In: DeserializeOwned,
{
    let mut newest = 0;
    loop {
        let frame = match frames.next(from, MAX_MESSAGE, silence).await {
            Ok(frame) => frame,
            Err(end) => return end,
        };
        match serde_json::from_slice(&frame) {
            Ok(Wire::Ping) => {}
            Ok(Wire::Message(Envelope::<In> { seq, .. })) if seq <= newest => {
                return End::Protocol(format!("message {seq} came after message {newest}"));
            }
            Ok(Wire::Message(envelope)) => {
                newest = envelope.seq;
                // Nobody wants it once the receiving half is gone; the writing side says goodbye then.
                let _ = inbox.send(envelope).await;
            }
            Err(error) => return End::Protocol(format!("not a message: {error}")),
        }
    }
}

/// Writes what is queued, and a ping where there is nothing, until this side ends or the peer takes no more.
async fn write<W, In>(
    to: &mut W,
    queue: &mut mpsc::Receiver<Vec<u8>>,
    inbox: &mpsc::Sender<Envelope<In>>,
    shared: &Shared,
    settings: LinkSettings,
) -> Written
where
    W: AsyncWrite + Unpin,
{
    let Ok(ping) = frame::encode(&Wire::<()>::Ping, MAX_MESSAGE) else {
        return Written::Failed(End::Protocol("a ping has no form".into()));
    };
    loop {
        let next = tokio::select! {
            biased;
            frame = queue.recv() => frame,
            () = inbox.closed(), if !queue.is_closed() => {
                queue.close();
                continue;
            }
            () = tokio::time::sleep(settings.ping) => Some(Vec::new()),
        };
        let Some(frame) = next else {
            return match timeout(settings.silence, to.shutdown()).await {
                Ok(Ok(())) => Written::Goodbye,
                Ok(Err(error)) => Written::Failed(End::of(&error)),
                Err(_) => Written::Failed(End::Slow),
            };
        };
        let bytes = if frame.is_empty() { &ping } else { &frame };
        if let Err(end) = frame::write(to, bytes, settings.silence).await {
            return Written::Failed(end);
        }
        shared.queued.fetch_sub(frame.len(), Ordering::Relaxed);
    }
}
