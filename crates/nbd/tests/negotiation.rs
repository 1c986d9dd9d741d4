//! Negotiations, byte by byte.

#[allow(dead_code)]
mod client;
#[allow(dead_code)]
mod memory;

use std::sync::Arc;

use client::{Client, contexts, go, option};
use memory::{Memory, Shelf};
use tokio::io::AsyncWriteExt;
use whimbrel_nbd::spec::*;
use whimbrel_nbd::{ExportInfo, Limits, ServeError};

const SIZE: u64 = 1 << 20;

fn shelf() -> Arc<Shelf<Memory>> {
    let mut info = ExportInfo::new(SIZE);
    info.contexts = vec!["base:allocation".into(), "whimbrel:residency".into()];
    let broken = ExportInfo {
        min_block: 3,
        ..ExportInfo::new(SIZE)
    };
    Shelf::of([
        ("a", Memory::with(info)),
        ("broken", Memory::with(broken)),
        ("ro", {
            let mut info = ExportInfo::new(SIZE);
            info.read_only = true;
            Memory::with(info)
        }),
    ])
}

async fn greet() -> Client {
    Client::greet(shelf(), Limits::default(), 3).await
}

#[tokio::test]
async fn export_name_is_answered_with_124_zeroes_unless_waived() {
    for (flags, zeroes) in [(0, 124), (1, 124), (3, 0)] {
        let mut client = Client::greet(shelf(), Limits::default(), flags).await;
        client.send(&option(OPT_EXPORT_NAME, b"a")).await;
        assert_eq!(client.read::<8>().await, SIZE.to_be_bytes());
        let sent = u16::from_be_bytes(client.read().await);
        assert_eq!(sent & FLAG_SEND_DF, 0);
        assert_ne!(sent & FLAG_SEND_FUA, 0);
        for _ in 0..zeroes {
            assert_eq!(client.read::<1>().await, [0]);
        }
        client.send(&client::request(CMD_FLUSH, 0, 9, 0, 0)).await;
        assert_eq!(client.reply(0).await.cookie, 9);
    }
}

#[tokio::test]
async fn an_unknown_name_in_export_name_ends_the_session() {
    let mut client = greet().await;
    client.send(&option(OPT_EXPORT_NAME, b"nowhere")).await;
    assert!(matches!(client.end().await, Err(ServeError::Refused(_))));
}

#[tokio::test]
async fn client_flags_that_were_not_offered_end_the_session() {
    let client = Client::greet(shelf(), Limits::default(), 7).await;
    let end = client.end().await;
    assert!(matches!(end, Err(ServeError::UnknownFlags(_))));
}

#[tokio::test]
async fn bytes_that_are_no_option_end_the_session() {
    let mut client = greet().await;
    client.send(&[0x42; 16]).await;
    assert!(matches!(
        client.end().await,
        Err(ServeError::NotAnOption(_))
    ));
}

#[tokio::test]
async fn abort_is_acknowledged_whatever_it_carries() {
    for data in [&b""[..], b"bye", &[7; 100_000]] {
        let mut client = greet().await;
        assert_eq!(client.kinds(&option(OPT_ABORT, data)).await, [REP_ACK]);
        client.end().await.unwrap();
    }
}

#[tokio::test]
async fn every_bad_option_is_answered_and_the_next_one_understood() {
    let mut client = greet().await;
    for (bytes, expected) in [
        (option(OPT_STARTTLS, b""), REP_ERR_UNSUP),
        (option(OPT_EXTENDED_HEADERS, b"x"), REP_ERR_INVALID),
        (option(0xdead, b"whatever"), REP_ERR_UNSUP),
        (option(OPT_LIST, b"x"), REP_ERR_INVALID),
        (option(OPT_GO, b""), REP_ERR_INVALID),
        (option(OPT_GO, &[0xff; 5000]), REP_ERR_INVALID),
        (option(OPT_GO, &vec![0; 1 << 20]), REP_ERR_TOO_BIG),
        (go("nowhere"), REP_ERR_UNKNOWN),
        (go("broken"), REP_ERR_POLICY),
        (contexts(OPT_LIST_META_CONTEXT, "a", &[]), REP_ERR_INVALID),
    ] {
        assert_eq!(client.kinds(&bytes).await, [expected]);
    }
    let list = client.kinds(&option(OPT_LIST, b"")).await;
    assert_eq!(list, [REP_SERVER, REP_SERVER, REP_SERVER, REP_ACK]);
    assert_eq!(client.kinds(&go("a")).await, [REP_INFO, REP_ACK]);
}

#[tokio::test]
async fn context_queries_select_by_name_and_list_by_namespace() {
    let mut client = greet().await;
    client.kinds(&option(OPT_STRUCTURED_REPLY, b"")).await;
    for (kind, queries, found) in [
        (OPT_LIST_META_CONTEXT, &[][..], 2),
        (OPT_LIST_META_CONTEXT, &["base:"], 1),
        (
            OPT_LIST_META_CONTEXT,
            &["whimbrel:residency", "base:", "base:allocation"],
            2,
        ),
        (OPT_LIST_META_CONTEXT, &["base:alloc", "other:"], 0),
        (OPT_SET_META_CONTEXT, &[], 0),
        (OPT_SET_META_CONTEXT, &["base:"], 0),
        (
            OPT_SET_META_CONTEXT,
            &["base:allocation", "base:allocation"],
            1,
        ),
    ] {
        let got = client.kinds(&contexts(kind, "a", queries)).await;
        let mut expected = vec![REP_META_CONTEXT; found];
        expected.push(REP_ACK);
        assert_eq!(got, expected, "{kind} {queries:?}");
    }
    let unknown = contexts(OPT_SET_META_CONTEXT, "nowhere", &["base:allocation"]);
    assert_eq!(client.kinds(&unknown).await, [REP_ERR_UNKNOWN]);
}

#[tokio::test]
async fn contexts_set_for_another_export_or_by_a_failed_option_do_not_count() {
    for second in [
        contexts(OPT_SET_META_CONTEXT, "ro", &["base:allocation"]),
        contexts(OPT_SET_META_CONTEXT, "a", &["no namespace"]),
    ] {
        let mut client = greet().await;
        client.kinds(&option(OPT_STRUCTURED_REPLY, b"")).await;
        let first = contexts(OPT_SET_META_CONTEXT, "a", &["base:allocation"]);
        assert_eq!(client.kinds(&first).await, [REP_META_CONTEXT, REP_ACK]);
        client.kinds(&second).await;
        client.kinds(&go("a")).await;
        let status = client::request(CMD_BLOCK_STATUS, 0, 5, 0, 512);
        client.send(&status).await;
        assert_eq!(client.read_u32().await, STRUCTURED_REPLY_MAGIC);
        let head: [u8; 16] = client.read().await;
        assert_eq!(head[..4], [0, 1, 0x80, 1], "an error, and the last chunk");
        assert_eq!(client.read_u32().await, 22);
    }
}

#[tokio::test]
async fn a_read_only_export_offers_nothing_that_writes() {
    let mut client = greet().await;
    client.send(&go("ro")).await;
    let (_, _, info) = client.option_reply().await;
    let flags = u16::from_be_bytes([info[10], info[11]]);
    assert_ne!(flags & FLAG_READ_ONLY, 0);
    let writing = FLAG_SEND_FUA | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;
    assert_eq!(flags & writing, 0);
}

#[tokio::test]
async fn options_may_arrive_a_byte_at_a_time() {
    let mut client = greet().await;
    for byte in go("a") {
        client.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(client.option_reply().await.1, REP_INFO);
}

#[tokio::test]
async fn a_client_that_vanishes_while_it_negotiates_is_no_error() {
    for sent in [0, 1, 20] {
        let mut client = greet().await;
        client.send(&go("a")[..sent]).await;
        client.stream.shutdown().await.unwrap();
        client.end().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_decides_is_cut_off() {
    let client = greet().await;
    let end = client.end().await;
    assert!(matches!(end, Err(ServeError::HandshakeTimeout)));
}

#[tokio::test]
async fn shutdown_ends_a_negotiation() {
    let client = greet().await;
    client.shutdown.cancel();
    client.end().await.unwrap();
}
