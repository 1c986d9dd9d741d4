//! The host's own record: what it is called.

use super::error::StateError;
use super::folder::{StateDir, read_record, write_record};
use super::timestamp::Timestamp;
use serde::{Deserialize, Serialize};
use whimbrel_peer::trust::PeerName;

/// `host.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostRecord {
    /// What the host calls itself. Peers have names of their own for it, and trust hangs on the key alone.
    pub name: PeerName,
    pub created: Timestamp,
}

impl StateDir {
    pub fn host(&self) -> Result<HostRecord, StateError> {
        let path = self.root().join("host.toml");
        read_record(&path)?.ok_or_else(|| StateError::NotInitialised {
            path: self.root().to_path_buf(),
        })
    }

    pub fn save_host(&self, record: &HostRecord) -> Result<(), StateError> {
        write_record(&self.root().join("host.toml"), record)
    }
}

/// The name that the operating system has for this host, as near as a peer's name allows; else `host`.
pub fn default_host_name() -> PeerName {
    let node = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    nearest_name(&node).unwrap_or_else(|| "host".parse().expect("`host` is a peer's name"))
}

/// Other characters become `-`, the rest is cut. `None` if nothing is left.
fn nearest_name(text: &str) -> Option<PeerName> {
    let mapped: String = text
        .chars()
        .map(|c| match c.to_ascii_lowercase() {
            c if c.is_ascii_lowercase() || c.is_ascii_digit() => c,
            c @ ('.' | '_') => c,
            _ => '-',
        })
        .collect();
    let marks = ['.', '_', '-'];
    let kept = mapped.trim_start_matches(marks);
    kept[..kept.len().min(63)]
        .trim_end_matches(marks)
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_host_name_becomes_the_nearest_name() {
        assert_eq!(
            nearest_name("Rack 3.Example.ORG.").unwrap().as_str(),
            "rack-3.example.org"
        );
        assert!(nearest_name("---").is_none());
    }

    proptest! {
        #[test]
        fn any_text_with_a_letter_or_digit_has_a_nearest_name(text in "\\PC{0,40}[a-z0-9]\\PC{0,40}") {
            prop_assert!(nearest_name(&text).is_some());
        }
    }
}
