//! A disk that is unmounted under a run, and a store that is emptied: the run ends and says so, and writes nothing to
//! the wrong place.

use rustix::process::Signal;

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, interrupted},
    mounts::Namespace,
};

const RUN: &str = "adrift";

#[test]
fn a_disk_that_is_unmounted_under_a_run_ends_it_and_nothing_is_written_into_the_mount_point() {
    let lab = Lab::on_files();
    let store = lab.path("store");
    std::fs::create_dir_all(&store).expect("mount point");
    let Some(namespace) = Namespace::with_disk_at(&store) else {
        eprintln!("SKIPPED: no mount namespace here");
        return;
    };
    let entered = namespace.enter(&lab.path(""));
    let running = lab
        .run(RUN)
        .args(&["--set", "train.steps=1000000"])
        .hold_after(EVERY + 1)
        .within(&entered.each_ref().map(String::as_str))
        .start();
    running.wait_for_step("checkpoint", EVERY);
    running.held();
    assert!(!namespace.unmount(&store, &[]), "the store's disk could be taken away");
    assert!(namespace.unmount(&store, &["--lazy"]), "not even by force");
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

/// Then all of its objects are missing, which does not mean that checkpoints are damaged.
#[test]
fn a_disk_unmounted_while_a_checkpoint_is_loaded_is_reported_as_that() {
    let lab = Lab::on_interrupted_run();
    let place = lab.path("mounted");
    std::fs::create_dir_all(&place).expect("mount point");
    let Some(namespace) = Namespace::with_folder_at(&lab.path("store"), &place) else {
        eprintln!("SKIPPED: no mount namespace here");
        return;
    };
    let entered = namespace.enter(&lab.path(""));
    let uri = format!("file://{}", place.display());
    let running = lab
        .command(&["resume", "--run-id", ORIGIN, "--store", &uri])
        .json()
        .faults("journal.after-append=stop@hit=1")
        .within(&entered.each_ref().map(String::as_str))
        .start();
    assert!(running.stopped(), "it formed no generation");
    assert!(namespace.unmount(&place, &["--lazy"]), "not even by force");
    running.signal(Signal::CONT);
    let life = running.finish().expect_code(69).expect_said(&["is no longer the folder that it was"]);
    assert!(!life.stderr.contains("damaged"), "{}", life.story());
    assert_eq!(std::fs::read_dir(&place).expect("the mount point").count(), 0, "written into the mount point");
    let next = lab.resume(ORIGIN).finish().expect_code(0);
    assert_eq!(next.resumed_from(), interrupted().step, "{}", next.story());
}

/// Other stores can't be held open: there the run notices that the newest record is gone.
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
