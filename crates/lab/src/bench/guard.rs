//! `bench guard`: a guest moves between hosts of which one has a disk too slow for guest and copy together,
//! without a bound on the guest's latency and with one, in turn.
//!
//! The disk is made slow for the daemon alone (cgroup `blkio.throttle`), with what it does for the guest and
//! for the copy alike. Writes are held back where somebody waits for them, which is at a flush; what the page
//! cache takes costs nothing until then, as on a real disk.

use crate::demo::shown;
use crate::link::LinkArgs;
use crate::screen::Screen;
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::journey::{Journey, Moment, Route, travel};
use whimbrel_lab::pair::{Guest, GuestSpec, Pair, PairError, PairSpec};
use whimbrel_workload::params::Pace;

const NAME: &str = "guard";

/// Where version 1 of control groups has the controller.
const BLKIO: &str = "/sys/fs/cgroup/blkio";

/// Whose disk is slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Slow {
    /// Its writes: copies and the guest's own
    Destination,
    /// Its reads: push and what the guest waits for
    Source,
}

#[derive(Debug, Args)]
pub struct GuardArgs {
    #[command(flatten)]
    link: LinkArgs,
    /// Whose disk is slow
    #[arg(long, value_enum, default_value = "destination")]
    slow: Slow,
    /// What the slow disk does, in MB/s
    #[arg(long, value_name = "MB", default_value_t = 8)]
    disk: u64,
    /// The bounds to compare, as `migrate --guest-latency` takes them
    #[arg(
        long,
        value_name = "TIME",
        value_delimiter = ',',
        default_value = "off,100ms,50ms"
    )]
    bounds: Vec<String>,
    /// How often each
    #[arg(long, value_name = "N", default_value_t = 2)]
    rounds: u32,
    /// Write all rows into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One move.
#[derive(Clone, Debug, Default, Serialize)]
struct Row {
    round: u32,
    bound: String,
    total_s: f64,
    requests: u64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    held_s: f64,
    demand_p99_ms: f64,
    echo_gap_ms: Option<f64>,
    problems: Vec<String>,
}

const HEAD: &str = "round bound     total  requests     p50       p99   longest   push held  demand p99  echo gap  result";

impl Row {
    fn text(&self) -> String {
        format!(
            "{:5} {:8} {:5.1} s {:8} {:5.1} ms {:6.0} ms {:6.0} ms {:8.1} s {:8.0} ms {:>9}  {}",
            self.round,
            self.bound,
            self.total_s,
            self.requests,
            self.p50_ms,
            self.p99_ms,
            self.max_ms,
            self.held_s,
            self.demand_p99_ms,
            shown(self.echo_gap_ms, "ms", 0),
            self.problems.first().map_or("ok", String::as_str),
        )
    }

    fn measured(&mut self, journey: &Journey) {
        self.total_s = journey.took.as_secs_f64();
        self.echo_gap_ms = journey.gap.map(|gap| gap.length.as_secs_f64() * 1e3);
        self.problems = journey.problems();
        if let Some(report) = journey.report() {
            self.requests = report.guest_io.requests;
            self.p50_ms = report.guest_io.p50_ms;
            self.p99_ms = report.guest_io.p99_ms;
            self.max_ms = report.guest_io.max_ms;
            self.held_s = report.guest_io.held_ms / 1e3;
            self.demand_p99_ms = report.demands.p99_ms;
        }
    }
}

/// A control group whose members have a slow disk. It goes with its value.
struct SlowDisk(PathBuf);

impl SlowDisk {
    /// On the disk that `on` lies on.
    fn new(on: &Path, slow: Slow, bytes_a_second: u64) -> std::io::Result<SlowDisk> {
        let folder = Path::new(BLKIO).join(format!("whimbrel-lab-{}", std::process::id()));
        let device = fs::metadata(on)?.st_dev();
        // Of a partition the whole disk counts; the laboratory lies on whole disks or says so by failing.
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        fs::create_dir(&folder)?;
        let disk = SlowDisk(folder);
        let file = match slow {
            Slow::Destination => "blkio.throttle.write_bps_device",
            Slow::Source => "blkio.throttle.read_bps_device",
        };
        fs::write(
            disk.0.join(file),
            format!("{major}:{minor} {bytes_a_second}\n"),
        )?;
        Ok(disk)
    }

    /// The same command as a member.
    fn around(&self, command: &Command) -> Command {
        let mut around = Command::new("sh");
        around
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.0.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => around.env(name, value),
                None => around.env_remove(name),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            around.current_dir(folder);
        }
        around
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Busy while the last of its members ends.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        eprintln!("{} is left behind", self.0.display());
    }
}

pub fn run(args: &GuardArgs) -> ExitCode {
    let mut screen = Screen::new();
    if !Path::new(BLKIO).is_dir() {
        screen.put(&format!("skipped: no {BLKIO} to make a disk slow with"));
        return ExitCode::SUCCESS;
    }
    screen.put(&format!(
        "{}; the {}'s disk does {} MB/s",
        args.link.describe(),
        match args.slow {
            Slow::Destination => "destination",
            Slow::Source => "source",
        },
        args.disk
    ));
    screen.put(HEAD);
    let mut rows = Vec::new();
    for round in 1..=args.rounds {
        for bound in &args.bounds {
            let mut row = Row {
                round,
                bound: bound.clone(),
                ..Row::default()
            };
            if let Err(error) = play(args, &mut row, &mut screen) {
                row.problems.push(error.to_string());
            }
            screen.put(&row.text());
            rows.push(row);
        }
    }
    let sound = rows.iter().all(|row| row.problems.is_empty());
    super::ended(&mut screen, &args.json, &rows, sound)
}

fn play(args: &GuardArgs, row: &mut Row, screen: &mut Screen) -> Result<(), PairError> {
    let mut spec = GuestSpec::medium(NAME);
    spec.params.log.pace = Pace::PerSecond(10);
    spec.params.random.pace = Pace::PerSecond(50);
    spec.params.read.pace = Pace::PerSecond(512);
    screen.while_doing("the guest is built", || spec.build())?;
    let mut pair = Pair::prepare(&PairSpec::new(args.link.lab()))?;
    let io = |source| PairError::Io {
        action: "make a disk slow in",
        path: BLKIO.into(),
        source,
    };
    let slow = SlowDisk::new(pair.folder().path(), args.slow, args.disk * 1_000_000).map_err(io)?;
    let slowed = match args.slow {
        Slow::Destination => Host::B,
        Slow::Source => Host::A,
    };
    for host in Host::BOTH {
        let site = pair.site_mut(host);
        let command = site.daemon_command();
        let command = match host == slowed {
            true => slow.around(&command),
            false => command,
        };
        site.start_as(command)?;
    }
    let mut guest = Guest::new(pair.lab(), spec)?;
    screen.while_doing("import and boot", || {
        pair.define(Host::A, &guest)?;
        pair.boot(Host::A, &mut guest)
    })?;
    // What the source has in its page cache costs no disk.
    let _ = Command::new("sync").status();
    let _ = fs::write("/proc/sys/vm/drop_caches", "1");
    let route = Route {
        rates_for: Duration::from_secs(2),
        options: vec!["--guest-latency".to_owned(), row.bound.clone()],
        ..Route::from(Host::A)
    };
    let journey = travel(&pair, &mut guest, &route, |moment| {
        if let Moment::Moving { view, .. } = moment {
            screen.live(&format!(
                "{}: {} {:.1} %, {:.1} Mbit/s",
                row.bound,
                view.phase,
                f64::from(view.permille) / 10.0,
                view.rate as f64 / 1e6
            ));
        }
    })?;
    row.measured(&journey);
    let verdict = screen.while_doing("check", || pair.finish(Host::B, &mut guest))?;
    row.problems.extend(verdict.problems);
    drop(pair);
    drop(slow);
    Ok(())
}
