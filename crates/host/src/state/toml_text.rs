//! TOML with errors that name the file, the line and the key.

use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// A TOML text that does not say what its reader needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {}{problem}", file.display(), key.as_ref().map(|k| format!("`{k}`: ")).unwrap_or_default())]
pub struct TomlError {
    pub file: PathBuf,
    /// Counted from 1.
    pub line: usize,
    /// The key on that line, where there is one.
    pub key: Option<String>,
    pub problem: String,
}

/// Parses `text`, which came from `file`.
pub fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, TomlError> {
    toml::from_str(text).map_err(|e| {
        let at = e.span().map_or(0, |s| s.start).min(text.len());
        let line = text[..at].matches('\n').count();
        TomlError {
            file: file.to_path_buf(),
            line: line + 1,
            key: text.lines().nth(line).and_then(key_of),
            problem: e.message().trim().replace('\n', ", "),
        }
    })
}

/// The key (or table) that a line of TOML sets.
fn key_of(line: &str) -> Option<String> {
    let line = line.trim();
    let key = match line.strip_prefix('[') {
        Some(table) => table.trim_matches(['[', ']', ' ']),
        None => line.split_once('=')?.0.trim(),
    };
    (!key.is_empty() && key.len() <= 100).then(|| key.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ByteSize;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[allow(dead_code)]
        size: ByteSize,
    }

    fn error(text: &str) -> String {
        parse::<Sample>(Path::new("/x/y.toml"), text)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let text = error("# a comment\nsize = \"10 apples\"\n");
        assert!(
            text.starts_with("/x/y.toml:2: `size`: ") && text.contains("10 apples"),
            "{text}"
        );
        let text = error("size = 1\n\nsiez = 2\n");
        assert!(
            text.starts_with("/x/y.toml:3: `siez`: unknown field `siez`"),
            "{text}"
        );
        let text = error("");
        assert!(text.contains("missing field `size`"), "{text}");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(\\PC|\n){0,120}") {
            let _ = parse::<Sample>(Path::new("f"), &text);
        }
    }
}
