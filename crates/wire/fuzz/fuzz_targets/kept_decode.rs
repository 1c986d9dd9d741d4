//! Whatever frames of kept content hold, one after the other on one connection: content of the size their runs
//! announce comes out, or an error; a delta made here turns the one page into the other.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use whimbrel_engine::space::UNIT;
use whimbrel_wire::delta::{PAGE, diff, patch};
use whimbrel_wire::kept::Table;
use whimbrel_wire::units::Units;

fuzz_target!(|input: (u8, Vec<(u8, bool, &[u8])>, u16)| {
    let (granted, frames, most) = input;
    let mut table = Table::new(granted.into());
    for (units, filled, records) in &frames {
        // The head of a frame of one run and of its body, which a fuzzer need not find; and whole units, which
        // are too long for it.
        let mut payload = vec![1, 0, 1, 3, 1, 0, 0, 0];
        payload.extend(7_u64.to_le_bytes());
        payload.extend(u32::from(units % 80).to_le_bytes());
        let mut body = Vec::new();
        for &byte in *records {
            match byte {
                0xfe if *filled => body.resize(body.len() + PAGE, 0xfe),
                byte => body.push(byte),
            }
        }
        let content = vec![0xfe; usize::from(units % 80) * PAGE];
        payload.extend(xxhash_rust::xxh3::xxh3_64(&content).to_le_bytes());
        payload.push(0);
        payload.extend((body.len() as u32).to_le_bytes());
        payload.extend(body);
        match Units::decode_with(Bytes::from(payload), Some(&mut table)) {
            Ok(units) => assert_eq!(units.body.len() as u64, units.units() * UNIT),
            Err(_) => break,
        }
    }
    let (mut old, mut new, mut delta) = ([7; PAGE], [7; PAGE], Vec::new());
    for (n, (at, _, bytes)) in frames.iter().enumerate() {
        let page = if n % 2 == 0 { &mut old } else { &mut new };
        let at = usize::from(*at) * 16;
        let len = bytes.len().min(PAGE - at);
        page[at..at + len].copy_from_slice(&bytes[..len]);
    }
    if diff(&old, &new, most.into(), &mut delta) {
        assert!(delta.len() <= usize::from(most));
        patch(&mut old, &delta).expect("a delta of ours");
        assert!(old == new);
    }
    let _ = frames.first().map(|(_, _, bytes)| patch(&mut old, bytes));
});
