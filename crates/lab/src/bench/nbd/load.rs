//! The rows of the table, and `fio` as their client.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::BenchError;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Load {
    pub access: Access,
    /// Bytes of a request.
    pub block: u32,
    /// Requests in flight on each connection.
    pub queue: u32,
    pub connections: u32,
    /// The servers keep out of the page cache, as far as they can.
    pub direct: bool,
    pub cores: Cores,
}

/// Where client and server run. With one request at a time nearly all of a request is the two waking each
/// other, and that costs several times more from core to core than on one. Left to itself the kernel's
/// scheduler now places them together and now apart; held in place, servers can be told from luck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cores {
    /// Wherever the scheduler puts them.
    Any,
    /// Both on core 0.
    One,
    /// The client on core 0, the server on core 1.
    Apart,
}

impl Cores {
    pub fn of_client(self) -> Option<&'static str> {
        (self != Cores::Any).then_some("0")
    }

    pub fn of_server(self) -> Option<&'static str> {
        match self {
            Cores::Any => None,
            Cores::One => Some("0"),
            Cores::Apart => Some("1"),
        }
    }

    fn word(self) -> &'static str {
        match self {
            Cores::Any => "",
            Cores::One => " one core",
            Cores::Apart => " two cores",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    RandomRead,
    RandomWrite,
    /// 70 % reads, 30 % writes, at random.
    Mixed,
    Read,
    Write,
}

impl Access {
    fn fio(self) -> &'static [&'static str] {
        match self {
            Access::RandomRead => &["--rw=randread"],
            Access::RandomWrite => &["--rw=randwrite"],
            Access::Mixed => &["--rw=randrw", "--rwmixread=70"],
            Access::Read => &["--rw=read"],
            Access::Write => &["--rw=write"],
        }
    }

    fn word(self) -> &'static str {
        match self {
            Access::RandomRead => "random read",
            Access::RandomWrite => "random write",
            Access::Mixed => "70/30 mixed",
            Access::Read => "sequential read",
            Access::Write => "sequential write",
        }
    }

    pub fn writes(self) -> bool {
        !matches!(self, Access::RandomRead | Access::Read)
    }
}

impl Load {
    /// All rows: page cache first, as what goes past it empties it.
    pub fn all() -> Vec<Load> {
        let kinds = [
            (Access::RandomRead, 4 << 10, 1),
            (Access::RandomRead, 4 << 10, 32),
            (Access::RandomWrite, 4 << 10, 1),
            (Access::RandomWrite, 4 << 10, 32),
            (Access::Mixed, 64 << 10, 16),
            (Access::Read, 256 << 10, 8),
            (Access::Write, 256 << 10, 8),
        ];
        let mut loads = Vec::new();
        for direct in [false, true] {
            for (access, block, queue) in kinds {
                let load = |connections, cores| Load {
                    access,
                    block,
                    queue,
                    connections,
                    direct,
                    cores,
                };
                loads.push(load(1, Cores::Any));
                if queue == 1 {
                    loads.extend([load(1, Cores::One), load(1, Cores::Apart)]);
                }
                loads.push(load(4, Cores::Any));
            }
        }
        loads
    }

    pub fn name(&self) -> String {
        format!(
            "{} {}k {} q{} x{}{}",
            if self.direct { "direct" } else { "cache" },
            self.block >> 10,
            self.access.word(),
            self.queue,
            self.connections,
            self.cores.word()
        )
    }
}

/// What one run of the client found.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figures {
    /// Requests a second, reads and writes together.
    pub iops: f64,
    pub mib_per_second: f64,
    /// Of the slower kind of request, milliseconds.
    pub p99_ms: f64,
    /// Bytes read and written.
    pub bytes: u64,
}

/// Runs the load once against the export on `socket`, for `time`.
pub fn run(load: &Load, socket: &Path, time: Duration, seed: u32) -> Result<Figures, BenchError> {
    let mut fio = match load.cores.of_client() {
        None => Command::new("fio"),
        Some(core) => {
            let mut held = Command::new("taskset");
            held.args(["-c", core, "fio"]);
            held
        }
    };
    fio.args(["--name=row", "--ioengine=nbd", "--output-format=json"])
        .args(["--norandommap", "--group_reporting", "--time_based"])
        .args(load.access.fio())
        .arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.queue))
        .arg(format!("--numjobs={}", load.connections))
        .arg(format!("--runtime={}ms", time.as_millis()))
        .arg(format!("--randseed={seed}"));
    if load.connections > 1 && matches!(load.access, Access::Read | Access::Write) {
        // Each in a part of its own, as four writers of one place would be a test of something else.
        fio.arg(format!("--offset_increment={}%", 100 / load.connections));
    }
    let output = fio
        .stdin(Stdio::null())
        .output()
        .map_err(BenchError::Client)?;
    let failed = || BenchError::ClientFailed {
        load: load.name(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    };
    if !output.status.success() {
        return Err(failed());
    }
    // Notes may stand before the JSON.
    let from = output.stdout.iter().position(|&b| b == b'{');
    let json: Value =
        serde_json::from_slice(&output.stdout[from.ok_or_else(failed)?..]).map_err(|_| failed())?;
    figures(&json).ok_or_else(failed)
}

fn figures(json: &Value) -> Option<Figures> {
    let job = json.get("jobs")?.get(0)?;
    if job.get("error")?.as_i64()? != 0 {
        return None;
    }
    let mut sum = Figures {
        iops: 0.0,
        mib_per_second: 0.0,
        p99_ms: 0.0,
        bytes: 0,
    };
    for kind in ["read", "write"] {
        let part = job.get(kind)?;
        sum.iops += part.get("iops")?.as_f64()?;
        let bytes_per_second = part.get("bw_bytes")?.as_f64()?;
        sum.mib_per_second += bytes_per_second / f64::from(1 << 20);
        sum.bytes += part.get("io_bytes")?.as_u64()?;
        let p99 = part
            .pointer("/clat_ns/percentile/99.000000")
            .and_then(Value::as_f64);
        sum.p99_ms = sum.p99_ms.max(p99.unwrap_or_default() / 1e6);
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_and_writes_are_added_up() {
        let part = |iops: f64, p99: f64| {
            json!({"iops": iops, "bw_bytes": iops * 4096.0, "io_bytes": 8192,
                   "clat_ns": {"percentile": {"99.000000": p99}}})
        };
        let job =
            json!({"jobs": [{"error": 0, "read": part(256.0, 1e6), "write": part(256.0, 2e6)}]});
        let sum = figures(&job).unwrap();
        assert_eq!((sum.iops, sum.mib_per_second), (512.0, 2.0));
        assert_eq!((sum.p99_ms, sum.bytes), (2.0, 16384));
        assert!(figures(&json!({"jobs": [{"error": 5}]})).is_none());
    }

    #[test]
    fn the_table_has_every_row_once() {
        let mut names: Vec<_> = Load::all().iter().map(Load::name).collect();
        assert_eq!(names.len(), 36);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 36);
    }
}
