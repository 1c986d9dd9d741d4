//! What the guests read and write of their volumes: logged always, kept over restarts.
//!
//! Each volume that was served since the daemon started has its log here, and keeps it while machines come
//! and go. Every `EVERY` what changed is written to `heat` in the volume's folder, replaced whole; a
//! crash loses that much of a hint. After every [`HALF_LIFE`] all counters are halved. Time in which no
//! daemon runs does not count.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use whimbrel_volume::heat::{AccessKind, AccessLog, HEAT_EXTENT, WEIGHT};
use whimbrel_volume::heat_file;
use whimbrel_volume::pool::Lane;

use crate::api::ApiError;
use crate::api::types::{HeatExtent, HeatView};
use crate::daemon::Daemon;
use crate::host::Host;
use crate::state::{Name, StateDir, VolumeRecord};

/// How often heat is written down.
const EVERY: Duration = Duration::from_secs(60);

/// After this long an access counts half.
pub const HALF_LIFE: Duration = Duration::from_secs(15 * 60);

/// Latest accesses remembered one by one: 256 KiB a volume.
const RING: usize = 16_384;

const FILE: &str = "heat";

/// A volume's access log, with the clock it goes by.
pub struct Heat {
    log: AccessLog,
    since: Duration,
    size: u64,
    file: PathBuf,
    /// Accesses and halvings when it was last written down.
    kept: AtomicU64,
    halvings: AtomicU64,
}

impl Heat {
    /// The log of a volume of `size` bytes, going on from its file if there is one.
    pub fn open(file: PathBuf, size: u64) -> Heat {
        let heat = Heat {
            log: AccessLog::new(size, RING),
            since: coarse_now(),
            size,
            file,
            kept: AtomicU64::new(0),
            halvings: AtomicU64::new(0),
        };
        match std::fs::read(&heat.file) {
            Ok(bytes) => {
                if let Err(fault) = heat_file::restore(&heat.log, size, &bytes) {
                    tracing::warn!(file = %heat.file.display(), %fault, "what was hot is not known any more");
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(file = %heat.file.display(), %error, "what was hot cannot be read");
            }
        }
        heat
    }

    /// Logs an access.
    pub fn log(&self, kind: AccessKind, offset: u64, len: u64) {
        let at = coarse_now().saturating_sub(self.since);
        self.log.log(at.as_millis() as u32, kind, offset, len);
    }

    pub fn access_log(&self) -> &AccessLog {
        &self.log
    }

    fn state(&self) -> u64 {
        self.log.count() + self.halvings.load(Ordering::Relaxed)
    }

    fn save(&self) {
        let now = self.state();
        if self.kept.load(Ordering::Relaxed) == now {
            return;
        }
        let bytes = heat_file::encode(self.size, &self.log.snapshot());
        // A volume that has gone meanwhile has no folder; there is nothing to keep then.
        if self.file.parent().is_some_and(|folder| folder.is_dir()) {
            match StateDir::replace_file(&self.file, &bytes) {
                Ok(()) => self.kept.store(now, Ordering::Relaxed),
                Err(error) => tracing::warn!(%error, "what is hot cannot be written down"),
            }
        }
    }
}

/// The time by the clock that is read fastest, which is exact to some milliseconds: every request pays.
fn coarse_now() -> Duration {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The logs of all volumes that were served.
#[derive(Default)]
pub struct HeatShelf(Mutex<BTreeMap<Name, Arc<Heat>>>);

impl HeatShelf {
    fn shelf(&self) -> MutexGuard<'_, BTreeMap<Name, Arc<Heat>>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    /// A volume's log, from its file if need be.
    pub fn of(&self, state: &StateDir, record: &VolumeRecord) -> Arc<Heat> {
        let mut shelf = self.shelf();
        match shelf.get(&record.name) {
            Some(heat) if heat.size == record.size => heat.clone(),
            _ => {
                let file = state.volume_folder(&record.name).join(FILE);
                let heat = Arc::new(Heat::open(file, record.size));
                shelf.insert(record.name.clone(), heat.clone());
                heat
            }
        }
    }

    /// The volume goes, or is not what it was.
    pub fn forget(&self, name: &Name) {
        self.shelf().remove(name);
    }

    /// Writes down what changed.
    pub async fn save(&self, host: &Host) {
        let all: Vec<_> = self.shelf().values().cloned().collect();
        for heat in all {
            // The pool stops with the daemon only; then the last minute is lost.
            let _ = host.pool.run(Lane::Slow, move || heat.save()).await;
        }
    }

    fn decay(&self) {
        for heat in self.shelf().values() {
            heat.log.decay();
            heat.halvings.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Keeps heat, for as long as it is let.
pub async fn keep(host: Arc<Host>) {
    let mut halved = Instant::now();
    loop {
        tokio::time::sleep(EVERY).await;
        if halved.elapsed() >= HALF_LIFE {
            halved = Instant::now();
            host.heat.decay();
        }
        host.heat.save(&host).await;
    }
}

impl Daemon {
    pub(crate) fn hottest(&self, name: Name, top: usize) -> Result<HeatView, ApiError> {
        let record = self.host.state.volume(&name)?;
        let heat = self.host.heat.of(&self.host.state, &record);
        let snapshot = heat.access_log().snapshot();
        let accesses = |heat: u16| u64::from(heat.div_ceil(WEIGHT));
        let mut used: Vec<HeatExtent> = (0u64..)
            .zip(snapshot.reads.iter().zip(&snapshot.writes))
            .filter(|(_, (r, w))| **r != 0 || **w != 0)
            .map(|(n, (&r, &w))| HeatExtent {
                offset: n * HEAT_EXTENT,
                len: HEAT_EXTENT.min(record.size - n * HEAT_EXTENT),
                reads: accesses(r),
                writes: accesses(w),
            })
            .collect();
        let (reads, writes) = used
            .iter()
            .fold((0, 0), |(r, w), e| (r + e.reads, w + e.writes));
        let extents_used = used.len();
        used.sort_by_key(|e| (std::cmp::Reverse(e.reads + e.writes), e.offset));
        used.truncate(top);
        Ok(HeatView {
            volume: name,
            half_life_s: HALF_LIFE.as_secs(),
            extents_used,
            reads,
            writes,
            hottest: used,
        })
    }
}
