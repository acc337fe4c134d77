//! One rank's state captured in host memory at a step: its layout (`plan`), the shared memory that holds it (`image`),
//! the copy into it (`capture`), whether the loop waits for that copy (`mode`), and when to take one (`cadence`).
//!
//! Nothing here is stored. *Crash of a worker:* the image stays with the agent; a snapshot that a rank had not yet
//! captured is unusable, and the agent knows that from the missing `Captured`. *Crash of the agent:* the kernel frees
//! the images. *Retry:* a capture is never repeated; the next one is of a newer step. *Cancel:* a capture that has
//! begun runs to its end, because the optimizer waits for it.

pub mod cadence;
pub mod capture;
pub mod image;
pub mod mode;
pub mod plan;
