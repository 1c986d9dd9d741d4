//! The listeners.

#[allow(dead_code)]
mod client;
#[allow(dead_code)]
mod memory;

use std::io::ErrorKind;
use std::time::Duration;

use client::request;
use memory::{Memory, Shelf};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use whimbrel_nbd::spec::*;
use whimbrel_nbd::{Limits, Server};

fn server(connections: usize) -> Server<Shelf<Memory>> {
    let limits = Limits {
        connections,
        ..Limits::default()
    };
    Server::new(Shelf::of([("disk", Memory::new(1 << 20))]), limits)
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_one_to_leave() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let serving = tokio::spawn(async move { server(1).serve_unix(listener, stopped).await });

    let mut greeting = [0; 18];
    let mut first = UnixStream::connect(&path).await.unwrap();
    first.read_exact(&mut greeting).await.unwrap();
    let mut second = UnixStream::connect(&path).await.unwrap();
    // Round trips of the first connection give the server every chance to serve the second.
    first.write_all(&[0, 0, 0, 3]).await.unwrap();
    for _ in 0..10 {
        let list = b"IHAVEOPT\0\0\0\x03\0\0\0\0";
        first.write_all(list).await.unwrap();
        first.read_exact(&mut [0; 20 + 8 + 20]).await.unwrap();
    }
    let early = second.try_read(&mut greeting).unwrap_err();
    assert_eq!(early.kind(), ErrorKind::WouldBlock);
    drop(first);
    second.read_exact(&mut greeting).await.unwrap();

    stop.cancel();
    serving.await.unwrap();
    assert_eq!(second.read(&mut greeting).await.unwrap(), 0);
}

#[tokio::test]
async fn tcp_is_served_like_unix() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let serving = tokio::spawn(async move { server(8).serve_tcp(listener, stopped).await });
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    stop.cancel();
    serving.await.unwrap();
}

/// A client of the disk, past negotiation.
async fn attached(path: &std::path::Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.read_exact(&mut [0; 18]).await.unwrap();
    let flags = FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES;
    stream.write_all(&flags.to_be_bytes()).await.unwrap();
    let name = client::option(OPT_EXPORT_NAME, b"disk");
    stream.write_all(&name).await.unwrap();
    stream.read_exact(&mut [0; 10]).await.unwrap();
    stream
}

/// Reads a reply that says success.
async fn succeeded(stream: &mut UnixStream) {
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
}

#[tokio::test]
async fn a_write_that_comes_in_pieces_is_waited_for_however_long_they_take() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let serving = tokio::spawn(async move { server(8).serve_unix(listener, stopped).await });
    let mut stream = attached(&path).await;
    let content: Vec<u8> = (0..200_000u32 / 512 * 512).map(|n| n as u8 ^ 7).collect();
    let mut bytes = request(CMD_WRITE, 0, 1, 512, content.len() as u32);
    bytes.extend(&content);
    // Longer than the thread waits for its client alone: in the header, in the payload, between requests.
    for piece in [&bytes[..10], &bytes[10..100_000], &bytes[100_000..]] {
        stream.write_all(piece).await.unwrap();
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    succeeded(&mut stream).await;
    let read = request(CMD_READ, 0, 2, 512, content.len() as u32);
    stream.write_all(&read).await.unwrap();
    succeeded(&mut stream).await;
    let mut back = vec![0; content.len()];
    stream.read_exact(&mut back).await.unwrap();
    assert!(back == content);
    // In the midst of a request the client leaves.
    stream.write_all(&bytes[..150_000]).await.unwrap();
    drop(stream);
    stop.cancel();
    serving.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_rests_does_not_keep_the_server_from_stopping() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let serving = tokio::spawn(async move { server(8).serve_unix(listener, stopped).await });
    let mut stream = attached(&path).await;
    let mut bytes = request(CMD_WRITE, 0, 1, 0, 512);
    bytes.extend([7; 512]);
    let restless = tokio::spawn(async move {
        let mut reply = [0; 16];
        while stream.write_all(&bytes).await.is_ok() && stream.read_exact(&mut reply).await.is_ok()
        {
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    stop.cancel();
    serving.await.unwrap();
    restless.await.unwrap();
}
