//! Reading a run's journal from outside: the requests that commands send to the store.

use rustix::process::Signal;

use crate::support::lab::{EVERY, Lab};

#[test]
fn status_watch_reads_only_new_records() {
    let lab = Lab::on_s3();
    let running = lab.run("watched").hold_after(2 * EVERY + 1).start();
    running.wait_for_step("checkpoint", 2 * EVERY);
    running.held();
    running.signal(Signal::TERM);
    running.let_go();
    running.finish().expect_code(75);
    // As if its end had not been recorded.
    let mut records = lab.keys("watched", "journal/");
    records.sort();
    lab.remove("watched", &records.pop().expect("a record"));

    let count = |kind: &str| lab.server().count(kind);
    let (read, listed) = (count("GetObject"), count("ListObjectsV2"));
    let watching = lab.about("status", "watched").args(&["--watch", "--json"]).start();
    let looks = records.len() as u64 + 6;
    watching.wait_until("it has looked several times", || count("GetObject") >= read + looks);
    assert_eq!(count("ListObjectsV2") - listed, 1, "it has read all of it again");
    watching.signal(Signal::INT);
    watching.finish().expect_code(0);
}
