//! The text that one operator gives the other: all that a host must know to join this one.
//!
//! `whi1-` (Whimbrel host invitation, form 1) and lower-case unpadded base32 (RFC 4648) of
//!
//! ```text
//! 32  the inviting host's key, as its fingerprint
//!  8  the invitation's number
//! 16  the secret
//!  1  length of the name that follows: what the inviting host calls itself
//!  1  how many addresses follow; each is
//!       1  4: 4 bytes of IPv4, 2 of port · 6: 16 bytes of IPv6, 2 of port · 0: 2 bytes of length, text
//!  4  the first bytes of BLAKE3 over everything before, so that a slip in copying is told from a lie
//! ```
//!
//! Numbers are big-endian. The secret is never shown by `Debug`, and never kept by the host that made it.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Serialize};

use crate::error::PeerError;
use crate::key_id::KeyId;
use crate::trust::{PeerAddress, PeerName};

const PREFIX: &str = "whi1-";

/// The most addresses a token has.
pub const MAX_TOKEN_ADDRESSES: usize = 8;

/// The longest text that is looked at: the largest token has under 4000 characters.
const LONGEST: usize = 8 << 10;

const SUM: usize = 4;

/// Which invitation: a random number, said in the clear of TLS before anything is proved.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InvitationId(pub [u8; 8]);

/// Text that is no [`InvitationId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an invitation's number is 16 of 0-9 and a-f")]
pub struct NotAnInvitationId;

impl fmt::Display for InvitationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for InvitationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for InvitationId {
    type Err = NotAnInvitationId;

    fn from_str(text: &str) -> Result<InvitationId, NotAnInvitationId> {
        let bytes = data_encoding::HEXLOWER.decode(text.as_bytes());
        let bytes = bytes.ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(InvitationId).ok_or(NotAnInvitationId)
    }
}

impl TryFrom<String> for InvitationId {
    type Error = NotAnInvitationId;

    fn try_from(text: String) -> Result<InvitationId, NotAnInvitationId> {
        text.parse()
    }
}

impl From<InvitationId> for String {
    fn from(id: InvitationId) -> String {
        id.to_string()
    }
}

/// What only the holder of the token knows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(crate) [u8; 16]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// An invitation, as it is handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token {
    /// The inviting host.
    pub key: KeyId,
    /// Which of its invitations.
    pub id: InvitationId,
    /// What is to be proved.
    pub secret: Secret,
    /// What the inviting host calls itself.
    pub name: PeerName,
    /// Where it listens, best first; [`MAX_TOKEN_ADDRESSES`] at most.
    pub addresses: Vec<PeerAddress>,
}

/// What is wrong with text that should be a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenFault {
    /// It does not begin with `whi1-`.
    #[error("an invitation begins with {PREFIX}")]
    Prefix,
    /// It is a host key's fingerprint.
    #[error(
        "this is a host's key, not an invitation: `whimbrel host trust` takes keys, `whimbrel host invite` prints invitations"
    )]
    Key,
    /// Longer than any token.
    #[error("it is longer than any invitation")]
    TooLong,
    /// What follows the prefix is not base32.
    #[error(
        "what follows {PREFIX} is not what an invitation is written in: was it cut or mistyped?"
    )]
    Digits,
    /// The sum is not that of the rest.
    #[error("its checksum is wrong: was it cut or mistyped when copied?")]
    Sum,
    /// Whole, and yet not understood.
    #[error("it is whole, but its content is not understood: was it made by a newer version?")]
    Content,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(self.key.as_bytes());
        bytes.extend(self.id.0);
        bytes.extend(self.secret.0);
        // A name has 63 bytes at most, an address 259.
        bytes.push(self.name.as_str().len() as u8);
        bytes.extend(self.name.as_str().as_bytes());
        let addresses = &self.addresses[..self.addresses.len().min(MAX_TOKEN_ADDRESSES)];
        bytes.push(addresses.len() as u8);
        for address in addresses {
            put_address(&mut bytes, address);
        }
        let sum = sum_of(&bytes);
        bytes.extend(sum);
        let digits = BASE32_NOPAD.encode(&bytes).to_ascii_lowercase();
        write!(f, "{PREFIX}{digits}")
    }
}

impl FromStr for Token {
    type Err = TokenFault;

    fn from_str(text: &str) -> Result<Token, TokenFault> {
        if text.len() > LONGEST {
            return Err(TokenFault::TooLong);
        }
        // A long line that was wrapped on its way is still the same token.
        let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let text = text.to_ascii_lowercase();
        if text.starts_with("whk1-") {
            return Err(TokenFault::Key);
        }
        let digits = text.strip_prefix(PREFIX).ok_or(TokenFault::Prefix)?;
        let bytes = BASE32_NOPAD
            .decode(digits.to_ascii_uppercase().as_bytes())
            .map_err(|_| TokenFault::Digits)?;
        let (content, sum) = bytes.split_last_chunk::<SUM>().ok_or(TokenFault::Sum)?;
        if *sum != sum_of(content) {
            return Err(TokenFault::Sum);
        }
        read(content).ok_or(TokenFault::Content)
    }
}

impl TryFrom<String> for Token {
    type Error = TokenFault;

    fn try_from(text: String) -> Result<Token, TokenFault> {
        text.parse()
    }
}

impl From<Token> for String {
    fn from(token: Token) -> String {
        token.to_string()
    }
}

fn sum_of(content: &[u8]) -> [u8; SUM] {
    let hash = blake3::hash(content);
    let (sum, _) = hash
        .as_bytes()
        .split_first_chunk()
        .expect("a hash of 32 bytes has 4");
    *sum
}

fn put_address(bytes: &mut Vec<u8>, address: &PeerAddress) {
    match address.as_str().parse::<SocketAddr>() {
        // Only what is read back as it was written.
        Ok(addr) if addr.to_string() == address.as_str() => {
            match addr {
                SocketAddr::V4(v4) => {
                    bytes.push(4);
                    bytes.extend(v4.ip().octets());
                }
                SocketAddr::V6(v6) => {
                    bytes.push(6);
                    bytes.extend(v6.ip().octets());
                }
            }
            bytes.extend(addr.port().to_be_bytes());
        }
        _ => {
            bytes.push(0);
            bytes.extend((address.as_str().len() as u16).to_be_bytes());
            bytes.extend(address.as_str().as_bytes());
        }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*taken)
}

fn take_text(bytes: &mut &[u8], len: usize) -> Option<String> {
    let (text, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).ok()
}

fn take_address(bytes: &mut &[u8]) -> Option<PeerAddress> {
    let text = match take::<1>(bytes)? {
        [0] => {
            let len = u16::from_be_bytes(take(bytes)?);
            take_text(bytes, usize::from(len))?
        }
        [4] => {
            let ip = Ipv4Addr::from(take::<4>(bytes)?);
            SocketAddr::from((ip, u16::from_be_bytes(take(bytes)?))).to_string()
        }
        [6] => {
            let ip = Ipv6Addr::from(take::<16>(bytes)?);
            SocketAddr::from((ip, u16::from_be_bytes(take(bytes)?))).to_string()
        }
        _ => return None,
    };
    text.parse().ok()
}

fn read(mut bytes: &[u8]) -> Option<Token> {
    let bytes = &mut bytes;
    let key = KeyId::from_bytes(take(bytes)?);
    let id = InvitationId(take(bytes)?);
    let secret = Secret(take(bytes)?);
    let [len] = take::<1>(bytes)?;
    let name = take_text(bytes, usize::from(len))?.parse().ok()?;
    let [count] = take::<1>(bytes)?;
    if usize::from(count) > MAX_TOKEN_ADDRESSES {
        return None;
    }
    let addresses: Option<Vec<PeerAddress>> = (0..count).map(|_| take_address(bytes)).collect();
    let addresses = addresses?;
    bytes.is_empty().then_some(Token {
        key,
        id,
        secret,
        name,
        addresses,
    })
}

impl From<TokenFault> for PeerError {
    fn from(fault: TokenFault) -> PeerError {
        PeerError::Token { fault }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(key: [u8; 32], name: &str, addresses: &[&str]) -> Token {
        Token {
            key: KeyId::from_bytes(key),
            id: InvitationId([7; 8]),
            secret: Secret([9; 16]),
            name: name.parse().unwrap(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        }
    }

    fn address() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<([u8; 4], u16)>()
                .prop_map(|(ip, port)| SocketAddr::from((ip, port.max(1))).to_string()),
            any::<([u8; 16], u16)>()
                .prop_map(|(ip, port)| SocketAddr::from((ip, port.max(1))).to_string()),
            ("[a-z0-9][a-z0-9.-]{0,252}", 1..=65535_u16).prop_map(|(h, p)| format!("{h}:{p}")),
            // Not as they would be written back: leading zeroes in ports, unshortened IPv6.
            Just("192.0.2.1:07420".to_owned()),
            Just("[2001:0db8:0:0:0:0:0:1]:1".to_owned()),
        ]
    }

    proptest! {
        #[test]
        fn a_token_is_read_back_as_it_was_shown(
            key: [u8; 32], id: [u8; 8], secret: [u8; 16],
            name in "[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?",
            addresses in prop::collection::vec(address(), 0..=MAX_TOKEN_ADDRESSES),
        ) {
            let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
            let mut said = token(key, &name, &addresses);
            said.id = InvitationId(id);
            said.secret = Secret(secret);
            let shown = said.to_string();
            prop_assert!(shown.len() < LONGEST);
            prop_assert_eq!(shown.parse(), Ok(said.clone()));
            prop_assert_eq!(shown.to_uppercase().parse(), Ok(said.clone()));
            let wrapped: Vec<&str> = shown.as_bytes().chunks(50)
                .map(|line| std::str::from_utf8(line).unwrap()).collect();
            prop_assert_eq!(wrapped.join("\n  ").parse(), Ok(said));
        }

        #[test]
        fn any_text_is_a_token_or_a_fault(text in "\\PC*", digits in "[a-z2-7]{0,300}") {
            let _ = text.parse::<Token>();
            let _ = format!("{PREFIX}{digits}").parse::<Token>();
        }

        /// As above, behind the checksum, where arbitrary text would never come.
        #[test]
        fn any_content_is_a_token_or_a_fault(mut content: Vec<u8>, cut in 0..400_usize, name_len in 0..80_u8) {
            let _ = read(&content);
            let mut whole = token([1; 32], "oslo", &["192.0.2.1:7420", "[::1]:1", "h:2"]).content();
            whole[56] = name_len;
            whole.truncate(cut);
            whole.append(&mut content);
            let _ = read(&whole);
        }

        #[test]
        fn one_wrong_character_is_noticed(key: [u8; 32], at: prop::sample::Index, other in "[a-z2-7]") {
            let shown = token(key, "oslo", &["192.0.2.1:7420"]).to_string();
            let at = PREFIX.len() + at.index(shown.len() - PREFIX.len());
            let mut mistyped = shown.clone();
            mistyped.replace_range(at..=at, &other);
            if mistyped != shown {
                let fault = mistyped.parse::<Token>().unwrap_err();
                prop_assert!(matches!(fault, TokenFault::Sum | TokenFault::Digits), "{fault}");
            }
        }

        #[test]
        fn a_token_that_was_cut_is_noticed(at: prop::sample::Index) {
            let shown = token([3; 32], "oslo", &["192.0.2.1:7420"]).to_string();
            let cut = &shown[..at.index(shown.len())];
            prop_assert!(cut.parse::<Token>().is_err());
        }
    }

    impl Token {
        fn content(&self) -> Vec<u8> {
            let shown = self.to_string().to_ascii_uppercase();
            let mut bytes = BASE32_NOPAD
                .decode(&shown.as_bytes()[PREFIX.len()..])
                .unwrap();
            bytes.truncate(bytes.len() - SUM);
            bytes
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let key = KeyId::from_bytes([1; 32]).to_string();
        assert_eq!(key.parse::<Token>(), Err(TokenFault::Key));
        assert_eq!("hello".parse::<Token>(), Err(TokenFault::Prefix));
        assert_eq!("whi1-?".parse::<Token>(), Err(TokenFault::Digits));
        assert_eq!("whi1-".parse::<Token>(), Err(TokenFault::Sum));
        let long = format!("whi1-{}", "a".repeat(LONGEST));
        assert_eq!(long.parse::<Token>(), Err(TokenFault::TooLong));
        let mut longer = token([1; 32], "oslo", &[]).content();
        longer.push(0);
        longer.extend(sum_of(&longer));
        let text = format!("{PREFIX}{}", BASE32_NOPAD.encode(&longer));
        assert_eq!(text.parse::<Token>(), Err(TokenFault::Content));
    }

    #[test]
    fn a_usual_token_fits_on_two_lines_and_debug_does_not_tell_its_secret() {
        let token = token([1; 32], "oslo", &["192.0.2.1:7420"]);
        assert!(token.to_string().len() < 130, "{token}");
        let told = format!("{token:?}");
        assert!(told.contains("Secret(..)"), "{told}");
    }
}
