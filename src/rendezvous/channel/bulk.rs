//! Bulk connections: bytes of files that one node's memory has and another one of its generation needs.
//!
//! They lie beside the links, so that no ping waits behind them: the same port, the same TLS and the same keys. Which
//! of the two a connection is, its handshake says by the application protocol `NAME` (RFC 7301). A node of a version
//! that does not know bulk connections chooses none, and the one that dials reads [`NotLent::Unknown`] before it has
//! said a word.
//!
//! # Protocol
//! Behind the hellos, which are those of a link, the node that dials asks and the other one answers, one question after
//! the other. Each is a frame of JSON; bytes of files travel in raw frames.
//! ```text
//!   {"open":{"generation":5,"step":12,"of":4}}      the generation of both; the checkpoint's step and generation
//!     {"names":["model-00001-of-00003.safetensors", …]}    or    {"refused":"over"}
//!   {"read":{"file":"model-00001-of-00003.safetensors","offset":0,"len":16777216}}
//!     {"sends":16777216}, then frames of at most 64 KiB    or    {"refused":"range"}
//!     an empty frame: it breaks off, and a refusal follows
//! ```
//!
//! # Limits
//! A question has at most `MAX_ASK` bytes, a read at most `MAX_READ`, and each length is checked before memory is
//! taken for it. Both sides bound each read in time ([`read_limit`]), so a node that stops reading, or answers at a
//! crawl, is given up; `IDLE` bounds the time between two questions. What is lent, and to whom, is the owner's
//! decision ([`Lends`]). The reader trusts nothing: it compares the whole file with its manifest.
//!
//! *Crash, cancel:* the connection ends, and the reader gets an error. *Retry:* none here; the store has every file.

use std::{net::SocketAddr, time::Duration};

use rustls::AlertDescription;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Semaphore, time::timeout};
use tokio_rustls::TlsStream;

use super::{
    dial,
    end::{self, End},
    frame::{self, Frames, PREFIX},
    hello,
    identity::{LocalNode, Peer},
    settings::{LinkSettings, MAX_MESSAGE},
    tcp, tls,
};
use crate::{
    ids::{Generation, NodeId, Step},
    storage::Crc64,
};

#[cfg(test)]
mod tests;

/// The name of this protocol in the handshake. It changes when a message changes.
pub(super) const NAME: &[u8] = b"trainer-bulk/1";
/// The longest question in bytes.
const MAX_ASK: usize = 4 << 10;
/// Bytes of a file in one frame.
const FRAME: usize = 64 << 10;
/// The most bytes that one question may ask for.
pub const MAX_READ: u64 = 16 << 20;
/// How long a node that dialled may ask nothing.
const IDLE: Duration = Duration::from_secs(60);
/// How long the answer to `open` may take: the other node may still be ending the workers of the last generation.
pub const OPENING: Duration = Duration::from_secs(10);

/// How long a read of `len` bytes may take: 4 MiB a second after 5 s. Slower than that, the store is the better source.
pub fn read_limit(len: u64) -> Duration {
    Duration::from_secs(5) + Duration::from_millis(len / (4 << 20) * 1000)
}

/// A checkpoint, and the generation that loads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The generation of both nodes.
    pub generation: Generation,
    /// The checkpoint's step.
    pub step: Step,
    /// The generation that wrote it.
    pub of: Generation,
}

/// A part of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The file's name within its checkpoint.
    pub file: String,
    /// Its first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Why a node does not lend something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It takes part in another generation, or does not load yet.
    #[error("it does not take part in this generation")]
    Generation,
    /// The one that asks is no member of the generation.
    #[error("this node is no member of its generation")]
    Member,
    /// The generation has loaded: its slots are given out.
    #[error("its slots are in use again")]
    Over,
    /// It holds nothing of this checkpoint.
    #[error("it holds nothing of this checkpoint")]
    Checkpoint,
    /// It does not hold this file.
    #[error("it does not hold this file")]
    File,
    /// The range is not within the file, or it is longer than may be asked for.
    #[error("the file has no such range, or it is too long for one read")]
    Range,
    /// The question has no meaning, or came before `open`.
    #[error("it does not know this question")]
    Question,
}

/// Why a file does not come from another node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotLent {
    /// There is no connection to it, or not any more.
    #[error(transparent)]
    Link(#[from] End),
    /// It runs a version that does not know bulk connections.
    #[error("it does not know bulk connections")]
    Unknown,
    /// It refuses.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The answer takes too long.
    #[error("it is slower than the store should be")]
    Slow,
}

/// What a node lends to others.
pub trait Lends: Send + Sync {
    /// The names of the files of this checkpoint that `node` may read now. It may wait, at most for `OPENING`, until
    /// this node takes part in the generation.
    fn names(&self, node: &NodeId, wanted: &Wanted) -> impl Future<Output = Result<Vec<String>, Refusal>> + Send;
    /// Whether `node` may read this part now.
    fn may_read(&self, node: &NodeId, wanted: &Wanted, part: &Part) -> Result<(), Refusal>;
    /// Copies bytes of a file, from `offset`. Nothing of the file is in use any more when it returns.
    fn copy(&self, node: &NodeId, wanted: &Wanted, file: &str, offset: u64, into: &mut [u8]) -> Result<(), Refusal>;
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Question {
    Open(Wanted),
    Read(Part),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Names(Vec<String>),
    Sends(u64),
    Refused(Refusal),
}

/// A node that has dialled to read, by its key.
#[derive(Debug)]
pub struct Caller {
    pub(super) stream: TlsStream<TcpStream>,
    pub(super) frames: Frames,
    pub(super) peer: Peer,
    pub(super) settings: LinkSettings,
}

impl Caller {
    /// The node.
    pub fn node(&self) -> &NodeId {
        &self.peer.node
    }

    /// Answers until the node has enough, and says why that is. `turns`: reads that are answered at once, over all
    /// callers.
    pub async fn serve(mut self, lends: &impl Lends, turns: &Semaphore) -> End {
        let end = match self.answer_all(lends, turns).await {
            Ok(()) => End::Closed,
            Err(end) => end,
        };
        let _ = timeout(self.settings.linger, self.stream.shutdown()).await;
        end
    }

    async fn answer_all(&mut self, lends: &impl Lends, turns: &Semaphore) -> Result<(), End> {
        let mut open: Option<Wanted> = None;
        loop {
            let ask = self.frames.next(&mut self.stream, MAX_ASK, IDLE).await?;
            match (serde_json::from_slice(&ask), &open) {
                (Ok(Question::Open(wanted)), _) => {
                    let names = lends.names(&self.peer.node, &wanted).await;
                    self.say(&names.map_or_else(Reply::Refused, Reply::Names)).await?;
                    open = Some(wanted);
                }
                (Ok(Question::Read(part)), Some(wanted)) => {
                    // The semaphore is never closed.
                    let Ok(_turn) = turns.acquire().await else { return Ok(()) };
                    let sending = send(&mut self.stream, &self.peer.node, self.settings, lends, wanted, &part);
                    timeout(read_limit(part.len.min(MAX_READ)), sending).await.unwrap_or(Err(End::Slow))?;
                }
                (Ok(Question::Read(_)), None) | (Err(_), _) => {
                    self.say(&Reply::Refused(Refusal::Question)).await?;
                    return Err(End::Protocol("a question without a meaning".into()));
                }
            }
        }
    }

    async fn say(&mut self, answer: &Reply) -> Result<(), End> {
        say(&mut self.stream, answer, self.settings).await
    }
}

async fn say(stream: &mut TlsStream<TcpStream>, answer: &Reply, settings: LinkSettings) -> Result<(), End> {
    let frame = frame::encode(answer, MAX_MESSAGE).map_err(|fault| End::Protocol(fault.to_string()))?;
    frame::write(stream, &frame, settings.silence).await
}

/// Sends a part of a file, frame by frame: no more of it is copied than the next frame.
async fn send(
    stream: &mut TlsStream<TcpStream>,
    node: &NodeId,
    settings: LinkSettings,
    lends: &impl Lends,
    wanted: &Wanted,
    part: &Part,
) -> Result<(), End> {
    let may = if part.len > MAX_READ { Err(Refusal::Range) } else { lends.may_read(node, wanted, part) };
    if let Err(refusal) = may {
        return say(stream, &Reply::Refused(refusal), settings).await;
    }
    say(stream, &Reply::Sends(part.len), settings).await?;
    let mut buffer = vec![0; PREFIX + FRAME];
    let mut sent = 0;
    while sent < part.len {
        let len = usize::try_from(part.len - sent).unwrap_or(FRAME).min(FRAME);
        let frame = &mut buffer[..PREFIX + len];
        let copied = lends.copy(node, wanted, &part.file, part.offset.saturating_add(sent), &mut frame[PREFIX..]);
        if let Err(refusal) = copied {
            frame::write(stream, &[0; PREFIX], settings.silence).await?;
            return say(stream, &Reply::Refused(refusal), settings).await;
        }
        // At most 64 KiB.
        frame[..PREFIX].copy_from_slice(&(len as u32).to_le_bytes());
        frame::write(stream, frame, settings.silence).await?;
        sent += len as u64;
    }
    Ok(())
}

/// The end that reads.
#[derive(Debug)]
pub struct Reader {
    stream: TlsStream<TcpStream>,
    frames: Frames,
    settings: LinkSettings,
}

impl Reader {
    /// Opens a bulk connection to `peer` at `address`, once, within [`LinkSettings::handshake`].
    pub async fn dial(
        address: SocketAddr,
        peer: &Peer,
        me: &LocalNode,
        settings: LinkSettings,
    ) -> Result<Self, NotLent> {
        let opening = async {
            let tcp = TcpStream::connect(address).await.map_err(|error| dial::failed(&error, address))?;
            tcp::tune(&tcp, settings.silence);
            let tls = tls::connector(&me.identity, &peer.key, &[NAME]);
            let tls = tls.map_err(|error| End::Protocol(error.to_string()))?;
            let stream = tls.connect(tls::name(address), tcp).await;
            let stream = stream.map_err(|error| match end::tls(&error) {
                Some(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => NotLent::Unknown,
                _ => dial::refused(&error, address).into(),
            })?;
            let mut stream = TlsStream::from(stream);
            if stream.get_ref().1.alpn_protocol() != Some(NAME) {
                return Err(NotLent::Unknown);
            }
            let frames = hello::introduce(&mut stream, &peer.node, me, settings).await?;
            Ok(Self { stream, frames, settings })
        };
        timeout(settings.handshake, opening).await.unwrap_or(Err(End::Silent.into()))
    }

    /// The names of the files of a checkpoint that the other node lends.
    pub async fn open(&mut self, wanted: &Wanted) -> Result<Vec<String>, NotLent> {
        let asking = async {
            self.ask(&Question::Open(wanted.clone())).await?;
            match self.answer().await? {
                Reply::Names(names) => Ok(names),
                Reply::Refused(refusal) => Err(refusal.into()),
                Reply::Sends(_) => Err(End::Protocol("bytes where names were asked for".into()).into()),
            }
        };
        // The other node's own limit comes first.
        timeout(OPENING + Duration::from_secs(1), asking).await.unwrap_or(Err(NotLent::Slow))
    }

    /// Reads `into.len()` bytes of a file from `offset`, and sums them. After an error what `into` holds is worthless;
    /// after a refusal, and only then, another file may be asked for.
    pub async fn read(&mut self, file: &str, offset: u64, into: &mut [u8]) -> Result<Crc64, NotLent> {
        let mut sum = Crc64::EMPTY;
        let mut done = 0;
        for into in into.chunks_mut(MAX_READ as usize) {
            let len = into.len() as u64;
            let part = Part { file: file.to_owned(), offset: offset.saturating_add(done), len };
            let reading = self.read_part(part, into);
            let crc64 = timeout(read_limit(len), reading).await.unwrap_or(Err(NotLent::Slow))?;
            (sum, done) = (sum.followed_by(crc64, len), done + len);
        }
        Ok(sum)
    }

    async fn read_part(&mut self, part: Part, into: &mut [u8]) -> Result<Crc64, NotLent> {
        let wrong = |what: &str| End::Protocol(format!("{what} of {}", part.file));
        self.ask(&Question::Read(part.clone())).await?;
        match self.answer().await? {
            Reply::Sends(len) if len == part.len => {}
            Reply::Sends(_) => return Err(wrong("another length than the asked one").into()),
            Reply::Refused(refusal) => return Err(refusal.into()),
            Reply::Names(_) => return Err(wrong("names instead of bytes").into()),
        }
        let (mut sum, mut left) = (Crc64::EMPTY, into);
        while !left.is_empty() {
            let frame = self.frames.next(&mut self.stream, FRAME, self.settings.silence).await?;
            if frame.is_empty() {
                return match self.answer().await? {
                    Reply::Refused(refusal) => Err(refusal.into()),
                    _ => Err(wrong("no reason for the end").into()),
                };
            }
            let Some((here, rest)) = left.split_at_mut_checked(frame.len()) else {
                return Err(wrong("more bytes than were asked for").into());
            };
            here.copy_from_slice(&frame);
            sum = sum.followed_by(Crc64::of(&frame), frame.len() as u64);
            left = rest;
        }
        Ok(sum)
    }

    async fn ask(&mut self, ask: &Question) -> Result<(), End> {
        let frame = frame::encode(ask, MAX_ASK).map_err(|fault| End::Protocol(fault.to_string()))?;
        frame::write(&mut self.stream, &frame, self.settings.silence).await
    }

    async fn answer(&mut self) -> Result<Reply, End> {
        let answer = self.frames.next(&mut self.stream, MAX_MESSAGE, OPENING + self.settings.silence).await?;
        serde_json::from_slice(&answer).map_err(|error| End::Protocol(format!("not an answer: {error}")))
    }
}
