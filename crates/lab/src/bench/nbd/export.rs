//! `bench nbd-export`: Whimbrel's side of the comparison, a process that serves one file as the daemon
//! serves a machine's disk: the daemon's own `Disk` over its raw volume, behind its own NBD server. What
//! the daemon has besides (API, peers, migrations) is not there, and is idle while nothing moves.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use whimbrel_host::disk::{Disk, Mode};
use whimbrel_host::volumes::heat::Heat;
use whimbrel_nbd::{Directory, Export, Limits, OpenError, Server};
use whimbrel_volume::pool::{Pool, PoolSize};
use whimbrel_volume::raw::{Access, RawFile};

use super::BenchError;
use super::in_turn::InTurn;

#[derive(Debug, Args)]
pub struct ExportArgs {
    socket: PathBuf,
    disk: PathBuf,
    /// Past the page cache
    #[arg(long)]
    direct: bool,
    /// Log every access
    #[arg(long, value_enum, default_value = "on")]
    access_log: Switch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
    /// On and off by turns, for `bench nbd --access-log`
    InTurn,
}

pub fn run(args: &ExportArgs) -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(serve(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves until SIGTERM.
async fn serve(args: &ExportArgs) -> Result<(), BenchError> {
    let here = |source| BenchError::File {
        path: args.socket.clone(),
        source,
    };
    let pool = Pool::start(PoolSize::default()).map_err(here)?;
    let file = if args.direct {
        RawFile::open_direct(&pool, &args.disk, Access::ReadWrite).await?
    } else {
        RawFile::open(&pool, &args.disk, Access::ReadWrite).await?
    };
    let size = file.size();
    let file = Arc::new(file.into());
    let disk = || Disk::new("bench".into(), size, Arc::clone(&file), Mode::Open);
    let heat = || Arc::new(Heat::open(args.disk.with_extension("heat"), size));
    match args.access_log {
        Switch::On => serve_disk(args, Arc::new(disk().watched(heat()))).await,
        Switch::Off => serve_disk(args, Arc::new(disk())).await,
        Switch::InTurn => {
            let logged = Arc::new(disk().watched(heat()));
            serve_disk(args, InTurn::start(logged, Arc::new(disk()))).await
        }
    }
}

async fn serve_disk(args: &ExportArgs, disk: Arc<impl Export>) -> Result<(), BenchError> {
    let here = |source| BenchError::File {
        path: args.socket.clone(),
        source,
    };
    let shelf = Shelf(disk);
    let mut terminate =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(here)?;
    let listener = UnixListener::bind(&args.socket).map_err(here)?;
    let stop = CancellationToken::new();
    let server = Server::new(Arc::new(shelf), Limits::default());
    let serving = server.serve_unix(listener, stop.clone());
    tokio::pin!(serving);
    tokio::select! {
        _ = terminate.recv() => stop.cancel(),
        () = &mut serving => return Ok(()),
    }
    serving.await;
    Ok(())
}

/// A directory of one, under any name.
struct Shelf<E>(Arc<E>);

impl<E: Export> Directory for Shelf<E> {
    type Export = E;

    fn list(&self) -> Vec<String> {
        vec!["bench".to_owned()]
    }

    fn open(&self, _name: &str) -> Result<Arc<E>, OpenError> {
        Ok(self.0.clone())
    }

    fn closed(&self, _name: &str) {}

    fn thread_started(&self) {
        whimbrel_volume::lent::lend_this_thread();
    }
}
