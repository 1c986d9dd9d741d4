//! RAM out of a running QEMU.
//!
//! QEMU is told to migrate to a unix socket of ours, as a post-copy that is not started yet. Round
//! after round it sends the pages the guest has changed, for as long as nobody decides. The stop is
//! decided here and carries no page: `migrate-start-postcopy` makes QEMU stop the guest and say which
//! pages are stale and what state the devices are in, a few milliseconds later. The stale pages follow
//! by themselves over the local socket, and QEMU ends in `postmigrate`, from where `cont` resumes the
//! guest: the way back.
//!
//! ```text
//!   start ──> copying ──stop()──> stopped ──(stale pages arrive)──> drained ──> resume_at_source()
//!                │                                                     (or the guest stays paused)
//!                └─cancel()──> as before
//! ```
//! Between *stopped* and *drained* the source can neither be resumed nor is its memory complete.
//!
//! # What keeps QEMU from switching by itself
//! A guest that changes next to nothing satisfies QEMU's own test for the end of a pre-copy, whatever
//! `downtime-limit` says. QEMU 8.1 and newer have `switchover-ack`: QEMU waits for the destination's
//! agreement, and the destination is us; it is given in [`RamSource::stop`] only. Older ones can stop
//! by themselves, and do so with an idle guest right after the first pass: then
//! [`SourceEvent::StoppedByItself`] is sent, the hand-over is complete (no stale page) and `stop`
//! returns it; or `drained` and `resume_at_source` undo it.
//! Either way QEMU may also end an agreed stop as a plain pre-copy when hardly a page is left. Both
//! ends give the same [`Handover`].
//!
//! # What keeps the guest stopped if this daemon dies
//! In post-copy a QEMU that loses its reader keeps the guest stopped (`postcopy-paused`). At the end of a
//! plain pre-copy it does not: with the device state already in our hands, the socket's end makes the
//! migration `failed` and QEMU lets the guest run again by itself. Whoever has passed the device state on
//! by then has the guest running twice. So [`RamSource::stop`] returns such an end only once QEMU is
//! `completed`. (`take_back` is the way back for a daemon that comes after.)
//!
//! # Not burning a core while undecided
//! After the first pass the reading thread pauses after every section, so that QEMU blocks in its
//! write: long enough to keep to [`SourceOptions::later_rounds`], and at least [`BREATH`]. No setting
//! of QEMU does this: its bandwidth limit counts bytes, and an idle guest's rounds have none.

mod back;
mod kept;
mod reading;

pub use back::take_back;
pub use kept::release;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot, watch};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, UNIT};

use crate::qmp::{Events, Qmp};
use crate::settings::Settings;
use crate::sink::wall_clock;
use crate::store::RamStore;
use crate::stream::return_path::ReturnMessage;
use crate::stream::{StreamLayout, was_stopped, was_stopped_by_disk};
use crate::{Error, Result, SourceState};

/// Shortest pause after a section of a later round.
pub const BREATH: Duration = Duration::from_millis(25);
/// "Unlimited", in bytes per second: 1 TiB/s. (0 means that only in some versions.)
const UNLIMITED: u64 = 1 << 40;
/// Events kept for a slow listener; at the bound `RoundDone`s are left out, nothing else comes often.
const EVENTS: usize = 64;
/// Time QEMU gets for what takes it milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// Grain in which a state is asked for where QEMU sends no event for it.
const POLL: Duration = Duration::from_millis(5);

/// How a source is read.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Where to listen for QEMU; made for this, removed as soon as QEMU has connected.
    pub socket: PathBuf,
    /// Bytes per second taken from QEMU after the first full pass and before the stop.
    pub later_rounds: u64,
    /// Move a guest of a QEMU before 8.0 that runs without KVM. Such a QEMU (7.2 was tried) forgets to
    /// send again some of the pages its emulated processor writes: a guest with disk and network in use
    /// broke in each of nine of QEMU's own pre-copies. Refused otherwise ([`Error::LosesWrites`]).
    pub accept_lost_writes: bool,
}

impl SourceOptions {
    /// Later rounds at 64 MiB/s.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        SourceOptions {
            socket: socket.into(),
            later_rounds: 64 << 20,
            accept_lost_writes: false,
        }
    }
}

/// What a source tells while it copies.
#[derive(Debug)]
pub enum SourceEvent {
    /// The first thing said.
    Layout(StreamLayout),
    /// Round `n` (from 1) is over; `pages` arrived in it, zero pages included.
    RoundDone { n: u64, pages: u64 },
    /// QEMU has stopped the guest without being asked (before 8.1 only).
    StoppedByItself,
    /// Nothing more will come.
    Failed(Error),
}

/// What there is to hand over at the stop.
#[derive(Clone, Debug)]
pub struct Handover {
    /// The devices' state, as a sink takes it.
    pub device_state: Bytes,
    /// Per block: units whose copies sent before are worth nothing; their content is still to come.
    pub stale: Vec<UnitSet>,
    /// QEMU's timestamp of the STOP, since the Unix epoch; of a guest that stood still before, when the switch began.
    pub stopped_at_qemu: Duration,
    /// Whether an operator had stopped the guest before: it is to stand still at the destination too.
    pub stood: bool,
}

/// How far the reading has come.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Copying,
    Stopped,
    Drained,
    Failed(String),
}

/// What the stream held at the stop.
#[derive(Clone, Debug)]
struct Taken {
    device_state: Bytes,
    stale: Vec<UnitSet>,
    /// QEMU ended a plain pre-copy: it resumes the guest by itself unless it completes.
    precopy: bool,
}

/// What the reading thread and the rest share.
#[derive(Debug)]
struct Shared {
    socket: UnixStream,
    /// Return-path messages are written from several threads, each whole.
    return_path: Mutex<()>,
    pace: reading::Pace,
    phase: watch::Sender<Phase>,
    taken: Mutex<Option<Taken>>,
    stopped_at: watch::Sender<Option<Duration>>,
}

impl Shared {
    fn say(&self, message: &ReturnMessage) -> std::io::Result<()> {
        use std::io::Write;
        let _whole = self
            .return_path
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        (&self.socket).write_all(&message.encode())
    }

    /// Moves on; a failure is final, and so is the end.
    fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let moves = !matches!(now, Phase::Failed(_) | Phase::Drained);
            if moves {
                *now = phase;
            }
            moves
        });
    }
}

/// A running QEMU whose memory is being taken.
#[derive(Debug)]
pub struct RamSource {
    qmp: Qmp,
    layout: StreamLayout,
    store: Arc<RamStore>,
    shared: Arc<Shared>,
    settings: Settings,
    /// The guest did not run when it was stopped for the switch.
    stood: AtomicBool,
}

impl RamSource {
    /// Starts the migration into this daemon and returns once QEMU has named its RAM blocks. On any
    /// error the guest runs on and QEMU's settings are as they were.
    pub async fn start(
        qmp: Qmp,
        options: SourceOptions,
    ) -> Result<(RamSource, mpsc::Receiver<SourceEvent>)> {
        if !options.accept_lost_writes && loses_writes(&qmp).await? {
            return Err(Error::LosesWrites {
                version: qmp.version(),
            });
        }
        may_leave(&qmp).await?;
        let io = |what| {
            let path = options.socket.clone();
            move |source| Error::Io { what, path, source }
        };
        let listener = UnixListener::bind(&options.socket).map_err(io("listen on"))?;
        let settings = Settings::change(
            &qmp,
            &["events", "postcopy-ram", "return-path", "switchover-ack"],
            &[
                ("downtime-limit", 1),
                ("max-bandwidth", UNLIMITED),
                ("max-postcopy-bandwidth", 0),
            ],
        )
        .await;
        let settings = match settings {
            Ok(settings) => settings,
            Err(error) => {
                let _ = std::fs::remove_file(&options.socket);
                return Err(error);
            }
        };
        let qemu_events = qmp.events();
        let opened = Self::open(&qmp, &options, listener).await;
        let _ = std::fs::remove_file(&options.socket);
        let started = match opened {
            Ok(socket) => Self::read(&qmp, &options, socket, qemu_events).await,
            Err(error) => Err(error),
        };
        match started {
            Ok((layout, store, shared, events)) => Ok((
                RamSource {
                    qmp,
                    layout,
                    store,
                    shared,
                    settings,
                    stood: AtomicBool::new(false),
                },
                events,
            )),
            Err(error) => {
                // Best effort: the error that matters is the first one.
                let _ = qmp.execute("migrate_cancel", json!({})).await;
                let _ = migration_over(&qmp).await;
                let _ = settings.restore(&qmp).await;
                Err(error)
            }
        }
    }

    async fn open(
        qmp: &Qmp,
        options: &SourceOptions,
        listener: UnixListener,
    ) -> Result<UnixStream> {
        let uri = format!("unix:{}", options.socket.display());
        qmp.execute("migrate", json!({ "uri": uri })).await?;
        let (socket, _) = within(PATIENCE, "the source QEMU's connection", listener.accept())
            .await?
            .map_err(|source| Error::Io {
                what: "accept on",
                path: options.socket.clone(),
                source,
            })?;
        let blocking = || -> std::io::Result<UnixStream> {
            let socket = socket.into_std()?;
            socket.set_nonblocking(false)?;
            socket.set_write_timeout(Some(PATIENCE))?;
            Ok(socket)
        };
        blocking().map_err(|source| Error::Io {
            what: "use",
            path: options.socket.clone(),
            source,
        })
    }

    #[allow(clippy::type_complexity)]
    async fn read(
        qmp: &Qmp,
        options: &SourceOptions,
        socket: UnixStream,
        qemu_events: Events,
    ) -> Result<(
        StreamLayout,
        Arc<RamStore>,
        Arc<Shared>,
        mpsc::Receiver<SourceEvent>,
    )> {
        let shared = Arc::new(Shared {
            socket,
            return_path: Mutex::new(()),
            pace: reading::Pace::new(options.later_rounds),
            phase: watch::Sender::new(Phase::Copying),
            taken: Mutex::new(None),
            stopped_at: watch::Sender::new(None),
        });
        let (events, listener) = mpsc::channel(EVENTS);
        let (opened, layout) = oneshot::channel();
        reading::start(shared.clone(), events.clone(), opened)?;
        tokio::spawn(watch_qemu(qmp.clone(), qemu_events, shared.clone(), events));
        let result = within(PATIENCE, "the source's RAM blocks", layout).await;
        match result {
            Ok(Ok(Ok((layout, store)))) => Ok((layout, store, shared, listener)),
            Ok(Ok(Err(error))) => Err(error),
            Ok(Err(_)) => Err(Error::Source {
                state: SourceState::Running,
                reason: "the stream ended before it began".into(),
            }),
            Err(timeout) => {
                let _ = shared.socket.shutdown(std::net::Shutdown::Both);
                Err(timeout)
            }
        }
    }

    pub fn layout(&self) -> &StreamLayout {
        &self.layout
    }

    pub fn store(&self) -> &Arc<RamStore> {
        &self.store
    }

    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Stops the guest and returns what is to be handed over, within milliseconds of QEMU's STOP.
    ///
    /// May be called at any time after `start`, the first pass need not be over: what QEMU has not
    /// sent yet is then stale too. On an error the guest runs if the error says so.
    pub async fn stop(&self) -> Result<Handover> {
        self.shared.pace.hurry();
        let mut phase = self.shared.phase.subscribe();
        if *phase.borrow_and_update() == Phase::Copying {
            self.note_one_that_stands().await?;
            kept::keep(&self.qmp, &self.shared.socket).await?;
            // QEMU refuses if it has stopped by itself in this moment: then the phase tells.
            match self.qmp.execute("migrate-start-postcopy", json!({})).await {
                Ok(_) | Err(Error::Qmp { .. }) => {}
                Err(error) => return Err(error),
            }
            if self.settings.is_on("switchover-ack")
                && let Err(error) = self.shared.say(&ReturnMessage::SwitchoverAck)
            {
                // QEMU may have ended its passes by itself just now, and listens no more; the phase tells.
                tracing::debug!(%error, "QEMU does not hear that it may switch over");
            }
        }
        let waited = within(
            PATIENCE,
            "the guest's stop",
            phase.wait_for(|p| *p != Phase::Copying),
        )
        .await
        // Cloned at once: the reference is a lock that no later wait may hold.
        .map(|phase| phase.map(|p| p.clone()));
        let phase = match waited {
            Ok(phase) => phase,
            Err(timeout) => return Err(self.failure(timeout.to_string()).await),
        };
        if let Ok(Phase::Failed(reason)) = phase {
            return Err(self.failure(reason).await);
        }
        // QEMU may have ended its passes by itself before this was called, as it soon does of a guest that stands.
        let stood = |t: Taken| was_stopped(&t.device_state) || was_stopped_by_disk(&t.device_state);
        if self.shared.stopped_at.borrow().is_none() && self.taken().is_some_and(stood) {
            self.note_stood();
        }
        let mut stopped_at = self.shared.stopped_at.subscribe();
        let stopped_at_qemu = within(
            PATIENCE,
            "the STOP event",
            stopped_at.wait_for(Option::is_some),
        )
        .await?
        .ok()
        .and_then(|at| *at)
        .ok_or(Error::Answer {
            command: "STOP",
            what: "no timestamp",
        })?;
        let taken = self.taken().ok_or(Error::Phase { what: "stop" })?;
        if taken.precopy {
            // Nothing is stale, so this takes milliseconds; see the traps above.
            self.drained().await?;
        }
        Ok(Handover {
            stood: was_stopped(&taken.device_state),
            device_state: taken.device_state,
            stale: taken.stale,
            stopped_at_qemu,
        })
    }

    /// QEMU sends no STOP of a guest that somebody, or a disk's error, has stopped already.
    async fn note_one_that_stands(&self) -> Result<()> {
        let status = run_status(&self.qmp).await?;
        if !matches!(
            status.as_str(),
            "running" | "finish-migrate" | "postmigrate"
        ) {
            self.note_stood();
        }
        Ok(())
    }

    fn note_stood(&self) {
        self.stood.store(true, Ordering::Release);
        self.shared.stopped_at.send_replace(Some(wall_clock()));
    }

    /// Whether the stop has happened and no unit of the extent is still to come: only then is what the
    /// store holds the guest's last word.
    pub fn is_current(&self, block: usize, extent: Extent) -> bool {
        let stopped = matches!(*self.shared.phase.borrow(), Phase::Stopped | Phase::Drained);
        stopped && self.store.is_current(block, extent)
    }

    /// Waits, after the stop, until the extent is current. Asks QEMU to send it next.
    pub async fn wait_current(&self, block: usize, extent: Extent) -> Result<()> {
        if self.is_current(block, extent) {
            return Ok(());
        }
        self.ask_for(block, extent)?;
        let mut phase = self.shared.phase.subscribe();
        tokio::select! {
            () = self.store.wait_current(block, extent) => Ok(()),
            reason = async {
                let failed = phase.wait_for(|p| matches!(p, Phase::Failed(_))).await;
                match failed.as_deref() {
                    Ok(Phase::Failed(reason)) => reason.clone(),
                    _ => "gone".into(),
                }
            } => Err(self.failure(reason).await),
        }
    }

    /// Asks QEMU to send these stale units before the others. A unit on its way is not sent twice.
    fn ask_for(&self, block: usize, extent: Extent) -> Result<()> {
        let Some(found) = self.layout.blocks.get(block) else {
            return Err(Error::NoSuchBlock {
                block,
                blocks: self.layout.blocks.len(),
            });
        };
        let (stopped, len) = (
            *self.shared.phase.borrow() == Phase::Stopped,
            u32::try_from(extent.byte_len()),
        );
        if let (true, Ok(len @ 1..)) = (stopped, len) {
            let message = ReturnMessage::RequestPages {
                block: Some(found.name.clone()),
                start: extent.start * UNIT,
                len,
            };
            // If this fails the stream has failed too, and the phase tells the waiter.
            let _ = self.shared.say(&message);
        }
        Ok(())
    }

    /// Resolves once every stale page has arrived and QEMU has completed: from here the guest's memory
    /// is whole on both sides of the socket.
    pub async fn drained(&self) -> Result<()> {
        let mut phase = self.shared.phase.subscribe();
        let end = phase
            .wait_for(|p| matches!(p, Phase::Drained | Phase::Failed(_)))
            .await
            .map(|p| p.clone());
        if let Ok(Phase::Failed(reason)) = end {
            return Err(self.failure(reason).await);
        }
        match migration_over(&self.qmp).await?.as_str() {
            "completed" => {
                kept::let_go(&self.qmp).await;
                Ok(())
            }
            other => Err(self.failure(format!("QEMU ended {other}")).await),
        }
    }

    /// Undoes everything before the stop, also after a failure before it: the guest is as it was,
    /// QEMU's settings too. [`Error::Phase`] once the guest was stopped for the switch.
    pub async fn cancel(&self) -> Result<()> {
        if self.taken().is_some() {
            return Err(Error::Phase { what: "cancel" });
        }
        // First, so that the shutdown below is no failure to report.
        self.shared.enter(Phase::Failed("cancelled".into()));
        self.qmp.execute("migrate_cancel", json!({})).await?;
        let _ = self.shared.socket.shutdown(std::net::Shutdown::Both);
        let end = migration_over(&self.qmp).await?;
        kept::let_go(&self.qmp).await;
        let status = run_status(&self.qmp).await?;
        // Somebody may have stopped the guest meanwhile, or let it go on: that is not this migration's to undo.
        if matches!(status.as_str(), "finish-migrate" | "postmigrate") {
            return Err(self
                .failure(format!("the migration ended {end}, the guest is {status}"))
                .await);
        }
        self.settings.restore(&self.qmp).await
    }

    /// The way back: runs the guest here again, unless it had been stopped before. After
    /// [`drained`](Self::drained) only.
    pub async fn resume_at_source(&self) -> Result<()> {
        if *self.shared.phase.borrow() != Phase::Drained {
            return Err(Error::Phase {
                what: "resume at the source",
            });
        }
        if !self.stood.load(Ordering::Acquire) {
            self.qmp.execute("cont", json!({})).await?;
            let status = run_status(&self.qmp).await?;
            if status != "running" {
                return Err(self.failure(format!("the guest is {status}")).await);
            }
        }
        self.settings.restore(&self.qmp).await
    }

    fn taken(&self) -> Option<Taken> {
        let taken = &self.shared.taken;
        taken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A failure with the state it leaves, as QEMU itself tells it.
    async fn failure(&self, reason: String) -> Error {
        Error::Source {
            state: source_state(&self.qmp).await,
            reason,
        }
    }
}

impl Drop for RamSource {
    /// Before the stop a source that nobody holds is given up: QEMU's migration fails and the guest
    /// runs on. After it the reading thread goes on to the end by itself.
    fn drop(&mut self) {
        if *self.shared.phase.borrow() == Phase::Copying {
            let _ = self.shared.socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Turns QEMU's events into ours, until the reading is over.
async fn watch_qemu(
    qmp: Qmp,
    mut qemu: Events,
    shared: Arc<Shared>,
    events: mpsc::Sender<SourceEvent>,
) {
    let mut phase = shared.phase.subscribe();
    loop {
        // The stream and the events come on two sockets: little memory may be drained before STOP is heard.
        let stop_heard = shared.stopped_at.borrow().is_some();
        let over = |p: &Phase| match p {
            Phase::Drained => stop_heard,
            Phase::Failed(_) => true,
            Phase::Copying | Phase::Stopped => false,
        };
        let event = tokio::select! {
            biased;
            event = qemu.next() => event,
            _ = phase.wait_for(over) => break,
        };
        let event = match event {
            Ok(event) => event,
            Err(Error::EventsLost { .. }) => continue,
            Err(error) => {
                shared.enter(Phase::Failed(error.to_string()));
                break;
            }
        };
        match (event.name.as_str(), event.data["status"].as_str()) {
            ("STOP", _) => {
                shared.stopped_at.send_replace(Some(event.at));
            }
            // It was an operator's stop, and not the switch's.
            ("RESUME", _) => {
                shared.stopped_at.send_replace(None);
            }
            ("MIGRATION_PASS", _) => {
                if let Some(pass @ 2..) = event.data["pass"].as_u64() {
                    shared.pace.round(pass - 1, &events);
                }
            }
            ("MIGRATION", Some(status @ ("failed" | "cancelled" | "postcopy-paused"))) => {
                let reason = match qmp.execute("query-migrate", json!({})).await {
                    Ok(info) => info["error-desc"].as_str().unwrap_or(status).to_owned(),
                    Err(error) => error.to_string(),
                };
                shared.enter(Phase::Failed(reason));
            }
            _ => {}
        }
    }
    let end = phase.borrow().clone();
    if let Phase::Failed(reason) = end {
        let _ = shared.socket.shutdown(std::net::Shutdown::Both);
        let failed = Error::Source {
            state: source_state(&qmp).await,
            reason,
        };
        // A listener that has gone does not want to know.
        let _ = events.send(SourceEvent::Failed(failed)).await;
    }
}

async fn source_state(qmp: &Qmp) -> SourceState {
    let Ok(status) = run_status(qmp).await else {
        return SourceState::Gone;
    };
    match status.as_str() {
        "running" => SourceState::Running,
        "paused" | "postmigrate" | "prelaunch" => SourceState::Paused,
        _ => SourceState::Undecided,
    }
}

/// Whether this QEMU is one that cannot be trusted to know what its guest has written.
async fn loses_writes(qmp: &Qmp) -> Result<bool> {
    if qmp.version().major >= 8 {
        return Ok(false);
    }
    let kvm = qmp.execute("query-kvm", json!({})).await?;
    Ok(kvm["enabled"] != true)
}

/// Whether this QEMU's guest can be moved at all, as far as QEMU itself goes; changes nothing.
/// [`Error::LosesParts`] if it would be harmed.
pub async fn may_leave(qmp: &Qmp) -> Result<()> {
    match loses_parts(qmp).await? {
        None => Ok(()),
        Some(parts) => Err(Error::LosesParts {
            version: qmp.version(),
            parts,
        }),
    }
}

/// How many parts the guest's memory is in, if that is too many for this QEMU. Without KVM QEMU (10.0 was tried)
/// looks for the processor's cached translations of a RAM block as if each block began at address 0: of a second
/// block it keeps those by which the guest writes unseen, and of one longer than the first it dies.
async fn loses_parts(qmp: &Qmp) -> Result<Option<usize>> {
    let parts = match qmp.execute("query-memdev", json!({})).await {
        Ok(parts) => parts.as_array().map_or(0, Vec::len),
        Err(Error::Qmp { .. }) => 0,
        Err(error) => return Err(error),
    };
    if parts < 2 {
        return Ok(None);
    }
    let kvm = qmp.execute("query-kvm", json!({})).await?;
    Ok((kvm["enabled"] != true).then_some(parts))
}

pub(crate) async fn run_status(qmp: &Qmp) -> Result<String> {
    let answer = qmp.execute("query-status", json!({})).await?;
    answer["status"]
        .as_str()
        .map(str::to_owned)
        .ok_or(Error::Answer {
            command: "query-status",
            what: "no status",
        })
}

pub(crate) async fn migration_status(qmp: &Qmp) -> Result<(String, Value)> {
    let info = qmp.execute("query-migrate", json!({})).await?;
    let status = info["status"].as_str().unwrap_or("none").to_owned();
    Ok((status, info))
}

/// Waits until no migration runs and returns how the last one ended.
pub(crate) async fn migration_over(qmp: &Qmp) -> Result<String> {
    within(PATIENCE, "the end of the migration", async {
        loop {
            let (status, _) = migration_status(qmp).await?;
            if matches!(
                status.as_str(),
                "none" | "completed" | "failed" | "cancelled"
            ) {
                return Ok(status);
            }
            tokio::time::sleep(POLL).await;
        }
    })
    .await?
}

pub(crate) async fn within<T>(
    limit: Duration,
    what: &'static str,
    future: impl Future<Output = T>,
) -> Result<T> {
    tokio::time::timeout(limit, future)
        .await
        .map_err(|_| Error::Timeout { what, after: limit })
}
