//! Listeners, and the bound on connections.
//!
//! Every connection has a thread of its own, with a runtime of its own. Most requests are a few
//! microseconds of work, and to wake another thread for one costs more than that; on its own thread a
//! connection may do them on the spot, since a disk that makes it wait holds up nobody else. The price is
//! a stack (of which a few pages are touched), an epoll and an eventfd each: some 100 KiB, times the
//! bound on connections.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Builder;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::connection::attend;
use crate::export::Directory;
use crate::limits::Limits;
use crate::line::Socket;
use crate::tls::Tls;

/// Pause after a failed accept: the usual reason, no file descriptors left, does not pass at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the kernel may hold for the client of a Unix socket, in bytes; it may grant less. Its default is
/// less than one large reply, which then goes in parts, each with a wake-up. (TCP finds its own.)
const SEND_BUFFER: usize = 1 << 20;

/// Serves a directory on any number of listeners, with one bound on their connections.
pub struct Server<D> {
    directory: Arc<D>,
    limits: Limits,
    tls: Tls,
    connections: Arc<Semaphore>,
}

impl<D: Directory> Server<D> {
    pub fn new(directory: Arc<D>, limits: Limits) -> Self {
        let most = limits.connections.clamp(1, Semaphore::MAX_PERMITS);
        Server {
            directory,
            limits,
            tls: Tls::Off,
            connections: Arc::new(Semaphore::new(most)),
        }
    }

    /// The same server with STARTTLS, which [`Server::new`] does not offer.
    pub fn with_tls(self, tls: Tls) -> Self {
        Server { tls, ..self }
    }

    /// Serves until `shutdown` is cancelled and the listener's connections have ended.
    pub async fn serve_unix(&self, listener: UnixListener, shutdown: CancellationToken) {
        let accept = async || {
            let stream = listener.accept().await?.0;
            if let Err(error) = set_socket_send_buffer_size(&stream, SEND_BUFFER) {
                debug!(%error, "the socket keeps its send buffer");
            }
            stream.into_std()
        };
        self.serve(accept, Socket::unix, shutdown).await;
    }

    /// Serves until `shutdown` is cancelled and the listener's connections have ended.
    pub async fn serve_tcp(&self, listener: TcpListener, shutdown: CancellationToken) {
        let accept = async || {
            let (stream, _) = listener.accept().await?;
            // Replies are gathered before they are sent: waiting for more would only delay them.
            stream.set_nodelay(true)?;
            stream.into_std()
        };
        self.serve(accept, Socket::tcp, shutdown).await;
    }

    /// `enter` makes a stream of the runtime it is called on.
    async fn serve<T, F>(
        &self,
        accept: impl Fn() -> F,
        enter: fn(T) -> io::Result<Socket>,
        shutdown: CancellationToken,
    ) where
        T: Send + 'static,
        F: Future<Output = io::Result<T>>,
    {
        let served = TaskTracker::new();
        let accepting = async {
            loop {
                let Ok(permit) = self.connections.clone().acquire_owned().await else {
                    return;
                };
                let stream = match accept().await {
                    Ok(stream) => stream,
                    Err(error) => {
                        warn!(%error, "accept failed");
                        sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                };
                let (directory, limits) = (self.directory.clone(), self.limits);
                let (tls, shutdown) = (self.tls.clone(), shutdown.clone());
                let token = served.token();
                let connection = async move || {
                    directory.thread_started();
                    let mut leftover = None;
                    let attending = async {
                        let stream = enter(stream)?;
                        attend(stream, directory, limits, tls, shutdown, &mut leftover).await
                    };
                    if let Err(error) = attending.await {
                        debug!(%error, "connection ended");
                    }
                    // The client is gone: the listener's end need not wait for the rest.
                    drop(token);
                    if let Some(leftover) = leftover {
                        leftover.finish().await;
                    }
                    drop(permit);
                };
                if let Err(error) = on_own_thread(connection) {
                    warn!(%error, "no thread for a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = accepting => {}
        }
        served.close();
        // Each ends by itself within this; unless an export blocks its thread on a disk that is dead.
        let within = 2 * self.limits.linger + ACCEPT_PAUSE;
        if timeout(within, served.wait()).await.is_err() {
            warn!(connections = served.len(), "left behind: they do not end");
        }
    }
}

/// Runs a connection to its end on a new thread with a runtime of its own.
fn on_own_thread<F>(connection: impl FnOnce() -> F + Send + 'static) -> io::Result<()>
where
    F: Future<Output = ()>,
{
    let runtime = Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new()
        .name("nbd".to_owned())
        .spawn(move || runtime.block_on(connection()))?;
    Ok(())
}
