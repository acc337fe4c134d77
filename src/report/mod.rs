//! Typed events out of the run, drawn by one reporter: a live view on a terminal, plain lines elsewhere, JSON lines on stdout.
mod event;
pub use event::Event;
