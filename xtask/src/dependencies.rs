//! Every dependency is named once, in the root manifest, and explained once, in `docs/dependencies.md`.

use std::collections::BTreeSet;

use crate::error::Error;
use crate::manifest::{self, Dependency, Kind};
use crate::workspace::Workspace;

const TABLE: &str = "docs/dependencies.md";

pub fn check(workspace: &Workspace) -> Result<(), Error> {
    let mut members = Vec::new();
    for member in workspace.members()? {
        let manifest = workspace.read(member.join("Cargo.toml"))?;
        members.push((
            manifest::package_name(&manifest).unwrap_or_default(),
            manifest::dependencies(&manifest),
        ));
    }
    let root = manifest::dependencies(&workspace.read("Cargo.toml")?);
    let faults = faults(&root, &members, &workspace.read(TABLE)?);
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Error::Check {
            what: "Dependencies are not in order",
            faults,
        })
    }
}

fn faults(root: &[Dependency], members: &[(String, Vec<Dependency>)], table: &str) -> Vec<String> {
    let named: BTreeSet<&str> = root
        .iter()
        .filter(|dependency| {
            dependency.kind == Kind::Workspace && !dependency.name.starts_with("whimbrel-")
        })
        .map(|dependency| dependency.name.as_str())
        .collect();
    let explained: BTreeSet<&str> = table.lines().filter_map(row_name).collect();
    let used: BTreeSet<&str> = members
        .iter()
        .flat_map(|(_, list)| list)
        .map(|one| one.name.as_str())
        .collect();

    let mut faults = Vec::new();
    faults.extend(
        named
            .difference(&explained)
            .map(|name| format!("{name} has no row in {TABLE}")),
    );
    faults.extend(
        explained
            .difference(&named)
            .map(|name| format!("{name} has a row in {TABLE} but is not used")),
    );
    faults.extend(
        named
            .difference(&used)
            .map(|name| format!("{name} is named in Cargo.toml but no crate uses it")),
    );
    for (member, list) in members {
        faults.extend(
            list.iter()
                .filter(|dependency| !dependency.inherited)
                .map(|dependency| {
                    format!(
                        "{member}: {} must come from the workspace's Cargo.toml",
                        dependency.name
                    )
                }),
        );
    }
    faults
}

/// The crate a row of the table is about: ``| `name` | ... |``.
fn row_name(line: &str) -> Option<&str> {
    line.strip_prefix("| `")?
        .split_once('`')
        .map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str =
        "[workspace.dependencies]\nwhimbrel-wire = { path = \"crates/wire\" }\nbytes = \"1\"\n";
    const TABLE_TEXT: &str =
        "| crate | why | instead of |\n| --- | --- | --- |\n| `bytes` | buffers | copies |\n";

    fn check(root: &str, member: &str, table: &str) -> Vec<String> {
        let members = [("sample".to_string(), manifest::dependencies(member))];
        faults(&manifest::dependencies(root), &members, table)
    }

    #[test]
    fn what_is_named_explained_and_used_is_in_order() {
        let member = "[dependencies]\nbytes.workspace = true\nwhimbrel-wire.workspace = true\n";
        assert_eq!(check(ROOT, member, TABLE_TEXT), Vec::<String>::new());
    }

    #[test]
    fn a_missing_row_a_stale_row_and_a_private_version_are_found() {
        let member = "[dependencies]\nbytes = \"1\"\n";
        let faults = check(ROOT, member, "| `serde` | messages | by hand |\n");
        assert_eq!(faults.len(), 3, "{faults:?}");
    }

    #[test]
    fn a_dependency_that_no_crate_uses_is_found() {
        assert_eq!(check(ROOT, "[dependencies]\n", TABLE_TEXT).len(), 1);
    }
}
