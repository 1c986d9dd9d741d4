//! What the guests do, and who moves them.

use crate::compare::Ways;
use clap::ValueEnum;
use serde::{Serialize, Serializer};
use std::fmt;
use whimbrel_lab::pair::GuestSpec;
use whimbrel_workload::params::Pace;

const NAME: &str = "disks";

/// What the guest does to its disk; all write some pages of RAM beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// Whole files read one after the other, each once a pass; few writes
    Sequential,
    /// Small records appended, each made durable; small files' blocks written in place; few reads
    Mail,
    /// Files read by Zipf; blocks written in place
    Zipf,
}

impl Load {
    pub fn name(self) -> String {
        name(&self)
    }

    pub fn describe(self) -> &'static str {
        match self {
            Load::Sequential => "files read at 4 MiB/s, 2 records/s appended and synced",
            Load::Mail => {
                "40 records/s of 4 KiB appended, each synced; 20 random blocks/s, synced by 4; 512 KiB/s read"
            }
            Load::Zipf => "files read by Zipf (0.9) at 2 MiB/s; 20 random blocks/s; 5 records/s",
        }
    }

    /// 192 MiB of RAM, a disk of 512 MiB with 120 MiB of files. Little is written to RAM: what is compared is disks.
    pub fn spec(self) -> GuestSpec {
        let mut spec = GuestSpec::small(NAME);
        spec.disk.size_mib = 512;
        spec.disk.files_mib = 120;
        let params = &mut spec.params;
        params.interval_ms = 250;
        params.ram.hot_mib = 16;
        params.ram.region_mib = 16;
        params.ram.pace = Pace::PerSecond(200);
        params.ram.sweep = Pace::PerSecond(200);
        params.log.max_mib = 16;
        params.random.file_mib = 16;
        params.random.sync_every = 4;
        // What was read shall be read from the disk again.
        params.read.drop_s = 2;
        let per_second = |n| Pace::PerSecond(n);
        (
            params.log.pace,
            params.random.pace,
            params.read.pace,
            params.read.zipf,
        ) = match self {
            Load::Sequential => (per_second(2), Pace::Off, per_second(4096), 0.0),
            Load::Mail => (per_second(40), per_second(20), per_second(512), 0.0),
            Load::Zipf => (per_second(5), per_second(20), per_second(2048), 0.9),
        };
        spec
    }
}

/// Who moves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mover {
    /// `--disks postcopy`
    WhimbrelPostcopy,
    /// `--disks hybrid`
    WhimbrelHybrid,
    /// Mirror in the background, then pre-copy
    QemuBackground,
    /// Mirror in the background, then post-copy
    QemuBackgroundPostcopy,
    /// Mirror that makes writes wait, then pre-copy
    QemuBlocking,
    /// Mirror that makes writes wait, then post-copy
    QemuBlockingPostcopy,
}

/// By whom others are measured: what libvirt does by itself.
pub const REFERENCE: Mover = Mover::QemuBackground;

pub enum Way {
    /// The word after `--disks`.
    Ours(&'static str),
    Theirs(Ways),
}

impl Mover {
    pub fn way(self) -> Way {
        let theirs = |write_blocking, postcopy| {
            Way::Theirs(Ways {
                write_blocking,
                postcopy,
            })
        };
        match self {
            Mover::WhimbrelPostcopy => Way::Ours("postcopy"),
            Mover::WhimbrelHybrid => Way::Ours("hybrid"),
            Mover::QemuBackground => theirs(false, false),
            Mover::QemuBackgroundPostcopy => theirs(false, true),
            Mover::QemuBlocking => theirs(true, false),
            Mover::QemuBlockingPostcopy => theirs(true, true),
        }
    }
}

/// The name on the command line.
fn name(value: &impl ValueEnum) -> String {
    let shown = value.to_possible_value();
    shown.map_or_else(String::new, |value| value.get_name().to_owned())
}

impl fmt::Display for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&name(self))
    }
}

impl Serialize for Mover {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
