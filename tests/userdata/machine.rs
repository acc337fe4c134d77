//! `user-data.sh` and the Slurm script, run for real in a clean folder: their own commands, curl and tar included, are the machine's; what would
//! change the machine (systemd, Docker, disks) is a stand-in that writes down how it was called. Metadata and AWS are servers on loopback.
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{path, said};
use crate::support::{
    lab::{EVERY, Lab},
    s3::{ACCESS_KEY, S3Server, SECRET_KEY},
};

/// What the scripts take from the machine. Nothing else is on their way.
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
/// Stand-ins: each writes its name and arguments down, keeps its standard input, and does what a file named after it says.
const STAND_INS: [&str; 11] = [
    "blkid",
    "docker",
    "lsblk",
    "mkfs.ext4",
    "mount",
    "mountpoint",
    "nvidia-smi",
    "scontrol",
    "shutdown",
    "sleep",
    "systemctl",
];
const STAND_IN: &str = r#"#!/bin/sh
name=${0##*/}
here=${0%/*}/../stand-ins
printf '%s %s\n' "$name" "$*" >>"$here/calls"
if [ -r "$here/$name" ]; then . "$here/$name"; fi
"#;

/// Answers requests on loopback: the metadata service, and whatever AWS is asked by POST. Ends with the process.
struct Cloud {
    port: u16,
    asked: Arc<Mutex<Vec<(String, String)>>>,
}

impl Cloud {
    /// `answers`: path to body; a POST is looked up by the target in its head, or by the action in its body.
    fn start(answers: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let answers: BTreeMap<String, String> =
            answers.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let written = Arc::clone(&asked);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                // A client that goes away in the middle is its own affair.
                let _ = answer(connection, &answers, &written);
            }
        });
        Self { port, asked }
    }
    fn machine() -> Self {
        Self::with(&[])
    }
    fn with(more: &[(&str, &str)]) -> Self {
        let role = format!(
            r#"{{"Code" : "Success", "AccessKeyId" : "{ACCESS_KEY}", "SecretAccessKey" : "{SECRET_KEY}", "Token" : "session-token"}}"#
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
    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
    /// Head and body of the requests whose head or body contains this.
    fn asked(&self, what: &str) -> Vec<(String, String)> {
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
            if !["X-aws-ec2-metadata-token: metadata-token", "Metadata-Flavor: Google", "Metadata:true"]
                .iter()
                .any(|line| head.contains(line)) =>
        {
            (401, "")
        }
        // Whoever deletes something must ask twice.
        "DELETE" if asked.lock().expect("unpoisoned").iter().all(|(head, _)| !head.starts_with("DELETE ")) => (503, ""),
        "DELETE" => (200, ""),
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

/// A machine: a folder that scripts take for the root, and the commands on their way.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new(settings: &str) -> Self {
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
        // Not mounted, no such label, no disk: an ordinary machine.
        for (name, does) in [("mountpoint", "exit 1"), ("blkid", "exit 2")] {
            machine.does(name, does);
        }
        std::fs::write(machine.path("root/etc/trainer/machine.conf"), settings).expect("settings");
        machine
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn executable(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("write a program");
        std::fs::set_permissions(self.path(name), PermissionsExt::from_mode(0o755)).expect("make it a program");
    }
    /// From now on this stand-in does that as well.
    fn does(&self, name: &str, script: &str) {
        std::fs::write(self.path("stand-ins").join(name), script).expect("what a stand-in does");
    }
    fn command(&self, script: &Path, cloud: &Cloud) -> Command {
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
    fn boot(&self, cloud: &Cloud) -> Output {
        self.command(&path("aws/user-data.sh"), cloud).output().expect("start user-data.sh")
    }
    /// As the unit calls it.
    fn unit(&self, cloud: &Cloud, word: &str, variables: &[(&str, &str)]) -> Output {
        let mut command = self.command(&self.path("root/usr/local/sbin/trainer-machine"), cloud);
        command.arg(word).envs(variables.iter().copied()).output().expect("start trainer-machine")
    }
    fn calls(&self) -> String {
        std::fs::read_to_string(self.path("stand-ins/calls")).unwrap_or_default()
    }
    /// Every file below the root with what is in it, but logs.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
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

const IMAGE: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/trainer@sha256:00";

fn expect(output: &Output, code: i32, parts: &[&str]) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    for secret in [SECRET_KEY, "session-token", "metadata-token", "ecr-password"] {
        assert!(!said.contains(secret), "{secret} is said aloud:\n{said}");
    }
}

#[test]
fn user_data_installs_itself_and_again_changes_nothing() {
    let (machine, cloud) = (Machine::new(&format!("TRAINER_IMAGE={IMAGE}\n")), Cloud::machine());
    expect(&machine.boot(&cloud), 0, &["installed"]);
    let first = machine.files();
    let calls = machine.calls();
    for call in
        ["systemctl daemon-reload", "systemctl enable trainer.service", "systemctl start --no-block trainer.service"]
    {
        assert!(calls.contains(call), "{calls}");
    }
    let installed = machine.path("root/usr/local/sbin/trainer-machine");
    assert_eq!(
        std::fs::read(&installed).expect("itself"),
        std::fs::read(path("aws/user-data.sh")).expect("user-data.sh")
    );
    assert_eq!(std::fs::metadata(&installed).expect("itself").permissions().mode() & 0o777, 0o755);
    let drop_in = std::fs::read_to_string(machine.path("root/etc/systemd/system/docker.service.d/trainer.conf"))
        .expect("drop-in");
    assert!(drop_in.contains("TimeoutStopSec=130"));
    expect(&machine.boot(&cloud), 0, &["installed"]);
    assert_eq!(machine.files(), first, "the second time writes nothing else");
    assert_eq!(machine.calls().matches("daemon-reload").count(), 1, "and has nothing to reload");
    // Twice at once.
    let both: Vec<_> = (0..2)
        .map(|_| {
            machine
                .command(&path("aws/user-data.sh"), &cloud)
                .stderr(Stdio::piped())
                .spawn()
                .expect("start user-data.sh")
        })
        .collect();
    for one in both {
        expect(&one.wait_with_output().expect("its end"), 0, &[]);
    }
    assert_eq!(machine.files(), first);
}

#[test]
fn the_container_is_pulled_with_the_machines_role_and_started_to_be_stopped_well() {
    let settings = format!(
        "TRAINER_IMAGE={IMAGE}\nTRAINER_GPU=required\nTRAINER_SSM_PATH=/trainer/reports\nTRAINER_LOG_GROUP=training\n\
         TRAINER_RUN_ID_TEMPLATE='reports-{{year}}q{{quarter}}'\n"
    );
    // QVdTOmVjci1wYXNzd29yZA== is AWS:ecr-password.
    let token = r#"{"authorizationData":[{"authorizationToken":"QVdTOmVjci1wYXNzd29yZA==","expiresAt":1}]}"#;
    let cloud = Cloud::with(&[("GetAuthorizationToken", token)]);
    let machine = Machine::new(&settings);
    expect(&machine.boot(&cloud), 0, &[]);
    // The image is not there before it was pulled; the daemon needs a moment; so does the driver.
    machine.does(
        "docker",
        r#"case $1 in
info) [ -e "$here/up" ] || { touch "$here/up"; exit 1; } ;;
image) exit 1 ;;
login) read -r password; printf '%s' "$password" >"$here/password" ;;
run) echo trains ;;
esac"#,
    );
    machine.does("nvidia-smi", r#"[ -e "$here/driver" ] || { touch "$here/driver"; exit 9; }"#);
    expect(&machine.unit(&cloud, "run", &[]), 0, &["trains"]);
    let calls = machine.calls();
    assert!(
        calls.contains("docker login --username AWS --password-stdin 123456789012.dkr.ecr.eu-west-1.amazonaws.com"),
        "{calls}"
    );
    assert_eq!(std::fs::read_to_string(machine.path("stand-ins/password")).expect("a log-in"), "ecr-password");
    let run = calls.lines().find(|line| line.starts_with("docker run")).expect("docker run");
    for part in [
        "--rm",
        "--init",
        "--network host",
        "--ipc host",
        "--stop-timeout 110",
        "--gpus all",
        // Where datasets are kept: the container's user has no home.
        "--env XDG_CACHE_HOME=/scratch",
        "awslogs-group=training",
        "mode=non-blocking",
        "boot --json",
    ] {
        assert!(run.contains(part), "{part} is not in {run}");
    }
    assert!(run.ends_with(&format!("{IMAGE} boot --json")) && !run.contains("--restart"), "{run}");
    let env = std::fs::read_to_string(machine.path("root/run/trainer/env")).expect("the container's variables");
    for line in [
        "TRAINER_SSM_PATH=/trainer/reports",
        "TRAINER_STOP_WINDOW=100s",
        "TRAINER_RUN_ID_TEMPLATE=reports-{year}q{quarter}",
        "AWS_REGION=us-east-1",
    ] {
        assert!(env.lines().any(|found| found == line), "{line} is not in\n{env}");
    }
    // The log-in is asked for in the registry's region, signed with the role, with its session token.
    let (head, _) = cloud.asked("GetAuthorizationToken").remove(0);
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("/eu-west-1/ecr/aws4_request") && head.contains("x-amz-security-token: session-token"),
        "{head}"
    );
    assert!(!machine.calls().contains(SECRET_KEY) && !machine.calls().contains("ecr-password"));
    expect(&machine.unit(&cloud, "stop", &[]), 0, &[]);
    assert!(machine.calls().contains("docker stop --time 110 trainer"), "{}", machine.calls());
}

/// A bundle with a program that says how it was started.
fn bundle(machine: &Machine) -> (Vec<u8>, String) {
    let folder = machine.path("bundle");
    std::fs::create_dir_all(folder.join("lib")).expect("a bundle");
    machine.executable("bundle/trainer", "#!/bin/sh\necho \"started with $* and $LD_LIBRARY_PATH\"\nexit 75\n");
    let file = machine.path("bundle.tar.gz");
    let packed =
        Command::new("tar").arg("-C").arg(&folder).arg("-czf").arg(&file).arg(".").status().expect("start tar");
    assert!(packed.success());
    let sum = Command::new("sha256sum").arg(&file).output().expect("start sha256sum");
    (std::fs::read(&file).expect("the bundle"), said(&sum)[..64].to_owned())
}

#[test]
fn a_bundle_is_downloaded_with_the_machines_role_once() {
    let (machine, cloud, server) = (Machine::new(""), Cloud::machine(), S3Server::start());
    let (body, sum) = bundle(&machine);
    server.write("bundles/trainer.tar.gz", body);
    let settings = format!(
        "TRAINER_BUNDLE=s3://bucket/bundles/trainer.tar.gz\nTRAINER_BUNDLE_SHA256={sum}\nTRAINER_QUEUE=https://queue\n"
    );
    std::fs::write(machine.path("root/etc/trainer/machine.conf"), settings).expect("settings");
    expect(&machine.boot(&cloud), 0, &[]);
    let endpoint = server.endpoint();
    let variables = [("AWS_ENDPOINT_URL", endpoint.as_str())];
    // The server checks the signature; the program's exit code is the unit's.
    expect(
        &machine.unit(&cloud, "run", &variables),
        75,
        &["started with work --json --terminate-when-idle and ", "/opt/trainer/lib"],
    );
    assert_eq!(server.count("GetObject"), 1);
    expect(&machine.unit(&cloud, "run", &variables), 75, &["started with work"]);
    assert_eq!(server.count("GetObject"), 1, "what is here is not downloaded again");
    assert!(!machine.calls().contains("docker"), "{}", machine.calls());
}

#[test]
fn each_failure_says_what_to_do() {
    let cloud = Cloud::machine();
    let run = |settings: &str, stand_ins: &[(&str, &str)], variables: &[(&str, &str)], code: i32, parts: &[&str]| {
        let machine = Machine::new(settings);
        expect(&machine.boot(&cloud), 0, &[]);
        for (name, does) in stand_ins {
            machine.does(name, does);
        }
        expect(&machine.unit(&cloud, "run", variables), code, parts);
        let log = std::fs::read_to_string(machine.path("root/var/log/trainer-boot.log")).expect("the log");
        assert!(log.contains("error: ") && log.contains("hint: "), "{log}");
        machine
    };
    // No metadata service: a port at which nobody listens.
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let nobody = format!("http://127.0.0.1:{nobody}");
    let machine =
        run("", &[], &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &nobody)], 69, &["gives no token", "hop limit of 2"]);
    assert_eq!(machine.calls().matches("sleep ").count(), 7, "eight tries, a pause between two of them");
    run("TRAINER_GPU=required\n", &[("nvidia-smi", "exit 9")], &[], 69, &["GPU driver does not answer"]);
    run("TRAINER_GPU=perhaps\n", &[], &[], 78, &["TRAINER_GPU is \"perhaps\""]);
    run("TRAINER_STOP_WINDOW=2m\n", &[], &[], 78, &["TRAINER_STOP_WINDOW is \"2m\"", "100s"]);
    run("", &[], &[], 78, &["there is no ", "set TRAINER_IMAGE or TRAINER_BUNDLE"]);
    run("TRAINER_IMAGE=a/b\n", &[("docker", "exit 1")], &[], 69, &["Docker daemon does not answer"]);
    run("TRAINER_IMAGE=a/b\n", &[("docker", "[ $1 = info ]")], &[], 69, &["image a/b can't be pulled"]);
    // What is here is good enough where a registry is away.
    let machine = Machine::new("TRAINER_IMAGE=a/b\n");
    machine.boot(&cloud);
    machine.does("docker", "[ $1 != pull ]");
    expect(&machine.unit(&cloud, "run", &[]), 0, &["going on with the one that is here"]);
    // No Docker at all.
    std::fs::remove_file(machine.path("bin/docker")).expect("take Docker away");
    expect(&machine.unit(&cloud, "run", &[]), 78, &["Docker is not installed", "AMI with Docker"]);
    // Bundles.
    let server = S3Server::start();
    let (endpoint, zeros) = (server.endpoint(), "0".repeat(64));
    let s3 = [("AWS_ENDPOINT_URL", endpoint.as_str())];
    run("TRAINER_BUNDLE=s3://bucket/none\n", &[], &s3, 78, &["TRAINER_BUNDLE_SHA256 is not a SHA-256"]);
    run(
        &format!("TRAINER_BUNDLE=ftp://none\nTRAINER_BUNDLE_SHA256={zeros}\n"),
        &[],
        &s3,
        78,
        &["neither s3:// nor https://"],
    );
    run(
        &format!("TRAINER_BUNDLE=s3://bucket/none\nTRAINER_BUNDLE_SHA256={zeros}\n"),
        &[],
        &s3,
        69,
        &["can't be downloaded", "s3:GetObject"],
    );
    server.write("other.tar.gz", "something else");
    let machine = run(
        &format!("TRAINER_BUNDLE=s3://bucket/other.tar.gz\nTRAINER_BUNDLE_SHA256={zeros}\n"),
        &[],
        &s3,
        65,
        &["the bundle's SHA-256 is ", "not 000000"],
    );
    assert!(!machine.path("root/opt/trainer").exists(), "what is wrong is never installed");
    // A machine without a role says so.
    let bare =
        Cloud::start(&[("/latest/meta-data/instance-id", "i-1"), ("/latest/meta-data/placement/region", "us-east-1")]);
    let machine = Machine::new(&format!("TRAINER_BUNDLE=s3://bucket/other.tar.gz\nTRAINER_BUNDLE_SHA256={zeros}\n"));
    machine.boot(&bare);
    expect(
        &machine.unit(&bare, "run", &s3),
        69,
        &["no credentials: does the launch template name an instance profile?"],
    );
    expect(&machine.unit(&bare, "dance", &[]), 64, &["unknown command dance"]);
}

#[test]
fn local_disks_are_made_and_mounted_once_and_never_over_something() {
    let cloud = Cloud::machine();
    let scratch = |blkid: &str, lsblk: &str| {
        let machine = Machine::new("TRAINER_IMAGE=a/b\n");
        machine.boot(&cloud);
        machine.does("blkid", blkid);
        machine.does("lsblk", lsblk);
        expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
        machine
    };
    let disks = r#"case $1 in -dnpo) echo "/dev/nvme0n1 Amazon Elastic Block Store"; echo "/dev/nvme1n1 Amazon EC2 NVMe Instance Storage" ;; esac"#;
    let calls = scratch("exit 2", disks).calls();
    assert!(
        calls.contains("mkfs.ext4 -q -L trainer-scratch /dev/nvme1n1")
            && calls.contains("mount -o noatime /dev/nvme1n1"),
        "{calls}"
    );
    // It has the label: no second file system.
    let calls = scratch("echo /dev/nvme1n1", disks).calls();
    assert!(!calls.contains("mkfs") && calls.contains("mount -o noatime /dev/nvme1n1"), "{calls}");
    // Somebody's file system without the label is let alone, and so is a root disk.
    let calls = scratch("exit 2", &format!("{disks}\ncase $1 in -no) echo xfs ;; esac")).calls();
    assert!(!calls.contains("mkfs") && !calls.contains("mount -o"), "{calls}");
    let calls = scratch("exit 2", "echo '/dev/nvme0n1 Amazon Elastic Block Store'").calls();
    assert!(!calls.contains("mkfs") && !calls.contains("mount -o"), "{calls}");
    // Mounted already.
    let machine = Machine::new("TRAINER_IMAGE=a/b\n");
    machine.boot(&cloud);
    machine.does("mountpoint", "exit 0");
    std::fs::create_dir_all(machine.path("root/mnt/trainer")).expect("a mount point");
    expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
    assert!(!machine.calls().contains("blkid") && !machine.calls().contains("mount -o"), "{}", machine.calls());
}

#[test]
fn what_can_not_succeed_is_given_up_and_costs_nothing_more() {
    let ended = |machine: &Machine, cloud: &Cloud, code: &str, status: &str| {
        machine.unit(cloud, "after", &[("EXIT_CODE", code), ("EXIT_STATUS", status), ("SERVICE_RESULT", "exit-code")])
    };
    let stopped = "systemctl stop --no-block trainer.service";
    // Codes that are worth another start.
    let (machine, cloud) = (Machine::new(""), Cloud::machine());
    machine.boot(&cloud);
    for code in ["0", "69", "75", "76", "79"].repeat(3) {
        expect(&ended(&machine, &cloud, "exited", code), 0, &[]);
    }
    assert!(!machine.calls().contains(stopped), "{}", machine.calls());
    // Others five times in a row; one that is worth it begins the count again.
    for code in ["70", "70", "70", "70", "75", "70", "125", "70", "70"] {
        expect(&ended(&machine, &cloud, "exited", code), 0, &[]);
    }
    assert!(!machine.calls().contains(stopped), "{}", machine.calls());
    expect(
        &ended(&machine, &cloud, "killed", "KILL"),
        0,
        &["gives up: failed 5 times in a row", "costs money (TRAINER_ON_FAILURE=keep)"],
    );
    assert!(machine.calls().contains(stopped) && !machine.calls().contains("shutdown"), "{}", machine.calls());
    // A task that hears of it gives the machine back, and then it is not there for a look.
    let cloud = Cloud::with(&[("GetParameter", r#"{"Parameter":{"Value":"token"}}"#), ("SendTask", "{}")]);
    let machine = Machine::new("TRAINER_TASK_TOKEN=/t\n");
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "78"), 0, &["costs money (TRAINER_ON_FAILURE=keep)"]);
    assert_eq!(cloud.asked("SendTaskFailure").len(), 0);
    // What is away for hours does not come back: a mistyped image, a broken driver. One start that got anywhere begins the count again.
    let (machine, cloud) = (Machine::new(""), Cloud::machine());
    machine.boot(&cloud);
    for code in [vec!["69"; 39], vec!["75"], vec!["69"; 39]].concat() {
        expect(&ended(&machine, &cloud, "exited", code), 0, &[]);
    }
    assert!(!machine.calls().contains(stopped), "{}", machine.calls());
    expect(&ended(&machine, &cloud, "exited", "69"), 0, &["gives up: failed 40 times in a row"]);
    expect(&ended(&machine, &cloud, "exited", "69"), 0, &[]);
    assert_eq!(
        machine.calls().matches(stopped).count(),
        1,
        "who starts it by hand has as many tries: {}",
        machine.calls()
    );
    // What can't get better, at once: in a group the machine leaves it, and its task hears of it.
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
            &[&format!("exit code {code}"), "its group's capacity lowered by one"],
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
    // A job that waits would start the next machine, for ever.
    let answers = [("SuspendProcesses", "<Suspended/>"), ("TerminateInstanceInAutoScalingGroup", "<Activity/>")];
    let cloud = Cloud::with(&answers);
    let machine = Machine::new("TRAINER_ON_FAILURE=terminate\nTRAINER_QUEUE=https://queue\nTRAINER_GROUP=reports\n");
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "78"), 0, &["aws autoscaling resume-processes", "lowered by one"]);
    let asked: Vec<_> = cloud.asked("Version=2011-01-01").into_iter().map(|(_, body)| body).collect();
    assert!(
        asked.len() == 2
            && asked[0].contains("AutoScalingGroupName=reports&ScalingProcesses.member.1=AlarmNotification")
            && asked[1].contains("TerminateInstanceInAutoScalingGroup"),
        "{asked:?}"
    );
    // In no group: it ends by powering off.
    let (machine, cloud) = (Machine::new("TRAINER_ON_FAILURE=terminate\n"), Cloud::machine());
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "78"), 0, &["powers off"]);
    assert!(machine.calls().contains("shutdown -h now"), "{}", machine.calls());
    let tries = cloud.asked("TerminateInstanceInAutoScalingGroup").len();
    assert_eq!(tries, 6, "a group would replace a machine that powers off because one request failed");
    // A container can't power its machine off: where no group ends the machine, it does so itself.
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
    // A run that is complete tells its task.
    let cloud = Cloud::with(&[("GetParameter", r#"{"Parameter":{"Value":"token"}}"#), ("SendTask", "{}")]);
    let machine = Machine::new("TRAINER_TASK_TOKEN=/t\n");
    machine.boot(&cloud);
    expect(&ended(&machine, &cloud, "exited", "0"), 0, &[]);
    assert_eq!(cloud.asked("AWSStepFunctions.SendTaskSuccess").len(), 1);
}

#[test]
fn a_slurm_job_goes_back_into_the_queue_when_it_should() {
    let cloud = Cloud::machine();
    let job = |machine: &Machine| {
        let mut job = machine.command(&path("slurm/trainer.sbatch"), &cloud);
        job.envs([("TRAINER_STORE", "file:///runs"), ("TRAINER_RUN_ID", "r"), ("SLURM_JOB_ID", "42")])
            .env("TRAINER", machine.path("bin/trainer"));
        job
    };
    for (code, queued) in
        [(0, false), (69, true), (75, true), (76, true), (64, false), (65, false), (78, false), (79, false)]
    {
        let machine = Machine::new("");
        machine.executable("bin/trainer", &format!("{STAND_IN}exit {code}\n"));
        let output = job(&machine).output().expect("start the batch script");
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert_eq!(machine.calls().contains("scontrol requeue 42"), queued, "exit code {code}: {}", machine.calls());
        assert!(machine.calls().contains("trainer boot --json"), "{}", machine.calls());
    }
    // Slurm's signal goes to the script, or to all its processes; trainer must hear it, and its answer must be waited for.
    use rustix::process::{Pid, Signal, kill_process, kill_process_group};
    for (signal, all) in [(Signal::USR1, false), (Signal::TERM, false), (Signal::TERM, true)] {
        let machine = Machine::new("");
        let program = format!(
            "{STAND_IN}trap 'trap \"\" TERM; echo heard; exit 75' USR1 TERM\necho ready\nexec 2>/dev/null\n\
             while :; do read -r _ <\"$here/never\" || true; done\n"
        );
        machine.executable("bin/trainer", &program);
        // srun answers SIGTERM with SIGKILL for its step.
        machine
            .executable("bin/srun", &format!("{STAND_IN}shift\n\"$@\" & trap 'kill -9 $!; exit 137' TERM\nwait $!\n"));
        let fifo = Command::new("mkfifo").arg(machine.path("stand-ins/never")).status().expect("start mkfifo");
        assert!(fifo.success());
        let mut job = job(&machine).stdout(Stdio::piped()).process_group(0).spawn().expect("start the batch script");
        let (sender, lines) = std::sync::mpsc::channel();
        let stdout = BufReader::new(job.stdout.take().expect("piped"));
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let pid = Pid::from_child(&job);
        let hears = |wanted: &str| {
            let line = lines.recv_timeout(Duration::from_secs(60));
            if line.as_deref() != Ok(wanted) {
                // The program may be waiting for ever.
                let _ = kill_process_group(pid, Signal::KILL);
                panic!("{wanted} is expected: {line:?}");
            }
        };
        hears("ready");
        let send = if all { kill_process_group } else { kill_process };
        send(pid, signal).expect("signal the script");
        hears("heard");
        assert_eq!(job.wait().expect("its end").code(), Some(75));
        assert!(machine.calls().contains("scontrol requeue 42"), "{}", machine.calls());
    }
}

/// Azure's command line is a stand-in that keeps the machine's User Data and knows no scale set.
#[test]
fn a_scale_set_is_made_with_what_its_machine_needs() {
    let cloud = Cloud::machine();
    let machine = Machine::new("");
    let az = format!(
        "{STAND_IN}if [ \"$2\" = show ] && [ ! -e \"$here/user-data\" ]; then exit 3; fi\n\
         for one; do if [ \"$last\" = --custom-data ]; then cat \"$one\" >\"$here/user-data\"; fi; last=$one; done\n"
    );
    machine.executable("bin/az", &az);
    let dirname = ["/usr/bin/dirname", "/bin/dirname"].map(Path::new).into_iter().find(|path| path.is_file());
    symlink(dirname.expect("dirname is not installed"), machine.path("bin/dirname")).expect("a link");
    let variables = [
        ("GROUP", "training"),
        ("LOCATION", "westeurope"),
        ("IMAGE", "registry/image"),
        ("STORE", "az://container/runs"),
        ("RUN_ID", "reports"),
        ("CONFIG", "az://container/reports.toml"),
    ];
    let mut make = machine.command(&path("azure/scale-set.sh"), &cloud);
    let output = make.envs(variables).output().expect("start scale-set.sh");
    assert!(!output.status.success() && said(&output).contains("ACCOUNT"), "{}", said(&output));
    let output = make.env("ACCOUNT", "storage").output().expect("start scale-set.sh");
    assert!(output.status.success(), "{}", said(&output));
    let given = std::fs::read_to_string(machine.path("stand-ins/user-data")).expect("User Data");
    // The store takes the account from there.
    assert!(given.lines().any(|line| line.trim() == "AZURE_STORAGE_ACCOUNT_NAME=storage"), "{given}");
    assert!(!given.contains("@ACCOUNT@") && !given.contains("@STORE@"), "{given}");
    let calls = machine.calls();
    let made = calls.lines().find(|line| line.starts_with("az vmss create")).expect("az vmss create");
    // What `az vmss create` does not know, and what spot machines can't have.
    assert!(!made.contains("--nsg-rule") && !made.contains("terminate-notification"), "{made}");
    assert!(made.contains("--nsg trainer-reports"), "{made}");
    assert!(calls.contains("az network nsg create --resource-group training"), "{calls}");
}

/// Those of Google, Azure and of one machine by hand, as the unit calls them after a run's end.
#[test]
fn no_machine_stays_on_when_no_start_is_worth_it() {
    let role = r#"{"access_token":"metadata-token","expires_in":1}"#;
    let token = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fmanagement.azure.com%2F";
    let google = "/computeMetadata/v1/instance";
    let answers = [
        (format!("{google}/attributes/created-by"), "projects/1/zones/z/instanceGroupManagers/reports"),
        (format!("{google}/zone"), "projects/1/zones/z"),
        (format!("{google}/name"), "reports-1"),
        (format!("{google}/service-accounts/default/token"), role),
        ("/metadata/instance/compute/resourceId?api-version=2021-02-01&format=text".into(), "/machines/1"),
        (token.into(), role),
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
            for code in codes {
                let mut after = machine.command(&machine.path("bin/after"), &cloud);
                let output = after
                    .arg("after")
                    .env("GCE_METADATA_HOST", cloud.endpoint().trim_start_matches("http://"))
                    .env("TRAINER_COMPUTE_API", cloud.endpoint())
                    .env("TRAINER_AZURE_METADATA_ENDPOINT", cloud.endpoint())
                    .env("TRAINER_AZURE_MANAGEMENT_ENDPOINT", cloud.endpoint())
                    .envs([("EXIT_CODE", "exited"), ("EXIT_STATUS", code)])
                    .output()
                    .expect("start trainer-machine");
                expect(&output, 0, &[]);
            }
            left(&machine, &cloud)
        };
        for code in ["64", "65", "77", "78"] {
            assert!(codes(&[code]), "{kind}: {code}");
        }
        assert!(!codes(&["70", "70", "70", "70", "75", "70", "137", "70", "70"]), "{kind}: interrupted in between");
        assert!(codes(&["70", "70", "137", "70", "70"]), "{kind}: five times in a row");
        assert!(!codes(&[vec!["69"; 39], vec!["79"], vec!["69"; 2]].concat()), "{kind}: away, and here in between");
        assert!(codes(&["69"; 40]), "{kind}: away for hours");
    }
}

#[test]
fn googles_notice_is_as_long_as_was_asked_for() {
    for (notice, window) in [("", "30s"), ("120s", "120s")] {
        let machine = Machine::new("");
        machine.executable("bin/gcloud", &format!("{STAND_IN}[ \"$2\" != describe ] && [ \"$3\" != describe ]\n"));
        let dirname = ["/usr/bin/dirname", "/bin/dirname"].map(Path::new).into_iter().find(|path| path.is_file());
        symlink(dirname.expect("dirname is not installed"), machine.path("bin/dirname")).expect("a link");
        let cloud = Cloud::with(&[
            ("/computeMetadata/v1/instance/attributes/trainer-image", "registry/image"),
            ("/computeMetadata/v1/instance/attributes/trainer-store", "gs://bucket/runs"),
            ("/computeMetadata/v1/instance/attributes/trainer-run-id", "reports"),
            ("/computeMetadata/v1/instance/attributes/trainer-config", "gs://bucket/reports.toml"),
            ("/computeMetadata/v1/instance/attributes/trainer-preemption-window", window),
        ]);
        let variables = [
            ("PROJECT", "project"),
            ("ZONE", "zone"),
            ("BUCKET", "bucket"),
            ("RUN_ID", "reports"),
            ("CONFIG", "gs://bucket/reports.toml"),
            ("IMAGE", "registry/image"),
            ("SPOT_NOTICE", notice),
        ];
        let mut make = machine.command(&path("gcp/instance-template.sh"), &cloud);
        let output = make.envs(variables).output().expect("start instance-template.sh");
        assert!(output.status.success(), "{}", said(&output));
        let calls = machine.calls();
        assert!(calls.contains(&format!("trainer-preemption-window={window} ")), "{calls}");
        assert_eq!(calls.contains("--preemption-notice-duration=120s"), !notice.is_empty(), "{calls}");
        // What the machine makes of it.
        let mut start = machine.command(&path("gcp/startup.sh"), &cloud);
        start.arg("run").env("GCE_METADATA_HOST", cloud.endpoint().trim_start_matches("http://"));
        expect(&start.output().expect("start startup.sh"), 0, &[]);
        let env = std::fs::read_to_string(machine.path("root/run/trainer/env")).expect("the container's variables");
        for line in [&*format!("TRAINER_PREEMPTION_WINDOW={window}"), "TRAINER_STOP_WINDOW=20s"] {
            assert!(env.lines().any(|found| found == line), "{line} is not in\n{env}");
        }
    }
}

/// A container's first process gets no signal that it does not handle, and inherits every orphan.
#[test]
fn the_agent_stops_well_as_a_containers_first_process() {
    let apart = ["--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"];
    let possible = Command::new("unshare").args(apart).arg("true").output();
    if !possible.is_ok_and(|output| output.status.success()) {
        println!("skipped: this machine lets nobody make a process namespace");
        return;
    }
    let lab = Lab::on_files();
    let mut first = Command::new("unshare")
        .args(apart)
        .arg(env!("CARGO_BIN_EXE_trainer"))
        .args(["run", "run.toml", "--run-id", "first", "--store", &lab.uri(), "--json"])
        .current_dir(lab.path(""))
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("start unshare");
    let mut lines = BufReader::new(first.stdout.take().expect("piped")).lines();
    let step = format!("{{\"event\":\"step\",\"step\":{},", EVERY + 1);
    assert!(
        lines.by_ref().map_while(Result::ok).any(|line| line.starts_with(&step)),
        "it has ended before step {}",
        EVERY + 1
    );
    let children = format!("/proc/{0}/task/{0}/children", first.id());
    let agent = std::fs::read_to_string(children).expect("its child").trim().parse().expect("one process id");
    let agent = rustix::process::Pid::from_raw(agent).expect("a process id");
    rustix::process::kill_process(agent, rustix::process::Signal::TERM).expect("signal the agent");
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(first.wait().expect("its end").code(), Some(75), "{rest:?}");
    assert!(
        rest.iter().any(|line| line.contains("\"event\":\"interrupted\"") && line.contains("\"lost_steps\":0")),
        "{rest:?}"
    );
}
