//! The stop, and what the grant leaves time for.
//!
//! Between QEMU's STOP and the grant lie only the hand-over itself, the disks' mode and bitmaps. Whatever
//! can be done before (making disks durable, finding early) or after (finding holes) is.

use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_engine::switchover::SourceEvent;
use whimbrel_qemu::info::early_pages;
use whimbrel_qemu::source::Handover;
use whimbrel_wire::message::{MAX_BITMAP_UNITS, Message, RamMode, pack_bitmap};

use super::Outgoing;
use super::offer::release_disk;
use crate::api::error::ErrorCode;
use crate::api::types::Happened;
use crate::disk::Mode;
use crate::migration::flow::Flow;
use crate::migration::{heat, spaces};

/// Grain in which arriving stale pages are noticed.
const STALE_POLL: Duration = Duration::from_millis(4);

impl Outgoing {
    pub(super) async fn stop_guest(&mut self) {
        self.foretell_precopy();
        // The flush that QEMU makes at the stop is short if little is left to flush.
        for disk in &self.setup.disks {
            if let Err(error) = disk.file().sync().await {
                return self.fail(
                    ErrorCode::Io,
                    format!("the disk cannot be made durable: {error}"),
                );
            }
        }
        // Asked while the guest runs: they are where they are, whatever is in them.
        let early = match (&self.ram, &self.setup.qmp) {
            (Some(ram), Some(qmp)) => early_pages(qmp, ram.layout()).await,
            _ => return self.fail(ErrorCode::Internal, "the stop came before the copy"),
        };
        let early = early.unwrap_or_else(|error| {
            tracing::warn!(%error, "the pages that devices touch first are unknown; the destination will demand them one by one");
            Vec::new()
        });
        let Some(ram) = &self.ram else { return };
        let handover = match ram.stop().await {
            Ok(handover) => handover,
            Err(error) => {
                return self.fail(
                    ErrorCode::Qemu,
                    format!("the guest could not be stopped: {error}"),
                );
            }
        };
        self.stopped = Some(Instant::now());
        // Who stood still before has no blackout.
        self.stopped_at = (!handover.stood).then_some(handover.stopped_at_qemu);
        self.setup.board.mark(Happened::Stopped);
        let _ = self.setup.ram_changes.send(false);
        for disk in &self.setup.disks {
            disk.set_mode(Mode::Frozen).await;
        }
        self.end_disks();
        if self.ram_mode == RamMode::Precopy {
            if let Err(what) = self.finish_precopy(&handover).await {
                self.handover = Some(handover);
                return self.fail(ErrorCode::PeerUnreachable, what);
            }
        } else {
            if let Err(what) = self.end_ahead_in_stop().await {
                self.handover = Some(handover);
                return self.fail(ErrorCode::PeerUnreachable, what);
            }
            self.outdate_ahead(&handover);
            self.offer_ram(&handover, &early);
        }
        self.settle_disks();
        self.handover = Some(handover);
        self.event(SourceEvent::Stopped);
    }

    /// All of RAM that did not go ahead is offered: at once what is current, later what QEMU still delivers.
    /// Pages that devices touch first go first.
    fn offer_ram(&self, handover: &Handover, early: &[UnitSet]) {
        let Some(ram) = &self.ram else { return };
        for (block, stale) in handover.stale.iter().enumerate() {
            let space = self.ram_space(block);
            let mut live = ram.store().held(block);
            live.union_with(stale);
            self.setup.flow.change(|out| {
                live.subtract(out.sent(space));
                out.offer_set(space, &live);
                out.set_withheld(space, stale);
                for run in early.get(block).into_iter().flat_map(UnitSet::runs) {
                    out.demand(space, run);
                }
                // What the guest wrote last it will want first.
                for run in stale.runs() {
                    out.prefer(space, run);
                }
            });
        }
    }

    /// With the grant on its way there is time for the rest: pages that QEMU still delivers, and what of
    /// the disks has content at all.
    pub(super) async fn after_grant(&mut self) {
        if !self.tasks.is_empty() {
            return;
        }
        let view = self.setup.board.view();
        let machine = &self.setup.machine;
        machine.granted(&self.setup.host, view.id, view.peer).await;
        if let Some(ram) = &self.ram {
            let (store, flow) = (ram.store().clone(), self.setup.flow.clone());
            let blocks = ram.layout().blocks.len();
            let first = self.setup.disks.len();
            let task = tokio::spawn(async move {
                loop {
                    let left = follow_stale(&store, &flow, first, blocks);
                    if left == 0 {
                        return;
                    }
                    tokio::time::sleep(STALE_POLL).await;
                }
            });
            self.tasks.push(AbortOnDropHandle::new(task));
        }
        for n in 0..self.setup.disks.len() {
            let (disk, space) = (&self.setup.disks[n], spaces::disk_id(n));
            release_disk(&self.setup.flow, disk, space, &self.setup.board).await;
            self.say_empty(space).await;
        }
        // With a pre-copy its zeroes went the way of its content.
        if self.ram_mode != RamMode::Precopy {
            let blocks = self.ram.as_ref().map_or(0, |r| r.layout().blocks.len());
            for block in 0..blocks {
                self.say_empty(self.ram_space(block)).await;
            }
        }
        self.say_heat().await;
    }

    /// Tells the destination how hot the disks are.
    pub(super) async fn say_heat(&mut self) {
        self.heat_said = true;
        for (n, disk) in self.setup.disks.iter().enumerate() {
            let heat = disk
                .heat()
                .map(|log| heat::messages(spaces::disk_id(n), log));
            for message in heat.into_iter().flatten() {
                self.setup.link.mouth.say(message).await;
            }
        }
    }

    /// Tells the destination what of a space is empty.
    pub(super) async fn say_empty(&mut self, space: SpaceId) {
        self.empties_said.push(space);
        let Some(units) = self.setup.flow.units_of(space) else {
            return;
        };
        let runs = self.setup.flow.change(|out| out.empty_runs(space));
        let mut set = UnitSet::empty(units);
        for run in runs {
            set.insert(run);
        }
        let mut first = 0;
        while first < units {
            let len = MAX_BITMAP_UNITS.min(units - first);
            let mut part = UnitSet::empty(len);
            for run in set.runs_within(Extent::new(first, len)) {
                part.insert(Extent::new(run.start - first, run.len));
            }
            if !part.is_empty() {
                let message = Message::Empty {
                    space,
                    first,
                    units: len,
                    packed: pack_bitmap(&part),
                };
                self.setup.link.mouth.say(message).await;
            }
            first += len;
        }
    }
}

/// Frees demands and pushes of pages that have come meanwhile; the number still to come.
fn follow_stale(
    store: &whimbrel_qemu::store::RamStore,
    flow: &Flow,
    first: usize,
    blocks: usize,
) -> u64 {
    let mut left = 0;
    for block in 0..blocks {
        let stale = store.stale(block);
        left += stale.len();
        flow.change(|out| out.set_withheld(spaces::ram_id(first, block), &stale));
    }
    left
}
