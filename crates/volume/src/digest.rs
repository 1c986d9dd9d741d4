//! What a volume's content adds up to, for verifying a move.
//!
//! Both hosts digest the same units of the same extent (all but those the guest has written since the
//! switchover) and compare. The digest is of content, not of how it is stored: a hole and written zeroes
//! count alike, and a hole is not read. xxh3-128 finds every accident; it is no defence against someone
//! who picks both contents.
//!
//! Hashed, for each included unit in ascending order: its index (u64, little-endian), then one byte 0 if
//! it is all zero, else one byte 1 and its content (4096 bytes, fewer in a short last unit).

use bytes::Bytes;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, UNIT};
use xxhash_rust::xxh3::Xxh3;

use crate::VolumeError;
use crate::backend::{Backend, OnPool, is_zero};
use crate::pool::Lane;

/// Units per job, 8 MiB: a digest keeps the slow lane from a flush for no longer than that takes.
const JOB: u64 = 2048;

/// Units read at a time, 1 MiB.
const READ: u64 = 256;

/// The digest of some units of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// xxh3-128 of the stream described in the [module](self).
    pub hash: u128,
    /// Units included.
    pub units: u64,
}

/// Digests the units of `extent` that are in `include`. If one of them is written meanwhile, its content
/// before, after or in between is what counts.
pub async fn digest(
    volume: &Backend,
    extent: Extent,
    include: &UnitSet,
) -> Result<Digest, VolumeError> {
    let extent = extent.clamp_to(Extent::new(0, volume.size().div_ceil(UNIT)));
    let mut hasher = Box::new(Xxh3::new());
    let mut units = 0;
    for run in include.runs_within(extent) {
        for start in run.iter().step_by(JOB as usize) {
            let part = Extent::new(start, JOB).clamp_to(run);
            let (view, size) = (volume.blocking(), volume.size());
            let job = move || add(&view, size, part, &mut hasher).map(|()| hasher);
            hasher = volume.pool().run(Lane::Slow, job).await??;
        }
        units += run.len;
    }
    Ok(Digest {
        hash: hasher.digest128(),
        units,
    })
}

fn add(volume: &OnPool, size: u64, part: Extent, hasher: &mut Xxh3) -> Result<(), VolumeError> {
    let end = (part.end() * UNIT).min(size);
    // Cannot be cut short by the bound on runs: there are fewer sectors than that.
    let mut data = UnitSet::empty(part.len);
    for found in volume.data_extents(part.byte_offset(), end - part.byte_offset())? {
        if found.data {
            let touched = Extent::touching(found.offset, found.len);
            data.insert(Extent::new(touched.start - part.start, touched.len));
        }
    }
    let mut next = 0;
    while next < part.len {
        let Some(run) = data.next_run(next, READ) else {
            zeroes(part.start + next..part.end(), hasher);
            break;
        };
        zeroes(part.start + next..part.start + run.start, hasher);
        let from = (part.start + run.start) * UNIT;
        let to = ((part.start + run.end()) * UNIT).min(size);
        let bytes = volume.read(from, (to - from) as usize)?;
        for (content, unit) in bytes.chunks(UNIT as usize).zip(part.start + run.start..) {
            if is_zero(content) {
                zeroes(unit..unit + 1, hasher);
            } else {
                hasher.update(&unit.to_le_bytes());
                hasher.update(&[1]);
                hasher.update(content);
            }
        }
        next = run.end();
    }
    Ok(())
}

fn zeroes(units: std::ops::Range<u64>, hasher: &mut Xxh3) {
    // Many at a time: of a sparse volume this is nearly all there is to hash.
    let mut heads = [0; 9 * 256];
    let mut next = units.start;
    while next < units.end {
        let count = (units.end - next).min(256);
        for (unit, head) in (next..next + count).zip(heads.chunks_exact_mut(9)) {
            head[..8].copy_from_slice(&unit.to_le_bytes());
        }
        hasher.update(&heads[..9 * count as usize]);
        next += count;
    }
}

/// The first 16 bytes of a unit's BLAKE3: equal for equal content only, also where somebody picks both.
pub type UnitHash = [u8; 16];

/// Units and their content.
#[derive(Clone, Debug)]
pub struct Hashed {
    pub run: Extent,
    /// Whole units: past the volume's end are zeroes.
    pub bytes: Bytes,
    /// One of each unit.
    pub hashes: Vec<UnitHash>,
}

/// Reads runs of units, a few MiB in all, and hashes each unit.
pub async fn hash_units(volume: &Backend, runs: Vec<Extent>) -> Result<Vec<Hashed>, VolumeError> {
    let (view, size) = (volume.blocking(), volume.size());
    let hash = move || {
        let hashed = runs.into_iter().map(|run| {
            let end = (run.end() * UNIT).min(size);
            let mut bytes = view
                .read(run.byte_offset(), (end - run.byte_offset()) as usize)?
                .to_vec();
            bytes.resize(run.byte_len() as usize, 0);
            let hashes = bytes.chunks(UNIT as usize).map(unit_hash).collect();
            let bytes = Bytes::from(bytes);
            Ok(Hashed { run, bytes, hashes })
        });
        hashed.collect()
    };
    volume.pool().run(Lane::Slow, hash).await?
}

fn unit_hash(content: &[u8]) -> UnitHash {
    let mut short = UnitHash::default();
    let len = short.len();
    short.copy_from_slice(&blake3::hash(content).as_bytes()[..len]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Format;
    use crate::pool::{Pool, PoolSize};
    use crate::raw::Zeroes;

    const SIZE: u64 = 20 * (1 << 20) + 700;

    async fn volume(name: &str, dir: &tempfile::TempDir) -> Backend {
        let pool = Pool::start(PoolSize::default()).unwrap();
        Backend::create(&pool, dir.path().join(name), Format::Raw, SIZE)
            .await
            .unwrap()
    }

    fn whole() -> (Extent, UnitSet) {
        let units = SIZE.div_ceil(UNIT);
        (Extent::new(0, units), UnitSet::full(units))
    }

    #[tokio::test]
    async fn equal_content_stored_differently_has_one_digest() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (volume("a", &dir).await, volume("b", &dir).await);
        for v in [&a, &b] {
            v.write(5000, Bytes::from(vec![7; 3 << 20])).await.unwrap();
            v.write(SIZE - 1, Bytes::from_static(b"x")).await.unwrap();
        }
        b.write(9 << 20, Bytes::from(vec![0; 5 << 20]))
            .await
            .unwrap();
        let keep = Zeroes {
            no_hole: true,
            fast_only: false,
        };
        b.write_zeroes(15 << 20, 1 << 20, keep).await.unwrap();
        let (extent, all) = whole();
        let digest_a = digest(&a, extent, &all).await.unwrap();
        assert_eq!(digest_a, digest(&b, extent, &all).await.unwrap());
        assert_eq!(digest_a.units, extent.len);
    }

    #[tokio::test]
    async fn one_byte_anywhere_counts_unless_its_unit_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (volume("a", &dir).await, volume("b", &dir).await);
        let (extent, all) = whole();
        let empty = digest(&a, extent, &all).await.unwrap();
        for offset in [0, (8 << 20) - 1, 8 << 20, SIZE - 1] {
            b.write(offset, Bytes::from_static(b"x")).await.unwrap();
            assert_ne!(
                digest(&b, extent, &all).await.unwrap(),
                empty,
                "at {offset}"
            );
            let mut others = all.clone();
            others.remove(Extent::touching(offset, 1));
            assert_eq!(
                digest(&b, extent, &others).await.unwrap(),
                digest(&a, extent, &others).await.unwrap()
            );
            b.discard(offset, 1).await.unwrap();
        }
        // The same content in another place is another content.
        a.write(0, Bytes::from_static(b"x")).await.unwrap();
        b.write(4096, Bytes::from_static(b"x")).await.unwrap();
        assert_ne!(
            digest(&a, extent, &all).await.unwrap(),
            digest(&b, extent, &all).await.unwrap()
        );
    }
}
