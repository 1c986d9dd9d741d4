//! The snapshot parser on arbitrary bytes: as a whole file, and behind a sound header. The first byte
//! says whether the rest's checksums are put right, block by block.
#![no_main]

use libfuzzer_sys::fuzz_target;
use whimbrel_volume::journal::VolumeIdentity;
use whimbrel_volume::journal::snapshot::{SnapshotReader, SnapshotWriter};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

const BITMAP: usize = 4096;

fn read(bytes: &[u8]) {
    if let Ok(mut reader) = SnapshotReader::new(bytes) {
        let (mut writer, mut again) = SnapshotWriter::new(reader.identity(), reader.generation());
        while let Ok(Some(block)) = reader.next_block() {
            writer.block(&block, &mut again);
        }
        writer.end(&mut again);
    }
}

fuzz_target!(|data: &[u8]| {
    read(data);
    let Some((&mode, rest)) = data.split_first() else { return };
    let identity = VolumeIdentity { uuid: [1; 16], size: (1 << 30) + 700, epoch: 1 };
    let (_, mut file) = SnapshotWriter::new(identity, 3);
    let mut rest = rest.to_vec();
    if mode & 1 == 1 {
        // Walks the blocks as their own heads describe them.
        let seed = xxh3_64(&identity.uuid) ^ 3;
        let mut at = 0;
        while at + 24 <= rest.len() {
            let end_block = rest[at..at + 8] == [0xff; 8];
            let partials = u32::from_le_bytes([rest[at + 12], rest[at + 13], rest[at + 14], rest[at + 15]]);
            let bitmaps = rest[at + 8..at + 10].iter().filter(|&&k| k == 2).count();
            let payload = if end_block { 16 } else { bitmaps * BITMAP + partials as usize * 4 };
            let Some(body) = rest.get(at..at + 16 + payload) else { break };
            let check = xxh3_64_with_seed(body, seed).to_le_bytes();
            let to = at + 16 + payload;
            let Some(place) = rest.get_mut(to..to + 8) else { break };
            place.copy_from_slice(&check);
            at = to + 8;
        }
    }
    file.extend_from_slice(&rest);
    read(&file);
});
