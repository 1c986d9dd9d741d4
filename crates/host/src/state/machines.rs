//! Machines in the state directory.

use super::durable;
use super::error::{RecordKind, StateError, misplaced};
use super::folder::{Listing, MACHINES, StateDir, read_record, record_text, write_record};
use super::machine::{MachineRuntime, MachineSpec, SpecError};
use super::name::Name;
use std::path::{Path, PathBuf};

const SPEC: &str = "machine.toml";
const RUNTIME: &str = "runtime.toml";

fn missing(path: &Path) -> StateError {
    StateError::Damaged {
        path: path.to_path_buf(),
        problem: "it is missing".to_string(),
    }
}

impl StateDir {
    /// `machines/<name>`.
    pub fn machine_folder(&self, name: &Name) -> PathBuf {
        self.record_folder(MACHINES, name.as_str())
    }

    fn existing_machine(&self, name: &Name) -> Result<PathBuf, StateError> {
        let folder = self.machine_folder(name);
        if folder.is_dir() {
            return Ok(folder);
        }
        Err(StateError::NoSuch {
            kind: RecordKind::Machine,
            name: name.to_string(),
        })
    }

    /// A new machine, with both its records or not at all. The description is checked.
    pub fn add_machine(
        &self,
        spec: &MachineSpec,
        runtime: &MachineRuntime,
    ) -> Result<(), StateError> {
        spec.check()?;
        let target = self.machine_folder(&spec.name);
        let exists = || StateError::Exists {
            kind: RecordKind::Machine,
            name: spec.name.to_string(),
        };
        if target.exists() {
            return Err(exists());
        }
        let draft = durable::draft_beside(&target);
        durable::folder(&draft)?;
        let (spec_path, runtime_path) = (draft.join(SPEC), draft.join(RUNTIME));
        let made = record_text(&spec_path, spec)
            .and_then(|text| durable::replace(&spec_path, text.as_bytes(), 0o600))
            .and_then(|()| record_text(&runtime_path, runtime))
            .and_then(|text| durable::replace(&runtime_path, text.as_bytes(), 0o600))
            .and_then(|()| durable::publish(&draft, &target));
        if made.is_err() {
            // Swept by the next daemon if even this fails.
            let _ = std::fs::remove_dir_all(&draft);
        }
        match made {
            Err(StateError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                Err(exists())
            }
            other => other,
        }
    }

    /// A machine's description.
    pub fn machine(&self, name: &Name) -> Result<MachineSpec, StateError> {
        let path = self.existing_machine(name)?.join(SPEC);
        let spec: MachineSpec = read_record(&path)?.ok_or_else(|| missing(&path))?;
        if &spec.name != name {
            return Err(misplaced(&path, name, &spec.name));
        }
        match spec.check() {
            Ok(()) => Ok(spec),
            Err(SpecError::Invalid { field, problem }) => Err(StateError::Damaged {
                path,
                problem: format!("`{field}`: {problem}"),
            }),
            Err(other) => Err(other.into()),
        }
    }

    /// Replaces the description of a machine that exists.
    pub fn save_machine(&self, spec: &MachineSpec) -> Result<(), StateError> {
        spec.check()?;
        write_record(&self.existing_machine(&spec.name)?.join(SPEC), spec)
    }

    /// A machine's epoch, owner and process. A missing record is damage: it held the epoch.
    pub fn runtime(&self, name: &Name) -> Result<MachineRuntime, StateError> {
        let path = self.existing_machine(name)?.join(RUNTIME);
        read_record(&path)?.ok_or_else(|| missing(&path))
    }

    pub fn save_runtime(&self, name: &Name, runtime: &MachineRuntime) -> Result<(), StateError> {
        write_record(&self.existing_machine(name)?.join(RUNTIME), runtime)
    }

    pub fn machines(&self) -> Result<Listing<(MachineSpec, MachineRuntime)>, StateError> {
        self.list(MACHINES, RecordKind::Machine, |name| {
            Ok((self.machine(name)?, self.runtime(name)?))
        })
    }

    /// Removes the machine's records. Whether it runs is the caller's to know.
    pub fn remove_machine(&self, name: &Name) -> Result<(), StateError> {
        durable::discard(&self.existing_machine(name)?)
    }
}
