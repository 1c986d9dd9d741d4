//! CloudPhysics traces: `version,time,op,size,lbn`. Version 1; op a SCSI operation code in hexadecimal; size in bytes; lbn in
//! sectors of 512 bytes.
//!
//! The time is the host's uptime. The column's documentation has microseconds, files that are about have seconds. They
//! are told apart by size, at the first request: 10^10 seconds are three centuries, 10^10 microseconds less than three
//! hours.

use super::{Expected, Parser, Said, sectors};
use crate::heat::AccessKind;

/// From here on a time is in microseconds.
const MICROSECONDS: u64 = 10_000_000_000;

#[derive(Default)]
pub struct CloudPhysics {
    /// Microseconds in what times are given in, once it is known.
    scale: Option<u64>,
}

pub fn looks_so(line: &str) -> bool {
    line == "version,time,op,size,lbn"
        || (line.split(',').count() == 5 && CloudPhysics::default().line(line).is_ok())
}

impl Parser for CloudPhysics {
    fn line<'a>(&mut self, line: &'a str) -> Result<Said<'a>, Expected> {
        if line.starts_with("version,") {
            return Ok(Said::Nothing);
        }
        let fields: Vec<&str> = line.split(',').take(6).map(str::trim).collect();
        let [version, time, op, len, lbn] = fields.as_slice() else {
            return Err(Expected("five fields: version, time, op, size, lbn"));
        };
        if *version != "1" {
            return Err(Expected("version 1"));
        }
        let time: u64 = time.parse().map_err(|_| Expected("a time"))?;
        let scale = *self
            .scale
            .get_or_insert(if time < MICROSECONDS { 1_000_000 } else { 1 });
        let at_us = time.saturating_mul(scale);
        // READ and WRITE of 6, 10, 12 and 16 bytes.
        let kind = match u8::from_str_radix(op, 16) {
            Ok(0x08 | 0x28 | 0xa8 | 0x88) => AccessKind::Read,
            Ok(0x0a | 0x2a | 0xaa | 0x8a) => AccessKind::Write,
            Ok(_) => return Ok(Said::Other),
            Err(_) => return Err(Expected("a SCSI operation code in hexadecimal")),
        };
        let len = len.parse().map_err(|_| Expected("a size in bytes"))?;
        let offset = sectors(lbn).ok_or(Expected("a sector"))?;
        Ok(Said::Request {
            at_us,
            kind,
            offset,
            len,
            device: "",
        })
    }
}
