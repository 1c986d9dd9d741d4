//! The one validate step of the transmission phase.
//!
//! A header goes in; out comes a [`Request`] that handlers may trust, a [`Refusal`] with the error the
//! specification asks for, or the news that the stream is over or lost. One request needs a second look:
//! the payload of a [`Filter`] holds a length and numbers of contexts. No I/O, no allocation.

use bytes::Buf;

use crate::contexts::ContextSet;
use crate::dialect::Dialect;
use crate::export::{Errno, ExportInfo, MAX_CONTEXTS, MAX_STATUS_RUNS, ZeroHow};
use crate::reply::DESCRIPTOR;
use crate::spec::*;

/// What a connection has negotiated, as far as requests depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    pub size: u64,
    pub read_only: bool,
    pub min_block: u32,
    pub max_block: u32,
    pub dialect: Dialect,
    /// The selected metadata contexts. None without chunks.
    pub contexts: ContextSet,
}

impl Rules {
    pub fn new(info: &ExportInfo, dialect: Dialect, contexts: ContextSet) -> Self {
        Rules {
            size: info.size,
            read_only: info.read_only,
            min_block: info.min_block,
            max_block: info.max_block,
            dialect,
            contexts,
        }
    }

    /// The largest payload that is received or skipped. A longer one ends the connection; it is far
    /// beyond what the client was told, or may assume if it did not ask.
    fn longest_payload(&self) -> u32 {
        self.max_block.max(DEFAULT_MAX_PAYLOAD)
    }
}

/// A request that obeys the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's name for the request, repeated in the reply.
    pub cookie: u64,
    pub command: Command,
}

/// Ranges are not empty, inside the export, and aligned to its minimum block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read {
        offset: u64,
        len: u32,
        /// The reply must be one chunk (DF).
        whole: bool,
    },
    /// `len` bytes of payload follow the header.
    Write {
        offset: u64,
        len: u32,
        fua: bool,
    },
    Flush,
    Trim {
        offset: u64,
        len: u64,
        fua: bool,
    },
    Cache {
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        how: ZeroHow,
    },
    BlockStatus {
        offset: u64,
        len: u64,
        one: bool,
        /// Those to be answered for, at least one, all of them selected.
        contexts: ContextSet,
    },
}

impl Command {
    /// Where it begins; extended replies repeat it.
    pub fn offset(&self) -> u64 {
        match *self {
            Command::Flush => 0,
            Command::Read { offset, .. }
            | Command::Write { offset, .. }
            | Command::Trim { offset, .. }
            | Command::Cache { offset, .. }
            | Command::WriteZeroes { offset, .. }
            | Command::BlockStatus { offset, .. } => offset,
        }
    }

    /// The most bytes held for the request while it is served, in either direction.
    pub fn payload(&self) -> u32 {
        match *self {
            Command::Read { len, .. } | Command::Write { len, .. } => len,
            Command::BlockStatus { one, contexts, .. } => {
                let runs = if one { 1 } else { MAX_STATUS_RUNS };
                (contexts.len() * runs * DESCRIPTOR) as u32
            }
            _ => 0,
        }
    }

    /// Whether it may change the export, and so must not be dropped half done.
    pub fn changes(&self) -> bool {
        matches!(
            self,
            Command::Write { .. }
                | Command::Flush
                | Command::Trim { .. }
                | Command::WriteZeroes { .. }
        )
    }
}

/// A request that is answered with an error and goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub cookie: u64,
    /// As the client sent it.
    pub offset: u64,
    pub errno: Errno,
    /// For a human being.
    pub reason: &'static str,
    /// Bytes of payload that follow the header and must be skipped before the answer.
    pub skip: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept(Request),
    /// To be judged again with its payload.
    Filter(Filter),
    Refuse(Refusal),
    /// The client is leaving; everything in flight is still answered.
    Disconnect,
}

/// The bytes are no request, or one that nobody would wait for the end of: where the next one starts
/// cannot be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamLost {
    #[error("request magic {0:#010x}")]
    Magic(u32),
    #[error("a payload of {0} bytes")]
    Payload(u64),
}

/// The fields of a request's header, not yet judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    magic: u32,
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

impl Header {
    /// The header at the front of `data`; `None` if there are fewer than
    /// [`Dialect::header`] bytes.
    pub fn first(data: &[u8], dialect: Dialect) -> Option<Self> {
        let mut bytes = data.get(..dialect.header())?;
        Some(Header {
            magic: bytes.get_u32(),
            flags: bytes.get_u16(),
            kind: bytes.get_u16(),
            cookie: bytes.get_u64(),
            offset: bytes.get_u64(),
            len: match dialect {
                Dialect::Extended => bytes.get_u64(),
                Dialect::Simple | Dialect::Structured => bytes.get_u32().into(),
            },
        })
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Bytes of payload that follow. With extended headers a flag says so, but QEMU (10.0 at least) sends
    /// its writes without it, and a write without a payload would mean nothing.
    fn payload(&self, rules: &Rules) -> Result<u32, StreamLost> {
        let extended = rules.dialect == Dialect::Extended;
        if self.kind != CMD_WRITE && !(extended && self.has(CMD_FLAG_PAYLOAD_LEN)) {
            return Ok(0);
        }
        match u32::try_from(self.len) {
            // Without extended headers the specification has the server skip any length.
            Ok(len) if !extended || len <= rules.longest_payload() => Ok(len),
            _ => Err(StreamLost::Payload(self.len)),
        }
    }

    fn refuse(&self, (errno, reason): Reason, skip: u32) -> Verdict {
        Verdict::Refuse(Refusal {
            cookie: self.cookie,
            offset: self.offset,
            errno,
            reason,
            skip,
        })
    }
}

type Reason = (Errno, &'static str);

/// Judges one request.
pub fn validate(header: &Header, rules: &Rules) -> Result<Verdict, StreamLost> {
    let magic = match rules.dialect {
        Dialect::Extended => EXTENDED_REQUEST_MAGIC,
        Dialect::Simple | Dialect::Structured => REQUEST_MAGIC,
    };
    if header.magic != magic {
        return Err(StreamLost::Magic(header.magic));
    }
    if header.kind == CMD_DISC {
        return Ok(Verdict::Disconnect);
    }
    let payload = header.payload(rules)?;
    if payload > 0 && header.kind == CMD_BLOCK_STATUS {
        return Ok(match filter(header, payload, rules) {
            Ok(filter) => Verdict::Filter(filter),
            Err(reason) => header.refuse(reason, payload),
        });
    }
    Ok(match command(header, rules) {
        Ok(command) => Verdict::Accept(Request {
            cookie: header.cookie,
            command,
        }),
        Err(reason) => header.refuse(reason, payload),
    })
}

fn command(header: &Header, rules: &Rules) -> Result<Command, Reason> {
    let Header {
        kind, offset, len, ..
    } = *header;
    if rules.read_only && matches!(kind, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES) {
        return Err((Errno::Eperm, "the export is read-only"));
    }
    flags(header, rules)?;
    let fua = header.has(CMD_FLAG_FUA);
    match kind {
        CMD_READ => {
            range(header, rules, Errno::Einval)?;
            // Without structured replies clients do not expect EOVERFLOW.
            let too_long = if rules.dialect.chunks() {
                Errno::Eoverflow
            } else {
                Errno::Einval
            };
            Ok(Command::Read {
                offset,
                len: transfer(len, rules).ok_or((too_long, "longer than the largest read"))?,
                whole: header.has(CMD_FLAG_DF),
            })
        }
        CMD_WRITE => {
            range(header, rules, Errno::Enospc)?;
            let len =
                transfer(len, rules).ok_or((Errno::Einval, "longer than the largest write"))?;
            Ok(Command::Write { offset, len, fua })
        }
        CMD_FLUSH => {
            if offset != 0 || len != 0 {
                return Err((Errno::Einval, "a flush has no range"));
            }
            Ok(Command::Flush)
        }
        CMD_TRIM => {
            range(header, rules, Errno::Einval)?;
            Ok(Command::Trim { offset, len, fua })
        }
        CMD_CACHE => {
            range(header, rules, Errno::Einval)?;
            Ok(Command::Cache { offset, len })
        }
        CMD_WRITE_ZEROES => {
            range(header, rules, Errno::Enospc)?;
            let how = ZeroHow {
                fua,
                no_hole: header.has(CMD_FLAG_NO_HOLE),
                fast: header.has(CMD_FLAG_FAST_ZERO),
            };
            Ok(Command::WriteZeroes { offset, len, how })
        }
        CMD_BLOCK_STATUS => {
            // Reached with a payload only if that is empty, and then it names no context.
            if header.has(CMD_FLAG_PAYLOAD_LEN) {
                return Err((Errno::Einval, NO_FILTER));
            }
            status(header, rules, rules.contexts)
        }
        _ => Err((Errno::Einval, "unknown command")),
    }
}

fn status(header: &Header, rules: &Rules, contexts: ContextSet) -> Result<Command, Reason> {
    if contexts.is_empty() {
        return Err((Errno::Einval, "no metadata context was selected"));
    }
    range(header, rules, Errno::Einval)?;
    Ok(Command::BlockStatus {
        offset: header.offset,
        len: header.len,
        one: header.has(CMD_FLAG_REQ_ONE),
        contexts,
    })
}

/// The length of what is read or written, if it is allowed.
fn transfer(len: u64, rules: &Rules) -> Option<u32> {
    u32::try_from(len)
        .ok()
        .filter(|&len| len <= rules.max_block)
}

/// FUA is allowed on every command, where it was offered; the other flags on their own command only.
fn flags(header: &Header, rules: &Rules) -> Result<(), Reason> {
    let mut allowed = match header.kind {
        CMD_READ if rules.dialect.chunks() => CMD_FLAG_DF,
        CMD_WRITE_ZEROES => CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
        CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
        _ => 0,
    };
    if rules.dialect == Dialect::Extended && matches!(header.kind, CMD_WRITE | CMD_BLOCK_STATUS) {
        allowed |= CMD_FLAG_PAYLOAD_LEN;
    }
    if !rules.read_only {
        allowed |= CMD_FLAG_FUA;
    }
    if header.has(!allowed) {
        return Err((Errno::Einval, "flag not valid for the command"));
    }
    Ok(())
}

fn range(header: &Header, rules: &Rules, beyond: Errno) -> Result<(), Reason> {
    let Header { offset, len, .. } = *header;
    if len == 0 {
        return Err((Errno::Einval, "empty range"));
    }
    let end = match offset.checked_add(len) {
        Some(end) if end <= rules.size => end,
        _ => return Err((beyond, "beyond the end of the export")),
    };
    let block = u64::from(rules.min_block);
    if !offset.is_multiple_of(block) || (!end.is_multiple_of(block) && end != rules.size) {
        return Err((Errno::Einval, "not aligned to the minimum block"));
    }
    Ok(())
}

/// A BLOCK_STATUS for some of the selected contexts. Its payload, [`Filter::payload`] bytes, holds the
/// length of the range (64 bits) and the numbers of the contexts (32 bits each).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    header: Header,
    payload: u32,
}

const NO_FILTER: &str = "the payload is no length and numbers of contexts";

fn filter(header: &Header, payload: u32, rules: &Rules) -> Result<Filter, Reason> {
    flags(header, rules)?;
    if !payload.is_multiple_of(4) || !(12..=8 + 4 * MAX_CONTEXTS as u32).contains(&payload) {
        return Err((Errno::Einval, NO_FILTER));
    }
    Ok(Filter {
        header: *header,
        payload,
    })
}

impl Filter {
    /// Bytes of payload: at most 8 and 4 for each of [`MAX_CONTEXTS`].
    pub fn payload(&self) -> usize {
        self.payload as usize
    }

    /// Judges the request with its payload, which has been taken from the stream: accepts it, or
    /// refuses it with nothing left to skip.
    pub fn judge(&self, mut payload: &[u8], rules: &Rules) -> Verdict {
        let invalid = |reason| self.header.refuse((Errno::Einval, reason), 0);
        let Ok(len) = payload.try_get_u64() else {
            return invalid(NO_FILTER);
        };
        let mut contexts = ContextSet::default();
        while let Ok(number) = payload.try_get_u32() {
            if !rules.contexts.contains(number) || !contexts.insert(number) {
                return invalid("a context was not selected, or is named twice");
            }
        }
        let header = Header { len, ..self.header };
        match status(&header, rules, contexts) {
            Ok(command) => Verdict::Accept(Request {
                cookie: header.cookie,
                command,
            }),
            Err(reason) => header.refuse(reason, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            size: 1 << 20,
            read_only: false,
            min_block: 512,
            max_block: 64 << 10,
            dialect: Dialect::Structured,
            contexts: ContextSet::from_iter([1, 2]),
        }
    }

    fn raw(flags: u16, kind: u16, offset: u64, len: u32) -> [u8; 28] {
        let mut bytes = [0; 28];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&77u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&len.to_be_bytes());
        bytes
    }

    fn judge(bytes: &[u8], rules: &Rules) -> Result<Verdict, StreamLost> {
        validate(&Header::first(bytes, rules.dialect).unwrap(), rules)
    }

    fn errno(rules: Rules, flags: u16, kind: u16, offset: u64, len: u32) -> Option<Errno> {
        match judge(&raw(flags, kind, offset, len), &rules).unwrap() {
            Verdict::Accept(request) => {
                assert_eq!(request.cookie, 77);
                None
            }
            Verdict::Refuse(refusal) => {
                assert_eq!((refusal.cookie, refusal.offset), (77, offset));
                assert_eq!(refusal.skip, if kind == CMD_WRITE { len } else { 0 });
                Some(refusal.errno)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn wrong_magic_loses_the_stream() {
        let mut bytes = raw(0, CMD_READ, 0, 512);
        bytes[0] ^= 1;
        assert!(judge(&bytes, &rules()).is_err());
    }

    #[test]
    fn disconnect_is_never_refused() {
        let verdict = judge(&raw(0xffff, CMD_DISC, 7, 7), &rules()).unwrap();
        assert_eq!(verdict, Verdict::Disconnect);
    }

    #[test]
    fn a_range_past_the_end_is_enospc_for_writes_and_einval_for_the_rest() {
        for (kind, expected) in [
            (CMD_READ, Errno::Einval),
            (CMD_WRITE, Errno::Enospc),
            (CMD_TRIM, Errno::Einval),
            (CMD_CACHE, Errno::Einval),
            (CMD_WRITE_ZEROES, Errno::Enospc),
            (CMD_BLOCK_STATUS, Errno::Einval),
        ] {
            assert_eq!(errno(rules(), 0, kind, (1 << 20) - 512, 512), None);
            assert_eq!(
                errno(rules(), 0, kind, (1 << 20) - 512, 1024),
                Some(expected)
            );
            assert_eq!(errno(rules(), 0, kind, 1 << 20, 512), Some(expected));
            assert_eq!(errno(rules(), 0, kind, u64::MAX - 511, 512), Some(expected));
            assert_eq!(errno(rules(), 0, kind, 0, 0), Some(Errno::Einval));
            assert_eq!(errno(rules(), 0, kind, 256, 512), Some(Errno::Einval));
            assert_eq!(errno(rules(), 0, kind, 512, 256), Some(Errno::Einval));
        }
    }

    #[test]
    fn the_short_last_block_can_be_reached() {
        let odd = Rules {
            size: 1000,
            ..rules()
        };
        assert_eq!(errno(odd, 0, CMD_READ, 512, 488), None);
        assert_eq!(errno(odd, 0, CMD_READ, 512, 487), Some(Errno::Einval));
    }

    #[test]
    fn only_payloads_are_limited_by_the_largest_block() {
        let over = (64 << 10) + 512;
        assert_eq!(errno(rules(), 0, CMD_READ, 0, over), Some(Errno::Eoverflow));
        assert_eq!(errno(rules(), 0, CMD_WRITE, 0, over), Some(Errno::Einval));
        assert_eq!(errno(rules(), 0, CMD_TRIM, 0, over), None);
        assert_eq!(errno(rules(), 0, CMD_WRITE_ZEROES, 0, over), None);
        let simple = Rules {
            dialect: Dialect::Simple,
            ..rules()
        };
        assert_eq!(errno(simple, 0, CMD_READ, 0, over), Some(Errno::Einval));
    }

    #[test]
    fn a_read_only_export_takes_no_writes_and_knows_no_fua() {
        let rules = Rules {
            read_only: true,
            ..rules()
        };
        for kind in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
            assert_eq!(errno(rules, 0, kind, 0, 512), Some(Errno::Eperm));
            assert_eq!(errno(rules, CMD_FLAG_FUA, kind, 0, 512), Some(Errno::Eperm));
        }
        assert_eq!(errno(rules, 0, CMD_READ, 0, 512), None);
        assert_eq!(errno(rules, 0, CMD_FLUSH, 0, 0), None);
        assert_eq!(
            errno(rules, CMD_FLAG_FUA, CMD_READ, 0, 512),
            Some(Errno::Einval)
        );
    }

    #[test]
    fn each_flag_belongs_to_its_command_and_fua_to_all() {
        let all = [
            CMD_READ,
            CMD_WRITE,
            CMD_TRIM,
            CMD_CACHE,
            CMD_WRITE_ZEROES,
            CMD_BLOCK_STATUS,
        ];
        for kind in all {
            for bit in 0..16 {
                let flag = 1 << bit;
                let valid = match flag {
                    CMD_FLAG_FUA => true,
                    CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO => kind == CMD_WRITE_ZEROES,
                    CMD_FLAG_DF => kind == CMD_READ,
                    CMD_FLAG_REQ_ONE => kind == CMD_BLOCK_STATUS,
                    _ => false,
                };
                let expected = if valid { None } else { Some(Errno::Einval) };
                assert_eq!(
                    errno(rules(), flag, kind, 0, 512),
                    expected,
                    "{kind} {flag}"
                );
            }
        }
    }

    #[test]
    fn what_was_not_negotiated_is_einval() {
        let plain = Rules {
            dialect: Dialect::Simple,
            contexts: ContextSet::default(),
            ..rules()
        };
        assert_eq!(
            errno(plain, CMD_FLAG_DF, CMD_READ, 0, 512),
            Some(Errno::Einval)
        );
        assert_eq!(
            errno(plain, 0, CMD_BLOCK_STATUS, 0, 512),
            Some(Errno::Einval)
        );
        assert_eq!(errno(plain, 0, 8, 0, 512), Some(Errno::Einval));
        assert_eq!(errno(plain, 0, CMD_FLUSH, 512, 0), Some(Errno::Einval));
    }
}
