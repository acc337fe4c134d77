//! Reading a checkpoint back: byte ranges, in parallel, straight into their final buffers.
//!
//! The caller lays the files out in one memory image ([`plan_pieces`]), cuts that image into one buffer a piece, and
//! hands both over ([`fetch`]). Each piece comes straight into its buffer and is summed as it comes
//! ([`Store::get_into`]); the pieces' CRC64-NVME are combined in the order of the file and verified against the
//! manifest. A byte is downloaded once per node, whatever the number of its ranks, and no byte is trusted before its
//! whole file has been verified. There is no training meanwhile: the copies and checksums are made on threads of their
//! own, one per core, which are gone at the end.
//!
//! *Memory:* the image, and a socket's buffer for each request in flight. *Crash, cancel:* nothing in the store
//! changes. A piece that is being read from a disk when the future is dropped is read to its end, into the buffer that
//! it owns. *Retry:* call again.

use std::{collections::BTreeSet, ops::Range};

use futures::{StreamExt, TryStreamExt, stream};
use serde::Deserialize;

use super::{
    CheckpointError, Flaw, join,
    manifest::{FileEntry, MAX_JSON, Manifest, is_plain_name},
};
use crate::{
    layout,
    storage::{Crc64, Priority, StorageError, Store},
};

/// Pieces requested at once. The store has its own limit; this one bounds the memory of callers who keep the pieces.
pub const IN_FLIGHT: usize = 32;
/// Pieces that wait for the store at once: as many as it could ever handle.
const ASKED: usize = 1024;
/// Files begin on a multiple of this in the restore image: whole pages on every machine.
pub const ALIGN: u64 = 64 << 10;
/// The most pieces that are planned; with parts of 16 MiB this is beyond any machine's memory.
const MAX_PIECES: u64 = 1 << 24;

/// A file to download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its name within its folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// CRC64-NVME of all its bytes, if known.
    pub crc64: Option<Crc64>,
}

impl From<&FileEntry> for RemoteFile {
    fn from(file: &FileEntry) -> Self {
        Self { name: file.name.clone(), bytes: file.bytes, crc64: Some(file.crc64) }
    }
}

/// A range of one file, downloaded with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the file.
    pub file: usize,
    /// First byte within the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// First byte within the restore image.
    pub image_offset: u64,
}

/// Where every file lies in the restore image, and how it gets there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Each file's first byte (a multiple of [`ALIGN`]) and length in the image.
    pub files: Vec<(u64, u64)>,
    /// All bytes of all files, in the order of the image.
    pub pieces: Vec<Piece>,
    /// Bytes of the image, a multiple of [`ALIGN`].
    pub total: u64,
}

/// The files of a checkpoint that are loaded into tensors, in the form that [`plan_pieces`] and [`fetch`] take.
pub fn tensor_files(manifest: &Manifest) -> Vec<RemoteFile> {
    manifest.tensor_files().map(RemoteFile::from).collect()
}

/// Lays `files` out one after the other and cuts them into pieces of at most `part_bytes`. Nothing is allocated for
/// sizes that no machine could hold.
pub fn plan_pieces(files: &[RemoteFile], part_bytes: u64) -> Result<Layout, CheckpointError> {
    let part = part_bytes.max(1);
    let mut layout = Layout::default();
    let mut count = 0_u64;
    for file in files {
        let end = layout.total.checked_add(file.bytes).and_then(|end| end.checked_next_multiple_of(ALIGN));
        count = count.saturating_add(file.bytes.div_ceil(part));
        let (Some(end), true) = (end, count <= MAX_PIECES) else {
            let bytes = files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.bytes));
            return Err(CheckpointError::TooLarge { bytes, files: files.len() });
        };
        layout.files.push((layout.total, file.bytes));
        layout.total = end;
    }
    layout.pieces.reserve_exact(count as usize);
    for (index, &(start, bytes)) in layout.files.iter().enumerate() {
        for range in ranges(bytes, part) {
            let Range { start: offset, end } = range;
            layout.pieces.push(Piece { file: index, offset, len: end - offset, image_offset: start + offset });
        }
    }
    Ok(layout)
}

/// `0..bytes` in ranges of at most `part`.
pub(super) fn ranges(bytes: u64, part: u64) -> impl Iterator<Item = Range<u64>> {
    let part = part.max(1);
    (0..bytes.div_ceil(part)).map(move |i| i * part..bytes.min((i + 1).saturating_mul(part)))
}

/// Downloads every piece into its buffer and verifies every file. `progress` receives the bytes of each finished piece.
///
/// `pieces` must cover each file of `files` exactly, in any order; each buffer is as long as its piece. An object that
/// is missing, short or altered gives [`CheckpointError::Damaged`] with its key; the buffers' content is then
/// worthless.
pub async fn fetch<B: AsMut<[u8]> + Send + 'static>(
    store: &Store,
    folder: &str,
    files: &[RemoteFile],
    pieces: Vec<(Piece, B)>,
    progress: impl Fn(u64) + Send + Sync,
) -> Result<(), CheckpointError> {
    // Nothing trains before the restore is done.
    let store = &store.at_priority(Priority::Urgent);
    let mut checksums: Vec<Vec<(u64, u64, Crc64)>> = vec![Vec::new(); files.len()];
    let get = |(piece, mut buffer): (Piece, B)| {
        let progress = &progress;
        async move {
            let file = files
                .get(piece.file)
                .ok_or_else(|| CheckpointError::Internal(format!("piece of file {} of {}", piece.file, files.len())))?;
            let end = piece.offset.checked_add(piece.len).filter(|&end| end <= file.bytes);
            let end = end.ok_or_else(|| CheckpointError::Internal(format!("piece beyond the end of {}", file.name)))?;
            let have = buffer.as_mut().len() as u64;
            if have != piece.len {
                let reason = format!("buffer of {have} bytes for a piece of {}", end - piece.offset);
                return Err(CheckpointError::Internal(reason));
            }
            let object = join(folder, &file.name);
            let sum = store.get_into(&object, piece.offset, buffer).await;
            let sum = sum.map_err(|error| CheckpointError::of_object(&object, error))?;
            progress(piece.len);
            Ok::<_, CheckpointError>((piece, sum))
        }
    };
    let mut got = stream::iter(pieces).map(get).buffer_unordered(ASKED);
    while let Some((piece, sum)) = got.try_next().await? {
        checksums[piece.file].push((piece.offset, piece.len, sum));
    }
    for (file, mut checksums) in files.iter().zip(checksums) {
        checksums.sort_unstable_by_key(|&(offset, ..)| offset);
        let mut end = 0;
        let mut whole = Crc64::EMPTY;
        for (offset, len, sum) in checksums {
            if offset != end {
                return Err(CheckpointError::Internal(format!("pieces don't cover {}", file.name)));
            }
            end += len;
            whole = whole.followed_by(sum, len);
        }
        if end != file.bytes {
            return Err(CheckpointError::Internal(format!("pieces don't cover {}", file.name)));
        }
        compare(&join(folder, &file.name), file, whole)?;
    }
    Ok(())
}

/// Checks a file's checksum against the recorded one, if any.
pub(super) fn compare(object: &str, file: &RemoteFile, found: Crc64) -> Result<(), CheckpointError> {
    match file.crc64 {
        Some(expected) if expected != found => {
            let words = format!("its checksum is {found}, it should be {expected}");
            Err(CheckpointError::damaged(object, Flaw::of_checksum(found, words)))
        }
        _ => Ok(()),
    }
}

/// Downloads a range of a file and works on it on a thread of the blocking pool.
pub(super) async fn with_range<T: Send + 'static>(
    store: &Store,
    folder: &str,
    file: &RemoteFile,
    range: Range<u64>,
    work: impl FnOnce(&[u8]) -> Result<T, CheckpointError> + Send + 'static,
) -> Result<T, CheckpointError> {
    let object = join(folder, &file.name);
    let len = range.end - range.start;
    let bytes = match store.get_range(&object, range).await {
        Ok(bytes) if bytes.len() as u64 == len => bytes,
        Ok(bytes) => {
            let reason = format!("{} bytes came instead of {len}", bytes.len());
            return Err(CheckpointError::damaged(object, reason));
        }
        Err(error) => return Err(CheckpointError::of_object(&object, error)),
    };
    let working = tokio::task::spawn_blocking(move || work(&bytes));
    working.await.map_err(|error| CheckpointError::Internal(format!("work on {object}: {error}")))?
}

/// Damage by length.
pub(super) fn wrong_size(object: &str, found: u64, expected: u64) -> CheckpointError {
    CheckpointError::damaged(object, format!("it has {found} bytes, it should have {expected}"))
}

/// Downloads a small file of a checkpoint whole, and verifies it.
pub async fn small_file(store: &Store, manifest: &Manifest, name: &str) -> Result<bytes::Bytes, CheckpointError> {
    let object = join(&manifest.folder(), name);
    let entry =
        manifest.file(name).ok_or_else(|| CheckpointError::damaged(&object, "its manifest does not name it"))?;
    let bytes = store.get(&object, entry.bytes).await.map_err(|error| CheckpointError::of_object(&object, error))?;
    if bytes.len() as u64 != entry.bytes {
        return Err(wrong_size(&object, bytes.len() as u64, entry.bytes));
    }
    compare(&object, &entry.into(), Crc64::of(&bytes))?;
    Ok(bytes)
}

/// The weights of a Hugging Face folder: `model.safetensors`, or all shards of its index. Sizes are the store's; there
/// is no checksum to verify them against. `store` is the folder itself, so `""` is the `folder` that [`fetch`] wants.
pub async fn weights_from_folder(store: &Store) -> Result<Vec<RemoteFile>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let not_a_model = |reason: String| CheckpointError::NotAModel { folder: store.uri(), reason };
    match store.head(layout::MODEL).await {
        Ok(info) => return Ok(vec![RemoteFile { name: layout::MODEL.into(), bytes: info.size, crc64: None }]),
        Err(StorageError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let index = match store.get(layout::MODEL_INDEX, MAX_JSON).await {
        Ok(bytes) => bytes,
        Err(StorageError::NotFound { .. }) => {
            return Err(not_a_model(format!("neither {} nor {} is there", layout::MODEL, layout::MODEL_INDEX)));
        }
        Err(error) => return Err(error.into()),
    };
    let index: Index = serde_json::from_slice(&index)
        .map_err(|error| not_a_model(format!("{} can't be read: {error}", layout::MODEL_INDEX)))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if let Some(bad) = names.iter().find(|name| !is_plain_name(name)) {
        let bad: String = bad.chars().take(80).collect();
        return Err(not_a_model(format!("{} names file {bad:?}", layout::MODEL_INDEX)));
    }
    if names.is_empty() {
        return Err(not_a_model(format!("{} names no file", layout::MODEL_INDEX)));
    }
    let size = |name: String| async {
        match store.head(&name).await {
            Ok(info) => Ok(RemoteFile { name, bytes: info.size, crc64: None }),
            Err(StorageError::NotFound { .. }) => Err(not_a_model(format!("{name}, named in its index, is missing"))),
            Err(error) => Err(error.into()),
        }
    };
    stream::iter(names).map(size).buffered(IN_FLIGHT).try_collect().await
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        checkpoint::{
            manifest::{FileKind, TrainerState},
            testing::{HARMS, checkpoint, file, file_store, harm, memory_store, random, weights},
        },
        format::header,
        ids::Step,
    };

    /// A chunk of an image that puts itself back when it is dropped.
    struct Chunk {
        at: usize,
        bytes: Vec<u8>,
        image: Arc<Mutex<Vec<u8>>>,
    }
    impl AsMut<[u8]> for Chunk {
        fn as_mut(&mut self) -> &mut [u8] {
            &mut self.bytes
        }
    }
    impl Drop for Chunk {
        fn drop(&mut self) {
            self.image.lock().unwrap()[self.at..self.at + self.bytes.len()].copy_from_slice(&self.bytes);
        }
    }

    async fn load(
        store: &Store,
        folder: &str,
        files: &[RemoteFile],
        part: u64,
    ) -> Result<Vec<Vec<u8>>, CheckpointError> {
        let layout = plan_pieces(files, part)?;
        let image = Arc::new(Mutex::new(vec![0xaa; layout.total as usize]));
        let mut pieces: Vec<(Piece, Chunk)> = Vec::new();
        for piece in layout.pieces {
            let bytes = vec![0; piece.len as usize];
            pieces.push((piece, Chunk { at: piece.image_offset as usize, bytes, image: image.clone() }));
        }
        pieces.reverse();
        let seen = Mutex::new(0);
        fetch(store, folder, files, pieces, |n| *seen.lock().unwrap() += n).await?;
        assert_eq!(*seen.lock().unwrap(), files.iter().map(|file| file.bytes).sum::<u64>());
        let image = image.lock().unwrap();
        Ok(layout.files.iter().map(|&(at, len)| image[at as usize..(at + len) as usize].to_vec()).collect())
    }

    #[tokio::test]
    async fn what_was_saved_by_any_number_of_ranks_comes_back_in_every_byte() {
        for ranks in 1..=4 {
            let (_guard, on_disk) = file_store();
            for store in [memory_store(), on_disk] {
                let (_, manifest) = checkpoint(&store, 5, 1, ranks, 42).await;
                let files = tensor_files(&manifest);
                assert_eq!(files.len(), 2 * ranks);
                for part in [1000, 4096, 1 << 20] {
                    let mut found = Vec::new();
                    let loaded = load(&store, &manifest.folder(), &files, part).await.unwrap();
                    for (bytes, entry) in loaded.iter().zip(manifest.tensor_files()) {
                        for tensor in header::read(bytes).unwrap() {
                            if entry.kind == FileKind::Model {
                                let data = bytes[tensor.range.start as usize..tensor.range.end as usize].to_vec();
                                found.push((tensor.name, data));
                            }
                        }
                    }
                    found.sort();
                    let mut expected: Vec<_> = weights(42).into_iter().map(|t| (t.name, t.bytes)).collect();
                    expected.sort();
                    assert_eq!(found, expected, "{ranks} ranks, parts of {part}");
                }
            }
        }
    }

    #[tokio::test]
    async fn a_flipped_byte_a_cut_file_and_a_missing_object_are_each_named() {
        for how in HARMS {
            let (_guard, on_disk) = file_store();
            for store in [memory_store(), on_disk] {
                let (_, manifest) = checkpoint(&store, 5, 1, 2, 42).await;
                let files = tensor_files(&manifest);
                let name = files[3].name.clone();
                let key = harm(&store, &manifest.folder(), &name, how).await;
                let error = load(&store, &manifest.folder(), &files, 4096).await.unwrap_err();
                let CheckpointError::Damaged { object, .. } = &error else { panic!("{how:?}: {error}") };
                assert_eq!(*object, key, "{how:?}");
            }
        }
    }

    #[tokio::test]
    async fn small_files_are_checked_too() {
        for how in HARMS {
            let store = memory_store();
            let (_, manifest) = checkpoint(&store, 5, 1, 2, 42).await;
            let bytes = small_file(&store, &manifest, layout::TRAINER_STATE).await.unwrap();
            let state = TrainerState::parse(layout::TRAINER_STATE, &bytes).unwrap();
            assert_eq!((state.step, state.samples, state.tokens), (Step(5), 160, 40960));
            let key = harm(&store, &manifest.folder(), layout::TRAINER_STATE, how).await;
            let error = small_file(&store, &manifest, layout::TRAINER_STATE).await.unwrap_err();
            assert!(matches!(&error, CheckpointError::Damaged { object, .. } if *object == key), "{how:?}: {error}");
        }
    }

    #[tokio::test]
    async fn pieces_that_do_not_cover_a_file_are_a_bug() {
        let store = memory_store();
        let (_, manifest) = checkpoint(&store, 5, 1, 1, 42).await;
        let files = tensor_files(&manifest);
        let pieces = plan_pieces(&files, 1000).unwrap().pieces;
        let buffers = |pieces: &[Piece]| pieces.iter().map(|p| (*p, vec![0; p.len as usize])).collect::<Vec<_>>();
        let mut wrong = buffers(&pieces);
        wrong[0].1.pop();
        let mut beyond = pieces.clone();
        beyond[0].len = u64::MAX;
        let beyond = beyond.into_iter().map(|piece| (piece, vec![])).collect();
        // As many bytes as the file has, but some of them twice.
        let mut twice = pieces.clone();
        assert_eq!((twice[0].file, twice[0].len), (twice[1].file, twice[1].len));
        twice[1] = twice[0];
        for pieces in
            [buffers(&twice), buffers(&pieces[1..]), buffers(&pieces[..pieces.len() - 1]), wrong, beyond, vec![]]
        {
            let error = fetch(&store, &manifest.folder(), &files, pieces, |_| {}).await.unwrap_err();
            assert!(matches!(error, CheckpointError::Internal(_)), "{error}");
        }
    }

    #[tokio::test]
    async fn weights_come_from_a_model_folder_in_one_file_or_in_shards() {
        let store = memory_store();
        let error = weights_from_folder(&store).await.unwrap_err();
        assert!(matches!(error, CheckpointError::NotAModel { .. }), "{error}");
        let tensors = weights(1);
        let (a, b) = (file(&tensors[..3]), file(&tensors[3..]));
        let index = |first: &str| {
            let map = serde_json::json!({ "weight_map": { "x": first, "y": "b.safetensors", "z": "b.safetensors" } });
            Bytes::from(serde_json::to_vec(&map).unwrap())
        };
        store.put("b.safetensors", b.clone()).await.unwrap();
        for (first, reason) in
            [("a.safetensors", "a.safetensors, named in its index, is missing"), ("../a", "names file")]
        {
            store.put(layout::MODEL_INDEX, index(first)).await.unwrap();
            let error = weights_from_folder(&store).await.unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        store.put("a.safetensors", a.clone()).await.unwrap();
        store.put(layout::MODEL_INDEX, index("a.safetensors")).await.unwrap();
        let files = weights_from_folder(&store).await.unwrap();
        assert_eq!(files.len(), 2);
        assert_eq!(load(&store, "", &files, 512).await.unwrap(), [a.to_vec(), b.to_vec()]);
        let whole = file(&tensors);
        store.put(layout::MODEL, whole.clone()).await.unwrap();
        let files = weights_from_folder(&store).await.unwrap();
        assert_eq!(load(&store, "", &files, 512).await.unwrap(), [whole.to_vec()]);
    }

    #[test]
    fn sizes_that_no_machine_holds_are_refused_without_an_allocation() {
        let file = |bytes| RemoteFile { name: "f".into(), bytes, crc64: None };
        for files in [vec![file(u64::MAX)], vec![file(1 << 62), file(1 << 62)], vec![file(1 << 50)]] {
            assert!(matches!(plan_pieces(&files, 1 << 20), Err(CheckpointError::TooLarge { .. })));
        }
        assert!(matches!(plan_pieces(&[file(1 << 40)], 0), Err(CheckpointError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn pieces_cover_every_file_once(seed in any::<u64>(), count in 0_usize..6, part in 1_u64..5000) {
            let mut state = seed;
            let files: Vec<RemoteFile> = (0..count)
                .map(|i| RemoteFile { name: format!("f{i}"), bytes: random(&mut state) % 100_000, crc64: None })
                .collect();
            let layout = plan_pieces(&files, part).unwrap();
            let mut ends = vec![0; count];
            for piece in &layout.pieces {
                prop_assert!(piece.len > 0 && piece.len <= part);
                prop_assert_eq!(piece.offset, ends[piece.file]);
                prop_assert_eq!(piece.image_offset, layout.files[piece.file].0 + piece.offset);
                ends[piece.file] += piece.len;
            }
            let mut end = 0;
            for ((file, &(at, len)), &covered) in files.iter().zip(&layout.files).zip(&ends) {
                prop_assert_eq!((len, covered), (file.bytes, file.bytes));
                prop_assert_eq!(at % ALIGN, 0);
                prop_assert!(at >= end);
                end = at + len;
            }
            prop_assert!(layout.total >= end && layout.total.is_multiple_of(ALIGN));
        }
    }
}
