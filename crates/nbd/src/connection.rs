//! One connection from the greeting to its end.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::error::ServeError;
use crate::export::Directory;
use crate::handshake::{Handshake, Session, Step, greeting};
use crate::inbox::Inbox;
use crate::limits::Limits;
use crate::option::{self, Header};
use crate::transmission::transmit;

/// Serves one client on a connected stream (Unix, TCP, TLS) until it leaves, the stream breaks, or
/// `shutdown` is cancelled; then the requests in flight are finished first, within
/// [`Limits::linger`].
///
/// A client that leaves is `Ok`, whether or not it said good-bye. To stop a connection cancel
/// `shutdown`; dropping the future instead drops writes half done.
pub async fn serve_connection<S, D>(
    mut stream: S,
    directory: Arc<D>,
    limits: Limits,
    shutdown: CancellationToken,
) -> Result<(), ServeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    D: Directory,
{
    let mut inbox = Inbox::new();
    let negotiation = timeout(
        limits.handshake,
        negotiate(&mut stream, &mut inbox, directory),
    );
    let session = tokio::select! {
        biased;
        () = shutdown.cancelled() => None,
        result = negotiation => result.map_err(|_| ServeError::HandshakeTimeout)??,
    };
    let Some(session) = session else {
        // The client is leaving: whether it hears the farewell does not matter.
        let _ = timeout(limits.linger, stream.shutdown()).await;
        return Ok(());
    };
    debug!(
        export = session.name(),
        structured = session.rules.structured,
        contexts = session.contexts.len(),
        "client attached"
    );
    transmit(stream, inbox, session, limits, &shutdown).await
}

/// `None`: the client has left.
async fn negotiate<S, D>(
    stream: &mut S,
    inbox: &mut Inbox,
    directory: Arc<D>,
) -> Result<Option<Session<D>>, ServeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    D: Directory,
{
    stream.write_all(&greeting()).await?;
    stream.flush().await?;
    let Some(flags) = inbox.take(stream).await? else {
        return Ok(None);
    };
    let mut handshake = Handshake::new(directory, u32::from_be_bytes(flags))?;
    let mut out = Vec::new();
    loop {
        let Some(header) = inbox.take(stream).await? else {
            return Ok(None);
        };
        let Header { option, len } = Header::parse(&header)?;
        let step = if len > option::MAX_DATA {
            if !inbox.skip(stream, len.into()).await? {
                return Ok(None);
            }
            handshake.too_big(option, &mut out)
        } else {
            let len = len as usize;
            if !inbox.want(stream, len).await? {
                return Ok(None);
            }
            let step = handshake.option(option, &inbox.data()[..len], &mut out);
            inbox.consume(len);
            step
        };
        stream.write_all(&out).await?;
        stream.flush().await?;
        out.clear();
        match step {
            Step::Continue => {}
            Step::Close => return Ok(None),
            Step::Refuse(error) => return Err(error.into()),
            Step::Transmit(session) => return Ok(Some(session)),
        }
    }
}
