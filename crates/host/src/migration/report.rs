//! Figures of a migration, as the API tells them.

use std::time::Duration;

use whimbrel_engine::space::{SpaceKind, UNIT};
use whimbrel_wire::message::Fares;

use super::deltas::DeltaCount;
use super::easing::Easing;
use super::flow::Flow;
use crate::api::types::{
    CodecUnits, DeltaStats, DemandStats, GuestIo, MigrationReport, SentBytes, SpaceProgress,
    TimePart,
};
use crate::disk::DemandFigures;

/// Times that only the driver knows.
pub struct Times {
    pub total: Duration,
    pub blackout: Option<Duration>,
    pub drain: Option<Duration>,
    pub outage: Duration,
    /// QEMU's own clock of the STOP at the source.
    pub stopped_at: Option<Duration>,
    /// QEMU's own clock of the RESUME at the destination.
    pub resumed_at: Option<Duration>,
}

/// Every space's share, in order of ids. Before the grant a disk's live units are not known: none is told.
pub fn spaces(flow: &Flow, fares: &Fares, before_grant: bool) -> Vec<SpaceProgress> {
    let of = |info: whimbrel_engine::space::SpaceInfo| {
        let tally = flow.tally(info.id);
        let sent = flow.sent(info.id);
        let unknown = before_grant && info.kind == SpaceKind::Disk;
        let resident = fares.resident.get(usize::from(info.id.0)).copied();
        SpaceProgress {
            units_total: info.units(),
            units_live: if unknown { 0 } else { tally.live },
            units_resident: resident.unwrap_or(0),
            units_sent: sent.units,
            bytes_sent: sent.bytes(),
            name: info.name,
            kind: info.kind,
        }
    };
    flow.infos().into_iter().map(of).collect()
}

pub fn sent_bytes(flow: &Flow) -> SentBytes {
    let mut sum = SentBytes::default();
    for info in flow.infos() {
        let sent = flow.sent(info.id);
        sum.demand += sent.demand_bytes;
        sum.push += sent.push_bytes;
        sum.content += sent.units * UNIT;
    }
    sum
}

pub fn codecs(flow: &Flow) -> CodecUnits {
    let mut sum = CodecUnits::default();
    for info in flow.infos() {
        let sent = flow.sent(info.id);
        sum.plain += sent.plain;
        sum.zstd += sent.zstd;
        sum.zero += sent.zero;
    }
    sum
}

pub fn deltas(flow: &Flow) -> DeltaStats {
    let mut sum = DeltaCount::default();
    for info in flow.infos() {
        sum.add(flow.sent(info.id).delta);
    }
    DeltaStats {
        again: sum.again,
        hits: sum.found,
        units: sum.units,
        saved: sum.saved,
        cache: sum.kept * UNIT,
    }
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

pub fn demands(fares: &Fares) -> DemandStats {
    DemandStats {
        count: fares.demands,
        p50_ms: ms(fares.demand_p50_us),
        p99_ms: ms(fares.demand_p99_us),
        max_ms: ms(fares.demand_max_us),
    }
}

/// What the destination tells the source.
pub fn fares(figures: DemandFigures, resident: Vec<u64>, late: u64, verified: u64) -> Fares {
    Fares {
        resident,
        demands: figures.count,
        demand_p50_us: figures.p50_us,
        demand_p99_us: figures.p99_us,
        demand_max_us: figures.max_us,
        late_copies: late,
        verified_units: verified,
    }
}

pub fn guest_io(easing: &Easing) -> GuestIo {
    let figures = easing.figures();
    GuestIo {
        requests: figures.requests,
        p50_ms: ms(figures.p50_us),
        p99_ms: ms(figures.p99_us),
        max_ms: ms(figures.max_us),
        bound: easing.bound(),
        held_ms: ms(figures.held_us),
    }
}

pub fn outgoing(
    flow: &Flow,
    fares: &Fares,
    easing: &Easing,
    times: Times,
    reconnects: u64,
) -> MigrationReport {
    let millis = |d: Duration| d.as_secs_f64() * 1e3;
    let mut parts = Vec::new();
    if let (Some(stop), Some(run)) = (times.stopped_at, times.resumed_at) {
        // Two hosts' clocks: exact only where they agree, as on one machine.
        parts.push(TimePart {
            name: "stop-to-resume by the hosts' clocks".to_string(),
            ms: (run.as_secs_f64() - stop.as_secs_f64()) * 1e3,
        });
    }
    let tallies: Vec<_> = flow
        .infos()
        .iter()
        .map(|i| (flow.tally(i.id), flow.sent(i.id)))
        .collect();
    MigrationReport {
        total_ms: millis(times.total),
        blackout_ms: times.blackout.map(millis),
        blackout_parts: parts,
        drain_ms: times.drain.map(millis),
        units_live: tallies.iter().map(|(t, _)| t.live).sum(),
        units_sent: tallies.iter().map(|(_, s)| s.units).sum(),
        units_repeated: tallies.iter().map(|(t, _)| t.repeated).sum(),
        units_sent_again: tallies.iter().map(|(t, _)| t.sent_again).sum(),
        units_outdated: tallies.iter().map(|(t, _)| t.outdated).sum(),
        units_forgotten: tallies.iter().map(|(t, _)| t.forgotten).sum(),
        late_copies: fares.late_copies,
        sent: sent_bytes(flow),
        codecs: codecs(flow),
        deltas: deltas(flow),
        demands: demands(fares),
        guest_io: guest_io(easing),
        outage_ms: millis(times.outage),
        reconnects,
        verified: true,
    }
}
