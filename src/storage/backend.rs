//! The place of a store's objects, and the way in which large ones get there.

use std::sync::Arc;

use bytes::Bytes;
use object_store::{
    GetOptions, GetResult, ObjectMeta, ObjectStore, PutPayload,
    local::LocalFileSystem,
    multipart::{MultipartStore, PartId},
    path::Path,
};

use super::{
    crc::Crc64,
    s3::Bucket,
    signed::{S3, TakenPart},
};

/// The place of the objects.
#[derive(Clone)]
pub(super) struct Backend {
    pub objects: Arc<dyn ObjectStore>,
    pub large: Large,
    /// On S3: for requests that object_store lacks.
    pub s3: Option<Arc<Bucket>>,
}

/// The way in which large objects are written to a store.
#[derive(Clone)]
pub(super) enum Large {
    /// Into a file, by position.
    File(Arc<LocalFileSystem>),
    /// In parts, with requests of our own.
    S3(Arc<S3>),
    /// In parts, through object_store.
    Parts(Arc<dyn MultipartStore>),
}

/// The store's answer to a part.
pub(super) enum Part {
    S3(TakenPart),
    Other(PartId),
}

impl Backend {
    /// Reads an object, or a part of it. Opening a named pipe would wait for a writer without end, in a thread that the
    /// program's end waits for: of a folder's entries only files are opened.
    pub(super) async fn get(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        if let Large::File(local) = &self.large {
            let place = local.path_to_filesystem(path)?;
            let kind = tokio::task::spawn_blocking(move || std::fs::metadata(place).map(|found| found.file_type()));
            // Whatever else may be wrong with it is said by the request itself.
            if let Ok(Ok(kind)) = kind.await
                && !kind.is_file()
                && !kind.is_dir()
            {
                let source = "it is a pipe, a socket or a device, not a file".into();
                return Err(object_store::Error::NotSupported { source });
            }
        }
        self.objects.get_opts(path, options).await
    }

    /// Size and age of an object, which a folder knows only of a file that it has opened.
    pub(super) async fn head(&self, path: &Path) -> object_store::Result<ObjectMeta> {
        Ok(self.get(path, GetOptions { head: true, ..GetOptions::default() }).await?.meta)
    }
}

impl Large {
    /// Whether objects are written in one piece, by position.
    pub(super) const fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }

    pub(super) const fn is_s3(&self) -> bool {
        matches!(self, Self::S3(_))
    }

    pub(super) async fn begin(&self, path: &Path) -> object_store::Result<String> {
        match self {
            Self::S3(s3) => s3.begin(path).await,
            Self::Parts(store) => store.create_multipart(path).await,
            Self::File(_) => Err(not_in_parts()),
        }
    }

    pub(super) async fn part(
        &self,
        path: &Path,
        id: &str,
        index: usize,
        body: Bytes,
        crc: Crc64,
    ) -> object_store::Result<Part> {
        match self {
            Self::S3(s3) => s3.part(path, id, index, body, crc).await.map(Part::S3),
            Self::Parts(store) => {
                store.put_part(path, &id.to_owned(), index, PutPayload::from_bytes(body)).await.map(Part::Other)
            }
            Self::File(_) => Err(not_in_parts()),
        }
    }

    pub(super) async fn complete(&self, path: &Path, id: &str, sent: &Sent) -> object_store::Result<()> {
        match self {
            Self::S3(s3) => s3.complete(path, id, &sent.taken, sent.crc64).await,
            Self::Parts(store) => store.complete_multipart(path, &id.to_owned(), sent.ids.clone()).await.map(drop),
            Self::File(_) => Err(not_in_parts()),
        }
    }

    pub(super) async fn abort(&self, path: &Path, id: &str) -> object_store::Result<()> {
        match self {
            Self::S3(s3) => s3.client.abort_multipart(path, &id.to_owned()).await,
            Self::Parts(store) => store.abort_multipart(path, &id.to_owned()).await,
            Self::File(_) => Err(not_in_parts()),
        }
    }
}

fn not_in_parts() -> object_store::Error {
    object_store::Error::NotSupported { source: "files are not written in parts".into() }
}

/// All parts of an object, in order.
#[derive(Default)]
pub(super) struct Sent {
    taken: Vec<TakenPart>,
    ids: Vec<PartId>,
    pub bytes: u64,
    pub crc64: Crc64,
}

impl Sent {
    pub(super) fn add(&mut self, (part, crc64, len): (Part, Crc64, u64)) {
        match part {
            Part::S3(taken) => self.taken.push(taken),
            Part::Other(id) => self.ids.push(id),
        }
        self.crc64 = self.crc64.followed_by(crc64, len);
        self.bytes += len;
    }
}
