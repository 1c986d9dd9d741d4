use std::time::Duration;

use super::*;
use crate::api::fake::sample_migration;
use crate::api::types::{MigrationState, SpaceProgress};
use crate::migration::easing::Easing;
use crate::migration::flow::Flow;
use crate::state::LatencyBound;
use whimbrel_peer::pace::{Pace, Rate};

fn space(name: &str, kind: SpaceKind, units: u64) -> SpaceProgress {
    SpaceProgress {
        name: name.to_string(),
        kind,
        units_total: units,
        units_live: units / 2,
        units_resident: units / 4,
        units_sent: 0,
        bytes_sent: 0,
    }
}

fn recorder(folder: &Path) -> Recorder {
    Recorder::open(folder, Timestamp::now(), Instant::now()).expect("room")
}

#[test]
fn ram_is_one_space_and_disks_beyond_the_bound_are_another() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut recorder = recorder(folder.path());
    let mut view = sample_migration();
    view.spaces = (0..40)
        .map(|n| space(&format!("disk{n}"), SpaceKind::Disk, 100))
        .chain([
            space("pc.ram", SpaceKind::Ram, 1000),
            space("vga", SpaceKind::Ram, 8),
        ])
        .collect();
    let mut lines = Vec::new();
    let (resident, live) = recorder.residency(&view, &mut lines);
    assert_eq!((resident.len(), lines.len()), (MAX_SPACES, MAX_SPACES));
    assert_eq!(resident.iter().sum::<u64>(), 40 * 25 + 252);
    assert_eq!(live.iter().sum::<u64>(), 40 * 50 + 504);
    // A destination may know of RAM before it knows of disks: what has a number keeps it.
    view.spaces.reverse();
    lines.clear();
    let again = recorder.residency(&view, &mut lines);
    assert_eq!(again.0.iter().sum::<u64>(), 40 * 25 + 252);
    view.spaces = vec![space("vga", SpaceKind::Ram, 8)];
    assert_eq!(recorder.residency(&view, &mut lines).0.len(), MAX_SPACES);
}

#[test]
fn events_have_a_bound_and_phases_are_the_last_to_be_left_out() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut recorder = recorder(folder.path());
    let told = (0..2 * MAX_EVENTS).map(|n| (Instant::now(), Happened::Told(n.to_string())));
    recorder.events_of(told.collect());
    assert_eq!(recorder.events.len(), MAX_EVENTS);
    let phase = (Instant::now(), Happened::Phase(Phase::Drain));
    assert_eq!(recorder.events_of(vec![phase.clone()]).len(), 1);
    recorder.events_of(vec![phase; 3 * MAX_EVENTS]);
    assert_eq!(recorder.events.len(), 2 * MAX_EVENTS);
}

fn kept_of(folder: &Path) -> Kept {
    let kept = read(folder, Timestamp::now()).expect("readable");
    kept.expect("there")
}

/// Keeps a record while `work` goes on, until it is over; what is in the folder then.
async fn recorded(state: &StateDir, work: impl AsyncFnOnce(&Board)) -> (Kept, MigrationView) {
    let view = sample_migration();
    let folder = state.migration_folder(&view.id);
    let board = Arc::new(Board::new(view));
    let flow = Arc::new(Flow::default());
    let easing = Arc::new(Easing::new(LatencyBound(None)));
    let pace = Pace::new(Rate::Unlimited);
    keep(
        state,
        board.clone(),
        Meters::source(&flow, &easing, &pace, &pace),
    );
    work(&board).await;
    board.end(Phase::Complete, MigrationState::Completed);
    loop {
        match read_view(&folder) {
            Some(view) if view.ended.is_some() => return (kept_of(&folder), view),
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

fn phases(kept: &Kept) -> Vec<Phase> {
    let phase = |event: &Event| match event.what {
        Happened::Phase(phase) => Some(phase),
        _ => None,
    };
    kept.events.iter().filter_map(phase).collect()
}

#[tokio::test]
async fn phases_that_pass_in_a_moment_are_recorded_all_the_same() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let state = StateDir::init(folder.path()).expect("room");
    state.add_migration(&sample_migration().id).expect("room");
    let all = [Phase::Copy, Phase::Quiesce, Phase::Grant, Phase::Drain];
    let (kept, view) = recorded(&state, async |board| {
        all.iter().for_each(|&phase| board.phase(phase));
    })
    .await;
    let mut expected = vec![Phase::Prepare];
    expected.extend(all);
    expected.push(Phase::Complete);
    assert_eq!(phases(&kept), expected);
    assert_eq!(view.state, MigrationState::Completed);
    assert!(!kept.stretches.is_empty());
}

#[tokio::test]
async fn another_daemon_goes_on_with_the_record() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let state = StateDir::init(folder.path()).expect("room");
    let id = sample_migration().id;
    let place = state.add_migration(&id).expect("room");
    let begun = Timestamp::from_unix(1_750_000_000);
    {
        let (mut file, _) = TimelineFile::open(&place, begun).expect("room");
        let first = Stretch {
            from_ms: 0,
            to_ms: 250,
            ram_bytes: 77,
            ..Stretch::default()
        };
        file.append(&[Line::stretch(first)]).expect("room");
    }
    let (kept, _) = recorded(&state, async |board| board.mark(Happened::Restarted)).await;
    assert_eq!(kept.started, begun);
    assert_eq!(kept.stretches[0].ram_bytes, 77);
    // Years after, and nobody kept the record in between.
    assert!(kept.stretches.len() > 1 && kept.stretches[1].from_ms > 1_000_000);
    assert!(
        kept.events
            .iter()
            .any(|e| e.what == Happened::Restarted && e.at_ms > 1_000_000)
    );
}

#[test]
fn only_the_newest_records_of_what_is_over_are_kept() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let state = StateDir::init(folder.path()).expect("room");
    let named = |n: usize| -> MigrationId { format!("{n:032x}").parse().expect("an id") };
    for n in 0..MAX_RECORDS + 3 {
        let place = state.add_migration(&named(n)).expect("room");
        std::fs::write(place.join(TIMELINE), "").expect("room");
        if n != 1 {
            crate::migration::record::mark_over(&place);
        }
        let file = std::fs::File::open(place.join(TIMELINE)).expect("there");
        let then = std::time::UNIX_EPOCH + Duration::from_secs(n as u64);
        file.set_modified(then).expect("settable");
    }
    clear_away(&state, &named(MAX_RECORDS + 2));
    let has = |n| state.migration_folder(&named(n)).join(TIMELINE).exists();
    assert!(!has(0) && !has(2) && has(1) && has(4) && has(MAX_RECORDS + 2));
    let left = (0..MAX_RECORDS + 3).filter(|&n| has(n)).count();
    // The one that goes on and the one that begins are beside those that are over.
    assert_eq!(left, MAX_RECORDS + 1);
}
