//! Reads the dependencies out of cargo manifests: as much of TOML as manifests use, so that no parser has to be
//! built first.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Dev,
    Build,
    /// `[workspace.dependencies]`: named for all members.
    Workspace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dependency {
    pub name: String,
    pub kind: Kind,
    /// Taken over from the workspace (`workspace = true`).
    pub inherited: bool,
}

/// All dependencies a manifest names, in its order.
pub fn dependencies(manifest: &str) -> Vec<Dependency> {
    let mut found: Vec<Dependency> = Vec::new();
    for entry in entries(manifest) {
        let Some((kind, named_by_section)) = kind_of(&entry.section) else {
            continue;
        };
        let (name, setting) = match &named_by_section {
            Some(name) => (name.as_str(), format!("{} = {}", entry.key, entry.value)),
            None => match entry.key.split_once('.') {
                Some((name, key)) => (name, format!("{key} = {}", entry.value)),
                None => (entry.key.as_str(), entry.value.clone()),
            },
        };
        let name = name.trim_matches(['"', '\'']);
        let inherited = setting
            .split_whitespace()
            .collect::<String>()
            .contains("workspace=true");
        match found
            .iter_mut()
            .find(|other| other.name == name && other.kind == kind)
        {
            Some(other) => other.inherited |= inherited,
            None => found.push(Dependency {
                name: name.to_string(),
                kind,
                inherited,
            }),
        }
    }
    found
}

/// The package's name.
pub fn package_name(manifest: &str) -> Option<String> {
    entries(manifest)
        .into_iter()
        .find(|entry| entry.section == "package" && entry.key == "name")
        .map(|entry| entry.value.trim_matches('"').to_string())
}

/// What a section's dependencies are, and the name of the dependency if the section is about a single one.
fn kind_of(section: &str) -> Option<(Kind, Option<String>)> {
    let (section, on_platform) = match section.strip_prefix("target.") {
        // The platform is the only quoted part, and may hold dots itself.
        Some(rest) => (
            rest.rsplit_once(['"', '\''])
                .map_or(rest, |(_, after)| after)
                .trim_start_matches('.'),
            true,
        ),
        None => (section, false),
    };
    [
        ("workspace.dependencies", Kind::Workspace),
        ("dependencies", Kind::Normal),
        ("dev-dependencies", Kind::Dev),
        ("build-dependencies", Kind::Build),
    ]
    .into_iter()
    .filter(|(_, kind)| !(on_platform && *kind == Kind::Workspace))
    .find_map(|(prefix, kind)| {
        let rest = section.strip_prefix(prefix)?;
        if rest.is_empty() {
            Some((kind, None))
        } else {
            Some((kind, Some(rest.strip_prefix('.')?.to_string())))
        }
    })
}

struct Entry {
    section: String,
    key: String,
    value: String,
}

fn entries(manifest: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut section = String::new();
    // How many brackets of the value before are still open.
    let mut open = 0;
    for line in manifest.lines() {
        let (line, change) = without_comment(line);
        let line = line.trim();
        if open > 0 {
            if let Some(entry) = entries.last_mut() {
                entry.value.push_str(line);
            }
            open += change;
        } else if let Some(name) = line.strip_prefix('[') {
            section = name.trim_matches(['[', ']']).to_string();
        } else if let Some((key, value)) = line.split_once('=') {
            entries.push(Entry {
                section: section.clone(),
                key: key.trim().into(),
                value: value.trim().into(),
            });
            open = change;
        }
    }
    entries
}

/// The line up to its comment, and how many more brackets it opens than it closes.
fn without_comment(line: &str) -> (&str, i32) {
    let mut quote = None;
    let mut change = 0;
    for (at, c) in line.char_indices() {
        match (quote, c) {
            (Some(mark), _) if c == mark => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '#') => return (&line[..at], change),
            (None, '[' | '{') => change += 1,
            (None, ']' | '}') => change -= 1,
            (None, _) => {}
        }
    }
    (line, change)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = r#"
[package]
name = "sample" # with = and [ in a comment

[dependencies]
serde.workspace = true
toml = "1" # pinned here
tokio = { workspace = true, features = [
    "full", # all = of it
] }
bytes.workspace = true

[dependencies.zstd]
version = "0.14"
default-features = false

[target.'cfg(target_os = "linux")'.dependencies]
libc.workspace = true

[dev-dependencies]
proptest = { workspace = true }
[build-dependencies]
cc = "1"
[workspace.dependencies]
rustls = { version = "0.23", default-features = false }
[features]
default = []
"#;

    #[test]
    fn every_notation_of_a_dependency_is_understood() {
        let found: Vec<(String, Kind, bool)> = dependencies(MANIFEST)
            .into_iter()
            .map(|d| (d.name, d.kind, d.inherited))
            .collect();
        let expected = [
            ("serde", Kind::Normal, true),
            ("toml", Kind::Normal, false),
            ("tokio", Kind::Normal, true),
            ("bytes", Kind::Normal, true),
            ("zstd", Kind::Normal, false),
            ("libc", Kind::Normal, true),
            ("proptest", Kind::Dev, true),
            ("cc", Kind::Build, false),
            ("rustls", Kind::Workspace, false),
        ];
        assert_eq!(
            found,
            expected.map(|(name, kind, inherited)| (name.to_string(), kind, inherited))
        );
    }

    #[test]
    fn the_packages_name_is_read_without_its_comment() {
        assert_eq!(package_name(MANIFEST).as_deref(), Some("sample"));
    }
}
