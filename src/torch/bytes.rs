//! Raw bytes of tensors, in and out, and host memory that a GPU copies to at full speed.
//!
//! Bytes are the elements in row-major order as they lie in memory: little-endian on every machine that LibTorch runs on.

use tch::Tensor;

use super::{
    Result, TorchError,
    ffi::{self, check},
};

fn checked_len(doing: &'static str, tensor: &Tensor, given: usize) -> Result<u64> {
    let (tensor, given) = (ffi::facts(doing, tensor)?.bytes, given as u64);
    if tensor == given { Ok(given) } else { Err(TorchError::Length { doing, tensor, given }) }
}

/// Bytes of a contiguous tensor.
pub fn byte_len(tensor: &Tensor) -> Result<usize> {
    let doing = "measure tensor";
    usize::try_from(ffi::facts(doing, tensor)?.bytes).map_err(|_| TorchError::Number { doing, what: "the size" })
}

/// Fills a contiguous tensor, on the CPU or a GPU, with exactly its number of bytes.
pub fn load_bytes(tensor: &Tensor, bytes: &[u8]) -> Result<()> {
    let doing = "load tensor";
    let len = checked_len(doing, tensor, bytes.len())?;
    // SAFETY: the tensor has `len` bytes, and so has the slice, which is only read.
    check(doing, unsafe { ffi::trn_tensor_load(ffi::raw(tensor), bytes.as_ptr().cast(), len) })
}

/// Copies a contiguous tensor, on the CPU or a GPU, into exactly its number of bytes.
pub fn store_bytes(tensor: &Tensor, bytes: &mut [u8]) -> Result<()> {
    let doing = "store tensor";
    let len = checked_len(doing, tensor, bytes.len())?;
    // SAFETY: the tensor has `len` bytes, and so has the slice.
    check(doing, unsafe { ffi::trn_tensor_store(ffi::raw(tensor), bytes.as_mut_ptr().cast(), len) })
}

/// Host memory whose pages a GPU may copy to and from by itself, for as long as this lives. Without CUDA the memory is
/// left as it is.
#[derive(Debug)]
pub struct Pinned<M: AsMut<[u8]>> {
    // Boxed, so that memory that lies within `M` itself stays where it was pinned.
    memory: Box<M>,
    start: Option<*mut u8>,
}

// SAFETY: the pointer is only an address to be given back to the driver, which may be done on any thread.
unsafe impl<M: AsMut<[u8]> + Send> Send for Pinned<M> {}

impl<M: AsMut<[u8]>> Pinned<M> {
    /// Pins `memory`.
    pub fn new(memory: M) -> Result<Self> {
        let mut memory = Box::new(memory);
        let bytes = (*memory).as_mut();
        if bytes.is_empty() {
            return Ok(Self { memory, start: None });
        }
        let (start, len) = (bytes.as_mut_ptr(), bytes.len() as u64);
        // SAFETY: the range is alive; pinning does not change its content.
        check("pin host memory", unsafe { ffi::trn_pin(start.cast(), len) })?;
        Ok(Self { memory, start: Some(start) })
    }
}

impl<M: AsMut<[u8]>> AsMut<[u8]> for Pinned<M> {
    fn as_mut(&mut self) -> &mut [u8] {
        (*self.memory).as_mut()
    }
}

impl<M: AsMut<[u8]>> Drop for Pinned<M> {
    fn drop(&mut self) {
        if let Some(start) = self.start {
            // SAFETY: pinned in `new` and unpinned once, before the memory is freed.
            unsafe { ffi::trn_unpin(start.cast()) };
        }
    }
}
