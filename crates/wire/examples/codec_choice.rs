//! What the chooser does on links of many rates, with real packing of a real file.
//!
//! ```text
//! cargo run --release -p whimbrel-wire --example codec_choice -- /usr/bin/bash [CPUs-as-slow]
//! ```
//!
//! Time is modelled: packing counts with what it really took (times the second argument), the link with its
//! rate, both at once. The first column of results is the chooser's; the others are one codec for all.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use whimbrel_engine::codec::{Allowed, Chooser, Codec, LEVELS, Packed, Policy, Took};
use whimbrel_wire::pack::Packer;

const PIECE: usize = 256 << 10;

/// Seconds modelled for each link, the first of which do not count.
const SECONDS: f64 = 8.0;
const SETTLING: f64 = 2.0;

/// Bytes a second from page cache to kernel, without packing.
const READING: f64 = 4e9;
const HANDING: f64 = 1e9;

struct Outcome {
    delivered: f64,
    /// Share of the time that was spent packing.
    packing: f64,
    codecs: BTreeMap<String, u32>,
}

fn run(pieces: &[&[u8]], link: f64, slowness: f64, policy: Policy) -> Outcome {
    let mut chooser = Chooser::new(policy);
    let mut packer = Packer::default();
    let (mut now, mut content, mut packing) = (0.0, 0.0, 0.0);
    let mut codecs = BTreeMap::new();
    for piece in pieces.iter().cycle() {
        if now > SECONDS {
            break;
        }
        let mut pack = |level| {
            let began = Instant::now();
            let left = match packer.is_dense(piece) {
                true => None,
                false => packer.pack(piece, level),
            };
            Packed {
                level,
                content: piece.len() as u64,
                left: left.map_or(piece.len(), |l| l.len()) as u64,
                took: began.elapsed().mul_f64(slowness),
            }
        };
        let choice = chooser.next((now * 1e6) as u64, Allowed::met(u64::MAX));
        let used = match choice.codec {
            Codec::Plain => None,
            Codec::Zstd(level) => Some(pack(level)),
        };
        let other = choice.probe.map(&mut pack);
        if let Some(packed) = used.or(other) {
            chooser.packed(packed);
        }
        if let (Some(used), Some(other)) = (used, other) {
            chooser.probed(used, other);
        }
        let wire = used.map_or(piece.len() as u64, |u| u.left);
        let took: Duration = used.iter().chain(&other).map(|p| p.took).sum();
        let read = Duration::from_secs_f64(piece.len() as f64 / READING);
        let handing = Duration::from_secs_f64(wire as f64 / HANDING);
        let sender = (read + took + handing).as_secs_f64();
        let turn = (wire as f64 / link - sender).max(0.0);
        chooser.sent(
            Took {
                content: piece.len() as u64,
                wire,
                read,
                pack: took,
                turn: Duration::from_secs_f64(turn),
                handing,
            },
            Allowed::met(u64::MAX),
        );
        now += sender + turn;
        if now > SETTLING {
            content += piece.len() as f64;
            packing += took.as_secs_f64();
            *codecs.entry(format!("{:?}", choice.codec)).or_insert(0) += 1;
        }
    }
    let time = now - SETTLING;
    Outcome {
        delivered: content / time,
        packing: packing / time,
        codecs,
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("which file?")?;
    let slowness = args.next().map_or(Ok(1.0), |text| text.parse())?;
    let content = std::fs::read(&path)?;
    let pieces: Vec<&[u8]> = content.chunks(PIECE).collect();
    println!("{path}, MB/s of content delivered");
    println!(
        "link MB/s     auto packing |    plain {}",
        LEVELS.map(|l| format!("{l:>8}")).concat()
    );
    for link in [1.25e6, 12.5e6, 50e6, 125e6, 312e6, 1.25e9] {
        let auto = run(&pieces, link, slowness, Policy::Auto);
        let fixed = std::iter::once(Policy::Plain).chain(LEVELS.map(Policy::Level));
        let fixed: Vec<String> = fixed
            .map(|policy| {
                format!(
                    "{:>8.1}",
                    run(&pieces, link, slowness, policy).delivered / 1e6
                )
            })
            .collect();
        println!(
            "{:>9.1} {:>8.1} {:>6.0}% | {} {:?}",
            link / 1e6,
            auto.delivered / 1e6,
            auto.packing * 100.0,
            fixed.concat(),
            auto.codecs,
        );
    }
    Ok(())
}
