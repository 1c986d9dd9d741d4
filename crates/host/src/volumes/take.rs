//! A volume's content as a file, or as another volume.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use tokio::sync::watch;
use whimbrel_volume::backend::{Backend, Format, clone_file, copy};

use super::make::NewVolume;
use crate::api::types::{CloneVolume, ExportVolume, ImportProgress, VolumeView};
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::machines::open_data;
use crate::service::errors::volume_error;
use crate::state::Name;

/// A file that is not yet what it is to be; gone when this goes.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // Not there any more if it was named.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn file_error(what: &str, path: &Path, e: std::io::Error) -> ApiError {
    let code = match e.kind() {
        std::io::ErrorKind::AlreadyExists => ErrorCode::Exists,
        std::io::ErrorKind::StorageFull => ErrorCode::StorageFull,
        _ => ErrorCode::Io,
    };
    ApiError::new(code, format!("{what}: {e}"))
        .at(Some(path.display().to_string()))
        .machine_state("the volume is as it was, and no file was made")
        .next_step("put right what the message names, or name another file")
}

impl Daemon {
    pub(crate) async fn take_out(
        &self,
        name: Name,
        request: ExportVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        let (record, _claim) = self.alone(&name).await?;
        let target = &request.file;
        if target.symlink_metadata().is_ok() {
            return Err(
                ApiError::new(ErrorCode::Exists, "there is a file of that name already")
                    .at(Some(target.display().to_string()))
                    .machine_state("the volume and the file are as they were")
                    .next_step("name another file, or move that one away"),
            );
        }
        let file_name = target.file_name().unwrap_or_default().to_string_lossy();
        let part = Part(target.with_file_name(format!(".{file_name}.whimbrel-{}", record.uuid)));
        // Left by an export that was killed; the claim says that it is nobody's now.
        let _ = std::fs::remove_file(&part.0);
        let from = open_data(&self.host, &record).await?;
        let to = Backend::create(&self.host.pool, &part.0, request.format, record.size).await;
        let to = to.map_err(volume_error)?;
        copied(&from, &to, &progress).await?;
        drop(to);
        rustix::fs::renameat_with(CWD, &part.0, CWD, target, RenameFlags::NOREPLACE)
            .map_err(|e| file_error("the file cannot be named", target, e.into()))?;
        let folder = target.parent().unwrap_or(Path::new("/"));
        std::fs::File::open(folder)
            .and_then(|f| f.sync_all())
            .map_err(|e| file_error("the file's name may not outlive a power cut", target, e))?;
        Ok(self.volume_view(record).await)
    }

    pub(crate) async fn clone_of(
        &self,
        name: Name,
        request: CloneVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        let (record, _claim) = self.alone(&name).await?;
        let format = request.format.unwrap_or(match record.format {
            Format::Device => Format::Raw,
            format => format,
        });
        let mut new = NewVolume::begin(&self.host, &request.name, format, None)?;
        new.record.size = record.size;
        let from = open_data(&self.host, &record).await?;
        // Byte for byte what another file is; an image may have others below it, so it is copied.
        let same = format == record.format && format == Format::Raw;
        let shared = same && {
            from.sync().await.map_err(volume_error)?;
            clone_file(&self.host.pool, from.path(), &new.path())
                .await
                .map_err(volume_error)?
        };
        if !shared {
            let to = new.open(&self.host, record.size).await?;
            copied(&from, &to, &progress).await?;
        }
        let total = record.size;
        progress.send_replace(ImportProgress { done: total, total });
        let record = new.commit()?;
        Ok(self.volume_view(record).await)
    }
}

async fn copied(
    from: &Backend,
    to: &Backend,
    progress: &watch::Sender<ImportProgress>,
) -> Result<(), ApiError> {
    let total = from.size();
    progress.send_replace(ImportProgress { done: 0, total });
    let tell = |done| {
        progress.send_replace(ImportProgress { done, total });
    };
    copy(from, to, tell).await.map_err(volume_error)?;
    Ok(())
}
