//! Options of the negotiation: raw bytes in, a typed option or the error to reply out. No I/O.

use crate::spec::*;

/// Bytes of an option's header.
pub const HEADER: usize = 16;

/// Longest data of an option that is looked at. Longer ones are skipped and answered `ERR_TOO_BIG`.
pub const MAX_DATA: u32 = 64 << 10;

/// Most queries in one option on metadata contexts, beyond which it is answered `ERR_TOO_BIG`.
pub const MAX_QUERIES: u32 = 64;

/// What precedes an option's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub option: u32,
    /// Bytes of data that follow.
    pub len: u32,
}

/// The bytes are no option: nobody can tell where the next one starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("option magic {0:#018x}")]
pub struct NotAnOption(pub u64);

impl Header {
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, NotAnOption> {
        let [m0, m1, m2, m3, m4, m5, m6, m7, rest @ ..] = *bytes;
        let magic = u64::from_be_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
        if magic != OPTION_MAGIC {
            return Err(NotAnOption(magic));
        }
        let [o0, o1, o2, o3, l0, l1, l2, l3] = rest;
        Ok(Header {
            option: u32::from_be_bytes([o0, o1, o2, o3]),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }
}

/// An option whose data are well formed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOption<'a> {
    ExportName(&'a str),
    Abort,
    List,
    StartTls,
    Info(InfoQuery<'a>),
    Go(InfoQuery<'a>),
    StructuredReply,
    ExtendedHeaders,
    ListMetaContext(ContextQuery<'a>),
    SetMetaContext(ContextQuery<'a>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoQuery<'a> {
    pub name: &'a str,
    /// The information asked for, as far as the server knows of it.
    pub wants_name: bool,
    pub wants_description: bool,
    pub wants_block_size: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextQuery<'a> {
    pub name: &'a str,
    /// Each has a namespace and a colon; the leaf may be empty.
    pub queries: Vec<&'a str>,
}

/// An option to be answered with an error: the reply type, and words for a human being.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadOption {
    pub reply: u32,
    pub reason: &'static str,
}

fn invalid(reason: &'static str) -> BadOption {
    BadOption {
        reply: REP_ERR_INVALID,
        reason,
    }
}

impl<'a> ClientOption<'a> {
    /// `data` are the bytes after the header, at most [`MAX_DATA`].
    pub fn parse(option: u32, data: &'a [u8]) -> Result<Self, BadOption> {
        let bare = |parsed| {
            if data.is_empty() {
                Ok(parsed)
            } else {
                Err(invalid("the option has no data"))
            }
        };
        match option {
            OPT_EXPORT_NAME => Ok(ClientOption::ExportName(text(data)?)),
            OPT_ABORT => Ok(ClientOption::Abort),
            OPT_LIST => bare(ClientOption::List),
            OPT_STARTTLS => bare(ClientOption::StartTls),
            OPT_STRUCTURED_REPLY => bare(ClientOption::StructuredReply),
            OPT_EXTENDED_HEADERS => bare(ClientOption::ExtendedHeaders),
            OPT_INFO => Ok(ClientOption::Info(info_query(data)?)),
            OPT_GO => Ok(ClientOption::Go(info_query(data)?)),
            OPT_LIST_META_CONTEXT => Ok(ClientOption::ListMetaContext(context_query(data)?)),
            OPT_SET_META_CONTEXT => Ok(ClientOption::SetMetaContext(context_query(data)?)),
            _ => Err(BadOption {
                reply: REP_ERR_UNSUP,
                reason: "unknown option",
            }),
        }
    }
}

/// Takes fields off the front of an option's data.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], BadOption> {
        let (taken, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(invalid("a length exceeds the option's data"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, BadOption> {
        let bytes = self.bytes(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, BadOption> {
        let bytes = self.bytes(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn string(&mut self) -> Result<&'a str, BadOption> {
        let len = self.u32()?;
        text(self.bytes(len as usize)?)
    }

    fn end(self) -> Result<(), BadOption> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(invalid("bytes left over in the option's data"))
        }
    }
}

fn text(bytes: &[u8]) -> Result<&str, BadOption> {
    if bytes.len() > MAX_STRING {
        return Err(invalid("a string is longer than 4096 bytes"));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(invalid("a string is not UTF-8 without NUL")),
    }
}

fn info_query(data: &[u8]) -> Result<InfoQuery<'_>, BadOption> {
    let mut fields = Fields(data);
    let mut query = InfoQuery {
        name: fields.string()?,
        wants_name: false,
        wants_description: false,
        wants_block_size: false,
    };
    for _ in 0..fields.u16()? {
        match fields.u16()? {
            INFO_NAME => query.wants_name = true,
            INFO_DESCRIPTION => query.wants_description = true,
            INFO_BLOCK_SIZE => query.wants_block_size = true,
            _ => {}
        }
    }
    fields.end()?;
    Ok(query)
}

fn context_query(data: &[u8]) -> Result<ContextQuery<'_>, BadOption> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    if u64::from(count) * 4 > fields.0.len() as u64 {
        return Err(invalid("a number of queries exceeds the option's data"));
    }
    if count > MAX_QUERIES {
        return Err(BadOption {
            reply: REP_ERR_TOO_BIG,
            reason: "too many queries",
        });
    }
    let mut queries = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let query = fields.string()?;
        if query.find(':').is_none_or(|colon| colon == 0) {
            return Err(invalid("a query has no namespace"));
        }
        queries.push(query);
    }
    fields.end()?;
    Ok(ContextQuery { name, queries })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(option: u32, data: &[u8]) -> u32 {
        ClientOption::parse(option, data).unwrap_err().reply
    }

    #[test]
    fn unknown_options_are_unsupported_whatever_their_data() {
        for option in [0, 4, 12, u32::MAX] {
            assert_eq!(reply(option, b""), REP_ERR_UNSUP);
            assert_eq!(reply(option, b"data"), REP_ERR_UNSUP);
        }
    }

    #[test]
    fn abort_may_carry_data_and_options_without_a_parameter_may_not() {
        assert_eq!(
            ClientOption::parse(OPT_ABORT, b"why").unwrap(),
            ClientOption::Abort
        );
        for option in [
            OPT_LIST,
            OPT_STARTTLS,
            OPT_STRUCTURED_REPLY,
            OPT_EXTENDED_HEADERS,
        ] {
            assert_eq!(reply(option, b"x"), REP_ERR_INVALID);
        }
    }

    #[test]
    fn go_with_every_kind_of_request() {
        let data = b"\0\0\0\x01a\0\x03\0\0\0\x03\x12\x34";
        let ClientOption::Go(query) = ClientOption::parse(OPT_GO, data).unwrap() else {
            panic!("go")
        };
        assert_eq!(query.name, "a");
        assert!(query.wants_block_size && !query.wants_name && !query.wants_description);
    }

    #[test]
    fn lengths_that_lie_are_invalid() {
        for data in [
            &b""[..],
            b"\0\0\0\x05a\0\0",
            b"\xff\xff\xff\xffa\0\0",
            b"\0\0\0\x01a\0\x02\0\0",
            b"\0\0\0\x01a\0\0extra",
            b"\0\0\0\x01\xff\0\0",
            b"\0\0\0\x01\0\0\0",
        ] {
            assert_eq!(reply(OPT_GO, data), REP_ERR_INVALID, "{data:?}");
            assert_eq!(reply(OPT_SET_META_CONTEXT, data), REP_ERR_INVALID);
        }
        let long = vec![b'a'; MAX_STRING + 1];
        assert_eq!(reply(OPT_EXPORT_NAME, &long), REP_ERR_INVALID);
    }

    #[test]
    fn context_queries_need_a_namespace_and_are_few() {
        let with = |query: &[u8], count: u32| {
            let mut data = b"\0\0\0\0".to_vec();
            data.extend(count.to_be_bytes());
            for _ in 0..count {
                data.extend((query.len() as u32).to_be_bytes());
                data.extend(query);
            }
            data
        };
        assert!(ClientOption::parse(OPT_LIST_META_CONTEXT, &with(b"base:", 64)).is_ok());
        assert_eq!(
            reply(OPT_LIST_META_CONTEXT, &with(b"base:", 65)),
            REP_ERR_TOO_BIG
        );
        assert_eq!(
            reply(OPT_LIST_META_CONTEXT, &with(b"base", 1)),
            REP_ERR_INVALID
        );
        assert_eq!(
            reply(OPT_LIST_META_CONTEXT, &with(b":leaf", 1)),
            REP_ERR_INVALID
        );
    }
}
