//! Two hosts that have never met, and one invitation.

use std::net::SocketAddr;
use std::time::Duration;

use whimbrel_peer::PeerError;
use whimbrel_peer::dial::DialSettings;
use whimbrel_peer::invitation::{
    INVITATIONS_FILE, Invitations, Inviting, MAX_WRONG, Offer, Token, now,
};
use whimbrel_peer::join::{JoinRefusal, JoinRequest, Joined, join};
use whimbrel_peer::listener::{ListenSettings, Listener};
use whimbrel_peer::rights::Rights;
use whimbrel_peer::tls::JOIN_ALPN;
use whimbrel_wire::frame::{Kind, encode};

use crate::common::{Host, hello, name, speaker, stranger, stranger_who_offers, two_hosts};

fn invitations(host: &Host) -> Invitations {
    Invitations::at(host.folder.path().join(INVITATIONS_FILE))
}

async fn inviting(host: &Host) -> Listener {
    host.listens(ListenSettings {
        invitations: Some(invitations(host)),
        ..ListenSettings::default()
    })
    .await
}

fn offer() -> Offer {
    Offer {
        lifetime: Duration::from_secs(900),
        called: None,
        may: Rights::ALL,
    }
}

fn token(host: &Host, addr: SocketAddr, offer: Offer) -> Token {
    let us = Inviting {
        key: host.identity.key_id(),
        name: host.name.clone(),
        addresses: vec![addr.into()],
    };
    invitations(host).make(now(), us, offer).unwrap().1
}

fn request(host: &Host, token: Token) -> JoinRequest {
    JoinRequest {
        token,
        called: None,
        may: Rights::ALL,
        speaker: speaker(host.name.as_str()),
        name: host.name.clone(),
        addresses: vec![],
        port: 7420,
    }
}

async fn joins(host: &Host, request: &JoinRequest) -> Result<Joined, PeerError> {
    join(
        &host.identity,
        &host.trust,
        request,
        &DialSettings::default(),
    )
    .await
}

fn refusal(result: Result<Joined, PeerError>) -> JoinRefusal {
    match result.unwrap_err() {
        PeerError::JoinRefused { refusal, .. } => refusal,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn one_token_makes_two_hosts_trust_each_other() {
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    let mut listener = inviting(&oslo).await;
    let addr = listener.local_addr();
    let token = token(&oslo, addr, offer());
    let joined = joins(&bern, &request(&bern, token)).await.unwrap();
    assert_eq!((&joined.name, &joined.name_there), (&oslo.name, &bern.name));
    let at_bern = bern.trust.get(&oslo.name).unwrap();
    assert_eq!(at_bern.key, oslo.identity.key_id());
    assert_eq!(at_bern.addresses, [addr.into()]);
    let at_oslo = oslo.trust.get(&bern.name).unwrap();
    assert_eq!(at_oslo.key, bern.identity.key_id());
    assert_eq!(at_oslo.addresses[0].as_str(), "127.0.0.1:7420");
    // They meet as any two hosts that trust each other.
    let (dialled, accepted) = tokio::join!(bern.dials(addr, &oslo), listener.accept());
    assert!(dialled.is_ok());
    assert_eq!(accepted.unwrap().peer, bern.name);
}

#[tokio::test]
async fn names_and_rights_are_as_each_operator_said() {
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    let listener = inviting(&oslo).await;
    let only_send = Rights {
        send: true,
        receive: false,
    };
    let offer = Offer {
        called: Some(name("switzerland")),
        may: only_send,
        ..offer()
    };
    let request = JoinRequest {
        called: Some(name("norway")),
        may: Rights {
            send: false,
            receive: true,
        },
        ..request(&bern, token(&oslo, listener.local_addr(), offer))
    };
    let joined = joins(&bern, &request).await.unwrap();
    assert_eq!(joined.name, name("norway"));
    assert_eq!(joined.name_there, name("switzerland"));
    assert_eq!(oslo.trust.get(&name("switzerland")).unwrap().may, only_send);
    assert!(!bern.trust.get(&name("norway")).unwrap().may.send);
}

#[tokio::test]
async fn a_token_is_good_once() {
    let (oslo, bern, third) = (Host::new("oslo"), Host::new("bern"), Host::new("third"));
    let mut listener = inviting(&oslo).await;
    let token = token(&oslo, listener.local_addr(), offer());
    joins(&bern, &request(&bern, token.clone())).await.unwrap();
    for host in [&bern, &third] {
        let again = joins(host, &request(host, token.clone())).await;
        assert_eq!(refusal(again), JoinRefusal::Used);
    }
    assert!(third.trust.list().is_empty());
    assert_eq!(oslo.trust.list().len(), 1);
    let told = listener.accept().await.unwrap_err();
    assert!(matches!(told, PeerError::JoinRefusedHere { .. }), "{told}");
}

#[tokio::test]
async fn an_answer_that_was_lost_can_be_asked_for_again() {
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    let listener = inviting(&oslo).await;
    let token = token(&oslo, listener.local_addr(), offer());
    joins(&bern, &request(&bern, token.clone())).await.unwrap();
    // As if Bern had died before it wrote down what Oslo answered.
    bern.trust.remove(&oslo.name).unwrap();
    joins(&bern, &request(&bern, token)).await.unwrap();
    assert_eq!(oslo.trust.list().len(), 1);
}

#[tokio::test]
async fn a_wrong_secret_is_refused_and_soon_nothing_helps() {
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    let listener = inviting(&oslo).await;
    let good = token(&oslo, listener.local_addr(), offer());
    let other = token(&oslo, listener.local_addr(), offer());
    let wrong = Token {
        secret: other.secret,
        ..good.clone()
    };
    for left in (0..MAX_WRONG).rev() {
        let told = refusal(joins(&bern, &request(&bern, wrong.clone())).await);
        assert_eq!(told, JoinRefusal::Wrong { left });
    }
    let told = refusal(joins(&bern, &request(&bern, good)).await);
    assert_eq!(told, JoinRefusal::Void);
    assert!(oslo.trust.list().is_empty() && bern.trust.list().is_empty());
}

#[tokio::test]
async fn expired_cancelled_and_unknown_tokens_say_which_they_are() {
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    let listener = inviting(&oslo).await;
    let addr = listener.local_addr();
    let us = || Inviting {
        key: oslo.identity.key_id(),
        name: oslo.name.clone(),
        addresses: vec![addr.into()],
    };
    // Made two hours ago, for a quarter of an hour.
    let made = now() - 7200;
    let (_, expired) = invitations(&oslo).make(made, us(), offer()).unwrap();
    let told = refusal(joins(&bern, &request(&bern, expired)).await);
    assert!(
        matches!(told, JoinRefusal::Expired { seconds } if seconds >= 6300),
        "{told}"
    );
    let cancelled = token(&oslo, addr, offer());
    invitations(&oslo).cancel(now(), cancelled.id).unwrap();
    let told = refusal(joins(&bern, &request(&bern, cancelled)).await);
    assert_eq!(told, JoinRefusal::Cancelled);
    let elsewhere = Host::new("elsewhere");
    let unknown = Token {
        key: oslo.identity.key_id(),
        ..token(&elsewhere, addr, offer())
    };
    let told = refusal(joins(&bern, &request(&bern, unknown)).await);
    assert_eq!(told, JoinRefusal::Unknown);
}

#[tokio::test]
async fn names_that_are_taken_are_told_and_cost_nothing() {
    let (oslo, bern) = two_hosts();
    let newcomer = Host::new("bern");
    let listener = inviting(&oslo).await;
    let token = token(&oslo, listener.local_addr(), offer());
    let told = refusal(joins(&newcomer, &request(&newcomer, token.clone())).await);
    assert_eq!(
        told,
        JoinRefusal::NameTaken {
            name: bern.name.clone()
        }
    );
    // The inviting host's name is taken at the joining one: nobody is even asked.
    let other = Host::new("oslo");
    newcomer.trusts(&other);
    let renamed = JoinRequest {
        name: name("basel"),
        ..request(&newcomer, token)
    };
    let told = joins(&newcomer, &renamed).await.unwrap_err();
    assert!(matches!(told, PeerError::NameTakenHere { .. }), "{told}");
    let renamed = JoinRequest {
        called: Some(name("oslo2")),
        ..renamed
    };
    let joined = joins(&newcomer, &renamed).await.unwrap();
    assert_eq!(joined.name_there, name("basel"));
    assert_eq!(newcomer.trust.list().len(), 2);
    // Who knows the host by another name keeps that, unless another is asked for.
    let (again, before) = (self::token(&oslo, listener.local_addr(), offer()), renamed);
    let renamed = JoinRequest {
        token: again,
        called: Some(name("oslo3")),
        ..before
    };
    let told = joins(&newcomer, &renamed).await.unwrap_err();
    assert!(
        matches!(told, PeerError::KnownByAnotherName { .. }),
        "{told}"
    );
}

#[tokio::test]
async fn a_hosts_own_token_is_told_apart() {
    let oslo = Host::new("oslo");
    let listener = inviting(&oslo).await;
    let token = token(&oslo, listener.local_addr(), offer());
    let told = joins(&oslo, &request(&oslo, token)).await.unwrap_err();
    assert!(matches!(told, PeerError::OwnInvitation), "{told}");
}

/// Whoever answers at the address in the token must have the key in it.
#[tokio::test]
async fn another_host_at_the_tokens_address_learns_nothing() {
    let (oslo, bern, thief) = (Host::new("oslo"), Host::new("bern"), Host::new("thief"));
    let _honest = inviting(&oslo).await;
    let mut there = inviting(&thief).await;
    let token = token(&oslo, there.local_addr(), offer());
    let told = joins(&bern, &request(&bern, token)).await.unwrap_err();
    assert!(matches!(told, PeerError::WrongKey { .. }), "{told}");
    let seen = there.accept().await.unwrap_err();
    assert!(matches!(seen, PeerError::NotExpected { .. }), "{seen}");
    assert!(bern.trust.list().is_empty());
}

#[tokio::test]
async fn a_host_that_takes_no_invitations_says_so() {
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    let listener = oslo.listens(ListenSettings::default()).await;
    let token = token(&oslo, listener.local_addr(), offer());
    let told = joins(&bern, &request(&bern, token)).await.unwrap_err();
    assert!(matches!(told, PeerError::NotInviting { .. }), "{told}");
}

/// The door for strangers opens to no session: a key that is not trusted is refused as ever.
#[tokio::test]
async fn an_open_invitation_lets_nobody_in_who_does_not_join() {
    use tokio::io::AsyncReadExt;
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    bern.trusts(&oslo);
    let mut listener = inviting(&oslo).await;
    let addr = listener.local_addr();
    let _token = token(&oslo, addr, offer());
    let (dialled, seen) = tokio::join!(bern.dials(addr, &oslo), listener.accept());
    assert!(matches!(dialled, Err(PeerError::NotTrusted { .. })));
    assert!(matches!(seen, Err(PeerError::UnknownKey { .. })));
    let keyless = stranger(addr, None, &[&rustls::version::TLS13]).await;
    let told = keyless.unwrap().read_u8().await.unwrap_err();
    assert!(told.to_string().contains("CertificateRequired"), "{told}");
}

/// What comes by the door for strangers is one question, whatever it says, and whoever says it.
#[tokio::test]
async fn a_connection_that_is_for_joining_becomes_no_session() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (oslo, bern) = two_hosts();
    let mut listener = inviting(&oslo).await;
    let key = bern.folder.path().join("host-key.pem");
    let said = hello().to_bytes().unwrap();
    for said in [
        said.as_slice(),
        b"{}",
        b"\xff\xff",
        &[b' '; 20_000],
        &[b'['; 1_000_000],
    ] {
        let tls = &[&rustls::version::TLS13];
        let mut stream = stranger_who_offers(JOIN_ALPN, listener.local_addr(), Some(&key), tls)
            .await
            .unwrap();
        let mut frame = bytes::BytesMut::new();
        encode(Kind::Hello, 0, said, &mut frame).unwrap();
        // Of one that is far too long the beginning is enough to be refused.
        frame.truncate(50_000);
        stream.write_all(&frame).await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        let heard = String::from_utf8_lossy(&heard);
        assert!(heard.contains(r#"{"refused":{"greeting":"#), "{heard}");
        stream.shutdown().await.unwrap();
        let told = listener.accept().await.unwrap_err();
        assert!(matches!(told, PeerError::JoinRefusedHere { .. }), "{told}");
    }
}
