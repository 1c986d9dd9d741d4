//! Where things are: the checkout, cargo, and the folder of build results.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;

pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    pub fn find() -> Workspace {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("the manifest folder of xtask is a child of the workspace")
            .to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            // Cargo takes a relative one from where it is started, and all of ours are started in the root.
            Some(folder) => root.join(folder),
            None => root.join("target"),
        };
        Workspace { root, target }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's folder of build results; what `setup` builds or fetches lives below it too, so that removing the
    /// checkout removes everything.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The cargo that started this program, run in the root.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target);
        command
    }

    pub fn read(&self, path: impl AsRef<Path>) -> Result<String, Error> {
        let path = self.root.join(path);
        fs::read_to_string(&path).map_err(|cause| Error::File { path, cause })
    }

    /// The folders of all members that hold a manifest, relative to the root, in order of name.
    pub fn members(&self) -> Result<Vec<PathBuf>, Error> {
        let mut members: Vec<PathBuf> = list(&self.root.join("crates"))?
            .into_iter()
            .filter(|folder| folder.join("Cargo.toml").is_file())
            .map(|folder| self.relative(&folder))
            .collect();
        members.push("xtask".into());
        Ok(members)
    }

    pub fn relative(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap_or(path).to_path_buf()
    }
}

/// What a folder holds, in order of name.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |cause| Error::File {
        path: folder.to_path_buf(),
        cause,
    };
    let mut entries = fs::read_dir(folder)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    entries.sort();
    Ok(entries)
}
