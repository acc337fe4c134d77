//! The hook at the end of a machine of an Auto Scaling group: it waits while the last step is saved and is completed
//! afterwards. The real binary runs with our server, which plays the metadata service and Auto Scaling.

use crate::{
    notices::{committed, folder, heard, interrupted_and_resumed, long, on_aws},
    support::{
        lab::Lab,
        metadata::{Fault, HOOK, INSTANCE, LIFE_CYCLE, LIFECYCLE, SPOT, parameter, spot_notice},
    },
};

const DESCRIBE: &str = "/?Action=DescribeLifecycleHooks";
const HEARTBEAT: &str = "/?Action=RecordLifecycleActionHeartbeat";
const COMPLETE: &str = "/?Action=CompleteLifecycleAction";

#[test]
fn an_on_demand_machine_is_not_polled_for_spot_notices_and_hears_its_group() {
    let (lab, server) = (Lab::on_files(), on_aws());
    server.set(LIFE_CYCLE, "on-demand");
    server.set(SPOT, spot_notice("terminate", 120));
    server.set_hook(Some(30));
    server.note_posts({
        let store = folder(&lab);
        move || format!("{:?}", committed(&store))
    });
    let running = long(&lab).envs(&server.envs()).hold_after(3).start();
    running.wait_for_step("step", 3);
    // No drain can end before the run is released.
    running.held();
    // The hook is found before it is needed.
    server.wait_for(DESCRIBE, 1);
    server.set(LIFECYCLE, "Terminated");
    heard(&running, "aws-asg");
    // Heartbeats come a third of its time-out apart, for as long as it takes.
    server.wait_for(HEARTBEAT, 2);
    running.let_go();
    let life = running.finish();
    assert!(server.requests_of(SPOT).is_empty(), "spot was asked about");
    let left = life.last("notice").value["deadline_s"].as_f64().expect("the hook's time-out");
    assert!(left > 0.0 && left <= 30.0, "{left}");
    let step = life.last("interrupted").step().expect("its step");
    let complete = server.requests_of(COMPLETE);
    assert_eq!(complete.len(), 1, "{}", life.story());
    assert_eq!(complete[0].note, format!("[{step}]"), "completed only after the last step was committed");
    assert_eq!(complete[0].status, Some(200));
    assert_eq!(parameter(&complete[0].body, "LifecycleActionResult").as_deref(), Some("CONTINUE"));
    assert_eq!(parameter(&complete[0].body, "LifecycleHookName").as_deref(), Some(HOOK));
    assert_eq!(parameter(&complete[0].body, "InstanceId").as_deref(), Some(INSTANCE));
    let heartbeats: Vec<_> = server.requests_of(HEARTBEAT).iter().map(|asked| asked.note.clone()).collect();
    assert_eq!(heartbeats[..2], ["[]", "[]"], "the hook was kept waiting while the step was saved\n{}", life.story());
    interrupted_and_resumed(&lab, &life, "aws-asg");
}

#[test]
fn without_tags_the_hook_is_found_through_the_api() {
    let (lab, server) = (Lab::on_files(), on_aws());
    server.remove("/latest/meta-data/tags/instance/aws:autoscaling:groupName");
    server.set(LIFECYCLE, "Terminated");
    let life = long(&lab).envs(&server.envs()).finish();
    assert_eq!(server.requests_of("/?Action=DescribeAutoScalingInstances").len(), 1, "{}", life.story());
    assert_eq!(server.requests_of(COMPLETE).len(), 1, "{}", life.story());
    // Signed with the role's credentials, which came from the metadata service.
    let signed = &server.requests_of(COMPLETE)[0].headers["authorization"];
    assert!(signed.contains("ASIATEST") && signed.contains("us-east-1"), "{signed}");
    assert_eq!(life.code(), Some(75), "{}", life.story());
}

#[test]
fn a_hook_that_is_found_only_after_the_run_has_ended_is_completed() {
    let (lab, server) = (Lab::on_files(), on_aws());
    server.set(LIFECYCLE, "Terminated");
    // This happens when too many machines ask at once.
    server.storm_on(DESCRIBE, Fault::Status(503));
    let running = long(&lab).envs(&server.envs()).start();
    // There is no hook to wait for yet: the node writes its final record, and then only the hook is left.
    running.wait_for("its end", |event| event.kind() == "interrupted");
    server.calm();
    let life = running.finish().expect_code(75);
    assert!(server.requests_of(DESCRIBE).len() > 1, "{}", life.story());
    assert_eq!(server.requests_of(COMPLETE).len(), 1, "the machine would idle until the time-out\n{}", life.story());
}
