//! Disks for the tests: what each extent holds is a number, and a number is content.

use std::collections::BTreeMap;
use std::sync::Arc;

use whimbrel_repository::manifest::{Manifest, SnapshotName};
use whimbrel_repository::read::VolumeReader;
use whimbrel_repository::tree::{EXTENT, VolumeTree};
use whimbrel_repository::write::{About, SnapshotWriter};
use whimbrel_repository::{Consistency, Repository, RepositoryError};

/// What each extent that is not empty holds.
pub type Image = BTreeMap<u64, u8>;

/// Three leaves, the last of them short, and an odd last extent.
pub const SIZE: u64 = 1030 * EXTENT - 4608;
pub const EXTENTS: u64 = 1030;

pub fn content(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| seed.wrapping_add((at / 4096) as u8).max(1))
        .collect()
}

pub fn name(text: &str) -> SnapshotName {
    text.parse().expect("a name")
}

pub fn about() -> About {
    About {
        machine: "m".to_string(),
        host: "h".to_string(),
        taken: "2026-01-01T00:00:00Z".to_string(),
        consistency: Consistency::Crash,
        parent: None,
        description: String::new(),
    }
}

/// Makes a snapshot of the image; with a base, and what changed since, only that is looked at.
pub fn create(
    repository: &Arc<Repository>,
    called: &str,
    image: &Image,
    base: Option<(&VolumeTree, &[u64])>,
) -> Result<Manifest, RepositoryError> {
    let mut writer = SnapshotWriter::begin(repository.clone(), name(called))?;
    writer.volume("disk", "u", SIZE, base.map(|(tree, _)| tree))?;
    let all: Vec<u64> = match base {
        Some((_, changed)) => changed.to_vec(),
        None => (0..EXTENTS).collect(),
    };
    for extent in all {
        let len = EXTENT.min(SIZE - extent * EXTENT) as usize;
        match image.get(&extent) {
            Some(seed) => writer.put(extent, &content(*seed, len))?,
            None => writer.put_hole(extent)?,
        }
    }
    writer.finish(about())
}

/// What the snapshot gives back, extent by extent, as it must be of this image.
pub fn assert_restores(repository: &Arc<Repository>, called: &str, image: &Image) {
    let opened = VolumeReader::open(repository.clone(), &name(called), None);
    let (reader, _) = opened.expect("it opens");
    assert_eq!(reader.size(), SIZE);
    let mut extent = 0;
    while extent < EXTENTS {
        let (run, is_data) = reader.run(extent).expect("a leaf");
        for extent in extent..extent + run {
            let len = EXTENT.min(SIZE - extent * EXTENT) as usize;
            let wanted = image.get(&extent).map(|seed| content(*seed, len));
            assert_eq!(is_data, wanted.is_some(), "extent {extent}");
            assert!(
                reader.extent(extent).expect("an extent") == wanted,
                "extent {extent} of {called}"
            );
        }
        extent += run;
    }
    assert_eq!(extent, EXTENTS);
}
