//! Processor time of the daemons and QEMUs of both hosts, sampled: a process that ends takes its counters with it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use whimbrel_lab::net::{Host, Lab};

/// A process that ends takes so much of its time along at most.
const EVERY: Duration = Duration::from_millis(200);

/// Seconds of processor time, the guest's own included where it is QEMU's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    pub daemons: f64,
    pub qemus: f64,
}

/// A thread that looks at the processes in both hosts' namespaces.
pub struct CpuMeter {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<(Instant, Cpu)>>>,
}

impl CpuMeter {
    pub fn start(lab: &Lab) -> CpuMeter {
        let namespaces: Vec<String> = Host::BOTH
            .iter()
            .filter_map(|host| {
                fs::metadata(format!("/run/netns/{}", lab.namespace(*host).name())).ok()
            })
            .map(|meta| format!("net:[{}]", meta.ino()))
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let thread = std::thread::spawn(move || sample(&namespaces, &theirs));
        CpuMeter {
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it; what was used between two moments.
    pub fn stop(mut self, from: Instant, to: Instant) -> Cpu {
        let samples = self.end();
        let at = |time| {
            let after = samples.partition_point(|(at, _)| *at <= time);
            after
                .checked_sub(1)
                .map_or_else(Cpu::default, |i| samples[i].1)
        };
        let (from, to) = (at(from), at(to));
        Cpu {
            daemons: to.daemons - from.daemons,
            qemus: to.qemus - from.qemus,
        }
    }

    fn end(&mut self) -> Vec<(Instant, Cpu)> {
        self.stop.store(true, Relaxed);
        let samples = self.thread.take().map(JoinHandle::join);
        samples.and_then(Result::ok).unwrap_or_default()
    }
}

impl Drop for CpuMeter {
    fn drop(&mut self) {
        self.end();
    }
}

fn sample(namespaces: &[String], stop: &AtomicBool) -> Vec<(Instant, Cpu)> {
    let tick = 1.0 / rustix::param::clock_ticks_per_second() as f64;
    let mut known: HashMap<u32, u64> = HashMap::new();
    let mut sum = Cpu::default();
    let mut samples = Vec::new();
    while !stop.load(Relaxed) {
        for (pid, name, ticks) in processes(namespaces) {
            let seconds = (ticks - known.insert(pid, ticks).unwrap_or(0).min(ticks)) as f64 * tick;
            if name.starts_with("qemu") {
                sum.qemus += seconds;
            } else {
                sum.daemons += seconds;
            }
        }
        samples.push((Instant::now(), sum));
        std::thread::sleep(EVERY);
    }
    samples
}

/// Number, name and processor ticks of each process in one of the namespaces.
fn processes(namespaces: &[String]) -> Vec<(u32, String, u64)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let process = |entry: fs::DirEntry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let net = fs::read_link(entry.path().join("ns/net")).ok()?;
        let net = net.to_str()?;
        if !namespaces.iter().any(|namespace| namespace == net) {
            return None;
        }
        let (name, ticks) = read_stat(&fs::read_to_string(entry.path().join("stat")).ok()?)?;
        Some((pid, name, ticks))
    };
    entries.flatten().filter_map(process).collect()
}

/// `proc_pid_stat(5)`: the name in brackets, which may hold anything, then the state; 11 and 12 after that are the
/// ticks in user and in system mode.
fn read_stat(stat: &str) -> Option<(String, u64)> {
    let (before, after) = stat.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some((name.to_owned(), ticks(11)? + ticks(12)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_is_read() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 10 0 0 0 30 12 0 0 20 0 1 0 5 6 7";
        assert_eq!(read_stat(stat), Some(("a) b".to_owned(), 42)));
        assert_eq!(read_stat("7 (x"), None);
    }
}
