//! The bytes of tensors in the host's memory, as LibTorch's allocator hands them out: for measurements, in a process of
//! their own. Blocks of other libraries (threads, connections, work space of matrix products) are not tensors.

use super::{
    Result,
    ffi::{self, check},
};

/// Bytes of the tensors that were made since the count began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Those that are there now.
    pub now: u64,
    /// The most at any time.
    pub peak: u64,
}

/// Counts the bytes of tensors from here on. Call it before any other thread makes one.
pub fn count_tensors() -> Result<()> {
    // SAFETY: takes nothing; the shim's allocator lives as long as the process.
    check("count tensors", unsafe { ffi::trn_count_memory() })
}

/// The count. The peak begins anew.
pub fn counted() -> Result<Counted> {
    let mut counted = Counted { now: 0, peak: 0 };
    // SAFETY: pointers are valid for the call.
    check("count tensors", unsafe { ffi::trn_counted_memory(&mut counted.now, &mut counted.peak, 1) })?;
    Ok(counted)
}
