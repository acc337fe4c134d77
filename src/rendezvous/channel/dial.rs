//! The side that opens a link.

use std::{io, net::SocketAddr};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsStream;

use super::{
    end::End,
    hello,
    identity::{LocalNode, Peer},
    link::Link,
    settings::LinkSettings,
    tcp, tls,
};

/// Opens a link to `peer` at `address`, within [`LinkSettings::handshake`] and once: whether and when to try again is
/// the caller's decision. Dropping the future closes the connection.
pub async fn dial<Out, In>(
    address: SocketAddr,
    peer: &Peer,
    me: &LocalNode,
    settings: LinkSettings,
) -> Result<Link<Out, In>, End>
where
    Out: Serialize,
    In: DeserializeOwned + Send + 'static,
{
    let opening = async {
        let tcp = TcpStream::connect(address).await.map_err(|error| failed(&error, address))?;
        tcp::tune(&tcp, settings.silence);
        let tls = tls::connector(&me.identity, &peer.key, &[]).map_err(|error| End::Protocol(error.to_string()))?;
        let stream = tls.connect(tls::name(address), tcp).await;
        let mut stream: TlsStream<_> = stream.map_err(|error| refused(&error, address))?.into();
        let frames = hello::introduce(&mut stream, &peer.node, me, settings).await?;
        Ok(Link::start(stream, frames, peer.clone(), address, settings))
    };
    timeout(settings.handshake, opening).await.unwrap_or(Err(End::Silent))
}

/// What a failed connect means.
pub(super) fn failed(error: &io::Error, address: SocketAddr) -> End {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => End::Refused(address),
        io::ErrorKind::TimedOut => End::Silent,
        // The process went away while the kernel held the connection for it.
        io::ErrorKind::ConnectionReset => End::of(error),
        _ => End::Unreachable { address, why: error.to_string() },
    }
}

/// What a failed handshake means.
pub(super) fn refused(error: &io::Error, address: SocketAddr) -> End {
    match tls::unaccepted(error) {
        Some(_) => End::OtherKey(address),
        None => End::of(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_port_is_told_from_a_silent_one_and_from_no_way() {
        let address = "192.0.2.1:1".parse().unwrap();
        let of = |kind: io::ErrorKind| failed(&kind.into(), address);
        assert_eq!(of(io::ErrorKind::ConnectionRefused), End::Refused(address));
        assert_eq!(of(io::ErrorKind::TimedOut), End::Silent);
        assert!(matches!(of(io::ErrorKind::ConnectionReset), End::Lost(_)));
        assert!(matches!(of(io::ErrorKind::HostUnreachable), End::Unreachable { .. }));
        assert!(matches!(of(io::ErrorKind::PermissionDenied), End::Unreachable { .. }));
    }
}
