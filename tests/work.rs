//! `trainer work` with moto's SQS as its queue, a store on disk or on our S3 server, and our job API and metadata
//! server.

mod machine;

use std::{collections::BTreeMap, sync::Arc};

use aws_sdk_sqs::{
    Client,
    config::{BehaviorVersion, Credentials, Region},
    types::{MessageAttributeValue, QueueAttributeName},
};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::streams::{How, Which, broken};
use crate::support::{
    job_api::{JobApi, TOKEN, Told},
    lab::{EVERY, Lab, STEPS, Store, data_set, model_config},
    metadata::{
        Asked, Cloud, INSTANCE, LIFECYCLE, MetadataServer, SCHEDULED_EVENTS, SPOT, azure_event, parameter, spot_notice,
    },
    moto::Moto,
    proxy::{Fault, Often, Rule},
    s3,
    trainer::{Event, Finished, Running, Trainer},
};

/// A queue with its dead-letter queue, and everything else that a consumer needs.
struct Shop {
    lab: Lab,
    moto: Arc<Moto>,
    api: JobApi,
    client: Client,
    queue: String,
    dead: String,
    runtime: tokio::runtime::Runtime,
}

impl Shop {
    /// `None`: moto is not installed.
    fn open(max_receive_count: u32) -> Option<Self> {
        Self::open_with(Lab::on_files, max_receive_count)
    }
    /// The same, with another place for its runs.
    fn open_with(lab: impl FnOnce() -> Lab, max_receive_count: u32) -> Option<Self> {
        let moto = Arc::new(Moto::start(s3::BUCKET)?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime of the shop");
        let config = aws_sdk_sqs::config::Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .endpoint_url(moto.endpoint())
            .credentials_provider(Credentials::new(s3::ACCESS_KEY, s3::SECRET_KEY, None, None, "test"))
            .build();
        let client = Client::from_conf(config);
        let (queue, dead) = runtime.block_on(async {
            let make = async |name: &str, attributes| {
                let made = client.create_queue().queue_name(name).set_attributes(attributes).send().await;
                made.expect("make a queue").queue_url.expect("its URL")
            };
            let dead = make("dead", None).await;
            let policy = json!({
                "deadLetterTargetArn": "arn:aws:sqs:us-east-1:123456789012:dead",
                "maxReceiveCount": max_receive_count.to_string(),
            });
            let policy = [(QueueAttributeName::RedrivePolicy, policy.to_string())].into();
            (make("jobs", Some(policy)).await, dead)
        });
        Some(Self { lab: lab(), moto, api: JobApi::start(), client, queue, dead, runtime })
    }
    fn send(&self, body: &str) {
        let sent = self.client.send_message().queue_url(&self.queue).message_body(body).send();
        self.runtime.block_on(sent).expect("send a message");
    }
    /// A job whose configuration is at a URI.
    fn job(&self, run: &str, set: Value) -> String {
        let uri = format!("file://{}", self.lab.path("run.toml").display());
        json!({"version": 1, "run_id": run, "config_uri": uri, "set": set}).to_string()
    }
    fn count(&self, queue: &str) -> [u64; 3] {
        count(&self.moto, queue)
    }
    /// Bodies and attributes of the visible messages of a queue.
    fn take(&self, queue: &str) -> Vec<(String, BTreeMap<String, MessageAttributeValue>)> {
        let asked = self.client.receive_message().queue_url(queue).max_number_of_messages(10);
        let asked = asked.message_attribute_names("All").send();
        let messages = self.runtime.block_on(asked).expect("receive").messages.unwrap_or_default();
        let plain = |message: aws_sdk_sqs::types::Message| {
            let attributes = message.message_attributes.unwrap_or_default().into_iter().collect();
            (message.body.unwrap_or_default(), attributes)
        };
        messages.into_iter().map(plain).collect()
    }
    /// A consumer that exits two seconds after its last job. If it is killed, its job becomes visible again after five.
    fn worker(&self) -> Trainer {
        self.patient_worker("2s")
    }
    fn patient_worker(&self, idle_exit: &str) -> Trainer {
        self.leasing_worker("5s", idle_exit)
    }
    fn leasing_worker(&self, lease: &str, idle_exit: &str) -> Trainer {
        let worker = self.strict_worker(lease, idle_exit).args(&["--allow", &self.places()]);
        let worker = match &self.lab.store {
            // The queue's URL gives the place of the queue.
            Store::S3(..) => worker,
            _ => worker.envs(&s3::client_env(&self.moto.endpoint())),
        };
        worker.envs(&self.api.env())
    }
    /// The places that these tests' messages name: the lab, the data of all labs, and stores that do not answer.
    fn places(&self) -> String {
        let folder = |path: &std::path::Path| format!("file://{}", path.display());
        let data = folder(data_set().parent().expect("a folder"));
        [data, folder(&self.lab.path("")), "s3://bucket".into(), "gs://nowhere".into()].join(",")
    }
    /// A consumer that allows no place but its own store.
    fn strict_worker(&self, lease: &str, idle_exit: &str) -> Trainer {
        self.lab.command(&["work", "--queue", &self.queue, "--lease", lease, "--idle-exit", idle_exit]).json()
    }
    /// Demands that both queues are empty.
    #[track_caller]
    fn expect_empty(&self) {
        assert_eq!((self.count(&self.queue), self.count(&self.dead)), ([0; 3], [0; 3]), "messages left");
    }
    /// Demands that the token appears nowhere.
    #[track_caller]
    fn expect_no_token(&self, lives: &[&Finished]) {
        for life in lives {
            assert!(!life.stdout.contains(TOKEN) && !life.stderr.contains(TOKEN), "the token is in the output");
        }
        fn search(folder: &std::path::Path) {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    search(&entry.path());
                } else if let Ok(bytes) = std::fs::read(entry.path()) {
                    let found = bytes.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes());
                    assert!(!found, "the token is in {}", entry.path().display());
                }
            }
        }
        search(&self.lab.path(""));
    }
}

/// Numbers of a queue's messages: visible, in flight, delayed.
fn count(moto: &Moto, queue: &str) -> [u64; 3] {
    let request = json!({"QueueUrl": queue, "AttributeNames": ["All"]});
    let answer = moto.json("sqs", "AmazonSQS.GetQueueAttributes", &request);
    ["", "NotVisible", "Delayed"].map(|kind| {
        let number = &answer["Attributes"][format!("ApproximateNumberOfMessages{kind}")];
        number.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no number of messages: {answer}"))
    })
}

fn is_job(event: &Event, state: &str) -> bool {
    event.kind() == "job" && event.value["state"] == state
}

/// The events of jobs, in order: `claimed`, …
fn states(life: &Finished) -> Vec<String> {
    life.of_kind("job").iter().map(|event| event.value["state"].as_str().unwrap_or_default().to_owned()).collect()
}

fn events(told: &[Told]) -> Vec<&str> {
    told.iter().map(Told::event).collect()
}

#[track_caller]
fn wait_for_job(running: &Running, state: &str) -> Event {
    running.wait_for(&format!("a job that is {state}"), |event| is_job(event, state))
}

#[test]
fn a_job_runs_to_its_end_and_leaves_the_queue() {
    let Some(shop) = Shop::open(3) else { return };
    shop.send(&shop.job("first", json!({"train.steps": STEPS})));
    let life = shop.worker().finish().expect_code(0);
    assert_eq!(states(&life), ["claimed", "completed"], "{}", life.story());
    assert_eq!(life.of_kind("idle").len(), 1, "{}", life.story());
    shop.lab.expect_as_undisturbed("first", &[&life]);
    shop.expect_empty();

    let told = shop.api.heard();
    assert!(told.iter().all(|told| told.path == "/v1/jobs/first/events"), "{told:?}");
    let said = events(&told);
    assert_eq!((said.first(), said.last()), (Some(&"started"), Some(&"completed")), "{said:?}");
    assert!(said[1..said.len() - 1].iter().all(|event| *event == "progress") && said.len() >= 3, "{said:?}");
    let sequences: Vec<u64> = told.iter().filter_map(|told| told.body["sequence"].as_u64()).collect();
    assert!(sequences.is_sorted_by(|a, b| a < b), "{sequences:?}");
    let keys: std::collections::BTreeSet<&str> = told.iter().map(|told| told.key.as_str()).collect();
    assert_eq!(keys.len(), told.len(), "each report has its own key");
    let (first, last) = (&told[0].body, &told[told.len() - 1].body);
    assert_eq!((&first["total_steps"], &first["received"]), (&STEPS.into(), &1.into()), "{first}");
    assert_eq!((&last["step"], &last["exit_code"]), (&STEPS.into(), &0.into()), "{last}");
    assert_eq!(last["loss"], life.last("completed").value["loss"], "{last}");

    // The same message once more: there is nothing left to do, and that is reported again.
    shop.send(&shop.job("first", json!({})));
    let again = shop.worker().finish().expect_code(0);
    assert_eq!(
        (states(&again).as_slice(), again.of_kind("step").len()),
        (&["claimed".into(), "completed".into()][..], 0)
    );
    assert_eq!(shop.api.heard().last().map(|told| told.body["step"].clone()), Some(STEPS.into()));
    shop.expect_empty();
    shop.expect_no_token(&[&life, &again]);
}

/// The job API gets progress and the queue its step although no reader reads the consumer's output.
#[test]
fn a_consumer_with_stalled_readers_reports_and_settles_its_jobs() {
    let Some(shop) = Shop::open(1) else { return };
    shop.send(&shop.job("unread", json!({})));
    let (first, _reader) = broken(shop.worker().hold_after(EVERY + 1), Which::Both, How::StandsStill);
    let running = first.start();
    running.held();
    running.wait_until("a report of progress", || events(&shop.api.heard()).contains(&"progress"));
    running.signal(Signal::HUP);
    running.let_go();
    running.finish().expect_code(75);
    let copies = shop.take(&shop.queue);
    let step = copies[0].1.get("trainer-step").map(|step| step.string_value.clone());
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert!(step.is_some(), "{copies:?}");
    let said = shop.api.heard();
    assert_eq!(events(&said).last(), Some(&"interrupted"), "{said:?}");
}

#[test]
fn an_interruption_does_not_count_against_a_job() {
    // The second receive of one message would move it to the dead-letter queue.
    let Some(shop) = Shop::open(1) else { return };
    shop.send(&shop.job("asked", json!({})));
    let running = shop.worker().hold_after(EVERY + 1).start();
    running.wait_for_step("step", EVERY + 1);
    running.held();
    running.signal(Signal::TERM);
    running.let_go();
    let first = running.finish().expect_code(75);
    assert_eq!(states(&first), ["claimed", "interrupted"], "{}", first.story());
    assert_eq!(shop.count(&shop.queue), [1, 0, 0], "the copy is to be seen at once\n{}", first.story());
    let report = shop.api.heard().pop().expect("a report");
    assert_eq!((report.event(), &report.body["exit_code"]), ("interrupted", &75.into()), "{report:?}");

    let second = shop.worker().finish().expect_code(0);
    let claimed = &second.of_kind("job")[0].value;
    assert_eq!((&claimed["received"], &claimed["interruptions"]), (&1.into(), &1.into()), "{}", second.story());
    assert_eq!(states(&second), ["claimed", "completed"], "{}", second.story());
    assert_eq!(second.resumed_from(), first.last("interrupted").step().expect("its step"));
    shop.lab.expect_as_undisturbed("asked", &[&first, &second]);
    shop.expect_empty();
    shop.expect_no_token(&[&first, &second]);
}

#[test]
fn the_job_of_a_killed_consumer_becomes_visible_again_and_is_resumed() {
    let Some(shop) = Shop::open(2) else { return };
    shop.send(&shop.job("killed", json!({})));
    let running = shop.worker().hold_after(EVERY + 1).start();
    running.wait_for_step("checkpoint", EVERY);
    running.wait_for_step("step", EVERY + 1);
    let first = running.power_off();
    // In flight, or visible again by now.
    assert_eq!(shop.count(&shop.queue).iter().sum::<u64>(), 1, "no consumer was left to hand it over");

    // The lease must run out first; no time is slept away here: this consumer waits for messages.
    let second = shop.patient_worker("2m").args(&["--once"]).finish().expect_code(0);
    // It was received twice, all that this queue allows; but the message of a run that has progressed is renewed.
    assert_eq!(states(&second), ["claimed", "renewed", "claimed", "completed"], "{}", second.story());
    let received: Vec<&Value> = second.of_kind("job").iter().map(|event| &event.value["received"]).collect();
    assert_eq!(received, [2, 2, 1, 1], "{}", second.story());
    assert!(second.resumed_from() >= EVERY, "{}", second.story());
    shop.lab.expect_as_undisturbed("killed", &[&first, &second]);
    shop.expect_empty();
}

#[test]
fn a_failing_job_ends_in_the_dead_letter_queue_and_the_consumer_continues() {
    let Some(shop) = Shop::open(2) else { return };
    let broken = shop.job("broken", json!({"train.stepz": 1}));
    for body in ["poison", r#"{"run_id":"newer","version":9}"#, &broken] {
        shop.send(body);
    }
    shop.send(&shop.job("good", json!({})));
    let life = shop.worker().finish().expect_code(0);
    shop.lab.expect_as_undisturbed("good", &[&life]);
    assert_eq!(shop.count(&shop.queue), [0; 3], "{}", life.story());
    let mut dead: Vec<String> = shop.take(&shop.dead).into_iter().map(|(body, _)| body).collect();
    dead.sort();
    let mut expected = ["poison".to_owned(), r#"{"run_id":"newer","version":9}"#.to_owned(), broken];
    expected.sort();
    assert_eq!(dead, expected, "{}", life.story());
    life.clone().expect_said(&["train.stepz", "2 of 2", "version 9"]);

    let failed: Vec<Told> = shop.api.heard().into_iter().filter(|told| told.event() == "failed").collect();
    let of = |path: &str| failed.iter().filter(|told| told.path == path).collect::<Vec<_>>();
    for run in ["broken", "newer"] {
        let of = of(&format!("/v1/jobs/{run}/events"));
        let received: Vec<&Value> = of.iter().map(|told| &told.body["received"]).collect();
        assert_eq!(received, [1, 2], "{failed:?}");
        assert!(of[0].body["exit_code"] == 78 && of[0].body["reason"].is_string(), "{of:?}");
    }
    let nameless: Vec<&Told> = failed.iter().filter(|told| told.body["run_id"].is_null()).collect();
    assert_eq!(nameless.len(), 2, "{failed:?}");
    let id = nameless[0].body["message_id"].as_str().expect("its id");
    assert_eq!(nameless[0].path, format!("/v1/jobs/{id}/events"));
}

#[test]
fn a_silent_job_is_put_away_and_a_consumer_exits_only_if_its_own_store_is_silent() {
    let Some(shop) = Shop::open(1) else { return };
    let silent = [("GOOGLE_BASE_URL", "http://127.0.0.1:1".to_owned()), ("GOOGLE_SKIP_SIGNATURE", "true".to_owned())];
    let unreachable = shop.job("unreachable", json!({"data.train": "gs://nowhere/data", "storage.attempts": 2}));
    shop.send(&unreachable);
    let first = shop.patient_worker("15s").args(&["--once"]).envs(&silent).finish().expect_code(69);
    assert_eq!(states(&first), ["claimed", "unreachable"], "{}", first.story());
    let report = shop.api.heard().pop().expect("a report");
    assert_eq!((report.event(), &report.body["exit_code"]), ("failed", &69.into()), "{report:?}");

    // That was the one receive that this queue allows. Meanwhile other jobs are trained.
    shop.send(&shop.job("good", json!({})));
    let second = shop.patient_worker("8s").envs(&silent).finish().expect_code(0);
    shop.lab.expect_as_undisturbed("good", &[&second]);
    assert_eq!(shop.count(&shop.queue), [0; 3], "{}", second.story());
    let dead: Vec<String> = shop.take(&shop.dead).into_iter().map(|(body, _)| body).collect();
    assert_eq!(dead, [unreachable], "{}", second.story());

    shop.send(&shop.job("cut-off", json!({"storage.attempts": 2})));
    let silent = [("AWS_ENDPOINT_URL", "http://127.0.0.1:1".to_owned())];
    let third = shop.leasing_worker("1h", "2s").args(&["--store", "s3://nowhere/runs"]);
    let third = third.envs(&silent).finish().expect_code(69);
    assert_eq!(states(&third), ["claimed", "unreachable"], "{}", third.story());
    assert_eq!(shop.count(&shop.queue), [0, 0, 1], "a copy that is not seen for a while\n{}", third.story());
    assert_eq!(shop.api.heard().pop().map(|told| told.event().to_owned()).as_deref(), Some("interrupted"));
}

#[test]
fn one_of_two_consumers_trains_and_the_other_puts_the_message_back() {
    let Some(shop) = Shop::open(2) else { return };
    let job = shop.job("long", json!({"train.steps": 1_000_000}));
    shop.send(&job);
    let running = shop.worker().start();
    running.wait_for_step("checkpoint", EVERY);
    shop.send(&job);
    let other = shop.worker().finish().expect_code(0);
    assert_eq!(states(&other), ["claimed", "stand_by"], "{}", other.story());
    assert!(other.of_kind("formed").is_empty() && other.of_kind("idle").len() == 1, "{}", other.story());
    running.signal(Signal::TERM);
    let first = running.finish().expect_code(75);
    assert_eq!(first.of_kind("formed").len(), 1, "nobody else took the run\n{}", first.story());
    // One copy from each; the run's id makes them one job.
    assert_eq!(shop.count(&shop.queue).iter().sum::<u64>(), 2, "{}", first.story());
}

#[test]
fn a_message_held_for_long_is_handed_over_while_training_continues() {
    let Some(shop) = Shop::open(2) else { return };
    shop.send(&shop.job("long", json!({"train.steps": 1_000_000})));
    let running = shop.worker().args(&["--max-hold", "8s"]).start();
    wait_for_job(&running, "handed_over");
    assert_eq!(shop.count(&shop.queue), [0, 0, 1], "a copy that is not seen for a while");
    let mut seen = 0;
    let at = running
        .next(&mut seen, |event| is_job(event, "handed_over"))
        .and_then(|_| running.next(&mut seen, |event| event.kind() == "checkpoint"));
    assert!(at.is_some(), "training continues");
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    assert_eq!(states(&life), ["claimed", "handed_over", "interrupted"], "{}", life.story());
    assert_eq!(shop.count(&shop.queue), [0, 0, 1], "no second copy\n{}", life.story());
}

#[test]
fn training_does_not_wait_for_the_job_api() {
    let Some(shop) = Shop::open(3) else { return };
    shop.api.hang();
    shop.send(&shop.job("unheard", json!({})));
    let life = shop.worker().finish().expect_code(0).expect_said(&["not received by the job API"]);
    shop.lab.expect_as_undisturbed("unheard", &[&life]);
    assert!(shop.api.asked() >= 1 && shop.api.told().is_empty());
    shop.expect_empty();
    shop.expect_no_token(&[&life]);
}

#[test]
fn a_report_that_fails_is_repeated_under_its_key_and_in_order() {
    let Some(shop) = Shop::open(3) else { return };
    shop.api.answer_next(&[500, 503, 429]);
    shop.send(&shop.job("repeated", json!({})));
    let life = shop.worker().finish().expect_code(0);
    let told = shop.api.told();
    let tries: Vec<(&str, u16)> = told.iter().take(4).map(|told| (told.event(), told.status)).collect();
    assert_eq!(tries, [("started", 500), ("started", 503), ("started", 429), ("started", 200)], "{}", life.story());
    assert!(told[..4].iter().all(|other| other.key == told[0].key), "{told:?}");
    assert_eq!(events(&shop.api.heard()).last(), Some(&"completed"), "{told:?}");

    // A refused report is not repeated, and is no reason to stop.
    shop.api.answer_always(403);
    shop.send(&shop.job("repeated", json!({})));
    let before = shop.api.told().len();
    shop.worker().finish().expect_code(0).expect_said(&["refused a report", "403"]);
    assert_eq!(shop.api.told().len(), before + 1);
}

#[test]
fn a_consumer_exits_from_an_empty_queue_and_names_a_wrong_one() {
    let Some(shop) = Shop::open(3) else { return };
    let life = shop.worker().finish().expect_code(0);
    assert_eq!((life.of_kind("idle").len(), life.events.len()), (1, 1), "{}", life.story());
    assert!(shop.api.told().is_empty());

    let running = shop.patient_worker("never").start();
    running.wait_until_said("waiting for jobs");
    running.signal(Signal::TERM);
    running.finish().expect_code(75);

    let missing = format!("{}x", shop.queue);
    let other = |queue: &str| {
        let store = shop.lab.uri();
        let worker = shop.lab.command(&["work", "--queue", queue, "--store", &store, "--idle-exit", "1s"]);
        worker.envs(&s3::client_env(&shop.moto.endpoint()))
    };
    other(&missing).finish().expect_code(78).expect_said(&["NonExistentQueue", &missing]);
    other("https://sqs.us-east-1.amazonaws.com/1/jobs.fifo").finish().expect_code(78).expect_said(&["FIFO"]);
    let tokenless = other(&shop.queue).envs(&shop.api.env()).envs(&[("WORKER_TOKEN", String::new())]);
    tokenless.finish().expect_code(78).expect_said(&["JOB_API_BASE_URL", "WORKER_TOKEN"]);
}

#[test]
fn a_configuration_and_its_files_may_be_in_the_bucket() {
    let Some(shop) = Shop::open_with(Lab::on_s3, 2) else { return };
    // A relative name in it names a file beside it.
    let beside = shop.lab.path("model.json").display().to_string();
    let server = shop.lab.server();
    server.write("conf/deep/run.toml", shop.lab.config("").replace(&beside, "models/model.json"));
    server.write("conf/deep/models/model.json", model_config(512));
    let job = |run: &str, name: &str| {
        json!({"run_id": run, "config_uri": format!("s3://bucket/conf/deep/{name}")}).to_string()
    };
    shop.send(&job("remote", "run.toml"));
    shop.send(&job("lost", "gone.toml"));
    let life = shop.worker().finish().expect_code(0).expect_said(&["s3://bucket/conf/deep/gone.toml"]);
    shop.lab.expect_as_undisturbed("remote", &[&life]);
    let lost: Vec<_> = shop.api.heard().into_iter().filter(|told| told.body["run_id"] == "lost").collect();
    let said: Vec<_> = lost.iter().map(|told| (told.event(), told.body["exit_code"].as_u64())).collect();
    assert_eq!(said, [("failed", Some(78)); 2], "{}", life.story());
    assert_eq!((shop.count(&shop.queue), shop.count(&shop.dead)), ([0; 3], [1, 0, 0]), "{}", life.story());
}

#[test]
fn the_job_api_may_be_named_by_parameters() {
    let Some(shop) = Shop::open(3) else { return };
    let api = shop.api.env();
    for (name, value, kind) in [("job-api-base-url", &api[0].1, "String"), ("worker-token", &api[1].1, "SecureString")]
    {
        let parameter = json!({"Name": format!("/trainer/jobs/{name}"), "Value": value, "Type": kind});
        shop.moto.json("ssm", "AmazonSSM.PutParameter", &parameter);
    }
    // An empty variable counts as not set.
    let unset = [("JOB_API_BASE_URL", String::new()), ("WORKER_TOKEN", String::new())];
    shop.send(&shop.job("reported", json!({})));
    let life = shop.worker().args(&["--ssm-path", "/trainer/jobs/"]).envs(&unset).finish().expect_code(0);
    let heard = shop.api.heard();
    assert_eq!(
        (events(&heard).first(), events(&heard).last()),
        (Some(&"started"), Some(&"completed")),
        "{}",
        life.story()
    );
    shop.expect_no_token(&[&life]);

    // The environment overrides the parameters.
    shop.send(&shop.job("reported", json!({})));
    let before = heard.len();
    let wrong = [("WORKER_TOKEN", "another".to_owned())];
    let life = shop.worker().args(&["--ssm-path", "/trainer/jobs"]).envs(&unset).envs(&wrong).finish().expect_code(0);
    let last = shop.api.told().pop().map(|told| told.status);
    assert_eq!((shop.api.heard().len(), last), (before, Some(401)), "{}", life.story());
}

#[test]
fn changed_storage_settings_hold_for_the_queue_too() {
    let Some(shop) = Shop::open_with(Lab::on_s3, 3) else { return };
    let lab = &shop.lab;
    let stopped = |command: Trainer| {
        let running = command.hold_after(2).start();
        running.held();
        running.signal(Signal::TERM);
        running.let_go();
        running.finish().expect_code(75)
    };
    let first = stopped(lab.run("classed"));
    let second = stopped(lab.resume("classed").args(&["--set", "storage.storage_class=STANDARD_IA"]));
    shop.send(&shop.job("classed", json!({})));
    let third = shop.worker().finish().expect_code(0);
    lab.expect_as_undisturbed("classed", &[&first, &second, &third]);
    let newest = lab.newest_checkpoint("classed");
    assert!(newest.ends_with("-g0003"), "{newest}\n{}", third.story());
    let asked = lab.server().asked(&format!("runs/classed/{newest}/manifest.json"), "PutObject").expect("a put");
    assert_eq!(asked.storage_class.as_deref(), Some("STANDARD_IA"), "{}", third.story());
}

#[test]
fn a_consumer_asked_to_exit_while_it_reads_a_job_renews_it_without_waiting_for_the_store() {
    let mut proxy = None;
    let lab = || {
        let (lab, between) = Lab::on_s3_through_proxy(0);
        proxy = Some(between);
        lab
    };
    let Some(shop) = Shop::open_with(lab, 1) else { return };
    let proxy = proxy.expect("made with the lab");
    shop.lab.server().write("conf/run.toml", shop.lab.config(""));
    shop.send(&json!({"run_id": "unread", "config_uri": "s3://bucket/conf/run.toml"}).to_string());
    let job = json!({"run_id": "unread", "config_uri": "s3://bucket/conf/run.toml", "store": shop.lab.uri()});
    for (n, target) in ["/conf/", "journal"].into_iter().enumerate() {
        let fault = Fault::Stall(std::time::Duration::from_secs(3600));
        proxy.arm(Rule { method: "GET", target, fault, often: Often::Next(1_000_000) });
        let before = proxy.broken();
        let running = shop.leasing_worker("1h", "2m").start();
        running.wait_until("a request to a silent store", || proxy.broken() > before);
        running.signal(Signal::TERM);
        let life = running.finish().expect_code(75);
        assert_eq!(states(&life), ["claimed", "interrupted"], "{}", life.story());
        assert_eq!(shop.count(&shop.queue), [1, 0, 0], "to be seen at once\n{}", life.story());
        proxy.disarm();
        if n == 0 {
            shop.moto.json("sqs", "AmazonSQS.PurgeQueue", &json!({"QueueUrl": shop.queue}));
            shop.send(&job.to_string());
        }
    }
}

#[test]
fn a_machine_on_which_every_run_fails_does_not_empty_the_queue() {
    // The second receive of one message would move it to the dead-letter queue.
    let Some(shop) = Shop::open(1) else { return };
    for run in ["one", "other"] {
        shop.send(&shop.job(run, json!({"restart.max": 0})));
    }
    let life = shop.leasing_worker("1h", "2m").faults("worker.step=panic").finish().expect_code(70);
    let life = life.expect_said(&["two consecutive jobs failed on this machine"]);
    assert_eq!(states(&life), ["claimed", "failed", "claimed", "failed"], "{}", life.story());
    assert_eq!(shop.count(&shop.queue), [0, 1, 1], "the first has counted, the second is renewed\n{}", life.story());
    let heard = shop.api.heard();
    assert_eq!(events(&heard).iter().filter(|event| **event == "failed").count(), 1, "{heard:?}");
    assert_eq!(heard.last().map(Told::event), Some("interrupted"), "the second continues elsewhere: {heard:?}");
}

#[test]
fn a_consumer_refused_by_its_own_store_exits_without_blaming_the_job() {
    let Some(shop) = Shop::open_with(Lab::on_s3, 1) else { return };
    shop.lab.server().set_rules(|rules| rules.deny_writes = true);
    shop.send(&shop.job("denied", json!({})));
    let uri = shop.lab.uri();
    let life = shop.leasing_worker("1h", "2m").args(&["--store", &uri]).finish().expect_code(77);
    assert_eq!(states(&life), ["claimed", "failed"], "{}", life.story());
    assert_eq!(shop.count(&shop.queue), [0, 0, 1], "renewed\n{}", life.story());

    // Only the job's store refuses, so the job fails.
    shop.moto.json("sqs", "AmazonSQS.PurgeQueue", &json!({"QueueUrl": shop.queue}));
    let own = format!("file://{}", shop.lab.path("own").display());
    let job = json!({"run_id": "elsewhere", "store": uri, "config": shop.lab.config("")}).to_string();
    shop.send(&job);
    let life = shop.leasing_worker("1h", "2m").args(&["--once", "--store", &own]).finish().expect_code(77);
    assert_eq!(shop.count(&shop.queue), [0, 1, 0], "this receive counts\n{}", life.story());
}

#[test]
fn a_queue_is_not_empty_while_a_failed_job_is_put_away() {
    let Some(shop) = Shop::open(2) else { return };
    let broken = shop.job("broken", json!({"train.stepz": 1}));
    shop.send(&broken);
    // Its pauses, 3 s and 6 s, are longer than the consumer would wait for another message.
    let life = shop.leasing_worker("30s", "1s").finish().expect_code(0);
    assert_eq!(states(&life), ["claimed", "failed", "claimed", "failed"], "{}", life.story());
    assert_eq!((shop.count(&shop.queue), shop.count(&shop.dead)), ([0; 3], [1, 0, 0]), "{}", life.story());
}

#[test]
fn a_message_that_names_a_forbidden_place_ends_in_the_dead_letter_queue() {
    let Some(shop) = Shop::open_with(Lab::on_s3, 1) else { return };
    let secret = shop.lab.path("secret.json").display().to_string();
    let touched = shop.lab.path("touched");
    std::fs::write(&touched, "").expect("write a file");
    let data = format!("file://{}", data_set().display());
    let server = shop.lab.server();
    let beside = shop.lab.path("model.json").display().to_string();
    server.write("conf/run.toml", shop.lab.config("").replace(&beside, "model.json"));
    server.write("conf/model.json", model_config(512));
    let at = |set: Value| json!({"run_id": "bad", "config_uri": "s3://bucket/conf/run.toml", "set": set});
    let inline = |toml: String| json!({"run_id": "bad", "config": toml});
    let bad = [
        at(json!({"notice.file": touched})),
        at(json!({"model.init_from": "s3://private/weights"})),
        at(json!({"model.config": &secret})),
        at(json!({"data.train": format!("{data}/../secret")})),
        at(json!({"data.train": "/etc"})),
        json!({"run_id": "bad", "config_uri": "s3://bucket/conf/run.toml", "store": "s3://outsider/runs"}),
        json!({"run_id": "bad", "config_uri": "s3://bucket/conf/run.toml", "store": "file:///tmp/runs"}),
        json!({"run_id": "bad", "config_uri": "s3://outsider/run.toml"}),
        json!({"run_id": "bad", "config_uri": format!("file://{}", shop.lab.path("run.toml").display())}),
        inline(shop.lab.config("[notice]\nfile = \"x\"\n")),
        inline(shop.lab.config("").replace(&beside, &secret)),
    ];
    for body in &bad {
        shop.send(&body.to_string());
    }
    shop.send(&json!({"run_id": "good", "config_uri": "s3://bucket/conf/run.toml"}).to_string());
    let mine = [("--store", shop.lab.uri()), ("--allow", format!("s3://bucket,{data}"))];
    let mut worker = shop.strict_worker("30s", "8s").envs(&shop.api.env());
    for (name, value) in &mine {
        worker = worker.args(&[name, value]);
    }
    let life = worker.finish().expect_code(0).expect_said(&["--allow s3://private/weights", "notice.file"]);
    shop.lab.expect_as_undisturbed("good", &[&life]);
    let failed: Vec<u64> = (life.of_kind("job").iter())
        .filter(|event| event.value["state"] == "failed")
        .filter_map(|event| event.value["exit_code"].as_u64())
        .collect();
    assert_eq!(failed, vec![78; bad.len()], "{}", life.story());
    // Their only receive has counted.
    assert_eq!(
        (shop.count(&shop.queue), shop.count(&shop.dead)),
        ([0; 3], [bad.len() as u64, 0, 0]),
        "{}",
        life.story()
    );
}
