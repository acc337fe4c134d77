//! `trainer boot` on starting machines: where it finds its settings, what it does if it is not alone, and how it ends.
//!
//! Parameters, groups and objects are on moto; the machine's own facts are on our metadata server; refusals that moto
//! does not give come from a server of three lines. `PATH` holds stand-ins where a machine might power off.

mod common_names;
mod leaving;

use std::{
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
};

use rustix::process::Signal;

use crate::support::{
    lab::{EVERY, Lab, STEPS, data_set, model_config},
    metadata::{Fault, INSTANCE, LIFECYCLE, MetadataServer, TOKEN},
    moto::Moto,
    proxy::{self, Often, Rule},
    s3,
    trainer::{Finished, Running, Trainer, losses},
};

/// A text that must appear nowhere.
const TOKEN_OF_THE_API: &str = "s3cr3t-of-the-job-api";

/// Puts parameters below `/trainer/test`; names with a `!` are encrypted.
fn put_parameters(moto: &Moto, pairs: &[(&str, &str)]) {
    for (name, value) in pairs {
        let kind = if name.contains('!') { "SecureString" } else { "String" };
        let name = format!("/trainer/test/{}", name.trim_start_matches('!'));
        let parameter = serde_json::json!({"Name": name, "Value": value, "Type": kind});
        moto.json("ssm", "AmazonSSM.PutParameter", &parameter);
    }
}

/// A machine that knows itself through its metadata service, and uses this AWS. No region and no key is in its
/// environment.
fn machine(lab: &Lab, metadata: &MetadataServer, endpoint: &str, arguments: &[&str]) -> Trainer {
    let aws = [("AWS_ENDPOINT_URL", endpoint.to_owned()), ("AWS_ALLOW_HTTP", "true".to_owned())];
    let own = [("AWS_ENDPOINT_URL_AUTO_SCALING", endpoint.to_owned()), nowhere(lab)];
    Trainer::new(&lab.path(""), arguments).envs(&metadata.envs()).envs(&aws).envs(&own)
}

/// No file tree that names this machine's maker.
fn nowhere(lab: &Lab) -> (&'static str, String) {
    ("TRAINER_HOST_ROOT", lab.path("no-such-root").display().to_string())
}

fn boot(lab: &Lab, arguments: &[&str]) -> Trainer {
    let all: Vec<&str> = ["boot"].iter().chain(arguments).copied().collect();
    lab.command(&all).envs(&[nowhere(lab)]).json()
}

/// A folder with these programs, each of which writes its name and arguments to `called`.
fn stand_ins(lab: &Lab, names: &[&str]) -> (&'static str, String) {
    let folder = lab.path("bin");
    std::fs::create_dir_all(&folder).expect("folder of stand-ins");
    for name in names {
        let path = folder.join(name);
        let script = format!("#!/bin/sh\necho {name} \"$@\" >> {}\n", lab.path("called").display());
        std::fs::write(&path, script).expect("write a stand-in");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("make it a program");
    }
    ("PATH", folder.display().to_string())
}

fn called(lab: &Lab) -> String {
    std::fs::read_to_string(lab.path("called")).unwrap_or_default()
}

/// A server that gives every request this answer.
fn answering(status: &str, kind: &str, body: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("its address"));
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    // It ends with the test process.
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let (mut connection, mut request, mut buffer) = (connection, Vec::new(), [0; 4096]);
            // The request's head, and the body that it announces.
            loop {
                let read = connection.read(&mut buffer).unwrap_or(0);
                request.extend_from_slice(&buffer[..read]);
                let text = String::from_utf8_lossy(&request).to_ascii_lowercase();
                let length = text.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok());
                let body = text.find("\r\n\r\n").map(|at| request.len() - at - 4);
                if read == 0 || body.is_some_and(|body| body >= length.unwrap_or(0)) {
                    break;
                }
            }
            let _ = connection.write_all(answer.as_bytes());
        }
    });
    endpoint
}

/// The configuration without a store, and with its model described in a file of this name.
fn plain_config(model: &str) -> String {
    format!(
        r#"model = {{ kind = "llama", config = "{model}" }}
data = {{ train = "file://{}", sequence_length = 32 }}
checkpoint = {{ every = "{EVERY} steps" }}
parallel = {{ nproc_per_node = 2 }}
[train]
steps = {STEPS}
global_batch = 12
max_micro_batch = 2
seed = 1234
threads = 1
optimizer = {{ kind = "adamw", lr = 3e-3 }}
schedule = {{ kind = "cosine", warmup_steps = 4 }}
"#,
        data_set().display()
    )
}

#[track_caller]
fn expect_secret_unseen(life: &Finished) {
    let seen = life.stdout.contains(TOKEN_OF_THE_API) || life.stderr.contains(TOKEN_OF_THE_API);
    assert!(!seen, "the token is in the output\n{}", life.story());
}

#[test]
fn a_run_is_created_then_resumed_then_left_alone() {
    let lab = Lab::on_files();
    let uri = lab.uri();
    const KEPT: &str = "stays as the run was created";
    let first = boot(&lab, &["run.toml", "--run-id", "life", "--store", &uri, "--set", "train.seed=1234"]);
    let first = first.hold_after(EVERY + 1).start();
    first.wait_for_step("checkpoint", EVERY);
    first.held();
    first.signal(Signal::TERM);
    first.let_go();
    let first = first.finish().expect_code(75).expect_said(&["run life does not exist", "boot to joined"]);
    assert!(!first.stderr.contains(KEPT), "there was no run yet\n{}", first.story());

    // The configuration is gone by now: the run has its own copy.
    std::fs::remove_file(lab.path("run.toml")).expect("remove the configuration");
    let environment =
        [("TRAINER_CONFIG", "run.toml".into()), ("TRAINER_STORE", uri), ("TRAINER_RUN_ID", "life".into())];
    let mistyped = boot(&lab, &["--set", "model.confg=x"]).envs(&environment).finish();
    mistyped.expect_code(78).expect_said(&["unknown key model.confg"]);
    let again = || boot(&lab, &["--set", "train.seed=99"]).envs(&environment).finish().expect_code(0);
    let second = again().expect_said(&["run life exists", &format!("train.seed {KEPT}")]);
    assert!(second.resumed_from() >= EVERY, "{}", second.story());
    lab.expect_as_undisturbed("life", &[&first, &second]);

    let same = boot(&lab, &["--set", "train.seed=1234"]).envs(&environment).finish().expect_code(0);
    assert!(!same.stderr.contains(KEPT), "it is the run's own value\n{}", same.story());

    let before = lab.keys("life", "");
    for _ in 0..2 {
        let idle = again().expect_said(&["run has completed, nothing is left to do"]);
        assert!(idle.events.is_empty(), "{}", idle.story());
    }
    assert_eq!(lab.keys("life", ""), before, "a boot of a run that is complete has left something behind");
}

#[test]
fn each_mistake_has_its_own_exit_code() {
    let lab = Lab::on_files();
    let uri = lab.uri();
    boot(&lab, &["run.toml", "--store", &uri])
        .finish()
        .expect_code(78)
        .expect_said(&["no run is named", "run-id-template"]);
    boot(&lab, &["--run-id", "x", "--store", &uri])
        .finish()
        .expect_code(78)
        .expect_said(&["no configuration is named"]);
    boot(&lab, &["run.toml", "--run-id", "x", "--run-id-template", "y"]).finish().expect_code(64);
    boot(&lab, &["run.toml", "--run-id-template", "r{quater}"])
        .finish()
        .expect_code(78)
        .expect_said(&["unknown field {quater}", "{quarter}"]);
    boot(&lab, &["gone.toml", "--run-id", "x"]).finish().expect_code(78).expect_said(&["gone.toml"]);
    boot(&lab, &["--run-id", "x", "--ssm-path", "/p"]).finish().expect_code(78).expect_said(&["no region is known"]);

    let ssm = |endpoint: &str| {
        let keys = s3::client_env(endpoint);
        boot(&lab, &["--run-id", "x", "--ssm-path", "/p"]).envs(&keys).finish()
    };
    let body = r#"{"__type":"AccessDeniedException","message":"not authorized to perform: ssm:GetParametersByPath"}"#;
    ssm(&answering("400 Bad Request", "application/x-amz-json-1.1", body)).expect_code(77).expect_said(&[
        "read parameters below /p",
        "AccessDeniedException",
        "hint: allow this call to the role or user",
    ]);
    // A port without a listener.
    let closed = "127.0.0.1:1";
    ssm(&format!("http://{closed}")).expect_code(69).expect_said(&["read parameters below /p"]);
}

#[test]
fn parameters_give_the_settings_in_the_region_of_the_machine() {
    let Some(lab) = Lab::on_moto() else { return };
    let crate::support::lab::Store::Moto(moto) = lab.store.clone() else { unreachable!("made on moto") };
    let (metadata, model) = (MetadataServer::start(), lab.path("model.json").display().to_string());
    let config = plain_config(&model);
    // More than one page of ten.
    let notes: Vec<String> = (0..14).map(|n| format!("note-{n:02}")).collect();
    let mut pairs: Vec<(&str, &str)> = notes.iter().map(|name| (name.as_str(), "x")).collect();
    pairs.extend([
        ("config", config.as_str()),
        ("store", "s3://bucket/runs"),
        ("run-id", "of-the-parameters"),
        ("set/checkpoint.keep.last", "7"),
        ("set/checkpoint/keep/best", "0"),
        ("!worker-token", TOKEN_OF_THE_API),
        ("zone", TOKEN_OF_THE_API),
    ]);
    put_parameters(&moto, &pairs);
    let path = ["boot", "--ssm-path", "/trainer/test/"];
    // The environment overrides the parameters, and a flag overrides both.
    let environment = [("TRAINER_RUN_ID_TEMPLATE", "of-the-environment".to_owned())];
    let life = machine(&lab, &metadata, &moto.endpoint(), &path)
        .args(&["--run-id", "of-the-flag", "--set", "checkpoint.keep.last=2"])
        .envs(&environment)
        .json()
        .finish()
        .expect_code(0)
        .expect_said(&[
            "region us-east-1 from the instance identity",
            "21 parameters below /trainer/test: ",
            "worker-token",
            "ignoring unknown parameters below /trainer/test: note-00, ",
            ", zone",
            "run of-the-flag does not exist in s3://bucket/runs",
            "boot to joined",
        ]);
    expect_secret_unseen(&life);
    lab.expect_as_undisturbed("of-the-flag", &[&life]);
    let journal = lab.command(&["status", "--run-id", "of-the-flag", "--store", "s3://bucket/runs", "--json"]).finish();
    expect_secret_unseen(&journal.expect_code(0));

    let life = machine(&lab, &metadata, &moto.endpoint(), &path).envs(&environment).json().finish().expect_code(0);
    assert!(life.stderr.contains("run of-the-environment does not exist"), "{}", life.story());
    let life = machine(&lab, &metadata, &moto.endpoint(), &path).json().finish().expect_code(0);
    assert!(life.stderr.contains("run of-the-parameters does not exist"), "{}", life.story());
    expect_secret_unseen(&life);

    // The value of a wrong parameter is not shown.
    put_parameters(&moto, &[("bad/run-id", TOKEN_OF_THE_API), ("bad/run-id-template", "x")]);
    let twice = machine(&lab, &metadata, &moto.endpoint(), &["boot", "--ssm-path", "/trainer/test/bad"]).finish();
    expect_secret_unseen(&twice.expect_code(78).expect_said(&["/trainer/test/bad/run-id-template"]));
    let slashed = format!("{TOKEN_OF_THE_API}/x");
    put_parameters(&moto, &[("worse/run-id", &slashed)]);
    let wrong = machine(&lab, &metadata, &moto.endpoint(), &["boot", "--ssm-path", "/trainer/test/worse"]).finish();
    expect_secret_unseen(
        &wrong.expect_code(78).expect_said(&["parameter /trainer/test/worse/run-id is not a valid run id"]),
    );
}

#[test]
fn tags_give_the_settings_and_a_configuration_may_be_in_the_store() {
    let lab = Lab::on_s3();
    let server = lab.server();
    server.write("conf/deep/run.toml", plain_config("models/model.json"));
    server.write("conf/deep/models/model.json", model_config(512));
    let metadata = MetadataServer::start();
    let tags = [
        ("trainer:config-uri", "s3://bucket/conf/deep/run.toml"),
        ("trainer:store", "s3://bucket/runs"),
        ("trainer:run-id-template", "tagged"),
        ("trainer:set:train.steps", "3"),
        ("trainer:set:train.schedule.warmup_steps", "1"),
        ("trainer:worker-token", TOKEN_OF_THE_API),
        ("Name", "x"),
    ];
    metadata.set("/latest/meta-data/tags/instance", tags.map(|(key, _)| key).join("\n"));
    for (key, value) in tags {
        metadata.set(&format!("/latest/meta-data/tags/instance/{key}"), value);
    }
    let life = boot(&lab, &[]).envs(&metadata.envs()).finish().expect_code(0).expect_said(&[
        "6 tags of this instance",
        "unknown trainer: tags of this instance: worker-token",
        "run tagged does not exist in s3://bucket/runs",
    ]);
    assert_eq!(life.last("completed").step(), Some(3), "{}", life.story());
    expect_secret_unseen(&life);
    assert!(!metadata.requests().iter().any(|asked| asked.path.ends_with("/Name")), "another tag was asked for");
    for key in server.keys("") {
        let body = server.read(&key).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&body).contains(TOKEN_OF_THE_API), "the token is in {key}");
    }
}

#[test]
fn a_hanging_or_missing_metadata_service_delays_no_machine() {
    let lab = Lab::on_files();
    let metadata = MetadataServer::start();
    metadata.storm(Fault::Hang);
    let arguments = [
        "run.toml",
        "--run-id",
        "hang",
        "--set",
        "train.steps=2",
        "--set",
        "train.schedule.warmup_steps=0",
        "--set",
        "notice.sources=[\"signals\"]",
    ];
    boot(&lab, &arguments).envs(&metadata.envs()).finish().expect_code(0).expect_said(&[
        "this machine can't be identified",
        "hop limit of 1",
        "no region is known",
    ]);
    assert_eq!(metadata.requests_of(TOKEN).len(), 1, "it was asked again");

    drop(metadata);
    let closed = "127.0.0.1:1";
    let gone = [
        ("AWS_EC2_METADATA_DISABLED", "false".to_owned()),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{closed}")),
    ];
    let arguments = arguments.map(|argument| if argument == "hang" { "gone" } else { argument });
    boot(&lab, &arguments).envs(&gone).finish().expect_code(0).expect_said(&["no region is known"]);
}

/// The file trees of an EC2 instance.
fn on_ec2(lab: &Lab) -> (&'static str, String) {
    let root = lab.path("ec2");
    let tables = root.join("sys/class/dmi/id");
    std::fs::create_dir_all(&tables).expect("a folder");
    std::fs::write(tables.join("sys_vendor"), "Amazon EC2\n").expect("a file");
    ("TRAINER_HOST_ROOT", root.display().to_string())
}

#[test]
fn an_instance_with_unreadable_tags_is_asked_again_and_creates_no_run() {
    let lab = Lab::on_files();
    let metadata = MetadataServer::start();
    let elsewhere = format!("file://{}", lab.path("elsewhere").display());
    let value = "/latest/meta-data/tags/instance/trainer:store";
    metadata.set("/latest/meta-data/tags/instance", "trainer:store");
    metadata.set(value, elsewhere.as_str());
    let on_instance = || {
        let short = ["--set", "train.steps=2", "--set", "train.schedule.warmup_steps=0"];
        boot(&lab, &["run.toml", "--run-id", "tagged"]).args(&short).envs(&metadata.envs()).envs(&[on_ec2(&lab)])
    };
    metadata.set(value, 403);
    let unread = on_instance().finish().expect_code(69);
    let unread = unread.expect_said(&["tag trainer:store of this instance can't be read", "answered 403"]);
    assert!(unread.events.is_empty() && lab.keys("tagged", "").is_empty(), "{}", unread.story());

    // Passing errors, of a tag or of everything that the machine knows about itself.
    metadata.set(value, elsewhere.as_str());
    for (path, fault) in [(TOKEN, Fault::Status(503)), (value, Fault::Status(503)), (value, Fault::Status(429))] {
        let before = metadata.requests_of(path).len();
        metadata.storm_on(path, fault);
        let life = on_instance().start();
        metadata.wait_for(path, before + 1);
        metadata.calm();
        life.finish().expect_code(0).expect_said(&[&format!("in {elsewhere}")]);
    }
    assert!(lab.keys("tagged", "").is_empty(), "a second run");
}

/// Starts two machines for one new run; returns the one that trains first, then the other.
fn pair(lab: &Lab, run: &str, manner: impl Fn(Trainer) -> Trainer) -> (Running, Running) {
    let uri = lab.uri();
    let machine = || manner(boot(lab, &["run.toml", "--run-id", run, "--store", &uri])).start();
    let (one, other) = (machine(), machine());
    let first = one.wait_for("formed or standby event", |event| matches!(event.kind(), "formed" | "standby"));
    if first.kind() == "formed" { (one, other) } else { (other, one) }
}

#[test]
fn one_of_two_machines_trains_and_the_other_takes_over_after_a_kill() {
    let lab = Lab::on_files();
    // Far more steps than the first machine has time for.
    let (first, second) = pair(&lab, "pair", |it| it.args(&["--set", "train.steps=100000"]));
    second.wait_for("standby event", |event| event.kind() == "standby");
    first.wait_for_step("checkpoint", EVERY);
    let first = first.power_off().expect_killed();
    let newest = *first.committed().last().expect("a checkpoint");
    second.wait_for("checkpoint event", |event| event.kind() == "checkpoint");
    second.signal(Signal::TERM);
    let second = second.finish().expect_code(75);
    assert!(second.resumed_from() >= newest, "{}", second.story());
    let kinds = second.events.iter().map(|event| event.kind().to_owned());
    let order: Vec<String> = kinds.filter(|kind| matches!(kind.as_str(), "standby" | "formed")).collect();
    assert_eq!(order, ["standby", "formed"], "{}", second.story());
    assert!(first.of_kind("standby").is_empty(), "{}", first.story());
    // Every step from the first on; a step that both made is the same. The first may have got further without a
    // checkpoint.
    let last = second.last("interrupted").step().max(first.last("step").step()).expect("a step");
    assert_eq!(losses(&[&first, &second]).into_keys().collect::<Vec<_>>(), (1..=last).collect::<Vec<_>>());
    lab.expect_all_verify("pair");
}

#[test]
fn a_waiting_machine_has_nothing_to_do_after_completion_and_exits_on_request() {
    let lab = Lab::on_files();
    // Two more come while the first is at work.
    let (first, second) = pair(&lab, "end", |it| it.hold_after(2));
    second.wait_for("standby event", |event| event.kind() == "standby");
    let uri = lab.uri();
    let third = boot(&lab, &["--run-id", "end", "--store", &uri]).start();
    third.wait_for("standby event", |event| event.kind() == "standby");
    third.signal(Signal::TERM);
    let third = third.finish().expect_code(75).expect_said(&["asked to stop before this node has taken up the run"]);
    assert!(third.of_kind("formed").is_empty(), "{}", third.story());
    let impatient = boot(&lab, &["--run-id", "end", "--store", &uri, "--standby", "0s"]).finish();
    impatient.expect_code(79).expect_said(&["is alive"]);
    first.let_go();
    let (first, second) = (first.finish().expect_code(0), second.finish().expect_code(0));
    assert!(second.of_kind("formed").is_empty(), "{}", second.story());
    let steps: Vec<u64> = first.of_kind("step").iter().filter_map(|event| event.step()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "each step once, by the first alone");
}

/// Puts the data set into the lab's bucket, as `s3://bucket/data`.
fn upload_data(lab: &Lab) {
    for entry in std::fs::read_dir(data_set()).expect("the data set").flatten() {
        let name = entry.file_name().into_string().expect("a plain name");
        lab.server().write(&format!("data/{name}"), std::fs::read(entry.path()).expect("a file of the data set"));
    }
}

#[test]
fn datasets_are_kept_on_the_local_disk_of_the_machine() {
    let lab = Lab::on_s3();
    upload_data(&lab);
    let (root, disk) = (lab.path("root"), lab.path("disk"));
    for (path, text) in [
        ("sys/block/nvme1n1/device/model", "Amazon EC2 NVMe Instance Storage\n".to_owned()),
        ("proc/self/mounts", format!("/dev/nvme1n1 {} ext4 rw 0 0\n", disk.display())),
    ] {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("below the root")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    }
    std::fs::create_dir_all(&disk).expect("the disk");
    let short =
        ["--set", "train.steps=2", "--set", "train.schedule.warmup_steps=0", "--set", "data.train=s3://bucket/data"];
    boot(&lab, &["run.toml", "--run-id", "disk"])
        .args(&short)
        .envs(&[("TRAINER_HOST_ROOT", root.display().to_string())])
        .finish()
        .expect_code(0)
        .expect_said(&["datasets are kept on the local disk"]);
    let kept = std::fs::read_dir(disk.join("trainer/datasets")).expect("the cache").count();
    assert!(kept > 0 && !lab.path("cache/trainer/datasets").exists(), "{kept} entries on the disk");
}

#[test]
fn the_runs_storage_settings_hold_on_every_machine() {
    let lab = Lab::on_s3();
    let uri = lab.uri();
    let more = ["--set", "storage.encryption=sse-s3", "--set", "train.steps=100000"];
    let lives = [
        boot(&lab, &["run.toml", "--run-id", "kept"]).args(&more),
        boot(&lab, &["--run-id", "kept", "--store", &uri]),
        lab.resume("kept"),
    ];
    let mut generations = Vec::new();
    for life in lives {
        let life = life.start();
        life.wait_for("checkpoint event", |event| event.kind() == "checkpoint");
        life.signal(Signal::TERM);
        let life = life.finish().expect_code(75);
        let newest = lab.newest_checkpoint("kept");
        let asked = lab.server().asked(&format!("runs/kept/{newest}/manifest.json"), "PutObject").expect("a put");
        assert_eq!(asked.encryption.as_deref(), Some("AES256"), "{newest}\n{}", life.story());
        generations.push(newest.rsplit_once("-g").expect("its generation").1.to_owned());
    }
    assert_eq!(generations, ["0001", "0002", "0003"], "each life has made a checkpoint");
}

#[test]
fn changed_storage_settings_hold_at_once_and_from_then_on() {
    let lab = Lab::on_s3();
    let uri = lab.uri();
    let class = "storage.storage_class=STANDARD_IA";
    let lives = [
        (boot(&lab, &["run.toml", "--run-id", "changed", "--set", "train.steps=100000"]), [None, None]),
        (lab.resume("changed").args(&["--set", "storage.encryption=sse-s3"]), [Some("AES256"), None]),
        (boot(&lab, &["--run-id", "changed", "--store", &uri]), [Some("AES256"), None]),
        (boot(&lab, &["--run-id", "changed", "--store", &uri, "--set", class]), [Some("AES256"), Some("STANDARD_IA")]),
        (lab.resume("changed").args(&["--set", "storage.encryption=default"]), [None, Some("STANDARD_IA")]),
        (lab.resume("changed"), [None, Some("STANDARD_IA")]),
    ];
    for (n, (life, [encryption, class])) in lives.into_iter().enumerate() {
        let records = lab.keys("changed", "journal/").len();
        let life = life.start();
        life.wait_for("a step", |event| event.kind() == "step");
        life.signal(Signal::TERM);
        let life = life.finish().expect_code(75);
        let newest = lab.newest_checkpoint("changed");
        assert!(newest.ends_with(&format!("-g{:04}", n + 1)), "{newest}\n{}", life.story());
        // This includes the first records of this life: nothing is written with the old settings.
        let record = lab.keys("changed", "journal/").remove(records);
        for key in [format!("{newest}/manifest.json"), record] {
            let asked = lab.server().asked(&format!("runs/changed/{key}"), "PutObject").expect("a put");
            let found = [asked.encryption.as_deref(), asked.storage_class.as_deref()];
            assert_eq!(found, [encryption, class], "life {n}, {key}\n{}", life.story());
        }
    }
}

#[test]
fn the_look_up_of_the_run_obeys_the_attempts_of_this_command() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let life = lab.run("asked").start();
    life.wait_for("a step", |event| event.kind() == "step");
    life.signal(Signal::TERM);
    life.finish().expect_code(75);
    for (n, command) in ["resume", "boot"].into_iter().enumerate() {
        proxy.arm(Rule { method: "GET", target: "/bucket", fault: proxy::Fault::Reset, often: Often::Next(1_000_000) });
        let before = proxy.broken();
        let refused =
            lab.about(command, "asked").args(&["--set", "storage.attempts=2"]).envs(&[nowhere(&lab)]).finish();
        let refused = refused.expect_code(69);
        // The first record and the list are requested in parallel.
        let asked = proxy.broken() - before;
        assert!((2..=4).contains(&asked) && !refused.stderr.contains("attempt=2"), "{n}: {asked}\n{}", refused.story());
        proxy.disarm();
    }
}

#[test]
fn a_boot_stopped_before_the_run_exists_says_how_to_start_again() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    upload_data(&lab);
    let setting = ["--set", "data.train=\"s3://bucket/data\""];
    let uri = lab.uri();
    let stopped = |command: Trainer| {
        // The tokens do not arrive, for longer than this test may last.
        let fault = proxy::Fault::Stall(std::time::Duration::from_secs(3600));
        proxy.arm(Rule { method: "GET", target: "/data/train-", fault, often: Often::Next(1_000_000) });
        let before = proxy.broken();
        let running = command.args(&setting).start();
        running.wait_until("a request for tokens", || proxy.broken() > before);
        running.signal(Signal::TERM);
        let life = running.finish().expect_code(75);
        proxy.disarm();
        life
    };
    let machine = || boot(&lab, &["run.toml", "--run-id", "late", "--store", &uri]);
    for early in [stopped(lab.run("late")), stopped(machine())] {
        let early =
            early.expect_said(&["stopped before the run was created, nothing lost: run the same command again"]);
        assert!(!early.stderr.contains("trainer resume"), "there is nothing to resume\n{}", early.story());
        assert!(lab.keys("late", "").is_empty(), "{}", early.story());
    }
    // The message is right: the same command creates the run. An existing run is resumed, however early `boot` is
    // stopped.
    machine().args(&setting).args(&["--set", "train.steps=5"]).finish().expect_code(0);
    std::fs::remove_dir_all(lab.path("cache")).expect("remove the local copy");
    stopped(lab.resume("late").args(&["--set", "train.steps=9"]))
        .expect_said(&["continue with: trainer resume --run-id late"]);
}

#[test]
fn boot_waits_for_gpus_or_says_that_they_are_not_used() {
    let lab = Lab::on_files();
    let root = lab.path("gpus");
    let device = root.join("sys/bus/pci/devices/0000:00:1e.0");
    std::fs::create_dir_all(&device).expect("a folder");
    std::fs::write(device.join("vendor"), "0x10de\n").expect("a file");
    std::fs::write(device.join("class"), "0x030200\n").expect("a file");
    let on_it = |run: &str| {
        let arguments = ["run.toml", "--run-id", run, "--device-wait", "0s"];
        let short = ["--set", "train.steps=2", "--set", "train.schedule.warmup_steps=0"];
        let root = [("TRAINER_HOST_ROOT", root.display().to_string())];
        boot(&lab, &arguments).args(&short).envs(&root)
    };
    // GPUs hidden from this process are not waited for.
    let hidden = on_it("hidden").envs(&[("CUDA_VISIBLE_DEVICES", String::new())]).finish().expect_code(0);
    if cfg!(torch_cuda) {
        hidden.expect_said(&["1 GPUs of this machine are not used: CUDA_VISIBLE_DEVICES hides them"]);
        let without = on_it("driverless").finish().expect_code(69);
        let without = without.expect_said(&[
            "1 NVIDIA devices are on the bus and 0 can be used",
            "the NVIDIA driver",
            "within 0 s",
        ]);
        assert!(lab.keys("driverless", "").is_empty(), "{}", without.story());
        // A machine with nothing to do needs no device.
        on_it("hidden").finish().expect_code(0).expect_said(&["run has completed"]);
    } else {
        hidden.expect_said(&["1 GPUs of this machine are not used"]);
        let without = on_it("driverless").finish().expect_code(0);
        without.expect_said(&["1 GPUs of this machine are not used: this build has no CUDA"]);
    }
}

#[test]
fn a_boot_stopped_during_its_look_up_exits_at_once_and_begins_nothing() {
    let lab = Lab::on_files();
    let metadata = MetadataServer::start();
    metadata.storm(Fault::Hang);
    // An instance, whose service is asked again and again.
    let machine = || boot(&lab, &["run.toml", "--run-id", "early"]).envs(&metadata.envs()).envs(&[on_ec2(&lab)]);
    for signal in [Signal::TERM, Signal::INT, Signal::USR1] {
        let before = metadata.requests_of(TOKEN).len();
        let life = machine().start();
        life.wait_until("a question", || metadata.requests_of(TOKEN).len() > before);
        // Asks for a save although there is nothing to save: it ends no process.
        life.signal(Signal::USR2);
        life.signal(signal);
        let life = life.finish().expect_code(75).expect_said(&["stopped before the run began, nothing lost"]);
        assert!(life.events.is_empty() && lab.keys("early", "").is_empty(), "{}", life.story());
    }
}

#[test]
fn a_boot_stopped_while_the_store_is_silent_does_not_wait_for_it() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let fault = proxy::Fault::Stall(std::time::Duration::from_secs(3600));
    proxy.arm(Rule { method: "GET", target: "/bucket", fault, often: Often::Next(1_000_000) });
    let life = boot(&lab, &["run.toml", "--run-id", "early", "--store", &lab.uri()]).start();
    life.wait_until("a look for the run", || proxy.broken() > 0);
    life.signal(Signal::TERM);
    life.finish().expect_code(75).expect_said(&["stopped before the run began, nothing lost"]);
}
