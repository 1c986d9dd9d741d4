//! Reading files out of a raw ext4 image without mounting it.
//!
//! `debugfs stat` says where each file's blocks lie; the content is then read from the image itself.
//! (`debugfs rdump` would make tens of thousands of files to be read once and deleted, which took ten times as long.)
//! One debugfs answers for all files: for each `stat` its command echoed, then, for a file that is there,
//!
//! ```text
//! debugfs: stat "/files/usr/bin/addpart"
//! Inode: 15   Type: regular    Mode:  0755   Flags: 0x80000
//! User:     0   Group:     0   Project:     0   Size: 31040
//! EXTENTS:
//! (ETB0):15038, (0-7):1070-1077, (8-20[u]):2000-2012
//! ```
//!
//! where `ETB` is a block of the extent tree itself and `[u]` is allocated but never written, which
//! reads as zeros, as do the gaps.

use super::{GuestError, tool};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Blocks of one file that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    logical: u64,
    blocks: u64,
    physical: u64,
}

/// Where a regular file lies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Bytes.
    size: u64,
    /// Ascending.
    pieces: Vec<Piece>,
}

/// An image whose file system is at rest.
pub struct Image {
    path: PathBuf,
    file: File,
    block: u64,
}

impl Image {
    pub fn open(path: &Path) -> Result<Image, GuestError> {
        let file = File::open(path).map_err(GuestError::io("open", path))?;
        // The superblock lies at 1024; s_log_block_size at 24 in it.
        let mut log = [0; 4];
        file.read_exact_at(&mut log, 1024 + 24)
            .map_err(GuestError::io("read", path))?;
        Ok(Image {
            path: path.into(),
            file,
            block: 1024 << u32::from_le_bytes(log).min(6),
        })
    }

    /// Where the files lie, `None` for each that is not there or no regular file. The paths are absolute
    /// inside the image and hold neither a quote nor the end of a line.
    pub fn find(&self, paths: &[String]) -> Result<Vec<Option<Layout>>, GuestError> {
        let temporary = GuestError::io("write", std::env::temp_dir());
        let requests = tempfile::NamedTempFile::new().and_then(|mut file| {
            for path in paths {
                writeln!(file, "stat \"{path}\"")?;
            }
            Ok(file)
        });
        let requests = requests.map_err(temporary)?;
        let args = [
            "-f".as_ref(),
            requests.path().as_os_str(),
            self.path.as_os_str(),
        ];
        // A file system it cannot open at all has none of the files; that is for the caller to say.
        let said = tool::output("debugfs", &args)?.stdout;
        let mut layouts = parse(&String::from_utf8_lossy(&said));
        layouts.resize(paths.len(), None);
        Ok(layouts)
    }

    pub fn read<'a>(&'a self, layout: &'a Layout) -> Content<'a> {
        Content {
            image: self,
            layout,
            at: 0,
        }
    }
}

fn parse(said: &str) -> Vec<Option<Layout>> {
    let mut layouts: Vec<Option<Layout>> = Vec::new();
    let mut regular = false;
    for line in said.lines() {
        if line.starts_with("debugfs: stat ") {
            layouts.push(None);
            regular = false;
        } else if line.starts_with("Inode:") {
            regular = line.contains("Type: regular");
        } else if let Some(last) = layouts.last_mut().filter(|_| regular) {
            if line.starts_with("User:") {
                let size = line
                    .rsplit("Size:")
                    .next()
                    .and_then(|s| s.trim().parse().ok());
                *last = size.map(|size| Layout {
                    size,
                    pieces: Vec::new(),
                });
            } else if line.starts_with('(')
                && let Some(layout) = last
            {
                layout.pieces = line.split(", ").filter_map(piece).collect();
            }
        }
    }
    layouts
}

/// `(8-20):2000-2012` or `(8):2000`; `None` for what holds no content.
fn piece(text: &str) -> Option<Piece> {
    let (logical, physical) = text.strip_prefix('(')?.split_once("):")?;
    let (first, last) = logical.split_once('-').unwrap_or((logical, logical));
    let first: u64 = first.parse().ok()?;
    let last: u64 = last.parse().ok()?;
    Some(Piece {
        logical: first,
        blocks: (last + 1).checked_sub(first)?,
        physical: physical.split('-').next()?.parse().ok()?,
    })
}

/// A file's content.
pub struct Content<'a> {
    image: &'a Image,
    layout: &'a Layout,
    at: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let block = self.image.block;
        let left = self.layout.size.saturating_sub(self.at);
        let pieces = &self.layout.pieces;
        let next = pieces.partition_point(|p| (p.logical + p.blocks) * block <= self.at);
        let piece = pieces.get(next);
        let start = piece.map_or(u64::MAX, |p| p.logical * block);
        let run = match piece {
            Some(p) if start <= self.at => (p.logical + p.blocks) * block - self.at,
            _ => start - self.at,
        };
        let len = bytes
            .len()
            .min(usize::try_from(run.min(left)).unwrap_or(usize::MAX));
        let bytes = &mut bytes[..len];
        match piece {
            Some(p) if start <= self.at => {
                let from = p.physical * block + (self.at - start);
                self.image.file.read_exact_at(bytes, from)?;
            }
            _ => bytes.fill(0),
        }
        self.at += len as u64;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(logical: u64, blocks: u64, physical: u64) -> Piece {
        Piece {
            logical,
            blocks,
            physical,
        }
    }

    #[test]
    fn what_debugfs_says_is_understood() {
        let said = "debugfs: stat \"/a\"\n\
            Inode: 15   Type: regular    Mode:  0755   Flags: 0x80000\n\
            User:     0   Group:     0   Project:     0   Size: 31040\n\
            Fragment:  Address: 0    Number: 0    Size: 0\n\
            Size of extra inode fields: 32\nEXTENTS:\n\
            (ETB0):38, (0):70, (1-7[u]):71-77, (9-12):80-83\n\
            debugfs: stat \"/gone\"\n\
            debugfs: stat \"/dir\"\nInode: 2   Type: directory    Mode:  0755\n\
            User:     0   Group:     0   Size: 4096\nEXTENTS:\n(0):9\n\
            debugfs: stat \"/empty\"\nInode: 3   Type: regular    Mode:  0755\n\
            User:     0   Group:     0   Size: 0\nEXTENTS:\n";
        let file = Layout {
            size: 31040,
            pieces: vec![at(0, 1, 70), at(9, 4, 80)],
        };
        assert_eq!(
            parse(said),
            [Some(file), None, None, Some(Layout::default())]
        );
    }

    #[test]
    fn gaps_read_as_zeros_and_the_size_ends_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("image");
        let mut bytes = vec![0u8; 8 * 1024];
        for (block, bytes) in bytes.chunks_mut(1024).enumerate().skip(2) {
            bytes.fill(block as u8);
        }
        std::fs::write(&path, bytes).expect("written");
        let image = Image::open(&path).expect("opens");
        let layout = Layout {
            size: 5 * 1024 + 10,
            pieces: vec![at(1, 2, 6), at(4, 1, 3)],
        };
        let mut content = Vec::new();
        image
            .read(&layout)
            .read_to_end(&mut content)
            .expect("reads");
        let expected: Vec<u8> = [0, 6, 7, 0, 3]
            .iter()
            .flat_map(|&b| [b; 1024])
            .chain([0; 10])
            .collect();
        assert_eq!(content, expected);
    }
}
