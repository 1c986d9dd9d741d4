//! Other tools' records, line by line.
//!
//! Each format has a file with a parser that takes a line and gives a request, nothing, or what it had expected. What
//! is common stands here: lines are bounded, counted from 1, one device is taken, times begin at 0 and never go back
//! (what is earlier than its predecessor, as merged per-processor logs have it, counts as made at the same time).

mod blkparse;
mod cloudphysics;
mod fio;
mod msr;
mod virtio;

use super::{REACH, Request, Taken, TraceError};
use crate::heat::AccessKind;
use serde::Serialize;
use std::io::{BufRead, Read};

/// Bytes of a line, at most.
pub const LINE: usize = 4096;

/// A format that is not our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Foreign {
    /// Text as `blkparse` prints it unless told otherwise; requests as they were queued (action Q).
    Blkparse,
    /// What fio writes with `--write_iolog`: version 2, or 3 which has times.
    FioIolog,
    /// SNIA's MSR Cambridge: Timestamp, Hostname, DiskNumber, Type, Offset, Size, ResponseTime.
    MsrCsv,
    /// CloudPhysics: version, time, op, size, lbn.
    CloudPhysicsCsv,
    /// QEMU's log of the events virtio_blk_handle_read and _write, with `-msg timestamp=on`.
    QemuVirtioBlk,
}

impl Foreign {
    pub const ALL: [Foreign; 5] = [
        Foreign::Blkparse,
        Foreign::FioIolog,
        Foreign::MsrCsv,
        Foreign::CloudPhysicsCsv,
        Foreign::QemuVirtioBlk,
    ];

    /// As people name it.
    pub fn name(self) -> &'static str {
        match self {
            Foreign::Blkparse => "blkparse",
            Foreign::FioIolog => "fio-iolog",
            Foreign::MsrCsv => "msr-csv",
            Foreign::CloudPhysicsCsv => "cloudphysics-csv",
            Foreign::QemuVirtioBlk => "qemu-virtio-blk",
        }
    }

    /// By a first line.
    fn of(line: &str) -> Option<Foreign> {
        let is = |format: &Foreign| match format {
            Foreign::Blkparse => blkparse::looks_so(line),
            Foreign::FioIolog => fio::looks_so(line),
            Foreign::MsrCsv => msr::looks_so(line),
            Foreign::CloudPhysicsCsv => cloudphysics::looks_so(line),
            Foreign::QemuVirtioBlk => virtio::looks_so(line),
        };
        Foreign::ALL.into_iter().find(is)
    }

    fn parser(self) -> Box<dyn Parser> {
        match self {
            Foreign::Blkparse => Box::new(blkparse::Blkparse),
            Foreign::FioIolog => Box::new(fio::Iolog::default()),
            Foreign::MsrCsv => Box::new(msr::Msr),
            Foreign::CloudPhysicsCsv => Box::new(cloudphysics::CloudPhysics::default()),
            Foreign::QemuVirtioBlk => Box::new(virtio::Virtio),
        }
    }
}

/// What a line says.
enum Said<'a> {
    Request {
        /// On the format's own clock.
        at_us: u64,
        kind: AccessKind,
        offset: u64,
        len: u64,
        /// Empty where the format has but one.
        device: &'a str,
    },
    /// A request that is neither read nor write.
    Other,
    /// Nothing about requests.
    Nothing,
    /// No requests follow.
    End,
}

/// What was expected and is not there.
struct Expected(&'static str);

trait Parser {
    /// `line` has no line's end and is not blank.
    fn line<'a>(&mut self, line: &'a str) -> Result<Said<'a>, Expected>;
}

/// Reads a foreign trace: of this format, or of whatever its first line looks like. `device` is the one to take, as the
/// format names it (blkparse: `8,0`; fio: the file; MSR: the disk's number; QEMU: the address after `vdev`); without it
/// there may be only one.
pub fn import(
    mut input: impl BufRead,
    format: Option<Foreign>,
    device: Option<&str>,
    mut each: impl FnMut(Request),
) -> Result<Taken, TraceError> {
    let mut format = format;
    let mut parser: Option<Box<dyn Parser>> = format.map(Foreign::parser);
    let mut bytes = Vec::new();
    let mut line = 0;
    let mut first_device: Option<String> = device.map(str::to_owned);
    let mut begun_us = None;
    let mut last_us = 0;
    let (mut records, mut skipped) = (0, 0);
    loop {
        bytes.clear();
        (&mut input)
            .take(LINE as u64 + 1)
            .read_until(b'\n', &mut bytes)?;
        if bytes.is_empty() {
            break;
        }
        line += 1;
        if bytes.len() > LINE {
            return Err(TraceError::LongLine { line });
        }
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim();
        if text.is_empty() {
            continue;
        }
        let parser = match &mut parser {
            Some(parser) => parser,
            None => {
                let found = Foreign::of(text).ok_or_else(|| TraceError::Unknown {
                    found: shortened(text),
                })?;
                format = Some(found);
                parser.insert(found.parser())
            }
        };
        let wrong = |expected| TraceError::Line {
            line,
            expected,
            found: shortened(text),
        };
        let said = parser.line(text).map_err(|e| wrong(e.0))?;
        let (at_us, kind, offset, len, of) = match said {
            Said::Request {
                at_us,
                kind,
                offset,
                len,
                device,
            } => (at_us, kind, offset, len, device),
            Said::Other => {
                skipped += 1;
                continue;
            }
            Said::Nothing => continue,
            Said::End => break,
        };
        match &first_device {
            Some(first) if first == of => {}
            Some(_) if device.is_some() => continue,
            Some(first) => {
                return Err(TraceError::SeveralDevices {
                    line,
                    first: shortened(first),
                    second: shortened(of),
                });
            }
            None => first_device = Some(of.to_owned()),
        }
        if len == 0 {
            skipped += 1;
            continue;
        }
        if offset.checked_add(len).is_none_or(|end| end > REACH) {
            return Err(wrong("a request that ends below 64 TiB"));
        }
        let begun = *begun_us.get_or_insert(at_us);
        last_us = at_us.saturating_sub(begun).max(last_us);
        records += 1;
        each(Request {
            at_us: last_us,
            kind,
            offset,
            len,
        });
    }
    match format {
        Some(_) if records > 0 => Ok(Taken {
            format,
            records,
            skipped,
        }),
        _ => Err(TraceError::Empty {
            device: device.map(str::to_owned),
        }),
    }
}

/// Enough of foreign text to see what it is.
fn shortened(text: &str) -> String {
    let mut short: String = text.chars().filter(|c| !c.is_control()).take(80).collect();
    if short.len() < text.len() {
        short.push_str("...");
    }
    short
}

/// Sectors of 512 bytes as bytes.
fn sectors(count: &str) -> Option<u64> {
    count.parse::<u64>().ok()?.checked_mul(512)
}

/// `12.345678901` as microseconds.
fn seconds(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.')?;
    if part.is_empty() || part.len() > 9 || !part.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let part: u64 = format!("{part:0<9}").parse().ok()?;
    whole
        .parse::<u64>()
        .ok()?
        .checked_mul(1_000_000)?
        .checked_add(part / 1000)
}

#[cfg(test)]
mod tests;
