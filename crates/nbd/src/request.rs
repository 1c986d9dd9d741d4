//! The one validate step of the transmission phase.
//!
//! Twenty-eight bytes go in; out comes a [`Request`] that handlers may trust, a [`Refusal`] with the
//! error the specification asks for, or the news that the stream is over or lost. No I/O, no allocation.

use crate::export::{Errno, ExportInfo, ZeroHow};
use crate::spec::*;

/// Bytes of a request's header.
pub const HEADER: usize = 28;

/// What a connection has negotiated, as far as requests depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    pub size: u64,
    pub read_only: bool,
    pub min_block: u32,
    pub max_block: u32,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// At least one metadata context was selected.
    pub contexts: bool,
}

impl Rules {
    pub fn new(info: &ExportInfo, structured: bool, contexts: bool) -> Self {
        Rules {
            size: info.size,
            read_only: info.read_only,
            min_block: info.min_block,
            max_block: info.max_block,
            structured,
            contexts,
        }
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
        len: u32,
        fua: bool,
    },
    Cache {
        offset: u64,
        len: u32,
    },
    WriteZeroes {
        offset: u64,
        len: u32,
        how: ZeroHow,
    },
    BlockStatus {
        offset: u64,
        len: u32,
        one: bool,
    },
}

impl Command {
    /// Bytes of payload held while the request is served, in either direction.
    pub fn payload(&self) -> u32 {
        match *self {
            Command::Read { len, .. } | Command::Write { len, .. } => len,
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
    pub errno: Errno,
    /// For a human being.
    pub reason: &'static str,
    /// Bytes of payload that follow the header and must be skipped before the answer.
    pub skip: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept(Request),
    Refuse(Refusal),
    /// The client is leaving; everything in flight is still answered.
    Disconnect,
}

/// The bytes are no request: nobody can tell where the next one starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("request magic {0:#010x}")]
pub struct StreamLost(pub u32);

struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

impl Header {
    fn parse(bytes: &[u8; HEADER]) -> Result<Self, StreamLost> {
        let [m0, m1, m2, m3, f0, f1, k0, k1, rest @ ..] = *bytes;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != REQUEST_MAGIC {
            return Err(StreamLost(magic));
        }
        let [c0, c1, c2, c3, c4, c5, c6, c7, rest @ ..] = rest;
        let [o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        Ok(Header {
            flags: u16::from_be_bytes([f0, f1]),
            kind: u16::from_be_bytes([k0, k1]),
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

type Reason = (Errno, &'static str);

/// Judges one request.
pub fn validate(bytes: &[u8; HEADER], rules: &Rules) -> Result<Verdict, StreamLost> {
    let header = Header::parse(bytes)?;
    if header.kind == CMD_DISC {
        return Ok(Verdict::Disconnect);
    }
    Ok(match command(&header, rules) {
        Ok(command) => Verdict::Accept(Request {
            cookie: header.cookie,
            command,
        }),
        Err((errno, reason)) => Verdict::Refuse(Refusal {
            cookie: header.cookie,
            errno,
            reason,
            skip: if header.kind == CMD_WRITE {
                header.len
            } else {
                0
            },
        }),
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
            if len > rules.max_block {
                // Without structured replies clients do not expect EOVERFLOW.
                let errno = if rules.structured {
                    Errno::Eoverflow
                } else {
                    Errno::Einval
                };
                return Err((errno, "longer than the largest read"));
            }
            Ok(Command::Read { offset, len })
        }
        CMD_WRITE => {
            range(header, rules, Errno::Enospc)?;
            if len > rules.max_block {
                return Err((Errno::Einval, "longer than the largest write"));
            }
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
            if !rules.contexts {
                return Err((Errno::Einval, "no metadata context was selected"));
            }
            range(header, rules, Errno::Einval)?;
            let one = header.has(CMD_FLAG_REQ_ONE);
            Ok(Command::BlockStatus { offset, len, one })
        }
        _ => Err((Errno::Einval, "unknown command")),
    }
}

/// FUA is allowed on every command, where it was offered; the other flags on their own command only.
fn flags(header: &Header, rules: &Rules) -> Result<(), Reason> {
    let mut allowed = match header.kind {
        CMD_READ if rules.structured => CMD_FLAG_DF,
        CMD_WRITE_ZEROES => CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
        CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
        _ => 0,
    };
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
    let end = match offset.checked_add(u64::from(len)) {
        Some(end) if end <= rules.size => end,
        _ => return Err((beyond, "beyond the end of the export")),
    };
    let block = u64::from(rules.min_block);
    if !offset.is_multiple_of(block) || (!end.is_multiple_of(block) && end != rules.size) {
        return Err((Errno::Einval, "not aligned to the minimum block"));
    }
    Ok(())
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
            structured: true,
            contexts: true,
        }
    }

    fn raw(flags: u16, kind: u16, offset: u64, len: u32) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&77u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&len.to_be_bytes());
        bytes
    }

    fn errno(rules: Rules, flags: u16, kind: u16, offset: u64, len: u32) -> Option<Errno> {
        match validate(&raw(flags, kind, offset, len), &rules).unwrap() {
            Verdict::Accept(request) => {
                assert_eq!(request.cookie, 77);
                None
            }
            Verdict::Refuse(refusal) => {
                assert_eq!(refusal.cookie, 77);
                assert_eq!(refusal.skip, if kind == CMD_WRITE { len } else { 0 });
                Some(refusal.errno)
            }
            Verdict::Disconnect => panic!("disconnect"),
        }
    }

    #[test]
    fn wrong_magic_loses_the_stream() {
        let mut bytes = raw(0, CMD_READ, 0, 512);
        bytes[0] ^= 1;
        assert!(validate(&bytes, &rules()).is_err());
    }

    #[test]
    fn disconnect_is_never_refused() {
        let verdict = validate(&raw(0xffff, CMD_DISC, 7, 7), &rules()).unwrap();
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
            structured: false,
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
            structured: false,
            contexts: false,
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
