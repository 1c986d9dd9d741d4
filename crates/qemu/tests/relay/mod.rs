//! Both daemons in one: a source's memory spoken again to a destination, demands first, with an
//! optional delay in place of the wide area.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;
use whimbrel_qemu::sink::{PostcopySink, Request};
use whimbrel_qemu::source::{Handover, RamSource, SourceEvent};
use whimbrel_qemu::store::UnitState;

/// Units in one pushed placement.
const PUSH: u64 = 64;

/// A demand as it came.
#[derive(Clone, Debug)]
pub struct Demand {
    pub block: usize,
    pub unit: u64,
    /// Since the Unix epoch, to be held against RESUME.
    pub at: Duration,
}

pub fn now() -> Duration {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.expect("after 1970")
}

/// Waits for the end of round `n`.
pub async fn round(events: &mut mpsc::Receiver<SourceEvent>, n: u64) {
    loop {
        match events.recv().await.expect("event") {
            SourceEvent::RoundDone { n: done, .. } if done >= n => return,
            SourceEvent::Layout(_) | SourceEvent::RoundDone { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Places a run of units with equal state.
async fn place(source: &RamSource, sink: &PostcopySink, block: usize, extent: Extent) {
    let store = source.store();
    let mut at = extent.start;
    while at < extent.end() {
        let zero = store.is_zero(block, at);
        let mut end = at + 1;
        while end < extent.end() && store.is_zero(block, end) == zero {
            end += 1;
        }
        let run = Extent::new(at, end - at);
        if zero {
            sink.place_zero(block, run).await.expect("zero placed");
        } else {
            let mut data = Vec::new();
            store
                .read(block, at, run.len, &mut data)
                .expect("current content");
            sink.place(block, at, data.into()).await.expect("placed");
        }
        at = end;
    }
}

/// Pre-copies everything there is; what changes meanwhile, [`changed`] tells afterwards.
pub async fn precopy(source: &RamSource, sink: &PostcopySink) {
    // Asked before anything is read: whatever arrives from here on counts as changed.
    changed(source, None);
    for (block, found) in source.layout().blocks.iter().enumerate() {
        place(source, sink, block, found.whole()).await;
    }
}

/// Units that arrived since this was asked last or, after the stop, are still to come.
pub fn changed(source: &RamSource, handover: Option<&Handover>) -> Vec<UnitSet> {
    let store = source.store();
    let changed = |block| {
        let mut set = store.take_dirtied(block);
        if let Some(handover) = handover {
            set.union_with(&handover.stale[block]);
        }
        set
    };
    (0..store.blocks()).map(changed).collect()
}

/// Places units before the switch, their current content.
pub async fn place_current(source: &RamSource, sink: &PostcopySink, units: &[UnitSet]) {
    for (block, set) in units.iter().enumerate() {
        for run in set.runs() {
            source.wait_current(block, run).await.expect("current");
            place(source, sink, block, run).await;
        }
    }
}

/// What followed the switch.
pub struct Moved {
    pub demands: Vec<Demand>,
    pub resumed_at: Duration,
    pub written_at: Duration,
    pub pushed: u64,
}

/// Switches and moves everything: demands first (each answered `delay` after it came), then the rest
/// once the guest has run for `alone`, so that there is something to demand.
pub async fn switch(
    source: &RamSource,
    sink: &PostcopySink,
    mut requests: mpsc::Receiver<Request>,
    handover: &Handover,
    stale: &[UnitSet],
    delay: Duration,
    alone: Duration,
) -> Moved {
    let switched = sink.run(&handover.device_state, stale).await.expect("run");
    let mut demands = Vec::new();
    let mut waiting: VecDeque<(Instant, Request)> = VecDeque::new();
    let blocks = source.layout().blocks.len();
    let mut missing: Vec<UnitSet> = (0..blocks)
        .map(|b| sink.missing(b).expect("a block"))
        .collect();
    let resumed = sink.resumed();
    tokio::pin!(resumed);
    let mut resumed_at = None;
    let mut push_from: Option<Instant> = None;
    let mut pushed = 0;
    loop {
        let left: u64 = missing.iter().map(UnitSet::len).sum();
        if left == 0 && resumed_at.is_some() {
            break;
        }
        let due = waiting.front().map(|(at, _)| *at);
        let pushing = left > 0 && push_from.is_some_and(|at| Instant::now() >= at);
        tokio::select! {
            biased;
            at = &mut resumed, if resumed_at.is_none() => {
                resumed_at = Some(at.expect("resumed"));
                push_from = Some(Instant::now() + alone);
            }
            Some((block, extent)) = requests.recv() => {
                demands.push(Demand { block, unit: extent.start, at: now() });
                waiting.push_back((Instant::now() + delay, (block, extent)));
            }
            () = async { tokio::time::sleep_until(due.expect("checked").into()).await }, if due.is_some() => {
                let (_, (block, extent)) = waiting.pop_front().expect("due");
                // Pushed a moment before: on its way.
                let wanted: Vec<Extent> = missing[block].runs_within(extent).collect();
                for run in wanted {
                    missing[block].remove(run);
                    source.wait_current(block, run).await.expect("current");
                    place(source, sink, block, run).await;
                }
            }
            () = async {}, if pushing => {
                let (block, run) = missing
                    .iter()
                    .enumerate()
                    .find_map(|(b, m)| Some((b, m.next_run(0, PUSH)?)))
                    .expect("something is left");
                missing[block].remove(run);
                source.wait_current(block, run).await.expect("current");
                place(source, sink, block, run).await;
                pushed += run.len;
            }
            () = tokio::time::sleep(Duration::from_millis(5)), if !pushing => {}
        }
    }
    Moved {
        demands,
        resumed_at: resumed_at.expect("looped until then"),
        written_at: switched.written,
        pushed,
    }
}

/// Nothing stale, for a pure post-copy (nothing was placed before).
pub fn nothing(source: &RamSource) -> Vec<UnitSet> {
    let blocks = &source.layout().blocks;
    blocks.iter().map(|b| UnitSet::empty(b.units())).collect()
}

/// Units in that state, over all blocks.
pub fn count(source: &RamSource, state: UnitState) -> u64 {
    let store = source.store();
    let blocks = source.layout().blocks.iter().enumerate();
    let in_block = |(block, found): (usize, &whimbrel_qemu::stream::RamBlock)| {
        (0..found.units())
            .filter(|u| store.state(block, *u) == state)
            .count() as u64
    };
    blocks.map(in_block).sum()
}
