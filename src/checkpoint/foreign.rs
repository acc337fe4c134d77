//! The weights of a model folder from elsewhere, checked against the model that starts from them.
//!
//! Only headers are read (and, for a model whose head is its token embedding, any head that the folder nevertheless
//! has): a mismatch is reported by tensor and file before anything is created. Every tensor is used, or is one of a few
//! that hold no trained values: silently skipping another one would give a different model.

use std::collections::HashMap;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::{
    CheckpointError,
    restore::{IN_FLIGHT, RemoteFile, weights_from_folder},
};
use crate::{
    format::{
        header::{self, Dtype, ForeignTensor},
        slices,
    },
    storage::{StorageError, Store},
};

/// The tensors that the model takes from the folder.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// Every parameter with its extents.
    pub shapes: &'a [(String, Vec<u64>)],
    /// The output layer's name.
    pub head: &'a str,
    /// The token embedding's name.
    pub embedding: &'a str,
    /// The output layer is the token embedding.
    pub tied: bool,
}

/// Endings of the names of tensors that are computed from the configuration, or are masks.
const BUFFERS: [&str; 6] = [
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "masked_bias",
    "position_ids",
];

/// Element types of weights.
const WEIGHTS: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

/// Bytes compared at once of each of two tensors.
const COMPARED: u64 = 8 << 20;

/// Whether a tensor holds no trained values.
pub fn is_buffer(name: &str) -> bool {
    BUFFERS
        .iter()
        .any(|known| name.strip_suffix(known).is_some_and(|before| before.is_empty() || before.ends_with('.')))
}

/// The files of the folder's weights. They hold exactly the model's tensors.
///
/// # Errors
/// [`CheckpointError::NotAModel`] if files are missing or malformed, [`CheckpointError::Mismatch`] if a tensor is
/// superfluous, missing or different; otherwise the store's errors.
pub async fn weights_for(store: &Store, expected: Expected<'_>) -> Result<Vec<RemoteFile>, CheckpointError> {
    let files = weights_from_folder(store).await?;
    let read = |file: RemoteFile| async {
        let tensors = read_header(store, &file).await?;
        Ok::<_, CheckpointError>((file, tensors))
    };
    let read: Vec<(RemoteFile, Vec<ForeignTensor>)> =
        stream::iter(files).map(read).buffered(IN_FLIGHT).try_collect().await?;
    let twins = compare(&store.uri(), &read, expected)?;
    if let Some([head, embedding]) = twins
        && !are_equal(store, head, embedding).await?
    {
        let reason = format!(
            "tensor {} of {} is not {}, but the model's config.json says that they are one (tie_word_embeddings)",
            head.tensor.name, head.file, embedding.tensor.name
        );
        let hint = "set \"tie_word_embeddings\": false in the config.json, to train the head that is there";
        return Err(mismatch(&store.uri(), reason, hint));
    }
    Ok(read.into_iter().map(|(file, _)| file).collect())
}

/// A tensor and the name of its file.
#[derive(Clone, Copy, Debug)]
struct Found<'a> {
    file: &'a str,
    tensor: &'a ForeignTensor,
}

fn mismatch(folder: &str, reason: String, hint: &str) -> CheckpointError {
    CheckpointError::Mismatch { folder: folder.to_owned(), reason, hint: hint.to_owned() }
}

/// Checks every tensor against the model. A head that should equal the embedding beside it is returned: their bytes
/// decide.
fn compare<'a>(
    folder: &str,
    files: &'a [(RemoteFile, Vec<ForeignTensor>)],
    expected: Expected<'_>,
) -> Result<Option<[Found<'a>; 2]>, CheckpointError> {
    const TOGETHER: &str =
        "the model's configuration and the folder do not belong together: check model.config and model.init_from";
    let shapes: HashMap<&str, &[u64]> =
        expected.shapes.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    let mut found: HashMap<&str, Found<'a>> = HashMap::new();
    let mut head = None;
    for (file, tensors) in files {
        for tensor in tensors {
            let (name, file) = (tensor.name.as_str(), file.name.as_str());
            let (whole, slice) = slices::parse_name(name);
            let Some(&shape) = shapes.get(whole) else {
                if expected.tied && name == expected.head {
                    head = Some(Found { file, tensor });
                } else if !is_buffer(name) {
                    let reason = format!("tensor {name} of {file} is not one of the model's, and would be lost");
                    return Err(mismatch(folder, reason, unused(name, TOGETHER)));
                }
                continue;
            };
            if slice.is_none() && tensor.shape != shape {
                let reason = format!("tensor {name} of {file} is {:?}, the model's is {shape:?}", tensor.shape);
                return Err(mismatch(folder, reason, TOGETHER));
            }
            if !Dtype::of_name(&tensor.dtype).is_some_and(|dtype| WEIGHTS.contains(&dtype)) {
                let reason = format!("tensor {name} of {file} has elements of type {}", tensor.dtype);
                let hint = format!("convert the model to one of {}", WEIGHTS.map(Dtype::name).join(", "));
                return Err(mismatch(folder, reason, &hint));
            }
            if let Some(first) = found.insert(name, Found { file, tensor }) {
                let reason = format!("tensor {name} is in {} and in {file}", first.file);
                return Err(mismatch(folder, reason, "name a folder whose files hold each tensor once"));
            }
        }
    }
    let sliced = |name: &str| found.keys().any(|stored| slices::parse_name(stored).0 == name);
    if let Some((name, _)) =
        expected.shapes.iter().find(|(name, _)| !found.contains_key(name.as_str()) && !sliced(name))
    {
        let files: Vec<&str> = files.iter().map(|(file, _)| file.name.as_str()).collect();
        let of = match files.as_slice() {
            [one] => (*one).to_owned(),
            many => format!("none of its {} files", many.len()),
        };
        let reason =
            if files.len() == 1 { format!("{of} has no tensor {name}") } else { format!("{of} has tensor {name}") };
        if name == expected.head {
            let reason = format!("{reason}, and the model's config.json does not set tie_word_embeddings");
            let hint =
                "if the model's head is its token embedding, set \"tie_word_embeddings\": true in the config.json";
            return Err(mismatch(folder, reason, hint));
        }
        return Err(mismatch(folder, reason, TOGETHER));
    }
    Ok(head.zip(found.get(expected.embedding).copied()).map(|(head, embedding)| [head, embedding]))
}

/// What to do about a tensor that the model does not have.
fn unused<'a>(name: &str, otherwise: &'a str) -> &'a str {
    if name.ends_with("_proj.bias") && name.contains(".self_attn.") {
        "if the model has biases in its attention, set \"attention_bias\": true in the config.json"
    } else if name.ends_with("_proj.bias") && name.contains(".mlp.") {
        "if the model has biases in its feed-forward layers, set \"mlp_bias\": true in the config.json"
    } else {
        otherwise
    }
}

/// The tensors of one file.
async fn read_header(store: &Store, file: &RemoteFile) -> Result<Vec<ForeignTensor>, CheckpointError> {
    const POINTER: &[u8] = b"version https://git-lfs";
    let broken =
        |reason: String| CheckpointError::NotAModel { folder: store.uri(), reason: format!("{}: {reason}", file.name) };
    let get = |end: u64| async move {
        match store.get_range(&file.name, 0..end).await {
            Ok(bytes) => Ok(bytes),
            Err(error @ (StorageError::NotFound { .. } | StorageError::Short { .. })) => Err(broken(error.to_string())),
            Err(error) => Err(error.into()),
        }
    };
    let first = file.bytes.min(64 << 10);
    let mut start: Bytes = get(first).await?;
    if start.starts_with(POINTER) {
        return Err(broken("this is a pointer of Git LFS, not the file: fetch it with `git lfs pull`".into()));
    }
    let length = header::length(&start, file.bytes).map_err(|error| broken(error.to_string()))?;
    let whole = header::PREFIX + length;
    if whole > first {
        start = get(whole).await?;
    }
    let json = usize::try_from(whole).ok().and_then(|whole| start.get(header::PREFIX as usize..whole));
    let tensors = header::parse_foreign(json.unwrap_or_default(), file.bytes);
    tensors.map_err(|error| broken(error.to_string()))
}

/// Whether two tensors are the same to the last bit.
async fn are_equal(store: &Store, a: Found<'_>, b: Found<'_>) -> Result<bool, CheckpointError> {
    let len = a.tensor.range.end - a.tensor.range.start;
    if (&a.tensor.dtype, &a.tensor.shape, len)
        != (&b.tensor.dtype, &b.tensor.shape, b.tensor.range.end - b.tensor.range.start)
    {
        return Ok(false);
    }
    for begin in (0..len).step_by(COMPARED as usize) {
        let end = len.min(begin + COMPARED);
        let part = |of: Found<'_>| {
            let (file, start) = (of.file.to_owned(), of.tensor.range.start);
            async move { store.get_range(&file, start + begin..start + end).await }
        };
        let (one, other) = futures::future::try_join(part(a), part(b)).await?;
        if one != other {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::memory_store,
        error::{Explain, Kind},
        layout,
    };

    const HEAD: &str = "lm_head.weight";
    const EMBEDDING: &str = "model.embed_tokens.weight";

    fn shapes(tied: bool) -> Vec<(String, Vec<u64>)> {
        let mut shapes = vec![(EMBEDDING.to_owned(), vec![4, 2]), ("model.norm.weight".to_owned(), vec![2])];
        if !tied {
            shapes.push((HEAD.to_owned(), vec![4, 2]));
        }
        shapes
    }

    /// A file of tensors by name, type, shape and the byte that fills them.
    fn file(tensors: &[(&str, &str, &[u64], u8)]) -> Bytes {
        let mut data = Vec::new();
        let mut json = serde_json::Map::new();
        for (name, dtype, shape, fill) in tensors {
            let begin = data.len();
            let elements = shape.iter().product::<u64>() as usize;
            data.resize(begin + elements * size_of(dtype), *fill);
            let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
            json.insert((*name).to_owned(), entry);
        }
        let json = serde_json::to_vec(&json).unwrap();
        [&(json.len() as u64).to_le_bytes()[..], &json, &data].concat().into()
    }

    fn size_of(dtype: &str) -> usize {
        match dtype {
            "F64" | "I64" => 8,
            "F32" => 4,
            "BF16" | "F16" => 2,
            _ => 1,
        }
    }

    async fn look(tied: bool, tensors: &[(&str, &str, &[u64], u8)]) -> Result<Vec<RemoteFile>, CheckpointError> {
        let store = memory_store();
        store.put(layout::MODEL, file(tensors)).await.unwrap();
        let shapes = shapes(tied);
        weights_for(&store, Expected { shapes: &shapes, head: HEAD, embedding: EMBEDDING, tied }).await
    }

    const NORM: (&str, &str, &[u64], u8) = ("model.norm.weight", "BF16", &[2], 1);
    const TOKENS: (&str, &str, &[u64], u8) = (EMBEDDING, "F32", &[4, 2], 2);

    #[tokio::test]
    async fn every_tensor_is_used_or_harmless_whatever_its_type() {
        let buffers: [(&str, &str, &[u64], u8); 4] = [
            ("model.layers.0.self_attn.rotary_emb.inv_freq", "F64", &[3], 9),
            ("model.rotary_emb.inv_freq", "F32", &[3], 9),
            ("h.0.attn.masked_bias", "BOOL", &[3], 1),
            ("rotary_emb.inv_freq", "F8_E4M3", &[3], 1),
        ];
        look(true, &[&[TOKENS, NORM], &buffers[..]].concat()).await.unwrap();
        for dtype in ["F32", "F16", "U8", "BOOL", "F64", "F8_E5M2", "I64", "X7"] {
            let extra = ("model.layers.0.self_attn.q_norm.weight", dtype, &[2][..], 0);
            let error = look(true, &[TOKENS, NORM, extra]).await.unwrap_err();
            let text = error.to_string();
            assert!(text.contains("model.layers.0.self_attn.q_norm.weight of model.safetensors"), "{dtype}: {text}");
            assert_eq!(error.kind(), Kind::Config, "{dtype}");
        }
        // A name that only looks like a buffer's.
        assert!(look(true, &[TOKENS, NORM, ("model.unmasked_bias", "F32", &[2], 0)]).await.is_err());
    }

    #[tokio::test]
    async fn a_head_that_is_the_embedding_may_stand_beside_it_and_another_may_not() {
        look(true, &[TOKENS, NORM, (HEAD, "F32", &[4, 2], 2)]).await.unwrap();
        for other in [(HEAD, "F32", &[4, 2][..], 3), (HEAD, "BF16", &[4, 2][..], 2), (HEAD, "F32", &[2, 4][..], 2)] {
            let error = look(true, &[TOKENS, NORM, other]).await.unwrap_err();
            assert!(error.to_string().contains("lm_head.weight of model.safetensors"), "{error}");
            assert!(error.hint().unwrap().contains("\"tie_word_embeddings\": false"), "{error}");
        }
        look(false, &[TOKENS, NORM, (HEAD, "F32", &[4, 2], 3)]).await.unwrap();
    }

    #[tokio::test]
    async fn a_missing_head_leads_to_the_key_that_ties_it() {
        let error = look(false, &[TOKENS, NORM]).await.unwrap_err();
        assert!(error.to_string().contains("model.safetensors has no tensor lm_head.weight"), "{error}");
        assert!(error.to_string().contains("tie_word_embeddings"), "{error}");
        assert_eq!(error.kind(), Kind::Config);
        let error = look(true, &[TOKENS]).await.unwrap_err();
        assert!(error.to_string().contains("model.safetensors has no tensor model.norm.weight"), "{error}");
    }

    #[tokio::test]
    async fn a_mismatch_names_tensor_and_file() {
        type Tensor<'a> = (&'a str, &'a str, &'a [u64], u8);
        let cases: [(&str, &[Tensor<'_>], &str); 4] = [
            ("shape", &[TOKENS, ("model.norm.weight", "F32", &[3], 1)], "is [3], the model's is [2]"),
            ("type", &[TOKENS, ("model.norm.weight", "F64", &[2], 1)], "elements of type F64"),
            ("integers", &[TOKENS, ("model.norm.weight", "I64", &[2], 1)], "elements of type I64"),
            ("bias", &[TOKENS, NORM, ("model.layers.0.self_attn.q_proj.bias", "F32", &[2], 1)], "q_proj.bias"),
        ];
        for (what, tensors, expected) in cases {
            let error = look(true, tensors).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{what}: {error}");
            assert_eq!(error.kind(), Kind::Config, "{what}");
        }
    }

    #[tokio::test]
    async fn shards_are_looked_at_one_by_one() {
        let store = memory_store();
        let index = r#"{"weight_map":{"x":"model-00001-of-00002.safetensors","y":"model-00002-of-00002.safetensors"}}"#;
        store.put(layout::MODEL_INDEX, index.into()).await.unwrap();
        store.put("model-00001-of-00002.safetensors", file(&[TOKENS])).await.unwrap();
        let put = |second: Bytes| store.put("model-00002-of-00002.safetensors", second);
        let shapes = shapes(true);
        let look = || weights_for(&store, Expected { shapes: &shapes, head: HEAD, embedding: EMBEDDING, tied: true });
        put(file(&[NORM])).await.unwrap();
        assert_eq!(look().await.unwrap().len(), 2);
        put(file(&[NORM, TOKENS])).await.unwrap();
        let error = look().await.unwrap_err().to_string();
        assert!(error.contains("model-00001-of-00002.safetensors and in model-00002-of-00002"), "{error}");
        put(file(&[])).await.unwrap();
        let error = look().await.unwrap_err().to_string();
        assert!(error.contains("none of its 2 files has tensor model.norm.weight"), "{error}");
        put("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n".into()).await.unwrap();
        let error = look().await.unwrap_err();
        assert!(error.to_string().contains("pointer of Git LFS"), "{error}");
        assert_eq!(error.kind(), Kind::Config);
        put("0123".into()).await.unwrap();
        assert_eq!(look().await.unwrap_err().kind(), Kind::Config);
    }
}
