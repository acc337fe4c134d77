//! A machine that garbles its reads: a healthy one with `fixtures/garble/garble.c` preloaded, which flips bits in reads
//! of checkpoints.

use std::{path::PathBuf, process::Command, sync::OnceLock};

use super::{lab::scratch, trainer::Trainer};

fn shim() -> &'static PathBuf {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    SHIM.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/garble/garble.c");
        let shim = scratch().join("garble.so");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&shim).arg(source).arg("-ldl").status();
        assert!(built.expect("cc, which Rust links with, too").success());
        shim
    })
}

/// The same command on a machine that garbles its reads: `bulk`, `slot`, `disk` or `all`.
pub fn garbled(trainer: Trainer, how: &str) -> Trainer {
    trainer.envs(&[("LD_PRELOAD", shim().display().to_string()), ("GARBLE", how.to_owned())])
}
