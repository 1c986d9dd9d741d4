//! The listeners.

#[allow(dead_code)]
mod memory;

use std::io::ErrorKind;

use memory::{Memory, Shelf};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
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
