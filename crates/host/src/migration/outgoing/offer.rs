//! What of the disks is offered, and when it may flow.

use std::sync::Arc;

use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, UNIT};
use whimbrel_volume::VolumeError;

use crate::disk::Disk;
use crate::migration::board::Board;
use crate::migration::flow::{Content, Flow};
use crate::migration::spaces;

/// Offers the disks, whole. Until one is frozen and looked through, nobody can say what of it is empty, so
/// nothing of it flows.
pub(super) fn offer_disks(flow: &Flow, disks: &[Arc<Disk>]) {
    for (n, disk) in disks.iter().enumerate() {
        let info = spaces::disk(n, disk.name(), disk.size());
        let (space, whole) = (info.id, Extent::new(0, info.units()));
        flow.add(info, Content::Disk(disk.file().clone()));
        flow.change(|out| out.offer_withheld(space, whole));
    }
}

/// Lets the content of a frozen disk flow. Holes that cannot be found are sent as zeroes, which is slow and
/// right.
pub(super) async fn release_disk(flow: &Flow, disk: &Disk, space: SpaceId, board: &Board) {
    let holes = holes_of(disk).await.unwrap_or_else(|error| {
        board.tell(format!(
            "disk {}: holes cannot be found ({error}); all of it is sent",
            disk.name()
        ));
        Vec::new()
    });
    flow.change(|out| {
        // What went ahead and was not written to since had content then and has it now.
        let sent = out.sent(space).clone();
        for hole in holes
            .into_iter()
            .flat_map(|hole| sent.gaps_within(hole).collect::<Vec<_>>())
        {
            out.emptied(space, hole);
        }
        out.ready(space, Extent::new(0, disk.size().div_ceil(UNIT)));
    });
}

async fn holes_of(disk: &Disk) -> Result<Vec<Extent>, VolumeError> {
    let data = content_of(disk).await?;
    Ok(data.gaps_within(Extent::new(0, data.capacity())).collect())
}

/// Units of a disk that have content, as its volume's storage tells.
pub(super) async fn content_of(disk: &Disk) -> Result<UnitSet, VolumeError> {
    let mut data = UnitSet::empty(disk.size().div_ceil(UNIT));
    let mut at = 0;
    while at < disk.size() {
        let runs = disk.file().data_extents(at, disk.size() - at).await?;
        for run in &runs {
            if run.data {
                data.insert(Extent::touching(run.offset, run.len));
            }
            at = run.offset + run.len;
        }
        if runs.is_empty() {
            break;
        }
    }
    Ok(data)
}
