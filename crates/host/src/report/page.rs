//! A migration as one HTML page that needs nothing else: no script, no network; readable on a dark screen, in the
//! light, and on paper. It is well-formed XML as well, so that programs can read it.

use std::fmt::Write;

use whimbrel_engine::space::{SpaceKind, UNIT};

use super::plot::{STYLE, Unit, escape, panel, say};
use super::plots::panels;
use super::ratio;
use crate::api::types::{Direction, Happened, MigrationState, ReportView, SpaceProgress};

const PAGE_STYLE: &str = "\
body{background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,'Segoe UI','DejaVu Sans',sans-serif;\
max-width:1020px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:2rem 0 .6rem}
p{margin:.3rem 0}.soft{color:var(--soft)}code{font:13px ui-monospace,'DejaVu Sans Mono',monospace}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.7rem;margin:1.2rem 0}
.tile{border:1px solid var(--grid);border-radius:8px;padding:.6rem .8rem}
.tile b{display:block;font-size:1.25rem}.tile span{color:var(--soft);font-size:.85rem}
svg.plot{width:100%;height:auto;display:block;margin:.4rem 0}
table{border-collapse:collapse;width:100%;font-size:14px}
table.narrow{width:auto;min-width:22rem}table.narrow td+td{padding-left:2rem}
th,td{text-align:left;padding:.28rem .7rem .28rem 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{display:inline-block;width:110px;height:9px;background:var(--grid);border-radius:4px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--c3)}
.bad{color:var(--stop)}
@media print{body{max-width:none;margin:0}svg.plot,table,.tiles{break-inside:avoid}\
.bar,.bar i,svg.plot *{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
";

/// `from a to b`, whichever of the two is asked.
pub(super) fn way(report: &ReportView) -> String {
    let (here, there) = (&report.host, &report.migration.peer);
    match report.migration.direction {
        Direction::Outgoing => format!("from {here} to {there}"),
        Direction::Incoming => format!("from {there} to {here}"),
    }
}

fn state(state: MigrationState) -> &'static str {
    match state {
        MigrationState::Running => "under way",
        MigrationState::Held => "held in its copy",
        MigrationState::Waiting => "waiting for the link",
        MigrationState::Completed => "completed",
        MigrationState::Cancelled => "cancelled",
        MigrationState::Failed => "failed",
        MigrationState::NeedsOperator => "needs the operator",
    }
}

fn millis(ms: f64) -> String {
    say(Unit::Millis, ms)
}

fn bytes(count: u64) -> String {
    say(Unit::Bytes, count as f64)
}

/// A name, a figure, and what it is in other words.
struct Figure(&'static str, String, String);

fn tiles(report: &ReportView) -> Vec<Figure> {
    let (view, summary) = (&report.migration, &report.summary);
    let told = view.report.as_ref();
    let peer = &view.peer;
    let mut tiles = vec![Figure(
        "time",
        millis(summary.total_ms as f64),
        state(view.state).to_string(),
    )];
    tiles.push(match (summary.blackout_ms, view.direction) {
        (Some(ms), _) => Figure(
            "blackout",
            millis(ms),
            "source STOP to destination RUNNING".to_string(),
        ),
        (None, Direction::Incoming) => {
            Figure("blackout", "?".to_string(), format!("{peer} knows it"))
        }
        (None, Direction::Outgoing) => Figure(
            "blackout",
            "none".to_string(),
            "the guest was not handed over".to_string(),
        ),
    });
    let moved = match view.direction {
        Direction::Outgoing => "sent",
        Direction::Incoming => "received",
    };
    let over = told.and_then(|r| ratio(r.units_sent, r.units_live));
    let over = over.map_or(String::new(), |r| {
        format!("units sent over units that had to be: {r:.3}")
    });
    tiles.push(Figure(moved, bytes(summary.bytes()), over));
    let demands = &view.demands;
    tiles.push(Figure(
        "demands",
        demands.count.to_string(),
        match demands.count {
            0 => "the guest never waited for the link".to_string(),
            _ => format!(
                "p99 {}, longest {}",
                millis(demands.p99_ms),
                millis(demands.max_ms)
            ),
        },
    ));
    if summary.guest_requests > 0 {
        tiles.push(Figure(
            "guest's I/O, p99",
            millis(summary.guest_p99_ms),
            format!(
                "{} requests, p50 {}",
                summary.guest_requests,
                millis(summary.guest_p50_ms)
            ),
        ));
    }
    let without: u64 = summary.outages.iter().map(|o| o.ms).sum();
    tiles.push(Figure(
        "without link",
        millis(without as f64),
        match summary.outages.len() {
            0 => "it never broke".to_string(),
            1 => "one outage".to_string(),
            n => format!("{n} outages"),
        },
    ));
    if told.is_some_and(|r| r.verified) {
        tiles.push(Figure(
            "verified",
            "yes".to_string(),
            "every extent's digest is equal".to_string(),
        ));
    }
    tiles
}

fn share(of: u64, all: u64) -> f64 {
    match all {
        0 => 100.0,
        all => (100.0 * of as f64 / all as f64).min(100.0),
    }
}

fn space_row(out: &mut String, space: &SpaceProgress, is_source: bool) {
    let kind = match space.kind {
        SpaceKind::Disk => "disk",
        SpaceKind::Ram => "RAM",
    };
    // Holes and zeroes are counted when they are known to be such.
    let there = share(space.units_resident, space.units_total);
    let only = |text: String| if is_source { text } else { "–".to_string() };
    let _ = writeln!(
        out,
        "<tr><td>{}</td><td>{kind}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
         <td class=\"n\">{}</td><td><span class=\"bar\"><i style=\"width:{there:.1}%\"></i></span> {there:.1} %</td></tr>",
        escape(&space.name),
        bytes(space.units_total * UNIT),
        only(bytes(space.units_live * UNIT)),
        only(space.units_sent.to_string()),
        only(bytes(space.bytes_sent)),
    );
}

/// Everything that is a figure and has no plot, in order.
fn figures(report: &ReportView) -> Vec<(String, String)> {
    let (view, summary) = (&report.migration, &report.summary);
    let mut rows: Vec<(String, String)> = vec![
        ("limit".into(), view.bandwidth.to_string()),
        (
            "compress, delta".into(),
            format!("{}, {}", view.compress, view.delta),
        ),
        ("RAM pushed".into(), bytes(summary.ram_bytes)),
        ("disks pushed".into(), bytes(summary.disk_bytes)),
        ("demanded".into(), bytes(summary.demand_bytes)),
    ];
    for part in &summary.blackout_parts {
        rows.push((format!("blackout: {}", part.name), millis(part.ms)));
    }
    if view.direction == Direction::Outgoing {
        for (name, ms) in [
            ("push held for the guest's I/O", summary.guard_ms),
            ("push held by its own limit", summary.limit_ms),
            ("push held by the host's limit", summary.host_ms),
        ] {
            rows.push((name.into(), millis(ms as f64)));
        }
        let codecs = view.codecs;
        rows.push((
            "units plain, zstd, zero".into(),
            format!("{}, {}, {}", codecs.plain, codecs.zstd, codecs.zero),
        ));
        rows.push((
            "units sent as what changed".into(),
            view.deltas.units.to_string(),
        ));
    }
    let demands = &view.demands;
    rows.push((
        "demands: p50, p99, longest".into(),
        format!(
            "{}, {}, {}",
            millis(demands.p50_ms),
            millis(demands.p99_ms),
            millis(demands.max_ms)
        ),
    ));
    if summary.guest_requests > 0 {
        rows.push((
            "guest's requests: p50, p99, longest".into(),
            format!(
                "{}, {}, {}",
                millis(summary.guest_p50_ms),
                millis(summary.guest_p99_ms),
                millis(summary.guest_max_ms)
            ),
        ));
    }
    if let Some(told) = &view.report {
        if let Some(ms) = told.drain_ms {
            rows.push(("drain".into(), millis(ms)));
        }
        for (name, units) in [
            ("units live", told.units_live),
            ("units sent", told.units_sent),
            (
                "sent again after a broken connection",
                told.units_sent_again,
            ),
            (
                "sent again before the switch, as written to",
                told.units_repeated,
            ),
            ("sent ahead in vain", told.units_outdated),
            (
                "not sent, as overwritten at the destination",
                told.units_forgotten,
            ),
            ("arrived though there already", told.late_copies),
        ] {
            rows.push((name.into(), units.to_string()));
        }
    }
    rows.push(("reconnects".into(), view.link.reconnects.to_string()));
    rows.push(("daemon restarts".into(), summary.restarts.to_string()));
    rows
}

fn table(out: &mut String, head: &str, rows: impl IntoIterator<Item = (String, String)>) {
    let _ = writeln!(out, "<h2>{head}</h2>\n<table class=\"narrow\">");
    for (name, value) in rows {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td class=\"n\">{}</td></tr>",
            escape(&name),
            escape(&value)
        );
    }
    out.push_str("</table>\n");
}

fn events(out: &mut String, report: &ReportView) {
    out.push_str(
        "<h2>What happened</h2>\n<table class=\"narrow\"><tr><th class=\"n\">after</th><th>what</th></tr>\n",
    );
    for event in &report.timeline.events {
        let what = match &event.what {
            Happened::Phase(phase) => format!("phase {phase}"),
            Happened::Stopped => "the guest is stopped".to_string(),
            Happened::Granted => match report.migration.direction {
                Direction::Outgoing => "the machine is granted".to_string(),
                Direction::Incoming => "the grant is heard".to_string(),
            },
            Happened::Ran => "the guest runs at the destination".to_string(),
            Happened::LinkDown => "the link is down".to_string(),
            Happened::LinkUp => "the link is up".to_string(),
            Happened::Restarted => "a restarted daemon goes on".to_string(),
            Happened::Told(words) => words.clone(),
        };
        let _ = writeln!(
            out,
            "<tr><td class=\"n\">{:.3} s</td><td>{}</td></tr>",
            event.at_ms as f64 / 1e3,
            escape(&what)
        );
    }
    out.push_str("</table>\n");
}

/// The page.
pub fn html(report: &ReportView) -> String {
    let view = &report.migration;
    let (machine, way) = (escape(view.machine.as_str()), escape(&way(report)));
    let is_source = view.direction == Direction::Outgoing;
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\"><head><meta charset=\"utf-8\"/>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\
         <meta name=\"color-scheme\" content=\"light dark\"/><title>{machine} {way}</title>\n\
         <style>{STYLE}{PAGE_STYLE}</style></head>\n<body>\n<h1>{machine} {way}</h1>\n\
         <p class=\"soft\">Migration <code>{}</code>, {}, as {} saw it. Began {}{}.</p>\n",
        escape(view.id.as_str()),
        state(view.state),
        escape(&report.host),
        report.timeline.started,
        view.ended
            .map_or(String::new(), |ended| format!(", ended {ended}")),
    );
    if let Some(error) = &view.error {
        let _ = writeln!(out, "<p class=\"bad\">{}</p>", escape(&error.to_string()));
    }
    out.push_str("<div class=\"tiles\">");
    for Figure(name, value, more) in tiles(report) {
        let _ = write!(
            out,
            "<div class=\"tile\"><span>{}</span><b>{}</b><span>{}</span></div>",
            escape(name),
            escape(&value),
            escape(&more)
        );
    }
    out.push_str("</div>\n");
    for part in panels(report) {
        out.push_str(&panel(&part));
    }
    out.push_str(
        "<p class=\"soft\">Red: the guest stands still. Grey: no link. Latencies do not count the link's own round \
         trip of requests that waited for the source; their scale is logarithmic.</p>\n",
    );
    let _ = writeln!(
        out,
        "<h2>Disks and RAM</h2>\n<table><tr><th>space</th><th>kind</th><th class=\"n\">size</th>\
         <th class=\"n\">has to be there</th><th class=\"n\">units sent</th><th class=\"n\">bytes sent</th>\
         <th>there</th></tr>"
    );
    for space in &view.spaces {
        space_row(&mut out, space, is_source);
    }
    out.push_str("</table>\n");
    let phases = report.summary.phases.iter();
    let phases = phases.map(|p| (p.phase.to_string(), millis(p.ms as f64)));
    table(&mut out, "Phases", phases);
    table(&mut out, "Figures", figures(report));
    events(&mut out, report);
    out.push_str("<h2>What is not here</h2>\n<ul>");
    for note in &report.elsewhere {
        let _ = write!(out, "<li>{}</li>", escape(note));
    }
    out.push_str("</ul>\n</body></html>\n");
    out
}

#[cfg(test)]
pub(crate) mod tests;
