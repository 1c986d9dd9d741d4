//! Frames over a real connection, and what happens when they are damaged or cut off.

mod common;

use bytes::{Bytes, BytesMut};
use common::{connected, hello, stranger, two_hosts};
use tokio::io::AsyncWriteExt;
use whimbrel_peer::PeerError;
use whimbrel_peer::connection::FrameReceiver;
use whimbrel_peer::identity::IDENTITY_FILE;
use whimbrel_peer::listener::{ListenSettings, Listener};
use whimbrel_wire::frame::{FrameError, HEADER_LEN, Kind, MAX_PAYLOAD, encode, header};

#[tokio::test]
async fn frames_of_every_size_arrive_in_order_both_ways_at_once() {
    let (oslo, bern) = two_hosts();
    let (dialled, accepted, _listener) = connected(&oslo, &bern).await;
    let sizes = [0, 1, 7, 4096, 16_383, 65_536, MAX_PAYLOAD - 5];
    let exchange = |connection: whimbrel_peer::connection::Connection| async move {
        let (mut sender, mut receiver) = connection.split();
        let sending = async {
            for (i, size) in sizes.iter().enumerate() {
                let body = Bytes::from(vec![i as u8; *size]);
                sender.send(Kind::Units, b"head:", body).await.unwrap();
            }
            sender.send(Kind::Ping, b"12345678", Bytes::new()).await
        };
        let receiving = async {
            for (i, size) in sizes.iter().enumerate() {
                let frame = receiver.recv().await.unwrap();
                assert_eq!(frame.kind, Kind::Units);
                assert_eq!(&frame.payload[..5], b"head:");
                assert_eq!(frame.payload.len(), 5 + size);
                assert!(frame.payload[5..].iter().all(|&byte| byte == i as u8));
            }
            receiver.recv().await.unwrap()
        };
        let (sent, ping) = tokio::join!(sending, receiving);
        sent.unwrap();
        assert_eq!(
            (ping.kind, &ping.payload[..]),
            (Kind::Ping, &b"12345678"[..])
        );
        let bytes: u64 = sizes.iter().map(|s| (HEADER_LEN + 5 + s) as u64).sum();
        let traffic = sender.traffic();
        assert_eq!(traffic.bytes_sent(), bytes + 24);
        assert_eq!(traffic.bytes_received(), bytes + 24);
        assert_eq!(traffic.frames_sent(), sizes.len() as u64 + 1);
        assert_eq!(traffic.frames_received(), sizes.len() as u64 + 1);
        sender.close().await.unwrap();
        let end = receiver.recv().await.unwrap_err();
        assert!(matches!(end, PeerError::Closed { .. }), "{end}");
    };
    tokio::join!(exchange(dialled), exchange(accepted.connection));
}

#[tokio::test]
async fn a_cancelled_send_tears_no_frame() {
    let (oslo, bern) = two_hosts();
    let (dialled, accepted, _listener) = connected(&oslo, &bern).await;
    let (mut sender, _keep) = dialled.split();
    let (_keep, mut receiver) = accepted.connection.split();
    // Nobody receives yet, so that sends block, each cancelled at some point of its frame.
    let mut begun = Vec::new();
    for i in 0..200_u32 {
        let before = sender.begun();
        let body = Bytes::from(vec![i as u8; 300_000]);
        let head = i.to_le_bytes();
        let mut sending = Box::pin(sender.send(Kind::Units, &head, body));
        for _ in 0..3 {
            tokio::select! {
                biased;
                sent = &mut sending => { sent.unwrap(); break }
                () = tokio::task::yield_now() => {}
            }
        }
        drop(sending);
        if sender.begun() > before {
            begun.push(i);
        }
    }
    let finishing = async {
        sender.finish().await.unwrap();
        sender.close().await
    };
    let receiving = async {
        let mut received = Vec::new();
        while let Ok(frame) = receiver.recv().await {
            let i = u32::from_le_bytes(frame.payload[..4].try_into().unwrap());
            assert_eq!(frame.payload.len(), 300_004);
            assert!(frame.payload[4..].iter().all(|&byte| byte == i as u8));
            received.push(i);
        }
        received
    };
    let (closed, received) = tokio::join!(finishing, receiving);
    closed.unwrap();
    assert_eq!(received, begun);
}

#[tokio::test]
async fn a_cancelled_recv_loses_nothing() {
    let (oslo, bern) = two_hosts();
    let (dialled, accepted, _listener) = connected(&oslo, &bern).await;
    let (mut sender, _keep) = dialled.split();
    let (_keep, mut receiver) = accepted.connection.split();
    let sending = tokio::spawn(async move {
        for i in 0..50_u8 {
            let body = Bytes::from(vec![i; 100_000]);
            sender.send(Kind::Units, &[], body).await.unwrap();
        }
        sender.close().await.unwrap();
    });
    let mut next = 0_u8;
    loop {
        let received = tokio::select! {
            biased;
            received = receiver.recv() => received,
            () = tokio::task::yield_now() => continue,
        };
        match received {
            Ok(frame) => {
                assert_eq!(frame.payload, vec![next; 100_000]);
                next += 1;
            }
            Err(PeerError::Closed { .. }) => break,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(next, 50);
    sending.await.unwrap();
}

#[tokio::test]
async fn a_frame_that_is_too_long_is_not_sent_and_harms_nothing() {
    let (oslo, bern) = two_hosts();
    let (dialled, accepted, _listener) = connected(&oslo, &bern).await;
    let (mut sender, _keep) = dialled.split();
    let (_keep, mut receiver) = accepted.connection.split();
    let body = Bytes::from(vec![0; MAX_PAYLOAD + 1]);
    let told = sender.send(Kind::Units, &[], body).await.unwrap_err();
    assert!(matches!(told, PeerError::FrameRefused { .. }), "{told}");
    sender
        .send(Kind::Control, b"next", Bytes::new())
        .await
        .unwrap();
    assert_eq!(&receiver.recv().await.unwrap().payload[..], b"next");
}

/// How Oslo's end ends.
#[derive(Clone, Copy)]
enum End {
    /// As TLS wants it.
    Farewell,
    /// As that of a process that dies.
    Death,
}

/// What Bern makes of bytes that Oslo sends after a proper greeting, before its end.
async fn receives(sent: &[u8], end: End) -> PeerError {
    let (oslo, bern) = two_hosts();
    let mut listener = bern.listens(ListenSettings::default()).await;
    let key = oslo.folder.path().join(IDENTITY_FILE);
    let addr = listener.local_addr();
    let mut stream = stranger(addr, Some(&key), &[&rustls::version::TLS13])
        .await
        .unwrap();
    let mut out = BytesMut::new();
    encode(Kind::Hello, 0, &hello().to_bytes().unwrap(), &mut out).unwrap();
    // Along with the greeting, so that what is read with it is not lost.
    out.extend_from_slice(sent);
    stream.write_all(&out).await.unwrap();
    let mut receiver = accepted(&mut listener).await;
    match end {
        End::Farewell => stream.shutdown().await.unwrap(),
        End::Death => stream.get_mut().0.shutdown().await.unwrap(),
    }
    loop {
        if let Err(error) = receiver.recv().await {
            return error;
        }
    }
}

async fn accepted(listener: &mut Listener) -> FrameReceiver {
    listener.accept().await.unwrap().connection.split().1
}

#[tokio::test]
async fn bad_frames_are_told_apart() {
    let good = {
        let mut out = BytesMut::new();
        encode(Kind::Control, 0, b"a message", &mut out).unwrap();
        out
    };
    let with = |at: usize, byte: u8| {
        let mut bytes = good.to_vec();
        bytes[at] = byte;
        // A good frame ahead of it is delivered all the same.
        [&good[..], &bytes].concat()
    };
    let bad = |error: PeerError| match error {
        PeerError::BadFrame { source, .. } => source,
        other => panic!("{other}"),
    };
    let oversize = {
        let mut bytes = header(Kind::Units, 0, &[]).unwrap();
        bytes[4..8].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
        bytes
    };
    assert_eq!(
        bad(receives(&oversize, End::Farewell).await),
        FrameError::TooLong {
            len: MAX_PAYLOAD as u64 + 1
        }
    );
    assert_eq!(
        bad(receives(&with(0, b'G'), End::Farewell).await),
        FrameError::BadMagic { found: b'G' }
    );
    assert_eq!(
        bad(receives(&with(1, 99), End::Farewell).await),
        FrameError::UnknownKind { kind: 99 }
    );
    assert!(matches!(
        bad(receives(&with(20, b'?'), End::Farewell).await),
        FrameError::Checksum {
            kind: Kind::Control,
            len: 9,
            ..
        }
    ));
}

#[tokio::test]
async fn an_end_between_frames_and_one_within_are_told_apart() {
    let mut frame = BytesMut::new();
    encode(Kind::Control, 0, b"a message", &mut frame).unwrap();
    for end in [End::Farewell, End::Death] {
        let whole = receives(&frame, end).await;
        assert!(matches!(whole, PeerError::Closed { .. }), "{whole}");
        let torn = receives(&frame[..20], end).await;
        assert!(matches!(torn, PeerError::Torn { .. }), "{torn}");
    }
}

#[tokio::test]
async fn a_second_greeting_is_an_error() {
    let mut again = BytesMut::new();
    encode(Kind::Hello, 0, &hello().to_bytes().unwrap(), &mut again).unwrap();
    let seen = receives(&again, End::Farewell).await;
    assert!(matches!(seen, PeerError::GreetedAgain { .. }), "{seen}");
}
