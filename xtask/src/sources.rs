//! The machine's apt sources: which mirror serves Debian itself, and whether its backports are configured.
//!
//! Two notations exist (sources.list(5)): one line per source in `*.list`, and stanzas in `*.sources`.

use std::fs;
use std::path::Path;

/// One configured source of binary packages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub uri: String,
    pub suites: Vec<String>,
    pub components: Vec<String>,
    /// A key file, or a list of fingerprints; none means apt's own key ring.
    pub signed_by: Option<String>,
}

/// All enabled sources below `/etc/apt`. What cannot be read is as good as not there: apt could not read it either.
pub fn configured(etc_apt: &Path) -> Vec<Source> {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(folder) = fs::read_dir(etc_apt.join("sources.list.d")) {
        files.extend(folder.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(text.lines().filter_map(one_line)),
            Some("sources") => sources.extend(stanzas(&text)),
            _ => {}
        }
    }
    sources
}

/// The source of the suite `codename` itself: the mirror that its backports are on as well.
pub fn mirror<'a>(sources: &'a [Source], codename: &str) -> Option<&'a Source> {
    sources.iter().find(|source| {
        source.suites.iter().any(|suite| suite == codename)
            && source.components.iter().any(|name| name == "main")
    })
}

pub fn has_suite(sources: &[Source], suite: &str) -> bool {
    sources
        .iter()
        .any(|source| source.suites.iter().any(|name| name == suite))
}

/// The text of a `.sources` file for one suite on the mirror of another source.
pub fn stanza(mirror: &Source, suite: &str) -> String {
    let mut text = format!(
        "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n",
        mirror.uri
    );
    if let Some(key) = &mirror.signed_by {
        text.push_str(&format!("Signed-By: {key}\n"));
    }
    text
}

/// `deb [signed-by=FILE arch=amd64] URI SUITE COMPONENT...`
fn one_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let mut rest = line
        .strip_prefix("deb")?
        .strip_prefix([' ', '\t'])?
        .trim_start();
    let mut signed_by = None;
    if let Some(options) = rest.strip_prefix('[') {
        let (options, after) = options.split_once(']')?;
        signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map(String::from);
        rest = after;
    }
    let mut words = rest.split_whitespace().map(String::from);
    Some(Source {
        uri: words.next()?,
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by,
    })
}

/// Stanzas of `Field: value` lines, parted by empty lines; a line that starts with a blank goes on with the field
/// before it.
fn stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(source_of(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_string()));
        }
    }
    sources
}

fn source_of(fields: &[(String, String)]) -> Option<Source> {
    let field = |name: &str| {
        fields
            .iter()
            .find(|(field, _)| field == name)
            .map(|(_, value)| value.as_str())
    };
    let words = |name: &str| {
        field(name)
            .unwrap_or_default()
            .split_whitespace()
            .map(String::from)
            .collect::<Vec<_>>()
    };
    let enabled = !field("enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
    if !enabled || !words("types").iter().any(|kind| kind == "deb") {
        return None;
    }
    Some(Source {
        uri: words("uris").into_iter().next()?,
        suites: words("suites"),
        components: words("components"),
        signed_by: field("signed-by").map(String::from),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "\
Types: deb
# a comment within a stanza
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm-backports
Components: main
";

    #[test]
    fn the_mirror_of_the_release_is_found_in_stanzas() {
        let sources = stanzas(STANZAS);
        assert_eq!(sources.len(), 2, "the disabled one does not count");
        let mirror = mirror(&sources, "bookworm").unwrap();
        assert_eq!(mirror.uri, "http://mirror.example/debian");
        assert!(!has_suite(&sources, "bookworm-backports"));
        assert_eq!(
            stanza(mirror, "bookworm-backports"),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
    }

    #[test]
    fn one_line_sources_are_read_with_and_without_options() {
        let plain =
            one_line("deb http://mirror.example/debian trixie main contrib # the usual").unwrap();
        assert_eq!(
            (plain.suites[0].as_str(), plain.components.len()),
            ("trixie", 2)
        );
        let keyed = one_line(
            "deb [arch=amd64 signed-by=/a/key.gpg] http://mirror.example/debian trixie main",
        )
        .unwrap();
        assert_eq!(keyed.signed_by.as_deref(), Some("/a/key.gpg"));
        assert_eq!(
            one_line("deb-src http://mirror.example/debian trixie main"),
            None
        );
        assert_eq!(
            one_line("# deb http://mirror.example/debian trixie main"),
            None
        );
    }

    #[test]
    fn what_was_written_is_read_back() {
        let source = &stanzas(STANZAS)[0];
        let written = stanzas(&stanza(source, "bookworm-backports"));
        assert!(has_suite(&written, "bookworm-backports"));
        assert_eq!(written[0].uri, source.uri);
    }

    #[test]
    fn a_key_written_out_in_the_file_is_kept_whole() {
        let text = "Types: deb\nURIs: http://m/d\nSuites: trixie\nComponents: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        let source = &stanzas(text)[0];
        assert_eq!(source.signed_by.as_deref(), Some("\n -----BEGIN\n .\n abc"));
    }
}
