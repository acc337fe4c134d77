//! The files that machines boot with: every file of `userdata/` is checked by the tools and schemas that know its
//! format, and by rules of our own where those tools are known to miss mistakes. The stack is created, the state
//! machine executed, and the scripts run for real.
//!
//! Tools and schemas come from `scripts/test`; without them, the tests that need them say so and pass. Not checked:
//! Azure's and Google's command lines (only their shell), SkyPilot's schema (only the keys that we use), and anything
//! on a real cloud.
mod elsewhere;
mod endings;
mod files;
mod first_run;
mod loops;
mod machine;
mod nodes;
mod policies;
mod stack;
pub mod stand_ins;
mod updates;
mod user_data;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

use crate::support::moto::{self, Moto};

/// The repository's file `userdata/<name>`.
fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("userdata").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("userdata/{name}: {error}"))
}

/// All files of `userdata/`, by their names below it.
fn all() -> Vec<String> {
    fn walk(folder: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).expect("list userdata") {
            let entry = entry.expect("an entry of userdata").path();
            if entry.is_dir() {
                walk(&entry, found);
            } else {
                let name = entry.strip_prefix(path("")).expect("below userdata");
                found.push(name.to_str().expect("a name in ASCII").to_owned());
            }
        }
    }
    let mut found = Vec::new();
    walk(&path(""), &mut found);
    found.sort();
    assert!(found.len() > 15, "{found:?}");
    found
}

/// A tool of `scripts/test`, in its path; `None`: the tools are missing.
fn tool(name: &str) -> Option<Command> {
    let tools = moto::tools()?;
    let mut command = Command::new(tools.join("bin").join(name));
    command.env("PYTHONPATH", &tools).env("PYTHONDONTWRITEBYTECODE", "1");
    Some(command)
}

/// Runs Python with the tools' modules; `None`: they are missing.
fn python(script: &str, arguments: &[&str]) -> Option<Output> {
    let tools = moto::tools()?;
    let mut command = Command::new("python3");
    command.arg("-c").arg(script).args(arguments).env("PYTHONPATH", &tools).env("PYTHONDONTWRITEBYTECODE", "1");
    Some(command.output().expect("start python3"))
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The documents of a YAML text; CloudFormation's short forms (`!Ref A`) become their long ones.
fn yaml(text: &str) -> Option<Vec<Value>> {
    const READ: &str = r#"
import json, sys, yaml
class Loader(yaml.SafeLoader): pass
def short(loader, tag, node):
    kind = {yaml.ScalarNode: loader.construct_scalar, yaml.SequenceNode: lambda n: loader.construct_sequence(n, True)}
    value = kind.get(type(node), lambda n: loader.construct_mapping(n, True))(node)
    return {"Ref" if tag == "Ref" else "Fn::" + tag: value}
Loader.add_multi_constructor("!", short)
print(json.dumps(list(yaml.load_all(sys.argv[1], Loader))))
"#;
    let output = python(READ, &[text])?;
    assert!(output.status.success(), "{}", said(&output));
    Some(serde_json::from_slice(&output.stdout).expect("JSON from PyYAML"))
}

#[test]
fn moto_logs_its_requests_and_forgets_on_request() {
    let Some(moto) = Moto::start("bucket") else { return };
    let queue = moto.json("sqs", "AmazonSQS.CreateQueue", &serde_json::json!({"QueueName": "jobs"}));
    assert!(queue["QueueUrl"].as_str().is_some_and(|url| url.ends_with("/jobs")), "{queue}");
    let list = |moto: &Moto| moto.json("sqs", "AmazonSQS.ListQueues", &serde_json::json!({})).to_string();
    assert!(list(&moto).contains("/jobs"));
    let stacks = moto.query("cloudformation", "2010-05-15", "DescribeStacks", &[]);
    assert!(stacks.contains("DescribeStacksResponse"), "{stacks}");
    assert!(moto.log().contains("\"PUT /bucket HTTP/1.1\" 200"), "{}", moto.log());
    moto.reset();
    assert!(!list(&moto).contains("/jobs"));
    moto.make_bucket("bucket");
}
