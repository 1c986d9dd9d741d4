//! What can go wrong between two hosts, in words that tell an operator what to do about it.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use whimbrel_wire::frame::FrameError;

use crate::hello::{Class, HelloFault, Refusal, VersionRange};
use crate::invitation::{InvitationId, TokenFault};
use crate::join::JoinRefusal;
use crate::key_id::{KeyId, KeyIdFault};
use crate::trust::{AddressFault, NameFault, PeerAddress, PeerName};

/// What was being done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileStep {
    /// Reading it.
    Read,
    /// Writing it anew.
    Write,
    /// Taking the lock beside it.
    Lock,
}

impl std::fmt::Display for FileStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FileStep::Read => "read",
            FileStep::Write => "write",
            FileStep::Lock => "lock",
        })
    }
}

/// Which way frames were going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From this host to the peer.
    Sending,
    /// From the peer to this host.
    Receiving,
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Direction::Sending => "sending to",
            Direction::Receiving => "receiving from",
        })
    }
}

/// What is wrong with the file of a host's own key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityFault {
    /// No private key, or one that cannot be read.
    #[error("it has no readable private key")]
    NoKey,
    /// No certificate, or one that cannot be read.
    #[error("it has no readable certificate")]
    NoCertificate,
    /// The certificate is of another key, or of a kind that TLS cannot use.
    #[error("its key and certificate do not belong together, or are of an unknown kind: {0}")]
    Mismatch(rustls::Error),
}

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message of a variant is its documentation")]
pub enum PeerError {
    // Files.
    #[error("cannot {step} {}: {source}", path.display())]
    File {
        step: FileStep,
        path: PathBuf,
        source: io::Error,
    },

    // This host's own key.
    #[error("{} exists: this host has a key already, and a new one would make every peer that trusts it refuse it", path.display())]
    IdentityExists { path: PathBuf },
    #[error("this host has no key yet: {} does not exist", path.display())]
    IdentityMissing { path: PathBuf },
    #[error("{} holds this host's private key, but others than its owner may open it (mode {mode:04o}): if it may have been copied, remove it and make a new key, else run `chmod 600 {}`", path.display(), path.display())]
    IdentityExposed { path: PathBuf, mode: u32 },
    #[error("{} does not hold a host key: {fault}", path.display())]
    IdentityBroken { path: PathBuf, fault: IdentityFault },
    #[error("cannot make a host key: {0}")]
    IdentityMaking(rcgen::Error),

    // The trust store.
    #[error("{} is not a list of peers: {source}", path.display())]
    PeersSyntax {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("{} says whom to trust, but others than its owner may write it (mode {mode:04o}): check it, then run `chmod go-w {}`", path.display(), path.display())]
    PeersExposed { path: PathBuf, mode: u32 },
    #[error("'{name}' cannot be the name of a peer: {fault}")]
    PeerName { name: String, fault: NameFault },
    #[error("'{address}' is not the address of a peer: {fault}")]
    PeerAddress {
        address: String,
        fault: AddressFault,
    },
    #[error("'{text}' is not a host key's fingerprint: {fault}")]
    KeyId { text: String, fault: KeyIdFault },
    #[error("no peer is called '{name}'")]
    PeerUnknown { name: PeerName },
    #[error("a peer called '{name}' exists already, with key {key}")]
    PeerExists { name: PeerName, key: KeyId },
    #[error("key {key} is trusted already, as '{name}': one key is one host")]
    KeyTrusted { key: KeyId, name: PeerName },
    #[error("{found} peers, where {most} are the most")]
    TooManyPeers { found: usize, most: usize },
    #[error("'{name}' has {found} addresses, where {most} are the most")]
    TooManyAddresses {
        name: PeerName,
        found: usize,
        most: usize,
    },
    #[error("'{name}' has no address to reach it at")]
    NoAddress { name: PeerName },

    // Invitations.
    #[error("this is no invitation: {fault}")]
    Token { fault: TokenFault },
    #[error("{} is not a list of invitations: {source}", path.display())]
    InvitationsSyntax {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("an invitation is good for {least:?} to {most:?}")]
    InvitationLifetime { least: Duration, most: Duration },
    #[error("{most} invitations are open, the most at once")]
    TooManyInvitations { most: usize },
    #[error("this host has no invitation {id}")]
    InvitationUnknown { id: InvitationId },
    #[error("invitation {id} was used: '{name}' has joined by it")]
    InvitationUsed { id: InvitationId, name: PeerName },
    #[error("it is not known at which address others reach this host")]
    NoOwnAddress,
    #[error("the system gives no random numbers")]
    NoRandomness,
    #[error("this invitation is this host's own: it is for another host to join this one")]
    OwnInvitation,
    #[error(
        "the host that invites would be '{name}' here, and another host is called so, with key {key}"
    )]
    NameTakenHere { name: PeerName, key: KeyId },
    #[error(
        "the host that invites, '{known}' here, is to be called '{asked}': one key has one name"
    )]
    KnownByAnotherName { known: PeerName, asked: PeerName },
    #[error("'{name}' at {addr} takes no invitations: its daemon is of an older version")]
    NotInviting { name: PeerName, addr: SocketAddr },
    #[error("'{name}' at {addr} does not let this host join: {refusal}")]
    JoinRefused {
        name: PeerName,
        addr: SocketAddr,
        refusal: JoinRefusal,
    },
    #[error("the host at {addr} with key {presented} was not let join: {refusal}")]
    JoinRefusedHere {
        addr: SocketAddr,
        presented: KeyId,
        refusal: JoinRefusal,
    },

    #[error("'{name}', the host with key {key}, is trusted here no more")]
    TrustWithdrawn { name: PeerName, key: KeyId },

    // Reaching a peer.
    #[error("cannot find the address of '{name}': {address}: {source}")]
    Resolve {
        name: PeerName,
        address: PeerAddress,
        source: io::Error,
    },
    #[error(
        "nothing listens at {addr}, where '{name}' should be: is the daemon there running, and is this its port?"
    )]
    ConnectRefused { name: PeerName, addr: SocketAddr },
    #[error(
        "'{name}' at {addr} did not answer within {after:?}: the host or the way to it is down, or a firewall drops the connection"
    )]
    ConnectTimedOut {
        name: PeerName,
        addr: SocketAddr,
        after: Duration,
    },
    #[error("there is no way to '{name}' at {addr}: {source}")]
    Unreachable {
        name: PeerName,
        addr: SocketAddr,
        source: io::Error,
    },
    #[error("cannot connect to '{name}' at {addr}: {source}")]
    Connect {
        name: PeerName,
        addr: SocketAddr,
        source: io::Error,
    },
    #[error("'{name}' cannot be reached at any of its {} addresses: {}", attempts.len(), join(attempts))]
    EveryAddressFailed {
        name: PeerName,
        attempts: Vec<(PeerAddress, PeerError)>,
    },

    // Being reached.
    #[error("cannot listen at {addr}: the port is in use, perhaps by another daemon")]
    PortInUse { addr: SocketAddr },
    #[error("cannot listen at {addr}: this host has no such address")]
    NoSuchAddress { addr: SocketAddr },
    #[error("cannot listen at {addr}: {source}")]
    Bind { addr: SocketAddr, source: io::Error },
    #[error("cannot take a connection in at {addr}: {source}")]
    Accept { addr: SocketAddr, source: io::Error },
    #[error(
        "{addr} was dropped unfinished: {unfinished} handshakes were under way, the most at once"
    )]
    HandshakesFull { addr: SocketAddr, unfinished: usize },
    #[error("the listener has been closed")]
    ListenerClosed,

    // Knowing each other.
    #[error(
        "the peer at {addr} presented key {presented}, but host '{name}' is trusted with key {expected}: either '{name}' was given a new key, or another host answers at its address. Compare with what `whimbrel host show` says there before trusting it"
    )]
    WrongKey {
        addr: SocketAddr,
        name: PeerName,
        presented: KeyId,
        expected: KeyId,
    },
    #[error(
        "'{name}' at {addr} does not trust this host: it has no peer with this host's key {ours}"
    )]
    NotTrusted {
        name: PeerName,
        addr: SocketAddr,
        ours: KeyId,
    },
    #[error("'{name}' at {addr} saw no key from this host")]
    KeyNotSeen { name: PeerName, addr: SocketAddr },
    #[error("the host at {addr} presented key {presented}, which is no trusted peer's")]
    UnknownKey { addr: SocketAddr, presented: KeyId },
    #[error("the client at {addr} presented no key")]
    NoKeyPresented { addr: SocketAddr },
    #[error(
        "the client at {addr} hung up because it expected another key than this host's, {ours}"
    )]
    NotExpected { addr: SocketAddr, ours: KeyId },
    #[error("what {addr} sends is not TLS: it is no Whimbrel daemon")]
    NotTls { addr: SocketAddr },
    #[error("{addr} did not finish the handshake within {after:?}")]
    HandshakeTimedOut { addr: SocketAddr, after: Duration },
    #[error("{addr} broke the connection off during the handshake: {source}")]
    HandshakeBroken { addr: SocketAddr, source: io::Error },
    #[error("no secure connection with {addr}: {source}")]
    Tls {
        addr: SocketAddr,
        source: rustls::Error,
    },
    #[error("TLS cannot be set up: {0}")]
    TlsSetup(rustls::Error),

    // Greeting each other.
    #[error(
        "'{name}' at {addr} speaks protocol versions {theirs}, this host {ours}: none is common, update the older of the two"
    )]
    NoCommonVersion {
        name: PeerName,
        addr: SocketAddr,
        ours: VersionRange,
        theirs: VersionRange,
    },
    #[error("'{name}' at {addr} chose protocol version {chosen}, where {expected} was due")]
    WrongVersionChosen {
        name: PeerName,
        addr: SocketAddr,
        chosen: u16,
        expected: u16,
    },
    #[error("'{name}' at {addr} refused the {class} connection: {refusal}")]
    Refused {
        name: PeerName,
        addr: SocketAddr,
        class: Class,
        refusal: Refusal,
    },
    #[error("the {class} connection of '{name}' at {addr} was refused: {refusal}")]
    RefusedHere {
        name: PeerName,
        addr: SocketAddr,
        class: Class,
        refusal: Refusal,
    },
    #[error("the greeting of '{name}' at {addr} cannot be understood: {fault}")]
    Greeting {
        name: PeerName,
        addr: SocketAddr,
        fault: HelloFault,
    },
    #[error("this host's greeting cannot be sent: {0}")]
    OwnGreeting(HelloFault),

    // Frames.
    #[error("'{name}' at {addr} sent a frame that cannot be used: {source}")]
    BadFrame {
        name: PeerName,
        addr: SocketAddr,
        source: FrameError,
    },
    #[error("a frame for '{name}' at {addr} cannot be sent: {source}")]
    FrameRefused {
        name: PeerName,
        addr: SocketAddr,
        source: FrameError,
    },
    #[error("'{name}' at {addr} greeted again on an established connection")]
    GreetedAgain { name: PeerName, addr: SocketAddr },
    #[error("'{name}' at {addr} closed the connection")]
    Closed { name: PeerName, addr: SocketAddr },
    #[error("the connection with '{name}' at {addr} ended in the middle of a frame")]
    Torn { name: PeerName, addr: SocketAddr },
    #[error("the connection broke while {direction} '{name}' at {addr}: {source}")]
    Broken {
        name: PeerName,
        addr: SocketAddr,
        direction: Direction,
        source: io::Error,
    },
}

fn join(attempts: &[(PeerAddress, PeerError)]) -> String {
    attempts
        .iter()
        .map(|(_, error)| error.to_string())
        .collect::<Vec<_>>()
        .join("; ")
}

impl PeerError {
    /// Whether trying again may help without anybody changing anything: true of links and hosts that
    /// are down, false of keys, versions, refusals and files. After a `false`, reconnecting is for
    /// the operator to order; a backoff would only fill logs.
    pub fn may_pass(&self) -> bool {
        match self {
            PeerError::Resolve { .. }
            | PeerError::ConnectRefused { .. }
            | PeerError::ConnectTimedOut { .. }
            | PeerError::Unreachable { .. }
            | PeerError::Connect { .. }
            | PeerError::Accept { .. }
            | PeerError::HandshakesFull { .. }
            | PeerError::HandshakeTimedOut { .. }
            | PeerError::HandshakeBroken { .. }
            | PeerError::Closed { .. }
            | PeerError::Torn { .. }
            | PeerError::BadFrame { .. }
            | PeerError::Broken { .. } => true,
            PeerError::Refused { refusal, .. } => *refusal == Refusal::Busy,
            PeerError::EveryAddressFailed { attempts, .. } => {
                attempts.iter().any(|(_, error)| error.may_pass())
            }
            _ => false,
        }
    }
}
