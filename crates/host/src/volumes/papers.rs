//! The certificates by which a served volume and its clients know each other.
//!
//! A folder as QEMU, nbdkit and libnbd have it: `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, and for clients
//! `client-cert.pem`, `client-key.pem`. One that is there is used as it is. One that is not, or is empty, is made:
//! an authority whose key is forgotten at once, a server and a client of it, so that nobody else is ever let in by
//! it. The host's own key is not used: peers know it by itself, and what it signs must not depend on names.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::api::{ApiError, ErrorCode};

const AUTHORITY: &str = "ca-cert.pem";
const SERVER: [&str; 2] = ["server-cert.pem", "server-key.pem"];
const CLIENT: [&str; 2] = ["client-cert.pem", "client-key.pem"];

fn bad(path: &Path, what: impl std::fmt::Display) -> ApiError {
    ApiError::new(
        ErrorCode::Invalid,
        format!("the certificates cannot be used: {what}"),
    )
    .at(Some(path.display().to_string()))
    .machine_state("nothing is served, the volume is as it was")
    .next_step(
        "name a folder with ca-cert.pem, server-cert.pem and server-key.pem, or one to be made",
    )
}

/// TLS for a server that lets in only clients with a certificate of the folder's authority. `names` are those of a
/// server certificate that has to be made.
pub fn server(folder: &Path, names: &[String]) -> Result<Arc<ServerConfig>, ApiError> {
    let is_empty = match fs::read_dir(folder) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => true,
        Err(e) => return Err(bad(folder, e)),
    };
    if is_empty {
        make(folder, names)?;
    }
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).map_err(|e| bad(&path, e))
    };
    let certificates = |name: &str| {
        let path = folder.join(name);
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(name)?)
            .map(|der| der.map(CertificateDer::into_owned))
            .collect();
        found.map_err(|e| bad(&path, e))
    };
    let mut roots = RootCertStore::empty();
    for root in certificates(AUTHORITY)? {
        roots
            .add(root)
            .map_err(|e| bad(&folder.join(AUTHORITY), e))?;
    }
    let key = PrivateKeyDer::from_pem_slice(&read(SERVER[1])?)
        .map_err(|e| bad(&folder.join(SERVER[1]), e))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| bad(folder, e))?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| bad(folder, e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(SERVER[0])?, key)
        .map_err(|e| bad(folder, e))?;
    Ok(Arc::new(config))
}

fn make(folder: &Path, names: &[String]) -> Result<(), ApiError> {
    let failed = |e: rcgen::Error| bad(folder, e);
    let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "whimbrel volumes");
    let key = KeyPair::generate().map_err(failed)?;
    let authority = params.self_signed(&key).map_err(failed)?.pem();
    let issuer = Issuer::new(params, key);
    let issue = |names: Vec<String>, called: &str, purpose| {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, called);
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        Ok::<_, rcgen::Error>([certificate.pem(), key.serialize_pem()])
    };
    let server = issue(
        names.to_vec(),
        "server",
        ExtendedKeyUsagePurpose::ServerAuth,
    );
    let client = issue(Vec::new(), "client", ExtendedKeyUsagePurpose::ClientAuth);
    let [server, client] = [server.map_err(failed)?, client.map_err(failed)?];
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(folder);
    made.map_err(|e| bad(folder, e))?;
    let papers = [(AUTHORITY, authority)]
        .into_iter()
        .chain(SERVER.into_iter().zip(server))
        .chain(CLIENT.into_iter().zip(client));
    for (name, pem) in papers {
        let path = folder.join(name);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(pem.as_bytes()))
            .map_err(|e| bad(&path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_made_once_and_used_again() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let pki = folder.path().join("a/pki");
        let names = ["localhost".to_string(), "127.0.0.1".to_string()];
        server(&pki, &names).expect("made");
        let before = fs::read(pki.join(SERVER[0])).expect("a certificate");
        server(&pki, &names).expect("used");
        assert_eq!(fs::read(pki.join(SERVER[0])).expect("there"), before);
        for name in [AUTHORITY, CLIENT[0], CLIENT[1]] {
            assert!(pki.join(name).is_file(), "{name}");
        }
        fs::remove_file(pki.join(SERVER[1])).expect("removed");
        let error = server(&pki, &names).expect_err("no key");
        assert!(error.to_string().contains("certificates"), "{error}");
    }
}
