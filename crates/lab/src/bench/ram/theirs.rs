//! A move by QEMU's own means.
//!
//! Both QEMUs have the same small disk by the same file, as on storage that they share: nothing of it crosses the
//! link, while Whimbrel's does. Everything else is QEMU's default, downtime of 300 ms included, but for the rate,
//! which is not limited, and what [`Theirs`] names. libvirt's return path is on.

use super::RamArgs;
use super::case::{Cell, GuestKind, STREAM_PORT, Theirs};
use super::cpu::CpuMeter;
use super::row::{Row, Seen};
use super::stream::StreamClient;
use crate::compare::CompareError;
use crate::compare::machine::{self, Machine};
use crate::compare::qmp::{Event, Qmp};
use crate::screen::Screen;
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use whimbrel_lab::net::{Host, Lab, guest_address};
use whimbrel_lab::pair::{Folder, Guest};
use whimbrel_lab::wan::Direction;

const PORT: u16 = 4444;

const BOOT_WITHIN: Duration = Duration::from_secs(120);
const END_WITHIN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

/// No limit, in bytes a second.
const UNLIMITED: u64 = 1 << 40;

pub fn play(
    args: &RamArgs,
    cell: Cell,
    theirs: Theirs,
    row: &mut Row,
    screen: &mut Screen,
) -> Result<(), CompareError> {
    let lab = Lab::new(&cell.link.lab())?;
    let folder = Folder::new()?;
    let spec = cell.guest.spec(args);
    let seed = spec.params.seed;
    let mut guest = Guest::new(&lab, spec)?;
    let image = folder.path().join("disk.raw");
    guest.disk().copy_to(&image)?;
    let start = |host, name, incoming| {
        let folder = folder.path().join(name);
        Machine::start(&lab, host, &guest, &folder, image.clone(), incoming)
    };
    let source = start(Host::A, "a", false)?;
    let target = start(Host::B, "b", true)?;
    screen.while_doing("boot", || guest.wait_until_at_work(BOOT_WITHIN))?;
    let mut run = Run {
        source,
        target,
        theirs,
    };
    run.prepare(args, row)?;

    let stream = match cell.guest {
        GuestKind::Stream => Some(StreamClient::start(
            &lab,
            guest_address(0),
            STREAM_PORT,
            seed,
        )?),
        _ => None,
    };
    let meter = CpuMeter::start(&lab);
    let echo = guest.echo(&lab)?;
    let quiet_from = Instant::now();
    linger(&mut guest, args.quiet_time());
    let bytes = |way| lab.wan().stats(way).counts.out_bytes;
    let (out, back) = (bytes(Direction::AToB), bytes(Direction::BToA));
    let began = Instant::now();
    run.begin()?;
    row.finished = run.drive(began + args.limit(), &mut guest, row, screen)?;
    let ended = Instant::now();
    row.wan_bytes = bytes(Direction::AToB) - out;
    row.wan_bytes_back = bytes(Direction::BToA) - back;
    linger(&mut guest, args.quiet_time());
    guest.listen();
    let echo = echo.stop();
    let streamed = stream.map(StreamClient::stop).transpose()?;
    let (stop, resume) = run.switchover();
    if let (Some(stop), Some(resume)) = (&stop, &resume) {
        row.blackout_ms = Some((resume.at.as_secs_f64() - stop.at.as_secs_f64()) * 1e3);
    }
    row.measured(&Seen {
        quiet_from,
        began,
        ended,
        resumed: resume.as_ref().and_then(instant),
        reports: guest.reports(),
        echo: &echo,
        streamed: streamed.as_ref(),
        cpu: meter.stop(began, ended),
    });
    let home = match row.finished {
        true => Some(Host::B),
        false => run.settle(args, &mut guest, row, screen)?,
    };
    let Some(home) = home else {
        return Ok(());
    };
    let Run { source, target, .. } = run;
    let mut home = match home {
        Host::A => {
            drop(target);
            source
        }
        Host::B => {
            drop(source);
            target
        }
    };
    let verdict = screen.while_doing("check", || {
        let outcome = guest.power_off(&lab)?;
        let until = Instant::now() + END_WITHIN;
        while home.is_running()? && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
        Ok::<_, CompareError>(guest.verify(outcome, &home.image)?)
    })?;
    row.problems.extend(verdict.problems);
    row.checked = true;
    drop(home);
    machine::remove_taps(&lab);
    Ok(())
}

fn linger(guest: &mut Guest, time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        guest.listen();
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// QEMU's clock is the machine's; `None` for a time before this program's clock began.
fn instant(event: &Event) -> Option<Instant> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Instant::now().checked_sub(now.saturating_sub(event.at))
}

struct Run {
    source: Machine,
    target: Machine,
    theirs: Theirs,
}

impl Run {
    fn both(&mut self, command: &str, arguments: &Value) -> Result<(), CompareError> {
        for qmp in [&mut self.target.qmp, &mut self.source.qmp] {
            qmp.execute(command, arguments.clone())?;
        }
        Ok(())
    }

    /// Says what the way needs; notes what this QEMU lacks and what is done instead.
    fn prepare(&mut self, args: &RamArgs, row: &mut Row) -> Result<(), CompareError> {
        let mut capabilities = vec!["return-path"];
        let mut parameters = json!({ "max-bandwidth": UNLIMITED });
        match self.theirs {
            Theirs::Precopy => {}
            Theirs::Xbzrle => {
                capabilities.push("xbzrle");
                let cache = u64::from(args.memory.next_power_of_two()) << 20;
                parameters["xbzrle-cache-size"] = json!(cache);
            }
            Theirs::Multifd => capabilities.push("multifd"),
            Theirs::Postcopy { .. } => {
                capabilities.push("postcopy-ram");
                if knows(&mut self.source.qmp, "postcopy-preempt")? {
                    capabilities.push("postcopy-preempt");
                } else {
                    row.note = Some("this QEMU has no postcopy-preempt".to_owned());
                }
            }
        }
        let list: Vec<_> = capabilities
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        self.both("migrate-set-capabilities", &json!({"capabilities": list}))?;
        self.both("migrate-set-parameters", &parameters)?;
        if self.theirs == Theirs::Multifd {
            let by = |codec| json!({ "multifd-compression": codec });
            match self.both("migrate-set-parameters", &by("zstd")) {
                Err(CompareError::Refused { .. }) => {
                    self.both("migrate-set-parameters", &by("zlib"))?;
                    row.note = Some("by zlib, as this QEMU has no zstd".to_owned());
                }
                said => said?,
            }
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), CompareError> {
        let uri = json!({ "uri": format!("tcp:{}:{PORT}", Host::B.wan_address()) });
        self.target.qmp.execute("migrate-incoming", uri.clone())?;
        self.source.qmp.execute("migrate", uri)?;
        Ok(())
    }

    /// Until the guest and all of its memory are there, or the time is over; whether they are.
    fn drive(
        &mut self,
        deadline: Instant,
        guest: &mut Guest,
        row: &mut Row,
        screen: &mut Screen,
    ) -> Result<bool, CompareError> {
        let mut switched = false;
        loop {
            guest.listen();
            let state = self.source.qmp.execute("query-migrate", json!({}))?;
            let status = state["status"].as_str().unwrap_or_default();
            let ram = &state["ram"];
            let passes = ram["dirty-sync-count"].as_u64().unwrap_or(0);
            row.passes = Some(passes as f64);
            match (status, self.theirs) {
                ("completed", _) if self.target.qmp.last("RESUME").is_some() => return Ok(true),
                ("failed" | "cancelled" | "postcopy-paused", _) => {
                    let said = format!("QEMU's migration: {status}, {}", state["error-desc"]);
                    return Err(CompareError::Failed(said));
                }
                // The first pass is counted when it begins.
                ("active", Theirs::Postcopy { passes: wanted }) if !switched && passes > wanted => {
                    self.source
                        .qmp
                        .execute("migrate-start-postcopy", json!({}))?;
                    switched = true;
                }
                _ => {}
            }
            let mib = |key: &str| ram[key].as_f64().unwrap_or(0.0) / f64::from(1 << 20);
            let stands = format!(
                "{status}, pass {passes}, {:.0} MiB left, {:.0} MiB sent",
                mib("remaining"),
                mib("transferred"),
            );
            screen.live(&format!("{}: {stands}", row.mover));
            if Instant::now() >= deadline {
                row.note = Some(stands);
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
    }

    fn switchover(&self) -> (Option<Event>, Option<Event>) {
        (self.source.qmp.last("STOP"), self.target.qmp.last("RESUME"))
    }

    /// Where the guest of a move that took too long can be checked: a pre-copy is given up, a post-copy has as much
    /// time again.
    fn settle(
        &mut self,
        args: &RamArgs,
        guest: &mut Guest,
        row: &mut Row,
        screen: &mut Screen,
    ) -> Result<Option<Host>, CompareError> {
        let note = row.note.clone();
        if self.switchover().1.is_some() {
            let deadline = Instant::now() + args.limit();
            let there = self.drive(deadline, guest, row, screen)?;
            row.note = note;
            return Ok(there.then_some(Host::B));
        }
        self.source.qmp.execute("migrate_cancel", json!({}))?;
        let deadline = Instant::now() + END_WITHIN;
        while Instant::now() < deadline {
            let state = self.source.qmp.execute("query-migrate", json!({}))?;
            let status = self.source.qmp.execute("query-status", json!({}))?;
            if state["status"] == "cancelled" && status["running"] == true {
                return Ok(Some(Host::A));
            }
            if state["status"] == "completed" {
                return Ok(Some(Host::B));
            }
            std::thread::sleep(LOOK);
        }
        Ok(None)
    }
}

fn knows(qmp: &mut Qmp, capability: &str) -> Result<bool, CompareError> {
    let known = qmp.execute("query-migrate-capabilities", json!({}))?;
    let mut known = known.as_array().into_iter().flatten();
    Ok(known.any(|one| one["capability"] == capability))
}
