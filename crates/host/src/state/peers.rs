//! Trusting a peer, the same whether the daemon does it or the command beside a daemon that does not run.

use crate::api::{ApiError, ErrorCode, TrustRequest};
use whimbrel_peer::error::PeerError;
use whimbrel_peer::join::JoinRefusal;
use whimbrel_peer::trust::{Peer, TrustStore};

/// Puts the peer into the store. Said again with the same key it changes the addresses; another key under
/// the same name is refused, since that is what an impostor would ask for.
pub fn trust(store: &TrustStore, request: TrustRequest) -> Result<(), ApiError> {
    let TrustRequest {
        name,
        key,
        addresses,
        may,
    } = request;
    match store.get(&name) {
        Ok(known) if known.key == key => {
            store.set_addresses(&name, addresses)?;
            if let Some(may) = may {
                store.set_rights(&name, may)?;
            }
            Ok(())
        }
        _ => {
            let may = may.unwrap_or_default();
            let peer = Peer {
                key,
                addresses,
                may,
            };
            Ok(store.add(name, peer)?)
        }
    }
}

/// What the operator of the joining host can do.
fn next_after(refusal: &JoinRefusal) -> &'static str {
    match refusal {
        JoinRefusal::NameTaken { .. } => {
            "join with the same invitation and `--name OTHER`, or have it invite with `--as OTHER`"
        }
        JoinRefusal::Full => "have it revoke hosts that are gone, then try again",
        JoinRefusal::Failed => "have its operator look into the daemon's log there",
        JoinRefusal::Versions(_) | JoinRefusal::Greeting(_) => {
            "use the same version of Whimbrel on both hosts"
        }
        JoinRefusal::Used => {
            "if that was this host, see `whimbrel host ls` on both; else have a new one made with `whimbrel host invite` there, and ask who used this one"
        }
        JoinRefusal::Unknown
        | JoinRefusal::Wrong { .. }
        | JoinRefusal::Void
        | JoinRefusal::Expired { .. }
        | JoinRefusal::Cancelled => "have a new one made with `whimbrel host invite` there",
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
            PeerError::IdentityBroken { path, .. }
            | PeerError::PeersSyntax { path, .. }
            | PeerError::InvitationsSyntax { path, .. } => told(
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
                    "if that host was really given a new key, run `whimbrel host revoke {name}` first"
                ),
            ),
            PeerError::KeyTrusted { name, .. } => told(
                ErrorCode::Exists,
                &format!(
                    "use that name, or give it another with `whimbrel host rename {name} NAME`"
                ),
            ),
            PeerError::NameTakenHere { .. } => told(
                ErrorCode::Exists,
                "call the inviting host otherwise: say `--as NAME` with the same invitation",
            )
            .machine_state("nothing was changed; the inviting host was not asked"),
            PeerError::KnownByAnotherName { known, asked } => told(
                ErrorCode::Exists,
                &format!("join without --as, or run `whimbrel host rename {known} {asked}`"),
            )
            .machine_state("nothing was changed; the inviting host was not asked"),
            PeerError::OwnInvitation => told(
                ErrorCode::Invalid,
                "run `whimbrel host join` with it on the host that is to join",
            )
            .machine_state("nothing was changed"),
            PeerError::Token { .. } => told(
                ErrorCode::Invalid,
                "copy the whole of what `whimbrel host invite` printed, and try again",
            )
            .machine_state("nothing was changed"),
            PeerError::InvitationLifetime { .. } => {
                told(ErrorCode::Invalid, "say another time with --expires")
            }
            PeerError::NoOwnAddress => told(
                ErrorCode::Invalid,
                "say it with --address HOST:PORT, or name one under `listen` in the configuration",
            )
            .machine_state("nothing was changed"),
            PeerError::TooManyInvitations { .. } => told(
                ErrorCode::Busy,
                "see `whimbrel host invite --list`, and take one back with `--cancel ID`",
            ),
            PeerError::InvitationUnknown { .. } => told(
                ErrorCode::NotFound,
                "list the invitations with `whimbrel host invite --list`",
            ),
            PeerError::InvitationUsed { name, .. } => told(
                ErrorCode::WrongState,
                &format!("to trust that host no more, run `whimbrel host revoke {name}`"),
            ),
            PeerError::TrustWithdrawn { .. } => told(
                ErrorCode::PeerRefused,
                "trust that key again (`whimbrel host join` or `trust`) for what goes on with it",
            ),
            PeerError::NotInviting { .. } => told(
                ErrorCode::PeerRefused,
                "update it, or tell each host the other's key with `whimbrel host trust`",
            ),
            PeerError::JoinRefused { addr, refusal, .. } => {
                told(ErrorCode::PeerRefused, next_after(refusal))
                    .at(Some(addr.to_string()))
                    .machine_state("nothing was changed, here or there")
            }
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
            | PeerError::NoRandomness
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
