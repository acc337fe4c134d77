//! The documents in the rows of a batch, and the positions whose next token counts.
//!
//! A row of T tokens may hold several documents. Attention and rotary positions then stay within each of them: no
//! vector of one document depends on another's tokens, and a document has the vectors that it has in a row of its own,
//! up to rounding. A batch of rows with one document each costs nothing more than before, and has the bits of before.
//!
//! Documents are computed one after the other, each with plain causal attention, on a GPU too: LibTorch's
//! variable-length flash attention is not among the functions that `tch` offers.
//!
//! Invariants: documents cover their row without gap or overlap; rows with a target are ascending and within the batch.
//! Both are checked where they come in.

use tch::{Device, TchError, Tensor};

use super::{Doing, ModelError};

/// The documents in the rows of a batch.
#[derive(Debug, Default)]
pub struct Spans {
    /// Begin and length of each document, in the rows put one after the other.
    documents: Vec<(i64, i64)>,
    /// The place of each token in its document.
    places: Vec<i64>,
    /// `None`: each row is one document.
    packed: Option<Packed>,
}

/// What a batch has in which at least one row holds several documents.
#[derive(Debug)]
struct Packed {
    batch: i64,
    len: i64,
    /// [`Spans::places`] on the device: i64 `[batch · T]`.
    places: Tensor,
}

impl Spans {
    /// One document in each row.
    pub fn whole() -> Self {
        Self::default()
    }

    /// The documents of rows of `len` tokens, which begin at the places that `rows` lists for each row: ascending, the
    /// first at 0. Memory of an earlier batch is used again.
    ///
    /// # Errors
    /// [`ModelError::Input`] for a list that is no such list.
    pub fn set<'a>(
        &mut self,
        rows: impl IntoIterator<Item = &'a [u32]>,
        len: u32,
        device: Device,
    ) -> Result<(), ModelError> {
        self.documents.clear();
        self.places.clear();
        self.packed = None;
        let len = i64::from(len);
        let mut batch = 0;
        let mut several = false;
        for starts in rows {
            let mut ends = starts.iter().skip(1).map(|&start| i64::from(start)).chain([len]);
            let mut expected = 0;
            for (&start, end) in starts.iter().zip(&mut ends) {
                let start = i64::from(start);
                if start != expected || end <= start || end > len {
                    let reason = format!("of a row of {len} tokens begin at {starts:?}");
                    return Err(ModelError::Input { what: "documents", reason });
                }
                self.documents.push((batch * len + start, end - start));
                self.places.extend(0..end - start);
                expected = end;
            }
            if expected != len {
                let reason = format!("of a row of {len} tokens begin at {starts:?}");
                return Err(ModelError::Input { what: "documents", reason });
            }
            several |= starts.len() > 1;
            batch += 1;
        }
        if several {
            let places = Tensor::f_from_slice(&self.places).and_then(|places| upload(&places, device));
            self.packed = Some(Packed { batch, len, places: places.doing("move positions to the device")? });
        }
        Ok(())
    }

    /// Refuses vectors `[batch, T, width]` of another batch than the one that this describes.
    pub(super) fn check(&self, x: &Tensor) -> Result<(), ModelError> {
        match (&self.packed, x.size().as_slice()) {
            (Some(Packed { batch, len, .. }), shape) if shape.get(..2) != Some(&[*batch, *len]) => {
                let reason = format!("are those of {batch} rows of {len} tokens, the vectors have shape {shape:?}");
                Err(ModelError::Input { what: "documents", reason })
            }
            _ => Ok(()),
        }
    }

    /// The rows of `table` `[positions, 1, width]` for each token: `[T, 1, width]` if each row is one document, else
    /// `[batch, T, 1, width]`.
    pub(super) fn of_table(&self, table: &Tensor, len: i64) -> Result<Tensor, TchError> {
        match &self.packed {
            None => table.f_narrow(0, 0, len),
            Some(Packed { batch, len, places }) => table.f_index_select(0, places)?.f_view([*batch, *len, 1, -1]),
        }
    }

    /// `attend` for each document: from queries `[batch, T, heads, width]` and the keys and values, which may have
    /// fewer heads, to `[batch, T, heads, width]`. It gets one document, or all rows where each of them is one.
    pub(super) fn attend(
        &self,
        inputs: [&Tensor; 3],
        attend: impl Fn([&Tensor; 3]) -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        let Some(Packed { batch, len, .. }) = &self.packed else { return attend(inputs) };
        let row = |x: &Tensor| x.f_flatten(0, 1)?.f_unsqueeze(0);
        let [query, key, value] = [row(inputs[0])?, row(inputs[1])?, row(inputs[2])?];
        let mut mixed = Vec::with_capacity(self.documents.len());
        for &(start, len) in &self.documents {
            let document = |x: &Tensor| x.f_narrow(1, start, len);
            mixed.push(attend([&document(&query)?, &document(&key)?, &document(&value)?])?);
        }
        let mixed = Tensor::f_cat(&mixed, 1)?;
        let (_, _, heads, width) = mixed.size4()?;
        mixed.f_view([*batch, *len, heads, width])
    }
}

/// On the device, for what is computed there from here on.
fn upload(places: &Tensor, device: Device) -> Result<Tensor, TchError> {
    crate::torch::upload(places, device).map_err(|error| TchError::Torch(error.to_string()))
}

/// The next tokens of a batch, and the positions where they count.
#[derive(Debug)]
pub struct Targets {
    /// i64 `[batch, T]`; where no target is, any token.
    ids: Tensor,
    /// Positions with a target, in the rows put one after the other, on the device; `None`: all of them.
    rows: Option<Tensor>,
    /// How many there are.
    count: u64,
}

impl Targets {
    /// Every one of `ids`, i64 `[batch, T]`, is a target.
    pub fn all(ids: Tensor) -> Self {
        let count = ids.numel() as u64;
        Self { ids, rows: None, count }
    }

    /// Those of `ids`, i64 `[batch, T]`, at the positions `rows`: places in the rows put one after the other,
    /// ascending. There may be none.
    ///
    /// # Errors
    /// [`ModelError::Input`] for positions that are not ascending or not in the batch.
    pub fn at(ids: Tensor, rows: &[i64]) -> Result<Self, ModelError> {
        let all = ids.numel() as i64;
        let ascending = rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || rows.first().is_some_and(|&first| first < 0) || rows.last().is_some_and(|&last| last >= all) {
            let reason = format!("are not ascending places below {all}");
            return Err(ModelError::Input { what: "targets", reason });
        }
        if rows.len() as i64 == all {
            return Ok(Self::all(ids));
        }
        let places = Tensor::f_from_slice(rows).and_then(|places| upload(&places, ids.device()));
        let places = places.doing("move targets to the device")?;
        Ok(Self { ids, rows: Some(places), count: rows.len() as u64 })
    }

    /// How many targets there are.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Positions of the batch, with or without a target.
    pub(super) fn positions(&self) -> i64 {
        self.ids.numel() as i64
    }

    /// The targets alone, i64 `[count]`, and the positions where they are; `None`: at all of them.
    pub(super) fn selected(&self) -> Result<(Tensor, Option<&Tensor>), TchError> {
        let flat = self.ids.f_reshape(-1)?;
        match &self.rows {
            None => Ok((flat, None)),
            Some(rows) => Ok((flat.f_index_select(0, rows)?, Some(rows))),
        }
    }
}

/// The tokens of one forward pass.
#[derive(Debug)]
pub struct Batch {
    /// i64 `[batch, T]` on the model's device, each below its vocabulary's size. That is not checked here: on a GPU it
    /// would cost a synchronisation.
    pub inputs: Tensor,
    /// The tokens that follow.
    pub targets: Targets,
    /// The documents.
    pub spans: Spans,
}

impl Batch {
    /// From i64 `tokens` `[batch, T + 1]`: each row is one document, and every token but its first is a target.
    pub fn plain(tokens: &Tensor) -> Result<Self, ModelError> {
        let (inputs, next) = split(tokens)?;
        Ok(Self { inputs, targets: Targets::all(next), spans: Spans::whole() })
    }

    /// From i64 `tokens` `[batch, T + 1]`, with targets at the positions `rows` alone: see [`Targets::at`].
    pub fn marked(tokens: &Tensor, rows: &[i64], spans: Spans) -> Result<Self, ModelError> {
        let (inputs, next) = split(tokens)?;
        Ok(Self { inputs, targets: Targets::at(next, rows)?, spans })
    }
}

/// The tokens that a model reads, and those that follow each of them: two views `[batch, T]`.
fn split(tokens: &Tensor) -> Result<(Tensor, Tensor), ModelError> {
    let shape = tokens.size();
    let len = match shape.as_slice() {
        &[_, len] if len >= 2 => len - 1,
        _ => {
            let reason = format!("have shape {shape:?}, not [batch, T + 1]");
            return Err(ModelError::Input { what: "tokens", reason });
        }
    };
    let part = |from| tokens.f_narrow(1, from, len).doing("slice tokens");
    Ok((part(0)?, part(1)?))
}
