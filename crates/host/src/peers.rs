//! Dialling a peer for one session.

use whimbrel_peer::connection::Connection;
use whimbrel_peer::dial::{DialSettings, dial_peer};
use whimbrel_peer::error::PeerError;
use whimbrel_peer::hello::{Class, Hello, SessionId, Speaker, VersionRange};
use whimbrel_peer::identity::Identity;
use whimbrel_peer::socket::SocketSettings;
use whimbrel_peer::trust::{PeerName, TrustStore};
use whimbrel_wire::message::FEATURES;

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
    peer: PeerName,
    session: SessionId,
    settings: DialSettings,
}

impl Dialler {
    pub fn new(
        identity: Identity,
        trust: TrustStore,
        host: String,
        peer: PeerName,
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

    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// Dials; the peer's key and addresses are looked up anew each time, so a change of either is used by
    /// the next connection.
    pub async fn dial(&self, class: Class) -> Result<Connection, PeerError> {
        self.trust.reload()?;
        let peer = self.trust.get(&self.peer)?;
        let hello = Hello {
            speaker: speaker(&self.host),
            class,
            session: self.session,
        };
        dial_peer(&self.identity, &self.peer, &peer, &hello, &self.settings).await
    }
}
