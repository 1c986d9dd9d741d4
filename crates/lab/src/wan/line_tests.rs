use std::time::Duration;

use proptest::prelude::*;

use super::*;

const MS: Nanos = 1_000_000;

fn spec(rate: u64, delay_ms: u64) -> LineSpec {
    LineSpec::new(rate, Duration::from_millis(delay_ms))
}

#[test]
fn a_packet_takes_its_serialization_time_and_the_delay() {
    // 1250 bytes at 10 Mbit/s: 1 ms.
    let mut line = Line::new(spec(10_000_000, 30), 1);
    line.push(5 * MS, 1250, 'a');
    line.push(5 * MS, 1250, 'b');
    assert_eq!(line.next_due(), Some(36 * MS));
    assert_eq!(line.pop(36 * MS - 1), None);
    let first = line.pop(36 * MS).map(|arrival| (arrival.item, arrival.at));
    assert_eq!(first, Some(('a', 36 * MS)));
    assert_eq!(line.next_due(), Some(37 * MS));
    let second = line.pop(50 * MS).map(|arrival| (arrival.item, arrival.at));
    assert_eq!(
        second,
        Some(('b', 37 * MS)),
        "late asking does not change the time"
    );
    assert_eq!(line.next_due(), None);
}

#[test]
fn a_full_queue_drops_its_tail_and_the_head_in_service_counts() {
    let mut line = Line::new(spec(1_000_000, 0).with_queue(Queue::Bytes(3000)), 1);
    let verdicts: Vec<_> = (0..4).map(|n| line.push(0, 1500, n)).collect();
    assert_eq!(
        verdicts,
        [
            Verdict::Taken,
            Verdict::Taken,
            Verdict::QueueFull,
            Verdict::QueueFull
        ]
    );
    // 12 ms each: the first has left after 12 ms and made room for one more.
    assert_eq!(line.push(12 * MS, 1500, 4), Verdict::Taken);
    assert_eq!(line.counts().queue_dropped_packets, 2);
    assert_eq!(line.counts().queue_peak_bytes, 3000);
}

#[test]
fn a_packet_longer_than_the_queue_still_passes_alone() {
    let mut line = Line::new(spec(1_000_000, 0).with_queue(Queue::Bytes(100)), 1);
    assert_eq!(line.push(0, 1500, ()), Verdict::Taken);
    assert_eq!(line.push(0, 1500, ()), Verdict::QueueFull);
}

#[test]
fn a_new_rate_applies_to_what_is_left_of_the_packet_in_service() {
    // 1250 bytes at 1 Mbit/s: 10 ms; half of it done, the rest at 10 Mbit/s: 0.5 ms.
    let mut line = Line::new(spec(1_000_000, 0), 1);
    line.push(0, 1250, ());
    line.set_spec(5 * MS, spec(10_000_000, 0));
    assert_eq!(line.next_due(), Some(5 * MS + MS / 2));
}

#[test]
fn a_shorter_delay_does_not_overtake() {
    let mut line = Line::new(spec(100_000_000, 100), 1);
    line.push(0, 100, 'a');
    line.set_spec(MS, spec(100_000_000, 1));
    line.push(MS, 100, 'b');
    assert_eq!(line.pop(90 * MS), None);
    let order: Vec<_> = std::iter::from_fn(|| line.pop(200 * MS))
        .map(|a| a.item)
        .collect();
    assert_eq!(order, ['a', 'b']);
}

#[test]
fn an_outage_drops_what_is_held_and_what_comes_until_it_ends() {
    let mut line = Line::new(spec(1_000_000, 10), 1);
    line.push(0, 125, "arrived"); // 1 ms + 10 ms
    line.push(10 * MS, 125, "on the cable");
    line.push(11 * MS, 125, "in service");
    line.cut(11 * MS + 1, 20 * MS);
    assert_eq!(line.push(12 * MS, 125, "during"), Verdict::Outage);
    assert_eq!(line.push(20 * MS, 125, "after"), Verdict::Taken);
    let order: Vec<_> = std::iter::from_fn(|| line.pop(99 * MS))
        .map(|a| a.item)
        .collect();
    assert_eq!(order, ["arrived", "after"]);
    assert_eq!(line.counts().outage_dropped_packets, 3);
}

#[test]
fn an_outage_without_end_is_mended_by_a_cut_that_has_ended() {
    let mut line = Line::new(spec(1_000_000, 0), 1);
    line.cut(0, Nanos::MAX);
    assert_eq!(line.push(MS, 100, ()), Verdict::Outage);
    line.cut(2 * MS, 0);
    assert_eq!(line.push(2 * MS, 100, ()), Verdict::Taken);
}

#[test]
fn the_same_seed_loses_the_same_packets_at_about_the_stated_rate() {
    let run = |seed| {
        let mut line = Line::new(spec(1_000_000_000, 0).with_loss(0.01), seed);
        let mut arrived = Vec::new();
        for n in 0..100_000u64 {
            line.push(n * MS, 1000, n);
            arrived.extend(line.pop(n * MS + MS / 2).map(|a| a.item));
        }
        (arrived, line.counts().lost_packets)
    };
    let (arrived, lost) = run(7);
    assert_eq!(arrived.len() as u64 + lost, 100_000);
    assert!((850..1150).contains(&lost), "lost {lost} of 100000 at 1 %");
    assert_eq!(run(7).0, arrived);
    assert_ne!(run(8).0, arrived);
}

#[test]
fn the_cable_is_bounded_when_nothing_else_is() {
    let mut line = Line::new(LineSpec::unlimited(Duration::from_secs(10)), 1);
    let mut taken = 0u64;
    while line.push(0, 65_535, ()) == Verdict::Taken {
        taken += 1;
    }
    assert_eq!(taken, FLIGHT_BOUND / 65_535);
}

#[derive(Clone, Debug)]
enum Step {
    Wait(Nanos),
    Push(u32),
    Pop,
    Rate(Option<u64>),
    Delay(u64),
    Cut(Nanos),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..3_000_000).prop_map(Step::Wait),
        8 => (20u32..1501).prop_map(Step::Push),
        4 => Just(Step::Pop),
        1 => proptest::option::of(100_000u64..2_000_000_000).prop_map(Step::Rate),
        1 => (0u64..50).prop_map(Step::Delay),
        1 => (0u64..5_000_000).prop_map(Step::Cut),
    ]
}

fn any_line() -> impl Strategy<Value = LineSpec> {
    (
        100_000u64..2_000_000_000,
        0u64..50,
        0u64..10,
        prop_oneof![Just(0.0), 0.0..0.5],
        prop_oneof![
            (0u64..30_000).prop_map(Queue::Bytes),
            (0u64..60).prop_map(|ms| Queue::Time(Duration::from_millis(ms))),
        ],
    )
        .prop_map(|(rate, delay, jitter, loss, queue)| {
            spec(rate, delay)
                .with_jitter(Duration::from_millis(jitter))
                .with_loss(loss)
                .with_queue(queue)
        })
}

proptest! {
    /// With the spec left alone: the rate is never exceeded over any stretch, no packet is faster than
    /// its own serialization and the delay, order is kept, the queue keeps its bound.
    #[test]
    fn a_line_keeps_its_spec(
        spec in any_line(),
        packets in proptest::collection::vec((0u64..2_000_000, 20u32..1501), 1..300),
        seed: u64,
    ) {
        let rate = spec.rate.unwrap();
        let bound = queue_bound(&spec.queue, rate).max(1500);
        let mut line = Line::new(spec, seed);
        let mut now = 0;
        let mut pushed = Vec::new();
        for (index, &(wait, bytes)) in packets.iter().enumerate() {
            now += wait;
            line.push(now, bytes, index);
            pushed.push((now, bytes));
            prop_assert!(line.queue_bytes() <= bound);
        }
        let arrivals: Vec<_> = std::iter::from_fn(|| line.pop(Nanos::MAX / 2)).collect();
        let own = |bytes: u32| (u64::from(bytes) * 8 * NANOS_PER_SECOND) / rate;
        for arrival in &arrivals {
            let (at, bytes) = pushed[arrival.item];
            prop_assert!(arrival.at >= at + own(bytes) + nanos(spec.delay));
        }
        // Jitter moves an arrival by at most itself, so that much may a stretch be shorter.
        for first in 0..arrivals.len() {
            let mut sum = 0;
            for pair in arrivals[first..].windows(2) {
                prop_assert!(pair[0].item < pair[1].item);
                sum += u64::from(pushed[pair[1].item].1) * 8;
                let stretch = pair[1].at - arrivals[first].at + nanos(spec.jitter);
                prop_assert!(u128::from(sum) * u128::from(NANOS_PER_SECOND)
                    <= u128::from(stretch) * u128::from(rate));
            }
        }
        let counts = line.counts();
        prop_assert_eq!(counts.in_packets,
            counts.out_packets + counts.lost_packets + counts.queue_dropped_packets);
        prop_assert!(counts.queue_peak_bytes <= bound);
    }

    /// Whatever is changed under way: order is kept, nothing arrives before it is due, and every packet
    /// is accounted for.
    #[test]
    fn a_line_changed_under_way_keeps_order_and_count(
        spec in any_line(),
        steps in proptest::collection::vec(any_step(), 1..300),
        seed: u64,
    ) {
        let mut line = Line::new(spec, seed);
        let (mut now, mut sent, mut last) = (0, 0u64, None);
        for step in steps {
            match step {
                Step::Wait(time) => now += time,
                Step::Push(bytes) => {
                    line.push(now, bytes, (now, sent));
                    sent += 1;
                }
                Step::Pop => {
                    while let Some(arrival) = line.pop(now) {
                        let (pushed_at, number) = arrival.item;
                        prop_assert!(arrival.at <= now && arrival.at >= pushed_at);
                        prop_assert!(last.is_none_or(|last| last < number));
                        last = Some(number);
                    }
                    // Else whoever sleeps until then would spin.
                    prop_assert!(line.next_due().is_none_or(|due| due > now));
                }
                Step::Rate(rate) => line.set_spec(now, LineSpec { rate, ..*line.spec() }),
                Step::Delay(ms) => {
                    let delay = Duration::from_millis(ms);
                    line.set_spec(now, LineSpec { delay, ..*line.spec() });
                }
                Step::Cut(time) => line.cut(now, now + time),
            }
        }
        let counts = line.counts();
        prop_assert_eq!(counts.in_packets, sent);
        prop_assert_eq!(sent, counts.out_packets + counts.lost_packets
            + counts.queue_dropped_packets + counts.outage_dropped_packets
            + line.held_packets() as u64);
    }
}
