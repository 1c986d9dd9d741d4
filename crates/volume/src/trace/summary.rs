//! What a trace amounts to, in bounded memory: totals, and by window how much was touched and how big the working set is.

use super::Request;
use crate::heat::AccessKind;
use serde::Serialize;
use std::collections::BTreeMap;
use whimbrel_engine::space::{Extent, UNIT};
use whimbrel_engine::workingset::{REGION_UNITS, Touch, regions};

/// Bytes of a region.
pub const REGION: u64 = REGION_UNITS * UNIT;

/// Regions of which it is known when each was touched last; what does not fit is counted, not followed.
const REGIONS: usize = 1 << 20;

/// Windows described, at most; what a trace does after the last counts to that.
pub const WINDOWS: u64 = 1024;

/// Totals of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    pub requests: u64,
    pub bytes: u64,
    /// Bytes of all regions ever touched so.
    pub footprint: u64,
}

/// A stretch of the trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Window {
    pub read_requests: u64,
    pub written_requests: u64,
    /// Working set: bytes of the regions that were read in it, and written.
    pub read_set: u64,
    pub written_set: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub duration_us: u64,
    /// First byte behind all requests: the disk is at least so long.
    pub reach: u64,
    pub reads: Amount,
    pub writes: Amount,
    pub window_us: u64,
    pub windows: Vec<Window>,
    /// Touches of regions beyond those that are followed; sets and footprints are without them.
    pub not_followed: u64,
    /// Requests by place and time, for a picture.
    #[serde(skip)]
    pub map: Map,
}

/// Requests in [`Map::ROWS`] stripes of the disk and in the summary's windows: reads, writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Map {
    pub cells: BTreeMap<(u32, u32), [u32; 2]>,
    /// Bytes of a stripe.
    pub stripe: u64,
}

impl Map {
    /// Stripes, at most.
    pub const ROWS: u64 = 256;
}

/// Takes a trace in, request by request.
pub struct Summing {
    summary: Summary,
    /// By kind: the number of the last window in which the region was touched.
    touched: [BTreeMap<u64, u32>; 2],
}

impl Summing {
    /// In windows of this length. `duration_us` and `reach` are those of the trace, found by reading it once before.
    /// Windows are longer than asked for where there would be more than [`WINDOWS`].
    pub fn new(window_us: u64, duration_us: u64, reach: u64) -> Self {
        let shortest = (duration_us / WINDOWS + 1).max(1000);
        Summing {
            summary: Summary {
                window_us: window_us.max(shortest),
                map: Map {
                    cells: BTreeMap::new(),
                    stripe: reach
                        .div_ceil(Map::ROWS)
                        .next_multiple_of(REGION)
                        .max(REGION),
                },
                ..Summary::default()
            },
            touched: [BTreeMap::new(), BTreeMap::new()],
        }
    }

    pub fn take(&mut self, request: &Request) {
        let touch = match request.kind {
            AccessKind::Read => Touch::Read,
            AccessKind::Write => Touch::Write,
        };
        let end = request.offset + request.len;
        self.summary.duration_us = self.summary.duration_us.max(request.at_us);
        self.summary.reach = self.summary.reach.max(end);
        let window = (request.at_us / self.summary.window_us).min(WINDOWS - 1) as usize;
        if self.summary.windows.len() <= window {
            self.summary.windows.resize(window + 1, Window::default());
        }
        let mut new = [0; 2];
        let seen = &mut self.touched[touch as usize];
        for region in regions(Extent::touching(request.offset, request.len)) {
            if seen.len() >= REGIONS && !seen.contains_key(&region) {
                self.summary.not_followed += 1;
                continue;
            }
            match seen.insert(region, window as u32) {
                None => new = new.map(|n| n + REGION),
                Some(before) if before != window as u32 => new[1] += REGION,
                Some(_) => {}
            }
        }
        let [ever, now] = new;
        let at = &mut self.summary.windows[window];
        let amount = match touch {
            Touch::Read => {
                at.read_requests += 1;
                at.read_set += now;
                &mut self.summary.reads
            }
            Touch::Write => {
                at.written_requests += 1;
                at.written_set += now;
                &mut self.summary.writes
            }
        };
        amount.requests += 1;
        amount.bytes += request.len;
        amount.footprint += ever;
        let map = &mut self.summary.map;
        let stripe = |byte: u64| (byte / map.stripe).min(Map::ROWS - 1);
        for stripe in stripe(request.offset)..=stripe(end - 1) {
            map.cells.entry((window as u32, stripe as u32)).or_default()[touch as usize] += 1;
        }
    }

    pub fn finish(self) -> Summary {
        self.summary
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_counts_once_in_a_window_and_once_in_the_footprint() {
        let mut summing = Summing::new(1_000_000, 2_500_000, 4 * REGION);
        for (at_us, kind, offset) in [
            (0, AccessKind::Read, 0),
            (1, AccessKind::Read, 512),
            (1_500_000, AccessKind::Read, 0),
            (1_600_000, AccessKind::Write, REGION - 512),
        ] {
            summing.take(&Request {
                at_us,
                kind,
                offset,
                len: 1024,
            });
        }
        let summary = summing.finish();
        assert_eq!(
            summary.reads,
            Amount {
                requests: 3,
                bytes: 3072,
                footprint: REGION
            }
        );
        assert_eq!(summary.writes.footprint, 2 * REGION);
        let sets: Vec<_> = summary
            .windows
            .iter()
            .map(|w| (w.read_set, w.written_set))
            .collect();
        assert_eq!(sets, [(REGION, 0), (REGION, 2 * REGION)]);
        assert_eq!(summary.map.cells[&(1, 0)], [1, 1]);
    }

    #[test]
    fn what_lies_past_what_was_promised_counts_to_the_last() {
        let mut summing = Summing::new(1000, 0, 0);
        let kind = AccessKind::Read;
        summing.take(&Request {
            at_us: 1 << 60,
            kind,
            offset: super::super::REACH - 1,
            len: 1,
        });
        let summary = summing.finish();
        assert_eq!(summary.windows.len() as u64, WINDOWS);
        assert!(summary.map.cells.contains_key(&(WINDOWS as u32 - 1, 255)));
    }
}
