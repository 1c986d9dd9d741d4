//! Serving the API.

use super::router::router;
use super::service::Service;
use super::socket::ApiSocket;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How long requests under way may take once the daemon stops; then their connections are dropped.
const GRACE: Duration = Duration::from_secs(5);

/// Serves the API until `stopping` is cancelled. Streams then end with a line that says so, other requests
/// under way are finished within five seconds.
pub async fn serve<S: Service>(
    socket: ApiSocket,
    service: Arc<S>,
    stopping: CancellationToken,
) -> io::Result<()> {
    let served = axum::serve(socket, router(service, stopping.clone()))
        .with_graceful_shutdown(stopping.clone().cancelled_owned());
    tokio::select! {
        result = served.into_future() => result,
        () = async { stopping.cancelled().await; tokio::time::sleep(GRACE).await } => Ok(()),
    }
}
