//! The whole product, from outside: the built binary, real processes, real stores, real faults.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets what it does not expect fails")]
#![allow(clippy::disallowed_methods, reason = "helpers poll other processes from threads of their own")]

mod support;

mod boot;
mod caps;
mod chats;
mod crash;
mod damage;
mod dataset;
mod doctor;
mod deadline;
mod doubt;
mod early_stopping;
mod exports;
mod fleet;
mod formats;
mod freeze_model;
mod groups;
mod harness;
mod hints;
mod hook;
mod input;
mod integrity;
mod interop;
mod interruption;
mod journal;
mod lora;
mod members_model;
mod metadata;
mod model_folder;
mod moments;
mod nodes;
mod notices;
mod outputs;
mod own_model;
mod prepare_inputs;
mod protocol_model;
mod protocol_random;
mod real_model;
mod rendezvous_sim;
mod rules;
mod simulate;
mod stalls;
mod states;
mod storms;
mod streams;
mod together;
mod torture;
mod training;
mod uneven;
mod unmounted;
mod userdata;
mod work;
mod writers;
mod zero1;
