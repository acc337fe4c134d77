//! The machine after the end of its run: it starts again, leaves, or gives up, and the operator is told.
use std::net::TcpListener;

use serde_json::json;

use super::{
    path, said,
    stack::{create, tagged},
    stand_ins::{Cloud, Machine, ended, expect},
};
use crate::support::moto::Moto;

#[test]
fn a_run_that_cannot_succeed_is_given_up_and_costs_no_more() {
    let stopped = "systemctl stop --no-block trainer.service";
    // Codes that are worth another start.
    let (machine, cloud) = (Machine::new(""), Cloud::machine());
    machine.boot(&cloud);
    for code in ["0", "69", "75", "76", "79"].repeat(3) {
        expect(&ended(&machine, &cloud, "exited", code), 0, &[]);
    }
    assert!(!machine.calls().contains(stopped), "{}", machine.calls());
    // Other codes five times in a row; a code that is worth it restarts the count.
    for code in ["70", "70", "70", "70", "75", "70", "125", "70", "70"] {
        expect(&ended(&machine, &cloud, "exited", code), 0, &[]);
    }
    assert!(!machine.calls().contains(stopped), "{}", machine.calls());
    expect(
        &ended(&machine, &cloud, "killed", "KILL"),
        0,
        &["giving up: failed 5 times in a row", "costs money (TRAINER_ON_FAILURE=keep)"],
    );
    assert!(machine.calls().contains(stopped) && !machine.calls().contains("shutdown"), "{}", machine.calls());
    // A task that gets the failure takes the machine back, so it does not stay for inspection.
    let cloud = Cloud::with(&[("GetParameter", r#"{"Parameter":{"Value":"token"}}"#), ("SendTask", "{}")]);
    let machine = Machine::new("TRAINER_TASK_TOKEN=/t\n");
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "78"), 0, &["costs money (TRAINER_ON_FAILURE=keep)"]);
    assert_eq!(cloud.asked("SendTaskFailure").len(), 0);
    // Services that are away for hours do not come back: a mistyped image, a broken driver. One start that got further
    // restarts the count.
    let (machine, cloud) = (Machine::new(""), Cloud::machine());
    machine.boot(&cloud);
    for code in [vec!["69"; 39], vec!["75"], vec!["69"; 39]].concat() {
        expect(&ended(&machine, &cloud, "exited", code), 0, &[]);
    }
    assert!(!machine.calls().contains(stopped), "{}", machine.calls());
    expect(&ended(&machine, &cloud, "exited", "69"), 0, &["giving up: failed 40 times in a row"]);
    expect(&ended(&machine, &cloud, "exited", "69"), 0, &[]);
    assert_eq!(
        machine.calls().matches(stopped).count(),
        1,
        "who starts it by hand has as many tries: {}",
        machine.calls()
    );
    // Failures that can't pass, at once: in a group the machine leaves it, and its task is told.
    for code in ["64", "65", "77", "78"] {
        let answers = [
            ("TerminateInstanceInAutoScalingGroup", "<Activity/>"),
            ("GetParameter", r#"{"Parameter":{"Name":"/t","Value":"task+token/1=="}}"#),
            ("SendTask", "{}"),
        ];
        let cloud = Cloud::with(&answers);
        let machine = Machine::new("TRAINER_ON_FAILURE=terminate\nTRAINER_TASK_TOKEN=/t\n");
        machine.boot(&cloud);
        expect(
            &ended(&machine, &cloud, "exited", code),
            0,
            &[&format!("exit code {code}"), "its capacity lowered by one"],
        );
        let (_, body) = cloud.asked("TerminateInstanceInAutoScalingGroup").remove(0);
        assert!(
            body.contains("ShouldDecrementDesiredCapacity=true") && body.contains("InstanceId=i-0123456789abcdef0"),
            "{body}"
        );
        let (_, body) = cloud.asked("AWSStepFunctions.SendTaskFailure").remove(0);
        let body: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!((&body["taskToken"], &body["error"]), (&"task+token/1==".into(), &"TrainerGaveUp".into()));
        assert!(!machine.calls().contains("shutdown"), "{}", machine.calls());
    }
    // A waiting job would start the next machine, and so on forever.
    let answers = [("SuspendProcesses", "<Suspended/>"), ("TerminateInstanceInAutoScalingGroup", "<Activity/>")];
    let cloud = Cloud::with(&answers);
    let machine = Machine::new("TRAINER_ON_FAILURE=terminate\nTRAINER_QUEUE=https://queue\nTRAINER_GROUP=reports\n");
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "78"), 0, &["aws autoscaling resume-processes", "lowered by one"]);
    let asked: Vec<_> = cloud.asked("Version=2011-01-01").into_iter().map(|(_, body)| body).collect();
    assert!(
        asked.len() == 2
            && asked[0].contains("TerminateInstanceInAutoScalingGroup")
            && asked[1].contains("AutoScalingGroupName=reports&ScalingProcesses.member.1=AlarmNotification"),
        "{asked:?}"
    );
    // In no group it ends by powering off.
    let (machine, cloud) = (Machine::new("TRAINER_ON_FAILURE=terminate\n"), Cloud::machine());
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "78"), 0, &["powering off"]);
    assert!(machine.calls().contains("shutdown -h now"), "{}", machine.calls());
    let tries = cloud.asked("TerminateInstanceInAutoScalingGroup").len();
    assert_eq!(tries, 6, "a group would replace a machine that powers off because one request failed");
    // A container can't power its machine off: if no group ends the machine, it does so itself.
    let in_a_group = [("/latest/meta-data/autoscaling/target-lifecycle-state", "InService")];
    for (settings, group, off) in [
        ("TRAINER_IMAGE=a/b\nTRAINER_ON_COMPLETE=terminate\n", false, true),
        ("TRAINER_IMAGE=a/b\nTRAINER_QUEUE=https://queue\n", false, true),
        ("TRAINER_IMAGE=a/b\nTRAINER_ON_COMPLETE=terminate\n", true, false),
        ("TRAINER_IMAGE=a/b\n", false, false),
        ("TRAINER_QUEUE=https://queue\n", false, false),
    ] {
        let (machine, cloud) =
            (Machine::new(settings), if group { Cloud::with(&in_a_group) } else { Cloud::machine() });
        machine.boot(&cloud);
        expect(&ended(&machine, &cloud, "exited", "0"), 0, &[]);
        assert_eq!(machine.calls().contains("shutdown -h now"), off, "{settings}: {}", machine.calls());
    }
    // A complete run tells its task, and again if that got no answer: a lost success costs an hour and another machine.
    let token = ("GetParameter", r#"{"Parameter":{"Value":"token"}}"#);
    for (answers, tries) in [(&[token, ("SendTask", "{}")][..], 1), (&[token], 4)] {
        let (machine, cloud) = (Machine::new("TRAINER_TASK_TOKEN=/t\n"), Cloud::with(answers));
        machine.boot(&cloud);
        expect(&ended(&machine, &cloud, "exited", "0"), 0, &[]);
        assert_eq!(cloud.asked("AWSStepFunctions.SendTaskSuccess").len(), tries);
    }
}

/// The body of the one request for this action.
fn asked_once(cloud: &Cloud, action: &str) -> String {
    let mut asked = cloud.asked(&format!("Action={action}&"));
    assert_eq!(asked.len(), 1, "{action}: {asked:?}");
    asked.remove(0).1
}

#[test]
fn the_operator_is_told_of_a_machine_that_gives_up() {
    let topic = "TRAINER_TOPIC=arn:aws:sns:us-east-1:123456789012:reports\nTRAINER_LOG_GROUP=training\n";
    for on_failure in ["keep", "terminate"] {
        let cloud = Cloud::with(&[("TerminateInstance", "<Activity/>"), ("Action=Publish", "<MessageId/>")]);
        let machine = Machine::new(&format!("{topic}TRAINER_ON_FAILURE={on_failure}\n"));
        machine.boot(&cloud);
        machine.does("journalctl", "echo 'unknown key \"stpes\"'");
        expect(&ended(&machine, &cloud, "exited", "78"), 0, &["giving up: exit code 78"]);
        let body = asked_once(&cloud, "Publish");
        assert!(body.contains("&TopicArn=arn:aws:sns:us-east-1:123456789012:reports&"), "{body}");
        // The machine, the place of its log, and its last output: it may be gone before a person looks.
        for part in ["i-0123456789abcdef0", "training", "stpes"] {
            assert!(body.split_once("&Message=").is_some_and(|(_, message)| message.contains(part)), "{part}: {body}");
        }
    }
    // No topic, and a topic that does not answer.
    for (settings, warns) in [("", false), (topic, true)] {
        let (machine, cloud) = (Machine::new(settings), Cloud::machine());
        machine.boot(&cloud);
        let output = ended(&machine, &cloud, "exited", "78");
        expect(&output, 0, &["giving up"]);
        assert_eq!(said(&output).contains("the topic got no message"), warns, "{}", said(&output));
    }
}

/// The same message sent to moto: the stack's own group and topic.
#[test]
fn moto_understands_the_messages_of_giving_up() {
    let Some(moto) = Moto::start("configs") else { return };
    create(&moto, "queued", "queue");
    let topics = moto.query("sns", "2010-03-31", "ListTopics", &[]);
    let topic = tagged(&topics, "TopicArn");
    let queue = moto.json("sqs", "AmazonSQS.CreateQueue", &json!({"QueueName": "mail"}));
    let mail = [("TopicArn", topic), ("Protocol", "sqs"), ("Endpoint", "arn:aws:sqs:us-east-1:123456789012:mail")];
    moto.query("sns", "2010-03-31", "Subscribe", &mail);
    let capacity = [("AutoScalingGroupName", "queued"), ("DesiredCapacity", "1")];
    moto.query("autoscaling", "2011-01-01", "SetDesiredCapacity", &capacity);
    let group = || {
        let request = [("AutoScalingGroupNames.member.1", "queued")];
        moto.query("autoscaling", "2011-01-01", "DescribeAutoScalingGroups", &request)
    };
    let before = group();
    let cloud = Cloud::with(&[("/latest/meta-data/instance-id", tagged(&before, "InstanceId"))]);
    let machine = Machine::new(&format!(
        "TRAINER_ON_FAILURE=terminate\nTRAINER_QUEUE=https://queue\nTRAINER_GROUP=queued\nTRAINER_TOPIC={topic}\n"
    ));
    machine.boot(&cloud);
    machine.does("journalctl", "echo 'unknown key \"stpes\" & 100 %+'");
    let endpoint = moto.endpoint();
    let variables = [("EXIT_CODE", "exited"), ("EXIT_STATUS", "78"), ("AWS_ENDPOINT_URL", endpoint.as_str())];
    expect(&machine.unit(&cloud, "after", &variables), 0, &["lowered by one", "resume-processes"]);
    let after = group();
    assert_eq!((tagged(&before, "DesiredCapacity"), tagged(&after, "DesiredCapacity")), ("1", "0"));
    assert_eq!(tagged(tagged(&after, "SuspendedProcesses"), "ProcessName"), "AlarmNotification");
    let mail = moto.json("sqs", "AmazonSQS.ReceiveMessage", &json!({"QueueUrl": queue["QueueUrl"]}));
    let body = mail["Messages"][0]["Body"].as_str().unwrap_or_else(|| panic!("no mail: {mail}"));
    let mail: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(mail["Subject"], "trainer needs attention");
    let message = mail["Message"].as_str().expect("a message");
    assert!(message.starts_with(tagged(&before, "InstanceId")), "{message}");
    assert!(message.ends_with("unknown key \"stpes\" & 100 %+"), "{message}");
    // Whoever reads it must know that nothing starts machines any more, and how to change that.
    let resume =
        "aws autoscaling resume-processes --auto-scaling-group-name queued --scaling-processes AlarmNotification";
    assert!(message.contains(resume), "{message}");
}

/// systemd ends a command that takes longer than `TimeoutStopSec`; then nothing would power the machine off.
#[test]
fn giving_up_ends_in_time_whatever_hangs() {
    let most: u32 = 130;
    let all = "TRAINER_ON_FAILURE=terminate\nTRAINER_ON_COMPLETE=terminate\nTRAINER_QUEUE=https://queue\nTRAINER_GROUP=reports\nTRAINER_TASK_TOKEN=/t\n\
               TRAINER_TOPIC=arn:aws:sns:us-east-1:1:t\nTRAINER_IMAGE=a/b\n";
    for (code, off) in [("78", true), ("0", false), ("80", false)] {
        let (machine, cloud) = (Machine::new(all), Cloud::machine());
        machine.boot(&cloud);
        let unit = std::fs::read_to_string(machine.path("root/etc/systemd/system/trainer.service")).expect("the unit");
        assert!(unit.contains(&format!("\nTimeoutStopSec={most}\n")), "{unit}");
        // Each step's time is over before it has achieved anything.
        machine.does("timeout", "exit 124");
        expect(&ended(&machine, &cloud, "exited", code), 0, &[]);
        let calls = machine.calls();
        assert_eq!(calls.contains("shutdown -h now"), off, "{code}: {calls}");
        let seconds: u32 = calls
            .lines()
            .filter_map(|line| line.strip_prefix("timeout "))
            .map(|rest| rest.split(' ').next().and_then(|number| number.parse::<u32>().ok()).expect("seconds"))
            .sum();
        assert!((60..=most - 10).contains(&seconds), "{seconds} s: {calls}");
        // Everything else that could hang is requested within those times.
        assert_eq!(cloud.asked("").len(), 0, "{:?}", cloud.asked(""));
    }
    // If the metadata service does not answer, the machine is unknown, except that it does not train.
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let nobody = format!("http://127.0.0.1:{nobody}");
    let (machine, cloud) = (Machine::new("TRAINER_ON_FAILURE=terminate\n"), Cloud::machine());
    machine.boot(&cloud);
    for _time in 0..5 {
        let variables =
            [("EXIT_CODE", "exited"), ("EXIT_STATUS", "70"), ("AWS_EC2_METADATA_SERVICE_ENDPOINT", nobody.as_str())];
        expect(&machine.unit(&cloud, "after", &variables), 0, &[]);
    }
    assert!(machine.calls().contains("shutdown -h now"), "{}", machine.calls());
}

#[test]
fn a_machine_that_is_done_leaves_its_group_even_if_the_program_could_not() {
    let topic = "TRAINER_TOPIC=arn:aws:sns:us-east-1:1:t\n";
    let state = "/latest/meta-data/autoscaling/target-lifecycle-state";
    let terminate = ("TerminateInstance", "<Activity/>");
    for settings in ["TRAINER_IMAGE=a/b\nTRAINER_ON_COMPLETE=terminate\n", "TRAINER_QUEUE=https://queue\n"] {
        // It is still in service: the program's own call has failed.
        let cloud = Cloud::with(&[(state, "InService"), terminate]);
        let machine = Machine::new(settings);
        machine.boot(&cloud);
        expect(&ended(&machine, &cloud, "exited", "0"), 0, &[]);
        let body = asked_once(&cloud, "TerminateInstanceInAutoScalingGroup");
        assert!(body.contains("ShouldDecrementDesiredCapacity=true"), "{body}");
        // It is already leaving: a second call would lower the capacity by two.
        let cloud = Cloud::with(&[(state, "Terminated"), terminate]);
        expect(&ended(&machine, &cloud, "exited", "0"), 0, &[]);
        assert_eq!(cloud.asked("TerminateInstance").len(), 0);
        // The group does not let it go: powered off it would be replaced forever, so a person must be told.
        let cloud = Cloud::with(&[(state, "InService"), ("Action=Publish", "<MessageId/>")]);
        let machine = Machine::new(&format!("{settings}{topic}"));
        machine.boot(&cloud);
        expect(&ended(&machine, &cloud, "exited", "0"), 0, &["can't leave its group and costs money"]);
        asked_once(&cloud, "Publish");
        assert!(!machine.calls().contains("shutdown"), "{}", machine.calls());
    }
    // A run at its cap: nobody starts another machine for it, and somebody hears why.
    let token = ("GetParameter", r#"{"Parameter":{"Name":"/t","Value":"task+token/1=="}}"#);
    let answers = [(state, "InService"), terminate, token, ("SendTask", "{}"), ("Action=Publish", "<MessageId/>")];
    let (machine, cloud) = (
        Machine::new(&format!("TRAINER_ON_COMPLETE=terminate\nTRAINER_TASK_TOKEN=/t\n{topic}")),
        Cloud::with(&answers),
    );
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "80"), 0, &[]);
    let body = asked_once(&cloud, "TerminateInstanceInAutoScalingGroup");
    assert!(body.contains("ShouldDecrementDesiredCapacity=true"), "{body}");
    let (_, body) = cloud.asked("AWSStepFunctions.SendTaskFailure").remove(0);
    assert!(body.contains("TrainerAtCap"), "{body}");
    assert_eq!(cloud.asked("AWSStepFunctions.SendTaskSuccess").len(), 0, "the run is not done");
    let said = asked_once(&cloud, "Publish");
    assert!(said.contains("at+its+cap") || said.contains("at%20its%20cap"), "{said}");
    assert!(!machine.calls().contains("systemctl stop"), "{}", machine.calls());
    // Without the setting the machine stays.
    let (machine, cloud) = (Machine::new("TRAINER_IMAGE=a/b\n"), Cloud::with(&[(state, "InService"), terminate]));
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "0"), 0, &[]);
    assert_eq!(cloud.asked("TerminateInstance").len(), 0);
}

/// No program in the container can power anything off: it learns that its host does so, if the host does.
#[test]
fn the_container_knows_who_powers_the_machine_off() {
    for (settings, told) in
        [("TRAINER_QUEUE=https://queue\n", true), ("TRAINER_ON_COMPLETE=terminate\n", true), ("", false)]
    {
        let (machine, cloud) = (Machine::new(&format!("TRAINER_IMAGE=a/b\n{settings}")), Cloud::machine());
        machine.boot(&cloud);
        expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
        let calls = machine.calls();
        let run = calls.lines().find(|line| line.starts_with("docker run")).expect("docker run");
        assert_eq!(run.contains(" --env TRAINER_POWER_OFF=host "), told, "{run}");
        let off = machine.calls();
        expect(&ended(&machine, &cloud, "exited", "0"), 0, &[]);
        assert_eq!(machine.calls()[off.len()..].contains("shutdown -h now"), told, "a promise: {settings}");
    }
    let Some(azure) = super::yaml(&super::text("azure/cloud-init.yaml")) else { return };
    let env = super::files::script_of(&azure[0], "/etc/trainer/env");
    assert!(env.lines().any(|line| line == "TRAINER_POWER_OFF=host"), "{env}");
}

/// The machines of Google and Azure, and a single one, as the unit calls them after a run's end.
#[test]
fn no_machine_stays_on_when_another_start_is_pointless() {
    let role = r#"{"access_token":"metadata-token","expires_in":1}"#;
    let azure = "/metadata/identity/oauth2/token?api-version=2018-02-01&client_id=client&resource=https%3A%2F%2F";
    let google = "/computeMetadata/v1/instance";
    let answers = [
        (format!("{google}/attributes/trainer-bucket"), "bucket"),
        (format!("{google}/attributes/trainer-run-id"), "reports"),
        ("upload/storage/v1/b/bucket/".into(), "{}"),
        (format!("{azure}storage.azure.com%2F"), role),
        ("/metadata/instance/compute/name?api-version=2021-02-01&format=text".into(), "reports-1"),
        (format!("{google}/attributes/created-by"), "projects/1/zones/z/instanceGroupManagers/reports"),
        (format!("{google}/zone"), "projects/1/zones/z"),
        (format!("{google}/name"), "reports-1"),
        (format!("{google}/service-accounts/default/token"), role),
        ("/metadata/instance/compute/resourceId?api-version=2021-02-01&format=text".into(), "/machines/1"),
        (format!("{azure}management.azure.com%2F"), role),
        ("deleteInstances".into(), "{}"),
    ];
    let answers: Vec<_> = answers.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    for kind in ["gcp", "azure", "aws"] {
        let Some(script) = (match kind {
            "gcp" => Some(std::fs::read_to_string(path("gcp/startup.sh")).expect("startup.sh")),
            kind => super::yaml(&super::text(&format!("{kind}/cloud-init.yaml")))
                .map(|config| super::files::script_of(&config[0], "/usr/local/sbin/trainer-machine")),
        }) else {
            continue;
        };
        // The second DELETE is answered: Azure is asked again after a failure.
        let left = |machine: &Machine, cloud: &Cloud| match kind {
            "gcp" => cloud.asked("instanceGroupManagers/reports/deleteInstances").len() == 1,
            "azure" => cloud.asked("DELETE /machines/1?").len() == 2,
            _ => machine.calls().contains("systemctl poweroff"),
        };
        let codes = |codes: &[&str]| {
            let (machine, cloud) = (Machine::new(""), Cloud::with(&answers));
            machine.executable("bin/after", &script);
            machine.does("journalctl", "echo 'unknown key \"stpes\"'");
            for code in codes {
                let mut after = machine.command(&machine.path("bin/after"), &cloud);
                let output = after
                    .arg("after")
                    .env("GCE_METADATA_HOST", cloud.endpoint().trim_start_matches("http://"))
                    .env("TRAINER_COMPUTE_API", cloud.endpoint())
                    .env("TRAINER_AZURE_METADATA_ENDPOINT", cloud.endpoint())
                    .env("TRAINER_AZURE_MANAGEMENT_ENDPOINT", cloud.endpoint())
                    .envs(["TRAINER_STORAGE_API", "TRAINER_AZURE_BLOB_ENDPOINT"].map(|name| (name, cloud.endpoint())))
                    .envs([("EXIT_CODE", "exited"), ("EXIT_STATUS", code)])
                    .output()
                    .expect("start trainer-machine");
                expect(&output, 0, &[]);
            }
            // What it said outlives it, unless the run is complete or at its cap.
            let kept = cloud.asked("machine-logs/reports/reports-1.log");
            let gives_up = left(&machine, &cloud) && codes != ["0"] && codes != ["80"] && kind != "aws";
            assert_eq!(kept.len(), usize::from(gives_up), "{kind}, {codes:?}: {kept:?}");
            assert!(kept.iter().all(|(_, body)| body.contains("stpes")), "{kept:?}");
            left(&machine, &cloud)
        };
        for code in ["64", "65", "77", "78"] {
            assert!(codes(&[code]), "{kind}: {code}");
        }
        // The program itself does what on_complete says, if it is not in a container.
        assert_eq!(codes(&["80"]), kind != "aws", "{kind}: at its cap");
        assert!(!codes(&["70", "70", "70", "70", "75", "70", "137", "70", "70"]), "{kind}: interrupted in between");
        assert!(codes(&["70", "70", "137", "70", "70"]), "{kind}: five times in a row");
        assert!(!codes(&[vec!["69"; 39], vec!["79"], vec!["69"; 2]].concat()), "{kind}: away, and here in between");
        assert!(codes(&["69"; 40]), "{kind}: away for hours");
    }
}
