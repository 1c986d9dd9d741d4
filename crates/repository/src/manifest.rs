//! A snapshot's manifest.
//!
//! ```text
//! whimbrel-snapshot 1 <BLAKE3 of all that follows the line, 64 digits>\n
//! { JSON }
//! ```
//! JSON, so that a backup can be understood without this program: with the volumes' leaves, and a leaf being
//! 32 bytes for each extent, everything else follows. 68 bytes for 128 MiB: half a megabyte for a TiB.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::hash::Hash;
use crate::tree::{EXTENT, LEAF_EXTENTS, VolumeTree};

/// Longest manifest that is read or written: about 120 TiB of volumes.
pub const MAX_MANIFEST: usize = 64 << 20;

/// Most volumes of a snapshot.
pub const MAX_VOLUMES: usize = 256;

/// Longest name of a volume or machine, and the longest text that says when or by what, bytes.
const MAX_TEXT: usize = 255;

/// Longest description of a machine, bytes.
const MAX_DESCRIPTION: usize = 1 << 20;

const FORMAT: &str = "whimbrel-snapshot 1 ";

/// The name of a snapshot: `[a-z0-9][a-z0-9._-]{0,126}`, which is safe as a file, an object's key and a word.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName(String);

/// Longest name of a snapshot, bytes.
pub const MAX_NAME: usize = 127;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` cannot name a snapshot: 1 to {MAX_NAME} of a-z, 0-9 and, after the first, `.`, `_` and `-`"
)]
pub struct NotAName(pub String);

impl SnapshotName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for SnapshotName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<SnapshotName, NotAName> {
        let fits = |(i, b): (usize, u8)| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || i > 0 && matches!(b, b'.' | b'_' | b'-')
        };
        match (1..=MAX_NAME).contains(&text.len()) && text.bytes().enumerate().all(fits) {
            true => Ok(SnapshotName(text.to_string())),
            false => Err(NotAName(text.chars().take(MAX_NAME).collect())),
        }
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = NotAName;

    fn try_from(text: String) -> Result<SnapshotName, NotAName> {
        text.parse()
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> String {
        name.0
    }
}

impl std::fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the volumes are like to whoever starts from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// As after a power cut at that instant, all volumes at the same one: what was flushed is there.
    Crash,
    /// The machine did not run.
    Stopped,
}

impl std::fmt::Display for Consistency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Consistency::Crash => "crash-consistent",
            Consistency::Stopped => "the machine was stopped",
        })
    }
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub name: SnapshotName,
    /// Of this snapshot alone, though another of its name be made when it is gone; 32 digits.
    pub uuid: String,
    pub machine: String,
    /// The host that made it.
    pub host: String,
    /// The instant that it shows, RFC 3339 in UTC.
    pub taken: String,
    pub consistency: Consistency,
    /// The snapshot that this one was made as a change of, if it was. Only told: nothing of it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotName>,
    /// The machine as its host described it, TOML.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    pub volumes: Vec<VolumeTree>,
}

/// Why bytes are no manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestFault {
    #[error("it does not begin as one of this version does")]
    Format,
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it is longer than {MAX_MANIFEST} bytes")]
    Long,
    #[error("it is not understood: {0}")]
    Json(String),
    #[error("it is one of `{0}`")]
    Name(SnapshotName),
    #[error("{0} is too long or not plain text")]
    Text(&'static str),
    #[error("it has {0} volumes; 1 to {MAX_VOLUMES} are possible")]
    Volumes(usize),
    #[error("there are two volumes `{0}`")]
    Twice(String),
    #[error("volume `{volume}` has {size} bytes and {leaves} leaves")]
    Size {
        volume: String,
        size: u64,
        leaves: usize,
    },
}

impl Manifest {
    /// The volume of that name.
    pub fn volume(&self, name: &str) -> Option<&VolumeTree> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// As a file's content.
    ///
    /// # Errors
    /// If it could not be read again.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestFault> {
        self.check()?;
        let json =
            serde_json::to_vec_pretty(self).map_err(|e| ManifestFault::Json(e.to_string()))?;
        let mut bytes = format!("{FORMAT}{}\n", Hash::of(&json)).into_bytes();
        bytes.extend(json);
        match bytes.len() <= MAX_MANIFEST {
            true => Ok(bytes),
            false => Err(ManifestFault::Long),
        }
    }

    /// Of a file's content, which may be anything.
    pub fn from_bytes(bytes: &[u8]) -> Result<Manifest, ManifestFault> {
        if bytes.len() > MAX_MANIFEST {
            return Err(ManifestFault::Long);
        }
        let rest = bytes.strip_prefix(FORMAT.as_bytes());
        let (sum, rest) = rest
            .and_then(|rest| rest.split_at_checked(64))
            .ok_or(ManifestFault::Format)?;
        let json = rest.strip_prefix(b"\n").ok_or(ManifestFault::Format)?;
        if Hash::of(json).to_string().as_bytes() != sum {
            return Err(ManifestFault::Checksum);
        }
        let manifest: Manifest =
            serde_json::from_slice(json).map_err(|e| ManifestFault::Json(e.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), ManifestFault> {
        let plain = |text: &str, most: usize, what| {
            let is_plain = text.len() <= most && !text.chars().any(char::is_control);
            is_plain.then_some(()).ok_or(ManifestFault::Text(what))
        };
        plain(&self.uuid, 64, "its identity")?;
        plain(&self.machine, MAX_TEXT, "the machine's name")?;
        plain(&self.host, MAX_TEXT, "the host's name")?;
        plain(&self.taken, MAX_TEXT, "its time")?;
        if self.description.len() > MAX_DESCRIPTION {
            return Err(ManifestFault::Text("the machine's description"));
        }
        if !(1..=MAX_VOLUMES).contains(&self.volumes.len()) {
            return Err(ManifestFault::Volumes(self.volumes.len()));
        }
        let mut names = HashSet::new();
        for volume in &self.volumes {
            plain(&volume.name, MAX_TEXT, "a volume's name")?;
            plain(&volume.uuid, 64, "a volume's identity")?;
            if !names.insert(&volume.name) {
                return Err(ManifestFault::Twice(volume.name.clone()));
            }
            let leaves = volume.size.div_ceil(EXTENT * LEAF_EXTENTS);
            if volume.size == 0 || leaves != volume.leaves.len() as u64 {
                return Err(ManifestFault::Size {
                    volume: volume.name.clone(),
                    size: volume.size,
                    leaves: volume.leaves.len(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest(sizes: &[u64]) -> Manifest {
        let volume = |(n, &size): (usize, &u64)| VolumeTree {
            name: format!("disk{n}"),
            uuid: "0".repeat(32),
            size,
            leaves: (0..size.div_ceil(EXTENT * LEAF_EXTENTS))
                .map(|leaf| (leaf % 3 != 0).then(|| Hash::of(&leaf.to_le_bytes())))
                .collect(),
        };
        Manifest {
            name: "first".parse().expect("a name"),
            uuid: "1".repeat(32),
            machine: "web".to_string(),
            host: "a".to_string(),
            taken: "2026-01-01T00:00:00Z".to_string(),
            consistency: Consistency::Crash,
            parent: None,
            description: "name = \"web\"\n".to_string(),
            volumes: sizes.iter().enumerate().map(volume).collect(),
        }
    }

    /// The checksum put right, so that what lies behind it is looked at.
    fn signed(json: &[u8]) -> Vec<u8> {
        let mut bytes = format!("{FORMAT}{}\n", Hash::of(json)).into_bytes();
        bytes.extend_from_slice(json);
        bytes
    }

    proptest! {
        #[test]
        fn a_manifest_comes_back_as_it_was(sizes in prop::collection::vec(1..1u64 << 33, 1..5)) {
            let manifest = manifest(&sizes);
            let bytes = manifest.to_bytes().unwrap();
            prop_assert_eq!(Manifest::from_bytes(&bytes), Ok(manifest));
        }

        #[test]
        fn arbitrary_bytes_are_refused_and_nothing_more(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Manifest::from_bytes(&bytes).is_err());
            prop_assert!(Manifest::from_bytes(&signed(&bytes)).is_err());
        }

        #[test]
        fn a_changed_manifest_is_refused_or_read_but_never_a_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
            let bytes = manifest(&[1 << 30, 512]).to_bytes().unwrap();
            let mut changed = bytes.clone();
            let at = at.index(bytes.len());
            changed[at] = byte;
            prop_assert_eq!(Manifest::from_bytes(&changed).is_ok(), bytes[at] == byte);
            prop_assert!(Manifest::from_bytes(&bytes[..cut.index(bytes.len())]).is_err());
            let mut json = bytes[FORMAT.len() + 65..].to_vec();
            let at = at % json.len();
            json[at] = byte;
            if let Ok(read) = Manifest::from_bytes(&signed(&json)) {
                prop_assert!(read.to_bytes().is_ok());
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let with = |change: fn(&mut Manifest)| {
            let mut manifest = manifest(&[1 << 20, 1 << 20]);
            change(&mut manifest);
            let json = serde_json::to_vec(&manifest).expect("json");
            let read = Manifest::from_bytes(&signed(&json));
            assert_eq!(manifest.to_bytes().err(), read.clone().err());
            read.expect_err("it is refused")
        };
        let size = with(|m| m.volumes[0].size = u64::MAX);
        assert!(matches!(size, ManifestFault::Size { .. }), "{size}");
        let twice = with(|m| m.volumes[1].name = m.volumes[0].name.clone());
        assert!(matches!(twice, ManifestFault::Twice(_)), "{twice}");
        let none = with(|m| m.volumes.clear());
        assert_eq!(none, ManifestFault::Volumes(0));
        let text = with(|m| m.machine = "\x1b[2J".to_string());
        assert!(matches!(text, ManifestFault::Text(_)), "{text}");
    }

    #[test]
    fn a_name_that_could_leave_its_folder_is_none() {
        for bad in ["", ".", "..", "a/b", "-a", "A", "a b", &"a".repeat(128)] {
            assert!(bad.parse::<SnapshotName>().is_err(), "{bad}");
        }
        assert!("web-20260101t000000z".parse::<SnapshotName>().is_ok());
    }
}
