//! How two hosts meet, and every way in which they do not.

mod common;
#[path = "meeting/joining.rs"]
mod joining;

use std::sync::Arc;
use std::time::Duration;

use common::{Host, hello, name, stranger, two_hosts};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use whimbrel_peer::PeerError;
use whimbrel_peer::dial::{DialSettings, dial, dial_peer};
use whimbrel_peer::hello::{Class, HelloFault, Refusal, VersionRange};
use whimbrel_peer::identity::{IDENTITY_FILE, Identity};
use whimbrel_peer::listener::ListenSettings;
use whimbrel_peer::rights::Rights;
use whimbrel_peer::trust::Peer;
use whimbrel_wire::frame::{Kind, encode};

#[tokio::test]
async fn two_hosts_that_trust_each_other_meet_and_agree() {
    let (oslo, bern) = two_hosts();
    let (dialled, accepted, _listener) = common::connected(&oslo, &bern).await;
    assert_eq!(accepted.peer, oslo.name);
    assert_eq!(accepted.hello, hello());
    assert_eq!(accepted.connection.remote().speaker.host, "oslo");
    assert_eq!(dialled.remote().name, bern.name);
    assert_eq!(dialled.remote().speaker.host, "bern");
    for connection in [&dialled, &accepted.connection] {
        assert_eq!(connection.agreed().version, 2);
        assert_eq!(connection.agreed().features, 0b0100);
        let sockets = connection.sockets();
        assert_eq!(sockets.unsent, Some(128 << 10));
        assert!(!sockets.congestion.is_empty());
    }
}

#[tokio::test]
async fn a_host_that_is_not_trusted_learns_so_and_the_server_names_its_key() {
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    oslo.trusts(&bern);
    let mut listener = bern.listens(ListenSettings::default()).await;
    let addr = listener.local_addr();
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, &bern), listener.accept());
    let ours = oslo.identity.key_id();
    let told = dialled.unwrap_err();
    assert!(
        matches!(&told, PeerError::NotTrusted { name, ours: key, .. } if *name == bern.name && *key == ours),
        "{told}"
    );
    let seen = accepted.unwrap_err();
    assert!(
        matches!(&seen, PeerError::UnknownKey { presented, .. } if *presented == ours),
        "{seen}"
    );
    assert!(!told.may_pass());
}

#[tokio::test]
async fn a_server_with_another_key_than_expected_is_refused_and_both_keys_are_named() {
    let (oslo, bern) = two_hosts();
    let expected = Host::new("bern");
    let mut listener = bern.listens(ListenSettings::default()).await;
    let addr = listener.local_addr();
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, &expected), listener.accept());
    let told = dialled.unwrap_err();
    let text = told.to_string();
    assert!(matches!(told, PeerError::WrongKey { .. }), "{text}");
    assert!(text.contains(&bern.identity.key_id().to_string()), "{text}");
    assert!(
        text.contains(&expected.identity.key_id().to_string()),
        "{text}"
    );
    let seen = accepted.unwrap_err();
    assert!(matches!(seen, PeerError::NotExpected { .. }), "{seen}");
}

#[tokio::test]
async fn a_peer_that_was_removed_is_cut_off_and_cannot_come_back() {
    let (oslo, bern) = two_hosts();
    let (one, two, mut listener) = common::connected(&oslo, &bern).await;
    let (_sends, mut one) = one.split();
    let (mut sends, mut two) = two.connection.split();
    bern.trust.remove(&oslo.name).unwrap();
    for end in [&mut one, &mut two] {
        let cut = end.recv().await.unwrap_err();
        assert!(matches!(cut, PeerError::Closed { .. }), "{cut}");
    }
    let cut = sends.send(Kind::Ping, b"", bytes::Bytes::new()).await;
    assert!(cut.is_err(), "{cut:?}");
    let addr = listener.local_addr();
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, &bern), listener.accept());
    assert!(matches!(dialled, Err(PeerError::NotTrusted { .. })));
    assert!(matches!(accepted, Err(PeerError::UnknownKey { .. })));
}

#[tokio::test]
async fn a_dialled_connection_is_cut_too_and_none_is_tied_to_a_stranger() {
    let (oslo, bern) = two_hosts();
    let (dialled, _accepted, listener) = common::connected(&oslo, &bern).await;
    let (_sends, mut receives) = dialled.tied(&oslo.trust).unwrap().split();
    // As a command beside the daemon would do it: in the file.
    let file = whimbrel_peer::trust::TrustStore::load(oslo.folder.path().join("peers.toml"));
    file.unwrap().remove(&bern.name).unwrap();
    oslo.trust.reload().unwrap();
    let cut = receives.recv().await.unwrap_err();
    assert!(matches!(cut, PeerError::Closed { .. }), "{cut}");
    let dialled = oslo.dials(listener.local_addr(), &bern).await.unwrap();
    let stranger = dialled.tied(&oslo.trust).unwrap_err();
    assert!(
        matches!(stranger, PeerError::UnknownKey { .. }),
        "{stranger}"
    );
}

#[tokio::test]
async fn a_client_without_a_key_is_told_apart() {
    let (_, bern) = two_hosts();
    let mut listener = bern.listens(ListenSettings::default()).await;
    let mut stream = stranger(listener.local_addr(), None, &[&rustls::version::TLS13])
        .await
        .unwrap();
    let told = stream.read_u8().await.unwrap_err();
    assert!(told.to_string().contains("CertificateRequired"), "{told}");
    let seen = listener.accept().await.unwrap_err();
    assert!(matches!(seen, PeerError::NoKeyPresented { .. }), "{seen}");
}

/// A thief has the certificate of a trusted host, which is public, but not its key.
#[tokio::test]
async fn a_certificate_without_its_key_is_worth_nothing() {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use rustls::sign::{CertifiedKey, SingleCertAndKey};

    let (oslo, bern) = two_hosts();
    let thief = Host::new("thief");
    let file = |host: &Host| host.folder.path().join(IDENTITY_FILE);
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let stolen = CertificateDer::from_pem_file(file(&oslo)).unwrap();
    let key = PrivateKeyDer::from_pem_file(file(&thief)).unwrap();
    let key = provider.key_provider.load_private_key(key).unwrap();
    let forged = CertifiedKey::new(vec![stolen], key);
    // Whom it talks to is all the same to the thief.
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(common::AnyServer))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(forged)));
    config.alpn_protocols = vec![b"whimbrel".to_vec()];
    let mut listener = bern.listens(ListenSettings::default()).await;
    let tcp = TcpStream::connect(listener.local_addr()).await.unwrap();
    let name = ServerName::try_from("anybody.invalid").unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(name, tcp).await.unwrap();
    assert!(stream.read_u8().await.is_err());
    let seen = listener.accept().await.unwrap_err();
    assert!(matches!(seen, PeerError::Tls { .. }), "{seen}");
    assert!(seen.to_string().contains("BadSignature"), "{seen}");
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let (oslo, bern) = two_hosts();
    let mut listener = bern.listens(ListenSettings::default()).await;
    let key = oslo.folder.path().join(IDENTITY_FILE);
    let addr = listener.local_addr();
    let refused = stranger(addr, Some(&key), &[&rustls::version::TLS12]).await;
    assert!(refused.is_err());
    assert!(matches!(
        listener.accept().await,
        Err(PeerError::Tls { .. })
    ));
}

#[tokio::test]
async fn without_a_common_version_both_sides_name_both_ranges() {
    let (oslo, bern) = two_hosts();
    let mut listener = bern.listens(ListenSettings::default()).await;
    let addr = listener.local_addr();
    let mut future = hello();
    future.speaker.versions = VersionRange { min: 3, max: 4 };
    let (dialled, accepted) = tokio::join!(oslo.says(addr, &bern, &future), listener.accept());
    let (old, new) = (VersionRange { min: 1, max: 2 }, future.speaker.versions);
    let told = dialled.unwrap_err();
    assert!(
        matches!(told, PeerError::NoCommonVersion { ours, theirs, .. } if ours == new && theirs == old),
        "{told}"
    );
    let seen = accepted.unwrap_err();
    assert!(
        matches!(seen, PeerError::NoCommonVersion { ours, theirs, .. } if ours == old && theirs == new),
        "{seen}"
    );
    assert!(told.to_string().contains("3 to 4") && told.to_string().contains("1 to 2"));
}

#[tokio::test]
async fn the_version_before_is_still_spoken() {
    let (oslo, bern) = two_hosts();
    let mut listener = bern.listens(ListenSettings::default()).await;
    let addr = listener.local_addr();
    let mut old = hello();
    old.speaker.versions = VersionRange { min: 0, max: 1 };
    let (dialled, accepted) = tokio::join!(oslo.says(addr, &bern, &old), listener.accept());
    assert_eq!(dialled.unwrap().agreed().version, 1);
    assert_eq!(accepted.unwrap().connection.agreed().version, 1);
}

#[tokio::test]
async fn a_connection_that_is_not_wanted_is_refused_in_words() {
    let (oslo, bern) = two_hosts();
    let settings = ListenSettings {
        admission: Some(Arc::new(|_, _, hello| match hello.class {
            Class::Control => Ok(()),
            Class::Push(_) => Err(format!("session {} is not known here", hello.session)),
        })),
        ..ListenSettings::default()
    };
    let mut listener = bern.listens(settings).await;
    let addr = listener.local_addr();
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, &bern), listener.accept());
    let told = dialled.unwrap_err();
    assert!(
        matches!(&told, PeerError::Refused { refusal: Refusal::Unwanted(why), .. } if why.ends_with("7 is not known here")),
        "{told}"
    );
    assert!(matches!(accepted, Err(PeerError::RefusedHere { .. })));
}

#[tokio::test]
async fn nobody_listening_is_said_with_the_address() {
    let (oslo, bern) = two_hosts();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = free.local_addr().unwrap();
    drop(free);
    let told = oslo.dials(addr, &bern).await.unwrap_err();
    assert!(matches!(told, PeerError::ConnectRefused { .. }), "{told}");
    assert!(told.to_string().contains(&addr.to_string()), "{told}");
    assert!(told.may_pass());
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let (oslo, bern) = two_hosts();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = silent.local_addr().unwrap();
    let settings = DialSettings {
        greet_within: Duration::from_millis(50),
        ..DialSettings::default()
    };
    let (name, key) = (&bern.name, bern.identity.key_id());
    let told = dial(&addr.into(), &oslo.identity, name, key, &hello(), &settings)
        .await
        .unwrap_err();
    assert!(
        matches!(told, PeerError::HandshakeTimedOut { .. }),
        "{told}"
    );
}

#[tokio::test]
async fn a_server_that_is_no_daemon_is_told_apart() {
    let (oslo, bern) = two_hosts();
    let web = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = web.local_addr().unwrap();
    let serving = async {
        let (mut tcp, _) = web.accept().await.unwrap();
        tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .await
            .unwrap();
        tcp
    };
    let (dialled, _tcp) = tokio::join!(oslo.dials(addr, &bern), serving);
    let told = dialled.unwrap_err();
    assert!(matches!(told, PeerError::NotTls { .. }), "{told}");
}

#[tokio::test]
async fn a_peer_is_found_at_the_address_that_works() {
    let (oslo, bern) = two_hosts();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead = free.local_addr().unwrap();
    drop(free);
    let mut listener = bern.listens(ListenSettings::default()).await;
    let mut peer = Peer {
        key: bern.identity.key_id(),
        addresses: vec![dead.into(), listener.local_addr().into()],
        may: Rights::ALL,
    };
    let (hello, settings) = (hello(), DialSettings::default());
    let (dialled, accepted) = tokio::join!(
        dial_peer(&oslo.identity, &bern.name, &peer, &hello, &settings),
        listener.accept()
    );
    assert!(dialled.is_ok() && accepted.is_ok());

    peer.addresses = vec![dead.into(), dead.into()];
    let told = dial_peer(&oslo.identity, &bern.name, &peer, &hello, &settings)
        .await
        .unwrap_err();
    assert!(
        matches!(&told, PeerError::EveryAddressFailed { attempts, .. } if attempts.len() == 2),
        "{told}"
    );
    peer.addresses.clear();
    let told = dial_peer(&oslo.identity, &bern.name, &peer, &hello, &settings).await;
    assert!(matches!(told, Err(PeerError::NoAddress { .. })));
}

#[tokio::test]
async fn a_port_in_use_is_said() {
    let (_, bern) = two_hosts();
    let listener = bern.listens(ListenSettings::default()).await;
    let again = bern
        .listens_at(listener.local_addr(), ListenSettings::default())
        .await;
    let told = again.unwrap_err();
    assert!(matches!(told, PeerError::PortInUse { .. }), "{told}");
    // 192.0.2.0/24 is for documentation and no host's (RFC 5737).
    let elsewhere = bern
        .listens_at("192.0.2.1:0".parse().unwrap(), ListenSettings::default())
        .await;
    assert!(matches!(elsewhere, Err(PeerError::NoSuchAddress { .. })));
}

#[tokio::test]
async fn garbage_is_refused_and_the_next_peer_served() {
    let (oslo, bern) = two_hosts();
    let mut listener = bern.listens(ListenSettings::default()).await;
    let addr = listener.local_addr();
    let mut garbage = TcpStream::connect(addr).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = garbage.read_to_end(&mut answer).await;
    drop(garbage);
    let seen = listener.accept().await.unwrap_err();
    assert!(matches!(seen, PeerError::NotTls { .. }), "{seen}");
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, &bern), listener.accept());
    assert!(dialled.is_ok() && accepted.is_ok());
}

#[tokio::test]
async fn clients_that_say_nothing_do_not_hold_the_listener() {
    let (oslo, bern) = two_hosts();
    let settings = ListenSettings {
        unfinished: 4,
        ..ListenSettings::default()
    };
    let mut listener = bern.listens(settings).await;
    let addr = listener.local_addr();
    let mut silent = Vec::new();
    for _ in 0..10 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, &bern), async {
        let mut dropped = 0;
        loop {
            match listener.accept().await {
                Err(PeerError::HandshakesFull { unfinished: 4, .. }) => dropped += 1,
                other => return (dropped, other),
            }
        }
    });
    assert!(dialled.is_ok());
    // Oslo's own arrival may be told before the drops.
    assert!(accepted.1.is_ok());
    assert!(accepted.0 <= 7);
}

#[tokio::test]
async fn one_address_drops_only_its_own_oldest() {
    let (oslo, bern) = two_hosts();
    let settings = ListenSettings {
        unfinished_by_address: 1,
        greet_within: Duration::from_secs(3600),
        ..ListenSettings::default()
    };
    let anywhere = "0.0.0.0:0".parse().unwrap();
    let mut listener = bern.listens_at(anywhere, settings).await.unwrap();
    let port = listener.local_addr().port();
    let from = |ip: &str| {
        let ip = format!("{ip}:0").parse().unwrap();
        async move {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind(ip).unwrap();
            socket.connect(([127, 0, 0, 1], port).into()).await.unwrap()
        }
    };
    let other = from("127.0.0.9").await;
    let first = from("127.0.0.8").await;
    let _second = from("127.0.0.8").await;
    let seen = listener.accept().await.unwrap_err();
    let oldest = first.local_addr().unwrap();
    assert!(
        matches!(seen, PeerError::HandshakesFull { addr, .. } if addr == oldest),
        "{seen}"
    );
    let addr = ([127, 0, 0, 1], port).into();
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, &bern), listener.accept());
    let (_dialled, _accepted) = (dialled.unwrap(), accepted.unwrap());
    let nothing = other.try_read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn one_that_hangs_up_while_the_next_comes_is_told_of_once() {
    let (oslo, bern) = two_hosts();
    let settings = ListenSettings {
        unfinished_by_address: 1,
        ..ListenSettings::default()
    };
    let mut listener = bern.listens(settings).await;
    let addr = listener.local_addr();
    let hung_up = TcpStream::connect(addr).await.unwrap();
    let oldest = hung_up.local_addr().unwrap();
    drop(hung_up);
    // Whether it ended by itself or was dropped for this one is a matter of luck; that it is not both is not.
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, &bern), async {
        let mut told = Vec::new();
        loop {
            match listener.accept().await {
                Ok(accepted) => return (told, accepted),
                Err(error) => told.push(error),
            }
        }
    });
    dialled.unwrap();
    let (mut told, _accepted) = accepted;
    while told.is_empty() {
        told.extend(listener.accept().await.err());
    }
    // Whoever comes next and is refused is told of after all that was told of the first.
    let mut garbage = TcpStream::connect(addr).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = garbage.read_to_end(&mut Vec::new()).await;
    drop(garbage);
    let next = listener.accept().await.unwrap_err();
    assert!(matches!(next, PeerError::NotTls { .. }), "{next}");
    let [PeerError::HandshakesFull { addr, .. } | PeerError::HandshakeBroken { addr, .. }] =
        told[..]
    else {
        panic!("{told:?}");
    };
    assert_eq!(addr, oldest);
}

#[tokio::test]
async fn a_client_that_takes_too_long_is_dropped() {
    let (oslo, bern) = two_hosts();
    let settings = ListenSettings {
        greet_within: Duration::from_millis(50),
        ..ListenSettings::default()
    };
    let mut listener = bern.listens(settings).await;
    let addr = listener.local_addr();
    // Before TLS, and with TLS done but no greeting.
    let _slow = TcpStream::connect(addr).await.unwrap();
    let seen = listener.accept().await.unwrap_err();
    assert!(
        matches!(seen, PeerError::HandshakeTimedOut { .. }),
        "{seen}"
    );
    let key = oslo.folder.path().join(IDENTITY_FILE);
    let _slow = stranger(addr, Some(&key), &[&rustls::version::TLS13]).await;
    let seen = listener.accept().await.unwrap_err();
    assert!(
        matches!(seen, PeerError::HandshakeTimedOut { .. }),
        "{seen}"
    );
}

#[tokio::test]
async fn a_trusted_peer_that_does_not_greet_is_told_what_is_wrong() {
    let (oslo, bern) = two_hosts();
    let mut listener = bern.listens(ListenSettings::default()).await;
    let key = oslo.folder.path().join(IDENTITY_FILE);
    let cases: [(Kind, &[u8], HelloFault); 3] = [
        (Kind::Control, b"{}", HelloFault::NotAGreeting),
        (
            Kind::Hello,
            b"?",
            HelloFault::Malformed { line: 1, column: 1 },
        ),
        (
            Kind::Hello,
            &[b' '; 20_000],
            HelloFault::TooLong { len: 20_000 },
        ),
    ];
    for (kind, said, expected) in cases {
        let addr = listener.local_addr();
        let mut stream = stranger(addr, Some(&key), &[&rustls::version::TLS13])
            .await
            .unwrap();
        let mut out = bytes::BytesMut::new();
        encode(kind, 0, said, &mut out).unwrap();
        stream.write_all(&out).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.contains("refused"), "{answer}");
        drop(stream);
        let seen = listener.accept().await.unwrap_err();
        assert!(
            matches!(&seen, PeerError::Greeting { fault, .. } if *fault == expected),
            "{seen}"
        );
    }
}

#[tokio::test]
async fn when_nobody_takes_connections_in_peers_are_told_to_come_later() {
    let (oslo, bern) = two_hosts();
    let settings = ListenSettings {
        greet_within: Duration::from_millis(600),
        ..ListenSettings::default()
    };
    let mut listener = bern.listens(settings).await;
    let addr = listener.local_addr();
    let mut kept = Vec::new();
    let told = loop {
        match oslo.dials(addr, &bern).await {
            Ok(connection) => kept.push(connection),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(
            told,
            PeerError::Refused {
                refusal: Refusal::Busy,
                ..
            }
        ),
        "{told}"
    );
    assert!(told.may_pass());
    assert!(listener.accept().await.is_ok());
}

#[tokio::test]
async fn a_closed_listener_frees_its_port_and_keeps_its_connections() {
    let (oslo, bern) = two_hosts();
    let (dialled, accepted, listener) = common::connected(&oslo, &bern).await;
    let addr = listener.local_addr();
    drop(listener);
    let listener = loop {
        // The task that holds the socket ends when the runtime gets to it.
        match bern.listens_at(addr, ListenSettings::default()).await {
            Ok(listener) => break listener,
            Err(PeerError::PortInUse { .. }) => tokio::task::yield_now().await,
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(listener.local_addr(), addr);
    let (mut sender, _keep) = dialled.split();
    let (_sender, mut receiver) = accepted.connection.split();
    sender
        .send(Kind::Control, b"still here", bytes::Bytes::new())
        .await
        .unwrap();
    assert_eq!(&receiver.recv().await.unwrap().payload[..], b"still here");
}

#[tokio::test]
async fn a_host_that_greets_with_a_text_no_terminal_should_see_does_not_dial() {
    let (oslo, bern) = two_hosts();
    let mut bad = hello();
    bad.speaker.host = "oslo\u{7}".into();
    let addr = "127.0.0.1:1".parse().unwrap();
    let told = oslo.says(addr, &bern, &bad).await;
    assert!(matches!(told, Err(PeerError::OwnGreeting(_))));
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_said() {
    let (oslo, bern) = two_hosts();
    let address = "no-such-host.invalid:7420".parse().unwrap();
    let settings = DialSettings::default();
    let key = bern.identity.key_id();
    let told = dial(
        &address,
        &oslo.identity,
        &bern.name,
        key,
        &hello(),
        &settings,
    )
    .await
    .unwrap_err();
    assert!(matches!(told, PeerError::Resolve { .. }), "{told}");
    assert!(told.to_string().contains("no-such-host.invalid"), "{told}");
}

#[tokio::test]
async fn a_host_reached_under_another_name_is_known_by_its_key() {
    let (oslo, bern) = two_hosts();
    bern.trust
        .rename(&oslo.name, name("the-other-one"))
        .unwrap();
    let (_dialled, accepted, _listener) = common::connected(&oslo, &bern).await;
    assert_eq!(accepted.peer, name("the-other-one"));
    let loaded = Identity::load(&oslo.folder.path().join(IDENTITY_FILE)).unwrap();
    assert_eq!(loaded.key_id(), oslo.identity.key_id());
}
