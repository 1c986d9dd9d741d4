//! The thread that reads a source's stream into the store, and its pace.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use whimbrel_engine::set::UnitSet;

use super::{BREATH, Phase, Shared, SourceEvent, Taken};
use crate::store::RamStore;
use crate::stream::reader::{Command, Event, StreamReader, unpack};
use crate::stream::return_path::ReturnMessage;
use crate::stream::{StreamError, StreamLayout};
use crate::{Error, Result, SourceState};
use whimbrel_engine::space::UNIT;

type Opened = oneshot::Sender<Result<(StreamLayout, Arc<RamStore>)>>;

/// How fast later rounds are taken, and which rounds were told of.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    hurry: Mutex<bool>,
    hurried: Condvar,
    rounds: AtomicU64,
    arrivals: AtomicU64,
    arrivals_told: AtomicU64,
}

impl Pace {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Pace {
            bytes_per_second: bytes_per_second.max(1),
            hurry: Mutex::new(false),
            hurried: Condvar::new(),
            rounds: AtomicU64::new(0),
            arrivals: AtomicU64::new(0),
            arrivals_told: AtomicU64::new(0),
        }
    }

    /// From now on read as fast as it comes.
    pub(super) fn hurry(&self) {
        *self.hurry.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.hurried.notify_all();
    }

    fn hurrying(&self) -> bool {
        *self.hurry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of round `n` unless that was done. At the channel's bound it is left out.
    pub(super) fn round(&self, n: u64, events: &mpsc::Sender<SourceEvent>) {
        if self.rounds.fetch_max(n, Ordering::AcqRel) < n {
            let arrivals = self.arrivals.load(Ordering::Relaxed);
            let told = self.arrivals_told.swap(arrivals, Ordering::AcqRel);
            let pages = arrivals.saturating_sub(told);
            let _ = events.try_send(SourceEvent::RoundDone { n, pages });
        }
    }

    /// Pauses after a section of `bytes`, unless the first pass still runs or the stop was decided.
    fn breathe(&self, bytes: u64) {
        if self.rounds.load(Ordering::Acquire) == 0 {
            return;
        }
        let earned = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let until = Instant::now() + earned.max(BREATH);
        let mut hurry = self.hurry.lock().unwrap_or_else(PoisonError::into_inner);
        while !*hurry {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            hurry = self
                .hurried
                .wait_timeout(hurry, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Starts the thread. `opened` gets the layout and the store, or the error that came before them.
pub(super) fn start(
    shared: Arc<Shared>,
    events: mpsc::Sender<SourceEvent>,
    opened: Opened,
) -> Result<()> {
    let io = |source| Error::Io {
        what: "start the reader of",
        path: "migration stream".into(),
        source,
    };
    let stream = shared.socket.try_clone().map_err(io)?;
    std::thread::Builder::new()
        .name("ram-source".into())
        .spawn(move || {
            let mut reading = Reading {
                shared,
                events,
                opened: Some(opened),
                store: None,
                total_units: 0,
            };
            let end = reading.run(StreamReader::new(stream));
            reading.finish(end);
        })
        .map_err(io)?;
    Ok(())
}

struct Reading {
    shared: Arc<Shared>,
    events: mpsc::Sender<SourceEvent>,
    opened: Option<Opened>,
    store: Option<Arc<RamStore>>,
    total_units: u64,
}

impl Reading {
    fn run(&mut self, mut stream: StreamReader<std::os::unix::net::UnixStream>) -> Result<()> {
        let mut configuration = Vec::new();
        let mut section_start = 0;
        let mut distinct = 0;
        let mut package = None;
        loop {
            let event = stream.next_event()?;
            // Between its package and what follows QEMU looks once more whether the stream is whole, and
            // runs the guest on if it is not: only what follows says that the guest stays stopped whatever
            // becomes of this daemon. (Commands may come before that look.)
            if !matches!(event, Event::Command(_))
                && let Some(state) = package.take()
            {
                self.stopped(state, false)?;
            }
            match event {
                Event::Configuration(content) => configuration = content,
                Event::Layout {
                    section,
                    instance,
                    blocks,
                } => {
                    let layout = StreamLayout {
                        configuration: std::mem::take(&mut configuration),
                        ram_section: section,
                        ram_instance: instance,
                        blocks,
                    };
                    self.open(layout)?;
                }
                Event::Page { block, unit, data } => {
                    let first = self.store()?.put(block, unit, data)?;
                    self.arrived(first, &mut distinct);
                }
                Event::Zero { block, unit } => {
                    let first = self.store()?.put_zero(block, unit)?;
                    self.arrived(first, &mut distinct);
                }
                Event::PartEnd => {
                    let bytes = stream.position() - section_start;
                    section_start = stream.position();
                    self.shared.pace.breathe(bytes);
                }
                Event::Command(Command::Ping(value)) => {
                    self.say(&ReturnMessage::Pong(value))?;
                }
                Event::Command(Command::Discard { block, extents }) => {
                    for extent in extents {
                        self.store()?.mark_stale(block, extent)?;
                    }
                }
                Event::Command(Command::Packaged(packed)) => {
                    package = Some(Bytes::copy_from_slice(unpack(&packed)?));
                }
                Event::DeviceState(state) => self.stopped(state.into(), true)?,
                Event::RamEnd | Event::Command(_) => {}
                Event::Eof => return self.end(),
            }
        }
    }

    fn store(&self) -> Result<&RamStore> {
        self.store
            .as_deref()
            .ok_or(Error::Stream(StreamError::NoBlocks))
    }

    fn say(&self, message: &ReturnMessage) -> Result<()> {
        self.shared
            .say(message)
            .map_err(|e| crate::stream::ReturnError::Write(e).into())
    }

    fn open(&mut self, layout: StreamLayout) -> Result<()> {
        let store = Arc::new(RamStore::new(&layout.blocks)?);
        self.total_units = layout.total_bytes() / UNIT;
        self.store = Some(store.clone());
        // The channel is empty: this is the first thing said.
        let _ = self.events.try_send(SourceEvent::Layout(layout.clone()));
        if let Some(opened) = self.opened.take() {
            let _ = opened.send(Ok((layout, store)));
        }
        Ok(())
    }

    fn arrived(&self, first: bool, distinct: &mut u64) {
        self.shared.pace.arrivals.fetch_add(1, Ordering::Relaxed);
        if first {
            *distinct += 1;
            if *distinct == self.total_units {
                self.shared.pace.round(1, &self.events);
            }
        }
    }

    fn stopped(&mut self, device_state: Bytes, precopy: bool) -> Result<()> {
        let store = self.store()?;
        let stale: Vec<UnitSet> = (0..store.blocks()).map(|b| store.stale(b)).collect();
        *self
            .shared
            .taken
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(Taken {
            device_state,
            stale,
            precopy,
        });
        self.shared.enter(Phase::Stopped);
        if !self.shared.pace.hurrying() {
            let _ = self.events.blocking_send(SourceEvent::StoppedByItself);
        }
        Ok(())
    }

    /// The stream is over: tells QEMU that all is well, if it is.
    fn end(&mut self) -> Result<()> {
        let missing = self.store()?.stale_left();
        let stopped = *self.shared.phase.borrow() == Phase::Stopped;
        if !stopped || missing > 0 {
            return Err(Error::Stream(StreamError::Truncated("guest memory")));
        }
        self.say(&ReturnMessage::Shut(0))
    }

    fn finish(&mut self, end: Result<()>) {
        match (end, self.opened.take()) {
            (Ok(()), _) => self.shared.enter(Phase::Drained),
            (Err(error), None) => self.shared.enter(Phase::Failed(error.to_string())),
            (Err(error), Some(opened)) => {
                let reason = error.to_string();
                let error = match error {
                    Error::Stream(StreamError::OtherSection(idstr)) => {
                        Error::OtherLiveSection { idstr }
                    }
                    Error::Stream(stream @ StreamError::Truncated(_)) => Error::Source {
                        state: SourceState::Running,
                        reason: stream.to_string(),
                    },
                    other => other,
                };
                let _ = opened.send(Err(error));
                self.shared.enter(Phase::Failed(reason));
            }
        }
    }
}
