//! A client that says exactly what a test wants said, right or wrong.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use whimbrel_nbd::spec::*;
use whimbrel_nbd::{Directory, Limits, ServeError, Tls, serve_connection};

pub struct Client {
    pub stream: DuplexStream,
    pub server: JoinHandle<Result<(), ServeError>>,
    pub shutdown: CancellationToken,
}

/// One reply of the transmission phase.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub error: u32,
    pub data: Vec<u8>,
}

/// One extended reply chunk.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    pub done: bool,
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub payload: Vec<u8>,
}

pub fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub fn go(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend([0, 0]);
    option(OPT_GO, &data)
}

pub fn request(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// A request with an extended header.
pub fn extended(kind: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// LIST_META_CONTEXT or SET_META_CONTEXT.
pub fn contexts(kind: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    option(kind, &data)
}

impl Client {
    /// A connection with a pipe of 64 KiB each way, before the greeting.
    pub fn connect<D: Directory>(directory: Arc<D>, limits: Limits) -> Client {
        Client::connect_tls(directory, limits, Tls::Off)
    }

    pub fn connect_tls<D: Directory>(directory: Arc<D>, limits: Limits, tls: Tls) -> Client {
        let (stream, theirs) = duplex(64 << 10);
        let shutdown = CancellationToken::new();
        let serving = serve_connection(theirs, directory, limits, tls, shutdown.clone());
        Client {
            stream,
            server: tokio::spawn(serving),
            shutdown,
        }
    }

    /// A connection that has said `flags` and can send options.
    pub async fn greet<D: Directory>(directory: Arc<D>, limits: Limits, flags: u32) -> Client {
        let mut client = Client::connect(directory, limits);
        client.greeted(flags).await;
        client
    }

    pub async fn greeted(&mut self, flags: u32) {
        let client = self;
        let greeting: [u8; 18] = client.read().await;
        assert_eq!(greeting[..8], MAGIC.to_be_bytes());
        assert_eq!(greeting[8..16], OPTION_MAGIC.to_be_bytes());
        assert_eq!(greeting[16..], [0, 3]);
        client.send(&flags.to_be_bytes()).await;
    }

    /// Sends an option and returns the types of its replies.
    pub async fn kinds(&mut self, bytes: &[u8]) -> Vec<u32> {
        self.send(bytes).await;
        let mut kinds = Vec::new();
        loop {
            let (_, kind, _) = self.option_reply().await;
            kinds.push(kind);
            if kind == REP_ACK || kind >= REP_ERR_UNSUP {
                return kinds;
            }
        }
    }

    /// A connection in its transmission phase, with simple replies.
    pub async fn attach<D: Directory>(directory: Arc<D>, limits: Limits) -> Client {
        let mut client = Client::greet(directory, limits, 3).await;
        client.send(&go("")).await;
        while client.option_reply().await.1 != REP_ACK {}
        client
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub async fn read<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    pub async fn read_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.read().await)
    }

    /// The option replied to, the type and the data of one option reply.
    pub async fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        assert_eq!(self.read::<8>().await, OPTION_REPLY_MAGIC.to_be_bytes());
        let (option, kind) = (self.read_u32().await, self.read_u32().await);
        let mut data = vec![0; self.read_u32().await as usize];
        self.stream.read_exact(&mut data).await.unwrap();
        (option, kind, data)
    }

    /// One simple reply; `len` bytes of data are expected if it is no error.
    pub async fn reply(&mut self, len: usize) -> Reply {
        assert_eq!(self.read_u32().await, SIMPLE_REPLY_MAGIC);
        let error = self.read_u32().await;
        let cookie = u64::from_be_bytes(self.read().await);
        let mut data = vec![0; if error == 0 { len } else { 0 }];
        self.stream.read_exact(&mut data).await.unwrap();
        Reply {
            cookie,
            error,
            data,
        }
    }

    pub async fn chunk(&mut self) -> Chunk {
        assert_eq!(self.read_u32().await, EXTENDED_REPLY_MAGIC);
        let flags = u16::from_be_bytes(self.read().await);
        let kind = u16::from_be_bytes(self.read().await);
        let cookie = u64::from_be_bytes(self.read().await);
        let offset = u64::from_be_bytes(self.read().await);
        let mut payload = vec![0; u64::from_be_bytes(self.read().await) as usize];
        self.stream.read_exact(&mut payload).await.unwrap();
        assert_eq!(flags & !REPLY_FLAG_DONE, 0);
        Chunk {
            done: flags == REPLY_FLAG_DONE,
            kind,
            cookie,
            offset,
            payload,
        }
    }

    /// Asserts that nothing more comes, and returns how the server ended.
    pub async fn end(mut self) -> Result<(), ServeError> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"");
        self.server.await.unwrap()
    }
}
