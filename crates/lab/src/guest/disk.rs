//! The disk image: ext4 with real files of this machine, and their manifest.
//!
//! The files are staged as hard links (copies where they cannot be linked) and `mke2fs -d` makes the
//! image from the stage, so that nothing is mounted. An image is built once per specification and kept;
//! a guest gets a sparse copy.

use super::{GuestError, copy_sparse, tool};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use whimbrel_workload::chance::Rng;
use whimbrel_workload::manifest::{FILES_DIR, FileEntry, MANIFEST_PATH, Manifest, hash_content};
use xxhash_rust::xxh3::xxh3_64;

/// Part of the cached images' names: to be raised when the same specification gives another image.
const VERSION: u32 = 2;

/// Smaller files, of which such trees have more than of all others, would make the manifest long and the
/// disk no fuller.
const SMALLEST_FILE: u64 = 4 << 10;

/// A larger file would make too much of the image one kind of content.
const LARGEST_FILE: u64 = 16 << 20;

/// What a disk is to hold.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Length of the image; sparse.
    pub size_mib: u64,
    /// At least this much in files.
    pub files_mib: u64,
    /// Chooses the files.
    pub seed: u64,
    /// Trees that the files are taken from.
    pub roots: Vec<PathBuf>,
}

impl Default for DiskSpec {
    /// 2 GiB with 600 MiB of programs, libraries and data files.
    fn default() -> Self {
        DiskSpec {
            size_mib: 2048,
            files_mib: 600,
            seed: 1,
            roots: ["/usr/bin", "/usr/lib", "/usr/share"]
                .map(PathBuf::from)
                .into(),
        }
    }
}

/// A built disk, in the cache.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The raw image. Not to be booted from: others copy it too.
    pub image: PathBuf,
    pub manifest: Manifest,
}

impl DiskSpec {
    /// Builds the image into `cache` unless it is there. Several may build at once; one wins.
    pub fn build(&self, cache: &Path) -> Result<Disk, GuestError> {
        let key = format!("{VERSION} {self:?}");
        let dir = cache.join(format!(
            "disk-{}m-{}m-{:016x}",
            self.size_mib,
            self.files_mib,
            xxh3_64(key.as_bytes())
        ));
        if !dir.exists() {
            std::fs::create_dir_all(cache).map_err(GuestError::io("create", cache))?;
            let work = tempfile::tempdir_in(cache).map_err(GuestError::io("create", cache))?;
            let built = work.path().join("built");
            self.build_in(work.path(), &built)?;
            match std::fs::rename(&built, &dir) {
                Ok(()) => {}
                // Someone else was first, with the same.
                Err(_) if dir.exists() => {}
                Err(error) => return Err(GuestError::io("rename to", dir)(error)),
            }
        }
        let path = dir.join(MANIFEST_PATH);
        let json = std::fs::read(&path).map_err(GuestError::io("read", &path))?;
        let manifest =
            serde_json::from_slice(&json).map_err(|source| GuestError::Json { path, source })?;
        Ok(Disk {
            image: dir.join("disk.raw"),
            manifest,
        })
    }

    fn build_in(&self, work: &Path, built: &Path) -> Result<(), GuestError> {
        let stage = work.join("stage");
        let files = stage.join(FILES_DIR);
        for dir in [&files, built] {
            std::fs::create_dir_all(dir).map_err(GuestError::io("create", dir))?;
        }
        let mut entries = Vec::new();
        for path in self.choose()? {
            let inside = path.strip_prefix("/").unwrap_or(&path);
            let staged = files.join(inside);
            place(&path, &staged)?;
            let content = File::open(&staged).map_err(GuestError::io("open", &staged))?;
            let (size, xxh3) = hash_content(content).map_err(GuestError::io("read", &staged))?;
            entries.push(FileEntry {
                // Chosen for being UTF-8.
                path: inside.to_string_lossy().into_owned(),
                size,
                xxh3,
            });
        }
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        let manifest = Manifest {
            seed: self.seed,
            files: entries,
        };
        let json = serde_json::to_vec(&manifest).expect("plain structs serialise");
        for path in [stage.join(MANIFEST_PATH), built.join(MANIFEST_PATH)] {
            std::fs::write(&path, &json).map_err(GuestError::io("write", path))?;
        }

        let image = built.join("disk.raw");
        File::create(&image)
            .and_then(|file| file.set_len(self.size_mib << 20))
            .map_err(GuestError::io("create", &image))?;
        // Nothing is left to the guest's kernel to initialise later: an idle guest is to be idle.
        let settings = "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0";
        let words = "-q -F -t ext4 -b 4096 -i 16384 -m 0 -L whimbrel -E".split(' ');
        let mut args: Vec<&std::ffi::OsStr> = words.map(AsRef::as_ref).collect();
        args.extend([
            settings.as_ref(),
            "-d".as_ref(),
            stage.as_os_str(),
            image.as_os_str(),
        ]);
        tool::run("mke2fs", &args)?;
        Ok(())
    }

    /// Files of the roots in an order that the seed gives, until there are enough bytes.
    fn choose(&self) -> Result<Vec<PathBuf>, GuestError> {
        let mut found = Vec::new();
        let mut inodes = BTreeSet::new();
        let mut dirs = self.roots.clone();
        while let Some(dir) = dirs.pop() {
            // A folder that cannot be read holds no files for us.
            let Ok(entries) = std::fs::read_dir(&dir) else {
                continue;
            };
            for entry in entries.flatten() {
                let path = entry.path();
                let Ok(meta) = path.symlink_metadata() else {
                    continue;
                };
                if meta.is_dir() {
                    dirs.push(path);
                } else if meta.is_file()
                    && (SMALLEST_FILE..=LARGEST_FILE).contains(&meta.len())
                    && path.to_str().is_some_and(plain)
                    && inodes.insert((meta.dev(), meta.ino()))
                {
                    found.push((path, meta.len()));
                }
            }
        }
        // The order of a folder's entries is nobody's promise.
        found.sort();
        Rng::new(self.seed, 0).shuffle(&mut found);
        let wanted = self.files_mib << 20;
        let mut bytes = 0;
        let mut chosen = Vec::new();
        for (path, len) in found {
            if bytes >= wanted {
                break;
            }
            if File::open(&path).is_ok() {
                bytes += len;
                chosen.push(path);
            }
        }
        if bytes < wanted {
            return Err(GuestError::TooFewFiles {
                found_mib: bytes >> 20,
                wanted_mib: self.files_mib,
            });
        }
        Ok(chosen)
    }
}

impl Disk {
    /// A sparse copy for a guest to write to.
    pub fn copy_to(&self, image: &Path) -> Result<(), GuestError> {
        copy_sparse(&self.image, image)
    }
}

/// A name that can be said to the file system's tools in quotes.
fn plain(path: &str) -> bool {
    !path.contains(|c: char| c == '"' || c == '\\' || c.is_control())
}

/// Links, or where that is not possible copies, one file into the stage.
fn place(from: &Path, to: &Path) -> Result<(), GuestError> {
    if let Some(dir) = to.parent() {
        std::fs::create_dir_all(dir).map_err(GuestError::io("create", dir))?;
    }
    if std::fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    std::fs::copy(from, to)
        .map(|_| ())
        .map_err(GuestError::io("copy", from))
}
