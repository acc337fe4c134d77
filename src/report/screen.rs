//! Standard error, shared by log lines and progress bars: a line goes above the bars, never through them.

use std::io::{self, IsTerminal, Write};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget};
use tracing_subscriber::{
    EnvFilter,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
};

/// The environment variable with the log filter, in `tracing`'s syntax: `debug`, `trainer::agent=trace`.
pub const LOG_VARIABLE: &str = "TRAINER_LOG";
const DEFAULT_FILTER: &str = "warn,trainer=info";

/// Standard error. Cheap to clone.
#[derive(Clone)]
pub struct Screen {
    multi: MultiProgress,
    live: bool,
}

impl Screen {
    /// Standard error, where bars are drawn if it is a terminal that can.
    pub fn stderr() -> Self {
        let live = io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        if live { Self { multi: MultiProgress::new(), live } } else { Self::plain() }
    }

    /// Standard error without bars.
    pub fn plain() -> Self {
        Self { multi: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), live: false }
    }

    /// Whether bars are drawn.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// A bar of bytes done, where bars are drawn. Whoever has it takes it away.
    pub fn bytes_bar(&self, doing: &'static str) -> Option<ProgressBar> {
        let bar = || ProgressBar::new(0).with_style(super::views::bytes_style()).with_prefix(doing);
        self.live.then(|| self.multi.add(bar()))
    }

    pub(super) fn bars(&self) -> &MultiProgress {
        &self.multi
    }
}

/// Sends `tracing` to `screen`, filtered by [`LOG_VARIABLE`]. Call once, first thing; a second call does nothing.
///
/// A filter that can't be read is reported and the default used: a slip in a variable must not stop a run at boot.
pub fn init_logging(screen: &Screen) {
    let wanted = std::env::var(LOG_VARIABLE).ok().filter(|text| !text.trim().is_empty());
    let parsed = wanted.as_deref().map(EnvFilter::try_new);
    let filter = match &parsed {
        Some(Ok(filter)) => filter.clone(),
        _ => EnvFilter::new(DEFAULT_FILTER),
    };
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let installed = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(Clock)
        .with_target(false)
        .with_ansi(colour)
        .with_writer(screen.clone())
        .try_init();
    if let (Ok(()), Some(Err(error))) = (installed, parsed) {
        tracing::warn!(variable = LOG_VARIABLE, %error, "log filter can't be read, using {DEFAULT_FILTER:?}");
    }
}

/// UTC to the second: finer is noise for people, and durations have fields of their own.
struct Clock;

impl FormatTime for Clock {
    fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
        write!(w, "{}", jiff::Timestamp::now().strftime("%FT%TZ"))
    }
}

impl<'a> MakeWriter<'a> for Screen {
    type Writer = Above<'a>;
    fn make_writer(&'a self) -> Self::Writer {
        Above(self)
    }
}

/// Writes above the bars. `tracing` gives a whole line at a time.
pub struct Above<'a>(&'a Screen);

impl Write for Above<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let put = || io::stderr().write_all(line).map(|()| line.len());
        if self.0.live { self.0.multi.suspend(put) } else { put() }
    }
    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
