//! Reaching a peer: TCP, TLS, greeting, each with its own errors.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use whimbrel_wire::frame::{self, Decoder, Kind};

use crate::connection::{Agreed, Connection, ReadFault, Remote, read_frame};
use crate::error::PeerError;
use crate::hello::{Answer, Class, Hello, HelloFault, Refusal};
use crate::identity::Identity;
use crate::key_id::KeyId;
use crate::socket::{self, SocketReport, SocketSettings};
use crate::tls::{self, ExpectedKey};
use crate::trust::{Peer, PeerAddress, PeerName};

/// The most addresses of one host name that are tried; others are left out.
const MAX_RESOLVED: usize = 8;

/// How connections are dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialSettings {
    /// How long each address has to answer at all, its name being looked up included.
    pub connect_within: Duration,
    /// How long TLS and the greeting may take after that.
    pub greet_within: Duration,
    /// How sockets are set up.
    pub sockets: SocketSettings,
}

impl Default for DialSettings {
    fn default() -> Self {
        DialSettings {
            connect_within: Duration::from_secs(10),
            greet_within: Duration::from_secs(15),
            sockets: SocketSettings::default(),
        }
    }
}

/// Dials the peer at each of its addresses in turn, until one answers as that peer.
pub async fn dial_peer(
    identity: &Identity,
    name: &PeerName,
    peer: &Peer,
    hello: &Hello,
    settings: &DialSettings,
) -> Result<Connection, PeerError> {
    let mut attempts = Vec::new();
    for address in &peer.addresses {
        match dial(address, identity, name, peer.key, hello, settings).await {
            Ok(connection) => return Ok(connection),
            Err(error) => attempts.push((address.clone(), error)),
        }
    }
    match attempts.len() {
        0 => Err(PeerError::NoAddress { name: name.clone() }),
        1 => Err(attempts.remove(0).1),
        _ => Err(PeerError::EveryAddressFailed {
            name: name.clone(),
            attempts,
        }),
    }
}

/// Dials one address and accepts nobody but the holder of `key`. Not to be retried at once: see
/// [`PeerError::may_pass`] and [`Backoff`](crate::backoff::Backoff).
pub async fn dial(
    address: &PeerAddress,
    identity: &Identity,
    name: &PeerName,
    key: KeyId,
    hello: &Hello,
    settings: &DialSettings,
) -> Result<Connection, PeerError> {
    let greeting = hello.to_bytes().map_err(PeerError::OwnGreeting)?;
    let (tcp, addr, sockets) = connect(address, name, hello.class, settings).await?;
    let verifier = ExpectedKey::new(key);
    let config = tls::client_config(identity, verifier.clone(), tls::ALPN)?;
    let shaking = async {
        let error = |e| tls::dial_error(e, name, addr, identity.key_id(), &verifier);
        let connecting = TlsConnector::from(config).connect(tls::unused_server_name(), tcp);
        let mut stream = connecting.await.map_err(error)?;
        let mut unread = BytesMut::new();
        let answer = match greet(&mut stream, &greeting, &mut unread).await {
            Ok(answer) => answer,
            Err(ReadFault::Io(e)) => return Err(error(e)),
            Err(fault) => return Err(fault.with(name, addr)),
        };
        let (remote, agreed) = judge(&answer, hello, name, key, addr)?;
        Ok(Connection {
            stream: stream.into(),
            unread,
            remote: Arc::new(remote),
            agreed,
            sockets,
            tie: None,
        })
    };
    let after = settings.greet_within;
    timeout(after, shaking)
        .await
        .unwrap_or(Err(PeerError::HandshakeTimedOut { addr, after }))
}

pub(crate) async fn connect(
    address: &PeerAddress,
    name: &PeerName,
    class: Class,
    settings: &DialSettings,
) -> Result<(TcpStream, SocketAddr, SocketReport), PeerError> {
    let unresolved = |source| PeerError::Resolve {
        name: name.clone(),
        address: address.clone(),
        source,
    };
    let looking_up = timeout(
        settings.connect_within,
        tokio::net::lookup_host(address.as_str()),
    );
    let found = looking_up
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(unresolved)?;
    let mut failed = unresolved(io::ErrorKind::NotFound.into());
    for addr in found.take(MAX_RESOLVED) {
        match connect_to(addr, class, settings).await {
            Ok((tcp, report)) => return Ok((tcp, addr, report)),
            Err(source) => failed = connect_error(source, name, addr, settings.connect_within),
        }
    }
    Err(failed)
}

async fn connect_to(
    addr: SocketAddr,
    class: Class,
    settings: &DialSettings,
) -> io::Result<(TcpStream, SocketReport)> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    let report = socket::set_up(&socket, class, &settings.sockets);
    let connecting = timeout(settings.connect_within, socket.connect(addr));
    let tcp = connecting
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    Ok((tcp, report))
}

fn connect_error(
    source: io::Error,
    name: &PeerName,
    addr: SocketAddr,
    after: Duration,
) -> PeerError {
    let name = name.clone();
    match source.kind() {
        io::ErrorKind::ConnectionRefused => PeerError::ConnectRefused { name, addr },
        io::ErrorKind::TimedOut => PeerError::ConnectTimedOut { name, addr, after },
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
            PeerError::Unreachable { name, addr, source }
        }
        _ => PeerError::Connect { name, addr, source },
    }
}

/// Says hello and hears the answer.
pub(crate) async fn greet(
    stream: &mut TlsStream<TcpStream>,
    greeting: &[u8],
    unread: &mut BytesMut,
) -> Result<Vec<u8>, ReadFault> {
    let mut out = BytesMut::new();
    frame::encode(Kind::Hello, 0, greeting, &mut out).map_err(ReadFault::Frame)?;
    // A server that does not trust this host may have hung up by now, so that writing fails while
    // its alert waits to be read: what is read counts.
    let written = match stream.write_all(&out).await {
        Ok(()) => stream.flush().await,
        failed => failed,
    };
    match read_frame(stream, &mut Decoder::default(), unread).await {
        Ok(frame) if frame.kind == Kind::Hello => Ok(frame.payload.to_vec()),
        // Not a greeting, and so no JSON either.
        Ok(_) => Ok(Vec::new()),
        Err(ReadFault::Closed) => match written {
            Err(error) => Err(ReadFault::Io(error)),
            Ok(()) => Err(ReadFault::Closed),
        },
        Err(fault) => Err(fault),
    }
}

fn judge(
    answer: &[u8],
    hello: &Hello,
    name: &PeerName,
    key: KeyId,
    addr: SocketAddr,
) -> Result<(Remote, Agreed), PeerError> {
    let name = name.clone();
    let ours = &hello.speaker;
    let answer = match answer {
        [] => Err(HelloFault::NotAGreeting),
        bytes => Answer::from_bytes(bytes),
    };
    match answer {
        Err(fault) => Err(PeerError::Greeting { name, addr, fault }),
        Ok(Answer::Refused(Refusal::Versions(theirs))) => Err(PeerError::NoCommonVersion {
            name,
            addr,
            ours: ours.versions,
            theirs,
        }),
        Ok(Answer::Refused(refusal)) => Err(PeerError::Refused {
            name,
            addr,
            class: hello.class,
            refusal,
        }),
        Ok(Answer::Welcome(welcome)) => {
            let theirs = welcome.speaker.versions;
            match ours.versions.highest_common(theirs) {
                None => Err(PeerError::NoCommonVersion {
                    name,
                    addr,
                    ours: ours.versions,
                    theirs,
                }),
                Some(expected) if expected != welcome.version => {
                    Err(PeerError::WrongVersionChosen {
                        name,
                        addr,
                        chosen: welcome.version,
                        expected,
                    })
                }
                Some(version) => {
                    let agreed = Agreed {
                        version,
                        features: ours.features & welcome.speaker.features,
                    };
                    let remote = Remote {
                        name,
                        key,
                        addr,
                        speaker: welcome.speaker,
                    };
                    Ok((remote, agreed))
                }
            }
        }
    }
}
