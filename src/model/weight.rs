//! One parameter as a model uses it.

use tch::{Kind, TchError, Tensor};

use crate::torch;

/// A leaf that receives the gradient, and the values used for computing.
#[derive(Debug)]
pub struct Weight {
    /// fp32, requires a gradient. Holds the values if there is no copy.
    pub leaf: Tensor,
    /// The values, in the type used for computing, of the leaf's extents; the leaf is then one of [`torch::leaf_like`],
    /// whose own values are never read.
    pub copy: Option<Tensor>,
}

impl Weight {
    /// Another handle to the same parameter.
    pub(super) fn share(&self) -> Self {
        Self { leaf: self.leaf.shallow_clone(), copy: self.copy.as_ref().map(Tensor::shallow_clone) }
    }

    /// Its values as `kind`. Where gradients are recorded the cast is, too: they come back in fp32.
    pub(super) fn at_use(&self, kind: Kind) -> Result<Tensor, TchError> {
        match &self.copy {
            Some(copy) => torch::copy_at_use(&self.leaf, copy).map_err(refused)?.f_to_kind(kind),
            None => self.leaf.f_to_kind(kind),
        }
    }

    /// The rows selected by `tokens` (i64), as `kind`.
    pub(super) fn look_up(&self, tokens: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
        match &self.copy {
            Some(copy) => torch::copy_lookup(&self.leaf, copy, tokens).map_err(refused)?.f_to_kind(kind),
            None => Tensor::f_embedding(&self.leaf, tokens, -1, false, false)?.f_to_kind(kind),
        }
    }

    /// `loss`, with `gradient / divisor` as its gradient with respect to this parameter.
    pub(super) fn with_gradient(&self, loss: &Tensor, gradient: &Tensor, divisor: f64) -> Result<Tensor, TchError> {
        torch::with_gradient(loss, &self.leaf, gradient, divisor).map_err(refused)
    }
}

/// A model's arithmetic has one type of error, that of `tch`.
fn refused(error: torch::TorchError) -> TchError {
    TchError::Torch(error.to_string())
}
