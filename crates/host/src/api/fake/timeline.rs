//! What a move of half a minute looks like over time: RAM ahead, the switch after eight seconds, then the rest, with
//! an outage of three seconds.

use whimbrel_engine::latency::Latencies;
use whimbrel_engine::space::SpaceKind;
use whimbrel_engine::switchover::Phase;

use crate::api::types::{
    Counts, DemandStats, Event, Happened, ReportView, Stretch, TimelineSpace, TimelineView,
};
use crate::report;
use crate::state::Timestamp;

const RAM: u64 = 60_000;
const DISK: u64 = 160_000;

/// With what is zero, and with holes.
const ALL_RAM: u64 = 131_072;
const ALL_DISK: u64 = 262_144;

fn stretch(n: u64) -> Stretch {
    let (from_ms, to_ms) = (n * 250, n * 250 + 250);
    let is_down = (15_000..18_000).contains(&from_ms);
    let ahead = (1_250..8_000).contains(&from_ms);
    let drains = from_ms >= 8_000 && !is_down;
    let wave = 200_000 * (n % 7);
    let mut guest = Latencies::default();
    let mut waits = Latencies::default();
    if from_ms >= 8_000 {
        (0..40).for_each(|i| guest.record(200 + 37 * i + 20 * n));
        if drains && n.is_multiple_of(3) {
            guest.record(40_000 + 1_000 * n);
            (0..5).for_each(|i| waits.record(31_000 + 500 * i));
        }
    }
    let part = |whole: u64, from: u64, to: u64| {
        whole * to_ms.clamp(from, to).saturating_sub(from) / (to - from)
    };
    Stretch {
        from_ms,
        to_ms,
        ram_bytes: if ahead { 2_400_000 + wave } else { 0 },
        disk_bytes: if drains { 2_000_000 + wave } else { 0 },
        demand_bytes: if drains { 3_000_000 / (n - 28) } else { 0 },
        plain_units: 100,
        zstd_units: 300,
        demands: waits.len(),
        demand_waits: Counts::from(&waits),
        guest: Counts::from(&guest),
        down_ms: if is_down { 250 } else { 0 },
        guard_ms: if drains && n > 90 { 250 } else { 0 },
        held_to: (drains && n > 90).then_some(60_000_000),
        rtt_us: 30_500,
        resident: vec![part(ALL_DISK, 8_000, 29_500), part(ALL_RAM, 1_250, 14_000)],
        live: vec![DISK, RAM],
        ..Stretch::default()
    }
}

/// See the module. As the source saw it.
pub fn sample_timeline() -> TimelineView {
    let phase = |at_ms, phase| Event {
        at_ms,
        what: Happened::Phase(phase),
    };
    let event = |at_ms, what| Event { at_ms, what };
    TimelineView {
        started: Timestamp::from_unix(1_750_000_000),
        resolution_ms: 250,
        spaces: vec![
            TimelineSpace {
                name: "root".to_string(),
                kind: SpaceKind::Disk,
                units_total: ALL_DISK,
            },
            TimelineSpace {
                name: "RAM".to_string(),
                kind: SpaceKind::Ram,
                units_total: ALL_RAM,
            },
        ],
        events: vec![
            phase(0, Phase::Prepare),
            phase(1_200, Phase::Copy),
            phase(8_000, Phase::Quiesce),
            event(8_005, Happened::Stopped),
            phase(8_020, Phase::Grant),
            event(8_030, Happened::Granted),
            event(8_077, Happened::Ran),
            phase(8_080, Phase::Drain),
            event(15_000, Happened::Told("link lost: it was cut".to_string())),
            event(15_000, Happened::LinkDown),
            event(18_000, Happened::LinkUp),
            event(
                18_000,
                Happened::Told("link is back after 3.0 s".to_string()),
            ),
            phase(30_000, Phase::Complete),
        ],
        stretches: (0..120).map(stretch).collect(),
        damaged_lines: 0,
    }
}

/// Of [`sample_migration`](super::sample_migration), completed.
pub fn sample_report() -> ReportView {
    let timeline = sample_timeline();
    let mut view = super::sample_migration();
    view.phase = Phase::Complete;
    view.state = crate::api::types::MigrationState::Completed;
    view.permille = 1000;
    view.started = timeline.started;
    view.ended = Some(Timestamp::from_unix(1_750_000_030));
    for space in &mut view.spaces {
        space.units_live = match space.kind {
            SpaceKind::Disk => DISK,
            SpaceKind::Ram => RAM,
        };
        space.units_resident = space.units_total;
        space.units_sent = space.units_live + 10;
        space.bytes_sent = 2_000 * space.units_live;
    }
    let demands = timeline.stretches.iter().map(|s| s.demands).sum();
    view.demands = DemandStats {
        count: demands,
        p50_ms: 32.0,
        p99_ms: 33.1,
        max_ms: 33.1,
    };
    let summary = report::summary(&view, &timeline);
    ReportView {
        host: "a".to_string(),
        elsewhere: report::elsewhere(&view, &summary, &timeline),
        migration: view,
        summary,
        timeline,
    }
}
