//! fio's iolog, versions 2 and 3 (fio's manual, *Trace file format*).
//!
//! ```text
//! fio version 2 iolog                    fio version 3 iolog
//! /dev/vda add                           22 /dev/vda add
//! /dev/vda read 4096 8192                161 /dev/vda read 4096 8192
//! /dev/vda wait 1500 0
//! ```
//! Offsets and lengths are bytes. Version 3 has a time before each line, in microseconds (as fio 3.33 writes them).
//! Version 2 has none: what was waited is added up, so a log without waits has all of its requests at once.

use super::{Expected, Parser, Said};
use crate::heat::AccessKind;

#[derive(Default)]
pub struct Iolog {
    /// Once the first line is read.
    version: Option<u8>,
    /// Of version 2: what was waited, in microseconds.
    waited: u64,
}

pub fn looks_so(line: &str) -> bool {
    line.starts_with("fio version ") && line.ends_with(" iolog")
}

impl Parser for Iolog {
    fn line<'a>(&mut self, line: &'a str) -> Result<Said<'a>, Expected> {
        let Some(version) = self.version else {
            self.version = Some(match line {
                "fio version 2 iolog" => 2,
                "fio version 3 iolog" => 3,
                _ => return Err(Expected("`fio version 2 iolog` or `fio version 3 iolog`")),
            });
            return Ok(Said::Nothing);
        };
        let mut words = line.split_whitespace();
        let number = |word: Option<&str>| word.and_then(|w| w.parse::<u64>().ok());
        let time = match version {
            2 => self.waited,
            _ => number(words.next()).ok_or(Expected("a time in microseconds"))?,
        };
        let (Some(device), Some(action)) = (words.next(), words.next()) else {
            return Err(Expected("a file and an action"));
        };
        let kind = match action {
            "read" => AccessKind::Read,
            "write" => AccessKind::Write,
            "add" | "open" | "close" => return Ok(Said::Nothing),
            "sync" | "datasync" | "trim" => return Ok(Said::Other),
            "wait" => {
                let wait = number(words.next()).ok_or(Expected("microseconds to wait"))?;
                self.waited = self.waited.saturating_add(wait);
                return Ok(Said::Nothing);
            }
            _ => {
                return Err(Expected(
                    "add, open, close, read, write, sync, datasync, trim or wait",
                ));
            }
        };
        let (Some(offset), Some(len)) = (number(words.next()), number(words.next())) else {
            return Err(Expected("an offset and a length in bytes"));
        };
        Ok(Said::Request {
            at_us: time,
            kind,
            offset,
            len,
            device,
        })
    }
}
