//! The record of a migration over time: a task beside its driver that looks at the board and at the meters four
//! times a second and writes down what has changed since.
//!
//! The driver waits for none of this. What happens at a moment (a phase, the stop) is marked on the board with its
//! time, where it costs a push to a list; everything else is read off what is told and counted anyway. What is
//! written goes to two files of the migration's folder:
//!
//! ```text
//!   timeline     stretches and events, a line each (see `file`); gone on with by a restarted daemon
//!   view.json    what was told last; written when a phase begins, and at the end. Not during the switchover: the
//!                fsyncs of it and of the journals would wait for each other
//! ```
//!
//! Nothing rests on either: a record that cannot be written is told of once, and the migration goes on. It ends with
//! the migration; the driver may go before, and then the last look is what there is.

pub mod file;
mod meters;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_engine::space::SpaceKind;
use whimbrel_engine::switchover::Phase;
use whimbrel_engine::timeline::{Added, BOUND, FINEST_MS, Stretch, Timeline};

pub use self::file::{Kept, TIMELINE, read};
use self::file::{Line, TimelineFile};
pub use self::meters::Meters;
use self::meters::Reading;
use super::board::Board;
use super::record::is_over;
use crate::api::types::{Event, Happened, MigrationView, TimelineSpace};
use crate::state::{MigrationId, StateDir, StateError, Timestamp};

/// How often is looked. As long as a slot of the timeline is at first.
const LOOK: Duration = Duration::from_millis(FINEST_MS);

/// Most events of a record. Beyond it phases and marks are kept up to twice as many, and nothing else.
const MAX_EVENTS: usize = 512;

/// Most spaces of a record, RAM being one; further disks are counted with the last of them.
const MAX_SPACES: usize = 16;

/// Timelines of migrations that are over; those of the oldest are removed when another begins.
pub const MAX_RECORDS: usize = 256;

const VIEW: &str = "view.json";

/// Keeps the record of a migration until it is over.
pub fn keep(state: &StateDir, board: Arc<Board>, meters: Meters) {
    let state = state.clone();
    let view = board.view();
    tokio::spawn(async move {
        let folder = state.migration_folder(&view.id);
        let opened = tokio::task::spawn_blocking({
            let folder = folder.clone();
            let clock = board.clock();
            move || {
                clear_away(&state, &view.id);
                let told = read_view(&folder);
                if told.is_some_and(|told| told.ended.is_some()) {
                    return Ok(None);
                }
                Recorder::open(&folder, view.started, clock).map(Some)
            }
        });
        match opened.await {
            Ok(Ok(Some(recorder))) => recorder.run(board, meters, view.phase).await,
            Ok(Err(error)) => {
                tracing::warn!(%error, "there will be no record of a migration over time");
            }
            // It was over already, and the peer is only to be told so again; or the runtime is going down.
            Ok(Ok(None)) | Err(_) => {}
        }
    });
}

/// What was told last of the migration in this folder.
pub fn read_view(folder: &Path) -> Option<MigrationView> {
    let text = StateDir::read_text(&folder.join(VIEW)).ok()??;
    serde_json::from_str(&text)
        .inspect_err(|error| tracing::warn!(%error, "what was told of a migration cannot be read"))
        .ok()
}

/// Removes the timelines of all but the newest migrations that are over. Their journals stay.
fn clear_away(state: &StateDir, but: &MigrationId) {
    let Ok(listing) = state.migrations() else {
        return;
    };
    let written = |id: &MigrationId| {
        let folder = state.migration_folder(id);
        let path = folder.join(TIMELINE);
        let written = std::fs::metadata(&path).and_then(|m| m.modified()).ok()?;
        is_over(&folder).then_some((written, path))
    };
    let others = listing.records.iter().filter(|id| *id != but);
    let mut over: Vec<_> = others.filter_map(written).collect();
    over.sort();
    let many = over.len().saturating_sub(MAX_RECORDS - 1);
    for (_, path) in over.drain(..many) {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "an old record cannot be removed");
        }
    }
}

fn in_switchover(phase: Phase) -> bool {
    matches!(phase, Phase::Quiesce | Phase::Grant | Phase::Accept)
}

struct Recorder {
    folder: PathBuf,
    file: TimelineFile,
    started: Timestamp,
    /// This daemon's clock, and what of the migration's time had passed at its zero.
    clock: Instant,
    before_ms: u64,
    timeline: Timeline,
    spaces: Vec<TimelineSpace>,
    events: Vec<Event>,
    last: Reading,
    /// Until when there is a record.
    at_ms: u64,
    failed: bool,
}

impl Recorder {
    fn open(folder: &Path, began: Timestamp, clock: Instant) -> Result<Recorder, StateError> {
        let (file, kept) = TimelineFile::open(folder, began)?;
        let before = kept.started.age().saturating_sub(clock.elapsed());
        let before_ms = before.as_millis() as u64;
        let end = kept.stretches.last().map_or(0, |s| s.to_ms);
        let is_new = kept.stretches.is_empty() && kept.events.is_empty();
        let timeline = Timeline::resumed(kept.resolution_ms, BOUND, kept.stretches);
        Ok(Recorder {
            folder: folder.to_path_buf(),
            file,
            started: kept.started,
            clock,
            before_ms,
            timeline,
            spaces: kept.spaces,
            events: kept.events,
            last: Reading::default(),
            // Nobody kept the record while there was no daemon.
            at_ms: if is_new { 0 } else { before_ms.max(end) },
            failed: false,
        })
    }

    async fn run(mut self, board: Arc<Board>, meters: Meters, began_with: Phase) {
        let mut news = board.watch();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told_phase = None;
        let mut lines = Vec::new();
        if self.events.is_empty() {
            lines = self.events_of(vec![(self.clock, Happened::Phase(began_with))]);
        }
        loop {
            let view = board.view();
            lines.extend(self.events_of(board.take_happened()));
            let is_over = view.ended.is_some();
            let Some(reading) = meters.read() else {
                // The driver has gone, and all it knew with it.
                let closed = self.timeline.finish();
                lines.extend(self.after(closed));
                self.write(lines, Some(view)).await;
                return;
            };
            lines.extend(self.look(&view, reading));
            if is_over {
                let closed = self.timeline.finish();
                lines.extend(self.after(closed));
            }
            let is_news = told_phase != Some(view.phase) && !in_switchover(view.phase) || is_over;
            told_phase = Some(view.phase);
            let written = std::mem::take(&mut lines);
            self = self.write(written, is_news.then_some(view)).await;
            if is_over {
                return;
            }
            // The end is not waited for: what the meters say must be read while there are some.
            loop {
                tokio::select! {
                    _ = look.tick() => break,
                    changed = news.changed() => match changed {
                        Ok(()) if news.borrow_and_update().ended.is_some() => break,
                        Ok(()) => {}
                        Err(_) => return,
                    },
                }
            }
        }
    }

    fn now_ms(&self) -> u64 {
        self.before_ms + self.clock.elapsed().as_millis() as u64
    }

    fn events_of(&mut self, happened: Vec<(Instant, Happened)>) -> Vec<Line> {
        let mut lines = Vec::new();
        for (at, what) in happened {
            let most = match what {
                Happened::Told(_) | Happened::LinkDown | Happened::LinkUp => MAX_EVENTS,
                _ => 2 * MAX_EVENTS,
            };
            let since = at.saturating_duration_since(self.clock);
            let event = Event {
                at_ms: self.before_ms + since.as_millis() as u64,
                what,
            };
            if self.events.len() < most {
                self.events.push(event.clone());
                lines.push(Line::Event(event));
            }
        }
        lines
    }

    /// What has happened since the last look.
    fn look(&mut self, view: &MigrationView, mut reading: Reading) -> Vec<Line> {
        let (from_ms, to_ms) = (self.at_ms, self.now_ms().max(self.at_ms));
        self.at_ms = to_ms;
        let mut lines = Vec::new();
        let mut stretch = reading.since(&mut self.last, from_ms, to_ms);
        if !view.link.connected || view.link.waiting_for.is_some() {
            stretch.down_ms = to_ms - from_ms;
        }
        stretch.held_to = view.push_held_to;
        stretch.rtt_us = view.link.rtt_ms.map_or(0, |ms| (ms * 1e3) as u64);
        let (resident, live) = self.residency(view, &mut lines);
        stretch.resident = resident;
        stretch.live = live;
        self.last = reading;
        let added = self.timeline.add(stretch);
        lines.extend(self.after(added));
        lines
    }

    fn after(&self, added: Added) -> Vec<Line> {
        let closed = self.timeline.closed();
        match added {
            Added::Open => Vec::new(),
            Added::Closed => closed
                .last()
                .cloned()
                .map(Line::stretch)
                .into_iter()
                .collect(),
            Added::Thinned => vec![Line::Anew],
        }
    }

    /// Units that are there, and that have to be, by space as they are numbered here.
    fn residency(&mut self, view: &MigrationView, lines: &mut Vec<Line>) -> (Vec<u64>, Vec<u64>) {
        let mut now: Vec<(TimelineSpace, u64, u64)> = Vec::new();
        for space in &view.spaces {
            let name = match space.kind {
                SpaceKind::Disk => space.name.as_str(),
                SpaceKind::Ram => "RAM",
            };
            let same = now
                .iter()
                .position(|(s, ..)| s.kind == space.kind && s.name == name);
            let full = now.len() >= MAX_SPACES;
            match same.or(full.then(|| now.len() - 1)) {
                Some(n) => {
                    let (sum, resident, live) = &mut now[n];
                    sum.units_total += space.units_total;
                    *resident += space.units_resident;
                    *live += space.units_live;
                }
                None => now.push((
                    TimelineSpace {
                        name: name.to_string(),
                        kind: space.kind,
                        units_total: space.units_total,
                    },
                    space.units_resident,
                    space.units_live,
                )),
            }
        }
        if now.is_empty() {
            return (Vec::new(), Vec::new());
        }
        let (mut resident, mut live) = (vec![0; self.spaces.len()], vec![0; self.spaces.len()]);
        for (space, is_there, has_to) in now {
            let known = |s: &TimelineSpace| s.kind == space.kind && s.name == space.name;
            let n = match self.spaces.iter().position(known) {
                Some(n) if self.spaces[n] == space => n,
                Some(n) => {
                    self.spaces[n] = space.clone();
                    lines.push(Line::Space(space));
                    n
                }
                None if self.spaces.len() < MAX_SPACES => {
                    self.spaces.push(space.clone());
                    lines.push(Line::Space(space));
                    resident.push(0);
                    live.push(0);
                    self.spaces.len() - 1
                }
                None => MAX_SPACES - 1,
            };
            resident[n] += is_there;
            live[n] += has_to;
        }
        (resident, live)
    }

    /// Writes where waiting for a disk holds up nobody but this task.
    async fn write(mut self, lines: Vec<Line>, view: Option<MigrationView>) -> Recorder {
        if lines.is_empty() && view.is_none() {
            return self;
        }
        let kept = lines.contains(&Line::Anew).then(|| Kept {
            started: self.started,
            resolution_ms: self.timeline.slot_ms(),
            spaces: self.spaces.clone(),
            events: self.events.clone(),
            stretches: self.timeline.closed().to_vec(),
            damaged_lines: 0,
        });
        let path = self.folder.join(VIEW);
        let writing = tokio::task::spawn_blocking(move || {
            let written = match &kept {
                Some(kept) => self.file.replace(kept),
                None => self.file.append(&lines),
            };
            let told = view.map_or(Ok(()), |view| {
                let text = serde_json::to_vec(&view).expect("a view is plain data");
                StateDir::replace_file(&path, &text)
            });
            if let (Err(error), false) = (written.and(told), self.failed) {
                self.failed = true;
                tracing::warn!(%error, "the record of a migration over time has gaps");
            }
            self
        });
        writing.await.expect("writing a record does not panic")
    }
}

impl Line {
    fn stretch(stretch: Stretch) -> Line {
        Line::Stretch(Box::new(stretch))
    }
}

#[cfg(test)]
mod tests;
