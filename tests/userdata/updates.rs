//! The stack, updated: each of its parameters changes once, and machines find one configuration after each update.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::stack::{change, create, tagged, template};
use crate::support::moto::Moto;

/// Names and values of the parameters below a path.
fn below(moto: &Moto, path: &str) -> Vec<(String, String)> {
    let found = moto.json("ssm", "AmazonSSM.GetParametersByPath", &json!({"Path": path, "Recursive": true}));
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let all = found["Parameters"].as_array().expect("parameters").iter();
    all.map(|one| (text(&one["Name"]), text(&one["Value"]))).collect()
}

#[test]
fn the_stack_is_updated_with_each_parameter_varied_and_deleted() {
    let Some(moto) = Moto::start("configs") else { return };
    let name = "varied";
    create(&moto, name, "boot");
    // The configuration goes from an address to a text, to none, and back; an update names what it takes away.
    let sum = "0".repeat(64);
    let updates: [&[(&str, &str)]; 6] = [
        &[("Config", "a = 1"), ("ConfigUri", ""), ("Work", "boot"), ("RunIdTemplate", "r-{year}"), ("DiskGiB", "200")],
        &[
            ("Config", "a = 2"),
            ("ConfigUri", ""),
            ("Work", "loop"),
            ("Nodes", "2:4"),
            ("MaxSize", "4"),
            ("MinVcpus", "8"),
            ("MaxVcpus", "16"),
            ("MinGpuMiB", "22000"),
            ("InstanceTypes", "g6.*"),
            ("OnDemandBase", "1"),
            ("Environment", "NCCL_DEBUG=INFO,A=b"),
        ],
        &[
            ("Config", ""),
            ("ConfigUri", ""),
            ("Work", "queue"),
            ("Nodes", "1"),
            ("ApiPort", "8443"),
            ("AlarmEmail", "you@example.com"),
            ("OnFailure", "keep"),
            ("LagLimit", "600"),
        ],
        &[
            ("Config", ""),
            ("ConfigUri", "s3://configs/other.toml"),
            ("Work", "queue"),
            ("Schedule", "cron(0 7 1 * ? *)"),
            ("ScheduleTimezone", "Europe/Berlin"),
            ("ScheduleState", "DISABLED"),
            ("Versioning", "Suspended"),
            ("RepositoryName", "other"),
            ("SpotType", "g6.2xlarge"),
        ],
        &[
            ("Config", ""),
            ("ConfigUri", "s3://configs/reports.toml"),
            ("Work", "boot"),
            ("Image", ""),
            ("Bundle", "s3://bucket/trainer.tar.gz"),
            ("BundleSha256", &sum),
            ("RootDevice", "/dev/xvda"),
            ("ReadBucket", ""),
            ("DesiredCapacity", "0"),
        ],
        &[("Config", "a = 3"), ("ConfigUri", ""), ("Work", "boot"), ("SsmPath", "/trainer/elsewhere")],
    ];
    for given in updates {
        change(&moto, "UpdateStack", name, given);
        let stacks = moto.query("cloudformation", "2010-05-15", "DescribeStacks", &[("StackName", name)]);
        assert_eq!(tagged(&stacks, "StackStatus"), "UPDATE_COMPLETE", "{given:?}: {stacks}");
        // Machines find one configuration, under its own name, or none.
        let all = below(&moto, "/trainer");
        let found: Vec<_> =
            all.iter().filter(|(name, _)| name.ends_with("/config") || name.ends_with("-uri")).collect();
        let path = given.iter().find(|(key, _)| *key == "SsmPath").map_or("/trainer/varied", |(_, path)| path);
        let value = |key: &str| given.iter().find(|(name, value)| *name == key && !value.is_empty());
        let wanted = [("Config", "config"), ("ConfigUri", "config-uri")];
        let wanted = wanted.iter().filter_map(|(key, name)| Some((format!("{path}/{name}"), value(key)?.1.to_owned())));
        assert_eq!(found.into_iter().cloned().collect::<Vec<_>>(), wanted.collect::<Vec<_>>(), "{given:?}: {all:?}");
    }
    // What an update can't vary: where machines are, and the bucket's name, with which it would be another bucket.
    let varied = updates.iter().copied().flatten().map(|(key, _)| *key);
    let varied: BTreeSet<&str> = varied.chain(["VpcId", "SubnetIds", "ImageId", "BucketName"]).collect();
    let stack = template("aws/stack.yaml").expect("the tools are there");
    let known: BTreeSet<&str> =
        stack["Parameters"].as_object().expect("parameters").keys().map(String::as_str).collect();
    assert_eq!(varied, known, "left: varied here; right: the template's");
    moto.query("cloudformation", "2010-05-15", "DeleteStack", &[("StackName", name)]);
    assert!(below(&moto, "/trainer").is_empty(), "{:?}", below(&moto, "/trainer"));
    let group = [("AutoScalingGroupNames.member.1", name)];
    let groups = moto.query("autoscaling", "2011-01-01", "DescribeAutoScalingGroups", &group);
    assert!(!groups.contains("<AutoScalingGroupName>"), "{groups}");
}
