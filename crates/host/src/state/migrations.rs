//! Migrations in the state directory: a folder each, whose content is the migration's own.

use super::durable;
use super::error::{RecordKind, StateError};
use super::folder::{Listing, MIGRATIONS, StateDir};
use super::name::MigrationId;
use std::path::{Path, PathBuf};

impl StateDir {
    /// `migrations/<id>`.
    pub fn migration_folder(&self, id: &MigrationId) -> PathBuf {
        self.record_folder(MIGRATIONS, id.as_str())
    }

    /// Makes the migration's folder.
    pub fn add_migration(&self, id: &MigrationId) -> Result<PathBuf, StateError> {
        let folder = self.migration_folder(id);
        if folder.exists() {
            return Err(StateError::Exists {
                kind: RecordKind::Migration,
                name: id.to_string(),
            });
        }
        durable::folder(&folder)?;
        Ok(folder)
    }

    pub fn migrations(&self) -> Result<Listing<MigrationId>, StateError> {
        self.list(MIGRATIONS, RecordKind::Migration, |name| {
            name.as_str().parse().map_err(|_| StateError::NoSuch {
                kind: RecordKind::Migration,
                name: name.to_string(),
            })
        })
    }

    pub fn remove_migration(&self, id: &MigrationId) -> Result<(), StateError> {
        let folder = self.migration_folder(id);
        if !folder.is_dir() {
            return Err(StateError::NoSuch {
                kind: RecordKind::Migration,
                name: id.to_string(),
            });
        }
        durable::discard(&folder)
    }

    /// The text of a file in the state directory (a journal's snapshot, say), `None` if there is none.
    /// At most 4 MiB, UTF-8.
    pub fn read_text(path: &Path) -> Result<Option<String>, StateError> {
        durable::read(path)
    }

    /// Replaces a file of the state directory whole and durably, mode 0600.
    pub fn replace_file(path: &Path, content: &[u8]) -> Result<(), StateError> {
        durable::replace(path, content, 0o600)
    }
}
