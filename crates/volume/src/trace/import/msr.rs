//! SNIA's MSR Cambridge traces: `Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime`. Times are Windows' (100 ns
//! since 1601), offset and size bytes, type `Read` or `Write`.

use super::{Expected, Parser, Said};
use crate::heat::AccessKind;

pub struct Msr;

pub fn looks_so(line: &str) -> bool {
    line.starts_with("Timestamp,") || (line.split(',').count() == 7 && Msr.line(line).is_ok())
}

impl Parser for Msr {
    fn line<'a>(&mut self, line: &'a str) -> Result<Said<'a>, Expected> {
        if line.starts_with("Timestamp,") {
            return Ok(Said::Nothing);
        }
        let fields: Vec<&str> = line.split(',').take(8).map(str::trim).collect();
        let [time, _, device, kind, offset, len, _] = fields.as_slice() else {
            return Err(Expected(
                "seven fields: timestamp, host, disk, type, offset, size, response time",
            ));
        };
        let time: u64 = time.parse().map_err(|_| Expected("a time in 100 ns"))?;
        let kind = if kind.eq_ignore_ascii_case("read") {
            AccessKind::Read
        } else if kind.eq_ignore_ascii_case("write") {
            AccessKind::Write
        } else {
            return Err(Expected("Read or Write"));
        };
        let offset = offset.parse().map_err(|_| Expected("an offset in bytes"))?;
        let len = len.parse().map_err(|_| Expected("a size in bytes"))?;
        Ok(Said::Request {
            at_us: time / 10,
            kind,
            offset,
            len,
            device,
        })
    }
}
