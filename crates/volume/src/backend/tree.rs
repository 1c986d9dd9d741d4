//! A qcow2 image as a tree, read without the library: what it is, whether it is whole, and its reference
//! counts made right again.
//!
//! The tree is header -> L1 table -> L2 tables -> clusters; it alone says what the guest reads. Reference
//! counts say which clusters of the file are free, and follow from the tree. While an image is written its
//! header carries the *dirty* mark of the format, which means just that: do not believe the counts. After
//! an unclean end they are counted anew from the tree, in one pass over the tables (128 MiB per TiB at 64
//! KiB clusters), before anything is allocated by them. QEMU does the same when it finds the mark.
//!
//! Layout and fields: the qcow2 specification of the QEMU project (docs/interop/qcow2.txt), version 3. All
//! numbers big-endian. Memory of a check: 2 bytes per cluster of the file, 32 MiB per TiB.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::ordered::read_padded;

const MAGIC: u32 = 0x5146_49fb;
/// Bits 9 to 55 of an L1 or L2 entry: where it points.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
/// Autoclear: the image carries dirty bitmaps that are in step with it.
const BITMAPS: u64 = 1;
/// Where the incompatible features stand in the header.
const FEATURES_AT: u64 = 72;
const AUTOCLEAR_AT: u64 = 88;
/// Backing files below one another; the format has no bound, this has.
const DEEPEST: usize = 64;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    pub l1_offset: u64,
    pub l1_entries: u32,
    pub snapshots: u32,
    pub encryption: u32,
    pub incompatible: u64,
    pub autoclear: u64,
    refcount_order: u32,
    reftable_offset: u64,
    reftable_clusters: u32,
    backing_offset: u64,
    backing_len: u32,
    header_len: u32,
}

/// What is wrong with an image, or with how it could be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageFault {
    #[error("it does not begin as a qcow2 image does")]
    NotQcow2,
    #[error("its version is {0}; versions 2 and 3 are known")]
    Version(u32),
    #[error(
        "it is of version 2, which can be read but not written safely; import it, or `qemu-img amend -o compat=v3` it"
    )]
    OldVersion,
    #[error("its clusters of 2^{0} bytes are not between 512 bytes and 2 MiB")]
    ClusterSize(u32),
    #[error("it is encrypted")]
    Encrypted,
    #[error(
        "it is in use, or was not closed; `volume check --repair`, or opening it for writing, puts it right"
    )]
    Dirty,
    #[error("it is marked as corrupt; `qemu-img check -r all` may save it")]
    Corrupt,
    #[error(
        "it keeps its content in another file, which can be read but not written here; import it"
    )]
    ExternalData,
    #[error(
        "it has {0} internal snapshots, which can be read past but not written around; import it"
    )]
    Snapshots(u32),
    #[error("it needs features that are not known here (bits {0:#x})")]
    Features(u64),
    #[error("its reference counts are of 2^{0} bits; 2^4 is what can be written here")]
    RefcountWidth(u32),
    #[error(
        "its backing file `{0}` has no format noted; note it with `qemu-img rebase -u -b FILE -F FORMAT`"
    )]
    BackingFormat(String),
    #[error("its backing file has the format `{0}`; raw and qcow2 are read here")]
    BackingUnknown(String),
    #[error("its backing files are more than {DEEPEST} deep, or go in a circle")]
    TooDeep,
    #[error("{what} at {at:#x} points to {to:#x}, where no cluster begins or the file has ended")]
    Pointer {
        what: &'static str,
        at: u64,
        to: u64,
    },
    #[error(
        "the cluster at {0:#x} is used twice, so what one guest block holds was overwritten by another"
    )]
    Shared(u64),
    #[error("its tables do not fit its size")]
    TableSize,
}

/// What a check found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Clusters that the tree uses, tables included.
    pub used: u64,
    /// Clusters counted as used that nothing uses: lost room, no harm.
    pub leaked: u64,
    /// Clusters in use that count as free: to be put right before anything is written.
    pub missing: u64,
    /// The header's mark of an image in use, or not closed.
    pub dirty: bool,
}

fn be32(b: &[u8], at: usize) -> u32 {
    b[at..at + 4].iter().fold(0, |n, &x| n << 8 | u32::from(x))
}

fn be64(b: &[u8], at: usize) -> u64 {
    b[at..at + 8].iter().fold(0, |n, &x| n << 8 | u64::from(x))
}

fn invalid(fault: ImageFault) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, fault)
}

/// Whether a file begins as a qcow2 image does.
pub fn is_qcow2(file: &File) -> io::Result<bool> {
    let mut head = [0; 4];
    read_padded(file, &mut head, 0)?;
    Ok(be32(&head, 0) == MAGIC)
}

impl Header {
    /// Reads and judges the header; the fault is the source of the error (`InvalidData`).
    pub fn read(file: &File) -> io::Result<Header> {
        let mut b = [0; 112];
        read_padded(file, &mut b, 0)?;
        if be32(&b, 0) != MAGIC {
            return Err(invalid(ImageFault::NotQcow2));
        }
        let version = be32(&b, 4);
        let cluster_bits = be32(&b, 20);
        let new = version >= 3;
        let header = Header {
            version,
            cluster_bits,
            size: be64(&b, 24),
            l1_offset: be64(&b, 40),
            l1_entries: be32(&b, 36),
            snapshots: be32(&b, 60),
            encryption: be32(&b, 32),
            incompatible: if new { be64(&b, 72) } else { 0 },
            autoclear: if new { be64(&b, 88) } else { 0 },
            refcount_order: if new { be32(&b, 96) } else { 4 },
            reftable_offset: be64(&b, 48),
            reftable_clusters: be32(&b, 56),
            backing_offset: be64(&b, 8),
            backing_len: be32(&b, 16),
            header_len: if new { be32(&b, 100) } else { 72 },
        };
        let fault = if !(2..=3).contains(&version) {
            Some(ImageFault::Version(version))
        } else if !(9..=21).contains(&cluster_bits) {
            Some(ImageFault::ClusterSize(cluster_bits))
        } else if header.encryption != 0 {
            Some(ImageFault::Encrypted)
        } else if header.incompatible & CORRUPT != 0 {
            Some(ImageFault::Corrupt)
        } else if header.incompatible & !(DIRTY | CORRUPT | EXTERNAL_DATA) != 0 {
            Some(ImageFault::Features(header.incompatible))
        } else if header.l1_bytes() > 32 << 20 {
            // QEMU's own bound.
            Some(ImageFault::TableSize)
        } else {
            None
        };
        match fault {
            Some(fault) => Err(invalid(fault)),
            None => Ok(header),
        }
    }

    /// Whether it can be written here.
    pub fn check_writable(&self) -> Result<(), ImageFault> {
        if self.version < 3 {
            Err(ImageFault::OldVersion)
        } else if self.snapshots != 0 {
            Err(ImageFault::Snapshots(self.snapshots))
        } else if self.incompatible & EXTERNAL_DATA != 0 {
            Err(ImageFault::ExternalData)
        } else if self.refcount_order != 4 {
            Err(ImageFault::RefcountWidth(self.refcount_order))
        } else {
            Ok(())
        }
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the L1 table.
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_entries) * 8
    }

    /// Someone has it open for writing, or did not close it.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// Sets or clears the mark, durably.
    pub fn set_dirty(&self, file: &File, dirty: bool) -> io::Result<()> {
        let mut b = [0; 8];
        file.read_exact_at(&mut b, FEATURES_AT)?;
        let features = u64::from_be_bytes(b);
        let features = if dirty {
            features | DIRTY
        } else {
            features & !DIRTY
        };
        file.write_all_at(&features.to_be_bytes(), FEATURES_AT)?;
        file.sync_data()
    }

    /// Says that what only some programs keep in step is so no longer, as who does not keep it must.
    pub fn clear_autoclear(&mut self, file: &File) -> io::Result<()> {
        if self.autoclear != 0 {
            file.write_all_at(&[0; 8], AUTOCLEAR_AT)?;
            file.sync_data()?;
            self.autoclear = 0;
        }
        Ok(())
    }

    /// Adds where the L2 tables lie that bytes `from..to` of the L1 table name.
    pub fn l2_tables(
        &self,
        file: &File,
        from: u64,
        to: u64,
        tables: &mut BTreeSet<u64>,
    ) -> io::Result<()> {
        let from = from / 8 * 8;
        let mut bytes = vec![0; to.next_multiple_of(8).saturating_sub(from) as usize];
        read_padded(file, &mut bytes, self.l1_offset + from)?;
        tables.extend(words(&bytes).map(|e| e & OFFSET).filter(|&at| at != 0));
        Ok(())
    }

    /// The backing file's name and format as noted.
    fn backing(&self, file: &File) -> io::Result<Option<(String, Option<String>)>> {
        if self.backing_offset == 0 || self.backing_len == 0 {
            return Ok(None);
        }
        let text = |at: u64, len: u32| -> io::Result<String> {
            let mut b = vec![0; len.min(1023) as usize];
            read_padded(file, &mut b, at)?;
            Ok(String::from_utf8_lossy(&b).into_owned())
        };
        let name = text(self.backing_offset, self.backing_len)?;
        let mut at = u64::from(self.header_len);
        let mut format = None;
        // Extensions: type, length, content padded to 8. They end with a zero or with the name.
        while at + 8 <= self.backing_offset.min(self.cluster_size()) {
            let mut b = [0; 8];
            read_padded(file, &mut b, at)?;
            match be32(&b, 0) {
                0 => break,
                0xe279_2aca => format = Some(text(at + 8, be32(&b, 4))?),
                _ => {}
            }
            at += 8 + u64::from(be32(&b, 4)).next_multiple_of(8);
        }
        Ok(Some((name, format)))
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|b| be64(b, 0))
}

/// Follows the chain of backing files below `path`, which is not among the answer.
pub fn backing_chain(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut chain = Vec::new();
    let mut at = path.to_path_buf();
    loop {
        let file = File::open(&at)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", at.display())))?;
        let Some((name, format)) = Header::read(&file)?.backing(&file)? else {
            return Ok(chain);
        };
        let below = at.parent().unwrap_or(Path::new("")).join(&name);
        chain.push(below.clone());
        match format.as_deref() {
            Some("raw" | "file") => return Ok(chain),
            Some("qcow2") => {}
            Some(other) => return Err(invalid(ImageFault::BackingUnknown(other.to_string()))),
            // A guest that owns a raw backing file could make it look like an image that names any file.
            None => return Err(invalid(ImageFault::BackingFormat(name))),
        }
        if chain.len() == DEEPEST {
            return Err(invalid(ImageFault::TooDeep));
        }
        at = below;
    }
}

/// Reference counts as the tree has them.
struct Census {
    cluster_bits: u32,
    counts: Vec<u16>,
}

impl Census {
    fn add(&mut self, what: &'static str, at: u64, from: u64, len: u64) -> Result<(), ImageFault> {
        if len == 0 {
            return Ok(());
        }
        let (first, last) = (
            from >> self.cluster_bits,
            (from + len - 1) >> self.cluster_bits,
        );
        for cluster in first..=last {
            let count = self
                .counts
                .get_mut(cluster as usize)
                .ok_or(ImageFault::Pointer { what, at, to: from })?;
            *count = count.saturating_add(1);
        }
        Ok(())
    }

    fn table(&mut self, what: &'static str, at: u64, to: u64, len: u64) -> Result<(), ImageFault> {
        if to == 0 || !to.is_multiple_of(1 << self.cluster_bits) {
            return Err(ImageFault::Pointer { what, at, to });
        }
        self.add(what, at, to, len)
    }
}

/// Goes through the whole tree; with `repair` makes the reference counts what the tree says and takes the
/// dirty mark away.
///
/// # Errors
/// What cannot be read; a tree that is not one (`InvalidData` with an [`ImageFault`]): then nothing was
/// changed.
pub fn check(file: &File, repair: bool) -> io::Result<Counted> {
    let header = Header::read(file)?;
    // Where others than the tree use clusters (snapshots, bitmaps), the counts cannot be told from it; that
    // the tree can be walked is then all that is found out.
    let whole = header.check_writable().is_ok() && header.autoclear & BITMAPS == 0;
    if repair && header.is_dirty() && !whole {
        header.check_writable().map_err(invalid)?;
    }
    let cluster = header.cluster_size();
    let clusters = file.metadata()?.len().div_ceil(cluster);
    let mut census = Census {
        cluster_bits: header.cluster_bits,
        counts: vec![0; clusters as usize],
    };
    walk(file, &header, &mut census)?;
    let mut counted = Counted {
        used: census.counts.iter().filter(|&&n| n != 0).count() as u64,
        dirty: header.is_dirty(),
        ..Counted::default()
    };
    if whole {
        compare(file, &header, &mut census, repair, &mut counted)?;
        if repair && header.is_dirty() {
            file.sync_data()?;
            header.set_dirty(file, false)?;
        }
    }
    Ok(counted)
}

fn walk(file: &File, header: &Header, census: &mut Census) -> io::Result<()> {
    let cluster = header.cluster_size();
    let entries = header.size.div_ceil(cluster).div_ceil(cluster / 8);
    if entries > u64::from(header.l1_entries) {
        return Err(invalid(ImageFault::TableSize));
    }
    census.add("the header", 0, 0, 1).map_err(invalid)?;
    if header.l1_entries > 0 {
        census
            .table("the header", 40, header.l1_offset, header.l1_bytes())
            .map_err(invalid)?;
    }
    let reftable = u64::from(header.reftable_clusters) << header.cluster_bits;
    census
        .table("the header", 48, header.reftable_offset, reftable)
        .map_err(invalid)?;
    let mut bytes = vec![0; reftable as usize];
    read_padded(file, &mut bytes, header.reftable_offset)?;
    for (n, block) in words(&bytes).enumerate().filter(|(_, b)| *b != 0) {
        let at = header.reftable_offset + n as u64 * 8;
        census
            .table("the refcount table", at, block & !511, cluster)
            .map_err(invalid)?;
    }
    let mut owned = vec![0u64; census.counts.len().div_ceil(64)];
    let mut l1 = vec![0; header.l1_bytes() as usize];
    read_padded(file, &mut l1, header.l1_offset)?;
    let mut table = vec![0; cluster as usize];
    for (n, entry) in words(&l1).enumerate().filter(|(_, e)| e & OFFSET != 0) {
        let at = header.l1_offset + n as u64 * 8;
        let l2 = entry & OFFSET;
        census
            .table("the L1 table", at, l2, cluster)
            .map_err(invalid)?;
        read_padded(file, &mut table, l2)?;
        for (m, entry) in words(&table).enumerate().filter(|(_, e)| *e != 0) {
            let at = l2 + m as u64 * 8;
            if entry & COMPRESSED != 0 {
                // Bits above say how many further sectors of 512 bytes the data touches.
                let split = 62 - (header.cluster_bits - 8);
                let offset = entry & ((1 << split) - 1);
                let sectors = (entry & ((1 << 62) - 1)) >> split;
                let end = (offset & !511) + (sectors + 1) * 512;
                census
                    .add("an L2 table", at, offset, end - offset)
                    .map_err(invalid)?;
                continue;
            }
            let data = entry & OFFSET;
            if data == 0 || header.incompatible & EXTERNAL_DATA != 0 {
                continue;
            }
            census
                .table("an L2 table", at, data, cluster)
                .map_err(invalid)?;
            let place = data >> header.cluster_bits;
            let bit = 1 << (place % 64);
            let seen = &mut owned[(place / 64) as usize];
            if *seen & bit != 0 && header.snapshots == 0 {
                return Err(invalid(ImageFault::Shared(data)));
            }
            *seen |= bit;
        }
    }
    // A cluster that is both content and table: the counts show it.
    if header.snapshots == 0 {
        for (place, &count) in census.counts.iter().enumerate() {
            let content = owned[place / 64] >> (place % 64) & 1 == 1;
            if content && count > 1 {
                return Err(invalid(ImageFault::Shared(
                    (place as u64) << header.cluster_bits,
                )));
            }
        }
    }
    Ok(())
}

/// Compares the counts with the file's, block by block of the refcount table.
fn compare(
    file: &File,
    header: &Header,
    census: &mut Census,
    repair: bool,
    counted: &mut Counted,
) -> io::Result<()> {
    let cluster = header.cluster_size();
    let per_block = (cluster / 2) as usize;
    let reftable = u64::from(header.reftable_clusters) << header.cluster_bits;
    let mut bytes = vec![0; reftable as usize];
    read_padded(file, &mut bytes, header.reftable_offset)?;
    let blocks: Vec<u64> = words(&bytes).map(|b| b & !511).collect();
    let mut place = 0;
    // New blocks are put at the end, so `counts` may grow while this goes on; each covers many more.
    while place * per_block < census.counts.len() {
        let from = place * per_block;
        let to = (from + per_block).min(census.counts.len());
        let block = *blocks
            .get(place)
            .ok_or_else(|| invalid(ImageFault::TableSize))?;
        if block == 0 {
            let wanted = census.counts[from..to].iter().filter(|&&n| n != 0).count() as u64;
            counted.missing += wanted;
            if wanted > 0 && repair {
                let at = (census.counts.len() as u64) << header.cluster_bits;
                census.counts.push(1);
                let end = (from + per_block).min(census.counts.len());
                write_block(file, at, cluster, &census.counts[from..end])?;
                file.sync_data()?;
                let entry = header.reftable_offset + place as u64 * 8;
                file.write_all_at(&at.to_be_bytes(), entry)?;
            }
        } else {
            let mut found = vec![0; cluster as usize];
            read_padded(file, &mut found, block)?;
            let mut differs = false;
            for (n, b) in found.chunks_exact(2).enumerate() {
                let is = u16::from_be_bytes([b[0], b[1]]);
                let ought = census.counts.get(from + n).copied().unwrap_or(0);
                counted.leaked += u64::from(is > ought);
                counted.missing += u64::from(is < ought);
                differs |= is != ought;
            }
            if differs && repair {
                write_block(file, block, cluster, &census.counts[from..to])?;
            }
        }
        place += 1;
    }
    Ok(())
}

fn write_block(file: &File, at: u64, cluster: u64, counts: &[u16]) -> io::Result<()> {
    let mut bytes = vec![0; cluster as usize];
    for (b, n) in bytes.chunks_exact_mut(2).zip(counts) {
        b.copy_from_slice(&n.to_be_bytes());
    }
    file.write_all_at(&bytes, at)
}
