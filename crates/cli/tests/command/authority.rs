//! What a trusted host may do with a daemon, tried by hand: connections as no daemon would make them, with
//! the keys of hosts that have joined. No QEMU runs.

use super::hosts::{Host, contains};
use std::path::PathBuf;
use whimbrel_host::peers::speaker;
use whimbrel_peer::PeerError;
use whimbrel_peer::connection::Connection;
use whimbrel_peer::dial::{DialSettings, dial_peer};
use whimbrel_peer::hello::{Class, Hello, Refusal, SessionId};
use whimbrel_peer::identity::Identity;
use whimbrel_peer::trust::TrustStore;

/// A host of that name that has joined `to`.
fn joined(name: &str, to: &Host) -> Host {
    let host = Host::new(name);
    host.does(&format!("host join {}", to.invites("")));
    host
}

/// Connects `from` to host `oslo` for a session.
async fn comes(from: &Host, session: u128) -> Result<Connection, PeerError> {
    let identity = Identity::load(&from.state.join("host-key.pem")).unwrap();
    let trust = TrustStore::load(from.state.join("peers.toml")).unwrap();
    let oslo = "oslo".parse().unwrap();
    let hello = Hello {
        speaker: speaker("tester"),
        class: Class::Control,
        session: SessionId(session),
    };
    let peer = trust.get(&oslo).unwrap();
    dial_peer(&identity, &oslo, &peer, &hello, &DialSettings::default()).await
}

/// Why the connection was refused.
fn refusal(result: Result<Connection, PeerError>) -> String {
    match result.unwrap_err() {
        PeerError::Refused {
            refusal: Refusal::Unwanted(why),
            ..
        } => why,
        other => panic!("{other}"),
    }
}

fn migration(host: &Host, session: u128) -> PathBuf {
    host.state.join(format!("migrations/{session:032x}"))
}

#[tokio::test]
async fn a_migration_is_its_own_peers_and_nobody_elses() {
    let oslo = Host::running("oslo");
    let (bern, thief) = (joined("bern", &oslo), joined("thief", &oslo));
    // One that is under way.
    let _bern_is_there = comes(&bern, 7).await.unwrap();
    let stolen = refusal(comes(&thief, 7).await);
    assert!(stolen.contains("another host's"), "{stolen}");
    // It is logged, when the thief has heard it and hung up.
    while !oslo.log_text().contains("another host's") {
        std::thread::yield_now();
    }
    assert!(comes(&bern, 7).await.is_ok(), "its own host may come again");
    // One that is over, or that an earlier daemon had, and is known from its folder only.
    let folder = migration(&oslo, 8);
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("peer"), "bern").unwrap();
    std::fs::write(folder.join("peer-key"), bern.key()).unwrap();
    let stolen = refusal(comes(&thief, 8).await);
    assert!(stolen.contains("another host's"), "{stolen}");
    assert!(comes(&bern, 8).await.is_ok());
    // One away from here: its destination knows the number, and has nothing to dial for.
    let folder = migration(&oslo, 9);
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("peer"), "bern").unwrap();
    std::fs::write(folder.join("peer-key"), bern.key()).unwrap();
    std::fs::write(folder.join("machine"), "web1").unwrap();
    let wrong = refusal(comes(&bern, 9).await);
    assert!(wrong.contains("another host's"), "{wrong}");
    assert!(
        !folder.join("journal").exists(),
        "nobody touched its journal"
    );
}

#[tokio::test]
async fn a_session_follows_its_key_when_the_host_is_renamed() {
    let oslo = Host::running("oslo");
    let (bern, thief) = (joined("bern", &oslo), joined("thief", &oslo));
    let _bern_is_there = comes(&bern, 7).await.unwrap();
    oslo.does("host rename bern basel");
    oslo.does("host rename thief bern");
    let stolen = refusal(comes(&thief, 7).await);
    assert!(stolen.contains("another host's"), "{stolen}");
    assert!(comes(&bern, 7).await.is_ok());
    assert_eq!(
        oslo.does("status")["migrations"]["items"][0]["peer"],
        "basel"
    );
}

#[tokio::test]
async fn a_host_that_may_not_send_begins_nothing_here() {
    let oslo = Host::running("oslo");
    let bern = joined("bern", &oslo);
    oslo.does("host allow bern --send no");
    let why = refusal(comes(&bern, 7).await);
    assert!(why.contains("host allow bern --send yes"), "{why}");
    assert!(!migration(&oslo, 7).exists(), "nothing was written for it");
    oslo.does("host allow bern --send yes");
    assert!(comes(&bern, 7).await.is_ok());
    // What has begun goes on.
    oslo.does("host allow bern --send no");
    assert!(comes(&bern, 7).await.is_ok());
    assert!(comes(&bern, 8).await.is_err());
}

#[tokio::test]
async fn a_revoked_host_is_cut_off_at_once_and_not_by_accident() {
    let oslo = Host::running("oslo");
    let (bern, thief) = (joined("bern", &oslo), joined("other", &oslo));
    let (_sends, mut receives) = comes(&bern, 7).await.unwrap().split();
    let (_also, mut others) = comes(&thief, 8).await.unwrap().split();
    // Its daemon speaks first: what it holds.
    receives.recv().await.unwrap();
    others.recv().await.unwrap();
    let error = oslo.refused("host revoke bern");
    assert_eq!(error["code"], "busy");
    contains(&error, "machine_state", "runs at bern (phase prepare)");
    contains(&error, "next_step", "--force");
    assert_eq!(oslo.trusts().len(), 2);
    oslo.does("host revoke bern --force");
    let cut = loop {
        match receives.recv().await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(
        matches!(cut, PeerError::Closed { .. } | PeerError::Torn { .. }),
        "{cut}"
    );
    let error = comes(&bern, 7).await.unwrap_err();
    assert!(matches!(error, PeerError::NotTrusted { .. }), "{error}");
    others.recv().await.expect("the other host goes on");
}
