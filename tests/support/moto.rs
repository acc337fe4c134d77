//! A second S3 server, written by others and independent of ours: moto (<https://github.com/getmoto/moto>), as a process on a
//! free port of 127.0.0.1, ended by its id. `scripts/test` installs it; where it is not installed, the tests that need
//! it say so and pass.
//!
//! What it does not do, so what is not tested on it: it refuses no body for a wrong checksum and keeps no CRC64-NVME
//! (`verify` without `--deep` has only sizes there), it gives all unfinished uploads on one page and says of each that
//! it was begun in 2010, and it checks no signature.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

/// The version that `moto-requirements.txt` names; its folder has it in its name.
const REQUIREMENTS: &str = include_str!("moto-requirements.txt");

/// The server, with the bucket made; it is killed when this is dropped.
pub struct Moto {
    child: Child,
    port: u16,
}

/// The folder of Python modules that `scripts/test` makes.
fn modules() -> Option<PathBuf> {
    let version = REQUIREMENTS.lines().find_map(|line| line.strip_prefix("moto=="))?;
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(cache.join(format!("trainer/moto-{version}")))
}

impl Moto {
    /// Starts one with an empty bucket; `None` where it is not installed.
    pub fn start(bucket: &str) -> Option<Self> {
        let Some(modules) = modules().filter(|modules| modules.is_dir()) else {
            println!(
                "skipped: moto is not installed; scripts/test installs it where the Python package index is reached"
            );
            return None;
        };
        let mut child = Command::new("python3")
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"])
            .env("PYTHONPATH", modules)
            // Its own answers to a proxy's variables are nobody's business here.
            .env_remove("http_proxy")
            .env_remove("HTTP_PROXY")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start moto");
        let mut lines = BufReader::new(child.stderr.take().expect("piped"));
        let (mut line, mut said) = (String::new(), String::new());
        let port = loop {
            line.clear();
            let read = lines.read_line(&mut line).expect("read what moto says");
            assert!(read > 0, "moto has ended: {said}");
            said.push_str(&line);
            let digits = line.split_once("http://127.0.0.1:").map(|(_, rest)| rest);
            let digits = digits.map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
            if let Some(port) = digits.and_then(|digits| digits.parse().ok()) {
                break port;
            }
        };
        // It writes a line for each request; nobody may make it wait.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        let moto = Self { child, port };
        moto.make_bucket(bucket);
        Some(moto)
    }

    /// `http://127.0.0.1:<port>`
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn make_bucket(&self, bucket: &str) {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port)).expect("connect to moto");
        let request =
            format!("PUT /{bucket} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).expect("ask moto for a bucket");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).expect("hear moto");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
