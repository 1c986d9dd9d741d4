//! The last table: medians of all rounds, and how they compare with QEMU's post-copy. Pure.

use super::case::{Cell, Mover, REFERENCE};
use super::row::Row;
use crate::demo::shown;

/// Medians of what finished.
struct Line {
    moves: usize,
    finished: usize,
    total_s: Option<f64>,
    blackout_ms: Option<f64>,
    gap_ms: Option<f64>,
    brownout_s: Option<f64>,
    wan_mib: Option<f64>,
    cpu_s: Option<f64>,
}

impl Line {
    fn of(rows: &[&Row]) -> Line {
        let done: Vec<_> = rows.iter().filter(|row| row.finished).collect();
        let over = |of: &dyn Fn(&Row) -> Option<f64>| {
            let mut all: Vec<f64> = done.iter().filter_map(|row| of(row)).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied()
        };
        Line {
            moves: rows.len(),
            finished: done.len(),
            total_s: over(&|row| row.total_s),
            blackout_ms: over(&|row| row.blackout_ms),
            // What a user of the stream sees counts where there is one.
            gap_ms: over(&|row| row.stream_gap_ms.or(row.echo_gap_ms)),
            brownout_s: over(&|row| row.brownout_s),
            wan_mib: over(&|row| {
                Some((row.wan_bytes + row.wan_bytes_back) as f64 / f64::from(1 << 20))
            }),
            cpu_s: over(&|row| Some(row.cpu_s())),
        }
    }

    fn text(&self, mover: Mover, reference: Option<&Line>) -> String {
        let with = |of: fn(&Line) -> Option<f64>, unit: &str, digits| {
            let mine = of(self);
            let ratio = reference.and_then(of).zip(mine);
            let ratio = ratio.filter(|(theirs, _)| *theirs > 0.0);
            let ratio = ratio.map_or("-".to_owned(), |(theirs, mine)| {
                format!("{:.2}x", mine / theirs)
            });
            format!("{:>9} {ratio:>7}", shown(mine, unit, digits))
        };
        format!(
            "{mover:<24} {:>2}/{:<2} {} {} {} {} {} {}",
            self.finished,
            self.moves,
            with(|line| line.total_s, "s", 1),
            with(|line| line.blackout_ms, "ms", 0),
            with(|line| line.gap_ms, "ms", 0),
            with(|line| line.brownout_s, "s", 1),
            with(|line| line.wan_mib, "MiB", 0),
            with(|line| line.cpu_s, "s", 1),
        )
    }
}

const HEAD: &str = "mover                     done     total   ratio  blackout   ratio  client's gap ratio  brownout   ratio       WAN   ratio       CPU   ratio";

/// A table for each guest on each link.
pub fn text(rows: &[Row]) -> String {
    let mut lines = vec![format!(
        "Medians of what finished; ratios to {REFERENCE}. WAN: both ways. CPU: daemons and QEMUs, the guest's own included"
    )];
    let mut cells: Vec<Cell> = Vec::new();
    for row in rows {
        if !cells.contains(&row.cell) {
            cells.push(row.cell);
        }
    }
    for cell in cells {
        lines.push(format!("{cell}\n{HEAD}"));
        let mut movers: Vec<Mover> = Vec::new();
        for row in rows.iter().filter(|row| row.cell == cell) {
            if !movers.contains(&row.mover) {
                movers.push(row.mover);
            }
        }
        let line = |mover: Mover| {
            let of = |row: &&Row| row.cell == cell && row.mover == mover;
            Line::of(&rows.iter().filter(of).collect::<Vec<_>>())
        };
        let reference = movers.contains(&REFERENCE).then(|| line(REFERENCE));
        for mover in movers {
            lines.push(line(mover).text(mover, reference.as_ref()));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::case::{GuestKind, Link};
    use super::*;

    #[test]
    fn medians_are_of_what_finished_and_ratios_to_the_reference() {
        let cell = Cell {
            guest: GuestKind::Idle,
            link: Link::Usual,
        };
        let row = |mover, total_s: Option<f64>| Row {
            finished: total_s.is_some(),
            total_s,
            ..Row::new(cell, mover, 1)
        };
        let rows = [
            row(Mover::WhimbrelHybrid, Some(5.0)),
            row(Mover::WhimbrelHybrid, None),
            row(REFERENCE, Some(20.0)),
        ];
        let text = text(&rows);
        let hybrid = text
            .lines()
            .find(|line| line.starts_with("whimbrel-hybrid"));
        let hybrid = hybrid.expect("its line");
        assert!(
            hybrid.contains(" 1/2 ") && hybrid.contains("0.25x"),
            "{hybrid}"
        );
    }
}
