//! One move, measured from outside: the command's progress, the client's probes, the emulator's counters
//! and the guest's reports on one time line.

use super::answers::{MigrationReport, MigrationView, Phase};
use super::rates::{self, Rates};
use super::{Ended, Guest, Pair, PairError, Seen};
use crate::net::Host;
use crate::probe::{EchoSeries, Gap};
use crate::wan::{Direction, LineCounts};
use std::time::{Duration, Instant};

/// How often something is told while nothing new comes.
const TICK: Duration = Duration::from_millis(250);

/// How long the client goes on asking after the stop, at most, for an answer that ends the gap.
const GAP_MARGIN: Duration = Duration::from_secs(2);

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Route {
    pub from: Host,
    /// Further words for `migrate`.
    pub options: Vec<String>,
    /// How long the guest's rates are taken before and after.
    pub rates_for: Duration,
    /// After which the move counts as not finished.
    pub within: Duration,
}

impl Route {
    pub fn from(from: Host) -> Route {
        Route {
            from,
            options: Vec::new(),
            rates_for: Duration::from_secs(10),
            within: Duration::from_secs(1800),
        }
    }
}

/// What is going on, for whoever shows it.
#[derive(Clone, Copy, Debug)]
pub enum Moment<'a> {
    /// The rates before are being taken.
    Before { left: Duration, guest: Rates },
    /// The command has told something, or a little time has passed.
    Moving {
        view: &'a MigrationView,
        since: Duration,
        guest: Rates,
    },
    /// The rates after are being taken.
    After { left: Duration, guest: Rates },
}

/// A move that was made, with everything that was measured.
#[derive(Debug)]
pub struct Journey {
    pub ended: Ended,
    /// From the command to its end.
    pub took: Duration,
    /// When each phase was first told of, from the command on.
    pub phases: Vec<(Phase, Duration)>,
    pub echo: EchoSeries,
    /// The client's longest time without the guest during the move.
    pub gap: Option<Gap>,
    /// When the guest ran at the destination: the gap's start plus the blackout.
    pub resumed: Option<Instant>,
    pub before: Rates,
    /// From the command to its end.
    pub during: Rates,
    pub after: Rates,
    /// From the guest running at the destination until it works as before; see [`rates::brownout`].
    pub brownout: Option<Duration>,
    /// What the emulator carried from the source to the destination, and back.
    pub wan_out: LineCounts,
    pub wan_back: LineCounts,
    /// The guest's errors by the end.
    pub guest_errors: u64,
}

impl Journey {
    pub fn view(&self) -> Option<&MigrationView> {
        Some(&self.ended.last.as_ref()?.view)
    }

    pub fn report(&self) -> Option<&MigrationReport> {
        self.view()?.report.as_ref()
    }

    /// Sentences about what went wrong; empty if nothing did.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.ended.completed() {
            problems.push(format!("the migration: {}", self.ended.describe()));
        }
        match self.report() {
            None => problems.push("there is no report".to_owned()),
            Some(report) => {
                if !report.verified {
                    problems.push("the daemons did not compare the content".to_owned());
                }
                if report.units_sent_again > 0 {
                    let count = report.units_sent_again;
                    problems.push(format!("{count} units were sent twice"));
                }
                let (sent, live) = (report.units_sent, report.units_live);
                let outdated = report.units_outdated + report.units_repeated;
                if sent > live + outdated {
                    problems.push(format!(
                        "{sent} units were sent of {live} live ones, {outdated} of them in vain"
                    ));
                }
            }
        }
        if self.guest_errors > 0 {
            problems.push(format!("the guest found {} errors", self.guest_errors));
        }
        if self.gap.is_some_and(|gap| gap.open) {
            problems.push("the client never heard from the guest again".to_owned());
        }
        problems
    }
}

fn other_direction(from: Host) -> (Direction, Direction) {
    match from {
        Host::A => (Direction::AToB, Direction::BToA),
        Host::B => (Direction::BToA, Direction::AToB),
    }
}

/// Moves the guest and measures. Fails only when the measuring does: a migration that failed is told in
/// the journey.
pub fn travel(
    pair: &Pair,
    guest: &mut Guest,
    route: &Route,
    mut show: impl FnMut(Moment<'_>),
) -> Result<Journey, PairError> {
    let wan = pair.lab().wan();
    let (out, back) = other_direction(route.from);
    let prober = guest.echo(pair.lab())?;

    let quiet_from = Instant::now();
    linger(guest, route.rates_for, |left, guest| {
        show(Moment::Before { left, guest });
    });

    let counts = |way| wan.stats(way).counts;
    let (out_before, back_before) = (counts(out), counts(back));
    let began = Instant::now();
    let to = route.from.other().to_string();
    let mut args = vec!["migrate", guest.name(), "--to", &to];
    args.extend(route.options.iter().map(String::as_str));
    let mut follow = pair.on(route.from).follow(&args)?;
    let mut phases: Vec<(Phase, Duration)> = Vec::new();
    let mut stopping: Option<Instant> = None;
    let mut last: Option<Seen> = None;
    let ended = loop {
        let over = follow.is_over();
        let seen = follow.next(TICK)?;
        if let Some(seen) = &seen {
            let phase = seen.view.phase;
            if phases.iter().all(|(known, _)| *known != phase) {
                phases.push((phase, seen.at - began));
            }
            if phase >= Phase::Quiesce {
                stopping.get_or_insert(seen.at);
            }
        }
        let news = seen.is_some();
        last = seen.or(last);
        if let Some(seen) = &last {
            show(Moment::Moving {
                view: &seen.view,
                since: began.elapsed(),
                guest: rates_now(guest),
            });
        }
        if !news && over {
            break follow.end(Duration::from_secs(10))?;
        }
        if began.elapsed() > route.within {
            // Told as the end that it is: what was seen last is not `completed`.
            break Ended {
                exit: None,
                refusal: None,
                last,
            };
        }
    };
    let arrived = Instant::now();
    let (out_after, back_after) = (counts(out), counts(back));
    linger(guest, route.rates_for, |left, guest| {
        show(Moment::After { left, guest });
    });
    guest.listen();
    let echo = prober.stop();

    let blackout = ended
        .last
        .as_ref()
        .and_then(|seen| seen.view.report.as_ref()?.stop_to_resume_ms())
        .map(|ms| Duration::from_secs_f64(ms.max(0.0) / 1e3));
    // The phase is told only after it began, so the gap may have begun before.
    let gap = echo
        .between(
            stopping.map_or(began, |s| s.checked_sub(GAP_MARGIN).unwrap_or(s)),
            arrived,
        )
        .echo_gap();
    let resumed = gap.map(|gap| gap.start + blackout.unwrap_or(gap.length));
    let reports = guest.reports();
    let before = rates::between(reports, quiet_from, began);
    Ok(Journey {
        took: arrived - began,
        phases,
        gap,
        resumed,
        before,
        during: rates::between(reports, began, arrived),
        after: rates::between(reports, arrived, Instant::now()),
        brownout: resumed.and_then(|at| rates::brownout(reports, &before, at)),
        wan_out: since(out_after, out_before),
        wan_back: since(back_after, back_before),
        guest_errors: guest.errors(),
        echo,
        ended,
    })
}

/// Waits, telling how long it still takes and how the guest does.
fn linger(guest: &mut Guest, time: Duration, mut tell: impl FnMut(Duration, Rates)) {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        tell(left, rates_now(guest));
        std::thread::sleep(left.min(TICK));
    }
}

/// Over the last seconds, standing still included.
fn rates_now(guest: &mut Guest) -> Rates {
    guest.listen();
    let now = Instant::now();
    let from = now.checked_sub(rates::STEADY).unwrap_or(now);
    rates::lately(guest.reports(), from, now)
}

fn since(now: LineCounts, then: LineCounts) -> LineCounts {
    LineCounts {
        in_packets: now.in_packets - then.in_packets,
        in_bytes: now.in_bytes - then.in_bytes,
        out_packets: now.out_packets - then.out_packets,
        out_bytes: now.out_bytes - then.out_bytes,
        lost_packets: now.lost_packets - then.lost_packets,
        queue_dropped_packets: now.queue_dropped_packets - then.queue_dropped_packets,
        outage_dropped_packets: now.outage_dropped_packets - then.outage_dropped_packets,
        queue_peak_bytes: now.queue_peak_bytes,
    }
}
