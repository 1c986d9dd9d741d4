//! Making a volume from a disk that lies elsewhere: an image, behind an NBD URI, or in a snapshot.

use std::path::{Path, PathBuf};

use tokio::sync::watch;
use whimbrel_engine::space::SECTOR;
use whimbrel_volume::backend::{Backend, Format, Source, copy, looks_like_qcow2};
use whimbrel_volume::raw::Access;

use super::convert;
use super::make::NewVolume;
use super::nbd::{NbdError, NbdSource, NbdUri};
use crate::api::types::{ImageFormat, ImportProgress, ImportVolume, VolumeView};
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::host::Host;
use crate::service::errors::volume_error;
use crate::snapshots::{RestoreError, SnapshotSource};

impl From<NbdError> for ApiError {
    fn from(error: NbdError) -> ApiError {
        let (code, next) = match &error {
            NbdError::Uri { .. } => (ErrorCode::Invalid, "correct the URI"),
            NbdError::Volume(inner) => return volume_error(inner.clone()),
            NbdError::NoExport { .. } => (
                ErrorCode::NotFound,
                "list the server's exports with `nbdinfo --list`",
            ),
            NbdError::WantsTls { .. } => (
                ErrorCode::Unsupported,
                "let it be reached without TLS over a socket or a tunnel of your own",
            ),
            NbdError::Connect { .. }
            | NbdError::Broken { .. }
            | NbdError::Silent { .. }
            | NbdError::Protocol { .. }
            | NbdError::Read { .. } => (
                ErrorCode::Io,
                "see that the server serves this export, then import again",
            ),
        };
        ApiError::new(code, error.to_string())
            .machine_state("no volume was made")
            .next_step(next)
    }
}

impl Daemon {
    pub(crate) async fn bring_volume(
        &self,
        request: ImportVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        let host = &self.host;
        let device = request.device.as_deref();
        let mut new = NewVolume::begin(host, &request.name, request.to, device)?;
        if let Some(uri) = &request.uri {
            let from = NbdSource::open(&uri.parse::<NbdUri>()?).await?;
            fill(host, &mut new, &from, &progress).await?;
        } else if let Some(from) = &request.snapshot {
            let from = SnapshotSource::open(from).await?;
            fill(host, &mut new, &from, &progress).await?;
        } else if let Some(file) = &request.file {
            let format = match request.format {
                Some(format) => format,
                None => guess(host, file).await?,
            };
            match format {
                ImageFormat::Vmdk if !convert::is_flat_vmdk(file).await => {
                    convert::vmdk(host, &mut new, file, &progress).await?;
                }
                format => {
                    let from = open_image(host, file, format).await.map_err(volume_error)?;
                    fill(host, &mut new, &from, &progress).await?;
                }
            }
        } else {
            return Err(ApiError::new(
                ErrorCode::Invalid,
                "nothing to import is named",
            ));
        }
        let record = new.commit()?;
        Ok(self.volume_view(record).await)
    }
}

/// By its name, unless the content contradicts it: a raw disk is its guest's to write, so that its content
/// alone must not make it an image that names other files of this host.
async fn guess(host: &Host, file: &Path) -> Result<ImageFormat, ApiError> {
    let extension = file.extension().and_then(|e| e.to_str()).unwrap_or("");
    let named = match extension {
        "qcow2" | "qcow" => ImageFormat::Qcow2,
        "vmdk" => ImageFormat::Vmdk,
        _ => ImageFormat::Raw,
    };
    let qcow2 = looks_like_qcow2(&host.pool, file.to_path_buf());
    if named == ImageFormat::Raw && qcow2.await.map_err(volume_error)? {
        return Err(ApiError::new(
            ErrorCode::Invalid,
            "the file begins as a qcow2 image does, but its name does not say that it is one",
        )
        .at(Some(file.display().to_string()))
        .machine_state("nothing was changed")
        .next_step("say --format qcow2, or --format raw to take it byte for byte"));
    }
    Ok(named)
}

async fn open_image(
    host: &Host,
    file: &Path,
    format: ImageFormat,
) -> Result<Backend, whimbrel_volume::VolumeError> {
    let path: PathBuf = file.to_path_buf();
    match format {
        ImageFormat::Raw => Backend::open(&host.pool, path, Format::Raw, Access::ReadOnly).await,
        ImageFormat::Qcow2 => {
            Backend::open(&host.pool, path, Format::Qcow2, Access::ReadOnly).await
        }
        ImageFormat::Vmdk => Backend::open_vmdk(&host.pool, path).await,
    }
}

/// Copies a whole disk into the new volume.
async fn fill<S: Source>(
    host: &Host,
    new: &mut NewVolume,
    from: &S,
    progress: &watch::Sender<ImportProgress>,
) -> Result<(), ApiError>
where
    ApiError: From<Told<S::Error>>,
{
    let total = from.size();
    if total == 0 {
        return Err(
            ApiError::new(ErrorCode::Invalid, "the disk to import is empty")
                .machine_state("no volume was made"),
        );
    }
    let to = new.open(host, total.next_multiple_of(SECTOR)).await?;
    if new.record.format == Format::Device {
        to.blank(to.size()).await.map_err(volume_error)?;
    }
    progress.send_replace(ImportProgress { done: 0, total });
    let tell = |done| {
        progress.send_replace(ImportProgress { done, total });
    };
    copy(from, &to, tell).await.map_err(Told)?;
    Ok(())
}

/// An error of either kind of source, on its way to the API.
struct Told<E>(E);

impl From<Told<NbdError>> for ApiError {
    fn from(told: Told<NbdError>) -> ApiError {
        told.0.into()
    }
}

impl From<Told<RestoreError>> for ApiError {
    fn from(told: Told<RestoreError>) -> ApiError {
        told.0.into()
    }
}

impl From<Told<whimbrel_volume::VolumeError>> for ApiError {
    fn from(told: Told<whimbrel_volume::VolumeError>) -> ApiError {
        volume_error(told.0)
    }
}
