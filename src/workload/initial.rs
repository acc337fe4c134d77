//! What a new run starts from: a model folder's weights, which must be those of the model, and its tokenizer, which
//! must be the data's.

use crate::{
    checkpoint::{
        CheckpointError,
        foreign::{self, Expected},
        restore::RemoteFile,
    },
    config::{self, DataConfig, ModelConfig, StorageConfig, TokenizerRule},
    data::meaning::Meaning,
    error::{Context, Error, Kind, Result},
    layout, model,
    storage::{StorageError, Store},
};

/// The largest `tokenizer.json` that is read. Those in use are smaller.
const MAX_TOKENIZER: u64 = 256 << 20;

/// Opens the folder. A local folder that does not exist is not created.
pub fn open(uri: &str, storage: &StorageConfig) -> Result<Store> {
    if config::local_path(uri).is_some_and(|path| !path.exists()) {
        return Err(Error::new(Kind::Config, format!("model.init_from: there is no folder {uri}"))
            .with_hint("name a Hugging Face model folder, here or in a store"));
    }
    if let Some(path) = config::local_path(uri) {
        let entries = std::fs::read_dir(&path).into_iter().flatten().filter_map(Result::ok);
        for file in entries.map(|entry| entry.path()) {
            let is_model = file.extension().is_some_and(|ending| ending == "json" || ending == "safetensors");
            let kind = std::fs::metadata(&file).map(|metadata| metadata.file_type());
            // Reading a pipe would wait for a writer without end.
            if is_model && kind.is_ok_and(|kind| !kind.is_file() && !kind.is_dir()) {
                let what = format!("model.init_from: {} is a pipe, a socket or a device, not a file", file.display());
                return Err(Error::new(Kind::Config, what));
            }
        }
    }
    Ok(Store::open(uri, storage)?)
}

/// The files of the folder's weights; each of their tensors belongs to the model, or is harmless.
pub async fn weights(model: &ModelConfig, uri: &str, folder: &Store) -> Result<Vec<RemoteFile>> {
    let shapes = model::parameter_shapes(model.kind, &model.config)?;
    let (head, embedding, tied) = model::head(model.kind, &model.config)?;
    let expected = Expected { shapes: &shapes, head, embedding, tied };
    let found = foreign::weights_for(folder, expected).await;
    if matches!(found, Err(CheckpointError::NotAModel { .. })) && folder.head(layout::ADAPTER_CONFIG).await.is_ok() {
        let what = format!("model.init_from: {uri} holds adapters, and not a whole model");
        return Err(Error::new(Kind::Config, what).with_hint(
            "merge them into their model: trainer export --run-id ID --merge --out DIR, or merge_and_unload in PEFT",
        ));
    }
    found.context(format!("read weights of {uri}"))
}

/// Checks the folder's tokenizer against the data's, unless the configuration says that they differ.
pub async fn check_tokenizer(settings: &DataConfig, uri: &str, folder: &Store, data: &Meaning) -> Result<()> {
    if settings.tokenizer == TokenizerRule::Differs {
        return Ok(());
    }
    const DIFFERS: &str = "data.tokenizer = \"differs\" says that the weights are to learn another vocabulary";
    let wrong = |message: String, hint: String| Err(Error::new(Kind::Config, message).with_hint(hint));
    let json = match folder.get(layout::TOKENIZER, MAX_TOKENIZER).await {
        Ok(json) => json,
        Err(StorageError::NotFound { .. }) => {
            return wrong(
                format!("{uri} has no tokenizer.json to compare the data's tokenizer with"),
                format!("put the model's tokenizer.json into that folder; {DIFFERS}"),
            );
        }
        Err(error) => return Err(Error::from(error).context(format!("read the tokenizer of {uri}"))),
    };
    let model = match Meaning::of_json(&json) {
        Ok(model) => model,
        Err(reason) => {
            let hint = format!("put the model's own tokenizer.json into that folder; {DIFFERS}");
            return wrong(format!("tokenizer.json of {uri} {reason}"), hint);
        }
    };
    let Some(difference) = data.difference(&model) else { return Ok(()) };
    let path = config::local_path(uri).map_or_else(|| uri.to_owned(), |path| path.display().to_string());
    wrong(
        format!("the tokenizer of {} is not that of {uri} (there): {difference}", settings.train),
        format!(
            "prepare the data with the model's: trainer data prepare --tokenizer {path}/tokenizer.json …; {DIFFERS}"
        ),
    )
}
