//! Small tensors to a device, and numbers back from it, without a host that waits.
//!
//! On the CPU all of it is immediate. On a GPU a copy to it is ordered before the kernels that are launched later, and
//! numbers come back beside the kernels: whoever reads them waits for exactly those before the point at which they were
//! asked for.

use std::ptr;

use tch::{Device, Tensor};

use super::{
    Result, TorchError,
    ffi::{self, check},
};

/// The values of `N` tensors of one element each, on their way to the host. It can be used again and again.
#[derive(Debug)]
pub struct Readback<const N: usize> {
    handle: *mut ffi::ReadbackHandle,
}

impl<const N: usize> Readback<N> {
    /// For tensors on `device`.
    pub fn new(device: Device) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        check("read numbers", unsafe { ffi::trn_readback_new(ffi::device_index(device)?, N, &mut handle) })?;
        Ok(Self { handle })
    }

    /// Asks for the values that these tensors have at this point of the device's work, of any floating-point type.
    pub fn start(&mut self, scalars: [&Tensor; N]) -> Result<()> {
        let raws = scalars.map(ffi::raw);
        // SAFETY: pointers are valid for the call; the shim checks the tensors.
        check("read numbers", unsafe { ffi::trn_readback_start(self.handle, raws.as_ptr(), N) })
    }

    /// The values that were asked for last; waits until they are there.
    pub fn wait(&self) -> Result<[f64; N]> {
        let mut values = [0.0; N];
        // SAFETY: there is room for `N` values, and the shim checks that it has as many.
        check("read numbers", unsafe { ffi::trn_readback_wait(self.handle, values.as_mut_ptr(), N) })?;
        Ok(values)
    }
}

impl<const N: usize> Drop for Readback<N> {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once.
        unsafe { ffi::trn_readback_free(self.handle) };
    }
}

/// `tensor`, which is on the CPU, in memory from which `device` reads by itself; as it is, if `device` is the CPU.
pub fn pinned(tensor: Tensor, device: Device) -> Result<Tensor> {
    if device == Device::Cpu {
        return Ok(tensor);
    }
    let mut out = ptr::null_mut();
    // SAFETY: pointers are valid for the call.
    check("pin a tensor", unsafe { ffi::trn_pinned(ffi::raw(&tensor), &mut out) })?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    Ok(unsafe { ffi::adopt(out) })
}

/// `tensor`, which is on the CPU, on `device`, before all work that is begun there later. The host does not wait for
/// the copy if it is [`pinned`]; otherwise it is pinned first, which copies it once more.
pub fn upload(tensor: &Tensor, device: Device) -> Result<Tensor> {
    if device == Device::Cpu {
        return Ok(tensor.shallow_clone());
    }
    let source = pinned(tensor.shallow_clone(), device)?;
    let mut out = ptr::null_mut();
    // SAFETY: pointers are valid for the call.
    let status = unsafe { ffi::trn_upload(ffi::raw(&source), ffi::device_index(device)?, &mut out) };
    check("move to the device", status)?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    Ok(unsafe { ffi::adopt(out) })
}

/// `loss` as it is, to the last bit, with its own gradient; if it is not finite, neither it nor that gradient is a
/// number, and nor is any gradient that comes from it. So a loss that only one rank has becomes a gradient that all of
/// them see.
pub fn telling(loss: &Tensor) -> Result<Tensor> {
    let one = |loss: Tensor| loss.f_mul_scalar(0.0)?.f_add_scalar(1.0);
    let telling = one(loss.detach()).and_then(|one| loss.f_mul(&one));
    telling.map_err(|error| TorchError::refused("tell a loss that is not finite", error.to_string()))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn numbers_come_back_as_they_were_when_they_were_asked_for() {
        let mut readback = Readback::<2>::new(Device::Cpu).unwrap();
        let mut norm = Tensor::from(f32::INFINITY);
        readback.start([&Tensor::from(0.1_f32), &norm]).unwrap();
        let _ = norm.fill_(1.0);
        assert_eq!(readback.wait().unwrap(), [f64::from(0.1_f32), f64::INFINITY]);
        readback.start([&Tensor::from(0.1_f64), &Tensor::from(f32::NAN)]).unwrap();
        let [exact, nan] = readback.wait().unwrap();
        assert!(exact == 0.1 && nan.is_nan());
        assert!(readback.start([&Tensor::zeros([2], (Kind::Float, Device::Cpu)), &norm]).is_err(), "two numbers");
        assert!(readback.start([&Tensor::new(), &norm]).is_err(), "undefined");
    }

    #[test]
    fn on_the_cpu_nothing_is_copied() {
        let tensor = Tensor::from_slice(&[1_i64, 2]);
        for same in [pinned(tensor.shallow_clone(), Device::Cpu).unwrap(), upload(&tensor, Device::Cpu).unwrap()] {
            assert_eq!(same.data_ptr(), tensor.data_ptr());
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_has_no_finite_gradient_and_every_other_one_keeps_its_bits() {
        for (value, scale) in [(0.1_f32, 3.0_f64), (-2.5e-30, 1.0), (0.0, 7.0), (3e38, 0.5)] {
            let weight = Tensor::from(value).set_requires_grad(true);
            let loss = telling(&(&weight * scale)).unwrap();
            assert_eq!(f32::try_from(&loss).unwrap().to_bits(), f32::try_from(&weight * scale).unwrap().to_bits());
            loss.backward();
            assert_eq!(f64::try_from(weight.grad()).unwrap(), scale, "{value}");
        }
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let weight = Tensor::from(1.0_f32).set_requires_grad(true);
            telling(&(&weight + Tensor::from(value))).unwrap().backward();
            assert!(f64::try_from(weight.grad()).unwrap().is_nan(), "{value}");
        }
    }
}
