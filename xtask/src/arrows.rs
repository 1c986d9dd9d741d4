//! Which crate may know which: the arrows of the design point one way, and this check keeps them so.
//!
//! ```text
//! cli -> host -> {peer, nbd, qemu, volume} -> {wire, engine}, host -> repository -> engine; sim, workload, lab and xtask stand outside
//! ```

use crate::error::Error;
use crate::manifest::{self, Kind};
use crate::workspace::Workspace;

/// Each member with the members it may depend on, lowest first. `wire` speaks in the engine's words, hence its arrow.
const ALLOWED: &[(&str, &[&str])] = &[
    ("whimbrel-engine", &[]),
    ("whimbrel-wire", &["whimbrel-engine"]),
    ("whimbrel-volume", LOWEST),
    ("whimbrel-nbd", LOWEST),
    ("whimbrel-qemu", LOWEST),
    ("whimbrel-peer", LOWEST),
    ("whimbrel-repository", &["whimbrel-engine"]),
    ("whimbrel-host", BELOW_HOST),
    ("whimbrel-sim", &["whimbrel-engine"]),
    ("whimbrel-cli", BELOW_CLI),
    ("whimbrel-workload", &[]),
    (LAB, IN_LAB),
    ("xtask", &[]),
];

const LOWEST: &[&str] = &["whimbrel-engine", "whimbrel-wire"];

const BELOW_HOST: &[&str] = &[
    "whimbrel-engine",
    "whimbrel-wire",
    "whimbrel-volume",
    "whimbrel-nbd",
    "whimbrel-qemu",
    "whimbrel-peer",
    "whimbrel-repository",
];

const BELOW_CLI: &[&str] = &[
    "whimbrel-engine",
    "whimbrel-wire",
    "whimbrel-volume",
    "whimbrel-nbd",
    "whimbrel-qemu",
    "whimbrel-peer",
    "whimbrel-repository",
    "whimbrel-host",
    "whimbrel-sim",
];

const IN_LAB: &[&str] = &[
    "whimbrel-engine",
    "whimbrel-wire",
    "whimbrel-volume",
    "whimbrel-nbd",
    "whimbrel-qemu",
    "whimbrel-peer",
    "whimbrel-repository",
    "whimbrel-host",
    "whimbrel-sim",
    "whimbrel-workload",
];

/// The laboratory: nothing that is shipped may depend on it, but tests may use its hosts and guests.
const LAB: &str = "whimbrel-lab";

/// The crates that must be tested without any host, guest or network.
const PURE: &[&str] = &[
    "whimbrel-engine",
    "whimbrel-wire",
    "whimbrel-sim",
    "whimbrel-repository",
    "whimbrel-workload",
    "xtask",
];

pub fn check(workspace: &Workspace) -> Result<(), Error> {
    let mut faults = Vec::new();
    for member in workspace.members()? {
        faults.extend(faults_of(&workspace.read(member.join("Cargo.toml"))?));
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Error::Check {
            what: "Arrows between crates point the wrong way",
            faults,
        })
    }
}

fn faults_of(manifest: &str) -> Vec<String> {
    let name = manifest::package_name(manifest).unwrap_or_default();
    let Some((_, allowed)) = ALLOWED.iter().find(|(member, _)| *member == name) else {
        return vec![format!(
            "{name:?}: nobody has said yet what it may depend on (xtask/src/arrows.rs)"
        )];
    };
    manifest::dependencies(manifest)
        .iter()
        .filter(|dependency| ALLOWED.iter().any(|(member, _)| *member == dependency.name))
        .filter(|dependency| !allowed.contains(&dependency.name.as_str()))
        .filter(|dependency| {
            !(dependency.kind == Kind::Dev
                && dependency.name == LAB
                && !PURE.contains(&name.as_str()))
        })
        .map(|dependency| {
            format!(
                "{name} must not depend on {} ({:?})",
                dependency.name, dependency.kind
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str, section: &str, dependency: &str) -> String {
        format!(
            "[package]\nname = \"{name}\"\n[{section}]\n{dependency}.workspace = true\nserde.workspace = true\n"
        )
    }

    #[test]
    fn an_arrow_up_is_refused_and_an_arrow_down_is_not() {
        assert_eq!(
            faults_of(&manifest("whimbrel-nbd", "dependencies", "whimbrel-engine")),
            Vec::<String>::new()
        );
        assert_eq!(
            faults_of(&manifest("whimbrel-nbd", "dependencies", "whimbrel-volume")).len(),
            1
        );
        assert_eq!(
            faults_of(&manifest(
                "whimbrel-engine",
                "dependencies",
                "whimbrel-wire"
            ))
            .len(),
            1
        );
    }

    #[test]
    fn tests_may_use_the_laboratory_but_what_is_shipped_may_not() {
        assert_eq!(
            faults_of(&manifest("whimbrel-host", "dev-dependencies", LAB)),
            Vec::<String>::new()
        );
        assert_eq!(
            faults_of(&manifest("whimbrel-host", "dependencies", LAB)).len(),
            1
        );
        assert_eq!(
            faults_of(&manifest("whimbrel-engine", "dev-dependencies", LAB)).len(),
            1
        );
    }

    #[test]
    fn a_new_crate_must_be_given_its_place() {
        assert_eq!(
            faults_of(&manifest("whimbrel-novel", "dependencies", "bytes")).len(),
            1
        );
    }

    #[test]
    fn the_allowed_arrows_themselves_form_no_circle() {
        // Each member may depend only on members named before it: that is an order, so there is no circle.
        for (index, (member, allowed)) in ALLOWED.iter().enumerate() {
            for other in *allowed {
                assert!(
                    ALLOWED[..index].iter().any(|(before, _)| before == other),
                    "{member} -> {other}"
                );
            }
        }
    }
}
