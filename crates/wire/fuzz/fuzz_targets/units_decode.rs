//! Whatever a units frame holds: content of the size its runs announce comes out, or an error; what was packed
//! here comes back as it was.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use whimbrel_engine::space::UNIT;
use whimbrel_wire::pack::{Packer, unpack};
use whimbrel_wire::units::{Encoding, MAX_UNITS, Units};

fuzz_target!(|input: (i32, u16, bool, &[u8])| {
    let (level, expected, wrapped, bytes) = input;
    let payload = match wrapped {
        // The head of a packed frame of one run, which a fuzzer need not find.
        true => {
            let units = u32::from(expected) % 80;
            let mut head = vec![1, 0, 1, 2, 1, 0, 0, 0];
            head.extend(7_u64.to_le_bytes());
            head.extend(units.to_le_bytes());
            [&head, bytes].concat()
        }
        false => bytes.to_vec(),
    };
    if let Ok(units) = Units::decode(Bytes::from(payload)) {
        let of_content = match units.encoding {
            Encoding::Raw => units.units() * UNIT,
            Encoding::Zero => 0,
        };
        assert_eq!(units.body.len() as u64, of_content);
        assert!(of_content <= MAX_UNITS * UNIT);
    }
    if let Ok(content) = unpack(bytes, usize::from(expected)) {
        assert_eq!(content.len(), usize::from(expected));
    }
    let mut packer = Packer::default();
    packer.is_dense(bytes);
    if let Some(packed) = packer.pack(bytes, level) {
        assert_eq!(unpack(&packed, bytes.len()).as_deref(), Ok(bytes));
    }
});
