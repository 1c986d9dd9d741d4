//! Disks that were here before: what has not changed since then is not sent.
//!
//! # The idea
//! A machine that comes back finds the volumes it left behind, as they were. Once it is here, this side tells the
//! source the hash of each unit that its older copy has and the new one lacks; the source compares with its own,
//! frozen, and answers which are the same. Those this side takes from its copy, as if they had come over the link;
//! all others the source pushes. What is demanded before it was compared is sent: nobody waits for a comparison.
//!
//! # Traps
//! - A unit that the source calls the same counts as sent there. Each answer is used, whenever it comes; what is lost
//!   with the connection is found by what this side says it holds on the next.
//! - What was hashed is kept until it is answered, and stored itself: a copy that rots in between changes nothing.
//! - The guest runs meanwhile. [`Filling::fill`] stores nothing over what it wrote, and after each [`SETTLED`] units
//!   the disk is made durable, so that no flush of the guest's has gigabytes before it.
//! - Hashing and the guest's reads share this host's disk, as any copy that arrives does.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, UNIT};
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::Backend;
use whimbrel_volume::digest::{Hashed, hash_units};
use whimbrel_wire::message::{
    FEATURE_SEEDS, MAX_BITMAP_UNITS, MAX_SEED_UNITS, Message, pack_bitmap, unpack_bitmap,
};

use super::{Incoming, Inner};
use crate::disk::Filling;
use crate::migration::arrivals::{ArrivalError, Arrivals};
use crate::migration::landing::Plan;
use crate::migration::lane::Mouth;
use crate::migration::spaces;

/// Stretches that are asked about at once; their content is in memory: 64 MiB.
const ASKED: usize = 16;

/// Units that are stored before the disk is made durable: 64 MiB.
const SETTLED: u64 = 16_384;

/// An answer: the stretch's first unit, and which of its units are the same.
type Answer = (u64, UnitSet);

/// Somebody who compares a disk. Ends with its connection.
pub(super) struct Seeding {
    answers: mpsc::Sender<Answer>,
    _task: AbortOnDropHandle<()>,
}

impl Incoming {
    /// Looks for older copies of the disks, and tells the source before it pushes any.
    pub(super) async fn find_seeds(&mut self, plan: &Plan) {
        for (n, copy) in plan.older_copies(&self.setup.host).await {
            let space = spaces::disk_id(n);
            self.seeds.insert(space, copy);
            self.setup.arrivals.set_seeded(space, true);
            self.setup.link.mouth.say(Message::Seeded { space }).await;
        }
    }

    /// Compares, on this connection, what is not compared yet, if the machine is here.
    pub(super) fn begin_seeding(&mut self) {
        let mouth = self.setup.link.mouth.clone();
        if self.machine.is_none() || mouth.features() & FEATURE_SEEDS == 0 {
            return;
        }
        let arrivals = self.setup.arrivals.clone();
        for disk in arrivals.disks() {
            let space = disk.id();
            let Some(copy) = self.seeds.get(&space).cloned() else {
                continue;
            };
            if !arrivals.seeded().contains(&space) {
                continue;
            }
            // As many as can be on their way.
            let (sender, answers) = mpsc::channel(ASKED);
            let (comparing, tell) = (
                Comparing {
                    disk,
                    copy,
                    mouth: mouth.clone(),
                    arrivals: arrivals.clone(),
                    asked: BTreeMap::new(),
                    taken: 0,
                },
                self.tell.clone(),
            );
            let task = tokio::spawn(async move {
                match comparing.run(answers).await {
                    // The driver lives as long as this task.
                    Ok(taken) => drop(tell.send(Inner::Seeded(space, taken)).await),
                    // The connection is lost, or nobody could be told of what was not stored: it begins anew.
                    Err(error) => tracing::debug!(%error, "comparing ends with its connection"),
                }
            });
            let seeding = Seeding {
                answers: sender,
                _task: AbortOnDropHandle::new(task),
            };
            self.seeding.insert(space, seeding);
        }
    }

    /// What the source says of a stretch that was asked about.
    pub(super) fn seed_alike(&mut self, space: SpaceId, first: u64, units: u64, packed: &[u8]) {
        let Ok(alike) = unpack_bitmap(units, packed) else {
            return;
        };
        if let Some(seeding) = self.seeding.get(&space) {
            // Full only if the peer answers what it was not asked.
            let _ = seeding.answers.try_send((first, alike));
        }
    }

    /// A disk has been compared; so many units were taken from its older copy.
    pub(super) async fn seed_is_over(&mut self, space: SpaceId, taken: u64) {
        self.seeding.remove(&space);
        self.seeds.remove(&space);
        self.setup.arrivals.set_seeded(space, false);
        self.setup.link.mouth.say(Message::SeedEnd { space }).await;
        let disk = self
            .setup
            .arrivals
            .disks()
            .into_iter()
            .find(|disk| disk.id() == space);
        let name = disk.map(|disk| disk.name()).unwrap_or_default();
        self.setup.board.tell(format!(
            "disk {name}: {} MiB had not changed since it left here, and are not sent",
            (taken * UNIT) >> 20
        ));
    }
}

struct Comparing {
    disk: Arc<Filling>,
    copy: Arc<Backend>,
    mouth: Mouth,
    arrivals: Arc<Arrivals>,
    /// What was asked about and not answered, by its first unit.
    asked: BTreeMap<u64, Vec<Hashed>>,
    taken: u64,
}

impl Comparing {
    /// Compares all; how many units were taken from the copy.
    async fn run(mut self, mut answers: mpsc::Receiver<Answer>) -> Result<u64, ArrivalError> {
        // A unit in part is not worth the trouble.
        let units = (self.copy.size() / UNIT).min(self.disk.units());
        let (mut next, mut stored) = (0, 0);
        loop {
            while next < units && self.asked.len() < ASKED {
                let stretch = self.stretch(Extent::new(next, units - next)).await;
                next = stretch.end();
                self.ask(stretch).await;
            }
            if self.asked.is_empty() {
                return Ok(self.taken);
            }
            let Some((first, alike)) = answers.recv().await else {
                return Ok(self.taken);
            };
            stored += self.take(first, &alike).await?;
            if stored >= SETTLED {
                stored = 0;
                if let Err(error) = self.disk.make_durable().await {
                    tracing::warn!(%error, "what was taken from an older copy cannot be made durable yet");
                }
            }
        }
    }

    /// What is asked about next. Where the copy has nothing it is longer: there is nothing to say of it but that.
    async fn stretch(&self, rest: Extent) -> Extent {
        let (from, len) = (rest.byte_offset(), rest.byte_len());
        let found = self.copy.data_extents(from, len).await.unwrap_or_default();
        let hole = found.first().filter(|first| !first.data);
        let hole = hole.map_or(0, |hole| hole.len / UNIT).min(MAX_BITMAP_UNITS);
        let units = if hole > MAX_SEED_UNITS {
            hole
        } else {
            MAX_SEED_UNITS
        };
        Extent::new(rest.start, units.min(rest.len))
    }

    /// What the copy has of what is absent. Of what cannot be read it has nothing: once a stretch is asked about, its
    /// answer must be taken, or the source would count as sent what never comes.
    async fn read(&self, stretch: Extent) -> Result<Vec<Hashed>, VolumeError> {
        let found = self
            .copy
            .data_extents(stretch.byte_offset(), stretch.byte_len())
            .await?;
        let mut data = UnitSet::empty(stretch.end());
        for part in found.iter().filter(|part| part.data) {
            data.insert(Extent::touching(part.offset, part.len).clamp_to(stretch));
        }
        let mut runs = Vec::new();
        for absent in self.disk.absent(stretch) {
            runs.extend(data.runs_within(absent));
        }
        hash_units(&self.copy, runs).await
    }

    async fn ask(&mut self, stretch: Extent) {
        let hashed = self.read(stretch).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "a stretch of an older copy cannot be read: it is sent");
            Vec::new()
        });
        let mut included = UnitSet::empty(stretch.len);
        let mut hashes = Vec::new();
        for part in &hashed {
            included.insert(Extent::new(part.run.start - stretch.start, part.run.len));
            hashes.extend(part.hashes.iter().flatten());
        }
        // Also of a stretch that the copy has nothing of: the source waits to hear of each.
        self.asked.insert(stretch.start, hashed);
        let said = Message::SeedHashes {
            space: self.disk.id(),
            first: stretch.start,
            units: stretch.len,
            packed: pack_bitmap(&included),
            hashes,
        };
        self.mouth.say(said).await;
    }

    /// Takes what is the same from the copy; how many units.
    async fn take(&mut self, first: u64, alike: &UnitSet) -> Result<u64, ArrivalError> {
        let mut taken = 0;
        for part in self.asked.remove(&first).unwrap_or_default() {
            let within = Extent::new(part.run.start - first, part.run.len);
            for run in alike.runs_within(within) {
                let from = ((run.start - within.start) * UNIT) as usize;
                let bytes: Bytes = part.bytes.slice(from..from + run.byte_len() as usize);
                let extent = Extent::new(first + run.start, run.len);
                self.arrivals
                    .take_own(self.disk.clone(), extent, bytes)
                    .await?;
                taken += run.len;
            }
        }
        self.taken += taken;
        Ok(taken)
    }
}
