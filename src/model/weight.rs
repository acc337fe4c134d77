//! One parameter: its name, its values, where its gradient goes, and the stage of the model that uses it.

use tch::{Kind, TchError, Tensor};

use crate::torch::{self, Known};

/// One parameter of a model.
#[derive(Debug)]
pub struct Parameter {
    /// Its Hugging Face name.
    pub name: String,
    /// Its values.
    pub weight: Weight,
    /// The first stage that uses it.
    pub stage: Stage,
    /// Whether the head uses it as well: a token embedding that is the output layer, too.
    pub tied: bool,
}

impl Parameter {
    /// Whether `stage` reads it: what must be there before that stage can be computed.
    pub fn is_used_by(&self, stage: Stage) -> bool {
        self.stage == stage || (self.tied && stage == Stage::Head)
    }

    /// Whether it is part of a base, which is no part of the run's own state.
    pub fn is_base(&self) -> bool {
        matches!(self.weight, Weight::Base(_))
    }

    /// The leaf that receives its gradient; `None`: it is frozen.
    pub fn leaf(&self) -> Option<&Tensor> {
        self.weight.leaf()
    }

    /// Its values.
    pub fn values(&self) -> &Tensor {
        self.weight.values()
    }
}

/// The stages of a forward pass, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Tokens to vectors.
    Embed,
    /// One block, from 0.
    Block(usize),
    /// Vectors to scores or a loss.
    Head,
}

/// A parameter's values, and where its gradient goes.
#[derive(Debug)]
pub enum Weight {
    /// An fp32 leaf, which holds the values and receives the gradient.
    Leaf(Tensor),
    /// Values in the type used for computing, apart from the leaf.
    Copy {
        /// Receives the gradient, in fp32: one of [`torch::leaf_like`], whose own values are never read.
        leaf: Tensor,
        /// The values, of the leaf's extents.
        copy: Tensor,
    },
    /// Values that no step changes, of any floating type. There is no gradient.
    Frozen(Tensor),
    /// The same, of a model that adapters are trained beside: they are read from its folder at every start, and no
    /// checkpoint holds them.
    Base(Tensor),
}

impl Weight {
    /// Another handle to the same parameter.
    pub fn share(&self) -> Self {
        match self {
            Self::Leaf(leaf) => Self::Leaf(leaf.shallow_clone()),
            Self::Copy { leaf, copy } => Self::Copy { leaf: leaf.shallow_clone(), copy: copy.shallow_clone() },
            Self::Frozen(values) => Self::Frozen(values.shallow_clone()),
            Self::Base(values) => Self::Base(values.shallow_clone()),
        }
    }

    /// The tensor that holds the values: writing into it (without recording gradients) changes the model.
    pub fn values(&self) -> &Tensor {
        match self {
            Self::Leaf(values) | Self::Copy { copy: values, .. } | Self::Frozen(values) | Self::Base(values) => values,
        }
    }

    /// The leaf that receives the gradient; `None`: it is frozen.
    pub fn leaf(&self) -> Option<&Tensor> {
        match self {
            Self::Leaf(leaf) | Self::Copy { leaf, .. } => Some(leaf),
            Self::Frozen(_) | Self::Base(_) => None,
        }
    }

    /// Whether all its tensors have these extents.
    pub(crate) fn has_extents(&self, extents: &[i64]) -> bool {
        self.values().size() == extents && self.leaf().is_none_or(|leaf| leaf.size() == extents)
    }

    /// Its values as `kind`. Where gradients are recorded the cast is, too: they come back in fp32.
    pub(crate) fn at_use(&self, kind: Kind) -> Result<Tensor, TchError> {
        match self {
            Self::Copy { leaf, copy } => torch::copy_at_use(leaf, copy).map_err(refused)?.f_to_kind(kind),
            Self::Leaf(values) | Self::Frozen(values) | Self::Base(values) => values.f_to_kind(kind),
        }
    }

    /// Its leaf, and its values without a gradient of their own, if these are of this `kind`: for a product whose
    /// gradient goes to the leaf by itself. `None`: it is frozen, or cast where it is used.
    pub(super) fn for_product(&self, kind: Kind) -> Result<Option<(&Tensor, Tensor)>, TchError> {
        Ok(match self {
            Self::Copy { leaf, copy } if copy.f_kind()? == kind => Some((leaf, copy.shallow_clone())),
            Self::Leaf(leaf) if leaf.f_kind()? == kind => Some((leaf, leaf.f_detach()?)),
            _ => None,
        })
    }

    /// The rows selected by `tokens` (i64), as `kind`.
    pub(super) fn look_up(&self, tokens: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
        match self {
            Self::Copy { leaf, copy } => torch::copy_lookup(leaf, copy, tokens).map_err(refused)?.f_to_kind(kind),
            Self::Leaf(values) | Self::Frozen(values) | Self::Base(values) => {
                Tensor::f_embedding(values, tokens, -1, false, false)?.f_to_kind(kind)
            }
        }
    }

    /// Whether what is computed from it now would have a gradient: it is trained, and gradients are recorded.
    pub(super) fn is_recorded(&self) -> Result<bool, TchError> {
        // The leaf itself requires a gradient even where none are recorded; a value computed from it does not.
        self.leaf().map_or(Ok(false), |leaf| Ok(leaf.f_view_as(leaf)?.requires_grad()))
    }

    /// `loss`, with `gradient / divisor` as its gradient with respect to this parameter, if there is one, and what
    /// `hidden` says as its gradient with respect to another tensor. `direct`: see [`torch::with_gradients`].
    pub(super) fn with_gradients(
        &self,
        loss: &Tensor,
        hidden: Option<Known<'_>>,
        gradient: Option<&Tensor>,
        divisor: f64,
        direct: bool,
    ) -> Result<Tensor, TchError> {
        let own = self.leaf().zip(gradient).map(|(of, gradient)| Known { of, gradient });
        if hidden.is_none() && own.is_none() {
            return Ok(loss.shallow_clone());
        }
        torch::with_gradients(loss, hidden, own, divisor, direct).map_err(refused)
    }
}

/// A model's arithmetic has one type of error, that of `tch`.
pub(super) fn refused(error: torch::TorchError) -> TchError {
    TchError::Torch(error.to_string())
}
