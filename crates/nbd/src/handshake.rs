//! The negotiation as a machine without I/O: options in, replies and the next step out.
//!
//! The machine holds what the options have agreed so far (the dialect, metadata contexts). The driver
//! reads an option's header and data, hands them in, sends what is in `out`, and does the [`Step`].
//! Whatever is wrong with one option is answered to that option; only an EXPORT_NAME that cannot be
//! granted, for which the protocol knows no answer, ends the session.
//!
//! STARTTLS forgets all that was agreed before: somebody on the way may have agreed on it.

use std::sync::Arc;

use bytes::BufMut;

use crate::contexts::ContextSet;
use crate::dialect::Dialect;
use crate::export::{Directory, Export, ExportInfo, OpenError};
use crate::option::{BadOption, ClientOption, ContextQuery, InfoQuery};
use crate::request::Rules;
use crate::spec::*;
use crate::tls::Secrecy;

/// What the server says first, at once.
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    let mut rest = &mut bytes[..];
    rest.put_u64(MAGIC);
    rest.put_u64(OPTION_MAGIC);
    rest.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    bytes
}

/// The client's answer to the greeting has flags that were not offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("client flags {0:#010x}")]
pub struct UnknownFlags(pub u32);

/// Why an EXPORT_NAME was not granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("the name is not valid")]
    Name,
    #[error("TLS is required")]
    TlsRequired,
    #[error("after extended headers EXPORT_NAME is not allowed")]
    ExtendedHeaders,
}

/// What the driver does once it has sent the replies.
pub enum Step<D: Directory> {
    /// Read the next option.
    Continue,
    /// Close the connection: the client asked for it.
    Close,
    /// Close the connection: what EXPORT_NAME wants cannot be had.
    Refuse(Refused),
    /// Speak TLS, then tell [`Handshake::secured`] and read the next option. What has been read from the
    /// client beyond the option was said by nobody knows whom: the connection must be closed.
    StartTls,
    /// The transmission phase begins.
    Transmit(Session<D>),
}

/// An export held open by a connection; gives it back when dropped.
pub struct Opened<D: Directory> {
    directory: Arc<D>,
    name: String,
    pub export: Arc<D::Export>,
}

impl<D: Directory> Drop for Opened<D> {
    fn drop(&mut self) {
        self.directory.closed(&self.name);
    }
}

/// What the negotiation came to.
pub struct Session<D: Directory> {
    pub opened: Opened<D>,
    pub rules: Rules,
    /// The selected metadata contexts: number on the wire and name.
    pub contexts: Vec<(u32, String)>,
}

impl<D: Directory> Session<D> {
    pub fn name(&self) -> &str {
        &self.opened.name
    }
}

/// Contexts selected by SET_META_CONTEXT, for the export they were selected for.
struct Selected {
    export: String,
    contexts: Vec<(u32, String)>,
}

pub struct Handshake<D> {
    directory: Arc<D>,
    no_zeroes: bool,
    secrecy: Secrecy,
    dialect: Dialect,
    selected: Option<Selected>,
}

impl<D: Directory> Handshake<D> {
    /// `flags` are the client's 32 bits that answer the [`greeting`].
    pub fn new(directory: Arc<D>, flags: u32, secrecy: Secrecy) -> Result<Self, UnknownFlags> {
        // A client without FIXED_NEWSTYLE may send EXPORT_NAME only. If it sends more all the same it
        // gets the answers of fixed newstyle: no other exist.
        if flags & !(FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES) != 0 {
            return Err(UnknownFlags(flags));
        }
        Ok(Handshake {
            directory,
            no_zeroes: flags & FLAG_C_NO_ZEROES != 0,
            secrecy: match secrecy {
                // The specification has TLS for fixed newstyle only. To require it stays a requirement.
                Secrecy::Allowed if flags & FLAG_C_FIXED_NEWSTYLE == 0 => Secrecy::Off,
                secrecy => secrecy,
            },
            dialect: Dialect::Simple,
            selected: None,
        })
    }

    /// TLS has begun.
    pub fn secured(&mut self) {
        self.secrecy = Secrecy::Established;
        self.dialect = Dialect::Simple;
        self.selected = None;
    }

    /// Handles one option; `data` are at most [`MAX_DATA`](crate::option::MAX_DATA) bytes.
    pub fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Step<D> {
        if self.lacks_tls(option) {
            return self.refuse(option, TLS_REQUIRED, out);
        }
        // A new choice of contexts replaces the old one even if it fails.
        if option == OPT_SET_META_CONTEXT {
            self.selected = None;
        }
        let parsed = match ClientOption::parse(option, data) {
            Ok(parsed) => parsed,
            Err(bad) => return self.refuse(option, bad, out),
        };
        match parsed {
            ClientOption::ExportName(name) => return self.export_name(name, out),
            ClientOption::Abort => {
                reply(out, option, REP_ACK, &[]);
                return Step::Close;
            }
            ClientOption::List => self.list(out),
            ClientOption::Info(query) => self.info(&query, out),
            ClientOption::Go(query) => return self.go(&query, out),
            ClientOption::StartTls => return self.start_tls(out),
            ClientOption::StructuredReply => self.structured_reply(out),
            ClientOption::ExtendedHeaders => {
                self.dialect = Dialect::Extended;
                reply(out, option, REP_ACK, &[]);
            }
            ClientOption::ListMetaContext(query) => self.contexts(option, &query, out),
            ClientOption::SetMetaContext(query) => self.contexts(option, &query, out),
        }
        Step::Continue
    }

    /// Answers an option whose data were too long to be looked at, and have been skipped.
    pub fn too_big(&mut self, option: u32, out: &mut Vec<u8>) -> Step<D> {
        if self.lacks_tls(option) {
            return self.refuse(option, TLS_REQUIRED, out);
        }
        if option == OPT_SET_META_CONTEXT {
            self.selected = None;
        }
        let bad = BadOption {
            reply: REP_ERR_TOO_BIG,
            reason: "the option is too long",
        };
        self.refuse(option, bad, out)
    }

    fn lacks_tls(&self, option: u32) -> bool {
        self.secrecy == Secrecy::Required && !matches!(option, OPT_STARTTLS | OPT_ABORT)
    }

    fn start_tls(&self, out: &mut Vec<u8>) -> Step<D> {
        let bad = match self.secrecy {
            Secrecy::Allowed | Secrecy::Required => {
                reply(out, OPT_STARTTLS, REP_ACK, &[]);
                return Step::StartTls;
            }
            Secrecy::Off => BadOption {
                reply: REP_ERR_UNSUP,
                reason: "no TLS on this socket",
            },
            Secrecy::Established => BadOption {
                reply: REP_ERR_INVALID,
                reason: "TLS is spoken already",
            },
        };
        self.refuse(OPT_STARTTLS, bad, out)
    }

    fn structured_reply(&mut self, out: &mut Vec<u8>) {
        if self.dialect == Dialect::Extended {
            let reason = b"extended headers are agreed and go further";
            return reply(out, OPT_STRUCTURED_REPLY, REP_ERR_EXT_HEADER_REQD, reason);
        }
        self.dialect = Dialect::Structured;
        reply(out, OPT_STRUCTURED_REPLY, REP_ACK, &[]);
    }

    fn refuse(&self, option: u32, bad: BadOption, out: &mut Vec<u8>) -> Step<D> {
        match option {
            OPT_EXPORT_NAME if bad == TLS_REQUIRED => return Step::Refuse(Refused::TlsRequired),
            OPT_EXPORT_NAME => return Step::Refuse(Refused::Name),
            // Whatever a client says with its farewell, it is one.
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Step::Close;
            }
            _ => reply(out, option, bad.reply, bad.reason.as_bytes()),
        }
        Step::Continue
    }

    fn open(&self, name: &str) -> Result<(Opened<D>, ExportInfo), OpenError> {
        let opened = Opened {
            export: self.directory.open(name)?,
            directory: self.directory.clone(),
            name: name.to_owned(),
        };
        let info = checked(opened.export.info())?;
        Ok((opened, info))
    }

    fn session(&mut self, opened: Opened<D>, info: &ExportInfo) -> Session<D> {
        let contexts = match self.selected.take() {
            Some(mut selected) if selected.export == opened.name => {
                selected
                    .contexts
                    .retain(|(_, name)| info.contexts.contains(name));
                selected.contexts
            }
            _ => Vec::new(),
        };
        let numbers: ContextSet = contexts.iter().map(|(number, _)| *number).collect();
        Session {
            opened,
            rules: Rules::new(info, self.dialect, numbers),
            contexts,
        }
    }

    fn export_name(&mut self, name: &str, out: &mut Vec<u8>) -> Step<D> {
        if self.dialect == Dialect::Extended {
            return Step::Refuse(Refused::ExtendedHeaders);
        }
        let (opened, info) = match self.open(name) {
            Ok(open) => open,
            Err(error) => return Step::Refuse(error.into()),
        };
        out.put_u64(info.size);
        out.put_u16(self.transmission_flags(&info));
        if !self.no_zeroes {
            out.put_bytes(0, 124);
        }
        Step::Transmit(self.session(opened, &info))
    }

    fn list(&self, out: &mut Vec<u8>) {
        for name in self.directory.list() {
            if name.len() > MAX_STRING || name.contains('\0') {
                continue;
            }
            let mut data = (name.len() as u32).to_be_bytes().to_vec();
            data.extend(name.as_bytes());
            reply(out, OPT_LIST, REP_SERVER, &data);
        }
        reply(out, OPT_LIST, REP_ACK, &[]);
    }

    fn info(&self, query: &InfoQuery<'_>, out: &mut Vec<u8>) {
        match self.directory.describe(query.name).and_then(checked) {
            Ok(info) => self.describe(OPT_INFO, query, &info, out),
            Err(error) => refuse_open(out, OPT_INFO, &error),
        }
    }

    fn go(&mut self, query: &InfoQuery<'_>, out: &mut Vec<u8>) -> Step<D> {
        match self.open(query.name) {
            Ok((opened, info)) => {
                self.describe(OPT_GO, query, &info, out);
                Step::Transmit(self.session(opened, &info))
            }
            Err(error) => {
                refuse_open(out, OPT_GO, &error);
                Step::Continue
            }
        }
    }

    fn describe(&self, option: u32, query: &InfoQuery<'_>, info: &ExportInfo, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let mut send = |data: &mut Vec<u8>| {
            reply(out, option, REP_INFO, data);
            data.clear();
        };
        data.put_u16(INFO_EXPORT);
        data.put_u64(info.size);
        let mut flags = self.transmission_flags(info);
        // The specification has it offered to whoever enters with a context, or may yet choose one.
        let chosen = self
            .selected
            .as_ref()
            .is_some_and(|selected| selected.export == query.name && !selected.contexts.is_empty());
        if self.dialect == Dialect::Extended && (chosen || option == OPT_INFO) {
            flags |= FLAG_BLOCK_STATUS_PAYLOAD;
        }
        data.put_u16(flags);
        send(&mut data);
        if query.wants_block_size {
            data.put_u16(INFO_BLOCK_SIZE);
            data.put_u32(info.min_block);
            data.put_u32(info.preferred_block);
            data.put_u32(info.max_block);
            send(&mut data);
        }
        // For the default export the name asked for says nothing, and the real one is not known here.
        if query.wants_name && !query.name.is_empty() {
            data.put_u16(INFO_NAME);
            data.put_slice(query.name.as_bytes());
            send(&mut data);
        }
        if query.wants_description
            && let Some(text) = &info.description
        {
            data.put_u16(INFO_DESCRIPTION);
            data.put_slice(text.as_bytes());
            send(&mut data);
        }
        reply(out, option, REP_ACK, &[]);
    }

    fn contexts(&mut self, option: u32, query: &ContextQuery<'_>, out: &mut Vec<u8>) {
        let set = option == OPT_SET_META_CONTEXT;
        if !self.dialect.chunks() {
            let reason = b"structured replies come first";
            return reply(out, option, REP_ERR_INVALID, reason);
        }
        let info = match self.directory.describe(query.name).and_then(checked) {
            Ok(info) => info,
            Err(error) => return refuse_open(out, option, &error),
        };
        let matches = |name: &str| {
            let wildcard = |asked: &str| !set && asked.ends_with(':') && name.starts_with(asked);
            let all = !set && query.queries.is_empty();
            all || query.queries.iter().any(|&q| q == name || wildcard(q))
        };
        let mut contexts = Vec::new();
        for (index, name) in info.contexts.iter().enumerate() {
            if !matches(name) || contexts.iter().any(|(_, seen)| seen == name) {
                continue;
            }
            // In a list the number means nothing and is zero; a selected context is never zero.
            let number = if set { index as u32 + 1 } else { 0 };
            let mut data = number.to_be_bytes().to_vec();
            data.extend(name.as_bytes());
            reply(out, option, REP_META_CONTEXT, &data);
            contexts.push((number, name.clone()));
        }
        if set {
            self.selected = Some(Selected {
                export: query.name.to_owned(),
                contexts,
            });
        }
        reply(out, option, REP_ACK, &[]);
    }

    fn transmission_flags(&self, info: &ExportInfo) -> u16 {
        let mut flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_CACHE;
        if info.read_only {
            flags |= FLAG_READ_ONLY;
        } else {
            flags |= FLAG_SEND_FUA | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;
        }
        if info.multi_conn {
            flags |= FLAG_CAN_MULTI_CONN;
        }
        if self.dialect.chunks() {
            flags |= FLAG_SEND_DF;
        }
        flags
    }
}

const TLS_REQUIRED: BadOption = BadOption {
    reply: REP_ERR_TLS_REQD,
    reason: "TLS comes first",
};

/// An export that the protocol cannot express is a mistake of the daemon, not of the client.
fn checked(info: ExportInfo) -> Result<ExportInfo, OpenError> {
    match info.check() {
        Ok(()) => Ok(info),
        Err(bad) => Err(OpenError::Policy(format!("the export is unusable: {bad}"))),
    }
}

fn refuse_open(out: &mut Vec<u8>, option: u32, error: &OpenError) {
    let kind = match error {
        OpenError::Unknown => REP_ERR_UNKNOWN,
        OpenError::Policy(_) => REP_ERR_POLICY,
        OpenError::Shutdown => REP_ERR_SHUTDOWN,
    };
    let mut text = error.to_string();
    text.truncate(text.floor_char_boundary(MAX_STRING));
    reply(out, option, kind, text.as_bytes());
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}
