//! The decoupled hand-over with two real QEMUs and one process between them.

mod guest;
mod relay;

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use guest::{BUSY, Guest, IDLE, Load};
use serde_json::json;
use tokio::sync::mpsc;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;
use whimbrel_qemu::info::early_pages;
use whimbrel_qemu::qmp::Qmp;
use whimbrel_qemu::sink::{PostcopySink, PrecopySink, Request, postcopy_possible};
use whimbrel_qemu::source::{Handover, RamSource, SourceEvent, SourceOptions};
use whimbrel_qemu::store::UnitState;
use whimbrel_qemu::{Error, SourceState};

type Events = mpsc::Receiver<SourceEvent>;

fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary directory")
}

async fn booted(dir: &Path, load: Load) -> Guest {
    let guest = Guest::start(dir, "from", load, false).await;
    guest.ticks_past(3).await;
    guest
}

async fn source(guest: &Guest, dir: &Path) -> (RamSource, Events) {
    let mut options = SourceOptions::new(dir.join("out"));
    // For runs with an older QEMU named in the environment.
    options.accept_lost_writes = std::env::var_os("WHIMBREL_TEST_SOURCE_QEMU").is_some();
    let started = RamSource::start(guest.qmp.clone(), options).await;
    started.expect("source started")
}

async fn sink(
    guest: &Guest,
    dir: &Path,
    source: &RamSource,
) -> (PostcopySink, mpsc::Receiver<Request>) {
    let started = PostcopySink::start(&guest.qmp, &dir.join("in"), source.layout()).await;
    started.expect("sink started")
}

/// The guest's own timestamps, for the report (shown with `--nocapture`).
fn report(name: &str, source: &RamSource, handover: &Handover, moved: &relay::Moved) {
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let early = moved.demands.iter().filter(|d| d.at < moved.resumed_at);
    eprintln!(
        "{name}: STOP to package {:.1} ms, STOP to RESUME {:.1} ms; device state {} bytes; \
         {} stale; {} demands, {} before RESUME; {} pushed; live {}, zero {}",
        ms(moved.written_at.saturating_sub(handover.stopped_at_qemu)),
        ms(moved.resumed_at.saturating_sub(handover.stopped_at_qemu)),
        handover.device_state.len(),
        handover.stale.iter().map(UnitSet::len).sum::<u64>(),
        moved.demands.len(),
        early.clone().count(),
        moved.pushed,
        relay::count(source, UnitState::Held),
        relay::count(source, UnitState::Zero),
    );
    for demand in moved.demands.iter().take(early.count() + 8) {
        eprintln!(
            "  {:>8.2} ms  {} {:#x}",
            ms(demand.at.saturating_sub(moved.written_at)),
            source.layout().blocks[demand.block].name,
            demand.unit * 4096,
        );
    }
}

/// Ends a move and checks that the guest goes on at the destination, and only there.
async fn settle(source: &RamSource, sink: &PostcopySink, from: &Guest, to: &Guest, before: u64) {
    source.drained().await.expect("drained");
    sink.finish().await.expect("finished");
    let arrived = to.ticks_past(before).await;
    to.ticks_past(arrived + 10).await;
    assert_eq!(from.status().await, "postmigrate");
    assert_eq!(to.status().await, "running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_guest_moves_by_pure_postcopy() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    let to = Guest::start(dir.path(), "to", BUSY, true).await;
    postcopy_possible(&to.qmp).await.expect("userfaultfd");
    let (source, mut events) = source(&from, dir.path()).await;
    relay::round(&mut events, 2).await;
    let (sink, requests) = sink(&to, dir.path(), &source).await;
    let early = early_pages(&from.qmp, source.layout()).await;
    let early = early.expect("early pages");
    let before = from.tick();
    let handover = source.stop().await.expect("stopped");
    let nothing = relay::nothing(&source);
    let moved = relay::switch(
        &source,
        &sink,
        requests,
        &handover,
        &nothing,
        Duration::ZERO,
        Duration::from_millis(300),
    )
    .await;
    report("pure post-copy", &source, &handover, &moved);
    for demand in moved.demands.iter().filter(|d| d.at < moved.resumed_at) {
        let predicted = early[demand.block].contains(demand.unit);
        assert!(predicted, "not among the early pages: {demand:?}");
    }
    let again = sink.place_zero(0, Extent::unit(0)).await;
    assert!(
        matches!(again, Err(Error::PlacedTwice { block: 0, unit: 0 })),
        "{again:?}"
    );
    settle(&source, &sink, &from, &to, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_guest_moves_hybrid_over_a_slow_answering_link() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    let to = Guest::start(dir.path(), "to", BUSY, true).await;
    let (source, mut events) = source(&from, dir.path()).await;
    let (sink, requests) = sink(&to, dir.path(), &source).await;
    relay::round(&mut events, 1).await;
    relay::precopy(&source, &sink).await;
    let early = early_pages(&from.qmp, source.layout()).await;
    let early = early.expect("early pages");
    let before = from.tick();
    let handover = source.stop().await.expect("stopped");
    let mut changed = relay::changed(&source, Some(&handover));
    relay::place_current(&source, &sink, &early).await;
    for (changed, early) in changed.iter_mut().zip(&early) {
        changed.subtract(early);
    }
    let moved = relay::switch(
        &source,
        &sink,
        requests,
        &handover,
        &changed,
        Duration::from_millis(50),
        Duration::from_millis(500),
    )
    .await;
    report("hybrid, 50 ms", &source, &handover, &moved);
    settle(&source, &sink, &from, &to, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_may_stop_the_guest_before_the_first_pass_is_over() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    let to = Guest::start(dir.path(), "to", BUSY, true).await;
    let (source, _events) = source(&from, dir.path()).await;
    let (sink, requests) = sink(&to, dir.path(), &source).await;
    let before = from.tick();
    let handover = source.stop().await.expect("stopped");
    let nothing = relay::nothing(&source);
    let moved = relay::switch(
        &source,
        &sink,
        requests,
        &handover,
        &nothing,
        Duration::ZERO,
        Duration::ZERO,
    )
    .await;
    report("stopped at once", &source, &handover, &moved);
    settle(&source, &sink, &from, &to, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_guest_waits_for_the_decision_and_moves() {
    let dir = tempdir();
    let from = booted(dir.path(), IDLE).await;
    let to = Guest::start(dir.path(), "to", IDLE, true).await;
    let (source, mut events) = source(&from, dir.path()).await;
    let (sink, requests) = sink(&to, dir.path(), &source).await;
    relay::round(&mut events, 20).await;
    let before = from.ticks_past(from.tick() + 3).await;
    let handover = source.stop().await.expect("stopped");
    let nothing = relay::nothing(&source);
    let moved = relay::switch(
        &source,
        &sink,
        requests,
        &handover,
        &nothing,
        Duration::ZERO,
        Duration::from_millis(300),
    )
    .await;
    report("idle", &source, &handover, &moved);
    settle(&source, &sink, &from, &to, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_moves_by_precopy_where_userfaultfd_is_missing() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    let to = Guest::start(dir.path(), "to", BUSY, true).await;
    let (source, mut events) = source(&from, dir.path()).await;
    let sink = PrecopySink::start(&to.qmp, &dir.path().join("in"), source.layout()).await;
    let sink = sink.expect("sink started");
    relay::round(&mut events, 1).await;
    let place = async |units: Vec<UnitSet>| {
        for (block, set) in units.iter().enumerate() {
            for unit in set.runs().flat_map(|run| run.iter()) {
                if source.store().is_zero(block, unit) {
                    let placed = sink.place_zero(block, Extent::unit(unit)).await;
                    placed.expect("zero placed");
                } else {
                    let mut data = Vec::new();
                    let read = source.store().read(block, unit, 1, &mut data);
                    read.expect("current content");
                    sink.place(block, unit, data.into()).await.expect("placed");
                }
            }
        }
    };
    relay::changed(&source, None);
    let blocks = &source.layout().blocks;
    place(blocks.iter().map(|b| UnitSet::full(b.units())).collect()).await;
    let before = from.tick();
    let handover = source.stop().await.expect("stopped");
    source.drained().await.expect("drained");
    place(relay::changed(&source, Some(&handover))).await;
    sink.run(&handover.device_state).await.expect("run");
    let resumed = sink.resumed().await.expect("resumed");
    eprintln!(
        "pre-copy: STOP to RESUME {:.1} ms",
        (resumed - handover.stopped_at_qemu).as_secs_f64() * 1e3
    );
    sink.finish().await.expect("finished");
    let arrived = to.ticks_past(before).await;
    to.ticks_past(arrived + 10).await;
    assert_eq!(from.status().await, "postmigrate");
}

/// What an operator may have set, and what QEMU says of it later.
async fn settings(qmp: &Qmp) -> (bool, u64) {
    let capabilities = qmp.execute("query-migrate-capabilities", json!({})).await;
    let capabilities = capabilities.expect("capabilities");
    let xbzrle = capabilities.as_array().expect("a list").iter();
    let xbzrle = xbzrle.filter(|c| c["capability"] == "xbzrle");
    let xbzrle = xbzrle.map(|c| c["state"] == true).next();
    let parameters = qmp.execute("query-migrate-parameters", json!({})).await;
    let downtime = parameters.expect("parameters")["downtime-limit"].as_u64();
    (xbzrle.expect("xbzrle"), downtime.expect("downtime-limit"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_is_as_before_after_a_cancel_and_after_the_way_back() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    let set = json!({"capabilities": [{"capability": "xbzrle", "state": true}]});
    let set = from.qmp.execute("migrate-set-capabilities", set).await;
    set.expect("xbzrle set");
    let set = json!({"downtime-limit": 123});
    let set = from.qmp.execute("migrate-set-parameters", set).await;
    set.expect("downtime-limit set");

    let (cancelled, mut events) = source(&from, dir.path()).await;
    relay::round(&mut events, 1).await;
    cancelled.cancel().await.expect("cancelled");
    assert_eq!(from.status().await, "running");
    assert_eq!(settings(&from.qmp).await, (true, 123));
    assert!(!dir.path().join("out").exists(), "the socket is left");
    from.ticks_past(from.tick() + 5).await;

    let (stopped, mut events) = source(&from, dir.path()).await;
    relay::round(&mut events, 1).await;
    let early = stopped.resume_at_source().await;
    assert!(matches!(early, Err(Error::Phase { .. })), "{early:?}");
    stopped.stop().await.expect("stopped");
    let late = stopped.cancel().await;
    assert!(matches!(late, Err(Error::Phase { .. })), "{late:?}");
    stopped.drained().await.expect("drained");
    assert_eq!(from.status().await, "postmigrate");
    stopped.resume_at_source().await.expect("resumed");
    assert_eq!(settings(&from.qmp).await, (true, 123));
    let before = from.ticks_past(from.tick() + 5).await;

    let to = Guest::start(dir.path(), "to", BUSY, true).await;
    let (source, _events) = source(&from, dir.path()).await;
    let (sink, requests) = sink(&to, dir.path(), &source).await;
    let handover = source.stop().await.expect("stopped");
    let nothing = relay::nothing(&source);
    relay::switch(
        &source,
        &sink,
        requests,
        &handover,
        &nothing,
        Duration::ZERO,
        Duration::ZERO,
    )
    .await;
    settle(&source, &sink, &from, &to, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_fails_before_the_stop_leaves_the_guest_running() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    let (source, mut events) = source(&from, dir.path()).await;
    relay::round(&mut events, 1).await;
    let cancel = from.qmp.execute("migrate_cancel", json!({})).await;
    cancel.expect("cancelled behind our back");
    let failed = loop {
        if let SourceEvent::Failed(error) = events.recv().await.expect("event") {
            break error;
        }
    };
    let running = |error: &Error| {
        matches!(
            error,
            Error::Source {
                state: SourceState::Running,
                ..
            }
        )
    };
    assert!(running(&failed), "{failed}");
    let stop = source.stop().await.expect_err("nothing to stop");
    assert!(running(&stop), "{stop}");
    source.cancel().await.expect("cleaned up");
    from.ticks_past(from.tick() + 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_dies_is_told_to_whoever_places_and_waits() {
    let dir = tempdir();
    let from = booted(dir.path(), IDLE).await;
    let to = Guest::start(dir.path(), "to", IDLE, true).await;
    let (source, _events) = source(&from, dir.path()).await;
    let (sink, mut requests) = sink(&to, dir.path(), &source).await;
    drop(to);
    let failed = sink.failed().await;
    assert!(matches!(failed, Error::Sink { .. }), "{failed}");
    assert!(requests.recv().await.is_none());
    let page = Bytes::from(vec![1; 4096]);
    while let Ok(()) = sink.place(0, 0, page.clone()).await {}
    assert!(matches!(sink.resumed().await, Err(Error::Sink { .. })));
    source.cancel().await.expect("cancelled");
    from.ticks_past(from.tick() + 3).await;
}
