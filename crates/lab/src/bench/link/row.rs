//! One link of the grid.

use super::LinkArgs;
use crate::screen::Screen;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};
use whimbrel_lab::links::demands::{Reader, Sample};
use whimbrel_lab::links::{HELD, NAME, Rig, copy, noise};
use whimbrel_lab::net::{Host, LabSpec};
use whimbrel_lab::pair::answers::MigrationState;
use whimbrel_lab::pair::{Pair, PairError, PairSpec};
use whimbrel_lab::wan::{Direction, LineSpec, WanSpec};

/// Demands a second: few enough to be no load.
const DEMANDS: f64 = 25.0;

/// The share of the disk that push may reach in a run; beyond lies what is demanded.
const REACHED: f64 = 0.75;

/// The smallest disk, in bytes: the units after a demand go before others, and must not use it up.
const LEAST_DISK: u64 = 256 << 20;

/// Of 1500 bytes of a packet, what TCP carries.
const PAYLOAD: f64 = 1448.0 / 1500.0;

/// A target's slack on the demands: the round trip and so much.
const BESIDE_MS: f64 = 15.0;

/// How long the rest may take once the link is fast.
const REST: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Case {
    pub mbits: u64,
    pub rtt_ms: u64,
    /// Per cent, each way.
    pub loss: f64,
}

impl Case {
    fn line(self) -> LineSpec {
        let one_way = Duration::from_micros(self.rtt_ms * 500);
        LineSpec::new(self.mbits * 1_000_000, one_way).with_loss(self.loss / 100.0)
    }

    fn rtt(self) -> Duration {
        Duration::from_millis(self.rtt_ms)
    }

    /// Demands alone, the finding of the rate, and the window.
    fn times(self, quick: bool) -> [Duration; 3] {
        let window = if self.mbits >= 1000 { 5.0 } else { 8.0 };
        let times = [
            Duration::from_secs_f64(4.0) + 2 * self.rtt(),
            Duration::from_secs_f64(2.0) + 15 * self.rtt(),
            Duration::from_secs_f64(window),
        ];
        times.map(|time| if quick { time * 6 / 10 } else { time })
    }

    fn disk(self) -> u64 {
        // For any times, so that one file does for all links of a rate.
        let case = Case {
            rtt_ms: 200,
            ..self
        };
        let [_, ramp, window] = case.times(false);
        let bytes = self.mbits as f64 * 125e3 * (ramp + window).as_secs_f64() / REACHED;
        (bytes as u64 >> 20 << 20).max(LEAST_DISK)
    }
}

/// Percentiles of demands, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Waits {
    pub count: usize,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

impl Waits {
    /// Of demands asked for in a time; what took less than the round trip was no demand.
    fn of(samples: &[Sample], rtt: Duration, from: Instant, to: Instant) -> Waits {
        let mut took: Vec<f64> = samples
            .iter()
            .filter(|s| s.asked >= from && s.asked < to && s.took >= rtt)
            .map(|s| s.took.as_secs_f64() * 1e3)
            .collect();
        took.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let nth = (took.len() as f64 * share).ceil() as usize;
            took.get(nth.saturating_sub(1)).copied().unwrap_or(f64::NAN)
        };
        Waits {
            count: took.len(),
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: at(1.0),
        }
    }
}

/// What was measured on one link. Shares are of the link's rate.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub case: Case,
    /// Content that arrived, push and demand together.
    pub content: f64,
    /// IP packets from source to destination, as the emulator delivered them.
    pub packets: f64,
    /// The same of single TCP streams of nothing but content.
    pub tcp_bbr: Option<f64>,
    pub tcp_cubic: Option<f64>,
    pub with_push: Waits,
    pub alone: Waits,
    /// From letting push go until it carried 90 % of what it did in the window.
    pub ramp_s: Option<f64>,
    /// Cores used in the window.
    pub daemon_cores: f64,
    pub emulator_cores: f64,
    /// How late the emulator delivered a packet, on average.
    pub late_ms: f64,
    pub dropped: u64,
    pub problems: Vec<String>,
}

pub const HEAD: &str = "Mbit/s  ms   loss  content    of TCP's  packets  TCP bbr    cubic   \
    demands p50 / p99 / longest (n)     alone p50 / p99 (n)   ramp  daemons  emulator";

impl Row {
    pub fn new(case: Case) -> Row {
        Row {
            case,
            content: 0.0,
            packets: 0.0,
            tcp_bbr: None,
            tcp_cubic: None,
            with_push: Waits::default(),
            alone: Waits::default(),
            ramp_s: None,
            daemon_cores: 0.0,
            emulator_cores: 0.0,
            late_ms: 0.0,
            dropped: 0,
            problems: Vec::new(),
        }
    }

    /// Of what TCP could carry of content.
    fn of_payload(&self) -> f64 {
        self.content / PAYLOAD
    }

    fn misses_goodput(&self) -> bool {
        let target = if self.case.loss == 0.0 { 0.95 } else { 0.80 };
        self.of_payload() < target
    }

    fn misses_demand(&self) -> bool {
        self.with_push.p99_ms > self.case.rtt_ms as f64 + BESIDE_MS
    }

    /// The demands' target is given for 100 Mbit/s.
    pub fn misses(&self) -> bool {
        self.misses_goodput() || (self.case.mbits == 100 && self.misses_demand())
    }

    pub fn text(&self) -> String {
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        let maybe = |share: Option<f64>| share.map_or("-".to_owned(), percent);
        let mark = |missed| if missed { "*" } else { " " };
        let w = &self.with_push;
        format!(
            "{:6} {:3} {:4} %  {:>7}  {:>7}{}  {:>7}  {:>7}  {:>7}   {:5.1} / {:5.1}{} / {:5.1} ms ({:3})   {:5.1} / {:5.1} ms ({:3}) {:>5}  {:5.2}    {:5.2}  {}",
            self.case.mbits,
            self.case.rtt_ms,
            self.case.loss,
            percent(self.content),
            percent(self.of_payload()),
            mark(self.misses_goodput()),
            percent(self.packets),
            maybe(self.tcp_bbr),
            maybe(self.tcp_cubic),
            w.p50_ms,
            w.p99_ms,
            mark(self.misses_demand()),
            w.max_ms,
            w.count,
            self.alone.p50_ms,
            self.alone.p99_ms,
            self.alone.count,
            self.ramp_s.map_or("-".to_owned(), |s| format!("{s:.1} s")),
            self.daemon_cores,
            self.emulator_cores,
            self.problems.join("; "),
        )
    }

    pub fn measure(
        &mut self,
        args: &LinkArgs,
        folder: &Path,
        screen: &mut Screen,
    ) -> Result<(), PairError> {
        let case = self.case;
        let link = case.mbits as f64 * 1e6;
        let [alone, ramp, window] = case.times(args.quick);
        let disk = disk_file(folder, case.disk(), screen)?;
        let mut spec = PairSpec::new(LabSpec::new(WanSpec::symmetric(case.line())));
        for site in [&mut spec.a, &mut spec.b] {
            site.log = args.log.clone();
        }
        let mut pair = Pair::start(&spec)?;
        if args.log.is_some() {
            pair.keep_files();
            screen.put(&format!("files are in {}", pair.folder().path().display()));
        }
        if !args.no_tcp {
            let time = Duration::from_secs(2) + 15 * case.rtt();
            screen.live("plain TCP");
            self.tcp_bbr = Some(copy::tcp(pair.lab(), Some("bbr"), time)? / link);
            self.tcp_cubic = Some(copy::tcp(pair.lab(), Some("cubic"), time)? / link);
        }
        screen.live("the machine is made");
        let rig = Rig::new(pair, &disk)?;
        rig.depart(HELD)?;
        let socket = rig.pair().site(Host::B).machine_file(NAME, "nbd.sock");
        let reader = Reader::start(&socket, NAME, DEMANDS)?;
        // What RAM has to say at once, and the sockets' first round trips.
        sleep(Duration::from_millis(500) + 3 * case.rtt());
        let alone_from = Instant::now();
        screen.live("demands alone");
        sleep(alone);
        let alone_to = Instant::now();

        screen.live("demands and push");
        let mut arrivals = rig.arrivals()?;
        let wan = rig.pair().lab().wan();
        rig.throttle("unlimited")?;
        let released = Instant::now();
        arrivals.until(released + ramp, |_| true)?;
        let (from, before, cpu) = (Instant::now(), wan.stats(Direction::AToB), rig.cpu()?);
        let back = wan.stats(Direction::BToA).cpu;
        arrivals.until(from + window, |_| true)?;
        let (to, after) = (Instant::now(), wan.stats(Direction::AToB));
        let seconds = (to - from).as_secs_f64();
        self.daemon_cores = (rig.cpu()? - cpu) / seconds;
        let emulator = after.cpu - before.cpu + wan.stats(Direction::BToA).cpu - back;
        self.emulator_cores = emulator.as_secs_f64() / seconds;
        if arrivals.series().last().is_some_and(|a| a.is_complete) {
            self.problems
                .push("the move was over before the window".to_owned());
        }
        let rate = arrivals.rate(from, to).unwrap_or_default();
        self.content = rate / link;
        let packets = after.counts.out_bytes - before.counts.out_bytes;
        self.packets = packets as f64 * 8.0 / seconds / link;
        let count = (after.counts.out_packets - before.counts.out_packets).max(1);
        self.late_ms = (after.late_sum - before.late_sum).as_secs_f64() * 1e3 / count as f64;
        self.dropped = after.counts.queue_dropped_packets - before.counts.queue_dropped_packets;
        self.ramp_s = arrivals
            .series()
            .windows(2)
            .find(|pair| {
                let over = (pair[1].at - pair[0].at).as_secs_f64();
                let came = (pair[1].bytes - pair[0].bytes) as f64 * 8.0;
                pair[0].at >= released && over > 0.0 && came / over >= 0.9 * rate
            })
            .map(|pair| (pair[0].at - released).as_secs_f64());
        let samples = reader.stop()?;
        self.alone = Waits::of(&samples, case.rtt(), alone_from, alone_to);
        self.with_push = Waits::of(&samples, case.rtt(), from, to);

        screen.live("the rest, and the comparison");
        let wan = rig.pair().lab().wan();
        wan.set_both(LineSpec::unlimited(Duration::from_micros(500)))?;
        self.finish(&rig)
    }

    /// Lets the move complete; whether both sides found the content equal.
    fn finish(&mut self, rig: &Rig) -> Result<(), PairError> {
        let deadline = Instant::now() + REST;
        while Instant::now() < deadline {
            let view = rig.view(Host::A)?;
            if let Some(view) = view.filter(|v| v.state != MigrationState::Running) {
                let verified = view.report.is_some_and(|report| report.verified);
                if view.state != MigrationState::Completed || !verified {
                    self.problems
                        .push(format!("ended as {:?}, verified: {verified}", view.state));
                }
                return Ok(());
            }
            sleep(Duration::from_millis(100));
        }
        self.problems
            .push(format!("not complete after {} s more", REST.as_secs()));
        Ok(())
    }
}

/// The file of noise of so many bytes; made once.
pub fn disk_file(folder: &Path, bytes: u64, screen: &mut Screen) -> Result<PathBuf, PairError> {
    let path = folder.join(format!("noise-{bytes}"));
    if !path.exists() {
        // The one before is of a rate that is done with.
        for old in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(old.path());
        }
        screen.while_doing("noise", || noise(&path, bytes))?;
    }
    Ok(path)
}
