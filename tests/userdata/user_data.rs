//! What a machine of the stack gets as User Data, and `user-data.sh` in the hands of somebody without the stack.
use std::process::Command;

use serde_json::Value;

use super::{
    path, python, said,
    stack::{properties, template},
    stand_ins::{Cloud, Machine, expect},
    text,
};
use crate::support::moto;

/// The settings' references, and the longest values in their place: AWS's limits, or else more than a person writes.
const LONGEST: [(&str, usize); 14] = [
    ("${AWS::Region}", 16),
    ("${Image}", 250),
    ("${Bundle}", 200),
    ("${BundleSha256}", 64),
    ("${SsmPath}", 100),
    ("${Bucket}", 63),
    // The stack's name, its resource's, and a suffix; so are queue and topic.
    ("${LogGroup}", 160),
    ("${OnFailure}", 9),
    ("${Topic}", 220),
    ("${JobQueue}", 150),
    ("${AWS::StackName}", 128),
    ("${TaskToken}", 116),
    ("${JobNodes}", 9),
    ("${Variables}", 1000),
];

/// User Data with these values in the place of the settings' references, by `value`.
fn user_data(stack: &Value, value: impl Fn(&str, usize) -> String) -> String {
    let settings = &properties(stack, "Settings")["Value"]["Fn::Sub"];
    let mut head = settings[0].as_str().expect("the settings").to_owned();
    for (reference, longest) in LONGEST {
        assert!(head.contains(reference), "{reference}");
        head = head.replace(reference, &value(reference, longest));
    }
    assert!(!head.contains("${"), "how long may it become? {head}");
    let script = stack["Mappings"]["UserData"]["Script"]["Text"].as_str().expect("the script");
    format!("{head} {script}")
}

#[test]
fn the_stack_carries_user_data_and_it_fits() {
    let Some(stack) = template("aws/stack.yaml") else { return };
    let both = ["LaunchTemplate", "SpotTemplate"]
        .map(|name| &properties(&stack, name)["LaunchTemplateData"]["UserData"]["Fn::Base64"]["Fn::Join"]);
    let settings = serde_json::json!({"Fn::GetAtt": "Settings.Value"});
    let script = serde_json::json!({"Fn::FindInMap": ["UserData", "Script", "Text"]});
    assert_eq!(both, [&serde_json::json!([" ", [settings, script]]); 2]);
    let longest = user_data(&stack, |_, longest| "x".repeat(longest));
    assert!(longest.len() < 16_384, "EC2 takes no more than 16 KB: {}", longest.len());
    // As cloud-init unpacks it.
    const UNPACK: &str = r##"
import base64, gzip, json, sys, yaml
config = yaml.safe_load(sys.argv[1])
files = {}
for file in config["write_files"]:
    content = file["content"]
    if file.get("encoding") == "gz+b64": content = gzip.decompress(base64.b64decode(content)).decode()
    files[file["path"]] = content
print(json.dumps([files, config["runcmd"], sys.argv[1].startswith("#cloud-config\n")]))
"##;
    let given = user_data(&stack, |reference, _| match reference {
        "${Variables}" => "HTTPS_PROXY=http://proxy:3128\n      NCCL_DEBUG=INFO".into(),
        other => other.trim_start_matches("${").trim_end_matches('}').into(),
    });
    let output = python(UNPACK, &[&given]).expect("the tools are there");
    let unpacked: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(&output)));
    assert_eq!(unpacked[2], true, "cloud-init knows it by its first line");
    let files = &unpacked[0];
    let source = text("aws/user-data.sh");
    let code: String = source
        .lines()
        .filter(|line| !line.trim_start().starts_with('#') || line.starts_with("#!"))
        .flat_map(|line| [line, "\n"])
        .collect();
    let carried = files["/usr/local/sbin/trainer-machine"].as_str();
    assert_eq!(carried, Some(&*code), "run userdata/aws/embed");
    let shown = Command::new(path("aws/embed")).arg("--show").output().expect("start embed");
    assert_eq!(said(&shown), code);
    assert_eq!(unpacked[1], serde_json::json!([["/usr/local/sbin/trainer-machine", "boot"]]));
    assert_eq!(files["/etc/trainer/env"], "HTTPS_PROXY=http://proxy:3128\nNCCL_DEBUG=INFO\n");
    let settings = files["/etc/trainer/machine.conf"].as_str().expect("settings");
    let manual = text("README.md");
    for line in settings.lines() {
        let name = line.split('=').next().expect("a name");
        assert!(code.contains(name) || manual.contains(&format!("`{name}`")), "{name} means nothing to user-data.sh");
    }
    // What it does on a machine: the carried script, with the settings of the stack.
    let (machine, cloud) = (Machine::new("TRAINER_IMAGE=a/b\n"), Cloud::machine());
    let me = "root/usr/local/sbin/trainer-machine";
    std::fs::create_dir_all(machine.path("root/usr/local/sbin")).expect("a folder");
    machine.executable(me, &code);
    let mut boot = machine.command(&machine.path(me), &cloud);
    expect(&boot.arg("boot").output().expect("start it"), 0, &["installed"]);
    expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
    assert!(machine.calls().contains(" a/b boot --json"), "{}", machine.calls());
    // Its schema, if there is one.
    const CHECK: &str = r#"
import json, sys, jsonschema, yaml
jsonschema.validate(yaml.safe_load(sys.argv[2]), json.load(open(sys.argv[1])))
"#;
    let schema = moto::tools().expect("the tools are there").join("cloud-init/schema-cloud-config-v1.json");
    if schema.is_file() {
        let output = python(CHECK, &[schema.to_str().expect("a plain path"), &given]).expect("the tools are there");
        assert!(output.status.success(), "{}", said(&output));
    }
}

/// `run-instances` with the script alone: its settings come before it, and both are compressed.
#[test]
fn user_data_stands_alone_with_settings_in_front() {
    let (machine, cloud) = (Machine::new(""), Cloud::machine());
    std::fs::remove_file(machine.path("root/etc/trainer/machine.conf")).expect("no settings");
    let whole = format!(
        "#!/usr/bin/env bash\nexport TRAINER_IMAGE=a/b TRAINER_STORE=s3://bucket/runs TRAINER_RUN_ID=r\n{}",
        text("aws/user-data.sh")
    );
    machine.executable("user-data", &whole);
    let packed = Command::new("gzip").args(["-9", "-k"]).arg(machine.path("user-data")).status().expect("start gzip");
    assert!(packed.success());
    let size = std::fs::metadata(machine.path("user-data.gz")).expect("the packed script").len();
    assert!(size < 12_000, "EC2 takes 16 KB: {size}");
    let output = machine.command(&machine.path("user-data"), &cloud).output().expect("start it");
    expect(&output, 0, &["installed"]);
    // The unit starts it again, after a reboot, too.
    expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
    let calls = machine.calls();
    assert!(calls.contains(" a/b boot --json"), "{calls}");
    let env = std::fs::read_to_string(machine.path("root/run/trainer/env")).expect("the container's variables");
    assert!(env.contains("TRAINER_STORE=s3://bucket/runs\n") && env.contains("TRAINER_RUN_ID=r\n"), "{env}");
}

#[test]
fn the_users_own_variables_reach_the_program() {
    let cloud = Cloud::machine();
    let machine = Machine::new("TRAINER_IMAGE=a/b\nTRAINER_CONFIG=/etc/trainer/run.toml\n");
    std::fs::write(machine.path("root/etc/trainer/env"), "HTTPS_PROXY=http://proxy:3128\n").expect("variables");
    expect(&machine.boot(&cloud), 0, &[]);
    expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
    let calls = machine.calls();
    let run = calls.lines().find(|line| line.starts_with("docker run")).expect("docker run");
    let at = |part: &str| run.find(part).unwrap_or_else(|| panic!("{part} is not in {run}"));
    // Docker takes the last of two values.
    assert!(at("/etc/trainer/env ") < at("/run/trainer/env "), "{run}");
    at("--volume /etc/trainer/run.toml:/etc/trainer/run.toml:ro ");
    // A program without a container.
    let machine = Machine::new("");
    std::fs::write(machine.path("root/etc/trainer/env"), "# mine\nNO_PROXY=a b,*\n\nNCCL_DEBUG=INFO\n").expect("write");
    expect(&machine.boot(&cloud), 0, &[]);
    std::fs::create_dir_all(machine.path("root/opt/trainer")).expect("a folder");
    machine.executable("root/opt/trainer/trainer", "#!/bin/sh\necho \"$NO_PROXY|$NCCL_DEBUG\"\n");
    expect(&machine.unit(&cloud, "run", &[]), 0, &["a b,*|INFO\n"]);
}
