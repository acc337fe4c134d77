//! Raw bytes of tensors, in and out, and host memory that a GPU copies to at full speed.
//!
//! Bytes are the elements in row-major order as in memory: little-endian on every machine that LibTorch runs on.

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

/// Host memory at an address that stays.
///
/// # Safety
/// The range that [`Mapped::memory`] gives is the same at each call, and stays mapped while the value exists, also when
/// the value is moved.
pub unsafe trait Mapped {
    /// First byte and length.
    fn memory(&self) -> (*mut u8, usize);
}

/// Host memory whose pages a GPU may copy to and from by itself, while this value exists. Without CUDA the memory is
/// left as it is. Two of these in one process must not share a page.
#[derive(Debug)]
pub struct Pinned<M: Mapped> {
    memory: M,
    /// The beginnings of the pieces that are pinned.
    pieces: Vec<*mut u8>,
}

/// The longest piece of memory that is pinned at once: some drivers refuse to pin half a TiB by one call.
const PIECE: usize = 64 << 30;

// SAFETY: the pointers are only addresses to be given back to the driver, which may be done on any thread.
unsafe impl<M: Mapped + Send> Send for Pinned<M> {}

impl<M: Mapped> Pinned<M> {
    /// Pins `memory`. If the driver refuses, the memory is left as it is: copies to it work, and are slower.
    pub fn new(memory: M) -> Self {
        let (start, len) = memory.memory();
        let mut pinned = Self { memory, pieces: Vec::new() };
        for offset in (0..len).step_by(PIECE) {
            // SAFETY: the offset is within the range.
            let piece = unsafe { start.add(offset) };
            let bytes = (len - offset).min(PIECE) as u64;
            // SAFETY: the range is mapped; pinning does not change its content.
            if let Err(error) = check("pin host memory", unsafe { ffi::trn_pin(piece.cast(), bytes) }) {
                tracing::warn!(%error, bytes = len, "host memory is not pinned: copies of the state will be slower");
                pinned.unpin();
                break;
            }
            pinned.pieces.push(piece);
        }
        pinned
    }

    /// What is pinned.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    fn unpin(&mut self) {
        for start in self.pieces.drain(..) {
            // SAFETY: pinned in `new` and unpinned once, before the memory is unmapped.
            unsafe { ffi::trn_unpin(start.cast()) };
        }
    }
}

impl<M: Mapped> Drop for Pinned<M> {
    fn drop(&mut self) {
        self.unpin();
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn bytes_go_in_and_come_out_unchanged() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Int64] {
            let tensor = Tensor::zeros([3, 5], (kind, Device::Cpu)).set_requires_grad(kind == Kind::Float);
            let len = byte_len(&tensor).unwrap();
            // Starts at an odd address on purpose: a file's bytes lie anywhere.
            let bytes: Vec<u8> = (0..=len).map(|i| (i * 37) as u8).collect();
            load_bytes(&tensor, &bytes[1..]).unwrap();
            let mut back = vec![0; len];
            store_bytes(&tensor, &mut back).unwrap();
            assert_eq!(back, bytes[1..], "{kind:?}");
        }
        let scalar = Tensor::from(0.0_f32);
        load_bytes(&scalar, &1.5_f32.to_le_bytes()).unwrap();
        assert_eq!(f64::try_from(scalar).unwrap(), 1.5);
        load_bytes(&Tensor::zeros([0], (Kind::Float, Device::Cpu)), &[]).unwrap();
    }

    #[test]
    fn a_load_counts_as_a_change_of_the_tensor() {
        let weight = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let loss = weight.square().sum(Kind::Float);
        load_bytes(&weight, &[0; 8]).unwrap();
        assert!(loss.f_backward().is_err(), "autograd did not notice that a saved tensor was overwritten");
    }

    #[test]
    fn bytes_of_a_wrong_length_are_refused() {
        let tensor = Tensor::zeros([4, 2], (Kind::Float, Device::Cpu));
        for len in [0, 31, 33] {
            assert!(matches!(load_bytes(&tensor, &vec![0; len]), Err(TorchError::Length { tensor: 32, .. })));
            assert!(matches!(store_bytes(&tensor, &mut vec![0; len]), Err(TorchError::Length { tensor: 32, .. })));
        }
        let transposed = tensor.tr();
        assert!(matches!(load_bytes(&transposed, &[0; 32]), Err(TorchError::NotContiguous { .. })));
        assert!(matches!(byte_len(&transposed), Err(TorchError::NotContiguous { .. })));
        assert!(byte_len(&Tensor::new()).is_err(), "undefined");
        assert!(byte_len(&tensor.to_sparse_sparse_dim(1)).is_err(), "sparse");
    }

    struct Page(Box<[u8]>, *mut u8);

    impl Page {
        fn of(len: usize) -> Self {
            let mut memory = vec![7_u8; len].into_boxed_slice();
            let start = memory.as_mut_ptr();
            Self(memory, start)
        }
    }

    // SAFETY: a box's memory stays where it is.
    unsafe impl Mapped for Page {
        fn memory(&self) -> (*mut u8, usize) {
            (self.1, self.0.len())
        }
    }

    #[test]
    fn memory_can_be_pinned_and_pinned_again() {
        for len in [0, 4096, 4096] {
            let pinned = Pinned::new(Page::of(len));
            assert_eq!(pinned.memory().0.iter().filter(|byte| **byte == 7).count(), len, "its content stays");
        }
    }
}
