//! `trainer doctor` with stores that lack something, metadata services that do not answer, and quotas that are too
//! small.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use hyper::{Request, Response, body::Incoming, service::service_fn};
use s3s::Body;
use serde_json::Value;

use crate::support::{
    lab::{Lab, ORIGIN, data_set},
    metadata::{Fault, MetadataServer, PREEMPTED, SCHEDULED_EVENTS, TOKEN},
    s3::CreateOnce,
    trainer::{Finished, Trainer, read},
};

/// Each line of the answer, by its check.
#[track_caller]
fn lines(life: &Finished) -> BTreeMap<String, Value> {
    let line = |event: &crate::support::trainer::Event| {
        (event.value["check"].as_str().unwrap_or_default().to_owned(), event.value.clone())
    };
    life.events.iter().map(line).collect()
}

/// Demands these verdicts, and a remedy on every line that is not OK.
#[track_caller]
fn expect(life: &Finished, verdicts: &[(&str, &str)]) -> BTreeMap<String, Value> {
    let lines = lines(life);
    for (check, verdict) in verdicts {
        assert_eq!(lines[*check]["verdict"], *verdict, "{check}\n{}", life.story());
    }
    for line in lines.values() {
        let wants = ["warn", "fail"].contains(&line["verdict"].as_str().unwrap_or_default());
        assert_eq!(wants, line["todo"].is_string(), "{line}\n{}", life.story());
    }
    lines
}

/// With a long time to stop, wherever these tests run.
fn doctor(lab: &Lab) -> Trainer {
    lab.command(&["doctor", "run.toml"]).json().envs(&[("TRAINER_STOP_WINDOW", "1h".to_owned())])
}

const STORE: [&str; 6] =
    ["store put and get", "store list", "store create-once", "store multipart", "store sweep", "store delete"];

#[test]
fn a_machine_with_everything_that_a_run_needs_passes() {
    let lab = Lab::on_s3();
    lab.server().set_rules(|rules| rules.abort_after_days = Some(2));
    let life = doctor(&lab).finish().expect_code(0);
    expect(&life, &STORE.map(|check| (check, "ok")));
    expect(
        &life,
        &[
            ("configuration", "ok"),
            ("dataset", "ok"),
            ("libtorch", "ok"),
            ("memory", "ok"),
            ("lifecycle rule", "ok"),
            ("clock", "ok"),
            ("instance metadata", "skipped"),
            ("gcp metadata", "skipped"),
            ("azure metadata", "skipped"),
            ("spot quota", "skipped"),
        ],
    );
    assert!(lab.server().keys("").is_empty(), "left behind: {:?}", lab.server().keys(""));
    assert_eq!(lab.server().open_uploads(), 0, "an upload is left behind");
}

/// The model of the laboratory fits anything that is sold; a large one on a small GPU does not, and the line says what
/// does.
#[test]
fn the_memory_that_a_run_needs_is_said_before_it_starts() {
    let lab = Lab::on_files();
    let asked = |more: &[&str]| lab.command(&[&["doctor", "run.toml"][..], more].concat()).json();
    let life = asked(&["--gpu-memory", "24GiB"]).envs(&[("TRAINER_STOP_WINDOW", "1h".to_owned())]).finish();
    let found = expect(&life.expect_code(0), &[("memory", "ok"), ("gpu memory", "ok")]);
    let gpu = &found["gpu memory"]["memory"];
    let strategies: Vec<&str> =
        gpu["strategies"].as_array().expect("a list").iter().filter_map(|row| row["strategy"].as_str()).collect();
    assert_eq!(strategies, ["ddp", "zero1", "shard"]);
    assert_eq!((gpu["available"].as_u64(), gpu["workers"].as_u64()), (Some(24 << 30), Some(2)));
    for row in gpu["strategies"].as_array().expect("a list") {
        let terms = row["terms"].as_object().expect("terms").values().filter_map(Value::as_u64).sum::<u64>();
        assert_eq!(row["bytes"].as_u64(), Some(terms), "{row}");
    }
    let host = &found["memory"]["memory"];
    assert!(host["slot"].as_u64().is_some_and(|slot| slot > 0) && host["slots"] == 2, "{host}");

    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models/llama-8b.json");
    let text = lab.config("").replace(&lab.path("model.json").display().to_string(), &model.display().to_string());
    lab.write_config("run.toml", &text);
    let life = asked(&["--gpu-memory", "40GiB", "--nproc-per-node", "8"]).finish().expect_code(78);
    let found = lines(&life);
    let line = found["gpu memory"].to_string();
    assert_eq!(found["gpu memory"]["verdict"], "fail", "{line}");
    for said in ["not even 1 fits", "--set parallel.strategy=shard"] {
        assert!(line.contains(said), "{said}\n{}", life.story());
    }
    // As a table, for people.
    let life = lab.command(&["doctor", "run.toml", "--gpu-memory", "40GiB"]).finish().expect_code(78);
    assert!(life.stdout.contains("ddp *") && life.stdout.contains("activations"), "{}", life.story());
    let life = lab.command(&["doctor", "--gpu-memory", "40GB"]).finish().expect_code(64);
    assert!(life.stderr.contains("24GiB"), "{}", life.story());
}

#[test]
fn a_missing_ability_of_a_store_is_named() {
    let lab = Lab::on_s3();
    // A missing lifecycle rule is a warning, not a failure.
    let life = doctor(&lab).finish().expect_code(0);
    expect(&life, &[("lifecycle rule", "warn")]);

    lab.server().set_rules(|rules| rules.deny_upload_list = true);
    expect(&doctor(&lab).finish().expect_code(0), &[("store sweep", "warn"), ("store multipart", "ok")]);

    lab.server().set_rules(|rules| rules.deny_abort = true);
    let life = doctor(&lab).finish().expect_code(77);
    let found = expect(&life, &[("store multipart", "fail"), ("store put and get", "ok")]);
    assert!(found["store multipart"]["found"].to_string().contains("abort"), "{}", life.story());

    lab.server().set_rules(|rules| rules.deny_writes = true);
    let life = doctor(&lab).finish().expect_code(77);
    expect(
        &life,
        &[("store put and get", "fail"), ("store list", "ok"), ("store create-once", "fail"), ("clock", "skipped")],
    );

    for create_once in [CreateOnce::Ignored, CreateOnce::Racy] {
        lab.server().set_rules(|rules| {
            (rules.deny_writes, rules.deny_abort, rules.create_once) = (false, false, create_once);
        });
        let life = doctor(&lab).finish().expect_code(78);
        expect(&life, &[("store put and get", "ok"), ("store create-once", "fail")]);
    }
    assert!(lab.server().keys("").is_empty(), "left behind: {:?}", lab.server().keys(""));
}

#[test]
fn a_missing_store_is_one_line_among_others() {
    let lab = Lab::on_files();
    let text = lab.config("").replace(&lab.uri(), "s3://nobody/runs");
    lab.write_config("run.toml", &text);
    // A port without a listener.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
    let life = doctor(&lab).envs(&crate::support::s3::client_env(&format!("http://{closed}"))).finish().expect_code(69);
    expect(&life, &[("store put and get", "fail"), ("libtorch", "ok"), ("memory", "ok"), ("stop time-out", "ok")]);
    assert!(!lines(&life).contains_key("store list"), "a store that is not there is said once\n{}", life.story());

    lab.write_config("run.toml", &lab.config("\n[chekpoint]\nevery = \"1h\"\n"));
    let life = doctor(&lab).finish().expect_code(78);
    let found = expect(&life, &[("configuration", "fail"), ("memory", "skipped"), ("store", "skipped")]);
    assert!(found["configuration"]["found"].to_string().contains("chekpoint"), "{}", life.story());
}

/// Problems that would stop a run in its first minute, on a machine that is paid for: data and weights that are missing
/// or incomplete.
#[test]
fn the_places_that_a_configuration_names_are_checked() {
    let lab = Lab::on_s3();
    let text = lab.config("");
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        lab.write_config("run.toml", &text.replace(from, to));
        doctor(&lab).finish()
    };
    let data = format!("file://{}", data_set().display());
    for (uri, code) in [("file:///no/such/folder", 78), ("s3://trainer/no-such-data", 78)] {
        let uri = uri.replace("trainer", crate::support::s3::BUCKET);
        let life = with(&data, &uri).expect_code(code);
        let found = expect(&life, &[("configuration", "ok"), ("dataset", "fail"), ("store put and get", "ok")]);
        for said in [uri.as_str(), "trainer data prepare"] {
            assert!(found["dataset"].to_string().contains(said), "{said}\n{}", life.story());
        }
    }
    // In a store only the index is read.
    lab.server().write("data/index.json", read(&data_set().join("index.json")));
    let remote = format!("s3://{}/data", crate::support::s3::BUCKET);
    let life = with(&data, &remote).expect_code(0);
    let found = expect(&life, &[("dataset", "ok")]);
    assert!(found["dataset"]["found"].to_string().contains("for validation"), "{}", life.story());
    lab.server().write("data/index.json", "{");
    expect(&with(&data, &remote).expect_code(78), &[("dataset", "fail")]);
    // Longer than any shard.
    let life = with("sequence_length = 32", "sequence_length = 1000000").expect_code(78);
    expect(&life, &[("dataset", "fail")]);

    let begin = |folder: &str| with("kind = \"llama\"\n", &format!("kind = \"llama\"\ninit_from = \"{folder}\"\n"));
    let life = begin("no-such-model").expect_code(78);
    let found = expect(&life, &[("dataset", "ok"), ("initial weights", "fail")]);
    assert!(found["initial weights"].to_string().contains("no-such-model"), "{}", life.story());
    let index = r#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    std::fs::create_dir_all(lab.path("base")).expect("folder of a model");
    std::fs::write(lab.path("base/model.safetensors.index.json"), index).expect("write an index");
    std::fs::write(lab.path("base/model-00001-of-00002.safetensors"), "0123").expect("write a shard");
    let life = begin("base").expect_code(78);
    let found = expect(&life, &[("initial weights", "fail")]);
    assert!(found["initial weights"].to_string().contains("model-00002-of-00002"), "{}", life.story());
    std::fs::write(lab.path("base/model-00002-of-00002.safetensors"), "4567").expect("write a shard");
    // All files exist, and none of them holds tensors.
    let life = begin("base").expect_code(78);
    let found = expect(&life, &[("initial weights", "fail")]);
    assert!(
        found["initial weights"].to_string().contains("model-00001-of-00002.safetensors: safetensors header"),
        "{}",
        life.story()
    );
}

/// Every cloud's service has its line, and a machine of one cloud gets no advice for another.
#[test]
fn each_clouds_metadata_service_has_a_line() {
    let lab = Lab::on_files();
    let google = lab.path("google");
    let firmware = google.join("sys/class/dmi/id");
    std::fs::create_dir_all(&firmware).expect("folder of the firmware's tables");
    std::fs::write(firmware.join("product_name"), "Google Compute Engine\n").expect("write a table");
    let asked = |server: &MetadataServer, root: &Path| {
        let root = [("TRAINER_HOST_ROOT", root.display().to_string())];
        doctor(&lab).envs(&server.envs()).envs(&root).finish().expect_code(0)
    };
    let metadata = MetadataServer::start();
    expect(&asked(&metadata, &google), &[("gcp metadata", "ok"), ("azure metadata", "ok")]);
    assert!(metadata.requests_of(SCHEDULED_EVENTS).is_empty(), "asking for scheduled events switches them on");
    metadata.storm_on(PREEMPTED, Fault::Status(503));
    let life = asked(&metadata, &google);
    let found = expect(&life, &[("gcp metadata", "warn"), ("azure metadata", "ok")]);
    assert!(!found["gcp metadata"].to_string().contains("HttpEndpoint"), "{}", life.story());
    metadata.calm();

    // No service: on its own cloud a warning, elsewhere nothing.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
    let silent = [
        ("NO_GCE_CHECK", "false".to_owned()),
        ("GCE_METADATA_HOST", closed.to_string()),
        ("TRAINER_AZURE_METADATA_ENDPOINT", format!("http://{closed}")),
        ("TRAINER_HOST_ROOT", google.display().to_string()),
    ];
    let life = doctor(&lab).envs(&silent).finish().expect_code(0);
    expect(&life, &[("gcp metadata", "warn"), ("azure metadata", "skipped"), ("instance metadata", "skipped")]);
}

#[test]
fn the_time_to_stop_is_compared_with_the_saves_of_a_run() {
    let lab = Lab::on_interrupted_run();
    let asked = |window: &str| {
        let doctor = doctor(&lab).args(&["--run-id", ORIGIN]);
        doctor.envs(&[("TRAINER_STOP_WINDOW", window.to_owned())]).finish().expect_code(0)
    };
    expect(&asked("1h"), &[("stop time-out", "ok")]);
    let life = asked("1ms");
    let found = expect(&life, &[("stop time-out", "warn")]);
    assert!(found["stop time-out"]["found"].to_string().contains("a save takes up to"), "{}", life.story());
}

/// Service Quotas, which moto does not know for EC2: G and VT have this value in us-east-1; in every other region none
/// was ever applied, and AWS's default is 0.
struct Quotas {
    address: SocketAddr,
    value: Arc<AtomicU64>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Quotas {
    fn start(value: u64) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let (address, value) = (listener.local_addr().expect("its address"), Arc::new(AtomicU64::new(value)));
        let shared = Arc::clone(&value);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let value = Arc::clone(&shared);
                let service = service_fn(move |request| answer(Arc::clone(&value), request));
                tokio::spawn(async move {
                    let server = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
                    let _ = server.serve_connection(hyper_util::rt::TokioIo::new(socket), service).await;
                });
            }
        });
        Self { address, value, runtime: Some(runtime) }
    }
}

async fn answer(value: Arc<AtomicU64>, request: Request<Incoming>) -> Result<Response<Body>, s3s::StdError> {
    let value = value.load(Ordering::Relaxed);
    let header =
        |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (operation, signed_for) = (header("x-amz-target"), header("authorization"));
    let body = Body::from(request.into_body()).store_all_limited(1 << 20).await?;
    let asked: Value = serde_json::from_slice(&body)?;
    // g5.xlarge is of the family G and VT.
    let known = asked["ServiceCode"] == "ec2" && asked["QuotaCode"] == "L-3819A6DF";
    let said = |value| {
        (200, format!(r#"{{"Quota":{{"QuotaName":"All G and VT Spot Instance Requests","Value":{value}.0}}}}"#))
    };
    let (status, text) = match operation.rsplit('.').next() {
        Some("GetServiceQuota") if known && signed_for.contains("/us-east-1/") => said(value),
        Some("GetAWSDefaultServiceQuota") if known => said(0),
        _ => (400, r#"{"__type":"NoSuchResourceException","Message":"no such quota"}"#.to_owned()),
    };
    let answer = Response::builder().status(status).header("content-type", "application/x-amz-json-1.1");
    Ok(answer.body(Body::from(bytes::Bytes::from(text)))?)
}

impl Drop for Quotas {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Quotas {
    /// The environment of an account with these quotas.
    fn envs(&self) -> Vec<(&'static str, String)> {
        let keys = [("AWS_ACCESS_KEY_ID", "AKIATEST"), ("AWS_SECRET_ACCESS_KEY", "secret")];
        let mut variables: Vec<(&'static str, String)> = keys.map(|(name, value)| (name, value.to_owned())).to_vec();
        variables.push(("AWS_ENDPOINT_URL_SERVICE_QUOTAS", format!("http://{}", self.address)));
        // A profile of the machine's user would name a region.
        variables.push(("AWS_CONFIG_FILE", "/no/such/file".to_owned()));
        variables
    }
}

/// A user who meets "Max spot instance count exceeded" has no machine yet.
#[test]
fn a_quota_can_be_checked_before_there_is_a_machine() {
    let lab = Lab::on_files();
    let quotas = Quotas::start(11);
    let asked = |line: &str| {
        let doctor = lab.command(&["doctor"]).json().envs(&quotas.envs());
        doctor.args(&line.split_whitespace().collect::<Vec<_>>()).finish()
    };
    let quota = |life: &Finished, verdict| expect(life, &[("spot quota", verdict)])["spot quota"].to_string();
    let life = asked("--instance-type g5.xlarge --region us-east-1").expect_code(0);
    assert!(quota(&life, "ok").contains("11 vCPUs of G and VT"), "{}", life.story());
    let life = asked("--instance-type g5.xlarge --region us-east-1 --count 2").expect_code(0);
    quota(&life, "warn");
    let life = asked("--instance-type g5.xlarge --region us-east-1 --count 3").expect_code(78);
    let said = quota(&life, "fail");
    assert!(said.contains("take 12") && said.contains("--desired-value 16"), "{}", life.story());
    // Never applied: AWS's default.
    let life = asked("--instance-type g5.xlarge --region eu-west-3").expect_code(78);
    let said = quota(&life, "fail");
    assert!(said.contains("0 vCPUs of G and VT spot machines in eu-west-3 (AWS's default"), "{}", life.story());
    // Nothing unknown is OK.
    for line in ["--instance-type g5.xlarge", "--instance-type p9.xlarge --region us-east-1"] {
        quota(&asked(line).expect_code(0), "warn");
    }
    let life = asked("--instance-type p4d.24xlarge --region us-east-1").expect_code(0);
    assert!(quota(&life, "warn").contains("NoSuchResourceException"), "{}", life.story());
    asked("--region us-east-1").expect_code(64).expect_said(&["--instance-type"]);
}

#[test]
fn metadata_hop_limit_and_quota() {
    let lab = Lab::on_files();
    let metadata = MetadataServer::start();
    let quotas = Quotas::start(0);
    let on_instance = || doctor(&lab).envs(&metadata.envs()).envs(&quotas.envs());
    let life = on_instance().finish().expect_code(78);
    let found = expect(&life, &[("instance metadata", "ok"), ("spot quota", "fail")]);
    for said in ["L-3819A6DF", "Max spot instance count exceeded"] {
        assert!(found["spot quota"]["todo"].to_string().contains(said), "{}", life.story());
    }
    quotas.value.store(8, Ordering::Relaxed);
    expect(&on_instance().finish().expect_code(0), &[("instance metadata", "ok"), ("spot quota", "ok")]);
    // A machine of 48 vCPUs counts as 48 for the quota, whatever a container shows of them.
    metadata.set(
        "/latest/dynamic/instance-identity/document",
        serde_json::json!({"instanceId": "i-1", "region": "us-east-1", "instanceType": "g5.12xlarge"}),
    );
    let life = on_instance().finish().expect_code(78);
    let found = expect(&life, &[("spot quota", "fail")]);
    assert!(found["spot quota"]["found"].to_string().contains("g5.12xlarge takes 48"), "{}", life.story());

    // The answer to the PUT is dropped, as with a hop limit of 1; a plain GET is answered with 401.
    metadata.storm_on(TOKEN, Fault::Hang);
    let life = on_instance().finish().expect_code(78);
    let found = expect(&life, &[("instance metadata", "fail"), ("spot quota", "skipped")]);
    assert!(found["instance metadata"]["todo"].to_string().contains("HttpPutResponseHopLimit"), "{}", life.story());
    metadata.calm();
    metadata.storm(Fault::Status(403));
    expect(&on_instance().finish().expect_code(0), &[("instance metadata", "warn")]);
}

#[test]
fn lines_for_people_say_what_to_do() {
    let lab = Lab::on_s3();
    let life = lab.command(&["doctor", "run.toml"]).finish().expect_code(0);
    let line = |start: &str| life.stdout.lines().any(|line| line.starts_with(start));
    assert!(line("ok    libtorch") && line("warn  lifecycle rule"), "{}", life.story());
    assert!(life.stdout.contains("→ add a rule with AbortIncompleteMultipartUpload"), "{}", life.story());
    let bare = lab.command(&["doctor"]).finish().expect_code(0);
    assert!(bare.stdout.contains("none is named: give CONFIG or --store"), "{}", bare.story());
}
