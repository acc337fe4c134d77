//! The whole product, from outside: the built binary, real processes, real stores, real faults.
mod support;

mod boot;
mod crash;
mod damage;
mod doctor;
mod deadline;
mod formats;
mod harness;
mod input;
mod integrity;
mod interruption;
mod metadata;
mod notices;
mod outputs;
mod protocol_model;
mod protocol_random;
mod rules;
mod simulate;
mod torture;
mod training;
mod userdata;
mod work;
mod writers;
mod zero1;
