//! What is moved, over which link, and by whom.

use super::RamArgs;
use clap::ValueEnum;
use serde::{Serialize, Serializer};
use std::fmt;
use std::time::Duration;
use whimbrel_lab::net::LabSpec;
use whimbrel_lab::pair::GuestSpec;
use whimbrel_lab::wan::{LineSpec, WanSpec};
use whimbrel_workload::params::{Pace, RamAccess, RamMode};

const NAME: &str = "ram";

/// Pages a second that the guests write unless told otherwise: several times what 100 Mbit/s carries whole, and
/// what it carries, of half compressible content.
const SPARSE_PACE: u32 = 20_000;
const ZIPF_PACE: u32 = 4_000;

/// Pages a second that writers check beside it.
const SWEEP: u32 = 1_000;

pub const STREAM_PORT: u16 = 7100;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestKind {
    /// One word of 8 bytes in a page, any page of the region alike
    Sparse,
    /// Whole pages of fresh content, by Zipf
    Zipf,
    /// Nothing
    Idle,
    /// A stream of chunks by TCP to a client
    Stream,
}

impl GuestKind {
    pub fn spec(self, args: &RamArgs) -> GuestSpec {
        let mut spec = GuestSpec::small(NAME);
        spec.memory_mib = args.memory;
        spec.disk.size_mib = 16;
        spec.disk.files_mib = 1;
        let params = &mut spec.params;
        // The disk is there and nobody looks at it: what is compared is RAM.
        params.disk = "none".to_owned();
        params.interval_ms = 250;
        for pace in [
            &mut params.log.pace,
            &mut params.random.pace,
            &mut params.read.pace,
        ] {
            *pace = Pace::Off;
        }
        params.ram.hot_mib = args.region;
        params.ram.region_mib = args.region;
        let paced = |pace| match args.pace {
            Some(pages) => Pace::PerSecond(pages),
            None => Pace::PerSecond(pace),
        };
        (params.ram.pace, params.ram.sweep) = match self {
            GuestKind::Sparse => (paced(SPARSE_PACE), Pace::PerSecond(SWEEP)),
            GuestKind::Zipf => (paced(ZIPF_PACE), Pace::PerSecond(SWEEP)),
            GuestKind::Idle | GuestKind::Stream => (Pace::Off, Pace::Off),
        };
        (params.ram.mode, params.ram.access) = match self {
            GuestKind::Zipf => (RamMode::Page, RamAccess::Zipf),
            _ => (RamMode::Word, RamAccess::Uniform),
        };
        if self == GuestKind::Stream {
            params.stream_port = STREAM_PORT;
        }
        spec
    }
}

/// Which wide area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub enum Link {
    #[value(name = "100mbit/40ms")]
    #[serde(rename = "100mbit/40ms")]
    Usual,
    #[value(name = "1000mbit/2ms")]
    #[serde(rename = "1000mbit/2ms")]
    Near,
    #[value(name = "20mbit/100ms")]
    #[serde(rename = "20mbit/100ms")]
    Far,
}

impl Link {
    fn line(self) -> (u64, u64) {
        match self {
            Link::Usual => (100, 40),
            Link::Near => (1000, 2),
            Link::Far => (20, 100),
        }
    }

    pub fn lab(self) -> LabSpec {
        let (mbits, rtt_ms) = self.line();
        let line = LineSpec::new(mbits * 1_000_000, Duration::from_millis(rtt_ms) / 2);
        LabSpec::new(WanSpec::symmetric(line))
    }
}

/// How Whimbrel is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ours {
    pub ram: &'static str,
    /// Whole pages only: what the command may not know.
    pub whole: bool,
}

/// How QEMU is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Theirs {
    Precopy,
    Xbzrle,
    Multifd,
    /// After so many passes over memory; 0: at once.
    Postcopy {
        passes: u64,
    },
}

/// Who moves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mover {
    /// `--ram hybrid`
    WhimbrelHybrid,
    /// `--ram postcopy`
    WhimbrelPostcopy,
    /// `--ram precopy`
    WhimbrelPrecopy,
    /// `--ram hybrid --delta off`
    WhimbrelHybridWhole,
    /// `--ram precopy --delta off`
    WhimbrelPrecopyWhole,
    /// QEMU's pre-copy
    QemuPrecopy,
    /// QEMU's pre-copy with XBZRLE, its cache as large as the guest
    QemuXbzrle,
    /// QEMU's pre-copy by two channels with zstd
    QemuMultifd,
    /// QEMU's post-copy with preemption, switched at once
    QemuPostcopy,
    /// The same, switched after one pass
    QemuPostcopyLate,
}

/// By whom others are measured.
pub const REFERENCE: Mover = Mover::QemuPostcopy;

pub enum Way {
    Ours(Ours),
    Theirs(Theirs),
}

impl Mover {
    pub fn way(self) -> Way {
        let ours = |ram, whole| Way::Ours(Ours { ram, whole });
        match self {
            Mover::WhimbrelHybrid => ours("hybrid", false),
            Mover::WhimbrelPostcopy => ours("postcopy", false),
            Mover::WhimbrelPrecopy => ours("precopy", false),
            Mover::WhimbrelHybridWhole => ours("hybrid", true),
            Mover::WhimbrelPrecopyWhole => ours("precopy", true),
            Mover::QemuPrecopy => Way::Theirs(Theirs::Precopy),
            Mover::QemuXbzrle => Way::Theirs(Theirs::Xbzrle),
            Mover::QemuMultifd => Way::Theirs(Theirs::Multifd),
            Mover::QemuPostcopy => Way::Theirs(Theirs::Postcopy { passes: 0 }),
            Mover::QemuPostcopyLate => Way::Theirs(Theirs::Postcopy { passes: 1 }),
        }
    }
}

/// The name on the command line.
pub fn name(value: &impl ValueEnum) -> String {
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

/// A guest on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    pub guest: GuestKind,
    pub link: Link,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", name(&self.guest), name(&self.link))
    }
}

/// One of `--only`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    Guest(GuestKind),
    Link(Link),
    Mover(Mover),
}

impl Only {
    pub fn parse(text: &str) -> Result<Only, String> {
        let (key, value) = text
            .split_once('=')
            .ok_or("wanted: guest=..., link=... or mover=...")?;
        match key {
            "guest" => one(value).map(Only::Guest),
            "link" => one(value).map(Only::Link),
            "mover" => one(value).map(Only::Mover),
            _ => Err("wanted: guest=..., link=... or mover=...".to_owned()),
        }
    }
}

fn one<T: ValueEnum>(text: &str) -> Result<T, String> {
    T::from_str(text, false).map_err(|_| {
        let all: Vec<_> = T::value_variants().iter().map(name).collect();
        format!("wanted one of {}", all.join(", "))
    })
}

/// What is to be run: all that no condition of its kind excludes.
pub fn chosen<T: ValueEnum + PartialEq>(only: &[Only], of: impl Fn(&Only) -> Option<T>) -> Vec<T> {
    let named: Vec<T> = only.iter().filter_map(of).collect();
    let all = T::value_variants().iter().cloned();
    all.filter(|value| named.is_empty() || named.contains(value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_of_one_kind_add_up_and_kinds_exclude() {
        let only: Vec<_> = ["guest=idle", "guest=zipf", "mover=qemu-xbzrle"]
            .iter()
            .map(|text| Only::parse(text).expect("a condition"))
            .collect();
        let guests = chosen(&only, |only| match only {
            Only::Guest(guest) => Some(*guest),
            _ => None,
        });
        assert_eq!(guests, [GuestKind::Zipf, GuestKind::Idle]);
        let links = chosen(&only, |only| match only {
            Only::Link(link) => Some(*link),
            _ => None,
        });
        assert_eq!(links.len(), 3);
        for bad in ["guest", "guest=busy", "rate=100"] {
            assert!(Only::parse(bad).is_err(), "{bad}");
        }
    }
}
