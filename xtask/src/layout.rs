//! One idea per file: no source file grows beyond [`LIMIT`] lines, and no file or folder has a name that says nothing.

use std::ffi::OsStr;
use std::path::Path;

use crate::error::Error;
use crate::workspace::{Workspace, list};

const LIMIT: usize = 800;

/// Files that may be longer, each with the reason. An entry whose file is gone or short again is a fault too.
const LONGER: &[(&str, &str)] = &[];

/// Names that take anything in and tell nothing.
const BANNED: &[&str] = &[
    "util", "utils", "manager", "managers", "helper", "helpers", "misc",
];

pub fn check(workspace: &Workspace) -> Result<(), Error> {
    let mut faults = Vec::new();
    for folder in ["crates", "xtask"] {
        walk(workspace, &workspace.root().join(folder), &mut faults)?;
    }
    for (path, reason) in LONGER {
        if lines(workspace, Path::new(path)).unwrap_or(0) <= LIMIT {
            faults.push(format!(
                "{path} is allowed to be longer ({reason}) but need not be"
            ));
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Error::Check {
            what: "The layout of the sources",
            faults,
        })
    }
}

fn walk(workspace: &Workspace, folder: &Path, faults: &mut Vec<String>) -> Result<(), Error> {
    for path in list(folder)? {
        // Build results of a crate that was built on its own (a fuzz target) are no sources.
        if path.file_name() == Some(OsStr::new("target")) {
            continue;
        }
        let shown = workspace.relative(&path).display().to_string();
        if path.is_dir() {
            if is_banned(&path) {
                faults.push(format!(
                    "{shown}/: the name says nothing about what is in it"
                ));
            }
            walk(workspace, &path, faults)?;
        } else if path.extension() == Some(OsStr::new("rs")) {
            if is_banned(&path) {
                faults.push(format!(
                    "{shown}: the name says nothing about what is in it"
                ));
            }
            let count = lines(workspace, &path)?;
            if count > LIMIT && !LONGER.iter().any(|(allowed, _)| *allowed == shown) {
                faults.push(format!(
                    "{shown}: {count} lines, more than {LIMIT} (one idea per file)"
                ));
            }
        }
    }
    Ok(())
}

fn lines(workspace: &Workspace, path: &Path) -> Result<usize, Error> {
    Ok(workspace.read(path)?.lines().count())
}

/// Whether a banned name is the file's or folder's name, or one word of it.
fn is_banned(path: &Path) -> bool {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    stem.split(['_', '-']).any(|word| BANNED.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_says_nothing_is_found_also_as_one_word_of_a_name() {
        for name in [
            "utils.rs",
            "src/manager",
            "session_manager.rs",
            "test-helpers",
        ] {
            assert!(is_banned(Path::new(name)), "{name}");
        }
        for name in ["residency.rs", "utilization.rs", "management.rs"] {
            assert!(!is_banned(Path::new(name)), "{name}");
        }
    }
}
