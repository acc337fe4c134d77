//! A direct channel between the agents of one run: requests and hints over TCP with TLS 1.3. Nothing becomes true by a
//! message; the journal alone says what is true.
//!
//! # Who may talk
//! Each agent makes an Ed25519 key pair when it starts ([`Identity`]) and writes the public key into
//! `nodes/<node-id>.json`, which only a writer of the run's folder can put. Both sides show their keys as raw public
//! keys (RFC 7250) and prove in the handshake that they have the secrets (RFC 8446). A node that dials expects one key;
//! a node that accepts asks [`Known`] which node has the key. Who a peer is comes from its key alone, never from its
//! address or its words. There is no secret in the store, so a reader of the store can't join. Another key, no key or
//! an older TLS is refused within the handshake, before one byte of a message is read.
//!
//! A recorded connection that is played again is harmless: both sides put fresh random keys into each handshake, so the
//! recorded proof and everything behind it don't decrypt. Sessions are not resumed and early data is not accepted,
//! which are the parts of TLS that a replay could use (RFC 8446, section 8).
//!
//! # Protocol
//! ```text
//! TLS 1.3 { frame* }        frame: 4 bytes little-endian length, then JSON
//!   1st:  {"protocol":1,"version":"0.1.0","run":"…","node":"…"}      from both sides, at once
//!   then: "ping"  or  {"message":{"generation":3,"seq":7,"body":…}}
//! ```
//! Another protocol, version, run or node in the hello ends the link on both sides with the same reason. `seq` rises
//! strictly; an older number ends the link, because TLS can't reorder. A message of an old generation is no fault: the
//! receiver drops it ([`Envelope::unless_old`]).
//!
//! # Limits
//! A message has at most [`MAX_MESSAGE`] bytes. The length is checked before memory is taken, and memory grows as bytes
//! arrive. A side that has nothing to say sends a ping each second; 5 s of silence end the link, and so do 5 s without
//! acknowledgements, by `TCP_USER_TIMEOUT`. [`Link::send`] never waits: a peer that does not read lets the queue fill
//! up and is cut. A node that does not take its messages stops reading, so its peer cuts it; whether an agent's own
//! loop still turns is what its heartbeat shows. Strangers are bounded in number and time (`listener.rs`).
//! Bytes of files travel on connections of their own ([`bulk`]), so that no ping waits behind them.
//!
//! # Crash, retry, cancel
//! Nothing is stored; keys are lost with their process. A killed process breaks its links at once ([`End::Lost`]) and
//! its port refuses ([`End::Refused`]); a machine without power is silent ([`End::Silent`]). A cut means "that node is
//! out of the group" and nothing else. Nobody dials again by himself here: that is the caller's policy. Every future
//! may be dropped: a dial closes its connection, [`Link::recv`] and [`Listener::accept`] lose nothing. A dropped link
//! writes what is queued and says goodbye.

pub mod address;
pub mod bulk;
mod dial;
mod end;
mod envelope;
#[cfg(test)]
mod figures_tests;
mod frame;
mod hello;
#[cfg(test)]
mod hostile_tests;
mod identity;
mod link;
mod listener;
mod settings;
mod tcp;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
mod tls;

pub use self::{
    dial::dial,
    end::{Build, End},
    envelope::Envelope,
    frame::Unsendable,
    hello::PROTOCOL,
    identity::{Identity, LocalNode, NoKey, Peer},
    link::{Link, NotSent, Receiver, Sender},
    listener::Listener,
    settings::{LinkSettings, MAX_MESSAGE},
    tls::Known,
};
