//! Names of a lab's namespaces, and taking namespaces away: of a lab that ends, and of dead processes.
//!
//! A name is `whl-<pid>-<number>-<place>`: the process that made it, its how-manieth lab, and which of
//! the three it is (tests add places of their own). Whoever finds a name whose process is gone may remove it; nothing else is needed to
//! clean up after a lab that was killed with SIGKILL. Two traps: a process id used again makes a
//! leftover look alive until that process ends too; and a process that still sits in a namespace keeps
//! it, and all its devices, alive without its name. So those are killed first. Only processes
//! inside namespaces of these names are ever touched, and never this process.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rustix::process::{Pid, Signal};

use super::ip;
use super::namespace::NAMES;
use crate::LabError;

const PREFIX: &str = "whl-";

/// The three names of one lab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) host_a: String,
    pub(super) host_b: String,
    pub(super) client: String,
}

impl Names {
    /// Names that no other lab has.
    pub(super) fn fresh() -> Names {
        static LABS: AtomicU32 = AtomicU32::new(0);
        let lab = format!(
            "{PREFIX}{}-{}",
            std::process::id(),
            LABS.fetch_add(1, Relaxed)
        );
        Names {
            host_a: format!("{lab}-a"),
            host_b: format!("{lab}-b"),
            client: format!("{lab}-c"),
        }
    }

    pub(super) fn all(&self) -> [&str; 3] {
        [&self.host_a, &self.host_b, &self.client]
    }
}

/// Removes what dead processes left, and what an earlier process of our own id left under `fresh`.
pub(super) fn leftovers(fresh: &Names) {
    let Ok(entries) = std::fs::read_dir(NAMES) else {
        return;
    };
    let left: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            let dead = owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
            dead || fresh.all().contains(&name.as_str())
        })
        .collect();
    if left.is_empty() {
        return;
    }
    if let Err(error) = remove(&left) {
        tracing::debug!(%error, "leftovers of a dead lab");
    }
}

/// Kills what runs inside the namespaces, then deletes them. Names already gone are no error.
pub(super) fn remove<N: AsRef<str>>(names: &[N]) -> Result<(), LabError> {
    kill_inside(names);
    let there = |name: &str| Path::new(NAMES).join(name).exists();
    let lines: Vec<String> = names
        .iter()
        .map(AsRef::as_ref)
        .filter(|name| there(name))
        .map(|name| format!("netns del {name}"))
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    match ip::batch_all(&lines) {
        // Another lab was sweeping the same names at this moment: each of us found some gone.
        Err(_) if !names.iter().any(|name| there(name.as_ref())) => Ok(()),
        result => result,
    }
}

/// Which process made a namespace of this name; `None` if it is not a lab's.
fn owner(name: &str) -> Option<u32> {
    let (pid, rest) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let (number, place) = rest.split_once('-')?;
    number.parse::<u32>().ok()?;
    let is_place = !place.is_empty() && place.bytes().all(|b| b.is_ascii_alphanumeric());
    pid.parse().ok().filter(|_| is_place)
}

fn kill_inside<N: AsRef<str>>(names: &[N]) {
    let inodes: HashSet<(u64, u64)> = names
        .iter()
        .filter_map(|name| std::fs::metadata(Path::new(NAMES).join(name.as_ref())).ok())
        .map(|file| (file.dev(), file.ino()))
        .collect();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return;
    };
    for entry in entries.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let inside = std::fs::metadata(entry.path().join("ns/net"))
            .is_ok_and(|file| inodes.contains(&(file.dev(), file.ino())));
        if inside
            && pid.cast_unsigned() != std::process::id()
            && let Some(pid) = Pid::from_raw(pid)
        {
            // Gone in the meantime is as good.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_labs_have_an_owner() {
        assert_eq!(owner("whl-123-0-a"), Some(123));
        for other in [
            "whl-123-0-",
            "whl-123-a",
            "whl-x-0-a",
            "blue",
            "whl-123-0-a-b",
            "whl--1-0-a",
        ] {
            assert_eq!(owner(other), None, "{other}");
        }
    }

    #[test]
    fn fresh_names_differ_and_are_ours() {
        let (one, two) = (Names::fresh(), Names::fresh());
        assert_ne!(one, two);
        for name in one.all() {
            assert_eq!(owner(name), Some(std::process::id()));
        }
    }
}
