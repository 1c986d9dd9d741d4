//! A disk's heat, on its way with the disk: how often each MiB of it was read and written.
//!
//! The source says it at the switchover, and again on every connection after that. Both hosts halve their
//! counters as time goes by, so the larger of what is said and what is known here counts: said twice it is
//! the same, and what the guest has used since it runs here is not forgotten.

use whimbrel_engine::space::SpaceId;
use whimbrel_volume::heat::AccessLog;
use whimbrel_volume::heat_file;
use whimbrel_wire::message::{HeatCount, MAX_HEAT_EXTENTS, Message, pack_heat};

/// What a log has of a disk, in messages. Stretches that nobody used are left out.
pub fn messages(space: SpaceId, log: &AccessLog) -> Vec<Message> {
    let snapshot = log.snapshot();
    let counts: Vec<HeatCount> = snapshot.reads.into_iter().zip(snapshot.writes).collect();
    let stretches = counts.chunks(MAX_HEAT_EXTENTS as usize);
    (0..)
        .step_by(MAX_HEAT_EXTENTS as usize)
        .zip(stretches)
        .filter(|(_, stretch)| stretch.iter().any(|&count| count != (0, 0)))
        .map(|(first, stretch)| Message::Heat {
            space,
            first,
            extents: stretch.len() as u64,
            packed: pack_heat(stretch),
        })
        .collect()
}

/// Raises the counters of a log over a disk of `size` bytes to what was said of the extents from `first` on.
/// Extents that there are not are ignored.
pub fn warm(log: &AccessLog, size: u64, first: u64, said: &[HeatCount]) {
    let mut heat = log.snapshot();
    let Ok(first) = usize::try_from(first) else {
        return;
    };
    let known = heat.reads.iter_mut().zip(&mut heat.writes).skip(first);
    for ((reads, writes), &(said_reads, said_writes)) in known.zip(said) {
        *reads = said_reads.max(*reads);
        *writes = said_writes.max(*writes);
    }
    // An access that is logged at this very moment may not count. It is a hint.
    heat_file::restore(log, size, &heat_file::encode(size, &heat))
        .expect("what was encoded of this log fits it");
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_volume::heat::{AccessKind, HEAT_EXTENT};
    use whimbrel_wire::message::unpack_heat;

    /// Two full stretches and a last extent of one unit.
    const SIZE: u64 = 2 * MAX_HEAT_EXTENTS * HEAT_EXTENT + 4096;

    fn log() -> AccessLog {
        AccessLog::new(SIZE, 1)
    }

    fn read(log: &AccessLog, extent: u64, times: usize) {
        for _ in 0..times {
            log.log(0, AccessKind::Read, extent * HEAT_EXTENT, 512);
        }
    }

    fn say(from: &AccessLog, to: &AccessLog) -> usize {
        let messages = messages(SpaceId(0), from);
        for message in &messages {
            let Message::Heat {
                first,
                extents,
                packed,
                ..
            } = message
            else {
                panic!("{message:?}");
            };
            let said = unpack_heat(*extents, packed).expect("packed just now");
            warm(to, SIZE, *first, &said);
        }
        messages.len()
    }

    fn counts(log: &AccessLog) -> (Vec<u16>, Vec<u16>) {
        let snapshot = log.snapshot();
        (snapshot.reads, snapshot.writes)
    }

    #[test]
    fn heat_arrives_as_it_left_however_often_it_is_said() {
        let (from, to) = (log(), log());
        read(&from, 3, 5);
        read(&from, 2 * MAX_HEAT_EXTENTS, 1);
        from.log(0, AccessKind::Write, 7 * HEAT_EXTENT, 3 * HEAT_EXTENT);
        // The middle stretch is idle.
        assert_eq!(say(&from, &to), 2);
        assert_eq!(counts(&to), counts(&from));
        say(&from, &to);
        assert_eq!(counts(&to), counts(&from));
    }

    #[test]
    fn what_the_guest_used_since_it_runs_here_is_not_forgotten() {
        let (from, to) = (log(), log());
        read(&from, 3, 5);
        read(&from, 4, 1);
        read(&to, 4, 2);
        read(&to, 5, 1);
        say(&from, &to);
        let (reads, _) = counts(&to);
        let both = log();
        for (extent, times) in [(3, 5), (4, 2), (5, 1)] {
            read(&both, extent, times);
        }
        assert_eq!(reads, counts(&both).0);
    }

    #[test]
    fn extents_that_there_are_not_are_ignored() {
        let to = log();
        warm(&to, SIZE, 2 * MAX_HEAT_EXTENTS, &[(1, 2), (3, 4)]);
        warm(&to, SIZE, u64::MAX, &[(5, 6)]);
        let (reads, writes) = counts(&to);
        assert_eq!(
            (reads.iter().max(), writes.iter().max()),
            (Some(&1), Some(&2))
        );
    }
}
