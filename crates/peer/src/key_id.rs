//! The fingerprint by which people and configuration name a host's key.
//!
//! `whk1-` (Whimbrel host key, form 1) and 52 letters and digits: the lower-case base32 of RFC 4648,
//! unpadded, of the BLAKE3 hash of the key's SubjectPublicKeyInfo (RFC 5280, section 4.1). It names
//! the public key alone, so a new certificate over the same key is still the same host.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use rustls::pki_types::CertificateDer;
use rustls::server::ParsedCertificate;
use serde::{Deserialize, Serialize};

const PREFIX: &str = "whk1-";
const DIGITS: usize = 52;

/// Fingerprint of a host's public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId([u8; 32]);

/// What is wrong with text that should be a [`KeyId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyIdFault {
    /// It does not begin with `whk1-`.
    #[error("a host key's fingerprint begins with {PREFIX}")]
    Prefix,
    /// The part behind the prefix is too short or too long.
    #[error("{found} characters follow {PREFIX}, where {DIGITS} are due: was it cut when copied?")]
    Length {
        /// Characters found.
        found: usize,
    },
    /// The part behind the prefix is not base32.
    #[error("what follows {PREFIX} has characters other than a-z and 2-7, or was mistyped")]
    Digits,
}

impl KeyId {
    /// The fingerprint of a SubjectPublicKeyInfo in DER.
    pub fn of_public_key(spki: &[u8]) -> KeyId {
        KeyId(*blake3::hash(spki).as_bytes())
    }

    /// The fingerprint of the key in a certificate. The certificate itself is not judged.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<KeyId, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        Ok(KeyId::of_public_key(&parsed.subject_public_key_info()))
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn from_bytes(bytes: [u8; 32]) -> KeyId {
        KeyId(bytes)
    }

    /// The first characters, enough to tell apart the hosts of one site in a log line. Never for
    /// deciding on trust.
    pub fn short(&self) -> String {
        self.to_string()[..PREFIX.len() + 8].to_owned()
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = BASE32_NOPAD.encode(&self.0).to_ascii_lowercase();
        f.pad(&format!("{PREFIX}{digits}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = KeyIdFault;

    fn from_str(text: &str) -> Result<KeyId, KeyIdFault> {
        let text = text.trim().to_ascii_lowercase();
        let digits = text.strip_prefix(PREFIX).ok_or(KeyIdFault::Prefix)?;
        let found = digits.chars().count();
        if found != DIGITS {
            return Err(KeyIdFault::Length { found });
        }
        BASE32_NOPAD
            .decode(digits.to_ascii_uppercase().as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(KeyId)
            .ok_or(KeyIdFault::Digits)
    }
}

impl TryFrom<String> for KeyId {
    type Error = KeyIdFault;

    fn try_from(text: String) -> Result<KeyId, KeyIdFault> {
        text.parse()
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> String {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_fingerprint_is_read_back_as_it_was_shown(bytes: [u8; 32]) {
            let id = KeyId(bytes);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            prop_assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        }

        #[test]
        fn any_text_is_a_fingerprint_or_a_fault(text in "\\PC*") {
            let _ = text.parse::<KeyId>();
        }

        #[test]
        fn one_wrong_digit_never_reads_as_the_same_key(bytes: [u8; 32], at in 0..DIGITS, other in "[a-z2-7]") {
            let shown = KeyId(bytes).to_string();
            let mut mistyped = shown.clone();
            mistyped.replace_range(PREFIX.len() + at..PREFIX.len() + at + 1, &other);
            if mistyped != shown {
                prop_assert_ne!(mistyped.parse(), Ok(KeyId(bytes)));
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!("sha256:abc".parse::<KeyId>(), Err(KeyIdFault::Prefix));
        assert_eq!(
            "whk1-abc".parse::<KeyId>(),
            Err(KeyIdFault::Length { found: 3 })
        );
        let digits = format!("whk1-{}", "1".repeat(52));
        assert_eq!(digits.parse::<KeyId>(), Err(KeyIdFault::Digits));
    }

    #[test]
    fn the_short_form_begins_the_long_one() {
        let id = KeyId([7; 32]);
        assert!(id.to_string().starts_with(&id.short()));
        assert_eq!(id.short().len(), 13);
    }
}
