//! Daemons killed again and again under `fio --verify` while a volume is relocated.
//!
//! ```text
//!   host-a                                   host-b
//!   daemon --- slow link: the volume --->    daemon <-- NBD -- QEMU: the guest, on its own disk
//!   (killed)                                 (killed) <-- NBD -- bridge <-- NBD -- fio --verify
//! ```
//!
//! A machine with two disks moves. One disk is the guest's, which checks itself. The other is fio's: as soon
//! as the machine runs at the destination, fio writes to it and verifies it through the very export the guest
//! has it by, while its content crosses a slow link. Each kill is a SIGKILL to one of the two daemons, drawn
//! from the seed with its moment: three of four at the destination, which serves fio and owns the journal.
//!
//! fio is outside the guest because a guest without KVM could not load the export, and because a guest's
//! page cache would answer its reads. What fio does is in `fio`, how it outlives a server in `bridge`.

mod bridge;
mod fio;

use crate::guest::VerifyReport;
use crate::net::{Host, LabSpec};
use crate::pair::answers::{MigrationReport, MigrationState, MigrationView, Phase, SpaceProgress};
use crate::pair::{Guest, GuestSpec, Pair, PairError, PairSpec};
use crate::wan::{LineSpec, WanSpec};
use bridge::Bridge;
use fio::{Done, Fio, Layout, Outcome, SLICE};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use whimbrel_workload::chance::Rng;

/// The machine and its guest's volume.
pub const NAME: &str = "guest";

/// fio's volume.
pub const VOLUME: &str = "fio";

/// The old slices' bytes, in slices.
const OLD: u64 = 4;

/// New slices per kill, and at least: what the slow link carries and fio writes in that time, with room.
const NEW_PER_KILL: f64 = 1.6;
const NEW_LEAST: u64 = 6;

/// Before the kills and after them.
const FAST: u64 = 400_000_000;

/// During the kills: the relocation is to outlast them.
const SLOW: u64 = 10_000_000;

const ONE_WAY: Duration = Duration::from_millis(5);

/// How long each thing that is waited for may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// Longest rest between a daemon's being at work again and the next kill.
const REST_MS: u64 = 3000;

/// Longest time a daemon stays away.
const AWAY_MS: u64 = 400;

/// One slice in so many rounds is one that had a round already.
const AGAIN: u64 = 4;

#[derive(Clone, Copy, Debug)]
pub struct KillsSpec {
    pub kills: u32,
    pub seed: u64,
}

/// One kill.
#[derive(Clone, Debug, Serialize)]
pub struct Kill {
    pub number: u32,
    pub host: String,
    /// Since fio began.
    pub at_s: f64,
    /// Of the volume, what had arrived.
    pub arrived_permille: u64,
    /// From the kill until the daemon answered its command again.
    pub away_ms: f64,
    /// From then until both daemons had their connection again.
    pub joined_ms: f64,
}

/// Everything that came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct KillsReport {
    pub seed: u64,
    pub wanted: u32,
    pub kills: Vec<Kill>,
    pub kills_of_destination: u32,
    pub kills_of_source: u32,
    pub volume_bytes: u64,
    pub took_s: f64,
    pub rounds: u32,
    /// By fio, through the export.
    pub bytes_written: u64,
    /// By fio: read back and found right, the last look at everything included.
    pub bytes_verified: u64,
    /// Of it, what nobody wrote after the move.
    pub bytes_relocated_verified: u64,
    /// What each side's last daemon says of its own time.
    pub units_sent: Option<u64>,
    pub units_sent_again: Option<u64>,
    pub late_copies: Option<u64>,
    pub digests_equal: Option<bool>,
    pub guest_errors: u64,
    /// Blocks of the guest's own disk that were looked at afterwards.
    pub guest_disk_passed: bool,
    pub problems: Vec<String>,
}

/// Of `whimbrel status MACHINE`, what counts here.
#[derive(Deserialize)]
struct Status {
    migration: Option<MigrationView>,
}

fn latest(pair: &Pair, host: Host) -> Option<MigrationView> {
    let status: Status = pair.on(host).answer(&["status", NAME]).ok()?;
    status.migration
}

fn space<'v>(view: &'v MigrationView, name: &str) -> Option<&'v SpaceProgress> {
    view.spaces.iter().find(|space| space.name == name)
}

fn permille_of(view: &MigrationView) -> Option<u64> {
    let space = space(view, VOLUME)?;
    Some(space.units_resident * 1000 / space.units_total.max(1))
}

/// Waits until `met` answers.
fn wait_for<T>(
    awaited: &'static str,
    mut met: impl FnMut() -> Result<T, String>,
) -> Result<T, PairError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let last = match met() {
            Ok(found) => return Ok(found),
            Err(last) => last,
        };
        if Instant::now() >= deadline {
            return Err(PairError::NotReached {
                awaited,
                after: PATIENCE,
                last,
            });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn described(view: &Option<MigrationView>) -> String {
    view.as_ref().map_or("no move".to_owned(), |v| {
        format!("{} {:?} {} permille", v.phase, v.state, v.permille)
    })
}

fn line(rate: u64) -> LineSpec {
    LineSpec::new(rate, ONE_WAY)
}

/// Makes the hosts and the machine, moves it, and kills. `tell` hears a line for each step.
///
/// # Errors
/// What keeps the trial from being made. What it finds is in the report's `problems`.
pub fn kills(spec: &KillsSpec, mut tell: impl FnMut(&str)) -> Result<KillsReport, PairError> {
    let began = Instant::now();
    let layout = Layout {
        old: OLD,
        new: NEW_LEAST.max((f64::from(spec.kills) * NEW_PER_KILL) as u64),
    };
    let wan = WanSpec {
        seed: spec.seed,
        ..WanSpec::symmetric(line(FAST))
    };
    let mut pair = Pair::start(&PairSpec::new(LabSpec::new(wan)))?;
    let folder = pair.folder().path().to_owned();
    let mut guest_spec = GuestSpec::small(NAME);
    guest_spec.more_volumes = vec![VOLUME.to_owned()];
    let mut guest = Guest::new(pair.lab(), guest_spec)?;
    let file = folder.join("fio.raw");
    Fio::prepare(&file, &folder, layout, spec.seed)?;
    pair.on(Host::A)
        .run(&["volume", "import", VOLUME, &file.to_string_lossy()])?;
    std::fs::remove_file(&file).map_err(PairError::io("remove", &file))?;
    pair.define(Host::A, &guest)?;
    pair.boot(Host::A, &mut guest)?;
    tell(&format!(
        "the guest is at work on host-a; fio's volume has {} MiB",
        layout.bytes() >> 20
    ));
    pair.on(Host::A)
        .run(&["migrate", NAME, "--to", "host-b", "--detach"])?;
    wait_for("the drain", || match latest(&pair, Host::B) {
        Some(view) if view.phase == Phase::Drain => Ok(()),
        other => Err(described(&other)),
    })?;
    // What is before it on the link: memory, and the guest's own disk.
    wait_for("fio's volume to be next", || {
        let view = latest(&pair, Host::B);
        match view.as_ref().and_then(permille_of) {
            Some(permille) if permille > 0 => Ok(()),
            _ => Err(described(&view)),
        }
    })?;
    pair.lab().wan().set_both(line(SLOW))?;
    let nbd = pair.site(Host::B).machine_file(NAME, "nbd.sock");
    let mut bridge = Bridge::start(&nbd, VOLUME, &folder)?;
    let fio = Fio::on_export(&bridge.uri(VOLUME), &folder, layout);
    tell("the guest runs on host-b; fio begins");

    let mut report = KillsReport {
        seed: spec.seed,
        wanted: spec.kills,
        volume_bytes: layout.bytes(),
        ..KillsReport::default()
    };
    let stop = AtomicBool::new(false);
    let rounds = std::thread::scope(|threads| {
        let rounds = threads.spawn(|| Rounds::run(&fio, layout, spec.seed, &stop));
        let killed = kill_them(&mut pair, spec, &mut report, &mut tell, &|| {
            rounds.is_finished()
        });
        let relocated = killed.and_then(|()| {
            pair.lab().wan().set_both(line(FAST))?;
            tell("no more kills; the link is fast again");
            completes(&pair)
        });
        stop.store(true, Ordering::Relaxed);
        let rounds = rounds
            .join()
            .expect("a panic of the rounds is a fault of this program");
        relocated?;
        rounds
    })?;
    tell("the move is complete; everything is looked at once more");
    report.took(&rounds);
    report.look_again(&fio, &rounds)?;
    if !bridge.is_running()? {
        report.problems.push("the bridge has died".to_owned());
    }
    drop(bridge);
    report.tells(latest(&pair, Host::A).and_then(|view| view.report));
    guest.wait_for_report(PATIENCE)?;
    let verdict = pair.finish(Host::B, &mut guest)?;
    report.guest_errors = verdict.outcome.errors;
    report.guest_disk_passed = VerifyReport::passed(&verdict.disk);
    report.problems.extend(verdict.problems);
    report.took_s = began.elapsed().as_secs_f64();
    if !report.problems.is_empty() {
        pair.keep_files();
        tell(&format!("kept for a look: {}", folder.display()));
    }
    Ok(report)
}

fn kill_them(
    pair: &mut Pair,
    spec: &KillsSpec,
    report: &mut KillsReport,
    tell: &mut impl FnMut(&str),
    fio_gave_up: &dyn Fn() -> bool,
) -> Result<(), PairError> {
    let began = Instant::now();
    let mut rng = Rng::new(spec.seed, 0);
    for number in 1..=spec.kills {
        let rest = Duration::from_millis(100 + rng.below(REST_MS));
        // The first kill is at the destination; then one in four is at the source.
        let host = match rng.below(4) {
            3 if number > 1 => Host::A,
            _ => Host::B,
        };
        let away = Duration::from_millis(rng.below(AWAY_MS));
        std::thread::sleep(rest);
        let view = latest(pair, Host::B);
        let arrived = view.as_ref().and_then(permille_of).unwrap_or(1000);
        if fio_gave_up() {
            // Its problem is in its outcome.
            return Ok(());
        }
        if arrived >= 1000 || view.is_none_or(|v| v.phase != Phase::Drain) {
            let said = format!("the relocation ended before kill {number}");
            report.problems.push(said);
            return Ok(());
        }
        let at = Instant::now();
        pair.site_mut(host).kill9()?;
        std::thread::sleep(away);
        pair.site_mut(host).start()?;
        let up = Instant::now();
        joined(pair)?;
        let kill = Kill {
            number,
            host: host.to_string(),
            at_s: (at - began).as_secs_f64(),
            arrived_permille: arrived,
            away_ms: (up - at).as_secs_f64() * 1e3,
            joined_ms: up.elapsed().as_secs_f64() * 1e3,
        };
        tell(&format!(
            "kill {number:3} of {}: {}, {:4.1} % arrived; up after {:.0} ms, joined after {:.0} ms more",
            spec.kills,
            kill.host,
            arrived as f64 / 10.0,
            kill.away_ms,
            kill.joined_ms
        ));
        match host {
            Host::A => report.kills_of_source += 1,
            Host::B => report.kills_of_destination += 1,
        }
        report.kills.push(kill);
    }
    Ok(())
}

/// Waits until both daemons have their connection, or the move is over.
fn joined(pair: &Pair) -> Result<(), PairError> {
    wait_for("the daemons' connection", || {
        for host in [Host::A, Host::B] {
            match latest(pair, host) {
                Some(v) if v.link.connected || v.phase == Phase::Complete => {}
                other => return Err(format!("{host}: {}", described(&other))),
            }
        }
        Ok(())
    })
}

fn completes(pair: &Pair) -> Result<(), PairError> {
    wait_for("the move's end", || {
        for host in [Host::B, Host::A] {
            match latest(pair, host) {
                Some(v) if v.state == MigrationState::Completed => {}
                other => return Err(format!("{host}: {}", described(&other))),
            }
        }
        Ok(())
    })
}

/// What fio did while daemons died.
#[derive(Debug, Default)]
struct Rounds {
    count: u32,
    done: Done,
    /// The last round of each slice that had one.
    last: BTreeMap<u64, u32>,
    problems: Vec<String>,
}

impl Rounds {
    /// One round after the other until told to stop, or until fio finds something wrong.
    fn run(fio: &Fio, layout: Layout, seed: u64, stop: &AtomicBool) -> Result<Rounds, PairError> {
        let mut rounds = Rounds::default();
        let mut rng = Rng::new(seed, 1);
        let mut fresh: Vec<u64> = (0..layout.new).collect();
        rng.shuffle(&mut fresh);
        while !stop.load(Ordering::Relaxed) && rounds.problems.is_empty() {
            let again = rng.below(AGAIN) == 0 || fresh.is_empty();
            let slice = match fresh.pop() {
                Some(slice) if !again || rounds.last.is_empty() => slice,
                unused => {
                    fresh.extend(unused);
                    let nth = rng.below(rounds.last.len() as u64) as usize;
                    *rounds
                        .last
                        .keys()
                        .nth(nth)
                        .expect("one of the slices that had a round")
                }
            };
            let outcome = fio.round(slice, rounds.count)?;
            rounds.last.insert(slice, rounds.count);
            rounds.count += 1;
            rounds.take(outcome);
        }
        Ok(rounds)
    }

    fn take(&mut self, outcome: Outcome) {
        self.done.written += outcome.done.written;
        self.done.verified += outcome.done.verified;
        self.problems.extend(outcome.problem);
    }
}

impl KillsReport {
    fn took(&mut self, rounds: &Rounds) {
        self.rounds = rounds.count;
        self.bytes_written += rounds.done.written;
        self.bytes_verified += rounds.done.verified;
        self.problems.extend(rounds.problems.iter().cloned());
    }

    /// Every slice that was written since the move, as its last round left it, and all the old ones.
    fn look_again(&mut self, fio: &Fio, rounds: &Rounds) -> Result<(), PairError> {
        for (&slice, &round) in &rounds.last {
            let outcome = fio.verify_new(slice, round)?;
            self.bytes_verified += outcome.done.verified;
            self.problems.extend(outcome.problem);
        }
        let outcome = fio.verify_old()?;
        self.bytes_verified += outcome.done.verified;
        self.bytes_relocated_verified = outcome.done.verified;
        self.problems.extend(outcome.problem);
        for (what, found, wanted) in [
            ("old slices", self.bytes_relocated_verified, OLD * SLICE),
            (
                "slices written",
                self.bytes_verified,
                rounds.last.len() as u64 * SLICE,
            ),
        ] {
            if found < wanted {
                let said = format!("fio looked at {found} bytes of {wanted} of the {what}");
                self.problems.push(said);
            }
        }
        Ok(())
    }

    fn tells(&mut self, report: Option<MigrationReport>) {
        let Some(report) = report else {
            self.problems.push("there is no report".to_owned());
            return;
        };
        self.units_sent = Some(report.units_sent);
        self.units_sent_again = Some(report.units_sent_again);
        self.late_copies = Some(report.late_copies);
        self.digests_equal = Some(report.verified);
        if !report.verified {
            let said = "the daemons did not compare the content";
            self.problems.push(said.to_owned());
        }
    }
}
