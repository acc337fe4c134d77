//! Errors lead to their cause: credentials from every source of AWS's tools, machines that are short of something, file
//! systems that can't hold a run, and secrets that workers do not get.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::{
    lab::{EVERY, Lab},
    metadata::MetadataServer,
    s3::client_env,
    trainer::{Finished, Trainer},
};

/// A port of this machine without a listener, as a URL.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn script(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
}

/// The lab's S3 server, its access key and its secret key.
fn server_and_keys(lab: &Lab) -> (String, String, String) {
    let variables = client_env(&lab.server().endpoint());
    let value = |wanted: &str| variables.iter().find(|(name, _)| *name == wanted).unwrap().1.clone();
    (value("AWS_ENDPOINT_URL"), value("AWS_ACCESS_KEY_ID"), value("AWS_SECRET_ACCESS_KEY"))
}

#[test]
fn profiles_are_read_for_the_store_and_for_everything_else() {
    let lab = Lab::on_s3();
    let (endpoint, key, secret) = server_and_keys(&lab);
    let process = lab.path("keys.sh");
    let answer = format!(r#"{{"Version": 1, "AccessKeyId": "{key}", "SecretAccessKey": "{secret}"}}"#);
    script(&process, &format!("#!/bin/sh\necho asked >> {}\necho '{answer}'\n", lab.path("asked").display()));
    std::fs::write(
        lab.path("config"),
        format!(
            "[default]\nregion = eu-west-1\n[profile process]\nregion = us-east-1\ncredential_process = {}\n\
             [profile static]\nregion = us-east-1\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n\
             [profile broken]\nregion = us-east-1\ncredential_process = {}\n",
            process.display(),
            lab.path("no-such-script").display(),
        ),
    )
    .unwrap();
    let with = |profile: &str, arguments: &[&str]| {
        Trainer::new(&lab.path(""), arguments).envs(&[
            ("AWS_ENDPOINT_URL", endpoint.clone()),
            ("AWS_CONFIG_FILE", lab.path("config").display().to_string()),
            ("AWS_PROFILE", profile.to_owned()),
        ])
    };
    let uri = lab.uri();
    for profile in ["process", "static"] {
        let run = ["run", "run.toml", "--run-id", profile, "--set", "train.steps=8"];
        with(profile, &run).json().finish().expect_code(0);
        let doctor = with(profile, &["doctor", "--store", &uri]).finish().expect_code(0);
        assert!(doctor.stdout.contains("store create-once"), "{}", doctor.story());
        let resume = ["resume", "--run-id", profile, "--store", &uri, "--set", "train.steps=12"];
        let life = with(profile, &resume).json().finish().expect_code(0);
        assert_eq!(life.resumed_from(), 8, "{}", life.story());
    }
    assert!(lab.path("asked").exists(), "the script was asked");
    // Without credentials, each command gives the same message.
    let broken = |arguments: &[&str]| with("broken", arguments).finish().expect_code(77);
    for life in [
        broken(&["doctor", "--store", &uri]),
        broken(&["resume", "--run-id", "process", "--store", &uri]),
        broken(&["runs", "--store", &uri]),
    ] {
        let said = format!("{}{}", life.stdout, life.stderr);
        assert!(said.contains("no credentials") && said.contains("AWS_PROFILE"), "{}", life.story());
    }
}

#[test]
fn the_metadata_service_and_this_machine_are_not_reached_through_a_proxy() {
    let lab = Lab::on_s3();
    let (endpoint, key, secret) = server_and_keys(&lab);
    let metadata = MetadataServer::start();
    metadata.set(
        "/latest/meta-data/iam/security-credentials/trainer-role",
        serde_json::json!({"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": key, "SecretAccessKey": secret,
                           "Token": "", "LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z"}),
    );
    let (proxy, uri) = (nobody(), lab.uri());
    for arguments in [vec!["runs", "--store", &uri], vec!["doctor", "--store", &uri]] {
        let proxies =
            ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"].map(|name| (name, proxy.clone()));
        let life = Trainer::new(&lab.path(""), &arguments)
            .envs(&metadata.envs())
            .envs(&[("AWS_ENDPOINT_URL", endpoint.clone()), ("AWS_REGION", "us-east-1".to_owned())])
            .envs(&proxies)
            .envs(&[("NO_PROXY", String::new()), ("no_proxy", String::new())])
            .finish();
        let said = format!("{}{}", life.stdout, life.stderr);
        assert!(!said.contains("no credentials"), "{}", life.story());
        if arguments[0] == "runs" {
            life.expect_code(0);
        } else {
            assert!(said.contains("an upload in parts can be started"), "{}", life.story());
        }
    }
    assert!(!metadata.requests_of("/latest/meta-data/iam/security-credentials/trainer-role").is_empty());
}

/// A library that, preloaded, makes link(2) fail with this error number.
fn without_links(folder: &Path, number: i32) -> PathBuf {
    let (source, library) = (folder.join("links.c"), folder.join(format!("links-{number}.so")));
    let text = format!(
        "#include <errno.h>\nint link(const char *a, const char *b) {{ errno = {number}; return -1; }}\n\
         int linkat(int a, const char *b, int c, const char *d, int e) {{ errno = {number}; return -1; }}\n"
    );
    std::fs::write(&source, text).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(built.success());
    library
}

#[test]
fn a_file_system_without_hard_links_is_named() {
    let lab = Lab::on_files();
    // EPERM: exFAT; EMLINK: other FATs; EOPNOTSUPP: SMB; ENOSYS: buckets that are mounted.
    for number in [1, 31, 95, 38] {
        let library = [("LD_PRELOAD", without_links(&lab.path(""), number).display().to_string())];
        let life = lab.run("x").envs(&library).finish().expect_code(78);
        assert!(life.stderr.contains("has no hard links") && life.stderr.contains("ext4"), "{}", life.story());
        let uri = lab.uri();
        let doctor = lab.command(&["doctor", "--store", &uri]).envs(&library).finish();
        assert!(doctor.stdout.contains("has no hard links"), "{}", doctor.story());
        let left = std::fs::read_dir(lab.path("store")).unwrap().count();
        assert_eq!(left, 0, "nothing stays behind");
    }
}

#[test]
fn workers_inherit_no_secrets() {
    let lab = Lab::on_s3();
    let secrets = [
        ("WORKER_TOKEN", "said-1".to_owned()),
        ("HF_TOKEN", "said-2".to_owned()),
        ("AWS_SESSION_TOKEN", String::new()),
        ("AZURE_STORAGE_KEY", "said-3".to_owned()),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/said-4".to_owned()),
        ("DATABASE_URL", "postgres://user:said-5@host".to_owned()),
        ("HTTPS_PROXY", "http://user:said-6@127.0.0.1:1".to_owned()),
        ("NVIDIA_API_KEY", "said-7".to_owned()),
    ];
    let running = lab.run("x").envs(&secrets).envs(&[("NCCL_DEBUG", "WARN".to_owned())]).hold_after(EVERY).start();
    running.held();
    let workers = running.workers();
    assert_eq!(workers.len(), 2);
    for pid in workers {
        let environment = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap();
        let environment = String::from_utf8_lossy(&environment);
        let names: Vec<&str> =
            environment.split('\0').filter_map(|item| item.split_once('=')).map(|(name, _)| name).collect();
        assert!(!environment.contains("said-"), "{names:?}");
        assert!(!names.iter().any(|name| name.starts_with("AWS_")), "{names:?}");
        for kept in ["PATH", "NCCL_DEBUG", "OMP_NUM_THREADS", "TRAINER_FAULTS"] {
            assert!(names.contains(&kept), "{kept} is not in {names:?}");
        }
    }
    running.let_go();
    running.finish().expect_code(0);
}

#[test]
fn ranks_that_cannot_meet_over_loopback_fail_at_the_start() {
    let lab = Lab::on_files();
    // A separate network namespace, whose interface is down.
    let alone: &[&str] = &["unshare", "--map-root-user", "--net"];
    let probe = Command::new(alone[0]).args(&alone[1..]).arg("true").status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no network namespaces here");
        return;
    }
    let life = lab.run("x").under(alone).finish().expect_code(78);
    assert!(
        life.stderr.contains("loopback interface") && life.stderr.contains("ip link set lo up"),
        "{}",
        life.story()
    );
    // No worker was started for it; a single worker needs no interface.
    assert!(life.of_kind("worker_died").is_empty() && life.of_kind("formed").is_empty(), "{}", life.story());
    let one = ["--nproc-per-node", "1", "--set", "train.steps=4"];
    lab.run("y").under(alone).args(&one).finish().expect_code(0);
}

#[test]
fn too_few_open_files_are_not_a_bug_and_end_no_run() {
    let lab = Lab::on_files();
    let said = |life: &Finished| format!("{}{}", life.stdout, life.stderr);
    let mut starved = 0;
    for files in [20, 24, 28, 32, 36, 40, 48] {
        let limit = format!("--nofile={files}:{files}");
        let run = format!("x{files}");
        let settings = ["--set", "train.steps=4", "--set", "restart.max=1"];
        let life = lab.run(&run).args(&settings).under(&["prlimit", &limit]).finish();
        let code = life.code();
        assert!(matches!(code, Some(0 | 69)), "{files}: {code:?}\n{}", life.story());
        if code == Some(69) {
            starved += 1;
            assert!(said(&life).contains("ulimit -Hn"), "{files}: {}", life.story());
            // No record keeps the run from continuing once more files are allowed.
            lab.run(&run).args(&["--set", "train.steps=4"]).finish();
            let status = lab.about("status", &run).finish();
            assert!(!status.stdout.contains("failed"), "{files}: {}", status.story());
        }
    }
    assert!(starved > 0, "no limit was low enough");
}

#[test]
fn a_limit_of_a_files_size_is_named_and_ends_no_run() {
    let lab = Lab::on_files();
    // Too few for the images in memory, and for the first object of the store.
    for limit in ["100", "0"] {
        let run = format!("x{limit}");
        let life = lab.run(&run).through_shell(&format!("ulimit -f {limit};"), "").finish().expect_code(69);
        assert!(life.stderr.contains("ulimit -f") && !life.stderr.contains("no space"), "{limit}: {}", life.story());
        let status = lab.about("status", &run).finish();
        assert!(!status.stdout.contains("failed"), "{limit}: {}", status.story());
    }
}

#[test]
fn a_missing_temporary_folder_is_named() {
    let lab = Lab::on_interrupted_run();
    let nowhere = [("TMPDIR", lab.path("nowhere").display().to_string())];
    let life = lab.about("generate", crate::support::lab::ORIGIN).args(&["--prompt", "a"]).envs(&nowhere).finish();
    life.expect_code(78).expect_said(&["TMPDIR", "nowhere"]);
}
