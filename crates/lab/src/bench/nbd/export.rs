//! `bench nbd-export`: Whimbrel's side of the comparison, a process that serves one file as the daemon
//! serves a machine's disk: the daemon's own `Disk` over its raw volume, behind its own NBD server. What
//! the daemon has besides (API, peers, migrations) is not there, and is idle while nothing moves.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use whimbrel_host::disk::{Disk, Mode};
use whimbrel_nbd::{
    Directory, Errno, Export, ExportInfo, Limits, OpenError, Server, StatusRun, ZeroHow,
};
use whimbrel_volume::heat::{AccessKind, AccessLog};
use whimbrel_volume::pool::{Pool, PoolSize};
use whimbrel_volume::raw::{Access, RawFile};

use super::BenchError;

/// Accesses that the log remembers.
const RING: usize = 64 << 10;

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
    let disk = Disk::new("bench".into(), size, Arc::new(file.into()), Mode::Open);
    let log = (args.access_log == Switch::On).then(|| AccessLog::new(size, RING));
    let shelf = Shelf(Arc::new(Logged {
        disk,
        log,
        since: Instant::now(),
    }));
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
struct Shelf(Arc<Logged>);

impl Directory for Shelf {
    type Export = Logged;

    fn list(&self) -> Vec<String> {
        vec![self.0.disk.name().to_owned()]
    }

    fn open(&self, _name: &str) -> Result<Arc<Logged>, OpenError> {
        Ok(self.0.clone())
    }

    fn closed(&self, _name: &str) {}

    fn thread_started(&self) {
        whimbrel_volume::lent::lend_this_thread();
    }
}

/// A disk, and the log of what is done to it.
struct Logged {
    disk: Disk,
    log: Option<AccessLog>,
    since: Instant,
}

impl Logged {
    fn note(&self, kind: AccessKind, offset: u64, len: u64) {
        if let Some(log) = &self.log {
            let now = self.since.elapsed().as_millis() as u32;
            log.log(now, kind, offset, len);
        }
    }
}

impl Export for Logged {
    fn info(&self) -> ExportInfo {
        self.disk.info()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, Errno> {
        self.note(AccessKind::Read, offset, len.into());
        self.disk.read(offset, len).await
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), Errno> {
        self.note(AccessKind::Write, offset, data.len() as u64);
        self.disk.write(offset, data, fua).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.disk.flush().await
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        self.disk.trim(offset, len, fua).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: ZeroHow) -> Result<(), Errno> {
        self.disk.write_zeroes(offset, len, how).await
    }

    async fn cache(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.disk.cache(offset, len).await
    }

    async fn block_status(
        &self,
        context: &str,
        offset: u64,
        len: u64,
        one: bool,
    ) -> Result<Vec<StatusRun>, Errno> {
        self.disk.block_status(context, offset, len, one).await
    }
}
