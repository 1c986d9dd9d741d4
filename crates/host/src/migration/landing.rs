//! Making room at the destination for a machine that arrives, and taking that back.
//!
//! Before the machine is accepted nothing that this host already has is changed: a machine or a volume
//! that left here earlier and now comes back keeps its record and its old data beside the new, until the
//! new is complete. What was made is written down in the migration's folder first, so that a daemon that
//! dies half-way can still undo it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use whimbrel_engine::switchover::Epoch;
use whimbrel_qemu::sink::gave_up_loading;
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::{Backend, Format};
use whimbrel_volume::journal::{Journal, Recovered};
use whimbrel_volume::raw::Access;
use whimbrel_wire::message::{DiskOffer, Prepare};

use crate::host::Host;
use crate::machine::qemu_log;
use crate::machines::{OpenDiskError, open_data};
use crate::state::{
    DATA_FILE, MachineRuntime, MachineSpec, MigrationId, Name, Ownership, StateDir, StateError,
    Timestamp, VolumeRecord, VolumeUuid,
};

const FILE: &str = "landing.json";

/// Room that is kept free beside what the disks need now: the guest goes on writing.
const MARGIN: u64 = 64 << 20;

/// Why a machine cannot be taken in. The words go to the source's operator.
#[derive(Debug, thiserror::Error)]
pub enum LandingError {
    #[error("the machine's description is no good here: {problem}")]
    Description { problem: String },
    #[error("a machine `{name}` is here already ({ownership})")]
    MachineExists { name: Name, ownership: Ownership },
    #[error("a volume `{name}` is here already ({ownership}, uuid {uuid})")]
    VolumeExists {
        name: Name,
        ownership: Ownership,
        uuid: VolumeUuid,
    },
    #[error(
        "the volume `{name}` that waits here has {found} bytes, the one that comes has {needed}"
    )]
    TooSmall { name: Name, found: u64, needed: u64 },
    #[error(
        "not enough room under {}: the disks need {need} bytes, {free} are free",
        path.display()
    )]
    NoRoom { path: PathBuf, need: u64, free: u64 },
    #[error("this host has no network `{network}`; add it under [networks] in its configuration")]
    NoNetwork { network: Name },
    #[error("{} is not on this host, and the machine boots from it", path.display())]
    NoFile { path: PathBuf },
    #[error("{0}")]
    State(#[from] StateError),
    #[error("{0}")]
    Volume(#[from] VolumeError),
    #[error("{0}")]
    Open(#[from] OpenDiskError),
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is damaged: {problem}", path.display())]
    Damaged { path: PathBuf, problem: String },
}

/// A volume that arrives.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct ArrivingVolume {
    record: VolumeRecord,
    /// The record of the volume that left here earlier, if it did.
    previous: Option<VolumeRecord>,
    /// It takes the place of a volume that was made to wait for it, whose record this was.
    #[serde(default)]
    awaited: Option<VolumeRecord>,
}

/// What is made for a migration, as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub spec: MachineSpec,
    /// The machine left here earlier.
    returning: bool,
    volumes: Vec<ArrivingVolume>,
    /// Bytes of QEMU's log that were there before: what follows is of the QEMU that waits for the machine.
    #[serde(default)]
    logged: Option<u64>,
}

/// A volume with its file and its journal.
pub struct LandedVolume {
    pub record: VolumeRecord,
    pub file: Arc<Backend>,
    /// Taken when the disk begins to fill.
    pub journal: Option<Journal>,
}

/// Room made.
pub struct Landing {
    plan: Plan,
    pub volumes: Vec<LandedVolume>,
}

impl Plan {
    /// Looks whether the machine can be taken in, changing nothing.
    pub fn make(
        host: &Host,
        migration: &MigrationId,
        prepare: &Prepare,
    ) -> Result<Plan, LandingError> {
        let spec: MachineSpec =
            toml::from_str(&prepare.definition).map_err(|e| LandingError::Description {
                problem: e.message().to_string(),
            })?;
        spec.check().map_err(|e| LandingError::Description {
            problem: e.to_string(),
        })?;
        let returning = match host.state.runtime(&spec.name) {
            Ok(runtime) => match runtime.ownership {
                Ownership::Departed { .. } => true,
                ownership => {
                    return Err(LandingError::MachineExists {
                        name: spec.name,
                        ownership,
                    });
                }
            },
            Err(StateError::NoSuch { .. }) => false,
            Err(error) => return Err(error.into()),
        };
        for nic in &spec.nics {
            if !host.config.networks.contains_key(&nic.network) {
                return Err(LandingError::NoNetwork {
                    network: nic.network.clone(),
                });
            }
        }
        for path in [&spec.kernel, &spec.initrd, &spec.firmware]
            .into_iter()
            .flatten()
        {
            if !path.is_file() {
                return Err(LandingError::NoFile { path: path.clone() });
            }
        }
        let volumes = prepare
            .disks
            .iter()
            .map(|offer| arriving(host, migration, &spec, prepare.epoch, offer))
            .collect::<Result<Vec<_>, _>>()?;
        check_room(host, &volumes, &prepare.disks)?;
        let logged = match std::fs::metadata(qemu_log(&host.state.machine_folder(&spec.name))) {
            Ok(log) => Some(log.len()),
            Err(error) => (error.kind() == std::io::ErrorKind::NotFound).then_some(0),
        };
        Ok(Plan {
            spec,
            returning,
            volumes,
            logged,
        })
    }

    fn save(&self, folder: &Path) -> Result<(), LandingError> {
        let text = serde_json::to_vec(self).expect("a plan is plain data");
        Ok(StateDir::replace_file(&folder.join(FILE), &text)?)
    }

    /// The plan of a migration, if it got so far as to have one.
    pub fn load(folder: &Path) -> Result<Option<Plan>, LandingError> {
        let path = folder.join(FILE);
        let Some(text) = StateDir::read_text(&path)? else {
            return Ok(None);
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| LandingError::Damaged {
                path,
                problem: e.to_string(),
            })
    }

    /// Nothing is left of what the plan in this folder made. A plan that stays is only undone once more.
    pub fn forget(folder: &Path) {
        let _ = std::fs::remove_file(folder.join(FILE));
    }

    /// Makes the room.
    pub async fn carry_out(
        self,
        host: &Host,
        migration: &MigrationId,
    ) -> Result<Landing, LandingError> {
        self.save(&host.state.migration_folder(migration))?;
        if !self.returning {
            let runtime = MachineRuntime {
                epoch: Epoch(0),
                ownership: Ownership::Arriving {
                    migration: migration.clone(),
                },
                process: None,
            };
            host.state.add_machine(&self.spec, &runtime)?;
        }
        let mut volumes = Vec::new();
        for volume in &self.volumes {
            volumes.push(land(host, volume).await?);
        }
        Ok(Landing {
            plan: self,
            volumes,
        })
    }

    /// Whether the QEMU that waited for the machine, and is gone, wrote that it gave up before the guest ran.
    pub fn proves_that_loading_failed(&self, host: &Host) -> bool {
        let log = qemu_log(&host.state.machine_folder(&self.spec.name));
        let proven = self.logged.map(|from| gave_up_loading(&log, from));
        proven.is_some_and(|proven| {
            proven.unwrap_or_else(|error| {
                tracing::warn!(%error, "what QEMU wrote before it ended is not known");
                false
            })
        })
    }

    /// Opens what was made, with what has arrived of it.
    pub async fn reopen(&self, host: &Host) -> Result<Vec<ReopenedVolume>, LandingError> {
        let mut volumes = Vec::new();
        for volume in &self.volumes {
            let record = volume.record.clone();
            let file = open_data(host, &record).await?;
            let folder = journal_folder(host, &record);
            let (journal, recovered) =
                Journal::open(&host.pool, &folder, record.identity(), file.clone()).await?;
            volumes.push(ReopenedVolume {
                record,
                file,
                journal,
                recovered,
            });
        }
        Ok(volumes)
    }

    /// Older copies of the volumes, by index: of those that left here earlier.
    pub async fn older_copies(&self, host: &Host) -> Vec<(usize, Arc<Backend>)> {
        let mut copies = Vec::new();
        for (n, volume) in self.volumes.iter().enumerate() {
            let Some(previous) = &volume.previous else {
                continue;
            };
            let data = previous.data_path(&host.state.volume_folder(&previous.name));
            match Backend::open(&host.pool, data, previous.format, Access::ReadOnly).await {
                Ok(file) => copies.push((n, Arc::new(file))),
                // It would only have spared some bytes.
                Err(error) => {
                    tracing::warn!(volume = %previous.name, %error, "the older copy cannot be read");
                }
            }
        }
        copies
    }

    /// Whether nothing was known here of the machine before it came.
    pub fn is_first_visit(&self) -> bool {
        !self.returning
    }

    /// Takes back whatever of it was made.
    pub async fn undo(&self, host: &Host) {
        for volume in &self.volumes {
            let record = &volume.record;
            let folder = host.state.volume_folder(&record.name);
            let undone = if volume.awaited.is_some() {
                // The place waits on: nobody counts on what was stored there.
                let _ = Journal::remove(&host.pool, &journal_folder(host, record)).await;
                let _ = std::fs::remove_dir(journal_folder(host, record));
                host.state.volume(&record.name).map_or(Ok(()), |now| {
                    let waits = volume.awaited.as_ref().filter(|_| !now.awaits);
                    waits.map_or(Ok(()), |waits| Ok(host.state.save_volume(waits)?))
                })
            } else if volume.previous.is_some() {
                let _ = Journal::remove(&host.pool, &journal_folder(host, record)).await;
                let _ = std::fs::remove_dir(journal_folder(host, record));
                remove_file(&record.data_path(&folder))
            } else {
                match host.state.remove_volume(&record.name) {
                    Ok(()) | Err(StateError::NoSuch { .. }) => Ok(()),
                    Err(error) => Err(error.into()),
                }
            };
            if let Err(error) = undone {
                tracing::warn!(volume = %record.name, %error, "what arrived cannot be removed");
            }
        }
        if !self.returning
            && let Err(error) = host.state.remove_machine(&self.spec.name)
            && !matches!(error, StateError::NoSuch { .. })
        {
            tracing::warn!(machine = %self.spec.name, %error, "a machine's record cannot be removed");
        }
    }

    /// The machine is this host's now: the records say so.
    pub fn accept(&self, host: &Host, runtime: &MachineRuntime) -> Result<(), LandingError> {
        for volume in &self.volumes {
            host.state.save_volume(&volume.record)?;
        }
        host.state.save_machine(&self.spec)?;
        host.state.save_runtime(&self.spec.name, runtime)?;
        Ok(())
    }

    /// Everything is here: volumes are local, journals and old copies are gone.
    pub async fn complete(&self, host: &Host) -> Result<(), LandingError> {
        for volume in &self.volumes {
            let mut record = volume.record.clone();
            record.state = Ownership::Local;
            host.state.save_volume(&record)?;
            let journal = journal_folder(host, &record);
            Journal::remove(&host.pool, &journal).await?;
            // Empty now; a leftover would only be untidy.
            let _ = std::fs::remove_dir(&journal);
            if let Some(previous) = &volume.previous {
                let old = previous.data_path(&host.state.volume_folder(&previous.name));
                if old != record.data_path(&host.state.volume_folder(&record.name)) {
                    remove_file(&old)?;
                }
            }
        }
        Ok(())
    }
}

/// A volume that was arriving when an earlier daemon died.
pub struct ReopenedVolume {
    pub record: VolumeRecord,
    pub file: Arc<Backend>,
    pub journal: Journal,
    pub recovered: Recovered,
}

impl Landing {
    /// The landing of a machine that is here already: its volumes are in use.
    pub fn landed(plan: Plan) -> Self {
        Landing {
            plan,
            volumes: Vec::new(),
        }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }
}

fn arriving(
    host: &Host,
    migration: &MigrationId,
    spec: &MachineSpec,
    epoch: Epoch,
    offer: &DiskOffer,
) -> Result<ArrivingVolume, LandingError> {
    let bad = |problem: String| LandingError::Description { problem };
    let name: Name = offer
        .volume
        .parse()
        .map_err(|e| bad(format!("a disk's name: {e}")))?;
    let uuid = VolumeUuid::try_from(offer.uuid.clone()).map_err(|e| bad(e.to_string()))?;
    if !spec.disks.iter().any(|d| d.volume == name) {
        return Err(bad(format!("`{name}` is none of its disks")));
    }
    let mut awaited = None;
    let previous = match host.state.volume(&name) {
        Ok(record) if record.awaits && record.machine.is_none() => {
            if record.size < offer.size {
                return Err(LandingError::TooSmall {
                    name,
                    found: record.size,
                    needed: offer.size,
                });
            }
            awaited = Some(record);
            None
        }
        Ok(record) => {
            let left_here = matches!(record.state, Ownership::Departed { .. });
            if !left_here || record.uuid != uuid {
                return Err(LandingError::VolumeExists {
                    name,
                    ownership: record.state,
                    uuid: record.uuid,
                });
            }
            Some(record)
        }
        Err(StateError::NoSuch { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let (data, format) = match (&previous, &awaited) {
        (_, Some(place)) => (place.data.clone(), place.format),
        (Some(_), None) => (format!("{DATA_FILE}-{}", epoch.0).into(), Format::Raw),
        (None, None) => (PathBuf::from(DATA_FILE), Format::Raw),
    };
    Ok(ArrivingVolume {
        record: VolumeRecord {
            name,
            uuid,
            size: offer.size,
            epoch,
            data,
            format,
            awaits: false,
            created: previous.as_ref().map_or_else(Timestamp::now, |p| p.created),
            machine: Some(spec.name.clone()),
            state: Ownership::Arriving {
                migration: migration.clone(),
            },
        },
        previous,
        awaited,
    })
}

/// A device has its own room.
fn check_room(
    host: &Host,
    volumes: &[ArrivingVolume],
    disks: &[DiskOffer],
) -> Result<(), LandingError> {
    let path = host.state.root();
    let stat = rustix::fs::statvfs(path).map_err(|e| LandingError::Io {
        path: path.to_path_buf(),
        source: e.into(),
    })?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let need = volumes
        .iter()
        .zip(disks)
        .filter(|(volume, _)| volume.record.format != Format::Device)
        .fold(MARGIN, |sum, (_, d)| sum.saturating_add(d.allocated));
    if need > free {
        return Err(LandingError::NoRoom {
            path: path.to_path_buf(),
            need,
            free,
        });
    }
    Ok(())
}

fn journal_folder(host: &Host, record: &VolumeRecord) -> PathBuf {
    record.journal_path(&host.state.volume_folder(&record.name))
}

async fn land(host: &Host, volume: &ArrivingVolume) -> Result<LandedVolume, LandingError> {
    let record = volume.record.clone();
    let folder = host.state.volume_folder(&record.name);
    let path = record.data_path(&folder);
    let file = if volume.awaited.is_some() {
        let place = Backend::open(&host.pool, &path, record.format, Access::ReadWrite).await?;
        let place = place.narrowed(record.size)?;
        // Units that are zero at the source are not sent: what nobody writes must read so.
        place.blank(record.size).await?;
        place
    } else if volume.previous.is_some() {
        // Left by an attempt that was broken off so hard that it could not clean up.
        remove_file(&path)?;
        Backend::create(&host.pool, &path, record.format, record.size).await?
    } else {
        let draft = host.state.begin_volume(&record.name)?;
        let data = draft.data_path();
        drop(Backend::create(&host.pool, data, record.format, record.size).await?);
        draft.commit(&record)?;
        Backend::open(&host.pool, &path, record.format, Access::ReadWrite).await?
    };
    let file = Arc::new(file);
    let folder = journal_folder(host, &record);
    Journal::remove(&host.pool, &folder).await?;
    let journal = Journal::create(&host.pool, &folder, record.identity(), file.clone()).await?;
    Ok(LandedVolume {
        record,
        file,
        journal: Some(journal),
    })
}

fn remove_file(path: &Path) -> Result<(), LandingError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(LandingError::Io {
            path: path.to_path_buf(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::volumes::claims::Claims;
    use crate::volumes::heat::HeatShelf;
    use crate::volumes::tracker::TrackerShelf;
    use whimbrel_peer::identity::Identity;
    use whimbrel_peer::pace::{Pace, Rate};
    use whimbrel_peer::trust::TrustStore;
    use whimbrel_volume::pool::{Pool, PoolSize};
    use whimbrel_wire::message::RamMode;

    const SIZE: u64 = 1 << 20;

    fn host(folder: &Path) -> Host {
        let state = StateDir::init(folder).expect("room");
        Host {
            config: Config::default(),
            name: "here".to_string(),
            identity: Identity::create(&state.identity_path()).expect("room"),
            trust: TrustStore::load(state.peers_path()).expect("no peers yet"),
            state,
            pool: Pool::start(PoolSize::default()).expect("threads"),
            claims: Claims::default(),
            trackers: TrackerShelf::default(),
            heat: HeatShelf::default(),
            pace: Pace::new(Rate::Unlimited),
        }
    }

    fn offer() -> Prepare {
        Prepare {
            epoch: Epoch(2),
            machine: "web".to_string(),
            definition: "name = \"web\"\nmemory = \"64MiB\"\n[[disk]]\nvolume = \"root\"\n"
                .to_string(),
            machine_type: String::new(),
            qemu_version: String::new(),
            disks: vec![DiskOffer {
                volume: "root".to_string(),
                uuid: "00000000-0000-4000-8000-000000000001".to_string(),
                size: SIZE,
                allocated: 0,
            }],
            ram: RamMode::Postcopy,
        }
    }

    #[tokio::test]
    async fn a_place_larger_than_the_volume_is_reopened_as_large_as_the_volume() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let host = host(folder.path());
        let id: MigrationId = "m-1".parse().expect("an id");
        host.state.add_migration(&id).expect("room");
        let plan = Plan::make(&host, &id, &offer()).expect("nothing is here yet");
        let landing = plan.carry_out(&host, &id).await.expect("room");
        let plan = landing.plan().clone();
        let path = landing.volumes[0].file.path().to_path_buf();
        drop(landing);
        // As a device may be, of which only the volume's size counts.
        let place = std::fs::File::options().write(true).open(path);
        place.and_then(|f| f.set_len(3 * SIZE)).expect("room");
        let reopened = plan.reopen(&host).await.expect("all was made");
        assert_eq!(reopened[0].file.size(), SIZE);
        assert_eq!(reopened[0].recovered.resident.len(), 0);
    }
}
