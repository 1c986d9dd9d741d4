//! Two hosts on the loopback, and strangers made by hand.
#![allow(dead_code, reason = "each test file uses its part")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use whimbrel_peer::PeerError;
use whimbrel_peer::connection::Connection;
use whimbrel_peer::dial::{DialSettings, dial};
use whimbrel_peer::hello::{Class, Hello, SessionId, Speaker, VersionRange};
use whimbrel_peer::identity::{IDENTITY_FILE, Identity};
use whimbrel_peer::listener::{Accepted, ListenSettings, Listener};
use whimbrel_peer::rights::Rights;
use whimbrel_peer::trust::{PEERS_FILE, Peer, PeerName, TrustStore};

pub struct Host {
    pub folder: tempfile::TempDir,
    pub name: PeerName,
    pub identity: Identity,
    pub trust: TrustStore,
}

pub fn name(text: &str) -> PeerName {
    text.parse().unwrap()
}

pub fn speaker(host: &str) -> Speaker {
    Speaker {
        versions: VersionRange { min: 1, max: 2 },
        software: "whimbrel 0.1.0".into(),
        features: 0b0110,
        host: host.into(),
    }
}

pub fn hello() -> Hello {
    Hello {
        speaker: Speaker {
            features: 0b1100,
            ..speaker("oslo")
        },
        class: Class::Push(2),
        session: SessionId(7),
    }
}

impl Host {
    pub fn new(host: &str) -> Host {
        let folder = tempfile::tempdir().unwrap();
        Host {
            name: name(host),
            identity: Identity::create(&folder.path().join(IDENTITY_FILE)).unwrap(),
            trust: TrustStore::load(folder.path().join(PEERS_FILE)).unwrap(),
            folder,
        }
    }

    pub fn trusts(&self, other: &Host) {
        let peer = Peer {
            key: other.identity.key_id(),
            addresses: vec![],
            may: Rights::ALL,
        };
        self.trust.add(other.name.clone(), peer).unwrap();
    }

    pub async fn listens(&self, settings: ListenSettings) -> Listener {
        self.listens_at("127.0.0.1:0".parse().unwrap(), settings)
            .await
            .unwrap()
    }

    pub async fn listens_at(
        &self,
        addr: SocketAddr,
        settings: ListenSettings,
    ) -> Result<Listener, PeerError> {
        let us = speaker(self.name.as_str());
        Listener::bind(
            addr,
            self.identity.clone(),
            self.trust.clone(),
            us,
            settings,
        )
        .await
    }

    pub async fn dials(&self, addr: SocketAddr, expected: &Host) -> Result<Connection, PeerError> {
        self.says(addr, expected, &hello()).await
    }

    pub async fn says(
        &self,
        addr: SocketAddr,
        expected: &Host,
        hello: &Hello,
    ) -> Result<Connection, PeerError> {
        let (name, key) = (&expected.name, expected.identity.key_id());
        let settings = DialSettings::default();
        dial(&addr.into(), &self.identity, name, key, hello, &settings).await
    }
}

/// Oslo and Bern, who trust each other.
pub fn two_hosts() -> (Host, Host) {
    let (oslo, bern) = (Host::new("oslo"), Host::new("bern"));
    oslo.trusts(&bern);
    bern.trusts(&oslo);
    (oslo, bern)
}

/// An accepted connection of Oslo at Bern, and its other end.
pub async fn connected(oslo: &Host, bern: &Host) -> (Connection, Accepted, Listener) {
    let mut listener = bern.listens(ListenSettings::default()).await;
    let addr = listener.local_addr();
    let (dialled, accepted) = tokio::join!(oslo.dials(addr, bern), listener.accept());
    (dialled.unwrap(), accepted.unwrap(), listener)
}

/// A TLS client that trusts everybody, with or without a key, to send what no daemon would.
pub async fn stranger(
    addr: SocketAddr,
    key: Option<&Path>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    stranger_who_offers(b"whimbrel", addr, key, versions).await
}

pub async fn stranger_who_offers(
    alpn: &[u8],
    addr: SocketAddr,
    key: Option<&Path>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let mut config = match key {
        None => builder.with_no_client_auth(),
        Some(path) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(path).unwrap()],
                PrivateKeyDer::from_pem_file(path).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    let tcp = TcpStream::connect(addr).await?;
    let server = ServerName::try_from("anybody.invalid").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(server, tcp)
        .await
}

#[derive(Debug)]
pub struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ED25519,
            SignatureScheme::ECDSA_NISTP256_SHA256,
        ]
    }
}
