//! `blkparse` as it prints unless told otherwise:
//!
//! ```text
//!   8,0    3        1     0.000000000   697  Q   W 223490 + 8 [kjournald]
//! device  cpu  sequence  seconds      pid  action RWBS sector + sectors [process]
//! ```
//! A request passes several actions; those queued (Q) are taken, for they are the guest's, not yet merged. The summary
//! at the end begins with a line `CPU...` or `Total...`.

use super::{Expected, Parser, Said, seconds, sectors};
use crate::heat::AccessKind;

pub struct Blkparse;

pub fn looks_so(line: &str) -> bool {
    line.split_whitespace().next().is_some_and(is_device)
}

fn is_device(text: &str) -> bool {
    let number = |n: &str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
    text.split_once(',')
        .is_some_and(|(major, minor)| number(major) && number(minor))
}

impl Parser for Blkparse {
    fn line<'a>(&mut self, line: &'a str) -> Result<Said<'a>, Expected> {
        let words: Vec<&str> = line.split_whitespace().take(10).collect();
        if line.starts_with("CPU") || line.starts_with("Total") {
            return Ok(Said::End);
        }
        let [device, _, _, time, _, action, kind, rest @ ..] = words.as_slice() else {
            return Err(Expected(
                "device, cpu, sequence, seconds, pid, action and kind",
            ));
        };
        if !is_device(device) {
            return Err(Expected("a device as 8,0"));
        }
        let at_us = seconds(time).ok_or(Expected("seconds as 0.000123456"))?;
        if *action != "Q" {
            return Ok(Said::Nothing);
        }
        let kind = match kind {
            k if k.contains('D') => return Ok(Said::Other),
            k if k.contains('R') => AccessKind::Read,
            k if k.contains('W') => AccessKind::Write,
            _ => return Ok(Said::Other),
        };
        let place = match rest {
            [sector, "+", count, ..] => sectors(sector).zip(sectors(count)),
            // A flush has no place.
            _ if kind == AccessKind::Write => return Ok(Said::Other),
            _ => None,
        };
        let (offset, len) = place.ok_or(Expected("a sector, + and sectors"))?;
        Ok(Said::Request {
            at_us,
            kind,
            offset,
            len,
            device,
        })
    }
}
