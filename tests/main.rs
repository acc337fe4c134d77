//! The whole product, from outside: the built binary, real processes, real stores, real faults.
mod support;
