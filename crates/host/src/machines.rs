//! The machines of this host: their records, and their processes while they have one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncGuard};

use crate::disk::{Disk, Mode};
use crate::host::Host;
use crate::machine::Running;
use crate::state::{
    MachineRuntime, MachineSpec, MigrationId, Name, Ownership, StateError, VolumeRecord,
};
use whimbrel_engine::switchover::Epoch;
use whimbrel_peer::trust::PeerName;
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::Backend;
use whimbrel_volume::raw::Access;

/// What is known of a machine now.
pub struct Standing {
    pub spec: MachineSpec,
    pub runtime: MachineRuntime,
    pub running: Option<Running>,
    /// Its latest migration, over or not.
    pub migration: Option<MigrationId>,
}

/// A machine of this host.
pub struct Machine {
    pub name: Name,
    standing: AsyncMutex<Standing>,
}

/// A volume that cannot be opened for a machine.
#[derive(Debug, thiserror::Error)]
pub enum OpenDiskError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("volume `{volume}` is {state}, so the machine cannot use it here")]
    NotLocal { volume: Name, state: Ownership },
    #[error("volume `{volume}` is a disk of machine `{other}`")]
    OtherMachine { volume: Name, other: Name },
    #[error("volume `{volume}` is being copied, resized or checked")]
    Claimed { volume: Name },
    #[error("the data of volume `{volume}` is {found} bytes long, its record says {expected}")]
    Size {
        volume: Name,
        found: u64,
        expected: u64,
    },
}

impl Machine {
    pub fn new(spec: MachineSpec, runtime: MachineRuntime, running: Option<Running>) -> Self {
        Machine {
            name: spec.name.clone(),
            standing: AsyncMutex::new(Standing {
                spec,
                runtime,
                running,
                migration: None,
            }),
        }
    }

    /// From now on notices when the machine's process ends by itself, and tidies up after it.
    pub async fn watch_end(self: &Arc<Self>, host: &Arc<Host>) {
        let watched = {
            let standing = self.lock().await;
            let running = standing.running.as_ref();
            running.map(|r| (r.end_watch(), r.process.clone()))
        };
        let Some((end, process)) = watched else {
            return;
        };
        let (machine, host) = (self.clone(), host.clone());
        tokio::spawn(async move {
            let asked = end.await;
            let mut standing = machine.lock().await;
            if !standing
                .running
                .as_ref()
                .is_some_and(|r| r.process == process)
            {
                return;
            }
            // Its disks are still arriving, if they are: the migration holds them by itself.
            standing.running = None;
            if asked {
                tracing::info!(machine = %machine.name, "the guest shut down");
                standing.runtime.process = None;
                save(&host, &standing);
            } else {
                tracing::error!(machine = %machine.name, pid = process.pid, "the machine's process ended unasked");
            }
        });
    }

    pub async fn lock(&self) -> AsyncGuard<'_, Standing> {
        self.standing.lock().await
    }

    /// The machine stays here, or came back, under this epoch.
    pub async fn keep(&self, host: &Host, runtime: MachineRuntime) {
        let mut standing = self.lock().await;
        let process = standing.runtime.process.clone();
        standing.runtime = MachineRuntime { process, ..runtime };
        save(host, &standing);
        for disk in &standing.spec.disks {
            let state = Ownership::Local;
            set_volume(host, &disk.volume, standing.runtime.epoch, state);
        }
    }

    /// The machine was promised to the peer. From here on only the migration may decide that it runs here
    /// again; its process stays, stopped, as the way back.
    pub async fn granted(&self, host: &Host, migration: MigrationId, to: PeerName) {
        let mut standing = self.lock().await;
        standing.runtime.ownership = Ownership::Departed { migration, to };
        save(host, &standing);
    }

    /// The machine is complete at the peer: its process here ends, its disks here are marked as what
    /// they are, a copy of the past.
    pub async fn departed(&self, host: &Host, migration: MigrationId, to: PeerName) {
        let mut standing = self.lock().await;
        // Before it is forgotten: a daemon that died in between would leave it behind for ever.
        if let Some(running) = standing.running.take() {
            running.kill().await;
        }
        let state = Ownership::Departed { migration, to };
        standing.runtime.ownership = state.clone();
        standing.runtime.epoch = standing.runtime.epoch.next();
        standing.runtime.process = None;
        save(host, &standing);
        for disk in &standing.spec.disks {
            set_volume(host, &disk.volume, standing.runtime.epoch, state.clone());
        }
    }
}

/// Saves a machine's runtime record; what cannot be saved is told, and the next change tries again.
pub fn save(host: &Host, standing: &Standing) {
    if let Err(error) = host
        .state
        .save_runtime(&standing.spec.name, &standing.runtime)
    {
        tracing::error!(machine = %standing.spec.name, %error, "a machine's record cannot be saved");
    }
}

/// Changes whose a volume is.
pub fn set_volume(host: &Host, name: &Name, epoch: Epoch, state: Ownership) {
    let saved = host.state.volume(name).and_then(|mut record| {
        record.epoch = epoch;
        record.state = state;
        host.state.save_volume(&record)
    });
    if let Err(error) = saved {
        tracing::error!(volume = %name, %error, "a volume's record cannot be saved");
    }
}

/// Opens a machine's disks, each to be served as the mode says.
pub async fn open_disks(host: &Host, spec: &MachineSpec) -> Result<Vec<Arc<Disk>>, OpenDiskError> {
    let mut disks = Vec::new();
    for disk in &spec.disks {
        let record = host.state.volume(&disk.volume)?;
        if record.state != Ownership::Local {
            return Err(OpenDiskError::NotLocal {
                volume: record.name,
                state: record.state,
            });
        }
        if let Some(other) = record.machine.clone().filter(|m| m != &spec.name) {
            return Err(OpenDiskError::OtherMachine {
                volume: record.name,
                other,
            });
        }
        if host.claims.is_taken(&record.name) {
            return Err(OpenDiskError::Claimed {
                volume: record.name,
            });
        }
        let file = open_data(host, &record).await?;
        disks.push(disk_of(host, &record, file, Mode::Open));
    }
    Ok(disks)
}

/// Opens a volume's data, of which as much counts as its record says.
pub async fn open_data(host: &Host, record: &VolumeRecord) -> Result<Arc<Backend>, OpenDiskError> {
    let path = record.data_path(&host.state.volume_folder(&record.name));
    let data = Backend::open(&host.pool, path, record.format, Access::ReadWrite).await?;
    if data.size() < record.size {
        return Err(OpenDiskError::Size {
            volume: record.name.clone(),
            found: data.size(),
            expected: record.size,
        });
    }
    Ok(Arc::new(data.narrowed(record.size)?))
}

/// An opened volume as a disk, to be served as the mode says; what a guest reads and writes of it is logged,
/// and what it changes is remembered for the next snapshot.
pub fn disk_of(host: &Host, record: &VolumeRecord, file: Arc<Backend>, mode: Mode) -> Arc<Disk> {
    let disk = Disk::new(record.name.to_string(), record.size, file, mode);
    let disk = disk.watched(host.heat.of(&host.state, record));
    Arc::new(disk.tracked(host.trackers.of(&host.state, record)))
}

/// All machines of this host, by name.
#[derive(Default)]
pub struct Machines(Mutex<BTreeMap<Name, Arc<Machine>>>);

impl Machines {
    fn map(&self) -> std::sync::MutexGuard<'_, BTreeMap<Name, Arc<Machine>>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    pub fn get(&self, name: &Name) -> Option<Arc<Machine>> {
        self.map().get(name).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Machine>> {
        self.map().values().cloned().collect()
    }

    pub fn insert(&self, machine: Machine) -> Arc<Machine> {
        let machine = Arc::new(machine);
        self.map().insert(machine.name.clone(), machine.clone());
        machine
    }

    pub fn remove(&self, name: &Name) {
        self.map().remove(name);
    }
}
