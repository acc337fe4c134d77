//! The page "First run on AWS": its commands, typed as they stand, with the AWS CLI against moto. Building, Docker and
//! the quota are stand-ins, for moto has neither machines nor registries; the program then trains with what the
//! commands made.
use std::{
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use super::{
    path, said,
    stack::{tagged, template_for_moto},
    text,
};
use crate::support::moto::{self, Moto};

/// The commands of the page from `begin` to `end`: lines after a prompt, and those that continue them.
fn commands(page: &str, begin: &str, end: &str) -> Vec<String> {
    let part = page.split_once(begin).and_then(|(_, rest)| rest.split_once(end)).expect("a part of the page").0;
    let mut commands: Vec<String> = Vec::new();
    let mut inside = false;
    for line in part.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| inside) {
            commands.push(command.into());
        } else if inside {
            let command = commands.last_mut().expect("a command before its continuation");
            command.push('\n');
            command.push_str(line);
        }
    }
    commands
}

/// A clone of the repository, as far as the commands look at it, and a shell in it.
struct Checkout {
    dir: tempfile::TempDir,
    endpoint: String,
}

/// Version 1, which looks at another variable than version 2.
const AWS: &str = "#!/bin/sh\n\
    export AWS_DEFAULT_REGION=\"${AWS_REGION:-}\"\nPYTHONPATH=TOOLS exec python3 -m awscli \"$@\"\n";
/// A registry that keeps what is pushed: it asks the service itself to.
const DOCKER: &str = "#!/bin/sh\necho \"docker $*\" >>\"$HOME/calls\"\ncase $1 in login) cat >/dev/null ;;\n\
    push) tag=${2##*:}; name=${2%:*}; name=${name##*/}\n\
    aws ecr put-image --repository-name \"$name\" --image-tag \"$tag\" --image-manifest \
    '{\"schemaVersion\":2,\"mediaType\":\"application/vnd.docker.distribution.manifest.v2+json\",\n\
    \"config\":{\"digest\":\"sha256:1\"},\"layers\":[]}' >/dev/null ;; esac\n";

impl Checkout {
    fn new(moto: &Moto) -> Option<Self> {
        let tools = moto::tools()?;
        let clone = Self { dir: tempfile::tempdir().expect("a folder"), endpoint: moto.endpoint() };
        for folder in ["bin", "home", "scripts", "src", "userdata/aws", "userdata/container", "target/release"] {
            std::fs::create_dir_all(clone.path(folder)).expect("a folder of the clone");
        }
        let root = path("..");
        for file in ["configs", "scripts/publish-image", "userdata/aws/first-run.toml", "src/error.rs"] {
            symlink(root.join(file), clone.path(file)).expect("a link");
        }
        symlink(env!("CARGO_BIN_EXE_trainer"), clone.path("target/release/trainer")).expect("a link");
        std::fs::write(clone.path("userdata/aws/stack.yaml"), template_for_moto()).expect("the template");
        clone.executable("scripts/setup", "#!/bin/sh\n");
        clone.executable("bin/cargo", "#!/bin/sh\n[ \"$*\" = 'build --locked --release' ]\n");
        clone.executable("bin/aws", &AWS.replace("TOOLS", tools.to_str().expect("a plain path")));
        clone.executable("bin/docker", DOCKER);
        Some(clone)
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn executable(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("write a program");
        std::fs::set_permissions(self.path(name), PermissionsExt::from_mode(0o755)).expect("make it a program");
    }
    /// Types these lines into one shell; the first that fails ends it.
    fn types(&self, lines: &[String]) -> Output {
        let mut way = vec![self.path("bin")];
        way.extend(std::env::split_paths(&std::env::var_os("PATH").expect("PATH")));
        Command::new("bash")
            .args(["-euo", "pipefail", "-c", &lines.join("\n")])
            .current_dir(self.dir.path())
            .env("PATH", std::env::join_paths(way).expect("a path"))
            .env("HOME", self.path("home"))
            .envs([
                ("AWS_ACCESS_KEY_ID", "test"),
                ("AWS_SECRET_ACCESS_KEY", "test"),
                ("AWS_EC2_METADATA_DISABLED", "true"),
            ])
            .env("AWS_ENDPOINT_URL", &self.endpoint)
            .output()
            .expect("start bash")
    }
}

fn expect_success(output: &Output) -> String {
    let said = said(output);
    assert!(output.status.success(), "{said}");
    said
}

#[test]
fn the_first_run_works_as_the_page_says_it() {
    let page = text("README.md");
    let begin = commands(&page, "## First run on AWS\n", "**Watch it:**");
    assert!((1..=8).contains(&begin.len()), "{} commands: {begin:#?}", begin.len());
    let Some(moto) = Moto::start("other") else { return };
    let Some(clone) = Checkout::new(&moto) else { return };
    let images = moto.query("ec2", "2016-11-15", "DescribeImages", &[]);
    let image = serde_json::json!({"Name": "/images/gpu", "Value": tagged(&images, "imageId"), "Type": "String"});
    moto.json("ssm", "AmazonSSM.PutParameter", &image);
    expect_success(&clone.types(&begin));
    let docker = std::fs::read_to_string(clone.path("home/calls")).expect("Docker was called");
    assert!(docker.contains("docker build --platform linux/amd64 --build-arg FLAVOUR=cuda "), "{docker}");
    let group = |moto: &Moto| {
        let request = [("AutoScalingGroupNames.member.1", "first")];
        moto.query("autoscaling", "2011-01-01", "DescribeAutoScalingGroups", &request)
    };
    assert_eq!(tagged(&group(&moto), "DesiredCapacity"), "1");
    let first = tagged(&group(&moto), "InstanceId").to_owned();
    // The machine pulls what was pushed.
    let settings =
        moto.json("ssm", "AmazonSSM.GetParameter", &serde_json::json!({"Name": "/trainer/first-machine/user-data"}));
    let settings = settings["Parameter"]["Value"].as_str().expect("settings");
    let pushed = "TRAINER_IMAGE='123456789012.dkr.ecr.us-east-1.amazonaws.com/trainer@sha256:";
    assert!(settings.contains(pushed), "{settings}");
    // What it does then, on a smaller model.
    let bucket = "trainer-123456789012-us-east-1";
    let small = [
        "export AWS_REGION=us-east-1 PATH=\"$PWD/target/release:$PATH\"".to_owned(),
        format!("aws s3 cp --quiet configs/models/tiny.json s3://{bucket}/first/model.json"),
        "trainer boot --ssm-path /trainer/first --set train.steps=1 --set train.schedule.warmup_steps=0 --set \
        data.validation_every=0 --set train.global_batch=1 --set on_complete.action=exit"
            .to_owned(),
    ];
    let booted = expect_success(&clone.types(&small));
    assert!(booted.contains("completed: 1 step"), "{booted}");
    // Watching, and the rest of the page, in a shell that knows the names of the first commands.
    let names = [small[0].clone(), format!("bucket={bucket}")];
    let typed = |begin: &str, end: &str| {
        let rest = commands(&page, begin, end);
        assert!(!rest.is_empty(), "{begin}");
        expect_success(&clone.types(&[&names[..], &rest].concat()))
    };
    let watched = typed("**Watch it:**", "**Take the machine away yourself**");
    assert!(watched.contains("completed") && watched.contains("first-run"), "{watched}");
    typed("**Take the machine away yourself**", "**Stop it early.**");
    assert!(!group(&moto).contains(&first), "{}", group(&moto));
    assert_eq!(tagged(&group(&moto), "DesiredCapacity"), "1", "another one comes");
    typed("**Stop it early.**", "**What it costs:**");
    assert_eq!(tagged(&group(&moto), "DesiredCapacity"), "0");
    typed("**Remove everything:**", "## Google Cloud");
    let left = moto.query("s3", "2006-03-01", "ListBuckets", &[]);
    assert!(!left.contains(bucket), "{left}");
    assert!(!group(&moto).contains("<InstanceId>"), "{}", group(&moto));
}

/// Compares what the sample says of itself with the model that it names.
#[test]
fn the_sample_fits_the_gpu_that_the_page_asks_for() {
    let config = std::fs::read_to_string(path("../configs/models/llama-125m.json")).expect("the model");
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    let number = |key: &str| config[key].as_u64().expect("a number");
    let (width, inner) = (number("hidden_size"), number("intermediate_size"));
    // Embeddings are tied; four projections and three of the MLP, and two norms, a layer.
    let layer = 4 * width * width + 3 * width * inner + 2 * width;
    let parameters = number("vocab_size") * width + number("num_hidden_layers") * layer + width;
    let sample = text("aws/first-run.toml");
    assert!(sample.contains(&format!("{} million parameters", (parameters + 500_000) / 1_000_000)), "{parameters}");
    // fp32 weights, gradients, two moments.
    let state = parameters * 16;
    let tenths = (state + 50_000_000) / 100_000_000;
    assert!(sample.contains(&format!("take {}.{} GB,", tenths / 10, tenths % 10)), "{state}");
    // Scores of one pass, in 32 bits, with their gradient, are the largest tensors.
    let scores = 2 * 8 * 1024 * number("vocab_size") * 4;
    assert!(state + scores < 12_000_000_000, "half of 24 GB: {state} + {scores}");
    assert!(Path::new(&path("aws/first-run.toml")).is_file());
}

/// `scripts/publish-image` alone: what it refuses, and what it says.
#[test]
fn publishing_an_image_prints_its_digest_and_nothing_else() {
    let Some(moto) = Moto::start("other") else { return };
    let Some(clone) = Checkout::new(&moto) else { return };
    let publish = |arguments: &str| clone.types(&[format!("scripts/publish-image {arguments}")]);
    let output = publish("");
    assert_eq!(output.status.code(), Some(64), "{}", said(&output));
    assert!(said(&output).contains("no region is set") && said(&output).contains("hint: "), "{}", said(&output));
    assert_eq!(publish("--repository").status.code(), Some(64));
    assert_eq!(publish("--gpu").status.code(), Some(64));
    // The second time the repository is there.
    for _twice in 0..2 {
        let output = publish("--region us-east-1 --repository mine --cpu");
        let line = String::from_utf8(output.stdout.clone()).expect("text");
        expect_success(&output);
        let digest = line.strip_prefix("Image=123456789012.dkr.ecr.us-east-1.amazonaws.com/mine@sha256:");
        let digest = digest.and_then(|rest| rest.strip_suffix('\n')).unwrap_or_else(|| panic!("{line}"));
        assert!(digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()), "{line}");
    }
    let docker = std::fs::read_to_string(clone.path("home/calls")).expect("Docker was called");
    let build = docker.lines().find(|line| line.starts_with("docker build")).expect("a build");
    for part in [" --platform linux/amd64 ", " FLAVOUR=cpu ", " --file userdata/container/Containerfile "] {
        assert!(build.contains(part), "{build}");
    }
    assert!(docker.find("docker login") < docker.find("docker build"), "a refused log-in comes before an hour's build");
    // A build that fails pushes nothing.
    clone.executable("bin/docker", "#!/bin/sh\necho \"docker $*\" >>\"$HOME/calls\"\n[ \"$1\" != build ]\n");
    let before = docker.len();
    let output = publish("--region us-east-1");
    assert!(!output.status.success() && output.stdout.is_empty(), "{}", said(&output));
    let docker = std::fs::read_to_string(clone.path("home/calls")).expect("Docker was called");
    assert!(!docker[before..].contains("docker push"), "{docker}");
}

/// moto fails to update a stack in which a condition leaves a parameter of SSM out, so nothing is updated here.
#[test]
fn the_stack_is_created_and_deleted_with_other_parameters() {
    let Some(moto) = Moto::start("other") else { return };
    let Some(clone) = Checkout::new(&moto) else { return };
    let images = moto.query("ec2", "2016-11-15", "DescribeImages", &[]);
    let image = serde_json::json!({"Name": "/images/gpu", "Value": tagged(&images, "imageId"), "Type": "String"});
    moto.json("ssm", "AmazonSSM.PutParameter", &image);
    let subnets = moto.query("ec2", "2016-11-15", "DescribeSubnets", &[]);
    let network = format!("VpcId={} SubnetIds={}", tagged(&subnets, "vpcId"), tagged(&subnets, "subnetId"));
    let deploy = |name: &str, parameters: &str| {
        format!(
            "export AWS_REGION=us-east-1; aws cloudformation deploy --stack-name {name} --capabilities CAPABILITY_IAM \
             --template-file userdata/aws/stack.yaml --parameter-overrides {network} SsmPath=/trainer/{name} \
             {parameters}"
        )
    };
    let many = "BucketName=variant-one 'Config=[train]\nsteps = 1' ApiPort=8443 Versioning=Suspended DiskGiB=200 \
        Environment=HTTPS_PROXY=http://proxy:3128,NCCL_DEBUG=INFO RootDevice=/dev/xvda InstanceTypes=g6.* \
        Image=registry/image Nodes=2:4";
    let bundle =
        format!("ConfigUri=s3://c/r.toml Work=loop OnFailure=keep Bundle=s3://b/x BundleSha256={}", "0".repeat(64));
    let variants = [
        ("one", many),
        ("two", &bundle),
        ("three", "Work=queue Versioning=Off OnDemandBase=1 MaxSize=3 AlarmEmail=a@example.com"),
    ];
    for (name, parameters) in variants {
        expect_success(&clone.types(&[deploy(name, parameters)]));
    }
    let value = |name: &str| {
        let found = moto.json("ssm", "AmazonSSM.GetParameter", &serde_json::json!({"Name": name}));
        found["Parameter"]["Value"].as_str().expect("a value").to_owned()
    };
    assert_eq!(value("/trainer/one/config"), "[train]\nsteps = 1");
    assert_eq!(value("/trainer/one/store"), "s3://variant-one/runs");
    let settings = value("/trainer/one-machine/user-data");
    assert!(settings.contains("\n      HTTPS_PROXY=http://proxy:3128\n      NCCL_DEBUG=INFO\n"), "{settings}");
    assert!(settings.contains("TRAINER_NODES='2:4'"), "{settings}");
    let settings = value("/trainer/two-machine/user-data");
    assert!(settings.contains("TRAINER_TASK_TOKEN='/trainer/two-loop/task-token'"), "{settings}");
    let templates = moto.query("ec2", "2016-11-15", "DescribeLaunchTemplates", &[]);
    let mut spot = 0;
    for id in templates.split("<launchTemplateId>").skip(1).filter_map(|rest| rest.split('<').next()) {
        let versions = moto.query("ec2", "2016-11-15", "DescribeLaunchTemplateVersions", &[("LaunchTemplateId", id)]);
        if versions.contains("<marketType>spot") {
            spot += 1;
            assert_eq!(tagged(&versions, "instanceType"), "g6.xlarge");
            assert!(versions.contains("<value>worker-gpu</value>") && versions.contains("subnet-"), "{versions}");
        }
    }
    assert_eq!(spot, 3, "one for each stack");
    let request = [("AutoScalingGroupNames.member.1", "three")];
    let group = moto.query("autoscaling", "2011-01-01", "DescribeAutoScalingGroups", &request);
    assert_eq!((tagged(&group, "MaxSize"), tagged(&group, "OnDemandBaseCapacity")), ("3", "1"));
    for (name, _) in variants {
        let delete = format!("export AWS_REGION=us-east-1; aws cloudformation delete-stack --stack-name {name}");
        expect_success(&clone.types(&[delete]));
        let request = [("AutoScalingGroupNames.member.1", name)];
        let group = moto.query("autoscaling", "2011-01-01", "DescribeAutoScalingGroups", &request);
        assert!(!group.contains("<AutoScalingGroupName>"), "{group}");
    }
}
