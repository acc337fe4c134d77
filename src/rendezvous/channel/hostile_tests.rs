//! Strangers, liars and crowds: each is refused, and the next good peer gets in.

use std::{io, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    frame::{self, Frames},
    hello::Hello,
    testing::{Nodes, PATIENT, Pair, Relay, TestLink, listen, node, say},
    tls, *,
};

/// More time than any of these takes; a test that hangs fails.
const ENOUGH: Duration = Duration::from_secs(60);

/// Reads until the other side has closed or reset the connection.
async fn is_closed(stream: &mut TcpStream) {
    let mut buffer = [0; 4096];
    let closing = async { while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {} };
    tokio::time::timeout(ENOUGH, closing).await.expect("the connection stays open");
}

#[tokio::test]
async fn a_key_that_is_not_known_is_refused() {
    let mut pair = Pair::new(PATIENT).await;
    let stranger = node("guest");
    let dialled = dial::<String, String>(pair.listener.address(), &pair.host.as_peer(), &stranger, PATIENT).await;
    assert_eq!(dialled.unwrap_err(), End::NotKnown);
    pair.is_undisturbed().await;
}

#[tokio::test]
async fn another_key_at_the_expected_address_is_refused() {
    let mut pair = Pair::new(PATIENT).await;
    let (address, other) = (pair.listener.address(), node("host").as_peer());
    let dialled = dial::<String, String>(address, &other, &pair.guest, PATIENT).await;
    assert_eq!(dialled.unwrap_err(), End::OtherKey(address));
    pair.is_undisturbed().await;
}

#[tokio::test]
async fn a_public_key_without_its_secret_is_refused_on_both_sides() {
    let mut pair = Pair::new(PATIENT).await;
    // The guest's public key with another node's secret.
    let mut thief = (*node("guest")).clone();
    let stolen = pair.guest.identity.pair.cert.clone();
    thief.identity.pair = Arc::new(CertifiedKey::new(stolen, thief.identity.pair.key.clone()));
    let dialled = dial::<String, String>(pair.listener.address(), &pair.host.as_peer(), &thief, PATIENT).await;
    assert!(matches!(&dialled, Err(End::Protocol(text)) if text.contains("DecryptError")), "{dialled:?}");
    pair.is_undisturbed().await;

    // The same at the port that is dialled.
    let fake = listen(&Arc::new(thief), &Nodes::of(&[&pair.host]), PATIENT).await;
    let dialled = dial::<String, String>(fake.address(), &pair.guest.as_peer(), &pair.host, PATIENT).await;
    assert!(matches!(&dialled, Err(End::Protocol(text)) if text.contains("BadSignature")), "{dialled:?}");
}

#[tokio::test]
async fn garbage_is_refused() {
    let mut pair = Pair::new(PATIENT).await;
    let hello = br#"{"protocol":1,"version":"0.1.0","run":"run","node":"guest"}"#;
    let plain = [&60_u32.to_le_bytes(), hello.as_slice()].concat();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 1000], &plain, &[0x16, 3, 3, 0xff, 0xff], &[]] {
        let mut stream = TcpStream::connect(pair.listener.address()).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        is_closed(&mut stream).await;
    }
    pair.is_undisturbed().await;
}

/// Accepts whatever a server shows.
#[derive(Debug)]
struct Gullible {
    provider: Arc<CryptoProvider>,
    raw: bool,
}

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
    fn requires_raw_public_keys(&self) -> bool {
        self.raw
    }
}

/// What a client learns that trusts every server.
async fn learns(pair: &Pair, versions: &[&'static rustls::SupportedProtocolVersion], raw: bool, key: bool) -> String {
    let provider = pair.guest.identity.provider.clone();
    let verifier = Arc::new(Gullible { provider: provider.clone(), raw });
    let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
    let config = config.dangerous().with_custom_certificate_verifier(verifier);
    let config = if key {
        let pair = pair.guest.identity.pair.clone();
        config.with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(pair)))
    } else {
        config.with_no_client_auth()
    };
    let address = pair.listener.address();
    let stream = TcpStream::connect(address).await.unwrap();
    let learnt = async {
        let mut stream = TlsConnector::from(Arc::new(config)).connect(tls::name(address), stream).await?;
        // A client of TLS 1.3 is done before the server has judged it.
        stream.read(&mut [0; 100]).await
    };
    match tokio::time::timeout(ENOUGH, learnt).await.unwrap() {
        Ok(n) => format!("{n} bytes"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn a_client_without_a_key_or_with_an_older_tls_is_refused() {
    let mut pair = Pair::new(PATIENT).await;
    for (versions, raw, key, alert) in [
        (&[&TLS13][..], true, false, "HandshakeFailure"),
        (&[&TLS13], false, false, "HandshakeFailure"),
        (&[&TLS12], false, false, "ProtocolVersion"),
        (&[&TLS12], true, true, "ProtocolVersion"),
    ] {
        let learnt = learns(&pair, versions, raw, key).await;
        assert!(learnt.contains(alert), "{versions:?}, raw {raw}, key {key}: {learnt}");
    }
    // The same client with a known key is let in: what it lacked above is what it was refused for. It says no hello.
    let bytes = learns(&pair, &[&TLS13], true, true).await;
    assert!(bytes.ends_with("bytes") && bytes != "0 bytes", "{bytes}");
    pair.is_undisturbed().await;
}

/// A client that offers raw keys and then shows none.
#[tokio::test]
async fn an_empty_place_where_the_key_belongs_is_refused() {
    #[derive(Debug)]
    struct Shy;
    impl rustls::client::ResolvesClientCert for Shy {
        fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            None
        }
        fn only_raw_public_keys(&self) -> bool {
            true
        }
        fn has_certs(&self) -> bool {
            true
        }
    }
    let mut pair = Pair::new(PATIENT).await;
    let provider = pair.guest.identity.provider.clone();
    let verifier = Arc::new(Gullible { provider: provider.clone(), raw: true });
    let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]).unwrap();
    let config = config.dangerous().with_custom_certificate_verifier(verifier);
    let config = config.with_client_cert_resolver(Arc::new(Shy));
    let address = pair.listener.address();
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(tls::name(address), stream).await.unwrap();
    let error = stream.read(&mut [0; 100]).await.unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    pair.is_undisturbed().await;
}

#[tokio::test]
async fn a_recorded_connection_that_is_played_again_is_refused() {
    let mut pair = Pair::new(PATIENT).await;
    let relay = Relay::to(pair.listener.address()).await;
    let (mut near, mut far) = pair.link_through(relay.address, PATIENT).await;
    say(&mut near, 1, "stop all").await;
    assert_eq!(far.recv().await.unwrap().body, "stop all");
    let recorded = relay.recorded.lock().unwrap().clone();
    assert!(recorded.len() > 500, "{} bytes", recorded.len());

    // All of it at once, and as it went over the line: the first flight, then the rest when the server has answered.
    let first = 5 + usize::from(u16::from_be_bytes([recorded[3], recorded[4]]));
    for pieces in [vec![&recorded[..]], vec![&recorded[..first], &recorded[first..]]] {
        let mut stream = TcpStream::connect(pair.listener.address()).await.unwrap();
        for (at, piece) in pieces.iter().enumerate() {
            if at > 0 {
                assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
            }
            let _ = stream.write_all(piece).await;
        }
        is_closed(&mut stream).await;
    }
    // The link that was recorded goes on, and nothing was said twice.
    say(&mut near, 1, "go on").await;
    assert_eq!(far.recv().await.unwrap().body, "go on");
    pair.is_undisturbed().await;
}

#[tokio::test]
async fn no_session_is_resumed() {
    let pair = Pair::new(PATIENT).await;
    let address = pair.listener.address();
    let connector = tls::connector(&pair.guest.identity, pair.host.identity.key(), &[]).unwrap();
    let mut eager = ClientConfig::clone(connector.config());
    eager.resumption = rustls::client::Resumption::in_memory_sessions(8);
    eager.enable_early_data = true;
    let eager = TlsConnector::from(Arc::new(eager));
    for _ in 0..3 {
        let tcp = TcpStream::connect(address).await.unwrap();
        let mut stream = eager.connect(tls::name(address), tcp).await.unwrap();
        // Behind the hello would stand a ticket, if there were one.
        Frames::default().next(&mut stream, 4096, ENOUGH).await.unwrap();
        let (_, session) = stream.get_ref();
        assert_eq!(session.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(session.tls13_tickets_received(), 0);
        assert!(!session.is_early_data_accepted());
    }
}

/// The encrypted stream of a known node, before any hello.
async fn before_the_hello(pair: &Pair) -> TlsStream<TcpStream> {
    let address = pair.listener.address();
    let tcp = TcpStream::connect(address).await.unwrap();
    let tls = tls::connector(&pair.guest.identity, pair.host.identity.key(), &[]).unwrap();
    tls.connect(tls::name(address), tcp).await.unwrap()
}

/// Reads the listener's hello, and then only its end.
async fn ends_after_its_hello(mut stream: TlsStream<TcpStream>) {
    let mut frames = Frames::default();
    let hello = frames.next(&mut stream, 4096, ENOUGH).await.unwrap();
    assert_eq!(serde_json::from_slice::<Hello>(&hello).unwrap().node, "host");
    let end = frames.next(&mut stream, 4096, ENOUGH).await.unwrap_err();
    assert!(matches!(end, End::Closed | End::Lost(_)), "{end}");
}

#[tokio::test]
async fn a_known_node_with_a_bad_hello_is_refused() {
    let mut pair = Pair::new(PATIENT).await;
    let liar = Hello { node: "host".into(), ..Hello::of(&pair.guest) };
    let long = Hello { version: "x".repeat(5000), ..Hello::of(&pair.guest) };
    for bytes in [
        frame::encode(&liar, MAX_MESSAGE).unwrap(),
        frame::encode(&long, MAX_MESSAGE).unwrap(),
        frame::encode(&"hello", MAX_MESSAGE).unwrap(),
        (1_u32 << 30).to_le_bytes().to_vec(),
    ] {
        let mut stream = before_the_hello(&pair).await;
        stream.write_all(&bytes).await.unwrap();
        stream.flush().await.unwrap();
        ends_after_its_hello(stream).await;
    }
    pair.is_undisturbed().await;
}

#[tokio::test]
async fn a_frame_of_a_gibibyte_from_a_known_node_ends_its_link_alone() {
    let mut pair = Pair::new(PATIENT).await;
    let (mut near, mut far) = pair.link(PATIENT).await;
    let mut stream = before_the_hello(&pair).await;
    stream.write_all(&frame::encode(&Hello::of(&pair.guest), MAX_MESSAGE).unwrap()).await.unwrap();
    stream.write_all(&(1_u32 << 30).to_le_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let mut rude: TestLink = pair.listener.accept().await;
    let end = rude.recv().await.unwrap_err();
    assert!(matches!(&end, End::Protocol(text) if text.contains("1073741824")), "{end}");
    // It is told so: the end is a goodbye, and no reset.
    let mut frames = Frames::default();
    frames.next(&mut stream, 4096, ENOUGH).await.unwrap();
    let goodbye = async {
        while frames.next(&mut stream, 4096, ENOUGH).await?.as_ref() == b"\"ping\"" {}
        Err::<(), End>(End::Slow)
    };
    assert_eq!(goodbye.await.unwrap_err(), End::Closed);
    say(&mut near, 1, "still here").await;
    assert_eq!(far.recv().await.unwrap().body, "still here");
    pair.is_undisturbed().await;
}

#[tokio::test]
async fn a_node_that_says_it_is_another_is_named_on_both_sides() {
    let pair = Pair::new(PATIENT).await;
    // The store gives the host's key to another id than the one that the host says.
    let wrong = Peer { node: node("third").node.clone(), key: pair.host.identity.key().clone() };
    let dialled = dial::<String, String>(pair.listener.address(), &wrong, &pair.guest, PATIENT).await;
    let end = dialled.unwrap_err();
    assert!(matches!(&end, End::OtherNode { node, said } if node.as_str() == "third" && said == "host"), "{end}");
}

#[tokio::test]
async fn a_crowd_that_connects_and_hangs_does_not_keep_a_peer_out_and_holds_few_places() {
    let mut pair = Pair::new(PATIENT).await;
    let mut crowd = Vec::new();
    for _ in 0..200 {
        crowd.push(TcpStream::connect(pair.listener.address()).await.unwrap());
    }
    // The kernel hands connections over in their order: when this one is in, the listener has seen the whole crowd.
    let (mut near, mut far) = pair.link(PATIENT).await;
    say(&mut near, 1, "excuse me").await;
    assert_eq!(far.recv().await.unwrap().body, "excuse me");
    // The peer had a place among the strangers until it had shown its key.
    let room = PATIENT.strangers - 1;
    for stranger in &mut crowd[..200 - room] {
        is_closed(stranger).await;
    }
    for stranger in &crowd[200 - room..] {
        assert_eq!(stranger.try_read(&mut [0; 10]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
    drop(pair.listener);
    for mut stranger in crowd {
        is_closed(&mut stranger).await;
    }
}

#[tokio::test]
async fn whoever_hangs_in_the_handshake_has_to_go_when_its_time_is_over() {
    let hasty = LinkSettings { handshake: Duration::from_millis(300), ..PATIENT };
    let mut pair = Pair::new(hasty).await;
    // At each place where one can hang: before the first byte, within the first flight, before the proof, before the
    // hello.
    let mut mute = TcpStream::connect(pair.listener.address()).await.unwrap();
    let mut config = rustls::ClientConfig::clone(
        tls::connector(&pair.guest.identity, pair.host.identity.key(), &[]).unwrap().config(),
    );
    config.enable_sni = false;
    let mut flight = Vec::new();
    let mut client = ClientConnection::new(Arc::new(config), tls::name(pair.listener.address())).unwrap();
    client.write_tls(&mut flight).unwrap();
    let mut torn = TcpStream::connect(pair.listener.address()).await.unwrap();
    torn.write_all(&flight[..100]).await.unwrap();
    let mut unproven = TcpStream::connect(pair.listener.address()).await.unwrap();
    unproven.write_all(&flight).await.unwrap();
    let silent = before_the_hello(&pair).await;
    for stream in [&mut mute, &mut torn, &mut unproven] {
        is_closed(stream).await;
    }
    ends_after_its_hello(silent).await;
    pair.is_undisturbed().await;
}
