//! Switches this machine off with its system's command for it.
//!
//! Commands are looked for in `PATH`. A container usually has none: then its host must power the machine off.

use std::{path::PathBuf, process::Stdio, time::Duration};

use crate::env;
use crate::error::{Error, Kind, Result};

/// The commands, in the order in which they are tried.
const COMMANDS: [&[&str]; 3] = [&["systemctl", "poweroff"], &["shutdown", "-h", "now"], &["poweroff"]];
/// The limit for one command.
const LIMIT: Duration = Duration::from_secs(20);

/// Asks the system to power off; returns the command that did.
pub async fn off() -> Result<String> {
    let mut failures = Vec::new();
    for command in COMMANDS {
        let Some(program) = find(command[0]) else { continue };
        let shown = command.join(" ");
        let mut child = tokio::process::Command::new(program);
        child.args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        match tokio::time::timeout(LIMIT, child.status()).await {
            Ok(Ok(status)) if status.success() => return Ok(shown),
            Ok(Ok(status)) => failures.push(format!("{shown}: {status}")),
            Ok(Err(error)) => failures.push(format!("{shown}: {error}")),
            Err(_) => failures.push(format!("{shown}: did not end within {} s", LIMIT.as_secs())),
        }
    }
    let what = if failures.is_empty() {
        "there is no systemctl, shutdown or poweroff in PATH".to_owned()
    } else {
        failures.join("; ")
    };
    Err(Error::new(Kind::Unavailable, what).context("power off"))
}

fn find(program: &str) -> Option<PathBuf> {
    let path = env::raw("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| path.is_file())
}
