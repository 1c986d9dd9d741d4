//! The plots of a migration: what its timeline looks like.

use whimbrel_engine::space::UNIT;
use whimbrel_engine::switchover::Phase;
use whimbrel_engine::timeline::Counts;

use super::plot::{Band, Chart, Level, Panel, Series, Shape, Step, Strip, Unit, document};
use crate::api::types::{Direction, ReportView, Stretch};

/// Seconds before and after the switch that are looked at closely, and how long a migration must be for that.
const BEFORE: f64 = 3.0;
const AFTER: f64 = 7.0;
const LONG: f64 = 25.0;

/// A timeline of longer stretches has nothing to see closely.
const CLOSE_MS: u64 = 1000;

/// What of a stretch is drawn.
type Count = fn(&Stretch) -> u64;

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1e3
}

fn steps(stretches: &[Stretch], of: impl Fn(usize, &Stretch) -> Option<(f64, f64)>) -> Vec<Step> {
    let step = |(n, s): (usize, &Stretch)| {
        let (low, high) = of(n, s)?;
        Some(Step {
            from: seconds(s.from_ms),
            to: seconds(s.to_ms),
            low,
            high,
        })
    };
    stretches.iter().enumerate().filter_map(step).collect()
}

/// Areas on top of each other.
fn stacked<'a>(
    stretches: &[Stretch],
    parts: impl IntoIterator<Item = (String, usize, Box<dyn Fn(&Stretch) -> f64 + 'a>)>,
) -> Vec<Series> {
    let mut ground = vec![0.0; stretches.len()];
    let mut series = Vec::new();
    for (name, colour, of) in parts {
        let lows = ground.clone();
        for (sum, stretch) in ground.iter_mut().zip(stretches) {
            *sum += of(stretch);
        }
        series.push(Series {
            name,
            colour,
            shape: Shape::Area,
            steps: steps(stretches, |n, _| Some((lows[n], ground[n]))),
        });
    }
    series
}

fn rate(bytes: u64, s: &Stretch) -> f64 {
    bytes as f64 * 8e3 / s.len_ms().max(1) as f64
}

fn throughput(report: &ReportView) -> Vec<Series> {
    let parts: [(&str, usize, Count); 3] = [
        ("demanded", 2, |s| s.demand_bytes),
        ("RAM pushed", 0, |s| s.ram_bytes),
        ("disks pushed", 1, |s| s.disk_bytes),
    ];
    let parts = parts.into_iter().map(|(name, colour, bytes)| {
        let of: Box<dyn Fn(&Stretch) -> f64> = Box::new(move |s| rate(bytes(s), s));
        (name.to_string(), colour, of)
    });
    stacked(&report.timeline.stretches, parts)
}

fn quantile(counts: &Counts, part: f64) -> Option<(f64, f64)> {
    let us = counts.latencies().quantile(part)?;
    Some((0.0, us as f64 / 1e3))
}

fn latencies(stretches: &[Stretch], of: impl Fn(&Stretch) -> &Counts) -> Vec<Series> {
    [("p50", 3, 0.5), ("p99", 1, 0.99)]
        .into_iter()
        .map(|(name, colour, part)| Series {
            name: name.to_string(),
            colour,
            shape: Shape::Line,
            steps: steps(stretches, |_, s| quantile(of(s), part)),
        })
        .collect()
}

fn residency(report: &ReportView) -> Vec<Series> {
    let timeline = &report.timeline;
    let colours = [1, 5, 6, 4, 3, 7, 2];
    let mut disks = 0;
    let parts = timeline.spaces.iter().enumerate().map(|(n, space)| {
        let colour = match space.kind {
            whimbrel_engine::space::SpaceKind::Ram => 0,
            whimbrel_engine::space::SpaceKind::Disk => {
                disks += 1;
                colours[(disks - 1) % colours.len()]
            }
        };
        let of: Box<dyn Fn(&Stretch) -> f64> =
            Box::new(move |s| s.resident.get(n).copied().unwrap_or(0) as f64 * UNIT as f64);
        (space.name.clone(), colour, of)
    });
    let mut series = stacked(&timeline.stretches, parts);
    // What is there includes holes and zeroes, since the destination counts them when it is told of them: it is to
    // be compared with all there is, not with what has to cross.
    let all: u64 = timeline.spaces.iter().map(|s| s.units_total).sum();
    series.push(Series {
        name: "in all".to_string(),
        colour: 7,
        shape: Shape::Line,
        steps: steps(&timeline.stretches, |_, s| {
            (!s.resident.is_empty()).then_some((0.0, (all * UNIT) as f64))
        }),
    });
    series
}

fn bands(report: &ReportView) -> Vec<Band> {
    let summary = &report.summary;
    let mut bands: Vec<Band> = summary
        .outages
        .iter()
        .map(|outage| Band {
            from: seconds(outage.from_ms),
            to: seconds(outage.from_ms + outage.ms),
            name: format!("no link for {:.1} s", seconds(outage.ms)),
            is_stop: false,
        })
        .collect();
    bands.extend(summary.stood_still.map(|span| Band {
        from: seconds(span.from_ms),
        to: seconds(span.from_ms + span.ms),
        name: match summary.blackout_ms {
            Some(ms) => format!("blackout: {ms:.0} ms"),
            None => format!("from the grant until the guest ran: {} ms", span.ms),
        },
        is_stop: true,
    }));
    bands
}

fn colour_of(phase: Phase) -> usize {
    match phase {
        Phase::Prepare => 7,
        Phase::Copy => 0,
        Phase::Quiesce | Phase::Grant | Phase::Accept | Phase::Run => 2,
        Phase::Drain => 3,
        Phase::Complete => 5,
        Phase::Cancel | Phase::Rewind => 6,
    }
}

fn held(report: &ReportView) -> Option<Strip> {
    let reasons: [(&str, usize, Count); 3] = [
        ("for the guest's I/O", 4, |s| s.guard_ms),
        ("by its own limit", 6, |s| s.limit_ms),
        ("by the host's limit", 5, |s| s.host_ms),
    ];
    let mut spans: Vec<(Step, usize, String)> = Vec::new();
    for stretch in &report.timeline.stretches {
        let most = reasons.iter().max_by_key(|(.., of)| of(stretch));
        let Some((name, colour, _)) = most.filter(|(.., of)| of(stretch) * 2 > stretch.len_ms())
        else {
            continue;
        };
        let (from, to) = (seconds(stretch.from_ms), seconds(stretch.to_ms));
        match spans.last_mut() {
            Some((span, _, said)) if said == name && span.to == from => span.to = to,
            _ => spans.push((
                Step {
                    from,
                    to,
                    low: 0.0,
                    high: 1.0,
                },
                *colour,
                name.to_string(),
            )),
        }
    }
    (!spans.is_empty()).then(|| Strip {
        title: "What held push back".to_string(),
        from: 0.0,
        to: end(report),
        spans,
        bands: Vec::new(),
    })
}

fn end(report: &ReportView) -> f64 {
    seconds(report.summary.total_ms).max(0.1)
}

/// The plots there is something to see in.
pub(super) fn panels(report: &ReportView) -> Vec<Panel> {
    let (end, bands) = (end(report), bands(report));
    let stretches = &report.timeline.stretches;
    let moved = match report.migration.direction {
        Direction::Outgoing => "Sent",
        Direction::Incoming => "Received",
    };
    let chart = |title: &str, unit, series| Chart {
        title: title.to_string(),
        from: 0.0,
        to: end,
        unit,
        series,
        bands: bands.clone(),
        levels: Vec::new(),
    };
    let phases = report.summary.phases.iter().map(|phase| {
        let step = Step {
            from: seconds(phase.from_ms),
            to: seconds(phase.from_ms + phase.ms),
            low: 0.0,
            high: 1.0,
        };
        let said = match phase.ms {
            0 => phase.phase.to_string(),
            ms => format!("{} {:.1} s", phase.phase, seconds(ms)),
        };
        (step, colour_of(phase.phase), said)
    });
    let mut panels = vec![Panel::Strip(Strip {
        title: "Phases".to_string(),
        from: 0.0,
        to: end,
        spans: phases.collect(),
        bands: bands.clone(),
    })];
    if stretches.is_empty() {
        return panels;
    }
    let rates = chart(
        &format!("{moved}, by class"),
        Unit::BitsPerSecond,
        throughput(report),
    );
    panels.push(Panel::Chart(rates.clone()));
    if let Some(still) = report.summary.stood_still
        && end > LONG
        && report.timeline.resolution_ms <= CLOSE_MS
    {
        let at = seconds(still.from_ms);
        panels.push(Panel::Chart(Chart {
            title: format!("{moved}, around the switch"),
            from: (at - BEFORE).max(0.0),
            to: (at + seconds(still.ms) + AFTER).min(end),
            ..rates
        }));
    }
    if let Some(strip) = held(report) {
        panels.push(Panel::Strip(strip));
    }
    if stretches.iter().any(|s| !s.guest.is_empty()) {
        let mut guest = chart(
            "How long the guest's requests to its disks took",
            Unit::Millis,
            latencies(stretches, |s| &s.guest),
        );
        let told = report.migration.report.as_ref();
        guest.levels = told
            .and_then(|told| told.guest_io.bound.0)
            .map(|bound| Level {
                at: bound.as_secs_f64() * 1e3,
                name: "to stay within".to_string(),
            })
            .into_iter()
            .collect();
        panels.push(Panel::Chart(guest));
    }
    if stretches.iter().any(|s| !s.demand_waits.is_empty()) {
        let waits = latencies(stretches, |s| &s.demand_waits);
        panels.push(Panel::Chart(chart(
            "How long demands took",
            Unit::Millis,
            waits,
        )));
    }
    if !report.timeline.spaces.is_empty() {
        panels.push(Panel::Chart(chart(
            "At the destination, holes and zeroes included",
            Unit::Bytes,
            residency(report),
        )));
    }
    panels
}

/// All plots in a file of their own.
pub fn svg(report: &ReportView) -> String {
    let view = &report.migration;
    let name = format!("{} {}", view.machine, super::page::way(report));
    document(&name, &panels(report))
}
