//! Requests one after another against rules of the fuzzer's choosing: what is accepted obeys them, and
//! what is refused tells how much to skip.
//!
//! Input: size (64 bits), largest block (32), selected contexts (16), minimum block (8), a byte of
//! choices; then what the client sends.

use bytes::Buf;
use whimbrel_nbd::reply::descriptors;
use whimbrel_nbd::request::{Command, Header, Request, Rules, Verdict, validate};
use whimbrel_nbd::spec::DEFAULT_MAX_PAYLOAD;
use whimbrel_nbd::{ContextSet, Dialect, StatusRun};

fn within(offset: u64, len: u64, rules: &Rules) {
    let end = offset.checked_add(len).expect("no overflow");
    assert!(len > 0 && end <= rules.size);
    assert!(offset.is_multiple_of(rules.min_block.into()));
    assert!(end == rules.size || end.is_multiple_of(rules.min_block.into()));
}

fn accepted(request: &Request, rules: &Rules) {
    let command = request.command;
    assert!(!rules.read_only || !command.changes() || command == Command::Flush);
    match command {
        Command::Flush => assert_eq!(command.offset(), 0),
        Command::Read { offset, len, .. } | Command::Write { offset, len, .. } => {
            within(offset, len.into(), rules);
            assert!(len <= rules.max_block && command.payload() == len);
        }
        Command::Trim { offset, len, .. }
        | Command::Cache { offset, len }
        | Command::WriteZeroes { offset, len, .. } => within(offset, len, rules),
        Command::BlockStatus {
            offset,
            len,
            one,
            contexts,
        } => {
            within(offset, len, rules);
            assert!(!contexts.is_empty() && rules.dialect.chunks());
            let chosen = |number| !contexts.contains(number) || rules.contexts.contains(number);
            assert!((0..64).all(chosen));
            let runs = [(rules.size, 0), (u64::MAX, 0), (1, 1)];
            let runs = runs.map(|(len, flags)| StatusRun { len, flags });
            let room = rules.size - offset;
            let found = descriptors(&runs, len, room, one, rules.dialect).expect("a run");
            assert!(found.len() * contexts.len() <= command.payload() as usize);
        }
    }
}

pub fn check(mut bytes: &[u8]) {
    if bytes.len() < 16 {
        return;
    }
    let size = bytes.get_u64() >> 1;
    let max_block = bytes.get_u32();
    let selected = bytes.get_u16();
    let min_block = 1 << (bytes.get_u8() % 17);
    let choices = bytes.get_u8();
    let dialect = match choices >> 1 & 3 {
        0 => Dialect::Simple,
        1 => Dialect::Structured,
        _ => Dialect::Extended,
    };
    let contexts = (1..=16).filter(|number| dialect.chunks() && selected >> (number - 1) & 1 == 1);
    let rules = Rules {
        size,
        read_only: choices & 1 != 0,
        min_block,
        max_block,
        dialect,
        contexts: ContextSet::from_iter(contexts),
    };
    while let Some(header) = Header::first(bytes, dialect) {
        let Ok(mut verdict) = validate(&header, &rules) else {
            return;
        };
        bytes.advance(dialect.header());
        if let Verdict::Filter(filter) = verdict {
            assert_eq!(dialect, Dialect::Extended);
            let Some((payload, rest)) = bytes.split_at_checked(filter.payload()) else {
                return;
            };
            bytes = rest;
            verdict = filter.judge(payload, &rules);
            let skip = matches!(verdict, Verdict::Refuse(refusal) if refusal.skip > 0);
            assert!(!skip, "the payload is taken");
        }
        let payload = match verdict {
            Verdict::Accept(request) => {
                accepted(&request, &rules);
                match request.command {
                    Command::Write { len, .. } => len,
                    _ => 0,
                }
            }
            Verdict::Refuse(refusal) => {
                let most = max_block.max(DEFAULT_MAX_PAYLOAD);
                assert!(dialect != Dialect::Extended || refusal.skip <= most);
                refusal.skip
            }
            Verdict::Filter(_) => unreachable!("a filter is judged once"),
            Verdict::Disconnect => return,
        };
        if bytes.len() < payload as usize {
            return;
        }
        bytes.advance(payload as usize);
    }
}
