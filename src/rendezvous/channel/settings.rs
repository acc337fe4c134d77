//! The limits of a channel.

use std::time::Duration;

/// The longest message in bytes, without its length. Control messages are far shorter; a roster of 1,000 nodes fits.
pub const MAX_MESSAGE: usize = 1 << 20;
/// The same for the first message of each side.
pub const MAX_HELLO: usize = 4 << 10;

/// What a test shortens and an operator never needs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    /// A side that has had nothing to say for this long sends a ping.
    pub ping: Duration,
    /// A peer that is not heard, takes nothing or does not acknowledge for this long is cut.
    pub silence: Duration,
    /// The time for one connection from its first packet to the end of the introduction.
    pub handshake: Duration,
    /// How long a side that has said goodbye waits for the other's.
    pub linger: Duration,
    /// Connections that have not shown a known key yet; one more displaces another.
    pub strangers: usize,
    /// Messages that wait to be written, at most.
    pub queue: usize,
    /// Their bytes, at most.
    pub queue_bytes: usize,
    /// Messages that were read and wait for this node, at most; then no more are read.
    pub inbox: usize,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            ping: Duration::from_secs(1),
            // Four pings may be lost or late.
            silence: Duration::from_secs(5),
            handshake: Duration::from_secs(5),
            linger: Duration::from_secs(1),
            strangers: 64,
            queue: 1024,
            // A few of the longest messages.
            queue_bytes: 4 * MAX_MESSAGE,
            inbox: 64,
        }
    }
}
