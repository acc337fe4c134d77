//! Parameters whose values are kept in a copy of another type than their gradients.
//!
//! Autograd and the reducer know the *leaf*: its gradient is fp32; its own values are never read, so it needs no memory
//! ([`leaf_like`]). Its *copy*, say in bf16, is used for computing. The arithmetic equals that of an fp32 leaf that is
//! cast where it is used: gradients arrive in the copy's type, become fp32, and are added up in fp32.

use std::ptr;

use tch::{Device, Kind, Tensor};

use super::{
    Result,
    ffi::{self, check},
    tch_result,
};

/// A leaf for a copy: fp32, of its extents and device, requiring a gradient, with the memory of one element.
pub fn leaf_like(copy: &Tensor) -> Result<Tensor> {
    bare_leaf(&copy.size(), copy.device())
}

/// A leaf that has extents and no values: fp32, requiring a gradient, with the memory of one element.
pub fn bare_leaf(extents: &[i64], device: Device) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let made = Tensor::f_zeros([1], (Kind::Float, device))
        .and_then(|one| one.f_expand(extents, false)?.f_detach()?.f_set_requires_grad(true));
    tch_result("make a leaf", made)
}

/// The copy's values. Their gradient becomes fp32 and goes to `leaf`, which has the copy's extents.
pub fn copy_at_use(leaf: &Tensor, copy: &Tensor) -> Result<Tensor> {
    let mut out = ptr::null_mut();
    // SAFETY: pointers are valid for the call; the shim compares the extents.
    check("use a copy", unsafe { ffi::trn_copy_at_use(ffi::raw(leaf), ffi::raw(copy), &mut out) })?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    Ok(unsafe { ffi::adopt(out) })
}

/// The copy's rows that `tokens` (i64) name: its extents are those of `tokens` and a row's. Gradients become fp32 and
/// are added up in the rows of `leaf`.
pub fn copy_lookup(leaf: &Tensor, copy: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    let mut out = ptr::null_mut();
    let status =
        // SAFETY: pointers are valid for the call; LibTorch checks the tokens.
        unsafe { ffi::trn_copy_lookup(ffi::raw(leaf), ffi::raw(copy), ffi::raw(tokens), &mut out) };
    check("look up rows of a copy", status)?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    Ok(unsafe { ffi::adopt(out) })
}

/// A tensor, and a gradient with respect to it that is known.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The tensor, which requires a gradient.
    pub of: &'a Tensor,
    /// The gradient, of the same extents.
    pub gradient: &'a Tensor,
}

/// `loss` as it is, with `gradient / divisor` as its gradient with respect to `hidden` and to `leaf`: for gradients
/// that are computed along with the loss. That of `hidden` may be of any floating type and arrives in the type of
/// `hidden`; that of `leaf` is fp32. Where `direct`, the latter is added to the leaf's gradient at once, if it has one.
pub fn with_gradients(
    loss: &Tensor,
    hidden: Option<Known<'_>>,
    leaf: Option<Known<'_>>,
    divisor: f64,
    direct: bool,
) -> Result<Tensor> {
    let raws = |known: Option<Known<'_>>| match known {
        Some(Known { of, gradient }) => (ffi::raw(of), ffi::raw(gradient)),
        None => (ptr::null(), ptr::null()),
    };
    let ((hidden, hidden_gradient), (leaf, leaf_gradient)) = (raws(hidden), raws(leaf));
    let mut out = ptr::null_mut();
    // SAFETY: pointers are null or valid for the call; the shim compares the extents.
    let status = unsafe {
        ffi::trn_with_gradients(
            ffi::raw(loss),
            hidden,
            hidden_gradient,
            leaf,
            leaf_gradient,
            divisor,
            direct.into(),
            &mut out,
        )
    };
    check("attach gradients", status)?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    Ok(unsafe { ffi::adopt(out) })
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn weight() -> Tensor {
        (Tensor::arange(7 * 16, F32) * 0.37).sin().view([7, 16])
    }

    fn floats(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap()
    }

    /// The same function of a parameter that is cast where it is used, and of a leaf with its copy.
    #[test]
    fn a_copy_computes_and_learns_as_a_cast_does_to_the_last_bit() {
        let tokens = Tensor::from_slice(&[3_i64, 0, 3, 6, 3, 5]);
        let run = |use_it: &dyn Fn() -> Tensor, look_up: &dyn Fn() -> Tensor| {
            let mixed = look_up().matmul(&use_it().tr()).tanh();
            let loss = mixed.to_kind(Kind::Float).square().mean(Kind::Float);
            // Twice: gradients of two passes are added up in fp32.
            (loss / 3.0).backward();
        };
        let cast = weight().set_requires_grad(true);
        let copy = weight().to_kind(Kind::BFloat16);
        let leaf = leaf_like(&copy).unwrap();
        for _ in 0..2 {
            run(&|| cast.to_kind(Kind::BFloat16), &|| {
                Tensor::embedding(&cast, &tokens, -1, false, false).to_kind(Kind::BFloat16)
            });
            run(&|| copy_at_use(&leaf, &copy).unwrap(), &|| copy_lookup(&leaf, &copy, &tokens).unwrap());
        }
        assert_eq!(leaf.grad().kind(), Kind::Float);
        assert_eq!(floats(&leaf.grad()), floats(&cast.grad()));
        assert!(floats(&leaf.grad()).iter().any(|&g| g != 0.0));
        assert_eq!(floats(&leaf), vec![0.0; 7 * 16], "the leaf itself holds nothing");
    }

    #[test]
    fn a_known_gradient_arrives_divided_and_scaled() {
        let leaf = leaf_like(&weight().to_kind(Kind::BFloat16)).unwrap();
        let other = Tensor::from(2.0_f32).set_requires_grad(true);
        let gradient = weight();
        let known = Some(Known { of: &leaf, gradient: &gradient });
        let loss = with_gradients(&other.square(), None, known, 5.0, false).unwrap();
        assert_eq!(f64::try_from(&loss).unwrap(), 4.0);
        (loss / 4.0).backward();
        assert_eq!(floats(&leaf.grad()), floats(&(weight() * Tensor::from(0.25_f32 / 5.0))));
        assert_eq!(f64::try_from(other.grad()).unwrap(), 1.0, "what the loss comes from learns, too");
        // Added in place, where the leaf has a gradient.
        let place = leaf.grad().data_ptr();
        let loss = with_gradients(&other.square(), None, known, 5.0, true).unwrap();
        (loss / 4.0).backward();
        assert_eq!(leaf.grad().data_ptr(), place);
        assert_eq!(floats(&leaf.grad()), floats(&(weight() * Tensor::from(0.25_f32 / 5.0) * 2.0)));
    }

    #[test]
    fn a_known_gradient_of_any_type_is_rounded_once() {
        let hidden = weight().to_kind(Kind::BFloat16).set_requires_grad(true);
        let gradient = (weight() * 1e30).to_kind(Kind::BFloat16);
        let known = Some(Known { of: &hidden, gradient: &gradient });
        let loss = with_gradients(&Tensor::from(2.0_f32), known, None, 3.0, false).unwrap();
        (loss * 0.7).backward();
        let factor = Tensor::from(0.7_f32) / 3.0;
        let expected = (gradient.to_kind(Kind::Float) * factor).to_kind(Kind::BFloat16);
        assert_eq!((hidden.grad().kind(), floats(&hidden.grad())), (Kind::BFloat16, floats(&expected)));
    }

    #[test]
    fn without_recording_no_gradients_are_kept() {
        let copy = weight().to_kind(Kind::BFloat16);
        let leaf = leaf_like(&copy).unwrap();
        assert!(copy_at_use(&leaf, &copy).unwrap().requires_grad());
        assert!(!tch::no_grad(|| copy_at_use(&leaf, &copy).unwrap()).requires_grad());
        let other = leaf_like(&copy.narrow(0, 0, 3)).unwrap();
        assert!(copy_at_use(&other, &copy).is_err(), "other extents");
        let gradient = weight();
        let known = Some(Known { of: &other, gradient: &gradient });
        assert!(with_gradients(&Tensor::from(1.0_f32), None, known, 1.0, false).is_err(), "other extents");
        assert!(with_gradients(&Tensor::from(1.0_f32), known, None, 1.0, false).is_err(), "other extents");
    }
}
