//! What a machine's spaces are called and numbered: disks in the order of its description, then RAM blocks
//! in the order of the layout. Both sides number alike, so ids need not be said.

use whimbrel_engine::space::{SpaceId, SpaceInfo, SpaceKind};
use whimbrel_qemu::stream::{RamBlock, StreamLayout};

/// The id of a disk by its place in the description.
pub fn disk_id(n: usize) -> SpaceId {
    SpaceId(n as u16)
}

/// The id of a RAM block by its place in the layout, in a machine of so many disks.
pub fn ram_id(disks: usize, block: usize) -> SpaceId {
    SpaceId((disks + block) as u16)
}

/// Disk `n` of `len` bytes.
pub fn disk(n: usize, name: impl Into<String>, len: u64) -> SpaceInfo {
    SpaceInfo {
        id: disk_id(n),
        kind: SpaceKind::Disk,
        name: name.into(),
        len,
    }
}

/// The layout's RAM blocks, in a machine of so many disks.
pub fn ram(disks: usize, layout: &StreamLayout) -> impl Iterator<Item = SpaceInfo> {
    let block = move |(n, block): (usize, &RamBlock)| SpaceInfo {
        id: ram_id(disks, n),
        kind: SpaceKind::Ram,
        name: block.name.clone(),
        len: block.len,
    };
    layout.blocks.iter().enumerate().map(block)
}
