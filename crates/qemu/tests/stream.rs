//! The migration stream without a QEMU: what is written is read, and what is not a stream is refused.

use std::io::Read;

use proptest::prelude::*;
use whimbrel_engine::space::{Extent, UNIT};
use whimbrel_qemu::stream::reader::{Command, Event, StreamReader, unpack};
use whimbrel_qemu::stream::{RamBlock, StreamError, StreamLayout, writer};

/// Gives a few bytes at a time, as a socket may.
struct Dribble<'a> {
    bytes: &'a [u8],
    step: usize,
}

impl Read for Dribble<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.step.min(self.bytes.len()).min(out.len());
        out[..count].copy_from_slice(&self.bytes[..count]);
        self.bytes = &self.bytes[count..];
        Ok(count)
    }
}

fn layout(page_sizes: [u64; 2]) -> StreamLayout {
    let block = |(name, page_size): (&str, u64)| RamBlock {
        name: name.into(),
        len: 1 << 21,
        page_size,
    };
    StreamLayout {
        configuration: b"pc-q35-10.0".to_vec(),
        ram_section: 2,
        ram_instance: 0,
        blocks: [("pc.ram", page_sizes[0]), ("vga.vram", page_sizes[1])]
            .map(block)
            .to_vec(),
    }
}

fn opened(layout: &StreamLayout) -> Vec<u8> {
    let mut out = Vec::new();
    writer::open(&mut out, layout);
    writer::ram_start(&mut out, layout);
    out
}

/// Everything a stream says, as text; pages shortened to their first byte.
fn read_all(bytes: &[u8], step: usize) -> Result<Vec<String>, StreamError> {
    let mut reader = StreamReader::new(Dribble { bytes, step });
    let mut said = Vec::new();
    loop {
        match reader.next_event()? {
            Event::Eof => return Ok(said),
            Event::Page { block, unit, data } => {
                assert_eq!(data.len() as u64, UNIT);
                said.push(format!("page {block} {unit} {}", data[0]));
            }
            other => said.push(format!("{other:?}")),
        }
    }
}

#[test]
fn a_whole_postcopy_is_read_as_it_was_written() {
    let layout = layout([UNIT, UNIT]);
    let state = [&[0x04u8][..], &[7; 1000]].concat();
    let mut out = Vec::new();
    writer::open(&mut out, &layout);
    writer::open_return_path(&mut out);
    writer::ping(&mut out, 1);
    writer::postcopy_advise(&mut out);
    writer::ram_start(&mut out, &layout);
    writer::ram_part(&mut out, &layout);
    writer::pages(
        &mut out,
        &layout.blocks[0],
        5,
        &[9; 2 * UNIT as usize],
        false,
    );
    writer::zeros(&mut out, &layout.blocks[0], Extent::unit(8), true);
    writer::zeros(&mut out, &layout.blocks[1], Extent::unit(1), false);
    writer::ram_close(&mut out, &layout);
    let stale: Vec<Extent> = (0..100).map(|n| Extent::new(n * 5, 2)).collect();
    writer::discard(&mut out, &layout.blocks[0], stale.clone());
    writer::package(&mut out, &state);
    writer::ram_end(&mut out, &layout);
    writer::eof(&mut out);

    for step in [1, 3, 4096, usize::MAX] {
        let said = read_all(&out, step).expect("valid");
        let has = |text: &str| assert!(said.iter().any(|s| s == text), "{text} not in {said:?}");
        has("page 0 5 9");
        has("page 0 6 9");
        has("Zero { block: 0, unit: 8 }");
        has("Zero { block: 1, unit: 1 }");
        has("Command(Ping(1))");
        has("RamEnd");
        let discard = Command::Discard {
            block: 0,
            extents: stale.clone(),
        };
        has(&format!("{:?}", Event::Command(discard)));
    }
    let mut reader = StreamReader::new(&out[..]);
    let package = loop {
        if let Event::Command(Command::Packaged(package)) = reader.next_event().expect("valid") {
            break package;
        }
    };
    assert_eq!(unpack(&package).expect("a package"), state);
}

#[test]
fn qemus_own_commands_are_taken_out_of_a_package() {
    let listen = [8, 0, 4, 0, 0];
    let ping = [8, 0, 2, 0, 4, 0, 0, 0, 3];
    let run = [8, 0, 5, 0, 0];
    let state = [4, 1, 2, 3];
    let package = [&listen[..], &state, &ping, &run].concat();
    assert_eq!(unpack(&package).expect("a package"), state);
    assert!(matches!(unpack(&state), Err(StreamError::Package)));
}

#[test]
fn a_precopys_device_state_ends_at_its_description() {
    let layout = layout([UNIT, UNIT]);
    // Bytes that look like the end, and are not.
    let state = [&[4u8][..], &[0, 6, 0, 0, 0, 2, b'{', b'}'], &[1; 5000]].concat();
    let mut out = opened(&layout);
    writer::ram_end(&mut out, &layout);
    out.extend(&state);
    writer::eof_described(&mut out);
    for step in [1, 100, usize::MAX] {
        let said = read_all(&out, step).expect("valid");
        let state = Event::DeviceState(state.clone());
        assert_eq!(said.last(), Some(&format!("{state:?}")));
    }
}

#[test]
fn huge_pages_are_seen_wherever_in_the_list_they_are() {
    for sizes in [[2 << 20, UNIT], [UNIT, 2 << 20], [2 << 20, 2 << 20]] {
        let layout = layout(sizes);
        let bytes = opened(&layout);
        let mut reader = StreamReader::new(&bytes[..]);
        reader.next_event().expect("configuration");
        match reader.next_event().expect("layout") {
            Event::Layout { blocks, .. } => assert_eq!(blocks, layout.blocks),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_length_field_alone_allocates_nothing() {
    // A package and a configuration announced with sizes nobody sends.
    let mut out = opened(&layout([UNIT, UNIT]));
    out.extend([8, 0, 7, 0, 4, 0xff, 0xff, 0xff, 0xff]);
    assert!(matches!(
        read_all(&out, 4096),
        Err(StreamError::TooLong { .. })
    ));
    let out = [b"QEVM".as_slice(), &[0, 0, 0, 3, 7, 0xff, 0xff, 0xff, 0xff]].concat();
    assert!(matches!(
        read_all(&out, 4096),
        Err(StreamError::TooLong { .. })
    ));
}

#[test]
fn a_page_outside_its_block_is_refused() {
    let layout = layout([UNIT, UNIT]);
    let mut out = opened(&layout);
    writer::ram_part(&mut out, &layout);
    writer::zeros(&mut out, &layout.blocks[0], Extent::unit(512), false);
    assert!(matches!(
        read_all(&out, 4096),
        Err(StreamError::Address { .. })
    ));
}

#[test]
fn live_state_other_than_ram_is_named() {
    let mut out = Vec::new();
    writer::open(&mut out, &layout([UNIT, UNIT]));
    out.extend([1, 0, 0, 0, 9, 4]);
    out.extend(b"vfio");
    out.extend([0; 8]);
    match read_all(&out, 4096) {
        Err(StreamError::OtherSection(name)) => assert_eq!(name, "vfio"),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000), open in 0..3, step in 1usize..5000) {
        let layout = layout([UNIT, UNIT]);
        let mut all = Vec::new();
        if open >= 1 {
            all.extend(opened(&layout));
        }
        if open >= 2 {
            writer::ram_part(&mut all, &layout);
        }
        all.extend(&bytes);
        let _ = read_all(&all, step);
        let _ = unpack(&bytes);
    }

    #[test]
    fn a_damaged_stream_never_panics(at in any::<prop::sample::Index>(), value in any::<u8>(), step in 1usize..5000) {
        let layout = layout([UNIT, UNIT]);
        let mut out = opened(&layout);
        writer::ram_part(&mut out, &layout);
        writer::zeros(&mut out, &layout.blocks[1], Extent::new(0, 20), false);
        writer::pages(&mut out, &layout.blocks[0], 1, &[1; UNIT as usize], false);
        writer::ram_close(&mut out, &layout);
        writer::discard(&mut out, &layout.blocks[0], [Extent::new(1, 3)]);
        writer::package(&mut out, &[4; 50]);
        writer::ram_end(&mut out, &layout);
        writer::eof(&mut out);
        let at = at.index(out.len());
        out[at] = value;
        let _ = read_all(&out, step);
    }

    #[test]
    fn every_page_placed_is_read(runs in proptest::collection::vec((0usize..2, 0u64..500, 1u64..12, any::<u8>()), 0..20)) {
        let layout = layout([UNIT, UNIT]);
        let mut out = opened(&layout);
        let mut expected = Vec::new();
        for &(block, start, len, fill) in &runs {
            writer::ram_part(&mut out, &layout);
            let data = vec![fill; (len * UNIT) as usize];
            writer::pages(&mut out, &layout.blocks[block], start, &data, false);
            writer::ram_close(&mut out, &layout);
            expected.extend((start..start + len).map(|unit| format!("page {block} {unit} {fill}")));
        }
        writer::eof(&mut out);
        let said = read_all(&out, 10_000).expect("valid");
        let pages: Vec<String> = said.into_iter().filter(|s| s.starts_with("page")).collect();
        prop_assert_eq!(pages, expected);
    }
}
