//! What ranks hold, and the files that they would save, for tests: the same whoever plans a save's files.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::State;
use crate::{
    format::header,
    snapshot::plan::{ShardKind, TensorSpec},
    torch::{byte_len, store_bytes},
};

/// The tensors of one rank, and their bytes.
pub type Held = Vec<(TensorSpec, Vec<u8>)>;

/// What one rank holds of its state.
pub fn held(state: &State) -> Held {
    let held = state.specs().iter().zip(state.tensors()).filter(|(_, tensor)| tensor.defined());
    let bytes = held.map(|(spec, tensor)| {
        let mut bytes = vec![0; byte_len(tensor).unwrap()];
        store_bytes(tensor, &mut bytes).unwrap();
        (spec.clone(), bytes)
    });
    bytes.collect()
}

/// Every tensor of these ranks in one piece, by name. What several of them have must be the same.
pub fn together(ranks: &[Held]) -> BTreeMap<String, Vec<u8>> {
    let mut parts: BTreeMap<(&str, u64), &[u8]> = BTreeMap::new();
    for (spec, bytes) in ranks.iter().flatten() {
        let begin = spec.part.map_or(0, |part| part.begin);
        let other = parts.insert((&spec.name, begin), bytes);
        assert!(other.is_none_or(|other| other == bytes), "ranks differ in {}", spec.name);
    }
    let mut whole: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for ((name, begin), bytes) in parts {
        let tensor = whole.entry(name.to_owned()).or_default();
        let spec = ranks.iter().flatten().map(|(spec, _)| spec).find(|spec| spec.name == name).unwrap();
        assert_eq!(tensor.len() as u64, begin * spec.dtype.size(), "{name} has gaps");
        tensor.extend(bytes);
    }
    whole
}

/// The files of a save: weights whole, in a file of their own; the rest in a file of each rank.
pub fn files(ranks: &[Held]) -> Vec<Bytes> {
    let all = together(ranks);
    let mut seen = std::collections::HashSet::new();
    let mut first = |spec: &TensorSpec| seen.insert((spec.name.clone(), spec.part.map(|part| part.begin)));
    let weights: BTreeMap<&str, &TensorSpec> = ranks
        .iter()
        .flatten()
        .filter(|(spec, _)| spec.kind == ShardKind::Model)
        .map(|(spec, _)| (spec.name.as_str(), spec))
        .collect();
    let weights =
        weights.into_iter().map(|(name, spec)| (name.to_owned(), spec.dtype, spec.shape.clone(), &*all[name]));
    let mut files = vec![file(weights.collect())];
    for rank in ranks {
        let rest = rank.iter().filter(|(spec, _)| spec.kind != ShardKind::Model && first(spec));
        let rest = rest.map(|(spec, bytes)| (spec.stored_name(), spec.dtype, spec.stored_shape(), bytes.as_slice()));
        let rest: Vec<_> = rest.collect();
        if !rest.is_empty() {
            files.push(file(rest));
        }
    }
    files
}

fn file(tensors: Vec<(String, header::Dtype, Vec<u64>, &[u8])>) -> Bytes {
    let names = tensors.iter().map(|(name, dtype, shape, _)| (name.as_str(), *dtype, shape.as_slice()));
    let mut file = header::write(names).unwrap();
    tensors.iter().for_each(|(.., bytes)| file.extend(*bytes));
    file.into()
}
