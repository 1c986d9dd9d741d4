//! Copies that arrive are written out to the disk as they come, and how far the disk is behind with it is known.
//!
//! A page cache takes copies as fast as the link brings them, and nobody notices until the guest flushes: then it
//! waits for all of them. So the disk is set to work at once, and the age of the oldest copy that has not reached
//! it is what a flush would wait at this moment. The source is told, and pushes less *before* a guest has waited.
//!
//! Nothing here holds a copy back: they come in the order of the link, and a copy that somebody waits for would
//! stand behind one that waits for the disk. Written out is not durable: flushes and barriers are as they were.
//!
//! Bounds: what waits to be written out is at most what the kernel lets be dirty, an extent for each copy that is
//! not next to the one before it.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use whimbrel_engine::space::Extent;
use whimbrel_volume::backend::Backend;

/// Fewer bytes gather before the disk is bothered.
const GATHER: u64 = 128 << 10;

/// The copies of one disk.
pub struct Behind {
    file: Arc<Backend>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Stored, and not being written out yet.
    waiting: Vec<Extent>,
    bytes: u64,
    /// When the first of those came; or, before the disk is bothered, nothing: gathering is no delay of its.
    since: Option<Instant>,
    /// When the first came of those that are being written out.
    at_work: Option<Instant>,
    /// The longest that any took since it was last asked.
    worst: Duration,
}

impl Behind {
    pub fn new(file: Arc<Backend>) -> Arc<Behind> {
        Arc::new(Behind {
            file,
            inner: Mutex::default(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    /// How long the disk was behind at most since this was last asked.
    pub fn backlog(&self) -> Duration {
        let mut inner = self.inner();
        let now = inner
            .at_work
            .map_or(Duration::ZERO, |since| since.elapsed());
        std::mem::take(&mut inner.worst).max(now)
    }

    /// A copy is stored: it is written out in its turn.
    pub fn wrote(self: &Arc<Self>, units: Extent) {
        let mut inner = self.inner();
        inner.bytes += units.byte_len();
        if inner.at_work.is_some() || inner.bytes >= GATHER {
            inner.since.get_or_insert_with(Instant::now);
        }
        match inner.waiting.last_mut() {
            Some(last) if last.end() == units.start => last.len += units.len,
            _ => inner.waiting.push(units),
        }
        if inner.at_work.is_some() || inner.bytes < GATHER {
            return;
        }
        inner.at_work = inner.since;
        drop(inner);
        let this = Arc::clone(self);
        tokio::spawn(async move { this.write_out().await });
    }

    async fn write_out(&self) {
        loop {
            let (taken, since) = {
                let mut inner = self.inner();
                inner.bytes = 0;
                inner.at_work = inner.since.take();
                let Some(since) = inner.at_work else {
                    return;
                };
                (std::mem::take(&mut inner.waiting), since)
            };
            for units in &taken {
                let out = self.file.write_out(units.byte_offset(), units.byte_len());
                if let Err(error) = out.await {
                    // Whoever makes it durable hears of it, from the kernel itself.
                    tracing::warn!(%error, "copies cannot be written out");
                }
            }
            let mut inner = self.inner();
            inner.worst = inner.worst.max(since.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_volume::backend::Format;
    use whimbrel_volume::pool::{Pool, PoolSize};

    #[tokio::test]
    async fn all_that_was_stored_is_written_out_and_nothing_stays_behind() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let pool = Pool::start(PoolSize::default()).expect("threads");
        let path = folder.path().join("disk");
        let file = Backend::create(&pool, path, Format::Raw, 64 << 20).await;
        let behind = Behind::new(Arc::new(file.expect("room")));
        for n in 0..64 {
            behind.wrote(Extent::new(n * 256, 256));
        }
        while behind.inner().at_work.is_some() {
            tokio::task::yield_now().await;
        }
        assert!(behind.inner().waiting.is_empty());
        assert!(behind.backlog() > Duration::ZERO);
        assert_eq!(behind.backlog(), Duration::ZERO);
    }
}
