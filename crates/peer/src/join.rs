//! Joining: two hosts that have never met come to trust each other by one invitation.
//!
//! ```text
//! joining host                                   inviting host
//! TLS 1.3, ALPN "whimbrel-join"           <-->   each presents its key; the joining side pins the key
//!                                                in the token, the inviting side takes any
//! hello {speaker, join: {invitation, proof, name, addresses}}  -->
//!                                                looks the invitation up, checks the proof, the time and
//!                                                the name; marks it used; trusts the joining key
//!                                         <--    hello {"joined": …} or {"refused": …}
//! trusts the inviting key
//! ```
//!
//! The two marks are made in an order in which a crash or a broken line between them costs at most a
//! repetition: used, trusted there, trusted here. The same host may then come again with the same token
//! ([`Invitations`]).
//!
//! Trap: the inviting side has let a key through TLS that it does not trust. So a connection of this kind
//! carries one question and one answer, and never becomes anything else; which kind it is was decided by
//! the ALPN of the client's hello, before its key was looked at.

use std::fmt;
use std::net::SocketAddr;

use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsConnector, server};
use whimbrel_wire::frame::{Decoder, Kind};

use crate::connection::{ReadFault, read_frame_of};
use crate::dial::{self, DialSettings};
use crate::error::PeerError;
use crate::hello::{self, Class, HelloFault, MAX_HELLO, Speaker, VersionRange};
use crate::identity::Identity;
use crate::invitation::{
    Claim, EXPORT_LABEL, Invitation, InvitationId, Invitations, Joining, MAX_TOKEN_ADDRESSES,
    Proof, Token, now,
};
use crate::key_id::KeyId;
use crate::rights::Rights;
use crate::tls::{self, ExpectedKey};
use crate::trust::{MAX_PEERS, Peer, PeerAddress, PeerName, TrustStore};

/// Why a host is not let join. What became of an invitation is told only after a good proof.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JoinRefusal {
    /// No invitation has this number, or not any more.
    Unknown,
    /// The proof is wrong.
    Wrong {
        /// Wrong proofs that the invitation still bears.
        left: u32,
    },
    /// Too many proofs were wrong.
    Void,
    /// Its time was over.
    Expired {
        /// Since so many seconds.
        seconds: u64,
    },
    /// A host has joined by it.
    Used,
    /// The operator took it back.
    Cancelled,
    /// Another host is called so at the inviting host.
    NameTaken {
        /// The name.
        name: PeerName,
    },
    /// The inviting host trusts as many as it can.
    Full,
    /// No protocol version is common; the range is the inviting side's.
    Versions(VersionRange),
    /// The question cannot be understood.
    Greeting(String),
    /// The inviting host cannot write down what it decided.
    Failed,
}

impl fmt::Display for JoinRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JoinRefusal::Unknown => f.write_str("it has no such invitation, or has none any more"),
            JoinRefusal::Wrong { left } => write!(
                f,
                "the secret in the invitation is wrong, and after {left} more wrong ones it is void"
            ),
            JoinRefusal::Void => {
                f.write_str("the invitation is void: too many came with a wrong secret")
            }
            JoinRefusal::Expired { seconds } => {
                write!(f, "the invitation expired {seconds} s ago")
            }
            JoinRefusal::Used => {
                f.write_str("the invitation was used already; one is for one host to join, once")
            }
            JoinRefusal::Cancelled => f.write_str("the invitation was cancelled there"),
            JoinRefusal::NameTaken { name } => {
                write!(f, "another host is called '{name}' there")
            }
            JoinRefusal::Full => f.write_str("it trusts as many hosts as it can"),
            JoinRefusal::Versions(range) => write!(f, "it speaks protocol versions {range}"),
            JoinRefusal::Greeting(why) => write!(f, "the question cannot be understood: {why}"),
            JoinRefusal::Failed => {
                f.write_str("it cannot write down whom it trusts; its daemon's log says why")
            }
        }
    }
}

/// What the joining side says.
#[derive(Serialize, Deserialize)]
struct Question {
    #[serde(flatten)]
    speaker: Speaker,
    join: Ask,
}

#[derive(Serialize, Deserialize)]
struct Ask {
    invitation: InvitationId,
    proof: Proof,
    /// What the joining host wants to be called.
    name: PeerName,
    /// Where it listens.
    addresses: Vec<PeerAddress>,
    /// It trusts the inviting host already.
    knows_you: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Joined(Welcome),
    Refused(JoinRefusal),
}

#[derive(Serialize, Deserialize)]
struct Welcome {
    /// What the joining host is called there.
    name: PeerName,
    #[serde(flatten)]
    speaker: Speaker,
}

/// Who joins, and as what.
#[derive(Clone, Debug)]
pub struct JoinRequest {
    /// The invitation.
    pub token: Token,
    /// What the inviting host is to be called here; what it calls itself if there is nothing.
    pub called: Option<PeerName>,
    /// What it may do here.
    pub may: Rights,
    /// What this host says of itself.
    pub speaker: Speaker,
    /// What it wants to be called there.
    pub name: PeerName,
    /// Where it listens. If empty: the address by which it reaches the inviting host.
    pub addresses: Vec<PeerAddress>,
    /// The port that goes with that address.
    pub port: u16,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// What the inviting host is called here.
    pub name: PeerName,
    /// What is known of it now.
    pub peer: Peer,
    /// What this host is called there.
    pub name_there: PeerName,
}

/// Joins the host that made the invitation, and trusts it.
///
/// # Errors
/// Nothing is changed here. [`PeerError::JoinRefused`] if the inviting host decided so;
/// [`PeerError::OwnInvitation`], [`PeerError::NameTakenHere`], [`PeerError::KnownByAnotherName`] before
/// anybody is asked.
pub async fn join(
    identity: &Identity,
    trust: &TrustStore,
    request: &JoinRequest,
    settings: &DialSettings,
) -> Result<Joined, PeerError> {
    let token = &request.token;
    if token.key == identity.key_id() {
        return Err(PeerError::OwnInvitation);
    }
    trust.reload()?;
    let known = trust.name_of(&token.key);
    let name = name_here(trust, request, known.as_ref())?;
    let mut attempts = Vec::new();
    for address in &token.addresses {
        let asking = ask(identity, request, &name, known.is_some(), address, settings);
        match asking.await {
            Ok(welcome) => {
                // The one that answered is the first to be tried from now on.
                let others = token.addresses.iter().filter(|other| *other != address);
                let addresses = std::iter::once(address).chain(others);
                let peer = Peer {
                    key: token.key,
                    addresses: addresses.cloned().collect(),
                    may: request.may,
                };
                let name = trust.admit(name, peer.clone())?;
                return Ok(Joined {
                    name,
                    peer,
                    name_there: welcome.name,
                });
            }
            // It was reached and has decided: another way to it leads to the same answer.
            Err(refused @ PeerError::JoinRefused { .. }) => return Err(refused),
            Err(error) => attempts.push((address.clone(), error)),
        }
    }
    match attempts.len() {
        0 => Err(PeerError::NoAddress { name }),
        1 => Err(attempts.remove(0).1),
        _ => Err(PeerError::EveryAddressFailed { name, attempts }),
    }
}

/// What the inviting host is going to be called, if that can be.
fn name_here(
    trust: &TrustStore,
    request: &JoinRequest,
    known: Option<&PeerName>,
) -> Result<PeerName, PeerError> {
    let asked = request.called.as_ref().unwrap_or(&request.token.name);
    if let Some(known) = known {
        if request.called.is_some() && known != asked {
            return Err(PeerError::KnownByAnotherName {
                known: known.clone(),
                asked: asked.clone(),
            });
        }
        return Ok(known.clone());
    }
    match trust.get(asked) {
        Ok(other) => Err(PeerError::NameTakenHere {
            name: asked.clone(),
            key: other.key,
        }),
        Err(_) => Ok(asked.clone()),
    }
}

/// Asks at one address.
async fn ask(
    identity: &Identity,
    request: &JoinRequest,
    name: &PeerName,
    knows_you: bool,
    address: &PeerAddress,
    settings: &DialSettings,
) -> Result<Welcome, PeerError> {
    let token = &request.token;
    let (tcp, addr, _) = dial::connect(address, name, Class::Control, settings).await?;
    let own = tcp
        .local_addr()
        .map(|own| SocketAddr::new(own.ip(), request.port));
    let verifier = ExpectedKey::new(token.key);
    let config = tls::client_config(identity, verifier.clone(), tls::JOIN_ALPN)?;
    let shaking = async {
        let error = |e| tls::dial_error(e, name, addr, identity.key_id(), &verifier);
        let connecting = TlsConnector::from(config).connect(tls::unused_server_name(), tcp);
        let mut stream = connecting.await.map_err(error)?;
        let claim = Claim {
            exported: exported(stream.get_ref().1, addr)?,
            inviting: token.key,
            joining: identity.key_id(),
            id: token.id,
        };
        let addresses = match (&request.addresses[..], own) {
            ([], Ok(own)) => vec![own.into()],
            (given, _) => given.to_vec(),
        };
        let question = Question {
            speaker: request.speaker.clone(),
            join: Ask {
                invitation: token.id,
                proof: Proof::new(&token.secret, &claim).map_err(PeerError::TlsSetup)?,
                name: request.name.clone(),
                addresses,
                knows_you,
            },
        };
        let said = hello::to_json(&question);
        let answer = match dial::greet(&mut stream, &said, &mut BytesMut::new()).await {
            Ok(answer) => answer,
            Err(ReadFault::Io(e)) => return Err(error(e)),
            Err(fault) => return Err(fault.with(name, addr)),
        };
        let reply = match answer.as_slice() {
            [] => Err(HelloFault::NotAGreeting),
            bytes => hello::from_json(bytes),
        };
        let not_understood = |fault| PeerError::Greeting {
            name: name.clone(),
            addr,
            fault,
        };
        match reply.map_err(not_understood)? {
            Reply::Joined(welcome) => Ok(welcome),
            Reply::Refused(JoinRefusal::Versions(theirs)) => Err(PeerError::NoCommonVersion {
                name: name.clone(),
                addr,
                ours: request.speaker.versions,
                theirs,
            }),
            Reply::Refused(refusal) => Err(PeerError::JoinRefused {
                name: name.clone(),
                addr,
                refusal: printable(refusal),
            }),
        }
    };
    let after = settings.greet_within;
    timeout(after, shaking)
        .await
        .unwrap_or(Err(PeerError::HandshakeTimedOut { addr, after }))
}

/// A refusal whose words do not disturb a terminal.
fn printable(refusal: JoinRefusal) -> JoinRefusal {
    match refusal {
        JoinRefusal::Greeting(why) => {
            let plain = why.chars().filter(|c| !c.is_control());
            JoinRefusal::Greeting(plain.take(200).collect())
        }
        other => other,
    }
}

/// What both ends of a TLS session, and nobody else, can derive from it.
fn exported<Data>(
    session: &rustls::ConnectionCommon<Data>,
    addr: SocketAddr,
) -> Result<[u8; 32], PeerError> {
    session
        .export_keying_material([0; 32], EXPORT_LABEL, None)
        .map_err(|source| PeerError::Tls { addr, source })
}

/// What the inviting side decides by.
pub(crate) struct Desk<'a> {
    pub(crate) us: &'a Speaker,
    pub(crate) key: KeyId,
    pub(crate) trust: &'a TrustStore,
    pub(crate) invitations: &'a Invitations,
}

impl Desk<'_> {
    /// Hears who wants to join and decides. What is to be answered, and what this side tells of it.
    pub(crate) async fn hear(
        &self,
        stream: &mut server::TlsStream<TcpStream>,
        joining: KeyId,
        addr: SocketAddr,
    ) -> Result<(Vec<u8>, Result<PeerName, PeerError>), PeerError> {
        let (mut decoder, mut unread) = (Decoder::default(), BytesMut::new());
        let said = read_frame_of(MAX_HELLO, stream, &mut decoder, &mut unread).await;
        let words = |fault: HelloFault| Err(JoinRefusal::Greeting(fault.to_string()));
        let decided = match said {
            Ok(said) if said.kind == Kind::Hello => {
                let exported = exported(stream.get_ref().1, addr)?;
                self.decide(&said.payload, joining, exported).await
            }
            Ok(_) => words(HelloFault::NotAGreeting),
            Err(ReadFault::TooLong { len }) => words(HelloFault::TooLong { len }),
            Err(ReadFault::Io(source)) => return Err(PeerError::HandshakeBroken { addr, source }),
            Err(ReadFault::Closed | ReadFault::Torn | ReadFault::Frame(_)) => {
                let source = std::io::ErrorKind::InvalidData.into();
                return Err(PeerError::HandshakeBroken { addr, source });
            }
        };
        Ok(match decided {
            Ok(name) => {
                let welcome = Welcome {
                    name: name.clone(),
                    speaker: self.us.clone(),
                };
                (hello::to_json(&Reply::Joined(welcome)), Ok(name))
            }
            Err(refusal) => {
                let reply = Reply::Refused(refusal.clone());
                let error = PeerError::JoinRefusedHere {
                    addr,
                    presented: joining,
                    refusal,
                };
                (hello::to_json(&reply), Err(error))
            }
        })
    }

    async fn decide(
        &self,
        said: &[u8],
        joining: KeyId,
        exported: [u8; 32],
    ) -> Result<PeerName, JoinRefusal> {
        let words = |fault: HelloFault| JoinRefusal::Greeting(fault.to_string());
        let theirs = hello::Hello::versions_of(said).map_err(words)?;
        let ours = self.us.versions;
        if ours.highest_common(theirs).is_none() {
            return Err(JoinRefusal::Versions(ours));
        }
        let ask = hello::from_json::<Question>(said).map_err(words)?.join;
        if ask.addresses.len() > MAX_TOKEN_ADDRESSES {
            let why = format!("more than {MAX_TOKEN_ADDRESSES} addresses");
            return Err(JoinRefusal::Greeting(why));
        }
        let claim = Claim {
            exported,
            inviting: self.key,
            joining,
            id: ask.invitation,
        };
        let (trust, invitations) = (self.trust.clone(), self.invitations.clone());
        // Files, some of them synced.
        let deciding = move || let_in(&trust, &invitations, &claim, ask);
        let decided = tokio::task::spawn_blocking(deciding).await;
        let failed = |error: &dyn fmt::Display| {
            tracing::error!(%error, "a host that wants to join cannot be let in");
            JoinRefusal::Failed
        };
        match decided {
            Ok(Ok(decided)) => decided,
            Ok(Err(error)) => Err(failed(&error)),
            Err(error) => Err(failed(&error)),
        }
    }
}

fn let_in(
    trust: &TrustStore,
    invitations: &Invitations,
    claim: &Claim,
    ask: Ask,
) -> Result<Result<PeerName, JoinRefusal>, PeerError> {
    trust.reload()?;
    let who = Joining {
        id: ask.invitation,
        key: claim.joining,
        knows_us: ask.knows_you,
    };
    let name = |invitation: &Invitation| {
        if let Some(known) = trust.name_of(&claim.joining) {
            return Ok(known);
        }
        let peers = trust.list();
        let name = invitation.called.clone().unwrap_or(ask.name);
        if peers.iter().any(|(other, _)| *other == name) {
            return Err(JoinRefusal::NameTaken { name });
        }
        if peers.len() >= MAX_PEERS {
            return Err(JoinRefusal::Full);
        }
        Ok(name)
    };
    let accepts = |verifier: &crate::invitation::Verifier| verifier.accepts(&ask.proof, claim);
    let (name, may) = match invitations.redeem(now(), &who, accepts, name)? {
        Ok(found) => found,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let peer = Peer {
        key: claim.joining,
        addresses: ask.addresses,
        may,
    };
    match trust.admit(name, peer) {
        Ok(name) => Ok(Ok(name)),
        // Another host was quicker with the same name. This one may come again with another.
        Err(PeerError::PeerExists { name, .. }) => Ok(Err(JoinRefusal::NameTaken { name })),
        Err(error) => Err(error),
    }
}
