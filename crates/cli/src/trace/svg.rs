//! A trace as a picture: where and when the disk was used, and below it the working sets.
//!
//! Above, time goes to the right and the disk down; a cell is a window and a stripe, blue where it was mostly read, red
//! where mostly written, the stronger the more requests (by their logarithm). Below, the same time, and the bytes of
//! all regions that were read and written in each window.

use crate::show::bytes;
use std::fmt::Write;
use whimbrel_volume::trace::summary::{Map, Summary};

const WIDTH: f64 = 960.0;
const MAP: f64 = 384.0;
const SETS: f64 = 200.0;
const LEFT: f64 = 90.0;
const TOP: f64 = 30.0;
const GAP: f64 = 60.0;

const READ: &str = "#2266cc";
const WRITTEN: &str = "#cc3322";

pub fn draw(summary: &Summary) -> String {
    let height = TOP + MAP + GAP + SETS + 50.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{height}\" viewBox=\"0 0 {w} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        w = LEFT + WIDTH + 30.0
    );
    text(
        &mut svg,
        LEFT,
        18.0,
        "start",
        "use of the disk: blue read, red written",
    );
    frame(&mut svg, TOP, MAP);
    cells(&mut svg, summary);
    text(&mut svg, LEFT - 8.0, TOP + 10.0, "end", "0");
    text(
        &mut svg,
        LEFT - 8.0,
        TOP + MAP,
        "end",
        &bytes(summary.map.stripe * Map::ROWS),
    );
    let below = TOP + MAP + GAP;
    let title = format!(
        "working sets in windows of {} s: blue read, red written",
        summary.window_us as f64 / 1e6
    );
    text(&mut svg, LEFT, below - 10.0, "start", &title);
    frame(&mut svg, below, SETS);
    let largest = summary
        .windows
        .iter()
        .map(|w| w.read_set.max(w.written_set))
        .max();
    let largest = largest.unwrap_or(0).max(1);
    line(
        &mut svg,
        below,
        READ,
        largest,
        summary.windows.iter().map(|w| w.read_set),
    );
    line(
        &mut svg,
        below,
        WRITTEN,
        largest,
        summary.windows.iter().map(|w| w.written_set),
    );
    text(&mut svg, LEFT - 8.0, below + 10.0, "end", &bytes(largest));
    text(&mut svg, LEFT - 8.0, below + SETS, "end", "0");
    let end = summary.windows.len() as u64 * summary.window_us / 1_000_000;
    text(&mut svg, LEFT, below + SETS + 18.0, "start", "0 s");
    text(
        &mut svg,
        LEFT + WIDTH,
        below + SETS + 18.0,
        "end",
        &format!("{end} s"),
    );
    svg.push_str("</svg>\n");
    svg
}

fn put(svg: &mut String, element: std::fmt::Arguments<'_>) {
    svg.write_fmt(element).expect("a String takes everything");
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    put(
        svg,
        format_args!("<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{words}</text>\n"),
    );
}

fn frame(svg: &mut String, y: f64, height: f64) {
    put(
        svg,
        format_args!(
            "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{height}\" fill=\"none\" stroke=\"#888\"/>\n"
        ),
    );
}

fn cells(svg: &mut String, summary: &Summary) {
    let most = summary
        .map
        .cells
        .values()
        .map(|[r, w]| r + w)
        .max()
        .unwrap_or(0)
        .max(1);
    let width = WIDTH / summary.windows.len().max(1) as f64;
    let height = MAP / Map::ROWS as f64;
    for (&(window, stripe), &[reads, writes]) in &summary.map.cells {
        let strength = f64::from(reads + writes + 1).ln() / f64::from(most + 1).ln();
        put(
            svg,
            format_args!(
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.2}\" height=\"{height:.2}\" fill=\"{}\" fill-opacity=\"{:.2}\"/>\n",
                LEFT + f64::from(window) * width,
                TOP + f64::from(stripe) * height,
                width.max(0.5),
                if reads >= writes { READ } else { WRITTEN },
                0.15 + 0.85 * strength,
            ),
        );
    }
}

/// One step a window.
fn line(
    svg: &mut String,
    top: f64,
    colour: &str,
    largest: u64,
    sets: impl ExactSizeIterator<Item = u64>,
) {
    let width = WIDTH / sets.len().max(1) as f64;
    put(
        svg,
        format_args!("<polyline fill=\"none\" stroke=\"{colour}\" points=\""),
    );
    for (n, set) in sets.enumerate() {
        let x = LEFT + n as f64 * width;
        let y = top + SETS * (1.0 - set as f64 / largest as f64);
        put(svg, format_args!("{x:.1},{y:.1} {:.1},{y:.1} ", x + width));
    }
    svg.push_str("\"/>\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_volume::heat::AccessKind;
    use whimbrel_volume::trace::Request;
    use whimbrel_volume::trace::summary::Summing;

    #[test]
    fn a_cell_for_what_was_used_and_a_line_for_each_set() {
        let mut summing = Summing::new(1_000_000, 3_000_000, 1 << 30);
        for (at_us, kind) in [(0, AccessKind::Read), (2_000_000, AccessKind::Write)] {
            summing.take(&Request {
                at_us,
                kind,
                offset: 0,
                len: 4096,
            });
        }
        let svg = draw(&summing.finish());
        assert_eq!(svg.matches("fill-opacity").count(), 2);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn an_empty_summary_can_be_drawn() {
        assert!(!draw(&Summary::default()).contains("NaN"));
    }
}
