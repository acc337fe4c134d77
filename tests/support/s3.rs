//! An in-memory S3 server over the `s3s` crate: in process, on a free port of 127.0.0.1, ready when `start` returns.
//!
//! It has what the protocol relies on and nothing else: create-once and compare-and-swap puts that are atomic (one lock
//! around the table), ranged reads, paged listings, multipart uploads, CRC64-NVME of the whole object, signatures that
//! are checked. ETags are made from the CRC, so that no time goes into MD5. Tests look into the table, damage objects
//! and switch rules on and off while clients are at work. Objects are gone with the server.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use crc_fast::{CrcAlgorithm::Crc64Nvme, checksum, checksum_combine};
use futures::StreamExt;
use s3s::{
    Body, S3, S3Request, S3Response, S3Result, auth::SimpleAuth, checksum::ChecksumHasher, dto::*, s3_error,
    service::S3ServiceBuilder,
};

/// The only bucket; requests to another one get `NoSuchBucket`.
pub const BUCKET: &str = "bucket";
/// The access key that the server knows.
pub const ACCESS_KEY: &str = "AKIATEST";
/// Its secret.
pub const SECRET_KEY: &str = "test-secret";

/// The effect of `If-None-Match: *` on this server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CreateOnce {
    /// As on S3: exactly one of many racing puts wins.
    #[default]
    Atomic,
    /// The header is ignored: every put wins.
    Ignored,
    /// It checks first and writes later: it refuses in sequence, but lets several racing puts win.
    Racy,
}

/// Rules that a test switches while clients are at work.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Every write and delete is answered with 403.
    pub deny_writes: bool,
    /// The effect of `If-None-Match: *`.
    pub create_once: CreateOnce,
    /// A HEAD that requests the object's checksum gets it.
    pub keeps_checksums: bool,
    /// `ListMultipartUploads` is answered with 403.
    pub deny_upload_list: bool,
    /// `AbortMultipartUpload` is answered with 403.
    pub deny_abort: bool,
    /// A lifecycle rule for the whole bucket aborts unfinished uploads after this many days.
    pub abort_after_days: Option<i32>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            deny_writes: false,
            create_once: CreateOnce::default(),
            keeps_checksums: true,
            deny_upload_list: false,
            deny_abort: false,
            abort_after_days: None,
        }
    }
}

/// What a write requests beside its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// `x-amz-server-side-encryption`
    pub encryption: Option<String>,
    /// `x-amz-server-side-encryption-aws-kms-key-id`
    pub kms_key_id: Option<String>,
    /// `x-amz-storage-class`
    pub storage_class: Option<String>,
    /// `x-amz-checksum-type`, of an object in parts.
    pub checksum_type: Option<String>,
    /// `x-amz-checksum-algorithm`, of an object in parts.
    pub checksum_algorithm: Option<String>,
    /// `x-amz-checksum-crc64nvme`: of the body, or of the whole object when parts are combined.
    pub checksum: Option<String>,
    /// Parts that came with their CRC64-NVME, when parts are combined.
    pub summed_parts: usize,
}

#[derive(Clone)]
struct Stored {
    body: Bytes,
    crc64: u64,
    e_tag: String,
    modified: SystemTime,
}

impl Stored {
    fn new(body: Bytes, serial: u64) -> Self {
        let crc64 = checksum(Crc64Nvme, &body);
        Self {
            body,
            crc64,
            e_tag: format!("{crc64:016x}{serial:016x}"),
            modified: SystemTime::from(jiff::Timestamp::now()),
        }
    }
    fn tag(&self) -> ETag {
        ETag::Strong(self.e_tag.clone())
    }
}

struct Upload {
    key: String,
    started: SystemTime,
    parts: BTreeMap<i32, Stored>,
}

#[derive(Default)]
struct Table {
    objects: BTreeMap<String, Stored>,
    uploads: BTreeMap<String, Upload>,
    rules: Rules,
    serial: u64,
    /// By key and operation.
    asked: BTreeMap<(String, &'static str), Asked>,
    /// Requests by operation, for tests that count them.
    counts: BTreeMap<&'static str, u64>,
}

impl Table {
    fn serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }
    fn check_conditions(
        &self,
        key: &str,
        if_none_match: Option<&ETagCondition>,
        if_match: Option<&ETagCondition>,
    ) -> S3Result<()> {
        let standing = self.objects.get(key);
        let matches = |condition: &ETagCondition, object: &Stored| match condition {
            ETagCondition::Any => true,
            ETagCondition::ETag(tag) => tag.value() == object.e_tag,
        };
        if let (Some(condition), Some(object)) = (if_none_match, standing)
            && matches(condition, object)
        {
            return Err(s3_error!(PreconditionFailed, "an object exists"));
        }
        match (if_match, standing) {
            (Some(_), None) => Err(s3_error!(NoSuchKey)),
            (Some(condition), Some(object)) if !matches(condition, object) => {
                Err(s3_error!(PreconditionFailed, "another object exists"))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Clone, Default)]
struct Service(Arc<Mutex<Table>>);

/// The server; it stops when this is dropped.
pub struct S3Server {
    service: Service,
    handler: s3s::service::S3Service,
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl S3Server {
    /// Starts one on a free port of 127.0.0.1.
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("s3-server")
            .enable_all()
            .build()
            .expect("runtime of the S3 server");
        let service = Service::default();
        let mut builder = S3ServiceBuilder::new(service.clone());
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let handler = builder.build();
        let address = runtime.block_on(serve(handler.clone()));
        Self { service, handler, address, runtime: Some(runtime) }
    }

    /// Serves the same table at another listener, too, such as one in another network namespace; returns its endpoint.
    pub fn serve_also(&self, listener: std::net::TcpListener) -> String {
        let address = listener.local_addr().expect("address of the S3 server");
        let runtime = self.runtime.as_ref().expect("a server that runs");
        let _entered = runtime.enter();
        listener.set_nonblocking(true).expect("a listener that does not block");
        let listener = tokio::net::TcpListener::from_std(listener).expect("listener of the S3 server");
        runtime.spawn(accept(listener, self.handler.clone()));
        format!("http://{address}")
    }
    /// `http://127.0.0.1:<port>`
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
    /// Changes the rules.
    pub fn set_rules(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut self.service.lock().rules);
    }
    /// Keys that begin with `prefix`, sorted.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        self.service.lock().objects.keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }
    /// An object's bytes.
    pub fn read(&self, key: &str) -> Option<Bytes> {
        self.service.lock().objects.get(key).map(|object| object.body.clone())
    }
    /// Puts an object, ignoring all rules.
    pub fn write(&self, key: &str, body: impl Into<Bytes>) {
        let mut table = self.service.lock();
        let serial = table.serial();
        table.objects.insert(key.to_owned(), Stored::new(body.into(), serial));
    }
    /// Changes an object's bytes behind the server's back: the reported size and checksum stay the old ones, as with
    /// bit rot on a disk.
    pub fn rot(&self, key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut table = self.service.lock();
        let object = table.objects.get_mut(key).unwrap_or_else(|| panic!("no object {key} to damage"));
        let mut body = object.body.to_vec();
        change(&mut body);
        object.body = body.into();
    }
    /// Removes an object, ignoring all rules.
    pub fn remove(&self, key: &str) {
        assert!(self.service.lock().objects.remove(key).is_some(), "no object {key} to remove");
    }
    /// Multipart uploads that were neither completed nor aborted.
    pub fn open_uploads(&self) -> usize {
        self.service.lock().uploads.len()
    }
    /// Begins a multipart upload of `key` and leaves it, like a client that was killed this long ago.
    pub fn leave_upload(&self, key: &str, ago: Duration) -> String {
        let mut table = self.service.lock();
        let id = format!("upload-{}", table.serial());
        let upload = Upload {
            key: key.to_owned(),
            started: SystemTime::from(jiff::Timestamp::now()) - ago,
            parts: BTreeMap::new(),
        };
        table.uploads.insert(id.clone(), upload);
        id
    }
    /// Keys of the multipart uploads that were neither completed nor aborted, sorted.
    pub fn upload_keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = self.service.lock().uploads.values().map(|upload| upload.key.clone()).collect();
        keys.sort();
        keys
    }
    /// Makes the objects whose keys begin with `prefix` older by this much.
    pub fn age(&self, prefix: &str, by: Duration) {
        let mut table = self.service.lock();
        for (_, object) in table.objects.iter_mut().filter(|(key, _)| key.starts_with(prefix)) {
            object.modified -= by;
        }
    }
    /// Forgets every multipart upload, as a lifecycle rule does.
    #[allow(dead_code, reason = "one of the two test binaries needs it")]
    pub fn forget_uploads(&self) {
        self.service.lock().uploads.clear();
    }
    /// What the last write of a key requested, by the operation's S3 name.
    pub fn asked(&self, key: &str, operation: &'static str) -> Option<Asked> {
        self.service.lock().asked.get(&(key.to_owned(), operation)).cloned()
    }
    /// Requests so far of one operation, by its S3 name.
    pub fn count(&self, operation: &str) -> u64 {
        self.service.lock().counts.get(operation).copied().unwrap_or_default()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The published `s3s-fs`: a server whose `If-None-Match: *` refuses in sequence but lets several racing puts win.
pub struct NonAtomicS3 {
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl NonAtomicS3 {
    /// Serves `root`, with its bucket.
    pub fn start(root: &std::path::Path) -> Self {
        std::fs::create_dir_all(root.join(BUCKET)).expect("folder of the bucket");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .expect("runtime of the S3 server");
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).expect("root folder"));
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let address = runtime.block_on(serve(builder.build()));
        Self { address, runtime: Some(runtime) }
    }
    /// `http://127.0.0.1:<port>`
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for NonAtomicS3 {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(service: s3s::service::S3Service) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("port for the S3 server");
    let address = listener.local_addr().expect("address of the S3 server");
    tokio::spawn(accept(listener, service));
    address
}

async fn accept(listener: tokio::net::TcpListener, service: s3s::service::S3Service) {
    while let Ok((socket, _)) = listener.accept().await {
        let _ = socket.set_nodelay(true);
        let service = service.clone();
        tokio::spawn(async move {
            let server = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
            let _ = server.serve_connection(hyper_util::rt::TokioIo::new(socket), service).await;
        });
    }
}

/// The environment with which a client finds a server at `endpoint` and has its keys.
pub fn client_env(endpoint: &str) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL", endpoint.to_owned()),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
    ]
}

impl Service {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, operation: &'static str, bucket: &str, writes: bool) -> S3Result<Rules> {
        let mut table = self.lock();
        *table.counts.entry(operation).or_default() += 1;
        if bucket != BUCKET {
            return Err(s3_error!(NoSuchBucket));
        }
        if writes && table.rules.deny_writes {
            return Err(s3_error!(AccessDenied, "this server is read-only"));
        }
        Ok(table.rules)
    }

    fn get(&self, key: &str) -> S3Result<Stored> {
        self.lock().objects.get(key).cloned().ok_or_else(|| s3_error!(NoSuchKey))
    }
}

/// Base64 of a CRC64 as S3 writes it: big-endian bytes.
pub fn crc64_text(crc: u64) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    // 64 bits are ten groups of six and four bits over: the last group is shifted up, and one '=' pads the text.
    let mut text: String = (0..10).map(|i| ALPHABET[(crc >> (58 - 6 * i)) as usize & 63] as char).collect();
    text.push(ALPHABET[(crc << 2) as usize & 63] as char);
    text.push('=');
    text
}

/// Reads a request's body and refuses it if any checksum that came with it, in a header or a trailer, is not its own.
async fn read_body<T>(
    body: Option<StreamingBlob>,
    length: Option<i64>,
    mut sums: Checksum,
    request: &S3Request<T>,
) -> S3Result<Bytes> {
    let mut collected = BytesMut::with_capacity(usize::try_from(length.unwrap_or(0)).unwrap_or(0));
    if let Some(mut stream) = body {
        while let Some(chunk) = stream.next().await {
            collected.extend_from_slice(&chunk.map_err(|_| s3_error!(IncompleteBody))?);
        }
    }
    if length.is_some_and(|length| length != collected.len() as i64) {
        return Err(s3_error!(IncompleteBody));
    }
    if let Some(trailers) = request.trailing_headers.as_ref().and_then(s3s::TrailingHeaders::take) {
        let trailer = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        sums.checksum_crc32 = sums.checksum_crc32.or_else(|| trailer("x-amz-checksum-crc32"));
        sums.checksum_crc32c = sums.checksum_crc32c.or_else(|| trailer("x-amz-checksum-crc32c"));
        sums.checksum_sha1 = sums.checksum_sha1.or_else(|| trailer("x-amz-checksum-sha1"));
        sums.checksum_sha256 = sums.checksum_sha256.or_else(|| trailer("x-amz-checksum-sha256"));
        sums.checksum_crc64nvme = sums.checksum_crc64nvme.or_else(|| trailer("x-amz-checksum-crc64nvme"));
    }
    let mut hasher = ChecksumHasher {
        crc32: sums.checksum_crc32.as_ref().map(|_| Default::default()),
        crc32c: sums.checksum_crc32c.as_ref().map(|_| Default::default()),
        sha1: sums.checksum_sha1.as_ref().map(|_| s3s::crypto::Checksum::new()),
        sha256: sums.checksum_sha256.as_ref().map(|_| s3s::crypto::Checksum::new()),
        crc64nvme: sums.checksum_crc64nvme.as_ref().map(|_| Default::default()),
    };
    hasher.update(&collected);
    let own = hasher.finalize();
    let agree = own.checksum_crc32 == sums.checksum_crc32
        && own.checksum_crc32c == sums.checksum_crc32c
        && own.checksum_sha1 == sums.checksum_sha1
        && own.checksum_sha256 == sums.checksum_sha256
        && own.checksum_crc64nvme == sums.checksum_crc64nvme;
    if agree { Ok(collected.freeze()) } else { Err(s3_error!(BadDigest, "the body has another checksum")) }
}

macro_rules! sums {
    ($input:expr) => {
        Checksum {
            checksum_crc32: $input.checksum_crc32.take(),
            checksum_crc32c: $input.checksum_crc32c.take(),
            checksum_crc64nvme: $input.checksum_crc64nvme.take(),
            checksum_sha1: $input.checksum_sha1.take(),
            checksum_sha256: $input.checksum_sha256.take(),
            ..Default::default()
        }
    };
}

macro_rules! asked {
    ($input:expr) => {
        Asked {
            encryption: $input.server_side_encryption.as_ref().map(|it| it.as_str().to_owned()),
            kms_key_id: $input.ssekms_key_id.clone(),
            storage_class: $input.storage_class.as_ref().map(|it| it.as_str().to_owned()),
            ..Asked::default()
        }
    };
}

fn full_object() -> Option<ChecksumType> {
    Some(ChecksumType::from_static(ChecksumType::FULL_OBJECT))
}

#[async_trait::async_trait]
impl S3 for Service {
    async fn put_object(&self, mut req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let rules = self.enter("PutObject", &req.input.bucket, true)?;
        let asked = Asked { checksum: req.input.checksum_crc64nvme.clone(), ..asked!(req.input) };
        let (body, sums) = (req.input.body.take(), sums!(req.input));
        let body = read_body(body, req.input.content_length, sums, &req).await?;
        self.lock().asked.insert((req.input.key.clone(), "PutObject"), asked);
        let PutObjectInput { key, if_none_match, if_match, .. } = req.input;
        let if_none_match = if_none_match.filter(|_| rules.create_once != CreateOnce::Ignored);
        if rules.create_once == CreateOnce::Racy && if_none_match.is_some() {
            self.lock().check_conditions(&key, if_none_match.as_ref(), if_match.as_ref())?;
            // The gap between check and write, wide enough for racing puts.
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        let mut table = self.lock();
        if rules.create_once != CreateOnce::Racy {
            table.check_conditions(&key, if_none_match.as_ref(), if_match.as_ref())?;
        }
        let serial = table.serial();
        let object = Stored::new(body, serial);
        let output = PutObjectOutput {
            e_tag: Some(object.tag()),
            checksum_crc64nvme: Some(crc64_text(object.crc64)),
            checksum_type: full_object(),
            ..Default::default()
        };
        table.objects.insert(key, object);
        Ok(S3Response::new(output))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        self.enter("GetObject", &req.input.bucket, false)?;
        let object = self.get(&req.input.key)?;
        let total = object.body.len() as u64;
        let range = match &req.input.range {
            Some(range) => Some(range.check(total).map_err(|_| s3_error!(InvalidRange))?),
            None => None,
        };
        let part = range.clone().unwrap_or(0..total);
        let body = object.body.slice(part.start as usize..part.end as usize);
        Ok(S3Response::new(GetObjectOutput {
            content_length: Some(body.len() as i64),
            body: Some(Body::from(body).into()),
            content_range: range.as_ref().map(|r| format!("bytes {}-{}/{total}", r.start, r.end - 1)),
            checksum_crc64nvme: range.is_none().then(|| crc64_text(object.crc64)),
            checksum_type: full_object(),
            e_tag: Some(object.tag()),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        }))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let rules = self.enter("HeadObject", &req.input.bucket, false)?;
        let object = self.get(&req.input.key)?;
        let asked = req.input.checksum_mode.as_ref().is_some_and(|mode| mode.as_str() == ChecksumMode::ENABLED);
        let shown = rules.keeps_checksums && asked;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(object.body.len() as i64),
            checksum_crc64nvme: shown.then(|| crc64_text(object.crc64)),
            checksum_type: shown.then(full_object).flatten(),
            e_tag: Some(object.tag()),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        }))
    }

    async fn get_object_attributes(
        &self,
        req: S3Request<GetObjectAttributesInput>,
    ) -> S3Result<S3Response<GetObjectAttributesOutput>> {
        self.enter("GetObjectAttributes", &req.input.bucket, false)?;
        let object = self.get(&req.input.key)?;
        Ok(S3Response::new(GetObjectAttributesOutput {
            checksum: Some(Checksum {
                checksum_crc64nvme: Some(crc64_text(object.crc64)),
                checksum_type: full_object(),
                ..Default::default()
            }),
            e_tag: Some(object.tag()),
            object_size: Some(object.body.len() as i64),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        }))
    }

    /// A copy within the bucket. The product never copies; a client in the benchmarks does, to rename.
    async fn copy_object(&self, req: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        self.enter("CopyObject", &req.input.bucket, true)?;
        let CopySource::Bucket { bucket, key, .. } = &req.input.copy_source else {
            return Err(s3_error!(NotImplemented, "a copy from an access point"));
        };
        if &**bucket != BUCKET {
            return Err(s3_error!(NoSuchBucket));
        }
        let body = self.get(key)?.body;
        let mut table = self.lock();
        let serial = table.serial();
        let object = Stored::new(body, serial);
        let result = CopyObjectResult {
            e_tag: Some(object.tag()),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        };
        table.objects.insert(req.input.key, object);
        Ok(S3Response::new(CopyObjectOutput { copy_object_result: Some(result), ..Default::default() }))
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.enter("DeleteObject", &req.input.bucket, true)?;
        self.lock().objects.remove(&req.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        self.enter("DeleteObjects", &req.input.bucket, true)?;
        let mut table = self.lock();
        let mut deleted = Vec::new();
        for ObjectIdentifier { key, .. } in req.input.delete.objects {
            table.objects.remove(&key);
            deleted.push(DeletedObject { key: Some(key), ..Default::default() });
        }
        Ok(S3Response::new(DeleteObjectsOutput { deleted: Some(deleted), ..Default::default() }))
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        self.enter("ListObjectsV2", &req.input.bucket, false)?;
        let input = req.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.continuation_token.clone().or(input.start_after.clone()).unwrap_or_default();
        let most = input.max_keys.map_or(1000, |n| n.clamp(0, 1000)) as usize;
        let (mut contents, mut folders) = (Vec::new(), BTreeSet::new());
        let mut last = None;
        let mut truncated = false;
        let table = self.lock();
        for (key, object) in table.objects.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix)) {
            let folder = input.delimiter.as_ref().filter(|d| !d.is_empty()).and_then(|delimiter| {
                let end = key[prefix.len()..].find(delimiter.as_str())? + prefix.len() + delimiter.len();
                Some(key[..end].to_owned())
            });
            let name = folder.as_ref().unwrap_or(key);
            if name <= &after || folders.contains(name) {
                continue;
            }
            if contents.len() + folders.len() == most {
                truncated = true;
                break;
            }
            last = Some(name.clone());
            match folder {
                Some(folder) => {
                    folders.insert(folder);
                }
                None => contents.push(Object {
                    key: Some(key.clone()),
                    size: Some(object.body.len() as i64),
                    e_tag: Some(object.tag()),
                    last_modified: Some(object.modified.into()),
                    ..Default::default()
                }),
            }
        }
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix,
            delimiter: input.delimiter,
            key_count: Some((contents.len() + folders.len()) as i32),
            max_keys: Some(most as i32),
            is_truncated: Some(truncated),
            next_continuation_token: last.filter(|_| truncated),
            contents: Some(contents),
            common_prefixes: Some(folders.into_iter().map(|p| CommonPrefix { prefix: Some(p) }).collect()),
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.enter("CreateMultipartUpload", &req.input.bucket, true)?;
        let mut table = self.lock();
        let upload_id = format!("upload-{}", table.serial());
        let checksum_type = req.input.checksum_type.as_ref().map(|kind| kind.as_str().to_owned());
        let checksum_algorithm = req.input.checksum_algorithm.as_ref().map(|it| it.as_str().to_owned());
        let asked = Asked { checksum_type, checksum_algorithm, ..asked!(req.input) };
        table.asked.insert((req.input.key.clone(), "CreateMultipartUpload"), asked);
        let upload = Upload {
            key: req.input.key.clone(),
            started: SystemTime::from(jiff::Timestamp::now()),
            parts: BTreeMap::new(),
        };
        table.uploads.insert(upload_id.clone(), upload);
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(req.input.bucket),
            key: Some(req.input.key),
            upload_id: Some(upload_id),
            checksum_algorithm: req.input.checksum_algorithm,
            checksum_type: req.input.checksum_type,
            ..Default::default()
        }))
    }

    async fn upload_part(&self, mut req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        self.enter("UploadPart", &req.input.bucket, true)?;
        let asked = Asked { checksum: req.input.checksum_crc64nvme.clone(), ..Asked::default() };
        let (body, sums) = (req.input.body.take(), sums!(req.input));
        let body = read_body(body, req.input.content_length, sums, &req).await?;
        let mut table = self.lock();
        let serial = table.serial();
        table.asked.insert((req.input.key.clone(), "UploadPart"), asked);
        let upload = table.uploads.get_mut(&req.input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        let part = Stored::new(body, serial);
        let (e_tag, crc64) = (part.tag(), part.crc64);
        upload.parts.insert(req.input.part_number, part);
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(e_tag),
            checksum_crc64nvme: Some(crc64_text(crc64)),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let rules = self.enter("CompleteMultipartUpload", &req.input.bucket, true)?;
        let input = req.input;
        let mut table = self.lock();
        let if_none_match = input.if_none_match.as_ref().filter(|_| rules.create_once != CreateOnce::Ignored);
        table.check_conditions(&input.key, if_none_match, input.if_match.as_ref())?;
        let upload = table.uploads.get(&input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        let named = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let asked = Asked {
            checksum_type: input.checksum_type.as_ref().map(|kind| kind.as_str().to_owned()),
            checksum: input.checksum_crc64nvme.clone(),
            summed_parts: named.iter().filter(|part| part.checksum_crc64nvme.is_some()).count(),
            ..Asked::default()
        };
        if named.is_empty() || !named.is_sorted_by_key(|part| part.part_number) {
            return Err(s3_error!(InvalidPartOrder));
        }
        let parts: Option<Vec<&Stored>> = named
            .iter()
            .map(|part| {
                let stored = upload.parts.get(&part.part_number?)?;
                let sum = part.checksum_crc64nvme.as_ref().is_none_or(|given| *given == crc64_text(stored.crc64));
                (sum && part.e_tag.as_ref()?.value() == stored.e_tag).then_some(stored)
            })
            .collect();
        let parts = parts.ok_or_else(|| s3_error!(InvalidPart))?;
        if parts.iter().rev().skip(1).any(|part| part.body.len() < 5 << 20) {
            return Err(s3_error!(EntityTooSmall));
        }
        let crc64 = parts
            .iter()
            .fold(None, |sum, part| {
                let (crc, len) = (part.crc64, part.body.len() as u64);
                Some(sum.map_or(crc, |sum| checksum_combine(Crc64Nvme, sum, crc, len)))
            })
            .unwrap_or_default();
        if input.checksum_crc64nvme.is_some_and(|given| given != crc64_text(crc64)) {
            return Err(s3_error!(BadDigest, "the parts have another checksum"));
        }
        let mut body = BytesMut::with_capacity(parts.iter().map(|part| part.body.len()).sum());
        parts.iter().for_each(|part| body.extend_from_slice(&part.body));
        let serial = table.serial();
        let e_tag = format!("{crc64:016x}{serial:016x}-{}", named.len());
        let object = Stored { body: body.freeze(), crc64, e_tag, modified: SystemTime::from(jiff::Timestamp::now()) };
        let output = CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key.clone()),
            e_tag: Some(object.tag()),
            checksum_crc64nvme: Some(crc64_text(crc64)),
            checksum_type: full_object(),
            ..Default::default()
        };
        table.asked.insert((input.key.clone(), "CompleteMultipartUpload"), asked);
        table.objects.insert(input.key, object);
        table.uploads.remove(&input.upload_id);
        Ok(S3Response::new(output))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let rules = self.enter("AbortMultipartUpload", &req.input.bucket, true)?;
        if rules.deny_abort {
            return Err(s3_error!(AccessDenied, "not this"));
        }
        let gone = self.lock().uploads.remove(&req.input.upload_id);
        gone.map(|_| S3Response::new(AbortMultipartUploadOutput::default())).ok_or_else(|| s3_error!(NoSuchUpload))
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        self.enter("ListParts", &req.input.bucket, false)?;
        let table = self.lock();
        let upload = table.uploads.get(&req.input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        // S3 gives up to 1,000, this server two, so that clients turn pages.
        let after = req.input.part_number_marker.unwrap_or(0);
        let behind = || upload.parts.range(after + 1..);
        let last = behind().nth(1).map(|(number, _)| *number).filter(|_| behind().nth(2).is_some());
        let part = |(number, part): (&i32, &Stored)| Part {
            part_number: Some(*number),
            size: Some(part.body.len() as i64),
            e_tag: Some(part.tag()),
            checksum_crc64nvme: Some(crc64_text(part.crc64)),
            last_modified: Some(part.modified.into()),
            ..Default::default()
        };
        Ok(S3Response::new(ListPartsOutput {
            bucket: Some(req.input.bucket),
            key: Some(req.input.key),
            upload_id: Some(req.input.upload_id),
            is_truncated: Some(last.is_some()),
            next_part_number_marker: last,
            parts: Some(behind().take(2).map(part).collect()),
            ..Default::default()
        }))
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let rules = self.enter("ListMultipartUploads", &req.input.bucket, false)?;
        if rules.deny_upload_list {
            return Err(s3_error!(AccessDenied, "not these"));
        }
        let prefix = req.input.prefix.clone().unwrap_or_default();
        // Sorted by key, then by id; behind the markers. S3 returns up to 1,000 a page, this server two, so that
        // clients turn pages.
        let after = (req.input.key_marker.unwrap_or_default(), req.input.upload_id_marker.unwrap_or_default());
        let table = self.lock();
        let mut found: Vec<(String, String, SystemTime)> = table
            .uploads
            .iter()
            .filter(|(id, upload)| upload.key.starts_with(&prefix) && (&upload.key, *id) > (&after.0, &after.1))
            .map(|(id, upload)| (upload.key.clone(), id.clone(), upload.started))
            .collect();
        found.sort();
        let truncated = found.len() > 2;
        found.truncate(2);
        let last = found.last().filter(|_| truncated).cloned();
        let uploads = found.into_iter().map(|(key, id, started)| MultipartUpload {
            key: Some(key),
            upload_id: Some(id),
            initiated: Some(started.into()),
            ..Default::default()
        });
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(req.input.bucket),
            prefix: req.input.prefix,
            is_truncated: Some(truncated),
            next_key_marker: last.as_ref().map(|(key, ..)| key.clone()),
            next_upload_id_marker: last.map(|(_, id, _)| id),
            uploads: Some(uploads.collect()),
            ..Default::default()
        }))
    }

    async fn get_bucket_lifecycle_configuration(
        &self,
        req: S3Request<GetBucketLifecycleConfigurationInput>,
    ) -> S3Result<S3Response<GetBucketLifecycleConfigurationOutput>> {
        let rules = self.enter("GetBucketLifecycleConfiguration", &req.input.bucket, false)?;
        let days = rules.abort_after_days.ok_or_else(|| s3_error!(NoSuchLifecycleConfiguration))?;
        let abort = AbortIncompleteMultipartUpload { days_after_initiation: Some(days) };
        let rule = LifecycleRule {
            abort_incomplete_multipart_upload: Some(abort),
            filter: Some(LifecycleRuleFilter { prefix: Some(String::new()), ..Default::default() }),
            id: Some("abort".into()),
            status: ExpirationStatus::from_static(ExpirationStatus::ENABLED),
            expiration: None,
            noncurrent_version_expiration: None,
            noncurrent_version_transitions: None,
            prefix: None,
            transitions: None,
        };
        Ok(S3Response::new(GetBucketLifecycleConfigurationOutput { rules: Some(vec![rule]), ..Default::default() }))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.enter("HeadBucket", &req.input.bucket, false)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }
}
