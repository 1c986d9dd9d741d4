//! Where the record's figures are read off, at either end.
//!
//! Meters are not kept alive by being read: content and memory hang on some of them.

use std::sync::{Arc, Weak};

use whimbrel_engine::space::SpaceKind;
use whimbrel_engine::timeline::{Counts, Stretch};
use whimbrel_peer::pace::{Pace, Rate};

use crate::disk::Wants;
use crate::migration::arrivals::Arrivals;
use crate::migration::easing::Easing;
use crate::migration::flow::Flow;

/// A limit counts as what holds push while so much of it is used.
const USED: f64 = 0.85;

/// What is counted at one end of a migration.
pub enum Meters {
    Source {
        flow: Weak<Flow>,
        easing: Weak<Easing>,
        /// The migration's own limit, and the host's.
        pace: Pace,
        host: Pace,
    },
    Destination {
        arrivals: Weak<Arrivals>,
        wants: Weak<Wants>,
    },
}

/// What the meters say: sums since the daemon began with the migration, but for what was felt, which is since the
/// reading before.
#[derive(Default)]
pub struct Reading {
    bytes: [u64; 3],
    /// Plain, zstd, zero, delta.
    units: [u64; 4],
    /// Counted at the destination: what the source hears of them outlives its daemon, and would count twice.
    demands: u64,
    guard_ms: u64,
    /// Bytes a second, of the migration and of the host.
    limits: [Option<u64>; 2],
    demand_waits: Counts,
    guest: Counts,
}

impl Meters {
    pub fn source(flow: &Arc<Flow>, easing: &Arc<Easing>, pace: &Pace, host: &Pace) -> Meters {
        Meters::Source {
            flow: Arc::downgrade(flow),
            easing: Arc::downgrade(easing),
            pace: pace.clone(),
            host: host.clone(),
        }
    }

    pub fn destination(arrivals: &Arc<Arrivals>, wants: &Arc<Wants>) -> Meters {
        Meters::Destination {
            arrivals: Arc::downgrade(arrivals),
            wants: Arc::downgrade(wants),
        }
    }

    /// Nothing if the driver is gone.
    pub fn read(&self) -> Option<Reading> {
        match self {
            Meters::Source {
                flow,
                easing,
                pace,
                host,
            } => Some(Reading {
                limits: [limit(pace), limit(host)],
                ..of_source(&*flow.upgrade()?, &*easing.upgrade()?)
            }),
            Meters::Destination { arrivals, wants } => {
                let wants = wants.upgrade()?;
                Some(Reading {
                    bytes: arrivals.upgrade()?.received(),
                    demands: wants.figures().count,
                    demand_waits: Counts::from(&wants.take_unrecorded()),
                    guest: Counts::from(&wants.felt.take_unrecorded()),
                    ..Reading::default()
                })
            }
        }
    }
}

fn limit(pace: &Pace) -> Option<u64> {
    match pace.rate() {
        Rate::PerSecond(rate) => Some(rate),
        Rate::Unlimited => None,
    }
}

fn of_source(flow: &Flow, easing: &Easing) -> Reading {
    let mut reading = Reading {
        guard_ms: easing.figures().held_us / 1000,
        guest: Counts::from(&easing.take_unrecorded()),
        ..Reading::default()
    };
    for info in flow.infos() {
        let sent = flow.sent(info.id);
        let pushed = match info.kind {
            SpaceKind::Ram => 0,
            SpaceKind::Disk => 1,
        };
        reading.bytes[pushed] += sent.push_bytes;
        reading.bytes[2] += sent.demand_bytes;
        for (sum, more) in
            reading
                .units
                .iter_mut()
                .zip([sent.plain, sent.zstd, sent.zero, sent.delta.units])
        {
            *sum += more;
        }
    }
    reading
}

impl Reading {
    /// What has been added since the reading before.
    pub fn since(&mut self, before: &mut Reading, from_ms: u64, to_ms: u64) -> Stretch {
        let more = |now: u64, then: u64| now.saturating_sub(then);
        let [ram_bytes, disk_bytes, demand_bytes] =
            std::array::from_fn(|n| more(self.bytes[n], before.bytes[n]));
        let [plain_units, zstd_units, zero_units, delta_units] =
            std::array::from_fn(|n| more(self.units[n], before.units[n]));
        let mut stretch = Stretch {
            from_ms,
            to_ms,
            ram_bytes,
            disk_bytes,
            demand_bytes,
            plain_units,
            zstd_units,
            zero_units,
            delta_units,
            demands: more(self.demands, before.demands),
            guard_ms: more(self.guard_ms, before.guard_ms),
            demand_waits: std::mem::take(&mut self.demand_waits),
            guest: std::mem::take(&mut self.guest),
            ..Stretch::default()
        };
        let ms = stretch.len_ms();
        let used = |limit: u64| stretch.bytes() as f64 * 1e3 >= USED * limit as f64 * ms as f64;
        // Both may be as high as they are; the lower one is what holds.
        match self.limits {
            [Some(own), host] if host.is_none_or(|host| own <= host) && used(own) => {
                stretch.limit_ms = ms;
            }
            [_, Some(host)] if used(host) => stretch.host_ms = ms,
            _ => {}
        }
        stretch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(limits: [Option<u64>; 2], bytes: u64) -> (u64, u64) {
        let mut before = Reading::default();
        let mut now = Reading {
            bytes: [bytes, 0, 0],
            limits,
            ..Reading::default()
        };
        let stretch = now.since(&mut before, 0, 1000);
        (stretch.limit_ms, stretch.host_ms)
    }

    #[test]
    fn the_lower_limit_that_is_used_is_what_holds() {
        assert_eq!(held([None, None], 1_000_000), (0, 0));
        assert_eq!(held([Some(1_000_000), None], 900_000), (1000, 0));
        assert_eq!(held([Some(1_000_000), None], 500_000), (0, 0));
        assert_eq!(held([Some(1_000_000), Some(2_000_000)], 900_000), (1000, 0));
        assert_eq!(held([Some(2_000_000), Some(1_000_000)], 900_000), (0, 1000));
        assert_eq!(held([None, Some(1_000_000)], 900_000), (0, 1000));
    }
}
