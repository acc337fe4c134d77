//! Standard output: data, and nothing else. Requested output that can't be written is an error, unless its reader has
//! gone.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::error::{Error, Kind, Result};

/// Writes `text`. A reader that has gone (`trainer runs | head`) is no error, and is not reported.
pub(super) fn emit(text: &str) -> Result<()> {
    show(text).map(drop)
}

/// The same; returns whether there may still be a reader: if not, a caller with more to write can stop.
pub(super) fn show(text: &str) -> Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::from_source(Kind::Unavailable, error).context("write to standard output")),
    }
}

/// The same, alongside other waits: Ctrl-C is heard even if the reader stalls. Unread output is lost with the process.
pub(super) async fn show_beside(text: String) -> Result<bool> {
    let (done, shown) = tokio::sync::oneshot::channel();
    // Its own thread, because a runtime waits at shutdown for the threads of its pool.
    let writes = move || drop(done.send(show(&text)));
    std::thread::Builder::new()
        .name("show".into())
        .spawn(writes)
        .map_err(|error| Error::from_source(Kind::Unavailable, error).context("start a thread"))?;
    shown.await.unwrap_or(Ok(false))
}

/// Whether standard output is a terminal.
pub(super) fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Each value as JSON on a line of its own.
pub(super) fn json_lines<T: Serialize>(values: impl IntoIterator<Item = T>) -> Result<String> {
    let mut text = String::new();
    for value in values {
        let line = serde_json::to_string(&value).map_err(|error| Error::from_source(Kind::Bug, error))?;
        text.push_str(&line);
        text.push('\n');
    }
    Ok(text)
}

/// Columns aligned by their widest cell; numbers to the right.
pub(super) struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings. A heading that starts with `>` aligns its column to the right.
    pub fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|heading| heading.starts_with('>')).collect();
        let first = headings.iter().map(|heading| heading.trim_start_matches('>').to_owned()).collect();
        Self { right, rows: vec![first] }
    }

    /// Adds a row with one cell for each heading. Text from outside is made fit for a terminal.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| crate::report::human::plain(&cell)).collect());
    }

    /// The table as text, without trailing spaces.
    pub fn text(&self) -> String {
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells: Vec<String> = row
                .iter()
                .zip(widths.iter().zip(&self.right))
                .map(
                    |(cell, (width, right))| if *right { format!("{cell:>width$}") } else { format!("{cell:<width$}") },
                )
                .collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["run", ">steps", "state"]);
        table.row(["a".into(), "5".into(), "completed".into()]);
        table.row(["long\u{1b}é".into(), "12345".into(), String::new()]);
        assert_eq!(table.text(), "run          steps  state\na                5  completed\nlong\\u{1b}é  12345\n");
    }

    #[test]
    fn json_is_one_object_a_line() {
        assert_eq!(
            json_lines([serde_json::json!({"a": 1}), serde_json::json!({"a": 2})]).unwrap(),
            "{\"a\":1}\n{\"a\":2}\n"
        );
    }
}
