//! A volume of a snapshot, to be read as any other disk that a volume is made from.

use std::sync::Arc;

use bytes::Bytes;
use whimbrel_repository::read::VolumeReader;
use whimbrel_repository::{EXTENT, Repository, RepositoryError};
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::Source;
use whimbrel_volume::raw::DataExtent;

use super::{blocking, repository_error};
use crate::api::ApiError;
use crate::api::types::SnapshotVolume;
use crate::service::errors::volume_error;

/// What was stored, each extent compared with its hash when it is read.
pub struct SnapshotSource(Arc<VolumeReader>);

/// What can go wrong on the way back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

impl From<RestoreError> for ApiError {
    fn from(error: RestoreError) -> ApiError {
        match error {
            RestoreError::Repository(error) => {
                repository_error(error).machine_state("no volume was made")
            }
            RestoreError::Volume(error) => volume_error(error),
        }
    }
}

impl SnapshotSource {
    pub async fn open(from: &SnapshotVolume) -> Result<SnapshotSource, ApiError> {
        let from = from.clone();
        let opened = blocking(move || {
            let repository = Arc::new(Repository::at(&from.repository)?);
            VolumeReader::open(repository, &from.snapshot, from.volume.as_deref())
        });
        let (reader, _) = opened
            .await
            .map_err(|error| error.machine_state("no volume was made"))?;
        Ok(SnapshotSource(Arc::new(reader)))
    }

    async fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&VolumeReader) -> Result<T, RepositoryError> + Send + 'static,
    ) -> Result<T, RestoreError> {
        let reader = self.0.clone();
        let done = tokio::task::spawn_blocking(move || job(&reader)).await;
        Ok(done.expect("reading a repository does not panic")?)
    }
}

impl Source for SnapshotSource {
    type Error = RestoreError;

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn piece(&self) -> u64 {
        EXTENT
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>, RestoreError> {
        let extent = offset / EXTENT;
        let (count, data) = self.ask(move |reader| reader.run(extent)).await?;
        let end = ((extent + count) * EXTENT).min(offset + len);
        Ok(vec![DataExtent {
            offset,
            len: end - offset,
            data,
        }])
    }

    /// Within one extent: pieces begin where extents do.
    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, RestoreError> {
        let content = self
            .ask(move |reader| reader.extent(offset / EXTENT))
            .await?;
        let content = Bytes::from(content.unwrap_or_default());
        let from = (offset % EXTENT) as usize;
        Ok(content.slice(from..from + len))
    }
}
