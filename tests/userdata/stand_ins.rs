//! A machine in a folder: scripts run for real, with their own commands, curl and tar included. Commands that would
//! change the machine (systemd, Docker, disks) are stand-ins that record how they were called. Metadata and AWS are
//! servers on loopback.
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
};

use super::{path, said};
use crate::support::s3::{ACCESS_KEY, SECRET_KEY};

/// The commands that the scripts take from the machine. Their path has no others.
const REAL: [&str; 30] = [
    "awk",
    "base64",
    "bash",
    "cat",
    "chmod",
    "cmp",
    "curl",
    "cut",
    "date",
    "env",
    "flock",
    "grep",
    "gzip",
    "head",
    "install",
    "ln",
    "mkdir",
    "mktemp",
    "mv",
    "readlink",
    "rm",
    "sed",
    "sh",
    "sha256sum",
    "tar",
    "tee",
    "touch",
    "tr",
    "true",
    "uname",
];
/// Stand-ins: each records its name and arguments, stores its standard input, and obeys a file named after it.
const STAND_INS: [&str; 15] = [
    "blkid",
    "docker",
    "journalctl",
    "lsblk",
    "mkfs.ext4",
    "mount",
    "mountpoint",
    "nvidia-ctk",
    "nvidia-modprobe",
    "nvidia-smi",
    "scontrol",
    "shutdown",
    "sleep",
    "systemctl",
    "timeout",
];
/// A driver that knows CUDA 13.
pub const DRIVER: &str = "case $1 in --query-gpu=driver_version) echo 580.95.05 ;; esac";
pub const STAND_IN: &str = r#"#!/bin/sh
name=${0##*/}
here=${0%/*}/../stand-ins
printf '%s %s\n' "$name" "$*" >>"$here/calls"
if [ -r "$here/$name" ]; then . "$here/$name"; fi
"#;

/// Answers requests on loopback: those to the metadata service, and every POST to AWS. Ends with the process.
pub struct Cloud {
    port: u16,
    asked: Arc<Mutex<Vec<(String, String)>>>,
}

impl Cloud {
    /// `answers`: path to body; a POST is looked up by the target in its head, or by the action in its body.
    pub fn start(answers: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let answers: BTreeMap<String, String> =
            answers.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let written = Arc::clone(&asked);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                // A client that goes away in the middle is ignored.
                let _ = answer(connection, &answers, &written);
            }
        });
        Self { port, asked }
    }
    pub fn machine() -> Self {
        Self::with(&[])
    }
    pub fn with(more: &[(&str, &str)]) -> Self {
        let role = format!(
            r#"{{"Code" : "Success", "AccessKeyId" : "{ACCESS_KEY}", "SecretAccessKey" : "{SECRET_KEY}",
                 "Token" : "session-token"}}"#
        );
        let mut answers = vec![
            ("/latest/meta-data/instance-id", "i-0123456789abcdef0"),
            ("/latest/meta-data/placement/region", "us-east-1"),
            ("/latest/meta-data/iam/security-credentials/", "trainer"),
            ("/latest/meta-data/iam/security-credentials/trainer", role.as_str()),
        ];
        answers.extend(more);
        Self::start(&answers)
    }
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
    /// Head and body of the requests whose head or body contains this.
    pub fn asked(&self, what: &str) -> Vec<(String, String)> {
        let asked = self.asked.lock().expect("unpoisoned");
        asked.iter().filter(|(head, body)| head.contains(what) || body.contains(what)).cloned().collect()
    }
}

fn answer(
    connection: TcpStream,
    answers: &BTreeMap<String, String>,
    asked: &Mutex<Vec<(String, String)>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    lines.read_exact(&mut body)?;
    let body = String::from_utf8_lossy(&body).into_owned();
    let mut words = head.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let (status, text) = match method.as_str() {
        "PUT" if path == "/latest/api/token" && head.contains("X-aws-ec2-metadata-token-ttl-seconds") => {
            (200, "metadata-token")
        }
        "GET"
            if ![
                "X-aws-ec2-metadata-token: metadata-token",
                "Metadata-Flavor: Google",
                "Metadata:true",
                "Authorization: Bearer metadata-token",
            ]
            .iter()
            .any(|line| head.contains(line)) =>
        {
            (401, "")
        }
        // A deletion must ask twice.
        "DELETE" if asked.lock().expect("unpoisoned").iter().all(|(head, _)| !head.starts_with("DELETE ")) => (503, ""),
        "DELETE" => (200, ""),
        "PUT" if head.contains("x-ms-blob-type: BlockBlob") => (201, ""),
        "GET" if answers.get(&path).is_some_and(|text| text == "forbidden") => (403, ""),
        "GET" => answers.get(&path).map_or((404, ""), |text| (200, text.as_str())),
        "POST" => {
            let known =
                answers.iter().find(|(key, _)| !key.starts_with('/') && (head.contains(*key) || body.contains(*key)));
            known.map_or((400, "{}"), |(_, text)| (200, text.as_str()))
        }
        _ => (400, ""),
    };
    asked.lock().expect("unpoisoned").push((head, body));
    let mut connection = connection;
    write!(connection, "HTTP/1.1 {status} x\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len())
}

/// A machine: a folder that scripts take for the root, and the commands in their path.
pub struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    pub fn new(settings: &str) -> Self {
        let machine = Self { dir: tempfile::tempdir().expect("a folder") };
        for folder in ["bin", "stand-ins", "root/etc/trainer", "root/run", "root/var/log", "root/opt", "root/mnt"] {
            std::fs::create_dir_all(machine.path(folder)).expect("a folder of the machine");
        }
        let way = std::env::var_os("PATH").expect("PATH");
        for name in REAL {
            let found = std::env::split_paths(&way).map(|folder| folder.join(name)).find(|path| path.is_file());
            symlink(found.unwrap_or_else(|| panic!("{name} is not installed")), machine.path("bin").join(name))
                .expect("a link");
        }
        for name in STAND_INS {
            machine.executable(&format!("bin/{name}"), STAND_IN);
        }
        // Not mounted, no such label, no disk, in time, no Deep Learning AMI: an ordinary machine.
        let cat = "[ \"$1\" != cat ]";
        for (name, does) in [
            ("mountpoint", "exit 1"),
            ("blkid", "exit 2"),
            ("systemctl", cat),
            ("timeout", "shift; exec \"$@\""),
            ("nvidia-smi", DRIVER),
        ] {
            machine.does(name, does);
        }
        std::fs::write(machine.path("root/etc/trainer/machine.conf"), settings).expect("settings");
        machine
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub fn executable(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("write a program");
        std::fs::set_permissions(self.path(name), PermissionsExt::from_mode(0o755)).expect("make it a program");
    }
    /// From now on this stand-in also does that.
    pub fn does(&self, name: &str, script: &str) {
        std::fs::write(self.path("stand-ins").join(name), script).expect("what a stand-in does");
    }
    pub fn command(&self, script: &Path, cloud: &Cloud) -> Command {
        let mut command = Command::new(script);
        command
            .env_clear()
            .env("PATH", self.path("bin"))
            .env("HOME", self.path("root"))
            .env("TRAINER_ROOT", self.path("root"))
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", cloud.endpoint())
            .env("AWS_ENDPOINT_URL", cloud.endpoint())
            .stdin(Stdio::null());
        command
    }
    /// As cloud-init runs it.
    pub fn boot(&self, cloud: &Cloud) -> Output {
        self.command(&path("aws/user-data.sh"), cloud).output().expect("start user-data.sh")
    }
    /// As the unit calls it.
    pub fn unit(&self, cloud: &Cloud, word: &str, variables: &[(&str, &str)]) -> Output {
        let mut command = self.command(&self.path("root/usr/local/sbin/trainer-machine"), cloud);
        command.arg(word).envs(variables.iter().copied()).output().expect("start trainer-machine")
    }
    pub fn calls(&self) -> String {
        std::fs::read_to_string(self.path("stand-ins/calls")).unwrap_or_default()
    }
    /// Every file below the root with its content, except logs.
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        fn walk(folder: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in std::fs::read_dir(folder).expect("a folder of the machine") {
                let entry = entry.expect("an entry").path();
                if entry.is_dir() && !entry.is_symlink() {
                    walk(&entry, found);
                } else if entry.is_file() && entry.extension().is_none_or(|ending| ending != "log") {
                    found.insert(entry.clone(), std::fs::read(&entry).expect("a file"));
                }
            }
        }
        let mut found = BTreeMap::new();
        walk(&self.path("root"), &mut found);
        found
    }
}

pub fn expect(output: &Output, code: i32, parts: &[&str]) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    for secret in [SECRET_KEY, "session-token", "metadata-token", "ecr-password"] {
        assert!(!said.contains(secret), "{secret} is said aloud:\n{said}");
    }
}

/// As the unit calls it after the run's end.
pub fn ended(machine: &Machine, cloud: &Cloud, code: &str, status: &str) -> Output {
    machine.unit(cloud, "after", &[("EXIT_CODE", code), ("EXIT_STATUS", status), ("SERVICE_RESULT", "exit-code")])
}
