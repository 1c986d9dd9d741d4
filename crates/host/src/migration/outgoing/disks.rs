//! Disks ahead of the switchover, as [`DisksAhead`] decides: the source's part of the talk about it.
//!
//! # The order that makes it safe
//! ```text
//! source                                          destination
//! notes where the guest writes
//! DisksAhead                       -->            lets disks in
//! units ...                        -->            stores them, and records nothing
//! Stale (what was written since)   -->            notes it
//! nothing more of the disks; RAM goes ahead, or does not
//! RamEnd (all units so far)        -->            waits for them, makes them durable, lets nothing more in
//!                                  <--  RamTaken
//! stops the guest, and the disks
//! Stale (the rest), Grant          -->            evicts all that is stale, records what is left
//! ```
//! RAM waits for the disks, since of the two it becomes old sooner. What is stale is named while the guest
//! runs, so that the grant does not wait for it; what was named never goes ahead again, so that what is named is
//! old for good. A destination whose daemon dies before the grant has recorded nothing, and knows of nothing.

use std::sync::Arc;
use std::time::Duration;

use whimbrel_engine::disks_ahead::{DiskBefore, DisksAhead};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, UNIT};
use whimbrel_volume::heat::{HEAT_EXTENT, WEIGHT};
use whimbrel_wire::message::{FEATURE_DISKS_AHEAD, MAX_RUNS, Message};

use super::Outgoing;
use super::offer::content_of;
use crate::disk::{Changes, Disk, Mode};
use crate::migration::spaces;

/// Accesses of late that make a MiB part of the read working set.
const READ_OFTEN: u16 = 4 * WEIGHT;

/// Writes of late that make a MiB suspect of being written to soon.
const WRITTEN_OFTEN: u16 = 2 * WEIGHT;

/// How long an unreachable destination is waited for that has something of the disks: it took its time.
pub(super) const PATIENCE_WITH_DISKS: Duration = Duration::from_secs(15 * 60);

/// The disks on their way ahead.
pub(super) struct DisksOut {
    ahead: DisksAhead,
    changes: Vec<Arc<Changes>>,
    /// By disk: what was said to be stale on this connection.
    said: Vec<UnitSet>,
}

impl Outgoing {
    /// Brings of the disks ahead what is to go; whether that is all handed out.
    pub(super) async fn step_disks(&mut self) -> bool {
        self.refresh_disks();
        if self.link_up {
            self.say_stale_disks().await;
        }
        let now = self.now_ms();
        let Some(disks) = &mut self.disks_out else {
            return true;
        };
        self.setup.flow.change(|out| disks.ahead.step(out, now))
    }

    /// Whether disks are to go ahead, and the destination knows of that.
    pub(super) fn may_send_disks(&self) -> bool {
        let knows = self.setup.link.mouth.features() & FEATURE_DISKS_AHEAD != 0;
        if self.setup.disks_ahead && !knows {
            self.setup.board.tell(
                "the destination's version takes no disks ahead of the switch: they go after it",
            );
        }
        let seeded = self.setup.flow.is_seeded();
        if self.setup.disks_ahead && seeded {
            self.setup.board.tell(
                "the destination has an older copy of the disks: they are compared after the switch, and go then",
            );
        }
        self.setup.disks_ahead && knows && !seeded && !self.setup.disks.is_empty()
    }

    /// The destination has compared a disk with its older copy.
    pub(super) fn compared(&self, space: SpaceId) {
        let flow = &self.setup.flow;
        if let Some(info) = flow.infos().into_iter().find(|info| info.id == space) {
            let spared = (flow.tally(space).alike * UNIT) >> 20;
            self.setup.board.tell(format!(
                "disk {}: {spared} MiB were at the destination already, in an older copy",
                info.name
            ));
        }
    }

    pub(super) async fn begin_disks(&mut self) {
        let mut changes = Vec::new();
        let mut before = Vec::new();
        for (n, disk) in self.setup.disks.iter().enumerate() {
            let units = disk.size().div_ceil(UNIT);
            let noted = Arc::new(Changes::new(units));
            // First: what is written while it is looked through is noted.
            disk.set_mode(Mode::Noted(noted.clone())).await;
            changes.push(noted);
            let content = content_of(disk).await.unwrap_or_else(|error| {
                self.setup.board.tell(format!(
                    "disk {}: holes cannot be found ({error}); all of it is sent",
                    disk.name()
                ));
                UnitSet::full(units)
            });
            before.push(used_before(spaces::disk_id(n), disk, content));
        }
        let said = before
            .iter()
            .map(|disk| UnitSet::empty(disk.content.capacity()));
        let said = said.collect();
        let now = self.now_ms();
        let flow = &self.setup.flow;
        let ahead = flow.change(|out| DisksAhead::begin(out, before, now));
        self.disks_out = Some(DisksOut {
            ahead,
            changes,
            said,
        });
        self.setup
            .board
            .tell("what the guest does not write to of its disks goes ahead");
        self.say_disks_ahead().await;
        self.setup.flow.open();
    }

    /// Asks the destination to let disks in: at the beginning, and on each later connection before the stop.
    /// What was said on the connection before may not have been heard.
    pub(super) async fn say_disks_ahead(&mut self) {
        let Some(disks) = &mut self.disks_out else {
            return;
        };
        for said in &mut disks.said {
            *said = UnitSet::empty(said.capacity());
        }
        if self.stopped.is_none() {
            self.setup.link.mouth.say(Message::DisksAhead).await;
        }
    }

    /// Notes what was written to since the last look.
    pub(super) fn refresh_disks(&mut self) {
        let Some(disks) = &mut self.disks_out else {
            return;
        };
        for (n, changes) in disks.changes.iter().enumerate() {
            let units = changes.take();
            if !units.is_empty() {
                let flow = &self.setup.flow;
                flow.change(|out| disks.ahead.written(out, n, &units));
            }
        }
    }

    /// Nothing more of the disks goes ahead, whatever is left: the guest was stopped.
    pub(super) fn end_disks(&mut self) {
        if let Some(disks) = &mut self.disks_out {
            self.setup.flow.change(|out| disks.ahead.end(out));
        }
    }

    /// With the guest and its disks stopped, and all that went ahead with the destination: what of it is old is as
    /// if never sent.
    pub(super) fn settle_disks(&mut self) {
        self.refresh_disks();
        let Some(disks) = &mut self.disks_out else {
            return;
        };
        // What the destination says that it has, it says again when it has evicted.
        self.fares.resident.clear();
        self.setup.flow.settle_disks(&mut disks.ahead);
    }

    /// Names what is old of the disks, as far as it was not.
    pub(super) async fn say_stale_disks(&mut self) {
        let Some(disks) = &mut self.disks_out else {
            return;
        };
        for (n, (space, vain)) in disks.ahead.vain().enumerate() {
            let mut new = vain.clone();
            new.subtract(&disks.said[n]);
            disks.said[n].union_with(&new);
            let runs: Vec<Extent> = new.runs().collect();
            for runs in runs.chunks(MAX_RUNS) {
                let runs = runs.to_vec();
                let message = Message::Stale { space, runs };
                self.setup.link.mouth.say(message).await;
            }
        }
    }

    /// Whether anything of the disks went ahead, or is to.
    pub(super) fn has_disks_out(&self) -> bool {
        self.disks_out.is_some()
    }
}

/// A disk as its access log knows it.
fn used_before(space: SpaceId, disk: &Disk, content: UnitSet) -> DiskBefore {
    let (mut read, mut written) = (Vec::new(), Vec::new());
    if let Some(log) = disk.heat() {
        let heat = log.snapshot();
        let per = HEAT_EXTENT / UNIT;
        let of = |counts: &[u16], often: u16| -> Vec<Extent> {
            let hot = counts
                .iter()
                .enumerate()
                .filter(|(_, count)| **count >= often);
            hot.map(|(n, _)| Extent::new(n as u64 * per, per)).collect()
        };
        let within = Extent::new(0, content.capacity());
        let clamp = |runs: Vec<Extent>| runs.into_iter().map(|run| run.clamp_to(within)).collect();
        read = clamp(of(&heat.reads, READ_OFTEN));
        written = clamp(of(&heat.writes, WRITTEN_OFTEN));
    }
    DiskBefore {
        space,
        content,
        read,
        written,
    }
}
