//! Trusting a peer, the same whether the daemon does it or the command beside a daemon that does not run.

use crate::api::{ApiError, ErrorCode, TrustRequest};
use whimbrel_peer::error::PeerError;
use whimbrel_peer::trust::{Peer, TrustStore};

/// Puts the peer into the store. Said again with the same key it changes the addresses; another key under
/// the same name is refused, since that is what an impostor would ask for.
pub fn trust(store: &TrustStore, request: TrustRequest) -> Result<(), ApiError> {
    let TrustRequest {
        name,
        key,
        addresses,
    } = request;
    match store.get(&name) {
        Ok(known) if known.key == key => Ok(store.set_addresses(&name, addresses)?),
        _ => Ok(store.add(name, Peer { key, addresses })?),
    }
}

impl From<PeerError> for ApiError {
    fn from(error: PeerError) -> ApiError {
        ApiError::from(&error)
    }
}

impl From<&PeerError> for ApiError {
    fn from(error: &PeerError) -> ApiError {
        let told = |code, next: &str| ApiError::new(code, error.to_string()).next_step(next);
        match error {
            PeerError::File { path, .. } => told(
                ErrorCode::Io,
                "look at that file and its folder, then try again",
            )
            .at(Some(path.display().to_string())),
            PeerError::IdentityMissing { path } => {
                told(ErrorCode::WrongState, "make one with `whimbrel host init`")
                    .at(Some(path.display().to_string()))
            }
            PeerError::IdentityExists { path }
            | PeerError::IdentityExposed { path, .. }
            | PeerError::PeersExposed { path, .. } => {
                told(ErrorCode::WrongState, "do as said there, then try again")
                    .at(Some(path.display().to_string()))
            }
            PeerError::IdentityBroken { path, .. } | PeerError::PeersSyntax { path, .. } => told(
                ErrorCode::Damaged,
                "put that file back from a backup or correct it by hand, then try again",
            )
            .at(Some(path.display().to_string())),
            PeerError::PeerUnknown { .. } => told(
                ErrorCode::NotFound,
                "list the peers with `whimbrel host ls`",
            ),
            PeerError::PeerExists { name, .. } => told(
                ErrorCode::Exists,
                &format!(
                    "if that host was really given a new key, run `whimbrel host untrust {name}` first"
                ),
            ),
            PeerError::KeyTrusted { name, .. } => told(
                ErrorCode::Exists,
                &format!("use that name, or run `whimbrel host untrust {name}` first"),
            ),
            PeerError::PeerName { .. }
            | PeerError::PeerAddress { .. }
            | PeerError::KeyId { .. }
            | PeerError::TooManyPeers { .. }
            | PeerError::TooManyAddresses { .. } => {
                told(ErrorCode::Invalid, "correct it and try again")
            }
            PeerError::PortInUse { .. }
            | PeerError::NoSuchAddress { .. }
            | PeerError::Bind { .. } => told(
                ErrorCode::Io,
                "name another address with --listen, or free this one",
            )
            .machine_state("the daemon did not start; machines are as they were"),
            PeerError::IdentityMaking(_)
            | PeerError::TlsSetup(_)
            | PeerError::OwnGreeting(_)
            | PeerError::ListenerClosed => told(ErrorCode::Internal, "look into the daemon's log"),
            _ if error.may_pass() => told(
                ErrorCode::PeerUnreachable,
                "see that the daemon runs at the peer and that this host reaches its address",
            ),
            // Keys, versions and refusals: nothing mends itself, and each message says what to do.
            _ => told(
                ErrorCode::PeerRefused,
                "settle that with the peer's operator, then try again",
            ),
        }
    }
}
