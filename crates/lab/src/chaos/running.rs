//! Which guests run, seen from outside: the time their virtual processors take.
//!
//! A daemon asks its QEMU; this asks nobody. QEMU names its threads (`-name debug-threads=on`), and the
//! kernel says how long each has been on a processor. A stopped guest's virtual processor takes none. So a
//! machine that ran at its destination and then took time at its source ran twice.
//!
//! What it does not see: a guest that runs for less than [`NOTICED`], or waits for a page. The guest's own
//! numbered reports are the other half of this check.

use crate::LabError;
use crate::net::{Host, Namespace};
use crate::pair::qemus_in;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// Looks between two searches for new QEMUs.
const SEARCH: u32 = 10;

/// Less than this is what a virtual processor takes to be stopped, loaded and looked at.
pub const NOTICED: Duration = Duration::from_millis(10);

/// What was taken is kept in one list, emptied before each run; beyond this the oldest goes.
const TAKEN_BOUND: usize = 1 << 16;

/// What QEMU calls the threads of virtual processors.
const THREAD: &str = "CPU ";

#[derive(Clone, Copy, Debug)]
struct Taken {
    at: Instant,
    host: Host,
    time: Duration,
}

/// How long the guest was on a processor, where and in which order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    pub at_destination: Duration,
    /// At the source, after it had run at the destination.
    pub at_source_after: Duration,
}

/// A thread that looks until this is dropped.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    taken: Mutex<Vec<Taken>>,
}

impl Shared {
    fn taken(&self) -> MutexGuard<'_, Vec<Taken>> {
        // Whole entries only: whoever panicked holding it left it usable.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    pub fn start(hosts: [(Host, Namespace); 2]) -> Result<Running, LabError> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let purpose = "virtual processors";
        let thread = std::thread::Builder::new()
            .name("vcpus".to_owned())
            .spawn(move || look(&hosts, &theirs))
            .map_err(|source| LabError::Thread { purpose, source })?;
        Ok(Running {
            shared,
            thread: Some(thread),
        })
    }

    /// Forgets what was seen: before the guest is asked to stop, what its waiting QEMU took was to be made.
    pub fn begin(&self) {
        self.shared.taken().clear();
    }

    /// What was seen since [`begin`](Self::begin) of a machine that moves away from `source`.
    pub fn ran(&self, source: Host) -> Ran {
        order(&self.shared.taken(), source)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; there is nothing left to undo.
            let _ = thread.join();
        }
    }
}

fn order(taken: &[Taken], source: Host) -> Ran {
    let mut ran = Ran::default();
    let mut since = None;
    for &Taken { at, host, time } in taken {
        if host != source {
            ran.at_destination += time;
            if ran.at_destination > NOTICED {
                since.get_or_insert(at);
            }
        } else if since.is_some_and(|since| at > since + 2 * LOOK) {
            // What both took between the same two looks has no order.
            ran.at_source_after += time;
        }
    }
    ran
}

fn look(hosts: &[(Host, Namespace); 2], shared: &Shared) {
    let mut known: BTreeMap<PathBuf, (Host, u64)> = BTreeMap::new();
    let mut looks = 0;
    while !shared.stop.load(Relaxed) {
        if looks % SEARCH == 0 {
            for (host, namespace) in hosts {
                for thread in qemus_in(namespace).into_iter().flat_map(processors) {
                    known.entry(thread).or_insert((*host, 0));
                }
            }
        }
        looks += 1;
        let at = Instant::now();
        known.retain(|thread, (host, before)| {
            // In this order: what a thread takes to end, its memory's release included, is no guest's.
            let now = on_processor(thread);
            let Some(now) = now.filter(|_| !is_ending(thread)) else {
                return false;
            };
            if now > *before {
                let time = Duration::from_nanos(now - *before);
                *before = now;
                let host = *host;
                let mut taken = shared.taken();
                if taken.len() == TAKEN_BOUND {
                    taken.remove(0);
                }
                taken.push(Taken { at, host, time });
            }
            true
        });
        std::thread::sleep(LOOK);
    }
}

/// The kernel's accounts of a QEMU's virtual processors.
fn processors(pid: u32) -> Vec<PathBuf> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let folders = tasks.flatten().map(|task| task.path());
    let named = folders.filter(|folder| {
        std::fs::read_to_string(folder.join("comm")).is_ok_and(|name| name.starts_with(THREAD))
    });
    named.map(|folder| folder.join("schedstat")).collect()
}

/// Nanoseconds on a processor; `None` once the thread has gone.
fn on_processor(schedstat: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(schedstat).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Whether the thread is on its way out, by its flags in the ninth field of `stat` (proc(5)). The second, its
/// name, may hold anything, and ends with the last bracket.
fn is_ending(schedstat: &Path) -> bool {
    const PF_EXITING: u64 = 4;
    let text = std::fs::read_to_string(schedstat.with_file_name("stat")).unwrap_or_default();
    let flags = text
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().nth(6));
    let flags: Option<u64> = flags.and_then(|flags| flags.parse().ok());
    flags.is_none_or(|flags| flags & PF_EXITING != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(entries: &[(u64, Host, u64)]) -> Vec<Taken> {
        let start = Instant::now();
        let entry = |&(at, host, time): &(u64, Host, u64)| Taken {
            at: start + Duration::from_millis(at),
            host,
            time: Duration::from_millis(time),
        };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn a_move_and_a_way_back_before_the_guest_ran_there_are_in_order() {
        let moved = taken(&[(0, Host::A, 9), (100, Host::A, 9), (200, Host::B, 50)]);
        assert_eq!(order(&moved, Host::A).at_source_after, Duration::ZERO);
        let rewound = taken(&[(0, Host::A, 9), (100, Host::B, 1), (200, Host::A, 50)]);
        assert_eq!(order(&rewound, Host::A).at_source_after, Duration::ZERO);
    }

    #[test]
    fn a_guest_that_runs_at_its_source_after_it_ran_elsewhere_is_seen() {
        let twice = taken(&[
            (0, Host::A, 9),
            (100, Host::B, 50),
            (200, Host::A, 30),
            (210, Host::B, 9),
        ]);
        let ran = order(&twice, Host::A);
        assert_eq!(ran.at_source_after, Duration::from_millis(30));
        assert_eq!(ran.at_destination, Duration::from_millis(59));
    }
}
