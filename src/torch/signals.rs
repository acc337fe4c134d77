//! Signals that are blocked before `main` (`shim/signals.cpp`).

use super::ffi;

/// Unblocks them for this thread, and those that it starts from here on: the caller must have handlers for them. A
/// signal mask inherited from the parent process is cleared with it.
pub fn release_signals() {
    // SAFETY: it changes the mask of the calling thread and touches nothing else.
    unsafe { ffi::trn_release_signals() }
}
