//! The host's end of a guest's network card: a tap on a bridge.
//!
//! Made with iproute2, which every host with bridges has, rather than with netlink by hand. A tap is
//! persistent, so that it outlives the daemon together with the guest.

use std::process::Command;

/// A tap that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("cannot run `ip`: {source} (package iproute2)")]
    NoIp { source: std::io::Error },
    #[error("`ip {command}` failed: {stderr}")]
    Failed { command: String, stderr: String },
}

/// A tap on a bridge; taken away when dropped, unless it was [kept](Self::keep).
#[derive(Debug)]
pub struct Tap {
    name: String,
    owned: bool,
}

impl Tap {
    /// The interface name of a machine's card: at most 15 bytes, so a hash.
    pub fn name_of(machine: &str, card: usize) -> String {
        let hash = blake3::hash(format!("{machine}/{card}").as_bytes());
        format!("wh{}", &hash.to_hex()[..12])
    }

    /// Makes the tap on the bridge, replacing one of that name that was left behind.
    pub fn create(name: &str, bridge: &str) -> Result<Tap, TapError> {
        // There is none, as a rule.
        let _ = ip(&["link", "del", name]);
        ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
        let tap = Tap {
            name: name.to_string(),
            owned: true,
        };
        ip(&["link", "set", name, "master", bridge])?;
        ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }

    /// A tap that an earlier daemon made and its guest still uses.
    pub fn existing(name: &str) -> Tap {
        Tap {
            name: name.to_string(),
            owned: true,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Leaves it there when this is dropped.
    pub fn keep(&mut self) {
        self.owned = false;
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = ip(&["link", "del", &self.name])
        {
            tracing::warn!(tap = self.name, %error, "cannot take a tap away");
        }
    }
}

fn ip(args: &[&str]) -> Result<(), TapError> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .map_err(|source| TapError::NoIp { source })?;
    if output.status.success() {
        return Ok(());
    }
    Err(TapError::Failed {
        command: args.join(" "),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_string(),
    })
}
