//! One file of an export, filled from the files that are read.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{StreamExt, TryStreamExt, stream};

use super::{
    Change,
    folder::io,
    input::Input,
    plan::{Output, Planned},
};
use crate::{
    checkpoint::{CheckpointError, restore::IN_FLIGHT},
    format::{convert, header::Dtype},
};

/// The place in which a file grows.
pub(super) enum Sink {
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
                let place = place.ok_or_else(|| CheckpointError::Internal("an export's file is too long".into()))?;
                place.copy_from_slice(bytes);
                Ok(())
            }
        }
    }
}

/// Elements that go from a read into the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// First byte in the file that is read.
    from: u64,
    /// Bytes there.
    len: u64,
    stored: Dtype,
    written: Dtype,
    /// First byte in the file that grows.
    to: u64,
}

/// What one request reads: parts that follow one another in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Request {
    input: usize,
    parts: Vec<Part>,
}

/// Cuts the tensors' bytes into requests of at most `part` bytes each, of whole elements.
fn requests<'a>(tensors: impl Iterator<Item = &'a Planned>, part: u64) -> Vec<Request> {
    let mut parts: Vec<(usize, Part)> = Vec::new();
    for Planned { stored, written, extents, at, .. } in tensors {
        for extent in extents {
            let to = at + extent.begin * written.size();
            let len = extent.range.end - extent.range.start;
            let part = Part { from: extent.range.start, len, stored: *stored, written: *written, to };
            parts.push((extent.input, part));
        }
    }
    parts.sort_unstable_by_key(|(input, part)| (*input, part.from));
    // A multiple of every element's size.
    let most = (part / 8 * 8).max(8);
    let mut requests: Vec<Request> = Vec::new();
    let mut room = 0;
    for (input, mut rest) in parts {
        while rest.len > 0 {
            let follows = requests.last().is_some_and(|last| {
                last.input == input && last.parts.last().is_some_and(|part| part.from + part.len == rest.from)
            });
            let size = rest.stored.size();
            if !follows || room < size {
                requests.push(Request { input, parts: Vec::new() });
                room = most;
            }
            let len = rest.len.min(room / size * size);
            room -= len;
            let to = rest.to + len / size * rest.written.size();
            // There is one: the first part begins it.
            requests.last_mut().into_iter().for_each(|last| last.parts.push(Part { len, ..rest }));
            rest = Part { from: rest.from + len, len: rest.len - len, to, ..rest };
        }
    }
    requests
}

/// Reads everything that `output` holds, and writes it into `sink`. `progress` receives the bytes read.
pub(super) async fn fill(
    inputs: &[Input],
    output: &Output,
    sink: &Arc<Sink>,
    change: Option<&Arc<dyn Change>>,
    part: u64,
    progress: &(impl Fn(u64) + Send + Sync),
) -> Result<(), CheckpointError> {
    sink.write_at(&output.header, 0)?;
    let changes = |tensor: &&Planned| change.is_some_and(|change| change.concerns(&tensor.name));
    let as_they_are = requests(output.tensors.iter().filter(|tensor| !changes(tensor)), part);
    copy(inputs, as_they_are, sink, progress).await?;
    let Some(change) = change else { return Ok(()) };
    // One at a time: each is in memory, whole.
    for tensor in output.tensors.iter().filter(changes) {
        let bytes = Arc::new(Sink::Memory(Mutex::new(vec![0; memory(tensor.stored, &tensor.shape)?])));
        let stored = Planned { written: tensor.stored, at: 0, ..tensor.clone() };
        copy(inputs, requests(std::iter::once(&stored), part), &bytes, progress).await?;
        let (change, sink, tensor) = (change.clone(), sink.clone(), tensor.clone());
        let working = tokio::task::spawn_blocking(move || {
            let bytes = taken(bytes)?;
            let Planned { name, shape, stored, written, at, .. } = tensor;
            let changed = change.apply(&name, &shape, &bytes, stored, written);
            let changed = changed.map_err(|reason| CheckpointError::Internal(format!("change {name}: {reason}")))?;
            sink.write_at(&changed, at)
        });
        working.await.map_err(|error| CheckpointError::Internal(format!("change weights: {error}")))??;
    }
    Ok(())
}

/// Reads what is requested, and writes it into `sink`.
async fn copy(
    inputs: &[Input],
    requests: Vec<Request>,
    sink: &Arc<Sink>,
    progress: &(impl Fn(u64) + Send + Sync),
) -> Result<(), CheckpointError> {
    let copies = requests.into_iter().map(|Request { input, parts }| {
        let (sink, from) = (sink.clone(), parts.first().map_or(0, |part| part.from));
        let end = parts.last().map_or(from, |part| part.from + part.len);
        let copy = move |bytes: &[u8]| {
            for Part { from: at, len, stored, written, to } in parts {
                // All parts lie within the bytes that came.
                let bytes = &bytes[(at - from) as usize..(at - from + len) as usize];
                match stored == written {
                    true => sink.write_at(bytes, to)?,
                    false => sink.write_at(&converted(bytes, stored, written)?, to)?,
                }
            }
            Ok(())
        };
        async move {
            inputs[input].read(from..end, copy).await?;
            progress(end - from);
            Ok::<_, CheckpointError>(())
        }
    });
    stream::iter(copies).buffer_unordered(IN_FLIGHT).try_collect::<()>().await
}

fn memory(dtype: Dtype, shape: &[u64]) -> Result<usize, CheckpointError> {
    let bytes = dtype.bytes(shape).unwrap_or(u64::MAX);
    usize::try_from(bytes).map_err(|_| CheckpointError::TooLarge { bytes, files: 1 })
}

fn converted(bytes: &[u8], stored: Dtype, written: Dtype) -> Result<Vec<u8>, CheckpointError> {
    let none = || CheckpointError::Internal(format!("{} can't become {}", stored.name(), written.name()));
    convert::convert(bytes, stored, written).ok_or_else(none)
}

/// The bytes of a file that grew in memory.
pub(super) fn taken(sink: Arc<Sink>) -> Result<Vec<u8>, CheckpointError> {
    match Arc::into_inner(sink) {
        Some(Sink::Memory(bytes)) => Ok(bytes.into_inner().unwrap_or_else(PoisonError::into_inner)),
        _ => Err(CheckpointError::Internal("a file of the export is still being written".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::export::plan::Extent;

    #[test]
    fn requests_hold_whole_elements_and_every_one_once() {
        let tensor = |stored: Dtype, written: Dtype, extents: &[(usize, u64, u64, u64)], at| Planned {
            name: "x".into(),
            shape: vec![],
            stored,
            written,
            extents: extents
                .iter()
                .map(|&(input, start, end, begin)| Extent { input, range: start..end, begin })
                .collect(),
            at,
        };
        let tensors = [
            tensor(Dtype::F32, Dtype::BF16, &[(0, 64, 84, 3), (1, 100, 112, 0)], 1000),
            tensor(Dtype::BF16, Dtype::BF16, &[(0, 84, 90, 0)], 2000),
            tensor(Dtype::I64, Dtype::I64, &[(0, 90, 106, 0)], 3000),
        ];
        for part in [0, 7, 8, 11, 16, 1000] {
            let requests = requests(tensors.iter(), part);
            let mut moved = Vec::new();
            for Request { input, parts } in &requests {
                let len: u64 = parts.iter().map(|part| part.len).sum();
                assert!(len <= part.max(8), "{len} bytes for {part}");
                assert!(parts.windows(2).all(|pair| pair[0].from + pair[0].len == pair[1].from));
                for it in parts {
                    assert_eq!(it.len % it.stored.size(), 0);
                    let elements = it.len / it.stored.size();
                    moved.extend(
                        (0..elements).map(|n| (*input, it.from + n * it.stored.size(), it.to + n * it.written.size())),
                    );
                }
            }
            let mut expected: Vec<(usize, u64, u64)> = (0..5).map(|n| (0, 64 + 4 * n, 1006 + 2 * n)).collect();
            expected.extend((0..3).map(|n| (0, 84 + 2 * n, 2000 + 2 * n)));
            expected.extend((0..2).map(|n| (0, 90 + 8 * n, 3000 + 8 * n)));
            expected.extend((0..3).map(|n| (1, 100 + 4 * n, 1000 + 2 * n)));
            assert_eq!(moved, expected, "{part}");
            assert_eq!(requests.len() == 2, part == 1000, "{part}");
        }
    }
}
