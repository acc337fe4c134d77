//! Standard error, shared by log lines and progress bars: a line goes above the bars, never through them. Both go
//! through the [writer](super::writer): a thread that logs or moves a bar does not wait for a terminal.

use crate::env;
use std::{
    io::{self, IsTerminal, Write},
    sync::{Arc, Mutex, PoisonError},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, TermLike};
use tracing_subscriber::{
    EnvFilter,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
};

use super::writer::{self, Weight};

/// The environment variable with the log filter, in `tracing`'s syntax: `debug`, `trainer::agent=trace`.
pub const LOG_VARIABLE: &str = "TRAINER_LOG";
const DEFAULT_FILTER: &str = "warn,trainer=info";
/// Redraws of the bars per second.
const PICTURES: u8 = 20;

/// Standard error. Cheap to clone.
#[derive(Clone)]
pub struct Screen {
    multi: MultiProgress,
    live: bool,
}

impl Screen {
    /// Standard error, with bars if it is a terminal that can show them.
    pub fn stderr() -> Self {
        let live = io::stderr().is_terminal() && env::raw("TERM").is_none_or(|term| term != "dumb");
        if !live {
            return Self::plain();
        }
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(Pictures::default()), PICTURES);
        Self { multi: MultiProgress::with_draw_target(target), live }
    }

    /// Standard error without bars.
    pub fn plain() -> Self {
        Self { multi: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), live: false }
    }

    /// Whether bars are drawn.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// A bar of bytes done, if bars are drawn. Its owner removes it.
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
/// An invalid filter is reported and the default used: a typo in a variable must not stop a run at boot.
pub fn init_logging(screen: &Screen) {
    let wanted = env::text(LOG_VARIABLE).filter(|text| !text.trim().is_empty());
    let parsed = wanted.as_deref().map(EnvFilter::try_new);
    let filter = match &parsed {
        Some(Ok(filter)) => filter.clone(),
        _ => EnvFilter::new(DEFAULT_FILTER),
    };
    let colour = io::stderr().is_terminal() && env::raw("NO_COLOR").is_none_or(|value| value.is_empty());
    let installed = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(Clock)
        .with_target(false)
        .with_ansi(colour)
        // They would bypass the writer, and a failed write would be a panic.
        .log_internal_errors(false)
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
        Above { screen: self, weight: Weight::Passing }
    }
    fn make_writer_for(&'a self, about: &tracing::Metadata<'_>) -> Self::Writer {
        let weight = if *about.level() <= tracing::Level::WARN { Weight::Lasting } else { Weight::Passing };
        Above { screen: self, weight }
    }
}

/// Writes above the bars. `tracing` passes a whole line at a time.
pub struct Above<'a> {
    screen: &'a Screen,
    weight: Weight,
}

impl Write for Above<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let put = || writer::err().say(line.to_vec(), self.weight);
        if self.screen.live {
            self.screen.multi.suspend(put)
        } else {
            put()
        }
        Ok(line.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The terminal as the bars see it: each redraw goes to the writer as a whole.
#[derive(Clone, Debug, Default)]
struct Pictures(Arc<Mutex<String>>);

impl Pictures {
    fn draw(&self, text: &str) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
        Ok(())
    }
    fn travel(&self, cells: usize, way: char) -> io::Result<()> {
        if cells == 0 { Ok(()) } else { self.draw(&format!("\x1b[{cells}{way}")) }
    }
}

impl TermLike for Pictures {
    fn width(&self) -> u16 {
        writer::terminal_size().0
    }
    fn height(&self) -> u16 {
        writer::terminal_size().1
    }
    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.travel(n, 'A')
    }
    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.travel(n, 'B')
    }
    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.travel(n, 'C')
    }
    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.travel(n, 'D')
    }
    fn write_line(&self, text: &str) -> io::Result<()> {
        self.draw(text)?;
        self.draw("\n")
    }
    fn write_str(&self, text: &str) -> io::Result<()> {
        self.draw(text)
    }
    fn clear_line(&self) -> io::Result<()> {
        self.draw("\r\x1b[2K")
    }
    fn flush(&self) -> io::Result<()> {
        let picture = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if !picture.is_empty() {
            writer::err().say(picture.into_bytes(), Weight::Picture);
        }
        Ok(())
    }
}
