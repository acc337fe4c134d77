//! One rank's state frozen in host memory at a step: its layout (`plan`), the shared memory that holds it (`image`),
//! the copy into it (`capture`), whether the loop waits for that copy (`mode`), and when to take one (`cadence`).
pub mod cadence;
pub mod capture;
pub mod image;
pub mod mode;
pub mod plan;
