//! Printing: results to standard output, everything else to standard error.

use std::io::{self, IsTerminal, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::error::{Error, IoContext, Kind, Result};

/// Where and how to print.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// Print JSON.
    pub(crate) json: bool,
    /// Print only results and errors.
    pub(crate) quiet: bool,
    /// Standard error is a terminal.
    pub(crate) terminal: bool,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Output { json, quiet, terminal: io::stderr().is_terminal() }
    }

    /// Prints `value` with `--json`, else what `human` writes.
    pub(crate) fn result<T: Serialize>(
        &self,
        value: &T,
        human: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let mut text = Vec::new();
        if self.json {
            serde_json::to_writer_pretty(&mut text, value).map_err(|source| {
                Error::new(Kind::Failed, "the result cannot be written as JSON").with_source(source)
            })?;
            text.push(b'\n');
        } else {
            human(&mut text).at("writing to", "standard output")?;
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(&text).and_then(|()| stdout.flush()).at("writing to", "standard output")
    }

    /// A sentence for people, on standard error.
    pub(crate) fn say(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// An error with its causes, somebody else's words, and the next thing to do.
    pub(crate) fn error(&self, error: &Error) {
        let mut stderr = io::stderr().lock();
        if self.json {
            let value = serde_json::json!({ "error": {
                "kind": error.kind().word(),
                "message": error.chain(),
                "detail": error.detail_text(),
                "hint": error.hint_text(),
            }});
            let _ = writeln!(stderr, "{value:#}");
            return;
        }
        let _ = writeln!(stderr, "error: {}", error.chain());
        if let Some(detail) = error.detail_text() {
            for line in detail.lines() {
                let _ = writeln!(stderr, "  | {line}");
            }
        }
        if let Some(hint) = error.hint_text() {
            let _ = writeln!(stderr, "hint: {hint}");
        }
    }
}

/// A table for people: no lines, columns as wide as they need, wrapped only at a terminal's edge.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>, right: &[usize]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.iter().copied());
    table.add_rows(rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let text = table.trim_fmt();
    format!("{text}\n")
}

/// Bytes for people: `1.5 GB`.
pub(crate) fn bytes(n: u64) -> String {
    indicatif::DecimalBytes(n).to_string()
}

/// A time for people, in the local time zone, to the minute.
pub(crate) fn time(at: jiff::Timestamp) -> String {
    at.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M").to_string()
}
