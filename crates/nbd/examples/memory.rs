//! Serves a sparse memory disk on a Unix socket: `memory SOCKET BYTES`. Ctrl-C ends it.

#[path = "../tests/memory/mod.rs"]
#[allow(dead_code)]
mod memory;

use std::process::ExitCode;

use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use whimbrel_nbd::{Limits, Server};

#[tokio::main]
async fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(socket), Some(Ok(size))) = (args.next(), args.next().map(|a| a.parse())) else {
        eprintln!("usage: memory SOCKET BYTES");
        return ExitCode::FAILURE;
    };
    let listener = match UnixListener::bind(&socket) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("{socket}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let server = Server::new(
        memory::Shelf::of([("disk", memory::Memory::new(size))]),
        Limits::default(),
    );
    let serving = tokio::spawn(async move { server.serve_unix(listener, stop).await });
    if let Err(error) = tokio::signal::ctrl_c().await {
        eprintln!("no signals: {error}");
    }
    shutdown.cancel();
    let ended = serving.await;
    // Nobody else can be using a socket whose listener is gone.
    let _ = std::fs::remove_file(&socket);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
