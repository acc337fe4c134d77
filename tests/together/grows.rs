//! A group takes up nodes that wait when that pays; until then `status` says why they wait.

use serde_json::Value;

use super::{
    RUN, create, expect_nearly_undisturbed,
    faults::{expect_sound, lets_them_join, of_kind, of_nodes},
    next,
};
use crate::support::lab::{EVERY, Lab};

/// The second change would follow the first one at once, a few steps before the end of the run.
#[test]
fn a_node_that_comes_a_short_time_after_another_one_waits_and_status_says_why() {
    let lab = Lab::on_files();
    create(lab.run(RUN));
    let holds = [EVERY - 1, EVERY + 2, 3 * EVERY - 1, 3 * EVERY + 2];
    let holds = holds.map(|step| format!("worker.step=stop@rank=0@step={step}@hit={step}")).join(",");
    let one = next(&lab, "1:3").faults(&holds).start();
    one.held();
    let two = next(&lab, "1:3").start();
    one.wait_until("a node that waits", || one.said("waits to join") == 1);
    lets_them_join(&one);
    one.wait_for("both", of_nodes(2));
    one.held();
    let three = next(&lab, "1:3").start();
    one.wait_until("another one that waits", || one.said("waits to join") == 2);
    one.let_go();
    one.wait_until_said("nodes that wait join later");
    one.held();
    let waits = || {
        let status = lab.about("status", RUN).args(&["--json"]).finish().expect_code(0);
        let status: Value = serde_json::from_str(&status.stdout).expect("JSON");
        status["group"]["outside"][0]["waits"].as_str().map(str::to_owned)
    };
    one.wait_until("the reason in its heartbeat", || waits().is_some());
    let why = waits().unwrap();
    assert!(why.contains("a short time ago") || why.contains("before that pays"), "{why}");
    one.let_go();
    let lives = [one, two, three].map(|node| node.finish().expect_code(0));
    assert_eq!(of_kind(&lab, "formed").len(), 2, "{}", lives[0].story());
    expect_nearly_undisturbed(&[&lives[0]]);
    expect_sound(&lab);
}
