//! Peers: who is trusted, by what name, and for what; and what of that touches migrations under way.

use whimbrel_engine::switchover::Phase;
use whimbrel_peer::trust::PeerName;

use crate::api::types::*;
use crate::api::{ApiError, ErrorCode};
use crate::daemon::{Bound, Daemon};
use crate::migration::outgoing::Command;
use crate::migration::record::is_over;
use crate::state::{StateDir, trust};
use whimbrel_peer::rights::Right;
use whimbrel_peer::trust::TrustStore;

/// The most migrations that a refusal tells of one by one.
const TOLD: usize = 4;

impl Daemon {
    pub(super) fn trusted_peers(&self) -> Result<Listed<PeerView>, ApiError> {
        self.host.trust.reload()?;
        let boards: Vec<MigrationView> = self
            .migrations()
            .values()
            .map(|held| held.board.view())
            .collect();
        let items = self.host.trust.list().into_iter().map(|(name, peer)| {
            let busy = boards
                .iter()
                .find(|view| view.peer == name && !view.state.is_settled());
            PeerView {
                link: busy.map(|view| view.link.clone()),
                ..PeerView::of(name, peer)
            }
        });
        Ok(Listed {
            items: items.collect(),
            damaged: Vec::new(),
        })
    }

    fn peer_view(&self, name: PeerName) -> Result<PeerView, ApiError> {
        let peer = self.host.trust.get(&name)?;
        Ok(PeerView::of(name, peer))
    }

    pub(super) fn trust_peer(&self, request: TrustRequest) -> Result<PeerView, ApiError> {
        let name = request.name.clone();
        trust(&self.host.trust, request)?;
        self.peer_view(name)
    }

    pub(super) async fn revoke_peer(&self, name: PeerName, force: bool) -> Result<(), ApiError> {
        self.host.trust.reload()?;
        self.host.trust.get(&name)?;
        let under_way: Vec<_> = self
            .migrations()
            .values()
            .filter(|held| {
                let view = held.board.view();
                view.peer == name && !view.phase.is_final()
            })
            .cloned()
            .collect();
        if !force && !under_way.is_empty() {
            let views: Vec<_> = under_way.iter().map(|held| held.board.view()).collect();
            return Err(in_flight(&name, &views));
        }
        for held in under_way {
            let view = held.board.view();
            held.board
                .tell(format!("the operator has revoked the trust in {name}"));
            tracing::warn!(migration = %view.id, machine = %view.machine, phase = %view.phase, peer = %name, "trust is revoked in the midst of a migration");
            if let (true, Some(commands)) = (before_grant(view.phase), &held.commands) {
                // A driver that has ended has nothing left to be told.
                let _ = commands.send(Command::Cancel).await;
            }
        }
        self.host.trust.remove(&name)?;
        tracing::info!(peer = %name, "trusted no more; its connections are cut");
        Ok(())
    }

    pub(super) fn give_name(&self, name: PeerName, new: PeerName) -> Result<PeerView, ApiError> {
        self.host.trust.rename(&name, new.clone())?;
        for held in self.migrations().values() {
            held.board.update(|view| {
                if view.peer == name {
                    view.peer = new.clone();
                }
            });
        }
        self.peer_view(new)
    }

    pub(super) fn change_rights(
        &self,
        name: PeerName,
        change: AllowPeer,
    ) -> Result<PeerView, ApiError> {
        self.host.trust.reload()?;
        let peer = self.host.trust.get(&name)?;
        self.host.trust.set_rights(&name, change.over(peer.may))?;
        self.peer_view(name)
    }
}

/// The peer that a machine is to go to, if it may have one.
pub(super) fn destination(trust: &TrustStore, name: &PeerName) -> Result<Bound, ApiError> {
    trust.reload()?;
    let peer = trust.get(name)?;
    if !peer.may.receive {
        return Err(not_allowed(name, Right::Receive));
    }
    Ok(Bound {
        name: name.clone(),
        key: peer.key,
    })
}

/// A peer has not the right to what is to be done.
pub fn not_allowed(name: &PeerName, right: Right) -> ApiError {
    let (what, option) = match right {
        Right::Send => (
            format!("`{name}` may not send machines to this host"),
            "--send yes",
        ),
        Right::Receive => (
            format!("`{name}` may not receive machines from this host"),
            "--receive yes",
        ),
    };
    ApiError::new(ErrorCode::NotAllowed, what).next_step(format!(
        "to change that: `whimbrel host allow {name} {option}`"
    ))
}

fn before_grant(phase: Phase) -> bool {
    matches!(phase, Phase::Prepare | Phase::Copy | Phase::Quiesce)
}

fn in_flight(name: &PeerName, views: &[MigrationView]) -> ApiError {
    let machines: Vec<_> = views.iter().map(|v| format!("`{}`", v.machine)).collect();
    let what = format!(
        "a migration with `{name}` is under way: machine {}",
        machines[..machines.len().min(TOLD)].join(", ")
    );
    let states: Vec<_> = views.iter().take(TOLD).map(where_it_is).collect();
    let next = if views
        .iter()
        .all(|v| before_grant(v.phase) && v.direction == Direction::Outgoing)
    {
        "wait until it is over, or give it up with `whimbrel cancel`, then revoke; `--force` does both at once"
    } else {
        "wait until it is over, then revoke. `--force` cuts it off now: what has not crossed stays where it is until you trust that host again"
    };
    ApiError::new(ErrorCode::Busy, what)
        .machine_state(states.join("; "))
        .next_step(next)
}

/// Where the machine of a migration is, and what it would mean to cut that off.
fn where_it_is(view: &MigrationView) -> String {
    let MigrationView {
        machine,
        peer,
        phase,
        ..
    } = view;
    match (view.direction, phase) {
        (Direction::Outgoing, phase) if before_grant(*phase) => {
            format!("{machine} runs here (phase {phase}); cut off, it stays here")
        }
        (Direction::Outgoing, Phase::Grant | Phase::Accept) => format!(
            "{machine} is paused here and promised to {peer} (phase {phase}); cut off, it stays paused until {peer} can be asked"
        ),
        (Direction::Outgoing, phase) => format!(
            "{machine} runs at {peer} and needs what is still here (phase {phase}); cut off, it stalls there on what is missing"
        ),
        (Direction::Incoming, phase) if before_grant(*phase) => {
            format!("{machine} runs at {peer} (phase {phase}); cut off, it stays there")
        }
        (Direction::Incoming, phase) => format!(
            "{machine} is this host's and needs what is still at {peer} (phase {phase}); cut off, it stalls here on what is missing"
        ),
    }
}

/// Trusts a host no more, beside a daemon that does not run.
///
/// # Errors
/// `Busy` if a migration with it is not over, unless forced.
pub fn revoke_offline(
    state: &StateDir,
    store: &TrustStore,
    name: &PeerName,
    force: bool,
) -> Result<(), ApiError> {
    let key = store.get(name)?.key;
    for id in state.migrations()?.records {
        let folder = state.migration_folder(&id);
        let theirs = || Bound::load(&folder, store).is_ok_and(|bound| bound.key == key);
        if !force && !is_over(&folder) && theirs() {
            let what = format!("a migration with `{name}` is not over: {id}");
            return Err(ApiError::new(ErrorCode::Busy, what)
                .machine_state("where its machine is, the daemon tells once it runs")
                .next_step("start the daemon with `whimbrel host run` and look with `whimbrel status`; or revoke with `--force`"));
        }
    }
    store.remove(name)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fake::sample_migration;
    use whimbrel_peer::key_id::KeyId;
    use whimbrel_peer::rights::Rights;
    use whimbrel_peer::trust::Peer;

    fn at(direction: Direction, phase: Phase) -> MigrationView {
        MigrationView {
            direction,
            phase,
            ..sample_migration()
        }
    }

    #[test]
    fn a_refused_revocation_says_where_the_machine_is() {
        let name: PeerName = "b".parse().expect("a name");
        for (direction, phase, words) in [
            (Direction::Outgoing, Phase::Copy, "web1 runs here"),
            (
                Direction::Outgoing,
                Phase::Grant,
                "paused here and promised",
            ),
            (Direction::Outgoing, Phase::Drain, "runs at b and needs"),
            (Direction::Incoming, Phase::Copy, "web1 runs at b"),
            (
                Direction::Incoming,
                Phase::Drain,
                "is this host's and needs",
            ),
        ] {
            let error = in_flight(&name, &[at(direction, phase)]);
            let state = error.machine_state.expect("said");
            assert!(state.contains(words), "{state}");
            assert!(error.what.contains("`web1`") && error.next_step.is_some());
        }
    }

    #[test]
    fn a_machine_goes_only_to_a_peer_that_may_receive() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let store = TrustStore::load(folder.path().join("peers.toml")).expect("fresh");
        let name: PeerName = "b".parse().expect("a name");
        let unknown = destination(&store, &name).expect_err("nobody is trusted");
        assert_eq!(unknown.code, ErrorCode::NotFound);
        let peer = Peer {
            key: KeyId::of_public_key(&[1]),
            addresses: Vec::new(),
            may: Rights::ALL,
        };
        store.add(name.clone(), peer.clone()).expect("room");
        assert_eq!(destination(&store, &name).expect("it may").key, peer.key);
        let may = Rights {
            send: true,
            receive: false,
        };
        // By a command beside the daemon, in the file.
        let file = TrustStore::load(folder.path().join("peers.toml")).expect("there");
        file.set_rights(&name, may).expect("known");
        let refused = destination(&store, &name).expect_err("it may not");
        assert_eq!(refused.code, ErrorCode::NotAllowed);
    }

    #[test]
    fn a_right_that_lacks_says_how_it_is_given() {
        let name: PeerName = "b".parse().expect("a name");
        for (right, words) in [
            (Right::Send, "host allow b --send yes"),
            (Right::Receive, "host allow b --receive yes"),
        ] {
            let error = not_allowed(&name, right);
            assert_eq!(error.code, ErrorCode::NotAllowed);
            assert!(error.next_step.expect("said").contains(words));
        }
    }
}
