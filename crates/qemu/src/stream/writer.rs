//! The stream writer: what a destination QEMU is told, as bytes appended to a buffer.
//!
//! Every function appends whole sections, so that what one call wrote can be put on the socket by
//! itself. Block names are repeated in each section: CONTINUE never reaches back over a section.

use whimbrel_engine::space::{Extent, UNIT};

use super::*;

/// Ranges in one RAM_DISCARD command. Its data has a 16-bit length, and QEMU reads it range by range.
const DISCARDS: usize = 2048;

/// Magic, version and the configuration section.
pub fn open(out: &mut Vec<u8>, layout: &StreamLayout) {
    out.extend(MAGIC.to_be_bytes());
    out.extend(VERSION.to_be_bytes());
    out.push(CONFIGURATION);
    out.extend((layout.configuration.len() as u32).to_be_bytes());
    out.extend(&layout.configuration);
}

fn command(out: &mut Vec<u8>, command: u16, data: &[u8]) {
    out.push(COMMAND);
    out.extend(command.to_be_bytes());
    out.extend((data.len() as u16).to_be_bytes());
    out.extend(data);
}

pub fn open_return_path(out: &mut Vec<u8>) {
    command(out, CMD_OPEN_RETURN_PATH, &[]);
}

pub fn ping(out: &mut Vec<u8>, value: u32) {
    command(out, CMD_PING, &value.to_be_bytes());
}

/// Announces a post-copy of memory in 4 KiB pages on both sides.
pub fn postcopy_advise(out: &mut Vec<u8>) {
    let mut data = UNIT.to_be_bytes().to_vec();
    data.extend(UNIT.to_be_bytes());
    command(out, CMD_POSTCOPY_ADVISE, &data);
}

/// RAM's START section with the list of blocks.
pub fn ram_start(out: &mut Vec<u8>, layout: &StreamLayout) {
    out.push(SECTION_START);
    out.extend(layout.ram_section.to_be_bytes());
    name(out, "ram");
    out.extend(layout.ram_instance.to_be_bytes());
    out.extend(RAM_SECTION_VERSION.to_be_bytes());
    out.extend((layout.total_bytes() | RAM_MEM_SIZE).to_be_bytes());
    for block in &layout.blocks {
        name(out, &block.name);
        out.extend(block.len.to_be_bytes());
        if block.page_size != UNIT {
            out.extend(block.page_size.to_be_bytes());
        }
    }
    ram_close(out, layout);
}

/// Opens a RAM PART; records follow, then [`ram_close`].
pub fn ram_part(out: &mut Vec<u8>, layout: &StreamLayout) {
    out.push(SECTION_PART);
    out.extend(layout.ram_section.to_be_bytes());
}

/// RAM's END section, without records.
pub fn ram_end(out: &mut Vec<u8>, layout: &StreamLayout) {
    out.push(SECTION_END);
    out.extend(layout.ram_section.to_be_bytes());
    ram_close(out, layout);
}

/// Ends a RAM section: EOS and footer.
pub fn ram_close(out: &mut Vec<u8>, layout: &StreamLayout) {
    out.extend(RAM_EOS.to_be_bytes());
    out.push(FOOTER);
    out.extend(layout.ram_section.to_be_bytes());
}

/// Page records: `data` is whole units, from `start` on. `named` says that the section's record
/// before was of the same block.
pub fn pages(out: &mut Vec<u8>, block: &RamBlock, start: u64, data: &[u8], mut named: bool) {
    for (unit, page) in (start..).zip(data.chunks_exact(UNIT as usize)) {
        record(out, block, unit, RAM_PAGE, named);
        out.extend(page);
        named = true;
    }
}

/// Zero records for every unit of the extent.
pub fn zeros(out: &mut Vec<u8>, block: &RamBlock, extent: Extent, mut named: bool) {
    for unit in extent.iter() {
        record(out, block, unit, RAM_ZERO, named);
        out.push(0);
        named = true;
    }
}

fn record(out: &mut Vec<u8>, block: &RamBlock, unit: u64, kind: u64, named: bool) {
    let flags = kind | if named { RAM_CONTINUE } else { 0 };
    out.extend(((unit * UNIT) | flags).to_be_bytes());
    if !named {
        name(out, &block.name);
    }
}

/// RAM_DISCARD of the extents, in as many commands as it takes.
pub fn discard(out: &mut Vec<u8>, block: &RamBlock, extents: impl IntoIterator<Item = Extent>) {
    let mut extents = extents.into_iter().filter(|e| !e.is_empty()).peekable();
    while extents.peek().is_some() {
        let mut data = vec![0];
        name(&mut data, &block.name);
        data.push(0);
        for extent in extents.by_ref().take(DISCARDS) {
            data.extend(extent.byte_offset().to_be_bytes());
            data.extend(extent.byte_len().to_be_bytes());
        }
        command(out, CMD_RAM_DISCARD, &data);
    }
}

/// PACKAGED{LISTEN, device state, RUN}: the switch of a post-copy.
pub fn package(out: &mut Vec<u8>, device_state: &[u8]) {
    let mut package = Vec::with_capacity(device_state.len() + 16);
    command(&mut package, CMD_POSTCOPY_LISTEN, &[]);
    package.extend(device_state);
    command(&mut package, CMD_POSTCOPY_RUN, &[]);
    command(out, CMD_PACKAGED, &(package.len() as u32).to_be_bytes());
    out.extend(package);
}

/// Asks which units of the block QEMU has received. Only in a recovery.
pub fn recv_bitmap(out: &mut Vec<u8>, block: &RamBlock) {
    let mut data = Vec::new();
    name(&mut data, &block.name);
    command(out, CMD_RECV_BITMAP, &data);
}

/// Ends a recovery's questions: the post-copy goes on.
pub fn postcopy_resume(out: &mut Vec<u8>) {
    command(out, CMD_POSTCOPY_RESUME, &[]);
}

/// The end of a pre-copy's stream. QEMU waits for the description of the devices that its own streams
/// carry there, and looks at nothing in it.
pub fn eof_described(out: &mut Vec<u8>) {
    const NOTHING: &[u8] = br#"{"devices":[]}"#;
    out.push(EOF);
    out.push(VMDESCRIPTION);
    out.extend((NOTHING.len() as u32).to_be_bytes());
    out.extend(NOTHING);
}

/// The end of a post-copy's stream.
pub fn eof(out: &mut Vec<u8>) {
    out.push(EOF);
}

fn name(out: &mut Vec<u8>, name: &str) {
    let bytes = &name.as_bytes()[..name.len().min(255)];
    out.push(bytes.len() as u8);
    out.extend(bytes);
}
