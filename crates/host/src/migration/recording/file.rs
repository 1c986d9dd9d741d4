//! The file `timeline` of a migration's folder: lines as those of the journal, each sealed by its checksum.
//!
//! They are appended as they come and never fsynced: a daemon that dies loses none, a host that loses power the last
//! ones. When the timeline is thinned the file is replaced whole. So it is never longer than some thousand lines.
//! Lines that are torn or damaged are left out and counted; nobody but a person reads this, and what can be read
//! is worth more than none.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use whimbrel_engine::timeline::{FINEST_MS, Stretch};

use crate::api::types::{Event, TimelineSpace, TimelineView};
use crate::migration::record::{seal, unseal};
use crate::state::{StateDir, StateError, Timestamp};

/// The file's name.
pub const TIMELINE: &str = "timeline";

/// No timeline comes near this: the bounds of its parts make some MiB. What is beyond is not read.
const MAX_FILE: u64 = 16 << 20;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The first.
    Began {
        at: Timestamp,
        resolution_ms: u64,
    },
    /// The next space; or one that is there already, as it is now.
    Space(TimelineSpace),
    Event(Event),
    Stretch(Box<Stretch>),
    /// In no file: all was thinned, and is to be written anew.
    #[serde(skip)]
    Anew,
}

/// All that a file says.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    pub started: Timestamp,
    pub resolution_ms: u64,
    pub spaces: Vec<TimelineSpace>,
    pub events: Vec<Event>,
    pub stretches: Vec<Stretch>,
    pub damaged_lines: usize,
}

impl Kept {
    fn new(started: Timestamp) -> Kept {
        Kept {
            started,
            resolution_ms: FINEST_MS,
            spaces: Vec::new(),
            events: Vec::new(),
            stretches: Vec::new(),
            damaged_lines: 0,
        }
    }

    fn began(&self) -> Line {
        Line::Began {
            at: self.started,
            resolution_ms: self.resolution_ms,
        }
    }

    /// What can be read of a file's text; `otherwise` is when it began if it does not say.
    fn parse(text: &[u8], otherwise: Timestamp) -> Kept {
        let mut kept = Kept::new(otherwise);
        for line in text.split_inclusive(|&b| b == b'\n') {
            let whole = line.strip_suffix(b"\n");
            let json = whole.and_then(unseal);
            match json.and_then(|json| serde_json::from_str(json).ok()) {
                Some(line) => kept.take(line),
                None => kept.damaged_lines += 1,
            }
        }
        kept
    }

    fn take(&mut self, line: Line) {
        match line {
            Line::Began { at, resolution_ms } => {
                self.started = at;
                self.resolution_ms = resolution_ms.max(1);
            }
            Line::Space(space) => {
                let known = |s: &&mut TimelineSpace| s.name == space.name && s.kind == space.kind;
                match self.spaces.iter_mut().find(known) {
                    Some(there) => *there = space,
                    None => self.spaces.push(space),
                }
            }
            Line::Event(event) => self.events.push(event),
            Line::Stretch(stretch) => self.stretches.push(*stretch),
            Line::Anew => {}
        }
    }
}

impl From<Kept> for TimelineView {
    fn from(mut kept: Kept) -> TimelineView {
        // What was heard of late happened before what was written by then.
        kept.events.sort_by_key(|event| event.at_ms);
        TimelineView {
            started: kept.started,
            resolution_ms: kept.resolution_ms,
            spaces: kept.spaces,
            events: kept.events,
            stretches: kept.stretches,
            damaged_lines: kept.damaged_lines,
        }
    }
}

fn text_of(path: &Path) -> Result<Option<Vec<u8>>, StateError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StateError::io("read", path)(error)),
    };
    let mut text = Vec::new();
    let read = file.take(MAX_FILE).read_to_end(&mut text);
    read.map_err(StateError::io("read", path))?;
    Ok(Some(text))
}

/// What the folder's timeline says; nothing if there is none.
pub fn read(folder: &Path, started: Timestamp) -> Result<Option<Kept>, StateError> {
    let text = text_of(&folder.join(TIMELINE))?;
    Ok(text.map(|text| Kept::parse(&text, started)))
}

/// The file, to write to.
pub struct TimelineFile {
    path: PathBuf,
    file: File,
}

impl TimelineFile {
    /// Opens the folder's timeline, or makes one of a migration that began then. A torn end is cut off.
    pub fn open(folder: &Path, began: Timestamp) -> Result<(TimelineFile, Kept), StateError> {
        let path = folder.join(TIMELINE);
        let text = text_of(&path)?.unwrap_or_default();
        let whole = text.iter().rposition(|&b| b == b'\n').map_or(0, |n| n + 1);
        let kept = Kept::parse(&text[..whole], began);
        let file = append_to(&path)?;
        let cut = file.set_len(whole as u64);
        cut.map_err(StateError::io("write", &path))?;
        let mut file = TimelineFile { path, file };
        if whole == 0 {
            file.append(&[kept.began()])?;
        }
        Ok((file, kept))
    }

    pub fn append(&mut self, lines: &[Line]) -> Result<(), StateError> {
        let text: String = lines.iter().map(line_of).collect();
        // Half a line, if the disk is full, is a damaged one; the next begins on its own.
        let written = self.file.write_all(text.as_bytes());
        written
            .inspect_err(|_| {
                let _ = self.file.write_all(b"\n");
            })
            .map_err(StateError::io("write", &self.path))
    }

    /// Writes all anew.
    pub fn replace(&mut self, kept: &Kept) -> Result<(), StateError> {
        let mut text = line_of(&kept.began());
        let spaces = kept.spaces.iter().cloned().map(Line::Space);
        let events = kept.events.iter().cloned().map(Line::Event);
        let stretches = kept.stretches.iter().cloned().map(Line::stretch);
        spaces
            .chain(events)
            .chain(stretches)
            .for_each(|line| text += &line_of(&line));
        StateDir::replace_file(&self.path, text.as_bytes())?;
        self.file = append_to(&self.path)?;
        Ok(())
    }
}

fn append_to(path: &Path) -> Result<File, StateError> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    options.open(path).map_err(StateError::io("write", path))
}

fn line_of(line: &Line) -> String {
    if *line == Line::Anew {
        return String::new();
    }
    seal(&serde_json::to_string(line).expect("a line is plain data"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::Happened;
    use whimbrel_engine::space::SpaceKind;
    use whimbrel_engine::switchover::Phase;

    fn lines() -> Vec<Line> {
        let stretch = |n: u64| {
            Line::stretch(Stretch {
                from_ms: n * 250,
                to_ms: n * 250 + 250,
                ram_bytes: n,
                ..Stretch::default()
            })
        };
        vec![
            Line::Space(TimelineSpace {
                name: "root".to_string(),
                kind: SpaceKind::Disk,
                units_total: 7,
            }),
            Line::Event(Event {
                at_ms: 3,
                what: Happened::Phase(Phase::Copy),
            }),
            stretch(0),
            Line::Event(Event {
                at_ms: 4,
                what: Happened::Told("a <b> & \"c\"\n".to_string()),
            }),
            stretch(1),
        ]
    }

    fn now() -> Timestamp {
        Timestamp::from_unix(1_700_000_000)
    }

    fn written() -> (tempfile::TempDir, Kept) {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (mut file, _) = TimelineFile::open(folder.path(), now()).expect("fresh");
        file.append(&lines()).expect("room");
        let kept = read(folder.path(), Timestamp::now())
            .expect("readable")
            .expect("there");
        (folder, kept)
    }

    #[test]
    fn lines_are_read_back() {
        let (folder, kept) = written();
        assert_eq!(kept.started, now());
        assert_eq!(
            (kept.spaces.len(), kept.events.len(), kept.stretches.len()),
            (1, 2, 2)
        );
        assert_eq!(kept.damaged_lines, 0);
        let (_, again) = TimelineFile::open(folder.path(), Timestamp::now()).expect("whole");
        assert_eq!(again, kept);
    }

    #[test]
    fn replaced_whole_it_says_the_same_and_goes_on() {
        let (folder, kept) = written();
        let (mut file, _) = TimelineFile::open(folder.path(), now()).expect("whole");
        file.replace(&kept).expect("room");
        assert_eq!(read(folder.path(), now()).expect("readable"), Some(kept));
        file.append(&lines()[2..3]).expect("room");
        let then = read(folder.path(), now())
            .expect("readable")
            .expect("there");
        assert_eq!(then.stretches.len(), 3);
    }

    #[test]
    fn a_torn_end_is_told_of_and_cut_off() {
        let (folder, kept) = written();
        let path = folder.path().join(TIMELINE);
        let text = std::fs::read(&path).expect("written");
        for cut in [1, 5, 40] {
            std::fs::write(&path, &text[..text.len() - cut]).expect("room");
            let torn = read(folder.path(), now())
                .expect("readable")
                .expect("there");
            assert_eq!(torn.damaged_lines, 1, "cut by {cut}");
            assert_eq!(torn.stretches, kept.stretches[..1]);
            let (mut file, _) = TimelineFile::open(folder.path(), now()).expect("torn");
            file.append(&lines()[4..]).expect("room");
            assert_eq!(std::fs::read(&path).expect("written"), text);
        }
    }

    #[test]
    fn damage_in_the_middle_hides_nothing_else() {
        let (folder, kept) = written();
        let path = folder.path().join(TIMELINE);
        let mut text = std::fs::read(&path).expect("written");
        let second = text.iter().position(|&b| b == b'\n').expect("lines") + 1;
        text[second + 30] ^= 1;
        std::fs::write(&path, &text).expect("room");
        let read = read(folder.path(), now())
            .expect("readable")
            .expect("there");
        assert_eq!((read.damaged_lines, read.spaces.len()), (1, 0));
        assert_eq!(read.stretches, kept.stretches);
    }

    #[test]
    fn no_timeline_is_none() {
        let folder = tempfile::tempdir().expect("temporary folder");
        assert_eq!(read(folder.path(), now()).expect("readable"), None);
    }
}
