//! QEMU's migration stream, as facts.
//!
//! A stream is a header (magic, version) and sections, each opened by one byte. Integers are
//! big-endian. The sections Whimbrel speaks:
//!
//! ```text
//! 07 CONFIGURATION  u32 len, machine type
//! 08 COMMAND        u16 command, u16 len, data
//! 01 START          u32 id, u8 n + idstr, u32 instance, u32 version, content, footer
//! 02 PART, 03 END   u32 id, content, footer
//! 04 FULL           a device's state, of no stated length, footer
//! 7e FOOTER         u32 id
//! 00 EOF
//! 06 VMDESCRIPTION  u32 len, JSON (only after a pre-copy's EOF)
//! ```
//!
//! RAM's content is a run of 64-bit words, low 12 bits flags, the rest an address or a size, up to a
//! word with the EOS flag. A page word is followed by `u8 n + block name` unless CONTINUE is set.
//!
//! The device state has no stated length: it can be taken out whole because a post-copy wraps it in a
//! PACKAGED command, and because in a pre-copy it lies between the footer of RAM's END and the EOF
//! (found by the VMDESCRIPTION that must follow and must fit exactly).
//!
//! The [`reader`] turns bytes into [`reader::Event`]s, the [`writer`] makes the bytes again. Both know
//! nothing of sockets. What is in a stream may come from anywhere: every length has a bound, nothing
//! is allocated because a length field says so.

pub mod reader;
pub mod return_path;
mod run_state;
pub mod writer;

use serde::{Deserialize, Serialize};
use whimbrel_engine::space::{Extent, UNIT};

pub use return_path::ReturnError;
pub use run_state::{was_stopped, was_stopped_by_disk};

pub(crate) const MAGIC: u32 = 0x5145_564d;
pub(crate) const VERSION: u32 = 3;

pub(crate) const EOF: u8 = 0x00;
pub(crate) const SECTION_START: u8 = 0x01;
pub(crate) const SECTION_PART: u8 = 0x02;
pub(crate) const SECTION_END: u8 = 0x03;
pub(crate) const SECTION_FULL: u8 = 0x04;
pub(crate) const SUBSECTION: u8 = 0x05;
pub(crate) const VMDESCRIPTION: u8 = 0x06;
pub(crate) const CONFIGURATION: u8 = 0x07;
pub(crate) const COMMAND: u8 = 0x08;
pub(crate) const FOOTER: u8 = 0x7e;

pub(crate) const FLAGS: u64 = 0xfff;
pub(crate) const RAM_ZERO: u64 = 0x02;
pub(crate) const RAM_MEM_SIZE: u64 = 0x04;
pub(crate) const RAM_PAGE: u64 = 0x08;
pub(crate) const RAM_EOS: u64 = 0x10;
pub(crate) const RAM_CONTINUE: u64 = 0x20;

pub(crate) const CMD_OPEN_RETURN_PATH: u16 = 1;
pub(crate) const CMD_PING: u16 = 2;
pub(crate) const CMD_POSTCOPY_ADVISE: u16 = 3;
pub(crate) const CMD_POSTCOPY_LISTEN: u16 = 4;
pub(crate) const CMD_POSTCOPY_RUN: u16 = 5;
pub(crate) const CMD_RAM_DISCARD: u16 = 6;
pub(crate) const CMD_PACKAGED: u16 = 7;
pub(crate) const CMD_POSTCOPY_RESUME: u16 = 9;
pub(crate) const CMD_RECV_BITMAP: u16 = 10;
pub(crate) const CMD_SWITCHOVER_START: u16 = 11;

/// The only version of RAM's section known.
pub(crate) const RAM_SECTION_VERSION: u32 = 4;

/// Most RAM blocks accepted (a small q35 guest has about ten).
pub const MAX_BLOCKS: usize = 1024;
/// Most guest memory accepted, in bytes. The tables kept per 2 MiB stay below 128 MiB at this size.
pub const MAX_RAM: u64 = 16 << 40;
/// Largest device state QEMU takes in one package (its own limit is 2^24 bytes, commands included).
pub const MAX_DEVICE_STATE: usize = (16 << 20) - 64;
/// Longest configuration section accepted: it holds a machine type's name.
pub(crate) const MAX_CONFIGURATION: usize = 4096;

/// A RAM block of the guest, in the order in which the stream lists them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// QEMU's name: `pc.ram`, `0000:00:02.0/virtio-net-pci.rom`, ...
    pub name: String,
    /// Bytes; a multiple of [`UNIT`].
    pub len: u64,
    /// Bytes in a page of the memory behind it; 4096 unless huge pages were asked for.
    pub page_size: u64,
}

impl RamBlock {
    /// Number of units.
    pub fn units(&self) -> u64 {
        self.len / UNIT
    }

    /// The whole block.
    pub fn whole(&self) -> Extent {
        Extent::new(0, self.units())
    }
}

/// What must be known of a source's stream to speak it again to a destination QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamLayout {
    /// Content of the configuration section: the concrete machine type (`pc-q35-10.0`).
    pub configuration: Vec<u8>,
    /// Id under which the source speaks of RAM: differs between versions of QEMU.
    pub ram_section: u32,
    /// Instance of RAM's section (0).
    pub ram_instance: u32,
    pub blocks: Vec<RamBlock>,
}

impl StreamLayout {
    /// The machine type, where the configuration is text.
    pub fn machine_type(&self) -> &str {
        std::str::from_utf8(&self.configuration).unwrap_or("")
    }

    /// Bytes of all blocks.
    pub fn total_bytes(&self) -> u64 {
        self.blocks
            .iter()
            .fold(0, |sum, b| sum.saturating_add(b.len))
    }

    /// Index of the block of that name.
    pub fn block(&self, name: &str) -> Option<usize> {
        self.blocks.iter().position(|b| b.name == name)
    }

    /// Refuses what no reader would have let through: for layouts that come from a peer.
    pub fn check(&self) -> Result<(), StreamError> {
        if self.configuration.len() > MAX_CONFIGURATION {
            return Err(StreamError::TooLong {
                what: "configuration",
                len: self.configuration.len() as u64,
            });
        }
        check_blocks(&self.blocks)
    }
}

pub(crate) fn check_blocks(blocks: &[RamBlock]) -> Result<(), StreamError> {
    if blocks.len() > MAX_BLOCKS {
        return Err(StreamError::TooLong {
            what: "list of RAM blocks",
            len: blocks.len() as u64,
        });
    }
    let mut total = 0u64;
    for (index, block) in blocks.iter().enumerate() {
        total = total.saturating_add(block.len);
        let name_fits = !block.name.is_empty() && block.name.len() <= 255;
        let doubled = blocks[..index].iter().any(|b| b.name == block.name);
        if !name_fits || doubled || block.len % UNIT != 0 || total > MAX_RAM {
            return Err(StreamError::BadBlock {
                name: block.name.clone(),
                len: block.len,
            });
        }
    }
    Ok(())
}

/// What a stream can be wrong in.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("reading failed: {0}")]
    Read(#[source] std::io::Error),
    #[error("ended in the middle of {0}")]
    Truncated(&'static str),
    #[error("not a migration stream: magic {0:#010x}")]
    Magic(u32),
    #[error("version {0} of the stream is unknown")]
    Version(u32),
    #[error("section type {0:#04x} where none can be")]
    SectionType(u8),
    #[error("configuration subsection {0} is unknown")]
    Subsection(String),
    #[error("{what} of {len} is too long")]
    TooLong { what: &'static str, len: u64 },
    #[error("RAM section of version {0} is unknown")]
    RamVersion(u32),
    #[error("live section {0} is not RAM")]
    OtherSection(String),
    #[error("section {got} where RAM's, {expected}, belongs")]
    SectionId { got: u32, expected: u32 },
    #[error("section {0} has no footer")]
    Footer(u32),
    #[error("RAM record with flags {0:#05x} is unknown")]
    RamFlags(u64),
    #[error("RAM block {name} of {len} bytes is not possible")]
    BadBlock { name: String, len: u64 },
    #[error("RAM block {0} is unknown")]
    UnknownBlock(String),
    #[error("address {address:#x} is outside RAM block {block}")]
    Address { block: usize, address: u64 },
    #[error("a RAM record comes before the list of blocks")]
    NoBlocks,
    #[error("command {command} with {len} bytes of data is malformed")]
    Command { command: u16, len: usize },
    #[error("a name is not UTF-8")]
    Name,
    #[error("the package does not hold LISTEN, device state, RUN")]
    Package,
}
