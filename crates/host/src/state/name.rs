//! Names of machines, volumes and networks, and the identifiers of migrations.
//!
//! A name becomes a folder, an NBD export, a QEMU id and a word in a log line, so only what is safe in
//! all four is let in: `[a-z0-9][a-z0-9._-]{0,62}`. A leading dot is thereby impossible, which keeps the
//! state directory's own drafts (`.new-...`) apart from every record.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Most bytes in a name.
pub const MAX_NAME: usize = 63;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a name must not be empty")]
    Empty,
    #[error("the name `{name}` is {len} bytes long; at most {MAX_NAME} are allowed")]
    TooLong { name: String, len: usize },
    #[error(
        "the name `{name}` has {found:?} at position {position}; allowed are a-z, 0-9 and, after the first, `.`, `_` and `-`"
    )]
    BadCharacter {
        name: String,
        found: char,
        position: usize,
    },
}

fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    let bad = name.chars().enumerate().find(|&(i, c)| {
        !(c.is_ascii_lowercase() || c.is_ascii_digit() || i > 0 && matches!(c, '.' | '_' | '-'))
    });
    if let Some((i, found)) = bad {
        return Err(NameError::BadCharacter {
            name: name.to_string(),
            found,
            position: i + 1,
        });
    }
    if name.len() > MAX_NAME {
        return Err(NameError::TooLong {
            name: name.to_string(),
            len: name.len(),
        });
    }
    Ok(())
}

macro_rules! validated_text {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check(text)?;
                Ok($type(text.to_string()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                check(&text)?;
                Ok($type(text))
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<std::path::Path> for $type {
            fn as_ref(&self) -> &std::path::Path {
                self.0.as_ref()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

validated_text! {
    /// The name of a machine, a volume or a network.
    Name
}

validated_text! {
    /// The identifier of one migration, the same at both hosts; the name of its folder.
    MigrationId
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_name_of_the_grammar_is_taken(name in "[a-z0-9][a-z0-9._-]{0,62}") {
            let parsed: Name = name.parse().unwrap();
            prop_assert_eq!(parsed.as_str(), name.as_str());
        }

        #[test]
        fn nothing_outside_the_grammar_is_taken(text in "\\PC{0,80}") {
            let mut chars = text.chars();
            let first = chars.next().is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
            let rest = chars.all(|c| {
                c.is_ascii_lowercase() || c.is_ascii_digit() || ['.', '_', '-'].contains(&c)
            });
            prop_assert_eq!(text.parse::<Name>().is_ok(), first && rest && text.len() <= 63);
        }

        #[test]
        fn a_name_never_leaves_its_folder(text in "\\PC{0,80}") {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert!(!name.as_str().contains('/') && !name.as_str().starts_with('.'));
            }
        }
    }

    #[test]
    fn a_bad_name_says_which_character_and_where() {
        let text = "Web 1".parse::<Name>().unwrap_err().to_string();
        assert!(
            text.contains("'W'") && text.contains("position 1"),
            "{text}"
        );
        assert!("../etc".parse::<Name>().is_err());
        assert!(
            "a".repeat(64)
                .parse::<Name>()
                .unwrap_err()
                .to_string()
                .contains("64 bytes")
        );
    }
}
