//! Any bytes at all, for a whole connection: it ends, without a panic, within its memory.
//!
//! One test alone in this file: the allocator counts for the whole process.

mod memory_use;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::io::{AsyncWriteExt, copy, duplex, sink, split};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use whimbrel_nbd::spec::*;
use whimbrel_nbd::{
    Content, Directory, Errno, Export, ExportInfo, INBOX, Limits, OpenError, Piece, StatusRun, Tls,
    ZeroHow, serve_connection,
};

const PIPE: usize = 16 << 10;
const LARGEST: u32 = 64 << 10;

/// Inbox, payload, both pipes, replies to one option, and room for futures and frames.
const BOUND: usize = INBOX + 2 * LARGEST as usize + 2 * PIPE + (64 << 10);

/// Takes everything, keeps nothing. Every second request waits once.
struct Void;

async fn wait(offset: u64) {
    if offset & 512 != 0 {
        tokio::task::yield_now().await;
    }
}

impl Export for Void {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            max_block: LARGEST,
            contexts: vec!["base:allocation".into(), "x-a:b".into()],
            ..ExportInfo::new(1 << 40)
        }
    }
    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, Errno> {
        wait(offset).await;
        Ok(vec![0; len as usize].into())
    }
    async fn read_sparse(&self, offset: u64, len: u32) -> Result<Content, Errno> {
        if offset == 4096 {
            return Ok(Content::Pieces(vec![Piece::Zeroes(len)]));
        }
        Ok(Content::Whole(self.read(offset, len).await?))
    }
    async fn write(&self, offset: u64, _data: Bytes, _fua: bool) -> Result<(), Errno> {
        wait(offset).await;
        Ok(())
    }
    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }
    async fn trim(&self, offset: u64, _len: u64, _fua: bool) -> Result<(), Errno> {
        wait(offset).await;
        Err(Errno::Eio)
    }
    async fn write_zeroes(&self, _offset: u64, _len: u64, _how: ZeroHow) -> Result<(), Errno> {
        Err(Errno::Enotsup)
    }
    async fn cache(&self, offset: u64, _len: u64) -> Result<(), Errno> {
        if offset.is_multiple_of(1 << 20) {
            std::future::pending().await
        }
        Ok(())
    }
    async fn block_status(
        &self,
        _context: &str,
        offset: u64,
        len: u64,
        _one: bool,
    ) -> Result<Vec<StatusRun>, Errno> {
        wait(offset).await;
        Ok(vec![StatusRun { len, flags: 0 }; 3])
    }
}

struct Voids;

impl Directory for Voids {
    type Export = Void;
    fn list(&self) -> Vec<String> {
        vec!["void".into()]
    }
    fn open(&self, name: &str) -> Result<Arc<Void>, OpenError> {
        if name.len() > 4 {
            return Err(OpenError::Unknown);
        }
        Ok(Arc::new(Void))
    }
    fn closed(&self, _name: &str) {}
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        0u32..80,
        Just(512),
        Just(4096),
        Just(65536),
        Just(1 << 20),
        any::<u32>()
    ]
}

fn noise() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..64)
}

const GO: &[u8] = b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04void\0\0";

/// An option that is in order.
fn good_option() -> impl Strategy<Value = Vec<u8>> {
    let contexts = any::<bool>().prop_map(|set| {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend((OPT_LIST_META_CONTEXT + u32::from(set)).to_be_bytes());
        bytes.extend(b"\0\0\0\x1f\0\0\0\x04void\0\0\0\x01\0\0\0\x0fbase:allocation");
        bytes
    });
    let structured = Just(b"IHAVEOPT\0\0\0\x08\0\0\0\0".to_vec());
    prop_oneof![contexts, structured]
}

/// An option whose length may lie.
fn bad_option() -> impl Strategy<Value = Vec<u8>> {
    let parts = (0u32..13, prop::option::of(length()), noise());
    parts.prop_map(|(option, len, data)| {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(len.unwrap_or(data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    })
}

/// A request, right or wrong, in either form. What has a payload may lack it.
fn request(wide: bool) -> impl Strategy<Value = Vec<u8>> {
    let offset = prop_oneof![
        (0u64..8).prop_map(|n| n * 512),
        Just((1 << 40) - 512),
        Just(1 << 20),
        any::<u64>()
    ];
    let kind = prop_oneof![0u16..9, Just(CMD_WRITE), Just(CMD_READ), any::<u16>()];
    let flags = prop_oneof![Just(0), 0u16..64, any::<u16>()];
    let whole = prop::bool::weighted(0.9);
    let long = prop_oneof![9 => Just(0u64), 1 => any::<u64>()];
    let parts = (kind, flags, offset, length(), long, whole);
    parts.prop_map(move |(kind, flags, offset, len, long, whole)| {
        let magic = if wide {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend([9; 8]);
        bytes.extend(offset.to_be_bytes());
        if wide {
            bytes.extend((long ^ u64::from(len)).to_be_bytes());
        } else {
            bytes.extend(len.to_be_bytes());
        }
        let payload = kind == CMD_WRITE || wide && flags & CMD_FLAG_PAYLOAD_LEN != 0;
        if payload && whole {
            bytes.resize(bytes.len() + len.min(1 << 20) as usize, 0xaa);
        }
        bytes
    })
}

/// A BLOCK_STATUS for some contexts, in order or not.
fn filter() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(0u32..4, 0..18).prop_map(|numbers| {
        let mut bytes = EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(CMD_FLAG_PAYLOAD_LEN.to_be_bytes());
        bytes.extend(CMD_BLOCK_STATUS.to_be_bytes());
        bytes.extend([9; 16]);
        bytes.extend((8 + 4 * numbers.len() as u64).to_be_bytes());
        bytes.extend(4096u64.to_be_bytes());
        bytes.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
        bytes
    })
}

fn transmission(wide: bool) -> BoxedStrategy<Vec<u8>> {
    let good = prop::collection::vec(good_option(), 0..4);
    let one = if wide {
        prop_oneof![8 => request(true), 1 => filter()].boxed()
    } else {
        request(false).boxed()
    };
    let requests = prop::collection::vec(one, 0..40);
    (good, requests)
        .prop_map(move |(good, requests)| {
            let mut bytes = Vec::new();
            if wide {
                bytes.extend(b"IHAVEOPT\0\0\0\x0b\0\0\0\0");
            }
            bytes.extend(good.concat());
            bytes.extend(GO);
            bytes.extend(requests.concat());
            bytes
        })
        .boxed()
}

fn conversation() -> impl Strategy<Value = Vec<u8>> {
    let negotiation = prop_oneof![good_option(), bad_option(), Just(GO.to_vec()), noise()];
    let negotiation = prop::collection::vec(negotiation, 0..10);
    let flags = [0, 0, 0, 3];
    let requests = prop_oneof![transmission(false), transmission(true)];
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..300),
        3 => negotiation.prop_map(move |pieces| [&flags[..], &pieces.concat()].concat()),
        6 => requests.prop_map(move |bytes| [&flags[..], &bytes].concat()),
    ]
}

/// Serves the conversation to its end; the most memory it took, beyond what was there before.
fn serve(said: Vec<u8>, listens: bool) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    let limits = Limits {
        requests: 8,
        bytes: LARGEST.into(),
        linger: Duration::from_secs(1),
        ..Limits::default()
    };
    let used = memory_use::Peak::start();
    runtime.block_on(async {
        let (ours, theirs) = duplex(PIPE);
        let shutdown = CancellationToken::new();
        let serving = serve_connection(theirs, Arc::new(Voids), limits, Tls::Off, shutdown);
        let server = tokio::spawn(serving);
        let (mut hears, mut says) = split(ours);
        let talk = async {
            // The virtual clock only moves when nothing else does: a client that is not heard any
            // more gives up.
            let _ = timeout(Duration::from_secs(60), says.write_all(&said)).await;
            let _ = says.shutdown().await;
        };
        if listens {
            let mut nowhere = sink();
            let (_, heard) = tokio::join!(talk, copy(&mut hears, &mut nowhere));
            heard.unwrap();
        } else {
            talk.await;
            drop((hears, says));
        }
        let _ended = timeout(Duration::from_secs(3600), server)
            .await
            .expect("the connection ends")
            .expect("no panic");
    });
    used.bytes()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn any_bytes_end_in_order_and_within_memory(said in conversation(), listens: bool) {
        let used = serve(said, listens);
        prop_assert!(used < BOUND, "{used} bytes of at most {BOUND}");
    }
}
