//! The journal at work: many callers, few writes.
//!
//! Changes queue up; whichever pool thread has the drain takes all that wait and appends them in one
//! write (group commit), then answers every caller. Barriers and folds run the [`Book`]'s steps on the
//! slow lane; callers that arrive while a barrier runs share the next one.
//!
//! Bounds: each caller of `record` has at most [`PIECE`] changes in the queue and waits for them, so the
//! queue is as long as there are callers (the front ends bound those); lazy changes stop being taken at
//! [`LAZY_BOUND`].

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use whimbrel_engine::space::Extent;

use super::book::{Book, Fold, Sealed, make_log, sweep};
use super::store::{DirStore, Store};
use super::{Change, Limits, Recovered, VolumeIdentity, is_ours, recover};
use crate::pool::{Lane, Pool};
use crate::turns::Turns;
use crate::{Operation, VolumeError};

type Result<T> = std::result::Result<T, VolumeError>;

/// Changes one caller may have in the queue at a time.
const PIECE: usize = 1024;

/// Lazy changes waiting at most; past it they are refused.
const LAZY_BOUND: usize = 16_384;

/// Lazy changes that are worth a write of their own.
const LAZY_BATCH: usize = 256;

/// Makes a volume's data durable: everything written before the call.
pub trait DataSync: Send + Sync + 'static {
    fn sync(&self) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>>;
}

/// A volume's residency journal. See the [module](super) for what it promises.
pub struct Journal {
    inner: Arc<Inner>,
}

struct Inner {
    pool: Pool,
    runtime: tokio::runtime::Handle,
    data: Arc<dyn DataSync>,
    store: Arc<DirStore>,
    identity: VolumeIdentity,
    /// Held while a step does its file operation: locked on pool threads only.
    book: Mutex<Book<DirStore>>,
    queue: Mutex<Queue>,
    barriers: Turns,
    folding: tokio::sync::Mutex<()>,
    fold_scheduled: AtomicBool,
    /// Slots used at which to try the next fold; moves up when one fails, so that failures cost little.
    fold_at: AtomicU32,
    /// Logs switched to; counted with the book held, so a drain can tell that a full log is gone.
    switches: AtomicU64,
}

#[derive(Default)]
struct Queue {
    lazy: Vec<Change>,
    waiting: Vec<Waiting>,
    /// A drain is queued or running; there is at most one.
    draining: bool,
    /// The log is full; the fold's switch starts the drain again.
    stuck: bool,
}

struct Waiting {
    changes: Vec<Change>,
    done: oneshot::Sender<Result<()>>,
}

impl Journal {
    /// Starts the journal of a volume of which nothing is here. Creates `dir` if need be, and refuses
    /// one that has a journal already. The journal's files are durable when this returns.
    pub async fn create(
        pool: &Pool,
        dir: &Path,
        identity: VolumeIdentity,
        data: Arc<dyn DataSync>,
    ) -> Result<Journal> {
        let path = dir.to_owned();
        let made = pool.run(Lane::Slow, move || {
            std::fs::create_dir_all(&path)
                .map_err(|e| VolumeError::io(&path, Operation::Create, 0, 0, e))?;
            if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
                std::fs::File::open(parent)
                    .and_then(|d| d.sync_all())
                    .map_err(|e| VolumeError::io(parent, Operation::Sync, 0, 0, e))?;
            }
            let store = Arc::new(DirStore::open(&path)?);
            Book::create(store, identity, Limits::default())
        });
        Ok(Journal::start(pool, data, made.await??))
    }

    /// Opens the journal in `dir` and tells what it knows. Damage is an error, never an empty answer.
    pub async fn open(
        pool: &Pool,
        dir: &Path,
        identity: VolumeIdentity,
        data: Arc<dyn DataSync>,
    ) -> Result<(Journal, Recovered)> {
        let path = dir.to_owned();
        let opened = pool.run(Lane::Slow, move || {
            let store = Arc::new(DirStore::open(&path)?);
            recover::open(store, identity, Limits::default())
        });
        let (book, recovered) = opened.await??;
        let behind = book.logs_behind;
        let journal = Journal::start(pool, data, book);
        if behind > 4 {
            // Each restart leaves a log behind; a daemon that restarts often must not pile them up.
            journal.inner.schedule_fold();
        }
        Ok((journal, recovered))
    }

    /// Tells what the journal in `dir` knows of the volume and changes nothing. Not while it is open.
    pub async fn inspect(pool: &Pool, dir: &Path, identity: VolumeIdentity) -> Result<Recovered> {
        let path = dir.to_owned();
        let looked = pool.run(Lane::Slow, move || {
            let store = DirStore::open(&path)?;
            recover::inspect(&store, identity)
        });
        looked.await?
    }

    /// Removes the journal in `dir`, whatever its state; no error if there is none. For a move given up,
    /// or after [`complete`](Self::complete).
    pub async fn remove(pool: &Pool, dir: &Path) -> Result<()> {
        let path = dir.to_owned();
        pool.run(Lane::Slow, move || {
            let store = match DirStore::open(&path) {
                Err(VolumeError::JournalAbsent { .. }) => return Ok(()),
                opened => opened?,
            };
            for name in store.list()?.iter().filter(|n| is_ours(n)) {
                store.remove(name)?;
            }
            store.sync_dir()
        })
        .await?
    }

    fn start(pool: &Pool, data: Arc<dyn DataSync>, book: Book<DirStore>) -> Journal {
        let inner = Inner {
            pool: pool.clone(),
            runtime: tokio::runtime::Handle::current(),
            data,
            store: Arc::clone(&book.store),
            identity: book.identity,
            fold_at: AtomicU32::new(book.fill().1 / 2),
            book: Mutex::new(book),
            queue: Mutex::default(),
            barriers: Turns::default(),
            folding: tokio::sync::Mutex::default(),
            fold_scheduled: AtomicBool::new(false),
            switches: AtomicU64::new(0),
        };
        Journal {
            inner: Arc::new(inner),
        }
    }

    /// Records changes whose data is written already. When this returns they survive the daemon; a
    /// [`barrier`](Self::barrier) makes them survive the host. What is known already costs nothing.
    pub async fn record(&self, changes: Vec<Change>) -> Result<()> {
        for &change in &changes {
            self.inner.test(change)?;
        }
        if changes.len() <= PIECE {
            return self.inner.enqueue(changes).await;
        }
        for piece in changes.chunks(PIECE) {
            self.inner.enqueue(piece.to_vec()).await?;
        }
        Ok(())
    }

    /// Records a [`Change::Filled`] sometime: with the next batch, barrier or close. Lost in a crash, it
    /// costs one more copy. Returns false, having done nothing, if it is no `Filled` within the volume or
    /// too many wait already: use [`record`](Self::record) then.
    pub fn record_lazily(&self, change: Change) -> bool {
        let Change::Filled(new) = change else {
            return false;
        };
        if self.inner.test(change).is_err() {
            return false;
        }
        let mut queue = self.inner.queue();
        if let Some(Change::Filled(last)) = queue.lazy.last_mut()
            && last.end() == new.start
        {
            last.len += new.len;
            return true;
        }
        if queue.lazy.len() >= LAZY_BOUND {
            return false;
        }
        queue.lazy.push(change);
        if queue.lazy.len() >= LAZY_BATCH {
            self.inner.drain_soon(queue);
        }
        true
    }

    /// Makes the data, then the journal durable: to be awaited before a flush is acknowledged. Covers
    /// every write to the volume and every change recorded before the call, lazy ones included. Concurrent
    /// callers share. With nothing new recorded it costs a sync of the data alone.
    pub async fn barrier(&self) -> Result<()> {
        self.inner.barrier().await
    }

    /// Declares the volume complete: checks that every unit is resident, makes it durable, and replaces the
    /// journal by a mark of that. Changes and barriers remain allowed and record nothing. Forgets which units
    /// the guest owns, so verify first.
    pub async fn complete(&self) -> Result<()> {
        let inner = &self.inner;
        // Before `folding` is taken: a full log makes this wait for a fold.
        inner.enqueue(Vec::new()).await?;
        let _one = inner.folding.lock().await;
        if inner
            .with_book(Lane::Slow, |book| Ok(book.is_retired()))
            .await?
        {
            return Ok(());
        }
        let absent = inner.identity.units() - inner.fold().await?;
        if absent > 0 {
            return Err(VolumeError::JournalIncomplete { absent });
        }
        inner.with_book(Lane::Slow, Book::retire).await
    }

    /// A barrier and a mark of good order; the next [`open`](Self::open) is then
    /// [`Clean`](super::RecoveryHow::Clean). The directory is free when this returns. A journal merely
    /// dropped keeps it until its running fold ends.
    pub async fn close(self) -> Result<()> {
        let inner = &self.inner;
        inner.barrier().await?;
        let _one = inner.folding.lock().await;
        inner.make_durable(Book::write_closed).await?;
        inner.with_book(Lane::Slow, |book| book.shut()).await
    }
}

impl Inner {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn book(&self) -> MutexGuard<'_, Book<DirStore>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn with_book<T: Send + 'static>(
        self: &Arc<Self>,
        lane: Lane,
        step: impl FnOnce(&mut Book<DirStore>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(self);
        self.pool.run(lane, move || step(&mut inner.book())).await?
    }

    fn test(&self, change: Change) -> Result<()> {
        let units = self.identity.units();
        let (extent, mask) = match change {
            Change::Filled(e) | Change::Written(e) => (e, 0xff),
            Change::PartlyWritten { unit, mask } => (Extent::unit(unit), mask),
        };
        let end = extent.start.checked_add(extent.len);
        if extent.is_empty() || mask == 0 || end.is_none_or(|end| end > units) {
            return Err(VolumeError::JournalChange {
                extent,
                mask,
                units,
            });
        }
        Ok(())
    }

    async fn enqueue(self: &Arc<Self>, changes: Vec<Change>) -> Result<()> {
        let (done, answer) = oneshot::channel();
        {
            // In a scope of its own: what holds the lock must be gone before the wait.
            let mut queue = self.queue();
            queue.waiting.push(Waiting { changes, done });
            self.drain_soon(queue);
        }
        answer.await.map_err(|_| VolumeError::PoolStopped)?
    }

    fn drain_soon(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue>) {
        if !queue.draining && !queue.stuck {
            queue.draining = true;
            drop(queue);
            let inner = Arc::clone(self);
            self.pool.hand_over(Lane::Quick, move || inner.drain());
        }
    }

    /// On a pool thread: appends whatever waits until nothing does, or the log is full.
    fn drain(self: &Arc<Self>) {
        loop {
            let mut queue = self.queue();
            let lazy = std::mem::take(&mut queue.lazy);
            let waiting = std::mem::take(&mut queue.waiting);
            if lazy.is_empty() && waiting.is_empty() {
                queue.draining = false;
                return;
            }
            drop(queue);

            let mut all = lazy;
            let lazy_count = all.len();
            all.extend(waiting.iter().flat_map(|w| &w.changes));
            let (appended, used, switches) = {
                let mut book = self.book();
                let appended = book.append(&all);
                (
                    appended,
                    book.fill().0,
                    self.switches.load(Ordering::SeqCst),
                )
            };
            if used >= self.fold_at.load(Ordering::Relaxed) {
                self.schedule_fold();
            }
            let taken = match appended {
                Ok(taken) => taken,
                Err(error) => {
                    // Lazy changes are given up with the rest: they may be.
                    for w in waiting {
                        let _ = w.done.send(Err(error.clone()));
                    }
                    continue;
                }
            };
            let mut through = lazy_count;
            let mut left = Vec::new();
            for w in waiting {
                through += w.changes.len();
                if through <= taken {
                    let _ = w.done.send(Ok(()));
                } else {
                    left.push(w);
                }
            }
            if taken < all.len() {
                let mut queue = self.queue();
                left.append(&mut queue.waiting);
                queue.waiting = left;
                if taken < lazy_count {
                    let mut unwritten = all[taken..lazy_count].to_vec();
                    unwritten.append(&mut queue.lazy);
                    queue.lazy = unwritten;
                }
                // The log may have been switched since it was found full: then go on at once. If not, the
                // switch to come finds `stuck` set.
                queue.stuck = self.switches.load(Ordering::SeqCst) == switches;
                if queue.stuck {
                    queue.draining = false;
                    drop(queue);
                    self.schedule_fold();
                    return;
                }
            }
        }
    }

    /// Lets the queue go on, or, if the log could not be switched, answers all who wait.
    fn unstick(self: &Arc<Self>, failed: Option<&VolumeError>) {
        let mut queue = self.queue();
        if !queue.stuck {
            return;
        }
        queue.stuck = false;
        let Some(error) = failed else {
            return self.drain_soon(queue);
        };
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        for w in waiting {
            let _ = w.done.send(Err(error.clone()));
        }
    }

    async fn barrier(self: &Arc<Self>) -> Result<()> {
        // Whatever was queued before us, lazy changes included, goes first. Not within the shared part:
        // a full log makes this wait for a fold, and the fold needs the shared part.
        self.enqueue(Vec::new()).await?;
        self.make_all_durable().await
    }

    /// Data, then journal, of everything appended before the call.
    async fn make_all_durable(self: &Arc<Self>) -> Result<()> {
        self.barriers
            .once(async {
                let mark = self.with_book(Lane::Quick, |book| Ok(book.mark())).await?;
                if let Err(error) = self.data.sync().await {
                    let first = error.clone();
                    let poison = move |book: &mut Book<DirStore>| {
                        book.poison(first);
                        Ok(())
                    };
                    self.with_book(Lane::Quick, poison).await?;
                    return Err(error);
                }
                self.make_durable(move |book| book.seal(mark)).await
            })
            .await
    }

    /// Writes a record through `write` and syncs what it names.
    async fn make_durable(
        self: &Arc<Self>,
        write: impl FnOnce(&mut Book<DirStore>) -> Result<Option<Sealed>> + Send + 'static,
    ) -> Result<()> {
        let inner = Arc::clone(self);
        let job = move || {
            let sealed = {
                let mut book = inner.book();
                book.check()?;
                match write(&mut book)? {
                    Some(sealed) => sealed,
                    None => return Ok(()),
                }
            };
            // Without the book: appends go on during the sync.
            for name in &sealed.sync {
                if let Err(error) = inner.store.sync(name) {
                    inner.book().poison(error.clone());
                    return Err(error);
                }
            }
            inner.book().settle(&sealed);
            Ok(())
        };
        self.pool.run(Lane::Slow, job).await?
    }

    fn schedule_fold(self: &Arc<Self>) {
        if self.fold_scheduled.swap(true, Ordering::SeqCst) {
            return;
        }
        let inner = Arc::clone(self);
        self.runtime.spawn(async move {
            let result = {
                let _one = inner.folding.lock().await;
                inner.fold().await
            };
            if let Err(error) = &result {
                tracing::warn!(%error, "the residency journal could not be folded");
                // Try again an eighth of a log later, or when it is full.
                let fill = inner.with_book(Lane::Quick, |book| Ok(book.fill())).await;
                let (used, usable) = fill.unwrap_or_default();
                inner
                    .fold_at
                    .store((used + usable / 8).min(usable), Ordering::Relaxed);
            }
            inner.fold_scheduled.store(false, Ordering::SeqCst);
            inner.unstick(result.as_ref().err());
        });
    }

    /// One fold, with `folding` held; returns the number of resident units.
    async fn fold(self: &Arc<Self>) -> Result<u64> {
        if self
            .with_book(Lane::Quick, |book| Ok(book.is_retired()))
            .await?
        {
            return Ok(self.identity.units());
        }
        // One that failed after its switch is finished first: so at most one is ever behind.
        if let Some(behind) = self
            .with_book(Lane::Quick, |book| Ok(book.unfinished_fold()))
            .await?
        {
            self.finish(behind).await?;
        }
        let inner = Arc::clone(self);
        let switch = move || {
            let (generation, limits) = inner.book().next_log();
            let made = make_log(&*inner.store, inner.identity, limits, generation);
            let mut book = inner.book();
            let header = match book.check().and(made) {
                Ok(header) => header,
                Err(error) => {
                    book.give_up_log();
                    return Err(error);
                }
            };
            let fold = book.switch(header);
            inner.switches.fetch_add(1, Ordering::SeqCst);
            inner.fold_at.store(book.fill().1 / 2, Ordering::Relaxed);
            Ok(fold)
        };
        let fold = self.pool.run(Lane::Slow, switch).await??;
        self.unstick(None);
        self.finish(fold).await
    }

    async fn finish(self: &Arc<Self>, fold: Fold) -> Result<u64> {
        self.make_all_durable().await?;
        let inner = Arc::clone(self);
        let write = move || {
            let resident = fold.write(&*inner.store, inner.identity)?;
            let previous = inner.book().folded(&fold);
            if let Err(error) = sweep(&*inner.store, previous) {
                // They go with the next fold.
                tracing::warn!(%error, "old generations of the residency journal stay behind");
            }
            Ok(resident)
        };
        self.pool.run(Lane::Slow, write).await?
    }
}
