//! Those who watch a run from outside: Prometheus, a node exporter, a web hook, an SNS topic, a dead man's switch.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    interop::environment,
    metrics::TENSORBOARD,
    support::{
        lab::{EVERY, Lab, STEPS},
        moto::Moto,
        trainer::Running,
    },
};

/// An address that is free now.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("an address")
}

fn get(at: SocketAddr, path: &str, accept: &str) -> String {
    let mut stream = TcpStream::connect(at).expect("connect");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer.split_once("\r\n\r\n").expect("a body").1.to_owned()
}

fn value(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.split_once("} ")?.1.parse().ok())
}

const OPEN: &str = "application/openmetrics-text; version=1.0.0";

/// The library of Prometheus reads it, in both forms.
fn prometheus_reads(open: &str, plain: &str) {
    let Some(packages) = environment(TENSORBOARD) else { return };
    const READ: &str = "
import sys
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client import parser
open_, plain = open(sys.argv[1]).read(), open(sys.argv[2]).read()
names = lambda families: sorted({s.name for f in families for s in f.samples})
a, b = names(openmetrics.text_string_to_metric_families(open_)), names(parser.text_string_to_metric_families(plain))
assert a == b and len(a) > 15, (a, b)
";
    let folder = tempfile::tempdir().expect("a folder");
    let files = [("open", open), ("plain", plain)].map(|(name, text)| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).expect("write");
        file
    });
    let output = Command::new("python3").args(["-c", READ]).args(&files).env("PYTHONPATH", packages).output();
    let output = output.expect("start python3");
    assert!(output.status.success(), "{}\n{open}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn prometheus_sees_one_run_that_goes_on_although_its_machines_do_not() {
    let lab = Lab::on_files();
    let at = free();
    let listen = ["--metrics-listen".to_owned(), at.to_string()];
    let listen: Vec<&str> = listen.iter().map(String::as_str).collect();
    let running = lab.run("watched").args(&listen).hold_after(2 * EVERY + 1).start();
    running.held();
    running.wait_for_step("checkpoint", 2 * EVERY);
    let first = get(at, "/metrics", OPEN);
    assert_eq!(value(&first, "trainer_step{"), Some((2 * EVERY + 1) as f64), "{first}");
    assert_eq!(value(&first, "trainer_durable_steps_total{"), Some((2 * EVERY) as f64), "{first}");
    assert_eq!(value(&first, "trainer_interruptions_total{"), Some(0.0), "{first}");
    running.signal(Signal::KILL);
    running.finish();

    let running = lab.resume("watched").args(&listen).hold_after(1).start();
    running.held();
    let second = get(at, "/metrics", OPEN);
    assert_eq!(value(&second, "trainer_generations_total{"), Some(2.0), "{second}");
    for counter in ["checkpoints", "durable_steps", "generations", "interruptions", "lost_steps", "worker_restarts"] {
        let [before, now] = [&first, &second].map(|text| value(text, &format!("trainer_{counter}_total{{")).unwrap());
        assert!(now >= before, "{counter} went from {before} back to {now}");
    }
    if std::env::var_os("TRAINER_TESTS_ALL").is_some() {
        prometheus_reads(&second, &get(at, "/metrics", "*/*"));
    }
    running.let_go();
    running.finish().expect_code(0);
}

#[test]
fn the_textfile_of_a_complete_run_counts_as_its_journal_does() {
    let lab = Lab::on_files();
    let file = lab.path("trainer.prom").display().to_string();
    let dies = format!("worker.step=kill@step={}", EVERY + 1);
    let lives = [lab.run("filed").faults(&dies), lab.resume("filed")].map(|life| {
        let life = life.args(&["--metrics-file", &file, "--set", "restart.max=0"]).finish();
        (life.code(), life.committed().len() as f64)
    });
    assert_eq!((lives[0].0, lives[1].0), (Some(70), Some(0)));
    let text = std::fs::read_to_string(&file).expect("the file");
    for (name, expected) in [
        ("trainer_checkpoints_total{", lives[0].1 + lives[1].1),
        ("trainer_durable_steps_total{", STEPS as f64),
        ("trainer_generations_total{", 2.0),
        ("trainer_finished{", 1.0),
        ("trainer_step{", STEPS as f64),
    ] {
        assert_eq!(value(&text, name), Some(expected), "{name} in\n{text}");
    }
}

#[test]
fn an_address_that_is_taken_is_said_with_what_to_type() {
    let lab = Lab::on_files();
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let at = taken.local_addr().expect("an address").to_string();
    let life = lab.run("taken").args(&["--metrics-listen", &at]).finish();
    life.expect_code(78).expect_said(&["show figures at 127.0.0.1:", "--metrics-listen 9401"]);
}

/// A web hook that takes everything.
struct Hook {
    at: SocketAddr,
    heard: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Hook {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let at = listener.local_addr().expect("an address");
        let heard: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
        let all = Arc::clone(&heard);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                let mut text = Vec::new();
                let mut buffer = [0; 4096];
                let body = loop {
                    let read = stream.read(&mut buffer).expect("read");
                    text.extend_from_slice(&buffer[..read]);
                    let said = String::from_utf8_lossy(&text).into_owned();
                    let Some((head, body)) = said.split_once("\r\n\r\n") else { continue };
                    let head = head.to_lowercase();
                    let length =
                        head.split_once("content-length: ").map_or("0", |(_, rest)| rest.lines().next().unwrap_or("0"));
                    if read == 0 || body.len() >= length.parse::<usize>().expect("a length") {
                        break body.to_owned();
                    }
                };
                let line = String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned();
                all.lock().unwrap().push((line, serde_json::from_str(&body).unwrap_or_default()));
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        });
        Self { at, heard }
    }

    fn url(&self) -> String {
        format!("http://{}/hush-hush", self.at)
    }

    fn alerts(&self) -> Vec<Value> {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|(line, _)| line.starts_with("POST ")).map(|(_, body)| body.clone()).collect()
    }
}

fn stopped(running: Running) {
    running.held();
    running.signal(Signal::TERM);
    running.wait_for("the notice", |event| event.kind() == "notice");
    running.let_go();
    running.finish().expect_code(75);
}

#[test]
fn a_hook_hears_of_every_end_and_nobody_reads_its_address() {
    let lab = Lab::on_files();
    let hook = Hook::start();
    let told = [("TRAINER_ALERT", hook.url()), ("TRAINER_ALERT_PING", hook.url())];
    stopped(lab.run("told").envs(&told).hold_after(EVERY + 1).start());
    let dies = format!("worker.step=kill@step={}", 2 * EVERY);
    let life = lab.resume("told").envs(&told).faults(&dies).args(&["--set", "restart.max=0"]).finish();
    assert!(!life.story().contains("hush-hush"), "{}", life.story());
    life.expect_code(70);
    lab.resume("told").envs(&told).args(&["--set", "restart.max=3"]).finish().expect_code(0);
    let alerts = hook.alerts();
    let causes: Vec<&str> = alerts.iter().filter_map(|alert| alert["alert"].as_str()).collect();
    assert_eq!(causes, ["interrupted", "failed", "completed"], "{alerts:?}");
    assert!(alerts.iter().all(|alert| alert["run_id"] == "told" && alert["version"] == 1), "{alerts:?}");
    assert!(alerts[1]["message"].as_str().unwrap().contains("SIGKILL"), "{alerts:?}");
    let pings = hook.heard.lock().unwrap().iter().filter(|(line, _)| line.starts_with("GET /hush-hush ")).count();
    assert!(pings >= 3, "{pings} pings of three lives");
    for key in lab.keys("told", "") {
        let bytes = lab.read("told", &key);
        assert!(!bytes.windows(9).any(|part| part == b"hush-hush"), "{key}");
    }
}

#[test]
fn a_receiver_that_answers_nothing_holds_no_run_up_and_a_wrong_address_is_refused_unread() {
    let lab = Lab::on_files();
    // It accepts connections, and reads nothing.
    let silent = TcpListener::bind("127.0.0.1:0").expect("bind");
    let url = format!("http://{}/", silent.local_addr().expect("an address"));
    let life = lab.run("unheard").args(&["--alert", &url, "--alert-ping", &url]).finish().expect_code(0);
    life.expect_said(&["alerts have not been delivered"]);
    let wrong = [("TRAINER_ALERT", "http://example.com/hush-hush".to_owned())];
    let life = lab.run("wrong").envs(&wrong).finish();
    assert!(!life.story().contains("hush-hush"), "{}", life.story());
    life.expect_code(78).expect_said(&["--alert or TRAINER_ALERT: expected https"]);
}

#[test]
fn an_sns_topic_gets_alerts() {
    let Some(moto) = Moto::start("topics") else { return };
    let topic = moto.query("sns", "2010-03-31", "CreateTopic", &[("Name", "alarms")]);
    let arn = topic.split_once("<TopicArn>").and_then(|(_, rest)| rest.split_once('<')).expect("an ARN").0.to_owned();
    let queue = moto.json("sqs", "AmazonSQS.CreateQueue", &json!({"QueueName": "mails"}));
    let queue = queue["QueueUrl"].as_str().expect("a URL").to_owned();
    let endpoint = "arn:aws:sqs:us-east-1:123456789012:mails";
    let subscription = [("TopicArn", arn.as_str()), ("Protocol", "sqs"), ("Endpoint", endpoint)];
    moto.query("sns", "2010-03-31", "Subscribe", &subscription);
    let lab = Lab::on_files();
    let cloud = [
        ("TRAINER_ALERT", arn.clone()),
        ("AWS_ENDPOINT_URL", moto.endpoint()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "a".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "b".to_owned()),
    ];
    lab.run("mailed").envs(&cloud).finish().expect_code(0);
    let received = moto.json("sqs", "AmazonSQS.ReceiveMessage", &json!({"QueueUrl": queue}));
    let body = received["Messages"][0]["Body"].as_str().expect("a message");
    let body: Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(body["Subject"], "trainer: completed", "{body}");
    assert!(body["Message"].as_str().unwrap().starts_with("run mailed: completed after step "), "{body}");
}

#[test]
fn a_train_job_gets_the_progress_of_its_run() {
    let lab = Lab::on_files();
    let controller = Hook::start();
    let token = lab.path("token");
    std::fs::write(&token, "a-token\n").expect("write a token");
    let pod = [
        ("KUBEFLOW_TRAINER_SERVER_URL", controller.url()),
        ("KUBEFLOW_TRAINER_SERVER_TOKEN", token.display().to_string()),
    ];
    lab.run("pod").envs(&pod).finish().expect_code(0);
    let reports = controller.alerts();
    let last = &reports.last().expect("a report")["trainerStatus"];
    assert_eq!((&last["progressPercentage"], &last["estimatedRemainingSeconds"]), (&100.into(), &0.into()), "{last}");
    let steps = STEPS.to_string();
    let done = last["metrics"].as_array().unwrap().iter().find(|metric| metric["name"] == "current_step");
    assert_eq!(done.expect("the step")["value"], steps.as_str(), "{last}");
}

/// The alerts' manual names every variable and option.
#[test]
fn the_manual_names_what_there_is() {
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/alerts/README.md");
    let manual = std::fs::read_to_string(manual).expect("the manual");
    for name in
        ["--alert ", "--alert-ping ", "--alert-lag", "TRAINER_ALERT`", "TRAINER_ALERT_PING", "TRAINER_ALERT_LAG"]
    {
        assert!(manual.contains(name), "{name}");
    }
}
