//! What is recorded about a volume.

use super::name::{MigrationId, Name};
use super::timestamp::Timestamp;
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use whimbrel_engine::switchover::Epoch;
use whimbrel_peer::trust::PeerName;
use whimbrel_volume::backend::Format;
use whimbrel_volume::journal::VolumeIdentity;

/// Who owns a volume's or a machine's content, as far as this host knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ownership {
    /// This host owns it.
    #[default]
    Local,
    /// It is coming to this host; some of it may still be only at the source.
    Arriving { migration: MigrationId },
    /// It went to the peer `to`; what lies here is at most the way back.
    Departed {
        migration: MigrationId,
        to: PeerName,
    },
}

impl std::fmt::Display for Ownership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ownership::Local => f.write_str("local"),
            Ownership::Arriving { migration } => write!(f, "arriving ({migration})"),
            Ownership::Departed { migration, to } => write!(f, "departed to {to} ({migration})"),
        }
    }
}

/// A volume's identity: the same number at every host the volume ever lives on, whatever its name there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeUuid(pub [u8; 16]);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a UUID (32 hexadecimal digits, 8-4-4-4-12)")]
pub struct NotAUuid {
    pub text: String,
}

impl VolumeUuid {
    /// A random (version 4) UUID.
    pub fn fresh() -> io::Result<VolumeUuid> {
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(VolumeUuid(bytes))
    }
}

impl std::fmt::Display for VolumeUuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for VolumeUuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VolumeUuid({self})")
    }
}

impl TryFrom<String> for VolumeUuid {
    type Error = NotAUuid;

    fn try_from(text: String) -> Result<Self, NotAUuid> {
        // Each byte must be what its place asks for: a dash at four places, a digit at all others.
        let digits: Option<Vec<u8>> = text
            .bytes()
            .enumerate()
            .filter_map(|(i, byte)| match (matches!(i, 8 | 13 | 18 | 23), byte) {
                (true, b'-') => None,
                (true, _) => Some(None),
                (false, byte) => Some((byte as char).to_digit(16).map(|digit| digit as u8)),
            })
            .collect();
        let digits = digits.unwrap_or_default();
        let bytes: Vec<u8> = digits.chunks_exact(2).map(|d| d[0] << 4 | d[1]).collect();
        match <[u8; 16]>::try_from(bytes) {
            Ok(bytes) if text.len() == 36 => Ok(VolumeUuid(bytes)),
            _ => Err(NotAUuid { text }),
        }
    }
}

impl From<VolumeUuid> for String {
    fn from(uuid: VolumeUuid) -> String {
        uuid.to_string()
    }
}

/// `volumes/<name>/volume.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    pub name: Name,
    pub uuid: VolumeUuid,
    /// Length in bytes, a multiple of 512.
    pub size: u64,
    /// Fencing number: a write under an older epoch is refused.
    pub epoch: Epoch,
    /// The data file or device; a relative path counts from the volume's folder.
    pub data: PathBuf,
    /// How the content is stored there.
    #[serde(default, skip_serializing_if = "is_raw")]
    pub format: Format,
    /// Made to be filled by a volume of this name that arrives; what it holds until then is of no account.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits: bool,
    pub created: Timestamp,
    /// The machine whose disk it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Name>,
    pub state: Ownership,
}

fn is_raw(format: &Format) -> bool {
    *format == Format::Raw
}

/// The data file of a volume whose record does not say otherwise.
pub const DATA_FILE: &str = "data";

impl VolumeRecord {
    /// A new volume of this host, of epoch 1, with its data in the volume's folder.
    pub fn fresh(name: Name, size: u64) -> io::Result<VolumeRecord> {
        Ok(VolumeRecord {
            name,
            uuid: VolumeUuid::fresh()?,
            size,
            epoch: Epoch(1),
            data: PathBuf::from(DATA_FILE),
            format: Format::Raw,
            awaits: false,
            created: Timestamp::now(),
            machine: None,
            state: Ownership::Local,
        })
    }

    /// The data file, `folder` being the volume's folder.
    pub fn data_path(&self, folder: &Path) -> PathBuf {
        folder.join(&self.data)
    }

    /// Where the journal of its arrival under this epoch lies, `folder` being the volume's folder.
    pub fn journal_path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("journal-{}", self.epoch.0))
    }

    /// As that journal knows it.
    pub fn identity(&self) -> VolumeIdentity {
        VolumeIdentity {
            uuid: self.uuid.0,
            size: self.size,
            epoch: self.epoch.0,
        }
    }

    /// What the types alone cannot rule out.
    pub(super) fn problem(&self) -> Option<String> {
        if self.size == 0 || !self.size.is_multiple_of(whimbrel_engine::space::SECTOR) {
            return Some(format!(
                "`size`: {} is not a positive multiple of 512",
                self.size
            ));
        }
        if self.data.as_os_str().is_empty() {
            return Some("`data`: it names no file".to_string());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_uuid_reads_back_as_written(bytes: [u8; 16]) {
            let uuid = VolumeUuid(bytes);
            prop_assert_eq!(VolumeUuid::try_from(uuid.to_string()).unwrap(), uuid);
        }

        #[test]
        fn what_is_not_a_uuid_is_refused(text in "[0-9a-f-]{0,40}") {
            if let Ok(uuid) = VolumeUuid::try_from(text.clone()) {
                prop_assert_eq!(uuid.to_string(), text);
            }
        }
    }

    #[test]
    fn dashes_stand_where_they_belong() {
        for text in [
            "0aaaa000a00aaa0a00aa0-a00aaa-a-aaa-0",
            "0aaaa000-a00a-aa0a-00aa-0a00aaaaaaa",
            "0aaaa000-a00a-aa0a-00aa-0a00aaaaaa-0",
        ] {
            assert!(VolumeUuid::try_from(text.to_string()).is_err(), "{text}");
        }
        assert!(VolumeUuid::try_from("0aaaa000-a00a-aa0a-00aa-0a00aaaaaaa0".to_string()).is_ok());
    }

    #[test]
    fn two_fresh_uuids_differ() {
        assert_ne!(VolumeUuid::fresh().unwrap(), VolumeUuid::fresh().unwrap());
    }
}
