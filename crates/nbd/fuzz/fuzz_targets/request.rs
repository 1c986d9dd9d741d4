//! One request against rules of the fuzzer's choosing: what is accepted obeys them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use whimbrel_nbd::StatusRun;
use whimbrel_nbd::reply::descriptors;
use whimbrel_nbd::request::{Command, HEADER, Rules, Verdict, validate};

fn within(offset: u64, len: u32, rules: &Rules) {
    let end = offset.checked_add(len.into()).expect("no overflow");
    assert!(len > 0 && end <= rules.size);
    assert!(offset.is_multiple_of(rules.min_block.into()));
    assert!(end == rules.size || end.is_multiple_of(rules.min_block.into()));
}

fuzz_target!(|input: ([u8; HEADER], u64, u8, u32, u8)| {
    let (mut header, size, shift, max_block, bits) = input;
    header[..4].copy_from_slice(&whimbrel_nbd::spec::REQUEST_MAGIC.to_be_bytes());
    let rules = Rules {
        size: size >> 1,
        read_only: bits & 1 != 0,
        min_block: 1 << (shift % 17),
        max_block,
        structured: bits & 2 != 0,
        contexts: bits & 6 == 6,
    };
    let Ok(Verdict::Accept(request)) = validate(&header, &rules) else {
        return;
    };
    assert_eq!(request.cookie.to_be_bytes(), header[8..16]);
    assert!(!rules.read_only || !request.command.changes() || request.command == Command::Flush);
    match request.command {
        Command::Flush => {}
        Command::Read { offset, len } | Command::Write { offset, len, .. } => {
            within(offset, len, &rules);
            assert!(len <= rules.max_block);
        }
        Command::Trim { offset, len, .. }
        | Command::Cache { offset, len }
        | Command::WriteZeroes { offset, len, .. } => within(offset, len, &rules),
        Command::BlockStatus { offset, len, one } => {
            within(offset, len, &rules);
            assert!(rules.contexts && rules.structured);
            let runs = [
                StatusRun {
                    len: size,
                    flags: 0,
                },
                StatusRun {
                    len: u64::MAX,
                    flags: 0,
                },
                StatusRun { len: 1, flags: 1 },
            ];
            let room = rules.size - offset;
            assert!(descriptors(&runs, len.into(), room, one).is_some());
        }
    }
});
