//! Which tensors an export writes, from where, as what, and into which file.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
};

use super::input::Input;
use crate::{
    checkpoint::CheckpointError,
    format::{
        convert,
        header::{self, Dtype},
        slices,
    },
    layout,
};

/// Consecutive elements of a tensor, in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// Index of the file.
    pub input: usize,
    /// Its bytes there.
    pub range: Range<u64>,
    /// The first element.
    pub begin: u64,
}

/// A tensor of the export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    pub name: String,
    pub shape: Vec<u64>,
    /// The type that it is read in.
    pub stored: Dtype,
    /// The type that it is written in.
    pub written: Dtype,
    pub extents: Vec<Extent>,
    /// First byte in its file, once it has one.
    pub at: u64,
}

impl Planned {
    /// Bytes in its file. The sizes of a plan's tensors fit 64 bits: each has been read from a header.
    pub(super) fn bytes(&self) -> u64 {
        self.written.bytes(&self.shape).unwrap_or(u64::MAX)
    }

    /// Elements.
    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// A file of the export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Output {
    pub name: String,
    pub header: Vec<u8>,
    /// Its length.
    pub bytes: u64,
    pub tensors: Vec<Planned>,
}

/// Where the values of an export's tensors came from, for whoever asked for another type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    /// Tensors taken from the fp32 values beside rounded ones.
    pub masters: usize,
    /// Tensors without fp32 values, written in fp32: the values are those of their 16 bits.
    pub widened: usize,
    /// Tensors rounded to fewer bits.
    pub rounded: usize,
}

impl Origins {
    fn count(&mut self, stored: Dtype, written: Dtype) {
        self.widened += usize::from(stored.size() < written.size());
        self.rounded += usize::from(stored.size() > written.size());
    }
}

/// All tensors of `inputs`, as `asked`. `masters`: the indices of files of moments, behind those of weights; they may
/// hold weights in fp32.
pub(super) fn of_files(
    inputs: &[Input],
    masters: Range<usize>,
    asked: Option<Dtype>,
) -> Result<(Vec<Planned>, Origins), CheckpointError> {
    let mut origins = Origins::default();
    let mut fp32 = if asked == Some(Dtype::F32) { masters_of(inputs, masters.clone())? } else { HashMap::new() };
    let mut tensors: BTreeMap<&str, Planned> = BTreeMap::new();
    for (index, input) in inputs.iter().enumerate().take(masters.start) {
        for tensor in &input.tensors {
            let Some(stored) = Dtype::of_name(&tensor.dtype) else {
                let reason = format!("tensor {:?} has elements of type {:?}", tensor.name, tensor.dtype);
                return Err(CheckpointError::damaged(input.key(), reason));
            };
            let written = asked.filter(|&asked| convert::can(stored, asked)).unwrap_or(stored);
            let mut planned = Planned {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                stored,
                written,
                extents: vec![Extent { input: index, range: tensor.range.clone(), begin: 0 }],
                at: 0,
            };
            if stored != written
                && let Some(extents) = fp32.remove(tensor.name.as_str())
            {
                let elements = planned.elements();
                let parts = extents.iter().map(|it| it.begin..it.begin + (it.range.end - it.range.start) / 4);
                if let Err(reason) = slices::check_cover(parts, elements) {
                    let reason = format!("tensor {:?} {reason}", format!("{}{}", layout::MASTER, tensor.name));
                    return Err(CheckpointError::damaged(inputs[extents[0].input].key(), reason));
                }
                (planned.stored, planned.extents) = (written, extents);
                origins.masters += 1;
            }
            origins.count(planned.stored, written);
            if tensors.insert(&tensor.name, planned).is_some() {
                let reason = format!("two shards have tensor {:?}", tensor.name);
                return Err(CheckpointError::damaged(input.key(), reason));
            }
        }
    }
    Ok((tensors.into_values().collect(), origins))
}

/// The fp32 values of weights that are stored rounded, by the weight's name.
fn masters_of(inputs: &[Input], masters: Range<usize>) -> Result<HashMap<&str, Vec<Extent>>, CheckpointError> {
    let mut found: HashMap<&str, Vec<Extent>> = HashMap::new();
    for (index, input) in inputs.iter().enumerate().take(masters.end).skip(masters.start) {
        for tensor in &input.tensors {
            let Some(name) = tensor.name.strip_prefix(layout::MASTER) else { continue };
            if Dtype::of_name(&tensor.dtype) != Some(Dtype::F32) {
                let reason = format!("tensor {:?} has elements of type {:?}", tensor.name, tensor.dtype);
                return Err(CheckpointError::damaged(input.key(), reason));
            }
            let (name, slice) = slices::parse_name(name);
            let begin = slice.map_or(0, |slice| slice.start);
            found.entry(name).or_default().push(Extent { input: index, range: tensor.range.clone(), begin });
        }
    }
    Ok(found)
}

/// The tensors of these names and extents among those of `inputs`, which may have others, in the type `asked`.
pub(super) fn of_model(
    inputs: &[Input],
    wanted: &[(String, Vec<u64>)],
    asked: Dtype,
) -> Result<(Vec<Planned>, Origins), CheckpointError> {
    let mut origins = Origins::default();
    let mut found = HashMap::new();
    for (index, input) in inputs.iter().enumerate() {
        found.extend(input.tensors.iter().map(|tensor| (tensor.name.as_str(), (index, tensor))));
    }
    let mut tensors = Vec::with_capacity(wanted.len());
    for (name, shape) in wanted {
        let same = found.get(name.as_str()).filter(|(_, tensor)| tensor.shape == *shape);
        let stored = same.and_then(|(_, tensor)| Dtype::of_name(&tensor.dtype));
        let (Some((index, tensor)), Some(stored)) = (same, stored.filter(|&stored| convert::can(stored, asked))) else {
            let key = inputs.first().map(Input::key).unwrap_or_default();
            return Err(CheckpointError::damaged(key, format!("no file has a tensor {name:?} of shape {shape:?}")));
        };
        origins.count(stored, asked);
        let extents = vec![Extent { input: *index, range: tensor.range.clone(), begin: 0 }];
        let shape = shape.clone();
        tensors.push(Planned { name: name.clone(), shape, stored, written: asked, extents, at: 0 });
    }
    Ok((tensors, origins))
}

/// Lays tensors out in files of at most `max` bytes of tensors each; one that is longer has a file of its own. `whole`
/// is the name of the file if one is enough; several are numbered.
pub(super) fn lay_out(mut tensors: Vec<Planned>, max: u64, whole: &str) -> Result<Vec<Output>, CheckpointError> {
    tensors.sort_by(|a, b| header::file_order((a.written, &a.name), (b.written, &b.name)));
    let mut files: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut size = 0_u64;
    for tensor in tensors {
        let bytes = tensor.bytes();
        let longer = size.saturating_add(bytes);
        match files.last_mut() {
            Some(file) if file.is_empty() || longer <= max => {
                file.push(tensor);
                size = longer;
            }
            _ => {
                files.push(vec![tensor]);
                size = bytes;
            }
        }
    }
    let count = files.len();
    let stem = whole.strip_suffix(layout::SAFETENSORS).unwrap_or(whole);
    let output = |(number, mut tensors): (usize, Vec<Planned>)| {
        let entries = tensors.iter().map(|it| (it.name.as_str(), it.written, it.shape.as_slice()));
        let header = header::write(entries).ok_or(CheckpointError::TooLarge { bytes: u64::MAX, files: count })?;
        let mut bytes = header.len() as u64;
        for tensor in &mut tensors {
            tensor.at = bytes;
            bytes = bytes.saturating_add(tensor.bytes());
        }
        let several = format!("{stem}-{:05}-of-{count:05}{}", number + 1, layout::SAFETENSORS);
        let name = if count == 1 { whole.to_owned() } else { several };
        Ok(Output { name, header, bytes, tensors })
    };
    files.into_iter().enumerate().map(output).collect()
}

/// The index of several files, as transformers writes and reads it.
pub(super) fn index(files: &[Output]) -> serde_json::Value {
    let tensors = || files.iter().flat_map(|file| file.tensors.iter().map(|tensor| (tensor, file.name.as_str())));
    let weight_map: BTreeMap<&str, &str> = tensors().map(|(tensor, file)| (tensor.name.as_str(), file)).collect();
    let total_size: u64 = tensors().map(|(tensor, _)| tensor.bytes()).sum();
    let total_parameters: u64 = tensors().map(|(tensor, _)| tensor.elements()).sum();
    let metadata = serde_json::json!({ "total_parameters": total_parameters, "total_size": total_size });
    serde_json::json!({ "metadata": metadata, "weight_map": weight_map })
}

/// The one type of all weights, as descriptions name it; `None`: they have several.
pub(super) fn type_name(files: &[Output]) -> Option<&'static str> {
    let types: BTreeSet<&str> =
        files.iter().flat_map(|file| &file.tensors).map(|tensor| tensor.written.name()).collect();
    let name = |dtype: &str| match Dtype::of_name(dtype)? {
        Dtype::F32 => Some("float32"),
        Dtype::BF16 => Some("bfloat16"),
        Dtype::F16 => Some("float16"),
        Dtype::I64 => None,
    };
    match types.into_iter().collect::<Vec<_>>().as_slice() {
        [one] => name(one),
        _ => None,
    }
}
