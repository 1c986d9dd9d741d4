//! Bytes of a client after the greeting, through the negotiation's machine: every option is answered, an
//! answer is short, and what comes out is consistent.
//!
//! Input: a byte that chooses the mode of TLS, the client's flags (32 bits), options.

use std::sync::Arc;

use bytes::Bytes;
use whimbrel_nbd::handshake::{Handshake, Step};
use whimbrel_nbd::option::{HEADER, Header, MAX_DATA};
use whimbrel_nbd::{
    Dialect, Directory, Errno, Export, ExportInfo, OpenError, Secrecy, StatusRun, ZeroHow,
};

struct Nothing;

impl Export for Nothing {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            contexts: vec!["base:allocation".into(), "whimbrel:residency".into()],
            description: Some("nothing".into()),
            ..ExportInfo::new(1 << 30)
        }
    }
    async fn read(&self, _offset: u64, _len: u32) -> Result<Bytes, Errno> {
        Err(Errno::Eio)
    }
    async fn write(&self, _offset: u64, _data: Bytes, _fua: bool) -> Result<(), Errno> {
        Err(Errno::Eio)
    }
    async fn flush(&self) -> Result<(), Errno> {
        Err(Errno::Eio)
    }
    async fn trim(&self, _offset: u64, _len: u64, _fua: bool) -> Result<(), Errno> {
        Err(Errno::Eio)
    }
    async fn write_zeroes(&self, _offset: u64, _len: u64, _how: ZeroHow) -> Result<(), Errno> {
        Err(Errno::Eio)
    }
    async fn cache(&self, _offset: u64, _len: u64) -> Result<(), Errno> {
        Err(Errno::Eio)
    }
    async fn block_status(
        &self,
        _context: &str,
        _offset: u64,
        _len: u64,
        _one: bool,
    ) -> Result<Vec<StatusRun>, Errno> {
        Err(Errno::Eio)
    }
}

struct Names;

impl Directory for Names {
    type Export = Nothing;
    fn list(&self) -> Vec<String> {
        vec![String::new(), "a".into(), "\0".into()]
    }
    fn open(&self, name: &str) -> Result<Arc<Nothing>, OpenError> {
        match name {
            "" | "a" => Ok(Arc::new(Nothing)),
            "p" => Err(OpenError::Policy("é".repeat(4000))),
            _ => Err(OpenError::Unknown),
        }
    }
    fn closed(&self, _name: &str) {}
}

pub fn check(bytes: &[u8]) {
    let Some((&[mode, ref flags @ ..], mut rest)) = bytes.split_first_chunk::<5>() else {
        return;
    };
    let secrecy = match mode % 3 {
        0 => Secrecy::Off,
        1 => Secrecy::Allowed,
        _ => Secrecy::Required,
    };
    let flags = u32::from_be_bytes(*flags);
    let Ok(mut handshake) = Handshake::new(Arc::new(Names), flags, secrecy) else {
        return;
    };
    let mut open = secrecy != Secrecy::Required;
    while let Some((header, tail)) = rest.split_first_chunk::<HEADER>() {
        let Ok(Header { option, len }) = Header::parse(header) else {
            return;
        };
        let Some((data, tail)) = tail.split_at_checked(len as usize) else {
            return;
        };
        rest = tail;
        let mut out = Vec::new();
        let step = if len > MAX_DATA {
            handshake.too_big(option, &mut out)
        } else {
            handshake.option(option, data, &mut out)
        };
        assert!(out.len() < 1 << 16, "no option has a long answer here");
        match step {
            Step::Continue => assert!(!out.is_empty(), "every option is answered"),
            Step::Close | Step::Refuse(_) => return,
            Step::StartTls => {
                assert_ne!(secrecy, Secrecy::Off);
                handshake.secured();
                open = true;
            }
            Step::Transmit(session) => {
                assert!(open, "nothing is served before TLS where it is required");
                let selected = session.contexts.len();
                assert_eq!(session.rules.contexts.len(), selected);
                assert!(session.rules.dialect != Dialect::Simple || selected == 0);
                return;
            }
        }
    }
}
