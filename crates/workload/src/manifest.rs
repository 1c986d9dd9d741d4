//! The list of real files on a guest's disk, kept outside the image and inside it.

use serde::{Deserialize, Serialize};
use std::io::Read;
use xxhash_rust::xxh3::Xxh3;

/// Where the manifest lies in the image, from its root.
pub const MANIFEST_PATH: &str = "manifest.json";

/// The folder that holds the files, from the image's root.
pub const FILES_DIR: &str = "files";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub seed: u64,
    /// In ascending order of path.
    pub files: Vec<FileEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Relative to [`FILES_DIR`].
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// xxh3-128 of the content, 32 hexadecimal digits.
    pub xxh3: String,
}

impl Manifest {
    /// Bytes of all the files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.size).sum()
    }
}

/// A checksum built up a piece at a time.
#[derive(Default)]
pub struct ContentHash(Xxh3);

impl ContentHash {
    pub fn new() -> Self {
        ContentHash(Xxh3::new())
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// 32 hexadecimal digits, as in [`FileEntry::xxh3`].
    pub fn finish(&self) -> String {
        format!("{:032x}", self.0.digest128())
    }
}

/// Reads to the end; the length in bytes and the checksum.
pub fn hash_content(mut content: impl Read) -> std::io::Result<(u64, String)> {
    let mut hash = ContentHash::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut len = 0;
    loop {
        match content.read(&mut buffer)? {
            0 => return Ok((len, hash.finish())),
            n => {
                hash.update(&buffer[..n]);
                len += n as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_hash_like_the_whole() {
        let data: Vec<u8> = (0..700_000u32).map(|i| (i * 7) as u8).collect();
        let mut hash = ContentHash::new();
        for piece in data.chunks(999) {
            hash.update(piece);
        }
        assert_eq!(
            hash_content(&data[..]).expect("a slice reads"),
            (700_000, hash.finish())
        );
    }
}
