//! Proving that one holds an invitation, to the host that made it and to nobody else.
//!
//! The secret is the seed of an Ed25519 key. Who made the invitation keeps the public half, the
//! *verifier*, from which nobody gets the secret back: a stolen `invitations.toml` opens nothing. Who
//! joins signs a sentence that names the TLS session (keying material exported from it, RFC 8446 section
//! 7.5), both hosts' keys and the invitation. So the proof is worth nothing in any other session: not to
//! whoever overheard it, and not to a third host that it was addressed to by mistake. The secret itself
//! never travels.

use std::fmt;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use rustls::SignatureScheme;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::SigningKey;
use serde::{Deserialize, Serialize};

use super::token::{InvitationId, Secret};
use crate::key_id::KeyId;
use crate::tls;

/// Keying material of the TLS session that the proof is bound to.
pub(crate) type Exported = [u8; 32];

/// The label under which it is exported.
pub(crate) const EXPORT_LABEL: &[u8] = b"EXPORTER-whimbrel-join-1";

const SEED_CONTEXT: &str = "whimbrel 2026-11 host invitation, seed of its Ed25519 key";
const SENTENCE: &[u8] = b"whimbrel: the holder of this invitation joins, form 1\0";

/// DER of an Ed25519 private key up to its seed (RFC 8410, section 7).
const PKCS8_HEAD: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// What the inviting host keeps of a secret.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Verifier([u8; 32]);

/// What the joining host says.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Proof([u8; 64]);

/// Text that should be a verifier's or a proof's digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the hexadecimal digits that are due")]
pub struct NotHex;

/// What a proof is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) exported: Exported,
    pub(crate) inviting: KeyId,
    pub(crate) joining: KeyId,
    pub(crate) id: InvitationId,
}

impl Claim {
    fn sentence(&self) -> Vec<u8> {
        let mut sentence = SENTENCE.to_vec();
        sentence.extend(self.exported);
        sentence.extend(self.inviting.as_bytes());
        sentence.extend(self.joining.as_bytes());
        sentence.extend(self.id.0);
        sentence
    }
}

fn signing_key(secret: &Secret) -> Arc<dyn SigningKey> {
    let seed = blake3::derive_key(SEED_CONTEXT, &secret.0);
    let der = [&PKCS8_HEAD[..], &seed].concat();
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der));
    let loaded = tls::provider().key_provider.load_private_key(der);
    loaded.expect("any 32 bytes behind this head are an Ed25519 key")
}

impl Verifier {
    pub(crate) fn of(secret: &Secret) -> Verifier {
        let key = signing_key(secret);
        let key = key.public_key();
        let key = key.expect("the provider tells the public half of an Ed25519 key");
        // RFC 8410, section 4: the key is the last 32 bytes.
        let (_, raw) = key
            .split_last_chunk()
            .expect("the DER of an Ed25519 key has 44 bytes");
        Verifier(*raw)
    }

    pub(crate) fn accepts(&self, proof: &Proof, claim: &Claim) -> bool {
        let known = tls::provider().signature_verification_algorithms.mapping;
        let ed25519 = known.iter().find(|(s, _)| *s == SignatureScheme::ED25519);
        let (_, algorithms) = ed25519.expect("the provider verifies Ed25519");
        let sentence = claim.sentence();
        algorithms.iter().any(|algorithm| {
            let verified = algorithm.verify_signature(&self.0, &sentence, &proof.0);
            verified.is_ok()
        })
    }
}

impl Proof {
    pub(crate) fn new(secret: &Secret, claim: &Claim) -> Result<Proof, rustls::Error> {
        let signer = signing_key(secret).choose_scheme(&[SignatureScheme::ED25519]);
        let signer = signer.expect("an Ed25519 key signs by Ed25519");
        let signature = signer.sign(&claim.sentence())?;
        let signature = signature.try_into();
        Ok(Proof(signature.expect("an Ed25519 signature has 64 bytes")))
    }
}

fn unhex<const N: usize>(text: &str) -> Result<[u8; N], NotHex> {
    let bytes = HEXLOWER.decode(text.as_bytes()).map_err(|_| NotHex)?;
    bytes.try_into().map_err(|_| NotHex)
}

impl TryFrom<String> for Verifier {
    type Error = NotHex;

    fn try_from(text: String) -> Result<Verifier, NotHex> {
        unhex(&text).map(Verifier)
    }
}

impl From<Verifier> for String {
    fn from(verifier: Verifier) -> String {
        HEXLOWER.encode(&verifier.0)
    }
}

impl TryFrom<String> for Proof {
    type Error = NotHex;

    fn try_from(text: String) -> Result<Proof, NotHex> {
        unhex(&text).map(Proof)
    }
}

impl From<Proof> for String {
    fn from(proof: Proof) -> String {
        HEXLOWER.encode(&proof.0)
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verifier({})", HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proof({})", HEXLOWER.encode(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claim() -> Claim {
        Claim {
            exported: [1; 32],
            inviting: KeyId::from_bytes([2; 32]),
            joining: KeyId::from_bytes([3; 32]),
            id: InvitationId([4; 8]),
        }
    }

    #[test]
    fn a_proof_is_good_for_its_own_session_hosts_and_invitation_only() {
        let secret = Secret([5; 16]);
        let verifier = Verifier::of(&secret);
        let proof = Proof::new(&secret, &claim()).unwrap();
        assert!(verifier.accepts(&proof, &claim()));
        let others = [
            Claim {
                exported: [9; 32],
                ..claim()
            },
            Claim {
                inviting: KeyId::from_bytes([9; 32]),
                ..claim()
            },
            Claim {
                joining: KeyId::from_bytes([9; 32]),
                ..claim()
            },
            Claim {
                id: InvitationId([9; 8]),
                ..claim()
            },
        ];
        for other in others {
            assert!(!verifier.accepts(&proof, &other), "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn another_secret_proves_nothing(one: [u8; 16], other: [u8; 16]) {
            prop_assume!(one != other);
            let (one, other) = (Secret(one), Secret(other));
            let proof = Proof::new(&other, &claim()).unwrap();
            prop_assert!(!Verifier::of(&one).accepts(&proof, &claim()));
            prop_assert!(Verifier::of(&other).accepts(&proof, &claim()));
        }

        #[test]
        fn any_bytes_are_judged(verifier: [u8; 32], half: [u8; 32], other: [u8; 32]) {
            let mut proof = [0; 64];
            proof[..32].copy_from_slice(&half);
            proof[32..].copy_from_slice(&other);
            prop_assert!(!Verifier(verifier).accepts(&Proof(proof), &claim()));
        }
    }
}
