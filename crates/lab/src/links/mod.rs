//! A move made for measuring the link: a machine without a system, a disk of noise, and its reader outside.
//!
//! Without KVM a guest cannot ask for as much as a fast link carries, and what it does costs the cores that the
//! link needs. So the machine here finds nothing to boot and sleeps, and what a guest would ask for is read
//! through the machine's own export by [`demands`]. The disk holds noise, so that no codec plays a part. What
//! the link gives to who has nothing else to do, [`copy`] tells.

pub mod copy;
pub mod data;
pub mod demands;

use crate::net::Host;
use crate::pair::answers::{HostView, MigrationView, Phase};
use crate::pair::{Follow, Pair, PairError};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use whimbrel_workload::chance::Rng;

/// The machine and its volume.
pub const NAME: &str = "bench";

/// Push at this rate is none.
pub const HELD: &str = "1kbit";

const UNIT: u64 = 4096;

/// How long each thing that is waited for may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Writes a file of so many bytes that nothing packs and nothing boots from.
pub fn noise(path: &Path, bytes: u64) -> Result<(), PairError> {
    let file = File::create(path).map_err(PairError::io("create", path))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let mut rng = Rng::new(bytes, 0);
    let mut block = vec![0_u8; 1 << 16];
    let mut left = bytes;
    while left > 0 {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&rng.next_u64().to_le_bytes());
        }
        if left == bytes {
            block[..UNIT as usize].fill(0x5a);
        }
        let part = left.min(block.len() as u64);
        file.write_all(&block[..part as usize])
            .map_err(PairError::io("write", path))?;
        left -= part;
    }
    file.flush().map_err(PairError::io("write", path))
}

/// What came of a machine's move until a moment.
#[derive(Clone, Copy, Debug)]
pub struct Arrived {
    pub at: Instant,
    /// Content at the destination, in bytes.
    pub bytes: u64,
    pub is_complete: bool,
}

/// Of `whimbrel status MACHINE`, what counts here.
#[derive(Deserialize)]
struct Status {
    migration: Option<MigrationView>,
}

/// Two hosts and the machine between them.
#[derive(Debug)]
pub struct Rig {
    pair: Pair,
    bytes: u64,
}

impl Rig {
    /// Makes the machine on host A, its disk a copy of `content`.
    pub fn new(pair: Pair, content: &Path) -> Result<Rig, PairError> {
        let bytes = std::fs::metadata(content)
            .map_err(PairError::io("find", content))?
            .len();
        let command = pair.on(Host::A);
        command.run(&["volume", "import", NAME, &content.to_string_lossy()])?;
        let file = pair.site(Host::A).folder().join("bench.toml");
        let machine = format!(
            "name = {NAME:?}\nmemory = \"32MiB\"\naccel = \"tcg\"\n\n[[disk]]\nvolume = {NAME:?}\n"
        );
        std::fs::write(&file, machine).map_err(PairError::io("write", &file))?;
        command.run(&["machine", "define", &file.to_string_lossy()])?;
        command.run(&["machine", "start", NAME])?;
        Ok(Rig { pair, bytes })
    }

    pub fn pair(&self) -> &Pair {
        &self.pair
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Switches the machine over; push is held to `bandwidth` from the start, and content goes as it is.
    pub fn depart(&self, bandwidth: &str) -> Result<(), PairError> {
        self.depart_packed(bandwidth, "none")
    }

    /// Switches the machine over; content is packed as `--compress` says.
    pub fn depart_packed(&self, bandwidth: &str, compress: &str) -> Result<(), PairError> {
        self.pair.on(Host::A).run(&[
            "migrate",
            NAME,
            "--to",
            "host-b",
            "--ram",
            "postcopy",
            "--compress",
            compress,
            // What is measured is the link.
            "--guest-latency",
            "off",
            "--bandwidth",
            bandwidth,
            "--detach",
        ])?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let view = self.view(Host::B)?;
            if view.as_ref().is_some_and(|v| v.phase == Phase::Drain) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(PairError::NotReached {
                    awaited: "the drain",
                    after: PATIENCE,
                    last: view.map_or("no move".to_owned(), |v| v.phase.to_string()),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Push may use so much from now on.
    pub fn throttle(&self, bandwidth: &str) -> Result<(), PairError> {
        let command = self.pair.on(Host::A);
        command.run(&["throttle", NAME, bandwidth]).map(drop)
    }

    /// The move as a host tells it.
    pub fn view(&self, host: Host) -> Result<Option<MigrationView>, PairError> {
        match self.pair.on(host).answer::<Status>(&["status", NAME]) {
            Ok(status) => Ok(status.migration),
            // Between its offer and its being known.
            Err(PairError::Refused(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What arrives, as the destination tells it from now on.
    pub fn arrivals(&self) -> Result<Arrivals, PairError> {
        let follow = self.pair.on(Host::B).follow(&["watch", NAME])?;
        Ok(Arrivals {
            follow,
            series: Vec::new(),
        })
    }

    /// CPU time that both daemons have used so far, in seconds.
    pub fn cpu(&self) -> Result<f64, PairError> {
        let mut ticks = 0;
        for host in Host::BOTH {
            let view: HostView = self.pair.on(host).answer(&["host", "show"])?;
            if let Some(daemon) = view.daemon {
                ticks += ticks_of(daemon.pid);
            }
        }
        Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }
}

/// User and system time of a process, in clock ticks (`proc(5)`: fields 14 and 15 of `stat`).
fn ticks_of(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in brackets may hold spaces.
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let fields = after.split_whitespace().skip(11).take(2);
    fields.filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// Content at the destination over time.
#[derive(Debug)]
pub struct Arrivals {
    follow: Follow,
    series: Vec<Arrived>,
}

impl Arrivals {
    /// Gathers until `end`, or until everything is there; `more` is asked at each word whether to go on.
    pub fn until(
        &mut self,
        end: Instant,
        mut more: impl FnMut(&Arrived) -> bool,
    ) -> Result<(), PairError> {
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            let over = self.follow.is_over();
            let Some(seen) = self.follow.next(left.min(Duration::from_millis(50)))? else {
                if over {
                    return Ok(());
                }
                continue;
            };
            let resident: u64 = seen.view.spaces.iter().map(|s| s.units_resident).sum();
            let live: u64 = seen.view.spaces.iter().map(|s| s.units_total).sum();
            let arrived = Arrived {
                at: seen.at,
                bytes: resident * UNIT,
                is_complete: resident == live || seen.view.phase == Phase::Complete,
            };
            self.series.push(arrived);
            if arrived.is_complete || !more(&arrived) {
                return Ok(());
            }
        }
        Ok(())
    }

    pub fn series(&self) -> &[Arrived] {
        &self.series
    }

    /// Content that came between two moments, in bits a second; `None` if less than two words were heard.
    pub fn rate(&self, from: Instant, to: Instant) -> Option<f64> {
        let within: Vec<_> = self
            .series
            .iter()
            .filter(|a| a.at >= from && a.at <= to)
            .collect();
        let (first, last) = (within.first()?, within.last()?);
        let seconds = (last.at - first.at).as_secs_f64();
        (seconds > 0.0).then(|| (last.bytes - first.bytes) as f64 * 8.0 / seconds)
    }
}
