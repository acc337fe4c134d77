//! Whether ranks of this machine can reach each other.
//!
//! They meet over loopback. Where its interface is down (a network namespace that nobody has set up, a sandbox), they
//! would silently wait for each other until a timeout: so the interface is tried before anything else begins.

use std::{
    io,
    net::{Ipv4Addr, TcpListener, TcpStream},
    time::Duration,
};

use crate::error::{Error, Kind, Result};

/// A connection within one machine takes microseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Always succeeds for one worker, which has no peers.
pub fn check(workers: u32) -> Result<()> {
    if workers < 2 {
        return Ok(());
    }
    connect().map_err(|error| {
        let what = format!("connect {workers} workers over 127.0.0.1, the loopback interface of this machine");
        Error::from_source(Kind::Config, error)
            .context(what)
            .with_hint("bring it up: ip link set lo up; or train with one worker: --nproc-per-node 1")
    })
}

fn connect() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE).map(drop)
}
