//! The source's driver: performs what the engine's [`Source`] decides.
//!
//! One task a migration. It takes events (the link's, QEMU's, the operator's), asks the state machine, and
//! performs the actions in order. The stop is the one stretch where every millisecond is the guest's:
//! between QEMU's STOP and the grant on its way to the peer lie only the hand-over itself, bitmaps and
//! one durable line in the journal.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, SpaceInfo, SpaceKind};
use whimbrel_engine::switchover::{Action, Epoch, Phase, Record, Say, Source, SourceEvent};
use whimbrel_peer::pace::Pace;
use whimbrel_qemu::info::ring_pages;
use whimbrel_qemu::qmp::Qmp;
use whimbrel_qemu::source::{Handover, RamSource, SourceEvent as RamEvent, SourceOptions};
use whimbrel_wire::message::{
    DiskOffer, Fares, Grant, Layout, LayoutBlock, MAX_BITMAP_UNITS, Message, Prepare, RamMode,
    pack, pack_bitmap,
};

use super::board::Board;
use super::departure::Departure;
use super::flow::{Content, Flow};
use super::lane::{LaneError, LinkEvent};
use super::record::MigrationJournal;
use super::report;
use crate::api::error::{ApiError, ErrorCode};
use crate::api::types::MigrationState;
use crate::disk::{Disk, Mode};
use crate::host::Host;
use crate::machines::Machine;
use crate::state::{MachineRuntime, MachineSpec, Ownership, Timestamp};

/// Bytes of packed device state in one message.
const STATE_PART: usize = 768 << 10;

/// How long an unreachable destination is waited for before the grant. The guest runs meanwhile, so
/// there is no hurry; but nobody should find a forgotten migration in the morning.
const PATIENCE_BEFORE_GRANT: Duration = Duration::from_secs(60);

/// How long the stop may take in pre-copy, when the last pages must cross the link first.
const PATIENCE_IN_STOP: Duration = Duration::from_secs(30);

/// Grain in which arriving stale pages are noticed.
const STALE_POLL: Duration = Duration::from_millis(4);

/// How often figures are gathered.
const SAMPLE: Duration = Duration::from_millis(200);

/// Pre-copy of RAM is stopped when what is left would cross in this time...
const PRECOPY_REST: Duration = Duration::from_millis(300);
/// ...or when this many times the guest's memory was sent: it will not get better, and must end.
const PRECOPY_MOST: u64 = 3;

/// What an operator may tell a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the hold.
    Switch,
    Cancel,
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
    pub commands: mpsc::Receiver<Command>,
    pub spec: MachineSpec,
    pub runtime: MachineRuntime,
    pub qmp: Qmp,
    pub disks: Vec<Arc<Disk>>,
    pub ram: RamMode,
    pub hold: bool,
    pub ram_changes: watch::Sender<bool>,
    /// Where QEMU is to send its memory.
    pub ram_socket: std::path::PathBuf,
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
    /// The first full pass over RAM is in this daemon's memory.
    collected: bool,
    may_switch: bool,
    link_up: bool,
    down_since: Option<Instant>,
    outage: Duration,
    cancelled: bool,
    failure: Option<ApiError>,
    refusal: Option<String>,
    ram_taken: bool,
    empties_said: Vec<SpaceId>,
    tasks: Vec<AbortOnDropHandle<()>>,
    fares: Fares,
    blackout: Option<Duration>,
    stopped_at: Option<Duration>,
    resumed_at: Option<Duration>,
    ran: Option<Instant>,
    over: Option<Phase>,
    ram_sent_limit: u64,
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
            collected: false,
            may_switch,
            link_up: false,
            down_since: None,
            outage: Duration::ZERO,
            cancelled: false,
            failure: None,
            refusal: None,
            ram_taken: false,
            empties_said: Vec::new(),
            tasks: Vec::new(),
            fares: Fares::default(),
            blackout: None,
            stopped_at: None,
            resumed_at: None,
            ran: None,
            over: None,
            ram_sent_limit: 0,
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
        for (n, disk) in self.setup.disks.iter().enumerate() {
            let info = SpaceInfo {
                id: SpaceId(n as u16),
                kind: SpaceKind::Disk,
                name: disk.name().to_string(),
                len: disk.size(),
            };
            let units = info.units();
            self.setup
                .flow
                .add(info, Content::Disk(disk.file().clone()));
            // Until the disk is frozen and looked through, nobody can say what of it is empty.
            self.setup.flow.change(|out| {
                out.offer_withheld(SpaceId(n as u16), Extent::new(0, units));
            });
        }
        self.event(SourceEvent::Start);
        let mut sample = tokio::time::interval(SAMPLE);
        loop {
            while let Some(action) = self.todo.pop_front() {
                self.perform(action).await;
            }
            self.setup.board.phase(self.switch.phase());
            if self.over.is_some() && !self.switch.cancel_is_unanswered() {
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
        tracing::info!(migration = %self.board().view().id, "session over");
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
                self.event(SourceEvent::LinkUp);
                for space in std::mem::take(&mut self.empties_said) {
                    self.say_empty(space).await;
                }
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
                self.down_since.get_or_insert_with(Instant::now);
                let waiting = error.to_string();
                self.setup.board.link(|link| {
                    link.connected = false;
                    link.waiting_for = Some(waiting);
                });
            }
            LinkEvent::Dead(error) => self.dead(&error),
            LinkEvent::Heard(message) => self.message(*message).await,
        }
    }

    /// The peer refuses for good: its key changed, it does not trust this host any more.
    fn dead(&mut self, error: &LaneError) {
        self.link_up = false;
        if self.over.is_some() {
            // A cancelled migration need not wait for a peer that turns us away: it cleans up by itself.
            self.switch = Source::new(self.setup.runtime.epoch);
            return;
        }
        let what = format!("the destination turns this host away: {error}");
        if self.switch.can_cancel() {
            self.fail(ErrorCode::PeerRefused, what);
        } else {
            self.setup.board.fail(
                MigrationState::NeedsOperator,
                ApiError::new(ErrorCode::NeedsOperator, what)
                    .machine_state(self.machine_state())
                    .next_step("restore the trust between the hosts; the migration then goes on"),
            );
        }
    }

    fn machine_state(&self) -> String {
        match self.switch.phase() {
            Phase::Prepare | Phase::Copy | Phase::Cancel | Phase::Rewind => {
                "the machine runs here as before".to_string()
            }
            Phase::Quiesce => "the machine is stopped here and will be resumed".to_string(),
            Phase::Grant => {
                "the machine is paused here; the destination has not said whether it runs it"
                    .to_string()
            }
            _ => format!("the machine belongs to {}", self.board().view().peer),
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
            Message::RamTaken => self.ram_taken = true,
            Message::Fares(fares) => self.fares = fares,
            other => {
                tracing::warn!(?other, "a message that has no place at a source is ignored");
            }
        }
    }

    fn ran_at(&mut self, at_us: u64) {
        self.ran = Some(Instant::now());
        self.resumed_at = Some(Duration::from_micros(at_us));
        let half = self.setup.link.pulse.least_rtt().unwrap_or_default() / 2;
        if let Some(stopped) = self.stopped {
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
        if let Some(since) = self.down_since {
            if self.over.is_none()
                && self.switch.can_cancel()
                && since.elapsed() > PATIENCE_BEFORE_GRANT
            {
                self.fail(
                    ErrorCode::PeerUnreachable,
                    format!(
                        "the destination has been out of reach for {} s",
                        PATIENCE_BEFORE_GRANT.as_secs()
                    ),
                );
            } else if self.over.is_some() && since.elapsed() > PATIENCE_BEFORE_GRANT {
                // It cleans up by itself when it asks, or when its daemon restarts.
                self.setup
                    .board
                    .tell("the destination could not be told of the cancel; it will find out");
                self.switch = Source::new(self.setup.runtime.epoch);
            }
        }
        if self.switch.phase() != Phase::Copy || !self.layout_taken || !self.collected {
            return;
        }
        if !self.may_switch {
            self.setup.board.state(MigrationState::Held);
            return;
        }
        if self.ram_mode == RamMode::Precopy {
            self.refresh_precopy();
            if !self.precopy_may_stop() {
                return;
            }
        }
        // The guest must not stop for a link that is away.
        if self.setup.link.pulse.is_alive() {
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
            let forgotten = flow.tally(SpaceId(n as u16)).forgotten;
            total += space.units_live;
            done += (space.units_sent + forgotten).min(space.units_live);
        }
        let sent = report::sent_bytes(flow);
        let demands = report::demands(&self.fares);
        let rtt = self.setup.link.pulse.rtt();
        let alive = self.setup.link.pulse.is_alive();
        self.setup.board.update(|view| {
            view.spaces = view_spaces;
            view.sent = sent;
            view.demands = demands;
            view.link.rtt_ms = rtt.map(|r| r.as_secs_f64() * 1e3);
            if view.link.connected && !alive {
                view.link.waiting_for = Some("nothing heard from the peer lately".to_string());
            } else if view.link.connected {
                view.link.waiting_for = None;
            }
        });
        if !before_grant || self.ram_mode == RamMode::Precopy {
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
            Action::MakeReady | Action::RunGuest { .. } | Action::Inspect | Action::CleanUp => {
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
            // What these say can be learned again from the peer, or holds by default.
            _ => self
                .setup
                .board
                .tell(format!("the journal could not be written: {error}")),
        }
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
        let version = self.setup.qmp.version();
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
            qemu_version: format!("{}.{}.{}", version.major, version.minor, version.micro),
            disks,
            ram: self.setup.ram,
        }))
    }

    async fn say_grant(&mut self, epoch: Epoch) {
        let Some(handover) = &self.handover else {
            return;
        };
        let packed = pack(&handover.device_state);
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
        self.setup.flow.open();
        self.after_grant().await;
    }

    /// QEMU starts to send its memory here.
    async fn start_copy(&mut self) {
        let options = SourceOptions::new(self.setup.ram_socket.clone());
        match RamSource::start(self.setup.qmp.clone(), options).await {
            Ok((ram, events)) => {
                let first = self.setup.disks.len();
                for (block, b) in ram.layout().blocks.iter().enumerate() {
                    let info = SpaceInfo {
                        id: SpaceId((first + block) as u16),
                        kind: SpaceKind::Ram,
                        name: b.name.clone(),
                        len: b.len,
                    };
                    let store = ram.store().clone();
                    self.setup.flow.add(info, Content::Ram { store, block });
                }
                self.ram_sent_limit = PRECOPY_MOST * ram.layout().total_bytes();
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

    fn ram_space(&self, block: usize) -> SpaceId {
        SpaceId((self.setup.disks.len() + block) as u16)
    }

    // ---- pre-copy of RAM ----

    fn begin_precopy(&mut self) {
        let Some(ram) = &self.ram else { return };
        for block in 0..ram.layout().blocks.len() {
            ram.store().take_dirtied(block);
            let zeros = ram.store().zeros(block);
            let space = self.ram_space(block);
            self.setup.flow.push_zeroes(space, zeros.runs());
            let held = ram.store().held(block);
            self.setup.flow.change(|out| out.offer_set(space, &held));
        }
        self.setup.flow.open();
    }

    /// Offers what QEMU sent again since the last look, or for the first time.
    fn refresh_precopy(&self) {
        let Some(ram) = &self.ram else { return };
        for block in 0..ram.layout().blocks.len() {
            let dirtied = ram.store().take_dirtied(block);
            let space = self.ram_space(block);
            self.setup.flow.change(|out| out.offer_set(space, &dirtied));
        }
    }

    fn ram_pending_bytes(&self) -> u64 {
        let blocks = self.ram.as_ref().map_or(0, |r| r.layout().blocks.len());
        (0..blocks)
            .map(|b| self.setup.flow.tally(self.ram_space(b)).pending)
            .sum::<u64>()
            * whimbrel_engine::space::UNIT
    }

    fn precopy_may_stop(&self) -> bool {
        let blocks = self.ram.as_ref().map_or(0, |r| r.layout().blocks.len());
        let sent: u64 = (0..blocks)
            .map(|b| self.setup.flow.sent(self.ram_space(b)).bytes())
            .sum();
        let rate = self.board().view().rate / 8;
        let rest = self.ram_pending_bytes();
        rest <= (rate as f64 * PRECOPY_REST.as_secs_f64()) as u64 || sent > self.ram_sent_limit
    }

    /// With the guest stopped: the last pages cross, and the destination says that it has them all.
    async fn finish_precopy(&mut self, handover: &Handover) -> Result<(), String> {
        let until = tokio::time::Instant::now() + PATIENCE_IN_STOP;
        if let Some(ram) = &self.ram {
            ram.drained().await.map_err(|e| e.to_string())?;
        }
        self.refresh_precopy();
        if let Some(ram) = &self.ram {
            for (block, stale) in handover.stale.iter().enumerate() {
                let space = self.ram_space(block);
                debug_assert!(ram.store().stale(block).is_empty());
                self.setup.flow.change(|out| out.offer_set(space, stale));
            }
        }
        while self.ram_pending_bytes() > 0 || !self.setup.flow.zeroes_are_pushed() {
            self.step_of_stop(until).await?;
        }
        let frames = self.setup.flow.frames();
        self.setup.link.mouth.say(Message::RamEnd { frames }).await;
        while !self.ram_taken {
            self.step_of_stop(until).await?;
        }
        Ok(())
    }

    /// Hears what the peer says while the guest is stopped, and gives up when that is wiser.
    async fn step_of_stop(&mut self, until: tokio::time::Instant) -> Result<(), String> {
        tokio::select! {
            event = self.setup.link.events.recv() => match event {
                Some(LinkEvent::Heard(message)) if *message == Message::RamTaken => {
                    self.ram_taken = true;
                }
                Some(LinkEvent::Heard(_)) | Some(LinkEvent::Up) => {}
                Some(LinkEvent::Down(error)) | Some(LinkEvent::Dead(error)) => {
                    self.link_up = false;
                    self.down_since = Some(Instant::now());
                    return Err(format!("the link broke during the stop: {error}"));
                }
                None => return Err("the session ended during the stop".to_string()),
            },
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
        if tokio::time::Instant::now() > until {
            return Err(format!(
                "the last pages did not cross within {} s",
                PATIENCE_IN_STOP.as_secs()
            ));
        }
        Ok(())
    }

    // ---- the stop ----

    async fn stop_guest(&mut self) {
        // The flush that QEMU makes at the stop is short if little is left to flush.
        for disk in &self.setup.disks {
            if let Err(error) = disk.file().sync().await {
                return self.fail(
                    ErrorCode::Io,
                    format!("the disk cannot be made durable: {error}"),
                );
            }
        }
        // Asked while the guest runs: rings are where they are, whatever is in them.
        let rings = match &self.ram {
            Some(ram) => ring_pages(&self.setup.qmp, ram.layout()).await,
            None => return self.fail(ErrorCode::Internal, "the stop came before the copy"),
        };
        let rings = rings.unwrap_or_else(|error| {
            tracing::warn!(%error, "rings are unknown; the destination will demand them one by one");
            Vec::new()
        });
        let Some(ram) = &self.ram else { return };
        let handover = match ram.stop().await {
            Ok(handover) => handover,
            Err(error) => {
                return self.fail(
                    ErrorCode::Qemu,
                    format!("the guest could not be stopped: {error}"),
                );
            }
        };
        self.stopped = Some(Instant::now());
        self.stopped_at = Some(handover.stopped_at_qemu);
        let _ = self.setup.ram_changes.send(false);
        for disk in &self.setup.disks {
            disk.set_mode(Mode::Frozen).await;
        }
        if self.ram_mode == RamMode::Precopy {
            if let Err(what) = self.finish_precopy(&handover).await {
                self.handover = Some(handover);
                return self.fail(ErrorCode::PeerUnreachable, what);
            }
        } else {
            self.offer_ram(&handover, &rings);
        }
        self.handover = Some(handover);
        self.event(SourceEvent::Stopped);
    }

    /// All of RAM is offered: at once what is current, later what QEMU still delivers. Rings first.
    fn offer_ram(&self, handover: &Handover, rings: &[UnitSet]) {
        let Some(ram) = &self.ram else { return };
        for (block, stale) in handover.stale.iter().enumerate() {
            let space = self.ram_space(block);
            let mut live = ram.store().held(block);
            live.union_with(stale);
            self.setup.flow.change(|out| {
                out.offer_set(space, &live);
                out.set_withheld(space, stale);
                for run in rings.get(block).into_iter().flat_map(UnitSet::runs) {
                    out.demand(space, run);
                }
                // What the guest wrote last it will want first.
                for run in stale.runs() {
                    out.prefer(space, run);
                }
            });
        }
    }

    /// With the grant on its way there is time for the rest: pages that QEMU still delivers, and what of
    /// the disks has content at all.
    async fn after_grant(&mut self) {
        if !self.tasks.is_empty() {
            return;
        }
        if let Some(ram) = &self.ram {
            let (store, flow) = (ram.store().clone(), self.setup.flow.clone());
            let blocks = ram.layout().blocks.len();
            let first = self.setup.disks.len();
            let task = tokio::spawn(async move {
                loop {
                    let left = follow_stale(&store, &flow, first, blocks);
                    if left == 0 {
                        return;
                    }
                    tokio::time::sleep(STALE_POLL).await;
                }
            });
            self.tasks.push(AbortOnDropHandle::new(task));
        }
        for n in 0..self.setup.disks.len() {
            if let Err(error) = self.look_through(n).await {
                // Everything is offered then: holes are sent as zeroes, which is slow and right.
                self.setup.board.tell(format!(
                    "disk {}: holes cannot be found ({error}); all of it is sent",
                    self.setup.disks[n].name()
                ));
                let units = self.setup.flow.units_of(SpaceId(n as u16)).unwrap_or(0);
                self.setup
                    .flow
                    .change(|out| out.ready(SpaceId(n as u16), Extent::new(0, units)));
            }
            self.say_empty(SpaceId(n as u16)).await;
        }
        if self.ram_mode == RamMode::Precopy {
            // Its zeroes went the way of its content.
            return;
        }
        let blocks = self.ram.as_ref().map_or(0, |r| r.layout().blocks.len());
        for block in 0..blocks {
            self.say_empty(self.ram_space(block)).await;
        }
    }

    /// Finds the disk's holes: only what has content is sent.
    async fn look_through(&self, n: usize) -> Result<(), whimbrel_volume::VolumeError> {
        let (disk, space) = (&self.setup.disks[n], SpaceId(n as u16));
        let units = disk.size().div_ceil(whimbrel_engine::space::UNIT);
        let mut data = UnitSet::empty(units);
        let mut at = 0;
        while at < disk.size() {
            let runs = disk.file().data_extents(at, disk.size() - at).await?;
            for run in &runs {
                if run.data {
                    data.insert(Extent::touching(run.offset, run.len));
                }
                at = run.offset + run.len;
            }
            if runs.is_empty() {
                break;
            }
        }
        self.setup.flow.change(|out| {
            let holes: Vec<Extent> = data.gaps_within(Extent::new(0, units)).collect();
            for hole in holes {
                out.emptied(space, hole);
            }
            out.ready(space, Extent::new(0, units));
        });
        Ok(())
    }

    /// Tells the destination what of a space is empty.
    async fn say_empty(&mut self, space: SpaceId) {
        self.empties_said.push(space);
        let Some(units) = self.setup.flow.units_of(space) else {
            return;
        };
        let runs = self.setup.flow.change(|out| out.empty_runs(space));
        let mut set = UnitSet::empty(units);
        for run in runs {
            set.insert(run);
        }
        let mut first = 0;
        while first < units {
            let len = MAX_BITMAP_UNITS.min(units - first);
            let mut part = UnitSet::empty(len);
            for run in set.runs_within(Extent::new(first, len)) {
                part.insert(Extent::new(run.start - first, run.len));
            }
            if !part.is_empty() {
                let message = Message::Empty {
                    space,
                    first,
                    units: len,
                    packed: pack_bitmap(&part),
                };
                self.setup.link.mouth.say(message).await;
            }
            first += len;
        }
    }

    // ---- the ends ----

    /// The guest stays, or comes back: everything that was done to it is undone.
    async fn keep_guest(&mut self, epoch: Epoch) {
        self.tasks.clear();
        let stopped = self.handover.is_some();
        for disk in &self.setup.disks {
            disk.set_mode(Mode::Open).await;
        }
        if let Some(ram) = self.ram.take() {
            let result = if stopped {
                match ram.drained().await {
                    Ok(()) => ram.resume_at_source().await,
                    Err(error) => Err(error),
                }
            } else {
                ram.cancel().await
            };
            if let Err(error) = result {
                self.setup.board.fail(
                    MigrationState::NeedsOperator,
                    ApiError::new(
                        ErrorCode::Qemu,
                        format!("the guest was not resumed: {error}"),
                    )
                    .machine_state("owned by this host; its QEMU may be paused")
                    .next_step("look at `machine show`; `cont` on its monitor resumes it"),
                );
            }
        }
        let mut runtime = self.setup.runtime.clone();
        runtime.epoch = epoch;
        runtime.ownership = Ownership::Local;
        self.setup.machine.keep(&self.setup.host, runtime).await;
    }

    async fn finish(&mut self, phase: Phase) {
        self.over = Some(phase);
        self.figures();
        if phase == Phase::Complete {
            let report = report::outgoing(
                &self.setup.flow,
                &self.fares,
                report::Times {
                    total: self.setup.board.clock().elapsed(),
                    blackout: self.blackout,
                    drain: self.ran.map(|ran| ran.elapsed()),
                    outage: self.outage,
                    stopped_at: self.stopped_at,
                    resumed_at: self.resumed_at,
                },
                self.setup.board.view().link.reconnects,
            );
            self.setup.board.update(|view| view.report = Some(report));
            self.tasks.clear();
            self.ram = None;
            let view = self.setup.board.view();
            self.setup
                .machine
                .departed(&self.setup.host, view.id, view.peer)
                .await;
            self.setup.board.end(phase, MigrationState::Completed);
            return;
        }
        let state = if self.cancelled {
            MigrationState::Cancelled
        } else {
            MigrationState::Failed
        };
        let mut error = self.failure.take();
        if let (None, Some(why), false) = (&error, self.refusal.take(), self.cancelled) {
            error = Some(ApiError::new(
                ErrorCode::MigrationFailed,
                format!("the destination refused the machine: {why}"),
            ));
        }
        let needs_operator = self.board().view().state == MigrationState::NeedsOperator;
        if let Some(error) = error {
            let mut error = error.machine_state("the machine runs here as before");
            error
                .next_step
                .get_or_insert_with(|| "put right what the message names and migrate again".into());
            self.setup.board.fail(state, error);
        }
        let state = if needs_operator {
            MigrationState::NeedsOperator
        } else {
            state
        };
        self.setup.board.end(phase, state);
    }
}

/// Frees demands and pushes of pages that have come meanwhile; the number still to come.
fn follow_stale(
    store: &whimbrel_qemu::store::RamStore,
    flow: &Flow,
    first: usize,
    blocks: usize,
) -> u64 {
    let mut left = 0;
    for block in 0..blocks {
        let stale = store.stale(block);
        left += stale.len();
        flow.change(|out| out.set_withheld(SpaceId((first + block) as u16), &stale));
    }
    left
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
