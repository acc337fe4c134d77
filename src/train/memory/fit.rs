//! Which micro-batches fit an amount of memory.

use serde::Serialize;

use super::{Forecast, Setting};

/// What fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// The need of the setting as it is.
    pub forecast: Forecast,
    /// The largest micro-batch that fits, sequences; 0: not even one does.
    pub largest: u32,
    /// The bytes that one more sequence would need; `None`: a pass of all of a rank's sequences fits.
    pub beyond: Option<u64>,
}

/// Of micro-batches of at most `most` sequences, on a rank whose tensors have `amount` bytes.
pub fn fits(setting: &Setting<'_>, most: u32, amount: u64) -> Fit {
    let needs = |sequences| setting.with_sequences(sequences).forecast().bytes;
    // A pass over more sequences never needs less.
    let (mut fitting, mut failing) = (0, most.saturating_add(1));
    while failing - fitting > 1 {
        let middle = fitting + (failing - fitting) / 2;
        if needs(middle) <= amount {
            fitting = middle;
        } else {
            failing = middle;
        }
    }
    let beyond = (fitting < most).then(|| needs(fitting + 1));
    Fit { forecast: setting.forecast(), largest: fitting, beyond }
}
