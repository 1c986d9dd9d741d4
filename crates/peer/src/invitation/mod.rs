//! `invitations.toml`: what this host has invited others with, and what became of it.
//!
//! An invitation lets *one* host that this one has never seen become a trusted peer: whoever proves to
//! hold its secret (`proof.rs`) before it expires. The secret is in the [`Token`] alone; the
//! file holds only what a proof is checked against. It is read anew each time, under a lock, so a
//! command may invite while the daemon runs and an invitation outlives the daemon that made it.
//!
//! An invitation that is no good any more is kept for a day, so that whoever comes late with its token is
//! told why. That is told to nobody who does not prove to hold the secret.
//!
//! | bound | what happens at it |
//! |---|---|
//! | [`MAX_OPEN`] good at once | no more are made until one is used, cancelled or expired |
//! | [`MAX_WRONG`] wrong proofs of one | it is void, also to its true holder |
//! | [`MAX_KEPT`] records in all | the oldest that are no good are forgotten |

mod proof;
mod token;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

pub(crate) use proof::{Claim, EXPORT_LABEL, Proof};
pub use proof::{NotHex, Verifier};
pub use token::{InvitationId, MAX_TOKEN_ADDRESSES, NotAnInvitationId, Secret, Token, TokenFault};

use crate::error::PeerError;
use crate::join::JoinRefusal;
use crate::key_id::KeyId;
use crate::rights::Rights;
use crate::trust::{PeerAddress, PeerName};
use crate::{owned_file, tls};

/// The file's usual name in the state folder.
pub const INVITATIONS_FILE: &str = "invitations.toml";

/// The most invitations that are good at once.
pub const MAX_OPEN: usize = 16;

/// The most records, those that are no good any more included.
pub const MAX_KEPT: usize = 64;

/// Wrong proofs after which an invitation is void.
pub const MAX_WRONG: u32 = 5;

/// The shortest and the longest time that an invitation is good for.
pub const LIFETIMES: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(24 * 60 * 60));

/// How long it is known what became of an invitation.
const KEPT_FOR: u64 = 24 * 60 * 60;

const HEADING: &str =
    "# Invitations of this host. Written by whimbrel; the secrets are not in here.\n\n";

/// Who used an invitation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Used {
    /// The host that joined.
    pub key: KeyId,
    /// What it was called here then.
    pub name: PeerName,
    /// When, in seconds since 1970.
    pub at: u64,
}

/// What is known of an invitation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invitation {
    /// Its number.
    pub id: InvitationId,
    /// What a proof is checked against.
    pub verifier: Verifier,
    /// Until when it is good, in seconds since 1970 by this host's clock.
    pub expires: u64,
    /// What the host that joins will be called here; what it calls itself if there is nothing.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub called: Option<PeerName>,
    /// What the host that joins may do.
    #[serde(default, skip_serializing_if = "Rights::are_all")]
    pub may: Rights,
    /// Wrong proofs so far.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub wrong: u32,
    /// Taken back by the operator.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cancelled: bool,
    /// Who used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<Used>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What an invitation is good for at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InvitationState {
    /// For one host to join.
    Open,
    /// Nothing: a host has joined by it.
    Used,
    /// Nothing: its time is over.
    Expired,
    /// Nothing: it was taken back.
    Cancelled,
    /// Nothing: it was guessed at [`MAX_WRONG`] times.
    Void,
}

impl fmt::Display for InvitationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            InvitationState::Open => "open",
            InvitationState::Used => "used",
            InvitationState::Expired => "expired",
            InvitationState::Cancelled => "cancelled",
            InvitationState::Void => "void",
        })
    }
}

impl Invitation {
    /// What it is good for at `now`, in seconds since 1970.
    pub fn state(&self, now: u64) -> InvitationState {
        if self.used.is_some() {
            InvitationState::Used
        } else if self.cancelled {
            InvitationState::Cancelled
        } else if self.wrong >= MAX_WRONG {
            InvitationState::Void
        } else if now >= self.expires {
            InvitationState::Expired
        } else {
            InvitationState::Open
        }
    }
}

/// What an invitation is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// How long it is good; within [`LIFETIMES`].
    pub lifetime: Duration,
    /// What the host that joins will be called here.
    pub called: Option<PeerName>,
    /// What it may do.
    pub may: Rights,
}

/// This host, as a token tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inviting {
    /// Its key.
    pub key: KeyId,
    /// What it calls itself.
    pub name: PeerName,
    /// Where it listens, best first.
    pub addresses: Vec<PeerAddress>,
}

/// Who comes with what.
pub(crate) struct Joining {
    pub(crate) id: InvitationId,
    pub(crate) key: KeyId,
    /// It trusts this host already, so that no answer of this host was lost on the way to it.
    pub(crate) knows_us: bool,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    #[serde(default)]
    invitation: Vec<Invitation>,
}

/// The invitations of a host. Clones are the same store.
#[derive(Clone, Debug)]
pub struct Invitations {
    path: Arc<Path>,
}

/// Seconds since 1970; 0 before.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

impl Invitations {
    /// The store at `path`. Nothing is read yet.
    pub fn at(path: impl Into<PathBuf>) -> Invitations {
        Invitations {
            path: path.into().into(),
        }
    }

    /// Makes an invitation, and the token for it, which is told this once.
    pub fn make(
        &self,
        now: u64,
        us: Inviting,
        offer: Offer,
    ) -> Result<(Invitation, Token), PeerError> {
        let (least, most) = LIFETIMES;
        if !(least..=most).contains(&offer.lifetime) {
            return Err(PeerError::InvitationLifetime { least, most });
        }
        if us.addresses.is_empty() {
            return Err(PeerError::NoOwnAddress);
        }
        if us.addresses.len() > MAX_TOKEN_ADDRESSES {
            return Err(PeerError::TooManyAddresses {
                name: us.name,
                found: us.addresses.len(),
                most: MAX_TOKEN_ADDRESSES,
            });
        }
        let (id, secret) = (InvitationId(random()?), Secret(random()?));
        let invitation = Invitation {
            id,
            verifier: Verifier::of(&secret),
            expires: now + offer.lifetime.as_secs(),
            called: offer.called,
            may: offer.may,
            wrong: 0,
            cancelled: false,
            used: None,
        };
        self.change(now, |invitations| {
            let open = |i: &&Invitation| i.state(now) == InvitationState::Open;
            if invitations.iter().filter(open).count() >= MAX_OPEN {
                return Err(PeerError::TooManyInvitations { most: MAX_OPEN });
            }
            invitations.push(invitation.clone());
            Ok(())
        })?;
        let token = Token {
            key: us.key,
            id,
            secret,
            name: us.name,
            addresses: us.addresses,
        };
        Ok((invitation, token))
    }

    /// All that are known, oldest first.
    pub fn list(&self) -> Result<Vec<Invitation>, PeerError> {
        read(&self.path)
    }

    /// Takes an invitation back that nobody has used yet.
    pub fn cancel(&self, now: u64, id: InvitationId) -> Result<Invitation, PeerError> {
        self.change(now, |invitations| {
            let found = invitations.iter_mut().find(|i| i.id == id);
            let invitation = found.ok_or(PeerError::InvitationUnknown { id })?;
            if let Some(used) = &invitation.used {
                return Err(PeerError::InvitationUsed {
                    id,
                    name: used.name.clone(),
                });
            }
            invitation.cancelled = true;
            Ok(invitation.clone())
        })
    }

    /// Uses an invitation up, if the proof is good and `name` finds a name for who comes. A refusal is a
    /// result: it was decided, and what it cost is written down.
    ///
    /// The same host may come again with the same token while it is not expired and the host has not
    /// heard the answer: otherwise a connection that broke at the wrong moment would leave one host
    /// trusting the other and a token that is of no use.
    pub(crate) fn redeem(
        &self,
        now: u64,
        who: &Joining,
        accepts: impl FnOnce(&Verifier) -> bool,
        name: impl FnOnce(&Invitation) -> Result<PeerName, JoinRefusal>,
    ) -> Result<Result<(PeerName, Rights), JoinRefusal>, PeerError> {
        self.change(now, |invitations| {
            let found = invitations.iter_mut().find(|i| i.id == who.id);
            Ok(match found {
                Some(invitation) => use_up(invitation, now, who, accepts, name),
                None => Err(JoinRefusal::Unknown),
            })
        })
    }

    /// Changes what the file says; it is written even if `f` ends in a refusal of its own, not if in an
    /// error.
    fn change<T>(
        &self,
        now: u64,
        f: impl FnOnce(&mut Vec<Invitation>) -> Result<T, PeerError>,
    ) -> Result<T, PeerError> {
        let _lock = owned_file::lock(&self.path)?;
        let before = read(&self.path)?;
        let mut after = before.clone();
        let result = f(&mut after)?;
        sweep(&mut after, now);
        if after != before {
            write(&self.path, after)?;
        }
        Ok(result)
    }
}

fn use_up(
    invitation: &mut Invitation,
    now: u64,
    who: &Joining,
    accepts: impl FnOnce(&Verifier) -> bool,
    name: impl FnOnce(&Invitation) -> Result<PeerName, JoinRefusal>,
) -> Result<(PeerName, Rights), JoinRefusal> {
    if invitation.wrong >= MAX_WRONG {
        return Err(JoinRefusal::Void);
    }
    if !accepts(&invitation.verifier) {
        invitation.wrong += 1;
        let left = MAX_WRONG - invitation.wrong;
        return Err(JoinRefusal::Wrong { left });
    }
    match (invitation.state(now), &invitation.used) {
        (InvitationState::Open, _) => {}
        (InvitationState::Used, Some(used))
            if used.key == who.key && !who.knows_us && now < invitation.expires => {}
        (InvitationState::Used, _) => return Err(JoinRefusal::Used),
        (InvitationState::Cancelled, _) => return Err(JoinRefusal::Cancelled),
        (InvitationState::Void, _) => return Err(JoinRefusal::Void),
        (InvitationState::Expired, _) => {
            let seconds = now - invitation.expires;
            return Err(JoinRefusal::Expired { seconds });
        }
    }
    let name = name(invitation)?;
    invitation.used = Some(Used {
        key: who.key,
        name: name.clone(),
        at: now,
    });
    Ok((name, invitation.may))
}

fn sweep(invitations: &mut Vec<Invitation>, now: u64) {
    invitations.retain(|i| now < i.expires.saturating_add(KEPT_FOR));
    while invitations.len() > MAX_KEPT {
        let no_good = |i: &Invitation| i.state(now) != InvitationState::Open;
        // There is one: fewer are open than are kept.
        let Some(oldest) = invitations.iter().position(no_good) else {
            return;
        };
        invitations.remove(oldest);
    }
}

fn random<const N: usize>() -> Result<[u8; N], PeerError> {
    let mut bytes = [0; N];
    tls::provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| PeerError::NoRandomness)?;
    Ok(bytes)
}

fn read(path: &Path) -> Result<Vec<Invitation>, PeerError> {
    let text = owned_file::read(path)?.unwrap_or_default();
    let content: Content =
        toml::from_str(&text).map_err(|source| PeerError::InvitationsSyntax {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
    Ok(content.invitation)
}

fn write(path: &Path, invitation: Vec<Invitation>) -> Result<(), PeerError> {
    let text = toml::to_string(&Content { invitation })
        .expect("numbers, digits and names have a form in TOML");
    owned_file::write(path, &(HEADING.to_owned() + &text), 0o600)
}

#[cfg(test)]
mod tests;
