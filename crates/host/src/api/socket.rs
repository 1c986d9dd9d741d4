//! The API's unix socket: who may connect, and what to do about a socket that is already there.
//!
//! Mode 0600 from the first moment: the socket gets its mode between `bind` and `listen`, and its name only
//! after both. Whoever may open it may do everything; there is no further login.
//!
//! A socket that nobody listens on is what a daemon that died leaves, and is replaced. One that answers is
//! another daemon's, and is left alone. (Two daemons that start at once are told apart by the state
//! directory's lock, before they come here.)

use super::error::{ApiError, ErrorCode};
use axum::serve::Listener;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections served at once; further ones wait in the kernel's queue.
pub const MAX_CONNECTIONS: usize = 128;

/// The kernel's queue of connections not yet accepted; a client beyond it is refused.
const BACKLOG: i32 = 64;

/// Longest path of a unix socket (`sun_path`, less its closing zero).
const MAX_PATH: usize = 107;

/// What is added to the path while the socket is being made.
const DRAFT: &str = ".new";

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("a daemon already listens at {}", path.display())]
    InUse { path: PathBuf },
    #[error("{} is not a socket, so it was not replaced", path.display())]
    NotASocket { path: PathBuf },
    #[error("the socket's path {} is {length} bytes long; Linux allows {} here", path.display(), MAX_PATH - DRAFT.len())]
    PathTooLong { path: PathBuf, length: usize },
    #[error("cannot {action} the socket {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl SocketError {
    pub fn path(&self) -> &Path {
        match self {
            SocketError::InUse { path }
            | SocketError::NotASocket { path }
            | SocketError::PathTooLong { path, .. }
            | SocketError::Io { path, .. } => path,
        }
    }

    pub fn next_step(&self) -> &'static str {
        match self {
            SocketError::InUse { .. } => {
                "use that daemon, stop it first, or give this one its own --state and --socket"
            }
            SocketError::NotASocket { .. } => {
                "move that file away, or name another path with --socket"
            }
            SocketError::PathTooLong { .. } => "name a shorter path with --socket",
            SocketError::Io { .. } => "see that its folder exists and may be written to",
        }
    }
}

impl From<SocketError> for ApiError {
    fn from(error: SocketError) -> ApiError {
        ApiError::from(&error)
    }
}

impl From<&SocketError> for ApiError {
    fn from(error: &SocketError) -> ApiError {
        let code = match error {
            SocketError::InUse { .. } => ErrorCode::Busy,
            SocketError::NotASocket { .. } | SocketError::PathTooLong { .. } => ErrorCode::Invalid,
            SocketError::Io { .. } => ErrorCode::Io,
        };
        ApiError::new(code, error.to_string())
            .at(Some(error.path().display().to_string()))
            .machine_state("the daemon did not start; machines are as they were")
            .next_step(error.next_step())
    }
}

/// The listening socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    path: PathBuf,
    free: Arc<Semaphore>,
}

/// Listens at `path`.
pub async fn bind(path: &Path) -> Result<ApiSocket, SocketError> {
    let length = path.as_os_str().len();
    if length > MAX_PATH - DRAFT.len() {
        return Err(SocketError::PathTooLong {
            path: path.to_path_buf(),
            length,
        });
    }
    clear_the_way(path).await?;
    let failed = |action: &'static str| {
        move |source: io::Error| SocketError::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    };
    let mut draft = path.as_os_str().to_owned();
    draft.push(DRAFT);
    let draft = PathBuf::from(draft);
    match std::fs::remove_file(&draft) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("make")(e)),
        _ => {}
    }
    let listener = (|| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&draft)?)?;
        std::fs::set_permissions(&draft, PermissionsExt::from_mode(0o600))?;
        rustix::net::listen(&socket, BACKLOG)?;
        std::fs::rename(&draft, path)?;
        UnixListener::from_std(socket.into())
    })()
    .map_err(failed("make"))?;
    Ok(ApiSocket {
        listener,
        path: path.to_path_buf(),
        free: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
    })
}

async fn clear_the_way(path: &Path) -> Result<(), SocketError> {
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(SocketError::Io {
                action: "look at",
                path: path.to_path_buf(),
                source,
            });
        }
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket {
                path: path.to_path_buf(),
            });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        // The stale one stays until the new one takes its name in one step.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        // A full queue means that someone listens, if slowly.
        Ok(_) => Err(SocketError::InUse {
            path: path.to_path_buf(),
        }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(SocketError::InUse {
            path: path.to_path_buf(),
        }),
        Err(source) => Err(SocketError::Io {
            action: "try",
            path: path.to_path_buf(),
            source,
        }),
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        // Left behind it would only be stale, which the next daemon copes with.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A connection and its place among the [`MAX_CONNECTIONS`].
#[derive(Debug)]
pub struct ApiConnection {
    stream: UnixStream,
    _place: OwnedSemaphorePermit,
}

impl Listener for ApiSocket {
    type Io = ApiConnection;
    type Addr = PathBuf;

    async fn accept(&mut self) -> (ApiConnection, PathBuf) {
        let place = self
            .free
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (stream, _) = Listener::accept(&mut self.listener).await;
        (
            ApiConnection {
                stream,
                _place: place,
            },
            self.path.clone(),
        )
    }

    fn local_addr(&self) -> io::Result<PathBuf> {
        Ok(self.path.clone())
    }
}

impl AsyncRead for ApiConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for ApiConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
