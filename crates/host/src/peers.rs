//! Other hosts: dialling one for a session, and coming to trust each other by an invitation.
//!
//! What is here works the same in the daemon and in a command beside a daemon that does not run.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use whimbrel_peer::connection::Connection;
use whimbrel_peer::dial::{DialSettings, dial_peer};
use whimbrel_peer::error::PeerError;
use whimbrel_peer::hello::{Class, Hello, SessionId, Speaker, VersionRange};
use whimbrel_peer::identity::Identity;
use whimbrel_peer::invitation::{Invitation, InvitationId, Invitations, Inviting, Offer, now};
use whimbrel_peer::join::{JoinRequest, join};
use whimbrel_peer::socket::SocketSettings;
use whimbrel_peer::trust::{PeerAddress, TrustStore};
use whimbrel_wire::message::FEATURES;

use crate::api::{
    ApiError, InvitationView, InviteRequest, InviteView, JoinHost, JoinView, Listed, PeerView,
    UsedBy,
};
use crate::daemon::Bound;
use crate::state::{StateDir, Timestamp};

/// The versions of the peer protocol this build speaks.
pub const PROTOCOL: VersionRange = VersionRange { min: 1, max: 1 };

/// Bytes that may lie unsent in the kernel on a push connection: a demand waits behind no more. Enough to
/// keep a fast link busy until this process is scheduled again.
const PUSH_UNSENT: u32 = 64 << 10;

/// What this host says of itself.
pub fn speaker(host: &str) -> Speaker {
    Speaker {
        versions: PROTOCOL,
        software: format!("whimbrel {}", env!("CARGO_PKG_VERSION")),
        features: FEATURES,
        host: host.to_string(),
    }
}

/// Dials one peer, for one session.
pub struct Dialler {
    identity: Identity,
    trust: TrustStore,
    host: String,
    peer: Bound,
    session: SessionId,
    settings: DialSettings,
}

impl Dialler {
    pub fn new(
        identity: Identity,
        trust: TrustStore,
        host: String,
        peer: Bound,
        session: SessionId,
    ) -> Self {
        Dialler {
            identity,
            trust,
            host,
            peer,
            session,
            settings: DialSettings {
                sockets: SocketSettings {
                    push_unsent: PUSH_UNSENT,
                    ..SocketSettings::default()
                },
                ..DialSettings::default()
            },
        }
    }

    /// Dials. The session is the key's: its name and its addresses are looked up anew each time, so a
    /// change of either is used by the next connection, and one that is trusted no more is not dialled.
    pub async fn dial(&self, class: Class) -> Result<Connection, PeerError> {
        self.trust.reload()?;
        let (name, peer) =
            self.trust
                .find(&self.peer.key)
                .ok_or_else(|| PeerError::TrustWithdrawn {
                    name: self.peer.name.clone(),
                    key: self.peer.key,
                })?;
        let hello = Hello {
            speaker: speaker(&self.host),
            class,
            session: self.session,
        };
        let dialled = dial_peer(&self.identity, &name, &peer, &hello, &self.settings).await?;
        dialled.tied(&self.trust)
    }
}

/// Where others reach a host that listens at `listen`. If that is every address it has: the one it would
/// send from to a far host, of IPv6 only if it listens there. None if it has no way out.
pub fn own_addresses(listen: SocketAddr) -> Vec<PeerAddress> {
    if !listen.ip().is_unspecified() {
        return vec![listen.into()];
    }
    // Addresses for documentation (RFC 5737, RFC 3849): nothing is sent, the kernel only looks for a way.
    let far: [(IpAddr, IpAddr); 2] = [
        (
            Ipv4Addr::UNSPECIFIED.into(),
            Ipv4Addr::new(192, 0, 2, 1).into(),
        ),
        (
            Ipv6Addr::UNSPECIFIED.into(),
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        ),
    ];
    let reached = far.into_iter().filter_map(|(any, far)| {
        if any.is_ipv6() && listen.is_ipv4() {
            return None;
        }
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((far, 9)).ok()?;
        let own = socket.local_addr().ok()?.ip();
        (!own.is_loopback() && !own.is_unspecified())
            .then(|| SocketAddr::new(own, listen.port()).into())
    });
    reached.collect()
}

/// Makes an invitation to the host with this state.
pub fn invite(
    state: &StateDir,
    listen: SocketAddr,
    request: InviteRequest,
    daemon: bool,
) -> Result<InviteView, ApiError> {
    let mut addresses = request.addresses;
    if addresses.is_empty() {
        addresses = own_addresses(listen);
    }
    let us = Inviting {
        key: Identity::load(&state.identity_path())?.key_id(),
        name: state.host()?.name,
        addresses,
    };
    let offer = Offer {
        lifetime: Duration::from_secs(request.expires_s),
        called: request.called,
        may: request.may,
    };
    let now = now();
    let (invitation, token) = store(state).make(now, us, offer)?;
    Ok(InviteView {
        name: token.name.clone(),
        key: token.key,
        addresses: token.addresses.clone(),
        token,
        invitation: invitation_view(invitation, now),
        daemon,
    })
}

/// The invitations of the host with this state.
pub fn invitations(state: &StateDir) -> Result<Listed<InvitationView>, ApiError> {
    let now = now();
    let known = store(state).list()?;
    Ok(Listed {
        items: known
            .into_iter()
            .map(|invitation| invitation_view(invitation, now))
            .collect(),
        damaged: Vec::new(),
    })
}

/// Takes an invitation back.
pub fn cancel_invitation(state: &StateDir, id: InvitationId) -> Result<InvitationView, ApiError> {
    let now = now();
    let cancelled = store(state).cancel(now, id)?;
    Ok(invitation_view(cancelled, now))
}

/// Joins the host that made an invitation.
pub async fn join_host(
    state: &StateDir,
    trust: &TrustStore,
    listen: SocketAddr,
    request: JoinHost,
) -> Result<JoinView, ApiError> {
    let own_name = state.host()?.name;
    let identity = Identity::load(&state.identity_path())?;
    let mut addresses = request.addresses;
    if addresses.is_empty() && !listen.ip().is_unspecified() {
        addresses = vec![listen.into()];
    }
    let asked = JoinRequest {
        token: request.token,
        called: request.called,
        may: request.may,
        speaker: speaker(own_name.as_str()),
        name: request.name.unwrap_or(own_name),
        addresses,
        port: listen.port(),
    };
    let joined = join(&identity, trust, &asked, &DialSettings::default()).await?;
    tracing::info!(peer = %joined.name, key = %joined.peer.key, "joined by its invitation; it is trusted");
    Ok(JoinView {
        peer: PeerView::of(joined.name, joined.peer),
        name_there: joined.name_there,
    })
}

fn store(state: &StateDir) -> Invitations {
    Invitations::at(state.invitations_path())
}

fn invitation_view(invitation: Invitation, now: u64) -> InvitationView {
    InvitationView {
        id: invitation.id,
        state: invitation.state(now),
        expires: Timestamp::from_unix(invitation.expires),
        called: invitation.called,
        may: invitation.may,
        wrong: invitation.wrong,
        used_by: invitation.used.map(|used| UsedBy {
            name: used.name,
            key: used.key,
            at: Timestamp::from_unix(used.at),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_listens_at_one_address_is_reached_there() {
        for listen in ["192.0.2.7:7420", "[2001:db8::7]:1"] {
            let addresses = own_addresses(listen.parse().expect("an address"));
            assert_eq!(addresses[0].as_str(), listen);
            assert_eq!(addresses.len(), 1);
        }
    }

    #[test]
    fn a_host_that_listens_everywhere_names_no_loopback() {
        for listen in ["0.0.0.0:7420", "[::]:7420"] {
            for address in own_addresses(listen.parse().expect("an address")) {
                let address: SocketAddr = address.as_str().parse().expect("an address");
                assert!(!address.ip().is_loopback() && !address.ip().is_unspecified());
                assert_eq!(address.port(), 7420);
            }
        }
    }
}
