//! The daemon: starts, takes up what it finds, serves, and leaves guests running when it goes.

mod bound;
mod take_up;

pub use bound::Bound;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use whimbrel_engine::switchover::Destination;
use whimbrel_peer::connection::Connection;
use whimbrel_peer::error::PeerError;
use whimbrel_peer::hello::{Class, Hello, SessionId};
use whimbrel_peer::identity::Identity;
use whimbrel_peer::invitation::Invitations;
use whimbrel_peer::key_id::KeyId;
use whimbrel_peer::listener::{Accepted, ListenSettings, Listener};
use whimbrel_peer::pace::{Pace, Rate};
use whimbrel_peer::trust::{PeerName, TrustStore};
use whimbrel_volume::pool::{Pool, PoolSize};

use crate::api::types::Direction;
use crate::api::{self, ApiError, ErrorCode};
use crate::config::Config;
use crate::disk::Wants;
use crate::host::Host;
use crate::machines::Machines;
use crate::migration::arrival::{Arrival, Door};
use crate::migration::arrivals::Arrivals;
use crate::migration::board::Board;
use crate::migration::incoming::{self, Incoming};
use crate::migration::outgoing::Command;
use crate::migration::peeks::Peeks;
use crate::migration::record::MigrationJournal;
use crate::migration::recording;
use crate::peers::Dialler;
use crate::schedule;
use crate::service::first_view;
use crate::state::{MigrationId, Name, RateLimit, StateDir, Timestamp};
use crate::volumes::claims::Claims;
use crate::volumes::heat::HeatShelf;
use crate::volumes::tracker::TrackerShelf;

/// Migrations to here that may be under way at once; one more source is turned away.
const MAX_INCOMING: usize = 64;

/// Migrations that are over and still told of; the oldest are forgotten first.
const MAX_TOLD: usize = 256;

/// A migration as the daemon holds it.
pub struct Held {
    pub board: Arc<Board>,
    /// Only at the source.
    pub commands: Option<mpsc::Sender<Command>>,
    pub pace: Option<Pace>,
}

impl Held {
    fn incoming(board: Arc<Board>) -> Self {
        Held {
            board,
            commands: None,
            pace: None,
        }
    }
}

struct Session {
    /// Whose it is: no other key's connection gets in.
    peer: KeyId,
    door: Door,
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
pub async fn run(mut config: Config, stopping: CancellationToken) -> Result<(), ApiError> {
    let state = StateDir::open(&config.state)?;
    let _lock = state.lock()?;
    let name = state.host()?.name;
    let identity = Identity::load(&state.identity_path())?;
    let trust = TrustStore::load(state.peers_path())?;
    let pool = Pool::start(PoolSize::default()).map_err(|e| {
        ApiError::new(ErrorCode::Io, format!("I/O threads cannot be started: {e}"))
            .machine_state("the daemon did not start; machines are as they were")
    })?;
    let door: Arc<OnceLock<Weak<Daemon>>> = Arc::default();
    let keeper = door.clone();
    let mut listener = Listener::bind(
        config.listen,
        identity.clone(),
        trust.clone(),
        crate::peers::speaker(name.as_str()),
        ListenSettings {
            // Who comes before all is taken up waits, and is judged when it is let in.
            admission: Some(Arc::new(move |_, key, hello| {
                match keeper.get().and_then(Weak::upgrade) {
                    Some(daemon) => daemon.may_come(key, hello).map_err(|e| e.to_string()),
                    None => Ok(()),
                }
            })),
            invitations: Some(Invitations::at(state.invitations_path())),
            ..ListenSettings::default()
        },
    )
    .await?;
    // The port that the kernel chose, if that was its to choose.
    config.listen = listener.local_addr();
    let socket = api::bind(&config.socket_path()).await?;
    let limit = schedule::limit_now(&config.schedule, config.bandwidth);
    let pace = Pace::new(rate_of(limit));
    let daemon = Arc::new(Daemon {
        host: Arc::new(Host {
            name: name.to_string(),
            config,
            state,
            identity,
            trust,
            pool,
            claims: Claims::default(),
            trackers: TrackerShelf::default(),
            heat: HeatShelf::default(),
            pace,
        }),
        machines: Arc::new(Machines::default()),
        started: Timestamp::now(),
        migrations: Mutex::default(),
        sessions: Mutex::default(),
    });
    daemon.take_up().await;
    let _ = door.set(Arc::downgrade(&daemon));
    tracing::info!(host = %name, listen = %listener.local_addr(), "whimbrel is up");
    let keeping = tokio::spawn(crate::volumes::heat::keep(daemon.host.clone()));
    let pacing = (!daemon.host.config.schedule.is_empty()).then(|| {
        let config = &daemon.host.config;
        let keep = schedule::keep(
            config.schedule.clone(),
            config.bandwidth,
            daemon.host.pace.clone(),
        );
        tokio::spawn(keep)
    });
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
    if let Some(pacing) = pacing {
        pacing.abort();
    }
    daemon.host.heat.save(&daemon.host).await;
    for machine in daemon.machines.all() {
        if let Some(running) = &mut machine.lock().await.running {
            running.leave();
            for disk in &running.disks {
                disk.stand_still().await;
            }
        }
    }
    daemon.host.trackers.save();
    tracing::info!("stopped; guests go on");
    Ok(())
}

/// Why a trusted peer's connection is not let in. The peer's operator reads the words.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Unwelcome {
    #[error("migration {session} is another host's")]
    Stolen { session: SessionId },
    #[error(
        "`{name}`, as this host is called there, may not send machines to it; its operator can change that with `whimbrel host allow {name} --send yes`"
    )]
    NotAllowed { name: PeerName },
    #[error("this host is not trusted there any more")]
    Stranger,
}

/// What a limit means to a pace.
pub fn rate_of(limit: RateLimit) -> Rate {
    match limit.0 {
        Some(rate) => Rate::PerSecond(rate.bytes_per_second()),
        None => Rate::Unlimited,
    }
}

/// The migration that a session is of.
pub fn migration_of(session: SessionId) -> MigrationId {
    session
        .to_string()
        .parse()
        .expect("32 hexadecimal digits are a migration's id")
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

    /// Whether a trusted peer's connection is one that it may have; else why not, in words for its operator.
    fn may_come(&self, key: KeyId, hello: &Hello) -> Result<(), Unwelcome> {
        let session = hello.session;
        let known = self.sessions().get(&session).map(|known| known.peer);
        match known {
            Some(peer) if peer == key => Ok(()),
            Some(_) => Err(Unwelcome::Stolen { session }),
            None if hello.class == Class::Control && session != SessionId::NONE => {
                self.may_begin(key, session)
            }
            // It is dropped: a push connection that was quicker, or slower, than its session.
            None => Ok(()),
        }
    }

    /// Whether a session that no driver is at work for may begin, or begin again, for this key.
    fn may_begin(&self, key: KeyId, session: SessionId) -> Result<(), Unwelcome> {
        let folder = self.host.state.migration_folder(&migration_of(session));
        if !folder.is_dir() {
            let (name, peer) = self.host.trust.find(&key).ok_or(Unwelcome::Stranger)?;
            return match peer.may.send {
                true => Ok(()),
                false => Err(Unwelcome::NotAllowed { name }),
            };
        }
        // Of a migration away from here this host is the one that dials.
        let ours = folder.join("machine").exists();
        let bound = Bound::load(&folder, &self.host.trust);
        match bound {
            Ok(bound) if bound.key == key && !ours => Ok(()),
            _ => Err(Unwelcome::Stolen { session }),
        }
    }

    /// A trusted peer has connected.
    fn welcome(self: &Arc<Self>, accepted: Accepted) {
        let Accepted {
            peer,
            hello,
            connection,
        } = accepted;
        let (session, key) = (hello.session, connection.remote().key);
        // Again, since it may have come before all was taken up, or its peer's rights have changed.
        if let Err(error) = self.may_come(key, &hello) {
            tracing::warn!(%peer, %key, %session, %error, "a connection that is not let in");
            return;
        }
        let door = self
            .sessions()
            .get(&session)
            .map(|known| known.door.clone());
        match door {
            Some(door) => {
                // A full doorstep turns the connection away; the peer dials again.
                let _ = door.try_send((hello.class, connection));
            }
            None if hello.class == Class::Control && session != SessionId::NONE => {
                let bound = Bound { name: peer, key };
                if let Err(error) = self.begin_incoming(bound.clone(), session, connection) {
                    tracing::warn!(peer = %bound.name, %error, "a migration to here cannot begin");
                }
            }
            None => tracing::debug!(%peer, %session, "a connection of no session"),
        }
    }

    fn begin_incoming(
        self: &Arc<Self>,
        peer: Bound,
        session: SessionId,
        connection: Connection,
    ) -> Result<(), ApiError> {
        if self.sessions().len() >= MAX_INCOMING {
            return Err(ApiError::new(
                ErrorCode::Busy,
                format!("{MAX_INCOMING} migrations to this host are under way"),
            ));
        }
        let id = migration_of(session);
        let folder = self.host.state.migration_folder(&id);
        if !folder.is_dir() {
            self.host.state.add_migration(&id)?;
            peer.save(&folder)?;
        }
        let journal = MigrationJournal::open(&folder)?;
        let (destination, _) = Destination::recover(journal.records());
        let known = !journal.records().is_empty();
        let unknown: Name = "unknown".parse().expect("a plain word is a name");
        let view = first_view(id.clone(), unknown, peer.name.clone(), Direction::Incoming);
        let board = Arc::new(Board::new(view));
        let (mut incoming, door) = self.incoming(board.clone(), journal);
        // The doorstep is empty and has room for one.
        let _ = door.try_send((Class::Control, connection));
        if known {
            incoming.resume(destination);
        } else {
            recording::keep(&self.host.state, board.clone(), incoming.meters());
            self.hold(id, Held::incoming(board));
        }
        self.let_in(session, peer, door, incoming);
        Ok(())
    }

    /// A driver for a migration to here, and where its session's connections are handed in.
    fn incoming(&self, board: Arc<Board>, journal: MigrationJournal) -> (Incoming, Door) {
        let (arrivals, wants) = (Arc::<Arrivals>::default(), Arc::<Wants>::default());
        let peeks = Arc::<Peeks>::default();
        let link = Arrival::start(arrivals.clone(), wants.clone(), peeks.clone());
        let door = link.door();
        let incoming = Incoming::new(incoming::Setup {
            host: self.host.clone(),
            machines: self.machines.clone(),
            migration: board.view().id,
            board,
            journal,
            link,
            arrivals,
            wants,
            peeks,
        });
        (incoming, door)
    }

    /// Lets the peer's connections of the session in, for as long as the driver, which begins now, runs.
    fn let_in(self: &Arc<Self>, session: SessionId, peer: Bound, door: Door, incoming: Incoming) {
        let peer = peer.key;
        self.sessions().insert(session, Session { peer, door });
        let daemon = self.clone();
        tokio::spawn(async move {
            incoming.run().await;
            daemon.sessions().remove(&session);
        });
    }

    /// Dials the peer for one session.
    pub fn dialler(&self, peer: Bound, session: SessionId) -> Arc<Dialler> {
        let host = &self.host;
        Arc::new(Dialler::new(
            host.identity.clone(),
            host.trust.clone(),
            host.name.clone(),
            peer,
            session,
        ))
    }
}
