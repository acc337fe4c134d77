//! A disk that is unmounted under a run, and a store that is emptied: the run ends and says so, and nothing is written
//! where nobody would look for it.

use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::support::lab::{EVERY, Lab};

const RUN: &str = "adrift";

/// A mount namespace of its own, in which the lab's store is a disk.
struct Namespace {
    holder: Child,
}

impl Namespace {
    /// `None` where this user may not mount.
    fn with_disk_at(path: &str) -> Option<Self> {
        let script = format!("mount -t tmpfs none {path} && echo mounted && exec sleep 100000");
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let mut said = std::io::BufReader::new(holder.stdout.take().expect("piped"));
        let _ = std::io::BufRead::read_line(&mut said, &mut line);
        let namespace = Self { holder };
        (line.trim() == "mounted").then_some(namespace)
    }
    fn enter(&self) -> [String; 2] {
        ["nsenter".into(), format!("--mount=/proc/{}/ns/mnt", self.holder.id())]
    }
    fn run(&self, command: &[&str]) -> bool {
        let [program, namespace] = self.enter();
        Command::new(program).arg(namespace).args(command).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[test]
fn a_disk_that_is_unmounted_under_a_run_ends_it_and_nothing_is_written_into_the_mount_point() {
    let lab = Lab::on_files();
    let store = lab.path("store");
    std::fs::create_dir_all(&store).expect("mount point");
    let path = store.display().to_string();
    let Some(namespace) = Namespace::with_disk_at(&path) else {
        eprintln!("SKIPPED: no mount namespace here");
        return;
    };
    let [program, entered] = namespace.enter();
    let place = format!("--wdns={}", lab.path("").display());
    let running = lab
        .run(RUN)
        .args(&["--set", "train.steps=1000000"])
        .hold_after(EVERY + 1)
        .within(&[&program, &entered, &place])
        .start();
    running.wait_for_step("checkpoint", EVERY);
    running.held();
    assert!(!namespace.run(&["umount", &path]), "the store's disk could be taken away");
    assert!(namespace.run(&["umount", "--lazy", &path]), "not even by force");
    running.signal(Signal::TERM);
    running.wait_for("a notice", |event| event.kind() == "notice");
    running.let_go();
    let life = running.finish().expect_code(69);
    assert!(life.stderr.contains("is no longer the folder that it was"), "{}", life.story());
    assert!(life.stderr.contains("mount the disk again"), "{}", life.story());
    assert!(life.of_kind("interrupted").is_empty(), "{}", life.story());
    assert!(!life.stderr.contains("nothing is lost"), "{}", life.story());
    assert_eq!(std::fs::read_dir(&store).expect("the mount point").count(), 0, "written into the mount point");
}

/// Elsewhere nobody can hold a folder: it is noticed that the newest record is gone.
#[test]
fn a_run_whose_store_is_emptied_under_it_ends() {
    emptied(&Lab::on_s3());
    emptied(&Lab::on_files());
}

fn emptied(lab: &Lab) {
    let running = lab.run(RUN).args(&["--set", "train.steps=1000000"]).hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    running.held();
    for key in lab.keys(RUN, "journal/") {
        lab.remove(RUN, &key);
    }
    let life = running.finish().expect_code(69);
    assert!(life.stderr.contains("is gone, and so may be all of the run"), "{}", life.story());
}
