//! A migration's own journal: the engine's [`Record`]s, durable before they are acted on.
//!
//! One line a record: 16 hex digits of xxh3 over the rest, a space, JSON. A line that was torn by a
//! crash is the last one and was not acted on, so it is dropped; damage before that is an error, because
//! what it said decides who owns the machine.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use whimbrel_engine::codec::Policy;
use whimbrel_engine::delta::Policy as Delta;
use whimbrel_engine::switchover::Record;
use whimbrel_qemu::stream::StreamLayout;
use xxhash_rust::xxh3::xxh3_64;

use crate::state::{LatencyBound, RateLimit, StateDir, StateError};

const FILE: &str = "journal";

/// An empty file: nothing is left to do, whatever the journal says.
const OVER: &str = "over";

/// What RAM looks like, for a daemon that takes the migration up.
const LAYOUT: &str = "layout.json";

/// What the migration may send, as the operator said last.
const BANDWIDTH: &str = "bandwidth";

/// How long the guest's requests may take.
const LATENCY: &str = "guest-latency";

/// How the migration writes content, as the operator wants it.
const COMPRESS: &str = "compress";

/// Whether RAM may go as deltas.
const DELTA: &str = "delta";

/// Keeps the migration's limit, for a daemon that takes it up.
pub fn save_bandwidth(folder: &Path, limit: RateLimit) -> Result<(), StateError> {
    keep(folder, BANDWIDTH, limit)
}

/// The limit that was kept; none if there is nothing, or nothing that can be understood.
pub fn read_bandwidth(folder: &Path) -> RateLimit {
    kept(folder, BANDWIDTH)
}

/// Keeps the bound on the guest's latency, for a daemon that takes the migration up.
pub fn save_latency(folder: &Path, bound: LatencyBound) -> Result<(), StateError> {
    keep(folder, LATENCY, bound)
}

/// The bound that was kept; the default if there is nothing, or nothing that can be understood.
pub fn read_latency(folder: &Path) -> LatencyBound {
    kept(folder, LATENCY)
}

/// Keeps how content is written, for a daemon that takes the migration up.
pub fn save_compress(folder: &Path, compress: Policy) -> Result<(), StateError> {
    keep(folder, COMPRESS, compress)
}

/// What was kept; the default if there is nothing, or nothing that can be understood.
pub fn read_compress(folder: &Path) -> Policy {
    kept(folder, COMPRESS)
}

/// Keeps whether RAM may go as deltas, for a daemon that takes the migration up.
pub fn save_delta(folder: &Path, delta: Delta) -> Result<(), StateError> {
    keep(folder, DELTA, delta)
}

/// What was kept; the default if there is nothing, or nothing that can be understood.
pub fn read_delta(folder: &Path) -> Delta {
    kept(folder, DELTA)
}

/// Writes down one of the operator's wishes, in a file of its own.
fn keep(folder: &Path, file: &str, wish: impl Display) -> Result<(), StateError> {
    StateDir::replace_file(&folder.join(file), wish.to_string().as_bytes())
}

fn kept<T: FromStr + Default>(folder: &Path, file: &str) -> T {
    let text = StateDir::read_text(&folder.join(file)).ok().flatten();
    let wish = text.and_then(|text| text.trim().parse().ok());
    wish.unwrap_or_default()
}

/// Whether nothing is left to do of the migration in this folder.
pub fn is_over(folder: &Path) -> bool {
    folder.join(OVER).exists()
}

/// Nothing is left to do. Should this not be durable, the next daemon finds out again.
pub fn mark_over(folder: &Path) {
    if let Err(error) = StateDir::replace_file(&folder.join(OVER), b"") {
        tracing::warn!(%error, "a migration that is over cannot be marked so");
    }
}

/// Keeps what a restarted daemon must know of RAM.
pub fn save_layout(folder: &Path, layout: &StreamLayout) -> Result<(), StateError> {
    let text = serde_json::to_vec(layout).expect("a layout is plain data");
    StateDir::replace_file(&folder.join(LAYOUT), &text)
}

/// What was kept of RAM; `None` if there is nothing, or nothing that can be understood.
pub fn read_layout(folder: &Path) -> Option<StreamLayout> {
    let text = StateDir::read_text(&folder.join(LAYOUT)).ok()??;
    serde_json::from_str(&text)
        .inspect_err(|error| tracing::error!(%error, "the layout of RAM cannot be read"))
        .ok()
}

/// A journal that cannot be written or understood.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: line {line} is damaged", path.display())]
    Damaged { path: PathBuf, line: usize },
}

/// The journal of one migration on one host.
#[derive(Debug)]
pub struct MigrationJournal {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    len: u64,
    records: Vec<Record>,
}

impl MigrationJournal {
    /// Opens or makes the journal in a migration's folder.
    ///
    /// # Errors
    /// [`RecordError::Damaged`] if a line before the last is not what was written.
    pub fn open(folder: &Path) -> Result<Self, RecordError> {
        let path = folder.join(FILE);
        let io = |source| RecordError::Io {
            path: path.clone(),
            source,
        };
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(io(error)),
        };
        let (records, good) = parse(&text).map_err(|line| RecordError::Damaged {
            path: path.clone(),
            line,
        })?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(io)?;
        file.set_len(good as u64).map_err(io)?;
        if text.is_empty() {
            File::open(folder).and_then(|f| f.sync_all()).map_err(io)?;
        }
        Ok(MigrationJournal {
            path,
            file,
            len: good as u64,
            records,
        })
    }

    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Appends and makes durable. Blocks for the disk: a few milliseconds.
    pub fn append(&mut self, record: Record) -> Result<(), RecordError> {
        let json = serde_json::to_string(&record).expect("a record is plain data");
        let line = seal(&json);
        let written = self
            .file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // Half a line must not stand before the next; if even this fails the disk is beyond us.
            let _ = self.file.set_len(self.len);
            return Err(RecordError::Io {
                path: self.path.clone(),
                source,
            });
        }
        self.len += line.len() as u64;
        self.records.push(record);
        Ok(())
    }
}

/// What a migration's journal says, without touching it, and whether its last line is torn.
///
/// # Errors
/// As [`MigrationJournal::open`].
pub fn read_journal(folder: &Path) -> Result<(Vec<Record>, bool), RecordError> {
    let path = folder.join(FILE);
    match std::fs::read(&path) {
        Ok(text) => match parse(&text) {
            Ok((records, good)) => Ok((records, good < text.len())),
            Err(line) => Err(RecordError::Damaged { path, line }),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok((Vec::new(), false)),
        Err(source) => Err(RecordError::Io { path, source }),
    }
}

/// When the journal was last written to.
pub fn journal_written(folder: &Path) -> Option<std::time::SystemTime> {
    std::fs::metadata(folder.join(FILE)).ok()?.modified().ok()
}

/// The records, and how many bytes of the text they take; or the number of the line that is damaged.
fn parse(text: &[u8]) -> Result<(Vec<Record>, usize), usize> {
    let mut records = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let Some(end) = rest.iter().position(|&b| b == b'\n') else {
            break;
        };
        match parse_line(&rest[..end]) {
            Some(record) => records.push(record),
            None if at + end + 1 == text.len() => break,
            None => return Err(records.len() + 1),
        }
        at += end + 1;
    }
    Ok((records, at))
}

fn parse_line(line: &[u8]) -> Option<Record> {
    serde_json::from_str(unseal(line)?).ok()
}

/// A line with its checksum and its end.
pub(super) fn seal(json: &str) -> String {
    format!("{:016x} {json}\n", xxh3_64(json.as_bytes()))
}

/// What a line, without its end, says; nothing if it is not what was written.
pub(super) fn unseal(line: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(line).ok()?;
    let (sum, json) = line.split_once(' ')?;
    let sum = u64::from_str_radix(sum, 16).ok()?;
    (sum == xxh3_64(json.as_bytes())).then_some(json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_engine::switchover::Epoch;

    const RECORDS: [Record; 2] = [
        Record::Started { epoch: Epoch(3) },
        Record::Granted { epoch: Epoch(4) },
    ];

    fn written() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut journal = MigrationJournal::open(folder.path()).expect("fresh");
        for record in RECORDS {
            journal.append(record).expect("room");
        }
        let path = folder.path().join(FILE);
        (folder, path)
    }

    #[test]
    fn records_are_read_back() {
        let (folder, _) = written();
        let journal = MigrationJournal::open(folder.path()).expect("whole");
        assert_eq!(journal.records(), RECORDS);
    }

    #[test]
    fn a_torn_last_line_is_dropped_wherever_it_is_torn() {
        let (folder, path) = written();
        let text = std::fs::read(&path).expect("written");
        let first = text.iter().position(|&b| b == b'\n').expect("two lines") + 1;
        for cut in first..text.len() {
            std::fs::write(&path, &text[..cut]).expect("room");
            let mut journal = MigrationJournal::open(folder.path()).expect("torn, not damaged");
            assert_eq!(journal.records(), &RECORDS[..1], "cut at {cut}");
            journal.append(RECORDS[1]).expect("room");
            assert_eq!(std::fs::read(&path).expect("written"), text);
        }
    }

    #[test]
    fn damage_before_the_last_line_is_an_error() {
        let (folder, path) = written();
        let mut text = std::fs::read(&path).expect("written");
        text[20] ^= 1;
        std::fs::write(&path, &text).expect("room");
        assert!(matches!(
            MigrationJournal::open(folder.path()),
            Err(RecordError::Damaged { line: 1, .. })
        ));
    }
}
