//! A checkpoint's weights as a Hugging Face model folder, or its adapters as PEFT's adapter folder.
//!
//! Stored layout: `model.safetensors` (all weights in one file, tensors in [`header::file_order`]), or
//! `adapter_model.safetensors` with all adapters and `adapter_config.json`; `config.json`, `tokenizer.json`,
//! `generation_config.json` and the tokenizer's other files, all but the first only if the checkpoint has them; the
//! weights of a program's own task have `task.json` instead of all of these. The bytes depend on the weights alone: checkpoints of equal weights give equal files, whatever the world size that wrote
//! them.
//!
//! Shards are read from start to end in parts; each part is summed, and its tensors' bytes go to their places in the
//! merged file. So every byte is downloaded once and verified, and a folder on disk needs no more memory than the parts
//! in flight. An export to another store is put together in memory first.
//!
//! *Crash, cancel:* a local export grows in `.<name>.partial-…` beside the folder and is renamed when it is complete
//! and on disk; in a store `config.json`, without which a folder is no model, is put last. *Retry:* call again.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::{
    CheckpointError, join,
    manifest::{FileKind, Manifest},
    restore::{IN_FLIGHT, RemoteFile, compare, ranges, small_file, with_range},
};
use crate::{
    format::header::{self, TensorEntry},
    ids::random_hex,
    layout,
    storage::{Crc64, Store},
};

/// Small files that make weights a model, in the order in which they are written.
fn small_names() -> impl Iterator<Item = &'static str> {
    let last = [layout::TOKENIZER, layout::GENERATION_CONFIG, layout::ADAPTER_CONFIG, layout::MODEL_CONFIG];
    layout::TOKENIZER_FILES.into_iter().chain(last).chain([layout::TASK])
}

/// The destination of an export.
#[derive(Clone, Debug)]
pub enum Target {
    /// A local folder that does not exist yet, or is empty.
    Folder(PathBuf),
    /// A folder of a store; objects of the same names are overwritten.
    Store(Store),
}

/// What was exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Bytes of the file with the weights.
    pub bytes: u64,
    /// The files written.
    pub files: Vec<String>,
}

/// Exports the weights of the checkpoint with this manifest. `store` is the run's folder, `part` the bytes of one
/// request; `progress` receives the bytes of weights read.
pub async fn export(
    store: &Store,
    manifest: &Manifest,
    target: &Target,
    part: u64,
    progress: impl Fn(u64) + Send + Sync,
) -> Result<Exported, CheckpointError> {
    let merge = Merge::plan(store, manifest).await?;
    let mut small = Vec::new();
    for name in small_names().filter(|name| manifest.file(name).is_some()) {
        small.push((name, small_file(store, manifest, name).await?));
    }
    let mut files = vec![merge.name.to_owned()];
    files.extend(small.iter().map(|(name, _)| (*name).to_owned()));
    match target {
        Target::Folder(path) => to_folder(store, &merge, path, small, part, &progress).await?,
        Target::Store(to) => {
            let len =
                usize::try_from(merge.bytes).map_err(|_| CheckpointError::TooLarge { bytes: merge.bytes, files: 1 })?;
            let memory = Arc::new(Sink::Memory(Mutex::new(vec![0; len])));
            merge.run(store, &memory, part, &progress).await?;
            let body = match Arc::into_inner(memory) {
                Some(Sink::Memory(bytes)) => bytes.into_inner().unwrap_or_else(PoisonError::into_inner),
                _ => return Err(CheckpointError::Internal("merged weights are still being written".into())),
            };
            to.upload(merge.name, body.into(), |_| {}).await?;
            for (name, bytes) in small {
                to.put(name, bytes).await?;
            }
        }
    }
    Ok(Exported { bytes: merge.bytes, files })
}

/// Whether the checkpoint holds adapters, which are of use beside their base alone.
pub fn is_adapter(manifest: &Manifest) -> bool {
    manifest.file(layout::ADAPTER_CONFIG).is_some()
}

/// Writes a folder of files that are in memory, in their order: like an export, a local one appears whole or not at
/// all.
pub async fn write(target: &Target, files: Vec<(String, Bytes)>) -> Result<(), CheckpointError> {
    match target {
        Target::Folder(path) => {
            let path = path.clone();
            let writing = tokio::task::spawn_blocking(move || {
                let partial = Partial::create(&path)?;
                for (name, bytes) in files {
                    let to = partial.path.join(name);
                    fs::write(&to, &bytes).and_then(|()| File::open(&to)?.sync_all()).map_err(io("write", &to))?;
                }
                partial.publish(&path)
            });
            writing.await.map_err(|error| CheckpointError::Internal(format!("write export: {error}")))?
        }
        Target::Store(to) => {
            for (name, bytes) in files {
                to.upload(&name, bytes, |_| {}).await?;
            }
            Ok(())
        }
    }
}

/// Writes the folder beside its place and moves it there.
async fn to_folder(
    store: &Store,
    merge: &Merge,
    path: &Path,
    small: Vec<(&'static str, Bytes)>,
    part: u64,
    progress: &(impl Fn(u64) + Send + Sync),
) -> Result<(), CheckpointError> {
    let partial = Partial::create(path)?;
    let model = partial.path.join(merge.name);
    let file = File::create_new(&model).map_err(io("create", &model))?;
    file.set_len(merge.bytes).map_err(io("reserve room for", &model))?;
    let sink = Arc::new(Sink::File(file, model));
    merge.run(store, &sink, part, progress).await?;
    let path = path.to_owned();
    let finishing = tokio::task::spawn_blocking(move || {
        if let Sink::File(file, model) = &*sink {
            file.sync_all().map_err(io("write", model))?;
        }
        for (name, bytes) in small {
            let to = partial.path.join(name);
            fs::write(&to, &bytes).and_then(|()| File::open(&to)?.sync_all()).map_err(io("write", &to))?;
        }
        partial.publish(&path)
    });
    finishing.await.map_err(|error| CheckpointError::Internal(format!("write export: {error}")))?
}

/// A folder in the making; removed when dropped before it is published.
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn create(target: &Path) -> Result<Self, CheckpointError> {
        let free = match fs::read_dir(target) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => false,
            Err(error) => return Err(io("look at", target)(error)),
        };
        let Some(name) = target.file_name().filter(|_| free) else {
            return Err(CheckpointError::Occupied { path: target.to_owned() });
        };
        let path = target.with_file_name(format!(".{}.partial-{}", name.to_string_lossy(), random_hex(4)));
        fs::create_dir_all(&path).map_err(io("create", &path))?;
        Ok(Self { path })
    }

    fn publish(self, target: &Path) -> Result<(), CheckpointError> {
        let sync = |folder: &Path| File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("write", folder));
        sync(&self.path)?;
        // An empty folder is replaced; if it is no longer empty, this fails.
        fs::rename(&self.path, target).map_err(io("rename export to", target))?;
        match target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            Some(parent) => sync(parent),
            None => sync(Path::new(".")),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After `publish` nothing has this name.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { doing, path, source }
}

/// The destination in which the merged file grows.
enum Sink {
    File(File, PathBuf),
    Memory(Mutex<Vec<u8>>),
}

impl Sink {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), CheckpointError> {
        match self {
            Self::File(file, path) => file.write_all_at(bytes, offset).map_err(io("write", path)),
            Self::Memory(whole) => {
                let mut whole = whole.lock().unwrap_or_else(PoisonError::into_inner);
                let start = usize::try_from(offset).ok();
                let place = start.and_then(|start| whole.get_mut(start..start.checked_add(bytes.len())?));
                let place = place.ok_or_else(|| CheckpointError::Internal("merged weights are too long".into()))?;
                place.copy_from_slice(bytes);
                Ok(())
            }
        }
    }
}

/// One tensor's path from its shard into the merged file.
#[derive(Clone, Copy, Debug)]
struct Move {
    /// First byte in the shard.
    from: u64,
    /// First byte in the merged file.
    to: u64,
    len: u64,
}

/// One shard to be read.
struct Shard {
    file: RemoteFile,
    /// The header that the plan was made from; the bytes read later must be the same.
    header: Bytes,
    /// By `from`, without a gap from the header to the end.
    moves: Arc<[Move]>,
}

/// How shards become one file.
struct Merge {
    folder: String,
    /// The merged file's name.
    name: &'static str,
    header: Bytes,
    /// Bytes of the merged file.
    bytes: u64,
    shards: Vec<Shard>,
}

impl Merge {
    /// Reads all shards' headers and plans the merged file's layout.
    async fn plan(store: &Store, manifest: &Manifest) -> Result<Self, CheckpointError> {
        let folder = manifest.folder();
        let files = manifest.files.iter().filter(|file| file.kind == FileKind::Model);
        let files: Vec<RemoteFile> = files.map(RemoteFile::from).collect();
        let read = |file: RemoteFile| async {
            let (header, tensors) = read_header(store, &folder, &file).await?;
            Ok::<_, CheckpointError>((file, header, tensors))
        };
        let mut shards: Vec<(RemoteFile, Bytes, Vec<TensorEntry>)> =
            stream::iter(files).map(read).buffered(IN_FLIGHT).try_collect().await?;
        shards.sort_by(|a, b| a.0.name.cmp(&b.0.name));

        let mut order: Vec<(usize, &TensorEntry)> = Vec::new();
        for (shard, (.., tensors)) in shards.iter().enumerate() {
            order.extend(tensors.iter().map(|tensor| (shard, tensor)));
        }
        order.sort_by(|(_, a), (_, b)| header::file_order((a.dtype, &a.name), (b.dtype, &b.name)));
        let mut names: Vec<&str> = order.iter().map(|(_, tensor)| tensor.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(CheckpointError::damaged(folder, format!("two shards have tensor {:?}", pair[0])));
        }
        let entries = order.iter().map(|(_, tensor)| (tensor.name.as_str(), tensor.dtype, tensor.shape.as_slice()));
        let header: Bytes = header::write(entries)
            .ok_or_else(|| CheckpointError::TooLarge { bytes: manifest.bytes(), files: shards.len() })?
            .into();
        let mut moves: Vec<Vec<Move>> = vec![Vec::new(); shards.len()];
        let mut bytes = header.len() as u64;
        for (shard, tensor) in order {
            let len = tensor.range.end - tensor.range.start;
            moves[shard].push(Move { from: tensor.range.start, to: bytes, len });
            // Sizes of all files together fit 63 bits: the manifest was validated.
            bytes = bytes.saturating_add(len);
        }
        let shards = shards.into_iter().zip(moves).map(|((file, header, _), mut moves)| {
            moves.sort_unstable_by_key(|step| step.from);
            Shard { file, header, moves: moves.into() }
        });
        let shards = shards.collect();
        let name = if is_adapter(manifest) { layout::ADAPTER } else { layout::MODEL };
        Ok(Self { folder, name, header, bytes, shards })
    }

    /// Writes the merged file into `sink`, checking every shard.
    async fn run(
        &self,
        store: &Store,
        sink: &Arc<Sink>,
        part: u64,
        progress: &(impl Fn(u64) + Send + Sync),
    ) -> Result<(), CheckpointError> {
        sink.write_at(&self.header, 0)?;
        for shard in &self.shards {
            let checksums = ranges(shard.file.bytes, part).map(|range| {
                let (sink, moves, header) = (sink.clone(), shard.moves.clone(), shard.header.clone());
                let (start, len) = (range.start, range.end - range.start);
                let object = join(&self.folder, &shard.file.name);
                let copy = move |bytes: &[u8]| {
                    let same = header.iter().skip(usize::try_from(start).unwrap_or(usize::MAX));
                    if !same.zip(bytes).all(|(before, now)| before == now) {
                        return Err(CheckpointError::damaged(object, "its header changed while it was read"));
                    }
                    scatter(&moves, start, bytes, |bytes, to| sink.write_at(bytes, to))?;
                    Ok(Crc64::of(bytes))
                };
                async move {
                    let sum = with_range(store, &self.folder, &shard.file, range, copy).await?;
                    progress(len);
                    Ok::<_, CheckpointError>((sum, len))
                }
            });
            let combine = |whole: Crc64, (sum, len)| async move { Ok(whole.followed_by(sum, len)) };
            let whole = stream::iter(checksums).buffered(IN_FLIGHT).try_fold(Crc64::EMPTY, combine).await?;
            compare(&join(&self.folder, &shard.file.name), &shard.file, whole)?;
        }
        Ok(())
    }
}

/// Hands the tensor bytes among `bytes`, which begin at `start` of the shard, to `write` with their places.
fn scatter(
    moves: &[Move],
    start: u64,
    bytes: &[u8],
    mut write: impl FnMut(&[u8], u64) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let end = start + bytes.len() as u64;
    let first = moves.partition_point(|step| step.from + step.len <= start);
    for step in moves[first..].iter().take_while(|step| step.from < end) {
        let (from, until) = (step.from.max(start), (step.from + step.len).min(end));
        // Both lie within `start..end`, whose length is a slice's.
        write(&bytes[(from - start) as usize..(until - start) as usize], step.to + (from - step.from))?;
    }
    Ok(())
}

/// A shard's header, its raw bytes and its tensors.
async fn read_header(
    store: &Store,
    folder: &str,
    file: &RemoteFile,
) -> Result<(Bytes, Vec<TensorEntry>), CheckpointError> {
    let object = join(folder, &file.name);
    let damaged = |error: header::HeaderError| CheckpointError::damaged(&object, error.to_string());
    let first = file.bytes.min(64 << 10);
    let mut start = with_range(store, folder, file, 0..first, |bytes| Ok(Bytes::copy_from_slice(bytes))).await?;
    let length = header::length(&start, file.bytes).map_err(damaged)?;
    let whole = header::PREFIX + length;
    if whole > first {
        start = with_range(store, folder, file, 0..whole, |bytes| Ok(Bytes::copy_from_slice(bytes))).await?;
    }
    // `whole` is at most the length of `start` now, on either path.
    start.truncate(whole as usize);
    let tensors =
        header::parse(start.get(header::PREFIX as usize..).unwrap_or_default(), file.bytes).map_err(damaged)?;
    Ok((start, tensors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::{HARMS, checkpoint, file_store, harm, memory_store, weights};

    #[tokio::test]
    async fn exports_of_equal_weights_are_equal_whatever_the_world_size() {
        let folder = tempfile::tempdir().unwrap();
        let mut first: Option<Vec<u8>> = None;
        for ranks in 1..=4 {
            let store = memory_store();
            let (_, manifest) = checkpoint(&store, 5, 1, ranks, 9).await;
            for part in [100, 4096, 1 << 20] {
                let out = folder.path().join(format!("deep/model-{ranks}-{part}"));
                let seen = Mutex::new(0);
                let heard = |n| *seen.lock().unwrap() += n;
                let exported = export(&store, &manifest, &Target::Folder(out.clone()), part, heard).await.unwrap();
                let model = fs::read(out.join(layout::MODEL)).unwrap();
                assert_eq!(exported.bytes, model.len() as u64);
                let shards = manifest.files.iter().filter(|file| file.kind == FileKind::Model);
                assert_eq!(*seen.lock().unwrap(), shards.map(|file| file.bytes).sum::<u64>());
                assert_eq!(fs::read(out.join(layout::MODEL_CONFIG)).unwrap(), b"{\"model_type\":\"llama\"}");
                assert_eq!(fs::read_dir(&out).unwrap().count(), 3);
                assert_eq!(*first.get_or_insert_with(|| model.clone()), model, "{ranks} ranks, parts of {part}");
            }
            let to = memory_store();
            export(&store, &manifest, &Target::Store(to.clone()), 500, |_| {}).await.unwrap();
            assert_eq!(Some(to.get(layout::MODEL, u64::MAX).await.unwrap().to_vec()), first);
            assert!(to.head(layout::MODEL_CONFIG).await.is_ok());
        }
        // Nothing half-made is left beside the folders.
        assert_eq!(fs::read_dir(folder.path().join("deep")).unwrap().count(), 12);
        let model = first.unwrap();
        let read = safetensors::SafeTensors::deserialize(&model).unwrap();
        for tensor in weights(9) {
            assert_eq!(read.tensor(&tensor.name).unwrap().data(), tensor.bytes, "{}", tensor.name);
        }
        assert_eq!(read.len(), weights(9).len());
    }

    #[tokio::test]
    async fn a_damaged_shard_is_named_and_no_files_stay() {
        for how in HARMS {
            let (_guard, store) = file_store();
            let (_, manifest) = checkpoint(&store, 5, 1, 2, 9).await;
            let key = harm(&store, &manifest.folder(), "model-00002-of-00002.safetensors", how).await;
            let folder = tempfile::tempdir().unwrap();
            let target = Target::Folder(folder.path().join("model"));
            let error = export(&store, &manifest, &target, 1000, |_| {}).await.unwrap_err();
            assert!(matches!(&error, CheckpointError::Damaged { object, .. } if *object == key), "{how:?}: {error}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{how:?}");
        }
    }

    #[tokio::test]
    async fn a_folder_that_is_not_empty_is_left_alone() {
        let store = memory_store();
        let (_, manifest) = checkpoint(&store, 5, 1, 1, 9).await;
        let folder = tempfile::tempdir().unwrap();
        let (full, file, empty) = (folder.path().join("full"), folder.path().join("file"), folder.path().join("empty"));
        fs::create_dir(&full).unwrap();
        fs::create_dir(&empty).unwrap();
        fs::write(full.join("notes.txt"), "mine").unwrap();
        fs::write(&file, "mine").unwrap();
        for path in [full, file] {
            let error = export(&store, &manifest, &Target::Folder(path), 1000, |_| {}).await.unwrap_err();
            assert!(matches!(error, CheckpointError::Occupied { .. }), "{error}");
        }
        export(&store, &manifest, &Target::Folder(empty.clone()), 1000, |_| {}).await.unwrap();
        assert!(empty.join(layout::MODEL).exists());
        assert_eq!(fs::read_to_string(folder.path().join("full/notes.txt")).unwrap(), "mine");
    }
}
