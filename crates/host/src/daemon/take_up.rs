//! Taking up what an earlier daemon left: migrations that were under way, then machines that run.
//!
//! A migration's folder says all there is to know: `journal` who owns the machine, `machine`, `peer` and
//! `peer-key` who they are, `layout.json` what RAM looks like, `landing.json` (destination) what was made for it, and
//! `over` that nothing is left to do. What was granted is gone on with, on either side, whichever of the two
//! daemons died; what was not is undone.
//!
//! Migrations come first: a machine whose migration is gone on with is that migration's, and is not taken
//! up as one that merely runs.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use whimbrel_engine::switchover::{Action, Destination, Epoch, Phase, Record, Source};
use whimbrel_peer::hello::SessionId;
use whimbrel_qemu::source::take_back;

use super::{Bound, Daemon, Held, rate_of};
use crate::api::types::Direction;
use crate::api::{ApiError, ErrorCode};
use crate::disk::Mode;
use crate::machine::{ram_out_socket, reattach};
use crate::machines::{Machine, open_disks, set_volume};
use crate::migration::board::Board;
use crate::migration::departure::{Departure, Gear};
use crate::migration::easing::Easing;
use crate::migration::flow::Flow;
use crate::migration::incoming;
use crate::migration::landing::Plan;
use crate::migration::outgoing::{self, Outgoing, offer_again};
use crate::migration::record::{
    MigrationJournal, is_over, mark_over, read_bandwidth, read_compress, read_delta, read_latency,
    read_layout,
};
use crate::migration::recording::{self, Meters};
use crate::service::first_view;
use crate::state::{
    LatencyBound, MachineSpec, MigrationId, Name, Ownership, QemuProcess, StateDir, StateError,
};

fn damaged(what: impl ToString) -> ApiError {
    ApiError::new(ErrorCode::Damaged, what.to_string())
}

impl Daemon {
    /// Takes up what an earlier daemon left.
    pub(super) async fn take_up(self: &Arc<Self>) {
        let mut kept = Vec::new();
        match self.host.state.migrations() {
            Ok(listing) => {
                for id in listing.records {
                    if let Err(error) = self.take_up_migration(&id, &mut kept).await {
                        tracing::error!(migration = %id, %error, "a migration cannot be taken up");
                    }
                }
            }
            Err(error) => tracing::error!(%error, "the migrations' records cannot be listed"),
        }
        let listing = match self.host.state.machines() {
            Ok(listing) => listing,
            Err(error) => {
                tracing::error!(%error, "the machines' records cannot be listed");
                return;
            }
        };
        for error in listing.damaged {
            tracing::error!(%error, "a machine's record is damaged and left alone");
        }
        for (spec, runtime) in listing.records {
            if self.machines.get(&spec.name).is_some() {
                continue;
            }
            let name = spec.name.clone();
            let process = runtime.process.clone().filter(QemuProcess::is_alive);
            let mut running = None;
            if let (Some(process), Ownership::Local) = (process, &runtime.ownership) {
                running = match self.reattach(&spec, &process).await {
                    Ok(running) => Some(running),
                    Err(error) => {
                        tracing::error!(machine = %name, %error, "a running machine cannot be taken up");
                        None
                    }
                };
            }
            if let Some(running) = running.as_ref().filter(|_| kept.contains(&name)) {
                // Only now: a QEMU that was stopping waits for its disks, and answers nobody meanwhile.
                let socket = ram_out_socket(&self.host.state.machine_folder(&name));
                if let Err(error) = take_back(&running.qmp, &socket).await {
                    tracing::error!(machine = %name, %error, "a guest that was stopped for a migration cannot be resumed");
                }
            }
            let machine = self.machines.insert(Machine::new(spec, runtime, running));
            // One that needs an operator: whoever asks for the machine is to hear of it.
            machine.lock().await.migration = self.held_for(&name);
            machine.watch_end(&self.host).await;
        }
    }

    /// The migration of a machine among those that are told of.
    fn held_for(&self, machine: &Name) -> Option<MigrationId> {
        let migrations = self.migrations();
        let mut held = migrations.iter();
        let of = held.find(|(_, held)| held.board.view().machine == *machine);
        of.map(|(id, _)| id.clone())
    }

    async fn reattach(
        &self,
        spec: &MachineSpec,
        process: &QemuProcess,
    ) -> Result<crate::machine::Running, String> {
        let disks = open_disks(&self.host, spec)
            .await
            .map_err(|e| e.to_string())?;
        let folder = self.host.state.machine_folder(&spec.name);
        let running = reattach(&folder, spec, process, disks)
            .await
            .map_err(|e| e.to_string())?;
        tracing::info!(machine = %spec.name, pid = process.pid, "a running machine was taken up");
        Ok(running)
    }

    /// What a migration's journal says of it, and what follows. Machines whose guests are to be made to run
    /// again here are added to `kept`.
    async fn take_up_migration(
        self: &Arc<Self>,
        id: &MigrationId,
        kept: &mut Vec<Name>,
    ) -> Result<(), ApiError> {
        let folder = self.host.state.migration_folder(id);
        if is_over(&folder) {
            return Ok(());
        }
        let journal = MigrationJournal::open(&folder)?;
        match journal.records().first() {
            None => Ok(()),
            Some(Record::Preparing { .. } | Record::Refused { .. }) => {
                self.take_up_incoming(id, &folder, journal).await
            }
            Some(_) => self.take_up_outgoing(id, &folder, journal, kept).await,
        }
    }

    async fn take_up_incoming(
        self: &Arc<Self>,
        id: &MigrationId,
        folder: &Path,
        mut journal: MigrationJournal,
    ) -> Result<(), ApiError> {
        let plan = Plan::load(folder).map_err(damaged)?;
        let (destination, actions) = Destination::recover(journal.records());
        for action in actions {
            match action {
                Action::Journal(record) => journal.append(record)?,
                Action::CleanUp => {
                    if let Some(plan) = &plan {
                        for process in incoming::leftovers(&self.host, &plan.spec.name) {
                            // It waited for a machine that will not come: no guest ever ran in it.
                            let _ = rustix::process::kill_process(
                                process,
                                rustix::process::Signal::KILL,
                            );
                        }
                        plan.undo(&self.host).await;
                        Plan::forget(folder);
                        tracing::info!(migration = %id, "a migration that was not accepted was cleaned away");
                    }
                }
                Action::EndGuest => {
                    if let Some(plan) = &plan
                        && !self.yield_leftover(id, folder, plan)?
                    {
                        plan.undo(&self.host).await;
                        Plan::forget(folder);
                    }
                }
                Action::Inspect => {
                    let plan =
                        plan.ok_or_else(|| damaged("landing.json is missing from its folder"))?;
                    return self
                        .take_up_arriving(id, folder, journal, destination, plan)
                        .await;
                }
                // The source hears the answer when it asks.
                _ => {}
            }
        }
        if let (Phase::Complete, Some(plan)) = (destination.phase(), plan) {
            self.finish_arrived(id, &plan).await?;
        }
        mark_over(folder);
        Ok(())
    }

    /// The journal says that the machine is the source's again: its guest is ended here, whatever it does, and the
    /// records say so. Returns whether the machine ever was this host's by its records.
    fn yield_leftover(
        &self,
        id: &MigrationId,
        folder: &Path,
        plan: &Plan,
    ) -> Result<bool, ApiError> {
        let name = &plan.spec.name;
        for process in incoming::leftovers(&self.host, name) {
            let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
            tracing::info!(machine = %name, "a guest that was given back to its source was ended");
        }
        let mut runtime = match self.host.state.runtime(name) {
            Ok(runtime) => runtime,
            Err(StateError::NoSuch { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        match &runtime.ownership {
            Ownership::Arriving { migration } if migration == id => {}
            Ownership::Departed { migration, .. } => return Ok(migration == id),
            Ownership::Arriving { .. } | Ownership::Local => return Ok(false),
        }
        let to = Bound::load(folder, &self.host.trust)?.name;
        let state = Ownership::Departed {
            migration: id.clone(),
            to,
        };
        runtime.ownership = state.clone();
        runtime.process = None;
        self.host.state.save_runtime(name, &runtime)?;
        for disk in &plan.spec.disks {
            set_volume(&self.host, &disk.volume, runtime.epoch, state.clone());
        }
        Ok(true)
    }

    /// The journal says that all is here and compared; the records may not yet.
    async fn finish_arrived(&self, id: &MigrationId, plan: &Plan) -> Result<(), ApiError> {
        let mut runtime = self.host.state.runtime(&plan.spec.name)?;
        if !matches!(&runtime.ownership, Ownership::Arriving { migration } if migration == id) {
            return Ok(());
        }
        plan.complete(&self.host).await.map_err(damaged)?;
        runtime.ownership = Ownership::Local;
        self.host.state.save_runtime(&plan.spec.name, &runtime)?;
        Ok(())
    }

    /// A machine that this host owns and whose content was still arriving.
    async fn take_up_arriving(
        self: &Arc<Self>,
        id: &MigrationId,
        folder: &Path,
        journal: MigrationJournal,
        destination: Destination,
        plan: Plan,
    ) -> Result<(), ApiError> {
        let peer = Bound::load(folder, &self.host.trust)?;
        let session = session_of(id)?;
        let name = plan.spec.name.clone();
        let view = first_view(id.clone(), name, peer.name.clone(), Direction::Incoming);
        let board = Arc::new(Board::new(view));
        let (mut incoming, door) = self.incoming(board.clone(), journal);
        recording::keep(&self.host.state, board.clone(), incoming.meters());
        incoming.take_up(destination, plan).await;
        self.hold(id.clone(), Held::incoming(board));
        // Only now: the source must not meet a half-made session.
        self.let_in(session, peer, door, incoming);
        Ok(())
    }

    async fn take_up_outgoing(
        self: &Arc<Self>,
        id: &MigrationId,
        folder: &Path,
        mut journal: MigrationJournal,
        kept: &mut Vec<Name>,
    ) -> Result<(), ApiError> {
        let (source, actions) = Source::recover(journal.records());
        for action in actions {
            match action {
                Action::Journal(record) => journal.append(record)?,
                Action::KeepGuest { epoch } => {
                    tracing::info!(migration = %id, %epoch, "an unfinished migration away from here is off");
                    kept.extend(self.keep_leftover(id, folder, epoch)?);
                }
                _ => {}
            }
        }
        if source.may_run() {
            if source.is_unanswered() {
                return self.tell_of_the_end(id, folder, journal, source);
            }
            mark_over(folder);
            return Ok(());
        }
        self.mark_granted(id, folder, &journal)?;
        self.take_up_granted(id, folder, journal, source).await
    }

    /// The move is off, and the destination may still wait for the machine, or own it in its own eyes: it is
    /// told, if it can be reached. One that waits gives up by itself; one that was given the machine and is lost
    /// is told whenever it comes back.
    fn tell_of_the_end(
        &self,
        id: &MigrationId,
        folder: &Path,
        journal: MigrationJournal,
        source: Source,
    ) -> Result<(), ApiError> {
        let name = named::<Name>(folder, "machine")?;
        let spec = self.host.state.machine(&name)?;
        let runtime = self.host.state.runtime(&name)?;
        let peer = Bound::load(folder, &self.host.trust)?;
        let view = first_view(id.clone(), name, peer.name.clone(), Direction::Outgoing);
        let (flow, pace) = (Arc::<Flow>::default(), self.host.pace.clone());
        // Nothing is pushed.
        let easing = Arc::new(Easing::new(LatencyBound(None)));
        let (ram_changes, changes) = watch::channel(false);
        let gear = Gear {
            dialler: self.dialler(peer, session_of(id)?),
            flow: flow.clone(),
            pace: pace.clone(),
            pushes: 0,
            easing: easing.clone(),
            taken_up: true,
            compress: view.compress,
            delta: false,
            ram_changes: changes,
        };
        // Nobody commands a move that is off.
        let (_, commands) = mpsc::channel(1);
        let setup = outgoing::Setup {
            host: self.host.clone(),
            // Not the one that runs: nothing is done to the machine any more.
            machine: Arc::new(Machine::new(spec.clone(), runtime.clone(), None)),
            board: Arc::new(Board::new(view)),
            journal,
            link: Departure::redial(gear),
            flow,
            pace,
            easing,
            commands,
            spec,
            runtime,
            qmp: None,
            disks: Vec::new(),
            ram: whimbrel_wire::message::RamMode::Postcopy,
            ahead: false,
            disks_ahead: false,
            ram_order: Default::default(),
            hold: false,
            ram_changes,
        };
        tokio::spawn(Outgoing::take_up(setup, source).run());
        Ok(())
    }

    /// A machine that was promised away is not this host's to run, whatever its record still says.
    fn mark_granted(
        &self,
        id: &MigrationId,
        folder: &Path,
        journal: &MigrationJournal,
    ) -> Result<(), ApiError> {
        let name = named::<Name>(folder, "machine")?;
        let to = Bound::load(folder, &self.host.trust)?.name;
        let mut runtime = self.host.state.runtime(&name)?;
        if runtime.ownership == Ownership::Local && runtime.epoch <= granted_from(journal) {
            runtime.ownership = Ownership::Departed {
                migration: id.clone(),
                to,
            };
            self.host.state.save_runtime(&name, &runtime)?;
        }
        Ok(())
    }

    /// Goes on with a migration that was granted: the source is asked for what has not arrived, or takes
    /// the machine back if the destination never accepted it.
    async fn take_up_granted(
        self: &Arc<Self>,
        id: &MigrationId,
        folder: &Path,
        journal: MigrationJournal,
        source: Source,
    ) -> Result<(), ApiError> {
        let name = named::<Name>(folder, "machine")?;
        let peer = Bound::load(folder, &self.host.trust)?;
        let session = session_of(id)?;
        let spec = self.host.state.machine(&name)?;
        let mut runtime = self.host.state.runtime(&name)?;
        if !matches!(&runtime.ownership, Ownership::Departed { migration, .. } if migration == id) {
            // It came back since, or an operator took it back.
            mark_over(folder);
            return Ok(());
        }
        // What is complete needs nothing from here any more.
        let (disks, layout) = if source.phase() == Phase::Complete {
            (Vec::new(), None)
        } else {
            (open_disks(&self.host, &spec).await?, read_layout(folder))
        };
        for disk in &disks {
            disk.set_mode(Mode::Frozen).await;
        }
        let mut running = None;
        if let Some(process) = runtime.process.clone().filter(QemuProcess::is_alive) {
            let folder = self.host.state.machine_folder(&name);
            running = match reattach(&folder, &spec, &process, disks.clone()).await {
                Ok(running) => Some(running),
                Err(error) => {
                    tracing::error!(machine = %name, %error, "the paused QEMU of a machine that moves away cannot be taken up");
                    None
                }
            };
        }
        let qmp = running.as_ref().map(|running| running.qmp.clone());
        let pid = running.as_ref().map(|running| running.process.pid);
        // What the epoch was when it was promised; `departed` goes on from it.
        runtime.epoch = granted_from(&journal);
        let standing = Machine::new(spec.clone(), runtime.clone(), running);
        let machine = self.machines.insert(standing);
        machine.watch_end(&self.host).await;
        machine.lock().await.migration = Some(id.clone());
        let to = peer.name.clone();
        let mut view = first_view(id.clone(), name.clone(), to, Direction::Outgoing);
        view.bandwidth = read_bandwidth(folder);
        let easing = Arc::new(Easing::new(read_latency(folder)));
        let compress = read_compress(folder);
        view.compress = compress;
        view.delta = read_delta(folder);
        let pace = self.host.pace.under(rate_of(view.bandwidth));
        let board = Arc::new(Board::new(view));
        board.phase(source.phase());
        let (commands, queue) = mpsc::channel(8);
        let held = Held {
            board: board.clone(),
            commands: Some(commands),
            pace: Some(pace.clone()),
        };
        self.hold(id.clone(), held);
        tracing::info!(migration = %id, machine = %name, phase = %source.phase(), "a migration away from here is gone on with");
        let (host, dialler) = (self.host.clone(), self.dialler(peer, session));
        tokio::spawn(async move {
            let flow = Arc::new(Flow::default());
            let meters = Meters::source(&flow, &easing, &pace, &host.pace);
            recording::keep(&host.state, board.clone(), meters);
            offer_again(&flow, &disks, layout.as_ref(), qmp.as_ref(), pid, &board).await;
            let (ram_changes, changes) = watch::channel(false);
            let link = Departure::redial(Gear {
                dialler,
                flow: flow.clone(),
                pace: pace.clone(),
                pushes: 1,
                easing: easing.clone(),
                taken_up: true,
                compress,
                // What goes from now on goes once.
                delta: false,
                ram_changes: changes,
            });
            let setup = outgoing::Setup {
                host,
                machine,
                board,
                journal,
                link,
                flow,
                pace,
                easing,
                commands: queue,
                spec,
                runtime,
                qmp,
                disks,
                ram: whimbrel_wire::message::RamMode::Postcopy,
                ahead: false,
                disks_ahead: false,
                ram_order: Default::default(),
                hold: false,
                ram_changes,
            };
            Outgoing::take_up(setup, source).run().await;
        });
        Ok(())
    }

    /// The machine stays here, or came back: the records say so. Which one, if it is still this host's.
    fn keep_leftover(
        &self,
        id: &MigrationId,
        folder: &Path,
        epoch: Epoch,
    ) -> Result<Option<Name>, ApiError> {
        let name = named::<Name>(folder, "machine")?;
        let mut runtime = self.host.state.runtime(&name)?;
        let ours = match &runtime.ownership {
            Ownership::Local => runtime.epoch <= epoch,
            Ownership::Departed { migration, .. } => migration == id,
            Ownership::Arriving { .. } => false,
        };
        if !ours {
            return Ok(None);
        }
        runtime.epoch = epoch;
        runtime.ownership = Ownership::Local;
        self.host.state.save_runtime(&name, &runtime)?;
        let spec = self.host.state.machine(&name)?;
        for disk in &spec.disks {
            set_volume(&self.host, &disk.volume, epoch, Ownership::Local);
        }
        Ok(Some(name))
    }
}

fn session_of(id: &MigrationId) -> Result<SessionId, ApiError> {
    SessionId::try_from(id.to_string()).map_err(damaged)
}

/// What a file of the migration's folder names.
pub(super) fn named<T>(folder: &Path, file: &str) -> Result<T, ApiError>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    let path = folder.join(file);
    let text = StateDir::read_text(&path)?
        .ok_or_else(|| damaged(format!("{} is missing", path.display())))?;
    text.trim()
        .parse()
        .map_err(|e| damaged(format!("{}: {e}", path.display())))
}

/// The epoch under which a migration's machine was this host's before it was promised away.
fn granted_from(journal: &MigrationJournal) -> Epoch {
    let started = journal.records().iter().find_map(|record| match *record {
        Record::Started { epoch } => Some(epoch),
        _ => None,
    });
    started.unwrap_or_default()
}
