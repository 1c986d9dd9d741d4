//! Taking a snapshot of a machine.
//!
//! The instant: each disk's mode lock is taken, one after the other, which waits for the writes under way and
//! lets none begin. With all of them held the machine's disks stand still together, QEMU none the wiser: a
//! write that the guest knows to be done is in, and no write is in that was begun after another one was done
//! that is not. What changed is taken from the trackers, the shots begin (`disk/shot.rs`), and the locks are
//! let go. The guest's requests wait for as long as the slowest write that was under way takes, and some tens of
//! microseconds; that is measured and told.
//!
//! Then all volumes are made durable, so that "unchanged since" stays true over a power cut, and stored. While
//! that goes on the volumes are claimed: no second daemon's task, no export, no machine's start opens them.
//! Whatever goes wrong, or if the client goes away: shots end, trackers get back what they lent, the guest
//! runs as it did, and no snapshot is there.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use whimbrel_engine::set::UnitSet;
use whimbrel_repository::write::{About, SnapshotWriter};
use whimbrel_repository::{Consistency, EXTENT, Repository, SnapshotName, VolumeTree};

use super::blocking;
use super::storing::{Part, Storing};
use crate::api::types::{CreateSnapshot, ImportProgress, SnapshotView, SnapshotVolumeView};
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::disk::{Disk, Mode, Shot};
use crate::machines::{Standing, disk_of, open_data};
use crate::service::errors::{busy_migrating, volume_error};
use crate::state::{MachineSpec, Name, Ownership, Timestamp, VolumeRecord};
use crate::volumes::claims::Claim;
use crate::volumes::tracker::{Base, Lent, Tracker};

/// So long writes that are under way may take to end before the attempt is given up: the guest waits with us.
const STILL: Duration = Duration::from_secs(5);

/// A machine's disk, and whose it is until the snapshot is over.
struct Subject {
    record: VolumeRecord,
    disk: Arc<Disk>,
    tracker: Arc<Tracker>,
    _claim: Claim,
}

/// What the disks are told when it is over, however.
#[derive(Default)]
struct Underway(Vec<(Arc<Disk>, Arc<Tracker>, Lent)>);

impl Underway {
    fn settle(mut self, base: &Base) {
        for (disk, tracker, lent) in self.0.drain(..) {
            disk.end_shot();
            tracker.settle(&lent, base.clone());
        }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        for (disk, tracker, lent) in self.0.drain(..) {
            disk.end_shot();
            tracker.give_back(&lent);
        }
    }
}

/// The base of one disk: which snapshot, and the volume in it; or why there is none.
type Found = Result<(Base, VolumeTree), String>;

impl Daemon {
    pub(crate) async fn take_snapshot(
        &self,
        machine: Name,
        request: CreateSnapshot,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<SnapshotView, ApiError> {
        let safe = "the machine runs, or rests, as before, and no snapshot was made";
        self.try_snapshot(machine, request, progress)
            .await
            .map_err(|error| error.machine_state(safe))
    }

    async fn try_snapshot(
        &self,
        machine: Name,
        request: CreateSnapshot,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<SnapshotView, ApiError> {
        let begun = Instant::now();
        let place = request.repository.clone();
        let (spec, is_running, subjects) = self.subjects(&machine).await?;
        let folder = place.clone();
        let repository = blocking(move || Repository::at_or_create(&folder)).await?;
        let repository = Arc::new(repository);
        let name = match request.name {
            Some(name) => name,
            None => default_name(&machine)?,
        };
        // Before the guest is touched: the name is free, and nothing is removed from now on.
        let (ours, called) = (repository.clone(), name.clone());
        let writer = blocking(move || SnapshotWriter::begin(ours, called)).await?;
        let mut bases = Vec::new();
        for subject in &subjects {
            bases.push(base_of(&repository, subject).await);
        }
        let shots = self.shots(&subjects).await?;

        let instant = still(&subjects, &shots, &bases, is_running).await?;
        let (underway, taken, pause) = (instant.underway, instant.taken, instant.pause);
        for subject in &subjects {
            subject.disk.file().sync().await.map_err(volume_error)?;
        }

        let parent = common_parent(&bases);
        let mut volumes = Vec::new();
        let mut parts = Vec::new();
        let all = subjects.iter().zip(&shots).zip(bases).zip(instant.wanted);
        for (((subject, shot), base), extents) in all {
            let record = &subject.record;
            let part = Part {
                name: record.name.to_string(),
                uuid: record.uuid.to_string(),
                shot: shot.clone(),
                file: subject.disk.file().clone(),
                extents,
                base: base.as_ref().ok().map(|(_, tree)| tree.clone()),
            };
            volumes.push(SnapshotVolumeView {
                name: part.name.clone(),
                size: record.size,
                looked_at: part.bytes(),
                whole_because: base.err(),
            });
            parts.push(part);
        }
        let storing = Storing::begin(writer);
        if let Err(error) = storing.store(&parts, &progress).await {
            if let Some(error) = error.told() {
                return Err(error);
            }
            let ended = storing.ended().await.map(drop);
            forget_if_damaged(&ended, &subjects);
            return Err(ended.expect_err("a thread that was not told to finish has failed"));
        }
        let consistency = match is_running {
            true => Consistency::Crash,
            false => Consistency::Stopped,
        };
        let about = About {
            machine: machine.to_string(),
            host: self.host.name.clone(),
            taken: taken.to_string(),
            consistency,
            parent: parent.clone(),
            description: toml::to_string(&spec).unwrap_or_default(),
        };
        let finished = storing.finish(about).await;
        forget_if_damaged(&finished, &subjects);
        let (manifest, written) = finished?;
        underway.settle(&Base {
            repository: repository.id().to_string(),
            snapshot: manifest.name.clone(),
            uuid: manifest.uuid,
        });
        let put_aside: u64 = shots.iter().map(|shot| shot.put_aside()).sum();
        tracing::info!(%machine, snapshot = %manifest.name, pause_us = pause.as_micros() as u64,
            stored = written.new_bytes, "a snapshot was made");
        Ok(SnapshotView {
            name: manifest.name,
            machine,
            repository: place,
            taken,
            consistency,
            parent,
            pause_us: pause.as_micros() as u64,
            took_ms: begun.elapsed().as_millis() as u64,
            volumes,
            stored_bytes: written.new_bytes,
            put_aside_bytes: put_aside * EXTENT,
        })
    }

    /// The machine's disks, had alone but for its own QEMU.
    async fn subjects(&self, name: &Name) -> Result<(MachineSpec, bool, Vec<Subject>), ApiError> {
        let machine = self.machine_named(name)?;
        let standing = machine.lock().await;
        if self.is_migrating(&standing) {
            return Err(busy_migrating(name));
        }
        if standing.runtime.ownership != Ownership::Local {
            return Err(ApiError::new(
                ErrorCode::WrongState,
                format!("machine `{name}` is {}", standing.runtime.ownership),
            )
            .next_step("make its snapshots where it is"));
        }
        let spec = standing.spec.clone();
        if spec.disks.is_empty() {
            return Err(ApiError::new(
                ErrorCode::Invalid,
                format!("machine `{name}` has no disks"),
            ));
        }
        let running = running_disks(&standing);
        let mut subjects = Vec::new();
        for disk in &spec.disks {
            subjects.push(self.subject(&disk.volume, running).await?);
        }
        Ok((spec, running.is_some(), subjects))
    }

    async fn subject(
        &self,
        volume: &Name,
        running: Option<&[Arc<Disk>]>,
    ) -> Result<Subject, ApiError> {
        let record = self.host.state.volume(volume)?;
        if record.state != Ownership::Local {
            return Err(ApiError::new(
                ErrorCode::WrongState,
                format!("volume `{volume}` is {}", record.state),
            ));
        }
        let claim = self.host.claims.take(volume).ok_or_else(|| {
            ApiError::new(
                ErrorCode::Busy,
                format!(
                    "volume `{volume}` is being copied, served, resized or checked, or another snapshot of it is being made"
                ),
            )
            .next_step("try again when that is over")
        })?;
        let served = running.and_then(|disks| disks.iter().find(|d| d.name() == volume.as_str()));
        let disk = match served {
            Some(disk) => disk.clone(),
            None => {
                let file = open_data(&self.host, &record).await?;
                disk_of(&self.host, &record, file, Mode::Frozen)
            }
        };
        Ok(Subject {
            tracker: self.host.trackers.of(&self.host.state, &record),
            record,
            disk,
            _claim: claim,
        })
    }

    async fn shots(&self, subjects: &[Subject]) -> Result<Vec<Arc<Shot>>, ApiError> {
        let mut shots = Vec::new();
        for subject in subjects {
            let folder = self.host.state.volume_folder(&subject.record.name);
            let (pool, file) = (&self.host.pool, subject.disk.file().clone());
            let shot = Shot::new(pool, file, subject.record.size, &folder);
            shots.push(Arc::new(shot.map_err(|e| no_scratch(&folder, &e))?));
        }
        Ok(shots)
    }
}

fn no_scratch(folder: &Path, e: &std::io::Error) -> ApiError {
    let what = format!("no file can be made for what the guest overwrites meanwhile: {e}");
    ApiError::new(ErrorCode::Io, what)
        .at(Some(folder.display().to_string()))
        .next_step("put right what the message names and try again")
}

/// The disks of its process, if it has one.
fn running_disks(standing: &Standing) -> Option<&[Arc<Disk>]> {
    let running = standing.running.as_ref()?;
    (!running.has_ended()).then_some(&running.disks[..])
}

/// `MACHINE-20260102t030405z`.
fn default_name(machine: &Name) -> Result<SnapshotName, ApiError> {
    let now = Timestamp::now().to_string();
    let second = now.split('.').next().unwrap_or(&now);
    let digits: String = second.chars().filter(|c| !matches!(c, '-' | ':')).collect();
    let name = format!("{machine}-{}z", digits.to_lowercase());
    name.parse::<SnapshotName>().map_err(|e| {
        ApiError::new(ErrorCode::Invalid, e.to_string()).next_step("choose one with --name")
    })
}

/// The volume in the snapshot that its changes are counted from, if it is of this repository and still there.
async fn base_of(repository: &Arc<Repository>, subject: &Subject) -> Found {
    let base = subject.tracker.base()?;
    if base.repository != repository.id() {
        return Err("the last snapshot of it went into another repository".to_string());
    }
    let (repository, name) = (repository.clone(), base.snapshot.clone());
    let manifest = tokio::task::spawn_blocking(move || repository.manifest(&name)).await;
    let manifest = match manifest {
        Ok(Ok(manifest)) => manifest,
        Ok(Err(error)) => return Err(error.to_string()),
        Err(panic) => return Err(panic.to_string()),
    };
    let (uuid, size) = (subject.record.uuid.to_string(), subject.record.size);
    let is_it = |tree: &&VolumeTree| tree.uuid == uuid && tree.size == size;
    let tree = manifest.volumes.iter().find(is_it);
    match tree {
        Some(tree) if manifest.uuid == base.uuid => Ok((base, tree.clone())),
        _ => Err(format!("snapshot `{}` is not what it was", base.snapshot)),
    }
}

/// The one snapshot that all volumes are counted from.
fn common_parent(bases: &[Found]) -> Option<SnapshotName> {
    let mut names = bases
        .iter()
        .map(|base| base.as_ref().ok().map(|(base, _)| &base.snapshot));
    let first = names.next()??;
    names.all(|name| name == Some(first)).then(|| first.clone())
}

/// The disks at one instant.
struct Instantly {
    underway: Underway,
    taken: Timestamp,
    pause: Duration,
    /// What is looked at, for each disk.
    wanted: Vec<UnitSet>,
}

async fn still(
    subjects: &[Subject],
    shots: &[Arc<Shot>],
    bases: &[Found],
    is_running: bool,
) -> Result<Instantly, ApiError> {
    let begun = Instant::now();
    let all_still = async {
        let mut held = Vec::new();
        for subject in subjects {
            held.push(subject.disk.stilled().await);
        }
        held
    };
    let held = tokio::time::timeout(STILL, all_still).await.map_err(|_| {
        let what = format!(
            "a write of the guest has not ended within {} s",
            STILL.as_secs()
        );
        ApiError::new(ErrorCode::Busy, what).next_step("see how its disks are, and try again")
    })?;
    let may_be = |mode: &Mode| match mode {
        Mode::Open => true,
        Mode::Frozen => !is_running,
        Mode::Noted(_) | Mode::Arriving(_) | Mode::Filling(_) => false,
    };
    if !held.iter().all(|mode| may_be(mode)) {
        return Err(ApiError::new(
            ErrorCode::WrongState,
            "a disk of the machine has just begun to move",
        )
        .next_step("make the snapshot when the migration is over"));
    }
    let mut underway = Underway::default();
    let mut wanted = Vec::new();
    for ((subject, shot), base) in subjects.iter().zip(shots).zip(bases) {
        let lent = subject.tracker.lend();
        let is_counted = matches!((base, subject.tracker.base()),
            (Ok((base, _)), Ok(now)) if *base == now);
        let extents = match is_counted {
            true => lent.extents.clone(),
            false => UnitSet::full(subject.record.size.div_ceil(EXTENT)),
        };
        shot.want(&extents);
        subject.disk.begin_shot(shot.clone());
        underway
            .0
            .push((subject.disk.clone(), subject.tracker.clone(), lent));
        wanted.push(extents);
    }
    let taken = Timestamp::now();
    drop(held);
    Ok(Instantly {
        underway,
        taken,
        pause: begun.elapsed(),
        wanted,
    })
}

/// A base whose lists are damaged is none: the next snapshot reads everything.
fn forget_if_damaged<T>(ended: &Result<T, ApiError>, subjects: &[Subject]) {
    if ended.as_ref().is_err_and(|e| e.code == ErrorCode::Damaged) {
        for subject in subjects {
            subject.tracker.lose("the snapshot before it is damaged");
        }
    }
}
