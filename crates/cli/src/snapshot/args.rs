//! The command line of snapshots.

use clap::Subcommand;
use std::path::PathBuf;
use whimbrel_host::state::Name;
use whimbrel_repository::SnapshotName;

/// Snapshots lie in a repository: a folder of their own, on a disk of this host or mounted from elsewhere.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Make a snapshot of all volumes of a machine at one instant; it runs on meanwhile
    ///
    /// Only what changed since the last one is read, where that is known. Ending this command ends the work: the
    /// snapshot is not there then, or, at the very end, wholly there.
    Create {
        /// The machine
        machine: Name,
        /// The repository; made if the folder is missing or empty
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// What to call it [default: the machine's name and the time]
        #[arg(long)]
        name: Option<SnapshotName>,
    },
    /// List the snapshots of a repository
    Ls {
        /// The repository
        dir: PathBuf,
    },
    /// Show a snapshot
    Show {
        /// The repository
        dir: PathBuf,
        /// The snapshot
        snapshot: SnapshotName,
    },
    /// Read everything and compare it with its hashes; exits with 1 if something is damaged
    Verify {
        /// The repository
        dir: PathBuf,
        /// Only this snapshot
        snapshot: Option<SnapshotName>,
    },
    /// Remove a snapshot, and what no other one needs
    Rm {
        /// The repository
        dir: PathBuf,
        /// The snapshot
        snapshot: SnapshotName,
    },
    /// Remove what no snapshot needs: what commands that were ended half-way left
    Gc {
        /// The repository
        dir: PathBuf,
    },
    /// Have a volume of a snapshot back, as a new volume of this host or as a new file
    Restore {
        /// The repository
        dir: PathBuf,
        /// The snapshot
        snapshot: SnapshotName,
        /// The volume in it; may be left out if there is but one
        #[arg(long)]
        volume: Option<String>,
        /// A new volume's name, or a new raw file's path, which has a `/` in it
        #[arg(long, value_name = "NAME|FILE")]
        to: String,
    },
}
