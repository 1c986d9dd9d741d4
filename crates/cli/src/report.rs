//! `whimbrel report`: what a migration did, in the terminal or as a page.

use std::path::Path;

use crate::args::Report;
use crate::context::Context;
use crate::error::CliError;
use crate::output::{pairs, table};
use crate::show::{bytes, link, millis, percent, state};
use whimbrel_engine::space::UNIT;
use whimbrel_host::api::{
    Direction, Listed, MigrationState, ReportEntry, ReportView, SpaceProgress, Summary,
};
use whimbrel_host::report::{html, ratio, svg};

/// Most migrations named where one that was asked for is not among them.
const NAMED: usize = 10;

pub async fn report(context: &Context, command: Report) -> Result<(), CliError> {
    let known: Listed<ReportEntry> = context.client.get("/v1/reports").await?;
    if command.list {
        context.answer_list(&known, entries);
        return Ok(());
    }
    let chosen = choose(&known.items, command.migration.as_deref())?;
    let path = format!("/v1/reports/{}", chosen.id);
    let view: ReportView = context.client.get(&path).await?;
    let mut written = Vec::new();
    if let Some(file) = &command.html {
        write(file, &html(&view))?;
        written.push(file.display().to_string());
    }
    if let Some(file) = &command.svg {
        write(file, &svg(&view))?;
        written.push(file.display().to_string());
    }
    // Who asks for JSON has it, whatever else is written.
    match written.is_empty() || context.json {
        true => context.answer(&view, text),
        false => context.done(&format!("wrote {}", written.join(" and "))),
    }
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<(), CliError> {
    std::fs::write(file, text).map_err(|source| CliError::File {
        action: "write",
        path: file.to_path_buf(),
        source,
    })
}

/// The newest that fits what was asked for: a machine's name, or the beginning of an id that fits one only.
fn choose<'a>(known: &'a [ReportEntry], asked: Option<&str>) -> Result<&'a ReportEntry, CliError> {
    let unknown = || CliError::NoReport {
        asked: asked.unwrap_or_default().to_string(),
        known: known.iter().take(NAMED).map(entry_words).collect(),
    };
    let Some(asked) = asked else {
        return known.first().ok_or_else(unknown);
    };
    if let Some(of_machine) = known.iter().find(|e| e.machine.as_str() == asked) {
        return Ok(of_machine);
    }
    let mut fitting = known.iter().filter(|e| e.id.as_str().starts_with(asked));
    match (fitting.next(), fitting.next()) {
        (Some(one), None) if !asked.is_empty() => Ok(one),
        (Some(one), Some(_)) if one.id.as_str() == asked => Ok(one),
        _ => Err(unknown()),
    }
}

fn way(direction: Direction, peer: impl std::fmt::Display) -> String {
    match direction {
        Direction::Outgoing => format!("to {peer}"),
        Direction::Incoming => format!("from {peer}"),
    }
}

fn entry_words(entry: &ReportEntry) -> String {
    format!(
        "{} ({} {}, {})",
        entry.id,
        entry.machine,
        way(entry.direction, &entry.peer),
        entry.started
    )
}

fn entries(entries: &[ReportEntry]) -> String {
    let rows: Vec<_> = entries
        .iter()
        .map(|e| {
            [
                e.machine.to_string(),
                way(e.direction, &e.peer),
                e.phase.to_string(),
                state(e.state).to_string(),
                e.started.to_string(),
                e.id.to_string(),
            ]
        })
        .collect();
    table(
        ["MACHINE", "WAY", "PHASE", "STATE", "BEGAN", "MIGRATION"],
        &rows,
    )
}

fn secs(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        _ => format!("{:.1} s", ms as f64 / 1e3),
    }
}

fn blackout(report: &ReportView) -> String {
    let summary = &report.summary;
    let parts: Vec<String> = summary
        .blackout_parts
        .iter()
        .map(|p| format!("{} {}", p.name, millis(p.ms)))
        .collect();
    let whole = match summary.blackout_ms {
        Some(ms) => millis(ms),
        None if report.migration.direction == Direction::Incoming => {
            format!("{} knows it", report.migration.peer)
        }
        None => return String::new(),
    };
    match parts.is_empty() {
        true => whole,
        false => format!("{whole} ({})", parts.join(", ")),
    }
}

fn moved(report: &ReportView) -> String {
    let s = &report.summary;
    let mut text = format!(
        "{}: RAM {}, disks {}, on demand {}",
        bytes(s.bytes()),
        bytes(s.ram_bytes),
        bytes(s.disk_bytes),
        bytes(s.demand_bytes)
    );
    let told = report.migration.report.as_ref();
    if let Some((told, ratio)) = told.and_then(|r| Some((r, ratio(r.units_sent, r.units_live)?))) {
        text.push_str(&format!(
            "; {} units for {} live ones ({ratio:.3})",
            told.units_sent, told.units_live
        ));
    }
    text
}

fn guest(s: &Summary) -> String {
    match s.guest_requests {
        0 => String::new(),
        n => format!(
            "{n} requests, p50 {}, p99 {}, longest {}",
            millis(s.guest_p50_ms),
            millis(s.guest_p99_ms),
            millis(s.guest_max_ms)
        ),
    }
}

fn outages(report: &ReportView) -> String {
    let outages = &report.summary.outages;
    let without: u64 = outages.iter().map(|o| o.ms).sum();
    match outages.len() {
        0 => "never broke".to_string(),
        n => {
            let first: Vec<String> = outages
                .iter()
                .take(4)
                .map(|o| format!("{} after {}", secs(o.ms), secs(o.from_ms)))
                .collect();
            let more = if n > 4 { ", ..." } else { "" };
            format!("down {} in all: {}{more}", secs(without), first.join(", "))
        }
    }
}

fn held(report: &ReportView) -> String {
    let s = &report.summary;
    let reasons = [
        ("for the guest's I/O", s.guard_ms),
        ("by its own limit", s.limit_ms),
        ("by the host's limit", s.host_ms),
    ];
    let held: Vec<String> = reasons
        .iter()
        .filter(|(_, ms)| *ms > 0)
        .map(|(name, ms)| format!("{} {name}", secs(*ms)))
        .collect();
    match (held.is_empty(), report.migration.direction) {
        (false, _) => held.join(", "),
        (true, Direction::Outgoing) => "nothing but the link".to_string(),
        (true, Direction::Incoming) => String::new(),
    }
}

fn space_rows(report: &ReportView) -> String {
    let is_source = report.migration.direction == Direction::Outgoing;
    let row = |s: &SpaceProgress| {
        // Holes and zeroes are counted when they are known to be such.
        let there = (s.units_resident.min(s.units_total) * 1000)
            .checked_div(s.units_total)
            .unwrap_or(1000);
        let only = |text: String| if is_source { text } else { "-".to_string() };
        [
            s.name.clone(),
            bytes(s.units_total * UNIT),
            only(bytes(s.units_live * UNIT)),
            only(bytes(s.bytes_sent)),
            percent(there as u16),
        ]
    };
    let rows: Vec<_> = report.migration.spaces.iter().map(row).collect();
    table(["SPACE", "SIZE", "LIVE", "BYTES SENT", "THERE"], &rows)
}

fn text(report: &ReportView) -> String {
    let (view, s) = (&report.migration, &report.summary);
    let phases: Vec<String> = s
        .phases
        .iter()
        .map(|p| match p.phase.is_final() {
            true => p.phase.to_string(),
            false => format!("{} {}", p.phase, secs(p.ms)),
        })
        .collect();
    let demands = match view.demands.count {
        0 => "none".to_string(),
        n => format!(
            "{n}, p50 {}, p99 {}, longest {}",
            millis(view.demands.p50_ms),
            millis(view.demands.p99_ms),
            millis(view.demands.max_ms)
        ),
    };
    let settled = view.ended.is_some();
    let mut text = pairs(&[
        (
            "migration",
            format!(
                "{} of {} {}",
                view.id,
                view.machine,
                way(view.direction, &view.peer)
            ),
        ),
        ("state", state(view.state).to_string()),
        ("began", report.timeline.started.to_string()),
        ("ended", view.ended.map_or(String::new(), |e| e.to_string())),
        ("time", secs(s.total_ms)),
        ("phases", phases.join(", ")),
        ("blackout", blackout(report)),
        (
            if view.direction == Direction::Outgoing {
                "sent"
            } else {
                "received"
            },
            moved(report),
        ),
        ("demands", demands),
        ("guest's I/O", guest(s)),
        ("push held", held(report)),
        ("link", outages(report)),
        (
            "link now",
            if settled {
                String::new()
            } else {
                link(&view.link)
            },
        ),
        (
            "restarts",
            match s.restarts {
                0 => String::new(),
                n => format!("{n} of the daemon"),
            },
        ),
        (
            "verified",
            match (&view.report, view.state) {
                (Some(r), _) if r.verified => "every extent's digest is equal".to_string(),
                (None, MigrationState::Completed) if view.direction == Direction::Incoming => {
                    "every extent's digest is equal".to_string()
                }
                _ => "not yet".to_string(),
            },
        ),
        (
            "error",
            view.error
                .as_ref()
                .map_or(String::new(), |e| e.what.clone()),
        ),
    ]);
    if !view.spaces.is_empty() {
        text.push_str("\n\n");
        text.push_str(&space_rows(report));
    }
    for note in &report.elsewhere {
        text.push_str(&format!("\n\nNote: {note}."));
    }
    text
}

/// Told with a migration that is not known.
pub fn known_words(known: &[String]) -> String {
    match known.is_empty() {
        true => "this host knows of no migration yet".to_string(),
        false => format!("known are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_host::api::fake::{sample_migration, sample_report};
    use whimbrel_host::state::Timestamp;

    fn entry(id: &str, machine: &str, at: u64) -> ReportEntry {
        ReportEntry {
            id: id.parse().unwrap(),
            machine: machine.parse().unwrap(),
            started: Timestamp::from_unix(at),
            ..ReportEntry::from(&sample_migration())
        }
    }

    #[test]
    fn a_machine_means_its_newest_and_an_id_may_be_cut() {
        let known = [
            entry("aa11", "web1", 30),
            entry("ab22", "db", 20),
            entry("cc33", "web1", 10),
        ];
        let chosen = |asked| choose(&known, asked).map(|e| e.id.to_string()).ok();
        assert_eq!(chosen(None).as_deref(), Some("aa11"));
        assert_eq!(chosen(Some("web1")).as_deref(), Some("aa11"));
        assert_eq!(chosen(Some("c")).as_deref(), Some("cc33"));
        assert_eq!(chosen(Some("ab22")).as_deref(), Some("ab22"));
        assert_eq!(chosen(Some("a")), None);
        assert_eq!(chosen(Some("")), None);
        assert_eq!(chosen(Some("mail")), None);
    }

    #[test]
    fn an_unknown_migration_is_told_with_those_known() {
        let known = [entry("aa11", "web1", 30)];
        let error = choose(&known, Some("mail")).unwrap_err().explain();
        assert!(error.what.contains("mail"), "{error:?}");
        assert!(error.next_step.unwrap().contains("aa11 (web1 to b"));
        let error = choose(&[], None).unwrap_err().explain();
        assert!(error.next_step.unwrap().contains("no migration yet"));
    }

    #[test]
    fn the_terminal_has_it_all_in_a_screen() {
        let text = text(&sample_report());
        for part in [
            "m-1 of web1 to b",
            "30.0 s",
            "prepare 1.2 s, copy 6.8 s, quiesce 20 ms, grant 60 ms, drain 21.9 s, complete",
            "72 ms (stop to grant 25 ms, grant to running, the way included 47 ms)",
            "down 3.0 s in all: 3.0 s after 15.0 s",
            "for the guest's I/O",
            "pc.ram",
            "only b knows",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(text.lines().count() < 30, "{text}");
    }
}
