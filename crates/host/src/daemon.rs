//! The daemon: starts, takes up what it finds, serves, and leaves guests running when it goes.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use whimbrel_engine::switchover::{Action, Destination, Epoch, Phase, Record, Source};
use whimbrel_peer::connection::Connection;
use whimbrel_peer::error::PeerError;
use whimbrel_peer::hello::{Class, SessionId};
use whimbrel_peer::identity::Identity;
use whimbrel_peer::listener::{Accepted, ListenSettings, Listener};
use whimbrel_peer::pace::{Pace, Rate};
use whimbrel_peer::trust::{PeerName, TrustStore};
use whimbrel_volume::pool::{Pool, PoolSize};

use crate::api::types::Direction;
use crate::api::{self, ApiError, ErrorCode};
use crate::config::Config;
use crate::disk::Wants;
use crate::host::Host;
use crate::machine::reattach;
use crate::machines::{Machine, Machines, open_disks};
use crate::migration::arrival::Arrival;
use crate::migration::arrivals::Arrivals;
use crate::migration::board::Board;
use crate::migration::incoming::{self, Incoming};
use crate::migration::landing::Plan;
use crate::migration::outgoing::Command;
use crate::migration::peeks::Peeks;
use crate::migration::record::MigrationJournal;
use crate::service::first_view;
use crate::state::{MigrationId, Name, Ownership, RateLimit, StateDir, Timestamp};
use crate::volumes::claims::Claims;
use crate::volumes::heat::HeatShelf;

/// Migrations to here that may be under way at once; one more source is turned away.
const MAX_INCOMING: usize = 64;

/// Migrations that are over and still told of; the oldest are forgotten first.
const MAX_TOLD: usize = 256;

/// A migration as the daemon holds it.
pub struct Held {
    pub machine: Name,
    pub board: Arc<Board>,
    /// Only at the source.
    pub commands: Option<mpsc::Sender<Command>>,
    pub pace: Option<Pace>,
}

struct Session {
    peer: PeerName,
    door: mpsc::Sender<(Class, Connection)>,
}

/// The daemon's parts.
pub struct Daemon {
    pub host: Arc<Host>,
    pub machines: Arc<Machines>,
    pub started: Timestamp,
    migrations: Mutex<BTreeMap<MigrationId, Arc<Held>>>,
    sessions: Mutex<HashMap<SessionId, Session>>,
}

/// Runs the daemon until it is told to stop. Guests are left running.
///
/// # Errors
/// What kept it from starting, in words for the operator; machines are then as they were.
pub async fn run(config: Config, stopping: CancellationToken) -> Result<(), ApiError> {
    let state = StateDir::open(&config.state)?;
    let _lock = state.lock()?;
    let name = state.host()?.name;
    let identity = Identity::load(&state.identity_path())?;
    let trust = TrustStore::load(state.peers_path())?;
    let pool = Pool::start(PoolSize::default()).map_err(|e| {
        ApiError::new(ErrorCode::Io, format!("I/O threads cannot be started: {e}"))
            .machine_state("the daemon did not start; machines are as they were")
    })?;
    let mut listener = Listener::bind(
        config.listen,
        identity.clone(),
        trust.clone(),
        crate::peers::speaker(name.as_str()),
        ListenSettings::default(),
    )
    .await?;
    let socket = api::bind(&config.socket_path()).await?;
    let pace = Pace::new(rate_of(config.bandwidth));
    let daemon = Arc::new(Daemon {
        host: Arc::new(Host {
            name: name.to_string(),
            config,
            state,
            identity,
            trust,
            pool,
            claims: Claims::default(),
            heat: HeatShelf::default(),
            pace,
        }),
        machines: Arc::new(Machines::default()),
        started: Timestamp::now(),
        migrations: Mutex::default(),
        sessions: Mutex::default(),
    });
    daemon.take_up().await;
    tracing::info!(host = %name, listen = %listener.local_addr(), "whimbrel is up");
    let keeping = tokio::spawn(crate::volumes::heat::keep(daemon.host.clone()));
    let serving = api::serve(socket, daemon.clone(), stopping.clone());
    tokio::pin!(serving);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => daemon.welcome(accepted),
                Err(PeerError::ListenerClosed) => break,
                Err(error) => tracing::warn!(%error, "a peer was turned away"),
            },
            result = &mut serving => {
                result.map_err(|e| ApiError::new(ErrorCode::Io, format!("the API failed: {e}")))?;
                break;
            }
        }
    }
    keeping.abort();
    daemon.host.heat.save(&daemon.host).await;
    for machine in daemon.machines.all() {
        if let Some(running) = &mut machine.lock().await.running {
            running.leave();
        }
    }
    tracing::info!("stopped; guests go on");
    Ok(())
}

/// What a limit means to a pace.
pub fn rate_of(limit: RateLimit) -> Rate {
    match limit.0 {
        Some(rate) => Rate::PerSecond(rate.bytes_per_second()),
        None => Rate::Unlimited,
    }
}

impl Daemon {
    pub fn migrations(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Arc<Held>>> {
        self.migrations
            .lock()
            .expect("no holder of this lock panics")
    }

    /// Puts a migration among those that are told of.
    pub fn hold(&self, id: MigrationId, held: Held) {
        let mut migrations = self.migrations();
        while migrations.len() >= MAX_TOLD {
            let oldest = migrations
                .iter()
                .filter(|(_, held)| held.board.view().phase.is_final())
                .min_by_key(|(_, held)| held.board.clock())
                .map(|(id, _)| id.clone());
            match oldest {
                Some(oldest) => migrations.remove(&oldest),
                None => break,
            };
        }
        migrations.insert(id, Arc::new(held));
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Session>> {
        self.sessions.lock().expect("no holder of this lock panics")
    }

    /// A trusted peer has connected.
    fn welcome(self: &Arc<Self>, accepted: Accepted) {
        let Accepted {
            peer,
            hello,
            connection,
        } = accepted;
        let session = hello.session;
        let door = self
            .sessions()
            .get(&session)
            .map(|known| (known.peer == peer).then(|| known.door.clone()));
        match door {
            Some(Some(door)) => {
                // A full doorstep turns the connection away; the peer dials again.
                let _ = door.try_send((hello.class, connection));
            }
            Some(None) => {
                tracing::warn!(%peer, %session, "a session that belongs to another peer");
            }
            None if hello.class == Class::Control && session != SessionId::NONE => {
                if let Err(error) = self.begin_incoming(peer.clone(), session, connection) {
                    tracing::warn!(%peer, %error, "a migration to here cannot begin");
                }
            }
            None => tracing::debug!(%peer, %session, "a connection of no session"),
        }
    }

    fn begin_incoming(
        self: &Arc<Self>,
        peer: PeerName,
        session: SessionId,
        connection: Connection,
    ) -> Result<(), ApiError> {
        if self.sessions().len() >= MAX_INCOMING {
            return Err(ApiError::new(
                ErrorCode::Busy,
                format!("{MAX_INCOMING} migrations to this host are under way"),
            ));
        }
        let id: MigrationId = session
            .to_string()
            .parse()
            .expect("32 hexadecimal digits are a migration's id");
        let folder = self.host.state.migration_folder(&id);
        if !folder.is_dir() {
            self.host.state.add_migration(&id)?;
        }
        let journal = MigrationJournal::open(&folder)
            .map_err(|e| ApiError::new(ErrorCode::Damaged, e.to_string()))?;
        let (destination, _) = Destination::recover(journal.records());
        let unknown: Name = "unknown".parse().expect("a plain word is a name");
        let view = first_view(
            id.clone(),
            unknown.clone(),
            peer.clone(),
            Direction::Incoming,
        );
        let board = Arc::new(Board::new(view));
        let arrivals = Arc::new(Arrivals::default());
        let wants = Arc::new(Wants::default());
        let peeks = Arc::new(Peeks::default());
        let link = Arrival::start(arrivals.clone(), wants.clone(), peeks.clone());
        let door = link.door();
        // The doorstep is empty and has room for one.
        let _ = door.try_send((Class::Control, connection));
        self.sessions().insert(session, Session { peer, door });
        let known = !journal.records().is_empty();
        if !known {
            let held = Held {
                machine: unknown,
                board: board.clone(),
                commands: None,
                pace: None,
            };
            self.hold(id.clone(), held);
        }
        let mut incoming = Incoming::new(incoming::Setup {
            host: self.host.clone(),
            machines: self.machines.clone(),
            migration: id,
            board,
            journal,
            link,
            arrivals,
            wants,
            peeks,
        });
        if known {
            incoming.resume(destination);
        }
        let daemon = self.clone();
        tokio::spawn(async move {
            incoming.run().await;
            daemon.sessions().remove(&session);
        });
        Ok(())
    }

    /// Takes up what an earlier daemon left: machines that run, migrations that were under way.
    async fn take_up(&self) {
        self.take_up_migrations().await;
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
            let name = spec.name.clone();
            let process = runtime.process.clone().filter(|p| p.is_alive());
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
            let machine = self.machines.insert(Machine::new(spec, runtime, running));
            machine.watch_end(&self.host).await;
        }
    }

    async fn reattach(
        &self,
        spec: &crate::state::MachineSpec,
        process: &crate::state::QemuProcess,
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

    async fn take_up_migrations(&self) {
        let listing = match self.host.state.migrations() {
            Ok(listing) => listing,
            Err(error) => {
                tracing::error!(%error, "the migrations' records cannot be listed");
                return;
            }
        };
        for id in listing.records {
            let folder = self.host.state.migration_folder(&id);
            if let Err(error) = self.take_up_migration(&id, &folder).await {
                tracing::error!(migration = %id, %error, "a migration cannot be taken up");
            }
        }
    }

    /// What a migration's journal says of it, and what follows.
    async fn take_up_migration(&self, id: &MigrationId, folder: &Path) -> Result<(), ApiError> {
        let damaged = |e: String| ApiError::new(ErrorCode::Damaged, e);
        let mut journal = MigrationJournal::open(folder).map_err(|e| damaged(e.to_string()))?;
        let records = journal.records().to_vec();
        if records.is_empty() {
            return Ok(());
        }
        let plan = Plan::load(folder).map_err(|e| damaged(e.to_string()))?;
        let is_incoming = matches!(
            records[0],
            Record::Preparing { .. } | Record::Refused { .. }
        );
        if is_incoming {
            let (destination, actions) = Destination::recover(&records);
            for action in actions {
                match action {
                    Action::Journal(record) => journal
                        .append(record)
                        .map_err(|e| ApiError::new(ErrorCode::Io, e.to_string()))?,
                    Action::CleanUp => {
                        if let Some(plan) = &plan {
                            self.end_leftover(&plan.spec.name);
                            plan.undo(&self.host).await;
                            let _ = std::fs::remove_file(folder.join("landing.json"));
                            tracing::info!(migration = %id, "a migration that was not accepted was cleaned away");
                        }
                    }
                    // The source hears the answer when it asks; a running guest is found with the machines.
                    _ => {}
                }
            }
            if destination.may_run() && destination.phase() != Phase::Complete {
                tracing::warn!(migration = %id, "this host owns a machine whose content was still arriving");
            }
            return Ok(());
        }
        let (source, actions) = Source::recover(&records);
        for action in actions {
            match action {
                Action::Journal(record) => journal
                    .append(record)
                    .map_err(|e| ApiError::new(ErrorCode::Io, e.to_string()))?,
                Action::KeepGuest { epoch } => {
                    tracing::info!(migration = %id, %epoch, "an unfinished migration away from here is off");
                    self.resume_leftover(folder).await;
                }
                _ => {}
            }
        }
        if !source.may_run() {
            self.mark_granted(id, folder);
        }
        if !source.may_run() && !source.phase().is_final() {
            tracing::warn!(migration = %id, phase = %source.phase(), "a migration away from here was granted and is not over");
        }
        Ok(())
    }

    /// A machine that was promised away is not this host's to run, whatever its record still says.
    fn mark_granted(&self, id: &MigrationId, folder: &Path) {
        let named = StateDir::read_text(&folder.join("machine"));
        let Some(name) = named
            .ok()
            .flatten()
            .and_then(|t| t.trim().parse::<Name>().ok())
        else {
            return;
        };
        let peer = StateDir::read_text(&folder.join("peer"));
        let Some(to) = peer.ok().flatten().and_then(|t| t.trim().parse().ok()) else {
            return;
        };
        if let Ok(mut runtime) = self.host.state.runtime(&name)
            && runtime.ownership == Ownership::Local
            && runtime.epoch <= granted_from(folder)
        {
            runtime.ownership = Ownership::Departed {
                migration: id.clone(),
                to,
            };
            if let Err(error) = self.host.state.save_runtime(&name, &runtime) {
                tracing::error!(machine = %name, %error, "a machine's record cannot be saved");
            }
        }
    }

    /// Ends the QEMU of a machine that was arriving, by the name its process carries.
    fn end_leftover(&self, name: &Name) {
        let folder = self.host.state.machine_folder(name);
        let socket = format!("path={}", folder.join("qmp.sock").display());
        let Ok(processes) = std::fs::read_dir("/proc") else {
            return;
        };
        for process in processes.flatten() {
            let Some(pid) = process
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
                .and_then(rustix::process::Pid::from_raw)
            else {
                continue;
            };
            let Ok(line) = std::fs::read(process.path().join("cmdline")) else {
                continue;
            };
            let line = String::from_utf8_lossy(&line);
            if line.contains(&socket) && line.contains("-incoming") {
                // It waited for a machine that will not come: no guest ever ran in it.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }

    /// Lets a guest run on whose migration died with the daemon.
    async fn resume_leftover(&self, folder: &Path) {
        let Ok(Some(text)) = StateDir::read_text(&folder.join("machine")) else {
            return;
        };
        let Ok(name) = text.trim().parse::<Name>() else {
            return;
        };
        let Ok(runtime) = self.host.state.runtime(&name) else {
            return;
        };
        let Some(process) = runtime.process.filter(|p| p.is_alive()) else {
            return;
        };
        let Ok(qmp) = whimbrel_qemu::qmp::Qmp::connect(&process.qmp).await else {
            return;
        };
        // Over already if QEMU noticed that its socket was gone.
        let _ = qmp.execute("migrate_cancel", serde_json::json!({})).await;
        let running = qmp
            .execute("query-status", serde_json::json!({}))
            .await
            .is_ok_and(|status| status["running"].as_bool() == Some(true));
        if !running && let Err(error) = qmp.execute("cont", serde_json::json!({})).await {
            tracing::error!(machine = %name, %error, "a guest that was stopped for a migration cannot be resumed");
        }
    }
}

/// The epoch under which a migration's machine was this host's before it was promised away.
fn granted_from(folder: &Path) -> Epoch {
    let journal = MigrationJournal::open(folder);
    let started = journal.ok().and_then(|journal| {
        journal.records().iter().find_map(|record| match *record {
            Record::Started { epoch } => Some(epoch),
            _ => None,
        })
    });
    started.unwrap_or_default()
}
