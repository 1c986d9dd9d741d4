//! New volumes without content of somebody else's.

use std::path::{Path, PathBuf};

use whimbrel_engine::space::SECTOR;
use whimbrel_volume::backend::{Backend, Format};
use whimbrel_volume::raw::Access;

use crate::api::types::{CreateVolume, VolumeView};
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::host::Host;
use crate::service::errors::volume_error;
use crate::state::{ByteSize, Name, VolumeDraft, VolumeRecord};

impl Daemon {
    pub(crate) async fn make_volume(&self, request: CreateVolume) -> Result<VolumeView, ApiError> {
        let mut new = NewVolume::begin(
            &self.host,
            &request.name,
            request.format,
            request.device.as_deref(),
        )?;
        let size = match (&new.device, request.size) {
            (Some(device), None) => {
                let (format, access) = (Format::Device, Access::ReadWrite);
                let open = Backend::open(&self.host.pool, device, format, access).await;
                ByteSize(open.map_err(volume_error)?.size() / SECTOR * SECTOR)
            }
            (_, Some(size)) => size,
            (None, None) => {
                return Err(ApiError::new(ErrorCode::Invalid, "a new file needs a size")
                    .machine_state("nothing was changed")
                    .next_step("say --size, such as --size 10GiB"));
            }
        };
        new.open(&self.host, size.bytes()).await?;
        new.record.awaits = request.awaits;
        let record = new.commit()?;
        Ok(self.volume_view(record).await)
    }
}

/// A volume on its way to being one. Dropped before [`commit`](Self::commit), nothing of it stays, but for
/// what was written to a device.
pub struct NewVolume {
    draft: VolumeDraft,
    pub record: VolumeRecord,
    device: Option<PathBuf>,
}

impl NewVolume {
    /// Begins a volume in a file of the format, or on a device.
    pub fn begin(
        host: &Host,
        name: &Name,
        format: Format,
        device: Option<&Path>,
    ) -> Result<NewVolume, ApiError> {
        let draft = host.state.begin_volume(name)?;
        let mut record = VolumeRecord::fresh(name.clone(), SECTOR)
            .map_err(|e| ApiError::new(ErrorCode::Io, e.to_string()))?;
        record.format = format;
        if let Some(device) = device {
            if let Some(other) = user_of(host, device)? {
                return Err(ApiError::new(
                    ErrorCode::Exists,
                    format!("{} is volume `{other}` already", device.display()),
                )
                .machine_state("nothing was changed")
                .next_step(format!(
                    "use that one, or remove it: whimbrel volume rm {other}"
                )));
            }
            record.format = Format::Device;
            record.data = device.to_path_buf();
        }
        Ok(NewVolume {
            draft,
            record,
            device: device.map(Path::to_path_buf),
        })
    }

    /// Where the content goes.
    pub fn path(&self) -> PathBuf {
        self.device
            .clone()
            .unwrap_or_else(|| self.draft.data_path())
    }

    /// Makes the file, or opens the device, for a disk of `size` bytes.
    pub async fn open(&mut self, host: &Host, size: u64) -> Result<Backend, ApiError> {
        self.record.size = size;
        let made = Backend::create(&host.pool, self.path(), self.record.format, size).await;
        made.map_err(volume_error)
    }

    /// Names it.
    pub fn commit(self) -> Result<VolumeRecord, ApiError> {
        self.draft.commit(&self.record)?;
        Ok(self.record)
    }
}

/// The volume that lies on a device, under whatever name the device goes.
fn user_of(host: &Host, device: &Path) -> Result<Option<Name>, ApiError> {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let wanted = real(device);
    let volumes = host.state.volumes()?.records;
    let found = volumes
        .into_iter()
        .find(|v| v.format == Format::Device && real(&v.data) == wanted);
    Ok(found.map(|v| v.name))
}
