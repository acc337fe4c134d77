//! The signals sent to this process, from the first instruction of `main` on.
//!
//! The handlers are tokio's: one sets a flag and wakes this file's own thread, which counts. Signals that arrive before
//! there is a listener are kept for it. Without handlers a signal would end the process, which looks like a crash, and
//! the first process of a container would never receive it. Before `main` signals are blocked
//! ([`torch::release_signals`]).
//!
//! - SIGTERM, SIGINT, SIGHUP: stop. SIGHUP, which a closing terminal sends, is left alone if it was ignored at the
//!   start (`nohup`).
//! - SIGUSR1: the machine goes away. SIGUSR2: save now.
//! - SIGXFSZ is caught and ignored: a file that has reached its limit (`ulimit -f`) then makes the write fail, rather
//!   than end the process.
//! - SIGTTOU and SIGTTIN, with which a terminal stops a process in the background (`stty tostop`), are ignored, by
//!   workers too: a stopped process hears no signal ([`torch::release_signals`]).

use std::{io, sync::OnceLock};

use tokio::{
    signal::unix::{Signal as Stream, SignalKind, signal},
    sync::watch,
};

use crate::torch;

/// A signal that asks something of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM.
    Terminate,
    /// SIGINT.
    Interrupt,
    /// SIGHUP.
    HangUp,
    /// SIGUSR1.
    User1,
    /// SIGUSR2.
    User2,
}

/// In the order in which they are taken.
const ALL: [Signal; 5] = [Signal::Terminate, Signal::Interrupt, Signal::HangUp, Signal::User1, Signal::User2];

impl Signal {
    const fn kind(self) -> SignalKind {
        match self {
            Self::Terminate => SignalKind::terminate(),
            Self::Interrupt => SignalKind::interrupt(),
            Self::HangUp => SignalKind::hangup(),
            Self::User1 => SignalKind::user_defined1(),
            Self::User2 => SignalKind::user_defined2(),
        }
    }

    /// Whether it asks this process to leave.
    const fn asks_to_leave(self) -> bool {
        !matches!(self, Self::User2)
    }
}

/// The signals that have arrived.
#[derive(Clone, Copy, Debug, Default)]
struct Came {
    /// By position in [`ALL`]: the signals not yet taken.
    waiting: [u32; ALL.len()],
    /// Signals that ask this process to leave, taken or not.
    asked: u32,
}

/// See the module's documentation. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Inbox(watch::Sender<Came>);

static INBOX: OnceLock<Result<Inbox, (io::ErrorKind, String)>> = OnceLock::new();

/// Installs the handlers: from here on, the signals no longer end the process. A second call returns the same inbox.
pub fn open() -> io::Result<Inbox> {
    let opened = INBOX.get_or_init(|| Inbox::begin().map_err(|error| (error.kind(), error.to_string())));
    opened.clone().map_err(|(kind, text)| io::Error::new(kind, text))
}

impl Inbox {
    fn begin() -> io::Result<Self> {
        let hang_up_is_ignored =
            is_ignored(SignalKind::hangup(), &std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let mut streams = [const { None }; ALL.len()];
        {
            // From here on they count, even if the thread that listens for them is busy.
            let _context = runtime.enter();
            for (stream, which) in streams.iter_mut().zip(ALL) {
                if which != Signal::HangUp || !hang_up_is_ignored {
                    *stream = Some(signal(which.kind())?);
                }
            }
            // No code waits for it.
            drop(signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw())));
        }
        torch::release_signals();
        let inbox = Self(watch::Sender::new(Came::default()));
        let hears = inbox.clone();
        let hear = move || {
            runtime.block_on(futures::future::join_all(streams.into_iter().zip(0..).map(|(s, i)| hears.hear(s, i))))
        };
        std::thread::Builder::new().name("signals".into()).spawn(hear)?;
        Ok(inbox)
    }

    /// Counts the signals of `stream`.
    async fn hear(&self, stream: Option<Stream>, place: usize) {
        let Some(mut stream) = stream else { return };
        while stream.recv().await.is_some() {
            self.0.send_modify(|came| came.count(place));
        }
    }

    /// Takes the next signal, once. Safe to drop and call again.
    pub async fn take(&self) -> Signal {
        let mut news = self.0.subscribe();
        loop {
            let mut taken = None;
            self.0.send_if_modified(|came| {
                taken = came.take();
                false
            });
            if let Some(taken) = taken {
                return taken;
            }
            if news.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// How often this process has been asked to leave so far.
    pub fn asked(&self) -> u32 {
        self.0.borrow().asked
    }

    /// How many of these requests have been taken.
    pub fn obeyed(&self) -> u32 {
        let came = self.0.borrow();
        let waiting = came.waiting.iter().zip(ALL).filter(|(_, which)| which.asks_to_leave());
        came.asked.saturating_sub(waiting.map(|(waiting, _)| waiting).sum())
    }

    /// Waits until it has been asked more often than `before`.
    pub async fn asked_again(&self, before: u32) {
        if self.0.subscribe().wait_for(|came| came.asked > before).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Came {
    fn count(&mut self, place: usize) {
        let (Some(waiting), Some(which)) = (self.waiting.get_mut(place), ALL.get(place)) else { return };
        *waiting = waiting.saturating_add(1);
        if which.asks_to_leave() {
            self.asked = self.asked.saturating_add(1);
        }
    }

    fn take(&mut self) -> Option<Signal> {
        let (waiting, which) = self.waiting.iter_mut().zip(ALL).find(|(waiting, _)| **waiting > 0)?;
        *waiting -= 1;
        Some(which)
    }
}

/// Whether `/proc/self/status` lists the signal as ignored (proc(5)): the bit below its number in `SigIgn`.
fn is_ignored(kind: SignalKind, status: &str) -> bool {
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    let bit = u32::try_from(kind.as_raw_value() - 1).unwrap_or_default();
    mask.is_some_and(|mask| mask >> bit & 1 == 1)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn the_mask_shows_ignored_signals() {
        let status =
            "Name:\ttrainer\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000440\n";
        assert!(is_ignored(SignalKind::hangup(), status));
        assert!(is_ignored(SignalKind::pipe(), status));
        for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::user_defined1()] {
            assert!(!is_ignored(kind, status), "{kind:?}");
        }
        assert!(!is_ignored(SignalKind::hangup(), ""));
    }

    #[tokio::test]
    async fn a_signal_before_the_listener_waits_and_is_taken_once() {
        let inbox = Inbox(watch::Sender::new(Came::default()));
        for place in [4, 0, 2, 0] {
            inbox.0.send_modify(|came| came.count(place));
        }
        assert_eq!((inbox.asked(), inbox.obeyed()), (3, 0), "SIGUSR2 does not ask to leave");
        for (obeyed, signal) in (1..).zip([Signal::Terminate, Signal::Terminate, Signal::HangUp]) {
            assert_eq!(inbox.take().await, signal);
            assert_eq!(inbox.obeyed(), obeyed, "SIGUSR2 waits, and is not counted");
        }
        assert_eq!(inbox.take().await, Signal::User2);
        assert!(inbox.asked_again(3).now_or_never().is_none(), "it was asked three times, and not more often");
        let (later, ()) = tokio::join!(inbox.take(), async { inbox.0.send_modify(|came| came.count(3)) });
        assert_eq!(later, Signal::User1);
        inbox.asked_again(3).await;
        assert_eq!((inbox.asked(), inbox.obeyed()), (4, 4));
    }
}
