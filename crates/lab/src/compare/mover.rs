//! The move itself, step by step, as libvirt orders QEMU about for a migration with copied storage.

use super::machine::{self, DISK, Machine};
use super::{CompareError, Theirs, Times, Ways, copy_disk};
use crate::screen::Screen;
use serde_json::json;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use whimbrel_lab::net::Host;
use whimbrel_lab::pair::rates::{self, Rates};
use whimbrel_lab::pair::{Guest, GuestSpec, Pair};
use whimbrel_lab::wan::Direction;

const NBD_PORT: &str = "10809";
const RAM_PORT: u16 = 4444;

/// Node and job at the source.
const TARGET: &str = "target";
const JOB: &str = "mirror";

/// How long rates are taken before and after.
const RATES_FOR: Duration = Duration::from_secs(10);
const BOOT_WITHIN: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(100);

/// No limit, in bytes per second; older versions take 0 for "nothing at all".
const UNLIMITED: u64 = 1 << 40;

pub fn play(
    pair: &Pair,
    spec: &GuestSpec,
    ways: Ways,
    limit: Duration,
    screen: &mut Screen,
    theirs: &mut Theirs,
) -> Result<(), CompareError> {
    let lab = pair.lab();
    let folder = pair.folder().path().join("q");
    let spec = GuestSpec {
        name: "theirs".to_owned(),
        ..spec.clone()
    };
    let mut guest = Guest::new(lab, spec)?;
    let (image_a, image_b) = (folder.join("a.raw"), folder.join("b.raw"));
    let io = |path: &std::path::Path| {
        let path = path.display().to_string();
        move |source| CompareError::Io { path, source }
    };
    std::fs::create_dir(&folder).map_err(io(&folder))?;
    screen.while_doing("copying the disk", || copy_disk(guest.disk(), &image_a))?;
    let size = std::fs::metadata(&image_a).map_err(io(&image_a))?.len();
    let empty = std::fs::File::create(&image_b).map_err(io(&image_b))?;
    empty.set_len(size).map_err(io(&image_b))?;

    let mut source = Machine::start(lab, Host::A, &guest, &folder.join("a"), image_a, false)?;
    screen.while_doing("booting", || guest.wait_until_at_work(BOOT_WITHIN))?;
    let mut target = Machine::start(lab, Host::B, &guest, &folder.join("b"), image_b, true)?;
    let echo = guest.echo(lab)?;
    screen.say("measuring the undisturbed guest");
    let quiet_from = Instant::now();
    linger(&mut guest, screen);

    let wan = lab.wan();
    let bytes = |way| wan.stats(way).counts.out_bytes;
    let (out, back) = (bytes(Direction::AToB), bytes(Direction::BToA));
    let began = Instant::now();
    let mut run = Run {
        source: &mut source,
        target: &mut target,
        guest: &mut guest,
        screen,
        ways,
        began,
        limit,
        stood_at: String::new(),
    };
    let finished = run.disk(theirs)? && run.memory(theirs)?;
    let stood_at = run.stood_at;
    let ended = Instant::now();
    theirs.wan_bytes = bytes(Direction::AToB) - out;
    theirs.wan_bytes_back = bytes(Direction::BToA) - back;
    theirs.finished = finished;
    let times = |guest: &Guest| Times {
        quiet_from,
        began,
        ended,
        reports: guest.reports().to_vec(),
    };
    theirs.rates_before = rates::between(guest.reports(), quiet_from, began);
    if !finished {
        theirs.stood_at = Some(stood_at.clone());
        guest.listen();
        theirs.rates_during = rates::between(guest.reports(), began, ended);
        theirs.times = Some(times(&guest));
        screen.say(&format!("not done in {} s: {stood_at}", limit.as_secs()));
        drop((source, target));
        machine::remove_taps(lab);
        return Ok(());
    }
    theirs.total_s = Some((ended - began).as_secs_f64());
    screen.say("there; measuring the guest in its new place");
    linger(&mut guest, screen);
    guest.listen();
    let series = echo.stop();
    let gap = series.between(began, ended).echo_gap();
    theirs.echo_gap_ms = gap.map(|gap| gap.length.as_secs_f64() * 1e3);
    theirs.rates_during = rates::between(guest.reports(), began, ended);
    theirs.times = Some(times(&guest));
    theirs.rates_after = rates::between(guest.reports(), ended, Instant::now());
    if let (Some(gap), Some(blackout)) = (gap, theirs.blackout_ms) {
        let resumed = gap.start + Duration::from_secs_f64(blackout.max(0.0) / 1e3);
        let brownout = rates::brownout(guest.reports(), &theirs.rates_before, resumed);
        theirs.brownout_s = brownout.map(|b| b.as_secs_f64());
    }
    drop(source);
    let verdict = screen.while_doing("the guest checks its pages and shuts down", || {
        let outcome = guest.power_off(lab)?;
        let until = Instant::now() + Duration::from_secs(30);
        while target.is_running()? && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
        Ok::<_, CompareError>(guest.verify(outcome, &target.image)?)
    })?;
    theirs.verified = verdict.problems.is_empty();
    theirs.problems.extend(verdict.problems);
    drop(target);
    machine::remove_taps(lab);
    Ok(())
}

fn linger(guest: &mut Guest, screen: &mut Screen) {
    let until = Instant::now() + RATES_FOR;
    while Instant::now() < until {
        let left = until
            .saturating_duration_since(Instant::now())
            .as_secs_f64();
        screen.live(&format!("{left:2.0} s left: {}", now(guest).line()));
        std::thread::sleep(LOOK);
    }
}

fn now(guest: &mut Guest) -> Rates {
    guest.listen();
    let now = Instant::now();
    let from = now.checked_sub(rates::STEADY).unwrap_or(now);
    rates::lately(guest.reports(), from, now)
}

struct Run<'r> {
    source: &'r mut Machine,
    target: &'r mut Machine,
    guest: &'r mut Guest,
    screen: &'r mut Screen,
    ways: Ways,
    began: Instant,
    limit: Duration,
    stood_at: String,
}

impl Run<'_> {
    fn is_late(&self) -> bool {
        self.began.elapsed() >= self.limit
    }

    fn tell(&mut self, how_far: String) {
        let guest = now(self.guest).short();
        self.screen.live(&format!("{how_far}; guest: {guest}"));
        self.stood_at = how_far;
    }

    /// Beyond the switchover nothing can be given up: as much time again, and then it has failed.
    fn not_for_ever(&self) -> Result<(), CompareError> {
        if self.began.elapsed() < self.limit * 2 {
            return Ok(());
        }
        let said = "the switchover began and did not end".to_owned();
        Err(CompareError::Failed(said))
    }

    /// QEMU tells the time of day.
    fn since_the_beginning(&self, at: Duration) -> Option<f64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let ago = now.checked_sub(at)?;
        Some(self.began.elapsed().checked_sub(ago)?.as_secs_f64())
    }

    /// The disk, until both are equal; `false` if the time was not enough.
    fn disk(&mut self, theirs: &mut Theirs) -> Result<bool, CompareError> {
        let address = Host::B.wan_address().to_string();
        let to = &mut self.target.qmp;
        let listen = json!({"addr": {"type": "inet", "data": {"host": address, "port": NBD_PORT}}});
        to.execute("nbd-server-start", listen)?;
        let export =
            json!({"type": "nbd", "id": "e0", "node-name": DISK, "name": DISK, "writable": true});
        to.execute("block-export-add", export)?;
        let from = &mut self.source.qmp;
        let node = json!({
            "driver": "nbd", "node-name": TARGET, "export": DISK, "discard": "unmap",
            "server": {"type": "inet", "host": address, "port": NBD_PORT},
        });
        from.execute("blockdev-add", node)?;
        let copy_mode = match self.ways.write_blocking {
            true => "write-blocking",
            false => "background",
        };
        let job = json!({
            "job-id": JOB, "device": DISK, "target": TARGET, "sync": "full", "copy-mode": copy_mode,
        });
        from.execute("blockdev-mirror", job)?;
        self.screen.say("the disk is being mirrored");
        loop {
            if let Some(event) = self.source.qmp.last("BLOCK_JOB_COMPLETED") {
                let said = format!("the mirror ended: {}", event.data["error"]);
                return Err(CompareError::Failed(said));
            }
            if self.source.qmp.last("BLOCK_JOB_READY").is_some() {
                theirs.disk_s = Some(self.began.elapsed().as_secs_f64());
                return Ok(true);
            }
            if self.is_late() {
                return Ok(false);
            }
            let jobs = self.source.qmp.execute("query-block-jobs", json!({}))?;
            let number = |key: &str| jobs[0][key].as_f64().unwrap_or(0.0);
            let share = number("offset") / number("len").max(1.0);
            self.tell(format!("disk {:4.1} %", share * 100.0));
            std::thread::sleep(LOOK);
        }
    }

    /// Memory, the switchover and the end of the mirror; `false` if the time was not enough.
    fn memory(&mut self, theirs: &mut Theirs) -> Result<bool, CompareError> {
        self.screen.say(match self.ways.postcopy {
            true => "the disk is there and kept equal; now memory, by post-copy",
            false => "the disk is there and kept equal; now memory, pass by pass",
        });
        let uri = format!("tcp:{}:{RAM_PORT}", Host::B.wan_address());
        let mut capabilities = vec!["pause-before-switchover"];
        if self.ways.postcopy {
            capabilities.extend(["return-path", "postcopy-ram", "postcopy-preempt"]);
        }
        let list: Vec<_> = capabilities
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        for qmp in [&mut self.target.qmp, &mut self.source.qmp] {
            let list = json!({ "capabilities": list });
            qmp.execute("migrate-set-capabilities", list)?;
        }
        let to = &mut self.target.qmp;
        to.execute("migrate-incoming", json!({ "uri": uri }))?;
        let from = &mut self.source.qmp;
        from.execute(
            "migrate-set-parameters",
            json!({ "max-bandwidth": UNLIMITED }),
        )?;
        from.execute("migrate", json!({ "uri": uri }))?;
        let mut mirror_ends = false;
        let mut is_told = false;
        loop {
            let state = self.source.qmp.execute("query-migrate", json!({}))?;
            match state["status"].as_str().unwrap_or_default() {
                "completed" => break,
                // The first pass is counted when it begins.
                "active"
                    if self.ways.postcopy
                        && !is_told
                        && state["ram"]["dirty-sync-count"].as_u64() > Some(0) =>
                {
                    is_told = true;
                    let from = &mut self.source.qmp;
                    from.execute("migrate-start-postcopy", json!({}))?;
                    continue;
                }
                "failed" | "cancelled" | "postcopy-paused" => {
                    let said = format!("QEMU's migration failed: {}", state["error-desc"]);
                    return Err(CompareError::Failed(said));
                }
                "pre-switchover" if !mirror_ends => {
                    // The guest stands still: what the mirror lacks follows, then it lets go.
                    mirror_ends = true;
                    let job = json!({ "device": JOB });
                    self.source.qmp.execute("block-job-cancel", job)?;
                }
                "pre-switchover" => {
                    self.not_for_ever()?;
                    if self.source.qmp.last("BLOCK_JOB_COMPLETED").is_some() {
                        let go = json!({"state": "pre-switchover"});
                        self.source.qmp.execute("migrate-continue", go)?;
                    }
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                }
                _ => {}
            }
            if self.is_late() && !mirror_ends {
                return Ok(false);
            }
            self.not_for_ever()?;
            let ram = &state["ram"];
            let passes = ram["dirty-sync-count"].as_u64().unwrap_or(0);
            theirs.passes = passes;
            let mib = |key: &str| ram[key].as_f64().unwrap_or(0.0) / f64::from(1 << 20);
            let dirty = ram["dirty-pages-rate"].as_f64().unwrap_or(0.0) * 4096.0 * 8.0 / 1e6;
            if mirror_ends {
                std::thread::sleep(Duration::from_millis(5));
            } else {
                self.tell(format!(
                    "memory, pass {passes}, {:.0} MiB left, {:.0} MiB sent, the guest dirties {dirty:.0} Mbit/s",
                    mib("remaining"),
                    mib("transferred"),
                ));
                std::thread::sleep(LOOK);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.target.qmp.last("RESUME").is_none() {
            if Instant::now() >= deadline {
                let said = "the guest does not run at the destination".to_owned();
                return Err(CompareError::Failed(said));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let stop = self.source.qmp.last("STOP").map(|e| e.at);
        let resume = self.target.qmp.last("RESUME").map(|e| e.at);
        if let (Some(stop), Some(resume)) = (stop, resume) {
            theirs.blackout_ms = Some((resume.as_secs_f64() - stop.as_secs_f64()) * 1e3);
        }
        theirs.switch_s = resume.and_then(|at| self.since_the_beginning(at));
        // Else the export would hold the disk when the guest ends.
        self.target.qmp.execute("nbd-server-stop", json!({}))?;
        Ok(true)
    }
}
