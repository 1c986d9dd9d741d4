//! TLS 1.3 in which each side pins the other's key.
//!
//! There is no authority and no name in it: a certificate is judged by the fingerprint of its key
//! alone, and its holder by the signature over the handshake (RFC 8446, section 4.4.3), which is
//! verified for real. Names, dates and the certificate's own signature mean nothing, as with SSH keys:
//! a host whose clock is wrong is still the same host.
//!
//! Traps. In TLS 1.3 the client has finished before the server has judged its key: what the server
//! thinks of it arrives on the first read, as an alert. And a resumed session would not present a key
//! at all, so neither side keeps or offers tickets: a peer that was removed cannot come back.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName,
    PeerIncompatible, ServerConfig, SignatureScheme,
};

use crate::error::PeerError;
use crate::identity::Identity;
use crate::key_id::KeyId;
use crate::trust::{PeerName, TrustStore};

/// The application protocol (RFC 7301): keeps a daemon from talking to another service by mistake.
/// The version of what is spoken is agreed in the greeting.
pub const ALPN: &[u8] = b"whimbrel";

/// The application protocol of a host that comes with an invitation and is not trusted yet.
pub const JOIN_ALPN: &[u8] = b"whimbrel-join";

pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| Arc::new(aws_lc_rs::default_provider()))
        .clone()
}

/// The name that a [`ClientConfig`] wants and nobody sees.
pub(crate) fn unused_server_name() -> ServerName<'static> {
    ServerName::try_from("peer.whimbrel.invalid").expect("it is a well-formed host name")
}

/// Accepts the one key that is expected of a server.
#[derive(Debug)]
pub(crate) struct ExpectedKey {
    expected: KeyId,
    presented: OnceLock<KeyId>,
}

impl ExpectedKey {
    pub(crate) fn new(expected: KeyId) -> Arc<ExpectedKey> {
        Arc::new(ExpectedKey {
            expected,
            presented: OnceLock::new(),
        })
    }
}

impl ServerCertVerifier for ExpectedKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let key = KeyId::of_certificate(end_entity)?;
        let _ = self.presented.set(key);
        if key != self.expected {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Accepts the keys of the trusted hosts from a client, or any key where the client comes to join. Either
/// way the client must prove that it has it.
#[derive(Debug)]
pub(crate) struct ClientKeys {
    /// `None` accepts any.
    trust: Option<TrustStore>,
    presented: OnceLock<KeyId>,
}

impl ClientKeys {
    pub(crate) fn trusted(trust: TrustStore) -> Arc<ClientKeys> {
        Arc::new(ClientKeys {
            trust: Some(trust),
            presented: OnceLock::new(),
        })
    }

    pub(crate) fn any() -> Arc<ClientKeys> {
        Arc::new(ClientKeys {
            trust: None,
            presented: OnceLock::new(),
        })
    }

    /// The key the client has, once the handshake is done.
    pub(crate) fn key(&self, addr: SocketAddr) -> Result<KeyId, PeerError> {
        let presented = self.presented.get();
        presented.copied().ok_or(PeerError::NoKeyPresented { addr })
    }

    fn accepts(&self, key: &KeyId) -> bool {
        let trust = self.trust.as_ref();
        trust.is_none_or(|trust| trust.name_of(key).is_some())
    }
}

impl ClientCertVerifier for ClientKeys {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let key = KeyId::of_certificate(end_entity)?;
        let _ = self.presented.set(key);
        if !self.accepts(&key) {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The configuration of one dialled connection: the verifier remembers what it saw.
pub(crate) fn client_config(
    identity: &Identity,
    verifier: Arc<ExpectedKey>,
    alpn: &[u8],
) -> Result<Arc<ClientConfig>, PeerError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(PeerError::TlsSetup)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The configuration of one accepted connection: the verifier remembers what it saw.
pub(crate) fn server_config(
    identity: &Identity,
    verifier: Arc<ClientKeys>,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>, PeerError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(PeerError::TlsSetup)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// What a failed handshake, or the first read after it, means to the dialling side.
pub(crate) fn dial_error(
    error: io::Error,
    name: &PeerName,
    addr: SocketAddr,
    ours: KeyId,
    verifier: &ExpectedKey,
) -> PeerError {
    let name = name.clone();
    if let Some(&presented) = verifier.presented.get()
        && presented != verifier.expected
    {
        return PeerError::WrongKey {
            addr,
            name,
            presented,
            expected: verifier.expected,
        };
    }
    match tls_error(error) {
        Ok(rustls::Error::AlertReceived(AlertDescription::AccessDenied)) => {
            PeerError::NotTrusted { name, addr, ours }
        }
        Ok(rustls::Error::AlertReceived(AlertDescription::CertificateRequired)) => {
            PeerError::KeyNotSeen { name, addr }
        }
        Ok(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => {
            PeerError::NotInviting { name, addr }
        }
        Ok(error) => common_error(error, addr),
        Err(source) => PeerError::HandshakeBroken { addr, source },
    }
}

/// What a failed handshake means to the accepting side.
pub(crate) fn accept_error(
    error: io::Error,
    addr: SocketAddr,
    ours: KeyId,
    verifier: &ClientKeys,
) -> PeerError {
    match tls_error(error) {
        Ok(rustls::Error::NoCertificatesPresented) => PeerError::NoKeyPresented { addr },
        Ok(rustls::Error::AlertReceived(AlertDescription::AccessDenied)) => {
            PeerError::NotExpected { addr, ours }
        }
        Ok(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => {
            match verifier.presented.get() {
                Some(&presented) => PeerError::UnknownKey { addr, presented },
                None => PeerError::NoKeyPresented { addr },
            }
        }
        Ok(error) => common_error(error, addr),
        Err(source) => PeerError::HandshakeBroken { addr, source },
    }
}

fn common_error(error: rustls::Error, addr: SocketAddr) -> PeerError {
    match error {
        rustls::Error::InvalidMessage(_) => PeerError::NotTls { addr },
        source => PeerError::Tls { addr, source },
    }
}

/// The TLS error inside an I/O error, or the I/O error if that is what it is.
fn tls_error(error: io::Error) -> Result<rustls::Error, io::Error> {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        .cloned();
    inner.ok_or(error)
}
