//! The state machine: its text, and its behaviour on moto, which really executes it.
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{
    stack::{create, tagged},
    text, yaml,
};
use crate::support::moto::Moto;

/// The definition as the stack creates it, with these values inserted.
fn definition(group: &str, token: &str, heartbeat: u32) -> Option<Value> {
    let template = yaml(&text("aws/stack.yaml"))?.remove(0);
    let text =
        template["Resources"]["Loop"]["Properties"]["DefinitionString"].as_str().expect("a definition").to_owned();
    let text = text
        .replace("${Partition}", "aws")
        .replace("${Group}", group)
        .replace("${TaskToken}", token)
        .replace("${HeartbeatSeconds}", &heartbeat.to_string())
        .replace("${Size}", "1");
    assert!(!text.contains("${"), "something is not substituted: {text}");
    Some(serde_json::from_str(&text).expect("the definition is JSON"))
}

/// The errors of a state machine's text; cfn-lint checks none of it. <https://states-language.net/spec.html>
fn faults(definition: &Value) -> Vec<String> {
    let states = definition["States"].as_object().expect("states");
    let mut faults = Vec::new();
    let mut reached = vec![definition["StartAt"].as_str().unwrap_or_default().to_owned()];
    let mut next = 0;
    while let Some(name) = reached.get(next).cloned() {
        next += 1;
        let Some(state) = states.get(&name) else {
            faults.push(format!("there is no state {name}"));
            continue;
        };
        let mut targets: Vec<&Value> = [&state["Next"], &state["Default"]].into();
        for list in ["Catch", "Choices"] {
            targets.extend(state[list].as_array().into_iter().flatten().map(|one| &one["Next"]));
        }
        let targets: Vec<_> = targets.into_iter().filter_map(Value::as_str).map(str::to_owned).collect();
        let ends = state["End"] == true || ["Succeed", "Fail"].iter().any(|kind| state["Type"] == *kind);
        if targets.is_empty() != ends {
            faults.push(format!("{name} neither ends nor continues, or does both"));
        }
        let errors = |list: &str| {
            state[list].as_array().into_iter().flatten().map(|one| one["ErrorEquals"].clone()).collect::<Vec<_>>()
        };
        for errors in errors("Catch").into_iter().chain(errors("Retry")) {
            let errors = errors.as_array().cloned().unwrap_or_default();
            if errors.iter().any(|error| error == "States.ALL") && errors.len() > 1 {
                faults.push(format!("{name}: States.ALL stands alone"));
            }
        }
        let waits = state["Resource"].as_str().is_some_and(|resource| resource.ends_with(".waitForTaskToken"));
        if waits {
            let caught = errors("Catch").iter().map(Value::to_string).collect::<String>();
            if !state["HeartbeatSeconds"].is_u64()
                || !caught.contains("States.HeartbeatTimeout")
                || !caught.contains("States.Timeout")
            {
                faults.push(format!("{name} may wait forever"));
            }
            if !state["Parameters"].to_string().contains("$$.Task.Token") {
                faults.push(format!("{name} tells nobody its token"));
            }
        }
        for target in targets {
            if !reached.contains(&target) {
                reached.push(target);
            }
        }
    }
    faults.extend(states.keys().filter(|name| !reached.contains(name)).map(|name| format!("{name} is never reached")));
    faults
}

#[test]
fn each_state_exists_and_is_reached() {
    let Some(good) = definition("group", "/token", 60) else { return };
    assert_eq!(faults(&good), Vec::<String>::new());
    for (pointer, value) in [
        ("/States/Provide/Next", json!("Trian")),
        ("/States/Train/Catch/0/Next", json!("Provid")),
        ("/States/Train/Catch/0/ErrorEquals", json!(["States.HeartbeatTimeout"])),
        ("/States/Train/HeartbeatSeconds", json!(null)),
        ("/States/Trained/Type", json!("Pass")),
    ] {
        let mut wrong = good.clone();
        *wrong.pointer_mut(pointer).expect(pointer) = value;
        assert!(!faults(&wrong).is_empty(), "{pointer}");
    }
}

const LIMIT: Duration = Duration::from_secs(120);

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < LIMIT, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

struct Execution<'m> {
    moto: &'m Moto,
    arn: Value,
    group: &'static str,
}

impl Execution<'_> {
    fn capacity(&self) -> String {
        let request = [("AutoScalingGroupNames.member.1", self.group)];
        tagged(&self.moto.query("autoscaling", "2011-01-01", "DescribeAutoScalingGroups", &request), "DesiredCapacity")
            .to_owned()
    }
    /// A token that is not `old`, once the state machine has put it where machines find it.
    fn token(&self, old: &str) -> String {
        let request = json!({"Path": format!("/trainer/{}-loop", self.group)});
        wait_for("a task token", || {
            let answer = self.moto.json("ssm", "AmazonSSM.GetParametersByPath", &request);
            answer["Parameters"][0]["Value"].as_str().filter(|token| *token != old).map(str::to_owned)
        })
    }
    fn status(&self) -> String {
        wait_for("the end of the execution", || {
            let state =
                self.moto.json("states", "AWSStepFunctions.DescribeExecution", &json!({"executionArn": self.arn}));
            state["status"].as_str().filter(|status| *status != "RUNNING").map(str::to_owned)
        })
    }
}

fn execute<'m>(moto: &'m Moto, group: &'static str, heartbeat: u32) -> Execution<'m> {
    moto.configure(r#"{"stepfunctions": {"execute_state_machine": true}}"#);
    create(moto, group, "loop");
    let definition =
        definition(group, &format!("/trainer/{group}-loop/task-token"), heartbeat).expect("the tools are there");
    let machine = json!({"name": format!("{group}-executed"), "definition": definition.to_string(),
        "roleArn": "arn:aws:iam::123456789012:role/loop"});
    let machine = moto.json("states", "AWSStepFunctions.CreateStateMachine", &machine);
    let execution = json!({"stateMachineArn": machine["stateMachineArn"], "input": "{}"});
    let arn = moto.json("states", "AWSStepFunctions.StartExecution", &execution)["executionArn"].clone();
    Execution { moto, arn, group }
}

#[test]
fn a_silent_machine_is_replaced_until_the_run_is_complete() {
    let Some(moto) = Moto::start("configs") else { return };
    let execution = execute(&moto, "silent", 2);
    let first = execution.token("");
    assert_eq!(execution.capacity(), "1");
    // The machine is taken away and sends nothing more: the state machine requests one again.
    let request = [("AutoScalingGroupName", "silent"), ("DesiredCapacity", "0")];
    moto.query("autoscaling", "2011-01-01", "SetDesiredCapacity", &request);
    let mut token = execution.token(&first);
    // It may have requested one just before the machine was taken away: then it does so again after the silence.
    wait_for("a machine that is asked for again", || (execution.capacity() == "1").then_some(()));
    // The task may time out between the look and the answer; then there is a newer token.
    loop {
        let done = json!({"taskToken": token, "output": "{}"});
        if let Err(refused) = moto.try_json("states", "AWSStepFunctions.SendTaskSuccess", &done) {
            assert!(refused.contains("Task"), "{refused}");
        }
        let state = wait_for("an end or a newer token", || {
            let state =
                moto.json("states", "AWSStepFunctions.DescribeExecution", &json!({"executionArn": execution.arn}));
            let newest = execution.token("");
            (state["status"] != "RUNNING" || newest != token).then_some((state, newest))
        });
        if state.0["status"] != "RUNNING" {
            break;
        }
        token = state.1;
    }
    assert_eq!(execution.status(), "SUCCEEDED");
    assert_eq!(execution.capacity(), "0");
}

#[test]
fn a_run_that_cannot_continue_ends_the_execution_and_buys_nothing() {
    let Some(moto) = Moto::start("configs") else { return };
    let execution = execute(&moto, "hopeless", 600);
    let token = execution.token("");
    moto.json("states", "AWSStepFunctions.SendTaskHeartbeat", &json!({"taskToken": token}));
    let failure = json!({"taskToken": token, "error": "TrainerGaveUp", "cause": "see the log"});
    moto.json("states", "AWSStepFunctions.SendTaskFailure", &failure);
    assert_eq!(execution.status(), "FAILED");
    assert_eq!(execution.capacity(), "0");
}
