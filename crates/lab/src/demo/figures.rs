//! What a move came to: gathered, written as JSON, and told to a person.

use crate::compare::Theirs;
use crate::link::LinkArgs;
use serde::Serialize;
use std::time::Duration;
use whimbrel_lab::guest::{Outcome, VerifyReport};
use whimbrel_lab::pair::answers::{MigrationReport, Phase, SentBytes, SpaceKind, SpaceProgress};
use whimbrel_lab::pair::journey::Journey;
use whimbrel_lab::pair::rates::{RECOVERED, Rates, STEADY};
use whimbrel_lab::pair::{GuestSpec, Verdict};

const UNIT: u64 = 4096;

/// Units of a space that has a line of its own.
const LARGE: u64 = 256;

/// Under what conditions.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    pub link_bits_per_s: u64,
    pub rtt_ms: f64,
    pub loss: f64,
    pub memory_mib: u32,
    pub disk_mib: u64,
    pub files_mib: u64,
    pub hot_set_mib: u32,
}

impl Setting {
    pub fn of(link: &LinkArgs, guest: &GuestSpec) -> Setting {
        Setting {
            link_bits_per_s: link.link,
            rtt_ms: link.rtt.as_secs_f64() * 1e3,
            loss: link.loss,
            memory_mib: guest.memory_mib,
            disk_mib: guest.disk.size_mib,
            files_mib: guest.disk.files_mib,
            hot_set_mib: guest.params.ram.hot_mib,
        }
    }
}

/// Everything that is known about a move. Bytes, seconds, milliseconds, as the names say.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    pub setting: Setting,
    pub total_s: f64,
    /// QEMU's STOP at the source to its RESUME at the destination.
    pub blackout_ms: Option<f64>,
    /// The client's longest time between two answered echo requests.
    pub echo_gap_ms: Option<f64>,
    /// Until the guest works as before; absent if that was not seen.
    pub brownout_s: Option<f64>,
    /// Frames, their headers included, before TLS and TCP.
    pub bytes_sent: u64,
    /// Units that were neither hole nor zero, once each.
    pub unique_bytes: u64,
    pub sent_over_unique: f64,
    pub units_sent_over_live: f64,
    /// What the emulator carried to the destination, IP headers included, and back.
    pub wan_bytes: u64,
    pub wan_bytes_back: u64,
    /// Share of the link that was used from the beginning of the copy to the end.
    pub link_use: Option<f64>,
    pub demands: u64,
    pub demand_p50_ms: f64,
    pub demand_p99_ms: f64,
    pub demand_max_ms: f64,
    /// Errors the guest found, by itself.
    pub errors: u64,
    /// Digests by the daemons, and guest and disk by the laboratory: all equal.
    pub verified: bool,
    pub problems: Vec<String>,
    pub rates_before: Rates,
    pub rates_during: Rates,
    pub rates_after: Rates,
    /// Milliseconds after the command when each phase was first heard of.
    pub phases_ms: Vec<(String, f64)>,
    pub sent: SentBytes,
    pub spaces: Vec<SpaceProgress>,
    pub report: Option<MigrationReport>,
    pub guest_said: Option<Outcome>,
    pub disk_check: Option<VerifyReport>,
    /// QEMU's own move of the same guest, if it was asked for.
    pub qemu: Option<Theirs>,
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Figures {
    pub fn gather(
        setting: Setting,
        journey: &Journey,
        verdict: Option<&Result<Verdict, String>>,
    ) -> Figures {
        let mut problems = journey.problems();
        let checked = match verdict {
            Some(Ok(verdict)) => Some(verdict),
            Some(Err(error)) => {
                problems.push(error.clone());
                None
            }
            None => None,
        };
        problems.extend(checked.into_iter().flat_map(|v| v.problems.clone()));
        let view = journey.view();
        let report = journey.report();
        let sent = report.map_or_else(|| view.map(|v| v.sent).unwrap_or_default(), |r| r.sent);
        let live = report.map_or(0, |r| r.units_live);
        let unique = live * UNIT;
        let ratio = |part: u64, whole: u64| match whole {
            0 => 0.0,
            _ => part as f64 / whole as f64,
        };
        let demands = report.map(|r| r.demands).unwrap_or_default();
        let reached = |wanted| {
            let mut phases = journey.phases.iter();
            phases.find_map(|(phase, at)| (*phase == wanted).then_some(*at))
        };
        // From the first content that may have gone, ahead of the switch, to the last.
        let flowing = match (reached(Phase::Copy), reached(Phase::Complete)) {
            (Some(from), Some(to)) if to > from => Some((to - from).as_secs_f64()),
            _ => None,
        };
        let bits = journey.wan_out.out_bytes as f64 * 8.0;
        Figures {
            total_s: journey.took.as_secs_f64(),
            blackout_ms: report.and_then(MigrationReport::stop_to_resume_ms),
            echo_gap_ms: journey.gap.map(|gap| ms(gap.length)),
            brownout_s: journey.brownout.map(|b| b.as_secs_f64()),
            bytes_sent: sent.total(),
            unique_bytes: unique,
            sent_over_unique: ratio(sent.total(), unique),
            units_sent_over_live: ratio(report.map_or(0, |r| r.units_sent), live),
            wan_bytes: journey.wan_out.out_bytes,
            wan_bytes_back: journey.wan_back.out_bytes,
            link_use: flowing.map(|s| bits / s / setting.link_bits_per_s as f64),
            demands: demands.count,
            demand_p50_ms: demands.p50_ms,
            demand_p99_ms: demands.p99_ms,
            demand_max_ms: demands.max_ms,
            errors: checked.map_or(journey.guest_errors, |v| v.outcome.errors),
            verified: report.is_some_and(|r| r.verified)
                && checked.is_some_and(|v| v.problems.is_empty()),
            problems,
            rates_before: journey.before,
            rates_during: journey.during,
            rates_after: journey.after,
            phases_ms: journey
                .phases
                .iter()
                .map(|(phase, at)| (phase.to_string(), ms(*at)))
                .collect(),
            sent,
            spaces: view.map(|v| v.spaces.clone()).unwrap_or_default(),
            report: report.cloned(),
            guest_said: checked.map(|v| v.outcome.clone()),
            disk_check: checked.map(|v| v.disk.clone()),
            qemu: None,
            setting,
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut lines = Vec::new();
        let mut line = |name: &str, value: String, note: &str| {
            lines.push(
                format!("  {name:<14}{value:>12}  {note}")
                    .trim_end()
                    .to_owned(),
            );
        };
        line(
            "total",
            format!("{:.1} s", self.total_s),
            "from the command until everything was there, compared and equal",
        );
        line(
            "blackout",
            shown(self.blackout_ms, "ms", 0),
            &format!(
                "STOP at the source to RESUME at the destination; the round trip is {} ms",
                self.setting.rtt_ms
            ),
        );
        line(
            "echo gap",
            shown(self.echo_gap_ms, "ms", 0),
            "the client's longest time between answered requests, one every 5 ms",
        );
        line("brownout", shown(self.brownout_s, "s", 1), &brownout_note());
        line(
            "sent",
            mib(self.bytes_sent),
            &format!(
                "in frames: {} pushed, {} on demand, {} control",
                mib(self.sent.push),
                mib(self.sent.demand),
                mib(self.sent.control)
            ),
        );
        // QEMU's tables and firmware are spaces as well, of some KiB each.
        for space in self.spaces.iter().filter(|s| s.units_live >= LARGE) {
            let kind = match space.kind {
                SpaceKind::Disk => "disk",
                SpaceKind::Ram => "RAM",
            };
            line(
                "",
                mib(space.bytes_sent),
                &format!(
                    "{kind} {}, {} live",
                    space.name,
                    mib(space.units_live * UNIT)
                ),
            );
        }
        line(
            "sent/unique",
            format!("{:.3}", self.sent_over_unique),
            &format!(
                "of {} live content; units {:.3}; headers included",
                mib(self.unique_bytes),
                self.units_sent_over_live
            ),
        );
        let codecs = self.report.as_ref().map(|r| r.codecs).unwrap_or_default();
        line(
            "",
            mib(self.sent.content),
            &format!(
                "of content in these frames: {} units zstd, {} plain, {} zero",
                codecs.zstd, codecs.plain, codecs.zero
            ),
        );
        line(
            "",
            mib(self.report.as_ref().map_or(0, |r| r.units_outdated) * UNIT),
            "went ahead of the switch in vain: the guest wrote there before it",
        );
        line(
            "over the link",
            mib(self.wan_bytes),
            &format!(
                "counted by the emulator, TLS and TCP included; {} back; {} of the link",
                mib(self.wan_bytes_back),
                shown(self.link_use.map(|u| u * 100.0), "%", 1)
            ),
        );
        line(
            "demands",
            self.demands.to_string(),
            &format!(
                "p50 {:.0} ms, p99 {:.0} ms, longest {:.0} ms",
                self.demand_p50_ms, self.demand_p99_ms, self.demand_max_ms
            ),
        );
        for (name, rates) in [
            ("guest before", &self.rates_before),
            ("during", &self.rates_during),
            ("after", &self.rates_after),
        ] {
            lines.push(format!("  {name:<14}{}", rates.line()));
        }
        lines.push(format!("  {:<14}{}", "checked", self.checks()));
        for problem in &self.problems {
            lines.push(format!("  WRONG         {problem}"));
        }
        lines.join("\n")
    }

    fn checks(&self) -> String {
        let (Some(said), Some(disk)) = (&self.guest_said, &self.disk_check) else {
            return "not to the end".to_owned();
        };
        format!(
            "{} pages by the guest, {} errors; {} files ({}), {} log records, {} random blocks,\n  {:<14}\
             and the file system: {}",
            said.ram_pages_checked,
            said.errors,
            disk.files_checked,
            mib(disk.file_bytes),
            disk.log_records_checked,
            disk.random_blocks_checked,
            "",
            match self.verified {
                true => "all as it must be",
                false => "NOT as it must be",
            }
        )
    }
}

pub fn brownout_note() -> String {
    format!(
        "from RESUME until each workload does {:.0} % of before, for {} s on end",
        RECOVERED * 100.0,
        STEADY.as_secs()
    )
}

/// A figure with its unit, or a dash.
pub fn shown(value: Option<f64>, unit: &str, digits: usize) -> String {
    value.map_or("-".to_owned(), |v| format!("{v:.digits$} {unit}"))
}

pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
