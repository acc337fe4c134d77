//! Signals that are held before `main` (`shim/signals.cpp`).

use super::ffi;

/// Gives them free for this thread, and those that it starts from here on: whoever calls this has handlers for them. A
/// mask that was inherited from whoever started this process goes with it.
pub fn release_signals() {
    // SAFETY: it changes the mask of the calling thread and touches nothing else.
    unsafe { ffi::trn_release_signals() }
}
