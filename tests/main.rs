//! The whole product, from outside: the built binary, real processes, real stores, real faults.
mod support;

mod crash;
mod damage;
mod interruption;
mod writers;
