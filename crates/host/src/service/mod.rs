//! The API's operations, done.

pub(crate) mod errors;
mod paused;
pub mod peers;
mod recovery;
mod reports;
mod views;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use whimbrel_engine::rounds::Choice;
use whimbrel_engine::switchover::Phase;
use whimbrel_peer::hello::{Class, SessionId};
use whimbrel_peer::invitation::InvitationId;
use whimbrel_peer::trust::PeerName;
use whimbrel_qemu::source::may_leave;
use whimbrel_wire::message::RamMode as WireRam;

use crate::api::types::*;
use crate::api::{ApiError, ErrorCode, Service};
use crate::daemon::{Daemon, Held, migration_of, rate_of};
use crate::machine::{Adoption, Boot, DiskServer, MachineError, adopt, disk_socket, probe, start};
use crate::machines::{Machine, Standing, open_disks, save};
use crate::migration::board::Board;
use crate::migration::departure::{Departure, Gear};
use crate::migration::easing::Easing;
use crate::migration::flow::Flow;
use crate::migration::outgoing::{Command, Outgoing, Setup};
use crate::migration::record::{
    MigrationJournal, save_bandwidth, save_compress, save_delta, save_latency,
};
use crate::migration::recording::{self, Meters};
use errors::*;
pub use views::first_view;

use crate::state::{
    MachineRuntime, MachineSpec, MigrationId, Name, Ownership, RateLimit, StateDir,
};

/// How long a guest gets to shut down.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(90);

impl Daemon {
    pub(crate) fn machine_named(&self, name: &Name) -> Result<Arc<Machine>, ApiError> {
        self.machines.get(name).ok_or_else(|| no_machine(name))
    }

    fn held_of(&self, machine: &Name) -> Result<Arc<Held>, ApiError> {
        let found = self
            .migrations()
            .values()
            .filter(|held| &held.board.view().machine == machine)
            .max_by_key(|held| held.board.clock())
            .cloned();
        found.ok_or_else(|| {
            ApiError::new(
                ErrorCode::NotFound,
                format!("machine `{machine}` has no migration"),
            )
            .next_step("see `whimbrel status`")
        })
    }

    /// Writes the machine's name on its volumes.
    fn claim_volumes(&self, spec: &MachineSpec) -> Result<(), ApiError> {
        for disk in &spec.disks {
            let mut record = self.host.state.volume(&disk.volume)?;
            if record.machine.as_ref() != Some(&spec.name) {
                record.machine = Some(spec.name.clone());
                self.host.state.save_volume(&record)?;
            }
        }
        Ok(())
    }
}

fn fresh_id() -> Result<SessionId, ApiError> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| ApiError::new(ErrorCode::Io, format!("/dev/urandom: {e}")))?;
    // Zero means no session.
    Ok(SessionId(u128::from_be_bytes(bytes) | 1))
}

impl Service for Daemon {
    async fn host(&self) -> Result<HostView, ApiError> {
        let config = &self.host.config;
        let state = &self.host.state;
        let migrations = self
            .migrations()
            .values()
            .filter(|held| !held.board.view().state.is_settled())
            .count();
        let peers = self.peers().await?.items;
        Ok(HostView {
            name: state.host()?.name,
            key: self.host.identity.key_id(),
            listen: config.listen.to_string(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            state_dir: state.root().to_path_buf(),
            daemon: Some(DaemonView {
                pid: std::process::id(),
                started: self.started,
                qemu: config.qemu.clone(),
                networks: config.networks.keys().cloned().collect(),
                bandwidth: config.bandwidth,
                machines: self.machines.all().len(),
                volumes: state.volumes()?.records.len(),
                migrations,
            }),
            peers,
        })
    }

    async fn peers(&self) -> Result<Listed<PeerView>, ApiError> {
        self.trusted_peers()
    }

    async fn trust(&self, request: TrustRequest) -> Result<PeerView, ApiError> {
        self.trust_peer(request)
    }

    async fn revoke(&self, name: PeerName, force: bool) -> Result<(), ApiError> {
        self.revoke_peer(name, force).await
    }

    async fn rename_peer(&self, name: PeerName, new: PeerName) -> Result<PeerView, ApiError> {
        self.give_name(name, new)
    }

    async fn allow_peer(&self, name: PeerName, change: AllowPeer) -> Result<PeerView, ApiError> {
        self.change_rights(name, change)
    }

    async fn invitations(&self) -> Result<Listed<InvitationView>, ApiError> {
        crate::peers::invitations(&self.host.state)
    }

    async fn invite(&self, request: InviteRequest) -> Result<InviteView, ApiError> {
        crate::peers::invite(&self.host.state, self.host.config.listen, request, true)
    }

    async fn cancel_invitation(&self, id: InvitationId) -> Result<InvitationView, ApiError> {
        crate::peers::cancel_invitation(&self.host.state, id)
    }

    async fn join_host(&self, request: JoinHost) -> Result<JoinView, ApiError> {
        let host = &self.host;
        crate::peers::join_host(&host.state, &host.trust, host.config.listen, request).await
    }

    async fn volumes(&self) -> Result<Listed<VolumeView>, ApiError> {
        let listing = self.host.state.volumes()?;
        let mut items = Vec::new();
        for record in listing.records {
            items.push(self.volume_view(record).await);
        }
        let damaged = listing.damaged.into_iter().map(ApiError::from).collect();
        Ok(Listed { items, damaged })
    }

    async fn volume(&self, name: Name) -> Result<VolumeView, ApiError> {
        let record = self.host.state.volume(&name)?;
        Ok(self.volume_view(record).await)
    }

    async fn create_volume(&self, request: CreateVolume) -> Result<VolumeView, ApiError> {
        self.make_volume(request).await
    }

    async fn import_volume(
        &self,
        request: ImportVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        self.bring_volume(request, progress).await
    }

    async fn export_volume(
        &self,
        name: Name,
        request: ExportVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        self.take_out(name, request, progress).await
    }

    async fn clone_volume(
        &self,
        name: Name,
        request: CloneVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        self.clone_of(name, request, progress).await
    }

    async fn serve_volume(
        &self,
        name: Name,
        request: ServeVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        self.serve_out(name, request, progress).await
    }

    async fn record_trace(
        &self,
        name: Name,
        request: RecordTrace,
        progress: watch::Sender<RecordingProgress>,
    ) -> Result<RecordingView, ApiError> {
        Daemon::record_trace(self, name, request, progress).await
    }

    async fn end_recording(&self, name: Name) -> Result<(), ApiError> {
        self.end_recording_of(name).await
    }

    async fn resize_volume(
        &self,
        name: Name,
        request: ResizeVolume,
    ) -> Result<VolumeView, ApiError> {
        self.change_size(name, request).await
    }

    async fn check_volume(&self, name: Name, request: CheckVolume) -> Result<CheckView, ApiError> {
        self.look_over(name, request).await
    }

    async fn map_volume(&self, name: Name, cells: usize) -> Result<MapView, ApiError> {
        self.picture(name, cells).await
    }

    async fn heat_volume(&self, name: Name, top: usize) -> Result<HeatView, ApiError> {
        self.hottest(name, top)
    }

    async fn remove_volume(&self, name: Name) -> Result<(), ApiError> {
        let record = self.host.state.volume(&name)?;
        if let Some(machine) = record.machine.as_ref().and_then(|m| self.machines.get(m)) {
            let standing = machine.lock().await;
            if standing.running.is_some() || standing.runtime.ownership == Ownership::Local {
                return Err(ApiError::new(
                    ErrorCode::Busy,
                    format!("volume `{name}` is a disk of machine `{}`", machine.name),
                )
                .next_step("undefine the machine first"));
            }
        }
        if let Ownership::Arriving { migration } = &record.state {
            return Err(ApiError::new(
                ErrorCode::Busy,
                format!("volume `{name}` is arriving by migration {migration}"),
            )
            .machine_state("the volume was not touched")
            .next_step("let the migration end, or cancel it at its source"));
        }
        let _claim = self.host.claims.take(&name).ok_or_else(|| {
            ApiError::new(
                ErrorCode::Busy,
                format!("volume `{name}` is being copied, resized or checked"),
            )
            .machine_state("the volume was not touched")
            .next_step("try again when that is over")
        })?;
        self.host.heat.forget(&name);
        Ok(self.host.state.remove_volume(&name)?)
    }

    async fn machines(&self) -> Result<Listed<MachineView>, ApiError> {
        let mut items = Vec::new();
        for machine in self.machines.all() {
            items.push(self.machine_view(&machine).await);
        }
        let damaged = self.host.state.machines()?.damaged;
        Ok(Listed {
            items,
            damaged: damaged.into_iter().map(ApiError::from).collect(),
        })
    }

    async fn machine(&self, name: Name) -> Result<MachineView, ApiError> {
        let machine = self.machine_named(&name)?;
        Ok(self.machine_view(&machine).await)
    }

    async fn define_machine(&self, mut spec: MachineSpec) -> Result<MachineView, ApiError> {
        spec.fill_macs();
        for disk in &spec.disks {
            self.host.state.volume(&disk.volume)?;
        }
        for nic in &spec.nics {
            if !self.host.config.networks.contains_key(&nic.network) {
                return Err(MachineError::NoNetwork {
                    machine: spec.name.to_string(),
                    network: nic.network.to_string(),
                }
                .into());
            }
        }
        let runtime = MachineRuntime::fresh();
        self.host.state.add_machine(&spec, &runtime)?;
        self.claim_volumes(&spec)?;
        let machine = self.machines.insert(Machine::new(spec, runtime, None));
        Ok(self.machine_view(&machine).await)
    }

    async fn start_machine(&self, name: Name) -> Result<MachineView, ApiError> {
        let machine = self.machine_named(&name)?;
        {
            let mut standing = machine.lock().await;
            if self.is_migrating(&standing) {
                return Err(busy_migrating(&name));
            }
            if standing.runtime.ownership != Ownership::Local {
                return Err(ApiError::new(
                    ErrorCode::WrongState,
                    format!("machine `{name}` is {}", standing.runtime.ownership),
                )
                .machine_state("it is not this host's to run")
                .next_step("start it where it is"));
            }
            if standing.running.as_ref().is_some_and(|r| !r.has_ended()) {
                return Err(ApiError::new(
                    ErrorCode::WrongState,
                    format!("machine `{name}` has a process already"),
                ));
            }
            standing.running = None;
            let disks = open_disks(&self.host, &standing.spec).await?;
            let folder = self.host.state.machine_folder(&name);
            let config = &self.host.config;
            let running = start(config, &folder, &standing.spec, disks, Boot::Fresh).await?;
            standing.runtime.process = Some(running.process.clone());
            standing.running = Some(running);
            save(&self.host, &standing);
        }
        machine.watch_end(&self.host).await;
        Ok(self.machine_view(&machine).await)
    }

    async fn stop_machine(
        &self,
        name: Name,
        request: StopRequest,
    ) -> Result<MachineView, ApiError> {
        let machine = self.machine_named(&name)?;
        {
            let mut standing = machine.lock().await;
            if self.is_migrating(&standing) {
                return Err(busy_migrating(&name));
            }
            let Some(running) = standing.running.take() else {
                return Err(ApiError::new(
                    ErrorCode::WrongState,
                    format!("machine `{name}` does not run"),
                ));
            };
            if !request.force && !running.has_ended() {
                match running.shut_down(SHUTDOWN_PATIENCE).await {
                    Ok(true) => {}
                    Ok(false) => {
                        standing.running = Some(running);
                        return Err(ApiError::new(
                            ErrorCode::Qemu,
                            format!(
                                "the guest did not shut down within {} s",
                                SHUTDOWN_PATIENCE.as_secs()
                            ),
                        )
                        .machine_state("it runs on")
                        .next_step("shut it down from within, or end it with --force"));
                    }
                    Err(error) => {
                        standing.running = Some(running);
                        return Err(error.into());
                    }
                }
            }
            for disk in &running.disks {
                // What the guest flushed is durable; this is for what it did not.
                if let Err(error) = disk.file().sync().await {
                    tracing::warn!(%error, "a disk cannot be synced");
                }
            }
            running.kill().await;
            standing.runtime.process = None;
            save(&self.host, &standing);
        }
        Ok(self.machine_view(&machine).await)
    }

    async fn create_snapshot(
        &self,
        machine: Name,
        request: CreateSnapshot,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<SnapshotView, ApiError> {
        self.take_snapshot(machine, request, progress).await
    }

    async fn resume_machine(&self, name: Name) -> Result<MachineView, ApiError> {
        let machine = self.machine_named(&name)?;
        {
            let standing = machine.lock().await;
            paused::resume(&standing, self.is_migrating(&standing)).await?;
        }
        Ok(self.machine_view(&machine).await)
    }

    async fn recovery(&self, name: Name) -> Result<RecoveryView, ApiError> {
        self.recovery_of(&name).await
    }

    async fn recover(
        &self,
        name: Name,
        request: RecoverRequest,
    ) -> Result<MigrationView, ApiError> {
        self.may_take_back(&name, &request)?;
        let lost = request.lost.is_some();
        self.command(&name, Command::TakeBack { lost }).await
    }

    async fn adopt_machine(&self, request: AdoptRequest) -> Result<MachineView, ApiError> {
        let mut spec = request.spec;
        spec.fill_macs();
        let runtime = MachineRuntime::fresh();
        self.host.state.add_machine(&spec, &runtime)?;
        let adopted = self.try_adopt(&spec, &request.qmp).await;
        let running = match adopted {
            Ok(running) => running,
            Err(error) => {
                self.host.state.remove_machine(&spec.name)?;
                return Err(error.machine_state("the running QEMU was not touched"));
            }
        };
        self.claim_volumes(&spec)?;
        let runtime = MachineRuntime {
            process: Some(running.process.clone()),
            ..runtime
        };
        self.host.state.save_runtime(&spec.name, &runtime)?;
        let machine = Machine::new(spec, runtime, Some(running));
        let machine = self.machines.insert(machine);
        machine.watch_end(&self.host).await;
        Ok(self.machine_view(&machine).await)
    }

    async fn undefine_machine(&self, name: Name) -> Result<(), ApiError> {
        let machine = self.machine_named(&name)?;
        let standing = machine.lock().await;
        if standing.running.as_ref().is_some_and(|r| !r.has_ended()) {
            return Err(
                ApiError::new(ErrorCode::Busy, format!("machine `{name}` runs"))
                    .next_step("stop it first"),
            );
        }
        for disk in &standing.spec.disks {
            if let Ok(mut record) = self.host.state.volume(&disk.volume) {
                record.machine = None;
                self.host.state.save_volume(&record)?;
            }
        }
        self.host.state.remove_machine(&name)?;
        self.machines.remove(&name);
        Ok(())
    }

    async fn migrations(&self) -> Result<Listed<MigrationView>, ApiError> {
        let items = Daemon::migrations(self)
            .values()
            .map(|held| held.board.view())
            .collect();
        Ok(Listed {
            items,
            damaged: Vec::new(),
        })
    }

    async fn migration(&self, id: MigrationId) -> Result<MigrationView, ApiError> {
        Daemon::migrations(self)
            .get(&id)
            .map(|held| held.board.view())
            .ok_or_else(|| no_migration(&id))
    }

    async fn migrate(&self, request: MigrateRequest) -> Result<MigrationView, ApiError> {
        let machine = self.machine_named(&request.machine)?;
        let mut standing = machine.lock().await;
        if self.is_migrating(&standing) {
            return Err(busy_migrating(&request.machine));
        }
        if standing.runtime.ownership != Ownership::Local {
            return Err(ApiError::new(
                ErrorCode::WrongState,
                format!(
                    "machine `{}` is {}",
                    request.machine, standing.runtime.ownership
                ),
            )
            .next_step("a machine that is still arriving can move on when it is complete"));
        }
        let Some(running) = standing.running.as_ref().filter(|r| !r.has_ended()) else {
            return Err(ApiError::new(
                ErrorCode::WrongState,
                format!("machine `{}` does not run", request.machine),
            )
            .next_step("start it first"));
        };
        let safe = "the machine runs here as before; nothing was begun";
        let to = peers::destination(&self.host.trust, &request.to)
            .map_err(|error| error.machine_state(safe))?;
        if let Err(error) = may_leave(&running.qmp).await {
            return Err(ApiError::new(ErrorCode::Qemu, error.to_string())
                .machine_state(safe)
                .next_step("stop it and start it where it is to be, or run it with KVM"));
        }
        let session = fresh_id()?;
        let dialler = self.dialler(to.clone(), session);
        // The first failure to reach the peer is the caller's to hear, with nothing begun.
        let first = dialler.dial(Class::Control).await;
        let first = first.map_err(|error| ApiError::from(error).machine_state(safe))?;
        let id = migration_of(session);
        let folder = self.host.state.add_migration(&id)?;
        StateDir::replace_file(&folder.join("machine"), request.machine.as_str().as_bytes())?;
        to.save(&folder)?;
        save_bandwidth(&folder, request.bandwidth)?;
        let bound = request.guest_latency;
        let bound = bound.unwrap_or(self.host.config.guest_latency);
        save_latency(&folder, bound)?;
        save_compress(&folder, request.compress)?;
        save_delta(&folder, request.delta)?;
        let journal = MigrationJournal::open(&folder)?;
        let mut view = first_view(
            id.clone(),
            request.machine.clone(),
            request.to.clone(),
            Direction::Outgoing,
        );
        view.bandwidth = request.bandwidth;
        view.compress = request.compress;
        view.delta = request.delta;
        let board = Arc::new(Board::new(view));
        let flow = Arc::new(Flow::default());
        let pace = self.host.pace.under(rate_of(request.bandwidth));
        let easing = Arc::new(Easing::new(bound));
        let (ram_changes, changes) = watch::channel(true);
        let gear = Gear {
            dialler,
            flow: flow.clone(),
            pace: pace.clone(),
            pushes: 1,
            easing: easing.clone(),
            taken_up: false,
            compress: request.compress,
            // By post-copy alone memory goes once.
            delta: request.delta == Delta::On && request.ram != RamMode::Postcopy,
            ram_changes: changes,
        };
        let meters = Meters::source(&flow, &easing, &pace, &self.host.pace);
        recording::keep(&self.host.state, board.clone(), meters);
        let (commands, queue) = mpsc::channel(8);
        let outgoing = Outgoing::new(Setup {
            host: self.host.clone(),
            machine: machine.clone(),
            board: board.clone(),
            journal,
            link: Departure::start(first, gear),
            flow,
            pace: pace.clone(),
            easing,
            commands: queue,
            spec: standing.spec.clone(),
            runtime: standing.runtime.clone(),
            qmp: Some(running.qmp.clone()),
            disks: running.disks.clone(),
            ram: match request.ram {
                RamMode::Auto => WireRam::Auto,
                RamMode::Hybrid | RamMode::Postcopy => WireRam::Postcopy,
                RamMode::Precopy => WireRam::Precopy,
            },
            ahead: matches!(request.ram, RamMode::Auto | RamMode::Hybrid),
            disks_ahead: request.disks == DiskMode::Hybrid,
            ram_order: Choice {
                order: request.ram_order,
                first_copies: request.delta == Delta::On,
            },
            hold: request.hold,
            ram_changes,
        });
        self.hold(
            id.clone(),
            Held {
                board: board.clone(),
                commands: Some(commands),
                pace: Some(pace),
            },
        );
        standing.migration = Some(id);
        drop(standing);
        tokio::spawn(outgoing.run());
        Ok(board.view())
    }

    async fn switch(&self, machine: Name) -> Result<MigrationView, ApiError> {
        self.command(&machine, Command::Switch).await
    }

    async fn cancel(&self, machine: Name) -> Result<MigrationView, ApiError> {
        let held = self.held_of(&machine)?;
        let phase = held.board.view().phase;
        if !matches!(phase, Phase::Prepare | Phase::Copy | Phase::Quiesce) {
            return Err(ApiError::new(
                ErrorCode::WrongState,
                format!("the migration of `{machine}` is in phase {phase}: it cannot be cancelled any more"),
            )
            .machine_state("the destination owns the machine")
            .next_step("let it complete, then migrate back"));
        }
        self.command(&machine, Command::Cancel).await
    }

    async fn throttle(
        &self,
        machine: Name,
        bandwidth: RateLimit,
    ) -> Result<MigrationView, ApiError> {
        let held = self.held_of(&machine)?;
        let pace = held.pace.as_ref().ok_or_else(only_at_source)?;
        let id = held.board.view().id;
        save_bandwidth(&self.host.state.migration_folder(&id), bandwidth)?;
        pace.set_rate(rate_of(bandwidth));
        held.board.update(|view| view.bandwidth = bandwidth);
        Ok(held.board.view())
    }

    async fn reports(&self) -> Result<Listed<ReportEntry>, ApiError> {
        Ok(Listed {
            items: self.known_reports().await?,
            damaged: Vec::new(),
        })
    }

    async fn report(&self, id: MigrationId) -> Result<ReportView, ApiError> {
        self.report_of(id).await
    }

    async fn watch(&self, id: MigrationId) -> Result<watch::Receiver<MigrationView>, ApiError> {
        Daemon::migrations(self)
            .get(&id)
            .map(|held| held.board.watch())
            .ok_or_else(|| no_migration(&id))
    }
}

impl Daemon {
    pub(crate) fn is_migrating(&self, standing: &Standing) -> bool {
        let migrations = Daemon::migrations(self);
        standing
            .migration
            .as_ref()
            .and_then(|id| migrations.get(id))
            .is_some_and(|held| !held.board.view().phase.is_final())
    }

    async fn command(&self, machine: &Name, command: Command) -> Result<MigrationView, ApiError> {
        let held = self.held_of(machine)?;
        let commands = held.commands.as_ref().ok_or_else(only_at_source)?;
        // A driver that has ended has nothing left to be told.
        let _ = commands.send(command).await;
        Ok(held.board.view())
    }

    async fn try_adopt(
        &self,
        spec: &MachineSpec,
        qmp: &Path,
    ) -> Result<crate::machine::Running, ApiError> {
        probe(&self.host.config).await?;
        let disks = open_disks(&self.host, spec).await?;
        let folder = self.host.state.machine_folder(&spec.name);
        let server = DiskServer::start(&disk_socket(&folder), &disks)?;
        let adoption = Adoption { spec, qmp };
        Ok(adopt(adoption, disks, server).await?)
    }
}
