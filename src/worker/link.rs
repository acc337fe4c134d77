//! The worker's end of the control stream.
//!
//! The stream is the worker's standard input (a Unix socket, so it carries both directions): the one descriptor that
//! can be taken over without `unsafe`. When it ends the agent is gone, and the worker exits at once.

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};

use super::gate::StepGate;
use crate::{
    error::{Error, Kind, Result},
    protocol::{Assignment, FromWorker, ToWorker, read_message, write_message},
};

/// Sends to the agent; shared by the loop, the control thread and the copy threads.
#[derive(Clone, Debug)]
pub struct Link {
    inner: Arc<Mutex<(UnixStream, Vec<u8>)>>,
}

/// Receives from the agent.
#[derive(Debug)]
pub struct Orders {
    stream: UnixStream,
}

/// The next generation of a worker that lives on.
#[derive(Debug)]
pub struct Next {
    /// The stream, which the control thread gives back.
    pub orders: Orders,
    /// The worker's place.
    pub assignment: Assignment,
    /// Its state is the one to go on from.
    pub keeps: bool,
}

/// Takes over the control stream and ties this process's life to the agent's.
pub fn connect() -> Result<(Link, Orders)> {
    let failed = |error: std::io::Error| Error::from_source(Kind::Usage, error).context("take over the control stream");
    // If the agent is already gone, the first read finds the stream at its end.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| failed(error.into()))?;
    let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    stream.peer_addr().map_err(|_| {
        Error::new(Kind::Usage, "`trainer worker` is started by an agent, not by hand").with_hint("use `trainer run`")
    })?;
    let writer = stream.try_clone().map_err(failed)?;
    Ok((Link { inner: Arc::new(Mutex::new((writer, Vec::new()))) }, Orders { stream }))
}

/// Exits at once, without the C++ destructors that may wait for threads of LibTorch which are still at work. Nothing is
/// lost: all important state is in the agent's memory.
pub fn leave() -> ! {
    let _ = kill_process(getpid(), Signal::KILL);
    loop {
        std::thread::park();
    }
}

impl Link {
    /// Sends one message. A broken stream means that the agent is gone.
    pub fn tell(&self, message: &FromWorker) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let (stream, buffer) = &mut *inner;
        if write_message(stream, message, buffer).is_err() {
            leave();
        }
    }
}

impl Orders {
    /// The next order. Does not return if the agent is gone, or wants this worker to exit.
    pub fn next(&mut self) -> ToWorker {
        match read_message(&mut self.stream) {
            Ok(Some(ToWorker::Exit) | None) | Err(_) => leave(),
            Ok(Some(message)) => message,
        }
    }

    /// Obeys orders on a thread of its own from here on, until another generation begins: then the thread ends.
    pub fn serve(mut self, link: Link, gate: Arc<StepGate>) -> Result<JoinHandle<Next>> {
        let run = move || {
            loop {
                match self.next() {
                    ToWorker::Regroup { assignment, keeps } => {
                        gate.regroup();
                        return Next { orders: self, assignment: *assignment, keeps };
                    }
                    ToWorker::Freeze { ticket } => link.tell(&FromWorker::Frozen { ticket, started: gate.freeze() }),
                    ToWorker::Thaw { saves, stop_after } => gate.thaw(&saves, stop_after),
                    ToWorker::Proceed { step } => gate.proceed(step),
                    // The start is over; nothing else is sent.
                    _ => {}
                }
            }
        };
        let spawned = std::thread::Builder::new().name("control".into()).spawn(run);
        spawned.map_err(|error| Error::from_source(Kind::Bug, error).context("start control thread"))
    }
}
