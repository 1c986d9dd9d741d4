//! Changing a volume's size while nobody uses it.
//!
//! The record never says more than there is: growing, the content comes first; shrinking, the record.
//! Whatever happens in between leaves a volume that opens.

use std::cmp::Ordering;

use whimbrel_volume::backend::{Backend, Format, resize};
use whimbrel_volume::raw::{Access, Zeroes};

use crate::api::types::{ResizeVolume, VolumeView};
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::service::errors::volume_error;
use crate::state::{ByteSize, Name};

impl Daemon {
    pub(crate) async fn change_size(
        &self,
        name: Name,
        request: ResizeVolume,
    ) -> Result<VolumeView, ApiError> {
        let (mut record, _claim) = self.alone(&name).await?;
        self.host.trackers.lose(&self.host.state, &record);
        let size = request.size.bytes();
        let shrinks = size < record.size;
        if shrinks && !request.shrink {
            let lost = ByteSize(record.size - size);
            return Err(ApiError::new(
                ErrorCode::Invalid,
                format!("volume `{name}` would lose its last {lost}, whatever the guest has there"),
            )
            .machine_state("the volume was not touched")
            .next_step("shrink the guest's file systems and partitions first, then say --shrink"));
        }
        let path = record.data_path(&self.host.state.volume_folder(&name));
        let fail =
            |e| volume_error(e).machine_state("the volume keeps the size that `volume show` tells");
        match size.cmp(&record.size) {
            Ordering::Equal => {}
            Ordering::Greater => {
                // There may be more than the record says: the rest of a device, or what a shrinking that was
                // broken off left. It must not come back as the guest's.
                let (pool, format) = (&self.host.pool, record.format);
                let whole = Backend::open(pool, path.clone(), format, Access::ReadWrite).await;
                let whole = whole.map_err(fail)?;
                let stale = whole.size().min(size).saturating_sub(record.size);
                if stale > 0 {
                    let zeroes = Zeroes::default();
                    whole
                        .write_zeroes(record.size, stale, zeroes)
                        .await
                        .map_err(fail)?;
                    whole.sync().await.map_err(fail)?;
                }
                drop(whole);
                resize(pool, path, format, size).await.map_err(fail)?;
                record.size = size;
                self.host.state.save_volume(&record)?;
            }
            Ordering::Less => {
                record.size = size;
                self.host.state.save_volume(&record)?;
                if record.format != Format::Device {
                    resize(&self.host.pool, path, record.format, size)
                        .await
                        .map_err(fail)?;
                }
            }
        }
        self.host.heat.forget(&name);
        Ok(self.volume_view(record).await)
    }
}
