//! Extended headers, byte by byte.

#[allow(dead_code)]
mod client;
#[allow(dead_code)]
mod memory;

use std::sync::Arc;

use client::{Chunk, Client, contexts, extended, go, option, request};
use memory::{Memory, PAGE, Shelf};
use whimbrel_nbd::spec::*;
use whimbrel_nbd::{ExportInfo, Limits, ServeError};

const SIZE: u64 = 8 << 30;
const BOTH: [&str; 2] = ["base:allocation", "whimbrel:residency"];

fn shelf() -> Arc<Shelf<Memory>> {
    let mut info = ExportInfo::new(SIZE);
    info.contexts = BOTH.map(str::to_owned).to_vec();
    info.max_block = 1 << 20;
    Shelf::of([("a", Memory::with(info))])
}

/// In the transmission phase with these contexts; and the transmission flags.
async fn attach(queries: &[&str]) -> (Client, u16) {
    let mut client = Client::greet(shelf(), Limits::default(), 3).await;
    let agreed = client.kinds(&option(OPT_EXTENDED_HEADERS, b"")).await;
    assert_eq!(agreed, [REP_ACK]);
    client
        .kinds(&contexts(OPT_SET_META_CONTEXT, "a", queries))
        .await;
    client.send(&go("a")).await;
    let (_, kind, info) = client.option_reply().await;
    assert_eq!(kind, REP_INFO);
    assert_eq!(client.option_reply().await.1, REP_ACK);
    (client, u16::from_be_bytes([info[10], info[11]]))
}

/// Sends a request and expects an error, with the payload it has skipped.
async fn refused(client: &mut Client, bytes: &[u8]) -> u32 {
    client.send(bytes).await;
    let Chunk {
        done,
        kind,
        cookie,
        offset,
        payload,
    } = client.chunk().await;
    assert!(done && kind == REPLY_TYPE_ERROR && cookie == 7);
    assert_eq!(offset.to_be_bytes(), bytes[16..24]);
    u32::from_be_bytes(payload[..4].try_into().unwrap())
}

fn done(cookie: u64, offset: u64) -> Chunk {
    Chunk {
        done: true,
        kind: REPLY_TYPE_NONE,
        cookie,
        offset,
        payload: Vec::new(),
    }
}

/// The descriptors of a status chunk, after its context and their number.
fn statuses(payload: &[u8]) -> (u32, Vec<(u64, u64)>) {
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
    let id = u32::from_be_bytes(payload[..4].try_into().unwrap());
    let count = u32::from_be_bytes(payload[4..8].try_into().unwrap());
    let pairs: Vec<_> = payload[8..]
        .chunks_exact(16)
        .map(|pair| (number(&pair[..8]), number(&pair[8..])))
        .collect();
    assert_eq!(pairs.len(), count as usize);
    (id, pairs)
}

fn filter(len: u64, ids: &[u32]) -> Vec<u8> {
    let mut payload = len.to_be_bytes().to_vec();
    payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
    let len = payload.len() as u64;
    let mut bytes = extended(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 7, 0, len);
    bytes.extend(payload);
    bytes
}

#[tokio::test]
async fn structured_replies_after_extended_headers_are_a_step_back() {
    let mut client = Client::greet(shelf(), Limits::default(), 3).await;
    for (sent, expected) in [
        (OPT_STRUCTURED_REPLY, REP_ACK),
        (OPT_EXTENDED_HEADERS, REP_ACK),
        (OPT_STRUCTURED_REPLY, REP_ERR_EXT_HEADER_REQD),
        (OPT_EXTENDED_HEADERS, REP_ACK),
    ] {
        assert_eq!(client.kinds(&option(sent, b"")).await, [expected]);
    }
    client.send(&option(OPT_EXPORT_NAME, b"a")).await;
    assert!(matches!(client.end().await, Err(ServeError::Refused(_))));
}

#[tokio::test]
async fn contexts_need_no_structured_replies_besides() {
    let mut client = Client::greet(shelf(), Limits::default(), 3).await;
    let ask = contexts(OPT_LIST_META_CONTEXT, "a", &[]);
    assert_eq!(client.kinds(&ask).await, [REP_ERR_INVALID]);
    client.kinds(&option(OPT_EXTENDED_HEADERS, b"")).await;
    let found = [REP_META_CONTEXT, REP_META_CONTEXT, REP_ACK];
    assert_eq!(client.kinds(&ask).await, found);
}

#[tokio::test]
async fn filters_are_offered_where_there_is_something_to_filter() {
    let offered = |flags| flags & FLAG_BLOCK_STATUS_PAYLOAD != 0;
    assert!(offered(attach(&BOTH).await.1));
    assert!(!offered(attach(&[]).await.1));
    let mut client = Client::greet(shelf(), Limits::default(), 3).await;
    client.kinds(&option(OPT_STRUCTURED_REPLY, b"")).await;
    client
        .kinds(&contexts(OPT_SET_META_CONTEXT, "a", &BOTH))
        .await;
    client.send(&go("a")).await;
    let info = client.option_reply().await.2;
    assert!(!offered(u16::from_be_bytes([info[10], info[11]])));
}

#[tokio::test]
async fn every_reply_is_a_chunk_with_the_offset_of_its_request() {
    let (mut client, flags) = attach(&[]).await;
    assert_ne!(flags & FLAG_SEND_DF, 0);
    let at = PAGE as u64;
    // With the flag that the specification asks for, and without it, as QEMU writes.
    for flag in [CMD_FLAG_PAYLOAD_LEN, 0] {
        let mut write = extended(CMD_WRITE, flag | CMD_FLAG_FUA, 1, at, 512);
        write.extend([5; 512]);
        client.send(&write).await;
        assert_eq!(client.chunk().await, done(1, at));
    }
    client.send(&extended(CMD_FLUSH, 0, 2, 0, 0)).await;
    assert_eq!(client.chunk().await, done(2, 0));
    client
        .send(&extended(CMD_READ, CMD_FLAG_DF, 3, at, 512))
        .await;
    let mut expected = at.to_be_bytes().to_vec();
    expected.extend([5; 512]);
    assert_eq!(
        client.chunk().await,
        Chunk {
            kind: REPLY_TYPE_OFFSET_DATA,
            payload: expected,
            ..done(3, at)
        }
    );
}

#[tokio::test]
async fn a_sparse_read_comes_as_holes_and_data_and_as_one_if_that_is_asked_for() {
    let (mut client, _) = attach(&[]).await;
    let page = PAGE as u64;
    let mut write = extended(CMD_WRITE, CMD_FLAG_PAYLOAD_LEN, 1, 2 * page, page);
    write.extend(vec![5; PAGE]);
    client.send(&write).await;
    assert_eq!(client.chunk().await, done(1, 2 * page));
    client.send(&extended(CMD_READ, 0, 2, page, 4 * page)).await;
    let hole = |offset: u64, len: u32| [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    let first = client.chunk().await;
    assert_eq!(
        (first.done, first.kind, first.payload),
        (false, REPLY_TYPE_OFFSET_HOLE, hole(page, PAGE as u32))
    );
    let second = client.chunk().await;
    assert!(!second.done && second.kind == REPLY_TYPE_OFFSET_DATA);
    assert_eq!(second.payload[..8], (2 * page).to_be_bytes());
    assert_eq!(second.payload[8..], vec![5; PAGE]);
    let third = client.chunk().await;
    assert!(third.done && third.offset == page);
    assert_eq!(third.payload, hole(3 * page, 2 * PAGE as u32));
    client
        .send(&extended(CMD_READ, CMD_FLAG_DF, 3, page, 4 * page))
        .await;
    let whole = client.chunk().await;
    assert!(whole.done && whole.kind == REPLY_TYPE_OFFSET_DATA);
    assert_eq!(whole.payload.len(), 8 + 4 * PAGE);
}

#[tokio::test]
async fn lengths_beyond_32_bits_are_served_where_no_payload_limits_them() {
    let (mut client, _) = attach(&["base:allocation"]).await;
    for kind in [CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES] {
        client.send(&extended(kind, 0, 9, 0, SIZE)).await;
        assert_eq!(client.chunk().await, done(9, 0));
    }
    client
        .send(&extended(CMD_BLOCK_STATUS, 0, 9, 0, SIZE))
        .await;
    let chunk = client.chunk().await;
    assert!(chunk.done && chunk.kind == REPLY_TYPE_BLOCK_STATUS_EXT);
    assert_eq!(statuses(&chunk.payload), (1, vec![(SIZE, 3)]));
    let read = extended(CMD_READ, 0, 7, 0, SIZE);
    assert_eq!(refused(&mut client, &read).await, 75, "EOVERFLOW");
}

#[tokio::test]
async fn a_status_can_be_asked_for_some_of_the_contexts() {
    let (mut client, _) = attach(&BOTH).await;
    for (ids, expected) in [(&[2][..], &[2][..]), (&[1], &[1]), (&[2, 1], &[1, 2])] {
        client.send(&filter(SIZE, ids)).await;
        for (index, id) in expected.iter().enumerate() {
            let chunk = client.chunk().await;
            assert_eq!(chunk.done, index + 1 == expected.len());
            // Hole and zero to the one; not written to the other.
            let flags = if *id == 1 { 3 } else { 0 };
            assert_eq!(statuses(&chunk.payload), (*id, vec![(SIZE, flags)]));
        }
    }
}

#[tokio::test]
async fn a_filter_that_names_what_is_not_selected_or_nothing_is_einval() {
    let (mut client, _) = attach(&BOTH[1..]).await;
    let odd = {
        let mut bytes = extended(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 7, 0, 13);
        bytes.extend([0; 13]);
        bytes
    };
    for bytes in [
        filter(512, &[]),
        filter(512, &[1]),
        filter(512, &[2, 2]),
        filter(512, &[2, u32::MAX]),
        filter(512, &[2; 17]),
        filter(0, &[2]),
        filter(SIZE + 512, &[2]),
        filter(100, &[2]),
        extended(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 7, 0, 0),
        odd,
    ] {
        assert_eq!(refused(&mut client, &bytes).await, 22, "{bytes:?}");
    }
    client.send(&filter(512, &[2])).await;
    assert_eq!(statuses(&client.chunk().await.payload).0, 2);
}

#[tokio::test]
async fn a_payload_where_none_belongs_is_skipped_and_refused() {
    let (mut client, _) = attach(&[]).await;
    for kind in [
        CMD_READ,
        CMD_FLUSH,
        CMD_TRIM,
        CMD_CACHE,
        CMD_WRITE_ZEROES,
        CMD_BLOCK_STATUS,
        99,
    ] {
        let mut bytes = extended(kind, CMD_FLAG_PAYLOAD_LEN, 7, 0, 512);
        bytes.extend([0; 512]);
        assert_eq!(refused(&mut client, &bytes).await, 22, "{kind}");
    }
    // Longer than the largest block, but no longer than a client may think it is.
    let mut bytes = extended(CMD_WRITE, CMD_FLAG_PAYLOAD_LEN, 7, 0, 2 << 20);
    bytes.extend(vec![0; 2 << 20]);
    assert_eq!(refused(&mut client, &bytes).await, 22);
    let bytes = extended(CMD_WRITE, CMD_FLAG_PAYLOAD_LEN, 7, 0, 0);
    assert_eq!(refused(&mut client, &bytes).await, 22);
}

#[tokio::test]
async fn a_payload_beyond_all_limits_ends_the_connection() {
    for len in [u64::from(DEFAULT_MAX_PAYLOAD) + 1, u64::MAX] {
        let (mut client, _) = attach(&[]).await;
        client
            .send(&extended(CMD_WRITE, CMD_FLAG_PAYLOAD_LEN, 7, 0, len))
            .await;
        assert!(matches!(client.end().await, Err(ServeError::StreamLost(_))));
    }
}

#[tokio::test]
async fn a_compact_request_where_extended_ones_were_agreed_ends_the_connection() {
    let (mut client, _) = attach(&[]).await;
    let mut bytes = request(CMD_READ, 0, 1, 0, 512);
    bytes.extend([0; 4]);
    client.send(&bytes).await;
    assert!(matches!(client.end().await, Err(ServeError::StreamLost(_))));
}

#[tokio::test]
async fn a_header_may_arrive_a_byte_at_a_time() {
    let (mut client, _) = attach(&BOTH).await;
    for byte in filter(512, &[1]) {
        client.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(statuses(&client.chunk().await.payload).0, 1);
    client.send(&extended(CMD_DISC, 0, 0, 0, 0)).await;
    client.end().await.unwrap();
}
