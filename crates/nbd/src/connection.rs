//! One connection from the greeting to its end.

use std::future::Future;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::error::ServeError;
use crate::export::Directory;
use crate::handshake::{Handshake, Session, Step, greeting};
use crate::inbox::Inbox;
use crate::limits::Limits;
use crate::line::{Guest, Line};
use crate::option::{self, Header};
use crate::tls::Tls;
use crate::transmission::{Leftover, transmit};

/// Serves one client on a connected stream (Unix, TCP, TLS) until it leaves, the stream breaks, or
/// `shutdown` is cancelled; then the requests in flight are finished first, within
/// [`Limits::linger`].
///
/// `tls` is what the client may have by STARTTLS; a stream that is TLS already takes [`Tls::Off`].
///
/// A client that leaves is `Ok`, whether or not it said good-bye. To stop a connection cancel
/// `shutdown`; dropping the future instead drops writes half done.
pub async fn serve_connection<S, D>(
    stream: S,
    directory: Arc<D>,
    limits: Limits,
    tls: Tls,
    shutdown: CancellationToken,
) -> Result<(), ServeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    D: Directory,
{
    let mut leftover = None;
    let result = attend(
        Guest(stream),
        directory,
        limits,
        tls,
        shutdown,
        &mut leftover,
    )
    .await;
    if let Some(leftover) = leftover {
        tokio::spawn(leftover.finish());
    }
    result
}

/// Serves one client; what is left over, however it ends, is the caller's to finish.
pub(crate) async fn attend<S, D>(
    mut stream: S,
    directory: Arc<D>,
    limits: Limits,
    tls: Tls,
    shutdown: CancellationToken,
    leftover: &mut Option<Leftover<D>>,
) -> Result<(), ServeError>
where
    S: Line,
    D: Directory,
{
    let negotiation = Negotiation {
        deadline: Instant::now() + limits.handshake,
        shutdown: &shutdown,
    };
    let mut inbox = Inbox::new();
    let arriving = async {
        let Some(mut handshake) = greet(&mut stream, &mut inbox, directory, &tls).await? else {
            return Ok(None);
        };
        let outcome = negotiate(&mut stream, &mut inbox, &mut handshake).await?;
        Ok(Some((handshake, outcome)))
    };
    match (negotiation.within(arriving).await?.flatten(), tls.config()) {
        (Some((mut handshake, Outcome::StartTls)), Some(config)) => {
            let bytes = inbox.data().len();
            if bytes > 0 {
                return Err(ServeError::BeforeTls { bytes });
            }
            let accepting = async {
                let accept = TlsAcceptor::from(config.clone()).accept(stream);
                accept.await.map_err(ServeError::Tls)
            };
            let Some(mut stream) = negotiation.within(accepting).await? else {
                return Ok(());
            };
            handshake.secured();
            let arriving = negotiate(&mut stream, &mut inbox, &mut handshake);
            let outcome = negotiation.within(arriving).await?;
            serve_outcome(stream, inbox, outcome, limits, &shutdown, leftover).await
        }
        (arrived, _) => {
            let outcome = arrived.map(|(_, outcome)| outcome);
            serve_outcome(stream, inbox, outcome, limits, &shutdown, leftover).await
        }
    }
}

/// What bounds a negotiation, TLS included.
struct Negotiation<'a> {
    deadline: Instant,
    shutdown: &'a CancellationToken,
}

impl Negotiation<'_> {
    /// `None`: the server shuts down.
    async fn within<T>(
        &self,
        step: impl Future<Output = Result<T, ServeError>>,
    ) -> Result<Option<T>, ServeError> {
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => Ok(None),
            result = timeout_at(self.deadline, step) => {
                result.map_err(|_| ServeError::HandshakeTimeout)?.map(Some)
            }
        }
    }
}

/// What a negotiation came to.
enum Outcome<D: Directory> {
    /// The client has left.
    Left,
    Session(Session<D>),
    StartTls,
}

async fn serve_outcome<S, D>(
    mut stream: S,
    inbox: Inbox,
    outcome: Option<Outcome<D>>,
    limits: Limits,
    shutdown: &CancellationToken,
    leftover: &mut Option<Leftover<D>>,
) -> Result<(), ServeError>
where
    S: Line,
    D: Directory,
{
    let Some(Outcome::Session(session)) = outcome else {
        // The client is leaving: whether it hears the farewell does not matter.
        let _ = timeout(limits.linger, stream.shutdown()).await;
        return Ok(());
    };
    debug!(
        export = session.name(),
        dialect = ?session.rules.dialect,
        contexts = session.contexts.len(),
        "client attached"
    );
    let (result, rest) = transmit(stream, inbox, session, limits, shutdown).await;
    *leftover = rest;
    result
}

/// `None`: the client has left.
async fn greet<S, D>(
    stream: &mut S,
    inbox: &mut Inbox,
    directory: Arc<D>,
    tls: &Tls,
) -> Result<Option<Handshake<D>>, ServeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    D: Directory,
{
    stream.write_all(&greeting()).await?;
    stream.flush().await?;
    let Some(flags) = inbox.take(stream).await? else {
        return Ok(None);
    };
    let flags = u32::from_be_bytes(flags);
    Ok(Some(Handshake::new(directory, flags, tls.secrecy())?))
}

async fn negotiate<S, D>(
    stream: &mut S,
    inbox: &mut Inbox,
    handshake: &mut Handshake<D>,
) -> Result<Outcome<D>, ServeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    D: Directory,
{
    let mut out = Vec::new();
    loop {
        let Some(header) = inbox.take(stream).await? else {
            return Ok(Outcome::Left);
        };
        let Header { option, len } = Header::parse(&header)?;
        let step = if len > option::MAX_DATA {
            if !inbox.skip(stream, len.into()).await? {
                return Ok(Outcome::Left);
            }
            handshake.too_big(option, &mut out)
        } else {
            let len = len as usize;
            if !inbox.want(stream, len).await? {
                return Ok(Outcome::Left);
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
            Step::Close => return Ok(Outcome::Left),
            Step::Refuse(refused) => return Err(refused.into()),
            Step::StartTls => return Ok(Outcome::StartTls),
            Step::Transmit(session) => return Ok(Outcome::Session(session)),
        }
    }
}
