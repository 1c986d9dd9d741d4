//! The parameters, as they stand on the kernel command line.
//!
//! Each is one word `wl.name=value`; words without the prefix are the kernel's and are skipped, an
//! unknown name with it is an error, because a misspelt parameter would silently test something else.
//! [`Params::to_cmdline`] writes what [`Params::parse`] reads.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

/// How fast a workload may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pace {
    Off,
    /// Units per second; the unit is the workload's. At least 1.
    PerSecond(u32),
    Max,
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pace::Off => f.write_str("off"),
            Pace::PerSecond(n) => write!(f, "{n}"),
            Pace::Max => f.write_str("max"),
        }
    }
}

/// The word is none of `off`, `max` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a pace is `off`, `max` or a number per second")]
pub struct NotAPace;

impl FromStr for Pace {
    type Err = NotAPace;

    fn from_str(s: &str) -> Result<Self, NotAPace> {
        match s {
            "off" | "0" => Ok(Pace::Off),
            "max" => Ok(Pace::Max),
            n => n.parse().map(Pace::PerSecond).map_err(|_| NotAPace),
        }
    }
}

/// How much of a RAM page one write changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RamMode {
    /// One word of 8 bytes: the worst case for whole-page copies, the best for deltas.
    Word,
    /// All 4096 bytes.
    Page,
}

/// Which RAM page is written next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RamAccess {
    /// Any of the hot set's pages alike; the rest of the region stays cold.
    Uniform,
    /// Zipf over the whole region, its ranks scattered.
    Zipf,
}

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cidr {
    pub address: Ipv4Addr,
    pub prefix: u8,
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Params {
    /// The guest's address; without one it has no network.
    pub ip: Option<Cidr>,
    pub gateway: Option<Ipv4Addr>,
    /// Who gets the reports.
    pub client: Option<Ipv4Addr>,
    /// UDP port of the reports, at the client.
    pub client_port: u16,
    /// UDP port of the echo, in the guest.
    pub echo_port: u16,
    /// TCP port of the control lines, in the guest.
    pub control_port: u16,
    /// TCP port of the stream, in the guest; 0: none.
    pub stream_port: u16,
    /// Milliseconds from chunk to chunk of the stream.
    pub stream_ms: u32,
    pub seed: u64,
    /// Milliseconds from report to report.
    pub interval_ms: u32,
    /// Milliseconds between the looks at the clock that measure how long the guest stood still; 0: none.
    pub tick_ms: u32,
    /// The disk; `none` for a guest without one.
    pub disk: String,
    /// Where the disk is mounted; outside a guest, an existing folder to work in.
    pub dir: PathBuf,
    pub ram: RamParams,
    pub log: LogParams,
    pub random: RandomParams,
    pub read: ReadParams,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RamParams {
    /// MiB of the hot set, the first part of the region.
    pub hot_mib: u32,
    /// MiB of all self-checking pages; at least the hot set.
    pub region_mib: u32,
    pub mode: RamMode,
    pub access: RamAccess,
    /// Zipf's exponent, 0.01 to 0.999.
    pub theta: f64,
    /// Pages written per second.
    pub pace: Pace,
    /// Pages checked per second by the sweep over the region.
    pub sweep: Pace,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogParams {
    /// Records appended per second.
    pub pace: Pace,
    /// Bytes per record: 512 or 4096.
    pub record_bytes: u32,
    /// Records between two fsyncs.
    pub batch: u32,
    /// MiB after which the log wraps.
    pub max_mib: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RandomParams {
    /// Blocks written per second.
    pub pace: Pace,
    /// MiB of the preallocated file.
    pub file_mib: u32,
    /// With O_DIRECT.
    pub direct: bool,
    /// Writes between two fsyncs.
    pub sync_every: u32,
    /// How many of a hundred writes are followed by a check of some block.
    pub verify_percent: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadParams {
    /// KiB read per second.
    pub pace: Pace,
    /// Seconds between two drops of the page cache; 0: never.
    pub drop_s: u32,
    /// Zipf's exponent, 0.01 to 0.999, by which the next file is chosen; 0: each in turn.
    pub zipf: f64,
}

impl Default for Params {
    /// Paces that leave most of one TCG processor idle.
    fn default() -> Self {
        Params {
            ip: None,
            gateway: None,
            client: None,
            client_port: 7777,
            echo_port: 7,
            control_port: 7008,
            stream_port: 0,
            stream_ms: 5,
            seed: 1,
            interval_ms: 1000,
            tick_ms: 20,
            disk: "/dev/vda".into(),
            dir: "/disk".into(),
            ram: RamParams {
                hot_mib: 64,
                region_mib: 64,
                mode: RamMode::Page,
                access: RamAccess::Uniform,
                theta: 0.99,
                pace: Pace::PerSecond(2000),
                sweep: Pace::PerSecond(1000),
            },
            log: LogParams {
                pace: Pace::PerSecond(20),
                record_bytes: 4096,
                batch: 1,
                max_mib: 64,
            },
            random: RandomParams {
                pace: Pace::PerSecond(50),
                file_mib: 64,
                direct: true,
                sync_every: 16,
                verify_percent: 25,
            },
            read: ReadParams {
                pace: Pace::PerSecond(2048),
                drop_s: 30,
                zipf: 0.0,
            },
        }
    }
}

const PREFIX: &str = "wl.";

impl Params {
    /// Every workload off; what a test switches on is then all there is.
    pub fn idle() -> Self {
        let mut params = Params::default();
        params.ram.pace = Pace::Off;
        params.ram.sweep = Pace::Off;
        params.log.pace = Pace::Off;
        params.random.pace = Pace::Off;
        params.read.pace = Pace::Off;
        params
    }

    /// Reads a kernel command line.
    pub fn parse(cmdline: &str) -> Result<Self, Error> {
        let mut params = Params::default();
        let mut region_given = false;
        for word in cmdline.split_whitespace() {
            let Some(rest) = word.strip_prefix(PREFIX) else {
                continue;
            };
            let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
            region_given |= key == "ram.region";
            params.set(key, value)?;
        }
        if !region_given || params.ram.region_mib < params.ram.hot_mib {
            params.ram.region_mib = params.ram.hot_mib;
        }
        Ok(params)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Error> {
        match key {
            "ip" => self.ip = Some(cidr(key, value)?),
            "gw" => self.gateway = Some(number(key, value, "an IPv4 address")?),
            "client" => self.client = Some(number(key, value, "an IPv4 address")?),
            "client.port" => self.client_port = number(key, value, "a port")?,
            "echo" => self.echo_port = number(key, value, "a port")?,
            "control" => self.control_port = number(key, value, "a port")?,
            "stream" => self.stream_port = number(key, value, "a port")?,
            "stream.ms" => self.stream_ms = at_least(1, key, value)?,
            "seed" => self.seed = number(key, value, "a number")?,
            "interval_ms" => self.interval_ms = at_least(1, key, value)?,
            "tick_ms" => self.tick_ms = at_least(0, key, value)?,
            "disk" => self.disk = value.into(),
            "dir" => self.dir = value.into(),
            "ram.hot" => self.ram.hot_mib = at_least(1, key, value)?,
            "ram.region" => self.ram.region_mib = at_least(1, key, value)?,
            "ram.mode" => {
                self.ram.mode = match value {
                    "word" => RamMode::Word,
                    "page" => RamMode::Page,
                    _ => return Err(unfit(key, value, "`word` or `page`")),
                }
            }
            "ram.access" => {
                self.ram.access = match value {
                    "uniform" => RamAccess::Uniform,
                    "zipf" => RamAccess::Zipf,
                    _ => return Err(unfit(key, value, "`uniform` or `zipf`")),
                }
            }
            "ram.theta" => {
                let theta: f64 = number(key, value, "a number")?;
                if !(0.01..=0.999).contains(&theta) {
                    return Err(unfit(key, value, "between 0.01 and 0.999"));
                }
                self.ram.theta = theta;
            }
            "ram.pace" => self.ram.pace = pace(key, value)?,
            "ram.sweep" => self.ram.sweep = pace(key, value)?,
            "log.pace" => self.log.pace = pace(key, value)?,
            "log.record" => {
                self.log.record_bytes = match value {
                    "512" => 512,
                    "4096" => 4096,
                    _ => return Err(unfit(key, value, "512 or 4096")),
                }
            }
            "log.batch" => self.log.batch = at_least(1, key, value)?,
            "log.max" => self.log.max_mib = at_least(1, key, value)?,
            "random.pace" => self.random.pace = pace(key, value)?,
            "random.file" => self.random.file_mib = at_least(1, key, value)?,
            "random.direct" => {
                self.random.direct = match value {
                    "0" => false,
                    "1" => true,
                    _ => return Err(unfit(key, value, "0 or 1")),
                }
            }
            "random.sync" => self.random.sync_every = at_least(1, key, value)?,
            "random.verify" => self.random.verify_percent = at_least(0, key, value)?.min(100),
            "read.pace" => self.read.pace = pace(key, value)?,
            "read.zipf" => {
                let theta: f64 = number(key, value, "a number")?;
                if theta != 0.0 && !(0.01..=0.999).contains(&theta) {
                    return Err(unfit(key, value, "0, or between 0.01 and 0.999"));
                }
                self.read.zipf = theta;
            }
            "read.drop_s" => self.read.drop_s = at_least(0, key, value)?,
            _ => {
                return Err(Error::UnknownParam {
                    key: format!("{PREFIX}{key}"),
                });
            }
        }
        Ok(())
    }

    /// All parameters as words for a kernel command line.
    pub fn to_cmdline(&self) -> String {
        let mut words: Vec<(&str, String)> = Vec::new();
        words.extend(self.ip.map(|ip| ("ip", ip.to_string())));
        words.extend(self.gateway.map(|gw| ("gw", gw.to_string())));
        words.extend(self.client.map(|client| ("client", client.to_string())));
        let mode = match self.ram.mode {
            RamMode::Word => "word",
            RamMode::Page => "page",
        };
        let access = match self.ram.access {
            RamAccess::Uniform => "uniform",
            RamAccess::Zipf => "zipf",
        };
        words.extend([
            ("client.port", self.client_port.to_string()),
            ("echo", self.echo_port.to_string()),
            ("control", self.control_port.to_string()),
            ("stream", self.stream_port.to_string()),
            ("stream.ms", self.stream_ms.to_string()),
            ("seed", self.seed.to_string()),
            ("interval_ms", self.interval_ms.to_string()),
            ("tick_ms", self.tick_ms.to_string()),
            ("disk", self.disk.clone()),
            ("dir", self.dir.display().to_string()),
            ("ram.hot", self.ram.hot_mib.to_string()),
            ("ram.region", self.ram.region_mib.to_string()),
            ("ram.mode", mode.into()),
            ("ram.access", access.into()),
            ("ram.theta", self.ram.theta.to_string()),
            ("ram.pace", self.ram.pace.to_string()),
            ("ram.sweep", self.ram.sweep.to_string()),
            ("log.pace", self.log.pace.to_string()),
            ("log.record", self.log.record_bytes.to_string()),
            ("log.batch", self.log.batch.to_string()),
            ("log.max", self.log.max_mib.to_string()),
            ("random.pace", self.random.pace.to_string()),
            ("random.file", self.random.file_mib.to_string()),
            ("random.direct", u8::from(self.random.direct).to_string()),
            ("random.sync", self.random.sync_every.to_string()),
            ("random.verify", self.random.verify_percent.to_string()),
            ("read.pace", self.read.pace.to_string()),
            ("read.zipf", self.read.zipf.to_string()),
            ("read.drop_s", self.read.drop_s.to_string()),
        ]);
        let words: Vec<String> = words
            .into_iter()
            .map(|(key, value)| format!("{PREFIX}{key}={value}"))
            .collect();
        words.join(" ")
    }
}

fn unfit(key: &str, value: &str, expects: &'static str) -> Error {
    Error::Param {
        key: format!("{PREFIX}{key}"),
        value: value.into(),
        expects,
    }
}

fn number<T: FromStr>(key: &str, value: &str, expects: &'static str) -> Result<T, Error> {
    value.parse().map_err(|_| unfit(key, value, expects))
}

fn at_least(least: u32, key: &str, value: &str) -> Result<u32, Error> {
    match value.parse() {
        Ok(n) if n >= least => Ok(n),
        _ => Err(unfit(key, value, "a number large enough")),
    }
}

fn pace(key: &str, value: &str) -> Result<Pace, Error> {
    number(key, value, "`off`, `max` or a number per second")
}

fn cidr(key: &str, value: &str) -> Result<Cidr, Error> {
    let parsed = value.split_once('/').and_then(|(address, prefix)| {
        Some(Cidr {
            address: address.parse().ok()?,
            prefix: prefix.parse().ok().filter(|&p| p <= 32)?,
        })
    });
    parsed.ok_or_else(|| unfit(key, value, "an address with its prefix, as 10.0.0.2/24"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut params = Params::idle();
        params.ip = Some(Cidr {
            address: Ipv4Addr::new(192, 168, 77, 10),
            prefix: 24,
        });
        params.client = Some(Ipv4Addr::new(192, 168, 77, 1));
        params.ram.mode = RamMode::Word;
        params.ram.access = RamAccess::Zipf;
        params.ram.region_mib = 128;
        params.ram.pace = Pace::Max;
        params.log.pace = Pace::PerSecond(7);
        params.random.direct = false;
        params.read.zipf = 0.9;
        params.stream_port = 7100;
        let cmdline = format!("console=ttyS0 quiet {} panic=-1", params.to_cmdline());
        assert_eq!(Params::parse(&cmdline).expect("own words"), params);
    }

    #[test]
    fn the_region_follows_the_hot_set_unless_given() {
        let parse = |s| Params::parse(s).expect("valid").ram;
        assert_eq!(parse("wl.ram.hot=8").region_mib, 8);
        assert_eq!(parse("wl.ram.hot=8 wl.ram.region=32").region_mib, 32);
        assert_eq!(parse("wl.ram.hot=8 wl.ram.region=4").region_mib, 8);
    }

    #[test]
    fn a_misspelt_name_or_value_is_refused() {
        for bad in [
            "wl.ram.hott=8",
            "wl.ram.hot=0",
            "wl.ram.hot=x",
            "wl.ip=10.0.0.1",
            "wl.ip=10.0.0.1/33",
            "wl.log.record=1000",
            "wl.ram.pace=fast",
            "wl.ram.theta=1",
            "wl.ram.mode",
        ] {
            assert!(Params::parse(bad).is_err(), "{bad}");
        }
        assert!(Params::parse("ro quiet panic=1").is_ok());
    }
}
