//! Connections of object_store's clients.
//!
//! object_store's own differ in three ways: they reach this machine and its metadata service through the environment's
//! proxy ([`direct`]); they follow redirects, for which S3's signatures are not valid; and they drop the bucket's
//! region, which a redirect and a failed HEAD give in their headers. Here an answer from another region gets a body
//! that says so in S3's words, by which [`super::retry`] classifies it.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use object_store::{
    ClientConfigKey, ClientOptions,
    client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService},
};
use reqwest::{Client, StatusCode, redirect};

use crate::cloud::direct;

/// The header with the region of a bucket that is requested elsewhere.
const REGION: &str = "x-amz-bucket-region";
/// The limit for connecting.
const CONNECT: Duration = Duration::from_secs(5);
/// The same for this machine and its metadata service, which are close or absent.
const CONNECT_NEAR: Duration = Duration::from_secs(1);
const IDLE: Duration = Duration::from_secs(30);

/// Makes connections for requests that are signed for a region; `None`: for stores without regions. All that one of
/// these makes share their connections.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    region: Option<String>,
    /// Those that insist on TLS, and those that do not.
    clients: Arc<[Clients; 2]>,
}

impl Connector {
    pub(super) fn new(region: Option<String>) -> Self {
        Self { region, clients: Arc::default() }
    }
}

/// Clients are made when they are first needed: each reads all certificates of the machine, if it may need one, which
/// takes some ten milliseconds.
#[derive(Debug, Default)]
struct Clients {
    proxied: OnceLock<Client>,
    straight: OnceLock<Client>,
}

impl Clients {
    /// `plain`: connections may be without TLS; `only_plain`: all of them are.
    fn client(&self, straight: bool, plain: bool, only_plain: bool) -> Result<Client, reqwest::Error> {
        let place = if straight { &self.straight } else { &self.proxied };
        if let Some(client) = place.get() {
            return Ok(client.clone());
        }
        let builder = Client::builder()
            .user_agent(concat!("trainer/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(if straight { CONNECT_NEAR } else { CONNECT })
            .pool_idle_timeout(IDLE)
            .redirect(redirect::Policy::none())
            .http1_only()
            // An announced length is the object's.
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .no_deflate()
            .https_only(!plain);
        let builder = if only_plain { builder.tls_certs_only([]) } else { builder };
        let made = if straight { builder.no_proxy() } else { builder }.build()?;
        Ok(place.get_or_init(|| made).clone())
    }
}

#[derive(Debug)]
struct Lines {
    region: Option<String>,
    clients: Arc<[Clients; 2]>,
    plain: bool,
}

impl Lines {
    fn client(&self, straight: bool) -> Result<Client, reqwest::Error> {
        // Clients of S3 reach its one endpoint; those of other clouds may be sent elsewhere for a token.
        let only_plain = self.plain && self.region.is_some();
        self.clients[usize::from(self.plain)].client(straight, self.plain, only_plain)
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp).is_some_and(|allowed| allowed == "true");
        let lines = Lines { region: self.region.clone(), clients: Arc::clone(&self.clients), plain };
        // Only this machine is reached without TLS, and never through a proxy. A client that can't be made is reported
        // here, not by the first request.
        lines.client(plain).map_err(|error| object_store::Error::Generic { store: "HTTP", source: Box::new(error) })?;
        Ok(HttpClient::new(lines))
    }
}

#[async_trait]
impl HttpService for Lines {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let straight = request.uri().host().is_some_and(direct::is_asked_straight);
        let client = self.client(straight).map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let answer = client.call(request).await?;
        let status = answer.status();
        if self.region.is_none() || status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(answer);
        }
        let theirs = answer.headers().get(REGION).and_then(|region| region.to_str().ok());
        match elsewhere(status, self.region.as_deref(), theirs) {
            None => Ok(answer),
            Some((status, body)) => {
                let mut told = HttpResponse::new(Bytes::from(body).into());
                *told.status_mut() = status;
                Ok(told)
            }
        }
    }
}

/// The answer that replaces one saying that the bucket is elsewhere. A redirect within the region comes from a bucket
/// so new that not every server knows it; that passes with time.
fn elsewhere(status: StatusCode, ours: Option<&str>, theirs: Option<&str>) -> Option<(StatusCode, String)> {
    let says = |status, code: &str, message: &str, region: Option<&str>| {
        let region = region.map(|region| format!("<Region>{region}</Region>")).unwrap_or_default();
        Some((status, format!("<Error><Code>{code}</Code><Message>{message}</Message>{region}</Error>")))
    };
    // It becomes part of messages.
    let theirs = theirs.filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    let other = theirs.filter(|theirs| ours.is_some_and(|ours| !ours.eq_ignore_ascii_case(theirs)));
    match (status.as_u16(), other) {
        (301..=308 | 400, Some(region)) => {
            says(StatusCode::BAD_REQUEST, "PermanentRedirect", "the bucket is in another region", Some(region))
        }
        (307, None) => {
            says(StatusCode::SERVICE_UNAVAILABLE, "TemporaryRedirect", "the bucket is not known everywhere yet", None)
        }
        (301 | 302 | 303 | 308, None) => {
            says(StatusCode::BAD_REQUEST, "PermanentRedirect", "the store answers elsewhere", None)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_made_once_and_only_if_it_is_needed() {
        let connector = Connector::new(None);
        let made = || {
            let made = |clients: &Clients| [clients.proxied.get().is_some(), clients.straight.get().is_some()];
            connector.clients.each_ref().map(made)
        };
        assert_eq!(made(), [[false; 2]; 2]);
        for _ in 0..2 {
            connector.clone().connect(&ClientOptions::new()).unwrap();
            assert_eq!(made(), [[true, false], [false; 2]], "a store elsewhere");
        }
        connector.connect(&ClientOptions::new().with_allow_http(true)).unwrap();
        assert_eq!(made(), [[true, false], [false, true]], "a store in this machine");
    }

    #[test]
    fn an_answer_from_another_region_says_which() {
        let ask = |status, theirs| elsewhere(StatusCode::from_u16(status).unwrap(), Some("us-east-1"), theirs);
        for status in [301, 307, 400] {
            let (told, body) = ask(status, Some("eu-west-1")).unwrap();
            assert_eq!(told, 400);
            assert!(body.contains("<Region>eu-west-1</Region>"), "{body}");
        }
        assert!(ask(301, None).unwrap().1.contains("PermanentRedirect"));
        assert!(ask(301, Some("<b>")).is_some_and(|(_, body)| !body.contains("<b>")));
        // Of our own region: a new bucket, a wrong request, a missing object.
        assert_eq!(ask(307, Some("us-east-1")).unwrap().0, 503);
        for (status, theirs) in
            [(400, Some("us-east-1")), (400, None), (403, Some("eu-west-1")), (404, None), (500, None)]
        {
            assert_eq!(ask(status, theirs), None, "{status} {theirs:?}");
        }
    }
}
