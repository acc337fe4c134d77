//! Which requests are repeated, how often, and how an error is worded for people.
//!
//! Pauses have full jitter: a time drawn evenly between nothing and a bound that doubles (Brooker, "Exponential Backoff
//! And Jitter", AWS Architecture Blog 2015), so that many clients which failed together don't come back together. If a
//! store asks us to slow down (503 `SlowDown`, 429), the request is repeated for as long as the time budget lasts,
//! whatever the number of attempts: the store works, and it may answer so for minutes while a bucket's partitions are
//! split. Meanwhile [`super::adaptive_limit`] reduces the requests.
//!
//! An attempt is given up if no answer comes within a time that grows with its bytes and doubles with each attempt, so
//! that a stalled connection is noticed soon and a slow link still succeeds. Attempts end when one succeeds, when an
//! answer can't change (not found, permission), when there were too many, or when the time budget is used up.

use std::{
    error::Error as StdError,
    future::Future,
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;

use super::{
    adaptive_limit::Outcome,
    error::{EXPIRED, StorageError},
    hedge::{self, Tempo},
    limiter::Limiter,
    rate_limit::RateLimit,
};
use crate::{cloud::credentials::NoCredentials, ids::random_hex};

/// The limits of retries.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    /// Attempts per request, including the first; over a network `storage.attempts` of the configuration.
    pub attempts: usize,
    /// Attempts if there are no credentials: on a machine that has none, the error should come soon.
    pub credential_attempts: usize,
    /// The bound of the first pause; it doubles.
    pub first_pause: Duration,
    /// The highest bound of a pause.
    pub longest_pause: Duration,
    /// No attempt begins later than this after the first.
    pub budget: Duration,
    /// Time for an attempt without a body; `None`: no limit (a local disk always answers).
    pub patience: Option<Duration>,
    /// More time for every MiB.
    pub patience_per_mib: Duration,
}

impl Policy {
    /// Over a network.
    pub(super) const REMOTE: Self = Self {
        attempts: 10,
        credential_attempts: 3,
        first_pause: Duration::from_millis(100),
        longest_pause: Duration::from_secs(10),
        budget: Duration::from_secs(300),
        patience: Some(Duration::from_secs(15)),
        patience_per_mib: Duration::from_secs(2),
    };
    /// Within this machine: repeating gains nothing.
    pub(super) const LOCAL: Self = Self { attempts: 1, patience: None, ..Self::REMOTE };

    /// Whether there is no network in between.
    pub(super) fn is_local(&self) -> bool {
        self.patience.is_none()
    }

    /// One attempt, given up after `limit`.
    pub(super) fn once(&self, limit: Duration) -> Self {
        let patience = self.patience.map(|patience| patience.min(limit));
        Self { attempts: 1, patience, patience_per_mib: Duration::ZERO, ..self.clone() }
    }

    /// The pause after this many attempts (from 1): a share of a bound that doubles; `share` is from 0 to 1.
    fn pause(&self, attempts: usize, share: f64) -> Duration {
        let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(u32::MAX).min(30);
        self.first_pause.saturating_mul(1 << doublings).min(self.longest_pause).mul_f64(share.clamp(0.0, 1.0))
    }
}

/// A random number from 0 to 1.
fn random_share() -> f64 {
    // Eight hex digits are always a number.
    f64::from(u32::from_str_radix(&random_hex(4), 16).unwrap_or(u32::MAX / 2)) / f64::from(u32::MAX)
}

/// The consequence of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// May go away by itself.
    Transient,
    /// The store is healthy but asks us to slow down.
    SlowDown,
    /// There are no credentials, now or ever.
    Credentials,
    NotFound,
    Permission,
    Full,
    /// The limit of a file's size is reached.
    FileSize,
    NoBucket,
    /// The bucket is in another region.
    Region,
    /// A repeated request gives the same answer.
    Permanent,
}

/// An operation that failed for good.
#[derive(Debug)]
pub(super) struct Failure {
    pub verdict: Verdict,
    /// No answer came in time.
    timed_out: bool,
    /// The bucket's region, if the store reports it.
    region: Option<String>,
    operation: &'static str,
    cause: Cause,
}

impl Failure {
    pub(super) fn new(operation: &'static str, error: &object_store::Error) -> Self {
        let region = region_in(&whole_text(error));
        Self { verdict: classify(error), timed_out: false, region, operation, cause: Cause::of(error) }
    }

    /// Made by this program: the runtime is shutting down.
    pub(super) fn stopped(operation: &'static str) -> Self {
        let cause = Cause("the program is stopping".into());
        Self { verdict: Verdict::Permanent, timed_out: false, region: None, operation, cause }
    }

    /// Made by this program: worth another try.
    pub(super) fn transient(operation: &'static str, cause: &str) -> Self {
        let cause = Cause(cause.to_owned());
        Self { verdict: Verdict::Transient, timed_out: false, region: None, operation, cause }
    }

    /// The cause, for people.
    pub(super) fn cause(&self) -> &Cause {
        &self.cause
    }

    /// Whether the store says that it does not know the requested operation.
    pub(super) fn is_not_implemented(&self) -> bool {
        self.cause.0.starts_with("501") || self.cause.0.contains("NotImplemented")
    }

    pub(super) fn is_not_found(&self) -> bool {
        self.verdict == Verdict::NotFound
    }

    /// "Not found" was about something other than the object being written.
    pub(super) fn not_of_the_object(mut self) -> Self {
        if self.is_not_found() {
            self.verdict = Verdict::Permanent;
        }
        self
    }

    /// The error for the store's caller.
    pub(super) fn explain(self, uri: &str) -> StorageError {
        let (operation, key, source) = (self.operation, uri.to_owned(), Box::new(self.cause));
        match self.verdict {
            Verdict::NotFound => StorageError::NotFound { key },
            Verdict::Permission | Verdict::Credentials => StorageError::Permission { operation, key, source },
            Verdict::Full => StorageError::Full { operation, key, source },
            Verdict::FileSize => StorageError::FileSize { operation, key, source },
            Verdict::NoBucket => StorageError::NoBucket { operation, key, source },
            Verdict::Region => StorageError::Region { operation, key, region: self.region, source },
            Verdict::Transient | Verdict::SlowDown | Verdict::Permanent => {
                StorageError::Unavailable { operation, key, source }
            }
        }
    }
}

/// The queue that a request waits in before it is sent.
#[derive(Clone, Copy)]
pub(super) enum Queue<'a> {
    /// Small requests: a fixed number at once.
    Control(&'a Semaphore),
    /// Bulk transfers: as many at once as the store handles well, and uploads within their bandwidth.
    Bulk(&'a Limiter, Option<&'a RateLimit>),
}

/// One operation, tried as often as the policy allows.
pub(super) struct Attempts<'a> {
    policy: &'a Policy,
    queue: Queue<'a>,
    operation: &'static str,
    bytes: u64,
    patience: Option<Duration>,
    again: Again<'a>,
}

/// Whether one attempt sends more than one request if the first hangs; see [`hedge`].
#[derive(Clone, Copy)]
pub(super) enum Again<'a> {
    Never,
    /// For small ones.
    Soon,
    /// When it takes longer than others did, for which its own time is measured, too.
    By(&'a Tempo),
}

impl<'a> Attempts<'a> {
    /// `bytes`: the most that go over the wire in one attempt.
    pub(super) fn new(policy: &'a Policy, queue: Queue<'a>, operation: &'static str, bytes: u64) -> Self {
        let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let patience = policy.patience.map(|base| base.saturating_add(policy.patience_per_mib.saturating_mul(mib)));
        Self { policy, queue, operation, bytes, patience, again: Again::Never }
    }

    /// For an operation that may be sent twice and may be urgent.
    pub(super) fn again(self, again: Again<'a>) -> Self {
        Self { again, ..self }
    }

    /// For an operation that takes many requests in a row.
    pub(super) fn slow(mut self) -> Self {
        self.patience = self.patience.map(|patience| patience.saturating_mul(8));
        self
    }

    /// Runs `request` until it succeeds or repeating is pointless.
    pub(super) async fn run<T, F, R>(&self, mut request: F) -> Result<T, Failure>
    where
        F: FnMut() -> R,
        R: Future<Output = object_store::Result<T>>,
    {
        let started = Instant::now();
        let mut patience = self.patience;
        for attempt in 1_usize.. {
            let failure = match self.once(&mut request, patience).await {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            let allowed = match failure.verdict {
                Verdict::SlowDown if self.policy.attempts > 1 => usize::MAX,
                Verdict::Transient | Verdict::SlowDown => self.policy.attempts,
                Verdict::Credentials => self.policy.credential_attempts.min(self.policy.attempts),
                _ => 1,
            };
            if attempt >= allowed || started.elapsed() >= self.policy.budget {
                return Err(failure);
            }
            let pause = self.policy.pause(attempt, random_share());
            // The cause is already free of secrets.
            tracing::info!(operation = self.operation, attempt, pause_s = pause.as_secs_f64(), cause = %failure.cause,
                "store request failed, trying again");
            tokio::time::sleep(pause).await;
            patience =
                patience.zip(self.patience).map(|(now, first)| now.saturating_mul(2).min(first.saturating_mul(8)));
        }
        Err(Failure::stopped(self.operation))
    }

    async fn once<T, F, R>(&self, request: &mut F, patience: Option<Duration>) -> Result<T, Failure>
    where
        F: FnMut() -> R,
        R: Future<Output = object_store::Result<T>>,
    {
        match self.queue {
            Queue::Control(places) => {
                let Ok(_permit) = places.acquire().await else { return Err(Failure::stopped(self.operation)) };
                self.ask(request, patience).await
            }
            Queue::Bulk(limiter, limit) => {
                let Some(mut pass) = limiter.enter().await else { return Err(Failure::stopped(self.operation)) };
                if let Some(limit) = limit {
                    limit.take(self.bytes).await;
                    pass.goes();
                }
                let answer = self.ask(request, patience).await;
                match &answer {
                    Ok(_) => pass.ended(Outcome::Done(self.bytes)),
                    Err(failure) if failure.timed_out || failure.verdict == Verdict::SlowDown => {
                        pass.ended(Outcome::Refused);
                    }
                    Err(_) => drop(pass),
                }
                answer
            }
        }
    }

    async fn ask<T, F, R>(&self, request: &mut F, patience: Option<Duration>) -> Result<T, Failure>
    where
        F: FnMut() -> R,
        R: Future<Output = object_store::Result<T>>,
    {
        // The first request has had its turn.
        let cap = match self.queue {
            Queue::Bulk(_, cap) => cap,
            Queue::Control(_) => None,
        };
        let sent = async {
            match self.again {
                Again::Never => request().await,
                Again::Soon => hedge::first_success(request, hedge::SMALL).await,
                Again::By(tempo) => hedge::first_of_transfers(request, tempo, self.bytes, cap).await,
            }
        };
        let answer = match patience {
            None => sent.await,
            Some(patience) => match tokio::time::timeout(patience, sent).await {
                Ok(answer) => answer,
                Err(_) => {
                    let cause = format!("no answer within {:.0} s", patience.as_secs_f64());
                    return Err(Failure { timed_out: true, ..Failure::transient(self.operation, &cause) });
                }
            },
        };
        answer.map_err(|error| Failure::new(self.operation, &error))
    }
}

/// Two writes collided and neither succeeded: ask again.
#[derive(Debug, thiserror::Error)]
#[error("a conflicting write was under way")]
struct Conflict(#[source] Box<object_store::Error>);

/// Fewer bytes came than were announced or requested.
#[derive(Debug, thiserror::Error)]
#[error("{got} bytes came instead of {wanted}")]
struct CutShort {
    wanted: u64,
    got: u64,
}

/// A conflict that left nothing behind; transient.
pub(super) fn conflict(error: object_store::Error) -> object_store::Error {
    object_store::Error::Generic { store: "store", source: Box::new(Conflict(Box::new(error))) }
}

/// A disk's error.
pub(super) fn of_file(error: std::io::Error) -> object_store::Error {
    object_store::Error::Generic { store: "file", source: Box::new(error) }
}

/// An answer of the wrong length; transient.
pub(super) fn cut_short(wanted: u64, got: u64) -> object_store::Error {
    object_store::Error::Generic { store: "store", source: Box::new(CutShort { wanted, got }) }
}

/// Whether the error alone explains why a ranged read failed.
pub(super) fn is_answer(error: &object_store::Error) -> bool {
    use Verdict::{Credentials, NoBucket, NotFound, Permission, Region};
    matches!(classify(error), NotFound | Permission | Credentials | NoBucket | Region)
}

fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| (*error).source())
}

/// The verdict on `error`. object_store keeps the HTTP status of many errors only in their text: the tests against a
/// real server check the wording.
pub(super) fn classify(error: &object_store::Error) -> Verdict {
    use object_store::Error;
    let text = whole_text(error);
    if ["NoSuchBucket", "The specified bucket does not exist", "ContainerNotFound"].iter().any(|t| text.contains(t)) {
        return Verdict::NoBucket;
    }
    if is_about_credentials(&text) || chain(error).any(|cause| cause.is::<NoCredentials>()) {
        return Verdict::Credentials;
    }
    if is_elsewhere(&text) {
        return Verdict::Region;
    }
    if EXPIRED.iter().chain(&REFUSED_KEYS).any(|code| text.contains(code)) {
        return Verdict::Permission;
    }
    // The bucket's key: disabled, deleted or another account's. S3 says 400, and a repeated request gets the same.
    if text.contains("<Code>KMS.") {
        return if text.contains("Throttl") { Verdict::SlowDown } else { Verdict::Permission };
    }
    // A body that arrived altered, or too slowly: S3 says 400, but the next attempt may succeed.
    if ["BadDigest", "XAmzContentChecksumMismatch", "IncompleteBody", "RequestTimeout"].iter().any(|t| text.contains(t))
    {
        return Verdict::Transient;
    }
    match error {
        Error::NotFound { .. } => return Verdict::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => return Verdict::Permission,
        Error::NotImplemented { .. } | Error::NotSupported { .. } | Error::InvalidPath { .. } => {
            return Verdict::Permanent;
        }
        _ => {}
    }
    for cause in chain(error) {
        if cause.is::<Conflict>() || cause.is::<CutShort>() || cause.is::<object_store::client::HttpError>() {
            return Verdict::Transient;
        }
        if let Some(error) = cause.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind as K;
            return match error.kind() {
                K::PermissionDenied | K::ReadOnlyFilesystem => Verdict::Permission,
                K::StorageFull | K::QuotaExceeded => Verdict::Full,
                K::FileTooLarge => Verdict::FileSize,
                K::NotFound => Verdict::NotFound,
                _ => Verdict::Transient,
            };
        }
    }
    match status(&text) {
        Some(429) => Verdict::SlowDown,
        // S3 means "too many", and so do others; a 503 without these words comes from a store that is down.
        Some(503)
            if ["SlowDown", "Slow Down", "reduce your request rate", "ServerBusy"].iter().any(|t| text.contains(t)) =>
        {
            Verdict::SlowDown
        }
        Some(401 | 403) => Verdict::Permission,
        Some(404) => Verdict::NotFound,
        Some(507) => Verdict::Full,
        Some(408 | 409 | 425) => Verdict::Transient,
        // A 200 whose body is an error.
        Some(200..=299) => Verdict::Transient,
        Some(501 | 505) => Verdict::Permanent,
        Some(500..=599) => Verdict::Transient,
        Some(_) => Verdict::Permanent,
        None if text.contains("Server returned error response") => Verdict::Transient,
        None => Verdict::Transient,
    }
}

/// Errors about keys, signatures and clocks, with 400 or 403.
const REFUSED_KEYS: [&str; 6] = [
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
    "InvalidSecurity",
    "AuthFailure",
    "AuthorizationHeaderMalformed",
];

/// The bucket is in another region than the requested one, or the one signed for: codes of S3's errors, and redirects.
fn is_elsewhere(text: &str) -> bool {
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let of_the_key = says(&["Access Key", "Credential="]);
    says(&["PermanentRedirect", "IllegalLocationConstraint", "Received redirect", "<Region>"])
        || (says(&["AuthorizationHeaderMalformed", "AuthorizationQueryParametersError"]) && !of_the_key)
        || matches!(status(text), Some(301 | 302 | 303 | 308))
}

/// The region that an answer names: as an element, or in the words "the region 'us-east-1' is wrong; expecting
/// 'eu-west-1'".
fn region_in(text: &str) -> Option<String> {
    let named = between(text, "<Region>", "</Region>").or_else(|| between(text, "expecting '", "'"))?;
    let sound = !named.is_empty() && named.len() < 40 && named.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    sound.then(|| named.to_owned())
}

/// A refusal without its reason: a HEAD's answer has no body.
pub(super) fn is_mute(error: &object_store::Error) -> bool {
    let text = whole_text(error);
    !text.contains("<Code>") && matches!(status(&text), Some(400 | 401 | 403))
}

/// The store does not know a part by the name that it gave it.
pub(super) fn is_about_a_part(error: &object_store::Error) -> bool {
    whole_text(error).contains("<Code>InvalidPart</Code>")
}

fn whole_text(error: &object_store::Error) -> String {
    chain(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Whether the failed request was one to an instance metadata service.
fn is_about_credentials(text: &str) -> bool {
    ["169.254.169.254", "169.254.170.2", "/latest/api/token", "iam/security-credentials", "metadata.google.internal"]
        .iter()
        .any(|place| text.contains(place))
}

/// The HTTP status in an error's text.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// A cause worded for people, on one line: an HTTP status with the store's own code and message, or the innermost
/// error. Contains no URL, so no signature or token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Cause(String);

impl Cause {
    pub(super) fn of(error: &object_store::Error) -> Self {
        let text = whole_text(error);
        if let Some(none) = chain(error).find_map(|cause| cause.downcast_ref::<NoCredentials>()) {
            return Self(tidy(&none.to_string()));
        }
        if is_about_credentials(&text) {
            return Self("no credentials in the environment, and no answer from an instance metadata service".into());
        }
        if let Some((_, answer)) = text.split_once("status code: ") {
            let status = answer.split(':').next().unwrap_or_default().trim();
            let said = [between(answer, "<Code>", "</Code>"), between(answer, "<Message>", "</Message>")];
            let said = said.into_iter().flatten().collect::<Vec<_>>().join(", ");
            let status: String = status.chars().take(60).collect();
            return Self(if said.is_empty() { status } else { tidy(&format!("{status}: {said}")) });
        }
        if text.contains("Received redirect without LOCATION") {
            return Self("redirected".into());
        }
        let innermost = chain(error).last().map(ToString::to_string).unwrap_or_default();
        // A transport error says less than its causes: "connect error" and "connection refused" belong together.
        let said = chain(error)
            .skip_while(|cause| !cause.is::<object_store::client::HttpError>())
            .skip(1)
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(": ");
        Self(tidy(if said.is_empty() { &innermost } else { &said }))
    }
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    text.split_once(start)?.1.split_once(end).map(|(inner, _)| inner)
}

/// One line of at most 300 characters, in which URLs are cut down to their host.
fn tidy(text: &str) -> String {
    let words = text.split_whitespace().map(|word| match word.find("://") {
        Some(at) => {
            let (scheme, rest) = word.split_at(at + 3);
            let authority = rest.split(['/', '?', '#', ')', '"', '\'']).next().unwrap_or_default();
            let host = authority.rsplit('@').next().unwrap_or_default();
            format!("{scheme}{host}")
        }
        None => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ").chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::adaptive_limit::AdaptiveLimit, *};

    fn generic(source: impl StdError + Send + Sync + 'static) -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: Box::new(source) }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(&'static str);

    #[test]
    fn errors_are_sorted_by_what_to_do_next() {
        let io = |code| generic(std::io::Error::from_raw_os_error(code));
        let said = |text| generic(Said(text));
        let cases = [
            (io(28), Verdict::Full),       // ENOSPC
            (io(122), Verdict::Full),      // EDQUOT
            (io(27), Verdict::FileSize),   // EFBIG
            (io(13), Verdict::Permission), // EACCES
            (io(30), Verdict::Permission), // EROFS
            (io(5), Verdict::Transient),   // EIO
            (said("Server returned non-2xx status code: 503 Service Unavailable: SlowDown"), Verdict::SlowDown),
            (said("Server returned non-2xx status code: 503 Service Unavailable: "), Verdict::Transient),
            (said("Server returned non-2xx status code: 409 Conflict: "), Verdict::Transient),
            (said("Server returned non-2xx status code: 429 Too Many Requests: "), Verdict::SlowDown),
            (said("Server returned non-2xx status code: 403 Forbidden: AccessDenied"), Verdict::Permission),
            (said("Server returned non-2xx status code: 400 Bad Request: x"), Verdict::Permanent),
            (said("Server returned non-2xx status code: 501 Not Implemented: x"), Verdict::Permanent),
            (said("Server returned non-2xx status code: 404 Not Found: <Code>NoSuchBucket</Code>"), Verdict::NoBucket),
            (said("Error performing PUT http://169.254.169.254/latest/api/token in 1s"), Verdict::Credentials),
            (said("status code: 400 Bad Request: <Code>BadDigest</Code>"), Verdict::Transient),
            (said("status code: 400 Bad Request: <Code>ExpiredToken</Code>"), Verdict::Permission),
            (said("status code: 400 Bad Request: <Code>InvalidToken</Code>"), Verdict::Permission),
            (said("status code: 403 Forbidden: <Code>RequestTimeTooSkewed</Code>"), Verdict::Permission),
            (said("status code: 400 Bad Request: <Code>InvalidAccessKeyId</Code>"), Verdict::Permission),
            (said("status code: 400 Bad Request: <Code>KMS.DisabledException</Code>"), Verdict::Permission),
            (said("status code: 400 Bad Request: <Code>KMS.NotFoundException</Code>"), Verdict::Permission),
            (said("status code: 400 Bad Request: <Code>KMS.ThrottlingException</Code>"), Verdict::SlowDown),
            (said("status code: 400 Bad Request: <Code>AuthorizationHeaderMalformed</Code>"), Verdict::Region),
            (
                said("status code: 400 Bad Request: <Code>AuthorizationHeaderMalformed</Code> a non-empty Access Key"),
                Verdict::Permission,
            ),
            (said("status code: 400 Bad Request: <Code>X</Code><Region>eu-west-1</Region>"), Verdict::Region),
            (said("status code: 301 Moved Permanently: "), Verdict::Region),
            (said("Received redirect without LOCATION"), Verdict::Region),
            (cut_short(3, 2), Verdict::Transient),
            (conflict(said("x")), Verdict::Transient),
        ];
        for (error, verdict) in cases {
            assert_eq!(classify(&error), verdict, "{error}");
        }
    }

    #[test]
    fn the_region_is_taken_from_the_answer() {
        for (text, region) in [
            ("<Error><Code>PermanentRedirect</Code><Region>eu-west-1</Region></Error>", Some("eu-west-1")),
            ("the region 'us-east-1' is wrong; expecting 'ap-south-1'", Some("ap-south-1")),
            ("<Region></Region>", None),
            ("<Region>\u{1b}[2J</Region>", None),
            ("no region", None),
        ] {
            assert_eq!(region_in(text).as_deref(), region, "{text}");
        }
    }

    #[test]
    fn pauses_have_full_jitter_under_a_bound_that_doubles() {
        let ms = Duration::from_millis;
        for (attempts, bound) in [(1, 100), (2, 200), (3, 400), (7, 6400), (8, 10_000), (1000, 10_000)] {
            for (share, expected) in [(0.0, 0), (0.5, bound / 2), (1.0, bound)] {
                assert_eq!(Policy::REMOTE.pause(attempts, share), ms(expected), "{attempts} {share}");
            }
        }
        let shares: Vec<f64> = (0..1000).map(|_| random_share()).collect();
        assert!(shares.iter().all(|share| (0.0..=1.0).contains(share)));
        // A thousand even draws miss a tenth of the range once in 10^45.
        for tenth in 0..10 {
            assert!(shares.iter().any(|share| (share * 10.0) as i32 == tenth), "no pause in tenth {tenth}");
        }
    }

    const PART: u64 = 16 << 20;

    /// Sends a part whose first request hangs; gives the requests sent and the answer, if it came within 3 s.
    async fn sent_for_a_part(tempo: &Tempo, cap: Option<&RateLimit>) -> (u32, Option<u32>) {
        let (policy, limiter) = (Policy::REMOTE, Limiter::new("test", AdaptiveLimit::fixed(4)));
        let sent = std::cell::Cell::new(0);
        // A network that is quick.
        tempo.took(PART, Duration::from_millis(16));
        let request = || async {
            sent.set(sent.get() + 1);
            match sent.get() {
                1 => std::future::pending().await,
                number => Ok(number),
            }
        };
        let attempts = Attempts::new(&policy, Queue::Bulk(&limiter, cap), "upload", PART).again(Again::By(tempo));
        let answer = tokio::time::timeout(Duration::from_secs(3), attempts.run(request)).await;
        (sent.get(), answer.ok().map(Result::unwrap))
    }

    #[tokio::test]
    async fn the_time_that_a_request_hung_is_no_measure_for_those_after_it() {
        let tempo = Tempo::default();
        assert_eq!(sent_for_a_part(&tempo, None).await, (2, Some(2)));
        assert_eq!(tempo.hangs_after(PART), Duration::from_secs(2));
    }

    #[tokio::test]
    async fn a_request_sent_again_waits_for_its_turn_under_a_cap() {
        // The first takes 16 s of the line.
        let cap = RateLimit::new(Some(1)).unwrap();
        assert_eq!(sent_for_a_part(&Tempo::default(), Some(&cap)).await, (1, None));
        // On a faster line it has its turn in time.
        let cap = RateLimit::new(Some(1000)).unwrap();
        assert_eq!(sent_for_a_part(&Tempo::default(), Some(&cap)).await, (2, Some(2)));
    }

    #[test]
    fn causes_hold_no_query_and_no_password() {
        let error =
            generic(Said("failed at (https://user:hunter2@host.example/b/k?X-Amz-Signature=abc&sig=SECRET) really"));
        let text = Cause::of(&error).to_string();
        for secret in ["hunter2", "abc", "SECRET", "user"] {
            assert!(!text.contains(secret), "{text}");
        }
        assert!(text.contains("host.example"), "{text}");
    }

    #[test]
    fn an_answer_is_reduced_to_status_code_and_message() {
        let error = generic(Said(
            "Error performing PUT http://h/b/k?sig=SECRET in 1ms - Server returned non-2xx status code: 400 Bad \
            Request: \
             <Error><Code>KeyTooLong</Code><Message>Your key is too \
             long</Message><StringToSign>SECRET</StringToSign></Error>",
        ));
        assert_eq!(Cause::of(&error).to_string(), "400 Bad Request: KeyTooLong, Your key is too long");
    }
}
