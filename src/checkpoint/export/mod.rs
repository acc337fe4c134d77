//! A checkpoint's weights as a Hugging Face model folder, or its adapters as PEFT's adapter folder; and a model folder
//! again with changed weights, such as merged ones.
//!
//! Stored layout: `model.safetensors` (all weights in one file, tensors in
//! [`file_order`](crate::format::header::file_order)); or, if they are larger than [`Form::max_shard`],
//! `model-00001-of-00003.safetensors` and so on, each with the next tensors that fit, and
//! `model.safetensors.index.json`. With adapters `adapter_model.safetensors`, which PEFT reads from one file only, and
//! `adapter_config.json`. Beside them `config.json`, `tokenizer.json`, `generation_config.json` and the tokenizer's
//! other files, all but the first only if the checkpoint has them; or `task.json` alone, beside the weights of a
//! program's own task. The bytes depend on the weights alone: checkpoints of equal weights give equal files, whatever
//! the world size that wrote them.
//!
//! # Element types
//! Weights are written as they are stored, or in the type that [`Form::dtype`] asks for. For fp32 the checkpoint's fp32
//! values are taken where it has them beside rounded ones; 16-bit values without them are written exactly, and counted
//! in [`Exported::origins`]. For bf16 each value is rounded once; where a checkpoint has rounded ones, these are the
//! fp32 values rounded once. Integers stay integers. `config.json` names the type, if all weights have the same.
//!
//! # Memory
//! Tensors are read in parts; every byte is downloaded once and verified. A folder on disk needs memory for the parts
//! in flight; an export to another store for one file more. A tensor that is changed is in memory whole.
//!
//! *Crash, cancel:* a local export grows in `.<name>.partial-…` beside the folder and is renamed when it is complete
//! and on disk. In a store what an earlier export left there is removed first, its `config.json` before all else, and
//! the new one is put last: in between the folder is no model. *Retry:* call again.

mod fill;
mod folder;
mod input;
mod plan;

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bytes::Bytes;

pub use self::plan::Origins;
use self::{
    fill::{Sink, fill, taken},
    folder::{Partial, io},
    input::Input,
    plan::Output,
};
use super::{
    CheckpointError,
    manifest::{FileKind, MAX_JSON, Manifest},
    restore::{RemoteFile, small_file},
};
use crate::{
    error::{Explain, Kind},
    format::header::Dtype,
    layout,
    storage::{StorageError, Store},
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
    /// A folder of a store, where an earlier export is replaced.
    Store(Store),
}

/// How weights are written.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// The element type; `None`: as they are stored.
    pub dtype: Option<Dtype>,
    /// The most bytes of tensors in one file. A tensor is never split.
    pub max_shard: u64,
    /// Bytes of one request.
    pub part: u64,
}

impl Form {
    /// As they are stored, in one file.
    pub const fn plain(part: u64) -> Self {
        Self { dtype: None, max_shard: u64::MAX, part }
    }
}

/// What was exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Bytes of the files with the weights.
    pub bytes: u64,
    /// The files written.
    pub files: Vec<String>,
    /// The element type of all weights, as `config.json` spells it; `None`: they have several.
    pub dtype: Option<&'static str>,
    /// Where their values came from.
    pub origins: Origins,
}

/// New values for some tensors of a model folder.
pub trait Change: Send + Sync {
    /// Whether this tensor gets others.
    fn concerns(&self, name: &str) -> bool;

    /// The bytes of a tensor with its new values, of type `written`, from those that it has, of type `stored`.
    ///
    /// # Errors
    /// The reason, in words.
    fn apply(&self, name: &str, shape: &[u64], bytes: &[u8], stored: Dtype, written: Dtype) -> Result<Vec<u8>, String>;
}

/// Exports the weights of the checkpoint with this manifest. `store` is the run's folder; `progress` receives the bytes
/// of weights read.
pub async fn export(
    store: &Store,
    manifest: &Manifest,
    target: &Target,
    form: &Form,
    progress: impl Fn(u64) + Send + Sync,
) -> Result<Exported, CheckpointError> {
    let folder = manifest.folder();
    let of_kind = |kind| manifest.files.iter().filter(move |file| file.kind == kind).map(RemoteFile::from);
    let mut inputs = Input::open_all(store, &folder, of_kind(FileKind::Model)).await?;
    let weights = inputs.len();
    let narrow = inputs.iter().flat_map(|input| &input.tensors).any(|tensor| tensor.dtype != Dtype::F32.name());
    if form.dtype == Some(Dtype::F32) && narrow {
        let others = Input::open_all(store, &folder, of_kind(FileKind::Optimizer)).await?;
        let has = |input: &Input| input.tensors.iter().any(|tensor| tensor.name.starts_with(layout::MASTER));
        inputs.extend(others.into_iter().filter(has));
    }
    let (tensors, origins) = plan::of_files(&inputs, weights..inputs.len(), form.dtype)?;
    let adapters = is_adapter(manifest);
    let (name, max) = if adapters { (layout::ADAPTER, u64::MAX) } else { (layout::MODEL, form.max_shard) };
    let files = plan::lay_out(tensors, max, name)?;
    let mut small = Vec::new();
    for name in small_names().filter(|name| manifest.file(name).is_some()) {
        small.push((name.to_owned(), small_file(store, manifest, name).await?));
    }
    let work = Work { inputs, files, small, origins, change: None, part: form.part, describes: !adapters };
    work.run(target, &progress).await
}

/// Exports a model folder again with changed weights. `base` is the folder, `files` those of its weights, whose
/// checksums are verified where they are known; `tensors` are all that the model has, and others are left out. `small`
/// are the files beside them, in the order in which they are written.
pub async fn changed(
    base: (&Store, Vec<RemoteFile>),
    tensors: &[(String, Vec<u64>)],
    change: Arc<dyn Change>,
    small: Vec<(String, Bytes)>,
    target: &Target,
    form: &Form,
) -> Result<Exported, CheckpointError> {
    let (store, files) = base;
    let inputs = Input::open_all(store, "", files).await?;
    let (tensors, origins) = plan::of_model(&inputs, tensors, form.dtype.unwrap_or(Dtype::F32))?;
    let files = plan::lay_out(tensors, form.max_shard, layout::MODEL)?;
    let change = Some(change);
    let work = Work { inputs, files, small, origins, change, part: form.part, describes: true };
    work.run(target, &|_| {}).await
}

/// Whether the checkpoint holds adapters, which are of use beside their base alone.
pub fn is_adapter(manifest: &Manifest) -> bool {
    manifest.file(layout::ADAPTER_CONFIG).is_some()
}

/// Whether all tensors of a model folder's files have this element type.
pub async fn all_are(folder: &Store, files: Vec<RemoteFile>, dtype: Dtype) -> Result<bool, CheckpointError> {
    let inputs = Input::open_all(folder, "", files).await?;
    Ok(inputs.iter().flat_map(|input| &input.tensors).all(|tensor| tensor.dtype == dtype.name()))
}

/// A description that names this type, in the spellings of both versions of transformers; one that does already stays
/// as it is, to the byte.
pub fn typed(description: Bytes, name: &str) -> Bytes {
    let Ok(serde_json::Value::Object(mut map)) = serde_json::from_slice(&description) else { return description };
    const KEYS: [&str; 2] = ["dtype", "torch_dtype"];
    if KEYS.iter().all(|key| map.get(*key).is_some_and(|value| value == name)) {
        return description;
    }
    map.extend(KEYS.map(|key| (key.to_owned(), name.into())));
    serde_json::to_vec_pretty(&map).map_or(description, Bytes::from)
}

/// An export, planned.
struct Work {
    inputs: Vec<Input>,
    files: Vec<Output>,
    small: Vec<(String, Bytes)>,
    origins: Origins,
    change: Option<Arc<dyn Change>>,
    part: u64,
    /// `config.json` describes these weights, and not those that they are an addition to.
    describes: bool,
}

impl Work {
    async fn run(
        mut self,
        target: &Target,
        progress: &(impl Fn(u64) + Send + Sync),
    ) -> Result<Exported, CheckpointError> {
        let dtype = plan::type_name(&self.files);
        if let (true, Some(dtype)) = (self.describes, dtype) {
            let config = self.small.iter_mut().find(|(name, _)| name == layout::MODEL_CONFIG);
            config.into_iter().for_each(|(_, bytes)| *bytes = typed(std::mem::take(bytes), dtype));
        }
        if self.files.len() > 1 {
            let index = serde_json::to_vec_pretty(&plan::index(&self.files));
            let index = index.map_err(|error| CheckpointError::Internal(format!("write an index: {error}")))?;
            self.small.insert(0, (layout::MODEL_INDEX.to_owned(), index.into()));
        }
        let bytes = self.files.iter().map(|file| file.bytes).sum();
        let weights = self.files.iter().map(|file| file.name.clone());
        let files: Vec<String> = weights.chain(self.small.iter().map(|(name, _)| name.clone())).collect();
        let origins = self.origins;
        match target {
            Target::Folder(path) => self.into_folder(path, progress).await?,
            Target::Store(to) => {
                clear(to, &files).await?;
                for file in &self.files {
                    let len = usize::try_from(file.bytes);
                    let len = len.map_err(|_| CheckpointError::TooLarge { bytes: file.bytes, files: 1 })?;
                    let sink = Arc::new(Sink::Memory(Mutex::new(vec![0; len])));
                    self.fill(file, &sink, progress).await?;
                    to.upload(&file.name, taken(sink)?.into(), |_| {}).await?;
                }
                self.verify(progress).await?;
                for (name, bytes) in self.small {
                    to.put(&name, bytes).await?;
                }
            }
        }
        Ok(Exported { bytes, files, dtype, origins })
    }

    async fn fill(
        &self,
        file: &Output,
        sink: &Arc<Sink>,
        progress: &(impl Fn(u64) + Send + Sync),
    ) -> Result<(), CheckpointError> {
        fill(&self.inputs, file, sink, self.change.as_ref(), self.part, progress).await
    }

    /// Checks every file that was read, once nothing more is needed of it.
    async fn verify(&self, progress: &(impl Fn(u64) + Send + Sync)) -> Result<(), CheckpointError> {
        for input in &self.inputs {
            progress(input.verify(self.part).await?);
        }
        Ok(())
    }

    /// Writes the folder beside its place and moves it there.
    async fn into_folder(self, path: &Path, progress: &(impl Fn(u64) + Send + Sync)) -> Result<(), CheckpointError> {
        let partial = Partial::create(path)?;
        for output in &self.files {
            let to = partial.path.join(&output.name);
            let file = File::create_new(&to).map_err(io("create", &to))?;
            file.set_len(output.bytes).map_err(io("reserve room for", &to))?;
            let sink = Arc::new(Sink::File(file, to));
            self.fill(output, &sink, progress).await?;
            let writing = tokio::task::spawn_blocking(move || match &*sink {
                Sink::File(file, to) => file.sync_all().map_err(io("write", to)),
                Sink::Memory(_) => Ok(()),
            });
            writing.await.map_err(|error| CheckpointError::Internal(format!("write export: {error}")))??;
        }
        self.verify(progress).await?;
        let (path, small) = (path.to_owned(), self.small);
        let finishing = tokio::task::spawn_blocking(move || {
            small.iter().try_for_each(|(name, bytes)| partial.put(name, bytes))?;
            partial.publish(&path)
        });
        finishing.await.map_err(|error| CheckpointError::Internal(format!("write export: {error}")))?
    }
}

/// Removes what an earlier export left in a folder of a store, but for `kept`, whose files are about to be written:
/// first what makes it a model, so that nothing in between looks complete.
async fn clear(to: &Store, kept: &[String]) -> Result<(), CheckpointError> {
    if to.head(layout::MANIFEST).await.is_ok() {
        return Err(CheckpointError::IsACheckpoint { folder: to.uri() });
    }
    let first = [layout::MODEL_CONFIG, layout::ADAPTER_CONFIG, layout::MODEL_INDEX];
    let shards = match to.get(layout::MODEL_INDEX, MAX_JSON).await {
        Ok(index) => shards_of(&index),
        Err(_) => Vec::new(),
    };
    for name in first {
        remove(to, name).await?;
    }
    let others = small_names().chain([layout::MODEL, layout::ADAPTER]).filter(|name| !first.contains(name));
    for name in others.map(str::to_owned).chain(shards) {
        if !kept.contains(&name) {
            remove(to, &name).await?;
        }
    }
    Ok(())
}

/// The files that an index names; only those whose names are an export's.
fn shards_of(index: &[u8]) -> Vec<String> {
    let index: serde_json::Value = serde_json::from_slice(index).unwrap_or_default();
    let named = index["weight_map"].as_object().into_iter().flatten().filter_map(|(_, file)| file.as_str());
    let mut names: Vec<String> = named.filter(|name| is_shard(name)).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// `model-00001-of-00002.safetensors`
fn is_shard(name: &str) -> bool {
    let numbers = || name.strip_prefix("model-")?.strip_suffix(layout::SAFETENSORS)?.split_once("-of-");
    let digits = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers().is_some_and(|(number, count)| digits(number) && digits(count))
}

/// Deletes an object if it exists. A caller that may write but not read overwrites what exists.
async fn remove(to: &Store, name: &str) -> Result<(), CheckpointError> {
    match to.head(name).await {
        Ok(_) => Ok(to.delete(name).await?),
        Err(StorageError::NotFound { .. }) => Ok(()),
        Err(error) if error.kind() == Kind::Permission => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
