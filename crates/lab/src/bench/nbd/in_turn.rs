//! What the access log costs: one server, one client, and the log switched on and off every few
//! milliseconds.
//!
//! Two servers, or two runs, differ by more than the log costs: by where the scheduler puts them, and by
//! what else the machine does just then. So slices of [`SLICE`] are compared with their neighbours: each
//! pair has one with the log and one without, which comes first changes from pair to pair. A slice has its
//! requests and the process's CPU time; a pair gives a ratio of each; of all pairs' ratios the median is
//! told, with the interval in which the true one lies in 95 of 100 such measurements (by rank, so that no
//! shape of their distribution is assumed).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use whimbrel_host::disk::Disk;
use whimbrel_nbd::{Content, Errno, Export, ExportInfo, StatusRun, ZeroHow};

/// Long enough for some hundred requests, short enough that neighbours meet the same machine.
const SLICE: Duration = Duration::from_millis(10);

/// One disk, whose accesses are logged now and then.
pub struct InTurn {
    logged: Arc<Disk>,
    plain: Arc<Disk>,
    log: AtomicBool,
    requests: AtomicU64,
}

impl InTurn {
    /// Both disks are of the same file. Prints a line for every slice, as long as the process lives.
    pub fn start(logged: Arc<Disk>, plain: Arc<Disk>) -> Arc<InTurn> {
        let disk = Arc::new(InTurn {
            logged,
            plain,
            log: AtomicBool::new(true),
            requests: AtomicU64::new(0),
        });
        let slicing = disk.clone();
        std::thread::spawn(move || slicing.slice());
        disk
    }

    fn slice(&self) {
        for turn in 0u64.. {
            let log = matches!(turn % 4, 0 | 3);
            self.log.store(log, Ordering::Relaxed);
            let (began, cpu) = (Instant::now(), cpu_ns());
            let requests = self.requests.load(Ordering::Relaxed);
            std::thread::sleep(SLICE);
            let requests = self.requests.load(Ordering::Relaxed) - requests;
            let (cpu, wall) = (cpu_ns() - cpu, began.elapsed().as_nanos());
            println!(
                "slice {} {requests} {cpu} {wall}",
                if log { "on" } else { "off" }
            );
        }
    }

    fn disk(&self) -> &Disk {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if self.log.load(Ordering::Relaxed) {
            &self.logged
        } else {
            &self.plain
        }
    }
}

fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl Export for InTurn {
    fn info(&self) -> ExportInfo {
        self.plain.info()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, Errno> {
        self.disk().read(offset, len).await
    }

    async fn read_sparse(&self, offset: u64, len: u32) -> Result<Content, Errno> {
        self.disk().read_sparse(offset, len).await
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), Errno> {
        self.disk().write(offset, data, fua).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.disk().flush().await
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        self.disk().trim(offset, len, fua).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: ZeroHow) -> Result<(), Errno> {
        self.disk().write_zeroes(offset, len, how).await
    }

    async fn cache(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.disk().cache(offset, len).await
    }

    async fn block_status(
        &self,
        context: &str,
        offset: u64,
        len: u64,
        one: bool,
    ) -> Result<Vec<StatusRun>, Errno> {
        self.disk().block_status(context, offset, len, one).await
    }
}

/// What the log costs, of what the same does without: 1.02 is 2 % more.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Price {
    pub row: String,
    /// Pairs of slices.
    pub pairs: usize,
    /// CPU time of a request: median, and the ends of its 95 % interval.
    pub cpu: [f64; 3],
    /// Requests a second.
    pub requests: [f64; 3],
    /// Microseconds of CPU a request without the log, the median slice.
    pub cpu_us: f64,
}

struct Slice {
    log: bool,
    requests: f64,
    cpu: f64,
    wall: f64,
}

impl Price {
    /// From what the server printed; `None` if there are too few pairs to tell.
    pub fn of(row: String, output: &str) -> Option<Price> {
        let slices: Vec<Slice> = output.lines().filter_map(slice).collect();
        let mut busy: Vec<f64> = slices.iter().map(|s| s.requests).collect();
        busy.retain(|&requests| requests > 0.0);
        busy.sort_by(f64::total_cmp);
        // Where neither client nor server had the processor, what is counted is something else.
        let least = busy.get(busy.len() / 2)? / 4.0;
        let worked = |pair: &[Slice]| pair.iter().all(|s| s.requests >= least);
        let pairs: Vec<(&Slice, &Slice)> = slices
            .chunks_exact(2)
            .filter(|pair| worked(pair) && pair[0].log != pair[1].log)
            .map(|pair| match pair[0].log {
                true => (&pair[0], &pair[1]),
                false => (&pair[1], &pair[0]),
            })
            .collect();
        let of_pairs = |figure: fn(&Slice) -> f64| {
            let ratios = pairs.iter().map(|(on, off)| figure(on) / figure(off));
            middle(ratios.collect())
        };
        let plain = pairs.iter().map(|(_, off)| off.cpu / off.requests / 1e3);
        Some(Price {
            row,
            pairs: pairs.len(),
            cpu: of_pairs(|s| s.cpu / s.requests)?,
            requests: of_pairs(|s| s.requests / s.wall)?,
            cpu_us: middle(plain.collect())?[0],
        })
    }

    pub fn text(&self) -> String {
        let shown = |[at, from, to]: [f64; 3]| {
            let percent = |ratio: f64| (ratio - 1.0) * 100.0;
            format!(
                "{:+.2} % ({:+.2} to {:+.2})",
                percent(at),
                percent(from),
                percent(to)
            )
        };
        format!(
            "{:34} {:7.2} us {:>28} {:>28} {:6}",
            self.row,
            self.cpu_us,
            shown(self.cpu),
            shown(self.requests),
            self.pairs
        )
    }
}

pub const HEAD: &str = "access log on to off: CPU a request without it; how much more with it, and 95 % interval; requests a second; pairs";

fn slice(line: &str) -> Option<Slice> {
    let mut words = line.strip_prefix("slice ")?.split(' ');
    let log = words.next()? == "on";
    let mut number = || words.next()?.parse::<f64>().ok();
    Some(Slice {
        log,
        requests: number()?,
        cpu: number()?,
        wall: number()?,
    })
}

/// The median, and the ranks between which that of all there could be lies with 95 %.
fn middle(mut values: Vec<f64>) -> Option<[f64; 3]> {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    let off = (0.98 * (values.len() as f64).sqrt()).ceil() as usize;
    let (from, to) = (half.checked_sub(off)?, half + off);
    Some([values[half], values[from], *values.get(to)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_compared_whichever_comes_first_and_idle_ones_are_not() {
        let mut output = String::from("some other line\nslice on 0 5 10\nslice off 0 5 10\n");
        for _ in 0..50 {
            output += "slice on 100 1020000 10\nslice off 100 1000000 10\n";
            output += "slice off 200 4000000 10\nslice on 200 4080000 10\n";
        }
        let price = Price::of("row".into(), &output).unwrap();
        assert_eq!(price.pairs, 100);
        assert!((price.cpu[0] - 1.02).abs() < 1e-9);
        assert_eq!(price.requests, [1.0; 3]);
        assert!(Price::of("row".into(), "slice on 1 1 1\nslice off 1 1 1").is_none());
    }

    #[test]
    fn the_interval_holds_the_median_and_narrows() {
        let wide = middle((0..25).map(f64::from).collect()).unwrap();
        assert_eq!(wide, [12.0, 7.0, 17.0]);
        let [at, from, to] = middle((0..2500).map(f64::from).collect()).unwrap();
        assert_eq!((at, from, to), (1250.0, 1201.0, 1299.0));
        assert!(middle(vec![1.0]).is_none());
    }
}
