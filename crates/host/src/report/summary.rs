//! The figures that follow from a timeline.

use whimbrel_engine::latency::Latencies;

use crate::api::types::{
    Direction, Event, Happened, MigrationView, PhaseSpan, Span, Stretch, Summary, TimePart,
    TimelineView,
};

/// What follows from what was recorded of a migration.
pub fn summary(view: &MigrationView, timeline: &TimelineView) -> Summary {
    let total_ms = total(view, timeline);
    let (stood_still, blackout_parts) = blackout(view.direction, &timeline.events);
    let mut guest = Latencies::default();
    let mut sum = Stretch::default();
    for stretch in &timeline.stretches {
        guest.merge(&stretch.guest.latencies());
        let guestless = Stretch {
            guest: Default::default(),
            demand_waits: Default::default(),
            ..stretch.clone()
        };
        sum.join(guestless);
    }
    let ms = |part| guest.quantile(part).map_or(0.0, |us| us as f64 / 1e3);
    let restarts = timeline.events.iter();
    let restarts = restarts.filter(|e| e.what == Happened::Restarted).count();
    Summary {
        total_ms,
        phases: phases(&timeline.events, total_ms),
        blackout_ms: view.blackout_ms.or(match view.direction {
            Direction::Outgoing => stood_still.map(|span| span.ms as f64),
            Direction::Incoming => None,
        }),
        blackout_parts,
        stood_still,
        outages: outages(&timeline.events, total_ms),
        ram_bytes: sum.ram_bytes,
        disk_bytes: sum.disk_bytes,
        demand_bytes: sum.demand_bytes,
        guest_requests: guest.len(),
        guest_p50_ms: ms(0.5),
        guest_p99_ms: ms(0.99),
        guest_max_ms: ms(1.0),
        guard_ms: sum.guard_ms,
        limit_ms: sum.limit_ms,
        host_ms: sum.host_ms,
        restarts: restarts as u64,
    }
}

/// Until it ended; or until it was last looked at.
fn total(view: &MigrationView, timeline: &TimelineView) -> u64 {
    let recorded = timeline.stretches.last().map_or(0, |s| s.to_ms);
    let told = timeline.events.last().map_or(0, |e| e.at_ms);
    let seen = recorded.max(told);
    match view.ended {
        Some(_) if seen > 0 => seen,
        Some(ended) => ended.since(timeline.started).as_millis() as u64,
        None => seen,
    }
}

/// Phases in order; of one that was entered again, by a restarted daemon, both times count as one if nothing was in
/// between.
fn phases(events: &[Event], end_ms: u64) -> Vec<PhaseSpan> {
    let mut spans: Vec<PhaseSpan> = Vec::new();
    for event in events {
        let Happened::Phase(phase) = event.what else {
            continue;
        };
        if let Some(last) = spans.last_mut() {
            if last.phase == phase {
                continue;
            }
            last.ms = event.at_ms.saturating_sub(last.from_ms);
        }
        spans.push(PhaseSpan {
            phase,
            from_ms: event.at_ms,
            ms: 0,
        });
    }
    if let Some(last) = spans.last_mut()
        && !last.phase.is_final()
    {
        last.ms = end_ms.saturating_sub(last.from_ms);
    }
    spans
}

/// When the guest stood still, as far as this end knows, and what that was made of.
fn blackout(direction: Direction, events: &[Event]) -> (Option<Span>, Vec<TimePart>) {
    let ran = events.iter().position(|e| e.what == Happened::Ran);
    let before = &events[..ran.unwrap_or(events.len())];
    let last = |what: Happened| before.iter().rev().find(|e| e.what == what);
    let (stopped, granted) = (last(Happened::Stopped), last(Happened::Granted));
    let Some(ran) = ran.map(|n| events[n].at_ms) else {
        return (None, Vec::new());
    };
    let part = |name: &str, from: u64, to: u64| TimePart {
        name: name.to_string(),
        ms: to.saturating_sub(from) as f64,
    };
    let span = |from_ms: u64| Span {
        from_ms,
        ms: ran.saturating_sub(from_ms),
    };
    match (direction, stopped, granted) {
        (Direction::Outgoing, Some(stopped), Some(granted)) => (
            Some(span(stopped.at_ms)),
            vec![
                part("stop to grant", stopped.at_ms, granted.at_ms),
                part("grant to running, the way included", granted.at_ms, ran),
            ],
        ),
        (Direction::Outgoing, Some(stopped), None) => (Some(span(stopped.at_ms)), Vec::new()),
        (Direction::Incoming, _, Some(granted)) => (
            Some(span(granted.at_ms)),
            vec![part("grant heard to running", granted.at_ms, ran)],
        ),
        _ => (None, Vec::new()),
    }
}

/// Times without a link; of the last one, until it was last looked at.
fn outages(events: &[Event], end_ms: u64) -> Vec<Span> {
    let mut outages = Vec::new();
    let mut down = None;
    for event in events {
        match event.what {
            Happened::LinkDown => {
                down.get_or_insert(event.at_ms);
            }
            Happened::LinkUp => outages.extend(down.take().map(|from_ms| Span {
                from_ms,
                ms: event.at_ms.saturating_sub(from_ms),
            })),
            _ => {}
        }
    }
    outages.extend(down.map(|from_ms| Span {
        from_ms,
        ms: end_ms.saturating_sub(from_ms),
    }));
    outages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fake::{sample_migration, sample_timeline};
    use whimbrel_engine::switchover::Phase;

    #[test]
    fn phases_blackout_and_outages_follow_from_the_events() {
        let timeline = sample_timeline();
        let summary = summary(&sample_migration(), &timeline);
        let spans: Vec<_> = summary.phases.iter().map(|p| (p.phase, p.ms)).collect();
        assert_eq!(
            spans,
            [
                (Phase::Prepare, 1200),
                (Phase::Copy, 6800),
                (Phase::Quiesce, 20),
                (Phase::Grant, 60),
                (Phase::Drain, 21_920),
                (Phase::Complete, 0)
            ]
        );
        assert_eq!(summary.blackout_ms, Some(72.0));
        let parts: Vec<f64> = summary.blackout_parts.iter().map(|p| p.ms).collect();
        assert_eq!(parts.iter().sum::<f64>(), 72.0);
        let outage = Span {
            from_ms: 15_000,
            ms: 3000,
        };
        assert_eq!(summary.outages, [outage]);
        assert_eq!(summary.total_ms, 30_000);
    }

    #[test]
    fn sums_are_those_of_the_stretches() {
        let timeline = sample_timeline();
        let summary = summary(&sample_migration(), &timeline);
        let bytes: u64 = timeline.stretches.iter().map(Stretch::bytes).sum();
        assert_eq!(summary.bytes(), bytes);
        assert!(summary.guest_requests > 0 && summary.guest_p50_ms <= summary.guest_p99_ms);
    }

    #[test]
    fn a_destination_does_not_say_what_it_does_not_know() {
        let mut timeline = sample_timeline();
        timeline.events.retain(|e| e.what != Happened::Stopped);
        let view = MigrationView {
            direction: Direction::Incoming,
            ..sample_migration()
        };
        let summary = summary(&view, &timeline);
        assert_eq!(summary.blackout_ms, None);
        assert_eq!(summary.blackout_parts.len(), 1);
    }

    #[test]
    fn of_nothing_follows_nothing() {
        let mut timeline = sample_timeline();
        timeline.events.clear();
        timeline.stretches.clear();
        let summary = summary(&sample_migration(), &timeline);
        assert_eq!((summary.total_ms, summary.bytes()), (0, 0));
        assert_eq!(summary.phases, []);
    }
}
