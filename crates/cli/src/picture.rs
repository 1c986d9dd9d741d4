//! What a volume looks like: in characters, and in words.

use crate::output::{pairs, table};
use crate::show::{bytes, percent};
use whimbrel_host::api::{CheckView, FindingKind, HeatView, MapCell, MapView};

/// Cells in a line of the picture.
const LINE: usize = 64;

/// Recent accesses to some MiB of a cell from which it counts as hot; a quarter of the hottest at least.
const HOT: u64 = 8;

/// A cell's character: the most telling thing there is to say of it.
fn cell(c: &MapCell, len: u64, hottest: u64) -> char {
    let heat = c.reads + c.writes;
    if c.absent > len / 2 {
        return '.';
    }
    if heat >= HOT && heat * 4 >= hottest {
        return '#';
    }
    if c.written > 0 {
        return 'w';
    }
    match c.data {
        0 => ' ',
        data if data * 2 < len => '-',
        _ => '=',
    }
}

pub fn map(view: &MapView) -> String {
    let hottest = view.cells.iter().map(|c| c.reads + c.writes).max();
    let mut text = pairs(&[
        ("volume", view.volume.to_string()),
        ("size", bytes(view.size)),
        ("data", bytes(view.total.data)),
        ("absent", bytes(view.total.absent)),
        ("written here", bytes(view.total.written)),
        ("a character", bytes(view.cell)),
    ]);
    text.push_str("\n\n");
    let width = bytes(view.size).len().max(10);
    for (n, line) in view.cells.chunks(LINE).enumerate() {
        let start = (n * LINE) as u64 * view.cell;
        let drawn: String = (0u64..)
            .zip(line)
            .map(|(m, c)| {
                let len = view.cell.min(view.size - start - m * view.cell);
                cell(c, len, hottest.unwrap_or(0))
            })
            .collect();
        text.push_str(&format!("{:>width$} |{drawn}|\n", bytes(start)));
    }
    text.push_str(
        "\n# hot   w written while arriving   = data   - some data   . absent   (blank) nothing",
    );
    text
}

pub fn heat(view: &HeatView) -> String {
    let mut text = pairs(&[
        ("volume", view.volume.to_string()),
        ("half-life", format!("{} min", view.half_life_s / 60)),
        ("used", format!("{} parts of 1 MiB", view.extents_used)),
        ("reads", view.reads.to_string()),
        ("writes", view.writes.to_string()),
    ]);
    if view.hottest.is_empty() {
        return text;
    }
    let all = (view.reads + view.writes).max(1);
    let rows: Vec<_> = view
        .hottest
        .iter()
        .map(|e| {
            let both = e.reads + e.writes;
            [
                e.offset.to_string(),
                bytes(e.len),
                e.reads.to_string(),
                e.writes.to_string(),
                percent((both * 1000 / all) as u16),
            ]
        })
        .collect();
    text.push_str("\n\n");
    text.push_str(&table(
        ["OFFSET", "LENGTH", "READS", "WRITES", "OF ALL"],
        &rows,
    ));
    text
}

fn word(kind: FindingKind) -> &'static str {
    match kind {
        FindingKind::Good => "good",
        FindingKind::Repaired => "repaired",
        FindingKind::Untidy => "untidy",
        FindingKind::Broken => "broken",
    }
}

pub fn check(view: &CheckView) -> String {
    let mut text = format!("volume {}: {}", view.volume, word(view.verdict));
    for finding in &view.findings {
        text.push_str(&format!("\n  {:<9} {}", word(finding.kind), finding.what));
        if let Some(next) = &finding.next_step {
            text.push_str(&format!("\n  {:<9} {next}", ""));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_host::api::fake::sample_map;

    #[test]
    fn a_map_has_a_character_for_each_state() {
        let text = map(&sample_map(10));
        assert!(text.contains("|= #.w= #.w|"), "{text}");
    }

    #[test]
    fn the_picture_is_as_wide_as_its_lines() {
        let text = map(&sample_map(130));
        let lines: Vec<_> = text.lines().filter(|l| l.ends_with('|')).collect();
        assert_eq!(lines.len(), 3);
    }
}
