//! A destination that an earlier daemon had left in the middle: it had accepted the machine.
//!
//! The volumes' journals say what of the disks is here, QEMU itself says what of RAM. Three things can have
//! become of the guest, and QEMU tells which: it never ran (the machine may still be refused, and is), it
//! runs and lacks memory (its post-copy has paused, and is taken up on a new socket), or it runs and lacks
//! none. If QEMU is gone, the guest ran if it was recorded as running or wrote to a disk; its memory is of
//! no use then, and its disks go on arriving. It never ran if QEMU's log ends with loading that failed. If
//! neither is known nobody but a person can tell, and the source is answered nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Pid;
use tokio_util::task::AbortOnDropHandle;
use whimbrel_engine::inflow::SpaceIn;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::SpaceInfo;
use whimbrel_engine::switchover::{Destination, DestinationEvent};
use whimbrel_qemu::launch::launched_machine;
use whimbrel_qemu::qmp::Qmp;
use whimbrel_qemu::sink::{DestinationState, PostcopySink, destination_state};
use whimbrel_qemu::stream::StreamLayout;
use whimbrel_volume::VolumeError;
use whimbrel_volume::journal::{Change, RecoveryHow};

use super::Incoming;
use crate::api::types::Happened;
use crate::disk::{Filling, Mode, Soil};
use crate::host::Host;
use crate::machine::{qmp_socket, reattach};
use crate::machines::disk_of;
use crate::migration::arrivals::{RamIn, RamSink};
use crate::migration::landing::{Landing, Plan, ReopenedVolume};
use crate::migration::record::read_layout;
use crate::migration::spaces;
use crate::state::{MachineSpec, Name, QemuProcess, Timestamp, start_ticks};

/// Time the machine's QEMU gets for all it is asked: each question has its own, shorter bound. The daemon takes
/// up one machine after the other before it serves anybody, so none may hold up all.
const PATIENCE: Duration = Duration::from_secs(90);

const SILENT: &str =
    "the machine's QEMU lives and does not answer; `whimbrel recover` says what may be done";

const NO_LAYOUT: &str =
    "what the machine's memory looks like was not kept, so its post-copy cannot be gone on with";

/// What became of the guest.
enum Guest {
    NeverRan,
    /// It lacks memory; its QEMU listens again, and holds these pages of each block.
    Lacks(Box<PostcopySink>, Requests, Vec<UnitSet>),
    /// It lacks no memory, or needs none any more.
    Whole,
}

type Requests = tokio::sync::mpsc::Receiver<whimbrel_qemu::sink::Request>;

impl Incoming {
    /// Goes on where the journal ends; what cannot be gone on with is told of, and waits for an operator.
    pub async fn take_up(&mut self, destination: Destination, plan: Plan) {
        self.switch = destination;
        self.known = true;
        self.setup.board.mark(Happened::Restarted);
        self.setup
            .board
            .tell("a restarted daemon goes on with the migration");
        let done = match tokio::time::timeout(PATIENCE, self.try_take_up(plan)).await {
            Ok(done) => done,
            Err(_) => Err(SILENT.to_string()),
        };
        if let Err(why) = done {
            // Content that waits to be stored would hold up the word that asks for the machine back.
            self.setup.arrivals.refuse();
            self.trouble(why);
        }
        self.setup.board.phase(self.switch.phase());
    }

    async fn try_take_up(&mut self, plan: Plan) -> Result<(), String> {
        let host = self.setup.host.clone();
        let spec = plan.spec.clone();
        let runtime = host.state.runtime(&spec.name).map_err(|e| e.to_string())?;
        let recorded = runtime.process.clone().filter(QemuProcess::is_alive);
        let process = recorded.or_else(|| leftover_process(&host, &spec));
        let volumes = plan.reopen(&host).await.map_err(|e| e.to_string())?;
        let mut wrote = false;
        let (mut fillings, mut disks) = (Vec::new(), Vec::new());
        for (n, mut volume) in volumes.into_iter().enumerate() {
            wrote |= !volume.recovered.guest_owned.is_empty();
            own_what_is_doubtful(&mut volume, process.is_none())
                .await
                .map_err(|e| e.to_string())?;
            let found = volume.recovered;
            let info = spaces::disk(n, volume.record.name.as_str(), volume.record.size);
            let space = SpaceIn::recovered(info, found.resident, found.guest_owned, found.partial);
            let filling = Arc::new(Filling::new(
                space,
                Soil::Trodden,
                volume.file.clone(),
                volume.journal,
                self.setup.wants.clone(),
                self.setup.board.clock(),
            ));
            let mode = Mode::Filling(filling.clone());
            disks.push(disk_of(&host, &volume.record, volume.file, mode));
            fillings.push(filling);
        }
        self.find_seeds(&plan).await;
        self.landing = Some(Landing::landed(plan));
        self.setup.arrivals.expect_disks(fillings.len());
        let ran = runtime.process.is_some() || wrote;
        let running = match process {
            Some(process) => {
                let folder = host.state.machine_folder(&spec.name);
                let running = reattach(&folder, &spec, &process, disks).await;
                Some(running.map_err(|e| format!("the machine's QEMU does not answer: {e}"))?)
            }
            None => None,
        };
        let layout = read_layout(&self.folder());
        let guest = match &running {
            Some(running) => self.guest_of(&running.qmp, layout.as_ref()).await?,
            None if ran => {
                self.setup.board.tell(
                    "the machine's process is gone, its memory with it; its disks go on arriving",
                );
                Guest::Whole
            }
            None if self
                .landing
                .as_ref()
                .is_some_and(|l| l.plan().proves_that_loading_failed(&host)) =>
            {
                self.setup.board.tell(
                    "the machine's process is gone; it wrote that its loading failed, so the guest never ran here",
                );
                Guest::NeverRan
            }
            None => {
                // What comes all the same waits at a gate that nobody opens, instead of ending its connection.
                if let Some(layout) = &layout {
                    let none = layout.blocks.iter().map(|b| UnitSet::empty(b.units()));
                    self.take_ram(
                        spaces_of(layout, fillings.len(), none.collect()),
                        RamSink::Sated,
                    );
                }
                return Err(
                    "the machine's process is gone, and whether its guest ran here is unknown"
                        .to_string(),
                );
            }
        };
        self.running = running;
        match guest {
            Guest::NeverRan => {
                // The journals go with the volumes: nobody may hold them.
                drop(fillings);
                for disk in self.running.iter().flat_map(|running| &running.disks) {
                    disk.set_mode(Mode::Frozen).await;
                }
                self.refusal = Some("its daemon was restarted before the guest ran".to_string());
                self.event(DestinationEvent::Failed);
                return Ok(());
            }
            Guest::Lacks(sink, requests, received) => {
                let layout = layout.ok_or(NO_LAYOUT)?;
                let spaces = spaces_of(&layout, fillings.len(), received);
                let ram = self.take_ram(spaces, RamSink::Postcopy(*sink));
                self.pass_requests(ram.clone(), requests);
                self.ram = Some(ram);
                self.layout = Some(layout);
            }
            Guest::Whole => {
                // The source must not send what nobody takes: all of it is said to be here.
                if let Some(layout) = layout {
                    let all = layout.blocks.iter().map(|b| UnitSet::full(b.units()));
                    let spaces = spaces_of(&layout, fillings.len(), all.collect());
                    self.take_ram(spaces, RamSink::Sated);
                }
                self.ram_done = true;
            }
        }
        self.setup.arrivals.set_disks(fillings);
        self.setup.arrivals.set_evicted();
        self.setup.arrivals.open_ram();
        self.settle().await;
        self.event(DestinationEvent::Running);
        Ok(())
    }

    async fn guest_of(&self, qmp: &Qmp, layout: Option<&StreamLayout>) -> Result<Guest, String> {
        let state = destination_state(qmp).await.map_err(|e| e.to_string())?;
        match state {
            DestinationState::NeverRan | DestinationState::LostLoading => Ok(Guest::NeverRan),
            DestinationState::Complete => Ok(Guest::Whole),
            DestinationState::Paused | DestinationState::Fed | DestinationState::Blocked => {
                let layout = layout.ok_or(NO_LAYOUT)?;
                let (sink, requests, received) =
                    PostcopySink::recover(qmp, &self.ram_socket(), layout)
                        .await
                        .map_err(|e| format!("QEMU's post-copy cannot be taken up again: {e}"))?;
                Ok(Guest::Lacks(Box::new(sink), requests, received))
            }
            other @ (DestinationState::Gone
            | DestinationState::Failed { .. }
            | DestinationState::NotIncoming { .. }) => Err(format!("the machine's QEMU: {other}")),
        }
    }

    pub(super) fn take_ram(&self, spaces: Vec<SpaceIn>, sink: RamSink) -> Arc<RamIn> {
        let (wants, clock) = (self.setup.wants.clone(), self.setup.board.clock());
        let ram = Arc::new(RamIn::new(spaces, sink, wants, clock));
        self.setup.arrivals.set_ram(ram.clone());
        ram
    }

    pub(super) fn pass_requests(&mut self, ram: Arc<RamIn>, mut requests: Requests) {
        self.requests = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            while let Some((block, extent)) = requests.recv().await {
                ram.request(block, extent);
            }
        })));
    }
}

/// Whether the guest may have written to a unit that is here while no record tells of it: its host lost power
/// with the record and, as may be, not with the write; or it died itself with a write under way.
fn is_doubtful(how: RecoveryHow, guest_gone: bool) -> bool {
    match how {
        RecoveryHow::HostRestarted { .. } => true,
        RecoveryHow::Clean | RecoveryHow::SameBoot { .. } => guest_gone,
        RecoveryHow::Complete => false,
    }
}

/// What is in doubt counts as the guest's own from now on. It is right as it is, since a write that nobody
/// was promised may be there or not; but it cannot be compared with the source.
async fn own_what_is_doubtful(
    volume: &mut ReopenedVolume,
    guest_gone: bool,
) -> Result<(), VolumeError> {
    let found = &mut volume.recovered;
    if !is_doubtful(found.how, guest_gone) {
        return Ok(());
    }
    let changes = found.resident.runs().map(Change::Written).collect();
    volume.journal.record(changes).await?;
    for run in found.resident.runs() {
        found.guest_owned.insert(run);
    }
    tracing::info!(
        volume = %volume.record.name,
        units = found.resident.len(),
        "the guest may have written here unrecorded: what arrived so far will not be compared with the source"
    );
    Ok(())
}

/// The RAM blocks as spaces that follow the disks'.
pub(super) fn spaces_of(
    layout: &StreamLayout,
    disks: usize,
    received: Vec<UnitSet>,
) -> Vec<SpaceIn> {
    let space = |(info, received): (SpaceInfo, UnitSet)| {
        let none = UnitSet::empty(info.units());
        SpaceIn::recovered(info, received, none, BTreeMap::new())
    };
    spaces::ram(disks, layout)
        .zip(received)
        .map(space)
        .collect()
}

/// The QEMU that an earlier daemon had started for a machine to arrive in. It is asked nothing: it may wait for
/// its disks or for a page of its memory, and answer nobody. Its command line tells what has to be known.
fn leftover_process(host: &Host, spec: &MachineSpec) -> Option<QemuProcess> {
    let process = leftovers(host, &spec.name).into_iter().next()?;
    let pid = u32::try_from(process.as_raw_nonzero().get()).ok()?;
    Some(QemuProcess {
        pid,
        start_ticks: start_ticks(pid)?,
        qmp: qmp_socket(&host.state.machine_folder(&spec.name)),
        machine_type: launched_machine(pid)?,
        adopted: false,
        started: Timestamp::now(),
    })
}

/// The QEMUs started for a machine to arrive in, by the monitor that they carry in their command line.
pub fn leftovers(host: &Host, name: &Name) -> Vec<Pid> {
    let socket = qmp_socket(&host.state.machine_folder(name));
    let socket = format!("path={}", socket.display());
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let found = processes.flatten().filter_map(|process| {
        let pid = process.file_name().to_str()?.parse::<i32>().ok()?;
        let line = std::fs::read(process.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line);
        let is_ours = line.contains(&socket) && line.contains("-incoming");
        is_ours.then(|| Pid::from_raw(pid)).flatten()
    });
    found.collect()
}
