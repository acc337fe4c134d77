//! Mount namespaces: disks that only one process has, and that can be taken away from it.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

/// A separate mount namespace. It ends with this value, or with this process.
pub struct Namespace {
    holder: Child,
}

impl Namespace {
    /// With an empty disk at `place`; `None`: this user may not mount.
    pub fn with_disk_at(place: &Path) -> Option<Self> {
        Self::with(&["-t", "tmpfs", "none"], place)
    }
    /// With the content of `folder` at `place`, as if its disk were mounted there.
    pub fn with_folder_at(folder: &Path, place: &Path) -> Option<Self> {
        Self::with(&["--bind", folder.to_str()?], place)
    }
    fn with(what: &[&str], place: &Path) -> Option<Self> {
        let script = "mount \"$@\" && echo mounted && exec cat";
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"])
            .args(what)
            .arg(place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let _ = BufReader::new(holder.stdout.take().expect("piped")).read_line(&mut line);
        let namespace = Self { holder };
        (line.trim() == "mounted").then_some(namespace)
    }
    /// The beginning of a command that runs in it, in `folder`.
    pub fn enter(&self, folder: &Path) -> [String; 3] {
        let namespace = format!("--mount=/proc/{}/ns/mnt", self.holder.id());
        ["nsenter".into(), namespace, format!("--wdns={}", folder.display())]
    }
    /// Unmounts the disk at `place`; `false`: that was refused.
    pub fn unmount(&self, place: &Path, options: &[&str]) -> bool {
        let [program, namespace, _] = self.enter(place);
        let mut umount = Command::new(program);
        umount.arg(namespace).arg("umount").args(options).arg(place);
        umount.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
