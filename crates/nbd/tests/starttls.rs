//! What is said around STARTTLS, byte by byte. The TLS itself: `conformance_tls.rs`.

#[path = "fixture/authority.rs"]
#[allow(dead_code)]
mod authority;
#[allow(dead_code)]
mod client;
#[allow(dead_code)]
mod memory;

use std::sync::Arc;

use authority::Authority;
use client::{Client, go, option};
use memory::{Memory, Shelf};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use whimbrel_nbd::spec::*;
use whimbrel_nbd::{Limits, ServeError, Tls};

fn shelf() -> Arc<Shelf<Memory>> {
    Shelf::of([("a", Memory::new(1 << 20))])
}

async fn greet(tls: Tls, flags: u32) -> Client {
    let mut client = Client::connect_tls(shelf(), Limits::default(), tls);
    client.greeted(flags).await;
    client
}

#[tokio::test]
async fn nothing_but_starttls_and_abort_is_served_where_tls_is_required() {
    let config = Authority::new().server(false);
    let mut client = greet(Tls::Required(config.clone()), 3).await;
    for bytes in [
        option(OPT_LIST, b""),
        option(OPT_STRUCTURED_REPLY, b""),
        option(OPT_EXTENDED_HEADERS, b""),
        option(0xdead, b"whatever"),
        option(OPT_LIST, &[0; 100_000]),
        client::contexts(OPT_SET_META_CONTEXT, "a", &[]),
        go("a"),
        go("nowhere"),
    ] {
        assert_eq!(client.kinds(&bytes).await, [REP_ERR_TLS_REQD]);
    }
    let reply = client.kinds(&option(OPT_ABORT, b"")).await;
    assert_eq!(reply, [REP_ACK]);
    client.end().await.unwrap();

    let mut client = greet(Tls::Required(config), 3).await;
    client.send(&option(OPT_EXPORT_NAME, b"a")).await;
    assert!(matches!(client.end().await, Err(ServeError::Refused(_))));
}

#[tokio::test]
async fn starttls_is_refused_without_tls_with_data_and_to_old_clients() {
    let config = Authority::new().server(false);
    for (tls, flags, data, expected) in [
        (Tls::Off, 3, &b""[..], REP_ERR_UNSUP),
        (Tls::Allowed(config.clone()), 3, b"x", REP_ERR_INVALID),
        (Tls::Required(config.clone()), 3, b"x", REP_ERR_INVALID),
        (Tls::Allowed(config), 0, b"", REP_ERR_UNSUP),
    ] {
        let mut client = greet(tls, flags).await;
        let reply = client.kinds(&option(OPT_STARTTLS, data)).await;
        assert_eq!(reply, [expected]);
    }
}

#[tokio::test]
async fn what_is_slipped_in_behind_starttls_ends_the_connection() {
    let mut client = greet(Tls::Allowed(Authority::new().server(false)), 3).await;
    let both = [option(OPT_STARTTLS, b""), option(OPT_STRUCTURED_REPLY, b"")].concat();
    let reply = client.kinds(&both).await;
    assert_eq!(reply, [REP_ACK], "to STARTTLS");
    let end = client.end().await;
    assert!(matches!(end, Err(ServeError::BeforeTls { bytes: 16 })));
}

#[tokio::test]
async fn bytes_that_are_no_tls_end_the_connection() {
    let mut client = greet(Tls::Required(Authority::new().server(false)), 3).await;
    client.kinds(&option(OPT_STARTTLS, b"")).await;
    client.send(&option(OPT_LIST, b"")).await;
    let mut alert = Vec::new();
    client.stream.read_to_end(&mut alert).await.unwrap();
    let end = client.server.await.unwrap();
    assert!(matches!(end, Err(ServeError::Tls(_))));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_speaks_tls_is_cut_off() {
    let mut client = greet(Tls::Required(Authority::new().server(false)), 3).await;
    client.kinds(&option(OPT_STARTTLS, b"")).await;
    let end = client.end().await;
    assert!(matches!(end, Err(ServeError::HandshakeTimeout)));
}

#[tokio::test]
async fn what_was_agreed_in_the_open_is_forgotten() {
    let authority = Authority::new();
    let mut client = greet(Tls::Allowed(authority.server(false)), 3).await;
    client.kinds(&option(OPT_EXTENDED_HEADERS, b"")).await;
    client.kinds(&option(OPT_STARTTLS, b"")).await;
    let connector = TlsConnector::from(authority.trusting());
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = connector.connect(name, client.stream).await.unwrap();
    stream.write_all(&option(OPT_STARTTLS, b"")).await.unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply[12..16], REP_ERR_INVALID.to_be_bytes());
    let mut text = vec![0; reply[19].into()];
    stream.read_exact(&mut text).await.unwrap();
    // Simple replies and the old option again: no trace of extended headers.
    let rest = [
        option(OPT_EXPORT_NAME, b"a"),
        client::request(CMD_FLUSH, 0, 9, 0, 0),
    ]
    .concat();
    stream.write_all(&rest).await.unwrap();
    let mut answers = [0; 10 + 16];
    stream.read_exact(&mut answers).await.unwrap();
    let flags = u16::from_be_bytes([answers[8], answers[9]]);
    assert_eq!(flags & FLAG_SEND_DF, 0);
    assert_eq!(answers[10..14], SIMPLE_REPLY_MAGIC.to_be_bytes());
    stream.shutdown().await.unwrap();
    client.server.await.unwrap().unwrap();
}
