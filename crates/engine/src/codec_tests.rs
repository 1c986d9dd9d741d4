//! A chooser against machines, links and content of which everything is known.

use super::*;
use proptest::prelude::*;

const BATCH: u64 = 256 << 10;
const ALLOWED: Allowed = Allowed {
    rate: 5_000_000_000,
    phase: Phase::Met,
    is_behind: false,
};

/// A world in which a batch takes as long as the slower of sender and link.
#[derive(Clone, Copy)]
pub(super) struct World {
    /// Bytes a second.
    link: f64,
    /// The sender's costs, in usual ones.
    slowness: f64,
    /// What level 1 leaves of the content.
    share: f64,
}

impl World {
    /// Not quite what is usual: high levels gain more here.
    pub(super) fn share(&self, codec: Codec) -> f64 {
        match codec {
            Codec::Plain => 1.0,
            Codec::Zstd(level) => {
                let c = LEVELS.iter().position(|&l| l == level).unwrap();
                (self.share * USUAL[c].1.powf(1.3)).min(1.0)
            }
        }
    }

    pub(super) fn cost(&self, codec: Codec) -> f64 {
        match codec {
            Codec::Plain => 0.0,
            Codec::Zstd(level) => {
                let c = LEVELS.iter().position(|&l| l == level).unwrap();
                USUAL[c].0 * 1e-9 * self.slowness
            }
        }
    }

    pub(super) const READ: f64 = 0.2e-9;
    pub(super) const HANDING: f64 = 0.8e-9;

    fn sender(&self, codec: Codec) -> f64 {
        Self::READ + self.cost(codec) + self.share(codec) * Self::HANDING
    }

    /// Seconds a byte.
    fn time(&self, codec: Codec) -> f64 {
        self.sender(codec).max(self.share(codec) / self.link)
    }

    fn best(&self) -> f64 {
        let codecs = LEVELS.map(Codec::Zstd).into_iter().chain([Codec::Plain]);
        codecs.map(|c| self.time(c)).fold(f64::MAX, f64::min)
    }
}

struct Run {
    chooser: Chooser,
    now: f64,
    last: Option<Codec>,
    changes: u32,
}

impl Run {
    fn new(policy: Policy) -> Run {
        Run {
            chooser: Chooser::new(policy),
            now: 0.0,
            last: None,
            changes: 0,
        }
    }

    /// Bytes of content a second over some seconds, probes included. `noise` is a share of each cost.
    fn go(&mut self, world: World, seconds: f64, noise: f64) -> f64 {
        let (from, mut content, mut odd) = (self.now, 0.0, 0_u32);
        while self.now < from + seconds {
            let choice = self.chooser.next((self.now * 1e6) as u64, ALLOWED);
            odd = odd.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let bent = 1.0 + noise * (f64::from(odd >> 16) / 32768.0 - 1.0);
            let pack = |level| {
                let codec = Codec::Zstd(level);
                Packed {
                    level,
                    content: BATCH,
                    left: (world.share(codec) * BATCH as f64) as u64,
                    took: Duration::from_secs_f64(world.cost(codec) * bent * BATCH as f64),
                }
            };
            let used = match choice.codec {
                Codec::Plain => None,
                Codec::Zstd(level) => Some(pack(level)),
            };
            let other = choice.probe.map(pack);
            match (used, other) {
                (Some(used), Some(other)) => {
                    self.chooser.packed(used);
                    self.chooser.probed(used, other);
                }
                (Some(one), None) | (None, Some(one)) => self.chooser.packed(one),
                (None, None) => {}
            }
            let both = used.into_iter().chain(other);
            let packing: f64 = both.map(|p| p.took.as_secs_f64()).sum();
            let wire = used.map_or(BATCH, |used| used.left);
            let (read, handing) = (World::READ * BATCH as f64, World::HANDING * wire as f64);
            let sender = read + packing + handing;
            let turn = (wire as f64 / world.link - sender).max(0.0);
            let time = Duration::from_secs_f64;
            self.chooser.sent(
                Took {
                    content: BATCH,
                    wire,
                    read: time(read),
                    pack: time(packing),
                    turn: time(turn),
                    handing: time(handing),
                },
                ALLOWED,
            );
            self.changes += u32::from(self.last.is_some_and(|last| last != choice.codec));
            self.last = Some(choice.codec);
            self.now += sender + turn;
            content += BATCH as f64;
        }
        content / (self.now - from)
    }
}

const WORLDS: [World; 8] = [
    world(1.25e6, 1.0, 0.4),
    world(12.5e6, 1.0, 0.4),
    world(125e6, 1.0, 0.4),
    world(1.25e9, 1.0, 0.4),
    // A slow CPU on a fast link.
    world(125e6, 8.0, 0.4),
    world(1.25e9, 4.0, 0.3),
    // Content that hardly packs.
    world(12.5e6, 1.0, 0.97),
    world(125e6, 1.0, 1.0),
];

pub(super) const fn world(link: f64, slowness: f64, share: f64) -> World {
    World {
        link,
        slowness,
        share,
    }
}

#[test]
fn what_is_delivered_is_near_the_best_there_is() {
    for world in WORLDS {
        let mut run = Run::new(Policy::Auto);
        run.go(world, 5.0, 0.3);
        let settled = run.changes;
        let delivered = run.go(world, 20.0, 0.3);
        let share = delivered * world.best();
        let (link, slowness) = (world.link, world.slowness);
        println!(
            "link {:>7.1} MB/s, CPU x{slowness}, level 1 leaves {:.2}: {:>7.1} MB/s by {:?}, {:.1}% of the best",
            link / 1e6,
            world.share,
            delivered / 1e6,
            run.last,
            share * 100.0
        );
        assert!(share > 0.9, "{share}");
        let flips = run.changes - settled;
        assert!(flips <= 4, "{flips} changes on a link of {link} B/s");
    }
}

#[test]
fn a_change_of_link_or_content_is_followed() {
    let mut run = Run::new(Policy::Auto);
    for world in WORLDS.into_iter().chain(WORLDS.into_iter().rev()) {
        run.go(world, 10.0, 0.2);
        let delivered = run.go(world, 10.0, 0.2);
        let share = delivered * world.best();
        assert!(
            share > 0.9,
            "{share} with {:?} at {} B/s",
            run.last,
            world.link
        );
    }
}

#[test]
fn a_slow_link_gets_a_high_level_and_a_fast_one_none() {
    let mut run = Run::new(Policy::Auto);
    run.go(world(1.25e6, 1.0, 0.4), 5.0, 0.0);
    assert!(
        matches!(run.last, Some(Codec::Zstd(6 | 9))),
        "{:?}",
        run.last
    );
    run.go(world(3e9, 4.0, 0.4), 15.0, 0.0);
    assert_eq!(run.last, Some(Codec::Plain));
}

#[test]
fn demands_are_packed_quickly_and_only_where_it_shortens_the_wait() {
    let mut run = Run::new(Policy::Auto);
    run.go(world(1.25e6, 1.0, 0.4), 5.0, 0.0);
    assert!(matches!(
        run.chooser.for_demand(ALLOWED),
        Codec::Zstd(-5..=1)
    ));
    let mut run = Run::new(Policy::Auto);
    run.go(world(1.25e9, 1.0, 0.4), 5.0, 0.0);
    assert_eq!(run.chooser.for_demand(ALLOWED), Codec::Plain);
}

#[test]
fn what_the_operator_wants_is_done() {
    for (policy, codec) in [
        (Policy::Plain, Codec::Plain),
        (Policy::Level(19), Codec::Zstd(19)),
    ] {
        let mut chooser = Chooser::new(policy);
        let choice = chooser.next(0, ALLOWED);
        assert_eq!((choice.codec, choice.probe), (codec, None));
    }
    assert_eq!(
        Chooser::new(Policy::Plain).for_demand(Allowed::met(1)),
        Codec::Plain
    );
    assert_eq!(
        Chooser::new(Policy::Level(19)).for_demand(Allowed::met(1)),
        Codec::Zstd(1)
    );
}

#[test]
fn a_policy_is_read_and_written() {
    for (text, policy) in [
        ("auto", Policy::Auto),
        ("none", Policy::Plain),
        ("zstd:3", Policy::Level(3)),
        ("zstd:-7", Policy::Level(-7)),
    ] {
        assert_eq!(text.parse(), Ok(policy));
        assert_eq!(policy.to_string(), text);
    }
    assert_eq!("zstd".parse(), Ok(Policy::Level(3)));
    for text in ["", "lz4", "zstd:", "zstd:20", "zstd:fast", "ZSTD"] {
        assert!(text.parse::<Policy>().is_err(), "{text}");
    }
}

proptest! {
    /// Whatever is told, in whatever order: a codec comes out, and one of those there are.
    #[test]
    fn nothing_that_is_told_breaks_it(
        steps in prop::collection::vec(
            (0_u64..2_000_000, 0..LEVELS.len(), any::<u32>(), any::<u32>(), any::<[u32; 4]>(), any::<u64>()),
            1..200,
        ),
    ) {
        let mut chooser = Chooser::new(Policy::Auto);
        let mut now = 0;
        for (pause, c, content, left, [read, pack, turn, handing], allowed) in steps {
            now += pause;
            let (content, left) = (u64::from(content), u64::from(left));
            let micros = |n: u32| Duration::from_micros(u64::from(n));
            let (level, next) = (LEVELS[c], LEVELS[(c + 1) % LEVELS.len()]);
            let packed = |level, took| Packed { level, content, left, took: micros(took) };
            chooser.packed(packed(level, pack));
            chooser.probed(packed(level, pack), packed(next, read));
            let took = Took {
                content,
                wire: left,
                read: micros(read),
                pack: micros(pack),
                turn: micros(turn),
                handing: micros(handing),
            };
            let allowed = Allowed { rate: allowed, phase: [Phase::Growing, Phase::Met, Phase::Held][c % 3], is_behind: read % 2 == 0 };
            chooser.sent(took, allowed);
            let choice = chooser.next(now, allowed);
            if let Codec::Zstd(level) = choice.codec {
                prop_assert!(LEVELS.contains(&level));
            }
            prop_assert!(chooser.left() > 0.0 && chooser.left() <= 1.0);
            prop_assert!(chooser.time(chooser.current, allowed.rate.max(1) as f64).is_finite());
            chooser.for_demand(allowed);
        }
    }
}
