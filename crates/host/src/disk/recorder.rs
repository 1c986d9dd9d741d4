//! Writing down what a guest asks of a disk, while somebody wants it.
//!
//! A request costs one atomic load while nobody does. Otherwise it is put, with its time, into a buffer of bounded size,
//! under a lock that is held for nothing else but to take the buffer away. A thread of the recording's own does
//! that, encodes and writes: the guest waits for no file. If the thread does not keep up the requests that found
//! no room are counted, and stand in the trace as a gap.
//!
//! A recording outlives neither its disk nor whoever asked for it. However it ends, the thread finishes the file; only a
//! daemon that ends at once leaves a trace that is cut off, and says so when it is read.

use std::fs::File;
use std::io::BufWriter;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use whimbrel_volume::trace::format::Writer;
use whimbrel_volume::trace::{Kind, Record, TraceError};

use crate::api::types::{RecordingEnd, RecordingProgress};

/// Requests that wait to be written: 2 MiB. Those that find no room are counted as lost.
const BUFFER: usize = 65_536;

/// How often the buffer is emptied, if it is not half full before.
const EVERY: Duration = Duration::from_millis(50);

/// Bytes after which a recording ends by itself: 130 million requests or so. Whoever forgets one shall not find
/// the guests' disks full.
pub const MOST: u64 = 1 << 30;

/// Where a disk's requests go while they are recorded.
#[derive(Default)]
pub struct Recording {
    is_on: AtomicBool,
    now: Mutex<Option<Arc<Recorder>>>,
}

impl Recording {
    /// What a request costs while nobody records is this load.
    #[inline]
    pub fn note(&self, kind: Kind, offset: u64, len: u64) {
        if self.is_on.load(Ordering::Relaxed)
            && let Some(recorder) = &*self.now()
        {
            recorder.note(kind, offset, len);
        }
    }

    /// Begins one, if none is under way.
    pub fn begin(&self) -> Option<Arc<Recorder>> {
        let mut now = self.now();
        if now.as_ref().is_some_and(|recorder| !recorder.has_ended()) {
            return None;
        }
        let recorder = Arc::new(Recorder::new());
        *now = Some(recorder.clone());
        self.is_on.store(true, Ordering::Relaxed);
        Some(recorder)
    }

    /// Ends the one that is under way; whether there was one.
    pub fn end(&self, why: RecordingEnd) -> bool {
        self.is_on.store(false, Ordering::Relaxed);
        let ended = self.now().take();
        ended.is_some_and(|recorder| recorder.end(why))
    }

    /// Ends this one, if it is still under way.
    pub fn end_of(&self, recorder: &Arc<Recorder>, why: RecordingEnd) {
        recorder.end(why);
        let mut now = self.now();
        if now.as_ref().is_some_and(|at| Arc::ptr_eq(at, recorder)) {
            self.is_on.store(false, Ordering::Relaxed);
            *now = None;
        }
    }

    fn now(&self) -> MutexGuard<'_, Option<Arc<Recorder>>> {
        self.now.lock().expect("no holder of this lock panics")
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.end(RecordingEnd::Gone);
    }
}

/// One recording.
pub struct Recorder {
    begun: Instant,
    buffer: Mutex<Buffer>,
    has_work: Condvar,
}

struct Buffer {
    records: Vec<Record>,
    /// Requests that found no room since the buffer was emptied, and when the first of them came.
    lost: u64,
    lost_at_us: u64,
    ended: Option<RecordingEnd>,
}

impl Recorder {
    fn new() -> Recorder {
        Recorder {
            begun: Instant::now(),
            buffer: Mutex::new(Buffer {
                records: Vec::with_capacity(BUFFER),
                lost: 0,
                lost_at_us: 0,
                ended: None,
            }),
            has_work: Condvar::new(),
        }
    }

    fn buffer(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().expect("no holder of this lock panics")
    }

    fn note(&self, kind: Kind, offset: u64, len: u64) {
        let mut buffer = self.buffer();
        if buffer.ended.is_some() || (kind.has_place() && len == 0) {
            return;
        }
        // Under the lock, so that times only grow.
        let at_us = self.begun.elapsed().as_micros() as u64;
        if buffer.records.len() == BUFFER {
            if buffer.lost == 0 {
                buffer.lost_at_us = at_us;
            }
            buffer.lost += 1;
            return;
        }
        buffer.records.push(Record {
            at_us,
            kind,
            offset,
            len,
        });
        if buffer.records.len() == BUFFER / 2 {
            self.has_work.notify_one();
        }
    }

    fn has_ended(&self) -> bool {
        self.buffer().ended.is_some()
    }

    /// Nothing is recorded from here on; whether it was until now.
    fn end(&self, why: RecordingEnd) -> bool {
        let mut buffer = self.buffer();
        let was_on = buffer.ended.is_none();
        buffer.ended.get_or_insert(why);
        self.has_work.notify_one();
        was_on
    }

    /// Writes what is recorded until that ends, and finishes the file; durable when this returns. Takes a thread.
    pub fn write(
        &self,
        file: File,
        told: impl Fn(RecordingProgress),
    ) -> Result<(RecordingProgress, RecordingEnd), TraceError> {
        let mut writer = Writer::new(BufWriter::new(file))?;
        let mut so_far = RecordingProgress::default();
        let mut taken = Vec::with_capacity(BUFFER);
        loop {
            let (lost, lost_at_us, ended) = {
                let buffer = self.buffer();
                let waits = |buffer: &mut Buffer| {
                    buffer.ended.is_none() && buffer.records.len() < BUFFER / 2
                };
                let (mut buffer, _) = self
                    .has_work
                    .wait_timeout_while(buffer, EVERY, waits)
                    .expect("no holder of this lock panics");
                std::mem::swap(&mut buffer.records, &mut taken);
                let lost = std::mem::take(&mut buffer.lost);
                (lost, buffer.lost_at_us, buffer.ended)
            };
            for record in taken.drain(..) {
                writer.push(&record)?;
                so_far.requests += 1;
            }
            if lost > 0 {
                writer.push(&Record {
                    at_us: lost_at_us,
                    kind: Kind::Gap,
                    offset: 0,
                    len: lost,
                })?;
                so_far.lost += lost;
            }
            so_far.bytes = writer.written();
            so_far.elapsed_ms = self.begun.elapsed().as_millis() as u64;
            told(so_far);
            if let Some(why) = ended {
                let file = writer.finish()?.into_inner().map_err(|e| e.into_error())?;
                file.sync_all()?;
                so_far.bytes = file.metadata()?.len();
                return Ok((so_far, why));
            }
            if so_far.bytes >= MOST {
                self.end(RecordingEnd::Full);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Disk, MachineDisks, Mode};
    use std::io::BufReader;
    use std::path::Path;
    use tokio_util::sync::CancellationToken;
    use whimbrel_nbd::{Limits, Server};
    use whimbrel_volume::backend::{Backend, Format};
    use whimbrel_volume::pool::{Pool, PoolSize};
    use whimbrel_volume::trace::format::Reader;

    fn read(path: &Path) -> Vec<Record> {
        let mut reader = Reader::new(BufReader::new(File::open(path).unwrap())).unwrap();
        std::iter::from_fn(|| reader.next_record().unwrap()).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_client_asks_of_the_export_stands_in_the_trace_in_its_order() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool::start(PoolSize::default()).unwrap();
        let path = folder.path().join("disk");
        let file = Backend::create(&pool, &path, Format::Raw, 8 << 20).await;
        let disk = Disk::new("disk".into(), 8 << 20, Arc::new(file.unwrap()), Mode::Open);
        let disk = Arc::new(disk);
        let server = Server::new(
            Arc::new(MachineDisks::new([disk.clone()])),
            Limits::default(),
        );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = CancellationToken::new();
        let _stopped = stop.clone().drop_guard();
        tokio::spawn(async move { server.serve_tcp(listener, stop).await });
        let ask = async |commands: &[&str]| {
            let mut io = tokio::process::Command::new("qemu-io");
            io.args(["-f", "raw", "-t", "none", "-d", "unmap"])
                .arg(format!("nbd://127.0.0.1:{port}/disk"))
                .args(commands.iter().flat_map(|c| ["-c", *c]))
                .kill_on_drop(true);
            assert!(io.output().await.unwrap().status.success());
        };
        ask(&["write 0 4k"]).await;
        let recorder = disk.recording().begin().unwrap();
        assert!(disk.recording().begin().is_none(), "one at a time");
        let trace = folder.path().join("trace");
        let (to, by) = (File::create_new(&trace).unwrap(), recorder.clone());
        let writing = std::thread::spawn(move || by.write(to, |_| {}));
        let commands = ["write 64k 8k", "flush", "read 4k 512", "write -z 1M 64k"];
        ask(&commands).await;
        ask(&["discard 2M 1M", "write -f 3M 4k"]).await;
        disk.recording().end_of(&recorder, RecordingEnd::Asked);
        ask(&["write 0 4k"]).await;
        let (told, why) = writing.join().unwrap().unwrap();
        let all = read(&trace);
        assert_eq!((told.requests, told.lost), (all.len() as u64, 0));
        assert_eq!(why, RecordingEnd::Asked);
        assert_eq!(told.bytes, std::fs::metadata(&trace).unwrap().len());
        assert!(all.is_sorted_by_key(|record| record.at_us));
        // What a client reads to find out what it has before it, and flushes as it closes, is its own business.
        let places: Vec<_> = all
            .iter()
            .filter(|r| r.kind != Kind::Flush && !(r.kind == Kind::Read && r.offset == 0))
            .map(|r| (r.kind, r.offset, r.len))
            .collect();
        let expected = [
            (Kind::Write, 64 << 10, 8 << 10),
            (Kind::Read, 4 << 10, 512),
            (Kind::Zero, 1 << 20, 64 << 10),
            (Kind::Trim, 2 << 20, 1 << 20),
            (Kind::Write, 3 << 20, 4 << 10),
        ];
        assert_eq!(places, expected);
        assert!(all.iter().any(|r| r.kind == Kind::Flush));
    }

    #[test]
    fn what_finds_no_room_is_a_gap_in_the_trace() {
        let recording = Recording::default();
        let recorder = recording.begin().unwrap();
        for n in 0..BUFFER as u64 + 7 {
            recording.note(Kind::Read, n * 512, 512);
        }
        // The disk goes.
        drop(recording);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        let told = recorder.write(File::create_new(&path).unwrap(), |_| {});
        let (told, why) = told.unwrap();
        assert_eq!((told.requests, told.lost), (BUFFER as u64, 7));
        assert_eq!(why, RecordingEnd::Gone);
        let all = read(&path);
        let last = all.last().unwrap();
        assert_eq!((last.kind, last.len), (Kind::Gap, 7));
    }
}
