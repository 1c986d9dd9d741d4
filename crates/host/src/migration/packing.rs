//! How content is written on its way out: units of zeroes as runs, the rest plain or packed.
//!
//! One batch becomes one or more frames. Units that are zero go as a frame without content, whatever the
//! peer knows. The rest is packed as a whole if that pays at the moment ([`Chooser`] decides, by what it is
//! told here), else it goes plain in frames short enough that a demand does not wait long behind one.
//!
//! Of RAM that may be sent again, both ends of a push connection keep what went over it, and what is sent goes as
//! records made by that ([`Deltas`]); those are packed or not just as content is.
//!
//! Packing that takes longer than [`INLINE`] runs on a thread of its own, one for each push connection at
//! most. Demands are packed at once, where they are, with the quick levels only: 32 KiB in some tens of
//! microseconds.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use whimbrel_engine::codec::{Allowed, Choice, Chooser, Codec, Packed, Policy, Took};
use whimbrel_engine::space::{Extent, UNIT};
use whimbrel_volume::backend::is_zero;
use whimbrel_wire::delta::PAGE;
use whimbrel_wire::pack::Packer;
use whimbrel_wire::units::{Encoding, Parcel, Units};

use super::deltas::{self, DeltaCount, Deltas, Kind, Means};

/// What takes longer does not run among the tasks of the connections.
const INLINE: Duration = Duration::from_micros(200);

/// How units are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Plain,
    Zstd,
    Zero,
}

/// A frame ready to go.
#[derive(Clone, Debug)]
pub struct Frame {
    pub parcel: Parcel,
    pub units: u64,
    pub form: Form,
    /// Of a batch with records the first frame has all of the batch's.
    pub delta: DeltaCount,
}

impl Frame {
    fn new(parcel: Parcel, units: u64, form: Form) -> Frame {
        Frame {
            parcel,
            units,
            form,
            delta: DeltaCount::default(),
        }
    }
}

/// A batch as frames.
#[derive(Clone, Debug, Default)]
pub struct Frames {
    pub frames: Vec<Frame>,
    /// What packing came to: as it is sent, and for comparison.
    used: Option<Packed>,
    other: Option<Packed>,
    /// Bytes that were not packed because a sample of them was dense.
    dense: u64,
    /// What making records took.
    recording: Duration,
}

impl Frames {
    /// What the content in these frames has taken so far; zeroes tell nothing of the link or of levels.
    pub fn took(&self, read: Duration) -> Took {
        let content = self.frames.iter().filter(|f| f.form != Form::Zero);
        let packed = self.used.iter().chain(&self.other);
        Took {
            content: content.clone().map(|f| f.units * UNIT).sum(),
            wire: content.map(|f| f.parcel.wire_len()).sum(),
            read,
            pack: packed.map(|p| p.took).sum::<Duration>() + self.recording,
            ..Took::default()
        }
    }
}

/// What a session knows of codecs, through all its connections.
pub struct Packing {
    chooser: Mutex<Chooser>,
    clock: Instant,
    /// Not if the operator wants nothing packed.
    packs: bool,
}

impl Packing {
    pub fn new(policy: Policy) -> Packing {
        Packing {
            chooser: Mutex::new(Chooser::new(policy)),
            clock: Instant::now(),
            packs: policy != Policy::Plain,
        }
    }

    fn chooser(&self) -> MutexGuard<'_, Chooser> {
        self.chooser.lock().expect("no holder of this lock panics")
    }

    pub fn for_demand(&self, allowed: Allowed) -> Codec {
        self.chooser().for_demand(allowed)
    }

    /// How much of content is left on the link, lately; 1 is all of it.
    pub fn left(&self) -> f64 {
        self.chooser().left()
    }

    /// A batch has been handed to the kernel.
    pub fn sent(&self, took: Took, allowed: Allowed) {
        let mut chooser = self.chooser();
        tracing::trace!(
            at = self.clock.elapsed().as_micros() as u64,
            ?allowed,
            ?took,
            ?chooser,
            "a batch went"
        );
        chooser.sent(took, allowed);
    }
}

/// Packs one connection's batches, one after the other.
pub struct PackJob {
    packing: Arc<Packing>,
    can_unpack: bool,
    /// Away while a thread packs.
    tools: Option<Tools>,
    /// What making the last batch's records took.
    recording: Duration,
}

/// What packing keeps from batch to batch.
#[derive(Default)]
struct Tools {
    packer: Packer,
    /// Until RAM has stopped to change, and all of it is sent.
    deltas: Option<Deltas>,
}

impl PackJob {
    /// `granted` slots are kept at the other end of the connection, none if 0.
    pub fn new(packing: Arc<Packing>, can_unpack: bool, granted: u32) -> PackJob {
        PackJob {
            packing,
            can_unpack,
            tools: Some(Tools {
                packer: Packer::default(),
                deltas: (granted > 0).then(|| Deltas::new(granted)),
            }),
            recording: Duration::ZERO,
        }
    }

    /// How much of content is left on the link, lately.
    pub fn left(&self) -> f64 {
        match self.can_unpack {
            true => self.packing.left(),
            false => 1.0,
        }
    }

    /// `frame_units` is the most that a frame of plain content may have.
    pub async fn pack(
        &mut self,
        units: Units,
        kind: Kind,
        frame_units: u64,
        allowed: Allowed,
    ) -> Frames {
        let plain = Choice {
            codec: Codec::Plain,
            probe: None,
        };
        let (choice, time) = {
            let mut chooser = self.packing.chooser();
            let now = self.packing.clock.elapsed().as_micros() as u64;
            let choice = match self.can_unpack {
                true => chooser.next(now, allowed),
                false => plain,
            };
            let probe = choice.probe.map_or(Codec::Plain, Codec::Zstd);
            let bytes = units.body.len() as u64;
            let time = chooser.will_take(choice.codec, bytes) + chooser.will_take(probe, bytes);
            (choice, time)
        };
        let means = Means {
            packs: self.packing.packs && self.can_unpack,
            link: allowed.rate,
            // Half, if it is packed, as memory mostly is.
            whole: match choice.codec {
                Codec::Plain => PAGE,
                Codec::Zstd(_) => PAGE / 2,
            },
        };
        let mut tools = self.tools.take().unwrap_or_default();
        let work = move || {
            let frames = frames_with(units, kind, choice, frame_units, means, &mut tools);
            (frames, tools)
        };
        let (frames, tools) = if time + self.recording <= INLINE {
            work()
        } else {
            match tokio::task::spawn_blocking(work).await {
                Ok(done) => done,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_) => unreachable!("packing is not cancelled while the runtime lives"),
                },
            }
        };
        self.tools = Some(tools);
        self.recording = frames.recording;
        let mut chooser = self.packing.chooser();
        match (frames.used, frames.other) {
            (Some(used), Some(other)) => {
                chooser.packed(used);
                chooser.probed(used, other);
            }
            (Some(one), None) | (None, Some(one)) => chooser.packed(one),
            (None, None) => chooser.dense(frames.dense),
        }
        drop(chooser);
        frames
    }
}

/// A batch as frames, packed or not. `frame_units` is the most that a frame of plain content may have.
pub fn frames(units: Units, codec: Codec, frame_units: u64, packer: &mut Packer) -> Frames {
    let mut all = Frames::default();
    if let Some(content) = without_zeroes(units, &mut all) {
        let choice = Choice { codec, probe: None };
        add_content(content, None, choice, frame_units, packer, &mut all);
    }
    all
}

fn frames_with(
    units: Units,
    kind: Kind,
    choice: Choice,
    frame_units: u64,
    means: Means,
    tools: &mut Tools,
) -> Frames {
    let mut all = Frames::default();
    let Some(content) = without_zeroes(units, &mut all) else {
        return all;
    };
    let began = Instant::now();
    let batch = match (kind, &mut tools.deltas) {
        (Kind::Ram { changes, warm }, Some(deltas)) => {
            if !changes {
                deltas.close();
            }
            deltas.write(&content, &warm, means)
        }
        // RAM goes before disks once it does not change any more: this was the last of it.
        (Kind::Disk { ram_changes: false }, deltas) => {
            *deltas = None;
            None
        }
        _ => None,
    };
    if batch.is_some() {
        all.recording = began.elapsed();
    }
    let packer = &mut tools.packer;
    add_content(content, batch, choice, frame_units, packer, &mut all);
    all
}

/// Content as it is, or as records.
struct Writing {
    content: Units,
    batch: Option<deltas::Batch>,
}

impl Writing {
    /// What there is to pack.
    fn bytes(&self) -> &[u8] {
        match &self.batch {
            Some(batch) => batch.records.bytes(),
            None => &self.content.body,
        }
    }

    fn packed(&self, level: i32, packer: &mut Packer) -> (Packed, Option<Parcel>) {
        let began = Instant::now();
        let parcel = match &self.batch {
            Some(batch) => {
                let packed = Some((packer, level));
                self.content.kept(batch.records.bytes(), packed)
            }
            None => self.content.packed(packer, level),
        };
        let bytes = self.bytes().len() as u64;
        let packed = Packed {
            level,
            content: bytes,
            left: parcel.as_ref().map_or(bytes, |p| p.body.len() as u64),
            took: began.elapsed(),
        };
        (packed, parcel)
    }

    /// In frames of so many units at most.
    fn plain(self, frame_units: u64) -> Vec<Frame> {
        let mut at = 0;
        let parts = split(self.content, frame_units).into_iter().map(|part| {
            let units = part.units();
            let parcel = match &self.batch {
                Some(batch) => part
                    .kept(batch.records.of(at, units as usize), None)
                    .expect("what is not packed is always worth it"),
                None => part.plain(),
            };
            at += units as usize;
            Frame::new(parcel, units, Form::Plain)
        });
        parts.collect()
    }
}

fn add_content(
    content: Units,
    batch: Option<deltas::Batch>,
    choice: Choice,
    frame_units: u64,
    packer: &mut Packer,
    all: &mut Frames,
) {
    let first = all.frames.len();
    let (units, delta) = (content.units(), batch.as_ref().map(|batch| batch.count));
    let writing = Writing { content, batch };
    let packs = choice.codec != Codec::Plain || choice.probe.is_some();
    let mut parcel = None;
    let is_dense = packs && packer.is_dense(writing.bytes());
    if is_dense {
        all.dense = writing.bytes().len() as u64;
    }
    if packs && !is_dense {
        if let Codec::Zstd(level) = choice.codec {
            let (used, packed) = writing.packed(level, packer);
            all.used = Some(used);
            parcel = packed;
        }
        all.other = choice.probe.map(|level| writing.packed(level, packer).0);
    }
    match parcel {
        Some(parcel) => all.frames.push(Frame::new(parcel, units, Form::Zstd)),
        None => all.frames.extend(writing.plain(frame_units)),
    }
    if let (Some(frame), Some(delta)) = (all.frames.get_mut(first), delta) {
        frame.delta = delta;
    }
}

/// Adds what is zero; the rest comes back.
fn without_zeroes(units: Units, all: &mut Frames) -> Option<Units> {
    if units.encoding == Encoding::Zero {
        // Known to be empty, and not among what has to move: an answer, and no unit sent.
        all.frames.push(Frame::new(units.plain(), 0, Form::Zero));
        return None;
    }
    let (zero, content) = zeroes_apart(units);
    all.frames.extend(zero.map(|zero| {
        let units = zero.units();
        Frame::new(zero.plain(), units, Form::Zero)
    }));
    content
}

/// Units of zeroes, and the others.
fn zeroes_apart(units: Units) -> (Option<Units>, Option<Units>) {
    let unit = UNIT as usize;
    let zeroes: Vec<bool> = units.body.chunks(unit).map(is_zero).collect();
    if !zeroes.contains(&true) {
        return (None, Some(units));
    }
    let (mut zero, mut rest) = (Vec::new(), Vec::new());
    let mut body = BytesMut::with_capacity(units.body.len());
    let each = units.runs.iter().flat_map(|run| run.start..run.end());
    for ((index, content), &is_zero) in each.zip(units.body.chunks(unit)).zip(&zeroes) {
        if is_zero {
            extend(&mut zero, index);
        } else {
            extend(&mut rest, index);
            body.extend_from_slice(content);
        }
    }
    let part = |encoding, runs: Vec<Extent>, body| {
        (!runs.is_empty()).then_some(Units {
            space: units.space,
            class: units.class,
            encoding,
            runs,
            body,
        })
    };
    (
        part(Encoding::Zero, zero, Bytes::new()),
        part(Encoding::Raw, rest, body.freeze()),
    )
}

fn extend(runs: &mut Vec<Extent>, index: u64) {
    match runs.last_mut().filter(|last| last.end() == index) {
        Some(last) => last.len += 1,
        None => runs.push(Extent::new(index, 1)),
    }
}

/// Parts of so many units at most, in order.
fn split(units: Units, most: u64) -> Vec<Units> {
    let most = most.max(1);
    if units.units() <= most {
        return vec![units];
    }
    let mut parts = Vec::new();
    let (mut runs, mut room, mut from) = (Vec::new(), most, 0);
    let mut end_part = |runs: Vec<Extent>, count: u64| {
        let to = from + (count * UNIT) as usize;
        parts.push(Units {
            runs,
            body: units.body.slice(from..to),
            ..units.clone()
        });
        from = to;
    };
    for &run in &units.runs {
        let mut left = run;
        while !left.is_empty() {
            let len = left.len.min(room);
            runs.push(Extent::new(left.start, len));
            left = Extent::new(left.start + len, left.len - len);
            room -= len;
            if room == 0 {
                end_part(std::mem::take(&mut runs), most);
                room = most;
            }
        }
    }
    if !runs.is_empty() {
        end_part(runs, most - room);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use whimbrel_engine::outflow::Class;
    use whimbrel_engine::set::UnitSet;
    use whimbrel_engine::space::SpaceId;
    use whimbrel_wire::kept::Table;
    use whimbrel_wire::units::MAX_UNITS;

    const DISK: super::Kind = super::Kind::Disk { ram_changes: true };
    /// RAM that is written to everywhere.
    fn ram(changes: bool) -> super::Kind {
        super::Kind::Ram {
            changes,
            warm: Arc::new(UnitSet::full(1 << 20)),
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Kind {
        Zero,
        Text,
        Noise,
    }

    fn content(kind: Kind, index: u64) -> Vec<u8> {
        let unit = UNIT as usize;
        let noise = |n: u64| xxhash_rust::xxh3::xxh3_64(&(index << 32 | n).to_le_bytes());
        match kind {
            Kind::Zero => vec![0; unit],
            Kind::Text => format!("unit {index}, as it goes ")
                .into_bytes()
                .into_iter()
                .cycle()
                .take(unit)
                .collect(),
            Kind::Noise => (0..UNIT / 8).flat_map(|n| noise(n).to_le_bytes()).collect(),
        }
    }

    /// Runs of units with their kinds, each some units after the last.
    fn batch(runs: &[(u64, Vec<Kind>)]) -> Units {
        let (mut at, mut all, mut body) = (0, Vec::new(), Vec::new());
        for (gap, kinds) in runs {
            at += gap;
            all.push(Extent::new(at, kinds.len() as u64));
            for &kind in kinds {
                body.extend(content(kind, at));
                at += 1;
            }
        }
        Units {
            space: SpaceId(1),
            class: Class::Push,
            encoding: Encoding::Raw,
            runs: all,
            body: body.into(),
        }
    }

    fn decoded(frame: &Frame) -> Units {
        decoded_with(frame, None)
    }

    fn decoded_with(frame: &Frame, table: Option<&mut Table>) -> Units {
        let payload = [&frame.parcel.head[..], &frame.parcel.body].concat();
        Units::decode_with(payload.into(), table).expect("a frame of ours")
    }

    /// The same units after the guest has written a word to each.
    fn changed(units: &Units) -> Units {
        let mut body = units.body.to_vec();
        for (n, page) in body.chunks_mut(PAGE).enumerate() {
            page[(n * 64) % PAGE] ^= 0x55;
        }
        Units {
            body: body.into(),
            ..units.clone()
        }
    }

    /// By unit: its content.
    fn by_unit(units: &Units) -> Vec<(u64, Bytes)> {
        let unit = UNIT as usize;
        let pieces = units.pieces().flat_map(|(run, bytes)| {
            (run.start..run.end()).enumerate().map(move |(n, index)| {
                let content = match bytes.is_empty() {
                    true => Bytes::from(vec![0; unit]),
                    false => bytes.slice(n * unit..(n + 1) * unit),
                };
                (index, content)
            })
        });
        pieces.collect()
    }

    #[test]
    fn zeroes_in_a_batch_go_without_content_to_any_peer() {
        let units = batch(&[
            (3, vec![Kind::Noise, Kind::Zero, Kind::Zero]),
            (1, vec![Kind::Noise]),
        ]);
        let all = frames(units, Codec::Plain, MAX_UNITS, &mut Packer::default()).frames;
        let forms: Vec<_> = all.iter().map(|f| (f.form, f.units)).collect();
        assert_eq!(forms, [(Form::Zero, 2), (Form::Plain, 2)]);
        assert!(all[0].parcel.body.is_empty());
    }

    #[test]
    fn noise_goes_plain_whatever_is_chosen_in_frames_of_the_size_there_is_time_for() {
        let units = batch(&[(0, vec![Kind::Noise; 7])]);
        let all = frames(units, Codec::Zstd(3), 3, &mut Packer::default()).frames;
        let forms: Vec<_> = all.iter().map(|f| (f.form, f.units)).collect();
        assert_eq!(
            forms,
            [(Form::Plain, 3), (Form::Plain, 3), (Form::Plain, 1)]
        );
    }

    #[tokio::test]
    async fn a_peer_that_cannot_unpack_gets_nothing_packed() {
        let packing = Arc::new(Packing::new(Policy::Level(3)));
        for (can_unpack, form) in [(false, Form::Plain), (true, Form::Zstd)] {
            let mut job = PackJob::new(packing.clone(), can_unpack, 0);
            let units = batch(&[(0, vec![Kind::Text; 64])]);
            let packed = job
                .pack(units, DISK, MAX_UNITS, Allowed::met(1_000_000))
                .await;
            assert!(packed.frames.iter().all(|f| f.form == form));
        }
    }

    #[tokio::test]
    async fn long_packing_and_probes_leave_the_content_as_it_was() {
        let mut job = PackJob::new(Arc::new(Packing::new(Policy::Auto)), true, 0);
        for round in 0..20 {
            let units = batch(&[(round, vec![Kind::Text; 64])]);
            let packed = job
                .pack(units.clone(), DISK, MAX_UNITS, Allowed::met(200_000))
                .await;
            assert_eq!(packed.frames.len(), 1);
            assert_eq!(decoded(&packed.frames[0]), units);
        }
        assert!(job.packing.chooser().next(0, Allowed::met(200_000)).codec != Codec::Plain);
    }

    #[tokio::test]
    async fn memory_that_goes_again_goes_as_what_changed_until_it_is_all_there() {
        let packing = Arc::new(Packing::new(Policy::Plain));
        let mut job = PackJob::new(packing, true, 64);
        let mut table = Table::new(64);
        let noise = batch(&[(7, vec![Kind::Noise; 64])]);
        let (changing, still) = (ram(true), ram(false));
        for (units, kind, least, most, deltas) in [
            (noise.clone(), &changing, 64 * PAGE, 65 * PAGE, 0),
            (changed(&noise), &changing, 64, 64 * 20, 64),
            (noise.clone(), &still, 64, 64 * 20, 64),
        ] {
            let frames = job
                .pack(units.clone(), kind.clone(), 32, Allowed::met(1_000_000))
                .await
                .frames;
            assert_eq!(frames.len(), 2);
            let bytes: u64 = frames.iter().map(|f| f.parcel.wire_len()).sum();
            assert!((least..most).contains(&(bytes as usize)), "{bytes}");
            let (first, second) = (frames[0].delta, frames[1].delta);
            assert_eq!(
                (first.units, first.found, first.again),
                (deltas, deltas, deltas)
            );
            assert_eq!((first.kept, second), (64, DeltaCount::default()));
            let came = frames
                .iter()
                .flat_map(|f| by_unit(&decoded_with(f, Some(&mut table))));
            assert_eq!(came.collect::<Vec<_>>(), by_unit(&units));
        }
        let disk = super::Kind::Disk { ram_changes: false };
        job.pack(
            batch(&[(7, vec![Kind::Text])]),
            disk,
            32,
            Allowed::met(1_000_000),
        )
        .await;
        let frames = job
            .pack(noise, still, 64, Allowed::met(1_000_000))
            .await
            .frames;
        assert_eq!(decoded(&frames[0]).units(), 64, "nothing is kept any more");
    }

    fn kinds() -> impl Strategy<Value = Vec<Kind>> {
        let kind = prop_oneof![Just(Kind::Zero), Just(Kind::Text), Just(Kind::Noise)];
        prop::collection::vec(kind, 1..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_the_codec_each_unit_goes_once_and_comes_as_it_was(
            runs in prop::collection::vec((1_u64..5, kinds()), 1..8),
            level in prop::option::of(-5..4),
            probe in prop::option::of(-5..2),
            most in 1_u64..70,
            slots in prop::option::of(1_u32..30),
        ) {
            let units = batch(&runs);
            let choice = Choice { codec: level.map_or(Codec::Plain, Codec::Zstd), probe };
            let mut tools = Tools { packer: Packer::default(), deltas: slots.map(Deltas::new) };
            let mut table = slots.map(Table::new);
            let (again, means) = (changed(&units), Means { packs: true, link: 1, whole: PAGE });
            for units in [units.clone(), again, units] {
            let all = frames_with(units.clone(), ram(true), choice, most, means, &mut tools);
            let mut came: Vec<_> = Vec::new();
            for frame in &all.frames {
                let units = decoded_with(frame, table.as_mut());
                prop_assert_eq!(units.units(), frame.units);
                prop_assert!(frame.form != Form::Plain || frame.units <= most);
                came.extend(by_unit(&units));
            }
            came.sort_by_key(|(index, _)| *index);
            prop_assert_eq!(came, by_unit(&units));
            }
        }
    }
}
