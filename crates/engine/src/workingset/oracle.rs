//! The future as an estimator, for benches: nothing can predict better what is touched in a time.

use super::{Access, Estimator, Ranked, Span, Touch, rank, regions};
use std::collections::BTreeMap;

/// Knows a whole trace. Its memory is the trace's: it is bounded by nothing else, and of no use to a daemon.
#[derive(Clone, Debug)]
pub struct Oracle<'a> {
    /// In order of time.
    trace: &'a [Access],
}

impl<'a> Oracle<'a> {
    /// `trace` is in order of time.
    pub fn new(trace: &'a [Access]) -> Self {
        Oracle { trace }
    }
}

impl Estimator for Oracle<'_> {
    fn access(&mut self, _: Access) {}

    fn predict(&mut self, touch: Touch, _: u64, span: Span, most: usize) -> Vec<Ranked> {
        let from = self
            .trace
            .partition_point(|access| access.at_ms < span.from_ms);
        let mut first = BTreeMap::new();
        for access in self.trace[from..]
            .iter()
            .take_while(|a| a.at_ms < span.until_ms)
        {
            if access.touch == touch {
                for region in regions(access.units) {
                    let place = first.len();
                    first.entry(region).or_insert(place);
                }
            }
        }
        let all = first.into_iter().map(|(region, place)| Ranked {
            region,
            score: -(place as f32),
        });
        rank(all.collect(), most)
    }

    fn memory(&self) -> usize {
        size_of_val(self.trace)
    }
}
