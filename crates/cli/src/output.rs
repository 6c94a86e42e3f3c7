//! What the reader sees: answers on standard output, everything else on standard error.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use strake_api::rest::Problem;
use strake_observe::{Observation, OsContext, Result, Style, render};

use crate::observations::OutputClosed;

/// The two streams and how they are to be used.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    style: Style,
    live: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        Self {
            json,
            style: style(terminal),
            live: terminal && !json,
        }
    }

    /// Whether the answer is to be JSON.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// Whether progress may be drawn: standard error is a terminal and a person reads it.
    pub(crate) fn live(&self) -> bool {
        self.live
    }

    /// How text on standard output may look.
    pub(crate) fn stdout_style(&self) -> Style {
        style(io::stdout().is_terminal())
    }

    /// The answer: `value` as JSON, or what `text` makes of it.
    pub(crate) fn answer<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        if self.json {
            let mut document = serde_json::to_vec_pretty(value)
                .map_err(io::Error::other)
                .os("serialise", "the answer")?;
            document.push(b'\n');
            bytes(&document)
        } else {
            bytes(text(value).as_bytes())
        }
    }

    /// A remark for people: nothing with `--json`.
    pub(crate) fn remark(&self, text: &str) {
        if !self.json {
            // There is nobody left to tell if standard error is closed.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// A failure: the tree on standard error, or with `--json` the problem document on standard
    /// output. `status` is the HTTP status that the daemon refused with, if it did.
    pub(crate) fn failure(&self, failure: &Observation, status: Option<u16>) {
        if self.json {
            let problem = Problem {
                kind: format!("tag:strake,2026:{}", failure.id()),
                title: failure.text().to_owned(),
                status: status.unwrap_or(0),
                detail: failure.remedy().to_owned(),
                observation: failure.clone(),
            };
            if let Ok(mut document) = serde_json::to_vec_pretty(&problem) {
                document.push(b'\n');
                let _ = bytes(&document);
            }
        } else {
            let _ = io::stderr().write_all(render(failure, self.style).as_bytes());
        }
    }
}

/// Colours are for terminals, and for those who want them (<https://no-color.org>).
fn style(terminal: bool) -> Style {
    if terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) {
        Style::Terminal
    } else {
        Style::Plain
    }
}

/// Writes to standard output at once.
pub(crate) fn bytes(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed {}.into()),
        other => other.os("write", "standard output"),
    }
}

/// How a column is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// A table for people: a head, and columns as wide as what is in them.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows
            .push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    pub(crate) fn render(&self) -> String {
        let widths: Vec<usize> = self
            .columns
            .iter()
            .enumerate()
            .map(|(index, (head, _))| {
                let cells = self.rows.iter().filter_map(|row| row.get(index));
                cells
                    .map(|cell| cell.chars().count())
                    .chain([head.chars().count()])
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut out = String::new();
        let heads = self.columns.iter().map(|(head, _)| (*head).to_owned());
        self.line(&mut out, &widths, &heads.collect::<Vec<_>>());
        for row in &self.rows {
            self.line(&mut out, &widths, row);
        }
        out
    }

    fn line(&self, out: &mut String, widths: &[usize], cells: &[String]) {
        let mut line = String::new();
        for ((cell, width), (_, align)) in cells.iter().zip(widths).zip(&self.columns) {
            let width = *width;
            // Writing to a string cannot fail.
            let _ = match align {
                Align::Left => write!(line, "{cell:<width$}  "),
                Align::Right => write!(line, "{cell:>width$}  "),
            };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

/// `text` without control characters: names and paths may come from others.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_its_cells() {
        let mut table = Table::new(&[("NAME", Align::Left), ("SIZE", Align::Right)]);
        table.row(["web1".to_owned(), "1 GiB".to_owned()]);
        table.row(["a-long-name".to_owned(), "12".to_owned()]);
        assert_eq!(
            table.render(),
            "NAME          SIZE\nweb1         1 GiB\na-long-name     12\n"
        );
    }

    #[test]
    fn a_table_passes_no_control_characters_on() {
        let mut table = Table::new(&[("NAME", Align::Left)]);
        table.row(["\x1b[2Jx".to_owned()]);
        assert!(!table.render().contains('\x1b'));
    }
}
