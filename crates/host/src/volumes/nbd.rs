//! A disk at the other end of an NBD URI: the way to it, and reading it once from beginning to end.
//!
//! Fixed newstyle, structured replies and `base:allocation` where the server has them, so that holes stay
//! holes; without them all is data. No TLS: a server that insists is told of as what it is. Several
//! requests are in flight at a time, their answers are taken as they come. (NBD protocol: `doc/proto.md` of
//! the NBD project; URIs: `doc/uri.md`.)

use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::Source;
use whimbrel_volume::raw::DataExtent;

/// The server has so long for each answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of one request; every server takes as much.
const REQUEST: usize = 256 << 10;

/// Bytes asked for together.
const PIECE: u64 = 8 << 20;

/// Longest answer to an option, or block status, that is believed.
const LONGEST: u32 = 1 << 20;

/// Longest stretch of disk a single question about allocation covers: its length has 32 bits.
const STATUS: u64 = 1 << 30;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// What can go wrong with a disk behind a URI.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error(
        "`{uri}` is not an NBD URI as it is known here: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
    )]
    Uri { uri: String },
    #[error("the NBD server at {place} cannot be reached: {source}")]
    Connect {
        place: String,
        source: std::io::Error,
    },
    #[error("the connection to the NBD server at {place} broke: {source}")]
    Broken {
        place: String,
        source: std::io::Error,
    },
    #[error("the NBD server at {place} did not answer for {} s", PATIENCE.as_secs())]
    Silent { place: String },
    #[error("the NBD server at {place} has no export `{export}`")]
    NoExport { place: String, export: String },
    #[error("the NBD server at {place} wants TLS, which is not spoken here")]
    WantsTls { place: String },
    #[error("the NBD server at {place} speaks out of turn: {what}")]
    Protocol { place: String, what: String },
    #[error("the NBD server at {place} cannot read {len} bytes at {offset}: error {errno}")]
    Read {
        place: String,
        offset: u64,
        len: usize,
        errno: u32,
    },
    #[error("{0}")]
    Volume(#[from] VolumeError),
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Where a URI points.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    pub place: Place,
    pub export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Tcp(String),
    Unix(PathBuf),
}

impl std::str::FromStr for NbdUri {
    type Err = NbdError;

    fn from_str(uri: &str) -> Result<NbdUri, NbdError> {
        let bad = || NbdError::Uri {
            uri: uri.to_string(),
        };
        let (scheme, rest) = uri.split_once("://").ok_or_else(bad)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = unescape(export).ok_or_else(bad)?;
        let place = match scheme {
            "nbd" if !host.is_empty() && query.is_empty() => {
                // An IPv6 address has colons of its own, and brackets.
                let has_port = host.rsplit_once(':').is_some_and(|(_, port)| {
                    !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
                });
                Place::Tcp(if has_port {
                    host.to_string()
                } else {
                    format!("{host}:10809")
                })
            }
            "nbd+unix" if host.is_empty() => {
                let socket = query
                    .split('&')
                    .find_map(|pair| pair.strip_prefix("socket="));
                let socket = socket.and_then(unescape).filter(|s| !s.is_empty());
                Place::Unix(PathBuf::from(socket.ok_or_else(bad)?))
            }
            _ => return Err(bad()),
        };
        Ok(NbdUri { place, export })
    }
}

/// Undoes %-escapes.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

/// What a server says of an export.
pub(super) struct Told {
    pub size: u64,
    /// The protocol's transmission flags.
    pub flags: u16,
}

/// An open disk behind a URI.
pub struct NbdSource {
    size: u64,
    place: String,
    wire: Mutex<Wire>,
}

struct Wire {
    stream: Box<dyn Stream>,
    place: String,
    /// Asked for, then had.
    structured: bool,
    /// The number of the allocation context, if there is one.
    allocation: Option<u32>,
    next: u64,
}

impl NbdSource {
    pub async fn open(uri: &NbdUri) -> Result<NbdSource, NbdError> {
        let (wire, told) = Wire::open(uri, true).await?;
        Ok(NbdSource {
            size: told.size,
            place: wire.place.clone(),
            wire: Mutex::new(wire),
        })
    }

    async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, NbdError>>,
    ) -> Result<T, NbdError> {
        tokio::time::timeout(PATIENCE, work)
            .await
            .map_err(|_| NbdError::Silent {
                place: self.place.clone(),
            })?
    }
}

/// An export opened for orders of all kinds: its connection, and what the server says of it. Answers are simple ones.
pub(super) async fn open_plain(uri: &NbdUri) -> Result<(Box<dyn Stream>, String, Told), NbdError> {
    let (wire, told) = Wire::open(uri, false).await?;
    Ok((wire.stream, wire.place, told))
}

impl Wire {
    /// Connects and negotiates, structured replies and allocation if they are wanted.
    async fn open(uri: &NbdUri, structured: bool) -> Result<(Wire, Told), NbdError> {
        let place = match &uri.place {
            Place::Tcp(address) => address.clone(),
            Place::Unix(path) => path.display().to_string(),
        };
        let connect = async {
            Ok::<Box<dyn Stream>, std::io::Error>(match &uri.place {
                Place::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Box::new(stream)
                }
                Place::Unix(path) => Box::new(UnixStream::connect(path).await?),
            })
        };
        let silent = |_| NbdError::Silent {
            place: place.clone(),
        };
        let stream = tokio::time::timeout(PATIENCE, connect)
            .await
            .map_err(silent)?
            .map_err(|source| NbdError::Connect {
                place: place.clone(),
                source,
            })?;
        let mut wire = Wire {
            stream,
            place: place.clone(),
            structured,
            allocation: None,
            next: 1,
        };
        let told = tokio::time::timeout(PATIENCE, wire.greet(&uri.export))
            .await
            .map_err(silent)??;
        Ok((wire, told))
    }
}

impl Source for NbdSource {
    type Error = NbdError;

    fn size(&self) -> u64 {
        self.size
    }

    fn piece(&self) -> u64 {
        PIECE
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<DataExtent>, NbdError> {
        let mut wire = self.wire.lock().await;
        let len = len.min(STATUS);
        self.in_time(wire.status(offset, len)).await
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, NbdError> {
        let mut wire = self.wire.lock().await;
        self.in_time(wire.read(offset, len)).await
    }
}

impl Wire {
    fn broken(&self, source: std::io::Error) -> NbdError {
        NbdError::Broken {
            place: self.place.clone(),
            source,
        }
    }

    fn wrong(&self, what: impl Into<String>) -> NbdError {
        NbdError::Protocol {
            place: self.place.clone(),
            what: what.into(),
        }
    }

    async fn take<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        let read = self.stream.read_exact(&mut bytes).await;
        read.map(|_| bytes).map_err(|e| self.broken(e))
    }

    async fn take_u16(&mut self) -> Result<u16, NbdError> {
        Ok(u16::from_be_bytes(self.take().await?))
    }

    async fn take_u32(&mut self) -> Result<u32, NbdError> {
        Ok(u32::from_be_bytes(self.take().await?))
    }

    async fn take_u64(&mut self) -> Result<u64, NbdError> {
        Ok(u64::from_be_bytes(self.take().await?))
    }

    async fn take_vec(&mut self, len: u32) -> Result<Vec<u8>, NbdError> {
        if len > LONGEST {
            return Err(self.wrong(format!("an answer of {len} bytes")));
        }
        let mut bytes = vec![0; len as usize];
        let read = self.stream.read_exact(&mut bytes).await;
        read.map(|_| bytes).map_err(|e| self.broken(e))
    }

    async fn say(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        let sent = self.stream.write_all(bytes).await;
        sent.map_err(|e| self.broken(e))
    }

    /// The negotiation.
    async fn greet(&mut self, export: &str) -> Result<Told, NbdError> {
        if self.take_u64().await? != MAGIC || self.take_u64().await? != OPTION {
            return Err(self.wrong("it is no NBD server of the newstyle protocol"));
        }
        let flags = self.take_u16().await?;
        if flags & 1 == 0 {
            return Err(self.wrong("it does not speak the fixed newstyle protocol"));
        }
        // Fixed newstyle, and no zeroes where the server can leave them out.
        self.say(&u32::from(flags & 3).to_be_bytes()).await?;
        self.structured = self.structured && self.ask(8, &[]).await?.is_some();
        if self.structured {
            let mut wanted = BytesMut::new();
            for text in [export, "base:allocation"] {
                if text != export {
                    wanted.extend_from_slice(&1u32.to_be_bytes());
                }
                wanted.extend_from_slice(&(text.len() as u32).to_be_bytes());
                wanted.extend_from_slice(text.as_bytes());
            }
            let answers = self.ask(10, &wanted).await?.unwrap_or_default();
            let context = answers.iter().find(|(kind, _)| *kind == 4);
            self.allocation = context
                .and_then(|(_, b)| b.first_chunk().copied())
                .map(u32::from_be_bytes);
        }
        let mut go = BytesMut::new();
        go.extend_from_slice(&(export.len() as u32).to_be_bytes());
        go.extend_from_slice(export.as_bytes());
        go.extend_from_slice(&0u16.to_be_bytes());
        let answers = self.ask(7, &go).await?.ok_or_else(|| NbdError::NoExport {
            place: self.place.clone(),
            export: export.to_string(),
        })?;
        let told = answers.iter().find_map(|(kind, b)| {
            let is_export = *kind == 3 && b.first_chunk() == Some(&[0, 0]);
            let size = b.get(2..10)?.try_into().ok().map(u64::from_be_bytes)?;
            let flags = b.get(10..12)?.try_into().ok().map(u16::from_be_bytes)?;
            is_export.then_some(Told { size, flags })
        });
        told.ok_or_else(|| self.wrong("it does not say how large the export is"))
    }

    /// Asks for an option: the answers before the acknowledgement, or `None` if it is refused.
    #[allow(clippy::type_complexity)]
    async fn ask(
        &mut self,
        option: u32,
        data: &[u8],
    ) -> Result<Option<Vec<(u32, Vec<u8>)>>, NbdError> {
        /// More answers than anybody has contexts and kinds of information.
        const MOST: usize = 64;
        let mut bytes = BytesMut::new();
        bytes.extend_from_slice(&OPTION.to_be_bytes());
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.say(&bytes).await?;
        let mut answers = Vec::new();
        loop {
            if self.take_u64().await? != OPTION_REPLY || self.take_u32().await? != option {
                return Err(self.wrong("an answer to what was not asked"));
            }
            let kind = self.take_u32().await?;
            let len = self.take_u32().await?;
            let data = self.take_vec(len).await?;
            match kind {
                1 => return Ok(Some(answers)),
                0x8000_0005 => {
                    return Err(NbdError::WantsTls {
                        place: self.place.clone(),
                    });
                }
                refused if refused & 0x8000_0000 != 0 => return Ok(None),
                _ if answers.len() == MOST => return Err(self.wrong("it answers without end")),
                _ => answers.push((kind, data)),
            }
        }
    }

    async fn send(&mut self, command: u16, offset: u64, len: u32) -> Result<u64, NbdError> {
        let cookie = self.next;
        self.next += 1;
        self.say(&request(command, cookie, offset, len)).await?;
        Ok(cookie)
    }

    async fn read(&mut self, offset: u64, len: usize) -> Result<Bytes, NbdError> {
        let mut bytes = vec![0; len];
        let first = self.next;
        let mut left = 0;
        for at in (0..len).step_by(REQUEST) {
            let piece = REQUEST.min(len - at) as u32;
            self.send(0, offset + at as u64, piece).await?;
            left += 1;
        }
        while left > 0 {
            let magic = self.take_u32().await?;
            if magic == SIMPLE_REPLY {
                let errno = self.take_u32().await?;
                let at = self.place_of(first, len).await?;
                self.good(errno, offset, len)?;
                let end = (at + REQUEST).min(len);
                let read = self.stream.read_exact(&mut bytes[at..end]).await;
                read.map_err(|e| self.broken(e))?;
                left -= 1;
                continue;
            }
            if magic != STRUCTURED_REPLY {
                return Err(self.wrong("what is no answer"));
            }
            let flags = self.take_u16().await?;
            let kind = self.take_u16().await?;
            let at = self.place_of(first, len).await?;
            let length = self.take_u32().await?;
            match kind {
                0 if length == 0 => {}
                1 | 2 if length >= 8 => {
                    let from = self.take_u64().await?;
                    let size = match kind {
                        1 => length - 8,
                        _ => self.take_u32().await?,
                    };
                    let begin = from.checked_sub(offset).map(|b| b as usize);
                    let part = begin
                        .filter(|&b| b >= at && b + size as usize <= (at + REQUEST).min(len))
                        .map(|b| b..b + size as usize);
                    let Some(part) = part else {
                        return Err(self.wrong("content that was not asked for"));
                    };
                    if kind == 1 {
                        let read = self.stream.read_exact(&mut bytes[part]).await;
                        read.map_err(|e| self.broken(e))?;
                    }
                }
                kind if kind & 0x8000 != 0 => {
                    let told = self.take_vec(length).await?;
                    let errno = told.first_chunk().copied().map_or(5, u32::from_be_bytes);
                    self.good(errno.max(1), offset, len)?;
                }
                _ => return Err(self.wrong(format!("an answer of kind {kind} to a read"))),
            }
            left -= u32::from(flags & 1 != 0);
        }
        Ok(Bytes::from(bytes))
    }

    /// Which part of the read a cookie stands for, from its first byte.
    async fn place_of(&mut self, first: u64, len: usize) -> Result<usize, NbdError> {
        let cookie = self.take_u64().await?;
        let at = cookie
            .checked_sub(first)
            .and_then(|n| (n as usize).checked_mul(REQUEST))
            .filter(|&at| at < len);
        at.ok_or_else(|| self.wrong("an answer to nothing that was asked"))
    }

    fn good(&self, errno: u32, offset: u64, len: usize) -> Result<(), NbdError> {
        match errno {
            0 => Ok(()),
            errno => Err(NbdError::Read {
                place: self.place.clone(),
                offset,
                len,
                errno,
            }),
        }
    }

    async fn status(&mut self, offset: u64, len: u64) -> Result<Vec<DataExtent>, NbdError> {
        let all = |data| DataExtent { offset, len, data };
        let Some(context) = self.allocation else {
            return Ok(vec![all(true)]);
        };
        let cookie = self.send(7, offset, len as u32).await?;
        let mut runs: Option<Vec<DataExtent>> = None;
        loop {
            let magic = self.take_u32().await?;
            if magic == SIMPLE_REPLY {
                // A refusal, since a status has no simple form: then all may be data.
                let _ = self.take_u32().await?;
                let _ = self.take_u64().await?;
                return Ok(vec![all(true)]);
            }
            let flags = self.take_u16().await?;
            let kind = self.take_u16().await?;
            if magic != STRUCTURED_REPLY || self.take_u64().await? != cookie {
                return Err(self.wrong("an answer to nothing that was asked"));
            }
            let length = self.take_u32().await?;
            let told = self.take_vec(length).await?;
            if kind == 5 && told.first_chunk() == Some(&context.to_be_bytes()) {
                let mut at = offset;
                let mut found: Vec<DataExtent> = Vec::new();
                for pair in told[4..].chunks_exact(8) {
                    let word = |b: &[u8]| b.iter().fold(0u32, |n, &x| n << 8 | u32::from(x));
                    let run = u64::from(word(&pair[..4])).min(offset + len - at);
                    // Bit 1: reads as zeroes.
                    let data = word(&pair[4..]) & 2 == 0;
                    match found.last_mut() {
                        _ if run == 0 => {}
                        Some(last) if last.data == data => last.len += run,
                        _ => found.push(DataExtent {
                            offset: at,
                            len: run,
                            data,
                        }),
                    }
                    at += run;
                }
                runs = Some(found);
            }
            if flags & 1 != 0 {
                // Nothing told, or an error: a server that cannot say is read whole.
                return Ok(runs
                    .filter(|runs| !runs.is_empty())
                    .unwrap_or_else(|| vec![all(true)]));
            }
        }
    }
}

/// The head of a request.
pub(super) fn request(command: u16, cookie: u64, offset: u64, len: u32) -> BytesMut {
    let mut bytes = BytesMut::with_capacity(28);
    bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&0u16.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_understood_or_refused() {
        let parsed = |uri: &str| uri.parse::<NbdUri>().ok();
        let tcp = |at: &str, export: &str| {
            Some(NbdUri {
                place: Place::Tcp(at.into()),
                export: export.into(),
            })
        };
        assert_eq!(parsed("nbd://h"), tcp("h:10809", ""));
        assert_eq!(parsed("nbd://h:7/a%20b"), tcp("h:7", "a b"));
        assert_eq!(parsed("nbd://[::1]/x"), tcp("[::1]:10809", "x"));
        assert_eq!(
            parsed("nbd+unix:///e?socket=/run/s"),
            Some(NbdUri {
                place: Place::Unix("/run/s".into()),
                export: "e".into()
            })
        );
        for bad in [
            "nbd:h",
            "nbds://h/x",
            "nbd+unix:///e",
            "nbd://",
            "nbd://h/%z1",
            "http://h/",
        ] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }
}
