//! The pre-copy sink: all memory first, then the guest runs. For hosts without userfaultfd.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, UNIT};

use super::line::{Line, Op, PIECE};
use super::{Switched, listen};
use crate::qmp::Qmp;
use crate::settings::Settings;
use crate::stream::{StreamLayout, was_stopped, was_stopped_by_disk, writer};
use crate::{Error, Result};

/// A destination QEMU that runs once all its memory is there.
#[derive(Debug)]
pub struct PrecopySink {
    line: Line,
    /// Per block: the units placed at least once.
    placed: Mutex<Vec<UnitSet>>,
    settings: Settings,
}

impl PrecopySink {
    /// Prepares a QEMU started with `-incoming defer`.
    pub async fn start(qmp: &Qmp, socket: &Path, layout: &StreamLayout) -> Result<PrecopySink> {
        layout.check()?;
        // Only a post-copy's stream tells how large the pages are; here QEMU takes any content in 4 KiB.
        let mut layout = layout.clone();
        for block in &mut layout.blocks {
            block.page_size = UNIT;
        }
        let layout = &layout;
        let settings = Settings::change(qmp, &["events"], &[]).await?;
        listen(qmp, socket).await?;
        // No return path is opened, so there are no requests; the channel closes by itself.
        let (requests, _) = mpsc::channel(1);
        let line = Line::open(qmp, socket, layout, requests).await?;
        let mut out = Vec::new();
        writer::open(&mut out, layout);
        writer::ram_start(&mut out, layout);
        line.sections(out).await?;
        let placed = layout
            .blocks
            .iter()
            .map(|b| UnitSet::empty(b.units()))
            .collect();
        Ok(PrecopySink {
            line,
            placed: Mutex::new(placed),
            settings,
        })
    }

    /// Places whole units from `start` on; the last copy of a unit counts.
    pub async fn place(&self, block: usize, start: u64, mut data: Bytes) -> Result<()> {
        if !(data.len() as u64).is_multiple_of(UNIT) {
            return Err(Error::NotWholeUnits { len: data.len() });
        }
        let whole = Extent::new(start, data.len() as u64 / UNIT);
        self.line.check(block, whole)?;
        let mut start = start;
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(PIECE as usize));
            let units = piece.len() as u64 / UNIT;
            self.line.room().await?.send(Op::Pages {
                block,
                start,
                data: piece,
            });
            self.note(block, Extent::new(start, units));
            start += units;
        }
        Ok(())
    }

    /// Places zero pages. Needed also for units that were zero all along: the destination's firmware
    /// may have filled them.
    pub async fn place_zero(&self, block: usize, extent: Extent) -> Result<()> {
        self.line.check(block, extent)?;
        let mut rest = extent;
        while !rest.is_empty() {
            let piece = Extent::new(rest.start, rest.len.min(PIECE / 16));
            self.line.room().await?.send(Op::Zeros {
                block,
                extent: piece,
            });
            self.note(block, piece);
            rest = Extent::new(piece.end(), rest.len - piece.len);
        }
        Ok(())
    }

    /// Gives QEMU the device state and the end of the stream; it runs the guest once it has loaded
    /// both. Every unit must have been placed ([`Error::Incomplete`]), and with its newest content:
    /// that is for the caller to know.
    ///
    /// A guest that an operator had stopped stands still here too; [`resumed`](Self::resumed) then gives when all
    /// was loaded.
    pub async fn run(&self, device_state: &[u8]) -> Result<Switched> {
        let missing = self.missing_units();
        if missing > 0 {
            return Err(Error::Incomplete { missing });
        }
        let mut out = Vec::new();
        writer::ram_end(&mut out, &self.line.layout);
        out.extend(device_state);
        writer::eof_described(&mut out);
        let written = self.line.end(out).await?;
        if was_stopped(device_state) {
            self.line.ask_until_loaded(false);
        } else if was_stopped_by_disk(device_state) {
            // QEMU would leave it so, and its disks are others here.
            self.line.ask_until_loaded(true);
        }
        Ok(Switched { written })
    }

    /// QEMU's timestamp of the RESUME event (since the Unix epoch), once it has come.
    pub async fn resumed(&self) -> Result<Duration> {
        self.line.wait(|state| state.resumed).await
    }

    /// Returns when QEMU is `completed`.
    pub async fn finish(&self) -> Result<()> {
        self.line.completed().await?;
        self.settings.restore(&self.line.qmp).await
    }

    /// Units of the block never placed; `None` if there is no such block.
    pub fn missing(&self, block: usize) -> Option<UnitSet> {
        let placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        let placed = placed.get(block)?;
        let mut missing = UnitSet::full(placed.capacity());
        missing.subtract(placed);
        Some(missing)
    }

    fn missing_units(&self) -> u64 {
        let placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        placed.iter().map(|s| s.capacity() - s.len()).sum()
    }

    fn note(&self, block: usize, extent: Extent) {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        placed[block].insert(extent);
    }
}
