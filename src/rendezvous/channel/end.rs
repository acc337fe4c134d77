//! Why a link ended, or never came to be.

use std::{fmt, io, net::SocketAddr};

use rustls::AlertDescription;

use crate::ids::{NodeId, NodeKey, RunId};

/// What a node runs: both numbers must be equal on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// The version of this protocol.
    pub protocol: u32,
    /// The version of the binary.
    pub version: String,
}

impl fmt::Display for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (protocol {})", self.version, self.protocol)
    }
}

/// The reason. A caller's policy tells them apart: `Refused` and `OtherKey` say that the process is gone, `Silent` and
/// `Unreachable` say nothing about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// One of the two sides said goodbye.
    #[error("the link was closed")]
    Closed,
    /// The connection ended without a goodbye: the process was killed, or something in between reset the connection.
    #[error("the connection broke: {0}")]
    Lost(String),
    /// The machine answers, and no process listens.
    #[error("nothing listens at {0}")]
    Refused(SocketAddr),
    /// There is no way to the address, or the attempt failed here.
    #[error("no connection to {address}: {why}")]
    Unreachable {
        /// Where to.
        address: SocketAddr,
        /// The system's reason.
        why: String,
    },
    /// Nothing is heard from the peer, or it acknowledges nothing; or an attempt took too long.
    #[error("the peer is silent")]
    Silent,
    /// The peer does not read: what was to be sent had to wait for too long, or there was too much of it.
    #[error("the peer does not take its messages")]
    Slow,
    /// The peer's key is not known here.
    #[error("the key {} is not known here", .0.as_str())]
    Stranger(NodeKey),
    /// The peer does not know this node's key.
    #[error("the peer does not know this node's key")]
    NotKnown,
    /// Another key than the expected one answers at the address.
    #[error("another key answers at {0}")]
    OtherKey(SocketAddr),
    /// The peer runs another version.
    #[error("node {node} runs version {theirs}, this one {ours}")]
    Version {
        /// The peer, by its key.
        node: NodeId,
        /// What it runs.
        theirs: Build,
        /// What this node runs.
        ours: Build,
    },
    /// The peer belongs to another run.
    #[error("node {node} belongs to run {theirs:?}, this one to {ours}")]
    OtherRun {
        /// The peer, by its key.
        node: NodeId,
        /// Its run, as it says.
        theirs: String,
        /// This node's run.
        ours: RunId,
    },
    /// The peer says that it is another node than the one whose key it has.
    #[error("node {node} says that it is {said:?}")]
    OtherNode {
        /// The peer, by its key.
        node: NodeId,
        /// What it says.
        said: String,
    },
    /// The peer broke the rules of this protocol, or does not speak it.
    #[error("not this protocol: {0}")]
    Protocol(String),
}

impl End {
    /// What an error of a connection means.
    pub(super) fn of(error: &io::Error) -> Self {
        match tls(error) {
            Some(rustls::Error::AlertReceived(AlertDescription::CertificateUnknown)) => Self::NotKnown,
            Some(fault) => Self::Protocol(fault.to_string()),
            None => match error.kind() {
                // The kernel has waited for acknowledgements in vain.
                io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                    Self::Silent
                }
                kind => Self::Lost(kind.to_string()),
            },
        }
    }
}

/// The error of TLS inside an error of the connection.
pub(super) fn tls(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_gives_up_means_silence_and_a_reset_does_not() {
        for kind in [io::ErrorKind::TimedOut, io::ErrorKind::HostUnreachable, io::ErrorKind::NetworkUnreachable] {
            assert_eq!(End::of(&kind.into()), End::Silent);
        }
        for kind in [io::ErrorKind::ConnectionReset, io::ErrorKind::UnexpectedEof, io::ErrorKind::BrokenPipe] {
            assert!(matches!(End::of(&kind.into()), End::Lost(_)), "{kind}");
        }
    }
}
