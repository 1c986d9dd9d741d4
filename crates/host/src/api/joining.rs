//! What the API says of how hosts come to trust each other, and of what they may do then.

use serde::{Deserialize, Serialize};
use whimbrel_peer::invitation::{InvitationId, InvitationState, Token};
use whimbrel_peer::key_id::KeyId;
use whimbrel_peer::rights::Rights;
use whimbrel_peer::trust::{PeerAddress, PeerName};

use super::types::PeerView;
use crate::state::Timestamp;

/// Seconds that an invitation is good for unless somebody says otherwise.
pub const INVITED_FOR: u64 = 15 * 60;

fn invited_for() -> u64 {
    INVITED_FOR
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    #[serde(default = "invited_for")]
    pub expires_s: u64,
    /// What the host that joins will be called here; what it calls itself if left out.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub called: Option<PeerName>,
    /// Where the host that joins reaches this one; found out if left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<PeerAddress>,
    /// What the host that joins may do here.
    #[serde(default)]
    pub may: Rights,
}

impl Default for InviteRequest {
    fn default() -> InviteRequest {
        InviteRequest {
            expires_s: INVITED_FOR,
            called: None,
            addresses: Vec::new(),
            may: Rights::ALL,
        }
    }
}

/// An invitation, without what it takes to use it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InvitationView {
    pub id: InvitationId,
    pub state: InvitationState,
    pub expires: Timestamp,
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub called: Option<PeerName>,
    pub may: Rights,
    /// Wrong secrets that were tried.
    pub wrong: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<UsedBy>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UsedBy {
    /// What it was called here then.
    pub name: PeerName,
    pub key: KeyId,
    pub at: Timestamp,
}

/// A new invitation. The token is told this once and is not kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InviteView {
    pub token: Token,
    /// What is in the token beside its secret.
    pub name: PeerName,
    pub key: KeyId,
    pub addresses: Vec<PeerAddress>,
    #[serde(flatten)]
    pub invitation: InvitationView,
    /// Whether a daemon runs: without one nobody can join.
    pub daemon: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinHost {
    pub token: Token,
    /// What the inviting host will be called here; what it calls itself if left out.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub called: Option<PeerName>,
    /// What this host wants to be called there; what it calls itself if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<PeerName>,
    /// Where the inviting host reaches this one; found out if left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<PeerAddress>,
    /// What the inviting host may do here.
    #[serde(default)]
    pub may: Rights,
}

/// Two hosts trust each other now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JoinView {
    /// The inviting host.
    pub peer: PeerView,
    /// What this host is called there.
    pub name_there: PeerName,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenamePeer {
    pub name: PeerName,
}

/// Rights to be changed; what is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowPeer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive: Option<bool>,
}

impl AllowPeer {
    /// The rights after the change.
    pub fn over(self, rights: Rights) -> Rights {
        Rights {
            send: self.send.unwrap_or(rights.send),
            receive: self.receive.unwrap_or(rights.receive),
        }
    }
}
