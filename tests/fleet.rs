//! `trainer wake`, `trainer stop`, and what `trainer doctor` asks before there is a machine, with moto's Auto Scaling,
//! SQS, EC2 and ECR.

use serde_json::{Value, json};

use crate::{
    support::{
        lab::{Lab, Store},
        moto::Moto,
        trainer::{Finished, Trainer},
    },
    userdata::stand_ins::Cloud,
};

const VERSION: &str = "2011-01-01";
const GROUP: [(&str, &str); 1] = [("AutoScalingGroupName", "fleet")];

struct Fleet {
    lab: Lab,
    moto: std::sync::Arc<Moto>,
}

impl Fleet {
    /// A group of up to three machines, without one. `None`: moto is not installed.
    fn open() -> Option<Self> {
        let lab = Lab::on_moto()?;
        let Store::Moto(moto) = lab.store.clone() else { unreachable!("made on moto") };
        let fleet = Self { lab, moto };
        fleet.scaling(
            "CreateLaunchConfiguration",
            &[("LaunchConfigurationName", "plain"), ("ImageId", "ami-12c6146b"), ("InstanceType", "g5.xlarge")],
        );
        let sizes = [("MinSize", "0"), ("MaxSize", "3"), ("DesiredCapacity", "0")];
        let place = [("LaunchConfigurationName", "plain"), ("AvailabilityZones.member.1", "us-east-1a")];
        fleet.scaling("CreateAutoScalingGroup", &[&GROUP[..], &sizes, &place].concat());
        Some(fleet)
    }
    fn scaling(&self, action: &str, parameters: &[(&str, &str)]) -> String {
        self.moto.query("autoscaling", VERSION, action, parameters)
    }
    fn suspend(&self, process: &str) {
        self.scaling("SuspendProcesses", &[GROUP[0], ("ScalingProcesses.member.1", process)]);
    }
    fn command(&self, arguments: &[&str]) -> Trainer {
        self.lab.command(arguments).args(&["--group", "fleet", "--json"])
    }
    /// The command's line of JSON.
    #[track_caller]
    fn does(&self, arguments: &[&str]) -> Value {
        let life = self.command(arguments).finish().expect_code(0);
        serde_json::from_str(life.stdout.lines().next().unwrap_or_default())
            .unwrap_or_else(|_| panic!("{}", life.story()))
    }
    #[track_caller]
    fn refuses(&self, arguments: &[&str], code: i32, said: &[&str]) -> Finished {
        self.command(arguments).finish().expect_code(code).expect_said(said)
    }
    /// What the group itself says.
    #[track_caller]
    fn expect(&self, capacity: u32, suspended: &[&str]) {
        let text = self.scaling("DescribeAutoScalingGroups", &[("AutoScalingGroupNames.member.1", "fleet")]);
        assert!(text.contains(&format!("<DesiredCapacity>{capacity}</DesiredCapacity>")), "{text}");
        for process in ["AlarmNotification", "Launch"] {
            let is = text.contains(&format!("<ProcessName>{process}</ProcessName>"));
            assert_eq!(is, suspended.contains(&process), "{process}: {text}");
        }
    }
    fn queue(&self, jobs: u32) -> String {
        let made = self.moto.json("sqs", "AmazonSQS.CreateQueue", &json!({"QueueName": "jobs"}));
        let path = made["QueueUrl"].as_str().and_then(|url| url.splitn(4, '/').nth(3)).expect("a queue's URL");
        let url = format!("{}/{path}", self.moto.endpoint());
        for job in 0..jobs {
            let message = json!({"QueueUrl": url, "MessageBody": format!("job {job}")});
            self.moto.json("sqs", "AmazonSQS.SendMessage", &message);
        }
        url
    }
    fn take(&self, url: &str) {
        let request = json!({"QueueUrl": url, "VisibilityTimeout": 3600});
        let got = self.moto.json("sqs", "AmazonSQS.ReceiveMessage", &request);
        assert_eq!(got["Messages"].as_array().map(Vec::len), Some(1), "{got}");
    }
}

#[test]
fn a_group_gets_a_machine_for_each_job_up_to_its_most() {
    let Some(fleet) = Fleet::open() else { return };
    let queue = fleet.queue(1);
    let wake = ["wake", "--queue", queue.as_str()];
    let said = fleet.does(&wake);
    let expected = json!({
        "group": "fleet", "before": 0, "capacity": 1, "max": 3, "waiting": 1, "at_work": 0, "alarms": true,
    });
    assert_eq!(said, expected);
    // Called again while the machine still starts.
    assert_eq!(fleet.does(&wake)["before"], 1);
    fleet.expect(1, &[]);
    // The job is at work; another one comes.
    fleet.take(&queue);
    fleet.queue(1);
    assert_eq!(fleet.does(&wake)["capacity"], 2);
    fleet.queue(7);
    let life = fleet.command(&wake).finish().expect_code(0);
    life.expect_said(&["3 machines (before: 2); 9 machines would have work, but its MaxSize is 3"]);
    fleet.expect(3, &[]);
    // Without a queue it is never made smaller.
    assert_eq!(fleet.does(&["wake", "--machines", "1"])["capacity"], 3);
    fleet.expect(3, &[]);
}

#[test]
fn a_group_that_is_held_or_starts_nothing_is_named() {
    let Some(fleet) = Fleet::open() else { return };
    fleet.suspend("AlarmNotification");
    fleet.refuses(&["wake"], 69, &["group fleet is held", "trainer wake --group fleet --release"]);
    fleet.expect(0, &["AlarmNotification"]);
    assert_eq!(fleet.does(&["wake", "--release"])["capacity"], 1);
    fleet.expect(1, &[]);
    fleet.suspend("Launch");
    fleet.refuses(&["wake", "--release"], 78, &["suspended its process Launch", "resume-processes"]);
    let nowhere = fleet.lab.command(&["wake", "--group", "nowhere"]).finish().expect_code(78);
    nowhere.expect_said(&["there is no Auto Scaling group \"nowhere\"", "--region"]);
    let queue = fleet.queue(0).replace("jobs", "no-such-queue");
    fleet.refuses(&["wake", "--queue", &queue], 78, &["count the messages of the queue"]);
}

#[test]
fn a_group_that_is_stopped_has_no_machine_and_its_run_has_saved() {
    let Some(fleet) = Fleet::open() else { return };
    fleet.does(&["wake", "--machines", "2"]);
    // The run of its machine, which here is a process.
    let running = fleet.lab.run("fleets").args(&["--set", "train.steps=100000"]).start();
    running.wait_for_step("step", 3);
    let uri = fleet.lab.uri();
    let stop = ["stop", "--hold", "--run-id", "fleets", "--store", uri.as_str()];
    let said = fleet.command(&stop).finish().expect_code(0);
    let life = running.finish().expect_code(75);
    assert_eq!(life.last("interrupted").value["lost_steps"], 0, "{}", life.story());
    said.expect_said(&["group fleet is told to have no machine", "until `trainer wake --group fleet --release`"]);
    fleet.expect(0, &["AlarmNotification"]);
    // Again: there is nothing left to do, and that is no error.
    fleet.command(&stop).finish().expect_code(0).expect_said(&["run fleets is not running: it is interrupted"]);
    // A group that may not be without machines.
    fleet.scaling("UpdateAutoScalingGroup", &[GROUP[0], ("MinSize", "1")]);
    fleet.refuses(&["stop"], 78, &["always has 1 machine", "--min-size 0"]);
}

/// The content of the first element of this name.
#[track_caller]
fn tagged<'a>(text: &'a str, name: &str) -> &'a str {
    let inner = text.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once(&format!("</{name}>")));
    inner.unwrap_or_else(|| panic!("no {name}: {text}")).0
}

/// The line of `trainer doctor` about one subject.
#[track_caller]
fn line(life: &Finished, check: &str) -> Value {
    let fits = |event: &&crate::support::trainer::Event| event.value["check"] == check;
    life.events.iter().find(fits).unwrap_or_else(|| panic!("no line {check}\n{}", life.story())).value.clone()
}

#[test]
fn a_deployment_is_checked_before_there_is_a_machine() {
    let Some(lab) = Lab::on_moto() else { return };
    let Store::Moto(moto) = lab.store.clone() else { unreachable!("made on moto") };
    let ec2 = |action: &str, parameters: &[(&str, &str)]| moto.query("ec2", "2016-11-15", action, parameters);
    let network = ec2("CreateVpc", &[("CidrBlock", "10.7.0.0/16")]);
    let network = tagged(&network, "vpcId");
    let subnet = |block: &str, zone: &str| {
        let made = ec2("CreateSubnet", &[("VpcId", network), ("CidrBlock", block), ("AvailabilityZone", zone)]);
        tagged(&made, "subnetId").to_owned()
    };
    let (open, closed) = (subnet("10.7.1.0/24", "us-east-1a"), subnet("10.7.2.0/24", "us-east-1b"));
    let gateway = ec2("CreateInternetGateway", &[]);
    let gateway = tagged(&gateway, "internetGatewayId");
    ec2("AttachInternetGateway", &[("InternetGatewayId", gateway), ("VpcId", network)]);
    let table = ec2("CreateRouteTable", &[("VpcId", network)]);
    let table = tagged(&table, "routeTableId");
    let route = [("RouteTableId", table), ("DestinationCidrBlock", "0.0.0.0/0"), ("GatewayId", gateway)];
    ec2("CreateRoute", &route);
    ec2("AssociateRouteTable", &[("RouteTableId", table), ("SubnetId", &open)]);

    let repository = json!({"repositoryName": "trainer"});
    moto.json("ecr", "AmazonEC2ContainerRegistry_V20150921.CreateRepository", &repository);
    let layer = json!({"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "size": 3_000_000_000_u64,
        "digest": format!("sha256:{}", "1".repeat(64))});
    let config = json!({"mediaType": "application/vnd.docker.container.image.v1+json", "size": 7,
        "digest": format!("sha256:{}", "2".repeat(64))});
    let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": config, "layers": [layer]});
    let image = json!({"repositoryName": "trainer", "imageManifest": manifest.to_string(), "imageTag": "one"});
    let put = moto.json("ecr", "AmazonEC2ContainerRegistry_V20150921.PutImage", &image);
    let digest = put["image"]["imageId"]["imageDigest"].as_str().expect("a digest").to_owned();

    let registry = "123456789012.dkr.ecr.us-east-1.amazonaws.com/trainer";
    let doctor = |subnets: &[&str], image: &str| {
        let image = format!("{registry}{image}");
        let named = subnets.iter().flat_map(|subnet| ["--subnet", subnet]);
        let machines = ["doctor", "--region", "us-east-1", "--instance-type", "g4dn.xlarge", "--image", &image];
        lab.command(&machines.into_iter().chain(named).collect::<Vec<_>>()).json().finish()
    };
    let life = doctor(&[&open], &format!("@{digest}"));
    // A subnet of one's own gives no address by itself.
    assert_eq!(line(&life, "way out")["verdict"], "warn", "{}", life.story());
    ec2("ModifySubnetAttribute", &[("SubnetId", &open), ("MapPublicIpOnLaunch.Value", "true")]);
    let life = doctor(&[&open], &format!("@{digest}"));
    for check in ["way out", "offered type", "image"] {
        assert_eq!(line(&life, check)["verdict"], "ok", "{check}\n{}", life.story());
    }
    // moto counts the manifest alone.
    assert!(line(&life, "image")["found"].to_string().contains(" to fetch"), "{}", life.story());
    let life = doctor(&[&open, &closed], ":one").expect_code(78);
    assert!(line(&life, "way out")["found"].to_string().ends_with(&format!("out of {closed}\"")), "{}", life.story());
    assert_eq!(line(&life, "image")["verdict"], "warn", "{}", life.story());
    let life = doctor(&[&open], ":two").expect_code(78);
    assert!(line(&life, "image")["found"].to_string().contains("ImageNotFound"), "{}", life.story());
    let life = doctor(&["subnet-00000000"], ":one").expect_code(78);
    assert!(line(&life, "way out")["found"].to_string().contains("InvalidSubnetID.NotFound"), "{}", life.story());
    let there = ["doctor", "--region", "us-east-1", "--instance-type", "p9.xlarge", "--subnet", &open];
    let life = lab.command(&there).json().finish().expect_code(78);
    assert!(
        line(&life, "offered type")["found"].to_string().contains("us-east-1 has no p9.xlarge"),
        "{}",
        life.story()
    );
}

#[test]
fn what_machines_start_from_and_read_is_checked_before_there_is_one() {
    let Some(lab) = Lab::on_moto() else { return };
    let Store::Moto(moto) = lab.store.clone() else { unreachable!("made on moto") };
    let images = moto.query("ec2", "2016-11-15", "DescribeImages", &[]);
    let known = tagged(&images, "imageId").to_owned();
    let made = [("ImageId", known.as_str()), ("InstanceType", "t3.micro"), ("MinCount", "1"), ("MaxCount", "1")];
    let machine = moto.query("ec2", "2016-11-15", "RunInstances", &made);
    // Images of our own, with a driver in the name and without.
    let image = |name: &str| {
        let from = [("InstanceId", tagged(&machine, "instanceId")), ("Name", name)];
        tagged(&moto.query("ec2", "2016-11-15", "CreateImage", &from), "imageId").to_owned()
    };
    let (new, old, unsaid) = (image("gpu nvidia-580"), image("gpu NVIDIA driver 570.86"), image("plain"));
    moto.json(
        "ssm",
        "AmazonSSM.PutParameter",
        &json!({"Name": "/images/gpu", "Value": new, "Type": "String", "Overwrite": true}),
    );
    let look = |ami: &str| lab.command(&["doctor", "--region", "us-east-1", "--ami", ami]).json().finish();
    for (ami, verdict, says) in [
        ("/images/gpu", "ok", "NVIDIA driver 580"),
        (new.as_str(), "ok", "NVIDIA driver 580"),
        (&old, "fail", "its NVIDIA driver is 570"),
        (&unsaid, "warn", "driver not checked"),
        ("ami-00000000", "fail", "ami-00000000"),
        ("/images/none", "fail", "/images/none"),
    ] {
        let life = look(ami);
        let line = line(&life, "machine image");
        assert_eq!(line["verdict"], verdict, "{ami}\n{}", life.story());
        assert!(line["found"].to_string().contains(says), "{ami}: {line}");
    }

    // moto has no simulator of policies: an answer of the documented form stands in.
    let role = "arn:aws:iam::123456789012:role/first-Role";
    let uri = format!("{}/run.toml", lab.uri());
    for (decision, verdict) in [("allowed", "fail"), ("implicitDeny", "fail")] {
        let answer = format!(
            "<SimulatePrincipalPolicyResponse><SimulatePrincipalPolicyResult><EvaluationResults><member>\
             <EvalDecision>{decision}</EvalDecision></member></EvaluationResults></SimulatePrincipalPolicyResult>\
             </SimulatePrincipalPolicyResponse>"
        );
        let iam = Cloud::start(&[("SimulatePrincipalPolicy", &answer)]);
        let read = lab.command(&["doctor", "--reads", &uri, "--role", role]).json();
        let life = read.envs(&[("AWS_ENDPOINT_URL_IAM", iam.endpoint())]).finish();
        let line = line(&life, "configuration read");
        // It is not there yet.
        assert_eq!(line["verdict"], verdict, "{}", life.story());
        assert_eq!(line["found"].to_string().contains("no policy of"), decision == "implicitDeny", "{line}");
        let (head, body) = iam.asked("SimulatePrincipalPolicy").remove(0);
        assert!(body.contains("ActionNames.member.1=s3%3AGetObject") && body.contains("first-Role"), "{body}");
        assert!(head.contains("us-east-1/iam/aws4_request"), "{head}");
    }
    lab.command(&["doctor", "--role", role]).finish().expect_code(64).expect_said(&["--reads"]);
    lab.command(&["doctor", "--reads", &uri, "--role", "me"]).finish().expect_code(64);
}

/// The tools of both clouds, in the documented forms of their answers.
#[test]
fn quotas_of_other_clouds_are_asked_of_their_tools() {
    let lab = Lab::on_files();
    let bin = lab.path("bin");
    std::fs::create_dir_all(&bin).expect("a folder");
    let tool = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        let place = bin.join(name);
        std::fs::write(&place, format!("#!/bin/sh\n{text}\n")).expect("a tool");
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755)).expect("it can be started");
    };
    let look = || {
        let wanted = ["doctor", "--count", "2", "--gcp-project", "my-project", "--azure-location", "westeurope"];
        let path = [("PATH", format!("{}:/usr/bin:/bin", bin.display()))];
        lab.command(&wanted).json().envs(&path).finish()
    };
    // A machine of a developer may have them.
    if !["/usr/bin/gcloud", "/usr/bin/az"].iter().any(|tool| std::path::Path::new(tool).exists()) {
        let life = look().expect_code(0);
        for (check, tool) in [("gcp gpu quota", "gcloud"), ("azure spot quota", "az")] {
            let line = line(&life, check);
            assert_eq!(line["verdict"], "warn", "{}", life.story());
            assert!(line["found"].to_string().contains(&format!("not checked: {tool} is not installed")), "{line}");
        }
    }
    let gpus = r#"case "$*" in "compute project-info describe --project my-project --format json")
echo '{"quotas": [{"limit": 4.0, "metric": "GPUS_ALL_REGIONS", "usage": 3.0}]}' ;; *) exit 2 ;; esac"#;
    tool("gcloud", gpus);
    let cores = r#"case "$*" in "vm list-usage --location westeurope --output json")
echo '[{"currentValue": "0", "limit": "8", "name": {"value": "lowPriorityCores"}}]' ;; *) exit 2 ;; esac"#;
    tool("az", cores);
    let life = look().expect_code(78);
    assert_eq!(line(&life, "gcp gpu quota")["verdict"], "fail", "{}", life.story());
    assert!(line(&life, "gcp gpu quota")["found"].to_string().contains("2 are wanted"), "{}", life.story());
    assert_eq!(line(&life, "azure spot quota")["verdict"], "ok", "{}", life.story());
    tool("gcloud", "echo 'ERROR: (gcloud) log in first' >&2; exit 1");
    let life = look().expect_code(0);
    assert!(line(&life, "gcp gpu quota")["found"].to_string().contains("log in first"), "{}", life.story());
}
