//! A host's own key: what it is, and where it lies.
//!
//! One PEM file holds the Ed25519 private key (PKCS #8, RFC 5958) and a self-signed certificate over
//! it, readable by its owner alone. The certificate is only the envelope in which TLS carries the
//! key: its names and dates mean nothing to peers, who know the key by its [`KeyId`].

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::durable;
use crate::error::{FileStep, IdentityFault, PeerError};
use crate::key_id::KeyId;
use crate::tls;

/// The file's usual name in the state folder.
pub const IDENTITY_FILE: &str = "host-key.pem";

/// A real file has under 1 KiB; what is longer is something else.
const LONGEST: u64 = 64 << 10;

/// A host's own key, ready for use.
#[derive(Clone, Debug)]
pub struct Identity {
    key_id: KeyId,
    certified: Arc<CertifiedKey>,
}

impl Identity {
    /// Makes a key and stores it at `path`, which must not exist.
    pub fn create(path: &Path) -> Result<Identity, PeerError> {
        let pem = make_pem().map_err(PeerError::IdentityMaking)?;
        let identity = Identity::from_pem(path, pem.as_bytes())?;
        durable::create(path, pem.as_bytes(), 0o600).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => PeerError::IdentityExists {
                path: path.to_owned(),
            },
            _ => file_error(FileStep::Write, path, source),
        })?;
        Ok(identity)
    }

    /// Loads the key stored at `path`; refuses one that others may read.
    pub fn load(path: &Path) -> Result<Identity, PeerError> {
        let file = File::open(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => PeerError::IdentityMissing {
                path: path.to_owned(),
            },
            _ => file_error(FileStep::Read, path, source),
        })?;
        let read_error = |source| file_error(FileStep::Read, path, source);
        let mode = file.metadata().map_err(read_error)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(PeerError::IdentityExposed {
                path: path.to_owned(),
                mode,
            });
        }
        let mut pem = Vec::new();
        file.take(LONGEST)
            .read_to_end(&mut pem)
            .map_err(read_error)?;
        Identity::from_pem(path, &pem)
    }

    /// Loads the key stored at `path`, or makes one where there is none.
    pub fn load_or_create(path: &Path) -> Result<Identity, PeerError> {
        match Identity::load(path) {
            Err(PeerError::IdentityMissing { .. }) => match Identity::create(path) {
                // Another process was quicker.
                Err(PeerError::IdentityExists { .. }) => Identity::load(path),
                made => made,
            },
            loaded => loaded,
        }
    }

    fn from_pem(path: &Path, pem: &[u8]) -> Result<Identity, PeerError> {
        let broken = |fault| PeerError::IdentityBroken {
            path: path.to_owned(),
            fault,
        };
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|_| broken(IdentityFault::NoKey))?;
        let certificate = CertificateDer::from_pem_slice(pem)
            .map_err(|_| broken(IdentityFault::NoCertificate))?;
        let mismatch = |error| broken(IdentityFault::Mismatch(error));
        let key_id = KeyId::of_certificate(&certificate).map_err(mismatch)?;
        let certified =
            CertifiedKey::from_der(vec![certificate], key, &tls::provider()).map_err(mismatch)?;
        Ok(Identity {
            key_id,
            certified: Arc::new(certified),
        })
    }

    /// The fingerprint by which peers trust this host.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }
}

fn make_pem() -> Result<String, rcgen::Error> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "whimbrel host");
    let certificate = params.self_signed(&key)?;
    Ok(key.serialize_pem() + &certificate.pem())
}

fn file_error(step: FileStep, path: &Path, source: io::Error) -> PeerError {
    PeerError::File {
        step,
        path: PathBuf::from(path),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_key_is_loaded_as_it_was_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(IDENTITY_FILE);
        let made = Identity::create(&path).unwrap();
        assert_eq!(Identity::load(&path).unwrap().key_id(), made.key_id());
        assert_eq!(
            Identity::load_or_create(&path).unwrap().key_id(),
            made.key_id()
        );
        let mode = std::fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_key_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(IDENTITY_FILE);
        let made = Identity::create(&path).unwrap();
        let error = Identity::create(&path).unwrap_err();
        assert!(matches!(error, PeerError::IdentityExists { .. }), "{error}");
        assert_eq!(Identity::load(&path).unwrap().key_id(), made.key_id());
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(IDENTITY_FILE);
        Identity::create(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o777] {
            chmod(&path, mode);
            let error = Identity::load(&path).unwrap_err();
            assert!(matches!(error, PeerError::IdentityExposed { mode: m, .. } if m == mode));
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        chmod(&path, 0o400);
        Identity::load(&path).unwrap();
    }

    #[test]
    fn what_is_wrong_with_the_file_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(IDENTITY_FILE);
        let error = Identity::load(&path).unwrap_err();
        assert!(
            matches!(error, PeerError::IdentityMissing { .. }),
            "{error}"
        );

        let (one, other) = (make_pem().unwrap(), make_pem().unwrap());
        let split = one.find("-----BEGIN CERTIFICATE").unwrap();
        let other_split = other.find("-----BEGIN CERTIFICATE").unwrap();
        let cases = [
            ("nonsense".to_owned(), "no readable private key"),
            (one[..split].to_owned(), "no readable certificate"),
            (
                one[..split].to_owned() + &other[other_split..],
                "do not belong together",
            ),
        ];
        for (content, expected) in cases {
            std::fs::write(&path, content).unwrap();
            chmod(&path, 0o600);
            let error = Identity::load(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
