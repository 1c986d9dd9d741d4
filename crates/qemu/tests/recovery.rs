//! Both QEMUs after the death of the daemon between them.
//!
//! At the destination that death is a dropped sink: the socket closes. At the source it is a process of
//! its own (this test binary again) that aborts, since a source's reader outlives its owner in-process.

#[allow(dead_code, reason = "shared with the other tests")]
mod guest;
#[allow(dead_code, reason = "shared with the other tests")]
mod relay;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use guest::{BUSY, Guest, IDLE, Load};
use serde_json::json;
use tokio::sync::mpsc;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;
use whimbrel_qemu::Error;
use whimbrel_qemu::content::RamContent;
use whimbrel_qemu::paused::PausedRam;
use whimbrel_qemu::qmp::Qmp;
use whimbrel_qemu::sink::{
    DestinationState, PostcopySink, Request, destination_state, gave_up_loading,
};
use whimbrel_qemu::source::{RamSource, SourceEvent, SourceOptions, take_back};
use whimbrel_qemu::store::UnitState;
use whimbrel_qemu::stream::StreamLayout;

fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary directory")
}

async fn booted(dir: &Path, load: Load) -> Guest {
    let guest = Guest::start(dir, "from", load, false).await;
    guest.ticks_past(3).await;
    guest
}

async fn source(guest: &Guest, dir: &Path) -> (RamSource, mpsc::Receiver<SourceEvent>) {
    let started = RamSource::start(guest.qmp.clone(), SourceOptions::new(dir.join("out"))).await;
    started.expect("source started")
}

async fn paused(guest: &Guest, layout: &StreamLayout) -> Result<Arc<PausedRam>, Error> {
    let pid = guest.qmp.pid().expect("a local QEMU").unsigned_abs();
    PausedRam::open(&guest.qmp, pid, layout).await
}

/// What `query-migrate` and `query-status` say.
async fn query(qmp: &Qmp) -> String {
    let migration = qmp.execute("query-migrate", json!({})).await;
    let status = qmp.execute("query-status", json!({})).await;
    let (migration, status) = (migration.expect("answer"), status.expect("answer"));
    let migration = migration["status"].as_str().unwrap_or("none");
    format!(
        "{migration}, {}",
        status["status"].as_str().expect("status")
    )
}

async fn state(to: &Guest) -> DestinationState {
    destination_state(&to.qmp).await.expect("state")
}

/// What may not be taken up, and why.
async fn refused(to: &Guest, dir: &Path, layout: &StreamLayout) -> DestinationState {
    match PostcopySink::recover(&to.qmp, &dir.join("again"), layout).await {
        Err(Error::NotRecoverable { state }) => state,
        other => panic!("{other:?}"),
    }
}

/// A destination's feeder, and what it has still to place.
struct Feeder {
    sink: PostcopySink,
    requests: mpsc::Receiver<Request>,
    missing: Vec<UnitSet>,
}

impl Feeder {
    /// A feeder whose predecessor has died, and the units that QEMU has.
    async fn recover(to: &Guest, dir: &Path, layout: &StreamLayout) -> (Feeder, Vec<UnitSet>) {
        let recovered = PostcopySink::recover(&to.qmp, &dir.join("again"), layout).await;
        let (sink, requests, received) = recovered.expect("recovered");
        let missing = received.iter().map(|set| {
            let mut missing = UnitSet::full(set.capacity());
            missing.subtract(set);
            missing
        });
        let feeder = Feeder {
            sink,
            requests,
            missing: missing.collect(),
        };
        (feeder, received)
    }

    async fn place(&mut self, content: &RamContent, block: usize, extent: Extent) -> u64 {
        let wanted: Vec<Extent> = self.missing[block].runs_within(extent).collect();
        let mut placed = 0;
        for run in wanted {
            self.missing[block].remove(run);
            content.wait_current(block, run).await;
            let mut data = Vec::new();
            let read = content.read(block, run.start, run.len, &mut data);
            read.expect("content");
            let sent = self.sink.place(block, run.start, data.into()).await;
            sent.expect("placed");
            placed += run.len;
        }
        placed
    }

    /// Answers that many demands for pages not on their way.
    async fn answer(&mut self, content: &RamContent, mut pages: u64) {
        while pages > 0 {
            let (block, extent) = self.requests.recv().await.expect("the sink lives");
            pages = pages.saturating_sub(self.place(content, block, extent).await);
        }
    }

    /// Places everything, demands first, and ends the migration.
    async fn finish(mut self, content: &RamContent) {
        loop {
            let next =
                |(block, missing): (usize, &UnitSet)| Some((block, missing.next_run(0, 16)?));
            let push = self.missing.iter().enumerate().find_map(next);
            let (block, extent) = tokio::select! {
                biased;
                Some(request) = self.requests.recv() => request,
                () = async {}, if push.is_some() => push.expect("checked"),
                else => break,
            };
            self.place(content, block, extent).await;
            if self.missing.iter().all(UnitSet::is_empty) {
                break;
            }
        }
        self.sink.resumed().await.expect("runs");
        self.sink.finish().await.expect("finished");
    }
}

/// A guest that was switched to `to` with no page there, and its first feeder.
async fn switched(dir: &Path, to: &Guest, source: &RamSource) -> Feeder {
    let layout = source.layout();
    let started = PostcopySink::start(&to.qmp, &dir.join("in"), layout).await;
    let (sink, requests) = started.expect("sink started");
    assert_eq!(state(to).await, DestinationState::NeverRan);
    assert_eq!(refused(to, dir, layout).await, DestinationState::NeverRan);
    let handover = source.stop().await.expect("stopped");
    let nothing = relay::nothing(source);
    let run = sink.run(&handover.device_state, &nothing).await;
    run.expect("run");
    let blocks = layout.blocks.iter();
    Feeder {
        sink,
        requests,
        missing: blocks.map(|b| UnitSet::full(b.units())).collect(),
    }
}

fn words(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_default()
}

fn count(sets: &[UnitSet]) -> u64 {
    sets.iter().map(UnitSet::len).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn feeders_die_in_the_drain_and_in_the_recovery_and_the_guest_is_whole() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    let to = Guest::start(dir.path(), "to", BUSY, true).await;
    assert_eq!(state(&to).await, DestinationState::NeverRan);
    let (source, mut events) = source(&from, dir.path()).await;
    relay::round(&mut events, 1).await;
    let stored = serde_json::to_string(source.layout()).expect("stored");
    let layout: StreamLayout = serde_json::from_str(&stored).expect("read back");
    assert_eq!(&layout, source.layout());
    let before = from.tick();
    let mut first = switched(dir.path(), &to, &source).await;
    let store = RamContent::Store(source.store().clone());
    first.answer(&store, 3000).await;
    assert_eq!(state(&to).await, DestinationState::Fed);
    drop(first);

    source.drained().await.expect("drained");
    let content = RamContent::Paused(paused(&from, &layout).await.expect("opened"));
    drop((source, store));
    // One that is let in and dies before it says a word.
    let path = dir.path().join("half");
    let uri = json!({ "uri": format!("unix:{}", path.display()) });
    while to
        .qmp
        .execute_oob("migrate-recover", uri.clone())
        .await
        .is_err()
    {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(std::os::unix::net::UnixStream::connect(&path).expect("connected"));
    // One that is let in and never comes: its path is stale.
    let path = dir.path().join("again");
    let uri = json!({ "uri": format!("unix:{}", path.display()) });
    while to
        .qmp
        .execute_oob("migrate-recover", uri.clone())
        .await
        .is_err()
    {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let (mut second, received) = Feeder::recover(&to, dir.path(), &layout).await;
    assert!(count(&received) > 0);
    second.answer(&content, 2000).await;
    let unit = received.iter().enumerate();
    let unit = unit
        .filter_map(|(b, set)| Some((b, set.next_present(0)?)))
        .next();
    let (block, unit) = unit.expect("something was received");
    let again = second.sink.place_zero(block, Extent::unit(unit)).await;
    assert!(matches!(again, Err(Error::PlacedTwice { .. })), "{again:?}");
    drop(second);

    let (third, more) = Feeder::recover(&to, dir.path(), &layout).await;
    assert!(count(&more) > count(&received));
    third.finish(&content).await;
    let arrived = to.ticks_past(before).await;
    to.ticks_past(arrived + 10).await;
    assert_eq!(query(&to.qmp).await, "completed, running");
    assert_eq!(state(&to).await, DestinationState::Complete);
    let late = refused(&to, dir.path(), &layout).await;
    assert_eq!(late, DestinationState::Complete);
    assert_eq!(query(&from.qmp).await, "completed, postmigrate");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_feeder_dies_while_qemu_loads_its_devices() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    for pages in [0, 20, 60, 150, 400] {
        // Four QEMUs write to the same log, one after the other.
        let logged = words(&dir.path().join("to.log")).len() as u64;
        let to = Guest::start(dir.path(), "to", BUSY, true).await;
        let mut happened = to.qmp.events();
        let (source, mut events) = source(&from, dir.path()).await;
        relay::round(&mut events, 1).await;
        let before = from.tick();
        let mut first = switched(dir.path(), &to, &source).await;
        let content = RamContent::Store(source.store().clone());
        first.answer(&content, pages).await;
        drop(first);
        let layout = source.layout();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let spare = dir.path().join("to.spare");
        let fresh = Qmp::connect(&spare);
        let fresh = tokio::time::timeout(Duration::from_secs(1), fresh).await;
        let recovered = PostcopySink::recover(&to.qmp, &dir.path().join("again"), layout).await;
        let ran = std::iter::from_fn(|| happened.try_next()).any(|e| e.name == "RESUME");
        eprintln!(
            "{pages} pages: ran {ran}, a new monitor {}, recovery {:?}",
            matches!(fresh, Ok(Ok(_))),
            recovered.as_ref().map(|(_, _, received)| count(received)),
        );
        let log = dir.path().join("to.log");
        eprintln!("{}", words(&log));
        match recovered {
            Ok(first) => {
                assert!(!gave_up_loading(&log, logged).expect("the log"));
                drop(first);
                let (second, _) = Feeder::recover(&to, dir.path(), layout).await;
                second.finish(&content).await;
                to.ticks_past(before).await;
            }
            Err(Error::NotRecoverable {
                state: state @ (DestinationState::Gone | DestinationState::LostLoading),
            }) => {
                assert!(!ran, "a guest that ran was lost");
                // One that hangs may have said so first, too.
                let proven = gave_up_loading(&log, logged).expect("the log");
                assert!(proven || state != DestinationState::Gone, "{}", words(&log));
            }
            Err(other) => panic!("{other}"),
        }
        // The two share a disk: its lock is free once the other QEMU has died.
        drop(to);
        source.drained().await.expect("drained");
        while let Err(error) = source.resume_at_source().await {
            assert!(error.to_string().contains("lock"), "{error}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        from.ticks_past(before).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_qemu_holds_what_the_store_holds() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    let (source, mut events) = source(&from, dir.path()).await;
    relay::round(&mut events, 1).await;
    let (layout, store) = (source.layout(), source.store());
    let running = paused(&from, layout).await;
    assert!(
        matches!(running, Err(Error::NotStopped { .. })),
        "{running:?}"
    );
    source.stop().await.expect("stopped");
    source.drained().await.expect("drained");
    let paused = paused(&from, layout).await.expect("opened");
    let mut live = 0;
    for (block, found) in layout.blocks.iter().enumerate() {
        for unit in found.whole().iter() {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            paused.read(block, unit, 1, &mut ours).expect("read");
            store.read(block, unit, 1, &mut theirs).expect("current");
            assert!(ours == theirs, "unit {unit} of {}", found.name);
            live += u64::from(store.state(block, unit) == UnitState::Held);
        }
    }
    assert!(live > 10_000, "{live}");
    let past = paused.read(0, layout.blocks[0].units(), 1, &mut Vec::new());
    assert!(matches!(past, Err(Error::OutOfBlock { .. })), "{past:?}");
    source.resume_at_source().await.expect("resumed");
    let resumed = loop {
        match paused.read(0, 0, 1, &mut Vec::new()) {
            Ok(()) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(error) => break error,
        }
    };
    assert!(matches!(resumed, Error::NotStopped { .. }), "{resumed}");
}

/// Not a test by itself: the daemon of the tests below. Dies where it was told to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_dies() {
    let variable = |name: &str| std::env::var(format!("WHIMBREL_TEST_{name}"));
    let (Ok(death), Ok(dir)) = (variable("DEATH"), variable("DIR")) else {
        return;
    };
    let dir = Path::new(&dir);
    let qmp = Qmp::connect(&dir.join("from.spare"))
        .await
        .expect("monitor");
    let started = RamSource::start(qmp, SourceOptions::new(dir.join("out"))).await;
    let (source, mut events) = started.expect("source started");
    relay::round(&mut events, 1).await;
    let layout = serde_json::to_vec(source.layout()).expect("stored");
    std::fs::write(dir.join("layout"), layout).expect("stored");
    if death != "copying" {
        source.stop().await.expect("stopped");
    }
    if death == "drained" {
        source.drained().await.expect("drained");
    }
    std::process::abort();
}

/// Lets that daemon die, and returns the layout it has left.
fn die(dir: &Path, death: &str) -> StreamLayout {
    let died = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "a_daemon_that_dies"])
        .env("WHIMBREL_TEST_DEATH", death)
        .env("WHIMBREL_TEST_DIR", dir)
        .output()
        .expect("started");
    let log = String::from_utf8_lossy(&died.stderr);
    assert!(!died.status.success() && !log.contains("panicked"), "{log}");
    let layout = std::fs::read(dir.join("layout")).expect("stored");
    serde_json::from_slice(&layout).expect("stored")
}

/// Waits for QEMU to notice.
async fn settles_as(guest: &Guest, expected: &str) {
    let until = std::time::Instant::now() + Duration::from_secs(120);
    loop {
        let now = query(&guest.qmp).await;
        if now == expected {
            return;
        }
        assert!(std::time::Instant::now() < until, "{now}, not {expected}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_runs_again_wherever_its_daemon_died() {
    let dir = tempdir();
    let from = booted(dir.path(), BUSY).await;
    for (death, left) in [
        ("copying", "failed, running"),
        ("stopped", "postcopy-active, finish-migrate"),
        ("drained", "completed, postmigrate"),
    ] {
        let layout = die(dir.path(), death);
        settles_as(&from, left).await;
        assert_eq!(paused(&from, &layout).await.is_ok(), death != "copying");
        let back = take_back(&from.qmp, &dir.path().join("back")).await;
        back.expect("taken back");
        assert_eq!(from.status().await, "running");
        from.ticks_past(from.tick() + 3).await;
        let known = from
            .qmp
            .execute("query-migrate-capabilities", json!({}))
            .await;
        let known = known.expect("capabilities");
        let on = known.as_array().expect("a list").iter();
        let on: Vec<_> = on.filter(|c| c["state"] == true).collect();
        assert!(on.is_empty(), "left on: {on:?}");
        let parameters = from
            .qmp
            .execute("query-migrate-parameters", json!({}))
            .await;
        assert_eq!(parameters.expect("parameters")["downtime-limit"], 300);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_was_handed_over_stays_stopped_when_its_daemon_dies() {
    for load in [IDLE, BUSY] {
        let dir = tempdir();
        let from = booted(dir.path(), load).await;
        for _ in 0..3 {
            die(dir.path(), "stopped");
            // Long enough for a QEMU that would resume it by itself.
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert_ne!(from.status().await, "running");
            let back = take_back(&from.qmp, &dir.path().join("back")).await;
            back.expect("taken back");
        }
    }
}
