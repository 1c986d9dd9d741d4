//! What a trusted peer may do with machines, as its entry in `peers.toml` says.
//!
//! Two coarse rights, each from this host's point of view: `send`, the peer may send machines to this
//! host; `receive`, it may be sent machines of this host. An entry without a word on it has both, as all
//! entries had before there were rights. What a right means to a move under way is for the daemon to say.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Right {
    /// The peer may send machines to this host.
    Send,
    /// The peer may receive machines from this host.
    Receive,
}

/// A peer's rights. In files and messages a list of the words `send` and `receive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Right>", into = "Vec<Right>")]
pub struct Rights {
    /// See [`Right::Send`].
    pub send: bool,
    /// See [`Right::Receive`].
    pub receive: bool,
}

impl Rights {
    /// Both.
    pub const ALL: Rights = Rights {
        send: true,
        receive: true,
    };

    pub(crate) fn are_all(&self) -> bool {
        *self == Rights::ALL
    }
}

impl Default for Rights {
    fn default() -> Rights {
        Rights::ALL
    }
}

impl From<Vec<Right>> for Rights {
    fn from(list: Vec<Right>) -> Rights {
        Rights {
            send: list.contains(&Right::Send),
            receive: list.contains(&Right::Receive),
        }
    }
}

impl From<Rights> for Vec<Right> {
    fn from(rights: Rights) -> Vec<Right> {
        let both = [(rights.send, Right::Send), (rights.receive, Right::Receive)];
        both.into_iter()
            .filter_map(|(has, right)| has.then_some(right))
            .collect()
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match (self.send, self.receive) {
            (true, true) => "send, receive",
            (true, false) => "send",
            (false, true) => "receive",
            (false, false) => "nothing",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_read_back_as_they_were_written() {
        for send in [true, false] {
            for receive in [true, false] {
                let rights = Rights { send, receive };
                let list = Vec::from(rights);
                assert_eq!(Rights::from(list), rights);
            }
        }
    }
}
