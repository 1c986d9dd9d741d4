//! The journals of a migration, read from outside: which phase it is in is what they say together.

use crate::pair::answers::Phase;
use std::collections::BTreeSet;
use std::path::Path;

/// The migrations that a state directory knows of.
pub fn migrations(state: &Path) -> BTreeSet<String> {
    let Ok(entries) = std::fs::read_dir(state.join("migrations")) else {
        return BTreeSet::new();
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).collect()
}

/// The words of a migration's journal, oldest first; what was torn or is not there yet is left out.
pub fn records(state: &Path, migration: &str) -> Vec<String> {
    let path = state.join("migrations").join(migration).join("journal");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(record).collect()
}

/// The word in a line: a checksum, a space, JSON.
fn record(line: &str) -> Option<String> {
    let (_, json) = line.split_once(' ')?;
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    Some(value.get("record")?.as_str()?.to_owned())
}

/// Both sides of a migration at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Journals {
    pub source: Vec<String>,
    pub destination: Vec<String>,
}

impl Journals {
    pub fn read(source: &Path, destination: &Path, migration: &str) -> Journals {
        Journals {
            source: records(source, migration),
            destination: records(destination, migration),
        }
    }

    /// The phase, if the journals tell it; before the grant they do not.
    pub fn phase(&self) -> Option<Phase> {
        let has = |side: &[String], word: &str| side.iter().any(|record| record == word);
        if has(&self.source, "completed") {
            Some(Phase::Complete)
        } else if has(&self.source, "kept") || has(&self.destination, "refused") {
            Some(Phase::Cancel)
        } else if has(&self.source, "peer-accepted") {
            Some(Phase::Drain)
        } else if has(&self.destination, "accepted") {
            Some(Phase::Accept)
        } else if has(&self.source, "granted") {
            Some(Phase::Grant)
        } else {
            None
        }
    }

    pub fn text(&self) -> String {
        let side = |records: &[String]| match records {
            [] => "-".to_owned(),
            records => records.join(" "),
        };
        format!("{} | {}", side(&self.source), side(&self.destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journals(source: &str, destination: &str) -> Journals {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        Journals {
            source: words(source),
            destination: words(destination),
        }
    }

    #[test]
    fn both_journals_together_tell_the_phase() {
        let phase = |source, destination| journals(source, destination).phase();
        assert_eq!(phase("started", "preparing"), None);
        assert_eq!(phase("started granted", "preparing"), Some(Phase::Grant));
        assert_eq!(
            phase("started granted", "preparing accepted"),
            Some(Phase::Accept)
        );
        assert_eq!(
            phase("started granted peer-accepted", "preparing accepted"),
            Some(Phase::Drain)
        );
        assert_eq!(
            phase(
                "started granted peer-accepted completed",
                "preparing accepted"
            ),
            Some(Phase::Complete)
        );
        assert_eq!(phase("started kept", "preparing"), Some(Phase::Cancel));
    }

    #[test]
    fn a_torn_line_is_no_record() {
        let whole = r#"6d0f6c9f2a4b1e77 {"record":"granted","epoch":4}"#;
        assert_eq!(record(whole).as_deref(), Some("granted"));
        assert_eq!(record(&whole[..30]), None);
    }
}
