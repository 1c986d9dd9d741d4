//! What the runs add up to.

use serde::Serialize;

use super::load::{Figures, Load};
use super::server::{Cost, Kind};

/// One run of one server.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    pub server: Kind,
    pub variant: String,
    pub round: u32,
    pub figures: Figures,
    pub cost: Cost,
}

/// A server over all rounds of a row.
#[derive(Clone, Debug, Serialize)]
pub struct Standing {
    pub server: Kind,
    pub variant: String,
    /// Medians.
    pub iops: f64,
    pub mib_per_second: f64,
    pub p99_ms: f64,
    pub cpu_seconds_per_gib: f64,
    /// The greatest.
    pub peak_memory_mib: f64,
}

/// A row of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub load: Load,
    pub standings: Vec<Standing>,
    /// Whimbrel's requests a second to those of the better of its [rivals], each round for itself.
    pub ratios: Vec<f64>,
    pub median_ratio: Option<f64>,
    /// The same to qemu-nbd alone.
    pub median_ratio_to_qemu_nbd: Option<f64>,
    /// Short runs by which each other server's settings were chosen.
    pub choosing: Vec<Run>,
    pub runs: Vec<Run>,
}

impl Row {
    pub fn of(load: Load, choosing: Vec<Run>, runs: Vec<Run>) -> Row {
        let mut kinds: Vec<Kind> = runs.iter().map(|run| run.server).collect();
        kinds.sort();
        kinds.dedup();
        let standings = kinds.iter().map(|&kind| standing(kind, &runs)).collect();
        let rounds = runs.iter().map(|run| run.round).max().map_or(0, |r| r + 1);
        let ratios_to = |rivals: &[Kind]| -> Vec<f64> {
            (0..rounds)
                .filter_map(|round| ratio(&runs, rivals, round))
                .collect()
        };
        let ratios = ratios_to(rivals(&load));
        Row {
            name: load.name(),
            load,
            standings,
            median_ratio: median(ratios.iter().copied()),
            median_ratio_to_qemu_nbd: median(ratios_to(&[Kind::QemuNbd]).into_iter()),
            ratios,
            choosing,
            runs,
        }
    }

    pub fn text(&self) -> String {
        let cell = |kind: Kind| {
            let found = self.standings.iter().find(|s| s.server == kind);
            found.map_or("-".to_owned(), |s| {
                format!(
                    "{:.0} {:.2}s {:.0}M",
                    s.iops, s.cpu_seconds_per_gib, s.peak_memory_mib
                )
            })
        };
        let shown = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |r| format!("{r:.2}"));
        let ratio = shown(self.median_ratio);
        let to_qemu = shown(self.median_ratio_to_qemu_nbd);
        let [ours, qemu, nbdkit] = Kind::ALL.map(cell);
        format!(
            "{:38} {ours:>20} {qemu:>20} {nbdkit:>20} {ratio:>6} {to_qemu:>6}",
            self.name
        )
    }
}

pub const HEAD: &str = "row                                                whimbrel             qemu-nbd               nbdkit  ratio   qemu\n\
     requests/s, CPU s per GiB, peak MiB; ratio to the better (direct: to qemu-nbd, as nbdkit has no O_DIRECT), to qemu-nbd alone";

/// Those that do what the row asks for: nbdkit has no `O_DIRECT`, and in rows past the page cache its
/// figures, which are the page cache's, are shown and not compared with.
fn rivals(load: &Load) -> &'static [Kind] {
    if load.direct {
        &[Kind::QemuNbd]
    } else {
        &[Kind::QemuNbd, Kind::Nbdkit]
    }
}

fn standing(kind: Kind, runs: &[Run]) -> Standing {
    let of_kind = || runs.iter().filter(|run| run.server == kind);
    let middle = |figure: fn(&Run) -> f64| median(of_kind().map(figure)).unwrap_or_default();
    let bytes: u64 = of_kind().map(|run| run.figures.bytes).sum();
    let cpu: f64 = of_kind().map(|run| run.cost.cpu_seconds).sum();
    Standing {
        server: kind,
        variant: of_kind()
            .next()
            .map_or(String::new(), |r| r.variant.clone()),
        iops: middle(|run| run.figures.iops),
        mib_per_second: middle(|run| run.figures.mib_per_second),
        p99_ms: middle(|run| run.figures.p99_ms),
        cpu_seconds_per_gib: cpu / (bytes.max(1) as f64 / f64::from(1 << 30)),
        peak_memory_mib: of_kind()
            .map(|run| run.cost.peak_memory_mib)
            .fold(0.0, f64::max),
    }
}

/// Whimbrel to the better of the rivals, in one round.
fn ratio(runs: &[Run], rivals: &[Kind], round: u32) -> Option<f64> {
    let of = |kind: Kind| {
        let mut found = runs.iter();
        let run = found.find(|run| run.round == round && run.server == kind)?;
        Some(run.figures.iops)
    };
    let best = rivals
        .iter()
        .filter_map(|&rival| of(rival))
        .reduce(f64::max)?;
    Some(of(Kind::Whimbrel)? / best.max(f64::MIN_POSITIVE))
}

pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(server: Kind, round: u32, iops: f64) -> Run {
        Run {
            server,
            variant: "v".into(),
            round,
            figures: Figures {
                iops,
                mib_per_second: 1.0,
                p99_ms: 1.0,
                bytes: 1 << 29,
            },
            cost: Cost {
                cpu_seconds: 0.5,
                peak_memory_mib: 3.0,
            },
        }
    }

    #[test]
    fn each_round_is_compared_with_its_own_best() {
        let mut runs = Vec::new();
        for (round, qemu, nbdkit) in [(0, 50.0, 100.0), (1, 200.0, 100.0), (2, 10.0, 400.0)] {
            runs.push(run(Kind::Whimbrel, round, 200.0));
            runs.push(run(Kind::QemuNbd, round, qemu));
            runs.push(run(Kind::Nbdkit, round, nbdkit));
        }
        let row = Row::of(Load::all()[0], Vec::new(), runs);
        assert_eq!(row.ratios, [2.0, 1.0, 0.5]);
        assert_eq!(row.median_ratio, Some(1.0));
        assert_eq!(row.median_ratio_to_qemu_nbd, Some(4.0));
        assert_eq!(row.standings[1].iops, 50.0);
        assert_eq!(row.standings[0].cpu_seconds_per_gib, 1.0);
    }

    #[test]
    fn past_the_page_cache_only_those_count_that_go_past_it() {
        let load = Load {
            direct: true,
            ..Load::all()[0]
        };
        let runs = vec![
            run(Kind::Whimbrel, 0, 100.0),
            run(Kind::QemuNbd, 0, 50.0),
            run(Kind::Nbdkit, 0, 400.0),
        ];
        let row = Row::of(load, Vec::new(), runs);
        assert_eq!(row.median_ratio, Some(2.0));
        assert_eq!(row.standings[2].iops, 400.0);
    }

    #[test]
    fn a_row_without_rivals_has_no_ratio() {
        let row = Row::of(
            Load::all()[0],
            Vec::new(),
            vec![run(Kind::Whimbrel, 0, 1.0)],
        );
        assert_eq!(row.median_ratio, None);
    }

    #[test]
    fn an_even_number_has_its_median_in_between() {
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
    }
}
