//! The post-copy sink: the guest runs first, its memory follows.
//!
//! At the start QEMU is told to forget every page it believes it has (its own firmware has filled
//! some). What is placed before the switch is there when the guest starts; at the switch only those
//! of them that have become stale are discarded, so the time this takes does not depend on the size
//! of the guest's memory. After the switch a page QEMU lacks is asked for by the one who touches it.
//!
//! After the switch a second copy of a page is an error to QEMU and ends the migration, with the guest
//! half here. So the sink keeps, per block, the set of units QEMU has, and refuses to send one twice.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, UNIT};

use super::line::{Line, Op, PIECE};
use super::{Switched, listen};
use crate::qmp::Qmp;
use crate::settings::Settings;
use crate::stream::{MAX_DEVICE_STATE, StreamLayout, was_stopped, writer};
use crate::{Error, Result};

/// A demand: QEMU waits for these units of that block.
pub type Request = (usize, Extent);

/// Demands not taken yet. QEMU has one per waiting thread; at the bound it waits.
pub(super) const REQUESTS: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Pages may be placed again and again.
    Before,
    /// QEMU listens: every page exactly once.
    Running,
    Ended,
}

#[derive(Debug)]
struct Guard {
    phase: Phase,
    /// Per block: the units QEMU has.
    placed: Vec<UnitSet>,
}

/// A destination QEMU that will run, or runs, before its memory is there.
#[derive(Debug)]
pub struct PostcopySink {
    line: Line,
    guard: Mutex<Guard>,
    settings: Settings,
}

impl PostcopySink {
    /// Prepares a QEMU started with `-incoming defer`: after this it has no page at all and waits for
    /// placements. `socket` is a path free for QEMU to listen on for a moment.
    pub async fn start(
        qmp: &Qmp,
        socket: &Path,
        layout: &StreamLayout,
    ) -> Result<(PostcopySink, mpsc::Receiver<Request>)> {
        layout.check()?;
        if let Some(block) = layout.blocks.iter().find(|b| b.page_size != UNIT) {
            return Err(Error::PageSize {
                name: block.name.clone(),
                page_size: block.page_size,
            });
        }
        let settings = match Settings::change(qmp, &["events", "postcopy-ram"], &[]).await {
            Err(Error::Qmp { command, desc, .. }) if command == "migrate-set-capabilities" => {
                return Err(Error::NoPostcopy { desc });
            }
            other => other?,
        };
        listen(qmp, socket).await?;
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let line = Line::open(qmp, socket, layout, requests).await?;
        let mut out = Vec::new();
        writer::open(&mut out, layout);
        writer::open_return_path(&mut out);
        writer::postcopy_advise(&mut out);
        writer::ram_start(&mut out, layout);
        for block in &layout.blocks {
            writer::discard(&mut out, block, [block.whole()]);
        }
        line.sections(out).await?;
        let placed = layout
            .blocks
            .iter()
            .map(|b| UnitSet::empty(b.units()))
            .collect();
        let sink = PostcopySink {
            line,
            guard: Mutex::new(Guard {
                phase: Phase::Before,
                placed,
            }),
            settings,
        };
        Ok((sink, receiver))
    }

    /// A sink whose switch lies behind it.
    pub(super) fn running(line: Line, placed: Vec<UnitSet>, settings: Settings) -> PostcopySink {
        PostcopySink {
            line,
            guard: Mutex::new(Guard {
                phase: Phase::Running,
                placed,
            }),
            settings,
        }
    }

    /// Places whole units from `start` on. After the switch [`Error::PlacedTwice`] if QEMU has one of
    /// them: nothing of that piece of up to 256 KiB is sent then.
    pub async fn place(&self, block: usize, start: u64, mut data: Bytes) -> Result<()> {
        if !(data.len() as u64).is_multiple_of(UNIT) {
            return Err(Error::NotWholeUnits { len: data.len() });
        }
        let mut extent = Extent::new(start, data.len() as u64 / UNIT);
        self.line.check(block, extent)?;
        while !extent.is_empty() {
            let piece = Extent::new(extent.start, extent.len.min(PIECE / UNIT));
            let data = data.split_to(piece.byte_len() as usize);
            let room = self.line.room().await?;
            let mut guard = self.guard();
            guard.claim(block, piece)?;
            // Sent while the guard is held, so that nothing claimed before the switch is written
            // after it.
            room.send(Op::Pages {
                block,
                start: piece.start,
                data,
            });
            extent = Extent::new(piece.end(), extent.len - piece.len);
        }
        Ok(())
    }

    /// Places zero pages, as [`place`](Self::place) does. They cost nine bytes each on the socket.
    pub async fn place_zero(&self, block: usize, extent: Extent) -> Result<()> {
        self.line.check(block, extent)?;
        let mut rest = extent;
        while !rest.is_empty() {
            let piece = Extent::new(rest.start, rest.len.min(PIECE / 16));
            let room = self.line.room().await?;
            let mut guard = self.guard();
            guard.claim(block, piece)?;
            room.send(Op::Zeros {
                block,
                extent: piece,
            });
            rest = Extent::new(piece.end(), rest.len - piece.len);
        }
        Ok(())
    }

    /// The switch: discards the stale units among those placed, and gives QEMU the device state with
    /// LISTEN before and RUN after it. Returns once that is written; demands come from then on, the
    /// first of them before the guest runs (devices read their rings), so nobody may wait for
    /// [`resumed`](Self::resumed) before serving demands. `stale` has one set per block.
    ///
    /// A guest that an operator had stopped stands still here too; [`resumed`](Self::resumed) then gives when its
    /// devices were loaded.
    pub async fn run(&self, device_state: &[u8], stale: &[UnitSet]) -> Result<Switched> {
        if device_state.len() > MAX_DEVICE_STATE {
            return Err(Error::DeviceStateTooBig {
                len: device_state.len(),
                limit: MAX_DEVICE_STATE,
            });
        }
        let stands = was_stopped(device_state);
        if stands {
            // To a QEMU that waits for a machine: do not run it. RUN would, whatever the state says.
            self.line.qmp.execute("stop", json!({})).await?;
        }
        let room = self.line.room().await?;
        let (done, written) = oneshot::channel();
        {
            let mut guard = self.guard();
            let fits = stale.len() == guard.placed.len()
                && stale
                    .iter()
                    .zip(&guard.placed)
                    .all(|(s, p)| s.capacity() == p.capacity());
            if guard.phase != Phase::Before || !fits {
                return Err(Error::Phase { what: "run" });
            }
            let mut out = Vec::new();
            for ((block, placed), stale) in self
                .line
                .layout
                .blocks
                .iter()
                .zip(&mut guard.placed)
                .zip(stale)
            {
                let mut kept = placed.clone();
                kept.subtract(stale);
                let mut gone = std::mem::replace(placed, kept);
                gone.subtract(placed);
                writer::discard(&mut out, block, gone.runs());
            }
            writer::package(&mut out, device_state);
            guard.phase = Phase::Running;
            room.send(Op::Sections(out, done));
        }
        let written = self.line.written(written).await?;
        if stands {
            self.line.ask_until_loaded(false);
        }
        Ok(Switched { written })
    }

    /// QEMU's timestamp of the RESUME event (since the Unix epoch), once it has come.
    pub async fn resumed(&self) -> Result<Duration> {
        self.line.wait(|state| state.resumed).await
    }

    /// The reason, once the destination has failed.
    pub async fn failed(&self) -> Error {
        match self.line.wait(|_| None::<()>).await {
            Err(error) => error,
            Ok(()) => Error::Phase { what: "failing" },
        }
    }

    /// Whether QEMU has the unit.
    pub fn is_placed(&self, block: usize, unit: u64) -> bool {
        let guard = self.guard();
        guard.placed.get(block).is_some_and(|s| s.contains(unit))
    }

    /// Units of the block QEMU does not have; `None` if there is no such block.
    pub fn missing(&self, block: usize) -> Option<UnitSet> {
        let guard = self.guard();
        let placed = guard.placed.get(block)?;
        let mut missing = UnitSet::full(placed.capacity());
        missing.subtract(placed);
        Some(missing)
    }

    /// Ends the migration once every unit is placed ([`Error::Incomplete`] if not), and returns when
    /// QEMU has taken everything and is `completed`.
    pub async fn finish(&self) -> Result<()> {
        {
            let mut guard = self.guard();
            if guard.phase == Phase::Before {
                return Err(Error::Phase { what: "finish" });
            }
            let missing = guard.placed.iter().map(|s| s.capacity() - s.len()).sum();
            if missing > 0 {
                return Err(Error::Incomplete { missing });
            }
            guard.phase = Phase::Ended;
        }
        let mut out = Vec::new();
        writer::ram_end(&mut out, &self.line.layout);
        writer::eof(&mut out);
        self.line.end(out).await?;
        self.line.shut().await?;
        self.line.completed().await?;
        self.settings.restore(&self.line.qmp).await
    }

    fn guard(&self) -> MutexGuard<'_, Guard> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guard {
    fn claim(&mut self, block: usize, extent: Extent) -> Result<()> {
        let placed = &mut self.placed[block];
        match self.phase {
            Phase::Before => {}
            Phase::Ended => return Err(Error::Phase { what: "place" }),
            Phase::Running => {
                if let Some(run) = placed.runs_within(extent).next() {
                    return Err(Error::PlacedTwice {
                        block,
                        unit: run.start,
                    });
                }
            }
        }
        placed.insert(extent);
        Ok(())
    }
}
