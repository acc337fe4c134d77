//! Parse, call the library, turn the result into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    trainer::cli::main(std::env::args_os())
}
