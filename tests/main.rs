//! The whole product, from outside: the built binary, real processes, real stores, real faults.
mod support;

mod crash;
mod damage;
mod harness;
mod input;
mod interruption;
mod outputs;
mod rules;
mod writers;
