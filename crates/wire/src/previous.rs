//! What the version before this one says and understands, byte by byte.
//!
//! Peers agree on the feature bits that both have, and say nothing that needs another. So a peer of the previous
//! version gets a move through if two things hold: whatever it says is understood, and whatever needs no newer bit
//! is said as it knows it. The bytes below are a whole move's, as they were; they must never change. With a new
//! feature this list stays, and what was new moves in at the release after.

use super::message::*;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_engine::switchover::{Epoch, Say};

/// The features of the version before.
const PREVIOUS: u64 =
    FEATURE_HEAT | FEATURE_AHEAD | FEATURE_ZSTD | FEATURE_FELT | FEATURE_GIVE_BACK;

fn own(say: Say) -> Message {
    Message::Own { say, why: None }
}

/// A move, message by message, with the bytes of each.
fn said() -> Vec<(Message, &'static str)> {
    let (disk, ram, epoch) = (SpaceId(0), SpaceId(1), Epoch(5));
    vec![
        (
            Message::Prepare(Box::new(Prepare {
                epoch,
                machine: "web1".into(),
                definition: "memory = \"1GiB\"".into(),
                machine_type: "pc-q35-7.2".into(),
                qemu_version: "10.0.2".into(),
                disks: vec![DiskOffer {
                    volume: "root".into(),
                    uuid: "u".into(),
                    size: 8192,
                    allocated: 4096,
                }],
                ram: RamMode::Auto,
            })),
            "000504776562310f6d656d6f7279203d202231476942220a70632d7133352d372e320631302e302e320104726f6f7401758040802000",
        ),
        (
            Message::Prepared {
                epoch,
                ram: RamMode::Postcopy,
                note: None,
            },
            "01050100",
        ),
        (
            Message::Layout(Layout {
                configuration: vec![1, 2],
                ram_section: 2,
                ram_instance: 0,
                blocks: vec![LayoutBlock {
                    name: "pc.ram".into(),
                    len: 8192,
                    page_size: 4096,
                }],
            }),
            "020201020200010670632e72616d80408020",
        ),
        (Message::LayoutTaken, "03"),
        (Message::StatePart(vec![7, 8]), "04020708"),
        (
            Message::Grant(Grant {
                epoch,
                parts_len: 2,
                state: vec![9],
            }),
            "0505020109",
        ),
        (Message::RamEnd { frames: 300 }, "06ac02"),
        (Message::RamTaken, "07"),
        (own(Say::Accepted { epoch }), "08030500"),
        (own(Say::GiveBack { epoch }), "08090500"),
        (own(Say::Yielded { epoch }), "080a0500"),
        (Message::Ran { at_us: 300 }, "09ac02"),
        (
            Message::Stale {
                space: ram,
                runs: vec![Extent::new(1, 1)],
            },
            "0a01010101",
        ),
        (
            Message::Demand {
                space: disk,
                runs: vec![Extent::new(300, 2)],
            },
            "0b0001ac0202",
        ),
        (
            Message::Forget {
                space: disk,
                runs: vec![Extent::new(1, 2)],
            },
            "0c00010102",
        ),
        (
            Message::Empty {
                space: ram,
                first: 0,
                units: 2,
                packed: vec![3],
            },
            "0d0100020103",
        ),
        (Message::EmptyEnd { space: ram }, "0e01"),
        (
            Message::Have {
                space: disk,
                first: 0,
                units: 2,
                packed: vec![3],
            },
            "0f0000020103",
        ),
        (Message::HaveEnd, "10"),
        (
            Message::Peek {
                id: 1,
                space: disk,
                offset: 4096,
                len: 512,
            },
            "11010080208004",
        ),
        (
            Message::Peeked {
                id: 1,
                bytes: Some(vec![5]),
            },
            "1201010105",
        ),
        (
            Message::Digest {
                space: disk,
                first: 0,
                units: 2,
                packed: vec![3],
                digest: 77,
            },
            "1300000201034d",
        ),
        (
            Message::DigestAnswer {
                space: disk,
                first: 0,
                same: true,
            },
            "14000001",
        ),
        (
            Message::Fares(Fares {
                resident: vec![1, 300],
                demands: 2,
                demand_p50_us: 3,
                demand_p99_us: 4,
                demand_max_us: 5,
                late_copies: 6,
                verified_units: 7,
            }),
            "150201ac02020304050607",
        ),
        (
            Message::Heat {
                space: disk,
                first: 0,
                extents: 1,
                packed: vec![3],
            },
            "160000010103",
        ),
        (Message::Ahead, "17"),
        (Message::Evicted, "18"),
        (
            Message::Felt {
                counts: vec![(3, 1), (40, 300)],
            },
            "1902030128ac02",
        ),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
    (0..hex.len()).step_by(2).map(digits).collect()
}

#[test]
fn a_move_of_the_previous_version_is_said_and_understood_as_it_was() {
    for (message, golden) in said() {
        assert_eq!(message.feature() & !PREVIOUS, 0, "{message:?}");
        assert_eq!(hex(&message.encode()), golden, "{message:?}");
        assert_eq!(Message::decode(&bytes(golden)), Ok(message));
    }
}

#[test]
fn a_message_that_the_previous_version_does_not_know_needs_a_bit_that_it_does_not_have() {
    let known: Vec<u8> = said().iter().map(|(_, golden)| bytes(golden)[0]).collect();
    let newest = Message::Backlog { us: 1 };
    assert_ne!(newest.feature() & !PREVIOUS, 0);
    assert!(!known.contains(&newest.encode()[0]));
    // Every number below the newest is in the list: a message left out of it is held to nothing.
    for tag in 0..newest.encode()[0] {
        assert!(known.contains(&tag), "message {tag} has no golden bytes");
    }
}
