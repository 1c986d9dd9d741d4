//! Bytes a second from one daemon to another over the loopback: TLS, frames and checksums included,
//! both ends in this process.
//!
//! `cargo run --release -p whimbrel-peer --example throughput -- [MIB] [FRAME_KIB] [CONNECTIONS]`

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use whimbrel_peer::PeerError;
use whimbrel_peer::dial::{DialSettings, dial};
use whimbrel_peer::hello::{Class, Hello, SessionId, Speaker, VersionRange};
use whimbrel_peer::identity::{IDENTITY_FILE, Identity};
use whimbrel_peer::listener::{ListenSettings, Listener};
use whimbrel_peer::rights::Rights;
use whimbrel_peer::trust::{PEERS_FILE, Peer, PeerName, TrustStore};
use whimbrel_wire::frame::Kind;

#[tokio::main]
async fn main() -> Result<(), PeerError> {
    let mut numbers = std::env::args().skip(1).map(|n| n.parse::<usize>());
    let mut number = |default| numbers.next().and_then(Result::ok).unwrap_or(default);
    let (mib, frame, connections) = (number(2048), number(256) << 10, number(1).max(1));

    let folder = std::env::temp_dir().join(format!("whimbrel-throughput-{}", std::process::id()));
    let result = std::fs::create_dir(&folder).map_err(|source| PeerError::File {
        step: whimbrel_peer::error::FileStep::Write,
        path: folder.clone(),
        source,
    });
    result?;
    let run = run(&folder, mib << 20, frame, connections).await;
    let _ = std::fs::remove_dir_all(&folder);
    run
}

async fn run(
    folder: &std::path::Path,
    bytes: usize,
    frame: usize,
    connections: usize,
) -> Result<(), PeerError> {
    let identity = Identity::create(&folder.join(IDENTITY_FILE))?;
    let trust = TrustStore::load(folder.join(PEERS_FILE))?;
    let name: PeerName = "oneself".parse()?;
    let key = identity.key_id();
    let peer = Peer {
        key,
        addresses: vec![],
        may: Rights::ALL,
    };
    trust.add(name.clone(), peer)?;
    let us = Speaker {
        versions: VersionRange { min: 1, max: 1 },
        software: "throughput".into(),
        features: 0,
        host: "oneself".into(),
    };
    let here = SocketAddr::from(([127, 0, 0, 1], 0));
    let settings = ListenSettings::default();
    let mut listener = Listener::bind(here, identity.clone(), trust, us.clone(), settings).await?;
    let address = listener.local_addr().into();

    let mut tasks = tokio::task::JoinSet::new();
    let began = Instant::now();
    for n in 0..connections {
        let hello = Hello {
            speaker: us.clone(),
            class: Class::Push(n as u16),
            session: SessionId::NONE,
        };
        let settings = DialSettings::default();
        let (dialled, accepted) = tokio::join!(
            dial(&address, &identity, &name, key, &hello, &settings),
            listener.accept()
        );
        let (dialled, accepted) = (dialled?, accepted?);
        if n == 0 {
            println!("{:?}", dialled.sockets());
        }
        let frames = bytes / connections / frame;
        tasks.spawn(async move {
            let (mut sender, _receiver) = dialled.split();
            let body = Bytes::from(vec![0x5a; frame]);
            for _ in 0..frames {
                sender.send(Kind::Units, &[], body.clone()).await?;
            }
            sender.close().await?;
            Ok(0)
        });
        tasks.spawn(async move {
            let (_sender, mut receiver) = accepted.connection.split();
            loop {
                match receiver.recv().await {
                    Ok(_) => {}
                    Err(PeerError::Closed { .. }) => {
                        return Ok(receiver.traffic().bytes_received());
                    }
                    Err(other) => return Err(other),
                }
            }
        });
    }
    let mut received = 0;
    while let Some(ended) = tasks.join_next().await {
        let of_one: Result<u64, PeerError> = ended.expect("no task panics or is cancelled");
        received += of_one?;
    }
    let took = began.elapsed().as_secs_f64();
    println!(
        "{received} bytes in frames of {frame} over {connections} connection(s) in {took:.2} s: {:.0} MB/s",
        received as f64 / took / 1e6
    );
    Ok(())
}
