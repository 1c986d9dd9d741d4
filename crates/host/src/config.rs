//! The daemon's configuration file.
//!
//! ```toml
//! listen    = "0.0.0.0:7420"                # where peers reach this host
//! state     = "/var/lib/whimbrel"           # everything that must survive a crash
//! socket    = "/var/lib/whimbrel/api.sock"  # the command's way to the daemon; default STATE/api.sock
//! qemu      = "qemu-system-x86_64"          # found through PATH, or a path
//! bandwidth = "800Mbit"                     # all migrations together; default unlimited
//! guest_latency = "100ms"                   # push yields beyond it (p99 of the moving guest's I/O), or "off"
//! log       = "info"                        # a filter as in RUST_LOG, which goes before it
//!
//! [networks]                                # what machines call it = this host's bridge
//! lan = "br0"
//!
//! [[schedule]]                              # other limits at other times: see `schedule`
//! from = "08:00"
//! to = "18:00"
//! bandwidth = "100Mbit"
//! ```
//!
//! Everything has a default. A key that means nothing is an error, never silently ignored.

use crate::api::{ApiError, ErrorCode};
use crate::schedule;
use crate::state::{LatencyBound, Name, RateLimit, TomlError, toml_text};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Read when no other file is named, and allowed to be missing.
pub const DEFAULT_FILE: &str = "/etc/whimbrel/whimbrel.toml";

/// Where state lies unless the configuration or the command line says otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/whimbrel";

/// The port peers reach a host at.
pub const DEFAULT_PORT: u16 = 7420;

/// Longest name Linux allows a network interface (IFNAMSIZ less the closing zero).
const MAX_INTERFACE: usize = 15;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Syntax(#[from] TomlError),
    #[error("{}: `networks.{network}`: `{bridge}` cannot be a bridge's name (1 to 15 bytes, without spaces and slashes)", path.display())]
    BadBridge {
        path: PathBuf,
        network: Name,
        bridge: String,
    },
    #[error("{}: `{key}`: it must not be empty", path.display())]
    Empty { path: PathBuf, key: &'static str },
}

impl ConfigError {
    pub fn path(&self) -> &Path {
        match self {
            ConfigError::Read { path, .. }
            | ConfigError::BadBridge { path, .. }
            | ConfigError::Empty { path, .. } => path,
            ConfigError::Syntax(error) => &error.file,
        }
    }

    pub fn next_step(&self) -> String {
        match self {
            ConfigError::Read { .. } => "name a readable file with --config".to_string(),
            ConfigError::Syntax(_) | ConfigError::BadBridge { .. } | ConfigError::Empty { .. } => {
                format!("correct {} and try again", self.path().display())
            }
        }
    }
}

impl From<ConfigError> for ApiError {
    fn from(error: ConfigError) -> ApiError {
        ApiError::from(&error)
    }
}

impl From<&ConfigError> for ApiError {
    fn from(error: &ConfigError) -> ApiError {
        ApiError::new(ErrorCode::Invalid, error.to_string())
            .at(Some(error.path().display().to_string()))
            .machine_state("nothing was started or changed")
            .next_step(error.next_step())
    }
}

/// What the daemon and the command go by.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where peers reach this host.
    pub listen: SocketAddr,
    /// The state directory.
    pub state: PathBuf,
    /// The API's socket; see [`socket_path`](Self::socket_path).
    pub socket: Option<PathBuf>,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// Network name -> bridge of this host.
    pub networks: BTreeMap<Name, String>,
    /// What all migrations together may send.
    pub bandwidth: RateLimit,
    /// Other limits at other times.
    pub schedule: Vec<schedule::Entry>,
    /// What a guest's requests are to stay within while its machine moves away from here.
    pub guest_latency: LatencyBound,
    /// A filter for the log, as `tracing-subscriber` reads it.
    pub log: String,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT)),
            state: PathBuf::from(DEFAULT_STATE),
            socket: None,
            qemu: PathBuf::from("qemu-system-x86_64"),
            networks: BTreeMap::new(),
            bandwidth: RateLimit(None),
            schedule: Vec::new(),
            guest_latency: LatencyBound::default(),
            log: "info".to_string(),
        }
    }
}

impl Config {
    /// Reads `file`; without one, [`DEFAULT_FILE`] if it exists, else the defaults.
    pub fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(path, &text),
            Err(e) if file.is_none() && e.kind() == io::ErrorKind::NotFound => {
                Ok(Config::default())
            }
            Err(source) => Err(ConfigError::Read {
                path: path.to_path_buf(),
                source,
            }),
        }
    }

    /// Reads a configuration's text, `path` being where it came from.
    pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let config: Config = toml_text::parse(path, text)?;
        for (network, bridge) in &config.networks {
            let good = (1..=MAX_INTERFACE).contains(&bridge.len())
                && !bridge.contains(|c: char| c.is_whitespace() || c == '/')
                && bridge != "."
                && bridge != "..";
            if !good {
                return Err(ConfigError::BadBridge {
                    path: path.to_path_buf(),
                    network: network.clone(),
                    bridge: bridge.clone(),
                });
            }
        }
        let paths = [
            ("state", Some(&config.state)),
            ("socket", config.socket.as_ref()),
            ("qemu", Some(&config.qemu)),
        ];
        for (key, value) in paths {
            if value.is_some_and(|p| p.as_os_str().is_empty()) {
                return Err(ConfigError::Empty {
                    path: path.to_path_buf(),
                    key,
                });
            }
        }
        Ok(config)
    }

    /// The API's socket: as configured, else `api.sock` in the state directory.
    pub fn socket_path(&self) -> PathBuf {
        self.socket
            .clone()
            .unwrap_or_else(|| self.state.join("api.sock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("/etc/w.toml"), text)
    }

    #[test]
    fn nothing_written_means_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
        assert_eq!(Config::default().listen.to_string(), "0.0.0.0:7420");
        assert_eq!(
            Config::default().socket_path(),
            Path::new("/var/lib/whimbrel/api.sock")
        );
    }

    #[test]
    fn everything_can_be_written() {
        let config = parse(
            "listen = \"[::1]:1\"\nstate = \"/s\"\nsocket = \"/r/a.sock\"\nqemu = \"/q\"\nbandwidth = \"80Mbit\"\n\
             log = \"debug\"\n[networks]\nlan = \"br0\"\n",
        )
        .unwrap();
        assert_eq!(config.bandwidth.to_string(), "80Mbit");
        assert_eq!(config.socket_path(), Path::new("/r/a.sock"));
        assert_eq!(config.networks[&"lan".parse::<Name>().unwrap()], "br0");
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (text, start) in [
            (
                "log = \"info\"\nstat = \"/s\"\n",
                "/etc/w.toml:2: `stat`: unknown field",
            ),
            ("listen = \"here\"\n", "/etc/w.toml:1: `listen`: "),
            (
                "\nbandwidth = \"80\"\n",
                "/etc/w.toml:2: `bandwidth`: `80` has no unit",
            ),
            ("[networks]\nLAN = \"br0\"\n", "/etc/w.toml:2: `LAN`: "),
            (
                "[networks]\nlan = \"a name far too long\"\n",
                "/etc/w.toml: `networks.lan`: ",
            ),
            ("state = \"\"\n", "/etc/w.toml: `state`: "),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        }
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let error = Config::load(Some(Path::new("/nonexistent/w.toml"))).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }));
    }
}
