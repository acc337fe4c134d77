//! Writes to S3 in requests of our own, for features that object_store lacks: a checksum that is already known, the
//! whole object's checksum when parts are combined, a storage class for an object in parts.
//!
//! object_store would sum every body a second time as it sends it, and then forget the sum. So large bodies are sent
//! from here: straight from the caller's pages, unsigned over the body (the CRC covers it from end to end), with the
//! CRC64-NVME that was computed once. S3 checks each part against its checksum and answers 400 `BadDigest` on a
//! mismatch; when the parts are combined, it checks their combined checksum against that of the whole, and keeps that
//! for `HeadObject` (Amazon S3 User Guide, "Checking object integrity", full-object checksums).
//!
//! object_store still provides credentials, their renewal, the endpoint and the way to address a bucket: it signs a
//! URL, of which only the address is used; the request itself is signed in its headers (AWS Signature Version 4),
//! because URLs end up in logs.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use object_store::{
    aws::{AmazonS3, AwsAuthorizer},
    client::{HttpClient, HttpRequest, HttpResponse},
    path::Path,
    signer::{HeaderName, HeaderValue, Method, Signer},
};

use super::{
    crc::Crc64,
    retry::{is_about_a_part, is_answer, is_mute},
};

/// The longest answer that is read, bytes.
const MAX_ANSWER: usize = 1 << 20;
const CHECKSUM: HeaderName = HeaderName::from_static("x-amz-checksum-crc64nvme");
const CHECKSUM_TYPE: HeaderName = HeaderName::from_static("x-amz-checksum-type");
const CHECKSUM_ALGORITHM: HeaderName = HeaderName::from_static("x-amz-checksum-algorithm");
const CHECKSUM_MODE: HeaderName = HeaderName::from_static("x-amz-checksum-mode");

/// A part that the store has accepted.
#[derive(Clone, Debug)]
pub(super) struct TakenPart {
    /// The store's name for it.
    pub e_tag: String,
    /// Whether the store returned the part's checksum, which shows that it supports checksums.
    pub summed: bool,
    /// The part's checksum.
    pub crc64: Crc64,
}

/// One bucket.
pub(super) struct S3 {
    pub client: Arc<AmazonS3>,
    /// Connections for large bodies.
    pub http: HttpClient,
    pub region: String,
    pub requester_pays: bool,
    /// The headers of every object: encryption and storage class.
    pub object_headers: Vec<(HeaderName, HeaderValue)>,
}

/// An answer other than success. object_store's errors have the same wording, by which [`super::retry`] classifies
/// them.
#[derive(Debug, thiserror::Error)]
enum Answer {
    #[error("status code: {status}: {body}")]
    Refused { status: String, body: String },
    #[error("the store's answer has no {0}")]
    Without(&'static str),
    #[error("the store's checksum of it is {found}, not {expected}: it was changed in transfer")]
    OtherChecksum { expected: String, found: String },
}

fn failed(source: impl std::error::Error + Send + Sync + 'static) -> object_store::Error {
    object_store::Error::Generic { store: "S3", source: Box::new(source) }
}

fn text(value: &str) -> object_store::Result<HeaderValue> {
    HeaderValue::from_str(value).map_err(failed)
}

impl S3 {
    async fn send(
        &self,
        method: Method,
        path: &Path,
        query: &[(&str, &str)],
        headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>,
        body: Bytes,
    ) -> object_store::Result<HttpResponse> {
        let mut url = self.client.signed_url(Method::PUT, path, Duration::from_secs(60)).await?;
        url.set_query(None);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = HttpRequest::new(body.into());
        *request.method_mut() = method;
        *request.uri_mut() = url.as_str().parse().map_err(failed)?;
        request.headers_mut().extend(headers.into_iter().map(|(name, value)| (Some(name), value)));
        let credential = self.client.credentials().get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", &self.region)
            .with_sign_payload(false)
            .with_request_payer(self.requester_pays)
            .try_authorize(&mut request, None)?;
        let response = self.http.execute(request).await.map_err(failed)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let answer = Answer::Refused { status: status.to_string(), body: read(response).await.unwrap_or_default() };
        if status.as_u16() == 404 {
            return Err(object_store::Error::NotFound { path: path.to_string(), source: Box::new(answer) });
        }
        Err(failed(answer))
    }

    /// Writes a whole object.
    pub(super) async fn put(&self, path: &Path, body: Bytes, crc64: Crc64) -> object_store::Result<()> {
        let headers = self.object_headers.iter().cloned().chain([(CHECKSUM, text(&crc64.base64())?)]);
        let response = self.send(Method::PUT, path, &[], headers, body).await?;
        is_said_back(response.headers().get(CHECKSUM), crc64).map(drop)
    }

    /// Begins an object in parts; returns the upload's id.
    pub(super) async fn begin(&self, path: &Path) -> object_store::Result<String> {
        let headers = self.object_headers.iter().cloned().chain([
            (CHECKSUM_ALGORITHM, HeaderValue::from_static("CRC64NVME")),
            (CHECKSUM_TYPE, HeaderValue::from_static("FULL_OBJECT")),
        ]);
        let response = self.send(Method::POST, path, &[("uploads", "")], headers, Bytes::new()).await?;
        let answer = read(response).await?;
        let id = between(&answer, "<UploadId>", "</UploadId>").filter(|id| !id.is_empty());
        id.map(unescape).ok_or_else(|| failed(Answer::Without("upload id")))
    }

    /// Sends a part; `index` counts from 0.
    pub(super) async fn part(
        &self,
        path: &Path,
        id: &str,
        index: usize,
        body: Bytes,
        crc64: Crc64,
    ) -> object_store::Result<TakenPart> {
        let number = (index + 1).to_string();
        let query = [("partNumber", number.as_str()), ("uploadId", id)];
        let response = self.send(Method::PUT, path, &query, [(CHECKSUM, text(&crc64.base64())?)], body).await?;
        let summed = is_said_back(response.headers().get(CHECKSUM), crc64)?;
        let e_tag = response.headers().get("etag").and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        Ok(TakenPart { e_tag: e_tag.ok_or_else(|| failed(Answer::Without("ETag")))?, summed, crc64 })
    }

    /// Combines the parts. A store that knows checksums refuses if the whole does not match our sum.
    ///
    /// A part that was sent twice is the one that the store took last, whichever answer came first, and has its ETag:
    /// with keys of KMS another one each time. So if the store does not know a part by our ETag, it is asked for its
    /// own, which is taken if the part has our checksum.
    pub(super) async fn complete(
        &self,
        path: &Path,
        id: &str,
        parts: &[TakenPart],
        whole: Crc64,
    ) -> object_store::Result<()> {
        match self.combine(path, id, parts, whole).await {
            Err(error) if is_about_a_part(&error) => {
                let stored = match self.stored_parts(path, id).await {
                    // Combined by another request: the object itself decides.
                    Err(gone @ object_store::Error::NotFound { .. }) => return Err(gone),
                    // Not allowed to ask: the first error says more.
                    Err(refusal) if is_answer(&refusal) => return Err(error),
                    other => other?,
                };
                match renamed(parts, &stored) {
                    Some(parts) => self.combine(path, id, &parts, whole).await,
                    None => Err(error),
                }
            }
            other => other,
        }
    }

    /// The parts of an upload as the store has them, page by page: number, ETag and, if it keeps one, checksum.
    async fn stored_parts(&self, path: &Path, id: &str) -> object_store::Result<Vec<StoredPart>> {
        let (mut found, mut marker) = (Vec::new(), 0);
        loop {
            let from = marker.to_string();
            let query = [("part-number-marker", from.as_str()), ("uploadId", id)];
            let answer = read(self.send(Method::GET, path, &query, [], Bytes::new()).await?).await?;
            found.extend(answer.split("<Part>").skip(1).filter_map(StoredPart::parse));
            let next = between(&answer, "<NextPartNumberMarker>", "</NextPartNumberMarker>");
            match next.and_then(|next| next.trim().parse().ok()) {
                Some(next) if next > marker && answer.contains("<IsTruncated>true</IsTruncated>") => marker = next,
                _ => return Ok(found),
            }
        }
    }

    async fn combine(&self, path: &Path, id: &str, parts: &[TakenPart], whole: Crc64) -> object_store::Result<()> {
        let mut body = String::from("<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">");
        for (part, number) in parts.iter().zip(1_u32..) {
            let e_tag = escape(&part.e_tag);
            body.push_str(&format!("<Part><PartNumber>{number}</PartNumber><ETag>{e_tag}</ETag>"));
            if part.summed {
                body.push_str(&format!("<ChecksumCRC64NVME>{}</ChecksumCRC64NVME>", part.crc64.base64()));
            }
            body.push_str("</Part>");
        }
        body.push_str("</CompleteMultipartUpload>");
        let knows_checksums = parts.iter().all(|part| part.summed);
        let headers = [(CHECKSUM, text(&whole.base64())?), (CHECKSUM_TYPE, HeaderValue::from_static("FULL_OBJECT"))];
        let headers = headers.into_iter().filter(|_| knows_checksums);
        let response = self.send(Method::POST, path, &[("uploadId", id)], headers, body.into()).await?;
        let status = response.status().to_string();
        is_put_together(status, read(response).await?, whole)
    }

    /// An object's size and, if the store keeps a checksum, whether it is `expected`.
    pub(super) async fn look(&self, path: &Path, expected: Crc64) -> object_store::Result<(u64, Option<bool>)> {
        let mode = [(CHECKSUM_MODE, HeaderValue::from_static("ENABLED"))];
        let response = match self.send(Method::HEAD, path, &[], mode, Bytes::new()).await {
            // The answer to a GET gives the reason.
            Err(error) if is_mute(&error) => {
                let first = [(HeaderName::from_static("range"), HeaderValue::from_static("bytes=0-0"))];
                return Err(self.send(Method::GET, path, &[], first, Bytes::new()).await.err().unwrap_or(error));
            }
            other => other?,
        };
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let size = header(HeaderName::from_static("content-length")).and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| failed(Answer::Without("length")))?;
        Ok((size, is_kept(header(CHECKSUM_TYPE), header(CHECKSUM), expected)))
    }
}

/// A part in a store's listing.
#[derive(Debug, PartialEq, Eq)]
struct StoredPart {
    number: u32,
    e_tag: String,
    /// As it is written.
    crc64: Option<String>,
}

impl StoredPart {
    fn parse(text: &str) -> Option<Self> {
        let within = |start, end| between(text, start, end).map(unescape);
        Some(Self {
            number: within("<PartNumber>", "</PartNumber>")?.trim().parse().ok()?,
            e_tag: within("<ETag>", "</ETag>")?,
            crc64: within("<ChecksumCRC64NVME>", "</ChecksumCRC64NVME>"),
        })
    }
}

/// The parts with the ETags that the store has for the same bytes; `None`: they are the same ETags.
fn renamed(parts: &[TakenPart], stored: &[StoredPart]) -> Option<Vec<TakenPart>> {
    let mut changed = false;
    let rename = |(part, number): (&TakenPart, u32)| {
        let sum = part.crc64.base64();
        let is_it = |stored: &&StoredPart| stored.number == number && stored.crc64.as_deref() == Some(&*sum);
        let e_tag = stored.iter().find(is_it).map_or_else(|| part.e_tag.clone(), |stored| stored.e_tag.clone());
        changed |= e_tag != part.e_tag;
        TakenPart { e_tag, ..part.clone() }
    };
    let parts: Vec<_> = parts.iter().zip(1..).map(rename).collect();
    changed.then_some(parts)
}

/// Whether the checksum that the store keeps of a whole object is `expected`; `None`: it keeps none, or one of the
/// parts' checksums.
fn is_kept(kind: Option<&str>, found: Option<&str>, expected: Crc64) -> Option<bool> {
    let whole = kind.is_none_or(|kind| kind == "FULL_OBJECT");
    found.filter(|_| whole).map(|found| found == expected.base64())
}

/// The meaning of the answer to a completion. S3 begins to answer before it has finished, so a failure may arrive as a
/// success whose body is an error.
fn is_put_together(status: String, answer: String, whole: Crc64) -> object_store::Result<()> {
    if answer.contains("<Error>") {
        return Err(failed(Answer::Refused { status, body: answer }));
    }
    match between(&answer, "<ChecksumCRC64NVME>", "</ChecksumCRC64NVME>") {
        Some(found) if found != whole.base64() => {
            Err(failed(Answer::OtherChecksum { expected: whole.base64(), found: found.to_owned() }))
        }
        _ => Ok(()),
    }
}

/// Whether the store returned our checksum; a different one is an error.
fn is_said_back(found: Option<&HeaderValue>, crc64: Crc64) -> object_store::Result<bool> {
    let Some(found) = found else { return Ok(false) };
    let expected = crc64.base64();
    if found.as_bytes() == expected.as_bytes() {
        return Ok(true);
    }
    let found = String::from_utf8_lossy(found.as_bytes()).into_owned();
    Err(failed(Answer::OtherChecksum { expected, found }))
}

/// An answer's body as text, up to [`MAX_ANSWER`].
async fn read(response: HttpResponse) -> object_store::Result<String> {
    let mut chunks = response.into_body().bytes_stream();
    let mut body = Vec::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(failed)?;
        let room = MAX_ANSWER - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == MAX_ANSWER {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&body).into_owned())
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    text.split_once(start)?.1.split_once(end).map(|(inner, _)| inner)
}

/// XML's five entities (XML 1.0, section 4.6).
const ENTITIES: [(&str, &str); 5] = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];

fn unescape(text: &str) -> String {
    ENTITIES.iter().fold(text.to_owned(), |text, (entity, plain)| text.replace(entity, plain))
}

fn escape(text: &str) -> String {
    ENTITIES.iter().rev().fold(text.to_owned(), |text, (entity, plain)| text.replace(plain, entity))
}

#[cfg(test)]
mod tests {
    use super::{
        super::retry::{Verdict, classify},
        *,
    };

    #[test]
    fn an_answer_with_another_checksum_or_an_error_inside_is_a_failure_worth_another_try() {
        let (ours, other) = (Crc64::of(b"ours"), Crc64::of(b"other"));
        let header = |crc64: Crc64| text(&crc64.base64()).unwrap();
        assert!(!is_said_back(None, ours).unwrap() && is_said_back(Some(&header(ours)), ours).unwrap());
        let answer = |inner: &str| format!("<CompleteMultipartUploadResult>{inner}</CompleteMultipartUploadResult>");
        let says = |crc64: Crc64| answer(&format!("<ChecksumCRC64NVME>{}</ChecksumCRC64NVME>", crc64.base64()));
        for sound in [answer(""), says(ours)] {
            is_put_together("200 OK".into(), sound, ours).unwrap();
        }
        for error in [
            is_said_back(Some(&header(other)), ours).unwrap_err(),
            is_put_together("200 OK".into(), says(other), ours).unwrap_err(),
            is_put_together("200 OK".into(), "<Error><Code>InternalError</Code></Error>".into(), ours).unwrap_err(),
        ] {
            assert_eq!(classify(&error), Verdict::Transient, "{error:?}");
        }
    }

    #[test]
    fn a_checksum_of_the_parts_checksums_says_nothing_about_the_bytes() {
        let (ours, said) = (Crc64::of(b"ours"), Crc64::of(b"ours").base64());
        for (kind, found, same) in [
            (Some("FULL_OBJECT"), Some(said.as_str()), Some(true)),
            (None, Some(&said), Some(true)),
            (Some("FULL_OBJECT"), Some("AAAAAAAAAAA="), Some(false)),
            (Some("COMPOSITE"), Some("AAAAAAAAAAA=-2"), None),
            (Some("COMPOSITE"), Some(&said), None),
            (None, None, None),
        ] {
            assert_eq!(is_kept(kind, found, ours), same, "{kind:?} {found:?}");
        }
    }

    #[test]
    fn a_part_has_the_stores_name_if_it_holds_our_bytes() {
        let (ours, other) = (Crc64::of(b"ours"), Crc64::of(b"other"));
        let part = |e_tag: &str| TakenPart { e_tag: e_tag.into(), summed: true, crc64: ours };
        let listed = |number: u32, e_tag: &str, sum: &str| {
            StoredPart::parse(&format!("<PartNumber>{number}</PartNumber>\n<ETag>{e_tag}</ETag>{sum}</Part>")).unwrap()
        };
        let sum = |crc64: Crc64| format!("<ChecksumCRC64NVME>{}</ChecksumCRC64NVME>", crc64.base64());
        let stored =
            [listed(3, "&quot;new&quot;", &sum(ours)), listed(1, "\"c\"", &sum(other)), listed(2, "&quot;d&quot;", "")];
        let names = |parts: &[TakenPart]| {
            let renamed = renamed(parts, &stored)?;
            Some(renamed.into_iter().map(|part| part.e_tag).collect::<Vec<_>>())
        };
        let parts = [part("\"a\""), part("\"b\""), part("\"old\"")];
        assert_eq!(names(&parts).unwrap(), ["\"a\"", "\"b\"", "\"new\""]);
        assert_eq!(names(&parts[..2]), None, "other bytes, or nobody knows whose");
        assert_eq!(names(&[part("a"), part("b"), part("\"new\"")]), None);
        assert_eq!(StoredPart::parse("<PartNumber>x</PartNumber><ETag>e</ETag>"), None);
    }

    #[test]
    fn entities_go_both_ways() {
        for (plain, escaped) in [("\"e\"", "&quot;e&quot;"), ("a&lt;b", "a&amp;lt;b"), ("<&>'", "&lt;&amp;&gt;&apos;")]
        {
            assert_eq!(escape(plain), escaped);
            assert_eq!(unescape(escaped), plain);
        }
    }
}
