//! The source's driver: performs what the engine's [`Source`] decides.
//!
//! One task a migration. It takes events (the link's, QEMU's, the operator's), asks the state machine, and
//! performs the actions in order. The stop is the one stretch where every millisecond is the guest's:
//! between QEMU's STOP and the grant on its way to the peer lie only the hand-over itself, bitmaps and
//! one durable line in the journal.

mod again;
mod ahead;
mod disks;
mod ends;
mod offer;
mod precopy;
mod stop;

pub use again::offer_again;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use whimbrel_engine::ahead::Ahead;
use whimbrel_engine::rounds::{Choice, Rounds};
use whimbrel_engine::space::SpaceId;
use whimbrel_engine::switchover::{Action, Epoch, Phase, Record, Say, Source, SourceEvent};
use whimbrel_peer::pace::Pace;
use whimbrel_qemu::content::RamContent;
use whimbrel_qemu::qmp::Qmp;
use whimbrel_qemu::source::{Handover, RamSource, SourceEvent as RamEvent, SourceOptions};
use whimbrel_wire::message::{
    DiskOffer, FEATURE_GIVE_BACK, Fares, Grant, Layout, LayoutBlock, Message, Prepare, RamMode,
    pack,
};

use self::disks::{DisksOut, PATIENCE_WITH_DISKS};
use self::precopy::RamPace;
use super::board::Board;
use super::departure::Departure;
use super::easing::Easing;
use super::flow::{Content, Flow};
use super::lane::{LinkEvent, TOLD_AGAIN};
use super::record::{MigrationJournal, mark_over, save_layout};
use super::report;
use super::spaces;
use crate::api::error::{ApiError, ErrorCode};
use crate::api::types::{Happened, MigrationState};
use crate::disk::Disk;
use crate::host::Host;
use crate::machine::ram_out_socket;
use crate::machines::Machine;
use crate::state::{MachineRuntime, MachineSpec, Timestamp};
use offer::offer_disks;

/// Bytes of packed device state in one message.
const STATE_PART: usize = 768 << 10;

/// How long an unreachable destination is waited for before the grant. The guest runs meanwhile, so
/// there is no hurry; but nobody should find a forgotten migration in the morning.
const PATIENCE_BEFORE_GRANT: Duration = Duration::from_secs(60);

/// How long a source stays, after all is over, on a link that is up: less than the destination does, which
/// would otherwise be dialled again for nothing.
const FAREWELL: Duration = Duration::from_secs(3);

/// How long a source stays, after all is over, for a destination that cannot be told.
const LONGEST_FAREWELL: Duration = Duration::from_secs(3600);

/// How often figures are gathered.
const SAMPLE: Duration = Duration::from_millis(200);

/// What an operator may tell a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the hold.
    Switch,
    Cancel,
    /// After the grant: the machine is wanted back as it was at the switchover. `lost`: the operator swears that
    /// the destination's guest will never run again.
    TakeBack {
        lost: bool,
    },
}

/// What a migration away from here starts with.
pub struct Setup {
    pub host: Arc<Host>,
    pub machine: Arc<Machine>,
    pub board: Arc<Board>,
    pub journal: MigrationJournal,
    pub link: Departure,
    pub flow: Arc<Flow>,
    pub pace: Pace,
    pub easing: Arc<Easing>,
    pub commands: mpsc::Receiver<Command>,
    pub spec: MachineSpec,
    pub runtime: MachineRuntime,
    /// `None` only if the migration was taken up and QEMU is gone.
    pub qmp: Option<Qmp>,
    pub disks: Vec<Arc<Disk>>,
    pub ram: RamMode,
    /// With post-copy: what the guest only reads goes ahead of the switch.
    pub ahead: bool,
    /// What the guest does not write to of its disks goes ahead of the switch.
    pub disks_ahead: bool,
    /// With pre-copy: in which order.
    pub ram_order: Choice,
    pub hold: bool,
    pub ram_changes: watch::Sender<bool>,
}

/// A migration away from here.
pub struct Outgoing {
    setup: Setup,
    switch: Source,
    todo: VecDeque<Action>,
    ram: Option<RamSource>,
    ram_events: Option<mpsc::Receiver<RamEvent>>,
    handover: Option<Handover>,
    stopped: Option<Instant>,
    /// What the destination said of RAM's way.
    ram_mode: RamMode,
    layout_taken: bool,
    ahead: Option<Ahead>,
    disks_out: Option<DisksOut>,
    rounds: Option<Rounds>,
    ram_pace: RamPace,
    /// The first full pass over RAM is in this daemon's memory.
    collected: bool,
    may_switch: bool,
    link_up: bool,
    down_since: Option<Instant>,
    outage: Duration,
    cancelled: bool,
    /// The operator wanted the machine back.
    taken_back: bool,
    failure: Option<ApiError>,
    refusal: Option<String>,
    ram_taken: bool,
    empties_said: Vec<SpaceId>,
    /// There was a reconnect since they were said.
    facts_due: bool,
    /// The destination was told how hot the disks are, and is again whenever it may not have heard.
    heat_said: bool,
    tasks: Vec<AbortOnDropHandle<()>>,
    fares: Fares,
    blackout: Option<Duration>,
    stopped_at: Option<Duration>,
    resumed_at: Option<Duration>,
    ran: Option<Instant>,
    over: Option<Phase>,
    over_since: Option<Instant>,
    /// When a person was told last that the destination cannot store what comes.
    unstored_told: Option<Instant>,
    quiet_since: Option<Instant>,
    ram_sent_limit: u64,
    /// By a restarted daemon, after the grant.
    taken_up: bool,
}

impl Outgoing {
    pub fn new(setup: Setup) -> Self {
        let own = setup.runtime.epoch;
        let may_switch = !setup.hold;
        Outgoing {
            switch: Source::new(own),
            setup,
            todo: VecDeque::new(),
            ram: None,
            ram_events: None,
            handover: None,
            stopped: None,
            ram_mode: RamMode::Postcopy,
            layout_taken: false,
            ahead: None,
            disks_out: None,
            rounds: None,
            ram_pace: RamPace::default(),
            collected: false,
            may_switch,
            link_up: false,
            down_since: None,
            outage: Duration::ZERO,
            cancelled: false,
            taken_back: false,
            failure: None,
            refusal: None,
            ram_taken: false,
            empties_said: Vec::new(),
            facts_due: false,
            heat_said: false,
            tasks: Vec::new(),
            fares: Fares::default(),
            blackout: None,
            stopped_at: None,
            resumed_at: None,
            ran: None,
            over: None,
            over_since: None,
            quiet_since: None,
            unstored_told: None,
            ram_sent_limit: 0,
            taken_up: false,
        }
    }

    fn board(&self) -> &Board {
        &self.setup.board
    }

    fn event(&mut self, event: SourceEvent) {
        let actions = self.switch.handle(event);
        self.todo.extend(actions);
    }

    /// Runs the migration to its end.
    pub async fn run(mut self) {
        if !self.taken_up {
            self.begin();
        }
        let mut sample = tokio::time::interval(SAMPLE);
        loop {
            while let Some(action) = self.todo.pop_front() {
                self.setup.board.entering(self.switch.phase());
                self.perform(action).await;
            }
            self.say_facts_again().await;
            self.setup.board.phase(self.switch.phase());
            if self.may_leave() {
                break;
            }
            tokio::select! {
                event = self.setup.link.events.recv() => match event {
                    Some(event) => self.heard(event).await,
                    None => break,
                },
                Some(command) = self.setup.commands.recv() => self.command(command),
                event = next_ram_event(&mut self.ram_events) => self.ram_event(event).await,
                _ = sample.tick() => self.sample().await,
            }
        }
        // A completion that the destination may not have heard of is told again by the next daemon.
        let told = self.over != Some(Phase::Complete) || self.quiet_since.is_some();
        if self.over.is_some() && told {
            mark_over(&self.folder());
        }
        tracing::info!(migration = %self.board().view().id, "session over");
    }

    fn folder(&self) -> PathBuf {
        let id = self.board().view().id;
        self.setup.host.state.migration_folder(&id)
    }

    fn begin(&mut self) {
        offer_disks(&self.setup.flow, &self.setup.disks);
        self.event(SourceEvent::Start);
    }

    /// Whether the migration is over and the destination had time to hear so: its last question may have
    /// been lost with a connection, so a link that was up throughout, and heard from, is what counts.
    fn may_leave(&mut self) -> bool {
        if self.over.is_none() || self.switch.is_unanswered() {
            return false;
        }
        let now = Instant::now();
        let over_since = *self.over_since.get_or_insert(now);
        let quiet_since = if self.link_up && self.setup.link.pulse.is_alive() {
            *self.quiet_since.get_or_insert(now)
        } else {
            self.quiet_since = None;
            now
        };
        quiet_since.elapsed() > FAREWELL
            || over_since.elapsed() > LONGEST_FAREWELL
            || self.over != Some(Phase::Complete)
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Switch => {
                self.may_switch = true;
                self.setup.board.state(MigrationState::Running);
            }
            Command::Cancel => {
                if self.switch.can_cancel() {
                    self.cancelled = true;
                    self.event(SourceEvent::Cancel);
                }
            }
            Command::TakeBack { lost } => {
                let hears = self.setup.link.mouth.features() & FEATURE_GIVE_BACK != 0;
                if !lost && !hears {
                    self.setup.board.tell("the destination cannot be asked for the machine: it is away, or of a version that knows no giving back");
                } else if self.switch.can_take_back() {
                    self.taken_back = true;
                    let peer = self.setup.board.view().peer;
                    self.setup.board.tell(if lost {
                        format!("the operator takes the machine back: {peer} is said to be lost")
                    } else {
                        format!(
                            "the operator wants the machine back: {peer} is asked to end its guest"
                        )
                    });
                    self.event(SourceEvent::TakeBack { lost });
                }
            }
        }
    }

    async fn heard(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up => {
                self.link_up = true;
                if let Some(since) = self.down_since.take() {
                    self.outage += since.elapsed();
                    self.setup.board.tell(format!(
                        "link is back after {:.1} s",
                        since.elapsed().as_secs_f64()
                    ));
                }
                self.setup.board.link(|link| {
                    link.connected = true;
                    link.since = Timestamp::now();
                    link.waiting_for = None;
                });
                if self.switch.phase() == Phase::Copy && self.ram.is_some() && !self.layout_taken {
                    self.say_layout().await;
                }
                self.say_disks_ahead().await;
                self.say_ahead().await;
                self.event(SourceEvent::LinkUp);
                self.facts_due = true;
            }
            LinkEvent::Down(error) => {
                if self.link_up {
                    self.setup
                        .board
                        .tell(format!("link lost: {error}; trying again"));
                    self.setup.board.link(|link| {
                        link.reconnects += 1;
                        link.since = Timestamp::now();
                    });
                }
                self.link_up = false;
                if let Some(ahead) = &mut self.ahead {
                    ahead.link_down();
                }
                self.down_since.get_or_insert_with(Instant::now);
                let waiting = error.to_string();
                self.setup.board.link(|link| {
                    link.connected = false;
                    link.waiting_for = Some(waiting);
                });
            }
            LinkEvent::Unstored(why) => {
                if self
                    .unstored_told
                    .is_none_or(|told| told.elapsed() > TOLD_AGAIN)
                {
                    self.unstored_told = Some(Instant::now());
                    let peer = self.setup.board.view().peer;
                    self.setup.board.tell(format!(
                        "'{peer}' cannot store what comes: {why}; memory goes on, and disks when that is mended"
                    ));
                }
            }
            LinkEvent::Heard(message) => self.message(*message).await,
        }
    }

    /// What is empty and how hot the disks are, once more after a reconnect. After the words of ownership: a
    /// destination reads what is empty only once it has heard the grant, and reads in order.
    async fn say_facts_again(&mut self) {
        if !std::mem::take(&mut self.facts_due) {
            return;
        }
        for space in std::mem::take(&mut self.empties_said) {
            self.say_empty(space).await;
        }
        if self.heat_said {
            self.say_heat().await;
        }
    }

    /// Something failed while the guest is still this host's.
    fn fail(&mut self, code: ErrorCode, what: impl Into<String>) {
        if self.failure.is_none() {
            self.failure = Some(ApiError::new(code, what));
        }
        self.event(SourceEvent::Failed);
    }

    async fn message(&mut self, message: Message) {
        match message {
            Message::Prepared { epoch, ram, note } => {
                self.ram_mode = ram;
                if let Some(note) = note {
                    self.setup.board.tell(note);
                }
                self.event(SourceEvent::Heard(Say::Prepared { epoch }));
            }
            Message::LayoutTaken => {
                self.layout_taken = true;
                if self.ram_mode == RamMode::Precopy {
                    self.begin_precopy();
                }
            }
            Message::Own { say, why } => {
                if let Some(why) = why {
                    self.refusal = Some(why);
                }
                self.event(SourceEvent::Heard(say));
            }
            Message::Ran { at_us } => self.ran_at(at_us),
            Message::RamTaken => self.ram_is_taken(),
            Message::SeedEnd { space } => self.compared(space),
            // From before the switch, with what is evicted by it.
            Message::Fares(_) if self.stopped.is_some() && self.ran.is_none() => {}
            Message::Fares(fares) => self.fares = fares,
            other => {
                tracing::warn!(?other, "a message that has no place at a source is ignored");
            }
        }
    }

    /// The destination has all of RAM that was sent so far.
    fn ram_is_taken(&mut self) {
        self.ram_taken = true;
        if let Some(ahead) = &mut self.ahead {
            ahead.taken();
        }
    }

    fn ran_at(&mut self, at_us: u64) {
        // It is said again after every reconnect.
        if self.ran.is_some() {
            return;
        }
        self.ran = Some(Instant::now());
        self.resumed_at = Some(Duration::from_micros(at_us));
        let half = self.setup.link.pulse.least_rtt().unwrap_or_default() / 2;
        let then = Instant::now().checked_sub(half);
        let then = then.unwrap_or_else(Instant::now);
        self.setup.board.mark_at(then, Happened::Ran);
        if self.handover.as_ref().is_some_and(|h| h.stood) {
            self.setup
                .board
                .tell("the guest is at the destination, stopped as it was here");
        } else if let Some(stopped) = self.stopped {
            let blackout = stopped.elapsed().saturating_sub(half);
            self.blackout = Some(blackout);
            let ms = blackout.as_secs_f64() * 1e3;
            self.setup.board.update(|view| view.blackout_ms = Some(ms));
            self.setup.board.tell(format!(
                "the guest runs at the destination; blackout {ms:.0} ms"
            ));
        }
    }

    async fn ram_event(&mut self, event: RamEvent) {
        match event {
            RamEvent::Layout(_) => {}
            RamEvent::RoundDone { n, pages } => {
                tracing::debug!(round = n, pages, "a pass over RAM is done");
                self.collected = true;
            }
            RamEvent::StoppedByItself => {
                self.setup
                    .board
                    .tell("QEMU stopped the guest by itself; switching over now");
                self.may_switch = true;
                self.collected = true;
                self.event(SourceEvent::Switch);
            }
            RamEvent::Failed(error) => {
                if self.switch.can_cancel() {
                    self.fail(ErrorCode::Qemu, format!("QEMU's migration failed: {error}"));
                } else {
                    self.setup.board.tell(format!("the source's QEMU: {error}"));
                }
            }
        }
    }

    /// Time has passed: figures, and decisions that hang on it.
    async fn sample(&mut self) {
        self.figures();
        let patience = match self.has_disks_out() {
            true => PATIENCE_WITH_DISKS,
            false => PATIENCE_BEFORE_GRANT,
        };
        if let Some(since) = self.down_since {
            if self.over.is_none() && self.switch.can_cancel() && since.elapsed() > patience {
                self.fail(
                    ErrorCode::PeerUnreachable,
                    format!(
                        "the destination has been out of reach for {} s",
                        patience.as_secs()
                    ),
                );
            } else if self.switch.is_unanswered()
                && self.switch.phase() == Phase::Cancel
                && since.elapsed() > PATIENCE_BEFORE_GRANT
            {
                // It cleans up by itself when it asks, or when its daemon restarts.
                self.setup
                    .board
                    .tell("the destination could not be told of the cancel; it will find out");
                self.switch = Source::new(self.setup.runtime.epoch);
            }
        }
        if self.switch.phase() != Phase::Copy {
            return;
        }
        let disks_are_ahead = self.step_disks().await;
        if disks_are_ahead && self.ram.is_none() {
            self.start_ram().await;
        }
        if !self.layout_taken || !self.collected {
            return;
        }
        let all_ahead = self.step_ahead().await;
        let precopied = self.ram_mode == RamMode::Precopy && self.step_precopy();
        if !self.may_switch {
            self.setup.board.state(MigrationState::Held);
            return;
        }
        if self.ram_mode == RamMode::Precopy && !precopied {
            return;
        }
        // The guest must not stop for a link that is away.
        if all_ahead && self.setup.link.pulse.is_alive() {
            self.event(SourceEvent::Switch);
        }
    }

    fn figures(&mut self) {
        let flow = &self.setup.flow;
        let before_grant = self.switch.can_cancel();
        let view_spaces = report::spaces(flow, &self.fares, before_grant);
        let mut done = 0;
        let mut total = 0;
        for (n, space) in view_spaces.iter().enumerate() {
            let tally = flow.tally(SpaceId(n as u16));
            let spared = tally.forgotten + tally.alike;
            total += space.units_live;
            done += (space.units_sent + spared).min(space.units_live);
        }
        let (sent, codecs) = (report::sent_bytes(flow), report::codecs(flow));
        let deltas = report::deltas(flow);
        let demands = report::demands(&self.fares);
        let rtt = self.setup.link.pulse.rtt();
        let alive = self.setup.link.pulse.is_alive();
        let held_to = self.setup.easing.held_to().map(|bytes| bytes * 8);
        self.setup.board.update(|view| {
            view.push_held_to = held_to;
            view.spaces = view_spaces;
            view.sent = sent;
            view.codecs = codecs;
            view.deltas = deltas;
            view.demands = demands;
            view.link.rtt_ms = rtt.map(|r| r.as_secs_f64() * 1e3);
            if view.link.connected && !alive {
                view.link.waiting_for = Some("nothing heard from the peer lately".to_string());
            } else if view.link.connected {
                view.link.waiting_for = None;
            }
        });
        if !before_grant
            || self.ram_mode == RamMode::Precopy
            || self.ahead.is_some()
            || self.has_disks_out()
        {
            self.setup.board.sample(
                done * whimbrel_engine::space::UNIT,
                total * whimbrel_engine::space::UNIT,
            );
        }
    }

    async fn perform(&mut self, action: Action) {
        match action {
            Action::Journal(record) => self.journal(record),
            Action::Send(say) => self.say(say).await,
            Action::StartCopy => self.start_copy().await,
            Action::StopGuest => self.stop_guest().await,
            Action::KeepGuest { epoch } => self.keep_guest(epoch).await,
            Action::Drain => self.setup.flow.open(),
            Action::Finish(phase) => self.finish(phase).await,
            Action::MakeReady
            | Action::RunGuest { .. }
            | Action::Inspect
            | Action::CleanUp
            | Action::EndGuest => {
                unreachable!("only a destination's state machine asks for {action:?}")
            }
        }
    }

    fn journal(&mut self, record: Record) {
        let appended = tokio::task::block_in_place(|| self.setup.journal.append(record));
        let Err(error) = appended else { return };
        tracing::error!(%error, "the migration's journal cannot be written");
        match record {
            Record::Started { .. } | Record::Granted { .. } => {
                // Not durable, so not said and not acted on: the guest stays.
                self.todo.clear();
                self.failure = Some(
                    ApiError::new(ErrorCode::StorageFull, error.to_string())
                        .next_step("make room in the state directory and migrate again"),
                );
                self.switch = Source::new(self.setup.runtime.epoch);
                self.event(SourceEvent::Failed);
            }
            // The operator's word, and nobody will say it again: not durable, so not acted on.
            Record::AskedBack { .. } | Record::Kept { .. } if self.taken_back_untold() => {
                self.todo.clear();
                self.taken_back = false;
                (self.switch, _) = Source::recover(self.setup.journal.records());
                self.setup.board.tell(format!(
                    "the machine is not taken back, since that could not be written down: {error}"
                ));
            }
            // What these say can be learned again from the peer, or holds by default.
            _ => self
                .setup
                .board
                .tell(format!("the journal could not be written: {error}")),
        }
    }

    /// Whether what is to be written next rests on the operator's word alone.
    fn taken_back_untold(&self) -> bool {
        self.taken_back && (self.switch.is_asking_back() || self.switch.is_unanswered())
    }

    async fn say(&mut self, say: Say) {
        let message = match say {
            Say::Prepare { epoch } => self.prepare(epoch).await,
            Say::Grant { epoch } => return self.say_grant(epoch).await,
            say => Message::Own {
                say,
                why: self.failure.as_ref().map(|f| f.what.clone()),
            },
        };
        self.setup.link.mouth.say(message).await;
    }

    async fn prepare(&self, epoch: Epoch) -> Message {
        let mut disks = Vec::new();
        for disk in &self.setup.disks {
            let volume = disk
                .name()
                .parse()
                .ok()
                .and_then(|name| self.setup.host.state.volume(&name).ok());
            disks.push(DiskOffer {
                volume: disk.name().to_string(),
                uuid: volume.map(|v| v.uuid.to_string()).unwrap_or_default(),
                size: disk.size(),
                allocated: disk.file().allocated().await.unwrap_or(disk.size()),
            });
        }
        Message::Prepare(Box::new(Prepare {
            epoch,
            machine: self.setup.spec.name.to_string(),
            definition: toml::to_string(&self.setup.spec)
                .expect("a description that was read from TOML can be written as TOML"),
            machine_type: self
                .setup
                .runtime
                .process
                .as_ref()
                .map(|p| p.machine_type.clone())
                .unwrap_or_default(),
            qemu_version: self.setup.qmp.as_ref().map_or_else(String::new, |qmp| {
                let version = qmp.version();
                format!("{}.{}.{}", version.major, version.minor, version.micro)
            }),
            disks,
            ram: self.setup.ram,
        }))
    }

    async fn say_grant(&mut self, epoch: Epoch) {
        let Some(handover) = &self.handover else {
            return;
        };
        let packed = pack(&handover.device_state);
        self.say_stale().await;
        let mouth = self.setup.link.mouth.clone();
        let mut parts = packed.chunks(STATE_PART).peekable();
        let mut before = 0;
        while let Some(part) = parts.next() {
            if parts.peek().is_some() {
                before += part.len() as u32;
                mouth.say(Message::StatePart(part.to_vec())).await;
            } else {
                mouth
                    .say(Message::Grant(Grant {
                        epoch,
                        parts_len: before,
                        state: part.to_vec(),
                    }))
                    .await;
            }
        }
        self.setup.board.mark(Happened::Granted);
        self.setup.flow.open();
        self.after_grant().await;
    }

    /// RAM waits for the disks that go ahead: a copy of it takes memory here, and would be old by then.
    async fn start_copy(&mut self) {
        if self.may_send_disks() {
            self.begin_disks().await;
        } else {
            self.start_ram().await;
        }
    }

    /// QEMU starts to send its memory here.
    async fn start_ram(&mut self) {
        let options = SourceOptions::new(self.ram_socket());
        let Some(qmp) = self.setup.qmp.clone() else {
            return self.fail(ErrorCode::Qemu, "the source's QEMU is gone");
        };
        match RamSource::start(qmp, options).await {
            Ok((ram, events)) => {
                let infos = spaces::ram(self.setup.disks.len(), ram.layout());
                for (block, info) in infos.enumerate() {
                    let ram = RamContent::Store(ram.store().clone());
                    self.setup.flow.add(info, Content::Ram { ram, block });
                }
                if let Err(error) = save_layout(&self.folder(), ram.layout()) {
                    // Only a restarted daemon would miss it.
                    tracing::warn!(%error, "the layout of RAM cannot be kept");
                }
                self.ram_sent_limit = precopy::MOST * ram.layout().total_bytes();
                self.ram = Some(ram);
                self.ram_events = Some(events);
                self.say_layout().await;
            }
            Err(error) => self.fail(
                ErrorCode::Qemu,
                format!("the source's QEMU does not hand out its memory: {error}"),
            ),
        }
    }

    async fn say_layout(&self) {
        let Some(ram) = &self.ram else { return };
        let layout = ram.layout();
        let blocks = layout.blocks.iter().map(|b| LayoutBlock {
            name: b.name.clone(),
            len: b.len,
            page_size: b.page_size,
        });
        let message = Message::Layout(Layout {
            configuration: layout.configuration.clone(),
            ram_section: layout.ram_section,
            ram_instance: layout.ram_instance,
            blocks: blocks.collect(),
        });
        self.setup.link.mouth.say(message).await;
    }

    /// Where QEMU is to send its memory.
    fn ram_socket(&self) -> PathBuf {
        let state = &self.setup.host.state;
        ram_out_socket(&state.machine_folder(&self.setup.machine.name))
    }

    fn ram_space(&self, block: usize) -> SpaceId {
        spaces::ram_id(self.setup.disks.len(), block)
    }
}

async fn next_ram_event(events: &mut Option<mpsc::Receiver<RamEvent>>) -> RamEvent {
    loop {
        match events {
            Some(receiver) => match receiver.recv().await {
                Some(event) => return event,
                None => *events = None,
            },
            None => std::future::pending::<()>().await,
        }
    }
}
