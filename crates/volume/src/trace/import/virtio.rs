//! QEMU's trace events of virtio-blk, which any QEMU with the `log` backend writes of an unmodified guest:
//! `qemu-system-x86_64 -trace virtio_blk_handle_read -trace virtio_blk_handle_write -msg timestamp=on -D FILE`.
//!
//! ```text
//! 17202@1795368350.693264:virtio_blk_handle_write vdev 0x5559f6e0aec0 req 0x5559f6f7d250 sector 4470336 nsectors 8
//! ```

use super::{Expected, Parser, Said, seconds, sectors};
use crate::heat::AccessKind;

pub struct Virtio;

const EVENT: &str = ":virtio_blk_handle_";

pub fn looks_so(line: &str) -> bool {
    line.contains(EVENT) && Virtio.line(line).is_ok()
}

impl Parser for Virtio {
    fn line<'a>(&mut self, line: &'a str) -> Result<Said<'a>, Expected> {
        // The log has whatever else QEMU says.
        let Some((before, event)) = line.split_once(EVENT) else {
            return Ok(Said::Nothing);
        };
        let words: Vec<&str> = event.split_whitespace().take(10).collect();
        let (kind, device, sector, count) = match words.as_slice() {
            [
                event @ ("read" | "write"),
                "vdev",
                vdev,
                "req",
                _,
                "sector",
                sector,
                "nsectors",
                count,
            ] => {
                let kind = match *event {
                    "read" => AccessKind::Read,
                    _ => AccessKind::Write,
                };
                (kind, vdev, sector, count)
            }
            ["read" | "write", ..] => {
                return Err(Expected(
                    "vdev, req, sector and nsectors, each with its value",
                ));
            }
            _ => return Ok(Said::Other),
        };
        let at_us = before
            .split_once('@')
            .and_then(|(_, time)| seconds(time))
            .ok_or(Expected(
                "a time before the event: QEMU with -msg timestamp=on",
            ))?;
        let place = sectors(sector).zip(sectors(count));
        let (offset, len) = place.ok_or(Expected("a sector and sectors"))?;
        Ok(Said::Request {
            at_us,
            kind,
            offset,
            len,
            device,
        })
    }
}
