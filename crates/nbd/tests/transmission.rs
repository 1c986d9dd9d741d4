//! The transmission phase against an export whose requests the test holds back and lets go.

#[allow(dead_code)]
mod client;
#[allow(dead_code)]
mod memory;

use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use client::{Client, Reply, request};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::yield_now;
use whimbrel_nbd::spec::*;
use whimbrel_nbd::{
    Directory, Errno, Export, ExportInfo, Limits, OpenError, ServeError, StatusRun, ZeroHow,
};

const SIZE: u64 = 64 << 20;
/// Requests at this offset wait for the gate.
const GATED: u64 = 1 << 20;
/// Reads here never end.
const NEVER: u64 = 2 << 20;
/// Requests here panic.
const PANIC: u64 = 3 << 20;
/// Requests here panic after they have waited.
const LATE_PANIC: u64 = 4 << 20;
/// Reads here are one byte short.
const SHORT: u64 = 5 << 20;

struct Gated {
    gate: Semaphore,
    started: AtomicUsize,
    finished: AtomicUsize,
    flushed_after: Mutex<Vec<usize>>,
    closed: AtomicBool,
}

impl Gated {
    fn new() -> Arc<Self> {
        Arc::new(Gated {
            gate: Semaphore::new(0),
            started: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            flushed_after: Mutex::default(),
            closed: AtomicBool::new(false),
        })
    }

    async fn pass(&self, offset: u64) {
        self.started.fetch_add(1, Ordering::SeqCst);
        match offset {
            GATED => self.gate.acquire().await.unwrap().forget(),
            NEVER => pending().await,
            PANIC => panic!("a bug in the export, on purpose"),
            LATE_PANIC => {
                yield_now().await;
                panic!("a late bug in the export, on purpose")
            }
            _ => {}
        }
        self.finished.fetch_add(1, Ordering::SeqCst);
    }

    async fn until_started(&self, count: usize) {
        while self.started.load(Ordering::SeqCst) < count {
            yield_now().await;
        }
    }
}

impl Export for Gated {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(SIZE)
    }
    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, Errno> {
        self.pass(offset).await;
        let len = len as usize - usize::from(offset == SHORT);
        Ok(vec![(offset >> 9) as u8; len].into())
    }
    async fn write(&self, offset: u64, _data: Bytes, _fua: bool) -> Result<(), Errno> {
        self.pass(offset).await;
        Ok(())
    }
    async fn flush(&self) -> Result<(), Errno> {
        let finished = self.finished.load(Ordering::SeqCst);
        self.flushed_after.lock().unwrap().push(finished);
        Ok(())
    }
    async fn trim(&self, _offset: u64, _len: u64, _fua: bool) -> Result<(), Errno> {
        Err(Errno::Enotsup)
    }
    async fn write_zeroes(&self, _offset: u64, _len: u64, _how: ZeroHow) -> Result<(), Errno> {
        Err(Errno::Enotsup)
    }
    async fn cache(&self, offset: u64, _len: u64) -> Result<(), Errno> {
        self.pass(offset).await;
        Ok(())
    }
    async fn block_status(
        &self,
        _context: &str,
        _offset: u64,
        _len: u64,
        _one: bool,
    ) -> Result<Vec<StatusRun>, Errno> {
        Ok(Vec::new())
    }
}

struct Only(Arc<Gated>);

impl Directory for Only {
    type Export = Gated;
    fn list(&self) -> Vec<String> {
        vec!["only".into()]
    }
    fn open(&self, _name: &str) -> Result<Arc<Gated>, OpenError> {
        Ok(self.0.clone())
    }
    fn closed(&self, name: &str) {
        assert_eq!(name, "");
        assert!(!self.0.closed.swap(true, Ordering::SeqCst), "closed once");
    }
}

async fn attach(limits: Limits) -> (Arc<Gated>, Client) {
    let export = Gated::new();
    let client = Client::attach(Arc::new(Only(export.clone())), limits).await;
    (export, client)
}

fn failed(cookie: u64, errno: Errno) -> Reply {
    Reply {
        cookie,
        error: errno.code(),
        data: Vec::new(),
    }
}

#[tokio::test]
async fn a_slow_read_holds_up_nobody() {
    let (export, mut client) = attach(Limits::default()).await;
    client.send(&request(CMD_READ, 0, 1, GATED, 4096)).await;
    for cookie in 2..100 {
        let offset = cookie * 512;
        client
            .send(&request(CMD_READ, 0, cookie, offset, 512))
            .await;
        let reply = client.reply(512).await;
        assert_eq!((reply.cookie, reply.error), (cookie, 0));
        assert_eq!(reply.data, [cookie as u8; 512]);
    }
    export.gate.add_permits(1);
    assert_eq!(client.reply(4096).await.cookie, 1);
    client.send(&request(CMD_DISC, 0, 0, 0, 0)).await;
    client.end().await.unwrap();
    assert!(export.closed.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_disconnect_waits_for_what_is_in_flight() {
    let (export, mut client) = attach(Limits::default()).await;
    client.send(&request(CMD_READ, 0, 1, GATED, 512)).await;
    client.send(&request(CMD_DISC, 0, 0, 0, 0)).await;
    client.stream.shutdown().await.unwrap();
    export.until_started(1).await;
    assert!(!export.closed.load(Ordering::SeqCst));
    export.gate.add_permits(1);
    assert_eq!(client.reply(512).await.cookie, 1);
    client.end().await.unwrap();
}

#[tokio::test]
async fn shutdown_answers_what_is_in_flight_and_reads_no_more() {
    let (export, mut client) = attach(Limits::default()).await;
    client.send(&request(CMD_READ, 0, 1, GATED, 512)).await;
    export.until_started(1).await;
    client.shutdown.cancel();
    for _ in 0..10 {
        yield_now().await;
    }
    client.send(&request(CMD_READ, 0, 2, 0, 512)).await;
    export.gate.add_permits(1);
    assert_eq!(client.reply(512).await.cookie, 1);
    client.end().await.unwrap();
    assert_eq!(export.started.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn shutdown_drops_a_write_that_was_half_received() {
    let (export, mut client) = attach(Limits::default()).await;
    client.send(&request(CMD_WRITE, 0, 1, 0, 4096)).await;
    client.send(&[1; 1000]).await;
    yield_now().await;
    client.shutdown.cancel();
    client.end().await.unwrap();
    assert_eq!(export.started.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn a_read_that_never_ends_is_dropped_after_lingering() {
    let (export, mut client) = attach(Limits::default()).await;
    client.send(&request(CMD_READ, 0, 1, NEVER, 512)).await;
    client.send(&request(CMD_DISC, 0, 0, 0, 0)).await;
    let end = client.end().await;
    assert!(matches!(end, Err(ServeError::Lingered { requests: 1 })));
    assert!(export.closed.load(Ordering::SeqCst));
}

#[tokio::test(start_paused = true)]
async fn a_write_outlives_its_connection_and_the_export_is_closed_after_it() {
    let (export, mut client) = attach(Limits::default()).await;
    client.send(&request(CMD_WRITE, 0, 1, GATED, 512)).await;
    client.send(&[1; 512]).await;
    client.stream.shutdown().await.unwrap();
    let end = client.end().await;
    assert!(matches!(end, Err(ServeError::Lingered { requests: 1 })));
    assert!(!export.closed.load(Ordering::SeqCst));
    export.gate.add_permits(1);
    while !export.closed.load(Ordering::SeqCst) {
        yield_now().await;
    }
    assert_eq!(export.finished.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_client_that_vanishes_drops_its_reads_at_the_next_reply() {
    let (export, mut client) = attach(Limits::default()).await;
    client.send(&request(CMD_READ, 0, 1, NEVER, 512)).await;
    client.send(&request(CMD_READ, 0, 2, GATED, 512)).await;
    export.until_started(2).await;
    let server = client.server;
    drop(client.stream);
    export.gate.add_permits(1);
    assert!(matches!(server.await.unwrap(), Err(ServeError::Io(_))));
    assert!(export.closed.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_panic_costs_its_own_request_only() {
    let (_, mut client) = attach(Limits::default()).await;
    for (cookie, offset) in [(1, PANIC), (2, LATE_PANIC)] {
        client
            .send(&request(CMD_READ, 0, cookie, offset, 512))
            .await;
        assert_eq!(client.reply(512).await, failed(cookie, Errno::Eio));
    }
    client.send(&request(CMD_READ, 0, 3, 0, 512)).await;
    assert_eq!(client.reply(512).await.error, 0);
}

#[tokio::test]
async fn a_read_of_the_wrong_length_is_an_error_not_a_torn_stream() {
    let (_, mut client) = attach(Limits::default()).await;
    client.send(&request(CMD_READ, 0, 1, SHORT, 512)).await;
    assert_eq!(client.reply(512).await, failed(1, Errno::Eio));
}

#[tokio::test]
async fn enotsup_is_for_fast_zeroing_only() {
    let (_, mut client) = attach(Limits::default()).await;
    let zero = |flags, cookie| request(CMD_WRITE_ZEROES, flags, cookie, 0, 512);
    client.send(&zero(CMD_FLAG_FAST_ZERO, 1)).await;
    assert_eq!(client.reply(0).await, failed(1, Errno::Enotsup));
    client.send(&zero(0, 2)).await;
    assert_eq!(client.reply(0).await, failed(2, Errno::Eio));
    client.send(&request(CMD_TRIM, 0, 3, 0, 512)).await;
    assert_eq!(client.reply(0).await, failed(3, Errno::Eio));
}

#[tokio::test]
async fn a_refused_write_is_skipped_and_the_next_request_understood() {
    let (export, mut client) = attach(Limits::default()).await;
    let sender = async {
        for (cookie, offset, len) in [(1, SIZE, 512), (2, 1, 512), (3, 0, 48 << 20), (4, 0, 0)] {
            client
                .send(&request(CMD_WRITE, 0, cookie, offset, len))
                .await;
            client.send(&vec![0x25; len as usize]).await;
        }
        client.send(&request(99, 0, 5, 0, 512)).await;
        client.send(&request(CMD_FLUSH, 0, 6, 0, 0)).await;
    };
    sender.await;
    assert_eq!(client.reply(0).await, failed(1, Errno::Enospc));
    for cookie in 2..=5 {
        assert_eq!(client.reply(0).await, failed(cookie, Errno::Einval));
    }
    assert_eq!(client.reply(0).await.error, 0);
    assert_eq!(export.started.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn no_more_requests_are_started_than_the_limit() {
    let limits = Limits {
        requests: 3,
        ..Limits::default()
    };
    let (export, mut client) = attach(limits).await;
    for cookie in 0..10 {
        client
            .send(&request(CMD_CACHE, 0, cookie, GATED, 512))
            .await;
    }
    export.until_started(3).await;
    for _ in 0..100 {
        yield_now().await;
    }
    assert_eq!(export.started.load(Ordering::SeqCst), 3);
    for done in 1..=10 {
        export.gate.add_permits(1);
        client.reply(0).await;
        export.until_started((done + 3).min(10)).await;
    }
}

#[tokio::test]
async fn payload_is_bounded_and_a_request_over_the_bound_is_served_alone() {
    let limits = Limits {
        bytes: 10_000,
        ..Limits::default()
    };
    let (export, mut client) = attach(limits).await;
    for (cookie, len) in [(1, 4096), (2, 4096), (3, 20480), (4, 512)] {
        client.send(&request(CMD_READ, 0, cookie, GATED, len)).await;
    }
    for (started, cookie, len) in [(2, 1, 4096), (2, 2, 4096), (3, 3, 20480), (4, 4, 512)] {
        export.until_started(started).await;
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(export.started.load(Ordering::SeqCst), started);
        export.gate.add_permits(1);
        assert_eq!(client.reply(len).await.cookie, cookie);
    }
}

#[tokio::test]
async fn a_client_that_sends_without_reading_is_stopped_at_the_limit() {
    let limits = Limits {
        requests: 8,
        ..Limits::default()
    };
    let (export, mut client) = attach(limits).await;
    // Far more than both pipes hold: the client's sending must come to a stand.
    let flood = async {
        loop {
            client.send(&request(CMD_READ, 0, 1, 0, 1 << 20)).await;
        }
    };
    tokio::select! {
        biased;
        () = flood => unreachable!("an endless loop"),
        () = async { for _ in 0..10_000 { yield_now().await } } => {}
    }
    assert!(export.started.load(Ordering::SeqCst) <= 9);
}

#[tokio::test]
async fn bytes_that_are_no_request_end_the_connection_after_the_answers_due() {
    let (_, mut client) = attach(Limits::default()).await;
    let mut bytes = request(CMD_READ, 0, 1, 0, 512);
    bytes.extend([0x42; 28]);
    client.send(&bytes).await;
    assert_eq!(client.reply(512).await.cookie, 1);
    let end = client.end().await;
    assert!(matches!(end, Err(ServeError::StreamLost(_))));
}

#[tokio::test]
async fn a_flush_is_called_after_every_write_answered_before_it() {
    let (export, mut client) = attach(Limits::default()).await;
    for round in 0..50u64 {
        client.send(&request(CMD_WRITE, 0, round, 0, 512)).await;
        client.send(&[7; 512]).await;
        client.reply(0).await;
        client.send(&request(CMD_FLUSH, 0, round, 0, 0)).await;
        client.reply(0).await;
    }
    let flushed = export.flushed_after.lock().unwrap();
    assert_eq!(*flushed, (1..=50).collect::<Vec<_>>());
}
