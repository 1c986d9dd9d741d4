//! Being reached, by strangers too.
//!
//! Each socket that comes in gets a task of its own for TLS and greeting, bounded in time, so that
//! one that says nothing, little or nonsense delays nobody. Their number is bounded in all and by
//! address. At a bound the *oldest* unfinished handshake, of that address or of all, is dropped: real
//! peers finish in a few round trips, whereas who holds sockets open is the oldest soon.
//!
//! What is refused is refused in a way that can be read: after an alert or a refusal the socket is
//! kept for a moment and what still comes is thrown away, because closing a socket with unread bytes
//! makes the kernel send a reset, which may overtake the words.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use whimbrel_wire::frame::{self, Decoder, Kind};

use crate::connection::{Agreed, Connection, ReadFault, Remote, read_frame};
use crate::error::PeerError;
use crate::hello::{Answer, Class, Hello, HelloFault, Refusal, Speaker, VersionRange, Welcome};
use crate::identity::Identity;
use crate::invitation::Invitations;
use crate::join::Desk;
use crate::key_id::KeyId;
use crate::socket::{self, SocketSettings};
use crate::tls::{self, ClientKeys};
use crate::trust::{PeerName, TrustStore};

/// Connections that wait for [`Listener::accept`]. At the bound further ones wait unwelcomed until
/// their time is up, and are then refused as [`Refusal::Busy`].
const ARRIVALS: usize = 64;

/// Failures that wait for [`Listener::accept`]. At the bound further ones are only counted.
const FAILURES: usize = 64;

/// Sockets that wait in the kernel; the kernel drops further ones, who try again.
const BACKLOG: u32 = 256;

/// How long, and for how many bytes, a refused client is heard out.
const HEAR_OUT: Duration = Duration::from_secs(2);
const HEAR_OUT_BYTES: u64 = 64 << 10;

/// How long the listener waits after the kernel refused it a socket, for lack of descriptors mostly.
const AFTER_ACCEPT_ERROR: Duration = Duration::from_millis(100);

/// Whether a trusted peer's connection is wanted; the error is the reason, a sentence the peer's
/// operator reads.
pub type Admission = Arc<dyn Fn(&PeerName, KeyId, &Hello) -> Result<(), String> + Send + Sync>;

/// How connections are accepted.
#[derive(Clone)]
pub struct ListenSettings {
    /// How long TLS and greeting may take.
    pub greet_within: Duration,
    /// Handshakes under way at once, from all addresses.
    pub unfinished: usize,
    /// Handshakes under way at once from one address. At least as many as a peer dials at once.
    pub unfinished_by_address: usize,
    /// How sockets are set up.
    pub sockets: SocketSettings,
    /// Asked of every peer before it is welcomed; `None` welcomes every trusted peer.
    pub admission: Option<Admission>,
    /// What strangers may join by; `None` lets nobody join.
    pub invitations: Option<Invitations>,
}

impl Default for ListenSettings {
    fn default() -> Self {
        ListenSettings {
            greet_within: Duration::from_secs(15),
            unfinished: 256,
            unfinished_by_address: 64,
            sockets: SocketSettings::default(),
            admission: None,
            invitations: None,
        }
    }
}

impl fmt::Debug for ListenSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ListenSettings")
            .field("greet_within", &self.greet_within)
            .field("unfinished", &self.unfinished)
            .field("unfinished_by_address", &self.unfinished_by_address)
            .field("sockets", &self.sockets)
            .field("admission", &self.admission.is_some())
            .field("invitations", &self.invitations)
            .finish()
    }
}

/// A trusted peer's connection, welcomed.
#[derive(Debug)]
pub struct Accepted {
    /// Who came.
    pub peer: PeerName,
    /// What it said.
    pub hello: Hello,
    /// The connection.
    pub connection: Connection,
}

/// A listening socket. Dropping it closes it and all handshakes under way; connections stay.
#[derive(Debug)]
pub struct Listener {
    local: SocketAddr,
    arrivals: mpsc::Receiver<Accepted>,
    failures: mpsc::Receiver<PeerError>,
    untold: Arc<AtomicU64>,
    task: AbortHandle,
}

impl Listener {
    /// Listens at `addr`; port 0 lets the kernel choose. `us` is what this host says of itself.
    pub async fn bind(
        addr: SocketAddr,
        identity: Identity,
        trust: TrustStore,
        us: Speaker,
        settings: ListenSettings,
    ) -> Result<Listener, PeerError> {
        let check = Answer::Welcome(Welcome {
            version: us.versions.max,
            speaker: us.clone(),
        });
        check.to_bytes().map_err(PeerError::OwnGreeting)?;
        let listener = listen(addr).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => PeerError::PortInUse { addr },
            io::ErrorKind::AddrNotAvailable => PeerError::NoSuchAddress { addr },
            _ => PeerError::Bind { addr, source },
        })?;
        let local = listener
            .local_addr()
            .map_err(|source| PeerError::Bind { addr, source })?;
        let (arrived, arrivals) = mpsc::channel(ARRIVALS);
        let (failed, failures) = mpsc::channel(FAILURES);
        let untold = Arc::new(AtomicU64::new(0));
        let door = Arc::new(Door {
            identity,
            trust,
            us,
            settings,
            arrived,
            failed,
            untold: untold.clone(),
        });
        let task = tokio::spawn(door.keep(listener, local)).abort_handle();
        Ok(Listener {
            local,
            arrivals,
            failures,
            untold,
            task,
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The next connection of a trusted peer. An error tells of one client that was refused, or of
    /// the kernel refusing a socket: the listener goes on, except after
    /// [`PeerError::ListenerClosed`]. Cancel-safe.
    pub async fn accept(&mut self) -> Result<Accepted, PeerError> {
        tokio::select! {
            biased;
            arrival = self.arrivals.recv() => arrival.ok_or(PeerError::ListenerClosed),
            Some(failure) = self.failures.recv() => Err(failure),
        }
    }

    /// Failures that were not told because nobody called [`accept`](Self::accept) in time.
    pub fn untold(&self) -> u64 {
        self.untold.load(Ordering::Relaxed)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // So that a daemon that restarts finds its port free although old connections linger.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

struct Unfinished {
    id: Id,
    addr: SocketAddr,
    task: AbortHandle,
}

/// The handshakes under way, oldest first.
#[derive(Default)]
struct Handshakes(VecDeque<Unfinished>);

impl Handshakes {
    /// Drops the oldest handshake for one that comes from `ip`, where a bound asks for it.
    fn make_room(&mut self, ip: IpAddr, settings: &ListenSettings) -> Option<SocketAddr> {
        // Those that ended by themselves and were not yet reaped need not be dropped.
        self.0.retain(|u| !u.task.is_finished());
        let of_ip = self.0.iter().filter(|u| u.addr.ip() == ip).count();
        let oldest = if of_ip >= settings.unfinished_by_address.max(1) {
            self.0.iter().position(|u| u.addr.ip() == ip)?
        } else if self.0.len() >= settings.unfinished.max(1) {
            0
        } else {
            return None;
        };
        let dropped = self.0.remove(oldest)?;
        dropped.task.abort();
        Some(dropped.addr)
    }

    fn finished(&mut self, id: Id) {
        self.0.retain(|u| u.id != id);
    }
}

/// What every handshake needs.
struct Door {
    identity: Identity,
    trust: TrustStore,
    us: Speaker,
    settings: ListenSettings,
    arrived: mpsc::Sender<Accepted>,
    failed: mpsc::Sender<PeerError>,
    untold: Arc<AtomicU64>,
}

impl Door {
    async fn keep(self: Arc<Self>, listener: TcpListener, local: SocketAddr) {
        let mut tasks = JoinSet::new();
        let mut handshakes = Handshakes::default();
        loop {
            tokio::select! {
                Some(ended) = tasks.join_next_with_id() => match ended {
                    Ok((id, ())) => handshakes.finished(id),
                    Err(error) => handshakes.finished(error.id()),
                },
                came = listener.accept() => match came {
                    Ok((tcp, addr)) => {
                        let unfinished = handshakes.0.len();
                        if let Some(addr) = handshakes.make_room(addr.ip(), &self.settings) {
                            self.tell(PeerError::HandshakesFull { addr, unfinished });
                        }
                        let task = tasks.spawn(self.clone().receive(tcp, addr));
                        handshakes.0.push_back(Unfinished { id: task.id(), addr, task });
                    }
                    Err(source) => {
                        self.tell(PeerError::Accept { addr: local, source });
                        tokio::time::sleep(AFTER_ACCEPT_ERROR).await;
                    }
                },
            }
        }
    }

    fn tell(&self, error: PeerError) {
        tracing::debug!(%error, "connection refused");
        if self.failed.try_send(error).is_err() {
            self.untold.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn receive(self: Arc<Self>, tcp: TcpStream, addr: SocketAddr) {
        let after = self.settings.greet_within;
        let shaken = timeout(after, self.shake(tcp, addr)).await;
        let shaken = shaken.unwrap_or(Err(PeerError::HandshakeTimedOut { addr, after }));
        if let Err(error) = shaken {
            self.tell(error);
        }
    }

    async fn shake(&self, tcp: TcpStream, addr: SocketAddr) -> Result<(), PeerError> {
        // Nothing waits behind another packet of the handshake; the rest when the class is known.
        let _ = tcp.set_nodelay(true);
        let ours = self.identity.key_id();
        let nobody = ClientKeys::any();
        let mut waiting = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp);
        let start = match (&mut waiting).await {
            Ok(start) => start,
            Err(error) => {
                if let Some(tcp) = waiting.take_io() {
                    part(tcp).await;
                }
                return Err(tls::accept_error(error, addr, ours, &nobody));
            }
        };
        let offered = start.client_hello().alpn();
        let wants_to_join = offered.is_some_and(|mut all| all.any(|one| one == tls::JOIN_ALPN));
        let invitations = self.settings.invitations.as_ref().filter(|_| wants_to_join);
        let (verifier, alpn) = match invitations {
            Some(_) => (nobody, tls::JOIN_ALPN),
            None => (ClientKeys::trusted(self.trust.clone()), tls::ALPN),
        };
        let config = tls::server_config(&self.identity, verifier.clone(), alpn)?;
        let mut stream = match start.into_stream(config).into_fallible().await {
            Ok(stream) => stream,
            Err((error, tcp)) => {
                part(tcp).await;
                return Err(tls::accept_error(error, addr, ours, &verifier));
            }
        };
        let key = verifier.key(addr)?;
        if let Some(invitations) = invitations {
            return self.let_join(stream, key, addr, invitations).await;
        }
        // It was trusted a moment ago.
        let presented = key;
        let name = self.trust.name_of(&key);
        let name = name.ok_or(PeerError::UnknownKey { addr, presented })?;

        let mut unread = BytesMut::new();
        let said = read_frame(&mut stream, &mut Decoder::default(), &mut unread).await;
        let said = said.map_err(|fault| match fault {
            ReadFault::Io(source) => PeerError::HandshakeBroken { addr, source },
            fault => fault.with(&name, addr),
        })?;
        let said = if said.kind == Kind::Hello {
            self.consider(&name, key, &said.payload)
        } else {
            Err(Rejection::Greeting(HelloFault::NotAGreeting))
        };
        let (hello, agreed, place) = match said {
            Err(rejection) => return Err(self.reject(stream, &name, addr, rejection).await),
            Ok((hello, agreed)) => {
                // Half of the time at most, so that some is left to say that it was in vain.
                let waiting = timeout(self.settings.greet_within / 2, self.arrived.reserve());
                match waiting.await {
                    Ok(Ok(place)) => (hello, agreed, place),
                    Ok(Err(_)) => return Err(PeerError::ListenerClosed),
                    Err(_) => {
                        let busy = Rejection::Peer(hello.class, Refusal::Busy);
                        return Err(self.reject(stream, &name, addr, busy).await);
                    }
                }
            }
        };
        let welcome = Answer::Welcome(Welcome {
            version: agreed.version,
            speaker: self.us.clone(),
        });
        let broken = |source| PeerError::HandshakeBroken { addr, source };
        say(&mut stream, &welcome).await.map_err(broken)?;
        let sockets = socket::set_up(stream.get_ref().0, hello.class, &self.settings.sockets);
        let remote = Remote {
            name: name.clone(),
            key,
            addr,
            speaker: hello.speaker.clone(),
        };
        let connection = Connection {
            stream: stream.into(),
            unread,
            remote: Arc::new(remote),
            agreed,
            sockets,
            tie: None,
        };
        place.send(Accepted {
            peer: name,
            hello,
            connection: connection.tied(&self.trust)?,
        });
        Ok(())
    }

    /// A stranger with an invitation, perhaps: one question, one answer, and never more.
    async fn let_join(
        &self,
        mut stream: TlsStream<TcpStream>,
        key: KeyId,
        addr: SocketAddr,
        invitations: &Invitations,
    ) -> Result<(), PeerError> {
        let desk = Desk {
            us: &self.us,
            key: self.identity.key_id(),
            trust: &self.trust,
            invitations,
        };
        let (answer, decided) = desk.hear(&mut stream, key, addr).await?;
        if let Ok(peer) = &decided {
            tracing::info!(%peer, %key, %addr, "a host has joined by an invitation and is trusted");
        }
        // Words that do not arrive change nothing here.
        if say_bytes(&mut stream, &answer).await.is_ok() {
            let _ = stream.shutdown().await;
            hear_out(&mut stream).await;
        }
        decided.map(|_| ())
    }

    /// Whether a known peer's greeting is answered with a welcome.
    fn consider(
        &self,
        name: &PeerName,
        key: KeyId,
        said: &[u8],
    ) -> Result<(Hello, Agreed), Rejection> {
        let theirs = Hello::versions_of(said).map_err(Rejection::Greeting)?;
        let version = self
            .us
            .versions
            .highest_common(theirs)
            .ok_or(Rejection::Versions(theirs))?;
        let hello = Hello::from_bytes(said).map_err(Rejection::Greeting)?;
        if let Some(admission) = &self.settings.admission {
            admission(name, key, &hello)
                .map_err(|why| Rejection::Peer(hello.class, Refusal::Unwanted(why)))?;
        }
        let features = self.us.features & hello.speaker.features;
        Ok((hello, Agreed { version, features }))
    }

    /// Tells the peer why it is refused; the error tells this side.
    async fn reject(
        &self,
        mut stream: TlsStream<TcpStream>,
        name: &PeerName,
        addr: SocketAddr,
        rejection: Rejection,
    ) -> PeerError {
        let name = name.clone();
        let (refusal, error) = match rejection {
            Rejection::Versions(theirs) => {
                let ours = self.us.versions;
                let error = PeerError::NoCommonVersion {
                    name,
                    addr,
                    ours,
                    theirs,
                };
                (Refusal::Versions(ours), error)
            }
            Rejection::Greeting(fault) => (
                Refusal::Greeting(fault.to_string()),
                PeerError::Greeting { name, addr, fault },
            ),
            Rejection::Peer(class, refusal) => {
                let error = PeerError::RefusedHere {
                    name,
                    addr,
                    class,
                    refusal: refusal.clone(),
                };
                (refusal, error)
            }
        };
        // Words that do not arrive change nothing here: the connection is refused.
        if say(&mut stream, &Answer::Refused(refusal)).await.is_ok() {
            let _ = stream.shutdown().await;
            hear_out(&mut stream).await;
        }
        error
    }
}

/// Why a known peer is not welcomed.
enum Rejection {
    Versions(VersionRange),
    Greeting(HelloFault),
    Peer(Class, Refusal),
}

async fn say(stream: &mut (impl AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    let bytes = answer.to_bytes().map_err(io::Error::other)?;
    say_bytes(stream, &bytes).await
}

async fn say_bytes(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    let mut out = BytesMut::new();
    frame::encode(Kind::Hello, 0, bytes, &mut out).map_err(io::Error::other)?;
    stream.write_all(&out).await?;
    stream.flush().await
}

/// Hangs up on a client whose handshake failed, after what TLS had to say about it.
async fn part(mut tcp: TcpStream) {
    let _ = tcp.shutdown().await;
    hear_out(&mut tcp).await;
}

/// Throws away what a refused client still sends, until it hangs up or has had its time.
async fn hear_out(stream: &mut (impl AsyncRead + Unpin)) {
    let mut rest = stream.take(HEAR_OUT_BYTES);
    let mut nowhere = tokio::io::sink();
    let _ = timeout(HEAR_OUT, tokio::io::copy(&mut rest, &mut nowhere)).await;
}
