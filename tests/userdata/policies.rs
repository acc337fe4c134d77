//! Rules of AWS that neither moto nor cfn-lint knows, each with its source, and mistakes that break them.
use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{python, said, stack::template};

/// Everything in a template that AWS would refuse, or obey otherwise than intended.
fn faults(stack: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    let resources = stack["Resources"].as_object().expect("resources");
    let of = |kind: &'static str| resources.iter().filter(move |(_, one)| one["Type"] == kind);
    let mut queues = BTreeSet::new();
    for (name, policy) in of("AWS::SQS::QueuePolicy") {
        faults.extend(of_a_queue_policy(name, &policy["Properties"], &mut queues));
    }
    // "RetainExceptOnCreate: … if the resource was created by the failed operation, it is deleted":
    // https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/aws-attribute-deletionpolicy.html
    for (name, one) in resources {
        if one["DeletionPolicy"] == "Retain" {
            faults.push(format!("a creation that fails leaves {name} behind, and its name is taken"));
        }
    }
    for (name, group) in of("AWS::AutoScaling::AutoScalingGroup") {
        faults.extend(of_a_group(name, &group["Properties"], resources));
    }
    for (name, alarm) in of("AWS::CloudWatch::Alarm") {
        faults.extend(of_an_alarm(name, &alarm["Properties"]));
    }
    for (name, policy) in of("AWS::AutoScaling::ScalingPolicy") {
        faults.extend(of_steps(name, &policy["Properties"]["StepAdjustments"]));
    }
    for (name, template) in of("AWS::EC2::LaunchTemplate") {
        let data = &template["Properties"]["LaunchTemplateData"];
        let device = &data["BlockDeviceMappings"][0]["DeviceName"];
        if data.get("BlockDeviceMappings").is_some() && *device != json!({"Ref": "RootDevice"}) {
            faults.push(format!("{name}: {device} is a second disk where the AMI's root has another name"));
        }
        // "If you specify a network interface, you must specify any security groups and subnets as part of the network
        // interface": https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_RunInstances.html
        if data.get("NetworkInterfaces").is_some() && data.get("SecurityGroupIds").is_some() {
            faults.push(format!("{name}: security groups beside a network interface"));
        }
    }
    faults
}

/// "Each policy must cover only a single queue (when writing a policy, don't include statements that cover different
/// queues)": <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-creating-custom-policies.html>
fn of_a_queue_policy(name: &str, policy: &Value, queues: &mut BTreeSet<String>) -> Vec<String> {
    let mut faults = Vec::new();
    let [queue] = policy["Queues"].as_array().expect("a list of queues").as_slice() else {
        return vec![format!("{name} is put on several queues")];
    };
    let queue = queue["Ref"].as_str().expect("a queue of this stack");
    if !queues.insert(queue.to_owned()) {
        faults.push(format!("{queue} has two policies: the later one replaces the other"));
    }
    for statement in policy["PolicyDocument"]["Statement"].as_array().expect("statements") {
        if statement["Resource"] != json!({"Fn::GetAtt": format!("{queue}.Arn")}) {
            faults.push(format!("{name} names another resource than {queue}"));
        }
    }
    faults
}

fn of_a_group(name: &str, group: &Value, resources: &serde_json::Map<String, Value>) -> Vec<String> {
    let mut faults = Vec::new();
    let mixed = &group["MixedInstancesPolicy"];
    let overrides = mixed["LaunchTemplate"]["Overrides"].as_array().expect("overrides");
    for one in overrides {
        // "Using multiple instance types that are not available in your Region might cause the request to fail
        // entirely": https://docs.aws.amazon.com/autoscaling/ec2/userguide/mixed-instances-groups-set-up-overview.html
        if one.get("InstanceType").is_some() {
            faults.push(format!("{name} names a type, which a region may lack"));
        }
        let wanted = &one["InstanceRequirements"];
        // https://docs.aws.amazon.com/autoscaling/ec2/APIReference/API_InstanceRequirements.html
        for needed in ["VCpuCount", "MemoryMiB"] {
            if wanted[needed].get("Min").is_none() {
                faults.push(format!("{name}: requirements need {needed}"));
            }
        }
        if wanted.get("AllowedInstanceTypes").is_some() && wanted.get("ExcludedInstanceTypes").is_some() {
            faults.push(format!("{name} allows and excludes types"));
        }
        // "The default is 100" and "20": a group leaves out types that cost that much more than the cheapest.
        for limit in ["SpotMaxPricePercentageOverLowestPrice", "OnDemandMaxPricePercentageOverLowestPrice"] {
            if wanted[limit].as_u64() < Some(1000) {
                faults.push(format!("{name}: {limit} leaves dear types out"));
            }
        }
    }
    // "lowest-price … is the default value for Auto Scaling groups that specify InstanceRequirements. prioritized …
    // cannot be used for groups that do." and "capacity-optimized-prioritized … not … with InstanceRequirements":
    // https://docs.aws.amazon.com/autoscaling/ec2/APIReference/API_InstancesDistribution.html
    let distribution = &mixed["InstancesDistribution"];
    if ["OnDemandAllocationStrategy", "SpotAllocationStrategy"]
        .iter()
        .any(|key| distribution[*key].as_str().is_some_and(|strategy| strategy.ends_with("prioritized")))
    {
        faults.push(format!("{name}: requirements have no order, so nothing is prioritized"));
    }
    // A rebalance ends the old machine as soon as the newcomer is in service, unless a hook holds it back:
    // https://docs.aws.amazon.com/autoscaling/ec2/userguide/ec2-auto-scaling-capacity-rebalancing.html
    let hooks = group["LifecycleHookSpecificationList"].to_string();
    if group["CapacityRebalance"] == true && !hooks.contains("EC2_INSTANCE_LAUNCHING") {
        faults.push(format!("{name} ends a machine before the other one is ready"));
    }
    // "You cannot use a launch template that requests Spot Instances with a mixed instances policy"; subnets are the
    // group's: https://docs.aws.amazon.com/autoscaling/ec2/userguide/create-launch-template.html
    let template = mixed["LaunchTemplate"]["LaunchTemplateSpecification"]["LaunchTemplateId"]["Ref"].as_str();
    let data = &resources[template.expect("a template of this stack")]["Properties"]["LaunchTemplateData"];
    let subnet =
        data["NetworkInterfaces"].as_array().is_some_and(|all| all.iter().any(|one| one.get("SubnetId").is_some()));
    if subnet || ["InstanceMarketOptions", "InstanceType"].iter().any(|key| data.get(key).is_some()) {
        faults.push(format!("{name}'s template has a market, a type or a subnet"));
    }
    faults
}

/// One result, each name defined, no metric beside the list:
/// <https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_PutMetricAlarm.html>
fn of_an_alarm(name: &str, alarm: &Value) -> Vec<String> {
    let Some(metrics) = alarm["Metrics"].as_array() else { return Vec::new() };
    let mut faults = Vec::new();
    if ["MetricName", "Statistic", "Period", "Dimensions"].iter().any(|key| alarm.get(key).is_some()) {
        faults.push(format!("{name} has a metric, and a list of metrics"));
    }
    if metrics.iter().filter(|one| one["ReturnData"] != false).count() != 1 {
        faults.push(format!("{name} has not one result"));
    }
    let ids: BTreeSet<_> = metrics.iter().map(|one| one["Id"].as_str().expect("an id")).collect();
    for expression in metrics.iter().filter_map(|one| one["Expression"].as_str()) {
        let words = expression.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        for word in words.filter(|word| word.starts_with(|c: char| c.is_lowercase())) {
            if !ids.contains(word) {
                faults.push(format!("{name}: there is no {word}"));
            }
        }
    }
    faults
}

/// "The ranges can't overlap or have a gap; only one can have a null lower bound, and one a null upper bound":
/// <https://docs.aws.amazon.com/autoscaling/ec2/userguide/as-scaling-simple-step.html>
fn of_steps(name: &str, steps: &Value) -> Vec<String> {
    let steps = steps.as_array().expect("steps");
    let mut at = json!(0);
    for step in steps {
        if step["MetricIntervalLowerBound"] != at {
            return vec![format!("{name} has a gap at {at}")];
        }
        at = step["MetricIntervalUpperBound"].clone();
    }
    if at == Value::Null { Vec::new() } else { vec![format!("{name} does nothing above {at}")] }
}

#[test]
fn the_stack_breaks_no_rule_that_the_tools_do_not_know() {
    let Some(good) = template("aws/stack.yaml") else { return };
    assert_eq!(faults(&good), Vec::<String>::new());
    let group = "/Resources/Group/Properties";
    let wanted = format!("{group}/MixedInstancesPolicy/LaunchTemplate/Overrides/0/InstanceRequirements");
    let distribution = format!("{group}/MixedInstancesPolicy/InstancesDistribution");
    let data = "/Resources/LaunchTemplate/Properties/LaunchTemplateData";
    for (pointer, value, fault) in [
        (
            "/Resources/QueuePolicy/Properties/Queues".into(),
            json!([{"Ref": "Queue"}, {"Ref": "DeadLetters"}]),
            "several",
        ),
        ("/Resources/QueuePolicy/Properties/Queues".into(), json!([{"Ref": "DeadLetters"}]), "has two policies"),
        (
            "/Resources/QueuePolicy/Properties/PolicyDocument/Statement/0/Resource".into(),
            json!([{"Fn::GetAtt": "Queue.Arn"}, {"Fn::GetAtt": "DeadLetters.Arn"}]),
            "another resource",
        ),
        ("/Resources/Bucket/DeletionPolicy".into(), json!("Retain"), "leaves Bucket behind"),
        (format!("{group}/CapacityRebalance"), json!(true), "before the other one is ready"),
        (format!("{wanted}/VCpuCount"), json!({"Max": 8}), "need VCpuCount"),
        (format!("{wanted}/SpotMaxPricePercentageOverLowestPrice"), json!(100), "dear types"),
        (format!("{distribution}/OnDemandAllocationStrategy"), json!("prioritized"), "nothing is prioritized"),
        (format!("{distribution}/SpotAllocationStrategy"), json!("capacity-optimized-prioritized"), "nothing is"),
        (
            format!("{group}/MixedInstancesPolicy/LaunchTemplate/Overrides/0"),
            json!({"InstanceType": "g6.xlarge"}),
            "may lack",
        ),
        (
            format!("{group}/MixedInstancesPolicy/LaunchTemplate/LaunchTemplateSpecification/LaunchTemplateId"),
            json!({"Ref": "SpotTemplate"}),
            "a market, a type or a subnet",
        ),
        (format!("{data}/BlockDeviceMappings/0/DeviceName"), json!("/dev/sda1"), "a second disk"),
        ("/Resources/JobsWaiting/Properties/Metrics/1/Id".into(), json!("waits"), "there is no waiting"),
        ("/Resources/JobsWaiting/Properties/Metrics/1/ReturnData".into(), json!(true), "not one result"),
        ("/Resources/OneMore/Properties/StepAdjustments/2/MetricIntervalLowerBound".into(), json!(4), "a gap"),
    ] {
        let mut wrong = good.clone();
        *wrong.pointer_mut(&pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        let found = faults(&wrong);
        assert!(found.iter().any(|one| one.contains(fault)), "{pointer}: {found:?}");
    }
    let queues = ["Queue", "DeadLetters"].map(|name| json!({"Ref": name}));
    for queue in queues {
        let all = good["Resources"].as_object().expect("resources").values();
        let mut policies = all.filter(|one| one["Type"] == "AWS::SQS::QueuePolicy");
        assert!(policies.any(|one| one["Properties"]["Queues"] == json!([queue])), "a rule may send to {queue}");
    }
}

/// What the alarm starts in each of these moments of a queue.
#[test]
fn a_machine_is_started_for_each_job_that_has_none() {
    let Some(stack) = template("aws/stack.yaml") else { return };
    let alarm = &stack["Resources"]["JobsWaiting"]["Properties"];
    let expression = alarm["Metrics"][0]["Expression"].as_str().expect("an expression");
    let measured: Vec<_> = alarm["Metrics"].as_array().expect("metrics")[1..]
        .iter()
        .map(|one| (one["Id"].as_str(), one["MetricStat"]["Metric"]["MetricName"].as_str()))
        .collect();
    let names = [
        (Some("waiting"), Some("ApproximateNumberOfMessagesVisible")),
        (Some("working"), Some("ApproximateNumberOfMessagesNotVisible")),
        (Some("machines"), Some("GroupDesiredCapacity")),
    ];
    assert_eq!(measured, names);
    const COMPUTE: &str = r#"
import json, sys
FILL = lambda value, other: other if value is None else value
for moment in json.loads(sys.argv[2]):
    print(eval(sys.argv[1], {"FILL": FILL}, dict(zip(("waiting", "working", "machines"), moment))))
"#;
    let steps = stack["Resources"]["OneMore"]["Properties"]["StepAdjustments"].as_array().expect("steps");
    let started = |missing: i64| {
        let above = missing - alarm["Threshold"].as_i64().expect("a threshold");
        let holds = |step: &&Value| {
            let bound = |key: &str| step[key].as_i64();
            bound("MetricIntervalLowerBound") <= Some(above)
                && bound("MetricIntervalUpperBound").is_none_or(|upper| above < upper)
        };
        steps.iter().find(holds).and_then(|step| step["ScalingAdjustment"].as_i64()).unwrap_or(0)
    };
    let moments = [
        // The first job after a long silence: neither metric of the group nor of held messages is there.
        (json!([1, null, null]), 1),
        (json!([null, null, null]), 0),
        // Its machine boots; then it has taken the job.
        (json!([1, 0, 1]), 0),
        (json!([0, 1, 1]), 0),
        // After twelve hours the machine has put its job back, and trains on.
        (json!([1, 0, 1]), 0),
        // Another job comes at that moment, or while the first is held.
        (json!([2, 0, 1]), 1),
        (json!([1, 1, 1]), 1),
        // Many jobs at once, with one machine at work and one that looks for work.
        (json!([5, 1, 2]), 4),
        (json!([3, 1, 2]), 2),
        // The machine of a job was taken away, and the group already replaces it.
        (json!([1, 0, 1]), 0),
    ];
    let given: Value = moments.iter().map(|(moment, _)| moment.clone()).collect();
    let output = python(COMPUTE, &[expression, &given.to_string()]).expect("the tools are there");
    let missing: Vec<i64> = said(&output).lines().map(|line| line.parse().expect("a number")).collect();
    for ((moment, wanted), missing) in moments.iter().zip(missing) {
        assert_eq!(started(missing), *wanted, "{moment}: {missing} machines are missing");
    }
}
