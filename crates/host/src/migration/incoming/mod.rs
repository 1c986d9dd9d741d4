//! The destination's driver: performs what the engine's [`Destination`] decides.
//!
//! One task a migration, begun by the source's first connection. The stretch that counts is from the
//! grant to QEMU's RESUME: one durable line in the journal, the disks' mode, the package into QEMU.
//! Records that describe the new state at leisure are written when the guest runs.

mod again;
mod ahead;
mod ends;
mod ready;
mod seeding;

use seeding::Seeding;

pub use again::leftovers;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{SpaceId, SpaceKind, UNIT};
use whimbrel_engine::switchover::{
    Action, Destination, DestinationEvent, Epoch, Phase, Record, Say,
};
use whimbrel_qemu::stream::{StreamLayout, was_stopped};
use whimbrel_volume::backend::Backend;
use whimbrel_wire::message::{
    Grant, MAX_DEVICE_STATE, Message, Prepare, RamMode, unpack, unpack_heat,
};

use super::arrival::Arrival;
use super::arrivals::{Arrivals, RamIn, RamSink};
use super::board::Board;
use super::heat;
use super::landing::Landing;
use super::lane::{LinkEvent, TOLD_AGAIN};
use super::peeks::Peeks;
use super::record::MigrationJournal;
use super::recording::Meters;
use super::report;
use super::verify::{Answers, verify};
use crate::api::error::{ApiError, ErrorCode};
use crate::api::types::{Happened, MigrationState, SpaceProgress};
use crate::disk::{Mode, Wants};
use crate::host::Host;
use crate::machine::Running;
use crate::machines::{Machine, Machines};
use crate::state::{MachineRuntime, MigrationId, Ownership, QemuProcess, Timestamp};

/// Packed device state that may gather before a grant.
const MAX_STATE: usize = MAX_DEVICE_STATE;

/// How often figures are gathered and told to the source.
const SAMPLE: Duration = Duration::from_millis(250);

/// How long a source that is out of reach is waited for before it has granted anything. Longer than the
/// source waits for this side.
const PATIENCE_BEFORE_GRANT: Duration = Duration::from_secs(90);

/// The same, with something of the disks here: it took its time to come.
const PATIENCE_WITH_DISKS: Duration = Duration::from_secs(20 * 60);

/// Words of the source that are kept while QEMU loads the machine; those beyond wait in its channel.
const KEPT_WHILE_LOADING: usize = 256;

/// How long a QEMU that is being killed may take to be gone.
const ON_ITS_WAY_OUT: Duration = Duration::from_secs(2);

/// What a migration to here starts with.
pub struct Setup {
    pub host: Arc<Host>,
    pub machines: Arc<Machines>,
    pub migration: MigrationId,
    pub board: Arc<Board>,
    pub journal: MigrationJournal,
    pub link: Arrival,
    pub arrivals: Arc<Arrivals>,
    pub wants: Arc<Wants>,
    pub peeks: Arc<Peeks>,
}

/// What this driver's own tasks tell it.
enum Inner {
    /// RAM is in place and QEMU has taken it; or it could not.
    Ram(Result<(), whimbrel_qemu::Error>),
    /// Disks are complete, verified and durable; how many units were compared.
    Disks(Result<u64, super::verify::VerifyError>),
    /// A disk has been compared with its older copy; how many units were the same.
    Seeded(SpaceId, u64),
    /// QEMU's connection failed after the guest ran.
    SinkFailed(whimbrel_qemu::Error),
}

/// A migration to here.
pub struct Incoming {
    setup: Setup,
    switch: Destination,
    todo: VecDeque<Action>,
    offer: Option<Box<Prepare>>,
    landing: Option<Landing>,
    running: Option<Running>,
    ram_mode: RamMode,
    layout: Option<StreamLayout>,
    ram: Option<Arc<RamIn>>,
    /// By RAM block: units of which an old copy is here.
    stale: Vec<UnitSet>,
    /// The same by disk, if disks come ahead.
    stale_disks: Vec<UnitSet>,
    requests: Option<AbortOnDropHandle<()>>,
    state_parts: Vec<u8>,
    state: Option<Vec<u8>>,
    refusal: Option<String>,
    inner: mpsc::Receiver<Inner>,
    tell: mpsc::Sender<Inner>,
    tasks: Vec<AbortOnDropHandle<()>>,
    answers: Arc<Answers>,
    ram_done: bool,
    disks_done: bool,
    verified_units: u64,
    resumed_at: Option<Duration>,
    /// Older copies of disks, by space, and who compares them on this connection.
    seeds: BTreeMap<SpaceId, Arc<Backend>>,
    seeding: BTreeMap<SpaceId, Seeding>,
    /// When a person was told last that content cannot be stored.
    unstored_told: Option<Instant>,
    machine: Option<Arc<Machine>>,
    process: Option<QemuProcess>,
    over: Option<Phase>,
    /// Taken up from a journal: its epoch is known.
    known: bool,
    down_since: Option<Instant>,
}

impl Incoming {
    pub fn new(setup: Setup) -> Self {
        let (tell, inner) = mpsc::channel(16);
        Incoming {
            setup,
            switch: Destination::new(Epoch(0)),
            todo: VecDeque::new(),
            offer: None,
            landing: None,
            running: None,
            ram_mode: RamMode::Postcopy,
            layout: None,
            ram: None,
            stale: Vec::new(),
            stale_disks: Vec::new(),
            requests: None,
            state_parts: Vec::new(),
            state: None,
            refusal: None,
            inner,
            tell,
            tasks: Vec::new(),
            answers: Arc::new(Answers::default()),
            ram_done: false,
            disks_done: false,
            verified_units: 0,
            resumed_at: None,
            seeds: BTreeMap::new(),
            seeding: BTreeMap::new(),
            unstored_told: None,
            machine: None,
            process: None,
            over: None,
            known: false,
            down_since: None,
        }
    }

    /// What is counted here.
    pub fn meters(&self) -> Meters {
        Meters::destination(&self.setup.arrivals, &self.setup.wants)
    }

    fn event(&mut self, event: DestinationEvent) {
        let actions = self.switch.handle(event);
        self.todo.extend(actions);
    }

    /// A migration that was over before this daemon: only to answer what became of it.
    pub fn resume(&mut self, destination: Destination) {
        self.setup.arrivals.refuse();
        self.switch = destination;
        self.known = true;
        // A source that comes back later is answered by another session.
        self.over = Some(self.switch.phase());
    }

    /// Runs the migration to its end, and stays a little to answer a source that did not hear it.
    pub async fn run(mut self) {
        let mut sample = tokio::time::interval(SAMPLE);
        let mut linger = None;
        loop {
            while let Some(action) = self.todo.pop_front() {
                self.setup.board.entering(self.switch.phase());
                self.perform(action).await;
            }
            self.setup.board.phase(self.switch.phase());
            if self.over.is_some() && linger.is_none() {
                linger = Some(tokio::time::Instant::now() + super::LINGER);
            }
            if linger.is_some_and(|until| tokio::time::Instant::now() > until) {
                break;
            }
            tokio::select! {
                event = self.setup.link.events.recv() => match event {
                    Some(event) => self.heard(event).await,
                    None => break,
                },
                Some(inner) = self.inner.recv() => self.inner(inner).await,
                _ = sample.tick() => self.sample().await,
            }
        }
    }

    async fn heard(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up => {
                self.begin_seeding();
                self.down_since = None;
                self.setup.board.link(|link| {
                    link.connected = true;
                    link.since = Timestamp::now();
                    link.waiting_for = None;
                });
                if let Some(at) = self.resumed_at {
                    self.say_ran(at).await;
                }
                self.event(DestinationEvent::LinkUp);
            }
            LinkEvent::Down(error) => {
                self.seeding.clear();
                self.down_since.get_or_insert_with(Instant::now);
                if let Some(why) = self.cannot_store(&error) {
                    // The guest runs at the source, which had better try somewhere else.
                    self.refusal = Some(why);
                    self.event(DestinationEvent::Failed);
                }
                let waiting = format!("{error}; waiting for the source to connect again");
                self.setup.board.link(|link| {
                    link.connected = false;
                    link.since = Timestamp::now();
                    link.reconnects += 1;
                    link.waiting_for = Some(waiting.clone());
                });
                if self.over.is_none() {
                    self.setup.board.tell(format!("link lost: {waiting}"));
                }
            }
            LinkEvent::Unstored(why) => {
                // What was on its way when it began is told of as well.
                if self
                    .unstored_told
                    .is_none_or(|told| told.elapsed() > TOLD_AGAIN)
                {
                    self.unstored_told = Some(Instant::now());
                    self.setup.board.tell(format!(
                        "what comes cannot be stored: {why}; it goes on by itself when that is mended"
                    ));
                }
            }
            LinkEvent::Heard(message) => self.message(*message).await,
        }
    }

    async fn message(&mut self, message: Message) {
        match message {
            Message::Prepare(offer) => {
                let epoch = offer.epoch;
                if self.offer.is_none() && !self.known {
                    if self.over.is_some() {
                        // Something was asked before there was an offer, and answered: this session will be gone
                        // soon, and nothing may begin in it.
                        self.refusal =
                            Some("the session was over before the offer came".to_string());
                        return self.say(Say::Refused { epoch }).await;
                    }
                    self.switch = Destination::new(epoch);
                    if let Ok(name) = offer.machine.parse() {
                        self.setup.board.update(|view| view.machine = name);
                    }
                    self.offer = Some(offer);
                }
                self.event(DestinationEvent::Heard(Say::Prepare { epoch }));
            }
            Message::Layout(layout) => self.take_layout(layout).await,
            Message::StatePart(part) => {
                if self.state_parts.len() + part.len() <= MAX_STATE {
                    self.state_parts.extend(part);
                }
            }
            Message::Grant(grant) => self.granted(grant),
            Message::Own { say, why } => {
                if let (Say::Cancel { epoch }, Some(why)) = (say, why) {
                    tracing::info!(%epoch, why, "the source cancels");
                    self.refusal = Some(why);
                }
                if self.offer.is_none() && !self.known {
                    // A question about a migration that this host knows nothing of.
                    self.switch = Destination::new(say.epoch());
                }
                self.event(DestinationEvent::Heard(say));
            }
            Message::DisksAhead => self.begin_disks_ahead(),
            Message::Stale { space, runs } => self.note_stale(space, &runs),
            Message::Heat {
                space,
                first,
                extents,
                packed,
            } => self.take_heat(space, first, extents, &packed).await,
            Message::SeedAlike {
                space,
                first,
                units,
                packed,
            } => self.seed_alike(space, first, units, &packed),
            Message::DigestAnswer { space, first, same } => {
                self.answers.answer(space, first, same);
            }
            other => {
                tracing::warn!(
                    ?other,
                    "a message that has no place at a destination is ignored"
                );
            }
        }
    }

    fn spawn(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(AbortOnDropHandle::new(tokio::spawn(work)));
    }

    fn granted(&mut self, grant: Grant) {
        let whole = self.state_parts.len() == grant.parts_len as usize;
        let mut packed = std::mem::take(&mut self.state_parts);
        packed.extend(&grant.state);
        match unpack(&packed, MAX_DEVICE_STATE) {
            Ok(state) if whole => self.state = Some(state),
            // Nothing is answered: the source says it again after it reconnects, or asks.
            Ok(_) | Err(_) => {
                self.setup
                    .board
                    .tell("the grant's device state did not arrive whole");
                return;
            }
        }
        self.setup.board.mark(Happened::Granted);
        self.event(DestinationEvent::Heard(Say::Grant { epoch: grant.epoch }));
    }

    async fn inner(&mut self, inner: Inner) {
        match inner {
            Inner::Ram(Ok(())) => {
                self.setup.board.tell("all of RAM is here");
                self.ram_done = true;
            }
            Inner::Ram(Err(error)) => self.ram_failed(&error),
            Inner::Disks(Ok(units)) => {
                self.verified_units = units;
                self.setup
                    .board
                    .tell("all disks are here, and equal to the source's by digest");
                self.disks_done = true;
            }
            Inner::Disks(Err(error)) => self.trouble(format!("disks: {error}")),
            Inner::Seeded(space, taken) => self.seed_is_over(space, taken).await,
            Inner::SinkFailed(error) => self.ram_failed(&error),
        }
        if self.ram_done && self.disks_done {
            self.event(DestinationEvent::NothingAbsent);
        }
    }

    /// QEMU does not take memory any more. A guest that has shut down needs none; its disks still come.
    fn ram_failed(&mut self, error: &whimbrel_qemu::Error) {
        if self.process.as_ref().is_some_and(|p| !p.is_alive()) {
            self.setup.board.tell(format!(
                "the guest's process has ended ({error}); its disks go on arriving"
            ));
            // What of it still comes must not break the connections that bring the disks.
            if let Some(layout) = &self.layout {
                let all = layout.blocks.iter().map(|b| UnitSet::full(b.units()));
                let disks = self.setup.arrivals.disks().len();
                let spaces = again::spaces_of(layout, disks, all.collect());
                self.ram = Some(self.take_ram(spaces, RamSink::Sated));
            }
            self.requests = None;
            self.ram_done = true;
        } else {
            self.trouble(format!("RAM: {error}"));
        }
    }

    /// Something failed that this daemon cannot put right, with the guest this host's.
    fn trouble(&mut self, what: String) {
        self.setup.board.fail(
            MigrationState::NeedsOperator,
            ApiError::new(ErrorCode::NeedsOperator, what)
                .machine_state("this host owns the machine; it may have stopped")
                .next_step("look at `machine show` and at qemu.log in the machine's folder; the source keeps all it had at the switchover"),
        );
    }

    async fn perform(&mut self, action: Action) {
        match action {
            Action::Journal(record) => self.journal(record),
            Action::Send(say) => self.say(say).await,
            Action::MakeReady => self.make_ready().await,
            Action::RunGuest { .. } => self.run_guest().await,
            Action::CleanUp => self.clean_up().await,
            Action::EndGuest => self.end_guest().await,
            Action::Finish(phase) => self.finish(phase).await,
            // Only after a restart, which is not driven from here.
            Action::Inspect => {}
            Action::StartCopy | Action::StopGuest | Action::KeepGuest { .. } | Action::Drain => {
                unreachable!("only a source's state machine asks for {action:?}")
            }
        }
    }

    fn journal(&mut self, record: Record) {
        let appended = tokio::task::block_in_place(|| self.setup.journal.append(record));
        let Err(error) = appended else { return };
        tracing::error!(%error, "the migration's journal cannot be written");
        self.refusal = Some(format!("its journal cannot be written: {error}"));
        if let Record::Preparing { .. } | Record::Accepted { .. } = record {
            // Not durable, so not acted on. A refusal is not durable either, but holds all the same: a
            // destination that knows of no acceptance never accepts.
            self.todo.clear();
            self.event(DestinationEvent::Failed);
        }
    }

    async fn say(&mut self, say: Say) {
        let message = match say {
            Say::Prepared { epoch } => Message::Prepared {
                epoch,
                ram: self.ram_mode,
                note: self.refusal.take(),
            },
            say => Message::Own {
                say,
                why: self.refusal.clone(),
            },
        };
        self.setup.link.mouth.say(message).await;
    }

    // ---- the switchover ----

    /// Gives QEMU the machine. It may wait for memory that is lost, and for ever; so what the source says
    /// meanwhile is heard, and kept for afterwards unless it wants the machine back.
    async fn run_guest(&mut self) {
        let (_, nothing) = mpsc::channel(1);
        let mut events = std::mem::replace(&mut self.setup.link.events, nothing);
        let mut kept = VecDeque::new();
        let epoch = self.switch.epoch();
        let stands = self.state.as_ref().is_some_and(|state| was_stopped(state));
        let outcome = {
            let outcome = self.try_run_guest();
            tokio::pin!(outcome);
            loop {
                tokio::select! {
                    biased;
                    outcome = &mut outcome => break Some(outcome),
                    Some(event) = events.recv(), if kept.len() < KEPT_WHILE_LOADING => {
                        if wants_back(&event, epoch) {
                            break None;
                        }
                        kept.push_back(event);
                    }
                }
            }
        };
        self.setup.link.events = events;
        match outcome {
            Some(outcome) => self.guest_loaded(outcome, stands).await,
            None => self.event(DestinationEvent::Heard(Say::GiveBack { epoch })),
        }
        for event in kept {
            self.heard(event).await;
        }
    }

    async fn guest_loaded(&mut self, outcome: Result<Duration, String>, stands: bool) {
        match outcome {
            Ok(at) => {
                self.resumed_at = Some(at);
                self.setup.board.mark(Happened::Ran);
                self.say_ran(at).await;
                self.event(DestinationEvent::Running);
                self.setup.board.tell(match stands {
                    true => "the guest is here, stopped as it was at its source",
                    false => "the guest runs here",
                });
                self.settle().await;
            }
            Err(why) => {
                let touched = self
                    .running
                    .iter()
                    .flat_map(|r| &r.disks)
                    .any(|disk| disk.was_touched());
                if touched {
                    // It wrote, so it ran: nobody but a person may say what that means.
                    self.setup.arrivals.refuse();
                    self.trouble(format!("{why}; yet the guest has written here"));
                    return;
                }
                self.refusal = Some(why);
                self.event(DestinationEvent::Failed);
            }
        }
    }

    /// Gives QEMU the machine; QEMU's own time of RESUME.
    async fn try_run_guest(&mut self) -> Result<Duration, String> {
        let missing = "the grant came before the machine was ready";
        let state = self.state.take().ok_or(missing)?;
        let ram = self.ram.clone().ok_or(missing)?;
        let evicted = self.stale.iter().map(UnitSet::len).sum::<u64>();
        // Before QEMU runs, as it asks at once for what it lacks then.
        ram.evict(&self.stale);
        let fillings = self.disks_taken_over().ok_or(missing)?;
        self.setup.arrivals.set_evicted();
        let running = self.running.as_ref().ok_or(missing)?;
        for (filling, disk) in fillings.iter().zip(&running.disks) {
            disk.set_mode(Mode::Filling(filling.clone())).await;
        }
        self.setup.arrivals.set_disks(fillings);
        match ram.sink() {
            RamSink::Postcopy(sink) => {
                sink.run(&state, &self.stale)
                    .await
                    .map_err(|e| e.to_string())?;
                tracing::debug!(bytes = state.len(), evicted, "device state is with QEMU");
                self.setup.arrivals.open_ram();
                sink.resumed().await.map_err(|e| e.to_string())
            }
            RamSink::Precopy(sink) => {
                sink.run(&state).await.map_err(|e| e.to_string())?;
                sink.resumed().await.map_err(|e| e.to_string())
            }
            RamSink::Sated => Err(missing.to_string()),
        }
    }

    async fn say_ran(&self, at: Duration) {
        let at_us = at.as_micros() as u64;
        self.setup.link.mouth.say(Message::Ran { at_us }).await;
    }

    /// The machine is this host's: records, and the tasks that see the rest arrive. Without a process its
    /// memory is gone, and its disks arrive all the same.
    async fn settle(&mut self) {
        let Some(landing) = &mut self.landing else {
            return;
        };
        let running = self.running.take();
        self.process = running.as_ref().map(|running| running.process.clone());
        let runtime = MachineRuntime {
            epoch: self.switch.epoch(),
            ownership: Ownership::Arriving {
                migration: self.setup.migration.clone(),
            },
            process: self.process.clone(),
        };
        let plan = landing.plan();
        let accepted = tokio::task::block_in_place(|| plan.accept(&self.setup.host, &runtime));
        if let Err(error) = accepted {
            self.setup.board.tell(format!(
                "the machine's records cannot be written ({error}); the migration's journal says that it is here"
            ));
        }
        let machine = Machine::new(plan.spec.clone(), runtime, running);
        // Their files are with the disks now.
        landing.volumes.clear();
        let machine = self.setup.machines.insert(machine);
        machine.watch_end(&self.setup.host).await;
        machine.lock().await.migration = Some(self.setup.migration.clone());
        self.machine = Some(machine);
        self.watch_ram();
        self.watch_disks();
        self.begin_seeding();
    }

    /// The source says how hot a disk is: a hint, of use only while a guest uses the disk.
    async fn take_heat(&self, space: SpaceId, first: u64, extents: u64, packed: &[u8]) {
        let Some(machine) = &self.machine else { return };
        let standing = machine.lock().await;
        let mut disks = standing.running.iter().flat_map(|running| &running.disks);
        if let Some(disk) = disks.nth(usize::from(space.0))
            && let Some(log) = disk.heat()
            && let Ok(said) = unpack_heat(extents, packed)
        {
            heat::warm(log, disk.size(), first, &said);
        }
    }

    fn watch_ram(&mut self) {
        let Some(ram) = self.ram.clone() else { return };
        let (tell, process) = (self.tell.clone(), self.process.clone());
        self.spawn(async move {
            let done = match ram.sink() {
                RamSink::Postcopy(sink) => {
                    tokio::select! {
                        () = ram.completed() => sink.finish().await,
                        error = sink.failed() => {
                            ends_soon(process).await;
                            // The driver lives as long as this task.
                            let _ = tell.send(Inner::SinkFailed(error)).await;
                            return;
                        }
                    }
                }
                RamSink::Precopy(sink) => sink.finish().await,
                RamSink::Sated => Ok(()),
            };
            let _ = tell.send(Inner::Ram(done)).await;
        });
    }

    fn watch_disks(&mut self) {
        let (disks, tell) = (self.setup.arrivals.disks(), self.tell.clone());
        let (mouth, answers) = (self.setup.link.mouth.clone(), self.answers.clone());
        let came_ahead = self.has_disks_ahead();
        self.spawn(async move {
            let verified = async {
                for disk in disks.iter().filter(|_| came_ahead) {
                    disk.record_ahead().await?;
                }
                let mut units = 0;
                for disk in &disks {
                    disk.completed().await;
                    disk.make_durable().await?;
                    units += verify(disk, &mouth, &answers).await?;
                }
                Ok(units)
            };
            let done = verified.await;
            let _ = tell.send(Inner::Disks(done)).await;
        });
    }

    // ---- figures and ends ----

    async fn sample(&mut self) {
        let waiting = matches!(self.switch.phase(), Phase::Prepare | Phase::Copy);
        let patience = match self.has_disks_ahead() {
            true => PATIENCE_WITH_DISKS,
            false => PATIENCE_BEFORE_GRANT,
        };
        if waiting && self.down_since.is_some_and(|d| d.elapsed() > patience) {
            // Safe whatever the source did meanwhile: a grant that is on its way finds a refusal.
            self.down_since = None;
            self.refusal = Some(format!(
                "the source was out of reach for {} s",
                patience.as_secs()
            ));
            self.event(DestinationEvent::Failed);
        }
        if waiting && self.running.as_ref().is_some_and(Running::has_ended) {
            // What goes ahead could not be stored, and so the source would never switch.
            self.refusal = Some("the QEMU that waited for the machine has ended".to_string());
            self.event(DestinationEvent::Failed);
        }
        if self.setup.board.view().ended.is_some() {
            // The disks are not this migration's any more: what was told last stays.
            return;
        }
        let mut resident: Vec<u64> = Vec::new();
        let mut spaces = Vec::new();
        for disk in self.setup.arrivals.disks() {
            resident.push(disk.resident());
            spaces.push((disk.name(), SpaceKind::Disk, disk.units(), disk.resident()));
        }
        if let (Some(ram), Some(layout)) = (&self.ram, &self.layout) {
            if resident.is_empty() {
                let disks = self.running.as_ref().map_or(0, |r| r.disks.len());
                resident.resize(disks, 0);
            }
            for ((_, units), block) in ram.resident().into_iter().zip(&layout.blocks) {
                resident.push(units);
                spaces.push((block.name.clone(), SpaceKind::Ram, block.units(), units));
            }
        }
        let figures = self.setup.wants.figures();
        let late = self.setup.arrivals.late_copies();
        let fares = report::fares(figures, resident, late, self.verified_units);
        let demands = report::demands(&fares);
        let (done, total) = spaces
            .iter()
            .fold((0, 0), |(d, t), s| (d + s.3 * UNIT, t + s.2 * UNIT));
        let rtt = self.setup.link.pulse.rtt();
        self.setup.board.update(|view| {
            view.demands = demands;
            view.link.rtt_ms = rtt.map(|r| r.as_secs_f64() * 1e3);
            view.spaces = spaces
                .into_iter()
                .map(|(name, kind, units_total, units_resident)| SpaceProgress {
                    name,
                    kind,
                    units_total,
                    units_live: units_total,
                    units_resident,
                    units_sent: 0,
                    bytes_sent: 0,
                })
                .collect();
        });
        self.setup.board.sample(done, total);
        if self.over.is_none() {
            self.setup.link.mouth.say(Message::Fares(fares)).await;
        }
    }

    fn folder(&self) -> std::path::PathBuf {
        let host = &self.setup.host;
        host.state.migration_folder(&self.setup.migration)
    }
}

/// Whether this is the source's word that it takes the machine back.
fn wants_back(event: &LinkEvent, epoch: Epoch) -> bool {
    let LinkEvent::Heard(message) = event else {
        return false;
    };
    matches!(&**message, Message::Own { say: Say::GiveBack { epoch: of }, .. } if *of == epoch)
}

/// Waits a little for a process that may be on its way out: one that is killed closes its sockets first.
async fn ends_soon(process: Option<QemuProcess>) {
    let ended = async {
        while process.as_ref().is_some_and(QemuProcess::is_alive) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // If it lives, that is what is told of.
    let _ = tokio::time::timeout(ON_ITS_WAY_OUT, ended).await;
}
