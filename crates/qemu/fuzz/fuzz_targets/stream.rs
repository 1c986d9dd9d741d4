//! A migration stream of arbitrary bytes: after a valid opening, so that the RAM records are reached.
#![no_main]

use libfuzzer_sys::fuzz_target;
use whimbrel_qemu::stream::reader::{Command, Event, StreamReader, unpack};
use whimbrel_qemu::stream::{RamBlock, StreamLayout, writer};

fuzz_target!(|input: (bool, &[u8])| {
    let (opened, bytes) = input;
    let mut all = Vec::new();
    if opened {
        let layout = StreamLayout {
            configuration: b"pc-q35-10.0".to_vec(),
            ram_section: 2,
            ram_instance: 0,
            blocks: vec![RamBlock { name: "pc.ram".into(), len: 1 << 21, page_size: 4096 }],
        };
        writer::open(&mut all, &layout);
        writer::ram_start(&mut all, &layout);
    }
    all.extend_from_slice(bytes);
    let mut reader = StreamReader::new(&all[..]);
    loop {
        match reader.next_event() {
            Ok(Event::Command(Command::Packaged(package))) => drop(unpack(&package)),
            Ok(Event::Eof) | Err(_) => break,
            Ok(_) => {}
        }
    }
});
