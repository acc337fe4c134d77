//! TLS 1.3 with raw public keys (RFC 8446, RFC 7250): no certificate, no authority, no name. Each side proves that it
//! has the secret of its Ed25519 key, and the key says who it is.

use std::{fmt, io, net::SocketAddr, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, ServerConfig,
    SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{end, identity::Identity};
use crate::ids::{NodeId, NodeKey};

/// The part of a SubjectPublicKeyInfo before an Ed25519 key's 32 bytes (RFC 8410, section 4).
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0];

/// Which node has a key, by what stands in the store; `None`: nobody. It is called during handshakes, so it looks
/// something up in memory and does not wait.
pub type Known = Arc<dyn Fn(&NodeKey) -> Option<NodeId> + Send + Sync>;

/// The key in a SubjectPublicKeyInfo; `None`: it holds no Ed25519 key.
pub(super) fn key_of(info: &[u8]) -> Option<NodeKey> {
    let raw: &[u8; 32] = info.strip_prefix(&SPKI)?.try_into().ok()?;
    NodeKey::new(raw.iter().map(|byte| format!("{byte:02x}")).collect::<String>()).ok()
}

/// The key that the peer of a finished handshake has.
pub(super) fn peer_key(stream: &TlsStream<TcpStream>) -> Option<NodeKey> {
    stream.get_ref().1.peer_certificates()?.first().and_then(|info| key_of(info))
}

/// For a node that accepts: any key that `known` knows. `protocols`: what it speaks beside that of a link, which has no
/// name; a peer that names others alone is refused.
pub(super) fn acceptor(identity: &Identity, known: Known, protocols: &[&[u8]]) -> Result<TlsAcceptor, Error> {
    let verifier = Keys { accepts: Accepts::Known(known), provider: identity.provider.clone() };
    let mut config = ServerConfig::builder_with_provider(identity.provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(identity.pair.clone())));
    // A resumed session would stand for a key that may have been forgotten meanwhile; early data can be replayed.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// For a node that dials: this very key. `protocols`: the one that it asks for; none: a link.
pub(super) fn connector(identity: &Identity, key: &NodeKey, protocols: &[&[u8]]) -> Result<TlsConnector, Error> {
    let verifier = Keys { accepts: Accepts::One(key.clone()), provider: identity.provider.clone() };
    let mut config = ClientConfig::builder_with_provider(identity.provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(identity.pair.clone())));
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The name that TLS wants; nobody looks at it.
pub(super) fn name(address: SocketAddr) -> ServerName<'static> {
    ServerName::IpAddress(address.ip().into())
}

/// The reason inside a failed handshake: the peer's key, where it was not accepted here.
#[derive(Debug, thiserror::Error)]
#[error("the key {} is not accepted", .0.as_str())]
struct Unaccepted(NodeKey);

/// The peer's key, if a handshake failed because this side does not accept it.
pub(super) fn unaccepted(error: &io::Error) -> Option<&NodeKey> {
    match end::tls(error)? {
        Error::InvalidCertificate(CertificateError::Other(OtherError(reason))) => {
            reason.downcast_ref::<Unaccepted>().map(|unaccepted| &unaccepted.0)
        }
        _ => None,
    }
}

enum Accepts {
    One(NodeKey),
    Known(Known),
}

/// Decides about the other side's key.
struct Keys {
    accepts: Accepts,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Keys");
        if let Accepts::One(key) = &self.accepts {
            shown.field("one", key);
        }
        shown.finish_non_exhaustive()
    }
}

impl Keys {
    fn check(&self, info: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<(), Error> {
        let key = key_of(info).filter(|_| more.is_empty());
        let key = key.ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let accepted = match &self.accepts {
            Accepts::One(one) => *one == key,
            Accepts::Known(known) => known(&key).is_some(),
        };
        // It reaches the peer as the alert "certificate unknown", which its side reads as `End::NotKnown`.
        let refused = |key| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Unaccepted(key)))));
        if accepted { Ok(()) } else { Err(refused(key)) }
    }
    fn signed(
        &self,
        message: &[u8],
        info: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let info = SubjectPublicKeyInfoDer::from(info.as_ref());
        let schemes = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &info, signature, schemes)
    }
}

/// TLS 1.2 is not offered, so that nothing is signed under it.
fn not_offered() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not offered".into()))
}

impl ServerCertVerifier for Keys {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _stapled: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _info: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        not_offered()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        info: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed(message, info, signature)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Keys {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _info: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        not_offered()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        info: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed(message, info, signature)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
