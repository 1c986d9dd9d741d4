//! TLS within the protocol: STARTTLS turns a connection into a secret one before anything is agreed on it.
//!
//! Certificates, client authentication and TLS versions are what the caller's configuration says. There
//! is no access control beyond it: whoever the configuration lets in is offered every export.

use std::sync::Arc;

use rustls::ServerConfig;

/// What a server does about TLS, on all its listeners.
#[derive(Clone, Debug, Default)]
pub enum Tls {
    /// STARTTLS is answered `ERR_UNSUP` (the specification's NOTLS mode).
    #[default]
    Off,
    /// For clients that want it (SELECTIVETLS without an export that insists on it).
    Allowed(Arc<ServerConfig>),
    /// Before TLS every option but STARTTLS and ABORT is answered `ERR_TLS_REQD` (FORCEDTLS).
    Required(Arc<ServerConfig>),
}

impl Tls {
    pub fn config(&self) -> Option<&Arc<ServerConfig>> {
        match self {
            Tls::Off => None,
            Tls::Allowed(config) | Tls::Required(config) => Some(config),
        }
    }

    pub fn secrecy(&self) -> Secrecy {
        match self {
            Tls::Off => Secrecy::Off,
            Tls::Allowed(_) => Secrecy::Allowed,
            Tls::Required(_) => Secrecy::Required,
        }
    }
}

/// How a connection stands to TLS, for the negotiation's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secrecy {
    Off,
    Allowed,
    Required,
    /// TLS is spoken.
    Established,
}
