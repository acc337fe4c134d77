//! The facts without which a result is worthless: machine, date, commit. It names no hosts and no paths.

use std::{fs, path::Path, process::Command};

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Machine {
    pub date: String,
    pub commit: String,
    pub processor: String,
    pub cores: usize,
    pub memory_gib: u64,
    /// File system and kind of disk under the scratch folder.
    pub disk: String,
    /// Load average of the last minute before the first round: above a fraction of a core, the figures are noise.
    pub load_before: f64,
}

impl Machine {
    pub fn describe(scratch: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let kib: u64 = field(&text("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
        Self {
            date: jiff::Zoned::now().strftime("%Y-%m-%d").to_string(),
            commit: commit(),
            processor: format!("{} {}", std::env::consts::ARCH, field(&text("/proc/cpuinfo"), "model name")),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: (kib + (1 << 19)) >> 20,
            disk: disk(scratch, &text("/proc/self/mounts")),
            load_before: text("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(f64::NAN),
        }
    }

    /// A file name for results, without its ending.
    pub fn slug(&self, suite: &str) -> String {
        format!("{}-{}-core-{}-{suite}", self.date, self.cores, std::env::consts::ARCH)
    }
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let done = Command::new("git").current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output().ok()?;
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=10", "HEAD"]) else { return "unknown".into() };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => commit,
        _ => format!("{commit} and changes"),
    }
}

/// The longest mount point above the folder.
fn disk(folder: &Path, mounts: &str) -> String {
    let entries = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        Some((fields.next()?, Path::new(fields.next()?), fields.next()?))
    });
    let found = entries.filter(|(_, at, _)| folder.starts_with(at)).max_by_key(|(_, at, _)| at.as_os_str().len());
    let Some((device, _, system)) = found else { return "unknown".into() };
    let device = device.trim_start_matches("/dev/").trim_end_matches(|c: char| c.is_ascii_digit());
    let kind = match fs::read_to_string(format!("/sys/block/{device}/queue/rotational")).ok().as_deref().map(str::trim)
    {
        Some("0") => "solid-state or virtual disk",
        Some("1") => "rotating or virtual disk",
        _ => "disk of unknown kind",
    };
    format!("{system} on a {kind}")
}
