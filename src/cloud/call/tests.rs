//! Calls to a server of the test, which keeps what it was sent, and checks signatures by itself.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use aws_config::Region;
use aws_credential_types::{
    Credentials,
    provider::{ProvideCredentials, SharedCredentialsProvider, error::CredentialsError, future},
};
use aws_types::service_config::LoadServiceConfig;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::*;
use crate::{
    cloud::{
        aws::{self, Failure},
        direct,
    },
    error::Kind,
};

const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

/// What the server does with a request.
#[derive(Clone, Debug)]
enum Reply {
    Say(u16, String, Vec<u8>),
    /// Half of an answer.
    Cut,
    Close,
    Hang,
}

#[derive(Clone, Debug)]
struct Asked {
    line: String,
    headers: Vec<(String, String)>,
    body: String,
}

impl Asked {
    fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(own, _)| own == name).map_or("", |(_, value)| value)
    }
}

/// Answers one request after the other, the last way from then on.
struct Server {
    url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    fn start(replies: Vec<Reply>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&asked);
        thread::spawn(move || {
            let mut hanging = Vec::new();
            for (index, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                let request = read(&stream);
                all.lock().unwrap().push(request);
                match &replies[index.min(replies.len() - 1)] {
                    Reply::Say(status, headers, body) => {
                        let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n{headers}");
                        let head = format!("{head}content-length: {}\r\n\r\n", body.len());
                        // The client may have heard enough.
                        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
                    }
                    Reply::Cut => {
                        let _ = stream.write_all(b"HTTP/1.1 200 X\r\ncontent-length: 9\r\n\r\n{\"a\"");
                    }
                    Reply::Close => {}
                    Reply::Hang => hanging.push(stream),
                }
            }
        });
        Self { url, asked }
    }

    fn saying(status: u16, body: &str) -> Self {
        Self::start(vec![say(status, body)])
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    fn config(&self) -> aws_config::SdkConfig {
        let keys = Credentials::new("AKIDEXAMPLE", SECRET, Some("the-session".into()), None, "test");
        config(&self.url, SharedCredentialsProvider::new(keys))
    }

    fn client(&self, service: &'static Service) -> Client {
        Client::new(&self.config(), service, TimeoutConfig::builder().build(), Some(quick()))
    }

    async fn json(&self) -> Result<Value, Failure> {
        self.client(&SSM).json("GetParametersByPath", &json!({"Path": "/a"})).await
    }
}

fn say(status: u16, body: &str) -> Reply {
    Reply::Say(status, String::new(), body.as_bytes().to_vec())
}

fn read(stream: &TcpStream) -> Asked {
    let mut lines = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    let first = line();
    let mut headers = Vec::new();
    while let Some((name, value)) = line().split_once(':') {
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut asked = Asked { line: first, headers, body: String::new() };
    let mut body = vec![0; asked.header("content-length").parse().unwrap_or(0)];
    lines.read_exact(&mut body).unwrap();
    asked.body = String::from_utf8(body).unwrap();
    asked
}

fn config(url: &str, credentials: SharedCredentialsProvider) -> aws_config::SdkConfig {
    aws_config::SdkConfig::builder()
        .region(Region::new("eu-central-1"))
        .endpoint_url(url)
        .credentials_provider(credentials)
        .http_client(direct::sdk_client())
        .build()
}

/// Three attempts, without long pauses.
fn quick() -> RetryConfig {
    RetryConfig::standard().with_max_attempts(3).with_max_backoff(Duration::from_millis(20))
}

#[tokio::test]
async fn a_call_in_json_is_signed_and_names_its_target() {
    let server = Server::saying(200, r#"{"Parameters":[]}"#);
    let answer = server.json().await.unwrap();
    assert_eq!(answer, json!({"Parameters": []}));
    let asked = server.asked().remove(0);
    assert_eq!(asked.line, "POST / HTTP/1.1");
    assert_eq!(asked.header("x-amz-target"), "AmazonSSM.GetParametersByPath");
    assert_eq!(asked.header("content-type"), "application/x-amz-json-1.1");
    assert_eq!(asked.body, r#"{"Path":"/a"}"#);
    assert_eq!(asked.header("x-amz-security-token"), "the-session");
    assert!(asked.header("user-agent").contains("aws-sdk-rust"), "{asked:?}");
    assert!(asked.header("authorization").contains("/eu-central-1/ssm/aws4_request"), "{asked:?}");
    assert_eq!(signature_of(&asked, SECRET), claimed(&asked).2);
    for covered in ["host", "x-amz-date", "x-amz-target", "x-amz-security-token"] {
        assert!(claimed(&asked).1.split(';').any(|name| name == covered), "{asked:?}");
    }
    let other = Asked { body: r#"{"Path":"/b"}"#.into(), ..asked.clone() };
    assert_ne!(signature_of(&other, SECRET), claimed(&asked).2);
}

#[tokio::test]
async fn a_call_in_a_form_is_signed_and_escaped() {
    let server = Server::saying(200, r#"<DoResponse xmlns="x"><DoResult/></DoResponse>"#);
    let client = server.client(&AUTO_SCALING);
    client.query::<IgnoredAny>("Do", &[("Group", "a b/1&c=ä"), ("Names.member.1", "x")]).await.unwrap();
    let asked = server.asked().remove(0);
    assert_eq!(asked.body, "Action=Do&Version=2011-01-01&Group=a+b%2F1%26c%3D%C3%A4&Names.member.1=x");
    assert_eq!(asked.header("content-type"), "application/x-www-form-urlencoded");
    assert!(asked.header("authorization").contains("/eu-central-1/autoscaling/aws4_request"), "{asked:?}");
    assert_eq!(signature_of(&asked, SECRET), claimed(&asked).2);
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    let throttled = r#"{"__type":"com.amazonaws.ssm#ThrottlingException","message":"slow down"}"#;
    let in_xml =
        "<ErrorResponse><Error><Code>Throttling</Code><Message>Rate exceeded</Message></Error></ErrorResponse>";
    for first in [say(500, ""), say(503, "<html>"), say(400, throttled), say(400, in_xml), Reply::Cut, Reply::Close] {
        let server = Server::start(vec![first.clone(), say(200, "{}")]);
        assert_eq!(server.json().await.unwrap(), json!({}), "{first:?}");
        let asked = server.asked();
        assert_eq!(asked.len(), 2, "{first:?}");
        assert_eq!(signature_of(&asked[1], SECRET), claimed(&asked[1]).2);
    }
    // At most as often as allowed.
    let server = Server::saying(500, r#"{"__type":"InternalServerError","message":"m"}"#);
    let failure = server.json().await.unwrap_err();
    assert_eq!((failure.code(), failure.message(), server.asked().len()), ("InternalServerError", "m", 3));
    let server = Server::saying(502, "<html>Bad Gateway</html>");
    let failure = server.json().await.unwrap_err();
    assert_eq!((failure.to_string().as_str(), server.asked().len()), ("status 502 without a code", 3));
    assert_eq!(aws::explain(failure, "do it").kind(), Kind::Unavailable);
}

#[tokio::test]
async fn a_refusal_is_not_tried_again() {
    for (status, body, kind) in [
        (400, r#"{"__type":"AccessDeniedException","message":"no"}"#, Kind::Permission),
        (403, r#"{"__type":"x#ExpiredTokenException","Message":"old"}"#, Kind::Permission),
        (400, r#"{"__type":"ValidationException","message":"bad"}"#, Kind::Config),
        (404, "<html>", Kind::Unavailable),
        (302, "", Kind::Unavailable),
    ] {
        let server = Server::saying(status, body);
        let error = aws::explain(server.json().await.unwrap_err(), "do it");
        assert_eq!((error.kind(), server.asked().len()), (kind, 1), "{error}");
    }
    // Neither is an answer that makes no sense: it would be the same.
    for body in ["", "{", "<html>Sign in</html>", "\u{0}"] {
        let server = Server::saying(200, body);
        let failure = server.json().await.unwrap_err();
        assert!(failure.to_string().contains("not understood"), "{failure}");
        assert_eq!(server.asked().len(), 1);
    }
}

#[tokio::test]
async fn a_wrong_clock_is_corrected() {
    let refused = br#"{"__type":"InvalidSignatureException","message":"Signature expired"}"#.to_vec();
    let server =
        Server::start(vec![Reply::Say(400, "date: Mon, 01 Jan 2120 00:00:00 GMT\r\n".into(), refused), say(200, "{}")]);
    server.json().await.unwrap();
    let asked = server.asked();
    assert_eq!(asked.len(), 2);
    assert!(asked[1].header("x-amz-date").starts_with("21"), "{asked:?}");
    assert_eq!(signature_of(&asked[1], SECRET), claimed(&asked[1]).2);
}

#[tokio::test]
async fn no_call_takes_longer_than_it_may() {
    let within = |attempt: u64, operation: u64| {
        TimeoutConfig::builder()
            .operation_attempt_timeout(Duration::from_millis(attempt))
            .operation_timeout(Duration::from_millis(operation))
            .build()
    };
    let server = Server::start(vec![Reply::Hang]);
    let started = Instant::now();
    let client = Client::new(&server.config(), &SSM, within(60_000, 200), Some(quick()));
    let failure = client.json::<Value>("X", &json!({})).await.unwrap_err();
    assert!(failure.to_string().contains("timed out") || failure.to_string().contains("timeout"), "{failure}");
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_eq!(server.asked().len(), 1);
    assert_eq!(aws::explain(failure, "do it").kind(), Kind::Unavailable);

    let server = Server::start(vec![Reply::Hang, say(200, "{}")]);
    let client = Client::new(&server.config(), &SSM, within(300, 60_000), Some(quick()));
    client.json::<Value>("X", &json!({})).await.unwrap();
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn an_answer_is_bounded_and_kept_to_itself() {
    let whole = |len: usize| format!(r#"{{"hunter2":"{}"}}"#, "x".repeat(len - r#"{"hunter2":""}"#.len()));
    assert!(Server::saying(200, &whole(LARGEST)).json().await.is_ok());
    let failure = Server::saying(200, &whole(LARGEST + 1)).json().await.unwrap_err();
    assert!(failure.to_string().contains("length limit"), "{failure}");
    for (status, body) in [(200, whole(LARGEST + 1)), (200, r#"{"hunter2"#.into()), (500, "hunter2".into())] {
        let failure = Server::saying(status, &body).json().await.unwrap_err();
        assert!(!format!("{failure} {failure:?}").contains("hunter2"), "{failure:?}");
    }
    assert!(!format!("{:?}", Answer(Bytes::from_static(b"hunter2"))).contains("hunter2"));
}

#[derive(Debug)]
struct Nobody;

impl ProvideCredentials for Nobody {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        let none = "no providers in chain provided credentials";
        future::ProvideCredentials::ready(Err(CredentialsError::not_loaded(none)))
    }
}

#[tokio::test]
async fn without_credentials_nothing_is_sent() {
    let server = Server::saying(200, "{}");
    let config = config(&server.url, SharedCredentialsProvider::new(Nobody));
    let client = Client::new(&config, &SSM, TimeoutConfig::builder().build(), Some(quick()));
    let error = aws::explain(client.json::<Value>("X", &json!({})).await.unwrap_err(), "do it");
    assert_eq!(error.kind(), Kind::Permission, "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("AWS_PROFILE")));
    assert!(server.asked().is_empty());
}

#[tokio::test]
async fn without_a_region_nothing_is_sent() {
    let keys = SharedCredentialsProvider::new(Credentials::new("AKIDEXAMPLE", SECRET, None, None, "test"));
    let config = aws_config::SdkConfig::builder().credentials_provider(keys).http_client(direct::sdk_client()).build();
    let client = Client::new(&config, &SSM, TimeoutConfig::builder().build(), Some(quick()));
    let failure = client.json::<Value>("X", &json!({})).await.unwrap_err();
    assert!(failure.to_string().contains("Missing Region"), "{failure}");
}

/// `AWS_ENDPOINT_URL_AUTO_SCALING`, in whatever way it is configured.
#[derive(Debug)]
struct OfAutoScaling;

impl LoadServiceConfig for OfAutoScaling {
    fn load_config(&self, key: ServiceConfigKey<'_>) -> Option<String> {
        let asked = (key.service_id(), key.env(), key.profile());
        (asked == ("Auto Scaling", "AWS_ENDPOINT_URL", "endpoint_url")).then(|| "http://own".to_owned())
    }
}

#[test]
fn a_service_may_have_an_endpoint_of_its_own() {
    let general = || aws_config::SdkConfig::builder().endpoint_url("http://general");
    assert_eq!(url_of(&general().build(), &AUTO_SCALING).as_deref(), Some("http://general"));
    let both = general().service_config(OfAutoScaling).build();
    assert_eq!(url_of(&both, &AUTO_SCALING).as_deref(), Some("http://own"));
    assert_eq!(url_of(&both, &SSM).as_deref(), Some("http://general"));
    assert_eq!(url_of(&aws_config::SdkConfig::builder().build(), &SSM), None);
}

/// Scope, names of the signed headers, and signature that a request claims.
fn claimed(asked: &Asked) -> (String, String, String) {
    let part = |name: &str| {
        let text = asked.header("authorization").split_once(name).unwrap().1;
        text.split(',').next().unwrap().to_owned()
    };
    (part("Credential=").split_once('/').unwrap().1.to_owned(), part("SignedHeaders="), part("Signature="))
}

/// The signature that the headers and the body of a request should have, by AWS's description ("Create a signed AWS API
/// request").
fn signature_of(asked: &Asked, secret: &str) -> String {
    let (scope, signed, _) = claimed(asked);
    let mut line = asked.line.split(' ');
    let (method, place) = (line.next().unwrap(), line.next().unwrap());
    let (path, query) = place.split_once('?').unwrap_or((place, ""));
    let headers: String = signed.split(';').map(|name| format!("{name}:{}\n", asked.header(name))).collect();
    let body = hex(&sha256(asked.body.as_bytes()));
    let request = format!("{method}\n{path}\n{query}\n{headers}\n{signed}\n{body}");
    let request = hex(&sha256(request.as_bytes()));
    let text = format!("AWS4-HMAC-SHA256\n{}\n{scope}\n{request}", asked.header("x-amz-date"));
    let key = scope.split('/').fold(format!("AWS4{secret}").into_bytes(), |key, part| hmac(&key, part.as_bytes()));
    hex(&hmac(&key, text.as_bytes()))
}

#[test]
fn the_signatures_of_published_examples_are_found() {
    // AWS's example of `ListUsers`, from the description of Signature Version 4; then the first of its test suite.
    let of = |line: &str, headers: &[(&str, &str)]| Asked {
        line: line.to_owned(),
        headers: headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        body: String::new(),
    };
    let scope = "Credential=AKIDEXAMPLE/20150830/us-east-1/iam/aws4_request";
    let claims = format!("AWS4-HMAC-SHA256 {scope}, SignedHeaders=content-type;host;x-amz-date, Signature=?");
    let users = of(
        "GET /?Action=ListUsers&Version=2010-05-08 HTTP/1.1",
        &[
            ("host", "iam.amazonaws.com"),
            ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
            ("x-amz-date", "20150830T123600Z"),
            ("authorization", &claims),
        ],
    );
    let expected = "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7";
    assert_eq!(signature_of(&users, SECRET), expected);
    let scope = "Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request";
    let claims = format!("AWS4-HMAC-SHA256 {scope}, SignedHeaders=host;x-amz-date, Signature=?");
    let vanilla = of(
        "GET / HTTP/1.1",
        &[("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z"), ("authorization", &claims)],
    );
    let expected = "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31";
    assert_eq!(signature_of(&vanilla, SECRET), expected);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hmac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let mut block = if key.len() > 64 { sha256(key) } else { key.to_vec() };
    block.resize(64, 0);
    let pad = |with: u8| block.iter().map(move |byte| byte ^ with);
    let inner: Vec<u8> = pad(0x36).chain(text.iter().copied()).collect();
    let outer: Vec<u8> = pad(0x5c).chain(sha256(&inner)).collect();
    sha256(&outer)
}

/// FIPS 180-4. Its constants are the first bits of the fractions of square and cube roots of primes.
fn sha256(text: &[u8]) -> Vec<u8> {
    fn fraction(root: f64) -> u32 {
        (root.fract() * 4_294_967_296.0) as u32
    }
    let primes: Vec<u32> = (2..312).filter(|n| (2..*n).all(|d| n % d != 0)).collect();
    let constants: Vec<u32> = primes.iter().map(|prime| fraction(f64::from(*prime).cbrt())).collect();
    let mut state: Vec<u32> = primes[..8].iter().map(|prime| fraction(f64::from(*prime).sqrt())).collect();
    let mut padded = text.to_vec();
    padded.push(0x80);
    padded.resize(padded.len().next_multiple_of(64), 0);
    if padded.len() < text.len() + 9 {
        padded.resize(padded.len() + 64, 0);
    }
    let end = padded.len() - 8;
    padded[end..].copy_from_slice(&(text.len() as u64 * 8).to_be_bytes());
    for block in padded.chunks(64) {
        let mut words: Vec<u32> = block.chunks(4).map(|four| u32::from_be_bytes(four.try_into().unwrap())).collect();
        for at in 16..64 {
            let (a, b) = (words[at - 15], words[at - 2]);
            let a = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
            let b = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
            words.push(words[at - 16].wrapping_add(a).wrapping_add(words[at - 7]).wrapping_add(b));
        }
        let mut now = state.clone();
        for at in 0..64 {
            let (a, e) = (now[0], now[4]);
            let choice = (e & now[5]) ^ (!e & now[6]);
            let sum = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
            let first = [sum, choice, constants[at], words[at]].iter().fold(now[7], |all, one| all.wrapping_add(*one));
            let majority = (a & now[1]) ^ (a & now[2]) ^ (now[1] & now[2]);
            let sum = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
            now.rotate_right(1);
            now[0] = first.wrapping_add(sum).wrapping_add(majority);
            now[4] = now[4].wrapping_add(first);
        }
        state.iter_mut().zip(now).for_each(|(old, new)| *old = old.wrapping_add(new));
    }
    state.iter().flat_map(|word| word.to_be_bytes()).collect()
}
