//! `bench soak`: many moves of guests at work, each group on another link with another load.
//!
//! Most groups are one move. In every third the same running machine goes to the other host, back, and
//! there again, without a restart. Everything is drawn from one seed, so that a group can be had again.

use crate::demo::{mib, shown};
use crate::link::LinkArgs;
use crate::screen::Screen;
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::answers::MigrationReport;
use whimbrel_lab::pair::journey::{Journey, Moment, Route, travel};
use whimbrel_lab::pair::{Guest, GuestSpec, Pair, PairError, PairSpec};
use whimbrel_workload::chance::Rng;
use whimbrel_workload::params::{Pace, RamAccess, RamMode};

const NAME: &str = "soak";

/// Moves of a group in which the machine goes there, back and there.
const SHUTTLE: u32 = 3;

#[derive(Debug, Args)]
pub struct SoakArgs {
    /// How many moves
    #[arg(long, value_name = "N", default_value_t = 20)]
    runs: u32,
    /// What links and loads are drawn from
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Write all rows into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A link and a load.
#[derive(Clone, Debug)]
struct Group {
    number: u64,
    link: LinkArgs,
    guest: GuestSpec,
    load: String,
}

impl Group {
    fn draw(seed: u64, number: u64) -> Group {
        let mut rng = Rng::new(seed, number);
        let link = LinkArgs {
            link: *pick(&mut rng, &[50, 100, 200, 400]) * 1_000_000,
            rtt: Duration::from_millis(*pick(&mut rng, &[2, 10, 20, 40, 80])),
            loss: *pick(&mut rng, &[0.0, 0.0, 0.0, 0.001, 0.01]),
            seed: rng.below(1 << 32),
        };
        let link = LinkArgs {
            // A loss-based TCP over a long lossy link would make a move of hours, and test TCP.
            rtt: match link.loss {
                0.0 => link.rtt,
                _ => link.rtt.min(Duration::from_millis(10)),
            },
            ..link
        };
        let mut guest = GuestSpec::medium(NAME);
        guest.disk.seed = 1 + number % 2;
        let params = &mut guest.params;
        params.seed = rng.below(1 << 32);
        let pages = *pick(&mut rng, &[0, 500, 2000, 5000]);
        params.ram.pace = match pages {
            0 => Pace::Off,
            pages => Pace::PerSecond(pages),
        };
        params.ram.mode = *pick(&mut rng, &[RamMode::Page, RamMode::Word]);
        params.ram.access = *pick(&mut rng, &[RamAccess::Uniform, RamAccess::Zipf]);
        let (log, random, read) = *pick(
            &mut rng,
            &[(20, 50, 2048), (100, 20, 512), (5, 200, 4096), (20, 50, 0)],
        );
        params.log.pace = Pace::PerSecond(log);
        params.random.pace = Pace::PerSecond(random);
        params.read.pace = match read {
            0 => Pace::Off,
            read => Pace::PerSecond(read),
        };
        let load = format!(
            "{pages}{}{}/{log}/{random}/{read}",
            match params.ram.mode {
                RamMode::Page => "p",
                RamMode::Word => "w",
            },
            match params.ram.access {
                RamAccess::Uniform => "u",
                RamAccess::Zipf => "z",
            },
        );
        Group {
            number,
            link,
            guest,
            load,
        }
    }

    fn moves(&self) -> u32 {
        if self.number % 3 == 2 { SHUTTLE } else { 1 }
    }
}

fn pick<'t, T>(rng: &mut Rng, from: &'t [T]) -> &'t T {
    &from[rng.below(from.len() as u64) as usize]
}

/// One move.
#[derive(Clone, Debug, Default, Serialize)]
struct Row {
    run: u32,
    group: u64,
    from: String,
    link_mbit: f64,
    rtt_ms: f64,
    loss: f64,
    load: String,
    total_s: f64,
    blackout_ms: Option<f64>,
    echo_gap_ms: Option<f64>,
    brownout_s: Option<f64>,
    bytes_sent: u64,
    sent_over_unique: f64,
    demands: u64,
    demand_p99_ms: f64,
    problems: Vec<String>,
}

const HEAD: &str = " run group way  link          load             total  blackout  echo gap     sent  s/u   demands    p99  result";

impl Row {
    fn text(&self) -> String {
        format!(
            "{:4} {:5} {:4} {:13} {:16} {:5.1} s {:>9} {:>9} {:>9} {:.3} {:8} {:4.0} ms  {}",
            self.run,
            self.group,
            self.from,
            format!(
                "{:.0}M {:.0}ms {:.1}%",
                self.link_mbit,
                self.rtt_ms,
                self.loss * 100.0
            ),
            self.load,
            self.total_s,
            shown(self.blackout_ms, "ms", 0),
            shown(self.echo_gap_ms, "ms", 0),
            mib(self.bytes_sent),
            self.sent_over_unique,
            self.demands,
            self.demand_p99_ms,
            match self.problems.first() {
                None => "ok",
                Some(problem) => problem,
            }
        )
    }

    fn measured(&mut self, journey: &Journey) {
        self.total_s = journey.took.as_secs_f64();
        self.echo_gap_ms = journey.gap.map(|gap| gap.length.as_secs_f64() * 1e3);
        self.brownout_s = journey.brownout.map(|b| b.as_secs_f64());
        self.problems = journey.problems();
        if let Some(report) = journey.report() {
            self.blackout_ms = MigrationReport::stop_to_resume_ms(report);
            self.bytes_sent = report.sent.total();
            self.sent_over_unique =
                report.sent.total() as f64 / (report.units_live.max(1) * 4096) as f64;
            self.demands = report.demands.count;
            self.demand_p99_ms = report.demands.p99_ms;
        }
    }
}

pub fn run(args: &SoakArgs) -> ExitCode {
    let mut screen = Screen::new();
    screen.put(&format!(
        "{} moves of running machines over links and loads drawn from seed {}; half a minute each, more on slow links.\n\
         load: pages/s (p whole, w word; u uniform, z Zipf) / fsyncs/s / random writes/s / KiB/s of files",
        args.runs, args.seed
    ));
    screen.put(HEAD);
    let mut rows: Vec<Row> = Vec::new();
    let mut number = 0;
    while (rows.len() as u32) < args.runs {
        let group = Group::draw(args.seed, number);
        let left = args.runs - rows.len() as u32;
        let first = rows.len();
        if let Err(error) = play(&group, left, &mut rows, &mut screen) {
            let row = group_row(&group, rows.len() as u32 + 1, Host::A);
            let problems = vec![error.to_string()];
            rows.push(Row { problems, ..row });
        }
        for row in &rows[first..] {
            screen.put(&row.text());
            for problem in row.problems.iter().skip(1) {
                screen.put(&format!("      {problem}"));
            }
        }
        number += 1;
    }
    let wrong = rows.iter().filter(|row| !row.problems.is_empty()).count();
    screen.put(&summary(&rows, wrong));
    super::ended(&mut screen, &args.json, &rows, wrong == 0)
}

fn summary(rows: &[Row], wrong: usize) -> String {
    let largest = |values: Vec<f64>| {
        values.into_iter().fold(None, |most: Option<f64>, v| {
            Some(most.map_or(v, |m| m.max(v)))
        })
    };
    format!(
        "{} moves, {wrong} with errors. Longest blackout {}, longest beyond the round trip {}, most sent/unique {:.3}, {} moved",
        rows.len(),
        shown(
            largest(rows.iter().filter_map(|r| r.blackout_ms).collect()),
            "ms",
            0
        ),
        shown(
            largest(
                rows.iter()
                    .filter_map(|r| Some(r.blackout_ms? - r.rtt_ms))
                    .collect()
            ),
            "ms",
            0
        ),
        rows.iter().map(|r| r.sent_over_unique).fold(0.0, f64::max),
        mib(rows.iter().map(|r| r.bytes_sent).sum()),
    )
}

fn group_row(group: &Group, run: u32, from: Host) -> Row {
    Row {
        run,
        group: group.number,
        from: match from {
            Host::A => "a>b".to_owned(),
            Host::B => "b>a".to_owned(),
        },
        link_mbit: group.link.link as f64 / 1e6,
        rtt_ms: group.link.rtt.as_secs_f64() * 1e3,
        loss: group.link.loss,
        load: group.load.clone(),
        ..Row::default()
    }
}

/// Makes the group's moves, at most `left`, and pushes a row for each.
fn play(
    group: &Group,
    left: u32,
    rows: &mut Vec<Row>,
    screen: &mut Screen,
) -> Result<(), PairError> {
    let what = format!("group {}: {}", group.number, group.link.describe());
    screen.while_doing(&format!("{what}: the guest is built"), || {
        group.guest.build()
    })?;
    let mut pair = Pair::start(&PairSpec::new(group.link.lab()))?;
    let mut guest = Guest::new(pair.lab(), group.guest.clone())?;
    screen.while_doing(&format!("{what}: import and boot"), || {
        pair.define(Host::A, &guest)?;
        pair.boot(Host::A, &mut guest)
    })?;
    let first = rows.len();
    let mut at = Host::A;
    for _ in 0..group.moves().min(left) {
        let route = Route {
            rates_for: Duration::from_secs(3),
            ..Route::from(at)
        };
        let mut row = group_row(group, rows.len() as u32 + 1, at);
        let journey = travel(&pair, &mut guest, &route, |moment| {
            screen.live(&format!("{what}: {}", progress(moment)));
        })?;
        row.measured(&journey);
        let arrived = journey.ended.completed();
        rows.push(row);
        if !arrived {
            break;
        }
        at = at.other();
    }
    let good = rows[first..].iter().all(|row| row.problems.is_empty());
    if good {
        let verdict = screen.while_doing(&format!("{what}: check"), || pair.finish(at, &mut guest));
        let problems = match verdict {
            Ok(verdict) => verdict.problems,
            Err(error) => vec![error.to_string()],
        };
        if let Some(last) = rows.last_mut() {
            last.problems.extend(problems);
        }
    }
    if rows[first..].iter().any(|row| !row.problems.is_empty()) {
        pair.keep_files();
        screen.put(&format!(
            "kept for a look: {}",
            pair.folder().path().display()
        ));
    }
    Ok(())
}

fn progress(moment: Moment<'_>) -> String {
    match moment {
        Moment::Before { guest, .. } => format!("before; guest: {}", guest.short()),
        Moment::After { guest, .. } => format!("after; guest: {}", guest.short()),
        Moment::Moving { view, guest, .. } => format!(
            "{} {:.1} %, {:.1} Mbit/s; guest: {}",
            view.phase,
            f64::from(view.permille) / 10.0,
            view.rate as f64 / 1e6,
            guest.short()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_group() {
        for number in 0..20 {
            let (a, b) = (Group::draw(7, number), Group::draw(7, number));
            assert_eq!(a.guest.params, b.guest.params);
            assert_eq!((a.link.link, a.link.rtt), (b.link.link, b.link.rtt));
            assert!(a.link.loss == 0.0 || a.link.rtt <= Duration::from_millis(10));
        }
        let loads: std::collections::BTreeSet<String> =
            (0..20).map(|number| Group::draw(7, number).load).collect();
        assert!(loads.len() > 5, "{loads:?}");
    }

    #[test]
    fn some_machines_go_to_and_fro() {
        let moves: u32 = (0..6).map(|number| Group::draw(1, number).moves()).sum();
        assert_eq!(moves, 4 + 2 * SHUTTLE);
    }
}
