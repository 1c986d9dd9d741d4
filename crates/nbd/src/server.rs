//! Listeners, and the bound on connections.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::connection::serve_connection;
use crate::export::Directory;
use crate::limits::Limits;
use crate::tls::Tls;

/// Pause after a failed accept: the usual reason, no file descriptors left, does not pass at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
        let accept = async || Ok(listener.accept().await?.0);
        self.serve(accept, shutdown).await;
    }

    /// Serves until `shutdown` is cancelled and the listener's connections have ended.
    pub async fn serve_tcp(&self, listener: TcpListener, shutdown: CancellationToken) {
        let accept = async || {
            let (stream, _) = listener.accept().await?;
            // Replies are gathered before they are sent: waiting for more would only delay them.
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        self.serve(accept, shutdown).await;
    }

    async fn serve<S, F>(&self, accept: impl Fn() -> F, shutdown: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Future<Output = io::Result<S>>,
    {
        let tasks = TaskTracker::new();
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
                tasks.spawn(async move {
                    let serving = serve_connection(stream, directory, limits, tls, shutdown);
                    if let Err(error) = serving.await {
                        debug!(%error, "connection ended");
                    }
                    drop(permit);
                });
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = accepting => {}
        }
        tasks.close();
        tasks.wait().await;
    }
}
