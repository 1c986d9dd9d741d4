//! The stream reader: bytes of a source QEMU in, [`Event`]s out.
//!
//! It pulls from any [`Read`] into one buffer of its own and hands pages out as slices of that
//! buffer, so that a page is copied once here (into the store). It runs on a thread of its own: the
//! stream comes at about 1 GB/s and has no pauses in which a runtime could do something else.
//!
//! State is kept in three places only: where in the stream we are (`At`), the RAM blocks, and the
//! block named last (a record with CONTINUE names none).

use std::io::Read;

use whimbrel_engine::space::{Extent, UNIT};

use super::*;

/// Bytes asked of the kernel at once, and the size of the buffer.
const BUFFER: usize = 1 << 20;

/// What a stream says next.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Content of the configuration section: the machine type.
    Configuration(Vec<u8>),
    Command(Command),
    /// RAM's START section: its id and instance, and all blocks.
    Layout {
        section: u32,
        instance: u32,
        blocks: Vec<RamBlock>,
    },
    /// A page's content: [`UNIT`] bytes.
    Page {
        block: usize,
        unit: u64,
        data: &'a [u8],
    },
    /// A page of zeros.
    Zero {
        block: usize,
        unit: u64,
    },
    /// The end of a PART: QEMU may pause here.
    PartEnd,
    /// RAM is complete.
    RamEnd,
    /// The device state of a pre-copy: everything after RAM's END and before the EOF.
    DeviceState(Vec<u8>),
    /// The stream is over.
    Eof,
}

/// A command of the source to its destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    OpenReturnPath,
    Ping(u32),
    PostcopyAdvise {
        page_sizes: u64,
        target_page_size: u64,
    },
    Listen,
    Run,
    /// These units will be sent again: what was sent of them is worth nothing.
    Discard {
        block: usize,
        extents: Vec<Extent>,
    },
    /// A sub-stream, sent whole.
    Packaged(Vec<u8>),
    Resume,
    RecvBitmap(String),
    SwitchoverStart,
    /// One this reader has no use for.
    Other(u16),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Header,
    Sections,
    /// Inside a RAM section of that type (START, PART or END).
    Ram(u8),
    DeviceState,
    Over,
}

/// Reads one stream.
#[derive(Debug)]
pub struct StreamReader<R> {
    input: Input<R>,
    at: At,
    section: Option<u32>,
    blocks: Vec<RamBlock>,
    last_block: Option<usize>,
    packaged: bool,
}

impl std::fmt::Debug for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            At::Header => "header",
            At::Sections => "sections",
            At::Ram(_) => "RAM",
            At::DeviceState => "device state",
            At::Over => "over",
        })
    }
}

impl<R: Read> StreamReader<R> {
    pub fn new(read: R) -> Self {
        StreamReader {
            input: Input::new(read),
            at: At::Header,
            section: None,
            blocks: Vec::new(),
            last_block: None,
            packaged: false,
        }
    }

    /// Reads the stream by which a source QEMU takes a paused post-copy up again: no header and no list
    /// of blocks comes, and the first RAM section's id is taken for RAM's.
    pub fn resumed(read: R, blocks: Vec<RamBlock>) -> Self {
        StreamReader {
            at: At::Sections,
            blocks,
            packaged: true,
            ..StreamReader::new(read)
        }
    }

    /// The blocks, known after [`Event::Layout`].
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Bytes taken from the stream so far.
    pub fn position(&self) -> u64 {
        self.input.taken
    }

    /// The next event; [`Event::Eof`] again and again once the stream is over.
    pub fn next_event(&mut self) -> Result<Event<'_>, StreamError> {
        if self.at == At::Header {
            let magic = self.input.u32("header")?;
            if magic != MAGIC {
                return Err(StreamError::Magic(magic));
            }
            let version = self.input.u32("header")?;
            if version != VERSION {
                return Err(StreamError::Version(version));
            }
            self.at = At::Sections;
        }
        match self.at {
            At::Over => Ok(Event::Eof),
            At::DeviceState => {
                let state = self.device_state()?;
                self.at = At::Over;
                Ok(Event::DeviceState(state))
            }
            At::Ram(kind) => self.ram(kind),
            At::Header | At::Sections => self.section(),
        }
    }

    fn section(&mut self) -> Result<Event<'_>, StreamError> {
        match self.input.u8("section")? {
            CONFIGURATION => self.configuration(),
            COMMAND => self.command().map(Event::Command),
            SECTION_START => self.ram_start(),
            kind @ (SECTION_PART | SECTION_END) => {
                let got = self.input.u32("section id")?;
                match self.section {
                    Some(expected) if expected == got => {}
                    Some(expected) => return Err(StreamError::SectionId { got, expected }),
                    None if self.blocks.is_empty() => return Err(StreamError::NoBlocks),
                    None => self.section = Some(got),
                }
                self.at = At::Ram(kind);
                self.ram(kind)
            }
            EOF => {
                self.at = At::Over;
                Ok(Event::Eof)
            }
            other => Err(StreamError::SectionType(other)),
        }
    }

    fn configuration(&mut self) -> Result<Event<'_>, StreamError> {
        let len = self.input.u32("configuration")? as usize;
        if len > MAX_CONFIGURATION {
            return Err(StreamError::TooLong {
                what: "configuration",
                len: len as u64,
            });
        }
        let content = self.input.take(len, "configuration")?.to_vec();
        // Subsections appear with capabilities and targets that Whimbrel does not use. Their content
        // has no stated length, so an unknown one cannot be skipped.
        if self.input.peek("section")? == SUBSECTION {
            self.input.u8("subsection")?;
            return Err(StreamError::Subsection(self.input.name("subsection")?));
        }
        Ok(Event::Configuration(content))
    }

    fn ram_start(&mut self) -> Result<Event<'_>, StreamError> {
        let section = self.input.u32("section id")?;
        let idstr = self.input.name("section name")?;
        let instance = self.input.u32("section instance")?;
        let version = self.input.u32("section version")?;
        if idstr != "ram" {
            return Err(StreamError::OtherSection(idstr));
        }
        if version != RAM_SECTION_VERSION {
            return Err(StreamError::RamVersion(version));
        }
        self.section = Some(section);
        let word = self.input.u64("RAM")?;
        if word & FLAGS != RAM_MEM_SIZE {
            return Err(StreamError::RamFlags(word & FLAGS));
        }
        self.blocks = self.block_list(word & !FLAGS)?;
        self.last_block = None;
        let end = self.input.u64("RAM")?;
        if end & FLAGS != RAM_EOS {
            return Err(StreamError::RamFlags(end & FLAGS));
        }
        self.footer()?;
        Ok(Event::Layout {
            section,
            instance,
            blocks: self.blocks.clone(),
        })
    }

    /// The list of blocks. A block's page size is stated only where it is not 4 KiB, and nothing says
    /// that it is: but a name is never empty and a flags word never has no flag, while the top byte
    /// and the low bits of a page size are zero.
    fn block_list(&mut self, total: u64) -> Result<Vec<RamBlock>, StreamError> {
        let mut blocks = Vec::new();
        let mut seen = 0u64;
        while seen < total {
            if blocks.len() == MAX_BLOCKS {
                return Err(StreamError::TooLong {
                    what: "list of RAM blocks",
                    len: MAX_BLOCKS as u64 + 1,
                });
            }
            let name = self.input.name("RAM block name")?;
            let len = self.input.u64("RAM block")?;
            seen = seen.saturating_add(len);
            let next = if seen < total {
                u64::from(self.input.peek("RAM block")?)
            } else {
                self.input.peek_u64("RAM")? & FLAGS
            };
            let page_size = if next == 0 {
                self.input.u64("RAM block page size")?
            } else {
                UNIT
            };
            blocks.push(RamBlock {
                name,
                len,
                page_size,
            });
        }
        check_blocks(&blocks)?;
        Ok(blocks)
    }

    fn ram(&mut self, kind: u8) -> Result<Event<'_>, StreamError> {
        let word = self.input.u64("RAM")?;
        let (address, flags) = (word & !FLAGS, word & FLAGS);
        match flags & !RAM_CONTINUE {
            RAM_PAGE => {
                let (block, unit) = self.place(address, flags)?;
                let data = self.input.take(UNIT as usize, "page")?;
                Ok(Event::Page { block, unit, data })
            }
            RAM_ZERO => {
                let (block, unit) = self.place(address, flags)?;
                match self.input.u8("zero page")? {
                    0 => Ok(Event::Zero { block, unit }),
                    // A page of one other byte: the flag allows it, no QEMU sends it.
                    _ => Err(StreamError::RamFlags(flags)),
                }
            }
            RAM_EOS if flags == RAM_EOS => {
                self.footer()?;
                if kind == SECTION_PART {
                    self.at = At::Sections;
                    return Ok(Event::PartEnd);
                }
                // After a post-copy's package only the EOF follows; in a pre-copy the devices do.
                self.at = if self.packaged {
                    At::Sections
                } else {
                    At::DeviceState
                };
                Ok(Event::RamEnd)
            }
            _ => Err(StreamError::RamFlags(flags)),
        }
    }

    fn place(&mut self, address: u64, flags: u64) -> Result<(usize, u64), StreamError> {
        let block = if flags & RAM_CONTINUE != 0 {
            self.last_block.ok_or(StreamError::NoBlocks)?
        } else {
            let name = self.input.name_bytes("RAM block name")?;
            find_block(&self.blocks, name)?
        };
        self.last_block = Some(block);
        if address >= self.blocks[block].len {
            return Err(StreamError::Address { block, address });
        }
        Ok((block, address / UNIT))
    }

    fn footer(&mut self) -> Result<(), StreamError> {
        let expected = self.section.unwrap_or(0);
        if self.input.u8("footer")? != FOOTER || self.input.u32("footer")? != expected {
            return Err(StreamError::Footer(expected));
        }
        Ok(())
    }

    fn command(&mut self) -> Result<Command, StreamError> {
        let command = self.input.u16("command")?;
        let len = usize::from(self.input.u16("command")?);
        if command == CMD_PACKAGED {
            if len != 4 {
                return Err(StreamError::Command { command, len });
            }
            let len = self.input.u32("package")? as usize;
            // The package also holds LISTEN, PING and RUN.
            if len > MAX_DEVICE_STATE + 64 {
                return Err(StreamError::TooLong {
                    what: "package",
                    len: len as u64,
                });
            }
            self.packaged = true;
            return Ok(Command::Packaged(self.input.take_long(len, "package")?));
        }
        let data = self.input.take(len, "command")?;
        parse_command(command, data, &self.blocks)
    }

    /// Everything up to the EOF byte that is followed by a VMDESCRIPTION which ends exactly where
    /// the stream pauses, or, of a QEMU told not to send one, by the end of the input.
    fn device_state(&mut self) -> Result<Vec<u8>, StreamError> {
        const MAX: usize = MAX_DEVICE_STATE + (16 << 20);
        let mut state = Vec::new();
        let mut scanned = 0;
        let mut candidates = Vec::new();
        loop {
            let available = self.input.some()?;
            if available.is_empty() {
                return match state.pop() {
                    Some(EOF) => Ok(state),
                    _ => Err(StreamError::Truncated("device state")),
                };
            }
            let count = available.len();
            state.extend_from_slice(available);
            self.input.skip(count);
            if state.len() > MAX {
                return Err(StreamError::TooLong {
                    what: "device state",
                    len: state.len() as u64,
                });
            }
            while let Some(end) = description_end(&state, scanned) {
                candidates.extend(end.map(|end| (scanned, end)));
                scanned += 1;
            }
            if let Some(&(start, _)) = candidates.iter().find(|&&(start, end)| {
                end == state.len()
                    && serde_json::from_slice::<Description>(&state[start + 6..end]).is_ok()
            }) {
                state.truncate(start);
                return Ok(state);
            }
        }
    }
}

/// What every description of a machine's state has.
#[derive(serde::Deserialize)]
struct Description {
    #[serde(rename = "devices")]
    _devices: Vec<serde::de::IgnoredAny>,
}

/// Whether `EOF, VMDESCRIPTION, len, "{"` stands at `at` and where that description would end; the
/// outer `None`: too few bytes to tell.
fn description_end(bytes: &[u8], at: usize) -> Option<Option<usize>> {
    let head = bytes.get(at..at + 7)?;
    if head[0] != EOF || head[1] != VMDESCRIPTION || head[6] != b'{' {
        return Some(None);
    }
    let len = u32::from_be_bytes([head[2], head[3], head[4], head[5]]) as usize;
    Some(Some(at + 6 + len))
}

fn find_block(blocks: &[RamBlock], name: &[u8]) -> Result<usize, StreamError> {
    blocks
        .iter()
        .position(|b| b.name.as_bytes() == name)
        .ok_or_else(|| StreamError::UnknownBlock(String::from_utf8_lossy(name).into_owned()))
}

fn parse_command(command: u16, data: &[u8], blocks: &[RamBlock]) -> Result<Command, StreamError> {
    let malformed = || StreamError::Command {
        command,
        len: data.len(),
    };
    let empty = |c: Command| data.is_empty().then_some(c).ok_or_else(malformed);
    match command {
        CMD_OPEN_RETURN_PATH => empty(Command::OpenReturnPath),
        CMD_POSTCOPY_LISTEN => empty(Command::Listen),
        CMD_POSTCOPY_RUN => empty(Command::Run),
        CMD_POSTCOPY_RESUME => empty(Command::Resume),
        CMD_SWITCHOVER_START => empty(Command::SwitchoverStart),
        CMD_PING => {
            let value = <[u8; 4]>::try_from(data).map_err(|_| malformed())?;
            Ok(Command::Ping(u32::from_be_bytes(value)))
        }
        CMD_POSTCOPY_ADVISE => match data.as_chunks::<8>() {
            ([sizes, page], []) => Ok(Command::PostcopyAdvise {
                page_sizes: u64::from_be_bytes(*sizes),
                target_page_size: u64::from_be_bytes(*page),
            }),
            // Post-copy of disks' bitmaps alone, which Whimbrel never asks for.
            _ => Err(malformed()),
        },
        CMD_RAM_DISCARD => discard(data, blocks)?.ok_or_else(malformed),
        CMD_RECV_BITMAP => {
            let (&len, name) = data.split_first().ok_or_else(malformed)?;
            if usize::from(len) != name.len() {
                return Err(malformed());
            }
            let name = std::str::from_utf8(name).map_err(|_| StreamError::Name)?;
            Ok(Command::RecvBitmap(name.to_owned()))
        }
        other => Ok(Command::Other(other)),
    }
}

fn discard(data: &[u8], blocks: &[RamBlock]) -> Result<Option<Command>, StreamError> {
    let [0, len, rest @ ..] = data else {
        return Ok(None);
    };
    let Some((name, rest)) = rest.split_at_checked(usize::from(*len)) else {
        return Ok(None);
    };
    let block = find_block(blocks, name)?;
    let [0, pairs @ ..] = rest else {
        return Ok(None);
    };
    let (pairs, []) = pairs.as_chunks::<16>() else {
        return Ok(None);
    };
    let mut extents = Vec::with_capacity(pairs.len());
    for pair in pairs {
        let word = u128::from_be_bytes(*pair);
        let (start, len) = ((word >> 64) as u64, word as u64);
        let end = start.checked_add(len);
        if start % UNIT != 0 || len % UNIT != 0 || end.is_none_or(|e| e > blocks[block].len) {
            return Err(StreamError::Address {
                block,
                address: start,
            });
        }
        extents.push(Extent::new(start / UNIT, len / UNIT));
    }
    Ok(Some(Command::Discard { block, extents }))
}

/// The device state in a package: the package without QEMU's own LISTEN before it and PING and RUN
/// after it. Those are commands to whoever listens; the one who speaks the state again says its own.
pub fn unpack(package: &[u8]) -> Result<&[u8], StreamError> {
    const LISTEN: [u8; 5] = [COMMAND, 0, CMD_POSTCOPY_LISTEN as u8, 0, 0];
    const RUN: [u8; 5] = [COMMAND, 0, CMD_POSTCOPY_RUN as u8, 0, 0];
    const PING: [u8; 5] = [COMMAND, 0, CMD_PING as u8, 0, 4];
    let mut state = package
        .strip_prefix(&LISTEN)
        .and_then(|p| p.strip_suffix(&RUN))
        .ok_or(StreamError::Package)?;
    // A PING is its header and a number.
    while let Some((before, ping)) = state.split_last_chunk::<9>() {
        if !ping.starts_with(&PING) {
            break;
        }
        state = before;
    }
    if !state.is_empty() && state[0] != SECTION_FULL {
        return Err(StreamError::Package);
    }
    Ok(state)
}

/// The input and its buffer: bytes `from..to` of `buffer` are read and not yet taken.
#[derive(Debug)]
struct Input<R> {
    read: R,
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
    taken: u64,
}

impl<R: Read> Input<R> {
    fn new(read: R) -> Self {
        Input {
            read,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            from: 0,
            to: 0,
            taken: 0,
        }
    }

    /// Reads once more; `false` at the end of the input.
    fn fill(&mut self) -> Result<bool, StreamError> {
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        } else if self.to == self.buffer.len() {
            self.buffer.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
        }
        loop {
            match self.read.read(&mut self.buffer[self.to..]) {
                Ok(count) => {
                    self.to += count;
                    return Ok(count != 0);
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(StreamError::Read(e)),
            }
        }
    }

    /// Makes `len` bytes (at most the buffer) available.
    fn need(&mut self, len: usize, what: &'static str) -> Result<(), StreamError> {
        while self.to - self.from < len {
            if !self.fill()? {
                return Err(StreamError::Truncated(what));
            }
        }
        Ok(())
    }

    fn skip(&mut self, len: usize) {
        self.from += len;
        self.taken += len as u64;
    }

    /// The next `len` bytes; only for lengths that fit the buffer.
    fn take(&mut self, len: usize, what: &'static str) -> Result<&[u8], StreamError> {
        debug_assert!(len <= BUFFER / 2);
        self.need(len, what)?;
        let from = self.from;
        self.skip(len);
        Ok(&self.buffer[from..from + len])
    }

    /// The next `len` bytes, of any length: grows with what arrives, not with what is announced.
    fn take_long(&mut self, len: usize, what: &'static str) -> Result<Vec<u8>, StreamError> {
        let mut out = Vec::new();
        while out.len() < len {
            self.need(1, what)?;
            let count = (self.to - self.from).min(len - out.len());
            out.extend_from_slice(&self.buffer[self.from..self.from + count]);
            self.skip(count);
        }
        Ok(out)
    }

    /// Whatever there is, without taking it; empty at the end of the input.
    fn some(&mut self) -> Result<&[u8], StreamError> {
        if self.from == self.to {
            self.fill()?;
        }
        Ok(&self.buffer[self.from..self.to])
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], StreamError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, StreamError> {
        Ok(self.array::<1>(what)?[0])
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, StreamError> {
        Ok(u16::from_be_bytes(self.array(what)?))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, StreamError> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, StreamError> {
        Ok(u64::from_be_bytes(self.array(what)?))
    }

    fn peek(&mut self, what: &'static str) -> Result<u8, StreamError> {
        self.need(1, what)?;
        Ok(self.buffer[self.from])
    }

    fn peek_u64(&mut self, what: &'static str) -> Result<u64, StreamError> {
        self.need(8, what)?;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.buffer[self.from..self.from + 8]);
        Ok(u64::from_be_bytes(bytes))
    }

    fn name_bytes(&mut self, what: &'static str) -> Result<&[u8], StreamError> {
        let len = usize::from(self.u8(what)?);
        self.take(len, what)
    }

    fn name(&mut self, what: &'static str) -> Result<String, StreamError> {
        let bytes = self.name_bytes(what)?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| StreamError::Name)
    }
}
