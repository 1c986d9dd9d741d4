//! What this host knows of a migration over time, whether or not a daemon has lived through it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::api::ApiError;
use crate::api::ErrorCode;
use crate::api::types::{ReportEntry, ReportView, TimelineView};
use crate::daemon::Daemon;
use crate::migration::recording::{read, read_view};
use crate::report::{elsewhere, summary};
use crate::state::{MigrationId, Timestamp};

use super::errors::no_migration;

/// How long the record of a migration that has just ended is waited for.
const AT_MOST: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl Daemon {
    /// Newest first.
    pub(super) async fn known_reports(&self) -> Result<Vec<ReportEntry>, ApiError> {
        let held: BTreeMap<MigrationId, ReportEntry> = self
            .migrations()
            .iter()
            .map(|(id, held)| (id.clone(), ReportEntry::from(&held.board.view())))
            .collect();
        let state = self.host.state.clone();
        beside(move || {
            let mut entries = held;
            for id in state.migrations()?.records {
                if let Some(view) = read_view(&state.migration_folder(&id))
                    && (view.ended.is_some() || !entries.contains_key(&id))
                {
                    entries.insert(id, ReportEntry::from(&view));
                }
            }
            let mut entries: Vec<_> = entries.into_values().collect();
            entries.sort_by(|a, b| b.started.cmp(&a.started).then(a.id.cmp(&b.id)));
            Ok(entries)
        })
        .await
    }

    pub(super) async fn report_of(&self, id: MigrationId) -> Result<ReportView, ApiError> {
        let held = self.migrations().get(&id).map(Arc::clone);
        let held = held.map(|held| held.board.view());
        let folder = self.host.state.migration_folder(&id);
        if held.as_ref().is_some_and(|view| view.ended.is_some()) {
            is_written(&folder).await;
        }
        let host = self.host.name.clone();
        beside(move || {
            // A daemon that only tells its peer of an end once more knows nothing but that.
            let told = read_view(&folder);
            let view = match told {
                Some(told) if told.ended.is_some() => Some(told),
                told => held.or(told),
            };
            let view = view.ok_or_else(|| {
                no_migration(&id).next_step("`whimbrel report --list` shows those known here")
            })?;
            let timeline = match read(&folder, view.started)? {
                Some(kept) => TimelineView::from(kept),
                None => nothing_since(view.started),
            };
            let summary = summary(&view, &timeline);
            Ok(ReportView {
                host,
                elsewhere: elsewhere(&view, &summary, &timeline),
                migration: view,
                summary,
                timeline,
            })
        })
        .await
    }
}

/// Waits until the end that was told has been written down too: a matter of milliseconds, if it can be at all.
async fn is_written(folder: &Path) {
    let until = Instant::now() + AT_MOST;
    while Instant::now() < until {
        let folder = folder.to_path_buf();
        let view = beside(move || Ok(read_view(&folder))).await;
        if matches!(view, Ok(Some(view)) if view.ended.is_some()) {
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn nothing_since(started: Timestamp) -> TimelineView {
    TimelineView {
        started,
        resolution_ms: whimbrel_engine::timeline::FINEST_MS,
        spaces: Vec::new(),
        events: Vec::new(),
        stretches: Vec::new(),
        damaged_lines: 0,
    }
}

/// Reads files where waiting for a disk holds up nobody.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        ApiError::new(
            ErrorCode::Internal,
            format!("reading a migration's record failed: {error}"),
        )
    })?
}
