//! What everything in the daemon shares.

use whimbrel_peer::identity::Identity;
use whimbrel_peer::pace::Pace;
use whimbrel_peer::trust::TrustStore;
use whimbrel_volume::pool::Pool;

use crate::config::Config;
use crate::state::StateDir;
use crate::volumes::claims::Claims;
use crate::volumes::heat::HeatShelf;
use crate::volumes::tracker::TrackerShelf;

/// This host.
pub struct Host {
    pub config: Config,
    pub state: StateDir,
    /// What this host calls itself.
    pub name: String,
    pub identity: Identity,
    pub trust: TrustStore,
    /// Where volumes' I/O runs.
    pub pool: Pool,
    /// Volumes that somebody works on.
    pub claims: Claims,
    /// What the guests read and write of their volumes.
    pub heat: HeatShelf,
    /// What changed of volumes since their last snapshots.
    pub trackers: TrackerShelf,
    /// The bandwidth of all migrations together.
    pub pace: Pace,
}
