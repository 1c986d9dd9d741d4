//! The log parser on arbitrary bytes: as a whole file, and as records under a sound header with their
//! checksums put right, so that what lies behind the checksum is reached too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use whimbrel_volume::journal::record::{self, HEADER, LogHeader, RECORD, Sequence, Slot};
use whimbrel_volume::journal::{BootId, VolumeIdentity};

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = LogHeader::decode(data) {
        assert_eq!(LogHeader::decode(&header.encode()), Ok(header));
        record::slots(&header, &data[HEADER..]).for_each(drop);
    }
    let header = LogHeader {
        identity: VolumeIdentity { uuid: [1; 16], size: 1 << 40, epoch: 1 },
        boot: BootId([2; 16]),
        generation: 3,
        nonce: 4,
        slots: 1024,
    };
    let mut records = data.to_vec();
    for (slot, bytes) in records.chunks_exact_mut(RECORD).enumerate() {
        let at = Sequence::new(header.generation, slot as u32);
        bytes[..8].copy_from_slice(&at.0.to_le_bytes());
        let check = xxhash_rust::xxh3::xxh3_64_with_seed(&bytes[..24], header.nonce);
        bytes[24..].copy_from_slice(&check.to_le_bytes());
    }
    for (slot, content) in record::slots(&header, &records) {
        if let Slot::Valid(entry) = content {
            let at = Sequence::new(header.generation, slot);
            let again = record::encode(entry, at, header.nonce);
            let from = slot as usize * RECORD;
            assert_eq!(again[..], records[from..from + RECORD]);
        }
    }
});
