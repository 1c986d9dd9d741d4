//! The state directory as a whole: making, opening, and what all records share.

use super::durable;
use super::error::{RecordKind, StateError, not_a_record};
use super::name::Name;
use super::toml_text;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs;
use std::path::{Path, PathBuf};

/// The format this program writes. Formats: 1, the first.
pub const FORMAT: u64 = 1;

const VERSION: &str = "VERSION";
pub(super) const VOLUMES: &str = "volumes";
pub(super) const MACHINES: &str = "machines";
pub(super) const MIGRATIONS: &str = "migrations";

/// An initialised state directory of a format this program knows.
#[derive(Clone, Debug)]
pub struct StateDir {
    root: PathBuf,
}

/// All records of a kind. One that is damaged must not hide the others.
#[derive(Debug)]
pub struct Listing<T> {
    pub records: Vec<T>,
    pub damaged: Vec<StateError>,
}

impl StateDir {
    /// Makes `root` a state directory, or opens it if it is one. A directory with other things in it is
    /// refused. Safe to repeat: what an interrupted run left out is added.
    pub fn init(root: &Path) -> Result<StateDir, StateError> {
        let root = std::path::absolute(root).map_err(StateError::io("find", root))?;
        let dir = StateDir { root };
        match dir.check_version() {
            Ok(()) => {}
            Err(StateError::NotInitialised { .. }) => dir.refuse_strangers()?,
            Err(e) => return Err(e),
        }
        fs::create_dir_all(dir.root.parent().unwrap_or(&dir.root))
            .map_err(StateError::io("make the folder of", &dir.root))?;
        durable::folder(&dir.root)?;
        // The folder may be someone's own, made with a wider mode; the keys in it are for its owner.
        fs::set_permissions(
            &dir.root,
            std::os::unix::fs::PermissionsExt::from_mode(0o700),
        )
        .map_err(StateError::io("set the mode of", &dir.root))?;
        for name in [VOLUMES, MACHINES, MIGRATIONS] {
            durable::folder(&dir.root.join(name))?;
        }
        if dir.check_version().is_err() {
            durable::replace(
                &dir.root.join(VERSION),
                format!("{FORMAT}\n").as_bytes(),
                0o644,
            )?;
        }
        Ok(dir)
    }

    /// Opens a state directory that [`init`](Self::init) made.
    pub fn open(root: &Path) -> Result<StateDir, StateError> {
        let root = std::path::absolute(root).map_err(StateError::io("find", root))?;
        let dir = StateDir { root };
        dir.check_version()?;
        Ok(dir)
    }

    fn check_version(&self) -> Result<(), StateError> {
        let path = self.root.join(VERSION);
        let text = durable::read(&path)?.ok_or_else(|| StateError::NotInitialised {
            path: self.root.clone(),
        })?;
        let found: u64 = text.trim().parse().map_err(|_| StateError::Damaged {
            path: path.clone(),
            problem: format!("it says {:?}, not a format's number", shortened(&text)),
        })?;
        if found == 0 {
            return Err(StateError::Damaged {
                path,
                problem: "there was never a format 0".to_string(),
            });
        }
        if found > FORMAT {
            return Err(StateError::NewerFormat {
                path,
                found,
                known: FORMAT,
            });
        }
        Ok(())
    }

    /// Our own folders, empty, are what an `init` that was cut off leaves; anything else is someone else's.
    fn refuse_strangers(&self) -> Result<(), StateError> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(StateError::io("read", &self.root)(e)),
        };
        for entry in entries {
            let entry = entry.map_err(StateError::io("read", &self.root))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let ours = name.starts_with(durable::DRAFT)
                || [VOLUMES, MACHINES, MIGRATIONS].contains(&name.as_str())
                    && fs::read_dir(entry.path()).is_ok_and(|mut d| d.next().is_none());
            if !ours {
                return Err(StateError::NotEmpty {
                    path: self.root.clone(),
                    found: name,
                });
            }
        }
        Ok(())
    }

    /// The directory, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The host's own key, for [`whimbrel_peer::identity::Identity`].
    pub fn identity_path(&self) -> PathBuf {
        self.root.join(whimbrel_peer::identity::IDENTITY_FILE)
    }

    /// The trusted peers, for [`whimbrel_peer::trust::TrustStore`].
    pub fn peers_path(&self) -> PathBuf {
        self.root.join(whimbrel_peer::trust::PEERS_FILE)
    }

    /// The invitations, for [`whimbrel_peer::invitation::Invitations`].
    pub fn invitations_path(&self) -> PathBuf {
        self.root.join(whimbrel_peer::invitation::INVITATIONS_FILE)
    }

    /// Where the API's socket is unless the configuration says otherwise.
    pub fn socket_path(&self) -> PathBuf {
        self.root.join("api.sock")
    }

    pub(super) fn record_folder(&self, folder: &str, name: &str) -> PathBuf {
        self.root.join(folder).join(name)
    }

    /// Reads every record of `folder` with `read`, in order of names.
    pub(super) fn list<T>(
        &self,
        folder: &str,
        kind: RecordKind,
        read: impl Fn(&Name) -> Result<T, StateError>,
    ) -> Result<Listing<T>, StateError> {
        let folder = self.root.join(folder);
        let mut listing = Listing {
            records: Vec::new(),
            damaged: Vec::new(),
        };
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).map_err(StateError::io("read", &folder))? {
            let entry = entry.map_err(StateError::io("read", &folder))?;
            let text = entry.file_name().to_string_lossy().into_owned();
            match text.parse::<Name>() {
                Ok(name) => names.push(name),
                Err(_) if text.starts_with(durable::DRAFT) => {}
                Err(_) => listing.damaged.push(not_a_record(kind, &entry.path())),
            }
        }
        names.sort();
        for name in &names {
            match read(name) {
                Ok(record) => listing.records.push(record),
                // Removed between the listing and the reading.
                Err(StateError::NoSuch { .. }) => {}
                Err(error) => listing.damaged.push(error),
            }
        }
        Ok(listing)
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Reads a record. `Ok(None)` if there is no such file.
pub(super) fn read_record<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let Some(text) = durable::read(path)? else {
        return Ok(None);
    };
    toml_text::parse(path, &text)
        .map(Some)
        .map_err(|error| StateError::DamagedToml { error })
}

/// A record's text. Our own types always have one; what serde could refuse is reported all the same.
pub(super) fn record_text<T: Serialize>(path: &Path, record: &T) -> Result<String, StateError> {
    toml::to_string(record).map_err(|e| {
        StateError::io("write", path)(std::io::Error::new(std::io::ErrorKind::InvalidData, e))
    })
}

pub(super) fn write_record<T: Serialize>(path: &Path, record: &T) -> Result<(), StateError> {
    durable::replace(path, record_text(path, record)?.as_bytes(), 0o600)
}
