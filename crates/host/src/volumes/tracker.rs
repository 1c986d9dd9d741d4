//! What changed of a volume since its last snapshot.
//!
//! A bit for each extent, set before the guest's write, its zeroing or its discard is done: one look at a
//! word in memory for a write, an exchange the first time. While the daemon runs, and the volume's guest writes
//! through it, that is all.
//!
//! It is believed only as long as nobody can have written past it:
//!
//! - When the last user of the volume is gone, the state of its file is remembered (inode, length, times of its
//!   last changes). If it is another one when the volume is opened again, somebody else was there.
//! - When the daemon ends in good order, no write is let in any more, and bits and state are written down, in
//!   `changes` in the volume's folder. The next daemon takes the file away before it believes it. So a daemon
//!   that dies leaves none, and no file that is out of date is ever found.
//! - A volume that is being filled changes without a guest's write. Images and devices do not tell by themselves
//!   that they were changed, so of them nothing is believed once they were closed.
//!
//! Where it is not believed, the next snapshot reads the whole volume, and says why.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use whimbrel_engine::set::UnitSet;
use whimbrel_repository::SnapshotName;
use whimbrel_volume::backend::{Backend, Format};
use xxhash_rust::xxh3::xxh3_64;

use crate::disk::Bits;
use crate::state::{Name, StateDir, VolumeRecord, VolumeUuid};

const FILE: &str = "changes";

/// Begins the file.
const MAGIC: &[u8; 8] = b"WHBLCHG1";

/// The snapshot that changes are counted from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// The repository's identity.
    pub repository: String,
    pub snapshot: SnapshotName,
    /// The snapshot's identity.
    pub uuid: String,
}

/// By what a raw file is known to be as it was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileState {
    inode: (u64, u64),
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileState {
    /// None if the volume does not tell.
    pub fn of(file: &Backend) -> Option<FileState> {
        if file.format() != Format::Raw {
            return None;
        }
        let found = std::fs::metadata(file.path()).ok()?;
        Some(FileState {
            inode: (found.dev(), found.ino()),
            len: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// A volume's changes.
pub struct Tracker {
    uuid: VolumeUuid,
    size: u64,
    path: PathBuf,
    bits: Bits,
    known: Mutex<Known>,
}

struct Known {
    /// Or why nothing is known.
    base: Result<Base, &'static str>,
    users: usize,
    /// The file as the last user left it.
    left: Option<FileState>,
    /// A snapshot has taken the bits and is under way.
    is_lent: bool,
    /// Grows when all that was known is not any more.
    turn: u64,
}

/// What a snapshot takes: the changes up to its instant.
pub struct Lent {
    pub extents: UnitSet,
    turn: u64,
}

/// What is written down.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    uuid: VolumeUuid,
    size: u64,
    base: Base,
    left: FileState,
}

impl Tracker {
    fn fresh(record: &VolumeRecord, path: PathBuf) -> Tracker {
        Tracker {
            uuid: record.uuid,
            size: record.size,
            path,
            bits: Bits::none(record.size),
            known: Mutex::new(Known {
                base: Err("there is no earlier one of it that this daemon knows of"),
                users: 0,
                left: None,
                is_lent: false,
                turn: 0,
            }),
        }
    }

    /// From the file that an earlier daemon left, which is gone then.
    fn open(record: &VolumeRecord, path: PathBuf) -> Tracker {
        let changes = Tracker::fresh(record, path);
        let bytes = match std::fs::read(&changes.path) {
            Ok(bytes) => bytes,
            Err(_) => return changes,
        };
        if let Err(error) = remove_durably(&changes.path) {
            tracing::warn!(file = %changes.path.display(), %error, "what changed of a volume is not believed");
            return changes;
        }
        if let Some((head, extents)) = decode(&bytes)
            && (head.uuid, head.size) == (record.uuid, record.size)
            && extents.capacity() == changes.bits.extents()
        {
            changes.bits.set_all(&extents);
            let mut known = changes.known();
            known.base = Ok(head.base);
            known.left = Some(head.left);
        }
        changes
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no holder of this lock panics")
    }

    /// Before the range is changed.
    pub fn mark(&self, offset: u64, len: u64) {
        self.bits.set_touched(offset, len);
    }

    /// Somebody will write, through [`mark`](Self::mark).
    pub fn opened(&self, file: &Backend) {
        let mut known = self.known();
        known.users += 1;
        let left = known.left.take();
        if known.users == 1 && known.base.is_ok() && (left.is_none() || left != FileState::of(file))
        {
            known.lose("the volume was written to, or may have been, by others than its guest");
        }
    }

    /// He has gone.
    pub fn closed(&self, file: &Backend) {
        let mut known = self.known();
        known.users -= 1;
        if known.users == 0 {
            known.left = FileState::of(file);
        }
    }

    /// Nobody will write any more, for as long as this daemon runs.
    pub fn sealed(&self, file: &Backend) {
        self.known().left = FileState::of(file);
    }

    /// Nothing is known any more.
    pub fn lose(&self, why: &'static str) {
        self.known().lose(why);
    }

    /// What changes are counted from, or why from nothing.
    pub fn base(&self) -> Result<Base, &'static str> {
        self.known().base.clone()
    }

    /// Takes the changes for a snapshot of this instant, in which nobody writes.
    pub fn lend(&self) -> Lent {
        let mut known = self.known();
        known.is_lent = true;
        Lent {
            extents: self.bits.take(),
            turn: known.turn,
        }
    }

    /// The snapshot was not made.
    pub fn give_back(&self, lent: &Lent) {
        self.bits.set_all(&lent.extents);
        self.known().is_lent = false;
    }

    /// The snapshot is there: from now on changes are counted from it.
    pub fn settle(&self, lent: &Lent, base: Base) {
        let mut known = self.known();
        known.is_lent = false;
        if known.turn == lent.turn {
            known.base = Ok(base);
        }
    }

    /// Writes down what is known, if it is, and the file is left.
    fn save(&self) {
        let known = self.known();
        let (Ok(base), Some(left), false) = (&known.base, known.left, known.is_lent) else {
            return;
        };
        let head = Head {
            uuid: self.uuid,
            size: self.size,
            base: base.clone(),
            left,
        };
        let bytes = encode(&head, &self.bits.to_set());
        // A volume that has gone meanwhile has no folder.
        if self.path.parent().is_some_and(Path::is_dir)
            && let Err(error) = StateDir::replace_file(&self.path, &bytes)
        {
            tracing::warn!(%error, "what changed of a volume cannot be written down");
        }
    }
}

impl Known {
    fn lose(&mut self, why: &'static str) {
        self.base = Err(why);
        self.turn += 1;
    }
}

fn remove_durably(path: &Path) -> std::io::Result<()> {
    std::fs::remove_file(path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(folder)?.sync_all()
}

/// `magic | length of the head u32 | head, JSON | the set's bytes | xxh3-64 of all before`, little-endian.
fn encode(head: &Head, extents: &UnitSet) -> Vec<u8> {
    let head = serde_json::to_vec(head).expect("plain fields can be written as JSON");
    let mut bytes = MAGIC.to_vec();
    bytes.extend((head.len() as u32).to_le_bytes());
    bytes.extend(head);
    bytes.extend(extents.to_bytes());
    let sum = xxh3_64(&bytes);
    bytes.extend(sum.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<(Head, UnitSet)> {
    let (content, sum) = bytes.split_last_chunk::<8>()?;
    if xxh3_64(content) != u64::from_le_bytes(*sum) {
        return None;
    }
    let (len, rest) = content.strip_prefix(MAGIC)?.split_first_chunk::<4>()?;
    let (head, bits) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    let head: Head = serde_json::from_slice(head).ok()?;
    let extents = head.size.div_ceil(whimbrel_repository::EXTENT);
    let set = UnitSet::from_bytes(extents, bits)?;
    Some((head, set))
}

/// The changes of all volumes that were opened.
#[derive(Default)]
pub struct TrackerShelf(Mutex<BTreeMap<Name, Arc<Tracker>>>);

impl TrackerShelf {
    fn shelf(&self) -> MutexGuard<'_, BTreeMap<Name, Arc<Tracker>>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    /// A volume's changes.
    pub fn of(&self, state: &StateDir, record: &VolumeRecord) -> Arc<Tracker> {
        let mut shelf = self.shelf();
        match shelf.get(&record.name) {
            Some(known) if (known.uuid, known.size) == (record.uuid, record.size) => known.clone(),
            _ => {
                let path = state.volume_folder(&record.name).join(FILE);
                let changes = Arc::new(Tracker::open(record, path));
                shelf.insert(record.name.clone(), changes.clone());
                changes
            }
        }
    }

    /// Somebody is about to write to the volume by another way.
    pub fn lose(&self, state: &StateDir, record: &VolumeRecord) {
        self.of(state, record)
            .lose("the volume was changed otherwise than by its guest");
    }

    /// Writes down what is known of those that nobody writes to any more.
    pub fn save(&self) {
        self.shelf().values().for_each(|changes| changes.save());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use whimbrel_engine::space::Extent;
    use whimbrel_repository::EXTENT;
    use whimbrel_volume::pool::{Pool, PoolSize};

    fn base(n: u8) -> Base {
        Base {
            repository: "r".to_string(),
            snapshot: format!("s{n}").parse().expect("a name"),
            uuid: "u".to_string(),
        }
    }

    struct Bench {
        folder: tempfile::TempDir,
        record: VolumeRecord,
        file: Backend,
    }

    impl Bench {
        async fn new() -> Bench {
            let folder = tempfile::tempdir().expect("temporary folder");
            let pool = Pool::start(PoolSize::default()).expect("threads");
            let size = 10 * EXTENT;
            let path = folder.path().join("data");
            let file = Backend::create(&pool, path, Format::Raw, size).await;
            let name = "disk".parse().expect("a name");
            Bench {
                record: VolumeRecord::fresh(name, size).expect("random bytes"),
                file: file.expect("room"),
                folder,
            }
        }

        fn changes(&self) -> Tracker {
            Tracker::open(&self.record, self.folder.path().join(FILE))
        }

        /// A daemon in which a snapshot was made, and one extent written to since.
        fn used(&self) -> Tracker {
            let changes = self.changes();
            changes.opened(&self.file);
            let lent = changes.lend();
            changes.settle(&lent, base(1));
            changes.mark(3 * EXTENT, 1);
            changes
        }
    }

    fn extents(changes: &Tracker) -> Vec<u64> {
        let set = changes.bits.to_set();
        set.runs().flat_map(|run| run.iter()).collect()
    }

    #[tokio::test]
    async fn a_daemon_that_ends_in_good_order_passes_on_what_it_knows_once() {
        let bench = Bench::new().await;
        let before = bench.used();
        before.sealed(&bench.file);
        before.save();
        let after = bench.changes();
        after.opened(&bench.file);
        assert_eq!((after.base(), extents(&after)), (Ok(base(1)), vec![3]));
        // That one dies: it leaves nothing to believe.
        let later = bench.changes();
        later.opened(&bench.file);
        assert!(later.base().is_err());
    }

    #[tokio::test]
    async fn a_volume_that_others_wrote_to_is_not_believed() {
        let bench = Bench::new().await;
        for is_restarted in [false, true] {
            let before = bench.used();
            before.closed(&bench.file);
            before.save();
            std::fs::write(bench.file.path(), b"by hand").expect("written");
            let after = match is_restarted {
                true => bench.changes(),
                false => before,
            };
            after.opened(&bench.file);
            assert!(after.base().is_err(), "{is_restarted}");
        }
        let before = bench.used();
        before.closed(&bench.file);
        before.opened(&bench.file);
        assert_eq!((before.base(), extents(&before)), (Ok(base(1)), vec![3]));
    }

    #[tokio::test]
    async fn a_snapshot_under_way_is_not_passed_on_and_one_that_failed_changes_nothing() {
        let bench = Bench::new().await;
        let changes = bench.used();
        let lent = changes.lend();
        assert_eq!(lent.extents.len(), 1);
        changes.mark(0, 1);
        changes.sealed(&bench.file);
        changes.save();
        assert!(!bench.folder.path().join(FILE).exists());
        changes.give_back(&lent);
        assert_eq!(
            (changes.base(), extents(&changes)),
            (Ok(base(1)), vec![0, 3])
        );
        // What is lost while one is under way stays lost.
        let lent = changes.lend();
        changes.lose("filled");
        changes.settle(&lent, base(2));
        assert_eq!(changes.base(), Err("filled"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_no_changes(bytes in prop::collection::vec(any::<u8>(), 0..200), flip in any::<prop::sample::Index>()) {
            prop_assert!(decode(&bytes).is_none());
            let mut signed = MAGIC.to_vec();
            signed.extend(&bytes);
            let sum = xxh3_64(&signed);
            signed.extend(sum.to_le_bytes());
            prop_assert!(decode(&signed).is_none());
            let mut set = UnitSet::empty(5);
            set.insert(Extent::new(1, 2));
            let left = FileState { inode: (1, 2), len: 3, modified: (4, 5), changed: (6, 7) };
            let head = Head { uuid: VolumeUuid([1; 16]), size: 5 * EXTENT, base: base(1), left };
            let mut bytes = encode(&head, &set);
            prop_assert!(decode(&bytes).is_some_and(|(_, found)| found == set));
            let at = flip.index(bytes.len());
            bytes[at] ^= 1;
            prop_assert!(decode(&bytes).is_none());
        }
    }
}
