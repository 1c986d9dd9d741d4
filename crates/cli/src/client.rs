//! The way to the daemon: HTTP/1.1 over its unix socket, one connection a request.

use crate::error::CliError;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::PathBuf;
use tokio::net::UnixStream;
use whimbrel_host::api::{ApiError, ErrorCode, StreamLine};

/// Longest answer, and longest line of a streamed one. The largest true ones, lists of thousands of
/// machines, are some MiB; beyond this the other end is no daemon of ours.
const LONGEST: usize = 64 << 20;

#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: PathBuf) -> Client {
        Client { socket }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.ask(Method::GET, path, None::<&()>).await
    }

    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, CliError> {
        self.ask(Method::POST, path, Some(body)).await
    }

    /// A request that needs no words.
    pub async fn order<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.ask(Method::POST, path, None::<&()>).await
    }

    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, CliError> {
        self.ask(Method::PUT, path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> Result<(), CliError> {
        self.ask(Method::DELETE, path, None::<&()>).await
    }

    /// A deletion that is answered with what was deleted.
    pub async fn take_back<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.ask(Method::DELETE, path, None::<&()>).await
    }

    /// Reads a streamed answer: every `progress` line goes to `news`, the last line is the result.
    pub async fn stream<P: DeserializeOwned, D: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        mut news: impl FnMut(P),
    ) -> Result<D, CliError> {
        let mut answer = self.send(method, path, body).await?.into_body();
        let mut unread = Vec::new();
        while let Some(frame) = answer.frame().await {
            let frame = frame.map_err(|source| self.broken_off(source))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            unread.extend_from_slice(&data);
            while let Some(end) = unread.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = unread.drain(..=end).collect();
                match self.understand(&line)? {
                    StreamLine::Progress(p) => news(p),
                    StreamLine::Done(d) => return Ok(d),
                    StreamLine::Error(e) => return Err(e.into()),
                }
            }
            if unread.len() > LONGEST {
                return Err(CliError::TooLong {
                    socket: self.socket.clone(),
                    most: LONGEST,
                });
            }
        }
        Err(CliError::CutShort {
            socket: self.socket.clone(),
        })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, CliError> {
        let answer = self.send(method, path, body).await?;
        let text = self.collect(answer.into_body()).await?;
        self.understand(&text)
    }

    /// Sends a request and has the head of the answer; a refusal is an error.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>, CliError> {
        let unreachable = |source| CliError::NoDaemon {
            socket: self.socket.clone(),
            source,
        };
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(unreachable)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.broken_off(source))?;
        // Ends with the last handle on the answer; what goes wrong on it the answer tells.
        tokio::spawn(connection);
        let text = match body {
            Some(body) => serde_json::to_vec(body).map_err(|source| self.not_understood(source))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "whimbrel")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(text)))
            .expect("paths are made of names, which need no escaping");
        let answer = sender
            .send_request(request)
            .await
            .map_err(|source| self.broken_off(source))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let text = self.collect(answer.into_body()).await?;
        Err(serde_json::from_slice::<ApiError>(&text)
            .unwrap_or_else(|_| {
                ApiError::new(
                    ErrorCode::Internal,
                    format!("the daemon answered {status} without a reason"),
                )
                .at(Some(self.socket.display().to_string()))
                .next_step("use a command and a daemon of the same version")
            })
            .into())
    }

    async fn collect(&self, mut body: Incoming) -> Result<Vec<u8>, CliError> {
        let mut text = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|source| self.broken_off(source))?;
            if let Ok(data) = frame.into_data() {
                text.extend_from_slice(&data);
            }
            if text.len() > LONGEST {
                return Err(CliError::TooLong {
                    socket: self.socket.clone(),
                    most: LONGEST,
                });
            }
        }
        Ok(text)
    }

    fn understand<T: DeserializeOwned>(&self, text: &[u8]) -> Result<T, CliError> {
        serde_json::from_slice(text).map_err(|source| self.not_understood(source))
    }

    fn not_understood(&self, source: serde_json::Error) -> CliError {
        CliError::NotUnderstood {
            socket: self.socket.clone(),
            source,
        }
    }

    fn broken_off(&self, source: hyper::Error) -> CliError {
        CliError::BrokenOff {
            socket: self.socket.clone(),
            source,
        }
    }
}

/// Whether nobody listens, as opposed to somebody whom one may not speak to.
pub fn nobody_listens(error: &CliError) -> bool {
    matches!(
        error,
        CliError::NoDaemon { source, .. }
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    )
}
