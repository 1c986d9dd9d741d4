//! A guest's reads, without a guest: requests of 4 KiB through the machine's export, at their times whatever the
//! answers take.
//!
//! Units are drawn from the last part of the disk, which push, ascending, reaches last. Whether one was absent
//! the client cannot see; but what was absent cannot have come in less than the link's round trip, and what
//! was there did. So whoever evaluates leaves out what took less.
//!
//! The protocol is NBD's, in its simplest form: fixed newstyle, `NBD_OPT_EXPORT_NAME`, simple replies.

use crate::pair::PairError;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use whimbrel_workload::chance::Rng;

const UNIT: u64 = 4096;

/// The share of the disk, at its end, that is read.
const LAST: f64 = 0.45;

/// How long answers are waited for after the last request.
const LATE: Duration = Duration::from_secs(5);

/// One read that was answered.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub asked: Instant,
    pub took: Duration,
}

/// Reads until told to stop.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    stream: UnixStream,
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Instant>>>,
    asking: JoinHandle<io::Result<()>>,
    hearing: JoinHandle<io::Result<Vec<(usize, Instant)>>>,
}

impl Reader {
    /// `per_second` reads of `export` on the unix socket `path`, from now on.
    pub fn start(path: &Path, export: &str, per_second: f64) -> Result<Reader, PairError> {
        let io = |action| PairError::io(action, path);
        let mut stream = UnixStream::connect(path).map_err(io("connect to"))?;
        let size = greet(&mut stream, export).map_err(io("greet"))?;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let to = stream.try_clone().map_err(io("share"))?;
        let from = stream.try_clone().map_err(io("share"))?;
        let asking = std::thread::spawn({
            let (asked, stop) = (asked.clone(), stop.clone());
            move || ask(to, size, per_second, &asked, &stop)
        });
        let hearing = std::thread::spawn(move || hear(from));
        Ok(Reader {
            path: path.to_owned(),
            stream,
            stop,
            asked,
            asking,
            hearing,
        })
    }

    /// What was answered, in the order of the answers.
    pub fn stop(self) -> Result<Vec<Sample>, PairError> {
        self.stop.store(true, Ordering::Relaxed);
        let panicked = "a panic there is a fault of this program";
        let asked = self.asking.join().expect(panicked);
        asked.map_err(PairError::io("ask", &self.path))?;
        let deadline = Instant::now() + LATE;
        while !self.hearing.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.stream.shutdown(Shutdown::Both);
        let heard = self.hearing.join().expect(panicked);
        let heard = heard.map_err(PairError::io("hear", &self.path))?;
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let sample = |(cookie, at): (usize, Instant)| {
            let asked = asked[cookie];
            let took = at - asked;
            Sample { asked, took }
        };
        Ok(heard.into_iter().map(sample).collect())
    }
}

fn wrong(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The handshake; the export's size.
fn greet(stream: &mut UnixStream, export: &str) -> io::Result<u64> {
    let mut hello = [0; 18];
    stream.read_exact(&mut hello)?;
    if &hello[..16] != b"NBDMAGICIHAVEOPT" {
        return Err(wrong("it is no NBD server"));
    }
    // Fixed newstyle, no zeroes after the answer.
    let mut ask = vec![0, 0, 0, 3];
    ask.extend(b"IHAVEOPT");
    ask.extend(1_u32.to_be_bytes());
    ask.extend((export.len() as u32).to_be_bytes());
    ask.extend(export.as_bytes());
    stream.write_all(&ask)?;
    let mut answer = [0; 10];
    stream.read_exact(&mut answer)?;
    let (size, _flags) = answer.split_at(8);
    Ok(u64::from_be_bytes(size.try_into().expect("eight bytes")))
}

fn ask(
    mut stream: UnixStream,
    size: u64,
    per_second: f64,
    asked: &Mutex<Vec<Instant>>,
    stop: &AtomicBool,
) -> io::Result<()> {
    let units = size / UNIT;
    let readable = ((units as f64 * LAST) as u64).max(1);
    let mut rng = Rng::new(size, 1);
    let mut due = Instant::now();
    let mut cookie = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let unit = units - 1 - rng.below(readable);
        let mut request = Vec::with_capacity(28);
        request.extend(0x2560_9513_u32.to_be_bytes());
        request.extend([0; 4]);
        request.extend(cookie.to_be_bytes());
        request.extend((unit * UNIT).to_be_bytes());
        request.extend((UNIT as u32).to_be_bytes());
        let mut times = asked.lock().unwrap_or_else(PoisonError::into_inner);
        times.push(Instant::now());
        drop(times);
        stream.write_all(&request)?;
        cookie += 1;
        // Not in step with anything that happens regularly.
        due += Duration::from_secs_f64((0.5 + rng.unit()) / per_second);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    // NBD_CMD_DISC: the server answers what is under way and closes.
    let mut end = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2];
    end.extend([0; 20]);
    stream.write_all(&end)
}

fn hear(mut stream: UnixStream) -> io::Result<Vec<(usize, Instant)>> {
    let mut heard = Vec::new();
    let mut head = [0; 16];
    let mut content = [0; UNIT as usize];
    loop {
        match stream.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(heard),
            other => other?,
        }
        if head[..8] != [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] {
            return Err(wrong("a read failed"));
        }
        stream.read_exact(&mut content)?;
        let cookie = u64::from_be_bytes(head[8..].try_into().expect("eight bytes"));
        heard.push((cookie as usize, Instant::now()));
    }
}
