//! The weights that adapters are trained beside: a model folder's files, in memory that this node's workers inherit.
//!
//! The files are named with their checksums when the run is created. They are read from the folder at every start of
//! an agent, and held against those checksums byte for byte before anything is computed: adapters mean nothing beside
//! other weights. Nothing of them is ever stored by the run.
//!
//! *Memory:* all bytes of the files, once per node, while the agent lives, so that workers which crash are started
//! again without the folder. *Crash, cancel:* the memory is freed with its last user. *Retry:* read again.

use bytes::Bytes;

use super::initial;
use crate::{
    checkpoint::{CheckpointError, restore, restore::RemoteFile},
    config::{BaseFile, LoraConfig, StorageConfig},
    error::{Error, Kind, Result},
    snapshot::image::SharedImage,
    storage::{Crc64, Store},
};

/// The memory's name, which shows up in `/proc/<pid>/maps`.
const NAME: &str = "trainer-base";

/// The files, read and verified.
#[derive(Debug)]
pub struct Base {
    image: SharedImage,
    /// Each file's first byte and length in the image.
    places: Vec<(u64, u64)>,
}

impl Base {
    /// Reads the files of a run that is about to be created; returns what later starts hold them against, too.
    pub async fn of_new_run(
        folder: &Store,
        files: Vec<RemoteFile>,
        storage: &StorageConfig,
    ) -> Result<(Self, Vec<BaseFile>)> {
        let base = Self::read(folder, &files, storage).await?;
        let contents = base.files()?;
        let sums = tokio::task::spawn_blocking(move || contents.iter().map(|bytes| Crc64::of(bytes)).collect());
        let sums: Vec<Crc64> = sums.await.map_err(|error| Error::from_source(Kind::Bug, error))?;
        let file =
            |(file, sum): (RemoteFile, Crc64)| BaseFile { name: file.name, bytes: file.bytes, crc64: sum.to_string() };
        Ok((base, files.into_iter().zip(sums).map(file).collect()))
    }

    /// Reads the files of an existing run from `uri`.
    ///
    /// # Errors
    /// [`Kind::Config`], with the file's name, if one is missing or is not what it was when the run was created.
    pub async fn of_existing_run(uri: &str, lora: &LoraConfig, storage: &StorageConfig) -> Result<Self> {
        let (folder, files) = Self::look(uri, lora, storage).await?;
        match Self::read(&folder, &files, storage).await {
            Ok(base) => Ok(base),
            Err(error) => Err(unlike(uri, error)),
        }
    }

    /// The folder of an existing run's base, and the files there: they have their sizes, and are yet to be read and
    /// held against their checksums ([`unlike`] explains what comes of that).
    pub async fn look(uri: &str, lora: &LoraConfig, storage: &StorageConfig) -> Result<(Store, Vec<RemoteFile>)> {
        let folder = initial::open(uri, storage)?;
        let mut files = Vec::with_capacity(lora.base.len());
        for BaseFile { name, bytes, crc64 } in &lora.base {
            let sum = crc64.parse::<Crc64>();
            let sum =
                sum.map_err(|_| Error::new(Kind::Data, format!("the run's journal has no checksum of {name}")))?;
            match folder.head(name).await {
                Ok(info) if info.size == *bytes => {}
                Ok(info) => return Err(changed(uri, name, format!("it has {} bytes, not {bytes}", info.size))),
                Err(crate::storage::StorageError::NotFound { .. }) => {
                    return Err(changed(uri, name, "it is missing".into()));
                }
                Err(error) => return Err(Error::from(error).context(format!("look for {name} in {uri}"))),
            }
            files.push(RemoteFile { name: name.clone(), bytes: *bytes, crc64: Some(sum) });
        }
        Ok((folder, files))
    }

    async fn read(folder: &Store, files: &[RemoteFile], storage: &StorageConfig) -> Result<Self, CheckpointError> {
        let memory = |error: std::io::Error| CheckpointError::Io {
            doing: "make room in memory for",
            path: NAME.into(),
            source: error,
        };
        let layout = restore::plan_pieces(files, u64::from(storage.part_mib) << 20)?;
        let image = SharedImage::create(NAME).map_err(memory)?;
        image.grow(layout.total).map_err(memory)?;
        let ranges: Vec<_> = layout.pieces.iter().map(|it| it.image_offset..it.image_offset + it.len).collect();
        let chunks = image.map().and_then(|mapping| mapping.chunks(&ranges)).map_err(memory)?;
        let pieces = layout.pieces.into_iter().zip(chunks).collect();
        restore::fetch(folder, "", files, pieces, |_| {}).await?;
        Ok(Self { image, places: layout.files })
    }

    /// The memory, to be inherited by workers.
    pub const fn image(&self) -> &SharedImage {
        &self.image
    }

    /// Each file's first byte and length in the memory.
    pub fn places(&self) -> &[(u64, u64)] {
        &self.places
    }

    /// The files' bytes.
    pub fn files(&self) -> Result<Vec<Bytes>> {
        let memory = |error: std::io::Error| Error::from_source(Kind::Bug, error).context("map the base");
        let mapping = self.image.map().map_err(memory)?;
        let bytes = self.places.iter().map(|&(start, len)| mapping.bytes(start..start.saturating_add(len)));
        bytes.collect::<std::io::Result<_>>().map_err(memory)
    }
}

/// The error of reading a base: a file that is not what it was is named.
pub fn unlike(uri: &str, error: CheckpointError) -> Error {
    match error {
        CheckpointError::Damaged { object, reason } => changed(uri, &object, reason.to_string()),
        error => Error::from(error).context(format!("read the base of the adapters from {uri}")),
    }
}

fn changed(uri: &str, file: &str, why: String) -> Error {
    let what = format!("{file} of {uri} is not the file that this run's adapters are trained beside: {why}");
    Error::new(Kind::Config, what).with_hint(
        "put the model folder back as it was when the run was created; to train beside other weights, start a new run",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::memory_store;

    fn lora(base: Vec<BaseFile>) -> LoraConfig {
        LoraConfig { rank: 1, alpha: 1.0, targets: vec!["q_proj".into()], base }
    }

    #[tokio::test]
    async fn a_base_is_what_it_was_or_is_refused_by_file() {
        let folder = tempfile::tempdir().unwrap();
        let uri = format!("file://{}", folder.path().display());
        let storage = StorageConfig::plain(8, 4);
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(folder.path().join("a.safetensors"), &bytes).unwrap();
        std::fs::write(folder.path().join("b.safetensors"), &bytes[..100]).unwrap();
        let store = initial::open(&uri, &storage).unwrap();
        let file = |name: &str, bytes| RemoteFile { name: name.into(), bytes, crc64: None };
        let files = vec![file("a.safetensors", 100_000), file("b.safetensors", 100)];
        let (base, known) = Base::of_new_run(&store, files, &storage).await.unwrap();
        assert_eq!(base.files().unwrap(), [&bytes[..], &bytes[..100]]);
        assert_eq!(known[1].crc64, Crc64::of(&bytes[..100]).to_string());
        let again = Base::of_existing_run(&uri, &lora(known.clone()), &storage).await.unwrap();
        assert_eq!((again.files().unwrap(), again.places()), (base.files().unwrap(), base.places()));

        let refused = |known: Vec<BaseFile>, uri: String| async move {
            let error = Base::of_existing_run(&uri, &lora(known), &StorageConfig::plain(8, 4)).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{error}");
            error.to_string()
        };
        let mut other = bytes.clone();
        other[70_000] ^= 1;
        std::fs::write(folder.path().join("a.safetensors"), &other).unwrap();
        let error = refused(known.clone(), uri.clone()).await;
        assert!(error.contains("a.safetensors") && error.contains("checksum"), "{error}");
        other.push(0);
        std::fs::write(folder.path().join("a.safetensors"), &other).unwrap();
        let error = refused(known.clone(), uri.clone()).await;
        assert!(error.contains("a.safetensors") && error.contains("100001 bytes, not 100000"), "{error}");
        std::fs::remove_file(folder.path().join("a.safetensors")).unwrap();
        assert!(refused(known, uri).await.contains("it is missing"));
        assert!(Base::of_new_run(&memory_store(), vec![file("x", 3)], &storage).await.is_err());
    }
}
