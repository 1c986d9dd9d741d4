//! What two daemons say to each other besides content: the payload of a `Control` frame, in postcard.
//!
//! A migration is a session, led by the source, which dials. Its connections carry the migration's id, so
//! messages need not. The order of a session without trouble:
//!
//! ```text
//! source                                     destination
//! Prepare(machine, disks)              -->
//!                                      <--   Prepared(how RAM may go)
//! Layout(QEMU's RAM blocks)            -->
//!                                      <--   LayoutTaken
//! Grant(device state, stale pages)     -->
//! units: demanded and pushed           -->
//!                                      <--   Own(Accepted), Ran(when)
//! Empty(what has no content)           -->
//! Heat(what the guest used most)       -->
//!                                      <--   Demand, Forget
//!                                      <--   Digest (per stretch of disk)
//! DigestAnswer                         -->
//!                                      <--   Own(Drained)
//! Own(Completed)                       -->
//! ```
//!
//! After a reconnect the destination first says what it [holds](Message::Have), space by space, then
//! [`Message::HaveEnd`]; only then does content flow again.

use serde::{Deserialize, Serialize};
use whimbrel_engine::latency::Latencies;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_engine::switchover::{Epoch, Say};

use crate::kept::MAX_SLOTS;

/// Most units one bitmap of a message covers: 1 Mi units, 4 GiB of a space, 128 KiB of bits.
pub const MAX_BITMAP_UNITS: u64 = 1 << 20;

/// Most runs in one message.
pub const MAX_RUNS: usize = 8192;

/// Most bytes of a [`Message::Peeked`].
pub const MAX_PEEK: u32 = 256 << 10;

/// Most bytes of device state in a grant, unpacked. A large machine has a few megabytes.
pub const MAX_DEVICE_STATE: usize = 64 << 20;

/// Bytes of a unit's hash in a [`Message::SeedHashes`].
pub const UNIT_HASH: usize = 16;

/// Most hashes in one [`Message::SeedHashes`]: 4 MiB of a disk, 16 KiB.
pub const MAX_SEED_UNITS: u64 = 1024;

/// Most bytes of the reason in a [`Message::Unstored`].
pub const MAX_WHY: usize = 512;

/// Most extents of a disk one [`Message::Heat`] tells of: 128 GiB, 512 KiB unpacked.
pub const MAX_HEAT_EXTENTS: u64 = 1 << 17;

/// The feature bit of peers that say and hear [`Message::Heat`].
pub const FEATURE_HEAT: u64 = 1;

/// The peer can take RAM ahead of a switchover by post-copy.
pub const FEATURE_AHEAD: u64 = 2;

/// The peer reads [packed](crate::pack) units.
pub const FEATURE_ZSTD: u64 = 4;

/// The peer says or hears [`Message::Felt`].
pub const FEATURE_FELT: u64 = 8;

/// The peer says or hears [`Say::GiveBack`] and [`Say::Yielded`].
pub const FEATURE_GIVE_BACK: u64 = 16;

/// The peer says or hears [`Message::Backlog`].
pub const FEATURE_BACKLOG: u64 = 32;

/// The peer says or hears [`Message::Slots`], and reads or writes content by what both ends [keep](crate::kept).
pub const FEATURE_DELTA: u64 = 64;

/// The peer takes a second copy of a page that comes ahead of a switchover.
pub const FEATURE_AHEAD_AGAIN: u64 = 128;

/// Disks come ahead of a switchover, and the peer says or hears [`Message::DisksAhead`].
pub const FEATURE_DISKS_AHEAD: u64 = 256;

/// The peer says or hears [`Message::Unstored`].
pub const FEATURE_UNSTORED: u64 = 512;

/// The peer says or hears [`Message::Seeded`], [`Message::SeedHashes`], [`Message::SeedAlike`] and
/// [`Message::SeedEnd`].
pub const FEATURE_SEEDS: u64 = 1024;

/// The features of this version.
pub const FEATURES: u64 = FEATURE_HEAT
    | FEATURE_AHEAD
    | FEATURE_ZSTD
    | FEATURE_FELT
    | FEATURE_GIVE_BACK
    | FEATURE_BACKLOG
    | FEATURE_DELTA
    | FEATURE_AHEAD_AGAIN
    | FEATURE_DISKS_AHEAD
    | FEATURE_UNSTORED
    | FEATURE_SEEDS;

/// How much an extent was read and written, as access logs count: 8 an access, half of it every 15 minutes.
pub type HeatCount = (u16, u16);

/// How RAM travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RamMode {
    /// Post-copy where the destination can, else pre-copy.
    #[default]
    Auto,
    /// After the switchover, on demand first. The destination needs userfaultfd.
    Postcopy,
    /// Before the switchover.
    Precopy,
}

/// A disk that is to move. Its space id is its index in the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOffer {
    pub volume: String,
    pub uuid: String,
    /// Bytes.
    pub size: u64,
    /// Bytes that have content now, so that the destination can tell whether it has room.
    pub allocated: u64,
}

/// The machine that is to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    pub epoch: Epoch,
    pub machine: String,
    /// The machine's definition, TOML, as the source has it.
    pub definition: String,
    /// The concrete machine type the guest runs on, `pc-q35-7.2`, where the definition may say `q35`.
    pub machine_type: String,
    /// The source's QEMU, `10.0.2`.
    pub qemu_version: String,
    pub disks: Vec<DiskOffer>,
    pub ram: RamMode,
}

/// How the source's QEMU speaks of its RAM; the destination speaks the same to its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Content of the stream's configuration section.
    pub configuration: Vec<u8>,
    pub ram_section: u32,
    pub ram_instance: u32,
    /// The RAM blocks; block `i` is the space numbered after the disks and the blocks before it.
    pub blocks: Vec<LayoutBlock>,
}

/// One RAM block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayoutBlock {
    pub name: String,
    /// Bytes.
    pub len: u64,
    pub page_size: u64,
}

/// Device state larger than a frame travels in parts before the grant that completes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub epoch: Epoch,
    /// Packed length of all parts before this one.
    pub parts_len: u32,
    /// The last part of the zstd-packed device state.
    pub state: Vec<u8>,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    Prepare(Box<Prepare>),
    /// The destination is ready; RAM will go this way, and if not as asked, why.
    Prepared {
        epoch: Epoch,
        ram: RamMode,
        note: Option<String>,
    },
    /// The source's QEMU has named its RAM blocks.
    Layout(Layout),
    /// The destination's QEMU has taken the layout.
    LayoutTaken,
    /// Part of a packed device state too large for one frame.
    StatePart(Vec<u8>),
    Grant(Grant),
    /// What goes before the grant is all said: this many units frames in this life of the session.
    RamEnd {
        frames: u64,
    },
    /// All of them have been stored; nothing more is let in before the grant.
    RamTaken,
    /// Plain words of ownership, with the reason for a refusal or a cancel.
    Own {
        say: Say,
        why: Option<String>,
    },
    /// When the source's guest stopped or the destination's guest ran, in microseconds of the host's wall
    /// clock, for the report only.
    Ran {
        at_us: u64,
    },
    /// Units that the destination must not keep of what it was sent before the switchover; said before
    /// each grant.
    Stale {
        space: SpaceId,
        runs: Vec<Extent>,
    },
    /// Somebody at the destination waits for these.
    Demand {
        space: SpaceId,
        runs: Vec<Extent>,
    },
    /// The destination's guest wrote or discarded these: they need not be sent.
    Forget {
        space: SpaceId,
        runs: Vec<Extent>,
    },
    /// Units that read as zero at the source: bit 0 of the packed bitmap is unit `first`.
    Empty {
        space: SpaceId,
        first: u64,
        units: u64,
        packed: Vec<u8>,
    },
    /// Every `Empty` of a space was said.
    EmptyEnd {
        space: SpaceId,
    },
    /// After a reconnect: units the destination holds.
    Have {
        space: SpaceId,
        first: u64,
        units: u64,
        packed: Vec<u8>,
    },
    HaveEnd,
    /// Read from the source's disk without moving anything, before the switchover.
    Peek {
        id: u64,
        space: SpaceId,
        offset: u64,
        len: u32,
    },
    Peeked {
        id: u64,
        bytes: Option<Vec<u8>>,
    },
    /// Digest of the included units of a stretch of disk, as stored at the destination.
    Digest {
        space: SpaceId,
        first: u64,
        units: u64,
        /// Packed bitmap of the units that count.
        packed: Vec<u8>,
        digest: u128,
    },
    DigestAnswer {
        space: SpaceId,
        first: u64,
        same: bool,
    },
    /// How the destination fares, for the source's status.
    Fares(Fares),
    /// How much a stretch of a disk was used at the source, in extents of 1 MiB from extent `first` on.
    /// Needs [`FEATURE_HEAT`].
    Heat {
        space: SpaceId,
        first: u64,
        extents: u64,
        /// See [`pack_heat`].
        packed: Vec<u8>,
    },
    /// RAM comes from now on, though the machine will run there only later. Needs [`FEATURE_AHEAD`].
    Ahead,
    /// Among what a reconnecting source is told, if it is so: the destination has heard the grant, and keeps
    /// nothing of what it was told is stale. Needs [`FEATURE_AHEAD`].
    Evicted,
    /// How long the guest's requests took of late, without the link's own round trip: buckets of
    /// `whimbrel_engine::latency` with their counts. Needs [`FEATURE_FELT`].
    Felt {
        counts: Vec<(u8, u32)>,
    },
    /// How long a flush of the guest's would have waited of late, at most, for copies that had arrived, in
    /// microseconds. Needs [`FEATURE_BACKLOG`].
    Backlog {
        us: u64,
    },
    /// Said before [`Message::HaveEnd`]: of so many units, [`MAX_SLOTS`] at most, the destination keeps the content
    /// for one push connection of this life. Needs [`FEATURE_DELTA`].
    Slots {
        slots: u32,
    },
    /// Disks come from now on, though the machine will run there only later. Needs [`FEATURE_DISKS_AHEAD`].
    DisksAhead,
    /// These units of a disk came, and could not be stored: the destination does not hold them. Whoever reads there is
    /// told of an error. Needs [`FEATURE_UNSTORED`].
    Unstored {
        space: SpaceId,
        runs: Vec<Extent>,
        why: String,
    },
    /// The destination has an older copy of this disk: nothing of it is to be pushed until that was compared. Said
    /// before [`Message::Prepared`], and before [`Message::HaveEnd`] of each later connection until it is over. Needs
    /// [`FEATURE_SEEDS`], as the next three.
    Seeded {
        space: SpaceId,
    },
    /// What the destination's older copy has in a stretch of units: the first 16 bytes of each unit's BLAKE3, one after
    /// the other. A unit that reaches past the disk's end counts as filled with zeroes. Said once the machine is there.
    SeedHashes {
        space: SpaceId,
        first: u64,
        units: u64,
        /// Packed bitmap of the units that are told of.
        packed: Vec<u8>,
        hashes: Vec<u8>,
    },
    /// Of such a stretch, the units that are the same at the source and are not sent: the destination takes them from its
    /// copy. Said of every stretch once, whatever comes of it.
    SeedAlike {
        space: SpaceId,
        first: u64,
        units: u64,
        packed: Vec<u8>,
    },
    /// Nothing more is compared.
    SeedEnd {
        space: SpaceId,
    },
}

/// Figures the destination sends now and then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fares {
    /// Units resident, by space.
    pub resident: Vec<u64>,
    pub demands: u64,
    pub demand_p50_us: u64,
    pub demand_p99_us: u64,
    pub demand_max_us: u64,
    /// Units that came though they were resident already.
    pub late_copies: u64,
    /// Units verified by digest.
    pub verified_units: u64,
}

/// A control payload that is no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("control frame is no message of this protocol version: {0}")]
    Malformed(postcard::Error),
    #[error("message with {runs} runs, more than {MAX_RUNS}")]
    TooManyRuns { runs: usize },
    #[error("message with a run that is empty or out of all bounds")]
    BadRun,
    #[error("bitmap of {units} units, more than {MAX_BITMAP_UNITS}")]
    TooManyUnits { units: u64 },
    #[error("packed bitmap of {units} units does not unpack to that many")]
    BadBitmap { units: u64 },
    #[error("heat of {extents} extents, more than {MAX_HEAT_EXTENTS}")]
    TooManyExtents { extents: u64 },
    #[error("packed heat of {extents} extents does not unpack to that many")]
    BadHeat { extents: u64 },
    #[error("latencies in buckets that do not exist, or out of order")]
    BadLatencies,
    #[error("{bytes} bytes of hashes, more than {MAX_SEED_UNITS} units have")]
    TooManyHashes { bytes: usize },
    #[error("a reason of {bytes} bytes, more than {MAX_WHY}")]
    LongWhy { bytes: usize },
    #[error("{slots} slots, more than {MAX_SLOTS}")]
    TooManySlots { slots: u32 },
    #[error("packed data does not unpack to at most {limit} bytes")]
    Unpack { limit: usize },
}

impl Message {
    /// The feature bits that both sides must have set for this message to be said.
    pub fn feature(&self) -> u64 {
        match self {
            Message::Heat { .. } => FEATURE_HEAT,
            Message::Ahead | Message::Evicted => FEATURE_AHEAD,
            Message::Felt { .. } => FEATURE_FELT,
            Message::Backlog { .. } => FEATURE_BACKLOG,
            Message::Slots { .. } => FEATURE_DELTA,
            Message::DisksAhead => FEATURE_DISKS_AHEAD,
            Message::Unstored { .. } => FEATURE_UNSTORED,
            Message::Seeded { .. }
            | Message::SeedHashes { .. }
            | Message::SeedAlike { .. }
            | Message::SeedEnd { .. } => FEATURE_SEEDS,
            Message::Own {
                say: Say::GiveBack { .. } | Say::Yielded { .. },
                ..
            } => FEATURE_GIVE_BACK,
            _ => 0,
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("messages hold nothing that postcard cannot write")
    }

    /// Decodes and checks every bound that does not depend on the migration.
    pub fn decode(bytes: &[u8]) -> Result<Message, MessageError> {
        let message: Message = postcard::from_bytes(bytes).map_err(MessageError::Malformed)?;
        match &message {
            Message::Demand { runs, .. }
            | Message::Forget { runs, .. }
            | Message::Stale { runs, .. }
            | Message::Unstored { runs, .. } => {
                if runs.len() > MAX_RUNS {
                    return Err(MessageError::TooManyRuns { runs: runs.len() });
                }
                let limit = u64::MAX / whimbrel_engine::space::UNIT / 4;
                if runs
                    .iter()
                    .any(|r| r.is_empty() || r.start > limit || r.len > limit)
                {
                    return Err(MessageError::BadRun);
                }
                if let Message::Unstored { why, .. } = &message
                    && why.len() > MAX_WHY
                {
                    return Err(MessageError::LongWhy { bytes: why.len() });
                }
            }
            Message::Empty { units, .. }
            | Message::Have { units, .. }
            | Message::Digest { units, .. }
            | Message::SeedHashes { units, .. }
            | Message::SeedAlike { units, .. }
                if *units > MAX_BITMAP_UNITS =>
            {
                return Err(MessageError::TooManyUnits { units: *units });
            }
            Message::SeedHashes { hashes, .. }
                if hashes.len() > MAX_SEED_UNITS as usize * UNIT_HASH =>
            {
                let bytes = hashes.len();
                return Err(MessageError::TooManyHashes { bytes });
            }
            Message::Heat { extents, .. } if *extents > MAX_HEAT_EXTENTS => {
                return Err(MessageError::TooManyExtents { extents: *extents });
            }
            Message::Felt { counts } if Latencies::from_counts(counts).is_none() => {
                return Err(MessageError::BadLatencies);
            }
            Message::Slots { slots } if *slots > MAX_SLOTS => {
                return Err(MessageError::TooManySlots { slots: *slots });
            }
            _ => {}
        }
        Ok(message)
    }
}

/// Packs a bitmap for a message.
pub fn pack_bitmap(set: &whimbrel_engine::set::UnitSet) -> Vec<u8> {
    pack(&set.to_bytes())
}

/// Unpacks a bitmap of exactly `units` units.
pub fn unpack_bitmap(
    units: u64,
    packed: &[u8],
) -> Result<whimbrel_engine::set::UnitSet, MessageError> {
    if units > MAX_BITMAP_UNITS {
        return Err(MessageError::TooManyUnits { units });
    }
    let bytes = unpack(packed, units.div_ceil(64) as usize * 8)?;
    whimbrel_engine::set::UnitSet::from_bytes(units, &bytes)
        .ok_or(MessageError::BadBitmap { units })
}

/// Packs heat for a message: per extent reads, then writes, little-endian.
pub fn pack_heat(counts: &[HeatCount]) -> Vec<u8> {
    let both = counts.iter().flat_map(|&(reads, writes)| [reads, writes]);
    let bytes: Vec<u8> = both.flat_map(u16::to_le_bytes).collect();
    pack(&bytes)
}

/// Unpacks heat of exactly `extents` extents.
pub fn unpack_heat(extents: u64, packed: &[u8]) -> Result<Vec<HeatCount>, MessageError> {
    if extents > MAX_HEAT_EXTENTS {
        return Err(MessageError::TooManyExtents { extents });
    }
    let bytes = unpack(packed, extents as usize * 4)?;
    if bytes.len() != extents as usize * 4 {
        return Err(MessageError::BadHeat { extents });
    }
    let count = |b: &[u8]| {
        let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        (half(0), half(2))
    };
    Ok(bytes.chunks_exact(4).map(count).collect())
}

/// Packs bytes for a message, with zstd's fastest real level.
pub fn pack(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 1).expect("zstd compresses any bytes into memory")
}

/// Unpacks into at most `limit` bytes.
pub fn unpack(packed: &[u8], limit: usize) -> Result<Vec<u8>, MessageError> {
    zstd::bulk::decompress(packed, limit).map_err(|_| MessageError::Unpack { limit })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use whimbrel_engine::set::UnitSet;

    #[test]
    fn a_message_comes_back_as_it_went() {
        let message = Message::Demand {
            space: SpaceId(1),
            runs: vec![Extent::new(7, 3)],
        };
        assert_eq!(Message::decode(&message.encode()), Ok(message));
    }

    /// Version 1 of the protocol says these bytes, for ever.
    #[test]
    fn messages_have_their_golden_bytes() {
        let own = Message::Own {
            say: Say::Accepted { epoch: Epoch(5) },
            why: None,
        };
        assert_eq!(own.encode(), [8, 3, 5, 0]);
        let back = Message::Own {
            say: Say::GiveBack { epoch: Epoch(5) },
            why: None,
        };
        assert_eq!(back.encode(), [8, 9, 5, 0]);
        let yielded = Message::Own {
            say: Say::Yielded { epoch: Epoch(5) },
            why: None,
        };
        assert_eq!(yielded.encode(), [8, 10, 5, 0]);
        let demand = Message::Demand {
            space: SpaceId(1),
            runs: vec![Extent::new(300, 2)],
        };
        assert_eq!(demand.encode(), [11, 1, 1, 0xac, 2, 2]);
        assert_eq!(Message::Ahead.encode(), [23]);
        assert_eq!(Message::Evicted.encode(), [24]);
        let felt = Message::Felt {
            counts: vec![(3, 1), (40, 300)],
        };
        assert_eq!(felt.encode(), [25, 2, 3, 1, 40, 0xac, 2]);
        let backlog = Message::Backlog { us: 300 };
        assert_eq!(backlog.encode(), [26, 0xac, 2]);
        let slots = Message::Slots { slots: 300 };
        assert_eq!(slots.encode(), [27, 0xac, 2]);
        assert_eq!(Message::DisksAhead.encode(), [28]);
        let unstored = unstored("full".into());
        assert_eq!(
            unstored.encode(),
            [29, 1, 1, 0xac, 2, 2, 4, b'f', b'u', b'l', b'l']
        );
        let backwards = Message::Felt {
            counts: vec![(40, 1), (3, 1)],
        };
        let refused = Message::decode(&backwards.encode());
        assert_eq!(refused, Err(MessageError::BadLatencies));
        let heat = Message::Heat {
            space: SpaceId(1),
            first: 300,
            extents: 2,
            packed: vec![7],
        };
        assert_eq!(heat.encode(), [22, 1, 0xac, 2, 2, 1, 7]);
    }

    #[test]
    fn seeds_have_their_golden_bytes_and_bounds() {
        let space = SpaceId(1);
        assert_eq!(Message::Seeded { space }.encode(), [30, 1]);
        assert_eq!(Message::SeedEnd { space }.encode(), [33, 1]);
        let hashes = |units, bytes| Message::SeedHashes {
            space,
            first: 300,
            units,
            packed: vec![7],
            hashes: vec![9; bytes],
        };
        assert_eq!(hashes(2, 1).encode(), [31, 1, 0xac, 2, 2, 1, 7, 1, 9]);
        let alike = |units| Message::SeedAlike {
            space,
            first: 300,
            units,
            packed: vec![7],
        };
        assert_eq!(alike(2).encode(), [32, 1, 0xac, 2, 2, 1, 7]);
        let most = MAX_SEED_UNITS as usize * UNIT_HASH;
        let full = hashes(MAX_SEED_UNITS, most);
        assert_eq!(Message::decode(&full.encode()), Ok(full));
        let bytes = most + 1;
        let refused = Message::decode(&hashes(2, bytes).encode());
        assert_eq!(refused, Err(MessageError::TooManyHashes { bytes }));
        let units = MAX_BITMAP_UNITS + 1;
        for long in [hashes(units, 0), alike(units)] {
            let refused = Message::decode(&long.encode());
            assert_eq!(refused, Err(MessageError::TooManyUnits { units }));
        }
    }

    fn unstored(why: String) -> Message {
        Message::Unstored {
            space: SpaceId(1),
            runs: vec![Extent::new(300, 2)],
            why,
        }
    }

    #[test]
    fn a_reason_longer_than_a_sentence_is_refused() {
        let long = unstored("x".repeat(MAX_WHY + 1));
        let bytes = MAX_WHY + 1;
        assert_eq!(
            Message::decode(&long.encode()),
            Err(MessageError::LongWhy { bytes })
        );
        let fits = unstored("x".repeat(MAX_WHY));
        assert_eq!(Message::decode(&fits.encode()), Ok(fits));
    }

    #[test]
    fn runs_without_end_are_refused() {
        let message = Message::Forget {
            space: SpaceId(0),
            runs: vec![Extent::new(u64::MAX, 1)],
        };
        assert_eq!(
            Message::decode(&message.encode()),
            Err(MessageError::BadRun)
        );
    }

    #[test]
    fn a_bitmap_that_unpacks_to_more_is_refused() {
        let packed = pack(&[0xff; 4096]);
        assert!(unpack_bitmap(64, &packed).is_err());
    }

    #[test]
    fn heat_of_another_number_of_extents_than_is_said_is_refused() {
        let packed = pack_heat(&[(1, 2), (3, 4)]);
        assert_eq!(unpack_heat(2, &packed), Ok(vec![(1, 2), (3, 4)]));
        for extents in [0, 1, 3, MAX_HEAT_EXTENTS + 1] {
            assert!(unpack_heat(extents, &packed).is_err(), "{extents}");
        }
    }

    #[test]
    fn heat_of_a_whole_stretch_fits_a_frame_however_it_is() {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (seed >> 32) as u16
        };
        let counts: Vec<HeatCount> = (0..MAX_HEAT_EXTENTS).map(|_| (next(), next())).collect();
        let message = Message::Heat {
            space: SpaceId(u16::MAX),
            first: u64::MAX,
            extents: MAX_HEAT_EXTENTS,
            packed: pack_heat(&counts),
        };
        assert!(message.encode().len() < crate::frame::MAX_PAYLOAD);
    }

    #[test]
    fn a_bitmap_comes_back_as_it_went() {
        let mut set = UnitSet::empty(1000);
        set.insert(Extent::new(3, 500));
        assert_eq!(unpack_bitmap(1000, &pack_bitmap(&set)), Ok(set));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::decode(&bytes);
            let _ = unpack_bitmap(512, &bytes);
            let _ = unpack_heat(512, &bytes);
        }
    }
}
