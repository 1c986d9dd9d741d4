//! From the disks as they were into the repository.
//!
//! Reading (here) and hashing, packing and writing (on a thread of its own) go on at once, with a short queue
//! between them: `AHEAD` extents. Where the repository is slow, reading waits; the guest does not.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;
use whimbrel_repository::write::{About, SnapshotWriter, Written};
use whimbrel_repository::{EXTENT, Manifest, RepositoryError, VolumeTree};
use whimbrel_volume::backend::Backend;

use super::{broken, repository_error};
use crate::api::types::ImportProgress;
use crate::api::{ApiError, ErrorCode};
use crate::disk::{GivenUp, Shot};
use crate::service::errors::volume_error;

/// Extents that were read and wait for the repository: 4 MiB.
const AHEAD: usize = 16;

/// Holes are asked for by so many bytes.
const STRETCH: u64 = 1 << 30;

/// What the repository's thread is told, in order.
enum Told {
    Volume {
        name: String,
        uuid: String,
        size: u64,
        base: Option<VolumeTree>,
    },
    /// None: all zero.
    Extent(u64, Option<Bytes>),
    Finish(About),
}

/// One disk's part.
pub struct Part {
    pub name: String,
    pub uuid: String,
    pub shot: Arc<Shot>,
    pub file: Arc<Backend>,
    /// What is looked at; the rest is as in the base.
    pub extents: UnitSet,
    pub base: Option<VolumeTree>,
}

/// The repository's thread. Dropped before [`finish`](Self::finish), no snapshot comes of it.
pub struct Storing {
    queue: mpsc::Sender<Told>,
    thread: JoinHandle<Result<Option<(Manifest, Written)>, RepositoryError>>,
}

impl Storing {
    pub fn begin(mut writer: SnapshotWriter) -> Storing {
        let (queue, mut told) = mpsc::channel(AHEAD);
        let thread = tokio::task::spawn_blocking(move || {
            while let Some(told) = told.blocking_recv() {
                match told {
                    Told::Volume {
                        name,
                        uuid,
                        size,
                        base,
                    } => writer.volume(&name, &uuid, size, base.as_ref())?,
                    Told::Extent(extent, Some(content)) => writer.put(extent, &content)?,
                    Told::Extent(extent, None) => writer.put_hole(extent)?,
                    Told::Finish(about) => {
                        let written = writer.written();
                        return writer
                            .finish(about)
                            .map(|manifest| Some((manifest, written)));
                    }
                }
            }
            Ok(None)
        });
        Storing { queue, thread }
    }

    /// Says that there is something for the thread; if it has ended, why is found by [`finish`](Self::finish).
    async fn tell(&self, told: Told) -> Result<(), Ended> {
        self.queue.send(told).await.map_err(|_| Ended)
    }

    /// Reads the disks as they were and has them stored.
    pub async fn store(
        &self,
        parts: &[Part],
        progress: &watch::Sender<ImportProgress>,
    ) -> Result<(), StoreError> {
        let total = parts.iter().map(Part::bytes).sum();
        let mut done = 0;
        for part in parts {
            let told = Told::Volume {
                name: part.name.clone(),
                uuid: part.uuid.clone(),
                size: part.file.size(),
                base: part.base.clone(),
            };
            self.tell(told).await?;
            for run in part.extents.runs() {
                let mut at = run.start;
                while at < run.end() {
                    let (count, is_hole) = part.hole_or_not(at, run.end()).await?;
                    for extent in at..at + count {
                        let content = part.shot.read(extent, is_hole).await?;
                        self.tell(Told::Extent(extent, content)).await?;
                        done += EXTENT.min(part.file.size() - extent * EXTENT);
                        progress.send_replace(ImportProgress { done, total });
                    }
                    at += count;
                }
            }
        }
        Ok(())
    }

    /// Ends the snapshot: it is there, durably, when this returns.
    pub async fn finish(self, about: About) -> Result<(Manifest, Written), ApiError> {
        // If the thread has ended, it says why.
        let _ = self.tell(Told::Finish(about)).await;
        self.ended().await
    }

    /// Why the thread has ended.
    pub async fn ended(self) -> Result<(Manifest, Written), ApiError> {
        drop(self.queue);
        match self.thread.await {
            Ok(Ok(Some(done))) => Ok(done),
            Ok(Ok(None)) => Err(ApiError::new(
                ErrorCode::Internal,
                "the snapshot was not told to be finished",
            )),
            Ok(Err(error)) => Err(repository_error(error)),
            Err(panic) => Err(broken(&panic)),
        }
    }
}

impl Part {
    pub fn bytes(&self) -> u64 {
        let last = self.extents.capacity() - 1;
        let short = match self.extents.contains(last) {
            true => (last + 1) * EXTENT - self.file.size(),
            false => 0,
        };
        self.extents.len() * EXTENT - short
    }

    /// How many extents from this one on are wholly in a hole of the volume as it is now, or are not.
    async fn hole_or_not(&self, extent: u64, end: u64) -> Result<(u64, bool), StoreError> {
        let offset = extent * EXTENT;
        let len = (end * EXTENT).min(self.file.size()).min(offset + STRETCH) - offset;
        let runs = self.file.data_extents(offset, len).await;
        let runs = runs.map_err(StoreError::Volume)?;
        let stretch = Extent::new(extent, len.div_ceil(EXTENT));
        let first = runs.first();
        Ok(match first {
            Some(hole) if !hole.data && hole.len >= EXTENT.min(len) => {
                let whole = match hole.len >= len {
                    true => stretch.len,
                    false => hole.len / EXTENT,
                };
                (whole, true)
            }
            // Up to the first extent that may lie in a hole.
            _ => {
                let big = runs.iter().find(|run| !run.data && run.len >= EXTENT);
                let until = big.map_or(len, |run| run.offset - offset);
                (until.div_ceil(EXTENT).clamp(1, stretch.len), false)
            }
        })
    }
}

/// The repository's thread has ended.
struct Ended;

/// What keeps the disks from being stored.
pub enum StoreError {
    /// The repository; it tells why itself.
    Repository,
    GivenUp(GivenUp),
    Volume(whimbrel_volume::VolumeError),
}

impl From<Ended> for StoreError {
    fn from(_: Ended) -> StoreError {
        StoreError::Repository
    }
}

impl From<GivenUp> for StoreError {
    fn from(why: GivenUp) -> StoreError {
        StoreError::GivenUp(why)
    }
}

impl StoreError {
    /// In the API's words; `None` if the repository tells.
    pub fn told(self) -> Option<ApiError> {
        match self {
            StoreError::Repository => None,
            StoreError::Volume(error) => Some(volume_error(error)),
            StoreError::GivenUp(why) => {
                let (code, next) = match &why {
                    GivenUp::NoRoom => (
                        ErrorCode::StorageFull,
                        "make room where the state directory lies, or try when the guest writes less",
                    ),
                    GivenUp::PutAside(_) | GivenUp::Read(_) => {
                        (ErrorCode::Io, "put right what the message names")
                    }
                };
                let what = format!("the snapshot was given up: {why}");
                Some(ApiError::new(code, what).next_step(next))
            }
        }
    }
}
