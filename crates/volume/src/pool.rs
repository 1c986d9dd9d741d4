//! The threads on which blocking I/O runs, so that the async runtime never blocks on a disk.
//!
//! Two lanes, because their jobs differ by orders of magnitude: [`Lane::Quick`] takes reads and
//! writes (microseconds from the page cache, milliseconds from a disk), [`Lane::Slow`] takes syncs,
//! snapshots and digests (up to seconds). Were there one lane, a handful of flushes would hold every
//! read of every guest.
//!
//! Bounds: each lane holds at most `bound` jobs, waiting and running together; at the bound, callers
//! wait for room in the order they came. The jobs of one lane start in order and end in any order:
//! whoever needs one after another awaits the first.
//!
//! A job once begun runs to its end even if the future that waits for it is dropped.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tokio::sync::{Semaphore, oneshot};

use crate::VolumeError;
use crate::buffers::Buffers;

type Job = Box<dyn FnOnce() + Send>;

/// Which kind of job it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    Quick,
    Slow,
}

/// How many threads each lane has, and how many jobs it holds.
#[derive(Clone, Copy, Debug)]
pub struct PoolSize {
    pub quick_threads: usize,
    pub slow_threads: usize,
    /// Jobs per lane, waiting and running.
    pub bound: usize,
}

impl Default for PoolSize {
    /// Eight quick threads keep a disk busy (they mostly sleep), two slow ones suffice for syncs.
    fn default() -> Self {
        PoolSize {
            quick_threads: 8,
            slow_threads: 2,
            bound: 1024,
        }
    }
}

/// A handle on the pool; the threads end, after the jobs already queued, when the last handle goes.
#[derive(Clone)]
pub struct Pool(Arc<Handle>);

struct Handle {
    quick: Arc<Queue>,
    slow: Arc<Queue>,
    buffers: Buffers,
}

struct Queue {
    jobs: Mutex<Jobs>,
    wake: Condvar,
    room: Arc<Semaphore>,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    idle_threads: usize,
    closed: bool,
}

impl Pool {
    /// Starts the threads. Fails only if the system refuses a thread.
    pub fn start(size: PoolSize) -> std::io::Result<Pool> {
        // The handle is made first: should a later thread be refused, its drop ends the earlier ones.
        let pool = Pool(Arc::new(Handle {
            quick: Queue::new(size.bound),
            slow: Queue::new(size.bound),
            buffers: Buffers::default(),
        }));
        for (queue, name, threads) in [
            (&pool.0.quick, "io", size.quick_threads),
            (&pool.0.slow, "io-slow", size.slow_threads),
        ] {
            for n in 0..threads.max(1) {
                let queue = Arc::clone(queue);
                std::thread::Builder::new()
                    .name(format!("{name}-{n}"))
                    .spawn(move || queue.serve())?;
            }
        }
        Ok(pool)
    }

    /// Runs a blocking `job` on the lane's threads and waits for its result.
    pub async fn run<T, F>(&self, lane: Lane, job: F) -> Result<T, VolumeError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let queue = self.queue(lane);
        let room = match Arc::clone(&queue.room).try_acquire_owned() {
            Ok(room) => room,
            Err(_) => Arc::clone(&queue.room)
                .acquire_owned()
                .await
                .map_err(|_| VolumeError::PoolStopped)?,
        };
        let (done, answer) = oneshot::channel();
        queue.push(Box::new(move || {
            let result = job();
            drop(room);
            // Nobody waits any more: the job's effect stands all the same.
            let _ = done.send(result);
        }));
        answer.await.map_err(|_| VolumeError::PoolStopped)
    }

    /// Queues a job that nobody waits for, past the bound: the caller keeps the number of such jobs
    /// small itself (a journal has one).
    pub(crate) fn hand_over(&self, lane: Lane, job: impl FnOnce() + Send + 'static) {
        self.queue(lane).push(Box::new(job));
    }

    /// What the volumes of this pool read into.
    pub(crate) fn buffers(&self) -> &Buffers {
        &self.0.buffers
    }

    fn queue(&self, lane: Lane) -> &Arc<Queue> {
        match lane {
            Lane::Quick => &self.0.quick,
            Lane::Slow => &self.0.slow,
        }
    }
}

impl Queue {
    fn new(bound: usize) -> Arc<Queue> {
        Arc::new(Queue {
            jobs: Mutex::default(),
            wake: Condvar::new(),
            room: Arc::new(Semaphore::new(bound.max(1))),
        })
    }

    fn push(&self, job: Job) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.waiting.push_back(job);
        // Waking is a system call, and busy threads look again by themselves.
        let wake = jobs.idle_threads > 0;
        drop(jobs);
        if wake {
            self.wake.notify_one();
        }
    }

    fn serve(&self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(job) = jobs.waiting.pop_front() {
                drop(jobs);
                // A panicking job answers its caller by dropping the channel; the thread serves on.
                let _ = std::panic::catch_unwind(AssertUnwindSafe(job));
                jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            } else if jobs.closed {
                return;
            } else {
                jobs.idle_threads += 1;
                jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                jobs.idle_threads -= 1;
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Not joined: the last handle may go on the runtime, or on a pool thread itself.
        for queue in [&self.quick, &self.slow] {
            let mut jobs = queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            jobs.closed = true;
            drop(jobs);
            queue.wake.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    fn small() -> Pool {
        Pool::start(PoolSize {
            quick_threads: 1,
            slow_threads: 1,
            bound: 2,
        })
        .unwrap()
    }

    #[tokio::test]
    async fn a_panicking_job_fails_alone() {
        let pool = small();
        let lost = pool.run(Lane::Quick, || panic!("a job's own fault")).await;
        assert!(matches!(lost, Err::<(), _>(VolumeError::PoolStopped)));
        assert_eq!(pool.run(Lane::Quick, || 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn callers_past_the_bound_wait_and_are_served() {
        let pool = small();
        let (open, gate) = mpsc::channel::<()>();
        let first = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(Lane::Quick, move || gate.recv().unwrap()).await }
        });
        let served = Arc::new(AtomicUsize::new(0));
        let rest: Vec<_> = (0..20)
            .map(|_| {
                let (pool, served) = (pool.clone(), served.clone());
                tokio::spawn(async move {
                    pool.run(Lane::Quick, move || served.fetch_add(1, Ordering::SeqCst))
                        .await
                })
            })
            .collect();
        tokio::task::yield_now().await;
        assert_eq!(served.load(Ordering::SeqCst), 0);
        // A blocked quick lane leaves the slow one free.
        assert_eq!(pool.run(Lane::Slow, || 1).await.unwrap(), 1);
        open.send(()).unwrap();
        first.await.unwrap().unwrap();
        for r in rest {
            r.await.unwrap().unwrap();
        }
        assert_eq!(served.load(Ordering::SeqCst), 20);
    }

    #[tokio::test]
    async fn a_dropped_caller_does_not_undo_its_job() {
        let pool = small();
        let (started, seen) = mpsc::channel::<()>();
        let (open, gate) = mpsc::channel::<()>();
        let (ended, end) = mpsc::channel::<()>();
        let caller = tokio::spawn({
            let pool = pool.clone();
            async move {
                pool.run(Lane::Quick, move || {
                    started.send(()).unwrap();
                    gate.recv().unwrap();
                    ended.send(()).unwrap();
                })
                .await
            }
        });
        tokio::task::spawn_blocking(move || seen.recv().unwrap())
            .await
            .unwrap();
        caller.abort();
        open.send(()).unwrap();
        tokio::task::spawn_blocking(move || end.recv().unwrap())
            .await
            .unwrap();
    }
}
