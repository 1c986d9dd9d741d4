//! The greeting: the first frame in each direction, before a connection is used.
//!
//! The dialling side says [`Hello`]; the other answers [`Answer::Welcome`] or [`Answer::Refused`].
//! Both are JSON in a frame of kind `Hello`: the greeting must be understood by versions that do not
//! exist yet, so fields may be added and unknown ones are ignored, and `versions` is read before
//! anything else. The rest of the protocol is as compact as it likes once the version is agreed.
//!
//! The version spoken is the highest that both ranges hold. A daemon speaks the current version and
//! the one before; where no version is common each side names both ranges.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The most bytes a greeting has; a longer one is refused.
pub const MAX_HELLO: usize = 16 << 10;

/// The most bytes a name or a sentence in a greeting has.
const MAX_TEXT: usize = 512;

/// A range of protocol versions, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// The oldest version spoken.
    pub min: u16,
    /// The newest version spoken.
    pub max: u16,
}

impl VersionRange {
    /// The highest version in both ranges.
    pub fn highest_common(self, other: VersionRange) -> Option<u16> {
        let highest = self.max.min(other.max);
        (highest >= self.min && highest >= other.min).then_some(highest)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "{} only", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// Which migration or session a connection belongs to; [`SessionId::NONE`] for none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionId(pub u128);

impl SessionId {
    /// The connection belongs to no session.
    pub const NONE: SessionId = SessionId(0);
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

// As text: a JSON number of 128 bits is cut by many readers.
impl From<SessionId> for String {
    fn from(id: SessionId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for SessionId {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<SessionId, Self::Error> {
        u128::from_str_radix(&text, 16).map(SessionId)
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Messages and demands: never behind a push.
    Control,
    /// Push, on the connection of this number.
    Push(u16),
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Class::Control => f.write_str("control"),
            Class::Push(n) => write!(f, "push {n}"),
        }
    }
}

/// Who speaks: the same in every greeting of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speaker {
    /// Protocol versions spoken.
    pub versions: VersionRange,
    /// Software and its version, for people.
    pub software: String,
    /// Features offered, a bit each; those used are the bits of both sides.
    pub features: u64,
    /// What the host calls itself, for people. Trust goes by the key, never by this.
    pub host: String,
}

/// What the dialling side says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Who speaks.
    #[serde(flatten)]
    pub speaker: Speaker,
    /// What the connection is for.
    pub class: Class,
    /// Which session it belongs to.
    pub session: SessionId,
}

/// What the other side answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The connection may be used.
    Welcome(Welcome),
    /// It may not, and is closed.
    Refused(Refusal),
}

/// What was agreed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The protocol version to be spoken.
    pub version: u16,
    /// Who answers.
    #[serde(flatten)]
    pub speaker: Speaker,
}

/// Why a known peer's connection is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// No protocol version is common; the range is the refusing side's.
    Versions(VersionRange),
    /// The greeting cannot be understood.
    Greeting(String),
    /// Too many connections wait to be served; later may help.
    Busy,
    /// The daemon does not want this connection, for the reason stated.
    Unwanted(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Versions(range) => write!(f, "it speaks protocol versions {range}"),
            Refusal::Greeting(why) => write!(f, "the greeting cannot be understood: {why}"),
            Refusal::Busy => f.write_str("too many connections wait to be served, try later"),
            Refusal::Unwanted(why) => f.write_str(why),
        }
    }
}

/// What is wrong with a greeting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloFault {
    /// Another frame came where the greeting was due.
    #[error("it is not a greeting")]
    NotAGreeting,
    /// Longer than [`MAX_HELLO`].
    #[error("it has {len} bytes, over the bound of {MAX_HELLO}")]
    TooLong {
        /// Bytes found.
        len: usize,
    },
    /// Not the JSON expected.
    #[error("it is malformed in line {line}, column {column}")]
    Malformed {
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
    /// A version range that ends before it begins.
    #[error("its range of versions is empty")]
    EmptyRange,
    /// A text that is too long, or that would disturb a terminal.
    #[error("its {field} is over {MAX_TEXT} bytes or has control characters")]
    Text {
        /// The field.
        field: TextField,
    },
}

/// The texts in a greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextField {
    /// [`Speaker::software`]
    Software,
    /// [`Speaker::host`]
    Host,
    /// The sentence of a [`Refusal`]
    Reason,
}

impl fmt::Display for TextField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TextField::Software => "software version",
            TextField::Host => "host name",
            TextField::Reason => "reason",
        })
    }
}

impl Hello {
    /// Its bytes on the wire.
    pub fn to_bytes(&self) -> Result<Vec<u8>, HelloFault> {
        self.speaker.check()?;
        Ok(to_json(self))
    }

    /// Reads a greeting's range of versions only, which every version must be able to.
    pub fn versions_of(bytes: &[u8]) -> Result<VersionRange, HelloFault> {
        #[derive(Deserialize)]
        struct VersionsOnly {
            versions: VersionRange,
        }
        let range = from_json::<VersionsOnly>(bytes)?.versions;
        range.check()?;
        Ok(range)
    }

    /// Reads a greeting of a version that is spoken here.
    pub fn from_bytes(bytes: &[u8]) -> Result<Hello, HelloFault> {
        let hello: Hello = from_json(bytes)?;
        hello.speaker.check()?;
        Ok(hello)
    }
}

impl Answer {
    /// Its bytes on the wire. A reason that is too long is cut, so that a refusal can always be said.
    pub fn to_bytes(&self) -> Result<Vec<u8>, HelloFault> {
        if let Answer::Welcome(welcome) = self {
            welcome.speaker.check()?;
        }
        let cut = |why: &String| {
            let mut text: String = why.chars().filter(|c| !c.is_control()).collect();
            text.truncate(text.floor_char_boundary(MAX_TEXT));
            text
        };
        Ok(match self {
            Answer::Refused(Refusal::Unwanted(why)) => {
                to_json(&Answer::Refused(Refusal::Unwanted(cut(why))))
            }
            Answer::Refused(Refusal::Greeting(why)) => {
                to_json(&Answer::Refused(Refusal::Greeting(cut(why))))
            }
            other => to_json(other),
        })
    }

    /// Reads an answer.
    pub fn from_bytes(bytes: &[u8]) -> Result<Answer, HelloFault> {
        let answer: Answer = from_json(bytes)?;
        match &answer {
            Answer::Welcome(welcome) => welcome.speaker.check()?,
            Answer::Refused(Refusal::Unwanted(why) | Refusal::Greeting(why)) => {
                check_text(why, TextField::Reason)?;
            }
            Answer::Refused(Refusal::Versions(range)) => range.check()?,
            Answer::Refused(Refusal::Busy) => {}
        }
        Ok(answer)
    }
}

impl VersionRange {
    fn check(self) -> Result<(), HelloFault> {
        if self.min > self.max {
            return Err(HelloFault::EmptyRange);
        }
        Ok(())
    }
}

impl Speaker {
    fn check(&self) -> Result<(), HelloFault> {
        self.versions.check()?;
        check_text(&self.software, TextField::Software)?;
        check_text(&self.host, TextField::Host)
    }
}

fn check_text(text: &str, field: TextField) -> Result<(), HelloFault> {
    if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
        return Err(HelloFault::Text { field });
    }
    Ok(())
}

pub(crate) fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("structs of numbers and strings have a form in JSON")
}

pub(crate) fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, HelloFault> {
    if bytes.len() > MAX_HELLO {
        return Err(HelloFault::TooLong { len: bytes.len() });
    }
    serde_json::from_slice(bytes).map_err(|error| HelloFault::Malformed {
        line: error.line(),
        column: error.column(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(min: u16, max: u16) -> VersionRange {
        VersionRange { min, max }
    }

    fn hello() -> Hello {
        Hello {
            speaker: Speaker {
                versions: range(3, 4),
                software: "whimbrel 0.1.0".into(),
                features: u64::MAX,
                host: "oslo".into(),
            },
            class: Class::Push(3),
            session: SessionId(u128::MAX - 5),
        }
    }

    #[test]
    fn this_version_and_the_one_before_understand_each_other() {
        assert_eq!(range(3, 4).highest_common(range(4, 5)), Some(4));
        assert_eq!(range(3, 4).highest_common(range(2, 3)), Some(3));
        assert_eq!(range(3, 4).highest_common(range(1, 2)), None);
    }

    #[test]
    fn a_greeting_from_the_future_is_understood() {
        let bytes =
            br#"{"versions":{"min":4,"max":9,"draft":true},"software":"whimbrel 9","features":1,
            "host":"oslo","class":"control","session":"0","greeting_card":{"motif":"bird"}}"#;
        let hello = Hello::from_bytes(bytes).unwrap();
        assert_eq!(hello.class, Class::Control);
        assert_eq!(hello.session, SessionId::NONE);
    }

    #[test]
    fn the_versions_of_a_greeting_that_is_otherwise_unknown_are_read() {
        let bytes = br#"{"versions":{"min":8,"max":9},"class":{"satellite":[1,2]}}"#;
        assert_eq!(Hello::versions_of(bytes), Ok(range(8, 9)));
        assert!(matches!(
            Hello::from_bytes(bytes),
            Err(HelloFault::Malformed { .. })
        ));
    }

    #[test]
    fn text_that_would_disturb_a_terminal_is_refused() {
        let mut bad = hello();
        bad.speaker.host = "oslo\u{1b}[2J".into();
        let fault = HelloFault::Text {
            field: TextField::Host,
        };
        assert_eq!(bad.to_bytes(), Err(fault.clone()));
        assert_eq!(Hello::from_bytes(&to_json(&bad)), Err(fault));
    }

    #[test]
    fn a_reason_of_any_length_can_be_said() {
        let why = "née\n".repeat(1000);
        let bytes = Answer::Refused(Refusal::Unwanted(why)).to_bytes().unwrap();
        assert!(Answer::from_bytes(&bytes).is_ok());
    }

    proptest! {
        #[test]
        fn the_version_agreed_is_the_highest_that_both_speak(a: u16, b: u16, c: u16, d: u16) {
            let (ours, theirs) = (range(a.min(b), a.max(b)), range(c.min(d), c.max(d)));
            let common = ours.highest_common(theirs);
            prop_assert_eq!(common, theirs.highest_common(ours));
            let naive = (ours.min..=ours.max).rev().find(|v| (theirs.min..=theirs.max).contains(v));
            prop_assert_eq!(common, naive);
        }

        #[test]
        fn a_greeting_is_read_back_as_it_was_said(session: u128, features: u64, push: Option<u16>) {
            let mut said = hello();
            said.session = SessionId(session);
            said.speaker.features = features;
            said.class = push.map_or(Class::Control, Class::Push);
            let bytes = said.to_bytes().unwrap();
            prop_assert_eq!(Hello::from_bytes(&bytes), Ok(said));
        }

        #[test]
        fn any_bytes_are_a_greeting_or_a_fault(bytes: Vec<u8>) {
            let _ = Hello::from_bytes(&bytes);
            let _ = Answer::from_bytes(&bytes);
        }
    }
}
