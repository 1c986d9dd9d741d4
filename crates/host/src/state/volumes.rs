//! Volumes in the state directory.

use super::durable;
use super::error::{RecordKind, StateError, misplaced};
use super::folder::{Listing, StateDir, VOLUMES, read_record, record_text, write_record};
use super::name::Name;
use super::volume::{DATA_FILE, VolumeRecord};
use std::path::{Path, PathBuf};

const RECORD: &str = "volume.toml";

/// A volume being made: its folder exists under a draft's name, so that a crash or an error half-way
/// leaves no volume. Dropped without [`commit`](Self::commit), it is deleted.
#[derive(Debug)]
pub struct VolumeDraft {
    name: Name,
    draft: PathBuf,
    target: PathBuf,
}

impl VolumeDraft {
    /// The folder to fill.
    pub fn folder(&self) -> &Path {
        &self.draft
    }

    /// Where the data goes, unless the record says otherwise.
    pub fn data_path(&self) -> PathBuf {
        self.draft.join(DATA_FILE)
    }

    /// Makes it a volume. The data file is fsynced here, its content is the caller's.
    pub fn commit(self, record: &VolumeRecord) -> Result<(), StateError> {
        if record.name != self.name {
            return Err(misplaced(&self.target, &self.name, &record.name));
        }
        let data = record.data_path(&self.draft);
        durable::sync(&data)?;
        let path = self.draft.join(RECORD);
        durable::replace(&path, record_text(&path, record)?.as_bytes(), 0o600)?;
        match durable::publish(&self.draft, &self.target) {
            Err(StateError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                Err(StateError::Exists {
                    kind: RecordKind::Volume,
                    name: self.name.to_string(),
                })
            }
            other => other,
        }
    }
}

impl Drop for VolumeDraft {
    fn drop(&mut self) {
        // Gone already if committed; what cannot be deleted now is swept by the next daemon.
        let _ = std::fs::remove_dir_all(&self.draft);
    }
}

impl StateDir {
    /// `volumes/<name>`.
    pub fn volume_folder(&self, name: &Name) -> PathBuf {
        self.record_folder(VOLUMES, name.as_str())
    }

    /// Begins a new volume.
    pub fn begin_volume(&self, name: &Name) -> Result<VolumeDraft, StateError> {
        let target = self.volume_folder(name);
        if target.exists() {
            return Err(StateError::Exists {
                kind: RecordKind::Volume,
                name: name.to_string(),
            });
        }
        let draft = durable::draft_beside(&target);
        durable::folder(&draft)?;
        Ok(VolumeDraft {
            name: name.clone(),
            draft,
            target,
        })
    }

    pub fn volume(&self, name: &Name) -> Result<VolumeRecord, StateError> {
        let folder = self.volume_folder(name);
        if !folder.is_dir() {
            return Err(StateError::NoSuch {
                kind: RecordKind::Volume,
                name: name.to_string(),
            });
        }
        let path = folder.join(RECORD);
        let missing = || StateError::Damaged {
            path: path.clone(),
            problem: "it is missing".to_string(),
        };
        let record: VolumeRecord = read_record(&path)?.ok_or_else(missing)?;
        if &record.name != name {
            return Err(misplaced(&path, name, &record.name));
        }
        if let Some(problem) = record.problem() {
            return Err(StateError::Damaged { path, problem });
        }
        Ok(record)
    }

    pub fn volumes(&self) -> Result<Listing<VolumeRecord>, StateError> {
        self.list(VOLUMES, RecordKind::Volume, |name| self.volume(name))
    }

    /// Replaces the record of a volume that exists.
    pub fn save_volume(&self, record: &VolumeRecord) -> Result<(), StateError> {
        let folder = self.volume_folder(&record.name);
        if !folder.is_dir() {
            return Err(StateError::NoSuch {
                kind: RecordKind::Volume,
                name: record.name.to_string(),
            });
        }
        write_record(&folder.join(RECORD), record)
    }

    /// Removes the volume with all that lies in its folder. Whether someone uses it is the caller's to know.
    pub fn remove_volume(&self, name: &Name) -> Result<(), StateError> {
        let folder = self.volume_folder(name);
        if !folder.is_dir() {
            return Err(StateError::NoSuch {
                kind: RecordKind::Volume,
                name: name.to_string(),
            });
        }
        durable::discard(&folder)
    }
}
