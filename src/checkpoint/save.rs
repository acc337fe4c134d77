//! Writing a checkpoint: shards, then receipts, then the manifest. The caller appends the `committed` record last.
//!
//! ```text
//! every node:  put_shards    model-… optimizer-… (parallel), then receipt-<node>.json
//! the leader:  put_manifest  manifest.json, once all receipts are there and cover the plan; created, never overwritten
//! the leader:  journal       committed { step, manifest, digest }
//! a finisher:  the last two, if the leader is lost after the receipts
//! ```
//! Stored layout of a receipt: [`Receipt`] as JSON: the files that one node has uploaded, with sizes and checksums.
//!
//! *Crash:* everything before the manifest is garbage in its own folder, and so is a manifest without its record.
//! Nothing reads either. *Retry:* both functions may be called again with the same [`Save`]; shards are overwritten
//! with the same bytes, the manifest is recognised by its attempt. A new attempt of the same node with the very same
//! bytes takes over the existing manifest: this repeats a save whose record could not be written. *Attempts:* all nodes
//! of a save have one attempt, the leader's ([`super::ordered`]), and a receipt of another is refused. *Cancel:*
//! dropping a future stops the uploads that it drives; uploaded objects stay as garbage. *Two writers:* a (step,
//! generation) pair is written once, so a second attempt that finds a manifest is refused before it overwrites a byte
//! of what that manifest names.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
};

use bytes::Bytes;
use futures::future::try_join_all;
use serde::{Deserialize, Serialize};

use super::{
    CheckpointError, join,
    manifest::{
        FORMAT, FileEntry, FileKind, MAX_JSON, Manifest, digest, from_json, is_plain_name, to_json, validate_files,
    },
};
use crate::{
    faults::{self, At},
    ids::{AttemptId, Generation, NodeId, RunId, Step, WorldSize},
    layout,
    storage::{Crc64, CreateOutcome, StorageError, Store},
};

/// One large file to upload: a whole shard.
#[derive(Clone, Debug)]
pub struct Upload {
    /// Its name within the checkpoint's folder.
    pub name: String,
    /// Its kind of content.
    pub kind: FileKind,
    /// Its bytes, typically pages of shared memory; they are never copied.
    pub body: Bytes,
}

/// One node's part of one checkpoint.
#[derive(Clone, Debug)]
pub struct Save {
    /// Created once for this save, by its leader for all nodes, so that a second call is a retry and not a second
    /// writer.
    pub attempt: AttemptId,
    /// The run.
    pub run_id: RunId,
    /// The finished step whose state it is.
    pub step: Step,
    /// The generation that writes it.
    pub generation: Generation,
    /// This node.
    pub node: NodeId,
    /// Workers of all nodes.
    pub world_size: WorldSize,
    /// The shards of this node's ranks.
    pub uploads: Vec<Upload>,
    /// Small files by name (`config.json`, `trainer_state.json`, the index, …): the leader's, empty elsewhere.
    pub small: Vec<(String, Bytes)>,
}

impl Save {
    /// The checkpoint's folder, relative to the run.
    pub fn folder(&self) -> String {
        layout::checkpoint(self.step, self.generation)
    }

    /// Bytes that this node uploads, for progress.
    pub fn bytes(&self) -> u64 {
        let shards = self.uploads.iter().map(|upload| upload.body.len() as u64);
        shards.chain(self.small.iter().map(|(_, body)| body.len() as u64)).sum()
    }

    fn reached(&self, point: &str) -> Result<(), CheckpointError> {
        Ok(faults::check(point, At { rank: None, step: Some(self.step.get()) })?)
    }
}

/// The files that one node has uploaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Version of this layout.
    pub format: u32,
    /// The save that uploaded them.
    pub attempt: AttemptId,
    /// The run.
    pub run_id: RunId,
    /// The step.
    pub step: Step,
    /// The generation.
    pub generation: Generation,
    /// The node.
    pub node: NodeId,
    /// Its files, by name.
    pub files: Vec<FileEntry>,
}

impl Receipt {
    /// Bytes of the shards of several receipts.
    pub fn shard_bytes(receipts: &[Self]) -> u64 {
        let files = receipts.iter().flat_map(|receipt| &receipt.files);
        files.filter(|file| file.kind != FileKind::Meta).map(|file| file.bytes).sum()
    }

    /// Reads and checks a receipt; `object` is its key, for errors.
    pub fn parse(object: &str, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let receipt: Self = from_json(object, bytes)?;
        validate_files(&receipt.files).map_err(|reason| CheckpointError::damaged(object, reason))?;
        Ok(receipt)
    }
}

/// A manifest in the store, as far as the `committed` record needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenManifest {
    /// Its key, relative to the run.
    pub key: String,
    /// CRC64-NVME of its bytes, 16 hex digits.
    pub crc64: String,
    /// Bytes of all files that it names.
    pub bytes: u64,
}

/// Uploads this node's files in parallel, and its receipt when all are there. `store` is the run's folder; `progress`
/// receives the bytes of each finished part.
pub async fn put_shards(
    store: &Store,
    save: &Save,
    progress: impl Fn(u64) + Send + Sync + 'static,
) -> Result<Receipt, CheckpointError> {
    let folder = save.folder();
    let small =
        save.small.iter().map(|(name, body)| Upload { name: name.clone(), kind: FileKind::Meta, body: body.clone() });
    let uploads: Vec<Upload> = save.uploads.iter().cloned().chain(small).collect();
    if let Some(bad) = uploads.iter().find(|upload| !is_plain_name(&upload.name)) {
        return Err(CheckpointError::Internal(format!("file name {:?} of a checkpoint is not plain", bad.name)));
    }
    if let Some(receipt) = already_put(store, save, &folder).await? {
        return Ok(receipt);
    }

    let progress = Arc::new(progress);
    let put = |upload: Upload| {
        let (progress, key) = (progress.clone(), join(&folder, &upload.name));
        async move {
            let bytes = upload.body.len() as u64;
            let put = store.upload(&key, upload.body, move |part| progress(part)).await?;
            if put.bytes != bytes {
                let reason = format!("store took {} of {bytes} bytes of {key}", put.bytes);
                return Err(CheckpointError::Internal(reason));
            }
            save.reached("save.after-shard")?;
            Ok(FileEntry { name: upload.name, kind: upload.kind, bytes, crc64: put.crc64 })
        }
    };
    let mut files = try_join_all(uploads.into_iter().map(put)).await?;
    files.sort_by(|a, b| a.name.cmp(&b.name));
    validate_files(&files).map_err(CheckpointError::Internal)?;

    let receipt = Receipt {
        format: FORMAT,
        attempt: save.attempt.clone(),
        run_id: save.run_id.clone(),
        step: save.step,
        generation: save.generation,
        node: save.node.clone(),
        files,
    };
    save.reached("save.before-receipt")?;
    store.put(&join(&folder, &layout::receipt(&save.node)), to_json(&receipt)?.into()).await?;
    save.reached("save.after-receipt")?;
    Ok(receipt)
}

/// Whether a manifest already exists. If so, this is either a late retry of our own (a receipt is returned) or a second
/// writer. Of an earlier attempt of this node it is a receipt if every byte is the same: then the files are those of
/// this attempt, too, and it says so.
async fn already_put(store: &Store, save: &Save, folder: &str) -> Result<Option<Receipt>, CheckpointError> {
    match store.head(&join(folder, layout::MANIFEST)).await {
        Ok(_) => {}
        Err(StorageError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let ours = read_receipt(store, save.step, save.generation, &save.node).await?;
    if let Some(receipt) = ours
        && (receipt.attempt == save.attempt || is_the_same(&receipt, save).await?)
    {
        return Ok(Some(Receipt { attempt: save.attempt.clone(), ..receipt }));
    }
    Err(CheckpointError::AlreadyWritten { step: save.step, generation: save.generation })
}

/// Whether a receipt is for exactly the bytes that `save` would upload.
async fn is_the_same(receipt: &Receipt, save: &Save) -> Result<bool, CheckpointError> {
    let uploads = save.uploads.iter().map(|upload| (upload.name.clone(), upload.body.clone()));
    let bodies: BTreeMap<String, Bytes> = uploads.chain(save.small.iter().cloned()).collect();
    let files = receipt.files.clone();
    let compare = move || {
        files.len() == bodies.len()
            && files.iter().all(|file| {
                let body = bodies.get(&file.name).filter(|body| body.len() as u64 == file.bytes);
                body.is_some_and(|body| Crc64::of(body) == file.crc64)
            })
    };
    let summed = tokio::task::spawn_blocking(compare).await;
    summed.map_err(|error| CheckpointError::Internal(format!("sum up a save: {error}")))
}

/// A node's receipt, if it has uploaded one. `store` is the run's folder.
pub async fn read_receipt(
    store: &Store,
    step: Step,
    generation: Generation,
    node: &NodeId,
) -> Result<Option<Receipt>, CheckpointError> {
    let key = join(&layout::checkpoint(step, generation), &layout::receipt(node));
    match store.get(&key, MAX_JSON).await {
        Ok(bytes) => Receipt::parse(&key, &bytes).map(Some),
        Err(StorageError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Creates the manifest from all nodes' receipts. `expected`: the name of every file of the checkpoint, over all nodes.
///
/// Nothing is written unless the receipts are for this very attempt of this very step and cover `expected` exactly. A
/// finisher gives the save as its leader had ordered it, with that leader's attempt: then its manifest is the same as
/// the leader's, if that one still lives.
pub async fn put_manifest(
    store: &Store,
    save: &Save,
    receipts: &[Receipt],
    expected: &[String],
) -> Result<WrittenManifest, CheckpointError> {
    let manifest =
        assemble(save, receipts, expected).map_err(|reason| CheckpointError::Incomplete { step: save.step, reason })?;
    let key = join(&manifest.folder(), layout::MANIFEST);
    let bytes = manifest.to_bytes()?;
    let mut written = WrittenManifest { key, crc64: digest(&bytes), bytes: manifest.bytes() };
    match store.create(&written.key, bytes.into()).await? {
        CreateOutcome::Created => {}
        CreateOutcome::Exists => {
            let stands = store.get(&written.key, MAX_JSON).await?;
            let found = Manifest::parse(&written.key, &stands)?;
            if (Manifest { attempt: found.attempt.clone(), ..manifest }) != found {
                return Err(CheckpointError::AlreadyWritten { step: save.step, generation: save.generation });
            }
            // This attempt, put by another member; or an earlier one of these nodes, byte for byte the same: node ids
            // are never used twice.
            written.crc64 = digest(&stands);
        }
    }
    save.reached("save.after-manifest")?;
    Ok(written)
}

/// The manifest of these receipts; the error says why there is none. A small file may be in several receipts, since any
/// node can put it, as long as all say the same of it.
pub(super) fn assemble(save: &Save, receipts: &[Receipt], expected: &[String]) -> Result<Manifest, String> {
    let mut files: BTreeMap<String, FileEntry> = BTreeMap::new();
    let mut nodes = BTreeSet::new();
    for receipt in receipts {
        let node = &receipt.node;
        if (&receipt.run_id, receipt.step, receipt.generation) != (&save.run_id, save.step, save.generation) {
            return Err(format!("receipt of node {node} is for another checkpoint"));
        }
        if receipt.attempt != save.attempt {
            return Err(format!("receipt of node {node} is of attempt {}, not {}", receipt.attempt, save.attempt));
        }
        if !nodes.insert(node.clone()) {
            return Err(format!("node {node} has two receipts"));
        }
        for file in &receipt.files {
            match files.entry(file.name.clone()) {
                Entry::Vacant(place) => drop(place.insert(file.clone())),
                Entry::Occupied(known) if file.kind == FileKind::Meta && known.get() == file => {}
                Entry::Occupied(_) => return Err(format!("file {} has two receipts", file.name)),
            }
        }
    }
    let expected: BTreeSet<&String> = expected.iter().collect();
    if let Some(missing) = expected.iter().find(|name| !files.contains_key(**name)) {
        return Err(format!("no receipt names file {missing}"));
    }
    if let Some(extra) = files.keys().find(|name| !expected.contains(name)) {
        return Err(format!("file {extra} is not part of the plan"));
    }
    let manifest = Manifest {
        format: FORMAT,
        attempt: save.attempt.clone(),
        run_id: save.run_id.clone(),
        step: save.step,
        generation: save.generation,
        world_size: save.world_size,
        nodes: nodes.into_iter().collect(),
        files: files.into_values().collect(),
    };
    manifest.validate()?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt,
        process::Command,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::{
        checkpoint::{
            catalog,
            testing::{self, STORAGE, commit, expected, file_store, memory_store, save},
        },
        storage::faulty::{Fault, Faulty},
    };

    #[tokio::test]
    async fn a_save_is_complete_and_a_retry_of_it_changes_nothing() {
        let store = memory_store();
        let save = save(7, 2, 3, 1);
        let committed = commit(&store, &save).await;
        let folder = save.folder();
        for upload in &save.uploads {
            assert_eq!(store.get(&join(&folder, &upload.name), u64::MAX).await.unwrap(), upload.body);
        }
        let manifest = catalog::inspect(&store, &committed).await.unwrap();
        assert_eq!(manifest.files.len(), expected(&save).len());
        assert_eq!(committed.bytes, save.bytes());
        assert!(manifest.files.is_sorted_by(|a, b| a.name < b.name));
        // Again, as after an answer that was lost.
        let again = commit(&store, &save).await;
        assert_eq!(again, committed);
        let receipt = read_receipt(&store, save.step, save.generation, &save.node).await.unwrap().unwrap();
        assert_eq!(receipt.files, manifest.files);
    }

    #[tokio::test]
    async fn a_second_attempt_is_refused_before_it_overwrites_a_byte() {
        let store = memory_store();
        let first = save(7, 2, 1, 1);
        let committed = commit(&store, &first).await;
        let second = Save { attempt: AttemptId::random(), ..save(7, 2, 1, 99) };
        for second in [second.clone(), Save { node: first.node.clone(), ..second }] {
            let refused = put_shards(&store, &second, |_| {}).await;
            assert!(matches!(refused, Err(CheckpointError::AlreadyWritten { step: Step(7), .. })), "{refused:?}");
        }
        let body = store.get(&join(&first.folder(), &first.uploads[0].name), u64::MAX).await.unwrap();
        assert_eq!(body, first.uploads[0].body);
        // Racing to the manifest: the later writer gets an error, and the first manifest stays.
        let receipt = read_receipt(&store, first.step, first.generation, &first.node).await.unwrap().unwrap();
        let late = Save { attempt: AttemptId::random(), node: NodeId::random(), ..first.clone() };
        let receipt = Receipt { node: late.node.clone(), attempt: late.attempt.clone(), ..receipt };
        let refused = put_manifest(&store, &late, &[receipt], &expected(&first)).await;
        assert!(matches!(refused, Err(CheckpointError::AlreadyWritten { .. })), "{refused:?}");
        catalog::inspect(&store, &committed).await.unwrap();
    }

    /// The record of the first attempt was not written; the same state is saved again by the same node.
    #[tokio::test]
    async fn a_later_attempt_with_the_same_bytes_takes_over_the_manifest() {
        let store = memory_store();
        let first = save(7, 2, 2, 1);
        let committed = commit(&store, &first).await;
        let again = Save { attempt: AttemptId::random(), ..first.clone() };
        assert_eq!(commit(&store, &again).await, committed);
        // Only if every byte is the same.
        let mut altered = again.clone();
        let mut body = altered.uploads[1].body.to_vec();
        *body.last_mut().unwrap() ^= 1;
        altered.uploads[1].body = body.into();
        let mut fewer = again.clone();
        fewer.uploads.pop();
        for other in [altered, fewer, Save { node: NodeId::random(), ..again }] {
            let refused = put_shards(&store, &other, |_| {}).await;
            assert!(matches!(refused, Err(CheckpointError::AlreadyWritten { .. })), "{refused:?}");
        }
        catalog::inspect(&store, &committed).await.unwrap();
    }

    #[tokio::test]
    async fn nodes_put_their_parts_and_the_leader_writes_one_manifest() {
        let store = memory_store();
        let all = save(7, 2, 2, 1);
        let part = |keep: &str, small| Save {
            node: NodeId::random(),
            uploads: all.uploads.iter().filter(|upload| upload.name.contains(keep)).cloned().collect(),
            small,
            ..all.clone()
        };
        let leader = part("-00001-of", all.small.clone());
        let other = part("-00002-of", vec![]);
        let receipts =
            [put_shards(&store, &leader, |_| {}).await.unwrap(), put_shards(&store, &other, |_| {}).await.unwrap()];
        let written = put_manifest(&store, &leader, &receipts, &expected(&all)).await.unwrap();
        assert_eq!(written.bytes, all.bytes());
        // The other node's answer was lost: it tries again after the manifest exists.
        assert_eq!(put_shards(&store, &other, |_| {}).await.unwrap(), receipts[1]);
        // The leader was lost before the record: the other one finishes, and finds the very same manifest.
        let found = [&leader.node, &other.node].map(|node| read_receipt(&store, all.step, all.generation, node));
        let found: Vec<Receipt> = try_join_all(found).await.unwrap().into_iter().flatten().collect();
        let order = Save { uploads: vec![], small: vec![], ..other.clone() };
        assert_eq!(put_manifest(&store, &order, &found, &expected(&all)).await.unwrap(), written);
    }

    /// All nodes repeat a save whose manifest stands: each compares its bytes, and the first manifest is taken over.
    #[tokio::test]
    async fn nodes_repeat_a_save_of_theirs_under_a_new_attempt() {
        let store = memory_store();
        let all = save(7, 2, 2, 1);
        let part = |keep: &str| Save {
            node: NodeId::random(),
            uploads: all.uploads.iter().filter(|upload| upload.name.contains(keep)).cloned().collect(),
            small: if keep.contains('1') { all.small.clone() } else { vec![] },
            ..all.clone()
        };
        let parts = [part("-00001-of"), part("-00002-of")];
        let put = |parts: [Save; 2]| {
            let store = store.clone();
            async move {
                let [a, b] = parts;
                [put_shards(&store, &a, |_| {}).await.unwrap(), put_shards(&store, &b, |_| {}).await.unwrap()]
            }
        };
        let first = put(parts.clone()).await;
        let written = put_manifest(&store, &parts[0], &first, &expected(&all)).await.unwrap();
        let attempt = AttemptId::random();
        let parts = parts.map(|part| Save { attempt: attempt.clone(), ..part });
        let second = put(parts.clone()).await;
        assert!(second.iter().all(|receipt| receipt.attempt == attempt));
        assert_eq!(put_manifest(&store, &parts[0], &second, &expected(&all)).await.unwrap(), written);
        let mixed = [second[0].clone(), first[1].clone()];
        let refused = put_manifest(&store, &parts[0], &mixed, &expected(&all)).await.unwrap_err();
        assert!(refused.to_string().contains("is of attempt"), "{refused}");
    }

    #[tokio::test]
    async fn equal_receipts_of_a_small_file_are_one_and_unequal_ones_are_none() {
        let store = memory_store();
        let save = save(7, 2, 1, 1);
        let receipt = put_shards(&store, &save, |_| {}).await.unwrap();
        let small: Vec<FileEntry> = receipt.files.iter().filter(|file| file.kind == FileKind::Meta).cloned().collect();
        let finisher = Receipt { node: NodeId::random(), files: small, ..receipt.clone() };
        let manifest = assemble(&save, &[receipt.clone(), finisher.clone()], &expected(&save)).unwrap();
        assert_eq!((manifest.files.len(), manifest.nodes.len()), (receipt.files.len(), 2));
        let changes: [fn(&mut FileEntry); 2] = [|file| file.bytes += 1, |file| file.crc64 = Crc64(file.crc64.0 ^ 1)];
        for change in changes {
            let mut other = finisher.clone();
            change(&mut other.files[1]);
            let refused = assemble(&save, &[receipt.clone(), other], &expected(&save)).unwrap_err();
            assert!(refused.contains("has two receipts"), "{refused}");
        }
        let shards: Vec<FileEntry> =
            receipt.files.iter().filter(|file| file.kind == FileKind::Model).cloned().collect();
        let twice = Receipt { files: shards, ..finisher };
        assert!(assemble(&save, &[receipt, twice], &expected(&save)).unwrap_err().contains("has two receipts"));
    }

    #[tokio::test]
    async fn receipts_that_do_not_cover_the_plan_give_no_manifest() {
        let store = memory_store();
        let save = save(7, 2, 1, 1);
        let receipt = put_shards(&store, &save, |_| {}).await.unwrap();
        let names = expected(&save);
        let with = |change: fn(&mut Receipt)| {
            let mut receipt = receipt.clone();
            change(&mut receipt);
            receipt
        };
        let elsewhere = with(|r| r.node = NodeId::random());
        let mut more = names.clone();
        more.push("model-00002-of-00002.safetensors".into());
        let cases = [
            (vec![], names.clone(), "no receipt names"),
            (vec![receipt.clone()], more, "no receipt names file model-00002"),
            (vec![receipt.clone()], names[1..].to_vec(), "not part of the plan"),
            (vec![receipt.clone(), receipt.clone()], names.clone(), "two receipts"),
            (vec![receipt.clone(), elsewhere], names.clone(), "has two receipts"),
            (vec![with(|r| r.step = Step(8))], names.clone(), "another checkpoint"),
            (vec![with(|r| r.attempt = AttemptId::random())], names.clone(), "is of attempt"),
            (vec![with(|r| r.generation = Generation(1))], names.clone(), "another checkpoint"),
            (vec![with(|r| r.run_id = RunId::new("other").unwrap())], names.clone(), "another checkpoint"),
        ];
        for (receipts, names, reason) in cases {
            let error = put_manifest(&store, &save, &receipts, &names).await.unwrap_err();
            assert!(matches!(error, CheckpointError::Incomplete { .. }));
            assert!(error.to_string().contains(reason), "{error}");
        }
        assert!(store.head(&join(&save.folder(), layout::MANIFEST)).await.is_err());
    }

    #[tokio::test]
    async fn a_manifest_whose_answer_was_lost_is_recognised_as_ours() {
        let lost = AtomicUsize::new(0);
        let faulty = Faulty::new(move |operation, path, _| {
            let first =
                operation == "create" && path.ends_with(layout::MANIFEST) && lost.fetch_add(1, Ordering::Relaxed) == 0;
            if first { Fault::AnswerLost } else { Fault::Pass }
        });
        let store = Store::faulty(&faulty, &STORAGE);
        let committed = commit(&store, &save(7, 2, 2, 1)).await;
        assert_eq!(faulty.count("create"), 2);
        catalog::inspect(&store, &committed).await.unwrap();
    }

    const CRASH_FOLDER: &str = "TRAINER_TEST_CRASH_FOLDER";

    /// Runs itself as a child process that is killed at a crash point in the middle of a save.
    #[tokio::test]
    async fn a_crash_between_the_steps_leaves_only_garbage() {
        if let Some(folder) = std::env::var_os(CRASH_FOLDER) {
            let store = testing::open_folder(std::path::Path::new(&folder));
            commit(&store, &save(20, 2, 2, 2)).await;
            return;
        }
        let points = [
            ("save.after-shard=kill", false),
            ("save.after-shard=kill@hit=4@step=20", false),
            ("save.before-receipt=kill", false),
            ("save.after-receipt=kill", false),
            ("save.after-manifest=kill", true),
        ];
        for (point, manifest_stands) in points {
            let (folder, store) = file_store();
            let before = commit(&store, &save(10, 1, 2, 1)).await;
            let name = "checkpoint::save::tests::a_crash_between_the_steps_leaves_only_garbage";
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name, "--nocapture"])
                .env(CRASH_FOLDER, folder.path())
                .env(faults::VARIABLE, point)
                .output()
                .unwrap();
            assert_eq!(child.status.signal(), Some(9), "{point}: {}", String::from_utf8_lossy(&child.stderr));
            let manifest = store.head(&join(&layout::checkpoint(Step(20), Generation(2)), layout::MANIFEST)).await;
            assert_eq!(manifest.is_ok(), manifest_stands, "{point}");
            assert!(!store.list(&layout::checkpoint(Step(20), Generation(2))).await.unwrap().is_empty(), "{point}");
            let outcome = catalog::newest_usable(&store, std::slice::from_ref(&before), None).await.unwrap();
            assert_eq!(outcome.found.unwrap().0, before, "{point}");
            assert!(outcome.stepped_over.is_empty(), "{point}");
            // The next generation saves the same step undisturbed.
            let after = commit(&store, &save(20, 3, 1, 3)).await;
            let outcome = catalog::newest_usable(&store, &[before, after.clone()], None).await.unwrap();
            assert_eq!(outcome.found.unwrap().0, after, "{point}");
        }
    }
}
