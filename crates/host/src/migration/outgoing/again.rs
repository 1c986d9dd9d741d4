//! A source that an earlier daemon had left in the middle: granted, or being drained.
//!
//! That daemon's copy of RAM died with it, but the source's QEMU is still there, stopped, with its memory as
//! it was at the switchover; and the disks are frozen as they were. So everything is offered once more, and
//! the destination says by itself what of it it has.

use std::sync::Arc;

use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, UNIT};
use whimbrel_engine::switchover::{Action, Phase, Source};
use whimbrel_qemu::content::RamContent;
use whimbrel_qemu::paused::PausedRam;
use whimbrel_qemu::qmp::Qmp;
use whimbrel_qemu::stream::StreamLayout;
use whimbrel_volume::backend::is_zero;

use super::offer::{offer_disks, release_disk};
use super::{Outgoing, Setup};
use crate::api::types::Happened;
use crate::disk::Disk;
use crate::migration::board::Board;
use crate::migration::flow::{Content, Flow};
use crate::migration::spaces;

/// Pages looked through at a time for zeroes: 4 MiB.
const GLANCE: u64 = 1024;

impl Outgoing {
    /// Goes on where the journal ends. The flow has been filled by [`offer_again`].
    pub fn take_up(setup: Setup, source: Source) -> Self {
        let mut outgoing = Outgoing::new(setup);
        outgoing.taken_up = true;
        match source.phase() {
            // Also while the answer to the grant is unknown: a destination that has accepted may need memory
            // to load the device state, and answers only when its guest runs. One that has not keeps what
            // comes waiting, and throws it away when it refuses.
            Phase::Grant | Phase::Drain => {
                let board = outgoing.board();
                board.mark(Happened::Restarted);
                board.tell("a restarted daemon goes on with the migration");
                outgoing.todo.push_back(Action::Drain);
            }
            Phase::Complete => outgoing.todo.push_back(Action::Finish(Phase::Complete)),
            // Only to be told of: what was to be done has been.
            phase @ (Phase::Cancel | Phase::Rewind) => outgoing.over = Some(phase),
            _ => {}
        }
        let spaces = outgoing.setup.flow.infos();
        outgoing.empties_said = spaces.iter().map(|info| info.id).collect();
        outgoing.heat_said = true;
        outgoing.switch = source;
        outgoing
    }
}

/// Offers all that the disks and the stopped QEMU hold. What cannot be had is told of.
pub async fn offer_again(
    flow: &Flow,
    disks: &[Arc<Disk>],
    layout: Option<&StreamLayout>,
    qmp: Option<&Qmp>,
    pid: Option<u32>,
    board: &Board,
) {
    offer_disks(flow, disks);
    for (n, disk) in disks.iter().enumerate() {
        release_disk(flow, disk, spaces::disk_id(n), board).await;
    }
    let Some(layout) = layout else { return };
    let opened = match (qmp, pid) {
        (Some(qmp), Some(pid)) => PausedRam::open(qmp, pid, layout)
            .await
            .map_err(|e| e.to_string()),
        _ => Err("its process is gone".to_string()),
    };
    let ram = match opened {
        Ok(ram) => RamContent::Paused(ram),
        Err(why) => {
            board.tell(format!(
                "the guest's memory at the source is lost ({why}); what of it has not arrived will be missed"
            ));
            return;
        }
    };
    for (block, info) in spaces::ram(disks.len(), layout).enumerate() {
        let (space, name, units) = (info.id, info.name.clone(), info.units());
        let reader = ram.clone();
        let ram = ram.clone();
        flow.add(info, Content::Ram { ram, block });
        let live = tokio::task::spawn_blocking(move || content_of(&reader, block, units)).await;
        match live {
            Ok(Ok(live)) => flow.change(|out| out.offer_set(space, &live)),
            Ok(Err(error)) => {
                board.tell(format!(
                    "RAM block {name} cannot be read: {error}; what of it has not arrived will be missed"
                ));
            }
            Err(panic) => tracing::error!(%panic, "reading RAM panicked"),
        }
    }
}

/// The pages that are not zero.
fn content_of(ram: &RamContent, block: usize, units: u64) -> Result<UnitSet, whimbrel_qemu::Error> {
    let mut live = UnitSet::empty(units);
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < units {
        let len = GLANCE.min(units - at);
        bytes.clear();
        ram.read(block, at, len, &mut bytes)?;
        for (n, page) in bytes.chunks(UNIT as usize).enumerate() {
            if !is_zero(page) {
                live.insert(Extent::unit(at + n as u64));
            }
        }
        at += len;
    }
    Ok(live)
}
