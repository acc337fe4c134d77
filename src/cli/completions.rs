//! `trainer completions`

use std::process::ExitCode;

use clap::{Args, CommandFactory};

use super::{Cli, output};
use crate::error::Result;

/// Print a shell's completion script
#[derive(Debug, Args)]
#[command(after_help = "Example: trainer completions bash > ~/.local/share/bash-completion/completions/trainer")]
pub struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

impl Completions {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "trainer", &mut script);
        output::emit(&String::from_utf8_lossy(&script))?;
        Ok(ExitCode::SUCCESS)
    }
}
