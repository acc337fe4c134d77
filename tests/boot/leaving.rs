//! A machine whose run is complete: it leaves its group, or powers off.

use super::*;

/// A run of two steps that ends with "terminate", on a machine with this id.
fn short_run(lab: &Lab, metadata: &MetadataServer, endpoint: &str, run: &str) -> Trainer {
    let arguments =
        ["boot", "run.toml", "--run-id", run, "--set", "train.steps=2", "--set", "train.schedule.warmup_steps=0"];
    let keys = s3::client_env(endpoint);
    let own = [("AWS_EC2_METADATA_DISABLED", "false".to_owned())];
    machine(lab, metadata, endpoint, &arguments)
        .args(&["--set", "on_complete.action=terminate"])
        .envs(&keys)
        .envs(&own)
        .envs(&[stand_ins(lab, &["systemctl"])])
        .json()
}

#[test]
fn a_machine_leaves_its_group_and_is_not_replaced() {
    let Some(moto) = Moto::start("unused") else { return };
    let lab = Lab::on_files();
    let call = |action: &str, parameters: &[(&str, &str)]| moto.query("autoscaling", "2011-01-01", action, parameters);
    let group = || {
        let answer = call("DescribeAutoScalingGroups", &[("AutoScalingGroupNames.member.1", "trainers")]);
        let texts = |name: &str| -> Vec<String> {
            let tag = format!("<{name}>");
            let texts = answer.split(&tag).skip(1);
            texts.filter_map(|text| Some(text.split_once('<')?.0.to_owned())).collect()
        };
        (texts("DesiredCapacity"), texts("InstanceId"))
    };
    let name = ("LaunchConfigurationName", "gpu");
    call("CreateLaunchConfiguration", &[name, ("ImageId", "ami-12c6146b"), ("InstanceType", "t2.micro")]);
    let sizes = [("MinSize", "0"), ("MaxSize", "2"), ("DesiredCapacity", "2")];
    let place = [("AutoScalingGroupName", "trainers"), name, ("AvailabilityZones.member.1", "us-east-1a")];
    call("CreateAutoScalingGroup", &[&place[..], &sizes[..]].concat());
    let (_, instances) = group();
    assert_eq!(instances.len(), 2);
    let metadata = MetadataServer::start();
    let identity = format!(r#"{{"instanceId":"{}","region":"us-east-1"}}"#, instances[0]);
    metadata.set("/latest/dynamic/instance-identity/document", identity);
    let life = short_run(&lab, &metadata, &moto.endpoint(), "leaver").finish().expect_code(0);
    let said = format!("the Auto Scaling group ends {}", instances[0]);
    let life = life.expect_said(&[&said]);
    assert_eq!(group(), (vec!["1".to_owned()], vec![instances[1].clone()]), "{}", life.story());
    assert_eq!(called(&lab), "", "it powered off");
}

#[test]
fn a_machine_that_leaves_its_group_does_not_wait_at_the_groups_hook() {
    const COMPLETE: &str = "/?Action=CompleteLifecycleAction";
    let lab = Lab::on_files();
    let metadata = MetadataServer::start();
    short_run(&lab, &metadata, &metadata.endpoint(), "hooked").finish().expect_code(0).expect_said(&[
        &format!("the Auto Scaling group ends {INSTANCE}"),
        "lifecycle hook drain of group trainers is completed",
    ]);
    let calls: Vec<String> = metadata.requests().into_iter().map(|asked| asked.path).collect();
    let at = |call: &str| calls.iter().position(|path| path == call);
    assert!(at("/?Action=TerminateInstanceInAutoScalingGroup") < at(COMPLETE), "{calls:?}");

    // Another one's hook.
    let before = metadata.requests_of(COMPLETE).len();
    short_run(&lab, &metadata, &metadata.endpoint(), "held")
        .args(&["--set", "notice.lifecycle_hook=none"])
        .finish()
        .expect_code(0);
    assert_eq!(metadata.requests_of(COMPLETE).len(), before);
}

#[test]
fn a_machine_that_cannot_leave_its_group_powers_off_unless_it_would_be_replaced() {
    let lab = Lab::on_files();
    let metadata = MetadataServer::start();
    let refusal = |code: &str, message: &str| {
        let body = format!(
            "<ErrorResponse \
            xmlns=\"http://autoscaling.amazonaws.com/doc/2011-01-01/\"><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error><RequestId>x</RequestId></ErrorResponse>"
        );
        answering("400 Bad Request", "text/xml", &body)
    };
    let minimum = refusal(
        "ValidationError",
        "Currently, desiredSize equals minSize (1). Terminating instance without replacement will violate group's min \
        size constraint.",
    );
    short_run(&lab, &metadata, &minimum, "at-minimum")
        .finish()
        .expect_code(0)
        .expect_said(&[&format!("{INSTANCE} stays on and costs money"), "lower the group's MinSize to 0"]);
    assert_eq!(called(&lab), "", "it powered off");

    let outside = refusal("ValidationError", "Instance Id not found - No managed instance found for instance ID");
    short_run(&lab, &metadata, &outside, "outside")
        .finish()
        .expect_code(0)
        .expect_said(&["is in no Auto Scaling group"]);
    assert_eq!(called(&lab), "systemctl poweroff\n");

    let denied = refusal("AccessDenied", "not authorized to perform: autoscaling:TerminateInstanceInAutoScalingGroup");
    short_run(&lab, &metadata, &denied, "denied").finish().expect_code(0).expect_said(&[
        "AccessDenied",
        &format!("{INSTANCE} stays on and costs money"),
        "it would be replaced",
    ]);
    assert_eq!(called(&lab), "systemctl poweroff\n", "it powered off in a group");

    // A service that does not answer may do so later.
    let closed = "127.0.0.1:1";
    let silent = short_run(&lab, &metadata, &format!("http://{closed}"), "silent").start();
    silent.wait_until_said("the group is asked again in 60 s");
    silent.signal(Signal::TERM);
    silent.finish().expect_code(0);
    assert_eq!(called(&lab), "systemctl poweroff\n", "it powered off in a group that is silent");

    // In no group according to its metadata, which the API could not say.
    metadata.set(LIFECYCLE, 404);
    short_run(&lab, &metadata, &denied, "groupless").finish().expect_code(0).expect_said(&["powering off"]);
    assert_eq!(called(&lab), "systemctl poweroff\nsystemctl poweroff\n");
    let told = [("TRAINER_POWER_OFF", "host".to_owned())];
    short_run(&lab, &metadata, &outside, "told")
        .envs(&told)
        .finish()
        .expect_code(0)
        .expect_said(&["TRAINER_POWER_OFF=host"]);
    assert_eq!(called(&lab), "systemctl poweroff\nsystemctl poweroff\n", "that was left to somebody else");

    // A machine of no cloud, dedicated to a run that is complete.
    let path = [stand_ins(&lab, &[])];
    std::fs::remove_file(PathBuf::from(&path[0].1).join("systemctl")).expect("remove a stand-in");
    let path = [stand_ins(&lab, &["shutdown"])];
    let again = || boot(&lab, &["run.toml", "--run-id", "denied"]).envs(&path).finish().expect_code(0);
    again().expect_said(&["powering off (shutdown -h now)"]);
    assert!(called(&lab).ends_with("shutdown -h now\n"), "{}", called(&lab));
    std::fs::remove_file(lab.path("bin/shutdown")).expect("remove a stand-in");
    again().expect_said(&["this machine stays on and may cost money"]);
}

#[test]
fn only_the_node_that_completes_a_run_gives_up_its_machine() {
    let lab = Lab::on_files();
    let path = [stand_ins(&lab, &["systemctl"])];
    let short = ["--set", "train.steps=2", "--set", "train.schedule.warmup_steps=0"];
    lab.run("mine").args(&short).args(&["--set", "on_complete.action=terminate"]).envs(&path).finish().expect_code(0);
    assert_eq!(called(&lab), "systemctl poweroff\n", "the run's own machine");
    let resume = || lab.resume("mine").envs(&path);
    resume().finish().expect_code(0).expect_said(&["run has completed, nothing is left to do"]);
    assert_eq!(called(&lab), "systemctl poweroff\n", "powered off for a run that was complete before");
    resume().args(&["--set", "train.steps=4"]).finish().expect_code(0);
    assert_eq!(called(&lab), "systemctl poweroff\nsystemctl poweroff\n", "it has trained the rest");
}
