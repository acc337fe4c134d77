//! Who this node is on its channel: a key pair made at the agent's start, and never stored.

use std::sync::Arc;

use rustls::{
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};

use super::tls;
use crate::ids::{NodeId, NodeKey, RunId};

/// The part of a PKCS#8 document before an Ed25519 key's 32 secret bytes (RFC 8410, section 7).
const PKCS8: [u8; 16] = [0x30, 0x2e, 0x02, 0x01, 0, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// No key pair could be made.
#[derive(Debug, thiserror::Error)]
#[error("no key for the channel could be made: {0}")]
pub struct NoKey(String);

/// A key pair, and the public key as other nodes know it.
#[derive(Clone, Debug)]
pub struct Identity {
    key: NodeKey,
    pub(super) pair: Arc<CertifiedKey>,
    pub(super) provider: Arc<CryptoProvider>,
}

impl Identity {
    /// A new key pair. The secret comes from the cryptographic library's own generator.
    pub fn new() -> Result<Self, NoKey> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let fail = |error: &dyn std::fmt::Display| NoKey(error.to_string());
        let mut document = [0; 48];
        let (head, secret) = document.split_at_mut(PKCS8.len());
        head.copy_from_slice(&PKCS8);
        provider.secure_random.fill(secret).map_err(|_| fail(&"no random bytes"))?;
        let document = PrivatePkcs8KeyDer::from(document.to_vec());
        let secret = aws_lc_rs::sign::any_eddsa_type(&document).map_err(|error| fail(&error))?;
        let public = secret.public_key().ok_or_else(|| fail(&"it has no public part"))?.to_vec();
        let key = tls::key_of(&public).ok_or_else(|| fail(&"its public part is malformed"))?;
        let pair = Arc::new(CertifiedKey::new(vec![CertificateDer::from(public)], secret));
        Ok(Self { key, pair, provider })
    }
    /// The public key, for `nodes/<node-id>.json`.
    pub fn key(&self) -> &NodeKey {
        &self.key
    }
}

/// This node, as it introduces itself.
#[derive(Clone, Debug)]
pub struct LocalNode {
    /// Its keys.
    pub identity: Identity,
    /// The run that it belongs to.
    pub run: RunId,
    /// Its id.
    pub node: NodeId,
    /// The version of its binary.
    pub version: String,
}

impl LocalNode {
    /// A node of `run` with this binary's version and new keys.
    pub fn new(run: RunId, node: NodeId) -> Result<Self, NoKey> {
        Ok(Self { identity: Identity::new()?, run, node, version: env!("CARGO_PKG_VERSION").into() })
    }
    /// This node as a peer of others, and of itself.
    pub fn as_peer(&self) -> Peer {
        Peer { node: self.node.clone(), key: self.identity.key.clone() }
    }
}

/// Another node, as its object in the store describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its id.
    pub node: NodeId,
    /// Its public key.
    pub key: NodeKey,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_has_a_key_of_its_own() {
        let (a, b) = (Identity::new().unwrap(), Identity::new().unwrap());
        assert_ne!(a.key(), b.key());
        assert_eq!(a.key().as_str().len(), 64);
        let shown = format!("{a:?}");
        assert!(shown.contains(a.key().as_str()), "{shown}");
    }

    /// RFC 8032, section 7.1, test 1: the bytes that a key pair is made of are those of the standard.
    #[test]
    fn a_secret_gives_the_public_key_of_the_standard() {
        let secret = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
        let public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
        let byte = |i: usize| u8::from_str_radix(&secret[2 * i..2 * i + 2], 16).unwrap();
        let document: Vec<u8> = PKCS8.into_iter().chain((0..32).map(byte)).collect();
        let key = aws_lc_rs::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(document)).unwrap();
        assert_eq!(tls::key_of(&key.public_key().unwrap()).unwrap().as_str(), public);
    }
}
