//! The CloudFormation templates: linted, checked for mistakes that the linter misses, and created.
use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{python, said, text, tool, yaml};
use crate::support::moto::Moto;

pub fn template(name: &str) -> Option<Value> {
    Some(yaml(&text(name))?.remove(0))
}

pub fn properties<'t>(template: &'t Value, resource: &str) -> &'t Value {
    &template["Resources"][resource]["Properties"]
}

/// The stack's template with this value of `Nodes`: what depends on nothing else is decided. `None`: the tools are
/// missing.
pub fn with_nodes(nodes: &str) -> Option<Value> {
    let mut stack = decided(&template("aws/stack.yaml")?, nodes);
    let resources = stack["Resources"].as_object_mut().expect("resources");
    resources.retain(|_, resource| nodes != "1" || resource["Condition"] != "Several");
    Some(stack)
}

/// CloudFormation's functions, as far as their arguments are known once `Nodes` is.
fn decided(value: &Value, nodes: &str) -> Value {
    let fields = match value {
        Value::Array(items) => return items.iter().map(|item| decided(item, nodes)).collect(),
        Value::Object(fields) => fields,
        other => return other.clone(),
    };
    if let Some(branches) = fields.get("Fn::If")
        && branches[0] == "Several"
    {
        return decided(&branches[if nodes == "1" { 2 } else { 1 }], nodes);
    }
    if fields.get("Ref").is_some_and(|name| name == "Nodes") {
        return nodes.into();
    }
    let fields = fields.iter().map(|(key, field)| (key.clone(), decided(field, nodes)));
    // A property that is left out.
    let fields: Map<_, _> = fields.filter(|(_, field)| *field != json!({"Ref": "AWS::NoValue"})).collect();
    let list = |function: &str| fields.get(function).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if let Some(Value::String(whole)) = fields.get("Fn::Sub")
        && whole.contains("${Nodes}")
    {
        return whole.replace("${Nodes}", nodes).into();
    }
    if let [Value::String(whole), Value::Object(values)] = list("Fn::Sub")
        && let Some(values) = values.iter().map(|(key, value)| Some((key, value.as_str()?))).collect::<Option<Vec<_>>>()
    {
        let insert = |whole: String, (key, value): &(&String, &str)| whole.replace(&format!("${{{key}}}"), value);
        return json!({"Fn::Sub": values.iter().fold(whole.clone(), insert)});
    }
    if let [Value::String(by), Value::String(whole)] = list("Fn::Split") {
        return whole.split(by.as_str()).map(Value::from).collect();
    }
    if let [Value::Number(at), Value::Array(items)] = list("Fn::Select") {
        return at.as_u64().and_then(|at| items.get(usize::try_from(at).ok()?)).expect("as many items").clone();
    }
    Value::Object(fields)
}

#[test]
fn templates_pass_cfn_lint() {
    for name in ["aws/stack.yaml", "aws/batch.yaml"] {
        let Some(mut lint) = tool("cfn-lint") else { return };
        let output = lint.arg(super::path(name)).output().expect("start cfn-lint");
        assert!(output.status.success(), "{name}: {}", said(&output));
        assert!(text(name).len() <= 51_200, "{name} is longer than what create-stack takes as text");
    }
}

/// Six fields; exactly one of day of month and day of week is a question mark; numbers are in their ranges.
/// <https://docs.aws.amazon.com/scheduler/latest/UserGuide/schedule-types.html>
fn scheduler_cron(expression: &str) -> Result<(), String> {
    let inner = expression.strip_prefix("cron(").and_then(|rest| rest.strip_suffix(')')).ok_or("is not cron(…)")?;
    let fields: Vec<&str> = inner.split(' ').collect();
    let [minute, hour, day, month, weekday, year] = fields[..] else {
        return Err(format!("has {} fields, not 6", fields.len()));
    };
    if (day == "?") == (weekday == "?") {
        return Err("needs one question mark, for the day of month or of week".into());
    }
    for (name, field, from, to) in [
        ("minute", minute, 0, 59),
        ("hour", hour, 0, 23),
        ("day", day, 1, 31),
        ("month", month, 1, 12),
        ("weekday", weekday, 1, 7),
        ("year", year, 1970, 2199),
    ] {
        for number in field.split([',', '-', '/']).filter(|part| !["*", "?", "L"].contains(part)) {
            match number.parse::<u32>() {
                Ok(number) if (from..=to).contains(&number) => {}
                _ if name == "weekday" && ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"].contains(&number) => {}
                _ => return Err(format!("{number} is no {name}")),
            }
        }
    }
    Ok(())
}

#[test]
fn schedules_have_the_schedulers_syntax() {
    for wrong in [
        "kron(0 6 1 * ? *)",
        "cron(0 6 1 1,4,7,10 *)",
        "cron(0 6 1 1,4,7,10 * *)",
        "cron(0 24 1 * ? *)",
        "cron(0 6 ? 13 MON *)",
        "cron(0 6 ? * ? *)",
    ] {
        assert!(scheduler_cron(wrong).is_err(), "{wrong}");
    }
    let Some(stack) = with_nodes("1") else { return };
    let expression = stack["Parameters"]["Schedule"]["Default"].as_str().expect("a default schedule");
    assert_eq!(scheduler_cron(expression), Ok(()), "{expression}");
    assert_eq!(expression, "cron(0 6 1 1,4,7,10 ? *)", "each quarter");
    let mut schedules = 0;
    for (name, resource) in stack["Resources"].as_object().expect("resources") {
        if resource["Type"] == "AWS::Scheduler::Schedule" {
            schedules += 1;
            assert_eq!(resource["Properties"]["ScheduleExpression"], json!({"Ref": "Schedule"}), "{name}");
            assert!(resource["Condition"].is_string(), "{name} would run beside the others");
            let target = &resource["Properties"]["Target"];
            // Only braces that a context attribute may have, and valid JSON once references become texts.
            let input = target["Input"].as_str().or_else(|| target["Input"]["Fn::Sub"].as_str()).expect("an input");
            serde_json::from_str::<Value>(input).unwrap_or_else(|error| panic!("{name}: {error}: {input}"));
        }
    }
    assert_eq!(schedules, 3);
    // Each attempt has its own id, which is also the run's: an attempt that arrived unnoticed would be a second run.
    let queue = properties(&stack, "QueueSchedule");
    assert!(queue["Target"]["Input"].to_string().contains("<aws.scheduler.execution-id>"));
    assert_eq!(queue["Target"]["RetryPolicy"]["MaximumRetryAttempts"], 3);
    let arn = &properties(&stack, "BootSchedule")["Target"]["Arn"]["Fn::Sub"];
    assert_eq!(arn, "arn:${AWS::Partition}:scheduler:::aws-sdk:autoscaling:setDesiredCapacity");
}

/// Mistakes that cfn-lint lets pass, or can't know.
#[test]
fn machines_are_bought_as_intended() {
    const KNOWN: &str = r#"
import json, botocore.session
session = botocore.session.Session()
print(json.dumps(session.get_service_model("ec2").shape_for("InstanceType").enum))
"#;
    let Some(known) = python(KNOWN, &[]) else { return };
    let known: Vec<String> = serde_json::from_slice(&known.stdout).expect("the types that EC2's model knows");
    assert!(
        known.iter().any(|name| name == "p5.48xlarge") && !known.iter().any(|name| name == "g6.2xlage"),
        "{}",
        known.len()
    );
    let stack = with_nodes("1").expect("the tools are there");
    let group = properties(&stack, "Group");
    let distribution = &group["MixedInstancesPolicy"]["InstancesDistribution"];
    // https://docs.aws.amazon.com/autoscaling/ec2/APIReference/API_InstancesDistribution.html
    assert_eq!(distribution["SpotAllocationStrategy"], "price-capacity-optimized");
    assert_eq!(distribution["OnDemandPercentageAboveBaseCapacity"], 0, "its default is 100");
    assert!(distribution.get("SpotMaxPrice").is_none());
    let of_the_template = &group["MixedInstancesPolicy"]["LaunchTemplate"];
    // One GPU each, of NVIDIA's; a list of types would be as long as the regions differ.
    let wanted = &of_the_template["Overrides"][0]["InstanceRequirements"];
    assert_eq!(of_the_template["Overrides"].as_array().map(Vec::len), Some(1));
    assert_eq!(wanted["AcceleratorCount"], json!({"Min": 1, "Max": 1}));
    assert_eq!(
        (&wanted["AcceleratorManufacturers"], &wanted["AcceleratorTypes"]),
        (&json!(["nvidia"]), &json!(["gpu"]))
    );
    assert_eq!(wanted["VCpuCount"], json!({"Min": {"Ref": "MinVcpus"}, "Max": {"Ref": "MaxVcpus"}}));
    assert_eq!(wanted["AcceleratorTotalMemoryMiB"], json!({"Min": {"Ref": "MinGpuMiB"}}));
    let allowed = json!({"Fn::Split": [",", {"Ref": "InstanceTypes"}]});
    assert_eq!(wanted["AllowedInstanceTypes"], allowed);
    // What a new account may start: the quota counts vCPUs, and xlarge has 4 of them, 2xlarge 8.
    let default = |name: &str| stack["Parameters"][name]["Default"].clone();
    assert_eq!((default("MinVcpus"), default("MaxVcpus")), (json!(4), json!(8)));
    let families = default("InstanceTypes").as_str().expect("a list").to_owned();
    for family in families.split(',') {
        for size in ["xlarge", "2xlarge"] {
            let name = family.replace('*', size);
            assert!(known.contains(&name), "{name} is no instance type");
        }
    }
    assert!(families.contains("g4dn.*"), "{families}");
    let version = &of_the_template["LaunchTemplateSpecification"]["Version"];
    assert_eq!(*version, json!({"Fn::GetAtt": "LaunchTemplate.LatestVersionNumber"}), "$Latest would never be updated");
    let data = &properties(&stack, "LaunchTemplate")["LaunchTemplateData"];
    assert!(
        data.get("InstanceMarketOptions").is_none(),
        "a group with mixed instances refuses a template that asks for spot"
    );
    assert!(data.get("InstanceType").is_none() && data.get("KeyName").is_none());
    assert_eq!(data["MetadataOptions"]["HttpTokens"], "required");
    assert_eq!(data["MetadataOptions"]["HttpPutResponseHopLimit"], 2);
    // Nothing would hold the newcomer back until its program is ready.
    assert_eq!(group["CapacityRebalance"], false);
    let only_if_said = json!({"Fn::If": ["BeginNow", {"Ref": "DesiredCapacity"}, {"Ref": "AWS::NoValue"}]});
    assert_eq!(group["DesiredCapacity"], only_if_said, "an update of the stack would end the machine that trains");
    let hook = &group["LifecycleHookSpecificationList"][0];
    assert_eq!(hook["LifecycleTransition"], "autoscaling:EC2_INSTANCE_TERMINATING");
    assert_eq!(hook["DefaultResult"], "CONTINUE");
    assert!((30..=7200).contains(&hook["HeartbeatTimeout"].as_u64().expect("a time-out")));
    let batch = template("aws/batch.yaml").expect("the tools are there");
    let types = batch["Parameters"]["InstanceTypes"]["Default"].as_str().expect("types of Batch").split(',');
    for one in types {
        assert!(known.iter().any(|name| name == one), "{one} is no instance type");
    }
}

/// Each permission: role, action, and its purpose. `*` only for actions that can't name a resource.
const GRANTS: &[&str] = &[
    "LoopRole autoscaling:SetDesiredCapacity the group",
    "LoopRole ssm:PutParameter arn:aws:ssm:here:parameter${SsmPath}-loop/task-token",
    "Role autoscaling:CompleteLifecycleAction the group",
    "Role autoscaling:DescribeAutoScalingInstances *",
    "Role autoscaling:DescribeLifecycleHooks *",
    "Role autoscaling:RecordLifecycleActionHeartbeat the group",
    "Role autoscaling:SuspendProcesses the group",
    "Role autoscaling:TerminateInstanceInAutoScalingGroup the group",
    "Role ecr:BatchCheckLayerAvailability arn:aws:ecr:here:repository/${RepositoryName}",
    "Role ecr:BatchGetImage arn:aws:ecr:here:repository/${RepositoryName}",
    "Role ecr:GetAuthorizationToken *",
    "Role ecr:GetDownloadUrlForLayer arn:aws:ecr:here:repository/${RepositoryName}",
    "Role logs:CreateLogStream LogGroup.Arn",
    "Role logs:PutLogEvents LogGroup.Arn",
    "Role s3:AbortMultipartUpload ${Bucket.Arn}/*",
    "Role s3:DeleteObject ${Bucket.Arn}/*",
    "Role s3:GetLifecycleConfiguration Bucket.Arn",
    "Role s3:GetObject ${Bucket.Arn}/*",
    "Role s3:GetObject arn:aws:s3:::${ReadBucket}/* if HasReadBucket",
    "Role s3:ListBucket Bucket.Arn",
    "Role s3:ListBucket arn:aws:s3:::${ReadBucket} if HasReadBucket",
    "Role s3:ListBucketMultipartUploads Bucket.Arn",
    "Role s3:ListMultipartUploadParts ${Bucket.Arn}/*",
    "Role s3:PutObject ${Bucket.Arn}/*",
    "Role servicequotas:GetAWSDefaultServiceQuota *",
    "Role servicequotas:GetServiceQuota *",
    "Role sns:Publish Topic",
    "Role sqs:ChangeMessageVisibility Queue.Arn",
    "Role sqs:DeleteMessage Queue.Arn",
    "Role sqs:GetQueueAttributes Queue.Arn",
    "Role sqs:ReceiveMessage Queue.Arn",
    "Role sqs:SendMessage Queue.Arn",
    "Role ssm:GetParameter arn:aws:ssm:here:parameter${SsmPath}-loop/task-token",
    "Role ssm:GetParametersByPath arn:aws:ssm:here:parameter${SsmPath}",
    "Role ssm:UpdateInstanceInformation *",
    "Role ssmmessages:CreateControlChannel *",
    "Role ssmmessages:CreateDataChannel *",
    "Role ssmmessages:OpenControlChannel *",
    "Role ssmmessages:OpenDataChannel *",
    "Role states:SendTaskFailure arn:aws:states:here:stateMachine:${AWS::StackName}-loop if IsLoop",
    "Role states:SendTaskHeartbeat arn:aws:states:here:stateMachine:${AWS::StackName}-loop if IsLoop",
    "Role states:SendTaskSuccess arn:aws:states:here:stateMachine:${AWS::StackName}-loop if IsLoop",
    "ScheduleRole autoscaling:SetDesiredCapacity the group",
    "ScheduleRole sqs:SendMessage DeadLetters.Arn",
    "ScheduleRole sqs:SendMessage Queue.Arn",
    "ScheduleRole states:StartExecution Loop if IsLoop",
    "WakePolicy autoscaling:DescribeAutoScalingGroups *",
    "WakePolicy autoscaling:SetDesiredCapacity the group",
    "WakePolicy sqs:GetQueueAttributes Queue.Arn",
    "WakePolicy sqs:SendMessage Queue.Arn",
];

/// The grants of the stack's roles, in the form of [`GRANTS`].
fn granted(stack: &Value) -> BTreeSet<String> {
    fn list(value: &Value) -> Vec<&Value> {
        value.as_array().map_or_else(|| vec![value], |values| values.iter().collect())
    }
    let mut granted = BTreeSet::new();
    for (name, resource) in stack["Resources"].as_object().expect("resources") {
        let (role, managed) = ("AWS::IAM::Role", "AWS::IAM::ManagedPolicy");
        if resource["Type"] != role && resource["Type"] != managed {
            continue;
        }
        // Their grants on every resource are in no file of ours: AmazonSSMManagedInstanceCore reads every parameter.
        assert!(resource["Properties"].get("ManagedPolicyArns").is_none(), "{name}");
        let policies =
            if resource["Type"] == role { &resource["Properties"]["Policies"] } else { &resource["Properties"] };
        for policy in list(policies) {
            for statement in policy["PolicyDocument"]["Statement"].as_array().expect("statements") {
                let (condition, statement) = match statement.get("Fn::If") {
                    Some(branches) => (format!(" if {}", branches[0].as_str().expect("a condition")), &branches[1]),
                    None => (String::new(), statement),
                };
                assert_eq!(statement["Effect"], "Allow");
                for action in list(&statement["Action"]) {
                    for resource in list(&statement["Resource"]) {
                        let short = ["Fn::Sub", "Fn::GetAtt", "Ref"].iter().find_map(|function| resource.get(function));
                        let resource = short.unwrap_or(resource).as_str().expect("what it is for");
                        let resource = resource.replace(
                            "arn:${AWS::Partition}:autoscaling:${AWS::Region}:${AWS::AccountId}:autoScalingGroup:*:autoScalingGroupName/${AWS::StackName}",
                            "the group",
                        );
                        let resource = resource
                            .replace("${AWS::Region}:${AWS::AccountId}", "here")
                            .replace("${AWS::Partition}", "aws");
                        granted.insert(format!("{name} {} {resource}{condition}", action.as_str().expect("an action")));
                    }
                }
            }
        }
    }
    granted
}

#[test]
fn no_port_is_open_and_permissions_name_their_resources() {
    let Some(stack) = template("aws/stack.yaml") else { return };
    let group = properties(&stack, "SecurityGroup");
    assert_eq!(group["SecurityGroupIngress"], json!([]));
    assert_eq!(group["SecurityGroupEgress"].as_array().map(Vec::len), Some(1));
    let bucket = properties(&stack, "Bucket");
    let block = bucket["PublicAccessBlockConfiguration"].as_object().expect("a public access block");
    assert!(block.len() == 4 && block.values().all(|value| *value == true), "{block:?}");
    let versions = json!({"Fn::If": ["HasVersions", {"Status": {"Ref": "Versioning"}}, {"Ref": "AWS::NoValue"}]});
    assert_eq!(bucket["VersioningConfiguration"], versions);
    assert_eq!(stack["Parameters"]["Versioning"]["Default"], "Enabled");
    let rules = &bucket["LifecycleConfiguration"]["Rules"];
    assert_eq!(rules[0]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"], 1);
    // Pruned data is paid for all that time, and a run prunes hundreds of checkpoints a day.
    assert_eq!(rules[1]["NoncurrentVersionExpiration"]["NoncurrentDays"], 1);
    assert_eq!(granted(&stack), GRANTS.iter().map(|line| line.to_string()).collect::<BTreeSet<_>>());
    // The configuration can be read before this stack's own bucket exists, and only from addresses that the program
    // knows.
    let role = properties(&stack, "Role").to_string();
    assert!(role.contains("s3:::${ReadBucket}/*") && role.contains("s3:::${ReadBucket}\""), "{role}");
    assert_eq!(stack["Parameters"]["ConfigUri"]["AllowedPattern"], "(s3://.+)?");
    // A rule of EventBridge can send only if the queue's own policy lets it.
    let policy = properties(&stack, "QueuePolicy").to_string();
    assert!(policy.contains("events.amazonaws.com") && policy.contains("sqs:SendMessage"), "{policy}");
    // The disk of the default image has 75 GB; a smaller one is refused at each launch.
    assert!(stack["Parameters"]["DiskGiB"]["MinValue"].as_u64() >= Some(75));
    // Interruptions do not count as receives, so a broken job costs only this many tries.
    let redrive = &properties(&stack, "Queue")["RedrivePolicy"];
    assert_eq!(redrive["maxReceiveCount"], 6);
    let given_up = properties(&stack, "LostWork")["AlarmDescription"].as_str().expect("a description");
    assert!(given_up.contains("after 6 failures"), "{given_up}");
    // An execution that does not end in one of its own states leaves its machine on, so a person must be told.
    let ended = properties(&stack, "LoopEnded")["Metrics"].as_array().expect("metrics");
    for (metric, end) in ended[1..].iter().zip(["Failed", "TimedOut", "Aborted"]) {
        let counted = json!({"Namespace": "AWS/States", "MetricName": format!("Executions{end}"),
            "Dimensions": [{"Name": "StateMachineArn", "Value": {"Ref": "Loop"}}]});
        assert_eq!((&metric["MetricStat"]["Metric"], &metric["MetricStat"]["Stat"]), (&counted, &json!("Sum")));
    }
    let alarm = properties(&stack, "LagAlarm");
    assert_eq!(alarm["TreatMissingData"], "notBreaching", "no machine, no lag");
    let metric = properties(&stack, "LagMetric");
    assert_eq!(metric["MetricTransformations"][0]["MetricValue"], "$.lag_s");
    assert_eq!(metric["MetricTransformations"][0]["MetricName"], alarm["MetricName"]);
    assert_eq!(metric["MetricTransformations"][0]["MetricNamespace"], alarm["Namespace"]);
    assert_eq!(metric["FilterPattern"], "{ $.lag_s >= 0 }", "the field of `step` events, a number");
}

#[test]
fn nothing_fails_unheard() {
    let Some(stack) = template("aws/stack.yaml") else { return };
    let group = properties(&stack, "Group");
    // A notification for each launch that fails would be a mail every few minutes, for hours.
    assert_eq!(group.get("NotificationConfigurations"), None);
    let none = properties(&stack, "NoMachine")["Metrics"].as_array().expect("metrics");
    assert_eq!(none[0]["Expression"], "FILL(wanted, 0) - FILL(machines, 0)", "no quota, no capacity, no such AMI");
    for (metric, (name, stat)) in
        none[1..].iter().zip([("GroupDesiredCapacity", "Minimum"), ("GroupInServiceInstances", "Maximum")])
    {
        assert_eq!(
            (&metric["MetricStat"]["Metric"]["MetricName"], &metric["MetricStat"]["Stat"]),
            (&json!(name), &json!(stat))
        );
    }
    // Each alarm that starts no machine notifies a person, in every way to begin a run.
    let alarms: Vec<_> = stack["Resources"]
        .as_object()
        .expect("resources")
        .iter()
        .filter(|(_, one)| one["Type"] == "AWS::CloudWatch::Alarm")
        .collect();
    let mut looked_at = 0;
    for (name, alarm) in &alarms {
        let action = if *name == "JobsWaiting" { "OneMore" } else { "Topic" };
        assert_eq!(alarm["Properties"]["AlarmActions"], json!([{"Ref": action}]), "{name}");
        assert_eq!(alarm["Properties"]["TreatMissingData"], "notBreaching", "{name}");
        looked_at += alarm["Properties"]["Metrics"].as_array().map_or(1, |metrics| metrics.len() - 1);
    }
    assert_eq!((alarms.len(), looked_at), (7, 13), "what the opening comment of stack.yaml says of their cost");
    // A job that waits longer than a job can be in progress: a message is held for 12 hours at most.
    let old = properties(&stack, "JobsOld");
    assert_eq!((&old["MetricName"], &old["Statistic"]), (&json!("ApproximateAgeOfOldestMessage"), &json!("Maximum")));
    assert_eq!(old["Dimensions"], json!([{"Name": "QueueName", "Value": {"Fn::GetAtt": "Queue.QueueName"}}]));
    let (threshold, kept) = (old["Threshold"].as_u64(), properties(&stack, "Queue")["MessageRetentionPeriod"].as_u64());
    assert!(threshold > Some(12 * 3600) && threshold < kept, "{threshold:?} of {kept:?}");
    // A hanging machine prints no lag.
    let silence = properties(&stack, "Silence");
    let metrics = silence["Metrics"].as_array().expect("metrics");
    assert_eq!(metrics[0]["Expression"], "IF(FILL(machines, 0) > 0 AND FILL(lag, -1) < 0, 1, 0)");
    let machines = json!({"Namespace": "AWS/AutoScaling", "MetricName": "GroupInServiceInstances",
        "Dimensions": [{"Name": "AutoScalingGroupName", "Value": {"Ref": "Group"}}]});
    assert_eq!((&metrics[1]["Id"], &metrics[1]["MetricStat"]["Metric"]), (&json!("machines"), &machines));
    assert_eq!(
        group["MetricsCollection"][0]["Metrics"],
        json!(["GroupDesiredCapacity", "GroupInServiceInstances"]),
        "it is counted only if asked for"
    );
    let lag = &properties(&stack, "LagMetric")["MetricTransformations"][0];
    let lag = json!({"Namespace": lag["MetricNamespace"], "MetricName": lag["MetricName"]});
    assert_eq!((&metrics[2]["Id"], &metrics[2]["MetricStat"]["Metric"]), (&json!("lag"), &lag));
    assert!(metrics[1..].iter().all(|one| one["ReturnData"] == false), "{metrics:?}");
    // The log is that of a container.
    assert_eq!(stack["Resources"]["Silence"]["Condition"], "HasImage");
}

#[test]
fn a_waiting_job_ends_no_working_machine() {
    let Some(stack) = template("aws/stack.yaml") else { return };
    let policy = properties(&stack, "OneMore");
    // An exact number would lower the capacity of a group that has more; the group's own MaxSize limits it.
    assert_eq!(policy["AdjustmentType"], "ChangeInCapacity");
    // The alarm repeats its request each minute.
    assert!(policy["EstimatedInstanceWarmup"].as_u64() >= Some(600), "{policy}");
}

#[test]
fn batch_starts_again_on_the_codes_that_ask_for_it() {
    let Some(template) = template("aws/batch.yaml") else { return };
    // Its parameter SecurityGroupIds is described as that output.
    let Some(stack) = super::stack::template("aws/stack.yaml") else { return };
    assert_eq!(stack["Outputs"]["SecurityGroupId"]["Value"], json!({"Fn::GetAtt": "SecurityGroup.GroupId"}));
    let strategy = &properties(&template, "JobDefinition")["RetryStrategy"];
    let rules = strategy["EvaluateOnExit"].as_array().expect("rules");
    assert!(rules.len() <= 5, "Batch takes five");
    let again: Vec<_> =
        rules.iter().filter(|rule| rule["Action"] == "RETRY").filter_map(|rule| rule["OnExitCode"].as_str()).collect();
    assert_eq!(again, ["75", "76", "69"]);
    assert_eq!(rules[0]["OnStatusReason"], "Host EC2*");
    assert_eq!(rules[4], json!({"Action": "EXIT", "OnReason": "*"}), "all else ends it");
    // Without a way out, in a subnet that gives no address, a job stays RUNNABLE:
    // https://docs.aws.amazon.com/batch/latest/userguide/troubleshooting.html
    let network = &properties(&template, "LaunchTemplate")["LaunchTemplateData"]["NetworkInterfaces"][0];
    assert_eq!(
        (&network["AssociatePublicIpAddress"], &network["Groups"]),
        (&json!(true), &json!({"Ref": "SecurityGroupIds"}))
    );
    let machines = &properties(&template, "Machines")["ComputeResources"];
    assert_eq!(machines.get("SecurityGroupIds"), None, "they belong to the interface");
    assert_eq!(machines["InstanceTypes"], json!({"Ref": "InstanceTypes"}));
    let data = properties(&template, "LaunchTemplate").to_string();
    assert!(
        data.contains("ECS_ENABLE_SPOT_INSTANCE_DRAINING=true") && data.contains("ECS_CONTAINER_STOP_TIMEOUT=110s")
    );
}

/// moto reports each type that it does not know and drops; this is the whole list.
const DROPPED: [&str; 6] = [
    "AWS::AutoScaling::ScalingPolicy",
    "AWS::CloudWatch::Alarm",
    "AWS::Logs::MetricFilter",
    "AWS::S3::BucketPolicy",
    "AWS::SQS::QueuePolicy",
    "AWS::Scheduler::Schedule",
];

/// The stack's template, with an AMI parameter that exists on moto (which looks up the default even if another is
/// given).
pub fn template_for_moto() -> String {
    let template = text("aws/stack.yaml");
    let default =
        template.split_once("Default: /aws/service/").expect("the AMI's parameter").1.lines().next().expect("its name");
    template.replace(&format!("/aws/service/{default}"), "/images/gpu")
}

/// The text in the first `<tag>` of an answer after `from`.
pub fn tagged<'a>(answer: &'a str, tag: &str) -> &'a str {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    answer
        .split_once(&open)
        .and_then(|(_, rest)| rest.split_once(&close))
        .map_or_else(|| panic!("no {tag} in {answer}"), |(text, _)| text)
}

pub fn create(moto: &Moto, name: &str, work: &str) {
    create_nodes(moto, name, work, "1");
}

pub fn create_nodes(moto: &Moto, name: &str, work: &str, nodes: &str) {
    change(moto, "CreateStack", name, &[("ConfigUri", "s3://configs/reports.toml"), ("Work", work), ("Nodes", nodes)]);
    let stacks = moto.query("cloudformation", "2010-05-15", "DescribeStacks", &[("StackName", name)]);
    assert_eq!(tagged(&stacks, "StackStatus"), "CREATE_COMPLETE", "{stacks}");
}

/// Creates or updates a stack with these parameters, and some others without which there is none.
pub fn change(moto: &Moto, action: &str, name: &str, given: &[(&str, &str)]) {
    let images = moto.query("ec2", "2016-11-15", "DescribeImages", &[]);
    let image =
        json!({"Name": "/images/gpu", "Value": tagged(&images, "imageId"), "Type": "String", "Overwrite": true});
    moto.json("ssm", "AmazonSSM.PutParameter", &image);
    let subnets = moto.query("ec2", "2016-11-15", "DescribeSubnets", &[]);
    // Two zones of the default network.
    let zones: Vec<_> =
        subnets.split("<subnetId>").skip(1).map(|rest| rest.split('<').next().expect("an id")).collect();
    let path = format!("/trainer/{name}");
    let zones = zones[..2].join(",");
    let mut parameters: Vec<(String, String)> = vec![
        ("StackName".into(), name.into()),
        ("TemplateBody".into(), template_for_moto()),
        ("Capabilities.member.1".into(), "CAPABILITY_IAM".into()),
    ];
    let values = [
        ("VpcId", tagged(&subnets, "vpcId")),
        ("SubnetIds", &zones),
        ("ImageId", "/images/gpu"),
        ("ReadBucket", "configs"),
        ("Image", "123456789012.dkr.ecr.us-east-1.amazonaws.com/trainer:1"),
        ("SsmPath", &path),
    ];
    let others = values.into_iter().filter(|(key, _)| given.iter().all(|(other, _)| other != key));
    for (number, (key, value)) in others.chain(given.iter().copied()).enumerate() {
        parameters.push((format!("Parameters.member.{}.ParameterKey", number + 1), key.into()));
        parameters.push((format!("Parameters.member.{}.ParameterValue", number + 1), value.into()));
    }
    let parameters: Vec<_> = parameters.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    moto.query("cloudformation", "2010-05-15", action, &parameters);
}

#[test]
fn the_stack_is_created_except_for_the_types_that_moto_does_not_know() {
    let Some(moto) = Moto::start("configs") else { return };
    for (name, work) in [("booted", "boot"), ("queued", "queue"), ("looped", "loop")] {
        create(&moto, name, work);
        let answer = moto.query("cloudformation", "2010-05-15", "DescribeStackResources", &[("StackName", name)]);
        let stack = template("aws/stack.yaml").expect("the tools are there");
        for (resource, definition) in stack["Resources"].as_object().expect("resources") {
            let wanted = match definition["Condition"].as_str() {
                Some("IsBoot") => work == "boot",
                Some("IsQueue") => work == "queue",
                Some("IsLoop") => work == "loop",
                Some("HasEmail") => false,
                Some("HasImage" | "HasConfigUri") => true,
                Some("HasConfig" | "HasApiPort") => false,
                Some("HasJob") => work == "queue",
                Some("Several") => false,
                Some(other) => panic!("unknown condition {other}"),
                None => true,
            };
            let kind = definition["Type"].as_str().expect("a type");
            let is_there = answer.contains(&format!("<LogicalResourceId>{resource}</LogicalResourceId>"));
            assert_eq!(
                is_there,
                wanted && !DROPPED.contains(&kind),
                "{resource}, a {kind}, with Work={work}: {answer}"
            );
        }
        let groups = moto.query(
            "autoscaling",
            "2011-01-01",
            "DescribeAutoScalingGroups",
            &[("AutoScalingGroupNames.member.1", name)],
        );
        assert_eq!(tagged(&groups, "DesiredCapacity"), "0", "nothing runs before its time");
        assert_eq!(tagged(&groups, "OnDemandPercentageAboveBaseCapacity"), "0");
        assert_eq!(tagged(&groups, "SpotAllocationStrategy"), "price-capacity-optimized");
        let request = json!({"Path": format!("/trainer/{name}"), "Recursive": true});
        let parameters = moto.json("ssm", "AmazonSSM.GetParametersByPath", &request);
        let parameters = parameters["Parameters"].as_array().expect("parameters");
        let value = |key: &str| {
            let name = format!("/trainer/{name}/{key}");
            parameters.iter().find(|one| one["Name"] == name).map(|one| one["Value"].as_str().expect("text").to_owned())
        };
        assert_eq!(value("config-uri").as_deref(), Some("s3://configs/reports.toml"));
        assert_eq!(value("run-id-template").as_deref(), Some("reports-{year}q{quarter}"));
        assert_eq!(value("time-zone").as_deref(), Some("UTC"), "the schedule's");
        assert_eq!(value("set/on_complete.action").as_deref(), Some("terminate"));
        assert!(value("store").is_some_and(|store| store.starts_with("s3://") && store.ends_with("/runs")));
    }
    let templates = moto.query("ec2", "2016-11-15", "DescribeLaunchTemplates", &[]);
    let request = [("LaunchTemplateId", tagged(&templates, "launchTemplateId"))];
    let data = moto.query("ec2", "2016-11-15", "DescribeLaunchTemplateVersions", &request);
    assert_eq!(tagged(&data, "httpTokens"), "required");
    assert!(!data.contains("instanceMarketOptions"));
    let dropped: std::collections::BTreeSet<_> = moto
        .log()
        .lines()
        .filter_map(|line| line.split_once("No Moto CloudFormation support for "))
        .map(|(_, kind)| kind.trim().to_owned())
        .collect();
    assert_eq!(
        dropped.into_iter().collect::<Vec<_>>(),
        DROPPED,
        "what moto drops is checked by this file's other tests"
    );
}
