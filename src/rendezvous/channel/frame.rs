//! How a message travels inside the encrypted stream: 4 bytes little-endian length, then JSON.
//!
//! The length is checked before anything is allocated for it, and memory grows as bytes arrive. The pieces here may be
//! dropped at any `await`: what has been read stays in the buffer.

use std::{io, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use super::end::End;

/// Bytes of the length.
pub(super) const PREFIX: usize = 4;
/// Bytes asked for at once; a TLS record has at most this many.
const CHUNK: usize = 16 << 10;

/// A message that can't be sent, as a fault of this side.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsendable {
    /// It is longer than a message may be.
    #[error("a message of {0} bytes is too long")]
    TooLong(usize),
    /// It has no form as JSON.
    #[error("a message has no form as JSON: {0}")]
    NotJson(String),
}

/// The bytes of one frame.
pub(super) fn encode<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, Unsendable> {
    let mut frame = vec![0; PREFIX];
    serde_json::to_writer(&mut frame, message).map_err(|error| Unsendable::NotJson(error.to_string()))?;
    let len = frame.len() - PREFIX;
    let prefix = u32::try_from(len).ok().filter(|_| len <= limit).ok_or(Unsendable::TooLong(len))?;
    frame[..PREFIX].copy_from_slice(&prefix.to_le_bytes());
    Ok(frame)
}

/// What has been read and not yet been taken.
#[derive(Debug, Default)]
pub(super) struct Frames {
    buffer: BytesMut,
}

impl Frames {
    /// The next frame's content. `Silent` if not one byte arrives within `silence`.
    pub(super) async fn next<R: AsyncRead + Unpin>(
        &mut self,
        from: &mut R,
        limit: usize,
        silence: Duration,
    ) -> Result<Bytes, End> {
        loop {
            if let Some(frame) = self.take(limit)? {
                return Ok(frame);
            }
            self.buffer.reserve(CHUNK);
            match timeout(silence, from.read_buf(&mut self.buffer)).await {
                Err(_) => return Err(End::Silent),
                // The stream ended where a goodbye stood; an end without one is an error of TLS.
                Ok(Ok(0)) if self.buffer.is_empty() => return Err(End::Closed),
                Ok(Ok(0)) => return Err(End::Protocol("the stream ended within a message".into())),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(End::of(&error)),
            }
        }
    }

    /// A whole frame, if the buffer holds one.
    fn take(&mut self, limit: usize) -> Result<Option<Bytes>, End> {
        let Some(prefix) = self.buffer.first_chunk::<PREFIX>() else { return Ok(None) };
        let len = u32::from_le_bytes(*prefix) as usize;
        if len > limit {
            return Err(End::Protocol(format!("a message of {len} bytes, where {limit} are allowed")));
        }
        if self.buffer.len() < PREFIX + len {
            return Ok(None);
        }
        self.buffer.advance(PREFIX);
        Ok(Some(self.buffer.split_to(len).freeze()))
    }
}

/// Writes one frame. `Slow` if the peer takes not one byte within `patience`.
pub(super) async fn write<W: AsyncWrite + Unpin>(to: &mut W, mut frame: &[u8], patience: Duration) -> Result<(), End> {
    while !frame.is_empty() {
        let taken = timeout(patience, to.write(frame)).await.map_err(|_| End::Slow)?;
        match taken.map_err(|error| End::of(&error))? {
            0 => return Err(End::of(&io::ErrorKind::WriteZero.into())),
            n => frame = &frame[n..],
        }
    }
    timeout(patience, to.flush()).await.map_err(|_| End::Slow)?.map_err(|error| End::of(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    async fn read(mut wire: &[u8], limit: usize) -> Result<Vec<u8>, End> {
        Frames::default().next(&mut wire, limit, LONG).await.map(|frame| frame.to_vec())
    }

    #[tokio::test]
    async fn frames_come_out_one_by_one_however_their_bytes_arrive() {
        let wire: Vec<u8> = ["a", "", "long enough"].iter().flat_map(|text| encode(text, 100).unwrap()).collect();
        for piece in 1..=wire.len() {
            let (mut to, mut from) = tokio::io::duplex(piece);
            let sent = wire.clone();
            let writing = tokio::spawn(async move { to.write_all(&sent).await });
            let mut frames = Frames::default();
            for text in ["a", "", "long enough"] {
                let frame = frames.next(&mut from, 100, LONG).await.unwrap();
                assert_eq!(serde_json::from_slice::<String>(&frame).unwrap(), text, "pieces of {piece} bytes");
            }
            writing.await.unwrap().unwrap();
            assert_eq!(frames.next(&mut from, 100, LONG).await.unwrap_err(), End::Closed);
        }
    }

    #[tokio::test]
    async fn a_frame_of_a_gibibyte_is_refused_when_its_length_is_read_and_takes_no_memory() {
        let mut frames = Frames::default();
        let mut wire: &[u8] = &(1_u32 << 30).to_le_bytes();
        let refused = frames.next(&mut wire, 1 << 20, LONG).await.unwrap_err();
        assert!(matches!(&refused, End::Protocol(text) if text.contains("1073741824")), "{refused}");
        assert!(frames.buffer.capacity() <= 2 * CHUNK, "{} bytes were allocated", frames.buffer.capacity());
    }

    #[tokio::test]
    async fn a_length_within_the_limit_takes_memory_only_as_bytes_arrive() {
        let (mut to, mut from) = tokio::io::duplex(64);
        to.write_all(&(1_u32 << 20).to_le_bytes()).await.unwrap();
        let mut frames = Frames::default();
        let silent = frames.next(&mut from, 1 << 20, Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(silent, End::Silent);
        assert!(frames.buffer.capacity() <= 2 * CHUNK, "{} bytes were allocated", frames.buffer.capacity());
    }

    #[tokio::test]
    async fn the_limit_itself_is_allowed_and_one_byte_more_is_not() {
        let exact = encode(&"x".repeat(98), 100).unwrap();
        assert_eq!(exact.len(), PREFIX + 100);
        assert_eq!(read(&exact, 100).await.unwrap().len(), 100);
        assert!(matches!(read(&exact, 99).await.unwrap_err(), End::Protocol(_)));
        assert_eq!(encode(&"x".repeat(99), 100).unwrap_err(), Unsendable::TooLong(101));
    }

    #[tokio::test]
    async fn an_end_within_a_message_is_not_a_goodbye() {
        let wire = encode(&"text", 100).unwrap();
        assert_eq!(read(&[], 100).await.unwrap_err(), End::Closed);
        for cut in 1..wire.len() {
            assert!(matches!(read(&wire[..cut], 100).await.unwrap_err(), End::Protocol(_)), "cut at {cut}");
        }
    }

    #[tokio::test]
    async fn a_dropped_read_loses_nothing() {
        let (mut to, mut from) = tokio::io::duplex(1);
        let wire = encode(&"text", 100).unwrap();
        let mut frames = Frames::default();
        for byte in wire {
            // Reads the bytes that have arrived, and is cancelled where it would wait for more.
            let early = futures::FutureExt::now_or_never(frames.next(&mut from, 100, LONG));
            assert!(early.is_none());
            to.write_all(&[byte]).await.unwrap();
        }
        assert_eq!(frames.next(&mut from, 100, LONG).await.unwrap().as_ref(), b"\"text\"");
    }
}
