//! How long something may take, as people write it: `100ms`, or `off`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What a bound can be: less is below what disks do, more is no bound.
const LEAST: Duration = Duration::from_millis(1);
const MOST: Duration = Duration::from_secs(60);

/// The bound a guest's requests are to stay within while its machine moves; `None`: no matter how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyBound(pub Option<Duration>);

/// Why a bound was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LatencyError {
    #[error("`{text}` is no time: write a number and a unit, like 100ms or 2s, or `off`")]
    NotATime { text: String },
    #[error("`{text}` is out of bounds: between 1ms and 1m, or `off`")]
    OutOfBounds { text: String },
}

impl Default for LatencyBound {
    /// What a disk that turns takes when it is busy; more than that a guest's users feel.
    fn default() -> LatencyBound {
        LatencyBound(Some(Duration::from_millis(100)))
    }
}

impl fmt::Display for LatencyBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bound) => humantime::format_duration(bound).fmt(f),
            None => f.pad("off"),
        }
    }
}

impl FromStr for LatencyBound {
    type Err = LatencyError;

    fn from_str(text: &str) -> Result<LatencyBound, LatencyError> {
        let trimmed = text.trim();
        let said = || text.chars().take(40).collect();
        if trimmed.eq_ignore_ascii_case("off") {
            return Ok(LatencyBound(None));
        }
        let bound = humantime::parse_duration(trimmed)
            .map_err(|_| LatencyError::NotATime { text: said() })?;
        if !(LEAST..=MOST).contains(&bound) {
            return Err(LatencyError::OutOfBounds { text: said() });
        }
        Ok(LatencyBound(Some(bound)))
    }
}

impl Serialize for LatencyBound {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LatencyBound {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for text in ["100ms", "1ms", "2s", "1m", "off"] {
            let bound: LatencyBound = text.parse().expect("valid");
            assert_eq!(bound.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_bound_is_refused_with_the_reason() {
        for (text, word) in [
            ("100", "no time"),
            ("", "no time"),
            ("fast", "no time"),
            ("0ms", "out of bounds"),
            ("2h", "out of bounds"),
        ] {
            let error = text.parse::<LatencyBound>().expect_err("invalid");
            assert!(error.to_string().contains(word), "{text}: {error}");
        }
    }
}
