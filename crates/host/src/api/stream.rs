//! Streamed answers: JSON, one object a line, over a chunked HTTP response.
//!
//! A line is written when there is news, but not more often than every [`SHORTEST`], and at least every
//! [`LONGEST`]: no silent phase for whoever watches, and a client that went away is noticed. News are
//! `watch` channels, which keep the newest value only, so a slow client costs nothing but its 64 KiB pipe.

use super::error::{ApiError, ErrorCode};
use super::types::{MigrationView, StreamLine, WatchLine};
use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::io::ReaderStream;
use tokio_util::sync::CancellationToken;

pub(super) const SHORTEST: Duration = Duration::from_millis(100);
pub(super) const LONGEST: Duration = Duration::from_secs(1);

/// Lines not yet taken by the client; beyond, the writer waits.
const PIPE: usize = 64 << 10;

/// The media type of newline-delimited JSON.
pub const NDJSON: &str = "application/x-ndjson";

struct Lines(DuplexStream);

impl Lines {
    async fn write<P: Serialize, D: Serialize>(
        &mut self,
        line: &StreamLine<P, D>,
    ) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.0.write_all(&text).await
    }
}

fn response(write: impl FnOnce(Lines) -> JoinHandle<()>) -> Response {
    // A duplex, not a simplex: dropping the reading end must fail the writer.
    let (reader, writer) = tokio::io::duplex(PIPE);
    write(Lines(writer));
    (
        [(CONTENT_TYPE, NDJSON)],
        Body::from_stream(ReaderStream::new(reader)),
    )
        .into_response()
}

/// Streams a migration until it is settled, the daemon stops or the client goes away.
pub(super) fn watch_migration(
    mut news: watch::Receiver<MigrationView>,
    stopping: CancellationToken,
) -> Response {
    response(|mut lines| {
        tokio::spawn(async move {
            // The write fails when the client has gone; there is nobody left to tell.
            let _ = write_migration(&mut lines, &mut news, &stopping).await;
        })
    })
}

async fn write_migration(
    lines: &mut Lines,
    news: &mut watch::Receiver<MigrationView>,
    stopping: &CancellationToken,
) -> io::Result<()> {
    loop {
        let view = news.borrow_and_update().clone();
        if view.state.is_settled() {
            return lines.write(&WatchLine::Done(view)).await;
        }
        lines.write(&WatchLine::Progress(view)).await?;
        tokio::select! {
            () = stopping.cancelled() => {
                return lines.write(&WatchLine::Error(ApiError::stopping())).await;
            }
            () = sleep(SHORTEST) => {}
        }
        let changed = tokio::select! {
            () = stopping.cancelled() => {
                return lines.write(&WatchLine::Error(ApiError::stopping())).await;
            }
            changed = timeout(LONGEST, news.changed()) => changed,
        };
        if let Ok(Err(_)) = changed
            && !news.borrow().state.is_settled()
        {
            let error = ApiError::new(
                ErrorCode::Internal,
                "the daemon no longer follows this migration",
            )
            .next_step("look with `whimbrel status`");
            return lines.write(&WatchLine::Error(error)).await;
        }
    }
}

/// Runs an import, or what is like one, and streams how far it is. It ends with the client or the daemon.
pub(super) fn import<P, D>(
    work: impl Future<Output = Result<D, ApiError>> + Send + 'static,
    mut news: watch::Receiver<P>,
    stopping: CancellationToken,
) -> Response
where
    P: Copy + Serialize + Send + Sync + 'static,
    D: Serialize + Send + Sync + 'static,
{
    response(|mut lines| {
        tokio::spawn(async move {
            // A task of its own, so that a client that reads slowly does not slow the import.
            let mut work = AbortOnDrop(tokio::spawn(work));
            // The write fails when the client has gone; dropping the work ends it.
            let _ = write_import(&mut lines, &mut work, &mut news, &stopping).await;
        })
    })
}

struct AbortOnDrop<D>(JoinHandle<Result<D, ApiError>>);

impl<D> Drop for AbortOnDrop<D> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn write_import<P: Copy + Serialize, D: Serialize>(
    lines: &mut Lines,
    work: &mut AbortOnDrop<D>,
    news: &mut watch::Receiver<P>,
    stopping: &CancellationToken,
) -> io::Result<()> {
    loop {
        tokio::select! {
            () = stopping.cancelled() => {
                let line = StreamLine::<P, D>::Error(ApiError::stopping());
                return lines.write(&line).await;
            }
            result = &mut work.0 => {
                let line = match result {
                    Ok(Ok(done)) => StreamLine::<P, D>::Done(done),
                    Ok(Err(error)) => StreamLine::Error(error),
                    Err(panic) => StreamLine::Error(
                        ApiError::new(ErrorCode::Internal, format!("the work broke off: {panic}"))
                            .next_step("look into the daemon's log"),
                    ),
                };
                return lines.write(&line).await;
            }
            () = sleep(SHORTEST) => {}
        }
        let progress = *news.borrow_and_update();
        let line = StreamLine::<P, D>::Progress(progress);
        lines.write(&line).await?;
    }
}
