//! The trace reader on arbitrary bytes: as a whole file or foreign text, and as payloads of blocks under right checksums.
#![no_main]

use libfuzzer_sys::fuzz_target;
use whimbrel_volume::trace::{self, format};
use xxhash_rust::xxh3::xxh3_64_with_seed;

fuzz_target!(|data: &[u8]| {
    let _ = trace::read(data, None, |r| assert!(r.len > 0 && r.offset + r.len <= trace::REACH));
    let empty = format::Writer::new(Vec::new()).and_then(format::Writer::finish).expect("memory takes it");
    let mut file = empty[..24].to_vec();
    for (block, payload) in data.chunks(512).enumerate() {
        let mut head = [0; 8];
        head[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        head[4..].copy_from_slice(&(u32::from(payload[0]) + 1).to_le_bytes());
        let sum = xxh3_64_with_seed(payload, xxh3_64_with_seed(&head, block as u64));
        file.extend_from_slice(&head);
        file.extend_from_slice(&sum.to_le_bytes());
        file.extend_from_slice(payload);
    }
    let _ = trace::read(file.as_slice(), None, |r| assert!(r.offset + r.len <= trace::REACH));
});
