//! Writing to people and to programs.

use crate::error::{CliError, Exit};
use serde::Serialize;
use serde_json::json;
use std::io::Write;
use whimbrel_host::api::{ApiError, ErrorCode};

/// Writes a text and a line's end to standard output. A reader that has seen enough (`| head`) is no error.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// One JSON value on a line.
pub fn print_json(value: &impl Serialize) {
    match serde_json::to_string(value) {
        Ok(text) => print(&text),
        Err(e) => note(&format!("the answer cannot be written as JSON: {e}")),
    }
}

/// Says something to people, beside the output.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Tells an error: what, where, the machine's state now, what to do next.
pub fn print_error(error: &CliError, json: bool) {
    let told = error.explain();
    note(&if json {
        error_object(&told, error.exit())
    } else {
        error_text(&told)
    });
}

/// A command line that makes no sense, as an object.
pub fn usage_object(text: &str) -> String {
    let told = ApiError::new(ErrorCode::Invalid, text.trim())
        .machine_state("nothing was changed")
        .next_step("see `whimbrel --help`");
    error_object(&told, Exit::Usage)
}

fn error_object(error: &ApiError, exit: Exit) -> String {
    json!({ "error": error, "exit": exit as u8 }).to_string()
}

fn error_text(error: &ApiError) -> String {
    let mut text = format!("error: {}", error.what);
    // A place that the sentence names already needs no line of its own.
    let place = error.place.as_deref().filter(|p| !error.what.contains(p));
    for (word, value) in [
        ("where", place),
        ("state", error.machine_state.as_deref()),
        ("next", error.next_step.as_deref()),
    ] {
        if let Some(value) = value {
            text.push_str(&format!("\n  {:<6} {value}", format!("{word}:")));
        }
    }
    text
}

/// Columns as wide as their widest cell, two spaces apart.
pub fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(|h| h.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let padded: Vec<String> = cells
            .iter()
            .zip(widths)
            .map(|(c, w)| format!("{c:<w$}"))
            .collect();
        padded.join("  ").trim_end().to_string()
    };
    let mut lines = vec![line(head)];
    lines.extend(
        rows.iter()
            .map(|row| line(std::array::from_fn(|i| row[i].as_str()))),
    );
    lines.join("\n")
}

/// `key: value` lines, values in one column; an empty value leaves its line out.
pub fn pairs(pairs: &[(&str, String)]) -> String {
    let shown = || pairs.iter().filter(|(_, v)| !v.is_empty());
    let width = shown().map(|(k, _)| k.len() + 1).max().unwrap_or(0);
    let lines: Vec<String> = shown()
        .map(|(key, value)| {
            let indented = value.replace('\n', &format!("\n{:width$}  ", ""));
            format!("{:<width$}  {indented}", format!("{key}:"))
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_its_four_parts() {
        let error = ApiError::new(ErrorCode::Io, "the disk is full")
            .at(Some("/state".to_string()))
            .machine_state("web1 runs as before")
            .next_step("make room");
        assert_eq!(
            error_text(&error),
            "error: the disk is full\n  where: /state\n  state: web1 runs as before\n  next:  make room"
        );
        let object: serde_json::Value =
            serde_json::from_str(&error_object(&error, Exit::Failed)).unwrap();
        assert_eq!(object["error"]["where"], "/state");
        assert_eq!(object["exit"], 1);
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            ["a".to_string(), "long value".to_string()],
            ["bbbbbb".to_string(), "x".to_string()],
        ];
        assert_eq!(
            table(["N", "V"], &rows),
            "N       V\na       long value\nbbbbbb  x"
        );
    }

    #[test]
    fn empty_values_have_no_line() {
        let shown = pairs(&[
            ("a", "1".to_string()),
            ("bb", String::new()),
            ("ccc", "2\n3".to_string()),
        ]);
        assert_eq!(shown, "a:    1\nccc:  2\n      3");
    }
}
