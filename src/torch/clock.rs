//! Moments of a step, on whichever device it is computed, and what a device says of itself.
//!
//! On a CPU a mark is the time at which it is made. On a GPU it is a point in the compute stream: making one costs a
//! microsecond and waits for nothing; the time between two is known once the device has passed the second.

use std::{ffi::CStr, ptr};

use tch::{Device, Tensor};

use super::{
    Result,
    ffi::{self, check},
};

/// A fixed number of marks.
#[derive(Debug)]
pub struct Clock {
    handle: *mut ffi::ClockHandle,
    count: usize,
}

impl Clock {
    /// With `count` marks, none of which is made yet.
    pub fn new(device: Device, count: usize) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        check("make a clock", unsafe { ffi::trn_clock_new(ffi::device_index(device)?, count, &mut handle) })?;
        Ok(Self { handle, count })
    }

    /// How many marks there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Makes a mark, again if it was made before.
    pub fn mark(&mut self, index: usize) -> Result<()> {
        // SAFETY: the clock is alive for the call; the shim checks the index.
        check("mark a moment", unsafe { ffi::trn_clock_mark(self.handle, index) })
    }

    /// Seconds from one mark to another that was made later. Waits until the device has passed the second.
    pub fn seconds(&self, from: usize, to: usize) -> Result<f64> {
        let mut seconds = 0.0;
        // SAFETY: pointers are valid for the call; the shim checks the indices.
        check("read a clock", unsafe { ffi::trn_clock_seconds(self.handle, from, to, &mut seconds) })?;
        Ok(seconds)
    }

    /// From here on backward passes tell this clock when gradients of these leaves arrive.
    pub fn follow(&mut self, leaves: &[Tensor]) -> Result<()> {
        let raws = ffi::raws(leaves);
        // SAFETY: pointers are valid for the call; the shim keeps what the leaves' hooks need.
        check("follow gradients", unsafe { ffi::trn_clock_follow(self.handle, raws.as_ptr(), raws.len()) })
    }

    /// Each gradient of a followed leaf that arrives from here on makes the mark `index` anew; `None`: none does.
    pub fn watch(&mut self, index: Option<usize>) -> Result<()> {
        // SAFETY: the clock is alive for the call.
        check("watch gradients", unsafe { ffi::trn_clock_watch(self.handle, index.unwrap_or(usize::MAX)) })
    }

    /// Whether a gradient has arrived since [`Clock::watch`].
    pub fn has_noted(&self) -> Result<bool> {
        let mut noted = 0;
        // SAFETY: pointers are valid for the call.
        check("watch gradients", unsafe { ffi::trn_clock_noted(self.handle, &mut noted) })?;
        Ok(noted != 0)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once.
        unsafe { ffi::trn_clock_free(self.handle) };
    }
}

/// Makes it an error that the host waits for a GPU in any operation of this process, or no longer. Without a GPU
/// nothing waits.
pub fn forbid_waits(on: bool) -> Result<()> {
    // SAFETY: takes a flag.
    check("forbid waits", unsafe { ffi::trn_forbid_waits(on.into()) })
}

/// Memory of a GPU, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DeviceMemory {
    /// The most that tensors have had at any time.
    pub allocated: u64,
    /// The most that LibTorch's allocator has taken from the device.
    pub reserved: u64,
    /// All of the device's.
    pub total: u64,
}

/// The memory of `device`; `None`: it is the CPU.
pub fn device_memory(device: Device) -> Result<Option<DeviceMemory>> {
    if device == Device::Cpu {
        return Ok(None);
    }
    let mut memory = DeviceMemory::default();
    // SAFETY: the pointer is valid for the call.
    check("measure device memory", unsafe { ffi::trn_device_memory(ffi::device_index(device)?, &mut memory) })?;
    Ok(Some(memory))
}

/// A GPU's name and its compute capability, such as 80 or 90.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// As the driver says it: `NVIDIA H200`.
    pub name: String,
    /// Ten times the major number, and the minor one.
    pub capability: u32,
}

/// The kind of `device`; `None`: it is the CPU.
pub fn device_kind(device: Device) -> Result<Option<DeviceKind>> {
    if device == Device::Cpu {
        return Ok(None);
    }
    let (mut name, mut capability) = ([0_u8; 256], 0);
    let index = ffi::device_index(device)?;
    // SAFETY: the buffer has the length that is named, and the other pointer is valid for the call.
    let status = unsafe { ffi::trn_device_name(index, name.as_mut_ptr().cast(), name.len(), &mut capability) };
    check("name the device", status)?;
    let name = CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned());
    Ok(Some(DeviceKind { name: name.unwrap_or_default(), capability: u32::try_from(capability).unwrap_or(0) }))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn marks_are_moments_in_the_order_in_which_they_were_made() {
        let mut clock = Clock::new(Device::Cpu, 3).unwrap();
        assert_eq!(clock.count(), 3);
        (0..3).for_each(|index| clock.mark(index).unwrap());
        let (whole, parts) = (clock.seconds(0, 2).unwrap(), [clock.seconds(0, 1), clock.seconds(1, 2)]);
        let parts: f64 = parts.into_iter().map(Result::unwrap).inspect(|part| assert!(*part >= 0.0)).sum();
        assert!(whole > 0.0 && (whole - parts).abs() < 1e-9, "{whole} {parts}");
        assert!(clock.mark(3).is_err() && clock.seconds(0, 3).is_err());
        assert_eq!((device_memory(Device::Cpu).unwrap(), device_kind(Device::Cpu).unwrap()), (None, None));
    }

    #[test]
    fn the_last_gradient_of_a_backward_pass_makes_the_watched_mark() {
        let leaf = || Tensor::ones([4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let (one, other) = (leaf(), leaf());
        let mut clock = Clock::new(Device::Cpu, 3).unwrap();
        clock.follow(&[one.shallow_clone()]).unwrap();
        let loss = || (&one + &other).square().sum(Kind::Float);
        loss().backward();
        assert!(!clock.has_noted().unwrap(), "nothing was watched");
        clock.watch(Some(1)).unwrap();
        clock.mark(0).unwrap();
        other.square().sum(Kind::Float).backward();
        assert!(!clock.has_noted().unwrap(), "this leaf is not followed");
        loss().backward();
        assert!(clock.has_noted().unwrap());
        clock.mark(2).unwrap();
        let [before, after] = [(0, 1), (1, 2)].map(|(from, to)| clock.seconds(from, to).unwrap());
        assert!(before > 0.0 && after > 0.0, "{before} {after}");
        clock.watch(None).unwrap();
        assert!(!clock.has_noted().unwrap());
        // A hook may outlive the clock.
        drop(clock);
        loss().backward();
        assert_eq!(Vec::<f32>::try_from(one.grad()).unwrap(), [12.0; 4]);
    }
}
