use super::*;
use crate::delta::tests::pages;
use crate::units::{Encoding, MAX_UNITS, Units, UnitsError};
use proptest::prelude::*;
use whimbrel_engine::outflow::Class;

const RAM: SpaceId = SpaceId(2);

/// Tries always, or never.
struct Tries(bool);

impl Prefixing for Tries {
    fn tries(&mut self) -> bool {
        self.0
    }

    fn tried(&mut self, _: Option<usize>) {}
}

fn noise(seed: u64) -> Box<Page> {
    let mut page = Box::new([0; PAGE]);
    for (n, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(
            &xxh3_64(&[seed, n as u64].map(u64::to_le_bytes).concat()).to_le_bytes(),
        );
    }
    page
}

fn units_of(first: u64, pages: &[Box<Page>]) -> Units {
    Units {
        space: RAM,
        class: Class::Push,
        encoding: Encoding::Raw,
        runs: vec![Extent::new(first, pages.len() as u64)],
        body: pages.iter().flat_map(|page| page.iter().copied()).collect(),
    }
}

/// One unit as a frame's payload.
fn payload(table: &mut Table, unit: u64, page: &Page, place: Place) -> (Written, Bytes) {
    let mut records = Records::default();
    let written = table.write((RAM, unit), page, place, &mut Tries(true), &mut records);
    let units = units_of(unit, &[Box::new(*page)]);
    let parcel = units.kept(records.bytes(), None).expect("plain");
    (written, [&parcel.head[..], &parcel.body].concat().into())
}

/// The bytes of the format, for ever.
#[test]
fn a_body_has_its_golden_bytes() {
    let mut table = Table::new(300);
    let (old, mut new) = ([7; PAGE], [7; PAGE]);
    new[9] = 1;
    payload(&mut table, 5, &old, Place::Keep(258));
    let (written, payload) = payload(&mut table, 5, &new, Place::Against(258));
    assert_eq!(written, Written::Delta);
    let mut golden = vec![2, 0, 1, 3, 1, 0, 0, 0]; // space 2, push, kept, one run
    golden.extend([5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]); // 5..6
    golden.extend(xxh3_64(&new).to_le_bytes());
    golden.extend([0, 8, 0, 0, 0]); // plain, records of 8 bytes
    golden.extend([2, 2, 1, 3, 0, 9, 1, 1]); // delta to slot 258, 3 bytes: 9 are equal, 1 is not
    assert_eq!(payload, golden);
}

#[test]
fn content_that_moved_within_its_unit_goes_with_the_old_for_a_prefix() {
    let (mut here, mut there) = (Table::new(1), Table::new(1));
    let old = noise(1);
    let mut new = old.clone();
    new.rotate_right(100);
    for (page, place, way) in [
        (&old, Place::Keep(0), Written::Whole),
        (&new, Place::Against(0), Written::Prefixed),
        (&old, Place::Against(0), Written::Prefixed),
        (&noise(2), Place::Against(0), Written::Whole),
        (&noise(2), Place::Against(0), Written::Delta),
    ] {
        let (written, payload) = payload(&mut here, 3, page, place);
        assert_eq!(written, way);
        if way == Written::Prefixed {
            assert!(payload.len() < 300, "{}", payload.len());
        }
        let units = Units::decode_with(payload, Some(&mut there)).expect("a frame of ours");
        assert!(units.body[..] == page[..]);
    }
}

#[test]
fn what_was_never_kept_or_is_another_units_is_refused() {
    let page = [7; PAGE];
    let mut here = Table::new(4);
    let (_, kept) = payload(&mut here, 3, &page, Place::Keep(1));
    let (_, change) = payload(&mut here, 3, &page, Place::Against(1));
    let read = |table: &mut Table, payload: &Bytes| {
        Units::decode_with(payload.clone(), Some(table)).map(|units| units.body.len())
    };
    let mut there = Table::new(4);
    let empty = UnitsError::Kept(KeptError::Empty { slot: 1 });
    assert_eq!(read(&mut there, &change), Err(empty));
    assert_eq!(read(&mut there, &kept), Ok(PAGE));
    assert_eq!(read(&mut there, &change), Ok(PAGE));
    let mut other = change.to_vec();
    other[8] = 4;
    let of_another = KeptError::OfAnother {
        slot: 1,
        space: RAM,
        unit: 4,
    };
    assert_eq!(read(&mut there, &other.into()), Err(of_another.into()));
    let none = KeptError::NoSuchSlot {
        slot: 1,
        granted: 1,
    };
    assert_eq!(read(&mut Table::new(1), &kept), Err(none.into()));
    assert_eq!(
        Units::decode(kept).unwrap_err(),
        UnitsError::Kept(KeptError::NoTable)
    );
}

#[test]
fn a_table_that_differs_places_no_wrong_page() {
    let (mut here, mut there) = (Table::new(1), Table::new(1));
    let mut page = [7; PAGE];
    let (_, kept) = payload(&mut here, 3, &page, Place::Keep(0));
    Units::decode_with(kept, Some(&mut there)).expect("a frame of ours");
    there.slots[0].as_mut().expect("filled").page[100] = 8;
    page[0] = 1;
    let (_, change) = payload(&mut here, 3, &page, Place::Against(0));
    assert!(matches!(
        Units::decode_with(change, Some(&mut there)),
        Err(UnitsError::Kept(KeptError::Checksum { .. }))
    ));
}

#[test]
fn records_that_claim_more_than_their_units_can_have_are_not_unpacked() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).expect("zstd packs");
    let body = |len: u32| [&[0; 8][..], &[ZSTD], &len.to_le_bytes(), &bomb].concat();
    let runs = [Extent::unit(3)];
    let mut table = Table::new(1);
    let read = |table: &mut Table, len| table.read(RAM, &runs, &body(len)).unwrap_err();
    let (len, units) = (MAX_RECORD + 1, 1);
    assert_eq!(
        read(&mut table, len as u32),
        KeptError::TooLong { len, units }
    );
    let expected = MAX_RECORD;
    assert_eq!(
        read(&mut table, expected as u32),
        KeptError::Length { expected }
    );
}

/// What a guest does to one unit between two rounds.
#[derive(Clone, Debug)]
enum Change {
    Nothing,
    Some(Box<Page>),
    Moved(usize),
    All(u64),
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Nothing),
        pages().prop_map(|(a, b)| Change::Some({
            let mut a = a;
            a.iter_mut().zip(b.iter()).for_each(|(a, b)| *a ^= b);
            a
        })),
        (1..PAGE).prop_map(Change::Moved),
        any::<u64>().prop_map(Change::All),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The policy, the encoder and the decoder together, over rounds of a guest's memory.
    #[test]
    fn what_is_written_round_after_round_is_read_as_it_was(
        granted in 0_u32..12,
        rounds in prop::collection::vec((0_u64..10, prop::collection::vec(changes(), 1..7), any::<bool>(), prop::option::of(-5..4)), 1..24),
    ) {
        let mut keeper = whimbrel_engine::delta::Keeper::new(granted);
        let (mut here, mut there) = (Table::new(granted), Table::new(granted));
        let mut packer = Packer::default();
        let mut memory: Vec<_> = (0..16).map(noise).collect();
        for (first, changes, prefixed, level) in rounds {
            let mut records = Records::default();
            let range = first as usize..first as usize + changes.len();
            for (unit, change) in range.clone().zip(changes) {
                let page = &mut memory[unit];
                match change {
                    Change::Nothing => {}
                    Change::Some(mask) => page.iter_mut().zip(mask.iter()).for_each(|(a, b)| *a ^= b),
                    Change::Moved(by) => page.rotate_left(by),
                    Change::All(seed) => *page = noise(seed),
                }
                let place = keeper.next(RAM, 16, unit as u64, true).0;
                let key = (RAM, unit as u64);
                let written = here.write(key, page, place, &mut Tries(prefixed), &mut records);
                if let Place::Against(slot) = place {
                    keeper.helped(slot, written != Written::Whole);
                }
            }
            let units = units_of(first, &memory[range.clone()]);
            let packed = level.and_then(|level| units.kept(records.bytes(), Some((&mut packer, level))));
            let whole = match packed {
                Some(parcel) => vec![(units, parcel)],
                // As it goes where packing does not pay: in parts.
                None => range.clone().enumerate().map(|(n, unit)| {
                    let part = units_of(unit as u64, &memory[unit..=unit]);
                    let parcel = part.kept(records.of(n, 1), None).expect("plain");
                    (part, parcel)
                }).collect(),
            };
            for (units, parcel) in whole {
                let payload = [&parcel.head[..], &parcel.body].concat();
                prop_assert_eq!(Units::decode_with(payload.into(), Some(&mut there)), Ok(units));
            }
            for (a, b) in here.slots.iter().zip(&there.slots) {
                prop_assert!(a.as_ref().map(|s| (s.unit, &s.page)) == b.as_ref().map(|s| (s.unit, &s.page)));
            }
            prop_assert!(there.slots.len() <= granted as usize);
        }
    }

    #[test]
    fn arbitrary_records_never_panic_and_come_to_their_units_or_nothing(
        units in 1..MAX_UNITS,
        form in 0_u8..3,
        kinds in prop::collection::vec((0_u8..5, 0_u16..3, prop::collection::vec(any::<u8>(), 0..40)), 0..8),
        honest in any::<bool>(),
    ) {
        let mut records = Vec::new();
        for (kind, slot, bytes) in kinds {
            records.push(kind);
            if kind > RAW {
                records.extend(slot.to_le_bytes());
            }
            if kind > KEEP {
                records.extend((bytes.len() as u16).to_le_bytes());
                records.extend(bytes);
            } else if honest {
                records.extend([bytes.len() as u8; PAGE]);
            } else {
                records.extend(bytes);
            }
        }
        let mut body = vec![0; 8];
        body.push(form);
        body.extend((records.len() as u32).to_le_bytes());
        body.extend(if form == ZSTD { zstd::bulk::compress(&records, 1).expect("packs") } else { records });
        let mut table = Table::new(2);
        let runs = [Extent::new(0, units)];
        if let Ok(content) = table.read(RAM, &runs, &body) {
            prop_assert_eq!(content.len(), units as usize * PAGE);
        }
        prop_assert!(table.slots.len() <= 2);
    }
}
