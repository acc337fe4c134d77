//! AWS's interfaces, independent of our code: moto (<https://github.com/getmoto/moto>), as a process on a free port of
//! 127.0.0.1, ended by its id. `scripts/test` installs it; without it, the tests that need it say so and pass.
//!
//! Its gaps, which are not tested on it: it accepts a body with a wrong checksum and keeps no CRC64-NVME (`verify`
//! without `--deep` has only sizes there), it lists all unfinished uploads on one page with a start in 2010, and it
//! checks no signature. Of several conditional writes at once it accepts more than one, so they come in one by one. It
//! silently drops unknown parts of a CloudFormation template: only [`Moto::log`] shows that.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal};

/// Installed by `scripts/test`; the folder is named after its checksum.
const REQUIREMENTS: &str = include_str!("tools-requirements.txt");

/// The server, in which one conditional write is handled at a time: between its check and its write another thread may
/// check too.
const SERVER: &str = "
import threading
import moto.server as server
from moto.ssm.models import Parameter

# `!GetAtt Parameter.Value` in a template.
Parameter.get_cfn_attribute = lambda self, name: {'Type': self.parameter_type, 'Value': self.value}[name]

lock, run = threading.Lock(), server.run_simple

def run_simple(host, port, app, **settings):
    def one_by_one(environ, start_response):
        if 'HTTP_IF_NONE_MATCH' in environ or 'HTTP_IF_MATCH' in environ:
            with lock:
                return app(environ, start_response)
        return app(environ, start_response)
    run(host, port, one_by_one, **settings)

server.run_simple = run_simple
server.main()
";

/// Long enough for a busy machine; no request that works takes this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// The server, with its bucket; it is killed when this is dropped.
pub struct Moto {
    child: Child,
    port: u16,
    said: Arc<Said>,
    marks: AtomicU64,
}

/// Its output on standard error.
#[derive(Default)]
struct Said {
    text: Mutex<String>,
    more: Condvar,
}

/// The folder of Python modules and programs that `scripts/test` creates; `None`, with a line on standard output, if it
/// is missing.
pub fn tools() -> Option<PathBuf> {
    let found = place().filter(|folder| folder.is_dir());
    if found.is_none() {
        println!(
            "skipped: the tools of tests/support/tools-requirements.txt are not installed; scripts/test installs them \
            where the \
             Python package index is reached"
        );
    }
    found
}

fn place() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    // scripts/test asks the same program.
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    sum.stdin.take()?.write_all(REQUIREMENTS.as_bytes()).ok()?;
    let sum = String::from_utf8(sum.wait_with_output().ok()?.stdout).ok()?;
    Some(cache.join(format!("trainer/tools-{}", sum.get(..12)?)))
}

impl Moto {
    /// Starts one with an empty bucket and waits until it answers; `None`: it is not installed.
    pub fn start(bucket: &str) -> Option<Self> {
        let modules = tools()?;
        // It must know its port to call itself, as its state machines do. Another process may take the port in between:
        // then it tries another one.
        (0..10).find_map(|_| Self::try_start(&modules, bucket)).or_else(|| panic!("moto found no free port"))
    }

    fn try_start(modules: &Path, bucket: &str) -> Option<Self> {
        let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|free| free.local_addr()).expect("a free port").port();
        let mut child = Command::new("python3")
            .args(["-c", SERVER, "-H", "127.0.0.1", "-p", &port.to_string()])
            .env("PYTHONPATH", modules)
            .env("PYTHONUNBUFFERED", "1")
            // Its own requests through a proxy are of no interest here.
            .env_remove("http_proxy")
            .env_remove("HTTP_PROXY")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start moto");
        let mut lines = BufReader::new(child.stderr.take().expect("piped"));
        let said = Arc::new(Said::default());
        loop {
            let Some(line) = said.next(&mut lines) else {
                panic!("moto has ended: {}", said.text.lock().expect("unpoisoned"));
            };
            if line.contains(&format!("http://127.0.0.1:{port}")) {
                break;
            }
            if line.contains("in use") {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
        // It writes a line for each request, and must not wait for a reader.
        let listener = Arc::clone(&said);
        std::thread::spawn(move || while listener.next(&mut lines).is_some() {});
        let moto = Self { child, port, said, marks: AtomicU64::new(0) };
        moto.make_bucket(bucket);
        Some(moto)
    }

    /// `http://127.0.0.1:<port>`
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Makes an empty bucket.
    pub fn make_bucket(&self, bucket: &str) {
        let answer = self.send("PUT", &format!("/{bucket}"), &[], "");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// From now on it answers nothing: it only accepts connections.
    pub fn hang(&self) {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::STOP).expect("stop moto");
    }

    /// Forgets everything: buckets, queues and stacks of all accounts.
    pub fn reset(&self) {
        let answer = self.send("POST", "/moto-api/reset", &[], "");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// Switches on features that are off by default, such as `{"stepfunctions": {"execute_state_machine": true}}`:
    /// without it every execution succeeds at once.
    pub fn configure(&self, settings: &str) {
        let answer = self.send("POST", "/moto-api/config", &[], settings);
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }

    /// All its output so far, up to the last answered request.
    pub fn log(&self) -> String {
        // Lines of earlier requests were written before this one's.
        let mark = format!("/moto-api/mark-{}", self.marks.fetch_add(1, Ordering::Relaxed));
        self.send("GET", &mark, &[], "");
        let text = self.said.text.lock().expect("unpoisoned");
        let (text, waited) = self
            .said
            .more
            .wait_timeout_while(text, PATIENCE, |text| !text.contains(&format!("{mark} ")))
            .expect("unpoisoned");
        assert!(!waited.timed_out(), "moto wrote no line for {mark}: {text}");
        text.clone()
    }

    /// Calls an action of a service that speaks forms and XML (CloudFormation, Auto Scaling, EC2, IAM) and returns the
    /// body of its answer; panics if it is refused.
    pub fn query(&self, service: &str, version: &str, action: &str, parameters: &[(&str, &str)]) -> String {
        let mut form = format!("Action={action}&Version={version}");
        for (name, value) in parameters {
            form.push_str(&format!("&{name}="));
            for byte in value.bytes() {
                match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => form.push(char::from(byte)),
                    _ => form.push_str(&format!("%{byte:02X}")),
                }
            }
        }
        let headers = [("Content-Type", "application/x-www-form-urlencoded"), ("Authorization", &signature(service))];
        body(&format!("{service} {action}"), &self.send("POST", "/", &headers, &form))
    }

    /// Calls an action of a service that speaks JSON (`target` as in `AWSStepFunctions.StartExecution`) and returns its
    /// answer; panics if it is refused.
    pub fn json(&self, service: &str, target: &str, request: &serde_json::Value) -> serde_json::Value {
        self.try_json(service, target, request).unwrap_or_else(|answer| panic!("{target}: {answer}"))
    }

    /// The same; a refusal is returned as an error, unchanged.
    pub fn try_json(
        &self,
        service: &str,
        target: &str,
        request: &serde_json::Value,
    ) -> Result<serde_json::Value, String> {
        let headers = [
            ("Content-Type", "application/x-amz-json-1.0"),
            ("X-Amz-Target", target),
            ("Authorization", &signature(service)),
        ];
        let answer = self.send("POST", "/", &headers, &request.to_string());
        if !answer.starts_with("HTTP/1.1 200") {
            return Err(answer);
        }
        Ok(match body(target, &answer).as_str() {
            "" => serde_json::Value::Null,
            text => serde_json::from_str(text).expect("JSON from moto"),
        })
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port)).expect("connect to moto");
        connection.set_read_timeout(Some(PATIENCE)).expect("bound the wait for moto");
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n");
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        connection.write_all(request.as_bytes()).expect("ask moto");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).expect("hear moto");
        answer
    }
}

/// It reads the service and the region from here, and checks nothing.
fn signature(service: &str) -> String {
    format!(
        "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/{service}/aws4_request, SignedHeaders=host, Signature=0"
    )
}

fn body(what: &str, answer: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    assert!(head.starts_with("HTTP/1.1 200"), "{what}: {answer}");
    body.to_owned()
}

impl Said {
    /// The next line, recorded; `None` at the end.
    fn next(&self, lines: &mut BufReader<ChildStderr>) -> Option<String> {
        let mut line = Vec::new();
        let read = lines.read_until(b'\n', &mut line).unwrap_or(0);
        let line = String::from_utf8_lossy(&line).into_owned();
        self.text.lock().expect("unpoisoned").push_str(&line);
        self.more.notify_all();
        (read > 0).then_some(line)
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
