//! RAM into a waiting QEMU (`-incoming defer`).
//!
//! [`PostcopySink`] runs the guest before its memory is here and passes the pages it wants on as
//! demands. [`PrecopySink`] is for hosts where QEMU may not use userfaultfd ([`postcopy_possible`]
//! says): all memory first, then the guest runs. [`PostcopySink::recover`] goes on where another
//! daemon's post-copy sink ended with that daemon; [`destination_state`] says whether there is such a
//! thing.
//!
//! Both speak over one unix socket through one task, in the order in which they were called; a call
//! dropped while it waits for room has placed nothing, and one that returned will be written whole.

mod last_words;
mod line;
mod postcopy;
mod precopy;
mod recovery;
mod state;

use std::time::Duration;

use serde_json::json;

pub use last_words::gave_up_loading;
pub use postcopy::{PostcopySink, Request};
pub use precopy::PrecopySink;
pub use state::{DestinationState, destination_state};

use crate::paused::large_pages;
use crate::qmp::Qmp;
use crate::settings::Settings;
use crate::{Error, Result};

/// When a destination was switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switched {
    /// When the package with LISTEN, device state and RUN (of a pre-copy: the device state) had been
    /// written to QEMU's socket, since the Unix epoch.
    pub written: Duration,
}

/// Whether the destination QEMU may run a post-copy on this host: asked by switching its capability
/// on and off again. [`Error::NoPostcopy`] carries QEMU's own words (userfaultfd not permitted);
/// [`Error::PageSize`] is of memory in huge pages, which could only be placed whole.
pub async fn postcopy_possible(qmp: &Qmp) -> Result<()> {
    if let Some((name, page_size)) = large_pages(qmp).await? {
        return Err(Error::PageSize { name, page_size });
    }
    match Settings::change(qmp, &["postcopy-ram"], &[]).await {
        Ok(settings) => settings.restore(qmp).await,
        Err(Error::Qmp { command, desc, .. }) if command == "migrate-set-capabilities" => {
            Err(Error::NoPostcopy { desc })
        }
        Err(other) => Err(other),
    }
}

/// Opens QEMU's ear on the socket path.
async fn listen(qmp: &Qmp, socket: &std::path::Path) -> Result<()> {
    let uri = format!("unix:{}", socket.display());
    qmp.execute("migrate-incoming", json!({ "uri": uri }))
        .await
        .map(|_| ())
}

/// Time of day since the Unix epoch, to stand beside QEMU's timestamps.
pub(crate) fn wall_clock() -> Duration {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
}
