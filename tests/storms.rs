//! A misbehaving metadata service: training is unaffected, and notices are heard once the service recovers.

use crate::{
    notices::{RUN, heard, interrupted_and_resumed, long},
    support::{
        lab::Lab,
        metadata::{
            Cloud, Fault, INSTANCE, MetadataServer, PREEMPTED, SCHEDULED_EVENTS, SPOT, TOKEN, azure_event, spot_notice,
        },
    },
};

/// A run through a storm from its first moment to its last, on a machine of that cloud.
fn unharmed_by(storms: &[(Cloud, Fault)]) {
    for (cloud, fault) in storms {
        let (lab, server) = (Lab::on_files(), MetadataServer::start().only(*cloud));
        server.storm(*fault);
        let life = lab.run(RUN).envs(&server.envs()).finish().expect_code(0);
        assert!(!server.requests().is_empty(), "nobody asked");
        assert!(life.of_kind("notice").is_empty(), "{cloud:?}, {fault:?}\n{}", life.story());
        lab.expect_as_undisturbed(RUN, &[&life]);
        let shown = life.stderr.lines().filter(|line| line.contains("metadata")).count();
        assert_eq!(shown, 0, "a storm is nothing to be told of\n{}", life.story());
    }
}

#[test]
fn a_metadata_service_that_misbehaves_from_the_start_harms_nothing() {
    unharmed_by(&[
        (Cloud::Aws, Fault::Status(401)),
        (Cloud::Aws, Fault::Hang),
        (Cloud::Aws, Fault::Garbage),
        (Cloud::Gcp, Fault::Status(500)),
        (Cloud::Gcp, Fault::Hang),
        (Cloud::Gcp, Fault::Garbage),
        (Cloud::Azure, Fault::Status(500)),
        (Cloud::Azure, Fault::Hang),
        (Cloud::Azure, Fault::Close),
    ]);
}

/// A run whose service is found, then misbehaves in all these ways, and then announces the end of the machine.
fn heard_after(cloud: Cloud, faults: &[Fault], say: impl Fn(&MetadataServer), source: &str) {
    let (lab, server) = (Lab::on_files(), MetadataServer::start().only(cloud));
    let path = match cloud {
        Cloud::Aws => SPOT,
        Cloud::Gcp => PREEMPTED,
        Cloud::Azure => SCHEDULED_EVENTS,
    };
    let asked = || server.requests_of(path).len() + server.requests_of(TOKEN).len();
    let running = long(&lab).envs(&server.envs()).start();
    server.wait_for(path, 1);
    for fault in faults {
        let before = asked();
        server.storm(*fault);
        if cloud == Cloud::Gcp {
            // It is not asked again before the awaited value has changed.
            server.set(PREEMPTED, "FALSE");
        }
        running.wait_until("a request into the storm", || asked() > before);
    }
    let trained = running.events("step").len();
    server.calm();
    server.forget_tokens();
    say(&server);
    heard(&running, source);
    let life = running.finish();
    assert_eq!(life.of_kind("notice").len(), 1, "{}", life.story());
    assert!(life.of_kind("step").len() > trained, "training stopped in the storm\n{}", life.story());
    interrupted_and_resumed(&lab, &life, source);
}

#[test]
fn aws_may_misbehave_in_the_middle_of_a_run() {
    let faults = [Fault::Status(500), Fault::Garbage, Fault::Close, Fault::Status(401), Fault::Hang];
    heard_after(Cloud::Aws, &faults, |server| server.set(SPOT, spot_notice("terminate", 120)), "aws-spot");
}

#[test]
fn gcp_may_misbehave_in_the_middle_of_a_run() {
    let faults = [Fault::Status(500), Fault::Hang, Fault::Close];
    heard_after(Cloud::Gcp, &faults, |server| server.set(PREEMPTED, "TRUE"), "gcp-preempted");
}

#[test]
fn azure_may_misbehave_in_the_middle_of_a_run() {
    let say = |server: &MetadataServer| {
        server.events(|events| events.push(azure_event("ours", "Preempt", 60, &[INSTANCE])));
    };
    heard_after(Cloud::Azure, &[Fault::Hang, Fault::Status(500)], say, "azure-preempt");
}
