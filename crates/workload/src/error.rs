//! Why the program could not start, or its parameters not be read.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("unknown parameter `{key}`")]
    UnknownParam { key: String },
    #[error("parameter `{key}`: `{value}` is not {expects}")]
    Param {
        key: String,
        value: String,
        expects: &'static str,
    },
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not what was written there: {source}")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("no disk appeared as {path} within {seconds} s")]
    NoDisk { path: PathBuf, seconds: u64 },
    #[error("no network interface appeared within {seconds} s")]
    NoInterface { seconds: u64 },
    #[error("`{command}` failed")]
    Command { command: String },
    #[error("cannot listen on port {port}: {source}")]
    Listen { port: u16, source: std::io::Error },
}
